-- One SQLSTATE and hint for each way in which a call can be wrong.
\set document '{"policy": "shop", "enabled": true, "orders": {"table": "shop.orders", "number": "external_no", "amazon": "channel = ''amazon''", "anchor": "shipped_at", "redact": ["gift_message"]}}'
SET SESSION AUTHORIZATION pii_admin;
SELECT amazon_pii.apply_policy(:'document');
CALL amazon_pii.run_cycle();
SET SESSION AUTHORIZATION pii_operator;
-- unknown
SELECT amazon_pii.peek('307-0000000-9999999', 'return');
\echo :LAST_ERROR_SQLSTATE
-- not redacted
SELECT amazon_pii.retrieve('307-0000000-0000002', 'return');
\echo :LAST_ERROR_SQLSTATE
-- bad reasons
SELECT amazon_pii.retrieve('307-0000000-0000001', '');
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.retrieve('307-0000000-0000001', NULL);
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.retrieve('307-0000000-0000001', 'mail from ada@example.invalid');
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.retrieve('307-0000000-0000001', repeat('x', 51));
\echo :LAST_ERROR_SQLSTATE
-- not retrieved; a hold without an end in the future
SELECT amazon_pii.end_retrieval('307-0000000-0000001');
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.hold('307-0000000-0000002', 'dispute', '2000-01-01');
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.hold('307-0000000-0000002', 'dispute', 'infinity');
\echo :LAST_ERROR_SQLSTATE
-- a cycle: not an operator's, not in a transaction block, not of a policy that does not exist
CALL amazon_pii.run_cycle();
\echo :LAST_ERROR_SQLSTATE
SET SESSION AUTHORIZATION pii_admin;
BEGIN;
CALL amazon_pii.run_cycle();
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;
CALL amazon_pii.run_cycle('no_such_policy');
\echo :LAST_ERROR_SQLSTATE
-- ambiguous: another policy tracks the same number
SELECT amazon_pii.apply_policy(jsonb_set(:'document', '{policy}', '"second"'));
CALL amazon_pii.run_cycle();
SET SESSION AUTHORIZATION pii_operator;
SELECT amazon_pii.peek('307-0000000-0000001', 'return');
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.peek('307-0000000-0000001', 'return', policy => 'shop') IS NOT NULL AS peeked;
-- nobody's: every call, every view, every table
SET SESSION AUTHORIZATION nobody_special;
SELECT amazon_pii.peek('307-0000000-0000001', 'return');
SELECT * FROM amazon_pii.orders;
SELECT * FROM amazon_pii_archive.document;
SET SESSION AUTHORIZATION pii_auditor;
SELECT * FROM amazon_pii.audit_entry;
SELECT count(*) > 0 AS reads FROM amazon_pii.audit_log;
DELETE FROM amazon_pii.audit_log;
RESET SESSION AUTHORIZATION;
DELETE FROM amazon_pii.audit_entry;
\echo :LAST_ERROR_SQLSTATE
