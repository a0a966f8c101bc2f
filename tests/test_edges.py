"""Edges where a value could be lost, or personal data could stay: policies that change, links and names that change, rows
that are deleted, neighbours that fail."""
import copy

import psycopg2
import pytest
from support import (
    SHOP_POLICY, add_customer, add_order, documents, end_retrieval, number, open_shop, order_row, retrieve, run_cycle, shop_policy,
)


@pytest.fixture
def shop(db):
    open_shop(db)
    for customer in (1, 2, 9):
        add_customer(db, customer)
    for order in (1, 2):
        add_order(db, order, customer=order)
    return db


def linked(table, **changes):
    """One entry of the policy, changed."""
    entry = copy.deepcopy(next(e for e in SHOP_POLICY["linked"] if e["table"] == table))
    entry.update(changes)
    return entry


def with_entries(*entries):
    tables = {e["table"] for e in entries}
    return shop_policy(linked=[e for e in SHOP_POLICY["linked"] if e["table"] not in tables] + list(entries))


def make_due(db, order):
    db.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = now() WHERE order_key = %s", [f'["{order}"]'])


def test_what_a_former_policy_left_does_not_hide_the_original(shop):
    """Breaks when our own output is archived as if it were new: retrieve() would give the prefix of a postcode."""
    first = linked("shop.addresses", redact={"name": "placeholder", "line1": {"value": "gone"}, "zip": {"prefix": 1}})
    shop.apply_policy(with_entries(first))
    run_cycle(shop)
    assert shop.sql("SELECT name, line1, zip FROM shop.addresses WHERE order_id = 1") == [("[Redacted]", "gone", "Z")]
    archived = documents(shop)
    shop.apply_policy(with_entries(linked("shop.addresses", redact=["name", "line1", "zip"])))
    run_cycle(shop)
    assert shop.sql("SELECT name, line1, zip FROM shop.addresses WHERE order_id = 1") == [("[Redacted]",) * 3]
    assert documents(shop) == archived
    retrieve(shop, number(1))
    assert shop.sql("SELECT name, line1, zip FROM shop.addresses WHERE order_id = 1") == [("Name1", "Street 1", "Z1")]


def test_a_new_leaf_in_a_redacted_document_does_not_hide_the_others(shop):
    """Breaks when the newest version of a JSON cell is given back with our own marks in it."""
    shop.sql("""INSERT INTO shop.payloads (order_id, raw) VALUES (1, '{"name": "Ada", "gift": null, "zip": 10.10}')""", user="shop_owner")
    shop.apply_policy(with_entries(
        {"table": "shop.payloads", "on": {"order_id": "id"}, "redact": {"raw": {"json": ["$.name", "$.gift", "$.zip"]}}}))
    run_cycle(shop)
    shop.sql("""UPDATE shop.payloads SET raw = jsonb_set(raw, '{gift}', '"late"')""", user="shop_owner")
    run_cycle(shop)
    assert shop.value("SELECT raw::text FROM shop.payloads") == '{"zip": null, "gift": "[Redacted]", "name": "[Redacted]"}'
    retrieve(shop, number(1))
    assert shop.value("SELECT raw::text FROM shop.payloads") == '{"zip": 10.10, "gift": "late", "name": "Ada"}'


def test_a_record_that_a_link_has_left_is_redacted_all_the_same(shop):
    """Breaks when records are known by their links alone: the customer of day 29 would keep its data for ever."""
    shop.apply_policy(shop_policy(redact_after="90 days", loosened="test"))
    run_cycle(shop)
    assert order_row(shop, 1) == ("archived",)
    shop.sql("UPDATE shop.orders SET customer_id = 9 WHERE id = 1", user="shop_owner")
    make_due(shop, 1)
    run_cycle(shop)
    assert shop.sql("SELECT id, last_name FROM shop.customers ORDER BY id") == [(1, "[Redacted]"), (2, "Last2"), (9, "[Redacted]")]
    retrieve(shop, number(1))
    assert shop.sql("SELECT id, last_name FROM shop.customers ORDER BY id") == [(1, "Last1"), (2, "Last2"), (9, "Last9")]


def test_a_record_that_went_to_another_channels_order_is_left_alone(shop):
    """Breaks when a stored key is overwritten without asking whose the row is now."""
    shop.apply_policy(shop_policy(redact_after="90 days", loosened="test"))
    run_cycle(shop)
    add_order(shop, 3, channel="web", customer=9)
    shop.sql("UPDATE shop.addresses SET order_id = 3 WHERE order_id = 1", user="shop_owner")
    make_due(shop, 1)
    run_cycle(shop)
    assert order_row(shop, 1) == ("redacted",)
    assert shop.sql("SELECT name FROM shop.addresses WHERE order_id = 3 ORDER BY name") == [("Name1",), ("Name3",)]


def test_what_a_deleted_order_pointed_at_stays_due(shop):
    """Breaks when a deletion ends the watch over a customer whose data is back: it would stay, and read-only."""
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    retrieve(shop, number(1))
    shop.sql("DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
    assert shop.value("SELECT last_name FROM shop.customers WHERE id = 1") == "Last1"
    end_retrieval(shop, number(1))
    run_cycle(shop)
    assert shop.value("SELECT last_name FROM shop.customers WHERE id = 1") == "[Redacted]"
    shop.sql("UPDATE shop.customers SET phone = '555' WHERE id = 1", user="shop_owner")


def test_a_cascade_takes_nothing_along_that_is_not_archived(shop):
    """Breaks when deleting a parent deletes children of which no copy exists, or their own check fails for ever."""
    shop.sql("INSERT INTO shop.invoices VALUES (1, 'INV-1', 1, now() - '40 days'::interval, 'Bill', 5)", user="shop_owner")
    shop.sql("INSERT INTO shop.invoice_lines VALUES (1, 1, ''), (2, 1, 'a note')", user="shop_owner")
    invoices = linked("shop.invoices", on_redact="delete")
    del invoices["redact"]
    lines = linked("shop.invoice_lines")
    problems = shop.check_policy(with_entries(invoices, lines))
    assert [p[:2] for p in problems if p[0] == "error"] == [("error", "shop.invoices")]
    assert "invoice_lines" in problems[0][2]
    del lines["redact"]
    shop.apply_policy(with_entries(invoices, {**lines, "on_redact": "delete"}))
    before = shop.sql("SELECT * FROM shop.invoices"), shop.sql("SELECT * FROM shop.invoice_lines ORDER BY id")
    run_cycle(shop)
    assert order_row(shop, 1) == ("redacted",)
    assert shop.sql("SELECT * FROM shop.invoices") == shop.sql("SELECT * FROM shop.invoice_lines") == []
    retrieve(shop, number(1))
    assert (shop.sql("SELECT * FROM shop.invoices"), shop.sql("SELECT * FROM shop.invoice_lines ORDER BY id")) == before


def test_a_table_that_is_renamed_keeps_its_archive(shop):
    """Breaks when documents are looked up under the table's name of today."""
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    shop.sql("ALTER TABLE shop.addresses RENAME TO places", user="shop_owner")
    shop.sql("UPDATE shop.places SET phone = '555' WHERE order_id = 2", user="shop_owner")
    run_cycle(shop)
    assert shop.value("SELECT phone FROM shop.places WHERE order_id = 2") == "[Redacted]"
    retrieve(shop, number(1))
    assert shop.sql("SELECT name FROM shop.places WHERE order_id = 1") == [("Name1",)]


def test_one_row_that_cannot_be_evaluated_stops_nobody_else(shop):
    """Breaks when flagging fails as a whole: no order of the policy would be redacted any more."""
    shop.sql("ALTER TABLE shop.orders ADD shipped_text text", user="shop_owner")
    shop.sql("UPDATE shop.orders SET shipped_text = shipped_at::text", user="shop_owner")
    policy = shop_policy()
    policy["orders"]["anchor"] = "shipped_text::timestamptz"
    shop.apply_policy(policy)
    add_order(shop, 3, customer=9)
    shop.sql("UPDATE shop.orders SET shipped_text = 'n/a' WHERE id = 3", user="shop_owner")
    run_cycle(shop)
    assert [order_row(shop, order)[0] for order in (1, 2)] == ["redacted"] * 2
    assert order_row(shop, 3, "status, last_error")[0] == "failed" or "22007" in shop.value(
        "SELECT last_error FROM amazon_pii.status", user="pii_admin")
    shop.sql("UPDATE shop.orders SET shipped_text = shipped_at::text", user="shop_owner")
    run_cycle(shop)
    assert order_row(shop, 3) == ("redacted",)


def test_a_pending_trigger_never_runs_as_the_owner_of_a_wrapper(shop):
    """Breaks when constraints are fired under the identity of a SECURITY DEFINER function that calls retrieve()."""
    shop.apply_policy(shop_policy())
    run_cycle(shop)
    shop.psql("""
        CREATE TABLE public.crown (x text);
        CREATE FUNCTION public.wrapper(n text) RETURNS bigint LANGUAGE sql SECURITY DEFINER
            AS $$ SELECT count(*) FROM amazon_pii.retrieve(n, 'return') $$;
        CREATE SCHEMA theirs AUTHORIZATION nobody_special;
        SET ROLE nobody_special;
        CREATE TABLE theirs.t (x int);
        CREATE FUNCTION theirs.f() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN INSERT INTO public.crown VALUES (current_user); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER t AFTER INSERT ON theirs.t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION theirs.f();
    """)
    with shop.connect("nobody_special", autocommit=False).cursor() as cursor:
        cursor.execute("INSERT INTO theirs.t VALUES (1)")
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("SELECT public.wrapper(%s)", [number(1)])
    assert shop.sql("SELECT * FROM public.crown") == []


def test_a_change_of_key_is_followed_for_every_policy_and_stops_no_other(shop):
    """Breaks when one policy's trigger moves the states of another, or one damaged document stops everybody's access."""
    other = shop_policy(policy="zz")
    for policy in (shop_policy(), other):
        shop.apply_policy(policy)
    run_cycle(shop)
    shop.sql("UPDATE amazon_pii_archive.document SET sealed = substr(sealed, 1, 20) WHERE policy = 'zz' AND order_key = '[\"2\"]'")
    shop.sql("ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey", user="shop_owner")
    shop.sql("UPDATE shop.addresses SET order_id = order_id + 500", user="shop_owner")
    shop.sql("UPDATE shop.orders SET id = id + 500", user="shop_owner")
    assert run_cycle(shop)["failed"] == 0
    call = "SELECT sum(cells) FROM amazon_pii.retrieve(%s, 'return', policy => 'zz')"
    assert shop.value(call, [number(1)], user="pii_operator") > 0
    assert shop.sql("SELECT gift_message FROM shop.orders WHERE id = 501") == [("Gift1",)]
    with pytest.raises(psycopg2.Error) as damaged:
        shop.value(call, [number(2)], user="pii_operator")
    assert damaged.value.pgcode == "XX001"
    shop.sql("SELECT * FROM amazon_pii.retrieve(%s, 'return', policy => 'shop')", [number(2)], "pii_operator")
    assert shop.sql("SELECT gift_message FROM shop.orders WHERE id = 502") == [("Gift2",)]
