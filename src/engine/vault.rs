//! The archive: sealed documents and wrapped data keys, in a schema that is no member of the extension.

mod reseal;
mod schema;

pub use reseal::{Renames, reseal};
pub use schema::create;
use schema::refuse_foreign_hands;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use crate::domain::document::Document;
use crate::domain::json_merge::merge;
use crate::domain::vault::{Binding, DataKey, KeyBinding, MasterKeys};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg, Row};

/// A record's place in the archive.
pub type Place = (String, String);

/// An archived value.
#[derive(Clone, PartialEq, Eq)]
pub struct Archived {
    pub type_name: String,
    pub text: Option<String>,
    /// What earlier versions held, oldest first.
    earlier: Vec<String>,
}

impl Archived {
    /// The value to give back: where the newest version holds marks of ours inside a document, what they stand for.
    pub fn whole(&self, marks: &[&str]) -> Option<String> {
        let text = self.text.as_deref()?;
        let mut versions = self.earlier.iter().map(String::as_str).chain(std::iter::once(text));
        let first = versions.next()?.to_owned();
        Some(versions.fold(first, |older, newer| {
            merge(newer, &older, marks).unwrap_or_else(|| newer.to_owned())
        }))
    }
}

/// What the archive holds of one record.
#[derive(Default)]
pub struct Newest {
    /// Highest version, damaged ones included.
    pub version: i64,
    /// The newest value of each cell that could be opened.
    pub cells: BTreeMap<String, Archived>,
    /// The newest version could not be opened: what it held is unknown.
    pub damaged: bool,
}

/// What the archive holds of one order.
#[derive(Default)]
pub struct OrderArchive {
    pub records: HashMap<Place, Newest>,
    key: Option<(String, Rc<DataKey>)>,
    /// Data keys that are there and cannot be unwrapped.
    broken: HashSet<String>,
    /// Documents exist, but no key opens them: shredded or purged.
    pub keyless: bool,
}

impl OrderArchive {
    /// Whether there is anything to give back.
    pub fn is_empty(&self) -> bool {
        self.records.values().all(|r| r.cells.is_empty())
    }
}

/// Reads back and opens everything that is archived of these orders.
///
/// # Errors
/// The archive cannot be read. A document that cannot be opened is no error here, it is counted.
pub fn open(
    schema: &Ident,
    keys: &MasterKeys,
    policy: &str,
    orders: &[String],
) -> Result<HashMap<String, OrderArchive>> {
    let (wrapped, documents) = read(schema, policy, orders)?;
    let (data_keys, mut all) = unwrap(keys, policy, &wrapped)?;
    for row in &documents {
        let (order, table, record) = (row.string(0)?, row.string(1)?, row.string(2)?);
        let (version, key_id) = (row.int(3)?, row.string(5)?);
        let archive = all.entry(order.clone()).or_default();
        let newest = archive.records.entry((table.clone(), record.clone())).or_default();
        newest.version = version;
        let Some(key) = data_keys.get(&(order.clone(), key_id.clone())) else {
            // Without its key a document is shredded; with a broken one it is damaged.
            if archive.broken.contains(&key_id) {
                newest.damaged = true;
            } else {
                archive.keyless = true;
            }
            continue;
        };
        let binding = Binding {
            policy,
            order_key: &order,
            table: &table,
            record_key: &record,
            version,
            key_id: &key_id,
        };
        let opened = key
            .open(&binding, row.bytes(4)?)
            .ok()
            .and_then(|plain| Document::decode(&plain).ok());
        match opened {
            Some(document) => {
                newest.damaged = false;
                for (column, cell) in document.cells {
                    let earlier = newest
                        .cells
                        .remove(&column)
                        .map(|known| known.earlier.into_iter().chain(known.text).collect())
                        .unwrap_or_default();
                    newest.cells.insert(
                        column,
                        Archived {
                            type_name: cell.type_name,
                            text: cell.text,
                            earlier,
                        },
                    );
                }
            }
            None => newest.damaged = true,
        }
    }
    Ok(all)
}

/// The wrapped data keys and the sealed documents of these orders, as they are stored.
fn read(schema: &Ident, policy: &str, orders: &[String]) -> Result<(Vec<Row>, Vec<Row>)> {
    on_keys(|| {
        // Dropped since the policy was applied, it may have been made anew by anybody.
        refuse_foreign_hands(schema)?;
        let keys = sql::write_bytes(
            &format!(
                "SELECT d.order_key, d.key_id, d.wrapped, d.master_key_id FROM {schema}.data_key d \
                 WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = ANY ($2) ORDER BY d.order_key, d.key_id::bigint"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )?;
        let documents = sql::write_bytes(
            &format!(
                "SELECT d.order_key, d.table_name, d.record_key, d.version, d.sealed, d.key_id FROM {schema}.document d \
                 WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = ANY ($2) \
                 ORDER BY d.order_key, d.table_name, d.record_key, d.version"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )?;
        Ok((keys, documents))
    })
    .map_err(|e| {
        if e.is_cancel() {
            e
        } else {
            Error::archive(format!(
                "the archive in schema {schema} cannot be read ({})",
                e.sqlstate()
            ))
        }
    })
}

/// Data keys by order and generation.
type DataKeys = HashMap<(String, String), Rc<DataKey>>;

/// Unwraps data keys; one that cannot be counts as damage of its order.
fn unwrap(keys: &MasterKeys, policy: &str, wrapped: &[Row]) -> Result<(DataKeys, HashMap<String, OrderArchive>)> {
    let mut data_keys = DataKeys::new();
    let mut all: HashMap<String, OrderArchive> = HashMap::new();
    for row in wrapped {
        let (order, key_id) = (row.string(0)?, row.string(1)?);
        let master = keys.get(row.str(3)?).ok_or_else(|| {
            Error::no_key(format!(
                "master key {} is not among the configured keys",
                row.str(3).unwrap_or("?")
            ))
        })?;
        let binding = KeyBinding {
            policy,
            order_key: &order,
            key_id: &key_id,
        };
        match DataKey::unwrap(row.bytes(2)?, master, &binding) {
            Ok(key) => {
                let key = Rc::new(key);
                all.entry(order.clone()).or_default().key = Some((key_id.clone(), key.clone()));
                data_keys.insert((order, key_id), key);
            }
            Err(_) => {
                all.entry(order).or_default().broken.insert(key_id);
            }
        }
    }
    Ok((data_keys, all))
}

/// One document to be sealed.
pub struct NewDocument {
    pub order_key: String,
    pub table: String,
    pub record_key: String,
    pub version: i64,
    pub document: Document,
}

/// Seals documents and stores them, with a new data key for each order that has none.
///
/// # Errors
/// A key or random numbers cannot be had, or the archive cannot be written.
pub fn store(
    schema: &Ident,
    keys: &MasterKeys,
    policy: &str,
    known: &HashMap<String, OrderArchive>,
    documents: &[NewDocument],
) -> Result<()> {
    if documents.is_empty() {
        return Ok(());
    }
    let failed = |e: crate::domain::vault::VaultError| Error::internal(format!("sealing failed: {e}"));
    let mut made: HashMap<&str, (String, Rc<DataKey>)> = HashMap::new();
    let (mut order_keys, mut key_ids, mut wraps) = (Vec::new(), Vec::new(), Vec::new());
    for document in documents {
        let order = document.order_key.as_str();
        let has = known.get(order).is_some_and(|a| a.key.is_some());
        if has || made.contains_key(order) {
            continue;
        }
        // A shredded order's documents name key 1 and up; a new generation never takes one of their names.
        let key_id = next_generation(schema, policy, order, known)?;
        let key = DataKey::generate().map_err(failed)?;
        wraps.push(
            key.wrap(
                keys.current(),
                &KeyBinding {
                    policy,
                    order_key: order,
                    key_id: &key_id,
                },
            )
            .map_err(failed)?,
        );
        order_keys.push(order);
        key_ids.push(key_id.clone());
        made.insert(order, (key_id, Rc::new(key)));
    }
    let mut sealed = Vec::with_capacity(documents.len());
    let mut sealed_ids = Vec::with_capacity(documents.len());
    for document in documents {
        let order = document.order_key.as_str();
        let (key_id, key) = made
            .get(order)
            .or_else(|| known.get(order).and_then(|a| a.key.as_ref()))
            .ok_or_else(|| Error::internal("an order has no data key"))?;
        let binding = Binding {
            policy,
            order_key: order,
            table: &document.table,
            record_key: &document.record_key,
            version: document.version,
            key_id,
        };
        sealed.push(key.seal(&binding, &document.document.encode()).map_err(failed)?);
        sealed_ids.push(key_id.as_str());
    }
    as_extension(|| {
        sql::execute(
            &format!(
                "INSERT INTO {schema}.data_key (policy, order_key, key_id, wrapped, master_key_id) \
                 SELECT $1, o, k, w, $5 FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (o, k, w)"
            ),
            &[
                Arg::Text(Some(policy)),
                Arg::texts(&order_keys),
                Arg::texts(&key_ids),
                Arg::ByteArrays(wraps.iter().map(Vec::as_slice).collect()),
                Arg::Text(Some(keys.current().id())),
            ],
        )?;
        sql::execute(
            &format!(
                "INSERT INTO {schema}.document (policy, order_key, table_name, record_key, version, sealed, key_id) \
                 SELECT $1, o, t, r, v, s, k FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), \
                 pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7)) AS n (o, t, r, v, s, k)"
            ),
            &[
                Arg::Text(Some(policy)),
                Arg::Texts(documents.iter().map(|d| Some(d.order_key.as_str())).collect()),
                Arg::Texts(documents.iter().map(|d| Some(d.table.as_str())).collect()),
                Arg::Texts(documents.iter().map(|d| Some(d.record_key.as_str())).collect()),
                Arg::Ints(documents.iter().map(|d| d.version).collect()),
                Arg::ByteArrays(sealed.iter().map(Vec::as_slice).collect()),
                Arg::Texts(sealed_ids.iter().map(|k| Some(*k)).collect()),
            ],
        )?;
        Ok(())
    })
}

/// The number of an order's next data key.
fn next_generation(schema: &Ident, policy: &str, order: &str, known: &HashMap<String, OrderArchive>) -> Result<String> {
    if !known.get(order).is_some_and(|a| a.keyless || !a.broken.is_empty()) {
        return Ok("1".to_owned());
    }
    let rows = as_extension(|| {
        sql::read(
            &format!(
                "SELECT COALESCE(pg_catalog.max(k.key_id::bigint), 0) + 1 FROM ( \
                    SELECT key_id FROM {schema}.document WHERE policy = $1 AND order_key = $2 \
                    UNION ALL SELECT key_id FROM {schema}.data_key WHERE policy = $1 AND order_key = $2) AS k"
            ),
            &[Arg::Text(Some(policy)), Arg::Text(Some(order))],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
}
