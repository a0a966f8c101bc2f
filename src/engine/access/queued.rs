//! Orders that come back by themselves where the archive is a foreign table. The trigger only notes them: no INSERT of the shop's waits for
//! a cold server. The next cycle retrieves them, each in a transaction of its own, before it archives anything.

use super::Order;
use super::automatic::{came_back, entry, found, may_retrieve, reason};
use super::restore::write_fetched;
use crate::domain::clock::backoff;
use crate::domain::vault::MasterKeys;
use crate::engine::audit::{self, AuditEntry, By, Line};
use crate::engine::plan::Plan;
use crate::engine::quota;
use crate::engine::reconcile;
use crate::engine::state;
use crate::engine::vault::Cold;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys, user_has_role};
use crate::pg::sql::{self, Arg};

/// Orders whose documents are fetched together.
const TOGETHER: i64 = 50;

/// Seconds until an order is looked at again of which somebody had a row locked.
const BRIEFLY: i64 = 5;

/// An order that waits.
pub struct Queued {
    pub id: i64,
    pub order_key: String,
    /// By which it is to come back.
    entry: String,
    by: By,
    attempts: u32,
    last_error: Option<String>,
}

/// What becomes of one.
enum Fate {
    Retrieve(Order),
    /// Its personal data is in its rows already.
    Nothing,
    /// Not any more: the action in the audit log, and why.
    Dropped(&'static str, &'static str),
}

/// Notes orders, in the transaction of the INSERT. A cycle begins when that commits.
pub(super) fn note(plan: &Plan, alias: &str, orders: &[Order]) -> Result<()> {
    let by = By::role();
    on_keys(|| {
        sql::execute(
            "INSERT INTO amazon_pii.retrieval_queue (policy, order_key, entry, inserted_by, actor) \
             SELECT $1, n.k, $3, $4, $5 FROM pg_catalog.unnest($2) AS n (k) \
             WHERE NOT EXISTS (SELECT FROM amazon_pii.retrieval_queue q WHERE q.order_key = n.k AND q.policy = $1)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Texts(orders.iter().map(|o| Some(o.key.as_str())).collect()),
                Arg::Text(Some(alias)),
                Arg::Text(Some(&by.user)),
                Arg::Text(by.actor.as_deref()),
            ],
        )
    })?;
    crate::worker::wake();
    Ok(())
}

/// The next that are due, after the one with this number.
///
/// # Errors
/// Errors of the server.
pub fn next(plan: &Plan, after: i64) -> Result<Vec<Queued>> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT q.queue_id, q.order_key, q.entry, q.inserted_by, q.actor, q.attempts, q.last_error FROM amazon_pii.retrieval_queue q \
             WHERE q.policy = $1 AND q.queue_id > $2 AND q.next_attempt_at <= pg_catalog.now() ORDER BY q.queue_id LIMIT $3",
            &[Arg::Text(Some(&plan.policy)), Arg::Int(after), Arg::Int(TOGETHER)],
        )
    })?;
    rows.iter()
        .map(|row| {
            Ok(Queued {
                id: row.int(0)?,
                order_key: row.string(1)?,
                entry: row.string(2)?,
                by: By {
                    user: row.string(3)?,
                    actor: row.owned(4)?,
                },
                attempts: u32::try_from(row.int(5)?).unwrap_or(u32::MAX),
                last_error: row.owned(6)?,
            })
        })
        .collect()
}

/// Retrieves one, with what a cold server has of it. Its entry in the audit log is committed before anything is opened.
///
/// # Errors
/// As `amazon_pii.retrieve()`; nothing has changed then.
pub fn retrieve(plan: &Plan, keys: &MasterKeys, queued: &Queued, cold: &Cold) -> Result<()> {
    let fate = fate(plan, queued)?;
    // Whoever else inserted something for it meanwhile wanted the same.
    let taken = on_keys(|| {
        sql::execute(
            "DELETE FROM amazon_pii.retrieval_queue q WHERE q.order_key = $2 AND q.policy = $1",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(&queued.order_key))],
        )
    })?;
    if taken == 0 {
        return Ok(());
    }
    let reason = reason(&queued.entry);
    match fate {
        Fate::Nothing => Ok(()),
        Fate::Dropped(action, why) => audit::insert_under(Some(keys), &[about(plan, action, queued, why)?]),
        Fate::Retrieve(order) => {
            reconcile::refuse_before(&plan.policy)?;
            let order = std::slice::from_ref(&order);
            let number = order[0].number.as_deref().unwrap_or_default();
            let recorded = entry(plan, "retrieve", queued.by.clone(), order, &reason, "")?;
            quota::pass(plan, vec![recorded], true)?;
            write_fetched(plan, keys, order, cold, number)?;
            let keys = came_back(plan, &queued.by, order, &reason)?;
            state::announce_keys(&plan.policy, "retrieved", &keys)
        }
    }
}

/// Locks the order's state, and looks whether it is still to come back.
fn fate(plan: &Plan, queued: &Queued) -> Result<Fate> {
    const DROPPED: &str = "retrieve_dropped";
    let rows = on_keys(|| {
        sql::write(
            "SELECT o.status, o.purged_at IS NOT NULL, COALESCE(o.asked IN ('erase', 'forget', 'revived'), false) FROM amazon_pii.order_state o \
             WHERE o.order_key = $2 AND o.policy = $1 FOR UPDATE",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(&queued.order_key))],
        )
    })?;
    let Some(row) = rows.first() else {
        return Ok(Fate::Dropped(DROPPED, "the order is not tracked any more"));
    };
    if row.str(0)? == "gone" {
        return Ok(Fate::Dropped(DROPPED, "the order was deleted"));
    }
    if row.bool(1)? {
        return Ok(Fate::Dropped(DROPPED, "its archived personal data no longer exists"));
    }
    if row.str(0)? != "redacted" {
        return Ok(Fate::Nothing);
    }
    if row.bool(2)? {
        return Ok(Fate::Dropped(DROPPED, "it is to be erased or forgotten"));
    }
    let retrieves = |e: &crate::engine::plan::Entry| e.alias == queued.entry && e.retrieve_on_insert.is_some();
    if !plan.entries.iter().any(retrieves) {
        return Ok(Fate::Dropped(DROPPED, "the policy does not say so any more"));
    }
    if !may_retrieve(plan, |role| user_has_role(&queued.by.user, role)) {
        return Ok(Fate::Dropped("retrieve_refused", "the inserting role may not retrieve"));
    }
    let order = found(plan, std::slice::from_ref(&queued.order_key), true)?
        .into_iter()
        .next();
    Ok(order.map_or(Fate::Nothing, Fate::Retrieve))
}

/// An entry about an order that does not come back, in the name of the inserting role.
fn about(plan: &Plan, action: &str, queued: &Queued, detail: &str) -> Result<AuditEntry> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT o.order_number FROM amazon_pii.order_state o WHERE o.order_key = $2 AND o.policy = $1",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(&queued.order_key))],
        )
    })?;
    let line = Line {
        order_key: queued.order_key.clone(),
        order_number: rows.first().map(|r| r.owned(0)).transpose()?.flatten(),
        detail: detail.to_owned(),
    };
    let mut about = entry(plan, action, queued.by.clone(), &[], &reason(&queued.entry), "")?;
    about.lines = vec![line];
    Ok(about)
}

/// One that could not be retrieved: its error, and a growing wait, one day at most. The audit log says so when it is another error than
/// the last time.
///
/// # Errors
/// Errors of the server.
pub fn fail(plan: &Plan, keys: &MasterKeys, queued: &Queued, error: &Error) -> Result<()> {
    if error.is_lock() {
        return put_off(plan, queued, BRIEFLY);
    }
    let stored = error.stored();
    if queued.last_error.as_deref() != Some(&stored) {
        audit::insert_under(Some(keys), &[about(plan, "retrieve_failed", queued, &stored)?])?;
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.retrieval_queue q SET attempts = q.attempts + 1, last_error = $3 WHERE q.order_key = $2 AND q.policy = $1",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&queued.order_key)),
                Arg::Text(Some(&stored)),
            ],
        )
    })?;
    put_off(plan, queued, backoff(queued.attempts + 1).num_seconds())
}

fn put_off(plan: &Plan, queued: &Queued, seconds: i64) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.retrieval_queue q SET next_attempt_at = pg_catalog.now() + pg_catalog.make_interval(secs => $3::float8) \
             WHERE q.order_key = $2 AND q.policy = $1",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&queued.order_key)),
                Arg::Int(seconds),
            ],
        )
    })?;
    Ok(())
}

/// The cold server does not answer: all that are due wait for it, which is no fault of theirs.
///
/// # Errors
/// Errors of the server.
pub fn wait(policy: &str, error: &Error) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.retrieval_queue q SET last_error = $2 WHERE q.policy = $1 AND q.next_attempt_at <= pg_catalog.now() \
             AND q.last_error IS DISTINCT FROM $2",
            &[Arg::Text(Some(policy)), Arg::Text(Some(&error.stored()))],
        )
    })?;
    Ok(())
}

/// Why an order is to come back, since when, and what it waits for.
///
/// # Errors
/// Errors of the server.
pub fn explained(policy: &str, order: &str) -> Result<Vec<String>> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT q.entry, q.queued_at, q.last_error FROM amazon_pii.retrieval_queue q WHERE q.order_key = $2 AND q.policy = $1 \
             ORDER BY q.queue_id",
            &[Arg::Text(Some(policy)), Arg::Text(Some(order))],
        )
    })?;
    rows.iter()
        .map(|row| {
            let error = row.text(2)?.map(|e| format!("; {e}")).unwrap_or_default();
            Ok(format!("for entry {}, since {}{error}", row.str(0)?, row.str(1)?))
        })
        .collect()
}

/// None is to come back any more.
///
/// # Errors
/// Errors of the server.
pub fn forget(policy: &str) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.retrieval_queue q WHERE q.policy = $1",
            &[Arg::Text(Some(policy))],
        )
    })?;
    Ok(())
}
