//! Parameters: values of any type, by its input function, alone or in arrays.

use std::ffi::{CString, c_int};

use pgrx::pg_sys;

use super::error::{Error, Result};
use super::size::LONGEST;

/// What the server gives to one value at most: MaxAllocSize.
const MOST: usize = 0x3fff_ffff;

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
    Oids(&'a [pg_sys::Oid]),
    ByteArrays(Vec<&'a [u8]>),
    /// A value as the server has it.
    Raw(pg_sys::Oid, pg_sys::Datum),
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

/// # Safety
/// Inside an SPI session.
pub(super) unsafe fn datum(arg: &Arg<'_>) -> Result<(pg_sys::Oid, Option<pg_sys::Datum>)> {
    // SAFETY: each branch builds a datum of the type it announces, in the current (SPI) memory context.
    unsafe {
        Ok(match arg {
            Arg::Raw(oid, value) => (*oid, Some(*value)),
            Arg::Bool(b) => (pg_sys::BOOLOID, Some(pg_sys::Datum::from(*b))),
            Arg::Int(i) => (pg_sys::INT8OID, Some(pg_sys::Datum::from(*i))),
            Arg::Oid(o) => (pg_sys::OIDOID, Some(pg_sys::Datum::from(*o))),
            Arg::Text(t) => (pg_sys::TEXTOID, t.map(|t| text_datum(t.as_bytes())).transpose()?),
            Arg::Typed(oid, t) => (*oid, t.map(|t| Input::of(*oid).read(t)).transpose()?),
            Arg::Texts(items) => {
                let bytes: Vec<_> = items.iter().map(|t| t.map(str::as_bytes)).collect();
                (pg_sys::TEXTARRAYOID, Some(varlena_array(pg_sys::TEXTOID, &bytes)?))
            }
            Arg::Ints(items) => {
                let values = items.iter().map(|i| Ok(Some(pg_sys::Datum::from(*i))));
                (pg_sys::INT8ARRAYOID, Some(array(pg_sys::INT8OID, values)?))
            }
            Arg::Oids(items) => {
                let values = items.iter().map(|o| Ok(Some(pg_sys::Datum::from(*o))));
                (pg_sys::OIDARRAYOID, Some(array(pg_sys::OIDOID, values)?))
            }
            Arg::ByteArrays(items) => {
                let bytes: Vec<_> = items.iter().map(|b| Some(*b)).collect();
                (pg_sys::BYTEAARRAYOID, Some(varlena_array(pg_sys::BYTEAOID, &bytes)?))
            }
            Arg::Array(pg_sys::INT8OID, items) if items.iter().flatten().all(|t| t.parse::<i64>().is_ok()) => {
                let values = items
                    .iter()
                    .map(|t| Ok(t.and_then(|t| t.parse::<i64>().ok()).map(pg_sys::Datum::from)));
                (pg_sys::INT8ARRAYOID, Some(array(pg_sys::INT8OID, values)?))
            }
            Arg::Array(pg_sys::TEXTOID, items) => {
                let bytes: Vec<_> = items.iter().map(|t| t.map(str::as_bytes)).collect();
                (pg_sys::TEXTARRAYOID, Some(varlena_array(pg_sys::TEXTOID, &bytes)?))
            }
            Arg::Array(element, items) => {
                let mut input = Input::of(*element);
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
    function: pg_sys::FmgrInfo,
    parameter: pg_sys::Oid,
}

impl Input {
    /// # Safety
    /// Inside an SPI session; `oid` is a type.
    unsafe fn of(oid: pg_sys::Oid) -> Self {
        let (mut function, mut parameter) = (pg_sys::InvalidOid, pg_sys::InvalidOid);
        // SAFETY: the caller's; raises for shell types. The function is looked up into a zeroed struct of our own, which
        // does not outlive the SPI session.
        unsafe {
            pg_sys::getTypeInputInfo(oid, &mut function, &mut parameter);
            let mut info = std::mem::zeroed::<pg_sys::FmgrInfo>();
            pg_sys::fmgr_info(function, &mut info);
            Self {
                function: info,
                parameter,
            }
        }
    }

    /// # Safety
    /// Inside an SPI session.
    unsafe fn read(&mut self, text: &str) -> Result<pg_sys::Datum> {
        let text = CString::new(text).map_err(|_| Error::internal("a value holds a NUL"))?;
        // SAFETY: the function takes a C string which it does not keep; no type modifier, the column's is applied by
        // assignment.
        Ok(unsafe { pg_sys::InputFunctionCall(&mut self.function, text.as_ptr().cast_mut(), self.parameter, -1) })
    }
}

/// An array of text or bytea, written in one piece: both are a length and bytes, aligned to four.
///
/// # Safety
/// Inside an SPI session; `element` is text or bytea.
unsafe fn varlena_array(element: pg_sys::Oid, items: &[Option<&[u8]>]) -> Result<pg_sys::Datum> {
    if items.iter().flatten().any(|b| b.len() >= LONGEST) {
        return Err(Error::too_large("a value"));
    }
    let align = |n: usize| n.next_multiple_of(4);
    let header = std::mem::size_of::<pg_sys::ArrayType>() + 2 * std::mem::size_of::<c_int>();
    let has_nulls = items.iter().any(Option::is_none);
    let bitmap = if has_nulls { items.len().div_ceil(8) } else { 0 };
    let start = (header + bitmap).next_multiple_of(8);
    let size = items.iter().flatten().fold(start, |n, b| align(n + 4 + b.len()));
    if items.is_empty() || size >= MOST {
        // The server says what is wrong with it.
        // SAFETY: the caller's.
        return unsafe { array(element, items.iter().map(|b| b.map(|b| text_datum(b)).transpose())) };
    }
    // SAFETY: everything is written inside of the `size` bytes that were allocated, zeroed: header, dimensions, bitmap, then
    // each element at a multiple of four, as its type's alignment wants it.
    unsafe {
        let array = pg_sys::palloc0(size).cast::<u8>();
        let head = array.cast::<pg_sys::ArrayType>();
        pgrx::set_varsize_4b(head.cast(), size as c_int);
        (*head).ndim = 1;
        (*head).dataoffset = if has_nulls { start as c_int } else { 0 };
        (*head).elemtype = element;
        let dimensions = array.add(std::mem::size_of::<pg_sys::ArrayType>()).cast::<c_int>();
        dimensions.write(items.len() as c_int);
        dimensions.add(1).write(1);
        let mut at = start;
        for (i, item) in items.iter().enumerate() {
            let Some(bytes) = item else { continue };
            if has_nulls {
                *array.add(header + i / 8) |= 1 << (i % 8);
            }
            pgrx::set_varsize_4b(array.add(at).cast(), (4 + bytes.len()) as c_int);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), array.add(at + 4), bytes.len());
            at = align(at + 4 + bytes.len());
        }
        Ok(pg_sys::Datum::from(array))
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
