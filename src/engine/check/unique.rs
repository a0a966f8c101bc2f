//! Unique indexes over treated columns: a treatment that gives every row the same value succeeds on the first order and
//! fails on the second, whatever rows there are today.

use super::{Problem, Severity};
use crate::domain::policy::Treatment as Rule;
use crate::domain::treatment::Shape;
use crate::engine::plan::{CellColumn, Plan, Table};
use crate::engine::walk::{FIRST, Values, by_key};
use crate::pg::error::Result;
use crate::pg::ident::{Expr, Ident};
use crate::pg::identity::{Identity, act_as, as_extension};
use crate::pg::sql::{self, Arg};
use crate::pg::unique::{self, Part, Unique};

/// What a treatment makes of the values of different rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gives {
    /// They stay what they are.
    Untouched,
    /// Different ones.
    Different,
    /// Possibly equal ones.
    Perhaps,
    Same,
    Null,
}

/// A unique index that certainly refuses the treatment where its condition holds, which rows must tell.
pub struct Open {
    table: usize,
    index: Unique,
    condition: Expr,
}

/// What is wrong whatever the rows are, and what they must tell.
///
/// # Errors
/// A cancel, or errors of the server that are not the policy's.
pub fn problems(plan: &Plan) -> Result<(Vec<Problem>, Vec<Open>)> {
    let (mut out, mut open) = (Vec::new(), Vec::new());
    for (at, table) in plan.tables.iter().enumerate().filter(|(_, t)| !t.delete) {
        for index in as_extension(|| unique::of_table(table.relation.oid))? {
            let key = index
                .key
                .iter()
                .map(|part| gives(plan, table, part))
                .collect::<Result<Vec<_>>>()?;
            let never_equal = |g: &Gives| match g {
                Gives::Different => true,
                Gives::Null => !index.nulls_collide,
                _ => false,
            };
            if key.iter().any(never_equal) || key.iter().all(|g| *g == Gives::Untouched) {
                continue;
            }
            let certain = index.equals && key.iter().all(|g| matches!(g, Gives::Same | Gives::Null));
            if !certain {
                if !kept_apart(table, &index, &key) {
                    out.push(problem(table, &index, Severity::Warning));
                }
                continue;
            }
            match &index.condition {
                None => out.push(problem(table, &index, Severity::Error)),
                Some(condition) => match (holds(plan, table, condition)?, &condition.sql) {
                    (Some(false), _) => {}
                    (Some(true), _) => out.push(problem(table, &index, Severity::Error)),
                    (None, None) => out.push(problem(table, &index, Severity::Warning)),
                    (None, Some(sql)) => {
                        let condition = sql.clone();
                        open.push(Open {
                            table: at,
                            index,
                            condition,
                        });
                    }
                },
            }
        }
    }
    Ok((out, open))
}

/// Decides about conditions by rows that have just been treated: where one of them is in the index, the next will be
/// refused.
///
/// # Errors
/// As [`by_key`].
pub fn settle(plan: &Plan, table: usize, open: &[Open], keys: &[Values]) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    for Open { index, condition, .. } in open.iter().filter(|o| o.table == table) {
        let mut applies = false;
        for row in by_key(plan, &plan.tables[table], keys, &[condition.to_string()])? {
            applies = applies || row.row.bool(FIRST)?;
        }
        let severity = if applies { Severity::Error } else { Severity::Warning };
        out.push(problem(&plan.tables[table], index, severity));
    }
    Ok(out)
}

fn problem(table: &Table, index: &Unique, severity: Severity) -> Problem {
    let (what, state) = if index.exclusion {
        ("exclusion constraint", "23P01")
    } else {
        ("unique index", "23505")
    };
    let name = Ident::new(index.name.clone());
    let problem = match severity {
        Severity::Error => {
            format!("{what} {name} refuses the treatment, which makes its columns equal in every row ({state})")
        }
        Severity::Warning | Severity::Info => {
            format!(
                "{what} {name} may refuse the treatment, which can make its columns equal in several rows ({state})"
            )
        }
    };
    let hint = "Treat one of its columns with {\"unique\": \"redacted-{key}\"}, or with \"null\" if it may be NULL.";
    Problem::new(severity, table.relation.shown(), problem, hint)
}

/// Whether columns of the index that stay as they are tell rows apart already.
fn kept_apart(table: &Table, index: &Unique, key: &[Gives]) -> bool {
    let stays = |column: &String| {
        index
            .key
            .iter()
            .zip(key)
            .any(|(part, gives)| part.plain && *gives == Gives::Untouched && part.reads.contains(column))
    };
    !index.exclusion && table.facts.keys.iter().any(|key| key.iter().all(stays))
}

fn gives(plan: &Plan, table: &Table, part: &Part) -> Result<Gives> {
    let columns = part
        .reads
        .iter()
        .map(|name| of_column(plan, table, name))
        .collect::<Result<Vec<_>>>()?;
    if part.plain {
        return Ok(columns.first().copied().unwrap_or(Gives::Untouched));
    }
    for gives in [Gives::Untouched, Gives::Different, Gives::Perhaps] {
        if columns.contains(&gives) {
            return Ok(gives);
        }
    }
    Ok(match evaluate(plan, table, part)? {
        Some(Some(_)) => Gives::Same,
        Some(None) => Gives::Null,
        None => Gives::Perhaps,
    })
}

fn of_column(plan: &Plan, table: &Table, name: &str) -> Result<Gives> {
    let Some(cell) = table.cells.iter().find(|c| c.name.bare() == name) else {
        return Ok(Gives::Untouched);
    };
    Ok(match cell.rule() {
        None => Gives::Untouched,
        Some(Rule::Null | Rule::Value(serde_json::Value::Null)) => Gives::Null,
        Some(Rule::Default) if cell.shape == Shape::Other => Gives::Null,
        Some(Rule::Default) if cell.shape != Shape::Text => Gives::Perhaps,
        Some(Rule::Default | Rule::Placeholder | Rule::Value(_)) => Gives::Same,
        Some(Rule::Unique(_)) => Gives::Different,
        Some(Rule::Sql(_)) => match constant(plan, table, cell)? {
            Some(Some(_)) => Gives::Same,
            Some(None) => Gives::Null,
            // Whoever writes an expression over the row for such a column knows why; the trial has a look at it.
            None => Gives::Different,
        },
        Some(Rule::Json(_) | Rule::JsonKeep(_) | Rule::ArrayPlaceholder | Rule::Prefix(_) | Rule::Scrub(_)) => {
            Gives::Perhaps
        }
    })
}

/// The value of an expression that reads no column.
fn constant(plan: &Plan, table: &Table, cell: &CellColumn) -> Result<Option<Option<String>>> {
    let Some(expression) = &cell.expression else {
        return Ok(None);
    };
    let value = format!("CAST({expression} AS {})", cell.type_shown);
    one(plan, table, &format!("SELECT {}", cell.out(value)), &[])
}

/// The value of an index's expression once all that it reads has been treated; `None` if that cannot be told.
fn evaluate(plan: &Plan, table: &Table, part: &Part) -> Result<Option<Option<String>>> {
    let Some(sql) = &part.sql else { return Ok(None) };
    let mut values = Vec::new();
    for name in &part.reads {
        let Some(cell) = table.cells.iter().find(|c| c.name.bare() == *name) else {
            return Ok(None);
        };
        values.push(match cell.treatment.as_ref().and_then(|t| t.constant()) {
            Some(text) => Some(text.to_owned()),
            None => constant(plan, table, cell)?.flatten(),
        });
    }
    let row: Vec<String> = part
        .reads
        .iter()
        .enumerate()
        .map(|(i, name)| format!("${} AS {}", i + 1, Ident::new(name.clone())))
        .collect();
    let args: Vec<Arg<'_>> = part
        .reads
        .iter()
        .zip(&values)
        .filter_map(|(name, value)| {
            let cell = table.cells.iter().find(|c| c.name.bare() == *name)?;
            Some(Arg::Typed(cell.type_oid, value.as_deref()))
        })
        .collect();
    let query = if row.is_empty() {
        format!("SELECT {}", crate::pg::ident::out(sql))
    } else {
        format!(
            "SELECT {} FROM (SELECT {}) AS {}",
            crate::pg::ident::out(sql),
            row.join(", "),
            table.relation.name
        )
    };
    one(plan, table, &query, &args)
}

/// Whether a condition holds for every treated row, or for none; `None` if it depends on more than the treatment.
fn holds(plan: &Plan, table: &Table, condition: &Part) -> Result<Option<bool>> {
    for name in &condition.reads {
        if !matches!(of_column(plan, table, name)?, Gives::Same | Gives::Null) {
            return Ok(None);
        }
    }
    Ok(evaluate(plan, table, condition)?.map(|value| value.as_deref() == Some("t")))
}

/// One value, as the table's owner; `None` if the query fails.
fn one(plan: &Plan, table: &Table, query: &str, args: &[Arg<'_>]) -> Result<Option<Option<String>>> {
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::read(query, args)
    });
    match rows {
        Ok(rows) => rows.first().map(|r| r.owned(0)).transpose(),
        Err(e) if e.is_cancel() => Err(e),
        Err(_) => Ok(None),
    }
}
