//! What an assessor asks for, in one document: counts, times, names and reasons of the audit log; no personal data.

use serde_json::{Map, Value, json};

use super::chain;
use super::rotation;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role, session_user};
use crate::pg::sql::{self, Arg};

/// What each part of the document is made by: one JSON value, from the policy in $1 and the moments in $2 and $3, the second of
/// which does not belong to it.
const PARTS: &[(&str, &str)] = &[
    (
        "orders",
        "SELECT pg_catalog.jsonb_build_object( \
            'flagged', pg_catalog.count(*) FILTER (WHERE o.flagged_at >= $2::timestamptz AND o.flagged_at < $3::timestamptz), \
            'archived', pg_catalog.count(*) FILTER (WHERE o.archived_at >= $2::timestamptz AND o.archived_at < $3::timestamptz), \
            'redacted', pg_catalog.count(*) FILTER (WHERE o.redacted_first_at >= $2::timestamptz AND o.redacted_first_at < $3::timestamptz), \
            'archive_destroyed', pg_catalog.count(*) FILTER (WHERE o.purged_at >= $2::timestamptz AND o.purged_at < $3::timestamptz), \
            'deadline_moved', pg_catalog.count(*) FILTER (WHERE o.pushed_by IS NOT NULL \
                AND o.redacted_first_at >= $2::timestamptz AND o.redacted_first_at < $3::timestamptz)) \
         FROM amazon_pii.order_state AS o WHERE o.policy = $1",
    ),
    (
        "orders_by_state",
        "SELECT COALESCE(pg_catalog.jsonb_object_agg(s.status, s.orders), '{}') FROM ( \
            SELECT o.status, pg_catalog.count(*) AS orders FROM amazon_pii.orders AS o WHERE o.policy = $1 GROUP BY o.status) AS s",
    ),
    (
        "overdue",
        "WITH v AS MATERIALIZED (SELECT o.*, COALESCE(o.waits_for, o.last_error, 'the next cycle') AS reason, \
                pg_catalog.round(pg_catalog.date_part('epoch', o.overdue_by)::numeric / 86400, 2) AS days \
            FROM amazon_pii.overdue AS o WHERE o.policy = $1) \
         SELECT pg_catalog.jsonb_build_object('orders', (SELECT pg_catalog.count(*) FROM v), \
            'worst_days', (SELECT pg_catalog.max(v.days) FROM v), \
            'by_reason', (SELECT COALESCE(pg_catalog.jsonb_agg(r.line), '[]') FROM ( \
                SELECT pg_catalog.jsonb_build_object('reason', v.reason, 'orders', pg_catalog.count(*), 'worst_days', pg_catalog.max(v.days)) AS line \
                FROM v GROUP BY v.reason ORDER BY pg_catalog.count(*) DESC, v.reason LIMIT 100) AS r), \
            'worst', (SELECT COALESCE(pg_catalog.jsonb_agg(w.line), '[]') FROM ( \
                SELECT pg_catalog.jsonb_build_object('order_key', v.order_key, 'order_number', v.order_number, 'state', v.status, \
                    'due_at', v.due_at, 'days', v.days, 'reason', v.reason, 'attempts', v.attempts) AS line \
                FROM v ORDER BY v.due_at, v.order_key LIMIT 100) AS w))",
    ),
    (
        "kept_longer",
        "SELECT pg_catalog.jsonb_build_object( \
            'now', (SELECT pg_catalog.to_jsonb(s.loosened) FROM amazon_pii.status AS s WHERE s.policy = $1), \
            'because', (SELECT p.loosened_because FROM amazon_pii.policy AS p WHERE p.policy = $1), \
            'postponed_since', (SELECT p.postponed_since FROM amazon_pii.policy AS p WHERE p.policy = $1 \
                AND GREATEST(p.effective_from, p.report_only_until) > pg_catalog.now()), \
            'enabled', (SELECT p.enabled FROM amazon_pii.policy AS p WHERE p.policy = $1), \
            'disabled_since', (SELECT p.disabled_at FROM amazon_pii.policy AS p WHERE p.policy = $1 AND NOT p.enabled), \
            'disabled_reason', (SELECT p.disabled_reason FROM amazon_pii.policy AS p WHERE p.policy = $1 AND NOT p.enabled), \
            'holds', (SELECT COALESCE(pg_catalog.jsonb_agg(h.line), '[]') FROM ( \
                SELECT pg_catalog.jsonb_build_object('order_key', o.order_key, 'order_number', o.order_number, 'since', o.held_since, \
                    'until', o.held_until, 'reason', o.hold_reason) AS line \
                FROM amazon_pii.order_state AS o WHERE o.policy = $1 AND o.hold_reason IS NOT NULL AND o.held_until > pg_catalog.now() \
                ORDER BY o.held_until DESC, o.order_key LIMIT 100) AS h), \
            'orders', (SELECT COALESCE(pg_catalog.jsonb_agg(n.line), '[]') FROM ( \
                SELECT pg_catalog.jsonb_build_object('why', k.why, 'orders', pg_catalog.count(*), 'worst_days', pg_catalog.max(k.days), \
                    'until', pg_catalog.max(k.until), 'reasons', pg_catalog.to_jsonb(pg_catalog.array_agg(DISTINCT k.reason) FILTER (WHERE k.reason IS NOT NULL)), \
                    'worst', pg_catalog.to_jsonb((pg_catalog.array_agg(k.order_number ORDER BY k.days DESC NULLS LAST, k.order_key))[1:20])) AS line \
                FROM amazon_pii.kept_longer AS k WHERE k.policy = $1 GROUP BY k.why ORDER BY k.why) AS n), \
            'dropped', (SELECT pg_catalog.jsonb_build_object('at', a.at, 'user', a.\"user\", 'actor', a.actor, 'reason', a.reason, 'left', a.detail) \
                FROM amazon_pii.audit_entry AS a WHERE a.policy = $1 AND a.action = 'drop_policy' \
                    AND NOT EXISTS (SELECT FROM amazon_pii.policy AS p WHERE p.policy = $1) ORDER BY a.audit_id DESC LIMIT 1), \
            'switched', (SELECT COALESCE(pg_catalog.jsonb_agg(e.line), '[]') FROM ( \
                SELECT pg_catalog.jsonb_build_object('at', a.at, 'action', a.action, 'user', a.\"user\", 'actor', a.actor, 'reason', a.reason, 'detail', a.detail) AS line \
                FROM amazon_pii.audit_entry AS a WHERE a.policy = $1 AND a.action IN ('enable_policy', 'disable_policy', 'drop_policy') \
                    AND a.at >= $2::timestamptz AND a.at < $3::timestamptz ORDER BY a.audit_id DESC LIMIT 100) AS e))",
    ),
    (
        "retrievals",
        "SELECT COALESCE(pg_catalog.jsonb_agg(r.line), '[]') FROM ( \
            SELECT pg_catalog.jsonb_build_object('user', a.\"user\", 'actor', a.actor, 'action', a.action, 'reason', a.reason, \
                'orders', pg_catalog.sum(CASE WHEN a.lines IS NULL THEN 1 ELSE pg_catalog.json_array_length(a.lines::json) END), \
                'first_at', pg_catalog.min(a.at), 'last_at', pg_catalog.max(a.at)) AS line \
            FROM amazon_pii.audit_entry AS a WHERE a.policy = $1 AND a.action IN ('retrieve', 'peek', 'unflag', 'retrieve_refused', 'retrieve_failed') \
                AND a.at >= $2::timestamptz AND a.at < $3::timestamptz \
            GROUP BY a.\"user\", a.actor, a.action, a.reason ORDER BY pg_catalog.min(a.audit_id) LIMIT 10000) AS r",
    ),
    (
        "key_rotations",
        "SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('at', a.at, 'user', a.\"user\", 'detail', a.detail, 'key_id', a.key_id) \
            ORDER BY a.audit_id), '[]') FROM amazon_pii.audit_entry AS a WHERE a.policy IS NULL AND a.action = 'rotate_key' \
            AND a.at >= $2::timestamptz AND a.at < $3::timestamptz",
    ),
    (
        "policy_versions",
        "SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('version', v.version, 'applied_at', v.applied_at, 'applied_by', v.applied_by, \
                'archive_after', COALESCE(v.d->>'archive_after', '29 days'), 'redact_after', COALESCE(v.d->>'redact_after', '30 days'), \
                'retrieved_for', COALESCE(v.d->>'retrieved_for', '30 days'), 'archive_for', COALESCE(v.d->>'archive_for', '10 years'), \
                'audit_for', COALESCE(v.d->>'audit_for', $4), 'loosened', v.d->>'loosened', \
                'sha256', pg_catalog.encode(pg_catalog.sha256(pg_catalog.convert_to(v.document, 'UTF8')), 'hex')) ORDER BY v.version), '[]') \
         FROM (SELECT p.*, p.document::jsonb AS d, pg_catalog.lead(p.applied_at) OVER (ORDER BY p.version) AS ended_at \
            FROM amazon_pii.policy_version AS p WHERE p.policy = $1) AS v \
         WHERE v.applied_at < $3::timestamptz AND (v.ended_at > $2::timestamptz) IS NOT FALSE",
    ),
    (
        "cycles",
        "SELECT pg_catalog.jsonb_build_object('with_work', pg_catalog.count(*), \
            'interrupted', pg_catalog.count(*) FILTER (WHERE r.finished_at IS NULL), 'failed_orders', COALESCE(pg_catalog.sum(r.failed), 0), \
            'last_at', (SELECT p.cycled_at FROM amazon_pii.policy AS p WHERE p.policy = $1)) \
         FROM amazon_pii.run AS r WHERE r.policy = $1 AND r.started_at >= $2::timestamptz AND r.started_at < $3::timestamptz",
    ),
    (
        "audit_log",
        "SELECT pg_catalog.jsonb_build_object( \
            'by_action', (SELECT COALESCE(pg_catalog.jsonb_object_agg(s.action, s.entries), '{}') FROM ( \
                SELECT a.action, pg_catalog.count(*) AS entries FROM amazon_pii.audit_entry AS a WHERE a.policy = $1 \
                    AND a.at >= $2::timestamptz AND a.at < $3::timestamptz GROUP BY a.action) AS s), \
            'head_position', h.position, 'head_code', pg_catalog.encode(h.code, 'hex'), 'sealed_at', h.sealed_at, 'key_id', h.key_id, \
            'not_linked_yet', (SELECT pg_catalog.count(*) FROM amazon_pii.audit_pending AS p WHERE p.chain = $1), \
            'removed_by_audit_for', COALESCE(c.entries, 0), 'removed_upto', c.last_at) \
         FROM (SELECT) AS one LEFT JOIN amazon_pii.audit_chain AS h ON h.chain = $1 \
         LEFT JOIN amazon_pii.audit_checkpoint AS c ON c.chain = $1",
    ),
];

/// The evidence of a policy, from a moment until before another; without them from the beginning, and until now.
///
/// # Errors
/// There never was such a policy; the moments are in the wrong order.
pub fn of(policy: &str, from: Option<&str>, to: Option<&str>) -> Result<Value> {
    require_role(&["amazon_pii_admin", "amazon_pii_auditor"], "ask for evidence")?;
    let period = as_extension(|| {
        sql::read(
            // Times as JSON has them, in all parts alike.
            "SELECT pg_catalog.to_jsonb(t.begun) #>> '{}', pg_catalog.to_jsonb(t.ended) #>> '{}', t.begun < t.ended, pg_catalog.to_jsonb(pg_catalog.now()) #>> '{}' \
             FROM (SELECT COALESCE($2::timestamptz, '-infinity') AS begun, COALESCE($3::timestamptz, pg_catalog.now()) AS ended) AS t \
             WHERE EXISTS (SELECT FROM amazon_pii.policy_version AS v WHERE v.policy = $1)",
            &[Arg::Text(Some(policy)), Arg::Text(from), Arg::Text(to)],
        )
    })?;
    let Some(period) = period.first() else {
        return Err(Error::undefined(format!("policy \"{policy}\" does not exist"))
            .hint("The view amazon_pii.policies lists the policies."));
    };
    if !period.bool(2)? {
        return Err(Error::invalid("the evidence ends before it begins").hint("Give the earlier moment first."));
    }
    let args = [
        Arg::Text(Some(policy)),
        Arg::Text(Some(period.str(0)?)),
        Arg::Text(Some(period.str(1)?)),
        Arg::Text(Some(chain::KEPT_FOR)),
    ];
    let mut out = Map::new();
    let mut add = |name: &str, value: Value| out.insert(name.to_owned(), value);
    add("policy", json!(policy));
    add("from", json!(from.map(|_| period.str(0)).transpose()?));
    add("to", json!(period.str(1)?));
    add("issued_at", json!(period.str(3)?));
    add("issued_by", json!(session_user()));
    add("extension", json!(env!("CARGO_PKG_VERSION")));
    for (name, statement) in PARTS {
        add(name, part(statement, &args).map_err(|e| e.at(name))?);
    }
    for (name, column, due) in [
        ("days_until_archived", "archived_at", "archive_due_at"),
        ("days_until_redacted", "redacted_first_at", "redact_due_at"),
    ] {
        add(name, part(&days(column, due), &args)?);
    }
    add("keys", keys()?);
    add("verification", verification(&args)?);
    Ok(Value::Object(out))
}

fn part(statement: &str, args: &[Arg<'_>]) -> Result<Value> {
    let rows = as_extension(|| sql::read(statement, args))?;
    let text = rows.first().ok_or_else(|| Error::internal("no row"))?.str(0)?;
    serde_json::from_str(text).map_err(|_| Error::internal("a part of the evidence is no JSON"))
}

/// How long it took from the anchor on, day by day.
fn days(column: &str, due: &str) -> String {
    // ident-ok: names of our own columns
    format!(
        "WITH d AS MATERIALIZED (SELECT o.order_key, o.order_number, o.pushed_by, o.{due} AS due_at, \
                pg_catalog.round(pg_catalog.date_part('epoch', o.{column} - o.anchor_at)::numeric / 86400, 2) AS days \
            FROM amazon_pii.order_state AS o WHERE o.policy = $1 AND o.{column} >= $2::timestamptz AND o.{column} < $3::timestamptz) \
         SELECT pg_catalog.jsonb_build_object('orders', (SELECT pg_catalog.count(*) FROM d), \
            'without_anchor', (SELECT pg_catalog.count(*) FROM d WHERE d.days IS NULL), \
            'by_days', (SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('days', n.days, 'orders', n.orders) ORDER BY n.days), '[]') \
                FROM (SELECT pg_catalog.floor(d.days) AS days, pg_catalog.count(*) AS orders FROM d WHERE d.days IS NOT NULL GROUP BY 1) AS n), \
            'worst', (SELECT pg_catalog.jsonb_build_object('days', d.days, 'order_key', d.order_key, 'order_number', d.order_number, \
                    'due_at', d.due_at, 'moved_by', d.pushed_by) FROM d WHERE d.days IS NOT NULL ORDER BY d.days DESC, d.order_key LIMIT 1))"
    )
}

/// Master keys by their ids, as `key_status` shows them.
fn keys() -> Result<Value> {
    let keys = rotation::status()?.into_iter().map(|s| {
        json!({
            "master_key_id": s.id,
            "current": s.is_current,
            "configured": s.is_configured,
            "data_keys": s.used.data_keys,
            "files": s.used.files,
            "audit_entries": s.used.audit_entries,
            "may_retire": s.may_retire(),
        })
    });
    Ok(keys.collect())
}

/// The results of `verify` and `verify_audit_log`, the newest first.
fn verification(args: &[Arg<'_>]) -> Result<Value> {
    let mut out = Map::new();
    for (name, action) in [("personal_data", "verify_result"), ("audit_log", "verify_audit_log")] {
        let rows = as_extension(|| {
            sql::read(
                "SELECT pg_catalog.to_jsonb(a.at) #>> '{}', a.\"user\", a.actor, a.detail FROM amazon_pii.audit_entry AS a WHERE a.policy = $1 AND a.action = $4 \
                 AND a.at >= $2::timestamptz AND a.at < $3::timestamptz ORDER BY a.audit_id DESC LIMIT 100",
                &[
                    args[0].clone(),
                    args[1].clone(),
                    args[2].clone(),
                    Arg::Text(Some(action)),
                ],
            )
        })?;
        let mut results = Vec::new();
        for row in &rows {
            let result = row.text(3)?.and_then(|d| serde_json::from_str::<Value>(d).ok());
            results.push(json!({ "at": row.str(0)?, "user": row.str(1)?, "actor": row.text(2)?, "result": result }));
        }
        out.insert(name.to_owned(), Value::Array(results));
    }
    Ok(Value::Object(out))
}
