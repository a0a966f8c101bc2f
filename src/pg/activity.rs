//! What pg_stat_activity shows of a session while one of our functions works in it.

use std::ffi::CString;

use pgrx::pg_sys;

/// While it lives, the session's query is shown as what it is at; then as what the client sent again.
#[must_use]
pub struct Activity(());

impl Activity {
    /// Nothing changes before the first [`show`](Self::show).
    pub fn begin() -> Self {
        Self(())
    }

    /// Words of our own, never a value of a row.
    pub fn show(&self, what: &str) {
        let text = CString::new(what).unwrap_or_default();
        // SAFETY: NUL-terminated; the server copies it.
        unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr()) }
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        // SAFETY: the client's statement, which lives until it ends, or NULL, of which nothing is reported.
        unsafe {
            if !pg_sys::debug_query_string.is_null() {
                pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, pg_sys::debug_query_string);
            }
        }
    }
}
