"""What a backup needs, and what one that was made before cannot bring back."""
from pathlib import Path

import pytest
from cold import DATABASE, FOREIGN, cold_server, shop_beside
from support import fill, open_shop, order_number, refused, run_cycle, shop_policy

CHECK = "SELECT severity, object, problem FROM amazon_pii.backup_check()"


@pytest.fixture
def done(db):
    fill(open_shop(db), 6)
    db.apply_policy(shop_policy())
    run_cycle(db)
    return db


def errors(db):
    return [(o, p) for s, o, p in db.sql(CHECK, user="pii_auditor") if s == "error"]


def test_a_sound_archive_needs_the_master_key_alone(done):
    rows = done.sql(CHECK, user="pii_admin")
    assert [s for s, *_ in rows] == ["info", "info"] and rows[0][1].startswith("master key") and "6 data keys" in rows[0][2]
    assert rows[1][1] == "amazon_pii.tombstone_file" and "is not set" in rows[1][2]
    assert errors(done) == []


@pytest.mark.parametrize("statement, object_, words", [
    ("DELETE FROM amazon_pii_archive.data_key WHERE order_key IN ('[\"1\"]', '[\"2\"]')", "amazon_pii_archive.data_key", "2 orders are missing"),
    ("DELETE FROM amazon_pii_archive.data_key WHERE order_key = '[\"1\"]'", "amazon_pii_archive.data_key", "1 archived orders have no data key"),
    ("ALTER TABLE amazon_pii_archive.data_key SET UNLOGGED", "amazon_pii_archive.data_key", "is unlogged"),
    ("ALTER EXTENSION amazon_pii ADD TABLE amazon_pii_archive.document", "amazon_pii_archive.document", "belongs to an extension"),
])
def test_what_a_dump_would_lack_is_said(done, statement, object_, words):
    # Breaks when a backup turns out to be worthless on the day it is needed.
    done.sql(statement)
    assert any(o == object_ and words in p for o, p in errors(done)), errors(done)


def test_a_master_key_that_is_gone_is_said(done):
    key = done.cluster.key_file
    kept = key.read_text()
    try:
        done.cluster.write_key(key)
        assert any("not among the configured keys" in p for _, p in errors(done))
    finally:
        Path(key).write_text(kept)


def test_shredded_orders_are_no_gap(done):
    done.sql("SELECT amazon_pii.shred(%s, 'asked')", [order_number(1)], "pii_admin")
    done.sql("SELECT amazon_pii.forget(%s, 'asked')", [order_number(2)], "pii_admin")
    run_cycle(done)
    assert errors(done) == []


def test_a_backup_of_the_cold_server_brings_no_shredded_order_back(cluster):
    """Crypto-shredding: breaks when a document that is put back opens again, or is taken for a copy."""
    cold = cold_server()
    try:
        db = shop_beside(cluster, cold)
        fill(db, 4)
        db.apply_policy(shop_policy(archive=FOREIGN))
        run_cycle(db)
        assert any(o == "cold.document" and s == "info" for s, o, _ in db.sql(CHECK, user="pii_auditor")) and errors(db) == []
        dump = cold.client("pg_dump", "-d", DATABASE, "--data-only", "--table=cold.document").stdout
        db.sql("SELECT amazon_pii.shred(%s, 'asked')", [order_number(2)], "pii_admin")
        run_cycle(db)
        assert cold.count("order_key = '[\"2\"]'") == 0
        cold.sql("TRUNCATE cold.document", dbname=DATABASE)
        cold.psql(dump, dbname=DATABASE)
        assert cold.count("order_key = '[\"2\"]'") == 3
        with refused("42704", "no longer exists"):
            db.sql("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator")
        # Not even where the order's state is put back, too.
        db.sql("UPDATE amazon_pii.order_state SET purged_at = NULL")
        with refused("42704", "no longer exists"):
            db.sql("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator")
        assert "'Gift 1'" in str(db.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(1)], "pii_operator"))
        db.drop()
    finally:
        cold.destroy()
