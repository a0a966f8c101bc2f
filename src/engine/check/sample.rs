//! Which orders the trial takes. Each look is bounded: the first and the last orders by key, and for each table the rows
//! that differ most among those on some of its pages, found without reading the others.

use crate::domain::sample::{self, Sketch};
use crate::engine::flag;
use crate::engine::paging::{self, End, Range};
use crate::engine::plan::{Plan, Table};
use crate::engine::walk::{self, FIRST, Values};
use crate::pg::catalog::{self, Column};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Expr;
use crate::pg::identity::{Identity, act_as, as_extension};
use crate::pg::sql::{self, Arg};

/// Orders from each end of the orders table.
const FROM_EACH_END: usize = 50;
/// Rows of the orders table that are looked at from each end, where few of them are Amazon's.
const SLICES: &[i64] = &[200, 2_000, 5_000, 10_000];
/// Pages of each table from which unusual rows are taken, rows on them that are looked at, and rows that are taken.
const PAGES: i64 = 64;
const ROWS: i64 = 15_000;
const UNUSUAL: usize = 30;
/// Orders at most that a row is tried with.
const ORDERS_OF_A_ROW: u32 = 2;
/// Values whose stored form is larger are not looked for: the trial holds what it takes in memory, several times.
const LARGE: i64 = 4 * 1024 * 1024;

/// Keys of the orders to try, the most telling ones first.
///
/// # Errors
/// Errors of the server or of the owners' expressions.
pub fn orders(plan: &Plan) -> Result<Vec<Values>> {
    let mut lists = vec![from_end(plan, End::First)?, from_end(plan, End::Last)?];
    let mut unusual = Vec::new();
    for index in 0..plan.tables.len() {
        match orders_of_unusual(plan, index) {
            Ok(found) => unusual.extend(found),
            Err(e) if e.is_cancel() => return Err(e),
            // What is wrong with a link shows on the way down, in the policy's own direction.
            Err(_) => {}
        }
    }
    lists.push(flag::by_keys(plan, &unusual)?.into_iter().map(|f| f.key).collect());
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    let mut out: Vec<Values> = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for i in 0..longest {
        for key in lists.iter().filter_map(|l| l.get(i)) {
            if seen.insert(key.clone()) {
                out.push(key.clone());
            }
        }
    }
    Ok(out)
}

/// The first Amazon orders from one end of the table.
fn from_end(plan: &Plan, end: End) -> Result<Vec<Values>> {
    let mut out = Vec::new();
    let mut after: Option<Values> = None;
    for limit in SLICES {
        let range = Range {
            after: after.as_ref(),
            upto: None,
        };
        let (keys, next) = paging::page_of_keys(plan, end, range, *limit)?;
        out.extend(flag::by_keys(plan, &keys)?.into_iter().map(|f| f.key));
        after = next;
        if out.len() >= FROM_EACH_END || after.is_none() {
            break;
        }
    }
    out.truncate(FROM_EACH_END);
    Ok(out)
}

/// The orders of the unusual rows of a table, where indexes lead to them.
fn orders_of_unusual(plan: &Plan, index: usize) -> Result<Vec<Values>> {
    let entries: Vec<usize> = (0..plan.entries.len())
        .filter(|i| plan.entries[*i].table == index && leads_up(plan, *i))
        .collect();
    if entries.is_empty() {
        return Ok(Vec::new());
    }
    let table = &plan.tables[index];
    let keys = unusual(plan, table)?;
    let mut out = Vec::new();
    for at in entries {
        let entry = &plan.entries[at];
        if entry.parent.is_none() {
            out.extend(keys.iter().cloned());
            continue;
        }
        let links = walk::select_all(&entry.on_child);
        let starts = walk::by_key(plan, table, &keys, &links)?
            .into_iter()
            .map(|f| Ok((f.input, f.row.texts(FIRST..FIRST + links.len())?)))
            .collect::<Result<Vec<_>>>()?;
        let select = plan.orders().key_list();
        for found in walk::up(plan, at, starts, &select, Some(ORDERS_OF_A_ROW))? {
            out.push(found.row.texts(FIRST..FIRST + select.len())?);
        }
    }
    Ok(out)
}

/// Whether the way from an entry's rows up to the orders goes by indexes, and by one row at a time below the orders.
fn leads_up(plan: &Plan, index: usize) -> bool {
    let entry = &plan.entries[index];
    let Some(parent) = entry.parent else { return true };
    let table = &plan.tables[plan.entries[parent].table];
    let is_key = || {
        let holds = |column: &String| entry.on_parent.contains(&Expr::column(column));
        table.facts.keys.iter().any(|key| key.iter().all(holds))
    };
    table.has_index(&entry.on_parent) && (parent == 0 || is_key()) && leads_up(plan, parent)
}

/// Keys of the rows that differ most, among those on some pages of a table.
fn unusual(plan: &Plan, table: &Table) -> Result<Vec<Values>> {
    let Some(share) = share(table)? else {
        return Ok(Vec::new());
    };
    let name = &table.relation.name;
    let mut select = table.key_list();
    let keys = select.len();
    for cell in &table.cells {
        select.push(format!("pg_catalog.pg_column_size({name}.{})", cell.name));
    }
    let sizes = select.len();
    for column in table.facts.columns.iter().filter(|c| has_kinds(table, c)) {
        // Long values are no kinds, and need not be fetched.
        select.push(format!(
            "CASE WHEN pg_catalog.pg_column_size({name}.{column}) < 64 \
             THEN pg_catalog.hashtext(pg_catalog.format('%s', {name}.{column}) COLLATE pg_catalog.\"C\") END",
            column = column.name
        ));
    }
    let query = format!(
        "SELECT {} FROM {} AS {name} TABLESAMPLE SYSTEM ($1) REPEATABLE (0) LIMIT $2",
        select.join(", "),
        table.relation
    );
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::read(
            &query,
            &[Arg::Typed(pgrx::pg_sys::FLOAT4OID, Some(&share)), Arg::Int(ROWS)],
        )
    })
    .map_err(|e| e.at(&table.relation.shown()))?;
    let number = |text: Option<String>| {
        text.map(|t| t.parse().map_err(|_| Error::internal("a result column is no integer")))
            .transpose()
    };
    let mut sketches = Vec::with_capacity(rows.len());
    for row in &rows {
        let read = |range: std::ops::Range<usize>| -> Result<Vec<Option<i64>>> {
            row.texts(range)?.into_iter().map(number).collect()
        };
        sketches.push(Sketch {
            sizes: read(keys..sizes)?,
            kinds: read(sizes..select.len())?,
        });
    }
    let small: Vec<usize> = (0..rows.len())
        .filter(|i| sketches[*i].sizes.iter().flatten().sum::<i64>() <= LARGE)
        .collect();
    let sketches: Vec<Sketch> = small.iter().map(|i| sketches[*i].clone()).collect();
    sample::choose(&sketches, UNUSUAL)
        .into_iter()
        .map(|i| rows[small[i]].texts(0..keys))
        .collect()
}

/// Whether the values of a column may tell kinds of rows apart: it is no part of the key and none that is treated.
fn has_kinds(table: &Table, column: &Column) -> bool {
    use pgrx::pg_sys;
    let plain = matches!(
        column.base_type,
        pg_sys::BOOLOID
            | pg_sys::CHAROID
            | pg_sys::INT2OID
            | pg_sys::INT4OID
            | pg_sys::INT8OID
            | pg_sys::TEXTOID
            | pg_sys::VARCHAROID
            | pg_sys::BPCHAROID
    ) || catalog::is_enum(column.base_type);
    plain && table.key.iter().all(|(k, _)| *k != column.name) && table.cells.iter().all(|c| c.name != column.name)
}

/// How much of a table is looked at, in percent; `None` for an empty one.
fn share(table: &Table) -> Result<Option<String>> {
    let pages = as_extension(|| {
        let oids = catalog::with_partitions(table.relation.oid)?;
        let rows = sql::read(
            "SELECT COALESCE(pg_catalog.sum(pg_catalog.pg_relation_size(t::pg_catalog.oid::pg_catalog.regclass)), 0)::int8 \
                / pg_catalog.current_setting('block_size')::int8 FROM pg_catalog.unnest($1) AS t",
            &[Arg::Ints(oids.iter().map(|r| i64::from(u32::from(r.oid))).collect())],
        )?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.int(0)
    })?;
    Ok((pages > 0).then(|| format!("{:.6}", (PAGES as f64 * 100.0 / pages as f64).min(100.0))))
}
