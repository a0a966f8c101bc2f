//! The first transaction of a batch: seal what is personal and store it.

use std::collections::HashMap;

use super::audit::{self, AuditEntry};
use super::due::Due;
use super::former::Former;
use super::gather::{self, Gathered, LiveRecord};
use super::plan::Plan;
use super::state;
use super::vault::{self, NewDocument, Newest, OrderArchive};
use crate::domain::document::{Cell, Document};
use crate::domain::treatment::Outcome;
use crate::domain::vault::MasterKeys;
use crate::pg::error::Result;

/// What one transaction archived.
#[derive(Debug, Default)]
pub struct Archived {
    /// Orders whose copy is complete now.
    pub orders: i64,
    /// How much text the batch holds.
    pub bytes: usize,
}

/// Archives every cell of the batch that holds PII and that the archive does not hold as it is.
///
/// # Errors
/// Anything: nothing of the batch is kept then.
pub fn batch(plan: &Plan, keys: &MasterKeys, batch: &[Due]) -> Result<Archived> {
    let order_keys: Vec<String> = batch.iter().map(|d| d.order_key.clone()).collect();
    let inputs: Vec<_> = batch.iter().map(|d| d.key.clone()).collect();
    let live = gather::gather(plan, &inputs)?;
    let known = vault::open(&plan.archive_schema, keys, &plan.policy, &order_keys)?;
    let (documents, records) = missing(
        plan,
        &Former::load(plan, batch.iter().map(|d| d.redacted_version))?,
        batch,
        &live,
        &known,
    )?;
    vault::store(&plan.archive_schema, keys, &plan.policy, &known, &documents)?;
    state::records_archived(plan, &records)?;
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for document in &documents {
        *counts.entry(&document.order_key).or_default() += 1;
    }
    let (mut present, mut gone, mut new, mut entries) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, due) in batch.iter().enumerate() {
        if live.is_gone(i) {
            gone.push(due);
            continue;
        }
        present.push(due);
        if !due.archived {
            new.push(due);
        }
        // A check that found nothing new is no event.
        if let Some(count) = counts.get(due.order_key.as_str()) {
            entries.push(AuditEntry {
                detail: Some(format!("{count} records")),
                ..entry("archive", plan, due)?
            });
        }
    }
    state::archived(plan, &present)?;
    audit::insert_under(Some(keys), &entries)?;
    state::announce(plan, "archived", &new)?;
    settle_gone(plan, keys, &gone)?;
    Ok(Archived {
        orders: new.len() as i64,
        bytes: live.bytes(),
    })
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

/// A record's place in our own list.
pub struct RecordNote {
    pub order_key: String,
    pub table: String,
    pub record_key: String,
    pub entry: String,
    pub version: i64,
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
    let first = record.untouched && due.redacted_version.is_none() && !table.shared && !table.delete;
    record.cells.iter().enumerate().filter_map(move |(i, cell)| {
        let archived = newest?.cells.get(table.cells[i].name.bare())?;
        let key: Vec<String> = record.key.iter().flatten().cloned().collect();
        let live = cell.as_ref()?;
        let outcome = table.cells[i].treatment.as_ref()?.apply(live.value.as_deref(), &key);
        let clean =
            matches!(outcome, Ok(Outcome::Keep)) || (outcome == Ok(Outcome::Sql) && live.computed == live.value);
        (first && clean && archived.text != live.value).then_some(i)
    })
}

/// The documents that the archive lacks, and the records they are of.
fn missing(
    plan: &Plan,
    former: &Former,
    batch: &[Due],
    live: &Gathered,
    known: &HashMap<String, OrderArchive>,
) -> Result<(Vec<NewDocument>, Vec<RecordNote>)> {
    let mut documents = Vec::new();
    let mut notes = Vec::new();
    for record in &live.records {
        let table = &plan.tables[record.table];
        let order = &batch[record.order].order_key;
        let place = (table.archived_as.clone(), record.key_text.clone());
        let newest = known.get(order).and_then(|a| a.records.get(&place));
        let mut pii = record.pii(plan)?;
        pii.extend(taken_out(plan, &batch[record.order], record, newest).map(|i| (i, Outcome::Keep)));
        if pii.is_empty() {
            continue;
        }
        pii.retain(|(i, _)| {
            let archived = newest.and_then(|n| n.cells.get(table.cells[*i].name.bare()));
            !archived.is_some_and(|a| former.left(plan, batch[record.order].redacted_version, record, *i, a))
        });
        let value = |i: usize| record.cells[i].as_ref().and_then(|c| c.value.clone());
        let covered = newest.is_some_and(|n| {
            pii.iter().all(|(i, _)| {
                n.cells
                    .get(table.cells[*i].name.bare())
                    .is_some_and(|a| a.text == value(*i))
            })
        });
        let mut version = newest.map_or(0, |n| n.version);
        if !covered {
            version += 1;
            let cells = pii
                .iter()
                .map(|(i, _)| {
                    let column = &table.cells[*i];
                    let cell = Cell {
                        type_name: column.type_shown.clone(),
                        text: value(*i),
                    };
                    (column.name.bare().to_owned(), cell)
                })
                .collect();
            documents.push(NewDocument {
                order_key: order.clone(),
                table: place.0.clone(),
                record_key: place.1.clone(),
                version,
                document: Document { cells },
            });
        }
        notes.push(RecordNote {
            order_key: order.clone(),
            table: place.0,
            record_key: place.1,
            entry: plan.entries[record.entry].alias.clone(),
            version,
        });
    }
    Ok((documents, notes))
}
