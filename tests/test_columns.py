"""Columns and tables that come, go and are renamed while a policy is in force."""
import json
from contextlib import closing

import pytest
from conftest import Database
from support import (
    PLACEHOLDER, add_customer, add_invoice, add_order, number, open_shop, order_value, refused, retrieve, run_cycle, shop_policy, sweep,
    tables_with,
)


@pytest.fixture
def shop(db):
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    add_invoice(db, 1, 1)
    return db


@pytest.fixture
def applied(shop):
    shop.apply_policy(shop_policy())
    return shop


def ddl(db, statement, user="shop_owner"):
    db.sql(statement, user=user)


def unclassified(db):
    return db.value("SELECT unclassified FROM amazon_pii.status WHERE policy = 'shop'")


def last_error(db):
    return db.value("SELECT last_error FROM amazon_pii.status WHERE policy = 'shop'")


def keeping(table, *columns):
    """The policy with these columns kept in a table."""
    document = shop_policy()
    next(e for e in (document["orders"], *document["linked"]) if e["table"] == table)["keep"] = list(columns)
    return document


# New columns

@pytest.mark.parametrize("kind, reported", [
    ("text", True), ("varchar(20)", True), ("char(2)", True), ("json", True), ("jsonb", True), ("text[]", True), ("xml", True),
    ("shop.note", True), ("shop.note[]", True), ("shop.doc", True),
    ("bigint", False), ("timestamptz", False), ("numeric(12,2)", False), ("bytea", False), ("boolean", False), ("int[]", False),
])
def test_a_column_that_can_hold_text_is_reported_until_it_is_named(applied, kind, reported):
    """Breaks when somebody adds a column for names to a registered table and nobody hears of it."""
    ddl(applied, "CREATE DOMAIN shop.note AS text; CREATE DOMAIN shop.doc AS jsonb")
    assert unclassified(applied) == []
    ddl(applied, f"ALTER TABLE shop.addresses ADD c360 {kind}")
    assert unclassified(applied) == (["shop.addresses.c360"] if reported else [])
    rows = applied.sql("SELECT policy, schema_name, table_name, column_name FROM amazon_pii.unclassified", user="pii_auditor")
    assert rows == ([("shop", "shop", "addresses", "c360")] if reported else [])


def test_naming_it_is_what_classifies_it(applied):
    """Breaks when applying the same document again, or another version, is taken for a decision about the column."""
    ddl(applied, "ALTER TABLE shop.addresses ADD company text, ADD status text; ALTER TABLE shop.invoice_lines ADD sku text")
    all_three = ["shop.addresses.company", "shop.addresses.status", "shop.invoice_lines.sku"]
    assert unclassified(applied) == all_three
    applied.apply_policy(shop_policy())
    applied.apply_policy(shop_policy(retrieved_for="3 days"))
    assert unclassified(applied) == all_three
    found = applied.check_policy(shop_policy())
    assert [(s, o) for s, o, _, _ in found] == [("warning", name) for name in all_three]
    document = keeping("shop.addresses", "status")
    document["linked"][0]["redact"].append("company")
    document["linked"][3]["keep"] = ["sku"]
    assert applied.check_policy(document) == []
    applied.apply_policy(document)
    assert unclassified(applied) == []
    # Known once is known.
    applied.apply_policy(shop_policy())
    assert unclassified(applied) == []
    applied.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user="pii_admin")
    applied.apply_policy(shop_policy())
    assert unclassified(applied) == []


def test_what_is_there_at_the_first_apply_is_known(shop):
    """Breaks when the first apply drowns people in columns, or a table that joins later is not looked at from then on."""
    assert shop.check_policy(shop_policy()) == []
    shop.apply_policy(shop_policy())
    assert unclassified(shop) == []
    document = shop_policy()
    document["linked"].append({"table": "shop.payloads", "on": {"order_id": "id"}})
    shop.apply_policy(document)
    assert unclassified(shop) == []
    ddl(shop, "ALTER TABLE shop.payloads ADD raw2 jsonb")
    assert unclassified(shop) == ["shop.payloads.raw2"]


def test_a_renamed_column_is_not_new_and_a_new_one_under_its_name_is(applied):
    """Breaks when columns are told apart by their names."""
    ddl(applied, "ALTER TABLE shop.customers RENAME tier TO level")
    assert unclassified(applied) == []
    ddl(applied, "ALTER TABLE shop.customers ADD tier text")
    assert unclassified(applied) == ["shop.customers.tier"]
    ddl(applied, "ALTER TABLE shop.customers DROP tier, DROP level; ALTER TABLE shop.customers ADD level text")
    assert unclassified(applied) == ["shop.customers.level"]


def test_rows_that_go_as_a_whole_have_no_unclassified_column(shop):
    """Breaks when a column is reported that is archived and removed with its row."""
    document = shop_policy()
    document["linked"].append({"table": "shop.payloads", "on": {"order_id": "id"}, "on_redact": "delete"})
    shop.apply_policy(document)
    ddl(shop, "ALTER TABLE shop.payloads ADD raw2 jsonb")
    assert unclassified(shop) == []


def test_what_cannot_be_kept_is_refused(shop):
    """Breaks when a typing error classifies nothing, or a column is promised to be both kept and redacted."""
    with refused("42704", 'column "citty" of shop.addresses does not exist'):
        shop.apply_policy(keeping("shop.addresses", "citty"))
    with refused("22023", 'column "city" is kept, and redacted in linked[0]'):
        shop.apply_policy(keeping("shop.addresses", "city"))
    with refused("22023", "appears twice"):
        shop.apply_policy(keeping("shop.orders", "channel", "channel"))


def test_a_restored_dump_knows_its_columns(applied):
    """Breaks when columns are told by numbers that a dump does not keep: a dropped column moves all that follow."""
    ddl(applied, "ALTER TABLE shop.addresses DROP kind; ALTER TABLE shop.addresses RENAME city TO town; ALTER TABLE shop.addresses ADD note text")
    run_cycle(applied)
    dump = applied.cluster.client("pg_dump", "-d", applied.name).stdout
    restored = Database(applied.cluster, f"{applied.name}_restored")
    applied.cluster.create_database(restored.name)
    try:
        restored.psql(dump)
        for _ in range(2):
            assert unclassified(restored) == ["shop.addresses.note"]
            assert run_cycle(restored, "shop") == {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 0}
        assert retrieve(restored, number(1))
        assert restored.value("SELECT town FROM shop.addresses") == "City1"
        ddl(restored, "ALTER TABLE shop.addresses RENAME town TO place")
        assert run_cycle(restored, "shop")["failed"] == 0 and unclassified(restored) == ["shop.addresses.note"]
    finally:
        restored.drop()


# Renames

BARE = [
    ("shop.addresses", "name"), ("shop.customers", "last_name"), ("shop.orders", "gift_message"), ("shop.orders", "external_no"),
    ("shop.orders", "id"), ("shop.orders", "customer_id"), ("shop.orders", "shipped_at"), ("shop.customers", "id"),
    ("shop.addresses", "order_id"), ("shop.invoices", "invoice_no"), ("shop.invoices", "invoiced_at"), ("shop.invoices", "id"),
]


@pytest.mark.parametrize("table, column", BARE)
def test_a_column_that_is_named_as_it_is_is_followed(applied, table, column):
    """Breaks when a rename makes an import fail, stops redaction, or leaves the column's data where it is."""
    run_cycle(applied)
    assert order_value(applied, 1) == "redacted"
    ddl(applied, f'ALTER TABLE {table} RENAME {column} TO "New Name"')
    retrieve(applied, number(1))
    assert applied.value("SELECT last_name FROM shop.customers" if column != "last_name" else 'SELECT "New Name" FROM shop.customers') == "Last1"
    values = "VALUES (2, %s, 'amazon', 1, now() - '40 days'::interval, 'Gift2', 'Note2', 1)"
    applied.sql(f"INSERT INTO shop.orders {values}", [number(2)], "shop_owner")
    applied.sql("INSERT INTO shop.addresses VALUES (22, 2, 'delivery', 'Name2', 'Street 2', NULL, 'City2', 'Z2')", user="shop_owner")
    assert order_value(applied, 2) == "scheduled", "flagged by the trigger"
    assert run_cycle(applied, "shop")["redacted"] == 1
    applied.sql("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    assert run_cycle(applied, "shop")["redacted"] == 1
    for word in ("Name1", "Gift1", "Last1", "Name2", "Gift2", "BillTo1"):
        assert tables_with(applied, word) == []
    assert last_error(applied) is None
    assert applied.sql("SELECT * FROM amazon_pii.find_orders('INV-1')", user="pii_operator")


def test_what_was_archived_comes_back_into_the_renamed_column(applied):
    """Breaks when the archive is searched under the new name, or another column that has the old name now gets the value."""
    run_cycle(applied)
    ddl(applied, "ALTER TABLE shop.addresses RENAME name TO recipient; ALTER TABLE shop.addresses RENAME city TO name")
    peeked = applied.value("SELECT amazon_pii.peek(%s, 'test')", [number(1)], "pii_operator")
    cells = next(r["cells"] for r in peeked[0]["records"] if r["table"] == "shop.addresses")
    assert (cells["recipient"], cells["name"]) == ("Name1", "City1")
    assert retrieve(applied, number(1))
    assert applied.sql("SELECT recipient, name FROM shop.addresses") == [("Name1", "City1")]
    assert applied.sql("SELECT * FROM amazon_pii.verify('shop')", user="pii_auditor") == []
    applied.sql("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    documents = applied.value("SELECT count(*) FROM amazon_pii_archive.document")
    run_cycle(applied, "shop")
    assert applied.sql("SELECT recipient, name FROM shop.addresses") == [(PLACEHOLDER, PLACEHOLDER)]
    assert applied.value("SELECT count(*) FROM amazon_pii_archive.document") == documents, "nothing is archived twice"


def test_an_archived_order_that_is_renamed_before_its_redaction(shop):
    """P1. Breaks when the copy that was made under the old name is not found, or redaction compares nothing."""
    add_order(shop, 2, "29 days 12 hours")
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    assert order_value(shop, 2) == "archived"
    documents = shop.value("SELECT count(*) FROM amazon_pii_archive.document")
    ddl(shop, "ALTER TABLE shop.addresses RENAME name TO recipient")
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now() WHERE status = 'archived'")
    assert run_cycle(shop, "shop")["redacted"] == 1
    assert shop.value("SELECT count(*) FROM amazon_pii_archive.document") == documents
    assert shop.value("SELECT recipient FROM shop.addresses WHERE order_id = 2") == PLACEHOLDER


def test_a_new_version_speaks_of_the_new_names(applied):
    """Breaks when versions under which orders were redacted no longer explain what stands in the renamed column."""
    run_cycle(applied)
    ddl(applied, "ALTER TABLE shop.addresses RENAME name TO recipient")
    with refused("42704", '"name"'):
        applied.apply_policy(shop_policy(placeholder="[Gone]"))
    document = shop_policy(placeholder="[Gone]")
    document["linked"][0]["redact"][0] = "recipient"
    applied.apply_policy(document)
    run_cycle(applied, "shop")
    assert applied.value("SELECT recipient FROM shop.addresses") == "[Gone]"
    ddl(applied, "ALTER TABLE shop.addresses RENAME recipient TO who")
    document["linked"][0]["redact"][0] = "who"
    applied.apply_policy({**document, "placeholder": "[Masked]"})
    run_cycle(applied, "shop")
    assert applied.value("SELECT who FROM shop.addresses") == "[Masked]"
    retrieve(applied, number(1))
    assert applied.value("SELECT who FROM shop.addresses") == "Name1"


def test_tables_and_schemas_are_followed(shop):
    """Breaks when a policy, its archive, or the code of the tables' owner is bound to names of schemas."""
    ddl(shop, "CREATE FUNCTION shop.is_amazon(text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$ SELECT $1 = 'amazon' $$")
    shop.sql("SET search_path = shop, public", user="pii_admin")
    document = shop_policy()
    document["orders"]["amazon"] = "is_amazon(channel)"
    shop.apply_policy(document)
    run_cycle(shop)
    add_order(shop, 3, "1 day")
    ddl(shop, "ALTER TABLE shop.addresses RENAME TO places; ALTER SCHEMA shop RENAME TO store")
    # In a session that has its triggers planned under the old name.
    shop.sql("INSERT INTO store.orders (id, external_no, channel, customer_id, shipped_at, gift_message) VALUES (2, %s, 'amazon', 1, now() - '40 days'::interval, 'G')",
             [number(2)], "shop_owner")
    assert order_value(shop, 2) == "scheduled"
    assert run_cycle(shop, "shop")["redacted"] == 1
    retrieve(shop, number(1))
    assert shop.value("SELECT name FROM store.places WHERE order_id = 1") == "Name1"
    # Another schema under the old name: its functions are not the ones that were meant.
    shop.sql("CREATE SCHEMA shop AUTHORIZATION other_owner")
    with refused("55000", "another has its name"):
        sweep(shop, "shop")
    assert "another has its name" in last_error(shop)
    shop.sql("DROP SCHEMA shop")
    run_cycle(shop, "shop")
    assert last_error(shop) is None


def other_policy(db):
    """One that shares no table with the shop's."""
    db.sql("INSERT INTO shop.payloads (order_id, raw) VALUES (1, '{\"a\": \"Ada\"}')", user="shop_owner")
    db.apply_policy({"policy": "other", "enabled": True, "orders": {
        "table": "shop.payloads", "number": "id::text", "amazon": "true", "anchor": "now() - '40 days'::interval", "redact": {"raw": {"json": ["$.a"]}}}})


def test_a_column_inside_an_expression_stops_that_policy_alone(applied):
    """P11. Breaks when an expression goes on with another column's meaning, the import fails, or another policy stops too."""
    other_policy(applied)
    ddl(applied, "ALTER TABLE shop.orders RENAME channel TO source; ALTER TABLE shop.orders ADD channel text DEFAULT 'amazon'")
    applied.sql("INSERT INTO shop.orders (id, external_no, source, shipped_at) VALUES (2, %s, 'web', now() - '40 days'::interval)", [number(2)], "shop_owner")
    run_cycle(applied)
    assert applied.value("SELECT raw->>'a' FROM shop.payloads") == PLACEHOLDER, "the other policy's work is done"
    assert applied.value("SELECT name FROM shop.addresses") == "Name1"
    error = last_error(applied)
    assert 'column "channel" of shop.orders' in error and 'is called "source" now' in error
    with refused("42704", "source"):
        run_cycle(applied, "shop")
    document = shop_policy()
    document["orders"]["amazon"] = "source = 'amazon'"
    applied.apply_policy(document)
    sweep(applied, "shop")
    assert last_error(applied) is None and order_value(applied, 2) is None
    assert applied.value("SELECT name FROM shop.addresses") == PLACEHOLDER


def test_a_rename_that_is_taken_back_lets_the_policy_go_on(applied):
    """Breaks when somebody has to apply a policy again that fits."""
    ddl(applied, "ALTER TABLE shop.orders RENAME channel TO source")
    run_cycle(applied)
    assert "source" in last_error(applied)
    ddl(applied, "ALTER TABLE shop.orders RENAME source TO channel")
    run_cycle(applied)
    assert last_error(applied) is None and order_value(applied, 1) == "redacted"


def test_whoever_renames_it_hears_of_it(applied):
    """Breaks when the one who could still undo it is told nothing, or is told by an error."""
    with closing(applied.connect("shop_owner")) as session:
        session.cursor().execute("ALTER TABLE shop.orders RENAME channel TO source")
        assert any('policy "shop" stops' in n and '"source"' in n for n in session.notices)
        session.notices.clear()
        session.cursor().execute("ALTER TABLE shop.addresses RENAME name TO recipient")
        session.cursor().execute("ALTER TABLE shop.orders RENAME source TO channel")
        session.cursor().execute("ALTER TABLE shop.customers ADD x int")
        assert [n for n in session.notices if "stops" in n] == [n for n in session.notices if "source" in n]


# Drops

@pytest.mark.parametrize("drop, words", [
    ("ALTER TABLE shop.addresses DROP name", 'column "name" of shop.addresses no longer exists'),
    ("ALTER TABLE shop.orders DROP external_no", 'column "external_no" of shop.orders no longer exists'),
    ("ALTER TABLE shop.orders DROP channel", 'column "channel" of shop.orders'),
    ("ALTER TABLE shop.addresses DROP order_id", 'column "order_id" of shop.addresses no longer exists'),
    ("DROP TABLE shop.invoice_lines", "table shop.invoice_lines"),
])
def test_a_drop_stops_that_policy_alone(applied, drop, words):
    """P11. Breaks when a drop is refused, stops other policies, fails imports, or nobody can see what is wrong."""
    other_policy(applied)
    ddl(applied, drop)
    applied.sql("INSERT INTO shop.orders (id, shipped_at, gift_message" + (")" if "channel" in drop else ", channel)")
                + " VALUES (2, now(), 'G'" + (")" if "channel" in drop else ", 'amazon')"), user="shop_owner")
    run_cycle(applied)
    assert words in last_error(applied)
    assert applied.value("SELECT last_error FROM amazon_pii.status WHERE policy = 'other'") is None
    assert applied.value("SELECT raw->>'a' FROM shop.payloads") == PLACEHOLDER
    assert applied.value("SELECT gift_message FROM shop.orders WHERE id = 1") == "Gift1"
    with refused("42704", words):
        run_cycle(applied, "shop")


def test_after_a_drop_the_policy_is_applied_without_it(applied):
    """Breaks when the archive of a dropped column is lost, or keeps the rest from coming back."""
    run_cycle(applied)
    ddl(applied, "ALTER TABLE shop.addresses DROP city")
    document = shop_policy()
    document["linked"][0]["redact"].remove("city")
    applied.apply_policy(document)
    run_cycle(applied, "shop")
    peeked = applied.value("SELECT amazon_pii.peek(%s, 'test')::text", [number(1)], "pii_operator")
    assert "City1" in peeked
    rows = applied.sql("SELECT table_name, kept FROM amazon_pii.retrieve(%s, 'test')", [number(1)], "pii_operator")
    assert dict(rows)["shop.addresses"] == 1
    assert applied.value("SELECT name FROM shop.addresses") == "Name1"


def test_a_column_that_was_made_anew_under_its_name_takes_its_place(applied):
    """Breaks when a change of type by hand (new column, copy, drop, rename) stops a policy that still fits."""
    run_cycle(applied)
    ddl(applied, "ALTER TABLE shop.addresses ADD name_new varchar(200); UPDATE shop.addresses SET name_new = name; "
                 "ALTER TABLE shop.addresses DROP name; ALTER TABLE shop.addresses RENAME name_new TO name")
    assert unclassified(applied) == []
    assert run_cycle(applied, "shop")["failed"] == 0 and last_error(applied) is None
    retrieve(applied, number(1))
    assert applied.value("SELECT name FROM shop.addresses") == "Name1"
    ddl(applied, "ALTER TABLE shop.addresses RENAME name TO recipient")
    applied.sql("SELECT amazon_pii.end_retrieval(%s)", [number(1)], "pii_operator")
    run_cycle(applied, "shop")
    assert applied.value("SELECT recipient FROM shop.addresses") == PLACEHOLDER


def test_a_kept_column_may_go(shop):
    """Breaks when a column that nothing depends on stops the policy."""
    shop.apply_policy(keeping("shop.customers", "tier"))
    ddl(shop, "ALTER TABLE shop.customers DROP tier")
    run_cycle(shop)
    assert last_error(shop) is None and order_value(shop, 1) == "redacted"


def test_an_expression_that_no_longer_fits_stops_the_policy(shop):
    """Breaks when orders fail one by one, or as if they were none, because a function or a type has changed."""
    ddl(shop, "CREATE FUNCTION shop.is_amazon(text) RETURNS boolean LANGUAGE sql AS $$ SELECT $1 = 'amazon' $$")
    document = shop_policy()
    document["orders"]["amazon"] = "shop.is_amazon(channel)"
    shop.apply_policy(document)
    ddl(shop, "DROP FUNCTION shop.is_amazon(text); ALTER TABLE shop.orders ADD x int")
    run_cycle(shop)
    assert "orders.amazon" in last_error(shop) and order_value(shop, 1) is None
    assert shop.value("SELECT name FROM shop.addresses") == "Name1"


def test_a_row_that_went_as_a_whole_comes_back_under_new_names(shop):
    """Breaks when a deleted row's columns are inserted under the names that they had when it was archived."""
    shop.sql("INSERT INTO shop.payloads (id, order_id, raw) VALUES (7, 1, '{\"a\": \"Ada\"}')", user="shop_owner")
    document = shop_policy()
    document["linked"].append({"table": "shop.payloads", "on": {"order_id": "id"}, "on_redact": "delete"})
    shop.apply_policy(document)
    run_cycle(shop)
    assert shop.sql("SELECT * FROM shop.payloads") == []
    ddl(shop, "ALTER TABLE shop.payloads RENAME raw TO answer; ALTER TABLE shop.payloads ADD seen boolean DEFAULT true")
    retrieve(shop, number(1))
    assert shop.sql("SELECT id, order_id, answer FROM shop.payloads") == [(7, 1, {"a": "Ada"})]


def test_the_view_shows_the_document_as_it_was_applied(applied):
    """Breaks when a followed rename rewrites what people wrote."""
    ddl(applied, "ALTER TABLE shop.addresses RENAME name TO recipient")
    run_cycle(applied)
    document = applied.value("SELECT document FROM amazon_pii.policies", user="pii_admin")
    assert document == json.loads(json.dumps(shop_policy()))


def test_marks_names_and_the_generic_customers_column_are_followed(shop):
    """Breaks when a rename of a column that only a mark, a scrub or assign_customer names stops the policy, or is lost."""
    ddl(shop, "ALTER TABLE shop.orders ADD masked boolean")
    document = shop_policy()
    document["orders"].update(mark={"masked": "true"}, assign_customer={"column": "customer_id", "to": 1})
    document["orders"]["redact"]["shop_note"] = {"scrub": ["addresses.name"]}
    shop.apply_policy(document)
    ddl(shop, "ALTER TABLE shop.orders RENAME masked TO hidden; ALTER TABLE shop.orders RENAME customer_id TO buyer_id; "
              "ALTER TABLE shop.addresses RENAME name TO full_name")
    ddl(shop, "UPDATE shop.orders SET shop_note = 'paid by Name1'")
    assert run_cycle(shop)["redacted"] == 1 and last_error(shop) is None
    assert shop.sql("SELECT hidden, shop_note FROM shop.orders") == [(True, f"paid by {PLACEHOLDER}")]
    retrieve(shop, number(1))
    assert shop.sql("SELECT hidden, shop_note FROM shop.orders") == [(None, "paid by Name1")]
    add_customer(shop, 2)
    ddl(shop, "INSERT INTO shop.orders (id, external_no, channel, buyer_id) VALUES (2, '303-1234567-0000002', 'amazon', 2)")
    assert shop.value("SELECT buyer_id FROM shop.orders WHERE id = 2") == 1
