"""A restore turns the database back, and the tombstone file not: what was destroyed since the backup is not opened, and is destroyed again."""
import json
import shutil

import psycopg2
import pytest
from cluster import wait_until
from cold import DATABASE, FOREIGN, cold_server, join
from conftest import add_extension, copy_of, new_database, server_with
from support import fill, hurry, open_shop, order_number, order_row, order_value, refused, run_cycle, shop_policy, states

ADMIN, OPERATOR = "pii_admin", "pii_operator"
RECONCILE = "SELECT (order_key::jsonb->>0)::int, destroyed, came_back FROM amazon_pii.reconcile() ORDER BY 1"
LEFT = """SELECT (SELECT count(*) FROM amazon_pii_archive.data_key AS k WHERE k.order_key = o) + (SELECT count(*) FROM amazon_pii_archive.document AS d
          WHERE d.order_key = o) FROM (SELECT %s::text) AS s (o)"""
PROBLEM = "SELECT last_error FROM amazon_pii.status"


def keeper(**options):
    return server_with(lambda s: s.configure(f"amazon_pii.tombstone_file = '{s.base}/tombstones'"), **options)


@pytest.fixture(scope="module")
def server():
    cluster = keeper()
    yield cluster
    cluster.destroy()


@pytest.fixture
def db(server):
    """A database of its own, and a file: what other tests wrote to it is nothing to this one."""
    database = new_database(server, "template0")
    add_extension(server, database.name)
    open_shop(database)
    yield database
    database.drop()


def tombstones(cluster):
    """Lines of the file: (what, orders), those of other databases too."""
    file = cluster.base / "tombstones"
    lines = [json.loads(line)["tombstone"] for line in file.read_text().splitlines()] if file.exists() else []
    return [(t["what"], [int(json.loads(key)[0]) for key, _ in t.get("orders", [])]) for t in lines]


def close(db):
    for user in list(db._sessions):
        db._sessions.pop(user).close()


def back_up(db, name="dump"):
    file = db.cluster.base / f"{db.name}.{name}"
    db.cluster.client("pg_dump", "-Fc", "-f", file, "-d", db.name)
    return file


def restore(db, file):
    """A new database in place of the one that was lost, from the dump."""
    close(db)
    db.cluster.drop_database(db.name)
    db.cluster.create_database(db.name, "template0")
    db.cluster.client("pg_restore", "--exit-on-error", "-d", db.name, file)
    db.cluster.sql(f"GRANT CREATE ON DATABASE {db.name} TO shop_owner, other_owner")


def end(db, what, *orders):
    for order in orders:
        db.sql(f"SELECT amazon_pii.{what}(%s, 'asked')", [order_number(order)], ADMIN)


def peek(db, order):
    return str(db.value("SELECT amazon_pii.peek(%s, 'test')", [order_number(order)], OPERATOR))


def left(db, order):
    return db.value(LEFT, [f'["{order}"]'])


def age(db, order):
    db.sql("UPDATE amazon_pii.order_state SET redacted_at = now() - interval '11 years' WHERE order_key = %s", [f'["{order}"]'])


def test_a_restored_dump_brings_no_archive_back_that_was_destroyed(db):
    # Breaks when anybody can open an archive after a restore that was destroyed before it.
    fill(db, 6)
    db.apply_policy(shop_policy())
    run_cycle(db)
    dump = back_up(db)
    end(db, "shred", 1)
    end(db, "forget", 2)
    age(db, 3)
    run_cycle(db)
    assert left(db, 1) == left(db, 2) == left(db, 3) == 0 and "'Gift 4'" in peek(db, 4)
    restore(db, dump)
    assert left(db, 1) > 0 and left(db, 2) > 0 and left(db, 3) > 0
    for order in (1, 4):
        with refused("55000", "3 orders were destroyed"):
            peek(db, order)
        with refused("55000", "reconcile()"):
            db.sql("SELECT amazon_pii.retrieve(%s, 'test')", [order_number(order)], OPERATOR)
        with refused("55000"):
            db.sql("SELECT amazon_pii.unflag(%s, 'test')", [order_number(order)], ADMIN)
    run_cycle(db)
    assert "reconcile" not in db.value(PROBLEM) and "3 orders were destroyed" in db.value(PROBLEM)
    assert db.sql(RECONCILE, user=ADMIN) == [(1, "shredded", "archive"), (2, "forgotten", "archive"), (3, "purged", "archive")]
    assert left(db, 1) == left(db, 2) == left(db, 3) == 0
    for order in (1, 2, 3):
        with refused("42704", "no longer exists"):
            peek(db, order)
        assert order_value(db, order) == "purged"
    assert "'Gift 4'" in peek(db, 4) and db.sql(RECONCILE, user=ADMIN) == []
    run_cycle(db)
    assert db.value(PROBLEM) is None
    told = db.sql("SELECT order_key, detail FROM amazon_pii.audit_log WHERE action = 'reconcile' AND order_key IS NOT NULL ORDER BY 1", user="pii_auditor")
    assert [key for key, _ in told] == ['["1"]', '["2"]', '["3"]'] and all("came back: archive" in detail for _, detail in told)
    assert [s for s, *_ in db.sql("SELECT severity FROM amazon_pii.backup_check()", user="pii_auditor")] == ["info", "info"]


def test_what_came_back_in_the_tables_is_redacted_without_a_copy(db):
    # Breaks when a cycle archives anew what was shredded or forgotten, before or after reconcile().
    fill(db, 6, age="1 day")
    db.apply_policy(shop_policy())
    assert run_cycle(db)["flagged"] == 6
    dump = back_up(db)
    end(db, "erase", 1, 2, 3, 4)
    run_cycle(db)
    end(db, "shred", 1, 4)
    end(db, "forget", 2)
    run_cycle(db)
    restore(db, dump)
    assert set(states(db).values()) == {"original"}
    db.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + interval '9 days')", [order_number(4)], OPERATOR)
    end(db, "erase", 1, 2, 3)
    counts = run_cycle(db)
    assert (counts["redacted"], counts["failed"]) == (1, 2)
    assert left(db, 1) == left(db, 2) == 0 and states(db) == {**dict.fromkeys(range(1, 7), "original"), 3: "redacted"}
    assert "was restored from" in order_row(db, 1, "last_error")[0]
    rows = db.sql(RECONCILE, user=ADMIN)
    assert rows == [(1, "shredded", "personal data"), (2, "forgotten", "personal data"), (4, "shredded", "personal data")]
    with refused("55000", "to be redacted at once"):
        db.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + interval '9 days')", [order_number(1)], OPERATOR)
    # What it was asked for before is not to bring a copy back.
    end(db, "erase", 1)
    assert run_cycle(db)["redacted"] == 3
    assert states(db) == {1: "redacted", 2: "redacted", 3: "redacted", 4: "redacted", 5: "original", 6: "original"}
    for order in (1, 2, 4):
        assert left(db, order) == 0 and order_value(db, order) == "purged"
        with refused("42704"):
            peek(db, order)
    assert "'Gift 3'" in peek(db, 3)
    # An import after that is what it was before: archived anew after shred, never after forget.
    db.sql("UPDATE shop.orders SET gift_message = 'Again' WHERE id IN (1, 2)", user="shop_owner")
    assert run_cycle(db)["redacted"] == 2
    assert "'Again'" in peek(db, 1) and left(db, 2) == 0
    assert db.value("SELECT key_id FROM amazon_pii_archive.data_key WHERE order_key = '[\"1\"]'") == "2"
    run_cycle(db)
    restore(db, dump)
    # What was archived after that is not destroyed with what was before: it is lost with the restore.
    assert [row[:2] for row in db.sql(RECONCILE, user=ADMIN)] == [(1, "shredded"), (2, "forgotten"), (4, "shredded")]


def test_a_retrieved_order_does_not_stay_so(db):
    fill(db, 2)
    db.apply_policy(shop_policy())
    run_cycle(db)
    db.sql("SELECT amazon_pii.retrieve(%s, 'return')", [order_number(1)], OPERATOR)
    dump = back_up(db)
    db.sql("SELECT amazon_pii.end_retrieval(%s)", [order_number(1)], OPERATOR)
    run_cycle(db)
    end(db, "shred", 1)
    restore(db, dump)
    assert states(db)[1] == "original"
    assert db.sql(RECONCILE, user=ADMIN) == [(1, "shredded", "archive and personal data")]
    run_cycle(db)
    assert states(db)[1] == "redacted" and left(db, 1) == 0 and order_value(db, 1) == "purged"


def test_orders_that_the_backup_does_not_know_are_known_when_they_are_imported_again(db):
    fill(db, 2)
    db.apply_policy(shop_policy())
    run_cycle(db)
    dump = back_up(db)
    fill(db, 4, first=3)
    run_cycle(db)
    end(db, "shred", 3)
    end(db, "forget", 4)
    restore(db, dump)
    with refused("55000"):
        peek(db, 1)
    assert db.sql(RECONCILE, user=ADMIN) == [(3, "shredded", "state"), (4, "forgotten", "state")]
    assert "'Gift 1'" in peek(db, 1)
    run_cycle(db)
    fill(db, 4, first=3)
    run_cycle(db)
    assert set(states(db).values()) == {"redacted"}
    assert left(db, 4) == 0 and db.value("SELECT key_id FROM amazon_pii_archive.data_key WHERE order_key = '[\"3\"]'") == "2"
    assert "'Gift 3'" in peek(db, 3)


def test_a_cluster_that_is_put_back_file_by_file():
    # Breaks when the file is taken for known because the database still is the same.
    cluster = keeper()
    try:
        db = new_database(cluster, "template0")
        add_extension(cluster, db.name)
        fill(open_shop(db), 4)
        db.apply_policy(shop_policy())
        run_cycle(db)
        end(db, "shred", 4)
        run_cycle(db)
        close(db)
        cluster.stop()
        backup = cluster.base / "backup"
        cluster._run(cluster.as_owner("cp", "-a", cluster.data, backup), True)
        cluster.start()
        end(db, "shred", 1)
        end(db, "forget", 2)
        run_cycle(db)
        close(db)
        cluster.stop("immediate")
        shutil.rmtree(cluster.data)
        backup.rename(cluster.data)
        cluster.start()
        with refused("55000", "2 orders"):
            peek(db, 3)
        assert db.sql(RECONCILE, user=ADMIN) == [(1, "shredded", "archive"), (2, "forgotten", "archive")]
        assert left(db, 1) == left(db, 2) == 0 and "'Gift 3'" in peek(db, 3)
    finally:
        cluster.destroy()


def test_what_is_rolled_back_is_destroyed_by_nobody(db):
    # Breaks when a shred that never was leaves a tombstone, which a later restore would make true.
    fill(db, 6)
    db.apply_policy(shop_policy())
    run_cycle(db)
    before = tombstones(db.cluster)
    dump = back_up(db)
    shred = "SELECT amazon_pii.shred(%s, 'asked')"
    with db.connect(ADMIN, autocommit=False) as session, session.cursor() as cursor:
        cursor.execute(shred, [order_number(1)])
        session.rollback()
        cursor.execute(shred, [order_number(2)])
        cursor.execute("SAVEPOINT s")
        cursor.execute(shred, [order_number(3)])
        cursor.execute("ROLLBACK TO s")
        assert tombstones(db.cluster) == before
        session.commit()
    assert tombstones(db.cluster) == [*before, ("shredded", [2])]
    # Two that cannot both have come first: the second one fails when its line is written.
    db.sql("CREATE TABLE shop.tally (n bigint)", user="shop_owner")
    one, other = (db.connect(ADMIN, autocommit=False) for _ in range(2))
    for session in (one, other):
        session.set_session(isolation_level="SERIALIZABLE")
        session.cursor().execute("SELECT count(*) FROM shop.tally")
    one.cursor().execute(shred, [order_number(4)])
    for session in (one, other):
        session.cursor().execute("INSERT INTO shop.tally VALUES (1)")
    other.commit()
    with pytest.raises(psycopg2.errors.SerializationFailure):
        one.commit()
    assert tombstones(db.cluster)[-2:] == [("shredded", [4]), ("void", [])]
    one.close(), other.close()
    assert "'Gift 4'" in peek(db, 4)
    restore(db, dump)
    assert db.sql(RECONCILE, user=ADMIN) == [(2, "shredded", "archive")]
    assert all(f"'Gift {order}'" in peek(db, order) for order in (1, 3, 4))


def test_a_purge_that_fails_takes_its_line_back(db):
    fill(db, 3)
    db.apply_policy(shop_policy())
    run_cycle(db)
    age(db, 1)
    db.sql("""CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
              CREATE TRIGGER fail BEFORE INSERT ON amazon_pii.audit_entry FOR EACH ROW WHEN (NEW.action = 'purge') EXECUTE FUNCTION public.fail()""")
    run_cycle(db)
    assert tombstones(db.cluster)[-2:] == [("purged", [1]), ("void", [])]
    assert left(db, 1) > 0 and "'Gift 1'" in peek(db, 1)
    db.sql("DROP TRIGGER fail ON amazon_pii.audit_entry")
    run_cycle(db)
    assert tombstones(db.cluster)[-1] == ("purged", [1]) and left(db, 1) == 0


def test_who_opens_an_archive_waits_for_no_shred(db):
    fill(db, 3)
    db.apply_policy(shop_policy())
    run_cycle(db)
    with db.connect(ADMIN, autocommit=False) as session, session.cursor() as cursor:
        cursor.execute("SELECT amazon_pii.shred(%s, 'asked')", [order_number(1)])
        assert "'Gift 2'" in peek(db, 2)
        session.commit()
        assert "'Gift 2'" in peek(db, 2)
        cursor.execute("SELECT amazon_pii.shred(%s, 'asked')", [order_number(3)])
        with refused("0A000", "cannot be prepared"):
            cursor.execute("PREPARE TRANSACTION 'one'")
    assert left(db, 3) > 0


def test_nothing_is_destroyed_where_no_line_can_be_written(db):
    # Breaks when a data key goes without its tombstone, or when one order that cannot go keeps others.
    fill(db, 5)
    db.apply_policy(shop_policy())
    run_cycle(db)
    end(db, "shred", 5)
    fill(db, 8, first=6)
    end(db, "forget", 6)
    file = db.cluster.base / "tombstones"
    file.chmod(0o644)
    try:
        with refused("F0000", "by others than its owner"):
            end(db, "shred", 1)
        with refused("F0000"):
            end(db, "forget", 2)
        age(db, 3)
        counts = run_cycle(db)
        assert (counts["redacted"], counts["failed"]) == (2, 1)
        assert states(db)[6] == "original" and "tombstone_file" in order_row(db, 6, "last_error")[0]
        assert "tombstone_file" in db.value(PROBLEM)
        assert left(db, 1) > 0 and left(db, 2) > 0 and left(db, 3) > 0
        assert ("error", "amazon_pii.tombstone_file") in db.sql("SELECT severity, object FROM amazon_pii.backup_check()", user=ADMIN)
    finally:
        file.chmod(0o600)
    hurry(db)
    run_cycle(db)
    assert states(db)[6] == "redacted" and left(db, 6) == left(db, 3) == 0 and "'Gift 1'" in peek(db, 1)


@pytest.mark.parametrize("path, words", [("tombstones", "no absolute path"), ("{data}/tombstones", "in the data directory"),
                                         ("{base}/nowhere/tombstones", "cannot be made"), ("{base}", "cannot be opened")])
def test_a_file_that_would_not_outlive_the_database_is_refused(db, path, words):
    fill(db, 1)
    db.apply_policy(shop_policy())
    run_cycle(db)
    cluster = db.cluster
    cluster.configure("amazon_pii.tombstone_file = '{}'".format(path.format(data=cluster.data, base=cluster.base)))
    cluster.reload()
    try:
        wait_until(lambda: db.value("SHOW amazon_pii.tombstone_file").endswith(path.format(data=cluster.data, base=cluster.base)))
        with db.connect(ADMIN) as session, session.cursor() as cursor, refused("F0000", words):
            cursor.execute("SELECT amazon_pii.shred(%s, 'asked')", [order_number(1)])
        assert left(db, 1) > 0
    finally:
        cluster.configure(f"amazon_pii.tombstone_file = '{cluster.base}/tombstones'")
        cluster.reload()
        wait_until(lambda: db.value("SHOW amazon_pii.tombstone_file") == f"{cluster.base}/tombstones")


def test_a_file_that_was_changed_or_lost_is_said(db):
    # Breaks when somebody can hide a destruction by changing the file.
    fill(db, 6)
    db.apply_policy(shop_policy())
    run_cycle(db)
    dump = back_up(db)
    end(db, "shred", 1)
    end(db, "shred", 2)
    file = db.cluster.base / "tombstones"
    sound = file.read_bytes()

    def fails(words):
        with refused("55000", words):
            peek(db, 5)
        with refused("55000", "for all policies"):
            db.sql("SELECT * FROM amazon_pii.reconcile('shop')", user=ADMIN)

    restore(db, dump)
    *first, one, two = sound.splitlines(keepends=True)
    for changed in ([*first, two], [*first, one.replace(b'[\\"1\\"]', b'[\\"7\\"]'), two], [*first, one, two.replace(b"shredded", b"purged")]):
        file.write_bytes(b"".join(changed))
        fails("lines were changed or removed")
    # What still holds counts, what does not is nobody's word.
    file.write_bytes(b"".join([*first, one.replace(b'[\\"1\\"]', b'[\\"7\\"]'), two]))
    assert db.sql(RECONCILE, user=ADMIN) == [(2, "shredded", "archive")]
    assert left(db, 2) == 0 and "'Gift 1'" in peek(db, 1)
    assert db.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'reconcile' AND detail LIKE '%%changed or removed%%'", user="pii_auditor") == 1
    # One that is cut off, or gone.
    end(db, "shred", 3)
    run_cycle(db)
    whole = file.read_bytes()
    for text in (whole[:-1], whole[:len(whole) // 2], b"", None):
        file.unlink() if text is None else file.write_bytes(text)
        fails("replaced, shortened or lost")
    assert db.sql(RECONCILE, user=ADMIN) == [] and "'Gift 5'" in peek(db, 5)
    end(db, "shred", 4)
    run_cycle(db)
    assert tombstones(db.cluster) == [("shredded", [4])] and "'Gift 5'" in peek(db, 5)


def test_a_write_that_was_cut_off_does_no_harm(db):
    fill(db, 4)
    db.apply_policy(shop_policy())
    run_cycle(db)
    dump = back_up(db)
    end(db, "shred", 1)
    file = db.cluster.base / "tombstones"
    with file.open("ab") as text:
        text.write(b'{"tombstone":{"id":"0123')
    assert "'Gift 4'" in peek(db, 4)
    end(db, "shred", 2)
    run_cycle(db)
    assert "'Gift 4'" in peek(db, 4) and db.value(PROBLEM) is None
    restore(db, dump)
    assert db.sql(RECONCILE, user=ADMIN) == [(1, "shredded", "archive"), (2, "shredded", "archive")]
    file.unlink()
    db.sql(RECONCILE, user=ADMIN)


def test_lines_hold_when_the_master_key_changes(db):
    fill(db, 4)
    db.apply_policy(shop_policy())
    run_cycle(db)
    dump = back_up(db)
    end(db, "shred", 1)
    key = db.cluster.key_file
    former = key.read_text()
    db.cluster.write_key(key)
    current = key.read_text()
    try:
        key.write_text(current + former)
        db.sql("CALL amazon_pii.rotate_key()", user=ADMIN)
        end(db, "shred", 2)
        run_cycle(db)
        restore(db, dump)
        key.write_text(current)
        with refused("F0000", "signed a part of the tombstone file"):
            db.sql(RECONCILE, user=ADMIN)
        key.write_text(current + former)
        assert db.sql(RECONCILE, user=ADMIN) == [(1, "shredded", "archive"), (2, "shredded", "archive")]
        # What is noted needs no former key, and a new database has nothing to do with what came before it.
        db.sql("CALL amazon_pii.rotate_key()", user=ADMIN)
        key.write_text(current)
        assert "'Gift 4'" in peek(db, 4)
        new = new_database(db.cluster, "template0")
        add_extension(db.cluster, new.name)
        fill(open_shop(new), 1)
        new.apply_policy(shop_policy())
        run_cycle(new)
        assert "'Gift 1'" in peek(new, 1)
        new.drop()
    finally:
        key.write_text(former + current)


def test_a_copy_destroys_nothing_of_the_original(db):
    # Breaks when what is done to a staging database takes the archive of the real one.
    fill(db, 5)
    db.apply_policy(shop_policy())
    run_cycle(db)
    copy = copy_of(db)
    try:
        end(copy, "shred", 1)
        run_cycle(copy)
        copy.sql("CALL amazon_pii.sanitize_copy('shop')", user=ADMIN)
        assert "'Gift 1'" in peek(db, 1)
        run_cycle(db)
        assert db.sql(RECONCILE, user=ADMIN) == [] and db.value(PROBLEM) is None and "'Gift 1'" in peek(db, 1)
    finally:
        copy.drop()


def test_a_restored_database_takes_up_what_its_successors_did(db):
    # Breaks when what was destroyed in the database that took the place of the original comes back with a backup of the original.
    fill(db, 5)
    db.apply_policy(shop_policy())
    run_cycle(db)
    dump = back_up(db)
    end(db, "shred", 1)
    run_cycle(db)
    restore(db, dump)
    assert db.sql("SELECT amazon_pii.adopt_copy()", user=ADMIN) == [(1,)]
    # In this order, too.
    assert db.sql(RECONCILE, user=ADMIN) == [(1, "shredded", "archive")]
    end(db, "shred", 2)
    run_cycle(db)
    later = back_up(db, "later")
    end(db, "forget", 3)
    restore(db, dump)
    assert db.sql(RECONCILE, user=ADMIN) == [(1, "shredded", "archive"), (2, "shredded", "archive"), (3, "forgotten", "archive")]
    restore(db, later)
    assert db.sql(RECONCILE, user=ADMIN) == [(3, "forgotten", "archive")]


def test_a_cold_server_that_was_restored_too_is_told_again(db):
    # Breaks when documents stay on the cold server, or open, after both were restored.
    db.need_contrib("postgres_fdw")
    cold = cold_server()
    try:
        join(db, cold)
        fill(db, 4)
        db.apply_policy(shop_policy(archive=FOREIGN))
        run_cycle(db)
        dump, there = back_up(db), cold.client("pg_dump", "-d", DATABASE, "--data-only", "--table=cold.document").stdout
        end(db, "shred", 2)
        run_cycle(db)
        assert cold.count("order_key = '[\"2\"]'") == 0
        cold.sql("TRUNCATE cold.document", dbname=DATABASE)
        cold.psql(there, dbname=DATABASE)
        restore(db, dump)
        with refused("55000", "reconcile()"):
            peek(db, 1)
        assert db.sql(RECONCILE, user=ADMIN) == [(2, "shredded", "archive")]
        with refused("42704"):
            peek(db, 2)
        db.sql("SELECT amazon_pii.adopt_copy()", user=ADMIN)
        run_cycle(db, "shop")
        assert cold.count("order_key = '[\"2\"]'") == 0 and cold.count("order_key = '[\"1\"]'") > 0 and "'Gift 1'" in peek(db, 1)
    finally:
        cold.destroy()


def test_without_a_file_nothing_is_kept_and_nothing_asked(cluster):
    db = new_database(cluster)
    try:
        fill(open_shop(db), 2)
        db.apply_policy(shop_policy())
        run_cycle(db)
        end(db, "shred", 1)
        assert left(db, 1) == 0 and "'Gift 2'" in peek(db, 2)
        with refused("55000", "amazon_pii.tombstone_file is not set"):
            db.sql("SELECT * FROM amazon_pii.reconcile()", user=ADMIN)
        said = db.sql("SELECT severity, problem FROM amazon_pii.backup_check() WHERE object = 'amazon_pii.tombstone_file'", user=ADMIN)
        assert [s for s, _ in said] == ["info"] and "is not set" in said[0][1]
    finally:
        db.drop()


def test_the_file_names_no_buyer(db):
    fill(db, 3)
    db.apply_policy(shop_policy())
    run_cycle(db)
    end(db, "shred", 1, 2, 3)
    text = (db.cluster.base / "tombstones").read_text()
    assert not any(word in text for word in ("Gift", "Name", "Street", "Town", "First", "example.invalid", "+49", order_number(1)))
    assert (db.cluster.base / "tombstones").stat().st_mode & 0o777 == 0o600
