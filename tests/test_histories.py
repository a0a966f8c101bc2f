"""Histories and audit tables that triggers of the shop's own fill with what was there before, when redaction overwrites it."""
import copy

import pytest
from support import (PLACEHOLDER, add_customer, add_order, documents, end_retrieval, fill, number, open_shop, order_value, retrieve, run_cycle,
                     shop_policy, sweep, tables_with)

HISTORY = """
CREATE TABLE shop.addresses_history (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id bigint, order_id bigint, name text, city text,
    changed_at timestamptz DEFAULT clock_timestamp());
CREATE INDEX ON shop.addresses_history (order_id);
CREATE FUNCTION shop.keep_address() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN INSERT INTO shop.addresses_history (id, order_id, name, city) VALUES (OLD.id, OLD.order_id, OLD.name, OLD.city); RETURN NULL; END $$;
CREATE TRIGGER keep_address AFTER UPDATE OR DELETE ON shop.addresses FOR EACH ROW EXECUTE FUNCTION shop.keep_address();

CREATE TABLE shop.audit (n bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, what text, id text, was jsonb);
CREATE INDEX ON shop.audit (id);
CREATE FUNCTION shop.audit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN INSERT INTO shop.audit (what, id, was) VALUES (TG_TABLE_NAME, OLD.id::text, to_jsonb(OLD)); RETURN NEW; END $$;
CREATE TRIGGER audit_customer BEFORE UPDATE ON shop.customers FOR EACH ROW EXECUTE FUNCTION shop.audit();
CREATE TRIGGER audit_order BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.audit();
"""
LISTED = [
    {"table": "shop.addresses_history", "on": {"order_id": "id"}, "redact": ["name", "city"]},
    {"table": "shop.audit", "as": "audited_customers", "parent": "customers", "on": {"id": "id::text"}, "where": "what = 'customers'",
     "redact": {"was": {"json": ["$.first_name", "$.last_name", "$.email", "$.phone", "$.gift_message", "$.shop_note"]}}},
    {"table": "shop.audit", "as": "audited_orders", "on": {"id": "id::text"}, "where": "what = 'orders'",
     "redact": {"was": {"json": ["$.first_name", "$.last_name", "$.email", "$.phone", "$.gift_message", "$.shop_note"]}}},
]
ALL = ("orders", "customers", "addresses", "addresses_history", "audit")


@pytest.fixture
def shop(db):
    open_shop(db)
    db.sql(HISTORY, user="shop_owner")
    return db


def listed(*entries):
    document = shop_policy()
    document["linked"] += copy.deepcopy(list(entries))
    return document


def warnings(db, document):
    return [(object, problem, hint) for severity, object, problem, hint in db.check_policy(document) if severity == "warning" and "copy" in problem]


def left(db):
    """The tables that still hold a word of add_order() or add_customer()."""
    return [t for word in ("Gift", "Note", "Name", "City", "First", "Last", "buyer") for t in tables_with(db, word, ALL)]


def test_triggers_that_may_keep_a_copy_are_named_with_their_table(shop):
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    found = warnings(shop, shop_policy())
    assert [(object, problem.split(", and")[0]) for object, problem, _ in found] == [
        ("shop.orders", 'trigger "audit_order" writes to shop.audit when a row is overwritten'),
        ("shop.addresses", 'trigger "keep_address" writes to shop.addresses_history when a row is overwritten'),
        ("shop.customers", 'trigger "audit_customer" writes to shop.audit when a row is overwritten'),
    ]
    assert "Make shop.audit an entry" in found[0][2]
    assert len(warnings(shop, listed(LISTED[0]))) == 2
    assert warnings(shop, listed(*LISTED)) == []
    assert shop.value("SELECT count(*) FROM shop.audit") == shop.value("SELECT count(*) FROM shop.addresses_history") == 0


def test_triggers_that_write_elsewhere_or_nothing_are_no_concern(shop):
    add_order(shop, 1)
    shop.sql("ALTER TABLE shop.addresses DISABLE TRIGGER keep_address; DROP TRIGGER audit_order ON shop.orders; DROP TRIGGER audit_customer ON shop.customers; "
             "CREATE FUNCTION shop.nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
             "CREATE TRIGGER nothing BEFORE UPDATE ON shop.addresses FOR EACH ROW EXECUTE FUNCTION shop.nothing()", user="shop_owner")
    assert warnings(shop, shop_policy()) == []


def test_a_history_of_rows_that_go_is_named_too(shop):
    add_order(shop, 1)
    document = shop_policy()
    document["linked"][0] = {"table": "shop.addresses", "on": {"order_id": "id"}, "on_redact": "delete"}
    assert [(o, p.split(" writes")[0]) for o, p, _ in warnings(shop, document)][-1:] == [("shop.addresses", 'trigger "keep_address"')]


def test_a_listed_history_is_clean_after_the_same_cycle(shop):
    shop.apply_policy(listed(*LISTED))
    for customer in (1, 2):
        add_customer(shop, customer)
    for order in (1, 2, 3):
        add_order(shop, order, customer=1 if order < 3 else 2)
    shop.sql("UPDATE shop.addresses SET city = 'City old' WHERE id = 1", user="shop_owner")
    assert run_cycle(shop)["redacted"] >= 3
    assert left(shop) == []
    assert shop.value("SELECT count(*) FROM shop.addresses_history WHERE name = %s", [PLACEHOLDER]) == 4
    assert shop.value("SELECT count(*) FROM shop.audit WHERE was->>'first_name' = %s", [PLACEHOLDER]) == 2
    assert shop.sql("SELECT DISTINCT status, next_due_at, last_error FROM amazon_pii.order_state") == [("redacted", None, None)]
    archived = documents(shop)
    assert sweep(shop)["redacted"] == run_cycle(shop)["redacted"] == 0
    assert documents(shop) == archived and left(shop) == []
    retrieve(shop, number(1))
    assert shop.value("SELECT count(*) FROM shop.addresses_history WHERE name = 'Name1'") == 2
    end_retrieval(shop, number(1))
    run_cycle(shop)
    assert left(shop) == []


def test_personal_data_that_comes_back_leaves_nothing_in_the_history_either(shop):
    shop.apply_policy(listed(*LISTED))
    add_customer(shop, 1)
    add_order(shop, 1, customer=1)
    run_cycle(shop)
    shop.sql("UPDATE shop.addresses SET name = 'NameBack'; UPDATE shop.addresses SET name = 'NameAgain'; UPDATE shop.orders SET gift_message = 'GiftBack'; "
             "UPDATE shop.customers SET first_name = 'FirstBack'", user="shop_owner")
    run_cycle(shop)
    assert left(shop) == []
    assert sweep(shop)["redacted"] == 0


def test_many_orders_with_histories(shop):
    shop.apply_policy(listed(*LISTED))
    fill(shop, 300, share=3)
    run_cycle(shop)
    assert shop.sql("SELECT DISTINCT name, city FROM shop.addresses_history") == [(PLACEHOLDER, PLACEHOLDER)]
    assert shop.value("SELECT count(*) FROM shop.addresses_history") == 300
    assert shop.value("SELECT count(*) FROM shop.audit WHERE was::text ~ 'First |Gift |Note '") == 0
    assert shop.sql("SELECT DISTINCT status, next_due_at FROM amazon_pii.order_state") == [("redacted", None)]


def test_a_trigger_that_copies_without_end_does_not_keep_a_cycle_busy(shop):
    """The history has the trigger too: each overwrite makes another copy."""
    shop.sql("CREATE TRIGGER keep_address AFTER UPDATE ON shop.addresses_history FOR EACH ROW EXECUTE FUNCTION shop.keep_address()", user="shop_owner")
    shop.apply_policy(listed(*LISTED))
    add_order(shop, 1)
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM shop.addresses_history") < 10
    assert order_value(shop, 1) == "redacted"
    assert order_value(shop, 1, "last_error") == "27000: triggers copy its personal data again whenever it is overwritten"
    shop.sql("DROP TRIGGER keep_address ON shop.addresses_history", user="shop_owner")
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    run_cycle(shop)
    assert left(shop) == [] and order_value(shop, 1, "last_error") is None


def test_names_in_copies_go_although_nothing_is_kept(db):
    """Breaks when the archive of an order ends before what triggers have copied was scrubbed by its names."""
    open_shop(db)
    db.sql("CREATE TABLE shop.order_log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer_id bigint, said text); "
           "CREATE INDEX ON shop.order_log (customer_id); "
           "CREATE FUNCTION shop.say() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO shop.order_log (customer_id, said) "
           "VALUES (OLD.id, 'name changed from ' || OLD.last_name); RETURN NEW; END $$; "
           "CREATE TRIGGER say BEFORE UPDATE ON shop.customers FOR EACH ROW EXECUTE FUNCTION shop.say()", user="shop_owner")
    document = shop_policy(archive_for="0 days")
    document["linked"].append({"table": "shop.order_log", "parent": "customers", "on": {"customer_id": "id"},
                               "redact": {"said": {"scrub": ["customers.last_name"]}}})
    db.apply_policy(document)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    run_cycle(db)
    assert db.sql("SELECT said FROM shop.order_log") == [(f"name changed from {PLACEHOLDER}",)]
    assert db.value("SELECT count(*) FROM amazon_pii_archive.data_key") == 0
