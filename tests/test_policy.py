"""What check_policy and apply_policy refuse, on the day a policy is applied and not on the thirtieth: each refusal names
what it is about and says what to do, and leaves no trace."""
import copy

import psycopg2
import pytest
from conftest import new_database
from support import report_statistics

TABLES = """
DROP SCHEMA IF EXISTS shop CASCADE;
DROP SCHEMA IF EXISTS other CASCADE;
CREATE SCHEMA shop AUTHORIZATION shop_owner;
CREATE SCHEMA other AUTHORIZATION other_owner;
SET ROLE shop_owner;
SET client_min_messages = error;
CREATE TYPE shop.mood AS ENUM ('sad', 'happy');
CREATE TABLE shop.people (email text PRIMARY KEY);
INSERT INTO shop.people SELECT 'c' || i || '@example.invalid' FROM generate_series(1, 3) i;
CREATE TABLE shop.orders (id bigint PRIMARY KEY, no text, shipped_at timestamptz, note text, email text, born date, data jsonb,
    mood shop.mood DEFAULT 'sad', amount numeric(8,2), tags text[]);
CREATE TABLE shop.lines (id bigint PRIMARY KEY, order_id bigint, note text, email text);
CREATE INDEX ON shop.lines (order_id);
INSERT INTO shop.orders SELECT i, '301-0000000-000000' || i, now() - '1 day'::interval, 'Note ' || i, 'c' || i || '@example.invalid',
    '1980-01-01'::date + i, '{"name": "Ada"}', 'sad', i, '{Ada}' FROM generate_series(1, 3) i;
INSERT INTO shop.lines SELECT i, i, 'Line ' || i, 'c' || i || '@example.invalid' FROM generate_series(1, 3) i;
"""
POLICY = {
    "policy": "shop", "enabled": True,
    "orders": {"table": "shop.orders", "number": "no", "anchor": "shipped_at", "redact": ["note"]},
    "linked": [{"table": "shop.lines", "on": {"order_id": "id"}, "redact": ["note"]}],
}


def policy(orders=None, line=None, **changes):
    """The policy with keys of "orders", of its linked table, and of its own replaced; `None` takes a key out."""
    document = copy.deepcopy(POLICY)
    for part, new in ((document["orders"], orders), (document["linked"][0], line), (document, changes)):
        part.update(new or {})
        for key in [k for k, v in part.items() if v is None]:
            del part[key]
    return document


def redact(**columns):
    return policy({"redact": columns})


@pytest.fixture(scope="module")
def lab(cluster):
    database = new_database(cluster)
    yield database
    database.drop()


@pytest.fixture
def shop(lab):
    lab.psql(TABLES)
    return lab


def traces(db):
    """All that a trial, or an apply that failed, must leave as it was."""
    return (db.sql("SELECT t::text FROM shop.orders t UNION ALL SELECT t::text FROM shop.lines t ORDER BY 1"),
            db.sql("SELECT tgrelid::regclass::text, tgname FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2"),
            db.sql("SELECT count(*) FROM pg_class"), db.sql("SELECT policy, version FROM amazon_pii.policies"),
            db.sql("SELECT count(*) FROM amazon_pii.audit_log"), db.sql("SELECT count(*) FROM amazon_pii.orders"),
            db.sql("SELECT count(*) FROM pg_namespace WHERE nspname LIKE '%archive%'"))


def assert_refused(db, document, words, hint, user="pii_admin"):
    before = traces(db)
    errors = [row for row in db.check_policy(document, user) if row[0] == "error"]
    assert errors, "check_policy finds nothing wrong"
    shown = [f"{object}: {problem}" for _, object, problem, _ in errors]
    assert any(words in text for text in shown), shown
    assert all(row[3] for row in errors), f"no hint: {errors}"
    assert any(hint in row[3] for row in errors), errors
    with pytest.raises(psycopg2.Error) as caught:
        db.apply_policy(document, user)
    diagnosis = caught.value.diag
    assert diagnosis.sqlstate[:2] != "XX" and diagnosis.message_hint, str(caught.value)
    assert any(words in f"{text}" or words in f"policy: {text}" for text in [diagnosis.message_primary]), str(caught.value)
    for secret in ("Ada", "@example.invalid", "Note 1", "Line 1"):
        assert secret not in str(caught.value) and secret not in str(errors)
    assert traces(db) == before


WHAT_FITS = "Choose a treatment that the table's constraints and triggers accept."
REFUSES = 'shop.orders: {} "{}" refuses the treatment'
UNIQUE = '{"unique": "redacted-{key}"}'
LOWER = """CREATE FUNCTION shop.f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} RETURN NEW; END $$;
CREATE TRIGGER f {} ON shop.orders {} EXECUTE FUNCTION shop.f()"""
# DDL by the shop's owner, the policy, words of the message, words of the hint.
REFUSED = {
    # Columns that cannot hold what the treatment writes.
    "varchar(5)": ("ALTER TABLE shop.orders ADD s varchar(5) DEFAULT 'Ada'", redact(s="placeholder"),
                   "shop.orders.s: the placeholder has 10 characters, the column holds 5", "{\"prefix\": n}"),
    "char(5)": ("ALTER TABLE shop.orders ADD s char(5)", redact(s="placeholder"), "shop.orders.s: the placeholder has 10", "shorter"),
    "domain over varchar(5)": ("CREATE DOMAIN shop.d AS varchar(5); ALTER TABLE shop.orders ADD s shop.d", redact(s="placeholder"),
                               "orders.redact.s: the value is too long", "accept"),
    "value too long": ("ALTER TABLE shop.orders ADD s varchar(5) DEFAULT 'Ada'", redact(s={"value": "anonymous"}),
                       "shop.orders.s: the value has 9 characters, the column holds 5", "shorter"),
    "unique too long": ("ALTER TABLE shop.orders ADD s varchar(20)", redact(s={"unique": "redacted-{key}@redacted.invalid"}),
                        "shop.orders.s: the value has", "shorter"),
    "elements too long": ("ALTER TABLE shop.orders ADD s varchar(5)[] DEFAULT '{Ada}'", redact(s={"array": "placeholder"}), "shop.orders: the treatment fails", WHAT_FITS),
    "not null": ("ALTER TABLE shop.orders ALTER note SET NOT NULL", redact(note="null"), "orders.redact.note: column is NOT NULL", "\"placeholder\""),
    "not null without default": ("ALTER TABLE shop.orders ALTER born SET NOT NULL", policy({"redact": ["born"]}), "orders.redact.born: column is NOT NULL", "{\"value\": ...}"),
    "not null domain": ("CREATE DOMAIN shop.d AS text NOT NULL; ALTER TABLE shop.orders ADD s shop.d DEFAULT 'Ada'", redact(s="null"), "shop.orders: the treatment fails", WHAT_FITS),
    "check": ("ALTER TABLE shop.orders ADD CHECK (note <> '[Redacted]')", POLICY, "shop.orders: the treatment fails on existing rows: 23514", WHAT_FITS),
    "check over columns": ("ALTER TABLE shop.orders ADD CHECK (num_nonnulls(born, note) <> 1)", redact(born="null"), "23514", WHAT_FITS),
    "domain's check": ("CREATE DOMAIN shop.d AS text CHECK (VALUE ~ '@'); ALTER TABLE shop.orders ADD s shop.d DEFAULT 'a@b'", redact(s="placeholder"),
                       "orders.redact.s: a check constraint refused the value", "accept"),
    "unique": ("CREATE UNIQUE INDEX ON shop.orders (email)", redact(email="placeholder"), REFUSES.format("unique index", "orders_email_idx"), UNIQUE),
    "unique over an expression": ("CREATE UNIQUE INDEX ON shop.orders (lower(email))", redact(email="placeholder"), REFUSES.format("unique index", "orders_lower_idx"), UNIQUE),
    "unique without key": ("", redact(email={"unique": "redacted@redacted.invalid"}), "orders.redact.email.unique", "{key}"),
    "exclusion": ("ALTER TABLE shop.orders ADD EXCLUDE (email WITH =)", redact(email="placeholder"), REFUSES.format("exclusion constraint", "orders_email_excl"), UNIQUE),
    "deferred exclusion": ("ALTER TABLE shop.orders ADD EXCLUDE (email WITH =) DEFERRABLE INITIALLY DEFERRED", redact(email="placeholder"), REFUSES.format("exclusion constraint", "orders_email_excl"), UNIQUE),
    "foreign key": ("ALTER TABLE shop.orders ADD FOREIGN KEY (email) REFERENCES shop.people", redact(email="placeholder"), "23503", WHAT_FITS),
    "deferred foreign key": ("ALTER TABLE shop.orders ADD FOREIGN KEY (email) REFERENCES shop.people DEFERRABLE INITIALLY DEFERRED",
                             redact(email="placeholder"), "23503", WHAT_FITS),
    "generated": ("ALTER TABLE shop.orders ADD s text GENERATED ALWAYS AS (upper(note)) STORED", redact(s="placeholder"), "column \"s\" of shop.orders is generated", "generated from"),
    "enum": ("", redact(mood="placeholder"), "orders.redact.mood: the placeholder does not fit", "{\"value\": ...}"),
    "enum without that value": ("", redact(mood={"value": "neutral"}), "orders.redact.mood: ", "accept"),
    "no number": ("", redact(amount={"value": "none"}), "orders.redact.amount: ", "accept"),
    "number overflow": ("", redact(amount={"value": 12345678}), "orders.redact.amount: ", "accept"),
    "placeholder for a date": ("", redact(born="placeholder"), "orders.redact.born: the placeholder does not fit", "\"null\""),
    "json without paths": ("", policy({"redact": ["data"]}), "orders.redact.data: JSON columns have no default", "{\"json\":"),
    "json with no path": ("", redact(data={"json": ["name"]}), "orders.redact.data.json", "$"),
    "json with a broken path": ("", redact(data={"json": ["$.a[?"]}), "orders.redact.data", "RFC 9535"),
    "prefix of a date": ("", redact(born={"prefix": 2}), "orders.redact.born: a prefix does not fit", "\"null\""),
    # Keys, numbers and links must stay.
    "key redacted": ("", policy(line={"redact": {"id": {"value": 1}}}), "column \"id\" of shop.lines is part of its key", "another key"),
    "named key redacted": ("ALTER TABLE shop.orders ADD k int NOT NULL GENERATED ALWAYS AS IDENTITY UNIQUE", policy({"key": ["k"], "redact": ["k"]}), "column \"k\"", "no personal data"),
    "number redacted": ("", policy({"redact": ["no"]}), "column \"no\"", "no personal data"),
    "link redacted": ("", policy(line={"redact": {"order_id": {"value": 1}}}), "column \"order_id\"", "no personal data"),
    "joined by e-mail": ("", policy({"redact": ["email"]}, {"on": {"email": "email"}, "redact": ["email"]}), "column \"email\"", "no personal data"),
    "joined by an expression over e-mail": ("", policy({"redact": ["email"]}, {"on": {"lower(email)": "lower(email)"}, "redact": ["email"]}),
                                            "a link or condition of the policy gives another result", "Link by keys"),
    "condition over a redacted column": ("", policy(line={"where": "note LIKE 'Line%'"}), "a link or condition of the policy gives another result", "Link by keys"),
    "amazon over a redacted column": ("", policy({"amazon": "note LIKE 'Note%'"}), "\"amazon\", \"number\" or \"anchor\" gives another result", "Leave"),
    "number over a redacted column": ("", policy({"number": "no || left(note, 1)", "amazon": "true"}), "\"number\"", "Leave"),
    "anchor over a redacted column": ("", policy({"anchor": "CASE WHEN note LIKE 'Note%' THEN shipped_at END"}), "\"anchor\" gives another result", "Leave"),
    # Tables that cannot be in a policy.
    "view": ("CREATE VIEW shop.v AS SELECT * FROM shop.lines", policy(line={"table": "shop.v"}), "shop.v is a view", "Ordinary and partitioned"),
    "materialized view": ("CREATE MATERIALIZED VIEW shop.v AS SELECT * FROM shop.lines", policy(line={"table": "shop.v"}), "shop.v is a materialized view", "Ordinary"),
    "inheritance parent": ("CREATE TABLE shop.child () INHERITS (shop.lines)", POLICY, "shop.lines has tables that inherit from it", "Ordinary"),
    "rule": ("CREATE RULE r AS ON UPDATE TO shop.lines DO INSTEAD NOTHING", POLICY, "shop.lines has rules", "Ordinary"),
    "forced row-level security": ("ALTER TABLE shop.lines ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY", POLICY, "shop.lines applies row-level security to its owner", "Ordinary"),
    "unlogged": ("ALTER TABLE shop.lines SET UNLOGGED", POLICY, "shop.lines is temporary or unlogged", "Ordinary"),
    "no key": ("ALTER TABLE shop.lines DROP CONSTRAINT lines_pkey", POLICY, "table shop.lines has no usable key", "primary key"),
    "deferrable key": ("ALTER TABLE shop.lines DROP CONSTRAINT lines_pkey, ADD PRIMARY KEY (id) DEFERRABLE", POLICY, "table shop.lines has no usable key", "primary key"),
    "key that is not unique": ("", policy(line={"key": ["order_id"]}), "the key of shop.lines is not unique", "unique index"),
    "key with nulls": ("CREATE UNIQUE INDEX ON shop.lines (order_id)", policy(line={"key": ["order_id"]}), "the key of shop.lines is not unique", "unique index"),
    "partial key": ("ALTER TABLE shop.lines ALTER order_id SET NOT NULL; CREATE UNIQUE INDEX ON shop.lines (order_id) WHERE id > 0",
                    policy(line={"key": ["order_id"]}), "the key of shop.lines is not unique", "unique index"),
    "no such key column": ("", policy(line={"key": ["idd"]}), "column \"idd\" of the key of shop.lines does not exist", "\"id\""),
    "no such table": ("", policy(line={"table": "shop.linez"}), "table shop.linez does not exist", "as in SQL"),
    "no such column": ("", policy({"redact": ["notes"]}), "column \"notes\" of shop.orders does not exist", "\"note\""),
    "no such column in an expression": ("", policy({"amazon": "chanel = 'x'"}), "orders.amazon: a column does not exist", "Try it in a SELECT"),
    "sequence": ("CREATE SEQUENCE shop.s", policy(line={"table": "shop.s"}), "shop.s is no table", ""),
    # Code of the shop's.
    "lower() trigger": (LOWER.format("NEW.note := lower(NEW.note);", "BEFORE UPDATE", "FOR EACH ROW"), POLICY, "a trigger of the table writes something else", "unchanged"),
    "trigger that skips": (LOWER.format("RETURN NULL;", "BEFORE UPDATE", "FOR EACH ROW"), POLICY, "a trigger kept it from being written", ""),
    "trigger that raises": (LOWER.format("RAISE EXCEPTION 'no %', OLD;", "BEFORE UPDATE", "FOR EACH ROW"), POLICY, "P0001: shop.orders: an exception was raised by code", WHAT_FITS),
    "deferred trigger that raises": (LOWER.format("RAISE EXCEPTION 'no %', OLD;", "AFTER UPDATE", "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW").replace("CREATE TRIGGER", "CREATE CONSTRAINT TRIGGER"),
                                     POLICY, "P0001", WHAT_FITS),
    # Expressions.
    "treatment that is no fixed point": ("", redact(note={"sql": "note || '!'"}), "shop.orders: a trigger of the table writes something else", "must give the same again"),
    "treatment that is random": ("", redact(note={"sql": "random()::text"}), "shop.orders", "must give the same again"),
    "treatment of another type": ("", redact(born={"sql": "'x'::text"}), "shop.orders", "Try it"),
    "anchor that is no time": ("", policy({"anchor": "no"}), "orders.anchor: not a timestamp or date", "::timestamptz"),
    "not_before that is no time": ("", policy(line={"not_before": "note"}), "not_before: not a timestamp or date", "::timestamptz"),
    "amazon that is no condition": ("", policy({"amazon": "id"}), "orders.amazon: not a condition", "Try it"),
    "condition that is none": ("", policy(line={"where": "id"}), "linked \"lines\".where: not a condition", "Try it"),
    "link of types that do not compare": ("", policy(line={"on": {"note": "id"}, "redact": ["email"]}), "shop.lines: a function or operator does not exist", "Try it"),
    # Rows that go as a whole.
    "delete that cascades": ("CREATE TABLE shop.sub (id int PRIMARY KEY, line bigint REFERENCES shop.lines ON DELETE CASCADE)",
                             policy(line={"on_redact": "delete", "redact": None}), "deleting its rows would change rows of shop.sub", "entry of the policy"),
    "delete that sets null": ("CREATE TABLE shop.sub (id int PRIMARY KEY, line bigint REFERENCES shop.lines ON DELETE SET NULL)",
                              policy(line={"on_redact": "delete", "redact": None}), "foreign key \"sub_line_fkey\"", "entry of the policy"),
    "delete that is refused": ("CREATE TABLE shop.sub (id int PRIMARY KEY, line bigint REFERENCES shop.lines); INSERT INTO shop.sub VALUES (1, 1)",
                               policy(line={"on_redact": "delete", "redact": None}), "23503", WHAT_FITS),
    # Words of the document.
    "unknown key": ("", policy({"redct": ["note"]}), "orders", "\"redact\""),
    "unknown key on top": ("", policy(redact_afer="1 day"), "redact_afer", "\"redact_after\""),
    "unknown key of an entry": ("", policy(line={"on_redakt": "delete"}), "linked[0]", "\"on_redact\""),
    "unknown treatment": ("", redact(note="placeholdr"), "unknown treatment \"placeholdr\"", "\"placeholder\""),
    "unknown word": ("", policy(line={"shared": "amazone"}), "linked[0].shared", "\"amazon\""),
    "no interval": ("", policy(redact_after="soon"), "redact_after: not an interval", "29 days"),
    "negative interval": ("", policy(archive_after="-1 day"), "archive_after: not an interval of zero or more", "29 days"),
    "archive after redaction": ("", policy(archive_after="31 days"), "archive_after is longer than redact_after", "before"),
    "no such time zone": ("", policy(timezone="Europe/Berln"), "timezone", "\"Europe/Berlin\""),
    "archive in the shop's schema": ("", policy(archive={"schema": "shop"}), "schema \"shop\" for the archive belongs to another role", "Name another schema"),
    "conflicting treatments": ("", policy({"redact": None}, linked=[
        {"table": "shop.lines", "as": "a", "on": {"order_id": "id"}, "redact": {"note": "null"}},
        {"table": "shop.lines", "as": "b", "on": {"id": "id"}, "redact": {"note": {"value": "x"}}}]), "treatment of \"note\" differs", "one treatment"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_object_and_a_hint(shop, name):
    """Breaks when a policy is accepted that fails on its thirtieth day, or the refusal does not say what to do."""
    ddl, document, words, hint = REFUSED[name]
    shop.psql(f"SET ROLE shop_owner; {ddl}")
    assert_refused(shop, document, words, hint)


def test_the_policy_of_these_tests_is_accepted(shop):
    """Breaks when the refusals above have a common cause that is none of theirs."""
    assert shop.check_policy(POLICY) == []


# Unique indexes: decided by the catalog, for the one order that there is today has nobody to collide with.

COLUMNS = {"email": "placeholder", "note": {"value": "gone"}, "born": "null", "tags": {"array": "placeholder"}}
ERROR, WARNING, FINE = "error", "warning", None
CONSTRAINTS = {
    # DDL by the shop's owner; what comes of it with COLUMNS, or with changes of them.
    "one column": ("CREATE UNIQUE INDEX u ON shop.orders (email)", ERROR, {}),
    "a constraint": ("ALTER TABLE shop.orders ADD CONSTRAINT u UNIQUE (email) DEFERRABLE INITIALLY DEFERRED", ERROR, {}),
    "a value": ("CREATE UNIQUE INDEX u ON shop.orders (note)", ERROR, {}),
    "two columns": ("CREATE UNIQUE INDEX u ON shop.orders (email, note)", ERROR, {}),
    "included column": ("CREATE UNIQUE INDEX u ON shop.orders (email) INCLUDE (id)", ERROR, {}),
    "expression": ("CREATE UNIQUE INDEX u ON shop.orders (lower(email || note))", ERROR, {}),
    "expression and column": ("CREATE UNIQUE INDEX u ON shop.orders (lower(email), note)", ERROR, {}),
    "condition that holds": ("CREATE UNIQUE INDEX u ON shop.orders (email) WHERE email <> ''", ERROR, {}),
    "condition over an untreated column that holds": ("CREATE UNIQUE INDEX u ON shop.orders (email) WHERE mood = 'sad'", ERROR, {}),
    "exclusion": ("ALTER TABLE shop.orders ADD CONSTRAINT u EXCLUDE (email WITH =)", ERROR, {}),
    "constant expression": ("CREATE UNIQUE INDEX u ON shop.orders (email)", ERROR, {"email": {"sql": "upper('gone')"}}),
    "null and coalesce": ("CREATE UNIQUE INDEX u ON shop.orders (COALESCE(born, 'epoch'))", ERROR, {}),
    # It depends on rows that are not there yet.
    "untreated column": ("CREATE UNIQUE INDEX u ON shop.orders (mood, email)", WARNING, {}),
    "expression over an untreated column": ("CREATE UNIQUE INDEX u ON shop.orders (email, lower(mood_text))", WARNING, {}),
    "array": ("CREATE UNIQUE INDEX u ON shop.orders (tags)", WARNING, {}),
    "prefix": ("CREATE UNIQUE INDEX u ON shop.orders (email)", WARNING, {"email": {"prefix": 2}}),
    "condition over an untreated column": ("CREATE UNIQUE INDEX u ON shop.orders (email) WHERE mood = 'happy'", WARNING, {}),
    "exclusion of other values": ("ALTER TABLE shop.orders ADD CONSTRAINT u EXCLUDE USING btree (email WITH =, amount WITH =)", WARNING, {}),
    # Rows stay apart.
    "unique": ("CREATE UNIQUE INDEX u ON shop.orders (email)", FINE, {"email": {"unique": "r-{key}@redacted.invalid"}}),
    "unique expression": ("CREATE UNIQUE INDEX u ON shop.orders (lower(email))", FINE, {"email": {"unique": "r-{key}@redacted.invalid"}}),
    "expression over the key": ("CREATE UNIQUE INDEX u ON shop.orders (email)", FINE, {"email": {"sql": "'r-' || id"}}),
    "null": ("CREATE UNIQUE INDEX u ON shop.orders (born)", FINE, {}),
    "null with others": ("CREATE UNIQUE INDEX u ON shop.orders (email, born)", FINE, {}),
    "null in an expression": ("CREATE UNIQUE INDEX u ON shop.orders (lower(email))", FINE, {"email": "null"}),
    "condition that never holds": ("CREATE UNIQUE INDEX u ON shop.orders (email) WHERE email LIKE '%@%'", FINE, {}),
    "with the key": ("CREATE UNIQUE INDEX u ON shop.orders (email, id)", FINE, {}),
    "untreated alone": ("CREATE UNIQUE INDEX u ON shop.orders (amount)", FINE, {}),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_unique_indexes_are_judged_without_rows(shop, name):
    """Breaks when a treatment passes because there is one order today, or is refused although rows stay apart."""
    ddl, severity, changes = CONSTRAINTS[name]
    shop.psql(f"SET ROLE shop_owner; DELETE FROM shop.orders WHERE id > 1; ALTER TABLE shop.orders ADD mood_text text; {ddl}")
    document = policy({"redact": {**COLUMNS, **changes}})
    if severity is ERROR:
        assert_refused(shop, document, f'shop.orders: {"exclusion constraint" if name == "exclusion" else "unique index"} "u" refuses', UNIQUE)
        return
    found = shop.check_policy(document)
    assert [row[0] for row in found] == ([severity] if severity else []), found
    assert all(row[1] == "shop.orders" and '"u" may refuse' in row[2] and UNIQUE in row[3] for row in found)


def test_nulls_that_collide(shop):
    """Breaks when NULL is taken for a way out where the index says that NULL equals NULL."""
    if shop.cluster.sql("SELECT current_setting('server_version_num')::int < 150000") == [(True,)]:
        pytest.skip("NULLS NOT DISTINCT came with PostgreSQL 15")
    shop.psql("SET ROLE shop_owner; DELETE FROM shop.orders WHERE id > 1; CREATE UNIQUE INDEX u ON shop.orders (born) NULLS NOT DISTINCT")
    assert_refused(shop, redact(born="null"), 'unique index "u" refuses', UNIQUE)


def test_unique_index_of_a_partition_alone(shop):
    """Breaks when an index that a partition has for itself is not looked at."""
    shop.psql("""SET ROLE shop_owner; CREATE TABLE shop.parts (id bigint PRIMARY KEY, order_id bigint, email text) PARTITION BY RANGE (id);
        CREATE TABLE shop.part PARTITION OF shop.parts DEFAULT; CREATE INDEX ON shop.parts (order_id); CREATE UNIQUE INDEX u ON shop.part (email);""")
    document = policy(line={"table": "shop.parts", "redact": ["email"]})
    assert [row[:2] for row in shop.check_policy(document)] == [("error", "shop.parts")]


# The trial takes more than the first orders.

MANY = """SET ROLE shop_owner;
INSERT INTO shop.orders (id, no, shipped_at, note) SELECT i, '301-0000000-' || lpad(i::text, 7, '0'), now(), 'Note ' || i FROM generate_series(4, 3000) i;
INSERT INTO shop.lines SELECT i, i, 'Line ' || i FROM generate_series(4, 3000) i;
ALTER TABLE shop.lines ADD kind text DEFAULT 'plain', ADD checked boolean;"""
CASES = {
    "the newest order": "ALTER TABLE shop.orders ADD CHECK (id < 3000 OR note <> '[Redacted]')",
    "one of a few kinds": "UPDATE shop.lines SET kind = 'rare' WHERE id = 1500; ALTER TABLE shop.lines ADD CHECK (kind <> 'rare' OR note <> '[Redacted]')",
    "one that is not NULL": "UPDATE shop.lines SET checked = false WHERE id = 1500; ALTER TABLE shop.lines ADD CHECK (checked OR note <> '[Redacted]')",
    "the longest value": "UPDATE shop.lines SET note = repeat('x', 5000) WHERE id = 1500; ALTER TABLE shop.lines ADD CHECK (note <> '[Redacted]' OR id <> 1500)",
    "the only value": "UPDATE shop.lines SET email = NULL; UPDATE shop.lines SET email = 'Ada' WHERE id = 1500; ALTER TABLE shop.lines ADD CHECK (email <> '[Redacted]')",
}


@pytest.mark.parametrize("name", CASES)
def test_the_trial_finds(shop, name):
    """Breaks when the trial takes the first orders only, or passes over the rows that differ from the others."""
    shop.psql(f"{MANY} {CASES[name]}")
    assert_refused(shop, policy(line={"redact": ["note", "email"]}), "23514", WHAT_FITS)


def test_the_trial_finds_few_amazon_orders_among_many(shop):
    """Breaks when Amazon's orders are not found because others come first."""
    shop.psql(f"{MANY} UPDATE shop.orders SET no = 'web ' || id; UPDATE shop.orders SET no = '301-0000000-0000007' WHERE id = 1700;"
              "ALTER TABLE shop.orders ADD CHECK (id <> 1700 OR note <> '[Redacted]')")
    assert_refused(shop, POLICY, "23514", WHAT_FITS)


def test_a_check_costs_the_same_on_a_large_table(shop):
    """Breaks when a table is read as a whole: what the trial looks at is bounded."""
    shop.psql("""SET ROLE shop_owner;
        INSERT INTO shop.orders (id, no, shipped_at, note) SELECT i, 'web ' || i, now(), repeat('x', 200) FROM generate_series(4, 120000) i;
        INSERT INTO shop.lines SELECT i, i, repeat('x', 200) FROM generate_series(4, 120000) i; ANALYZE shop.orders, shop.lines""")
    read = """SELECT sum(seq_tup_read + COALESCE(idx_tup_fetch, 0))::int FROM pg_stat_user_tables WHERE schemaname = 'shop'"""
    report_statistics(shop, "pii_admin")
    before = shop.value(read)
    assert shop.check_policy(POLICY) == []
    report_statistics(shop, "pii_admin")
    assert shop.value(read) - before < 80000


def test_the_sqlstate_of_the_owners_error_is_shown(shop):
    """Breaks when check_policy keeps to itself which error the owner's expression, or a domain's check, ran into."""
    shop.psql("SET ROLE shop_owner; CREATE FUNCTION shop.own(text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'Ada' USING ERRCODE = 'AB123'; END $$;")
    for expression, state in (("1 / (id - id) = 1", "22012"), ("shop.own(note)", "AB123"), ("shop.none(note)", "42883")):
        (row,) = shop.check_policy(policy({"amazon": expression}))
        assert row[0] == "error" and f"({state})" in row[2] and "Ada" not in str(row), row
