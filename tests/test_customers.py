"""Customers of Amazon orders: none of another channel's orders for them, no duplicates and no merges of archived ones."""
import json

import psycopg2
import pytest
from cluster import MAJOR
from support import (
    add_customer, add_order, end_retrieval, number, open_shop, order_value, refused, retrieve, run_cycle, shop_policy,
)

BY = ["first_name", "last_name", "lower(phone)"]


def policy_with(entry=None, **orders):
    """The shop's policy with changes of the customer's entry and of the orders table."""
    document = shop_policy()
    document["linked"][1].update(entry or {})
    document["orders"].update(orders)
    return document


@pytest.fixture
def shop(db):
    """Order 1 is Amazon's and due, order 2 another channel's; each has a customer of its own."""
    open_shop(db)
    for n in (1, 2, 3):
        add_customer(db, n)
    add_order(db, 1, customer=1)
    add_order(db, 2, customer=2, channel="web")
    return db


def manual(db, order, customer, user="shop_owner"):
    db.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (%s, %s, 'phone', %s)",
           [order, f"P-{order}", customer], user)


# Orders of other channels


def test_a_manual_order_for_amazons_customer_is_refused(shop):
    """Breaks when the guard does not see an insert, an upsert, COPY or an UPDATE that points an order at the customer, or
    keeps out more than that."""
    shop.apply_policy(policy_with(manual_orders="refuse"))
    with refused("23001", "for a customer of Amazon orders"):
        manual(shop, 10, 1)
    with refused("23001"):
        shop.sql("UPDATE shop.orders SET customer_id = 1 WHERE id = 2", user="shop_owner")
    with refused("23001"):
        shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (2, 'x', 'web', 1) "
                 "ON CONFLICT (id) DO UPDATE SET customer_id = EXCLUDED.customer_id", user="shop_owner")
    with refused("23001"):
        shop.sql("INSERT INTO shop.orders (id, channel, customer_id) SELECT 20 + i, CASE WHEN i = 2 THEN 'amazon' ELSE 'web' END, 3 "
                 "FROM generate_series(1, 3) AS i", user="shop_owner")
    manual(shop, 11, 2)
    manual(shop, 12, None)
    add_order(shop, 13, customer=1)
    shop.sql("UPDATE shop.orders SET total = 7, channel = 'web' WHERE id IN (2, 11)", user="shop_owner")
    assert shop.value("SELECT array_agg(id ORDER BY id) FROM shop.orders") == [1, 2, 11, 12, 13]


def test_the_refusal_has_no_personal_data_and_a_hint(shop):
    """P9. Breaks when the message quotes the row."""
    shop.apply_policy(policy_with(manual_orders="refuse"))
    with pytest.raises(psycopg2.Error) as caught:
        manual(shop, 10, 1)
    assert caught.value.diag.message_hint == "Make a customer of its own for the order."
    assert "P-10" not in str(caught.value) and "Last1" not in str(caught.value)


def test_an_order_that_had_the_customer_before_is_left_alone(shop):
    """Breaks when an UPDATE that does not touch the customer is refused."""
    manual(shop, 10, 1)
    shop.apply_policy(policy_with(manual_orders="refuse"))
    shop.sql("UPDATE shop.orders SET shipped_at = now(), external_no = 'P-10b' WHERE id = 10", user="shop_owner")


def test_a_warning_goes_to_the_caller_and_to_the_log(shop):
    """Breaks when the order is refused after all, nobody is told, or the log says more than keys."""
    shop.apply_policy(policy_with(manual_orders="warn"))
    session = shop.connect("shop_owner")
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (10, 'P-10', 'phone', 1), "
                       "(11, 'P-11', 'phone', 1), (12, 'P-12', 'phone', 2)")
    assert [n for n in session.notices if n.startswith("WARNING:  2 orders of other channels")], session.notices
    session.close()
    log = shop.sql("SELECT order_key, order_number, detail FROM amazon_pii.audit_log WHERE action = 'manual_order' ORDER BY 1")
    assert log == [('["10"]', "P-10", "for a customer of Amazon orders"), ('["11"]', "P-11", "for a customer of Amazon orders")]


def test_nothing_is_asked_without_the_key(shop):
    """Breaks when the guard is there for everybody."""
    shop.apply_policy(shop_policy())
    manual(shop, 10, 1)


def test_an_error_in_the_condition_lets_the_order_through(shop):
    """P11. Breaks when a broken policy keeps orders from being written."""
    shop.sql("CREATE FUNCTION shop.is_amazon(text) RETURNS boolean LANGUAGE plpgsql AS "
             "$$BEGIN IF $1 = 'phone' THEN RAISE 'no'; END IF; RETURN $1 = 'amazon'; END$$", user="shop_owner")
    shop.apply_policy(policy_with(manual_orders="refuse", amazon="shop.is_amazon(channel)"))
    manual(shop, 10, 1)
    assert order_value(shop, 10) == "failed"


# Duplicates


def same_as(db, customer, other, **changes):
    """A customer with the names and phone of another."""
    db.sql("INSERT INTO shop.customers SELECT %s, first_name, last_name, %s, phone FROM shop.customers WHERE id = %s",
           [customer, f"c{customer}@example.invalid", other], "shop_owner")
    for column, value in changes.items():
        db.sql(f"UPDATE shop.customers SET {column} = %s WHERE id = %s", [value, customer], "shop_owner")


def duplicates(db, user="pii_operator"):
    groups = {}
    for group, key in db.sql("SELECT duplicate, customer_key FROM amazon_pii.find_duplicates('shop')", user=user):
        groups.setdefault(group, []).append(json.loads(key)[0])
    return [sorted(keys) for _, keys in sorted(groups.items())]


def test_duplicates_are_found_whatever_their_case_and_blanks(shop):
    """Breaks when two that differ count as the same, or two that are the same do not; or when an empty row is a duplicate."""
    same_as(shop, 4, 2, first_name=" FIRST 2", phone="+495550002")
    same_as(shop, 5, 2, last_name="Other")
    same_as(shop, 6, 3)
    same_as(shop, 7, 3)
    shop.sql("INSERT INTO shop.customers (id) VALUES (8), (9)", user="shop_owner")
    shop.sql("INSERT INTO shop.customers (id, first_name, last_name) VALUES (11, 'Ä', NULL), (12, 'ä ', '')", user="shop_owner")
    shop.apply_policy(policy_with({"duplicate_by": BY}))
    found = duplicates(shop)
    assert sorted(found, key=min) in ([["11", "12"], ["2", "4"], ["3", "6", "7"]], [["2", "4"], ["3", "6", "7"]])
    assert duplicates(shop, "pii_admin") == found


def test_customers_of_archived_orders_are_no_duplicates(shop):
    """Breaks when placeholders are duplicates of each other, when what a retrieval wrote back is one, or an archived copy is
    overlooked."""
    same_as(shop, 4, 1)
    same_as(shop, 5, 2)
    add_order(shop, 4, customer=4)
    shop.apply_policy(policy_with({"duplicate_by": BY, "redact": {
        "first_name": "null", "last_name": {"value": "gone"}, "email": "null", "phone": "null"}}))
    assert duplicates(shop) == [["1", "4"], ["2", "5"]]
    run_cycle(shop)
    assert shop.value("SELECT last_name FROM shop.customers WHERE id = 1") == "gone"
    assert duplicates(shop) == [["2", "5"]]
    for order in (1, 4):
        retrieve(shop, number(order))
    assert duplicates(shop) == [["2", "5"]]
    same_as(shop, 6, 2)
    add_order(shop, 6, customer=6, shipped="29 days 12 hours")
    run_cycle(shop)
    assert (order_value(shop, 6), duplicates(shop)) == ("archived", [["2", "5"]])


def test_what_is_compared_must_be_said(shop):
    """Breaks when a policy without the key gives an empty answer."""
    shop.apply_policy(shop_policy())
    with refused("55000", "does not say which customers are duplicates"):
        duplicates(shop)
    document = shop_policy()
    del document["linked"][1]["role"]
    shop.apply_policy(document)
    with refused("55000", "does not say where its customers are"):
        duplicates(shop)
    with refused("42704"):
        shop.sql("SELECT amazon_pii.find_duplicates('nothing')", user="pii_operator")


def test_the_owner_evaluates_what_is_compared(shop):
    """P8. Breaks when an expression runs with the rights of the caller or of the extension."""
    shop.sql("CREATE TABLE shop.seen (who name); CREATE FUNCTION shop.look(text) RETURNS text LANGUAGE plpgsql AS "
             "$$BEGIN INSERT INTO shop.seen VALUES (current_user); RETURN $1; END$$", user="shop_owner")
    shop.apply_policy(policy_with({"duplicate_by": ["shop.look(last_name)"]}))
    duplicates(shop)
    assert shop.sql("SELECT DISTINCT who FROM shop.seen") == [("shop_owner",)]


@pytest.mark.parametrize("by", ["nonsense(", "no_column", "nothing(last_name)"])
def test_what_is_compared_is_checked(shop, by):
    """Breaks when an expression that the server does not accept is found out by whoever looks for duplicates."""
    found = shop.check_policy(policy_with({"duplicate_by": [by]}))
    assert [f[0] for f in found] == ["error"] and "duplicate_by" in found[0][1] + found[0][2]


# Merges


def mergeable(db, a, b, user="pii_operator"):
    db.sql("SELECT amazon_pii.assert_mergeable('shop', %s, %s)", [a, b], user)


def test_a_customer_that_was_archived_is_not_merged(shop):
    """Breaks when one of the states is overlooked, on either side, or a customer that is in no archive is refused."""
    shop.apply_policy(shop_policy())
    mergeable(shop, "2", "3")
    mergeable(shop, '["1"]', '["2"]', "pii_admin")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '29 days 12 hours'::interval", user="shop_owner")
    run_cycle(shop)
    for keys in (("1", "2"), ('["2"]', '["1"]')):
        with refused("55000", 'customer ["1"] cannot be merged: its personal data is archived'):
            mergeable(shop, *keys)
    mergeable(shop, "2", "3")
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now()")
    run_cycle(shop)
    with refused("55000", "is redacted"):
        mergeable(shop, "2", "1")
    retrieve(shop, number(1))
    with refused("55000", "is retrieved"):
        mergeable(shop, "2", "1")


def test_a_customer_that_waits_for_another_order_is_archived_too(shop):
    """Breaks when the copy that a redacted order has of a living customer's row could not be written back any more."""
    add_order(shop, 5, customer=1, channel="web", shipped=None)
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    assert shop.value("SELECT last_name FROM shop.customers WHERE id = 1") == "Last1"
    with refused("55000", "is archived"):
        mergeable(shop, "1", "2")


def test_keys_that_are_none(shop):
    """Breaks when a wrong key passes as a customer that can be merged."""
    shop.apply_policy(shop_policy())
    for a, b, state in (("2", "99", "P0002"), ("x", "2", "22023"), ('["2", "3"]', "2", "22023"), ("2", "2", "22023"),
                        ("02", '["2"]', "22023"), ("[null]", "2", "22023")):
        with refused(state):
            mergeable(shop, a, b)


MERGE = "UPDATE shop.orders SET customer_id = %s WHERE customer_id = %s"


def test_the_merge_statement_is_refused(shop):
    """Breaks when orders move from or to an archived customer; an order that gets its first customer is none that moves."""
    manual(shop, 20, None)
    shop.apply_policy(policy_with({"merge": "refuse"}))
    run_cycle(shop)
    for new, old in ((2, 1), (1, 2)):
        with refused("55000", 'customer ["1"] cannot be merged: its personal data is redacted'):
            shop.sql(MERGE, [new, old], "shop_owner")
    shop.sql(MERGE, [3, 2], "shop_owner")
    shop.sql("UPDATE shop.orders SET customer_id = 1 WHERE id = 20; UPDATE shop.orders SET customer_id = NULL WHERE id = 20; "
             "UPDATE shop.orders SET total = 8", user="shop_owner")
    retrieve(shop, number(1))
    with refused("55000", "is retrieved"):
        shop.sql(MERGE, [2, 1], "shop_owner")
    end_retrieval(shop, number(1))
    assert run_cycle(shop)["failed"] == 0


def test_the_last_order_that_leaves_is_still_seen(shop):
    """Breaks when the customer that nobody points at any more is not known as the one that was archived."""
    add_order(shop, 5, customer=1, channel="web", shipped=None)
    shop.apply_policy(policy_with({"merge": "refuse"}))
    run_cycle(shop)
    with refused("55000"):
        shop.sql(MERGE, [2, 1], "shop_owner")
    assert shop.value("SELECT count(*) FROM shop.orders WHERE customer_id = 1") == 2


def test_merges_are_free_without_the_key(shop):
    """Breaks when the guard is there for everybody."""
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    shop.sql(MERGE, [2, 1], "shop_owner")


# What a document must say


@pytest.mark.parametrize("change, path, hint", [
    (lambda d: d["orders"].update(manual_orders="refuse") or d["linked"][1].pop("role"), "orders.manual_orders", "customers table"),
    (lambda d: d["linked"][0].update(role="customer") or d["linked"][1].update(merge="refuse"), "linked[1].merge", "role"),
    (lambda d: d["linked"][0].update(duplicate_by=["name"]), "linked[0].duplicate_by", '"role": "customer"'),
    (lambda d: d["orders"].update(manual_orders="refused"), "orders.manual_orders", "refuse"),
], ids=["no customer", "two customers", "not the customer's", "no such word"])
def test_the_customer_must_be_named(shop, change, path, hint):
    """Breaks when a guard is applied that nothing can come of."""
    document = shop_policy()
    change(document)
    found = shop.check_policy(document)
    assert len(found) == 1 and found[0][0] == "error" and path in found[0][2] and hint in found[0][3]


@pytest.mark.skipif(MAJOR < 15, reason="MERGE came with PostgreSQL 15")
def test_merge_into_is_seen_too(shop):
    """Breaks when a guard looks at INSERT and UPDATE statements only."""
    shop.apply_policy(policy_with(manual_orders="refuse"))
    with refused("23001"):
        shop.sql("MERGE INTO shop.orders AS o USING (VALUES (2, 1), (30, 2)) AS s (id, c) ON o.id = s.id "
                 "WHEN MATCHED THEN UPDATE SET customer_id = s.c WHEN NOT MATCHED THEN INSERT (id, channel, customer_id) "
                 "VALUES (s.id, 'web', s.c)", user="shop_owner")
