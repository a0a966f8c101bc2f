//! Accesses are recorded by another process, which commits before anything is opened: the caller's ROLLBACK does not
//! reach the entry. Works without preloading.

use std::time::{Duration, Instant};

use pgrx::prelude::*;
use serde::{Deserialize, Serialize};

use crate::domain::quota::Refusal;
use crate::engine::audit::{self, AuditEntry};
use crate::engine::quota::{self, Access};
use crate::pg::error::{Error, Result};
use crate::pg::worker::desk;
use crate::pg::worker::segment::{Answer, Segment};
use crate::pg::worker::{self, Connection, Errand, Handle, Kind};
use crate::pg::xact;

/// The errand's number is the segment's handle.
const EVIDENCE: Kind = Kind {
    name: "amazon_pii evidence",
    function: "amazon_pii_evidence_main",
};

/// How long a worker waits for the next access when it has recorded one. DROP DATABASE has more patience.
const LINGER: Duration = Duration::from_secs(2);

/// What a caller waits for wakes it; this is for a worker that was killed.
const POLL: Duration = Duration::from_millis(100);

/// How long a caller waits for a slot that others are leaving: that of a worker which has ended is free when the postmaster has
/// noticed.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the other process is told to record; `E` and `A` are borrowed by whoever asks.
#[derive(Debug, Serialize, Deserialize)]
enum Request<E = AuditEntry, A = Access> {
    Entry(E),
    /// Counted, and perhaps refused.
    Access(A),
}

/// Records an access that is not counted for good, whatever becomes of the caller's transaction.
///
/// # Errors
/// It could not be recorded, so the access must not happen. A cancel while waiting unwinds.
pub fn record(entry: &AuditEntry) -> Result<()> {
    ask(&Request::<_, &Access>::Entry(entry)).map(drop)
}

/// Records and counts an access for good, whatever becomes of the caller's transaction. A refusal is recorded, too.
///
/// # Errors
/// As [`record`].
pub fn access(access: &Access) -> Result<Option<Refusal>> {
    ask(&Request::<&AuditEntry, _>::Access(access))
}

fn ask(request: &impl Serialize) -> Result<Option<Refusal>> {
    if xact::in_recovery() {
        // No worker of ours starts here: the caller would wait for one until the server is promoted.
        return Err(
            Error::wrong_state("an access cannot be recorded during recovery, so it is refused")
                .hint("Connect to the primary server."),
        );
    }
    let request =
        serde_json::to_vec(request).map_err(|_| Error::internal("an audit entry cannot be written as JSON"))?;
    let segment = Segment::create(&request).ok_or_else(refused)?;
    let database = worker::current_database();
    let mut answer = Answer::None;
    if let Some(posted) = desk::post(database, segment.handle()) {
        answer = wait(&segment, || !posted.pending());
    }
    // None waited, or it ended before it was done.
    if answer == Answer::None {
        let errand = Errand {
            database,
            number: segment.handle(),
        };
        let started = start(errand).ok_or_else(refused)?;
        answer = wait(&segment, || started.stopped());
    }
    match answer {
        Answer::Done => Ok(None),
        Answer::Refused(why) => match serde_json::from_str(&why) {
            Ok(refusal) => Ok(Some(refusal)),
            Err(_) => Err(Error::internal("a refusal cannot be read")),
        },
        Answer::Failed(words) => Err(Error::resources("the access could not be recorded, so it is refused")
            .detail(format!("The recording worker reported \"{words}\"."))),
        Answer::None => Err(refused()),
    }
}

/// Waits until the worker has answered, or never will; a cancel of the waiting backend gets through.
fn wait(segment: &Segment, over: impl Fn() -> bool) -> Answer {
    loop {
        // In this order: its last word comes before its end.
        let over = over();
        match segment.answered() {
            Answer::None if !over => worker::sleep(POLL),
            answer => return answer,
        }
    }
}

/// Starts a worker; where no slot is free, those that only wait make room.
fn start(errand: Errand) -> Option<Handle> {
    let began = Instant::now();
    loop {
        let started = Handle::start(EVIDENCE, errand);
        if started.is_some() || began.elapsed() > PATIENCE {
            return started;
        }
        desk::dismiss();
        worker::sleep(Duration::from_millis(5));
    }
}

fn refused() -> Error {
    Error::resources("no background worker could record the access, so it is refused")
        .hint("Raise max_worker_processes, or try again when other background workers have ended; the server log may say more.")
}

/// Where the process that records starts.
#[allow(unsafe_code)]
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn amazon_pii_evidence_main(argument: pg_sys::Datum) {
    let errand = Errand::unpack(argument);
    // Gone when the caller was canceled meanwhile: then there is no access to record.
    let Some(segment) = Segment::attach(errand.number) else {
        return;
    };
    worker::enter(Connection::Database(errand.database));
    worker::commit_durably();
    serve(&segment);
    // Whoever is woken, and asks for the next access at once, is to find the desk free.
    let desk = desk::Own::take(errand.database);
    segment.wake();
    drop(segment);
    let Some(desk) = desk else { return };
    while let Some(handle) = desk.next(LINGER) {
        worker::reload_if_asked();
        let segment = Segment::attach(handle);
        segment.iter().for_each(serve);
        desk.done();
        segment.iter().for_each(Segment::wake);
    }
}

/// Does what is asked for, and says so; the caller has yet to be woken.
fn serve(segment: &Segment) {
    worker::report_running("amazon_pii: recording an access");
    let answer = match write(&segment.request()) {
        Ok(None) => Answer::Done,
        Ok(Some(refusal)) => Answer::Refused(serde_json::to_string(&refusal).unwrap_or_default()),
        Err(e) => Answer::Failed(e.stored()),
    };
    worker::report_idle();
    segment.answer(&answer);
}

fn write(request: &[u8]) -> Result<Option<Refusal>> {
    let request: Request =
        serde_json::from_slice(request).map_err(|_| Error::internal("an audit entry cannot be read"))?;
    match request {
        Request::Entry(entry) => worker::transaction(|| audit::insert(&[entry])).map(|()| None),
        Request::Access(access) => {
            let recorded = worker::transaction(|| quota::record(&access))?;
            for alarm in recorded.alarms {
                pgrx::warning!("{alarm}");
            }
            Ok(recorded.refused)
        }
    }
}
