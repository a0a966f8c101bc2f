//! A change of key is followed: our own states at once, in the trigger; the archive by the next cycle or access, since
//! a document is bound to the keys under which it was sealed and has to be opened and sealed anew.

use std::collections::{HashMap, HashSet};

use super::plan::{Entry, Plan, Table};
use super::records::RecordList;
use super::state;
use super::touched::orders_above;
use super::vault::{self, Cold};
use super::walk::{self, key_text};
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::ident::{self, Expr};
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
    let renames: HashMap<&str, &str> = old
        .iter()
        .map(String::as_str)
        .zip(new.iter().map(String::as_str))
        .collect();
    let mut users = if index == 0 {
        Vec::new()
    } else {
        let before = users(plan, index, call, "amazon_pii_old", |key| renames.contains_key(key))?;
        let now: HashSet<&str> = renames.values().copied().collect();
        let after = users(plan, index, call, "amazon_pii_new", |key| now.contains(key))?;
        before.into_iter().chain(after).collect()
    };
    let both = [Arg::texts(&old), Arg::texts(&new)];
    let [from, to] = &both;
    let policy = Arg::Text(Some(&plan.policy));
    let shown = Arg::Text(Some(&table.archived_as));
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.record_state r SET record_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE r.table_name = $1 AND r.record_key = n.old AND r.policy = $4",
            &[shown.clone(), from.clone(), to.clone(), policy.clone()],
        )?;
        sql::execute(
            "UPDATE amazon_pii.file_outbox f SET record_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE f.table_name = $1 AND f.record_key = n.old AND f.policy = $4",
            &[shown.clone(), from.clone(), to.clone(), policy.clone()],
        )?;
        if index > 0 {
            // No link leads from these orders to the row.
            let orphans = sql::write(
                "UPDATE amazon_pii.orphan r SET record_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
                 WHERE r.table_name = $1 AND r.record_key = n.old AND r.policy = $4 RETURNING r.order_key",
                &[shown.clone(), from.clone(), to.clone(), policy.clone()],
            )?;
            for row in &orphans {
                users.push(row.string(0)?);
            }
            return relist(
                plan,
                index,
                &renames,
                &users.iter().map(String::as_str).collect::<Vec<_>>(),
            );
        }
        let args = [policy.clone(), from.clone(), to.clone()];
        let moved = sql::execute(
            "UPDATE amazon_pii.order_state o SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE o.policy = $1 AND o.order_key = n.old",
            &args,
        )?;
        if moved == 0 {
            return Ok(());
        }
        for statement in [
            "UPDATE amazon_pii.record_state r SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE r.policy = $1 AND r.order_key = n.old",
            "UPDATE amazon_pii.file_outbox f SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE f.policy = $1 AND f.order_key = n.old",
            "UPDATE amazon_pii.renamed r SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE r.policy = $1 AND r.order_key = n.old",
            "UPDATE amazon_pii.orphan r SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE r.policy = $1 AND r.order_key = n.old",
            "UPDATE amazon_pii.retrieval_queue r SET order_key = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE r.policy = $1 AND r.order_key = n.old",
            "UPDATE amazon_pii.order_state r SET follows = n.new FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (old, new) \
             WHERE r.policy = $1 AND r.follows = n.old",
        ] {
            sql::execute(statement, &args)?;
        }
        sql::execute(
            "INSERT INTO amazon_pii.renamed (policy, table_name, old_key, new_key) \
             SELECT $1, $2, o, n FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4)) AS k (o, n)",
            &[policy.clone(), shown.clone(), from.clone(), to.clone()],
        )?;
        relist(plan, index, &renames, &renames.values().copied().collect::<Vec<_>>())
    })
}

/// The orders that rows of a linked table lead to, by their live links: of those rows whose key is `wanted`.
fn users(
    plan: &Plan,
    index: usize,
    call: &TriggerCall,
    rows: &str,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<String>> {
    let table = &plan.tables[index];
    let width = table.key.len();
    let mut out = Vec::new();
    for (at, entry) in plan.entries.iter().enumerate().filter(|(_, e)| e.table == index) {
        let mut select = table.key_list();
        select.extend(walk::select_all(&entry.on_child));
        let query = format!("SELECT {} FROM {rows} AS {}", select.join(", "), table.relation.name);
        let found = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
            sql::in_trigger(call, &query, &[])
        })?;
        let direct = order_key_positions(plan, entry);
        let mut links = Vec::new();
        for row in &found {
            if !wanted(&key_text(&row.texts(0..width)?)?) {
                continue;
            }
            let link = row.texts(width..select.len())?;
            // The order's key may have changed with it, and its state not have followed yet.
            if let Some(positions) = &direct {
                out.push(key_text(
                    &positions.iter().map(|i| link[*i].clone()).collect::<Vec<_>>(),
                )?);
            }
            links.push((0, link));
        }
        for order in orders_above(plan, at, links)? {
            out.push(key_text(&order)?);
        }
    }
    out.sort();
    out.dedup();
    Ok(out)
}

/// Where an entry's link holds the parts of the order's key, if it holds them all.
fn order_key_positions(plan: &Plan, entry: &Entry) -> Option<Vec<usize>> {
    if plan.entries[entry.parent?].parent.is_some() {
        return None;
    }
    let key = plan.orders().key.iter();
    key.map(|(name, _)| entry.on_parent.iter().position(|e| *e == Expr::column(name.bare())))
        .collect()
}

/// Lets the lists of these orders follow. What became of their records is noted, for the archive to do.
fn relist(plan: &Plan, index: usize, renames: &HashMap<&str, &str>, orders: &[&str]) -> Result<()> {
    let table = &plan.tables[index].archived_as;
    let policy = Arg::Text(Some(&plan.policy));
    let rows = sql::write(
        "SELECT o.order_key, o.records FROM amazon_pii.order_state o WHERE o.policy = $1 AND o.order_key = ANY ($2) \
         AND o.records IS NOT NULL FOR UPDATE",
        &[policy.clone(), Arg::texts(orders)],
    )?;
    for row in &rows {
        let order = Arg::Text(row.text(0)?);
        let mut list = RecordList::parse(row.text(1)?)?;
        let renamed = list.rename(table, renames);
        // With an order's own key its documents move as a whole.
        for (old, new) in renamed.iter().filter(|_| index > 0) {
            sql::execute(
                "INSERT INTO amazon_pii.renamed (policy, table_name, old_key, new_key, order_key) VALUES ($1, $2, $3, $4, $5)",
                &[
                    policy.clone(),
                    Arg::Text(Some(table)),
                    Arg::Text(Some(old)),
                    Arg::Text(Some(new)),
                    order.clone(),
                ],
            )?;
        }
        sql::execute(
            "UPDATE amazon_pii.order_state SET records = $3 WHERE policy = $1 AND order_key = $2",
            &[policy.clone(), order, Arg::Text(list.text().as_deref())],
        )?;
    }
    Ok(())
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
    /// The order whose record it is; none where the order's own key changed.
    order: Option<String>,
}

/// Whether documents of these orders wait to be sealed anew under changed keys.
///
/// # Errors
/// Errors of the server.
pub fn is_pending(plan: &Plan, order_keys: &[String]) -> Result<bool> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT EXISTS (SELECT FROM amazon_pii.renamed n WHERE n.policy = $1 AND COALESCE(n.order_key, n.new_key) = ANY ($2))",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(order_keys)],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
}

/// The orders whose documents wait, under the keys that the archive knows, or will know before they are reached.
///
/// # Errors
/// Errors of the server.
pub fn pending(plan: &Plan) -> Result<Vec<String>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT DISTINCT COALESCE(n.order_key, n.old_key) FROM amazon_pii.renamed n WHERE n.policy = $1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// Seals the documents of changed keys anew. What a cold server has of the orders that [`pending`] names is in `cold`, except
/// of those that could not be read. In the caller's transaction: a document is under its old keys or under its
/// new ones, never under none. Returns the orders whose documents could not be moved, each with the reason: their notes
/// stay, and nobody else's wait for them.
///
/// # Errors
/// A cancel; errors of the server on our own tables.
pub fn settle(plan: &Plan, keys: &MasterKeys, cold: &Cold, unread: &HashSet<&str>) -> Result<Vec<(String, Error)>> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT renamed_id, table_name, old_key, new_key, order_key FROM amazon_pii.renamed WHERE policy = $1 \
             ORDER BY order_key IS NOT NULL, renamed_id FOR UPDATE",
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
                order: r.owned(4)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut failed = Vec::new();
    // Orders first: records are then looked up under the keys that their orders have now.
    for (at, note) in notes.iter().enumerate() {
        if unread.contains(note.order.as_deref().unwrap_or(&note.old)) {
            continue;
        }
        let moved = subtransaction(|| follow(plan, keys, &notes[at..], cold));
        match moved {
            Ok(()) => {
                // What kept it from being moved before is over. It is told when nobody has the order locked.
                let order = note.order.as_deref().unwrap_or(&note.new);
                match subtransaction(|| state::untroubled(plan, order)) {
                    Err(e) if !e.is_lock() => return Err(e),
                    _ => {}
                }
            }
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) => failed.push((
                note.order.clone().unwrap_or_else(|| last_key(&notes[at..]).to_owned()),
                e,
            )),
        }
    }
    Ok(failed)
}

/// Follows the first of these notes.
fn follow(plan: &Plan, keys: &MasterKeys, notes: &[Note], cold: &Cold) -> Result<()> {
    let Some(note) = notes.first() else { return Ok(()) };
    let mut renames = vault::Renames {
        order: None,
        record: Some((&note.table, &note.old, &note.new)),
    };
    let order = note.order.as_ref().unwrap_or(&note.old);
    if note.order.is_none() {
        renames.order = Some((&note.old, &note.new));
    }
    vault::reseal(&plan.archive, keys, &plan.policy, order, &renames, cold)?;
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.renamed WHERE renamed_id = $1",
            &[Arg::Int(note.id)],
        )
    })?;
    Ok(())
}

/// The key that the order of the first note has in the end.
fn last_key(notes: &[Note]) -> &str {
    let Some(first) = notes.first() else { return "" };
    notes[1..]
        .iter()
        .filter(|n| n.order.is_none())
        .fold(&first.new, |key, n| if n.old == *key { &n.new } else { key })
}
