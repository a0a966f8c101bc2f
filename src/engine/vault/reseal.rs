//! Moving documents to the keys that their rows have now.

use std::borrow::Cow;
use std::collections::HashSet;

use super::cold::{Cold, spot};
use super::destroy::{Doomed, doom};
use super::place::Place;
use super::{NewDocument, open, read, store, together, unwrap};
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
/// Those that `cold` holds are sealed anew here, to be sent, and given up there.
///
/// # Errors
/// A document cannot be opened, so it cannot be moved: nothing is removed then.
pub fn reseal(
    place: &Place,
    keys: &MasterKeys,
    policy: &str,
    order: &str,
    renames: &Renames<'_>,
    cold: &Cold,
) -> Result<()> {
    let schema = &place.schema;
    let (documents, newest_key) = open_versions(place, keys, policy, order, cold)?;
    let moved: Vec<NewDocument<'_>> = documents
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
    let record = renames.record.filter(|_| renames.order.is_none());
    let given_up = Doomed {
        order_key: order.to_owned(),
        record: record.map(|(table, old, _)| (table.to_owned(), old.to_owned())),
        key_upto: newest_key,
    };
    doom(place, policy, &[given_up])?;
    let target = renames.order.map_or(order, |(_, new)| new);
    let known = open(place, keys, policy, &[target], &Cold::default())?;
    store(schema, keys, policy, &known, &moved)
}

/// Every version of every document of one order, opened, and the number of its newest data key.
fn open_versions<'a>(
    place: &Place,
    keys: &MasterKeys,
    policy: &str,
    order: &'a str,
    cold: &Cold,
) -> Result<(Vec<NewDocument<'a>>, i64)> {
    let (wrapped, local) = read(&place.schema, policy, &[order])?;
    let documents = together(place, policy, &local, &[order], cold)?;
    let mut found = HashSet::new();
    for row in &documents {
        found.insert(spot(row)?);
    }
    if cold
        .were_here
        .iter()
        .any(|spot| spot.0 == order && !found.contains(spot))
    {
        return Err(
            Error::wrong_state("documents were sent to the cold server while a key was followed")
                .hint("The next cycle follows it."),
        );
    }
    let archive = unwrap(keys, policy, &wrapped)?.remove(order).unwrap_or_default();
    let mut newest_key = 0;
    let mut out = Vec::with_capacity(documents.len());
    for row in documents {
        let (table, record_key, version) = (row.string(1)?, row.string(2)?, row.int(3)?);
        let key_id = row.str(5)?;
        newest_key = newest_key.max(key_id.parse().unwrap_or(0));
        let binding = Binding {
            policy,
            order_key: order,
            table: &table,
            record_key: &record_key,
            version,
            key_id,
        };
        let plain = archive
            .key(key_id)
            .and_then(|key| key.open(&binding, row.bytes(4).ok()?).ok())
            .filter(|plain| Document::decode(plain).is_ok())
            .ok_or_else(|| Error::damaged(format!("an archived document of a record of {table} cannot be opened")))?;
        out.push(NewDocument {
            order_key: Cow::Borrowed(order),
            table: table.into(),
            record_key: record_key.into(),
            version,
            plain,
        });
    }
    Ok((out, newest_key))
}
