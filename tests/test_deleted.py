"""Deleted orders: the rows that they pointed at are remembered and stay due (issue 4)."""
import pytest
from support import (
    PLACEHOLDER, add_customer, add_invoice, add_order, fill, number, open_shop, order_value, record_states, refused, retrieve, run_cycle,
    shop_policy, sweep, tables_with,
)

WEAK = """
ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey;
ALTER TABLE shop.invoices DROP CONSTRAINT invoices_order_id_fkey;
ALTER TABLE shop.invoice_lines DROP CONSTRAINT invoice_lines_invoice_id_fkey;
"""


@pytest.fixture
def shop(db):
    """Order 1 was dispatched yesterday; nothing but the order's row leads to its customer."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, "1 day", customer=1)
    add_invoice(db, 1, 1, "1 day")
    db.apply_policy(shop_policy())
    run_cycle(db)
    return db


def delete(db, order=1):
    db.sql(f"DELETE FROM shop.orders WHERE id = {order}", user="shop_owner")


def month_passes(db):
    """Every clock of an order's is a month on; those of the shop's rows too."""
    db.sql("""UPDATE amazon_pii.order_state SET anchor_at = anchor_at - '31 days'::interval,
        archive_due_at = archive_due_at - '31 days'::interval, redact_due_at = redact_due_at - '31 days'::interval,
        next_due_at = next_due_at - '31 days'::interval""")
    db.sql("UPDATE shop.invoices SET invoiced_at = invoiced_at - '31 days'::interval", user="shop_owner")


def test_the_customer_of_a_deleted_order_goes_at_its_deadline(shop):
    """Breaks when a deletion before the archive ends the watch over what only the order's row led to."""
    delete(shop)
    assert order_value(shop, 1) == "scheduled"
    assert record_states(shop, "shop.customers", 1) == {1: "remembered"}
    run_cycle(shop)
    assert tables_with(shop, "First1") == ["customers"], "it is not due yet"
    month_passes(shop)
    assert run_cycle(shop) == {"flagged": 0, "archived": 1, "redacted": 1, "failed": 0, "overdue": 0}
    assert tables_with(shop, "First1") == tables_with(shop, "buyer1") == []
    assert order_value(shop, 1) == "redacted" and record_states(shop, "shop.customers", 1) == {1: "redacted"}
    assert '"Last1"' in str(shop.value("SELECT amazon_pii.peek(%s, 'x')::text", [number(1)], "pii_operator"))
    retrieve(shop, number(1))
    assert tables_with(shop, "First1") == ["customers"]


def test_rows_that_no_foreign_key_takes_along_go_too(shop):
    """Breaks when rows that bear a deleted order's key, or hang on such rows, are left behind."""
    shop.sql(WEAK, user="shop_owner")
    delete(shop)
    month_passes(shop)
    run_cycle(shop)
    for word in ("Name1", "Street 1", "BillTo1", "LineNote1", "First1"):
        assert tables_with(shop, word) == [], word
    assert shop.value("SELECT count(*) FROM shop.addresses") == 1


def test_what_a_cascade_takes_along_is_not_waited_for(shop):
    """Breaks when rows that a foreign key deletes with the order keep it, or fail it; at once or at commit."""
    shop.sql("ALTER TABLE shop.addresses ALTER CONSTRAINT addresses_order_id_fkey DEFERRABLE INITIALLY DEFERRED; "
             "UPDATE shop.orders SET customer_id = NULL", user="shop_owner")
    delete(shop)
    assert shop.value("SELECT count(*) FROM shop.addresses") == shop.value("SELECT count(*) FROM shop.invoices") == 0
    month_passes(shop)
    assert run_cycle(shop)["failed"] == 0
    assert order_value(shop, 1) == "gone"


@pytest.mark.parametrize("other", ["amazon", "web"])
def test_a_customer_whom_another_order_needs_stays(shop, other):
    """Breaks when a deleted order takes data that a living one uses (P5), or keeps it from going with that one."""
    add_order(shop, 2, "1 day", channel=other, customer=1)
    delete(shop)
    month_passes(shop)
    shop.sql("UPDATE amazon_pii.order_state SET archive_due_at = now() + '9 days', redact_due_at = now() + '9 days', next_due_at = now() + '9 days' "
             "WHERE order_key = '[\"2\"]'")
    run_cycle(shop)
    assert tables_with(shop, "First1") == ["customers"] and record_states(shop, "shop.customers", 1) == {1: "waiting"}
    delete(shop, 2)
    shop.sql("UPDATE amazon_pii.order_state SET archive_due_at = now(), redact_due_at = now(), next_due_at = now()")
    run_cycle(shop)
    assert tables_with(shop, "First1") == []


def test_an_order_that_was_never_dispatched_gets_a_clock_with_its_deletion(shop):
    """Breaks when what nobody will dispatch any more is kept for ever, or an order that comes back keeps that clock."""
    add_customer(shop, 3)
    add_order(shop, 3, None, customer=3)
    delete(shop, 3)
    assert order_value(shop, 3) == "scheduled" and order_value(shop, 3, "anchor_at = flagged_at OR anchor_at > flagged_at") is True
    add_order(shop, 3, None, customer=3)
    assert order_value(shop, 3) == "flagged" and order_value(shop, 3, "redact_due_at") is None
    delete(shop, 3)
    month_passes(shop)
    run_cycle(shop)
    assert tables_with(shop, "First3") == []


def test_an_order_that_is_imported_again_under_another_customer(shop):
    """Breaks when DELETE and INSERT, as some imports do, lose the customer that the first import had made."""
    add_customer(shop, 2)
    with shop.connect("shop_owner", autocommit=False) as connection, connection.cursor() as cursor:
        cursor.execute("DELETE FROM shop.orders WHERE id = 1")
        cursor.execute("INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at, gift_message) "
                       "VALUES (1, %s, 'amazon', 2, now() - '1 day'::interval, 'Gift1')", [number(1)])
    month_passes(shop)
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    assert order_value(shop, 1) == "redacted"
    for word in ("First1", "First2", "Gift1"):
        assert tables_with(shop, word) == [], word


def test_what_was_clean_or_cannot_be_personal_is_not_remembered(shop):
    """Breaks when an order that leaves nothing behind is worked on although its row is gone."""
    shop.sql("UPDATE shop.customers SET first_name = NULL, last_name = '', email = %s, phone = NULL", [PLACEHOLDER], "shop_owner")
    delete(shop)
    assert order_value(shop, 1) == "gone"


def test_personal_data_that_came_back_is_remembered_too(db):
    """Breaks when a re-import on a redacted order is deleted with the order's row before the next cycle."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.sql("UPDATE shop.customers SET first_name = 'Comeback' WHERE id = 1; DELETE FROM shop.orders", user="shop_owner")
    assert order_value(db, 1) == "redacted"
    run_cycle(db)
    assert tables_with(db, "Comeback") == []
    assert '"Comeback"' in str(db.value("SELECT amazon_pii.peek(%s, 'x')::text", [number(1)], "pii_operator"))


def test_an_invoice_that_is_not_due_yet_outlives_its_order(db):
    """Breaks when a late row of a redacted order is forgotten with the order's row."""
    open_shop(db)
    add_order(db, 1)
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.sql(WEAK, user="shop_owner")
    add_invoice(db, 1, 1, "1 day")
    run_cycle(db)
    delete(db)
    assert order_value(db, 1) == "redacted" and tables_with(db, "BillTo1") == ["invoices"]
    month_passes(db)
    run_cycle(db)
    assert tables_with(db, "BillTo1") == []


def test_what_bears_the_key_of_an_order_is_found_without_its_row(shop):
    """Breaks when triggers that were off, or TRUNCATE, leave rows behind that their key still names."""
    shop.sql(WEAK, user="shop_owner")
    shop.psql("SET session_replication_role = replica; DELETE FROM shop.orders")
    month_passes(shop)
    sweep(shop)
    for word in ("Name1", "BillTo1", "LineNote1"):
        assert tables_with(shop, word) == [], word


def test_a_truncated_table_leaves_what_bears_its_keys_due(shop):
    """Breaks when TRUNCATE of the orders ends the watch over rows that it does not take along."""
    shop.sql(WEAK, user="shop_owner")
    shop.sql("ALTER TABLE shop.payloads DROP CONSTRAINT payloads_order_id_fkey; TRUNCATE shop.orders", user="shop_owner")
    assert order_value(shop, 1) == "scheduled"
    month_passes(shop)
    run_cycle(shop)
    for word in ("Name1", "BillTo1", "LineNote1"):
        assert tables_with(shop, word) == [], word


def test_many_are_deleted_at_once(db):
    """Breaks when only the first of a large deletion are remembered, or web orders are looked at."""
    open_shop(db)
    fill(db, 2500, age="1 day")
    fill(db, 2600, first=2501, age="1 day", channel="web")
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.sql("DELETE FROM shop.orders", user="shop_owner")
    assert db.sql("SELECT status, count(*) FROM amazon_pii.records GROUP BY 1") == [("remembered", 2500)]
    month_passes(db)
    assert run_cycle(db)["redacted"] == 2500
    assert db.value("SELECT count(*) FROM shop.customers WHERE first_name LIKE 'First%'") == 100


def test_a_failing_expression_fails_no_deletion(shop):
    """Breaks when what a policy says of a row that is gone stops the shop's DELETE (P11)."""
    shop.sql("ALTER TABLE shop.customers RENAME COLUMN first_name TO given_name", user="shop_owner")
    delete(shop)
    assert shop.value("SELECT count(*) FROM shop.orders") == 0


def test_a_deleted_order_is_erased_and_certified(shop):
    """Breaks when what is asked of an order that was deleted does not reach the rows that are remembered."""
    delete(shop)
    with refused("55000", "is not done yet"):
        shop.sql("SELECT amazon_pii.certificate(%s)", [number(1)], "pii_auditor")
    shop.sql("SELECT amazon_pii.forget(%s, 'ticket 1')", [number(1)], "pii_admin")
    run_cycle(shop)
    assert tables_with(shop, "First1") == [] and order_value(shop, 1) == "purged"
    proof = shop.value("SELECT amazon_pii.certificate(%s)", [number(1)], "pii_auditor")
    assert [t["table"] for t in proof["orders"][0]["tables"]] == ["shop.customers"]


def test_a_generic_customer_stays_when_an_order_is_deleted(db):
    """Breaks when a deleted order takes the customer along that all Amazon orders are pointed at, and leaves the importer's."""
    open_shop(db)
    for customer in (1, 100):
        add_customer(db, customer)
    document = shop_policy()
    document["orders"]["assign_customer"] = {"column": "customer_id", "to": 100}
    db.apply_policy(document)
    # Deleted before a cycle has seen that it came.
    add_order(db, 1, None, customer=1)
    delete(db)
    assert order_value(db, 1) == "scheduled"
    run_cycle(db)
    assert record_states(db, "shop.customers", 100) == {}
    month_passes(db)
    run_cycle(db)
    assert db.sql("SELECT id, last_name FROM shop.customers ORDER BY id") == [(1, PLACEHOLDER), (100, "Last100")]
    assert order_value(db, 1) == "redacted"


def test_a_former_generic_customer_is_known_after_a_rename(db):
    """Breaks when the column of an earlier version is looked for under its name of then."""
    open_shop(db)
    for customer in (1, 100, 101):
        add_customer(db, customer)
    document = shop_policy()
    document["orders"]["assign_customer"] = {"column": "customer_id", "to": 100}
    db.apply_policy(document)
    add_order(db, 1, "1 day", customer=1)
    document["orders"]["assign_customer"]["to"] = 101
    db.apply_policy(document)
    db.sql("ALTER TABLE shop.orders RENAME customer_id TO buyer_id", user="shop_owner")
    db.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    assert run_cycle(db)["redacted"] == 1
    assert db.value("SELECT last_name FROM shop.customers WHERE id = 100") == "Last100"


def test_text_that_holds_a_deleted_orders_names_is_remembered(db):
    """Breaks when a row with nothing but names in kept text is lost with the order that it bears the number of."""
    open_shop(db)
    db.sql("CREATE TABLE shop.payments (id int PRIMARY KEY, order_no text, memo text); CREATE INDEX ON shop.payments (order_no)", user="shop_owner")
    document = shop_policy()
    document["linked"].append({"table": "shop.payments", "on": {"order_no": "external_no"}, "redact": {"memo": {"scrub": ["customers.last_name"]}}})
    db.apply_policy(document)
    add_customer(db, 1)
    add_order(db, 1, "1 day", customer=1)
    db.sql("INSERT INTO shop.payments VALUES (1, %s, 'Manual Payment: Last1'), (2, %s, 'card')", [number(1)] * 2, "shop_owner")
    delete(db)
    month_passes(db)
    run_cycle(db)
    assert db.sql("SELECT memo FROM shop.payments ORDER BY id") == [(f"Manual Payment: {PLACEHOLDER}",), ("card",)]
