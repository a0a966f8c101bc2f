//! Destroying what is archived of orders: keys and documents, so that neither can open the other's backup.

use super::schema::refuse_foreign_hands;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// What was destroyed of one order.
pub struct Destroyed {
    pub order_key: String,
    pub documents: i64,
    /// The newest of its data keys.
    pub generation: i64,
}

/// Deletes every data key and every document of these orders, whoever sealed them and whether they open or not.
///
/// # Errors
/// The archive cannot be written.
pub fn destroy(schema: &Ident, policy: &str, orders: &[impl AsRef<str>]) -> Result<Vec<Destroyed>> {
    let rows = on_keys(|| {
        refuse_foreign_hands(schema)?;
        sql::write(
            &format!(
                "WITH k AS (DELETE FROM {schema}.data_key d WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = ANY ($2) \
                    RETURNING d.order_key, d.key_id::bigint AS generation), \
                 d AS (DELETE FROM {schema}.document d WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = ANY ($2) \
                    RETURNING d.order_key, d.key_id::bigint AS generation) \
                 SELECT a.order_key, pg_catalog.sum(a.n), pg_catalog.max(a.generation) FROM \
                    (SELECT order_key, generation, 0 FROM k UNION ALL SELECT order_key, generation, 1 FROM d) AS a (order_key, generation, n) \
                 GROUP BY 1"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })
    .map_err(|e| {
        if e.is_cancel() || e.is_lock() {
            return e;
        }
        Error::archive(format!(
            "the archive in schema {schema} cannot be written ({})",
            e.sqlstate()
        ))
    })?;
    rows.iter()
        .map(|r| {
            Ok(Destroyed {
                order_key: r.string(0)?,
                documents: r.int(1)?,
                generation: r.int(2)?,
            })
        })
        .collect()
}
