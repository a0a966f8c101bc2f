//! Whether the tables and functions in a database are those that this library was written for. After a new version is installed
//! the library is new at once, and they are what they were until ALTER EXTENSION … UPDATE.

use super::error::{Error, Result};

/// The version of this library.
const LIBRARY: &str = env!("CARGO_PKG_VERSION");

/// Refuses to go on in a database whose extension is of another version.
///
/// # Errors
/// It is.
pub fn require_same(in_database: &str) -> Result<()> {
    if in_database == LIBRARY {
        return Ok(());
    }
    Err(Error::other_version(
        in_database,
        LIBRARY,
        is_older(in_database, LIBRARY),
    ))
}

/// By its numbers; what is no number counts as the oldest.
fn is_older(one: &str, other: &str) -> bool {
    let numbers = |text: &str| -> Vec<u64> { text.split('.').map(|part| part.parse().unwrap_or(0)).collect() };
    numbers(one) < numbers(other)
}
