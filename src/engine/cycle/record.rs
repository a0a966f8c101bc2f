//! What a cycle writes down: its row in `run`, progress, what is wrong with the policy, what is overdue.

use std::time::Instant;

use super::{Counts, Run, TELL_EVERY};
use crate::engine::state::notify;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, session_user};
use crate::pg::sql::{self, Arg};

/// What is wrong with a policy as a whole, for `status`. Whether there is such a policy.
///
/// # Errors
/// Errors of the server.
pub fn note_error(policy: &str, error: &Error) -> Result<bool> {
    as_extension(|| {
        let known = sql::read(
            "SELECT true FROM amazon_pii.policy WHERE policy = $1",
            &[Arg::Text(Some(policy))],
        )?;
        sql::execute(
            "UPDATE amazon_pii.policy SET last_error = $2 WHERE policy = $1 AND last_error IS DISTINCT FROM $2",
            &[Arg::Text(Some(policy)), Arg::Text(Some(&error.stored()))],
        )?;
        Ok(!known.is_empty())
    })
}

impl Run<'_> {
    /// What was done so far, by all.
    fn counts(&self) -> Counts {
        let mut counts = self.batches.counts;
        if let Some(team) = &self.team {
            counts.add(team.counts());
        }
        counts
    }

    /// The run's row, once there is something to do: an idle cycle leaves none.
    pub(super) fn start(&mut self) -> Result<()> {
        if self.id.is_some() {
            return Ok(());
        }
        let rows = as_extension(|| {
            sql::write(
                "INSERT INTO amazon_pii.run (policy, started_by, pid) VALUES ($1, $2, pg_catalog.pg_backend_pid()) RETURNING run_id",
                &[Arg::Text(Some(&self.plan.policy)), Arg::Text(Some(&session_user()))],
            )
        })?;
        self.id = rows.first().map(|r| r.int(0)).transpose()?;
        self.batches.pace.run = self.id;
        Ok(())
    }

    /// Progress, for whoever watches and for the run's row.
    pub(super) fn report(&mut self) -> Result<()> {
        let c = self.counts();
        if self.told.elapsed() > TELL_EVERY {
            self.told = Instant::now();
            pgrx::notice!(
                "policy {}: {} archived, {} redacted, {} failed so far",
                self.plan.policy,
                c.archived,
                c.redacted,
                c.failed
            );
        }
        self.record(false)
    }

    /// The counts so far, or at the end.
    pub(super) fn record(&self, finished: bool) -> Result<()> {
        let Some(id) = self.id else { return Ok(()) };
        let c = self.counts();
        as_extension(|| {
            sql::execute(
                "UPDATE amazon_pii.run SET flagged = $2, archived = $3, redacted = $4, failed = $5, overdue = $6, aged = $8, \
                    finished_at = CASE WHEN $7 THEN pg_catalog.clock_timestamp() END WHERE run_id = $1",
                &[
                    Arg::Int(id),
                    Arg::Int(c.flagged),
                    Arg::Int(c.archived),
                    Arg::Int(c.redacted),
                    Arg::Int(c.failed),
                    Arg::Int(c.overdue),
                    Arg::Bool(finished),
                    Arg::Int(self.aged),
                ],
            )
        })?;
        Ok(())
    }

    pub(super) fn finish(&self, structure: Option<&str>) -> Result<()> {
        as_extension(|| {
            sql::execute(
                "UPDATE amazon_pii.policy SET cycled_at = pg_catalog.clock_timestamp(), last_error = $2, \
                    structure = CASE WHEN $2 IS NULL THEN $3::numeric END WHERE policy = $1",
                &[
                    Arg::Text(Some(&self.plan.policy)),
                    Arg::Text(self.trouble.as_ref().map(Error::stored).as_deref()),
                    Arg::Text(structure),
                ],
            )
        })?;
        self.record(true)
    }
}

pub(super) fn overdue(policy: &str) -> Result<i64> {
    as_extension(|| {
        let rows = sql::read(
            "SELECT pg_catalog.count(*) FROM amazon_pii.overdue WHERE policy = $1",
            &[Arg::Text(Some(policy))],
        )?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.int(0)
    })
}

pub(super) fn announce_overdue(policy: &str, count: i64) -> Result<()> {
    let payload = serde_json::json!({ "policy": policy, "status": "overdue", "count": count });
    notify(&payload)
}
