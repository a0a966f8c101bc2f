"""A copy of a database is not the original: nothing happens there by itself, and nothing that is the original's is touched."""
import pytest
from cluster import wait_until
from cold import DATABASE, FOREIGN, cold_server, shop_beside, status
from conftest import Database, add_extension, copy_of, new_database, server_with
from support import backup_of, fill, open_shop, order_number, refused, run_cycle, shop_policy, standby_of, states

HOME = "SELECT home FROM amazon_pii.policy"


@pytest.fixture(scope="module")
def cold():
    server = cold_server()
    yield server
    server.destroy()


def test_the_worker_leaves_a_copy_alone_until_it_is_adopted(preloaded):
    # Breaks when a staging database redacts by itself, or an adopted one does not.
    db = new_database(preloaded, "template0")
    add_extension(preloaded, db.name)
    open_shop(db).apply_policy(shop_policy(enabled=False))
    fill(db, 4)
    copy = copy_of(db)
    try:
        copy.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
        said = "SELECT last_error FROM amazon_pii.status"
        wait_until(lambda: "this one is a copy" in (copy.value(said, user="pii_auditor") or ""))
        assert set(states(copy).values()) == {"original"}
        assert copy.value("SELECT overdue FROM amazon_pii.status", user="pii_auditor") == 4
        assert copy.value("SELECT amazon_pii.adopt_copy()", user="pii_admin") == 1
        wait_until(lambda: set(states(copy).values()) == {"redacted"})
        assert copy.value(said, user="pii_auditor") is None
        assert copy.value("SELECT amazon_pii.adopt_copy('shop')", user="pii_admin") == 0
        assert copy.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'adopt_copy'", user="pii_auditor") == 1
        with refused("42704", "does not exist"):
            copy.sql("SELECT amazon_pii.adopt_copy('nothing')", user="pii_admin")
        # The original is where it was.
        assert set(states(db).values()) == {"original"} and db.value(HOME) != copy.value(HOME)
    finally:
        copy.drop()
        db.drop()


RECOVERED = ("restore_command = 'false'", "recovery_target = 'immediate'", "recovery_target_action = 'promote'")


@pytest.mark.parametrize("recover", [False, True], ids=["as it is", "to a point in time"])
def test_a_cluster_that_was_made_from_a_backup_is_a_copy(recover):
    """It has its original's identifier, as a standby has. Breaks when its worker redacts before it is adopted, when the original or what is
    promoted in the place of either has to be adopted, or when a copy cannot be sanitized."""
    primary = server_with(preload=True, conf=["amazon_pii.naptime = '1s'"])
    said = "SELECT last_error FROM amazon_pii.status"
    try:
        db = new_database(primary, "template0")
        add_extension(primary, db.name)
        open_shop(db).apply_policy(shop_policy(enabled=False))
        fill(db, 4)
        with backup_of(primary, *(RECOVERED if recover else ()), recover=recover, preload=True) as other:
            wait_until(lambda: other.sql("SELECT pg_is_in_recovery()") == [(False,)])
            copy = Database(other, db.name)
            for database in (copy, db):
                database.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
            wait_until(lambda: "this one is a copy" in (copy.value(said, user="pii_auditor") or ""))
            wait_until(lambda: set(states(db).values()) == {"redacted"})
            assert set(states(copy).values()) == {"original"} and db.value(said, user="pii_auditor") is None
            assert copy.value("SELECT amazon_pii.adopt_copy()", user="pii_admin") == 1
            wait_until(lambda: set(states(copy).values()) == {"redacted"})
            assert copy.value(HOME).startswith(f"{db.value(HOME)}/")
            # What is promoted in its place goes on, and so does what was a copy once.
            with standby_of(other, "recovery_target = ''", preload=True) as standby:
                fill(copy, 6, first=5)
                wait_until(lambda: set(states(copy).values()) == {"redacted"})
                there = Database(standby, db.name)
                wait_until(lambda: states(there) == states(copy))
                other.stop("immediate")
                standby.run("pg_ctl", "-D", standby.data, "-w", "-s", "promote")
                fill(there, 8, first=7)
                wait_until(lambda: set(states(there).values()) == {"redacted"} and len(states(there)) == 8)
                assert there.value("SELECT amazon_pii.adopt_copy()", user="pii_admin") == 0
                assert there.value(HOME).startswith(f"{db.value(HOME)}/")
    finally:
        primary.destroy()


def test_a_backup_that_was_started_can_be_sanitized(cluster):
    db = new_database(cluster)
    open_shop(db).apply_policy(shop_policy())
    fill(db, 3, age="1 day")
    try:
        with refused("55000", "is no copy"):
            db.sql("CALL amazon_pii.sanitize_copy('shop')", user="pii_admin")
        with backup_of(cluster) as other:
            copy = Database(other, db.name)
            copy.sql("CALL amazon_pii.sanitize_copy('shop')", user="pii_admin")
            assert set(states(copy).values()) == {"redacted"} and set(states(db).values()) == {"original"}
    finally:
        db.drop()


def test_applying_a_policy_in_a_copy_adopts_nothing(cluster):
    db = new_database(cluster)
    open_shop(db)
    db.apply_policy(shop_policy())
    copy = copy_of(db)
    try:
        copy.apply_policy(shop_policy(placeholder="[gone]"))
        assert copy.value(HOME) == db.value(HOME)
        # A cycle that somebody asks for does what it is told: the archive is a copy, too.
        fill(copy, 2)
        assert run_cycle(copy)["redacted"] == 2
        # A policy from before there were homes takes the first it finds.
        copy.sql("UPDATE amazon_pii.policy SET home = NULL")
        fill(copy, 3, first=3)
        run_cycle(copy)
        assert copy.value(HOME) not in (None, db.value(HOME))
    finally:
        copy.drop()
        db.drop()


def test_a_copy_writes_nothing_to_the_cold_server(cluster, cold):
    # Breaks when a staging database deletes what the original still needs, or sends its own.
    db = shop_beside(cluster, cold)
    fill(db, 3)
    db.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(db)
    before = cold.documents("order_key, table_name, record_key, sealed")
    copy = copy_of(db)
    try:
        copy.sql("SELECT amazon_pii.shred(%s, 'try it')", [order_number(2)], "pii_admin")
        fill(copy, 5, first=4)
        for _ in range(2):
            with refused("55000", "this one is a copy"):
                run_cycle(copy, "shop")
        assert cold.documents("order_key, table_name, record_key, sealed") == before
        assert status(copy)["to_delete"] == 1 and states(copy)[4] == "original"
        assert "'Gift 2'" in str(db.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))
        copy.sql("SELECT amazon_pii.adopt_copy()", user="pii_admin")
        assert run_cycle(copy, "shop")["redacted"] == 2
        assert cold.count("""order_key = '["2"]'""") == 0
    finally:
        copy.drop()
        db.drop()
        cold.sql("DROP SCHEMA cold CASCADE", dbname=DATABASE)


def test_a_restored_dump_is_a_copy(cold):
    # Breaks when another cluster with the same database number takes the policy for its own.
    here, there = server_with(), server_with()
    try:
        db = new_database(here, "template0")
        add_extension(here, db.name)
        fill(open_shop(db), 3)
        db.apply_policy(shop_policy())
        run_cycle(db)
        dump = here.client("pg_dump", "-d", db.name).stdout
        restored = new_database(there, "template0")
        restored.psql(dump)
        assert restored.value(HOME) == db.value(HOME)
        (there.base / "key").write_text((here.base / "key").read_text())
        assert restored.value("SELECT amazon_pii.adopt_copy()", user="pii_admin") == 1
        assert "'Gift 2'" in str(restored.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(2)], "pii_operator"))
    finally:
        here.destroy()
        there.destroy()


def test_a_sanitized_copy_holds_no_buyer(cluster, cold):
    # Breaks when an order of any state keeps its personal data, or the original or its cold server are touched.
    db = shop_beside(cluster, cold)
    db.apply_policy(shop_policy(archive=FOREIGN))
    fill(db, 4)
    run_cycle(db)
    fill(db, 8, first=5, age="1 day")
    fill(db, 9, first=9, channel="shop")
    db.sql("SELECT amazon_pii.retrieve(%s, 'return')", [order_number(2)], "pii_operator")
    db.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + interval '9 days')", [order_number(5)], "pii_operator")
    db.sql("UPDATE shop.orders SET shipped_at = NULL WHERE id = 6", user="shop_owner")
    there = cold.documents("order_key, table_name, record_key, sealed")
    with refused("55000", "is no copy"):
        db.sql("CALL amazon_pii.sanitize_copy('shop')", user="pii_admin")
    before = states(db)
    copy = copy_of(db)
    try:
        copy.sql("ALTER TABLE shop.orders DISABLE TRIGGER ALL")
        fill(copy, 12, first=10, age="3 days")
        copy.sql("ALTER TABLE shop.orders ENABLE TRIGGER ALL")
        counts = copy.sql("CALL amazon_pii.sanitize_copy('shop')", user="pii_admin")[0]
        assert (counts[0], counts[1], counts[3]) == (3, 0, 0)
        assert states(copy) == {**dict.fromkeys(range(1, 13), "redacted"), 9: "original"}
        assert copy.value("SELECT count(*) FROM shop.customers WHERE email <> '[Redacted]'") == 1
        assert copy.value("SELECT (SELECT count(*) FROM amazon_pii_archive.document) + (SELECT count(*) FROM amazon_pii_archive.data_key)") == 0
        with refused("42704"):
            copy.sql("SELECT amazon_pii.peek(%s, 'test')", [order_number(1)], "pii_operator")
        # What is imported later goes the same way when it is called again.
        copy.sql("UPDATE shop.orders SET gift_message = 'Again' WHERE id = 1", user="shop_owner")
        fill(copy, 13, first=13, age="1 day")
        copy.sql("CALL amazon_pii.sanitize_copy('shop')", user="pii_admin")
        assert copy.value("SELECT gift_message FROM shop.orders WHERE id = 1") == "[Redacted]" and states(copy)[13] == "redacted"
        assert cold.documents("order_key, table_name, record_key, sealed") == there and states(db) == before
        with refused("25001"), copy.connect("pii_admin", autocommit=False) as session, session.cursor() as cursor:
            cursor.execute("CALL amazon_pii.sanitize_copy('shop')")
    finally:
        copy.drop()
        db.drop()
        cold.sql("DROP SCHEMA cold CASCADE", dbname=DATABASE)
