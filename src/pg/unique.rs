//! What keeps rows apart: unique indexes and exclusion constraints, with the columns that their expressions read.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::ptr;

use pgrx::pg_sys;

use super::catalog;
use super::error::{Error, Result};
use super::ident::Expr;
use super::sql::{self, Arg};

/// A column of an index's key, or its condition.
#[derive(Debug, Clone)]
pub struct Part {
    /// The columns that it reads.
    pub reads: Vec<String>,
    /// As an expression over the row; `None` where the server's print of it is none.
    pub sql: Option<Expr>,
    /// It is a column and nothing else.
    pub plain: bool,
}

/// A unique index, or the index of an exclusion constraint.
#[derive(Debug, Clone)]
pub struct Unique {
    pub name: String,
    pub exclusion: bool,
    /// Equal values collide: of an exclusion constraint's operators, some are true of different values only.
    pub equals: bool,
    /// NULL equals NULL.
    pub nulls_collide: bool,
    pub key: Vec<Part>,
    pub condition: Option<Part>,
}

/// The unique indexes of a table and those that its partitions have for themselves.
///
/// # Errors
/// Errors of the server.
pub fn of_table(oid: pg_sys::Oid) -> Result<Vec<Unique>> {
    let tables = catalog::with_partitions(oid)?;
    // NULLS NOT DISTINCT came with version 15: the column is asked for by its name.
    let rows = sql::read(
        "SELECT c.relname, i.indisexclusion, \
                COALESCE((SELECT pg_catalog.bool_and(o.oprname IN ('=', '&&')) FROM pg_catalog.pg_constraint x, \
                    pg_catalog.unnest(x.conexclop) AS p JOIN pg_catalog.pg_operator o ON o.oid = p \
                    WHERE x.conindid = i.indexrelid AND x.contype = 'x'), true), \
                COALESCE((pg_catalog.to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false), \
                (SELECT pg_catalog.json_agg(pg_catalog.json_build_array(i.indkey[n], pg_catalog.pg_get_indexdef(i.indexrelid, n + 1, false)) ORDER BY n) \
                    FROM pg_catalog.generate_series(0, i.indnkeyatts - 1) AS n), \
                i.indexprs::text, i.indpred::text, pg_catalog.pg_get_expr(i.indpred, i.indrelid), \
                (SELECT pg_catalog.json_object_agg(a.attnum, a.attname) FROM pg_catalog.pg_attribute a \
                    WHERE a.attrelid = i.indrelid AND a.attnum > 0 AND NOT a.attisdropped) \
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid \
         WHERE i.indrelid::int8 = ANY ($1) AND (i.indisunique OR i.indisexclusion) AND i.indislive AND i.indisready \
           AND NOT c.relispartition ORDER BY c.relname",
        &[Arg::Ints(tables.iter().map(|r| i64::from(u32::from(r.oid))).collect())],
    )?;
    rows.iter()
        .map(|row| {
            let damaged = |_| Error::internal("the catalog's words about an index");
            let names: BTreeMap<i32, String> = serde_json::from_str(row.str(8)?).map_err(damaged)?;
            let key: Vec<(i32, String)> = serde_json::from_str(row.str(4)?).map_err(damaged)?;
            let mut expressions = match row.text(5)? {
                Some(tree) => reads(tree, true, &names)?,
                None => Vec::new(),
            }
            .into_iter();
            let mut parts = Vec::new();
            for (number, shown) in key {
                parts.push(match names.get(&number) {
                    Some(name) => Part {
                        reads: vec![name.clone()],
                        sql: Some(Expr::column(name)),
                        plain: true,
                    },
                    None => Part {
                        reads: expressions.next().unwrap_or_else(|| names.values().cloned().collect()),
                        sql: Expr::parse(&shown),
                        plain: false,
                    },
                });
            }
            let condition = match (row.text(6)?, row.text(7)?) {
                (Some(tree), Some(shown)) => Some(Part {
                    reads: reads(tree, false, &names)?.into_iter().next().unwrap_or_default(),
                    sql: Expr::parse(shown),
                    plain: false,
                }),
                _ => None,
            };
            Ok(Unique {
                name: row.string(0)?,
                exclusion: row.bool(1)?,
                equals: row.bool(2)?,
                nulls_collide: row.bool(3)?,
                key: parts,
                condition,
            })
        })
        .collect()
}

/// The columns that a stored expression reads, or each of a list of them. It is read, not evaluated: functions in it are
/// the table owner's.
fn reads(tree: &str, list: bool, names: &BTreeMap<i32, String>) -> Result<Vec<Vec<String>>> {
    let text = CString::new(tree).map_err(|_| Error::internal("a stored expression holds a NUL"))?;
    // SAFETY: the text is a node tree that the server itself wrote; an index's expressions are a list of nodes; what is
    // made here lives in the current memory context.
    let numbers: Vec<Vec<i32>> = unsafe {
        let node = pg_sys::stringToNode(text.as_ptr());
        let nodes: Vec<*mut pg_sys::Node> = if list {
            let list = node.cast::<pg_sys::List>();
            let length = if list.is_null() { 0 } else { (*list).length };
            (0..length)
                .map(|i| (*(*list).elements.add(i as usize)).ptr_value.cast())
                .collect()
        } else {
            vec![node.cast()]
        };
        nodes
            .into_iter()
            .map(|node| {
                let mut set = ptr::null_mut();
                pg_sys::pull_varattnos(node, 1, &mut set);
                let mut members = Vec::new();
                let mut member = pg_sys::bms_next_member(set, -1);
                while member >= 0 {
                    members.push(member + pg_sys::FirstLowInvalidHeapAttributeNumber);
                    member = pg_sys::bms_next_member(set, member);
                }
                members
            })
            .collect()
    };
    let all = || names.values().cloned().collect();
    Ok(numbers
        .into_iter()
        .map(|numbers| {
            // Zero is the whole row.
            if numbers.contains(&0) {
                return all();
            }
            numbers.iter().filter_map(|n| names.get(n).cloned()).collect()
        })
        .collect())
}
