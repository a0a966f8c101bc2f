//! What keeps personal data for longer than the 30 days that Amazon allows: it takes a reason, and `status` shows it while it lasts.

use super::check::{Problem, Severity};
use super::plan::Plan;
use crate::domain::policy::{Policy, ReasonRule};
use crate::domain::reason;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// How long a document keeps personal data, and why; nothing where that is no more than 30 days, in whatever month.
///
/// # Errors
/// It does not say why, or the reason is unusable.
pub fn of_policy(policy: &Policy) -> Result<Option<String>> {
    let why = match &policy.loosened {
        None => None,
        Some(why) => {
            let why = reason::check(Some(why), ReasonRule::Required);
            Some(why.map_err(|e| Error::invalid(format!("loosened: {e}")).hint(e.hint()))?)
        }
    };
    let clocks = [
        ("redact_after", &policy.redact_after),
        ("retrieved_for", &policy.retrieved_for),
    ];
    let mut long = Vec::new();
    for (name, after) in clocks {
        if is_long(after)? {
            long.push(format!("{name} is {after}"));
            if why.is_none() {
                return Err(
                    Error::invalid(format!("{name}: longer than the 30 days that Amazon allows")).hint(
                        "Say in \"loosened\" why, in 50 characters at most; status shows it for as long as it lasts.",
                    ),
                );
            }
        }
    }
    let why = why.filter(|_| !long.is_empty());
    Ok(why.map(|why| format!("{}: {why}", long.join(", "))))
}

/// Whether an interval can be more than 30 days, from whatever month's beginning on.
fn is_long(interval: &str) -> Result<bool> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.bool_or(m.t + $1::interval > m.t + '30 days'::interval) FROM pg_catalog.generate_series( \
                '2026-01-01'::timestamp, '2029-12-01'::timestamp, '1 month'::interval) AS m (t)",
            &[Arg::Text(Some(interval))],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
}

/// Where a document changes the clock of a policy: how many orders become due, and when.
///
/// # Errors
/// Errors of the server.
pub fn changed_clock(plan: &Plan) -> Result<Vec<Problem>> {
    let rows = as_extension(|| {
        sql::read(
            "WITH due AS (SELECT GREATEST(COALESCE(o.anchor_at + $2::interval, o.stale_at), o.held_until, o.effective_at) AS at \
                FROM amazon_pii.order_state AS o WHERE o.policy = $1 AND o.redacted_version IS NULL AND o.asked IS NULL AND o.follows IS NULL \
                AND o.status IN ('scheduled', 'archived', 'failed')) \
             SELECT (p.document::pg_catalog.jsonb OPERATOR(pg_catalog.->>) 'redact_after'), pg_catalog.count(d.at) FILTER (WHERE d.at <= pg_catalog.now()), \
                pg_catalog.count(d.at) FILTER (WHERE d.at > pg_catalog.now() AND d.at <= pg_catalog.now() + '7 days'::interval), \
                pg_catalog.count(d.at) FILTER (WHERE d.at > pg_catalog.now() + '7 days'::interval), \
                pg_catalog.min(d.at) FILTER (WHERE d.at > pg_catalog.now()), pg_catalog.max(d.at) \
             FROM amazon_pii.policy AS p LEFT JOIN due AS d ON true WHERE p.policy = $1 GROUP BY p.document",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&plan.document.redact_after)),
            ],
        )
    })?;
    let Some(row) = rows.first() else { return Ok(Vec::new()) };
    let before = row.text(0)?.unwrap_or("30 days");
    if before == plan.document.redact_after {
        return Ok(Vec::new());
    }
    let (now, soon, later) = (row.int(1)?, row.int(2)?, row.int(3)?);
    let mut problem =
        format!("instead of {before}: {now} orders become due at once, {soon} within 7 days, {later} later");
    if let (Some(first), Some(last)) = (row.text(4)?, row.text(5)?) {
        problem.push_str(&format!("; the next at {first}, the last at {last}"));
    }
    Ok(vec![Problem::new(
        Severity::Info,
        "redact_after",
        problem,
        "Orders that are redacted stay redacted.",
    )])
}
