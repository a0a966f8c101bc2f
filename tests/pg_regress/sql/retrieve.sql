-- Retrieve, peek, find, end a retrieval; what is read-only meanwhile; what comes back cell by cell.
\set document '{"policy": "shop", "enabled": true, "orders": {"table": "shop.orders", "number": "external_no", "amazon": "channel = ''amazon''", "anchor": "shipped_at", "redact": ["gift_message"]}, "linked": [{"table": "shop.addresses", "on": {"order_id": "id"}, "redact": ["name", "line2"]}, {"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["name", "email"]}]}'
SET SESSION AUTHORIZATION pii_admin;
SELECT amazon_pii.apply_policy(:'document');
CALL amazon_pii.run_cycle();
SET SESSION AUTHORIZATION pii_operator;
SELECT order_number, status, matched_by FROM amazon_pii.find_orders('307-0000000-0000005');
SELECT jsonb_pretty(amazon_pii.peek('307-0000000-0000005', 'return')) IS NOT NULL AS peeked;
SELECT * FROM amazon_pii.retrieve('307-0000000-0000005', 'return');
RESET SESSION AUTHORIZATION;
SELECT gift_message FROM shop.orders WHERE id = 5;
SELECT name, line2 FROM shop.addresses WHERE order_id = 5;
SELECT status, retrieved_until - retrieved_at AS retrieved_for FROM amazon_pii.orders WHERE order_key = '["5"]';
-- Read-only, but for columns without personal data and for writes that change nothing.
SET SESSION AUTHORIZATION shop_owner;
UPDATE shop.orders SET gift_message = 'edited' WHERE id = 5;
\echo :LAST_ERROR_SQLSTATE
UPDATE shop.orders SET total = 55, gift_message = gift_message WHERE id = 5;
SELECT gift_message, total FROM shop.orders WHERE id = 5;
-- Already retrieved; ended; redacted again without a second copy.
SET SESSION AUTHORIZATION pii_operator;
SELECT * FROM amazon_pii.retrieve('307-0000000-0000005', 'return');
\echo :LAST_ERROR_SQLSTATE
SELECT amazon_pii.end_retrieval('307-0000000-0000005');
SET SESSION AUTHORIZATION pii_admin;
CALL amazon_pii.run_cycle();
RESET SESSION AUTHORIZATION;
SELECT gift_message, total FROM shop.orders WHERE id = 5;
SELECT table_name, version FROM amazon_pii_archive.document WHERE order_key = '["5"]' ORDER BY 1, 2;
-- A cell that somebody has emptied since stays as it is, and is counted.
UPDATE shop.addresses SET name = NULL WHERE order_id = 5;
SET SESSION AUTHORIZATION pii_operator;
SELECT * FROM amazon_pii.retrieve('307-0000000-0000005', 'return');
RESET SESSION AUTHORIZATION;
SELECT gift_message, name FROM shop.orders AS o JOIN shop.addresses AS a ON a.order_id = o.id WHERE o.id = 5;
SELECT "user", action, order_number, reason FROM amazon_pii.audit_log WHERE action IN ('peek', 'retrieve', 'end_retrieval') ORDER BY audit_id;
