"""One bad order stops nobody else (P3), and the clock is honest (P4): failures, locks, idle cycles, what is overdue."""
import time

import pytest
from cluster import wait_until
from support import (
    Background, between_archiving_and_redacting, fill, go_on, open_shop, order_number, order_row, report_statistics, run_cycle, shop_policy,
    states, stop_at, stopped,
)

ORDERS = 40
BAD = 20
ALL_BUT_BAD = set(range(1, ORDERS + 1)) - {BAD}
COUNTS = ("flagged", "archived", "redacted", "failed", "overdue")
PAYLOADS = {"table": "shop.payloads", "on": {"order_id": "id"}, "redact": {"raw": {"json": ["$.buyer.name"]}}}


@pytest.fixture
def shop(db):
    """Forty orders that are due, one customer each, under an enabled policy; nothing was done yet."""
    fill(open_shop(db), ORDERS)
    db.apply_policy(shop_policy())
    return db


def redacted(db):
    return {order for order, state in states(db).items() if state == "redacted"}


def pass_time(db, interval):
    """Lets an order's waits pass. The clock cannot be turned forward, so its times are turned back."""
    db.sql("UPDATE amazon_pii.order_state SET next_attempt_at = next_attempt_at - %s::interval", [interval])


# P3. What makes one order fail; how it is repaired; what last_error begins with.

CHECK = f"""ALTER TABLE shop.addresses ADD CONSTRAINT no_placeholder CHECK (order_id <> {BAD} OR line1 <> '[Redacted]') NOT VALID"""
RAISES = """
CREATE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN {body} END $$;
CREATE TRIGGER refuse {when} ON shop.{table} FOR EACH ROW WHEN (NEW.id = {row}) EXECUTE FUNCTION shop.refuse()
"""


def trigger(table, row, body, when="BEFORE UPDATE"):
    return RAISES.format(table=table, row=row, body=body, when=when), f"DROP TRIGGER refuse ON shop.{table}"


RAISE = f"RAISE EXCEPTION 'Ada Invented lives in Street {BAD}' USING ERRCODE = '{{}}';"
FAILURES = {
    "check constraint": (CHECK, "ALTER TABLE shop.addresses DROP CONSTRAINT no_placeholder", "23514"),
    "trigger that raises": (*trigger("orders", BAD, RAISE.format("P0001")), "P0001"),
    "trigger on a customer": (*trigger("customers", BAD, RAISE.format("22023")), "22023"),
    "trigger that divides by zero": (*trigger("orders", BAD, "NEW.total := 1 / 0; RETURN NEW;"), "22012"),
    "trigger that writes something else": (*trigger("orders", BAD, "NEW.gift_message := 'x'; RETURN NEW;"), "27000"),
    "trigger that drops the update": (*trigger("orders", BAD, "RETURN NULL;"), "27000"),
    "trigger that keeps the old row": (*trigger("orders", BAD, "RETURN OLD;"), "27000"),
    "row that cannot be archived": (
        f"ALTER TABLE shop.orders ADD CONSTRAINT no_note CHECK (id <> {BAD} OR shop_note <> '[Redacted]') NOT VALID",
        "ALTER TABLE shop.orders DROP CONSTRAINT no_note", "23514",
    ),
    # Not one of PostgreSQL's own codes: it stands for something to whoever wrote the trigger.
    "trigger that raises a code of its own": (*trigger("orders", BAD, RAISE.format("AB123")), "AB123"),
    # What a trigger gets when a remote server, or its own code, runs into a timeout: it is no cancel of the cycle.
    "trigger that is canceled elsewhere": (*trigger("orders", BAD, RAISE.format("57014")), "57014"),
    "trigger whose remote server shuts down": (*trigger("orders", BAD, RAISE.format("57P01")), "57P01"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_one_bad_order_stops_nobody_else(shop, kind):
    # Breaks when a failed batch is not done again order by order, when the error is lost or quotes a row, or when the
    # order is not tried again by itself.
    breaks, repair, sqlstate = FAILURES[kind]
    shop.sql(breaks, user="shop_owner")
    counts = run_cycle(shop)
    assert redacted(shop) == ALL_BUT_BAD
    assert (counts["redacted"], counts["failed"], counts["overdue"]) == (ORDERS - 1, 1, 1)
    status, attempts, error, waits = order_row(
        shop, BAD, "status, attempts, last_error, next_attempt_at - now() BETWEEN '50 s' AND '60 s'"
    )
    assert (status, attempts, waits) == ("failed", 1, True)
    assert error.startswith(f"{sqlstate}: ")
    assert "Ada" not in error and "Street" not in error
    assert "Ada" not in shop.cluster.log_text() and f"Street {BAD}" not in shop.cluster.log_text()
    shown = "SELECT order_number, status, attempts, last_error FROM amazon_pii.overdue"
    assert shop.sql(shown) == [(order_number(BAD), "failed", 1, error)]
    # Its wait is not over: the next cycle leaves it alone.
    assert run_cycle(shop)["failed"] == 0
    assert order_row(shop, BAD, "attempts") == (1,)
    shop.sql(repair, user="shop_owner")
    pass_time(shop, "1 minute")
    counts = run_cycle(shop)
    assert (counts["redacted"], counts["failed"], counts["overdue"]) == (1, 0, 0)
    assert redacted(shop) == ALL_BUT_BAD | {BAD}
    assert order_row(shop, BAD, "status, attempts, last_error, next_attempt_at") == ("redacted", 0, None, None)
    assert shop.sql("SELECT max(version) FROM amazon_pii_archive.document") == [(1,)]


def test_waits_grow_up_to_one_day(shop):
    # Breaks when waits do not grow, grow without end, or when attempts are forgotten.
    shop.sql(CHECK, user="shop_owner")
    waits = []
    for attempt in range(1, 15):
        assert run_cycle(shop)["failed"] == 1
        status, attempts, wait = order_row(shop, BAD, "status, attempts, extract(epoch FROM next_attempt_at - now()) / 60")
        assert (status, attempts) == ("failed", attempt)
        waits.append(round(wait))
        # One minute less than the wait is too early.
        pass_time(shop, f"{waits[-1] - 0.5} minutes")
        assert run_cycle(shop)["failed"] == 0
        pass_time(shop, "1 minute")
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1440, 1440, 1440]
    assert len(shop.sql("SELECT 1 FROM amazon_pii.audit_log WHERE action = 'failed'")) == 14


def test_json_that_cannot_be_walked_fails_its_order_alone(db):
    # Breaks when one payload that a treatment cannot deal with stops the batch, or is overwritten without a copy.
    fill(open_shop(db), 10)
    insert = """INSERT INTO shop.payloads (order_id, raw)
                SELECT i, jsonb_build_object('buyer', jsonb_build_object('name', 'Buyer ' || i)) FROM generate_series(1, 10) AS i"""
    db.sql(insert, user="shop_owner")
    db.apply_policy(shop_policy(linked=shop_policy()["linked"] + [PAYLOADS]))
    nested = "UPDATE shop.payloads SET raw = raw || jsonb_build_object('x', (repeat('[', 600) || repeat(']', 600))::jsonb) WHERE order_id = 5"
    db.sql(nested, user="shop_owner")
    counts = run_cycle(db)
    assert (counts["archived"], counts["redacted"], counts["failed"]) == (9, 9, 1)
    assert redacted(db) == set(range(1, 11)) - {5}
    status, error = order_row(db, 5, "status, last_error")
    assert status == "failed" and error.startswith("0A000: ") and "Buyer" not in error
    buyers = "SELECT raw #>> '{buyer,name}', count(*) FROM shop.payloads GROUP BY 1 ORDER BY 1 DESC"
    assert db.sql(buyers) == [("[Redacted]", 9), ("Buyer 5", 1)]
    db.sql("UPDATE shop.payloads SET raw = raw - 'x' WHERE order_id = 5", user="shop_owner")
    pass_time(db, "1 minute")
    assert run_cycle(db)["redacted"] == 1
    assert db.sql(buyers) == [("[Redacted]", 10)]


def test_value_that_is_too_large_fails_its_order_alone(db):
    # Breaks when one value whose text form is too long for the server stops the batch, the trial of a policy, or preview,
    # or when the error does not name the column. A bytea of 256 MB prints as 512 MB.
    fill(open_shop(db), 4)
    scan = {"table": "shop.scans", "on": {"order_id": "id"}, "redact": {"image": "null"}}
    db.psql("""SET ROLE shop_owner; CREATE TABLE shop.scans (id bigint PRIMARY KEY, order_id bigint, image bytea);
               CREATE INDEX ON shop.scans (order_id); INSERT INTO shop.scans SELECT i, i, 'scan' FROM generate_series(1, 4) i;""")
    big = "UPDATE shop.scans SET image = convert_to(repeat('x', %s), 'UTF8') WHERE id = 3"
    db.psql(f"SET ROLE shop_owner; {big % 268435456}")
    document = shop_policy(linked=shop_policy()["linked"] + [scan])
    (warning,) = [row for row in db.check_policy(document) if "large" in row[2]]
    assert warning[:2] == ("warning", "shop.scans") and "\"image\"" in warning[2] and warning[3]
    db.apply_policy(document)
    preview = db.sql("SELECT * FROM amazon_pii.preview('shop')", user="pii_admin")
    assert sorted(row for row in preview if row[1] == "shop.scans") == [("archive", "shop.scans", 3, 3), ("redact", "shop.scans", 3, 3)]
    counts = run_cycle(db)
    assert (counts["archived"], counts["redacted"], counts["failed"]) == (3, 3, 1)
    assert redacted(db) == {1, 2, 4}
    status, error = order_row(db, 3, "status, last_error")
    assert status == "failed" and error.startswith("54000: shop.scans: a value of column \"image\" is too large")
    assert db.sql("SELECT id FROM shop.scans WHERE image IS NOT NULL") == [(3,)]
    db.psql("SET ROLE shop_owner; UPDATE shop.scans SET image = 'smaller' WHERE id = 3")
    pass_time(db, "1 minute")
    assert run_cycle(db)["redacted"] == 1
    assert db.sql("SELECT id FROM shop.scans WHERE image IS NOT NULL AND id = 3") == []


def test_order_that_fails_again_after_it_was_redacted(shop):
    # Breaks when a redacted order with new personal data that cannot be redacted looks as if it were done.
    assert run_cycle(shop)["redacted"] == ORDERS
    shop.sql(CHECK, user="shop_owner")
    shop.sql("UPDATE shop.addresses SET line1 = %s WHERE order_id = %s", [f"Street {BAD}", BAD], "shop_owner")
    assert run_cycle(shop)["failed"] == 1
    attempts, error = order_row(shop, BAD, "attempts, last_error")
    assert attempts == 1 and error.startswith("23514: ")
    assert shop.sql("SELECT order_number FROM amazon_pii.overdue") == [(order_number(BAD),)]
    shop.sql("ALTER TABLE shop.addresses DROP CONSTRAINT no_placeholder", user="shop_owner")
    pass_time(shop, "1 minute")
    assert run_cycle(shop)["failed"] == 0
    assert redacted(shop) == ALL_BUT_BAD | {BAD}
    assert shop.sql("SELECT order_number FROM amazon_pii.overdue") == []


# P4: cost

TOUCHED = """SELECT relname, seq_scan, COALESCE(idx_scan, 0), n_tup_upd FROM pg_stat_user_tables WHERE schemaname = 'shop' ORDER BY 1"""


def scans(db, *users):
    report_statistics(db, *users)
    return db.sql(TOUCHED)


def test_cycle_with_nothing_due_touches_no_table(shop):
    # Breaks when a cycle looks through the tables for its work: its cost would grow with their size.
    for age, last in (("1 day", 60), ("40 days", 80)):
        fill(shop, last, first=last - 19, age=age)
    run_cycle(shop)
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    before = scans(shop, "pii_admin")
    assert any(row[1] + row[2] for row in before)
    for _ in range(3):
        shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert scans(shop, "pii_admin") == before


def test_cost_follows_what_is_due(shop):
    # Breaks when a statement of the cycle has no index to go by: every one would read the whole table.
    fill(shop, 1000, first=101, age="1 day")
    run_cycle(shop)
    fill(shop, 2000, first=2000)
    reads = "SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE schemaname = 'shop'"
    report_statistics(shop, "shop_owner", "pii_admin")
    before = shop.value(reads)
    assert run_cycle(shop)["redacted"] == 1
    report_statistics(shop, "pii_admin")
    assert shop.value(reads) == before


# P4: what is overdue is shown and announced until it is done


def overdue(db):
    (shown,) = db.sql("SELECT overdue, worst_overdue_by > '9 days' FROM amazon_pii.status")
    assert db.value("SELECT count(*) FROM amazon_pii.overdue", user="pii_operator") == shown[0]
    return shown


@pytest.mark.parametrize("state", ["never enabled", "disabled", "suspended", "waiting for a cycle"])
def test_overdue_shows_until_it_is_done(db, state):
    # Breaks when a policy that is not at work hides what it does not do.
    open_shop(db)
    db.apply_policy(shop_policy(enabled=state != "never enabled"))
    fill(db, ORDERS)
    db.sql("CALL amazon_pii.run_cycle()", user="pii_admin") if state == "never enabled" else None
    if state == "disabled":
        db.sql("SELECT amazon_pii.disable_policy('shop', 'maintenance')", user="pii_admin")
    if state == "suspended":
        db.sql("UPDATE amazon_pii.policy SET suspended = 'test'")
    assert overdue(db) == (ORDERS, True)
    listener = db.connect()
    listener.cursor().execute("LISTEN amazon_pii")
    if state != "waiting for a cycle":
        assert run_cycle(db) == {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": ORDERS}
        told = lambda: listener.poll() or [n.payload for n in listener.notifies if '"overdue"' in n.payload]
        wait_until(told, message="nothing is announced")
        assert [f'"count":{ORDERS}' in payload for payload in told()] == [True]
        assert overdue(db) == (ORDERS, True)
        db.sql("UPDATE amazon_pii.policy SET suspended = NULL")
        db.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    assert run_cycle(db)["overdue"] == 0
    assert overdue(db) == (0, None)


# P4: locks


def application(db):
    """A transaction of the application's that is left open."""
    return db.connect("shop_owner", autocommit=False)


def tried_again(db):
    """After a lock: not failed, no attempt counted, and done once its short wait is over."""
    row = order_row(db, BAD, "status, attempts, last_error, next_attempt_at - now() <= '60 s'")
    assert row == ("archived", 0, None, True)
    pass_time(db, "1 minute")
    assert run_cycle(db)["redacted"] == 1
    assert redacted(db) == ALL_BUT_BAD | {BAD}


@pytest.mark.parametrize("statement", [
    "SELECT FROM shop.orders WHERE id = {} FOR UPDATE",
    "SELECT FROM shop.addresses WHERE order_id = {} FOR UPDATE",
    "SELECT FROM shop.addresses WHERE order_id = {} FOR SHARE",
    "UPDATE shop.addresses SET kind = 'invoice' WHERE order_id = {}",
    "UPDATE shop.customers SET tier = 'gold' WHERE id = {}",
    "SELECT FROM shop.customers WHERE id = {} FOR KEY SHARE",
])
def test_rows_that_the_application_has_locked_leave_their_order_for_later(shop, statement):
    # Breaks when a cycle waits for a row: one forgotten transaction would stop redaction.
    open_transaction = application(shop)
    open_transaction.cursor().execute(statement.format(BAD))
    call = Background(shop, "CALL amazon_pii.run_cycle()")
    waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
    while call.is_alive():
        assert shop.sql(waits, [call.pid]) != [(True,)], "the cycle waits for the application"
    counts = dict(zip(COUNTS, call.result()[0]))
    assert (counts["redacted"], counts["failed"], counts["overdue"]) == (ORDERS - 1, 0, 1)
    assert redacted(shop) == ALL_BUT_BAD
    open_transaction.commit()
    tried_again(shop)


def test_application_does_not_wait_for_a_cycle_that_hangs_elsewhere(shop):
    # Breaks when a cycle holds locks that the application's ordinary statements need.
    stop_at(shop, "addresses", shop.value("SELECT id FROM shop.addresses WHERE order_id = %s", [BAD]))
    call = Background(shop, "CALL amazon_pii.run_cycle()")
    stopped(shop)
    with shop.connect("shop_owner", options="-c lock_timeout=1s -c statement_timeout=10s") as connection:
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at) VALUES (900, %s, 'amazon', NULL, now())",
                           [order_number(900)])
            cursor.execute("SELECT count(*) FROM shop.orders")
            cursor.execute("INSERT INTO shop.addresses (order_id, name) VALUES (900, 'Name 900')")
            cursor.execute("UPDATE shop.addresses SET name = 'Name 901' WHERE order_id = 900")
    shop.sql("SELECT pg_cancel_backend(%s)", [call.pid])
    with pytest.raises(Exception, match="cancel"):
        call.result()
    go_on(shop)
    assert run_cycle(shop)["overdue"] == 0


def test_lock_on_a_whole_table_makes_orders_wait(db):
    # Breaks when ALTER TABLE or VACUUM FULL of the application's counts as a failure of every order.
    open_shop(db)
    db.apply_policy(shop_policy())
    fill(db, 3)
    migration = application(db)
    migration.cursor().execute("LOCK TABLE shop.invoices IN ACCESS EXCLUSIVE MODE")
    call = Background(db, "CALL amazon_pii.run_cycle()").wait_for_lock(db)
    # Nobody stands behind the cycle in the queue of another table.
    db.sql("UPDATE shop.customers SET tier = 'gold' WHERE id = 1", user="shop_owner")
    counts = dict(zip(COUNTS, call.result()[0]))
    assert (counts["redacted"], counts["failed"]) == (0, 0)
    assert db.sql("SELECT count(*), sum(attempts) FROM amazon_pii.orders WHERE status IN ('scheduled', 'archived')") == [(3, 0)]
    assert db.value("SELECT overdue FROM amazon_pii.status") == 3
    migration.rollback()
    pass_time(db, "1 minute")
    assert run_cycle(db)["redacted"] == 3
    assert redacted(db) == {1, 2, 3}
    assert db.value("SELECT last_error FROM amazon_pii.status") is None


def test_lock_on_a_whole_table_during_a_cycle_does_not_hold_it_for_long(shop):
    # Breaks when each order of a batch waits for the locked table by itself, two seconds each, in which all of them stay
    # locked against retrieve() and the application's edits.
    began = time.monotonic()
    turn = shop.connect(autocommit=False)
    call = between_archiving_and_redacting(shop, turn)
    migration = application(shop)
    migration.cursor().execute("LOCK TABLE shop.invoice_lines IN ACCESS EXCLUSIVE MODE")
    turn.rollback()
    counts = dict(zip(COUNTS, call.result()[0]))
    assert (counts["redacted"], counts["failed"], counts["overdue"]) == (0, 0, ORDERS)
    assert time.monotonic() - began < 20
    assert shop.value("SELECT sum(attempts) FROM amazon_pii.orders") == 0
    migration.rollback()
    pass_time(shop, "1 minute")
    assert run_cycle(shop)["redacted"] == ORDERS
