use pgrx::pg_sys;

use crate::engine::{assign, chain, guard, reimport, trigger_ddl, triggers};
use crate::pg::call::{Call, export};
use crate::pg::error::Result;
use crate::pg::trigger::TriggerCall;

export!(on_change_wrapper, pg_finfo_on_change_wrapper, on_change);
export!(on_apply_wrapper, pg_finfo_on_apply_wrapper, on_apply);
export!(on_ignore_wrapper, pg_finfo_on_ignore_wrapper, on_ignore);
export!(on_reimport_wrapper, pg_finfo_on_reimport_wrapper, on_reimport);
export!(on_assign_wrapper, pg_finfo_on_assign_wrapper, on_assign);
export!(refuse_change_wrapper, pg_finfo_refuse_change_wrapper, refuse_change);
export!(on_ddl_wrapper, pg_finfo_on_ddl_wrapper, on_ddl);

/// What an AFTER trigger returns is ignored.
const NOTHING: pg_sys::Datum = pg_sys::Datum::null();

fn on_change(call: Call) -> Result<pg_sys::Datum> {
    triggers::changed(&TriggerCall::of(call)?)?;
    Ok(NOTHING)
}

fn on_apply(call: Call) -> Result<pg_sys::Datum> {
    triggers::applied(&TriggerCall::of(call)?)?;
    Ok(NOTHING)
}

fn on_ignore(call: Call) -> Result<pg_sys::Datum> {
    guard::ignore(&TriggerCall::of(call)?)
}

fn on_reimport(call: Call) -> Result<pg_sys::Datum> {
    reimport::keep(&TriggerCall::of(call)?)
}

fn on_assign(call: Call) -> Result<pg_sys::Datum> {
    assign::assign(&TriggerCall::of(call)?)
}

fn refuse_change(call: Call) -> Result<pg_sys::Datum> {
    chain::refuse_change(&TriggerCall::of(call)?)?;
    Ok(NOTHING)
}

fn on_ddl(_call: Call) -> Result<pg_sys::Datum> {
    trigger_ddl::structure_changed()?;
    Ok(NOTHING)
}
