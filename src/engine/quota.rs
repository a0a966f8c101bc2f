//! How many orders somebody has had opened today, and what is unusual about it. The process that records accesses counts
//! them, in the transaction of their entries: no rollback of the caller's reaches the count, and of two calls for the last free
//! place one is refused.

use serde::{Deserialize, Serialize};

use super::audit::{self, AuditEntry};
use super::plan::Plan;
use super::state;
use crate::domain::quota::{self, Count, Decision, Limits, Refusal, Unusual, Who};
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::{guc, keys, xact};
use crate::worker::evidence;

/// Days after which counts are forgotten.
const KEPT: i64 = 30;

/// The longest name that is counted as it is, in bytes: names are part of a key.
const LONGEST_NAME: usize = 200;

/// Orders of one policy that one call is about to open, with an entry for each, or one for all.
#[derive(Debug, Serialize, Deserialize)]
pub struct Access {
    entries: Vec<AuditEntry>,
    limits: Limits,
    /// Which day it is where the policy is.
    day: String,
    /// A statement of the shop's brings them back: it is not to fail.
    automatic: bool,
}

/// What became of an access.
pub struct Recorded {
    /// It must not happen.
    pub refused: Option<Refusal>,
    /// Lines for the server's log.
    pub alarms: Vec<String>,
}

/// Refuses a call without an actor, where the policy wants one.
///
/// # Errors
/// There is none.
pub fn require_actor(plan: &Plan) -> Result<()> {
    if plan.document.require_actor && guc::actor().is_none() {
        return Err(Error::no_actor(&plan.policy));
    }
    Ok(())
}

/// Has an access recorded and counted for good, before anything is opened.
///
/// # Errors
/// Over the quota, which is on record, too; it could not be recorded.
pub fn pass(plan: &Plan, entries: Vec<AuditEntry>, automatic: bool) -> Result<()> {
    let zone = plan.document.timezone.parse();
    let zone: chrono_tz::Tz = zone.map_err(|_| Error::internal("a time zone is not known"))?;
    let today = quota::day(zone, xact::now()?);
    let access = Access {
        entries,
        limits: plan.document.limits,
        day: today.to_string(),
        automatic,
    };
    match evidence::access(&access)? {
        None => Ok(()),
        Some(refusal) => {
            let again = quota::next_day(zone, today).with_timezone(&zone);
            Err(over(plan, &refusal, &again.format("%Y-%m-%d %H:%M:%S %Z").to_string()))
        }
    }
}

fn over(plan: &Plan, refusal: &Refusal, again: &str) -> Error {
    let (whose, key) = whose(refusal.who);
    Error::over_quota(&format!(
        "the quota of {} orders a day of this {whose} is used up",
        refusal.limit
    ))
        .detail(format!(
            "{} were retrieved or peeked at today, {} more were asked for.",
            refusal.had, refusal.asked
        ))
        .hint(format!(
            "It begins anew at {again}. \"{key}\" in policy \"{}\" says how many; an amazon_pii_admin can apply another number.",
            plan.policy
        ))
}

/// Whose quota it is, and the policy's key for it.
fn whose(who: Who) -> (&'static str, &'static str) {
    match who {
        Who::Person if guc::actor().is_some() => ("actor", "retrievals_per_day"),
        Who::Person => ("user", "retrievals_per_day"),
        Who::User => ("database user", "user_retrievals_per_day"),
    }
}

impl Access {
    /// Orders that it opens.
    fn orders(&self) -> i64 {
        self.entries.iter().map(|e| e.lines.len().max(1) as i64).sum()
    }

    fn numbers(&self) -> Vec<&str> {
        let lines = self.entries.iter().flat_map(|e| &e.lines);
        let of_lines = lines.filter_map(|l| l.order_number.as_deref());
        let own = self.entries.iter().filter_map(|e| e.order_number.as_deref());
        own.chain(of_lines).collect()
    }

    /// The counters that it belongs to, in the order in which they are locked.
    fn counters(&self, first: &AuditEntry) -> [(&'static str, String); 2] {
        let person = match first.actor.as_deref().map(str::trim).filter(|a| !a.is_empty()) {
            Some(actor) => ("actor", counted_as(actor)),
            None => ("user", counted_as(&first.user)),
        };
        [person, ("user_in_all", counted_as(&first.user))]
    }
}

/// A name as part of a key.
fn counted_as(name: &str) -> String {
    use sha2::{Digest, Sha256};
    if name.len() <= LONGEST_NAME {
        return name.to_owned();
    }
    Sha256::digest(name.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Counts an access and writes its entries, and those of alarms. Runs in the process that records, in a transaction of its own.
///
/// # Errors
/// Errors of the server; nothing is counted then.
pub fn record(access: &Access) -> Result<Recorded> {
    let Some(first) = access.entries.first() else {
        return Err(Error::internal("an access has no entry"));
    };
    let policy = first.policy.as_deref().unwrap_or_default();
    // Before any counter is locked: fetching them may run a command.
    let keys = keys::master_keys().ok();
    let decision = count(access, first, policy)?;
    let mut entries = access.entries.clone();
    if let Some(refusal) = &decision.refused {
        for entry in &mut entries {
            entry.action = [entry.action.as_str(), "_refused"].concat();
            entry.detail = Some(used_up(refusal));
        }
    }
    let action = &first.action;
    let mut alarms: Vec<AuditEntry> = canaries(policy, &access.numbers())?
        .into_iter()
        .map(|number| AuditEntry {
            order_number: Some(number),
            ..alarm(first, format!("canary order: {action}"))
        })
        .collect();
    alarms.extend(decision.unusual.iter().map(|unusual| alarm(first, words(unusual))));
    let told = alarms.iter().map(line).collect();
    if !alarms.is_empty() {
        // The same for every alarm: whoever may connect can listen, and is not told what a canary is.
        state::notify(&serde_json::json!({
            "policy": policy, "status": "alarm", "count": 0, "orders": [], "complete": true,
        }))?;
    }
    entries.extend(alarms);
    audit::insert_under(keys.as_ref(), &entries)?;
    Ok(Recorded {
        refused: decision.refused,
        alarms: told,
    })
}

/// An alarm in the name of whoever it is about.
fn alarm(about: &AuditEntry, detail: String) -> AuditEntry {
    AuditEntry {
        action: "alarm".to_owned(),
        detail: Some(detail),
        order_key: None,
        order_number: None,
        lines: Vec::new(),
        ..about.clone()
    }
}

fn words(unusual: &Unusual) -> String {
    match unusual {
        Unusual::Refused(refusal) => used_up(refusal),
        Unusual::Many {
            who: Who::Person,
            orders,
            usual,
        } => format!("{orders} orders today, more than {usual} are unusual"),
        Unusual::Many {
            who: Who::User,
            orders,
            usual,
        } => format!("{orders} orders of this database user today, more than {usual} are unusual"),
    }
}

fn used_up(refusal: &Refusal) -> String {
    let key = match refusal.who {
        Who::Person => "retrievals_per_day",
        Who::User => "user_retrievals_per_day",
    };
    format!(
        "{key} {}: {} before, {} more asked for",
        refusal.limit, refusal.had, refusal.asked
    )
}

/// An alarm's line in the server's log. What an application calls its user may hold anything, line feeds too.
fn line(alarm: &AuditEntry) -> String {
    let actor = alarm.actor.as_deref().map(|actor| {
        let short: String = actor.chars().take(60).collect();
        format!(", actor \"{}\"", short.escape_debug())
    });
    format!(
        "amazon_pii: alarm: policy \"{}\", user \"{}\"{}: {}",
        alarm.policy.as_deref().unwrap_or_default(),
        alarm.user,
        actor.unwrap_or_default(),
        alarm.detail.as_deref().unwrap_or_default()
    )
}

/// Counts an access for its person, and for its database user.
fn count(access: &Access, first: &AuditEntry, policy: &str) -> Result<Decision> {
    let today = &access.day;
    let counters = access.counters(first);
    let kinds = Arg::Texts(counters.iter().map(|c| Some(c.0)).collect());
    let names = Arg::Texts(counters.iter().map(|c| Some(c.1.as_str())).collect());
    let place = [Arg::Text(Some(policy)), Arg::Text(Some(today)), kinds, names];
    as_extension(|| {
        let new = sql::execute(
            "INSERT INTO amazon_pii.access_count (policy, day, counted_by, name) \
             SELECT $1, $2::date, c, n FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4)) AS k (c, n) \
             ON CONFLICT DO NOTHING",
            &place,
        )?;
        // Both, the person's first: nobody waits for somebody who waits for them.
        let rows = sql::write(
            "SELECT a.orders, a.automatic, a.refused FROM amazon_pii.access_count a \
              JOIN ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4)) WITH ORDINALITY AS k (c, n, i) ON a.counted_by = k.c AND a.name = k.n \
             WHERE a.policy = $1 AND a.day = $2::date ORDER BY k.i FOR UPDATE OF a",
            &place,
        )?;
        let count = |i: usize| -> Result<Count> {
            let row = rows.get(i).ok_or_else(|| Error::internal("a counter is missing"))?;
            Ok(Count {
                orders: row.int(0)?,
                automatic: row.int(1)?,
                refused: row.int(2)?,
            })
        };
        let decision = quota::decide(&access.limits, count(0)?, count(1)?, access.orders(), access.automatic);
        for ((kind, name), count) in counters.iter().zip([&decision.person, &decision.user]) {
            sql::execute(
                "UPDATE amazon_pii.access_count a SET orders = $5, automatic = $6, refused = $7 \
                 WHERE a.policy = $1 AND a.day = $2::date AND a.counted_by = $3 AND a.name = $4",
                &[
                    Arg::Text(Some(policy)),
                    Arg::Text(Some(today)),
                    Arg::Text(Some(kind)),
                    Arg::Text(Some(name)),
                    Arg::Int(count.orders),
                    Arg::Int(count.automatic),
                    Arg::Int(count.refused),
                ],
            )?;
        }
        if new > 0 {
            sql::execute(
                "DELETE FROM amazon_pii.access_count a USING (SELECT o.policy, o.day, o.counted_by, o.name FROM amazon_pii.access_count o \
                    WHERE o.policy = $1 AND o.day < $2::date - $3::int FOR UPDATE SKIP LOCKED) AS o \
                 WHERE a.policy = o.policy AND a.day = o.day AND a.counted_by = o.counted_by AND a.name = o.name",
                &[Arg::Text(Some(policy)), Arg::Text(Some(today)), Arg::Int(KEPT)],
            )?;
        }
        Ok(decision)
    })
}

/// Which of these numbers are those of canaries.
fn canaries(policy: &str, numbers: &[&str]) -> Result<Vec<String>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT c.order_number FROM amazon_pii.canary c WHERE c.policy = $1 AND c.order_number = ANY ($2) ORDER BY 1",
            &[Arg::Text(Some(policy)), Arg::texts(numbers)],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}
