//! Writing archived values back.

use std::collections::BTreeMap;

use super::{Order, complete, follow_keys};
use crate::domain::treatment::Outcome;
use crate::domain::vault::MasterKeys;
use crate::engine::former::Former;
use crate::engine::gather::{self, LiveRecord};
use crate::engine::overwrite::{self, CellWrite, Marks, NewValue, RowWrite};
use crate::engine::plan::{Plan, Table};
use crate::engine::records::{self, Fate};
use crate::engine::scrub;
use crate::engine::vault::{self, Cold, Newest, OrderArchive};
use crate::engine::walk::{self, Values, key_parts};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{Identity, act_as};
use crate::pg::sql::{self, Arg};
use crate::pg::{keys, xact};

/// What came of one table of one order.
pub struct Restored {
    pub order_key: String,
    pub table: String,
    pub records: i64,
    pub cells: i64,
    /// Cells that did not come back, because they no longer hold what redaction put there, or their row is gone. Of a table
    /// that is not archived, records.
    pub kept: i64,
}

/// Writes archived values back wherever a cell still holds what redaction put there.
pub(super) fn write_back(plan: &Plan, orders: &[Order], number: &str) -> Result<Vec<Restored>> {
    // The caller's pending deferred triggers fire now, as the caller.
    xact::fire_deferred()?;
    let master = keys::master_keys()?;
    follow_keys(plan, &master, orders)?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    let cold = vault::fetch(&plan.archive, &plan.policy, &order_keys)?;
    let restored = write_all(plan, &master, orders, &cold, number)?;
    xact::defer_again()?;
    Ok(restored)
}

/// [`write_back`] with what a cycle has fetched from a cold server before it locked anything.
pub(super) fn write_fetched(
    plan: &Plan,
    master: &MasterKeys,
    orders: &[Order],
    cold: &Cold,
    number: &str,
) -> Result<Vec<Restored>> {
    xact::fire_deferred()?;
    follow_keys(plan, master, orders)?;
    let restored = write_all(plan, master, orders, cold, number)?;
    xact::defer_again()?;
    Ok(restored)
}

fn write_all(plan: &Plan, master: &MasterKeys, orders: &[Order], cold: &Cold, number: &str) -> Result<Vec<Restored>> {
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    let archive = vault::open(&plan.archive, master, &plan.policy, &order_keys, cold)?;
    if archive.values().all(|a| !a.keyless) {
        complete(plan, orders, &archive, number)?;
    }
    let mut out = Vec::new();
    for order in orders {
        out.extend(never_archived(order));
        let Some(archive) = archive.get(&order.key) else {
            continue;
        };
        if archive.is_empty() && archive.keyless {
            return Err(Error::purged(number));
        }
        if archive.is_damaged() {
            return Err(
                Error::damaged(format!("an archived document of order \"{number}\" cannot be opened"))
                    .hint("Nothing was written. Restore the archive's row from a backup."),
            );
        }
        for (index, table) in plan.tables.iter().enumerate() {
            let mine: Vec<(&str, &Newest)> = archive
                .records()
                .filter(|(of, ..)| *of == table.archived_as)
                .map(|(_, key, newest)| (key, newest))
                .collect();
            if !mine.is_empty() {
                out.push(restore_table(plan, index, table, order, (&mine, archive))?);
            } else if index == 0 && !table.marks.is_empty() {
                restore_table(plan, index, table, order, (&mine, archive))?;
            }
        }
        // A table that left the policy keeps its documents; they are not lost, but not written either.
        for (table, _, newest) in archive
            .records()
            .filter(|(of, ..)| plan.tables.iter().all(|t| t.archived_as != *of))
        {
            out.push(Restored {
                order_key: order.key.clone(),
                table: table.to_owned(),
                records: 0,
                cells: 0,
                kept: newest.cells().len() as i64,
            });
        }
    }
    Ok(out)
}

/// Records that cannot come back, because the policy wanted no copy of them: how many of each table.
fn never_archived(order: &Order) -> Vec<Restored> {
    let mut counts: BTreeMap<&str, i64> = BTreeMap::new();
    for listed in order.records.iter().filter(|l| l.3 == 0) {
        *counts.entry(&listed.0).or_default() += 1;
    }
    let restored = |(table, kept): (&str, i64)| Restored {
        order_key: order.key.clone(),
        table: table.to_owned(),
        records: 0,
        cells: 0,
        kept,
    };
    counts.into_iter().map(restored).collect()
}

fn restore_table(
    plan: &Plan,
    index: usize,
    table: &Table,
    order: &Order,
    (archived, of_order): (&[(&str, &Newest)], &OrderArchive),
) -> Result<Restored> {
    let version = order.redacted_version;
    let former = &(Former::load(plan, std::iter::once(version))?, version);
    let stored: Vec<&str> = archived.iter().map(|(k, _)| *k).collect();
    let live = gather::by_stored_keys(plan, index, &stored)?;
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
                let column = |name: &str| table.cells.iter().find(|c| c.archived_as == name);
                let values: Vec<(Ident, Option<String>)> = newest
                    .cells()
                    .filter_map(|cell| Some((column(cell.name)?.name.clone(), cell.text.map(str::to_owned))))
                    .collect();
                restored.cells += values.len() as i64;
                // Columns that are gone.
                restored.kept += (newest.cells().len() - values.len()) as i64;
                missing.push(values);
                keys.push(*key);
            }
            None => restored.kept += newest.cells().len() as i64,
            Some(record) => {
                let (row, kept) = restored_row(plan, former, index, record, (newest, of_order))?;
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
    // The mark of the order's own row speaks of the order, whatever was in the row.
    let own = own_row(plan, index, order, &keys)?;
    rows.extend(own.iter().map(|key| RowWrite {
        key,
        cells: vec![CellWrite::Leave; table.cells.len()],
    }));
    overwrite::insert(plan, table, &missing)
        .and_then(|()| overwrite::update(plan, table, &rows.iter().collect::<Vec<_>>(), Marks::TakeBack))
        .map_err(|e| retyped(plan, table, archived, e))?;
    let changes: Vec<records::Change<'_>> = keys
        .iter()
        .map(|key| records::Change {
            order_key: &order.key,
            table: &restored.table,
            record_key: key,
            fate: Some(Fate::Retrieved),
            witness: None,
        })
        .collect();
    records::write(plan, &changes)?;
    Ok(restored)
}

/// The key of the order's own row, if it has a mark and is not among the rows that are written anyway.
fn own_row(plan: &Plan, index: usize, order: &Order, written: &[&str]) -> Result<Option<Values>> {
    if index != 0 || plan.orders().marks.is_empty() || written.contains(&order.key.as_str()) {
        return Ok(None);
    }
    let key = key_parts(&order.key)?;
    let found = walk::by_key(plan, plan.orders(), std::slice::from_ref(&key), &[])?;
    Ok((!found.is_empty()).then_some(key))
}

/// The error of a write, or the better one if a column has got a type since that cannot hold what was archived.
fn retyped(plan: &Plan, table: &Table, archived: &[(&str, &Newest)], error: Error) -> Error {
    if error.is_cancel() || error.is_lock() {
        return error;
    }
    for cell in &table.cells {
        let name = cell.name.bare();
        let changed = archived
            .iter()
            .filter_map(|(_, newest)| newest.cell(&cell.archived_as))
            .filter(|a| a.type_name != cell.type_shown);
        for archived in changed {
            let read = cell.out(format!("CAST($1 AS {})", cell.type_shown));
            let kept = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
                let value = Arg::Typed(cell.type_oid, archived.text);
                sql::read(&format!("SELECT {read}"), &[value])?
                    .first()
                    .ok_or_else(|| Error::internal("no row"))?
                    .owned(0)
            });
            match kept {
                Ok(kept) if kept.as_deref() == archived.text => {}
                Err(e) if e.is_cancel() => return e,
                _ => {
                    let shown = table.relation.shown();
                    return Error::type_changed(&shown, name, archived.type_name, &cell.type_shown);
                }
            }
        }
    }
    error
}

/// What to write into one row, and how many archived cells stay out because the live cell is not what redaction left.
fn restored_row<'a>(
    plan: &Plan,
    former: &(Former, Option<i64>),
    index: usize,
    record: &'a LiveRecord,
    (newest, of_order): (&Newest, &OrderArchive),
) -> Result<(RowWrite<'a>, i64)> {
    let table = &plan.tables[index];
    let marks = marks(plan);
    let mut cells = vec![CellWrite::Leave; table.cells.len()];
    let mut written = 0;
    for (i, column) in table.cells.iter().enumerate() {
        let Some(archived) = newest.cell(&column.archived_as) else {
            continue;
        };
        let Some(live) = record.cells[i].as_ref() else { continue };
        let scrubbed = scrub::restored(plan, index, column, newest, of_order);
        let whole = match &scrubbed {
            Some((_, full)) => Some(full.clone()),
            None => newest.whole(archived.name, &marks),
        };
        let value = live.value.as_deref();
        if value == archived.text || value == whole.as_deref() {
            // Never overwritten, or already back.
            written += 1;
            continue;
        }
        let left = match table.treat(i, archived.text, &record.key)? {
            Some(Outcome::Text(text)) => value.is_some_and(|v| same(v, &text, column.padded)),
            Some(Outcome::Null) => value.is_none(),
            Some(Outcome::Sql) => live.value == live.computed,
            Some(Outcome::Scrub) => {
                let left = scrubbed.as_ref().map(|(left, _)| left);
                left.is_some_and(|left| value.is_some_and(|v| same(v, left, column.padded)))
            }
            None | Some(Outcome::Keep) => false,
        };
        if left || former.0.left(plan, former.1, record, i, &archived) {
            written += 1;
            let new = whole.map_or(NewValue::Null, |text| NewValue::Text(text.into()));
            cells[i] = CellWrite::Write { expected: value, new };
        }
    }
    Ok((
        RowWrite {
            key: &record.key,
            cells,
        },
        newest.cells().len() as i64 - written,
    ))
}

/// What stands in place of personal text.
pub(super) fn marks(plan: &Plan) -> Vec<&str> {
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
