//! Canary orders: invented ones that nobody has a reason to ask for. Whoever opens one raises the alarm.

use super::access::{Target, resolve_only};
use super::audit::{self, AuditEntry};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role, session_user};
use crate::pg::sql::{self, Arg};

/// Makes the orders that bear a number canaries, or ordinary orders again.
///
/// # Errors
/// The caller is no member of `amazon_pii_admin`; the number is unknown, ambiguous, or no canary's.
pub fn set(number: &str, canary: bool, policy: Option<&str>) -> Result<()> {
    require_role(&["amazon_pii_admin"], "choose canary orders")?;
    let (policy, action) = if canary {
        let target = Target {
            number,
            policy,
            key: None,
        };
        let (plan, _) = resolve_only(&target)?;
        as_extension(|| {
            sql::execute(
                "INSERT INTO amazon_pii.canary (policy, order_number, set_by) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(number)),
                    Arg::Text(Some(&session_user())),
                ],
            )
        })?;
        (plan.policy.clone(), "set_canary")
    } else {
        (take_back(number, policy)?, "unset_canary")
    };
    audit::insert(&[AuditEntry {
        policy: Some(policy),
        order_number: Some(number.to_owned()),
        ..AuditEntry::new(action)?
    }])
}

/// The order need not exist any more.
fn take_back(number: &str, policy: Option<&str>) -> Result<String> {
    let rows = as_extension(|| {
        sql::write(
            "DELETE FROM amazon_pii.canary c WHERE c.order_number = $1 AND ($2::text IS NULL OR c.policy = $2) RETURNING c.policy",
            &[Arg::Text(Some(number)), Arg::Text(policy)],
        )
    })?;
    let mut policies = rows.iter().map(|r| r.string(0)).collect::<Result<Vec<_>>>()?;
    policies.sort();
    match policies.as_slice() {
        [policy] => Ok(policy.clone()),
        [] => {
            Err(Error::no_row(format!("order \"{number}\" is no canary"))
                .hint("The view amazon_pii.canaries lists them."))
        }
        // The error undoes it.
        _ => Err(Error::ambiguous_order(number, &policies)),
    }
}
