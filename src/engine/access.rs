//! People and their reasons: retrieve, peek, end a retrieval, hold, release, unflag.

use std::collections::BTreeMap;

use super::audit::AuditEntry;
use super::former::Former;
use super::gather::{LiveCell, LiveRecord};
use super::overwrite::{self, CellWrite, NewValue, RowWrite};
use super::plan::{Plan, Table};
use super::rekey;
use super::state;
use super::vault::{self, Newest};
use super::walk::{self, FIRST, by_key, key_parts};
use crate::domain::reason;
use crate::domain::treatment::Outcome;
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{as_extension, require_role};
use crate::pg::sql::{self, Arg};
use crate::pg::{keys, xact};
use crate::worker::evidence;

/// Which order is meant; a number may stand for several of one policy.
pub struct Target<'a> {
    pub number: &'a str,
    pub policy: Option<&'a str>,
    pub key: Option<&'a str>,
}

struct Order {
    key: String,
    status: String,
    archived: bool,
    redacted_version: Option<i64>,
}

/// Finds the orders that bear a number, and locks them.
fn resolve(target: &Target<'_>) -> Result<(Plan, Vec<Order>)> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT policy, order_key, status, archived_at IS NOT NULL, redacted_version FROM amazon_pii.order_state \
             WHERE order_number = $1 AND ($2::text IS NULL OR policy = $2) AND ($3::text IS NULL OR order_key = $3) \
             ORDER BY policy, order_key FOR UPDATE",
            &[
                Arg::Text(Some(target.number)),
                Arg::Text(target.policy),
                Arg::Text(target.key),
            ],
        )
    })?;
    let mut by_policy: BTreeMap<String, Vec<Order>> = BTreeMap::new();
    for row in &rows {
        by_policy.entry(row.string(0)?).or_default().push(Order {
            key: row.string(1)?,
            status: row.string(2)?,
            archived: row.bool(3)?,
            redacted_version: row.text(4)?.and_then(|v| v.parse().ok()),
        });
    }
    if by_policy.len() > 1 {
        return Err(Error::ambiguous_order(
            target.number,
            &by_policy.into_keys().collect::<Vec<_>>(),
        ));
    }
    let (policy, orders) = by_policy
        .into_iter()
        .next()
        .ok_or_else(|| Error::unknown_order(target.number))?;
    Ok((Plan::load(&policy)?, orders))
}

/// A reason as it is stored, or why it cannot be.
fn checked(plan: &Plan, given: Option<&str>) -> Result<Option<String>> {
    reason::check(given, plan.document.reason)
        .map(|r| Some(r).filter(|r| !r.is_empty()))
        .map_err(|e| Error::invalid(e.to_string()).hint(e.hint()))
}

fn entry(plan: &Plan, action: &str, order: &Order, number: &str, reason: Option<&str>) -> Result<AuditEntry> {
    Ok(AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        order_key: Some(order.key.clone()),
        order_number: Some(number.to_owned()),
        reason: reason.map(str::to_owned),
        ..AuditEntry::new(action)?
    })
}

/// Lets the archive follow changes of keys first; fails when it cannot for one of these orders.
fn follow_keys(plan: &Plan, master: &MasterKeys, orders: &[Order]) -> Result<()> {
    let failed = rekey::settle(plan, master)?;
    match failed.into_iter().find(|(key, _)| orders.iter().any(|o| o.key == *key)) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Records an access in a transaction of another process, before anything is opened.
fn witness(plan: &Plan, action: &str, orders: &[Order], number: &str, reason: Option<&str>) -> Result<()> {
    for order in orders {
        evidence::record(&entry(plan, action, order, number, reason)?)?;
    }
    Ok(())
}

/// What came of one table of one order.
pub struct Restored {
    pub order_key: String,
    pub table: String,
    pub records: i64,
    pub cells: i64,
    /// Cells that did not come back, because they no longer hold what redaction put there, or their row is gone.
    pub kept: i64,
}

/// Writes the archived PII of a redacted order back, for `retrieved_for`.
///
/// # Errors
/// Unknown, ambiguous, not redacted, already retrieved, purged, bad reason, no evidence worker, archive unreachable or
/// damaged: nothing is written then.
pub fn retrieve(target: &Target<'_>, reason: Option<&str>) -> Result<Vec<Restored>> {
    require_role(&["amazon_pii_operator"], "retrieve the personal data of an order")?;
    let (plan, orders) = resolve(target)?;
    let reason = checked(&plan, reason)?;
    for order in &orders {
        match order.status.as_str() {
            "redacted" => {}
            "retrieved" => return Err(Error::already_retrieved(target.number)),
            "purged" => return Err(Error::purged(target.number)),
            _ => {
                return Err(
                    Error::wrong_state(format!("order \"{}\" is not redacted", target.number))
                        .hint("Its personal data is still in its tables."),
                );
            }
        }
    }
    witness(&plan, "retrieve", &orders, target.number, reason.as_deref())?;
    let restored = write_back(&plan, &orders, target.number)?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state SET status = 'retrieved', retrieved_at = pg_catalog.now(), \
                retrieved_until = pg_catalog.now() + $3::interval, next_due_at = pg_catalog.now() + $3::interval, \
                next_attempt_at = NULL, last_error = NULL \
             WHERE policy = $1 AND order_key = ANY ($2)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&order_keys),
                Arg::Text(Some(&plan.document.retrieved_for)),
            ],
        )
    })?;
    state::announce_keys(&plan.policy, "retrieved", &order_keys)?;
    Ok(restored)
}

/// Writes archived values back wherever a cell still holds what redaction put there.
fn write_back(plan: &Plan, orders: &[Order], number: &str) -> Result<Vec<Restored>> {
    // The caller's pending deferred triggers fire now, as the caller.
    xact::fire_deferred()?;
    let master = keys::master_keys()?;
    follow_keys(plan, &master, orders)?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    let archive = vault::open(&plan.archive_schema, &master, &plan.policy, &order_keys)?;
    let mut out = Vec::new();
    for order in orders {
        let Some(archive) = archive.get(&order.key) else {
            continue;
        };
        if archive.is_empty() && archive.keyless {
            return Err(Error::purged(number));
        }
        if archive.records.values().any(|n| n.damaged) {
            return Err(
                Error::damaged(format!("an archived document of order \"{number}\" cannot be opened"))
                    .hint("Nothing was written. Restore the archive's row from a backup."),
            );
        }
        let mut places: Vec<(&vault::Place, &Newest)> = archive.records.iter().collect();
        places.sort_by_key(|(place, _)| (*place).clone());
        for (index, table) in plan.tables.iter().enumerate() {
            let shown = table.archived_as.clone();
            let mine: Vec<(&str, &Newest)> = places
                .iter()
                .filter(|(p, _)| p.0 == shown)
                .map(|(p, n)| (p.1.as_str(), *n))
                .collect();
            if !mine.is_empty() {
                out.push(restore_table(plan, index, table, order, &mine)?);
            }
        }
        // A table that left the policy keeps its documents; they are not lost, but not written either.
        for (place, newest) in places
            .iter()
            .filter(|(p, _)| plan.tables.iter().all(|t| t.archived_as != p.0))
        {
            out.push(Restored {
                order_key: order.key.clone(),
                table: place.0.clone(),
                records: 0,
                cells: 0,
                kept: newest.cells.len() as i64,
            });
        }
    }
    Ok(out)
}

fn restore_table(
    plan: &Plan,
    index: usize,
    table: &Table,
    order: &Order,
    archived: &[(&str, &Newest)],
) -> Result<Restored> {
    let version = order.redacted_version;
    let former = &(Former::load(plan, std::iter::once(version))?, version);
    let live = live(
        plan,
        index,
        table,
        &archived.iter().map(|(k, _)| *k).collect::<Vec<_>>(),
    )?;
    let mut restored = Restored {
        order_key: order.key.clone(),
        table: table.archived_as.clone(),
        records: 0,
        cells: 0,
        kept: 0,
    };
    let mut rows = Vec::new();
    let mut missing = Vec::new();
    let mut keys = Vec::new();
    for ((key, newest), live) in archived.iter().zip(&live) {
        match live {
            None if table.delete => {
                let values: Vec<(Ident, Option<String>)> = newest
                    .cells
                    .iter()
                    .map(|(c, a)| (Ident::new(c.clone()), a.text.clone()))
                    .collect();
                restored.cells += values.len() as i64;
                missing.push(values);
                keys.push(*key);
            }
            None => restored.kept += newest.cells.len() as i64,
            Some(record) => {
                let (row, kept) = restored_row(plan, former, table, record, newest)?;
                restored.kept += kept;
                let cells = row
                    .cells
                    .iter()
                    .filter(|c| matches!(c, CellWrite::Write { .. }))
                    .count();
                if cells > 0 {
                    restored.cells += cells as i64;
                    rows.push(row);
                    keys.push(*key);
                }
            }
        }
    }
    restored.records = keys.len() as i64;
    overwrite::insert(plan, table, &missing)?;
    overwrite::update(plan, table, &rows)?;
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.record_state SET status = 'retrieved', changed_at = pg_catalog.now() \
             WHERE policy = $1 AND order_key = $2 AND table_name = $3 AND record_key = ANY ($4)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&order.key)),
                Arg::Text(Some(&restored.table)),
                Arg::texts(&keys),
            ],
        )
    })?;
    Ok(restored)
}

/// The rows of a table as they are now, by their stored keys.
fn live(plan: &Plan, index: usize, table: &Table, stored: &[&str]) -> Result<Vec<Option<LiveRecord>>> {
    let inputs = stored.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
    let mut select: Vec<String> = table.cells.iter().map(|c| c.read(&c.name)).collect();
    let plain = select.len();
    for cell in &table.cells {
        select.push(cell.expression.as_ref().map_or_else(
            || "NULL".to_owned(),
            |e| cell.read(format!("CAST({e} AS {})", cell.type_shown)),
        ));
    }
    let mut out: Vec<Option<LiveRecord>> = stored.iter().map(|_| None).collect();
    for found in by_key(plan, table, &inputs, &select)? {
        let cells = (0..plain)
            .map(|i| {
                Ok(Some(LiveCell {
                    value: found.row.owned(FIRST + i)?,
                    computed: found.row.owned(FIRST + plain + i)?,
                }))
            })
            .collect::<Result<Vec<_>>>()?;
        out[found.input] = Some(LiveRecord {
            order: 0,
            table: index,
            entry: 0,
            key: inputs[found.input].clone(),
            key_text: stored[found.input].to_owned(),
            cells,
            not_before: None,
            stored: true,
            untouched: false,
        });
    }
    Ok(out)
}

/// What to write into one row, and how many archived cells stay out because the live cell is not what redaction left.
fn restored_row(
    plan: &Plan,
    former: &(Former, Option<i64>),
    table: &Table,
    record: &LiveRecord,
    newest: &Newest,
) -> Result<(RowWrite, i64)> {
    let marks = marks(plan);
    let key: Vec<String> = record.key.iter().flatten().cloned().collect();
    let mut cells = vec![CellWrite::Leave; table.cells.len()];
    let mut written = 0;
    for (i, column) in table.cells.iter().enumerate() {
        let Some(archived) = newest.cells.get(column.name.bare()) else {
            continue;
        };
        let Some(live) = record.cells[i].as_ref() else { continue };
        let whole = archived.whole(&marks);
        if live.value == archived.text || live.value == whole {
            // Never overwritten, or already back.
            written += 1;
            continue;
        }
        let left = match &column.treatment {
            None => false,
            Some(treatment) => {
                let outcome = treatment.apply(archived.text.as_deref(), &key).map_err(|e| {
                    Error::unsupported(format!(
                        "column \"{}\" of {}: {e}",
                        column.name.bare(),
                        table.relation.shown()
                    ))
                })?;
                match outcome {
                    Outcome::Text(text) => live.value.as_deref().is_some_and(|v| same(v, &text, column.padded)),
                    Outcome::Null => live.value.is_none(),
                    Outcome::Sql => live.value == live.computed,
                    Outcome::Keep => false,
                }
            }
        };
        if left || former.0.left(plan, former.1, record, i, archived) {
            written += 1;
            let new = whole.map_or(NewValue::Null, NewValue::Text);
            cells[i] = CellWrite::Write {
                expected: live.value.clone(),
                new,
            };
        }
    }
    Ok((
        RowWrite {
            key: record.key.clone(),
            cells,
        },
        newest.cells.len() as i64 - written,
    ))
}

/// What stands in place of personal text.
fn marks(plan: &Plan) -> Vec<&str> {
    let others = plan.document.also_redacted.iter().map(String::as_str);
    std::iter::once(plan.document.placeholder.as_str())
        .chain(others)
        .collect()
}

/// Equal but for the blanks that char(n) adds.
fn same(live: &str, wanted: &str, padded: bool) -> bool {
    if padded {
        live.trim_end_matches(' ') == wanted.trim_end_matches(' ')
    } else {
        live == wanted
    }
}

/// Gives the archived PII of an order to the caller alone.
///
/// # Errors
/// As [`retrieve`], and when nothing is archived yet.
pub fn peek(target: &Target<'_>, reason: Option<&str>) -> Result<serde_json::Value> {
    require_role(&["amazon_pii_operator"], "read the personal data of an order")?;
    let (plan, orders) = resolve(target)?;
    let reason = checked(&plan, reason)?;
    for order in &orders {
        if order.status == "purged" {
            return Err(Error::purged(target.number));
        }
        if !order.archived {
            return Err(
                Error::wrong_state(format!("order \"{}\" is not archived yet", target.number))
                    .hint("Its personal data is still in its tables."),
            );
        }
    }
    witness(&plan, "peek", &orders, target.number, reason.as_deref())?;
    let master = keys::master_keys()?;
    follow_keys(&plan, &master, &orders)?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    let archive = vault::open(&plan.archive_schema, &master, &plan.policy, &order_keys)?;
    let mut out = Vec::new();
    for order in &orders {
        let mut records = Vec::new();
        if let Some(archive) = archive.get(&order.key) {
            if archive.is_empty() && archive.keyless {
                return Err(Error::purged(target.number));
            }
            if archive.records.values().any(|n| n.damaged) {
                return Err(Error::damaged(format!(
                    "an archived document of order \"{}\" cannot be opened",
                    target.number
                ))
                .hint("Restore the archive's row from a backup."));
            }
            let mut places: Vec<_> = archive.records.iter().collect();
            places.sort_by(|a, b| a.0.cmp(b.0));
            for (place, newest) in places {
                let marks = marks(&plan);
                let cells: serde_json::Map<String, serde_json::Value> = newest
                    .cells
                    .iter()
                    .map(|(c, a)| (c.clone(), serde_json::Value::from(a.whole(&marks))))
                    .collect();
                records.push(serde_json::json!({ "table": place.0, "record_key": place.1, "cells": cells }));
            }
        }
        out.push(serde_json::json!({ "policy": plan.policy, "order_key": order.key, "records": records }));
    }
    Ok(serde_json::Value::Array(out))
}

/// Ends a retrieval early: due at once, done by the next cycle.
///
/// # Errors
/// Unknown, ambiguous, not retrieved.
pub fn end_retrieval(target: &Target<'_>) -> Result<()> {
    require_role(&["amazon_pii_operator"], "end a retrieval")?;
    change(
        target,
        None,
        "end_retrieval",
        &["retrieved"],
        "is not retrieved",
        |plan, orders| {
            as_extension(|| {
                sql::execute(
                    "UPDATE amazon_pii.order_state SET retrieved_until = pg_catalog.now(), next_due_at = pg_catalog.now(), next_attempt_at = NULL \
                 WHERE policy = $1 AND order_key = ANY ($2)",
                    &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
                )
            })?;
            crate::worker::wake();
            Ok(())
        },
    )
}

/// Pauses redaction until a moment in the future.
///
/// # Errors
/// Unknown, ambiguous, nothing left to pause, a moment that is past, bad reason.
pub fn hold(target: &Target<'_>, reason: Option<&str>, until: &str) -> Result<()> {
    require_role(&["amazon_pii_operator"], "hold an order")?;
    let future = as_extension(|| {
        let rows = sql::read(
            "SELECT $1::timestamptz > pg_catalog.now() AND pg_catalog.isfinite($1::timestamptz)",
            &[Arg::Text(Some(until))],
        )?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
    })?;
    if !future {
        return Err(Error::invalid("the end of a hold must lie in the future")
            .hint("Give a time after now; amazon_pii.release() ends a hold."));
    }
    let states = &["flagged", "scheduled", "archived", "failed", "retrieved"];
    change(
        target,
        Some(reason),
        "hold",
        states,
        "holds no personal data any more",
        |plan, orders| {
            as_extension(|| {
                sql::execute(
                    "UPDATE amazon_pii.order_state SET held_until = $3::timestamptz, \
                    next_due_at = CASE WHEN archived_at IS NULL THEN next_due_at ELSE GREATEST(next_due_at, $3::timestamptz) END \
                 WHERE policy = $1 AND order_key = ANY ($2)",
                    &[
                        Arg::Text(Some(&plan.policy)),
                        Arg::texts(orders),
                        Arg::Text(Some(until)),
                    ],
                )
            })?;
            Ok(())
        },
    )
}

/// Ends a hold.
///
/// # Errors
/// Unknown, ambiguous.
pub fn release(target: &Target<'_>) -> Result<()> {
    require_role(&["amazon_pii_operator"], "release an order")?;
    let states = &["flagged", "scheduled", "archived", "failed", "retrieved"];
    change(target, None, "release", states, "is not held", |plan, orders| {
        as_extension(|| {
            sql::execute(
                "UPDATE amazon_pii.order_state SET held_until = NULL, \
                    next_due_at = CASE WHEN retrieved_until IS NOT NULL THEN retrieved_until \
                        WHEN archived_at IS NOT NULL THEN redact_due_at ELSE archive_due_at END \
                 WHERE policy = $1 AND order_key = ANY ($2)",
                &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
            )
        })?;
        crate::worker::wake();
        Ok(())
    })
}

/// Writes back for good and stops tracking: for the victims of a wrong policy. The archive stays.
///
/// # Errors
/// As [`retrieve`].
pub fn unflag(target: &Target<'_>, reason: Option<&str>) -> Result<Vec<Restored>> {
    require_role(&["amazon_pii_admin"], "unflag an order")?;
    let (plan, orders) = resolve(target)?;
    let reason = checked(&plan, reason)?;
    if orders.iter().any(|o| o.status == "purged") {
        return Err(Error::purged(target.number));
    }
    witness(&plan, "unflag", &orders, target.number, reason.as_deref())?;
    let restored = write_back(&plan, &orders, target.number)?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    as_extension(|| {
        for table in ["record_state", "order_state"] {
            sql::execute(
                &format!(
                    "DELETE FROM amazon_pii.{} WHERE policy = $1 AND order_key = ANY ($2)",
                    Ident::new(table)
                ),
                &[Arg::Text(Some(&plan.policy)), Arg::texts(&order_keys)],
            )?;
        }
        Ok(())
    })?;
    state::announce_keys(&plan.policy, "unflagged", &order_keys)?;
    Ok(restored)
}

/// A change of state that opens nothing: recorded in the caller's own transaction.
fn change(
    target: &Target<'_>,
    reason: Option<Option<&str>>,
    action: &str,
    states: &[&str],
    otherwise: &str,
    apply: impl FnOnce(&Plan, &[String]) -> Result<()>,
) -> Result<()> {
    let (plan, orders) = resolve(target)?;
    let reason = match reason {
        Some(given) => checked(&plan, given)?,
        None => None,
    };
    if !orders.iter().all(|o| states.contains(&o.status.as_str())) {
        return Err(Error::wrong_state(format!("order \"{}\" {otherwise}", target.number)));
    }
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    apply(&plan, &order_keys)?;
    let entries = orders
        .iter()
        .map(|o| entry(&plan, action, o, target.number, reason.as_deref()))
        .collect::<Result<Vec<_>>>()?;
    super::audit::insert(&entries)?;
    state::announce_keys(&plan.policy, action, &order_keys)
}

/// An order that a search found.
pub struct Hit {
    pub policy: String,
    pub order_key: String,
    pub order_number: Option<String>,
    pub status: String,
    pub matched_by: String,
}

/// Finds flagged orders by their own number, or by the number of a linked record (an invoice).
///
/// # Errors
/// Errors of the server.
pub fn find_orders(search: &str) -> Result<Vec<Hit>> {
    require_role(&["amazon_pii_operator", "amazon_pii_admin"], "search orders")?;
    let policies = as_extension(|| sql::read("SELECT policy FROM amazon_pii.policy ORDER BY policy", &[]))?;
    let mut hits = Vec::new();
    for policy in &policies {
        let plan = Plan::load(policy.str(0)?)?;
        let mut matches: BTreeMap<String, String> = BTreeMap::new();
        for (index, entry) in plan.entries.iter().enumerate() {
            let Some(number) = &entry.number else { continue };
            let links = walk::select_all(&entry.on_child);
            let starts = walk::hop(
                &plan,
                &walk::Hop {
                    table: &plan.tables[entry.table],
                    on: &[number.as_text()],
                    own_types: &[pgrx::pg_sys::TEXTOID],
                    types: &[pgrx::pg_sys::TEXTOID],
                    filter: entry.filter.as_ref(),
                    select: &links,
                    limit: None,
                },
                &[vec![Some(search.to_owned())]],
            )?
            .into_iter()
            .map(|f| Ok((0, f.row.texts(FIRST..FIRST + links.len())?)))
            .collect::<Result<Vec<_>>>()?;
            for key in super::touched::orders_above(&plan, index, starts)? {
                matches
                    .entry(walk::key_text(&key)?)
                    .or_insert_with(|| entry.alias.clone());
            }
        }
        let keys: Vec<&String> = matches.keys().collect();
        let rows = as_extension(|| {
            sql::read(
                "SELECT order_key, order_number, status, order_number = $2 FROM amazon_pii.order_state \
                 WHERE policy = $1 AND order_key = ANY ($3) \
                 UNION SELECT order_key, order_number, status, true FROM amazon_pii.order_state WHERE policy = $1 AND order_number = $2 \
                 ORDER BY 1",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(search)),
                    Arg::texts(&keys),
                ],
            )
        })?;
        for row in &rows {
            let key = row.string(0)?;
            let by = if row.bool(3)? {
                "order number".to_owned()
            } else {
                matches.get(&key).cloned().unwrap_or_default()
            };
            hits.push(Hit {
                policy: plan.policy.clone(),
                order_number: row.owned(1)?,
                status: row.string(2)?,
                matched_by: by,
                order_key: key,
            });
        }
    }
    Ok(hits)
}
