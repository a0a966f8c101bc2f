//! Keys that triggers could only note: rows that logical replication applied, rows whose flagging failed or had to wait.
//! One that still fails waits by itself.

use super::again;
use super::flag;
use super::news::Tell;
use super::orphan;
use super::plan::Plan;
use super::state;
use super::sweep;
use super::walk::{self, FIRST, Values, key_parts, key_text};
use crate::domain::clock::backoff;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;

/// Notes in one step.
const STEP: i64 = 2000;

/// So many orders that somebody has locked are waited for, one after the other, before the next cycle goes on.
const PATIENCE: u32 = 3;

struct Note {
    id: i64,
    entry: String,
    /// None: which rows it was could not even be noted.
    key: Option<String>,
    attempts: u32,
}

/// Flags what was noted. Returns how many orders are new, and the error of a note that still fails. One whose order somebody's open
/// transaction has stays, for the next cycle.
///
/// # Errors
/// A cancel.
pub fn settle(plan: &Plan) -> Result<(i64, Option<Error>)> {
    let mut flagged = 0;
    let mut trouble = None;
    // What is noted anew meanwhile, for an order that somebody has locked, is the next cycle's.
    let Some(last) = last(plan)? else {
        return Ok((flagged, trouble));
    };
    let (mut after, mut locked) = (0, 0);
    loop {
        let notes = take(plan, after, last)?;
        let Some(note) = notes.last() else {
            return Ok((flagged, trouble));
        };
        after = note.id;
        if notes.iter().any(|n| n.key.is_none()) {
            sweep::request(plan)?;
        }
        match subtransaction(|| evaluate(plan, &notes.iter().collect::<Vec<_>>())) {
            Ok(new) => {
                flagged += new;
                forget(&notes.iter().collect::<Vec<_>>())?;
            }
            Err(e) if e.is_cancel() => return Err(e),
            Err(_) => {
                // One by one: a bad row, or one that somebody has, keeps no other waiting.
                for note in &notes {
                    match subtransaction(|| evaluate(plan, &[note])) {
                        Ok(new) => {
                            flagged += new;
                            forget(&[note])?;
                        }
                        Err(e) if e.is_cancel() => return Err(e),
                        Err(e) if e.is_lock() => {
                            locked += 1;
                            if locked == PATIENCE {
                                return Ok((flagged, trouble));
                            }
                        }
                        Err(e) => {
                            postpone(plan, note, &e)?;
                            trouble = Some(e);
                        }
                    }
                }
            }
        }
    }
}

fn last(plan: &Plan) -> Result<Option<i64>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.max(touched_id) FROM amazon_pii.touched WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    match rows.first() {
        Some(row) if row.text(0)?.is_some() => row.int(0).map(Some),
        _ => Ok(None),
    }
}

fn take(plan: &Plan, after: i64, last: i64) -> Result<Vec<Note>> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT touched_id, entry, row_key, attempts FROM amazon_pii.touched WHERE policy = $1 AND touched_id > $3 AND touched_id <= $4 \
             AND next_attempt_at <= pg_catalog.now() ORDER BY touched_id LIMIT $2 FOR UPDATE SKIP LOCKED",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Int(STEP),
                Arg::Int(after),
                Arg::Int(last),
            ],
        )
    })?;
    rows.iter()
        .map(|r| {
            Ok(Note {
                id: r.int(0)?,
                entry: r.string(1)?,
                key: r.owned(2)?,
                attempts: u32::try_from(r.int(3)?).unwrap_or(u32::MAX),
            })
        })
        .collect()
}

fn forget(notes: &[&Note]) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.touched WHERE touched_id = ANY ($1)",
            &[Arg::Ints(notes.iter().map(|n| n.id).collect())],
        )
    })?;
    Ok(())
}

fn postpone(plan: &Plan, note: &Note, error: &Error) -> Result<()> {
    let wait = backoff(note.attempts + 1).num_seconds();
    let failed = as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.touched SET attempts = attempts + 1, error = $2, \
                next_attempt_at = pg_catalog.now() + pg_catalog.make_interval(secs => $3::float8) WHERE touched_id = $1",
            &[Arg::Int(note.id), Arg::Text(Some(&error.stored())), Arg::Int(wait)],
        )?;
        if !note.entry.is_empty() {
            return Ok(Vec::new());
        }
        sql::write(
            "INSERT INTO amazon_pii.order_state AS o (policy, order_key, status, flagged_by, last_error, attempts, next_attempt_at) \
             SELECT $1, $2, 'failed', 'failed', $3, $5, pg_catalog.now() + pg_catalog.make_interval(secs => $4::float8) \
             WHERE $2::text IS NOT NULL ON CONFLICT (policy, order_key) DO UPDATE SET last_error = EXCLUDED.last_error, \
                attempts = EXCLUDED.attempts, next_attempt_at = EXCLUDED.next_attempt_at WHERE o.flagged_by = 'failed' \
             RETURNING o.order_key, o.xmax = 0",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(note.key.as_deref()),
                Arg::Text(Some(&error.stored())),
                Arg::Int(wait),
                Arg::Int(i64::from(note.attempts) + 1),
            ],
        )
    })?;
    let mut keys = Vec::new();
    for row in &failed {
        if row.bool(1)? {
            keys.push(row.string(0)?);
        }
    }
    state::announce_keys(&plan.policy, "failed", &keys)
}

/// Evaluates the rows of some notes, by every entry that reaches their table.
fn evaluate(plan: &Plan, notes: &[&Note]) -> Result<i64> {
    let mut flagged = 0;
    for (index, table) in plan.tables.iter().enumerate() {
        let mut keys: Vec<Values> = Vec::new();
        for note in notes {
            let noted = plan.entries.iter().find(|e| e.alias == note.entry).map(|e| e.table);
            if let (Some(key), true) = (&note.key, noted == Some(index)) {
                keys.push(key_parts(key)?);
            }
        }
        if keys.is_empty() {
            continue;
        }
        if index == 0 {
            let facts = flag::by_keys(plan, &keys)?;
            flagged += settle_failed(plan, &keys, &facts)?;
            // One that is up to date is left alone, whoever has it.
            flagged += flag::upsert(plan, &facts, "import", false, Tell::Now)?;
            again::look_again(plan, &keys.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?)?;
        }
        for (at, entry) in plan
            .entries
            .iter()
            .enumerate()
            .filter(|(_, e)| e.table == index && e.parent.is_some())
        {
            let links = walk::select_all(&entry.on_child);
            let starts = walk::by_key(plan, table, &keys, &links)?
                .into_iter()
                .map(|f| Ok((f.input, f.row.texts(FIRST..FIRST + links.len())?)))
                .collect::<Result<Vec<_>>>()?;
            again::linked_changed(plan, &orders_above(plan, at, starts)?, Tell::Now)?;
        }
    }
    Ok(flagged)
}

/// Rows that could not be evaluated at import were flagged as failed by their key: now it is known which are orders of
/// Amazon's, and the others are dropped. Returns how many are flagged now.
fn settle_failed(plan: &Plan, keys: &[Values], facts: &[flag::OrderFact]) -> Result<i64> {
    let all = keys.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let known: Vec<&str> = facts.iter().map(|f| f.key_text.as_str()).collect();
    let flagged = as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.order_state WHERE policy = $1 AND order_key = ANY ($2) AND status = 'failed' \
             AND flagged_by = 'failed' AND order_key <> ALL ($3)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&all), Arg::texts(&known)],
        )?;
        let rows = sql::write(
            // A trigger may have set its clock meanwhile, which is to start anew with its state.
            "UPDATE amazon_pii.order_state SET status = 'flagged', flagged_by = 'import', last_error = NULL, attempts = 0, \
                next_attempt_at = NULL, anchor_at = NULL WHERE policy = $1 AND order_key = ANY ($2) AND status = 'failed' AND flagged_by = 'failed' \
             RETURNING order_key",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&known)],
        )?;
        rows.iter().map(|r| r.string(0)).collect::<Result<Vec<_>>>()
    })?;
    state::announce_keys(&plan.policy, "flagged", &flagged)?;
    Ok(i64::try_from(flagged.len()).unwrap_or(i64::MAX))
}

/// The keys of the orders that rows of a linked entry belong to.
///
/// # Errors
/// As [`walk::up`].
pub fn orders_above(plan: &Plan, entry: usize, links: Vec<(usize, Values)>) -> Result<Vec<Values>> {
    let former = orphan::orders_of(plan, entry, &links)?;
    if plan.links_are_keys(entry) {
        let mut orders: Vec<Values> = links.into_iter().map(|(_, link)| link).collect();
        orders.retain(|key| key.iter().all(Option::is_some));
        orders.sort();
        orders.dedup();
        return Ok(orders);
    }
    let select = plan.orders().key_list();
    let mut orders = walk::up(plan, entry, links, &select, None)?
        .into_iter()
        .map(|f| f.row.texts(FIRST..FIRST + select.len()))
        .collect::<Result<Vec<_>>>()?;
    orders.extend(former);
    orders.sort();
    orders.dedup();
    Ok(orders)
}
