-- What a cycle does to rows that are due, not due yet, not Amazon's, shared, and empty.
\set document '{"policy": "shop", "enabled": true, "orders": {"table": "shop.orders", "number": "external_no", "amazon": "channel = ''amazon''", "anchor": "shipped_at", "redact": ["gift_message"]}, "linked": [{"table": "shop.addresses", "on": {"order_id": "id"}, "redact": {"name": "placeholder", "line2": "placeholder", "zip": {"prefix": 2}}}, {"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["name", "email"]}]}'
SET SESSION AUTHORIZATION pii_admin;
SELECT amazon_pii.apply_policy(:'document');
SELECT * FROM amazon_pii.preview('shop') ORDER BY 1, 2;
CALL amazon_pii.run_cycle('shop');
-- Order 2 is archived and not yet due; 3 is not dispatched; 4 is not Amazon's. Empty stays empty.
SELECT id, gift_message, total FROM shop.orders ORDER BY 1;
SELECT id, name, line2, zip FROM shop.addresses ORDER BY 1;
-- Ada's order 2 keeps her alive.
SELECT * FROM shop.customers ORDER BY 1;
SELECT order_key, status FROM amazon_pii.orders ORDER BY 1;
SELECT order_key, table_name, record_key, status, version FROM amazon_pii.records ORDER BY 1, 2;
RESET SESSION AUTHORIZATION;
SELECT "user", action, order_key, detail FROM amazon_pii.audit_log ORDER BY order_key, audit_id;
-- Personal data that comes back goes again with the next cycle; what nobody treats does not matter.
UPDATE shop.addresses SET name = 'Eve Nobody-Else' WHERE id = 15;
UPDATE shop.orders SET total = 51 WHERE id = 5;
INSERT INTO shop.addresses VALUES (16, 1, 'Ada again', NULL, NULL);
CALL amazon_pii.run_cycle('shop');
SELECT id, name FROM shop.addresses WHERE id IN (15, 16) ORDER BY 1;
SELECT order_key, record_key, version FROM amazon_pii_archive.document WHERE table_name = 'shop.addresses' ORDER BY 1, 2, 3;
-- The last order of a customer takes the customer along. Time cannot be turned forward, so the order grows older.
UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now() WHERE order_key = '["2"]';
CALL amazon_pii.run_cycle('shop');
SELECT * FROM shop.customers ORDER BY 1;
SELECT order_key, status FROM amazon_pii.records WHERE table_name = 'shop.customers' ORDER BY 1;
-- A deleted order is gone; its documents stay.
DELETE FROM shop.orders WHERE id = 5;
CALL amazon_pii.run_cycle('shop');
SELECT order_key, status FROM amazon_pii.orders ORDER BY 1;
SELECT count(*) FROM amazon_pii_archive.document WHERE order_key = '["5"]';
-- Nothing is left to do.
CALL amazon_pii.run_cycle('shop');
