//! Which columns a query reads, as the server's parser sees it.

use std::ffi::{CStr, CString};
use std::ptr;

use pgrx::pg_sys;
use pgrx::spi::Spi;

use super::error::{Error, Result};
use super::sql::with_snapshot;

/// The columns that a query reads from its first table; `None` if it reads the whole row, or has a subquery.
///
/// # Errors
/// Errors of the server unwind to the next subtransaction.
pub fn read_by(query: &str) -> Result<Option<Vec<String>>> {
    let text = CString::new(query).map_err(|_| Error::internal("a statement holds a NUL"))?;
    with_snapshot(|| {
        Spi::connect(|_client| {
            // SAFETY: the plan and what it is made from live as long as the SPI session; each list is checked before its
            // first element is read as what the server keeps there; the table is the first of the query's.
            unsafe {
                let none = || Error::internal("a query has no plan");
                let plan = pg_sys::SPI_prepare(text.as_ptr(), 0, ptr::null_mut());
                let sources = if plan.is_null() {
                    ptr::null_mut()
                } else {
                    pg_sys::SPI_plan_get_plan_sources(plan)
                };
                let source = first::<pg_sys::CachedPlanSource>(sources).ok_or_else(none)?;
                let query = first::<pg_sys::Query>((*source).query_list).ok_or_else(none)?;
                let table = first::<pg_sys::RangeTblEntry>((*query).rtable).ok_or_else(none)?;
                if (*query).hasSubLinks {
                    return Ok(None);
                }
                let mut numbers = ptr::null_mut();
                pg_sys::pull_varattnos((*query).targetList.cast(), 1, &mut numbers);
                let mut names = Vec::new();
                let mut member = -1;
                loop {
                    member = pg_sys::bms_next_member(numbers, member);
                    if member < 0 {
                        return Ok(Some(names));
                    }
                    let number = member + pg_sys::FirstLowInvalidHeapAttributeNumber;
                    if number <= 0 {
                        return Ok(None);
                    }
                    let name = pg_sys::get_attname((*table).relid, number as i16, false);
                    names.push(CStr::from_ptr(name).to_string_lossy().into_owned());
                }
            }
        })
    })
}

/// # Safety
/// The list is NULL or one of pointers to `T`.
unsafe fn first<T>(list: *mut pg_sys::List) -> Option<*mut T> {
    // SAFETY: the caller's.
    unsafe {
        let list = list.as_ref()?;
        (list.length > 0).then(|| (*list.elements).ptr_value.cast::<T>())
    }
}
