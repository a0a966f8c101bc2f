//! The columns of a policy's tables: which of them somebody has looked at, and how they are found again.

use std::collections::HashSet;

use pgrx::pg_sys;

use super::check::{Problem, Severity};
use super::history;
use super::plan::{Plan, TODAY, Table, former};
use super::watched;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// The columns of a table that a document names by their bare names.
fn named(plan: &Plan, table: &Table) -> HashSet<String> {
    let mut out = HashSet::new();
    plan.document.clone().rename_columns(|name, text| {
        let entry = plan
            .entries
            .iter()
            .find(|e| e.alias == name)
            .map(|e| &plan.tables[e.table]);
        let aged = plan.by_age.iter().find(|a| a.name == name).map(|a| &a.table);
        let history = plan.history.iter().find(|_| name == history::NAME).map(|h| &h.table);
        let here = entry
            .or(aged)
            .or(history)
            .is_some_and(|t| t.relation.oid == table.relation.oid);
        if here && table.facts.column(text).is_some() {
            out.insert(text.to_owned());
        }
        None
    });
    out
}

/// Every table of a policy, once.
fn tables(plan: &Plan) -> Vec<&Table> {
    let mut out: Vec<&Table> = Vec::new();
    let apart = plan
        .by_age
        .iter()
        .map(|a| &a.table)
        .chain(plan.history.iter().map(|h| &h.table));
    for table in plan.tables.iter().chain(apart) {
        if out.iter().all(|t| t.relation.oid != table.relation.oid) {
            out.push(table);
        }
    }
    out
}

/// Writes down the columns of a policy that is being applied over version `before` (0: none). All columns of a table that is
/// new to the policy are known; of another one those that were, and those that the document names. `names` has the name under which the archive knows each table.
///
/// # Errors
/// Errors of the server.
pub fn store(plan: &Plan, names: &[(pg_sys::Oid, String)], before: i64) -> Result<()> {
    let known = sql::read(TODAY, &[Arg::Text(Some(&plan.policy))])?;
    for table in tables(plan) {
        let Some((_, archived_as)) = names.iter().find(|(oid, _)| *oid == table.relation.oid) else {
            continue;
        };
        let named = named(plan, table);
        let read = watched::read_by_expressions(plan, table)?;
        let mut mine = Vec::new();
        for row in known.iter().filter(|r| r.str(0).is_ok_and(|t| t == archived_as)) {
            mine.push((row.string(1)?, row.string(2)?, former(row.text(3)?)?, row.owned(6)?));
        }
        let mut taken: HashSet<String> = mine.iter().map(|m| m.0.clone()).collect();
        let is_new = mine.is_empty();
        for column in &table.facts.columns {
            let name = column.name.bare();
            let known = mine.iter().find(|m| m.3.as_deref() == Some(name));
            if known.is_none() && !is_new && !named.contains(name) {
                continue;
            }
            let (archived_as_column, mut earlier) = match known {
                Some((archived, said, earlier, _)) => {
                    let mut earlier = earlier.clone();
                    if said != name {
                        earlier.push((before, said.clone()));
                    }
                    (archived.clone(), earlier)
                }
                None => (free(&mut taken, name), Vec::new()),
            };
            earlier.sort_by_key(|(last, _)| *last);
            let earlier = if earlier.is_empty() {
                None
            } else {
                Some(serde_json::to_string(&earlier).map_err(|_| Error::internal("former names of a column"))?)
            };
            sql::execute(
                "INSERT INTO amazon_pii.policy_column (policy, table_name, archived_as, number, name, seen_as, former, named, read) \
                 VALUES ($1, $2, $3, $4, $5, $5, $6, $7, $8) ON CONFLICT (policy, table_name, archived_as) DO UPDATE SET \
                    number = EXCLUDED.number, name = EXCLUDED.name, seen_as = EXCLUDED.seen_as, former = EXCLUDED.former, \
                    named = EXCLUDED.named, read = EXCLUDED.read",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(archived_as)),
                    Arg::Text(Some(&archived_as_column)),
                    Arg::Int(column.number),
                    Arg::Text(Some(name)),
                    Arg::Text(earlier.as_deref()),
                    Arg::Bool(named.contains(name) || read.contains(name)),
                    Arg::Bool(read.contains(name)),
                ],
            )?;
        }
        // Those that are gone are remembered for what the archive has of them.
        let gone: Vec<&str> = mine.iter().filter(|m| m.3.is_none()).map(|m| m.0.as_str()).collect();
        sql::execute(
            "UPDATE amazon_pii.policy_column SET number = NULL, named = false, read = false \
             WHERE policy = $1 AND table_name = $2 AND archived_as = ANY ($3)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(archived_as)),
                Arg::texts(&gone),
            ],
        )?;
    }
    Ok(())
}

/// A name that the archive has not used for another column of the table.
fn free(taken: &mut HashSet<String>, name: &str) -> String {
    let mut number = 1;
    let mut free = name.to_owned();
    while !taken.insert(free.clone()) {
        number += 1;
        free = format!("{name} ({number})");
    }
    free
}

/// Writes down the columns of a policy that was applied by a version that did not: all that are there count as known.
///
/// # Errors
/// Errors of the server.
pub fn catch_up(plan: &Plan) -> Result<()> {
    as_extension(|| {
        let names = sql::read(
            "SELECT DISTINCT t.relation::oid, t.archived_as FROM amazon_pii.policy_table t WHERE t.policy = $1 \
                AND NOT EXISTS (SELECT FROM amazon_pii.policy_column c WHERE c.policy = $1)",
            &[Arg::Text(Some(&plan.policy))],
        )?
        .iter()
        .map(|r| Ok((r.oid(0)?, r.string(1)?)))
        .collect::<Result<Vec<_>>>()?;
        if names.is_empty() {
            return Ok(());
        }
        for table in tables(plan).into_iter().filter(|t| t.delete) {
            sql::execute(
                "UPDATE amazon_pii.policy_table SET whole = true WHERE policy = $1 AND relation::oid = $2",
                &[Arg::Text(Some(&plan.policy)), Arg::Oid(table.relation.oid)],
            )?;
        }
        store(plan, &names, plan.version)
    })
}

/// Notes where the columns are today, so that a dump knows them by name.
///
/// # Errors
/// Errors of the server.
pub fn see(policy: &str) -> Result<()> {
    as_extension(|| {
        sql::execute(
            &[
                "UPDATE amazon_pii.policy_column AS p SET number = t.place, seen_as = COALESCE(t.now, p.seen_as) FROM (",
                TODAY,
                ") AS t WHERE p.policy = t.policy AND p.table_name = t.table_name AND p.archived_as = t.archived_as \
                    AND (p.number IS DISTINCT FROM t.place OR p.seen_as <> t.now)",
            ]
            .concat(),
            &[Arg::Text(Some(policy))],
        )?;
        sql::execute(
            "UPDATE amazon_pii.policy_table SET numbered_in = relation::oid WHERE policy = $1 AND numbered_in <> relation::oid",
            &[Arg::Text(Some(policy))],
        )
    })?;
    Ok(())
}

/// Columns that came after the policy was applied and that its new document does not name either.
///
/// # Errors
/// Errors of the server.
pub fn unnamed(plan: &Plan) -> Result<Vec<Problem>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT schema_name, table_name, column_name FROM amazon_pii.unclassified WHERE policy = $1 ORDER BY 1, 2, 3",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    let mut out = Vec::new();
    for row in &rows {
        let (schema, name, column) = (row.str(0)?, row.str(1)?, row.str(2)?);
        let here = |t: &Table| t.relation.schema.bare() == schema && t.relation.name.bare() == name;
        let Some(table) = tables(plan).into_iter().find(|t| here(t)) else {
            continue;
        };
        if !table.delete && !named(plan, table).contains(column) {
            out.push(Problem::new(
                Severity::Warning,
                format!("{}.{column}", table.relation.shown()),
                "the column came after the policy was applied, and is neither redacted nor kept",
                "Name it under \"redact\" or under \"keep\".",
            ));
        }
    }
    Ok(out)
}
