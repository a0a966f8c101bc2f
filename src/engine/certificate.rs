//! The proof that an order is done: counts, times, names and reasons; no personal data.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::access::{Order, Target, resolve_only};
use super::plan::Plan;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role, session_user};
use crate::pg::sql::{self, Arg, Row};

/// What was done to the orders that a number stands for.
///
/// # Errors
/// Unknown, ambiguous, not done.
pub fn of(target: &Target<'_>) -> Result<Value> {
    require_role(
        &["amazon_pii_admin", "amazon_pii_auditor"],
        "issue the certificate of an order",
    )?;
    let (plan, orders) = resolve_only(target)?;
    let mut out = Vec::new();
    for order in &orders {
        out.push(one(&plan, order, target.number)?);
    }
    Ok(json!({
        "policy": plan.policy,
        "issued_at": now()?,
        "issued_by": session_user(),
        "orders": out,
    }))
}

fn now() -> Result<String> {
    let rows = as_extension(|| sql::read("SELECT pg_catalog.now()", &[]))?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
}

fn one(plan: &Plan, order: &Order, number: &str) -> Result<Value> {
    let place = [Arg::Text(Some(&plan.policy)), Arg::Text(Some(&order.key))];
    let (state, records) = as_extension(|| {
        Ok((
            sql::read(
                "SELECT flagged_at, anchor_at, archived_at, redacted_at, redacted_version, purged_at, COALESCE(asked = 'forgotten', false), \
                    status IN ('redacted', 'gone') AND (asked IS NULL OR asked = 'forgotten') \
                        AND (next_due_at IS NULL OR next_due_at > pg_catalog.now()) \
                 FROM amazon_pii.order_state WHERE policy = $1 AND order_key = $2",
                &place,
            )?,
            sql::read(
                "SELECT r.table_name, pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE r.status = 'redacted'), \
                    pg_catalog.count(*) FILTER (WHERE r.status = 'waiting'), pg_catalog.count(*) FILTER (WHERE r.status = 'gone'), \
                    pg_catalog.count(*) FILTER (WHERE r.status NOT IN ('redacted', 'waiting', 'gone')) \
                 FROM amazon_pii.records r WHERE r.policy = $1 AND r.order_key = $2 GROUP BY 1 ORDER BY 1",
                &place,
            )?,
        ))
    })?;
    let state = state.first().ok_or_else(|| Error::unknown_order(number))?;
    // Of one that was deleted before it was redacted the rows went with it.
    let deleted = order.stored == "gone" && state.text(4)?.is_none();
    let mut open = !state.bool(7)?;
    let (mut tables, mut total, mut waiting) = (Vec::new(), 0, 0);
    for r in &records {
        open |= !deleted && r.int(5)? > 0;
        total += r.int(1)?;
        waiting += r.int(3)?;
        tables.push(json!({
            "table": r.string(0)?,
            "records": r.int(1)?,
            "redacted": r.int(2)?,
            "waiting_for_other_orders": r.int(3)?,
            "gone": if deleted { r.int(1)? } else { r.int(4)? },
        }));
    }
    if open {
        return Err(
            Error::wrong_state(format!("order \"{number}\" is not done yet")).hint(format!(
                "It is {}; amazon_pii.explain_order() shows what is due when.",
                order.status
            )),
        );
    }
    let entries = entries(plan, &order.key)?;
    Ok(json!({
        "order_key": order.key,
        "order_number": number,
        "state": order.status,
        "forgotten": state.bool(6)?,
        "policy_version": state.text(4)?.and_then(|v| v.parse::<i64>().ok()),
        "flagged_at": state.text(0)?,
        "anchor_at": state.text(1)?,
        "archived_at": state.text(2)?,
        "redacted_at": state.text(3)?,
        "archive_destroyed_at": state.text(5)?,
        "records": total,
        "waiting_for_other_orders": waiting,
        "tables": tables,
        "actions": actions(&entries)?,
        "audit": audit(&entries)?,
    }))
}

/// What the log has of an order, in its order; a look at all of it, where it speaks of batches.
fn entries(plan: &Plan, order_key: &str) -> Result<Vec<Row>> {
    // As the list of a batch holds it: rows that cannot mean the order are not taken apart.
    let written = serde_json::to_string(order_key).map_err(|_| Error::internal("a key could not be written"))?;
    as_extension(|| {
        sql::read(
            "SELECT a.audit_id, a.at, a.action, a.\"user\", a.actor, a.reason, a.policy_version, pg_catalog.encode(a.mac, 'hex') \
             FROM amazon_pii.audit_entry a WHERE a.policy = $1 AND (a.order_key = $2 OR a.order_key IS NULL AND pg_catalog.strpos(a.lines, $3) > 0 \
                AND EXISTS (SELECT FROM pg_catalog.jsonb_array_elements(a.lines::jsonb) AS l (item) WHERE l.item->>0 = $2)) \
             ORDER BY a.audit_id",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(order_key)),
                Arg::Text(Some(&written)),
            ],
        )
    })
}

/// Who did what, when and why: what ended the order's personal data. Who has read it is in the log.
fn actions(entries: &[Row]) -> Result<Vec<Value>> {
    const ENDS: &[&str] = &["erase", "forget", "shred", "redact", "purge", "order_gone"];
    let mut out = Vec::new();
    for e in entries {
        if !ENDS.contains(&e.str(2)?) {
            continue;
        }
        out.push(json!({
            "action": e.str(2)?,
            "at": e.str(1)?,
            "user": e.str(3)?,
            "actor": e.text(4)?,
            "reason": e.text(5)?,
            "policy_version": e.text(6)?.and_then(|v| v.parse::<i64>().ok()),
        }));
    }
    Ok(out)
}

/// A digest over number and code of each entry, that whoever can read the log can make too: see the README.
fn audit(entries: &[Row]) -> Result<Value> {
    let mut lines = Vec::new();
    for e in entries {
        lines.push(format!("{}:{}", e.int(0)?, e.text(7)?.unwrap_or_default()));
    }
    let digest = Sha256::digest(lines.join("\n").as_bytes());
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    Ok(json!({
        "entries": entries.len(),
        "upto": entries.last().map(|e| e.int(0)).transpose()?,
        "sha256": hex,
    }))
}
