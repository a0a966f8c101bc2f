//! The rows of an UPDATE as they were and as they became, pair by pair, straight from a trigger's transition tables.

use std::ffi::{CString, c_int};

use pgrx::pg_sys;

use super::error::{Error, Result};
use super::trigger::TriggerCall;

/// The server's own entry points, without a guard around each: a pair of rows would pay for eight of them. Called inside of
/// one guard, with nothing on the stack that has a destructor.
mod raw {
    use pgrx::pg_sys::{MemoryContext, TupleTableSlot, Tuplestorestate};
    use std::ffi::c_int;

    unsafe extern "C-unwind" {
        pub fn tuplestore_begin_heap(random: bool, across: bool, kilobytes: c_int) -> *mut Tuplestorestate;
        pub fn tuplestore_end(state: *mut Tuplestorestate);
        pub fn tuplestore_rescan(state: *mut Tuplestorestate);
        pub fn tuplestore_select_read_pointer(state: *mut Tuplestorestate, pointer: c_int);
        pub fn tuplestore_gettupleslot(
            state: *mut Tuplestorestate,
            forward: bool,
            copy: bool,
            slot: *mut TupleTableSlot,
        ) -> bool;
        pub fn tuplestore_puttupleslot(state: *mut Tuplestorestate, slot: *mut TupleTableSlot);
        pub fn slot_getsomeattrs_int(slot: *mut TupleTableSlot, columns: c_int);
        pub fn MemoryContextDelete(context: MemoryContext);
    }
}

/// How a column's values are compared.
#[derive(Clone, Copy)]
struct Column {
    at: usize,
    length: i16,
    by_value: bool,
    is_key: bool,
}

/// Columns of one table, ready to be compared. Keeps a description of its own: good until the table changes.
pub struct Watch {
    context: pg_sys::MemoryContext,
    old: *mut pg_sys::TupleTableSlot,
    new: *mut pg_sys::TupleTableSlot,
    columns: Vec<Column>,
    last: c_int,
}

impl Watch {
    /// Watches these columns of the table that fired; the first `keys` of them are its key.
    ///
    /// # Errors
    /// One of them does not exist.
    pub fn of(call: &TriggerCall, names: &[String], keys: usize) -> Result<Self> {
        // SAFETY: the relation is open during the trigger's call; what is kept of its descriptor is a copy in a memory
        // context of its own, which lives as long as the watch.
        unsafe {
            let desc = (*(*call.data()).tg_relation).rd_att;
            let mut columns = Vec::with_capacity(names.len());
            for (place, name) in names.iter().enumerate() {
                let name = CString::new(name.as_str()).map_err(|_| Error::internal("a column name holds a NUL"))?;
                let number = pg_sys::SPI_fnumber(desc, name.as_ptr());
                let Some(at) = usize::try_from(number).ok().and_then(|n| n.checked_sub(1)) else {
                    return Err(Error::undefined("a column of the policy no longer exists"));
                };
                let is_key = place < keys;
                let (mut length, mut by_value) = (0, false);
                pg_sys::get_typlenbyval(pg_sys::SPI_gettypeid(desc, number), &mut length, &mut by_value);
                columns.push(Column {
                    at,
                    length,
                    by_value,
                    is_key,
                });
            }
            // The sort keeps a key before what else is said of its column.
            columns.sort_by_key(|c| c.at);
            columns.dedup_by_key(|c| c.at);
            let last = columns.last().map_or(0, |c| c.at as c_int + 1);
            let context = pg_sys::AllocSetContextCreateInternal(
                pg_sys::CacheMemoryContext,
                c"amazon_pii watched columns".as_ptr(),
                pg_sys::ALLOCSET_SMALL_MINSIZE as usize,
                pg_sys::ALLOCSET_SMALL_INITSIZE as usize,
                pg_sys::ALLOCSET_SMALL_MAXSIZE as usize,
            );
            let before = pg_sys::MemoryContextSwitchTo(context);
            let desc = pg_sys::CreateTupleDescCopy(desc);
            let old = pg_sys::MakeTupleTableSlot(desc, &pg_sys::TTSOpsMinimalTuple);
            let new = pg_sys::MakeTupleTableSlot(desc, &pg_sys::TTSOpsMinimalTuple);
            pg_sys::MemoryContextSwitchTo(before);
            Ok(Self {
                context,
                old,
                new,
                columns,
                last,
            })
        }
    }

    /// Frees it. Not when dropped: a thread's values are dropped when the server is gone already.
    pub fn free(self) {
        // SAFETY: nothing refers to the context but this value, which ends here.
        unsafe { pg_sys::ffi::pg_guard_ffi_boundary(|| raw::MemoryContextDelete(self.context)) }
    }

    /// The pairs of rows that differ in a watched column.
    ///
    /// An error of the server (a cancel, no space for rows that do not fit into memory) unwinds, and the watch must not be
    /// used again: its rows are gone.
    pub fn differing(&self, call: &TriggerCall) -> Differing {
        // SAFETY: both transition tables belong to the call and have the columns of its relation, as the slots have. Their
        // first read pointer is nobody else's: a query that reads them has one of its own. Only plain values live on the
        // stack while an error can jump out.
        unsafe {
            let (old, new) = ((*call.data()).tg_oldtable, (*call.data()).tg_newtable);
            if old.is_null()
                || new.is_null()
                || pg_sys::tuplestore_tuple_count(old) != pg_sys::tuplestore_tuple_count(new)
            {
                // A row was lost on its way to another partition: which is whose cannot be told.
                return Differing::Unknown;
            }
            let watch = self;
            let (kept_old, kept_new, same_keys) = pg_sys::ffi::pg_guard_ffi_boundary(|| watch.filter(old, new));
            if kept_old.is_null() {
                return Differing::None;
            }
            let rows = Rows {
                old: kept_old,
                new: kept_new,
            };
            Differing::Some(call.with_rows(rows, same_keys))
        }
    }

    /// # Safety
    /// As in [`Watch::differing`], inside a guard.
    unsafe fn filter(
        &self,
        old: *mut pg_sys::Tuplestorestate,
        new: *mut pg_sys::Tuplestorestate,
    ) -> (*mut pg_sys::Tuplestorestate, *mut pg_sys::Tuplestorestate, bool) {
        let mut same_keys = true;
        let mut kept: (*mut pg_sys::Tuplestorestate, *mut pg_sys::Tuplestorestate) =
            (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the caller's.
        unsafe {
            for table in [old, new] {
                raw::tuplestore_select_read_pointer(table, 0);
                raw::tuplestore_rescan(table);
            }
            while raw::tuplestore_gettupleslot(old, true, false, self.old)
                && raw::tuplestore_gettupleslot(new, true, false, self.new)
            {
                raw::slot_getsomeattrs_int(self.old, self.last);
                raw::slot_getsomeattrs_int(self.new, self.last);
                if self.columns.iter().all(|c| same(*c, self.old, self.new)) {
                    continue;
                }
                same_keys = same_keys && self.columns.iter().all(|c| !c.is_key || same(*c, self.old, self.new));
                if kept.0.is_null() {
                    kept.0 = raw::tuplestore_begin_heap(false, false, pg_sys::work_mem);
                    kept.1 = raw::tuplestore_begin_heap(false, false, pg_sys::work_mem);
                }
                raw::tuplestore_puttupleslot(kept.0, self.old);
                raw::tuplestore_puttupleslot(kept.1, self.new);
            }
            // Rows that came from a file are in memory that ends with the trigger's call.
            for slot in [self.old, self.new] {
                if let Some(clear) = (*(*slot).tts_ops).clear {
                    clear(slot);
                }
            }
        }
        (kept.0, kept.1, same_keys)
    }
}

/// The distinct values of an integer column in the rows that a statement wrote, in order, without NULL.
///
/// # Errors
/// It is no integer column; errors of the server unwind to the next subtransaction.
pub fn integers(call: &TriggerCall, column: &str) -> Result<Vec<i64>> {
    let name = CString::new(column).map_err(|_| Error::internal("a column name holds a NUL"))?;
    let mut found: Vec<i64> = Vec::new();
    // SAFETY: as in `differing`; the list is outside of the guard, and consistent whenever an error can jump.
    unsafe {
        let desc = (*(*call.data()).tg_relation).rd_att;
        let table = (*call.data()).tg_newtable;
        let number = pg_sys::SPI_fnumber(desc, name.as_ptr());
        let Some(at) = usize::try_from(number).ok().and_then(|n| n.checked_sub(1)) else {
            return Err(Error::undefined("a column of the policy no longer exists"));
        };
        let number_of: fn(pg_sys::Datum) -> i64 = match pg_sys::SPI_gettypeid(desc, number) {
            // The rest of the datum is undefined.
            pg_sys::INT2OID => |d| i64::from(d.value() as i16),
            pg_sys::INT4OID => |d| i64::from(d.value() as i32),
            pg_sys::INT8OID => |d| d.value() as i64,
            _ => return Err(Error::unsupported("a column of the policy has another type now")),
        };
        if table.is_null() {
            return Err(Error::internal("a trigger has no transition table"));
        }
        found.reserve(usize::try_from(pg_sys::tuplestore_tuple_count(table)).unwrap_or(0));
        let slot = pg_sys::MakeSingleTupleTableSlot(desc, &pg_sys::TTSOpsMinimalTuple);
        let list = &mut found;
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            raw::tuplestore_select_read_pointer(table, 0);
            raw::tuplestore_rescan(table);
            while raw::tuplestore_gettupleslot(table, true, false, slot) {
                raw::slot_getsomeattrs_int(slot, number);
                if !*(*slot).tts_isnull.add(at) {
                    list.push(number_of(*(*slot).tts_values.add(at)));
                }
            }
        });
        pg_sys::ExecDropSingleTupleTableSlot(slot);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// What [`Watch::differing`] found.
pub enum Differing {
    None,
    /// A call that shows these pairs only.
    Some(TriggerCall),
    /// Old and new rows do not pair.
    Unknown,
}

/// Transition tables of our own; they end when dropped.
#[derive(Debug)]
pub struct Rows {
    pub(super) old: *mut pg_sys::Tuplestorestate,
    pub(super) new: *mut pg_sys::Tuplestorestate,
}

impl Drop for Rows {
    fn drop(&mut self) {
        // SAFETY: made by `filter`, in the memory context of the trigger's call, which outlives this value.
        unsafe {
            pg_sys::ffi::pg_guard_ffi_boundary(|| {
                raw::tuplestore_end(self.old);
                raw::tuplestore_end(self.new);
            });
        }
    }
}

/// Whether both rows hold the same bytes in a column. What was stored out of line, or was compressed, and is written again
/// looks different: it counts as changed.
///
/// # Safety
/// The column is among those that were taken out of both slots.
unsafe fn same(column: Column, old: *mut pg_sys::TupleTableSlot, new: *mut pg_sys::TupleTableSlot) -> bool {
    // SAFETY: the caller's; a value that is no datum by itself points to as many bytes as its type, or its header, says.
    unsafe {
        let is_null = |slot: *mut pg_sys::TupleTableSlot| *(*slot).tts_isnull.add(column.at);
        let value = |slot: *mut pg_sys::TupleTableSlot| *(*slot).tts_values.add(column.at);
        if is_null(old) || is_null(new) {
            return is_null(old) && is_null(new);
        }
        same_bytes(value(old), value(new), column.length, column.by_value)
    }
}

/// Whether two values that are not NULL are the same, byte by byte as they are here.
///
/// # Safety
/// Both are values of one type, whose length and way of passing these are.
pub(super) unsafe fn same_bytes(a: pg_sys::Datum, b: pg_sys::Datum, length: i16, by_value: bool) -> bool {
    if by_value {
        return a.value() == b.value();
    }
    // SAFETY: the caller's; a value that is no datum by itself points to as many bytes as its type, or its header, says.
    unsafe {
        let bytes = |datum: pg_sys::Datum| {
            let start = datum.cast_mut_ptr::<u8>().cast_const();
            let length = match length {
                -1 => pgrx::varlena::varsize_any(start.cast()),
                -2 => std::ffi::CStr::from_ptr(start.cast()).count_bytes(),
                n => n.unsigned_abs().into(),
            };
            std::slice::from_raw_parts(start, length)
        };
        bytes(a) == bytes(b)
    }
}
