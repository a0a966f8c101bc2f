use pgrx::prelude::*;

use crate::engine::verify;
use crate::pg::error::or_raise;

#[pg_extern(sql = false)]
fn verify(
    policy: &str,
    scope: &str,
) -> TableIterator<
    'static,
    (
        name!(table_name, String),
        name!(column_name, Option<String>),
        name!(problem, String),
        name!(orders, Option<i64>),
    ),
> {
    let findings = or_raise(verify::verify(policy, scope));
    TableIterator::new(findings.into_iter().map(|f| (f.table, f.column, f.problem, f.orders)))
}
