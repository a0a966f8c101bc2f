//! The tombstone file: where lines are appended, and read. A line is on disk before the transaction commits that makes it true; where
//! that is rolled back after all, another line says so.

use std::cell::{Cell, RefCell};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::error::{Error, Result};
use super::guc;
use crate::domain::tombstone::{Tombstone, What, code_of, new_id};
use crate::domain::vault::Signer;

/// Whoever has the file locked writes a few lines.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How far back the last line is looked for at first.
const BACK: u64 = 64 * 1024;

/// Where the setting leads to.
///
/// # Errors
/// The path is relative, or in the data directory, which a restore turns back.
fn path() -> Result<Option<PathBuf>> {
    let Some(path) = guc::tombstone_file().map(PathBuf::from) else {
        return Ok(None);
    };
    if !path.is_absolute() {
        return Err(Error::tombstones("has no absolute path"));
    }
    // SAFETY: set at the server's start, a C string.
    let data = unsafe { std::ffi::CStr::from_ptr(pg_sys::DataDir) };
    let whole = |path: &Path| std::fs::canonicalize(path).ok();
    let folder = whole(&path).or_else(|| whole(path.parent()?));
    if let (Some(folder), Some(data)) = (folder, whole(Path::new(&*data.to_string_lossy())))
        && folder.starts_with(data)
    {
        return Err(Error::tombstones("lies in the data directory"));
    }
    Ok(Some(path))
}

fn failed(what: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |e| Error::tombstones(format!("cannot be {what} ({})", e.kind()))
}

/// The file, open.
pub struct Book {
    file: File,
    pub size: u64,
}

impl Book {
    /// To be read; `None` where no file is configured, or it is not there.
    ///
    /// # Errors
    /// It cannot be read, or others than its owner can.
    pub fn open() -> Result<Option<Self>> {
        let Some(path) = path()? else { return Ok(None) };
        match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("opened")(e)),
            Ok(file) => Self::checked(file).map(Some),
        }
    }

    /// To be written to, made if need be.
    fn open_to_write(path: &Path) -> Result<Self> {
        let options = || OpenOptions::new().read(true).append(true).to_owned();
        match options().mode(0o600).create_new(true).open(path) {
            Ok(file) => {
                let folder = path.parent().ok_or_else(|| Error::tombstones("has no directory"))?;
                let synced = File::open(folder).and_then(|f| f.sync_all());
                synced.map_err(failed("made"))?;
                Self::checked(file)
            }
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                Self::checked(options().open(path).map_err(failed("opened"))?)
            }
            Err(e) => Err(failed("made")(e)),
        }
    }

    fn checked(file: File) -> Result<Self> {
        let meta = file.metadata().map_err(failed("examined"))?;
        if !meta.is_file() {
            return Err(Error::tombstones("is no ordinary file"));
        }
        if meta.mode() & 0o077 != 0 {
            return Err(Error::tombstones("can be read or written by others than its owner"));
        }
        Ok(Self { file, size: meta.len() })
    }

    /// The code of the last line that ends at `end` or before: empty where there is none. `None` where no line ends at `end`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn code_at(&mut self, end: u64) -> Result<Option<String>> {
        if end > self.size {
            return Ok(None);
        }
        let mut back = BACK;
        loop {
            let from = end.saturating_sub(back);
            let mut bytes = vec![0; usize::try_from(end - from).unwrap_or(usize::MAX)];
            self.file.seek(SeekFrom::Start(from)).map_err(failed("read"))?;
            self.file.read_exact(&mut bytes).map_err(failed("read"))?;
            if bytes.last().is_some_and(|b| *b != b'\n') {
                return Ok(None);
            }
            let code = bytes.split(|b| *b == b'\n').rev().find_map(code_of);
            if code.is_some() || from == 0 {
                return Ok(Some(code.unwrap_or_default()));
            }
            back *= 4;
        }
    }

    /// Hands over each complete line from `start` on, with the place where it ends.
    ///
    /// # Errors
    /// As `each`; it cannot be read.
    pub fn lines(&mut self, start: u64, mut each: impl FnMut(&[u8], u64) -> Result<()>) -> Result<()> {
        self.file.seek(SeekFrom::Start(start)).map_err(failed("read"))?;
        let mut reader = BufReader::new(&self.file);
        let (mut line, mut end) = (Vec::new(), start);
        loop {
            pgrx::check_for_interrupts!();
            line.clear();
            let length = reader.read_until(b'\n', &mut line).map_err(failed("read"))?;
            if line.pop() != Some(b'\n') {
                return Ok(());
            }
            end += length as u64;
            each(&line, end)?;
        }
    }

    /// Appends lines, on disk when this returns.
    fn append(&mut self, lines: &[(&Tombstone, &Signer)]) -> Result<()> {
        let begun = Instant::now();
        while let Err(e) = self.file.try_lock() {
            if matches!(e, std::fs::TryLockError::Error(_)) || begun.elapsed() > LONGEST_WAIT {
                return Err(Error::tombstones("cannot be locked"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let size = self.file.metadata().map_err(failed("examined"))?.len();
        self.size = size;
        let mut end = size;
        let mut text = String::new();
        let mut after = loop {
            if let Some(code) = self.code_at(end)? {
                break code;
            }
            // A write was cut off: its rest becomes a line that is none.
            text = "\n".to_owned();
            end = self.last_end(end)?;
        };
        for (tombstone, signer) in lines {
            let line = tombstone.line(&after, signer);
            after = code_of(line.trim_end().as_bytes()).unwrap_or_default();
            text += &line;
        }
        let written = self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_all());
        written.map_err(|e| {
            // Half a line would be no harm; a whole one would speak of what did not happen.
            _ = self.file.set_len(size);
            failed("written to")(e)
        })
    }

    /// Where the last complete line before `end` ends.
    fn last_end(&mut self, end: u64) -> Result<u64> {
        let mut at = 0;
        self.lines(0, |_, line| {
            if line < end {
                at = line;
            }
            Ok(())
        })?;
        Ok(at)
    }
}

/// When a line is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Now: it was decided before, and what is rolled back is done again by the next cycle.
    Now,
    /// When the transaction commits: it is what decides.
    AtCommit,
}

/// A line of this transaction.
struct Pending {
    tombstone: Tombstone,
    signer: Signer,
    subtransaction: pg_sys::SubTransactionId,
    is_written: bool,
}

thread_local! {
    static PENDING: RefCell<Vec<Pending>> = const { RefCell::new(Vec::new()) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Whether lines are to be written.
pub fn is_configured() -> bool {
    guc::tombstone_file().is_some()
}

/// Writes a line of this transaction. Where that is rolled back, or a subtransaction that this belongs to, it is taken back.
///
/// # Errors
/// The file cannot be used.
pub fn write(tombstone: Tombstone, signer: Signer, when: When) -> Result<()> {
    let Some(path) = path()? else { return Ok(()) };
    let mut book = Book::open_to_write(&path)?;
    if !REGISTERED.replace(true) {
        // SAFETY: registered once a backend, for its whole life.
        unsafe {
            pg_sys::RegisterXactCallback(Some(transaction_ends), std::ptr::null_mut());
            pg_sys::RegisterSubXactCallback(Some(subtransaction_ends), std::ptr::null_mut());
        }
    }
    if when == When::Now {
        book.append(&[(&tombstone, &signer)])?;
    }
    let pending = Pending {
        tombstone,
        signer,
        // SAFETY: plain getter.
        subtransaction: unsafe { pg_sys::GetCurrentSubTransactionId() },
        is_written: when == When::Now,
    };
    PENDING.with_borrow_mut(|p| p.push(pending));
    Ok(())
}

/// Writes what waits for the commit.
fn write_waiting() -> Result<()> {
    let path = path()?;
    PENDING.with_borrow_mut(|pending| {
        let mut waiting: Vec<&mut Pending> = pending.iter_mut().filter(|p| !p.is_written).collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let path = path.ok_or_else(|| Error::tombstones("is not configured any more"))?;
        let lines: Vec<_> = waiting.iter().map(|p| (&p.tombstone, &p.signer)).collect();
        Book::open_to_write(&path)?.append(&lines)?;
        waiting.iter_mut().for_each(|p| p.is_written = true);
        Ok(())
    })
}

/// Takes lines back that did not come true. Nothing may fail here: what cannot be written is told by `reconcile`, as unknown.
fn take_back(lines: &[Pending]) {
    let written: Vec<_> = lines.iter().filter(|p| p.is_written).collect();
    let voids: Vec<Tombstone> = written
        .iter()
        .filter_map(|p| {
            Some(Tombstone {
                id: new_id().ok()?,
                what: What::Void,
                orders: Vec::new(),
                of: Some(p.tombstone.id.clone()),
                ..p.tombstone.clone()
            })
        })
        .collect();
    if voids.is_empty() {
        return;
    }
    let lines: Vec<_> = voids.iter().zip(written.iter().map(|p| &p.signer)).collect();
    if let Ok(Some(path)) = path()
        && let Ok(mut book) = Book::open_to_write(&path)
    {
        _ = book.append(&lines);
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn transaction_ends(event: pg_sys::XactEvent::Type, _arg: *mut std::ffi::c_void) {
    use pg_sys::XactEvent::{XACT_EVENT_ABORT, XACT_EVENT_COMMIT, XACT_EVENT_PRE_COMMIT, XACT_EVENT_PRE_PREPARE};
    if PENDING.with_borrow(Vec::is_empty) {
        return;
    }
    match event {
        XACT_EVENT_PRE_COMMIT => super::error::or_raise(write_waiting()),
        // Who will commit it, and when, is not known here.
        XACT_EVENT_PRE_PREPARE => Error::unsupported("a transaction that has destroyed archives cannot be prepared")
            .hint("amazon_pii.tombstone_file has to be written when it commits. COMMIT instead.")
            .raise(),
        XACT_EVENT_COMMIT => PENDING.set(Vec::new()),
        XACT_EVENT_ABORT => take_back(&PENDING.take()),
        _ => {}
    }
}

#[pg_guard]
unsafe extern "C-unwind" fn subtransaction_ends(
    event: pg_sys::SubXactEvent::Type,
    mine: pg_sys::SubTransactionId,
    parent: pg_sys::SubTransactionId,
    _arg: *mut std::ffi::c_void,
) {
    use pg_sys::SubXactEvent::{SUBXACT_EVENT_ABORT_SUB, SUBXACT_EVENT_COMMIT_SUB};
    let back: Vec<Pending> = PENDING.with_borrow_mut(|pending| match event {
        SUBXACT_EVENT_COMMIT_SUB => {
            for p in pending.iter_mut().filter(|p| p.subtransaction == mine) {
                p.subtransaction = parent;
            }
            Vec::new()
        }
        SUBXACT_EVENT_ABORT_SUB => pending.extract_if(.., |p| p.subtransaction == mine).collect(),
        _ => Vec::new(),
    });
    take_back(&back);
}
