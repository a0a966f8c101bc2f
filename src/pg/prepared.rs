//! Statements whose plans a session keeps: for triggers, which run the same few for every row that a shop writes, and for a
//! while those that find rows of a partitioned table by an index: planning costs what there are partitions.
//!
//! Only for statements on our own tables that find rows by keys and cannot be planned in two ways: the plan is made without
//! looking at values, and perhaps while the tables are empty. With what is switched off here an index is all that is left. A
//! subquery that the planner may also answer by hashing a whole table (`EXISTS` beside an `OR`) has no place in them.
//!
//! The server itself makes a plan anew when a table, an index or the search path has become another, and checks privileges
//! whenever it runs one.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_int};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use pgrx::spi::Spi;

use super::error::{Error, Result};
use super::identity::{Identity, OWN_PATH, act_as, current_role};
use super::rows::{self, Row, Want};
use super::sql::{self, Arg, Parameters, with_snapshot};

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

/// [`sql::read`] or [`sql::write`] as the extension's owner.
///
/// # Errors
/// As these.
pub fn rows(query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    run(query, args).map(|r| r.1)
}

/// [`sql::execute`] as the extension's owner.
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
        // SAFETY: the plan is of this statement and of these types, and lives as long as the session.
        execute_with(args, |types| unsafe { plan(query, types) })
    })
}

/// Runs a plan that is found inside of an SPI session.
fn execute_with(
    args: &[Arg<'_>],
    plan: impl FnOnce(&mut [pg_sys::Oid]) -> Result<pg_sys::SPIPlanPtr>,
) -> Result<(u64, Vec<Row>)> {
    with_snapshot(|| {
        Spi::connect(|_client| {
            // SAFETY: an SPI session is open for the duration of the closure, and parameters and results are used within
            // it; the plan has as many parameters, of these types.
            unsafe {
                let mut given = Parameters::of(args)?;
                let plan = plan(&mut given.types)?;
                let status = pg_sys::SPI_execute_plan(plan, given.values.as_mut_ptr(), given.nulls.as_ptr(), false, 0);
                if status < 0 {
                    return Err(Error::internal(format!("a statement was refused by SPI ({status})")));
                }
                Ok((pg_sys::SPI_processed, rows::read(Want::Text)?))
            }
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
    // SAFETY: the caller's.
    let plan = unsafe { prepare(query, types)? };
    KEPT.with_borrow_mut(|kept| {
        kept.push(Kept {
            query: query.to_owned(),
            types: types.to_vec(),
            plan,
        });
    });
    Ok(plan)
}

/// A plan that outlives the SPI session.
///
/// # Safety
/// Inside an SPI session.
unsafe fn prepare(query: &str, types: &mut [pg_sys::Oid]) -> Result<pg_sys::SPIPlanPtr> {
    let text = CString::new(query).map_err(|_| Error::internal("a statement holds a NUL"))?;
    // SAFETY: the caller's; the text and the types are copied.
    unsafe {
        let plan = pg_sys::SPI_prepare(text.as_ptr(), types.len() as c_int, types.as_mut_ptr());
        if plan.is_null() || pg_sys::SPI_keepplan(plan) != 0 {
            return Err(Error::internal("a statement could not be prepared"));
        }
        Ok(plan)
    }
}

/// Planner settings for [`for_a_while`] that leave only an index.
pub const KEYED_FOR_A_WHILE: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// The same, where a few of many rows are wanted: a bitmap is made of all of them first.
pub const FIRST_FEW_FOR_A_WHILE: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("enable_bitmapscan", "off"),
    ("plan_cache_mode", "force_generic_plan"),
];

/// How old a plan for a while may become: tables grow, and nobody may tell the planner.
const A_WHILE: Duration = Duration::from_secs(60);

/// How many of them a session keeps: each is as large as there are partitions.
const FEW: usize = 8;

/// A plan for a while, of somebody's statement.
struct Passing {
    kept: Kept,
    role: pg_sys::Oid,
    since: Instant,
}

thread_local! {
    static PASSING: RefCell<Vec<Passing>> = const { RefCell::new(Vec::new()) };
    static RUNNING: Cell<bool> = const { Cell::new(false) };
}

/// A plan for a while is being run; meanwhile none is made or dropped.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(false);
    }
}

/// [`sql::write`] in the current identity, which has one of these settings, with a plan that the session
/// keeps for a while: for statements that find rows by an index, and cannot be planned in two ways.
///
/// # Errors
/// As there.
pub fn for_a_while(query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    if RUNNING.replace(true) {
        // A trigger of the statement that is running.
        return sql::write(query, args);
    }
    let _running = Running;
    // SAFETY: the plan is of this statement and of these types; none is dropped while one is being run.
    let done = execute_with(args, |types| unsafe { passing(query, types) });
    done.map(|r| r.1)
}

/// # Safety
/// Inside an SPI session, while no such plan is being run.
unsafe fn passing(query: &str, types: &mut [pg_sys::Oid]) -> Result<pg_sys::SPIPlanPtr> {
    let role = current_role();
    let known = PASSING.with_borrow_mut(|list| {
        let same = |p: &Passing| p.kept.query == query && p.kept.types == *types && p.role == role;
        let i = list.iter().position(same)?;
        let found = list.remove(i);
        if found.since.elapsed() < A_WHILE {
            let plan = found.kept.plan;
            list.push(found);
            return Some(plan);
        }
        // SAFETY: the caller's; nothing else knows it.
        unsafe { pg_sys::SPI_freeplan(found.kept.plan) };
        None
    });
    if let Some(plan) = known {
        return Ok(plan);
    }
    // SAFETY: the caller's.
    let plan = unsafe { prepare(query, types)? };
    PASSING.with_borrow_mut(|list| {
        if list.len() >= FEW {
            let oldest = list.remove(0);
            // SAFETY: as above.
            unsafe { pg_sys::SPI_freeplan(oldest.kept.plan) };
        }
        list.push(Passing {
            kept: Kept {
                query: query.to_owned(),
                types: types.to_vec(),
                plan,
            },
            role,
            since: Instant::now(),
        });
    });
    Ok(plan)
}
