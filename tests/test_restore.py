"""A database with orders in every state, and its archive, in the hands of pg_dump and pg_restore; and an extension that is dropped
and made again (P10)."""
import pytest
from cold import FOREIGN, cold_server, join
from conftest import add_extension, new_database, server_with
from every_state import EVERY_STATE, build, found, goes_on, shown, tables_with, whole_log
from support import (
    add_order, documents, number, order_value, record_states, refused, retrieve, run_cycle, shop_policy,
)

LOCAL = {"schema": "amazon_pii_archive"}


@pytest.fixture(scope="module")
def here():
    server = server_with()
    yield server
    server.destroy()


@pytest.fixture(scope="module")
def there(here):
    """The other server, with the same master key, as whoever restores has to bring it."""
    server = server_with()
    server.key_file.write_text(here.key_file.read_text())
    yield server
    server.destroy()


@pytest.fixture
def cold():
    server = cold_server()
    yield server
    server.destroy()


def shop_in(server):
    db = new_database(server, "template0")
    add_extension(server, db.name)
    return db


def carried(db, there):
    """The database, dumped and restored on the other server."""
    dump = db.cluster.base / "dump"
    db.cluster.client("pg_dump", "-Fc", "-f", dump, "-d", db.name)
    restored = new_database(there, "template0")
    there.client("pg_restore", "--exit-on-error", "-d", restored.name, dump)
    dump.unlink()
    return restored


@pytest.mark.parametrize("archive", ["local", "foreign"])
def test_every_order_goes_on_after_a_restore(here, there, archive, request):
    """Breaks when a dump leaves something out that an order, its archive or the audit log needs, or a restored database sends to the cold
    server of the original before it was adopted."""
    db = shop_in(here)
    cold = None
    if archive == "foreign":
        db.need_contrib("postgres_fdw")
        cold = request.getfixturevalue("cold")
        join(db, cold)
    orders = build(db, archive=FOREIGN if cold else LOCAL)
    restored = carried(db, there)
    try:
        assert shown(restored) == shown(db)
        assert [r for r in restored.sql("SELECT * FROM amazon_pii.backup_check()", user="pii_auditor") if r[0] == "error"] == []
        if cold:
            before = cold.documents("order_key, table_name, record_key, version, sealed")
            with refused("55000", "this one is a copy"):
                run_cycle(restored, "shop")
            assert cold.documents("order_key, table_name, record_key, version, sealed") == before
        assert restored.value("SELECT amazon_pii.adopt_copy()", user="pii_admin") == 1
        goes_on(restored, orders)
        if cold:
            assert len(set(cold.places())) == 1, "a document is there twice"
            assert cold.count("order_key = '[\"20\"]'") == 2 and cold.count("order_key = '[\"11\"]'") == 0
    finally:
        restored.drop()
        db.drop()


def test_what_a_backup_revives_is_redacted_again(here, there):
    """P7. Breaks when personal data that was redacted after the dump stays in the database that is restored from it."""
    db = shop_in(here)
    build(db)
    add_order(db, 20)
    restored = carried(db, there)
    try:
        run_cycle(db)
        assert tables_with(db, "Name20") == [] and tables_with(restored, "Name20") == ["addresses"]
        # The shop's tables from a dump alone, into a database that went on: what nobody flagged is found by the sweep.
        rows = db.cluster.client("pg_dump", "-d", restored.name, "--data-only", "-t", "shop.addresses", env={"PGHOST": str(there.base)}).stdout
        db.sql("SET session_replication_role = replica; TRUNCATE shop.addresses")
        db.psql("SET session_replication_role = replica;\n" + rows)
        db.sql("RESET session_replication_role")
        assert tables_with(db, "Name20") == ["addresses"]
        db.sql("CALL amazon_pii.run_cycle('shop', sweep => true)", user="pii_admin")
        assert tables_with(db, "Name20") == [] and tables_with(db, "Name2") == ["addresses"]
        restored.sql("SELECT amazon_pii.adopt_copy()", user="pii_admin")
        run_cycle(restored)
        assert tables_with(restored, "Name20") == []
    finally:
        restored.drop()
        db.drop()


def test_an_extension_that_is_made_again_finds_its_archive(here):
    """P10. Breaks when DROP EXTENSION takes documents or keys along, or a new extension does not find them, archives its own placeholders,
    or brings back what was destroyed."""
    db = shop_in(here)
    try:
        build(db)
        archived = documents(db)
        keys = db.sql("SELECT * FROM amazon_pii_archive.data_key ORDER BY order_key, policy, key_id")
        db.sql("DROP EXTENSION amazon_pii CASCADE")
        assert documents(db) == archived != {}
        assert db.sql("SELECT * FROM amazon_pii_archive.data_key ORDER BY order_key, policy, key_id") == keys
        # Nothing of ours is left on the shop's tables, which take writes.
        assert db.sql("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'amazon_pii%'") == []
        add_order(db, 20)
        # A trigger of the shop's that refuses is in the way of a policy that is new.
        db.sql("DROP TRIGGER refuse ON shop.addresses", user="shop_owner")
        add_extension(db.cluster, db.name)
        db.apply_policy(shop_policy())
        run_cycle(db)
        # Holds, retrievals and deleted orders were the extension's own memory; clocks and archive are where they were.
        anew = {**EVERY_STATE, 2: "redacted", 6: "redacted", 7: "redacted", 20: "redacted", 11: "redacted", 12: "redacted", 13: "scheduled"}
        del anew[8]
        assert found(db) == anew
        assert tables_with(db, "Name2") == tables_with(db, "Name6") == tables_with(db, "Name20") == []
        assert archived.items() <= documents(db).items()
        assert {key[0] for key in documents(db).keys() - archived.keys()} == {'["20"]'}
        assert record_states(db, "shop.customers", 9)[9] == "waiting"
        for order, words in ((1, ("Gift1", "Name1", "First1", "BillTo1", "LineNote1")), (2, ("Name2",)), (14, ("Comeback14",))):
            retrieve(db, number(order))
            assert [w for w in words if not tables_with(db, w)] == [] and order_value(db, order) == "retrieved"
        # Nobody remembers that there was something; there is nothing to give back.
        for order in (11, 12):
            assert retrieve(db, number(order)) == [] and tables_with(db, f"Name{order}") == []
        good, rows = whole_log(db)
        assert good, rows
    finally:
        db.drop()
