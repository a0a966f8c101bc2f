//! The orders table from one end to the other, in the order of its key: as facts, as keys, or as sums that tell whether
//! anything has changed.

use pgrx::pg_sys;
use sha2::{Digest as _, Sha256};

use super::flag::{self, OrderFact};
use super::plan::{AnchorPlan, Plan, Table};
use super::walk::Values;
use crate::pg::catalog::{self, Compare};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{self, Expr};
use crate::pg::identity::{Identity, act_as};
use crate::pg::sql::{self, Arg, Row};

/// A slice of a pass over the whole table.
pub struct Page {
    pub facts: Vec<OrderFact>,
    /// Where the next slice begins; `None` when this was the last.
    pub next: Option<Values>,
    /// What [`sum`] would say of it, where that can be said.
    pub sum: Option<Sum>,
}

/// Rows, and the sum of their digests. Two orders that swap their numbers have other digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sum {
    pub rows: i64,
    pub digest: i128,
}

/// Rows whose key comes after the first and not after the second.
#[derive(Debug, Clone, Copy)]
pub struct Range<'a> {
    pub after: Option<&'a Values>,
    pub upto: Option<&'a Values>,
}

/// Where a pass over the whole table begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    First,
    Last,
}

/// Evaluates the next orders of a pass over the whole table, in the order of its key.
///
/// # Errors
/// Errors of the server or of the owner's expressions.
pub fn page(plan: &Plan, range: Range<'_>, limit: i64) -> Result<Page> {
    let mut select = flag::select(plan);
    let digest = digest(plan);
    let digest_at = select.len();
    select.extend(digest.iter().cloned());
    let rows = slice(plan, &select, Some(flag::candidates(plan)), range, End::First, limit)?;
    let sum = match &digest {
        None => None,
        Some(_) => Some(Sum {
            rows: rows.len() as i64,
            digest: rows
                .iter()
                .try_fold(0, |sum, r| Ok::<_, Error>(sum + i128::from(r.int(digest_at)?)))?,
        }),
    };
    Ok(Page {
        facts: flag::facts(plan, rows.iter().map(|r| (r, 0)))?,
        next: next(plan, &rows, limit)?,
        sum,
    })
}

/// The keys of the next rows of a pass, without a look at any expression, and where the slice after them begins.
///
/// # Errors
/// Errors of the server.
pub fn page_of_keys(plan: &Plan, from: End, range: Range<'_>, limit: i64) -> Result<(Vec<Values>, Option<Values>)> {
    let keys = plan.orders().key_list();
    let rows = slice(plan, &keys, None, range, from, limit)?;
    let all = rows.iter().map(|r| r.texts(0..keys.len())).collect::<Result<_>>()?;
    Ok((all, next(plan, &rows, limit)?))
}

/// The rows of a range, counted and summed up by the server: what an order's state depends on is the same as long as this
/// is. `None` where the policy asks more of an order than its row can tell. A range that is `large` may be most of the table.
///
/// # Errors
/// As [`page`].
pub fn sum(plan: &Plan, range: Range<'_>, large: bool) -> Result<Option<Sum>> {
    let Some(digest) = digest(plan) else { return Ok(None) };
    let table = plan.orders();
    let mut args = Vec::new();
    let mut conditions = vec![flag::candidates(plan)];
    conditions.extend(within(table, &qualified(table), range, End::First, &mut args));
    let query = format!(
        "SELECT pg_catalog.count(*), COALESCE(pg_catalog.sum({digest}), 0) FROM {} AS {} WHERE {}",
        table.relation,
        table.relation.name,
        conditions.join(" AND "),
    );
    // Page by page of the table, whatever the order of its rows; from end to end only where that is the range, or, as far as
    // the server knows, most of it.
    let pins: &[_] = match range {
        Range {
            after: None,
            upto: None,
        } => &[],
        _ if large => &[("enable_indexscan", "off")],
        _ => &[("enable_seqscan", "off"), ("enable_indexscan", "off")],
    };
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, pins, || {
        sql::read(&query, &args)
    })?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    let digest = row.str(1)?.parse();
    Ok(Some(Sum {
        rows: row.int(0)?,
        digest: digest.map_err(|_| Error::internal("a sum is no number"))?,
    }))
}

/// Tells sums apart that were made in different ways, or of different tables. `None` where there are none.
pub fn stamp(plan: &Plan) -> Option<i64> {
    let digest = digest(plan)?;
    let parts = [
        digest.as_str(),
        &flag::candidates(plan),
        &plan.search_path,
        &plan.version.to_string(),
        &u32::from(plan.orders().relation.oid).to_string(),
    ];
    let whole = Sha256::digest(parts.join("\0").as_bytes());
    Some(whole.iter().take(8).fold(0, |n, byte| n << 8 | i64::from(*byte)))
}

/// SQL over an order's row: a number that stands for its key and what its state depends on. Rows of other tables, and the
/// states of other orders, are beyond it.
fn digest(plan: &Plan) -> Option<String> {
    if plan.replaces.is_some() {
        return None;
    }
    let mut anchors = Vec::new();
    for anchor in &plan.anchors {
        match anchor {
            AnchorPlan::Order(sql) => anchors.push(sql.as_str()),
            AnchorPlan::Linked { .. } => return None,
        }
    }
    let columns = &plan.orders().facts.columns;
    let moment = |sql: &str, n: i32| {
        let any = format!("COALESCE(pg_catalog.timestamp_hash_extended(pg_catalog.timezone('UTC', {sql}), {n}), {n})");
        if !columns.iter().any(|c| Expr::column(c.name.bare()).to_string() == sql) {
            return any;
        }
        // Before PostgreSQL 18 no function hashes a time with zone. Its seconds as a number are much cheaper than its time at
        // UTC; in this range no two microseconds have the same.
        format!(
            "CASE WHEN {sql} OPERATOR(pg_catalog.>=) '1900-01-01 00:00:00+00'::pg_catalog.timestamptz \
                AND {sql} OPERATOR(pg_catalog.<) '2100-01-01 00:00:00+00'::pg_catalog.timestamptz \
             THEN pg_catalog.hashfloat8extended(pg_catalog.tstzrange_subdiff({sql}, '2000-01-01 00:00:00+00'::pg_catalog.timestamptz), {n}) \
             ELSE {any} END"
        )
    };
    let mut parts = Vec::new();
    if let Some(number) = &plan.number {
        parts.push(format!(
            "COALESCE(pg_catalog.hashtextextended({number}::pg_catalog.text COLLATE pg_catalog.\"C\", 1), 1)"
        ));
    }
    match anchors.as_slice() {
        [] => {}
        [anchor] => parts.push(moment(anchor, 2)),
        several => parts.push(moment(&format!("COALESCE({})", several.join(", ")), 2)),
    }
    if let Some(placed) = &plan.placed {
        parts.push(moment(placed, 3));
    }
    if let Some(effective) = &plan.effective {
        parts.push(moment(effective, 4));
    }
    if parts.is_empty() {
        parts.push("0".to_owned());
    }
    let rest = parts.join(" OPERATOR(pg_catalog.#) ");
    let table = plan.orders();
    let keys = qualified(table);
    // Each key is the seed of the next.
    Some(
        table
            .key
            .iter()
            .zip(keys)
            .fold(rest, |seed, ((_, oid), key)| match *oid {
                pg_sys::INT8OID => format!("pg_catalog.hashint8extended({key}, {seed})"),
                pg_sys::INT4OID => format!("pg_catalog.hashint4extended({key}, {seed})"),
                pg_sys::UUIDOID => format!("pg_catalog.uuid_hash_extended({key}, {seed})"),
                _ => format!("pg_catalog.hashtextextended({}, {seed})", ident::out(key)),
            }),
    )
}

/// The key after which the next slice begins.
fn next(plan: &Plan, rows: &[Row], limit: i64) -> Result<Option<Values>> {
    let full = rows.len() as i64 == limit;
    rows.last()
        .filter(|_| full)
        .map(|r| r.texts(0..plan.orders().key.len()))
        .transpose()
}

/// Qualified: the number may be a column of the key, and is a result column of its name then.
pub fn qualified(table: &Table) -> Vec<String> {
    table
        .key_list()
        .iter()
        .map(|k| format!("{}.{k}", table.relation.name))
        .collect()
}

/// The next rows of the orders table in the order of its key.
fn slice(
    plan: &Plan,
    select: &[String],
    condition: Option<String>,
    range: Range<'_>,
    from: End,
    limit: i64,
) -> Result<Vec<Row>> {
    let table = plan.orders();
    let qualified = qualified(table);
    let keys = match from {
        End::First => qualified.join(", "),
        End::Last => format!("{} DESC", qualified.join(" DESC, ")),
    };
    let mut args: Vec<Arg<'_>> = vec![Arg::Int(limit)];
    let mut conditions: Vec<String> = condition.into_iter().collect();
    conditions.extend(within(table, &qualified, range, from, &mut args));
    let condition = if conditions.is_empty() {
        String::new()
    } else {
        format!(" WHERE {}", conditions.join(" AND "))
    };
    let query = format!(
        "SELECT {} FROM {} AS {}{condition} ORDER BY {keys} LIMIT $1",
        select.join(", "),
        table.relation,
        table.relation.name,
    );
    // In key order by its index: sorting the table for each page would make the pass quadratic.
    let pins = &[
        ("enable_seqscan", "off"),
        ("enable_sort", "off"),
        ("enable_bitmapscan", "off"),
    ];
    act_as(Identity::Owner(table.owner), &plan.search_path, pins, || {
        sql::read(&query, &args)
    })
}

/// The conditions that a row's key lies in a range, on a pass from this end.
fn within<'a>(table: &Table, keys: &[String], range: Range<'a>, from: End, args: &mut Vec<Arg<'a>>) -> Vec<String> {
    let further = match from {
        End::First => Compare::Greater,
        End::Last => Compare::Less,
    };
    let mut conditions = Vec::new();
    for (bound, compare) in [(range.after, further), (range.upto, Compare::NotGreater)] {
        let Some(values) = bound else { continue };
        conditions.push(bounded(table, keys, compare, args.len() + 1));
        let typed = table.key.iter().zip(values);
        args.extend(typed.map(|((_, oid), v)| Arg::Typed(*oid, v.as_deref())));
    }
    conditions
}

/// The condition that a row's key compares so with the one in the parameters from `$first` on.
pub fn bounded(table: &Table, keys: &[String], compare: Compare, first: usize) -> String {
    let operators = |compare| -> Vec<String> {
        let same = |(_, oid): &(_, pg_sys::Oid)| catalog::operator(compare, *oid, *oid);
        table.key.iter().map(same).collect()
    };
    let (equal, last) = (operators(Compare::Equal), operators(compare));
    let places: Vec<String> = (first..first + keys.len()).map(|i| format!("${i}")).collect();
    if last.iter().all(|f| *f == last[0]) {
        return format!("({}) {} ({})", keys.join(", "), last[0], places.join(", "));
    }
    // A comparison of rows takes one operator for all columns; types of extensions bring their own.
    let strict = match compare {
        Compare::NotGreater => operators(Compare::Less),
        _ => operators(compare),
    };
    let steps: Vec<String> = (0..keys.len())
        .map(|i| {
            let mut step: Vec<String> = (0..i)
                .map(|j| format!("{} {} {}", keys[j], equal[j], places[j]))
                .collect();
            let by = if i + 1 == keys.len() { &last[i] } else { &strict[i] };
            step.push(format!("{} {by} {}", keys[i], places[i]));
            step.join(" AND ")
        })
        .collect();
    format!("({})", steps.join(" OR "))
}
