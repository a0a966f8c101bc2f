"""Plans that cannot go wrong, without a clock: what a cycle reads is counted. Nothing here is ever analyzed unless a test
does it, as after a fresh installation without autovacuum; the state and the archive are empty when the cycle begins."""
from pathlib import Path
from statistics import mean

import pytest
from cluster import Cluster, pg_config, wait_until
from conftest import new_database, prepare
from support import add_order, fill, open_shop, order_number, order_value, retrieve, run_cycle, shop_policy

DUE, STORED = 1200, 20_000
# What grows with the number of orders.
LARGE = ("shop.orders", "shop.addresses", "shop.customers", "shop.invoices", "shop.invoice_lines", "amazon_pii.order_state",
         "amazon_pii.record_state", "amazon_pii.audit_entry", "amazon_pii_archive.document", "amazon_pii_archive.data_key")


@pytest.fixture(scope="module")
def unanalyzed():
    """A server without autovacuum; with pg_stat_statements, where there is one."""
    conf = ["autovacuum = off", "amazon_pii.workers = 1", "amazon_pii.batch_time = '1h'"]
    if (Path(pg_config("pkglibdir")) / "pg_stat_statements.so").exists():
        conf += ["shared_preload_libraries = 'pg_stat_statements'", "pg_stat_statements.track = all",
                 "pg_stat_statements.track_planning = on"]
    with Cluster(conf=conf) as server:
        prepare(server)
        yield server


@pytest.fixture
def shop(unanalyzed):
    """The policy, and no order yet: the sweep of the day is done."""
    db = open_shop(new_database(unanalyzed))
    db.apply_policy(shop_policy())
    run_cycle(db)
    yield db
    db.drop()


def import_orders(db, due=DUE):
    """Two orders a customer; the due ones are a small part, flagged by the triggers."""
    fill(db, due, share=2)
    fill(db, STORED, first=due + 1, age="5 days", share=2)


def scans(db):
    """{table: sequential scans}, when every session has ended and told its share."""
    db.cluster.close_connections()
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
    wait_until(lambda: db.cluster.sql(others, [db.name])[0][0] == 0)
    return dict(db.sql("SELECT schemaname || '.' || relname, seq_scan FROM pg_stat_user_tables WHERE schemaname || '.' || relname = ANY (%s)",
                       [list(LARGE)]))


@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
def test_nothing_is_read_from_end_to_end(shop, analyzed):
    import_orders(shop, due=200)
    if analyzed:
        shop.sql("ANALYZE")
    before = scans(shop)
    assert set(before) == set(LARGE)
    assert run_cycle(shop)["redacted"] == 200
    assert scans(shop) == before, "a cycle"
    assert run_cycle(shop)["redacted"] == 0
    assert scans(shop) == before, "a cycle with nothing due"
    assert retrieve(shop, order_number(7))
    assert scans(shop) == before, "a retrieval"


# A note for each batch, taken where it writes its entries into the audit log: how many statements have ended until now, on
# all levels, and how many buffers they touched. What the notes themselves cost is left out.
NOTES = """
CREATE EXTENSION pg_stat_statements;
CREATE TABLE public.batch_note (n bigint GENERATED ALWAYS AS IDENTITY, orders bigint, statements bigint, buffers bigint);
CREATE FUNCTION public.note_batch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.batch_note (orders, statements, buffers)
    SELECT r.orders, s.statements, s.buffers
      FROM (SELECT sum(CASE WHEN lines IS NULL THEN 1 ELSE jsonb_array_length(lines::jsonb) END) AS orders
              FROM new_rows WHERE action = 'redact') AS r,
           (SELECT sum(calls) AS statements, sum(shared_blks_hit + shared_blks_read + local_blks_hit + temp_blks_read) AS buffers
              FROM public.pg_stat_statements AS p JOIN pg_database AS d ON d.oid = p.dbid
             WHERE d.datname = current_database() AND query NOT LIKE '%batch_note%') AS s
     WHERE r.orders > 0;
    RETURN NULL;
END $$;
CREATE TRIGGER note_batch AFTER INSERT ON amazon_pii.audit_entry REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION public.note_batch();
"""


def batches(db, size):
    """[(statements, buffers)] of each batch of `size` orders that followed one of that size."""
    db.sql("TRUNCATE public.batch_note")
    db.cluster.configure(f"amazon_pii.batch_size = {size}")
    db.cluster.reload()
    wait_until(lambda: db.cluster.sql("SHOW amazon_pii.batch_size") == [(str(size),)])
    db.cluster.close_connections()
    assert run_cycle(db)["redacted"] == DUE
    notes = db.sql("SELECT orders, statements, buffers FROM public.batch_note ORDER BY n")
    assert sum(orders for orders, _, _ in notes) == DUE
    return [(b[1] - a[1], b[2] - a[2]) for a, b in zip(notes, notes[1:]) if a[0] == b[0] == size]


def test_a_batch_costs_the_same_whenever_it_comes_and_whatever_its_size(shop):
    """A plan that was chosen while the tables were empty must not be a bad one when they are full."""
    shop.need_contrib("pg_stat_statements")
    import_orders(shop)
    shop.sql(NOTES)
    found = batches(shop, 10)
    assert len(found) > 110
    first, last = (mean(buffers for _, buffers in part) for part in (found[:10], found[90:100]))
    # Indexes grow a level meanwhile.
    assert last < 1.3 * first, f"a batch touched {first:.0f} buffers at the beginning, then {last:.0f}"
    assert max(buffers for _, buffers in found) < 10 * 300, "buffers touched by a batch of 10 orders"
    statements = {count for count, _ in found}
    assert len(statements) == 1, f"the number of statements changes from batch to batch: {statements}"

    # One order a customer: how large the first batches are depends on time, and a pair that is split between two takes a look more.
    fill(shop, STORED + DUE, first=STORED + 1)
    larger = batches(shop, 60)
    print(first, last, statements, max(buffers for _, buffers in larger))
    assert {count for count, _ in larger} == statements, "a larger batch runs other statements"
    # What every batch costs is shared by more orders.
    assert max(buffers for _, buffers in larger) < 60 * 260, "buffers touched by a batch of 60 orders"


def cost(db, call):
    """(statements, buffers) of a call, on all levels and in all processes."""
    spent = """SELECT sum(calls), sum(shared_blks_hit + shared_blks_read + local_blks_hit + temp_blks_read) FROM public.pg_stat_statements AS p
        JOIN pg_database AS d ON d.oid = p.dbid WHERE d.datname = current_database() AND toplevel IS FALSE AND query NOT LIKE '%%pg_stat_statements%%'"""
    db.sql("SELECT public.pg_stat_statements_reset()")
    call()
    return tuple(int(n or 0) for n in db.sql(spent)[0])


def test_a_cycle_with_nothing_due_costs_the_same_whatever_there_is(shop):
    """Breaks when it makes the policy ready, or reads more the more orders there are."""
    shop.need_contrib("pg_stat_statements")
    shop.sql("CREATE EXTENSION pg_stat_statements")
    found = []
    for first, last in ((1, 300), (301, STORED)):
        fill(shop, last, first=first, age="5 days", share=2)
        run_cycle(shop)
        run_cycle(shop)
        found.append(cost(shop, lambda: run_cycle(shop)))
    print(found)
    (few, small), (many, large) = found
    assert few == many <= 6, "statements"
    assert large <= small + 10, "an index is a level deeper"
    assert large < 150


def test_a_retrieval_costs_the_same_whatever_is_archived(shop):
    """Breaks when one makes the policy ready anew, or reads more the more orders there are."""
    shop.need_contrib("pg_stat_statements")
    shop.sql("CREATE EXTENSION pg_stat_statements")
    found = []
    for first, last in ((1, 100), (101, 3000)):
        fill(shop, last, first=first)
        run_cycle(shop)
        retrieve(shop, order_number(last))
        found.append(cost(shop, lambda: retrieve(shop, order_number(last - 2))))
    print(found)
    (few, small), (many, large) = found
    assert few == many < 60, "statements"
    assert large < 1.3 * small and large < 700, "buffers"


def test_verify_costs_the_same_for_each_order(shop):
    """Breaks when it reads the archive or a table more often the more orders there are, or begins a page at the start."""
    shop.need_contrib("pg_stat_statements")
    shop.sql("CREATE EXTENSION pg_stat_statements")
    found = []
    for first, last in ((1, 1000), (1001, 4000)):
        fill(shop, last, first=first)
        run_cycle(shop)
        # Something to be found, so that the archive is read twice.
        shop.sql("CREATE TABLE IF NOT EXISTS shop.copies (v text); INSERT INTO shop.copies SELECT 'Street ' || i FROM generate_series(%s, %s) AS i", [first, last])
        shop.sql("VACUUM shop.orders, shop.addresses, shop.customers, shop.invoices, shop.invoice_lines, amazon_pii.order_state")
        rows = []
        found.append(cost(shop, lambda: rows.extend(shop.sql("SELECT * FROM amazon_pii.verify('shop', 'schema')", user="pii_admin"))))
        assert rows == [("shop.copies", "v", "personal data found", last)]
    print(found)
    (few, small), (many, large) = found
    # The archive is read twice, in pages of 500 orders.
    assert few < 110 and many - few <= 2 * 6 * 7, "statements"
    assert large / 4000 < 1.15 * small / 1000 and large / 4000 < 30, "buffers of an order"


# What triggers do with one row, by plans that a session keeps

NEW, DONE_ORDER, SOON_ORDER, YOUNG_ORDER = 90_000, 7, 8, 9
WRITES = {
    "a new order": "INSERT INTO shop.orders (id, external_no, channel, shipped_at) VALUES ({new}, 'N-{new}', 'amazon', now())",
    "an order that comes again": "UPDATE shop.orders SET gift_message = 'Gift {new}' WHERE id = {young}",
    "a late row of a young order": "INSERT INTO shop.addresses (order_id, name) VALUES ({young}, 'Name {new}')",
    "a late row of an order that is due soon": "INSERT INTO shop.addresses (order_id, name) VALUES ({soon}, 'Name {new}')",
    "a late row of a redacted order": "INSERT INTO shop.addresses (order_id, name) VALUES ({done}, 'Name {new}')",
}


def test_a_row_costs_the_same_whatever_there_is_and_when_its_session_began(shop):
    """Breaks when a plan that a session made while nothing was there reads a table or an index from end to end, or when
    statements are planned again for each row. Many records wait for other orders, and none is retrieved."""
    shop.need_contrib("pg_stat_statements")
    shop.sql("CREATE EXTENSION pg_stat_statements")
    names = {"done": DONE_ORDER, "soon": SOON_ORDER, "young": YOUNG_ORDER}

    def write(n):
        for kind, statement in WRITES.items():
            shop.sql(statement.format(new=NEW + n, **names), user="shop_owner")
            # Redacted and touched, again.
            shop.sql("UPDATE amazon_pii.order_state SET next_due_at = NULL WHERE status = 'redacted'")

    add_order(shop, DONE_ORDER)
    assert run_cycle(shop)["redacted"] == 1
    add_order(shop, SOON_ORDER, shipped="26 days")
    add_order(shop, YOUNG_ORDER, shipped="5 days")
    for n in range(3):
        write(n)
    importer = shop.session("shop_owner").info.backend_pid
    small = {kind: None for kind in WRITES}
    large = dict(small)

    def measure(found, n):
        for i, (kind, statement) in enumerate(WRITES.items()):
            found[kind] = cost(shop, lambda: shop.sql(statement.format(new=NEW + 10 * n + i, **names), user="shop_owner"))
            found[kind] += (shop.value("SELECT sum(plans)::int FROM public.pg_stat_statements AS p JOIN pg_database AS d ON d.oid = p.dbid "
                                       "WHERE d.datname = current_database() AND toplevel IS FALSE AND query NOT LIKE '%%pg_stat_statements%%'"),)
            shop.sql("UPDATE amazon_pii.order_state SET next_due_at = NULL WHERE status = 'redacted'")

    measure(small, 1)
    fill(shop, STORED, first=10, age="5 days", share=2)
    shop.sql("INSERT INTO amazon_pii.record_state (policy, order_key, table_name, record_key, status) "
             "SELECT 'shop', jsonb_build_array(i::text)::text, t, jsonb_build_array(i::text)::text, 'waiting' "
             "FROM generate_series(10, %s) AS i, (VALUES ('shop.orders'), ('shop.addresses')) AS v (t)", [STORED])
    measure(large, 2)
    assert shop.session("shop_owner").info.backend_pid == importer
    print(small, large)
    for kind in WRITES:
        assert large[kind][0] == small[kind][0] <= 4, f"{kind}: statements"
        # The owner's expressions.
        assert large[kind][2] == (kind in ("a new order", "an order that comes again")), f"{kind}: plans"
        assert large[kind][1] <= small[kind][1] + 25 < 120, f"{kind}: buffers"
    assert order_value(shop, NEW + 20) == "scheduled"
    assert shop.sql("SELECT count(*) FROM pg_prepared_statements", user="shop_owner") == [(0,)]
