"""P11 when it is our own side that fails: tables of ours that are locked, gone, or refuse a row. The shop's statements go
through, and what they brought is found."""
import pytest
from support import PLACEHOLDER, add_order, number, open_shop, order_value, run_cycle, shop_policy, sweep, tables_with

GONE = "ALTER TABLE amazon_pii.{0} RENAME TO gone_{0}"
BACK = "ALTER TABLE amazon_pii.gone_{0} RENAME TO {0}"
FULL = "ALTER TABLE amazon_pii.{0} ADD CONSTRAINT no_more CHECK (policy IS NULL) NOT VALID"
EMPTY = "ALTER TABLE amazon_pii.{0} DROP CONSTRAINT no_more"

# Which of our tables fail, how, and whether a plain cycle afterwards knows where to look; else the sweep finds it.
TROUBLE = {
    "order_state is gone": (["order_state"], GONE, BACK, True),
    "order_state takes no row": (["order_state"], FULL, EMPTY, True),
    "order_state and touched are gone": (["order_state", "touched"], GONE, BACK, False),
    "order_state and touched take no row": (["order_state", "touched"], FULL, EMPTY, False),
    "news is gone": (["news"], GONE, BACK, True),
    "news takes no row": (["news"], FULL, EMPTY, True),
    "record_state is gone": (["record_state"], GONE, BACK, True),
    "policy is gone": (["policy"], GONE, BACK, True),
    "policy_table is gone": (["policy_table"], GONE, BACK, True),
    "all is gone": (["order_state", "touched", "news", "record_state", "policy", "policy_table"], GONE, BACK, False),
}


@pytest.fixture
def shop(db):
    """Order 1 is redacted, order 2 waits to be dispatched; the sweep of the first day is done."""
    open_shop(db)
    db.apply_policy(shop_policy())
    add_order(db, 1)
    add_order(db, 2, shipped=None)
    run_cycle(db)
    db.sql("GRANT USAGE ON SCHEMA shop TO nobody_special; "
           "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA shop TO nobody_special", user="shop_owner")
    return db


def import_everything(db, user="nobody_special", setup="SELECT 1"):
    """New orders, a late row, an edit, a dispatch and a deletion, in a session that knows no plan yet."""
    with db.connect(user) as connection, connection.cursor() as cursor:
        cursor.execute(setup)
        cursor.execute("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) "
                       "VALUES (3, %s, 'amazon', now() - '40 days'::interval, 'Gift3'), (4, 'W-4', 'web', now(), 'Gift4')", [number(3)])
        cursor.execute("INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Late1')")
        cursor.execute("UPDATE shop.orders SET gift_message = 'Edited1' WHERE id = 1")
        cursor.execute("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 2")
        cursor.execute("INSERT INTO shop.orders (id, external_no, channel) VALUES (5, '5', 'amazon')")
        cursor.execute("DELETE FROM shop.orders WHERE id = 5")
    connection.close()


def assert_found(db):
    assert db.sql("SELECT DISTINCT gift_message FROM shop.orders WHERE channel = 'amazon'") == [(PLACEHOLDER,)]
    assert [tables_with(db, word) for word in ("Late1", "Edited1", "Gift2", "Name2", "Gift3")] == [[]] * 5
    assert [order_value(db, i) for i in (1, 2, 3, 4)] == ["redacted", "redacted", "redacted", None]
    assert db.value("SELECT gift_message FROM shop.orders WHERE id = 4") == "Gift4"


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("case", TROUBLE)
def test_an_import_goes_through_whatever_is_wrong_with_our_tables(shop, case, warm):
    """Breaks when an error of our own reaches the statement that imports, or when what came meanwhile is lost."""
    tables, damage, repair, noted = TROUBLE[case]
    setup = "UPDATE shop.orders SET total = 1 WHERE id = 2" if warm else "SELECT 1"
    for table in tables:
        shop.sql(damage.format(table))
    try:
        import_everything(shop, setup=setup)
    finally:
        for table in tables:
            shop.sql(repair.format(table))
    if noted:
        if not case.startswith(("news", "record_state")):
            assert shop.value("SELECT last_error FROM amazon_pii.status")
        run_cycle(shop)
    else:
        sweep(shop)
        # Redacted orders are looked at again within a week; all of them when the policy is enabled again.
        shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
        shop.sql("UPDATE amazon_pii.order_state SET next_due_at = now() WHERE status = 'redacted'")
        run_cycle(shop)
    assert_found(shop)
    assert shop.value("SELECT last_error FROM amazon_pii.status") is None


@pytest.mark.parametrize("tables", [["order_state"], ["touched"], ["order_state", "touched"], ["policy"], ["record_state"]])
def test_an_import_waits_for_no_lock_on_our_tables(shop, tables):
    """Breaks when maintenance of a table of ours holds up the shop, or loses what was imported meanwhile."""
    maintenance = shop.connect(autocommit=False)
    for table in tables:
        maintenance.cursor().execute(f"LOCK TABLE amazon_pii.{table} IN ACCESS EXCLUSIVE MODE")
    # Less than the two seconds that a cycle waits for a lock.
    import_everything(shop, setup="SET statement_timeout = '1900ms'")
    maintenance.rollback()
    sweep(shop)
    if "touched" in tables:
        shop.sql("UPDATE amazon_pii.order_state SET next_due_at = now() WHERE status = 'redacted'")
        run_cycle(shop)
    assert_found(shop)


@pytest.mark.parametrize("damage, repair", [(GONE, BACK), (FULL, EMPTY)])
def test_what_is_applied_as_a_replica_goes_through_too(shop, damage, repair):
    """Breaks when a note that cannot be written stops logical replication's apply worker."""
    shop.sql(damage.format("touched"))
    try:
        import_everything(shop, "postgres", "SET session_replication_role = replica")
    finally:
        shop.sql(repair.format("touched"))
    assert order_value(shop, 3) is None
    sweep(shop)
    shop.sql("UPDATE amazon_pii.order_state SET next_due_at = now() WHERE status = 'redacted'")
    run_cycle(shop)
    assert_found(shop)


def test_a_cycle_goes_on_where_news_cannot_be_announced(shop):
    """Breaks when trouble with announcements keeps what is due from being done."""
    add_order(shop, 3)
    shop.sql(GONE.format("news"))
    try:
        assert run_cycle(shop)["redacted"] == 1
    finally:
        shop.sql(BACK.format("news"))


@pytest.mark.parametrize("noted", [True, False])
def test_a_row_that_cannot_be_evaluated_keeps_no_other_from_being_flagged(db, noted):
    """Breaks when one bad row among those that triggers noted, or that a sweep looks at, stops the others."""
    open_shop(db)
    db.apply_policy(shop_policy(orders={**shop_policy()["orders"], "anchor": "CASE WHEN 1 / (id - 7) < 99 THEN shipped_at END"}))
    run_cycle(db)
    if not noted:
        db.sql("ALTER TABLE shop.orders DISABLE TRIGGER USER", user="shop_owner")
    db.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) "
           "SELECT i, i, 'amazon', now() - '40 days'::interval, 'Gift' || i FROM generate_series(6, 8) AS i", user="shop_owner")
    run_cycle(db) if noted else sweep(db)
    assert [order_value(db, i) for i in (6, 8)] == ["redacted", "redacted"]
    assert db.value("SELECT last_error FROM amazon_pii.status").startswith("22012")
    assert tables_with(db, "Gift7") == ["orders"]
