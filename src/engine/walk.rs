//! Ways along a policy's links, one statement a link, each as the owner of the table that it reads. Values cross
//! between owners as text in arrays; nothing is joined across them.

mod together;

use std::collections::HashSet;

use pgrx::pg_sys;

use super::plan::{Entry, Plan, Table};
use crate::pg::catalog::{self, Compare};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{Expr, Ident};
use crate::pg::identity::{Identity, KEYED, act_as};
use crate::pg::prepared::{self, KEYED_FOR_A_WHILE};
use crate::pg::sql::{self, Arg, Row};

/// Key parts, or the values of a link, as text.
pub type Values = Vec<Option<String>>;

/// A row that a statement found for one of its inputs. Its selected columns start at [`FIRST`].
pub struct Found {
    /// Position in the list of inputs.
    pub input: usize,
    pub row: Row,
}

/// The first selected column of a found row.
pub const FIRST: usize = 1;

/// What to look for in one table.
pub struct Hop<'a> {
    pub table: &'a Table,
    /// Expressions over the table's row that must equal the inputs.
    pub on: &'a [Expr],
    /// Types of these expressions.
    pub own_types: &'a [pg_sys::Oid],
    /// Types of the inputs.
    pub types: &'a [pg_sys::Oid],
    pub filter: Option<&'a Expr>,
    /// SQL over the table's row.
    pub select: &'a [String],
    /// Rows at most for each input; there may be more where all are found at once.
    pub limit: Option<u32>,
}

impl<'a> Hop<'a> {
    /// From the rows above an entry to its own.
    pub fn into_entry(plan: &'a Plan, entry: &'a Entry, select: &'a [String]) -> Self {
        Self {
            table: &plan.tables[entry.table],
            on: &entry.on_child,
            own_types: &entry.on_child_types,
            types: &entry.on_parent_types,
            filter: entry.filter.as_ref(),
            select,
            limit: None,
        }
    }
}

/// The alias of a batch's arrays in our statements; no column of the user's can be called so by accident.
pub const BATCH: &str = "\"amazon_pii.batch\"";

/// The name of the `i`th array of a batch.
pub fn batch_column(i: usize) -> Ident {
    Ident::new(format!("amazon_pii.{i}"))
}

/// The position of a batch's row, from 1; no column of the user's is called so by accident either.
pub const ORDINAL: &str = "\"amazon_pii.batch\".\"amazon_pii.n\"";

/// `ROWS FROM (unnest($1), …) WITH ORDINALITY AS batch (…)` for the parameters at these positions, `$1` being at 0.
pub fn batch_rows(positions: impl Iterator<Item = usize> + Clone) -> String {
    let arrays: Vec<String> = positions
        .clone()
        .map(|i| format!("pg_catalog.unnest(${})", i + 1))
        .collect();
    let names: Vec<String> = positions.map(|i| batch_column(i).to_string()).collect();
    format!(
        "ROWS FROM ({}) WITH ORDINALITY AS {BATCH} ({}, \"amazon_pii.n\")",
        arrays.join(", "),
        names.join(", ")
    )
}

/// Turns rows of values into one array a column.
pub fn columns<'a>(types: &[pg_sys::Oid], rows: impl Iterator<Item = &'a Values> + Clone) -> Vec<Arg<'a>> {
    types
        .iter()
        .enumerate()
        .map(|(i, oid)| {
            Arg::Array(
                *oid,
                rows.clone().map(|r| r.get(i).and_then(Option::as_deref)).collect(),
            )
        })
        .collect()
}

/// [`KEYED`], where a few of many rows are wanted: a bitmap is made of all of them first.
const FIRST_FEW: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("enable_bitmapscan", "off"),
];

/// Runs one hop for all inputs. Inputs with a NULL find nothing, as a join would not.
///
/// # Errors
/// Errors of the server or of the owner's expressions, without their words.
pub fn hop(plan: &Plan, hop: &Hop<'_>, inputs: &[Values]) -> Result<Vec<Found>> {
    let usable: Vec<usize> = (0..inputs.len())
        .filter(|i| inputs[*i].iter().all(Option::is_some))
        .collect();
    if usable.is_empty() {
        return Ok(Vec::new());
    }
    if hop.limit.is_some()
        && together::pays(hop, usable.len())
        && let Some(found) = together::all(plan, hop, inputs, &usable)?
    {
        return Ok(found);
    }
    let table = hop.table;
    let condition = link_condition(hop.on, hop.own_types, hop.types, hop.filter, 0);
    let select: String = hop.select.iter().map(|s| format!(", {s}")).collect();
    let names: Vec<String> = (0..hop.select.len())
        .map(|i| Ident::new(format!("amazon_pii.s{i}")).to_string())
        .collect();
    let query = match hop.limit {
        None => format!(
            "SELECT {ORDINAL}{select} FROM {} JOIN {} AS {} ON {}",
            batch_rows(0..hop.on.len()),
            table.relation,
            table.relation.name,
            condition.join(" AND ")
        ),
        Some(limit) => format!(
            "SELECT {ORDINAL}{} FROM {} CROSS JOIN LATERAL (SELECT true{select} FROM {} AS {} WHERE {} LIMIT {limit}) AS found (one{})",
            names.iter().map(|n| format!(", found.{n}")).collect::<String>(),
            batch_rows(0..hop.on.len()),
            table.relation,
            table.relation.name,
            condition.join(" AND "),
            names.iter().map(|n| format!(", {n}")).collect::<String>(),
        ),
    };
    let pins: &[_] = match (table.has_index(hop.on), hop.limit) {
        (false, _) => &[],
        (true, None) => KEYED,
        (true, Some(_)) => FIRST_FEW,
    };
    let args = columns(hop.types, usable.iter().map(|i| &inputs[*i]));
    let owner = Identity::Owner(table.owner);
    let rows = if table.keeps_plans() && hop.limit.is_none() && is_key(table, hop.on) {
        act_as(owner, &plan.search_path, KEYED_FOR_A_WHILE, || {
            prepared::for_a_while(&query, &args)
        })
    } else {
        act_as(owner, &plan.search_path, pins, || sql::read(&query, &args))
    }
    .map_err(|e| e.at(&table.relation.shown()))?;
    rows.into_iter()
        .map(|row| {
            let n = usize::try_from(row.int(0)?).map_err(|_| Error::internal("an ordinality is negative"))?;
            let input = n.checked_sub(1).and_then(|n| usable.get(n)).copied();
            Ok(Found {
                input: input.ok_or_else(|| Error::internal("an ordinality is out of range"))?,
                row,
            })
        })
        .collect()
}

/// Whether expressions are a table's key, column by column.
fn is_key(table: &Table, on: &[Expr]) -> bool {
    let mut pairs = on.iter().zip(&table.key);
    on.len() == table.key.len() && pairs.all(|(e, (name, _))| *e == Expr::column(name.bare()))
}

/// Where in the key of a table's rows the columns are by which an entry reaches them, if that is all it reaches them by.
pub fn own_key(table: &Table, entry: &Entry) -> Option<Vec<usize>> {
    let in_key = |e: &Expr| table.key.iter().position(|(name, _)| *e == Expr::column(name.bare()));
    entry.on_child.iter().map(in_key).collect()
}

/// That a row belongs to what the inputs of a hop stand for; the arrays of inputs begin at parameter `first`.
pub fn link_condition(
    on: &[Expr],
    own_types: &[pg_sys::Oid],
    types: &[pg_sys::Oid],
    filter: Option<&Expr>,
    first: usize,
) -> Vec<String> {
    let equal = |(i, e): (usize, &Expr)| {
        let equal = catalog::operator(Compare::Equal, own_types[i], types[i]);
        format!("{e} {equal} {BATCH}.{}", batch_column(first + i))
    };
    on.iter()
        .enumerate()
        .map(equal)
        .chain(filter.map(ToString::to_string))
        .collect()
}

/// Reads rows by their keys.
///
/// # Errors
/// As [`hop`].
pub fn by_key(plan: &Plan, table: &Table, keys: &[Values], select: &[String]) -> Result<Vec<Found>> {
    let on: Vec<Expr> = table.key.iter().map(|(name, _)| Expr::column(name.bare())).collect();
    let types: Vec<pg_sys::Oid> = table.key.iter().map(|(_, oid)| *oid).collect();
    hop(
        plan,
        &Hop {
            table,
            on: &on,
            own_types: &types,
            types: &types,
            filter: None,
            select,
            limit: None,
        },
        keys,
    )
}

/// Follows the links from orders down to the rows of entry `last`, selecting `select` there.
/// The inputs are keys of orders; what is found names the order it was found for.
///
/// # Errors
/// As [`hop`].
pub fn down(
    plan: &Plan,
    orders: &[Values],
    last: usize,
    select: &[String],
    filter: Option<&Expr>,
) -> Result<Vec<Found>> {
    let path = plan.path(last);
    let first_links = path
        .first()
        .map(|e| select_all(&plan.entries[*e].on_parent))
        .unwrap_or_default();
    let mut at = by_key(plan, plan.orders(), orders, &first_links)?
        .into_iter()
        .map(|f| Ok((f.input, f.row.texts(FIRST..FIRST + first_links.len())?)))
        .collect::<Result<Vec<_>>>()?;
    for (step, index) in path.iter().enumerate() {
        let entry = &plan.entries[*index];
        let next = path.get(step + 1).map(|e| select_all(&plan.entries[*e].on_parent));
        let wanted = next.as_deref().unwrap_or(select);
        let (origins, inputs): (Vec<usize>, Vec<Values>) = at.into_iter().unzip();
        let both = match (entry.filter.as_ref(), filter.filter(|_| next.is_none())) {
            (Some(a), Some(b)) => Some(Expr::both(a, b)),
            (a, b) => a.or(b).cloned(),
        };
        let found = hop(
            plan,
            &Hop {
                filter: both.as_ref(),
                ..Hop::into_entry(plan, entry, wanted)
            },
            &inputs,
        )?;
        if next.is_none() {
            return Ok(found
                .into_iter()
                .map(|f| Found {
                    input: origins[f.input],
                    row: f.row,
                })
                .collect());
        }
        at = found
            .into_iter()
            .map(|f| Ok((origins[f.input], f.row.texts(FIRST..FIRST + wanted.len())?)))
            .collect::<Result<Vec<_>>>()?;
    }
    Ok(Vec::new())
}

/// Follows the links from values of entry `from`'s child side up to the orders, selecting `select` there; with a limit,
/// that many orders at most of each row below them.
///
/// # Errors
/// As [`hop`].
pub fn up(
    plan: &Plan,
    from: usize,
    links: Vec<(usize, Values)>,
    select: &[String],
    limit: Option<u32>,
) -> Result<Vec<Found>> {
    climb(
        plan,
        (from, 0),
        links,
        select,
        |top| limit.filter(|_| top),
        &mut HashSet::new(),
    )
}

/// [`up`] to the rows of entry `to`, which is above `from`; `select` is over these.
///
/// # Errors
/// As [`hop`].
pub fn up_to(
    plan: &Plan,
    (from, to): (usize, usize),
    links: Vec<(usize, Values)>,
    select: &[String],
) -> Result<Vec<Found>> {
    climb(plan, (from, to), links, select, |_| None, &mut HashSet::new())
}

/// [`up`], looking at that many rows at most for each row of each step; the inputs for which there may be more are added
/// to `cut`.
///
/// # Errors
/// As [`hop`].
pub fn up_some(
    plan: &Plan,
    from: usize,
    links: Vec<(usize, Values)>,
    select: &[String],
    limit: Option<u32>,
    cut: &mut HashSet<usize>,
) -> Result<Vec<Found>> {
    climb(plan, (from, 0), links, select, |_| limit, cut)
}

fn climb(
    plan: &Plan,
    (from, to): (usize, usize),
    links: Vec<(usize, Values)>,
    select: &[String],
    limit: impl Fn(bool) -> Option<u32>,
    cut: &mut HashSet<usize>,
) -> Result<Vec<Found>> {
    let mut at = links;
    let mut index = from;
    loop {
        let entry = &plan.entries[index];
        let Some(parent_index) = entry.parent else {
            return Ok(Vec::new());
        };
        let parent = &plan.entries[parent_index];
        let top = parent_index == to;
        let next = select_all(&parent.on_child);
        let (origins, inputs): (Vec<usize>, Vec<Values>) = at.into_iter().unzip();
        let found = hop(
            plan,
            &Hop {
                table: &plan.tables[parent.table],
                on: &entry.on_parent,
                own_types: &entry.on_parent_types,
                types: &entry.on_child_types,
                filter: parent.filter.as_ref(),
                select: if top { select } else { &next },
                limit: limit(top),
            },
            &inputs,
        )?;
        if let Some(limit) = limit(top) {
            let mut counts = vec![0; inputs.len()];
            found.iter().for_each(|f| counts[f.input] += 1);
            cut.extend((0..inputs.len()).filter(|i| counts[*i] >= limit).map(|i| origins[i]));
        }
        if top {
            return Ok(found
                .into_iter()
                .map(|f| Found {
                    input: origins[f.input],
                    row: f.row,
                })
                .collect());
        }
        at = found
            .into_iter()
            .map(|f| Ok((origins[f.input], f.row.texts(FIRST..FIRST + next.len())?)))
            .collect::<Result<Vec<_>>>()?;
        index = parent_index;
    }
}

/// Expressions as a select list.
pub fn select_all(expressions: &[Expr]) -> Vec<String> {
    expressions.iter().map(ToString::to_string).collect()
}

/// A key as it is stored: a JSON array of text forms.
pub fn key_text(key: &[Option<String>]) -> Result<String> {
    serde_json::to_string(key).map_err(|_| Error::internal("a key could not be written"))
}

/// The parts of a stored key.
///
/// # Errors
/// It is none.
pub fn key_parts(text: &str) -> Result<Values> {
    serde_json::from_str(text).map_err(|_| Error::internal("a stored key is damaged"))
}
