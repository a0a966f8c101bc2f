//! What a trigger function of ours needs to know of its call, and the mark that lets the engine's own writes through.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_int};

use pgrx::pg_sys;

use super::call::Call;
use super::error::{Error, Result};
use super::params::Arg;
use super::transition::{Rows, same_bytes};

/// What fired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Insert,
    Update,
    Delete,
    Truncate,
}

/// What a row gets in place of a value that was to be written.
pub enum Instead {
    /// What it holds.
    Old,
    /// This, by the type's input function.
    Text(String),
}

/// One call of a trigger function.
#[derive(Debug)]
pub struct TriggerCall {
    data: *mut pg_sys::TriggerData,
    /// What fired it.
    pub event: Event,
    /// The table (a partition has triggers of its own).
    pub relation: pg_sys::Oid,
    /// The trigger.
    pub trigger: pg_sys::Oid,
    /// An UPDATE that is known to have left every key as it was, byte by byte.
    pub same_keys: bool,
    /// Transition tables other than the server's; they end with the call.
    _rows: Option<Rows>,
}

impl TriggerCall {
    /// Reads the call from a function call of the trigger manager.
    ///
    /// # Errors
    /// The function was not called as a trigger.
    pub fn of(call: Call) -> Result<Self> {
        let fcinfo = call.fcinfo();
        // SAFETY: `context` of a call by the trigger manager is a TriggerData node, which its tag tells; the strings
        // are NUL-terminated and live as long as the call.
        unsafe {
            let context = (*fcinfo).context;
            if context.is_null() || (*context).type_ != pg_sys::NodeTag::T_TriggerData {
                return Err(Error::invalid("this function can only be called as a trigger"));
            }
            let data = context.cast::<pg_sys::TriggerData>();
            let event = match (*data).tg_event & pg_sys::TRIGGER_EVENT_OPMASK {
                pg_sys::TRIGGER_EVENT_INSERT => Event::Insert,
                pg_sys::TRIGGER_EVENT_DELETE => Event::Delete,
                pg_sys::TRIGGER_EVENT_UPDATE => Event::Update,
                _ => Event::Truncate,
            };
            Ok(Self {
                data,
                event,
                relation: (*(*data).tg_relation).rd_id,
                trigger: (*(*data).tg_trigger).tgoid,
                same_keys: false,
                _rows: None,
            })
        }
    }

    /// The arguments of CREATE TRIGGER.
    pub fn args(&self) -> Vec<String> {
        // SAFETY: the trigger's description lives as long as the call; its strings are NUL-terminated.
        unsafe {
            let trigger = (*self.data).tg_trigger;
            (0..(*trigger).tgnargs)
                .map(|i| {
                    CStr::from_ptr(*(*trigger).tgargs.add(i as usize))
                        .to_string_lossy()
                        .into_owned()
                })
                .collect()
        }
    }

    /// For SPI, which makes the transition tables visible to a query.
    pub(super) fn data(&self) -> *mut pg_sys::TriggerData {
        self.data
    }

    /// The same call with other transition tables, and whether their rows have the keys that they had.
    pub(super) fn with_rows(&self, rows: Rows, same_keys: bool) -> Self {
        // SAFETY: the copy lives in the memory context of the trigger's call, as the original does.
        let data = unsafe {
            let copy = pg_sys::palloc(size_of::<pg_sys::TriggerData>()).cast::<pg_sys::TriggerData>();
            std::ptr::copy_nonoverlapping(self.data, copy, 1);
            (*copy).tg_oldtable = rows.old;
            (*copy).tg_newtable = rows.new;
            copy
        };
        Self {
            data,
            same_keys,
            _rows: Some(rows),
            ..*self
        }
    }

    /// How many rows the statement's UPDATE wrote.
    pub fn updated_rows(&self) -> i64 {
        // SAFETY: the transition table belongs to the call.
        unsafe {
            let new = (*self.data).tg_newtable;
            if new.is_null() {
                0
            } else {
                pg_sys::tuplestore_tuple_count(new)
            }
        }
    }

    /// The row that an INSERT or UPDATE is about to write.
    fn tuple(&self) -> pg_sys::HeapTuple {
        // SAFETY: set for every row trigger on these events.
        unsafe {
            match self.event {
                Event::Update => (*self.data).tg_newtuple,
                _ => (*self.data).tg_trigtuple,
            }
        }
    }

    /// That row as a BEFORE trigger returns it.
    pub fn written(&self) -> pg_sys::Datum {
        pg_sys::Datum::from(self.tuple())
    }

    /// That row, or the one that an UPDATE replaces, as a parameter of the table's row type.
    pub fn row(&self, old: bool) -> Arg<'static> {
        // SAFETY: tuple and descriptor belong to the call; the copy lives in the current memory context.
        unsafe {
            let desc = (*(*self.data).tg_relation).rd_att;
            let tuple = if old { (*self.data).tg_trigtuple } else { self.tuple() };
            Arg::Raw((*desc).tdtypeid, pg_sys::heap_copy_tuple_as_datum(tuple, desc))
        }
    }

    /// The text form of a column of the row that an UPDATE replaces.
    ///
    /// # Errors
    /// The column does not exist.
    pub fn old_column(&self, name: &str) -> Result<Option<String>> {
        // SAFETY: as in `column`.
        unsafe { self.text_of((*self.data).tg_trigtuple, name) }
    }

    /// The row that is about to be written with another value, given as text, in a column of a plain type.
    ///
    /// # Errors
    /// The column does not exist.
    pub fn with_value(&self, column: &str, text: &str) -> Result<pg_sys::Datum> {
        let name = std::ffi::CString::new(column).map_err(|_| Error::internal("a column name holds a NUL"))?;
        let text = std::ffi::CString::new(text).map_err(|_| Error::internal("a value holds a NUL"))?;
        // SAFETY: the tuple is of the trigger's relation; the column's number is checked; the type's input function gets a
        // C string; the copy is made in the trigger's memory context.
        unsafe {
            let desc = (*(*self.data).tg_relation).rd_att;
            let mut number = pg_sys::SPI_fnumber(desc, name.as_ptr());
            if number <= 0 {
                return Err(Error::undefined("a column of the policy no longer exists"));
            }
            let (mut function, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
            pg_sys::getTypeInputInfo(pg_sys::SPI_gettypeid(desc, number), &mut function, &mut parameter);
            let mut value = pg_sys::OidInputFunctionCall(function, text.as_ptr().cast_mut(), parameter, -1);
            let mut is_null = false;
            Ok(pg_sys::Datum::from(pg_sys::heap_modify_tuple_by_cols(
                self.tuple(),
                desc,
                1,
                &mut number,
                &mut value,
                &mut is_null,
            )))
        }
    }

    /// The row that an UPDATE is about to write, as a BEFORE trigger returns it.
    pub fn new_row(&self) -> pg_sys::Datum {
        // SAFETY: set for every row trigger on UPDATE, and ours are created for nothing else.
        unsafe { pg_sys::Datum::from((*self.data).tg_newtuple) }
    }

    /// That row with other values in these columns.
    ///
    /// # Errors
    /// A column does not exist, or does not take a text; errors of the server unwind to the next subtransaction.
    pub fn with_values(&self, columns: &[(&str, Instead)]) -> Result<pg_sys::Datum> {
        // SAFETY: both tuples are of the trigger's relation; column numbers are checked; values stay valid as long as
        // the old tuple, or the current memory context, which both outlive the copy that is made here.
        unsafe {
            let desc = (*(*self.data).tg_relation).rd_att;
            let mut numbers = Vec::new();
            let mut values = Vec::new();
            let mut nulls = Vec::new();
            for (column, instead) in columns {
                let number = self.number(column)?;
                let mut is_null = false;
                values.push(match instead {
                    Instead::Old => pg_sys::SPI_getbinval((*self.data).tg_trigtuple, desc, number, &mut is_null),
                    Instead::Text(text) => {
                        let text = CString::new(text.as_str()).map_err(|_| Error::internal("a value holds a NUL"))?;
                        let (mut function, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
                        pg_sys::getTypeInputInfo(pg_sys::SPI_gettypeid(desc, number), &mut function, &mut parameter);
                        let (mut oid, mut modifier, mut collation) = (pg_sys::InvalidOid, -1, pg_sys::InvalidOid);
                        pg_sys::get_atttypetypmodcoll(
                            self.relation,
                            number as i16,
                            &mut oid,
                            &mut modifier,
                            &mut collation,
                        );
                        pg_sys::OidInputFunctionCall(function, text.as_ptr().cast_mut(), parameter, modifier)
                    }
                });
                nulls.push(is_null);
                numbers.push(number);
            }
            Ok(pg_sys::Datum::from(pg_sys::heap_modify_tuple_by_cols(
                (*self.data).tg_newtuple,
                desc,
                numbers.len() as i32,
                numbers.as_mut_ptr(),
                values.as_mut_ptr(),
                nulls.as_mut_ptr(),
            )))
        }
    }

    /// The number of a column.
    fn number(&self, column: &str) -> Result<c_int> {
        let name = CString::new(column).map_err(|_| Error::internal("a column name holds a NUL"))?;
        // SAFETY: the relation is open during the call; NUL-terminated name.
        let number = unsafe { pg_sys::SPI_fnumber((*(*self.data).tg_relation).rd_att, name.as_ptr()) };
        if number <= 0 {
            return Err(Error::undefined("a column of the policy no longer exists"));
        }
        Ok(number)
    }

    /// Whether the row that an UPDATE is about to write has other bytes in a column than the row that is there; a value that
    /// is stored out of line may look different and be the same.
    ///
    /// # Errors
    /// The column does not exist.
    pub fn changes(&self, column: &str) -> Result<bool> {
        let number = self.number(column)?;
        // SAFETY: tuples and relation belong to the trigger call; the column number is checked; the values are compared
        // while both tuples are there, by what their type says of its representation.
        unsafe {
            let desc = (*(*self.data).tg_relation).rd_att;
            let (mut was_null, mut is_null) = (false, false);
            let old = pg_sys::SPI_getbinval((*self.data).tg_trigtuple, desc, number, &mut was_null);
            let new = pg_sys::SPI_getbinval((*self.data).tg_newtuple, desc, number, &mut is_null);
            if was_null || is_null {
                return Ok(was_null != is_null);
            }
            let (mut length, mut by_value) = (0, false);
            pg_sys::get_typlenbyval(pg_sys::SPI_gettypeid(desc, number), &mut length, &mut by_value);
            Ok(!same_bytes(old, new, length, by_value))
        }
    }

    /// The text form of a column of the row that fired a row trigger: the new one, or the old one of a DELETE.
    ///
    /// # Errors
    /// The column does not exist.
    pub fn column(&self, name: &str) -> Result<Option<String>> {
        self.text_of(self.tuple(), name)
    }

    fn text_of(&self, tuple: pg_sys::HeapTuple, name: &str) -> Result<Option<String>> {
        let number = self.number(name)?;
        // SAFETY: tuple and relation belong to the trigger call; the column number is checked.
        unsafe {
            let desc = (*(*self.data).tg_relation).rd_att;
            let value = pg_sys::SPI_getvalue(tuple, desc, number);
            if value.is_null() {
                return Ok(None);
            }
            Ok(Some(CStr::from_ptr(value).to_string_lossy().into_owned()))
        }
    }
}

thread_local! {
    /// Tables that the engine is writing now, each with the trigger depth at which its own triggers fire.
    static WRITING: RefCell<Vec<(pg_sys::Oid, i32)>> = const { RefCell::new(Vec::new()) };
}

/// How deep in triggers we are.
fn depth() -> i32 {
    // SAFETY: the function takes no argument and reads a backend-local variable.
    unsafe { pgrx::direct_function_call::<i32>(pg_sys::pg_trigger_depth, &[]).unwrap_or(0) }
}

/// Marks tables as written by the engine; ends when dropped, on every way out of the block.
#[must_use]
pub struct EngineWrite(usize);

impl EngineWrite {
    /// Our triggers on `relations` let the next statement through; what a trigger of the user's writes in turn is one
    /// level deeper and is seen.
    pub fn begin(relations: &[pg_sys::Oid]) -> Self {
        let level = depth() + 1;
        WRITING.with_borrow_mut(|w| {
            let before = w.len();
            w.extend(relations.iter().map(|r| (*r, level)));
            Self(before)
        })
    }
}

impl Drop for EngineWrite {
    fn drop(&mut self) {
        WRITING.with_borrow_mut(|w| w.truncate(self.0));
    }
}

/// Whether the engine is writing at all: what the user's own triggers do then is their answer to it.
pub fn engine_is_writing() -> bool {
    WRITING.with_borrow(|w| !w.is_empty())
}

/// Whether the statement that fired a trigger on `relation` is the engine's own.
pub fn is_engine_write(relation: pg_sys::Oid) -> bool {
    WRITING.with_borrow(|w| !w.is_empty() && w.contains(&(relation, depth())))
}
