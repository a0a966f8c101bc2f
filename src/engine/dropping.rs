//! The end of a policy: what is left of it stays, and what it has not redacted yet stays for ever.

use super::apply::missing;
use super::audit::{self, AuditEntry};
use super::trigger_ddl;
use crate::domain::policy::ReasonRule;
use crate::domain::reason;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role};
use crate::pg::invalidation;
use crate::pg::sql::{self, Arg};

/// Forgets a policy and its orders' states. The archive, its keys and the audit log stay. A reason is needed where something is
/// left to be redacted, or is held.
///
/// # Errors
/// It does not exist; the caller is no member of `amazon_pii_admin`; the reason is missing, or unusable.
pub fn drop(policy: &str, given: Option<&str>) -> Result<()> {
    require_role(&["amazon_pii_admin"], "drop a policy")?;
    let reason =
        reason::check(given, ReasonRule::Optional).map_err(|e| Error::invalid(e.to_string()).hint(e.hint()))?;
    let (version, left) = as_extension(|| {
        let known = sql::write(
            "SELECT version FROM amazon_pii.policy WHERE policy = $1 FOR UPDATE",
            &[Arg::Text(Some(policy))],
        )?;
        let version = known.first().ok_or_else(|| missing(policy))?.int(0)?;
        let left = left(policy)?;
        if let (Some(left), true) = (&left, reason.is_empty()) {
            return Err(
                Error::invalid(format!("a reason is required to drop policy \"{policy}\": {left}")).hint(
                    "Say in a few words why this may stay as it is: drop_policy('…', 'reason'). Or drop the policy when a cycle has done it.",
                ),
            );
        }
        for statement in [
            "DELETE FROM amazon_pii.policy WHERE policy = $1",
            "DELETE FROM amazon_pii.policy_table WHERE policy = $1",
            "DELETE FROM amazon_pii.policy_column WHERE policy = $1",
            "DELETE FROM amazon_pii.order_state WHERE policy = $1",
            "DELETE FROM amazon_pii.record_state WHERE policy = $1",
            "DELETE FROM amazon_pii.touched WHERE policy = $1",
            "DELETE FROM amazon_pii.orphan WHERE policy = $1",
            "DELETE FROM amazon_pii.news WHERE policy = $1",
            "DELETE FROM amazon_pii.retrieval_queue WHERE policy = $1",
            "DELETE FROM amazon_pii.sweep_slice WHERE policy = $1",
            "DELETE FROM amazon_pii.aged_table WHERE policy = $1",
            "DELETE FROM amazon_pii.aged_row WHERE policy = $1",
        ] {
            sql::execute(statement, &[Arg::Text(Some(policy))])?;
        }
        invalidation::announce_policy_change();
        Ok((version, left))
    })?;
    trigger_ddl::drop_all(policy)?;
    audit::insert(&[AuditEntry {
        policy: Some(policy.to_owned()),
        policy_version: Some(version),
        reason: Some(reason).filter(|r| !r.is_empty()),
        detail: left,
        ..AuditEntry::new("drop_policy")?
    }])
}

/// What nobody redacts, or holds, once a policy is gone, in words; nothing where it is done.
fn left(policy: &str) -> Result<Option<String>> {
    let rows = sql::read(
        "SELECT pg_catalog.count(*) FILTER (WHERE o.status NOT IN ('redacted', 'gone') OR o.status = 'redacted' AND o.next_due_at IS NOT NULL), \
                (SELECT pg_catalog.count(*) FROM amazon_pii.record_state AS r WHERE r.policy = $1 AND r.status = 'waiting'), \
                (SELECT pg_catalog.count(*) FROM amazon_pii.aged_table AS a WHERE a.policy = $1), \
                pg_catalog.count(*) FILTER (WHERE o.archive_held_until > pg_catalog.now() OR o.status = 'gone' AND o.held_until > pg_catalog.now()) \
         FROM amazon_pii.order_state AS o WHERE o.policy = $1",
        &[Arg::Text(Some(policy))],
    )?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    let mut parts = Vec::new();
    for (at, what) in [
        "orders are not redacted",
        "records wait for other orders",
        "tables of by_age lose their clock",
        "archives are held",
    ]
    .into_iter()
    .enumerate()
    {
        let count = row.int(at)?;
        if count > 0 {
            parts.push(format!("{count} {what}"));
        }
    }
    Ok((!parts.is_empty()).then(|| parts.join(", ")))
}
