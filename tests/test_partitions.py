"""Orders in partitions: who shares a row is looked for in all of them. Customers go exactly with the last of their orders, whichever
way that is found out."""
import pytest
from cluster import Cluster
from conftest import new_database, prepare
from support import PLACEHOLDER, run_cycle

BATCH = 100
PARTS = 6
SCHEMA = f"""
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE TABLE shop.customers (id bigint PRIMARY KEY, name text, phone text);
CREATE TABLE shop.orders (day date NOT NULL, id bigint NOT NULL, no text NOT NULL, channel text NOT NULL,
    customer_id bigint REFERENCES shop.customers, sent timestamptz, note text, PRIMARY KEY (day, id)) PARTITION BY RANGE (day);
CREATE INDEX ON shop.orders (customer_id);
DO $$ BEGIN FOR i IN 1..{PARTS} LOOP
    EXECUTE format('CREATE TABLE shop.orders_%s PARTITION OF shop.orders FOR VALUES FROM (%L) TO (%L)', i,
                   '2020-01-01'::date + 10 * (i - 1), '2020-01-01'::date + 10 * i);
END LOOP; END $$;
"""
POLICY = {
    "policy": "shop", "enabled": True,
    "orders": {"table": "shop.orders", "number": "no", "amazon": "channel = 'amazon'", "anchor": "sent", "redact": ["note"]},
    "linked": [{"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["name", "phone"]}],
}
# Orders `first` to `last`, of one customer each unless it is given, spread over the partitions; due in the order of their numbers.
FILL = """
INSERT INTO shop.customers SELECT i, 'Name ' || i, '+49 ' || i FROM generate_series({first}, {last}) AS i ON CONFLICT DO NOTHING;
INSERT INTO shop.orders SELECT '2020-01-01'::date + (i % {days})::int, i, 'N' || i, '{channel}', {customer}, now() - '{age}'::interval + i * '1 ms'::interval,
    'Note ' || i FROM generate_series({first}, {last}) AS i;
"""


@pytest.fixture(scope="module")
def server():
    with Cluster(conf=["autovacuum = off", f"amazon_pii.batch_size = {BATCH}", "amazon_pii.batch_time = 1h"]) as server:
        prepare(server)
        yield server


@pytest.fixture
def db(server):
    database = new_database(server)
    database.psql(SCHEMA)
    yield database
    database.drop()


def fill(db, last, first=1, channel="amazon", age="40 days", customer="i", days=10 * PARTS):
    db.psql("SET ROLE shop_owner;" + FILL.format(first=first, last=last, channel=channel, age=age, customer=customer, days=days))


def add_order(db, order, customer, day=33, channel="web"):
    db.sql("INSERT INTO shop.orders VALUES ('2020-01-01'::date + %s, %s, 'W' || %s, %s, %s, now(), 'Alive')", [day, order, order, channel, customer],
           user="shop_owner")


def last_orders_go(db):
    """What kept rows alive becomes due."""
    db.sql("UPDATE shop.orders SET channel = 'amazon', sent = now() - '40 days'::interval WHERE channel = 'web'", user="shop_owner")
    run_cycle(db)


def originals(db):
    """The customers that are as they were; all others must be redacted as a whole."""
    rows = db.sql("SELECT id, name, phone FROM shop.customers")
    for key, name, phone in rows:
        assert (name, phone) in ((f"Name {key}", f"+49 {key}"), (PLACEHOLDER, PLACEHOLDER)), f"customer {key}: {name}, {phone}"
    return {key for key, name, _ in rows if name != PLACEHOLDER}


def redacted(db):
    return db.value("SELECT count(*) FROM shop.orders WHERE note = %s", [PLACEHOLDER])


def waiting(db):
    return db.value("SELECT count(*) FROM amazon_pii.records WHERE status = 'waiting'")


# After batches of 16 and 64, in which nobody needs a customer, the look before the lock is spared.
LATE = range(100, 351, 10)


@pytest.mark.parametrize("kept", [[90], [150, 260], LATE], ids=["few", "some", "many"])
def test_a_customer_lives_as_long_as_an_order_in_another_partition_needs_it(db, kept):
    """Breaks when either look leaves out a partition, or the look is spared after the lock instead of before it."""
    fill(db, 400)
    db.apply_policy(POLICY)
    for customer in kept:
        add_order(db, 1000 + customer, customer)
    assert run_cycle(db)["redacted"] == 400
    assert redacted(db) == 400
    assert originals(db) == set(kept)
    assert waiting(db) == len(kept)
    last_orders_go(db)
    assert originals(db) == set() and waiting(db) == 0


# How often the cycle's session has looked into one partition for users of customers, noted by each batch.
NOTES = """
CREATE TABLE public.batch_note (n bigint GENERATED ALWAYS AS IDENTITY, scans bigint);
CREATE FUNCTION public.note_batch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.batch_note (scans) SELECT pg_stat_get_xact_numscans('shop.orders_1_customer_id_idx'::regclass)
     WHERE EXISTS (SELECT FROM new_rows WHERE action = 'redact');
    RETURN NULL;
END $$;
CREATE TRIGGER note_batch AFTER INSERT ON amazon_pii.audit_entry REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION public.note_batch();
"""


def test_partitions_are_looked_through_once_while_nobody_needs_the_rows(db):
    """Breaks when the look before the lock is not spared, or is spared although many rows stay."""
    fill(db, 380)
    db.apply_policy(POLICY)
    db.sql(NOTES)
    for customer in range(181, 281):
        add_order(db, 1000 + customer, customer)
    run_cycle(db)
    notes = [n for n, in db.sql("SELECT scans FROM public.batch_note ORDER BY n")]
    # The first 16 rows were looked up twice; 64 and 100 once, 100 that turn out to be needed once, and the next 100 twice.
    assert notes[0] >= 32 and [b - a for a, b in zip(notes, notes[1:])] == [64, 100, 100, 200]
    assert originals(db) == set(range(181, 281))


def test_a_row_that_its_user_has_locked_delays_no_order(db):
    """Breaks when an order waits for the lock of a row that another order keeps anyway."""
    fill(db, 400)
    db.apply_policy(POLICY)
    add_order(db, 1000, 300)
    with db.connect("shop_owner", autocommit=False) as session, session.cursor() as cursor:
        # An order that is being imported holds its customer's key; the one of another customer is unknown to everybody yet.
        for order, customer in ((1001, 300), (1002, 310)):
            cursor.execute("INSERT INTO shop.orders VALUES ('2020-01-05', %s, 'X', 'web', %s, now(), 'Alive')", [order, customer])
        assert run_cycle(db)["redacted"] == 399
        assert originals(db) == {300, 310} and waiting(db) == 1
    session.close()
    db.sql("UPDATE amazon_pii.order_state SET next_attempt_at = now() WHERE next_attempt_at > now()")
    assert run_cycle(db)["redacted"] == 1
    assert originals(db) == {300, 310} and waiting(db) == 2


def test_a_customer_with_more_orders_than_are_read_at_once(db):
    """Breaks when what is cut off counts as nobody."""
    fill(db, 99)
    fill(db, 7000, 100, customer="50")
    db.apply_policy(POLICY)
    # Of the same batch; what is in the last partition is read last.
    for customer in (30, 50, 60):
        add_order(db, 10_000 + customer, customer, day=59)
    assert run_cycle(db)["redacted"] == 7000
    assert originals(db) & set(range(1, 100)) == {30, 50, 60}
    last_orders_go(db)
    assert not originals(db) & set(range(1, 100))


def test_two_orders_of_one_customer_in_one_batch_and_in_two(db):
    # Customers 1 to 50 have orders in the first batches and in the last.
    fill(db, 350)
    fill(db, 400, 351, customer="i - 350")
    db.apply_policy(POLICY)
    assert run_cycle(db)["redacted"] == 400
    assert originals(db) == set(range(351, 401)), "nobody uses these"
    assert waiting(db) == 0


def test_partitions_that_come_and_go_while_a_session_keeps_its_plans(db):
    """Breaks when a plan that is kept knows only the partitions that were there when it was made."""
    fill(db, 200)
    db.apply_policy(POLICY)
    session = db.session("pii_admin")
    assert run_cycle(db)["redacted"] == 200
    db.psql("""SET ROLE shop_owner;
        CREATE TABLE shop.orders_new (note text, id bigint NOT NULL, gone int, no text NOT NULL, channel text NOT NULL, customer_id bigint,
            sent timestamptz, day date NOT NULL);
        ALTER TABLE shop.orders_new DROP COLUMN gone;
        ALTER TABLE shop.orders ATTACH PARTITION shop.orders_new FOR VALUES FROM ('2021-01-01') TO ('2022-01-01');
        ALTER TABLE shop.orders DETACH PARTITION shop.orders_6; DROP TABLE shop.orders_6""")
    db.sql("INSERT INTO shop.orders SELECT '2021-01-01'::date + i, 1000 + i, 'Y' || i, 'amazon', i, now() - '40 days'::interval, 'Note' "
           "FROM generate_series(1, 150) AS i", user="shop_owner")
    db.sql("UPDATE shop.customers SET name = 'Name ' || id, phone = '+49 ' || id WHERE id <= 150", user="shop_owner")
    run_cycle(db)
    assert db.session("pii_admin") is session, "one session"
    assert db.value("SELECT count(*) FROM shop.orders WHERE note <> %s", [PLACEHOLDER]) == 0
    assert originals(db) == set()
