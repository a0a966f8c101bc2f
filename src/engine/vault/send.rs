//! The way of documents to a cold server. They are sealed and committed here first, with their data keys; then they are sent, in
//! a transaction of its own, and read back in another. Only then the copy here goes. What is repeated after a crash or a cut
//! finds what is there already: the same bytes under the same place are the same document.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};

use super::cold::{Cold, fetch, on, spot};
use super::destroy::doomed;
use super::place::{Foreign, Place};
use super::{NewDocument, store, unwrap_keys};
use crate::domain::vault::{Binding, MasterKeys};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg, Row};

/// Bytes that one INSERT carries, about.
const CHUNK: usize = 8 << 20;

/// Orders that have something to be sent, or to be deleted there.
///
/// # Errors
/// Errors of the server.
pub fn unsent(place: &Place, policy: &str, after: Option<&str>, limit: i64) -> Result<Vec<String>> {
    if place.foreign.is_none() {
        return Ok(Vec::new());
    }
    let schema: &Ident = &place.schema;
    let rows = on_keys(|| {
        sql::read(
            &format!(
                "SELECT n.k FROM ((SELECT DISTINCT d.order_key FROM {schema}.document d WHERE d.policy = $1 AND d.sent_at IS NULL AND d.order_key > $2 \
                        ORDER BY 1 LIMIT $3) \
                    UNION (SELECT DISTINCT d.order_key FROM {schema}.doomed d WHERE d.policy = $1 AND d.order_key > $2 ORDER BY 1 LIMIT $3)) AS n (k) \
                 ORDER BY n.k LIMIT $3"
            ),
            &[
                Arg::Text(Some(policy)),
                Arg::Text(Some(after.unwrap_or(""))),
                Arg::Int(limit),
            ],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// Sends what these orders have here and not there, and deletes there what was destroyed here. Has no effect before COMMIT.
///
/// # Errors
/// The foreign table cannot be written: nothing has changed then.
pub fn send(place: &Place, keys: &MasterKeys, policy: &str, orders: &[&str]) -> Result<()> {
    let Some(foreign) = &place.foreign else { return Ok(()) };
    // First: a place may have been given up, and be taken again.
    delete(place, foreign, policy, orders)?;
    let mut ours = waiting(place, policy, orders)?;
    if ours.is_empty() {
        return Ok(());
    }
    let with: Vec<String> = of_orders(&ours)?;
    let theirs = fetch(place, policy, &with)?;
    let differs = move_on(place, keys, policy, &ours, &theirs)?;
    if differs {
        ours = waiting(place, policy, orders)?;
    }
    let mut there = HashSet::new();
    for order in &with {
        for row in theirs.of(order) {
            there.insert(spot(row)?);
        }
    }
    let mut chunk: Vec<&Row> = Vec::new();
    let mut bytes = 0;
    for row in &ours {
        if there.contains(&spot(row)?) {
            continue;
        }
        bytes += row.bytes(4)?.len();
        chunk.push(row);
        if bytes >= CHUNK {
            insert(foreign, policy, &chunk)?;
            (chunk, bytes) = (Vec::new(), 0);
        }
    }
    insert(foreign, policy, &chunk)
}

/// Reads back what a cold server has of these orders, and gives up, or marks, the copies here that it holds byte by byte. Returns what was
/// read, and the orders of which something here is not there.
///
/// # Errors
/// The foreign table cannot be read.
pub fn prove(place: &Place, policy: &str, orders: &[&str]) -> Result<(Cold, HashSet<String>)> {
    let mut cold = fetch(place, policy, orders)?;
    if place.foreign.is_none() {
        return Ok((cold, HashSet::new()));
    }
    cold.alone = !place.spool;
    let schema: &Ident = &place.schema;
    if place.spool {
        // It may have been put back to what it was before: what was there once is sent again.
        let theirs: Vec<&Row> = orders.iter().flat_map(|order| cold.of(order)).collect();
        let mut args = columns(policy, &theirs)?;
        args.push(Arg::texts(orders));
        on_keys(|| {
            sql::execute(
                &format!(
                    "UPDATE {schema}.document d SET sent_at = NULL WHERE d.policy = $1 AND d.order_key = ANY ($8) AND d.sent_at IS NOT NULL \
                     AND NOT EXISTS (SELECT FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5), \
                        pg_catalog.unnest($6), pg_catalog.unnest($7)) AS n (o, t, r, v, s, k) \
                        WHERE d.order_key = n.o AND d.table_name = n.t AND d.record_key = n.r AND d.version = n.v AND d.sealed = n.s AND d.key_id = n.k)"
                ),
                &args,
            )
        })?;
    }
    let ours = of_orders(&waiting(place, policy, orders)?)?;
    if ours.is_empty() {
        return Ok((cold, HashSet::new()));
    }
    let theirs: Vec<&Row> = ours.iter().flat_map(|order| cold.of(order)).collect();
    let found = "FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6), \
                    pg_catalog.unnest($7)) AS n (o, t, r, v, s, k) \
                 WHERE d.policy = $1 AND d.order_key = n.o AND d.table_name = n.t AND d.record_key = n.r AND d.version = n.v \
                    AND d.sealed = n.s AND d.key_id = n.k AND d.sent_at IS NULL";
    let statement = if place.spool {
        // The copy here opens what is due when the server does not answer; it goes when the order is redacted.
        // ident-ok: a name that was quoted and constants.
        format!("UPDATE {schema}.document d SET sent_at = pg_catalog.now() {found}")
    } else {
        // ident-ok: as above.
        format!("DELETE FROM {schema}.document d USING {}", &found["FROM ".len()..])
    };
    on_keys(|| sql::execute(&statement, &columns(policy, &theirs)?))?;
    let left = of_orders(&waiting(place, policy, orders)?)?;
    Ok((cold, left.into_iter().collect()))
}

/// Orders that have no more use for the copies here of what a cold server holds.
///
/// # Errors
/// Errors of the server.
pub fn done_with(place: &Place, policy: &str, after: Option<&str>, limit: i64) -> Result<Vec<String>> {
    if !place.spool {
        return Ok(Vec::new());
    }
    let schema: &Ident = &place.schema;
    let rows = on_keys(|| {
        sql::read(
            &format!(
                "SELECT DISTINCT d.order_key FROM {schema}.document d WHERE d.policy = $1 AND d.sent_at IS NOT NULL AND d.order_key > $2 \
                    AND NOT EXISTS (SELECT FROM amazon_pii.order_state o WHERE o.order_key = d.order_key AND o.policy = $1 \
                        AND o.status IN ('flagged', 'scheduled', 'archived', 'failed', 'retrieved')) ORDER BY 1 LIMIT $3"
            ),
            &[
                Arg::Text(Some(policy)),
                Arg::Text(Some(after.unwrap_or(""))),
                Arg::Int(limit),
            ],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// [`prove`], and what is there as it is here goes here.
///
/// # Errors
/// As [`prove`].
pub fn tidy(place: &Place, policy: &str, orders: &[&str]) -> Result<()> {
    prove(place, policy, orders)?;
    let schema: &Ident = &place.schema;
    on_keys(|| {
        sql::execute(
            &format!(
                "DELETE FROM {schema}.document d WHERE d.policy = $1 AND d.order_key = ANY ($2) AND d.sent_at IS NOT NULL"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })?;
    Ok(())
}

/// Everything of a policy that is here is to be sent: it goes to another table than before.
///
/// # Errors
/// Errors of the server.
pub fn resend(place: &Place, policy: &str) -> Result<()> {
    let schema: &Ident = &place.schema;
    on_keys(|| {
        sql::execute(
            &format!("UPDATE {schema}.document d SET sent_at = NULL WHERE d.policy = $1 AND d.sent_at IS NOT NULL"),
            &[Arg::Text(Some(policy))],
        )
    })?;
    Ok(())
}

/// The documents of these orders that are not known to be there.
fn waiting(place: &Place, policy: &str, orders: &[&str]) -> Result<Vec<Row>> {
    let schema: &Ident = &place.schema;
    on_keys(|| {
        sql::write_bytes(
            &format!(
                "SELECT d.order_key, d.table_name, d.record_key, d.version, d.sealed, d.key_id, d.archived_at::text FROM {schema}.document d \
                 WHERE d.policy IS NOT DISTINCT FROM $1 AND d.order_key = ANY ($2) AND d.sent_at IS NULL ORDER BY d.order_key"
            ),
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })
}

fn of_orders(rows: &[Row]) -> Result<Vec<String>> {
    let mut orders: Vec<String> = rows.iter().map(|r| r.string(0)).collect::<Result<_>>()?;
    orders.dedup();
    Ok(orders)
}

fn columns<'a>(policy: &'a str, rows: &[&'a Row]) -> Result<Vec<Arg<'a>>> {
    let text = |i: usize| -> Result<Arg<'a>> {
        Ok(Arg::Texts(
            rows.iter().map(|r| r.str(i).map(Some)).collect::<Result<_>>()?,
        ))
    };
    Ok(vec![
        Arg::Text(Some(policy)),
        text(0)?,
        text(1)?,
        text(2)?,
        Arg::Ints(rows.iter().map(|r| r.int(3)).collect::<Result<_>>()?),
        Arg::ByteArrays(rows.iter().map(|r| r.bytes(4)).collect::<Result<_>>()?),
        text(5)?,
    ])
}

fn insert(foreign: &Foreign, policy: &str, rows: &[&Row]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut args = columns(policy, rows)?;
    args.push(Arg::Texts(
        rows.iter().map(|r| r.str(6).map(Some)).collect::<Result<_>>()?,
    ));
    on(foreign, || {
        sql::execute(
            &format!(
                "INSERT INTO {foreign} (policy, order_key, table_name, record_key, version, sealed, key_id, archived_at) \
                 SELECT $1, o, t, r, v, s, k, a::timestamptz FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), \
                 pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8)) AS n (o, t, r, v, s, k, a)"
            ),
            &args,
        )
    })?;
    Ok(())
}

/// Where a document of ours has the place of another one there, which must have been sent from a copy of this database, or was
/// changed there: what we have of that record is sealed anew behind all that there is, in its order. Whether there was any.
fn move_on(place: &Place, keys: &MasterKeys, policy: &str, ours: &[Row], theirs: &Cold) -> Result<bool> {
    let mut records: BTreeMap<(String, String, String), Vec<&Row>> = BTreeMap::new();
    for row in ours {
        let (order, table, record, _) = spot(row)?;
        records.entry((order, table, record)).or_default().push(row);
    }
    let mut any = false;
    for ((order, table, record), mut mine) in records {
        mine.sort_by_key(|row| row.int(3).unwrap_or(0));
        let mut newest = mine.last().map_or(Ok(0), |row| row.int(3))?;
        let mut differs = false;
        for other in theirs.of(&order) {
            if other.str(1)? != table || other.str(2)? != record {
                continue;
            }
            newest = newest.max(other.int(3)?);
            for row in &mine {
                differs |= row.int(3)? == other.int(3)?
                    && (other.bytes(4)? != row.bytes(4)? || other.str(5)? != row.str(5)?);
            }
        }
        if differs {
            any = true;
            behind(place, keys, policy, [&order, &table, &record], &mine, newest)?;
        }
    }
    Ok(any)
}

/// Seals the documents of a record anew, with the versions after the newest.
fn behind(
    place: &Place,
    keys: &MasterKeys,
    policy: &str,
    [order, table, record]: [&str; 3],
    documents: &[&Row],
    newest: i64,
) -> Result<()> {
    let schema: &Ident = &place.schema;
    let known = unwrap_keys(place, keys, policy, order)?;
    let mut moved = Vec::new();
    for (row, version) in documents.iter().zip(newest + 1..) {
        let key_id = row.str(5)?;
        let binding = Binding {
            policy,
            order_key: order,
            table,
            record_key: record,
            version: row.int(3)?,
            key_id,
        };
        let plain = known
            .key(key_id)
            .and_then(|key| key.open(&binding, row.bytes(4).ok()?).ok())
            .ok_or_else(|| Error::damaged(format!("an archived document of a record of {table} cannot be opened")))?;
        moved.push(NewDocument {
            order_key: Cow::Borrowed(order),
            table: Cow::Borrowed(table),
            record_key: Cow::Borrowed(record),
            version,
            plain,
        });
    }
    on_keys(|| {
        sql::execute(
            &format!(
                "DELETE FROM {schema}.document d WHERE d.policy = $1 AND d.order_key = $2 AND d.table_name = $3 AND d.record_key = $4 \
                 AND d.version = ANY ($5)"
            ),
            &[
                Arg::Text(Some(policy)),
                Arg::Text(Some(order)),
                Arg::Text(Some(table)),
                Arg::Text(Some(record)),
                Arg::Ints(documents.iter().map(|row| row.int(3)).collect::<Result<_>>()?),
            ],
        )
    })?;
    store(
        schema,
        keys,
        policy,
        &HashMap::from([(order.to_owned(), known)]),
        &moved,
    )
}

/// What was destroyed here is deleted there: the documents under keys up to a number, of an order or of one record.
fn delete(place: &Place, foreign: &Foreign, policy: &str, orders: &[&str]) -> Result<()> {
    let schema: &Ident = &place.schema;
    // Not locked: whoever destroys something meanwhile waits for nobody. What is noted then is not what is read here.
    let rows = doomed(place, policy, orders)?.0;
    if rows.is_empty() {
        return Ok(());
    }
    // Whole orders together, by the number of their keys; records one by one.
    let mut whole: HashMap<i64, Vec<&str>> = HashMap::new();
    for row in &rows {
        let keys: Vec<String> = (1..=row.int(3)?).map(|k| k.to_string()).collect();
        if row.str(1)?.is_empty() {
            whole.entry(row.int(3)?).or_default().push(row.str(0)?);
            continue;
        }
        on(foreign, || {
            sql::execute(
                &format!(
                    "DELETE FROM {foreign} d WHERE d.policy = $1 AND d.order_key = ANY ($2) AND d.key_id = ANY ($3) AND d.table_name = ANY ($4) \
                     AND d.record_key = ANY ($5)"
                ),
                // Arrays: of two columns that equal the same constant the planner makes one thing that postgres_fdw does not send.
                &[
                    Arg::Text(Some(policy)),
                    Arg::texts(&[row.str(0)?]),
                    Arg::texts(&keys),
                    Arg::texts(&[row.str(1)?]),
                    Arg::texts(&[row.str(2)?]),
                ],
            )
        })?;
    }
    for (upto, orders) in whole {
        let keys: Vec<String> = (1..=upto).map(|k| k.to_string()).collect();
        on(foreign, || {
            sql::execute(
                &format!(
                    "DELETE FROM {foreign} d WHERE d.policy = $1 AND d.order_key = ANY ($2) AND d.key_id = ANY ($3)"
                ),
                &[Arg::Text(Some(policy)), Arg::texts(&orders), Arg::texts(&keys)],
            )
        })?;
    }
    let text = |i: usize| -> Result<Arg<'_>> {
        Ok(Arg::Texts(
            rows.iter().map(|r| r.str(i).map(Some)).collect::<Result<_>>()?,
        ))
    };
    on_keys(|| {
        sql::execute(
            &format!(
                "DELETE FROM {schema}.doomed d USING ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5)) \
                    AS n (o, t, r, k) \
                 WHERE d.policy = $1 AND d.order_key = n.o AND d.table_name = n.t AND d.record_key = n.r AND d.key_upto = n.k"
            ),
            &[
                Arg::Text(Some(policy)),
                text(0)?,
                text(1)?,
                text(2)?,
                Arg::Ints(rows.iter().map(|r| r.int(3)).collect::<Result<_>>()?),
            ],
        )
    })?;
    Ok(())
}
