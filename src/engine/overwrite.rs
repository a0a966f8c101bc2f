//! The statements that write to the user's rows. Each compares every cell with the value that it is expected to hold,
//! and what it returns with what was asked.

use std::borrow::Cow;

use super::plan::{Aged, CellColumn, Entry, Plan, Table};
use super::walk::{BATCH, ORDINAL, Values, batch_column, batch_rows, columns, link_condition};
use crate::domain::treatment::Outcome;
use crate::pg::catalog::{self, Compare};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{Identity, KEYED, act_as, as_extension};
use crate::pg::prepared::{self, KEYED_FOR_A_WHILE};
use crate::pg::sql::{self, Arg, Row};
use crate::pg::subxact::trial;
use crate::pg::trigger::EngineWrite;

/// The value that a cell gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewValue<'a> {
    Null,
    Text(Cow<'a, str>),
    /// What the column's expression gives.
    Computed,
}

impl<'a> From<&'a Outcome<'_>> for NewValue<'a> {
    fn from(outcome: &'a Outcome<'_>) -> Self {
        match outcome {
            Outcome::Text(text) => Self::Text(Cow::Borrowed(text)),
            Outcome::Sql => Self::Computed,
            Outcome::Null | Outcome::Keep | Outcome::Scrub => Self::Null,
        }
    }
}

/// What happens to one cell of a row.
#[derive(Debug, Clone)]
pub enum CellWrite<'a> {
    /// No entry of the policy that reaches the row treats it.
    Leave,
    /// It must hold this, and keeps it.
    Compare(Option<&'a str>),
    /// It must hold `expected`, and gets `new`.
    Write {
        expected: Option<&'a str>,
        new: NewValue<'a>,
    },
}

/// One row to be written.
pub struct RowWrite<'a> {
    pub key: &'a Values,
    pub cells: Vec<CellWrite<'a>>,
}

/// What becomes of the columns that say that a row is redacted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    Set,
    /// They get what a new row has.
    TakeBack,
}

/// Composes a statement's parameters, numbering them as they come.
#[derive(Default)]
struct Parameters<'a> {
    args: Vec<Arg<'a>>,
    /// Positions of those that hold one element a row.
    arrays: Vec<usize>,
}

impl<'a> Parameters<'a> {
    /// Adds an array, giving the name under which the statement sees its elements.
    fn add(&mut self, arg: Arg<'a>) -> String {
        self.arrays.push(self.args.len());
        self.args.push(arg);
        format!("{BATCH}.{}", batch_column(self.args.len() - 1))
    }

    /// Adds one value, giving its name.
    fn one(&mut self, arg: Arg<'a>) -> String {
        self.args.push(arg);
        format!("${}", self.args.len())
    }

    /// Adds the values of a column, one a row, each read by its type's input function: a cast from text could be the
    /// owner's own.
    fn values(&mut self, cell: &CellColumn, values: Vec<Option<&'a str>>) -> String {
        if !cell.alone {
            return self.add(Arg::Array(cell.type_oid, values));
        }
        // Each distinct value is a parameter of its own, the rows say which one they take.
        let mut distinct: Vec<&str> = values.iter().copied().flatten().collect();
        distinct.sort_unstable();
        distinct.dedup();
        let choices = values
            .iter()
            .map(|v| v.and_then(|v| distinct.binary_search(&v).ok()).map_or(-1, |i| i as i64))
            .collect();
        let choice = self.add(Arg::Ints(choices));
        let cases: String = distinct
            .into_iter()
            .enumerate()
            .map(|(i, v)| {
                let value = self.one(Arg::Typed(cell.type_oid, Some(v)));
                format!(" WHEN {choice} OPERATOR(pg_catalog.=) {i} THEN {value}")
            })
            .collect();
        format!(
            "CASE WHEN {choice} OPERATOR(pg_catalog.<) 0 THEN CAST(NULL AS {}){cases} END",
            sql::type_name(cell.type_oid)
        )
    }

    /// The arrays as the rows of a batch.
    fn rows(&self) -> String {
        batch_rows(self.arrays.iter().copied())
    }
}

/// The condition that a batch's keys name the row.
fn key_condition<'a>(
    table: &Table,
    keys: impl Iterator<Item = &'a Values> + Clone,
    parameters: &mut Parameters<'a>,
) -> Vec<String> {
    table
        .key
        .iter()
        .enumerate()
        .map(|(i, (name, oid))| {
            let values = keys.clone().map(|k| k.get(i).and_then(Option::as_deref)).collect();
            format!(
                "{}.{name} {} {}",
                table.relation.name,
                catalog::operator(Compare::Equal, *oid, *oid),
                parameters.add(Arg::Array(*oid, values))
            )
        })
        .collect()
}

/// Locks rows, leaving out those that somebody else has locked. Returns the positions of the locked ones.
///
/// `exclusively` also keeps out foreign keys that would begin to refer to the row. With `links`, a row is locked only while
/// the entry still leads to it from these values.
///
/// # Errors
/// Errors of the server.
pub fn lock<'k>(
    plan: &Plan,
    table: &Table,
    keys: impl ExactSizeIterator<Item = &'k Values> + Clone,
    links: Option<(&Entry, &[&'k Values])>,
    exclusively: bool,
) -> Result<Vec<bool>> {
    let mut locked = vec![false; keys.len()];
    if locked.is_empty() {
        return Ok(locked);
    }
    let mut parameters = Parameters::default();
    let mut condition = key_condition(table, keys, &mut parameters);
    if let Some((entry, links)) = links {
        let (own, types) = (&entry.on_child_types, &entry.on_parent_types);
        let first = parameters.args.len();
        condition.extend(link_condition(
            &entry.on_child,
            own,
            types,
            entry.filter.as_ref(),
            first,
        ));
        for array in columns(types, links.iter().copied()) {
            parameters.add(array);
        }
    }
    take_locks(plan, table, &parameters, &condition, exclusively, &mut locked)?;
    Ok(locked)
}

/// Locks rows as [`lock`] does, those only whose moment is not after `upto` and that meet their condition still.
///
/// # Errors
/// Errors of the server or of the owner's expressions.
pub fn lock_old(plan: &Plan, aged: &Aged, keys: &[&Values], upto: &str) -> Result<Vec<bool>> {
    let mut locked = vec![false; keys.len()];
    if locked.is_empty() {
        return Ok(locked);
    }
    let mut parameters = Parameters::default();
    let mut condition = key_condition(&aged.table, keys.iter().copied(), &mut parameters);
    let upto = parameters.one(Arg::Typed(aged.at_type, Some(upto)));
    let not_after = catalog::operator(Compare::NotGreater, aged.at_type, aged.at_type);
    condition.push(format!("{} {not_after} {upto}", aged.at));
    condition.extend(aged.filter.iter().map(ToString::to_string));
    let table = &aged.table;
    take_locks(plan, table, &parameters, &condition, table.delete, &mut locked)?;
    Ok(locked)
}

fn take_locks(
    plan: &Plan,
    table: &Table,
    parameters: &Parameters<'_>,
    condition: &[String],
    exclusively: bool,
    locked: &mut [bool],
) -> Result<()> {
    let strength = if exclusively { "UPDATE" } else { "NO KEY UPDATE" };
    let query = format!(
        "SELECT {ORDINAL} FROM {} JOIN {} AS {name} ON {} FOR {strength} OF {name} SKIP LOCKED",
        parameters.rows(),
        table.relation,
        condition.join(" AND "),
        name = table.relation.name,
    );
    let found = by_key(plan, table, &query, &parameters.args).map_err(|e| e.at(&table.relation.shown()))?;
    for row in found {
        mark(locked, row.int(0)?)?;
    }
    Ok(())
}

/// Whether somebody holds a lock on one of the policy's tables that keeps everybody from writing to it.
///
/// # Errors
/// Errors of the server, a lock that is not to be had apart.
pub fn is_locked(plan: &Plan) -> Result<bool> {
    for table in &plan.tables {
        if is_table_locked(plan, table)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// [`is_locked`], of one table.
///
/// # Errors
/// As [`is_locked`].
pub fn is_table_locked(plan: &Plan, table: &Table) -> Result<bool> {
    let probe = format!("LOCK TABLE {} IN ROW EXCLUSIVE MODE NOWAIT", table.relation);
    let free = trial(|| {
        act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
            sql::execute(&probe, &[])
        })
    });
    match free {
        Ok(_) => Ok(false),
        Err(e) if e.is_lock() => Ok(true),
        Err(e) => Err(e),
    }
}

/// Runs a statement that finds rows of a table by its key.
fn by_key(plan: &Plan, table: &Table, query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    let owner = Identity::Owner(table.owner);
    if table.keeps_plans() {
        return act_as(owner, &plan.search_path, KEYED_FOR_A_WHILE, || {
            prepared::for_a_while(query, args)
        });
    }
    act_as(owner, &plan.search_path, KEYED, || sql::write(query, args))
}

fn mark(flags: &mut [bool], ordinal: i64) -> Result<()> {
    let slot = usize::try_from(ordinal)
        .ok()
        .and_then(|n| n.checked_sub(1))
        .and_then(|n| flags.get_mut(n));
    *slot.ok_or_else(|| Error::internal("an ordinality is out of range"))? = true;
    Ok(())
}

/// What becomes of one cell in the rows of a statement.
struct Column {
    /// The name under which the statement sees each row's state; none where all have the same.
    state: Option<String>,
    /// That a row's cell holds what it is expected to hold.
    condition: String,
}

fn column<'a>(table: &Table, rows: &[&'a RowWrite<'_>], i: usize, parameters: &mut Parameters<'a>) -> Column {
    let states: Vec<&str> = rows.iter().map(|r| state(&r.cells[i])).collect();
    let expected = rows
        .iter()
        .map(|r| match &r.cells[i] {
            CellWrite::Leave => None,
            CellWrite::Compare(v) | CellWrite::Write { expected: v, .. } => *v,
        })
        .collect();
    let expected = parameters.add(Arg::Texts(expected));
    let cell = &table.cells[i];
    let live = cell.out(format!("{}.{}", table.relation.name, cell.name));
    let holds = format!("{live} IS NOT DISTINCT FROM {expected} COLLATE pg_catalog.\"C\"");
    if states.windows(2).all(|w| w[0] == w[1]) {
        return Column {
            state: None,
            condition: holds,
        };
    }
    let state = parameters.add(Arg::Texts(states.into_iter().map(Some).collect()));
    Column {
        condition: format!("({state} = '-' OR {holds})"),
        state: Some(state),
    }
}

fn state(cell: &CellWrite<'_>) -> &'static str {
    match cell {
        CellWrite::Leave => "-",
        CellWrite::Compare(_) => "c",
        CellWrite::Write {
            new: NewValue::Computed,
            ..
        } => "x",
        CellWrite::Write { .. } => "w",
    }
}

/// The text that a cell gets; none for NULL and for what an expression gives.
fn new_text<'a>(cell: &'a CellWrite<'_>) -> Option<&'a str> {
    match cell {
        CellWrite::Write {
            new: NewValue::Text(t), ..
        } => Some(t),
        _ => None,
    }
}

/// Overwrites cells of rows that still hold what is expected, and their marks.
///
/// # Errors
/// A row that did not come back (changed, or gone), that the table's own triggers wrote differently, or that a
/// constraint refused: nothing of the batch is kept.
pub fn update(plan: &Plan, table: &Table, rows: &[&RowWrite<'_>], marks: Marks) -> Result<()> {
    let written: Vec<usize> = (0..table.cells.len())
        .filter(|i| rows.iter().any(|r| matches!(r.cells[*i], CellWrite::Write { .. })))
        .collect();
    if rows.is_empty() || (written.is_empty() && table.marks.is_empty()) {
        return Ok(());
    }
    let name = &table.relation.name;
    let mut parameters = Parameters::default();
    let mut condition = key_condition(table, rows.iter().map(|r| r.key), &mut parameters);
    let mut set = Vec::new();
    let mut check = Vec::new();
    for i in (0..table.cells.len()).filter(|i| rows.iter().any(|r| !matches!(r.cells[*i], CellWrite::Leave))) {
        let Column {
            state: each,
            condition: holds,
        } = column(table, rows, i, &mut parameters);
        condition.push(holds);
        if !written.contains(&i) {
            continue;
        }
        let cell = &table.cells[i];
        let texts: Vec<Option<&str>> = rows
            .iter()
            .filter(|r| state(&r.cells[i]) == "w")
            .map(|r| new_text(&r.cells[i]))
            .collect();
        // A placeholder is the same for every row.
        let value = if texts.windows(2).all(|w| w[0] == w[1]) {
            match texts.first().copied().flatten() {
                Some(text) => parameters.one(Arg::Typed(cell.type_oid, Some(text))),
                // A cast checks what a domain says of NULL, a parameter does not.
                None => format!("CAST(NULL AS {})", sql::type_name(cell.type_oid)),
            }
        } else {
            parameters.values(cell, rows.iter().map(|r| new_text(&r.cells[i])).collect())
        };
        let column = format!("{name}.{}", cell.name);
        let computed = cell
            .expression
            .as_ref()
            .map_or_else(|| "NULL".to_owned(), |e| format!("CAST({e} AS {})", cell.type_shown));
        let trim = |e: String| {
            if cell.padded {
                format!("pg_catalog.rtrim({e}, ' ')")
            } else {
                e
            }
        };
        let same = |new: &str| format!("{} IS NOT DISTINCT FROM {}", cell.out(&column), cell.out(new));
        let same_text = format!(
            "{} IS NOT DISTINCT FROM {}",
            trim(cell.out(&column)),
            trim(cell.out(&value))
        );
        match each {
            None if texts.is_empty() => {
                set.push(format!("{} = {computed}", cell.name));
                check.push(same(&computed));
            }
            None => {
                set.push(format!("{} = {value}", cell.name));
                check.push(same_text);
            }
            Some(each) => {
                set.push(format!(
                    "{} = CASE {each} WHEN 'w' THEN {value} WHEN 'x' THEN {computed} ELSE {column} END",
                    cell.name
                ));
                check.push(format!(
                    "CASE {each} WHEN 'w' THEN {same_text} WHEN 'x' THEN {} ELSE true END",
                    same(&computed)
                ));
            }
        }
    }
    // What they get is not compared: it may be the clock's.
    set.extend(table.marks.iter().map(|m| match marks {
        Marks::Set => format!("{} = {}", m.name, m.expression),
        Marks::TakeBack => format!("{} = DEFAULT", m.name),
    }));
    check.push("true".to_owned());
    let query = format!(
        "UPDATE {} AS {name} SET {} FROM {} WHERE {} RETURNING {ORDINAL}, {}",
        table.relation,
        set.join(", "),
        parameters.rows(),
        condition.join(" AND "),
        check.join(" AND "),
    );
    run(plan, table, rows.len(), &query, &parameters.args)
}

/// Removes rows that still hold what is expected.
///
/// # Errors
/// As [`update`].
pub fn delete(plan: &Plan, table: &Table, rows: &[&RowWrite<'_>]) -> Result<()> {
    let mut parameters = Parameters::default();
    let mut condition = key_condition(table, rows.iter().map(|r| r.key), &mut parameters);
    // Of a row that was not archived only the key is compared.
    for i in (0..table.cells.len()).filter(|i| {
        rows.iter()
            .any(|r| !matches!(r.cells.get(*i), None | Some(CellWrite::Leave)))
    }) {
        condition.push(column(table, rows, i, &mut parameters).condition);
    }
    let query = format!(
        "DELETE FROM {} AS {} USING {} WHERE {} RETURNING {ORDINAL}, true",
        table.relation,
        table.relation.name,
        parameters.rows(),
        condition.join(" AND "),
    );
    run(plan, table, rows.len(), &query, &parameters.args)
}

/// Puts rows back that redaction removed, identity values included.
///
/// # Errors
/// As [`update`].
pub fn insert(plan: &Plan, table: &Table, rows: &[Vec<(Ident, Option<String>)>]) -> Result<()> {
    for row in rows {
        let mut parameters = Parameters::default();
        let mut names = Vec::new();
        let mut values = Vec::new();
        for (name, value) in row {
            let Some(cell) = table.cells.iter().find(|c| c.name == *name) else {
                continue;
            };
            names.push(name.to_string());
            values.push(parameters.one(Arg::Typed(cell.type_oid, value.as_deref())));
        }
        let query = format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({}) RETURNING 1, true",
            table.relation,
            names.join(", "),
            values.join(", "),
        );
        run(plan, table, 1, &query, &parameters.args)?;
    }
    Ok(())
}

fn run(plan: &Plan, table: &Table, rows: usize, query: &str, args: &[Arg<'_>]) -> Result<()> {
    let shown = table.relation.shown();
    let mut oids = vec![table.relation.oid];
    if table.facts.kind == 'p' {
        oids = as_extension(|| catalog::with_partitions(table.relation.oid))?
            .iter()
            .map(|p| p.oid)
            .collect();
    }
    let _ours = EngineWrite::begin(&oids);
    let returned = by_key(plan, table, query, args).map_err(|e| e.at(&shown))?;
    let mut seen = vec![false; rows];
    for row in &returned {
        if !row.bool(1)? {
            return Err(Error::not_overwritten(format!(
                "{shown}: a trigger of the table writes something else than it was given"
            ))
            .hint(
                "Let the trigger pass the placeholder unchanged, or choose a treatment that it does not change; an expression \
                 must give the same again for a row that it has treated.",
            ));
        }
        mark(&mut seen, row.int(0)?)?;
    }
    if seen.iter().all(|s| *s) {
        Ok(())
    } else {
        Err(Error::not_overwritten(format!(
            "{shown}: a row changed, or a trigger kept it from being written"
        ))
        .hint("It is tried again by itself."))
    }
}
