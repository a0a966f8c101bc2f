//! Transitions of orders and records, each one statement for a batch, as the extension's owner.

use super::archive::RecordNote;
use super::due::Due;
use super::plan::Plan;
use crate::domain::clock::backoff;
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

fn keys(batch: &[&Due]) -> Vec<String> {
    batch.iter().map(|d| d.order_key.clone()).collect()
}

/// Orders whose copy is complete. One that is redacted or retrieved stays so; it has been looked at again.
///
/// # Errors
/// Errors of the server.
pub fn archived(plan: &Plan, batch: &[&Due]) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET \
                status = CASE WHEN status IN ('redacted', 'retrieved') THEN status ELSE 'archived' END, \
                archived_at = COALESCE(archived_at, pg_catalog.now()), \
                next_due_at = CASE WHEN status = 'redacted' THEN next_due_at \
                                   WHEN retrieved_until IS NOT NULL THEN GREATEST(retrieved_until, held_until) \
                                   ELSE GREATEST(redact_due_at, held_until) END, \
                next_attempt_at = NULL, last_error = NULL \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys(batch))],
        )
    })?;
    Ok(())
}

/// Records that the archive holds now.
///
/// # Errors
/// Errors of the server.
pub fn records_archived(plan: &Plan, records: &[RecordNote]) -> Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "INSERT INTO amazon_pii.record_state AS r (policy, order_key, table_name, record_key, entry, status, version) \
             SELECT $1, o, t, k, e, 'archived', v FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), \
                    pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6)) AS n (o, t, k, e, v) \
             ON CONFLICT (policy, order_key, table_name, record_key) DO UPDATE \
                SET version = EXCLUDED.version, changed_at = pg_catalog.now(), \
                    status = CASE WHEN r.status IN ('waiting', 'retrieved') THEN r.status ELSE 'archived' END \
              WHERE r.version <> EXCLUDED.version OR r.status IN ('redacted', 'gone')",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Texts(records.iter().map(|r| Some(r.order_key.as_str())).collect()),
                Arg::Texts(records.iter().map(|r| Some(r.table.as_str())).collect()),
                Arg::Texts(records.iter().map(|r| Some(r.record_key.as_str())).collect()),
                Arg::Texts(records.iter().map(|r| Some(r.entry.as_str())).collect()),
                Arg::Ints(records.iter().map(|r| r.version).collect()),
            ],
        )
    })?;
    Ok(())
}

/// Orders whose row was deleted: nothing more to do, the archive stays.
///
/// # Errors
/// Errors of the server.
pub fn gone(plan: &Plan, batch: &[&Due]) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET status = 'gone', next_due_at = NULL, next_attempt_at = NULL, last_error = NULL \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys(batch))],
        )
    })?;
    Ok(())
}

/// Orders whose own records are overwritten.
///
/// # Errors
/// Errors of the server.
pub fn redacted(plan: &Plan, batch: &[&Due]) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET status = 'redacted', redacted_at = pg_catalog.now(), redacted_version = $3, \
                retrieved_until = NULL, held_until = NULL, attempts = 0, \
                next_attempt_at = NULL, last_error = NULL, next_due_at = NULL \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&keys(batch)),
                Arg::Int(plan.version),
            ],
        )
    })?;
    Ok(())
}

/// Redacted orders that were looked at again and found clean.
///
/// # Errors
/// Errors of the server.
pub fn rechecked(plan: &Plan, batch: &[&Due]) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET attempts = 0, next_attempt_at = NULL, last_error = NULL, next_due_at = NULL \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys(batch))],
        )
    })?;
    Ok(())
}

/// Records of a batch with their new state; `witness` is the order that keeps a shared one alive.
pub struct RecordChange {
    pub order_key: String,
    pub table: String,
    pub record_key: String,
    pub entry: String,
    pub status: &'static str,
    pub witness: Option<String>,
}

/// Records that were overwritten, or that wait for other orders.
///
/// # Errors
/// Errors of the server.
pub fn records_changed(plan: &Plan, changes: &[RecordChange]) -> Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let went = || changes.iter().filter(|c| c.status == "redacted");
    on_keys(|| {
        sql::execute(
            "INSERT INTO amazon_pii.record_state AS r (policy, order_key, table_name, record_key, entry, status, witness) \
             SELECT $1, o, t, k, e, s, w FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), \
                    pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7)) AS n (o, t, k, e, s, w) \
             ON CONFLICT (policy, order_key, table_name, record_key) DO UPDATE \
                SET status = EXCLUDED.status, witness = EXCLUDED.witness, changed_at = pg_catalog.now()",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Texts(changes.iter().map(|c| Some(c.order_key.as_str())).collect()),
                Arg::Texts(changes.iter().map(|c| Some(c.table.as_str())).collect()),
                Arg::Texts(changes.iter().map(|c| Some(c.record_key.as_str())).collect()),
                Arg::Texts(changes.iter().map(|c| Some(c.entry.as_str())).collect()),
                Arg::Texts(changes.iter().map(|c| Some(c.status)).collect()),
                Arg::Texts(changes.iter().map(|c| c.witness.as_deref()).collect()),
            ],
        )?;
        // A row that went is gone for every order that used it.
        sql::execute(
            "UPDATE amazon_pii.record_state r SET status = 'redacted', witness = NULL, changed_at = pg_catalog.now() \
             WHERE r.status = 'waiting' AND r.record_key = ANY ($1) AND pg_catalog.concat_ws('|', r.table_name, r.record_key) = ANY ($2)",
            &[
                Arg::Texts(went().map(|c| Some(c.record_key.as_str())).collect()),
                Arg::texts(
                    &went()
                        .map(|c| format!("{}|{}", c.table, c.record_key))
                        .collect::<Vec<_>>(),
                ),
            ],
        )
    })?;
    Ok(())
}

/// Records of finished orders that had nothing to overwrite: clean, or their row is gone.
///
/// # Errors
/// Errors of the server.
pub fn records_left(plan: &Plan, finished: &[String], found: &[(&str, &str, &str)]) -> Result<()> {
    if finished.is_empty() {
        return Ok(());
    }
    let found: Vec<String> = found.iter().map(|(o, t, k)| format!("{o}|{t}|{k}")).collect();
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.record_state r SET changed_at = pg_catalog.now(), \
                status = CASE WHEN pg_catalog.concat_ws('|', r.order_key, r.table_name, r.record_key) = ANY ($3) THEN 'redacted' ELSE 'gone' END \
             WHERE r.policy IS NOT DISTINCT FROM $1 AND r.order_key = ANY ($2) AND (r.status IN ('archived', 'retrieved') \
                OR r.status = 'waiting' AND pg_catalog.concat_ws('|', r.order_key, r.table_name, r.record_key) <> ALL ($3))",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(finished), Arg::texts(&found)],
        )
    })?;
    Ok(())
}

/// An order that failed: its error and a growing wait, one day at most.
///
/// # Errors
/// Errors of the server.
pub fn failed(plan: &Plan, due: &Due, error: &Error) -> Result<()> {
    let wait = backoff(due.attempts + 1).num_seconds();
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET \
                status = CASE WHEN status IN ('redacted', 'retrieved') THEN status ELSE 'failed' END, \
                attempts = attempts + 1, last_error = $3, \
                next_attempt_at = pg_catalog.now() + pg_catalog.make_interval(secs => $4::float8), \
                next_due_at = pg_catalog.now() \
             WHERE policy = $1 AND order_key = $2",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&due.order_key)),
                Arg::Text(Some(&error.stored())),
                Arg::Int(wait),
            ],
        )
    })?;
    Ok(())
}

/// An order whose archive needs attention; its state stays.
///
/// # Errors
/// Errors of the server.
pub fn troubled(plan: &Plan, order: &str, error: &Error) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET last_error = $3 WHERE policy = $1 AND order_key = $2 AND last_error IS DISTINCT FROM $3",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(order)),
                Arg::Text(Some(&error.stored())),
            ],
        )
    })?;
    Ok(())
}

/// Orders whose rows somebody has locked, or that were edited since they were archived: set back without blame.
///
/// # Errors
/// Errors of the server.
pub fn set_back(plan: &Plan, batch: &[&Due], wait_seconds: i64, archive_again: bool) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET \
                status = CASE WHEN status IN ('redacted', 'retrieved') THEN status WHEN $4 THEN 'scheduled' ELSE status END, \
                next_attempt_at = CASE WHEN $3 > 0 THEN pg_catalog.now() + pg_catalog.make_interval(secs => $3::float8) END, \
                next_due_at = LEAST(next_due_at, pg_catalog.now()) \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&keys(batch)),
                Arg::Int(wait_seconds),
                Arg::Bool(archive_again),
            ],
        )
    })?;
    Ok(())
}

/// An order that a younger linked record pushes back.
///
/// # Errors
/// Errors of the server.
pub fn pushed(plan: &Plan, due: &Due, until: &str, by: &str) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET redact_due_at = $3::timestamptz + $5::interval, pushed_by = $4, \
                next_due_at = GREATEST($3::timestamptz + $5::interval, held_until) \
             WHERE policy = $1 AND order_key = $2",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&due.order_key)),
                Arg::Text(Some(until)),
                Arg::Text(Some(by)),
                Arg::Text(Some(&plan.document.redact_after)),
            ],
        )
    })?;
    Ok(())
}

/// Which of these moments plus `redact_after` still lie ahead of the horizon.
///
/// # Errors
/// Errors of the server.
pub fn still_young(plan: &Plan, moments: &[String], horizon: &str) -> Result<Vec<bool>> {
    if moments.is_empty() {
        return Ok(Vec::new());
    }
    let rows = on_keys(|| {
        sql::read(
            "SELECT m::timestamptz + $2::interval > $3::timestamptz FROM pg_catalog.unnest($1) WITH ORDINALITY AS n (m, i) ORDER BY i",
            &[
                Arg::texts(moments),
                Arg::Text(Some(&plan.document.redact_after)),
                Arg::Text(Some(horizon)),
            ],
        )
    })?;
    rows.iter().map(|r| r.bool(0)).collect()
}

/// Announces what changed, one payload a batch, as many keys as fit; never personal data.
///
/// # Errors
/// Errors of the server.
pub fn announce(plan: &Plan, status: &str, orders: &[&Due]) -> Result<()> {
    announce_keys(&plan.policy, status, &keys(orders))
}

/// [`announce`] by keys.
///
/// # Errors
/// Errors of the server.
pub fn announce_keys(policy: &str, status: &str, orders: &[String]) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    // The server's limit is 8000 bytes.
    const ROOM: usize = 7400;
    let mut taken = 0;
    let mut size = 0;
    for key in orders {
        size += key.len() * 2 + 3;
        if size > ROOM {
            break;
        }
        taken += 1;
    }
    let payload = serde_json::json!({
        "policy": policy, "status": status, "count": orders.len(), "orders": orders[..taken], "complete": taken == orders.len(),
    });
    on_keys(|| {
        sql::write(
            "SELECT pg_catalog.pg_notify('amazon_pii', $1)",
            &[Arg::Text(Some(&payload.to_string()))],
        )
    })?;
    Ok(())
}
