//! Where personal data may lie: the tables of a scope, and their columns that hold text in whatever form.

use std::collections::HashMap;

use pgrx::pg_sys;

use super::{Scope, archives};
use crate::engine::plan::Plan;
use crate::pg::error::Result;
use crate::pg::ident::{Ident, Relation};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// A column that is searched.
pub(super) struct Column {
    pub name: Ident,
    /// A tsvector: its words stand in another order than in the text.
    pub vector: bool,
    /// The policy treats it: orders that are not redacted have it rightfully.
    pub treated: bool,
}

/// A table.
pub(super) struct Place {
    pub relation: Relation,
    pub owner: pg_sys::Oid,
    /// It is read without those that inherit from it, which are read for themselves.
    pub only: bool,
    /// Which of the policy's tables it is.
    pub table: Option<usize>,
    pub columns: Vec<Column>,
    /// Columns whose values could hold text and cannot be read as such.
    pub bytes: Vec<Ident>,
    /// Why it is not searched.
    pub unsearched: Option<&'static str>,
}

/// The tables in scope, the policy's own first. Those that `guesser` may write to are not searched.
///
/// # Errors
/// Errors of the server.
pub(super) fn find(plan: &Plan, scope: Scope, guesser: Option<pg_sys::Oid>) -> Result<Vec<Place>> {
    let own: Vec<i64> = plan.tables.iter().map(|t| i64::from(t.relation.oid.to_u32())).collect();
    let archives = archives()?;
    let rows = as_extension(|| {
        sql::read(
            "SELECT c.oid, n.nspname, c.relname, c.relowner, c.relkind, \
                    c.relrowsecurity AND c.relforcerowsecurity AND NOT (w.rolsuper OR w.rolbypassrls), \
                    $5::oid <> 0 AND (pg_catalog.has_any_column_privilege($5::oid, c.oid, 'INSERT, UPDATE') OR EXISTS ( \
                        SELECT FROM pg_catalog.pg_partition_tree(c.oid) p \
                        WHERE pg_catalog.has_any_column_privilege($5::oid, p.relid, 'INSERT, UPDATE'))) \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             JOIN pg_catalog.pg_roles w ON w.oid = c.relowner \
             WHERE c.oid::bigint = ANY ($1) OR ($2 AND c.relkind IN ('r', 'p', 'm', 'f') AND NOT c.relispartition AND c.relpersistence <> 't' \
                AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> ALL (ARRAY['information_schema', 'amazon_pii']) AND n.nspname <> ALL ($4) \
                AND ($3 OR n.oid IN (SELECT o.relnamespace FROM pg_catalog.pg_class o WHERE o.oid::bigint = ANY ($1)))) \
             ORDER BY c.oid::bigint <> ALL ($1), n.nspname, c.relname",
            &[
                Arg::Ints(own),
                Arg::Bool(scope != Scope::Linked),
                Arg::Bool(scope == Scope::Database),
                Arg::texts(&archives),
                Arg::Oid(guesser.unwrap_or(pg_sys::InvalidOid)),
            ],
        )
    })?;
    let mut places = Vec::new();
    for row in &rows {
        let relation = Relation {
            oid: row.oid(0)?,
            schema: Ident::new(row.str(1)?),
            name: Ident::new(row.str(2)?),
        };
        let kind = row.str(4)?;
        let unsearched = match (kind, row.bool(5)?, row.bool(6)?) {
            ("f", ..) => Some("foreign table"),
            (_, true, _) => Some("row-level security applies to its owner"),
            (_, _, true) => Some("the caller may write to it"),
            _ => None,
        };
        places.push(Place {
            table: plan.tables.iter().position(|t| t.relation.oid == relation.oid),
            owner: row.oid(3)?,
            only: kind == "r",
            relation,
            columns: Vec::new(),
            bytes: Vec::new(),
            unsearched,
        });
    }
    add_columns(plan, &mut places)?;
    Ok(places)
}

/// By the type below domains and arrays: texts, whatever extensions made (citext, hstore), addresses of networks, and
/// rows, whose text form holds that of their columns. Numbers, times and enums are left out.
fn add_columns(plan: &Plan, places: &mut [Place]) -> Result<()> {
    let oids: Vec<i64> = places.iter().map(|p| i64::from(p.relation.oid.to_u32())).collect();
    let at: HashMap<pg_sys::Oid, usize> = places.iter().enumerate().map(|(i, p)| (p.relation.oid, i)).collect();
    let rows = as_extension(|| {
        sql::read(
            "WITH RECURSIVE below (relation, number, name, declared, oid) AS ( \
                SELECT a.attrelid, a.attnum, a.attname, a.atttypid, a.atttypid FROM pg_catalog.pg_attribute a \
                WHERE a.attrelid::bigint = ANY ($1) AND a.attnum > 0 AND NOT a.attisdropped \
                UNION ALL \
                SELECT b.relation, b.number, b.name, b.declared, CASE t.typtype WHEN 'd' THEN t.typbasetype ELSE t.typelem END \
                FROM below b JOIN pg_catalog.pg_type t ON t.oid = b.oid WHERE t.typtype = 'd' OR (t.typcategory = 'A' AND t.typelem <> 0)) \
             SELECT b.relation, b.name, t.oid = 'pg_catalog.bytea'::regtype, t.oid = 'pg_catalog.tsvector'::regtype \
             FROM below b JOIN pg_catalog.pg_type t ON t.oid = b.oid \
             WHERE t.typtype <> 'd' AND NOT (t.typcategory = 'A' AND t.typelem <> 0) AND (t.typcategory IN ('S', 'I', 'C', 'X') \
                OR (t.typcategory = 'U' AND t.oid <> ALL ('{uuid, macaddr, macaddr8, pg_lsn, xid8, cid, tid, xid, txid_snapshot, pg_snapshot}'::regtype[]))) \
             ORDER BY b.relation, b.number",
            &[Arg::Ints(oids)],
        )
    })?;
    for row in &rows {
        let Some(place) = at.get(&row.oid(0)?).map(|i| &mut places[*i]) else {
            continue;
        };
        let name = Ident::new(row.str(1)?);
        if row.bool(2)? {
            place.bytes.push(name);
            continue;
        }
        let treated = place
            .table
            .is_some_and(|t| plan.tables[t].cells.iter().any(|c| c.name == name));
        place.columns.push(Column {
            name,
            vector: row.bool(3)?,
            treated,
        });
    }
    Ok(())
}
