"""Before its time, and for good: erase, shred, forget, their certificate, and what becomes of an archive that is past its
retention."""
import hashlib
import json

import pytest
from support import (
    Background, add_customer, add_invoice, add_order, at_gate, between_archiving_and_redacting, close_gate, documents, fill, number,
    open_gate, open_shop, order_value, record_states, refused, retrieve, run_cycle, shop_policy, snapshot, tables_with,
)

ONE, ADMIN = number(1), "pii_admin"
PII = ("Gift1", "Note1", "Name1", "Street 1", "City1", "First1", "Last1", "buyer1", "+49 555 0001", "BillTo1", "LineNote1")
KEYS = "SELECT order_key, key_id FROM amazon_pii_archive.data_key ORDER BY 1, 2"


@pytest.fixture
def shop(db):
    """Order 1 has all that an order can have, and is due in a month; order 2 is somebody else's and just as young."""
    open_shop(db)
    add_customer(db, 1)
    add_customer(db, 2)
    add_order(db, 1, "1 day", customer=1)
    add_invoice(db, 1, 1, "1 day")
    add_order(db, 2, "1 day", customer=2)
    db.apply_policy(shop_policy())
    assert run_cycle(db)["redacted"] == 0
    return db


@pytest.fixture
def done(db):
    """Order 1 is redacted."""
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    add_invoice(db, 1, 1)
    db.apply_policy(shop_policy())
    assert run_cycle(db)["redacted"] == 1
    return db


def ask(db, what, order=1, reason="ticket 4711", user=ADMIN, **named):
    more = "".join(f", {name} => %s" for name in named)
    db.sql(f"SELECT amazon_pii.{what}(%s, %s{more})", [number(order), reason, *named.values()], user)


def certificate(db, order=1, user="pii_auditor"):
    return db.value("SELECT amazon_pii.certificate(%s)", [number(order)], user)


def log(db, action):
    return db.sql("SELECT order_number, reason, detail FROM amazon_pii.audit_log WHERE action = %s ORDER BY audit_id", [action], "pii_auditor")


def clean(db, words=PII):
    """Whether none of order 1's personal data is in the shop's tables."""
    return [w for w in words if tables_with(db, w)] == []


def reimport(db, name="Comeback"):
    db.sql("UPDATE shop.addresses SET name = %s WHERE order_id = 1", [name], "shop_owner")


def nothing_is_archived(db, order=1):
    key = f'["{order}"]'
    return (db.value("SELECT count(*) FROM amazon_pii_archive.document WHERE order_key = %s", [key]),
            db.value("SELECT count(*) FROM amazon_pii_archive.data_key WHERE order_key = %s", [key])) == (0, 0)


def age(db, order, by):
    """Makes an order's redaction older."""
    db.sql("UPDATE amazon_pii.order_state SET redacted_at = redacted_at - %s::interval WHERE order_key = %s", [by, f'["{order}"]'])


# erase


def test_an_erased_order_is_done_by_the_next_cycle(shop):
    """Breaks when erase waits for the clock, overwrites without a copy, or takes others along."""
    before = snapshot(shop)
    ask(shop, "erase")
    assert order_value(shop, 1) == "scheduled" and snapshot(shop) == before
    assert run_cycle(shop) == {"flagged": 0, "archived": 1, "redacted": 1, "failed": 0, "overdue": 0}
    assert order_value(shop, 1) == "redacted" and order_value(shop, 2) == "scheduled"
    assert clean(shop) and tables_with(shop, "Name2") == ["addresses"]
    assert log(shop, "erase") == [(ONE, "ticket 4711", None)]
    retrieve(shop, ONE)
    assert snapshot(shop) == before


def test_an_order_that_is_not_dispatched_is_erased_too(shop):
    """Breaks when an order without an anchor cannot be erased, or its import takes the mark away."""
    add_order(shop, 3, None)
    assert order_value(shop, 3) == "flagged"
    ask(shop, "erase", 3)
    shop.sql("UPDATE shop.orders SET shipped_at = now() WHERE id = 3", user="shop_owner")
    shop.sql("UPDATE shop.orders SET external_no = external_no WHERE id = 3", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert tables_with(shop, "Name3") == []


@pytest.mark.parametrize("state", ["archived", "retrieved", "pushed", "windowed", "late", "new version", "not in effect"])
def test_nothing_holds_an_erased_order_back(shop, state):
    """Breaks when an archived copy, a retrieval, a younger invoice, a window, or a changed policy delays what was asked for."""
    if state == "archived":
        shop.apply_policy(shop_policy(archive_after="0 days"))
        run_cycle(shop)
        assert order_value(shop, 1) == "archived"
    elif state in ("retrieved", "late"):
        ask(shop, "erase")
        run_cycle(shop)
        if state == "retrieved":
            retrieve(shop, ONE)
        else:
            add_invoice(shop, 7, 1, "1 day")
            assert run_cycle(shop)["redacted"] == 0 and tables_with(shop, "BillTo7") == ["invoices"]
    elif state == "pushed":
        shop.sql("UPDATE shop.orders SET shipped_at = now() - '40 days'::interval WHERE id = 1", user="shop_owner")
        assert run_cycle(shop)["redacted"] == 0
        assert order_value(shop, 1, "pushed_by") == "invoices"
    elif state == "windowed":
        hour = shop.value("SELECT extract(hour FROM now() AT TIME ZONE 'UTC')::int")
        shop.apply_policy(shop_policy(window={"from": f"{(hour + 10) % 24:02d}:00", "to": f"{(hour + 11) % 24:02d}:00", "timezone": "UTC"}))
    elif state == "not in effect":
        shop.apply_policy(shop_policy(effective_from="2999-01-01", loosened="test"))
        run_cycle(shop)
    ask(shop, "erase")
    if state == "new version":
        shop.apply_policy(shop_policy(redact_after="60 days", loosened="test"))
    assert run_cycle(shop)["redacted"] == 1
    assert order_value(shop, 1) == "redacted" and clean(shop) and tables_with(shop, "BillTo7") == []
    assert order_value(shop, 1, "asked") is None


def test_a_held_order_is_neither_erased_nor_forgotten_and_an_erased_one_not_held(shop):
    """Breaks when what must be kept can be destroyed, or an operator stops what an administrator has asked for."""
    shop.sql("SELECT amazon_pii.hold(%s, 'chargeback', now() + '9 days'::interval)", [ONE], "pii_operator")
    for what in ("erase", "forget"):
        with refused("55000", "is held") as caught:
            ask(shop, what)
        assert "amazon_pii.release()" in str(caught.value)
    shop.sql("SELECT amazon_pii.release(%s)", [ONE], "pii_operator")
    ask(shop, "erase")
    with refused("55000", "is to be redacted at once"):
        shop.sql("SELECT amazon_pii.hold(%s, 'chargeback', now() + '9 days'::interval)", [ONE], "pii_operator")


def test_a_shared_row_waits_for_its_other_orders_whatever_is_asked(shop):
    """Breaks when erasing an order takes the data of a customer whose other order needs it (P5), or the customer is forgotten."""
    add_order(shop, 3, "1 day", customer=1)
    ask(shop, "forget")
    run_cycle(shop)
    assert order_value(shop, 1) == "purged"
    assert tables_with(shop, "First1") == ["customers"]
    assert record_states(shop, "shop.customers", 1)[1] == "waiting"
    assert certificate(shop)["orders"][0]["waiting_for_other_orders"] == 1
    ask(shop, "erase", 3)
    run_cycle(shop)
    assert tables_with(shop, "First1") == []
    assert nothing_is_archived(shop) and not nothing_is_archived(shop, 3)


def test_a_rollback_takes_the_request_back(shop):
    """Breaks when a request outlives its transaction."""
    with shop.connect(ADMIN, autocommit=False) as connection, connection.cursor() as cursor:
        for what in ("erase", "forget"):
            cursor.execute(f"SELECT amazon_pii.{what}(%s, 'x')", [ONE])
            connection.rollback()
    assert run_cycle(shop)["redacted"] == 0
    assert log(shop, "erase") == log(shop, "forget") == []


@pytest.mark.parametrize("what", ["erase", "shred", "forget"])
def test_refusals(shop, what):
    """Breaks when a reason is not checked, an unknown order is taken for one, or another role may destroy."""
    with refused("22023"):
        ask(shop, what, reason=None)
    with refused("22023"):
        ask(shop, what, reason="mail to a@example.invalid")
    with refused("P0002"):
        ask(shop, what, 99)
    for user in ("pii_operator", "pii_auditor", "shop_owner"):
        with refused("42501"):
            ask(shop, what, user=user)


# shred


def test_a_shredded_order_cannot_be_opened_by_anybody(done):
    """Breaks when a key or a document survives, or a restored dump of the documents opens without the keys."""
    kept = done.sql("SELECT * FROM amazon_pii_archive.document")
    after = snapshot(done)
    ask(done, "shred")
    assert order_value(done, 1) == "purged" and order_value(done, 1, "purged_at IS NOT NULL") is True
    assert nothing_is_archived(done) and snapshot(done) == after
    for call in ("peek", "retrieve"):
        with refused("42704", "no longer exists"):
            done.sql(f"SELECT amazon_pii.{call}(%s, 'x')", [ONE], "pii_operator")
    with refused("42704"):
        done.sql("SELECT amazon_pii.unflag(%s, 'x')", [ONE], ADMIN)
    with refused("42704"):
        ask(done, "shred")
    # Somebody restores the documents, and whatever we knew of the order; not the keys.
    with done.connect() as connection, connection.cursor() as cursor:
        for row in kept:
            cursor.execute("INSERT INTO amazon_pii_archive.document VALUES (%s, %s, %s, %s, %s, %s, %s, %s)", row)
    done.sql("UPDATE amazon_pii.order_state SET purged_at = NULL")
    for call in ("peek", "retrieve"):
        with refused("42704", "no longer exists"):
            done.sql(f"SELECT amazon_pii.{call}(%s, 'x')", [ONE], "pii_operator")
    assert log(done, "shred") == [(ONE, "ticket 4711", None)]


def test_shred_is_for_what_is_redacted(shop):
    """Breaks when shred destroys the only copy, or leaves live data and calls it purged."""
    for prepare in (lambda: None, lambda: (shop.apply_policy(shop_policy(archive_after="0 days")), run_cycle(shop))):
        prepare()
        with refused("55000", "is not redacted") as caught:
            ask(shop, "shred")
        assert "amazon_pii.forget()" in str(caught.value)
    ask(shop, "erase")
    run_cycle(shop)
    retrieve(shop, ONE)
    with refused("55000", "is not redacted"):
        ask(shop, "shred")
    assert len(documents(shop)) > 0


def test_what_comes_back_after_shred_gets_a_new_key(done):
    """Breaks when a re-import is sealed under a key's old name, stays, or makes the order unreadable for good."""
    assert done.sql(KEYS) == [('["1"]', "1")]
    ask(done, "shred")
    reimport(done)
    assert run_cycle(done)["redacted"] == 1
    assert tables_with(done, "Comeback") == [] and order_value(done, 1) == "redacted"
    assert done.sql(KEYS) == [('["1"]', "2")]
    peeked = json.dumps(done.value("SELECT amazon_pii.peek(%s, 'x')", [ONE], "pii_operator"))
    assert "Comeback" in peeked and "Gift1" not in peeked
    ask(done, "shred")
    reimport(done, "Again")
    run_cycle(done)
    assert done.sql(KEYS) == [('["1"]', "3")]


def test_a_shredded_order_whose_key_changed_is_shredded_where_its_documents_are(done):
    """Breaks when documents that have yet to follow a change of key survive under the old one."""
    done.sql("ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey; ALTER TABLE shop.invoices DROP CONSTRAINT invoices_order_id_fkey; "
             "UPDATE shop.orders SET id = 100 WHERE id = 1", user="shop_owner")
    # One that is damaged cannot follow; it is destroyed all the same.
    done.sql("UPDATE amazon_pii_archive.document SET sealed = '\\x00'")
    ask(done, "shred")
    assert documents(done) == {} and done.sql(KEYS) == [] and done.value("SELECT count(*) FROM amazon_pii.renamed") == 0
    assert order_value(done, 100) == "purged"


# forget


def test_a_forgotten_order_is_gone_with_the_next_cycle(shop):
    """Breaks when forget leaves live data, a copy or a key, or needs a second cycle."""
    ask(shop, "forget")
    assert run_cycle(shop) == {"flagged": 0, "archived": 1, "redacted": 1, "failed": 0, "overdue": 0}
    assert clean(shop) and nothing_is_archived(shop)
    assert order_value(shop, 1) == "purged" and order_value(shop, 1, "asked") == "forgotten"
    with refused("42704"):
        shop.sql("SELECT amazon_pii.peek(%s, 'x')", [ONE], "pii_operator")
    assert order_value(shop, 2) == "scheduled"


def test_a_redacted_order_is_forgotten_at_once(done):
    """Breaks when there is nothing to redact and the copy waits for a cycle."""
    ask(done, "forget")
    assert nothing_is_archived(done) and order_value(done, 1) == "purged"
    run_cycle(done)
    assert order_value(done, 1, "asked") == "forgotten" and certificate(done)["orders"][0]["forgotten"] is True


IMPORTS = {
    "update": "UPDATE shop.addresses SET name = 'Comeback' WHERE order_id = 1",
    "a new row": "INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Comeback')",
    "delete and insert": """DELETE FROM shop.orders WHERE id = 1;
        INSERT INTO shop.orders (id, external_no, channel, shipped_at) VALUES (1, '303-1234567-0000001', 'amazon', NULL);
        INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Comeback')""",
    "a young invoice": "INSERT INTO shop.invoices VALUES (5, 'INV-5', 1, now(), 'Comeback', 1)",
}


@pytest.mark.parametrize("how", IMPORTS)
@pytest.mark.parametrize("deleted", [False, True])
def test_what_comes_back_after_forget_is_redacted_without_a_copy(shop, how, deleted):
    """Breaks when a forgotten order's data is archived again, or stays; also if it was deleted in between."""
    ask(shop, "forget")
    run_cycle(shop)
    if deleted:
        shop.sql("DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
        run_cycle(shop)
        shop.sql("INSERT INTO shop.orders (id, external_no, channel) VALUES (1, '303-1234567-0000001', 'amazon')", user="shop_owner")
    shop.sql(IMPORTS[how], user="shop_owner")
    if deleted and how == "update":
        shop.sql("INSERT INTO shop.addresses (order_id, name) VALUES (1, 'Comeback')", user="shop_owner")
    run_cycle(shop)
    assert tables_with(shop, "Comeback") == []
    assert nothing_is_archived(shop) and order_value(shop, 1) == "purged"


def test_an_order_that_vanishes_while_it_is_to_be_forgotten(shop):
    """Breaks when deleting an order ends what was asked for, and its copy stays."""
    shop.apply_policy(shop_policy(archive_after="0 days"))
    run_cycle(shop)
    ask(shop, "forget")
    shop.sql("DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
    run_cycle(shop)
    assert nothing_is_archived(shop) and order_value(shop, 1) == "purged"
    assert tables_with(shop, "First1") == []


@pytest.mark.parametrize("what", ["forget", "erase"])
def test_a_request_between_the_two_transactions_of_a_batch(done, what):
    """Breaks when a cycle that has just copied what came back leaves that copy behind."""
    reimport(done)
    turn = done.connect(autocommit=False)
    call = between_archiving_and_redacting(done, turn)
    ask(done, what)
    turn.commit()
    call.result()
    run_cycle(done)
    assert tables_with(done, "Comeback") == []
    assert nothing_is_archived(done) is (what == "forget")


# archive_for


def test_an_archive_ends_with_its_time(done):
    """Breaks when archive_for is not heeded, counts from elsewhere, or takes another order's documents."""
    add_order(done, 2)
    run_cycle(done)
    age(done, 1, "3651 days")
    assert run_cycle(done) == {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 0}
    assert order_value(done, 1) == "redacted"
    age(done, 1, "10 days")
    run_cycle(done)
    assert order_value(done, 1) == "purged" and nothing_is_archived(done)
    assert order_value(done, 2) == "redacted" and not nothing_is_archived(done, 2)
    assert log(done, "purge") == [(ONE, None, "5 documents, archive_for is over")]
    assert done.sql("SELECT redacted, purged FROM amazon_pii.status") == [(1, 1)]
    assert done.sql("SELECT status FROM amazon_pii.find_orders(%s)", [ONE], "pii_operator") == [("purged",)]


def test_a_changed_policy_counts_for_what_was_redacted_before(done):
    """Breaks when the time that an archive has left is what it was when the order was redacted."""
    age(done, 1, "400 days")
    done.apply_policy(shop_policy(archive_for="2 years"))
    run_cycle(done)
    assert order_value(done, 1) == "redacted"
    done.apply_policy(shop_policy(archive_for="1 year"))
    run_cycle(done)
    assert order_value(done, 1) == "purged"


def test_a_retrieved_order_keeps_its_archive(done):
    """Breaks when the copy is destroyed while its data is back in the tables."""
    retrieve(done, ONE)
    age(done, 1, "11 years")
    run_cycle(done)
    assert order_value(done, 1) == "retrieved" and not nothing_is_archived(done)
    done.sql("SELECT amazon_pii.end_retrieval(%s)", [ONE], "pii_operator")
    run_cycle(done)
    assert order_value(done, 1) == "redacted" and clean(done)


def test_a_deleted_order_does_not_keep_its_archive_for_ever(done):
    """Breaks when the documents of an order whose row is gone have no end."""
    done.sql("DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
    assert order_value(done, 1) == "gone"
    run_cycle(done)
    assert not nothing_is_archived(done)
    age(done, 1, "11 years")
    run_cycle(done)
    assert nothing_is_archived(done) and order_value(done, 1) == "purged"


def test_nothing_is_kept_where_the_policy_says_so(shop):
    """Breaks when "0 days" leaves a document or a key behind the transaction that redacts, or overwrites without reading back."""
    shop.apply_policy(shop_policy(archive_for="0 days", archive_after="0 days", redact_after="12 hours"))
    assert run_cycle(shop)["redacted"] == 2
    assert clean(shop) and documents(shop) == {} and shop.sql(KEYS) == []
    assert [order_value(shop, i) for i in (1, 2)] == ["purged", "purged"]
    # One moment: redacted and purged.
    assert order_value(shop, 1, "purged_at = redacted_at") is True
    reimport(shop)
    run_cycle(shop)
    assert tables_with(shop, "Comeback") == [] and documents(shop) == {} and order_value(shop, 1) == "purged"


def test_a_policy_that_was_stopped_ends_no_archive(shop):
    """Breaks when a batch that has begun before a policy was stopped destroys what that policy did not keep."""
    shop.apply_policy(shop_policy(archive_for="0 days", archive_after="0 days", redact_after="12 hours"))
    close_gate(shop, 1)
    call = Background(shop, "CALL amazon_pii.run_cycle()")
    at_gate(shop)
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'test')", user="pii_admin")
    open_gate(shop)
    call.result()
    assert [order_value(shop, i) for i in (1, 2)] == ["redacted", "redacted"] and documents(shop) != {}
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    run_cycle(shop)
    assert [order_value(shop, i) for i in (1, 2)] == ["purged", "purged"] and documents(shop) == {}


def test_what_cannot_be_read_back_is_not_overwritten_where_nothing_is_kept(shop):
    """Breaks when P1 is given up for a policy that keeps nothing: a damaged copy must stop the overwrite."""
    shop.apply_policy(shop_policy(archive_after="0 days", archive_for="0 days"))
    run_cycle(shop)
    assert order_value(shop, 1) == "archived"
    shop.sql("UPDATE amazon_pii_archive.document SET sealed = '\\x00' WHERE table_name = 'shop.addresses'")
    ask(shop, "erase")
    assert run_cycle(shop)["failed"] == 1
    assert tables_with(shop, "Name1") == ["addresses"] and order_value(shop, 1) == "failed"


def test_the_purge_goes_on_by_batches(done):
    """Breaks when only a first batch is purged, or all is purged in one transaction."""
    fill(done, 1200, first=1000)
    run_cycle(done)
    done.sql("UPDATE amazon_pii.order_state SET redacted_at = redacted_at - '11 years'::interval")
    run_cycle(done)
    assert documents(done) == {} and done.sql(KEYS) == []
    assert done.sql("SELECT DISTINCT status FROM amazon_pii.orders") == [("purged",)]
    assert len(done.sql("SELECT DISTINCT audit_id FROM amazon_pii.audit_log WHERE action = 'purge'", user="pii_auditor")) > 1


def test_an_archive_that_cannot_be_written_stops_nothing_else(done):
    """Breaks when a purge that fails ends the cycle, or is told nobody."""
    age(done, 1, "11 years")
    done.sql("CREATE FUNCTION public.stop() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'; "
             "CREATE TRIGGER stop BEFORE DELETE ON amazon_pii_archive.document FOR EACH ROW EXECUTE FUNCTION public.stop()")
    add_order(done, 2)
    assert run_cycle(done)["redacted"] == 1
    assert order_value(done, 1) == "redacted" and not nothing_is_archived(done)
    assert "08006" in done.value("SELECT last_error FROM amazon_pii.status")
    done.sql("DROP TRIGGER stop ON amazon_pii_archive.document")
    run_cycle(done)
    assert order_value(done, 1) == "purged" and done.value("SELECT last_error FROM amazon_pii.status") is None


def test_what_comes_back_after_the_purge_is_kept_again(done):
    """Breaks when PII on a purged order stays (P7), or is archived for good."""
    age(done, 1, "11 years")
    run_cycle(done)
    reimport(done)
    assert run_cycle(done)["redacted"] == 1
    assert order_value(done, 1) == "redacted" and done.sql(KEYS) == [('["1"]', "2")]
    age(done, 1, "11 years")
    run_cycle(done)
    assert order_value(done, 1) == "purged" and nothing_is_archived(done)


@pytest.mark.parametrize("value", ["ten years", "-1 days", "900000 years"])
def test_an_archive_for_that_is_none_is_refused(shop, value):
    """Breaks when a time that cannot be counted with is found out by a cycle."""
    with refused("22023", "archive_for"):
        shop.apply_policy(shop_policy(archive_for=value))


# The certificate


def test_the_certificate_says_what_was_done_and_nothing_of_whom(shop):
    """Breaks when the proof lacks who, what, when, why or how many, holds PII, or its digest is not that of the log."""
    with refused("55000", "is not done yet"):
        certificate(shop)
    shop.sql("SET amazon_pii.actor = 'erp-user-17'", user=ADMIN)
    ask(shop, "forget", reason="request of 3 March")
    with refused("55000", "is not done yet"):
        certificate(shop)
    run_cycle(shop)
    proof = certificate(shop)
    assert (proof["policy"], proof["issued_by"]) == ("shop", "pii_auditor")
    [order] = proof["orders"]
    assert (order["order_number"], order["order_key"], order["state"], order["forgotten"], order["policy_version"]) == (
        ONE, '["1"]', "purged", True, 1)
    assert order["redacted_at"] and order["archive_destroyed_at"] == order["redacted_at"]
    assert {t["table"]: t["records"] for t in order["tables"]} == {
        "shop.orders": 1, "shop.customers": 1, "shop.addresses": 1, "shop.invoices": 1, "shop.invoice_lines": 1}
    assert order["records"] == 5
    assert [(a["action"], a["user"], a["actor"], a["reason"]) for a in order["actions"]] == [
        ("forget", ADMIN, "erp-user-17", "request of 3 March"), ("redact", ADMIN, "erp-user-17", None), ("purge", ADMIN, "erp-user-17", None)]
    text = json.dumps(proof)
    assert [w for w in PII if w in text] == []
    entries = shop.sql("SELECT audit_id, encode(mac, 'hex') FROM amazon_pii.audit_log WHERE policy = 'shop' AND order_key = '[\"1\"]' ORDER BY 1",
                       user="pii_auditor")
    digest = hashlib.sha256("\n".join(f"{i}:{mac}" for i, mac in entries).encode()).hexdigest()
    assert order["audit"] == {"entries": len(entries), "upto": entries[-1][0], "sha256": digest}


def test_orders_of_a_batch_are_certified_one_by_one(shop):
    """Breaks when what the log says of many orders in one entry is not found, or another order's key is taken for one's own."""
    for order in (10, 100, 1000):
        add_order(shop, order)
    run_cycle(shop)
    for order in (10, 100, 1000):
        [proof] = certificate(shop, order, ADMIN)["orders"]
        assert [a["action"] for a in proof["actions"]] == ["redact"] and proof["audit"]["entries"] == 2
        assert proof["state"] == "redacted" and proof["archive_destroyed_at"] is None


def test_the_certificate_of_a_shredded_order(done):
    ask(done, "shred", reason="lawyer says so")
    [order] = certificate(done)["orders"]
    assert (order["state"], order["forgotten"]) == ("purged", False)
    assert [(a["action"], a["reason"]) for a in order["actions"]] == [("redact", None), ("shred", "lawyer says so")]


def test_what_came_back_is_not_certified(done):
    """Breaks when a certificate is issued while personal data is in the tables."""
    reimport(done)
    with refused("55000", "is not done yet"):
        certificate(done)
    run_cycle(done)
    certificate(done)
    add_invoice(done, 9, 1, "1 day")
    run_cycle(done)
    assert tables_with(done, "BillTo9") == ["invoices"], "it is younger than its order"
    with refused("55000", "is not done yet"):
        certificate(done)
    retrieve(done, ONE)
    with refused("55000"):
        certificate(done)


def test_a_certificate_is_not_for_everybody(done):
    for user in ("pii_operator", "shop_owner", "nobody_special"):
        with refused("42501"):
            certificate(done, user=user)
