//! What people may ask for before its time: that an order is redacted at once, that its archive is destroyed, or both.

use std::collections::HashSet;

use super::access::{Order, Target, checked, entry, resolve_locked};
use super::audit;
use super::history;
use super::plan::Plan;
use super::purge::{self, Note};
use super::rekey;
use super::replacement;
use super::state;
use super::tombstone::When;
use super::vault::Cold;
use crate::domain::tombstone::What;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role};
use crate::pg::keys;
use crate::pg::sql::{self, Arg};

/// What an order is asked to come to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    Erase,
    Forget,
}

impl Ask {
    fn word(self) -> &'static str {
        match self {
            Self::Erase => "erase",
            Self::Forget => "forget",
        }
    }
}

/// Makes an order due at once: the next cycle archives and redacts it.
///
/// # Errors
/// Unknown, ambiguous, held, deleted, bad reason.
pub fn erase(target: &Target<'_>, reason: Option<&str>) -> Result<()> {
    require_role(&["amazon_pii_admin"], "erase an order")?;
    let (plan, orders) = resolve_locked(target)?;
    let reason = checked(&plan, reason)?;
    for order in &orders {
        refuse_held(order, target.number)?;
        if order.stored == "gone" {
            return Err(Error::wrong_state(format!("order \"{}\" was deleted", target.number))
                .hint("amazon_pii.shred() destroys what is archived of it."));
        }
    }
    let all: Vec<&Order> = orders.iter().collect();
    mark(&plan, &all, Ask::Erase)?;
    tell(&plan, &all, "erase", target.number, reason.as_deref())
}

/// Destroys the archive of a redacted order.
///
/// # Errors
/// Unknown, ambiguous, not redacted, held, destroyed already, bad reason; the archive cannot be written.
pub fn shred(target: &Target<'_>, reason: Option<&str>) -> Result<()> {
    require_role(&["amazon_pii_admin"], "shred the archive of an order")?;
    let (plan, orders) = resolve_locked(target)?;
    let reason = checked(&plan, reason)?;
    for order in &orders {
        match order.status.as_str() {
            "redacted" | "gone" => {}
            "purged" => return Err(Error::purged(target.number)),
            _ => {
                return Err(
                    Error::wrong_state(format!("order \"{}\" is not redacted", target.number))
                        .hint("amazon_pii.forget() redacts an order and destroys its archive."),
                );
            }
        }
        refuse_archive_held(order, target.number)?;
    }
    let all: Vec<&Order> = orders.iter().collect();
    destroy(&plan, &all, What::Shredded)?;
    tell(&plan, &all, "shred", target.number, reason.as_deref())?;
    state::announce_keys(&plan.policy, "purged", &order_keys(&all))
}

/// Redacts an order and destroys its archive, now or, where there is something to redact, with the next cycle.
///
/// # Errors
/// Unknown, ambiguous, held, bad reason; the archive cannot be written.
pub fn forget(target: &Target<'_>, reason: Option<&str>) -> Result<()> {
    require_role(&["amazon_pii_admin"], "forget an order")?;
    let (plan, orders) = resolve_locked(target)?;
    let reason = checked(&plan, reason)?;
    for order in &orders {
        refuse_held(order, target.number)?;
        refuse_archive_held(order, target.number)?;
    }
    // There is nothing to be archived first: what an import has brought back since is redacted as it is.
    let (done, open): (Vec<&Order>, Vec<&Order>) = orders
        .iter()
        .partition(|o| matches!(o.stored.as_str(), "redacted" | "gone"));
    mark(&plan, &orders.iter().collect::<Vec<_>>(), Ask::Forget)?;
    destroy(&plan, &done, What::Forgotten)?;
    tell(&plan, &done, "forget", target.number, reason.as_deref())?;
    tell(&plan, &open, "forget", target.number, reason.as_deref())?;
    state::announce_keys(&plan.policy, "purged", &order_keys(&done))
}

fn refuse_held(order: &Order, number: &str) -> Result<()> {
    if order.held {
        return Err(Error::wrong_state(format!("order \"{number}\" is held"))
            .hint("End the hold with amazon_pii.release() first."));
    }
    Ok(())
}

fn refuse_archive_held(order: &Order, number: &str) -> Result<()> {
    if order.archive_held {
        return Err(Error::wrong_state(format!("the archive of order \"{number}\" is held"))
            .hint("End the hold with amazon_pii.release() first."));
    }
    Ok(())
}

fn order_keys(orders: &[&Order]) -> Vec<String> {
    orders.iter().map(|o| o.key.clone()).collect()
}

/// Due at once, whatever its clock, a push or a window say. One that was deleted and is to be forgotten stays known, in case it
/// is imported again.
fn mark(plan: &Plan, orders: &[&Order], ask: Ask) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET asked = CASE WHEN o.asked = 'forgotten' OR o.asked = 'revived' AND $3 = 'erase' THEN o.asked ELSE $3 END, \
                status = CASE WHEN status = 'flagged' THEN 'scheduled' WHEN status = 'gone' THEN 'redacted' ELSE status END, \
                archive_due_at = CASE WHEN archived_at IS NULL THEN LEAST(archive_due_at, pg_catalog.now()) ELSE archive_due_at END, \
                redact_due_at = CASE WHEN status IN ('redacted', 'gone') THEN redact_due_at ELSE LEAST(redact_due_at, pg_catalog.now()) END, \
                retrieved_until = CASE WHEN retrieved_until IS NOT NULL THEN LEAST(retrieved_until, pg_catalog.now()) END, \
                effective_at = CASE WHEN effective_at > pg_catalog.now() THEN pg_catalog.now() ELSE effective_at END, pushed_by = NULL, next_attempt_at = NULL, next_due_at = pg_catalog.now() \
             WHERE policy = $1 AND order_key = ANY ($2)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&order_keys(orders)),
                Arg::Text(Some(ask.word())),
            ],
        )
    })?;
    // What follows a retrieval ends with it.
    let retrieved = orders.iter().filter(|o| o.stored == "retrieved");
    let retrieved: Vec<String> = retrieved.map(|o| o.key.clone()).collect();
    if !retrieved.is_empty() {
        replacement::ended(plan, &retrieved)?;
    }
    if !plan.enabled {
        pgrx::notice!(
            "policy \"{}\" is disabled: nothing is redacted until it is enabled",
            plan.policy
        );
    }
    crate::worker::wake();
    Ok(())
}

/// Everything that is archived of these orders, also where a change of key is yet to be followed.
fn destroy(plan: &Plan, orders: &[&Order], what: What) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    let keys: Vec<&str> = orders.iter().map(|o| o.key.as_str()).collect();
    // What is damaged, or sealed under a master key that is lost, is destroyed where it lies.
    // Behind a foreign table both places are given up, without asking its server.
    if plan.archive.foreign.is_none()
        && let (true, Ok(master)) = (rekey::is_pending(plan, &order_keys(orders))?, keys::master_keys())
    {
        rekey::settle(plan, &master, &Cold::default(), &HashSet::new())?;
    }
    purge::destroy(
        plan,
        &keys,
        Some(Note {
            what,
            when: When::AtCommit,
            keys: None,
        }),
    )?;
    Ok(())
}

/// Recorded in the caller's own transaction: nothing is opened.
fn tell(plan: &Plan, orders: &[&Order], action: &str, number: &str, reason: Option<&str>) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    history::write(plan, action, &order_keys(orders), number, reason)?;
    let entries = orders
        .iter()
        .map(|o| entry(plan, action, o, number, reason))
        .collect::<Result<Vec<_>>>()?;
    audit::insert(&entries)?;
    state::announce_keys(&plan.policy, action, &order_keys(orders))
}
