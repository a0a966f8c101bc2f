//! The end of `audit_for`: the first entries of a chain go, and a checkpoint stands for them.

use super::end::{Checkpoint, Found, Head};
use super::{Link, links, lock, policy_of};
use crate::domain::vault::MasterKeys;
use crate::engine::audit::{self, AuditEntry};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::trigger::EngineWrite;

/// Where a policy does not say; and where there is no policy.
pub const DEFAULT: &str = "10 years";

/// Removes the next entries of a chain that are past their time, in a transaction of its own. Whether there may be more. Nothing is
/// removed but what is what was sealed: a changed time would otherwise be a way to get rid of an entry.
///
/// # Errors
/// An entry, or an end of the chain, is not what was sealed; a master key is not configured.
pub fn step(keys: &MasterKeys, chain: &str) -> Result<bool> {
    if !lock()?.try_take()? {
        return Ok(false);
    }
    let horizon = horizon(chain)?;
    let missing = |id: &str| {
        Error::no_key(format!(
            "entries of the audit log that are past audit_for are proven by master key {id}, which is not configured"
        ))
    };
    let changed = |what: &str| {
        Error::damaged_log(format!(
            "nothing of the audit log of policy \"{chain}\" is removed when audit_for is over: {what}"
        ))
    };
    let end = match Head::find(keys, chain)? {
        Found::Sound(head) => head.position,
        // The sealer has a word for it.
        Found::Missing | Found::Changed => return Ok(false),
        Found::NoKey(id, _) => return Err(missing(&id)),
    };
    let (from, start, removed) = match Checkpoint::find(keys, chain)? {
        Found::Sound(c) => (c.position, c.code, c.entries),
        Found::Missing => (0, Vec::new(), 0),
        Found::Changed => return Err(changed("its checkpoint was changed")),
        Found::NoKey(id, _) => return Err(missing(&id)),
    };
    let (mut position, mut code) = (from, start);
    let page = links(chain, position, Some(&horizon))?;
    let count = page.len();
    let mut old: Vec<Link> = Vec::new();
    for link in page {
        if !link.old || link.position > end {
            break;
        }
        if link.position != position + 1 {
            return Err(changed(&format!("link {} is missing", position + 1)));
        }
        match link.holds(keys, chain, &code) {
            Some(true) => {}
            Some(false) => return Err(changed(&format!("link {} does not hold", link.position))),
            None => return Err(missing(&link.key_id)),
        }
        position = link.position;
        code.clone_from(&link.code);
        old.push(link);
    }
    let more = !old.is_empty() && old.len() == count;
    if !old.is_empty() {
        let removed = removed + old.len() as i64;
        remove(chain, position, &old)?;
        let newest = old
            .iter()
            .rev()
            .find_map(|l| l.entry.as_ref())
            .map(|e| e.at().to_owned());
        Checkpoint::write(keys, chain, position, &code, removed, newest)?;
        audit::insert_under(
            Some(keys),
            &[AuditEntry {
                policy: policy_of(chain),
                detail: Some(format!(
                    "audit_for is over: {} entries, up to link {position}",
                    old.len()
                )),
                ..AuditEntry::new("trim_audit_log")?
            }],
        )?;
    }
    if !more {
        on_keys(|| {
            sql::execute(
                "UPDATE amazon_pii.audit_chain SET next_trim_at = pg_catalog.now() + '1 day'::interval WHERE chain = $1",
                &[Arg::Text(Some(chain))],
            )
        })?;
    }
    Ok(more)
}

fn remove(chain: &str, upto: i64, old: &[Link]) -> Result<()> {
    let ids: Vec<i64> = old.iter().map(|l| l.audit_id).collect();
    on_keys(|| {
        let tables = sql::read(
            "SELECT 'amazon_pii.audit_entry'::pg_catalog.regclass::pg_catalog.oid, 'amazon_pii.audit_link'::pg_catalog.regclass::pg_catalog.oid",
            &[],
        )?;
        let tables = tables.first().ok_or_else(|| Error::internal("no row"))?;
        let _ours = EngineWrite::begin(&[tables.oid(0)?, tables.oid(1)?]);
        sql::execute(
            "DELETE FROM amazon_pii.audit_entry WHERE audit_id = ANY ($1)",
            &[Arg::Ints(ids)],
        )?;
        sql::execute(
            "DELETE FROM amazon_pii.audit_link WHERE chain = $1 AND position <= $2",
            &[Arg::Text(Some(chain)), Arg::Int(upto)],
        )?;
        Ok(())
    })
}

/// Before this moment entries of a chain are past their time. Those without a policy, or of one that was dropped, are kept for as
/// long as those of any policy.
fn horizon(chain: &str) -> Result<String> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.now() - COALESCE(pg_catalog.max(COALESCE( \
                (p.document::pg_catalog.jsonb OPERATOR(pg_catalog.->>) 'audit_for'), $2)::interval), $2::interval) \
             FROM amazon_pii.policy AS p WHERE p.policy = $1 OR NOT EXISTS (SELECT FROM amazon_pii.policy AS q WHERE q.policy = $1)",
            &[Arg::Text(Some(chain)), Arg::Text(Some(DEFAULT))],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
}

/// Amazon wants the log of a year, from whatever month's beginning on.
///
/// # Errors
/// It is shorter.
pub fn kept_long_enough(audit_for: &str) -> Result<()> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.bool_and(m.t + $1::interval >= m.t + '12 months'::interval) FROM pg_catalog.generate_series( \
                '2026-01-01'::timestamp, '2029-12-01'::timestamp, '1 month'::interval) AS m (t)",
            &[Arg::Text(Some(audit_for))],
        )
    })?;
    if rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)? {
        return Ok(());
    }
    Err(Error::invalid("audit_for: shorter than 12 months")
        .hint("Amazon wants the audit log of 12 months at least: write \"1 year\", or more."))
}
