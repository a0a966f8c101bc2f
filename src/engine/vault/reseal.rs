//! Moving documents to the keys that their rows have now.

use std::borrow::Cow;

use super::{NewDocument, open, read, store, unwrap};
use crate::domain::document::Document;
use crate::domain::vault::{Binding, MasterKeys};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// Keys that changed: of the order itself, and of a record (table, old, new).
pub struct Renames<'a> {
    pub order: Option<(&'a str, &'a str)>,
    pub record: Option<(&'a str, &'a str, &'a str)>,
}

/// Seals the documents of one order anew under the keys that its rows have now, and removes them under the old ones.
/// Versions are kept as they are.
///
/// # Errors
/// A document cannot be opened, so it cannot be moved: nothing is removed then.
pub fn reseal(schema: &Ident, keys: &MasterKeys, policy: &str, order: &str, renames: &Renames<'_>) -> Result<()> {
    let moved: Vec<NewDocument<'_>> = open_versions(schema, keys, policy, order)?
        .into_iter()
        .filter(|d| {
            renames.order.is_some()
                || renames
                    .record
                    .is_some_and(|(t, old, _)| d.table == t && d.record_key == old)
        })
        .map(|d| NewDocument {
            order_key: renames.order.map_or(d.order_key, |(_, new)| new.into()),
            record_key: match renames.record {
                Some((t, old, new)) if d.table == t && d.record_key == old => new.into(),
                _ => d.record_key,
            },
            ..d
        })
        .collect();
    if moved.is_empty() {
        return Ok(());
    }
    as_extension(|| {
        match renames.record.filter(|_| renames.order.is_none()) {
            None => {
                for table in [Ident::new("document"), Ident::new("data_key")] {
                    sql::execute(
                        &format!("DELETE FROM {schema}.{table} WHERE policy = $1 AND order_key = $2"),
                        &[Arg::Text(Some(policy)), Arg::Text(Some(order))],
                    )?;
                }
            }
            Some((table, old, _)) => {
                sql::execute(
                    &format!(
                        "DELETE FROM {schema}.document WHERE policy = $1 AND order_key = $2 AND table_name = $3 AND record_key = $4"
                    ),
                    &[
                        Arg::Text(Some(policy)),
                        Arg::Text(Some(order)),
                        Arg::Text(Some(table)),
                        Arg::Text(Some(old)),
                    ],
                )?;
            }
        }
        Ok(())
    })?;
    let target = renames.order.map_or(order, |(_, new)| new);
    let known = open(schema, keys, policy, &[target])?;
    store(schema, keys, policy, &known, &moved)
}

/// Every version of every document of one order, opened.
fn open_versions<'a>(schema: &Ident, keys: &MasterKeys, policy: &str, order: &'a str) -> Result<Vec<NewDocument<'a>>> {
    let (wrapped, documents) = read(schema, policy, &[order])?;
    let archive = unwrap(keys, policy, &wrapped)?.remove(order).unwrap_or_default();
    documents
        .iter()
        .map(|row| {
            let (table, record_key, version) = (row.string(1)?, row.string(2)?, row.int(3)?);
            let key_id = row.str(5)?;
            let binding = Binding {
                policy,
                order_key: order,
                table: &table,
                record_key: &record_key,
                version,
                key_id,
            };
            let key = archive.keys.iter().find(|(id, _)| **id == *key_id);
            let plain = key
                .and_then(|(_, key)| key.open(&binding, row.bytes(4).ok()?).ok())
                .filter(|plain| Document::decode(plain).is_ok())
                .ok_or_else(|| {
                    Error::damaged(format!("an archived document of a record of {table} cannot be opened"))
                })?;
            Ok(NewDocument {
                order_key: Cow::Borrowed(order),
                table: table.into(),
                record_key: record_key.into(),
                version,
                plain,
            })
        })
        .collect()
}
