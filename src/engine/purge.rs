//! The end of an archive: its keys and documents are destroyed, by whoever asked for that or when their time is over.
//! Always in the transaction that says so in the order's state.

use std::collections::HashMap;

use super::audit::{self, Line};
use super::plan::Plan;
use super::state;
use super::tombstone::{self, When};
use super::vault;
use crate::domain::tombstone::What;
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{Identity, OWN_PATH, act_as, as_extension, on_keys};
use crate::pg::sql::{self, Arg};

/// Orders that have an archive which is kept for a time, over `o`, and since when; `order_state_kept` has them in this order. One that
/// was deleted while it was held is held still.
const KEPT: &str = "o.status IN ('redacted', 'gone') AND o.purged_at IS NULL AND o.archive_held_until IS NULL \
     AND (o.held_until IS NULL OR o.held_until <= pg_catalog.now())";
const SINCE: &str = "COALESCE(o.redacted_at, o.redact_due_at)";

/// The index has them in order, and is read from its beginning.
const IN_ORDER: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_sort", "off"),
];

/// Whether a policy's `archive_for` is no time at all.
///
/// # Errors
/// It is no interval.
pub fn is_nothing(archive_for: &str) -> Result<bool> {
    let rows = as_extension(|| sql::read("SELECT $1::interval <= '0'::interval", &[Arg::Text(Some(archive_for))]))?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
}

/// An order whose archive is destroyed.
pub struct Ended {
    pub order_key: String,
    pub order_number: Option<String>,
}

/// What the tombstone file is to say.
pub struct Note<'a> {
    pub what: What,
    pub when: When,
    /// To sign it with, where they are at hand.
    pub keys: Option<&'a MasterKeys>,
}

/// Destroys what is archived of these orders, which the caller has locked, and writes that down, in the tombstone file too. Returns how
/// many documents each had, in their order.
///
/// # Errors
/// The archive or the tombstone file cannot be written; errors of the server.
pub fn destroy(plan: &Plan, orders: &[&str], note: Option<Note<'_>>) -> Result<Vec<i64>> {
    if orders.is_empty() {
        return Ok(Vec::new());
    }
    let places = places(plan, orders)?;
    let all: Vec<&str> = places.iter().map(|(_, place)| place.as_str()).collect();
    let mut found: HashMap<&str, (i64, i64)> = HashMap::new();
    let destroyed = vault::destroy(&plan.archive, &plan.policy, &all)?;
    for (order, place) in &places {
        if let Some(d) = destroyed.iter().find(|d| d.order_key == *place) {
            let known = found.entry(order).or_default();
            *known = (known.0 + d.documents, known.1.max(d.generation));
        }
    }
    let of = |order: &&str| found.get(order).copied().unwrap_or_default();
    let ended = on_keys(|| {
        let ended = sql::write(
            "UPDATE amazon_pii.order_state o SET purged_at = pg_catalog.now(), \
                key_generation = NULLIF(GREATEST(o.key_generation, n.g), 0), \
                archive_held_until = NULL, archive_held_since = NULL, archive_hold_reason = NULL, \
                asked = CASE WHEN o.asked = 'forget' THEN 'forgotten' ELSE o.asked END \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (p, k, g) \
             WHERE o.policy = n.p AND o.order_key = n.k RETURNING o.order_key, COALESCE(o.key_generation, 0)",
            &[
                state::policy_each(plan, orders.len()),
                Arg::texts(orders),
                Arg::Ints(orders.iter().map(|o| of(o).1).collect()),
            ],
        )?;
        // Nothing is left that could follow a change of keys.
        sql::execute(
            "DELETE FROM amazon_pii.renamed r WHERE r.policy = $1 AND COALESCE(r.order_key, r.new_key) = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&all)],
        )?;
        Ok(ended)
    })?;
    if let Some(Note { what, when, keys }) = note {
        let ended = ended.iter().map(|r| Ok((r.string(0)?, r.int(1)?)));
        let ended = ended.collect::<Result<Vec<_>>>()?;
        tombstone::write(&plan.policy, keys, what, when, &ended)?;
    }
    Ok(orders.iter().map(|o| of(o).0).collect())
}

/// Where the archive has documents of these orders: under their own keys, and under those that they had before where it has yet
/// to follow. (order, key in the archive).
fn places<'a>(plan: &Plan, orders: &[&'a str]) -> Result<Vec<(&'a str, String)>> {
    let mut out: Vec<(&str, String)> = orders.iter().map(|o| (*o, (*o).to_owned())).collect();
    let rows = on_keys(|| {
        sql::read(
            "WITH RECURSIVE k (i, place) AS (SELECT n.i, n.o FROM pg_catalog.unnest($2) WITH ORDINALITY AS n (o, i) \
                UNION SELECT k.i, r.old_key FROM k JOIN amazon_pii.renamed r \
                    ON r.policy = $1 AND r.order_key IS NULL AND r.new_key = k.place) \
             SELECT k.i - 1, k.place FROM k WHERE EXISTS (SELECT FROM amazon_pii.renamed r WHERE r.policy = $1 AND r.order_key IS NULL) \
                AND NOT EXISTS (SELECT FROM amazon_pii.order_state o WHERE o.policy = $1 AND o.order_key = k.place)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
        )
    })?;
    for row in &rows {
        let order = usize::try_from(row.int(0)?).ok().and_then(|i| orders.get(i));
        let order = order.ok_or_else(|| Error::internal("an ordinality is out of range"))?;
        out.push((order, row.string(1)?));
    }
    Ok(out)
}

/// Why an archive ends in a cycle.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Why {
    Forgotten,
    Over,
    /// In a copy of the database: the archive of the original is another one.
    Sanitized,
}

impl Why {
    fn words(self) -> &'static str {
        match self {
            Self::Forgotten => "forgotten",
            Self::Over => "archive_for is over",
            Self::Sanitized => "sanitize_copy",
        }
    }

    fn what(self) -> Option<What> {
        match self {
            Self::Forgotten => Some(What::Forgotten),
            Self::Over => Some(What::Purged),
            Self::Sanitized => None,
        }
    }
}

/// [`destroy`] in a cycle: recorded and announced.
///
/// # Errors
/// As [`destroy`].
pub fn end(plan: &Plan, keys: &MasterKeys, orders: Vec<Ended>, why: Why) -> Result<()> {
    let order_keys: Vec<String> = orders.iter().map(|o| o.order_key.clone()).collect();
    let texts: Vec<&str> = order_keys.iter().map(String::as_str).collect();
    let (when, signing) = (When::Now, Some(keys));
    let note = why.what().map(|what| Note {
        what,
        when,
        keys: signing,
    });
    let counts = destroy(plan, &texts, note)?;
    let why = why.words();
    let lines = orders.into_iter().zip(counts).map(|(order, documents)| Line {
        order_key: order.order_key,
        order_number: order.order_number,
        detail: match &plan.archive.foreign {
            None => format!("{documents} documents, {why}"),
            Some(foreign) => format!("its data keys; {} is to delete the documents; {why}", foreign.shown()),
        },
    });
    audit::insert_batch(keys, "purge", plan, lines.collect())?;
    state::announce_keys(&plan.policy, "purged", &order_keys)
}

/// Notes that archives are not held any longer: from now on they end with their time.
///
/// # Errors
/// Errors of the server.
pub fn let_go(policy: &str) -> Result<()> {
    act_as(Identity::Extension, OWN_PATH, IN_ORDER, || {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET archive_held_until = NULL, archive_held_since = NULL, archive_hold_reason = NULL \
             WHERE o.policy = $1 AND o.archive_held_until <= pg_catalog.now()",
            &[Arg::Text(Some(policy))],
        )
    })?;
    Ok(())
}

/// Whether this version of the policy is still in force; it stays so until the transaction is over. Who is about to change it is not
/// waited for.
///
/// # Errors
/// Errors of the server.
pub fn still_says(plan: &Plan) -> Result<bool> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT true FROM amazon_pii.policy p WHERE p.policy = $1 AND p.version = $2 AND p.enabled AND p.suspended IS NULL FOR SHARE SKIP LOCKED",
            &[Arg::Text(Some(&plan.policy)), Arg::Int(plan.version)],
        )
    })?;
    Ok(!rows.is_empty())
}

/// Purges the next orders whose archive is past its time, unless the policy has become another. Returns how many.
///
/// # Errors
/// As [`end`].
pub fn step(plan: &Plan, keys: &MasterKeys, limit: i64) -> Result<usize> {
    let past = past(&plan.policy, &plan.document.archive_for, limit)?;
    if past.is_empty() || !still_says(plan)? {
        return Ok(0);
    }
    let rows = on_keys(|| {
        sql::write(
            &format!(
                "SELECT o.order_key, o.order_number FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 \
                 AND o.order_key = ANY ($2) AND {KEPT} AND {SINCE} + $3::interval <= pg_catalog.now() FOR UPDATE OF o SKIP LOCKED"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&past),
                Arg::Text(Some(&plan.document.archive_for)),
            ],
        )
    })?;
    let orders = rows
        .iter()
        .map(|r| {
            Ok(Ended {
                order_key: r.string(0)?,
                order_number: r.owned(1)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let count = orders.len();
    if count > 0 {
        end(plan, keys, orders, Why::Over)?;
    }
    Ok(count)
}

/// The first orders whose archive is past its time. What comes later was redacted later, so that a look at the first says
/// whether there is any.
///
/// # Errors
/// Errors of the server.
pub fn past(policy: &str, archive_for: &str, limit: i64) -> Result<Vec<String>> {
    let rows = act_as(Identity::Extension, OWN_PATH, IN_ORDER, || {
        sql::read(
            &format!(
                "SELECT s.order_key FROM (SELECT o.order_key, {SINCE} AS since FROM amazon_pii.order_state o \
                    WHERE o.policy = $1 AND {KEPT} ORDER BY {SINCE} LIMIT $3) AS s WHERE s.since + $2::interval <= pg_catalog.now()"
            ),
            &[Arg::Text(Some(policy)), Arg::Text(Some(archive_for)), Arg::Int(limit)],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}
