"""What several test files need: the shop of fixtures/shop.sql with many orders, and statements in the background."""
import copy
import threading
from pathlib import Path

from cluster import wait_until

FIXTURES = Path(__file__).resolve().parent / "fixtures"
PLACEHOLDER = "[Redacted]"

SHOP_POLICY = {
    "policy": "shop",
    "enabled": True,
    "orders": {
        "table": "shop.orders", "key": ["id"], "number": "external_no", "amazon": "channel = 'amazon'", "anchor": "shipped_at",
        "redact": {"gift_message": "placeholder", "shop_note": "placeholder"},
    },
    "linked": [
        {"table": "shop.addresses", "on": {"order_id": "id"}, "redact": ["name", "line1", "line2", "city", "zip", "phone"]},
        {"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["first_name", "last_name", "email", "phone"],
         "role": "customer"},
        {"table": "shop.invoices", "as": "invoices", "on": {"order_id": "id"}, "number": "invoice_no",
         "not_before": "invoiced_at", "redact": ["bill_to"]},
        {"table": "shop.invoice_lines", "parent": "invoices", "on": {"invoice_id": "id"}, "redact": ["note"]},
    ],
}


def shop_policy(**changes):
    """The policy for fixtures/shop.sql; `changes` replace its members."""
    return {**copy.deepcopy(SHOP_POLICY), **changes}


def order_number(order):
    """The number that fill() gives to an order."""
    return f"100-{order:07d}-{order % 10_000_000:07d}"


# Each value names its row, so that a test can tell what it was, and whether it is still there.
FILL = """
INSERT INTO shop.customers SELECT c, 'First ' || c, 'Last ' || c, 'c' || c || '@example.invalid', '+49 30 ' || c
  FROM (SELECT DISTINCT (i + {share} - 1) / {share} AS c FROM generate_series({first}, {last}) AS i) AS s
  ON CONFLICT DO NOTHING;
INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at, gift_message, shop_note, total)
  SELECT i, '100-' || lpad(i::text, 7, '0') || '-' || lpad((i % 10000000)::text, 7, '0'), '{channel}', (i + {share} - 1) / {share},
         now() - '{age}'::interval, 'Gift ' || i, CASE WHEN i % 2 = 0 THEN 'Note ' || i END, i
  FROM generate_series({first}, {last}) AS i;
INSERT INTO shop.addresses (order_id, name, line1, line2, city, zip, phone)
  SELECT i, 'Name ' || i, 'Street ' || i, '', 'Town ' || i, lpad(i::text, 5, '0'), NULL FROM generate_series({first}, {last}) AS i;
INSERT INTO shop.invoices SELECT i, 'INV-' || i, i, now() - '{age}'::interval, 'Bill ' || i, i
  FROM generate_series({first}, {last}) AS i WHERE i % 3 = 0;
INSERT INTO shop.invoice_lines SELECT i * 10 + n, i, 'Line ' || i || '.' || n
  FROM generate_series({first}, {last}) AS i, generate_series(1, 2) AS n WHERE i % 3 = 0;
"""


def open_shop(db):
    """Creates the tables of fixtures/shop.sql."""
    db.psql(FIXTURES / "shop.sql")
    return db


def fill(db, last, first=1, age="40 days", share=1, channel="amazon"):
    """Orders `first` to `last`, dispatched `age` ago; `share` of them have one customer. Every third has an invoice."""
    with db.connect("shop_owner") as connection, connection.cursor() as cursor:
        cursor.execute(FILL.format(first=first, last=last, age=age, share=share, channel=channel))


def run_cycle(db, policy=None, user="pii_admin"):
    """CALL run_cycle(); its counts by name."""
    row = db.sql("CALL amazon_pii.run_cycle(%s)", [policy], user)[0]
    return dict(zip(("flagged", "archived", "redacted", "failed", "overdue"), row))


# For each order: how many of its cells still hold what fill() wrote, how many hold the placeholder, how many neither.
CELLS = """
SELECT o.id, count(*) FILTER (WHERE v = original), count(*) FILTER (WHERE v = '[Redacted]'),
       count(*) FILTER (WHERE v NOT IN (original, '[Redacted]'))
  FROM shop.orders AS o
  LEFT JOIN LATERAL (
       SELECT o.gift_message, 'Gift ' || o.id
       UNION ALL SELECT o.shop_note, 'Note ' || o.id WHERE o.id % 2 = 0
       UNION ALL SELECT x.v, x.original FROM shop.addresses AS a, LATERAL (VALUES (a.name, 'Name ' || o.id),
                 (a.line1, 'Street ' || o.id), (a.city, 'Town ' || o.id), (a.zip, lpad(o.id::text, 5, '0'))) AS x (v, original)
                 WHERE a.order_id = o.id
       UNION ALL SELECT i.bill_to, 'Bill ' || o.id FROM shop.invoices AS i WHERE i.order_id = o.id
       UNION ALL SELECT l.note, 'Line ' || o.id || '.' || l.id % 10 FROM shop.invoices AS i
                 JOIN shop.invoice_lines AS l ON l.invoice_id = i.id WHERE i.order_id = o.id
  ) AS c (v, original) ON true
 GROUP BY o.id
"""


def cells_of(order):
    """How many cells with PII fill() gave to an order, its customer's apart."""
    return 5 + (order % 2 == 0) + 3 * (order % 3 == 0)


def states(db):
    """Whether each order is 'original' or 'redacted' as a whole; anything else is half done and fails."""
    found = {}
    for order, original, redacted, other in db.sql(CELLS):
        assert (original, redacted, other) in ((cells_of(order), 0, 0), (0, cells_of(order), 0)), (
            f"order {order}: {original} original cells, {redacted} redacted, {other} neither, of {cells_of(order)}"
        )
        found[order] = "original" if original else "redacted"
    return found


def order_row(db, order, columns="status"):
    """Columns of amazon_pii.orders for one order of the shop."""
    return db.sql(f"SELECT {columns} FROM amazon_pii.orders WHERE order_key = %s", [f'["{order}"]'])[0]


class Background(threading.Thread):
    """A statement in a session of its own; result() gives its rows or raises its error."""

    def __init__(self, db, query, params=None, user="pii_admin", **options):
        super().__init__(daemon=True)
        self.connection = db.connect(user, **options)
        self.pid = self.connection.info.backend_pid
        self._job = (query, params)
        self._rows = self._error = None
        self.start()

    def run(self):
        try:
            with self.connection.cursor() as cursor:
                cursor.execute(*self._job)
                self._rows = cursor.fetchall() if cursor.description else None
        except Exception as error:  # noqa: BLE001, whatever it is, result() raises it
            self._error = error

    def result(self, timeout=60):
        self.join(timeout)
        assert not self.is_alive(), "the statement in the background does not end"
        self.connection.close()
        if self._error is not None:
            raise self._error
        return self._rows

    def wait_for_lock(self, db, timeout=30):
        """Until the statement waits for a lock of whatever kind."""
        waiting = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        wait_until(lambda: db.value(waiting, [self.pid]), timeout, 0.005, "the statement waits for no lock")
        return self
