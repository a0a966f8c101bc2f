//! What the SQL of earlier versions calls and today's does not. Without these an earlier version could not be created or restored
//! to be updated. All they do is refuse.

use pgrx::prelude::*;

use crate::pg::error::{Error, Result, or_raise};
use crate::pg::identity::extension_owner;

/// Says which version the database has; that of this library calls none of these.
fn refuse() -> Result<()> {
    extension_owner()?;
    Err(Error::unsupported("this function belongs to an earlier version"))
}

/// Until 0.1.0: without a reason.
#[pg_extern(sql = false)]
fn disable_policy(_policy: &str) {
    or_raise(refuse());
}

/// Until 0.1.0: without a reason.
#[pg_extern(sql = false)]
fn drop_policy(_policy: &str) {
    or_raise(refuse());
}
