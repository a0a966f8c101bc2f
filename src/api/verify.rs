use pgrx::prelude::*;

use crate::engine::{chain, evidence, verify};
use crate::pg::error::{Error, or_raise};
use crate::pg::xact::{from_server, to_server};

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

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn verify_audit_log(
    policy: Option<&str>,
    head_position: Option<i64>,
    head_code: Option<&str>,
) -> TableIterator<
    'static,
    (
        name!(chain, String),
        name!(severity, String),
        name!(finding, String),
        name!(link_position, Option<i64>),
        name!(audit_id, Option<i64>),
        name!(entries, Option<i64>),
        name!(first_at, Option<TimestampWithTimeZone>),
        name!(last_at, Option<TimestampWithTimeZone>),
        name!(code, Option<String>),
    ),
> {
    let kept = match (head_position, head_code) {
        (None, None) => Ok(None),
        (Some(position), Some(code)) => Ok(Some(chain::Kept { position, code })),
        _ => Err(Error::invalid("a head is a position and a code")),
    };
    let found = or_raise(kept.and_then(|kept| chain::verify(policy, kept)));
    TableIterator::new(found.into_iter().map(|f| {
        let time = |at: Option<i64>| at.and_then(|at| to_server(at).ok());
        (
            f.chain,
            f.severity.to_owned(),
            f.finding,
            f.position,
            f.audit_id,
            f.entries,
            time(f.first_at),
            time(f.last_at),
            f.code,
        )
    }))
}

#[pg_extern(sql = false)]
fn evidence(
    policy: Option<&str>,
    from: Option<TimestampWithTimeZone>,
    to: Option<TimestampWithTimeZone>,
) -> pgrx::JsonB {
    pgrx::JsonB(or_raise((|| {
        let policy = policy.ok_or_else(|| Error::invalid("the policy must not be null"))?;
        let (from, to) = (from.map(from_server).transpose()?, to.map(from_server).transpose()?);
        evidence::of(policy, from.as_deref(), to.as_deref())
    })()))
}
