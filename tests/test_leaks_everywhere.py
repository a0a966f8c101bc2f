"""P9, as somebody would look who wants the data: what is planted is found wherever is searched, and of the canaries nothing is,
whatever fails, whoever asks, and on a cold server."""
import json

import psycopg2
import pytest
from cluster import wait_until
from cold import DATABASE, FOREIGN, cold_server, join, status
from leaks import (  # noqa: F401, fixtures are used by their names
    CANARY, EXPLAIN, LOUD, Listener, apply, assert_nothing_leaked, aviary, load, log_libraries, loud, places, policy, shout,
    traces, with_canaries,
)
from support import PLACEHOLDER, Background, go_on, number, order_value, run_cycle, stop_at, stopped, tables_with

TREATED = {"orders", "customers", "addresses", "invoices", "invoice_lines", "payloads"}


def caged(db):
    """Before a cycle: each table has canaries, so a search that finds none elsewhere says something."""
    assert set(tables_with(db, CANARY, TREATED)) == TREATED


def put_in_force(db, document, listener=None):
    """When the canaries have been seen, and not before: a worker is woken by it."""
    apply(db, {**document, "enabled": False}, listener)
    caged(db)
    db.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")


def archived(db):
    """After it: the archive has them all. The caller is the only one to see them."""
    with db.session("pii_operator").cursor() as cursor:
        cursor.execute("SELECT amazon_pii.peek(%s, 'return')::text", [number(1)])
        peeked = cursor.fetchone()[0]
    assert all(CANARY + letter in peeked for letter in "ABCDEFGHIJKL")


def test_what_is_planted_is_found(aviary):
    """Breaks when one of the searches looks at nothing, or at something else than it says."""
    listener = Listener(aviary)
    put_in_force(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    archived(aviary)
    plain = places(aviary, ())
    assert with_canaries(plain) == {}
    aviary.sql(f"DO $$ BEGIN RAISE LOG '%', repeat('', 1) || '{CANARY[:6]}' || '{CANARY[6:]}'; END $$")
    aviary.sql("UPDATE amazon_pii.order_state SET last_error = %s", [CANARY])
    aviary.sql("UPDATE amazon_pii.run SET note = %s", [CANARY.lower()])
    aviary.sql("UPDATE amazon_pii_archive.document SET table_name = table_name || '\\x' || %s WHERE order_key = '[\"2\"]'",
               [CANARY.encode().hex()])
    aviary.sql(f'SELECT 1 AS "{CANARY}"')
    aviary.sql("ANALYZE amazon_pii.order_state, amazon_pii.run")
    aviary.sql(f"NOTIFY amazon_pii, '{CANARY}'")
    listener.call(f"SELECT '{CANARY}' AS result")
    with aviary.connect("pii_admin") as session:
        # An idle session's last query is shown for as long as it is there.
        session.cursor().execute(f"SELECT '{CANARY}' AS seen")
        wait_until(lambda: any(CANARY in query for _, query, _ in listener.seen))
    session.close()
    said = listener.end()
    assert CANARY in listener.payloads
    expected = {"log", "messages", "dump", "amazon_pii.order_state", "amazon_pii.orders", "amazon_pii.run", "amazon_pii.runs",
                "amazon_pii_archive.document", "statistics of our tables"}
    if "pg_stat_statements" in log_libraries():
        expected.add("pg_stat_statements")
    found = with_canaries(places(aviary, said))
    assert expected <= set(found), expected - set(found)


FAILURES = {
    # The key that the server quotes has a column that keeps its canary.
    "unique": ("23505", "CREATE UNIQUE INDEX ON shop.addresses (kind, name) WHERE name = '[Redacted]'"),
    # The server quotes the whole row.
    "check": ("23514", "ALTER TABLE shop.addresses ADD CHECK (name <> '[Redacted]')"),
    # The cast of the trigger quotes the value.
    "cast": ("22P02", "PERFORM OLD.name::int;"),
    "json": ("22P02", "PERFORM OLD.name::jsonb;"),
    "date": ("22007", "PERFORM OLD.name::date;"),
    "raised": ("P0001", "RAISE EXCEPTION '%', OLD USING DETAIL = OLD::text, HINT = OLD::text;"),
    "named": ("23505", "RAISE unique_violation USING MESSAGE = OLD::text, COLUMN = OLD.name, CONSTRAINT = OLD.city, TABLE = OLD.line1;"),
    # In a statement's text, which becomes the error's context.
    "dynamic": ("42601", "EXECUTE 'SELECT 1 FROM WHERE ' || quote_literal(OLD.name);"),
    "relation": ("42P01", "EXECUTE format('SELECT FROM %I', OLD.name);"),
    "deferred": ("P0001", "RAISE EXCEPTION '%', OLD;"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_nothing_leaks_from_failures_of_a_cycle(aviary, kind):
    """Breaks when what fails under a cycle is told in the server's words, or the shop's."""
    sqlstate, what = FAILURES[kind]
    listener = Listener(aviary)
    aviary.sql("UPDATE shop.addresses SET kind = name", user="shop_owner")
    apply(aviary, policy(enabled=False), listener)
    caged(aviary)
    if kind in ("unique", "check"):
        aviary.sql(what, user="shop_owner")
    else:
        when = "CONSTRAINT TRIGGER fail AFTER UPDATE ON shop.addresses DEFERRABLE INITIALLY DEFERRED" if kind == "deferred" else \
            "TRIGGER fail BEFORE UPDATE ON shop.addresses"
        aviary.sql(f"CREATE FUNCTION shop.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {what} RETURN NEW; END $$; "
                   f"CREATE {when} FOR EACH ROW EXECUTE FUNCTION shop.fail()", user="shop_owner")
    listener.call("SELECT amazon_pii.enable_policy('shop')")
    listener.call("CALL amazon_pii.run_cycle('shop')")
    failed = aviary.sql("SELECT last_error FROM amazon_pii.orders WHERE status = 'failed'")
    # Of rows that become alike the first may.
    assert len(failed) == (3 if kind == "unique" else 4) and all(sqlstate in error for (error,) in failed), failed
    assert aviary.value("SELECT count(*) FROM shop.addresses WHERE name <> %s", [PLACEHOLDER]) == len(failed)
    for order in (1, 4):
        listener.call("SELECT * FROM amazon_pii.explain_order(%s)", [number(order)])
    listener.call("SELECT * FROM amazon_pii.preview('shop')")
    listener.call("SELECT * FROM amazon_pii.check_policy(%s::jsonb)", [json.dumps(policy())])
    assert_nothing_leaked(aviary, listener.end())


def test_a_cycle_that_is_watched(aviary):
    """Breaks when a cycle shows values while it is at work: in its statement, its progress, what it waits for."""
    listener = Listener(aviary)
    apply(aviary, policy(enabled=False), listener)
    caged(aviary)
    stop_at(aviary, "customers", 3)
    aviary.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    # The worker and a CALL: one of them has the turn.
    cycle = Background(aviary, "CALL amazon_pii.run_cycle('shop')")
    at_work = stopped(aviary)
    # All that a superuser can see of it, with rows in its hands.
    views = aviary.sql("SELECT viewname FROM pg_views WHERE schemaname = 'pg_catalog' AND viewname ~ '^pg_(stat_|locks|prepared|cursors|backend_)'")
    assert len(views) > 30
    for (view,) in views:
        try:
            listener.heard += [str(row) for row in aviary.sql(f"SELECT * FROM pg_catalog.{view}")]
        except psycopg2.Error as e:
            assert e.pgcode in ("0A000", "55000"), (view, e)
    activity = "SELECT query FROM pg_stat_activity WHERE pid = %s"
    assert aviary.value(activity, [at_work])
    aviary.sql("SELECT pg_log_backend_memory_contexts(%s)", [at_work])
    go_on(aviary)
    aviary.sql("SELECT pg_cancel_backend(%s)", [at_work])
    try:
        cycle.result()
    except psycopg2.Error as e:
        listener.heard += [str(e), str(e.diag.context)]
    wait_until(lambda: run_cycle(aviary, "shop") and order_value(aviary, 3) == "redacted")
    archived(aviary)
    said = listener.end()
    assert any(pid == at_work and query for pid, query, _ in listener.seen)
    assert any(pid == cycle.pid and "run_cycle" in query for pid, query, _ in listener.seen)
    assert_nothing_leaked(aviary, said)


def test_bound_parameters_are_in_the_log_and_no_value_is(aviary):
    """Breaks when what a call opens becomes a parameter that the server logs: the client's are, in full."""
    put_in_force(aviary, policy())
    run_cycle(aviary, "shop")
    archived(aviary)
    script = aviary.cluster.base / "bound.sql"
    long = "Zeisig" + "z" * 5000
    script.write_text("SELECT length(:long);\nSELECT count(*) FROM amazon_pii.peek(:number, :reason);\n"
                      "SELECT count(*) FROM amazon_pii.retrieve(:number, :reason);\n")
    script.chmod(0o644)
    done = aviary.cluster.client(
        "pgbench", "-n", "-M", "extended", "-t", "1", "-U", "pii_operator", "-f", script, "-D", f"long={long}", "-D",
        f"number={number(1)}", "-D", "reason=return", aviary.name)
    assert "actually processed: 1/1" in done.stdout, done.stdout
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == CANARY + "D"
    log = aviary.cluster.log_text()[aviary.log_from:]
    assert f"$1 = '{long}'" in log and f"$1 = '{number(1)}', $2 = 'return'" in log
    assert_nothing_leaked(aviary)


def test_nothing_leaks_to_those_who_check(aviary):
    """Breaks when evidence, the check of the audit log, a used-up quota or an alarm shows a value."""
    listener = Listener(aviary)
    put_in_force(aviary, policy(retrievals_per_day=1), listener)
    run_cycle(aviary, "shop")
    archived(aviary)
    shout(aviary, "addresses", "customers")
    for function in ("peek", "retrieve"):
        listener.call(f"SELECT * FROM amazon_pii.{function}(%s, 'return')", [number(2)], "pii_operator", error="53400")
    aviary.sql("SELECT amazon_pii.set_canary(%s)", [number(4)], "pii_admin")
    listener.call("SELECT * FROM amazon_pii.peek(%s, %s)", [number(4), CANARY[:3] + "@example.invalid"], "pii_operator", error=True)
    for user in ("nobody_special", "pii_auditor"):
        listener.call("SELECT * FROM amazon_pii.peek(%s, 'return')", [number(1)], user, error="42501")
    for _ in range(2):
        listener.call("SELECT amazon_pii.evidence('shop')", user="pii_auditor")
        listener.call("SELECT * FROM amazon_pii.verify_audit_log()", user="pii_auditor")
        listener.call("SELECT amazon_pii.certificate(%s)", [number(1)], "pii_admin")
        listener.call("SELECT * FROM amazon_pii.find_orders(%s)", [number(1)], "pii_operator")
        # The second time somebody has been at the log.
        aviary.sql("ALTER TABLE amazon_pii.audit_entry DISABLE TRIGGER append_only; "
                   "UPDATE amazon_pii.audit_entry SET reason = 'another' WHERE action = 'peek'; "
                   "ALTER TABLE amazon_pii.audit_entry ENABLE TRIGGER append_only")
    assert any("'error'" in heard for heard in listener.heard), "the changed entry is not found"
    assert aviary.value("SELECT count(*) FROM amazon_pii.access_count WHERE refused > 0") > 0
    assert_nothing_leaked(aviary, listener.end())


def test_an_archive_that_was_tampered_with(aviary):
    """Breaks when what does not open, or belongs elsewhere, is quoted in the error."""
    listener = Listener(aviary)
    put_in_force(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    archived(aviary)
    aviary.sql("UPDATE amazon_pii_archive.document SET sealed = (SELECT d.sealed FROM amazon_pii_archive.document AS d "
               "WHERE d.order_key = '[\"2\"]' AND d.table_name = 'shop.orders') WHERE order_key = '[\"1\"]' AND table_name = 'shop.orders'")
    for call in ("peek(%s, 'return')", "retrieve(%s, 'return')"):
        listener.call(f"SELECT * FROM amazon_pii.{call}", [number(1)], "pii_operator", error=True)
    listener.call("SELECT * FROM amazon_pii.unflag(%s, 'wrong')", [number(1)], error=True)
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == PLACEHOLDER
    assert_nothing_leaked(aviary, listener.end())


@pytest.fixture
def cold():
    conf = [line for line in LOUD if not line.startswith("client_min_messages")]
    libraries = log_libraries()
    if libraries:
        conf.append(f"shared_preload_libraries = '{', '.join(libraries)}'")
    server = cold_server(conf=conf + (EXPLAIN if "auto_explain" in libraries else []))
    if "pg_stat_statements" in libraries:
        server.sql("CREATE EXTENSION pg_stat_statements", dbname=DATABASE)
    yield server
    server.destroy()


# On the cold server, a trigger that tells all it gets, and refuses the documents of one order.
SPY = """
CREATE FUNCTION cold.spy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE LOG 'spied: %', NEW;
    IF NEW.order_key = '["2"]' THEN
        RAISE EXCEPTION 'refused: %', NEW USING DETAIL = NEW::text, ERRCODE = '23514';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER spy BEFORE INSERT ON cold.document FOR EACH ROW EXECUTE FUNCTION cold.spy();
"""


def test_nothing_leaks_to_a_cold_server(aviary, cold):
    """Breaks when the cold server gets a value in clear, or a data key or the master key; or when its errors are told on here."""
    aviary.need_contrib("postgres_fdw")
    join(aviary, cold)
    cold.sql(SPY, dbname=DATABASE)
    listener = Listener(aviary)
    put_in_force(aviary, policy(archive=FOREIGN), listener)
    listener.call("CALL amazon_pii.run_cycle('shop')")
    assert order_value(aviary, 2) != "redacted" and order_value(aviary, 1) == "redacted"
    archived(aviary)
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator")
    listener.call("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    listener.call("CALL amazon_pii.run_cycle('shop')")
    listener.call("SELECT * FROM amazon_pii.verify('shop')", user="pii_auditor")
    listener.call("SELECT amazon_pii.erase(%s, 'asked')", [number(3)])
    listener.call("SELECT amazon_pii.shred(%s, 'asked')", [number(3)])
    listener.call("CALL amazon_pii.run_cycle('shop')")
    listener.heard.append(str(status(aviary)))
    there = {
        "log": cold.log_text(),
        "dump": cold.client("pg_dump", DATABASE).stdout,
        "documents": str(cold.documents("order_key, table_name, record_key, version, encode(sealed, 'escape'), key_id")),
    }
    if "pg_stat_statements" in log_libraries():
        there["statements"] = str(cold.sql("SELECT query FROM pg_stat_statements", dbname=DATABASE))
        assert "INSERT INTO cold.document" in there["statements"]
    # What is sent is seen there.
    sealed = cold.sql("SELECT encode(sealed, 'hex') FROM cold.document WHERE order_key = '[\"1\"]' LIMIT 1", dbname=DATABASE)[0][0]
    assert sealed in there["log"] and sealed in there["dump"] and "refused: " in there["log"] and "spied: " in there["log"]
    secret = [bytes(w).hex() for (w,) in aviary.sql("SELECT wrapped FROM amazon_pii_archive.data_key")]
    secret.append(aviary.cluster.key_file.read_text().strip())
    assert len(secret) >= 4
    assert with_canaries(there) == {}
    assert [place for place, text in there.items() if traces(text.lower(), secret)] == []
    assert traces(aviary.cluster.log_text()[aviary.log_from:].lower(), secret[-1:]) == []
    assert with_canaries(places(aviary, listener.end())) == {}
