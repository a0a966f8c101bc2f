//! Facts about the user's tables, read from the catalog.

use std::ffi::{CStr, CString};

use pgrx::pg_sys;

use super::error::{Error, Result};
use super::ident::{Expr, Ident, Relation};
use super::sql::{self, Arg, Row};

/// A column.
#[derive(Debug, Clone)]
pub struct Column {
    pub name: Ident,
    pub type_oid: pg_sys::Oid,
    /// The type below all domains.
    pub base_type: pg_sys::Oid,
    pub not_null: bool,
    pub generated: bool,
    pub identity: bool,
    pub has_default: bool,
    pub is_array: bool,
    pub is_composite: bool,
    /// Characters at most, for character types.
    pub max_length: Option<i64>,
    pub number: i64,
    /// Declared type, for people.
    pub type_shown: String,
}

/// A table, as far as a policy cares.
#[derive(Debug, Clone)]
pub struct TableFacts {
    pub relation: Relation,
    pub owner: pg_sys::Oid,
    pub kind: char,
    pub has_rules: bool,
    pub has_children: bool,
    pub forced_rls: bool,
    pub persistent: bool,
    pub columns: Vec<Column>,
    /// Usable keys: NOT NULL, immediate, total; the primary key first.
    pub keys: Vec<Vec<String>>,
    /// Leading columns of usable indexes.
    pub indexed: Vec<Vec<String>>,
    /// Leading expressions of usable indexes, as the server prints them.
    pub indexed_expressions: Vec<String>,
}

impl TableFacts {
    /// A column by its bare name.
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|c| c.name.bare() == name)
    }
}

/// Whether the script of an extension is running, by CREATE or ALTER EXTENSION.
pub fn is_creating_extension() -> bool {
    // SAFETY: reads a backend-local variable.
    unsafe { pg_sys::creating_extension }
}

/// Resolves a table's name as the session's search path does, without running a statement as the caller: operators of
/// whoever may shape that path are not called.
///
/// # Errors
/// The name holds a NUL.
pub fn find(schema: Option<&str>, name: &str) -> Result<Option<pg_sys::Oid>> {
    let text = |s: &str| CString::new(s).map_err(|_| Error::invalid("a table's name holds a NUL"));
    let name = text(name)?;
    let schema = schema.map(text).transpose()?;
    // SAFETY: catalog lookups inside a transaction with NUL-terminated names; missing names give InvalidOid.
    let oid = unsafe {
        match &schema {
            None => pg_sys::RelnameGetRelid(name.as_ptr()),
            Some(schema) => match pg_sys::get_namespace_oid(schema.as_ptr(), true) {
                pg_sys::InvalidOid => pg_sys::InvalidOid,
                namespace => pg_sys::get_relname_relid(name.as_ptr(), namespace),
            },
        }
    };
    Ok((oid != pg_sys::InvalidOid).then_some(oid))
}

/// The session's effective search path as a setting, temporary tables last.
pub fn search_path() -> String {
    let mut schemas: Vec<String> = schemas_searched()
        .into_iter()
        .map(|name| Ident::new(name).to_string())
        .collect();
    schemas.push("pg_temp".to_owned());
    schemas.join(", ")
}

/// The bare names of the schemas in [`search_path`].
pub fn schemas_searched() -> Vec<String> {
    // SAFETY: the list is one of OIDs of schemas, made for us and small; a schema dropped meanwhile has no name.
    unsafe {
        let list = pg_sys::fetch_search_path(false);
        let length = if list.is_null() { 0 } else { (*list).length };
        (0..length)
            .filter_map(|i| {
                let name = pg_sys::get_namespace_name((*(*list).elements.add(i as usize)).oid_value);
                (!name.is_null()).then(|| CStr::from_ptr(name).to_string_lossy().into_owned())
            })
            // pg_catalog is searched first where it is not named: named after others it would be shadowed by them.
            .filter(|name| !name.starts_with("pg_temp") && name != "pg_catalog")
            .collect()
    }
}

/// A comparison of two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    Equal,
    Greater,
    Less,
    NotGreater,
}

/// The operator for values of these types, with its schema: one that a search path finds could be a neighbour's, and
/// would run as the owner of the table. Within a type it is the one that the type's indexes use.
pub fn operator(compare: Compare, left: pg_sys::Oid, right: pg_sys::Oid) -> String {
    let (word, flag) = match compare {
        Compare::Equal => ("=", pg_sys::TYPECACHE_EQ_OPR),
        Compare::Greater => (">", pg_sys::TYPECACHE_GT_OPR),
        Compare::Less => ("<", pg_sys::TYPECACHE_LT_OPR),
        Compare::NotGreater => ("<=", pg_sys::TYPECACHE_GT_OPR),
    };
    // SAFETY: catalog lookups inside a transaction; a cache entry lives as long as the session, a catalog tuple until
    // it is released.
    let found = unsafe {
        let (left, right) = (pg_sys::getBaseType(left), pg_sys::getBaseType(right));
        let known = pg_sys::lookup_type_cache(left, flag as i32);
        let oid = match compare {
            Compare::Equal => (*known).eq_opr,
            Compare::Greater => (*known).gt_opr,
            Compare::Less => (*known).lt_opr,
            Compare::NotGreater => pg_sys::get_negator((*known).gt_opr),
        };
        let tuple = if left == right {
            pg_sys::SearchSysCache1(pg_sys::SysCacheIdentifier::OPEROID as i32, pg_sys::Datum::from(oid))
        } else {
            std::ptr::null_mut()
        };
        if tuple.is_null() {
            None
        } else {
            let row = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_operator>();
            let schema = pg_sys::get_namespace_name(row.oprnamespace);
            let word = CStr::from_ptr(row.oprname.data.as_ptr()).to_string_lossy().into_owned();
            let found = (!schema.is_null()).then(|| (Ident::new(CStr::from_ptr(schema).to_string_lossy()), word));
            pg_sys::ReleaseSysCache(tuple);
            found
        }
    };
    match found {
        Some((schema, word)) => format!("OPERATOR({schema}.{word})"),
        None => format!("OPERATOR(pg_catalog.{word})"),
    }
}

/// Everything about these tables, those left out that no longer exist. Together: a session's first statements on the catalogs cost
/// more to plan than to run.
///
/// # Errors
/// Errors of the server.
pub fn facts(oids: &[pg_sys::Oid]) -> Result<Vec<TableFacts>> {
    let ask = |query: &str| sql::read(query, &[Arg::Oids(oids)]);
    let tables = ask("SELECT c.oid, n.nspname, c.relname, c.relowner, c.relkind, \
                EXISTS (SELECT FROM pg_catalog.pg_rewrite r WHERE r.ev_class = c.oid), \
                c.relkind = 'r' AND EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE i.inhparent = c.oid), \
                c.relrowsecurity AND c.relforcerowsecurity, c.relpersistence = 'p' \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY ($1)")?;
    let mut found = tables.iter().map(table).collect::<Result<Vec<_>>>()?;
    let columns = ask("WITH RECURSIVE base (start, oid, typmod) AS ( \
            SELECT a.atttypid, a.atttypid, a.atttypmod FROM pg_catalog.pg_attribute a WHERE a.attrelid = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped \
            UNION \
            SELECT b.start, t.typbasetype, t.typtypmod FROM base b JOIN pg_catalog.pg_type t ON t.oid = b.oid WHERE t.typtype = 'd') \
         SELECT a.attrelid, a.attname, a.atttypid, b.oid, a.attnotnull, a.attgenerated <> '', t.typelem <> 0 AND t.typlen = -1, \
                CASE WHEN b.oid IN (1042, 1043) AND GREATEST(b.typmod, a.atttypmod) > 4 THEN GREATEST(b.typmod, a.atttypmod) - 4 END, a.attnum, \
                pg_catalog.format_type(a.atttypid, a.atttypmod), t.typtype = 'c', a.attidentity <> '', a.atthasdef \
         FROM pg_catalog.pg_attribute a \
         JOIN base b ON b.start = a.atttypid JOIN pg_catalog.pg_type t ON t.oid = b.oid AND t.typtype <> 'd' \
         WHERE a.attrelid = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped \
           AND (a.atttypid <> b.oid OR b.typmod = a.atttypmod) \
         ORDER BY a.attrelid, a.attnum")?;
    for row in &columns {
        let (oid, column) = (row.oid(0)?, column(row)?);
        if let Some(table) = of(&mut found, oid)
            && table.columns.last().is_none_or(|last| last.number != column.number)
        {
            table.columns.push(column);
        }
    }
    let keys = ask(
        "SELECT i.indrelid, pg_catalog.array_to_string(ARRAY(SELECT pg_catalog.to_json(a.attname::text)::text \
                  FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k (n, o) \
                  JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.n ORDER BY k.o), ',') \
         FROM pg_catalog.pg_index i WHERE i.indrelid = ANY ($1) AND i.indisunique AND i.indimmediate AND i.indisvalid \
           AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indnkeyatts = i.indnatts \
           AND NOT EXISTS (SELECT FROM pg_catalog.unnest(i.indkey::int2[]) AS k (n) \
                           JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.n WHERE NOT a.attnotnull) \
         ORDER BY i.indisprimary DESC, i.indexrelid",
    )?;
    for row in &keys {
        if let Some(table) = of(&mut found, row.oid(0)?) {
            table.keys.push(names(row)?);
        }
    }
    let indexed = ask(
        "SELECT i.indrelid, pg_catalog.array_to_string(ARRAY(SELECT pg_catalog.to_json(a.attname::text)::text \
                  FROM pg_catalog.unnest(i.indkey::int2[]) WITH ORDINALITY AS k (n, o) \
                  JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.n \
                  WHERE k.o <= i.indnkeyatts ORDER BY k.o), ','), \
                CASE WHEN i.indkey[0] = 0 THEN pg_catalog.pg_get_indexdef(i.indexrelid, 1, false) END \
         FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid \
         JOIN pg_catalog.pg_am m ON m.oid = c.relam \
         WHERE i.indrelid = ANY ($1) AND i.indisvalid AND i.indpred IS NULL AND m.amname IN ('btree', 'hash')",
    )?;
    for row in &indexed {
        if let Some(table) = of(&mut found, row.oid(0)?) {
            table.indexed.push(names(row)?);
            table.indexed_expressions.extend(row.owned(2)?);
        }
    }
    Ok(found)
}

/// What changes whenever [`facts`] of these tables may, and stays when they are vacuumed or analyzed. A row of a catalog that one
/// transaction writes twice is told by its place.
///
/// # Errors
/// Errors of the server.
pub fn print(oids: &[pg_sys::Oid]) -> Result<String> {
    let rows = sql::read(
        "SELECT pg_catalog.concat_ws(' ', pg_catalog.count(*), pg_catalog.hashtextextended(pg_catalog.string_agg(x.t, ' ' ORDER BY x.t), 0)) FROM ( \
            SELECT pg_catalog.concat_ws(' ', 'c', c.oid, c.xmin, c.ctid) FROM pg_catalog.pg_class c WHERE c.oid = ANY ($1) \
            UNION ALL SELECT pg_catalog.concat_ws(' ', 'a', a.attrelid, a.attnum, a.xmin, a.ctid) FROM pg_catalog.pg_attribute a WHERE a.attrelid = ANY ($1) \
            UNION ALL SELECT pg_catalog.concat_ws(' ', 't', t.oid, t.xmin, t.ctid) FROM pg_catalog.pg_type t \
                WHERE t.oid = ANY (ARRAY(SELECT a.atttypid FROM pg_catalog.pg_attribute a WHERE a.attrelid = ANY ($1))) \
            UNION ALL SELECT pg_catalog.concat_ws(' ', 'i', i.indexrelid, i.xmin, i.ctid) FROM pg_catalog.pg_index i WHERE i.indrelid = ANY ($1) \
            UNION ALL SELECT pg_catalog.concat_ws(' ', 'h', h.inhrelid, h.xmin, h.ctid) FROM pg_catalog.pg_inherits h WHERE h.inhparent = ANY ($1) \
            UNION ALL SELECT pg_catalog.concat_ws(' ', 'r', r.oid, r.xmin, r.ctid) FROM pg_catalog.pg_rewrite r WHERE r.ev_class = ANY ($1)) AS x (t)",
        &[Arg::Oids(oids)],
    )?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
}

/// The one of these tables that has this OID.
fn of(tables: &mut [TableFacts], oid: pg_sys::Oid) -> Option<&mut TableFacts> {
    tables.iter_mut().find(|t| t.relation.oid == oid)
}

fn table(row: &Row) -> Result<TableFacts> {
    Ok(TableFacts {
        relation: Relation {
            oid: row.oid(0)?,
            schema: Ident::new(row.str(1)?),
            name: Ident::new(row.str(2)?),
        },
        owner: row.oid(3)?,
        kind: row.str(4)?.chars().next().unwrap_or('?'),
        has_rules: row.bool(5)?,
        has_children: row.bool(6)?,
        forced_rls: row.bool(7)?,
        persistent: row.bool(8)?,
        columns: Vec::new(),
        keys: Vec::new(),
        indexed: Vec::new(),
        indexed_expressions: Vec::new(),
    })
}

fn column(row: &Row) -> Result<Column> {
    Ok(Column {
        name: Ident::new(row.str(1)?),
        type_oid: row.oid(2)?,
        base_type: row.oid(3)?,
        not_null: row.bool(4)?,
        generated: row.bool(5)?,
        is_array: row.bool(6)?,
        max_length: row
            .text(7)?
            .map(|n| n.parse().map_err(|_| Error::internal("a type modifier is no number")))
            .transpose()?,
        number: row.int(8)?,
        type_shown: row.string(9)?,
        is_composite: row.bool(10)?,
        identity: row.bool(11)?,
        has_default: row.bool(12)?,
    })
}

/// Names that came as the inside of a JSON array, so that any character may be in them.
fn names(row: &Row) -> Result<Vec<String>> {
    serde_json::from_str(&format!("[{}]", row.str(1)?)).map_err(|_| Error::internal("column names of an index"))
}

/// Whether a table holds rows itself, rather than by its partitions.
pub fn holds_rows(oid: pg_sys::Oid) -> bool {
    // SAFETY: catalog lookup inside a transaction.
    (unsafe { pg_sys::get_rel_relkind(oid) }) as u8 == pg_sys::RELKIND_RELATION
}

/// Partitions of a table that hold rows, the table itself first.
///
/// # Errors
/// Errors of the server.
pub fn with_partitions(oid: pg_sys::Oid) -> Result<Vec<Relation>> {
    let rows = sql::read(
        "SELECT c.oid, n.nspname, c.relname FROM pg_catalog.pg_class c \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.oid = $1 OR (c.relkind IN ('r', 'p') AND c.oid IN (SELECT relid FROM pg_catalog.pg_partition_tree($1))) \
         ORDER BY c.oid <> $1, c.oid",
        &[Arg::Oid(oid)],
    )?;
    rows.iter()
        .map(|r| {
            Ok(Relation {
                oid: r.oid(0)?,
                schema: Ident::new(r.str(1)?),
                name: Ident::new(r.str(2)?),
            })
        })
        .collect()
}

/// Whether a type is an enum.
pub fn is_enum(oid: pg_sys::Oid) -> bool {
    // SAFETY: catalog lookup inside a transaction.
    unsafe { pg_sys::get_typtype(oid) as u8 == b'e' }
}

/// The types of expressions over a table's row, in the current identity.
///
/// # Errors
/// Errors of the server: unknown columns, functions, types.
pub fn expression_types(relation: &Relation, expressions: &[Expr]) -> Result<Vec<pg_sys::Oid>> {
    if expressions.is_empty() {
        return Ok(Vec::new());
    }
    let list: Vec<String> = expressions.iter().map(ToString::to_string).collect();
    sql::result_types(&format!(
        "SELECT {} FROM {relation} AS {} LIMIT 0",
        list.join(", "),
        relation.name
    ))
}
