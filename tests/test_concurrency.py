"""Cycles, calls and applications at the same time: nobody deadlocks, nothing is done twice, and whoever was last is right."""
import threading

import psycopg2
import pytest
from cluster import wait_until
from conftest import add_extension, new_database, server_with
from support import (
    Background, between_archiving_and_redacting, fill, go_on, open_shop, order_number, order_row, refused, run_cycle,
    shop_policy, states, stop_at, stopped,
)

CALL = "CALL amazon_pii.run_cycle()"
COPIES = "SELECT count(*), max(version) FROM amazon_pii_archive.document"


@pytest.fixture(scope="module")
def small_batches():
    """The worker is there, but does nothing until a test switches it on."""
    server = server_with(
        preload=True, conf=[
            "amazon_pii.batch_size = 10", "amazon_pii.batch_time = '1h'", "amazon_pii.naptime = '1s'", "amazon_pii.enabled = off",
        ],
    )
    yield server
    server.destroy()


@pytest.fixture
def shop(small_batches):
    """Sixty orders, two a customer; nothing was done yet."""
    db = new_database(small_batches, "template0")
    add_extension(db.cluster, db.name)
    fill(open_shop(db), 60, share=2)
    db.apply_policy(shop_policy())
    yield db
    db.drop()


@pytest.fixture
def worker(small_batches):
    small_batches.configure("amazon_pii.enabled = on")
    small_batches.reload()
    yield
    small_batches.configure("amazon_pii.enabled = off")
    small_batches.reload()


def assert_done(db, orders=60):
    assert set(states(db).values()) == {"redacted"}
    assert db.sql("SELECT status, count(*) FROM amazon_pii.orders GROUP BY 1") == [("redacted", orders)]
    assert db.sql("SELECT count(*) FROM shop.customers WHERE last_name <> '[Redacted]'") == [(0,)]
    assert db.value("SELECT sum(attempts) FROM amazon_pii.orders") == 0
    # Three documents an order and three more for every third: none twice.
    assert db.sql(COPIES) == [(3 * orders + 3 * (orders // 3), 1)]
    assert "deadlock" not in db.cluster.log_text()


# Two cycles


def test_two_calls_at_once_share_the_work(shop):
    # Breaks when two cycles take the same orders, or block each other for good.
    calls = [Background(shop, CALL) for _ in range(4)]
    counts = [call.result()[0] for call in calls]
    assert sum(c[2] for c in counts) == 60
    assert [c[3:] for c in counts] == [(0, 0)] * 4
    assert_done(shop)


def test_call_waits_for_a_cycle_that_is_under_way(shop):
    # Breaks when two cycles of a policy do not take turns.
    stop_at(shop, "addresses", 35)
    first = Background(shop, CALL)
    stopped(shop)
    second = Background(shop, CALL).wait_for_lock(shop)
    go_on(shop)
    shop.sql("SELECT pg_cancel_backend(%s)", [first.pid])
    with pytest.raises(psycopg2.errors.QueryCanceled):
        first.result()
    assert second.result()[0][2] == 30
    assert_done(shop)


def test_worker_and_call_at_once(shop, worker):
    # Breaks when the worker's session and a caller's do the same orders.
    while any(call.result()[0][2] for call in [Background(shop, CALL) for _ in range(2)]):
        pass
    wait_until(lambda: set(states(shop).values()) == {"redacted"})
    assert_done(shop)


def test_long_call_on_one_policy_does_not_keep_the_worker_from_the_next(shop):
    # Breaks when the worker's wait for its turn ends its whole cycle.
    shop.sql("CREATE TABLE shop.zebra (id int PRIMARY KEY, no text, at timestamptz, name text)", user="shop_owner")
    shop.sql("INSERT INTO shop.zebra VALUES (1, '305-0000000-0000001', now() - interval '40 days', 'Zoe Invented')", user="shop_owner")
    shop.apply_policy({
        "policy": "zebra", "enabled": True,
        "orders": {"table": "shop.zebra", "number": "no", "anchor": "at", "redact": ["name"]},
    })
    turn = shop.connect(autocommit=False)
    turn.cursor().execute("SELECT amazon_pii.take_turn('shop')")
    shop.cluster.configure("amazon_pii.enabled = on")
    shop.cluster.reload()
    try:
        wait_until(lambda: shop.value("SELECT name FROM shop.zebra") == "[Redacted]")
        assert set(states(shop).values()) == {"original"}
        turn.rollback()
        wait_until(lambda: set(states(shop).values()) == {"redacted"})
    finally:
        shop.cluster.configure("amazon_pii.enabled = off")
        shop.cluster.reload()


# People and a cycle


def test_retrieval_while_a_cycle_is_between_its_two_transactions(shop):
    # Breaks when a cycle overwrites what was retrieved after it had looked at the order.
    run_cycle(shop)
    shop.sql("UPDATE shop.addresses SET phone = '555' WHERE order_id = 5", user="shop_owner")
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    shop.sql("SELECT * FROM amazon_pii.retrieve(%s, 'test')", [order_number(5)], "pii_operator")
    turn.rollback()
    call.result()
    assert order_row(shop, 5) == ("retrieved",)
    assert states(shop)[5] == "original"
    assert [states(shop)[6], shop.value("SELECT phone FROM shop.addresses WHERE order_id = 5")] == ["redacted", "555"]


def test_hold_while_a_cycle_is_between_its_two_transactions(shop):
    # Breaks when a cycle overwrites what somebody has put on hold after it had looked at the order.
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    shop.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + '1 day')", [order_number(5)], "pii_operator")
    turn.rollback()
    call.result()
    assert {order for order, state in states(shop).items() if state == "original"} == {5}
    assert shop.sql("SELECT order_number FROM amazon_pii.overdue") == []


# Order 6 has a customer with order 5, an address, and an invoice with two lines. What becomes of each must be the same
# whether triggers have seen it or not.
CHANGES = {
    "edited": ("UPDATE shop.addresses SET phone = '+49 555 1' WHERE order_id = 6",
               "SELECT phone FROM shop.addresses WHERE order_id = 6", "+49 555 1"),
    "edited again": ("UPDATE shop.addresses SET name = 'Somebody Else' WHERE order_id = 6",
                     "SELECT name FROM shop.addresses WHERE order_id = 6", "Somebody Else"),
    "emptied": ("UPDATE shop.addresses SET name = NULL WHERE order_id = 6",
                "SELECT name FROM shop.addresses WHERE order_id = 6", None),
    "unrelated": ("UPDATE shop.orders SET total = 77 WHERE id = 6", "SELECT gift_message FROM shop.orders WHERE id = 6", "Gift 6"),
    "row deleted": ("DELETE FROM shop.invoice_lines WHERE id = 61", "SELECT note FROM shop.invoice_lines WHERE id = 62", "Line 6.2"),
}


@pytest.mark.parametrize("triggers", ["origin", "replica"])
@pytest.mark.parametrize("change, look, kept", CHANGES.values(), ids=CHANGES)
def test_a_change_while_a_cycle_is_between_its_two_transactions(shop, change, look, kept, triggers):
    # Breaks when what was read in the first transaction is believed in the second.
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    shop.psql(f"SET session_replication_role = {triggers}; {change}")
    turn.rollback()
    call.result()
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    run_cycle(shop)
    assert shop.sql("SELECT status, count(*) FROM amazon_pii.orders GROUP BY 1") == [("redacted", 60)]
    assert shop.value("SELECT count(*) FROM shop.addresses WHERE name <> '[Redacted]' OR phone <> '[Redacted]'") == 0
    assert shop.value("SELECT count(*) FROM shop.orders WHERE gift_message <> '[Redacted]'") == 0
    assert shop.value(look) == (None if kept is None else "[Redacted]")
    shop.sql("SELECT * FROM amazon_pii.retrieve(%s, 'test')", [order_number(6)], "pii_operator")
    assert shop.value(look) == kept


# What an order had none of when it was copied: where, before, and what comes while a cycle is at it.
ADDITIONS = {
    "a row": ("addresses", "SELECT", "INSERT INTO shop.addresses (order_id, name) VALUES (6, 'Late')"),
    "a cell of a linked row": ("invoice_lines", "UPDATE shop.invoice_lines SET note = NULL WHERE invoice_id = 6",
                               "UPDATE shop.invoice_lines SET note = 'Late' WHERE id = 61"),
    "a cell of the order": ("orders", "UPDATE shop.orders SET gift_message = NULL, shop_note = NULL WHERE id = 6",
                            "UPDATE shop.orders SET gift_message = 'Late' WHERE id = 6"),
    "the order itself": ("orders", "UPDATE shop.orders SET gift_message = NULL, shop_note = NULL WHERE id = 6",
                         "WITH gone AS (DELETE FROM shop.orders WHERE id = 6 RETURNING *) SELECT * INTO TEMP again FROM gone; "
                         "INSERT INTO shop.orders SELECT * FROM again; UPDATE shop.orders SET gift_message = 'Late' WHERE id = 6"),
}


def late(db, table):
    return db.value(f"SELECT count(*) FROM shop.{table} AS t WHERE t::text LIKE '%%Late%%'")


@pytest.mark.parametrize("first", ["redacted for the first time", "looked at again"])
@pytest.mark.parametrize("table, before, change", ADDITIONS.values(), ids=ADDITIONS)
def test_what_is_added_while_a_cycle_is_between_its_two_transactions(shop, table, before, change, first):
    """P7. Breaks when an order is done with although something was added to it after its rows were read."""
    shop.psql(before)
    if first == "looked at again":
        run_cycle(shop)
        shop.sql("UPDATE shop.addresses SET phone = '+49 555 2' WHERE order_id = 6", user="shop_owner")
    with shop.connect(autocommit=False) as turn:
        call = between_archiving_and_redacting(shop, turn)
        shop.psql(change)
        assert late(shop, table) == 1
        turn.rollback()
    call.result()
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    run_cycle(shop)
    assert late(shop, table) == 0
    assert_done_with(shop, 6)


def assert_done_with(db, order):
    assert order_row(db, order) == ("redacted",)
    assert db.sql("SELECT next_due_at FROM amazon_pii.order_state WHERE order_key = %s", [f'["{order}"]']) == [(None,)]
    assert db.value("SELECT count(*) FROM amazon_pii.touched") == 0


@pytest.mark.parametrize("many", [0, 1000], ids=["one order", "many orders"])
def test_a_row_of_an_order_that_is_due_to_be_looked_at_again(shop, many):
    """P7. Breaks when an order that is redacted, and about to be looked at again, is looked at while a transaction that adds to it is
    open, and then not any more."""
    fill(shop, 60 + many, first=61)
    run_cycle(shop)
    shop.sql("UPDATE shop.addresses SET name = 'Edited' WHERE order_id >= 6", user="shop_owner")
    with shop.connect("shop_owner", autocommit=False) as writer:
        writer.cursor().execute("INSERT INTO shop.addresses (order_id, name) SELECT i, 'Late' FROM generate_series(6, %s) AS i", [60 + many])
        run_cycle(shop)
        writer.commit()
    run_cycle(shop)
    assert late(shop, "addresses") == 0
    assert_done_with(shop, 6)


def test_a_row_of_an_order_that_is_being_looked_at_again(shop):
    """P7. Breaks when a row that is added while a cycle has its redacted order locked is not looked for later, or a cycle that meets
    such a note goes round in circles while somebody else has the order."""
    run_cycle(shop)
    shop.sql("UPDATE shop.addresses SET name = 'Edited' WHERE order_id = 6", user="shop_owner")
    with shop.connect(autocommit=False) as other, other.cursor() as cycle:
        cycle.execute("""SELECT FROM amazon_pii.order_state WHERE order_key = '["6"]' AND next_due_at <= now() FOR UPDATE""")
        assert cycle.rowcount == 1
        shop.sql("INSERT INTO shop.addresses (order_id, name) VALUES (6, 'Late')", user="shop_owner")
        assert shop.sql("SELECT entry, row_key FROM amazon_pii.touched") == [("", '["6"]')]
        run_cycle(shop)
        # What a cycle does that has found it clean.
        cycle.execute("""UPDATE amazon_pii.order_state SET next_due_at = NULL WHERE order_key = '["6"]'""")
        other.commit()
    run_cycle(shop)
    assert late(shop, "addresses") == 0
    assert_done_with(shop, 6)


def notes(db):
    return db.sql("SELECT entry, row_key FROM amazon_pii.touched ORDER BY touched_id")


def test_an_open_transaction_keeps_nobody_elses_note_waiting(shop):
    """P3. Breaks when a cycle waits for the one order that somebody has, and forgets what it did for the others."""
    fill(shop, 70, first=61)
    with shop.connect("shop_owner", autocommit=False) as writer, shop.connect(autocommit=False) as cycle:
        writer.cursor().execute("INSERT INTO shop.addresses (order_id, name) VALUES (66, 'Late')")
        shop.sql("INSERT INTO shop.addresses (order_id, name) VALUES (66, 'Late')", user="shop_owner")
        cycle.cursor().execute("""SELECT FROM amazon_pii.order_state WHERE order_key = '["68"]' FOR UPDATE""")
        shop.sql("INSERT INTO shop.addresses (order_id, name) VALUES (68, 'Late')", user="shop_owner")
        cycle.rollback()
        assert notes(shop) == [("", '["66"]'), ("", '["68"]')]
        run_cycle(shop)
        assert notes(shop) == [("", '["66"]')] and order_row(shop, 66) == ("scheduled",)
        assert shop.sql("SELECT DISTINCT order_id FROM shop.addresses WHERE name = 'Late'") == [(66,)]
        writer.commit()
    run_cycle(shop)
    assert late(shop, "addresses") == 0
    assert_done_with(shop, 66)


def test_what_no_cycle_is_at_is_not_written(shop):
    """Breaks when each row of an old order writes the order's state although nothing redacts it."""
    states = "SELECT order_key, xmin::text FROM amazon_pii.order_state ORDER BY 1"
    fill(shop, 70, first=61)
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'test')", user="pii_admin")
    before = shop.sql(states)
    assert len(before) == 10
    shop.sql("INSERT INTO shop.addresses (order_id, name) VALUES (66, 'Late')", user="shop_owner")
    assert shop.sql(states) == before and notes(shop) == []
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    run_cycle(shop)
    assert late(shop, "addresses") == 0
    assert_done_with(shop, 66)


def test_a_row_that_went_to_another_order_between_the_two_transactions(shop):
    # Breaks when a row is overwritten for an order that it does not belong to any more.
    fill(shop, 1000, first=1000, channel="web", age="1 day")
    shop.sql("DELETE FROM shop.addresses WHERE order_id = 1000", user="shop_owner")
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    shop.psql("SET session_replication_role = replica; UPDATE shop.addresses SET order_id = 1000 WHERE order_id = 6")
    turn.rollback()
    call.result()
    assert shop.value("SELECT name FROM shop.addresses WHERE order_id = 1000") == "Name 6"
    assert order_row(shop, 6)[0] != "redacted"
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    run_cycle(shop)
    assert shop.value("SELECT name FROM shop.addresses WHERE order_id = 1000") == "Name 6"
    assert order_row(shop, 6) == ("redacted",)
    assert shop.value("SELECT gift_message FROM shop.orders WHERE id = 6") == "[Redacted]"


def test_an_order_that_was_deleted_between_the_two_transactions(shop):
    # Breaks when a deleted order stops the others of its batch, or leaves its customer behind.
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    shop.psql("SET session_replication_role = replica; DELETE FROM shop.addresses WHERE order_id = 6; DELETE FROM shop.orders WHERE id = 6; "
              "DELETE FROM shop.invoice_lines WHERE invoice_id = 6; DELETE FROM shop.invoices WHERE order_id = 6")
    turn.rollback()
    call.result()
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    run_cycle(shop)
    assert shop.sql("SELECT status, count(*) FROM amazon_pii.orders GROUP BY 1") == [("redacted", 60)]
    assert shop.value("SELECT count(*) FROM shop.customers WHERE last_name <> '[Redacted]'") == 0


def test_retrieval_during_a_cycle_waits_at_most_for_its_batch(shop):
    # Breaks when people's calls deadlock with a cycle, or when a cycle waits for people.
    run_cycle(shop)
    fill(shop, 120, first=61, share=2)
    call = Background(shop, CALL)
    for order in range(1, 20):
        shop.sql("SELECT * FROM amazon_pii.retrieve(%s, 'test')", [order_number(order)], "pii_operator")
        if order % 2:
            shop.sql("SELECT amazon_pii.end_retrieval(%s)", [order_number(order)], "pii_operator")
    call.result()
    run_cycle(shop)
    now = states(shop)
    assert {o for o in now if now[o] == "original"} == set(range(2, 20, 2))
    assert shop.value("SELECT sum(attempts) FROM amazon_pii.orders") == 0


@pytest.mark.parametrize("end", ["disable", "new version"])
def test_policy_that_is_changed_during_a_cycle_ends_it(shop, end):
    # Breaks when a cycle goes on for hours with a policy that was disabled or replaced.
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    if end == "disable":
        change = Background(shop, "SELECT amazon_pii.disable_policy('shop', 'maintenance')")
    else:
        import json
        change = Background(shop, "SELECT amazon_pii.apply_policy(%s::jsonb)", [json.dumps(shop_policy(placeholder="***"))])
    change.result()
    turn.rollback()
    assert call.result()[0][2] == 0
    assert shop.sql("SELECT count(*) FROM shop.orders WHERE gift_message LIKE 'Gift%%'") == [(60,)]
    if end == "disable":
        shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    assert run_cycle(shop)["redacted"] == 60
    mark = "[Redacted]" if end == "disable" else "***"
    assert shop.sql("SELECT DISTINCT gift_message FROM shop.orders") == [(mark,)]


# Applications and a cycle


def test_new_orders_of_a_customer_while_its_old_ones_go(shop):
    # Breaks when a shared row is overwritten although an order began to use it before that (P5), when the foreign key's
    # lock and ours deadlock, or when an import fails.
    fill(shop, 600, first=61, share=2)
    imported, errors = [], []

    def application(part):
        connection = shop.connect("shop_owner", autocommit=False, options="-c statement_timeout=20s")
        # From the other end: somewhere they meet.
        for customer in range(300 - part, 0, -2):
            order = 1000 + customer
            threading.Event().wait(0.005)
            try:
                with connection.cursor() as cursor:
                    cursor.execute("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (%s, %s, 'amazon', %s)",
                                   [order, order_number(order), customer])
                    # From here on its foreign key holds the customer.
                    cursor.execute("SELECT last_name FROM shop.customers WHERE id = %s", [customer])
                    seen = cursor.fetchone()[0]
                    connection.commit()
                imported.append((customer, seen))
            except psycopg2.Error as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=application, args=(part,)) for part in (0, 1)]
    calls = [Background(shop, CALL) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [call.result()[0][3] for call in calls] == [0, 0]
    assert errors == []
    # A customer that an order has found alive stays alive; one that was gone by then stays gone.
    names = dict(shop.sql("SELECT id, last_name FROM shop.customers"))
    assert [(c, seen, names[c]) for c, seen in imported if seen != names[c]] == []
    assert {seen == "[Redacted]" for _, seen in imported} == {True, False}, "nobody met anybody"
    assert "deadlock" not in shop.cluster.log_text()


@pytest.mark.parametrize("first", ["import", "cycle"])
def test_foreign_key_and_cycle_meet_on_a_customer(shop, first):
    # Breaks without the lock on the shared row and the second look after it: whoever comes second must see the first.
    if first == "import":
        connection = shop.connect("shop_owner", autocommit=False)
        cursor = connection.cursor()
        cursor.execute("INSERT INTO shop.orders VALUES (100, %s, 'web', 3, NULL, NULL, NULL, 1)", [order_number(100)])
        run_cycle(shop)
        # Not committed yet: nobody sees the new order, but its foreign key holds the customer.
        assert shop.value("SELECT last_name FROM shop.customers WHERE id = 3") == "Last 3"
        connection.commit()
        shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
        run_cycle(shop)
        assert shop.value("SELECT last_name FROM shop.customers WHERE id = 3") == "Last 3"
        assert {order_row(shop, 5), order_row(shop, 6)} == {("redacted",)}
        assert shop.sql("SELECT DISTINCT status FROM amazon_pii.records WHERE table_name = 'shop.customers' AND record_key = '[\"3\"]'") == [("waiting",)]
    else:
        # Customers are written after addresses, and locked before any of them.
        stop_at(shop, "customers", 3)
        call = Background(shop, CALL)
        stopped(shop)
        insert = Background(shop, f"INSERT INTO shop.orders VALUES (100, '{order_number(100)}', 'web', 3, NULL, NULL, NULL, 1)", user="shop_owner")
        insert.wait_for_lock(shop)
        shop.sql("SELECT pg_cancel_backend(%s)", [call.pid])
        with pytest.raises(psycopg2.errors.QueryCanceled):
            call.result()
        insert.result()
        go_on(shop)
        run_cycle(shop)
        assert shop.value("SELECT last_name FROM shop.customers WHERE id = 3") == "Last 3"


# Where and how run_cycle may be called


@pytest.mark.parametrize("addresses", [1, 1200])
def test_an_order_that_gets_a_row_waits_for_it(shop, addresses):
    """Breaks when an order is redacted while a transaction that adds to it is open, or when every such order, and not only one
    that a cycle is at, is noted to be looked at again. Few rows are looked for one by one, many in a range of the index."""
    fill(shop, 60 + addresses, first=61, age="25 days")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 61", user="shop_owner")
    writer = shop.connect("shop_owner", autocommit=False)
    with writer.cursor() as cursor:
        cursor.execute("INSERT INTO shop.addresses (order_id, name) SELECT i, 'Late ' || i FROM generate_series(61, %s) AS i", [60 + addresses])
        run_cycle(shop)
        assert order_row(shop, 61) == ("scheduled",), "left alone while the row is not there yet"
    writer.commit()
    writer.close()
    assert shop.value("SELECT count(*) FROM amazon_pii.touched") == 0
    run_cycle(shop)
    assert order_row(shop, 61) == ("redacted",)
    assert shop.value("SELECT count(*) FROM shop.addresses WHERE order_id = 61 AND name = '[Redacted]'") == 2


def test_a_row_of_an_order_that_a_cycle_is_at_is_noted(shop):
    """Breaks when a row that is added to an order that a cycle has locked is not seen, or a cycle that meets such a note goes round in
    circles while somebody else has the order."""
    fill(shop, 61, first=61)
    with shop.connect(autocommit=False) as cycle, cycle.cursor() as cursor:
        cursor.execute("""SELECT FROM amazon_pii.order_state WHERE order_key = '["61"]' FOR UPDATE""")
        assert cursor.rowcount == 1
        shop.sql("INSERT INTO shop.addresses (order_id, name) VALUES (61, 'Late')", user="shop_owner")
        assert shop.sql("SELECT entry, row_key FROM amazon_pii.touched") == [("", '["61"]')]
        shop.sql("SET statement_timeout = '20s'", user="pii_admin")
        run_cycle(shop)
        assert order_row(shop, 61) == ("scheduled",)
    assert shop.sql("SELECT entry, row_key FROM amazon_pii.touched") == [("", '["61"]')]
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM shop.addresses WHERE order_id = 61 AND name = '[Redacted]'") == 2


def test_not_inside_a_transaction_block(shop):
    # Breaks when a cycle in a transaction block runs, and overwrites what is not committed to the archive.
    connection = shop.connect("pii_admin", autocommit=False)
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        with refused("25001", "run_cycle"):
            cursor.execute(CALL)
    assert set(states(shop).values()) == {"original"}


CALLED = """DECLARE a bigint; b bigint; c bigint; d bigint; e bigint;
    BEGIN CALL amazon_pii.run_cycle('shop', false, a, b, c, d, e); {} END"""


@pytest.mark.parametrize("script", [
    f"CREATE FUNCTION pg_temp.cycle() RETURNS void LANGUAGE plpgsql AS $${CALLED.format('')}$$; SELECT pg_temp.cycle()",
    f"DO $${CALLED.format('EXCEPTION WHEN division_by_zero THEN NULL;')}$$",
], ids=["function", "exception block"])
def test_not_where_it_cannot_commit(shop, script):
    # Breaks when a function or a block with an exception handler can run a cycle as one transaction.
    with refused("25001", "run_cycle"):
        shop.sql(script, user="pii_admin")
    assert set(states(shop).values()) == {"original"}
    assert shop.sql(COPIES) == [(0, None)]


def test_in_a_procedure_it_runs(shop):
    # Breaks when the cycle's transactions do not get along with plpgsql's.
    shop.sql("GRANT CREATE ON SCHEMA public TO pii_admin; CREATE TABLE public.seen (redacted bigint)")
    shop.sql("GRANT ALL ON public.seen TO pii_admin")
    shop.sql("""CREATE PROCEDURE public.nightly() LANGUAGE plpgsql AS $$
        DECLARE flagged bigint; archived bigint; redacted bigint; failed bigint; overdue bigint;
        BEGIN
            INSERT INTO public.seen VALUES (-1);
            CALL amazon_pii.run_cycle('shop', false, flagged, archived, redacted, failed, overdue);
            INSERT INTO public.seen VALUES (redacted);
        END $$""", user="pii_admin")
    shop.sql("CALL public.nightly()", user="pii_admin")
    assert shop.sql("SELECT * FROM public.seen") == [(-1,), (60,)]
    assert_done(shop)


@pytest.mark.parametrize("setting", [
    "default_transaction_isolation=serializable", r"default_transaction_isolation=repeatable\ read",
    "default_transaction_read_only=on", "default_transaction_deferrable=on", "search_path=shop", "DateStyle=SQL,DMY",
    "row_security=on", "session_replication_role=replica", "lock_timeout=1", "idle_in_transaction_session_timeout=1",
])
def test_whatever_the_session_has_set(shop, setting):
    # Breaks when a cycle trusts the caller's defaults.
    caller = "postgres" if setting.startswith("session_replication_role") else "pii_admin"
    counts = Background(shop, CALL, user=caller, options=f"-c {setting}").result()[0]
    assert counts[2:] == (60, 0, 0)
    assert_done(shop)


def test_session_is_as_it_was_before_the_call(shop):
    # Breaks when identity, settings or locks of a cycle stay in the caller's session.
    session = shop.connect("pii_admin")
    with session.cursor() as cursor:
        def state():
            cursor.execute("SELECT name, setting FROM pg_settings WHERE source <> 'override' ORDER BY name")
            settings = cursor.fetchall()
            cursor.execute("SELECT current_user, session_user, current_setting('transaction_isolation')")
            return settings, cursor.fetchall()

        before = state()
        cursor.execute(CALL)
        assert state() == before
        cursor.execute("SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'object'")
        assert cursor.fetchone() == (0,)
