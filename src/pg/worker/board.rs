//! A few words of shared memory, there only while the library is preloaded: how to wake the launcher, and what the
//! databases' workers found. Atomics, so that no lock is needed.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use pgrx::prelude::*;
use pgrx::{PGRXSharedMemory, PgAtomic, PgXactCallbackEvent, pg_shmem_init, register_xact_callback};

/// Workers that the launcher can have at the same time; the upper limit of `amazon_pii.workers`.
pub const SLOTS: usize = 64;

/// Stands for "more than one database".
const SEVERAL: u32 = u32::MAX;

struct Board {
    /// Address of the launcher's latch: shared memory lies at the same address in every process, and the latch of a
    /// process that has ended stays a latch.
    latch: AtomicUsize,
    /// The database that wants a cycle now; 0: none.
    wanted: AtomicU32,
    outcomes: [AtomicU8; SLOTS],
    /// Seconds after which a worker's database wants its next cycle, where that is sooner than usual; 0: it is not.
    sooner: [AtomicU32; SLOTS],
}

impl Default for Board {
    fn default() -> Self {
        Self {
            latch: AtomicUsize::new(0),
            wanted: AtomicU32::new(0),
            outcomes: std::array::from_fn(|_| AtomicU8::new(Outcome::Silent as u8)),
            sooner: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }
}

// SAFETY: atomics only; the address of a latch means the same in every process.
unsafe impl PGRXSharedMemory for Board {}

// SAFETY: the name is the extension's own.
static BOARD: PgAtomic<Board> = unsafe { PgAtomic::new(c"amazon_pii") };
/// Set by the postmaster and inherited by its children: the board exists.
static THERE: AtomicBool = AtomicBool::new(false);

/// What a database's worker found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// It ended before it could tell.
    Silent,
    /// The database does not have the extension.
    Absent,
    /// The database was served.
    Served,
}

/// Asks for the shared memory; only while the library is preloaded.
#[allow(
    unexpected_cfgs,
    reason = "the macro asks for versions that pgrx supports and we do not"
)]
pub fn request() {
    pg_shmem_init!(BOARD);
    super::desk::request();
    THERE.store(true, Ordering::Relaxed);
}

fn board() -> Option<&'static Board> {
    THERE.load(Ordering::Relaxed).then(|| BOARD.get())
}

/// The launcher can be woken from now on.
pub fn launcher_is_here() {
    if let Some(board) = board() {
        // SAFETY: plain variable, this process's latch.
        board
            .latch
            .store(unsafe { pg_sys::MyLatch } as usize, Ordering::Release);
    }
}

/// What was asked for since the last call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    Nothing,
    One(pg_sys::Oid),
    Several,
}

/// Takes what was asked for.
pub fn take_wanted() -> Wanted {
    match board().map_or(0, |b| b.wanted.swap(0, Ordering::AcqRel)) {
        0 => Wanted::Nothing,
        SEVERAL => Wanted::Several,
        oid => Wanted::One(pg_sys::Oid::from(oid)),
    }
}

/// Before a worker starts in `slot`.
pub fn clear_outcome(slot: usize) {
    tell_outcome(slot, Outcome::Silent);
    if let Some(cell) = board().and_then(|b| b.sooner.get(slot)) {
        cell.store(0, Ordering::Release);
    }
}

/// A worker wants to come back after that many seconds, if that is sooner than usual.
pub fn come_back_in(slot: usize, seconds: u32) {
    if let Some(cell) = board().and_then(|b| b.sooner.get(slot)) {
        cell.store(seconds.max(1), Ordering::Release);
    }
}

/// When the worker in `slot` wanted to come back.
pub fn wants_back_in(slot: usize) -> Option<Duration> {
    let seconds = board()?.sooner.get(slot)?.load(Ordering::Acquire);
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

/// A worker tells the launcher.
pub fn tell_outcome(slot: usize, outcome: Outcome) {
    if let Some(cell) = board().and_then(|b| b.outcomes.get(slot)) {
        cell.store(outcome as u8, Ordering::Release);
    }
}

/// What the worker in `slot` told.
pub fn outcome(slot: usize) -> Outcome {
    match board()
        .and_then(|b| b.outcomes.get(slot))
        .map(|c| c.load(Ordering::Acquire))
    {
        Some(o) if o == Outcome::Absent as u8 => Outcome::Absent,
        Some(o) if o == Outcome::Served as u8 => Outcome::Served,
        _ => Outcome::Silent,
    }
}

thread_local! {
    /// This transaction already wakes the launcher when it commits.
    static WAKES: Cell<bool> = const { Cell::new(false) };
}

/// Lets the launcher serve this database as soon as the current transaction has committed; nothing happens if it rolls
/// back, or where no launcher runs. Calls after the first one of a transaction cost nothing.
pub fn wake_at_commit() {
    if board().is_none() || WAKES.replace(true) {
        return;
    }
    register_xact_callback(PgXactCallbackEvent::Commit, || {
        WAKES.set(false);
        wake_now();
    });
    register_xact_callback(PgXactCallbackEvent::Abort, || WAKES.set(false));
    // Who will commit a prepared transaction, and when, is not known here: the next regular cycle sees it.
    register_xact_callback(PgXactCallbackEvent::Prepare, || WAKES.set(false));
}

/// Runs after the commit, where nothing may fail: two atomics and a latch.
fn wake_now() {
    let Some(board) = board() else { return };
    let me = super::current_database().to_u32();
    if let Err(other) = board
        .wanted
        .compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire)
        && other != me
    {
        board.wanted.store(SEVERAL, Ordering::Release);
    }
    let latch = board.latch.load(Ordering::Acquire) as *mut pg_sys::Latch;
    if !latch.is_null() {
        // SAFETY: the address of a latch in shared memory, see `Board::latch`.
        unsafe { pg_sys::SetLatch(latch) };
    }
}
