"""P1: nothing is overwritten unless its committed copy was read back, opened and compared by the overwriting statement."""
import pytest
from conftest import new_database
from support import Background, absent, documents, end_retrieval, hurry, number, psql_here, retrieve, run_cycle, stopped

TABLES = """
CREATE EXTENSION IF NOT EXISTS citext;
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE COLLATION shop.blind (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE TYPE shop.priced AS (what text, price numeric);
CREATE TABLE shop.orders (id int PRIMARY KEY, no text, shipped_at timestamptz, note text, name citext);
"""


def policy(linked=()):
    """Orders are archived after ten days and, until make_due(), redacted after sixty."""
    return {"policy": "shop", "enabled": True, "archive_after": "10 days", "redact_after": "60 days", "loosened": "test", "linked": list(linked),
            "orders": {"table": "shop.orders", "number": "no", "anchor": "shipped_at", "redact": ["note", "name"]}}


def add(db, *orders):
    for order in orders:
        db.sql("INSERT INTO shop.orders VALUES (%s, %s, now() - '40 days'::interval, %s, %s)",
               [order, number(order), f"Note {order}", f"Ada {order}"], "shop_owner")


def archive(db, document):
    """Applies the policy; all orders are archived, none is redacted."""
    db.apply_policy(document)
    assert run_cycle(db)["failed"] == 0
    assert {row[0] for row in db.sql("SELECT status FROM amazon_pii.orders")} == {"archived"}


def make_due(db, document):
    """A new version of the policy under which redaction is due at once."""
    db.apply_policy({**document, "redact_after": "30 days"})


def live(db):
    return {row[0]: row[1:] for row in db.sql("SELECT id, note, name::text FROM shop.orders")}


def states(db):
    return dict(db.sql("SELECT (order_key::jsonb ->> 0)::int, status || COALESCE(' ' || last_error, '') FROM amazon_pii.orders"))


def peek(db, order):
    (only,) = db.value("SELECT amazon_pii.peek(%s, 'return')", [number(order)], "pii_operator")
    (record,) = only["records"]
    return record["cells"]["note"], record["cells"]["name"]


GONE = ("[Redacted]", "[Redacted]")
DAMAGED = "XX001: the archived copy of a record of shop.orders cannot be opened"
D, K = "amazon_pii_archive.document", "amazon_pii_archive.data_key"
A, B = "order_key = {a}", "order_key = {b}"
TWO = "o.order_key <> d.order_key AND o.order_key IN ({a}, {b}) AND d.order_key IN ({a}, {b})"
# What is done to the archive of order a (and its neighbour b), and whether the next cycle archives it again at once,
# because there is no copy left: otherwise it fails, is left as it is, and is archived again by a later cycle.
DAMAGE = {
    "a bit of the text": (f"UPDATE {D} SET sealed = set_bit(sealed, 160, 1 - get_bit(sealed, 160)) WHERE {A}", False),
    "a bit of the nonce": (f"UPDATE {D} SET sealed = set_bit(sealed, 24, 1 - get_bit(sealed, 24)) WHERE {A}", False),
    "the format": (f"UPDATE {D} SET sealed = set_byte(sealed, 0, 77) WHERE {A}", False),
    "last byte cut off": (f"UPDATE {D} SET sealed = substring(sealed, 1, length(sealed) - 1) WHERE {A}", False),
    "cut to its head": (f"UPDATE {D} SET sealed = substring(sealed, 1, 15) WHERE {A}", False),
    "emptied": (f"UPDATE {D} SET sealed = '' WHERE {A}", False),
    "a byte more": (fr"UPDATE {D} SET sealed = sealed || '\x00'::bytea WHERE {A}", False),
    "texts of two orders swapped": (f"UPDATE {D} AS d SET sealed = o.sealed FROM {D} AS o WHERE {TWO}", False),
    "rows of two orders swapped": (
        f"UPDATE {D} SET order_key = 'x' WHERE {A}; UPDATE {D} SET order_key = {{a}}, record_key = {{a}} WHERE {B};"
        f"UPDATE {D} SET order_key = {{b}}, record_key = {{b}} WHERE order_key = 'x'", False),
    "texts and keys of two orders swapped": (
        f"UPDATE {D} AS d SET sealed = o.sealed FROM {D} AS o WHERE {TWO};"
        f"UPDATE {K} AS d SET wrapped = o.wrapped FROM {K} AS o WHERE {TWO}", False),
    "another version's number": (f"UPDATE {D} SET version = 5 WHERE {A}", False),
    "deleted": (f"DELETE FROM {D} WHERE {A}", True),
    "deleted with its key": (f"DELETE FROM {D} WHERE {A}; DELETE FROM {K} WHERE {A}", True),
    "data key deleted": (f"DELETE FROM {K} WHERE {A}", True),
    "data key damaged": (f"UPDATE {K} SET wrapped = set_byte(wrapped, 20, 255 - get_byte(wrapped, 20)) WHERE {A}", False),
    "data key cut off": (f"UPDATE {K} SET wrapped = '' WHERE {A}", False),
    "data keys of two orders swapped": (f"UPDATE {K} AS d SET wrapped = o.wrapped FROM {K} AS o WHERE {TWO}", False),
    "another key's name": (f"UPDATE {D} SET key_id = '9' WHERE {A}", True),
    "another record's name": (f"UPDATE {D} SET record_key = '[\"0\"]' WHERE {A}", True),
    "another table's name": (f"UPDATE {D} SET table_name = 'shop.other' WHERE {A}", True),
}


class Damaged:
    """All kinds of damage at once, each to an order of its own, with an undamaged order in the same batch."""

    def __init__(self, db):
        self.db = db
        psql_here(db, TABLES)
        self.pairs = {kind: (10 * n, 10 * n + 1) for n, kind in enumerate(DAMAGE, 1)}
        add(db, 1, *(order for pair in self.pairs.values() for order in pair))
        self.before = live(db)
        archive(db, policy())
        assert live(db) == self.before
        for kind, (a, b) in self.pairs.items():
            db.psql(DAMAGE[kind][0].format(a=f"'[\"{a}\"]'", b=f"'[\"{b}\"]'"))
        make_due(db, policy())
        self.first = run_cycle(db)
        self.live, self.states = live(db), states(db)
        hurry(db)
        run_cycle(db)
        self.live_later, self.states_later = live(db), states(db)
        self.peeked, self.retrieved = {}, {}
        for order in self.before:
            try:
                self.peeked[order] = peek(db, order)
                retrieve(db, number(order))
            except Exception as error:
                self.retrieved[order] = str(error)
        self.retrieved = {**live(db), **self.retrieved}


@pytest.fixture(scope="module")
def damaged(cluster):
    db = new_database(cluster)
    yield Damaged(db)
    db.drop()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_the_archive_never_costs_a_value(damaged, kind):
    """Breaks when a copy is believed without being opened, or is opened under another order's, record's or version's name."""
    a, b = damaged.pairs[kind]
    at_once = DAMAGE[kind][1]
    assert damaged.states[a] == ("redacted" if at_once else f"failed {DAMAGED}")
    for order in (a, b):
        assert damaged.live[order] == (GONE if damaged.states[order] == "redacted" else damaged.before[order])
        # The next attempt archives it again, and only then overwrites it.
        assert (damaged.live_later[order], damaged.states_later[order]) == (GONE, "redacted")
        if kind.endswith("'s name") and order == a and "key" not in kind:
            # It claims to be a record that nobody can open: not passed over in silence.
            assert "cannot be opened" in damaged.retrieved[order]
            continue
        assert damaged.peeked.get(order) == damaged.before[order]
        assert damaged.retrieved[order] == damaged.before[order]


def test_damage_is_shown_and_stops_nobody_else(damaged):
    """Breaks when one damaged order takes its batch with it, or fails in silence."""
    failed = [order for order, state in damaged.states.items() if state != "redacted"]
    assert damaged.first["failed"] == damaged.first["overdue"] == len(failed) > 8
    assert damaged.states[1] == "redacted" and damaged.live[1] == GONE
    assert damaged.retrieved[1] == damaged.before[1]
    logged = damaged.db.sql("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'failed'", user="pii_auditor")
    assert logged == [(len(failed),)]


def two_versions(db, document):
    """Order 1 has two archived versions and is not redacted, because somebody has its row locked."""
    archive(db, document)
    db.sql("UPDATE shop.orders SET note = 'Second' WHERE id = 1", user="shop_owner")
    make_due(db, document)
    locker = db.connect("shop_owner", autocommit=False)
    locker.cursor().execute("SELECT FROM shop.orders WHERE id = 1 FOR UPDATE")
    run_cycle(db)
    assert sorted(key[3] for key in documents(db)) == [1, 2]
    assert live(db) == {1: ("Second", "Ada 1")} and states(db) == {1: "archived"}
    locker.close()


@pytest.mark.parametrize("damage, at_once", [
    (f"UPDATE {D} AS d SET sealed = o.sealed FROM {D} AS o WHERE o.version <> d.version", False),
    (f"UPDATE {D} SET sealed = (SELECT sealed FROM {D} WHERE version = 1) WHERE version = 2", False),
    (f"DELETE FROM {D} WHERE version = 1; UPDATE {D} SET version = 1", False),
    (f"UPDATE {D} SET version = -version; UPDATE {D} SET version = CASE version WHEN -1 THEN 2 ELSE 1 END", False),
    (f"DELETE FROM {D} WHERE version = 2", True),
    (f"DELETE FROM {D} WHERE version = 1", True),
    (f"UPDATE {D} SET sealed = '' WHERE version = 1", True),
], ids=["swapped", "old over new", "new as old", "numbers swapped", "new deleted", "old deleted", "old damaged"])
def test_versions_do_not_stand_in_for_each_other(db, damage, at_once):
    """Breaks when the version is not bound to its document: an older value would be taken for the proof of a newer one."""
    psql_here(db, TABLES)
    add(db, 1)
    two_versions(db, policy())
    db.psql(damage)
    hurry(db)
    run_cycle(db)
    if not at_once:
        assert live(db) == {1: ("Second", "Ada 1")} and states(db) == {1: f"failed {DAMAGED}"}
        hurry(db)
        run_cycle(db)
    assert live(db) == {1: GONE} and states(db) == {1: "redacted"}
    assert peek(db, 1) == ("Second", "Ada 1")
    retrieve(db, number(1))
    assert live(db) == {1: ("Second", "Ada 1")}


# Edits between archive and redaction: type, value before, value after, treatment. SQL's = calls most of them no change.
EDITS = {
    "citext case": ("citext", "'ada@example.invalid'", "'ADA@example.invalid'", "placeholder"),
    "blind collation": ("text COLLATE shop.blind", "'ada'", "'ADA'", "placeholder"),
    "bpchar blanks": ("bpchar", "'Ada'", "'Ada  '", "placeholder"),
    "text blank": ("text", "'Ada'", "'Ada '", "placeholder"),
    "numeric digits": ("numeric", "1.10", "1.1", "null"),
    "negative zero": ("float8", "'0'", "'-0'", "null"),
    "last bit of a double": ("float8", "0.3", "0.30000000000000004", "null"),
    "interval": ("interval", "'1 month'", "'30 days'", "null"),
    "interval hours": ("interval", "'1 day'", "'24:00'", "null"),
    "jsonb digits": ("jsonb", """'{"n": 1.10, "a": "Ada"}'""", """'{"n": 1.1, "a": "Ada"}'""", {"json": ["$.a"]}),
    "jsonb digits to null": ("jsonb", "'[1.10]'", "'[1.1]'", "null"),
    "json blanks": ("json", """'{"a":"Ada"}'""", """'{"a": "Ada"}'""", {"json": ["$.a"]}),
    "json order": ("json", """'{"a":"Ada","b":1}'""", """'{"b":1,"a":"Ada"}'""", {"json": ["$.a"]}),
    "xml blanks": ("xml", "'<a/>'", "'<a />'", "null"),
    "xml declaration": ("xml", "'<a/>'", "'<?xml version=\"1.0\"?><a/>'", "null"),
    "citext array": ("citext[]", "'{Ada}'", "'{ADA}'", "null"),
    "numeric array": ("numeric[]", "'{1.10}'", "'{1.1}'", "null"),
    "array bounds": ("text[]", "'{Ada}'", "'[0:0]={Ada}'", {"array": "placeholder"}),
    "composite": ("shop.priced", "ROW('Ada', 1.10)", "ROW('Ada', 1.1)", "null"),
    "range": ("numrange", "'[1.10,2]'", "'[1.1,2]'", "null"),
    "box of one area": ("box", "'(2,2),(0,0)'", "'(4,1),(0,0)'", "null"),
    "point within epsilon": ("point", "'(1,1)'", "'(1,1.0000000001)'", "null"),
    "circle of one area": ("circle", "'<(0,0),1>'", "'<(5,5),1>'", "null"),
    "another value": ("text", "'Ada'", "'Bob'", "placeholder"),
    "to the prefix": ("text", "'SW1A'", "'SW1B'", {"prefix": 2}),
    "to a value by an expression": ("text", "'Ada'", "'ADA'", {"sql": "'gone'"}),
    "from null": ("text", "NULL", "'Ada'", "placeholder"),
    "from empty": ("text", "''", "'Ada'", "null"),
}


def test_an_edited_value_is_archived_again_before_it_goes(db):
    """Breaks when values are compared by their types' =, or not by the value that was opened."""
    psql_here(db, TABLES)
    names = [name for name, edit in EDITS.items() if not absent(db, edit[0])]
    edits = [EDITS[name] for name in names]
    linked = []
    for n, (type, before, _, treatment) in enumerate(edits, 1):
        db.psql(f"SET ROLE shop_owner; CREATE TABLE shop.t{n} (id int PRIMARY KEY, v {type})")
        linked.append({"table": f"shop.t{n}", "on": {"id": "id"}, "redact": {"v": treatment}})
        db.psql(f"SET ROLE shop_owner; INSERT INTO shop.t{n} VALUES ({n}, {before})")
        add(db, n)
    document = policy(linked)
    archive(db, document)
    for n, (_, _, after, _) in enumerate(edits, 1):
        db.psql(f"SET ROLE shop_owner; UPDATE shop.t{n} SET v = {after}")
    look = {n: f"SELECT encode(record_send(t), 'hex') FROM shop.t{n} t" for n in range(1, len(edits) + 1)}
    edited = {n: db.value(query) for n, query in look.items()}
    make_due(db, document)
    assert run_cycle(db)["failed"] == 0
    assert set(states(db).values()) == {"redacted"}
    versions = {}
    for order, table, _, version in documents(db):
        versions.setdefault(table, []).append(version)
    for n, (kind, edit) in enumerate(zip(names, edits), 1):
        assert db.value(look[n]) != edited[n], kind
        expected = [1] if kind.startswith("from ") else [1, 2]
        assert sorted(versions[f"shop.t{n}"]) == expected, kind
        retrieve(db, number(n))
        assert db.value(look[n]) == edited[n], kind
        end_retrieval(db, number(n))
    run_cycle(db)
    assert all(db.value(look[n]) != edited[n] for n in look)


# A condition that holds a cycle up between its reading of one table and its writing.
GATE = """
SET ROLE shop_owner;
CREATE TABLE shop.gate (open boolean);
INSERT INTO shop.gate VALUES (true);
CREATE FUNCTION shop.passed() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    WHILE NOT (SELECT open FROM shop.gate) LOOP PERFORM pg_sleep(0.02); END LOOP;
    RETURN true;
END $$;
CREATE TABLE shop.files (id int PRIMARY KEY, name citext);
INSERT INTO shop.files VALUES (1, 'ada.pdf');
CREATE TABLE shop.last (id int PRIMARY KEY, v text);
INSERT INTO shop.last VALUES (1, 'x');
"""


@pytest.mark.parametrize("start, edit, look", [
    ("", "UPDATE shop.orders SET name = 'ADA 1'", "SELECT name::text FROM shop.orders"),
    ("UPDATE shop.orders SET note = NULL", "UPDATE shop.orders SET note = 'Late'", "SELECT note FROM shop.orders"),
    ("", "UPDATE shop.files SET name = 'ADA.pdf'", "SELECT name::text FROM shop.files"),
], ids=["overwritten", "was null", "deleted"])
def test_an_edit_between_reading_and_writing_is_not_lost(db, start, edit, look):
    """Breaks when the overwriting statement does not compare every cell itself with the opened value."""
    psql_here(db, TABLES)
    psql_here(db, GATE)
    add(db, 1)
    if start:
        db.sql(start)
    document = policy([
        {"table": "shop.files", "on": {"id": "id"}, "on_redact": "delete"},
        {"table": "shop.last", "on": {"id": "id"}, "where": "shop.passed()", "redact": ["v"]},
    ])
    archive(db, document)
    make_due(db, document)
    db.sql("UPDATE shop.gate SET open = false")
    running = Background(db, "CALL amazon_pii.run_cycle('shop')")
    stopped(db)
    # As by a session whose triggers are off: nothing but the comparison can notice.
    db.psql(f"SET session_replication_role = replica; {edit}")
    edited = db.value(look)
    db.sql("UPDATE shop.gate SET open = true")
    assert running.result()[0][2:4] == (1, 0)
    assert db.sql(look) in ([("[Redacted]",)], [])
    retrieve(db, number(1))
    assert db.value(look) == edited


@pytest.mark.parametrize("treatment, emptied", [("placeholder", "NULL"), ("placeholder", "''"), ("null", "''")])
def test_a_value_that_was_taken_out_before_redaction_does_not_come_back(db, treatment, emptied):
    """Breaks when retrieval takes an older archived value for the one that redaction overwrote."""
    psql_here(db, TABLES)
    add(db, 1)
    document = policy()
    document["orders"]["redact"] = {"note": treatment, "name": "placeholder"}
    archive(db, document)
    db.sql(f"UPDATE shop.orders SET note = {emptied}", user="shop_owner")
    edited = live(db)
    make_due(db, document)
    run_cycle(db)
    retrieve(db, number(1))
    assert live(db) == edited
