"""The life of an order: flagged, archived, redacted, retrieved, redacted again. Empty stays empty (P6), and what comes back
is caught (P7)."""
import pytest
from cluster import wait_until
from support import (
    PLACEHOLDER, add_customer, add_invoice, add_order, fill, number, open_shop, order_number, order_value, run_cycle, shop_policy,
    snapshot, sweep, tables_with, uses_merge,
)

DOCUMENTS = "SELECT count(*) FROM amazon_pii_archive.document"
CHANGED = "Comeback"


@pytest.fixture
def shop(db):
    """Order 1 with everything an order can have, dispatched long ago, and a web order of somebody else."""
    open_shop(db)
    add_customer(db, 1)
    add_customer(db, 2)
    add_order(db, 1, customer=1)
    add_invoice(db, 1, 1)
    add_order(db, 2, channel="web", customer=2)
    return db


@pytest.fixture
def done(shop):
    """The shop after its first cycle."""
    shop.apply_policy(shop_policy())
    assert run_cycle(shop) == {"flagged": 1, "archived": 1, "redacted": 1, "failed": 0, "overdue": 0}
    return shop


def retrieve(db, order, reason="return"):
    return db.sql("SELECT * FROM amazon_pii.retrieve(%s, %s)", [number(order), reason], "pii_operator")


def end_retrieval(db, order):
    db.sql("SELECT amazon_pii.end_retrieval(%s)", [number(order)], "pii_operator")


def test_an_order_goes_through_its_whole_life(shop):
    """Breaks when any step of the life is missing, loses a value, archives one twice, or touches a web order."""
    before = snapshot(shop)
    shop.apply_policy(shop_policy())
    assert run_cycle(shop) == {"flagged": 1, "archived": 1, "redacted": 1, "failed": 0, "overdue": 0}
    after = snapshot(shop)
    assert (order_value(shop, 1), order_value(shop, 2)) == ("redacted", None)
    for word in ("Gift1", "Note1", "Name1", "Street 1", "City1", "Z1", "First1", "buyer1", "BillTo1", "LineNote1", "+49 555 0001"):
        assert tables_with(shop, word) == []
    assert shop.sql("SELECT external_no, channel, total::text, gift_message FROM shop.orders WHERE id = 1") == [
        (number(1), "amazon", "10.10", PLACEHOLDER)]
    assert shop.sql("SELECT line1, line2 FROM shop.addresses WHERE order_id = 1") == [(PLACEHOLDER, None)]
    for table, word in (("orders", "Gift2"), ("customers", "First2"), ("addresses", "Name2")):
        assert [r for r in after[table] if word in r] == [r for r in before[table] if word in r] != []
    archived = shop.value(DOCUMENTS)
    assert archived == 5
    sealed = b"".join(bytes(r[0]) for r in shop.sql("SELECT sealed FROM amazon_pii_archive.document"))
    assert b"Gift1" not in sealed and b"First1" not in sealed

    retrieve(shop, 1)
    assert snapshot(shop) == before
    assert order_value(shop, 1) == "retrieved"
    assert order_value(shop, 1, "retrieved_until - retrieved_at = '30 days'") is True
    assert run_cycle(shop)["redacted"] == 0, "a retrieval lasts"
    assert snapshot(shop) == before

    end_retrieval(shop, 1)
    assert run_cycle(shop)["redacted"] == 1
    assert snapshot(shop) == after
    assert shop.value(DOCUMENTS) == archived, "nothing is archived twice"
    retrieve(shop, 1)
    assert snapshot(shop) == before


def test_a_retrieval_ends_by_itself(shop):
    """Breaks when retrieved_for is not heeded."""
    shop.apply_policy(shop_policy(retrieved_for="2 seconds"))
    run_cycle(shop)
    retrieve(shop, 1)
    assert tables_with(shop, "Name1") == ["addresses"]
    wait_until(lambda: run_cycle(shop)["redacted"] == 1)
    assert tables_with(shop, "Name1") == []
    assert order_value(shop, 1, "status = 'redacted' AND retrieved_until IS NULL") is True


def test_an_order_is_archived_a_day_before_it_is_redacted(db):
    """Breaks when archive_after or redact_after count from elsewhere than the anchor."""
    open_shop(db)
    for order, age in ((1, "28 days 23 hours"), (2, "29 days 1 hour"), (3, "30 days 1 hour"), (4, None)):
        add_order(db, order, age)
    db.apply_policy(shop_policy())
    assert run_cycle(db) == {"flagged": 4, "archived": 2, "redacted": 1, "failed": 0, "overdue": 0}
    assert [order_value(db, i) for i in (1, 2, 3, 4)] == ["scheduled", "archived", "redacted", "flagged"]
    assert tables_with(db, "Name2") == ["addresses"] and tables_with(db, "Name3") == []
    assert order_value(db, 1, "archive_due_at - anchor_at = '29 days' AND redact_due_at - anchor_at = '30 days'") is True


# P6

NULLS = """
SET ROLE shop_owner;
CREATE TABLE shop.extras (id bigint PRIMARY KEY, order_id bigint NOT NULL, padded char(12), tags text[], born date,
    raw jsonb, alias text, search text, code text, fixed text);
CREATE INDEX ON shop.extras (order_id);
INSERT INTO shop.extras VALUES (1, 1, 'Padme', '{Ann,NULL,""}', '1990-01-01', '{"n": "Ann", "e": "", "z": null}', 'Al', 'An', '12345', 'F'),
    (2, 1, '', '{}', NULL, '{"n": "", "e": null}', '', '', '', ''),
    (3, 1, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
    (4, 1, '   ', '{NULL,""}', NULL, '{}', '', NULL, '', NULL);
INSERT INTO shop.addresses (id, order_id, name, line1, line2, city, zip, phone) OVERRIDING SYSTEM VALUE
    VALUES (901, 1, NULL, NULL, NULL, NULL, NULL, NULL), (902, 1, '', '', '', '', '', ''), (903, 1, 'Filled', '', NULL, ' ', '', NULL);
"""
EXTRAS = {
    "table": "shop.extras", "on": {"order_id": "id"},
    "redact": {"padded": "placeholder", "tags": {"array": "placeholder"}, "born": "null", "raw": {"json": ["$.n", "$.e"]},
               "alias": {"unique": "gone-{key}"}, "search": {"sql": "upper('x')"}, "code": {"prefix": 2}, "fixed": {"value": "-"}},
}


def test_empty_stays_empty(shop):
    """P6. Breaks when NULL or '' is overwritten, under any treatment, or a row without PII is written to at all."""
    shop.psql(NULLS)
    policy = shop_policy()
    policy["linked"].append(EXTRAS)
    rows = "SELECT id, xmin::text FROM shop.extras WHERE id > 1 UNION ALL SELECT id, xmin::text FROM shop.addresses WHERE id IN (901, 902) ORDER BY 1"
    untouched = shop.sql(rows)
    before = snapshot(shop, ("extras", "addresses"))
    shop.apply_policy(policy)
    assert run_cycle(shop)["failed"] == 0
    assert order_value(shop, 1) == "redacted"
    assert shop.sql("SELECT name, line1, line2, city, zip, phone FROM shop.addresses WHERE id >= 900 ORDER BY id") == [
        (None,) * 6, ("",) * 6, (PLACEHOLDER, "", None, PLACEHOLDER, "", None)]
    found = shop.sql("SELECT padded, tags, born, raw, alias, search, code, fixed FROM shop.extras ORDER BY id")
    assert found == [
        (PLACEHOLDER.ljust(12), [PLACEHOLDER, None, ""], None, {"n": PLACEHOLDER, "e": "", "z": None}, "gone-1", "X", "12", "-"),
        (" " * 12, [], None, {"n": "", "e": None}, "", "", "", ""),
        (None,) * 8,
        (" " * 12, [None, ""], None, {}, "", None, "", None),
    ]
    assert shop.sql(rows) == untouched
    # Nor is there a copy of nothing.
    kept = shop.sql("SELECT table_name, record_key FROM amazon_pii.records WHERE table_name IN ('shop.extras', 'shop.addresses')")
    assert sorted(k for t, k in kept if t == "shop.extras") == ['["1"]']
    assert not {'["901"]', '["902"]'} & {k for t, k in kept if t == "shop.addresses"}
    retrieve(shop, 1)
    assert snapshot(shop, ("extras", "addresses")) == before


def test_an_order_without_any_pii_is_done_all_the_same(db):
    """P6. Breaks when an order that has nothing to archive stays due for ever."""
    open_shop(db)
    db.sql("INSERT INTO shop.orders VALUES (1, %s, 'amazon', NULL, now() - '40 days'::interval, NULL, '')", [number(1)], "shop_owner")
    db.apply_policy(shop_policy())
    assert run_cycle(db)["redacted"] == 1
    assert db.sql("SELECT gift_message, shop_note FROM shop.orders") == [(None, "")]
    assert run_cycle(db) == {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 0}
    assert db.value(DOCUMENTS) == 0


# P7. Each statement puts "Comeback" on order 1 after it was redacted.

COMEBACKS = {
    "update of the order": "UPDATE shop.orders SET gift_message = 'Comeback' WHERE id = 1",
    "update of an address": "UPDATE shop.addresses SET name = 'Comeback' WHERE order_id = 1",
    "update of the customer": "UPDATE shop.customers SET email = 'Comeback' WHERE id = 1",
    "upsert": """INSERT INTO shop.orders VALUES (1, '303-1234567-0000001', 'amazon', 1, now() - '40 days'::interval, 'Comeback')
        ON CONFLICT (id) DO UPDATE SET gift_message = EXCLUDED.gift_message""",
    "merge": pytest.param("""MERGE INTO shop.orders AS o USING (VALUES (1::bigint)) AS s (id) ON o.id = s.id
        WHEN MATCHED THEN UPDATE SET shop_note = 'Comeback'""", marks=uses_merge),
    "delete and insert": """DELETE FROM shop.orders WHERE id = 1;
        INSERT INTO shop.orders VALUES (1, '303-1234567-0000001', 'amazon', 1, now() - '40 days'::interval, 'Comeback');
        INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Comeback')""",
    "delete and insert of an address": """DELETE FROM shop.addresses WHERE order_id = 1;
        INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Comeback')""",
    "late credit note": "INSERT INTO shop.invoices VALUES (77, 'CN-77', 1, now() - '31 days'::interval, 'Comeback', -1)",
    "manual invoice": "UPDATE shop.invoices SET bill_to = 'Comeback' WHERE order_id = 1",
    "late invoice line": "INSERT INTO shop.invoice_lines VALUES (77, 1, 'Comeback')",
    "another customer": """INSERT INTO shop.customers (id, first_name) VALUES (3, 'Comeback');
        UPDATE shop.orders SET customer_id = 3 WHERE id = 1""",
    "an address moved here": """INSERT INTO shop.addresses (id, order_id, name) VALUES (77, 2, 'Comeback');
        UPDATE shop.addresses SET order_id = 1 WHERE id = 77""",
    "a statement that matters in part": "UPDATE shop.addresses SET line2 = 'Comeback'",
    "an import that calls it a web order": "UPDATE shop.orders SET channel = 'web', gift_message = 'Comeback' WHERE id = 1",
    "an import that loses its date": "UPDATE shop.orders SET shipped_at = NULL, gift_message = 'Comeback' WHERE id = 1",
    "an import that changes its number": "UPDATE shop.orders SET external_no = '303-9-9', gift_message = 'Comeback' WHERE id = 1",
    "reload of the whole table": """CREATE TEMP TABLE kept ON COMMIT DROP AS SELECT * FROM shop.orders;
        TRUNCATE shop.orders CASCADE; INSERT INTO shop.orders SELECT * FROM kept;
        UPDATE shop.orders SET gift_message = 'Comeback' WHERE id = 1""",
}


@pytest.mark.parametrize("statement", COMEBACKS.values(), ids=COMEBACKS)
def test_pii_that_comes_back_is_caught(done, statement):
    """P7. Breaks when one of the ways back onto a redacted order is not noticed, or its newest value is not archived."""
    done.sql(statement, user="shop_owner")
    assert tables_with(done, CHANGED) != []
    others = [r for rows in snapshot(done).values() for r in rows if "Name2" in r or "Gift2" in r]
    run_cycle(done)
    left = [row for rows in snapshot(done).values() for row in rows if CHANGED in row and ",2,delivery," not in row]
    assert left == []
    assert [r for rows in snapshot(done).values() for r in rows if "Name2" in r or "Gift2" in r] == others
    assert order_value(done, 1) == "redacted"
    found = done.value("SELECT order_number FROM amazon_pii.orders WHERE order_key = '[\"1\"]'")
    done.sql("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [found], "pii_operator")
    assert tables_with(done, CHANGED) != [], "the newest value is what a retrieval gives"


@pytest.mark.parametrize("statement", [
    "UPDATE shop.addresses SET name = 'Comeback' WHERE order_id = 1",
    "UPDATE shop.orders SET gift_message = 'Comeback' WHERE id = 1",
    "INSERT INTO shop.invoice_lines VALUES (77, 1, 'Comeback')",
])
def test_the_sweep_finds_what_came_back_unseen(done, statement):
    """P7. Breaks when redacted orders are not checked again while triggers may have been off."""
    for table in ("orders", "addresses", "invoice_lines"):
        done.sql(f"ALTER TABLE shop.{table} DISABLE TRIGGER USER", user="shop_owner")
    done.sql(statement, user="shop_owner")
    for table in ("orders", "addresses", "invoice_lines"):
        done.sql(f"ALTER TABLE shop.{table} ENABLE TRIGGER USER", user="shop_owner")
    run_cycle(done)
    assert tables_with(done, CHANGED) != [], "no trigger, no notice"
    sweep(done)
    assert tables_with(done, CHANGED) == []
    retrieve(done, 1)
    assert tables_with(done, CHANGED) != []


def test_a_retrieval_gives_the_newest_value_of_each_cell(done):
    """P7. Breaks when a later, smaller version hides the cells of an earlier one, or an older value wins."""
    for column, value in (("name", "Second"), ("line1", "Second Street"), ("name", "Third")):
        done.sql(f"UPDATE shop.addresses SET {column} = %s WHERE order_id = 1", [value], "shop_owner")
        assert run_cycle(done)["redacted"] == 1
    assert done.sql("SELECT version FROM amazon_pii.records WHERE table_name = 'shop.addresses'") == [(4,)]
    retrieve(done, 1)
    assert done.sql("SELECT name, line1, city FROM shop.addresses WHERE order_id = 1") == [("Third", "Second Street", "City1")]


def test_the_same_value_comes_back(done):
    """P7. Breaks when a value that the archive holds already is left in place, or archived once more."""
    documents = done.value(DOCUMENTS)
    done.sql("UPDATE shop.addresses SET name = 'Name1' WHERE order_id = 1", user="shop_owner")
    run_cycle(done)
    assert tables_with(done, "Name1") == []
    assert done.value(DOCUMENTS) == documents


def test_what_a_redacted_order_keeps_is_no_pii(done):
    """P7. Breaks when our own placeholder, or a harmless write, counts as PII: versions and audit entries without end."""
    state = (done.value(DOCUMENTS), done.value("SELECT count(*) FROM amazon_pii.audit_entry"))
    done.sql("UPDATE shop.orders SET total = total + 1; UPDATE shop.addresses SET name = name, kind = 'x'", user="shop_owner")
    for _ in range(2):
        assert (run_cycle(done)["archived"], sweep(done)["archived"]) == (0, 0)
    assert (done.value(DOCUMENTS), done.value("SELECT count(*) FROM amazon_pii.audit_entry")) == state


def test_a_late_invoice_waits_for_its_own_date_alone(shop):
    """P7. Breaks when a young invoice on a redacted order keeps other PII that came back, or is itself taken too early."""
    shop.apply_policy(shop_policy(archive_after="1 day", redact_after="1 day"))
    run_cycle(shop)
    add_invoice(shop, 2, 1, "1 hour")
    shop.sql("UPDATE shop.addresses SET name = 'Comeback' WHERE order_id = 1", user="shop_owner")
    run_cycle(shop)
    assert tables_with(shop, CHANGED) == [], "the invoice is young, the address is not"
    assert tables_with(shop, "BillTo2") == ["invoices"]
    shop.sql("UPDATE shop.orders SET gift_message = 'Comeback' WHERE id = 1", user="shop_owner")
    shop.sql("UPDATE shop.addresses SET name = 'Comeback' WHERE order_id = 1", user="shop_owner")
    run_cycle(shop)
    assert tables_with(shop, CHANGED) == [], "an edit while the invoice waits"
    assert tables_with(shop, "BillTo2") == ["invoices"]


def test_a_late_invoice_is_redacted_on_its_own_date(shop):
    """P7. Breaks when a late row of a table with not_before is forgotten once it was pushed back."""
    shop.apply_policy(shop_policy(archive_after="2 seconds", redact_after="3 seconds"))
    run_cycle(shop)
    add_invoice(shop, 2, 1, "0 seconds")
    run_cycle(shop)
    assert tables_with(shop, "BillTo2") == ["invoices"]
    wait_until(lambda: run_cycle(shop) and tables_with(shop, "BillTo2") == [], timeout=15)
    assert tables_with(shop, "LineNote2") == []
    retrieve(shop, 1)
    assert tables_with(shop, "BillTo2") == ["invoices"]


# Rows that come while a cycle is at their order


def test_a_row_that_is_not_committed_yet_keeps_its_order_from_being_redacted(db):
    """Breaks when an order is redacted behind the back of an import that adds a row to it: nobody looks at that row again."""
    open_shop(db)
    db.apply_policy(shop_policy())
    add_order(db, 1)
    add_order(db, 2)
    with db.connect("shop_owner", autocommit=False) as session:
        session.cursor().execute("INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Late1')")
        run_cycle(db)
        assert [order_value(db, order) for order in (1, 2)] == ["scheduled", "redacted"]
    session.close()
    run_cycle(db)
    assert order_value(db, 1) == "redacted"
    assert tables_with(db, "Late1") == []


def test_a_row_that_comes_while_a_cycle_is_at_its_order_is_noted(db):
    """Breaks when a row that an import adds to an order that a cycle has locked is forgotten once that cycle is done."""
    open_shop(db)
    db.apply_policy(shop_policy())
    add_order(db, 1)
    with db.connect(autocommit=False) as cycle, cycle.cursor() as cursor:
        cursor.execute("SELECT FROM amazon_pii.order_state WHERE order_key = '[\"1\"]' FOR UPDATE")
        with db.connect("shop_owner", options="-c statement_timeout=5s") as session:
            session.cursor().execute("INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Late1')")
        # As if the cycle had ended without this row.
        cursor.execute("UPDATE amazon_pii.order_state SET status = 'redacted', archived_at = now(), next_due_at = NULL")
    cycle.close()
    run_cycle(db)
    assert tables_with(db, "Late1") == []


def test_an_order_that_is_imported_again_while_its_records_wait(db):
    """Breaks when an order that was deleted, and is known still for a record that it shares, comes back unnoticed."""
    fill(open_shop(db), 1, share=2)
    fill(db, 2, first=2, share=2, age="1 day")
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.sql("DELETE FROM shop.addresses WHERE order_id = 1; DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
    run_cycle(db)
    assert order_value(db, 1) == "redacted", "its customer waits for order 2"
    db.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at, gift_message) "
           "VALUES (1, %s, 'amazon', 1, now() - '40 days'::interval, 'Back1')", [order_number(1)], "shop_owner")
    run_cycle(db)
    assert tables_with(db, "Back1") == []
