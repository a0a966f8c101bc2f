//! How long code of a table's owner may run in a cycle, and how long a foreign archive may take. A timer of our own: one of the server's own timeouts cannot be
//! told from a cancel by its error.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, Ordering};

use pgrx::pg_sys;

use super::error::{Error, Result};
use super::guc;
use super::subxact::subtransaction;

/// The server's timers, which pgrx does not bind.
mod timer {
    use std::ffi::c_int;

    unsafe extern "C-unwind" {
        #[link_name = "RegisterTimeout"]
        pub(super) fn register(id: c_int, handler: unsafe extern "C" fn()) -> c_int;
        #[link_name = "enable_timeout_after"]
        pub(super) fn enable_after(id: c_int, delay_ms: c_int);
        #[link_name = "disable_timeout"]
        pub(super) fn disable(id: c_int, keep_indicator: bool);
    }
}

/// Asks for any free timer: the first number that extensions may use is lower than this in every version, and the last
/// one is higher.
const ANY: c_int = 15;

/// The timer has run out since it was last started. Written by a signal handler.
static OVER: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// This backend's timer, once it has one.
    static TIMER: Cell<Option<c_int>> = const { Cell::new(None) };
    static LIMITED: Cell<bool> = const { Cell::new(false) };
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// Does what the server does when a statement's time is over.
unsafe extern "C" fn time_is_over() {
    OVER.store(true, Ordering::Relaxed);
    // SAFETY: in a signal handler, which may set these variables and this process's latch, and does nothing else.
    unsafe {
        (&raw mut pg_sys::InterruptPending).write_volatile(1);
        (&raw mut pg_sys::QueryCancelPending).write_volatile(1);
        pg_sys::SetLatch(pg_sys::MyLatch);
    }
}

/// While it lives, code of tables' owners runs for a limited time.
#[must_use]
pub struct Limited(bool);

/// Limits what is done from here on; ends when dropped, on every way out of the block.
pub fn limit() -> Limited {
    Limited(LIMITED.replace(true))
}

impl Drop for Limited {
    fn drop(&mut self) {
        LIMITED.set(self.0);
    }
}

/// Stops the timer when dropped, on every way out of the block.
struct Running(c_int);

impl Running {
    fn start(milliseconds: c_int) -> Self {
        let id = TIMER.get().unwrap_or_else(|| {
            // SAFETY: once a backend; the handler is async-signal-safe and lives as long as the library.
            unsafe { timer::register(ANY, time_is_over) }
        });
        TIMER.set(Some(id));
        OVER.store(false, Ordering::Relaxed);
        RUNNING.set(true);
        // SAFETY: registered above.
        unsafe { timer::enable_after(id, milliseconds) };
        Self(id)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(false);
        // SAFETY: registered when it was started; stopping a timer that has run out does no harm.
        unsafe { timer::disable(self.0, false) };
    }
}

/// Runs code of a table's owner. Inside of [`limit`] no longer than `amazon_pii.statement_timeout`: what takes longer
/// fails like any other error of the owner's code, while a cancel stays a cancel.
///
/// # Errors
/// As `f`; the time is over.
pub fn within<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let milliseconds = guc::statement_timeout();
    if milliseconds == 0 || !LIMITED.get() {
        return f();
    }
    bounded(milliseconds, f, |_| Err(Error::too_slow()))
}

/// Runs an access to a foreign archive, by whomever, no longer than `amazon_pii.archive_timeout`.
///
/// # Errors
/// As `f`; the time is over.
pub fn for_archive<T>(over: impl FnOnce() -> Error, f: impl FnOnce() -> Result<T>) -> Result<T> {
    // What is committed is done, however late.
    bounded(guc::archive_timeout(), f, |result| result.map_err(|_| over()))
}

/// Where the time runs out, `late` says what becomes of a result that is no error of `f`'s own.
fn bounded<T>(
    milliseconds: c_int,
    f: impl FnOnce() -> Result<T>,
    late: impl FnOnce(Result<T>) -> Result<T>,
) -> Result<T> {
    // What runs inside of it shares the time of the outermost.
    if RUNNING.get() {
        return f();
    }
    let running = Running::start(milliseconds);
    let result = f();
    drop(running);
    if !OVER.swap(false, Ordering::Relaxed) {
        return result;
    }
    // It may have run out too late to interrupt anything: that must not cancel what comes next.
    let _ours = subtransaction(|| {
        pgrx::check_for_interrupts!();
        Ok(())
    });
    match result {
        Err(e) if !e.is_cancel() => Err(e),
        result => late(result),
    }
}
