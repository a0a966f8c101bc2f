//! Orders that are deleted: the rows that they led to are remembered while their links can still be read, and stay due.

use std::collections::HashMap;

use super::gather::{self, Start};
use super::news;
use super::plan::Plan;
use super::records::{Listed, RecordList};
use super::scrub;
use super::state::policy_each;
use super::triggers::transition_keys;
use super::walk::{self, Values, key_parts, key_text};
use crate::pg::error::Result;
use crate::pg::ident::Ident;
use crate::pg::identity::{Identity, act_as, as_extension, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::trigger::TriggerCall;

/// Nothing of the order is left to be done.
const NOT_NEEDED: &str = "o.status <> 'gone' AND o.asked IS NULL AND NOT EXISTS (SELECT FROM amazon_pii.records r \
    WHERE r.policy = o.policy AND r.order_key = o.order_key AND r.status IN ('remembered', 'archived', 'waiting', 'retrieved') AND r.entry <> '') \
    AND NOT EXISTS (SELECT FROM amazon_pii.orphan n WHERE n.policy = o.policy AND n.order_key = o.order_key \
        AND (n.record_key IS NULL OR n.apart = 'due'))";

/// What [`news::NOTE`] needs of such a statement.
const GONE: &str = " RETURNING o.order_key, 'gone' AS news) ";

/// Orders whose rows may hold personal data that nothing else remembers: one that is redacted holds none unless it was just
/// written to.
const OPEN: &str = "o.status <> 'gone' AND (o.redacted_version IS NULL OR o.status <> 'redacted' OR o.next_due_at <= pg_catalog.now())";

/// Orders whose links are followed together.
const STEP: usize = 1000;

/// Orders that were deleted; one whose records are elsewhere and not done goes on until they are.
///
/// # Errors
/// Errors of the server or of the owners' expressions.
pub fn deleted(plan: &Plan, call: &TriggerCall) -> Result<()> {
    let keys = transition_keys(plan, plan.orders(), call, "amazon_pii_old AS new_or_old", "true")?;
    let tracked = on_keys(|| {
        let rows = sql::read(
            &format!(
                "SELECT o.order_key, {OPEN} FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) \
                 AND o.status <> 'gone'"
            ),
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )?;
        rows.iter()
            .map(|r| Ok((r.string(0)?, r.bool(1)?)))
            .collect::<Result<Vec<_>>>()
    })?;
    if tracked.is_empty() {
        return Ok(());
    }
    let open: HashMap<&str, usize> = tracked
        .iter()
        .filter(|(_, open)| *open)
        .enumerate()
        .map(|(i, (key, _))| (key.as_str(), i))
        .collect();
    if !open.is_empty() {
        follow_old(plan, call, &open)?;
    }
    let all: Vec<&str> = tracked.iter().map(|(key, _)| key.as_str()).collect();
    as_extension(|| {
        sql::execute(
            &[
                "WITH changed AS (UPDATE amazon_pii.order_state o SET status = 'gone', next_due_at = NULL, \
                    redact_due_at = COALESCE(o.redact_due_at, pg_catalog.now()) \
                    WHERE o.policy = $1 AND o.order_key = ANY ($2) AND ",
                NOT_NEEDED,
                GONE,
                news::NOTE,
            ]
            .concat(),
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&all)],
        )?;
        // One that is still needed and has no deadline gets the one that counts from its deletion: nobody will dispatch it
        // any more.
        sql::execute(
            "UPDATE amazon_pii.order_state o SET status = 'scheduled', anchor_at = pg_catalog.now(), \
                archive_due_at = GREATEST(pg_catalog.now() + $3::interval, effective_at), \
                redact_due_at = GREATEST(pg_catalog.now() + $4::interval, effective_at), \
                next_due_at = GREATEST(pg_catalog.now() + $3::interval, effective_at) \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) AND o.redact_due_at IS NULL AND o.status = 'flagged'",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&all),
                Arg::Text(Some(&plan.document.archive_after)),
                Arg::Text(Some(&plan.document.redact_after)),
            ],
        )
    })?;
    Ok(())
}

/// Follows the links of the deleted rows themselves. What a foreign key takes along is gone by now.
fn follow_old(plan: &Plan, call: &TriggerCall, open: &HashMap<&str, usize>) -> Result<()> {
    let orders = plan.orders();
    let mut select = orders.key_list();
    let width = select.len();
    let mut ranges = Vec::new();
    for (index, entry) in plan.entries.iter().enumerate().filter(|(_, e)| e.parent == Some(0)) {
        let from = select.len();
        select.extend(walk::select_all(&entry.on_parent));
        ranges.push((index, from..select.len()));
    }
    if ranges.is_empty() {
        return Ok(());
    }
    let name: &Ident = &orders.relation.name;
    let query = format!("SELECT {} FROM amazon_pii_old AS {name}", select.join(", "));
    let rows = act_as(Identity::Owner(orders.owner), &plan.search_path, &[], || {
        sql::in_trigger(call, &query, &[])
    })?;
    let mut found = Vec::new();
    for row in &rows {
        let key = key_text(&row.texts(0..width)?)?;
        if open.contains_key(key.as_str()) {
            let links = ranges
                .iter()
                .map(|(entry, range)| Ok((*entry, row.texts(range.clone())?)));
            found.push((key, links.collect::<Result<Vec<_>>>()?));
        }
    }
    for part in found.chunks(STEP) {
        remember(plan, part)?;
    }
    Ok(())
}

/// A table was emptied: of its rows only what bears their keys can still be found. A single partition may have been truncated:
/// the next sweep says which orders are left.
///
/// # Errors
/// Errors of the server or of the owners' expressions.
pub fn truncated(plan: &Plan) -> Result<()> {
    let by_key: Vec<(usize, Vec<usize>)> = (0..plan.entries.len())
        .filter_map(|entry| Some((entry, plan.key_link(entry)?)))
        .collect();
    if !by_key.is_empty() {
        follow_keys(plan, &by_key)?;
    }
    as_extension(|| {
        sql::execute(
            &[
                "WITH changed AS (UPDATE amazon_pii.order_state o SET status = 'gone', next_due_at = NULL, \
                    redact_due_at = COALESCE(o.redact_due_at, pg_catalog.now()) WHERE o.policy = $1 AND ",
                NOT_NEEDED,
                GONE,
                news::NOTE,
            ]
            .concat(),
            &[Arg::Text(Some(&plan.policy))],
        )?;
        sql::execute(
            "UPDATE amazon_pii.policy SET swept_at = NULL, sweep_started_at = NULL, sweep_after = NULL WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    Ok(())
}

fn follow_keys(plan: &Plan, by_key: &[(usize, Vec<usize>)]) -> Result<()> {
    let mut after = String::new();
    loop {
        let rows = on_keys(|| {
            sql::read(
                // Whether one without a clock is there still is not known here.
                &format!(
                    "SELECT o.order_key FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key > $2 \
                     AND {OPEN} AND o.redact_due_at IS NOT NULL ORDER BY o.order_key LIMIT $3"
                ),
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(&after)),
                    Arg::Int(i64::try_from(STEP).unwrap_or(i64::MAX)),
                ],
            )
        })?;
        let Some(last) = rows.last() else { return Ok(()) };
        after = last.string(0)?;
        let orders = rows
            .iter()
            .map(|r| {
                let parts = key_parts(r.str(0)?)?;
                let links = by_key.iter().map(|(entry, positions)| {
                    let link = positions.iter().map(|p| parts.get(*p).cloned().flatten()).collect();
                    (*entry, link)
                });
                Ok((r.string(0)?, links.collect()))
            })
            .collect::<Result<Vec<_>>>()?;
        remember(plan, &orders)?;
    }
}

/// Lists what these orders lead to and what holds personal data.
fn remember(plan: &Plan, orders: &[(String, Vec<(usize, Values)>)]) -> Result<()> {
    let links = orders.iter().enumerate();
    let links = links.flat_map(|(i, (_, links))| links.iter().map(move |(entry, link)| (i, *entry, link.clone())));
    let mut found = gather::reach(plan, orders.len(), Start::Links(links.collect()))?;
    let order_keys: Vec<&str> = orders.iter().map(|(key, _)| key.as_str()).collect();
    scrub::fill(plan, &mut found.records, &HashMap::new(), &order_keys);
    let mut lists: HashMap<&str, Vec<Listed>> = HashMap::new();
    for record in &found.records {
        // One that cannot be treated fails when it is due, and is shown then.
        if record.pii(plan).is_ok_and(|pii| pii.is_empty()) {
            continue;
        }
        lists.entry(&orders[record.order].0).or_default().push(Listed(
            plan.tables[record.table].archived_as.clone(),
            record.key_text.clone(),
            plan.entries[record.entry].alias.clone(),
            0,
        ));
    }
    if lists.is_empty() {
        return Ok(());
    }
    let keys: Vec<&str> = lists.keys().copied().collect();
    let known = on_keys(|| {
        sql::write(
            "SELECT o.order_key, o.records, o.redacted_version IS NOT NULL FROM amazon_pii.order_state o \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) FOR UPDATE",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )
    })?;
    let (mut orders, mut texts) = (Vec::new(), Vec::new());
    // (order, table, key) of what came back to orders that were redacted.
    let mut back: [Vec<String>; 3] = Default::default();
    for row in &known {
        let order = row.str(0)?;
        let mut list = RecordList::parse(row.text(1)?)?;
        for listed in lists.remove(order).unwrap_or_default() {
            if row.bool(2)? {
                back[0].push(order.to_owned());
                back[1].push(listed.0.clone());
                back[2].push(listed.1.clone());
            }
            if !list.lists(&listed.0, &listed.1) {
                list.put(listed);
            }
        }
        orders.push(order);
        texts.push(list.text());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET records = n.r \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (p, k, r) \
             WHERE o.policy = n.p AND o.order_key = n.k",
            &[
                policy_each(plan, orders.len()),
                Arg::texts(&orders),
                Arg::opt_texts(&texts),
            ],
        )?;
        sql::execute(
            "INSERT INTO amazon_pii.record_state (policy, order_key, table_name, record_key, status) \
             SELECT p, o, t, k, 'archived' FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), \
                pg_catalog.unnest($4)) AS n (p, o, t, k) ON CONFLICT DO NOTHING",
            &[
                policy_each(plan, back[0].len()),
                Arg::texts(&back[0]),
                Arg::texts(&back[1]),
                Arg::texts(&back[2]),
            ],
        )
    })?;
    Ok(())
}
