"""Every type comes back exactly: archived, redacted, retrieved and redacted again, with each treatment, whatever the
session's settings are."""
import pytest
from cluster import MAJOR
from conftest import new_database
from support import absent, documents, end_retrieval, number, psql_here, retrieve, run_cycle

# The longest interval that can be written: before 15, hours were of 32 bits.
LONGEST = "'-2562047788:00:54.775807'" if MAJOR >= 15 else "'-2147483647:59:59.999999'"

# Settings of the sessions that run cycles and retrieve: each of them changes how some value looks as text.
SETTINGS = (
    "-c DateStyle=German -c IntervalStyle=sql_standard -c TimeZone=America/St_Johns -c extra_float_digits=-15 -c bytea_output=escape "
    "-c xmloption=document -c xmlbinary=hex -c array_nulls=off -c standard_conforming_strings=off -c backslash_quote=on "
    "-c transform_null_equals=on -c search_path=shop,public -c default_transaction_isolation=serializable"
)
TYPES = """
CREATE EXTENSION IF NOT EXISTS citext;
CREATE EXTENSION IF NOT EXISTS hstore;
CREATE EXTENSION IF NOT EXISTS ltree;
CREATE EXTENSION IF NOT EXISTS cube;
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE TYPE shop.mood AS ENUM ('sad', 'Ok, "fine"', 'neutral');
CREATE TYPE shop.person AS (first text, born date, scores numeric[], "Full Name" varchar(20));
CREATE TYPE shop.couple AS (a shop.person, b shop.person);
CREATE DOMAIN shop.email AS text CHECK (VALUE ~ '^[^ ]*$');
CREATE DOMAIN shop.short AS varchar(40);
CREATE DOMAIN shop.grade AS int CHECK (VALUE > 0);
CREATE DOMAIN shop.grades AS int[];
CREATE DOMAIN shop.price AS numeric(12,3);
CREATE DOMAIN shop.nick AS citext;
CREATE TYPE shop.floatrange AS RANGE (subtype = float8);
CREATE TABLE shop.orders (id bigint PRIMARY KEY, no text, shipped_at timestamptz);
"""
NASTY = [
    "'Ada'", "E'\\r\\n\\t\\b\\f\\x01\\x7f'", "E'a\\\\b''c\"d`$$%s{}[]\\\\N'", "'  blanks  '", "'NULL'", "'null'", "E'\\\\x00ff'",
    "'\u00c4rzt\u00e9 \u202e\u0631\u200d\ufeff\U0001f469\u200d\U0001f680 e\u0301'", "repeat('Ada Invented ', 50000)",
    "(SELECT string_agg(chr(c), '' ORDER BY c) FROM generate_series(1, 65535) c WHERE c NOT BETWEEN 55296 AND 57343)",
]
FLOATS = ["'NaN'", "'Infinity'", "'-Infinity'", "'-0'", "0.1", "0.30000000000000004"]
P = "[Redacted]"
JSON = """'{"b": 1.10, "a" :  "Ada", "a":"Twice", "n":123456789012345678901234567890.10, "e":1e2,"x":"\\u00e4\\/", "":[ ]}'"""


class Case:
    """One column of one type: its treatment, SQL for its values, and what must be left of each (None is NULL)."""

    def __init__(self, name, type, values, left=None, treatment=None, unique=False):
        self.name, self.type, self.values, self.treatment, self.unique = name, type, values, treatment, unique
        self.left = left if isinstance(left, list) else [left] * len(values)
        self.table = f"shop.t_{name}"

    @property
    def redact(self):
        return ["v"] if self.treatment is None else {"v": self.treatment}


CASES = [
    # Numbers.
    Case("smallint", "smallint", ["-32768", "0", "32767"]),
    Case("bigint", "bigint", ["-9223372036854775808", "9223372036854775807"]),
    Case("numeric", "numeric", ["1.10", "1.1000", "0.00", "'NaN'", "'Infinity'", "'-Infinity'", "repeat('9', 2000)::numeric",
                                "1e-1000", "-0.0"]),
    Case("numeric_p_s", "numeric(40,20)", ["12345678901234567890.12345678901234567890", "-1e-20", "'NaN'", "0"]),
    Case("numeric_value", "numeric(12,2)", ["17.50", "'NaN'"], "0.00", {"value": 0}),
    Case("real", "real", FLOATS + ["3.4028235e38", "1e-45", "1.17549435e-38", "16777217"]),
    Case("double", "double precision", FLOATS + ["1.7976931348623157e308", "5e-324", "2.2250738585072014e-308", "4.35"]),
    Case("double_value", "double precision", ["5e-324", "0", "1e22"], "-0", {"value": "-0"}),
    Case("money", "money", ["'92233720368547758.07'", "'-92233720368547758.08'", "'0.01'"]),
    Case("boolean", "boolean", ["true", "false"]),
    Case("boolean_value", "boolean NOT NULL", ["true"], "f", {"value": False}),
    # Times.
    Case("timestamptz", "timestamptz", ["'2024-03-31 01:59:59.999999 Europe/Berlin'", "'infinity'", "'-infinity'",
                                        "'0044-03-15 12:00:00.000001 BC'", "'294276-12-31 23:59:59.999999Z'"]),
    Case("timestamptz_value", "timestamptz", ["'2024-02-29 01:02:03.000004Z'"], "1970-01-01 00:00:00+00",
         {"value": "1970-01-01 00:00:00Z"}),
    Case("timestamp", "timestamp", ["'2024-02-03 04:05:06.000007'", "'infinity'", "'4713-01-01 BC'"]),
    Case("date", "date", ["'infinity'", "'5874897-12-31'", "'4713-01-01 BC'", "'2024-02-03'"]),
    Case("date_value", "date", ["'1987-06-05'"], "1900-02-01", {"value": "1900-02-01"}),
    Case("time", "time", ["'24:00:00'", "'00:00:00.000001'"]),
    Case("timetz", "timetz", ["'24:00:00-15:59'", "'12:34:56.789012+05:30:15'"]),
    Case("interval", "interval", ["'1 mon'", "'30 days'", "'720:00:00'", "'-1 mon +1 day -00:00:00.000001'", "'0'",
                                  "'178956970 years 7 mons'", "'2147483647 days'", LONGEST,
                                  "'1 day -00:00:01'"]),
    Case("interval_sql", "interval(3)", ["'1 year -2 days 3.004'"], "1 mon", {"sql": "'1 mon'::interval"}),
    # Bits, bytes, networks.
    Case("uuid", "uuid", ["'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'"]),
    Case("bytea", "bytea", [r"'\x00ff5c27'", "decode(repeat('00ff', 300000), 'hex')"]),
    Case("bytea_value", "bytea", [r"'\x00'"], r"\x6e6f", {"value": r"\x6e6f"}),
    Case("inet", "inet", ["'::1/128'", "'10.0.0.1/8'", "'192.168.0.1'", "'2001:db8::1/64'"]),
    Case("cidr", "cidr", ["'10.0.0.0/8'", "'::/0'"]),
    Case("macaddr", "macaddr", ["'08:00:2b:01:02:03'"]),
    Case("macaddr8", "macaddr8", ["'08:00:2b:01:02:03:04:05'"]),
    Case("bit", "bit(11)", ["B'10101010101'"]),
    Case("varbit", "bit varying", ["B'1'", "B'000000001'"]),
    Case("varbit_value", "bit varying(8)", ["B'1'"], "0000", {"value": "0000"}),
    # Texts.
    Case("text", "text", NASTY, P),
    Case("text_null", "text", NASTY, None, "null"),
    Case("text_value", "text", NASTY, "it's \"gone\" \\ \U0001f680\n", {"value": "it's \"gone\" \\ \U0001f680\n"}),
    Case("text_sql", "text", NASTY, ["person 100"] + ["person %d" % (100 + i) for i in range(1, len(NASTY))],
         {"sql": "'person ' || id"}),
    Case("text_prefix", "text", ["'SW1A 1AA'", "'\U0001f680\u0301xyz'", "E'\\n\\n\\n'"], ["SW", "\U0001f680\u0301", "\n\n"],
         {"prefix": 2}),
    Case("text_unique", "text", NASTY[:4], [f"r-{100 + i}@redacted.invalid" for i in range(4)],
         {"unique": "r-{key}@redacted.invalid"}, unique=True),
    Case("varchar", "varchar(200)", ["'x '", "repeat('\U0001f680', 200)"], P),
    Case("char", "char(12)", ["'ab'", "'  ab  '", "repeat('x', 12)"], P + "  "),
    Case("char_prefix", "char(8)", ["'SW1A 1AA'", "'1 3'"], ["SW      ", "1       "], {"prefix": 2}),
    Case("bpchar", "bpchar", ["'ab'", "'ab   '"], P),
    Case("name", "name", ["'Ada \"Invented\"'", "repeat('n', 63)"], P),
    Case("single_char", '"char"', ["'x'", *(["'\u00e4'"] if MAJOR >= 15 else [])]),
    Case("citext", "citext", ["'ADA@Example.invalid'", "'\u0130stanbul'"], P),
    Case("email", "shop.email", ["'ada@example.invalid'", "'ADA@example.invalid'"], P),
    Case("short", "shop.short", ["'Ada  '"], P),
    Case("nick", "shop.nick", ["'Ada'"], P, "placeholder"),
    # JSON and XML.
    Case("json", "json", [JSON, "'  {\"a\":null , \"a\": \"Ada\"}\n'"],
         ["""{"b": 1.10, "a" :  "[Redacted]", "a":"[Redacted]", "n":123456789012345678901234567890.10, "e":1e2,"x":"\\u00e4\\/", "":[ ]}""",
          "  {\"a\":null , \"a\": \"[Redacted]\"}\n"], {"json": ["$.a"]}),
    Case("json_null", "json", [JSON, "'null'", "'  \"Ada\" '"], None, "null"),
    Case("jsonb", "jsonb", [JSON, """'{"a": {"x": ["Ada", 1.50, true, null, ""]}}'"""],
         ['{"": [], "a": "[Redacted]", "b": 1.10, "e": 100, "n": 123456789012345678901234567890.10, "x": "ä/"}',
          '{"a": {"x": ["[Redacted]", null, null, null, ""]}}'], {"json": ["$.a"]}),
    Case("jsonb_keep", "jsonb", ["""'{"id": 1.10, "who": ["Ada", {"n": 12345678901234567890123456789.0}]}'"""],
         ['{"id": 1.10, "who": ["[Redacted]", {"n": null}]}'], {"json": {"keep": ["$.id"]}}),
    Case("jsonb_value", "jsonb NOT NULL", [JSON, "'null'"], '{"a": 123456789012345678901234567890, "bb": []}',
         {"value": {"bb": [], "a": 123456789012345678901234567890}}),
    Case("json_in_text", "text", ["""'{"a" : "Ada", "b":1.10}'""", "'no json: Ada'", """'{"a":"Ada"'"""],
         ["""{"a" : "[Redacted]", "b":1.10}""", P, P], {"json": ["$.a"]}),
    Case("xml", "xml", ["'<a>Ada &amp; <b/>  </a>'", "'text only'", "'<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<a>Ada</a>'",
                        "'<?xml version=\"1.1\" standalone=\"yes\"?><a/>'"]),
    # Arrays.
    Case("int_array", "int[]", ["'[2:4]={1,NULL,3}'", "'[-1:0][5:6]={{1,2},{3,NULL}}'", "'{NULL}'"]),
    Case("text_array", "text[]", [r"""'{"a,b","{}","\"\\",NULL,"NULL",""," "}'""", "'[0:1][1:1]={{Ada},{NULL}}'"],
         ['{[Redacted],[Redacted],[Redacted],NULL,[Redacted],"",[Redacted]}', "[0:1][1:1]={{[Redacted]},{NULL}}"]),
    Case("text_array_null", "text[]", [r"""'{"a,b",NULL,"null"}'""", "'[5:5]={x}'"], None, "null"),
    Case("varchar_array", "varchar(10)[]", ["'{Ada,NULL}'"], "{[Redacted],NULL}", {"array": "placeholder"}),
    Case("numeric_array", "numeric(40,20)[]", ["'{1.10,NaN,NULL}'"]),
    Case("timestamptz_array", "timestamptz[]", ["'{infinity,2024-02-29 01:02:03.000004+02}'"]),
    Case("double_array", "float8[]", ["'{5e-324,-0,NaN,1.7976931348623157e308}'"], "{0}", {"value": "{0}"}),
    Case("bytea_array", "bytea[]", [r"""ARRAY['\x00', NULL, '\x5c22']::bytea[]"""]),
    Case("jsonb_array", "jsonb[]", ["""ARRAY['{"a": "x\\"y"}', 'null', NULL]::jsonb[]"""]),
    Case("citext_array", "citext[]", ["'{Ada,ADA}'"]),
    Case("mood_array", "shop.mood[]", ["""ARRAY['Ok, "fine"', NULL]::shop.mood[]"""]),
    Case("person_array", "shop.person[]", ["ARRAY[ROW('a,\"b', 'infinity', '{1.10}', ''), NULL]::shop.person[]"]),
    # Ranges, domains, enums, composites.
    Case("int4range", "int4range", ["'[1,10)'", "'empty'", "'(,)'"]),
    Case("numrange", "numrange", ["'[1.10,2.200)'", "'(,1.1]'"]),
    Case("tstzrange", "tstzrange", ["'[2024-01-01 00:00:00.000001+05,infinity]'", "'[-infinity,)'"]),
    Case("daterange", "daterange", ["'[2024-01-01,2024-02-02]'"]),
    Case("floatrange", "shop.floatrange", ["'[-0,5e-324]'"]),
    Case("nummultirange", "nummultirange", ["'{[1.10,2),[3,4.0]}'", "'{}'"]),
    Case("tstzmultirange", "tstzmultirange", ["'{[2024-01-01 00:00:00.000001+05,2024-02-01)}'"]),
    Case("grade", "shop.grade", ["7"]),
    Case("grades", "shop.grades", ["'[3:4]={1,NULL}'"]),
    Case("price", "shop.price", ["'1.100'"], "5.000", {"value": 5}),
    Case("mood", "shop.mood", ["'Ok, \"fine\"'"]),
    Case("mood_value", "shop.mood", ["'sad'"], "neutral", {"value": "neutral"}),
    Case("person", "shop.person", ["ROW(NULL,NULL,NULL,NULL)", "ROW('', 'infinity', '{}', ' ')",
                                   "ROW(E'a\"b,(\\\\)', '0044-03-15 BC', '[2:2]={1.10}', 'x')"]),
    Case("couple", "shop.couple", ["ROW(ROW('A', NULL, NULL, NULL), NULL)"]),
    # The rest.
    Case("hstore", "hstore", ["""'"a b"=>"NULL", c=>NULL, "d\\"e"=>"f,=>"'"""]),
    Case("tsvector", "tsvector", ["""$$'it''s':1A,2 'a b':3$$"""], "", {"sql": "pg_catalog.to_tsvector('')"}),
    Case("tsquery", "tsquery", ["$$'Ada' <2> 'It''s':*A & !'x'$$"]),
    Case("point", "point", ["'(-0,5e-324)'", "'(NaN,Infinity)'"]),
    Case("box", "box", ["'(2,2),(0.1,-0)'"]),
    Case("line", "line", ["'{1,-0.1,3}'"]),
    Case("lseg", "lseg", ["'[(0,0.30000000000000004),(1,1)]'"]),
    Case("path", "path", ["'[(0,0),(1,0.1)]'", "'((0,0),(1,0.1))'"]),
    Case("polygon", "polygon", ["'((0,0),(1,0.1),(2,-0))'"]),
    Case("circle", "circle", ["'<(0.1,0.2),5e-324>'"]),
    Case("ltree", "ltree", ["'Top.Ada.Invented'"]),
    Case("cube", "cube", ["'(0.1,5e-324),(1,2)'"]),
    Case("pg_lsn", "pg_lsn", ["'16/B374D848'"]),
    Case("oid", "oid", ["4294967295"]),
]


def look(db, table):
    """For each row: its binary form, its text in a session with default settings, and the stored text of XML."""
    raw = "v::text" if table == "shop.t_xml" else "NULL"
    rows = db.sql(f"SELECT id, pg_catalog.record_send(ROW(v)), CASE WHEN v IS NOT DISTINCT FROM NULL THEN NULL ELSE format('%s', v) END, {raw} FROM {table}")
    return {row[0]: (bytes(row[1]), row[2], row[3]) for row in rows}


def everything(db, cases):
    return {case.name: look(db, case.table) for case in cases}


class Story:
    """All cases, each an order of its own, brought through a whole life in sessions with those settings."""

    def __init__(self, db):
        for user in ("pii_admin", "pii_operator"):
            db._sessions[user] = db.connect(user, options=SETTINGS)
        psql_here(db, TYPES)
        self.cases = [case for case in CASES if not absent(db, case.type)]
        for n, case in enumerate(self.cases, 1):
            db.psql(f"SET ROLE shop_owner; CREATE TABLE {case.table} (id bigint PRIMARY KEY, order_id bigint NOT NULL, v {case.type}"
                    f"{' UNIQUE' if case.unique else ''}); CREATE INDEX ON {case.table} (order_id);")
            db.sql("INSERT INTO shop.orders VALUES (%s, %s, now() - '40 days'::interval)", [n, number(n)])
            for i, value in enumerate(case.values):
                db.session("postgres").cursor().execute(f"INSERT INTO {case.table} VALUES ({100 + i}, {n}, {value})")
        linked = [{"table": case.table, "on": {"order_id": "id"}, "redact": case.redact} for case in self.cases]
        db.apply_policy({"policy": "types", "enabled": True, "linked": linked,
                         "orders": {"table": "shop.orders", "number": "no", "anchor": "shipped_at"}})
        self.before = everything(db, self.cases)
        run_cycle(db)
        self.redacted = everything(db, self.cases)
        self.states = dict(db.sql("SELECT order_number, status || COALESCE(': ' || last_error, '') FROM amazon_pii.orders"))
        self.archived = documents(db)
        self.errors = {}
        for n, _ in enumerate(self.cases, 1):
            try:
                retrieve(db, number(n))
            except Exception as error:
                self.errors[n] = str(error)
        self.retrieved = everything(db, self.cases)
        for n, _ in enumerate(self.cases, 1):
            if n not in self.errors:
                end_retrieval(db, number(n))
        run_cycle(db)
        self.again = everything(db, self.cases)
        self.archived_again = documents(db)


@pytest.fixture(scope="module")
def story(cluster):
    db = new_database(cluster)
    yield Story(db)
    db.drop()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_comes_back_exactly(story, case):
    """Breaks when a value is cast, rounded, trimmed, or read under the session's settings on its way."""
    if case not in story.cases:
        pytest.skip(f"this server has no {case.type}")
    n = story.cases.index(case) + 1
    assert story.states[number(n)] == "redacted"
    left = {100 + i: text for i, text in enumerate(case.left)}
    assert {id: text for id, (_, text, _) in story.redacted[case.name].items()} == left
    assert n not in story.errors
    assert story.retrieved[case.name] == story.before[case.name]
    # Its own values are recognized: nothing is archived twice, and they go again.
    assert story.again[case.name] == story.redacted[case.name]
    mine = {k for k in story.archived_again if k[0] == f'["{n}"]'}
    assert mine and mine == {k for k in story.archived if k[0] == f'["{n}"]'}


CASTS = """
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE TYPE shop.mood AS ENUM ('sad', 'happy', 'neutral');
CREATE TYPE shop.pair AS (a text, b text);
CREATE FUNCTION shop.lie(text) RETURNS shop.mood LANGUAGE sql IMMUTABLE AS $$ SELECT 'neutral'::shop.mood $$;
CREATE FUNCTION shop.lies(text) RETURNS shop.mood[] LANGUAGE sql IMMUTABLE AS $$ SELECT '{neutral}'::shop.mood[] $$;
CREATE FUNCTION shop.lie_pair(text) RETURNS shop.pair LANGUAGE sql IMMUTABLE AS $$ SELECT ROW('x', 'y')::shop.pair $$;
CREATE FUNCTION shop.told(shop.mood) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'same'::text $$;
CREATE FUNCTION shop.told(shop.mood[]) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'same'::text $$;
CREATE FUNCTION shop.told(shop.pair) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'same'::text $$;
CREATE CAST (text AS shop.mood) WITH FUNCTION shop.lie(text) AS IMPLICIT;
CREATE CAST (text AS shop.mood[]) WITH FUNCTION shop.lies(text) AS IMPLICIT;
CREATE CAST (text AS shop.pair) WITH FUNCTION shop.lie_pair(text) AS IMPLICIT;
CREATE CAST (shop.mood AS text) WITH FUNCTION shop.told(shop.mood) AS IMPLICIT;
CREATE CAST (shop.mood[] AS text) WITH FUNCTION shop.told(shop.mood[]) AS IMPLICIT;
CREATE CAST (shop.pair AS text) WITH FUNCTION shop.told(shop.pair) AS IMPLICIT;
CREATE TABLE shop.orders (id int PRIMARY KEY, no text, shipped_at timestamptz, mood shop.mood, moods shop.mood[], pair shop.pair);
"""


def test_casts_of_the_owner_are_not_used(db):
    """Breaks when values leave or come back by a cast: all of them would be restored as what the owner's cast says."""
    db.psql(CASTS)
    # The superuser's literals go through the types' input functions.
    db.sql("INSERT INTO shop.orders VALUES (1, %s, now() - '40 days'::interval, 'sad', '{sad,happy,NULL}', '(1,\"2,\")')",
           [number(1)])
    before = db.sql("SELECT format('%s|%s|%s', mood, moods, pair) FROM shop.orders")
    db.apply_policy({"policy": "types", "enabled": True, "orders": {
        "table": "shop.orders", "number": "no", "anchor": "shipped_at", "redact": ["mood", "moods", "pair"]}})
    assert run_cycle(db)["redacted"] == 1
    assert db.sql("SELECT mood, moods, pair FROM shop.orders") == [(None, None, None)]
    retrieve(db, number(1))
    assert db.sql("SELECT format('%s|%s|%s', mood, moods, pair) FROM shop.orders") == before


@pytest.mark.skipif(MAJOR >= 15, reason="since PostgreSQL 15 such a value is written as an escape")
def test_half_a_letter_is_left_alone(db):
    """Breaks when a value whose text is not valid is overwritten although it cannot be archived, or stops other orders."""
    psql_here(db, TYPES)
    db.psql("""SET ROLE shop_owner; CREATE TABLE shop.bytes (id bigint PRIMARY KEY, order_id bigint, v "char"); CREATE INDEX ON shop.bytes (order_id)""")
    db.apply_policy({"policy": "types", "enabled": True,
                     "orders": {"table": "shop.orders", "number": "no", "anchor": "shipped_at"},
                     "linked": [{"table": "shop.bytes", "on": {"order_id": "id"}, "redact": ["v"]}]})
    for n, value in ((1, "\u00e4"), (2, "x")):
        db.sql("INSERT INTO shop.orders VALUES (%s, %s, now() - '40 days'::interval)", [n, number(n)])
        db.sql("INSERT INTO shop.bytes VALUES (%s, %s, %s)", [n, n, value])
    run_cycle(db)
    assert db.sql("SELECT id, encode(charsend(v), 'hex') FROM shop.bytes ORDER BY id") == [(1, "c3"), (2, None)]
    assert db.sql("SELECT order_number, last_error FROM amazon_pii.orders WHERE status <> 'redacted'") == [
        (number(1), "0A000: shop.bytes: a value is not valid UTF-8")]


def test_rows_that_were_removed_come_back_whole(db):
    """Breaks when a column that was NULL takes its default, an identity value changes, or a type loses its shape."""
    psql_here(db, TYPES)
    xml = "text" if absent(db, "xml") else "xml"
    db.psql(f"""SET ROLE shop_owner; CREATE TABLE shop.files (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id bigint,
        name text DEFAULT 'unnamed', kind text NOT NULL DEFAULT 'pdf', size int DEFAULT 7, bytes bytea, tags text[], who shop.person,
        people shop.person[], grid int[], mood shop.mood, size_twice int GENERATED ALWAYS AS (size * 2) STORED, xml {xml}, "n" char(5));
        CREATE INDEX ON shop.files (order_id);""")
    db.sql("INSERT INTO shop.orders VALUES (1, %s, now() - '40 days'::interval)", [number(1)])
    db.sql(r"""INSERT INTO shop.files (order_id, name, size, bytes, tags, who, people, grid, mood, xml, n) VALUES
        (1, 'ada.pdf', 3, '\x00ff', '{"a,b",NULL}', ROW(NULL,NULL,NULL,NULL), ARRAY[ROW('a',NULL,'{1.10}','x'),NULL]::shop.person[],
         '[2:3]={1,NULL}', 'sad', '<?xml version="1.0" encoding="latin1"?><a/>', 'x'),
        (1, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL), (1, '', 0, '', '{}', ROW('','-infinity','{}',''), '{}', '{}', NULL, '', '')""")
    whole = "SELECT record_send(f), xml::text FROM shop.files f ORDER BY id"
    before = [(bytes(row), xml) for row, xml in db.sql(whole)]
    db.apply_policy({"policy": "types", "enabled": True,
                     "orders": {"table": "shop.orders", "number": "no", "anchor": "shipped_at"},
                     "linked": [{"table": "shop.files", "on": {"order_id": "id"}, "on_redact": "delete"}]})
    assert run_cycle(db)["redacted"] == 1
    assert db.sql("SELECT * FROM shop.files") == []
    retrieve(db, number(1))
    assert [(bytes(row), xml) for row, xml in db.sql(whole)] == before
    end_retrieval(db, number(1))
    archived = documents(db)
    run_cycle(db)
    assert db.sql("SELECT * FROM shop.files") == []
    assert documents(db).keys() == archived.keys()
