"""The background worker: it does the work by itself, wakes at commit, stops at once and survives what happens to it."""
import os
import signal
import time

import psycopg2
import pytest
from cluster import Cluster, alive, wait_until
from conftest import add_extension, new_database, server_with
from support import standby_of

BUYER = "Wilhelmine Testkäuferin"
NUMBER = "302-1234567-7654321"

# A row in shop.slow makes every UPDATE of an order take a minute: the place where a cycle can be caught in the act.
SHOP = f"""
CREATE SCHEMA shop;
CREATE TABLE shop.orders (id bigint PRIMARY KEY, external_no text NOT NULL, shipped_at timestamptz, buyer text);
CREATE TABLE shop.slow (n int);
CREATE FUNCTION shop.wait() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM shop.slow) THEN PERFORM pg_catalog.pg_sleep(60); END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER wait BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.wait();
INSERT INTO shop.orders VALUES (1, '{NUMBER}', pg_catalog.now(), '{BUYER}');
"""
POLICY = {
    "policy": "shop",
    "orders": {"table": "shop.orders", "number": "external_no", "anchor": "shipped_at", "redact": ["buyer"]},
    "enabled": True,
}
ACTIVITY = """
SELECT pid, datname, backend_type, query FROM pg_stat_activity WHERE backend_type LIKE 'amazon_pii%%' AND backend_type LIKE %s
"""


@pytest.fixture(scope="module")
def sleepy():
    """A worker that looks once an hour, so that only a wake-up can explain that something is done."""
    server = server_with(preload=True, conf=["amazon_pii.naptime = '1h'"])
    yield server
    server.destroy()


@pytest.fixture
def sleepy_shop(sleepy):
    database = new_database(sleepy, "template0")
    add_extension(sleepy, database.name)
    yield open_shop(database)
    database.drop()


@pytest.fixture
def shop(preloaded_db):
    return open_shop(preloaded_db)


def open_shop(db):
    db.sql(SHOP, user="shop_owner")
    db.apply_policy(POLICY)
    wait_until(lambda: db.value("SELECT last_cycle_at IS NOT NULL FROM amazon_pii.status"))
    return db


def buyer(db, order=1):
    return db.value("SELECT buyer FROM shop.orders WHERE id = %s", [order])


def processes(server, kind="%", database=None):
    return [r for r in server.sql(ACTIVITY, [kind]) if database in (None, r[1])]


def launcher(server):
    found = processes(server, "%launcher")
    return found[0][0] if found else None


DISPATCH = "UPDATE shop.orders SET shipped_at = now() - interval '40 days'"


def dispatch_long_ago(db):
    db.sql(DISPATCH, user="shop_owner")


def wake(db):
    db.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")


def catch_in_the_act(db):
    """The process id of a worker that is in the middle of an UPDATE."""
    db.sql(f"{DISPATCH}; INSERT INTO shop.slow VALUES (1)", user="shop_owner")
    wake(db)
    waiting = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'amazon_pii worker' AND datname = %s AND wait_event = 'PgSleep'"
    return wait_until(lambda: db.sql(waiting, [db.name]))[0][0]


def hurry(db):
    db.sql("DELETE FROM shop.slow", user="shop_owner")


# Doing the work


def test_worker_archives_and_redacts_by_itself(shop):
    dispatch_long_ago(shop)
    wait_until(lambda: buyer(shop) == "[Redacted]")
    wait_until(lambda: shop.sql("SELECT status FROM amazon_pii.orders") == [("redacted",)])
    assert BUYER not in shop.cluster.log_text()


def test_launcher_is_connected_to_no_database(preloaded):
    assert [r[1:3] for r in processes(preloaded, "%launcher")] == [(None, "amazon_pii launcher")]


def test_status_shows_worker_and_its_heartbeat(shop):
    worker, age, error = shop.sql("SELECT worker, now() - worker_beat_at < '1 minute', worker_error FROM amazon_pii.status")[0]
    assert (worker, age, error) == ("running", True, None)


def test_activity_tells_what_the_worker_does(shop):
    pid = catch_in_the_act(shop)
    try:
        row = "SELECT application_name, state, query FROM pg_stat_activity WHERE pid = %s"
        application, state, query = shop.sql(row, [pid])[0]
        assert (application, state) == ("amazon_pii", "active")
        assert query.startswith("amazon_pii") and BUYER not in query
        assert shop.value("SELECT worker FROM amazon_pii.status") == "running"
    finally:
        hurry(shop)
        os.kill(pid, signal.SIGTERM)


def test_autovacuum_hears_of_the_dead_rows(shop):
    # The worker is the only one that updates here.
    late = "INSERT INTO shop.orders VALUES (2, '302-0000000-0000002', now() - interval '40 days', %s)"
    shop.sql(late, [BUYER], user="shop_owner")
    wait_until(lambda: buyer(shop, 2) == "[Redacted]")
    dead = "SELECT n_tup_upd = 1 AND n_dead_tup = 1 FROM pg_stat_all_tables WHERE relid = 'shop.orders'::regclass"
    wait_until(lambda: shop.value(dead))


def test_not_more_workers_at_a_time_than_set(preloaded):
    preloaded.configure("amazon_pii.workers = 1")
    preloaded.reload()
    shops = []
    try:
        for _ in range(2):
            db = new_database(preloaded, "template0")
            shops.append(db)
            add_extension(preloaded, db.name)
            open_shop(db)
        first = catch_in_the_act(shops[0])
        dispatch_long_ago(shops[1])
        wake(shops[1])
        assert [r[0] for r in processes(preloaded, "%worker")] == [first]
        assert buyer(shops[1]) == BUYER
        preloaded.configure("amazon_pii.workers = 2")
        preloaded.reload()
        wait_until(lambda: buyer(shops[1]) == "[Redacted]")
        assert alive(first)
        hurry(shops[0])
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: buyer(shops[0]) == "[Redacted]")
    finally:
        for db in shops:
            db.drop()
        preloaded.configure("amazon_pii.workers = 1")
        preloaded.reload()


# Waking


def test_wakes_at_commit_and_only_then(sleepy_shop):
    cycle = "SELECT last_cycle_at FROM amazon_pii.status"
    wait_until(lambda: not processes(sleepy_shop.cluster, "%worker"))
    before = sleepy_shop.value(cycle)
    session = sleepy_shop.connect("pii_admin", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SELECT amazon_pii.enable_policy('shop')")
        session.rollback()
        cursor.execute(DISPATCH)
        cursor.execute("SELECT amazon_pii.enable_policy('shop')")
        cursor.execute("SELECT amazon_pii.enable_policy('shop')")
        # Long enough for a worker that was woken too early to start and to find nothing.
        cursor.execute("SELECT pg_sleep(0.5)")
        assert sleepy_shop.value(cycle) == before
        session.commit()
    wait_until(lambda: buyer(sleepy_shop) == "[Redacted]")


@pytest.mark.parametrize("awaken", [wake, lambda db: db.cluster.reload()], ids=["by a function", "by a reload"])
def test_wake_during_a_cycle_is_not_lost(sleepy_shop, awaken):
    db = sleepy_shop
    pid = catch_in_the_act(db)
    late = "INSERT INTO shop.orders VALUES (2, '302-0000000-0000002', now() - interval '40 days', %s)"
    db.sql(late, [BUYER], user="shop_owner")
    awaken(db)
    hurry(db)
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: buyer(db, 2) == "[Redacted]")


def test_enabling_a_policy_wakes(sleepy):
    db = new_database(sleepy, "template0")
    try:
        # The launcher has seen this database without the extension, and would look again in minutes.
        sleepy.reload()
        add_extension(sleepy, db.name)
        db.sql(SHOP, user="shop_owner")
        db.apply_policy({**POLICY, "enabled": False})
        dispatch_long_ago(db)
        wake(db)
        wait_until(lambda: buyer(db) == "[Redacted]")
    finally:
        db.drop()


# Stopping, failing, going on


def test_sigterm_in_the_middle_of_a_statement_ends_the_worker_within_a_second(sleepy_shop):
    pid = catch_in_the_act(sleepy_shop)
    before = launcher(sleepy_shop.cluster)
    hurry(sleepy_shop)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid), interval=0.01)
    assert time.monotonic() - began < 1
    assert launcher(sleepy_shop.cluster) == before
    # Nothing is half done, and the next cycle goes on.
    assert buyer(sleepy_shop) == BUYER
    sleepy_shop.cluster.reload()
    wait_until(lambda: buyer(sleepy_shop) == "[Redacted]")


def test_cancel_ends_the_cycle_and_shows_in_status(sleepy_shop):
    pid = catch_in_the_act(sleepy_shop)
    hurry(sleepy_shop)
    sleepy_shop.sql("SELECT pg_cancel_backend(%s)", [pid])
    wait_until(lambda: (sleepy_shop.value("SELECT worker_error FROM amazon_pii.status") or "").startswith("57014: "))
    sleepy_shop.cluster.reload()
    wait_until(lambda: buyer(sleepy_shop) == "[Redacted]")
    wait_until(lambda: sleepy_shop.value("SELECT worker_error FROM amazon_pii.status") is None)


def test_launcher_that_was_terminated_comes_back(preloaded):
    before = launcher(preloaded)
    began = time.monotonic()
    os.kill(before, signal.SIGTERM)
    wait_until(lambda: not alive(before), interval=0.01)
    assert time.monotonic() - began < 1
    wait_until(lambda: launcher(preloaded) not in (None, before))


def test_worker_goes_on_after_a_crash_of_the_server():
    # Without synchronous commits the crash may take the dispatch along that the worker is to find.
    server = server_with(preload=True, conf=["amazon_pii.naptime = '1s'", "synchronous_commit = on"])
    try:
        db = new_database(server, "template0")
        add_extension(server, db.name)
        open_shop(db)
        pid = catch_in_the_act(db)
        server.close_connections()
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: "all server processes terminated" in server.log_text())

        def reachable():
            try:
                return server.sql("DELETE FROM shop.slow", user="shop_owner", dbname=db.name) is None
            except psycopg2.OperationalError:
                return False

        wait_until(reachable)
        # The new worker may have come to the slow trigger before it was made fast.
        stuck = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'amazon_pii worker' AND wait_event = 'PgSleep'"

        def redacted():
            server.sql(stuck)
            return server.sql("SELECT buyer FROM shop.orders", dbname=db.name) == [("[Redacted]",)]

        wait_until(redacted)
    finally:
        server.destroy()


def test_switched_off_the_worker_beats_but_does_nothing(shop):
    shop.cluster.configure("amazon_pii.enabled = off")
    shop.cluster.reload()
    try:
        wait_until(lambda: shop.value("SHOW amazon_pii.enabled") == "off")
        # A worker that had read the old setting may be under way.
        wait_until(lambda: not processes(shop.cluster, "%worker", shop.name))
        cycle = shop.value("SELECT last_cycle_at FROM amazon_pii.status")
        beats = set()
        wait_until(lambda: beats.add(shop.value("SELECT worker_beat_at FROM amazon_pii.status")) or len(beats) > 2)
        assert shop.value("SELECT last_cycle_at FROM amazon_pii.status") == cycle
    finally:
        shop.cluster.configure("amazon_pii.enabled = on")
        shop.cluster.reload()
    dispatch_long_ago(shop)
    wait_until(lambda: buyer(shop) == "[Redacted]")


def test_only_listed_databases_are_served(shop):
    server = shop.cluster
    server.configure("amazon_pii.databases = 'no_such_database, postgres'")
    server.reload()
    try:
        wait_until(lambda: '"no_such_database" does not exist' in server.log_text())
        wait_until(lambda: not processes(server, "%worker"))
        beat = shop.value("SELECT worker_beat_at FROM amazon_pii.status")
        dispatch_long_ago(shop)
        server.configure(f"amazon_pii.databases = '{shop.name}'")
        server.reload()
        wait_until(lambda: buyer(shop) == "[Redacted]")
        assert shop.value("SELECT worker_beat_at FROM amazon_pii.status") > beat
    finally:
        server.configure("amazon_pii.databases = ''")
        server.reload()


def test_databases_and_extension_can_be_dropped_under_the_worker(preloaded):
    db = new_database(preloaded, "template0")
    add_extension(preloaded, db.name)
    open_shop(db)
    before = launcher(preloaded)
    db.sql("DROP EXTENSION amazon_pii CASCADE")
    db.drop()
    assert launcher(preloaded) == before


def test_looking_at_a_database_without_the_extension_costs_no_transaction_id():
    with Cluster(preload=True, conf=["log_min_messages = debug1", "autovacuum = off"]) as server:
        ended = 'background worker "amazon_pii worker"'
        horizon = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text"
        wait_until(lambda: ended in server.log_text())
        before = server.sql(horizon)
        for _ in range(3):
            seen = server.log_text().count(f"DEBUG:  {ended}")
            server.reload()
            wait_until(lambda: server.log_text().count(f"DEBUG:  {ended}") > seen)
        assert server.sql(horizon) == before
        assert "exited with exit code 1" not in server.log_text()


def test_standby_runs_nothing_until_it_is_promoted(preloaded):
    with standby_of(preloaded, preload=True) as standby:
        assert standby.sql("SELECT pg_is_in_recovery()") == [(True,)]
        assert processes(standby) == []
        standby.run("pg_ctl", "-D", standby.data, "-w", "-s", "promote")
        wait_until(lambda: launcher(standby))


def test_without_preloading_calls_do_the_work_and_status_says_so(db):
    db.sql(SHOP, user="shop_owner")
    db.apply_policy(POLICY)
    assert db.value("SELECT worker FROM amazon_pii.status") == "no worker runs"
    dispatch_long_ago(db)
    db.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert buyer(db) == "[Redacted]"
    assert db.value("SELECT worker FROM amazon_pii.status") == "no worker runs"
