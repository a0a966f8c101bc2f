//! Orders some of whose rows were written: those that are done, or nearly, are looked at again.

use std::cell::RefCell;
use std::collections::HashSet;

use super::flag::{by_keys, upsert};
use super::news::Tell;
use super::plan::{AnchorPlan, Plan};
use super::walk::{Values, key_text};
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::prepared;
use crate::pg::sql::{self, Arg};
use crate::pg::trigger::engine_is_writing;

/// An order that is redacted and has nothing due. A subquery, so that the moment is worked out once.
const DONE: &str = "(status = 'redacted' AND (next_due_at IS NULL OR next_due_at > (SELECT pg_catalog.now())))";

/// One that will be redacted soon, or looked at again.
const SOON: &str = "(COALESCE(retrieved_until, redact_due_at) < (SELECT pg_catalog.now() + '8 days'::interval) \
    AND status IN ('scheduled', 'archived', 'failed', 'retrieved') OR status = 'redacted' AND next_due_at <= (SELECT pg_catalog.now()))";

/// How long before its time a cycle may take an order: within a window those that cannot wait for the end of the next one. And a
/// moment more, for clocks are read one after the other.
const AHEAD: [&str; 2] = ["1 minute", "4 days"];

/// From this many on, a range of the index is read: keys of one import lie close together.
const MANY: usize = 1000;

thread_local! {
    /// Orders to whose rows the shop's own triggers wrote because the engine did, while somebody listens.
    static BESIDES: RefCell<Option<HashSet<(String, String)>>> = const { RefCell::new(None) };
}

/// Listens to what the shop's own triggers write because the engine writes: a history gets a copy of what was there, which
/// the order's new state would pass over. Ends when dropped.
#[must_use]
pub struct Besides(());

impl Besides {
    /// Begins to listen.
    pub fn begin() -> Self {
        BESIDES.set(Some(HashSet::new()));
        Self(())
    }

    /// The orders of a policy that such rows belong to.
    pub fn orders(&self, policy: &str) -> Vec<String> {
        BESIDES.with_borrow(|b| {
            let all = b.iter().flatten();
            all.filter(|(of, _)| of == policy)
                .map(|(_, order)| order.clone())
                .collect()
        })
    }
}

impl Drop for Besides {
    fn drop(&mut self) {
        BESIDES.set(None);
    }
}

fn note_besides(plan: &Plan, orders: impl Iterator<Item = String>) {
    if engine_is_writing() {
        BESIDES.with_borrow_mut(|b| {
            if let Some(b) = b {
                b.extend(orders.map(|order| (plan.policy.clone(), order)));
            }
        });
    }
}

/// Orders that a write to their rows concerns.
#[derive(Default)]
struct Concerned {
    done: Vec<String>,
    /// Each with the place of its row.
    soon: Vec<(String, String)>,
}

/// Of these orders those that are redacted, or are just being redacted, are looked at by the next cycle.
///
/// # Errors
/// Errors of the server.
pub fn look_again(plan: &Plan, orders: &[String]) -> Result<()> {
    note_besides(plan, orders.iter().cloned());
    let mut keys: Vec<&str> = orders.iter().map(String::as_str).collect();
    // Keys of one length are a range: numbers are in order within it.
    keys.sort_unstable_by_key(|k| (k.len(), *k));
    let parts = keys.chunk_by(|a, b| a.len() == b.len());
    mark(
        plan,
        &concerned(plan, parts, |part, key| part.binary_search(&key).is_ok())?,
    )
}

/// [`look_again`] at orders whose key is one number, sorted. Their keys are written down only where they are looked for.
///
/// # Errors
/// As [`look_again`].
pub fn look_again_at_numbers(plan: &Plan, orders: &[i64]) -> Result<()> {
    note_besides(plan, orders.iter().map(ToKey::to_key));
    let is_in = |part: &[i64], key: &str| {
        let number = key.trim_start_matches("[\"").trim_end_matches("\"]").parse();
        number.is_ok_and(|n| part.binary_search(&n).is_ok())
    };
    let parts = orders.chunk_by(|a, b| digits(*a) == digits(*b));
    mark(plan, &concerned(plan, parts, is_in)?)
}

/// Sign and length: among numbers that have these in common, texts are in order.
fn digits(number: i64) -> (i64, Option<u32>) {
    (number.signum(), number.unsigned_abs().checked_ilog10())
}

/// One that is redacted becomes due. One that will be soon is kept from being redacted until this transaction is over, so
/// that its new rows are seen. A cycle may be between copying and overwriting it: what is written here tells it to look again. If
/// somebody has it locked, it is noted for the next.
fn mark(plan: &Plan, concerned: &Concerned) -> Result<()> {
    if !concerned.done.is_empty() {
        let marked = prepared::execute(
            &[
                "UPDATE amazon_pii.order_state SET next_due_at = pg_catalog.now() WHERE policy IS NOT DISTINCT FROM $1 \
                AND order_key = ANY ($2) AND ",
                DONE,
            ]
            .concat(),
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&concerned.done)],
        )?;
        // Whoever made one of them due meanwhile has perhaps looked at it already.
        if usize::try_from(marked) != Ok(concerned.done.len()) {
            prepared::execute(
                "INSERT INTO amazon_pii.touched (policy, entry, row_key) SELECT $1, '', k FROM pg_catalog.unnest($2) AS k",
                &[Arg::Text(Some(&plan.policy)), Arg::texts(&concerned.done)],
            )?;
        }
    }
    if !concerned.soon.is_empty() {
        let (keys, places): (Vec<_>, Vec<_>) = concerned.soon.iter().map(|(k, at)| (k.as_str(), at.as_str())).unzip();
        // By their places, where they were a moment ago: looking for each once more costs more than the lock. One that has
        // moved since is noted.
        prepared::execute(
            "WITH locked AS MATERIALIZED (SELECT order_key, ctid AS place, \
                $5 AND next_due_at <= pg_catalog.clock_timestamp() + $4::interval AS taken, status <> 'redacted' AS waits \
                FROM amazon_pii.order_state WHERE policy IS NOT DISTINCT FROM $1 AND ctid = ANY ($3::tid[]) \
                AND status IN ('scheduled', 'archived', 'failed', 'retrieved', 'redacted') FOR KEY SHARE SKIP LOCKED), \
             told AS (UPDATE amazon_pii.order_state SET next_due_at = next_due_at WHERE policy IS NOT DISTINCT FROM $1 \
                AND ctid = ANY (ARRAY(SELECT ctid FROM amazon_pii.order_state WHERE policy IS NOT DISTINCT FROM $1 \
                    AND ctid = ANY (ARRAY(SELECT place FROM locked WHERE taken)) FOR NO KEY UPDATE SKIP LOCKED)) RETURNING order_key) \
             INSERT INTO amazon_pii.touched (policy, entry, row_key) SELECT $1, '', k FROM pg_catalog.unnest($2) AS k \
             WHERE k NOT IN (SELECT order_key FROM locked WHERE waits AND NOT taken UNION ALL SELECT order_key FROM told)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&keys),
                Arg::texts(&places),
                Arg::Text(Some(AHEAD[usize::from(plan.document.window.is_some())])),
                // Otherwise no cycle is at it.
                Arg::Bool(plan.enabled && plan.suspended.is_none()),
            ],
        )?;
    }
    Ok(())
}

/// Those of some sorted lists that are concerned. Of a long one the index is read from the least key to the greatest, for as
/// long as that is cheaper than to look for each. Most rows that are written belong to orders of other channels, or to young
/// ones: found out without a write.
fn concerned<'a, K: ToKey + 'a>(
    plan: &Plan,
    parts: impl Iterator<Item = &'a [K]>,
    is_in: impl Fn(&[K], &str) -> bool,
) -> Result<Concerned> {
    let (mut found, mut each) = (Concerned::default(), Vec::new());
    for part in parts {
        match concerned_in_range(plan, part)? {
            Some(mut some) => {
                some.done.retain(|key| is_in(part, key));
                some.soon.retain(|(key, _)| is_in(part, key));
                found.done.extend(some.done);
                found.soon.extend(some.soon);
            }
            None => each.extend(part.iter().map(ToKey::to_key)),
        }
    }
    if !each.is_empty() {
        each_concerned(plan, &each, &mut found)?;
    }
    Ok(found)
}

fn each_concerned(plan: &Plan, orders: &[String], found: &mut Concerned) -> Result<()> {
    let rows = prepared::rows(
        &[
            "SELECT order_key, ",
            DONE,
            ", ctid FROM amazon_pii.order_state WHERE policy IS NOT DISTINCT FROM $1 AND order_key = ANY ($2) AND (",
            DONE,
            " OR ",
            SOON,
            ")",
        ]
        .concat(),
        &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
    )?;
    for row in &rows {
        if row.bool(1)? {
            found.done.push(row.string(0)?);
        } else {
            found.soon.push((row.string(0)?, row.string(2)?));
        }
    }
    Ok(())
}

/// All that are concerned between the first and the last of sorted keys; `None` if these are few, or others lie between them
/// in such number that reading on does not pay.
fn concerned_in_range<K: ToKey>(plan: &Plan, keys: &[K]) -> Result<Option<Concerned>> {
    let (Some(first), Some(last), true) = (keys.first(), keys.last(), keys.len() >= MANY) else {
        return Ok(None);
    };
    // The text of a negative number is the greater the less it is.
    let (a, b) = (first.to_key(), last.to_key());
    let limit = i64::try_from(2 * keys.len()).unwrap_or(i64::MAX);
    let rows = on_keys(|| {
        sql::read(
            &[
                "SELECT pg_catalog.count(*), pg_catalog.to_json(pg_catalog.array_agg(s.order_key) FILTER (WHERE s.done)), \
                    pg_catalog.to_json(pg_catalog.array_agg(s.order_key) FILTER (WHERE s.soon)), \
                    pg_catalog.to_json(pg_catalog.array_agg(s.place) FILTER (WHERE s.soon)) FROM (SELECT order_key, ctid AS place, ",
                DONE,
                " AS done, ",
                SOON,
                " AS soon FROM amazon_pii.order_state \
                    WHERE policy IS NOT DISTINCT FROM $1 AND order_key BETWEEN $2 AND $3 LIMIT $4) AS s",
            ]
            .concat(),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(a.as_str().min(&b))),
                Arg::Text(Some(a.as_str().max(&b))),
                Arg::Int(limit),
            ],
        )
    })?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    if row.int(0)? == limit {
        return Ok(None);
    }
    let list = |column| -> Result<Vec<String>> {
        serde_json::from_str(row.text(column)?.unwrap_or("[]"))
            .map_err(|_| Error::internal("a list of keys could not be read"))
    };
    Ok(Some(Concerned {
        done: list(1)?,
        soon: list(2)?.into_iter().zip(list(3)?).collect(),
    }))
}

/// The key of an order, as it is stored.
trait ToKey {
    fn to_key(&self) -> String;
}

impl ToKey for &str {
    fn to_key(&self) -> String {
        (*self).to_owned()
    }
}

impl ToKey for i64 {
    fn to_key(&self) -> String {
        format!("[\"{self}\"]")
    }
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

/// [`linked_changed`] of orders whose key is one number, sorted.
///
/// # Errors
/// As [`linked_changed`].
pub fn numbered_changed(plan: &Plan, orders: &[i64], tell: Tell) -> Result<()> {
    look_again_at_numbers(plan, orders)?;
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
