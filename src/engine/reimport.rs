//! A channel sends an order again after it was redacted. By default that is written, and the next cycle archives what is new
//! and redacts it. Where the policy says `keep` or `refuse`, redacted cells stay as they are, or the statement fails.
//!
//! Only known records of redacted orders are guarded, and no row that another order needs: what is new to an order, a late
//! invoice or a second address, was never archived, and dropping it would lose it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use pgrx::pg_sys;

use super::alive;
use super::gather::{self, LiveRecord};
use super::overwrite::{self, Marks, RowWrite};
use super::plan::{Plan, Table};
use super::records::RecordList;
use super::triggers::{orders_of_rows, speaks_for, transition_keys};
use super::walk::{Values, key_parts, key_text};
use super::watched;
use crate::domain::policy::OnReimport;
use crate::domain::treatment::Outcome;
use crate::pg::catalog::{self, Compare};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{self, Identity, act_as};
use crate::pg::prepared;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::{Instead, TriggerCall, engine_is_writing};

/// Orders of a shared row that are looked at; one with more is taken to be in use.
const USERS: u32 = 200;

/// An order that is redacted, or was, then deleted and inserted anew, and is past its deadline.
const REDACTED: &str = "(o.status = 'redacted' OR (o.status IN ('scheduled', 'failed') AND o.archived_at IS NULL \
    AND o.redacted_version IS NOT NULL AND COALESCE(o.redact_due_at <= pg_catalog.now(), false)))";

/// Those of these orders that are redacted, with what they list.
fn redacted(plan: &Plan, orders: &[String]) -> Result<HashMap<String, RecordList>> {
    if orders.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = prepared::rows(
        &[
            "SELECT o.order_key, o.records FROM amazon_pii.order_state AS o \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) AND ",
            REDACTED,
        ]
        .concat(),
        &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
    )?;
    rows.iter()
        .map(|r| Ok((r.string(0)?, RecordList::parse(r.text(1)?)?)))
        .collect()
}

/// Which of these rows are records of redacted orders, and needed by no other order of any policy.
fn is_redacted(plan: &Plan, table: usize, keys: &[Values]) -> Result<Vec<bool>> {
    let mut listed = vec![false; keys.len()];
    let mut needed = HashSet::new();
    let (relation, amazon_only) = (plan.tables[table].relation.oid, plan.tables[table].amazon_only);
    let texts = keys.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let others = alive::other_policies(plan)?;
    for user in std::iter::once(plan).chain(others.iter().map(Rc::as_ref)) {
        let Some(theirs) = user.tables.iter().position(|t| t.relation.oid == relation) else {
            continue;
        };
        let (users, cut) = alive::users(user, theirs, keys, Some(USERS))?;
        needed.extend(cut);
        let orders: HashSet<&str> = users.iter().map(|u| u.1.as_str()).collect();
        let done = redacted(user, &orders.into_iter().map(str::to_owned).collect::<Vec<_>>())?;
        for (row, order, amazon) in users {
            match done.get(&order) {
                Some(list) => {
                    let own = std::ptr::eq(user, plan);
                    listed[row] |= own && list.lists(&plan.tables[table].archived_as, &texts[row]);
                }
                None if amazon || !amazon_only => _ = needed.insert(row),
                None => {}
            }
        }
    }
    Ok(listed
        .into_iter()
        .enumerate()
        .map(|(row, listed)| listed && !needed.contains(&row))
        .collect())
}

/// What a cell of a redacted record keeps of a write: `None` where the new value may be written.
fn kept(table: &Table, cell: usize, old: Option<&str>, new: Option<&str>, key: &Values) -> Result<Option<Instead>> {
    let Some(treatment) = &table.cells[cell].treatment else {
        return Ok(None);
    };
    // An error here means a value that cannot be treated, and so is none that redaction left.
    if !matches!(treatment.has_left(old, key), Ok(true)) {
        return Ok(None);
    }
    Ok(match table.treat(cell, new, key)? {
        // The names of its order are not known here.
        None | Some(Outcome::Keep | Outcome::Scrub) => None,
        Some(Outcome::Text(text)) if treatment.leaves_rest() => Some(Instead::Text(text.into_owned())),
        Some(_) => Some(Instead::Old),
    })
}

/// The row that an UPDATE shall write: its own, but for redacted cells that would hold PII again.
///
/// # Errors
/// A cancel; otherwise the statement goes through, and the next cycle redacts.
pub fn keep(call: &TriggerCall) -> Result<pg_sys::Datum> {
    let args = call.args();
    let [policy, alias] = args.as_slice() else {
        return Ok(call.new_row());
    };
    if engine_is_writing() {
        return Ok(call.new_row());
    }
    let _impatient = identity::impatient();
    let row = subtransaction(|| {
        let plan = Plan::cached(policy)?;
        let index = plan.entry(alias)?.table;
        let table = &plan.tables[index];
        let mut changed = Vec::new();
        for (i, cell) in table.cells.iter().enumerate() {
            if call.changes(cell.name.bare())? {
                changed.push(i);
            }
        }
        if changed.is_empty() || !speaks_for(table, call)? {
            return Ok(None);
        }
        let owner = Identity::Owner(table.owner);
        let (key, kept) = act_as(owner, &plan.search_path, &[], || {
            let key: Values = table
                .key
                .iter()
                .map(|(name, _)| call.old_column(name.bare()))
                .collect::<Result<_>>()?;
            let mut out = Vec::new();
            for i in changed {
                let name = table.cells[i].name.bare();
                let (old, new) = (call.old_column(name)?, call.column(name)?);
                out.extend(kept(table, i, old.as_deref(), new.as_deref(), &key)?.map(|instead| (name, instead)));
            }
            Ok((key, out))
        })?;
        if kept.is_empty() || !is_redacted(&plan, index, &[key])?.contains(&true) {
            return Ok(None);
        }
        // The input function of a column's type may be code of its owner.
        act_as(owner, &plan.search_path, &[], || call.with_values(&kept)).map(Some)
    });
    match row {
        Ok(Some(row)) => Ok(row),
        Err(e) if e.is_cancel() => Err(e),
        Ok(None) | Err(_) => Ok(call.new_row()),
    }
}

/// Why an UPDATE is refused, if the policy refuses PII in redacted cells.
///
/// # Errors
/// Errors of the server.
pub fn refusal(plan: &Plan, index: usize, call: &TriggerCall) -> Result<Option<Error>> {
    let table = &plan.tables[index];
    if plan.document.on_reimport != OnReimport::Refuse || table.cells.is_empty() {
        return Ok(None);
    }
    let both = |f: &dyn Fn(&str) -> Vec<String>| [f("amazon_pii_old"), f("amazon_pii_new")].concat();
    let mut select: Vec<String> = table.key.iter().map(|(k, _)| format!("amazon_pii_old.{k}")).collect();
    let keys = select.len();
    select.extend(both(&|from| {
        let cells = table.cells.iter();
        cells.map(|c| c.read(format!("{from}.{}", c.name))).collect()
    }));
    let same_key = table.key.iter().map(|(k, oid): &(Ident, pg_sys::Oid)| {
        let equal = catalog::operator(Compare::Equal, *oid, *oid);
        format!("amazon_pii_old.{k} {equal} amazon_pii_new.{k}")
    });
    let differs = table.cells.iter().map(|c| {
        let text = |from| c.out(format!("{from}.{}", c.name));
        format!("{} IS DISTINCT FROM {}", text("amazon_pii_old"), text("amazon_pii_new"))
    });
    let query = format!(
        "SELECT {} FROM amazon_pii_old JOIN amazon_pii_new ON {} WHERE {}",
        select.join(", "),
        same_key.collect::<Vec<_>>().join(" AND "),
        differs.collect::<Vec<_>>().join(" OR "),
    );
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::in_trigger(call, &query, &[])
    })?;
    let width = table.cells.len();
    let mut candidates: Vec<Values> = Vec::new();
    for row in &rows {
        let key = row.texts(0..keys)?;
        for i in 0..width {
            let (old, new) = (row.text(keys + i)?, row.text(keys + width + i)?);
            // What an expression makes of a row follows its other columns.
            if old != new && table.cells[i].expression.is_none() && kept(table, i, old, new, &key)?.is_some() {
                candidates.push(key);
                break;
            }
        }
    }
    let refused = !candidates.is_empty() && is_redacted(plan, index, &candidates)?.contains(&true);
    Ok(refused.then(|| Error::reimported(&table.relation.shown())))
}

/// Rows that an INSERT has put back, after a DELETE: their PII is overwritten at once, or the INSERT is refused.
///
/// # Errors
/// Errors of the server; the next cycle has the rows then.
pub fn inserted(plan: &Plan, index: usize, call: &TriggerCall) -> Result<Option<Error>> {
    if plan.document.on_reimport == OnReimport::Redact {
        return Ok(None);
    }
    let lists = lists_of_their_orders(plan, index, call)?;
    if lists.is_empty() {
        return Ok(None);
    }
    let new = transition_keys(plan, &plan.tables[index], call, "amazon_pii_new AS new_or_old", "true")?;
    let new: HashSet<&str> = new.iter().map(String::as_str).collect();
    for (at, table) in plan.tables.iter().enumerate() {
        // With an order come the rows that were there before it: nobody could tell whose they were.
        if at != index && index != 0 {
            continue;
        }
        let mine = lists.iter().flat_map(|l| l.iter().filter(|l| l.0 == table.archived_as));
        let keys: BTreeSet<&str> = mine
            .map(|l| l.1.as_str())
            .filter(|key| at != index || new.contains(key))
            .collect();
        if !keys.is_empty()
            && let Some(refusal) = put_back(plan, at, &keys.into_iter().collect::<Vec<_>>())?
        {
            return Ok(Some(refusal));
        }
    }
    Ok(None)
}

/// Known records whose rows were put back.
fn put_back(plan: &Plan, index: usize, texts: &[&str]) -> Result<Option<Error>> {
    let table = &plan.tables[index];
    let refuse = plan.document.on_reimport == OnReimport::Refuse;
    // Of a row that goes as a whole there is nothing to keep, and others may already refer to it.
    if table.delete && !refuse {
        return Ok(None);
    }
    let keys = texts.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
    let redacted = is_redacted(plan, index, &keys)?;
    let texts: Vec<&str> = texts
        .iter()
        .zip(redacted)
        .filter(|(_, is)| *is)
        .map(|(k, _)| *k)
        .collect();
    let records: Vec<LiveRecord> = gather::by_stored_keys(plan, index, &texts)?
        .into_iter()
        .flatten()
        .collect();
    let pii = records.iter().map(|r| r.pii(plan)).collect::<Result<Vec<_>>>()?;
    if refuse {
        let mut found = pii.iter().flatten();
        let any = found.any(|(i, _)| table.delete || table.cells[*i].expression.is_none());
        return Ok(any.then(|| Error::reimported(&table.relation.shown())));
    }
    let mut rows = Vec::new();
    for (record, pii) in records.iter().zip(&pii).filter(|(_, pii)| !pii.is_empty()) {
        if let Some(cells) = record.writes(pii, |_, live| Ok(Some(live)))? {
            rows.push(RowWrite {
                key: &record.key,
                cells,
            });
        }
    }
    overwrite::update(plan, table, &rows.iter().collect::<Vec<_>>(), Marks::Set)?;
    Ok(None)
}

/// What the redacted orders list to which the statement's rows belong.
fn lists_of_their_orders(plan: &Plan, index: usize, call: &TriggerCall) -> Result<Vec<RecordList>> {
    let table = &plan.tables[index];
    let mut orders: Vec<String> = Vec::new();
    if index == 0 {
        orders = transition_keys(plan, table, call, "amazon_pii_new AS new_or_old", "true")?;
    }
    for (at, entry) in plan.entries.iter().enumerate() {
        if entry.table != index || entry.parent.is_none() || watched::is_referred_to_later(plan, at)? {
            continue;
        }
        for key in orders_of_rows(plan, at, call, "amazon_pii_new", None)? {
            orders.push(key_text(&key)?);
        }
    }
    Ok(redacted(plan, &orders)?.into_values().collect())
}
