"""verify: archived values of redacted orders are looked for in tables. Each test leaves something behind, or nothing, and
says what must be found where."""
import json

import psycopg2
import pytest
from cluster import SUPERUSER, wait_until
from support import (
    Background, absent, add_customer, add_invoice, add_order, fill, number, open_shop, record_states, refused, report_statistics,
    retrieve, run_cycle, shop_policy,
)

FOUND = "personal data found"
SCOPES = ("linked", "schema", "database")


def verify(db, scope="linked", user="pii_admin", policy="shop"):
    return db.sql("SELECT * FROM amazon_pii.verify(%s, %s)", [policy, scope], user)


def found(db, scope="linked", user="pii_admin", policy="shop"):
    """{table.column: orders} of what was found; nothing else is reported."""
    rows = verify(db, scope, user, policy)
    assert [r for r in rows if r[2] != FOUND] == []
    return {f"{table}.{column}": orders for table, column, _, orders in rows}


def unsearched(db, scope="schema", user="pii_admin"):
    rows = verify(db, scope, user)
    assert [r for r in rows if r[2] == FOUND] == []
    return {(table, column, problem) for table, column, problem, _ in rows}


def behind(db, statement, parameters=None):
    """A statement of a superuser under which no trigger fires: neither the shop's nor the extension's."""
    with db.connect() as session, session.cursor() as cursor:
        cursor.execute("SET session_replication_role = replica")
        cursor.execute(statement, parameters)


@pytest.fixture
def shop(db):
    """Orders 1 to 3 are redacted, with customers and invoices of their own; 4 is of another channel."""
    open_shop(db)
    db.apply_policy(shop_policy())
    return db


def orders(db, *numbers):
    for i in numbers:
        add_customer(db, i)
        add_order(db, i, customer=i)
        add_invoice(db, i, i)
    add_customer(db, 4)
    add_order(db, 4, channel="web", customer=4)
    assert run_cycle(db)["redacted"] == len(numbers)


@pytest.fixture
def redacted(shop):
    orders(shop, 1, 2, 3)
    return shop


def test_of_a_clean_database_nothing_is_reported(shop):
    """Breaks when what redaction leaves, or what others have, is taken for personal data that should be gone."""
    fill(shop, 60, share=2)
    fill(shop, 90, first=61, channel="web")
    fill(shop, 120, first=91, age="2 days")
    assert run_cycle(shop)["redacted"] == 60
    for scope in SCOPES:
        assert verify(shop, scope) == []


def test_nothing_is_looked_for_before_anything_is_redacted(shop):
    add_order(shop, 1, shipped="2 days")
    assert verify(shop) == []


# Where it may have been left


def test_a_redacted_row_that_was_written_to(redacted):
    """Breaks when rows of redacted orders are not searched, in one of their tables."""
    behind(redacted, "UPDATE shop.orders SET gift_message = 'Dear NAME1, have fun' WHERE id = 1; "
                     "UPDATE shop.addresses SET line1 = 'c/o street  2' WHERE order_id IN (1, 2); "
                     "UPDATE shop.customers SET email = 'buyer3@example.invalid', last_name = 'buyer1@EXAMPLE.invalid' WHERE id = 3; "
                     "UPDATE shop.invoice_lines SET note = 'BillTo2, LineNote3' WHERE id = 1")
    expected = {"shop.addresses.line1": 1, "shop.customers.email": 1, "shop.customers.last_name": 1, "shop.invoice_lines.note": 2}
    # Name1 is too short to tell anything.
    for scope in SCOPES:
        assert found(redacted, scope) == expected


def test_a_column_of_the_policys_tables_that_it_does_not_name(redacted):
    redacted.sql("ALTER TABLE shop.orders ADD search text; UPDATE shop.orders SET search = 'street 1 city2 Street 3' WHERE id = 4", user="shop_owner")
    assert found(redacted) == {"shop.orders.search": 2}


def test_a_row_that_is_new_on_a_redacted_order(redacted):
    """Breaks when only rows are judged that the order lists."""
    behind(redacted, "INSERT INTO shop.addresses (order_id, name, line1) VALUES (1, 'x', 'Street 1'), (4, 'x', 'Street 2')")
    assert found(redacted) == {"shop.addresses.line1": 1}, "the second is the web order's"


def test_a_history_that_a_trigger_fills(shop):
    """Breaks when tables outside of the policy are not searched, or are in the wrong scope."""
    shop.sql("CREATE TABLE shop.history (n bigint GENERATED ALWAYS AS IDENTITY, old shop.customers); "
             "CREATE FUNCTION shop.keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO shop.history (old) VALUES (OLD); RETURN NEW; END'; "
             "CREATE TRIGGER keep BEFORE UPDATE ON shop.customers FOR EACH ROW EXECUTE FUNCTION shop.keep()", user="shop_owner")
    orders(shop, 1, 2)
    assert found(shop) == {}
    assert found(shop, "schema") == found(shop, "database") == {"shop.history.old": 2}


def test_other_schemas(redacted):
    redacted.sql("CREATE SCHEMA theirs; CREATE TABLE theirs.export (line text); INSERT INTO theirs.export VALUES ('1;Street 1;City1'), ('2;Street 2;')",
                 user="other_owner")
    assert found(redacted) == found(redacted, "schema") == {}
    assert found(redacted, "database") == {"theirs.export.line": 2}


@pytest.mark.parametrize("declared, value", [
    ("text", "STREET 1"),
    ("varchar(40)", "Street\t1."),
    ("char(40)", "Street 1"),
    ("name", "Street 1"),
    ("json", '{"a": [{"to": "Street 1"}]}'),
    ("json", '{"note": "to\\nStr\\u0065et 1\\n"}'),
    ("jsonb", '{"Street 1": true}'),
    ("text", '{"note": "to\\nStreet 1\\n"}'),
    ("text[]", '{x,"Street 1"}'),
    ("jsonb[]", '{"{\\"to\\": \\"Street 1\\"}"}'),
    ("tsvector", "'1':19 'street':18 'to':17"),
    ("shop.street", "Street 1"),
    ("shop.streets", '{"Street 1"}'),
    ("shop.place", '(1,"Street 1")'),
    ("xml", "<to>Street 1</to>"),
    ("text", "call +49 (666) 00-01!"),
    ("text", "496660001"),
    ("jsonb", '{"phone": 496660001}'),
])
def test_forms_in_which_a_value_is_found(redacted, declared, value):
    """Breaks when a type is not read, or a value not recognised in its form."""
    redacted.sql("CREATE DOMAIN shop.street AS varchar(40) CHECK (VALUE <> ''); CREATE DOMAIN shop.streets AS text[]; "
                 "CREATE TYPE shop.place AS (n int, line shop.street)", user="shop_owner")
    if absent(redacted, declared):
        pytest.skip(f"this server has no {declared}")
    redacted.sql(f"CREATE TABLE shop.notes (id int, v {declared})", user="shop_owner")
    redacted.sql("INSERT INTO shop.notes VALUES (1, NULL), (2, %s)", [value], "shop_owner")
    assert found(redacted, "schema") == {"shop.notes.v": 1}


def test_words_of_a_search_vector_that_the_server_made(redacted):
    redacted.sql("CREATE TABLE shop.search (id int, v tsvector); INSERT INTO shop.search VALUES (1, to_tsvector('simple', 'An order that goes to Street 2, City1'))",
                 user="shop_owner")
    assert found(redacted, "schema") == {"shop.search.v": 1}


@pytest.mark.parametrize("kind", ["partitioned", "inherited", "materialized"])
def test_kinds_of_tables(redacted, kind):
    script = {
        "partitioned": "CREATE TABLE shop.log (id int, v text) PARTITION BY RANGE (id); "
                       "CREATE TABLE shop.log_1 PARTITION OF shop.log FOR VALUES FROM (1) TO (9); INSERT INTO shop.log VALUES (1, 'Street 1')",
        "inherited": "CREATE TABLE shop.base (v text); CREATE TABLE shop.log () INHERITS (shop.base); INSERT INTO shop.log VALUES ('Street 1')",
        "materialized": "CREATE MATERIALIZED VIEW shop.log AS SELECT 'Street 1'::text AS v; CREATE VIEW shop.seen AS SELECT v FROM shop.log",
    }
    redacted.sql(script[kind], user="shop_owner")
    assert found(redacted, "schema") == {"shop.log.v": 1}


def test_values_inside_documents(db):
    """Breaks when what stays in a JSON document is looked for, or what goes from it is not, or an earlier version is not."""
    open_shop(db)
    db.apply_policy(shop_policy(linked=[{"table": "shop.payloads", "on": {"order_id": "id"}, "redact": {"raw": {"json": ["$.buyer", "$.tags[*]"]}}}]))
    add_order(db, 1)
    raw = {"id": "Amazon-1", "status": "Shipped", "buyer": {"name": "Ada Invented", "tax": 123456789}, "tags": ["blue tit", "x"]}
    db.sql("INSERT INTO shop.payloads (order_id, raw) VALUES (1, %s)", [json.dumps(raw)], "shop_owner")
    run_cycle(db)
    db.sql("CREATE TABLE shop.notes (n text, s text, t text, x text); INSERT INTO shop.notes VALUES ('ada invented', 'Shipped Amazon-1', '123456789', 'Blue Tit')",
           user="shop_owner")
    assert found(db) == {}
    assert found(db, "schema") == {"shop.notes.n": 1, "shop.notes.t": 1, "shop.notes.x": 1}
    # It came back as something else, and was archived and redacted once more: both are looked for.
    db.sql("UPDATE shop.payloads SET raw = jsonb_set(raw, '{buyer,name}', '\"Bob Invented\"')", user="shop_owner")
    run_cycle(db)
    db.sql("UPDATE shop.notes SET s = 'Bob Invented'", user="shop_owner")
    assert found(db, "schema") == {"shop.notes.n": 1, "shop.notes.s": 1, "shop.notes.t": 1, "shop.notes.x": 1}


def test_what_redaction_writes_is_nobodys(db):
    """Breaks when a value that somebody had is found wherever redaction writes the same."""
    open_shop(db)
    db.apply_policy(shop_policy(orders={**shop_policy()["orders"], "redact": {"gift_message": {"value": "nothing to say"}, "shop_note": "placeholder"}}))
    add_order(db, 1)
    add_order(db, 2)
    db.sql("UPDATE shop.orders SET shop_note = 'Nothing to say' WHERE id = 1", user="shop_owner")
    assert run_cycle(db)["redacted"] == 2
    assert db.sql("SELECT DISTINCT gift_message, shop_note FROM shop.orders") == [("nothing to say", "[Redacted]")]
    assert verify(db) == []


# What is there rightfully


def test_an_order_that_is_not_redacted_has_its_values(shop):
    """Breaks when a buyer who comes back is an alarm: in the order's rows, in a shared row, in a derived column."""
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    add_order(shop, 2, shipped="2 days", customer=1)
    shop.sql("UPDATE shop.addresses SET name = 'Ada Invented', line1 = 'Street 1', phone = '+49 666 0001'; "
             "ALTER TABLE shop.orders ADD search tsvector; UPDATE shop.orders SET search = to_tsvector('simple', 'Ada Invented, Street 1') WHERE id = 2; "
             "CREATE TABLE shop.mails (body text); INSERT INTO shop.mails VALUES ('Dear Ada Invented, 496660001, buyer1@example.invalid, City1')",
             user="shop_owner")
    run_cycle(shop)
    assert record_states(shop, "shop.customers", 1) == {1: "waiting"}
    for scope in SCOPES:
        assert found(shop, scope) == {}
    # Once the second order is done too, all of it is found.
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert found(shop, "schema") == {"shop.orders.search": 2, "shop.mails.body": 2}


def test_what_was_retrieved_is_there_rightfully(redacted):
    retrieve(redacted, number(1))
    # Even where it did not come back: its row is gone.
    behind(redacted, "DELETE FROM shop.addresses WHERE order_id = 1")
    redacted.sql("CREATE TABLE shop.mails (body text); INSERT INTO shop.mails VALUES ('Street 1'), ('Street 2')", user="shop_owner")
    assert found(redacted, "schema") == {"shop.mails.body": 1}


def test_a_customer_of_the_shops_own(redacted):
    """Breaks when rows that no order uses are judged alike: one was never a buyer's at Amazon, one is left of a deleted order."""
    redacted.sql("INSERT INTO shop.customers (id, email) VALUES (99, 'buyer1@example.invalid')", user="shop_owner")
    assert found(redacted) == {}
    redacted.sql("DELETE FROM shop.orders WHERE id = 2", user="shop_owner")
    behind(redacted, "UPDATE shop.customers SET email = 'buyer2@example.invalid' WHERE id = 2")
    assert found(redacted) == {"shop.customers.email": 1}


def test_a_row_that_another_policy_keeps(redacted):
    """Breaks when only the orders of the policy that is verified count."""
    other = {"policy": "other", "orders": {"table": "shop.sales", "number": "no", "anchor": "at"},
             "linked": [{"table": "shop.customers", "on": {"id": "customer"}, "redact": ["first_name", "last_name", "email", "phone"]}]}
    redacted.sql("CREATE TABLE shop.sales (id bigint PRIMARY KEY, no text, at timestamptz, customer bigint); CREATE INDEX ON shop.sales (customer); "
                 "INSERT INTO shop.sales VALUES (1, '303-1234567-0000001', NULL, 1)", user="shop_owner")
    redacted.apply_policy(other)
    behind(redacted, "UPDATE shop.customers SET email = 'buyer1@example.invalid' WHERE id = 1")
    assert found(redacted) == {}
    redacted.sql("SELECT amazon_pii.drop_policy('other', 'test')", user="pii_admin")
    assert found(redacted) == {"shop.customers.email": 1}


# What cannot be searched


def test_what_could_not_be_searched_is_said(redacted):
    """Breaks when a column or table is passed over in silence."""
    redacted.sql("CREATE TABLE shop.files (id int, name text, content bytea, parts bytea[]); "
                 "CREATE TABLE shop.hidden (v text); INSERT INTO shop.hidden VALUES ('Street 1'); ALTER TABLE shop.hidden ENABLE ROW LEVEL SECURITY; "
                 "ALTER TABLE shop.hidden FORCE ROW LEVEL SECURITY; "
                 "CREATE TABLE shop.locked (v text); REVOKE ALL ON shop.locked FROM shop_owner; "
                 "CREATE TABLE shop.numbers (a int, b date, c uuid, d numeric, e boolean)", user="shop_owner")
    expected = {
        ("shop.files", "content", "not searched: bytea"), ("shop.files", "parts", "not searched: bytea"),
        ("shop.hidden", None, "not searched: row-level security applies to its owner"),
        ("shop.locked", None, "not searched: the table owner lacks a privilege (42501)"),
    }
    if redacted.has_contrib("file_fdw"):
        redacted.sql("CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; "
                     "CREATE FOREIGN TABLE shop.remote (v text) SERVER files OPTIONS (filename '/nowhere')")
        expected.add(("shop.remote", None, "not searched: foreign table"))
    assert unsearched(redacted) == expected
    assert unsearched(redacted, "linked") == set()


def test_a_table_that_somebody_locked_is_not_waited_for(redacted):
    redacted.sql("CREATE TABLE shop.busy (v text); CREATE TABLE shop.zoo (v text); INSERT INTO shop.zoo VALUES ('Street 1')", user="shop_owner")
    session = redacted.connect("shop_owner", autocommit=False)
    session.cursor().execute("LOCK TABLE shop.busy")
    rows = verify(redacted, "schema")
    session.rollback()
    assert rows == [("shop.zoo", "v", FOUND, 1), ("shop.busy", None, "not searched: a lock could not be had in time (55P03)", None)]


def test_a_document_that_cannot_be_opened(redacted):
    """Breaks when a damaged archive looks like a clean shop."""
    redacted.sql("UPDATE amazon_pii_archive.document SET sealed = sealed || '\\x00' WHERE table_name = 'shop.addresses' AND order_key <> '[\"3\"]'; "
                 "DELETE FROM amazon_pii_archive.data_key WHERE order_key = '[\"3\"]'")
    rows = set(verify(redacted))
    problem = "not compared: an archived document cannot be opened"
    assert ("shop.addresses", None, problem, 3) in rows and ("shop.customers", None, problem, 1) in rows


def test_a_key_that_the_archive_does_not_follow_yet(redacted):
    redacted.sql("UPDATE shop.invoice_lines SET id = 77 WHERE id = 1", user="shop_owner")
    assert unsearched(redacted, "linked") == {("shop.invoice_lines", None, "not compared: the archive follows a change of keys with the next cycle")}
    run_cycle(redacted)
    assert verify(redacted) == []


def test_errors_are_clear(redacted):
    with refused("42704", "does not exist"):
        verify(redacted, policy="nothing")
    with refused("22023", "unknown scope"):
        verify(redacted, "everything")
    redacted.sql("ALTER TABLE amazon_pii_archive.document RENAME TO elsewhere")
    with refused("08006", "cannot be read"):
        verify(redacted)


# Who, and what they learn


def test_who_may_verify(redacted):
    for user in ("pii_operator", "nobody_special", "shop_owner"):
        with refused("42501"):
            verify(redacted, user=user)
    assert verify(redacted, user="pii_auditor") == []


def test_a_guess_tells_an_auditor_nothing(redacted):
    """Breaks when an auditor can put names into a table and learn which of them are buyers'."""
    redacted.sql("CREATE SCHEMA own AUTHORIZATION pii_auditor; CREATE TABLE own.guesses (v text); INSERT INTO own.guesses VALUES ('Street 1'); "
                 "ALTER TABLE own.guesses OWNER TO pii_auditor; CREATE TABLE own.notes (v text); INSERT INTO own.notes VALUES ('Street 1'); "
                 "GRANT UPDATE (v) ON own.notes TO PUBLIC; CREATE TABLE own.parts (v text) PARTITION BY LIST (v); "
                 "CREATE TABLE own.part PARTITION OF own.parts DEFAULT; INSERT INTO own.parts VALUES ('Street 1'); GRANT INSERT ON own.part TO PUBLIC")
    because = "not searched: the caller may write to it"
    assert unsearched(redacted, "database", "pii_auditor") == {(f"own.{t}", None, because) for t in ("guesses", "notes", "parts")}
    assert found(redacted, "database") == {"own.guesses.v": 1, "own.notes.v": 1, "own.parts.v": 1}


def test_each_call_is_logged_even_if_it_is_rolled_back(redacted):
    """Breaks when the archive is opened before another process has committed an entry."""
    session = redacted.connect("pii_auditor", autocommit=False)
    session.cursor().execute("SELECT * FROM amazon_pii.verify('shop', 'schema')")
    session.rollback()
    session.close()
    log = 'SELECT "user", policy, policy_version, order_key, detail FROM amazon_pii.audit_log WHERE action = \'verify\''
    assert redacted.sql(log, user="pii_auditor") == [("pii_auditor", "shop", 1, None, "scope schema")]


def test_it_changes_nothing_and_locks_nobody_out(redacted):
    """Breaks when a write, a stronger lock or the turn of the policy is taken: it works in a read-only transaction, beside a cycle."""
    session = redacted.connect("pii_admin", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY")
        cursor.execute("SELECT * FROM amazon_pii.verify('shop', 'database')")
        held = redacted.sql("SELECT DISTINCT mode FROM pg_locks WHERE pid = %s AND locktype = 'relation' AND relation > 16384", [session.info.backend_pid])
        assert held == [("AccessShareLock",)]
        cursor.execute("SELECT txid_current_if_assigned()")
        assert cursor.fetchone() == (None,)
        add_order(redacted, 7)
        assert run_cycle(redacted)["redacted"] == 1
    session.rollback()


def test_code_of_owners_runs_as_nobody_else(redacted):
    """P8. Breaks when tables are read by anybody but their owner, or by more than their types' output functions."""
    redacted.sql("CREATE SCHEMA spy AUTHORIZATION nobody_special; GRANT USAGE ON SCHEMA spy TO PUBLIC")
    redacted.sql("CREATE TABLE spy.seen (who name); GRANT ALL ON spy.seen TO PUBLIC; "
                 "CREATE FUNCTION spy.look(text) RETURNS boolean LANGUAGE plpgsql AS "
                 "'BEGIN INSERT INTO spy.seen VALUES (current_user); RETURN true; END'; "
                 "CREATE FUNCTION spy.shown(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS "
                 "'BEGIN IF current_user <> ''nobody_special'' THEN PERFORM spy.look($1); END IF; RETURN $1; END'; "
                 "CREATE DOMAIN spy.word AS text CHECK (spy.shown(VALUE) <> ''); CREATE TYPE spy.mood AS ENUM ('Street 1'); "
                 "CREATE FUNCTION spy.as_json(spy.mood) RETURNS json LANGUAGE plpgsql AS 'BEGIN PERFORM spy.look(''x''); RETURN ''1''; END'; "
                 "CREATE TYPE spy.pair AS (a spy.mood, b spy.word); "
                 "CREATE TABLE spy.trap (v spy.word, w text GENERATED ALWAYS AS (spy.shown(v)) STORED, p spy.pair); "
                 "CREATE INDEX ON spy.trap (spy.shown(v)); INSERT INTO spy.trap VALUES ('Street 1', DEFAULT, ('Street 1', 'x')); "
                 "CREATE VIEW spy.view AS SELECT spy.look(v) FROM spy.trap; "
                 "ALTER TABLE spy.trap ENABLE ROW LEVEL SECURITY; CREATE POLICY trap ON spy.trap USING (spy.look(v))", user="nobody_special")
    redacted.sql("CREATE CAST (spy.mood AS json) WITH FUNCTION spy.as_json AS ASSIGNMENT", user=SUPERUSER)
    assert found(redacted, "database", SUPERUSER) == {"spy.trap.v": 1, "spy.trap.w": 1, "spy.trap.p": 1}
    assert redacted.sql("SELECT * FROM spy.seen") == []


# How much


def test_memory_decides_how_often_it_reads_not_what_it_finds(db):
    """Breaks when the values of all orders must fit at once, or when a pass forgets what another one found."""
    open_shop(db)
    db.apply_policy(shop_policy(linked=[{"table": "shop.payloads", "on": {"order_id": "id"}, "redact": {"raw": {"json": ["$..*"]}}}]))
    for i in range(1, 6):
        add_order(db, i)
    db.sql("UPDATE shop.orders SET gift_message = 'Gift for ' || id; "
           "INSERT INTO shop.payloads (order_id, raw) SELECT i, (SELECT jsonb_agg('value ' || i || ' ' || n) FROM generate_series(1, 60000) AS n) "
           "FROM generate_series(1, 4) AS i", user="shop_owner")
    assert run_cycle(db)["redacted"] == 5
    db.sql("CREATE TABLE shop.notes (a text, b text); INSERT INTO shop.notes SELECT 'value ' || i || ' 59999', 'Gift for 5' FROM generate_series(2, 4) AS i; "
           "INSERT INTO shop.notes SELECT 'value 2 ' || n FROM generate_series(1, 5000) AS n", user="shop_owner")
    results = {}
    for memory in ("64MB", "1MB"):
        before = scans(db)
        db.sql("SELECT set_config('maintenance_work_mem', %s, false)", [memory], "pii_admin")
        results[memory] = found(db, "schema"), scans(db) - before
    assert results["64MB"] == ({"shop.notes.a": 3, "shop.notes.b": 1}, 1)
    again, passes = results["1MB"]
    assert again == results["64MB"][0] and 2 <= passes <= 4
    # No column may use up what the others need.
    db.sql("INSERT INTO shop.notes SELECT 'value 2 ' || n FROM generate_series(1, 60000) AS n", user="shop_owner")
    # Before PostgreSQL 15 a session must end to tell its statistics.
    db.sql("SELECT set_config('maintenance_work_mem', '1MB', false)", user="pii_admin")
    assert verify(db, "schema") == [("shop.notes", "a", "personal data found, of more orders than counted", 3), ("shop.notes", "b", FOUND, 1)]


def scans(db):
    report_statistics(db, "pii_admin")
    return db.value("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'notes'")


def busy(db):
    """A session that has locked some tables: each is waited for, for two seconds."""
    names = [f"shop.busy{n}" for n in range(1, 10)]
    db.sql("; ".join(f"CREATE TABLE {name} (v text)" for name in names), user="shop_owner")
    session = db.connect("shop_owner", autocommit=False)
    session.cursor().execute(f"LOCK TABLE {', '.join(names)}")
    return session


def test_others_see_how_far_it_is(redacted):
    """Breaks when progress is to be seen by the caller alone, or the session's query stays hidden afterwards."""
    session = busy(redacted)
    call = "SELECT * FROM amazon_pii.verify('shop', 'schema')"
    search = Background(redacted, call)
    query = "SELECT query FROM pg_stat_activity WHERE pid = %s"
    seen = wait_until(lambda: [q for (q,) in redacted.sql(query, [search.pid]) if "shop.busy1" in q], interval=0.005)[0]
    session.rollback()
    assert seen.startswith("amazon_pii verify, policy shop: 3 of 3 orders looked for, ") and seen.endswith(" rows searched, now in shop.busy1, 0 orders counted")
    search.result()
    session = redacted.connect("pii_admin")
    with session.cursor() as cursor:
        cursor.execute(call)
        assert redacted.value(query, [session.info.backend_pid]) == call


def test_it_can_be_canceled(redacted):
    """Breaks when a cancel is taken for a table that cannot be read."""
    session = busy(redacted)
    search = Background(redacted, "SELECT * FROM amazon_pii.verify('shop', 'schema')").wait_for_lock(redacted)
    redacted.sql("SELECT pg_cancel_backend(%s)", [search.pid])
    with pytest.raises(psycopg2.errors.QueryCanceled):
        search.result()
    session.rollback()


def test_a_large_value_is_searched(redacted):
    """Breaks when values in another place than their row are not fetched, or a page keeps all of them."""
    redacted.sql("CREATE TABLE shop.bodies (v text); ALTER TABLE shop.bodies ALTER v SET STORAGE EXTERNAL; "
                 "INSERT INTO shop.bodies SELECT repeat('padding ', 100000) || CASE n WHEN 15 THEN 'Street 1' END FROM generate_series(1, 20) AS n; "
                 "INSERT INTO shop.bodies SELECT repeat('padding ', 100000) || 'Street 2'", user="shop_owner")
    assert found(redacted, "schema") == {"shop.bodies.v": 2}
