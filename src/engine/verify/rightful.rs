//! Whose row it is: an order that is not redacted has its personal data rightfully.

use std::collections::HashSet;

use super::Search;
use crate::engine::alive;
use crate::engine::walk::{Values, key_text};
use crate::pg::error::Result;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// Orders of a row that are looked at. Of one that has more, nobody can say here, so nothing is said.
const MOST: u32 = 1000;

/// For each row of one of the policy's tables whether somebody has it rightfully: an order of any policy that is not
/// redacted or not tracked; or nobody, if it was never a redacted order's.
pub(super) fn rightful(search: &Search<'_>, table: usize, rows: &[Values]) -> Result<Vec<bool>> {
    let ours = &search.plan.tables[table];
    let mut used = vec![false; rows.len()];
    let mut rightful = vec![false; rows.len()];
    for plan in std::iter::once(search.plan).chain(search.others.iter().map(|p| &**p)) {
        let Some(theirs) = plan.tables.iter().position(|t| t.relation.oid == ours.relation.oid) else {
            continue;
        };
        let (users, cut) = alive::users(plan, theirs, rows, Some(MOST))?;
        cut.into_iter().for_each(|row| rightful[row] = true);
        let keys: Vec<&str> = users.iter().map(|u| u.1.as_str()).collect();
        let done = on_keys(|| {
            sql::read(
                "SELECT o.order_key FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) \
                 AND o.status IN ('redacted', 'gone')",
                &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
            )
        })?;
        let done = done.iter().map(|r| r.str(0)).collect::<Result<HashSet<_>>>()?;
        for (row, order, amazon) in &users {
            used[*row] = true;
            rightful[*row] |= !done.contains(order.as_str()) && (*amazon || !ours.amazon_only);
        }
    }
    for (row, key) in rows.iter().enumerate().filter(|(row, _)| !used[*row]) {
        // Left behind by a deleted order, or never one's.
        let listed = search.hashing.row(&ours.archived_as, &key_text(key)?);
        rightful[row] |= !search.sought.contains(listed);
    }
    Ok(rightful)
}
