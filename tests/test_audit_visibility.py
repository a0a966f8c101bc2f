"""Who sees which entries of the audit log; and that operators get at personal data through the functions and in no other way."""
import json
from contextlib import closing

import psycopg2
import pytest
from support import add_customer, add_invoice, add_order, number, open_shop, refused, run_cycle, shop_policy, snapshot
from test_quota import REASON, call, peek

PII = ("Gift1", "Note1", "Name1", "Street 1", "City1", "First1", "Last1", "buyer1", "+49 555", "+49 666", "BillTo1", "LineNote1")
ADMIN, OPERATOR, AUDITOR = "pii_admin", "pii_operator", "pii_auditor"

# A person with two capabilities, and one who may take the operators' role without having its privileges.
PEOPLE = """
CREATE ROLE clerk LOGIN; GRANT amazon_pii_operator TO clerk;
CREATE ROLE chief LOGIN; GRANT amazon_pii_operator, amazon_pii_auditor TO chief;
CREATE ROLE temp LOGIN NOINHERIT; GRANT amazon_pii_operator, amazon_pii_auditor TO temp;
"""


@pytest.fixture
def shop(db):
    """Order 1 is redacted and a canary; two operators have opened it, and an administrator has worked."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    add_invoice(db, 1, 1)
    add_order(db, 2)
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.sql(PEOPLE)
    try:
        db.sql("SELECT amazon_pii.set_canary(%s)", [number(1)], ADMIN)
        peek(db, 1)
        peek(db, 1, user="clerk", actor="agent 1")
        peek(db, 2, user="clerk", actor="agent 2")
        yield db
    finally:
        for user in ("clerk", "chief", "temp"):
            if user in db._sessions:
                db._sessions.pop(user).close()
        db.sql("DROP OWNED BY clerk, chief, temp; DROP ROLE clerk, chief, temp")


LOG = 'SELECT "user", action, order_number FROM amazon_pii.audit_log ORDER BY at, action'
CLERKS = [("clerk", "peek", number(1)), ("clerk", "peek", number(2))]


def log(db, user, *before):
    with closing(db.connect(user)) as session, session.cursor() as cursor:
        for statement in before:
            cursor.execute(statement)
        cursor.execute(LOG)
        return cursor.fetchall()


def everything(db):
    rows = db.sql('SELECT "user", action, order_number FROM amazon_pii.audit_log')
    assert {r[1] for r in rows} >= {"apply_policy", "archive", "redact", "set_canary", "peek", "alarm"}
    return sorted(rows, key=str)


def test_operators_see_their_own_entries(shop):
    """Breaks when an operator sees what others have opened, an alarm, or not what they did themselves."""
    assert log(shop, "clerk") == CLERKS
    assert log(shop, OPERATOR) == [(OPERATOR, "peek", number(1))]
    call(shop, "retrieve", number(2), user="clerk")
    assert [r[1] for r in log(shop, "clerk")] == ["peek", "peek", "retrieve"]
    assert log(shop, "clerk", "SET amazon_pii.actor = 'agent 1'") == log(shop, "clerk"), "an actor is no proof, and hides nothing"


def test_operators_are_not_told_of_entries_in_between(shop):
    """Breaks when a gap in the numbers tells an operator that an alarm followed their call."""
    rows = shop.sql("SELECT audit_id, action FROM amazon_pii.audit_log", user="clerk")
    assert rows == [(None, "peek")] * 2
    assert None not in [r[0] for r in shop.sql("SELECT audit_id FROM amazon_pii.audit_log", user=AUDITOR)]
    assert None not in [r[0] for r in shop.sql("SELECT audit_id FROM amazon_pii.audit_log", user=ADMIN)]


def test_auditors_and_superusers_see_everything(shop):
    """Breaks when an alarm is hidden from those who are to act on it, also where they are operators too."""
    for user in (AUDITOR, "postgres", "chief"):
        assert sorted(log(shop, user), key=str) == everything(shop), user


def test_administrators_see_everything_but_alarms(shop):
    """Breaks when an administrator, who may be whom an alarm is about, sees it."""
    assert sorted(log(shop, ADMIN), key=str) == [r for r in everything(shop) if r[1] != "alarm"]


def test_nobody_else_sees_anything(shop):
    """Breaks when the view is granted too widely."""
    for user in ("nobody_special", "shop_owner"):
        with refused("42501"):
            log(shop, user)


def test_set_role_decides_what_and_not_whose(shop):
    """Breaks when SET ROLE shows somebody else's entries, or hides one's own."""
    shop.sql("GRANT clerk TO pii_operator")
    try:
        assert log(shop, OPERATOR, "SET ROLE clerk") == [(OPERATOR, "peek", number(1))]
    finally:
        shop.sql("REVOKE clerk FROM pii_operator")
    # Whoever does not inherit has to take a role, and has what it has.
    with refused("42501"):
        log(shop, "temp")
    assert log(shop, "temp", "SET ROLE amazon_pii_operator") == []
    assert sorted(log(shop, "temp", "SET ROLE amazon_pii_auditor"), key=str) == everything(shop)
    # The auditor's privileges end with the role that has them.
    assert log(shop, "chief", "SET ROLE amazon_pii_operator") == []
    assert log(shop, "postgres", "SET ROLE amazon_pii_operator") == []


def test_set_session_authorization(shop):
    """Breaks when a superuser who becomes somebody sees what that person does not."""
    assert log(shop, "postgres", "SET SESSION AUTHORIZATION clerk") == CLERKS
    assert log(shop, "postgres", "SET SESSION AUTHORIZATION clerk", "RESET SESSION AUTHORIZATION") != CLERKS
    with refused("42501"):
        log(shop, "clerk", "SET SESSION AUTHORIZATION pii_auditor")


def test_a_prepared_statement_heeds_the_role_of_the_moment(shop):
    """Breaks when a plan that was made for an auditor is used for an operator."""
    with closing(shop.connect("chief")) as session, session.cursor() as cursor:
        cursor.execute(f"PREPARE look AS {LOG}")
        for _ in range(8):
            cursor.execute("EXECUTE look")
            assert len(cursor.fetchall()) > 5
        cursor.execute("SET ROLE amazon_pii_operator")
        cursor.execute("EXECUTE look")
        assert cursor.fetchall() == []


def test_a_function_of_the_readers_sees_no_hidden_row(shop):
    """Breaks when a cheap function in WHERE is shown entries before the view has hidden them."""
    shop.sql("CREATE SCHEMA clerk AUTHORIZATION clerk")
    with closing(shop.connect("clerk")) as session, session.cursor() as cursor:
        cursor.execute("CREATE TABLE clerk.seen (who name, what text); CREATE FUNCTION clerk.leak(name, text) RETURNS boolean COST 0.0001 LANGUAGE plpgsql AS "
                       "'BEGIN INSERT INTO clerk.seen VALUES ($1, $2); RETURN true; END'")
        cursor.execute('SELECT count(*) FROM amazon_pii.audit_log WHERE clerk.leak("user", action)')
        cursor.execute("SELECT * FROM clerk.seen")
        assert cursor.fetchall() == [("clerk", "peek")] * 2
        with refused("42501"):
            cursor.execute("SELECT * FROM amazon_pii.audit_entry")


# Only through the functions

def test_an_operator_reads_personal_data_nowhere_else(shop):
    """Breaks when any relation of ours, of whatever kind, gives an operator something of a buyer's, or lets them write."""
    relations = shop.sql("SELECT c.oid::regclass::text, c.relkind FROM pg_class AS c WHERE c.relnamespace IN "
                         "('amazon_pii'::regnamespace, 'amazon_pii_archive'::regnamespace, 'shop'::regnamespace) AND c.relkind IN ('r', 'v', 'm', 'p', 'S', 'f')")
    assert len(relations) > 40
    readable = set()
    for name, kind in relations:
        try:
            rows = shop.sql(f"SELECT * FROM {name}", user="clerk")
        except psycopg2.errors.InsufficientPrivilege:
            continue
        readable.add(name)
        assert not [word for word in PII if word in str(rows)], name
    views = {"audit_log", "status", "unclassified", "runs", "by_age", "files", "orders", "records", "overdue", "upcoming", "kept_longer"}
    assert readable == {f"amazon_pii.{view}" for view in views}
    for name, kind in relations:
        for write in ("DELETE FROM {}", "TRUNCATE {}", "LOCK TABLE {}", "COPY {} TO STDOUT", "ALTER TABLE {} OWNER TO clerk"):
            if write.startswith("COPY") and (name in readable or kind == "v"):
                continue
            with pytest.raises(psycopg2.Error):
                shop.sql(write.format(name), user="clerk")


@pytest.mark.parametrize("statement", [
    "SET session_replication_role = replica", "SET amazon_pii.enabled = off", "SET amazon_pii.key_file = '/tmp/x'",
    "SET amazon_pii.key_command = 'echo'", "ALTER SYSTEM SET amazon_pii.enabled = off", "SET amazon_pii.quota = 1", "SET amazon_pii.bypass = on",
    "ALTER ROLE clerk SET amazon_pii.enabled = off", "SET ROLE amazon_pii_admin", "SET ROLE amazon_pii_auditor", "SET ROLE postgres",
    "ALTER TABLE amazon_pii.audit_entry DISABLE TRIGGER ALL", "CREATE TABLE amazon_pii.mine ()", "CREATE TABLE amazon_pii_archive.mine ()",
    "CREATE FUNCTION amazon_pii.peek(text) RETURNS text LANGUAGE sql AS 'SELECT $1'", "DROP FUNCTION amazon_pii.peek(text, text, text, text)",
    "CREATE OR REPLACE VIEW amazon_pii.audit_log AS SELECT 1", "ALTER EXTENSION amazon_pii UPDATE", "DROP EXTENSION amazon_pii CASCADE",
    "SELECT amazon_pii.take_turn('shop')", "SELECT pg_read_file('PG_VERSION')", "COPY (SELECT 1) TO PROGRAM 'true'",
    "SELECT lo_import('/etc/passwd')", "CREATE FUNCTION pg_temp.f() RETURNS void LANGUAGE c AS 'amazon_pii', 'peek_wrapper'",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'",
    "UPDATE amazon_pii.access_count SET orders = 0", "DELETE FROM amazon_pii.access_count", "DELETE FROM amazon_pii.canary",
])
def test_an_operator_cannot_get_around_the_guards(shop, statement):
    """Breaks when an operator can switch off what watches over them."""
    before = snapshot(shop)
    with closing(shop.connect("clerk")) as session, session.cursor() as cursor:
        # The library is loaded, and knows its settings: before that any name goes, and is dropped then.
        cursor.execute("SELECT * FROM amazon_pii.find_orders('nothing')")
        with pytest.raises(psycopg2.Error) as caught:
            cursor.execute(statement)
        assert caught.value.pgcode in ("42501", "55P02", "42602", "42704", "0A000"), caught.value
    assert snapshot(shop) == before


def test_shadows_of_the_server_do_not_reach_the_functions(shop):
    """Breaks when a temporary table or function of the operator's is taken for one of ours."""
    with closing(shop.connect("clerk", autocommit=False)) as session, session.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE canary (policy text, order_number text); CREATE TEMP TABLE access_count (policy text); "
                       "CREATE TEMP TABLE audit_entry (audit_id bigint); SET search_path = pg_temp, pg_catalog; "
                       "CREATE FUNCTION pg_temp.pg_has_role(name, text, text) RETURNS boolean LANGUAGE sql AS 'SELECT true'")
        before = shop.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'alarm'")
        cursor.execute("SELECT amazon_pii.peek(%s, %s)", [number(1), REASON])
        assert "Gift1" in json.dumps(cursor.fetchone()[0])
        session.rollback()
        assert shop.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'alarm'") == before + 1
        cursor.execute("SET search_path = pg_temp, pg_catalog")
        cursor.execute('SELECT DISTINCT "user" FROM amazon_pii.audit_log')
        assert cursor.fetchall() == [("clerk",)]
        session.rollback()
