//! Names inside of kept text: an order's own values, archived and live, taken out of its columns with a `scrub` treatment.

use std::collections::HashMap;

use super::gather::LiveRecord;
use super::plan::{CellColumn, Plan};
use super::vault::{Newest, OrderArchive};
use crate::domain::scrub::Names;
use crate::domain::treatment::{Outcome, Treatment};
use crate::pg::sql::Text;

/// Works out what the scrubbed cells of a batch become. `orders` are the keys of the batch's orders.
pub fn fill(
    plan: &Plan,
    records: &mut [LiveRecord],
    archive: &HashMap<String, OrderArchive>,
    orders: &[impl AsRef<str>],
) {
    if plan.tables.iter().flat_map(|t| &t.cells).all(|c| c.names.is_empty()) {
        return;
    }
    let mut of_order: HashMap<usize, Vec<usize>> = HashMap::new();
    for (at, record) in records.iter().enumerate() {
        of_order.entry(record.order).or_default().push(at);
    }
    for (order, mine) in of_order {
        let archived = orders.get(order).and_then(|key| archive.get(key.as_ref()));
        let mut known: Vec<(&[(usize, usize)], Names)> = Vec::new();
        for at in &mine {
            for cell in 0..records[*at].cells.len() {
                let column = &plan.tables[records[*at].table].cells[cell];
                let Some(treatment) = scrubs(column) else { continue };
                let Some(value) = records[*at].cells[cell].as_ref().and_then(|c| c.value.clone()) else {
                    continue;
                };
                let found = known.iter().position(|(of, _)| *of == column.names.as_slice());
                let found = found.unwrap_or_else(|| {
                    let live = mine.iter().map(|r| &records[*r]);
                    known.push((&column.names, names(plan, column, treatment, live, archived)));
                    known.len() - 1
                });
                let scrubbed = treatment.scrub(&value, &known[found].1, column.room);
                if let Some(cell) = &mut records[*at].cells[cell] {
                    cell.computed = Some(scrubbed.map_or(value, Text::from));
                }
            }
        }
    }
}

fn scrubs(column: &CellColumn) -> Option<&Treatment> {
    column.treatment.as_ref().filter(|_| !column.names.is_empty())
}

/// The names of one order: of live values those that redaction takes away, and every archived version.
fn names<'r>(
    plan: &Plan,
    column: &CellColumn,
    treatment: &Treatment,
    live: impl Iterator<Item = &'r LiveRecord> + Clone,
    archived: Option<&OrderArchive>,
) -> Names {
    let mut values: Vec<&str> = Vec::new();
    for (table, cell) in &column.names {
        for record in live.clone().filter(|r| r.table == *table) {
            let Some(value) = record.cells[*cell].as_ref().and_then(|c| c.value.as_deref()) else {
                continue;
            };
            match plan.tables[*table].treat(*cell, Some(value), &record.key) {
                Ok(Some(Outcome::Keep)) => {}
                _ => values.push(value),
            }
        }
        let (of, name) = (
            &plan.tables[*table].archived_as,
            plan.tables[*table].cells[*cell].archived_as.as_str(),
        );
        let records = archived.into_iter().flat_map(OrderArchive::records);
        for (_, _, newest) in records.filter(|(table, ..)| *table == of) {
            values.extend(newest.versions(name));
        }
    }
    Names::of(values.into_iter(), treatment.marks())
}

/// What redaction has left of an archived text, and the text to give back: the newest, or where that had been scrubbed before,
/// the one that it was made of. `None` for a cell that is not scrubbed.
pub fn restored(
    plan: &Plan,
    table: usize,
    column: &CellColumn,
    newest: &Newest,
    order: &OrderArchive,
) -> Option<(String, String)> {
    debug_assert!(plan.tables[table].cells.iter().any(|c| c.name == column.name));
    let treatment = scrubs(column)?;
    let names = names(plan, column, treatment, std::iter::empty(), Some(order));
    let scrubbed = |text: &str| {
        let out = treatment.scrub(text, &names, column.room);
        out.unwrap_or_else(|| text.to_owned())
    };
    let marks = |text: &str| treatment.marks().count(text);
    let mut versions = newest.versions(&column.archived_as);
    let first = versions.next()?;
    let full = versions.fold(first, |older, newer| {
        if scrubbed(older) == scrubbed(newer) && marks(newer) > marks(older) {
            older
        } else {
            newer
        }
    });
    Some((scrubbed(full), full.to_owned()))
}
