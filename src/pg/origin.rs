//! Which database this is.

use std::cell::RefCell;
use std::fs;

use pgrx::pg_sys;

use super::xact::in_recovery;
use crate::domain::origin::marker;

thread_local! {
    /// What this process found out when the cluster had left recovery; it stays so.
    static KNOWN: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The database that this is: the cluster's identifier, and the database's number in it; for a cluster that was put together from a backup
/// and is known to be, after a slash where that began or ended. Standbys have their primary's; a restored dump, a database made
/// from another one, and a cluster that pg_upgrade made have others.
pub fn this_database() -> String {
    if let Some(known) = KNOWN.with_borrow(Clone::clone) {
        return known;
    }
    // SAFETY: plain getters.
    let (cluster, database) = unsafe { (pg_sys::GetSystemIdentifier(), pg_sys::MyDatabaseId) };
    let base = format!("{cluster}:{}", database.to_u32());
    if in_recovery() {
        return base;
    }
    let timeline = timeline();
    // The server's working directory is that of its data. Timeline 1 has no history, most clusters have no label.
    let read = |name: &str| fs::read_to_string(name).ok();
    let history = read(&format!("pg_wal/{timeline:08X}.history"));
    let known = match marker(timeline, history.as_deref(), read("backup_label.old").as_deref()) {
        Some(marker) => format!("{base}/{marker}"),
        None => base,
    };
    KNOWN.set(Some(known.clone()));
    known
}

/// The one to which this cluster writes.
fn timeline() -> u32 {
    // SAFETY: plain getters, set since the server has left recovery, which was asked for.
    #[cfg(not(feature = "pg14"))]
    unsafe {
        pg_sys::GetWALInsertionTimeLine()
    }
    // SAFETY: as above.
    #[cfg(feature = "pg14")]
    unsafe {
        pg_sys::ThisTimeLineID
    }
}
