"""Documents that go with an order. pixi: "invoice PDFs are deleted from the document storage", in its three forms: the row is
deleted, the column is nulled, the file lies outside; archived first, or not, as the policy says."""
import copy
import json
from contextlib import closing

import pytest
from cluster import wait_until
from conftest import new_database
from support import (
    PLACEHOLDER, add_invoice, add_order, documents, end_retrieval, hurry, number, open_shop, order_row, order_value, refused,
    retrieve, run_cycle, shop_policy, sweep,
)

# A storage of documents as such systems have it: PDFs in rows of their own, PDFs in a column, and paths of files.
TABLES = """
SET ROLE shop_owner;
CREATE TABLE shop.invoice_pdfs (id bigint PRIMARY KEY, invoice_id bigint REFERENCES shop.invoices, name text, pdf bytea NOT NULL);
CREATE INDEX ON shop.invoice_pdfs (invoice_id);
ALTER TABLE shop.invoices ADD pdf bytea, ADD path text;
ALTER TABLE shop.orders ADD label_path text;
"""
# Some MB that do not compress, hex.
PDF = "(SELECT string_agg(sha256((%s || ' ' || i)::bytea), '') FROM generate_series(1, 80000) AS i)"
ROWS = {"table": "shop.invoice_pdfs", "as": "pdfs", "parent": "invoices", "on": {"invoice_id": "id"}, "on_redact": "delete"}
INVOICES = {"table": "shop.invoices", "as": "invoices", "on": {"order_id": "id"}, "number": "invoice_no",
            "redact": {"bill_to": "placeholder"}}


def policy(*linked, orders=None, **changes):
    document = shop_policy(**changes)
    document["orders"].update(orders or {})
    document["linked"] = [document["linked"][0], *copy.deepcopy(list(linked))]
    return document


@pytest.fixture
def shop(db):
    open_shop(db)
    db.psql(TABLES)
    for order in (1, 2):
        add_order(db, order)
        add_invoice(db, order * 10, order)
    return db


def add_pdf(db, row, invoice):
    db.sql(f"INSERT INTO shop.invoice_pdfs SELECT %s, %s, 'Bill for Jane', {PDF}", [row, invoice, str(row)], "shop_owner")


def set_path(db, invoice, path):
    db.sql("UPDATE shop.invoices SET path = %s WHERE id = %s", [path, invoice], "shop_owner")


def due(db, user="cleaner", **arguments):
    given = ", ".join(f"{name} => %({name})s" for name in arguments)
    rows = db.sql(f"SELECT file_id, order_key, table_name, record_key, path, due_since <= now() FROM amazon_pii.files_due({given})", arguments, user)
    assert all(row[5] for row in rows)
    return [row[:5] for row in rows]


def ack(db, file_id, user="cleaner"):
    return db.value("SELECT amazon_pii.ack_file(%s)", [file_id], user)


@pytest.fixture
def cleaned(shop):
    """With a login that deletes files and may do nothing else."""
    if not shop.value("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = 'cleaner')"):
        shop.sql("CREATE ROLE cleaner LOGIN")
    shop.sql("GRANT amazon_pii_files TO cleaner")
    return shop


# The row is deleted


def test_the_row_of_a_pdf_is_deleted_and_comes_back(shop):
    """Breaks when a document of some MB does not survive archive and retrieval bit by bit."""
    add_pdf(shop, 1, 10)
    before = shop.sql("SELECT id, invoice_id, name, sha256(pdf), length(pdf) FROM shop.invoice_pdfs")
    assert before[0][4] > 2_500_000
    shop.apply_policy(policy(INVOICES, ROWS))
    run_cycle(shop)
    assert shop.sql("SELECT id FROM shop.invoice_pdfs") == []
    assert any(key[1] == "shop.invoice_pdfs" for key in documents(shop))
    rows = {r[1]: r[2:] for r in retrieve(shop, number(1))}
    assert rows["shop.invoice_pdfs"] == (1, 4, 0)
    assert shop.sql("SELECT id, invoice_id, name, sha256(pdf), length(pdf) FROM shop.invoice_pdfs") == before


def test_the_row_of_a_pdf_is_deleted_for_good(shop):
    """Breaks when a copy is kept of what is not to be archived, or what is lost is not shown as lost."""
    add_pdf(shop, 1, 10)
    add_pdf(shop, 2, 20)
    shop.apply_policy(policy(INVOICES, {**ROWS, "archive": False}))
    preview = shop.sql("SELECT action, table_name, records FROM amazon_pii.preview('shop') WHERE table_name = 'shop.invoice_pdfs'")
    assert preview == [("redact", "shop.invoice_pdfs", 2)]
    counts = run_cycle(shop)
    assert counts["redacted"] == 2 and counts["archived"] == 2
    assert shop.sql("SELECT id FROM shop.invoice_pdfs") == []
    assert {key[1] for key in documents(shop)} == {"shop.orders", "shop.addresses", "shop.invoices"}
    assert shop.sql("SELECT record_key, status, version FROM amazon_pii.records WHERE table_name = 'shop.invoice_pdfs' ORDER BY 1") == [
        ('["1"]', "redacted", 0), ('["2"]', "redacted", 0)]
    explained = shop.sql("SELECT detail FROM amazon_pii.explain_order(%s) WHERE object LIKE 'shop.invoice_pdfs%%'", [number(1)], "pii_auditor")
    assert explained == [("redacted, not archived",)]
    peeked = shop.value("SELECT amazon_pii.peek(%s, 'a question')", [number(1)], "pii_operator")
    assert {"table": "shop.invoice_pdfs", "record_key": '["1"]', "archived": False} in peeked[0]["records"]
    rows = {r[1]: r[2:] for r in retrieve(shop, number(1))}
    assert rows["shop.invoice_pdfs"] == (0, 0, 1) and rows["shop.invoices"] == (1, 1, 0)
    assert shop.sql("SELECT id FROM shop.invoice_pdfs") == []
    # It is made anew: it goes again.
    end_retrieval(shop, number(1))
    add_pdf(shop, 1, 10)
    run_cycle(shop)
    assert shop.sql("SELECT id FROM shop.invoice_pdfs") == [] and order_value(shop, 1) == "redacted"
    add_pdf(shop, 3, 20)
    run_cycle(shop)
    assert shop.sql("SELECT id FROM shop.invoice_pdfs") == []
    assert not any(key[1] == "shop.invoice_pdfs" for key in documents(shop))


def test_a_policy_that_stops_archiving_gives_back_what_it_had_archived(shop):
    """Breaks when older copies are lost, or written in part, once their table is not archived any more."""
    add_pdf(shop, 1, 10)
    before = shop.sql("SELECT * FROM shop.invoice_pdfs")
    shop.apply_policy(policy(INVOICES, ROWS))
    run_cycle(shop)
    shop.apply_policy(policy(INVOICES, {**ROWS, "archive": False}))
    sweep(shop)
    assert {r[1]: r[2:] for r in retrieve(shop, number(1))}["shop.invoice_pdfs"] == (1, 4, 0)
    assert shop.sql("SELECT * FROM shop.invoice_pdfs") == before


# The column is nulled


@pytest.mark.parametrize("archive", [True, False])
def test_the_column_of_a_pdf_is_nulled(shop, archive):
    """Breaks when a document in a column stays, or is archived although the policy says no, or does not come back exactly."""
    shop.sql(f"UPDATE shop.invoices SET pdf = {PDF}", ["one"], "shop_owner")
    before = shop.sql("SELECT id, bill_to, pdf FROM shop.invoices ORDER BY id")
    document = policy({**INVOICES, "redact": {"bill_to": "placeholder", "pdf": "null"}, "archive": archive})
    shop.apply_policy(document)
    run_cycle(shop)
    assert shop.sql("SELECT bill_to, pdf FROM shop.invoices") == [(PLACEHOLDER, None)] * 2
    assert any(key[1] == "shop.invoices" for key in documents(shop)) == archive
    rows = {r[1]: r[2:] for r in retrieve(shop, number(1))}
    assert rows["shop.invoices"] == ((1, 2, 0) if archive else (0, 0, 1))
    expected = before[0] if archive else (10, PLACEHOLDER, None)
    assert shop.sql("SELECT id, bill_to, pdf FROM shop.invoices ORDER BY id")[0] == expected
    # An edit between the cycles, and one of an order that is retrieved.
    end_retrieval(shop, number(1))
    shop.sql("UPDATE shop.invoices SET bill_to = 'Came back' WHERE id = 20", user="shop_owner")
    run_cycle(shop)
    assert shop.sql("SELECT bill_to, pdf FROM shop.invoices") == [(PLACEHOLDER, None)] * 2


def test_archive_in_the_document(shop):
    """Breaks when the key is taken where it means nothing, or in two ways."""
    for linked, problem in (
        ([{"table": "shop.invoices", "on": {"order_id": "id"}, "archive": False}], "rows that stay as they are"),
        ([{"table": "shop.invoices", "on": {"order_id": "id"}, "files": "path"}], "rows that stay as they are"),
        ([INVOICES, {**INVOICES, "as": "again", "archive": False}], "archived or not"),
        ([{**INVOICES, "files": "path"}, {**INVOICES, "as": "again", "files": "invoice_no"}], "disagree on the files"),
        ([{**INVOICES, "archive": "no"}], "true or false"),
        ([{**INVOICES, "files": "nowhere"}], "a column does not exist"),
        ([{**INVOICES, "files": "1 / 0"}], "22012"),
    ):
        rows = [r for r in shop.check_policy(policy(*linked)) if r[0] == "error"]
        assert len(rows) == 1 and problem in rows[0][2], (linked, rows)
    assert shop.check_policy(policy(INVOICES, files_within="soon"))[0][2].startswith("files_within: not an interval")


# The file lies outside


def test_a_file_is_due_with_its_row_and_the_order_clean_when_it_is_gone(cleaned):
    """Breaks when a file's path is lost with its row, or an order passes for clean while its file is there."""
    shop = cleaned
    set_path(shop, 10, "s3://bills/Jane Doe/10.pdf")
    set_path(shop, 20, "")
    shop.sql("UPDATE shop.orders SET label_path = '/labels/Doe-' || id WHERE id = 2", user="shop_owner")
    document = policy({**INVOICES, "redact": {"bill_to": "placeholder", "path": "null"}, "files": "path"},
                      orders={"redact": ["gift_message", "shop_note"], "files": "label_path"})
    assert [r for r in shop.check_policy(document) if r[0] == "error"] == []
    shop.apply_policy(document)
    assert due(shop) == []
    with closing(shop.connect()) as listener:
        listener.cursor().execute("LISTEN amazon_pii")
        assert run_cycle(shop) == {"flagged": 2, "archived": 2, "redacted": 2, "failed": 0, "overdue": 0}
        wait_until(lambda: listener.poll() or any("files_due" in n.payload for n in listener.notifies))
        told = [json.loads(n.payload) for n in listener.notifies if "files_due" in n.payload]
    assert [(t["count"], sorted(t["orders"])) for t in told] == [(2, ['["1"]', '["2"]'])]
    files = {f[1]: f for f in due(shop)}
    assert files['["1"]'][2:] == ("shop.invoices", '["10"]', "s3://bills/Jane Doe/10.pdf")
    assert files['["2"]'][2:] == ("shop.orders", '["2"]', "/labels/Doe-2") and len(files) == 2
    assert due(shop, max=1) == [min(files.values())] and due(shop, policy="other") == [] and len(due(shop, policy="shop")) == 2
    # No PII outside of the seal, the log included.
    everything = "".join(str(shop.sql(f"SELECT t::text FROM amazon_pii.{t} AS t")) for t in ("file_outbox", "files", "audit_entry", "records", "run"))
    assert "Doe" not in everything and "Doe".encode().hex() not in everything
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'files_due' AND \"user\" = 'cleaner' AND order_key = '[\"1\"]'") >= 1
    # It shows everywhere that the order is not clean.
    assert shop.sql("SELECT redacted, files_waiting, overdue FROM amazon_pii.status") == [(2, 2, 0)]
    record = "SELECT status FROM amazon_pii.records WHERE table_name = 'shop.invoices' AND record_key = '[\"10\"]'"
    assert shop.value(record) == "file_waiting"
    explain = "SELECT object, detail LIKE '%%acknowledged%%' FROM amazon_pii.explain_order(%s) WHERE step = 'file'"
    assert shop.sql(explain, [number(1)], "pii_auditor") == [('shop.invoices ["10"]', False)]
    shop.sql("UPDATE amazon_pii.file_outbox SET overdue_at = overdue_at - '1 day'::interval WHERE order_key = '[\"1\"]'")
    assert shop.sql("SELECT order_number, status FROM amazon_pii.overdue") == [(number(1), "file_waiting")]
    assert run_cycle(shop)["overdue"] == 1
    assert ack(shop, files['["1"]'][0]) is True and ack(shop, files['["1"]'][0]) is False
    assert shop.sql("SELECT sealed, wrapped, acknowledged_by FROM amazon_pii.file_outbox WHERE order_key = '[\"1\"]'") == [(None, None, "cleaner")]
    assert [f[1] for f in due(shop)] == ['["2"]']
    assert shop.value(record) == "redacted" and shop.sql("SELECT order_number FROM amazon_pii.overdue") == []
    assert shop.sql("SELECT files_waiting, overdue FROM amazon_pii.status") == [(1, 0)]
    assert shop.sql(explain, [number(1)], "pii_auditor") == [('shop.invoices ["10"]', True)]
    assert shop.sql("SELECT order_number, detail FROM amazon_pii.audit_log WHERE action = 'ack_file'") == [(number(1), 'shop.invoices ["10"]')]
    with refused("42704", "no such file"):
        ack(shop, 4711)


def test_the_one_who_deletes_files_may_do_nothing_else(cleaned):
    """Breaks when that capability opens the archive, or a list, or is had by others."""
    shop = cleaned
    set_path(shop, 10, "/bills/10.pdf")
    shop.apply_policy(policy({**INVOICES, "files": "path"}))
    run_cycle(shop)
    assert len(due(shop, "pii_operator")) == 1
    for user in ("pii_admin", "pii_auditor", "shop_owner", "nobody_special"):
        with refused("42501"):
            due(shop, user)
        with refused("42501"):
            ack(shop, 1, user)
    for statement in ("SELECT amazon_pii.peek('x', 'y')", "SELECT * FROM amazon_pii.orders", "SELECT * FROM amazon_pii.file_outbox",
                      "SELECT amazon_pii.preview('shop')", "SELECT * FROM amazon_pii.audit_log"):
        with refused("42501"):
            shop.sql(statement, user="cleaner")
    session = shop.connect("cleaner", autocommit=False)
    session.cursor().execute("SELECT * FROM amazon_pii.files_due()")
    session.rollback()
    session.close()
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'files_due' AND \"user\" = 'cleaner'") == 1


def test_the_same_file_is_due_again_only_when_it_came_back(cleaned):
    """Breaks when a file is to be deleted twice for nothing, or one that was made anew is left."""
    shop = cleaned
    set_path(shop, 10, "/bills/10.pdf")
    shop.apply_policy(policy({**INVOICES, "redact": {"bill_to": "placeholder"}, "files": "path"}))
    run_cycle(shop)
    (first,) = due(shop)
    # Retrieved and redacted again, while it waits and after it is gone.
    for _ in range(2):
        rows = {r[1]: r[2:] for r in retrieve(shop, number(1))}
        assert rows["shop.invoices"] == (1, 1, 0)
        end_retrieval(shop, number(1))
        run_cycle(shop)
        assert order_value(shop, 1) == "redacted"
        ack(shop, first[0])
        assert due(shop) == []
    sweep(shop)
    assert due(shop) == []
    # A second import wrote the row anew, and with it the file.
    shop.sql("UPDATE shop.invoices SET bill_to = 'Jane Doe' WHERE id = 10", user="shop_owner")
    run_cycle(shop)
    (again,) = due(shop)
    assert again[1:] == first[1:] and again[0] > first[0]
    # Another path of the same row is another file.
    shop.sql("UPDATE shop.invoices SET bill_to = 'Jane Doe', path = '/bills/10b.pdf' WHERE id = 10", user="shop_owner")
    run_cycle(shop)
    assert [f[4] for f in due(shop)] == ["/bills/10.pdf", "/bills/10b.pdf"]


def test_a_file_of_a_row_without_other_data_is_due_too(cleaned):
    """Breaks when a row whose other columns are empty keeps its file."""
    shop = cleaned
    set_path(shop, 10, "/bills/10.pdf")
    shop.sql("UPDATE shop.invoices SET bill_to = NULL WHERE id = 10", user="shop_owner")
    shop.apply_policy(policy({**INVOICES, "files": "'s3:' || path"}))
    run_cycle(shop)
    assert [f[4] for f in due(shop)] == ["s3:/bills/10.pdf"]
    sweep(shop)
    assert len(due(shop)) == 1


def test_a_file_goes_with_a_row_that_is_deleted(cleaned):
    """Breaks when the path goes with the row before anybody noted it, archived or not."""
    shop = cleaned
    add_pdf(shop, 1, 10)
    add_pdf(shop, 2, 20)
    shop.apply_policy(policy(INVOICES, {**ROWS, "archive": False, "files": "'/store/' || id"}))
    run_cycle(shop)
    assert shop.sql("SELECT id FROM shop.invoice_pdfs") == [] and [f[4] for f in due(shop)] == ["/store/1", "/store/2"]
    # What is unflagged is to stay: nobody deletes its files any more.
    shop.sql("SELECT * FROM amazon_pii.unflag(%s, 'wrong policy')", [number(1)], "pii_admin")
    assert [f[4] for f in due(shop)] == ["/store/2"]
    # What a dropped policy left is still to be deleted.
    shop.sql("SELECT amazon_pii.drop_policy('shop')", user="pii_admin")
    assert [f[4] for f in due(shop)] == ["/store/2"]


def test_nothing_is_due_of_an_order_that_could_not_be_redacted(cleaned):
    """Breaks when a file is deleted although its order's redaction was rolled back."""
    shop = cleaned
    set_path(shop, 10, "/bills/10.pdf")
    set_path(shop, 20, "/bills/20.pdf")
    shop.apply_policy(policy({**INVOICES, "files": "path"}))
    shop.psql("""SET ROLE shop_owner; CREATE FUNCTION shop.no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
        CREATE TRIGGER no BEFORE UPDATE ON shop.addresses FOR EACH ROW WHEN (OLD.order_id = 1) EXECUTE FUNCTION shop.no();""")
    assert run_cycle(shop)["failed"] == 1
    assert [f[4] for f in due(shop)] == ["/bills/20.pdf"] and order_row(shop, 1) == ("failed",)
    shop.psql("SET ROLE shop_owner; DROP TRIGGER no ON shop.addresses")
    hurry(shop)
    run_cycle(shop)
    assert [f[4] for f in due(shop)] == ["/bills/20.pdf", "/bills/10.pdf"]


def test_keys_that_change_take_their_files_along(cleaned):
    """Breaks when a waiting file is shown under a key that no order has any more, or cannot be opened."""
    shop = cleaned
    set_path(shop, 10, "/bills/10.pdf")
    shop.apply_policy(policy({**INVOICES, "files": "path"}))
    run_cycle(shop)
    shop.psql("SET ROLE shop_owner; ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey; ALTER TABLE shop.invoices DROP CONSTRAINT invoices_order_id_fkey;"
              "UPDATE shop.orders SET id = 7 WHERE id = 1; UPDATE shop.invoices SET order_id = 7 WHERE id = 10; UPDATE shop.addresses SET order_id = 7 WHERE order_id = 1;"
              "ALTER TABLE shop.invoice_lines DROP CONSTRAINT invoice_lines_invoice_id_fkey; UPDATE shop.invoices SET id = 70 WHERE id = 10")
    assert [f[1:] for f in due(shop)] == [('["7"]', "shop.invoices", '["70"]', "/bills/10.pdf")]


def test_a_dump_carries_what_is_still_to_be_done(cleaned):
    """Breaks when a restored database has forgotten files that wait, or rows by age, or gives their numbers to others."""
    shop = cleaned
    set_path(shop, 10, "/bills/10.pdf")
    shop.sql("CREATE TABLE shop.raw (id int PRIMARY KEY, at timestamptz); CREATE INDEX ON shop.raw (at); CREATE TABLE shop.refers (raw int REFERENCES shop.raw);"
             "INSERT INTO shop.raw SELECT i, now() - '40 days'::interval FROM generate_series(1, 3) AS i", user="shop_owner")
    aged = {"table": "shop.raw", "at": "at", "after": "30 days", "on_redact": "delete", "archive": False}
    shop.apply_policy(policy({**INVOICES, "redact": {"bill_to": "placeholder", "path": "null"}, "files": "path"}, by_age=[aged]))
    shop.sql("INSERT INTO shop.refers VALUES (2)", user="shop_owner")
    run_cycle(shop)
    files, failed = due(shop), shop.sql("SELECT * FROM amazon_pii.aged_row")
    assert len(files) == 1 and len(failed) == 1
    dump = shop.cluster.client("pg_dump", "-d", shop.name).stdout
    assert "bills/10" not in dump
    copy_of = new_database(shop.cluster, "template0")
    try:
        copy_of.psql(dump)
        assert due(copy_of) == files and copy_of.sql("SELECT * FROM amazon_pii.aged_row") == failed
        shown = "SELECT entry, table_name, overdue, failed FROM amazon_pii.by_age"
        assert copy_of.sql(shown) == shop.sql(shown) == [("by_age[0]", "shop.raw", 1, 1)]
        set_path(copy_of, 20, "/bills/20.pdf")
        copy_of.sql("UPDATE shop.invoices SET bill_to = 'Jane Doe' WHERE id = 20; DELETE FROM shop.refers", user="shop_owner")
        copy_of.sql("UPDATE amazon_pii.aged_row SET next_attempt_at = now(); UPDATE amazon_pii.aged_table SET next_look_at = now()")
        run_cycle(copy_of)
        assert [f[4] for f in due(copy_of)] == ["/bills/10.pdf", "/bills/20.pdf"] and copy_of.sql("SELECT id FROM shop.raw") == []
    finally:
        copy_of.drop()
