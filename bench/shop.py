"""The shop that is measured: orders, each with an address, a customer and an invoice. Every second order is Amazon's; the
oldest `due` of those are past their deadline, the others were dispatched some days ago. All people in it are invented.
The orders' key is a bigint; what other kinds of tables cost is compared with that."""

TABLES = ("orders", "addresses", "customers", "invoices")

# How each kind writes: the type of an order's id, and its value for the `i`th; more columns of the orders and of what points
# at them, and what goes into those; the primary key; what points at what.
KINDS = {
    "bigint": {},
    "uuid": {"type": "uuid", "id": "lpad(to_hex(i), 32, '0')::uuid"},
    "composite": {"more": ", shop_id int NOT NULL DEFAULT 1", "more_child": ", order_shop int NOT NULL DEFAULT 1",
                  "key": "shop_id, id", "child_key": "order_shop, order_id"},
    # A partition for each of a hundred days.
    "partitioned": {"more_child": ", order_placed_at timestamptz NOT NULL", "value": ", {placed}", "key": "placed_at, id",
                    "child_key": "order_placed_at, order_id", "partition": "PARTITION BY RANGE (placed_at)",
                    "placed": "date_trunc('day', now()) - (40 + i % 50) * interval '1 day'"},
}
DEFAULTS = {"type": "bigint", "id": "i", "more": "", "more_child": "", "value": "", "key": "id", "child_key": "order_id",
            "partition": "", "placed": "now() - CASE WHEN i <= 2 * {due} THEN interval '42 days' ELSE interval '12 days' END + i * interval '1 ms'"}
PARTITIONS = """
SELECT format('CREATE TABLE shop.orders_%s PARTITION OF shop.orders FOR VALUES FROM (%L) TO (%L)', n,
              date_trunc('day', now()) + (n - 95) * interval '1 day', date_trunc('day', now()) + (n - 94) * interval '1 day')
  FROM generate_series(1, 100) AS n \\gexec
"""


def words(kind):
    return {**DEFAULTS, **KINDS[kind]}


SCHEMA = """
CREATE SCHEMA shop;
CREATE TABLE shop.customers (
    id          bigint PRIMARY KEY,
    first_name  text,
    last_name   text,
    email       text,
    phone       text,
    tier        text NOT NULL DEFAULT 'normal'
);
CREATE TABLE shop.orders (
    id           {type} NOT NULL,
    external_no  text NOT NULL,
    channel      text NOT NULL,
    customer_id  bigint NOT NULL,
    placed_at    timestamptz NOT NULL,
    shipped_at   timestamptz,
    status       text NOT NULL DEFAULT 'shipped',
    gift_message text,
    total        numeric(12,2) NOT NULL{more},
    PRIMARY KEY ({key})
) {partition};
CREATE INDEX ON shop.orders (customer_id);
CREATE INDEX ON shop.orders (external_no);
CREATE TABLE shop.addresses (
    id       bigint PRIMARY KEY,
    order_id {type} NOT NULL,
    name     text,
    line1    text,
    line2    text,
    zip      varchar(12),
    city     text,
    country  text NOT NULL DEFAULT 'DE',
    phone    text{more_child}
);
CREATE INDEX ON shop.addresses ({child_key});
CREATE TABLE shop.invoices (
    id          bigint PRIMARY KEY,
    invoice_no  text NOT NULL,
    order_id    {type} NOT NULL,
    invoiced_at timestamptz NOT NULL,
    bill_to     text,
    bill_line1  text,
    amount      numeric(12,2) NOT NULL{more_child}
);
CREATE INDEX ON shop.invoices ({child_key});
"""

# Added when the tables are full: checked once, and not row by row.
FOREIGN_KEYS = """
ALTER TABLE shop.orders ADD FOREIGN KEY (customer_id) REFERENCES shop.customers;
ALTER TABLE shop.addresses ADD FOREIGN KEY ({child_key}) REFERENCES shop.orders ({key});
ALTER TABLE shop.invoices ADD FOREIGN KEY ({child_key}) REFERENCES shop.orders ({key});
"""

# A slice of the rows, from {first} to {last}.
PEOPLE = """(SELECT i,
    (ARRAY['Adalo','Brenka','Corvin','Delphi','Elmira','Fjorn','Gesa','Hanko','Ilva','Jorek','Kalea','Lumo'])[1 + i % 12] AS first,
    (ARRAY['Testfrau','Mustermann','Erfunden','Probe','Beispiel','Nirgendwo','Dummy'])[1 + i % 7] || ' ' || i AS last
    FROM generate_series({first}, {last}) AS i) AS p"""
ROWS = (
    "INSERT INTO shop.customers SELECT i, first, last, 'buyer' || i || '@example.invalid', '+49 555 ' || lpad(i::text, 8, '0') FROM "
    + PEOPLE,
    """INSERT INTO shop.orders SELECT {id},
        CASE WHEN i % 2 = 1 THEN (300 + i / 10000000) || '-' || lpad((i::bigint * 7919 % 10000000)::text, 7, '0') || '-'
                                 || lpad((i % 10000000)::text, 7, '0')
             ELSE 'W' || i END,
        CASE WHEN i % 2 = 1 THEN 'amazon' ELSE 'web' END, i,
        {placed},
        now() - CASE WHEN i <= 2 * {due} THEN interval '40 days' ELSE interval '10 days' END + i * interval '1 ms',
        'shipped', CASE WHEN i % 10 < 3 THEN 'Best wishes from ' || first END, (i % 20000) / 100.0 FROM """ + PEOPLE,
    """INSERT INTO shop.addresses SELECT i, {id}, first || ' ' || last, 'Nowhere Street ' || i % 200,
        CASE WHEN i % 4 = 0 THEN 'Floor ' || i % 9 ELSE '' END, lpad((i % 99999)::text, 5, '0'), 'Town ' || i % 5000, 'DE',
        CASE WHEN i % 2 = 1 THEN '+49 555 ' || lpad(i::text, 8, '0') END{value} FROM """ + PEOPLE,
    """INSERT INTO shop.invoices SELECT i, 'INV-' || lpad(i::text, 9, '0'), {id}, now() - interval '40 days', first || ' ' || last,
        'Nowhere Street ' || i % 200, (i % 20000) / 100.0{value} FROM """ + PEOPLE,
)
SLICE = 100_000

# The personal columns, and what they hang on: the baselines and the policy are made of the same list.
PII = {
    "orders": ("o.id = d.id", ["gift_message"]),
    "addresses": ("o.order_id = d.id", ["name", "line1", "line2", "zip", "city", "phone"]),
    "customers": ("o.id = d.customer_id", ["first_name", "last_name", "email", "phone"]),
    "invoices": ("o.order_id = d.id", ["bill_to", "bill_line1"]),
}
DUE = "channel = 'amazon' AND shipped_at <= now() - interval '30 days'"


def policy(kind="bigint", **changes):
    """The same in the words of the extension."""
    w = words(kind)
    link = dict(zip(w["child_key"].split(", "), w["key"].split(", ")))
    return {
        "policy": "shop",
        "enabled": True,
        "orders": {
            "table": "shop.orders", "number": "external_no", "amazon": "channel = 'amazon'", "anchor": "shipped_at",
            "redact": PII["orders"][1],
        },
        "linked": [
            {"table": "shop.addresses", "on": link, "redact": PII["addresses"][1]},
            {"table": "shop.customers", "on": {"id": "customer_id"}, "redact": PII["customers"][1]},
            {"table": "shop.invoices", "on": link, "redact": PII["invoices"][1]},
        ],
        **changes,
    }


# A policy under which nothing is due for years: orders are flagged, and that is all.
FAR = {"archive_after": "3000 days", "redact_after": "3001 days", "loosened": "measurement"}


def create(db, kind="bigint"):
    script = f"SET ROLE shop_owner; {SCHEMA.format(**words(kind))}"
    db.psql(script + (PARTITIONS if kind == "partitioned" else ""))


def fill(db, orders, due, kind="bigint"):
    """All rows, in slices, as an import would bring them."""
    w = words(kind)
    for first in range(1, orders + 1, SLICE):
        for statement in ROWS:
            text = statement.replace("{value}", w["value"]).replace("{placed}", w["placed"])
            db.sql(text.format(first=first, last=min(first + SLICE - 1, orders), due=due, id=w["id"]), user="shop_owner")


def make_due(db, already, due):
    """So many orders more, the oldest of those that are not."""
    for first in range(already, already + due, SLICE):
        last = min(first + SLICE, already + due)
        db.sql(f"UPDATE shop.orders SET shipped_at = shipped_at - interval '30 days' WHERE id > {2 * first} AND id <= {2 * last} "
               "AND channel = 'amazon'", user="shop_owner")


def add_foreign_keys(db, kind="bigint"):
    db.sql(FOREIGN_KEYS.format(**words(kind)), user="shop_owner")


# How many rows of each table have been overwritten, whatever did it. The first personal column of each is never empty,
# but for the gift message.
OVERWRITTEN = """
SELECT (SELECT count(*) FROM shop.addresses WHERE name = '[Redacted]' AND line1 = '[Redacted]' AND city = '[Redacted]'),
       (SELECT count(*) FROM shop.customers WHERE last_name = '[Redacted]' AND email = '[Redacted]'),
       (SELECT count(*) FROM shop.invoices WHERE bill_to = '[Redacted]'),
       (SELECT count(*) FROM shop.orders WHERE {due} AND gift_message <> '[Redacted]')
""".format(due=DUE)


def check_overwritten(db, orders):
    """What is compared must have done the same work."""
    found = db.sql(OVERWRITTEN)[0]
    if found != (orders, orders, orders, 0):
        raise SystemExit(f"error: {orders} orders should have been overwritten, and {found} were")
