//! How much there is to open.

use super::cold;
use super::place::Place;
use super::schema::refuse_foreign_hands;
use super::unreadable;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// For each of these orders the bytes of its sealed documents, without fetching them.
///
/// # Errors
/// The archive cannot be read.
pub fn sizes(place: &Place, policy: &str, orders: &[String]) -> Result<Vec<usize>> {
    let schema: &Ident = &place.schema;
    let there = cold::sizes(place, policy, orders)?;
    let rows = on_keys(|| {
        refuse_foreign_hands(schema)?;
        sql::read(
            &format!(
                "SELECT (SELECT COALESCE(pg_catalog.sum(pg_catalog.octet_length(d.sealed)), 0) FROM {schema}.document d \
                    WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = n.k) \
                 FROM pg_catalog.unnest($2) WITH ORDINALITY AS n (k, i) ORDER BY n.i"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })
    .map_err(|e| unreadable(schema, e))?;
    rows.iter()
        .zip(orders)
        .map(|(r, order)| {
            let both = r.int(0)?.saturating_add(there.get(order).copied().unwrap_or(0));
            usize::try_from(both).map_err(|_| Error::internal("a size is negative"))
        })
        .collect()
}
