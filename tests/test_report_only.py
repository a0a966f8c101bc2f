"""Switched on, and report_only_until: a grace period in which cycles only report."""
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from cluster import wait_until
from support import (
    add_customer, add_order, documents, number, open_shop, order_value, refused, retrieve, run_cycle, shop_policy, snapshot, tables_with,
)

NOTHING = {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 0}


def moment(**ahead):
    return (datetime.now(timezone.utc) + timedelta(**ahead)).isoformat(timespec="seconds")


@pytest.fixture
def shop(db):
    open_shop(db)
    for order, age in ((1, "40 days"), (2, "29 days 12 hours"), (3, "1 day")):
        add_order(db, order, age)
    return db


def test_the_policy_must_be_switched_on(shop):
    """pixi: "must be switched on". Breaks when a policy that nobody enabled does its work, or one that somebody disabled."""
    document = shop_policy()
    del document["enabled"]
    shop.apply_policy(document)
    before = snapshot(shop)
    assert run_cycle(shop) == NOTHING
    assert snapshot(shop) == before and shop.value("SELECT enabled FROM amazon_pii.status") is False
    add_order(shop, 4, "50 days")
    assert run_cycle(shop) == {**NOTHING, "overdue": 1}
    assert shop.sql("SELECT DISTINCT waits_for FROM amazon_pii.overdue") == [("enable_policy",)]
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    assert run_cycle(shop) == {"flagged": 3, "archived": 3, "redacted": 2, "failed": 0, "overdue": 0}
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'maintenance')", user="pii_admin")
    # Only enable_policy switches: what a document says afterwards does not.
    shop.apply_policy(shop_policy(enabled=True, retrieved_for="20 days"))
    add_order(shop, 5, "40 days")
    assert run_cycle(shop)["redacted"] == 0


def test_until_the_moment_cycles_only_report(shop):
    """Breaks when something is archived or redacted in the grace period, or nobody learns what would have been."""
    until = moment(days=3)
    shop.apply_policy(shop_policy(report_only_until=until))
    before = snapshot(shop)
    with closing(shop.connect("pii_admin")) as session:
        session.cursor().execute("CALL amazon_pii.run_cycle('shop')")
        assert "would archive 2 orders and redact 1" in "".join(session.notices)
    assert snapshot(shop) == before and documents(shop) == {}
    assert [order_value(shop, i) for i in (1, 2, 3)] == ["scheduled"] * 3
    assert shop.sql("SELECT flagged, archived, redacted, overdue, finished_at IS NOT NULL FROM amazon_pii.runs") == [(3, 0, 0, 1, True)]
    assert shop.value("SELECT note FROM amazon_pii.runs").startswith("only reports until ")
    assert "would archive 2 orders and redact 1" in shop.value("SELECT note FROM amazon_pii.runs")
    assert shop.sql("SELECT report_only_until, overdue FROM amazon_pii.status") == [(datetime.fromisoformat(until), 1)]
    assert shop.sql("SELECT order_number, waits_for FROM amazon_pii.overdue") == [(number(1), "report_only_until")]
    assert shop.sql("SELECT action, orders FROM amazon_pii.preview('shop') WHERE table_name = 'shop.orders'", user="pii_admin") == [
        ("archive", 2), ("redact", 1)], "a preview shows what it will be"


def test_cycles_that_say_the_same_leave_one_row(shop):
    """Breaks when a month of grace fills the view with a row a minute, or a change is lost in it."""
    shop.apply_policy(shop_policy(report_only_until=moment(days=3)))
    for _ in range(4):
        assert run_cycle(shop)["overdue"] == 1
    assert shop.sql("SELECT flagged, note IS NOT NULL FROM amazon_pii.runs") == [(3, True)]
    add_order(shop, 4, "40 days")
    for _ in range(2):
        run_cycle(shop)
    notes = [n.split(": ")[1] for (n,) in shop.sql("SELECT note FROM amazon_pii.runs ORDER BY run_id")]
    assert notes == ["would archive 2 orders and redact 1", "would archive 3 orders and redact 2"]


def test_when_the_grace_period_is_over_the_work_is_done(shop):
    """Breaks when the period does not end by itself, or a new version does not end it."""
    shop.apply_policy(shop_policy(report_only_until=moment(seconds=10)))
    assert run_cycle(shop)["redacted"] == 0
    wait_until(lambda: run_cycle(shop)["redacted"] == 1, timeout=20)
    assert tables_with(shop, "Name1") == [] and shop.value("SELECT report_only_until FROM amazon_pii.status") is None
    add_order(shop, 4, "40 days")
    shop.apply_policy(shop_policy(report_only_until=moment(days=3)))
    assert run_cycle(shop)["redacted"] == 0
    shop.apply_policy(shop_policy())
    assert run_cycle(shop)["redacted"] == 1


def test_what_was_redacted_before_stays_within_reach(shop):
    """Breaks when a grace period that is set later locks people out, or redacts what they retrieved."""
    add_customer(shop, 1)
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    shop.apply_policy(shop_policy(report_only_until=moment(days=3)))
    assert retrieve(shop, number(1))
    shop.sql("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    assert run_cycle(shop)["redacted"] == 0
    assert tables_with(shop, "Name1") == ["addresses"]
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    assert tables_with(shop, "Name1") == []


def test_what_is_no_moment_is_refused(shop):
    """Breaks when a misread date lets cycles work."""
    for wrong in ("next week", True, "2027-02-30", ""):
        with refused("22023", "report_only_until"):
            shop.apply_policy(shop_policy(report_only_until=wrong))
