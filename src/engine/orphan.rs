//! The customers that orders were imported with before they got the generic one, and what hangs on them: records of their orders,
//! although no link leads there.

use std::collections::HashMap;

use super::alive::User;
use super::assign;
use super::plan::{Customer, Plan};
use super::records::{Listed, RecordList};
use super::walk::{FIRST, Hop, Values, hop, key_parts, key_text, own_key, select_all};
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

/// Makes what triggers noted records of their orders.
///
/// # Errors
/// Errors of the server or of the owners' expressions; the notes stay then. The generic customer is gone.
pub fn settle(plan: &Plan) -> Result<()> {
    if let (Some(assign), Some(customer)) = (&plan.assign, &plan.customer)
        && !assign::exists(plan, customer, &assign.to)?
    {
        return Err(Error::undefined(format!(
            "orders.assign_customer: there is no customer {}",
            assign.to
        )));
    }
    while step(plan)? {}
    Ok(())
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
                for listed in found.iter().filter(|(at, _)| *at == i).map(|(_, l)| l) {
                    if !orders.2[order].records.lists(&listed.0, &listed.1) {
                        orders.2[order].records.put(listed.clone());
                    }
                    new.push((order, listed));
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

/// The rows that these links lead to, and all that hangs on them, by the position of the link.
fn below(plan: &Plan, customer: &Customer, links: &[Values]) -> Result<Vec<(usize, Listed)>> {
    let mut out = Vec::new();
    let mut pending: Vec<Vec<(usize, Values)>> = plan.entries.iter().map(|_| Vec::new()).collect();
    pending[customer.entry] = links.iter().cloned().enumerate().collect();
    for index in 0..plan.entries.len() {
        let (origins, inputs): (Vec<usize>, Vec<Values>) = std::mem::take(&mut pending[index]).into_iter().unzip();
        let entry = &plan.entries[index];
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
                ));
            }
        }
    }
    Ok(out)
}

/// Lists new records. Those of an order that is redacted have come back.
fn write(plan: &Plan, orders: &[Order], new: &[(usize, &Listed)]) -> Result<()> {
    if new.is_empty() {
        return Ok(());
    }
    let policy = Arg::Text(Some(&plan.policy));
    let mut touched: Vec<usize> = new.iter().map(|(order, _)| *order).collect();
    touched.sort_unstable();
    touched.dedup();
    let lists: Vec<Option<String>> = touched.iter().map(|i| orders[*i].records.text()).collect();
    let keys: Vec<&str> = touched.iter().map(|i| orders[*i].key.as_str()).collect();
    let column = |f: fn(&Listed) -> &str, list: &[&(usize, &Listed)]| -> Vec<Option<String>> {
        list.iter().map(|(_, l)| Some(f(l).to_owned())).collect()
    };
    let all: Vec<&(usize, &Listed)> = new.iter().collect();
    let back: Vec<&(usize, &Listed)> = new.iter().filter(|(order, _)| orders[*order].redacted).collect();
    let of = |list: &[&(usize, &Listed)]| -> Vec<Option<String>> {
        list.iter().map(|(order, _)| Some(orders[*order].key.clone())).collect()
    };
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state AS o SET records = n.r, \
                next_due_at = CASE WHEN o.status = 'redacted' THEN pg_catalog.now() ELSE o.next_due_at END \
             FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (k, r) WHERE o.policy = $1 AND o.order_key = n.k",
            &[policy.clone(), Arg::texts(&keys), Arg::opt_texts(&lists)],
        )?;
        sql::execute(
            "INSERT INTO amazon_pii.orphan (policy, order_key, table_name, record_key) \
             SELECT $1, o, t, k FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (o, t, k) \
             ON CONFLICT DO NOTHING",
            &[
                policy.clone(),
                Arg::opt_texts(&of(&all)),
                Arg::opt_texts(&column(|l| &l.0, &all)),
                Arg::opt_texts(&column(|l| &l.1, &all)),
            ],
        )?;
        sql::execute(
            "INSERT INTO amazon_pii.record_state (policy, order_key, table_name, record_key, status) \
             SELECT $1, o, t, k, 'archived' FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (o, t, k) \
             ON CONFLICT (policy, order_key, table_name, record_key) DO UPDATE SET status = 'archived' \
             WHERE amazon_pii.record_state.status = 'gone'",
            &[
                policy,
                Arg::opt_texts(&of(&back)),
                Arg::opt_texts(&column(|l| &l.0, &back)),
                Arg::opt_texts(&column(|l| &l.1, &back)),
            ],
        )
    })?;
    Ok(())
}

/// The orders that were imported with one of these rows: no link leads from them to it any more, and still they use it.
///
/// # Errors
/// Errors of the server.
pub fn users(plan: &Plan, table: usize, rows: &[Values]) -> Result<Vec<User>> {
    if plan.generic.is_empty() {
        return Ok(Vec::new());
    }
    let keys = rows.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let found = on_keys(|| {
        sql::read(
            "SELECT r.record_key, r.order_key FROM amazon_pii.orphan AS r JOIN amazon_pii.order_state AS o \
                ON o.policy = r.policy AND o.order_key = r.order_key AND o.status <> 'gone' \
             WHERE r.policy IS NOT DISTINCT FROM $1 AND r.table_name = $2 AND r.record_key = ANY ($3)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&plan.tables[table].archived_as)),
                Arg::texts(&keys),
            ],
        )
    })?;
    let mut out = Vec::new();
    for row in &found {
        let key = row.str(0)?;
        for (i, _) in keys.iter().enumerate().filter(|(_, k)| *k == key) {
            out.push((i, row.string(1)?, true));
        }
    }
    Ok(out)
}

/// Of rows of an entry that were written, given by their links, the orders that were imported with them. What these rows
/// hold now has come back.
///
/// # Errors
/// Errors of the server.
pub fn orders_of(plan: &Plan, entry: usize, links: &[(usize, Values)]) -> Result<Vec<Values>> {
    let table = &plan.tables[plan.entries[entry].table];
    let by_key = own_key(table, &plan.entries[entry]).is_some_and(|p| p.len() == table.key.len());
    if plan.generic.is_empty() || !by_key || links.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<Values> = links.iter().map(|(_, link)| link.clone()).collect();
    let keys = rows.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let found = on_keys(|| {
        sql::write(
            "WITH found AS MATERIALIZED (SELECT r.policy, r.order_key, r.table_name, r.record_key FROM amazon_pii.orphan AS r \
                WHERE r.policy IS NOT DISTINCT FROM $1 AND r.table_name = $2 AND r.record_key = ANY ($3)), \
             back AS (INSERT INTO amazon_pii.record_state (policy, order_key, table_name, record_key, status) \
                SELECT f.policy, f.order_key, f.table_name, f.record_key, 'archived' FROM found AS f JOIN amazon_pii.order_state AS o \
                    ON o.policy = f.policy AND o.order_key = f.order_key AND o.redacted_version IS NOT NULL ON CONFLICT DO NOTHING) \
             SELECT order_key FROM found",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&table.archived_as)),
                Arg::texts(&keys),
            ],
        )
    })?;
    found.iter().map(|r| key_parts(r.str(0)?)).collect()
}
