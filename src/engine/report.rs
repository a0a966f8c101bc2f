//! A grace period: until `report_only_until` cycles flag, and say what they would do.

use super::due::{self, Clock};
use super::plan::Plan;
use crate::pg::error::Result;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::xact::{self, timestamp_text};

/// What a cycle says instead of doing it; `None` when the period is over, or there never was one.
///
/// # Errors
/// Errors of the server.
pub fn remark(plan: &Plan, clock: &Clock) -> Result<Option<String>> {
    let now = xact::now()?;
    let Some(until) = plan.document.report_only_until.filter(|until| *until > now) else {
        return Ok(None);
    };
    let (archive, redact) = due::count(plan, clock)?;
    Ok(Some(format!(
        "only reports until {}: would archive {archive} orders and redact {redact}",
        timestamp_text(until)
    )))
}

/// Whether the newest cycle of the policy that left a row said the same: then that row stands for this one as well.
///
/// # Errors
/// Errors of the server.
pub fn repeats(plan: &Plan, remark: &str) -> Result<bool> {
    let updated = as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.run SET finished_at = pg_catalog.clock_timestamp() WHERE note = $2 AND run_id = \
                (SELECT r.run_id FROM amazon_pii.run AS r WHERE r.policy = $1 ORDER BY r.run_id DESC LIMIT 1)",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(remark))],
        )
    })?;
    Ok(updated > 0)
}
