//! Tables to which the shop's own triggers write when a row is overwritten: histories and audit tables, which may keep a copy
//! of what was there.

use std::collections::HashSet;

use pgrx::pg_sys;

use super::{Problem, Severity};
use crate::engine::plan::{Plan, Table};
use crate::pg::catalog;
use crate::pg::error::Result;
use crate::pg::ident::{Ident, Relation};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// How many rows this transaction has written to a table.
pub(super) type Written = Vec<(Relation, i64)>;

/// What this transaction has written to each of the database's tables, as the server counts it.
pub(super) fn written() -> Result<Written> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT s.relid, s.schemaname, s.relname, s.n_tup_ins + s.n_tup_upd FROM pg_catalog.pg_stat_xact_user_tables AS s \
             WHERE s.n_tup_ins + s.n_tup_upd > 0",
            &[],
        )
    })?;
    rows.iter()
        .map(|r| {
            let relation = Relation {
                oid: r.oid(0)?,
                schema: Ident::new(r.str(1)?),
                name: Ident::new(r.str(2)?),
            };
            Ok((relation, r.int(3)?))
        })
        .collect()
}

/// The tables outside of the policy that were written to since then, while rows of `table` were overwritten.
pub(super) fn problems(plan: &Plan, table: &Table, before: &Written) -> Result<Vec<Problem>> {
    let after = written()?;
    let grown = |r: &Relation, n: i64| before.iter().all(|(known, m)| known.oid != r.oid || *m < n);
    let mut covered: HashSet<pg_sys::Oid> = HashSet::new();
    for table in &plan.tables {
        let all = as_extension(|| catalog::with_partitions(table.relation.oid))?;
        covered.extend(all.iter().map(|r| r.oid));
    }
    let elsewhere: Vec<&Relation> = after
        .iter()
        .filter(|(r, n)| grown(r, *n) && !covered.contains(&r.oid))
        .map(|(r, _)| r)
        .collect();
    if elsewhere.is_empty() {
        return Ok(Vec::new());
    }
    let triggers = triggers(table)?;
    let shown = |relation: &Relation| {
        let to = relation.shown();
        let by = match triggers.as_slice() {
            [] => format!("overwriting its rows writes to {to}"),
            [one] => format!("trigger {one} writes to {to} when a row is overwritten"),
            some => format!(
                "one of the triggers {} writes to {to} when a row is overwritten",
                some.join(", ")
            ),
        };
        Problem::new(
            Severity::Warning,
            table.relation.shown(),
            format!("{by}, and may keep a copy of what was there"),
            format!(
                "Make {to} an entry of the policy, with the columns that hold copies: they are redacted in the same cycle."
            ),
        )
    };
    Ok(elsewhere.into_iter().map(shown).collect())
}

/// The shop's own triggers that fire when a row of the table is overwritten, or goes.
fn triggers(table: &Table) -> Result<Vec<String>> {
    // tgtype: 8 is DELETE, 16 is UPDATE.
    let event = if table.delete { 8 } else { 16 };
    let rows = as_extension(|| {
        sql::read(
            "SELECT DISTINCT t.tgname FROM pg_catalog.pg_trigger AS t JOIN pg_catalog.pg_proc AS p ON p.oid = t.tgfoid \
             WHERE (t.tgrelid = $1 OR t.tgrelid IN (SELECT relid FROM pg_catalog.pg_partition_tree($1))) \
               AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgtype & $2::int <> 0 \
               AND p.pronamespace <> 'amazon_pii'::regnamespace ORDER BY t.tgname",
            &[Arg::Oid(table.relation.oid), Arg::Int(event)],
        )
    })?;
    rows.iter().map(|r| Ok(Ident::new(r.str(0)?).to_string())).collect()
}
