//! What would go wrong on day 30, found out when the policy is applied: facts of the catalog, and a trial of the real
//! treatment on real rows in a subtransaction that is rolled back.

use super::flag;
use super::gather::{self, LiveRecord};
use super::overwrite::{self, CellWrite, NewValue, RowWrite};
use super::plan::{AnchorPlan, EXPRESSION_HINT, Plan, Table};
use super::records::Stored;
use super::walk::Values;
use crate::domain::policy::Treatment as Rule;
use crate::domain::treatment::Shape;
use crate::pg::catalog;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Expr;
use crate::pg::identity::{Identity, act_as, as_extension};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::trial;
use crate::pg::xact;

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

/// Orders that the trial takes.
const SAMPLE: i64 = 50;

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
    out.extend(indexes(plan));
    out.extend(anchors(plan));
    let before_trial = out.iter().any(|p| p.severity == Severity::Error);
    if !before_trial {
        // A trial as a whole: functions that expressions call may write, too.
        match trial(|| try_out(plan)) {
            Ok(found) => out.extend(found),
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if e.hint_text().is_none() => out.push(Problem::of(&e.hint(EXPRESSION_HINT))),
            Err(e) => out.push(Problem::of(&e)),
        }
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
    if !table.delete {
        return Ok(Vec::new());
    }
    let oids = |wanted: &dyn Fn(usize, &Table) -> bool| -> Vec<i64> {
        let tables = plan.tables.iter().enumerate().filter(|(i, t)| wanted(*i, t));
        tables.map(|(_, t)| i64::from(u32::from(t.relation.oid))).collect()
    };
    // What a cascade deletes must be archived first: every row of a table that goes as a whole, too.
    let going = oids(&|i, t| t.delete && plan.entries.iter().all(|e| e.table != i || e.filter.is_none()));
    let known = oids(&|_, _| true);
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
                "Make that table an entry of the policy that deletes its rows, without \"where\", or redact columns instead of deleting rows.",
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

/// Treats some real orders and rolls everything back.
fn try_out(plan: &Plan) -> Result<Vec<Problem>> {
    let sample: Vec<Values> = flag::page(plan, None, SAMPLE)?
        .facts
        .into_iter()
        .map(|f| f.key)
        .collect();
    if sample.is_empty() {
        return Ok(Vec::new());
    }
    // Triggers that the caller left pending fire as the caller.
    xact::fire_deferred()?;
    let before = gather::gather(plan, &sample, &Stored::default())?;
    let facts = flag::by_keys(plan, &sample)?;
    let mut out = Vec::new();
    for (index, table) in plan.tables.iter().enumerate() {
        let records: Vec<&LiveRecord> = distinct(before.records.iter().filter(|r| r.table == index));
        let tried = trial(|| {
            let rows = rows(plan, &records)?;
            let keys: Vec<Values> = rows.iter().map(|r| r.key.clone()).collect();
            let locked = overwrite::lock(plan, table, &keys, false)?;
            let rows: Vec<RowWrite> = rows
                .into_iter()
                .zip(locked)
                .filter(|(_, l)| *l)
                .map(|(r, _)| r)
                .collect();
            if rows.is_empty() {
                return Ok(Vec::new());
            }
            if table.delete {
                overwrite::delete(plan, table, &rows)?;
                return Ok(Vec::new());
            }
            overwrite::update(plan, table, &rows)?;
            compare(plan, table, &sample, &before, &facts)
        });
        match tried {
            Ok(found) => out.extend(found),
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if e.is_lock() => {}
            Err(e) => out.push(Problem::new(
                Severity::Error,
                table.relation.shown(),
                format!("the treatment fails on existing rows: {}", e.stored()),
                e.hint_text()
                    .unwrap_or("Choose a treatment that the table's constraints and triggers accept."),
            )),
        }
    }
    Ok(out)
}

/// One record a row, whichever orders reach it.
fn distinct<'a>(records: impl Iterator<Item = &'a LiveRecord>) -> Vec<&'a LiveRecord> {
    let mut seen = std::collections::HashSet::new();
    records.filter(|r| seen.insert(r.key_text.clone())).collect()
}

fn rows(plan: &Plan, records: &[&LiveRecord]) -> Result<Vec<RowWrite>> {
    let mut out = Vec::new();
    for record in records {
        let pii = record.pii(plan)?;
        if pii.is_empty() {
            continue;
        }
        let mut cells = record.as_it_is();
        for (i, outcome) in pii {
            let expected = record.cells[i].as_ref().and_then(|c| c.value.clone());
            let new = NewValue::from(&outcome);
            cells[i] = CellWrite::Write { expected, new };
        }
        out.push(RowWrite {
            key: record.key.clone(),
            cells,
        });
    }
    Ok(out)
}

/// What the policy says of the same orders after the treatment must be what it said before, and the treatment must
/// find nothing more to do.
fn compare(
    plan: &Plan,
    table: &Table,
    sample: &[Values],
    before: &gather::Gathered,
    facts: &[flag::OrderFact],
) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    let after = gather::gather(plan, sample, &Stored::default())?;
    let reached = |g: &gather::Gathered| {
        let mut all: Vec<(usize, usize, String)> = g
            .records
            .iter()
            .map(|r| (r.order, r.table, r.key_text.clone()))
            .collect();
        all.sort();
        all
    };
    if reached(before) != reached(&after) {
        out.push(Problem::new(
            Severity::Error,
            table.relation.shown(),
            "a link or condition of the policy gives another result once its columns are redacted",
            "Link by keys, not by columns that hold personal data.",
        ));
    }
    let shown = |list: &[flag::OrderFact]| -> Vec<(String, Option<String>, Option<String>)> {
        let mut all: Vec<_> = list
            .iter()
            .map(|f| (f.key_text.clone(), f.number.clone(), f.anchor.clone()))
            .collect();
        all.sort();
        all
    };
    if shown(facts) != shown(&flag::by_keys(plan, sample)?) {
        out.push(Problem::new(
            Severity::Error,
            table.relation.shown(),
            "\"amazon\", \"number\" or \"anchor\" gives another result once its columns are redacted",
            "Leave the columns that these expressions read out of \"redact\".",
        ));
    }
    for record in after
        .records
        .iter()
        .filter(|r| plan.tables[r.table].relation == table.relation)
    {
        if let Some((i, _)) = record.pii(plan)?.first() {
            out.push(Problem::new(
                Severity::Error,
                format!("{}.{}", table.relation.shown(), table.cells[*i].name.bare()),
                "the treatment changes its own result again",
                "A treatment must leave what it has written as it is.",
            ));
            break;
        }
    }
    Ok(out)
}
