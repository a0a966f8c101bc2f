"""The master key: without the right one nothing is archived in clear and nothing is overwritten; nobody gets to see it."""
import secrets

import psycopg2
import pytest
from cluster import Cluster, wait_until
from conftest import new_database, prepare
from support import Background, documents, hurry, number, refused, retrieve, run_cycle

TABLES = """
CREATE SCHEMA shop AUTHORIZATION shop_owner;
SET ROLE shop_owner;
CREATE TABLE shop.orders (id int PRIMARY KEY, no text, shipped_at timestamptz, note text);
"""
POLICY = {"policy": "shop", "enabled": True, "archive_after": "10 days", "redact_after": "60 days", "loosened": "test",
          "orders": {"table": "shop.orders", "number": "no", "anchor": "shipped_at", "redact": ["note"]}}
DUE = {**POLICY, "redact_after": "30 days"}


@pytest.fixture(scope="module")
def server():
    """A server of its own, since its key comes and goes."""
    with Cluster() as server:
        prepare(server)
        yield server


class Keys:
    """The server's key settings, and an archived order of a fresh database."""

    def __init__(self, server):
        self.server = server
        self.set(server.key_file)

    def set(self, file="", command=""):
        self.server.configure(f"amazon_pii.key_file = '{file}'", f"amazon_pii.key_command = '{command}'")
        self.server.reload()
        wait_until(lambda: self.shown() == [str(file), command])

    def shown(self):
        return list(self.server.sql("SELECT current_setting('amazon_pii.key_file'), current_setting('amazon_pii.key_command')")[0])

    def file(self, text, mode=0o600, name="other"):
        path = self.server.write_key(self.server.base / f"{name}-{secrets.token_hex(4)}", mode)
        path.write_text(text)
        return path


@pytest.fixture
def keys(server):
    return Keys(server)


@pytest.fixture
def shop(keys):
    """Order 1 is archived and not redacted yet."""
    db = new_database(keys.server)
    db.psql(TABLES)
    db.sql("INSERT INTO shop.orders VALUES (1, %s, now() - '40 days'::interval, 'Ada')", [number(1)])
    db.apply_policy(POLICY)
    run_cycle(db)
    yield db
    keys.set(keys.server.key_file)
    db.drop()


def reconnect(db):
    """Sessions take a reloaded setting when they next read a command: new ones have it from the start."""
    for session in db._sessions.values():
        session.close()


def note(db):
    return db.value("SELECT note FROM shop.orders WHERE id = 1")


def state(db):
    return db.sql("SELECT status, last_error FROM amazon_pii.orders WHERE order_key = '[\"1\"]'")[0]


def use(db, keys, file="", command=""):
    keys.set(file, command)
    reconnect(db)


def test_without_a_key_no_policy_is_applied(keys):
    """Breaks when a policy is accepted that could only archive in clear."""
    db = new_database(keys.server)
    db.psql(TABLES)
    use(db, keys)
    with refused("F0000", "no master key is configured") as caught:
        db.apply_policy(POLICY)
    assert "openssl rand -hex 32" in caught.value.diag.message_hint and "amazon_pii.key_file" in caught.value.diag.message_hint
    problems = [row for row in db.check_policy(POLICY) if row[0] == "error"]
    assert len(problems) == 1 and "no master key" in problems[0][2] and "openssl" in problems[0][3]
    assert db.sql("SELECT * FROM amazon_pii.policies") == []
    assert db.value("SELECT to_regnamespace('amazon_pii_archive') IS NULL")
    keys.set(keys.server.key_file)
    db.drop()


def unusable(keys):
    """Ways in which a key cannot be had, each with words of its message."""
    good = secrets.token_hex(32) + "\n"
    return {
        "": "no master key is configured",
        keys.server.base / "missing": "cannot be opened",
        keys.server.base: "is no ordinary file",
        keys.file(good, 0o640): "can be read by others than its owner",
        keys.file(good, 0o604): "can be read by others than its owner",
        keys.file(""): "unusable",
        keys.file("# only a comment\n"): "unusable",
        keys.file(good[:-3]): "unusable",
        keys.file("not a key " + good): "unusable",
        keys.file("\0" + good): "unusable",
    }


def test_a_key_that_cannot_be_had_stops_the_policy_and_is_shown(shop, keys):
    """Breaks when a cycle goes on without its key, or tells nobody why it does not."""
    shop.apply_policy(DUE)
    before = documents(shop)
    shop.sql("INSERT INTO shop.orders VALUES (2, %s, now() - '40 days'::interval, 'Bob')", [number(2)])
    for file, words in unusable(keys).items():
        use(shop, keys, file)
        with refused("F0000", words) as caught:
            run_cycle(shop, "shop")
        assert "openssl rand -hex 32" in caught.value.diag.message_hint
        # One policy's key stops no other policy.
        assert run_cycle(shop)["redacted"] == 0
        assert words in shop.value("SELECT last_error FROM amazon_pii.status", user="pii_admin")
        assert shop.sql("SELECT note FROM shop.orders ORDER BY id") == [("Ada",), ("Bob",)]
        assert documents(shop) == before and state(shop) == ("archived", None)
    use(shop, keys, keys.server.key_file)
    assert run_cycle(shop, "shop")["redacted"] == 2
    assert shop.value("SELECT last_error FROM amazon_pii.status", user="pii_admin") is None


def test_a_wrong_key_overwrites_nothing(shop, keys):
    """Breaks when a copy that the configured key does not open passes for one that is there."""
    shop.apply_policy(DUE)
    before = documents(shop)
    right = keys.server.key_file
    use(shop, keys, keys.file(secrets.token_hex(32)))
    assert run_cycle(shop)["failed"] == 1
    hurry(shop)
    assert run_cycle(shop)["failed"] == 1
    status, error = state(shop)
    assert status == "failed" and error.startswith("F0000: master key ") and error.endswith(" is not among the configured keys")
    assert note(shop) == "Ada" and documents(shop) == before
    use(shop, keys, right)
    hurry(shop)
    assert run_cycle(shop)["redacted"] == 1 and note(shop) == "[Redacted]"
    # And with a wrong key nothing is given back.
    use(shop, keys, keys.file(secrets.token_hex(32)))
    with refused("F0000", "is not among the configured keys"):
        retrieve(shop, number(1))
    assert note(shop) == "[Redacted]"
    use(shop, keys, right)
    retrieve(shop, number(1))
    assert note(shop) == "Ada"


def test_another_key_under_the_right_name_opens_nothing(shop, keys):
    """Breaks when a wrapped key is not authenticated: its name alone would make it the right one."""
    use(shop, keys, keys.file(secrets.token_hex(32)))
    shop.sql("INSERT INTO shop.orders VALUES (2, %s, now() - '40 days'::interval, 'Bob')", [number(2)])
    run_cycle(shop)
    shop.sql("UPDATE amazon_pii_archive.data_key SET master_key_id = (SELECT master_key_id FROM amazon_pii_archive.data_key "
             "WHERE order_key = '[\"2\"]')")
    shop.apply_policy(DUE)
    run_cycle(shop)
    assert note(shop) == "Ada" and state(shop)[0] == "failed" and state(shop)[1].startswith("XX001")


def test_older_keys_still_open_and_the_first_one_seals(shop, keys):
    """Breaks when only the current key is tried, or an older one seals."""
    old = keys.server.key_file.read_text()
    use(shop, keys, keys.file(f"# current\n{secrets.token_hex(32)}\n\n# older\n{old}"))
    shop.apply_policy(DUE)
    shop.sql("INSERT INTO shop.orders VALUES (2, %s, now() - '40 days'::interval, 'Bob')", [number(2)])
    assert run_cycle(shop)["redacted"] == 2
    assert shop.value("SELECT count(DISTINCT master_key_id) FROM amazon_pii_archive.data_key") == 2
    for order in (1, 2):
        retrieve(shop, number(order))
    assert shop.sql("SELECT note FROM shop.orders ORDER BY id") == [("Ada",), ("Bob",)]


# Rotation


def rotate(db, user="pii_admin"):
    """(wrapped anew, still under other keys)"""
    return db.sql("CALL amazon_pii.rotate_key()", user=user)[0]


def key_status(db):
    """{key id: (current, configured, data keys, files, may retire)}"""
    rows = db.sql("SELECT master_key_id, current, configured, data_keys, files, may_retire FROM amazon_pii.key_status", user="pii_auditor")
    return {row[0]: row[1:] for row in rows}


def master_keys(db, schema="amazon_pii_archive"):
    return {row[0]: row[1] for row in db.sql(f"SELECT master_key_id, count(*) FROM {schema}.data_key GROUP BY 1")}


def add_orders(db, first, last):
    db.sql("INSERT INTO shop.orders SELECT n, '302-1234567-' || lpad(n::text, 7, '0'), now() - '40 days'::interval, 'Note' || n "
           "FROM generate_series(%s, %s) AS n", [first, last])


@pytest.fixture
def rotated(shop, keys):
    """Three archived orders, a new key on the first line, the old one below it: (shop, both keys, the new one alone)."""
    add_orders(shop, 2, 3)
    run_cycle(shop)
    new = secrets.token_hex(32)
    both, alone = keys.file(f"{new}\n{keys.server.key_file.read_text()}"), keys.file(new)
    use(shop, keys, both)
    return shop, both, alone


def test_a_rotation_wraps_every_data_key_and_touches_no_document(rotated, keys):
    """Breaks when a data key stays under the old key, cannot be unwrapped any more, or a document is written."""
    shop, _, alone = rotated
    (old,) = master_keys(shop)
    before = shop.sql("SELECT d::text, xmin::text FROM amazon_pii_archive.document AS d ORDER BY 1")
    assert key_status(shop)[old] == (False, True, 3, 0, False)
    assert rotate(shop) == (3, 0)
    (new,) = master_keys(shop)
    assert new != old
    status = key_status(shop)
    assert status == {new: (True, True, 3, 0, False), old: (False, True, 0, 0, True)}
    assert shop.sql("SELECT d::text, xmin::text FROM amazon_pii_archive.document AS d ORDER BY 1") == before
    assert shop.sql("SELECT DISTINCT key_id IS NOT NULL FROM amazon_pii.audit_entry WHERE action = 'rotate_key'") == [(True,)]
    assert rotate(shop) == (0, 0)
    use(shop, keys, alone)
    assert key_status(shop)[old] == (False, False, 0, 0, True)
    shop.apply_policy(DUE)
    assert run_cycle(shop)["redacted"] == 3
    retrieve(shop, number(1))
    assert note(shop) == "Ada"


def test_a_rotation_that_is_interrupted_goes_on(rotated, keys):
    """Breaks when what was done before an error is undone, or is done again."""
    shop, _, alone = rotated
    add_orders(shop, 4, 2600)
    use(shop, keys, keys.server.key_file)
    run_cycle(shop)
    both = keys.file(f"{alone.read_text()}\n{keys.server.key_file.read_text()}")
    use(shop, keys, both)
    shop.sql("CREATE FUNCTION public.stop() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF OLD.order_key = '[\"999\"]' THEN RAISE 'no'; "
             "END IF; RETURN NEW; END$$; CREATE TRIGGER stop BEFORE UPDATE ON amazon_pii_archive.data_key FOR EACH ROW EXECUTE FUNCTION public.stop()")
    with pytest.raises(psycopg2.Error):
        rotate(shop)
    counts = sorted(master_keys(shop).values())
    assert counts == [600, 2000], counts
    shop.sql("DROP TRIGGER stop ON amazon_pii_archive.data_key")
    assert rotate(shop) == (600, 0)
    assert list(master_keys(shop).values()) == [2600]


@pytest.mark.parametrize("where", ["the same file", "another file"])
def test_a_cycle_under_way_takes_the_new_key(shop, keys, where):
    """Breaks when a cycle that began before the rotation goes on to wrap by the old key, or cannot open what was wrapped anew."""
    add_orders(shop, 2, 60)
    shop.apply_policy(DUE)
    old, new = keys.server.key_file.read_text(), secrets.token_hex(32)
    file = keys.file(old)
    use(shop, keys, file)
    shop.psql("""CREATE TABLE shop.gate (shut boolean); INSERT INTO shop.gate VALUES (true);
        CREATE FUNCTION shop.wait() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$BEGIN
            WHILE EXISTS (SELECT FROM shop.gate) LOOP PERFORM pg_sleep(0.01); END LOOP; RETURN NEW; END$$;
        CREATE TRIGGER wait BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.wait();""")
    cycle = Background(shop, "CALL amazon_pii.run_cycle('shop')")
    wait_until(lambda: shop.value("SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'", [cycle.pid]) == 1)
    if where == "the same file":
        file.write_text(f"{new}\n{old}")
    else:
        keys.set(keys.file(f"{new}\n{old}"))
    rotation = Background(shop, "CALL amazon_pii.rotate_key()").wait_for_lock(shop)
    shop.sql("DELETE FROM shop.gate")
    assert rotation.result()[0][1] == 0
    assert cycle.result()[0][2:4] == (60, 0)
    (key,) = master_keys(shop)
    assert key_status(shop)[key][0] is True and sum(master_keys(shop).values()) == 60


def test_what_cannot_be_unwrapped_stays_and_is_told(rotated, keys):
    """Breaks when a data key is lost because its master key is not there, or because it is damaged or locked."""
    shop, both, alone = rotated
    use(shop, keys, alone)
    before = shop.sql("SELECT k::text FROM amazon_pii_archive.data_key AS k ORDER BY 1")
    assert rotate(shop) == (0, 3)
    assert shop.sql("SELECT k::text FROM amazon_pii_archive.data_key AS k ORDER BY 1") == before
    assert [s for s in key_status(shop).values() if s[2]] == [(False, False, 3, 0, False)]
    use(shop, keys, both)
    shop.sql("UPDATE amazon_pii_archive.data_key SET wrapped = set_byte(wrapped, 20, (get_byte(wrapped, 20) + 1) % 256) WHERE order_key = '[\"2\"]'")
    other = shop.connect(autocommit=False)
    with other.cursor() as cursor:
        cursor.execute("SELECT FROM amazon_pii_archive.data_key WHERE order_key = '[\"3\"]' FOR UPDATE")
        assert rotate(shop) == (1, 2)
    other.rollback()
    assert rotate(shop) == (1, 1)
    assert "still wrapped by other master keys" in str(shop.session("pii_admin").notices)


def test_the_archive_of_a_dropped_policy_is_rotated_too(rotated):
    """P10. Breaks when an archive that nothing names any more is left under a key that is about to be destroyed."""
    shop, *_ = rotated
    shop.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user="pii_admin")
    assert rotate(shop) == (3, 0)


def test_a_rotation_of_files_that_wait(rotated, keys):
    """Breaks when a path cannot be read any more, or the same file becomes due again because its code is under another key."""
    shop, _, alone = rotated
    with_files = {**DUE, "orders": {**DUE["orders"], "files": "'/files/' || id"}}
    shop.apply_policy(with_files)
    use(shop, keys, keys.server.key_file)
    run_cycle(shop)
    paths = "SELECT path FROM amazon_pii.files_due() ORDER BY path"
    expected = [(f"/files/{n}",) for n in (1, 2, 3)]
    assert shop.sql(paths, user="pii_operator") == expected
    use(shop, keys, keys.file(f"{alone.read_text()}\n{keys.server.key_file.read_text()}"))
    assert rotate(shop) == (6, 0)
    # It comes back, and is redacted again while its file still waits.
    shop.sql("UPDATE shop.orders SET note = 'Ada again' WHERE id = 1")
    assert run_cycle(shop)["redacted"] == 1
    use(shop, keys, alone)
    assert shop.sql(paths, user="pii_operator") == expected


def test_a_rotation_commits_as_it_goes(shop):
    """Breaks when it is one long transaction."""
    session = shop.connect("pii_admin", autocommit=False)
    with session.cursor() as cursor, refused("25001", "rotate_key"):
        cursor.execute("CALL amazon_pii.rotate_key()")


def test_key_command(shop, keys):
    """Breaks when the command's failure is taken for a key, or its output gets into the server log."""
    shop.apply_policy(DUE)
    right = keys.server.key_file
    for command, words in [("exit 3", "failed"), (f"cat {right}; exit 1", "failed"), ("true", "unusable"),
                           ("echo no key", "unusable"), ("no_such_program_1", "failed"),
                           ("head -c 100 /dev/zero", "unusable"), ("echo //79 | base64 -d", "no text")]:
        use(shop, keys, "", command)
        with refused("F0000", words):
            run_cycle(shop, "shop")
        assert note(shop) == "Ada"
    # It takes precedence over the file.
    use(shop, keys, keys.file("no key"), f"cat {right}")
    assert run_cycle(shop)["redacted"] == 1
    retrieve(shop, number(1))
    assert note(shop) == "Ada"
    assert right.read_text().strip() not in keys.server.log_text()


def test_nobody_gets_to_see_the_key(preloaded, preloaded_db):
    """Breaks when a setting, a view, an error, the log or the archive shows the key, or an unprivileged role its place."""
    db, key = preloaded_db, preloaded.key_file.read_text().strip()
    db.psql(TABLES)
    db.sql("INSERT INTO shop.orders VALUES (1, %s, now() - '40 days'::interval, 'Ada')", [number(1)])
    db.apply_policy(DUE)
    wait_until(lambda: note(db) == "[Redacted]")
    for user in ("nobody_special", "shop_owner", "pii_admin", "pii_operator", "pii_auditor"):
        for setting in ("key_file", "key_command"):
            with refused("42501"):
                db.sql(f"SHOW amazon_pii.{setting}", user=user)
            with refused("55P02"):
                db.sql(f"SET amazon_pii.{setting} = 'x'", user=user)
            assert db.sql("SELECT * FROM pg_settings WHERE name = %s", [f"amazon_pii.{setting}"], user) == []
        with pytest.raises(psycopg2.Error):
            db.sql("SELECT * FROM pg_file_settings", user=user)
        for table in ("document", "data_key"):
            with refused("42501"):
                db.sql(f"SELECT * FROM amazon_pii_archive.{table}", user=user)
    dump = preloaded.client("pg_dump", "-d", db.name).stdout
    assert "amazon_pii_archive" in dump and number(1) in dump
    for place in (dump, preloaded.log_text(), str(db.sql("SELECT * FROM pg_settings")), str(db.sql("SELECT * FROM pg_stat_activity"))):
        assert key not in place.lower()
