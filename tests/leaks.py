"""An aviary: a shop in whose rows canaries sit, on a server that logs all it can, and whoever looks for the canaries elsewhere."""
import io
import json
import threading
from pathlib import Path

import psycopg2
import pytest
from cluster import pg_config
from conftest import add_extension, new_database, server_with
from support import number, open_shop, payloads, shop_policy

CANARY = "Kanarienvogel"
# As text, in other case, and as bytea is shown.
TRACES = (CANARY, CANARY.lower(), CANARY.encode().hex())

LOUD = [
    "log_min_messages = debug1", "log_min_error_statement = debug1", "log_error_verbosity = verbose", "log_statement = all",
    "log_min_duration_statement = 0", "log_duration = on", "log_lock_waits = on", "client_min_messages = debug1",
    "log_parameter_max_length = -1", "log_parameter_max_length_on_error = -1", "track_activity_query_size = 100kB", "debug_print_plan = on",
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
    """Collects what the server says to clients: notices, notifications, errors, results that must hold no value, and what
    pg_stat_activity shows."""

    def __init__(self, db):
        self.db = db
        self.heard = []
        self.seen = set()
        self.payloads = []
        self.listening = db.connect("nobody_special")
        self.listening.cursor().execute("LISTEN amazon_pii")
        self._watching = db.connect()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        with self._watching.cursor() as cursor:
            while not self._end.wait(0.005):
                cursor.execute("SELECT pid, query, application_name FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
                self.seen.update(cursor.fetchall())

    def call(self, query, params=None, user="pii_admin", error=False, secret=False):
        """Runs a statement; its notices and its error are listened to, and its rows, unless they are a secret of the caller's.
        `error` may be the SQLSTATE."""
        session = self.db.connect(user)
        try:
            with session.cursor() as cursor:
                cursor.execute(query, params)
                assert not error, "the call was to fail"
                rows = cursor.fetchall() if cursor.description else None
                if not secret:
                    self.heard.append(str(rows))
                return rows
        except psycopg2.Error as e:
            assert error in (True, e.pgcode), e
            self.heard += [str(e)] + [str(getattr(e.diag, f)) for f in dir(e.diag) if not f.startswith("_")]
        finally:
            self.heard += session.notices
            session.close()

    def end(self):
        self._end.set()
        self._thread.join()
        self.payloads = payloads(self.listening)
        assert self.payloads and self.seen
        return self.heard + self.payloads + [str(row) for row in self.seen]


@pytest.fixture
def aviary(loud):
    database = new_database(loud, "template0")
    add_extension(database.cluster, database.name)
    if "pg_stat_statements" in log_libraries():
        database.sql("CREATE EXTENSION pg_stat_statements; SELECT pg_stat_statements_reset()")
    # What another test left in the log is no leak of this one's.
    database.log_from = len(loud.log_text())
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


def places(db, heard=()):
    """All that can be read afterwards: {place: text}. The log must be one in which a canary would be seen."""
    log = db.cluster.log_text()[db.log_from:]
    assert "amazon_pii.apply_policy" in log and "duration:" in log
    if "auto_explain" in log_libraries():
        assert "Query Text" in log
    found = {"log": log, "messages": "\n".join(heard)}
    for schema in ("amazon_pii", "amazon_pii_archive"):
        relations = db.sql("SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'v')", [schema])
        assert len(relations) >= 2
        for (relation,) in relations:
            rows = db.sql(f'SELECT t::text FROM {schema}."{relation}" AS t')
            found[f"{schema}.{relation}"] = "\n".join(r[0] for r in rows)
    if "pg_stat_statements" in log_libraries():
        statements = db.sql("SELECT query FROM pg_stat_statements")
        found["pg_stat_statements"] = "\n".join(r[0] or "" for r in statements)
        assert "unnest" in found["pg_stat_statements"]
    # The shop's own rows apart, whose redacted ones are looked at elsewhere, and which a test may leave unredacted.
    found["dump"] = db.cluster.client("pg_dump", "-N", "shop", db.name).stdout
    assert "COPY amazon_pii.order_state" in found["dump"] and "COPY amazon_pii_archive.document" in found["dump"]
    found["statistics of our tables"] = "\n".join(remembered(db, "amazon_pii", "amazon_pii_archive"))
    return found


def remembered(db, *schemas):
    """What the planner knows of columns, expressions of indexes and groups of columns: values of rows."""
    db.sql("SELECT pg_stat_clear_snapshot()")
    columns = db.sql("SELECT s::text FROM pg_stats AS s WHERE schemaname = ANY (%s)", [list(schemas)])
    return [r[0] for r in columns + db.sql("SELECT s::text FROM pg_stats_ext AS s WHERE schemaname = ANY (%s)", [list(schemas)])]


def traces(text, words=TRACES):
    """What stands around each trace of a canary."""
    ends = [(text.find(w), w) for w in words]
    return [f"…{text[max(0, at - 300):at + 60]}…" for at, _ in ends if at >= 0]


def with_canaries(found):
    """{place: what stands around the canary} for the places that hold one."""
    return {place: around for place, text in found.items() if (around := traces(text))}


def assert_nothing_leaked(db, heard=()):
    """Looks for the canaries wherever they must not be."""
    found = places(db, heard)
    assert found["amazon_pii_archive.document"], "nothing was archived"
    leaks = with_canaries(found)
    assert not leaks, "\n".join(f"{place}: {around[0]}" for place, around in leaks.items())


def shouted(db):
    return db.value("SELECT is_called FROM shop.shouted")
