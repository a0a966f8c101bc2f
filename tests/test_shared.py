"""Rows that several orders share (P5): a customer, an address book, are overwritten only when every order that uses them is
due, orders of other channels included; then they go with the last of them."""
import pytest
from cluster import wait_until
from support import (
    PLACEHOLDER, Background, add_customer, add_order, at_gate, close_gate, number, open_gate, open_shop, order_value, record_states,
    run_cycle, shop_policy, sweep, tables_with,
)

CUSTOMER = "shop.customers"
ALIVE, GONE = ("First1", "buyer1@example.invalid"), (PLACEHOLDER, PLACEHOLDER)


@pytest.fixture
def shop(db):
    """Order 1 was dispatched long ago; what else its customer 1 has is each test's own."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    return db


@pytest.fixture
def one_a_batch(db):
    """Every order is a batch of its own."""
    def change(statement, value):
        db.sql(statement)
        db.sql("SELECT pg_reload_conf()")
        shown = "SELECT current_setting('amazon_pii.batch_size', true)"
        wait_until(lambda: (db.cluster.sql(shown, dbname=db.name)[0][0] or None) == value)

    db.sql("LOAD 'amazon_pii'")
    change("ALTER SYSTEM SET amazon_pii.batch_size = 1", "1")
    yield
    change("ALTER SYSTEM RESET amazon_pii.batch_size", None)


def customer(db, key=1):
    return db.sql("SELECT first_name, email FROM shop.customers WHERE id = %s", [key])[0]


def ask(db, call, *arguments):
    """A call of the operator's: name of the function, order, more arguments."""
    order, *others = arguments
    places = ", ".join(["%s"] * len(arguments))
    return db.sql(f"SELECT * FROM amazon_pii.{call}({places})", [number(order), *others], "pii_operator")


def hold(db, order, until="1 day"):
    db.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + %s::interval)", [number(order), until], "pii_operator")


# Who keeps customer 1 alive beside order 1, and what makes it let go.
OTHERS = {
    "a younger Amazon order": (dict(shipped="3 days"), "UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 2"),
    "an archived one not due yet": (dict(shipped="29 days 12 hours"), "DELETE FROM shop.orders WHERE id = 2"),
    "an unfulfilled Amazon order": (dict(shipped=None), "UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 2"),
    "a web order": (dict(channel="web"), "DELETE FROM shop.orders WHERE id = 2"),
    "an unfulfilled web order": (dict(channel="web", shipped=None), "UPDATE shop.orders SET customer_id = NULL WHERE id = 2"),
}


@pytest.mark.parametrize("other, leave", OTHERS.values(), ids=OTHERS)
def test_a_customer_lives_as_long_as_an_order_needs_it(shop, other, leave):
    """P5. Breaks when a shared row goes with the first of its orders, or never."""
    add_order(shop, 2, customer=1, **other)
    shop.apply_policy(shop_policy())
    assert run_cycle(shop)["redacted"] == 1
    assert customer(shop) == ALIVE
    assert (order_value(shop, 1), tables_with(shop, "Name1"), tables_with(shop, "Name2")) == ("redacted", [], ["addresses"])
    assert record_states(shop, CUSTOMER, 1)[1] == "waiting"
    assert run_cycle(shop)["redacted"] == 0, "a waiting record is no reason to start again"
    shop.sql(leave, user="shop_owner")
    sweep(shop)
    assert customer(shop) == GONE
    assert record_states(shop, CUSTOMER, 1)[1] == "redacted"
    assert shop.value("SELECT records_waiting FROM amazon_pii.status") == 0


def test_every_order_can_bring_back_what_went_with_the_last(shop):
    """P5. Breaks when only the last order's archive holds the shared row."""
    for order in (2, 3):
        add_order(shop, order, customer=1, shipped="29 days 23 hours")
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    assert customer(shop) == ALIVE
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now() WHERE status = 'archived'")
    assert run_cycle(shop)["redacted"] == 2
    assert customer(shop) == GONE
    for order in (1, 2, 3):
        ask(shop, "retrieve", order, "return")
        assert customer(shop) == ALIVE, f"order {order}"
        ask(shop, "end_retrieval", order)
        run_cycle(shop)
        assert customer(shop) == GONE


def test_orders_in_one_batch_take_the_row_together(shop):
    """P5. Breaks when orders of one batch wait for each other for ever."""
    add_order(shop, 2, customer=1)
    add_order(shop, 3, customer=1)
    shop.apply_policy(shop_policy())
    assert run_cycle(shop)["redacted"] == 3
    assert customer(shop) == GONE
    assert record_states(shop, CUSTOMER, 1) == {1: "redacted", 2: "redacted", 3: "redacted"}


def test_orders_in_other_batches_take_the_row_together(shop, one_a_batch):
    """P5. Breaks when an order of a later batch is not seen as one that still needs the row, or the row is left behind."""
    for order in (2, 3, 4):
        add_order(shop, order, customer=1)
    shop.apply_policy(shop_policy())
    assert run_cycle(shop) == {"flagged": 4, "archived": 4, "redacted": 4, "failed": 0, "overdue": 0}
    assert customer(shop) == GONE
    assert set(record_states(shop, CUSTOMER, 1).values()) == {"redacted"}
    for order in (1, 2, 3, 4):
        ask(shop, "retrieve", order, "return")
        assert customer(shop) == ALIVE, f"order {order} has no copy"
        ask(shop, "end_retrieval", order)
        run_cycle(shop)


def test_the_newest_value_of_a_shared_row_is_in_every_archive(shop, one_a_batch):
    """P5, P7. Breaks when a row is overwritten by one order while another's archived copy of it is out of date."""
    shop.apply_policy(shop_policy())
    add_order(shop, 2, customer=1, shipped="39 days")
    add_order(shop, 3, customer=1, shipped="38 days")
    hold(shop, 2)
    hold(shop, 3)
    assert run_cycle(shop)["archived"] == 3
    shop.sql("UPDATE shop.customers SET email = 'newest@example.invalid'", user="shop_owner")
    for order in (2, 3):
        ask(shop, "release", order)
    run_cycle(shop)
    assert customer(shop) == GONE
    for order in (1, 2, 3):
        ask(shop, "retrieve", order, "return")
        assert customer(shop) == ("First1", "newest@example.invalid"), f"order {order}"
        ask(shop, "end_retrieval", order)
        run_cycle(shop)


def test_an_order_left_out_of_its_batch_keeps_the_row(shop):
    """P5. Breaks when an order of the same batch that could not be redacted does not count any more."""
    add_order(shop, 2, customer=1)
    shop.apply_policy(shop_policy())
    session = shop.connect("shop_owner", autocommit=False)
    session.cursor().execute("SELECT FROM shop.addresses WHERE order_id = 2 FOR UPDATE")
    assert run_cycle(shop)["redacted"] == 1
    assert (order_value(shop, 1), order_value(shop, 2)) == ("redacted", "archived")
    assert customer(shop) == ALIVE
    session.rollback()
    session.close()
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    assert run_cycle(shop)["redacted"] == 1
    assert customer(shop) == GONE


def test_a_held_order_keeps_the_row(shop):
    """P5. Breaks when a hold protects an order but not what it shares."""
    shop.apply_policy(shop_policy())
    add_order(shop, 2, customer=1)
    hold(shop, 2)
    assert run_cycle(shop)["redacted"] == 1
    assert (customer(shop), order_value(shop, 2)) == (ALIVE, "archived")
    assert record_states(shop, CUSTOMER, 1) == {1: "waiting", 2: "archived"}
    ask(shop, "release", 2)
    assert run_cycle(shop)["redacted"] == 1
    assert customer(shop) == GONE


def test_a_retrieved_order_keeps_the_row(shop):
    """P5. Breaks when another order's redaction takes what a retrieval has just given back."""
    add_order(shop, 2, customer=1, shipped="3 days")
    shop.sql("UPDATE shop.orders SET customer_id = NULL WHERE id = 2", user="shop_owner")
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    ask(shop, "retrieve", 1, "return")
    shop.sql("UPDATE shop.orders SET customer_id = 1, shipped_at = now() - '40 days'::interval WHERE id = 2", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert (order_value(shop, 2), customer(shop)) == ("redacted", ALIVE)
    assert record_states(shop, CUSTOMER, 1) == {1: "retrieved", 2: "waiting"}
    ask(shop, "end_retrieval", 1)
    assert run_cycle(shop)["redacted"] == 1
    assert customer(shop) == GONE
    assert record_states(shop, CUSTOMER, 1) == {1: "redacted", 2: "redacted"}


def test_only_amazon_orders_count_where_the_policy_says_so(shop):
    """P5. Breaks when "shared": "amazon" is not heeded, or lets Amazon orders go too."""
    policy = shop_policy()
    policy["linked"][1]["shared"] = "amazon"
    add_order(shop, 2, customer=1, channel="web", shipped=None)
    add_order(shop, 3, customer=1, shipped=None)
    shop.apply_policy(policy)
    run_cycle(shop)
    assert customer(shop) == ALIVE
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 3", user="shop_owner")
    run_cycle(shop)
    assert customer(shop) == GONE
    assert tables_with(shop, "Name2") == ["addresses"]


def test_a_new_order_of_a_redacted_customer_is_no_pii_that_came_back(shop):
    """P5. Breaks when a returning customer's row is taken from under the new order."""
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    add_order(shop, 2, customer=1, shipped=None)
    shop.sql("UPDATE shop.customers SET first_name = 'First1', email = 'buyer1@example.invalid' WHERE id = 1", user="shop_owner")
    for _ in range(2):
        assert run_cycle(shop)["failed"] == 0
        sweep(shop)
        assert customer(shop) == ALIVE
    assert order_value(shop, 1) == "redacted"
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 2", user="shop_owner")
    run_cycle(shop)
    assert customer(shop) == GONE


# A second policy of another shop that has the same customers.
MARKET = """
SET ROLE shop_owner;
CREATE TABLE shop.market_orders (id bigint PRIMARY KEY, no text, customer_id bigint REFERENCES shop.customers, sent date, note text);
CREATE INDEX ON shop.market_orders (customer_id);
"""


def market_policy(**changes):
    return {
        "policy": "market", "enabled": True,
        "orders": {"table": "shop.market_orders", "number": "no", "anchor": "sent", "redact": ["note"]},
        "linked": [{"table": CUSTOMER, "on": {"id": "customer_id"}, "redact": ["first_name", "last_name", "email", "phone"]}],
        **changes,
    }


@pytest.mark.parametrize("no", [number(7), "M-7"], ids=["flagged there", "of another channel there"])
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
def test_orders_of_another_policy_count(shop, no, enabled):
    """P5. Breaks when only the orders of the policy that redacts are asked."""
    shop.psql(MARKET)
    shop.sql("INSERT INTO shop.market_orders VALUES (7, %s, 1, current_date - 3, 'Market7')", [no], "shop_owner")
    shop.apply_policy(market_policy(enabled=enabled))
    shop.apply_policy(shop_policy())
    assert run_cycle(shop)["redacted"] == 1
    assert (order_value(shop, 1), customer(shop)) == ("redacted", ALIVE)
    assert record_states(shop, CUSTOMER, 1) == {1: "waiting"}
    shop.sql("DELETE FROM shop.market_orders", user="shop_owner")
    sweep(shop, "shop")
    assert customer(shop) == GONE


def test_the_last_order_may_be_another_policys(shop):
    """P5. Breaks when the first policy's records wait on after the second took the row, or cannot be brought back."""
    shop.psql(MARKET)
    shop.sql("INSERT INTO shop.market_orders VALUES (7, %s, 1, current_date - 3, 'Market7')", [number(7)], "shop_owner")
    shop.apply_policy(shop_policy())
    shop.apply_policy(market_policy())
    run_cycle(shop)
    assert customer(shop) == ALIVE
    shop.sql("UPDATE shop.market_orders SET sent = current_date - 40", user="shop_owner")
    run_cycle(shop)
    assert customer(shop) == GONE
    assert record_states(shop, CUSTOMER, 1) == {1: "redacted"}
    assert record_states(shop, CUSTOMER, 1, "market") == {7: "redacted"}
    ask(shop, "retrieve", 1, "return")
    assert customer(shop) == ALIVE
    run_cycle(shop)
    sweep(shop)
    assert customer(shop) == ALIVE, "retrieved under one policy, redacted under the other"


def test_the_last_orders_of_two_policies_at_the_same_time(shop):
    """P5. Breaks when cycles of two policies each see the other's order as one that needs the row, and both leave it."""
    shop.psql(MARKET)
    shop.sql("INSERT INTO shop.market_orders VALUES (7, %s, 1, current_date - 40, 'Market7')", [number(7)], "shop_owner")
    shop.apply_policy(shop_policy())
    shop.apply_policy(market_policy())
    close_gate(shop, 1, market_orders="id")
    cycles = [Background(shop, "CALL amazon_pii.run_cycle(%s)", [policy]) for policy in ("shop", "market")]
    # Both have looked who needs the customer, and neither has committed.
    at_gate(shop, 2)
    open_gate(shop)
    for cycle in cycles:
        cycle.result()
    assert customer(shop) == GONE
    assert order_value(shop, 1) == "redacted" and record_states(shop, CUSTOMER, 1) == {1: "redacted"}
    assert record_states(shop, CUSTOMER, 1, "market") == {7: "redacted"}


# Order → customer → address book, and two ways from an order to an address.
BOOK = """
SET ROLE shop_owner;
CREATE TABLE shop.book (id bigint PRIMARY KEY, customer_id bigint REFERENCES shop.customers, street text);
CREATE INDEX ON shop.book (customer_id);
ALTER TABLE shop.orders ADD bill_to bigint REFERENCES shop.book, ADD ship_to bigint REFERENCES shop.book;
CREATE INDEX ON shop.orders (bill_to);
CREATE INDEX ON shop.orders (ship_to);
INSERT INTO shop.book VALUES (10, 1, 'Booked10'), (11, 1, 'Booked11'), (12, NULL, 'Booked12');
"""


def test_a_chain_of_shared_rows_goes_with_the_last_order(shop):
    """P5. Breaks when only the first link of a chain is asked who uses it."""
    shop.psql(BOOK)
    add_order(shop, 2, customer=1, channel="web")
    policy = shop_policy()
    policy["linked"].append({"table": "shop.book", "parent": "customers", "on": {"customer_id": "id"}, "redact": ["street"]})
    shop.apply_policy(policy)
    assert run_cycle(shop)["redacted"] == 1
    assert tables_with(shop, "Booked10", ("book",)) == tables_with(shop, "Booked11", ("book",)) == ["book"]
    assert customer(shop) == ALIVE
    shop.sql("DELETE FROM shop.orders WHERE id = 2", user="shop_owner")
    sweep(shop)
    assert shop.sql("SELECT street FROM shop.book ORDER BY id") == [(PLACEHOLDER,), (PLACEHOLDER,), ("Booked12",)]
    assert customer(shop) == GONE


def test_a_row_that_orders_reach_in_two_ways(shop):
    """P5. Breaks when only the entry that found a row is asked who uses it: bill to here, ship to there."""
    shop.psql(BOOK)
    add_order(shop, 2, channel="web")
    shop.sql("UPDATE shop.orders SET bill_to = 12 WHERE id = 1; UPDATE shop.orders SET ship_to = 12 WHERE id = 2", user="shop_owner")
    policy = shop_policy()
    policy["linked"] += [{"table": "shop.book", "as": way, "on": {"id": way}, "redact": ["street"]} for way in ("bill_to", "ship_to")]
    shop.apply_policy(policy)
    run_cycle(shop)
    assert (order_value(shop, 1), tables_with(shop, "Booked12", ("book",))) == ("redacted", ["book"])
    shop.sql("UPDATE shop.orders SET ship_to = NULL WHERE id = 2", user="shop_owner")
    sweep(shop)
    assert tables_with(shop, "Booked12", ("book",)) == []


def test_a_customer_with_many_orders(shop):
    """P5. Breaks when the search for one that keeps a row alive ends too early."""
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at) SELECT i, 'n' || i, 'amazon', 1, "
             "now() - '50 days'::interval FROM generate_series(10, 700) AS i", user="shop_owner")
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (9999, 'w', 'web', 1)", user="shop_owner")
    shop.apply_policy(shop_policy())
    assert run_cycle(shop)["redacted"] == 692
    assert customer(shop) == ALIVE
    shop.sql("DELETE FROM shop.orders WHERE id = 9999", user="shop_owner")
    sweep(shop)
    assert customer(shop) == GONE


def test_an_order_that_arrives_in_the_middle_keeps_the_row(shop):
    """P5. Breaks when an uncommitted new order of the customer, which has locked the row by its foreign key, is overlooked."""
    shop.apply_policy(shop_policy())
    session = shop.connect("shop_owner", autocommit=False)
    session.cursor().execute("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (2, 'w', 'web', 1)")
    assert Background(shop, "CALL amazon_pii.run_cycle()").result()[0][2] == 0, "its customer's row is locked"
    assert customer(shop) == ALIVE
    session.commit()
    session.close()
    shop.sql("UPDATE amazon_pii.order_state SET next_attempt_at = NULL")
    assert run_cycle(shop)["redacted"] == 1
    assert customer(shop) == ALIVE
