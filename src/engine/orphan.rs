//! The customers that orders were imported with before they got the generic one, and what hangs on them: records of their orders,
//! although no link leads there.

mod apart;
mod noted;

use std::collections::{HashMap, HashSet};

pub use apart::{Apart, Place, Rows};
pub use noted::orders_of;

use super::alive::User;
use super::assign;
use super::due::{Clock, Due};
use super::gather::{self, LiveCell, LiveRecord, Start};
use super::plan::{Plan, Table};
use super::records::{Listed, RecordList};
use super::walk::{Values, key_parts, key_text};
use crate::domain::policy::Export;
use crate::domain::treatment::Outcome;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;

/// Orphans that one step settles.
const STEP: i64 = 1000;

/// An order that an orphan belongs to.
struct Order {
    key: String,
    redacted: bool,
    records: RecordList,
}

/// The entries that the generic customer is reached by, and with it what an order was imported with.
fn tops(plan: &Plan) -> Vec<usize> {
    let mut tops: Vec<usize> = plan.generic.iter().map(|(entry, _)| *entry).collect();
    tops.sort_unstable();
    tops.dedup();
    tops
}

/// Makes what triggers noted records of their orders, those of redacted orders due in a cycle with this clock; whether there was
/// anything to list, and what went wrong with one of them, which waits then.
///
/// # Errors
/// Errors of the server. The generic customer is gone.
pub fn settle(plan: &Plan, clock: &Clock) -> Result<(bool, Option<Error>)> {
    if let (Some(assign), Some(customer)) = (&plan.assign, &plan.customer)
        && !assign::exists(plan, customer, &assign.to)?
    {
        return Err(Error::undefined(format!(
            "orders.assign_customer: there is no customer {}",
            assign.to
        )));
    }
    let (mut any, mut trouble, mut alone) = (false, None, 0);
    loop {
        // After a failure one by one, so that a bad row keeps no other from being listed.
        let limit = if alone > 0 { 1 } else { STEP };
        match subtransaction(|| step(plan, clock, limit)) {
            Ok(None) => return Ok((any, trouble)),
            Ok(Some(listed)) => any |= listed,
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if limit > 1 => {
                alone = STEP;
                trouble = Some(e);
            }
            Err(e) => {
                put_off(plan, 1)?;
                trouble = Some(e);
            }
        }
        alone = (alone - 1).max(0);
    }
}

/// The next notes wait for an hour; returns how many.
fn put_off(plan: &Plan, limit: i64) -> Result<u64> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.orphan SET next_attempt_at = pg_catalog.now() + '1 hour'::interval WHERE orphan_id IN ( \
                SELECT orphan_id FROM amazon_pii.orphan WHERE policy = $1 AND record_key IS NULL AND next_attempt_at <= pg_catalog.now() \
                ORDER BY orphan_id LIMIT $2 FOR UPDATE SKIP LOCKED)",
            &[Arg::Text(Some(&plan.policy)), Arg::Int(limit)],
        )
    })
}

/// Whether some notes led to rows; `None` when there are no more notes.
fn step(plan: &Plan, clock: &Clock, limit: i64) -> Result<Option<bool>> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT orphan_id, order_key, order_number, link FROM amazon_pii.orphan WHERE policy = $1 AND record_key IS NULL \
             AND next_attempt_at <= pg_catalog.now() ORDER BY orphan_id LIMIT $2 FOR UPDATE SKIP LOCKED",
            &[Arg::Text(Some(&plan.policy)), Arg::Int(limit)],
        )
    })?;
    let tops = tops(plan);
    if rows.is_empty() || tops.is_empty() {
        return Ok(None);
    }
    let (mut keys, mut numbers, mut links) = (Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        keys.push(row.string(1)?);
        numbers.push(row.owned(2)?);
        links.push(key_parts(row.str(3)?)?);
    }
    let mut orders = orders(plan, &keys, &numbers)?;
    // An upsert by another key than the one with which it came is known by its number.
    let of = |i: usize| {
        orders
            .0
            .get(&keys[i])
            .or_else(|| orders.1.get(numbers[i].as_deref()?))
            .copied()
    };
    let of: Vec<Option<usize>> = (0..rows.len()).map(of).collect();
    let found = below(plan, &tops, &links)?;
    let (mut done, mut open, mut new) = (Vec::new(), Vec::new(), Vec::new());
    for (i, row) in rows.iter().enumerate() {
        let is_generic = || tops.iter().any(|top| assign::is_generic(plan, *top, &links[i]));
        match of[i] {
            Some(order) if !found[i].is_empty() || is_generic() => {
                done.push(row.int(0)?);
                for (listed, alone) in &found[i] {
                    if !orders.2[order].records.lists(&listed.0, &listed.1) {
                        orders.2[order].records.put(listed.clone());
                    }
                    new.push(New {
                        order,
                        listed,
                        apart: *alone && at_once(plan) && !orders.2[order].redacted,
                    });
                }
            }
            // The order, or the customer, may be inserted yet; or somebody has the order locked.
            _ => open.push(row.int(0)?),
        }
    }
    write(plan, clock, &orders.2, &new)?;
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.orphan WHERE orphan_id = ANY ($1)",
            &[Arg::Ints(done)],
        )?;
        // It was not inserted after all: nobody will ask for it.
        sql::execute(
            "DELETE FROM amazon_pii.orphan WHERE orphan_id = ANY ($1) AND noted_at < pg_catalog.now() - '7 days'::interval",
            &[Arg::Ints(open.clone())],
        )?;
        sql::execute(
            "UPDATE amazon_pii.orphan SET next_attempt_at = pg_catalog.now() \
                + GREATEST('1 minute'::interval, LEAST('1 hour'::interval, pg_catalog.now() - noted_at)) WHERE orphan_id = ANY ($1)",
            &[Arg::Ints(open)],
        )
    })?;
    Ok(Some(!new.is_empty()))
}

/// What was noted since this cycle began, again and again, waits for an hour; whether there was anything.
///
/// # Errors
/// Errors of the server.
pub fn postpone(plan: &Plan) -> Result<bool> {
    Ok(put_off(plan, i64::MAX)? > 0)
}

/// Orphans of some orders that were to wait need not any longer.
///
/// # Errors
/// Errors of the server.
pub fn hurry(plan: &Plan, orders: &[String]) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.orphan SET next_attempt_at = '-infinity' WHERE policy = $1 AND order_key = ANY ($2) AND apart = 'due'",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
        )
    })?;
    Ok(())
}

/// Whether orphans go before their orders. What waits for an export does as a whole.
fn at_once(plan: &Plan) -> bool {
    plan.assign.as_ref().is_some_and(|a| a.orphans_at_once) && plan.document.export != Some(Export::Require)
}

/// Orders by their keys and by their numbers, as positions in a list.
type Known = (HashMap<String, usize>, HashMap<String, usize>, Vec<Order>);

fn orders(plan: &Plan, keys: &[String], numbers: &[Option<String>]) -> Result<Known> {
    let rows = on_keys(|| {
        let numbered = sql::write(
            "SELECT o.order_key FROM amazon_pii.order_state AS o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_number = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::opt_texts(numbers)],
        )?;
        let mut all = keys.to_vec();
        for row in &numbered {
            all.push(row.string(0)?);
        }
        sql::write(
            "SELECT o.order_key, o.order_number, o.redacted_version IS NOT NULL, o.records FROM amazon_pii.order_state AS o \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) FOR UPDATE SKIP LOCKED",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&all)],
        )
    })?;
    let mut out: Known = Default::default();
    for row in &rows {
        out.0.insert(row.string(0)?, out.2.len());
        if let Some(number) = row.owned(1)? {
            out.1.insert(number, out.2.len());
        }
        out.2.push(Order {
            key: row.string(0)?,
            redacted: row.bool(2)?,
            records: RecordList::parse(row.text(3)?)?,
        });
    }
    Ok(out)
}

/// A record that an order is to list.
struct New<'a> {
    /// Position in the list of orders.
    order: usize,
    listed: &'a Listed,
    /// To be redacted at once.
    apart: bool,
}

/// For each link the rows that it leads to, and what hangs on them and may hold personal data; and whether a row may go alone: none
/// does that has a date of its own, or hangs on one that has, or that would take along what hangs on it.
fn below(plan: &Plan, tops: &[usize], links: &[Values]) -> Result<Vec<Vec<(Listed, bool)>>> {
    let starts = links.iter().enumerate();
    let starts = starts.flat_map(|(i, link)| tops.iter().map(move |top| (i, *top, link.clone())));
    let reached = gather::reach(plan, links.len(), Start::Links(starts.collect()))?;
    let mut out: Vec<Vec<(Listed, bool)>> = links.iter().map(|_| Vec::new()).collect();
    for record in &reached.records {
        let entry = &plan.entries[record.entry];
        let table = &plan.tables[record.table];
        // One that is clean is told when it is written to, the customer itself aside.
        if entry.parent != Some(0) && table.files.is_none() && !may_hold(table, record) {
            continue;
        }
        let dated = |e: &usize| plan.entries[*e].not_before.is_some();
        let carries = |of: &usize| plan.entries[*of].table == record.table;
        let carries = table.delete && plan.entries.iter().any(|e| e.parent.as_ref().is_some_and(carries));
        let alone = !carries && !plan.path(record.entry).iter().any(dated);
        out[record.order].push((
            Listed(
                table.archived_as.clone(),
                record.key_text.clone(),
                entry.alias.clone(),
                0,
            ),
            alone,
        ));
    }
    Ok(out)
}

/// Whether a cell of a row holds personal data, or may.
fn may_hold(table: &Table, record: &LiveRecord) -> bool {
    let holds = |(i, cell): (usize, &Option<LiveCell>)| {
        let Some(cell) = cell else { return false };
        match table.treat(i, cell.value.as_deref(), &record.key) {
            Ok(Some(Outcome::Keep)) => false,
            Ok(Some(Outcome::Sql)) => cell.computed != cell.value,
            _ => true,
        }
    };
    record.cells.iter().enumerate().any(holds)
}

/// Policy, orders, tables and keys, as the first parameters of a statement.
fn places<'a>(plan: &'a Plan, orders: &'a [Order], list: impl Iterator<Item = &'a New<'a>> + Clone) -> [Arg<'a>; 4] {
    [
        Arg::Text(Some(&plan.policy)),
        Arg::Texts(list.clone().map(|n| Some(orders[n.order].key.as_str())).collect()),
        Arg::Texts(list.clone().map(|n| Some(n.listed.0.as_str())).collect()),
        Arg::Texts(list.map(|n| Some(n.listed.1.as_str())).collect()),
    ]
}

/// Lists new records. Those of an order that is redacted have come back; one that is gone is there again until they are done.
fn write(plan: &Plan, clock: &Clock, orders: &[Order], new: &[New<'_>]) -> Result<()> {
    if new.is_empty() {
        return Ok(());
    }
    let policy = Arg::Text(Some(&plan.policy));
    let mut touched: Vec<usize> = new.iter().map(|n| n.order).collect();
    touched.sort_unstable();
    touched.dedup();
    let lists: Vec<Option<String>> = touched.iter().map(|i| orders[*i].records.text()).collect();
    let keys: Vec<&str> = touched.iter().map(|i| orders[*i].key.as_str()).collect();
    let all = places(plan, orders, new.iter());
    let back = places(plan, orders, new.iter().filter(|n| orders[n.order].redacted));
    let apart = Arg::Texts(new.iter().map(|n| n.apart.then_some("due")).collect());
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state AS o SET records = n.r, \
                status = CASE o.status WHEN 'gone' THEN 'redacted' ELSE o.status END, \
                next_due_at = CASE WHEN o.status IN ('redacted', 'gone') THEN $4::timestamptz ELSE o.next_due_at END \
             FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (k, r) WHERE o.policy = $1 AND o.order_key = n.k",
            &[
                policy,
                Arg::texts(&keys),
                Arg::opt_texts(&lists),
                Arg::Text(Some(&clock.now)),
            ],
        )?;
        sql::execute(
            "INSERT INTO amazon_pii.orphan AS r (policy, order_key, table_name, record_key, apart) \
             SELECT DISTINCT ON (o, t, k) $1, o, t, k, a FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), \
                pg_catalog.unnest($5)) AS n (o, t, k, a) ORDER BY o, t, k, a NULLS FIRST \
             ON CONFLICT (record_key, table_name, policy, order_key) WHERE record_key IS NOT NULL \
                DO UPDATE SET apart = EXCLUDED.apart, next_attempt_at = '-infinity' WHERE r.apart = 'done'",
            &[all.as_slice(), &[apart]].concat(),
        )?;
        sql::execute(
            "INSERT INTO amazon_pii.record_state (policy, order_key, table_name, record_key, status) \
             SELECT DISTINCT $1, o, t, k, 'archived' FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (o, t, k) \
             ON CONFLICT (policy, order_key, table_name, record_key) DO UPDATE SET status = 'archived' \
             WHERE amazon_pii.record_state.status = 'gone'",
            &back,
        )
    })?;
    Ok(())
}

/// Which of the orders that were imported with a row.
#[derive(Clone, Copy)]
pub enum Imported<'a> {
    All,
    /// Those that have not let go of it.
    Needing,
    /// Of these, all but those that let go of it together.
    Others(&'a Rows),
}

/// The orders that were imported with one of these rows, that many at most of each: no link leads from them to it any more, and
/// still they use it. Rows of which there may be more are added to `cut`.
///
/// # Errors
/// Errors of the server.
pub fn users(
    plan: &Plan,
    table: usize,
    rows: &[Values],
    limit: Option<u32>,
    which: Imported<'_>,
    cut: &mut HashSet<usize>,
) -> Result<Vec<User>> {
    if plan.generic.is_empty() {
        return Ok(Vec::new());
    }
    let keys = rows.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let archived_as = &plan.tables[table].archived_as;
    let (needing, together): (&str, Vec<String>) = match which {
        Imported::All => ("true", Vec::new()),
        Imported::Needing => (NEEDING, Vec::new()),
        Imported::Others(apart) => (
            NEEDING,
            keys.iter().map(|key| apart.together(archived_as, key)).collect(),
        ),
    };
    let found = on_keys(|| {
        sql::read(
            // ident-ok: made of constants.
            &format!(
                "SELECT n.i - 1, r.order_key, o.order_key IS NOT NULL, r.kept FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($5)) \
                    WITH ORDINALITY AS m (k, t, i) CROSS JOIN LATERAL (SELECT m.k, m.t::pg_catalog.jsonb, m.i OFFSET 0) AS n (k, t, i) \
                 CROSS JOIN LATERAL ((SELECT r.order_key, false FROM amazon_pii.orphan AS r WHERE r.policy = $1 AND r.table_name = $2 \
                        AND r.record_key = n.k AND {needing} AND (n.t IS NULL OR NOT n.t OPERATOR(pg_catalog.?) r.order_key) \
                        ORDER BY r.orphan_id DESC LIMIT $4) \
                    UNION ALL SELECT s.order_key, true FROM amazon_pii.record_state AS s WHERE s.policy = $1 AND s.table_name = $2 \
                        AND s.record_key = n.k AND s.status = 'retrieved') AS r (order_key, kept) \
                 LEFT JOIN amazon_pii.order_state AS o ON o.policy = $1 AND o.order_key = r.order_key AND o.status <> 'gone'"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(archived_as)),
                Arg::texts(&keys),
                Arg::Int(limit.map_or(i64::MAX, i64::from)),
                Arg::texts(&together),
            ],
        )
    })?;
    let mut out = Vec::new();
    let mut counts = vec![0; rows.len()];
    for row in &found {
        let at = usize::try_from(row.int(0)?).unwrap_or(usize::MAX);
        counts[at] += u32::from(!row.bool(3)?);
        if row.bool(2)? {
            out.push((at, row.string(1)?, true));
        }
    }
    cut.extend((0..rows.len()).filter(|i| limit.is_some_and(|limit| counts[*i] >= limit)));
    Ok(out)
}

/// The condition that an order needs its row still; the index has no others.
const NEEDING: &str = "r.apart IS DISTINCT FROM 'done'";

/// Orders that are redacted let go of what they were imported with, unless it waits for others.
///
/// # Errors
/// Errors of the server.
pub fn let_go<'a>(plan: &Plan, orders: impl Iterator<Item = &'a Due>) -> Result<()> {
    let keys: Vec<&str> = orders.map(|d| d.order_key.as_str()).collect();
    if plan.generic.is_empty() || keys.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            // ident-ok: made of constants.
            &format!(
                "UPDATE amazon_pii.orphan r SET apart = 'done' WHERE r.policy IS NOT DISTINCT FROM $1 AND r.order_key = ANY ($2) \
                    AND r.record_key IS NOT NULL AND {NEEDING} AND NOT EXISTS (SELECT FROM amazon_pii.record_state AS s \
                        WHERE s.policy = r.policy AND s.order_key = r.order_key AND s.table_name = r.table_name \
                        AND s.record_key = r.record_key AND s.status IN ('waiting', 'retrieved'))"
            ),
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )
    })?;
    Ok(())
}
