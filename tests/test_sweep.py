"""The sweep: what it leaves at a sum, and what it still finds. Nothing here counts on a clock."""
import pytest
from cluster import MAJOR
from support import add_order, fill, open_shop, order_value, run_cycle, shop_policy, sweep

FAR = {"archive_after": "3000 days", "redact_after": "3001 days", "loosened": "test"}
# Orders that one slice holds when it is new.
SLICE = 10_000


def slices(db):
    """[(upto, orders)] in the order of a pass."""
    known = dict((first, (upto, orders)) for first, upto, orders in
                 db.sql("SELECT first_after, upto, orders FROM amazon_pii.sweep_slice WHERE policy = 'shop'"))
    found, at = [], ""
    while at is not None:
        found.append(known.pop(at))
        at = found[-1][0]
    assert not known, "slices that no pass comes to"
    return found


def unseen(db, statement):
    """Something that no trigger notices."""
    db.sql(f"ALTER TABLE shop.orders DISABLE TRIGGER USER; {statement}; ALTER TABLE shop.orders ENABLE TRIGGER USER", user="shop_owner")


def fresh(db):
    """How many slices were compared order by order since the last call."""
    count = db.value("SELECT count(*) FROM amazon_pii.sweep_slice WHERE compared_at > now() - '1 day'::interval")
    db.sql("UPDATE amazon_pii.sweep_slice SET compared_at = now() - '2 days'::interval")
    return count


@pytest.fixture
def swept(db):
    """Two full slices and the beginning of a third, all known."""
    open_shop(db)
    db.apply_policy(shop_policy(**FAR))
    db.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at) SELECT 10 * i, 'n' || i, 'amazon', now() - i * '1 s'::interval "
           "FROM generate_series(1, %s) AS i", [2 * SLICE + 100], "shop_owner")
    sweep(db)
    assert [orders for _, orders in slices(db)] == [SLICE, SLICE, 100]
    assert fresh(db) == 3
    return db


def test_what_has_not_changed_is_left_at_its_sum(swept):
    """Breaks when a sweep compares orders one by one of which it knows all."""
    assert sweep(swept)["flagged"] == 0
    assert fresh(swept) == 0
    # What a sum leaves out may change.
    unseen(swept, "UPDATE shop.orders SET shop_note = 'new', total = 7")
    assert sweep(swept)["flagged"] == 0
    assert fresh(swept) == 0


@pytest.mark.parametrize("statement, order, column, expected", [
    ("INSERT INTO shop.orders (id, external_no, channel) VALUES (15, 'x', 'amazon')", 15, "status", "flagged"),
    ("UPDATE shop.orders SET channel = 'amazon' WHERE id = 5", 5, "status", "flagged"),
    ("UPDATE shop.orders SET shipped_at = NULL WHERE id = 20", 20, "status", "flagged"),
    ("UPDATE shop.orders SET shipped_at = '2026-01-01 00:00+00' WHERE id = 20", 20, "to_char(anchor_at, 'YYYY-MM-DD')", "2026-01-01"),
    ("UPDATE shop.orders SET external_no = NULL WHERE id = 20", 20, "order_number IS NULL", True),
    ("UPDATE shop.orders SET external_no = 'n' || 5 - id / 10 WHERE id IN (20, 30)", 20, "order_number", "n3"),
])
def test_what_no_trigger_saw_is_found(swept, statement, order, column, expected):
    """Breaks when a sum does not see what the state of an order depends on; when two orders swap something, too."""
    unseen(swept, "INSERT INTO shop.orders (id, external_no, channel) VALUES (5, 'web', 'web')")
    assert order_value(swept, order, column) != expected
    unseen(swept, statement)
    sweep(swept)
    assert order_value(swept, order, column) == expected
    assert fresh(swept) == 1, "the other slices are as they were"
    sweep(swept)
    assert fresh(swept) == 0


@pytest.mark.parametrize("year", [2026, 2099, 2100, 2600])
def test_a_microsecond_is_not_lost(swept, year):
    """Breaks when a sum sees times as numbers that are too coarse for them."""
    for second in ("29.999999", "30", "30.000001", "30.000002"):
        moment = f"{year}-12-31 23:59:{second}+00"
        unseen(swept, f"UPDATE shop.orders SET shipped_at = '{moment}' WHERE id = 20")
        sweep(swept)
        assert order_value(swept, 20, f"anchor_at = '{moment}'")


@pytest.mark.skipif(MAJOR < 15, reason="statistics are told at once since PostgreSQL 15")
def test_slices_that_are_all_known_are_summed_up_together(swept):
    """Breaks when each costs a statement of its own; and when what has changed is not searched for among them."""
    def scans(action):
        def told():
            swept.sql("SELECT pg_stat_force_next_flush()", user="pii_admin")
            return swept.sql("SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relid = 'shop.orders'::regclass")[0]
        before = told()
        action()
        return tuple(a - b for a, b in zip(told(), before))

    swept.session("pii_admin").close()
    assert scans(lambda: sweep(swept)) == (1, 0)
    unseen(swept, "UPDATE shop.orders SET external_no = 'other' WHERE id = 200010")
    # All, the first slice, two that are not what they were, the second, its orders, and what comes after it.
    assert scans(lambda: sweep(swept))[0] == 1
    assert order_value(swept, 200010, "order_number") == "other"
    assert fresh(swept) == 1
    swept.session("pii_admin").close()
    assert scans(lambda: sweep(swept)) == (1, 0)


@pytest.mark.skipif(MAJOR < 15, reason="statistics are told at once since PostgreSQL 15")
def test_of_many_slices_those_that_have_changed_are_found_with_little_else(swept):
    """Breaks when many slices cost more than one pass where nothing has changed, when new orders at the end let all that come
    before them be read twice, or a change anywhere among many is lost."""
    def scans(action):
        def told():
            swept.sql("SELECT pg_stat_force_next_flush()", user="pii_admin")
            return swept.sql("SELECT seq_scan, idx_scan, seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables "
                             "WHERE relid = 'shop.orders'::regclass")[0]
        before = told()
        action()
        return tuple(a - b for a, b in zip(told(), before))

    # A hundred small slices that are yet to be compared.
    swept.sql("""WITH old AS (DELETE FROM amazon_pii.sweep_slice RETURNING stamp)
        INSERT INTO amazon_pii.sweep_slice (policy, first_after, upto, stamp, orders, digest, compared_at)
        SELECT 'shop', CASE WHEN n = 0 THEN '' ELSE format('["%%s"]', 2010 * n) END, CASE WHEN n < 99 THEN format('["%%s"]', 2010 * (n + 1)) END,
               (SELECT max(stamp) FROM old), %s, 0, '-infinity' FROM generate_series(0, 99) AS n""", [SLICE])
    sweep(swept)
    assert [orders for _, orders in slices(swept)] == [201] * 100
    assert fresh(swept) == 100
    swept.sql("ANALYZE shop.orders")
    swept.session("pii_admin").close()
    seq, idx, rows = scans(lambda: sweep(swept))
    assert seq == 1 and idx <= 2, "all at once; before that a look at the last, for which the planner may have looked at the index, too"
    assert fresh(swept) == 0
    # In the last, then in one of those before it.
    for order, most in ((201000, 1.6), (100000, 3.5)):
        unseen(swept, f"UPDATE shop.orders SET external_no = 'other' WHERE id = {order}")
        swept.session("pii_admin").close()
        seq, idx, rows = scans(lambda: sweep(swept))
        assert order_value(swept, order, "order_number") == "other"
        assert fresh(swept) == 1
        assert seq <= 2 and rows < most * 20100
    swept.session("pii_admin").close()
    seq, idx, rows = scans(lambda: sweep(swept))
    assert seq == 1 and idx <= 2 and fresh(swept) == 0


def test_slices_grow_split_and_unite(swept):
    """Breaks when a slice that changed lets all that follow begin elsewhere, or slices become ever smaller."""
    unseen(swept, f"INSERT INTO shop.orders (id, external_no, channel) SELECT 10 * i + 1, 'm' || i, 'amazon' FROM generate_series(1, {SLICE - 500}) AS i")
    assert sweep(swept)["flagged"] == SLICE - 500
    assert [orders for _, orders in slices(swept)] == [2 * SLICE - 500, SLICE, 100]
    assert fresh(swept) == 1
    unseen(swept, f"INSERT INTO shop.orders (id, external_no, channel) SELECT 10 * i + 2, 'l' || i, 'amazon' FROM generate_series(1, {SLICE - 500}) AS i")
    assert sweep(swept)["flagged"] == SLICE - 500
    assert [orders for _, orders in slices(swept)] == [SLICE, 2 * SLICE - 1000, SLICE, 100]
    assert fresh(swept) == 2
    # Appended to the last, as an import does.
    fill_from = 10 * (2 * SLICE + 200)
    unseen(swept, f"INSERT INTO shop.orders (id, external_no, channel) SELECT {fill_from} + i, 'k' || i, 'amazon' FROM generate_series(1, {2 * SLICE}) AS i")
    assert sweep(swept)["flagged"] == 2 * SLICE
    assert [orders for _, orders in slices(swept)][-3:] == [SLICE, SLICE, 100]
    fresh(swept)
    unseen(swept, f"DELETE FROM shop.orders WHERE id <= {10 * SLICE} AND id % 10 > 0")
    sweep(swept)
    small = [orders for _, orders in slices(swept)]
    assert sum(small[:2]) == SLICE and len(small) == 6
    assert fresh(swept) == 2
    unseen(swept, "UPDATE shop.orders SET shipped_at = NULL WHERE id = 20")
    sweep(swept)
    assert [orders for _, orders in slices(swept)] == [SLICE, *small[2:]]
    assert fresh(swept) == 1
    unseen(swept, f"DELETE FROM shop.orders WHERE id <= {10 * SLICE}")
    sweep(swept)
    assert [orders for _, orders in slices(swept)] == small[2:], "an empty slice is united with the next"
    assert fresh(swept) == 1
    assert swept.value("SELECT sum(orders) FROM amazon_pii.sweep_slice") == swept.value("SELECT count(*) FROM shop.orders")


def test_a_bad_row_is_noted_and_the_rest_is_known(swept):
    """Breaks when a row that cannot be evaluated lets each sweep compare all that follows it."""
    swept.apply_policy({**shop_policy(**FAR), "orders": {**shop_policy()["orders"], "amazon": "channel = 'amazon' AND 1 / (id - 15) < 2"}})
    sweep(swept)
    fresh(swept)
    unseen(swept, "INSERT INTO shop.orders (id, external_no, channel) VALUES (15, 'x', 'amazon'), (17, 'y', 'amazon')")
    for expected in (1, 0):
        assert sweep(swept)["flagged"] == expected
        assert order_value(swept, 17) == "flagged"
        assert swept.value("SELECT count(*) FROM amazon_pii.touched WHERE row_key = '[\"15\"]'") == 1
        # Its neighbours are looked at one by one each time, the rest of its slice together, once.
        assert fresh(swept) == expected
    assert [orders for _, orders in slices(swept)][-2:] == [SLICE, 100]


def test_sums_are_of_one_version_of_the_policy(swept):
    """Breaks when a new policy is believed to have been compared already."""
    swept.apply_policy(shop_policy(archive_after="2000 days", redact_after="2001 days", loosened="test"))
    run_cycle(swept)
    assert fresh(swept) == 3
    assert slices(swept)


def test_a_daily_sweep_rests_where_nothing_has_changed_for_weeks(swept):
    """Breaks when the daily sweep reads all there ever was, or leaves out a part of it for more than a week."""
    def days(n):
        swept.sql("UPDATE amazon_pii.policy SET swept_at = swept_at - %s::interval, sweep_started_at = sweep_started_at - %s::interval", [f"{n} days"] * 2)
        swept.sql("UPDATE amazon_pii.sweep_slice SET changed_at = changed_at - %s::interval, seen_at = seen_at - %s::interval", [f"{n} days"] * 2)
        return run_cycle(swept)["flagged"]

    swept.sql("UPDATE amazon_pii.sweep_slice SET changed_at = changed_at - '40 days'::interval WHERE first_after = ''")
    unseen(swept, "INSERT INTO shop.orders (id, external_no, channel) VALUES (15, 'x', 'amazon'), (10000000, 'y', 'amazon')")
    assert days(1) == 1, "only what came last is looked at"
    assert [days(1) for _ in range(5)] == [0] * 5
    assert days(1) == 1
    assert [order_value(swept, order) for order in (15, 10000000)] == ["flagged"] * 2


def test_an_order_that_came_back_unseen_is_found_within_a_week(db):
    """Breaks when an order that was deleted and restored while triggers were off stays gone: to a sum nothing happened."""
    open_shop(db)
    db.apply_policy(shop_policy(**FAR))
    add_order(db, 1)
    sweep(db)
    db.sql("CREATE TABLE public.backup AS SELECT * FROM shop.orders WHERE id = 1")
    db.sql("DELETE FROM shop.orders", user="shop_owner")
    assert order_value(db, 1) == "gone"
    db.sql("SET session_replication_role = replica; INSERT INTO shop.orders SELECT * FROM public.backup; RESET session_replication_role")
    for _ in range(7):
        db.sql("UPDATE amazon_pii.policy SET swept_at = swept_at - '1 day'::interval, sweep_started_at = sweep_started_at - '1 day'::interval")
        run_cycle(db)
    assert order_value(db, 1) == "scheduled"


def test_every_redacted_order_is_looked_at_within_a_week(db):
    """Breaks when the re-check leaves a part of the state table out, whatever its size."""
    fill(open_shop(db), 2000)
    db.apply_policy(shop_policy())
    assert run_cycle(db)["redacted"] == 2000
    assert db.value("SELECT pg_relation_size('amazon_pii.order_state') / 8192") > 14
    unseen(db, "UPDATE shop.orders SET gift_message = 'back again'")
    found = []
    for _ in range(7):
        db.sql("UPDATE amazon_pii.policy SET swept_at = swept_at - '1 day'::interval, sweep_started_at = sweep_started_at - '1 day'::interval")
        run_cycle(db)
        found.append(db.value("SELECT count(*) FROM shop.orders WHERE gift_message = '[Redacted]'"))
    assert found[-1] == 2000
    assert 0 < found[0] < 1000, "a part a day"


def test_redacted_orders_are_looked_at_where_they_are_few(swept):
    """Breaks when the re-check ends with the first part of the state table in which it finds nothing."""
    swept.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) "
              "VALUES (1000000, 'old', 'amazon', now() - '4000 days'::interval, 'Note')", user="shop_owner")
    assert run_cycle(swept)["redacted"] == 1
    assert swept.value("""SELECT (ctid::text::point)[0] FROM amazon_pii.order_state WHERE order_key = '["1000000"]'""") > 256
    unseen(swept, "UPDATE shop.orders SET gift_message = 'back again' WHERE id = 1000000")
    sweep(swept)
    assert swept.value("SELECT gift_message FROM shop.orders WHERE id = 1000000") == "[Redacted]"


@pytest.mark.skipif(MAJOR < 15, reason="statistics are told at once since PostgreSQL 15")
def test_few_redacted_orders_are_not_looked_for_among_all_others(swept):
    """Breaks when a sweep reads the states of all orders where few are redacted or deleted, or none is; and when it passes over
    one of those few: one without an archive, or one that was deleted."""
    def states_read(action):
        def told():
            swept.sql("SELECT pg_stat_force_next_flush()", user="pii_admin")
            return swept.value("SELECT seq_tup_read FROM pg_stat_user_tables WHERE relid = 'amazon_pii.order_state'::regclass")
        before = told()
        action()
        return told() - before

    assert states_read(lambda: sweep(swept)) == 0
    swept.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) SELECT i, 'old' || i, 'amazon', "
              "now() - '4000 days'::interval, 'Note' FROM generate_series(1000000, 1000003) AS i", user="shop_owner")
    assert run_cycle(swept)["redacted"] == 4
    swept.sql("SELECT * FROM amazon_pii.shred('old1000001', 'test')", user="pii_admin")
    run_cycle(swept)
    swept.sql("CREATE TABLE public.backup AS SELECT * FROM shop.orders WHERE id = 1000002")
    swept.sql("DELETE FROM shop.orders WHERE id = 1000002", user="shop_owner")
    assert [order_value(swept, order) for order in range(1000000, 1000004)] == ["redacted", "purged", "gone", "redacted"]
    unseen(swept, "UPDATE shop.orders SET gift_message = 'back again' WHERE id IN (1000000, 1000001)")
    swept.sql("SET session_replication_role = replica; INSERT INTO shop.orders SELECT * FROM public.backup; RESET session_replication_role")
    assert states_read(lambda: sweep(swept)) == 0
    assert swept.value("SELECT count(*) FROM shop.orders WHERE gift_message = '[Redacted]'") == 4
    assert order_value(swept, 1000002) != "gone"
