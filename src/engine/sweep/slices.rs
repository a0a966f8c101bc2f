//! What is known of the slices of the last pass.

use crate::engine::paging::Sum;
use crate::engine::plan::Plan;
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// Slices that are looked up at once: ten million orders, which one statement can sum up in a few seconds.
pub(super) const AHEAD: u32 = 1024;

/// The orders between two keys, as they were when each was compared with its state.
pub(super) struct Known {
    /// The last key of the slice; none: the end of the table.
    pub(super) upto: Option<String>,
    pub(super) sum: Sum,
    /// That was not long ago.
    pub(super) fresh: bool,
    /// Its sum has been the same for long.
    pub(super) settled: bool,
    /// And was made within the last days.
    pub(super) seen: bool,
    /// Since when its sum has been the same.
    since: String,
}

/// The slices from a key on, each beginning where the one before it ends.
pub(super) fn chain(plan: &Plan, stamp: i64, after: Option<&str>) -> Result<Vec<Known>> {
    let rows = on_keys(|| {
        sql::read(
            "WITH RECURSIVE chain AS (SELECT s.upto, s.orders, s.digest, s.compared_at, s.changed_at, s.seen_at, 1 AS n FROM amazon_pii.sweep_slice s \
                WHERE s.policy = $1 AND s.first_after = $2 AND s.stamp = $3 \
                UNION ALL SELECT s.upto, s.orders, s.digest, s.compared_at, s.changed_at, s.seen_at, c.n + 1 FROM chain c JOIN amazon_pii.sweep_slice s \
                ON s.policy = $1 AND s.first_after = c.upto AND s.stamp = $3 WHERE c.n < $4) \
             SELECT c.upto, c.orders, c.digest, c.compared_at > pg_catalog.now() - '28 days'::interval, \
                c.changed_at <= pg_catalog.now() - '35 days'::interval, c.seen_at > pg_catalog.now() - '6 days 12 hours'::interval, c.changed_at \
             FROM chain c ORDER BY c.n",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(after.unwrap_or_default())),
                Arg::Int(stamp),
                Arg::Int(i64::from(AHEAD)),
            ],
        )
    })?;
    rows.iter()
        .map(|r| {
            let digest = r.str(2)?.parse();
            Ok(Known {
                upto: r.owned(0)?,
                sum: Sum {
                    rows: r.int(1)?,
                    digest: digest.map_err(|_| Error::internal("a sum is no number"))?,
                },
                fresh: r.bool(3)?,
                settled: r.bool(4)?,
                seen: r.bool(5)?,
                since: r.string(6)?,
            })
        })
        .collect()
}

/// Notes a slice that was compared in place of those that it covers; without a sum it is one that is yet to be compared.
pub(super) fn replace(
    plan: &Plan,
    stamp: i64,
    after: Option<&str>,
    covered: &[Known],
    upto: Option<&str>,
    sum: Option<Sum>,
) -> Result<()> {
    let after = after.unwrap_or_default();
    let mut gone: Vec<&str> = vec![after];
    // Where the last of them ends another begins, which stays.
    let inner = covered.iter().take(covered.len().saturating_sub(1));
    gone.extend(inner.filter_map(|s| s.upto.as_deref()));
    on_keys(|| {
        sql::execute(
            "DELETE FROM amazon_pii.sweep_slice WHERE policy IS NOT DISTINCT FROM $1 AND first_after = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&gone)],
        )?;
        let since = match covered {
            [same] if Some(same.sum) == sum && same.upto.as_deref() == upto => Some(same.since.as_str()),
            _ => None,
        };
        let shown = sum.unwrap_or(Sum {
            rows: super::SLICE,
            digest: 0,
        });
        sql::execute(
            "INSERT INTO amazon_pii.sweep_slice (policy, first_after, upto, stamp, orders, digest, changed_at, compared_at) \
             VALUES ($1, $2, $3, $4, $5, $6::numeric, COALESCE($7::timestamptz, pg_catalog.now()), \
                CASE WHEN $8 THEN pg_catalog.now() ELSE '-infinity' END)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(after)),
                Arg::Text(upto),
                Arg::Int(stamp),
                Arg::Int(shown.rows),
                Arg::Text(Some(&shown.digest.to_string())),
                Arg::Text(since),
                Arg::Bool(sum.is_some()),
            ],
        )?;
        Ok(())
    })
}

/// The sums of these slices are what they were.
pub(super) fn seen(plan: &Plan, first_after: &[&str]) -> Result<()> {
    if first_after.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.sweep_slice SET seen_at = pg_catalog.now() WHERE policy IS NOT DISTINCT FROM $1 AND first_after = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(first_after)],
        )
    })?;
    Ok(())
}

/// No sum of this policy says anything any more.
///
/// # Errors
/// Errors of the server.
pub fn forget(policy: &str) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "DELETE FROM amazon_pii.sweep_slice WHERE policy = $1",
            &[Arg::Text(Some(policy))],
        )
    })?;
    Ok(())
}

/// After a pass: slices that it did not come to.
pub(super) fn tidy(plan: &Plan) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "DELETE FROM amazon_pii.sweep_slice WHERE policy = $1 AND compared_at < pg_catalog.now() - '35 days'::interval \
                AND compared_at > '-infinity'",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    Ok(())
}
