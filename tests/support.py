"""What several test files need: the shop of fixtures/shop.sql with many orders, and statements in the background."""
import copy
import re
import shutil
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg2
import pytest
from cluster import MAJOR, Cluster, wait_until

FIXTURES = Path(__file__).resolve().parent / "fixtures"
PLACEHOLDER = "[Redacted]"
uses_merge = pytest.mark.skipif(MAJOR < 15, reason="MERGE came with PostgreSQL 15")

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
         now() - '{age}'::interval + i * '1 ms'::interval, 'Gift ' || i, CASE WHEN i % 2 = 0 THEN 'Note ' || i END, i
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
    """Orders `first` to `last`, dispatched `age` ago one after the other; `share` of them have one customer. Every third
    has an invoice."""
    with closing(db.connect("shop_owner")) as connection, connection.cursor() as cursor:
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


# Orders one by one, each cell naming its row, and what became of them.

TABLES = ("orders", "customers", "addresses", "invoices", "invoice_lines")


def number(order):
    """The Amazon order number that add_order() gives to an order."""
    return f"303-1234567-{order:07d}"


def add_customer(db, customer):
    db.sql("INSERT INTO shop.customers (id, first_name, last_name, email, phone) VALUES (%s, %s, %s, %s, %s)",
           [customer, f"First{customer}", f"Last{customer}", f"buyer{customer}@example.invalid", f"+49 555 {customer:04d}"],
           "shop_owner")


def add_order(db, order, shipped="40 days", channel="amazon", customer=None):
    """An order with one address, dispatched that long ago; `None` is not yet."""
    db.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at, gift_message, shop_note, total) "
           "VALUES (%s, %s, %s, %s, now() - %s::interval, %s, %s, 10.10)",
           [order, number(order), channel, customer, shipped, f"Gift{order}", f"Note{order}"], "shop_owner")
    db.sql("INSERT INTO shop.addresses (order_id, name, line1, city, zip, phone) VALUES (%s, %s, %s, %s, %s, %s)",
           [order, f"Name{order}", f"Street {order}", f"City{order}", f"Z{order}", f"+49 666 {order:04d}"], "shop_owner")


def add_invoice(db, invoice, order, age="40 days"):
    db.sql("INSERT INTO shop.invoices VALUES (%s, %s, %s, now() - %s::interval, %s, 10.10)",
           [invoice, f"INV-{invoice}", order, age, f"BillTo{invoice}"], "shop_owner")
    db.sql("INSERT INTO shop.invoice_lines VALUES (%s, %s, %s)", [invoice, invoice, f"LineNote{invoice}"], "shop_owner")


def sweep(db, policy=None):
    """One cycle that also looks at every order; its counts by name."""
    row = db.sql("CALL amazon_pii.run_cycle(%s, true)", [policy], "pii_admin")[0]
    return dict(zip(("flagged", "archived", "redacted", "failed", "overdue"), row))


def order_value(db, order, column="status", policy="shop"):
    """A column of amazon_pii.orders, None where the order is not flagged."""
    rows = db.sql(f"SELECT {column} FROM amazon_pii.orders WHERE policy = %s AND order_key = %s", [policy, f'["{order}"]'])
    return rows[0][0] if rows else None


def record_states(db, table, record, policy="shop"):
    """{order id: status} of one row of the shop's, for every order that lists it."""
    rows = db.sql("SELECT (order_key::jsonb)->>0, status FROM amazon_pii.records WHERE policy = %s AND table_name = %s "
                  "AND record_key = %s", [policy, table, f'["{record}"]'])
    return {int(order): status for order, status in rows}


def snapshot(db, tables=TABLES, schema="shop"):
    """Every row of the tables, as text."""
    return {t: [r[0] for r in db.sql(f'SELECT t::text FROM {schema}."{t}" AS t ORDER BY t::text')] for t in tables}


def tables_with(db, word, tables=TABLES, schema="shop"):
    """The tables in which a row holds the word."""
    return [t for t, rows in snapshot(db, tables, schema).items() if any(word in row for row in rows)]


@contextmanager
def refused(sqlstate, words=""):
    """The block must end in an error of the server with this SQLSTATE and these words; gives what pytest.raises gives."""
    with pytest.raises(psycopg2.Error) as caught:
        yield caught
    assert caught.value.pgcode == sqlstate, f"{caught.value.pgcode}: {caught.value}"
    assert words in str(caught.value)


# The update of a row that is listed in shop.stop takes ten minutes: there a cycle can be caught in the act.
STOP = """
CREATE TABLE shop.stop (table_name text, id bigint);
CREATE FUNCTION shop.stop() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM shop.stop AS s WHERE s.table_name = TG_TABLE_NAME AND s.id = NEW.id) THEN
        PERFORM pg_catalog.pg_sleep(600);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER stop BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.stop();
CREATE TRIGGER stop BEFORE UPDATE ON shop.addresses FOR EACH ROW EXECUTE FUNCTION shop.stop();
CREATE TRIGGER stop BEFORE UPDATE ON shop.customers FOR EACH ROW EXECUTE FUNCTION shop.stop();
CREATE TRIGGER stop BEFORE UPDATE ON shop.invoice_lines FOR EACH ROW EXECUTE FUNCTION shop.stop();
"""


def payloads(listener):
    """What a session that listens was told so far: what others committed before is in its queue before the answer to a query."""
    listener.cursor().execute("SELECT 1")
    listener.poll()
    return [n.payload for n in listener.notifies]


def stop_at(db, table, row):
    """From now on the update of this row does not end; go_on() takes that back for the updates that come after it."""
    if not db.value("SELECT to_regclass('shop.stop') IS NOT NULL"):
        db.sql(STOP, user="shop_owner")
    db.sql("INSERT INTO shop.stop VALUES (%s, %s)", [table, row], user="shop_owner")


def go_on(db):
    db.sql("DELETE FROM shop.stop", user="shop_owner")


def stopped(db):
    """The process id of the session, or worker, that has come to a row of stop_at()."""
    stuck = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    return wait_until(lambda: db.sql(stuck), interval=0.01)[0][0]


def report_statistics(db, *users):
    """What the sessions of these users counted can be read when this returns."""
    if MAJOR >= 15:
        for user in (*users, "postgres"):
            db.sql("SELECT pg_stat_force_next_flush()", user=user)
        db.sql("SELECT pg_stat_clear_snapshot()")
        return
    # Before 15 a session reports for certain only when it ends, and what a reader is given may be older. Reports arrive in
    # order: when the row that the last session wrote is counted, all is.
    db.sql("CREATE TABLE IF NOT EXISTS public.reports ()")
    for user in (*users, "postgres"):
        if user == "postgres":
            db.sql("INSERT INTO public.reports DEFAULT VALUES")
        pid = db.value("SELECT pg_backend_pid()", user=user)
        db.session(user).close()
        wait_until(lambda: not db.sql("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [pid]))
    wait_until(lambda: db.value("SELECT n_tup_ins = (SELECT count(*) FROM public.reports) FROM pg_stat_user_tables WHERE relname = 'reports'"))


# Updates wait here, whoever makes them, while the gate is closed for their order and those after it.
GATE = """
CREATE TABLE shop.gate (closed_from bigint);
CREATE FUNCTION shop.wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    WHILE EXISTS (SELECT FROM shop.gate WHERE closed_from <= (to_jsonb(NEW) ->> TG_ARGV[0])::bigint) LOOP
        PERFORM pg_catalog.pg_sleep(0.01);
    END LOOP;
    RETURN NEW;
END $$;
"""


def close_gate(db, order, **tables):
    """From this order on, batches wait before they commit until open_gate(): at their addresses, and at tables whose column names it."""
    db.sql(GATE, user="shop_owner")
    for table, column in {"addresses": "order_id", **tables}.items():
        db.sql(f"CREATE TRIGGER gate BEFORE UPDATE ON shop.{table} FOR EACH ROW EXECUTE FUNCTION shop.wait_at_gate('{column}')", user="shop_owner")
    db.sql("INSERT INTO shop.gate VALUES (%s)", [order], "shop_owner")


def open_gate(db):
    db.sql("DELETE FROM shop.gate", user="shop_owner")


def at_gate(db, processes=1):
    """Until that many processes have looked at what their batches share, and have come to the gate."""
    asleep = "SELECT count(DISTINCT pid) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    wait_until(lambda: db.value(asleep) == processes, 120, 0.002)


# The archive, and values bit by bit.


def absent(db, what):
    """Whether a type or script needs something that this server came without: a contrib module, ICU, or libxml."""
    for extension in ("citext", "hstore", "ltree", "cube"):
        if re.search(rf"\b{extension}\b", what) and not db.has_contrib(extension):
            return True
    if re.search(r"\bxml\b", what):
        try:
            return not db.value("SELECT xml_is_well_formed('<a/>')")
        except psycopg2.errors.FeatureNotSupported:
            return True
    return "blind" in what and not db.value("SELECT EXISTS (SELECT FROM pg_collation WHERE collname LIKE '%-x-icu')")


def psql_here(db, script):
    """Runs a script without the lines that this server cannot run; citext becomes text where there is none."""
    lines = [line for line in script.splitlines() if not (line.startswith(("CREATE EXTENSION", "CREATE COLLATION")) and absent(db, line))]
    kept = "\n".join(lines)
    db.psql(kept if db.has_contrib("citext") else re.sub(r"\bcitext\b", "text", kept))


def hurry(db):
    """Ends the growing wait of failed orders, and of rows whose flagging failed."""
    db.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL; UPDATE amazon_pii.touched SET next_attempt_at = now()")


def retrieve(db, order_number, reason="customer asks about a return"):
    return db.sql("SELECT * FROM amazon_pii.retrieve(%s, %s)", [order_number, reason], "pii_operator")


def end_retrieval(db, order_number):
    db.sql("SELECT amazon_pii.end_retrieval(%s)", [order_number], "pii_operator")


def documents(db, schema="amazon_pii_archive"):
    """Archived documents as {(order key, table, record key, version): sealed bytes}."""
    rows = db.sql(f"SELECT order_key, table_name, record_key, version, sealed FROM {schema}.document")
    return {tuple(row[:4]): bytes(row[4]) for row in rows}


def has_turn(db, pid):
    """Whether a session has the turn of a policy; None if it does not even wait for it."""
    held = "SELECT bool_and(granted) FROM pg_locks WHERE locktype = 'object' AND classid = 'amazon_pii.policy'::regclass AND pid = %s"
    return db.value(held, [pid])


def queue_for_turn(db, session):
    """A session that waits for the policy's turn, in a thread that ends when it has it."""
    waiter = threading.Thread(target=lambda: session.cursor().execute("SELECT amazon_pii.take_turn('shop')"), daemon=True)
    waiter.start()
    wait_until(lambda: has_turn(db, session.info.backend_pid) is False)
    return waiter


def between_archiving_and_redacting(db, turn):
    """A cycle that has committed its first copies and waits for its turn to overwrite; `turn` keeps it waiting."""
    table = db.connect(autocommit=False)
    table.cursor().execute("LOCK TABLE amazon_pii_archive.document IN SHARE MODE")
    call = Background(db, "CALL amazon_pii.run_cycle()").wait_for_lock(db)
    waiter = queue_for_turn(db, turn)
    table.commit()
    waiter.join(30)
    wait_until(lambda: has_turn(db, call.pid) is False)
    return call


@contextmanager
def backup_of(cluster, *settings, recover=False, standby=False, **options):
    """A running cluster that was made from a base backup: started as it is, or recovered, or as a standby."""
    made = Cluster(**options)
    try:
        shutil.rmtree(made.data)
        where = ["-h", cluster.base, "-p", cluster.port, "-U", "postgres"]
        made.run("pg_basebackup", *where, "-D", made.data, "-c", "fast", *(["-R"] if standby else []))
        made.configure(f"unix_socket_directories = '{made.base}'", *settings)
        if recover:
            signal = made.data / "recovery.signal"
            signal.touch()
            shutil.chown(signal, made.owner.pw_uid, made.owner.pw_gid)
        made.start()
        yield made
    finally:
        made.destroy()


def standby_of(primary, *settings, **options):
    """A running standby of a cluster."""
    return backup_of(primary, *settings, standby=True, **options)
