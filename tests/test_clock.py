"""When an order is due: how it is found, where its clock starts, what pushes it back, and windows."""
from datetime import datetime, timedelta, timezone

import pytest
from cluster import wait_until
from support import (
    add_customer, add_invoice, add_order, number, open_shop, order_value, refused, run_cycle, shop_policy, sweep, tables_with,
)

PARCELS = """
SET ROLE shop_owner;
CREATE TABLE shop.parcels (id bigint PRIMARY KEY, order_id bigint NOT NULL, shipped_at timestamptz, canceled_at timestamptz);
CREATE INDEX ON shop.parcels (order_id);
ALTER TABLE shop.orders ADD open_items int NOT NULL DEFAULT 0, ADD sent_on date, ADD sent_local timestamp, ADD canceled_at timestamptz;
"""


@pytest.fixture
def shop(db):
    open_shop(db)
    db.psql(PARCELS)
    return db


def policy(anchor, **changes):
    document = shop_policy(**changes)
    document["orders"]["anchor"] = anchor
    document["linked"].append({"table": "shop.parcels", "on": {"order_id": "id"}})
    return document


def anchor(db, order=1):
    """The order's anchor as it is in UTC."""
    return order_value(db, order, "(anchor_at AT TIME ZONE 'UTC')::text")


# How orders are found

def test_existing_orders_are_handled_at_the_first_enabling(db):
    """Breaks when only orders imported after the policy are seen, or a disabled policy does its work."""
    open_shop(db)
    for order, shipped in ((1, "40 days"), (2, "3 days"), (3, None)):
        add_order(db, order, shipped)
    add_order(db, 4, channel="web")
    db.apply_policy(shop_policy(enabled=False))
    assert run_cycle(db)["redacted"] == 0
    add_order(db, 5)
    assert order_value(db, 5) == "scheduled", "a disabled policy still flags"
    assert (number(5),) in db.sql("SELECT order_number FROM amazon_pii.overdue")
    run_cycle(db)
    assert tables_with(db, "Name1") == tables_with(db, "Name5") == ["addresses"]
    db.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    assert run_cycle(db)["redacted"] == 2
    assert [order_value(db, i) for i in range(1, 6)] == ["redacted", "scheduled", "flagged", None, "redacted"]
    db.sql("SELECT amazon_pii.disable_policy('shop', 'maintenance')", user="pii_admin")
    db.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 2", user="shop_owner")
    assert run_cycle(db) == {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 1}


def test_the_sweep_finds_what_was_imported_while_triggers_were_off(db):
    """Breaks when an order without a trigger's notice is never found, or one whose date changed so."""
    open_shop(db)
    db.apply_policy(shop_policy())
    add_order(db, 1, None)
    run_cycle(db)
    db.sql("ALTER TABLE shop.orders DISABLE TRIGGER USER", user="shop_owner")
    add_order(db, 2)
    db.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 1", user="shop_owner")
    db.sql("ALTER TABLE shop.orders ENABLE TRIGGER USER", user="shop_owner")
    assert run_cycle(db)["flagged"] == 0
    assert [order_value(db, i) for i in (1, 2)] == ["flagged", None]
    assert sweep(db)["flagged"] == 1
    assert [order_value(db, i) for i in (1, 2)] == ["redacted", "redacted"]


def test_the_sweep_comes_by_itself_every_day(db):
    """Breaks when a sweep must be asked for."""
    open_shop(db)
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.sql("ALTER TABLE shop.orders DISABLE TRIGGER USER", user="shop_owner")
    add_order(db, 1)
    assert run_cycle(db)["flagged"] == 0
    db.sql("UPDATE amazon_pii.policy SET swept_at = swept_at - '1 day'::interval, sweep_started_at = sweep_started_at - '1 day'::interval")
    assert run_cycle(db)["redacted"] == 1


def test_many_existing_orders_are_swept_in_slices(db):
    """Breaks when a sweep of several slices skips keys or ends too early, also with a key that sorts as text."""
    open_shop(db)
    db.sql("INSERT INTO shop.orders (id, external_no, channel) SELECT i, 'n' || i, CASE WHEN i % 3 = 0 THEN 'web' ELSE 'amazon' END "
           "FROM generate_series(-3000, 4500) AS i", user="shop_owner")
    db.apply_policy(shop_policy())
    assert run_cycle(db)["flagged"] == 5000
    assert db.value("SELECT count(DISTINCT order_key) FROM amazon_pii.orders WHERE status = 'flagged'") == 5000


# Where the clock starts

@pytest.mark.parametrize("zone, at, column, expected", [
    ("UTC", "2026-07-01", "sent_on", "2026-07-01 00:00:00"),
    ("Europe/Berlin", "2026-07-01", "sent_on", "2026-06-30 22:00:00"),
    ("America/Los_Angeles", "2026-01-01", "sent_on", "2026-01-01 08:00:00"),
    ("Europe/Berlin", "2026-01-15 12:30", "sent_local", "2026-01-15 11:30:00"),
    ("Europe/Berlin", "2026-07-15 12:30", "sent_local", "2026-07-15 10:30:00"),
    ("Europe/Berlin", "2026-07-15 12:30+00", "shipped_at", "2026-07-15 12:30:00"),
    ("Asia/Tokyo", "2026-07-01", "sent_on + 1", "2026-07-01 15:00:00"),
    ("UTC", "2026-07-01", "greatest(sent_on, shipped_at::date)", "2026-07-01 00:00:00"),
    ("UTC", "infinity", "sent_on", None),
])
def test_an_anchor_is_a_time_in_the_policys_zone(shop, zone, at, column, expected):
    """Breaks when a date or a time without zone is read in the session's zone, or in UTC whatever the policy says."""
    shop.apply_policy(policy(column, timezone=zone))
    target = next(c for c in ("sent_on", "sent_local", "shipped_at") if c in column)
    shop.sql("SET TimeZone = 'Pacific/Kiritimati'", user="shop_owner")
    shop.sql(f"INSERT INTO shop.orders (id, external_no, channel, {target}) VALUES (1, 'n', 'amazon', %s)", [at], "shop_owner")
    assert anchor(shop) == expected
    assert order_value(shop, 1) == ("scheduled" if expected else "flagged")


LINKED = {"linked": "parcels", "at": "shipped_at", "where": "canceled_at IS NULL", "complete": "open_items = 0"}


def test_the_last_parcel_starts_the_clock(shop):
    """Breaks when a part-shipped order is due, canceled parcels count, or the first parcel decides."""
    shop.apply_policy(policy(LINKED))

    def after(statement):
        shop.sql(statement, user="shop_owner")
        return anchor(shop)

    assert after("INSERT INTO shop.orders (id, external_no, channel, open_items, shipped_at) VALUES (1, 'n', 'amazon', 2, now())") is None
    assert after("INSERT INTO shop.parcels VALUES (1, 1, '2026-07-01')") is None, "two items are open"
    assert after("UPDATE shop.orders SET open_items = 0") == "2026-07-01 00:00:00"
    assert after("INSERT INTO shop.parcels VALUES (2, 1, '2026-07-05'), (3, 1, '2026-07-03')") == "2026-07-05 00:00:00"
    assert after("INSERT INTO shop.parcels VALUES (4, 1, NULL)") is None, "one is not dispatched yet"
    assert order_value(shop, 1) == "flagged"
    assert after("UPDATE shop.parcels SET canceled_at = now() WHERE id = 4") == "2026-07-05 00:00:00"
    assert after("UPDATE shop.parcels SET canceled_at = now() WHERE id = 2") == "2026-07-03 00:00:00"
    assert after("UPDATE shop.parcels SET canceled_at = now()") is None, "none is left"
    assert after("UPDATE shop.parcels SET canceled_at = NULL WHERE id = 1") == "2026-07-01 00:00:00"
    shop.sql("DELETE FROM shop.parcels", user="shop_owner")
    sweep(shop)
    assert anchor(shop) is None


@pytest.mark.parametrize("statement, left", [
    ("DELETE FROM shop.parcels WHERE id = 2", "2026-07-01 00:00:00"),
    ("DELETE FROM shop.parcels", None),
    ("TRUNCATE shop.parcels", None),
])
def test_parcels_that_are_deleted_set_the_clock_back(shop, statement, left):
    """Breaks when an order goes by a parcel that is gone until the next daily sweep."""
    shop.apply_policy(policy(LINKED, archive_after="9000 days", redact_after="9001 days", loosened="test"))
    run_cycle(shop)
    shop.sql("INSERT INTO shop.orders (id, external_no, channel) VALUES (1, 'n', 'amazon'), (2, 'n', 'amazon'); "
             "INSERT INTO shop.parcels VALUES (1, 1, '2026-07-01'), (2, 1, '2026-07-05'), (3, 2, '2026-07-09')", user="shop_owner")
    assert (anchor(shop), anchor(shop, 2)) == ("2026-07-05 00:00:00", "2026-07-09 00:00:00")
    # A cycle is at this order: the DELETE does not wait for it.
    with shop.connect(autocommit=False) as cycle, cycle.cursor() as cursor:
        cursor.execute("SELECT FROM amazon_pii.order_state FOR UPDATE")
        with shop.connect("shop_owner", options="-c statement_timeout=5s") as session:
            session.cursor().execute(statement)
    run_cycle(shop)
    assert anchor(shop) == left
    assert anchor(shop, 2) == ("2026-07-09 00:00:00" if "WHERE" in statement else None)
    assert order_value(shop, 1) == ("scheduled" if left else "flagged")


def test_an_order_whose_parcel_was_deleted_is_not_redacted(shop):
    """Breaks when a cycle redacts before it has looked at what was deleted."""
    shop.apply_policy(policy(LINKED))
    run_cycle(shop)
    add_order(shop, 1, None)
    shop.sql("UPDATE shop.orders SET open_items = 0; INSERT INTO shop.parcels VALUES (1, 1, now() - '40 days'::interval)", user="shop_owner")
    assert order_value(shop, 1) == "scheduled"
    shop.sql("DELETE FROM shop.parcels", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 0
    assert tables_with(shop, "Name1") == ["addresses"]


def test_a_parcel_that_moves_to_another_order(shop):
    """Breaks when only the order that a row points at now is looked at."""
    shop.apply_policy(policy(LINKED))
    shop.sql("INSERT INTO shop.orders (id, external_no, channel) VALUES (1, 'n', 'amazon'), (2, 'n', 'amazon')", user="shop_owner")
    shop.sql("INSERT INTO shop.parcels VALUES (1, 1, now() - '3 days'::interval)", user="shop_owner")
    shop.sql("UPDATE shop.parcels SET order_id = 2", user="shop_owner")
    assert anchor(shop, 2) is not None
    assert anchor(shop, 1) is None


def test_the_first_anchor_that_is_not_null_counts(shop):
    """Breaks when a list takes the earliest or the last, or a canceled order never starts its clock."""
    shop.apply_policy(policy(["canceled_at", LINKED, "sent_on"]))
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, open_items) VALUES (1, 'n', 'amazon', 1)", user="shop_owner")
    assert anchor(shop) is None
    for statement, expected in (
        ("UPDATE shop.orders SET sent_on = '2026-07-20'", "2026-07-20"),
        ("INSERT INTO shop.parcels VALUES (1, 1, '2026-07-10')", "2026-07-20"),
        ("UPDATE shop.orders SET open_items = 0", "2026-07-10"),
        ("UPDATE shop.orders SET canceled_at = '2026-07-15'", "2026-07-15"),
        ("UPDATE shop.orders SET canceled_at = NULL", "2026-07-10"),
    ):
        shop.sql(statement, user="shop_owner")
        assert anchor(shop) == f"{expected} 00:00:00", statement
    assert "first of 3" in str(shop.sql("SELECT * FROM amazon_pii.explain_order('n')", user="pii_auditor"))


def test_an_archived_orders_anchor_is_frozen(shop):
    """Breaks when touching an old order gives its PII another month."""
    shop.apply_policy(policy("shipped_at"))
    add_order(shop, 1, "29 days 12 hours")
    run_cycle(shop)
    frozen = anchor(shop)
    shop.sql("UPDATE shop.orders SET shipped_at = now()", user="shop_owner")
    sweep(shop)
    assert (anchor(shop), order_value(shop, 1)) == (frozen, "archived")


def test_a_wrong_anchor_is_refused(shop):
    """Breaks when an anchor that is no time, or names no entry, is found out on day 30."""
    for bad in ("total", "no_such_column", {"linked": "nothing", "at": "shipped_at"}, {"linked": "parcels", "at": "id"}):
        with refused("42703" if bad == "no_such_column" else "22023"):
            shop.apply_policy(policy(bad))
    problems = shop.check_policy(policy({k: v for k, v in LINKED.items() if k != "complete"}))
    assert [p[0] for p in problems if "complete" in p[3]] == ["warning"]


# What pushes it back

def test_a_young_invoice_pushes_the_order_back(db):
    """Breaks when the invoice's own month is not waited for, or nobody can see why the order is late."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    add_invoice(db, 1, 1, "50 days")
    add_invoice(db, 2, 1, "5 days")
    db.apply_policy(shop_policy())
    assert run_cycle(db) == {"flagged": 1, "archived": 1, "redacted": 0, "failed": 0, "overdue": 0}
    assert tables_with(db, "BillTo1") == ["invoices"] and tables_with(db, "Name1") == ["addresses"]
    assert order_value(db, 1, "pushed_by") == "invoices"
    assert db.value("SELECT redact_due_at = invoiced_at + '30 days'::interval FROM amazon_pii.orders, shop.invoices WHERE id = 2") is True
    assert "pushed back by invoices" in str(db.sql("SELECT * FROM amazon_pii.explain_order(%s)", [number(1)], "pii_operator"))
    assert run_cycle(db)["redacted"] == 0


def test_a_pushed_order_is_redacted_in_the_end(db):
    """Breaks when a pushed order is not looked at again."""
    open_shop(db)
    db.apply_policy(shop_policy(archive_after="1 second", redact_after="8 seconds"))
    add_order(db, 1)
    add_invoice(db, 1, 1, "0 seconds")
    run_cycle(db)
    assert tables_with(db, "Name1") == ["addresses"]
    wait_until(lambda: run_cycle(db)["redacted"] == 1, timeout=30)
    assert tables_with(db, "Name1") == tables_with(db, "BillTo1") == []
    assert db.value("SELECT now() >= invoiced_at + '8 seconds'::interval FROM shop.invoices") is True


# Windows

def window(opens, closes):
    """A window that opens and closes so many hours from now, in a zone of its own."""
    zone = timezone(timedelta(hours=-3))
    at = [(datetime.now(zone) + timedelta(hours=h)).strftime("%H:%M") for h in (opens, closes)]
    return {"from": at[0], "to": at[1], "timezone": "Etc/GMT+3"}


def test_outside_its_window_a_policy_does_only_what_is_overdue(db):
    """Breaks when work is done at any hour, or what is past its deadline waits for the window."""
    open_shop(db)
    for order, age in ((1, "29 days 12 hours"), (2, "29 days 23 hours"), (3, "30 days 1 minute")):
        add_order(db, order, age)
    db.apply_policy(shop_policy(window=window(2, 4)))
    assert run_cycle(db) == {"flagged": 3, "archived": 1, "redacted": 1, "failed": 0, "overdue": 0}
    assert [order_value(db, i) for i in (1, 2, 3)] == ["scheduled", "scheduled", "redacted"]


def test_inside_its_window_a_policy_does_what_cannot_wait_for_the_next(db):
    """Breaks when the last window before a deadline is missed."""
    open_shop(db)
    for order, age in ((1, "28 days"), (2, "29 days 12 hours"), (3, "28 days 12 hours"), (4, "29 days 0.5 hours"), (5, "28 days 20 hours")):
        add_order(db, order, age)
    # The next window ends in a day and two hours: due within that is done now.
    db.apply_policy(shop_policy(window=window(-2, 2)))
    assert run_cycle(db)["redacted"] == 2
    assert [order_value(db, i) for i in (1, 2, 3, 4, 5)] == ["scheduled", "redacted", "scheduled", "redacted", "scheduled"]
