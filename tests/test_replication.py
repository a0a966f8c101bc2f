"""Logical replication of the shop's tables: from a publisher that knows nothing of the extension, and to a subscriber that knows
nothing of it either."""
import pytest
from cluster import wait_until
from conftest import add_extension, new_database, server_with
from support import PLACEHOLDER, TABLES, add_customer, add_order, number, open_shop, order_value, retrieve, run_cycle, shop_policy, snapshot

SHOP = ", ".join(f"shop.{t}" for t in TABLES)


def subscribe(publisher, subscriber, name):
    publisher.sql(f"CREATE PUBLICATION {name} FOR TABLE {SHOP}")
    subscriber.sql(f"CREATE SUBSCRIPTION {name} CONNECTION 'host={publisher.cluster.base} port={publisher.cluster.port} dbname={publisher.name} "
                   f"user=postgres' PUBLICATION {name} WITH (slot_name = '{publisher.name}_{name}')")
    wait_until(lambda: subscriber.sql("SELECT 1 FROM pg_subscription_rel WHERE srsubstate <> 'r'") == [])


@pytest.fixture(scope="module")
def middle():
    """A server that subscribes to itself would wait for itself."""
    server = server_with()
    yield server
    server.destroy()


@pytest.fixture
def chain(cluster, middle):
    """The shop's own database, the one with a policy, and one behind that."""
    shop, kept, behind = (new_database(server, "template0") for server in (cluster, middle, cluster))
    add_extension(middle, kept.name)
    for db in (shop, kept, behind):
        open_shop(db)
    yield shop, kept, behind
    for db, name in ((behind, "redactions"), (kept, "orders")):
        if db.sql("SELECT 1 FROM pg_subscription AS s JOIN pg_database AS d ON d.oid = s.subdbid WHERE d.datname = current_database()"):
            db.sql(f"DROP SUBSCRIPTION {name}")
    for db in (shop, kept, behind):
        db.drop()


def same(one, other):
    return lambda: snapshot(one) == snapshot(other)


def test_replicated_orders_are_redacted_and_redactions_are_replicated(chain):
    """Breaks when what a subscription copies or applies is not flagged, or when an overwrite does not reach those behind."""
    shop, kept, behind = chain
    kept.apply_policy(shop_policy())
    # From here on no sweep is due.
    run_cycle(kept)
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    # What was there when the subscription was made is copied, what comes later is applied.
    subscribe(shop, kept, "orders")
    subscribe(kept, behind, "redactions")
    wait_until(same(shop, behind))
    add_order(shop, 2)
    add_order(shop, 3, "1 day")
    add_order(shop, 4, channel="web")
    wait_until(same(shop, behind))
    original = snapshot(shop)
    counts = run_cycle(kept)
    assert (counts["flagged"], counts["redacted"], counts["failed"]) == (3, 2, 0)
    assert [order_value(kept, o) for o in (1, 2, 3, 4)] == ["redacted", "redacted", "scheduled", None]
    assert kept.sql("SELECT id, gift_message FROM shop.orders ORDER BY id") == [(1, PLACEHOLDER), (2, PLACEHOLDER), (3, "Gift3"), (4, "Gift4")]
    wait_until(same(kept, behind))
    assert behind.sql("SELECT email FROM shop.customers") == [(PLACEHOLDER,)]
    assert behind.sql("SELECT name FROM shop.addresses ORDER BY order_id") == [(PLACEHOLDER,), (PLACEHOLDER,), ("Name3",), ("Name4",)]
    # The publisher keeps what it has: nothing goes upstream.
    assert snapshot(shop) == original
    # P7: an UPDATE over there sends the whole row once more.
    shop.sql("UPDATE shop.addresses SET zip = 'Z' WHERE order_id = 2", user="shop_owner")
    wait_until(lambda: behind.sql("SELECT name FROM shop.addresses WHERE order_id = 2") == [("Name2",)])
    run_cycle(kept)
    wait_until(same(kept, behind))
    assert behind.sql("SELECT name, zip FROM shop.addresses WHERE order_id = 2") == [(PLACEHOLDER, PLACEHOLDER)]
    # A retrieval is replicated, too, and so is its end.
    retrieve(kept, number(1))
    wait_until(lambda: behind.sql("SELECT email FROM shop.customers") == [("buyer1@example.invalid",)])
    kept.sql("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    run_cycle(kept)
    wait_until(lambda: behind.sql("SELECT email FROM shop.customers") == [(PLACEHOLDER,)])


def test_the_states_of_the_extension_are_not_the_shops(chain):
    """Breaks when a subscriber's apply worker is stopped by a trigger of ours: replication must go on when the policy cannot."""
    shop, kept, _ = chain
    kept.apply_policy(shop_policy())
    subscribe(shop, kept, "orders")
    kept.sql("ALTER TABLE amazon_pii.touched RENAME TO touched_elsewhere")
    add_order(shop, 1)
    wait_until(same(shop, kept))
    kept.sql("ALTER TABLE amazon_pii.touched_elsewhere RENAME TO touched")
    kept.sql("CALL amazon_pii.run_cycle('shop', sweep => true)", user="pii_admin")
    assert order_value(kept, 1) == "redacted"
