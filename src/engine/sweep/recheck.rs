//! Redacted orders are looked at again, a seventh of them with each daily pass: triggers can be disabled, backups restored.
//! The state table is read page by page, so that a step costs the same however many orders there are. Where hardly any order
//! is redacted, that would be to look for them among all others: an index has them.

use pgrx::pg_sys;

use super::Slice;
use crate::engine::due::Clock;
use crate::engine::flag;
use crate::engine::news::Tell;
use crate::engine::plan::Plan;
use crate::engine::walk::key_parts;
use crate::pg::error::Result;
use crate::pg::identity::{Identity, OWN_PATH, act_as, as_extension, on_keys};
use crate::pg::sql::{self, Arg, Row};

/// Pages of the state table that are read at once.
const STEP: i64 = 256;

/// How often one step reads so many where it finds nothing.
const EMPTY_STEPS: u32 = 16;

/// So many orders are looked at in one step where that is all there are.
const FEW: i64 = 10_000;

/// Orders that are to be looked at again, over `o`: a redacted one that is due is looked at anyway.
const ASIDE: &str = "(o.status = 'redacted' AND o.next_due_at IS NULL OR o.status = 'gone')";

/// After a pass: as many pages as are to be read, a seventh of them, or all. None where no order is redacted or deleted; few
/// that are to be looked at now are, at once.
pub(super) fn begin(plan: &Plan, clock: &Clock, all: bool) -> Result<i64> {
    let few = few(plan, if all { FEW } else { 0 })?;
    let flagged = match &few {
        Some(rows) => look_at(plan, clock, rows)?,
        None => 0,
    };
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET rechecked_at = pg_catalog.clock_timestamp(), \
                recheck_page = CASE WHEN $2 THEN 0 ELSE recheck_page END, \
                recheck_left = (SELECT CASE WHEN $3 THEN 0 WHEN $2 THEN s.pages ELSE (s.pages + 6) / 7 END FROM (SELECT \
                    pg_catalog.pg_relation_size('amazon_pii.order_state') / pg_catalog.current_setting('block_size')::int8) AS s (pages)) \
             WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy)), Arg::Bool(all), Arg::Bool(few.is_some())],
        )
    })?;
    Ok(flagged)
}

/// All redacted and deleted orders, unless these are more than so many: `order_state_kept` has those that have an archive,
/// `order_state_archive_held` those whose archive is held, `order_state_purged` the others.
fn few(plan: &Plan, most: i64) -> Result<Option<Vec<Row>>> {
    let part = |condition: &str| {
        [
            "(SELECT o.order_key, o.status = 'gone', ",
            ASIDE,
            " FROM amazon_pii.order_state AS o WHERE o.policy = $1 AND o.status IN ('redacted', 'gone') AND ",
            condition,
            " LIMIT $2)",
        ]
        .concat()
    };
    let query = [
        part("o.purged_at IS NULL AND o.archive_held_until IS NULL"),
        part("o.purged_at IS NULL AND o.archive_held_until IS NOT NULL"),
        part("o.purged_at IS NOT NULL"),
    ]
    .join(" UNION ALL ");
    // One after the other, up to the last that is wanted.
    let pins = [("enable_seqscan", "off"), ("enable_bitmapscan", "off")];
    let rows = act_as(Identity::Extension, OWN_PATH, &pins, || {
        sql::read(&query, &[Arg::Text(Some(&plan.policy)), Arg::Int(most + 1)])
    })?;
    if rows.len() as i64 > most {
        return Ok(None);
    }
    let mut aside = Vec::new();
    for row in rows {
        if row.bool(2)? {
            aside.push(row);
        }
    }
    Ok(Some(aside))
}

/// Marks the redacted orders on the next pages to be looked at by this very cycle. `None` when all is done.
pub(super) fn step(plan: &Plan, clock: &Clock) -> Result<Option<Slice>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT p.recheck_left, CASE WHEN p.recheck_page < s.pages THEN p.recheck_page ELSE 0 END, s.pages \
             FROM amazon_pii.policy AS p, (SELECT pg_catalog.pg_relation_size('amazon_pii.order_state') \
                / pg_catalog.current_setting('block_size')::int8) AS s (pages) WHERE p.policy = $1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    let Some(row) = rows.first() else { return Ok(None) };
    let (mut left, mut page, pages) = (row.int(0)?, row.int(1)?, row.int(2)?);
    if left <= 0 {
        return Ok(None);
    }
    let (mut found, mut steps) = (Vec::new(), 0);
    while left > 0 && steps < EMPTY_STEPS && found.is_empty() {
        let end = page + left.min(STEP);
        found = on_pages(plan, page, end)?;
        left = (left - STEP).max(0);
        page = if end >= pages { 0 } else { end };
        steps += 1;
    }
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET recheck_left = $2, recheck_page = $3 WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy)), Arg::Int(left), Arg::Int(page)],
        )
    })?;
    Ok(Some(Slice {
        flagged: look_at(plan, clock, &found)?,
        ..Slice::default()
    }))
}

/// Redacted orders become due, deleted ones are looked for. Returns how many of these are back.
fn look_at(plan: &Plan, clock: &Clock, found: &[Row]) -> Result<i64> {
    let (mut redacted, mut gone) = (Vec::new(), Vec::new());
    for row in found {
        if row.bool(1)? {
            gone.push(key_parts(row.str(0)?)?);
        } else {
            redacted.push(row.str(0)?);
        }
    }
    if !redacted.is_empty() {
        mark(plan, clock, &redacted)?;
    }
    // One that was deleted and came back while triggers were off looks to the sums as if it had never been away.
    let back = flag::by_keys(plan, &gone)?;
    flag::upsert(plan, &back, "sweep", false, Tell::Now)
}

fn mark(plan: &Plan, clock: &Clock, redacted: &[&str]) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state SET next_due_at = $3::timestamptz WHERE policy IS NOT DISTINCT FROM $1 AND order_key = ANY ($2) \
                AND status = 'redacted' AND next_due_at IS NULL",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(redacted),
                Arg::Text(Some(&clock.now)),
            ],
        )
    })?;
    Ok(())
}

/// The redacted and deleted orders on some pages: a part of the table by its place. It is our own, and an order that moves
/// meanwhile was just looked at.
fn on_pages(plan: &Plan, from: i64, to: i64) -> Result<Vec<Row>> {
    as_extension(|| {
        sql::read(
            &[
                "SELECT o.order_key, o.status = 'gone' FROM amazon_pii.order_state AS o WHERE o.ctid >= $2 AND o.ctid < $3 \
                    AND o.policy = $1 AND ",
                ASIDE,
            ]
            .concat(),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Typed(pg_sys::TIDOID, Some(&place(from))),
                Arg::Typed(pg_sys::TIDOID, Some(&place(to))),
            ],
        )
    })
}

/// Where a page begins.
fn place(page: i64) -> String {
    format!("({page},0)")
}
