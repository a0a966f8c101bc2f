//! What would go wrong on day 30, found out when the policy is applied: facts of the catalog, and a trial of the real
//! treatment on real rows in a subtransaction that is rolled back.

pub mod archive;
mod by_age;
mod copies;
mod sample;
mod trial;
mod unique;

use pgrx::pg_sys;

use super::assign;
use super::columns;
use super::plan::{AnchorPlan, EXPRESSION_HINT, Mark, Plan, Table};
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
    /// Nothing is wrong; somebody should know.
    Info,
}

impl Severity {
    /// The word in `check_policy`'s column.
    pub fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
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
    /// As a row of a result: severity, object, problem, hint.
    pub fn into_row(self) -> (String, String, String, String) {
        (self.severity.word().to_owned(), self.object, self.problem, self.hint)
    }

    pub fn new(
        severity: Severity,
        object: impl Into<String>,
        problem: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
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
    if out.iter().all(|p| p.severity != Severity::Error) {
        out.extend(marks(plan)?);
    }
    out.extend(assign::problem(plan)?);
    out.extend(indexes(plan));
    out.extend(anchors(plan));
    out.extend(returns(plan));
    out.extend(columns::unnamed(plan)?);
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

/// Whether the server still accepts the expressions of a policy whose tables have changed.
///
/// # Errors
/// What is wrong with the first that it does not.
pub fn still_sound(plan: &Plan) -> Result<()> {
    for typed in types(plan) {
        match typed.types {
            Err(e) if e.is_cancel() => return Err(e),
            // Somebody has the table locked.
            Err(e) if e.is_lock() => {}
            Err(e) => return Err(e.at(&typed.place).hint(EXPRESSION_HINT)),
            Ok(types) if !typed.fits(&types) => {
                return Err(Error::invalid(format!("{}: not a condition", typed.place)).hint(EXPRESSION_HINT));
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

/// An expression of a policy, by its place in the document, and what the server makes of it.
struct Typed {
    place: String,
    is_condition: bool,
    types: Result<Vec<pg_sys::Oid>>,
}

impl Typed {
    fn fits(&self, types: &[pg_sys::Oid]) -> bool {
        !self.is_condition || types.first() == Some(&pg_sys::BOOLOID)
    }
}

/// Expressions that the server does not accept, and conditions that are none.
fn expressions(plan: &Plan) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    for typed in types(plan) {
        let problem = match &typed.types {
            Ok(types) if typed.fits(types) => continue,
            Ok(_) => "not a condition".to_owned(),
            Err(e) if e.is_cancel() => return Err(e.clone()),
            Err(e) => e.shown(),
        };
        out.push(Problem::new(Severity::Error, typed.place, problem, EXPRESSION_HINT));
    }
    Ok(out)
}

/// The types of a policy's expressions. They are looked at without parameters, so that none can refer to one of ours.
fn types(plan: &Plan) -> Vec<Typed> {
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
    for (index, table) in plan.tables.iter().enumerate() {
        let place = |m: &Mark| format!("{}.{}", table.relation.shown(), m.name.bare());
        all.extend(table.marks.iter().map(|m| (place(m), index, &m.expression, false)));
    }
    all.into_iter()
        .map(|(place, table, expression, is_condition)| {
            let table = &plan.tables[table];
            let types = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
                catalog::expression_types(&table.relation, std::slice::from_ref(expression))
            });
            Typed {
                place,
                is_condition,
                types,
            }
        })
        .collect()
}

/// Marks that their column does not take, found out without a row.
fn marks(plan: &Plan) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    for table in &plan.tables {
        for mark in &table.marks {
            let name = &table.relation.name;
            let planned = trial(|| {
                act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
                    for value in [mark.expression.to_string(), "DEFAULT".to_owned()] {
                        sql::read(
                            &format!(
                                "EXPLAIN UPDATE {} AS {name} SET {} = {value}",
                                table.relation, mark.name
                            ),
                            &[],
                        )?;
                    }
                    Ok(())
                })
            });
            match planned {
                Ok(()) => {}
                Err(e) if e.is_cancel() => return Err(e),
                Err(e) => out.push(Problem::new(
                    Severity::Error,
                    format!("{}.{}", table.relation.shown(), mark.name.bare()),
                    format!("the mark cannot be set: {}", e.shown()),
                    "Give an expression over the row whose type the column takes, for example \"now()\".",
                )),
            }
        }
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

/// Orders that come back by themselves do so later where the archive is on another server.
fn returns(plan: &Plan) -> Vec<Problem> {
    let Some(foreign) = &plan.archive.foreign else {
        return Vec::new();
    };
    let by_itself = plan.entries.iter().filter(|e| e.retrieve_on_insert.is_some());
    by_itself
        .map(|entry| {
            Problem::new(
                Severity::Info,
                format!("linked \"{}\".retrieve_on_insert", entry.alias),
                format!(
                    "an order comes back in the background, when {} has answered: no INSERT waits for it",
                    foreign.shown()
                ),
                "Applications that need it at once call amazon_pii.retrieve(); others LISTEN amazon_pii for \"retrieved\".",
            )
        })
        .collect()
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
