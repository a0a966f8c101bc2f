-- What people read. Views belong to the extension's owner: a role needs a grant on the view only.

CREATE VIEW amazon_pii.policies WITH (security_barrier) AS
SELECT p.policy, p.version, p.enabled, p.suspended, p.applied_at, p.applied_by, p.document::pg_catalog.jsonb AS document
  FROM amazon_pii.policy AS p;
COMMENT ON VIEW amazon_pii.policies IS 'The policies in force, with their documents';

CREATE VIEW amazon_pii.orders WITH (security_barrier) AS
SELECT o.policy, o.order_key, o.order_number,
       CASE WHEN o.purged_at IS NOT NULL AND o.status IN ('redacted', 'gone') THEN 'purged' ELSE o.status END AS status,
       o.flagged_at, o.anchor_at, o.archive_due_at, o.archived_at,
       o.redact_due_at, o.redacted_at, o.retrieved_at, o.retrieved_until, o.held_until, o.attempts, o.next_attempt_at,
       o.last_error, o.pushed_by, o.redacted_version, o.stale_at, o.effective_at, o.asked, o.purged_at, o.follows,
       o.archive_held_until
  FROM amazon_pii.order_state AS o;
COMMENT ON VIEW amazon_pii.orders IS 'One row a flagged order: where it stands and what is due when';

CREATE VIEW amazon_pii.records WITH (security_barrier) AS
SELECT o.policy, o.order_key, l.item->>0 AS table_name, l.item->>1 AS record_key, l.item->>2 AS entry,
       CASE WHEN o.redacted_version IS NOT NULL AND COALESCE(r.status, 'gone') = 'gone' AND EXISTS (
                SELECT FROM amazon_pii.file_outbox AS f WHERE f.order_key = o.order_key AND f.policy = o.policy
                   AND f.table_name = l.item->>0 AND f.record_key = l.item->>1 AND f.acknowledged_at IS NULL) THEN 'file_waiting'
            ELSE COALESCE(r.status, CASE WHEN o.redacted_version IS NOT NULL THEN 'redacted'
                WHEN o.archived_at IS NULL AND l.item->>3 = '0' THEN 'remembered' ELSE 'archived' END) END AS status,
       (l.item->>3)::int AS version, COALESCE(r.changed_at, o.redacted_at, o.archived_at) AS changed_at
  FROM amazon_pii.order_state AS o
 CROSS JOIN LATERAL pg_catalog.jsonb_array_elements(o.records::pg_catalog.jsonb) AS l (item)
  LEFT JOIN amazon_pii.record_state AS r ON r.policy = o.policy AND r.order_key = o.order_key
        AND r.table_name = l.item->>0 AND r.record_key = l.item->>1;
COMMENT ON VIEW amazon_pii.records IS 'The rows that hold, or held, personal data of flagged orders; waiting: another order keeps it alive; remembered: its order was deleted before it was archived; file_waiting: its file is still to be deleted';

CREATE VIEW amazon_pii.files WITH (security_barrier) AS
SELECT f.file_id, f.policy, f.order_key, f.order_number, f.table_name, f.record_key, f.due_since, f.overdue_at, f.acknowledged_at,
       f.acknowledged_by
  FROM amazon_pii.file_outbox AS f;
COMMENT ON VIEW amazon_pii.files IS 'Files outside of the database whose rows were redacted, without their paths; those not acknowledged are still to be deleted';

-- An order is overdue when its personal data should be gone and is not.
CREATE VIEW amazon_pii.overdue WITH (security_barrier) AS
SELECT o.policy, o.order_key, o.order_number, o.status,
       CASE WHEN o.status = 'retrieved' THEN o.retrieved_until ELSE o.redact_due_at END AS due_at,
       pg_catalog.now() - CASE WHEN o.status = 'retrieved' THEN o.retrieved_until ELSE o.redact_due_at END AS overdue_by,
       o.attempts, o.next_attempt_at, o.last_error,
       CASE WHEN NOT p.enabled THEN 'enable_policy'
            WHEN p.report_only_until > pg_catalog.now() THEN 'report_only_until'
            WHEN p.export = 'require' AND o.redacted_at IS NULL AND o.asked IS NULL
                 AND (COALESCE(o.anchor_at, o.stale_at, o.redact_due_at) <= p.exported_upto) IS NOT TRUE THEN 'mark_exported' END AS waits_for
  FROM amazon_pii.order_state AS o
  LEFT JOIN amazon_pii.policy AS p ON p.policy = o.policy
 WHERE (o.status IN ('flagged', 'scheduled', 'archived', 'failed', 'retrieved')
        -- Personal data came back, and could not be redacted again.
        OR o.status = 'redacted' AND o.last_error IS NOT NULL)
   AND o.next_due_at <= pg_catalog.now()
   AND CASE WHEN o.status = 'retrieved' THEN o.retrieved_until ELSE o.redact_due_at END < pg_catalog.now()
   AND (o.held_until IS NULL OR o.held_until < pg_catalog.now())
UNION ALL
SELECT f.policy, f.order_key, pg_catalog.min(f.order_number), 'file_waiting', pg_catalog.min(f.overdue_at),
       pg_catalog.now() - pg_catalog.min(f.overdue_at), 0, NULL, NULL, 'ack_file'
  FROM amazon_pii.file_outbox AS f WHERE f.acknowledged_at IS NULL AND f.overdue_at < pg_catalog.now()
 GROUP BY f.policy, f.order_key;
COMMENT ON VIEW amazon_pii.overdue IS 'Orders past their deadline, until they are done; disabled and suspended policies included. file_waiting: a file of the order is still to be deleted';

CREATE VIEW amazon_pii.upcoming WITH (security_barrier) AS
SELECT o.policy, o.order_key, o.order_number, o.status,
       CASE WHEN o.status IN ('flagged', 'scheduled') THEN 'archive' ELSE 'redact' END AS action,
       CASE o.status WHEN 'scheduled' THEN o.archive_due_at WHEN 'retrieved' THEN o.retrieved_until
                     ELSE o.redact_due_at END AS due_at,
       o.pushed_by, o.effective_at,
       CASE WHEN p.export IS NOT NULL OR p.exported_upto IS NOT NULL
            THEN (COALESCE(o.anchor_at, o.stale_at, o.redact_due_at) <= p.exported_upto) IS TRUE END AS exported
  FROM amazon_pii.order_state AS o
  LEFT JOIN amazon_pii.policy AS p ON p.policy = o.policy
 WHERE o.status IN ('scheduled', 'archived', 'failed', 'retrieved')
   AND o.next_due_at < pg_catalog.now() + '7 days'::interval
   AND CASE o.status WHEN 'scheduled' THEN o.archive_due_at WHEN 'retrieved' THEN o.retrieved_until
                     ELSE o.redact_due_at END < pg_catalog.now() + '7 days'::interval;
COMMENT ON VIEW amazon_pii.upcoming IS 'What is due within the next seven days';

CREATE VIEW amazon_pii.runs WITH (security_barrier) AS
SELECT r.run_id, r.policy, r.started_at, r.finished_at, r.started_by, r.flagged, r.archived, r.redacted, r.failed,
       r.overdue, r.note, r.aged
  FROM amazon_pii.run AS r;
COMMENT ON VIEW amazon_pii.runs IS 'Cycles and their counts';

-- Functions in a view ask about whoever reads it. Members of none of these roles see what they did themselves; numbers would
-- tell them of entries in between.
CREATE VIEW amazon_pii.audit_log WITH (security_barrier) AS
SELECT CASE WHEN m.auditor OR m.admin THEN a.audit_id END AS audit_id, a.at, a."user", a.actor, a.action, a.policy, a.policy_version,
       COALESCE(a.order_key, l.item->>0) AS order_key, COALESCE(a.order_number, l.item->>1) AS order_number, a.reason,
       COALESCE(a.detail, l.item->>2) AS detail, a.key_id, a.mac
  FROM (SELECT pg_catalog.pg_has_role(current_user, 'amazon_pii_auditor', 'USAGE') AS auditor,
               pg_catalog.pg_has_role(current_user, 'amazon_pii_admin', 'USAGE') AS admin OFFSET 0) AS m
 CROSS JOIN amazon_pii.audit_entry AS a
  LEFT JOIN LATERAL pg_catalog.jsonb_array_elements(a.lines::pg_catalog.jsonb) AS l (item) ON true
 WHERE m.auditor OR a.action <> 'alarm' AND (m.admin OR a."user" = session_user);
COMMENT ON VIEW amazon_pii.audit_log IS 'Who did what to which order, under which policy version, why and when; holds no personal data. Operators see their own entries; alarms are for auditors';

CREATE VIEW amazon_pii.canaries WITH (security_barrier) AS
SELECT c.policy, c.order_number, c.set_at, c.set_by FROM amazon_pii.canary AS c;
COMMENT ON VIEW amazon_pii.canaries IS 'Orders that nobody has a reason to open: whoever does raises the alarm';

CREATE VIEW amazon_pii.by_age WITH (security_barrier) AS
SELECT a.policy, a.entry, t.relation::pg_catalog.text AS table_name, a.overdue, COALESCE(r.failed, 0) AS failed, r.last_error,
       NULLIF(a.next_look_at, '-infinity') AS next_look_at
  FROM amazon_pii.aged_table AS a
  JOIN amazon_pii.policy_table AS t USING (policy, entry)
  LEFT JOIN LATERAL (
       SELECT pg_catalog.count(*) AS failed, pg_catalog.max(s.last_error) AS last_error FROM amazon_pii.aged_row AS s
        WHERE s.policy = a.policy AND s.entry = a.entry AND s.last_error IS NOT NULL) AS r ON true;
COMMENT ON VIEW amazon_pii.by_age IS 'One line a table of by_age: rows past their age that are still there, and how many of them failed';
-- What came after the policy was applied, was not named since, and can hold text: by the catalog as it is.
CREATE VIEW amazon_pii.unclassified WITH (security_barrier) AS
SELECT DISTINCT t.policy, n.nspname::text AS schema_name, c.relname::text AS table_name, a.attname::text AS column_name,
       pg_catalog.format_type(a.atttypid, a.atttypmod) AS type_name
  FROM amazon_pii.policy_table AS t
  JOIN pg_catalog.pg_class AS c ON c.oid = t.relation
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE NOT t.whole
   AND NOT EXISTS (SELECT FROM amazon_pii.policy_column AS k WHERE k.policy = t.policy AND k.table_name = t.archived_as
                      AND CASE WHEN t.relation::oid <> t.numbered_in THEN k.seen_as = a.attname
                               WHEN k.number = a.attnum THEN true
                               ELSE k.named AND k.name = a.attname AND NOT EXISTS (
                                   SELECT FROM pg_catalog.pg_attribute AS o
                                    WHERE o.attrelid = c.oid AND o.attnum = k.number AND NOT o.attisdropped) END)
   AND EXISTS (WITH RECURSIVE below (oid) AS (
                    SELECT a.atttypid
                    UNION
                    SELECT CASE WHEN y.typtype = 'd' THEN y.typbasetype ELSE y.typelem END
                      FROM below AS b JOIN pg_catalog.pg_type AS y ON y.oid = b.oid
                     WHERE y.typtype = 'd' OR y.typelem <> 0 AND y.typlen = -1)
               SELECT FROM below AS b JOIN pg_catalog.pg_type AS y ON y.oid = b.oid
                WHERE y.typcategory = 'S' OR y.oid IN ('json'::regtype, 'jsonb'::regtype, 'xml'::regtype));
COMMENT ON VIEW amazon_pii.unclassified IS 'Columns for text or JSON that came after their table was registered, and that the policy names neither under redact nor under keep';

-- One line an order and cause. Infinite moments are none that could be counted from.
CREATE VIEW amazon_pii.kept_longer WITH (security_barrier) AS
SELECT o.policy, o.order_key, o.order_number, w.why, w.since, w.until, w.reason,
       CASE WHEN pg_catalog.isfinite(w.since) THEN pg_catalog.round(pg_catalog.date_part('epoch',
           LEAST(COALESCE(w.until, pg_catalog.now()), '9999-01-01'::timestamptz) - w.since)::numeric / 86400, 2) END AS days
  FROM amazon_pii.order_state AS o
  JOIN amazon_pii.policy AS p ON p.policy = o.policy
 CROSS JOIN LATERAL (VALUES
       ('hold', o.held_since, o.held_until, o.hold_reason,
        o.hold_reason IS NOT NULL AND o.held_until > pg_catalog.now()),
       ('archive_hold', o.archive_held_since, o.archive_held_until, o.archive_hold_reason,
        o.archive_hold_reason IS NOT NULL AND o.archive_held_until > pg_catalog.now()),
       ('not_before', COALESCE(o.anchor_at, o.stale_at) + '30 days'::interval, o.redact_due_at, o.pushed_by,
        o.pushed_by IS NOT NULL AND o.redact_due_at > COALESCE(o.anchor_at, o.stale_at) + '30 days'::interval
        AND (o.status IN ('scheduled', 'archived', 'failed') OR o.status = 'redacted' AND o.redact_due_at > pg_catalog.now())),
       ('export', o.redact_due_at, NULL, NULL,
        p.export = 'require' AND o.redact_due_at < pg_catalog.now() AND o.redacted_at IS NULL AND o.asked IS NULL
        AND o.status IN ('scheduled', 'archived', 'failed')
        AND (COALESCE(o.anchor_at, o.stale_at, o.redact_due_at) <= p.exported_upto) IS NOT TRUE),
       ('effective_from', COALESCE(o.anchor_at, o.stale_at) + '30 days'::interval, o.effective_at, NULL,
        o.effective_at > pg_catalog.now() AND COALESCE(o.anchor_at, o.stale_at) < pg_catalog.now() - '30 days'::interval
        AND o.status IN ('flagged', 'scheduled', 'archived', 'failed')),
       ('no_anchor', o.flagged_at + '30 days'::interval, NULL, NULL,
        o.status = 'flagged' AND o.anchor_at IS NULL AND o.flagged_at < pg_catalog.now() - '30 days'::interval)
      ) AS w (why, since, until, reason, holds)
 WHERE w.holds;
COMMENT ON VIEW amazon_pii.kept_longer IS 'Orders whose personal data, or archive, is kept longer than usual, and why: long holds (hold, archive_hold), a younger linked row (not_before), an export that is waited for (export), a date of effect (effective_from), no anchor for 30 days (no_anchor); days: of a hold in all, else past 30 days';

CREATE VIEW amazon_pii.status WITH (security_barrier) AS
SELECT p.policy, p.version, p.enabled, p.suspended,
       COALESCE(c.flagged, 0) AS flagged, COALESCE(c.scheduled, 0) AS scheduled, COALESCE(c.archived, 0) AS archived,
       COALESCE(c.redacted, 0) AS redacted, COALESCE(c.retrieved, 0) AS retrieved, COALESCE(c.purged, 0) AS purged, COALESCE(c.failed, 0) AS failed,
       COALESCE(c.stale, 0) AS stale,
       COALESCE(d.overdue, 0) AS overdue, d.worst_overdue_by,
       (SELECT pg_catalog.count(*) FROM amazon_pii.record_state AS r
         WHERE r.policy = p.policy AND r.status = 'waiting') AS records_waiting,
       p.cycled_at AS last_cycle_at,
       COALESCE(p.last_error, (SELECT t.error FROM amazon_pii.touched AS t WHERE t.policy = p.policy AND t.error IS NOT NULL
                                ORDER BY t.touched_id DESC LIMIT 1),
                (SELECT pg_catalog.max(b.last_error) FROM amazon_pii.by_age AS b WHERE b.policy = p.policy),
                (SELECT pg_catalog.max(q.last_error) FROM amazon_pii.retrieval_queue AS q WHERE q.policy = p.policy)) AS last_error,
       p.swept_at,
       CASE WHEN h.worker IS NOT NULL AND a.pid IS NOT NULL THEN 'running'
            WHEN h.worker IS NOT NULL AND h.beat_at > pg_catalog.now() - GREATEST(
                     3 * COALESCE(pg_catalog.current_setting('amazon_pii.naptime', true), '1 minute')::interval, '1 minute'::interval) THEN 'running'
            WHEN h.worker IS NOT NULL THEN 'not running since ' || h.beat_at
            ELSE 'no worker runs' END AS worker,
       h.beat_at AS worker_beat_at, h.last_error AS worker_error,
       COALESCE(c.not_in_effect, 0) AS not_in_effect, c.next_in_effect_at,
       COALESCE((SELECT pg_catalog.sum(b.overdue) FROM amazon_pii.aged_table AS b WHERE b.policy = p.policy), 0)::bigint AS rows_overdue,
       (SELECT pg_catalog.count(*) FROM amazon_pii.file_outbox AS f WHERE f.policy = p.policy AND f.acknowledged_at IS NULL) AS files_waiting,
       CASE WHEN p.report_only_until > pg_catalog.now() THEN p.report_only_until END AS report_only_until,
       ARRAY(SELECT u.schema_name || '.' || u.table_name || '.' || u.column_name FROM amazon_pii.unclassified AS u
              WHERE u.policy = p.policy ORDER BY 1) AS unclassified,
       p.exported_upto, e.not_exported, e.awaiting_export, e.redacted_unexported,
       pg_catalog.array_remove(ARRAY[
           CASE WHEN NOT p.enabled THEN COALESCE('disabled since ' || p.disabled_at || ': ' || p.disabled_reason, 'not enabled yet') END,
           p.loosened,
           CASE WHEN p.effective_from > pg_catalog.now() AND p.effective_from > p.postponed_since + '30 days'::interval
                THEN 'effective_from is ' || p.effective_from || ': ' || p.loosened_because END,
           CASE WHEN p.report_only_until > pg_catalog.now() AND p.report_only_until > p.postponed_since + '30 days'::interval
                THEN 'report_only_until is ' || p.report_only_until || ': ' || p.loosened_because END], NULL)
       || k.lines
       || CASE WHEN pg_catalog.current_setting('amazon_pii.enabled', true) IN ('off', 'false', 'no', '0')
               THEN '{"amazon_pii.enabled is off: the worker runs no cycles"}'::text[] ELSE '{}' END AS loosened,
       (SELECT pg_catalog.count(DISTINCT q.order_key) FROM amazon_pii.retrieval_queue AS q WHERE q.policy = p.policy) AS retrievals_waiting
  FROM amazon_pii.policy AS p
  LEFT JOIN LATERAL (
       SELECT pg_catalog.count(*) FILTER (WHERE o.status = 'flagged') AS flagged,
              pg_catalog.count(*) FILTER (WHERE o.status = 'scheduled') AS scheduled,
              pg_catalog.count(*) FILTER (WHERE o.status = 'archived') AS archived,
              pg_catalog.count(*) FILTER (WHERE o.status = 'redacted' AND o.purged_at IS NULL) AS redacted,
              pg_catalog.count(*) FILTER (WHERE o.status = 'retrieved') AS retrieved,
              pg_catalog.count(*) FILTER (WHERE o.status IN ('redacted', 'gone') AND o.purged_at IS NOT NULL) AS purged,
              pg_catalog.count(*) FILTER (WHERE o.status = 'failed') AS failed,
              pg_catalog.count(*) FILTER (WHERE o.status = 'flagged' AND o.stale_at <= pg_catalog.now()) AS stale,
              pg_catalog.count(*) FILTER (WHERE o.effective_at > pg_catalog.now()
                  AND o.status IN ('flagged', 'scheduled', 'archived', 'failed')) AS not_in_effect,
              pg_catalog.min(o.effective_at) FILTER (WHERE o.effective_at > pg_catalog.now()
                  AND o.status IN ('flagged', 'scheduled', 'archived', 'failed')) AS next_in_effect_at
         FROM amazon_pii.order_state AS o WHERE o.policy = p.policy) AS c ON true
  LEFT JOIN LATERAL (
       SELECT pg_catalog.count(*) AS overdue, pg_catalog.max(v.overdue_by) AS worst_overdue_by
         FROM amazon_pii.overdue AS v WHERE v.policy = p.policy) AS d ON true
  LEFT JOIN LATERAL (
       SELECT COALESCE(pg_catalog.array_agg(l.orders || CASE l.why
                  WHEN 'hold' THEN ' orders held for more than 30 days: ' || pg_catalog.left(l.because, 500)
                  WHEN 'archive_hold' THEN ' archives held for more than 30 days: ' || pg_catalog.left(l.because, 500)
                  WHEN 'not_before' THEN ' orders pushed past 30 days, by ' || l.worst || ' days at worst: ' || pg_catalog.left(l.because, 500)
                  WHEN 'export' THEN ' orders past their date wait for the export, for ' || l.worst || ' days at worst'
                  WHEN 'effective_from' THEN ' orders past 30 days are not in effect, the last until ' || l.until
                  ELSE ' orders without an anchor for more than 30 days, the oldest for ' || 30 + l.worst || ' days' END
              ORDER BY pg_catalog.array_position('{hold,archive_hold,not_before,export,effective_from,no_anchor}', l.why)), '{}') AS lines
         FROM (SELECT w.why, pg_catalog.count(*) AS orders, pg_catalog.ceil(pg_catalog.max(w.days)) AS worst, pg_catalog.max(w.until) AS until,
                      pg_catalog.string_agg(DISTINCT w.reason, '; ') AS because
                 FROM amazon_pii.kept_longer AS w WHERE w.policy = p.policy GROUP BY w.why) AS l) AS k ON true
  LEFT JOIN LATERAL (
       SELECT pg_catalog.count(*) FILTER (WHERE o.redacted_at IS NULL) AS not_exported,
              pg_catalog.count(*) FILTER (WHERE o.redacted_at IS NULL AND p.export = 'require'
                  AND o.redact_due_at < pg_catalog.now()) AS awaiting_export,
              pg_catalog.count(*) FILTER (WHERE o.redacted_at IS NOT NULL) AS redacted_unexported
         FROM amazon_pii.order_state AS o
        WHERE o.policy = p.policy AND (COALESCE(o.anchor_at, o.stale_at, o.redact_due_at) <= p.exported_upto) IS NOT TRUE
          AND (o.redacted_at IS NOT NULL OR o.status IN ('scheduled', 'archived', 'failed')
               AND o.redact_due_at < pg_catalog.now() + '7 days'::interval)) AS e
       ON p.export IS NOT NULL OR p.exported_upto IS NOT NULL
  LEFT JOIN amazon_pii.heartbeat AS h ON h.worker = 'database'
  LEFT JOIN pg_catalog.pg_stat_activity AS a ON a.pid = h.pid AND a.backend_type LIKE 'amazon_pii%';
COMMENT ON VIEW amazon_pii.status IS 'One line a policy: how many orders stand where, what is overdue, whether the worker runs';
