//! Transitions of orders and records, each one statement for a batch, as the extension's owner.

use std::collections::HashMap;

use super::due::Due;
use super::plan::Plan;
use super::records::RecordList;
use crate::domain::clock::backoff;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};

fn keys(batch: &[&Due]) -> Vec<String> {
    batch.iter().map(|d| d.order_key.clone()).collect()
}

/// Orders whose copy is complete, with what they list now. One that is redacted or retrieved stays so; it has been looked
/// at again. Returns by whom each is written now.
///
/// # Errors
/// Errors of the server.
pub fn archived(plan: &Plan, batch: &[(&Due, &RecordList)]) -> Result<HashMap<String, String>> {
    if batch.is_empty() {
        return Ok(HashMap::new());
    }
    let (keys, records) = lists(batch.iter().copied());
    let rows = on_keys(|| {
        sql::write(
            "UPDATE amazon_pii.order_state o SET \
                status = CASE WHEN status IN ('redacted', 'retrieved') THEN status ELSE 'archived' END, \
                archived_at = COALESCE(archived_at, pg_catalog.now()), records = n.r, \
                next_due_at = CASE WHEN status = 'redacted' THEN next_due_at \
                                   WHEN retrieved_until IS NOT NULL THEN GREATEST(retrieved_until, held_until) \
                                   ELSE GREATEST(redact_due_at, held_until) END, \
                next_attempt_at = NULL, last_error = NULL \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (p, k, r) \
             WHERE o.policy = n.p AND o.order_key = n.k RETURNING o.order_key, o.xmin",
            &[
                policy_each(plan, keys.len()),
                Arg::texts(&keys),
                Arg::opt_texts(&records),
            ],
        )
    })?;
    rows.iter().map(|r| Ok((r.string(0)?, r.string(1)?))).collect()
}

/// What orders list now, some of whose rows were archived alone.
///
/// # Errors
/// Errors of the server.
pub fn listed(plan: &Plan, batch: &[Due]) -> Result<()> {
    let (keys, records) = lists(batch.iter().map(|d| (d, &*d.records)));
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET records = n.r, \
                last_error = CASE WHEN o.status = 'failed' THEN o.last_error END \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (p, k, r) \
             WHERE o.policy = n.p AND o.order_key = n.k",
            &[
                policy_each(plan, keys.len()),
                Arg::texts(&keys),
                Arg::opt_texts(&records),
            ],
        )
    })?;
    Ok(())
}

/// Orders whose copy is stored and that are not redacted after all: a batch that does both writes one state.
///
/// # Errors
/// Errors of the server.
pub fn copied(plan: &Plan, batch: &[&Due]) -> Result<()> {
    let pending = batch.iter().filter(|d| d.copied && !d.archived);
    archived(plan, &pending.map(|d| (*d, &*d.records)).collect::<Vec<_>>()).map(|_| ())
}

/// The policy's name once for each row of a batch. Compared with a constant, the planner would believe that few rows bear
/// it, and read them all for each row of the batch.
pub fn policy_each(plan: &Plan, rows: usize) -> Arg<'_> {
    Arg::Texts(vec![Some(plan.policy.as_str()); rows])
}

fn lists<'a>(batch: impl Iterator<Item = (&'a Due, &'a RecordList)>) -> (Vec<&'a str>, Vec<Option<String>>) {
    batch.map(|(d, r)| (d.order_key.as_str(), r.text())).unzip()
}

/// Purged orders of which something is archived anew.
///
/// # Errors
/// Errors of the server.
pub fn archived_anew(plan: &Plan, orders: &[&str]) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET purged_at = NULL WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
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
            "UPDATE amazon_pii.order_state o SET status = 'gone', asked = CASE WHEN asked NOT IN ('erase', 'revived') THEN asked END, next_due_at = NULL, \
                redact_due_at = COALESCE(redact_due_at, pg_catalog.now()), \
                next_attempt_at = NULL, last_error = NULL \
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
    let (keys, records) = lists(batch.iter().map(|d| (*d, &*d.records)));
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET status = 'redacted', redacted_at = pg_catalog.now(), redacted_version = $3, \
                redacted_first_at = COALESCE(redacted_first_at, redacted_at, pg_catalog.now()), \
                archived_at = COALESCE(archived_at, pg_catalog.now()), records = n.r, \
                retrieved_until = NULL, held_until = NULL, asked = CASE WHEN asked NOT IN ('erase', 'revived') THEN asked END, attempts = 0, \
                next_attempt_at = NULL, last_error = NULL, next_due_at = NULL \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($4)) AS n (p, k, r) \
             WHERE o.policy = n.p AND o.order_key = n.k",
            &[
                policy_each(plan, keys.len()),
                Arg::texts(&keys),
                Arg::Int(plan.version),
                Arg::opt_texts(&records),
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
            "UPDATE amazon_pii.order_state o SET asked = CASE WHEN asked NOT IN ('erase', 'revived') THEN asked END, attempts = 0, next_attempt_at = NULL, last_error = NULL, \
                next_due_at = NULL \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys(batch))],
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

/// An order whose archive needed attention, and does not any more; a failed order keeps its error.
///
/// # Errors
/// Errors of the server.
pub fn untroubled(plan: &Plan, order: &str) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET last_error = NULL \
             WHERE policy = $1 AND order_key = $2 AND last_error IS NOT NULL AND attempts = 0",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(order))],
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
            "UPDATE amazon_pii.order_state o SET redact_due_at = GREATEST($3::timestamptz + $5::interval, effective_at), pushed_by = $4, \
                next_due_at = GREATEST($3::timestamptz + $5::interval, effective_at, held_until) \
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
    announce_some(policy, status, orders, i64::try_from(orders.len()).unwrap_or(i64::MAX))
}

/// [`announce`] by the keys of some of `count` orders.
///
/// # Errors
/// Errors of the server.
pub fn announce_some(policy: &str, status: &str, orders: &[String], count: i64) -> Result<()> {
    if count == 0 {
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
        "policy": policy, "status": status, "count": count, "orders": orders[..taken], "complete": i64::try_from(taken) == Ok(count),
    });
    notify(&payload)
}

/// Tells whoever listens.
///
/// # Errors
/// Errors of the server.
pub fn notify(payload: &serde_json::Value) -> Result<()> {
    as_extension(|| {
        sql::write(
            "SELECT pg_catalog.pg_notify('amazon_pii', $1)",
            &[Arg::Text(Some(&payload.to_string()))],
        )
    })?;
    Ok(())
}
