"""People and their reasons: what each call gives, what it refuses and how, and what it leaves in the log."""
import json

import pytest
from cluster import wait_until
from support import (
    PLACEHOLDER, add_customer, add_invoice, add_order, number, open_shop, order_value, record_states, refused, run_cycle,
    shop_policy, snapshot, tables_with, uses_merge,
)

ONE = number(1)
PII = ("Gift1", "Note1", "Name1", "Street 1", "City1", "First1", "Last1", "buyer1", "+49 555", "+49 666", "BillTo1", "LineNote1")


@pytest.fixture
def shop(db):
    """Order 1 is redacted, order 2 is archived, order 3 is scheduled."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    add_invoice(db, 1, 1)
    add_order(db, 2, "29 days 12 hours")
    add_order(db, 3, "3 days")
    db.before = snapshot(db)
    db.apply_policy(shop_policy())
    run_cycle(db)
    assert [order_value(db, i) for i in (1, 2, 3)] == ["redacted", "archived", "scheduled"]
    db.after = snapshot(db)
    return db


def call(db, function, *arguments, user="pii_operator", **named):
    places = ["%s"] * len(arguments) + [f"{name} => %s" for name in named]
    return db.sql(f"SELECT * FROM amazon_pii.{function}({', '.join(places)})", [*arguments, *named.values()], user)


def log(db, action):
    """Entries of the audit log, newest last."""
    return db.sql('SELECT "user", actor, order_number, order_key, reason, policy, policy_version FROM amazon_pii.audit_log '
                  "WHERE action = %s ORDER BY audit_id", [action], "pii_auditor")


# What the calls give

def test_retrieve_says_what_it_wrote(shop):
    """Breaks when retrieve does not restore everything, or counts wrongly, or does not record who asked and why."""
    shop.sql("SET amazon_pii.actor = 'clerk 7'", user="pii_operator")
    assert sorted(call(shop, "retrieve", ONE, "  return 303-1234567-0000001 ")) == [
        ('["1"]', "shop.addresses", 1, 5, 0), ('["1"]', "shop.customers", 1, 4, 0), ('["1"]', "shop.invoice_lines", 1, 1, 0),
        ('["1"]', "shop.invoices", 1, 1, 0), ('["1"]', "shop.orders", 1, 2, 0)]
    assert snapshot(shop) == shop.before
    assert log(shop, "retrieve") == [("pii_operator", "clerk 7", ONE, '["1"]', "return 303-1234567-0000001", "shop", 1)]
    assert set(record_states(shop, "shop.customers", 1).values()) == {"retrieved"}


def test_peek_gives_the_values_and_writes_nothing(shop):
    """Breaks when peek writes to the shop's tables, misses a cell, or is not recorded."""
    (((order,),),) = call(shop, "peek", ONE, "return")
    cells = {(r["table"], column): text for r in order["records"] for column, text in r["cells"].items()}
    assert (order["policy"], order["order_key"]) == ("shop", '["1"]')
    assert cells["shop.orders", "gift_message"] == "Gift1" and cells["shop.customers", "email"] == "buyer1@example.invalid"
    assert cells["shop.invoice_lines", "note"] == "LineNote1" and len(cells) == 13
    assert snapshot(shop) == shop.after
    assert len(call(shop, "peek", number(2), "return")[0][0][0]["records"]) == 2, "archived is enough"
    assert [entry[2:5] for entry in log(shop, "peek")] == [(ONE, '["1"]', "return"), (number(2), '["2"]', "return")]


def test_a_rollback_leaves_the_entry(shop):
    """Breaks when the access is recorded in the caller's transaction, which the caller can roll back."""
    session = shop.connect("pii_operator", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SELECT amazon_pii.peek(%s, 'curious')", [ONE])
        assert "Gift1" in json.dumps(cursor.fetchone()[0])
        session.rollback()
        cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'curious too')", [ONE])
        cursor.execute("SAVEPOINT s")
        session.rollback()
    session.close()
    assert [e[4] for e in log(shop, "peek")] == ["curious"]
    assert [e[4] for e in log(shop, "retrieve")] == ["curious too"]
    assert snapshot(shop) == shop.after
    assert order_value(shop, 1) == "redacted"
    shop.sql("UPDATE shop.addresses SET city = city WHERE order_id = 1; UPDATE shop.addresses SET phone = '1' WHERE order_id = 1", user="shop_owner")


def test_a_savepoint_undoes_a_retrieval_as_a_whole(shop):
    """Breaks when part of a retrieval survives ROLLBACK TO, or the guard's flag does."""
    session = shop.connect("pii_operator", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SAVEPOINT s; SELECT * FROM amazon_pii.retrieve(%s, 'first'); ROLLBACK TO s", [ONE])
        cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'second')", [ONE])
    session.commit()
    session.close()
    assert snapshot(shop) == shop.before
    assert [e[4] for e in log(shop, "retrieve")] == ["first", "second"]


RETYPED = {
    # What redaction left, made to fit the new type; the new type; how the archive calls the old one.
    "shorter": ("line1", "varchar(5)", "left(line1, 5)", "text", "character varying(5)"),
    "number": ("zip", "integer", "CASE zip WHEN 'Z2' THEN 2 ELSE 7 END", "character varying(12)", "integer"),
}


@pytest.mark.parametrize("kind", RETYPED)
def test_a_column_that_got_another_type_is_named(shop, kind):
    """Breaks when a value that its column cannot hold any more fails without a word of the column, its table and types."""
    column, new, using, was, now = RETYPED[kind]
    if kind == "number":
        document = shop_policy()
        document["linked"][0]["redact"] = {"zip": {"value": "7"}, "name": "placeholder"}
        shop.apply_policy(document)
        add_order(shop, 4)
        run_cycle(shop)
    order = 4 if kind == "number" else 1
    shop.sql(f"ALTER TABLE shop.addresses ALTER {column} TYPE {new} USING {using}", user="shop_owner")
    before = snapshot(shop)
    with refused("42804", f'column "{column}" of shop.addresses has type {now}, which cannot hold a value that was archived as {was}') as caught:
        call(shop, "retrieve", number(order), "return")
    assert "peek" in caught.value.diag.message_hint and "Street" not in str(caught.value)
    assert snapshot(shop) == before
    assert f"Street {order}" in str(call(shop, "peek", number(order), "return")) or kind == "number"


def test_a_column_that_got_a_wider_type_is_restored(shop):
    """Breaks when every change of a type is taken for an obstacle."""
    shop.sql("ALTER TABLE shop.addresses ALTER line1 TYPE text, ALTER city TYPE varchar(500)", user="shop_owner")
    call(shop, "retrieve", ONE, "return")
    assert snapshot(shop) == shop.before


DEFERRED = """SET ROLE shop_owner;
CREATE TABLE shop.a (id int PRIMARY KEY); CREATE TABLE shop.b (id int PRIMARY KEY);
ALTER TABLE shop.b ADD CONSTRAINT late FOREIGN KEY (id) REFERENCES shop.a DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE shop.b ADD CONSTRAINT "Late too" FOREIGN KEY (id) REFERENCES shop.a DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE shop.b ADD CONSTRAINT early FOREIGN KEY (id) REFERENCES shop.a DEFERRABLE;
GRANT USAGE ON SCHEMA shop TO pii_operator; GRANT ALL ON shop.a, shop.b TO pii_operator;"""


def test_deferred_constraints_are_deferred_after_a_retrieval(shop):
    """Breaks when a retrieval makes the rest of its transaction check at once what is declared to be checked at COMMIT."""
    shop.psql(DEFERRED)
    shop.psql("SET ROLE shop_owner; ALTER TABLE shop.b DROP CONSTRAINT early")
    session = shop.connect("pii_operator", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [ONE])
        cursor.execute("INSERT INTO shop.b VALUES (1); INSERT INTO shop.a VALUES (1)")
        session.commit()
        call(shop, "end_retrieval", ONE)
        run_cycle(shop)
        cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'return'); INSERT INTO shop.b VALUES (2)", [ONE])
        with refused("23503"):
            session.commit()
    shop.psql('SET ROLE shop_owner; ALTER TABLE shop.b ADD CONSTRAINT early FOREIGN KEY (id) REFERENCES shop.a DEFERRABLE')
    with session.cursor() as cursor:
        cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [ONE])
        with refused("23503", "early"):
            cursor.execute("INSERT INTO shop.b VALUES (3)")
    session.rollback()


def test_cells_edited_after_redaction_are_kept_and_counted(shop):
    """Breaks when a retrieval overwrites what somebody wrote since, or hides that it did not write."""
    shop.sql("UPDATE shop.addresses SET name = 'Newer', phone = NULL WHERE order_id = 1", user="shop_owner")
    shop.sql("DELETE FROM shop.invoice_lines", user="shop_owner")
    found = {row[1]: row[2:] for row in call(shop, "retrieve", ONE, "return")}
    assert found["shop.addresses"] == (1, 3, 2)
    assert found["shop.invoice_lines"] == (0, 0, 1)
    assert shop.sql("SELECT name, line1, phone FROM shop.addresses WHERE order_id = 1") == [("Newer", "Street 1", None)]
    call(shop, "end_retrieval", ONE)
    run_cycle(shop)
    assert shop.sql("SELECT name, line1, phone FROM shop.addresses WHERE order_id = 1") == [(PLACEHOLDER, PLACEHOLDER, None)]
    call(shop, "retrieve", ONE, "return")
    assert shop.value("SELECT name FROM shop.addresses WHERE order_id = 1") == "Newer"


def test_hold_and_release(shop):
    """Breaks when a held order is redacted, or one whose hold has ended or was released is not."""
    call(shop, "hold", number(2), "dispute", "2999-01-01")
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = now() - '1 hour'::interval, next_due_at = now() WHERE order_key = '[\"2\"]'")
    assert run_cycle(shop)["redacted"] == 0
    assert tables_with(shop, "Name2") == ["addresses"]
    assert shop.value("SELECT count(*) FROM amazon_pii.overdue") == 0, "a hold is no delay of ours"
    assert order_value(shop, 2, "held_until::text") == "2999-01-01 00:00:00+00"
    call(shop, "release", number(2))
    assert run_cycle(shop)["redacted"] == 1
    assert tables_with(shop, "Name2") == []
    assert log(shop, "hold")[0][4] == "dispute" and len(log(shop, "release")) == 1


def test_a_hold_ends_by_itself(shop):
    """Breaks when the end of a hold is not heeded, on an archived or on a retrieved order."""
    call(shop, "retrieve", ONE, "return")
    until = shop.value("SELECT (now() + '6 seconds'::interval)::text")
    for order in (1, 2):
        call(shop, "hold", number(order), "dispute", until)
    call(shop, "end_retrieval", ONE)
    shop.sql("UPDATE amazon_pii.order_state SET redact_due_at = now(), next_due_at = held_until WHERE order_key = '[\"2\"]'")
    if shop.value("SELECT now() < %s::timestamptz - '4 seconds'::interval", [until]):
        run_cycle(shop)
        assert [order_value(shop, i) for i in (1, 2)] == ["retrieved", "archived"]
    wait_until(lambda: run_cycle(shop) and order_value(shop, 1) == order_value(shop, 2) == "redacted")
    assert tables_with(shop, "Name2") == tables_with(shop, "Name1") == []


def test_release_needs_a_hold(shop):
    """Breaks when releasing what is not held looks like a success, or is refused for an order that is."""
    for held in (False, True, False):
        if held:
            call(shop, "hold", number(3), "dispute", "2999-01-01")
            call(shop, "release", number(3))
            continue
        with refused("55000", f'order "{number(3)}" is not held') as caught:
            call(shop, "release", number(3))
        assert "explain_order" in caught.value.diag.message_hint
    call(shop, "hold", number(3), "dispute", "2999-01-01")
    # A hold that ended by itself.
    shop.sql("UPDATE amazon_pii.order_state SET held_until = now() - '1 s'::interval WHERE order_key = '[\"3\"]'")
    with refused("55000", "is not held"):
        call(shop, "release", number(3))
    assert len(log(shop, "release")) == 1


def test_find_orders_by_number_and_by_invoice(shop):
    """Breaks when an invoice's number does not lead to its order, or an order that is not flagged is shown."""
    add_order(shop, 9, channel="web")
    add_invoice(shop, 9, 9)
    for user in ("pii_operator", "pii_admin"):
        assert call(shop, "find_orders", ONE, user=user) == [("shop", '["1"]', ONE, "redacted", "order number")]
        assert call(shop, "find_orders", "INV-1", user=user) == [("shop", '["1"]', ONE, "redacted", "invoices")]
        for nothing in ("INV-9", number(9), "", "%", "INV-1' OR true --", "Name2"):
            assert call(shop, "find_orders", nothing, user=user) == []


def test_unflag_gives_back_for_good(shop):
    """Breaks when the victim of a wrong policy does not get everything back, or is still tracked."""
    documents = shop.value("SELECT count(*) FROM amazon_pii_archive.document")
    rows = call(shop, "unflag", ONE, "wrong policy", user="pii_admin")
    assert (len(rows), sum(r[3] for r in rows), sum(r[4] for r in rows)) == (5, 13, 0)
    assert snapshot(shop) == shop.before
    assert (order_value(shop, 1), record_states(shop, "shop.customers", 1)) == (None, {})
    assert shop.value("SELECT count(*) FROM amazon_pii_archive.document") == documents
    assert log(shop, "unflag")[0][4] == "wrong policy"
    with refused("P0002"):
        call(shop, "peek", ONE, "return")
    shop.sql("UPDATE shop.customers SET phone = '1' WHERE id = 1", user="shop_owner")


def test_preview_shows_what_the_cycle_will_do(shop):
    """Breaks when preview counts differently from the cycle, or changes something."""
    add_order(shop, 4, "40 days")
    state = "SELECT md5(string_agg(o::text, '' ORDER BY order_key)) FROM amazon_pii.order_state AS o"
    before = (snapshot(shop), shop.value(state))
    assert sorted(call(shop, "preview", "shop")) == [
        ("archive", "shop.addresses", 1, 1), ("archive", "shop.orders", 1, 1),
        ("redact", "shop.addresses", 1, 1), ("redact", "shop.orders", 1, 1)]
    later = call(shop, "preview", "shop", shop.value("SELECT now() + '28 days'::interval"), user="pii_auditor")
    assert ("redact", "shop.orders", 3, 3) in later and ("archive", "shop.orders", 2, 2) in later
    assert (snapshot(shop), shop.value(state)) == before
    run_cycle(shop)
    assert call(shop, "preview", "shop", user="pii_admin") == []
    with refused("42704", "does not exist"):
        call(shop, "preview", "nothing")


def test_explain_order_says_why_without_values(shop):
    """Breaks when the explanation lacks a step, or quotes personal data."""
    steps = call(shop, "explain_order", ONE, user="pii_auditor")
    assert {s[0] for s in steps} >= {"flagged", "status", "anchor", "archive", "redact", "record"}
    assert [s[2] for s in steps if s[0] == "status"] == ["redacted"]
    assert len([s for s in steps if s[0] == "record"]) == 5
    call(shop, "retrieve", ONE, "return")
    call(shop, "hold", ONE, "dispute", "2999-01-01")
    text = str(call(shop, "explain_order", ONE))
    assert "2999" in text and "until" in text
    assert not [word for word in PII if word in text]


# What they refuse

LONG = "x" * 51
REFUSALS = [
    ("retrieve", ("404-0000000-0000000", "return"), "P0002"), ("peek", ("404-0000000-0000000", "return"), "P0002"),
    ("end_retrieval", ("nothing",), "P0002"), ("hold", ("nothing", "dispute", "2999-01-01"), "P0002"), ("release", ("nothing",), "P0002"),
    ("explain_order", ("nothing",), "P0002"), ("retrieve", (None, "return"), "22023"), ("peek", (None, "return"), "22023"),
    ("retrieve", (number(2), "return"), "55000"), ("retrieve", (number(3), "return"), "55000"), ("peek", (number(3), "return"), "55000"),
    ("end_retrieval", (ONE,), "55000"),
    ("release", (ONE,), "55000"), ("release", (number(2),), "55000"), ("release", (number(3),), "55000"),
    ("hold", (number(2), "dispute", "2001-01-01"), "22023"), ("hold", (number(2), "dispute", None), "22023"),
    ("hold", (number(2), "dispute", "infinity"), "22023"),
    *[(function, (ONE if function != "hold" else number(2), reason, *until), "22023")
      for function, until in (("retrieve", ()), ("peek", ()), ("hold", ("2999-01-01",)))
      for reason in (None, "", "   ", LONG, "for ada@example.invalid", "call 030 / 123 45 67", "call +49-30-1234567", "a\nb")],
]


@pytest.mark.parametrize("function, arguments, sqlstate", REFUSALS)
def test_refusals_have_their_sqlstate_and_change_nothing(shop, function, arguments, sqlstate):
    """Breaks when an error has another SQLSTATE, repeats the reason, or something was opened, written or logged before it."""
    with refused(sqlstate) as caught:
        call(shop, function, *arguments)
    for word in ("ada@example.invalid", "123 45 67", "1234567", LONG):
        assert arguments[0] and word in arguments[0] or word not in str(caught.value)
    assert snapshot(shop) == shop.after
    assert log(shop, function) == []


def test_a_retrieved_order_is_not_retrieved_again(shop):
    """Breaks when a second retrieval prolongs the first."""
    call(shop, "retrieve", ONE, "return")
    until = order_value(shop, 1, "retrieved_until")
    with refused("55006", "end_retrieval"):
        call(shop, "retrieve", ONE, "return")
    assert order_value(shop, 1, "retrieved_until") == until and len(log(shop, "retrieve")) == 1


def test_reasons_that_must_pass_and_policies_without(shop):
    """Breaks when the reason rule refuses an order number, a date or 50 characters, or "optional" is not heeded."""
    for reason in (ONE, "seen 2026-11-22", "ü" * 50, "ticket #12345"):
        call(shop, "peek", ONE, reason)
    assert [e[4] for e in log(shop, "peek")] == [ONE, "seen 2026-11-22", "ü" * 50, "ticket #12345"]
    shop.apply_policy(shop_policy(reason="optional"))
    call(shop, "peek", ONE)
    assert log(shop, "peek")[-1][4] is None
    with refused("22023"):
        call(shop, "peek", ONE, "ada@example.invalid")


def test_an_order_number_of_two_policies_is_ambiguous_until_one_is_named(shop):
    """Breaks when a call acts on orders of the wrong policy, or on all of them."""
    shop.psql("SET ROLE shop_owner; CREATE TABLE shop.other (id bigint PRIMARY KEY, no text, at date, note text);")
    shop.sql("INSERT INTO shop.other VALUES (1, %s, current_date - 40, 'Other1'), (2, %s, current_date - 40, 'Other2')",
             [ONE, ONE], "shop_owner")
    shop.apply_policy({"policy": "other", "enabled": True,
                       "orders": {"table": "shop.other", "number": "no", "anchor": "at", "redact": ["note"]}})
    run_cycle(shop)
    for function, arguments in (("retrieve", ("return",)), ("peek", ("return",)), ("end_retrieval", ()), ("release", ()),
                                ("hold", ("dispute", "2999-01-01"))):
        with refused("P0003", "other, shop"):
            call(shop, function, ONE, *arguments)
    assert {r[0] for r in call(shop, "find_orders", ONE)} == {"other", "shop"}
    assert {s[1].split()[0] for s in call(shop, "explain_order", ONE) if s[0] == "status"} == {"other", "shop"}
    call(shop, "retrieve", ONE, "return", policy="other", key='["2"]')
    assert shop.sql("SELECT note FROM shop.other ORDER BY id") == [(PLACEHOLDER,), ("Other2",)]
    assert tables_with(shop, "Gift1") == []
    with refused("P0002"):
        call(shop, "retrieve", ONE, "return", policy="other", key='["3"]')
    with refused("P0002"):
        call(shop, "peek", ONE, "return", policy="nothing")


# Retrieved rows are read-only

@pytest.mark.parametrize("statement", [
    "UPDATE shop.orders SET gift_message = 'x' WHERE id = 1",
    "UPDATE shop.addresses SET line2 = 'was empty' WHERE order_id = 1",
    "UPDATE shop.customers SET phone = NULL WHERE id = 1",
    "UPDATE shop.orders SET shop_note = upper(shop_note)",
    "INSERT INTO shop.customers VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET first_name = EXCLUDED.first_name",
    "UPDATE shop.invoice_lines SET id = 5, note = 'x'",
    pytest.param("MERGE INTO shop.customers AS c USING (VALUES (1::bigint)) AS s (id) ON c.id = s.id "
                 "WHEN MATCHED THEN UPDATE SET email = 'x'", marks=uses_merge),
])
@pytest.mark.parametrize("user", ["shop_owner", "postgres"])
def test_pii_of_a_retrieved_order_is_read_only(shop, statement, user):
    """Breaks when a write to a retrieved row's PII goes through: it would be lost with the next redaction's archive."""
    call(shop, "retrieve", ONE, "return")
    with refused("55000", "end_retrieval") as caught:
        shop.sql(statement, user=user)
    assert not [word for word in PII if word in str(caught.value)]
    assert snapshot(shop) == shop.before


def test_what_a_retrieved_order_still_allows(shop):
    """Breaks when the guard refuses harmless writes, other orders' rows, or outlives the retrieval."""
    call(shop, "retrieve", ONE, "return")
    for harmless in ("UPDATE shop.orders SET gift_message = gift_message, shop_note = 'Note1' WHERE id = 1",
                     "UPDATE shop.orders SET total = 7", "UPDATE shop.customers SET tier = 'gold'",
                     "UPDATE shop.addresses SET name = 'Other' WHERE order_id = 2", "DELETE FROM shop.invoice_lines"):
        shop.sql(harmless, user="shop_owner")
    call(shop, "end_retrieval", ONE)
    run_cycle(shop)
    shop.sql("UPDATE shop.customers SET phone = NULL", user="shop_owner")


@pytest.mark.parametrize("statement", ["DELETE FROM shop.orders WHERE id = 1", "TRUNCATE shop.orders CASCADE"])
def test_deleting_a_retrieved_order_keeps_its_archive(shop, statement):
    """Breaks when a deletion is refused, or what the order pointed at keeps its personal data, or its archive goes with
    it."""
    call(shop, "retrieve", ONE, "return")
    documents = shop.value("SELECT count(*) FROM amazon_pii_archive.document WHERE order_key = '[\"1\"]'")
    shop.sql(statement, user="shop_owner")
    assert run_cycle(shop)["failed"] == 0
    assert order_value(shop, 1) == "retrieved", "its customer is still there, with personal data"
    call(shop, "end_retrieval", ONE)
    assert run_cycle(shop)["failed"] == 0
    assert order_value(shop, 1) not in ("retrieved", "scheduled", "failed")
    assert shop.value("SELECT count(*) FROM amazon_pii.records WHERE order_key = '[\"1\"]' AND status = 'retrieved'") == 0
    shop.sql("UPDATE shop.customers SET phone = '555-77' WHERE id = 1", user="shop_owner")
    assert shop.value("SELECT count(*) FROM amazon_pii_archive.document WHERE order_key = '[\"1\"]'") == documents == 5
    assert "Gift1" in json.dumps(call(shop, "peek", ONE, "return"))
