//! What would go wrong on day 30, found out when the policy is applied: facts of the catalog, and a trial of the real
//! treatment on real rows in a subtransaction that is rolled back.

mod by_age;
mod sample;
mod trial;
mod unique;

use super::assign;
use super::plan::{AnchorPlan, EXPRESSION_HINT, Plan, Table};
use crate::domain::policy::Treatment as Rule;
use crate::domain::treatment::Shape;
use crate::pg::catalog;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Expr;
use crate::pg::identity::{Identity, act_as, as_extension};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::trial;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Error,
    Warning,
}

impl Severity {
    /// The word in `check_policy`'s column.
    pub fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// Something that is wrong with a policy.
#[derive(Debug, Clone)]
pub struct Problem {
    pub severity: Severity,
    pub object: String,
    pub problem: String,
    pub hint: String,
}

impl Problem {
    fn new(severity: Severity, object: impl Into<String>, problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            severity,
            object: object.into(),
            problem: problem.into(),
            hint: hint.into(),
        }
    }

    /// An error that kept the policy from being made ready at all.
    pub fn of(error: &Error) -> Self {
        Self::new(
            Severity::Error,
            "policy",
            error.shown(),
            error.hint_text().unwrap_or_default(),
        )
    }
}

/// Everything that can be found.
///
/// # Errors
/// A cancel, or errors of the server that are not the policy's.
pub fn problems(plan: &Plan) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    for table in &plan.tables {
        out.extend(lengths(plan, table));
        out.extend(cascades(plan, table)?);
    }
    out.extend(expressions(plan)?);
    out.extend(assign::problem(plan)?);
    out.extend(indexes(plan));
    out.extend(anchors(plan));
    let (found, open) = unique::problems(plan)?;
    out.extend(found);
    out.extend(by_age::problems(plan)?);
    let before_trial = out.iter().any(|p| p.severity == Severity::Error);
    if !before_trial {
        // A trial as a whole: functions that expressions call may write, too.
        match trial(|| trial::try_out(plan, &open)) {
            Ok(found) => out.extend(found),
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if e.hint_text().is_none() => out.push(Problem::of(&e.hint(EXPRESSION_HINT))),
            Err(e) => out.push(Problem::of(&e)),
        }
        out.extend(by_age::trials(plan)?);
    }
    Ok(out)
}

/// Expressions that the server does not accept, and conditions that are none. They are looked at without parameters, so
/// that none can refer to one of ours.
fn expressions(plan: &Plan) -> Result<Vec<Problem>> {
    // Place, table, expression, whether it is a condition.
    let mut all: Vec<(String, usize, &Expr, bool)> = vec![("orders.amazon".to_owned(), 0, &plan.amazon, true)];
    all.extend(plan.number.iter().map(|e| ("orders.number".to_owned(), 0, e, false)));
    all.extend(
        plan.replaces
            .iter()
            .map(|e| ("orders.replaces".to_owned(), 0, e, false)),
    );
    for entry in &plan.entries {
        let place = |key: &str| format!("linked \"{}\".{key}", entry.alias);
        all.extend(entry.filter.iter().map(|e| (place("where"), entry.table, e, true)));
        all.extend(entry.number.iter().map(|e| (place("number"), entry.table, e, false)));
        let on_insert = entry.retrieve_on_insert.iter().flatten();
        all.extend(on_insert.map(|e| (place("retrieve_on_insert"), entry.table, e, true)));
    }
    if let Some(history) = &plan.history {
        all.extend(history.expressions().map(|(place, e)| (place, 0, e, false)));
    }
    if let Some(customer) = &plan.customer {
        let entry = &plan.entries[customer.entry];
        let place = || format!("linked \"{}\".duplicate_by", entry.alias);
        all.extend(customer.duplicate_by.iter().map(|e| (place(), entry.table, e, false)));
    }
    for anchor in &plan.anchors {
        if let AnchorPlan::Linked {
            entry,
            filter,
            complete,
            ..
        } = anchor
        {
            let table = plan.entries[*entry].table;
            all.extend(
                filter
                    .iter()
                    .map(|e| ("orders.anchor.where".to_owned(), table, e, true)),
            );
            all.extend(
                complete
                    .iter()
                    .map(|e| ("orders.anchor.complete".to_owned(), 0, e, true)),
            );
        }
    }
    for (index, table) in plan.tables.iter().enumerate() {
        let place = format!("{}.files", table.relation.shown());
        all.extend(table.files.iter().map(|e| (place.clone(), index, e, false)));
        for cell in &table.cells {
            let place = || format!("{}.{}", table.relation.shown(), cell.name.bare());
            all.extend(cell.expression.iter().map(|e| (place(), index, e, false)));
        }
    }
    let mut out = Vec::new();
    for (place, table, expression, condition) in all {
        let table = &plan.tables[table];
        let types = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
            catalog::expression_types(&table.relation, std::slice::from_ref(expression))
        });
        let problem = match types {
            Ok(types) if condition && types.first() != Some(&pgrx::pg_sys::BOOLOID) => "not a condition".to_owned(),
            Ok(_) => continue,
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) => e.shown(),
        };
        out.push(Problem::new(Severity::Error, place, problem, EXPRESSION_HINT));
    }
    Ok(out)
}

/// Texts that do not fit their columns.
fn lengths(plan: &Plan, table: &Table) -> Vec<Problem> {
    let placeholder = plan.document.placeholder.chars().count() as i64;
    table
        .cells
        .iter()
        .filter(|c| c.shape == Shape::Text && c.treatment.is_some())
        .filter_map(|cell| {
            let limit = table.facts.column(cell.name.bare())?.max_length?;
            let (what, needed) = match cell.rule()? {
                Rule::Default | Rule::Placeholder => ("placeholder", placeholder),
                Rule::Value(serde_json::Value::String(text)) => ("value", text.chars().count() as i64),
                // A key has one character at least.
                Rule::Unique(text) => ("value", text.replace("{key}", "1").chars().count() as i64),
                _ => return None,
            };
            (needed > limit).then(|| {
                Problem::new(
                    Severity::Error,
                    format!("{}.{}", table.relation.shown(), cell.name.bare()),
                    format!("the {what} has {needed} characters, the column holds {limit}"),
                    "Use {\"value\": \"…\"} with a shorter text, {\"prefix\": n} or \"null\", or make the column longer.",
                )
            })
        })
        .collect()
}

/// Foreign keys that would take rows along which are no part of the policy.
fn cascades(plan: &Plan, table: &Table) -> Result<Vec<Problem>> {
    let oids = |wanted: &dyn Fn(usize, &Table) -> bool| -> Vec<i64> {
        let tables = plan.tables.iter().enumerate().filter(|(i, t)| wanted(*i, t));
        tables.map(|(_, t)| i64::from(u32::from(t.relation.oid))).collect()
    };
    // What a cascade deletes must be archived first: every row of a table that goes as a whole, too.
    let going = oids(&|i, t| t.delete && plan.entries.iter().all(|e| e.table != i || e.filter.is_none()));
    let known = oids(&|_, _| true);
    taken_along(
        table,
        going,
        known,
        "Make that table an entry of the policy that deletes its rows, without \"where\", or redact columns instead of deleting rows.",
    )
}

/// Foreign keys through which the deletion of a table's rows would delete rows of tables that are not `going`, or change
/// rows of tables that are not `known`.
fn taken_along(table: &Table, going: Vec<i64>, known: Vec<i64>, hint: &str) -> Result<Vec<Problem>> {
    if !table.delete {
        return Ok(Vec::new());
    }
    let rows = as_extension(|| {
        sql::read(
            "SELECT c.conname, c.conrelid::pg_catalog.regclass::text FROM pg_catalog.pg_constraint c WHERE c.contype = 'f' \
             AND c.confrelid = $1 AND (c.confdeltype = 'c' AND c.conrelid::bigint <> ALL ($2) \
                OR c.confdeltype IN ('n', 'd') AND c.conrelid::bigint <> ALL ($3))",
            &[Arg::Oid(table.relation.oid), Arg::Ints(going), Arg::Ints(known)],
        )
    })?;
    rows.iter()
        .map(|r| {
            Ok(Problem::new(
                Severity::Error,
                table.relation.shown(),
                format!(
                    "deleting its rows would change rows of {} through foreign key \"{}\"",
                    r.str(1)?,
                    r.str(0)?
                ),
                hint,
            ))
        })
        .collect()
}

/// Lookups without an index: each batch would read the whole table.
fn indexes(plan: &Plan) -> Vec<Problem> {
    let missing = |table: &Table, on: &[Expr]| {
        (!table.has_index(on)).then(|| {
            let list: Vec<String> = on.iter().map(Expr::index_text).collect();
            Problem::new(
                Severity::Warning,
                table.relation.shown(),
                "no usable index for the link to it; every batch reads the whole table",
                format!("CREATE INDEX ON {} ({});", table.relation, list.join(", ")),
            )
        })
    };
    let mut out = Vec::new();
    for entry in &plan.entries {
        let Some(parent) = entry.parent else { continue };
        out.extend(missing(&plan.tables[entry.table], &entry.on_child));
        if plan.tables[entry.table].shared {
            out.extend(missing(&plan.tables[plan.entries[parent].table], &entry.on_parent));
        }
    }
    out
}

fn anchors(plan: &Plan) -> Vec<Problem> {
    plan.anchors
        .iter()
        .filter_map(|a| match a {
            AnchorPlan::Linked {
                entry, complete: None, ..
            } => Some(Problem::new(
                Severity::Warning,
                "orders.anchor",
                format!(
                    "entry \"{}\" may not have a row yet for the open part of a part-shipped order",
                    plan.entries[*entry].alias
                ),
                "Add \"complete\": a condition over the order that is true once nothing is left to dispatch.",
            )),
            _ => None,
        })
        .collect()
}
