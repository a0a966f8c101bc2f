"""What keeps personal data for longer than Amazon allows takes a reason, and shows while it lasts."""
import pytest
from support import (
    PLACEHOLDER, add_order, number, open_shop, order_value, refused, run_cycle, shop_policy,
)


@pytest.fixture
def shop(db):
    """Orders 1 to 4, dispatched 40, 28, 10 and 3 days ago; the policy is applied."""
    open_shop(db)
    db.apply_policy(shop_policy())
    for order, age in ((1, "40 days"), (2, "28 days"), (3, "10 days"), (4, "3 days")):
        add_order(db, order, shipped=age)
    return db


def loosened(db, user="pii_auditor"):
    return db.value("SELECT loosened FROM amazon_pii.status", user=user)


@pytest.mark.parametrize("after", ["31 days", "1 month", "30 days 1 second", "1 year", "8 months -213 days"])
def test_a_longer_clock_needs_a_reason(shop, after):
    """Breaks when personal data stays longer than 30 days, in whatever month, and nobody has said why."""
    with refused("22023", "longer than the 30 days"):
        shop.apply_policy(shop_policy(archive_after="20 days", redact_after=after))
    assert [f[:2] for f in shop.check_policy(shop_policy(archive_after="20 days", redact_after=after)) if f[0] == "error"] != []
    shop.apply_policy(shop_policy(archive_after="20 days", redact_after=after, loosened="tax audit, ticket 7"))
    assert loosened(shop) == [f"redact_after is {after}: tax audit, ticket 7"]
    shop.apply_policy(shop_policy(loosened="tax audit, ticket 7"))
    assert loosened(shop) == []


def test_a_longer_retrieval_needs_a_reason(shop):
    """Breaks when what was retrieved stays for longer than 30 days without a word."""
    with refused("22023", "retrieved_for: longer than the 30 days"):
        shop.apply_policy(shop_policy(retrieved_for="60 days"))
    shop.apply_policy(shop_policy(retrieved_for="60 days", loosened="guarantee"))
    assert loosened(shop) == ["retrieved_for is 60 days: guarantee"]


@pytest.mark.parametrize("why, words", [("", "loosened"), ("x" * 51, "longer than 50"), ("ask jane@example.com", "e-mail"), (3, "loosened")])
def test_a_reason_that_is_none(shop, why, words):
    """P9. Breaks when the reason is empty, or is personal data itself."""
    with refused("22023", words):
        shop.apply_policy(shop_policy(redact_after="31 days", loosened=why))


def test_a_disabled_policy_needs_a_reason(shop):
    """Breaks when redaction stops and neither status nor the audit log says who wanted that, and why."""
    for arguments, words in (("'shop'", "a reason is required"), ("'shop', NULL", "a reason is required"), ("'shop', 'call 0171 1234567'", "phone")):
        with refused("22023", words):
            shop.sql(f"SELECT amazon_pii.disable_policy({arguments})", user="pii_admin")
    assert loosened(shop) == []
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'moving servers')", user="pii_admin")
    (words,) = loosened(shop)
    assert words.startswith("disabled since ") and words.endswith(": moving servers")
    assert shop.sql("SELECT \"user\", reason FROM amazon_pii.audit_log WHERE action = 'disable_policy'") == [("pii_admin", "moving servers")]
    # A new version leaves it as it is.
    shop.apply_policy(shop_policy(placeholder="***"))
    assert loosened(shop) == [words]
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'still moving')", user="pii_admin")
    assert loosened(shop) == [words.replace("moving servers", "still moving")]
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    assert loosened(shop) == []


def test_a_policy_that_was_never_enabled(db):
    """Breaks when a policy that does nothing yet looks as if it were in force."""
    open_shop(db)
    db.apply_policy(shop_policy(enabled=False))
    assert loosened(db) == ["not enabled yet"]


def test_a_long_hold_needs_a_reason(shop):
    """Breaks when an order can be held for months without a word, or the word is gone while the hold lasts."""
    shop.apply_policy(shop_policy(reason="optional"))
    hold = "SELECT amazon_pii.hold(%s, %s, now() + %s::interval)"
    with refused("22023", "more than 30 days needs a reason"):
        shop.sql(hold, [number(3), None, "31 days"], "pii_operator")
    shop.sql(hold, [number(3), None, "29 days"], "pii_operator")
    assert loosened(shop) == []
    with refused("22023", "more than 30 days needs a reason"):
        shop.sql(hold, [number(3), None, "30 days 1 hour"], "pii_operator")
    # Renewed, it is the same hold.
    shop.sql("UPDATE amazon_pii.order_state SET held_since = held_since - '20 days'::interval")
    with refused("22023", "more than 30 days needs a reason"):
        shop.sql(hold, [number(3), None, "29 days"], "pii_operator")
    for order, why in ((3, "lawsuit 12"), (4, "fraud case 9")):
        shop.sql(hold, [number(order), why, "90 days"], "pii_operator")
    assert loosened(shop) == ["2 orders held for more than 30 days: fraud case 9; lawsuit 12"]
    shop.sql("SELECT amazon_pii.release(%s)", [number(3)], "pii_operator")
    assert loosened(shop) == ["1 orders held for more than 30 days: fraud case 9"]
    shop.sql("UPDATE amazon_pii.order_state SET held_until = now()")
    assert loosened(shop) == []


def clock_change(db, **changes):
    return [f[2] for f in db.check_policy(shop_policy(**changes)) if f[0] == "info"]


def test_a_changed_clock_is_told_before_it_is_applied(shop):
    """Breaks when nobody learns how many orders a shorter clock makes due, and when; or checking changes something."""
    before = shop.sql("SELECT o::text FROM amazon_pii.orders AS o ORDER BY 1")
    (words,) = clock_change(shop, archive_after="8 days", redact_after="9 days")
    assert words.startswith("instead of 30 days: 3 orders become due at once, 1 within 7 days, 0 later; the next at ")
    assert clock_change(shop) == []
    assert shop.sql("SELECT o::text FROM amazon_pii.orders AS o ORDER BY 1") == before


def test_a_changed_clock_counts_for_orders_that_are_not_redacted(shop):
    """Breaks when a longer clock un-redacts an order, or a shorter one leaves orders to the date of the old one."""
    run_cycle(shop)
    assert [order_value(shop, n) for n in (1, 2, 3)] == ["redacted", "scheduled", "scheduled"]
    shop.apply_policy(shop_policy(redact_after="60 days", loosened="test"))
    assert run_cycle(shop)["redacted"] == 0
    assert order_value(shop, 1) == "redacted" and order_value(shop, 2, "redact_due_at - anchor_at = '60 days'") is True
    assert shop.value("SELECT name FROM shop.addresses WHERE order_id = 1") == PLACEHOLDER
    shop.apply_policy(shop_policy(archive_after="8 days", redact_after="9 days"))
    assert run_cycle(shop)["redacted"] == 2
    assert [order_value(shop, n) for n in (1, 2, 3, 4)] == ["redacted", "redacted", "redacted", "scheduled"]
