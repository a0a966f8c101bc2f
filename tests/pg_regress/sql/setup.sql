-- A shop for the files of this folder, each of which runs in a database of its own. All people are invented.
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET SESSION AUTHORIZATION shop_owner;
CREATE TABLE shop.customers (id int PRIMARY KEY, name text, email text);
CREATE TABLE shop.orders (
    id int PRIMARY KEY, external_no text, channel text NOT NULL, customer_id int REFERENCES shop.customers,
    shipped_at timestamptz, gift_message text, total numeric(10,2)
);
CREATE INDEX ON shop.orders (customer_id);
CREATE TABLE shop.addresses (
    id int PRIMARY KEY, order_id int NOT NULL REFERENCES shop.orders ON DELETE CASCADE, name text, line2 text, zip varchar(5)
);
CREATE INDEX ON shop.addresses (order_id);
INSERT INTO shop.customers VALUES (1, 'Ada Invented', 'ada@example.invalid'), (2, 'Bob Made-Up', 'bob@example.invalid');
INSERT INTO shop.orders VALUES
    (1, '307-0000000-0000001', 'amazon', 1, now() - interval '40 days', 'happy birthday', 10.10),
    (2, '307-0000000-0000002', 'amazon', 1, now() - interval '29 days 12 hours', NULL, 20.20),
    (3, '307-0000000-0000003', 'amazon', 2, NULL, '', 30.30),
    (4, 'W-4', 'web', 2, now() - interval '40 days', 'not Amazon''s', 40.40),
    (5, '307-0000000-0000005', 'amazon', NULL, now() - interval '40 days', 'also due', 50.50);
INSERT INTO shop.addresses VALUES
    (11, 1, 'Ada Invented', '', '12345'), (12, 2, 'Ada Invented', NULL, '12345'), (13, 3, 'Bob Made-Up', NULL, '54321'),
    (14, 4, 'Bob Made-Up', NULL, '54321'), (15, 5, 'Eve Nobody', NULL, '99999');
