"""P9: no personal data outside. Rows full of canaries go through everything that can happen to them, on a server that logs
all it can, under triggers that shout; the canaries must be in the rows, sealed in the archive, and nowhere else."""
import io
import json
import threading
from pathlib import Path

import psycopg2
import pytest
from cluster import pg_config, wait_until
from conftest import add_extension, new_database, server_with
from support import PLACEHOLDER, number, open_shop, order_value, run_cycle, shop_policy

CANARY = "Kanarienvogel"
# As text, in other case, and as bytea is shown.
TRACES = (CANARY, CANARY.lower(), CANARY.encode().hex())

LOUD = [
    "log_min_messages = debug1", "log_min_error_statement = debug1", "log_error_verbosity = verbose", "log_statement = all",
    "log_min_duration_statement = 0", "log_duration = on", "log_lock_waits = on", "client_min_messages = debug1",
    "log_parameter_max_length_on_error = -1", "debug_print_plan = on",
]
EXPLAIN = [
    "auto_explain.log_min_duration = 0", "auto_explain.log_nested_statements = on", "auto_explain.log_verbose = on",
    "auto_explain.log_analyze = on", "auto_explain.log_triggers = on",
]

# Each says what it sees to whoever listens, at every level there is; for order 3 with an error.
SHOUT = """
CREATE SEQUENCE shop.shouted;
CREATE FUNCTION shop.shout() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.nextval('shop.shouted');
    RAISE DEBUG 'debug % %', OLD, NEW;
    RAISE LOG 'log % %', OLD, NEW;
    RAISE INFO 'info % %', OLD, NEW;
    RAISE NOTICE 'notice % %', OLD, NEW;
    RAISE WARNING 'warning % %', OLD, NEW USING DETAIL = OLD::text, HINT = NEW::text;
    IF TG_TABLE_NAME = 'orders' AND NEW.id = 3 THEN
        RAISE EXCEPTION 'error % %', OLD, NEW USING DETAIL = OLD::text, HINT = NEW::text;
    END IF;
    RETURN NEW;
END $$;
"""
SHOUTING = "CREATE TRIGGER shout BEFORE UPDATE ON shop.{0} FOR EACH ROW EXECUTE FUNCTION shop.shout();"
ROWS = {
    "customers (id, first_name, last_name, email, phone)": [(c, "{}A", "{}B", "{}@example.invalid", "{}C") for c in (1, 2, 3, 4)],
    "orders (id, external_no, channel, customer_id, shipped_at, gift_message, shop_note)": [
        (i, number(i), "amazon", i, "2020-01-01", "{}D", "{}E") for i in (1, 2, 3, 4)],
    "addresses (order_id, name, line1, line2, city, zip, phone)": [
        (i, "{}F", "{}G", "", "{}H", "Kanarien" + str(i), "{}I") for i in (1, 2, 3, 4)],
    "invoices (id, invoice_no, order_id, invoiced_at, bill_to)": [(1, "INV-1", 1, "2020-01-01", "{}J")],
    "invoice_lines (id, invoice_id, note)": [(1, 1, "{}K")],
    "payloads (order_id, raw)": [(1, '{{"buyer": {{"name": "{}L"}}, "total": 1.10}}')],
}


def log_libraries():
    folder = Path(pg_config("pkglibdir"))
    return [name for name in ("auto_explain", "pg_stat_statements") if (folder / f"{name}.so").exists()]


@pytest.fixture(scope="module")
def loud():
    """A server that logs whatever it can. No worker of its own accord: tests call it."""
    libraries = log_libraries()
    conf = LOUD + [f"shared_preload_libraries = '{', '.join(['amazon_pii', *libraries])}'", "amazon_pii.naptime = '1h'"]
    conf += EXPLAIN if "auto_explain" in libraries else []
    conf += ["pg_stat_statements.track = all"] if "pg_stat_statements" in libraries else []
    server = server_with(preload=True, conf=conf)
    yield server
    server.destroy()


class Listener:
    """Collects what the server says to clients: notices, notifications, errors, and what pg_stat_activity shows."""

    def __init__(self, db):
        self.db = db
        self.heard = []
        self.listening = db.connect("nobody_special")
        self.listening.cursor().execute("LISTEN amazon_pii")
        self._watching = db.connect()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        with self._watching.cursor() as cursor:
            while not self._end.wait(0.005):
                cursor.execute("SELECT query, application_name FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
                self.heard += [str(row) for row in cursor.fetchall()]

    def call(self, query, params=None, user="pii_admin", error=False):
        """Runs a statement; its notices and its error are listened to, its rows are the caller's own."""
        session = self.db.connect(user)
        try:
            with session.cursor() as cursor:
                cursor.execute(query, params)
                assert not error, "the call was to fail"
                return cursor.fetchall() if cursor.description else None
        except psycopg2.Error as e:
            assert error, e
            self.heard += [str(e)] + [str(getattr(e.diag, f)) for f in dir(e.diag) if f.startswith(("message", "context", "internal"))]
        finally:
            self.heard += session.notices
            session.close()

    def end(self):
        self._end.set()
        self._thread.join()
        self.listening.poll()
        self.heard += [n.payload for n in self.listening.notifies]
        return self.heard


@pytest.fixture
def aviary(loud):
    database = new_database(loud, "template0")
    add_extension(database.cluster, database.name)
    if "pg_stat_statements" in log_libraries():
        database.sql("CREATE EXTENSION pg_stat_statements")
    open_shop(database)
    load(database, ROWS)
    yield database
    database.drop()


def load(db, rows):
    """By COPY: what it reads is in no statement, and so not in the log by the client's own doing."""
    with db.session("shop_owner").cursor() as cursor:
        for table, lines in rows.items():
            text = "".join("\t".join(str(v).format(CANARY) for v in line) + "\n" for line in lines)
            cursor.copy_expert(f"COPY shop.{table} FROM STDIN", io.StringIO(text))


def shout(db, *tables):
    db.sql(SHOUT + "".join(SHOUTING.format(t) for t in tables), user="shop_owner")


def policy(**changes):
    document = shop_policy(**changes)
    document["linked"].append({"table": "shop.payloads", "on": {"order_id": "id"}, "redact": {"raw": {"json": ["$.buyer.name"]}}})
    return document


def apply(db, document, listener=None):
    """The document holds no canary, so it may be in the log."""
    (listener.call if listener else db.sql)("SELECT amazon_pii.apply_policy(%s::jsonb)", [json.dumps(document)], user="pii_admin")


def assert_nothing_leaked(db, heard=(), clear=True):
    """Looks for the canaries wherever they must not be. The log must be one in which they would be seen."""
    log = db.cluster.log_text()
    assert "amazon_pii.apply_policy" in log and "duration:" in log
    if "auto_explain" in log_libraries():
        assert "Query Text" in log
    places = {"log": log, "messages": "\n".join(heard)}
    for schema in ("amazon_pii", "amazon_pii_archive"):
        relations = db.sql("SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'v')", [schema])
        assert len(relations) >= 2
        for (relation,) in relations:
            rows = db.sql(f'SELECT t::text FROM {schema}."{relation}" AS t')
            places[f"{schema}.{relation}"] = "\n".join(r[0] for r in rows)
    assert places["amazon_pii_archive.document"], "nothing was archived"
    if "pg_stat_statements" in log_libraries():
        statements = db.sql("SELECT query FROM pg_stat_statements")
        places["statements"] = "\n".join(r[0] or "" for r in statements)
        assert "unnest" in places["statements"]
    for place, text in places.items():
        for trace in TRACES:
            at = text.find(trace)
            assert at < 0, f"{place}: …{text[max(0, at - 300):at + 60]}…"


def shouted(db):
    return db.value("SELECT is_called FROM shop.shouted")


def test_nothing_leaks_from_a_cycle(aviary):
    """Breaks when messages of the owner's code get through, or when a value is part of a statement, a state or an error."""
    listener = Listener(aviary)
    shout(aviary, "orders", "addresses", "customers", "invoices", "payloads")
    listener.call("SELECT * FROM amazon_pii.check_policy(%s::jsonb)", [json.dumps(policy())])
    aviary.sql("ALTER TABLE shop.orders DISABLE TRIGGER shout", user="shop_owner")
    apply(aviary, policy(), listener)
    aviary.sql("ALTER TABLE shop.orders ENABLE TRIGGER shout", user="shop_owner")
    listener.call("CALL amazon_pii.run_cycle('shop', true)")
    listener.call("SELECT * FROM amazon_pii.preview('shop')")
    listener.call("SELECT * FROM amazon_pii.explain_order(%s)", [number(3)])
    assert [order_value(aviary, i) for i in (1, 2, 3, 4)] == ["redacted", "redacted", "failed", "redacted"]
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 3") == CANARY + "D"
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == PLACEHOLDER
    assert shouted(aviary)
    assert_nothing_leaked(aviary, listener.end())


def test_nothing_leaks_from_the_worker(aviary):
    """Breaks when the worker's session logs what the pins keep quiet elsewhere."""
    shout(aviary, "addresses", "customers", "invoices")
    apply(aviary, policy())
    aviary.sql("CREATE TRIGGER shout BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.shout()", user="shop_owner")
    aviary.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    wait_until(lambda: order_value(aviary, 1) == "redacted" and order_value(aviary, 3) == "failed")
    assert shouted(aviary)
    assert_nothing_leaked(aviary)


def test_nothing_leaks_when_it_is_given_back(aviary):
    """Breaks when retrieve or peek puts a value anywhere but into the rows, or the caller's result."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    shout(aviary, "addresses", "customers", "payloads")
    given = listener.call("SELECT amazon_pii.peek(%s, 'return')::text", [number(1)], "pii_operator")
    assert given[0][0].count(CANARY) >= 12
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator")
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == CANARY + "D"
    aviary.sql("CREATE TRIGGER shout BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.shout()", user="shop_owner")
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(3)], "pii_operator", error=True)
    # The shop's own statement, with the shop's own trigger: what that one says would be no doing of ours.
    aviary.sql("ALTER TABLE shop.addresses DISABLE TRIGGER shout", user="shop_owner")
    listener.call("UPDATE shop.addresses SET city = 'Elsewhere' WHERE order_id = 1", user="shop_owner", error=True)
    aviary.sql("ALTER TABLE shop.addresses ENABLE TRIGGER shout", user="shop_owner")
    listener.call("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    listener.call("CALL amazon_pii.run_cycle('shop')")
    assert shouted(aviary)
    assert_nothing_leaked(aviary, listener.end())


def test_nothing_leaks_from_constraints(aviary):
    """Breaks when the server's own words reach anybody: a unique violation quotes the key, a check the whole row."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    aviary.sql("CREATE UNIQUE INDEX ON shop.orders (gift_message) WHERE gift_message <> '[Redacted]'; "
               "ALTER TABLE shop.addresses ADD CHECK (name = '[Redacted]') NOT VALID", user="shop_owner")
    load(aviary, {"orders (id, external_no, channel, gift_message)": [(9, "W-9", "web", "{}D")]})
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator", error=True)
    aviary.sql("DELETE FROM shop.orders WHERE id = 9", user="shop_owner")
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(2)], "pii_operator", error=True)
    listener.call("SELECT * FROM amazon_pii.unflag(%s, 'wrong')", [number(2)], error=True)
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == PLACEHOLDER
    assert_nothing_leaked(aviary, listener.end())


def test_nothing_leaks_when_it_is_looked_for(aviary):
    """Breaks when verify puts what it compares, or what it finds, anywhere: into its result, a statement, the log, its progress."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    # A copy by the server itself: no statement holds a value.
    aviary.sql("CREATE TABLE shop.copies (v text, w tsvector, x jsonb)", user="shop_owner")
    load(aviary, {"copies (v, w, x)": [("{}D", "'{}f':1", '"{}L"'), ("x", "", "[]")]})
    aviary.sql("CREATE TABLE shop.hidden (v text); ALTER TABLE shop.hidden ENABLE ROW LEVEL SECURITY; "
               "ALTER TABLE shop.hidden FORCE ROW LEVEL SECURITY", user="shop_owner")
    for scope in ("linked", "schema", "database"):
        rows = listener.call("SELECT * FROM amazon_pii.verify('shop', %s)", [scope], "pii_auditor")
        listener.heard.append(str(rows))
        assert any(column == "v" and orders for _, column, _, orders in rows) == (scope != "linked"), rows
    aviary.sql("ALTER TABLE amazon_pii_archive.data_key RENAME TO elsewhere")
    listener.call("SELECT * FROM amazon_pii.verify('shop')", user="pii_auditor", error=True)
    aviary.sql("ALTER TABLE amazon_pii_archive.elsewhere RENAME TO data_key")
    assert_nothing_leaked(aviary, listener.end())


@pytest.mark.parametrize("amazon", [
    "channel = 'amazon' AND coalesce(nullif(shop_note, 'x')::int, 0) >= 0", "channel = 'amazon' AND (shop_note::jsonb) IS NOT NULL",
    "channel = 'amazon' AND shop_note::regclass IS NOT NULL",
])
def test_nothing_leaks_from_casts(aviary, amazon):
    """Breaks when the error of an expression, which quotes the value, gets further than its SQLSTATE."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    document = policy(orders={**policy()["orders"], "amazon": amazon, "redact": ["gift_message"]})
    aviary.sql("DELETE FROM shop.invoices; DELETE FROM shop.payloads; DELETE FROM shop.addresses; DELETE FROM shop.orders", user="shop_owner")
    apply(aviary, document, listener)
    load(aviary, {"orders (id, external_no, channel, shipped_at, shop_note)": [(7, number(7), "amazon", "2020-01-01", "{}X")]})
    assert order_value(aviary, 7) == "failed"
    listener.call("CALL amazon_pii.run_cycle(NULL, true)")
    assert aviary.value("SELECT last_error FROM amazon_pii.status")
    listener.call("SELECT * FROM amazon_pii.check_policy(%s::jsonb)", [json.dumps(document)])
    listener.call("SELECT * FROM amazon_pii.preview('shop')", error=True)
    listener.call("SELECT amazon_pii.apply_policy(%s::jsonb)", [json.dumps(document)], error=True)
    assert order_value(aviary, 7, "last_error")
    assert_nothing_leaked(aviary, listener.end())
