//! In which database a policy is at work. A copy of it (staging, a restored dump) must not redact by itself, and must never write to
//! the cold server of the original: it would send what the original has sent, and delete what the original still needs.

use super::audit::{self, AuditEntry};
use super::plan::Plan;
use super::tombstone;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys, require_role};
use crate::pg::origin::this_database;
use crate::pg::sql::{self, Arg};
use crate::pg::xact::Boundary;

/// The condition that a policy, `p`, is at work in the database $2. One of a cluster that no file tells from its original may be what was
/// promoted in the place of a copy that was adopted, and that a file did tell.
pub const IS_HERE: &str = "(p.home IS NULL OR p.home = $2 OR pg_catalog.split_part(p.home, '/', 1) = $2)";

/// Refuses a cycle in a copy: the worker's, and any that would write to a cold server. A policy that was never told where it is, is here.
///
/// # Errors
/// The policy was applied in another database, which this one is a copy of.
pub fn refuse_elsewhere(plan: &Plan, boundary: Boundary) -> Result<()> {
    let here = this_database();
    let rows = on_keys(|| {
        sql::write(
            // ident-ok: made of constants.
            &format!(
                "WITH n AS (UPDATE amazon_pii.policy p SET home = $2 WHERE p.policy = $1 AND p.home IS NULL) \
                 SELECT {IS_HERE} FROM amazon_pii.policy p WHERE p.policy = $1"
            ),
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
            // ident-ok: made of constants.
            &format!("SELECT {IS_HERE} FROM amazon_pii.policy p WHERE p.policy = $1"),
            &[Arg::Text(Some(policy)), Arg::Text(Some(&this_database()))],
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
    let here = this_database();
    let rows = as_extension(|| {
        sql::write(
            // ident-ok: made of constants.
            &format!(
                "UPDATE amazon_pii.policy o SET home = CASE WHEN {IS_HERE} THEN COALESCE(p.home, $2) ELSE $2 END, last_error = NULL \
                 FROM amazon_pii.policy p \
                 WHERE p.policy = o.policy AND ($1 IS NULL OR p.policy = $1) RETURNING p.policy, p.version, NOT {IS_HERE}, p.home"
            ),
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
