"""Names inside of text that is kept: the order's own values are taken out of it, the rest stays."""
import copy
import json

import pytest
from support import (add_customer, add_order, documents, end_retrieval, number, open_shop, order_value, record_states, retrieve, run_cycle,
                     shop_policy, sweep)

SCRUB = ["customers.first_name", "customers.last_name", "addresses.name", "orders.gift_message"]
TABLES = """
ALTER TABLE shop.orders ADD memo text;
CREATE TABLE shop.payments (id bigint PRIMARY KEY, order_id bigint, label text, short varchar(14), padded char(30), amount numeric DEFAULT 1);
CREATE INDEX ON shop.payments (order_id);
"""


@pytest.fixture
def shop(db):
    open_shop(db)
    db.sql(TABLES, user="shop_owner")
    return db


def policy(names=SCRUB, **changes):
    document = copy.deepcopy(shop_policy(**changes))
    document["orders"]["redact"]["memo"] = {"scrub": names}
    document["linked"].append({"table": "shop.payments", "on": {"order_id": "id"},
                               "redact": {c: {"scrub": names} for c in ("label", "short", "padded")}})
    return document


def pay(db, payment, order, label, short=None, padded=None):
    db.sql("INSERT INTO shop.payments VALUES (%s, %s, %s, %s, %s)", [payment, order, label, short, padded], "shop_owner")


def labels(db):
    return [row[0] for row in db.sql("SELECT label FROM shop.payments ORDER BY id")]


LABEL = "Manual Payment: INV/7 FIRST1 last1, Name1; Last10"


def test_names_go_and_the_rest_of_the_text_stays(shop):
    shop.apply_policy(policy())
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    shop.sql("UPDATE shop.orders SET memo = 'Call first1 about (Name1)'", user="shop_owner")
    pay(shop, 1, 1, LABEL, "Last1", "INV Last1")
    pay(shop, 2, 1, "nobody is named")
    assert run_cycle(shop)["redacted"] == 1
    assert labels(shop) == ["Manual Payment: INV/7 [Redacted] [Redacted], [Redacted]; Last10", "nobody is named"]
    assert shop.sql("SELECT short, padded::text FROM shop.payments WHERE id = 1") == [("[Redacted]", "INV [Redacted]")]
    assert shop.value("SELECT memo FROM shop.orders") == "Call [Redacted] about ([Redacted])"
    archived = documents(shop)
    assert ('["1"]', "shop.payments", '["1"]', 1) in archived and ('["1"]', "shop.payments", '["2"]', 1) not in archived
    assert sweep(shop)["redacted"] == run_cycle(shop)["redacted"] == 0 and documents(shop) == archived
    shop.sql("UPDATE shop.payments SET amount = 2", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 0 and documents(shop) == archived
    peeked = shop.value("SELECT amazon_pii.peek(%s, 'ticket 1')", [number(1)], "pii_operator")
    assert LABEL in json.dumps(peeked)
    retrieve(shop, number(1))
    assert labels(shop)[0] == LABEL
    assert shop.sql("SELECT short, padded FROM shop.payments WHERE id = 1") == [("Last1", "INV Last1".ljust(30))]
    assert shop.value("SELECT memo FROM shop.orders") == "Call first1 about (Name1)"
    end_retrieval(shop, number(1))
    assert run_cycle(shop)["redacted"] == 1
    assert "Last1," not in labels(shop)[0] and "[Redacted]" in labels(shop)[0]


def test_a_text_that_comes_when_the_names_are_gone_already(shop):
    shop.apply_policy(policy())
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    run_cycle(shop)
    pay(shop, 1, 1, LABEL)
    assert run_cycle(shop)["redacted"] == 1
    assert labels(shop) == ["Manual Payment: INV/7 [Redacted] [Redacted], [Redacted]; Last10"]
    shop.sql("UPDATE shop.payments SET label = 'again: Name1'", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert labels(shop) == ["again: [Redacted]"]
    retrieve(shop, number(1))
    assert labels(shop) == ["again: Name1"]


def test_earlier_names_count_and_the_fuller_text_comes_back(shop):
    shop.apply_policy(policy())
    add_order(shop, 1)
    pay(shop, 1, 1, "from Name1 by Other Person")
    run_cycle(shop)
    assert labels(shop) == ["from [Redacted] by Other Person"]
    shop.sql("UPDATE shop.addresses SET name = 'Other Person'", user="shop_owner")
    run_cycle(shop)
    assert labels(shop) == ["from [Redacted] by [Redacted]"]
    retrieve(shop, number(1))
    assert labels(shop) == ["from Name1 by Other Person"]
    assert "from Name1 by Other Person" in json.dumps(shop.value("SELECT amazon_pii.peek(%s, 'ticket 1')", [number(1)], "pii_operator"))


def test_names_of_a_customer_whom_another_order_needs(shop):
    shop.apply_policy(policy())
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    add_order(shop, 2, shipped="5 days", customer=1)
    pay(shop, 1, 1, "First1 Last1")
    pay(shop, 2, 2, "First1 Last1")
    run_cycle(shop)
    assert record_states(shop, "shop.customers", 1)[1] == "waiting"
    assert labels(shop) == ["[Redacted] [Redacted]", "First1 Last1"]
    assert sweep(shop)["redacted"] == 0
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    assert labels(shop) == ["[Redacted] [Redacted]"] * 2
    assert sweep(shop)["redacted"] == 0


def test_names_of_other_orders_stay(shop):
    shop.apply_policy(policy())
    for order in (1, 2):
        add_order(shop, order)
        pay(shop, order, order, "Name1 and Name2")
    run_cycle(shop)
    assert labels(shop) == ["[Redacted] and Name2", "Name1 and [Redacted]"]


def test_a_placeholder_without_room_is_cut(shop):
    shop.apply_policy(policy())
    add_order(shop, 1)
    pay(shop, 1, 1, "x", short="to Name1 today")
    assert run_cycle(shop)["failed"] == 0
    assert shop.value("SELECT short FROM shop.payments") == "to [Redacted] "
    retrieve(shop, number(1))
    assert shop.value("SELECT short FROM shop.payments") == "to Name1 today"


def test_what_is_edited_after_redaction_is_kept(shop):
    shop.apply_policy(policy())
    add_order(shop, 1)
    pay(shop, 1, 1, "from Name1")
    run_cycle(shop)
    shop.sql("UPDATE shop.payments SET label = label || ', paid'", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 0
    retrieve(shop, number(1))
    assert labels(shop) == ["from [Redacted], paid"]


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_a_sync_may_write_such_a_text_again(shop, on_reimport):
    """Whose names are in it is not known where it is written: the next cycle scrubs it."""
    shop.apply_policy(policy(on_reimport=on_reimport))
    add_order(shop, 1)
    pay(shop, 1, 1, "from Name1")
    run_cycle(shop)
    archived = documents(shop)
    shop.sql("UPDATE shop.payments SET label = 'from Name1', amount = 7", user="shop_owner")
    assert labels(shop) == ["from Name1"]
    run_cycle(shop)
    assert labels(shop) == ["from [Redacted]"] and documents(shop) == archived


REFUSED = {
    "no such entry": (["customer.last_name"], 'scrub names "customer.last_name"', 'Perhaps you meant "customers.last_name"'),
    "a column that stays": (["customers.tier"], 'scrub names "customers.tier"', "is redacted there"),
    "a text that is scrubbed": (["orders.memo"], 'scrub names "orders.memo"', "is redacted there"),
    "no entry": (["last_name"], 'scrub names "last_name"', "is redacted there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_must_be_redacted_columns_of_text(shop, case):
    names, problem, hint = REFUSED[case]
    (severity, _, what, how), = shop.check_policy(policy(names))
    assert severity == "error" and problem in what and hint in how


def test_only_texts_are_scrubbed(shop):
    document = policy()
    document["linked"][-1]["redact"] = {"amount": {"scrub": SCRUB}}
    (severity, _, what, _), = shop.check_policy(document)
    assert severity == "error" and "scrubbing does not fit a column of this type" in what


def test_a_trial_finds_nothing_wrong_and_leaves_nothing(shop):
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    pay(shop, 1, 1, LABEL, "Last1", "INV Last1")
    assert shop.check_policy(policy()) == []
    assert labels(shop) == [LABEL]


def test_verify_agrees(shop):
    shop.apply_policy(policy())
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    pay(shop, 1, 1, LABEL)
    run_cycle(shop)
    assert shop.sql("SELECT table_name, column_name, problem FROM amazon_pii.verify('shop') WHERE problem NOT LIKE 'not searched%%'", user="pii_auditor") == []
    assert order_value(shop, 1) == "redacted"
