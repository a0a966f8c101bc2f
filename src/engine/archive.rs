//! The first transaction of a batch: seal what is personal and store it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use super::audit::{self, AuditEntry};
use super::due::Due;
use super::former::Former;
use super::gather::{self, Gathered, LiveRecord};
use super::orphan::Rows;
use super::plan::Plan;
use super::records::{self, Fate, Listed, RecordList, Stored};
use super::scrub;
use super::state;
use super::vault::{self, Cold, NewDocument, Newest, OrderArchive};
use super::walk::Values;
use crate::domain::document::{Cell, encode};
use crate::domain::treatment::Outcome;
use crate::domain::vault::MasterKeys;
use crate::pg::error::Result;

/// What one transaction archived.
#[derive(Default)]
pub struct Archived {
    /// Orders whose copy is complete now.
    pub orders: i64,
    /// How much text the batch holds.
    pub bytes: usize,
    /// What each order of the batch lists now, and the rows that were read.
    pub found: Vec<(Rc<RecordList>, Vec<LiveRecord>)>,
    /// The orders whose state was written, and by whom.
    pub written: HashMap<String, String>,
}

/// A record, by the position of its order in the batch.
type OfOrder = (usize, Listed);

/// Archives every cell of the batch that holds PII and that the archive, with what a cold server has of it, does not hold as it is.
///
/// # Errors
/// Anything: nothing of the batch is kept then.
pub fn batch(plan: &Plan, keys: &MasterKeys, batch: &[Due], cold: &Cold) -> Result<Archived> {
    let stored = Stored::of(plan, batch)?;
    let (live, known) = look(plan, keys, batch, &stored, cold)?;
    let former = Former::load(plan, batch.iter().map(|d| d.redacted_version))?;
    let (documents, found) = missing(plan, &former, batch, &live, &known)?;
    vault::store(&plan.archive.schema, keys, &plan.policy, &known, &documents)?;
    come_back(plan, batch, &stored, &found)?;
    let mut counts: HashMap<&str, usize> = HashMap::with_capacity(batch.len());
    for document in &documents {
        *counts.entry(&document.order_key).or_default() += 1;
    }
    let mut records: Vec<Rc<RecordList>> = batch.iter().map(|d| d.records.clone()).collect();
    for (order, record) in found {
        Rc::make_mut(&mut records[order]).put(record);
    }
    let (mut complete, mut gone, mut new, mut lines) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, due) in batch.iter().enumerate() {
        if live.is_gone(i) && !due.asked.forgets() {
            gone.push(due);
            continue;
        }
        // One that is redacted next gets both states at once; until then its documents say that it is archived.
        if !due.redact || due.archived {
            complete.push((due, &*records[i]));
        }
        // A check that found nothing new is no event: an interrupted batch may have stored the copy.
        let count = counts.get(due.order_key.as_str());
        if !due.archived && (count.is_some() || !known.contains_key(&due.order_key)) {
            new.push(due);
        }
        if let Some(count) = count {
            lines.push(line(due, format!("{count} records")));
        }
    }
    let written = state::archived(plan, &complete)?;
    let anew = batch.iter().filter(|d| d.purged).map(|d| d.order_key.as_str());
    let anew: Vec<&str> = anew.filter(|key| counts.contains_key(key)).collect();
    state::archived_anew(plan, &anew)?;
    audit::insert_batch(keys, "archive", plan, lines)?;
    state::announce(plan, "archived", &new)?;
    settle_gone(plan, keys, &gone)?;
    let (orders, bytes) = (new.len() as i64, live.bytes());
    let mut found: Vec<_> = records.into_iter().map(|list| (list, Vec::new())).collect();
    for record in live.records {
        found[record.order].1.push(record);
    }
    Ok(Archived {
        orders,
        bytes,
        found,
        written,
    })
}

/// What there is of a batch, in the tables and in the archive.
///
/// # Errors
/// Errors of the server or of the owners' expressions; the archive cannot be read.
pub fn look(
    plan: &Plan,
    keys: &MasterKeys,
    batch: &[Due],
    stored: &Stored,
    cold: &Cold,
) -> Result<(Gathered, HashMap<String, OrderArchive>)> {
    let order_keys: Vec<&str> = batch.iter().map(|d| d.order_key.as_str()).collect();
    let inputs: Vec<Values> = batch.iter().map(|d| d.key.clone()).collect();
    let mut live = gather::gather(plan, &inputs, stored)?;
    let mut known = vault::open(&plan.archive, keys, &plan.policy, &order_keys, cold)?;
    for due in batch.iter().filter(|d| d.generation > 0) {
        known.entry(due.order_key.clone()).or_default().generation = due.generation;
    }
    scrub::fill(plan, &mut live.records, &known, &order_keys);
    Ok((live, known))
}

/// Archives some rows of orders that are not due yet; these keep their state, and list the copies.
///
/// # Errors
/// As [`batch`].
pub fn apart(plan: &Plan, keys: &MasterKeys, batch: &mut [Due], rows: &Rows) -> Result<()> {
    let stored = Stored::of(plan, batch)?;
    let (mut live, known) = look(plan, keys, batch, &stored, &Cold::default())?;
    live.records.retain(|r| rows.has(plan, &batch[r.order], r));
    let (documents, found) = missing(plan, &Former::default(), batch, &live, &known)?;
    vault::store(&plan.archive.schema, keys, &plan.policy, &known, &documents)?;
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for document in &documents {
        *counts.entry(&document.order_key).or_default() += 1;
    }
    let lines = batch.iter().filter_map(|due| {
        let count = counts.get(due.order_key.as_str())?;
        Some(line(due, format!("{count} records, before the order")))
    });
    audit::insert_batch(keys, "archive", plan, lines.collect())?;
    let mut records: Vec<Rc<RecordList>> = batch.iter().map(|d| d.records.clone()).collect();
    for (order, record) in found {
        Rc::make_mut(&mut records[order]).put(record);
    }
    for (due, records) in batch.iter_mut().zip(records) {
        due.records = records;
    }
    state::listed(plan, batch)
}

/// A line of a batch's audit entry.
pub fn line(due: &Due, detail: String) -> audit::Line {
    audit::Line {
        order_key: due.order_key.clone(),
        order_number: due.number.clone(),
        detail,
    }
}

/// Records that hold personal data although they were done with.
fn come_back(plan: &Plan, batch: &[Due], stored: &Stored, found: &[OfOrder]) -> Result<()> {
    let changes: Vec<records::Change<'_>> = found
        .iter()
        .filter_map(|(order, Listed(table, record_key, ..))| {
            let due = &batch[*order];
            let redacted = due.redacted_version.is_some();
            let change = match stored.fate(*order, table, record_key) {
                None | Some(Fate::Gone) if redacted => Some(Some(Fate::Archived)),
                Some(Fate::Gone) => Some(None),
                _ => None,
            };
            change.map(|fate| records::Change {
                order_key: &due.order_key,
                table,
                record_key,
                fate,
                witness: None,
            })
        })
        .collect();
    records::write(plan, &changes)
}

/// Orders whose row is gone: nothing more to do, their documents stay.
///
/// # Errors
/// Errors of the server.
pub fn settle_gone(plan: &Plan, keys: &MasterKeys, gone: &[&Due]) -> Result<()> {
    state::gone(plan, gone)?;
    let entries = gone
        .iter()
        .map(|due| entry("order_gone", plan, due))
        .collect::<Result<Vec<_>>>()?;
    audit::insert_under(Some(keys), &entries)?;
    state::announce(plan, "gone", gone)
}

/// An audit entry about one order.
///
/// # Errors
/// Errors of the server.
pub fn entry(action: &str, plan: &Plan, due: &Due) -> Result<AuditEntry> {
    Ok(AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        order_key: Some(due.order_key.clone()),
        order_number: due.number.clone(),
        ..AuditEntry::new(action)?
    })
}

/// Cells that hold no PII any more although a copy of them was archived: before the first redaction that is somebody's
/// decision, and the archive follows it. A shared row may have been redacted with another order.
pub fn taken_out<'a>(
    plan: &'a Plan,
    due: &Due,
    record: &'a LiveRecord,
    newest: Option<&'a Newest>,
) -> impl Iterator<Item = usize> + 'a {
    let table = &plan.tables[record.table];
    let untouched = due.redacted_version.is_none() && due.records.lists(&table.archived_as, &record.key_text);
    let first = untouched && !table.shared && !table.delete && !record.early;
    let candidates = newest.filter(|_| first);
    record.cells.iter().enumerate().filter_map(move |(i, cell)| {
        let archived = candidates?.cell(&table.cells[i].archived_as)?;
        let live = cell.as_ref()?;
        if archived.text == live.value.as_deref() {
            return None;
        }
        let outcome = table.cells[i]
            .treatment
            .as_ref()?
            .apply(live.value.as_deref(), &record.key);
        let clean = matches!(outcome, Ok(Outcome::Keep))
            || (matches!(outcome, Ok(Outcome::Sql | Outcome::Scrub)) && live.computed == live.value);
        clean.then_some(i)
    })
}

/// The documents that the archive lacks, and the records that hold personal data, by the position of their order.
fn missing<'a>(
    plan: &'a Plan,
    former: &Former,
    batch: &'a [Due],
    live: &'a Gathered,
    known: &HashMap<String, OrderArchive>,
) -> Result<(Vec<NewDocument<'a>>, Vec<OfOrder>)> {
    let mut documents = Vec::with_capacity(live.records.len());
    let mut notes = Vec::with_capacity(live.records.len());
    for record in &live.records {
        let table = &plan.tables[record.table];
        let due = &batch[record.order];
        let newest = known
            .get(&due.order_key)
            .and_then(|a| a.record(&table.archived_as, &record.key_text));
        let mut pii = record.pii(plan)?;
        let listed = |version| {
            let entry = plan.entries[record.entry].alias.clone();
            let listed = Listed(table.archived_as.clone(), record.key_text.clone(), entry, version);
            (record.order, listed)
        };
        if table.no_copy {
            if !pii.is_empty() {
                notes.push(listed(newest.map_or(0, |n| n.version)));
            }
            continue;
        }
        pii.extend(taken_out(plan, due, record, newest).map(|i| (i, Outcome::Keep)));
        if pii.is_empty() {
            continue;
        }
        let archived = |i: usize| newest.and_then(|n| n.cell(&table.cells[i].archived_as));
        pii.retain(|(i, _)| !archived(*i).is_some_and(|a| former.left(plan, due.redacted_version, record, *i, &a)));
        let value = |i: usize| record.cells[i].as_ref().and_then(|c| c.value.as_deref());
        let covered = newest.is_some()
            && pii
                .iter()
                .all(|(i, _)| archived(*i).is_some_and(|a| a.text == value(*i)));
        let mut version = newest.map_or(0, |n| n.version);
        if plan.archive.foreign.is_some() && !covered {
            // What was not fetched is counted all the same.
            version = version.max(due.records.version(&table.archived_as, &record.key_text));
        }
        if !covered {
            version += 1;
            let cell = |i: usize| Cell {
                name: &table.cells[i].archived_as,
                type_name: &table.cells[i].type_shown,
                text: value(i),
            };
            documents.push(NewDocument {
                order_key: Cow::Borrowed(&due.order_key),
                table: Cow::Borrowed(&table.archived_as),
                record_key: Cow::Borrowed(&record.key_text),
                version,
                plain: encode(pii.iter().map(|(i, _)| cell(*i)).collect()),
            });
        }
        notes.push(listed(version));
    }
    Ok((documents, notes))
}
