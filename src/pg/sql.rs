//! Statements in, rows of text out. Parameters are built inside the SPI session and die with it; results leave by their
//! types' output functions, so a value is never cast and never becomes a float on its way.

use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

use pgrx::pg_sys;
use pgrx::spi::Spi;

use super::error::{Error, Result};
use super::size::{self, LONGEST};
use super::trigger::TriggerCall;

/// A parameter of a statement.
#[derive(Debug, Clone)]
pub enum Arg<'a> {
    Bool(bool),
    Int(i64),
    Oid(pg_sys::Oid),
    Text(Option<&'a str>),
    /// One value of any type, by its input function.
    Typed(pg_sys::Oid, Option<&'a str>),
    Texts(Vec<Option<&'a str>>),
    Ints(Vec<i64>),
    ByteArrays(Vec<&'a [u8]>),
    /// An array of any element type, each element by its type's input function.
    Array(pg_sys::Oid, Vec<Option<&'a str>>),
}

impl<'a> Arg<'a> {
    /// A text array without NULLs.
    pub fn texts<S: AsRef<str> + 'a>(items: &'a [S]) -> Self {
        Self::Texts(items.iter().map(|s| Some(s.as_ref())).collect())
    }

    /// A text array that may hold NULLs.
    pub fn opt_texts(items: &'a [Option<String>]) -> Self {
        Self::Texts(items.iter().map(|s| s.as_deref()).collect())
    }
}

/// One value of a result row.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cell {
    Null,
    Text(String),
    Bytes(Vec<u8>),
}

/// One result row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row(Vec<Cell>);

impl Row {
    /// The text form of column `i`, or `None` for NULL.
    ///
    /// # Errors
    /// The column does not exist or holds bytes.
    pub fn text(&self, i: usize) -> Result<Option<&str>> {
        match self.0.get(i) {
            Some(Cell::Null) => Ok(None),
            Some(Cell::Text(t)) => Ok(Some(t)),
            _ => Err(Error::internal("a result column is missing or is no text")),
        }
    }

    /// The text form of a column that is never NULL.
    ///
    /// # Errors
    /// As [`Row::text`], or the column is NULL.
    pub fn str(&self, i: usize) -> Result<&str> {
        self.text(i)?
            .ok_or_else(|| Error::internal("a result column is unexpectedly null"))
    }

    /// [`Row::text`], owned.
    ///
    /// # Errors
    /// As [`Row::text`].
    pub fn owned(&self, i: usize) -> Result<Option<String>> {
        Ok(self.text(i)?.map(str::to_owned))
    }

    /// [`Row::str`], owned.
    ///
    /// # Errors
    /// As [`Row::str`].
    pub fn string(&self, i: usize) -> Result<String> {
        Ok(self.str(i)?.to_owned())
    }

    /// A number of at most 64 bits.
    ///
    /// # Errors
    /// As [`Row::str`], or it is no integer.
    pub fn int(&self, i: usize) -> Result<i64> {
        self.str(i)?
            .parse()
            .map_err(|_| Error::internal("a result column is no integer"))
    }

    /// A boolean; NULL is false.
    ///
    /// # Errors
    /// As [`Row::text`].
    pub fn bool(&self, i: usize) -> Result<bool> {
        Ok(self.text(i)? == Some("t"))
    }

    /// An object identifier.
    ///
    /// # Errors
    /// As [`Row::int`].
    pub fn oid(&self, i: usize) -> Result<pg_sys::Oid> {
        let number = u32::try_from(self.int(i)?).map_err(|_| Error::internal("a result column is no OID"))?;
        Ok(pg_sys::Oid::from(number))
    }

    /// Binary data of a column of type bytea, see [`Want::Bytes`].
    ///
    /// # Errors
    /// The column is missing, NULL or was not fetched as bytes.
    pub fn bytes(&self, i: usize) -> Result<&[u8]> {
        match self.0.get(i) {
            Some(Cell::Bytes(b)) => Ok(b),
            _ => Err(Error::internal("a result column holds no bytes")),
        }
    }

    /// All columns from `first` on, as text.
    ///
    /// # Errors
    /// As [`Row::text`].
    pub fn texts(&self, range: std::ops::Range<usize>) -> Result<Vec<Option<String>>> {
        range.map(|i| self.owned(i)).collect()
    }
}

/// How columns of type bytea come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// As the output function writes them: for rows of the user's.
    Text,
    /// Raw: for sealed documents of our own.
    Bytes,
}

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
                let mut types = Vec::with_capacity(args.len());
                let mut values = Vec::with_capacity(args.len());
                let mut nulls: Vec<c_char> = Vec::with_capacity(args.len());
                for arg in args {
                    let (oid, value) = datum(arg)?;
                    types.push(oid);
                    nulls.push(if value.is_some() { b' ' } else { b'n' } as c_char);
                    values.push(value.unwrap_or(pg_sys::Datum::from(0)));
                }
                let status = pg_sys::SPI_execute_with_args(
                    text.as_ptr(),
                    args.len() as c_int,
                    types.as_mut_ptr(),
                    values.as_mut_ptr(),
                    nulls.as_ptr(),
                    false,
                    0,
                );
                if status < 0 {
                    return Err(Error::internal(format!("a statement was refused by SPI ({status})")));
                }
                Ok((pg_sys::SPI_processed, rows(want)?))
            }
        })
    })
}

/// SPI insists on a snapshot around its own where no portal has one: in a background worker.
fn with_snapshot<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
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

/// Reads the current SPI tuple table.
///
/// # Safety
/// Inside an SPI session, right after a statement.
unsafe fn rows(want: Want) -> Result<Vec<Row>> {
    // SAFETY: the caller's; table and descriptor belong to the SPI session; attribute numbers run from 1 to natts.
    unsafe {
        let Some(table) = pg_sys::SPI_tuptable.as_ref() else {
            return Ok(Vec::new());
        };
        let natts = (*table.tupdesc).natts;
        let count = usize::try_from(pg_sys::SPI_processed).unwrap_or(0);
        let mut out = Vec::with_capacity(count);
        for i in 0..count {
            let tuple = *table.vals.add(i);
            let mut row = Vec::with_capacity(natts as usize);
            for n in 1..=natts {
                row.push(cell(tuple, table.tupdesc, n, want)?);
            }
            out.push(Row(row));
        }
        Ok(out)
    }
}

/// # Safety
/// `tuple` matches `desc`, `n` is one of its columns, an SPI session is open.
unsafe fn cell(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc, n: c_int, want: Want) -> Result<Cell> {
    // SAFETY: the caller's; what the output functions allocate is freed with the SPI session or right here.
    unsafe {
        if want == Want::Bytes && pg_sys::SPI_gettypeid(desc, n) == pg_sys::BYTEAOID {
            let mut is_null = false;
            let value = pg_sys::SPI_getbinval(tuple, desc, n, &mut is_null);
            if is_null {
                return Ok(Cell::Null);
            }
            let varlena = pg_sys::pg_detoast_datum_packed(value.cast_mut_ptr());
            return Ok(Cell::Bytes(pgrx::varlena::varlena_to_byte_slice(varlena).to_vec()));
        }
        if !size::fits(tuple, desc, n) {
            return Err(size::too_large(desc, n));
        }
        let value = pg_sys::SPI_getvalue(tuple, desc, n);
        if value.is_null() {
            return Ok(Cell::Null);
        }
        let text = CStr::from_ptr(value);
        if text.to_bytes().len() >= LONGEST {
            return Err(size::too_large(desc, n));
        }
        let text = text
            .to_str()
            .map_err(|_| Error::unsupported("a value is not valid UTF-8"))?
            .to_owned();
        pg_sys::pfree(value.cast());
        Ok(Cell::Text(text))
    }
}

/// # Safety
/// Inside an SPI session.
unsafe fn datum(arg: &Arg<'_>) -> Result<(pg_sys::Oid, Option<pg_sys::Datum>)> {
    // SAFETY: each branch builds a datum of the type it announces, in the current (SPI) memory context.
    unsafe {
        Ok(match arg {
            Arg::Bool(b) => (pg_sys::BOOLOID, Some(pg_sys::Datum::from(*b))),
            Arg::Int(i) => (pg_sys::INT8OID, Some(pg_sys::Datum::from(*i))),
            Arg::Oid(o) => (pg_sys::OIDOID, Some(pg_sys::Datum::from(*o))),
            Arg::Text(t) => (pg_sys::TEXTOID, t.map(|t| text_datum(t.as_bytes())).transpose()?),
            Arg::Typed(oid, t) => (*oid, t.map(|t| Input::of(*oid).read(t)).transpose()?),
            Arg::Texts(items) => {
                let values = items.iter().map(|t| t.map(|t| text_datum(t.as_bytes())).transpose());
                (pg_sys::TEXTARRAYOID, Some(array(pg_sys::TEXTOID, values)?))
            }
            Arg::Ints(items) => {
                let values = items.iter().map(|i| Ok(Some(pg_sys::Datum::from(*i))));
                (pg_sys::INT8ARRAYOID, Some(array(pg_sys::INT8OID, values)?))
            }
            Arg::ByteArrays(items) => {
                let values = items.iter().map(|b| text_datum(b).map(Some));
                (pg_sys::BYTEAARRAYOID, Some(array(pg_sys::BYTEAOID, values)?))
            }
            Arg::Array(element, items) => {
                let input = Input::of(*element);
                let array_type = pg_sys::get_array_type(*element);
                if array_type == pg_sys::InvalidOid {
                    return Err(Error::unsupported("a key column has a type without arrays"));
                }
                (
                    array_type,
                    Some(array(
                        *element,
                        items.iter().map(|t| t.map(|t| input.read(t)).transpose()),
                    )?),
                )
            }
        })
    }
}

/// A type's input function.
struct Input {
    function: pg_sys::Oid,
    parameter: pg_sys::Oid,
}

impl Input {
    /// # Safety
    /// Inside a transaction; `oid` is a type.
    unsafe fn of(oid: pg_sys::Oid) -> Self {
        let (mut function, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        // SAFETY: the caller's; raises for shell types.
        unsafe { pg_sys::getTypeInputInfo(oid, &mut function, &mut parameter) };
        Self { function, parameter }
    }

    /// # Safety
    /// Inside an SPI session.
    unsafe fn read(&self, text: &str) -> Result<pg_sys::Datum> {
        let text = CString::new(text).map_err(|_| Error::internal("a value holds a NUL"))?;
        // SAFETY: the function takes a C string which it does not keep; no type modifier, the column's is applied by
        // assignment.
        Ok(unsafe { pg_sys::OidInputFunctionCall(self.function, text.as_ptr().cast_mut(), self.parameter, -1) })
    }
}

/// # Safety
/// Inside an SPI session.
unsafe fn text_datum(bytes: &[u8]) -> Result<pg_sys::Datum> {
    let length = c_int::try_from(bytes.len())
        .ok()
        .filter(|_| bytes.len() < LONGEST)
        .ok_or_else(|| Error::too_large("a value"))?;
    // SAFETY: pointer and length describe `bytes`; text and bytea share their layout.
    Ok(unsafe { pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(bytes.as_ptr().cast(), length)) })
}

/// # Safety
/// Inside an SPI session; the items are of type `element`.
unsafe fn array(
    element: pg_sys::Oid,
    items: impl Iterator<Item = Result<Option<pg_sys::Datum>>>,
) -> Result<pg_sys::Datum> {
    let mut values = Vec::new();
    let mut nulls = Vec::new();
    for item in items {
        let item = item?;
        nulls.push(item.is_none());
        values.push(item.unwrap_or(pg_sys::Datum::from(0)));
    }
    // SAFETY: values and nulls have `values.len()` entries, dims and lbs one; the array copies what it is given.
    unsafe {
        if values.is_empty() {
            return Ok(pg_sys::Datum::from(pg_sys::construct_empty_array(element)));
        }
        let (mut length, mut by_value, mut align) = (0, false, 0);
        pg_sys::get_typlenbyvalalign(element, &mut length, &mut by_value, &mut align);
        let mut dims = [values.len() as c_int];
        let mut lower = [1];
        let array = pg_sys::construct_md_array(
            values.as_mut_ptr(),
            nulls.as_mut_ptr(),
            1,
            dims.as_mut_ptr(),
            lower.as_mut_ptr(),
            element,
            c_int::from(length),
            by_value,
            align,
        );
        Ok(pg_sys::Datum::from(array))
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
