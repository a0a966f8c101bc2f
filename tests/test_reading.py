"""peek() only reads: it takes no lock that writers wait for, and works where nothing can be written, but never without
its entry in the log."""
import json

import pytest
from cluster import wait_until
from support import (
    PLACEHOLDER, Background, add_order, number, open_shop, order_value, refused, run_cycle, shop_policy, standby_of,
)

ONE = number(1)
PEEK = "SELECT amazon_pii.peek(%s, 'return')"
PEEKS = "SELECT order_number, order_key FROM amazon_pii.audit_log WHERE action = 'peek' ORDER BY audit_id"


def redacted_shop(db):
    open_shop(db)
    add_order(db, 1)
    db.apply_policy(shop_policy())
    run_cycle(db)
    assert order_value(db, 1) == "redacted"
    return db


@pytest.fixture
def shop(db):
    return redacted_shop(db)


def peek(db, begin="BEGIN READ ONLY", words="Gift1"):
    session = db.connect("pii_operator", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute(f"ROLLBACK; {begin}; {PEEK}", [ONE])
        assert words in json.dumps(cursor.fetchone()[0])
    session.rollback()
    session.close()


@pytest.mark.parametrize("begin", ["BEGIN READ ONLY", "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY"])
def test_peek_in_a_read_only_transaction(shop, begin):
    """Breaks when peek locks or writes a row of ours, or is not recorded because its transaction cannot write."""
    peek(shop, begin)
    assert shop.sql(PEEKS) == [(ONE, '["1"]')]
    with refused("25006", "read-only"):
        shop.sql(f"ROLLBACK; {begin}; SELECT * FROM amazon_pii.retrieve(%s, 'return')", [ONE], "pii_operator")
    shop.sql("ROLLBACK", user="pii_operator")


def test_peek_waits_for_nobody(shop):
    """Breaks when reading an order waits for a transaction that has its state locked, or makes one wait."""
    other = shop.connect(autocommit=False)
    other.cursor().execute("SELECT FROM amazon_pii.order_state FOR UPDATE")
    session = shop.connect("pii_operator", autocommit=False, options="-c lock_timeout=1s")
    session.cursor().execute(PEEK, [ONE])
    other.rollback()
    other.cursor().execute("SET lock_timeout = '1s'; SELECT FROM amazon_pii.order_state FOR UPDATE")
    other.rollback()
    session.rollback()


@pytest.mark.parametrize("change", [
    "UPDATE shop.orders SET id = 7 WHERE id = 1", "UPDATE shop.addresses SET id = 70 + id",
])
def test_peek_after_a_change_of_keys(shop, change):
    """Breaks when documents under an old key are not found, or a transaction that cannot move them says something else."""
    shop.psql("SET ROLE shop_owner; ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey")
    shop.psql("SET ROLE shop_owner; ALTER TABLE shop.addresses ALTER id DROP IDENTITY IF EXISTS") if "70" in change else None
    shop.sql(change, user="shop_owner")
    session = shop.connect("pii_operator", autocommit=False)
    with session.cursor() as cursor, refused("25006", "changed and the archive has yet to follow"):
        cursor.execute(f"ROLLBACK; BEGIN READ ONLY; {PEEK}", [ONE])
    session.close()
    peek(shop, "BEGIN")
    run_cycle(shop)
    peek(shop)


def test_peek_while_a_key_changes(shop):
    """Breaks when documents that followed a change of keys meanwhile are shown as an order without personal data."""
    shop.psql("SET ROLE shop_owner; ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey")
    # The entry in the log is what peek waits for; meanwhile the key changes, and the archive follows.
    blocker = shop.connect(autocommit=False)
    blocker.cursor().execute("LOCK TABLE amazon_pii.audit_entry IN EXCLUSIVE MODE")
    call = Background(shop, PEEK, [ONE], "pii_operator")
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'amazon_pii.audit_entry'::regclass"
    wait_until(lambda: shop.value(waits) == 1)
    shop.sql("UPDATE shop.orders SET id = 7 WHERE id = 1", user="shop_owner")
    blocker.rollback()
    with refused("55000", "changed while it was being read"):
        call.result()
    peek(shop, "BEGIN")


def test_a_standby_gives_nothing_out(cluster, shop):
    """Breaks when an access that cannot be recorded is allowed, or its refusal does not say why."""
    with standby_of(cluster) as standby:
        session = standby.connect("pii_operator", shop.name)
        for function, sqlstate, words in (("peek", "55000", "cannot be recorded during recovery"), ("retrieve", "25006", "read-only")):
            with session.cursor() as cursor, refused(sqlstate, words) as caught:
                cursor.execute(f"SELECT amazon_pii.{function}(%s, 'return')", [ONE])
            assert "Gift1" not in str(caught.value)
        session.close()
    assert shop.sql(PEEKS) == []
    assert shop.value("SELECT gift_message FROM shop.orders") == PLACEHOLDER
