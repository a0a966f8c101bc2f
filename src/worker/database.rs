//! The worker of one database: one cycle of all policies, then it ends. A worker that stayed would block DROP DATABASE.

use pgrx::prelude::*;

use crate::engine::cycle;
use crate::pg::error::Result;
use crate::pg::identity::as_extension_of_any_version;
use crate::pg::sql::{self, Arg};
use crate::pg::worker::board::{self, Outcome};
use crate::pg::worker::{self, Connection, Errand, Kind};
use crate::pg::{guc, version, xact};

/// How it is started; the errand's number is its place on the board.
pub(super) const WORKER: Kind = Kind {
    name: "amazon_pii worker",
    function: "amazon_pii_database_main",
};

/// Where the process of a database's worker starts.
#[allow(unsafe_code)]
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn amazon_pii_database_main(argument: pg_sys::Datum) {
    let errand = Errand::unpack(argument);
    let slot = errand.number as usize;
    worker::enter(Connection::Database(errand.database));
    worker::report_running("amazon_pii: looking for work");
    match worker::transaction(installed_version) {
        Ok(None) => board::tell_outcome(slot, Outcome::Absent),
        Ok(Some(version)) => {
            board::tell_outcome(slot, Outcome::Served);
            if let Err(e) = serve(&version, slot) {
                // DROP EXTENSION may have been faster: nowhere to keep the error but the log.
                worker::log(&e, "the worker's state could not be recorded");
            }
        }
        Err(e) => worker::log(&e, "the worker could not start"),
    }
    worker::report_idle();
}

/// The extension's version in this database. Read-only: a look at a database without the extension costs no
/// transaction id.
fn installed_version() -> Result<Option<String>> {
    let rows = sql::read(
        "SELECT extversion FROM pg_catalog.pg_extension WHERE extname OPERATOR(pg_catalog.=) 'amazon_pii'",
        &[],
    )?;
    rows.first().map(|row| row.string(0)).transpose()
}

fn serve(version: &str, slot: usize) -> Result<()> {
    worker::transaction(beat)?;
    let same = version::require_same(version);
    let is_ours = same.is_ok();
    let done = same.and_then(|()| {
        if !guc::enabled() {
            return Ok(());
        }
        worker::report_running("amazon_pii: cycle");
        worker::open_transaction(|| cycle::run(None, false, xact::Boundary::Worker).map(|_| ()))
    });
    if let Err(e) = &done {
        worker::log(e, "a cycle ended early");
    }
    worker::transaction(|| remember(done.err().map(|e| e.stored()).as_deref()))?;
    // The tables of another version may be others.
    if is_ours && let Some(seconds) = worker::transaction(cycle::wants_back_in)? {
        board::come_back_in(slot, seconds);
    }
    Ok(())
}

/// The worker was here. This table is the same in every version.
fn beat() -> Result<()> {
    as_extension_of_any_version(|| {
        sql::execute(
            "INSERT INTO amazon_pii.heartbeat AS h (worker, pid, beat_at) \
             VALUES ('database', $1::int, pg_catalog.clock_timestamp()) \
             ON CONFLICT (worker) DO UPDATE SET pid = EXCLUDED.pid, beat_at = EXCLUDED.beat_at",
            &[Arg::Int(worker::pid())],
        )
        .map(|_| ())
    })
}

/// Keeps why the last cycle ended early, or that it did not.
fn remember(error: Option<&str>) -> Result<()> {
    as_extension_of_any_version(|| {
        sql::execute(
            "UPDATE amazon_pii.heartbeat SET last_error = $1 WHERE worker = 'database' AND last_error IS DISTINCT FROM $1",
            &[Arg::Text(error)],
        )
        .map(|_| ())
    })
}
