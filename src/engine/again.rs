//! Orders some of whose rows were written: those that are done, or nearly, are looked at again.

use super::flag::{by_keys, upsert};
use super::news::Tell;
use super::plan::{AnchorPlan, Plan};
use super::walk::{Values, key_text};
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// An order that is redacted and has nothing due, or will be redacted soon. A subquery, so that the moment is worked out once.
const CONCERNED: &str = "(status = 'redacted' AND (next_due_at IS NULL OR next_due_at > pg_catalog.now()) \
    OR COALESCE(retrieved_until, redact_due_at) < (SELECT pg_catalog.now() + '8 days'::interval) \
       AND status IN ('scheduled', 'archived', 'failed', 'retrieved'))";

/// From this many on, a range of the index is read: keys of one import lie close together.
const MANY: usize = 1000;

/// Of these orders those that are redacted, or are just being redacted, are looked at by the next cycle.
///
/// # Errors
/// Errors of the server.
pub fn look_again(plan: &Plan, orders: &[String]) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        // Most rows that are written belong to orders of other channels, or to young ones: found out without a write.
        let known = concerned(plan, orders)?;
        if known.is_empty() {
            return Ok(());
        }
        sql::execute(
            // One that is due soon is kept from being redacted until this transaction is over, so that its new rows are
            // seen; if a cycle is at it already, it is noted for the next.
            "WITH again AS (UPDATE amazon_pii.order_state SET next_due_at = pg_catalog.now() WHERE policy IS NOT DISTINCT FROM $1 AND order_key = ANY ($2) \
                AND status = 'redacted' AND (next_due_at IS NULL OR next_due_at > pg_catalog.now())), \
             soon AS (SELECT order_key FROM amazon_pii.order_state WHERE policy IS NOT DISTINCT FROM $1 AND order_key = ANY ($2) \
                AND status IN ('scheduled', 'archived', 'failed', 'retrieved') \
                AND COALESCE(retrieved_until, redact_due_at) < pg_catalog.now() + '8 days'::interval), \
             kept AS (SELECT order_key FROM amazon_pii.order_state WHERE policy = $1 AND order_key IN (SELECT order_key FROM soon) \
                FOR KEY SHARE SKIP LOCKED) \
             INSERT INTO amazon_pii.touched (policy, entry, row_key) SELECT $1, '', order_key FROM soon \
             WHERE order_key NOT IN (SELECT order_key FROM kept)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&known)],
        )?;
        Ok(())
    })
}

/// Those of these orders that are concerned. Where there are many, the index is read from the least key to the greatest, for
/// as long as that is cheaper than to look for each. Keys of one length are a range: numbers are in order within it.
fn concerned(plan: &Plan, orders: &[String]) -> Result<Vec<String>> {
    if orders.len() < MANY {
        return each_concerned(plan, orders);
    }
    let mut keys: Vec<&str> = orders.iter().map(String::as_str).collect();
    keys.sort_unstable_by_key(|k| (k.len(), *k));
    let (mut found, mut each) = (Vec::new(), Vec::new());
    for part in keys.chunk_by(|a, b| a.len() == b.len()) {
        match concerned_in_range(plan, part)? {
            Some(some) => found.extend(some),
            None => each.extend_from_slice(part),
        }
    }
    if !each.is_empty() {
        found.extend(each_concerned(plan, &each)?);
    }
    Ok(found)
}

fn each_concerned<S: AsRef<str>>(plan: &Plan, orders: &[S]) -> Result<Vec<String>> {
    let rows = sql::read(
        &[
            "SELECT order_key FROM amazon_pii.order_state WHERE policy IS NOT DISTINCT FROM $1 AND order_key = ANY ($2) AND ",
            CONCERNED,
        ]
        .concat(),
        &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
    )?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// Those of sorted keys that are concerned; `None` if others lie between them in such number that reading on does not pay.
fn concerned_in_range(plan: &Plan, keys: &[&str]) -> Result<Option<Vec<String>>> {
    let (Some(first), Some(last), true) = (keys.first(), keys.last(), keys.len() >= MANY) else {
        return Ok(None);
    };
    let limit = i64::try_from(2 * keys.len()).unwrap_or(i64::MAX);
    let rows = sql::read(
        &[
            "SELECT pg_catalog.count(*), pg_catalog.to_json(pg_catalog.array_agg(s.order_key) FILTER (WHERE s.concerned)) \
             FROM (SELECT order_key, ",
            CONCERNED,
            " AS concerned FROM amazon_pii.order_state WHERE policy IS NOT DISTINCT FROM $1 AND order_key BETWEEN $2 AND $3 LIMIT $4) AS s",
        ]
        .concat(),
        &[
            Arg::Text(Some(&plan.policy)),
            Arg::Text(Some(first)),
            Arg::Text(Some(last)),
            Arg::Int(limit),
        ],
    )?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    if row.int(0)? == limit {
        return Ok(None);
    }
    let list: Vec<String> = serde_json::from_str(row.text(1)?.unwrap_or("[]"))
        .map_err(|_| Error::internal("a list of keys could not be read"))?;
    Ok(Some(
        list.into_iter()
            .filter(|k| keys.binary_search(&k.as_str()).is_ok())
            .collect(),
    ))
}

/// Orders whose linked rows changed: redacted ones are looked at again, clocks that linked rows set are set anew.
///
/// # Errors
/// As [`by_keys`].
pub fn linked_changed(plan: &Plan, orders: &[Values], tell: Tell) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    look_again(plan, &orders.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?)?;
    set_clocks(plan, orders, tell)
}

/// [`linked_changed`] of orders whose key is one number.
///
/// # Errors
/// As [`linked_changed`].
pub fn numbered_changed(plan: &Plan, orders: &[i64], tell: Tell) -> Result<()> {
    look_again(plan, &orders.iter().map(|n| format!("[\"{n}\"]")).collect::<Vec<_>>())?;
    if has_linked_anchors(plan) {
        let keys: Vec<Values> = orders.iter().map(|n| vec![Some(n.to_string())]).collect();
        set_clocks(plan, &keys, tell)?;
    }
    Ok(())
}

fn has_linked_anchors(plan: &Plan) -> bool {
    plan.anchors.iter().any(|a| matches!(a, AnchorPlan::Linked { .. }))
}

fn set_clocks(plan: &Plan, orders: &[Values], tell: Tell) -> Result<()> {
    if !orders.is_empty() && has_linked_anchors(plan) {
        upsert(plan, &by_keys(plan, orders)?, "import", false, tell)?;
    }
    Ok(())
}
