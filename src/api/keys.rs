use pgrx::pg_sys;
use pgrx::prelude::*;

use crate::engine::rotation;
use crate::pg::call::{Call, export, row_of_numbers};
use crate::pg::error::{Result, or_raise};
use crate::pg::identity::require_role;
use crate::pg::xact::{self, Boundary};

export!(rotate_key_wrapper, pg_finfo_rotate_key_wrapper, rotate_key);

fn rotate_key(call: Call) -> Result<pg_sys::Datum> {
    require_role(&["amazon_pii_admin"], "rotate the master key")?;
    xact::require_commits(call.is_atomic(), "amazon_pii.rotate_key()")?;
    let rotated = xact::non_atomic(|| rotation::rotate(Boundary::Procedure))?;
    row_of_numbers(&[("rewrapped", rotated.rewrapped), ("remaining", rotated.remaining)])
}

#[pg_extern(sql = false)]
#[allow(clippy::type_complexity)]
fn key_status() -> TableIterator<
    'static,
    (
        name!(master_key_id, String),
        name!(current, Option<bool>),
        name!(configured, Option<bool>),
        name!(data_keys, i64),
        name!(files, i64),
        name!(audit_entries, i64),
        name!(may_retire, bool),
    ),
> {
    let rows = or_raise(
        require_role(
            &["amazon_pii_admin", "amazon_pii_auditor"],
            "see the state of the master keys",
        )
        .and_then(|()| rotation::status()),
    );
    TableIterator::new(rows.into_iter().map(|s| {
        let may_retire = s.may_retire();
        (
            s.id,
            s.is_current,
            s.is_configured,
            s.used.data_keys,
            s.used.files,
            s.used.audit_entries,
            may_retire,
        )
    }))
}
