//! What triggers could not see: keys they could only note, existing orders at the first enabling, changes made while
//! triggers were off. In slices, each a transaction of its own.

use super::due::Clock;
use super::flag;
use super::news::Tell;
use super::plan::Plan;
use super::state;
use super::walk::{Values, key_parts, key_text};
use crate::domain::policy::Stale;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;

/// Orders in one slice.
const SLICE: i64 = 2000;

/// Asks for a full pass now, whatever the last one's date.
///
/// # Errors
/// Errors of the server.
pub fn request(plan: &Plan) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET sweep_started_at = pg_catalog.clock_timestamp(), sweep_after = NULL, rechecked_at = NULL \
             WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    Ok(())
}

/// What a slice did.
pub struct Slice {
    /// Orders that are new.
    pub flagged: i64,
    /// The error of a row that could not be evaluated.
    pub trouble: Option<Error>,
}

/// Rows of a slice that may fail; when more do, it is the policy that is wrong, not a row.
const BAD_ROWS: usize = 20;

/// The orders of the next slice. When they cannot be evaluated together they are one by one, and those that fail are
/// noted: a bad row keeps no other from being flagged.
fn page(plan: &Plan, after: Option<&Values>) -> Result<(flag::Page, Option<Error>)> {
    let error = match subtransaction(|| flag::page(plan, after, SLICE)) {
        Ok(page) => return Ok((page, None)),
        Err(e) if e.is_cancel() || e.is_lock() => return Err(e),
        Err(e) => e,
    };
    let (keys, next) = flag::page_of_keys(plan, flag::End::First, after, SLICE)?;
    let (mut facts, mut bad) = (Vec::new(), Vec::new());
    for key in keys {
        match subtransaction(|| flag::by_keys(plan, std::slice::from_ref(&key))) {
            Ok(found) => facts.extend(found),
            Err(e) if e.is_cancel() || e.is_lock() || bad.len() >= BAD_ROWS => return Err(e),
            Err(_) => bad.push(key_text(&key)?),
        }
    }
    as_extension(|| {
        sql::execute(
            "INSERT INTO amazon_pii.touched (policy, entry, row_key, error) SELECT $1, '', k, $3 FROM pg_catalog.unnest($2) AS k \
             WHERE NOT EXISTS (SELECT FROM amazon_pii.touched t WHERE t.policy = $1 AND t.entry = '' AND t.row_key = k)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&bad),
                Arg::Text(Some(&error.stored())),
            ],
        )
    })?;
    Ok((flag::Page { facts, next }, Some(error)))
}

/// Does the next slice of a pass that is due or under way; `None` when there is none. Returns how many orders are new.
///
/// # Errors
/// Errors of the server or of the owner's expressions; the pass goes on there with the next cycle.
pub fn slice(plan: &Plan, clock: &Clock) -> Result<Option<Slice>> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT COALESCE(sweep_started_at > swept_at, sweep_started_at IS NOT NULL), \
                    swept_at IS NULL OR swept_at <= $2::timestamptz - '1 day'::interval, sweep_after, rechecked_at IS NULL \
             FROM amazon_pii.policy WHERE policy = $1 FOR UPDATE",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(&clock.now))],
        )
    })?;
    let row = rows
        .first()
        .ok_or_else(|| Error::undefined(format!("policy \"{}\" was dropped", plan.policy)))?;
    let (under_way, due) = (row.bool(0)?, row.bool(1)?);
    if !under_way && !due {
        return Ok(None);
    }
    let after = match row.text(2)? {
        Some(text) if under_way => Some(key_parts(text)?),
        _ => None,
    };
    let (page, trouble) = page(plan, after.as_ref())?;
    let flagged = flag::upsert(plan, &page.facts, "sweep", false, Tell::Now)?;
    let last = page.next.as_ref().map(|k| key_text(k)).transpose()?;
    let finished = last.is_none();
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET sweep_started_at = CASE WHEN $2 THEN sweep_started_at ELSE pg_catalog.clock_timestamp() END, \
                sweep_after = CASE WHEN $3 THEN NULL ELSE $4 END, \
                swept_at = CASE WHEN $3 THEN pg_catalog.clock_timestamp() ELSE swept_at END \
             WHERE policy = $1",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Bool(under_way),
                Arg::Bool(finished),
                Arg::Text(last.as_deref()),
            ],
        )
    })?;
    if finished {
        recheck(plan, row.bool(3)?, clock)?;
        trim()?;
    }
    Ok(Some(Slice { flagged, trouble }))
}

/// Cycles of more than thirteen months ago are nobody's business any more.
fn trim() -> Result<()> {
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.run WHERE started_at < pg_catalog.now() - '13 months'::interval",
            &[],
        )
    })?;
    Ok(())
}

/// Marks redacted orders to be looked at again by this very cycle: a seventh of them with each daily pass, or all.
fn recheck(plan: &Plan, all: bool, clock: &Clock) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "WITH part AS (SELECT o.order_key FROM amazon_pii.order_state o, amazon_pii.policy p \
                WHERE o.policy = $1 AND p.policy = $1 AND o.status = 'redacted' AND ($2 OR p.recheck_after IS NULL OR o.order_key > p.recheck_after) \
                ORDER BY o.order_key LIMIT CASE WHEN $2 THEN NULL ELSE (SELECT pg_catalog.count(*) / 7 + 1 FROM amazon_pii.order_state \
                    WHERE policy = $1 AND status = 'redacted') END), \
             marked AS (UPDATE amazon_pii.order_state o SET next_due_at = $3::timestamptz FROM part \
                WHERE o.policy = $1 AND o.order_key = part.order_key AND o.next_due_at IS NULL) \
             UPDATE amazon_pii.policy SET rechecked_at = pg_catalog.clock_timestamp(), recheck_after = CASE WHEN $2 THEN NULL ELSE \
                (SELECT pg_catalog.max(order_key) FROM part) END WHERE policy = $1",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Bool(all),
                Arg::Text(Some(&clock.now)),
            ],
        )
    })?;
    Ok(())
}

/// Orders whose clock never started although they were placed long ago: announced, or due at once where the policy
/// says so.
///
/// # Errors
/// Errors of the server.
pub fn stale(plan: &Plan) -> Result<()> {
    if plan.placed.is_none() || plan.document.orders.stale_after.is_none() {
        return Ok(());
    }
    let redact = matches!(plan.document.orders.stale, Stale::Redact);
    let keys = as_extension(|| {
        let statement = if redact {
            "UPDATE amazon_pii.order_state SET status = 'scheduled', archive_due_at = stale_at, redact_due_at = stale_at, \
                next_due_at = stale_at WHERE policy = $1 AND status = 'flagged' AND stale_at <= pg_catalog.now() RETURNING order_key"
        } else {
            "SELECT order_key FROM amazon_pii.order_state WHERE policy = $1 AND status = 'flagged' AND stale_at <= pg_catalog.now()"
        };
        let rows = sql::write(statement, &[Arg::Text(Some(&plan.policy))])?;
        rows.iter().map(|r| r.string(0)).collect::<Result<Vec<_>>>()
    })?;
    state::announce_keys(&plan.policy, "stale", &keys)
}
