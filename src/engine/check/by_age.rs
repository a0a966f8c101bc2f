//! What would go wrong with rows that no order leads to.

use super::{Problem, Severity, lengths, taken_along};
use crate::engine::by_age::tried;
use crate::engine::plan::{Aged, EXPRESSION_HINT, Plan};
use crate::pg::catalog;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Relation;
use crate::pg::identity::{Identity, act_as, as_extension};
use crate::pg::sql::{self, Arg};

/// What the catalog and our own tables tell.
pub(super) fn problems(plan: &Plan) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    for aged in &plan.by_age {
        let table = &aged.table;
        out.extend(lengths(plan, table));
        // Not even rows that are old too: they may be younger, or meet no condition.
        out.extend(taken_along(
            table,
            Vec::new(),
            Vec::new(),
            "Overwrite columns instead of deleting rows, or change the foreign key.",
        )?);
        out.extend(condition(plan, aged)?);
        out.extend(expressions(plan, aged)?);
        let relation: &Relation = &table.relation;
        if !table.has_index(std::slice::from_ref(&aged.at)) {
            out.push(Problem::new(
                Severity::Warning,
                table.relation.shown(),
                "no usable index for the age of its rows; every look for old ones reads the whole table",
                format!("CREATE INDEX ON {relation} ({});", aged.at.index_text()),
            ));
        }
    }
    out.extend(other_policies(plan)?);
    Ok(out)
}

fn condition(plan: &Plan, aged: &Aged) -> Result<Option<Problem>> {
    let Some(filter) = &aged.filter else { return Ok(None) };
    let types = act_as(Identity::Owner(aged.table.owner), &plan.search_path, &[], || {
        catalog::expression_types(&aged.table.relation, std::slice::from_ref(filter))
    });
    let problem = match types {
        Ok(types) if types.first() == Some(&pgrx::pg_sys::BOOLOID) => return Ok(None),
        Ok(_) => "not a condition".to_owned(),
        Err(e) if e.is_cancel() => return Err(e),
        Err(e) => e.shown(),
    };
    let place = format!("{}.where", aged.name);
    Ok(Some(Problem::new(Severity::Error, place, problem, EXPRESSION_HINT)))
}

fn expressions(plan: &Plan, aged: &Aged) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    for cell in &aged.table.cells {
        let Some(expression) = &cell.expression else { continue };
        let types = act_as(Identity::Owner(aged.table.owner), &plan.search_path, &[], || {
            catalog::expression_types(&aged.table.relation, std::slice::from_ref(expression))
        });
        match types {
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) => {
                let place = format!("{}.{}", aged.table.relation.shown(), cell.name.bare());
                out.push(Problem::new(Severity::Error, place, e.shown(), EXPRESSION_HINT));
            }
            Ok(_) => {}
        }
    }
    Ok(out)
}

/// What is an order's in one policy must not go by its age in another: nobody would have archived it.
fn other_policies(plan: &Plan) -> Result<Vec<Problem>> {
    let oid = |oid: pgrx::pg_sys::Oid| i64::from(u32::from(oid));
    let aged = plan.by_age.iter().map(|a| oid(a.table.relation.oid)).collect();
    let linked = plan.tables.iter().map(|t| oid(t.relation.oid)).collect();
    let rows = as_extension(|| {
        sql::read(
            "SELECT DISTINCT t.relation::text, t.policy FROM amazon_pii.policy_table t WHERE t.policy <> $1 \
                AND (t.entry NOT LIKE 'by\\_age[%' AND t.relation::oid::bigint = ANY ($2) \
                  OR t.entry LIKE 'by\\_age[%' AND t.relation::oid::bigint = ANY ($3)) ORDER BY 1, 2",
            &[Arg::Text(Some(&plan.policy)), Arg::Ints(aged), Arg::Ints(linked)],
        )
    })?;
    rows.iter()
        .map(|r| {
            Ok(Problem::new(
                Severity::Error,
                r.str(0)?,
                format!(
                    "its rows would go by their age in one policy and with their orders in another, \"{}\"",
                    r.str(1)?
                ),
                "Leave the table out of one of them.",
            ))
        })
        .collect()
}

/// The real treatment on real rows.
pub(super) fn trials(plan: &Plan) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    for aged in &plan.by_age {
        let shown = aged.table.relation.shown();
        match tried(plan, aged) {
            Ok(None) => {}
            Ok(Some(column)) => out.push(Problem::new(
                Severity::Error,
                format!("{shown}.{column}"),
                "the treatment changes its own result again",
                "A treatment must leave what it has written as it is.",
            )),
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if e.is_lock() => {}
            Err(e) => out.push(failed(shown, &e)),
        }
    }
    Ok(out)
}

fn failed(shown: String, error: &Error) -> Problem {
    Problem::new(
        Severity::Error,
        shown,
        format!("the treatment fails on existing rows: {}", error.stored()),
        error
            .hint_text()
            .unwrap_or("Choose a treatment that the table's constraints and triggers accept."),
    )
}
