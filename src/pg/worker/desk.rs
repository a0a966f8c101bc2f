//! Where a worker that records accesses waits a moment for the next one, so that not each of them has to wait for a new
//! process. There only while the library is preloaded. Atomics, so that no lock is needed.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pgrx::prelude::*;
use pgrx::{PGRXSharedMemory, PgAtomic, pg_shmem_init};

/// Workers that may wait at the same time, one a database.
const DESKS: usize = 4;

/// Instead of the handle of a request: none yet.
const NOTHING: u32 = 0;
/// The desk is being set up.
const CLAIMED: u32 = u32::MAX;
/// The worker is asked to end: its place is needed.
const LEAVE: u32 = u32::MAX - 1;

/// The database in the upper half; in the lower the handle of the request that is being worked on. 0: free.
type State = u64;

#[derive(Default)]
struct Desk {
    state: AtomicU64,
    /// Address of the worker's latch, which means the same in every process.
    latch: AtomicUsize,
}

#[derive(Default)]
struct Hall([Desk; DESKS]);

// SAFETY: atomics only; the address of a latch means the same in every process.
unsafe impl PGRXSharedMemory for Hall {}

// SAFETY: the name is the extension's own.
static HALL: PgAtomic<Hall> = unsafe { PgAtomic::new(c"amazon_pii desks") };
/// Set by the postmaster and inherited by its children: the desks exist.
static THERE: AtomicBool = AtomicBool::new(false);
/// The number of this process's desk, plus one.
static MINE: AtomicUsize = AtomicUsize::new(0);

/// Asks for the shared memory; only while the library is preloaded.
#[allow(
    unexpected_cfgs,
    reason = "the macro asks for versions that pgrx supports and we do not"
)]
pub fn request() {
    pg_shmem_init!(HALL);
    THERE.store(true, Ordering::Relaxed);
}

fn desks() -> &'static [Desk] {
    if THERE.load(Ordering::Relaxed) {
        &HALL.get().0
    } else {
        &[]
    }
}

fn state(database: pg_sys::Oid, word: u32) -> State {
    u64::from(database.to_u32()) << 32 | u64::from(word)
}

fn swap(desk: &Desk, from: State, to: State) -> bool {
    desk.state
        .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

fn wake(desk: &Desk) {
    set_latch(desk.latch.load(Ordering::Acquire));
}

/// Wakes the process whose latch is at this address of shared memory; 0 is none.
pub(super) fn set_latch(address: usize) {
    let latch = address as *mut pg_sys::Latch;
    if !latch.is_null() {
        // SAFETY: the address of a latch in shared memory; that of a process that has ended stays a latch.
        unsafe { pg_sys::SetLatch(latch) };
    }
}

/// The address of this process's latch.
pub(super) fn my_latch() -> usize {
    // SAFETY: plain variable.
    unsafe { pg_sys::MyLatch as usize }
}

/// A request that lies on a desk.
#[derive(Debug)]
pub struct Posted {
    desk: usize,
    state: State,
}

impl Posted {
    /// Whether the worker is still at it. When it no longer is, it has answered, or never will.
    pub fn pending(&self) -> bool {
        desks()[self.desk].state.load(Ordering::Acquire) == self.state
    }
}

/// Puts a request on the desk of a worker that waits in this database; `None` where none does.
pub fn post(database: pg_sys::Oid, handle: u32) -> Option<Posted> {
    if matches!(handle, NOTHING | CLAIMED | LEAVE) {
        return None;
    }
    let state = |word| state(database, word);
    let desk = desks()
        .iter()
        .position(|desk| swap(desk, state(NOTHING), state(handle)))?;
    wake(&desks()[desk]);
    Some(Posted {
        desk,
        state: state(handle),
    })
}

/// Asks the workers that wait, in whatever database, to end; whether there are any.
pub fn dismiss() -> bool {
    let mut any = false;
    for desk in desks() {
        let known = desk.state.load(Ordering::Acquire);
        let leave = known | u64::from(LEAVE);
        if known != 0 && known as u32 == NOTHING && swap(desk, known, leave) {
            wake(desk);
        }
        any |= desk.state.load(Ordering::Acquire) as u32 == LEAVE;
    }
    any
}

/// This process's own desk.
pub struct Own {
    desk: &'static Desk,
    database: pg_sys::Oid,
}

impl Own {
    /// Takes a desk; `None` where none is free, or another worker waits in this database already.
    pub fn take(database: pg_sys::Oid) -> Option<Self> {
        let here = |desk: &Desk| desk.state.load(Ordering::Acquire) >> 32 == u64::from(database.to_u32());
        if desks().iter().any(here) {
            return None;
        }
        let (number, desk) = desks()
            .iter()
            .enumerate()
            .find(|(_, desk)| swap(desk, 0, state(database, CLAIMED)))?;
        MINE.store(number + 1, Ordering::Relaxed);
        // SAFETY: once a process; the callback only stores an atomic.
        unsafe { pg_sys::on_shmem_exit(Some(leave), pg_sys::Datum::from(0)) };
        desk.latch.store(my_latch(), Ordering::Release);
        desk.state.store(state(database, NOTHING), Ordering::Release);
        Some(Self { desk, database })
    }

    /// Waits for the handle of the next request; `None` when the time is over, and the desk is no longer this process's.
    pub fn next(&self, at_most: Duration) -> Option<u32> {
        let end = Instant::now() + at_most;
        loop {
            match self.desk.state.load(Ordering::Acquire) as u32 {
                NOTHING => {}
                LEAVE => break,
                handle => return Some(handle),
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() && swap(self.desk, state(self.database, NOTHING), state(self.database, LEAVE)) {
                break;
            }
            super::sleep(left);
        }
        give_up();
        None
    }

    /// The request is done, the next one may come.
    pub fn done(&self) {
        self.desk.state.store(state(self.database, NOTHING), Ordering::Release);
    }
}

fn give_up() {
    let mine = MINE.swap(0, Ordering::Relaxed);
    if let Some(desk) = mine.checked_sub(1).and_then(|i| desks().get(i)) {
        desk.state.store(0, Ordering::Release);
    }
}

/// However the process ends: nobody is to wait for it.
#[pg_guard]
unsafe extern "C-unwind" fn leave(_code: c_int, _argument: pg_sys::Datum) {
    give_up();
}
