"""Several processes at one policy's backlog (amazon_pii.workers): none is in another's way, no shared row is left behind, and
one that dies or is stopped costs nothing but speed."""
import os
import signal

import psycopg2
import pytest
from cluster import Cluster, alive, wait_until
from conftest import new_database, prepare
from support import (
    Background, at_gate, close_gate, fill, go_on, open_gate, open_shop, queue_for_turn, run_cycle, shop_policy, states, stop_at,
)

CALL = "CALL amazon_pii.run_cycle()"
HELPERS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'amazon_pii helper' ORDER BY pid"


@pytest.fixture(scope="module")
def server():
    """The worker is there, but does nothing until a test switches it on."""
    conf = ["amazon_pii.batch_size = 20", "amazon_pii.naptime = '1s'", "amazon_pii.enabled = off", "max_worker_processes = 16"]
    with Cluster(preload=True, conf=conf) as server:
        prepare(server)
        yield server


@pytest.fixture
def db(server):
    database = open_shop(new_database(server))
    yield database
    database.drop()
    set_up(server, workers=1, enabled="off", batch_size=20)


def set_up(server, **settings):
    for name, value in settings.items():
        server.configure(f"amazon_pii.{name} = {value}")
    server.reload()
    for name, value in settings.items():
        wait_until(lambda name=name, value=value: server.sql(f"SHOW amazon_pii.{name}") == [(str(value),)])


def start(db, workers, gate=None):
    """A cycle, with as many processes if it finds enough to do; with a gate, all of them wait there."""
    db.apply_policy(shop_policy())
    if gate:
        # The trial of the policy does not wait at it.
        close_gate(db, gate)
    set_up(db.cluster, workers=workers)
    call = Background(db, CALL)
    if gate:
        at_gate(db, workers)
    return call


def entangle(db, orders, share):
    """Orders of one customer, close together and far apart. Every tenth customer has one that is not Amazon's."""
    customers = orders // share
    fill(db, orders, share=share)
    fill(db, orders + customers // 10, first=orders + 1, channel="web")
    db.sql("UPDATE shop.orders SET customer_id = CASE WHEN channel = 'web' THEN (id - %s) * 10 ELSE 1 + id * 7919 %% %s END "
           "WHERE id %% 3 > 0 OR channel = 'web'", [orders, customers], "shop_owner")


def helped(db, call):
    """Whether a helper was seen at work before the call was over."""
    seen = False
    while call.is_alive():
        seen = seen or bool(db.sql(HELPERS))
    return seen


def assert_counts(counts, orders):
    flagged, archived, redacted, failed, overdue = counts
    assert (archived, failed, overdue) == (orders, 0, 0)
    # One that comes back for a row that it had to leave is counted once.
    assert redacted == orders


def assert_done(db, orders):
    """Every order is redacted; every customer exactly when all its orders are; each value is in the archive once."""
    assert all(state == ("redacted" if order <= orders else "original") for order, state in states(db).items())
    assert db.sql("SELECT status, count(*) FROM amazon_pii.orders GROUP BY 1") == [("redacted", orders)]
    wrong = """SELECT c.id, c.last_name FROM shop.customers AS c
                WHERE (c.last_name = '[Redacted]') <> NOT EXISTS (SELECT FROM shop.orders AS o WHERE o.customer_id = c.id AND o.channel = 'web')
                  AND EXISTS (SELECT FROM shop.orders AS o WHERE o.customer_id = c.id)"""
    assert db.sql(wrong) == []
    waits = """SELECT count(*) FROM amazon_pii.records AS r WHERE r.status = 'waiting' AND NOT EXISTS (
                   SELECT FROM shop.orders AS o WHERE o.channel = 'web' AND r.table_name = 'shop.customers' AND r.record_key = '["' || o.customer_id || '"]')"""
    assert db.value(waits) == 0
    copies = "SELECT count(*), count(DISTINCT (order_key, table_name, record_key)), max(version) FROM amazon_pii_archive.document"
    assert db.sql(copies) == [(3 * orders + 3 * (orders // 3),) * 2 + (1,)]
    assert db.value("SELECT sum(attempts) FROM amazon_pii.orders") == 0
    assert "deadlock" not in db.cluster.log_text()


@pytest.mark.parametrize("workers", [2, 4])
def test_a_call_with_helpers(db, workers):
    entangle(db, 2400, share=6)
    call = start(db, workers=workers)
    assert helped(db, call)
    counts = call.result()[0]
    assert_counts(counts, 2400)
    assert_done(db, 2400)
    assert db.sql("SELECT flagged, archived, redacted, failed, overdue FROM amazon_pii.runs WHERE finished_at IS NOT NULL") == [counts]
    # Whoever does the work, it is done in the caller's name.
    assert db.sql("SELECT DISTINCT \"user\" FROM amazon_pii.audit_log WHERE action IN ('archive', 'redact')") == [("pii_admin",)]
    assert run_cycle(db)["redacted"] == 0
    assert db.sql(HELPERS) == []


def test_the_worker_with_a_helper(db):
    entangle(db, 1800, share=6)
    set_up(db.cluster, workers=2, enabled="on")
    db.apply_policy(shop_policy())
    wait_until(lambda: db.sql(HELPERS), interval=0.005)
    wait_until(lambda: db.value("SELECT count(*) FROM amazon_pii.runs WHERE finished_at IS NOT NULL AND redacted > 0"))
    assert_done(db, 1800)


def test_one_customer_of_all_orders(db):
    """Every batch of every process wants the same row."""
    fill(db, 1200, share=1200)
    call = start(db, workers=4)
    assert helped(db, call)
    assert_counts(call.result()[0], 1200)
    assert_done(db, 1200)


@pytest.mark.parametrize("workers", [2, 3])
def test_orders_of_a_customer_in_two_processes_at_the_same_time(db, workers):
    """P5. Both see the other's order as one that needs the row. Breaks when the one that commits later does not look again:
    the row would be left behind."""
    fill(db, 240, share=2)
    call = start(db, workers, gate=100)
    open_gate(db)
    assert call.result()[0][2] == 240
    again = db.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'redact'") - 240
    assert again > 0, "no order came back for its customer"
    assert_done(db, 240)


def test_killed_helper(db):
    """A helper that is ended by SIGTERM, or cannot be had: the others do its part."""
    fill(db, 1200, share=3)
    call = start(db, workers=3, gate=100)
    # It has committed copies, and is about to overwrite.
    victim = db.sql(HELPERS)[0][0]
    os.kill(victim, signal.SIGTERM)
    wait_until(lambda: not alive(victim))
    open_gate(db)
    assert_counts(call.result()[0], 1200)
    assert_done(db, 1200)


def test_helper_killed_by_a_power_cut(db):
    """SIGKILL to a helper ends the server, as for any backend; the next cycle carries on."""
    fill(db, 1200, share=3)
    call = start(db, workers=2, gate=500)
    os.kill(db.sql(HELPERS)[0][0], signal.SIGKILL)
    with pytest.raises(psycopg2.Error):
        call.result()
    wait_until(lambda: accepts(db))
    open_gate(db)
    run_cycle(db)
    assert_done(db, 1200)


def accepts(db):
    try:
        db.connect().close()
    except psycopg2.OperationalError:
        return False
    for session in db._sessions.values():
        session.close()
    return True


@pytest.mark.parametrize("function", ["pg_cancel_backend", "pg_terminate_backend"])
def test_stopped_call_stops_its_helpers(db, function):
    """Breaks when helpers work on after the cycle that they belong to has been stopped."""
    fill(db, 1200, share=3)
    # Each process comes to one of these.
    for order in range(300, 340):
        stop_at(db, "addresses", order)
    call = start(db, workers=3)
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
    wait_until(lambda: db.value(asleep) == 3)
    assert len(db.sql(HELPERS)) == 2
    db.sql(f"SELECT {function}(%s)", [call.pid])
    with pytest.raises(psycopg2.Error):
        call.result(timeout=5)
    wait_until(lambda: not db.sql(HELPERS), timeout=1, interval=0.01, message="the helpers go on")
    go_on(db)
    assert run_cycle(db)["overdue"] == 0
    assert_done(db, 1200)


def test_no_room_for_helpers(db):
    """Breaks when a cycle waits for helpers that cannot be had."""
    fill(db, 300, share=3)
    db.apply_policy(shop_policy())
    set_up(db.cluster, workers=64)
    assert_counts(Background(db, CALL).result()[0], 300)
    assert_done(db, 300)


def test_two_calls_with_helpers(db):
    """The second one waits for the first; both end, and nothing is done twice."""
    entangle(db, 1800, share=6)
    db.apply_policy(shop_policy())
    set_up(db.cluster, workers=2)
    calls = [Background(db, CALL) for _ in range(2)]
    counts = [call.result()[0] for call in calls]
    assert sum(c[2] for c in counts) >= 1800 and [c[3:] for c in counts] == [(0, 0)] * 2
    assert_done(db, 1800)


def test_maintenance_keeps_helpers_waiting(db):
    """take_turn() stops all processes of a cycle between two transactions. Breaks when helpers take no turns."""
    fill(db, 1200, share=3)
    call = start(db, workers=2, gate=100)
    turn = db.connect(autocommit=False)
    waiter = queue_for_turn(db, turn)
    open_gate(db)
    waiter.join(30)
    before = db.value("SELECT count(redacted_at) FROM amazon_pii.orders")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    wait_until(lambda: db.value(waiting) == 2)
    assert db.value("SELECT count(redacted_at) FROM amazon_pii.orders") == before < 1200
    turn.rollback()
    assert_counts(call.result()[0], 1200)
    assert_done(db, 1200)
