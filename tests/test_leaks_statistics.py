"""P9: what the planner remembers. pg_stats holds values of rows until a table is analyzed again; a cycle that overwrote them does that,
as the table's owner, and holds nobody up."""
import pytest
from leaks import remembered
from support import add_order, fill, open_shop, order_value, report_statistics, run_cycle, shop_policy, sweep

TABLES = ("orders", "addresses", "customers", "invoices", "invoice_lines")
# What fill() writes into treated columns.
VALUES = ("Gift ", "Note ", "Name ", "Street ", "Town ", "First ", "Last ", "@example.invalid", "Bill ", "Line ")


def known(db):
    """Of these values, those that the statistics of the shop hold."""
    text = "\n".join(remembered(db, "shop"))
    assert text
    return {value for value in VALUES if value in text}


def analyzed(db):
    """When each table was analyzed last."""
    report_statistics(db)
    return dict(db.sql("SELECT relname, last_analyze FROM pg_stat_user_tables WHERE schemaname = 'shop'"))


def a_day_later(db):
    """The server's own times cannot be turned back; statistics whose age nobody knows are due as those of yesterday are."""
    db.sql("SELECT pg_stat_reset_single_table_counters(c.oid) FROM pg_class AS c WHERE relnamespace = 'shop'::regnamespace AND relkind = 'r'")


@pytest.fixture
def shop(db):
    open_shop(db)
    fill(db, 60)
    db.sql("CREATE INDEX ON shop.customers (lower(last_name)); CREATE STATISTICS shop.together (mcv) ON city, line1 FROM shop.addresses",
           user="shop_owner")
    db.sql("ANALYZE shop.orders, shop.addresses, shop.customers, shop.invoices, shop.invoice_lines", user="shop_owner")
    assert known(db) == set(VALUES)
    return db


def test_the_planner_forgets_what_a_cycle_overwrote(shop):
    """Breaks when a touched table is not analyzed again: columns, expressions of indexes and groups of columns."""
    shop.apply_policy(shop_policy())
    assert known(shop) == set(VALUES)
    assert run_cycle(shop)["redacted"] == 60
    assert known(shop) == set()
    assert "last 1" not in "\n".join(remembered(shop, "shop"))
    assert shop.value("SELECT last_error FROM amazon_pii.status") is None


def test_what_was_never_analyzed_is_left_alone(db):
    """Breaks when a cycle gives a table statistics that nobody asked for: they would change its plans."""
    open_shop(db)
    fill(db, 6)
    db.apply_policy(shop_policy())
    assert run_cycle(db)["redacted"] == 6
    assert remembered(db, "shop") == [] and set(analyzed(db).values()) == {None}


def test_few_rows_wait_for_the_next_day(shop):
    """Breaks when every cycle analyzes, or a table of which little was overwritten is never analyzed again."""
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    # A CALL reports what it changed when it is over, after its ANALYZE, so the next one may analyze once more.
    report_statistics(shop, "pii_admin")
    sweep(shop)
    before = analyzed(shop)
    assert None not in {before[t] for t in TABLES}
    add_order(shop, 1000)
    report_statistics(shop, "shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    report_statistics(shop, "pii_admin")
    sweep(shop)
    assert analyzed(shop) == before
    a_day_later(shop)
    add_order(shop, 1001)
    report_statistics(shop, "shop_owner")
    assert run_cycle(shop)["redacted"] == 1 and order_value(shop, 1001) == "redacted"
    after = analyzed(shop)
    assert after["addresses"] and after["orders"]


def test_nobody_is_waited_for(shop):
    """Breaks when a cycle waits for whoever has a table locked against ANALYZE alone, or fails because of it."""
    shop.apply_policy(shop_policy())
    before = analyzed(shop)
    with shop.connect("shop_owner", autocommit=False) as other, other.cursor() as cursor:
        # Lets rows be written.
        cursor.execute("LOCK TABLE shop.addresses IN SHARE UPDATE EXCLUSIVE MODE")
        assert run_cycle(shop)["redacted"] == 60
        assert known(shop) == {"Name ", "Street ", "Town "}
        assert analyzed(shop)["addresses"] == before["addresses"]
        assert shop.value("SELECT last_error FROM amazon_pii.status") is None
        other.rollback()
    # The next cycle that does something makes up for it: the daily sweep at the latest.
    sweep(shop)
    assert known(shop) == set()


def test_what_indexes_compute_runs_as_the_owner(shop):
    """Breaks when ANALYZE lends a right: it calls the functions of the owner's indexes."""
    shop.sql("CREATE SEQUENCE shop.calls; CREATE FUNCTION shop.spy(v text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN "
             "PERFORM nextval('shop.calls'); IF current_user <> 'shop_owner' THEN RAISE EXCEPTION 'run by %', current_user; END IF; "
             "RAISE WARNING '%', v; RETURN v; END $$; CREATE INDEX ON shop.customers (shop.spy(email)); ANALYZE shop.customers",
             user="shop_owner")
    shop.apply_policy(shop_policy())
    called, log_from = shop.value("SELECT last_value FROM shop.calls"), len(shop.cluster.log_text())
    assert run_cycle(shop)["redacted"] == 60
    # Once for the new row in the index, once for the statistics.
    assert shop.value("SELECT last_value FROM shop.calls") - called >= 2 * 60
    assert known(shop) == set() and shop.value("SELECT last_error FROM amazon_pii.status") is None
    assert "@example.invalid" not in shop.cluster.log_text()[log_from:]


def test_partitions(db):
    """Breaks when statistics of partitions, or over all of them, keep what a cycle overwrote."""
    db.sql("CREATE SCHEMA shop AUTHORIZATION shop_owner")
    db.sql("CREATE TABLE shop.orders (id bigint PRIMARY KEY, no text, at timestamptz, note text) PARTITION BY RANGE (id); "
           "CREATE TABLE shop.first PARTITION OF shop.orders FOR VALUES FROM (0) TO (50); "
           "CREATE TABLE shop.second PARTITION OF shop.orders FOR VALUES FROM (50) TO (100); "
           "INSERT INTO shop.orders SELECT i, 'a', now() - '40 days'::interval, 'Note ' || i FROM generate_series(1, 80) AS i", user="shop_owner")
    document = {"policy": "shop", "enabled": True, "orders": {"table": "shop.orders", "key": ["id"], "amazon": "no = 'a'", "anchor": "at",
                                                              "redact": ["note"]}}
    db.sql("ANALYZE shop.second", user="shop_owner")
    db.apply_policy(document)
    assert known(db) == {"Note "}
    assert run_cycle(db)["redacted"] == 80 and known(db) == set()
    assert [n for n, at in analyzed(db).items() if at] == ["second"]
    db.sql("INSERT INTO shop.orders SELECT i, 'a', now() - '40 days'::interval, 'Note ' || i FROM generate_series(81, 99) AS i", user="shop_owner")
    db.sql("ANALYZE shop.orders", user="shop_owner")
    assert known(db) == {"Note "}
    assert run_cycle(db)["redacted"] == 19 and known(db) == set()
