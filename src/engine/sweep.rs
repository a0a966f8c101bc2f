//! What triggers could not see: keys they could only note, existing orders at the first enabling, changes made while
//! triggers were off. In slices, each a transaction of its own.

use super::due::Clock;
use super::flag;
use super::plan::Plan;
use super::state;
use super::walk::{self, FIRST, Values, key_parts, key_text};
use crate::domain::policy::Stale;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// Orders in one slice.
const SLICE: i64 = 2000;

/// Flags what triggers have noted by key alone. Returns how many orders are new.
///
/// # Errors
/// Errors of the server or of the owner's expressions; the notes stay then.
pub fn touched(plan: &Plan) -> Result<i64> {
    let mut flagged = 0;
    loop {
        let notes = as_extension(|| {
            sql::write(
                "DELETE FROM amazon_pii.touched WHERE touched_id IN (SELECT touched_id FROM amazon_pii.touched \
                 WHERE policy = $1 ORDER BY touched_id LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING entry, row_key",
                &[Arg::Text(Some(&plan.policy)), Arg::Int(SLICE)],
            )
        })?;
        if notes.is_empty() {
            return Ok(flagged);
        }
        for (index, entry) in plan.entries.iter().enumerate() {
            let mut keys: Vec<Values> = Vec::new();
            for note in &notes {
                if note.str(0)? == entry.alias
                    && let Some(key) = note.text(1)?
                {
                    keys.push(key_parts(key)?);
                }
            }
            if keys.is_empty() {
                continue;
            }
            if entry.parent.is_none() {
                let facts = flag::by_keys(plan, &keys)?;
                settle_failed(plan, &keys, &facts)?;
                flagged += flag::upsert(plan, &facts, "import", true)?;
            } else {
                let links = walk::select_all(&entry.on_child);
                let starts = walk::by_key(plan, &plan.tables[entry.table], &keys, &links)?
                    .into_iter()
                    .map(|f| Ok((f.input, f.row.texts(FIRST..FIRST + links.len())?)))
                    .collect::<Result<Vec<_>>>()?;
                flag::linked_changed(plan, &orders_above(plan, index, starts)?)?;
            }
        }
    }
}

/// Rows that could not be evaluated at import were flagged as failed by their key: now it is known which are orders of
/// Amazon's, and the others are dropped.
fn settle_failed(plan: &Plan, keys: &[Values], facts: &[flag::OrderFact]) -> Result<()> {
    let all = keys.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let known: Vec<&str> = facts.iter().map(|f| f.key_text.as_str()).collect();
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.order_state WHERE policy = $1 AND order_key = ANY ($2) AND status = 'failed' \
             AND flagged_by = 'failed' AND order_key <> ALL ($3)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&all), Arg::texts(&known)],
        )?;
        sql::execute(
            "UPDATE amazon_pii.order_state SET status = 'flagged', flagged_by = 'import', last_error = NULL, next_attempt_at = NULL \
             WHERE policy = $1 AND order_key = ANY ($2) AND status = 'failed' AND flagged_by = 'failed'",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&known)],
        )
    })?;
    Ok(())
}

/// The keys of the orders that rows of a linked entry belong to.
///
/// # Errors
/// As [`walk::up`].
pub fn orders_above(plan: &Plan, entry: usize, links: Vec<(usize, Values)>) -> Result<Vec<Values>> {
    let select = plan.orders().key_list();
    let mut orders = walk::up(plan, entry, links, &select, None)?
        .into_iter()
        .map(|f| f.row.texts(FIRST..FIRST + select.len()))
        .collect::<Result<Vec<_>>>()?;
    orders.sort();
    orders.dedup();
    Ok(orders)
}

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

/// Does the next slice of a pass that is due or under way; `None` when there is none. Returns how many orders are new.
///
/// # Errors
/// Errors of the server or of the owner's expressions; the pass goes on there with the next cycle.
pub fn slice(plan: &Plan, clock: &Clock) -> Result<Option<i64>> {
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
    let page = flag::page(plan, after.as_ref(), SLICE)?;
    let flagged = flag::upsert(plan, &page.facts, "sweep", false)?;
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
    Ok(Some(flagged))
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
