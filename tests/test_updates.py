"""Whatever way an UPDATE changes what a policy reads, and whatever way rows come late, it is seen; what concerns no order costs no
statement."""
import io
from pathlib import Path

import pytest
from cluster import Cluster, pg_config
from conftest import new_database, prepare
from support import PLACEHOLDER, add_customer, add_order, fill, number, open_shop, order_value, refused, retrieve, run_cycle, shop_policy

ORDERS = shop_policy()["orders"]


@pytest.fixture
def shop(db):
    open_shop(db)
    db.apply_policy(shop_policy())
    return db


def update(db, text):
    db.sql(text, user="shop_owner")


def copy(db, table, columns, lines):
    with db.session("shop_owner").cursor() as cursor:
        cursor.copy_expert(f"COPY {table} ({columns}) FROM STDIN", io.StringIO("".join(line + "\n" for line in lines)))


# What must be seen

RAISE = """
CREATE FUNCTION shop.raise() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.total > 99 THEN NEW.channel = 'amazon'; END IF; RETURN NEW; END $$;
CREATE TRIGGER raise BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.raise();
"""
CHANGES = {
    "by the statement": "UPDATE shop.orders SET channel = 'amazon' WHERE id = 7",
    "one row of many": "UPDATE shop.orders SET total = total + 1, channel = CASE WHEN id = 7 THEN 'amazon' ELSE channel END",
    "by a trigger that runs before": RAISE + "UPDATE shop.orders SET total = 100 WHERE id = 7",
    "by the first of two parts of a statement":
        "WITH a AS (UPDATE shop.orders SET channel = 'amazon' WHERE id = 7), b AS (UPDATE shop.orders SET total = 5 WHERE id = 8) SELECT",
    "by the second of two parts of a statement":
        "WITH a AS (UPDATE shop.orders SET total = 5 WHERE id = 8), b AS (UPDATE shop.orders SET channel = 'amazon' WHERE id = 7) SELECT",
    "by an import that finds the row":
        "INSERT INTO shop.orders (id, channel, total) VALUES (7, 'amazon', 0), (8, 'web', 1), (9999, 'web', 1) "
        "ON CONFLICT (id) DO UPDATE SET channel = EXCLUDED.channel, total = EXCLUDED.total",
    "after a part that was taken back":
        "DO $$ BEGIN BEGIN UPDATE shop.orders SET channel = 'amazon' WHERE id IN (8, 9); RAISE 'no'; EXCEPTION WHEN OTHERS THEN NULL; END; "
        "UPDATE shop.orders SET channel = 'amazon' WHERE id = 7; END $$",
}


@pytest.mark.parametrize("rows", [20, 3000])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(shop, change, rows):
    fill(shop, rows, age="5 days", channel="web")
    # The session knows the tables already: their columns are not looked up for this statement.
    update(shop, "UPDATE shop.orders SET total = total + 1")
    assert shop.sql("SELECT order_key FROM amazon_pii.order_state") == []
    # Rows in a file, not in memory.
    update(shop, f"SET work_mem = '64kB'; {CHANGES[change]}")
    assert shop.sql("SELECT order_key, status FROM amazon_pii.order_state") == [('["7"]', "scheduled")]


EXPRESSIONS = {
    "a subquery": ("EXISTS (SELECT FROM shop.orders AS o WHERE o.id = orders.id AND o.shop_note = 'mine')", "UPDATE shop.orders SET shop_note = 'mine' WHERE id = 7"),
    "the whole row": ("(to_jsonb(orders) ->> 'total') = '77.00'", "UPDATE shop.orders SET total = 77 WHERE id = 7"),
    "a function of the row": ("shop.mine(orders)", "UPDATE shop.orders SET total = 77 WHERE id = 7"),
}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_what_an_expression_reads_is_found(db, expression):
    amazon, change = EXPRESSIONS[expression]
    open_shop(db)
    update(db, "CREATE FUNCTION shop.mine(shop.orders) RETURNS boolean LANGUAGE sql STABLE AS 'SELECT $1.total = 77'")
    db.apply_policy(shop_policy(orders={**ORDERS, "amazon": amazon}))
    for order in (7, 8):
        add_order(db, order, shipped="5 days")
    update(db, "UPDATE shop.orders SET customer_id = NULL")
    assert db.sql("SELECT order_key FROM amazon_pii.order_state") == []
    update(db, change)
    assert db.sql("SELECT order_key FROM amazon_pii.order_state") == [('["7"]',)]


def test_a_column_that_a_changed_policy_reads_is_seen_by_sessions_that_are_there(shop):
    for order in (7, 8):
        add_order(shop, order, shipped="5 days", channel="web")
    update(shop, "UPDATE shop.orders SET total = 1")
    shop.apply_policy(shop_policy(orders={**ORDERS, "amazon": "total = 77"}))
    update(shop, "UPDATE shop.orders SET total = 77 WHERE id = 7")
    assert shop.sql("SELECT order_key FROM amazon_pii.order_state") == [('["7"]',)]


def test_columns_that_come_and_go_do_not_shift_what_is_seen(shop):
    add_order(shop, 7, shipped="5 days", channel="web")
    update(shop, "UPDATE shop.orders SET total = 1")
    update(shop, "ALTER TABLE shop.orders DROP COLUMN total; ALTER TABLE shop.orders ADD COLUMN extra text; "
                 "ALTER TABLE shop.orders ALTER COLUMN channel TYPE varchar(40)")
    update(shop, "UPDATE shop.orders SET extra = 'x'")
    assert order_value(shop, 7) is None
    update(shop, "UPDATE shop.orders SET channel = 'amazon'")
    assert order_value(shop, 7) == "scheduled"


PARTS = """
CREATE TABLE shop.parts (day date NOT NULL, id bigint NOT NULL, total int DEFAULT 0, channel text, sent timestamptz, note text,
    PRIMARY KEY (day, id)) PARTITION BY RANGE (day);
CREATE TABLE shop.parts_1 PARTITION OF shop.parts FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE TABLE shop.parts_2 (gone int, note text, sent timestamptz, channel text, id bigint NOT NULL, day date NOT NULL, total int DEFAULT 0);
ALTER TABLE shop.parts_2 DROP COLUMN gone;
ALTER TABLE shop.parts ATTACH PARTITION shop.parts_2 FOR VALUES FROM ('2021-01-01') TO ('2022-01-01');
INSERT INTO shop.parts VALUES ('2020-02-02', 1, 0, 'web', now(), 'Note1'), ('2021-02-02', 2, 0, 'web', now(), 'Note2'),
                              ('2021-02-02', 3, 0, 'web', now(), 'Note3');
"""
PARTED = {
    "through the parent": ("UPDATE shop.parts SET channel = 'amazon' WHERE id = 2", '["2021-02-02","2"]'),
    "in a partition": ("UPDATE shop.parts_2 SET channel = 'amazon' WHERE id = 2", '["2021-02-02","2"]'),
    "with a move": ("UPDATE shop.parts SET channel = 'amazon', day = '2021-03-03' WHERE id = 1", '["2021-03-03","1"]'),
    "with a move that another trigger prevents": (
        "CREATE FUNCTION shop.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.id = 1 THEN RETURN NULL; END IF; RETURN NEW; END $$; "
        "CREATE TRIGGER no BEFORE INSERT ON shop.parts_2 FOR EACH ROW EXECUTE FUNCTION shop.no(); "
        "UPDATE shop.parts SET total = 1, channel = CASE WHEN id = 2 THEN 'amazon' ELSE channel END, "
        "day = CASE WHEN id = 1 THEN '2021-03-03' ELSE day END", '["2021-02-02","2"]'),
}


@pytest.mark.parametrize("change", PARTED)
def test_partitions_of_another_shape_are_seen(db, change):
    open_shop(db)
    update(db, PARTS)
    db.apply_policy({"policy": "shop", "enabled": True, "orders": {
        "table": "shop.parts", "amazon": "channel = 'amazon'", "number": "id::text", "anchor": "sent", "redact": ["note"]}})
    update(db, "UPDATE shop.parts SET total = 1; UPDATE shop.parts_2 SET total = 1")
    assert db.sql("SELECT order_key FROM amazon_pii.order_state") == []
    statement, key = PARTED[change]
    update(db, statement)
    assert db.sql("SELECT order_key FROM amazon_pii.order_state") == [(key,)]


def test_a_long_value_that_comes_back_is_redacted_again(shop):
    """Stored out of line: what is compared is not the value."""
    add_order(shop, 7)
    assert run_cycle(shop)["redacted"] == 1
    update(shop, "UPDATE shop.orders SET gift_message = (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 1000) AS i)")
    assert run_cycle(shop)["redacted"] == 1
    assert shop.value("SELECT gift_message FROM shop.orders") == PLACEHOLDER


def test_a_deferred_cascade_into_a_link_is_seen(shop):
    """Two foreign keys write to one table at the end of one statement."""
    update(shop, "ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey; "
                 "ALTER TABLE shop.addresses ADD tag bigint; ALTER TABLE shop.addresses ADD FOREIGN KEY (order_id) REFERENCES shop.orders "
                 "ON UPDATE CASCADE; ALTER TABLE shop.addresses ADD CONSTRAINT z FOREIGN KEY (tag) REFERENCES shop.orders ON UPDATE CASCADE")
    add_order(shop, 7)
    add_order(shop, 8, shipped="5 days", channel="web")
    update(shop, "UPDATE shop.addresses SET tag = 7")
    assert run_cycle(shop)["redacted"] == 1
    update(shop, "UPDATE shop.orders SET id = 70 WHERE id = 7")
    assert order_value(shop, 70) == "redacted" and order_value(shop, 7) is None


def test_the_guard_lets_pass_what_is_none_of_its_business(shop):
    add_order(shop, 7)
    run_cycle(shop)
    assert retrieve(shop, number(7))
    update(shop, "UPDATE shop.orders SET total = total + 1")
    with refused("55000", "read-only"):
        update(shop, "UPDATE shop.orders SET gift_message = 'other'")
    assert shop.sql("SELECT gift_message, total FROM shop.orders") == [("Gift7", shop.value("SELECT 11.10::numeric"))]


# Rows that come to orders that were there before

@pytest.mark.parametrize("chosen", [range(1, 2001), range(5, 3000, 3), [*range(3000, 0, -2), *range(3000, 0, -2)]], ids=["first", "third", "second"])
def test_many_late_rows_reach_the_orders_that_are_done_and_no_others(shop, chosen):
    """Their orders are redacted, young, or not Amazon's; their keys are of several lengths."""
    fill(shop, 1500)
    fill(shop, 2500, first=1501, age="5 days")
    fill(shop, 3000, first=2501, channel="web")
    assert run_cycle(shop)["redacted"] == 1500
    shop.sql("INSERT INTO shop.addresses (order_id, name) SELECT i, 'Late' || i FROM unnest(%s) AS i", [list(chosen)], "shop_owner")
    late = {order for order in chosen if order <= 1500}
    assert {int(k) for (k,) in shop.sql("SELECT (order_key::jsonb)->>0 FROM amazon_pii.order_state WHERE status = 'redacted' "
                                        "AND next_due_at <= now()")} == late
    run_cycle(shop)
    assert {order for (order,) in shop.sql("SELECT order_id FROM shop.addresses WHERE name = %s GROUP BY order_id HAVING count(*) > 1",
                                           [PLACEHOLDER])} == late
    assert {order for (order,) in shop.sql("SELECT order_id FROM shop.addresses WHERE name LIKE 'Late%'")} == set(chosen) - late


@pytest.mark.parametrize("known", [[], [1, 701, 1500], [702]], ids=["none is known", "some are known", "one is known"])
def test_many_orders_that_are_imported_again_are_flagged_once(shop, known):
    """Deleted and copied in again, as some imports do; one that is redacted comes with its PII."""
    for order in known:
        add_order(shop, order)
    assert run_cycle(shop)["redacted"] == len(known)
    update(shop, "DELETE FROM shop.orders")
    run_cycle(shop)
    copy(shop, "shop.orders", "id, external_no, channel, shipped_at, gift_message",
         [f"{i}\t{number(i)}\tamazon\t2024-01-01\tGift{i}" for i in range(1, 1501)])
    assert shop.sql("SELECT status, count(*) FROM amazon_pii.order_state GROUP BY status") == [("scheduled", 1500)]
    assert shop.value("SELECT sum(order_count) FROM amazon_pii.news WHERE status = 'flagged'") == 1500
    assert run_cycle(shop)["redacted"] == 1500
    assert shop.sql("SELECT DISTINCT gift_message FROM shop.orders") == [(PLACEHOLDER,)]


FOREIGN_KEYS = {
    "none": "",
    "one that was not checked": "ADD FOREIGN KEY (customer_id) REFERENCES shop.customers NOT VALID",
    "one that is switched off": "ADD FOREIGN KEY (customer_id) REFERENCES shop.customers NOT VALID; "
                                "UPDATE pg_constraint SET convalidated = true WHERE conrelid = 'shop.orders'::regclass; "
                                "ALTER TABLE shop.customers DISABLE TRIGGER ALL; ALTER TABLE shop.customers ENABLE TRIGGER USER",
}


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_a_customer_that_comes_after_its_order_is_redacted(shop, key):
    """Only a foreign key that holds at every moment proves that nobody refers to a new row."""
    update(shop, "ALTER TABLE shop.orders DROP CONSTRAINT orders_customer_id_fkey")
    add_order(shop, 7, customer=5)
    if FOREIGN_KEYS[key]:
        shop.sql(f"ALTER TABLE shop.orders {FOREIGN_KEYS[key]}")
    assert run_cycle(shop)["redacted"] == 1
    update(shop, "INSERT INTO shop.customers (id, first_name) VALUES (5, 'Late')")
    run_cycle(shop)
    assert shop.value("SELECT first_name FROM shop.customers") == PLACEHOLDER


def test_a_customer_that_comes_with_its_order_is_redacted(shop):
    """The foreign key is checked at the end of the transaction."""
    update(shop, "ALTER TABLE shop.orders ALTER CONSTRAINT orders_customer_id_fkey DEFERRABLE")
    add_customer(shop, 5)
    add_order(shop, 7, customer=5)
    assert run_cycle(shop)["redacted"] == 1
    update(shop, "BEGIN; SET CONSTRAINTS ALL DEFERRED; DELETE FROM shop.customers; "
                 "INSERT INTO shop.customers (id, first_name) VALUES (5, 'Late'); COMMIT")
    run_cycle(shop)
    assert shop.value("SELECT first_name FROM shop.customers") == PLACEHOLDER


# What it costs

@pytest.fixture(scope="module")
def counting():
    if not (Path(pg_config("pkglibdir")) / "pg_stat_statements.so").exists():
        pytest.skip("this server has no pg_stat_statements")
    with Cluster(conf=["autovacuum = off", "shared_preload_libraries = 'pg_stat_statements'", "pg_stat_statements.track = all"]) as server:
        prepare(server)
        yield server


@pytest.fixture
def counted(counting):
    db = open_shop(new_database(counting))
    db.sql("CREATE EXTENSION pg_stat_statements")
    db.apply_policy(shop_policy())
    yield db
    db.drop()


STATEMENTS = "SELECT COALESCE(sum(calls), 0)::int FROM pg_stat_statements AS s JOIN pg_database AS d ON d.oid = s.dbid " \
             "WHERE d.datname = current_database() AND NOT s.toplevel AND s.query NOT LIKE '%%FOR KEY SHARE%%'"


def statements(db, run):
    """How many statements ran inside of this one, foreign keys' own checks aside."""
    db.sql("SELECT pg_stat_statements_reset()")
    run()
    return db.value(STATEMENTS)


@pytest.mark.parametrize("rows", ["id = 7", "id = 8", "id < 100", "true"])
@pytest.mark.parametrize("change", ["total = total + 1", "total = 1, channel = channel, external_no = external_no, gift_message = gift_message"])
def test_an_update_of_what_no_policy_reads_costs_no_statement(counted, rows, change):
    fill(counted, 1500, age="5 days")
    update(counted, "UPDATE shop.orders SET total = total + 1")
    assert statements(counted, lambda: update(counted, f"UPDATE shop.orders SET {change} WHERE {rows}")) == 0
    assert statements(counted, lambda: update(counted, "UPDATE shop.orders SET shop_note = 'x' WHERE id = 7")) > 0


ANYTHING = "UPDATE shop.orders SET total = total + 1 WHERE id = 7"


CHANGED = ["ALTER TABLE shop.addresses ADD COLUMN extra text", "ALTER TABLE shop.addresses ALTER COLUMN city TYPE varchar(400)",
           "ALTER TABLE shop.customers RENAME TO clients", "CREATE UNIQUE INDEX ON shop.customers (id, phone)",
           # The session looks between two changes of one transaction.
           f"BEGIN; ALTER TABLE shop.addresses RENAME city TO town; {ANYTHING}; ALTER TABLE shop.addresses RENAME town TO place; COMMIT"]


@pytest.mark.parametrize("changed", CHANGED)
def test_a_table_that_is_only_analyzed_is_not_looked_at_anew(counted, changed):
    """Breaks when each session reads the policy and its tables again whenever autovacuum was there, or when it does not see a change."""
    fill(counted, 30, age="5 days")
    update(counted, ANYTHING)
    fill(counted, 3000, first=31, age="5 days")
    counted.sql("VACUUM (ANALYZE) shop.orders, shop.addresses, shop.customers")
    assert statements(counted, lambda: update(counted, ANYTHING)) == 1
    assert statements(counted, lambda: update(counted, ANYTHING)) == 0
    update(counted, changed)
    assert statements(counted, lambda: update(counted, ANYTHING)) > 10


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_a_policy_that_changes_under_a_transaction_is_known_after_it(shop, isolation):
    """Breaks when a session takes what its transaction sees for what the server said: the old policy, for good."""
    add_order(shop, 7, shipped="5 days", channel="web")
    add_order(shop, 8, shipped="5 days", channel="web")
    update(shop, "UPDATE shop.orders SET shop_note = 'a'")
    with shop.session("shop_owner").cursor() as cursor:
        cursor.execute(f"BEGIN ISOLATION LEVEL {isolation}; SELECT 1")
        shop.apply_policy(shop_policy(orders={**ORDERS, "amazon": "total = 77"}))
        cursor.execute("UPDATE shop.orders SET total = 5 WHERE id = 8")
        cursor.execute("COMMIT")
    shop.sql("VACUUM (ANALYZE) shop.orders")
    update(shop, "UPDATE shop.orders SET total = 77 WHERE id = 7")
    assert shop.sql("SELECT order_key FROM amazon_pii.order_state") == [('["7"]',)]


IMPORTS = {
    "orders": lambda db, ids: copy(db, "shop.orders", "id, external_no, channel, shipped_at, total",
                                   (f"{i}\t{number(i)}\t{'amazon' if i % 2 else 'web'}\t2024-01-01\t1" for i in ids)),
    "addresses": lambda db, ids: copy(db, "shop.addresses", "order_id, name", (f"{i % 50 + 1}\tName{i}" for i in ids)),
    "customers": lambda db, ids: copy(db, "shop.customers", "id, first_name", (f"{i}\tFirst{i}" for i in ids)),
}


@pytest.mark.parametrize("table", IMPORTS)
def test_an_import_runs_as_many_statements_whatever_its_size(counted, table):
    if table != "orders":
        fill(counted, 60, age="5 days")
    run = IMPORTS[table]
    run(counted, range(1000, 1010))
    small = statements(counted, lambda: run(counted, range(2000, 2010)))
    assert statements(counted, lambda: run(counted, range(3000, 3900))) == small <= 3


def test_a_large_import_runs_as_many_statements_whatever_its_size(counted):
    """Keys of several lengths; some orders are done, some are due soon."""
    fill(counted, 20)
    fill(counted, 40, first=21, age="26 days")
    assert run_cycle(counted)["redacted"] == 20
    counted.sql("UPDATE amazon_pii.order_state SET next_due_at = NULL WHERE status = 'redacted'")
    for table in ("orders", "addresses"):
        IMPORTS[table](counted, range(90_000, 90_010))
    found = {}
    for count in (3000, 12_000):
        first = 100_000 + count
        found[count] = [
            statements(counted, lambda: IMPORTS["orders"](counted, range(first, first + count))),
            statements(counted, lambda: copy(counted, "shop.addresses", "order_id, name",
                                             (f"{i}\tName{i}" for i in [*range(1, 41), *range(first, first + count)])))]
        counted.sql("UPDATE amazon_pii.order_state SET next_due_at = NULL WHERE status = 'redacted'")
    assert found[3000] == found[12_000]
    assert found[3000][0] <= 4 and found[3000][1] <= 3, found


def test_an_update_that_leaves_keys_alone_is_not_searched_for_new_keys(counted):
    fill(counted, 1500, age="5 days")
    change = "UPDATE shop.orders SET gift_message = 'x' || id WHERE id <= 900"
    update(counted, change)
    assert statements(counted, lambda: update(counted, change.replace("'x'", "'y'"))) <= 4


def test_numbers_of_either_sign_are_found(shop):
    """Breaks when the first and the last of some keys are taken for the least and the greatest text."""
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at) "
             "SELECT i, 'N' || i, 'amazon', now() - '40 days'::interval FROM generate_series(-12000, 12000, 3) AS i", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 8001
    update(shop, "INSERT INTO shop.addresses (order_id, name) SELECT id, 'Late' FROM shop.orders WHERE id BETWEEN -11000 AND 11000")
    assert shop.sql("SELECT min(((order_key::jsonb)->>0)::int), max(((order_key::jsonb)->>0)::int), count(*) "
                    "FROM amazon_pii.order_state WHERE next_due_at <= now()") == [(-10998, 10998, 7333)]


# Plans that a session keeps

ANEW = "DROP EXTENSION amazon_pii CASCADE; DROP SCHEMA amazon_pii_archive CASCADE; CREATE EXTENSION amazon_pii"
EVENTS = {
    "the extension is made anew": ("postgres", ANEW),
    "an index is made anew": ("postgres", "REINDEX TABLE amazon_pii.order_state"),
    "a table of ours is written anew": ("postgres", "VACUUM FULL amazon_pii.order_state"),
    "a table of ours gets a column": ("postgres", "ALTER TABLE amazon_pii.order_state ADD COLUMN later int DEFAULT 7"),
    "the extension's tables change hands": (
        "postgres", "ALTER TABLE amazon_pii.order_state OWNER TO other_owner; ALTER TABLE amazon_pii.order_state OWNER TO postgres"),
    "the session forgets its plans": ("shop_owner", "DISCARD ALL"),
    "the session hides operators": (
        "shop_owner", "CREATE SCHEMA mine; CREATE FUNCTION mine.no(text, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'; "
                      "CREATE OPERATOR mine.= (FUNCTION = mine.no, LEFTARG = text, RIGHTARG = text); SET search_path = mine, pg_catalog"),
    "the session plans otherwise": (
        "shop_owner", "SET plan_cache_mode = force_custom_plan; SET enable_indexscan = off; SET enable_bitmapscan = off"),
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_session_that_has_written_before_flags_and_finds_all_the_same(shop, event):
    """Breaks when a plan outlives what it was made for."""
    shop.sql("GRANT CREATE ON DATABASE \"%s\" TO shop_owner" % shop.name)
    add_order(shop, 7)
    add_order(shop, 8, shipped="26 days")
    assert run_cycle(shop)["redacted"] == 1
    late = "INSERT INTO shop.addresses (order_id, name) VALUES (7, 'Late'), (8, 'Late')"
    update(shop, late)
    run_cycle(shop)
    user, statement = EVENTS[event]
    shop.sql(statement, user=user)
    if statement == ANEW:
        shop.apply_policy(shop_policy())
        run_cycle(shop)
        assert order_value(shop, 7) == "redacted"
    update(shop, "INSERT INTO shop.orders (id, external_no, channel, shipped_at) VALUES (9, '9', 'amazon', now())")
    assert order_value(shop, 9) == "scheduled"
    update(shop, late)
    assert run_cycle(shop)["redacted"] == 1
    assert shop.sql("SELECT DISTINCT name FROM shop.addresses WHERE order_id = 7") == [(PLACEHOLDER,)]
