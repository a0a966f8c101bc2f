"""The README and the pages behind it are executed: each SQL block in order on one fresh server with the worker, each policy
fragment by check_policy. And they are complete: no key, setting, function, view or SQLSTATE of ours is missing."""
import json
import re

import pytest
from cluster import Cluster, wait_until
from conftest import ROOT, Database

README, POLICY, REFERENCE = (PAGES := [(ROOT / page).read_text() for page in ("README.md", "docs/policy.md", "docs/reference.md")])
# An HTML comment says how the block after it is run: `sql: role`, then `error SQLSTATE` or `until query`.
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.S)
BLOCKS = [(m["mark"] or "", m["kind"], m["text"]) for m in BLOCK.finditer("\n".join(PAGES))]
SQL = [(mark, text) for mark, kind, text in BLOCKS if kind == "sql"]
FRAGMENTS = [json.loads(text) for mark, kind, text in BLOCKS if kind == "json" and not mark.startswith("paths")]
PATHS = {mark.split(": ")[1]: json.loads(text) for mark, kind, text in BLOCKS if mark.startswith("paths")}


@pytest.fixture(scope="module")
def read():
    """A database in which every SQL block of the README was executed; what went wrong is a failure of its own."""
    server = Cluster(preload=True, conf=["amazon_pii.naptime = '1s'"])
    try:
        server.start()
        server.sql("CREATE ROLE shop_owner LOGIN")
        server.create_database("readme")
        server.sql("GRANT CREATE ON DATABASE readme TO shop_owner")
        db = Database(server, "readme")
        for mark, text in SQL:
            execute(db, mark, text)
        yield db
    finally:
        server.destroy()


def execute(db, mark, text):
    words = re.fullmatch(r"sql: (?P<user>\w+)(?:; error (?P<error>\w{5}))?(?:; until (?P<until>.*))?", mark)
    assert words, f"how is this block to be run? <!-- {mark} -->\n{text}"
    done = db.psql(text, user=words["user"], check=not words["error"], variables={"VERBOSITY": "sqlstate"})
    if words["error"]:
        assert done.returncode and f"ERROR:  {words['error']}" in done.stdout, f"{text}\n{done.stdout}"
    if words["until"]:
        wait_until(lambda: db.sql(words["until"]) == [(True,)], message=f"never true: {words['until']}")


def test_every_sql_block_runs(read):
    assert len(SQL) > 12
    assert read.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'retrieve'") == 1


def test_what_the_text_says_of_the_first_policy(read):
    wait_until(lambda: read.sql("SELECT name, city FROM shop.addresses WHERE order_id = 1") == [("[Redacted]",) * 2])
    assert read.sql("SELECT status FROM amazon_pii.orders ORDER BY order_key") == [("redacted",), ("flagged",)]
    assert read.value("SELECT name FROM shop.customers") == "Ada Invented"
    waiting = read.sql("SELECT table_name FROM amazon_pii.records WHERE status = 'waiting'")
    assert waiting == [("shop.customers",)]


def test_policy_is_checked_and_applied_in_the_same_words():
    documents = [re.findall(r"_policy\('(\{.*?\})'\)", text, re.S) for _, text in SQL]
    documents = [json.loads(d) for found in documents for d in found]
    assert len(documents) == 2 and documents[0] == documents[1]


def test_every_policy_fragment_is_accepted(read):
    # A key that the reference shows and the extension refuses.
    base = json.loads(re.search(r"apply_policy\('(\{.*?\})'\)", README, re.S).group(1))
    read.psql(ROOT / "tests/fixtures/readme.sql")
    assert len(FRAGMENTS) > 8
    for fragment in FRAGMENTS:
        # A policy of its own: the tables have got columns since the README's was applied.
        document = {**base, **fragment, "policy": "fragment"}
        # How far ahead its dates are, depends on the day.
        problems = [p for p in read.check_policy(document, user="dba") if p[1] != "loosened"]
        if "foreign_table" in fragment.get("archive", {}):
            # There is no cold server here; nothing else is wrong.
            assert [p[:3] for p in problems] == [("error", fragment["archive"]["foreign_table"], "does not exist")], fragment
        else:
            assert problems == [], fragment


def test_a_fragment_that_is_wrong_would_be_noticed(read):
    base = json.loads(re.search(r"apply_policy\('(\{.*?\})'\)", README, re.S).group(1))
    ((severity, _, problem, hint),) = read.check_policy({**base, "redact_aftr": "1 day"}, user="dba")
    assert (severity, problem) == ("error", 'redact_aftr: unknown key "redact_aftr"') and "redact_after" in hint


def test_paths_are_the_ones_that_the_samples_are_tested_with():
    fixture = json.loads((ROOT / "tests/fixtures/spapi_paths.json").read_text())
    assert {version: paths["json"] for version, paths in PATHS.items()} == fixture
    demo = json.loads((ROOT / "demo/policy.json").read_text())
    raw = next(entry["redact"]["raw"] for entry in demo["linked"] if entry["table"] == "shop.payloads")
    assert raw["json"] == fixture["v0"] + fixture["2026-01-01"]


def test_every_key_of_a_policy_is_documented():
    # Known keys stand in constants of the parser. Those that nothing acts on yet must not look as if something did.
    source = (ROOT / "src/domain/policy/read.rs").read_text()
    lists = re.findall(r"^const [A-Z]+: &\[&str\] = &\[(.*?)\];", source, re.M | re.S)
    keys = {key for text in lists for key in re.findall(r'"(\w+)"', text)}
    assert {"policy", "anchor", "where", "prefix", "window"} <= keys
    shown = {key for fragment in FRAGMENTS for key in members(fragment)}
    later = README[README.index("## Not yet") :]
    missing = {key for key in keys - shown if f"`{key}`" not in later and f'"{key}"' not in later}
    assert not missing


def members(value):
    if isinstance(value, dict):
        for key, below in value.items():
            yield key
            yield from members(below)
    elif isinstance(value, list):
        for below in value:
            yield from members(below)


def test_every_setting_is_documented_with_its_default(read):
    settings = read.sql("SELECT name, boot_val, unit FROM pg_settings WHERE name LIKE 'amazon\\_pii.%'")
    assert len(settings) > 5
    for name, default, unit in settings:
        shown = "empty" if not default else f"{default} {unit}" if unit else default
        assert f"| `{name}` | {shown} |" in REFERENCE, name
    for name in re.findall(r"^(\w[\w.]*) = ", "".join(t for _, kind, t in BLOCKS if kind == "ini"), re.M):
        assert read.value("SELECT count(*) FROM pg_settings WHERE name = %s", [name]) == 1, name


def test_every_function_and_view_is_documented(read):
    functions = read.sql(
        "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = 'amazon_pii'::regnamespace"
        " AND prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)"
    )
    views = read.sql("SELECT relname FROM pg_class WHERE relnamespace = 'amazon_pii'::regnamespace AND relkind = 'v'")
    table = REFERENCE[REFERENCE.index("## Functions and views") : REFERENCE.index("## Errors")]
    assert [f for (f,) in functions if f"{f}(" not in table] == []
    assert [v for (v,) in views if f"`{v}`" not in table] == []


def test_documented_functions_exist(read):
    table = REFERENCE[REFERENCE.index("## Functions and views") : REFERENCE.index("## Errors")]
    for name in re.findall(r"`(?:CALL )?(\w+)\(", table):
        assert read.value("SELECT count(*) FROM pg_proc WHERE proname = %s AND pronamespace = 'amazon_pii'::regnamespace", [name])


def test_links_lead_somewhere():
    def anchors(text):
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    links = 0
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            if not target.startswith("http"):
                name, _, anchor = target.partition("#")
                there = page.parent / name if name else page
                assert there.exists() and (not anchor or anchor in anchors(there.read_text())), (page.name, target)
                links += 1
    assert links > 40


# What the section on operations promises


def redacted_shop(db):
    """The README's shop with its policy, the first order redacted; the original rows as text."""
    for mark, text in SQL[:1]:
        db.psql(text, user="shop_owner")
    rows = db.value("SELECT array_agg(a::text ORDER BY id)::text FROM shop.addresses AS a")
    document = json.loads(re.search(r"apply_policy\('(\{.*?\})'\)", README, re.S).group(1))
    db.apply_policy({**document, "enabled": True})
    db.sql("CALL amazon_pii.run_cycle('shop')", user="pii_admin")
    assert db.value("SELECT name FROM shop.addresses WHERE order_id = 1") == "[Redacted]"
    return document, rows


NUMBER = "302-1234567-1234567"


def test_dump_and_restore_carry_everything(db):
    # Without states or keys in the dump, nothing of a restored database could be retrieved.
    _, rows = redacted_shop(db)
    log = db.sql('SELECT audit_id, "user", action, order_number FROM amazon_pii.audit_log ORDER BY 1')
    dump = db.cluster.client("pg_dump", "-d", db.name).stdout
    restored = Database(db.cluster, f"{db.name}_restored")
    db.cluster.create_database(restored.name)
    try:
        restored.psql(dump)
        assert restored.sql('SELECT audit_id, "user", action, order_number FROM amazon_pii.audit_log ORDER BY 1') == log
        assert restored.sql("CALL amazon_pii.run_cycle('shop', sweep => true)", user="pii_admin") == [(0, 0, 0, 0, 0)]
        restored.sql("SELECT amazon_pii.retrieve(%s, 'after a restore')", [NUMBER], user="pii_operator")
        assert restored.value("SELECT array_agg(a::text ORDER BY id)::text FROM shop.addresses AS a") == rows
        # New orders are flagged there as well: the triggers came along.
        restored.sql("INSERT INTO shop.orders VALUES (3, '302-1234567-0000003', 'amazon', 1)", user="shop_owner")
        assert restored.value("SELECT count(*) FROM amazon_pii.orders WHERE order_number = '302-1234567-0000003'") == 1
    finally:
        restored.drop()


def test_archive_outlives_the_extension(db):
    document, rows = redacted_shop(db)
    archived = db.value("SELECT count(*) FROM amazon_pii_archive.document")
    db.sql("DROP EXTENSION amazon_pii CASCADE")
    assert db.value("SELECT count(*) FROM amazon_pii_archive.document") == archived > 0
    db.sql("CREATE EXTENSION amazon_pii")
    db.apply_policy({**document, "enabled": True})
    db.sql("CALL amazon_pii.run_cycle('shop')", user="pii_admin")
    assert db.value("SELECT status FROM amazon_pii.orders WHERE order_number = %s", [NUMBER]) == "redacted"
    db.sql("SELECT amazon_pii.retrieve(%s, 'after a new start')", [NUMBER], user="pii_operator")
    assert db.value("SELECT array_agg(a::text ORDER BY id)::text FROM shop.addresses AS a") == rows


def test_new_master_key_on_the_first_line_keeps_the_old_orders_open(db):
    redacted_shop(db)
    file = db.cluster.key_file
    old = file.read_text()
    try:
        db.cluster.write_key(file)
        file.write_text(file.read_text() + old)
        db.sql("UPDATE shop.orders SET shipped_at = now() - interval '40 days' WHERE id = 2", user="shop_owner")
        db.sql("CALL amazon_pii.run_cycle('shop')", user="pii_admin")
        assert db.value("SELECT count(DISTINCT master_key_id) FROM amazon_pii_archive.data_key") == 2
        for number in (NUMBER, "302-1234567-7654321"):
            peeked = db.value("SELECT amazon_pii.peek(%s, 'test')::text", [number], user="pii_operator")
            assert "Nowhere Street 1" in peeked
    finally:
        file.write_text(old)
