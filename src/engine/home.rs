//! In which database a policy is at work. A copy of it (staging, a restored dump) must not redact by itself, and must never write to
//! the cold server of the original: it would send what the original has sent, and delete what the original still needs.

use super::audit::{self, AuditEntry};
use super::plan::Plan;
use super::tombstone;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys, require_role};
use crate::pg::sql::{self, Arg};
use crate::pg::xact::{self, Boundary};

/// Refuses a cycle in a copy: the worker's, and any that would write to a cold server. A policy that was never told where it is, is here.
///
/// # Errors
/// The policy was applied in another database, which this one is a copy of.
pub fn refuse_elsewhere(plan: &Plan, boundary: Boundary) -> Result<()> {
    let here = xact::this_database();
    let rows = on_keys(|| {
        sql::write(
            "WITH n AS (UPDATE amazon_pii.policy p SET home = $2 WHERE p.policy = $1 AND p.home IS NULL RETURNING p.home) \
             SELECT COALESCE((SELECT n.home FROM n), p.home) = $2 FROM amazon_pii.policy p WHERE p.policy = $1",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(&here))],
        )
    })?;
    let is_home = rows.first().map_or(Ok(true), |r| r.bool(0))?;
    if is_home || boundary == Boundary::Procedure && plan.archive.foreign.is_none() {
        return Ok(());
    }
    Err(Error::wrong_state(format!(
        "policy \"{}\" was applied in another database, of which this one is a copy",
        plan.policy
    ))
    .hint("Where this database takes the place of the original, call amazon_pii.adopt_copy(); never while the original is still at work."))
}

/// Whether a policy is at work in this database, as far as is known.
///
/// # Errors
/// Errors of the server.
pub fn is_here(policy: &str) -> Result<bool> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT COALESCE(p.home, $2) = $2 FROM amazon_pii.policy p WHERE p.policy = $1",
            &[Arg::Text(Some(policy)), Arg::Text(Some(&xact::this_database()))],
        )
    })?;
    rows.first().map_or(Ok(true), |r| r.bool(0))
}

/// Says that policies are at work in this database from now on. Returns how many were not.
///
/// # Errors
/// The caller is no member of `amazon_pii_admin`; a named policy does not exist.
pub fn adopt(policy: Option<&str>) -> Result<i64> {
    require_role(&["amazon_pii_admin"], "adopt a copy")?;
    let here = xact::this_database();
    let rows = as_extension(|| {
        sql::write(
            "UPDATE amazon_pii.policy p SET home = $2, last_error = NULL FROM amazon_pii.policy o \
             WHERE o.policy = p.policy AND ($1 IS NULL OR p.policy = $1) RETURNING p.policy, p.version, COALESCE(o.home, $2) <> $2, o.home",
            &[Arg::Text(policy), Arg::Text(Some(&here))],
        )
    })?;
    if let (Some(name), true) = (policy, rows.is_empty()) {
        return Err(Error::undefined(format!("policy \"{name}\" does not exist"))
            .hint("The view amazon_pii.policies lists the policies."));
    }
    let mut adopted = 0;
    for row in &rows {
        if row.bool(2)? {
            adopted += 1;
            tombstone::adopted(row.str(0)?, row.str(3)?)?;
            audit::insert(&[AuditEntry {
                policy: row.owned(0)?,
                policy_version: Some(row.int(1)?),
                ..AuditEntry::new("adopt_copy")?
            }])?;
        }
    }
    crate::worker::wake();
    Ok(adopted)
}
