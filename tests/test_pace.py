"""A cycle is not in the way: batches take a limited time, whoever waits for one gets its row after that batch, nothing is held
during a pause, and replicas are waited for, but not for ever."""
import psycopg2
import pytest
from cluster import Cluster, wait_until
from conftest import new_database, prepare
from support import (
    Background, at_gate, close_gate, fill, open_gate, open_shop, refused, run_cycle, shop_policy, standby_of, states,
)

CALL = "CALL amazon_pii.run_cycle()"
HELPERS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'amazon_pii helper'"
WORKER = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'amazon_pii worker'"
DEFAULTS = {
    "amazon_pii.batch_pause": "0", "amazon_pii.batch_size": "2000", "amazon_pii.batch_time": "1h", "amazon_pii.enabled": "off",
    "amazon_pii.replica_lag": "1MB", "amazon_pii.replica_wait": "1h", "amazon_pii.workers": "1",
}


@pytest.fixture(scope="module")
def server():
    """The worker is there, but does nothing until a test switches it on. Sizes of batches change for one reason at a time."""
    conf = ["autovacuum = off", "amazon_pii.naptime = '1s'", "max_worker_processes = 16"]
    with Cluster(preload=True, conf=conf + [f"{name} = '{value}'" for name, value in DEFAULTS.items()]) as server:
        prepare(server)
        yield server


@pytest.fixture
def db(server):
    database = open_shop(new_database(server))
    database.apply_policy(shop_policy())
    yield database
    # A worker that is in a pause must not keep the database.
    set_up(server, **{name.split(".")[1]: value for name, value in DEFAULTS.items()})
    database.drop()


def set_up(server, **settings):
    for name, value in settings.items():
        server.configure(f"amazon_pii.{name} = '{value}'")
    server.reload()
    for name, value in settings.items():
        wait_until(lambda name=name, value=value: server.sql(f"SHOW amazon_pii.{name}") == [(value,)])


def sizes(db):
    """Orders in each batch that was redacted, one batch after the other."""
    return [n for (n,) in db.sql("SELECT json_array_length(lines::json) FROM amazon_pii.audit_entry WHERE action = 'redact' ORDER BY audit_id")]


def redacted(db):
    return sum(state == "redacted" for state in states(db).values())


def locks(db, pid):
    """What a process has locked, its own transaction's number aside."""
    return db.sql("SELECT locktype, relation::regclass, mode FROM pg_locks WHERE pid = %s AND locktype <> 'virtualxid'", [pid])


def in_pause(db, pid):
    """Until a process is in a pause, outside of any transaction that others could notice."""
    rests = "SELECT wait_event = 'Extension' FROM pg_stat_activity WHERE pid = %s AND backend_xid IS NULL AND backend_xmin IS NULL"
    wait_until(lambda: db.sql(rests, [pid]) == [(True,)] and locks(db, pid) == [], message="there is no pause")


def assert_nothing_is_held(db):
    """Neither a row nor a table of the shop's, nor the policy's turn."""
    with db.connect(autocommit=False) as session, session.cursor() as cursor:
        cursor.execute("SET lock_timeout = '1ms'")
        for table in ("orders", "addresses", "customers", "invoices", "invoice_lines"):
            cursor.execute(f"LOCK TABLE shop.{table} IN ACCESS EXCLUSIVE MODE")
        cursor.execute("LOCK TABLE amazon_pii.order_state IN ACCESS EXCLUSIVE MODE")
        cursor.execute("SELECT amazon_pii.take_turn('shop')")
        session.rollback()


# The size of batches


def test_batches_shrink_where_rows_take_long_and_grow_again(db):
    """Breaks when the size of batches does not depend on how long they take."""
    db.sql("CREATE FUNCTION shop.slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_catalog.pg_sleep(0.05); RETURN NEW; END $$; "
           "CREATE TRIGGER slow BEFORE UPDATE ON shop.addresses FOR EACH ROW WHEN (OLD.order_id <= 40) EXECUTE FUNCTION shop.slow()",
           user="shop_owner")
    set_up(db.cluster, batch_time="500ms")
    fill(db, 300)
    assert run_cycle(db)["redacted"] == 300
    found = sizes(db)
    # The first batch takes at least 0.8 s; ten orders would take half a second.
    assert found[0] == 16 and found[1] <= 10, found
    assert max(found) > 40, found
    assert redacted(db) == 300


def test_batch_size_is_the_most(db):
    """Breaks when batches grow beyond the setting, or never reach it."""
    set_up(db.cluster, batch_size="50")
    fill(db, 300)
    run_cycle(db)
    assert sizes(db) == [16, 50, 50, 50, 50, 50, 34]


def test_whoever_waits_for_a_row_has_it_after_the_batch(db):
    """Breaks when a cycle keeps its locks from batch to batch, or when nobody looks whether somebody waits for them."""
    set_up(db.cluster, batch_size="16")
    fill(db, 60)
    close_gate(db, 8)
    call = Background(db, CALL)
    at_gate(db)
    update = Background(db, "UPDATE shop.orders SET total = -1 WHERE id = 3", user="shop_owner").wait_for_lock(db)
    # The first batch may go, those after it come to the gate.
    db.sql("UPDATE shop.gate SET closed_from = 17", user="shop_owner")
    update.result()
    assert call.is_alive(), "the cycle is over"
    assert sum(state == "original" for state in states(db).values()) == 60 - 16
    assert db.sql("SELECT gift_message, total FROM shop.orders WHERE id = 3") == [("[Redacted]", -1)]
    open_gate(db)
    assert call.result()[0][2] == 60
    # Smaller for the sake of who waits, then slowly larger.
    assert sizes(db)[:4] == [16, 8, 11, 14]


# Pauses


def test_nothing_is_held_during_the_pause_of_a_call_and_a_cancel_ends_it(db):
    """Breaks when a pause is inside of a transaction, or cannot be interrupted."""
    set_up(db.cluster, batch_pause="1h", batch_size="16")
    fill(db, 60)
    call = Background(db, CALL)
    in_pause(db, call.pid)
    assert_nothing_is_held(db)
    assert redacted(db) == 16
    db.sql("SELECT pg_cancel_backend(%s)", [call.pid])
    with refused("57014"):
        call.result(timeout=10)
    set_up(db.cluster, batch_pause="0")
    assert run_cycle(db)["redacted"] == 44


def test_a_pause_of_the_worker_is_outside_of_transactions_and_ends_with_the_process(db):
    """Breaks when the worker rests inside of a transaction: VACUUM could remove nothing meanwhile."""
    fill(db, 60)
    set_up(db.cluster, batch_pause="1h", batch_size="16", enabled="on")
    pid = wait_until(lambda: redacted(db) == 16 and db.sql(WORKER))[0][0]
    in_pause(db, pid)
    assert_nothing_is_held(db)
    assert db.sql("SELECT state, xact_start FROM pg_stat_activity WHERE pid = %s", [pid]) == [("idle", None)]
    assert db.value("SELECT count(*) FROM pg_locks WHERE pid = %s", [pid]) == 0
    # The next worker is to do nothing.
    set_up(db.cluster, enabled="off")
    db.sql("SELECT pg_terminate_backend(%s)", [pid])
    wait_until(lambda: (pid,) not in db.sql(WORKER))
    assert redacted(db) == 16


@pytest.mark.parametrize("by", ["call", "worker"])
def test_a_changed_setting_ends_a_pause_that_has_begun(db, by):
    """Breaks when a cycle keeps the settings that it began with."""
    fill(db, 60)
    set_up(db.cluster, batch_pause="1h", batch_size="16", enabled="on" if by == "worker" else "off")
    call = Background(db, CALL) if by == "call" else None
    pid = call.pid if call else wait_until(lambda: redacted(db) == 16 and db.sql(WORKER))[0][0]
    in_pause(db, pid)
    set_up(db.cluster, batch_pause="0")
    wait_until(lambda: redacted(db) == 60)
    if call:
        assert call.result()[0][2] == 60


def test_helpers_pause_too_and_end_with_their_cycle(db):
    """Breaks when only the process that runs the cycle makes pauses."""
    set_up(db.cluster, workers="3", batch_size="20")
    fill(db, 1200, share=3)
    close_gate(db, 100)
    call = Background(db, CALL)
    at_gate(db, 3)
    set_up(db.cluster, batch_pause="1h")
    open_gate(db)
    processes = [call.pid] + [pid for (pid,) in db.sql(HELPERS)]
    assert len(processes) == 3
    for pid in processes[1:]:
        in_pause(db, pid)
    wait_until(lambda: db.sql("SELECT wait_event FROM pg_stat_activity WHERE pid = %s", [call.pid]) == [("Extension",)])
    assert_nothing_is_held(db)
    done = redacted(db)
    assert done < 1200
    db.sql("SELECT pg_cancel_backend(%s)", [call.pid])
    with refused("57014"):
        call.result(timeout=10)
    wait_until(lambda: not db.sql(HELPERS), message="the helpers go on")
    assert redacted(db) == done
    set_up(db.cluster, batch_pause="0")
    run_cycle(db)
    assert redacted(db) == 1200


# Replicas


@pytest.fixture
def standby(server):
    with standby_of(server) as standby:
        standby.configure("wal_receiver_status_interval = '1s'")
        standby.reload()
        yield standby


@pytest.fixture
def late(db, standby):
    """A standby that has stopped replaying, and is further behind than it may be."""
    wait_until(lambda: db.sql("SELECT state FROM pg_stat_replication") == [("streaming",)])
    standby.sql("SELECT pg_wal_replay_pause()")
    wait_until(lambda: standby.sql("SELECT pg_get_wal_replay_pause_state()") == [("paused",)])
    db.sql("CREATE TABLE public.wal AS SELECT repeat(md5(i::text), 30) AS t FROM generate_series(1, 4000) AS i")
    wait_until(lambda: db.value("SELECT pg_current_wal_lsn() - replay_lsn > 2 * 1024 * 1024 FROM pg_stat_replication"))
    set_up(db.cluster, batch_size="16")
    fill(db, 60)
    return standby


def note(db):
    """What the view says of the last cycle that has done anything."""
    runs = db.sql("SELECT note FROM amazon_pii.runs ORDER BY run_id DESC LIMIT 1", user="pii_auditor")
    return runs[0][0] if runs else None


def wait_for_note(db):
    wait_until(lambda: (note(db) or "").startswith("waits for a replica: the one of process "))


@pytest.mark.parametrize("by", ["call", "worker"])
def test_a_cycle_waits_while_a_standby_falls_back(db, late, by):
    """Breaks when nobody looks at standbys, or when only roles that may see their statistics can. The caller may not."""
    if by == "worker":
        set_up(db.cluster, enabled="on")
    else:
        call = Background(db, CALL)
    wait_for_note(db)
    sender = db.value("SELECT pid FROM pg_stat_replication")
    assert f" {sender} is " in note(db)
    in_pause(db, db.sql(WORKER)[0][0] if by == "worker" else call.pid)
    assert_nothing_is_held(db)
    assert redacted(db) == 16
    late.sql("SELECT pg_wal_replay_resume()")
    wait_until(lambda: redacted(db) == 60)
    wait_until(lambda: db.value("SELECT count(*) FROM amazon_pii.runs WHERE finished_at IS NOT NULL AND redacted = 60") == 1)
    assert note(db) is None
    if by == "call":
        assert call.result()[0][2] == 60


def test_a_standby_that_does_not_come_is_not_waited_for_for_ever(db, late):
    """Breaks when a dead-slow replica can stop redaction."""
    set_up(db.cluster, replica_wait="1s")
    call = Background(db, CALL)
    assert call.result()[0][2] == 60
    assert redacted(db) == 60
    assert note(db).startswith("went on although a replica lags: the one of process ")
    assert any("went on although a replica lags" in notice for notice in call.connection.notices)


def test_a_standby_that_goes_away_is_not_waited_for(db, late):
    """Breaks when a cycle waits for a replica that nobody sends to any more."""
    call = Background(db, CALL)
    wait_for_note(db)
    assert redacted(db) == 16
    late.stop("immediate")
    assert call.result()[0][2] == 60
    assert note(db) is None


def test_standbys_can_be_left_to_themselves(db, late):
    """Breaks when the setting is not heeded: a standby may be late on purpose."""
    set_up(db.cluster, replica_lag="-1")
    assert Background(db, CALL).result()[0][2] == 60
    assert note(db) is None


def test_the_last_batch_waits_for_nobody(db, late):
    """Breaks when a cycle that has nothing left to do waits all the same."""
    db.sql("UPDATE shop.orders SET shipped_at = now() WHERE id > 10", user="shop_owner")
    assert Background(db, CALL).result()[0][2] == 10
    assert note(db) is None


def test_whoever_ends_a_cycle_that_waits_for_a_standby_ends_it_at_once(db, late):
    call = Background(db, CALL)
    in_pause(db, call.pid)
    db.sql("SELECT pg_terminate_backend(%s)", [call.pid])
    with pytest.raises(psycopg2.OperationalError):
        call.result(timeout=10)
    assert redacted(db) == 16
