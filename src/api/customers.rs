use pgrx::prelude::*;

use crate::engine::customers;
use crate::pg::error::or_raise;

#[pg_extern(sql = false)]
fn find_duplicates(policy: &str) -> TableIterator<'static, (name!(duplicate, i64), name!(customer_key, String))> {
    let found = or_raise(customers::find_duplicates(policy));
    TableIterator::new(found.into_iter().map(|d| (d.group, d.key)))
}

#[pg_extern(sql = false)]
fn assert_mergeable(policy: &str, key_a: &str, key_b: &str) {
    or_raise(customers::assert_mergeable(policy, key_a, key_b));
}
