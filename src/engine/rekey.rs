//! A change of key is followed: our own states at once, in the trigger; the archive by the next cycle or access, since
//! a document is bound to the keys under which it was sealed and has to be opened and sealed anew.

use super::plan::{Plan, Table};
use super::vault;
use super::walk::key_text;
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::ident;
use crate::pg::identity::{Identity, act_as, as_extension};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::TriggerCall;

/// Notices keys that an UPDATE changed, and moves the states of their orders and records.
///
/// # Errors
/// Errors of the server.
pub fn changed(plan: &Plan, index: usize, call: &TriggerCall) -> Result<()> {
    let table = &plan.tables[index];
    let (old, new) = pairs(plan, table, call)?;
    if old.is_empty() {
        return Ok(());
    }
    let shown = table.archived_as.clone();
    as_extension(|| {
        let mut moved = sql::execute(
            "UPDATE amazon_pii.record_state r SET record_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE r.table_name = $1 AND r.record_key = n.old AND r.policy = $4",
            &[
                Arg::Text(Some(&shown)),
                Arg::texts(&old),
                Arg::texts(&new),
                Arg::Text(Some(&plan.policy)),
            ],
        )?;
        if index == 0 {
            for statement in [
                "UPDATE amazon_pii.order_state o SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
                 WHERE o.policy = $1 AND o.order_key = n.old",
                "UPDATE amazon_pii.record_state r SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
                 WHERE r.policy = $1 AND r.order_key = n.old",
            ] {
                moved += sql::execute(
                    statement,
                    &[Arg::Text(Some(&plan.policy)), Arg::texts(&old), Arg::texts(&new)],
                )?;
            }
        }
        if moved > 0 {
            sql::execute(
                "INSERT INTO amazon_pii.renamed (policy, table_name, old_key, new_key, is_order) \
                 SELECT $1, $2, o, n, $5 FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4)) AS k (o, n)",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(&shown)),
                    Arg::texts(&old),
                    Arg::texts(&new),
                    Arg::Bool(index == 0),
                ],
            )?;
        }
        Ok(())
    })
}

/// Old and new keys of the rows whose key changed. Both transition tables list the statement's rows in one order.
fn pairs(plan: &Plan, table: &Table, call: &TriggerCall) -> Result<(Vec<String>, Vec<String>)> {
    let width = table.key.len();
    let list = |alias: &str| -> Vec<String> { table.key_list().iter().map(|k| format!("{alias}.{k}")).collect() };
    let (old, new) = (list("amazon_pii_a"), list("amazon_pii_b"));
    let differs: Vec<String> = old
        .iter()
        .zip(&new)
        .map(|(a, b)| format!("{} IS DISTINCT FROM {}", ident::out(a), ident::out(b)))
        .collect();
    let numbered = |from: &str, alias: &str| {
        format!(
            "(SELECT {}, pg_catalog.row_number() OVER () AS \"amazon_pii.n\" FROM {from}) AS {alias}",
            table.key_list().join(", ")
        )
    };
    let query = format!(
        "SELECT {}, {} FROM {} JOIN {} USING (\"amazon_pii.n\") WHERE {}",
        old.join(", "),
        new.join(", "),
        numbered("amazon_pii_old", "amazon_pii_a"),
        numbered("amazon_pii_new", "amazon_pii_b"),
        differs.join(" OR "),
    );
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::in_trigger(call, &query, &[])
    })?;
    let mut keys = (Vec::new(), Vec::new());
    for row in &rows {
        keys.0.push(key_text(&row.texts(0..width)?)?);
        keys.1.push(key_text(&row.texts(width..2 * width)?)?);
    }
    Ok(keys)
}

/// A change that the archive has yet to follow.
struct Note {
    id: i64,
    table: String,
    old: String,
    new: String,
    is_order: bool,
}

/// Seals the documents of changed keys anew. In the caller's transaction: a document is under its old keys or under its
/// new ones, never under none. Returns the orders whose documents could not be moved, each with the reason: their notes
/// stay, and nobody else's wait for them.
///
/// # Errors
/// A cancel; errors of the server on our own tables.
pub fn settle(plan: &Plan, keys: &MasterKeys) -> Result<Vec<(String, Error)>> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT renamed_id, table_name, old_key, new_key, is_order FROM amazon_pii.renamed WHERE policy = $1 \
             ORDER BY NOT is_order, renamed_id FOR UPDATE",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    let notes = rows
        .iter()
        .map(|r| {
            Ok(Note {
                id: r.int(0)?,
                table: r.string(1)?,
                old: r.string(2)?,
                new: r.string(3)?,
                is_order: r.bool(4)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut failed = Vec::new();
    // Orders first: records are then looked up under the keys that their orders have now.
    for (at, note) in notes.iter().enumerate() {
        let moved = subtransaction(|| follow(plan, keys, &notes[at..]));
        match moved {
            Ok(()) => {}
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if note.is_order => failed.push((last_key(&notes[at..]).to_owned(), e)),
            Err(e) => {
                let orders = users(plan, &note.table, last_key(&notes[at..]))?;
                failed.extend(orders.into_iter().map(|order| (order, e.clone())));
            }
        }
    }
    Ok(failed)
}

/// Follows the first of these notes.
fn follow(plan: &Plan, keys: &MasterKeys, notes: &[Note]) -> Result<()> {
    let Some(note) = notes.first() else { return Ok(()) };
    let mut renames = vault::Renames {
        order: None,
        record: Some((&note.table, &note.old, &note.new)),
    };
    let orders = if note.is_order {
        renames.order = Some((&note.old, &note.new));
        vec![note.old.clone()]
    } else {
        users(plan, &note.table, last_key(notes))?
    };
    for order in orders {
        vault::reseal(&plan.archive_schema, keys, &plan.policy, &order, &renames)?;
    }
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.renamed WHERE renamed_id = $1",
            &[Arg::Int(note.id)],
        )
    })?;
    Ok(())
}

/// The key that the record of the first note has in the end.
fn last_key(notes: &[Note]) -> &str {
    let Some(first) = notes.first() else { return "" };
    notes[1..]
        .iter()
        .filter(|n| n.is_order == first.is_order && n.table == first.table)
        .fold(&first.new, |key, n| if n.old == *key { &n.new } else { key })
}

/// The orders that list a record.
fn users(plan: &Plan, table: &str, record_key: &str) -> Result<Vec<String>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT order_key FROM amazon_pii.record_state WHERE policy = $1 AND table_name = $2 AND record_key = $3",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(table)),
                Arg::Text(Some(record_key)),
            ],
        )
    })?;
    if rows.len() > 100_000 {
        return Err(Error::unsupported(format!(
            "too many orders share the record of {table} whose key changed"
        )));
    }
    rows.iter().map(|r| r.string(0)).collect()
}
