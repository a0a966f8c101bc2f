//! The archive: sealed documents and wrapped data keys, in a schema that is no member of the extension.

mod cold;
mod destroy;
mod place;
mod reseal;
mod rotate;
mod schema;
mod send;
mod size;
mod standing;

pub use cold::{Cold, error, fetch, fetch_to_move, in_time};
pub use destroy::{DestroyedAgain, destroy, destroy_upto, surviving};
pub use place::{Foreign, Place};
pub use reseal::{Renames, reseal};
pub use rotate::{rewrap, schemas, wrapped_anew, wrapped_by};
pub use schema::create;
use schema::refuse_foreign_hands;
pub use send::{done_with, prove, resend, send, tidy, unsent};
pub use size::sizes;
pub use standing::{holds_any, standing};

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use zeroize::Zeroizing;

use crate::domain::document::{Cell, Document};
use crate::domain::json_merge::merge;
use crate::domain::vault::{Binding, DataKey, KeyBinding, MasterKeys};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg, Row, Text};

/// What the archive holds of one record.
#[derive(Default)]
pub struct Newest {
    /// Highest version, damaged ones included.
    pub version: i64,
    /// The versions that could be opened, oldest first.
    documents: Vec<Document>,
    /// The newest version could not be opened: what it held is unknown.
    pub damaged: bool,
}

impl Newest {
    /// Whether no version could be opened.
    pub fn is_empty(&self) -> bool {
        self.documents.is_empty()
    }

    /// The newest value of a cell.
    pub fn cell(&self, name: &str) -> Option<Cell<'_>> {
        self.documents.iter().rev().find_map(|document| document.cell(name))
    }

    /// The newest value of each cell.
    pub fn cells(&self) -> impl ExactSizeIterator<Item = Cell<'_>> {
        let all = self.documents.iter().flat_map(Document::cells);
        let newest: BTreeMap<&str, Cell<'_>> = all.map(|cell| (cell.name, cell)).collect();
        newest.into_values()
    }

    /// What the versions of a cell held, oldest first.
    pub fn versions<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.documents
            .iter()
            .filter_map(move |document| document.cell(name)?.text)
    }

    /// The value of a cell to give back: where the newest version holds marks of ours inside a document, what they stand for.
    pub fn whole(&self, name: &str, marks: &[&str]) -> Option<String> {
        self.cell(name)?.text?;
        let mut versions = self.versions(name);
        let first = versions.next()?.to_owned();
        Some(versions.fold(first, |older, newer| {
            merge(newer, &older, marks).unwrap_or_else(|| newer.to_owned())
        }))
    }
}

/// A record of an order in the archive.
struct Record {
    table: Text,
    key: Text,
    newest: Newest,
}

/// What the archive holds of one order.
#[derive(Default)]
pub struct OrderArchive {
    /// In the order of table and key.
    records: Vec<Record>,
    /// Its data keys with their names, the newest last.
    keys: Vec<(Text, Rc<DataKey>)>,
    /// Data keys that are there and cannot be unwrapped.
    broken: Vec<Text>,
    /// Documents exist, but no key opens them: shredded or purged.
    pub keyless: bool,
    /// The newest data key that a document names.
    named: i64,
    /// The newest of its data keys that were destroyed, where the caller knows of one.
    pub generation: i64,
}

impl OrderArchive {
    /// Whether there is anything to give back.
    pub fn is_empty(&self) -> bool {
        self.records.iter().all(|r| r.newest.is_empty())
    }

    /// Whether a document is there whose content is unknown.
    pub fn is_damaged(&self) -> bool {
        self.records.iter().any(|r| r.newest.damaged)
    }

    fn key(&self, id: &str) -> Option<&Rc<DataKey>> {
        self.keys.iter().find(|(known, _)| **known == *id).map(|(_, key)| key)
    }

    /// What it holds of one record.
    pub fn record(&self, table: &str, key: &str) -> Option<&Newest> {
        let found = self
            .records
            .binary_search_by(|r| (&*r.table, &*r.key).cmp(&(table, key)));
        found.ok().map(|i| &self.records[i].newest)
    }

    /// (table, key, what it holds) of each record, in the order of table and key.
    pub fn records(&self) -> impl Iterator<Item = (&str, &str, &Newest)> {
        self.records.iter().map(|r| (&*r.table, &*r.key, &r.newest))
    }

    /// The place of a record, added if need be; documents come in the order of their places.
    fn newest(&mut self, table: Text, key: Text) -> &mut Newest {
        let place = |r: &Record| (&*r.table, &*r.key).cmp(&(&*table, &*key));
        let at = match self.records.last() {
            None => Err(0),
            Some(last) if place(last).is_eq() => Ok(self.records.len() - 1),
            Some(last) if place(last).is_lt() => Err(self.records.len()),
            _ => self.records.binary_search_by(place),
        };
        let at = at.unwrap_or_else(|at| {
            let newest = Newest::default();
            self.records.insert(at, Record { table, key, newest });
            at
        });
        &mut self.records[at].newest
    }
}

/// Reads back and opens everything that is archived of these orders, here and in what was fetched of a cold server.
///
/// # Errors
/// The archive cannot be read. A document that cannot be opened is no error here, it is counted.
pub fn open(
    place: &Place,
    keys: &MasterKeys,
    policy: &str,
    orders: &[impl AsRef<str>],
    cold: &Cold,
) -> Result<HashMap<String, OrderArchive>> {
    let (wrapped, local) = read(&place.schema, policy, orders)?;
    let mut all = unwrap(keys, policy, &wrapped)?;
    let documents = together(place, policy, &local, orders, cold)?;
    // They come order by order.
    for rows in documents.chunk_by(|a, b| matches!((a.str(0), b.str(0)), (Ok(a), Ok(b)) if a == b)) {
        let Some(first) = rows.first() else { continue };
        let order = first.str(0)?;
        let archive = all.entry(order.to_owned()).or_default();
        for row in rows {
            let (table, record, version, key_id) = (row.shared(1)?, row.shared(2)?, row.int(3)?, row.str(5)?);
            let binding = Binding {
                policy,
                order_key: order,
                table: &table,
                record_key: &record,
                version,
                key_id,
            };
            archive.named = archive.named.max(key_id.parse().unwrap_or(0));
            let key = archive.key(key_id);
            let opened = match key {
                Some(key) => key
                    .open(&binding, row.bytes(4)?)
                    .ok()
                    .and_then(|plain| Document::decode(&plain).ok()),
                None => None,
            };
            // Without its key a document is shredded; with a broken one it is damaged.
            let shredded = key.is_none() && archive.broken.iter().all(|id| **id != *key_id);
            archive.keyless |= shredded;
            let newest = archive.newest(table, record);
            newest.version = version;
            match opened {
                Some(document) => {
                    newest.damaged = false;
                    newest.documents.push(document);
                }
                None if shredded => {}
                None => newest.damaged = true,
            }
        }
    }
    Ok(all)
}

/// The documents of both places by order, table, record and version; each once. What is still to be deleted there does not count.
fn together<'a>(
    place: &Place,
    policy: &str,
    local: &'a [Row],
    orders: &[impl AsRef<str>],
    cold: &'a Cold,
) -> Result<Vec<&'a Row>> {
    let mut rows: Vec<&Row> = if cold.alone { Vec::new() } else { local.iter().collect() };
    if cold.is_empty() {
        return Ok(rows);
    }
    let doomed = destroy::doomed(place, policy, orders)?;
    for row in orders.iter().flat_map(|order| cold.of(order.as_ref())) {
        if !doomed.covers(row)? {
            rows.push(row);
        }
    }
    let spot = |row: &&'a Row| -> Result<(&'a str, &'a str, &'a str, i64)> {
        let row: &'a Row = row;
        Ok((row.str(0)?, row.str(1)?, row.str(2)?, row.int(3)?))
    };
    let mut placed = rows
        .iter()
        .map(|row| Ok((spot(row)?, *row)))
        .collect::<Result<Vec<_>>>()?;
    // Stable: of two under one place ours stays.
    placed.sort_by(|a, b| a.0.cmp(&b.0));
    placed.dedup_by(|later, first| later.0 == first.0);
    Ok(placed.into_iter().map(|(_, row)| row).collect())
}

/// The data keys of one order.
fn unwrap_keys(place: &Place, keys: &MasterKeys, policy: &str, order: &str) -> Result<OrderArchive> {
    let (wrapped, _) = read(&place.schema, policy, &[order])?;
    Ok(unwrap(keys, policy, &wrapped)?.remove(order).unwrap_or_default())
}

/// The wrapped data keys and the sealed documents of these orders, as they are stored here.
fn read(schema: &Ident, policy: &str, orders: &[impl AsRef<str>]) -> Result<(Vec<Row>, Vec<Row>)> {
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
    .map_err(|e| unreadable(schema, e))
}

fn unreadable(schema: &Ident, e: Error) -> Error {
    if e.is_cancel() {
        return e;
    }
    Error::archive(format!(
        "the archive in schema {schema} cannot be read ({})",
        e.sqlstate()
    ))
    .hint("Nothing was changed. Restore the archive's tables and the extension owner's rights on them, then try again.")
}

/// Unwraps data keys; one that cannot be counts as damage of its order.
fn unwrap(keys: &MasterKeys, policy: &str, wrapped: &[Row]) -> Result<HashMap<String, OrderArchive>> {
    let mut all: HashMap<String, OrderArchive> = HashMap::with_capacity(wrapped.len());
    for row in wrapped {
        let (order, key_id) = (row.str(0)?, row.shared(1)?);
        let master = keys.get(row.str(3)?).ok_or_else(|| {
            Error::no_key(format!(
                "master key {} is not among the configured keys",
                row.str(3).unwrap_or("?")
            ))
        })?;
        let binding = KeyBinding {
            policy,
            order_key: order,
            key_id: &key_id,
        };
        let archive = all.entry(order.to_owned()).or_default();
        match DataKey::unwrap(row.bytes(2)?, master, &binding) {
            Ok(key) => archive.keys.push((key_id, Rc::new(key))),
            Err(_) => archive.broken.push(key_id),
        }
    }
    Ok(all)
}

/// One document to be sealed.
pub struct NewDocument<'a> {
    pub order_key: Cow<'a, str>,
    pub table: Cow<'a, str>,
    pub record_key: Cow<'a, str>,
    pub version: i64,
    /// What [`encode`](crate::domain::document::encode) made.
    pub plain: Zeroizing<Vec<u8>>,
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
    documents: &[NewDocument<'_>],
) -> Result<()> {
    if documents.is_empty() {
        return Ok(());
    }
    let failed = |e: crate::domain::vault::VaultError| Error::internal(format!("sealing failed: {e}"));
    let (mut order_keys, mut key_ids, mut wraps) = (Vec::new(), Vec::new(), Vec::new());
    let mut sealed = Vec::with_capacity(documents.len());
    let mut sealed_ids: Vec<Text> = Vec::with_capacity(documents.len());
    let mut made: HashMap<&str, (Text, Rc<DataKey>)> = HashMap::new();
    // An order's documents come one after the other.
    let mut last: Option<(&str, (Text, Rc<DataKey>))> = None;
    for document in documents {
        let order: &str = &document.order_key;
        let (key_id, key) = match last.take().filter(|(of, _)| *of == order) {
            Some((_, key)) => key,
            None => match known.get(order).and_then(|a| a.keys.last()).or_else(|| made.get(order)) {
                Some(key) => key.clone(),
                None => {
                    // A shredded order's documents name key 1 and up; a new generation never takes one of their names.
                    let key_id = Text::from(next_generation(schema, policy, order, known)?);
                    let key = Rc::new(DataKey::generate().map_err(failed)?);
                    let binding = KeyBinding {
                        policy,
                        order_key: order,
                        key_id: &key_id,
                    };
                    wraps.push(key.wrap(keys.current(), &binding).map_err(failed)?);
                    order_keys.push(order);
                    key_ids.push(key_id.clone());
                    made.insert(order, (key_id.clone(), key.clone()));
                    (key_id, key)
                }
            },
        };
        let binding = Binding {
            policy,
            order_key: order,
            table: &document.table,
            record_key: &document.record_key,
            version: document.version,
            key_id: &key_id,
        };
        sealed.push(key.seal(&binding, &document.plain).map_err(failed)?);
        sealed_ids.push(key_id.clone());
        last = Some((order, (key_id, key)));
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
                Arg::Texts(documents.iter().map(|d| Some(&*d.order_key)).collect()),
                Arg::Texts(documents.iter().map(|d| Some(&*d.table)).collect()),
                Arg::Texts(documents.iter().map(|d| Some(&*d.record_key)).collect()),
                Arg::Ints(documents.iter().map(|d| d.version).collect()),
                Arg::ByteArrays(sealed.iter().map(Vec::as_slice).collect()),
                Arg::texts(&sealed_ids),
            ],
        )?;
        Ok(())
    })
}

/// The number of an order's next data key.
fn next_generation(schema: &Ident, policy: &str, order: &str, known: &HashMap<String, OrderArchive>) -> Result<String> {
    let archive = known.get(order);
    let destroyed = archive.map_or(0, |a| a.generation.max(a.named));
    if !archive.is_some_and(|a| a.keyless || !a.broken.is_empty()) {
        return Ok((destroyed + 1).to_string());
    }
    let rows = as_extension(|| {
        sql::read(
            &format!(
                "SELECT GREATEST(pg_catalog.max(k.key_id::bigint), $3) + 1 FROM ( \
                    SELECT key_id FROM {schema}.document WHERE policy = $1 AND order_key = $2 \
                    UNION ALL SELECT key_id FROM {schema}.data_key WHERE policy = $1 AND order_key = $2) AS k"
            ),
            &[Arg::Text(Some(policy)), Arg::Text(Some(order)), Arg::Int(destroyed)],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
}
