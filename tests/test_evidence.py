"""Evidence: who reads personal data is recorded by another process, which commits before anything is handed out."""

import psycopg2
import pytest
from cluster import Cluster, wait_until
from conftest import CAPABILITIES, ROLES, Database, add_extension
from test_worker import BUYER, NUMBER, POLICY, SHOP, buyer, dispatch_long_ago


def redacted_shop(db):
    db.sql(SHOP, user="shop_owner")
    db.apply_policy(POLICY)
    dispatch_long_ago(db)
    db.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert buyer(db) == "[Redacted]"
    return db


ACCESSES = 'SELECT "user", action, order_number, reason FROM amazon_pii.audit_log WHERE action IN (\'peek\', \'retrieve\')'


def test_rollback_leaves_the_access_in_the_log(db):
    redacted_shop(db)
    session = db.connect("pii_operator", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SELECT amazon_pii.peek(%s, 'parcel came back')::text", [NUMBER])
        assert BUYER in cursor.fetchone()[0]
        session.rollback()
        assert db.sql(ACCESSES) == [("pii_operator", "peek", NUMBER, "parcel came back")]
        cursor.execute("SELECT amazon_pii.retrieve(%s, 'parcel came back')", [NUMBER])
        session.rollback()
    assert db.sql(ACCESSES + " AND action = 'retrieve'") == [("pii_operator", "retrieve", NUMBER, "parcel came back")]
    assert buyer(db) == "[Redacted]"


def test_no_worker_no_access():
    with Cluster() as server:
        server.sql(ROLES)
        server.create_database("shop")
        add_extension(server, "shop")
        server.sql(CAPABILITIES)
        server.sql("GRANT CREATE ON DATABASE shop TO shop_owner")
        db = redacted_shop(Database(server, "shop"))
        server.stop()
        server.configure("max_worker_processes = 0")
        server.start()
        for call in ("peek", "retrieve"):
            with pytest.raises(psycopg2.errors.InsufficientResources) as refused:
                db.sql(f"SELECT amazon_pii.{call}(%s, 'parcel came back')", [NUMBER], user="pii_operator")
            assert "max_worker_processes" in refused.value.diag.message_hint
        assert db.sql(ACCESSES) == []
        assert buyer(db) == "[Redacted]"


def test_access_that_cannot_be_written_is_refused(db):
    # The log is locked: by the caller itself, for the worst case.
    redacted_shop(db)
    session = db.connect(autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("LOCK TABLE amazon_pii.audit_entry IN EXCLUSIVE MODE")
        with pytest.raises(psycopg2.errors.InsufficientResources) as refused:
            cursor.execute("SELECT amazon_pii.peek(%s, 'parcel came back')", [NUMBER])
        assert "55P03" in refused.value.diag.message_detail
    session.rollback()
    assert db.sql(ACCESSES) == []


def test_cancel_while_the_access_is_being_recorded_gets_through(db):
    redacted_shop(db)
    blocker = db.connect(autocommit=False)
    blocker.cursor().execute("LOCK TABLE amazon_pii.audit_entry IN EXCLUSIVE MODE")
    session = db.connect("pii_operator")
    with session.cursor() as cursor:
        cursor.execute("SET statement_timeout = '200ms'")
        # Whoever is in the way is so until the end.
        with pytest.raises(psycopg2.errors.QueryCanceled):
            cursor.execute("SELECT amazon_pii.peek(%s, 'parcel came back')", [NUMBER])
    blocker.rollback()


# Where the library is preloaded, a worker that has recorded an access waits a moment for the next one.

@pytest.fixture(scope="module")
def narrow():
    """Room for the launcher, a cycle's worker that never comes, and one more."""
    with Cluster(preload=True, conf=["amazon_pii.enabled = off", "amazon_pii.databases = 'nowhere'", "max_worker_processes = 2",
                                     "max_logical_replication_workers = 0", "max_parallel_workers = 0"]) as server:
        server.sql(ROLES)
        for name in ("one", "two"):
            server.create_database(name, "template0")
            add_extension(server, name)
            if name == "one":
                server.sql(CAPABILITIES)
            server.sql(f"GRANT CREATE ON DATABASE {name} TO shop_owner")
        yield [redacted_shop(Database(server, name)) for name in ("one", "two")]


def peek(db):
    """As somebody in a session of their own, whose transaction rolls back."""
    with db.connect("pii_operator", autocommit=False) as session, session.cursor() as cursor:
        cursor.execute("SELECT amazon_pii.peek(%s, 'parcel came back')::text", [NUMBER])
        assert BUYER in cursor.fetchone()[0]
        session.rollback()


def waiting(db):
    return [r[0] for r in db.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'amazon_pii evidence' AND datname = current_database()")]


def none_waits(db):
    wait_until(lambda: db.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'amazon_pii evidence'") == [])


def entries(db):
    return db.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'peek'")


def test_one_worker_records_accesses_that_follow_each_other(narrow):
    """Breaks when each access waits for a new process, an entry is lost or written twice, or the worker stays."""
    db = narrow[0]
    none_waits(db)
    before = entries(db)
    peek(db)
    first = waiting(db)
    for _ in range(5):
        peek(db)
    assert len(first) == 1 and waiting(db) == first
    assert entries(db) == before + 6
    none_waits(db)
    peek(db)
    assert entries(db) == before + 7


def test_a_worker_that_only_waits_is_in_nobodys_way(narrow):
    """Breaks when an access is refused because the last slot belongs to a worker that has nothing to do."""
    counts = [entries(db) for db in narrow]
    for _ in range(3):
        for db in narrow:
            peek(db)
    assert [entries(db) for db in narrow] == [c + 3 for c in counts]


def test_a_worker_that_was_ended_is_replaced(narrow):
    """Breaks when a request lies on the desk of a process that is gone."""
    db = narrow[0]
    peek(db)
    before = entries(db)
    for pid in waiting(db):
        db.sql("SELECT pg_terminate_backend(%s)", [pid])
    peek(db)
    assert entries(db) == before + 1


def test_what_the_worker_says_comes_from_the_current_settings(narrow):
    """Breaks when a worker that waits goes on with what was configured when it began."""
    db = narrow[0]
    peek(db)
    known = db.value("SELECT key_id FROM amazon_pii.audit_log WHERE action = 'peek' ORDER BY audit_id DESC LIMIT 1")
    server, key = db.cluster, db.cluster.base / "second"
    server.write_key(key)
    key.write_text(key.read_text() + server.key_file.read_text())
    server.configure(f"amazon_pii.key_file = '{key}'")
    server.reload()
    wait_until(lambda: db.cluster.sql("SHOW amazon_pii.key_file") == [(str(key),)])
    peek(db)
    assert db.value("SELECT key_id FROM amazon_pii.audit_log WHERE action = 'peek' ORDER BY audit_id DESC LIMIT 1") != known


def test_a_database_can_be_dropped_while_a_worker_waits(narrow):
    """Breaks when a worker waits longer than DROP DATABASE does. The last test with this database."""
    db = narrow[1]
    peek(db)
    assert len(waiting(db)) == 1
    db.drop()
