//! Values that are too large to travel: known by what their headers say, without fetching them.

use std::ffi::{CStr, c_int};

use pgrx::pg_sys;

use super::error::Error;

/// Texts from this length on do not travel. A gigabyte is the server's own limit; there must be room for the header and
/// for being copied into an array.
pub(super) const LONGEST: usize = 512 * 1024 * 1024;

/// How many characters of its text form a byte of a value becomes, for the types of which its size says so.
///
/// # Safety
/// Inside a transaction; `oid` is a type.
pub(super) unsafe fn digits(oid: pg_sys::Oid) -> Option<usize> {
    // SAFETY: the caller's.
    match unsafe { pg_sys::getBaseType(oid) } {
        pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID | pg_sys::JSONOID | pg_sys::XMLOID => Some(1),
        pg_sys::BYTEAOID => Some(2),
        _ => None,
    }
}

/// Whether the text form of a value can be shorter than [`LONGEST`]. Of a text or bytea that is not so the output
/// function is never called: it might want more memory than the server gives to one value.
///
/// # Safety
/// `value` is of a type for which [`digits`] gave these.
pub(super) unsafe fn fits(value: pg_sys::Datum, digits: usize) -> bool {
    // SAFETY: a value of these types is a varlena, whose header tells its size; a plain one is as long as it is.
    unsafe {
        let varlena = value.cast_mut_ptr::<pg_sys::varlena>();
        if pgrx::varatt_is_1b(varlena) && !pgrx::varatt_is_1b_e(varlena) {
            return true;
        }
        digits * (pg_sys::toast_raw_datum_size(value) - pg_sys::VARHDRSZ) < LONGEST
    }
}

/// The error that names a result column whose value is too large.
///
/// # Safety
/// Inside an SPI session; `n` is a column of `desc`.
pub(super) unsafe fn too_large(desc: pg_sys::TupleDesc, n: c_int) -> Error {
    // SAFETY: the caller's; the name is a palloc'd C string of our own.
    unsafe {
        let name = pg_sys::SPI_fname(desc, n);
        let shown = CStr::from_ptr(name).to_string_lossy().into_owned();
        pg_sys::pfree(name.cast());
        Error::too_large(&format!("a value of column \"{shown}\""))
    }
}
