//! The one place where errors are caught: always inside a subtransaction, so that nothing half-done survives.

use std::cell::Cell;
use std::ffi::c_void;
use std::panic::AssertUnwindSafe;

use pgrx::pg_sys;
use pgrx::pg_sys::PgTryBuilder;

use super::error::{Error, Result};

thread_local! {
    /// The SQLSTATE of the last error, packed. What catches errors below us keeps only codes that it knows.
    static RAISED: Cell<i32> = const { Cell::new(0) };
}

/// Called by the server for each message that it is about to report or to throw.
unsafe extern "C-unwind" fn note_state(_: *mut c_void) {
    // SAFETY: inside the reporting of a message, where its code is there to be asked for; nothing here raises.
    RAISED.set(unsafe { pg_sys::geterrcode() });
}

/// While it lives, the SQLSTATE of each error is noted.
struct Listening<'a>(&'a mut pg_sys::ErrorContextCallback);

impl<'a> Listening<'a> {
    fn begin(entry: &'a mut pg_sys::ErrorContextCallback) -> Self {
        // SAFETY: the entry is borrowed for as long as it is linked; whatever is linked above it is unlinked before.
        unsafe { pg_sys::error_context_stack = entry };
        Self(entry)
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        // SAFETY: on every way out, a panic's included: the stack never refers to a frame that is gone.
        unsafe { pg_sys::error_context_stack = self.0.previous };
    }
}

/// Runs `f` in a subtransaction: committed into the surrounding transaction on `Ok`, rolled back on `Err` and on any
/// error of the server. Memory context and resource owner are the caller's again afterwards.
///
/// # Errors
/// What `f` returned, or the server's error without its words. A cancel is returned too: callers pass it on.
pub fn subtransaction<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: the documented protocol of internal subtransactions (see plpgsql's exception blocks): context and
    // owner are saved before, restored after both outcomes.
    let (context, owner) = unsafe {
        let saved = (pg_sys::CurrentMemoryContext, pg_sys::CurrentResourceOwner);
        pg_sys::BeginInternalSubTransaction(std::ptr::null());
        pg_sys::CurrentMemoryContext = saved.0;
        saved
    };
    let mut entry = pg_sys::ErrorContextCallback {
        // SAFETY: a backend-local variable.
        previous: unsafe { pg_sys::error_context_stack },
        callback: Some(note_state),
        arg: std::ptr::null_mut(),
    };
    let listening = Listening::begin(&mut entry);
    let result = PgTryBuilder::new(AssertUnwindSafe(|| {
        let value = f()?;
        // Here, because its end may fail like anything else where a foreign server takes part in it. It is still there then.
        // SAFETY: the subtransaction that was begun is the current one, everything nested has ended.
        unsafe {
            pg_sys::CurrentMemoryContext = context;
            pg_sys::ReleaseCurrentSubTransaction();
        }
        Ok(value)
    }))
    .catch_others(|e| Err(Error::caught(e, RAISED.get())))
    .execute();
    drop(listening);
    // SAFETY: as above.
    unsafe {
        pg_sys::CurrentMemoryContext = context;
        if result.is_err() {
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
    }
    result
}

/// Catches what the end of a transaction raises. The caller begins the next one, or aborts what is left of this one.
///
/// # Errors
/// The server's error without its words.
pub(super) fn outside_subtransactions(end: impl FnOnce()) -> Result<()> {
    // SAFETY: a backend-local variable; what is current now outlives the transaction: a worker's, or that of the
    // procedure's own session.
    let context = unsafe { pg_sys::CurrentMemoryContext };
    let mut entry = pg_sys::ErrorContextCallback {
        // SAFETY: a backend-local variable.
        previous: unsafe { pg_sys::error_context_stack },
        callback: Some(note_state),
        arg: std::ptr::null_mut(),
    };
    let listening = Listening::begin(&mut entry);
    let result = PgTryBuilder::new(AssertUnwindSafe(|| {
        end();
        Ok(())
    }))
    .catch_others(|e| Err(Error::caught(e, RAISED.get())))
    .execute();
    drop(listening);
    if result.is_err() {
        // SAFETY: as above. After success the server has chosen one itself.
        unsafe { pg_sys::CurrentMemoryContext = context };
    }
    result
}

/// Runs `f` and rolls back whatever it did, keeping what it returned: for trials.
///
/// # Errors
/// As [`subtransaction`].
pub fn trial<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let mut kept = None;
    let rolled_back = subtransaction::<()>(|| {
        kept = Some(f()?);
        Err(Error::internal("trial is over"))
    });
    match (kept, rolled_back) {
        (Some(value), _) => Ok(value),
        (None, Err(e)) => Err(e),
        (None, Ok(())) => Err(Error::internal("a trial ended without a result")),
    }
}
