"""Markers for the application: columns that are set with the overwrite, and set back when the personal data is."""
import copy

import pytest
from support import (PLACEHOLDER, add_customer, add_order, end_retrieval, number, open_shop, retrieve, run_cycle, shop_policy,
                     snapshot, sweep)

MARKS = """
ALTER TABLE shop.orders ADD pii_redacted_at timestamptz, ADD redacted boolean NOT NULL DEFAULT false, ADD redacted_by text;
ALTER TABLE shop.addresses ADD pii_redacted_at timestamptz;
ALTER TABLE shop.customers ADD state text DEFAULT 'clear';
"""
ORDER_MARK = {"pii_redacted_at": "clock_timestamp()", "redacted": "NOT redacted OR true", "redacted_by": "current_user || ' ' || channel"}


def policy(**changes):
    document = shop_policy(**changes)
    document["orders"].setdefault("mark", ORDER_MARK)
    document["linked"][0]["mark"] = {"pii_redacted_at": "now()"}
    document["linked"][1]["mark"] = {"state": "'redacted'"}
    return document


@pytest.fixture
def shop(db):
    open_shop(db)
    db.sql(MARKS, user="shop_owner")
    return db


def marks(db, order=1):
    return db.sql("SELECT o.pii_redacted_at IS NOT NULL, o.redacted, o.redacted_by, a.pii_redacted_at IS NOT NULL, c.state FROM shop.orders AS o "
                  "JOIN shop.addresses AS a ON a.order_id = o.id LEFT JOIN shop.customers AS c ON c.id = o.customer_id WHERE o.id = %s", [order])[0]


SET = (True, True, "shop_owner amazon", True, "redacted")
CLEAR = (False, False, None, False, "clear")


def test_marks_are_set_with_the_overwrite_and_taken_back_by_a_retrieval(shop):
    shop.apply_policy(policy())
    for order, shipped in ((1, "40 days"), (2, "5 days")):
        add_customer(shop, order)
        add_order(shop, order, shipped=shipped, customer=order)
    assert run_cycle(shop)["redacted"] == 1
    assert (marks(shop), marks(shop, 2)) == (SET, CLEAR)
    first = shop.value("SELECT pii_redacted_at FROM shop.orders WHERE id = 1")
    retrieve(shop, number(1))
    assert marks(shop) == CLEAR
    end_retrieval(shop, number(1))
    assert run_cycle(shop)["redacted"] == 1
    assert marks(shop) == SET
    assert shop.value("SELECT pii_redacted_at FROM shop.orders WHERE id = 1") > first
    shop.sql("SELECT * FROM amazon_pii.unflag(%s, 'wrong policy')", [number(1)], "pii_admin")
    assert marks(shop) == CLEAR


def next_due(db):
    return db.value("SELECT next_due_at FROM amazon_pii.order_state")


def test_a_mark_is_no_reason_to_look_again(shop):
    shop.apply_policy(policy())
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    run_cycle(shop)
    before = shop.sql("SELECT xmin::text, ctid, pii_redacted_at FROM shop.addresses")
    assert next_due(shop) is None
    for _ in range(2):
        assert sweep(shop)["redacted"] == 0
    # What the application makes of them is its own business.
    shop.sql("UPDATE shop.orders SET redacted_by = 'seen'", user="shop_owner")
    assert next_due(shop) is None
    assert run_cycle(shop)["redacted"] == 0
    assert shop.value("SELECT redacted_by FROM shop.orders") == "seen"
    assert shop.sql("SELECT xmin::text, ctid, pii_redacted_at FROM shop.addresses") == before


def test_personal_data_that_comes_back_is_marked_again(shop):
    shop.apply_policy(policy())
    add_order(shop, 1)
    run_cycle(shop)
    shop.sql("UPDATE shop.addresses SET name = 'Back', pii_redacted_at = NULL", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert shop.sql("SELECT name, pii_redacted_at IS NOT NULL FROM shop.addresses") == [(PLACEHOLDER, True)]


def test_an_order_is_marked_although_its_own_row_holds_nothing(shop):
    orders = copy.deepcopy(shop_policy()["orders"])
    del orders["redact"]
    shop.apply_policy(policy(orders=orders))
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    assert run_cycle(shop)["redacted"] == 1
    assert marks(shop) == SET
    retrieved = retrieve(shop, number(1))
    assert marks(shop) == CLEAR and [r for r in retrieved if "shop.orders" in map(str, r)] == []
    end_retrieval(shop, number(1))
    run_cycle(shop)
    assert marks(shop) == SET
    assert shop.value("SELECT gift_message FROM shop.orders") == "Gift1"
    assert [r[0] for r in shop.sql("SELECT DISTINCT table_name FROM amazon_pii.records")] != ["shop.orders"]


def test_a_shared_row_is_marked_with_the_last_of_its_orders(shop):
    shop.apply_policy(policy())
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    add_order(shop, 2, shipped="5 days", customer=1)
    run_cycle(shop)
    assert marks(shop) == (*SET[:4], "clear")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 2", user="shop_owner")
    run_cycle(shop)
    assert marks(shop) == marks(shop, 2) == SET


REFUSED = {
    "no such column": ("orders", {"pii_redacted_att": "now()"}, '"pii_redacted_att" of shop.orders does not exist'),
    "redacted": ("orders", {"gift_message": "'x'"}, "is redacted in orders"),
    "the key": ("orders", {"id": "7"}, 'column "id" of shop.orders'),
    "a link": ("orders", {"customer_id": "7"}, "cannot be a mark"),
    "the number": ("orders", {"external_no": "'x'"}, "cannot be a mark"),
    "another type": ("orders", {"pii_redacted_at": "true"}, "the mark cannot be set"),
    "no expression": ("orders", {"pii_redacted_at": "now("}, "neither a column of shop.orders nor an SQL expression"),
    "an unknown function": ("orders", {"pii_redacted_at": "nowadays()"}, "a function or operator does not exist"),
    "no default": ("orders", {"bare": "7"}, "has no default"),
    "generated": ("orders", {"twice": "7"}, "is generated"),
    "another row for it": ("orders", {"total": "'NaN'"}, "the treatment fails on existing rows"),
    "other orders by it": ("orders", {"channel": "'done'"}, "gives another result"),
    "nothing": ("orders", {}, "names no column"),
    "of a bridge": ("bridge", {"pii_redacted_at": "now()"}, "nothing is redacted"),
    "of rows that go": ("delete", {"pii_redacted_at": "now()"}, "removes"),
    "in two ways": ("twice", {"pii_redacted_at": "now()"}, "differs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_mark_is_refused_when_the_policy_is_applied(shop, case):
    shop.sql("ALTER TABLE shop.orders ADD bare int NOT NULL DEFAULT 1, ADD twice numeric GENERATED ALWAYS AS (total * 2) STORED, "
             "ADD CHECK (total <> 'NaN'); ALTER TABLE shop.orders ALTER bare DROP DEFAULT, ALTER channel SET DEFAULT 'web'", user="shop_owner")
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, bare) VALUES (1, %s, 'amazon', now(), 1)", [number(1)], "shop_owner")
    where, mark, problem = REFUSED[case]
    document = shop_policy()
    if where == "orders":
        document["orders"]["mark"] = mark
    else:
        entry = {"table": "shop.addresses", "as": "second", "on": {"order_id": "id"}, "mark": mark}
        entry.update({"bridge": {}, "delete": {"on_redact": "delete", "redact": ["name"]}, "twice": {"redact": ["name"]}}[where])
        if where == "twice":
            document["linked"][0]["mark"] = {"pii_redacted_at": "now() + '1 day'"}
        else:
            document["linked"].pop(0)
        document["linked"].append(entry)
    found = [f"{object}: {what}" for severity, object, what, _ in shop.check_policy(document) if severity == "error"]
    assert any(problem in text for text in found), found


def test_a_trial_leaves_no_mark(shop):
    add_order(shop, 1)
    before = snapshot(shop)
    assert [p for p in shop.check_policy(policy()) if p[0] == "error"] == []
    assert snapshot(shop) == before
