"""Options of a policy that change what happens at the edges: writes to retrieved rows, stale orders, replacements."""
import json

import pytest
from support import payloads

ORDERS = """
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE TABLE shop.orders (
    id bigint PRIMARY KEY, external_no text, channel text NOT NULL, placed_at timestamp, shipped_at timestamptz,
    replaces text, note text, amount numeric(10,2));
"""


def policy(**options):
    orders = {"table": "shop.orders", "number": "external_no", "amazon": "channel = 'amazon'", "anchor": "shipped_at",
              "redact": ["note"]}
    orders.update(options.pop("orders", {}))
    return {"policy": "shop", "orders": orders, "enabled": True, **options}


@pytest.fixture
def shop(db):
    db.psql(ORDERS)
    return db


def insert(shop, id, shipped="now() - '40 days'::interval", placed="now() - '60 days'::interval", replaces=None,
           channel="amazon"):
    shop.sql(f"INSERT INTO shop.orders VALUES (%s, %s, %s, {placed}, {shipped}, %s, 'Ada Invented', 1.50)",
             [id, f"111-0000000-{id:07}", channel, replaces], user="shop_owner")


def test_a_sync_that_resends_a_retrieved_order_does_not_fail_when_writes_are_ignored(shop):
    """Breaks when the BEFORE trigger is missing: the sync fails, or overwrites what was retrieved."""
    shop.apply_policy(policy(when_retrieved="ignore"))
    insert(shop, 1)
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert shop.value("SELECT note FROM shop.orders") == "[Redacted]"
    shop.sql("SELECT * FROM amazon_pii.retrieve('111-0000000-0000001', 'return')", user="pii_operator")
    shop.sql("UPDATE shop.orders SET note = '', amount = 9.99", user="shop_owner")
    assert shop.sql("SELECT note, amount::text FROM shop.orders") == [("Ada Invented", "9.99")]
    shop.sql("SELECT amazon_pii.end_retrieval('111-0000000-0000001')", user="pii_operator")
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert shop.value("SELECT note FROM shop.orders") == "[Redacted]"
    shop.sql("UPDATE shop.orders SET note = 'new'", user="shop_owner")
    assert shop.value("SELECT note FROM shop.orders") == "new", "rows that are not retrieved can be written"


def test_the_refusing_guard_is_the_default(shop):
    """Breaks when `when_retrieved` is not heeded."""
    shop.apply_policy(policy())
    insert(shop, 1)
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    shop.sql("SELECT * FROM amazon_pii.retrieve('111-0000000-0000001', 'return')", user="pii_operator")
    with pytest.raises(Exception) as refused:
        shop.sql("UPDATE shop.orders SET note = 'x'", user="shop_owner")
    assert refused.value.pgcode == "55000"
    assert "read-only" in str(refused.value)
    assert shop.value("SELECT note FROM shop.orders") == "Ada Invented"


def test_an_order_that_is_never_dispatched_is_shown_as_stale(shop):
    """Breaks when `stale_after` is not heeded: such an order would keep its personal data unseen for ever."""
    shop.apply_policy(policy(orders={"placed": "placed_at", "stale_after": "45 days"}))
    insert(shop, 1, shipped="NULL")
    insert(shop, 2, shipped="NULL", placed="now() - '10 days'::interval")
    listener = shop.connect("pii_operator")
    listener.cursor().execute("LISTEN amazon_pii")
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert shop.value("SELECT stale FROM amazon_pii.status", user="pii_admin") == 1
    assert shop.sql("SELECT status, note FROM shop.orders JOIN amazon_pii.orders ON order_key = '[\"' || id || '\"]'") == [
        ("flagged", "Ada Invented")] * 2
    stale = [told for told in map(json.loads, payloads(listener)) if told["status"] == "stale"]
    assert [n["orders"] for n in stale] == [['["1"]']]


def test_a_stale_order_is_redacted_where_the_policy_says_so(shop):
    """Breaks when `"stale": "redact"` is not heeded."""
    shop.apply_policy(policy(orders={"placed": "placed_at", "stale_after": "45 days", "stale": "redact"}))
    insert(shop, 1, shipped="NULL")
    insert(shop, 2, shipped="NULL", placed="now() - '10 days'::interval")
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert shop.sql("SELECT id, note FROM shop.orders ORDER BY id") == [(1, "[Redacted]"), (2, "Ada Invented")]
    shop.sql("SELECT * FROM amazon_pii.retrieve('111-0000000-0000001', 'late dispatch')", user="pii_operator")
    assert shop.value("SELECT note FROM shop.orders WHERE id = 1") == "Ada Invented"


def test_an_order_that_replaces_a_flagged_one_is_flagged_too(shop):
    """Breaks when `replaces` is not heeded: the replacement's copy of the buyer would stay for ever."""
    shop.apply_policy(policy(orders={"replaces": "replaces"}))
    insert(shop, 1)
    insert(shop, 2, replaces="111-0000000-0000001", channel="manual")
    insert(shop, 3, replaces="no such order", channel="manual")
    insert(shop, 4, channel="manual")
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert shop.sql("SELECT id, note FROM shop.orders ORDER BY id") == [
        (1, "[Redacted]"), (2, "[Redacted]"), (3, "Ada Invented"), (4, "Ada Invented")]


ONE = "111-0000000-0000001"


@pytest.fixture
def retrieved(shop):
    """Order 1 was redacted and is retrieved for 30 days."""
    shop.apply_policy(policy(orders={"replaces": "replaces"}))
    insert(shop, 1)
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    shop.sql("SELECT amazon_pii.retrieve(%s, 'return')", [ONE], user="pii_operator")
    return shop


def until(shop):
    return shop.value("SELECT retrieved_until FROM amazon_pii.orders WHERE order_number = %s", [ONE])


def dates(shop, id):
    return shop.sql("SELECT status, redact_due_at, follows FROM amazon_pii.orders WHERE order_key = %s", [f'["{id}"]'])[0]


@pytest.mark.parametrize("shipped", ["NULL", "now() - '40 days'::interval", "now() + '3 days'::interval"],
                         ids=["not dispatched", "long ago", "soon"])
@pytest.mark.parametrize("channel", ["amazon", "manual"])
def test_a_replacement_goes_when_its_originals_retrieval_ends(retrieved, shipped, channel):
    """pixi: returns and replacements are masked again 30 days after the retrieval of the original. Breaks when the
    replacement has a clock of its own, whichever way its row is written afterwards."""
    insert(retrieved, 2, shipped=shipped, replaces=ONE, channel=channel)
    following = ("scheduled", until(retrieved), '["1"]')
    assert dates(retrieved, 2) == following
    retrieved.sql("UPDATE shop.orders SET shipped_at = now() - '35 days'::interval WHERE id = 2", user="shop_owner")
    assert dates(retrieved, 2) == following
    retrieved.sql("CALL amazon_pii.run_cycle('shop', true)", user="pii_admin")
    assert retrieved.value("SELECT note FROM shop.orders WHERE id = 2") == "Ada Invented"
    retrieved.sql("UPDATE amazon_pii.order_state SET retrieved_until = now() - '1 s'::interval, next_due_at = now() WHERE order_key = '[\"1\"]'; "
                  "UPDATE amazon_pii.order_state SET redact_due_at = now() - '1 s'::interval, next_due_at = now() WHERE order_key = '[\"2\"]'")
    retrieved.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert retrieved.sql("SELECT DISTINCT note FROM shop.orders") == [("[Redacted]",)]


def test_a_replacement_goes_with_a_retrieval_that_is_ended_early(retrieved):
    """Breaks when it keeps the date of a retrieval that is over."""
    insert(retrieved, 2, shipped="NULL", replaces=ONE, channel="manual")
    insert(retrieved, 3, shipped="NULL", replaces="another", channel="amazon")
    retrieved.sql("SELECT amazon_pii.end_retrieval(%s)", [ONE], user="pii_operator")
    retrieved.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert retrieved.sql("SELECT id, note FROM shop.orders ORDER BY id") == [
        (1, "[Redacted]"), (2, "[Redacted]"), (3, "Ada Invented")]


def number_of(shop, id):
    return shop.value("SELECT order_number FROM amazon_pii.orders WHERE order_key = %s", [f'["{id}"]'])


def test_a_replacement_that_is_to_be_erased_is(retrieved):
    """Breaks when the date of its original takes an erasure back."""
    insert(retrieved, 2, shipped="NULL", replaces=ONE)
    retrieved.sql("SELECT amazon_pii.erase(%s, 'request 7')", [number_of(retrieved, 2)], user="pii_admin")
    retrieved.sql("CALL amazon_pii.run_cycle('shop', true)", user="pii_admin")
    assert retrieved.sql("SELECT id, note FROM shop.orders ORDER BY id") == [(1, "Ada Invented"), (2, "[Redacted]")]


def test_a_replacement_goes_with_an_original_that_is_erased(retrieved):
    """Breaks when an erasure ends the retrieval and leaves what follows it."""
    insert(retrieved, 2, shipped="NULL", replaces=ONE)
    retrieved.sql("SELECT amazon_pii.erase(%s, 'request 7')", [ONE], user="pii_admin")
    retrieved.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert retrieved.sql("SELECT DISTINCT note FROM shop.orders") == [("[Redacted]",)]


def test_a_replacement_without_a_dispatch_can_be_exported(retrieved):
    """Breaks when nothing that is exported ever reaches an order without an anchor."""
    retrieved.apply_policy(policy(orders={"replaces": "replaces"}, export="require"))
    insert(retrieved, 2, shipped="NULL", replaces=ONE)
    retrieved.sql("SELECT amazon_pii.end_retrieval(%s)", [ONE], user="pii_operator")
    retrieved.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert retrieved.value("SELECT note FROM shop.orders WHERE id = 2") == "Ada Invented"
    retrieved.sql("SELECT amazon_pii.mark_exported('shop', now())", user="pii_admin")
    retrieved.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert retrieved.value("SELECT note FROM shop.orders WHERE id = 2") == "[Redacted]"


def test_a_replacement_follows_no_retrieval_that_it_was_not_made_for(shop):
    """Breaks when an order that was there before gets another date by a retrieval, or when an original that is not retrieved
    has one to follow."""
    shop.apply_policy(policy(orders={"replaces": "replaces"}))
    insert(shop, 1)
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    insert(shop, 2, shipped="now() - '5 days'::interval", replaces=ONE, channel="manual")
    own = dates(shop, 2)
    assert own[0] == "scheduled" and own[2] is None
    shop.sql("SELECT amazon_pii.retrieve(%s, 'return')", [ONE], user="pii_operator")
    shop.sql("UPDATE shop.orders SET channel = 'phone' WHERE id = 2", user="shop_owner")
    shop.sql("CALL amazon_pii.run_cycle('shop', true)", user="pii_admin")
    assert dates(shop, 2) == own
    shop.sql("SELECT amazon_pii.end_retrieval(%s)", [ONE], user="pii_operator")
    assert dates(shop, 2) == own


def test_a_new_version_of_the_policy_leaves_the_replacements_date(retrieved):
    """Breaks when a changed clock is set for orders that follow another."""
    insert(retrieved, 2, shipped="now() - '5 days'::interval", replaces=ONE)
    retrieved.apply_policy(policy(orders={"replaces": "replaces"}, redact_after="60 days", loosened="test"))
    assert dates(retrieved, 2) == ("scheduled", until(retrieved), '["1"]')
    retrieved.sql("CALL amazon_pii.run_cycle('shop', true)", user="pii_admin")
    assert dates(retrieved, 2) == ("scheduled", until(retrieved), '["1"]')
    assert ("follows", 'the retrieval of order ["1"], which it replaces') in retrieved.sql(
        "SELECT step, detail FROM amazon_pii.explain_order('111-0000000-0000002')")


def test_a_change_of_key_is_followed_into_the_archive(shop):
    """Breaks when the archive stays behind under the old key: the order's personal data could not be given back."""
    shop.sql("CREATE TABLE shop.parties (id int PRIMARY KEY, order_id bigint, name text)", user="shop_owner")
    shop.sql("CREATE INDEX ON shop.parties (order_id)", user="shop_owner")
    shop.apply_policy(policy(linked=[{"table": "shop.parties", "on": {"order_id": "id"}, "redact": ["name"]}]))
    for id in (1, 2, 3):
        insert(shop, id)
        shop.sql("INSERT INTO shop.parties VALUES (%s, %s, 'Bob Made-Up')", [id, id], user="shop_owner")
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    shop.sql("UPDATE shop.parties SET order_id = order_id + 100, id = id + 500", user="shop_owner")
    shop.sql("UPDATE shop.orders SET id = id + 100", user="shop_owner")
    assert shop.sql("SELECT order_key, status FROM amazon_pii.orders ORDER BY 1", user="pii_admin") == [
        (f'["{id}"]', "redacted") for id in (101, 102, 103)]
    # Once by way of a cycle, once by way of the access itself.
    shop.sql("SELECT * FROM amazon_pii.retrieve('111-0000000-0000001', 'before the cycle')", user="pii_operator")
    shop.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    shop.sql("SELECT * FROM amazon_pii.retrieve('111-0000000-0000002', 'after the cycle')", user="pii_operator")
    assert shop.sql("SELECT id, note FROM shop.orders ORDER BY id") == [
        (101, "Ada Invented"), (102, "Ada Invented"), (103, "[Redacted]")]
    assert shop.sql("SELECT id, order_id, name FROM shop.parties ORDER BY id") == [
        (501, 101, "Bob Made-Up"), (502, 102, "Bob Made-Up"), (503, 103, "[Redacted]")]
    assert shop.sql("SELECT DISTINCT order_key FROM amazon_pii_archive.document ORDER BY 1") == [
        (f'["{id}"]',) for id in (101, 102, 103)]
    assert shop.value("SELECT count(*) FROM amazon_pii.renamed") == 0
