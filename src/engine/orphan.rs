//! The customers that orders were imported with before they got the generic one, and what hangs on them: records of their orders,
//! although no link leads there.

mod apart;

use std::collections::{HashMap, HashSet};

pub use apart::{Apart, Place, Rows};

use super::alive::User;
use super::assign;
use super::due::Due;
use super::plan::{Customer, Plan};
use super::records::{Listed, RecordList};
use super::walk::{self, FIRST, Hop, Values, hop, key_parts, key_text, own_key, select_all};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};

/// Orphans that one step settles.
const STEP: i64 = 1000;

/// An order that an orphan belongs to.
struct Order {
    key: String,
    redacted: bool,
    records: RecordList,
}

/// Makes what triggers noted records of their orders; whether there was anything.
///
/// # Errors
/// Errors of the server or of the owners' expressions; the notes stay then. The generic customer is gone.
pub fn settle(plan: &Plan) -> Result<bool> {
    if let (Some(assign), Some(customer)) = (&plan.assign, &plan.customer)
        && !assign::exists(plan, customer, &assign.to)?
    {
        return Err(Error::undefined(format!(
            "orders.assign_customer: there is no customer {}",
            assign.to
        )));
    }
    let mut any = false;
    while step(plan)? {
        any = true;
    }
    Ok(any)
}

fn step(plan: &Plan) -> Result<bool> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT orphan_id, order_key, order_number, link FROM amazon_pii.orphan WHERE policy = $1 AND record_key IS NULL \
             AND next_attempt_at <= pg_catalog.now() ORDER BY orphan_id LIMIT $2 FOR UPDATE SKIP LOCKED",
            &[Arg::Text(Some(&plan.policy)), Arg::Int(STEP)],
        )
    })?;
    let Some(customer) = plan.customer.as_ref().filter(|_| !rows.is_empty()) else {
        return Ok(false);
    };
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
    let found = below(plan, customer, &links)?;
    let (mut done, mut open, mut new) = (Vec::new(), Vec::new(), Vec::new());
    for (i, row) in rows.iter().enumerate() {
        match of[i] {
            Some(order) => {
                done.push(row.int(0)?);
                let at_once = plan.assign.as_ref().is_some_and(|a| a.orphans_at_once) && !orders.2[order].redacted;
                for (_, listed, dated) in found.iter().filter(|(at, ..)| *at == i) {
                    if !orders.2[order].records.lists(&listed.0, &listed.1) {
                        orders.2[order].records.put(listed.clone());
                    }
                    new.push(New {
                        order,
                        listed,
                        apart: at_once && !dated,
                    });
                }
            }
            None => open.push(row.int(0)?),
        }
    }
    write(plan, &orders.2, &new)?;
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.orphan WHERE orphan_id = ANY ($1)",
            &[Arg::Ints(done)],
        )?;
        // The row was not inserted after all: nobody will ask for it.
        sql::execute(
            "DELETE FROM amazon_pii.orphan WHERE orphan_id = ANY ($1) AND noted_at < pg_catalog.now() - '7 days'::interval",
            &[Arg::Ints(open.clone())],
        )?;
        sql::execute(
            "UPDATE amazon_pii.orphan SET next_attempt_at = pg_catalog.now() + '1 hour'::interval WHERE orphan_id = ANY ($1)",
            &[Arg::Ints(open)],
        )
    })?;
    Ok(true)
}

/// Orders by their keys and by their numbers, as positions in a list.
type Known = (HashMap<String, usize>, HashMap<String, usize>, Vec<Order>);

fn orders(plan: &Plan, keys: &[String], numbers: &[Option<String>]) -> Result<Known> {
    let rows = on_keys(|| {
        sql::write(
            "SELECT o.order_key, o.order_number, o.redacted_version IS NOT NULL, o.records FROM amazon_pii.order_state AS o \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) \
             UNION SELECT o.order_key, o.order_number, o.redacted_version IS NOT NULL, o.records FROM amazon_pii.order_state AS o \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_number = ANY ($3)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(keys), Arg::opt_texts(numbers)],
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

/// The rows that these links lead to, and all that hangs on them, by the position of the link; and whether a row, or one above
/// it, may have a date of its own before which it must not be redacted.
fn below(plan: &Plan, customer: &Customer, links: &[Values]) -> Result<Vec<(usize, Listed, bool)>> {
    let mut out = Vec::new();
    let mut dated: Vec<bool> = plan.entries.iter().map(|e| e.not_before.is_some()).collect();
    let mut pending: Vec<Vec<(usize, Values)>> = plan.entries.iter().map(|_| Vec::new()).collect();
    pending[customer.entry] = links.iter().cloned().enumerate().collect();
    for index in 0..plan.entries.len() {
        let (origins, inputs): (Vec<usize>, Vec<Values>) = std::mem::take(&mut pending[index]).into_iter().unzip();
        let entry = &plan.entries[index];
        dated[index] |= index != customer.entry && entry.parent.is_some_and(|p| dated[p]);
        let table = &plan.tables[entry.table];
        let mut select = table.key_list();
        let mut children = Vec::new();
        for child in (0..plan.entries.len()).filter(|c| plan.entries[*c].parent == Some(index)) {
            let from = select.len();
            select.extend(select_all(&plan.entries[child].on_parent));
            children.push((child, FIRST + from..FIRST + select.len()));
        }
        for found in hop(plan, &Hop::into_entry(plan, entry, &select), &inputs)? {
            for (child, range) in &children {
                pending[*child].push((origins[found.input], found.row.texts(range.clone())?));
            }
            if !entry.cells.is_empty() {
                let key = key_text(&found.row.texts(FIRST..FIRST + table.key.len())?)?;
                out.push((
                    origins[found.input],
                    Listed(table.archived_as.clone(), key, entry.alias.clone(), 0),
                    dated[index],
                ));
            }
        }
    }
    Ok(out)
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

/// Lists new records. Those of an order that is redacted have come back.
fn write(plan: &Plan, orders: &[Order], new: &[New<'_>]) -> Result<()> {
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
                next_due_at = CASE WHEN o.status = 'redacted' THEN pg_catalog.now() ELSE o.next_due_at END \
             FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (k, r) WHERE o.policy = $1 AND o.order_key = n.k",
            &[policy.clone(), Arg::texts(&keys), Arg::opt_texts(&lists)],
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

/// The orders that were imported with one of these rows, that many at most of each: no link leads from them to it any more, and
/// still they use it. Rows of which there may be more are added to `cut`. Where `apart`, those are left out with which the row is
/// due by itself.
///
/// # Errors
/// Errors of the server.
pub fn users(
    plan: &Plan,
    table: usize,
    rows: &[Values],
    limit: Option<u32>,
    apart: bool,
    cut: &mut HashSet<usize>,
) -> Result<Vec<User>> {
    if plan.generic.is_empty() {
        return Ok(Vec::new());
    }
    let keys = rows.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let found = on_keys(|| {
        sql::read(
            "SELECT n.i - 1, r.order_key, o.order_key IS NOT NULL FROM pg_catalog.unnest($3) WITH ORDINALITY AS n (k, i) \
             CROSS JOIN LATERAL (SELECT r.order_key FROM amazon_pii.orphan AS r WHERE r.policy = $1 AND r.table_name = $2 \
                AND r.record_key = n.k AND r.apart IS DISTINCT FROM 'done' AND (NOT $5 OR r.apart IS NULL) \
                ORDER BY r.orphan_id DESC LIMIT $4) AS r \
             LEFT JOIN amazon_pii.order_state AS o ON o.policy = $1 AND o.order_key = r.order_key AND o.status <> 'gone'",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&plan.tables[table].archived_as)),
                Arg::texts(&keys),
                Arg::Int(limit.map_or(i64::MAX, i64::from)),
                Arg::Bool(apart),
            ],
        )
    })?;
    let mut out = Vec::new();
    let mut counts = vec![0; rows.len()];
    for row in &found {
        let at = usize::try_from(row.int(0)?).unwrap_or(usize::MAX);
        counts[at] += 1;
        if row.bool(2)? {
            out.push((at, row.string(1)?, true));
        }
    }
    cut.extend((0..rows.len()).filter(|i| limit.is_some_and(|limit| counts[*i] >= limit)));
    Ok(out)
}

/// Orders of a written row that are told at once; of more, the newest.
const TOLD: i64 = 50;

/// Of rows of an entry that were written, given by their links, the orders that were imported with them. What these rows
/// hold now has come back. What hangs on such a row is listed by the next cycle.
///
/// # Errors
/// Errors of the server.
pub fn orders_of(plan: &Plan, entry: usize, links: &[(usize, Values)]) -> Result<Vec<Values>> {
    if plan.generic.is_empty() || links.is_empty() {
        return Ok(Vec::new());
    }
    note_below(plan, entry, links)?;
    let table = &plan.tables[plan.entries[entry].table];
    if own_key(table, &plan.entries[entry]).is_none_or(|p| p.len() != table.key.len()) {
        return Ok(Vec::new());
    }
    let keys = links.iter().map(|(_, k)| key_text(k)).collect::<Result<Vec<_>>>()?;
    let found = on_keys(|| {
        sql::write(
            "WITH found AS MATERIALIZED (SELECT DISTINCT r.policy, r.order_key, r.table_name, r.record_key FROM pg_catalog.unnest($3) AS n (k) \
                CROSS JOIN LATERAL (SELECT * FROM amazon_pii.orphan AS r WHERE r.policy = $1 AND r.table_name = $2 AND r.record_key = n.k \
                    AND r.apart IS DISTINCT FROM 'done' ORDER BY r.orphan_id DESC LIMIT $4) AS r), \
             back AS (INSERT INTO amazon_pii.record_state (policy, order_key, table_name, record_key, status) \
                SELECT f.policy, f.order_key, f.table_name, f.record_key, 'archived' FROM found AS f JOIN amazon_pii.order_state AS o \
                    ON o.policy = f.policy AND o.order_key = f.order_key AND o.redacted_version IS NOT NULL ON CONFLICT DO NOTHING) \
             SELECT order_key FROM found",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&table.archived_as)),
                Arg::texts(&keys),
                Arg::Int(TOLD),
            ],
        )
    })?;
    found.iter().map(|r| key_parts(r.str(0)?)).collect()
}

/// Notes the newest order that was imported with a customer when something that hangs on this customer is written, or the customer
/// itself after it was redacted by itself. Rows of our own are inserted, and none is changed, so that nobody waits for the shop's
/// transaction.
fn note_below(plan: &Plan, entry: usize, links: &[(usize, Values)]) -> Result<()> {
    let Some(customer) = &plan.customer else { return Ok(()) };
    let to = customer.entry;
    let is_it = entry == to;
    if !is_it && !plan.path(entry).contains(&to) {
        return Ok(());
    }
    let top = &plan.entries[to];
    let table = &plan.tables[top.table];
    let mut select = table.key_list();
    select.extend(select_all(&top.on_child));
    let rows = if is_it {
        let inputs: Vec<Values> = links.iter().map(|(_, link)| link.clone()).collect();
        // By the values that lead into it, which may be those of another's.
        let into = Hop {
            types: &top.on_child_types,
            ..Hop::into_entry(plan, top, &select)
        };
        hop(plan, &into, &inputs)?
    } else {
        walk::up_to(plan, (entry, to), links.to_vec(), &select)?
    };
    let (mut keys, mut ways) = (Vec::new(), Vec::new());
    for found in rows {
        let key = FIRST + table.key.len();
        keys.push(key_text(&found.row.texts(FIRST..key)?)?);
        ways.push(key_text(&found.row.texts(key..FIRST + select.len())?)?);
    }
    if keys.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "INSERT INTO amazon_pii.orphan (policy, order_key, link) \
             SELECT DISTINCT $1, r.order_key, n.l FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (k, l) \
             CROSS JOIN LATERAL (SELECT q.order_key, q.apart FROM ( \
                (SELECT r.orphan_id, r.order_key, r.apart FROM amazon_pii.orphan AS r WHERE r.policy = $1 AND r.table_name = $2 \
                    AND r.record_key = n.k AND r.apart IS DISTINCT FROM 'done' ORDER BY r.orphan_id DESC LIMIT 1) \
                UNION ALL (SELECT r.orphan_id, r.order_key, r.apart FROM amazon_pii.orphan AS r WHERE r.policy = $1 AND r.table_name = $2 \
                    AND r.record_key = n.k AND r.apart = 'done' ORDER BY r.orphan_id DESC LIMIT 1)) AS q \
                ORDER BY q.orphan_id DESC LIMIT 1) AS r \
             WHERE (NOT $5 OR r.apart = 'done') AND NOT EXISTS (SELECT FROM amazon_pii.orphan AS w WHERE w.policy = $1 \
                AND w.order_key = r.order_key AND w.record_key IS NULL AND w.link = n.l AND w.next_attempt_at <= pg_catalog.now())",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&table.archived_as)),
                Arg::texts(&keys),
                Arg::texts(&ways),
                Arg::Bool(is_it),
            ],
        )
    })?;
    Ok(())
}

/// Orders that are redacted: what was redacted before them is theirs again.
///
/// # Errors
/// Errors of the server.
pub fn with_their_orders(plan: &Plan, orders: &[&Due]) -> Result<()> {
    if plan.generic.is_empty() || orders.is_empty() {
        return Ok(());
    }
    let keys: Vec<&str> = orders.iter().map(|d| d.order_key.as_str()).collect();
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.orphan r SET apart = NULL WHERE r.policy IS NOT DISTINCT FROM $1 AND r.order_key = ANY ($2) AND r.apart IS NOT NULL",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )
    })?;
    Ok(())
}
