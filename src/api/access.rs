use pgrx::prelude::*;

use crate::engine::access::{self, Restored, Target};
use crate::engine::find;
use crate::pg::error::{Error, Result, or_raise};
use crate::pg::xact;

/// The order that a call names; NULL is no number.
pub(super) fn target<'a>(number: Option<&'a str>, policy: Option<&'a str>, key: Option<&'a str>) -> Result<Target<'a>> {
    let number = number.ok_or_else(|| Error::invalid("the order number must not be null"))?;
    Ok(Target { number, policy, key })
}

type RestoredRow = (String, String, i64, i64, i64);

fn rows(restored: Vec<Restored>) -> impl Iterator<Item = RestoredRow> {
    restored
        .into_iter()
        .map(|r| (r.order_key, r.table, r.records, r.cells, r.kept))
}

#[pg_extern(sql = false)]
fn retrieve(
    order_number: Option<&str>,
    reason: Option<&str>,
    policy: Option<&str>,
    key: Option<&str>,
) -> TableIterator<
    'static,
    (
        name!(order_key, String),
        name!(table_name, String),
        name!(records, i64),
        name!(cells, i64),
        name!(kept, i64),
    ),
> {
    TableIterator::new(rows(or_raise(
        target(order_number, policy, key).and_then(|t| access::retrieve(&t, reason)),
    )))
}

#[pg_extern(sql = false)]
fn unflag(
    order_number: Option<&str>,
    reason: Option<&str>,
    policy: Option<&str>,
    key: Option<&str>,
) -> TableIterator<
    'static,
    (
        name!(order_key, String),
        name!(table_name, String),
        name!(records, i64),
        name!(cells, i64),
        name!(kept, i64),
    ),
> {
    TableIterator::new(rows(or_raise(
        target(order_number, policy, key).and_then(|t| access::unflag(&t, reason)),
    )))
}

#[pg_extern(sql = false)]
fn peek(order_number: Option<&str>, reason: Option<&str>, policy: Option<&str>, key: Option<&str>) -> pgrx::JsonB {
    pgrx::JsonB(or_raise(
        target(order_number, policy, key).and_then(|t| access::peek(&t, reason)),
    ))
}

#[pg_extern(sql = false)]
fn end_retrieval(order_number: Option<&str>, policy: Option<&str>, key: Option<&str>) {
    or_raise(target(order_number, policy, key).and_then(|t| access::end_retrieval(&t)));
}

#[pg_extern(sql = false)]
fn hold(
    order_number: Option<&str>,
    reason: Option<&str>,
    until: Option<TimestampWithTimeZone>,
    policy: Option<&str>,
    key: Option<&str>,
) {
    let held = || {
        let until = until.ok_or_else(|| Error::invalid("the end of a hold must not be null"))?;
        access::hold(&target(order_number, policy, key)?, reason, &xact::from_server(until)?)
    };
    or_raise(held());
}

#[pg_extern(sql = false)]
fn release(order_number: Option<&str>, policy: Option<&str>, key: Option<&str>) {
    or_raise(target(order_number, policy, key).and_then(|t| access::release(&t)));
}

#[pg_extern(sql = false)]
fn find_orders(
    search: &str,
) -> TableIterator<
    'static,
    (
        name!(policy, String),
        name!(order_key, String),
        name!(order_number, Option<String>),
        name!(status, String),
        name!(matched_by, String),
    ),
> {
    let hits = or_raise(find::find_orders(search));
    TableIterator::new(
        hits.into_iter()
            .map(|h| (h.policy, h.order_key, h.order_number, h.status, h.matched_by)),
    )
}
