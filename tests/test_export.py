"""Export to accounting before names are masked: mark_exported, and what redaction makes of it."""
import json
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from support import (
    add_customer, add_order, end_retrieval, fill, number, open_shop, order_value, payloads, record_states, refused, retrieve,
    run_cycle, shop_policy, tables_with,
)


@pytest.fixture
def shop(db):
    open_shop(db)
    return db


def ago(**time):
    return datetime.now(timezone.utc) - timedelta(**time)


def mark(db, upto, back=False, user="pii_admin"):
    return db.value("SELECT amazon_pii.mark_exported('shop', %s, %s)", [upto, back], user)


def status(db, columns="not_exported, awaiting_export, redacted_unexported"):
    return db.sql(f"SELECT {columns} FROM amazon_pii.status")[0]


def look_again(db):
    """A day has passed since the policy's exports were last looked at."""
    db.sql("UPDATE amazon_pii.policy SET export_looked_at = export_looked_at - '1 day'::interval")


def told(db, policy=None):
    """What a cycle says: its warnings, and the notifications of exports."""
    with closing(db.connect("pii_admin")) as session:
        session.cursor().execute("LISTEN amazon_pii")
        session.cursor().execute("CALL amazon_pii.run_cycle(%s)", [policy])
        heard = [json.loads(payload) for payload in payloads(session)]
        return [n for n in session.notices if "exported" in n], [p for p in heard if p["status"] == "not_exported"]


# What is asked for

def test_an_order_that_is_to_be_erased_does_not_wait_for_the_export(shop):
    """Breaks when a buyer's request is held back by bookkeeping, or the view says that it is."""
    shop.apply_policy(shop_policy(export="require"))
    for order in (1, 2):
        add_order(shop, order, "40 days")
    assert run_cycle(shop)["redacted"] == 0
    shop.sql("SELECT amazon_pii.erase(%s, 'request 7')", [number(1)], "pii_admin")
    assert shop.sql("SELECT order_number, waits_for FROM amazon_pii.overdue ORDER BY 1") == [(number(1), None), (number(2), "mark_exported")]
    assert run_cycle(shop)["redacted"] == 1
    assert tables_with(shop, "Name1") == [] and tables_with(shop, "Name2") == ["addresses"]


# How far the export has come

def test_mark_exported_moves_forward_only(shop):
    """Breaks when an old export job's date is taken silently, a future one is taken at all, or nobody can put a mistake right."""
    shop.apply_policy(shop_policy(enabled=False))
    for order, age in ((1, "40 days"), (2, "20 days"), (3, "10 days"), (4, None)):
        add_order(shop, order, age)
    assert mark(shop, ago(days=15)) == 2
    with refused("22023", "up to"):
        mark(shop, ago(days=16))
    assert mark(shop, ago(days=5)) == 1
    assert mark(shop, ago(days=30), back=True) == 0
    assert mark(shop, ago(days=15)) == 1
    with refused("22023", "still to come"):
        mark(shop, ago(days=-1))
    for never in ("infinity", "-infinity"):
        with refused("22023", "finite"):
            mark(shop, never, back=True)
    with refused("42704"):
        shop.sql("SELECT amazon_pii.mark_exported('nothing', now())", user="pii_admin")
    log = shop.sql("SELECT action, detail, \"user\" FROM amazon_pii.audit_log WHERE action = 'mark_exported'", user="pii_auditor")
    assert len(log) == 4 and all(d.startswith("up to ") and u == "pii_admin" for _, d, u in log)


def test_only_an_administrator_marks_an_export(shop):
    """Breaks when whoever may look may also let orders go."""
    shop.apply_policy(shop_policy())
    for user in ("pii_operator", "pii_auditor", "shop_owner", "nobody_special"):
        with refused("42501"):
            mark(shop, ago(days=1), user=user)


def test_upcoming_shows_what_is_due_and_not_exported(shop):
    """The guide's line. Breaks when an export is not shown per order, or a policy without exports shows one."""
    for order, age in ((1, "28 days"), (2, "26 days"), (3, "2 days")):
        add_order(shop, order, age)
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    shown = "SELECT order_number, exported FROM amazon_pii.upcoming ORDER BY 1"
    assert shop.sql(shown) == [(number(1), None), (number(2), None)]
    assert status(shop) == (None, None, None)
    mark(shop, ago(days=27))
    assert shop.sql(shown) == [(number(1), True), (number(2), False)]
    assert status(shop, "not_exported, exported_upto < now() - '26 days'::interval") == (1, True)


# "export": "require"

def test_without_its_export_an_order_is_archived_and_not_redacted(shop):
    """Breaks when names are gone before they were exported, archiving waits too, or the alarm is missing."""
    for order, age in ((1, "50 days"), (2, "40 days"), (3, "1 day")):
        add_order(shop, order, age)
    shop.apply_policy(shop_policy(export="require"))
    assert run_cycle(shop) == {"flagged": 3, "archived": 2, "redacted": 0, "failed": 0, "overdue": 2}
    assert [order_value(shop, i) for i in (1, 2, 3)] == ["archived", "archived", "scheduled"]
    assert shop.sql("SELECT order_number, attempts, last_error, waits_for FROM amazon_pii.overdue ORDER BY 1") == [
        (number(1), 0, None, "mark_exported"), (number(2), 0, None, "mark_exported")]
    assert status(shop, "overdue, failed, awaiting_export, last_error") == (2, 0, 2, None)
    assert run_cycle(shop)["overdue"] == 2
    mark(shop, ago(days=45))
    assert run_cycle(shop) == {"flagged": 0, "archived": 0, "redacted": 1, "failed": 0, "overdue": 1}
    assert [order_value(shop, i) for i in (1, 2)] == ["redacted", "archived"] and tables_with(shop, "Name1") == []
    mark(shop, ago(seconds=1))
    assert run_cycle(shop)["redacted"] == 1
    assert status(shop) == (0, 0, 0) and shop.sql("SELECT * FROM amazon_pii.overdue") == []


def test_an_export_that_was_taken_back_stops_a_cycle_that_is_under_way(shop):
    """Breaks when what an order waits for is asked once, when it is taken, and not when it is overwritten."""
    from support import between_archiving_and_redacting
    add_order(shop, 1)
    shop.apply_policy(shop_policy(export="require"))
    mark(shop, ago(days=1))
    with shop.connect(autocommit=False) as turn:
        call = between_archiving_and_redacting(shop, turn)
        mark(shop, ago(days=60), back=True)
        turn.commit()
        call.result()
    assert order_value(shop, 1) == "archived" and tables_with(shop, "Name1") == ["addresses"]


def test_what_was_redacted_once_waits_for_no_export(shop):
    """Breaks when personal data stays that came back after the export's mark was moved, or a retrieval never ends."""
    for order in (1, 2):
        add_order(shop, order)
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    shop.apply_policy(shop_policy(export="require"))
    shop.sql("UPDATE shop.addresses SET name = 'Back1' WHERE order_id = 1", user="shop_owner")
    retrieve(shop, number(2))
    end_retrieval(shop, number(2))
    assert run_cycle(shop)["redacted"] == 2
    assert tables_with(shop, "Back1") == tables_with(shop, "Name2") == []
    assert status(shop) == (0, 0, 2)


def test_a_customer_waits_for_the_export_of_all_orders(shop):
    """Breaks when a shared row goes with an order that is exported although another's export needs it, in this policy or another."""
    add_customer(shop, 1)
    add_order(shop, 1, "50 days", customer=1)
    add_order(shop, 2, "40 days", customer=1)
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at) VALUES (3, 'w', 'web', 1, now() - '60 days'::interval)",
             user="shop_owner")
    shop.apply_policy(shop_policy(export="require"))
    other = {"policy": "web", "enabled": True, "orders": {"table": "shop.orders", "number": "external_no", "amazon": "channel = 'web'",
             "anchor": "shipped_at"}, "linked": [{**shop_policy()["linked"][1], "shared": "amazon"}]}
    mark(shop, ago(days=45))
    assert run_cycle(shop, "shop")["redacted"] == 1
    shop.apply_policy(other)
    assert run_cycle(shop, "web")["redacted"] == 1
    assert shop.value("SELECT first_name FROM shop.customers") == "First1"
    assert record_states(shop, "shop.customers", 1)[1] == "waiting"


def test_orders_that_wait_cost_a_batch_nothing(shop):
    """Breaks when those that are exported are hidden behind thousands that are not."""
    fill(shop, 1500, age="35 days")
    fill(shop, 1600, first=1501, age="60 days")
    shop.apply_policy(shop_policy(export="require"))
    mark(shop, ago(days=50))
    assert run_cycle(shop) == {"flagged": 1600, "archived": 1600, "redacted": 100, "failed": 0, "overdue": 1500}
    assert run_cycle(shop) == {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 1500}


# "export": "warn"

def test_the_worker_warns_before_and_after(shop):
    """Breaks when orders go unexported in silence, or the same is said with every cycle."""
    for order, age in ((1, "40 days"), (2, "28 days"), (3, "1 day")):
        add_order(shop, order, age)
    shop.apply_policy(shop_policy(export="warn"))
    warnings, payloads = told(shop)
    assert len(warnings) == 1 and "1 orders are due within 7 days" in warnings[0] and "1 were redacted without" in warnings[0]
    assert payloads == [{"policy": "shop", "status": "not_exported", "count": 1, "redacted": 1}]
    assert order_value(shop, 1) == "redacted", "a warning holds nothing back"
    assert status(shop) == (1, 0, 1)
    add_order(shop, 4, "26 days")
    assert told(shop) == ([], []), "once a day"
    look_again(shop)
    add_order(shop, 5, "26 days")
    assert told(shop)[1] == [{"policy": "shop", "status": "not_exported", "count": 3, "redacted": 1}]
    with closing(shop.connect("pii_admin")) as session:
        session.cursor().execute("SELECT amazon_pii.mark_exported('shop', now() - '1 minute'::interval)")
        assert "1 of these orders were redacted before" in "".join(session.notices)
    assert told(shop) == ([], []) and status(shop) == (0, 0, 0)


@pytest.mark.parametrize("marked", [False, True])
def test_without_the_key_warnings_begin_with_the_first_mark(shop, marked):
    """Breaks when a policy that never spoke of exports is spammed, or one whose exports stopped is not warned."""
    for order, age in ((1, "40 days"), (2, "28 days")):
        add_order(shop, order, age)
    shop.apply_policy(shop_policy())
    if marked:
        mark(shop, ago(days=60))
    warnings, payloads = told(shop)
    assert (len(warnings), len(payloads)) == ((1, 1) if marked else (0, 0))
    assert order_value(shop, 1) == "redacted"


def test_an_unknown_word_is_refused(shop):
    """Breaks when a word that means nothing holds nothing back."""
    for wrong in ("required", True, None):
        with refused("22023", "export"):
            shop.apply_policy(shop_policy(export=wrong))
