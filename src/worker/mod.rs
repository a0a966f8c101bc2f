//! Background workers: a launcher that is connected to no database, a short-lived worker for each database that is due,
//! helpers for its cycles, and one that records accesses where a rollback cannot reach.

pub mod database;
pub mod evidence;
pub mod helper;
pub mod launcher;

use crate::pg::worker::board;

/// Wakes the worker for this database when the current transaction commits; without preloading there is none to wake.
pub fn wake() {
    board::wake_at_commit();
}
