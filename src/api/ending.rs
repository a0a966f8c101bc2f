use pgrx::prelude::*;

use super::access::target;
use crate::engine::{certificate, ending};
use crate::pg::error::or_raise;

#[pg_extern(sql = false)]
fn erase(order_number: Option<&str>, reason: Option<&str>, policy: Option<&str>, key: Option<&str>) {
    or_raise(target(order_number, policy, key).and_then(|t| ending::erase(&t, reason)));
}

#[pg_extern(sql = false)]
fn shred(order_number: Option<&str>, reason: Option<&str>, policy: Option<&str>, key: Option<&str>) {
    or_raise(target(order_number, policy, key).and_then(|t| ending::shred(&t, reason)));
}

#[pg_extern(sql = false)]
fn forget(order_number: Option<&str>, reason: Option<&str>, policy: Option<&str>, key: Option<&str>) {
    or_raise(target(order_number, policy, key).and_then(|t| ending::forget(&t, reason)));
}

#[pg_extern(sql = false)]
fn certificate(order_number: Option<&str>, policy: Option<&str>, key: Option<&str>) -> pgrx::JsonB {
    pgrx::JsonB(or_raise(
        target(order_number, policy, key).and_then(|t| certificate::of(&t)),
    ))
}
