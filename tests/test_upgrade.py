"""ALTER EXTENSION UPDATE from every released version, with data in place. The data, `fixtures/released-<version>.sql`, is a dump of
what that version itself made of the orders in every_state.py, under the key beside it; it is loaded into that version's own SQL."""
import hashlib

import pytest
from catalog import catalog, differences
from cluster import wait_until
from conftest import ROOT, new_database, server_with
from every_state import STATES, found, goes_on, shown, tables_with, whole_log
from support import FIXTURES, PLACEHOLDER, add_order, number, order_value, refused, run_cycle, shop_policy, snapshot

OLD = "0.1.0"
UPDATE = "ALTER EXTENSION amazon_pii UPDATE"
WORDS = f"amazon_pii in this database is of version {OLD}"

# As if the dump were of today: all moments but those of the audit log, whose entries are signed, and the worker's.
TODAY = """
SET session_replication_role = replica;
SET client_min_messages = error;
DO $$
DECLARE
    since interval := (SELECT pg_catalog.now() - pg_catalog.max(GREATEST(cycled_at, swept_at)) FROM amazon_pii.policy);
    moments text;
    table_name regclass;
BEGIN
    FOR table_name, moments IN
        SELECT c.oid, pg_catalog.string_agg(pg_catalog.format('%1$I = %1$I + %2$L', a.attname, since), ', ')
          FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         WHERE c.relkind = 'r' AND c.relnamespace::regnamespace::text IN ('amazon_pii', 'shop') AND c.relname NOT IN ('audit_entry', 'heartbeat')
           AND a.atttypid = 'timestamptz'::regtype GROUP BY c.oid
    LOOP
        EXECUTE pg_catalog.format('UPDATE %s SET %s', table_name, moments);
    END LOOP;
END $$;
"""


def keyed(cluster):
    cluster.key_file.write_text((FIXTURES / f"released-{OLD}.key").read_text())


def load(server):
    """A database of the old version, with its data."""
    db = new_database(server, "template0")
    db.sql(f"CREATE EXTENSION amazon_pii VERSION '{OLD}'")
    db.psql(FIXTURES / f"released-{OLD}.sql")
    db.psql(TODAY)
    return db


@pytest.fixture(scope="module")
def server():
    server = server_with(before_start=keyed)
    # One that the old version did not have.
    server.sql("DROP ROLE amazon_pii_files")
    yield server
    server.destroy()


@pytest.fixture
def old(server):
    db = load(server)
    yield db
    db.drop()


def test_released_scripts_stay_as_they_are():
    """Breaks when somebody edits what is out in the world: what is installed there would differ from what is tested here."""
    released = (ROOT / "sql" / "released" / f"amazon_pii--{OLD}.sql").read_bytes()
    assert hashlib.sha256(released).hexdigest() == "95b443727de6d74acdf4916df224ab72b60e375372ebba493b0cc5e993b656a5"


def test_an_updated_database_has_the_catalog_of_a_new_one(server, old, version):
    """Breaks when something of sql/*.sql did not get into the upgrade script. The message names the objects."""
    new = new_database(server, "template0")
    try:
        new.sql("CREATE EXTENSION amazon_pii")
        before = catalog(old)
        old.sql(UPDATE)
        assert old.value("SELECT extversion FROM pg_extension WHERE extname = 'amazon_pii'") == version
        is_, should = catalog(old), catalog(new)
        assert before != should and len(should) > 300
        told = differences(is_, should)
        assert told == "", f"after {UPDATE} from {OLD}:\n{told}"
    finally:
        new.drop()


def test_what_an_update_makes_belongs_to_the_owner_of_the_extension(server):
    """Breaks when another superuser than the one who made the extension updates it, and its owner cannot use what is new."""
    server.sql("CREATE ROLE first_dba SUPERUSER LOGIN")
    db = new_database(server, "template0")
    try:
        db.sql(f"CREATE EXTENSION amazon_pii VERSION '{OLD}'", user="first_dba")
        db.sql(UPDATE)
        owners = "SELECT relowner::regrole::text FROM pg_class WHERE relnamespace = 'amazon_pii'::regnamespace " \
                 "UNION SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'amazon_pii'::regnamespace"
        assert db.sql(owners) == [("first_dba",)]
    finally:
        db.drop()
        server.sql("DROP ROLE first_dba")


def test_every_order_goes_on_after_an_update(old):
    """Breaks when the update, or the first cycle after it, loses or forgets something of what an earlier version did."""
    before, rows = shown(old), snapshot(old)
    assert found(old) == STATES
    old.sql(UPDATE)
    after = shown(old)
    for what in ("orders", "log"):
        columns = len(before[what][0])
        assert [row[:columns] for row in after[what]] == before[what]
    assert after["records"] == before["records"] and snapshot(old) == rows
    assert old.value("SELECT count(*) FROM amazon_pii.order_state WHERE redacted_first_at IS NOT DISTINCT FROM redacted_at") == len(STATES)
    assert old.value("SELECT held_since < now() AND held_until > now() FROM amazon_pii.order_state WHERE order_key = '[\"6\"]'")
    run_cycle(old)
    good, told = whole_log(old)
    assert good, told
    # Columns that were there are known, so that one that comes is not.
    assert old.sql("SELECT * FROM amazon_pii.unclassified", user="pii_auditor") == []
    old.sql("ALTER TABLE shop.addresses ADD COLUMN doorbell text", user="shop_owner")
    assert old.value("SELECT column_name FROM amazon_pii.unclassified", user="pii_auditor") == "doorbell"
    goes_on(old, STATES)
    evidence = old.value("SELECT amazon_pii.evidence('shop')", user="pii_auditor")
    assert evidence["policy"] == "shop"


def test_what_an_update_knows_of_long_holds_and_disabled_policies(old):
    """Breaks when what is kept longer is not shown, because an earlier version asked for no reason."""
    old.sql("UPDATE amazon_pii.policy SET enabled = false, document = replace(document, '\"policy\"', '\"redact_after\": \"60 days\", \"policy\"')")
    old.sql("UPDATE amazon_pii.order_state SET held_until = now() + interval '90 days' WHERE held_until IS NOT NULL")
    old.sql("INSERT INTO amazon_pii.audit_entry (\"user\", action, policy) VALUES ('pii_admin', 'disable_policy', 'shop')")
    old.sql(UPDATE)
    loosened = old.value("SELECT loosened FROM amazon_pii.status", user="pii_auditor")
    assert len(loosened) == 3
    assert "disabled by a version that asked for no reason" in loosened[0] and "redact_after is 60 days" in loosened[1]
    assert loosened[2] == "1 orders held for more than 30 days: dispute"


# Arguments that any function takes.
ARGUMENTS = {"text": "'x'", "jsonb": "'{}'", "boolean": "true", "bigint": "1", "timestamp with time zone": "now() + interval '1 day'"}


def test_functions_of_an_earlier_version_refuse(old):
    """Breaks when the new library works on the tables of an earlier version, or with the arguments of one of its functions."""
    before = snapshot(old), old.sql("SELECT * FROM amazon_pii.order_state ORDER BY order_key")
    functions = old.sql(
        "SELECT p.oid::regproc::text, p.prokind, ARRAY(SELECT format_type(t, NULL) FROM unnest(p.proargtypes) AS t) FROM pg_proc AS p "
        "WHERE p.pronamespace = 'amazon_pii'::regnamespace AND p.prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)")
    assert len(functions) > 14
    for name, kind, types in functions:
        arguments = ", ".join(ARGUMENTS[t] for t in types)
        with refused("55000", WORDS) as caught:
            old.sql(f"CALL {name}({arguments})" if kind == "p" else f"SELECT * FROM {name}({arguments})")
        assert caught.value.diag.message_hint.startswith("Run ALTER EXTENSION amazon_pii UPDATE"), name
    # A role hears of its rights first.
    with refused("42501"):
        old.sql("SELECT amazon_pii.peek('x', 'test')", user="nobody_special")
    with refused("42501", "append-only"):
        old.sql("DELETE FROM amazon_pii.audit_entry")
    assert (snapshot(old), old.sql("SELECT * FROM amazon_pii.order_state ORDER BY order_key")) == before


def test_the_shop_goes_on_before_the_update_and_nothing_is_missed(old):
    """P11: breaks when a statement of the shop's fails because the extension was not updated yet, or its rows are not found later."""
    session = old.session("shop_owner")
    del session.notices[:]
    add_order(old, 20)
    old.sql("UPDATE shop.addresses SET name = 'Comeback9' WHERE order_id = 9", user="shop_owner")
    old.sql("UPDATE shop.orders SET shipped_at = now() - interval '40 days' WHERE id = 5", user="shop_owner")
    old.sql("DELETE FROM shop.orders WHERE id = 4", user="shop_owner")
    old.sql("CREATE TABLE shop.more (id bigint)", user="shop_owner")
    told = [n for n in session.notices if WORDS in n]
    assert len(told) >= 5 and all("WARNING" in n for n in told), session.notices
    with old.connect("shop_owner") as copy, copy.cursor() as cursor:
        cursor.execute("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) SELECT 30 + i, %s || i, 'amazon', "
                       "now() - interval '40 days', 'Gift3x' FROM generate_series(1, 3) AS i", [number(3)[:-1]])
    assert found(old) == STATES
    old.sql(UPDATE)
    run_cycle(old)
    assert {order_value(old, o) for o in (5, 9, 20, 31, 32, 33)} == {"redacted"}
    assert [w for w in ("Comeback9", "Name20", "Name5", "Gift3x") if tables_with(old, w)] == []
    # That an order was deleted shows when it is due.
    old.sql("UPDATE amazon_pii.order_state SET anchor_at = anchor_at - interval '40 days', archive_due_at = now(), redact_due_at = now(), next_due_at = now() WHERE order_key = '[\"4\"]'")
    run_cycle(old)
    assert order_value(old, 4) == "gone"


def test_an_update_that_is_rolled_back_was_none(old):
    """Breaks when a session believes in a version that was there for a moment."""
    session = old.connect("postgres", autocommit=False)
    cursor = session.cursor()
    cursor.execute(UPDATE)
    cursor.execute("SELECT count(*) FROM amazon_pii.find_orders('x')")
    session.rollback()
    with refused("55000", WORDS):
        cursor.execute("SELECT count(*) FROM amazon_pii.find_orders('x')")
    session.rollback()
    cursor.execute(UPDATE)
    session.commit()
    cursor.execute("SELECT count(*) FROM amazon_pii.find_orders('x')")
    assert cursor.fetchone() == (0,)
    session.close()


def test_a_policy_can_be_applied_anew_before_the_first_cycle(old):
    """Breaks when apply_policy needs what the first cycle after an update writes down."""
    # That trigger is in the way of a policy, as it should be.
    old.sql("DROP TRIGGER refuse ON shop.addresses", user="shop_owner")
    old.sql(UPDATE)
    assert old.apply_policy(shop_policy(placeholder=PLACEHOLDER, retrieved_for="20 days")) == "shop version 2"
    assert old.sql("SELECT * FROM amazon_pii.unclassified", user="pii_auditor") == []
    run_cycle(old)
    assert order_value(old, 1) == "redacted" and tables_with(old, "Name1") == []


def test_the_worker_waits_for_the_update():
    """Breaks when the worker runs cycles on the tables of an earlier version, or needs a restart after the update."""
    server = server_with(before_start=keyed, preload=True, conf=["amazon_pii.naptime = '1s'"])
    try:
        db = load(server)
        said = "SELECT worker_error FROM amazon_pii.status"
        wait_until(lambda: WORDS in (db.value(said, user="pii_auditor") or ""))
        db.sql("UPDATE shop.orders SET shipped_at = now() - interval '40 days' WHERE id = 5", user="shop_owner")
        runs = db.value("SELECT count(*) FROM amazon_pii.run")
        beat = db.value("SELECT beat_at FROM amazon_pii.heartbeat")
        wait_until(lambda: db.value("SELECT beat_at FROM amazon_pii.heartbeat") > beat)
        assert tables_with(db, "Name5") == ["addresses"] and db.value("SELECT count(*) FROM amazon_pii.run") == runs
        db.sql(UPDATE)
        wait_until(lambda: tables_with(db, "Name5") == [])
        wait_until(lambda: db.value(said, user="pii_auditor") is None)
    finally:
        server.destroy()
