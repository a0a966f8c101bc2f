//! The export of accounting data: how far it has come, and who has to hear that it has not come far enough.

use super::audit::{self, AuditEntry};
use super::plan::Plan;
use super::state::notify;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys, require_role};
use crate::pg::sql::{self, Arg};

/// Notes that the accounting data of orders whose clock started up to a moment is exported. Returns how many orders that
/// adds.
///
/// # Errors
/// The policy does not exist; a moment in the future, or before the one that is noted, unless `back` says that this is meant.
pub fn mark(policy: &str, upto: &str, back: bool) -> Result<i64> {
    require_role(&["amazon_pii_admin"], "mark accounting data as exported")?;
    let (added, redacted, version) = as_extension(|| {
        let rows = sql::write(
            "SELECT version, exported_upto, pg_catalog.isfinite($2::timestamptz) AND $2::timestamptz <= pg_catalog.now(), \
                    COALESCE($2::timestamptz < exported_upto, false) FROM amazon_pii.policy WHERE policy = $1 FOR UPDATE",
            &[Arg::Text(Some(policy)), Arg::Text(Some(upto))],
        )?;
        let row = rows.first().ok_or_else(|| {
            Error::undefined(format!("policy \"{policy}\" does not exist"))
                .hint("The view amazon_pii.policies lists the policies.")
        })?;
        if !row.bool(2)? {
            return Err(Error::invalid("what is still to come cannot have been exported")
                .hint("Give the moment up to which the export has the orders, by the start of their clock; now() at the latest."));
        }
        if row.bool(3)? && !back {
            return Err(Error::invalid(format!(
                "the export is marked as done up to {} already",
                row.text(1)?.unwrap_or_default()
            ))
            .hint("To take that back, add back => true."));
        }
        let counts = sql::read(
            "SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE redacted_at IS NOT NULL) FROM amazon_pii.order_state \
             WHERE policy = $1 AND COALESCE(anchor_at, stale_at, redact_due_at) <= $2::timestamptz \
               AND ($3::timestamptz IS NULL OR COALESCE(anchor_at, stale_at, redact_due_at) > $3::timestamptz)",
            &[Arg::Text(Some(policy)), Arg::Text(Some(upto)), Arg::Text(row.text(1)?)],
        )?;
        sql::execute(
            "UPDATE amazon_pii.policy SET exported_upto = $2::timestamptz, export_looked_at = NULL WHERE policy = $1",
            &[Arg::Text(Some(policy)), Arg::Text(Some(upto))],
        )?;
        let counts = counts.first().ok_or_else(|| Error::internal("no row"))?;
        Ok((counts.int(0)?, counts.int(1)?, row.int(0)?))
    })?;
    audit::insert(&[AuditEntry {
        policy: Some(policy.to_owned()),
        policy_version: Some(version),
        detail: Some(format!("up to {upto}")),
        ..AuditEntry::new("mark_exported")?
    }])?;
    if redacted > 0 {
        pgrx::notice!("{redacted} of these orders were redacted before they were marked as exported");
    }
    crate::worker::wake();
    Ok(added)
}

/// Once a day, where the policy speaks of exports or somebody has marked one: warns of orders that will be redacted within
/// the next days and are not exported, and of those that were redacted without.
///
/// # Errors
/// Errors of the server.
pub fn look(plan: &Plan) -> Result<()> {
    let asked = plan.document.export.is_some();
    let due = on_keys(|| {
        sql::write(
            "UPDATE amazon_pii.policy SET export_looked_at = pg_catalog.now() WHERE policy = $1 AND ($2 OR exported_upto IS NOT NULL) \
                AND (export_looked_at IS NULL OR export_looked_at <= pg_catalog.now() - '1 day'::interval) RETURNING exported_upto",
            &[Arg::Text(Some(&plan.policy)), Arg::Bool(asked)],
        )
    })?;
    let Some(row) = due.first() else { return Ok(()) };
    let counts = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.count(*) FILTER (WHERE o.redacted_at IS NULL AND o.status IN ('scheduled', 'archived', 'failed') \
                        AND o.redact_due_at < pg_catalog.now() + '7 days'::interval), \
                    pg_catalog.count(*) FILTER (WHERE o.redacted_at IS NOT NULL) FROM amazon_pii.order_state AS o \
             WHERE o.policy = $1 AND (COALESCE(o.anchor_at, o.stale_at, o.redact_due_at) <= $2::timestamptz) IS NOT TRUE",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(row.text(0)?)],
        )
    })?;
    let counts = counts.first().ok_or_else(|| Error::internal("no row"))?;
    let (due, redacted) = (counts.int(0)?, counts.int(1)?);
    if due == 0 && redacted == 0 {
        return Ok(());
    }
    pgrx::warning!(
        "amazon_pii policy \"{}\": {due} orders are due within 7 days and not marked as exported, {redacted} were redacted without",
        plan.policy
    );
    let payload =
        serde_json::json!({ "policy": plan.policy, "status": "not_exported", "count": due, "redacted": redacted });
    notify(&payload)
}
