"""A channel sends an order again after it was redacted, in every way in which a sync may write: what each word of `on_reimport`
makes of it."""
import io

import pytest
from support import (PLACEHOLDER, TABLES, add_order, documents, end_retrieval, number, open_shop, order_value, record_states, refused,
                     retrieve, run_cycle, shop_policy, snapshot, tables_with, uses_merge)

SYNC = "nobody_special"
NAMES = {
    "customers": "id first_name last_name email phone tier",
    "orders": "id external_no channel customer_id shipped_at gift_message shop_note total",
    "addresses": "id order_id kind name line1 line2 city zip phone",
    "invoices": "id invoice_no order_id invoiced_at bill_to amount",
    "invoice_lines": "id invoice_id note",
}


def rows(word, rest="1", order=1, customer=1):
    """What a channel says of an order: every text of the buyer ends in `word`; `rest` is no personal data."""
    return {
        "customers": (customer, f"First{word}", f"Last{word}", f"mail{word}@example.invalid", f"+49 555 {word}", f"tier{rest}"),
        "orders": (order, number(order), "amazon", customer, "2024-01-01 12:00+00", f"Gift{word}", f"Note{word}", f"{rest}.00"),
        "addresses": (order, order, f"kind{rest}", f"Name{word}", f"Street {word}", "", f"City{word}", f"Z{word}", f"+49 666 {word}"),
        "invoices": (order, f"INV-{order}", order, "2024-01-01 12:00+00", f"Bill{word}", f"{rest}.00"),
        "invoice_lines": (order, order, f"Line{word}"),
    }


def insert(table, row, end=""):
    return f"INSERT INTO shop.{table} ({', '.join(NAMES[table].split())}) VALUES ({', '.join(['%s'] * len(row))}){end}"


def new(cursor, data):
    for table, row in data.items():
        cursor.execute(insert(table, row), row)


def update(cursor, data):
    for table, row in data.items():
        cursor.execute(f"UPDATE shop.{table} SET {', '.join(f'{n} = %s' for n in NAMES[table].split())} WHERE id = %s", [*row, row[0]])


def upsert(cursor, data):
    for table, row in data.items():
        columns = ", ".join(f"{n} = EXCLUDED.{n}" for n in NAMES[table].split()[1:])
        cursor.execute(insert(table, row, f" ON CONFLICT (id) DO UPDATE SET {columns}"), row)


def delete_and_insert(cursor, data):
    """What hangs on the order goes with it."""
    for table in ("orders", "customers"):
        if table in data:
            cursor.execute(f"DELETE FROM shop.{table} WHERE id = %s", data[table][:1])
    for table in data.keys() - {"orders", "customers"} if "orders" not in data else ():
        cursor.execute(f"DELETE FROM shop.{table} WHERE id = %s", data[table][:1])
    new(cursor, data)


def merge(cursor, data):
    for table, row in data.items():
        names = NAMES[table].split()
        cursor.execute(f"MERGE INTO shop.{table} AS t USING (SELECT ({', '.join(['%s'] * len(row))})::shop.{table} AS r) AS s ON t.id = (s.r).id "
                       f"WHEN MATCHED THEN UPDATE SET {', '.join(f'{n} = (s.r).{n}' for n in names[1:])} "
                       f"WHEN NOT MATCHED THEN INSERT ({', '.join(names)}) VALUES ({', '.join(f'(s.r).{n}' for n in names)})",
                       in_order(cursor, table, row))


def in_order(cursor, table, row):
    """The values as the table has its columns."""
    cursor.execute("SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
                   [f"shop.{table}"])
    given = dict(zip(NAMES[table].split(), row))
    return [given[name] for (name,) in cursor.fetchall()]


def copy_and_update(cursor, data):
    for table, row in data.items():
        names = NAMES[table].split()
        cursor.execute(f"CREATE TEMP TABLE stage_{table} AS SELECT {', '.join(names)} FROM shop.{table} LIMIT 0")
        cursor.copy_expert(f"COPY stage_{table} FROM STDIN", io.StringIO("\t".join(map(str, row)) + "\n"))
        cursor.execute(f"UPDATE shop.{table} AS t SET {', '.join(f'{n} = s.{n}' for n in names[1:])} FROM stage_{table} AS s WHERE s.id = t.id; "
                       f"DROP TABLE stage_{table}")


WAYS = [update, upsert, delete_and_insert, pytest.param(merge, marks=uses_merge), copy_and_update]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@pytest.fixture
def shop(db):
    open_shop(db)
    db.sql(f"GRANT USAGE ON SCHEMA shop TO {SYNC}; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA shop TO {SYNC}; "
           f"GRANT TEMPORARY ON DATABASE {db.name} TO {SYNC}")
    return db


def policy(on_reimport=None, **changes):
    document = shop_policy(**changes)
    # One column of which nothing is left but NULL.
    if "linked" not in changes:
        document["linked"][0]["redact"] = {**{c: "placeholder" for c in document["linked"][0]["redact"]}, "phone": "null"}
    return {**document, "on_reimport": on_reimport} if on_reimport else document


def sync(db, way, data):
    """The whole order in one transaction, by a role that has no rights but on the shop's tables."""
    connection = db.connect(SYNC, autocommit=False)
    try:
        with connection.cursor() as cursor:
            way(cursor, data)
        connection.commit()
    finally:
        connection.close()


def redacted_shop(db, on_reimport):
    db.apply_policy(policy(on_reimport))
    sync(db, new, rows("Aaa"))
    assert run_cycle(db)["redacted"] == 1
    assert tables_with(db, "Aaa") == []
    return db


@pytest.mark.parametrize("on_reimport", [None, "redact"])
@ways
def test_what_is_archived_already_adds_nothing_to_the_archive(shop, way, on_reimport):
    redacted_shop(shop, on_reimport)
    clean, archived = snapshot(shop), documents(shop)
    sync(shop, way, rows("Aaa"))
    assert tables_with(shop, "Aaa") == sorted(TABLES, key=TABLES.index)
    run_cycle(shop)
    assert snapshot(shop) == clean
    assert documents(shop) == archived


@ways
def test_what_is_new_is_archived_and_redacted_by_the_next_cycle(shop, way):
    redacted_shop(shop, "redact")
    archived = len(documents(shop))
    sync(shop, way, rows("Bbb", rest="2"))
    run_cycle(shop)
    assert tables_with(shop, "Bbb") == []
    assert len(documents(shop)) == 2 * archived
    retrieve(shop, number(1))
    assert tables_with(shop, "Bbb") == list(TABLES) and tables_with(shop, "Aaa") == []
    assert shop.sql("SELECT o.total::int, c.tier, a.kind, a.phone FROM shop.orders o, shop.customers c, shop.addresses a") == [(2, "tier2", "kind2", "+49 666 Bbb")]


@ways
def test_what_redaction_left_is_kept_and_the_rest_goes_through(shop, way):
    redacted_shop(shop, "keep")
    archived = documents(shop)
    sync(shop, way, rows("Bbb", rest="2"))
    assert tables_with(shop, "Bbb") == []
    assert shop.sql("SELECT first_name, tier FROM shop.customers") == [(PLACEHOLDER, "tier2")]
    assert shop.sql("SELECT gift_message, shop_note, total::int FROM shop.orders") == [(PLACEHOLDER, PLACEHOLDER, 2)]
    assert shop.sql("SELECT kind, name, line1, line2, phone FROM shop.addresses") == [("kind2", PLACEHOLDER, PLACEHOLDER, "", None)]
    assert shop.sql("SELECT bill_to, amount::int FROM shop.invoices") == [(PLACEHOLDER, 2)]
    run_cycle(shop)
    run_cycle(shop)
    assert documents(shop) == archived
    assert order_value(shop, 1) == "redacted" and order_value(shop, 1, "last_error") is None
    retrieve(shop, number(1))
    assert tables_with(shop, "Aaa") == list(TABLES)


@ways
def test_such_a_write_is_refused(shop, way):
    redacted_shop(shop, "refuse")
    before = snapshot(shop)
    for table in TABLES:
        part = {t: row for t, row in rows("Bbb", rest="2").items() if t == table}
        if way is delete_and_insert and table in ("orders", "customers"):
            part = rows("Bbb")
        with refused("55000", "of redacted Amazon orders cannot be written to") as caught:
            sync(shop, way, part)
        assert "Bbb" not in str(caught.value) and "on_reimport" in caught.value.diag.message_hint
        assert snapshot(shop) == before


REST = """
UPDATE shop.orders SET total = 5, gift_message = gift_message, shop_note = '';
UPDATE shop.customers SET first_name = '[Redacted]', tier = 'x', phone = NULL;
UPDATE shop.addresses SET kind = 'x', phone = NULL;
UPDATE shop.invoices SET amount = 5;
INSERT INTO shop.addresses (id, order_id, name) VALUES (1, 1, '[Redacted]') ON CONFLICT (id) DO UPDATE SET name = EXCLUDED.name;
"""


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_a_write_without_personal_data_passes(shop, on_reimport):
    redacted_shop(shop, on_reimport)
    shop.sql(REST, user=SYNC)
    assert shop.sql("SELECT total::int, gift_message, shop_note FROM shop.orders") == [(5, PLACEHOLDER, "")]
    assert shop.sql("SELECT first_name, tier, phone FROM shop.customers") == [(PLACEHOLDER, "x", None)]


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_what_no_redacted_order_has_is_left_alone(shop, on_reimport):
    """A mark that somebody typed into a row that is not redacted is no mark of ours."""
    redacted_shop(shop, on_reimport)
    sync(shop, new, {**rows("Web", order=2, customer=2), "orders": (2, number(2), "web", 2, "2024-01-01", PLACEHOLDER, PLACEHOLDER, 1)})
    sync(shop, new, {**rows("Young", order=3, customer=3), "orders": (3, number(3), "amazon", 3, None, PLACEHOLDER, PLACEHOLDER, 1)})
    shop.sql("UPDATE shop.addresses SET name = '[Redacted]', phone = NULL WHERE id > 1", user=SYNC)
    run_cycle(shop)
    for order, word in ((2, "Web2"), (3, "Young2")):
        for way in (update, upsert):
            sync(shop, way, rows(word, order=order, customer=order))
            assert tables_with(shop, word) == list(TABLES)
            shop.sql("UPDATE shop.addresses SET name = '[Redacted]' WHERE id > 1; UPDATE shop.orders SET gift_message = '[Redacted]' WHERE id > 1",
                     user=SYNC)


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_rows_that_are_new_to_an_order_are_late_rows(shop, on_reimport):
    """They were never archived: kept out, they would be lost."""
    redacted_shop(shop, on_reimport)
    shop.sql("INSERT INTO shop.addresses (id, order_id, name, phone) VALUES (77, 1, 'NameLate', '+49 777'); "
             "UPDATE shop.addresses SET name = 'NameLater' WHERE id = 77", user=SYNC)
    assert shop.value("SELECT name FROM shop.addresses WHERE id = 77") == "NameLater"
    # One that had nothing: NULL in it is not what redaction left.
    shop.sql("INSERT INTO shop.addresses (id, order_id) VALUES (78, 1); UPDATE shop.addresses SET phone = '+49 999' WHERE id = 78", user=SYNC)
    assert shop.value("SELECT phone FROM shop.addresses WHERE id = 78") == "+49 999"
    assert run_cycle(shop)["redacted"] == 1
    assert tables_with(shop, "NameLate") == tables_with(shop, "+49 999") == []
    if on_reimport == "keep":
        shop.sql("UPDATE shop.addresses SET name = 'NameLater', phone = '+49 778', kind = 'x' WHERE id = 77", user=SYNC)
        assert shop.sql("SELECT name, phone, kind FROM shop.addresses WHERE id = 77") == [(PLACEHOLDER, None, "x")]
    else:
        with refused("55000"):
            shop.sql("UPDATE shop.addresses SET phone = '+49 778' WHERE id = 77", user=SYNC)


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_a_customer_who_comes_back_can_be_written_once_the_order_is_there(shop, on_reimport):
    redacted_shop(shop, on_reimport)
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, customer_id, shipped_at) VALUES (2, %s, 'amazon', 1, now())", [number(2)], SYNC)
    shop.sql("UPDATE shop.customers SET first_name = 'FirstNew'", user=SYNC)
    assert shop.value("SELECT first_name FROM shop.customers") == "FirstNew"
    run_cycle(shop)
    assert shop.value("SELECT first_name FROM shop.customers") == "FirstNew"
    assert record_states(shop, "shop.customers", 1)[1] == "waiting"


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_a_row_that_another_policy_needs_is_left_alone(shop, on_reimport):
    redacted_shop(shop, on_reimport)
    shop.sql("CREATE TABLE shop.tickets (id bigint PRIMARY KEY, customer_id bigint, no text, closed_at timestamptz); "
             "CREATE INDEX ON shop.tickets (customer_id); INSERT INTO shop.tickets VALUES (1, 1, '999-1234567-1234567', NULL)", user="shop_owner")
    shop.apply_policy({"policy": "tickets", "enabled": True,
                       "orders": {"table": "shop.tickets", "number": "no", "anchor": "closed_at"},
                       "linked": [{"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["first_name"]}]})
    run_cycle(shop)
    shop.sql("UPDATE shop.customers SET first_name = 'FirstTicket'", user=SYNC)
    assert shop.value("SELECT first_name FROM shop.customers") == "FirstTicket"


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_retrieved_orders_and_the_extension_itself_pass(shop, on_reimport):
    redacted_shop(shop, on_reimport)
    before = snapshot(shop)
    retrieve(shop, number(1))
    assert tables_with(shop, "Aaa") == list(TABLES)
    sync(shop, update, rows("Aaa"))
    with refused("55000", "read-only"):
        sync(shop, update, rows("Bbb"))
    end_retrieval(shop, number(1))
    assert run_cycle(shop)["redacted"] == 1
    assert {t: len(r) for t, r in snapshot(shop).items()} == {t: len(r) for t, r in before.items()} and tables_with(shop, "Aaa") == []
    shop.sql("SELECT * FROM amazon_pii.unflag(%s, 'wrong policy')", [number(1)], "pii_admin")
    assert tables_with(shop, "Aaa") == list(TABLES)
    sync(shop, update, rows("Bbb"))
    assert tables_with(shop, "Bbb") == list(TABLES)


def test_the_rest_of_a_json_document_goes_through(shop):
    shop.apply_policy(policy("keep", linked=[{"table": "shop.payloads", "on": {"order_id": "id"}, "redact": {"raw": {"json": ["$.buyer"]}}}]))
    add_order(shop, 1)
    shop.sql("INSERT INTO shop.payloads (id, order_id, raw) VALUES (1, 1, %s)", ['{"buyer": {"name": "Jane"}, "state": 1}'], SYNC)
    run_cycle(shop)
    shop.sql("UPDATE shop.payloads SET raw = %s", ['{"buyer": {"name": "Joan", "phone": 7}, "state": 2}'], SYNC)
    assert shop.value("SELECT raw FROM shop.payloads") == {"buyer": {"name": PLACEHOLDER, "phone": None}, "state": 2}


def test_an_order_of_another_number_under_an_old_key_is_another_order(shop):
    redacted_shop(shop, "keep")
    shop.sql("DELETE FROM shop.orders", user=SYNC)
    run_cycle(shop)
    sync(shop, new, {t: (*row[:1], number(9), *row[2:]) if t == "orders" else row for t, row in rows("Ccc").items() if t in ("orders", "addresses")})
    assert tables_with(shop, "Ccc") == ["orders", "addresses"]
    run_cycle(shop)
    retrieve(shop, number(9))
    assert tables_with(shop, "Ccc") == ["orders", "addresses"]


@pytest.mark.parametrize("on_reimport", ["keep", "refuse"])
def test_partitions_are_guarded_too(shop, on_reimport):
    """Breaks when making one trigger of a partition makes the others too, before their turn."""
    shop.sql("""CREATE TABLE shop.parts (id bigint, region text, sent timestamptz, note text, state text, PRIMARY KEY (id, region)) PARTITION BY LIST (region);
        CREATE TABLE shop.parts_a (state text, note text, sent timestamptz, region text NOT NULL, id bigint NOT NULL);
        ALTER TABLE shop.parts ATTACH PARTITION shop.parts_a FOR VALUES IN ('a');
        CREATE TABLE shop.parts_b PARTITION OF shop.parts FOR VALUES IN ('b');
        INSERT INTO shop.parts VALUES (1, 'a', '2024-01-01', 'Jane', 'x'), (2, 'b', '2024-01-01', 'Joan', 'x')""", user="shop_owner")
    shop.apply_policy({"policy": "shop", "enabled": True, "on_reimport": on_reimport, "when_retrieved": "ignore", "orders": {
        "table": "shop.parts", "amazon": "true", "number": "id::text", "anchor": "sent", "redact": ["note"]}})
    assert run_cycle(shop)["redacted"] == 2
    for table, order in (("parts", 1), ("parts_a", 1), ("parts_b", 2), ("parts", 2)):
        statement = f"UPDATE shop.{table} SET note = 'Back', state = '{table}' WHERE id = {order}"
        if on_reimport == "refuse":
            with refused("55000"):
                shop.sql(statement, user="shop_owner")
        else:
            shop.sql(statement, user="shop_owner")
            assert shop.sql("SELECT note, state FROM shop.parts WHERE id = %s", [order]) == [(PLACEHOLDER, table)]


def test_a_guard_that_fails_lets_the_statement_through(shop):
    """Whether another order needs the row cannot be found out: the next cycle redacts."""
    shop.sql("CREATE FUNCTION shop.channel(text) RETURNS text LANGUAGE sql AS 'SELECT $1'", user="shop_owner")
    for on_reimport in ("keep", "refuse"):
        shop.apply_policy(policy(on_reimport, orders={**policy()["orders"], "amazon": "shop.channel(channel) = 'amazon'"}))
        add_order(shop, 1) if on_reimport == "keep" else None
        run_cycle(shop)
        shop.sql("ALTER FUNCTION shop.channel(text) RENAME TO gone", user="shop_owner")
        shop.sql("UPDATE shop.orders SET gift_message = 'Back', total = 7", user=SYNC)
        assert shop.sql("SELECT gift_message, total::int FROM shop.orders") == [("Back", 7)]
        shop.sql("ALTER FUNCTION shop.gone(text) RENAME TO channel", user="shop_owner")
        run_cycle(shop)
        assert shop.value("SELECT gift_message FROM shop.orders") == PLACEHOLDER
        shop.sql("UPDATE shop.orders SET total = 1", user=SYNC)
