"""What a cold server can do to us: nothing is overwritten without proof, nothing of the shop's waits, the cycle says what is wrong and
goes on by itself, and no document is there twice."""
import itertools
import os
import random
import subprocess
import threading
from contextlib import closing

import psycopg2
import pytest
from cluster import wait_until
from cold import DATABASE, FOREIGN, ROLE, back, cold_server, shop_beside, status
from conftest import server_with
from support import Background, fill, has_turn, order_number, order_value, payloads, refused, retrieve, run_cycle, shop_policy, states

LOCAL = "SELECT count(*) FROM amazon_pii_archive.document"


def documents_of(orders):
    return sum(3 + 3 * (order % 3 == 0) for order in range(1, orders + 1))


@pytest.fixture(scope="module")
def near():
    """No time limit has a part in what comes, unless a test asks for one: a slow machine is no fault of an order's."""
    server = server_with(conf=["amazon_pii.archive_timeout = '60s'", "autovacuum = off"])
    yield server
    server.destroy()


@pytest.fixture
def cold():
    server = cold_server()
    yield server
    server.destroy()


@pytest.fixture
def far(near, cold):
    db = shop_beside(near, cold)
    yield db
    db.sql("ALTER SYSTEM RESET amazon_pii.archive_timeout")
    db.cluster.reload()
    db.drop()


def hasty(db):
    """Until the test's end, accesses may take a moment only."""
    db.sql("ALTER SYSTEM SET amazon_pii.archive_timeout = '1500ms'")
    db.cluster.reload()
    wait_until(lambda: db.value("SHOW amazon_pii.archive_timeout") == "1500ms")



def shop_is_free(db):
    with closing(db.connect("shop_owner", autocommit=False)) as shop, shop.cursor() as cursor:
        cursor.execute("LOCK TABLE shop.orders, shop.addresses, shop.customers IN ACCESS EXCLUSIVE MODE NOWAIT")


def shop_is_free_meanwhile(db, pid):
    """While a cycle is at work, and waits. Before that it reads the shop's tables."""
    def free():
        if not has_turn(db, pid):
            return False
        try:
            shop_is_free(db)
        except psycopg2.errors.LockNotAvailable:
            return False
        return has_turn(db, pid)
    wait_until(free, interval=0.005, message="the shop's tables are locked for as long as the cycle waits")


def says(db, sqlstate):
    """What is wrong stands where people look."""
    row = status(db)
    assert row["down_since"] and sqlstate in row["last_error"] and "cold.document" in row["last_error"]
    assert sqlstate in db.value("SELECT last_error FROM amazon_pii.status", user="pii_auditor")


def waits(db, orders=6, sqlstate=""):
    """A cycle that cannot use the server: it ends by itself, and nothing is lost."""
    counts = run_cycle(db)
    assert (counts["redacted"], counts["failed"], counts["overdue"]) == (0, 0, orders)
    assert set(states(db).values()) == {"original"}
    says(db, sqlstate)
    shop_is_free(db)


def recovers(db, cold, orders=6):
    back(cold)
    wait_until(lambda: run_cycle(db)["overdue"] == 0, interval=0.2)
    assert set(states(db).values()) == {"redacted"}
    assert cold.places() == (documents_of(orders),) * 2
    assert db.value(LOCAL) == 0
    row = status(db)
    assert (row["unsent"], row["to_delete"], row["down_since"], row["last_error"]) == (0, 0, None, None)
    assert "'Gift 2'" in str(db.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))


def test_refused(far, cold):
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    listener = far.connect()
    with listener.cursor() as cursor:
        cursor.execute("LISTEN amazon_pii")
    cold.stop()
    waits(far, sqlstate="08001")
    waits(far, sqlstate="08001")
    with refused("22023", "08001"):
        far.apply_policy(shop_policy(archive=FOREIGN))
    recovers(far, cold)
    said = payloads(listener)
    assert sum("archive_unreachable" in s for s in said) == 1 and sum("archive_reachable" in s for s in said) == 1
    cold.stop()
    with refused("08006", "cannot be used"):
        far.sql("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator")
    with refused("08006", "cannot be used"):
        retrieve(far, order_number(2))
    assert set(states(far).values()) == {"redacted"}
    cold.start()
    assert retrieve(far, order_number(2))


@pytest.mark.parametrize("statement, undo, sqlstate", [
    (f"REVOKE INSERT ON cold.document FROM {ROLE}", f"GRANT INSERT ON cold.document TO {ROLE}", "42501"),
    (f"REVOKE SELECT ON cold.document FROM {ROLE}", f"GRANT SELECT ON cold.document TO {ROLE}", "42501"),
    ("ALTER TABLE cold.document RENAME TO away", "ALTER TABLE cold.away RENAME TO document", "42P01"),
    (f"ALTER ROLE {ROLE} SET default_transaction_read_only = on", f"ALTER ROLE {ROLE} RESET default_transaction_read_only", "25006"),
    ("CREATE FUNCTION cold.full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE disk_full; END $$; "
     "CREATE TRIGGER f BEFORE INSERT ON cold.document FOR EACH ROW EXECUTE FUNCTION cold.full()", "DROP TRIGGER f ON cold.document", "53100"),
])
def test_it_refuses_what_we_need(far, cold, statement, undo, sqlstate):
    """Permission revoked, table dropped, standby, disk full by its SQLSTATE."""
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    cold.sql(statement, dbname=DATABASE)
    far.session("pii_admin").close()
    waits(far, sqlstate=sqlstate)
    cold.sql(undo, dbname=DATABASE)
    far.session("pii_admin").close()
    recovers(far, cold)


def test_the_foreign_table_is_dropped_here(far, cold):
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    ddl = "SELECT statement FROM amazon_pii.archive_ddl() WHERE statement LIKE 'CREATE FOREIGN TABLE%'"
    statement = far.value(ddl, user="pii_admin")
    far.sql("DROP FOREIGN TABLE cold.document")
    waits(far, sqlstate="does not exist")
    far.sql(statement)
    recovers(far, cold)


def test_a_disk_that_is_full(far, cold):
    """A real one: a tablespace of a few megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    small = cold.base / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", small], check=True)
    try:
        os.chown(small, cold.owner.pw_uid, cold.owner.pw_gid)
        cold.sql(f"CREATE TABLESPACE small LOCATION '{small}'")
        cold.sql("ALTER TABLE cold.document SET TABLESPACE small", dbname=DATABASE)
        cold.sql("ALTER TABLE cold.document ALTER COLUMN sealed SET STORAGE EXTENDED", dbname=DATABASE)
        fill(far, 30)
        far.sql("UPDATE shop.orders SET gift_message = (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 6000) WHERE id > 0)",
                user="shop_owner")
        far.apply_policy(shop_policy(archive=FOREIGN))
        counts = run_cycle(far)
        assert counts["failed"] == 0 and counts["redacted"] < 30 and counts["overdue"] == 30 - counts["redacted"]
        says(far, "53100")
        kept = far.value("SELECT count(*) FROM shop.orders WHERE gift_message <> '[Redacted]'")
        assert kept == 30 - counts["redacted"]
        cold.sql("ALTER TABLE cold.document SET TABLESPACE pg_default", dbname=DATABASE)
        assert run_cycle(far)["overdue"] == 0
        assert far.value("SELECT count(*) FROM shop.orders WHERE gift_message <> '[Redacted]'") == 0
        assert cold.places() == (documents_of(30),) * 2 and far.value(LOCAL) == 0
        cold.stop()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_one_document_that_is_refused_stops_nobody_else(far, cold):
    """P3 behind a foreign table: breaks when an order that the server refuses keeps its batch from being sent."""
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    cold.sql("""ALTER TABLE cold.document ADD CONSTRAINT no CHECK (order_key <> '["2"]')""", dbname=DATABASE)
    counts = run_cycle(far)
    assert (counts["redacted"], counts["failed"]) == (5, 1)
    assert states(far)[2] == "original" and order_value(far, 2, "last_error").startswith("23514")
    cold.sql("ALTER TABLE cold.document DROP CONSTRAINT no", dbname=DATABASE)
    far.sql("UPDATE amazon_pii.order_state SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")
    recovers(far, cold)


def test_waiting_orders_wait_whatever_else_asks_the_server(far, cold):
    """Breaks when a part of the cycle that was refused first makes the rest believe that it may go on without the server."""
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    fill(far, 12, first=7)
    fill(far, 18, first=13, age="29 days 12 hours")
    run_cycle(far)
    # Archived there, and due now.
    far.sql("UPDATE shop.invoices SET invoiced_at = invoiced_at - interval '2 days'", user="shop_owner")
    far.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now() WHERE status = 'archived'")
    fill(far, 24, first=19)
    # And a key that the archive has to follow.
    far.sql("ALTER TABLE shop.orders DROP CONSTRAINT orders_customer_id_fkey", user="shop_owner")
    far.sql("UPDATE shop.customers SET id = 1004 WHERE id = 4; UPDATE shop.orders SET customer_id = 1004 WHERE id = 4", user="shop_owner")
    before = states(far)
    assert sorted(o for o, s in before.items() if s == "original") == [*range(13, 25)]
    cold.stop()
    for _ in range(2):
        counts = run_cycle(far)
        assert (counts["archived"], counts["redacted"], counts["failed"]) == (0, 0, 0)
        assert states(far) == before and far.value(LOCAL) == 0
    with refused("55000", "has yet to follow"):
        retrieve(far, order_number(4))
    recovers(far, cold, 24)
    assert "'Last 4'" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(4)], "pii_operator"))


def test_an_old_snapshot_of_the_server_gives_nothing_back(far, cold):
    """A transaction sees the cold server as it was when it asked first. Breaks when an order counts as retrieved although its documents were
    not to be seen."""
    fill(far, 2)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    with far.connect("pii_operator", autocommit=False) as session, session.cursor() as cursor:
        cursor.execute("SELECT amazon_pii.peek(%s, 'test')", [order_number(1)])
        fill(far, 4, first=3)
        assert run_cycle(far)["redacted"] == 2
        with refused("08006", "in this transaction"):
            cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'test')", [order_number(4)])
        session.rollback()
        assert order_value(far, 4) == "redacted"
        cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'test')", [order_number(4)])
        session.commit()
    assert states(far)[4] == "original"


def test_too_much_at_once_is_sent_in_parts(far, cold):
    # Breaks when a backlog that takes longer than archive_timeout never gets anywhere, or one order's slow document stops all.
    fill(far, 40)
    far.apply_policy(shop_policy(archive=FOREIGN))
    hasty(far)
    cold.sql(SLOW.replace("0.01", "0.03"), dbname=DATABASE)
    wait_until(lambda: run_cycle(far)["overdue"] == 0, 60, 0.1)
    cold.sql("DROP TRIGGER slow ON cold.document", dbname=DATABASE)
    recovers(far, cold, 40)
    fill(far, 46, first=41)
    cold.sql("""CREATE FUNCTION cold.one() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.order_key = '["44"]' THEN PERFORM pg_sleep(60); END IF; RETURN NEW; END $$""", dbname=DATABASE)
    cold.sql("CREATE TRIGGER one BEFORE INSERT ON cold.document FOR EACH ROW EXECUTE FUNCTION cold.one()", dbname=DATABASE)
    counts = run_cycle(far)
    assert (counts["redacted"], counts["failed"]) == (5, 1) and states(far)[44] == "original"
    assert "archive_timeout" in order_value(far, 44, "last_error")


def test_the_network_is_cut_without_a_reset(far, cold):
    """Breaks when an access has no end of its own, or holds anything of the shop's meanwhile."""
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    # A connection that is open, and does not know.
    assert far.sql("SELECT * FROM amazon_pii.check_archive('cold.document')", user="pii_admin") == []
    hasty(far)
    cold.wire.cut()
    cycle = threading.Thread(target=run_cycle, args=(far,), daemon=True)
    cycle.start()
    shop_is_free_meanwhile(far, far.session("pii_admin").info.backend_pid)
    cycle.join(60)
    assert not cycle.is_alive()
    assert set(states(far).values()) == {"original"}
    far.session("pii_admin").close()
    waits(far)
    recovers(far, cold)


@pytest.mark.parametrize("alone", [False, True], ids=["several orders", "one order"])
def test_the_connection_breaks_at_any_statement(far, cold, alone):
    """Instead of each packet in turn that a cycle sends: of a connection, a statement, the end of a savepoint, a commit. Breaks when the session is
    left in the middle of a transaction, with the policy's turn, or an error that is one of the server's ends the call, or is taken for the order's
    where there is only one."""
    far.apply_policy(shop_policy(archive=FOREIGN))
    other = far.connect("pii_admin", options="-c lock_timeout=20s")
    me = far.value("SELECT pg_backend_pid()", user="pii_admin")
    for packet in itertools.count(1):
        # Always the same to do, besides what waits.
        fill(far, packet, first=packet)
        cold.wire.break_at = packet
        counts = run_cycle(far)
        assert counts["failed"] == 0, (packet, far.sql("SELECT order_key, last_error FROM amazon_pii.orders WHERE last_error IS NOT NULL"))
        if cold.wire.break_at is not None:
            break
        assert far.sql("SELECT state FROM pg_stat_activity WHERE pid = %s AND xact_start IS NULL", [me]) == [("idle",)], packet
        assert far.sql("SELECT mode FROM pg_locks WHERE pid = %s", [me]) == [], packet
        if alone:
            assert run_cycle(far)["overdue"] == 0, packet
    cold.wire.break_at = None
    # Several accesses, each of several statements, have all been through it.
    assert packet > 30 and counts["overdue"] == 0
    with other.cursor() as cursor:
        cursor.execute("CALL amazon_pii.run_cycle('shop')")
    recovers(far, cold, packet)


def test_an_answer_that_takes_too_long(far, cold):
    # Breaks when amazon_pii.archive_timeout ends nothing.
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    # A cancel of our session is one, and no fault of the server's.
    with gate_on(cold):
        cycle = Background(far, "CALL amazon_pii.run_cycle('shop')")
        wait_until(lambda: cold.sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s AND wait_event_type = 'Lock'", [ROLE]))
        far.sql("SELECT pg_cancel_backend(%s)", [cycle.pid])
        with refused("57014"):
            cycle.result()
    assert status(far)["down_since"] is None
    hasty(far)
    with gate_on(cold):
        waits(far, sqlstate="archive_timeout")
    recovers(far, cold)


class gate_on:  # noqa: N801, reads as a statement
    """While it lasts nobody can use the table on the cold server."""

    def __init__(self, cold):
        self.connection = cold.connect(dbname=DATABASE, autocommit=False)

    def __enter__(self):
        with self.connection.cursor() as cursor:
            cursor.execute("LOCK TABLE cold.document IN ACCESS EXCLUSIVE MODE")

    def __exit__(self, *_):
        self.connection.rollback()
        self.connection.close()


def test_slow_answers_are_no_fault(far, cold):
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    cold.wire.delay = 0.01
    try:
        assert run_cycle(far)["redacted"] == 6
    finally:
        cold.wire.delay = 0
    recovers(far, cold)


# The server loses what is not written when it is killed; the archive's role alone waits for its commits.
SLOW = """
SET synchronous_commit = on;
CREATE FUNCTION cold.slow() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_sleep(0.01); RETURN NEW; END $$;
CREATE TRIGGER slow BEFORE INSERT ON cold.document FOR EACH ROW EXECUTE FUNCTION cold.slow();
"""


def test_the_server_is_killed_in_the_middle_of_a_batch(far, cold):
    # Breaks when half a batch counts as sent, or is sent twice.
    fill(far, 30)
    far.apply_policy(shop_policy(archive=FOREIGN))
    cold.sql(SLOW, dbname=DATABASE)
    for _ in range(2):
        cycle = Background(far, "CALL amazon_pii.run_cycle('shop')")
        sending = "SELECT 1 FROM pg_stat_activity WHERE usename = %s AND query LIKE 'INSERT%%' AND state = 'active'"
        wait_until(lambda: cold.sql(sending, [ROLE]), interval=0.01)
        cold.kill9()
        assert cycle.result()[0][2] == 0
        assert set(states(far).values()) == {"original"} and status(far)["down_since"]
        cold.start()
    cold.sql("DROP TRIGGER slow ON cold.document", dbname=DATABASE)
    recovers(far, cold, 30)


def test_killed_anywhere_between_both_commits(cold):
    """Both servers, by repetition at many moments. Breaks when a document is lost or doubled by a commit that only one of them made."""
    orders, kills = 400, 14
    rng = random.Random("both commits")
    near = server_with(preload=False, fsync=True, conf=["amazon_pii.batch_size = 10", "amazon_pii.archive_timeout = '5s'"])
    try:
        db = shop_beside(near, cold)
        fill(db, orders)
        db.apply_policy(shop_policy(archive=FOREIGN))
        for kill in range(1, kills + 1):
            cycle = Background(db, "CALL amazon_pii.run_cycle('shop')")
            goal = documents_of(orders) * kill // (kills + 6)
            wait_until(lambda goal=goal: cold.count() >= goal, interval=0.002, message=f"no cycle gets to {goal}")
            threading.Event().wait(rng.random() * 0.03)
            victim = near if kill % 2 else cold
            victim.kill9()
            if victim is cold:
                cycle.join(60)
                assert not cycle.is_alive()
            victim.start()
            wait_until(lambda: not cycle.is_alive())
            redacted = [o for o, s in states(db).items() if s == "redacted"]
            there = {k for (k, *_) in cold.documents()}
            assert {f'["{o}"]' for o in redacted} <= there
            count, places = cold.places()
            assert count == places
        wait_until(lambda: run_cycle(db)["overdue"] == 0, interval=0.1)
        recovers(db, cold, orders)
    finally:
        near.destroy()


# "deadline": "spool"


def spool(**changes):
    return shop_policy(archive=FOREIGN, deadline="spool", **changes)


def test_spool_redacts_on_time_and_ships_later(far, cold):
    # Breaks when orders wait, go without a copy, or the copies are not sent when the server is back.
    fill(far, 6)
    far.apply_policy(spool())
    cold.stop()
    counts = run_cycle(far)
    assert (counts["redacted"], counts["failed"], counts["overdue"]) == (6, 0, 0)
    assert set(states(far).values()) == {"redacted"}
    row = status(far)
    assert row["unsent"] == documents_of(6) == far.value(LOCAL) and row["unsent_since"] and row["down_since"]
    says(far, "08001")
    # Not even the way back to a buyer's data needs the server for what it never had; it is asked, though.
    with refused("08006"):
        retrieve(far, order_number(2))
    recovers(far, cold)


def test_spool_keeps_the_copy_here_until_the_order_is_redacted(far, cold):
    # Breaks when an order that was archived on day 29 cannot go on day 30 without the server.
    fill(far, 6, age="29 days 12 hours")
    far.apply_policy(spool())
    assert run_cycle(far)["archived"] == 6
    assert cold.places() == (documents_of(6),) * 2 and status(far)["unsent"] == 0 and far.value(LOCAL) == documents_of(6)
    cold.stop()
    far.sql("UPDATE shop.invoices SET invoiced_at = invoiced_at - interval '2 days'", user="shop_owner")
    far.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now()")
    assert run_cycle(far)["redacted"] == 6
    recovers(far, cold)


def test_spool_waits_with_what_was_redacted_before(far, cold):
    # Breaks when what redaction left is archived as if it were personal data, because its copy cannot be read.
    fill(far, 6)
    far.apply_policy(spool())
    run_cycle(far)
    cold.stop()
    far.sql("UPDATE shop.orders SET gift_message = 'Back' WHERE id = 2", user="shop_owner")
    counts = run_cycle(far)
    assert counts["redacted"] == 0 and far.value("SELECT gift_message FROM shop.orders WHERE id = 2") == "Back"
    back(cold)
    far.sql("UPDATE amazon_pii.order_state SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")
    assert run_cycle(far)["redacted"] == 1
    assert cold.places() == (documents_of(6) + 1,) * 2 and far.value(LOCAL) == 0


def test_two_documents_under_one_place(far, cold):
    """A copy of this database, or an earlier life of it, has sent documents there: ours go behind them. Breaks when one is overwritten, or
    the sending never ends."""
    fill(far, 3)
    far.apply_policy(spool())
    cold.sql("INSERT INTO cold.document VALUES ('shop', '[\"2\"]', 'shop.orders', '[\"2\"]', 1, 'other', '1', now())", dbname=DATABASE)
    cold.stop()
    assert run_cycle(far)["redacted"] == 3
    back(cold)
    wait_until(lambda: run_cycle(far) and status(far)["unsent"] == 0, interval=0.2)
    versions = cold.documents("version, length(sealed), 1, 1", "order_key = '[\"2\"]' AND table_name = 'shop.orders'")
    assert [v for v, *_ in versions] == [1, 2] and versions[0][1] == 5
    assert far.value(LOCAL) == 0


def test_helpers_use_the_server_too(cold):
    # Breaks when the processes of a cycle send each other's documents, or one sends none.
    near = server_with(preload=False, conf=["amazon_pii.workers = 2", "amazon_pii.batch_size = 50"])
    try:
        db = shop_beside(near, cold)
        fill(db, 600, share=4)
        db.apply_policy(shop_policy(archive=FOREIGN))
        assert run_cycle(db)["redacted"] == 600
        assert set(states(db).values()) == {"redacted"}
        assert cold.places() == (documents_of(600),) * 2 and db.value(LOCAL) == 0
    finally:
        near.destroy()


def test_spool_believes_no_old_proof(far, cold):
    # Breaks when a copy here goes because the server had it once.
    fill(far, 6, age="29 days 12 hours")
    far.apply_policy(spool())
    run_cycle(far)
    assert status(far)["unsent"] == 0 and cold.count() == documents_of(6)
    # Put back to what it was before.
    cold.sql("""DELETE FROM cold.document WHERE order_key = '["2"]'""", dbname=DATABASE)
    far.sql("UPDATE shop.invoices SET invoiced_at = invoiced_at - interval '2 days'", user="shop_owner")
    far.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now()")
    assert run_cycle(far)["redacted"] == 5
    far.sql("UPDATE amazon_pii.order_state SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")
    recovers(far, cold)


def test_several_versions_under_taken_places(far, cold):
    # Breaks when the newest version is not the last any more, or never finds a place.
    fill(far, 3)
    far.apply_policy(spool())
    for version in (1, 2):
        cold.sql("INSERT INTO cold.document VALUES ('shop', '[\"2\"]', 'shop.orders', '[\"2\"]', %s, 'other', '1', now())", [version], dbname=DATABASE)
    cold.stop()
    far.sql("UPDATE shop.orders SET shipped_at = now() - interval '29 days 12 hours'", user="shop_owner")
    far.sql("UPDATE shop.invoices SET invoiced_at = now() - interval '40 days'", user="shop_owner")
    assert run_cycle(far)["archived"] == 3
    far.sql("UPDATE shop.orders SET gift_message = 'Newer' WHERE id = 2", user="shop_owner")
    far.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now()")
    assert run_cycle(far)["redacted"] == 3
    back(cold)
    wait_until(lambda: run_cycle(far) and status(far)["unsent"] == 0, interval=0.2)
    versions = cold.documents("version, length(sealed), 1, 1", "order_key = '[\"2\"]' AND table_name = 'shop.orders'")
    assert [v for v, *_ in versions] == [1, 2, 3, 4] and far.value(LOCAL) == 0
    cold.sql("DELETE FROM cold.document WHERE sealed = 'other'", dbname=DATABASE)
    assert "'Newer'" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))
