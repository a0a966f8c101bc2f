"""Orders that are retrieved by themselves when a return or a credit is inserted for them."""
import json

import pytest
from support import (
    PLACEHOLDER, Background, add_customer, add_order, end_retrieval, number, open_shop, order_value, payloads, refused,
    retrieve, run_cycle, shop_policy,
)

RETURNS = """
SET ROLE shop_owner;
CREATE TABLE shop.returns (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id bigint NOT NULL REFERENCES shop.orders,
    kind text NOT NULL DEFAULT 'return', note text);
CREATE INDEX ON shop.returns (order_id);
GRANT USAGE ON SCHEMA shop TO PUBLIC;
GRANT SELECT, INSERT ON shop.returns TO PUBLIC;
"""


def policy(condition=True, **changes):
    document = shop_policy(**changes)
    document["linked"].append({"table": "shop.returns", "on": {"order_id": "id"}, "redact": ["note"],
                               "retrieve_on_insert": condition})
    return document


@pytest.fixture
def shop(db):
    """Orders 1 to 3, each with a customer of its own, dispatched long ago."""
    open_shop(db)
    db.psql(RETURNS)
    for n in (1, 2, 3):
        add_customer(db, n)
        add_order(db, n, customer=n)
    return db


@pytest.fixture
def redacted(shop):
    shop.apply_policy(policy(retrieve_for=["shop_owner"]))
    run_cycle(shop)
    assert gift(shop, 1) == PLACEHOLDER
    return shop


def gift(db, order):
    return db.value("SELECT gift_message FROM shop.orders WHERE id = %s", [order])


def comes_back(db, *orders, user="shop_owner", kind="return"):
    db.sql("INSERT INTO shop.returns (order_id, kind, note) SELECT o, %s, 'Last' || o FROM unnest(%s::bigint[]) AS o",
           [kind, list(orders)], user)


LOG = 'SELECT "user", action, order_key, order_number, reason FROM amazon_pii.audit_log WHERE action LIKE \'retrieve%%\' ORDER BY audit_id, order_key'


def test_a_return_brings_the_order_back(redacted):
    """pixi: data retrieved automatically when a return or a credit is created. Breaks when the order stays redacted, another
    comes back too, the log is silent, or the row itself is not redacted with the order later."""
    comes_back(redacted, 1)
    assert [gift(redacted, n) for n in (1, 2)] == ["Gift1", PLACEHOLDER]
    assert redacted.value("SELECT last_name FROM shop.customers WHERE id = 1") == "Last1"
    assert order_value(redacted, 1) == "retrieved"
    assert redacted.value("SELECT retrieved_until - retrieved_at = '30 days' FROM amazon_pii.orders WHERE order_key = '[\"1\"]'")
    assert redacted.sql(LOG) == [("shop_owner", "retrieve", '["1"]', number(1), "automatic: returns")]
    run_cycle(redacted)
    assert gift(redacted, 1) == "Gift1"
    with refused("55000", "read-only"):
        redacted.sql("UPDATE shop.orders SET gift_message = 'x' WHERE id = 1", user="shop_owner")
    end_retrieval(redacted, number(1))
    run_cycle(redacted)
    assert gift(redacted, 1) == redacted.value("SELECT note FROM shop.returns") == PLACEHOLDER


def test_many_rows_of_one_statement(redacted):
    """Breaks when an order is retrieved, or logged, once for each of its rows, or when only the first of several is."""
    comes_back(redacted, 1, 2, 1, 2, 1)
    assert [order_value(redacted, n) for n in (1, 2, 3)] == ["retrieved", "retrieved", "redacted"]
    assert [line[2] for line in redacted.sql(LOG)] == ['["1"]', '["2"]']
    comes_back(redacted, 1, 2, 3)
    assert [line[2] for line in redacted.sql(LOG)] == ['["1"]', '["2"]', '["3"]']
    assert redacted.value("SELECT count(*) FROM shop.returns") == 8


def test_it_goes_with_the_transaction_and_the_log_does_not(redacted):
    """Breaks when a rollback leaves the personal data in the table, or takes the log entry along."""
    session = redacted.connect("shop_owner", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.returns (order_id) VALUES (1)")
        cursor.execute("SELECT gift_message FROM shop.orders WHERE id = 1")
        assert cursor.fetchone() == ("Gift1",)
    session.rollback()
    session.close()
    assert (gift(redacted, 1), order_value(redacted, 1)) == (PLACEHOLDER, "redacted")
    assert len(redacted.sql(LOG)) == 1


def test_a_condition_over_the_new_row(shop):
    """Breaks when every row has the order retrieved, or the condition is evaluated with the caller's rights."""
    shop.sql("CREATE TABLE shop.seen (who name); CREATE FUNCTION shop.comes(text) RETURNS boolean LANGUAGE plpgsql AS "
             "$$BEGIN INSERT INTO shop.seen VALUES (current_user); RETURN $1 = 'credit'; END$$", user="shop_owner")
    shop.apply_policy(policy("shop.comes(kind)"))
    run_cycle(shop)
    comes_back(shop, 1, user="pii_operator")
    assert order_value(shop, 1) == "redacted"
    comes_back(shop, 1, kind="credit", user="pii_operator")
    assert order_value(shop, 1) == "retrieved"
    assert shop.sql("SELECT DISTINCT who FROM shop.seen") == [("shop_owner",)]
    assert shop.sql(LOG)[0][0] == "pii_operator"


def test_a_role_that_may_not_retrieve(redacted):
    """P8. Breaks when whoever may insert a return gets the buyer's data back, when the insert fails, or when nobody is told."""
    session = redacted.connect("nobody_special")
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.returns (order_id) VALUES (1)")
    assert "1 redacted orders were not retrieved" in session.notices[-1] and "nobody_special" in session.notices[-1]
    session.close()
    assert (gift(redacted, 1), order_value(redacted, 1)) == (PLACEHOLDER, "redacted")
    assert redacted.sql(LOG) == [("nobody_special", "retrieve_refused", '["1"]', number(1), "automatic: returns")]


def test_a_member_of_a_named_role_may(redacted):
    """Breaks when membership is not heeded: applications log in under a role of their own."""
    redacted.sql("GRANT shop_owner TO nobody_special")
    try:
        comes_back(redacted, 1, user="nobody_special")
    finally:
        redacted.sql("REVOKE shop_owner FROM nobody_special")
    assert order_value(redacted, 1) == "retrieved"
    assert redacted.sql(LOG)[0][0] == "nobody_special"


def test_the_insert_succeeds_whatever_goes_wrong(redacted):
    """P11. Breaks when a damaged archive keeps a return from being booked, or when nothing says that the order did not come."""
    redacted.sql("UPDATE amazon_pii_archive.document SET sealed = '\\x00' WHERE order_key = '[\"1\"]'")
    session = redacted.connect("shop_owner")
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.returns (order_id) VALUES (1)")
    assert any("could not be retrieved: XX001" in n for n in session.notices), session.notices
    session.close()
    assert (gift(redacted, 1), order_value(redacted, 1)) == (PLACEHOLDER, "redacted")
    assert [line[1] for line in redacted.sql(LOG)] == ["retrieve", "retrieve_failed"]
    assert "XX001" in redacted.value("SELECT detail FROM amazon_pii.audit_log WHERE action = 'retrieve_failed'")


def test_an_error_in_the_condition(shop):
    """P11. Breaks when a broken condition keeps a return from being booked."""
    shop.apply_policy(policy("1 / (length(kind) - 6) >= 0"))
    run_cycle(shop)
    comes_back(shop, 1, user="pii_operator")
    assert shop.value("SELECT count(*) FROM shop.returns") == 1
    assert order_value(shop, 1) == "redacted"


def test_an_order_that_a_cycle_works_on(redacted):
    """Breaks when the insert waits for a cycle, or for its own log entry, for ever."""
    lock = redacted.connect(autocommit=False)
    lock.cursor().execute("SELECT FROM amazon_pii.order_state WHERE order_key = '[\"1\"]' FOR UPDATE")
    Background(redacted, "INSERT INTO shop.returns (order_id) VALUES (1)", user="shop_owner").result(30)
    lock.rollback()
    lock.close()
    assert redacted.value("SELECT count(*) FROM shop.returns") == 1
    comes_back(redacted, 1)
    assert order_value(redacted, 1) == "retrieved"


def test_the_log_entry_waits_for_no_lock_of_the_insert(redacted):
    """Breaks when the process that writes the log waits for the transaction that waits for it."""
    session = redacted.connect("shop_owner", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("UPDATE shop.orders SET total = 5; UPDATE shop.addresses SET kind = 'x'; "
                       "INSERT INTO shop.orders (id, external_no, channel) VALUES (9, '303-1234567-0000009', 'amazon'); "
                       "INSERT INTO shop.returns (order_id) VALUES (2); INSERT INTO shop.returns (order_id) VALUES (1)")
    session.commit()
    session.close()
    assert [order_value(redacted, n) for n in (1, 2)] == ["retrieved", "retrieved"]


def test_orders_that_hold_their_data_are_left_alone(redacted):
    """Breaks when a return prolongs a retrieval, or an order that was never redacted becomes retrieved."""
    retrieve(redacted, number(1))
    until = order_value(redacted, 1, "retrieved_until")
    add_order(redacted, 5, shipped="3 days")
    comes_back(redacted, 1, 5)
    assert order_value(redacted, 1, "retrieved_until") == until
    assert order_value(redacted, 5) == "scheduled"
    assert [line[4] for line in redacted.sql(LOG)] == ["customer asks about a return"]


def test_a_prepared_transaction_can_bring_an_order_back(redacted):
    """Breaks when the trigger NOTIFYs; the next cycle tells."""
    listener = redacted.connect("pii_operator")
    listener.cursor().execute("LISTEN amazon_pii")
    comes_back(redacted, 1)
    assert payloads(listener) == []
    run_cycle(redacted)
    told = [json.loads(payload) for payload in payloads(listener)]
    assert [(n["status"], n["orders"]) for n in told] == [("retrieved", ['["1"]'])]


def test_copy_and_a_history(shop):
    """Breaks when COPY is not seen, or the shop's history says nothing of what came back by itself."""
    shop.sql("CREATE TABLE shop.history (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id bigint, note text)", user="shop_owner")
    shop.apply_policy(policy(retrieve_for=["shop_owner"], history={"table": "shop.history", "columns": {
        "order_id": {"order": "id"}, "note": ":action :number (:reason)"}}))
    run_cycle(shop)
    shop.psql("COPY shop.returns (order_id, note) FROM STDIN;\n1\tLast1\n2\tLast2\n\\.\n", user="shop_owner")
    assert [order_value(shop, n) for n in (1, 2, 3)] == ["retrieved", "retrieved", "redacted"]
    assert shop.sql("SELECT order_id, note FROM shop.history ORDER BY 1") == [
        (n, f"retrieve {number(n)} (automatic: returns)") for n in (1, 2)]


@pytest.mark.parametrize("change, words", [
    (dict(retrieve_for=["no_such_role"]), 'role "no_such_role" does not exist'),
    (dict(retrieve_for=["shop_owner"], linked=[]), 'needs an entry with "retrieve_on_insert"'),
    (dict(condition="length(kind)"), "not a condition"),
    (dict(condition=1), "neither true nor a condition"),
], ids=["role", "no entry", "no condition", "number"])
def test_what_is_wrong_is_found_when_applied(shop, change, words):
    """Breaks when it is found out by the first return."""
    document = policy(change.pop("condition", True))
    document.update(change)
    found = [f for f in shop.check_policy(document) if f[0] == "error"]
    assert len(found) == 1 and words in found[0][2], found
