"""effective_from: "takes effect on one date for old customers and from the start for new ones". Before it an order is flagged,
shown and previewed, and not touched."""
from datetime import datetime, timedelta, timezone

import pytest
from cluster import wait_until
from support import (
    add_customer, add_order, fill, number, open_shop, order_value, record_states, refused, run_cycle, shop_policy, sweep, tables_with,
)

NOTHING = {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 0}


def moment(**ahead):
    return (datetime.now(timezone.utc) + timedelta(**ahead)).isoformat(timespec="seconds")


def per_tenant(expression="starts_on", **changes):
    document = shop_policy(**changes)
    document["orders"]["effective_from"] = expression
    return document


@pytest.fixture
def shop(db):
    open_shop(db)
    db.sql("ALTER TABLE shop.orders ADD starts_on date, ADD starts_at timestamptz", user="shop_owner")
    return db


def starts(db, order, moment):
    db.sql("UPDATE shop.orders SET starts_at = %s WHERE id = %s", [moment, order], "shop_owner")


def dues(db, order):
    """What is due when, and the moment of effect, in UTC."""
    columns = ", ".join(f"({c} AT TIME ZONE 'UTC')::text" for c in ("archive_due_at", "redact_due_at", "effective_at"))
    return db.sql(f"SELECT {columns} FROM amazon_pii.orders WHERE order_key = %s", [f'["{order}"]'])[0]


def test_before_the_date_orders_are_flagged_and_shown_and_not_touched(shop):
    """Breaks when a policy that is not in effect archives, redacts, or calls an order overdue."""
    for order, age in ((1, "400 days"), (2, "29 days 12 hours"), (3, "1 day"), (4, None)):
        add_order(shop, order, age)
    at = moment(days=3)
    shop.apply_policy(shop_policy(effective_from=at))
    assert run_cycle(shop) == {**NOTHING, "flagged": 4}
    add_order(shop, 5, "40 days")
    assert run_cycle(shop) == NOTHING
    assert shop.sql("SELECT DISTINCT status FROM amazon_pii.orders WHERE anchor_at IS NOT NULL") == [("scheduled",)]
    for order in (1, 2, 5):
        assert len(set(dues(shop, order))) == 1, "due at the date, not before"
    archive, redact, effective = dues(shop, 3)
    assert effective < archive < redact, "its own date is later"
    assert shop.sql("SELECT * FROM amazon_pii.overdue") == []
    assert shop.sql("SELECT not_in_effect, overdue, next_in_effect_at FROM amazon_pii.status") == [(5, 0, datetime.fromisoformat(at))]
    assert shop.value("SELECT count(*) FROM amazon_pii.upcoming WHERE effective_at = due_at AND action = 'archive'") == 3
    steps = shop.sql("SELECT detail FROM amazon_pii.explain_order(%s) WHERE step = 'effective'", [number(1)], "pii_auditor")
    assert len(steps) == 1 and "only flagged" in steps[0][0]
    # No cycle looks at them before: that is what the index on next_due_at is read for.
    assert shop.value("SELECT count(*) FROM amazon_pii.order_state WHERE next_due_at < %s", [at]) == 0


def test_the_preview_shows_them_as_of_the_date(shop):
    """Breaks when nobody can see beforehand what the date will do, also with orders that no sweep has flagged yet."""
    add_order(shop, 1, "400 days")
    preview = "SELECT action, orders FROM amazon_pii.preview('shop', now() + %s::interval) WHERE table_name = 'shop.addresses'"
    for document in (shop_policy(effective_from=moment(days=3)), per_tenant("now() + '3 days'::interval")):
        shop.apply_policy(document)
        for _ in range(2):
            assert shop.sql(preview, ["2 days"], "pii_admin") == []
            assert shop.sql(preview, ["4 days"], "pii_admin") == [("archive", 1), ("redact", 1)]
            if "NOW" not in str(document).upper():
                run_cycle(shop)
        shop.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user="pii_admin")


def test_when_the_date_has_come_it_is_done(shop):
    """Breaks when an order that was not in effect is never looked at again."""
    add_order(shop, 1)
    shop.apply_policy(shop_policy(effective_from=moment(seconds=10)))
    assert run_cycle(shop) == {**NOTHING, "flagged": 1}
    assert tables_with(shop, "Name1") == ["addresses"]
    wait_until(lambda: run_cycle(shop)["redacted"] == 1, timeout=20)
    assert tables_with(shop, "Name1") == []
    assert shop.value("SELECT redacted_at >= effective_at FROM amazon_pii.orders") is True
    assert shop.value("SELECT not_in_effect FROM amazon_pii.status") == 0


def test_old_customers_from_a_date_and_new_ones_from_the_start(shop):
    """The guide's sentence. Breaks when NULL is not "from the start", or one tenant's date is another's."""
    for order in (1, 2, 3):
        add_order(shop, order)
    shop.sql("UPDATE shop.orders SET starts_on = CASE id WHEN 1 THEN current_date + 5 WHEN 2 THEN current_date - 5 END", user="shop_owner")
    shop.apply_policy(per_tenant())
    assert run_cycle(shop) == {"flagged": 3, "archived": 2, "redacted": 2, "failed": 0, "overdue": 0}
    assert [order_value(shop, i) for i in (1, 2, 3)] == ["scheduled", "redacted", "redacted"]
    # At import, one by one and many at a time.
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, starts_on) SELECT i, 'n' || i, 'amazon', now() - '40 days'::interval, "
             "CASE WHEN i % 2 = 0 THEN current_date + 5 END FROM generate_series(1001, 4000) AS i", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1500
    assert shop.value("SELECT not_in_effect FROM amazon_pii.status") == 1501


@pytest.mark.parametrize("zone, whole, own, expected", [
    ("Europe/Berlin", None, "2036-07-01", "2036-06-30 22:00:00"),
    ("Europe/Berlin", "2036-07-02", None, "2036-07-01 22:00:00"),
    ("Asia/Tokyo", "2036-07-02 09:00", "2036-07-02", "2036-07-02 00:00:00"),
    ("UTC", "2036-07-02", "2036-07-01", "2036-07-02 00:00:00"),
    ("UTC", "2036-07-01T00:00:00+02:00", None, "2036-06-30 22:00:00"),
    ("UTC", None, "-infinity", None),
    ("UTC", None, "infinity", "infinity"),
])
def test_the_later_of_both_dates_counts_in_the_policys_zone(shop, zone, whole, own, expected):
    """Breaks when a date is read in the session's zone, or an order's own date brings the policy's forward."""
    document = per_tenant(timezone=zone)
    if whole:
        document |= {"effective_from": whole, "loosened": "test"}
    shop.apply_policy(document)
    shop.sql("SET TimeZone = 'Pacific/Kiritimati'", user="shop_owner")
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, starts_on) VALUES (1, 'n', 'amazon', now() - '40 days'::interval, %s)",
             [own], "shop_owner")
    archive, redact, effective = dues(shop, 1)
    assert effective == expected
    if expected:
        assert archive == redact == expected
    assert run_cycle(shop)["redacted"] == (expected is None)


def test_a_new_date_moves_what_is_not_redacted_yet(shop):
    """Breaks when an order that was archived is redacted before the new date, or keeps waiting for one that was taken back."""
    for order, age in ((1, "40 days"), (2, "29 days 12 hours"), (3, "3 days"), (4, None)):
        add_order(shop, order, age)
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    assert [order_value(shop, i) for i in (1, 2, 3, 4)] == ["redacted", "archived", "scheduled", "flagged"]
    # Order 2 would be due by now.
    later = shop_policy(archive_after="1 day", redact_after="2 days")
    shop.apply_policy({**later, "effective_from": moment(days=9)})
    assert run_cycle(shop) == NOTHING
    assert [order_value(shop, i) for i in (1, 2, 3, 4)] == ["redacted", "archived", "scheduled", "flagged"]
    assert [order_value(shop, i, "effective_at IS NULL") for i in (1, 2, 3, 4)] == [True, False, False, False]
    assert shop.value("SELECT count(*) FROM amazon_pii.orders WHERE redact_due_at = effective_at") == 2
    shop.apply_policy({**later, "effective_from": moment(days=-1)})
    assert run_cycle(shop)["redacted"] == 2
    shop.apply_policy(later)
    run_cycle(shop)
    assert [order_value(shop, i) for i in (1, 2, 3, 4)] == ["redacted", "redacted", "redacted", "flagged"]
    assert shop.value("SELECT count(*) FROM amazon_pii.orders WHERE effective_at IS NOT NULL AND status = 'flagged'") == 0


def test_an_orders_own_date_may_move_until_it_is_redacted(shop):
    """Breaks when the date is frozen with the archive, is found by a trigger only, or moves what is redacted."""
    for order, age in ((1, "29 days 12 hours"), (2, "40 days"), (3, "40 days")):
        add_order(shop, order, age)
    shop.apply_policy(per_tenant("starts_at"))
    for order in (2, 3):
        starts(shop, order, moment(days=5))
    run_cycle(shop)
    assert [order_value(shop, i) for i in (1, 2, 3)] == ["archived", "scheduled", "scheduled"]
    starts(shop, 1, moment(days=5))
    assert len(set(dues(shop, 1)[1:])) == 1
    starts(shop, 1, None)
    assert order_value(shop, 1, "redact_due_at = anchor_at + '30 days'::interval AND effective_at IS NULL") is True
    starts(shop, 2, moment(days=-5))
    assert run_cycle(shop)["redacted"] == 1
    assert order_value(shop, 2) == "redacted"
    # Without triggers, by the sums of the sweep.
    shop.sql("ALTER TABLE shop.orders DISABLE TRIGGER USER", user="shop_owner")
    starts(shop, 3, None)
    starts(shop, 2, moment(days=5))
    shop.sql("ALTER TABLE shop.orders ENABLE TRIGGER USER", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 0
    assert sweep(shop)["redacted"] == 1
    assert [order_value(shop, i) for i in (2, 3)] == ["redacted", "redacted"]
    # Personal data that comes back to a redacted order does not wait for a date either.
    shop.sql("UPDATE shop.addresses SET name = 'Back2' WHERE order_id = 2", user="shop_owner")
    run_cycle(shop)
    assert tables_with(shop, "Back2") == []


def test_no_window_reaches_before_the_date(shop):
    """Breaks when what falls due before the next window ends is done in this one although it is not in effect yet."""
    add_order(shop, 1)
    zone = timezone(timedelta(hours=-3))
    opens, closes = ((datetime.now(zone) + timedelta(hours=h)).strftime("%H:%M") for h in (-2, 2))
    shop.apply_policy(shop_policy(effective_from=moment(hours=20), window={"from": opens, "to": closes, "timezone": "Etc/GMT+3"}))
    assert run_cycle(shop) == {**NOTHING, "flagged": 1}
    assert order_value(shop, 1) == "scheduled"


@pytest.mark.parametrize("own", ["2999-01-01", "infinity"])
def test_an_order_that_is_not_in_effect_keeps_its_customer(shop, own):
    """Breaks when a row that it shares is overwritten with an order that is."""
    add_customer(shop, 1)
    for order in (1, 2):
        add_order(shop, order, customer=1)
    shop.sql("UPDATE shop.orders SET starts_on = %s WHERE id = 2", [own], "shop_owner")
    shop.apply_policy(per_tenant())
    assert run_cycle(shop)["redacted"] == 1
    assert shop.value("SELECT first_name FROM shop.customers") == "First1"
    assert record_states(shop, "shop.customers", 1) == {1: "waiting"}


def test_a_stale_order_waits_for_the_date(shop):
    """Breaks when an order without a date of dispatch is redacted, or announced, before the policy is in effect."""
    shop.sql("ALTER TABLE shop.orders ADD placed_at timestamptz DEFAULT now() - '99 days'::interval", user="shop_owner")
    add_order(shop, 1, None)
    document = shop_policy(effective_from=moment(days=5))
    document["orders"].update(placed="placed_at", stale_after="60 days", stale="redact")
    shop.apply_policy(document)
    assert run_cycle(shop) == {**NOTHING, "flagged": 1}
    assert (order_value(shop, 1), order_value(shop, 1, "stale_at = effective_at")) == ("flagged", True)
    del document["effective_from"]
    shop.apply_policy(document)
    assert run_cycle(shop)["redacted"] == 1


def test_an_order_that_could_not_be_archived_waits_for_a_new_date(shop):
    """Breaks when a failed order is tried again each cycle although it is not in effect any more."""
    add_order(shop, 1)
    shop.apply_policy(shop_policy())
    shop.sql("CREATE FUNCTION shop.stop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$; "
             "CREATE TRIGGER stop BEFORE UPDATE ON shop.addresses FOR EACH ROW EXECUTE FUNCTION shop.stop()", user="shop_owner")
    assert run_cycle(shop)["failed"] == 1
    shop.sql("DROP TRIGGER stop ON shop.addresses", user="shop_owner")
    shop.apply_policy(shop_policy(effective_from=moment(days=5)))
    assert shop.value("SELECT next_due_at = effective_at FROM amazon_pii.order_state") is True
    assert shop.sql("SELECT * FROM amazon_pii.overdue") == []


def test_what_is_no_moment_is_refused(shop):
    """Breaks when a date is misread, or found out to be none on the day."""
    for document in (shop_policy(effective_from="01.01.2027"), shop_policy(effective_from=2027), per_tenant("total"), per_tenant("channel")):
        with refused("22023", "effective_from"):
            shop.apply_policy(document)
    with refused("42703"):
        shop.apply_policy(per_tenant("no_such_column"))
    document = per_tenant("CASE WHEN gift_message LIKE 'Gift%' THEN now() END")
    add_order(shop, 1)
    with refused("22023", "effective_from"):
        shop.apply_policy(document)


def test_an_expression_that_fails_does_not_fail_the_import(shop):
    """P11. Breaks when the shop's statement meets the policy's error."""
    shop.apply_policy(per_tenant("CASE WHEN total = 13 THEN (1 / (total - 13))::text::timestamptz END"))
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, total) VALUES (1, 'n', 'amazon', now() - '40 days'::interval, 13)", user="shop_owner")
    assert order_value(shop, 1) == "failed"
    run_cycle(shop)
    assert "22012" in shop.value("SELECT last_error FROM amazon_pii.status")
    shop.sql("UPDATE shop.orders SET total = 1", user="shop_owner")
    shop.sql("UPDATE amazon_pii.touched SET next_attempt_at = now()")
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    assert run_cycle(shop)["redacted"] == 1


def test_thousands_of_orders_that_wait_for_the_date_cost_a_cycle_nothing(shop):
    """P4. Breaks when each cycle reads the orders that are not in effect."""
    fill(shop, 3000)
    shop.apply_policy(shop_policy(effective_from=moment(days=5)))
    run_cycle(shop)
    shop.sql("VACUUM ANALYZE amazon_pii.order_state")
    plan = shop.sql("EXPLAIN (ANALYZE, FORMAT JSON) SELECT FROM amazon_pii.order_state WHERE policy = 'shop' AND next_due_at <= now()")
    assert plan[0][0][0]["Plan"]["Actual Rows"] == 0
    cycled = shop.value("SELECT cycled_at FROM amazon_pii.policy")
    runs = shop.value("SELECT count(*) FROM amazon_pii.runs")
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM amazon_pii.runs") == runs and shop.value("SELECT cycled_at FROM amazon_pii.policy") > cycled
