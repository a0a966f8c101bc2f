"""What keeps personal data for longer than Amazon allows takes a reason, and shows while it lasts."""
from datetime import datetime, timedelta, timezone

import pytest
from support import (
    PLACEHOLDER, add_customer, add_invoice, add_order, number, open_shop, order_value, refused, run_cycle, shop_policy, tables_with,
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
    log = "SELECT \"user\", reason, detail FROM amazon_pii.audit_log WHERE action = 'apply_policy' ORDER BY audit_id DESC LIMIT 1"
    assert shop.sql(log) == [("pii_admin", "tax audit, ticket 7", f"redact_after is {after}: tax audit, ticket 7")]
    shop.apply_policy(shop_policy(loosened="tax audit, ticket 7"))
    assert loosened(shop) == [] and shop.sql(log) == [("pii_admin", None, None)]


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


def moment(**ahead):
    return (datetime.now(timezone.utc) + timedelta(**ahead)).isoformat(timespec="seconds")


def kept_longer(db, why=None):
    """What evidence says, or its line for one cause."""
    found = db.value("SELECT amazon_pii.evidence('shop')", user="pii_auditor")["kept_longer"]
    return [line for line in found["orders"] if line["why"] == why] if why else found


def putting_off(db):
    """What status says of moments that are far ahead; of orders that are old by now it says more."""
    return [words for words in loosened(db) if words.startswith(("effective_from", "report_only_until"))]


def told(db, document):
    """What check_policy says of the loosening of a document."""
    return [(f[0], f[2]) for f in db.check_policy(document) if f[1] == "loosened"]


def test_check_policy_says_what_is_loosened(shop):
    """Breaks when whoever checks a document does not learn that it keeps data longer, or is told so of one that does not."""
    assert told(shop, shop_policy()) == told(shop, shop_policy(loosened="tax audit")) == []
    document = shop_policy(redact_after="60 days", retrieved_for="90 days", loosened="tax audit")
    assert told(shop, document) == [("info", "redact_after is 60 days, retrieved_for is 90 days: tax audit")]
    del document["loosened"]
    errors = [f[2] for f in shop.check_policy(document) if f[0] == "error"]
    assert len(errors) == 1 and "redact_after: longer" in errors[0] and "retrieved_for: longer" in errors[0]


def test_old_rows_need_a_reason(shop):
    """Breaks when rows that no order leads to stay for longer than 30 days without a word."""
    shop.sql("CREATE TABLE shop.raw_mail (id bigint PRIMARY KEY, received_at timestamptz, body text)", user="shop_owner")
    mail = {"table": "shop.raw_mail", "at": "received_at", "after": "30 days", "on_redact": "delete", "archive": False}
    shop.apply_policy(shop_policy(by_age=[mail]))
    assert loosened(shop) == []
    older = [mail | {"after": "7 days", "where": "false"}, mail | {"after": "90 days"}]
    with refused("22023", "by_age[1].after: longer than the 30 days"):
        shop.apply_policy(shop_policy(by_age=older))
    shop.apply_policy(shop_policy(by_age=older, loosened="mail of last season"))
    assert loosened(shop) == ["by_age[1].after is 90 days: mail of last season"] == kept_longer(shop)["now"]


@pytest.mark.parametrize("redact, within, long", [("30 days", "1 day", False), ("28 days", "3 days", False), ("30 days", "25 hours", True), ("28 days", "4 days", True)])
def test_files_need_a_reason(shop, redact, within, long):
    """Breaks when files may stay for long after their order, or a policy without files is asked about them."""
    document = shop_policy(archive_after="20 days", redact_after=redact, files_within=within)
    shop.apply_policy(document)
    document["linked"][0]["files"] = "zip"
    if not long:
        shop.apply_policy(document)
        assert loosened(shop) == []
        return
    with refused("22023", "files_within: files may stay"):
        shop.apply_policy(document)
    shop.apply_policy(document | {"loosened": "the job runs weekly"})
    assert loosened(shop) == [f"files_within is {within}: the job runs weekly"]


@pytest.mark.parametrize("key", ["effective_from", "report_only_until"])
def test_a_policy_that_begins_late_needs_a_reason(shop, key):
    """Breaks when a policy is put off for months without a word, the word is gone before its time, or stays after it."""
    with refused("22023", f"{key}: more than 30 days ahead"):
        shop.apply_policy(shop_policy(**{key: moment(days=31)}))
    shop.apply_policy(shop_policy(**{key: moment(days=29)}))
    assert putting_off(shop) == []
    late = shop_policy(**{key: "2999-01-01", "loosened": "old shop until then"})
    assert [w for _, w in told(shop, late)] == [f"{key} is 2999-01-01 00:00:00+00: old shop until then"]
    shop.apply_policy(late)
    assert putting_off(shop) == [f"{key} is 2999-01-01 00:00:00+00: old shop until then"]
    found = kept_longer(shop)
    assert found["now"] == loosened(shop) and found["because"] == "old shop until then" and found["postponed_since"] is not None
    shop.sql(f"UPDATE amazon_pii.policy SET {key} = now()")
    assert putting_off(shop) == [] and kept_longer(shop)["postponed_since"] is None


def test_putting_off_again_and_again_is_one(shop):
    """Breaks when a month of grace without a reason becomes a year, month by month."""
    shop.apply_policy(shop_policy(report_only_until=moment(days=29)))
    shop.sql("UPDATE amazon_pii.policy SET postponed_since = postponed_since - '20 days'::interval")
    for key in ("report_only_until", "effective_from"):
        with refused("22023", f"{key}: more than 30 days ahead"):
            shop.apply_policy(shop_policy(**{key: moment(days=29)}))
    shop.apply_policy(shop_policy(effective_from=moment(days=9)))
    assert putting_off(shop) == []
    shop.apply_policy(shop_policy(effective_from=moment(days=29), loosened="old shop"))
    assert len(putting_off(shop)) == 1 and putting_off(shop)[0].startswith("effective_from is ")
    # Over, and begun anew.
    shop.apply_policy(shop_policy())
    assert putting_off(shop) == []
    shop.apply_policy(shop_policy(report_only_until=moment(days=29)))


def test_orders_that_are_not_in_effect_show_when_they_are_old(shop):
    """Breaks when an order's own date keeps it for months, and nothing says so."""
    document = shop_policy()
    document["orders"]["effective_from"] = "CASE WHEN id <= 2 THEN '2999-01-01'::timestamptz WHEN id = 3 THEN 'infinity' END"
    shop.apply_policy(document)
    run_cycle(shop)
    assert loosened(shop) == ["1 orders past 30 days are not in effect, the last until 2999-01-01 00:00:00+00"]
    (line,) = kept_longer(shop, "effective_from")
    assert (line["orders"], line["worst"]) == (1, [number(1)]) and line["worst_days"] > 350_000
    # One that has no date at all.
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '50 days'::interval WHERE id = 3", user="shop_owner")
    run_cycle(shop)
    assert loosened(shop) == ["2 orders past 30 days are not in effect, the last until infinity"]
    assert set(kept_longer(shop, "effective_from")[0]["worst"]) == {number(1), number(3)}
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    assert loosened(shop) == [] and order_value(shop, 1) == "redacted"


def test_orders_that_a_younger_row_pushes_back_show(shop):
    """Breaks when a linked row keeps an order past 30 days, and nobody learns how many there are and for how long."""
    add_invoice(shop, 1, 1, "4 days 12 hours")
    add_order(shop, 5, "40 days")
    add_invoice(shop, 5, 5, "20 days")
    # Not past 30 days by that.
    add_invoice(shop, 2, 2, "29 days")
    assert run_cycle(shop)["redacted"] == 0
    assert loosened(shop) == ["2 orders pushed past 30 days, by 36 days at worst: invoices"]
    (line,) = kept_longer(shop, "not_before")
    assert (line["orders"], line["worst_days"], line["reasons"], line["worst"]) == (2, 35.5, ["invoices"], [number(1), number(5)])
    assert shop.sql("SELECT order_number, until = (SELECT redact_due_at FROM amazon_pii.orders AS o WHERE o.order_key = k.order_key) "
                    "FROM amazon_pii.kept_longer AS k ORDER BY days DESC", user="pii_operator") == [(number(1), True), (number(5), True)]
    shop.sql("DELETE FROM shop.invoices; UPDATE amazon_pii.order_state SET next_due_at = now(), redact_due_at = now() WHERE pushed_by IS NOT NULL")
    assert run_cycle(shop)["redacted"] == 2
    assert loosened(shop) == [] and kept_longer(shop)["orders"] == []


def test_a_late_row_of_a_redacted_order_shows(shop):
    """Breaks when an order that is redacted has a younger row with personal data, and that does not show."""
    run_cycle(shop)
    add_invoice(shop, 1, 1, "9 days 12 hours")
    run_cycle(shop)
    assert order_value(shop, 1) == "redacted" and tables_with(shop, "BillTo1") == ["invoices"]
    assert loosened(shop) == ["1 orders pushed past 30 days, by 31 days at worst: invoices"]


def test_orders_that_wait_for_an_export_show(shop):
    """Breaks when an export that nobody makes keeps orders, and nothing says how many, and for how long."""
    shop.apply_policy(shop_policy(export="require"))
    add_order(shop, 5, "52 days 12 hours")
    assert run_cycle(shop)["redacted"] == 0
    assert loosened(shop) == ["2 orders past their date wait for the export, for 23 days at worst"]
    (line,) = kept_longer(shop, "export")
    assert (line["orders"], line["worst"]) == (2, [number(5), number(1)]) and line["worst_days"] == 22.5
    shop.sql("SELECT amazon_pii.mark_exported('shop', now())", user="pii_admin")
    assert loosened(shop) == []


def test_orders_without_an_anchor_show(shop):
    """Breaks when an order whose clock never starts is kept for ever, and nothing says so."""
    add_order(shop, 5, None)
    add_order(shop, 6, None)
    assert loosened(shop) == []
    shop.sql("UPDATE amazon_pii.order_state SET flagged_at = now() - '44 days 12 hours'::interval WHERE order_key = '[\"5\"]'")
    assert loosened(shop) == ["1 orders without an anchor for more than 30 days, the oldest for 45 days"]
    (line,) = kept_longer(shop, "no_anchor")
    assert (line["orders"], line["worst_days"], line["worst"]) == (1, 14.5, [number(5)])
    shop.sql("UPDATE shop.orders SET shipped_at = now() WHERE id = 5", user="shop_owner")
    assert loosened(shop) == []


def test_a_switched_off_worker_shows(shop):
    """Breaks when the server's own switch stops all cycles, and the policy looks as if it were at work."""
    shop.sql("LOAD 'amazon_pii'")
    shop.sql("ALTER SYSTEM SET amazon_pii.enabled = off")
    shop.cluster.reload()
    shop.session("pii_auditor").close()
    try:
        assert loosened(shop) == ["amazon_pii.enabled is off: the worker runs no cycles"]
    finally:
        shop.sql("ALTER SYSTEM RESET amazon_pii.enabled")
        shop.cluster.reload()
    shop.session("pii_auditor").close()
    assert loosened(shop) == []


# The end of a policy


def drop(db, *reason):
    db.sql(f"SELECT amazon_pii.drop_policy({', '.join(['%s'] * (1 + len(reason)))})", ["shop", *reason], "pii_admin")


def test_dropping_a_policy_with_orders_that_are_not_redacted_needs_a_reason(shop):
    """Breaks when personal data is given up for lost without a word, or the word is lost with the policy."""
    run_cycle(shop)
    for reason in ((), (None,), (" ",)):
        with refused("22023", "a reason is required") as caught:
            drop(shop, *reason)
        assert "3 orders are not redacted" in str(caught.value) and "drop_policy('…', 'reason')" in str(caught.value)
    with refused("22023", "e-mail"):
        drop(shop, "ask jane@example.com")
    assert [order_value(shop, n) for n in (1, 2, 3, 4)] == ["redacted", "scheduled", "scheduled", "scheduled"]
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'drop_policy'") == 0
    drop(shop, "sold the shop")
    assert shop.sql("SELECT \"user\", reason, detail FROM amazon_pii.audit_log WHERE action = 'drop_policy'") == [
        ("pii_admin", "sold the shop", "3 orders are not redacted")]
    found = kept_longer(shop)
    assert (found["dropped"]["user"], found["dropped"]["reason"], found["dropped"]["left"]) == ("pii_admin", "sold the shop", "3 orders are not redacted")
    shop.apply_policy(shop_policy())
    found = kept_longer(shop)
    assert found["dropped"] is None and [s["detail"] for s in found["switched"]] == ["3 orders are not redacted"]


def test_a_policy_that_has_done_its_work_goes_without_a_reason(shop):
    """Breaks when a policy that has nothing left cannot be dropped as it always could."""
    shop.sql("DELETE FROM shop.orders WHERE id > 1", user="shop_owner")
    run_cycle(shop)
    drop(shop)
    assert shop.sql("SELECT reason, detail FROM amazon_pii.audit_log WHERE action = 'drop_policy'") == [(None, None)]
    with refused("42704", "does not exist"):
        drop(shop, "once more")


@pytest.mark.parametrize("case, words", [
    ("a customer waits", "1 records wait for other orders"), ("old rows", "1 tables of by_age lose their clock"),
    ("a late row", "1 orders are not redacted"), ("a held archive", "1 archives are held"), ("retrieved", "1 orders are not redacted")])
def test_what_else_is_left_of_a_policy(db, case, words):
    """Breaks when something that nobody will redact, or keep, once the policy is gone is not counted."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    document = shop_policy()
    if case == "a customer waits":
        db.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (2, '2', 'shop', 1)", user="shop_owner")
    if case == "old rows":
        db.sql("CREATE TABLE shop.raw_mail (id bigint PRIMARY KEY, received_at timestamptz, body text)", user="shop_owner")
        document["by_age"] = [{"table": "shop.raw_mail", "at": "received_at", "after": "30 days", "on_redact": "delete", "archive": False}]
    db.apply_policy(document)
    assert run_cycle(db)["redacted"] == 1
    if case == "a late row":
        add_invoice(db, 1, 1, "3 days")
        run_cycle(db)
    if case == "a held archive":
        db.sql("SELECT amazon_pii.hold(%s, 'lawsuit 12', now() + '9 days'::interval)", [number(1)], "pii_operator")
    if case == "retrieved":
        db.sql("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator")
    with refused("22023", words):
        drop(db)
    drop(db, "sold the shop")
    assert db.value("SELECT detail FROM amazon_pii.audit_log WHERE action = 'drop_policy'") == words


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
