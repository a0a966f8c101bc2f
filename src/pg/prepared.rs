//! Statements whose plans a session keeps: for triggers, which run the same few for every row that a shop writes.
//!
//! Only for statements on our own tables that find rows by keys and cannot be planned in two ways: the plan is made without
//! looking at values, and perhaps while the tables are empty. With what is switched off here an index is all that is left. A
//! subquery that the planner may also answer by hashing a whole table (`EXISTS` beside an `OR`) has no place in them.
//!
//! The server itself makes a plan anew when a table, an index or the search path has become another, and checks privileges
//! whenever it runs one.

use std::cell::RefCell;
use std::ffi::{CString, c_int};

use pgrx::pg_sys;
use pgrx::spi::Spi;

use super::error::{Error, Result};
use super::identity::{Identity, OWN_PATH, act_as};
use super::rows::{self, Row, Want};
use super::sql::{Arg, Parameters, with_snapshot};

/// What leaves only an index, and the plan as it is.
const PINS: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("enable_indexscan", "on"),
    ("enable_bitmapscan", "on"),
    ("enable_nestloop", "on"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// A statement, the types of its parameters, and its plan.
struct Kept {
    query: String,
    types: Vec<pg_sys::Oid>,
    plan: pg_sys::SPIPlanPtr,
}

thread_local! {
    /// As many as there are such statements in our code.
    static KEPT: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
}

/// [`sql::read`](super::sql::read) or [`sql::write`](super::sql::write) as the extension's owner.
///
/// # Errors
/// As these.
pub fn rows(query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    run(query, args).map(|r| r.1)
}

/// [`sql::execute`](super::sql::execute) as the extension's owner.
///
/// # Errors
/// As there.
pub fn execute(query: &str, args: &[Arg<'_>]) -> Result<u64> {
    run(query, args).map(|r| r.0)
}

/// [`rows()`] as somebody else, under a search path; the query must be another where that is.
///
/// # Errors
/// As these.
pub fn rows_as(who: Identity, search_path: &str, query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    run_as(who, search_path, query, args).map(|r| r.1)
}

fn run(query: &str, args: &[Arg<'_>]) -> Result<(u64, Vec<Row>)> {
    run_as(Identity::Extension, OWN_PATH, query, args)
}

fn run_as(who: Identity, search_path: &str, query: &str, args: &[Arg<'_>]) -> Result<(u64, Vec<Row>)> {
    act_as(who, search_path, PINS, || {
        with_snapshot(|| {
            Spi::connect(|_client| {
                // SAFETY: an SPI session is open for the duration of the closure, and parameters and results are used within
                // it; the plan has as many parameters, of these types.
                unsafe {
                    let mut given = Parameters::of(args)?;
                    let plan = plan(query, &mut given.types)?;
                    let status =
                        pg_sys::SPI_execute_plan(plan, given.values.as_mut_ptr(), given.nulls.as_ptr(), false, 0);
                    if status < 0 {
                        return Err(Error::internal(format!("a statement was refused by SPI ({status})")));
                    }
                    Ok((pg_sys::SPI_processed, rows::read(Want::Text)?))
                }
            })
        })
    })
}

/// The statement's plan, which lives as long as the session.
///
/// # Safety
/// Inside an SPI session.
unsafe fn plan(query: &str, types: &mut [pg_sys::Oid]) -> Result<pg_sys::SPIPlanPtr> {
    let known = KEPT.with_borrow(|kept| {
        let same = |k: &&Kept| k.query == query && k.types == *types;
        kept.iter().find(same).map(|k| k.plan)
    });
    if let Some(plan) = known {
        return Ok(plan);
    }
    let text = CString::new(query).map_err(|_| Error::internal("a statement holds a NUL"))?;
    // SAFETY: the caller's; the text and the types are copied; the plan is remembered only when it outlives the session.
    unsafe {
        let plan = pg_sys::SPI_prepare(text.as_ptr(), types.len() as c_int, types.as_mut_ptr());
        if plan.is_null() || pg_sys::SPI_keepplan(plan) != 0 {
            return Err(Error::internal("a statement could not be prepared"));
        }
        KEPT.with_borrow_mut(|kept| {
            kept.push(Kept {
                query: query.to_owned(),
                types: types.to_vec(),
                plan,
            });
        });
        Ok(plan)
    }
}
