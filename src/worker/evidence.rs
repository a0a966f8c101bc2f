//! Accesses are recorded by another process, which commits before anything is opened: the caller's ROLLBACK does not
//! reach the entry. Works without preloading.

use pgrx::prelude::*;

use crate::engine::audit::{self, AuditEntry};
use crate::pg::error::{Error, Result};
use crate::pg::worker::segment::{Answer, Segment};
use crate::pg::worker::{self, Connection, Errand, Handle, Kind};
use crate::pg::xact;

/// The errand's number is the segment's handle.
const EVIDENCE: Kind = Kind {
    name: "amazon_pii evidence",
    function: "amazon_pii_evidence_main",
};

/// Records an access for good, whatever becomes of the caller's transaction.
///
/// # Errors
/// It could not be recorded, so the access must not happen. A cancel while waiting unwinds.
pub fn record(entry: &AuditEntry) -> Result<()> {
    if xact::in_recovery() {
        // No worker of ours starts here: the caller would wait for one until the server is promoted.
        return Err(
            Error::wrong_state("an access cannot be recorded during recovery, so it is refused")
                .hint("Connect to the primary server."),
        );
    }
    let request = serde_json::to_vec(entry).map_err(|_| Error::internal("an audit entry cannot be written as JSON"))?;
    let segment = Segment::create(&request).ok_or_else(refused)?;
    let errand = Errand {
        database: worker::current_database(),
        number: segment.handle(),
    };
    Handle::start(EVIDENCE, errand).ok_or_else(refused)?.wait();
    match segment.answered() {
        Answer::Done => Ok(()),
        Answer::Failed(words) => Err(Error::resources("the access could not be recorded, so it is refused")
            .detail(format!("The recording worker reported \"{words}\"."))),
        Answer::None => Err(refused()),
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
    worker::report_running("amazon_pii: recording an access");
    let answer = match write(&segment.request()) {
        Ok(()) => Answer::Done,
        Err(e) => Answer::Failed(e.stored()),
    };
    segment.answer(&answer);
    worker::report_idle();
}

fn write(request: &[u8]) -> Result<()> {
    let entry: AuditEntry =
        serde_json::from_slice(request).map_err(|_| Error::internal("an audit entry cannot be read"))?;
    worker::transaction(|| audit::insert(&[entry]))
}
