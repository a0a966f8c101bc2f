use pgrx::prelude::*;

use crate::engine::apply;
use crate::engine::check::Problem;
use crate::engine::dropping;
use crate::engine::export;
use crate::engine::home;
use crate::engine::inspect;
use crate::pg::error::{Error, or_raise};

/// A document arrives as JSON and leaves as the text that serde reads.
fn text(document: &pgrx::JsonB) -> String {
    document.0.to_string()
}

#[pg_extern(sql = false)]
fn apply_policy(document: pgrx::JsonB) -> String {
    or_raise(apply::apply(&text(&document)))
}

#[pg_extern(sql = false)]
fn check_policy(
    document: pgrx::JsonB,
) -> TableIterator<
    'static,
    (
        name!(severity, String),
        name!(object, String),
        name!(problem, String),
        name!(hint, String),
    ),
> {
    let problems = or_raise(apply::check(&text(&document)));
    TableIterator::new(problems.into_iter().map(Problem::into_row))
}

#[pg_extern(sql = false)]
fn preset(name: &str) -> pgrx::JsonB {
    let text = or_raise(apply::preset(name));
    // Ours, and tried by a test.
    pgrx::JsonB(serde_json::from_str(text).unwrap_or_default())
}

#[pg_extern(sql = false)]
fn enable_policy(policy: &str) {
    or_raise(apply::enable(policy));
}

#[pg_extern(sql = false)]
fn disable_policy_with_reason(policy: Option<&str>, reason: Option<&str>) {
    let policy = policy.ok_or_else(|| Error::invalid("the policy must not be null"));
    or_raise(policy.and_then(|policy| apply::disable(policy, reason)));
}

#[pg_extern(sql = false)]
fn drop_policy_for(policy: Option<&str>, reason: Option<&str>) {
    let policy = policy.ok_or_else(|| Error::invalid("the policy must not be null"));
    or_raise(policy.and_then(|policy| dropping::drop(policy, reason)));
}

#[pg_extern(sql = false)]
fn adopt_copy(policy: Option<&str>) -> i64 {
    or_raise(home::adopt(policy))
}

#[pg_extern(sql = false)]
fn mark_exported(policy: &str, upto: TimestampWithTimeZone, back: bool) -> i64 {
    or_raise(crate::pg::xact::from_server(upto).and_then(|at| export::mark(policy, &at, back)))
}

#[pg_extern(sql = false)]
fn preview(
    policy: &str,
    as_of: TimestampWithTimeZone,
) -> TableIterator<
    'static,
    (
        name!(action, String),
        name!(table_name, String),
        name!(orders, i64),
        name!(records, i64),
    ),
> {
    let rows = or_raise(crate::pg::xact::from_server(as_of).and_then(|at| inspect::preview(policy, &at)));
    TableIterator::new(
        rows.into_iter()
            .map(|p| (p.action.to_owned(), p.table, p.orders, p.records)),
    )
}

#[pg_extern(sql = false)]
fn explain_order(
    order_number: &str,
) -> TableIterator<'static, (name!(step, String), name!(object, String), name!(detail, String))> {
    let steps = or_raise(inspect::explain(order_number));
    TableIterator::new(steps.into_iter().map(|s| (s.step.to_owned(), s.object, s.detail)))
}
