"""No customer of an Amazon order's own: orders get a generic one, and the row that the importer made goes with the order."""
import copy

import pytest
from cluster import MAJOR
from support import (
    PLACEHOLDER, add_customer, add_order, hurry, number, open_shop, order_value, record_states, refused, retrieve, run_cycle,
    shop_policy, sweep,
)

GENERIC = 100


def policy(to=GENERIC, orphan="archive", **orders):
    document = shop_policy()
    document["orders"].update({"assign_customer": {"column": "customer_id", "to": to, "orphan": orphan}, **orders})
    return document


@pytest.fixture
def shop(db):
    """Two generic customers, and customers 1 to 3 that an importer made; the policy is applied."""
    open_shop(db)
    for n in (1, 2, 3, GENERIC, GENERIC + 1):
        add_customer(db, n)
    db.apply_policy(policy())
    return db


def customer_of(db, order):
    return db.value("SELECT customer_id FROM shop.orders WHERE id = %s", [order])


def last_name(db, customer):
    return db.value("SELECT last_name FROM shop.customers WHERE id = %s", [customer])


def open_log(db, **options):
    """A history of customers, which a trigger of the shop's writes, in the policy."""
    db.psql("""SET ROLE shop_owner;
        CREATE TABLE shop.log (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer_id bigint, last_name text);
        CREATE INDEX ON shop.log (customer_id);
        CREATE FUNCTION shop.keep() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN INSERT INTO shop.log (customer_id, last_name) VALUES (OLD.id, OLD.last_name); RETURN NULL; END$$;
        CREATE TRIGGER keep AFTER UPDATE ON shop.customers FOR EACH ROW EXECUTE FUNCTION shop.keep();""")
    document = policy(**options)
    document["linked"].append({"table": "shop.log", "parent": "customers", "on": {"customer_id": "id"}, "redact": ["last_name"]})
    db.apply_policy(document)


UPSERT = ("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (%s, %s, 'amazon', %s) "
          "ON CONFLICT (id) DO UPDATE SET customer_id = EXCLUDED.customer_id")


def test_amazon_orders_get_the_generic_customer(shop):
    """Cin7: no CRM record for Amazon orders. Breaks when one of the ways into the table is not seen, or another channel's
    order is pointed elsewhere."""
    add_order(shop, 1, customer=1)
    add_order(shop, 2, customer=None)
    add_order(shop, 3, customer=2, channel="web")
    assert [customer_of(shop, n) for n in (1, 2, 3)] == [GENERIC, GENERIC, 2]
    shop.sql("UPDATE shop.orders SET customer_id = 1 WHERE id = 1", user="shop_owner")
    shop.sql(UPSERT, [2, number(2), 3], "shop_owner")
    shop.sql("UPDATE shop.orders SET channel = 'amazon' WHERE id = 3", user="shop_owner")
    shop.psql("COPY shop.orders (id, external_no, channel, customer_id) FROM STDIN;\n4\tx\tamazon\t3\n5\tx\tweb\t3\n\\.\n", user="shop_owner")
    assert [customer_of(shop, n) for n in (1, 2, 3, 4, 5)] == [GENERIC, GENERIC, GENERIC, GENERIC, 3]


def test_the_importers_row_goes_with_the_order(shop):
    """Breaks when the row that no order points at any more stays, goes too early, or does not come back; or when the generic one
    is redacted."""
    add_order(shop, 1, customer=1, shipped="29 days 12 hours")
    run_cycle(shop)
    assert order_value(shop, 1) == "archived" and last_name(shop, 1) == "Last1"
    assert record_states(shop, "shop.customers", 1) == {1: "archived"}
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now()")
    run_cycle(shop)
    assert (last_name(shop, 1), last_name(shop, GENERIC)) == (PLACEHOLDER, f"Last{GENERIC}")
    retrieve(shop, number(1))
    assert last_name(shop, 1) == "Last1"


@pytest.mark.parametrize("channel", ["amazon", "web"])
def test_another_order_keeps_the_importers_row(shop, channel):
    """P5. Breaks when the row is taken from an order that was imported with it too, or that has it for its customer."""
    add_order(shop, 1, customer=1)
    add_order(shop, 2, customer=1, channel=channel, shipped="3 days")
    run_cycle(shop)
    assert (order_value(shop, 1), last_name(shop, 1)) == ("redacted", "Last1")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 2" if channel == "amazon"
             else "DELETE FROM shop.orders WHERE id = 2", user="shop_owner")
    sweep(shop)
    assert last_name(shop, 1) == PLACEHOLDER


def test_a_sync_that_writes_the_old_customer_again(shop):
    """P7. Breaks when the second copy of the customer's data is overlooked because no order points at it."""
    add_order(shop, 1, customer=1)
    run_cycle(shop)
    assert last_name(shop, 1) == PLACEHOLDER
    shop.sql("UPDATE shop.customers SET last_name = 'Last1' WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    assert last_name(shop, 1) == PLACEHOLDER
    shop.sql("UPDATE shop.customers SET last_name = 'Other' WHERE id = 2; UPDATE shop.orders SET customer_id = 2 WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    assert (customer_of(shop, 1), last_name(shop, 2)) == (GENERIC, PLACEHOLDER)


def test_an_upsert_by_another_key(shop):
    """Breaks when a row is remembered under the key that the insert would have had, and nobody finds it there."""
    shop.sql("CREATE UNIQUE INDEX ON shop.orders (external_no)", user="shop_owner")
    add_order(shop, 1, customer=None)
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (77, %s, 'amazon', 1) "
             "ON CONFLICT (external_no) DO UPDATE SET customer_id = EXCLUDED.customer_id", [number(1)], "shop_owner")
    assert customer_of(shop, 1) == GENERIC
    run_cycle(shop)
    assert last_name(shop, 1) == PLACEHOLDER
    assert shop.value("SELECT count(*) FROM amazon_pii.orphan WHERE record_key IS NULL") == 0


def test_what_hangs_on_the_importers_row_goes_too(shop):
    """Breaks when the address book of the customer stays."""
    shop.psql("SET ROLE shop_owner; CREATE TABLE shop.book (id bigint PRIMARY KEY, customer_id bigint REFERENCES shop.customers, street text); "
              "CREATE INDEX ON shop.book (customer_id); INSERT INTO shop.book VALUES (10, 1, 'Booked10'), (11, 100, 'Booked11');")
    document = policy()
    document["linked"].append({"table": "shop.book", "parent": "customers", "on": {"customer_id": "id"}, "redact": ["street"]})
    shop.apply_policy(document)
    add_order(shop, 1, customer=1)
    run_cycle(shop)
    assert shop.sql("SELECT street FROM shop.book ORDER BY id") == [(PLACEHOLDER,), ("Booked11",)]


def test_a_history_of_the_importers_row_goes_too(shop):
    """Breaks when what a trigger of the shop's copies because of the redaction is on a row that no order leads to, and stays."""
    open_log(shop)
    add_order(shop, 1, customer=1)
    run_cycle(shop)
    run_cycle(shop)
    assert shop.sql("SELECT DISTINCT last_name FROM shop.log WHERE customer_id = 1") == [(PLACEHOLDER,)]
    retrieve(shop, number(1))
    assert shop.value("SELECT count(*) FROM shop.log WHERE last_name = 'Last1'") > 0


def entries(db, action):
    return db.sql("SELECT order_key, detail FROM amazon_pii.audit_log WHERE action = %s ORDER BY order_key", [action])


def test_the_importers_row_goes_at_once(shop):
    """Cin7: no CRM record; `"orphan": "now"`. Breaks when the row stays until its order is due, goes without a copy, or the order or
    the generic customer goes with it."""
    shop.apply_policy(policy(orphan="now"))
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    assert (last_name(shop, 1), last_name(shop, GENERIC), order_value(shop, 1)) == (PLACEHOLDER, f"Last{GENERIC}", "flagged")
    assert shop.sql("SELECT o.gift_message, a.name FROM shop.orders o JOIN shop.addresses a ON a.order_id = o.id") == [("Gift1", "Name1")]
    assert record_states(shop, "shop.customers", 1) == {1: "redacted"}
    assert [e[1] for e in entries(shop, "archive") + entries(shop, "redact")] == ["1 records, before the order"] * 2
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    assert order_value(shop, 1) == "redacted" and record_states(shop, "shop.customers", 1) == {1: "redacted"}
    retrieve(shop, number(1))
    assert last_name(shop, 1) == "Last1"
    shop.sql("SELECT amazon_pii.end_retrieval(%s)", [number(1)])
    run_cycle(shop)
    assert last_name(shop, 1) == PLACEHOLDER


@pytest.mark.parametrize("use", [
    "INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (9, 'x', 'web', 1)",
    "UPDATE shop.orders SET customer_id = 1 WHERE id = 8",
], ids=["another channel", "from before"])
def test_a_row_that_another_order_uses_does_not_go_at_once(shop, use):
    """P5. Breaks when an order loses its customer because another one was imported with that."""
    shop.apply_policy(shop_policy())
    add_order(shop, 8, customer=2, shipped=None)
    if "UPDATE" in use:
        shop.sql(use, user="shop_owner")
    shop.apply_policy(policy(orphan="now"))
    if "INSERT" in use:
        shop.sql(use, user="shop_owner")
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    assert last_name(shop, 1) == "Last1" and order_value(shop, 1) == "flagged"
    shop.sql("DELETE FROM shop.orders WHERE id IN (8, 9)", user="shop_owner")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    sweep(shop)
    assert last_name(shop, 1) == PLACEHOLDER


def test_two_orders_of_one_row_both_keep_a_copy(shop):
    """P1. Breaks when the row goes before each of its orders has its copy, or they wait for each other."""
    shop.apply_policy(policy(orphan="now"))
    for n in (1, 2):
        add_order(shop, n, customer=1, shipped=None)
    run_cycle(shop)
    assert last_name(shop, 1) == PLACEHOLDER
    assert shop.sql("SELECT order_key FROM amazon_pii_archive.document WHERE table_name = 'shop.customers' ORDER BY 1") == [('["1"]',), ('["2"]',)]
    add_order(shop, 3, customer=1, shipped=None)
    run_cycle(shop)
    assert shop.sql("SELECT DISTINCT apart FROM amazon_pii.orphan") == [("done",)]
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    retrieve(shop, number(1))
    assert last_name(shop, 1) == "Last1"
    run_cycle(shop)
    assert last_name(shop, 1) == "Last1", "order 2 has let go of the row, and order 1 has it back"


def test_a_sync_that_writes_a_row_again_that_went_at_once(shop):
    """P7. Breaks when the second copy of the customer's data stays until the order is due, or what it brings is lost."""
    shop.apply_policy(policy(orphan="now"))
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    shop.sql("UPDATE shop.customers SET last_name = 'Newer1' WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    assert last_name(shop, 1) == PLACEHOLDER
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    retrieve(shop, number(1))
    assert last_name(shop, 1) == "Newer1"
    assert shop.value("SELECT first_name FROM shop.customers WHERE id = 1") == "First1"


def test_a_row_that_is_removed_at_once_comes_back(shop):
    """Breaks when the order takes the row for lost because it went before the order did."""
    document = policy(orphan="now")
    customers = next(entry for entry in document["linked"] if entry["table"] == "shop.customers")
    customers["on_redact"] = "delete"
    shop.apply_policy(document)
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM shop.customers WHERE id = 1") == 0
    assert record_states(shop, "shop.customers", 1) == {1: "redacted"}
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    retrieve(shop, number(1))
    assert last_name(shop, 1) == "Last1"


def test_a_row_that_its_own_order_needs_stays(shop):
    """Breaks when the address that an order is to be sent to goes because it hangs on the importer's customer."""
    shop.psql("SET ROLE shop_owner; CREATE TABLE shop.book (id bigint PRIMARY KEY, customer_id bigint REFERENCES shop.customers, street text); "
              "CREATE INDEX ON shop.book (customer_id); INSERT INTO shop.book VALUES (10, 1, 'Booked10'), (11, 1, 'Booked11'); "
              "ALTER TABLE shop.orders ADD ship_to bigint REFERENCES shop.book; CREATE INDEX ON shop.orders (ship_to);")
    document = policy(orphan="now")
    document["linked"] += [
        {"table": "shop.book", "as": "book", "parent": "customers", "on": {"customer_id": "id"}, "redact": ["street"]},
        {"table": "shop.book", "as": "ship_to", "on": {"id": "ship_to"}, "redact": ["street"]}]
    shop.apply_policy(document)
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id, ship_to) VALUES (1, %s, 'amazon', 1, 10)", [number(1)], "shop_owner")
    run_cycle(shop)
    assert shop.sql("SELECT street FROM shop.book ORDER BY id") == [("Booked10",), (PLACEHOLDER,)]
    assert last_name(shop, 1) == PLACEHOLDER
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    assert shop.sql("SELECT DISTINCT street FROM shop.book") == [(PLACEHOLDER,)]


def test_a_row_with_a_date_of_its_own_goes_with_its_order(shop):
    """Breaks when `not_before` is passed over."""
    shop.psql("SET ROLE shop_owner; CREATE TABLE shop.card (id bigint PRIMARY KEY, customer_id bigint, holder text, issued timestamptz); "
              "CREATE INDEX ON shop.card (customer_id); INSERT INTO shop.card VALUES (1, 1, 'Holder1', now() - '40 days'::interval);")
    document = policy(orphan="now")
    document["linked"].append({"table": "shop.card", "parent": "customers", "on": {"customer_id": "id"}, "redact": ["holder"], "not_before": "issued"})
    shop.apply_policy(document)
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    assert (last_name(shop, 1), shop.value("SELECT holder FROM shop.card")) == (PLACEHOLDER, "Holder1")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    assert shop.value("SELECT holder FROM shop.card") == PLACEHOLDER


def test_an_orphan_whose_key_changes(shop):
    """Breaks when a row that no link leads to is lost with its key."""
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    shop.sql("UPDATE shop.customers SET id = 55 WHERE id = 1; UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    assert last_name(shop, 55) == PLACEHOLDER
    retrieve(shop, number(1))
    assert last_name(shop, 55) == "Last1"


def test_its_history_goes_at_once_too(shop):
    """Breaks when what the shop's trigger copies because of the redaction waits for the order."""
    open_log(shop, orphan="now")
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    assert shop.sql("SELECT DISTINCT last_name FROM shop.log") == [(PLACEHOLDER,)]


def test_a_history_that_logs_itself_waits(shop):
    """P4. Breaks when a log of the log keeps every cycle busy, or nobody is told."""
    open_log(shop, orphan="now")
    shop.sql("CREATE FUNCTION shop.again() RETURNS trigger LANGUAGE plpgsql AS "
             "$$BEGIN INSERT INTO shop.log (customer_id, last_name) VALUES (OLD.customer_id, OLD.last_name); RETURN NULL; END$$; "
             "CREATE TRIGGER again AFTER UPDATE ON shop.log FOR EACH ROW EXECUTE FUNCTION shop.again()", user="shop_owner")
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    rows = shop.value("SELECT count(*) FROM shop.log")
    assert "again" in shop.value("SELECT last_error FROM amazon_pii.status")
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM shop.log") == rows
    shop.sql("DROP TRIGGER again ON shop.log", user="shop_owner")
    shop.sql("UPDATE amazon_pii.orphan SET next_attempt_at = now() WHERE record_key IS NULL")
    run_cycle(shop)
    assert shop.sql("SELECT DISTINCT last_name FROM shop.log") == [(PLACEHOLDER,)]


def test_a_customer_who_comes_back_goes_at_once_every_time(shop):
    """Breaks when a former order, redacted, retrieved before or waiting, keeps the row of a customer who orders again."""
    shop.apply_policy(policy(orphan="now"))
    for n in range(1, 5):
        if n > 1:
            shop.sql("UPDATE shop.customers SET last_name = %s WHERE id = 1", [f"Name{n}"], "shop_owner")
        add_order(shop, n, customer=1, shipped=None)
        run_cycle(shop)
        assert last_name(shop, 1) == PLACEHOLDER, n
        shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = %s", [n], "shop_owner")
        run_cycle(shop)
        if n == 2:
            retrieve(shop, number(n))
            assert last_name(shop, 1) == "Name2"
            shop.sql("SELECT amazon_pii.end_retrieval(%s)", [number(n)])
            run_cycle(shop)
    assert shop.sql("SELECT DISTINCT apart FROM amazon_pii.orphan") == [("done",)]


def test_a_row_that_a_retrieved_order_has_back_stays(shop):
    """P5. Breaks when a new order takes away what an agent is looking at."""
    shop.apply_policy(policy(orphan="now"))
    add_order(shop, 1, customer=1)
    run_cycle(shop)
    retrieve(shop, number(1))
    add_order(shop, 2, customer=1, shipped=None)
    run_cycle(shop)
    assert last_name(shop, 1) == "Last1"


@pytest.mark.parametrize("orphan", ["archive", "now"])
def test_a_history_after_the_newest_order_was_deleted(shop, orphan):
    """Breaks when what is written on the customer is told to an order that is gone, and nobody redacts it."""
    open_log(shop, orphan=orphan)
    for n in (1, 2):
        add_order(shop, n, customer=1, shipped="40 days" if n == 2 else None)
    run_cycle(shop)
    shop.sql("DELETE FROM shop.orders WHERE id = 2", user="shop_owner")
    run_cycle(shop)
    shop.sql("UPDATE shop.customers SET phone = '1' WHERE id = 1; INSERT INTO shop.log (customer_id, last_name) VALUES (1, 'Late')", user="shop_owner")
    shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval", user="shop_owner")
    run_cycle(shop)
    assert shop.sql("SELECT DISTINCT last_name FROM shop.log") == [(PLACEHOLDER,)]
    assert last_name(shop, 1) == PLACEHOLDER


def test_a_customer_that_is_inserted_after_its_order(shop):
    """Breaks when the row is looked for once, before it is there."""
    shop.apply_policy(policy(orphan="now"))
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id) VALUES (1, %s, 'amazon', 50)", [number(1)], "shop_owner")
    run_cycle(shop)
    add_customer(shop, 50)
    shop.sql("UPDATE amazon_pii.orphan SET next_attempt_at = now()")
    run_cycle(shop)
    assert last_name(shop, 50) == PLACEHOLDER


def test_an_open_transaction_on_an_orphan_stops_nobody_else(shop):
    """P3. Breaks when a cycle waits for the shop."""
    shop.apply_policy(policy(orphan="now"))
    for n in (1, 2):
        add_order(shop, n, customer=n, shipped=None)
    add_order(shop, 3, customer=3)
    other = shop.connect("shop_owner", autocommit=False)
    with other.cursor() as cursor:
        cursor.execute("UPDATE shop.customers SET id = 55 WHERE id = 1")
        run_cycle(shop)
    other.rollback()
    assert (order_value(shop, 3), last_name(shop, 2), last_name(shop, 1)) == ("redacted", PLACEHOLDER, "Last1")
    hurry_orphans(shop)
    run_cycle(shop)
    assert last_name(shop, 1) == PLACEHOLDER


def test_the_archive_of_a_deleted_order_ends(shop):
    """Breaks when the copy of an order that was deleted before it was dispatched is kept for ever."""
    shop.apply_policy({**policy(orphan="now"), "archive_for": "1 day"})
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    shop.sql("DELETE FROM shop.addresses; DELETE FROM shop.orders", user="shop_owner")
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM amazon_pii_archive.document") > 0
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = redact_due_at - '3 days'::interval, redacted_at = redacted_at - '3 days'::interval")
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM amazon_pii_archive.document") == 0


def test_what_holds_an_order_holds_its_orphan(shop):
    """Breaks when a hold, or a date from which the policy counts, is passed over."""
    shop.apply_policy(policy(orphan="now", effective_from="CASE id WHEN 2 THEN '2999-01-01'::timestamptz END"))
    for n in (1, 2):
        add_order(shop, n, customer=n, shipped=None)
    shop.sql("SELECT amazon_pii.hold(%s, 'court', now() + '1 day'::interval)", [number(1)])
    run_cycle(shop)
    assert [last_name(shop, n) for n in (1, 2)] == ["Last1", "Last2"]
    shop.sql("SELECT amazon_pii.release(%s)", [number(1)])
    run_cycle(shop)
    assert [last_name(shop, n) for n in (1, 2)] == [PLACEHOLDER, "Last2"]


def hurry_orphans(db):
    db.sql("UPDATE amazon_pii.orphan SET next_attempt_at = now() WHERE apart = 'due'")


def test_a_bad_orphan_stops_nobody_else(shop):
    """P3. Breaks when one row that cannot be overwritten keeps the others, or goes unmentioned."""
    shop.apply_policy(policy(orphan="now"))
    shop.sql("CREATE FUNCTION shop.refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF OLD.id = 2 THEN RAISE 'no'; END IF; RETURN NEW; END$$; "
             "CREATE TRIGGER refuse BEFORE UPDATE ON shop.customers FOR EACH ROW EXECUTE FUNCTION shop.refuse()", user="shop_owner")
    for n in (1, 2, 3):
        add_order(shop, n, customer=n, shipped=None)
    run_cycle(shop)
    assert [last_name(shop, n) for n in (1, 2, 3)] == [PLACEHOLDER, "Last2", PLACEHOLDER]
    assert "P0001" in shop.value("SELECT last_error FROM amazon_pii.status")
    shop.sql("DROP TRIGGER refuse ON shop.customers", user="shop_owner")
    hurry_orphans(shop)
    run_cycle(shop)
    assert last_name(shop, 2) == PLACEHOLDER


def test_a_copy_that_cannot_be_opened_keeps_the_row(shop):
    """P1. Breaks when the overwriting is not compared with what was read back."""
    shop.apply_policy(policy(orphan="now"))
    shop.sql("CREATE FUNCTION public.damage() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.sealed := '\\x00'; RETURN NEW; END$$; "
             "CREATE TRIGGER damage BEFORE INSERT ON amazon_pii_archive.document FOR EACH ROW EXECUTE FUNCTION public.damage()")
    add_order(shop, 1, customer=1, shipped=None)
    run_cycle(shop)
    assert last_name(shop, 1) == "Last1"
    assert "cannot be opened" in shop.value("SELECT last_error FROM amazon_pii.status")


def test_a_changed_policy_changes_new_orders(shop):
    """Cin7: or one of the user's choice, which can be changed. Breaks when old orders move, or their generic customer is
    redacted once it is no longer the one of the policy."""
    add_order(shop, 1, customer=1)
    shop.apply_policy(policy(GENERIC + 1))
    add_order(shop, 2, customer=2)
    shop.sql("UPDATE shop.orders SET total = 3", user="shop_owner")
    assert [customer_of(shop, n) for n in (1, 2)] == [GENERIC, GENERIC + 1]
    run_cycle(shop)
    shop.apply_policy(shop_policy())
    add_order(shop, 3, customer=3)
    assert customer_of(shop, 3) == 3
    sweep(shop)
    assert [last_name(shop, n) for n in (1, 2, 3, GENERIC, GENERIC + 1)] == [PLACEHOLDER] * 3 + [f"Last{GENERIC}", f"Last{GENERIC + 1}"]


def test_orders_from_before_keep_their_customer(db):
    """Breaks when any UPDATE of an old order moves it."""
    open_shop(db)
    for n in (1, GENERIC):
        add_customer(db, n)
    add_order(db, 1, customer=1, shipped=None)
    db.apply_policy(policy())
    db.sql("UPDATE shop.orders SET shipped_at = now()", user="shop_owner")
    assert customer_of(db, 1) == 1


def test_the_owner_evaluates_the_condition(shop):
    """P8. Breaks when whoever imports runs the policy's code with rights of its own."""
    shop.sql("CREATE TABLE shop.seen (who name); CREATE FUNCTION shop.look(text) RETURNS boolean LANGUAGE plpgsql AS "
             "$$BEGIN INSERT INTO shop.seen VALUES (current_user); RETURN $1 = 'amazon'; END$$; "
             "GRANT USAGE ON SCHEMA shop TO nobody_special; GRANT INSERT ON shop.orders TO nobody_special", user="shop_owner")
    shop.apply_policy(policy(amazon="shop.look(channel)"))
    shop.sql("DELETE FROM shop.seen", user="shop_owner")
    shop.sql("INSERT INTO shop.orders (id, channel, customer_id) VALUES (1, 'amazon', 1)", user="nobody_special")
    assert customer_of(shop, 1) == GENERIC
    assert shop.sql("SELECT DISTINCT who FROM shop.seen") == [("shop_owner",)]


def test_an_error_lets_the_row_through(shop):
    """P11. Breaks when a broken condition, or a generic customer that is gone, keeps orders from being imported, or nobody says so."""
    shop.sql("CREATE FUNCTION shop.is_amazon(text) RETURNS boolean LANGUAGE plpgsql AS "
             "$$BEGIN IF $1 = 'bad' THEN RAISE 'no'; END IF; RETURN $1 = 'amazon'; END$$", user="shop_owner")
    shop.apply_policy(policy(amazon="shop.is_amazon(channel)"))
    add_order(shop, 1, customer=1, channel="bad")
    assert customer_of(shop, 1) == 1
    assert "P0001" in shop.value("SELECT last_error FROM amazon_pii.status")
    hurry(shop)
    shop.sql("DELETE FROM shop.orders", user="shop_owner")
    run_cycle(shop)
    shop.sql("DELETE FROM shop.customers WHERE id = %s", [GENERIC], "shop_owner")
    add_order(shop, 2, customer=2)
    assert customer_of(shop, 2) == 2
    run_cycle(shop)
    assert "there is no customer 100" in shop.value("SELECT last_error FROM amazon_pii.status")
    assert last_name(shop, 2) == PLACEHOLDER


@pytest.mark.skipif(MAJOR < 13, reason="BEFORE triggers on partitions")
def test_partitions(db):
    """Breaks when a row that goes to a partition, or into one made later, keeps its customer."""
    db.sql("CREATE SCHEMA parts AUTHORIZATION shop_owner")
    db.psql("""SET ROLE shop_owner;
        CREATE TABLE parts.customers (id uuid PRIMARY KEY, name text);
        CREATE TABLE parts.orders (id int, day date, channel text, customer uuid REFERENCES parts.customers, shipped_at timestamptz,
            PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
        CREATE INDEX ON parts.orders (customer);
        CREATE TABLE parts.first PARTITION OF parts.orders FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
        INSERT INTO parts.customers VALUES ('00000000-0000-0000-0000-0000000000aa', 'Generic'), ('00000000-0000-0000-0000-000000000001', 'Ada');""")
    db.apply_policy({"policy": "parts", "enabled": True, "orders": {
        "table": "parts.orders", "amazon": "channel = 'amazon'", "anchor": "shipped_at",
        "assign_customer": {"column": "customer", "to": "00000000-0000-0000-0000-0000000000AA"}},
        "linked": [{"table": "parts.customers", "on": {"id": "customer"}, "redact": ["name"], "role": "customer"}]})
    db.sql("CREATE TABLE parts.second PARTITION OF parts.orders FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')", user="shop_owner")
    values = "'amazon', '00000000-0000-0000-0000-000000000001', now() - '40 days'::interval)"
    db.sql(f"INSERT INTO parts.orders VALUES (1, '2026-01-05', {values}, (2, '2026-02-05', {values}", user="shop_owner")
    db.sql(f"INSERT INTO parts.second VALUES (3, '2026-02-06', {values}", user="shop_owner")
    assert db.sql("SELECT DISTINCT customer::text FROM parts.orders") == [("00000000-0000-0000-0000-0000000000aa",)]
    run_cycle(db)
    assert db.sql("SELECT name FROM parts.customers ORDER BY id") == [(PLACEHOLDER,), ("Generic",)]


def test_policies_without_the_key_have_no_such_trigger(shop):
    """P4. Breaks when everybody pays for it."""
    trigger = "SELECT count(*) FROM pg_trigger WHERE tgname = 'amazon_pii_shop_assign'"
    assert shop.value(trigger) == 1
    shop.apply_policy(shop_policy())
    assert shop.value(trigger) == 0


@pytest.mark.parametrize("assign, words", [
    ({"column": "customer_id", "to": 999}, "there is no customer 999"),
    ({"column": "customer_id", "to": "x"}, "orders.assign_customer"),
    ({"column": "customer", "to": 100}, "is not what leads to entry"),
    ({"column": "customer_id", "to": True}, "neither a number nor a text"),
    ({"column": "customer_id", "to": 100, "orphan": "soon"}, "unknown word"),
    ({"column": "customer_id"}, "to: is missing"),
], ids=["nobody", "no key", "other column", "type", "now", "nothing"])
def test_what_is_wrong_is_found_when_applied(shop, assign, words):
    """Breaks when it is found out by the first import."""
    document = copy.deepcopy(policy())
    document["orders"]["assign_customer"] = assign
    found = [f for f in shop.check_policy(document) if f[0] == "error"]
    assert len(found) == 1 and words in f"{found[0][1]}: {found[0][2]}", found
    with refused("22023"):
        shop.apply_policy(document)
