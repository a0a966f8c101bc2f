"""A shop whose orders stand in every state that there is, and what must go on with them wherever the database is carried: into a
restored dump, another server, a newer version."""
import re

from support import (
    PLACEHOLDER, add_customer, add_invoice, add_order, end_retrieval, hurry, number, open_shop, order_value, record_states, refused,
    retrieve, run_cycle, shop_policy, snapshot,
)

# Order 7 cannot be redacted.
REFUSE = """
CREATE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.order_id = 7 THEN
        RAISE EXCEPTION 'this address stays';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON shop.addresses FOR EACH ROW EXECUTE FUNCTION shop.refuse();
"""

# Orders that every version knows. 9 and 10 have one customer.
STATES = {1: "redacted", 2: "retrieved", 3: "archived", 4: "scheduled", 5: "flagged", 6: "archived", 7: "failed", 8: "gone", 9: "redacted",
          10: "scheduled", 14: "redacted"}
# What came with 0.2.0.
ENDED = {11: "purged", 12: "purged", 13: "redacted"}
EVERY_STATE = {**STATES, **ENDED}
AGES = {3: "29 days 12 hours", 4: "10 days", 5: None, 10: "5 days", 13: "3 days"}
WEB = 15


def build(db, with_ends=True, **changes):
    """Tables, policy and orders; `changes` are the policy's. `with_ends`: also what erase, shred and forget leave."""
    open_shop(db)
    db.sql(REFUSE, user="shop_owner")
    db.apply_policy(shop_policy(**changes))
    orders = EVERY_STATE if with_ends else STATES
    for order in orders:
        if order != 10:
            add_customer(db, order)
        add_order(db, order, AGES.get(order, "40 days"), customer=9 if order == 10 else order)
    add_invoice(db, 1, 1)
    add_order(db, WEB, channel="web")
    db.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + interval '20 days')", [number(6)], "pii_operator")
    run_cycle(db)
    db.sql("DELETE FROM shop.orders WHERE id = 8", user="shop_owner")
    retrieve(db, number(2))
    db.sql("UPDATE shop.addresses SET name = 'Comeback14' WHERE order_id = 14", user="shop_owner")
    if with_ends:
        db.sql("SELECT amazon_pii.shred(%s, 'asked')", [number(11)], "pii_admin")
        db.sql("SELECT amazon_pii.forget(%s, 'asked')", [number(12)], "pii_admin")
        db.sql("SELECT amazon_pii.erase(%s, 'asked')", [number(13)], "pii_admin")
    run_cycle(db)
    assert found(db) == orders
    return orders


def found(db):
    """The state of each order of the shop, by its number there."""
    rows = db.sql("SELECT (order_key::jsonb)->>0, status FROM amazon_pii.orders WHERE policy = 'shop'")
    return {int(order): status for order, status in rows}


def tables_with(db, word):
    """The tables in which a row holds the word, as a whole."""
    whole = re.compile(rf"\b{re.escape(word)}\b")
    return [t for t, rows in snapshot(db).items() if any(whole.search(row) for row in rows)]


def shown(db):
    """What a move must not change: all that people see of orders, records and accesses, and what is in the shop's tables."""
    return {
        "orders": db.sql("SELECT * FROM amazon_pii.orders ORDER BY policy, order_key"),
        "records": db.sql("SELECT * FROM amazon_pii.records ORDER BY policy, order_key, table_name, record_key"),
        "log": db.sql("SELECT * FROM amazon_pii.audit_log ORDER BY audit_id, order_key", user="pii_auditor"),
        "shop": [db.sql(f"SELECT t::text FROM shop.{t} AS t ORDER BY 1") for t in ("orders", "customers", "addresses", "invoices")],
    }


def whole_log(db):
    """Every entry of the audit log holds, and is in its place."""
    rows = db.sql("SELECT severity, finding FROM amazon_pii.verify_audit_log()", user="pii_auditor")
    return bool(rows) and "error" not in {severity for severity, _ in rows}, rows


def goes_on(db, orders):
    """Each order goes from where it stood to where it belongs, archived values come back, and new orders are flagged."""
    run_cycle(db)
    assert found(db) == orders
    # A retrieval ends, and comes back whole.
    assert tables_with(db, "Name2") == ["addresses"] and tables_with(db, "Name1") == []
    end_retrieval(db, number(2))
    run_cycle(db)
    assert tables_with(db, "Name2") == [] and order_value(db, 2) == "redacted"
    for order, words in ((1, ("Gift1", "Name1", "First1", "BillTo1", "LineNote1")), (14, ("Comeback14", "First14"))):
        retrieve(db, number(order))
        assert [w for w in words if not tables_with(db, w)] == [] and order_value(db, order) == "retrieved"
    with refused("55000", "read-only"):
        db.sql("UPDATE shop.addresses SET name = 'Else' WHERE order_id = 1", user="shop_owner")
    assert "Street 8" in str(db.value("SELECT amazon_pii.peek(%s, 'test')", [number(8)], "pii_operator"))
    # A hold holds, and ends.
    assert tables_with(db, "Name6") == ["addresses"]
    db.sql("SELECT amazon_pii.release(%s)", [number(6)], "pii_operator")
    # Failed orders are tried again, and those without an anchor get one.
    db.sql("DROP TRIGGER refuse ON shop.addresses", user="shop_owner")
    hurry(db)
    # A customer of two orders goes with the later one.
    assert record_states(db, "shop.customers", 9) == {9: "waiting"} and tables_with(db, "First9") == ["customers"]
    db.sql("UPDATE shop.orders SET shipped_at = now() - interval '40 days' WHERE id IN (3, 4, 5, 10)", user="shop_owner")
    add_order(db, 20)
    run_cycle(db)
    hurry(db)
    run_cycle(db)
    after = {**orders, 1: "retrieved", 14: "retrieved", 2: "redacted", **dict.fromkeys((4, 5, 6, 7, 10, 20), "redacted")}
    assert found(db) == after
    assert [w for w in ("Name4", "Name5", "Name6", "Name7", "Name20", "First9") if tables_with(db, w)] == []
    assert db.value("SELECT gift_message FROM shop.orders WHERE id = 20") == PLACEHOLDER
    assert tables_with(db, f"Gift{WEB}") == ["orders"]
    retrieve(db, number(20))
    assert tables_with(db, "Name20") == ["addresses"]
    for order in orders.keys() & {11, 12}:
        with refused("42704", "no longer exists"):
            retrieve(db, number(order))
    good, rows = whole_log(db)
    assert good, rows
