//! Orders that come back by themselves: a return or a credit was inserted for one that is redacted. The insert succeeds
//! whatever becomes of this. Where the archive is a foreign table it only notes the orders, see [`queued`].

use super::{Order, history, queued, state_retrieved, write_back};
use crate::engine::audit::{self, AuditEntry, By, Line};
use crate::engine::news;
use crate::engine::plan::Plan;
use crate::engine::quota;
use crate::engine::reconcile;
use crate::engine::records::RecordList;
use crate::engine::triggers::orders_of_rows;
use crate::engine::walk;
use crate::pg::error::Result;
use crate::pg::ident::Expr;
use crate::pg::identity::{self, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::TriggerCall;
use crate::pg::xact;

/// The longest reason, in characters.
const LONGEST: usize = 50;

/// Retrieves the redacted orders that rows of an INSERT belong to.
///
/// # Errors
/// A cancel only.
pub fn inserted(plan: &Plan, table: usize, call: &TriggerCall) -> Result<()> {
    for (index, entry) in plan.entries.iter().enumerate().filter(|(_, e)| e.table == table) {
        let Some(condition) = &entry.retrieve_on_insert else {
            continue;
        };
        let reason = reason(&entry.alias);
        let mut wanted = Vec::new();
        let done = subtransaction(|| {
            wanted = redacted_above(plan, index, condition.as_ref(), call)?;
            if wanted.is_empty() {
                return Ok(true);
            }
            if !may_retrieve(plan, identity::has_role) {
                return Ok(false);
            }
            if plan.archive.foreign.is_some() {
                queued::note(plan, &entry.alias, &wanted)?;
            } else {
                retrieve(plan, &wanted, &reason)?;
            }
            Ok(true)
        });
        match done {
            Ok(true) => {}
            Err(e) if e.is_cancel() => return Err(e),
            Ok(false) => {
                pgrx::notice!(
                    "{} redacted orders were not retrieved: role \"{}\" is neither an amazon_pii_operator nor named in \"retrieve_for\" of policy \"{}\"",
                    wanted.len(),
                    By::role().user,
                    plan.policy
                );
                told(
                    plan,
                    "retrieve_refused",
                    &wanted,
                    &reason,
                    "the inserting role may not retrieve",
                );
            }
            Err(e) => {
                pgrx::warning!(
                    "{} redacted orders could not be retrieved: {} (policy \"{}\"); amazon_pii.retrieve() tries again",
                    wanted.len(),
                    e.stored(),
                    plan.policy
                );
                told(plan, "retrieve_failed", &wanted, &reason, &e.stored());
            }
        }
    }
    Ok(())
}

/// The redacted orders above the new rows, each once. They are not locked yet.
fn redacted_above(plan: &Plan, index: usize, condition: Option<&Expr>, call: &TriggerCall) -> Result<Vec<Order>> {
    let keys = orders_of_rows(plan, index, call, "amazon_pii_new", condition)?
        .iter()
        .map(|k| walk::key_text(k))
        .collect::<Result<Vec<_>>>()?;
    found(plan, &keys, false)
}

/// Those of some orders that are redacted, and locked if so asked.
pub(super) fn found(plan: &Plan, keys: &[String], lock: bool) -> Result<Vec<Order>> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let query = [
        "SELECT order_key, status, archived_at IS NOT NULL, redacted_version, false, order_number, records FROM amazon_pii.order_state \
         WHERE policy IS NOT DISTINCT FROM $1 AND order_key = ANY ($2) AND status = 'redacted' AND purged_at IS NULL \
           AND (asked IN ('erase', 'forget', 'revived')) IS NOT TRUE ORDER BY order_key",
        if lock { " FOR UPDATE" } else { "" },
    ]
    .concat();
    let rows = on_keys(|| sql::write(&query, &[Arg::Text(Some(&plan.policy)), Arg::texts(keys)]))?;
    rows.iter()
        .map(|row| {
            Ok(Order {
                key: row.string(0)?,
                status: row.string(1)?,
                stored: row.string(1)?,
                ending: false,
                archived: row.bool(2)?,
                redacted_version: row.text(3)?.and_then(|v| v.parse().ok()),
                held: row.bool(4)?,
                archive_held: false,
                number: row.owned(5)?,
                records: RecordList::parse(row.text(6)?)?,
            })
        })
        .collect()
}

/// What stands in the log as the reason.
pub(super) fn reason(alias: &str) -> String {
    format!("automatic: {alias}").chars().take(LONGEST).collect()
}

/// Whether who has these roles may have orders written back.
pub(super) fn may_retrieve(plan: &Plan, has: impl FnMut(&str) -> bool) -> bool {
    let named = plan.document.retrieve_for.iter().map(String::as_str);
    std::iter::once("amazon_pii_operator").chain(named).any(has)
}

fn retrieve(plan: &Plan, wanted: &[Order], reason: &str) -> Result<()> {
    let keys: Vec<String> = wanted.iter().map(|o| o.key.clone()).collect();
    // What somebody else has just retrieved is done.
    let orders = found(plan, &keys, true)?;
    if orders.is_empty() {
        return Ok(());
    }
    reconcile::refuse_before(&plan.policy)?;
    // The other process needs none of the locks that this transaction has: it only adds a line to the log, and counts.
    quota::pass(
        plan,
        vec![entry(plan, "retrieve", By::role(), &orders, reason, "")?],
        true,
    )?;
    write_back(plan, &orders, "")?;
    let keys = came_back(plan, &By::session(), &orders, reason)?;
    // Announced by the next cycle: a trigger must not NOTIFY.
    news::note(&plan.policy, "retrieved", &keys)
}

/// Orders whose personal data is in their rows again: a line each in the shop's history, and their state. Returns their keys.
pub(super) fn came_back(plan: &Plan, by: &By, orders: &[Order], reason: &str) -> Result<Vec<String>> {
    let keys: Vec<String> = orders.iter().map(|o| o.key.clone()).collect();
    if let Some(history) = &plan.history {
        // Each has a number of its own; what is deferred is looked at once for all.
        xact::fire_deferred()?;
        for (order, key) in orders.iter().zip(&keys) {
            let number = order.number.as_deref().unwrap_or_default();
            let key = std::slice::from_ref(key);
            history::lines(plan, history, by, "retrieve", key, (number, Some(reason)))?;
        }
        xact::defer_again()?;
    }
    state_retrieved(plan, &keys)?;
    Ok(keys)
}

/// One entry for all of them, in the name of the inserting role.
pub(super) fn entry(
    plan: &Plan,
    action: &str,
    by: By,
    orders: &[Order],
    reason: &str,
    detail: &str,
) -> Result<AuditEntry> {
    let mut entry = AuditEntry {
        user: by.user,
        actor: by.actor,
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        reason: Some(reason.to_owned()),
        ..AuditEntry::new(action)?
    };
    let lines = orders.iter().map(|o| Line {
        order_key: o.key.clone(),
        order_number: o.number.clone(),
        detail: detail.to_owned(),
    });
    entry.lines = lines.collect();
    Ok(entry)
}

/// What did not happen is in the log too, if the insert is.
fn told(plan: &Plan, action: &str, orders: &[Order], reason: &str, detail: &str) {
    if orders.is_empty() {
        return;
    }
    let logged = subtransaction(|| audit::insert(&[entry(plan, action, By::role(), orders, reason, detail)?]));
    if logged.is_err() {
        pgrx::warning!("amazon_pii could not note in the audit log that orders were not retrieved");
    }
}
