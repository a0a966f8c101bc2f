//! Redacted orders are looked at again, a seventh of them with each daily pass: triggers can be disabled, backups restored.
//! The state table is read page by page, so that a step costs the same however many orders there are.

use pgrx::pg_sys;

use super::Slice;
use crate::engine::due::Clock;
use crate::engine::flag;
use crate::engine::news::Tell;
use crate::engine::plan::Plan;
use crate::engine::walk::key_parts;
use crate::pg::error::Result;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg, Row};

/// Pages of the state table that are read at once.
const STEP: i64 = 256;

/// How often one step reads so many where it finds nothing.
const EMPTY_STEPS: u32 = 16;

/// After a pass: as many pages as are to be read, a seventh of them, or all.
pub(super) fn begin(plan: &Plan, all: bool) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET rechecked_at = pg_catalog.clock_timestamp(), \
                recheck_page = CASE WHEN $2 THEN 0 ELSE recheck_page END, \
                recheck_left = (SELECT CASE WHEN $2 THEN s.pages ELSE (s.pages + 6) / 7 END FROM (SELECT \
                    pg_catalog.pg_relation_size('amazon_pii.order_state') / pg_catalog.current_setting('block_size')::int8) AS s (pages)) \
             WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy)), Arg::Bool(all)],
        )
    })?;
    Ok(())
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
    let (mut redacted, mut gone) = (Vec::new(), Vec::new());
    for row in &found {
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
    Ok(Some(Slice {
        flagged: flag::upsert(plan, &back, "sweep", false, Tell::Now)?,
        ..Slice::default()
    }))
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
            "SELECT o.order_key, o.status = 'gone' FROM amazon_pii.order_state AS o WHERE o.ctid >= $2 AND o.ctid < $3 AND o.policy = $1 \
                AND (o.status = 'redacted' AND o.next_due_at IS NULL OR o.status = 'gone')",
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
