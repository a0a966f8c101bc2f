"""The archive on a cold server: sealed here, sent, read back from there, and only then is anything overwritten."""
import json

import pytest
from cold import DATABASE, FOREIGN, HOST, ROLE, cold_server, join, status
from cluster import wait_until
from conftest import new_database
from support import (
    Background, cells_of, end_retrieval, fill, open_shop, order_number, order_value, refused, retrieve, run_cycle, shop_policy,
    states,
)

# Order, address, customer; of every third an invoice and its two lines.
LOCAL = "SELECT count(*) FROM amazon_pii_archive.document"


def documents_of(orders):
    return sum(3 + 3 * (order % 3 == 0) for order in range(1, orders + 1))


def a_day_later(db):
    """What was dispatched 29 and a half days ago is due."""
    db.sql("UPDATE shop.invoices SET invoiced_at = invoiced_at - interval '2 days'", user="shop_owner")
    db.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now()")


@pytest.fixture(scope="module")
def cold():
    server = cold_server()
    yield server
    server.destroy()


@pytest.fixture
def plain(cluster, cold):
    """A shop beside a cold server, not joined yet."""
    db = new_database(cluster)
    db.need_contrib("postgres_fdw")
    yield open_shop(db)
    db.drop()
    cold.sql("DROP SCHEMA IF EXISTS cold CASCADE", dbname=DATABASE)


@pytest.fixture
def far(plain, cold):
    """A shop whose archive is to be on the cold server."""
    return join(plain, cold)


def test_documents_go_there_and_nothing_stays_here(far, cold):
    # Breaks when copies stay in this database, are not there before anything is overwritten, or do not come back exactly.
    fill(far, 12)
    before = {n: cells_of(n) for n in range(1, 13)}
    far.apply_policy(shop_policy(archive=FOREIGN))
    assert run_cycle(far) == {"flagged": 12, "archived": 12, "redacted": 12, "failed": 0, "overdue": 0}
    assert set(states(far).values()) == {"redacted"}
    assert far.value(LOCAL) == 0
    assert cold.places() == (documents_of(12),) * 2
    row = status(far)
    assert (row["unsent"], row["to_delete"], row["down_since"], row["last_error"], row["deadline"]) == (0, 0, None, None, "wait")
    assert row["up_at"] and row["foreign_table"] == "cold.document"
    number = order_number(6)
    assert "'Gift 6'" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [number], "pii_operator"))
    rows = retrieve(far, number)
    assert sum(r[3] for r in rows) == before[6] + 4 and states(far)[6] == "original"
    end_retrieval(far, number)
    assert run_cycle(far)["redacted"] == 1 and set(states(far).values()) == {"redacted"}
    # The same values are the same copy.
    assert cold.places() == (documents_of(12),) * 2
    assert far.sql("SELECT * FROM amazon_pii.verify('shop')", user="pii_auditor") == []


def test_the_cold_server_sees_no_personal_data_and_no_key(far, cold):
    # Breaks when a document travels in clear, or a data key goes along.
    fill(far, 6)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    retrieve(far, order_number(2))
    there = cold.log_text() + str(cold.documents("order_key, table_name, record_key, version, sealed, key_id"))
    there += str([bytes(sealed) for (sealed, *_) in cold.documents("sealed, 1, 1, 1")])
    assert "INSERT INTO cold.document" in there
    for canary in ("Gift 2", "Name 2", "Street 2", "Last 2", "c2@example", "Bill 3", "Line 3.1", "wrapped"):
        assert canary not in there
    wrapped = [bytes(w).hex() for (w,) in far.sql("SELECT wrapped FROM amazon_pii_archive.data_key")]
    assert len(wrapped) == 6 and not any(w in there for w in wrapped)


def test_archived_on_day_29_and_redacted_on_day_30(far, cold):
    # Breaks when what was sent with the archive is not read back when its order is redacted.
    fill(far, 6, age="29 days 12 hours")
    far.apply_policy(shop_policy(archive=FOREIGN))
    assert run_cycle(far) == {"flagged": 6, "archived": 6, "redacted": 0, "failed": 0, "overdue": 0}
    assert cold.places() == (documents_of(6),) * 2 and far.value(LOCAL) == 0
    assert set(states(far).values()) == {"original"}
    # An edit in between is archived again first.
    far.sql("UPDATE shop.orders SET gift_message = 'Another' WHERE id = 2", user="shop_owner")
    a_day_later(far)
    assert run_cycle(far)["redacted"] == 6
    assert cold.places() == (documents_of(6) + 1,) * 2
    assert "'Another'" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))


def test_rows_that_share_a_customer_and_several_batches(far, cold):
    # Breaks when batches mix up what they read back, or a shared row goes without its copies.
    fill(far, 90, share=3)
    far.apply_policy(shop_policy(archive=FOREIGN))
    far.sql("LOAD 'amazon_pii'")
    far.sql("ALTER SYSTEM SET amazon_pii.batch_size = 20")
    far.cluster.reload()
    try:
        wait_until(lambda: far.value("SHOW amazon_pii.batch_size", user="pii_admin") == "20")
        assert run_cycle(far)["redacted"] == 90
    finally:
        far.sql("ALTER SYSTEM RESET amazon_pii.batch_size")
        far.cluster.reload()
    assert set(states(far).values()) == {"redacted"}
    assert far.value("SELECT count(*) FROM shop.customers WHERE email <> '[Redacted]'") == 0
    assert cold.places() == (documents_of(90),) * 2 and far.value(LOCAL) == 0


def test_a_copy_that_is_not_there_proves_nothing(far, cold):
    """P1 on the cold server: breaks when the copy that was written here, and not what is read back from there, is believed."""
    fill(far, 5)
    far.apply_policy(shop_policy(archive=FOREIGN))
    # The server takes the documents of one order, says that it did, and keeps none.
    cold.sql("""CREATE FUNCTION cold.drop_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.order_key = '["3"]' THEN RETURN NULL; END IF; RETURN NEW; END $$""", dbname=DATABASE)
    cold.sql("CREATE TRIGGER drop_it BEFORE INSERT ON cold.document FOR EACH ROW EXECUTE FUNCTION cold.drop_it()", dbname=DATABASE)
    assert run_cycle(far)["redacted"] == 4
    assert states(far)[3] == "original" and list(states(far).values()).count("redacted") == 4
    assert far.value(LOCAL) == 6 and status(far)["unsent"] == 6
    cold.sql("DROP TRIGGER drop_it ON cold.document", dbname=DATABASE)
    far.sql("UPDATE amazon_pii.order_state SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")
    assert run_cycle(far)["redacted"] == 1
    assert cold.places() == (documents_of(5),) * 2 and far.value(LOCAL) == 0


def test_a_damaged_copy_proves_nothing(far, cold):
    # Breaks when the bytes that come back are not opened, or one order's damage stops others.
    fill(far, 4, age="29 days 12 hours")
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    cold.sql("""UPDATE cold.document SET sealed = set_byte(sealed, 20, get_byte(sealed, 20) # 1) WHERE order_key = '["2"]' AND table_name = 'shop.addresses'""",
             dbname=DATABASE)
    a_day_later(far)
    counts = run_cycle(far)
    assert (counts["redacted"], counts["failed"]) == (3, 1) and states(far)[2] == "original"
    assert order_value(far, 2, "last_error").startswith("XX001")
    with refused("XX001", "cannot be opened"):
        far.sql("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator")


def test_documents_of_another_order_are_not_taken_for_its_own(far, cold):
    # Breaks when the cold server's administrator can swap documents.
    fill(far, 4, age="29 days 12 hours")
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    cold.sql("""UPDATE cold.document d SET sealed = o.sealed FROM cold.document o WHERE d.order_key = '["2"]' AND o.order_key = '["1"]'
                AND d.table_name = 'shop.addresses' AND o.table_name = 'shop.addresses'""", dbname=DATABASE)
    a_day_later(far)
    assert run_cycle(far)["redacted"] == 3 and states(far)[2] == "original"


def test_shredding_needs_no_server(far, cold):
    # Breaks when shred waits for the cold server, leaves a key, or the documents are never deleted there.
    fill(far, 4)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    cold.stop()
    try:
        far.sql("SELECT amazon_pii.shred(%s, 'asked by the buyer')", [order_number(2)], "pii_admin")
    finally:
        cold.start()
    assert far.value("""SELECT count(*) FROM amazon_pii_archive.data_key WHERE order_key = '["2"]'""") == 0
    assert cold.count("""order_key = '["2"]'""") == 3 and status(far)["to_delete"] == 1
    with refused("42704", "no longer exists"):
        retrieve(far, order_number(2))
    run_cycle(far)
    assert cold.count("""order_key = '["2"]'""") == 0 and cold.places() == (documents_of(4) - 3,) * 2
    assert status(far)["to_delete"] == 0
    # What is imported again gets a new key, and copies that nothing deletes.
    far.sql("UPDATE shop.orders SET gift_message = 'Again' WHERE id = 2", user="shop_owner")
    assert run_cycle(far)["redacted"] == 1
    run_cycle(far)
    assert cold.documents("key_id, table_name, version, 1", """order_key = '["2"]'""") == [("2", "shop.orders", 1, 1)] \
        or cold.documents("key_id, table_name, 1, 1", """order_key = '["2"]'""") == [("2", "shop.orders", 1, 1)]
    assert "'Again'" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))


def test_forgotten_orders_and_archives_past_their_time(far, cold):
    # Breaks when a cycle's own end of an archive does not reach the cold server.
    fill(far, 4)
    far.apply_policy(shop_policy(archive=FOREIGN, archive_for="1 year"))
    run_cycle(far)
    far.sql("SELECT amazon_pii.forget(%s, 'asked by the buyer')", [order_number(1)], "pii_admin")
    far.sql("""UPDATE amazon_pii.order_state SET redacted_at = now() - interval '2 years' WHERE order_key = '["4"]'""")
    # Nothing else says that there is something to do.
    far.sql("UPDATE amazon_pii.policy SET last_error = NULL")
    run_cycle(far)
    run_cycle(far)
    assert {k for (k, *_) in cold.documents()} == {'["2"]', '["3"]'}
    assert far.value("SELECT count(*) FROM amazon_pii_archive.data_key") == 2


def test_changes_of_keys_are_followed(far, cold):
    # Breaks when the copies of an order, or of a record, whose key changed stay under the old one there, or are lost.
    fill(far, 4)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    far.sql("ALTER TABLE shop.orders DROP CONSTRAINT orders_customer_id_fkey", user="shop_owner")
    far.sql("UPDATE shop.customers SET id = 1004 WHERE id = 4", user="shop_owner")
    far.sql("UPDATE shop.orders SET customer_id = 1004 WHERE id = 4", user="shop_owner")
    run_cycle(far)
    assert cold.documents("record_key, 1, 1, 1", "table_name = 'shop.customers'") == [(f'["{c}"]', 1, 1, 1) for c in (1, 1004, 2, 3)]
    assert cold.places() == (documents_of(4),) * 2 and far.value(LOCAL) == 0
    assert "'Last 4'" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(4)], "pii_operator"))


def test_an_archive_of_this_database_moves_there(plain, cold):
    # Breaks when documents are left behind, or are not found while some are here and some there.
    fill(plain, 6)
    plain.apply_policy(shop_policy())
    run_cycle(plain)
    assert plain.value(LOCAL) == documents_of(6)
    join(plain, cold)
    plain.apply_policy(shop_policy(archive=FOREIGN))
    assert "'Gift 2'" in str(plain.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))
    run_cycle(plain)
    assert cold.places() == (documents_of(6),) * 2 and plain.value(LOCAL) == 0
    assert "'Gift 2'" in str(plain.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))
    # And not back, unless everything was taken along.
    with refused("22023", "still holds documents"):
        plain.apply_policy(shop_policy())
    assert [r for r in plain.check_policy(shop_policy()) if r[0] == "error"][0][1] == "cold.document"
    plain.sql("""INSERT INTO amazon_pii_archive.document (policy, order_key, table_name, record_key, version, sealed, key_id, archived_at)
                 SELECT * FROM cold.document; DELETE FROM cold.document""")
    plain.apply_policy(shop_policy())
    assert "'Gift 2'" in str(plain.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))


def test_an_idle_cycle_asks_nobody(far, cold):
    # Breaks when every cycle connects.
    fill(far, 3)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    run_cycle(far)
    asked = cold.log_text().count("cold.document")
    assert run_cycle(far) == dict.fromkeys(("flagged", "archived", "redacted", "failed", "overdue"), 0)
    assert cold.log_text().count("cold.document") == asked


def test_documents_travel_together(far, cold):
    # Breaks when documents are sent, or orders asked for, one by one.
    far.apply_policy(shop_policy(archive=FOREIGN))
    fill(far, 200)
    before = cold.log_text()
    assert run_cycle(far)["redacted"] == 200
    said = cold.log_text()[len(before):]
    assert cold.places() == (documents_of(200),) * 2
    assert 1 <= said.count("INSERT INTO cold.document") < 20 and 1 <= said.count("SELECT order_key, table_name") < 60


def test_nothing_of_the_shop_is_locked_while_the_server_is_asked(far, cold):
    # Breaks when rows, tables or states are locked during an access to the cold server.
    fill(far, 5)
    far.apply_policy(shop_policy(archive=FOREIGN))
    gate = cold.connect(dbname=DATABASE, autocommit=False)
    with gate.cursor() as cursor:
        cursor.execute("LOCK TABLE cold.document IN ACCESS EXCLUSIVE MODE")
    cycle = Background(far, "CALL amazon_pii.run_cycle('shop')")
    try:
        wait_until(lambda: cold.sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s AND wait_event_type = 'Lock'", [ROLE]))
        held = far.sql("""SELECT l.relation::regclass::text, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                          WHERE l.pid = %s AND c.relnamespace IN ('shop'::regnamespace) """, [cycle.pid])
        assert held == []
        with far.connect("shop_owner", autocommit=False) as shop, shop.cursor() as cursor:
            cursor.execute("LOCK TABLE shop.orders, shop.addresses, shop.customers IN ACCESS EXCLUSIVE MODE NOWAIT")
            shop.rollback()
        assert far.sql("SELECT count(*) FROM (SELECT FROM amazon_pii.order_state FOR UPDATE NOWAIT) AS s") == [(5,)]
    finally:
        gate.rollback()
        gate.close()
    assert cycle.result()[0][2] == 5


# The foreign table, checked.


def problems(db, severity=None):
    rows = db.sql("SELECT * FROM amazon_pii.check_archive('cold.document')", user="pii_admin")
    return [(r[1], r[2]) for r in rows if severity in (None, r[0])]


def test_what_archive_ddl_prints_makes_a_right_table(far, cold):
    assert problems(far) == []
    rows = far.sql("SELECT DISTINCT run_on FROM amazon_pii.archive_ddl()", user="pii_admin")
    assert sorted(rows) == [("cold server",), ("here",)]
    assert cold.count() == 0


@pytest.mark.parametrize("statement, severity, words", [
    ("DROP FOREIGN TABLE cold.document", "error", "does not exist"),
    ("DROP FOREIGN TABLE cold.document; CREATE TABLE cold.document (policy text)", "error", "is no foreign table"),
    ("ALTER FOREIGN TABLE cold.document OWNER TO other_owner", "error", "of a role that is neither"),
    ("ALTER SCHEMA cold OWNER TO other_owner", "error", "of a role that is neither"),
    ("GRANT USAGE ON FOREIGN DATA WRAPPER postgres_fdw TO other_owner; ALTER SERVER cold OWNER TO other_owner", "error", "of a role that is neither"),
    ("CREATE FUNCTION cold.t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
     "CREATE TRIGGER t BEFORE INSERT ON cold.document FOR EACH ROW EXECUTE FUNCTION cold.t()", "error", "triggers, constraints, or expressions"),
    ("ALTER FOREIGN TABLE cold.document ADD CHECK (version > 0)", "error", "triggers, constraints, or expressions"),
    ("ALTER FOREIGN TABLE cold.document DROP COLUMN key_id", "error", 'has no column "key_id"'),
    ("ALTER FOREIGN TABLE cold.document ALTER COLUMN version TYPE int", "error", 'column "version" has type integer'),
    ("ALTER FOREIGN TABLE cold.document ALTER COLUMN sealed TYPE text", "error", 'column "sealed" has type text'),
    ("DROP USER MAPPING FOR postgres SERVER cold", "error", "has no user mapping"),
    ("DROP USER MAPPING FOR postgres SERVER cold; CREATE USER MAPPING FOR PUBLIC SERVER cold OPTIONS (user 'x', password 'x')", "warning",
     "user mapping for everybody"),
    ("ALTER SERVER cold OPTIONS (SET sslmode 'require')", "warning", "does not verify"),
    ("ALTER SERVER cold OPTIONS (DROP tcp_user_timeout)", "warning", "vanishes from the network"),
    ("ALTER SERVER cold OPTIONS (DROP batch_size)", "warning", "one by one"),
    ("ALTER SERVER cold OPTIONS (SET dbname 'nowhere')", "error", "cannot be used: 08001"),
    ("ALTER FOREIGN TABLE cold.document OPTIONS (SET table_name 'nothing')", "error", "cannot be used: 42P01"),
])
def test_what_is_wrong_with_a_foreign_table_is_said(far, cold, statement, severity, words):
    far.sql(statement)
    found = problems(far, severity)
    assert any(words in problem for _, problem in found), found
    if severity == "error":
        with refused("22023", words) if "08001" not in words else refused("22023"):
            far.apply_policy(shop_policy(archive=FOREIGN))
        assert far.value("SELECT count(*) FROM amazon_pii.policies") == 0


@pytest.mark.parametrize("statement, severity, words", [
    ("ALTER TABLE cold.document DROP CONSTRAINT document_pkey", "warning", "same document twice"),
    ("ALTER TABLE cold.document ALTER COLUMN version TYPE double precision", "error", "22P02"),
    (f"REVOKE INSERT ON cold.document FROM {ROLE}", "error", "42501"),
    (f"REVOKE DELETE ON cold.document FROM {ROLE}", "error", "42501"),
    ("ALTER TABLE cold.document ADD CHECK (version < 5)", "error", "23514"),
])
def test_what_is_wrong_on_the_cold_server_is_said(far, cold, statement, severity, words):
    cold.sql(statement, dbname=DATABASE)
    assert any(words in problem for _, problem in problems(far, severity)), problems(far)
    assert cold.count() == 0


def test_the_certificate_is_checked(far, cold):
    # Breaks when the server at the other end may be anybody.
    far.sql("ALTER SERVER cold OPTIONS (SET host 'elsewhere.example')")
    assert "08001" in problems(far, "error")[0][1]
    far.sql(f"ALTER SERVER cold OPTIONS (SET host '{HOST}')")
    assert problems(far) == []


def test_nobody_else_reaches_the_archive_through_it(far, cold):
    """P8: breaks when the caller's own mapping or rights are used, or are needed."""
    fill(far, 3)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    for role in ("pii_operator", "pii_admin", "pii_auditor", "shop_owner"):
        far.sql(f"GRANT USAGE ON FOREIGN SERVER cold TO {role}")
        far.sql(f"CREATE USER MAPPING FOR {role} SERVER cold OPTIONS (user 'nobody', password 'wrong')")
        with refused("42501"):
            far.sql("SELECT * FROM cold.document", user=role)
    # A new session: with its own mapping the operator could not even connect.
    assert "'Gift 2'" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))
    users = {u for (u,) in cold.sql("SELECT DISTINCT usename FROM pg_stat_activity WHERE datname = %s AND usename IS NOT NULL", [DATABASE])}
    assert users <= {ROLE, "postgres"}


def test_a_policy_says_what_it_cannot_do(far):
    orphan = shop_policy(archive=FOREIGN)
    orphan["orders"]["assign_customer"] = {"column": "customer_id", "to": "1", "orphan": "now"}
    with refused("22023", "before its order"):
        far.apply_policy(orphan)
    with refused("22023", "needs a foreign archive"):
        far.apply_policy(shop_policy(deadline="spool"))
    with refused("22023", "needs its schema"):
        far.apply_policy(shop_policy(archive={"foreign_table": "document"}))
    assert json.dumps(far.sql("SELECT * FROM amazon_pii.archive_status", user="pii_auditor")) == "[]"
