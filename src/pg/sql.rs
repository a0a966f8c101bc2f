//! Statements in, rows of text out. Parameters are built inside the SPI session and die with it; results leave by their
//! types' output functions, so a value is never cast and never becomes a float on its way.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

use pgrx::pg_sys;
use pgrx::spi::Spi;

use super::error::{Error, Result};
pub use super::params::Arg;
use super::params::datum;
use super::rows::{self, Want};
pub use super::rows::{Row, Text};
use super::trigger::TriggerCall;

/// Runs a query that neither writes nor locks. It sees what the statements before it wrote, a firing statement's rows
/// included, and assigns no transaction id.
///
/// # Errors
/// A value could not be converted; errors of the server unwind to the next subtransaction.
pub fn read(query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    run(query, args, Want::Text, None).map(|r| r.1)
}

/// Runs a statement that writes or locks, and returns the rows it returns.
///
/// # Errors
/// As [`read`].
pub fn write(query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    run(query, args, Want::Text, None).map(|r| r.1)
}

/// Like [`write()`], returning the number of rows that were processed.
///
/// # Errors
/// As [`read`].
pub fn execute(query: &str, args: &[Arg<'_>]) -> Result<u64> {
    run(query, args, Want::Text, None).map(|r| r.0)
}

/// Like [`write()`], with columns of type bytea as bytes.
///
/// # Errors
/// As [`read`].
pub fn write_bytes(query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    run(query, args, Want::Bytes, None).map(|r| r.1)
}

/// Runs a query that sees the transition tables of a trigger call.
///
/// # Errors
/// As [`read`].
pub fn in_trigger(call: &TriggerCall, query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    run(query, args, Want::Text, Some(call)).map(|r| r.1)
}

fn run(query: &str, args: &[Arg<'_>], want: Want, call: Option<&TriggerCall>) -> Result<(u64, Vec<Row>)> {
    let text = CString::new(query).map_err(|_| Error::internal("a statement holds a NUL"))?;
    with_snapshot(|| {
        Spi::connect(|_client| {
            // SAFETY: an SPI session is open for the duration of the closure and everything allocated here lives in it;
            // argument arrays have the announced length; the tuple table is read before the session ends.
            unsafe {
                if let Some(call) = call {
                    pg_sys::SPI_register_trigger_data(call.data());
                }
                let mut given = Parameters::of(args)?;
                let status = pg_sys::SPI_execute_with_args(
                    text.as_ptr(),
                    args.len() as c_int,
                    given.types.as_mut_ptr(),
                    given.values.as_mut_ptr(),
                    given.nulls.as_ptr(),
                    AS_OF_NOW.get(),
                    0,
                );
                if status < 0 {
                    return Err(Error::internal(format!("a statement was refused by SPI ({status})")));
                }
                Ok((pg_sys::SPI_processed, rows::read(want)?))
            }
        })
    })
}

thread_local! {
    /// Statements keep to the snapshot that is there: SPI calls that read-only.
    static AS_OF_NOW: Cell<bool> = const { Cell::new(false) };
}

/// Ends [`as_of_now`], on every way out.
struct UntilNow(bool);

impl Drop for UntilNow {
    fn drop(&mut self) {
        AS_OF_NOW.set(self.0);
    }
}

/// Runs queries that see what is committed now, and what this transaction did, also where its isolation level has it see what was when
/// it began: what the server says of changes knows no such level. They only read.
///
/// # Errors
/// As `f`.
pub fn as_of_now<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: plain getters; inside a transaction; popped on both ways out, by the abort if an error of the server unwinds.
    unsafe {
        if pg_sys::XactIsoLevel < pg_sys::XACT_REPEATABLE_READ as c_int {
            return f();
        }
        pg_sys::CommandCounterIncrement();
        pg_sys::PushActiveSnapshot(pg_sys::GetLatestSnapshot());
        let until = UntilNow(AS_OF_NOW.replace(true));
        let result = f();
        drop(until);
        pg_sys::PopActiveSnapshot();
        result
    }
}

/// Parameters as SPI wants them.
pub(super) struct Parameters {
    pub types: Vec<pg_sys::Oid>,
    pub values: Vec<pg_sys::Datum>,
    pub nulls: Vec<c_char>,
}

impl Parameters {
    /// # Safety
    /// Inside an SPI session, with which the values end.
    pub unsafe fn of(args: &[Arg<'_>]) -> Result<Self> {
        let mut given = Self {
            types: Vec::with_capacity(args.len()),
            values: Vec::with_capacity(args.len()),
            nulls: Vec::with_capacity(args.len()),
        };
        for arg in args {
            // SAFETY: the caller's.
            let (oid, value) = unsafe { datum(arg)? };
            given.types.push(oid);
            given.nulls.push(if value.is_some() { b' ' } else { b'n' } as c_char);
            given.values.push(value.unwrap_or(pg_sys::Datum::from(0)));
        }
        Ok(given)
    }
}

/// SPI insists on a snapshot around its own where no portal has one: in a background worker.
pub(super) fn with_snapshot<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: inside a transaction; popped on both ways out, by the abort if an error of the server unwinds.
    unsafe {
        if pg_sys::ActiveSnapshotSet() {
            return f();
        }
        pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot());
        let result = f();
        pg_sys::PopActiveSnapshot();
        result
    }
}

/// Whether `query` parses as exactly one SELECT with one result column and nothing else.
pub fn is_single_select(query: &str) -> bool {
    let Ok(text) = CString::new(query) else { return false };
    // Under the settings with which the expression will run: backslashes in strings must mean the same.
    super::identity::as_extension(|| {
        // SAFETY: raw parsing touches no catalog; the tree lives in the current memory context; every pointer is
        // checked before it is read as the node that its tag announces.
        unsafe {
            let statements = pg_sys::raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
            if statements.is_null() || (*statements).length != 1 {
                return Ok(false);
            }
            let raw = (*(*statements).elements).ptr_value.cast::<pg_sys::RawStmt>();
            let node = (*raw).stmt;
            if node.is_null() || (*node).type_ != pg_sys::NodeTag::T_SelectStmt {
                return Ok(false);
            }
            let select = node.cast::<pg_sys::SelectStmt>();
            let plain = (*select).fromClause.is_null()
                && (*select).whereClause.is_null()
                && (*select).intoClause.is_null()
                && (*select).sortClause.is_null()
                && (*select).groupClause.is_null()
                && (*select).havingClause.is_null()
                && (*select).windowClause.is_null()
                && (*select).limitCount.is_null()
                && (*select).limitOffset.is_null()
                && (*select).lockingClause.is_null()
                && (*select).withClause.is_null()
                && (*select).distinctClause.is_null()
                && (*select).op == pg_sys::SetOperation::SETOP_NONE;
            let columns = (*select).targetList;
            if !plain || columns.is_null() || (*columns).length != 1 {
                return Ok(false);
            }
            let target = (*(*columns).elements).ptr_value.cast::<pg_sys::ResTarget>();
            Ok((*target).name.is_null())
        }
    })
    .unwrap_or(false)
}

/// The type below all domains, if reading a value of it calls nobody's code but the type's own: a base type or an enum.
pub fn plain_type(oid: pg_sys::Oid) -> Option<pg_sys::Oid> {
    // SAFETY: catalog lookups inside a transaction.
    unsafe {
        let base = pg_sys::getBaseType(oid);
        let kind = pg_sys::get_typtype(base) as u8;
        let element = pg_sys::get_element_type(base);
        (matches!(kind, b'b' | b'e') && element == pg_sys::InvalidOid).then_some(base)
    }
}

/// The name of a type with its schema, as SQL understands it.
pub fn type_name(oid: pg_sys::Oid) -> String {
    // SAFETY: catalog lookup inside a transaction; the result is a palloc'd C string of our own.
    unsafe {
        let name = pg_sys::format_type_be_qualified(oid);
        let owned = CStr::from_ptr(name).to_string_lossy().into_owned();
        pg_sys::pfree(name.cast());
        owned
    }
}

/// The types of a query's result columns; the query should return no row.
///
/// # Errors
/// As [`read`].
pub fn result_types(query: &str) -> Result<Vec<pg_sys::Oid>> {
    let text = CString::new(query).map_err(|_| Error::internal("a statement holds a NUL"))?;
    with_snapshot(|| {
        Spi::connect(|_client| {
            // SAFETY: as in `run`; the descriptor belongs to the SPI session.
            unsafe {
                let status = pg_sys::SPI_execute_with_args(
                    text.as_ptr(),
                    0,
                    ptr::null_mut(),
                    ptr::null_mut(),
                    ptr::null(),
                    true,
                    0,
                );
                match pg_sys::SPI_tuptable.as_ref() {
                    Some(table) if status >= 0 => Ok((1..=(*table.tupdesc).natts)
                        .map(|n| pg_sys::SPI_gettypeid(table.tupdesc, n))
                        .collect()),
                    _ => Err(Error::internal("a query returned no row type")),
                }
            }
        })
    })
}
