-- A small shop that sells on Amazon and on its own site. It runs as the role that owns it.
CREATE SCHEMA shop;

CREATE TABLE shop.customers (
    id    bigint PRIMARY KEY,
    name  text NOT NULL,
    email text NOT NULL UNIQUE,
    phone text
);
CREATE TABLE shop.orders (
    id           bigint PRIMARY KEY,
    external_no  text NOT NULL UNIQUE,
    channel      text NOT NULL,
    customer_id  bigint NOT NULL REFERENCES shop.customers,
    shipped_at   timestamptz,
    gift_message text,
    total        numeric(12,2) NOT NULL
);
CREATE INDEX ON shop.orders (customer_id);
CREATE TABLE shop.addresses (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    order_id bigint NOT NULL REFERENCES shop.orders,
    name     text,
    line1    text,
    line2    text,
    zip      varchar(12),
    city     text,
    country  char(2)
);
CREATE INDEX ON shop.addresses (order_id);
-- What Amazon's API answered, as it came: Orders API v0 and 2026-01-01.
CREATE TABLE shop.payloads (
    order_id bigint PRIMARY KEY REFERENCES shop.orders,
    api      text NOT NULL,
    raw      jsonb NOT NULL
);
-- An order with all that belongs to it.
CREATE VIEW shop.overview AS
SELECT o.external_no, o.total, o.gift_message, c.name, c.email, c.phone, a.name AS delivered_to, a.line1, a.line2, a.zip, a.city,
       p.raw -> 'ShippingAddress' AS "ShippingAddress", p.raw -> 'DefaultShipFromLocationAddress' AS "the shop's own address"
  FROM shop.orders AS o
  JOIN shop.customers AS c ON c.id = o.customer_id
  JOIN shop.addresses AS a ON a.order_id = o.id
  LEFT JOIN shop.payloads AS p ON p.order_id = o.id;
