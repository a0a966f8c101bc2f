"""Policies from their first apply to their drop: versions, names of every kind, keys of every kind, partitions, and what
the owner of a table, or somebody who writes a policy, may try."""
import json

import psycopg2
import pytest
from support import documents, number, order_value, payloads, psql_here, refused, retrieve, run_cycle
from test_policy import POLICY, TABLES, assert_refused, lab, policy, shop, traces  # noqa: F401, fixtures among them


def overdue(db):
    """All orders of these tests are long due."""
    db.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")


@pytest.fixture
def own(db):
    """A database of its own, for what changes more than the shop's schema."""
    db.psql(TABLES)
    overdue(db)
    return db


# Expressions

INJECTIONS = [
    "true) OR (true", "1; DROP TABLE shop.lines", "true; --", "true /*", "true)) --", "true UNION SELECT true",
    "(SELECT true) UNION ALL SELECT true", "true, false", "true FROM shop.lines", "true AS x", "true x", "true INTO shop.stolen",
    "true ORDER BY 1", "true LIMIT 1", "true OFFSET 0", "true FOR UPDATE", "true GROUP BY 1", "true HAVING true", "DISTINCT true",
    "ALL true", "true WHERE true", "true WINDOW w AS ()", "WITH x AS (SELECT 1) SELECT true", "SELECT true", "VALUES (true)", "TABLE shop.lines",
    "", "  ", "--", "/**/", "'", "$$", "$$;", "\"", "(true", "true)", "\\", "$1", "$1 IS NULL", "id = ANY ($1)", "*", "orders.*",
    "count(*) > 0", "true\n) OR (true", "E'\\' OR true", "U&'\\'", "DEFAULT", "CURRENT OF c",
    "(DELETE FROM shop.lines RETURNING true)",
]


@pytest.mark.parametrize("place", ["amazon", "where", "sql", "on", "anchor", "number"])
def test_nothing_but_an_expression_passes_as_one(shop, place):
    """Breaks when a policy's text can close a parenthesis or a statement of ours, or name a parameter of ours."""
    before = traces(shop)
    for text in INJECTIONS:
        document = {
            "amazon": policy({"amazon": text}), "where": policy(line={"where": text}),
            "sql": policy({"redact": {"note": {"sql": text}}}), "on": policy(line={"on": {"order_id": text}}),
            "anchor": policy({"anchor": text}), "number": policy({"number": text, "amazon": "true"}),
        }[place]
        problems = shop.check_policy(document)
        assert "error" in {row[0] for row in problems}, text
        with pytest.raises(psycopg2.Error) as caught:
            shop.apply_policy(document)
        assert caught.value.diag.sqlstate[:2] != "XX", text
    assert traces(shop) == before


@pytest.mark.parametrize("text", [
    r"""no = '\') OR true) -- '""", r"""no <> '\'; DROP TABLE shop.lines; --'""",
])
def test_strings_mean_the_same_when_checked_and_when_run(shop, text):
    """Breaks when an expression is parsed under the caller's standard_conforming_strings and run under another."""
    before = traces(shop)
    session = shop.connect("pii_admin", options="-c standard_conforming_strings=off -c backslash_quote=on -c escape_string_warning=off")
    with session.cursor() as cursor:
        cursor.execute("SELECT severity FROM amazon_pii.check_policy(%s)", [json.dumps(policy({"amazon": text}))])
        assert ("error",) in cursor.fetchall()
    session.close()
    assert traces(shop) == before


@pytest.mark.parametrize("text", [
    "true -- a remark", "true /* another */", "note IS NOT NULL AND id > 0", "(SELECT count(*) FROM shop.lines l WHERE l.order_id = orders.id) > 0",
    "EXISTS (SELECT FROM shop.lines WHERE order_id = orders.id) -- x", "shipped_at IS NOT NULL\n", "CASE WHEN id > 0 THEN true END",
])
def test_what_is_an_expression_is_accepted(shop, text):
    """Breaks when the check of expressions refuses what SQL allows."""
    assert [row for row in shop.check_policy(policy({"amazon": text})) if row[0] == "error"] == []


def test_a_trial_leaves_no_trace(own):
    """Breaks when what a trial's triggers, or functions in expressions, have written survives it."""
    own.psql("""SET ROLE shop_owner; CREATE TABLE shop.seen (what text);
        CREATE FUNCTION shop.see(bigint) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO shop.seen VALUES ('expression'); NOTIFY heard; RETURN true; END $$;
        CREATE FUNCTION shop.saw() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN INSERT INTO shop.seen VALUES ('trigger ' || NEW.note); NOTIFY heard; RETURN NEW; END $$;
        CREATE TRIGGER saw BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.saw();""")
    listener = own.connect()
    listener.cursor().execute("LISTEN heard")
    before = traces(own)
    # The trigger is named, as one that may copy what is overwritten.
    assert ["shop.seen" in problem for _, _, problem, _ in own.check_policy(policy({"amazon": "shop.see(id)"}))] == [True]
    assert own.sql("SELECT * FROM shop.seen") == [] and traces(own) == before
    with own.connect("pii_admin", autocommit=False).cursor() as cursor:
        cursor.execute("SELECT amazon_pii.apply_policy(%s)", [json.dumps(POLICY)])
        cursor.connection.rollback()
    assert own.sql("SELECT * FROM shop.seen") == [] and traces(own) == before
    own.apply_policy(POLICY)
    assert own.sql("SELECT * FROM shop.seen") == [] and traces(own)[0] == before[0]
    assert payloads(listener) == []


# Owners

def test_only_the_owner_of_every_table_applies_a_policy(shop):
    """Breaks when a policy reaches a table of somebody else's."""
    shop.psql("SET ROLE other_owner; CREATE TABLE other.lines (id int PRIMARY KEY, order_id bigint, note text);"
              "GRANT ALL ON other.lines TO pii_admin, shop_owner; GRANT USAGE ON SCHEMA other TO PUBLIC")
    assert_refused(shop, policy(line={"table": "other.lines"}), "must be owner of table other.lines", "own its tables")
    for user in ("shop_owner", "pii_operator", "pii_auditor", "nobody_special"):
        with refused("42501"):
            shop.check_policy(POLICY, user)
        with refused("42501"):
            shop.apply_policy(POLICY, user)


def test_a_foreign_table_is_refused(own):
    """Breaks when a table is accepted whose rows cannot be locked and compared."""
    own.need_contrib("postgres_fdw")
    own.psql("CREATE EXTENSION postgres_fdw; CREATE SERVER s FOREIGN DATA WRAPPER postgres_fdw; GRANT USAGE ON FOREIGN SERVER s TO shop_owner;"
             "SET ROLE shop_owner; CREATE FOREIGN TABLE shop.f (id int, order_id bigint, note text) SERVER s")
    assert_refused(own, policy(line={"table": "shop.f"}), "shop.f is a foreign table", "Ordinary and partitioned")


def test_warnings(shop):
    """Breaks when a link without an index, or an anchor that a part-shipped order meets too early, passes without a word."""
    shop.psql("SET ROLE shop_owner; DROP INDEX shop.lines_order_id_idx; ALTER TABLE shop.lines ADD shipped_at timestamptz")
    rows = shop.check_policy(policy({"anchor": {"linked": "lines", "at": "shipped_at"}}))
    assert {(row[0], row[1]) for row in rows} == {("warning", "shop.lines"), ("warning", "orders.anchor")}
    hint = {row[1]: row[3] for row in rows}
    assert "\"complete\"" in hint["orders.anchor"]
    shop.psql(f"SET ROLE shop_owner; {hint['shop.lines']}")
    assert shop.check_policy(policy({"anchor": {"linked": "lines", "at": "shipped_at", "complete": "true"}})) == []
    # The hint's index serves an expression, too.
    by_text = policy(line={"on": {"'o' || order_id": "'o' || id"}})
    found = shop.check_policy(by_text)
    assert {row[1] for row in found} == {"shop.lines", "shop.orders"}
    shop.psql("SET ROLE shop_owner; " + " ".join(row[3] for row in found))
    assert shop.check_policy(by_text) == []


# Versions

def versions(db):
    return db.sql("SELECT version, enabled FROM amazon_pii.policies", user="pii_admin")


def test_versions_and_switches(own):
    """Breaks when applying the same document makes a version, or a changed one switches a disabled policy on."""
    assert own.apply_policy(POLICY) == "shop version 1"
    assert own.apply_policy(json.loads(json.dumps(POLICY, sort_keys=True))) == "shop version 1"
    own.sql("SELECT amazon_pii.disable_policy('shop', 'maintenance')", user="pii_admin")
    assert own.apply_policy(policy(redact_after="31 days", loosened="test")) == "shop version 2"
    assert versions(own) == [(2, False)]
    assert run_cycle(own)["redacted"] == 0
    own.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    assert own.apply_policy(policy(enabled=False)) == "shop version 3"
    assert versions(own) == [(3, True)]
    assert run_cycle(own)["redacted"] == 3
    with refused("42704", "\"shopp\" does not exist"):
        own.sql("SELECT amazon_pii.enable_policy('shopp')", user="pii_admin")
    # A version that is refused leaves the one before in force.
    with pytest.raises(psycopg2.Error):
        own.apply_policy(policy({"redact": ["nothing"]}))
    assert versions(own) == [(3, True)]


def test_a_column_that_is_added_later_goes_on_orders_that_were_done(own):
    """Breaks when orders that are redacted are not looked at again under a new version."""
    own.apply_policy(POLICY)
    assert run_cycle(own)["redacted"] == 3
    before = own.sql("SELECT id, email, born FROM shop.orders ORDER BY id")
    own.apply_policy(policy({"redact": ["note", "email", "born"]}))
    run_cycle(own)
    assert own.sql("SELECT DISTINCT note, email, born FROM shop.orders") == [("[Redacted]", "[Redacted]", None)]
    assert own.sql("SELECT DISTINCT redacted_version, status FROM amazon_pii.orders") == [(2, "redacted")]
    for n in (1, 2, 3):
        retrieve(own, f"301-0000000-000000{n}")
    assert own.sql("SELECT id, email, born FROM shop.orders ORDER BY id") == before
    assert own.sql("SELECT note FROM shop.orders ORDER BY id") == [("Note 1",), ("Note 2",), ("Note 3",)]


def test_a_dropped_policy_leaves_the_archive_and_finds_it_again(own):
    """Breaks when drop_policy leaves triggers behind, or takes archived documents or the log with it."""
    own.apply_policy(POLICY)
    run_cycle(own)
    archived = documents(own)
    log = own.value("SELECT count(*) FROM amazon_pii.audit_log")
    with refused("42501"):
        own.sql("SELECT amazon_pii.drop_policy('shop')", user="shop_owner")
    own.sql("SELECT amazon_pii.drop_policy('shop')", user="pii_admin")
    assert own.sql("SELECT tgname FROM pg_trigger WHERE tgname LIKE '%amazon%'") == []
    assert own.sql("SELECT * FROM amazon_pii.orders") == own.sql("SELECT * FROM amazon_pii.records") == []
    own.sql("INSERT INTO shop.orders (id, no, shipped_at, note) VALUES (9, '301-0000000-0000009', now(), 'x')", user="shop_owner")
    assert documents(own) == archived
    assert own.value("SELECT count(*) FROM amazon_pii.audit_log") == log + 1
    assert own.apply_policy(POLICY) == "shop version 2"
    run_cycle(own)
    assert order_value(own, 1) == "redacted" and documents(own) == archived
    retrieve(own, "301-0000000-0000001")
    assert own.sql("SELECT note FROM shop.orders WHERE id = 1") == [("Note 1",)]


# Names, keys, partitions

WILD = '''
CREATE SCHEMA "My.Shop's ""x""" AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE TABLE "My.Shop's ""x"""."select" ("n" uuid DEFAULT gen_random_uuid(), "Group By" text, "No." text, "a.b" timestamptz, "Full ""Name""" text,
    "{key}" char(5), "$1" text, "é" text, PRIMARY KEY ("n", "Group By"));
CREATE TABLE "My.Shop's ""x"""."select.Lines; --" ("ID" text PRIMARY KEY, "Order n" uuid, "Order G" text, "user" citext, "table" text[]);
CREATE INDEX ON "My.Shop's ""x"""."select.Lines; --" ("Order n", "Order G");
INSERT INTO "My.Shop's ""x"""."select" VALUES (DEFAULT, 'g "1", [2]\\', '302-0000000-0000001', now() - '40 days'::interval, 'Ada', 'Bob', 'C', 'D');
INSERT INTO "My.Shop's ""x"""."select.Lines; --" SELECT E'k''"\\n1', "n", "Group By", 'Ada', '{Ada}' FROM "My.Shop's ""x"""."select";
'''


def test_names_and_keys_of_every_kind(db):
    """Breaks when a name or a key is not quoted somewhere, or meets a name of our own."""
    psql_here(db, "CREATE EXTENSION IF NOT EXISTS citext;" + WILD)
    orders, lines = '"My.Shop\'s ""x"""."select"', '"My.Shop\'s ""x"""."select.Lines; --"'
    look = f"SELECT o::text, l::text FROM {orders} o, {lines} l"
    before = db.sql(look)
    db.apply_policy({"policy": "wild", "enabled": True, "orders": {
        "table": orders, "number": "No.", "anchor": "a.b", "key": ["Group By", "n"],
        "redact": {"Full \"Name\"": {"unique": "x-{key}"}, "{key}": {"value": "x"}, "$1": "null", "é": {"sql": "'gone ' || \"No.\""}}},
        "linked": [{"table": lines, "on": {"Order n": "n", "\"Order G\"": "Group By"}, "redact": ["user", "table"]}]})
    assert run_cycle(db) == {"flagged": 1, "archived": 1, "redacted": 1, "failed": 0, "overdue": 0}
    ((name, short, first, last),) = db.sql(f'SELECT "Full ""Name""", "{{key}}", "$1", "é" FROM {orders}')
    assert name.startswith('x-g "1", [2]\\-') and (short, first, last) == ("x    ", None, "gone 302-0000000-0000001")
    assert db.sql(f'SELECT "user"::text, "table" FROM {lines}') == [("[Redacted]", ["[Redacted]"])]
    db.sql(f"UPDATE {lines} SET \"user\" = 'Late'", user="shop_owner")
    db.sql("CALL amazon_pii.run_cycle()", user="pii_admin")
    assert db.sql(f'SELECT "user"::text FROM {lines}') == [("[Redacted]",)]
    retrieve(db, "302-0000000-0000001")
    assert db.sql(look) == [tuple(cell.replace(",Ada,", ",Late,") if i else cell for i, cell in enumerate(row)) for row in before]


PARTS = """
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE TABLE shop.orders (id bigint, day date, no text, shipped_at timestamptz, note text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE shop.orders_1 PARTITION OF shop.orders FOR VALUES FROM ('2024-01-01') TO ('2025-01-01') PARTITION BY HASH (id);
CREATE TABLE shop.orders_1a PARTITION OF shop.orders_1 FOR VALUES WITH (MODULUS 1, REMAINDER 0);
CREATE TABLE shop.later (note text, no text, id bigint NOT NULL, shipped_at timestamptz, day date NOT NULL);
"""


def test_partitions(db):
    """Breaks when rows are missed that go straight into a partition, of whatever depth, or one that was attached later."""
    db.psql(PARTS)
    db.apply_policy({"policy": "parts", "enabled": True, "orders": {"table": "shop.orders", "number": "no", "anchor": "shipped_at", "redact": ["note"]}})
    insert = "INSERT INTO {} (id, day, no, shipped_at, note) VALUES ({}, '{}', '{}', now() - '40 days'::interval, 'Ada')"
    for n, (table, day) in enumerate([("orders", "2024-01-01"), ("orders_1", "2024-01-01"), ("orders_1a", "2024-01-01")], 1):
        db.sql(insert.format(f"shop.{table}", n, day, number(n)), user="shop_owner")
    db.sql("ALTER TABLE shop.orders ATTACH PARTITION shop.later FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')", user="shop_owner")
    db.sql("CREATE TABLE shop.rest PARTITION OF shop.orders DEFAULT", user="shop_owner")
    for n, (table, day) in enumerate([("later", "2025-01-01"), ("rest", "2030-01-01"), ("orders", "2030-01-01")], 4):
        db.sql(insert.format(f"shop.{table}", n, day, number(n)), user="shop_owner")
    assert db.value("SELECT count(*) FROM amazon_pii.orders") == 6, "the triggers of a partition are missing"
    assert run_cycle(db)["redacted"] == 6
    assert db.sql("SELECT DISTINCT note FROM shop.orders") == [("[Redacted]",)]
    db.sql("UPDATE shop.later SET note = 'Late'", user="shop_owner")
    run_cycle(db)
    assert db.sql("SELECT DISTINCT note FROM shop.orders") == [("[Redacted]",)]
    retrieve(db, number(3))
    assert db.sql("SELECT note FROM shop.orders WHERE id = 3") == [("Ada",)]
    db.sql("SELECT amazon_pii.drop_policy('parts', 'test')", user="pii_admin")
    assert db.sql("SELECT tgname FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid WHERE relnamespace = 'shop'::regnamespace") == []
