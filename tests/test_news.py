"""What triggers do to orders is announced by the next cycle, never by the triggers: an import can be prepared, and one that
is rolled back says nothing."""
import json

import pytest
from cluster import wait_until
from conftest import add_extension, new_database
from support import add_order, end_retrieval, fill, number, open_shop, order_number, payloads, retrieve, run_cycle, shop_policy, sweep


class Ear:
    """A connection that listens."""

    def __init__(self, db):
        self.connection = db.connect("nobody_special")
        self.connection.cursor().execute("LISTEN amazon_pii")

    def heard(self):
        """Payloads since the last call: [(status, count, orders)]."""
        told = [json.loads(payload) for payload in payloads(self.connection)]
        self.connection.notifies.clear()
        assert all(p["policy"] == "shop" for p in told)
        assert all(p["complete"] == (p["count"] == len(p["orders"])) for p in told if "orders" in p)
        return [(p["status"], p["count"], p.get("orders")) for p in told]


@pytest.fixture
def shop(db):
    open_shop(db)
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.ear = Ear(db)
    return db


def keys(*orders):
    return [f'["{o}"]' for o in orders]


def test_imported_orders_are_announced_by_the_next_cycle(shop):
    """Breaks when "flagged" is not announced, is announced twice, or by the import itself."""
    for order in (1, 2):
        add_order(shop, order, shipped=None)
    add_order(shop, 3, shipped="1 day")
    add_order(shop, 4, channel="web")
    assert shop.ear.heard() == []
    run_cycle(shop)
    assert shop.ear.heard() == [("flagged", 3, keys(1, 2, 3))]
    run_cycle(shop)
    assert shop.ear.heard() == []
    assert shop.value("SELECT count(*) FROM amazon_pii.news") == 0


def test_a_clock_that_starts_is_announced(shop):
    """Breaks when the start of an order's clock is not announced, or any other change is taken for one."""
    for order in (1, 2):
        add_order(shop, order, shipped=None)
    run_cycle(shop)
    shop.ear.heard()
    shop.sql("UPDATE shop.orders SET shipped_at = now() WHERE id = 1; UPDATE shop.orders SET total = 7", user="shop_owner")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '1 hour'::interval WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    assert shop.ear.heard() == [("scheduled", 1, keys(1))]


def test_news_comes_before_what_the_cycle_does(shop):
    """Breaks when an order is announced as redacted before it was announced at all."""
    add_order(shop, 1)
    run_cycle(shop)
    assert shop.ear.heard() == [("flagged", 1, keys(1)), ("archived", 1, keys(1)), ("redacted", 1, keys(1))]


def test_every_step_of_an_order_is_announced_once_a_batch(shop):
    """Breaks when somebody who listens misses a change of state, or is told of one twice."""
    for order in (1, 2, 3):
        add_order(shop, order, shipped="29 days 1 hour")
    run_cycle(shop)
    assert shop.ear.heard() == [("flagged", 3, keys(1, 2, 3)), ("archived", 3, keys(1, 2, 3))]
    hold = "SELECT amazon_pii.hold(%s, 'chargeback', now() + '1 day'::interval)"
    shop.sql(hold, [number(3)], "pii_operator")
    assert shop.ear.heard() == [("hold", 1, keys(3))]
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = LEAST(next_due_at, GREATEST(now(), held_until))")
    run_cycle(shop)
    assert shop.ear.heard() == [("redacted", 2, keys(1, 2))]
    shop.sql("SELECT amazon_pii.release(%s)", [number(3)], "pii_operator")
    assert shop.ear.heard() == [("release", 1, keys(3))]
    run_cycle(shop)
    assert shop.ear.heard() == [("redacted", 1, keys(3))]
    retrieve(shop, number(1))
    assert shop.ear.heard() == [("retrieved", 1, keys(1))]
    end_retrieval(shop, number(1))
    assert shop.ear.heard() == [("end_retrieval", 1, keys(1))]
    run_cycle(shop)
    assert shop.ear.heard() == [("redacted", 1, keys(1))]
    # Its own end, nobody's doing.
    retrieve(shop, number(2))
    shop.sql("UPDATE amazon_pii.order_state SET retrieved_until = now(), next_due_at = now() WHERE status = 'retrieved'")
    shop.ear.heard()
    run_cycle(shop)
    assert shop.ear.heard() == [("redacted", 1, keys(2))]
    # Personal data comes back.
    shop.sql("UPDATE shop.orders SET gift_message = 'Dear Jane' WHERE id = 3", user="shop_owner")
    run_cycle(shop)
    assert shop.ear.heard() == [("redacted", 1, keys(3))]
    shop.sql("SELECT * FROM amazon_pii.unflag(%s, 'wrong policy')", [number(3)], "pii_admin")
    assert shop.ear.heard() == [("unflagged", 1, keys(3))]
    shop.sql("DELETE FROM shop.addresses WHERE order_id = 1; DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    assert shop.ear.heard() == [("gone", 1, keys(1))]
    run_cycle(shop)
    assert shop.ear.heard() == []


def test_failures_are_announced_once_each(shop):
    """Breaks when an order that fails is announced with its batch, or not at all, or again while it waits."""
    for order in (1, 2):
        add_order(shop, order)
    shop.psql("""SET ROLE shop_owner; CREATE FUNCTION shop.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
        CREATE TRIGGER no BEFORE UPDATE ON shop.addresses FOR EACH ROW WHEN (OLD.order_id = 1) EXECUTE FUNCTION shop.no();""")
    run_cycle(shop)
    heard = [h for h in shop.ear.heard() if h[0] != "overdue"]
    assert heard == [("flagged", 2, keys(1, 2)), ("archived", 2, keys(1, 2)), ("failed", 1, keys(1)), ("redacted", 1, keys(2))]
    run_cycle(shop)
    assert {h[0] for h in shop.ear.heard()} == {"overdue"}


def test_deleted_orders_are_announced(shop):
    """Breaks when an order that is deleted, or comes back, is not announced."""
    for order in (1, 2, 3):
        add_order(shop, order, shipped=None)
    run_cycle(shop)
    shop.ear.heard()
    shop.sql("DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    assert shop.ear.heard() == [("gone", 1, keys(1))]
    add_order(shop, 1, shipped=None)
    run_cycle(shop)
    assert shop.ear.heard() == [("flagged", 1, keys(1))]
    shop.sql("TRUNCATE shop.orders CASCADE", user="shop_owner")
    run_cycle(shop)
    assert [(s, c, sorted(o)) for s, c, o in shop.ear.heard()] == [("gone", 3, keys(1, 2, 3))]


def test_a_large_import_leaves_one_note(shop):
    """Breaks when an import writes a note an order, or a payload outgrows what the server takes."""
    fill(shop, 3000, age="1 day")
    assert shop.sql("SELECT status, order_count, array_length(orders, 1) FROM amazon_pii.news") == [("flagged", 3000, 300)]
    run_cycle(shop)
    ((status, count, orders),) = shop.ear.heard()
    assert (status, count) == ("flagged", 3000)
    assert 100 < len(orders) <= 300 and set(orders) <= set(keys(*range(1, 3001)))


def test_a_prepared_import_is_announced_once_it_is_committed(shop):
    """Breaks when a trigger does what no prepared transaction may, or when a prepared import is announced too early."""
    session = shop.connect("shop_owner", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.orders (id, external_no, channel) VALUES (1, %s, 'amazon')", [number(1)])
        cursor.execute("UPDATE shop.orders SET shipped_at = now() WHERE id = 1")
        cursor.execute("PREPARE TRANSACTION 'news'")
    session.close()
    run_cycle(shop)
    assert shop.ear.heard() == []
    shop.sql("COMMIT PREPARED 'news'", user="shop_owner")
    assert shop.ear.heard() == []
    run_cycle(shop)
    assert shop.ear.heard() == [("flagged", 1, keys(1)), ("scheduled", 1, keys(1))]


@pytest.mark.parametrize("end", ["ROLLBACK", "PREPARE TRANSACTION 'news'; ROLLBACK PREPARED 'news'"])
def test_an_import_that_is_rolled_back_says_nothing(shop, end):
    """Breaks when orders that were never imported are announced."""
    with shop.connect("shop_owner").cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("INSERT INTO shop.orders (id, external_no, channel) VALUES (1, %s, 'amazon')", [number(1)])
        for statement in end.split("; "):
            cursor.execute(statement)
    sweep(shop)
    assert shop.ear.heard() == []


def test_orders_found_by_the_sweep_are_announced(shop):
    """Breaks when only imports are announced."""
    shop.sql("ALTER TABLE shop.orders DISABLE TRIGGER USER", user="shop_owner")
    add_order(shop, 1, shipped=None)
    shop.sql("ALTER TABLE shop.orders ENABLE TRIGGER USER", user="shop_owner")
    assert sweep(shop)["flagged"] == 1
    assert shop.ear.heard() == [("flagged", 1, keys(1))]


def test_noted_orders_are_announced(shop):
    """Breaks when what a trigger could only note is flagged without a word."""
    shop.sql("SET session_replication_role = replica")
    try:
        shop.sql("INSERT INTO shop.orders (id, external_no, channel) VALUES (1, %s, 'amazon')", [number(1)])
    finally:
        shop.sql("SET session_replication_role = origin")
    run_cycle(shop)
    assert shop.ear.heard() == [("flagged", 1, keys(1))]


def test_a_failed_import_is_announced_as_failed(shop):
    """Breaks when an order whose expression fails at import is announced as if nothing had happened, or not at all."""
    divides = "CREATE OR REPLACE FUNCTION shop.sent(n int) RETURNS timestamptz LANGUAGE sql AS 'SELECT now() - pg_catalog.make_interval(7 / n)'"
    shop.sql(divides.replace("7 / n", "n"), user="shop_owner")
    anchor = "CASE WHEN total = 0 THEN shop.sent(total::int) END"
    shop.apply_policy(shop_policy(orders={**shop_policy()["orders"], "anchor": anchor}))
    shop.ear.heard()
    shop.sql(divides, user="shop_owner")
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, total) VALUES (1, %s, 'amazon', 0)", [number(1)], "shop_owner")
    shop.sql(divides.replace("7 / n", "n"), user="shop_owner")
    assert run_cycle(shop)["flagged"] == 1
    assert shop.ear.heard()[:2] == [("failed", 1, keys(1)), ("flagged", 1, keys(1))]


def test_a_disabled_policy_announces_too(shop):
    """Breaks when news of a disabled policy, which flags all the same, piles up."""
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'maintenance')", user="pii_admin")
    shop.ear.heard()
    add_order(shop, 1, shipped=None)
    run_cycle(shop)
    assert shop.ear.heard() == [("flagged", 1, keys(1))]
    assert shop.value("SELECT count(*) FROM amazon_pii.news") == 0


def test_the_worker_announces(preloaded):
    """Breaks when the worker, which has no client, cannot announce."""
    db = new_database(preloaded, "template0")
    try:
        add_extension(preloaded, db.name)
        open_shop(db)
        db.apply_policy(shop_policy())
        wait_until(lambda: db.value("SELECT last_cycle_at IS NOT NULL FROM amazon_pii.status"))
        ear = Ear(db)
        heard = []
        fill(db, 2, age="1 day")
        wait_until(lambda: heard.extend(ear.heard()) or heard)
        assert heard == [("flagged", 2, keys(1, 2))]
        assert db.value("SELECT order_number FROM amazon_pii.orders WHERE order_key = %s", keys(1)) == order_number(1)
    finally:
        db.drop()
