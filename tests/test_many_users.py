"""One row that thousands of orders share: a batch looks at some of them, not at all, and the row goes exactly with the last."""
import psycopg2
import pytest
from cluster import Cluster
from conftest import new_database, prepare
from support import Background, at_gate, close_gate, fill, open_gate, open_shop, run_cycle, shop_policy, states

ORDERS, BATCH = 7000, 250
# Index entries that a batch may read for its own orders, and for the users of one row: two looks, before and after it is locked.
OWN, USERS = 12 * BATCH, 2 * 5050


@pytest.fixture(scope="module")
def server():
    conf = ["autovacuum = off", f"amazon_pii.batch_size = {BATCH}", "shared_buffers = 128MB"]
    with Cluster(conf=conf) as server:
        prepare(server)
        yield server


@pytest.fixture
def db(server):
    database = open_shop(new_database(server))
    yield database
    database.drop()


# What the cycle's session has read in the indexes of two tables until now, noted by each batch where it writes its entry.
NOTES = """
CREATE TABLE public.batch_note (n bigint GENERATED ALWAYS AS IDENTITY, orders bigint, records bigint);
CREATE FUNCTION public.index_entries_read(t regclass) RETURNS bigint LANGUAGE sql AS
$$ SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid)) FROM pg_index WHERE indrelid = t $$;
CREATE FUNCTION public.note_batch() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.batch_note (orders, records)
    SELECT public.index_entries_read('shop.orders'), public.index_entries_read('amazon_pii.record_state')
     WHERE EXISTS (SELECT FROM new_rows WHERE action = 'redact');
    RETURN NULL;
END $$;
CREATE TRIGGER note_batch AFTER INSERT ON amazon_pii.audit_entry REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION public.note_batch();
"""


def read_by_batches(db):
    """[(entries of orders, of records)] of each batch but the first."""
    notes = db.sql("SELECT orders, records FROM public.batch_note ORDER BY n")
    return [tuple(y - x for x, y in zip(a, b)) for a, b in zip(notes, notes[1:])]


def customer(db):
    return db.value("SELECT last_name FROM shop.customers")


def shared_by(db, orders):
    """Nothing is analyzed: the planner knows nothing of this."""
    fill(db, orders, share=10 * orders)
    db.apply_policy(shop_policy())
    db.sql(NOTES)


def test_orders_of_one_customer_that_are_all_due(db):
    # Breaks when each batch asks all users of a row, or when the last of them leaves it behind.
    shared_by(db, ORDERS)
    counts = run_cycle(db)
    assert counts["archived"] == ORDERS and counts["failed"] == counts["overdue"] == 0
    assert set(states(db).values()) == {"redacted"}
    assert customer(db) == "[Redacted]"
    assert db.value("SELECT count(*) FROM amazon_pii.records WHERE status = 'waiting'") == 0
    read = read_by_batches(db)
    assert len(read) >= ORDERS // BATCH
    # The last look is at all of them, before and after the row is locked; the index still has their dead versions.
    *before, last = read
    assert last[0] < 8 * ORDERS
    for orders, records in before:
        assert orders < OWN + USERS and records < OWN
    # Mostly the order that was last seen keeping the row alive still does.
    assert sum(orders < OWN for orders, _ in before) > len(before) / 2


@pytest.mark.parametrize("channel", ["web", "amazon"])
def test_last_order_of_a_customer_is_alive(db, channel):
    # Breaks when the search ends before it comes to the last, or begins anew with each batch.
    shared_by(db, ORDERS)
    fill(db, ORDERS + 1, first=ORDERS + 1, age="5 days", share=10 * ORDERS, channel=channel)
    # The heap has it last, and an update of others does not change that.
    assert run_cycle(db)["overdue"] == 0
    assert customer(db) == "Last 1"
    assert states(db) == {o: "redacted" if o <= ORDERS else "original" for o in range(1, ORDERS + 2)}
    for orders, records in read_by_batches(db)[:-1]:
        assert orders < OWN + USERS and records < OWN
    # From here on one look is enough.
    db.sql("TRUNCATE public.batch_note")
    fill(db, ORDERS + 1001, first=ORDERS + 2, share=10 * ORDERS)
    run_cycle(db)
    assert customer(db) == "Last 1"
    assert all(orders < OWN for orders, _ in read_by_batches(db))

    if channel == "web":
        db.sql("DELETE FROM shop.addresses WHERE order_id = %s", [ORDERS + 1], "shop_owner")
        db.sql("DELETE FROM shop.invoices WHERE order_id = %s", [ORDERS + 1], "shop_owner")
        db.sql("DELETE FROM shop.orders WHERE id = %s", [ORDERS + 1], "shop_owner")
        db.sql("CALL amazon_pii.run_cycle('shop', true)", user="pii_admin")
    else:
        db.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = %s", [ORDERS + 1], "shop_owner")
        db.sql("UPDATE shop.invoices SET invoiced_at = now() - '40 days'::interval WHERE order_id = %s", [ORDERS + 1], "shop_owner")
        run_cycle(db)
    assert customer(db) == "[Redacted]"


def test_interrupted_before_the_last_look(db):
    # Breaks when only the interrupted cycle knows that nobody has looked at all users of the row.
    shared_by(db, ORDERS)
    close_gate(db, ORDERS)
    call = Background(db, "CALL amazon_pii.run_cycle()")
    at_gate(db)
    turn = Background(db, "BEGIN; SELECT amazon_pii.take_turn('shop'); SELECT pg_catalog.pg_sleep(600)", user="postgres").wait_for_lock(db)
    open_gate(db)
    call.wait_for_lock(db)
    db.sql("SELECT pg_terminate_backend(%s), pg_terminate_backend(%s)", [call.pid, turn.pid])
    for session in (call, turn):
        with pytest.raises(psycopg2.Error):
            session.result()
    assert customer(db) == "Last 1"
    assert set(states(db).values()) == {"redacted"}
    run_cycle(db)
    assert customer(db) == "[Redacted]"
