//! Functions whose calls pgrx's own wrappers do not cover: procedures that return a row, triggers, event triggers.

use std::ffi::CString;

use pgrx::pg_sys;

use super::error::{Error, Result};

/// One call, as the function manager describes it.
#[derive(Clone, Copy)]
pub struct Call(pg_sys::FunctionCallInfo);

impl Call {
    /// Wraps the argument of a C function.
    pub fn new(fcinfo: pg_sys::FunctionCallInfo) -> Self {
        Self(fcinfo)
    }

    /// For the trigger manager's node.
    pub(super) fn fcinfo(self) -> pg_sys::FunctionCallInfo {
        self.0
    }

    /// A text argument, owned: what it came in may be freed by a commit.
    pub fn text(self, i: usize) -> Option<String> {
        // SAFETY: argument `i` is declared as text in `sql/40_functions.sql`.
        unsafe { pgrx::fcinfo::pg_getarg::<&str>(self.0, i).map(str::to_owned) }
    }

    /// A boolean argument.
    pub fn bool(self, i: usize) -> Option<bool> {
        // SAFETY: argument `i` is declared as boolean in `sql/40_functions.sql`.
        unsafe { pgrx::fcinfo::pg_getarg::<bool>(self.0, i) }
    }

    /// Whether the call stands inside a transaction block (or a function), so that it cannot commit.
    pub fn is_atomic(self) -> bool {
        // SAFETY: `context` of a CALL is a CallContext node, which its tag tells.
        unsafe {
            let context = (*self.0).context;
            if context.is_null() || (*context).type_ != pg_sys::NodeTag::T_CallContext {
                return true;
            }
            (*context.cast::<pg_sys::CallContext>()).atomic
        }
    }
}

/// A row of numbers, as a procedure's OUT parameters want it.
///
/// # Errors
/// A name holds a NUL.
pub fn row_of_numbers(columns: &[(&str, i64)]) -> Result<pg_sys::Datum> {
    // SAFETY: the descriptor is made for exactly these columns, blessed so that it can be looked up, and values and
    // nulls have its length; all of it lives in the caller's memory context.
    unsafe {
        let desc = pg_sys::CreateTemplateTupleDesc(columns.len() as i32);
        let mut values = Vec::new();
        let mut nulls = Vec::new();
        for (i, (name, value)) in columns.iter().enumerate() {
            let name = CString::new(*name).map_err(|_| Error::internal("a column name holds a NUL"))?;
            pg_sys::TupleDescInitEntry(desc, (i + 1) as i16, name.as_ptr(), pg_sys::INT8OID, -1, 0);
            values.push(pg_sys::Datum::from(*value));
            nulls.push(false);
        }
        let desc = pg_sys::BlessTupleDesc(desc);
        let tuple = pg_sys::heap_form_tuple(desc, values.as_mut_ptr(), nulls.as_mut_ptr());
        Ok(pg_sys::HeapTupleHeaderGetDatum((*tuple).t_data))
    }
}

/// Exports a function of the server's calling convention under the names that `AS 'MODULE_PATHNAME', '…'` looks for.
macro_rules! export {
    ($wrapper:ident, $finfo:ident, $handler:path) => {
        /// Tells the server the calling convention.
        #[allow(unsafe_code)]
        #[unsafe(no_mangle)]
        pub extern "C" fn $finfo() -> &'static pgrx::pg_sys::Pg_finfo_record {
            const V1: pgrx::pg_sys::Pg_finfo_record = pgrx::pg_sys::Pg_finfo_record { api_version: 1 };
            &V1
        }

        /// Entry point.
        #[allow(unsafe_code)]
        #[pgrx::pg_guard]
        #[unsafe(no_mangle)]
        pub extern "C-unwind" fn $wrapper(fcinfo: pgrx::pg_sys::FunctionCallInfo) -> pgrx::pg_sys::Datum {
            $crate::pg::error::or_raise($handler($crate::pg::call::Call::new(fcinfo)))
        }
    };
}
pub(crate) use export;
