\echo Use "ALTER EXTENSION amazon_pii UPDATE TO '0.2.0'" to load this file. \quit

-- Tables are changed by hand, so that what is in them stays. All else is as in a new installation: a line that begins with `-- \`
-- stands for statements of another file here, which scripts/stage puts in its place.

SET LOCAL search_path TO pg_catalog, pg_temp;

-- Roles that are new, and the encoding, which is the same.
-- \do 00_bootstrap.sql

-- Made anew below: columns came in between, an argument was added, and event triggers cannot be replaced.
DROP VIEW amazon_pii.status;
DROP FUNCTION amazon_pii.disable_policy(text);
DROP FUNCTION amazon_pii.drop_policy(text);
DROP EVENT TRIGGER amazon_pii_ddl;

ALTER TABLE amazon_pii.policy
    ADD COLUMN path_schemas text,
    ADD COLUMN report_only_until timestamptz,
    ADD COLUMN export text,
    ADD COLUMN exported_upto timestamptz,
    ADD COLUMN export_looked_at timestamptz,
    ADD COLUMN loosened text,
    ADD COLUMN disabled_at timestamptz,
    ADD COLUMN disabled_reason text,
    ADD COLUMN keys_changed_at timestamptz,
    ADD COLUMN home text,
    ADD COLUMN effective_from timestamptz,
    ADD COLUMN postponed_since timestamptz,
    ADD COLUMN loosened_because text,
    ADD COLUMN lineage text NOT NULL DEFAULT pg_catalog.gen_random_uuid()::text;

-- Until the next cycle has found out which tables go as a whole, and has written down their columns.
ALTER TABLE amazon_pii.policy_table ADD COLUMN numbered_in oid, ADD COLUMN whole boolean;
UPDATE amazon_pii.policy_table SET numbered_in = relation::oid, whole = false;
ALTER TABLE amazon_pii.policy_table ALTER COLUMN numbered_in SET NOT NULL, ALTER COLUMN whole SET NOT NULL;

ALTER TABLE amazon_pii.order_state
    DROP CONSTRAINT order_state_status_check,
    ADD CONSTRAINT order_state_status_check CHECK (status IN
        ('flagged', 'scheduled', 'archived', 'redacted', 'retrieved', 'failed', 'gone')),
    ADD COLUMN held_since timestamptz,
    ADD COLUMN hold_reason text,
    ADD COLUMN effective_at timestamptz,
    ADD COLUMN asked text CHECK (asked IN ('erase', 'forget', 'forgotten', 'revived')),
    ADD COLUMN purged_at timestamptz,
    ADD COLUMN key_generation bigint,
    ADD COLUMN follows text COLLATE "C",
    ADD COLUMN redacted_first_at timestamptz,
    ADD COLUMN archive_held_until timestamptz,
    ADD COLUMN archive_held_since timestamptz,
    ADD COLUMN archive_hold_reason text;
UPDATE amazon_pii.order_state SET redacted_first_at = redacted_at WHERE redacted_at IS NOT NULL;
-- \indexes order_state 20_tables.sql

ALTER TABLE amazon_pii.record_state
    DROP CONSTRAINT record_state_status_check,
    ADD CONSTRAINT record_state_status_check CHECK (status IN ('archived', 'waiting', 'retrieved', 'gone', 'redacted'));

ALTER TABLE amazon_pii.run ADD COLUMN aged bigint NOT NULL DEFAULT 0;
ALTER TABLE amazon_pii.audit_entry ADD COLUMN links_before bigint;

-- \table policy_column 20_tables.sql
-- \table aged_table 20_tables.sql
-- \table aged_row 20_tables.sql
-- \table file_outbox 20_tables.sql
-- \table orphan 20_tables.sql
-- \table own_row 20_tables.sql
-- \table cold_server 20_tables.sql
-- \table audit_pending 20_tables.sql
-- \table audit_link 20_tables.sql
-- \table audit_chain 20_tables.sql
-- \table audit_checkpoint 20_tables.sql
-- \table access_count 20_tables.sql
-- \table canary 20_tables.sql
-- \table tombstone_mark 20_tables.sql
-- \table retrieval_queue 20_tables.sql

-- Which holds are long, since when and why: so far only the audit log says so.
UPDATE amazon_pii.order_state AS o
   SET held_since = h.at,
       hold_reason = CASE WHEN o.held_until > h.at + '30 days'::interval OR o.held_until > o.redact_due_at + '30 days'::interval
                          THEN COALESCE(NULLIF(h.reason, ''), 'held by a version that asked for no reason') END
  FROM (SELECT DISTINCT ON (e.policy, e.order_key) e.policy, e.order_key, e.at, e.reason
          FROM amazon_pii.audit_entry AS e WHERE e.action = 'hold' ORDER BY e.policy, e.order_key, e.audit_id DESC) AS h
 WHERE o.held_until > pg_catalog.now() AND h.policy = o.policy AND h.order_key = o.order_key;
UPDATE amazon_pii.policy AS p
   SET disabled_at = d.at, disabled_reason = 'disabled by a version that asked for no reason'
  FROM (SELECT DISTINCT ON (e.policy) e.policy, e.at, e.action FROM amazon_pii.audit_entry AS e
         WHERE e.action IN ('enable_policy', 'disable_policy') ORDER BY e.policy, e.audit_id DESC) AS d
 WHERE NOT p.enabled AND d.policy = p.policy AND d.action = 'disable_policy';
UPDATE amazon_pii.policy AS p
   SET loosened = l.what || ': applied by a version that asked for no reason'
  FROM (SELECT q.policy, pg_catalog.string_agg(c.name || ' is ' || c.value, ', ' ORDER BY c.name) AS what
          FROM amazon_pii.policy AS q
         CROSS JOIN LATERAL pg_catalog.jsonb_each_text(q.document::jsonb) AS c (name, value)
         WHERE c.name IN ('redact_after', 'retrieved_for')
           AND (SELECT pg_catalog.bool_or(m.t + c.value::interval > m.t + '30 days'::interval) FROM pg_catalog.generate_series(
                    '2026-01-01'::timestamp, '2029-12-01'::timestamp, '1 month'::interval) AS m (t))
         GROUP BY q.policy) AS l
 WHERE l.policy = p.policy;

-- The next cycle links all entries so far into their chains.
INSERT INTO amazon_pii.audit_pending (chain, audit_id) SELECT COALESCE(e.policy, ''), e.audit_id FROM amazon_pii.audit_entry AS e;

-- Between the installation of the library and this moment nothing was flagged: the next cycle looks at every order, and compares
-- each with its state. Sums of slices were made in another way.
DELETE FROM amazon_pii.sweep_slice;
UPDATE amazon_pii.policy
   SET structure = NULL, sweep_started_at = pg_catalog.clock_timestamp(), sweep_after = NULL, rechecked_at = NULL;

-- \comments 20_tables.sql
-- \do 20_tables.sql
-- \all 30_views.sql
-- \all 40_functions.sql
-- \all 90_privileges.sql

-- Another superuser may have made the extension: what is new belongs to its owner, as all else.
DO $$
DECLARE
    statement text;
BEGIN
    FOR statement IN
        SELECT pg_catalog.format('ALTER %s %s OWNER TO %I', i.type, i.identity, o.rolname)
          FROM pg_catalog.pg_extension AS e
          JOIN pg_catalog.pg_roles AS o ON o.oid = e.extowner
          JOIN pg_catalog.pg_depend AS d ON d.refclassid = 'pg_catalog.pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
          LEFT JOIN pg_catalog.pg_class AS c ON d.classid = 'pg_catalog.pg_class'::regclass AND c.oid = d.objid
          LEFT JOIN pg_catalog.pg_proc AS p ON d.classid = 'pg_catalog.pg_proc'::regclass AND p.oid = d.objid
         CROSS JOIN LATERAL pg_catalog.pg_identify_object(d.classid, d.objid, d.objsubid) AS i
         WHERE e.extname = 'amazon_pii' AND i.type IN ('table', 'view', 'function', 'procedure')
           AND COALESCE(c.relowner, p.proowner) <> e.extowner
    LOOP
        EXECUTE statement;
    END LOOP;
END
$$;
