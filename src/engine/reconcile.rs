//! After a restore: what was destroyed since the backup is destroyed again. The tombstone file tells, which a restore does not turn back.

mod back;
mod tail;

pub use back::reconcile;

use std::collections::HashSet;

use super::tombstone;
use crate::pg::error::{Error, Result};
use crate::pg::subxact::subtransaction;
use crate::pg::tombstones::{self, Book};
use crate::pg::xact::Boundary;
use tail::{Found, Mark, look};

/// Refuses to open archives of a policy while some of them may be back that were destroyed.
///
/// # Errors
/// They may be; the file cannot be read.
pub fn refuse_before(policy: &str) -> Result<()> {
    look(Some(policy))?.as_ref().map_or(Ok(()), Found::refuse)
}

/// The orders of a policy that no cycle touches before `reconcile()`: it would archive what was destroyed. And what is to be said.
///
/// # Errors
/// As [`refuse_before`], without what it refuses.
pub fn left_alone(policy: &str) -> Result<(HashSet<String>, Option<Error>)> {
    let Some(found) = look(Some(policy))? else {
        return Ok(Default::default());
    };
    let why = found.refuse().err();
    Ok((found.unknown.into_iter().map(|u| u.order_key).collect(), why))
}

/// Why an order is left alone.
pub fn reason() -> Error {
    Error::unreconciled("its archive was destroyed after the backup was made that this database was restored from")
}

/// The first policy of a database: what the file says so far is said of others. Some of it may be signed by keys that nobody has any more.
///
/// # Errors
/// The file cannot be used.
pub fn begin() -> Result<()> {
    let Some(mut book) = Book::open()? else { return Ok(()) };
    let position = book.size;
    match book.code_at(position)? {
        Some(code) => Mark { position, code }.write_first(),
        None => Ok(()),
    }
}

/// Notes how much of the file this database knows. At the end of a cycle; called with an open transaction, leaves one open.
///
/// # Errors
/// A cancel only: whatever else is wrong, the next cycle says so.
pub fn settle(boundary: Boundary) -> Result<()> {
    if !tombstones::is_configured() {
        return Ok(());
    }
    match subtransaction(note) {
        Err(e) if e.is_cancel() => Err(e),
        _ => boundary.commit(),
    }
}

fn note() -> Result<()> {
    let Some(found) = look(None)? else { return Ok(()) };
    if found.tail.trouble.is_some() || found.is_read() {
        return Ok(());
    }
    // Whoever has it locked does the same, or reconciles, which may take as long as that transaction does.
    if tombstone::mark_lock()?.try_take()? {
        found.known_upto().write()?;
    }
    Ok(())
}
