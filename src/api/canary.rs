use pgrx::prelude::*;

use crate::engine::canary;
use crate::pg::error::{Error, or_raise};

#[pg_extern(sql = false)]
fn set_canary(order_number: Option<&str>, canary: Option<bool>, policy: Option<&str>) {
    let set = || {
        let number = super::access::target(order_number, policy, None)?.number;
        let canary = canary.ok_or_else(|| Error::invalid("say whether it is a canary: true or false"))?;
        canary::set(number, canary, policy)
    };
    or_raise(set());
}
