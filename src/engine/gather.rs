//! Reads the rows of a batch of orders as they are now.

use std::collections::HashMap;

use super::assign;
use super::history;
use super::overwrite::{CellWrite, NewValue};
use super::plan::{Plan, Table};
use super::records::{Fate, Listed, Stored};
use super::walk::{self, FIRST, Found, Hop, Values, by_key, hop, key_parts, key_text, own_key};
use crate::domain::treatment::Outcome;
use crate::pg::error::Result;
use crate::pg::sql::Text;

/// One treated column of a row.
#[derive(Debug, Clone)]
pub struct LiveCell {
    /// Its text form; `None` is NULL.
    pub value: Option<Text>,
    /// What a treatment by expression, or one that scrubs, makes of it.
    pub computed: Option<Text>,
}

/// A moment that has to pass `redact_after`, with the entry that says so.
pub type NotBefore = Option<(String, usize)>;

/// A row that holds, or may hold, PII of an order.
#[derive(Clone)]
pub struct LiveRecord {
    /// Position of the order in the batch.
    pub order: usize,
    pub table: usize,
    pub entry: usize,
    pub key: Values,
    pub key_text: String,
    /// One for each cell of the table; `None` where no entry that reached the row treats the column.
    pub cells: Vec<Option<LiveCell>>,
    /// The row may not be redacted before this has passed `redact_after`.
    pub not_before: NotBefore,
    /// What its entry's columns must equal for the row to belong to the order, where that is not the row's own key.
    pub link: Option<Values>,
    /// Known by its stored key alone: the links lead elsewhere by now.
    pub stored: bool,
    /// It was redacted, although its order is not yet.
    pub early: bool,
}

impl LiveRecord {
    /// The cells that hold PII, with what must become of them.
    ///
    /// # Errors
    /// A treatment cannot be applied to a cell; names the column, not the value.
    pub fn pii<'p>(&self, plan: &'p Plan) -> Result<Vec<(usize, Outcome<'p>)>> {
        self.pii_in(&plan.tables[self.table])
    }

    /// [`LiveRecord::pii`] of a row of this table.
    ///
    /// # Errors
    /// As [`LiveRecord::pii`].
    pub fn pii_in<'t>(&self, table: &'t Table) -> Result<Vec<(usize, Outcome<'t>)>> {
        let mut out = Vec::with_capacity(self.cells.len());
        for (i, cell) in self.cells.iter().enumerate() {
            let Some(cell) = cell else { continue };
            match table.treat(i, cell.value.as_deref(), &self.key)? {
                // A row that goes as a whole: all of it is archived, NULLs too, or they came back as their defaults.
                None => out.push((i, Outcome::Null)),
                Some(Outcome::Keep) => {}
                Some(Outcome::Sql) if cell.computed == cell.value => {}
                Some(Outcome::Scrub) => {
                    if let Some(scrubbed) = cell.computed.as_deref().filter(|c| Some(*c) != cell.value.as_deref()) {
                        out.push((i, Outcome::Text(scrubbed.to_owned().into())));
                    }
                }
                Some(outcome) => out.push((i, outcome)),
            }
        }
        Ok(out)
    }

    /// The cells as they are to be compared and written. A cell with PII must hold what `expected` says of its position
    /// and live value, and gets its outcome; the others keep what they hold. `None` when `expected` says so of a cell.
    ///
    /// # Errors
    /// As `expected`.
    pub fn writes<'a>(
        &'a self,
        pii: &'a [(usize, Outcome<'_>)],
        expected: impl Fn(usize, Option<&'a str>) -> Result<Option<Option<&'a str>>>,
    ) -> Result<Option<Vec<CellWrite<'a>>>> {
        let mut cells = Vec::with_capacity(self.cells.len());
        let mut wanted = pii.iter().peekable();
        for (i, live) in self.cells.iter().enumerate() {
            let live = live.as_ref().map(|c| c.value.as_deref());
            let Some((_, outcome)) = wanted.next_if(|(at, _)| *at == i) else {
                cells.push(live.map_or(CellWrite::Leave, CellWrite::Compare));
                continue;
            };
            let Some(expected) = expected(i, live.flatten())? else {
                return Ok(None);
            };
            let new = NewValue::from(outcome);
            cells.push(CellWrite::Write { expected, new });
        }
        Ok(Some(cells))
    }
}

impl Gathered {
    /// How much text it holds.
    pub fn bytes(&self) -> usize {
        let cells = self.records.iter().flat_map(|r| r.cells.iter().flatten());
        cells.filter_map(|c| c.value.as_deref()).map(str::len).sum()
    }

    /// Whether an order of the batch is neither there nor has left anything behind.
    pub fn is_gone(&self, order: usize) -> bool {
        !self.exists[order] && self.records.iter().all(|r| r.order != order)
    }
}

/// What was found for a batch.
pub struct Gathered {
    /// For each order of the batch, whether its row still exists.
    pub exists: Vec<bool>,
    pub records: Vec<LiveRecord>,
}

/// Which result columns of an entry's statement mean what.
struct Shape {
    select: Vec<String>,
    keys: usize,
    cells: Vec<(usize, Option<usize>)>,
    links: Vec<(usize, std::ops::Range<usize>)>,
    not_before: Option<usize>,
}

fn shape(plan: &Plan, index: usize) -> Shape {
    let entry = &plan.entries[index];
    let table = &plan.tables[entry.table];
    let mut select = table.key_list();
    let keys = select.len();
    let mut cells = Vec::new();
    for cell in &entry.cells {
        let column = &table.cells[*cell];
        select.push(column.read(&column.name));
        let computed = column.expression.as_ref().map(|e| {
            // By way of the column's own type, so that both texts are its output function's.
            select.push(column.read(format!("CAST({e} AS {})", column.type_shown)));
            select.len() - 1
        });
        cells.push((*cell, computed));
    }
    let mut links = Vec::new();
    for (child_index, child) in plan.entries.iter().enumerate() {
        if child.parent == Some(index) {
            let from = select.len();
            select.extend(walk::select_all(&child.on_parent));
            links.push((child_index, from..select.len()));
        }
    }
    let not_before = entry.not_before.as_ref().map(|sql| {
        select.push(sql.clone());
        select.len() - 1
    });
    Shape {
        select,
        keys,
        cells,
        links,
        not_before,
    }
}

/// Reads everything that the policy reaches from these orders, and what they once reached.
///
/// # Errors
/// Errors of the server or of the owners' expressions.
pub fn gather(plan: &Plan, orders: &[Values], stored: &Stored) -> Result<Gathered> {
    let (mut gathered, known) = walk_down(plan, orders.len(), Start::Keys(orders))?;
    add_stored(plan, stored, &known, &mut gathered)?;
    for record in &mut gathered.records {
        let fate = stored.fate(record.order, &plan.tables[record.table].archived_as, &record.key_text);
        record.early = fate == Some(Fate::Redacted);
    }
    history::leave_own(plan, &mut gathered.records)?;
    Ok(gathered)
}

/// Where the way down begins.
pub enum Start<'a> {
    /// At the rows of orders. Where one is gone, at what bears its key.
    Keys(&'a [Values]),
    /// At the links of rows that are gone: order, entry, values.
    Links(Vec<(usize, usize, Values)>),
}

/// Reads everything that the policy reaches.
///
/// # Errors
/// As [`gather`].
pub fn reach(plan: &Plan, orders: usize, start: Start<'_>) -> Result<Gathered> {
    let (mut gathered, _) = walk_down(plan, orders, start)?;
    history::leave_own(plan, &mut gathered.records)?;
    Ok(gathered)
}

/// Records by order, table and key.
type Known = HashMap<(usize, usize, String), usize>;

fn walk_down(plan: &Plan, orders: usize, start: Start<'_>) -> Result<(Gathered, Known)> {
    let mut gathered = Gathered {
        exists: vec![false; orders],
        records: Vec::new(),
    };
    let mut known = Known::new();
    // For each entry: the orders and link values that lead into it, and how young the rows are that they come from.
    let mut pending: Vec<Vec<((usize, NotBefore), Values)>> = plan.entries.iter().map(|_| Vec::new()).collect();
    let orders: &[Values] = match start {
        Start::Keys(keys) => keys,
        Start::Links(links) => {
            for (order, entry, link) in links {
                if plan.generic.is_empty() || !assign::is_generic(plan, entry, &link) {
                    pending[entry].push(((order, None), link));
                }
            }
            &[]
        }
    };
    for index in 0..plan.entries.len() {
        let shape = shape(plan, index);
        let entry = &plan.entries[index];
        let table = &plan.tables[entry.table];
        let (origins, inputs): (Vec<(usize, NotBefore)>, Vec<Values>) =
            std::mem::take(&mut pending[index]).into_iter().unzip();
        let found = if entry.parent.is_none() {
            by_key(plan, table, orders, &shape.select)?
        } else {
            hop(plan, &Hop::into_entry(plan, entry, &shape.select), &inputs)?
        };
        let is_own_key = entry.filter.is_none() && own_key(table, entry).is_some();
        for Found { input, row } in found {
            let at = |i: usize| FIRST + i;
            let (order, mut not_before) = origins.get(input).cloned().unwrap_or((input, None));
            if entry.parent.is_none() {
                gathered.exists[order] = true;
            }
            if let Some(column) = shape.not_before
                && let Some(text) = row.owned(at(column))?
                && not_before.as_ref().is_none_or(|(known, _)| *known < text)
            {
                not_before = Some((text, index));
            }
            for (child, range) in &shape.links {
                let link = row.texts(at(range.start)..at(range.end))?;
                // The generic customer is nobody's personal data.
                if plan.generic.is_empty() || !assign::is_generic(plan, *child, &link) {
                    pending[*child].push(((order, not_before.clone()), link));
                }
            }
            let is_marked = entry.parent.is_none() && !table.marks.is_empty();
            if entry.cells.is_empty() && shape.not_before.is_none() && !is_marked {
                continue;
            }
            let key = row.texts(at(0)..at(shape.keys))?;
            let text = key_text(&key)?;
            let slot = *known.entry((order, entry.table, text.clone())).or_insert_with(|| {
                gathered.records.push(LiveRecord {
                    order,
                    table: entry.table,
                    entry: index,
                    key,
                    key_text: text,
                    cells: vec![None; table.cells.len()],
                    not_before: None,
                    link: inputs.get(input).filter(|_| !is_own_key).cloned(),
                    stored: false,
                    early: false,
                });
                gathered.records.len() - 1
            });
            let record = &mut gathered.records[slot];
            for (position, (cell, computed)) in shape.cells.iter().enumerate() {
                let column = shape.keys
                    + shape.cells[..position]
                        .iter()
                        .map(|(_, c)| 1 + usize::from(c.is_some()))
                        .sum::<usize>();
                record.cells[*cell] = Some(LiveCell {
                    value: row.shared_or_null(at(column))?,
                    computed: computed.map(|c| row.shared_or_null(at(c))).transpose()?.flatten(),
                });
            }
            if let Some((moment, by)) = not_before
                && record.not_before.as_ref().is_none_or(|(known, _)| *known < moment)
            {
                record.not_before = Some((moment, by));
            }
        }
        if entry.parent.is_none() {
            follow_keys(plan, orders, &gathered.exists, &mut pending);
        }
    }
    Ok((gathered, known))
}

/// What leads on from orders whose row is gone: links that are made of their key alone.
fn follow_keys(plan: &Plan, orders: &[Values], exists: &[bool], pending: &mut [Vec<((usize, NotBefore), Values)>]) {
    if exists.iter().all(|exists| *exists) {
        return;
    }
    for (entry, pending) in pending.iter_mut().enumerate() {
        let Some(parts) = plan.key_link(entry) else { continue };
        for (order, key) in orders.iter().enumerate().filter(|(i, _)| !exists[*i]) {
            let link = parts.iter().map(|p| key.get(*p).cloned().flatten()).collect();
            pending.push(((order, None), link));
        }
    }
}

/// Adds the records that these orders once led to and that are not done: a link that was changed, or a deleted order,
/// leaves no personal data behind.
fn add_stored(plan: &Plan, stored: &Stored, known: &Known, gathered: &mut Gathered) -> Result<()> {
    // For each table: order, entry, key.
    let mut missing: Vec<Vec<(usize, usize, &str)>> = plan.tables.iter().map(|_| Vec::new()).collect();
    for (order, Listed(table, key, alias, _)) in stored.open() {
        let Some(index) = plan.tables.iter().position(|t| t.archived_as == *table) else {
            continue;
        };
        if known.contains_key(&(order, index, key.clone())) {
            continue;
        }
        let entry = plan
            .entries
            .iter()
            .position(|e| e.table == index && e.alias == *alias)
            .or_else(|| plan.entries.iter().position(|e| e.table == index));
        if let Some(entry) = entry {
            missing[index].push((order, entry, key));
        }
    }
    for (index, missing) in missing.into_iter().enumerate().filter(|(_, m)| !m.is_empty()) {
        let stored: Vec<&str> = missing.iter().map(|(_, _, key)| *key).collect();
        for (record, (order, entry, _)) in by_stored_keys(plan, index, &stored)?.into_iter().zip(missing) {
            let Some(mut record) = record else { continue };
            record.order = order;
            record.entry = entry;
            let treated = &plan.entries[entry].cells;
            for (i, cell) in record.cells.iter_mut().enumerate() {
                cell.take_if(|_| !treated.contains(&i));
            }
            gathered.records.push(record);
        }
    }
    Ok(())
}

/// The rows of a table as they are now, by their stored keys, with every cell; of order and entry 0.
///
/// # Errors
/// As [`gather`].
pub fn by_stored_keys(plan: &Plan, index: usize, stored: &[&str]) -> Result<Vec<Option<LiveRecord>>> {
    let mut found = rows_of(plan, &plan.tables[index], stored)?;
    for record in found.iter_mut().flatten() {
        record.table = index;
    }
    Ok(found)
}

/// [`by_stored_keys`] of any table; of table 0.
///
/// # Errors
/// As [`gather`].
pub fn rows_of(plan: &Plan, table: &Table, stored: &[&str]) -> Result<Vec<Option<LiveRecord>>> {
    let keys = stored.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
    let mut select: Vec<String> = table.cells.iter().map(|c| c.read(&c.name)).collect();
    let plain = select.len();
    select.extend(table.cells.iter().map(|c| {
        c.expression.as_ref().map_or_else(
            || "NULL".to_owned(),
            |e| c.read(format!("CAST({e} AS {})", c.type_shown)),
        )
    }));
    let mut out: Vec<Option<LiveRecord>> = stored.iter().map(|_| None).collect();
    for found in by_key(plan, table, &keys, &select)? {
        let cells = (0..plain)
            .map(|i| {
                Ok(Some(LiveCell {
                    value: found.row.shared_or_null(FIRST + i)?,
                    computed: found.row.shared_or_null(FIRST + plain + i)?,
                }))
            })
            .collect::<Result<Vec<_>>>()?;
        out[found.input] = Some(LiveRecord {
            order: 0,
            table: 0,
            entry: 0,
            key: keys[found.input].clone(),
            key_text: stored[found.input].to_owned(),
            cells,
            not_before: None,
            link: None,
            stored: true,
            early: false,
        });
    }
    Ok(out)
}
