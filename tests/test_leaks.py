"""P9: no personal data outside. Rows full of canaries go through everything that can happen to them, on a server that logs
all it can, under triggers that shout; the canaries must be in the rows, sealed in the archive, and nowhere else."""
import json

import pytest
from cluster import wait_until
from leaks import (  # noqa: F401, fixtures are used by their names
    CANARY, Listener, apply, assert_nothing_leaked, aviary, load, loud, policy, shout, shouted,
)
from support import PLACEHOLDER, number, order_value, run_cycle


def test_nothing_leaks_from_a_cycle(aviary):
    """Breaks when messages of the owner's code get through, or when a value is part of a statement, a state or an error."""
    listener = Listener(aviary)
    shout(aviary, "orders", "addresses", "customers", "invoices", "payloads")
    listener.call("SELECT * FROM amazon_pii.check_policy(%s::jsonb)", [json.dumps(policy())])
    aviary.sql("ALTER TABLE shop.orders DISABLE TRIGGER shout", user="shop_owner")
    # It is in force when all is in place: a worker is woken by it.
    apply(aviary, policy(enabled=False), listener)
    aviary.sql("ALTER TABLE shop.orders ENABLE TRIGGER shout", user="shop_owner")
    listener.call("SELECT amazon_pii.enable_policy('shop')")
    listener.call("CALL amazon_pii.run_cycle('shop', true)")
    listener.call("SELECT * FROM amazon_pii.preview('shop')")
    listener.call("SELECT * FROM amazon_pii.explain_order(%s)", [number(3)])
    assert [order_value(aviary, i) for i in (1, 2, 3, 4)] == ["redacted", "redacted", "failed", "redacted"]
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 3") == CANARY + "D"
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == PLACEHOLDER
    assert shouted(aviary)
    assert_nothing_leaked(aviary, listener.end())


def test_nothing_leaks_from_the_worker(aviary):
    """Breaks when the worker's session logs what the pins keep quiet elsewhere."""
    shout(aviary, "addresses", "customers", "invoices")
    apply(aviary, policy(enabled=False))
    aviary.sql("CREATE TRIGGER shout BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.shout()", user="shop_owner")
    aviary.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    wait_until(lambda: order_value(aviary, 1) == "redacted" and order_value(aviary, 3) == "failed")
    assert shouted(aviary)
    assert_nothing_leaked(aviary)


def test_nothing_leaks_when_it_is_given_back(aviary):
    """Breaks when retrieve or peek puts a value anywhere but into the rows, or the caller's result."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    shout(aviary, "addresses", "customers", "payloads")
    given = listener.call("SELECT amazon_pii.peek(%s, 'return')::text", [number(1)], "pii_operator", secret=True)
    assert given[0][0].count(CANARY) >= 12
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator")
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == CANARY + "D"
    aviary.sql("CREATE TRIGGER shout BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.shout()", user="shop_owner")
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(3)], "pii_operator", error=True)
    # The shop's own statement, with the shop's own trigger: what that one says would be no doing of ours.
    aviary.sql("ALTER TABLE shop.addresses DISABLE TRIGGER shout", user="shop_owner")
    listener.call("UPDATE shop.addresses SET city = 'Elsewhere' WHERE order_id = 1", user="shop_owner", error=True)
    aviary.sql("ALTER TABLE shop.addresses ENABLE TRIGGER shout", user="shop_owner")
    listener.call("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    listener.call("CALL amazon_pii.run_cycle('shop')")
    assert shouted(aviary)
    assert_nothing_leaked(aviary, listener.end())


def test_nothing_leaks_from_constraints(aviary):
    """Breaks when the server's own words reach anybody: a unique violation quotes the key, a check the whole row."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    aviary.sql("CREATE UNIQUE INDEX ON shop.orders (gift_message) WHERE gift_message <> '[Redacted]'; "
               "ALTER TABLE shop.addresses ADD CHECK (name = '[Redacted]') NOT VALID", user="shop_owner")
    load(aviary, {"orders (id, external_no, channel, gift_message)": [(9, "W-9", "web", "{}D")]})
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator", error=True)
    aviary.sql("DELETE FROM shop.orders WHERE id = 9", user="shop_owner")
    listener.call("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(2)], "pii_operator", error=True)
    listener.call("SELECT * FROM amazon_pii.unflag(%s, 'wrong')", [number(2)], error=True)
    assert aviary.value("SELECT gift_message FROM shop.orders WHERE id = 1") == PLACEHOLDER
    assert_nothing_leaked(aviary, listener.end())


def test_nothing_leaks_when_it_is_looked_for(aviary):
    """Breaks when verify puts what it compares, or what it finds, anywhere: into its result, a statement, the log, its progress."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    # A copy by the server itself: no statement holds a value.
    aviary.sql("CREATE TABLE shop.copies (v text, w tsvector, x jsonb)", user="shop_owner")
    load(aviary, {"copies (v, w, x)": [("{}D", "'{}f':1", '"{}L"'), ("x", "", "[]")]})
    aviary.sql("CREATE TABLE shop.hidden (v text); ALTER TABLE shop.hidden ENABLE ROW LEVEL SECURITY; "
               "ALTER TABLE shop.hidden FORCE ROW LEVEL SECURITY", user="shop_owner")
    for scope in ("linked", "schema", "database"):
        rows = listener.call("SELECT * FROM amazon_pii.verify('shop', %s)", [scope], "pii_auditor")
        assert any(column == "v" and orders for _, column, _, orders in rows) == (scope != "linked"), rows
    aviary.sql("ALTER TABLE amazon_pii_archive.data_key RENAME TO elsewhere")
    listener.call("SELECT * FROM amazon_pii.verify('shop')", user="pii_auditor", error=True)
    aviary.sql("ALTER TABLE amazon_pii_archive.elsewhere RENAME TO data_key")
    assert_nothing_leaked(aviary, listener.end())


@pytest.mark.parametrize("amazon", [
    "channel = 'amazon' AND coalesce(nullif(shop_note, 'x')::int, 0) >= 0", "channel = 'amazon' AND (shop_note::jsonb) IS NOT NULL",
    "channel = 'amazon' AND shop_note::regclass IS NOT NULL",
])
def test_nothing_leaks_from_casts(aviary, amazon):
    """Breaks when the error of an expression, which quotes the value, gets further than its SQLSTATE."""
    listener = Listener(aviary)
    apply(aviary, policy(), listener)
    run_cycle(aviary, "shop")
    document = policy(orders={**policy()["orders"], "amazon": amazon, "redact": ["gift_message"]})
    aviary.sql("DELETE FROM shop.invoices; DELETE FROM shop.payloads; DELETE FROM shop.addresses; DELETE FROM shop.orders", user="shop_owner")
    apply(aviary, document, listener)
    load(aviary, {"orders (id, external_no, channel, shipped_at, shop_note)": [(7, number(7), "amazon", "2020-01-01", "{}X")]})
    assert order_value(aviary, 7) == "failed"
    listener.call("CALL amazon_pii.run_cycle(NULL, true)")
    assert aviary.value("SELECT last_error FROM amazon_pii.status")
    listener.call("SELECT * FROM amazon_pii.check_policy(%s::jsonb)", [json.dumps(document)])
    listener.call("SELECT * FROM amazon_pii.preview('shop')", error=True)
    listener.call("SELECT amazon_pii.apply_policy(%s::jsonb)", [json.dumps(document)], error=True)
    assert order_value(aviary, 7, "last_error")
    assert_nothing_leaked(aviary, listener.end())
