//! Rows that several orders share: who still needs them. Decided on the source tables, by every policy that names the
//! table; what is not tracked keeps a row alive.

use std::collections::HashSet;

use super::due::{Clock, REDACT_DUE};
use super::plan::{Entry, Plan, Table};
use super::walk::{self, FIRST, Values, by_key, key_text, up};
use crate::pg::error::Result;
use crate::pg::ident::Expr;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};

/// Users of a row that are looked at before all of them are.
const FIRST_LOOK: u32 = 200;

/// Orders of the batch that asks.
#[derive(Default)]
pub struct Ours {
    /// Redacted in the same transaction: they need the row no longer.
    pub leaving: Vec<String>,
    /// Left out of it: they still do, due or not.
    pub staying: Vec<String>,
}

/// For each row the key of an order that keeps it alive, if any does.
///
/// # Errors
/// Errors of the server; a row whose users cannot be found out must not be overwritten.
pub fn witnesses(
    plan: &Plan,
    others: &[Plan],
    table: usize,
    rows: &[Values],
    ours: &Ours,
    clock: &Clock,
) -> Result<Vec<Option<String>>> {
    let relation = plan.tables[table].relation.oid;
    let amazon_only = plan.tables[table].amazon_only;
    let mut out: Vec<Option<String>> = vec![None; rows.len()];
    for user in std::iter::once(plan).chain(others) {
        let none = Ours::default();
        let own = std::ptr::eq(user, plan);
        let ours = if own { ours } else { &none };
        let Some(theirs) = user.tables.iter().position(|t| t.relation.oid == relation) else {
            continue;
        };
        for limit in [Some(FIRST_LOOK), None] {
            let open: Vec<usize> = (0..rows.len()).filter(|i| out[*i].is_none()).collect();
            let keys: Vec<Values> = open.iter().map(|i| rows[*i].clone()).collect();
            let users = users(user, theirs, &keys, limit)?;
            let full = limit.is_some_and(|l| users.len() >= l as usize);
            for (input, order) in alive(user, users, ours, own, clock, amazon_only)? {
                out[open[input]].get_or_insert(order);
            }
            if !full {
                break;
            }
        }
    }
    Ok(out)
}

/// A user of a row: which row, the order's key, whether it is an Amazon order.
type User = (usize, String, bool);

/// The orders of a policy that use rows of one of its tables.
fn users(plan: &Plan, table: usize, rows: &[Values], limit: Option<u32>) -> Result<Vec<User>> {
    let orders = plan.orders();
    let mut select = orders.key_list();
    select.push(plan.amazon.to_string());
    let mut out = Vec::new();
    for (index, entry) in plan.entries.iter().enumerate().filter(|(_, e)| e.table == table) {
        let found = if entry.parent.is_none() {
            by_key(plan, orders, rows, &select)?
        } else if let Some(starts) = own_keys(&plan.tables[table], entry, rows) {
            up(plan, index, starts, &select, limit)?
        } else {
            let mut links = walk::select_all(&entry.on_child);
            links.extend(entry.filter.as_ref().map(ToString::to_string));
            let starts = by_key(plan, &plan.tables[table], rows, &links)?
                .into_iter()
                .filter(|f| entry.filter.is_none() || f.row.bool(FIRST + entry.on_child.len()).unwrap_or(false))
                .map(|f| Ok((f.input, f.row.texts(FIRST..FIRST + entry.on_child.len())?)))
                .collect::<Result<Vec<_>>>()?;
            up(plan, index, starts, &select, limit)?
        };
        for f in found {
            let key = key_text(&f.row.texts(FIRST..FIRST + orders.key.len())?)?;
            out.push((f.input, key, f.row.bool(FIRST + orders.key.len())?));
        }
    }
    Ok(out)
}

/// The link values of rows whose link is their own key: there is nothing to read.
fn own_keys(table: &Table, entry: &Entry, rows: &[Values]) -> Option<Vec<(usize, Values)>> {
    if entry.filter.is_some() {
        return None;
    }
    let positions = entry
        .on_child
        .iter()
        .map(|e| table.key.iter().position(|(name, _)| *e == Expr::column(name.bare())))
        .collect::<Option<Vec<_>>>()?;
    let link = |row: &Values| positions.iter().map(|p| row.get(*p).cloned().flatten()).collect();
    Some(rows.iter().enumerate().map(|(i, row)| (i, link(row))).collect())
}

/// Those users that still need the row.
///
/// An order of the policy that asks lets go once it is redacted and has nothing new to archive: a copy that was made
/// earlier may be out of date by now. Orders of other policies let go when they are due: their cycles take no turns
/// with this one, and two that waited for each other would leave the row behind.
fn alive(
    plan: &Plan,
    users: Vec<User>,
    ours: &Ours,
    own: bool,
    clock: &Clock,
    amazon_only: bool,
) -> Result<Vec<(usize, String)>> {
    let users: Vec<User> = users
        .into_iter()
        .filter(|(_, key, amazon)| (*amazon || !amazon_only) && !ours.leaving.contains(key))
        .collect();
    if users.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Vec<&str> = users.iter().map(|u| u.1.as_str()).collect();
    let rows = on_keys(|| {
        sql::read(
            &format!(
                "SELECT o.order_key FROM amazon_pii.order_state o \
                 WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($3) \
                   AND (o.status = 'purged' \
                    OR (o.status = 'redacted' AND (NOT $5 OR o.next_due_at IS NULL OR o.next_due_at > pg_catalog.clock_timestamp())) \
                    OR (o.status = 'archived' AND NOT $5 AND {REDACT_DUE}))"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::texts(&keys),
                Arg::Text(Some(&clock.redact)),
                Arg::Bool(own),
            ],
        )
    })?;
    let done = rows.iter().map(|r| r.string(0)).collect::<Result<HashSet<_>>>()?;
    // What is not tracked needs its rows.
    let needs = |key: &String| ours.staying.contains(key) || !done.contains(key);
    Ok(users.into_iter().filter(|u| needs(&u.1)).map(|u| (u.0, u.1)).collect())
}

/// The other policies that name a table of this one, ready.
///
/// # Errors
/// One of them cannot be made ready: whether its orders need a shared row is unknown.
pub fn other_policies(plan: &Plan) -> Result<Vec<Plan>> {
    let oids: Vec<i64> = plan
        .tables
        .iter()
        .map(|t| i64::from(u32::from(t.relation.oid)))
        .collect();
    let names = as_extension(|| {
        sql::read(
            "SELECT DISTINCT t.policy FROM amazon_pii.policy_table t WHERE t.policy <> $1 AND t.relation::oid::bigint = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::Ints(oids)],
        )
    })?;
    names.iter().map(|r| Plan::load(r.str(0)?)).collect()
}
