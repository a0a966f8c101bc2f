//! Destroying what is archived of orders: keys and documents, so that neither can open the other's backup.

use super::place::Place;
use super::schema::refuse_foreign_hands;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg, Row};

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
pub fn destroy(place: &Place, policy: &str, orders: &[impl AsRef<str>]) -> Result<Vec<Destroyed>> {
    let schema: &Ident = &place.schema;
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
    .map_err(|e| unwritable(schema, e))?;
    let mut destroyed = rows
        .iter()
        .map(|r| {
            Ok(Destroyed {
                order_key: r.string(0)?,
                documents: r.int(1)?,
                generation: r.int(2)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    if place.foreign.is_some() {
        // What a key opened that was lost is there all the same.
        let lost: Vec<&str> = orders
            .iter()
            .map(AsRef::as_ref)
            .filter(|order| destroyed.iter().all(|d| d.order_key != *order))
            .collect();
        destroyed.extend(lost.into_iter().map(|order| Destroyed {
            order_key: order.to_owned(),
            documents: 0,
            generation: 1,
        }));
    }
    let whole = |d: &Destroyed| Doomed {
        order_key: d.order_key.clone(),
        record: None,
        key_upto: d.generation,
    };
    doom(place, policy, &destroyed.iter().map(whole).collect::<Vec<_>>())?;
    Ok(destroyed)
}

/// Which of these orders have a data key of that generation or an earlier one: their positions.
///
/// # Errors
/// The archive cannot be read.
pub fn surviving(place: &Place, policy: &str, orders: &[(&str, i64)]) -> Result<Vec<usize>> {
    let schema: &Ident = &place.schema;
    let rows = on_keys(|| {
        refuse_foreign_hands(schema)?;
        sql::read(
            &format!(
                "SELECT n.i - 1 FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) \
                    WITH ORDINALITY AS n (p, o, g, i) \
                 WHERE EXISTS (SELECT FROM {schema}.data_key d WHERE d.order_key = n.o AND d.policy = n.p AND d.key_id::bigint <= n.g)"
            ),
            &[
                Arg::Texts(vec![Some(policy); orders.len()]),
                Arg::Texts(orders.iter().map(|(order, _)| Some(*order)).collect()),
                Arg::Ints(orders.iter().map(|(_, generation)| *generation).collect()),
            ],
        )
    })
    .map_err(|e| super::unreadable(schema, e))?;
    rows.iter()
        .map(|r| usize::try_from(r.int(0)?).map_err(|_| Error::internal("an ordinality is negative")))
        .collect()
}

/// What was destroyed once more.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct DestroyedAgain {
    pub data_keys: i64,
    pub documents: i64,
    /// It has a later data key: what that one opens was archived since.
    pub is_archived_since: bool,
}

/// Deletes the data keys of these orders up to a generation, and the documents under them. What each had, in their order.
///
/// # Errors
/// The archive cannot be written.
pub fn destroy_upto(place: &Place, policy: &str, orders: &[(&str, i64)]) -> Result<Vec<DestroyedAgain>> {
    let schema: &Ident = &place.schema;
    let rows = on_keys(|| {
        refuse_foreign_hands(schema)?;
        sql::write(
            &format!(
                "WITH n AS MATERIALIZED (SELECT p, o, g, i - 1 AS i FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) \
                    WITH ORDINALITY AS n (p, o, g, i)), \
                 k AS (DELETE FROM {schema}.data_key d USING n WHERE d.policy = n.p AND d.order_key = n.o AND d.key_id::bigint <= n.g RETURNING n.i), \
                 d AS (DELETE FROM {schema}.document d USING n WHERE d.policy = n.p AND d.order_key = n.o AND d.key_id::bigint <= n.g RETURNING n.i), \
                 a (i, keys, documents) AS (SELECT i, pg_catalog.sum(key), pg_catalog.sum(document) FROM \
                    (SELECT i, 1, 0 FROM k UNION ALL SELECT i, 0, 1 FROM d UNION ALL SELECT i, 0, 0 FROM n) AS u (i, key, document) GROUP BY i) \
                 SELECT n.i, a.keys, a.documents, \
                    EXISTS (SELECT FROM {schema}.data_key l WHERE l.order_key = n.o AND l.policy = n.p AND l.key_id::bigint > n.g) \
                 FROM n JOIN a ON a.i = n.i ORDER BY n.i"
            ),
            &[
                Arg::Texts(vec![Some(policy); orders.len()]),
                Arg::Texts(orders.iter().map(|(order, _)| Some(*order)).collect()),
                Arg::Ints(orders.iter().map(|(_, generation)| *generation).collect()),
            ],
        )
    })
    .map_err(|e| unwritable(schema, e))?;
    // What a foreign table has of them may be back, too, or was never told to go.
    let whole = |(order, generation): &(&str, i64)| Doomed {
        order_key: (*order).to_owned(),
        record: None,
        key_upto: *generation,
    };
    doom(
        place,
        policy,
        &orders.iter().filter(|(_, g)| *g > 0).map(whole).collect::<Vec<_>>(),
    )?;
    rows.iter()
        .map(|r| {
            Ok(DestroyedAgain {
                data_keys: r.int(1)?,
                documents: r.int(2)?,
                is_archived_since: r.bool(3)?,
            })
        })
        .collect()
}

fn unwritable(schema: &Ident, e: Error) -> Error {
    if e.is_cancel() || e.is_lock() {
        return e;
    }
    Error::archive(format!(
        "the archive in schema {schema} cannot be written ({})",
        e.sqlstate()
    ))
}

/// What a foreign table is to delete: of an order, or of one record of it (table, key), under data keys up to a number.
pub(super) struct Doomed {
    pub order_key: String,
    pub record: Option<(String, String)>,
    pub key_upto: i64,
}

/// Notes what a foreign table is to delete. The next cycle that reaches it does; nothing there opens any more.
pub(super) fn doom(place: &Place, policy: &str, doomed: &[Doomed]) -> Result<()> {
    if place.foreign.is_none() || doomed.is_empty() {
        return Ok(());
    }
    let schema: &Ident = &place.schema;
    let record = |d: &Doomed| d.record.clone().unwrap_or_default();
    let (tables, records): (Vec<String>, Vec<String>) = doomed.iter().map(record).unzip();
    on_keys(|| {
        sql::execute(
            &format!(
                "INSERT INTO {schema}.doomed AS d (policy, order_key, table_name, record_key, key_upto) \
                 SELECT $1, o, t, r, k FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5)) \
                    AS n (o, t, r, k) \
                 ON CONFLICT (order_key, policy, table_name, record_key) DO UPDATE SET key_upto = GREATEST(d.key_upto, EXCLUDED.key_upto)"
            ),
            &[
                Arg::Text(Some(policy)),
                Arg::Texts(doomed.iter().map(|d| Some(d.order_key.as_str())).collect()),
                Arg::texts(&tables),
                Arg::texts(&records),
                Arg::Ints(doomed.iter().map(|d| d.key_upto).collect()),
            ],
        )
    })?;
    Ok(())
}

/// What a foreign table has yet to delete of some orders: (order, table, record, up to which data key).
pub(super) struct Covered(pub(super) Vec<Row>);

impl Covered {
    /// Whether a document is among it.
    pub(super) fn covers(&self, document: &Row) -> Result<bool> {
        for doomed in &self.0 {
            let whole = doomed.str(1)?.is_empty();
            let same = doomed.str(0)? == document.str(0)?
                && (whole || doomed.str(1)? == document.str(1)? && doomed.str(2)? == document.str(2)?);
            if same && document.str(5)?.parse().unwrap_or(0) <= doomed.int(3)? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// [`Covered`], of these orders.
pub(super) fn doomed(place: &Place, policy: &str, orders: &[impl AsRef<str>]) -> Result<Covered> {
    if place.foreign.is_none() {
        return Ok(Covered(Vec::new()));
    }
    let schema: &Ident = &place.schema;
    let rows = on_keys(|| {
        sql::read(
            &format!(
                "SELECT d.order_key, d.table_name, d.record_key, d.key_upto FROM {schema}.doomed d \
                 WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = ANY ($2)"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })?;
    Ok(Covered(rows))
}
