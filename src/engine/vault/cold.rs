//! Documents on a cold server, behind a foreign table. Its statements run in transactions of their own, without a lock on the shop's
//! tables, wherever a cycle makes them; what they say of a document is only believed when it was read back.

use std::collections::{HashMap, HashSet};

use super::place::{Foreign, Place};
use crate::pg::deadline;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg, Row};

/// Order, table, record and version of a document.
pub(super) type Spot = (String, String, String, i64);

/// Of a document, from its first columns.
pub(super) fn spot(row: &Row) -> Result<Spot> {
    Ok((row.string(0)?, row.string(1)?, row.string(2)?, row.int(3)?))
}

/// Documents of some orders as a cold server has them.
#[derive(Default)]
pub struct Cold {
    documents: HashMap<String, Vec<Row>>,
    /// Documents that were here when it was asked: what was sent meanwhile is in neither place.
    pub(super) were_here: HashSet<Spot>,
    /// Copies of ours do not count beside them.
    pub(super) alone: bool,
}

impl Cold {
    pub(super) fn of(&self, order: &str) -> &[Row] {
        self.documents.get(order).map_or(&[], Vec::as_slice)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// All that others have fetched, too.
    pub fn add(&mut self, other: Self) {
        self.documents.extend(other.documents);
        self.were_here.extend(other.were_here);
        self.alone |= other.alone;
    }
}

/// The documents of these orders; none where the archive has no foreign table.
///
/// # Errors
/// The foreign table cannot be read: see [`error`].
pub fn fetch(place: &Place, policy: &str, orders: &[impl AsRef<str>]) -> Result<Cold> {
    let mut cold = Cold::default();
    let Some(foreign) = place.foreign.as_ref().filter(|_| !orders.is_empty()) else {
        return Ok(cold);
    };
    let rows = on(foreign, || {
        sql::write_bytes(
            // ident-ok: a foreign table quotes its name.
            &format!(
                "SELECT d.order_key, d.table_name, d.record_key, d.version, d.sealed, d.key_id FROM {foreign} d \
                 WHERE d.policy = $1 AND d.order_key = ANY ($2)"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })?;
    for row in rows {
        cold.documents.entry(row.string(0)?).or_default().push(row);
    }
    Ok(cold)
}

/// [`fetch`], with what is here at that moment: both are to be moved, and documents may be on their way.
///
/// # Errors
/// As [`fetch`]; errors of the server.
pub fn fetch_to_move(place: &Place, policy: &str, orders: &[impl AsRef<str>]) -> Result<Cold> {
    let schema: &Ident = &place.schema;
    // Before: what is sent between both looks is then in the second.
    let here = on_keys(|| {
        sql::read(
            &format!(
                "SELECT d.order_key, d.table_name, d.record_key, d.version FROM {schema}.document d \
                 WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = ANY ($2)"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })?;
    let mut cold = fetch(place, policy, orders)?;
    cold.were_here = here.iter().map(spot).collect::<Result<_>>()?;
    Ok(cold)
}

/// For each of these orders the bytes of its documents there.
///
/// # Errors
/// As [`fetch`].
pub(super) fn sizes(place: &Place, policy: &str, orders: &[String]) -> Result<HashMap<String, i64>> {
    let Some(foreign) = &place.foreign else {
        return Ok(HashMap::new());
    };
    let rows = on(foreign, || {
        sql::read(
            // ident-ok: a foreign table quotes its name.
            &format!(
                "SELECT d.order_key, pg_catalog.sum(pg_catalog.octet_length(d.sealed)) FROM {foreign} d \
                 WHERE d.policy = $1 AND d.order_key = ANY ($2) GROUP BY d.order_key"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })?;
    rows.iter().map(|r| Ok((r.string(0)?, r.int(1)?))).collect()
}

/// Runs statements on a foreign table: as the extension's owner, under its user mapping, and no longer than `archive_timeout`.
///
/// # Errors
/// See [`error`].
pub(super) fn on<T>(foreign: &Foreign, f: impl FnOnce() -> Result<T>) -> Result<T> {
    in_time(foreign, || {
        as_extension(|| {
            foreign.refuse_unfit()?;
            f()
        })
        .map_err(|e| error(foreign, e))
    })
}

/// Gives up after `archive_timeout`.
///
/// # Errors
/// As `f`; the time is over.
pub fn in_time<T>(foreign: &Foreign, f: impl FnOnce() -> Result<T>) -> Result<T> {
    deadline::for_archive(|| Error::out_of_time(&foreign.shown()), f)
}

/// What an error says: that one document is at fault, and other orders may fare better, or that there is no point in asking on.
pub fn error(foreign: &Foreign, e: Error) -> Error {
    // Data, constraints, limits of a row, conflicts of transactions, damaged pages.
    const OF_ONE: &[&str] = &["22", "23", "40", "54", "55", "XX"];
    let state = e.sqlstate();
    if e.is_cancel() || e.is_unreachable() || OF_ONE.iter().any(|class| state.starts_with(class)) {
        return e;
    }
    Error::unreachable(&foreign.shown(), &state)
}
