//! People and their reasons: retrieve, peek, end a retrieval, hold, release, unflag.

mod automatic;
mod hold;
pub mod queued;
mod restore;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use super::audit::AuditEntry;
use super::files;
use super::history;
use super::plan::Plan;
use super::quota;
use super::reconcile;
use super::records::RecordList;
use super::rekey;
use super::replacement;
use super::scrub;
use super::state;
use super::sweep;
use super::vault::{self, Cold, OrderArchive};
use crate::domain::reason;
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{as_extension, require_role};
use crate::pg::sql::{self, Arg};
use crate::pg::{keys, xact};
pub use automatic::inserted;
pub use hold::{hold, release};
pub use restore::Restored;
use restore::{marks, write_back};

/// Which order is meant; a number may stand for several of one policy.
pub struct Target<'a> {
    pub number: &'a str,
    pub policy: Option<&'a str>,
    pub key: Option<&'a str>,
}

/// An order that a call means.
pub(super) struct Order {
    pub(super) key: String,
    /// As the view `orders` shows it.
    pub(super) status: String,
    /// As it is stored: one that was purged is redacted, or gone.
    pub(super) stored: String,
    archived: bool,
    redacted_version: Option<i64>,
    pub(super) held: bool,
    pub(super) archive_held: bool,
    /// It is to be redacted at once.
    ending: bool,
    number: Option<String>,
    records: RecordList,
}

/// Whether the orders that a number stands for are locked until the transaction ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lock {
    /// They are about to change.
    Taken,
    /// They are only looked at, which a read-only transaction may do.
    None,
}

/// Finds the orders that bear a number.
fn resolve(target: &Target<'_>, lock: Lock) -> Result<(Rc<Plan>, Vec<Order>)> {
    const FOUND: &str = "SELECT policy, order_key, CASE WHEN purged_at IS NOT NULL AND status IN ('redacted', 'gone') THEN 'purged' \
            ELSE status END, archived_at IS NOT NULL, redacted_version, \
            held_until IS NOT NULL AND held_until > pg_catalog.now(), status, COALESCE(asked IN ('erase', 'forget', 'revived'), false), records, \
            COALESCE(archive_held_until > pg_catalog.now() OR status = 'gone' AND held_until > pg_catalog.now(), false) \
         FROM amazon_pii.order_state \
         WHERE order_number = $1 AND ($2::text IS NULL OR policy = $2) AND ($3::text IS NULL OR order_key = $3) \
         ORDER BY policy, order_key";
    let rows = as_extension(|| {
        sql::write(
            &match lock {
                Lock::Taken => format!("{FOUND} FOR UPDATE"),
                Lock::None => FOUND.to_owned(),
            },
            &[
                Arg::Text(Some(target.number)),
                Arg::Text(target.policy),
                Arg::Text(target.key),
            ],
        )
    })?;
    let mut by_policy: BTreeMap<String, Vec<Order>> = BTreeMap::new();
    for row in &rows {
        by_policy.entry(row.string(0)?).or_default().push(Order {
            key: row.string(1)?,
            status: row.string(2)?,
            archived: row.bool(3)?,
            redacted_version: row.text(4)?.and_then(|v| v.parse().ok()),
            held: row.bool(5)?,
            archive_held: row.bool(9)?,
            stored: row.string(6)?,
            ending: row.bool(7)?,
            number: Some(target.number.to_owned()),
            records: RecordList::parse(row.text(8)?)?,
        });
    }
    if by_policy.len() > 1 {
        return Err(Error::ambiguous_order(
            target.number,
            &by_policy.into_keys().collect::<Vec<_>>(),
        ));
    }
    let (policy, orders) = by_policy
        .into_iter()
        .next()
        .ok_or_else(|| Error::unknown_order(target.number))?;
    Ok((Plan::current(&policy)?, orders))
}

/// The orders that bear a number, locked until the transaction ends.
///
/// # Errors
/// Unknown, ambiguous.
pub(super) fn resolve_locked(target: &Target<'_>) -> Result<(Rc<Plan>, Vec<Order>)> {
    resolve(target, Lock::Taken)
}

/// The orders that bear a number, to be looked at.
///
/// # Errors
/// Unknown, ambiguous.
pub(super) fn resolve_only(target: &Target<'_>) -> Result<(Rc<Plan>, Vec<Order>)> {
    resolve(target, Lock::None)
}

/// A reason as it is stored, or why it cannot be; and whether it is known who asks.
pub(super) fn checked(plan: &Plan, given: Option<&str>) -> Result<Option<String>> {
    quota::require_actor(plan)?;
    reason::check(given, plan.document.reason)
        .map(|r| Some(r).filter(|r| !r.is_empty()))
        .map_err(|e| Error::invalid(e.to_string()).hint(e.hint()))
}

pub(super) fn entry(
    plan: &Plan,
    action: &str,
    order: &Order,
    number: &str,
    reason: Option<&str>,
) -> Result<AuditEntry> {
    Ok(AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        order_key: Some(order.key.clone()),
        order_number: Some(number.to_owned()),
        reason: reason.map(str::to_owned),
        ..AuditEntry::new(action)?
    })
}

/// Lets the archive follow changes of keys first; fails when it cannot for one of these orders.
fn follow_keys(plan: &Plan, master: &MasterKeys, orders: &[Order]) -> Result<()> {
    if let Some(foreign) = &plan.archive.foreign {
        let keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
        if !rekey::is_pending(plan, &keys)? {
            return Ok(());
        }
        // What this transaction sees of that server may be old; a cycle looks anew.
        crate::worker::wake();
        return Err(Error::wrong_state(format!(
            "a key changed, and the archive in {} has yet to follow",
            foreign.shown()
        ))
        .hint("Try again after the next cycle."));
    }
    let failed = rekey::settle(plan, master, &Cold::default(), &HashSet::new())?;
    match failed.into_iter().find(|(key, _)| orders.iter().any(|o| o.key == *key)) {
        Some((_, error)) => Err(error),
        None => Ok(()),
    }
}

/// Makes sure that everything was read that orders list. What a transaction sees of a cold server stays what it was when it asked first,
/// while a cycle may have sent there since what was here.
fn complete(plan: &Plan, orders: &[Order], archive: &HashMap<String, OrderArchive>, number: &str) -> Result<()> {
    if plan.archive.foreign.is_none() {
        return Ok(());
    }
    let keys: Vec<&str> = orders.iter().map(|o| o.key.as_str()).collect();
    // Of one whose archive was destroyed before, the list may name what nobody has any more.
    let whole = as_extension(|| {
        sql::read(
            "SELECT o.order_key, o.records FROM amazon_pii.order_state o WHERE o.policy = $1 AND o.order_key = ANY ($2) AND o.key_generation IS NULL",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )
    })?;
    for row in &whole {
        let known = archive.get(row.str(0)?);
        for listed in RecordList::parse(row.text(1)?)?.iter().filter(|l| l.3 > 0) {
            let newest = known.and_then(|a| a.record(&listed.0, &listed.1));
            if newest.is_none_or(|n| n.version < listed.3) {
                return Err(Error::archive(format!(
                    "not all archived documents of order \"{number}\" are to be seen in this transaction"
                ))
                .hint("Nothing was changed. Try again in a new transaction; amazon_pii.verify() says whether documents are lost."));
            }
        }
    }
    Ok(())
}

/// Records and counts an access in a transaction of another process, before anything is opened. Refused while the archive may be one that
/// a restore brought back.
fn witness(plan: &Plan, action: &str, orders: &[Order], number: &str, reason: Option<&str>) -> Result<()> {
    reconcile::refuse_before(&plan.policy)?;
    let entries = orders.iter().map(|order| entry(plan, action, order, number, reason));
    quota::pass(plan, entries.collect::<Result<_>>()?, false)
}

/// Writes the archived PII of a redacted order back, for `retrieved_for`.
///
/// # Errors
/// Unknown, ambiguous, not redacted, already retrieved, purged, bad reason, no actor, over the quota, no evidence worker, archive
/// unreachable or damaged: nothing is written then.
pub fn retrieve(target: &Target<'_>, reason: Option<&str>) -> Result<Vec<Restored>> {
    require_role(&["amazon_pii_operator"], "retrieve the personal data of an order")?;
    let (plan, orders) = resolve(target, Lock::Taken)?;
    let reason = checked(&plan, reason)?;
    for order in &orders {
        match order.status.as_str() {
            "redacted" => {}
            "retrieved" => return Err(Error::already_retrieved(target.number)),
            "purged" => return Err(Error::purged(target.number)),
            _ => {
                return Err(
                    Error::wrong_state(format!("order \"{}\" is not redacted", target.number))
                        .hint("Its personal data is still in its tables."),
                );
            }
        }
    }
    witness(&plan, "retrieve", &orders, target.number, reason.as_deref())?;
    let restored = write_back(&plan, &orders, target.number)?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    history::write(&plan, "retrieve", &order_keys, target.number, reason.as_deref())?;
    state_retrieved(&plan, &order_keys)?;
    state::announce_keys(&plan.policy, "retrieved", &order_keys)?;
    Ok(restored)
}

/// Orders whose personal data is back in their rows, for `retrieved_for`.
fn state_retrieved(plan: &Plan, orders: &[String]) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state SET status = 'retrieved', retrieved_at = pg_catalog.now(), \
                retrieved_until = pg_catalog.now() + $3::interval, next_due_at = pg_catalog.now() + $3::interval, \
                next_attempt_at = NULL, last_error = NULL \
             WHERE policy = $1 AND order_key = ANY ($2)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(orders),
                Arg::Text(Some(&plan.document.retrieved_for)),
            ],
        )
    })?;
    Ok(())
}

/// Gives the archived PII of an order to the caller alone.
///
/// # Errors
/// As [`retrieve`], and when nothing is archived yet.
pub fn peek(target: &Target<'_>, reason: Option<&str>) -> Result<serde_json::Value> {
    require_role(&["amazon_pii_operator"], "read the personal data of an order")?;
    let (plan, orders) = resolve(target, Lock::None)?;
    let reason = checked(&plan, reason)?;
    for order in &orders {
        if order.status == "purged" {
            return Err(Error::purged(target.number));
        }
        if !order.archived {
            return Err(
                Error::wrong_state(format!("order \"{}\" is not archived yet", target.number))
                    .hint("Its personal data is still in its tables."),
            );
        }
    }
    witness(&plan, "peek", &orders, target.number, reason.as_deref())?;
    let master = keys::master_keys()?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    if rekey::is_pending(&plan, &order_keys)? {
        if xact::is_read_only() {
            return Err(Error::read_only_transaction(&format!(
                "a key of order \"{}\" changed and the archive has yet to follow, which",
                target.number
            ))
            .hint("Try again after the next cycle, or in a transaction that may write."));
        }
        unchanged(target, &order_keys, Lock::Taken)?;
        follow_keys(&plan, &master, &orders)?;
    }
    let cold = vault::fetch(&plan.archive, &plan.policy, &order_keys)?;
    let archive = vault::open(&plan.archive, &master, &plan.policy, &order_keys, &cold)?;
    if archive.values().all(|a| !a.keyless) {
        complete(&plan, &orders, &archive, target.number)?;
    }
    // Nothing is locked: documents that followed a change of keys meanwhile were not among those that were read.
    unchanged(target, &order_keys, Lock::None)?;
    let mut out = Vec::new();
    for order in &orders {
        let mut records = Vec::new();
        if let Some(archive) = archive.get(&order.key) {
            if archive.is_empty() && archive.keyless {
                return Err(Error::purged(target.number));
            }
            if archive.is_damaged() {
                return Err(Error::damaged(format!(
                    "an archived document of order \"{}\" cannot be opened",
                    target.number
                ))
                .hint("Restore the archive's row from a backup."));
            }
            for (table, key, newest) in archive.records() {
                let marks = marks(&plan);
                let index = plan.tables.iter().position(|t| t.archived_as == table);
                let full = |name: &str| {
                    let index = index?;
                    let column = plan.tables[index].cells.iter().find(|c| c.archived_as == name)?;
                    scrub::restored(&plan, index, column, newest, archive).map(|(_, full)| full)
                };
                let cells: serde_json::Map<String, serde_json::Value> = newest
                    .cells()
                    .map(|cell| {
                        let whole = full(cell.name).or_else(|| newest.whole(cell.name, &marks));
                        (shown(&plan, table, cell.name), serde_json::Value::from(whole))
                    })
                    .collect();
                records.push(serde_json::json!({ "table": table, "record_key": key, "cells": cells }));
            }
        }
        // Never archived: the policy said so.
        for listed in order.records.iter().filter(|l| l.3 == 0) {
            records.push(serde_json::json!({ "table": listed.0, "record_key": listed.1, "archived": false }));
        }
        out.push(serde_json::json!({ "policy": plan.policy, "order_key": order.key, "records": records }));
    }
    Ok(serde_json::Value::Array(out))
}

/// What a column is called now, or in the archive where it is none of the policy's any more.
fn shown(plan: &Plan, table: &str, archived: &str) -> String {
    let table = plan.tables.iter().find(|t| t.archived_as == table);
    let cell = table.and_then(|t| t.cells.iter().find(|c| c.archived_as == archived));
    cell.map_or(archived, |c| c.name.bare()).to_owned()
}

/// Makes sure that the number still stands for the orders whose access was recorded.
fn unchanged(target: &Target<'_>, order_keys: &[String], lock: Lock) -> Result<()> {
    let (_, now) = resolve(target, lock)?;
    if now.iter().map(|o| &o.key).eq(order_keys) {
        return Ok(());
    }
    Err(Error::wrong_state(format!("order \"{}\" changed while it was being read", target.number)).hint("Try again."))
}

/// Ends a retrieval early: due at once, done by the next cycle.
///
/// # Errors
/// Unknown, ambiguous, not retrieved.
pub fn end_retrieval(target: &Target<'_>) -> Result<()> {
    require_role(&["amazon_pii_operator"], "end a retrieval")?;
    change(
        target,
        None,
        "end_retrieval",
        |order| order.status == "retrieved",
        ("is not retrieved", "amazon_pii.explain_order() shows where it stands."),
        |plan, orders| {
            as_extension(|| {
                sql::execute(
                    "UPDATE amazon_pii.order_state SET retrieved_until = pg_catalog.now(), next_due_at = pg_catalog.now(), next_attempt_at = NULL \
                 WHERE policy = $1 AND order_key = ANY ($2)",
                    &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
                )
            })?;
            replacement::ended(plan, orders)?;
            crate::worker::wake();
            Ok(())
        },
    )
}

/// Writes back for good and stops tracking: for the victims of a wrong policy. The archive stays.
///
/// # Errors
/// As [`retrieve`].
pub fn unflag(target: &Target<'_>, reason: Option<&str>) -> Result<Vec<Restored>> {
    require_role(&["amazon_pii_admin"], "unflag an order")?;
    let (plan, orders) = resolve(target, Lock::Taken)?;
    let reason = checked(&plan, reason)?;
    if orders.iter().any(|o| o.status == "purged") {
        return Err(Error::purged(target.number));
    }
    witness(&plan, "unflag", &orders, target.number, reason.as_deref())?;
    let restored = write_back(&plan, &orders, target.number)?;
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    history::write(&plan, "unflag", &order_keys, target.number, reason.as_deref())?;
    as_extension(|| {
        for table in ["record_state", "orphan", "retrieval_queue", "order_state"] {
            sql::execute(
                &format!(
                    "DELETE FROM amazon_pii.{} WHERE policy = $1 AND order_key = ANY ($2)",
                    Ident::new(table)
                ),
                &[Arg::Text(Some(&plan.policy)), Arg::texts(&order_keys)],
            )?;
        }
        Ok(())
    })?;
    files::forget(&plan.policy, &order_keys)?;
    sweep::forget_sums(&plan.policy)?;
    state::announce_keys(&plan.policy, "unflagged", &order_keys)?;
    Ok(restored)
}

/// A change of state that opens nothing: recorded in the caller's own transaction.
fn change(
    target: &Target<'_>,
    reason: Option<Option<&str>>,
    action: &str,
    fits: impl Fn(&Order) -> bool,
    otherwise: (&str, &str),
    apply: impl FnOnce(&Plan, &[String]) -> Result<()>,
) -> Result<()> {
    let (plan, orders) = resolve(target, Lock::Taken)?;
    let takes_reason = reason.is_some();
    let reason = match reason {
        Some(given) => checked(&plan, given)?,
        None => {
            quota::require_actor(&plan)?;
            None
        }
    };
    if !orders.iter().all(fits) {
        return Err(Error::wrong_state(format!("order \"{}\" {}", target.number, otherwise.0)).hint(otherwise.1));
    }
    let order_keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    apply(&plan, &order_keys)?;
    if takes_reason {
        history::write(&plan, action, &order_keys, target.number, reason.as_deref())?;
    }
    let entries = orders
        .iter()
        .map(|o| entry(&plan, action, o, target.number, reason.as_deref()))
        .collect::<Result<Vec<_>>>()?;
    super::audit::insert(&entries)?;
    state::announce_keys(&plan.policy, action, &order_keys)
}
