"""An order moves as a whole (P2): whatever ends a cycle, and wherever, no order is half done, nothing is lost, nothing is
archived twice, and the next cycle carries on."""
import random
import threading

import psycopg2
import pytest
from cluster import wait_until
from conftest import add_extension, new_database, server_with
from support import (
    Background, between_archiving_and_redacting, cells_of, fill, go_on, open_shop, order_number, run_cycle, shop_policy, states,
    stop_at, stopped,
)

# By fill() with two orders a customer: order, address, customer, for every third an invoice with two lines.
DOCUMENTS = "SELECT count(*), count(DISTINCT (order_key, table_name, record_key)), max(version) FROM amazon_pii_archive.document"
DONE = "SELECT count(*) FROM amazon_pii.orders WHERE redacted_at IS NOT NULL"
MOVED = "SELECT count(archived_at) + count(redacted_at) FROM amazon_pii.orders"


def documents_of(orders):
    return sum(3 + 3 * (order % 3 == 0) for order in orders)


def shop_of(server, orders):
    db = new_database(server, "template0")
    add_extension(server, db.name)
    fill(open_shop(db), orders, share=2)
    return db


def check_consistent(db):
    """What must hold at any moment. Returns the orders that are redacted."""
    redacted = {order for order, state in states(db).items() if state == "redacted"}
    # What was overwritten is in the archive, once.
    archived = "SELECT (order_key::json ->> 0)::bigint, count(*), max(version) FROM amazon_pii_archive.document GROUP BY 1"
    copies = {order: (count, version) for order, count, version in db.sql(archived)}
    for order in redacted:
        assert copies[order] == (documents_of([order]), 1), f"order {order} is redacted with the copies {copies.get(order)}"
    # State and data are one transaction.
    said = {order for (order,) in db.sql("SELECT (order_key::json ->> 0)::bigint FROM amazon_pii.orders WHERE status = 'redacted'")}
    assert said == redacted
    # A customer goes as a whole, when all its orders are due and archived; with the last of them at the latest.
    customers = """SELECT id, array_agg(DISTINCT v = '[Redacted]') FROM shop.customers,
                   LATERAL (VALUES (first_name), (last_name), (email), (phone)) AS x (v) GROUP BY id"""
    for customer, gone in db.sql(customers):
        both = {2 * customer - 1, 2 * customer}
        assert gone in ([True], [False])
        assert not both <= redacted if gone == [False] else both & redacted and both <= copies.keys()
    return redacted


def check_finished(db, orders):
    assert check_consistent(db) == set(range(1, orders + 1))
    assert db.sql(DOCUMENTS) == [(documents_of(range(1, orders + 1)),) * 2 + (1,)]
    assert db.sql("SELECT count(*), sum(attempts), count(last_error) FROM amazon_pii.orders") == [(orders, 0, 0)]
    assert db.sql("SELECT DISTINCT status FROM amazon_pii.records") == [("redacted",)]
    # What is in the archive is what was in the tables: read it without writing it back, then write it back.
    rng = random.Random(orders)
    for order in rng.sample(range(1, orders + 1), 8):
        text = str(db.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(order)], "pii_operator"))
        for value in (f"Gift {order}", f"Name {order}", f"Street {order}", f"First {(order + 1) // 2}"):
            assert f"'{value}'" in text
    for order in rng.sample(range(2, orders + 1, 2), 4):
        rows = db.sql("SELECT * FROM amazon_pii.retrieve(%s, 'test')", [order_number(order)], "pii_operator")
        assert sum(r[3] for r in rows) == cells_of(order) + 4 and sum(r[4] for r in rows) == 0
        assert states(db)[order] == "original"


@pytest.mark.parametrize("by", ["worker", "call"])
def test_server_killed_at_many_points_of_a_cycle(by):
    # Breaks when an order's rows, its state and its copies are not one transaction each, or when a cycle does not carry
    # on from what a killed one left.
    orders, kills = 1200, 12
    rng = random.Random(by)
    server = server_with(
        preload=True, fsync=True,
        conf=["amazon_pii.batch_size = 20", "amazon_pii.naptime = '1s'", f"amazon_pii.enabled = {'on' if by == 'worker' else 'off'}"],
    )
    try:
        db = shop_of(server, orders)
        db.apply_policy(shop_policy(enabled=False))
        # No cycle comes to its end before the last kill.
        stop_at(db, "addresses", orders - 5)
        db.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
        redacted = set()
        for kill in range(1, kills + 1):
            call = Background(db, "CALL amazon_pii.run_cycle()") if by == "call" else None
            # Nearer to the end with each kill; then at any moment of the next few transactions.
            goal = 2 * orders * kill // (kills + 4)
            wait_until(lambda goal=goal: db.value(MOVED) >= goal, interval=0.005, message=f"no cycle gets to {goal}")
            threading.Event().wait(rng.random() * 0.06)
            server.kill9()
            if call:
                with pytest.raises(psycopg2.Error):
                    call.result()
            # What the killed cycle left, before a worker goes on with it.
            server.configure("amazon_pii.enabled = off")
            server.start()
            now = check_consistent(db)
            assert redacted <= now, "what was redacted came back"
            redacted = now
            if kill == kills:
                go_on(db)
            if by == "worker":
                server.configure("amazon_pii.enabled = on")
                server.reload()
        if by == "worker":
            wait_until(lambda: db.value(DONE) == orders)
        else:
            assert run_cycle(db)["overdue"] == 0
        check_finished(db, orders)
    finally:
        server.destroy()


@pytest.fixture(scope="module")
def small_batches():
    # A slow moment of the disk does not make batches smaller.
    server = server_with(conf=["amazon_pii.batch_size = 10", "amazon_pii.batch_time = '1h'"], fsync=True)
    yield server
    server.destroy()


@pytest.fixture
def shop(small_batches):
    """Sixty orders of which none is done yet."""
    db = shop_of(small_batches, 60)
    db.apply_policy(shop_policy())
    yield db
    db.drop()


def carry_on(db):
    """After an interruption in the fourth batch: three are done, the rest waits, and is done by the next cycle."""
    assert check_consistent(db) == set(range(1, 31))
    assert db.value("SELECT count(*) FROM amazon_pii.orders WHERE attempts > 0 OR last_error IS NOT NULL") == 0
    go_on(db)
    assert run_cycle(db) == {"flagged": 0, "archived": 20, "redacted": 30, "failed": 0, "overdue": 0}
    check_finished(db, 60)


# The last tables that an order's rows are written to, so that others are written already.
@pytest.mark.parametrize("table, row", [("orders", 35), ("addresses", 35), ("customers", 18), ("invoice_lines", 361)])
def test_server_killed_between_the_tables_of_an_order(shop, table, row):
    # Breaks when an order's tables are not overwritten in one transaction.
    stop_at(shop, table, row)
    call = Background(shop, "CALL amazon_pii.run_cycle()")
    stopped(shop)
    shop.cluster.kill9()
    with pytest.raises(psycopg2.Error):
        call.result()
    shop.cluster.start()
    carry_on(shop)


def test_server_killed_between_archiving_and_redacting(shop):
    # Breaks when a committed copy is not found again: the order would be archived twice, or never redacted.
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    shop.cluster.kill9()
    with pytest.raises(psycopg2.Error):
        call.result()
    shop.cluster.start()
    assert check_consistent(shop) == set()
    assert shop.value("SELECT count(DISTINCT order_key) FROM amazon_pii_archive.document") == 10
    assert run_cycle(shop)["archived"] == 50
    check_finished(shop, 60)


@pytest.mark.parametrize("function, error", [
    ("pg_cancel_backend", psycopg2.errors.QueryCanceled), ("pg_terminate_backend", psycopg2.Error),
])
def test_cycle_that_is_stopped_by_a_dba(shop, function, error):
    # Breaks when a cancel is taken for the failure of an order: orders would be set back, or the cycle would go on.
    stop_at(shop, "addresses", 35)
    call = Background(shop, "CALL amazon_pii.run_cycle()")
    stopped(shop)
    shop.sql(f"SELECT {function}(%s)", [call.pid])
    with pytest.raises(error):
        call.result(timeout=5)
    carry_on(shop)
    assert shop.value("SELECT count(*) FROM amazon_pii.runs WHERE finished_at IS NULL") == 1


def test_statement_timeout_ends_a_cycle_as_a_cancel_does(shop):
    # Breaks when a timeout is taken for the failure of an order.
    stop_at(shop, "addresses", 35)
    call = Background(shop, "CALL amazon_pii.run_cycle()")
    stopped(shop)
    shop.sql("SELECT pg_cancel_backend(%s)", [call.pid])
    with pytest.raises(psycopg2.errors.QueryCanceled):
        call.result(timeout=5)
    # This one comes to the same place at once, however slow the machine.
    call = Background(shop, "CALL amazon_pii.run_cycle()", options="-c statement_timeout=3s")
    with pytest.raises(psycopg2.errors.QueryCanceled):
        call.result()
    carry_on(shop)


def test_cancel_before_anything_was_redacted(shop):
    # Breaks when a cancel inside the archiving transaction leaves copies without the state that knows of them.
    table = shop.connect("shop_owner", autocommit=False)
    table.cursor().execute("LOCK TABLE shop.invoices IN ACCESS EXCLUSIVE MODE")
    call = Background(shop, "CALL amazon_pii.run_cycle()").wait_for_lock(shop)
    shop.sql("SELECT pg_cancel_backend(%s)", [call.pid])
    with pytest.raises(psycopg2.errors.QueryCanceled):
        call.result(timeout=5)
    table.rollback()
    assert shop.sql(DOCUMENTS) == [(0, 0, None)]
    assert check_consistent(shop) == set()
    assert run_cycle(shop)["redacted"] == 60
    check_finished(shop, 60)
