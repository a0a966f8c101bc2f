//! A query whose rows are looked at one by one: never more of them in memory than a page, and of their values one.

use std::ffi::{CStr, CString, c_long};
use std::ptr;

use pgrx::pg_sys;
use pgrx::spi::Spi;

use super::error::{Error, Result};
use super::rows::Lazy;
use super::sql::with_snapshot;

/// An open cursor. It outlives the switch to an owner in which it was opened; every page is fetched as the same owner.
pub struct Cursor {
    name: CString,
}

impl Cursor {
    /// Opens a query without parameters that neither writes nor locks.
    ///
    /// # Errors
    /// Errors of the server unwind to the next subtransaction.
    pub fn open(query: &str) -> Result<Self> {
        let text = CString::new(query).map_err(|_| Error::internal("a statement holds a NUL"))?;
        with_snapshot(|| {
            Spi::connect(|_client| {
                // SAFETY: an SPI session is open, a query without parameters needs no arrays; the portal's name is a C
                // string that lives as long as the portal, and is copied.
                unsafe {
                    let portal = pg_sys::SPI_cursor_open_with_args(
                        ptr::null(),
                        text.as_ptr(),
                        0,
                        ptr::null_mut(),
                        ptr::null_mut(),
                        ptr::null(),
                        true,
                        pg_sys::CURSOR_OPT_NO_SCROLL as i32,
                    );
                    if portal.is_null() {
                        return Err(Error::internal("a cursor was refused by SPI"));
                    }
                    Ok(Self {
                        name: CStr::from_ptr((*portal).name).to_owned(),
                    })
                }
            })
        })
    }

    /// Calls `f` with each of the next rows; how many there were.
    ///
    /// # Errors
    /// As `f`; errors of the server unwind to the next subtransaction.
    pub fn page(&self, rows: usize, f: impl FnMut(&mut Lazy<'_>) -> Result<()>) -> Result<usize> {
        with_snapshot(|| {
            Spi::connect(|_client| {
                // SAFETY: the portal is looked up by its name, so one that is gone is noticed; rows are read before the SPI
                // session ends, which frees them.
                unsafe {
                    let portal = pg_sys::SPI_cursor_find(self.name.as_ptr());
                    if portal.is_null() {
                        return Err(Error::internal("a cursor is gone"));
                    }
                    pg_sys::SPI_cursor_fetch(portal, true, rows as c_long);
                    Lazy::each(f)
                }
            })
        })
    }

    /// Closes it; one that is gone already is no error.
    pub fn close(self) {
        // SAFETY: inside a transaction; the portal is looked up by its name.
        unsafe {
            let portal = pg_sys::SPI_cursor_find(self.name.as_ptr());
            if !portal.is_null() {
                pg_sys::SPI_cursor_close(portal);
            }
        }
    }
}
