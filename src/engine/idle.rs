//! Whether a cycle has anything to do at all, found out before the policy is made ready: the worker is a new process each
//! time, and most of its cycles find nothing.

use super::due::Clock;
use super::purge;
use super::vault::{self, Place};
use crate::domain::clock::horizons;
use crate::domain::policy::Policy;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{Identity, OWN_PATH, act_as, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::{keys, xact};

/// A sum over the catalog rows of a policy's tables, their partitions, columns, indexes and triggers, each with the
/// transaction that wrote it: while it stays the same there is no table, partition or trigger that is new, or gone.
///
/// # Errors
/// Errors of the server.
pub fn structure(policy: &str) -> Result<Option<String>> {
    on_keys(|| {
        sql::read(
            "WITH known AS MATERIALIZED (SELECT t.relation::oid AS oid FROM amazon_pii.policy_table t WHERE t.policy = $1 \
                UNION SELECT p.relid::oid FROM amazon_pii.policy_table t CROSS JOIN LATERAL pg_catalog.pg_partition_tree(t.relation) AS p \
                WHERE t.policy = $1) \
             SELECT pg_catalog.sum(s.h) FROM ( \
                SELECT pg_catalog.hash_record_extended(ROW(c.oid, c.xmin), 1) FROM known k JOIN pg_catalog.pg_class c ON c.oid = k.oid \
                UNION ALL SELECT pg_catalog.hash_record_extended(ROW(a.attrelid, a.attnum, a.xmin), 2) \
                    FROM known k JOIN pg_catalog.pg_attribute a ON a.attrelid = k.oid AND a.attnum > 0 \
                UNION ALL SELECT pg_catalog.hash_record_extended(ROW(i.indexrelid, i.xmin), 3) \
                    FROM known k JOIN pg_catalog.pg_index i ON i.indrelid = k.oid \
                UNION ALL SELECT pg_catalog.hash_record_extended(ROW(g.oid, g.xmin), 4) \
                    FROM known k JOIN pg_catalog.pg_trigger g ON g.tgrelid = k.oid) AS s (h)",
            &[Arg::Text(Some(policy))],
        )?
        .first()
        .ok_or_else(|| Error::internal("no row"))?
        .owned(0)
    })
}

/// Whether the catalog rows of a policy's tables are not those that its last complete cycle saw.
///
/// # Errors
/// Errors of the server.
pub fn is_changed(policy: &str, structure: Option<&str>) -> Result<bool> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT p.structure IS DISTINCT FROM $2::numeric FROM amazon_pii.policy p WHERE p.policy = $1",
            &[Arg::Text(Some(policy)), Arg::Text(structure)],
        )
    })?;
    rows.first().map_or(Ok(true), |r| r.bool(0))
}

/// Whether nothing is to be done for a policy now: its tables are what they were when a cycle last saw them, nothing
/// waits to be flagged, moved or told, and no order has come to its time. Where it cannot be told, there may be.
fn nothing_to_do(policy: &str) -> Result<bool> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT p.document, p.structure FROM amazon_pii.policy p WHERE p.policy = $1 AND p.enabled AND p.suspended IS NULL \
                AND p.last_error IS NULL AND p.structure IS NOT NULL \
                AND p.sweep_started_at <= p.swept_at AND p.swept_at > pg_catalog.now() - '1 day'::interval AND p.rechecked_at IS NOT NULL AND p.recheck_left = 0 \
                AND NOT EXISTS (SELECT FROM amazon_pii.news n WHERE n.policy = $1) \
                AND NOT EXISTS (SELECT FROM amazon_pii.touched t WHERE t.policy = $1 AND t.next_attempt_at <= pg_catalog.now()) \
                AND NOT EXISTS (SELECT FROM amazon_pii.orphan r WHERE r.policy = $1 AND r.record_key IS NULL AND r.next_attempt_at <= pg_catalog.now()) \
                AND NOT EXISTS (SELECT FROM amazon_pii.orphan r WHERE r.policy = $1 AND r.apart = 'due' AND r.next_attempt_at <= pg_catalog.now()) \
                AND NOT EXISTS (SELECT FROM amazon_pii.renamed r WHERE r.policy = $1) \
                AND NOT EXISTS (SELECT FROM amazon_pii.retrieval_queue q WHERE q.policy = $1 AND q.next_attempt_at <= pg_catalog.now()) \
                AND NOT EXISTS (SELECT FROM amazon_pii.order_state o WHERE o.policy = $1 AND o.status = 'flagged' AND o.stale_at <= pg_catalog.now())",
            &[Arg::Text(Some(policy))],
        )
    })?;
    let Some(row) = rows.first() else { return Ok(false) };
    if structure(policy)?.as_deref() != row.text(1)? {
        return Ok(false);
    }
    // Without a key a cycle fails, whether anything is due or not.
    if keys::master_keys().is_err() {
        return Ok(false);
    }
    let document = Policy::parse(row.str(0)?).map_err(|e| Error::invalid(e.to_string()))?;
    if !vault::unsent(&Place::of(&document), policy, None, 1)?.is_empty() {
        return Ok(false);
    }
    let now = xact::now()?;
    let clock = Clock::new(now, &horizons(document.window.as_ref(), now));
    // By the index, which forgets what is dead as it goes.
    let pins = &[("enable_seqscan", "off"), ("enable_bitmapscan", "off")];
    let rows = act_as(Identity::Extension, OWN_PATH, pins, || {
        sql::read(
            "SELECT NOT EXISTS (SELECT FROM amazon_pii.order_state o WHERE o.policy = $1 \
                    AND o.next_due_at <= GREATEST($2::timestamptz, $3::timestamptz) \
                    AND (o.next_attempt_at IS NULL OR o.next_attempt_at <= $2::timestamptz)) \
                AND NOT EXISTS (SELECT FROM amazon_pii.overdue v WHERE v.policy = $1) \
                AND NOT EXISTS (SELECT FROM amazon_pii.order_state o WHERE o.policy = $1 AND o.archive_held_until <= $2::timestamptz) \
                AND NOT EXISTS (SELECT FROM amazon_pii.aged_table a WHERE a.policy = $1 \
                    AND a.next_look_at <= GREATEST($2::timestamptz, $3::timestamptz))",
            &[
                Arg::Text(Some(policy)),
                Arg::Text(Some(&clock.now)),
                Arg::Text(Some(&clock.redact)),
            ],
        )
    })?;
    let idle = rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)?;
    Ok(idle && purge::past(policy, &document.archive_for, 1)?.is_empty())
}

/// Ends a cycle that has nothing to do: that it was here is all that is noted. Whether it does.
///
/// # Errors
/// A cancel; whatever else goes wrong, the cycle finds it too.
pub fn ends(policy: &str) -> Result<bool> {
    let outcome = subtransaction(|| {
        let idle = nothing_to_do(policy)?;
        if idle {
            note(policy)?;
        }
        Ok(idle)
    });
    match outcome {
        Err(e) if e.is_cancel() => Err(e),
        other => Ok(other.unwrap_or(false)),
    }
}

/// Notes that a cycle was here, unless another is just doing so.
fn note(policy: &str) -> Result<()> {
    on_keys(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET cycled_at = pg_catalog.clock_timestamp() WHERE policy = \
                (SELECT p.policy FROM amazon_pii.policy p WHERE p.policy = $1 FOR NO KEY UPDATE SKIP LOCKED)",
            &[Arg::Text(Some(policy))],
        )
    })?;
    Ok(())
}
