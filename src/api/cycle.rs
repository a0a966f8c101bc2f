use pgrx::pg_sys;

use crate::engine::cycle::{self, Counts};
use crate::engine::turn;
use crate::pg::call::{Call, export, row_of_numbers};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{is_superuser, require_role};
use crate::pg::xact::{self, Boundary, Mode};

export!(take_turn_wrapper, pg_finfo_take_turn_wrapper, take_turn);
export!(run_cycle_wrapper, pg_finfo_run_cycle_wrapper, run_cycle);

export!(sanitize_copy_wrapper, pg_finfo_sanitize_copy_wrapper, sanitize_copy);

fn take_turn(call: Call) -> Result<pg_sys::Datum> {
    if !is_superuser() {
        return Err(Error::privilege("must be superuser to take the turn of a policy"));
    }
    let policy = call
        .text(0)
        .ok_or_else(|| Error::invalid("the policy must not be null"))?;
    turn::take(&policy, Mode::Alone)?;
    Ok(pg_sys::Datum::null())
}

fn run_cycle(call: Call) -> Result<pg_sys::Datum> {
    require_role(&["amazon_pii_admin"], "run a cycle")?;
    xact::require_commits(call.is_atomic(), "amazon_pii.run_cycle()")?;
    let (policy, sweep) = (call.text(0), call.bool(1).unwrap_or(false));
    let counts = xact::non_atomic(|| cycle::run(policy.as_deref(), sweep, Boundary::Procedure))?;
    row_of(&counts)
}

fn sanitize_copy(call: Call) -> Result<pg_sys::Datum> {
    require_role(&["amazon_pii_admin"], "sanitize a copy")?;
    xact::require_commits(call.is_atomic(), "amazon_pii.sanitize_copy()")?;
    let policy = call
        .text(0)
        .ok_or_else(|| Error::invalid("the policy must not be null"))?;
    let counts = xact::non_atomic(|| cycle::sanitize(&policy, Boundary::Procedure))?;
    row_of(&counts)
}

fn row_of(counts: &Counts) -> Result<pg_sys::Datum> {
    row_of_numbers(&[
        ("flagged", counts.flagged),
        ("archived", counts.archived),
        ("redacted", counts.redacted),
        ("failed", counts.failed),
        ("overdue", counts.overdue),
    ])
}
