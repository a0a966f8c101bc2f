//! The one place where errors are caught: always inside a subtransaction, so that nothing half-done survives.

use std::panic::AssertUnwindSafe;

use pgrx::pg_sys;
use pgrx::pg_sys::PgTryBuilder;

use super::error::{Error, Result};

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
    let result = PgTryBuilder::new(AssertUnwindSafe(f))
        .catch_others(|e| Err(e.into()))
        .execute();
    // SAFETY: as above; the subtransaction that was begun is the current one, everything nested has ended.
    unsafe {
        pg_sys::CurrentMemoryContext = context;
        if result.is_ok() {
            pg_sys::ReleaseCurrentSubTransaction();
        } else {
            pg_sys::RollbackAndReleaseCurrentSubTransaction();
        }
        pg_sys::CurrentMemoryContext = context;
        pg_sys::CurrentResourceOwner = owner;
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
