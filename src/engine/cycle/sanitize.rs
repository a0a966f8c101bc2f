//! A copy of a database for people who must not see the buyers: every order that a policy finds is redacted at once, without a copy, and
//! what came along of the archive is destroyed.

use super::{Counts, Run, clock};
use crate::engine::access::queued;
use crate::engine::home;
use crate::engine::plan::Plan;
use crate::engine::purge::{self, Ended, Why};
use crate::engine::rotation::Keyring;
use crate::engine::turn;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::xact::{Boundary, Mode};

/// Orders whose archive is destroyed together.
const TOGETHER: i64 = 1000;

/// Redacts every order of a policy in a copy of the database in which it was applied. The cold server of the original is not asked, and not
/// told. Called with an open transaction, leaves one open.
///
/// # Errors
/// The policy does not exist, is disabled or suspended, or is at work in this database; errors of the server: what was committed stays, and
/// calling again goes on.
pub fn sanitize(policy: &str, boundary: Boundary) -> Result<Counts> {
    boundary.commit()?;
    turn::take(policy, Mode::Alone)?;
    let mut plan = Plan::load(policy)?;
    if home::is_here(policy)? {
        return Err(Error::wrong_state(format!(
            "policy \"{policy}\" is at work in this database, which is no copy"
        ))
        .hint("In the original orders are redacted by cycles, after they were archived."));
    }
    if !plan.enabled || plan.suspended.is_some() {
        return Err(
            Error::wrong_state(format!("policy \"{policy}\" is disabled or suspended"))
                .hint("Enable it: in a copy the worker leaves it alone all the same."),
        );
    }
    plan.archive.foreign = None;
    let clock = clock(&plan)?;
    let keys = Keyring::load(policy)?;
    boundary.commit()?;
    let mut run = Run::new(&plan, keys, clock, boundary);
    run.step(|run| queued::forget(&run.plan.policy))?;
    run.flag(true)?;
    run.step(|run| all_at_once(run.plan))?;
    run.batches.clock = super::clock(&plan)?;
    run.all_that_is_due()?;
    run.by_age()?;
    run.statistics()?;
    run.end_all()?;
    run.batches.counts.overdue = super::overdue(policy)?;
    run.finish(None)?;
    boundary.commit()?;
    match run.trouble.take() {
        Some(e) => Err(e),
        None => Ok(run.batches.counts),
    }
}

/// Every order is due, whatever its clock, a hold, a retrieval or an export say, and is not archived first.
fn all_at_once(plan: &Plan) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET asked = 'forgotten', \
                status = CASE WHEN o.status IN ('flagged', 'archived', 'failed') THEN 'scheduled' ELSE o.status END, \
                archived_at = COALESCE(o.archived_at, pg_catalog.now()), redact_due_at = LEAST(o.redact_due_at, pg_catalog.now()), \
                retrieved_until = CASE WHEN o.retrieved_until IS NOT NULL THEN LEAST(o.retrieved_until, pg_catalog.now()) END, \
                held_until = NULL, held_since = NULL, hold_reason = NULL, \
                archive_held_until = NULL, archive_held_since = NULL, archive_hold_reason = NULL, effective_at = NULL, pushed_by = NULL, next_attempt_at = NULL, \
                next_due_at = pg_catalog.now() \
             WHERE o.policy = $1 AND o.status <> 'gone'",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    Ok(())
}

impl Run<'_> {
    /// Destroys what came along of the archive.
    fn end_all(&mut self) -> Result<()> {
        let mut after = String::new();
        loop {
            turn::take(&self.plan.policy, Mode::Alone)?;
            self.batches.keys.refresh(&self.plan.policy)?;
            let rows = on_keys(|| {
                sql::write(
                    "SELECT o.order_key, o.order_number FROM amazon_pii.order_state o WHERE o.policy = $1 AND o.order_key > $2 \
                        AND o.status IN ('redacted', 'gone') AND o.purged_at IS NULL ORDER BY o.order_key LIMIT $3 FOR UPDATE",
                    &[
                        Arg::Text(Some(&self.plan.policy)),
                        Arg::Text(Some(&after)),
                        Arg::Int(TOGETHER),
                    ],
                )
            })?;
            let ended = rows
                .iter()
                .map(|r| {
                    Ok(Ended {
                        order_key: r.string(0)?,
                        order_number: r.owned(1)?,
                    })
                })
                .collect::<Result<Vec<_>>>()?;
            let Some(last) = ended.last() else { break };
            after = last.order_key.clone();
            purge::end(self.plan, &self.batches.keys, ended, Why::Sanitized)?;
            self.boundary.commit()?;
        }
        self.boundary.commit()
    }
}
