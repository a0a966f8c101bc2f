-- Applying, checking, replacing, disabling and dropping a policy.
\set document '{"policy": "shop", "orders": {"table": "shop.orders", "number": "external_no", "amazon": "channel = ''amazon''", "anchor": "shipped_at", "redact": ["gift_message"]}, "linked": [{"table": "shop.addresses", "on": {"order_id": "id"}, "redact": ["name", "line2"]}, {"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["name", "email"]}]}'
SET SESSION AUTHORIZATION pii_admin;
SELECT * FROM amazon_pii.check_policy(:'document');
SELECT amazon_pii.apply_policy(:'document');
SELECT policy, version, enabled, suspended, applied_by, document = :'document'::jsonb AS same FROM amazon_pii.policies;
-- Nothing is at work until the policy is enabled; existing orders are looked at then.
CALL amazon_pii.run_cycle();
SELECT amazon_pii.enable_policy('shop');
CALL amazon_pii.run_cycle();
SELECT order_number, status FROM amazon_pii.orders ORDER BY 1;
SELECT amazon_pii.disable_policy('shop', 'maintenance');
SELECT policy, version, enabled, flagged, scheduled, archived, redacted, failed, overdue, last_error FROM amazon_pii.status;
-- A new version; enabled counts at the first time only.
SELECT amazon_pii.apply_policy(:'document'::jsonb || '{"placeholder": "gone", "enabled": true}');
SELECT version, enabled FROM amazon_pii.policies;
-- Each table has triggers of ours.
SELECT DISTINCT tgrelid::regclass FROM pg_trigger WHERE tgname LIKE 'amazon\_pii\_%' ORDER BY 1;
-- What is wrong is said before anything is applied.
SELECT * FROM amazon_pii.check_policy(:'document'::jsonb || '{"plcaeholder": "x"}');
SELECT * FROM amazon_pii.check_policy(jsonb_set(:'document', '{linked,0,redact}', '["name", "zip", "nothing"]'));
SELECT amazon_pii.apply_policy(jsonb_set(:'document', '{linked,0,redact}', '["name", "zip"]'));
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.apply_policy(jsonb_set(:'document', '{orders,table}', '"shop.no_such_table"'));
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.enable_policy('shpo');
\echo :LAST_ERROR_SQLSTATE
-- Archived documents outlive the policy.
SELECT amazon_pii.drop_policy('shop', 'test');
SELECT count(*) FROM amazon_pii.policies;
SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'amazon\_pii\_%';
RESET SESSION AUTHORIZATION;
SELECT order_key, table_name, record_key, version FROM amazon_pii_archive.document ORDER BY 1, 2, 3;
