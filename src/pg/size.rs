//! Values that are too large to travel: known by what their headers say, without fetching them.

use std::ffi::{CStr, c_int};

use pgrx::pg_sys;

use super::error::Error;

/// Texts from this length on do not travel. A gigabyte is the server's own limit; there must be room for the header and
/// for being copied into an array.
pub(super) const LONGEST: usize = 512 * 1024 * 1024;

/// Whether the text form of a value can be shorter than [`LONGEST`]. Of a text or bytea that is not so the output
/// function is never called: it might want more memory than the server gives to one value.
///
/// # Safety
/// `tuple` matches `desc`, `n` is one of its columns, an SPI session is open.
pub(super) unsafe fn fits(tuple: pg_sys::HeapTuple, desc: pg_sys::TupleDesc, n: c_int) -> bool {
    // SAFETY: the caller's; a value of these types is a varlena, whose header tells its size.
    unsafe {
        let digits = match pg_sys::getBaseType(pg_sys::SPI_gettypeid(desc, n)) {
            pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID | pg_sys::JSONOID | pg_sys::XMLOID => 1,
            pg_sys::BYTEAOID => 2,
            _ => return true,
        };
        let mut is_null = false;
        let value = pg_sys::SPI_getbinval(tuple, desc, n, &mut is_null);
        is_null || digits * (pg_sys::toast_raw_datum_size(value) - pg_sys::VARHDRSZ) < LONGEST
    }
}

/// The error that names a result column whose value is too large.
///
/// # Safety
/// As for [`fits`].
pub(super) unsafe fn too_large(desc: pg_sys::TupleDesc, n: c_int) -> Error {
    // SAFETY: the caller's; the name is a palloc'd C string of our own.
    unsafe {
        let name = pg_sys::SPI_fname(desc, n);
        let shown = CStr::from_ptr(name).to_string_lossy().into_owned();
        pg_sys::pfree(name.cast());
        Error::too_large(&format!("a value of column \"{shown}\""))
    }
}
