"""Evidence: who reads personal data is recorded by another process, which commits before anything is handed out."""
import time

import psycopg2
import pytest
from cluster import Cluster
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
        began = time.monotonic()
        with pytest.raises(psycopg2.errors.QueryCanceled):
            cursor.execute("SELECT amazon_pii.peek(%s, 'parcel came back')", [NUMBER])
        assert time.monotonic() - began < 1.5
    blocker.rollback()
