//! Orders that replace another. One that comes while its original is retrieved follows it: it is redacted when that
//! retrieval ends, whatever its own clock says.

use super::flag::OrderFact;
use super::plan::Plan;
use crate::pg::error::Result;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// Sets the dates of orders that were just flagged, or looked at again, and whose original is retrieved.
///
/// # Errors
/// Errors of the server.
pub fn follow(plan: &Plan, facts: &[&OrderFact]) -> Result<()> {
    let named: Vec<(&str, &str)> = facts
        .iter()
        .filter_map(|f| Some((f.key_text.as_str(), f.replaces.as_deref()?)))
        .collect();
    if named.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            // Several orders may bear the number: the last retrieval to end counts.
            "WITH original AS MATERIALIZED (SELECT n.k, f.order_key, f.retrieved_until \
                FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (k, num) \
                CROSS JOIN LATERAL (SELECT o.order_key, o.retrieved_until FROM amazon_pii.order_state AS o \
                   JOIN amazon_pii.order_state AS r ON r.policy = o.policy AND r.order_key = n.k \
                   WHERE o.policy = $1 AND o.order_number = n.num AND o.order_key <> n.k AND o.status = 'retrieved' \
                     AND r.flagged_at >= o.retrieved_at ORDER BY o.retrieved_until DESC LIMIT 1) AS f) \
             UPDATE amazon_pii.order_state AS r SET follows = f.order_key, redact_due_at = GREATEST(f.retrieved_until, r.effective_at), \
                archive_due_at = GREATEST(LEAST(r.archive_due_at, f.retrieved_until), r.effective_at), pushed_by = NULL, \
                status = CASE r.status WHEN 'flagged' THEN 'scheduled' ELSE r.status END, \
                next_due_at = CASE WHEN r.archived_at IS NULL THEN GREATEST(LEAST(r.archive_due_at, f.retrieved_until), r.effective_at) \
                    ELSE GREATEST(f.retrieved_until, r.held_until, r.effective_at) END \
             FROM original AS f WHERE r.policy = $1 AND r.order_key = f.k AND r.status IN ('flagged', 'scheduled', 'archived') AND r.asked IS NULL \
                AND (r.follows IS DISTINCT FROM f.order_key OR r.redact_due_at IS DISTINCT FROM GREATEST(f.retrieved_until, r.effective_at))",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Texts(named.iter().map(|(key, _)| Some(*key)).collect()),
                Arg::Texts(named.iter().map(|(_, number)| Some(*number)).collect()),
            ],
        )
    })?;
    Ok(())
}

/// Orders whose retrieval has just been ended: what follows them is due, too.
///
/// # Errors
/// Errors of the server.
pub fn ended(plan: &Plan, originals: &[String]) -> Result<()> {
    if plan.replaces.is_none() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state AS r SET redact_due_at = GREATEST(pg_catalog.now(), r.effective_at), \
                archive_due_at = LEAST(r.archive_due_at, pg_catalog.now()), \
                next_due_at = GREATEST(pg_catalog.now(), r.held_until, r.effective_at) \
             WHERE r.policy = $1 AND r.follows = ANY ($2) AND r.status IN ('scheduled', 'archived', 'failed') AND r.asked IS NULL \
                AND r.redact_due_at > pg_catalog.now()",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(originals)],
        )
    })?;
    Ok(())
}
