"""A hold on an order that is redacted keeps its archive: nothing destroys it until the hold ends, and then the next cycle does."""
import json

import pytest
from support import (
    add_invoice, add_order, documents, end_retrieval, fill, number, open_shop, order_value, refused, retrieve, run_cycle, shop_policy, tables_with,
)

ADMIN, OPERATOR, AUDITOR = "pii_admin", "pii_operator", "pii_auditor"


@pytest.fixture
def shop(db):
    """Orders 1 to 3 are redacted."""
    open_shop(db)
    for order in (1, 2, 3):
        add_order(db, order)
    db.apply_policy(shop_policy())
    assert run_cycle(db)["redacted"] == 3
    return db


def hold(db, order, why="lawsuit 12", until="20 days", user=OPERATOR):
    db.sql("SELECT amazon_pii.hold(%s, %s, now() + %s::interval)", [number(order), why, until], user)


def release(db, order):
    db.sql("SELECT amazon_pii.release(%s)", [number(order)], OPERATOR)


def age(db, by="11 years"):
    """Everything that is redacted was redacted so much earlier."""
    db.sql("UPDATE amazon_pii.order_state SET redacted_at = redacted_at - %s::interval, redact_due_at = redact_due_at - %s::interval", [by, by])


def over(db, order):
    """The hold of an archive has come to its end."""
    db.sql("UPDATE amazon_pii.order_state SET archive_held_until = now() - '1 s'::interval WHERE order_key = %s", [f'["{order}"]'])


def archived(db):
    """Orders that have documents, and those that have keys."""
    with_documents = {int(json.loads(key)[0]) for key, *_ in documents(db)}
    with_keys = {int(json.loads(key)[0]) for (key,) in db.sql("SELECT order_key FROM amazon_pii_archive.data_key")}
    return with_documents, with_keys


def peek(db, order):
    return json.dumps(db.value("SELECT amazon_pii.peek(%s, 'lawsuit 12')", [number(order)], OPERATOR))


def test_a_purge_passes_over_what_is_held_and_takes_the_rest_of_the_batch(shop):
    """Breaks when a held archive is destroyed, keeps another from its end, or is destroyed never."""
    hold(shop, 2)
    age(shop)
    run_cycle(shop)
    assert [order_value(shop, n) for n in (1, 2, 3)] == ["purged", "redacted", "purged"]
    assert archived(shop) == ({2}, {2})
    assert "Name2" in peek(shop, 2)
    assert order_value(shop, 2, "archive_held_until > now() + '19 days'::interval AND held_until IS NULL") is True
    steps = shop.sql("SELECT detail FROM amazon_pii.explain_order(%s) WHERE step = 'archive held'", [number(2)], AUDITOR)
    assert len(steps) == 1 and steps[0][0].startswith("until ")
    run_cycle(shop)
    assert archived(shop) == ({2}, {2})
    release(shop, 2)
    assert order_value(shop, 2, "archive_held_until") is None
    run_cycle(shop)
    assert order_value(shop, 2) == "purged" and archived(shop) == (set(), set())
    log = shop.sql("SELECT action, order_number, reason FROM amazon_pii.audit_log WHERE action IN ('hold', 'release', 'purge') "
                   "AND order_number = %s ORDER BY audit_id", [number(2)], AUDITOR)
    assert log == [("hold", number(2), "lawsuit 12"), ("release", number(2), None), ("purge", number(2), None)]


def test_a_cycle_with_nothing_else_to_do_sees_that_a_hold_has_ended(shop):
    """Breaks when an idle cycle does not look, and the archive stays until something else happens; or the end is not noted."""
    hold(shop, 2)
    age(shop)
    for _ in range(3):
        run_cycle(shop)
    assert archived(shop) == ({2}, {2})
    runs = shop.value("SELECT count(*) FROM amazon_pii.runs")
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM amazon_pii.runs") == runs, "it had nothing to do"
    over(shop, 2)
    run_cycle(shop)
    assert order_value(shop, 2) == "purged" and archived(shop) == (set(), set())
    # One whose time is not over yet is like any other again.
    add_order(shop, 4)
    run_cycle(shop)
    hold(shop, 4)
    over(shop, 4)
    run_cycle(shop)
    assert order_value(shop, 4, "status = 'redacted' AND archive_held_until IS NULL") is True
    age(shop)
    run_cycle(shop)
    assert order_value(shop, 4) == "purged"


def test_a_purge_by_batches_leaves_what_is_held(shop):
    """Breaks when many held archives at the beginning stop the purge, or one of a later batch is not passed over."""
    fill(shop, 1500, first=1000)
    run_cycle(shop)
    held = [1, 2, 1000, 1003, 1400]
    shop.sql("UPDATE amazon_pii.order_state SET redacted_at = redacted_at - '1 day'::interval WHERE order_key = ANY (%s)",
             [[f'["{n}"]' for n in held[:2]]])
    for n in held:
        (key,) = shop.sql("SELECT order_number FROM amazon_pii.orders WHERE order_key = %s", [f'["{n}"]'])[0]
        shop.sql("SELECT amazon_pii.hold(%s, 'lawsuit 12', now() + '9 days'::interval)", [key], OPERATOR)
    age(shop)
    run_cycle(shop)
    assert archived(shop) == (set(held), set(held))
    assert shop.sql("SELECT status, count(*) FROM amazon_pii.orders GROUP BY status ORDER BY 1") == [("purged", 499), ("redacted", 5)]


@pytest.mark.parametrize("what", ["shred", "forget"])
def test_nobody_destroys_what_is_held(shop, what):
    """Breaks when an administrator destroys what a court wants, or does not learn how to."""
    hold(shop, 1)
    ask = f"SELECT amazon_pii.{what}(%s, 'ticket 4711')"
    with refused("55000", "the archive of order") as caught:
        shop.sql(ask, [number(1)], ADMIN)
    assert "is held" in str(caught.value) and "amazon_pii.release()" in str(caught.value)
    assert order_value(shop, 1) == "redacted" and 1 in archived(shop)[0]
    shop.sql(ask, [number(2)], ADMIN)
    release(shop, 1)
    shop.sql(ask, [number(1)], ADMIN)
    assert archived(shop) == ({3}, {3})
    with refused("55000", "holds no personal data any more"):
        hold(shop, 1)


def test_a_policy_that_keeps_nothing_keeps_what_is_held(shop):
    """Breaks when "0 days" destroys a held archive, at once, or with the next redaction; or a held order's PII stays in the tables."""
    hold(shop, 1)
    shop.apply_policy(shop_policy(archive_for="0 days"))
    run_cycle(shop)
    assert archived(shop) == ({1}, {1})
    shop.sql("UPDATE shop.addresses SET name = 'Comeback' WHERE order_id = 1", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert tables_with(shop, "Comeback") == [] and "Comeback" in peek(shop, 1) and "Street 1" in peek(shop, 1)
    # Asked for, it is redacted at once, and no more than that.
    shop.sql("UPDATE shop.addresses SET name = 'Again' WHERE order_id = 1", user="shop_owner")
    shop.sql("SELECT amazon_pii.erase(%s, 'ticket 4711')", [number(1)], ADMIN)
    run_cycle(shop)
    assert tables_with(shop, "Again") == [] and archived(shop) == ({1}, {1})
    release(shop, 1)
    run_cycle(shop)
    assert archived(shop) == (set(), set()) and order_value(shop, 1) == "purged"


def test_a_retrieval_neither_ends_a_hold_nor_is_held_by_it(shop):
    """Breaks when the hold of an archive keeps retrieved data in the tables, or is lost with the next redaction."""
    hold(shop, 1)
    retrieve(shop, number(1))
    end_retrieval(shop, number(1))
    assert run_cycle(shop)["redacted"] == 1 and tables_with(shop, "Name1") == []
    age(shop)
    run_cycle(shop)
    assert archived(shop) == ({1}, {1})
    # Held once more while it is retrieved: that is the order itself, beside its archive.
    retrieve(shop, number(1))
    hold(shop, 1, until="5 days")
    assert order_value(shop, 1, "held_until < archive_held_until") is True
    end_retrieval(shop, number(1))
    assert run_cycle(shop)["redacted"] == 0
    release(shop, 1)
    assert order_value(shop, 1, "held_until IS NULL AND archive_held_until IS NULL") is True
    assert run_cycle(shop)["redacted"] == 1


def test_an_order_that_is_deleted_while_it_is_held(shop):
    """Breaks when deleting an order ends its hold, or the archive of a deleted one cannot be held."""
    shop.apply_policy(shop_policy(archive_after="0 days"))
    # Nothing hangs on them that would be redacted later.
    for order in (4, 5):
        shop.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) VALUES (%s, %s, 'amazon', now() - '1 day'::interval, 'Gift')",
                 [order, number(order)], "shop_owner")
    run_cycle(shop)
    hold(shop, 4)
    shop.sql("DELETE FROM shop.orders WHERE id IN (4, 5)", user="shop_owner")
    run_cycle(shop)
    assert [order_value(shop, n) for n in (4, 5)] == ["gone", "gone"]
    with refused("55000", "is held"):
        shop.sql("SELECT amazon_pii.shred(%s, 'ticket 4711')", [number(4)], ADMIN)
    hold(shop, 5)
    age(shop)
    run_cycle(shop)
    assert archived(shop) == ({4, 5}, {4, 5})
    for order in (4, 5):
        release(shop, order)
    assert shop.value("SELECT count(*) FROM amazon_pii.order_state WHERE status = 'gone' AND next_due_at IS NOT NULL") == 0
    run_cycle(shop)
    assert archived(shop) == (set(), set())


def test_a_long_hold_takes_a_reason_and_shows(shop):
    """Breaks when an archive is held for months without a word, renewals included, or neither status nor evidence say so."""
    shop.apply_policy(shop_policy(reason="optional"))
    run_cycle(shop)
    loosened = "SELECT loosened FROM amazon_pii.status"
    with refused("22023", "more than 30 days needs a reason"):
        hold(shop, 1, None, "31 days")
    hold(shop, 1, None, "29 days")
    assert shop.value(loosened, user=AUDITOR) == []
    shop.sql("UPDATE amazon_pii.order_state SET archive_held_since = archive_held_since - '20 days'::interval")
    with refused("22023", "more than 30 days needs a reason"):
        hold(shop, 1, None, "29 days")
    hold(shop, 1, "lawsuit 12", "29 days")
    hold(shop, 2, "fraud case 9", "90 days")
    assert shop.value(loosened, user=AUDITOR) == ["2 archives held for more than 30 days: fraud case 9; lawsuit 12"]
    kept = shop.value("SELECT amazon_pii.evidence('shop')", user=AUDITOR)["kept_longer"]
    assert kept["now"] == shop.value(loosened) and kept["holds"] == []
    (line,) = kept["orders"]
    assert (line["why"], line["orders"], line["worst_days"], line["reasons"], line["worst"]) == (
        "archive_hold", 2, 90, ["fraud case 9", "lawsuit 12"], [number(2), number(1)])
    assert shop.sql("SELECT why, order_number, reason FROM amazon_pii.kept_longer ORDER BY 2", user=OPERATOR) == [
        ("archive_hold", number(1), "lawsuit 12"), ("archive_hold", number(2), "fraud case 9")]
    release(shop, 1)
    over(shop, 2)
    assert shop.value(loosened, user=AUDITOR) == [] and shop.sql("SELECT * FROM amazon_pii.kept_longer") == []


def test_what_is_held_is_looked_at_like_any_other(shop):
    """P7. Breaks when the sweep, or a search for what came back, passes over an order whose archive is held."""
    hold(shop, 1)
    shop.sql("ALTER TABLE shop.addresses DISABLE TRIGGER USER; UPDATE shop.addresses SET name = 'Comeback' WHERE order_id = 1; "
             "ALTER TABLE shop.addresses ENABLE TRIGGER USER", user="shop_owner")
    shop.sql("CALL amazon_pii.run_cycle(NULL, true)", user=ADMIN)
    assert tables_with(shop, "Comeback") == []
    # Its own clock is that of a young row.
    add_invoice(shop, 7, 1, "1 day")
    run_cycle(shop)
    assert tables_with(shop, "BillTo7") == ["invoices"] and order_value(shop, 1, "archive_held_until IS NOT NULL") is True
