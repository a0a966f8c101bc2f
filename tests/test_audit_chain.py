"""The audit log's chains: whatever a superuser does to them shows, nobody waits for the sealer, and audit_for ends entries with a
checkpoint."""
import secrets
import threading

import pytest
from cluster import wait_until
from conftest import new_database
from support import Background, add_order, number, open_shop, refused, run_cycle, shop_policy, standby_of

CHANGED = "the entry or its link was changed, or moved"


@pytest.fixture
def shop(db):
    """Three orders, redacted; one was retrieved. All entries are linked."""
    open_shop(db)
    db.apply_policy(shop_policy())
    for order in (1, 2, 3):
        add_order(db, order)
        run_cycle(db)
    db.sql("SELECT amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator")
    run_cycle(db)
    return db


def verify(db, chain="shop", position=None, code=None, user="pii_auditor"):
    return db.sql("SELECT chain, severity, finding, link_position, audit_id, entries, code FROM amazon_pii.verify_audit_log(%s, %s, %s)",
                  [chain, position, code], user)


def errors(db, chain="shop", **options):
    """[(finding, position)] beside the line for the chain as a whole, which must agree with them."""
    whole, *lines = verify(db, chain, **options)
    found = [(line[2], line[3]) for line in lines if line[1] == "error"]
    assert whole[1] == ("error" if found else "ok"), whole
    return found


def head(db, chain="shop"):
    whole = verify(db, chain)[0]
    return whole[3], whole[6]


def tamper(db, *statements):
    """As a superuser who knows of the trigger."""
    for table in ("audit_entry", "audit_link"):
        db.sql(f"ALTER TABLE amazon_pii.{table} DISABLE TRIGGER append_only")
    for statement in statements:
        db.sql(statement)
    for table in ("audit_entry", "audit_link"):
        db.sql(f"ALTER TABLE amazon_pii.{table} ENABLE ALWAYS TRIGGER append_only")


def at(db, position, chain="shop"):
    return db.value("SELECT audit_id FROM amazon_pii.audit_link WHERE chain = %s AND position = %s", [chain, position])


def last(db, chain="shop"):
    return db.value("SELECT max(position) FROM amazon_pii.audit_link WHERE chain = %s", [chain])


def seal(db):
    """A cycle of another policy seals what there is, too."""
    run_cycle(db)
    assert db.value("SELECT count(*) FROM amazon_pii.audit_pending") == 0


def test_every_entry_has_its_place(shop):
    """Breaks when an entry is not linked, is linked twice, or an untouched log does not verify."""
    seal(shop)
    assert shop.sql("SELECT e.audit_id FROM amazon_pii.audit_entry AS e LEFT JOIN amazon_pii.audit_link AS l USING (audit_id) "
                    "WHERE l.chain IS DISTINCT FROM COALESCE(e.policy, '')") == []
    count = shop.value("SELECT count(*) FROM amazon_pii.audit_entry WHERE policy = 'shop'")
    assert [r[0] for r in shop.sql("SELECT position FROM amazon_pii.audit_link WHERE chain = 'shop' ORDER BY 1")] == list(range(1, count + 1))
    whole, = verify(shop)
    assert whole[:4] == ("shop", "ok", "every entry is what was written", count) and whole[5] == count
    assert whole[6] == shop.value("SELECT encode(code, 'hex') FROM amazon_pii.audit_link WHERE chain = 'shop' AND position = %s", [count])
    first, upto = shop.sql("SELECT first_at, last_at FROM amazon_pii.verify_audit_log('shop')", user="pii_admin")[0]
    assert shop.sql("SELECT min(at) = %s, max(at) > %s FROM amazon_pii.audit_entry WHERE policy = 'shop'", [first, upto]) == [(True, True)]


def test_the_result_is_in_the_log(shop):
    """Breaks when nobody can see later that the log was verified, and what its head was."""
    position, code = head(shop)
    log = "SELECT \"user\", detail::json->>'errors', detail::json->>'head_position', detail::json->>'head_code' FROM amazon_pii.audit_log WHERE action = 'verify_audit_log'"
    assert shop.sql(log) == [("pii_auditor", "0", str(position), code)]


def test_it_reads_only(shop):
    session = shop.connect("pii_auditor", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY")
        cursor.execute("SELECT severity FROM amazon_pii.verify_audit_log()")
        assert {r[0] for r in cursor.fetchall()} == {"ok"}
        cursor.execute("SELECT txid_current_if_assigned(), count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'object' AND mode = 'ExclusiveLock'")
        assert cursor.fetchone() == (None, 0), "sealers are not kept away any longer"
    session.close()


def test_who_may_verify(shop):
    for user in ("pii_operator", "nobody_special", "shop_owner"):
        with refused("42501"):
            verify(shop, user=user)
    with refused("42704", "no audit log"):
        verify(shop, "nothing")
    with refused("22023", "a position and a code"):
        verify(shop, position=1)
    with refused("22023", "one chain"):
        verify(shop, None, 1, "00")


# Tampering


@pytest.mark.parametrize("column, value", [
    ("at", "at + '1 second'::interval"), ("\"user\"", "'somebody'"), ("actor", "'app'"), ("action", "'peek'"), ("policy_version", "2"),
    ("order_key", "'[\"9\"]'"), ("order_number", "'9'"), ("reason", "'better'"), ("detail", "'x'"), ("key_id", "NULL"), ("mac", "NULL"),
    ("lines", "'[[\"[\\\"1\\\"]\",\"1\",\"x\"]]'"), ("links_before", "0"), ("links_before", "NULL")])
def test_a_changed_entry(shop, column, value):
    """Breaks when a column of an entry can be changed after it was linked."""
    place = last(shop)
    tamper(shop, f"UPDATE amazon_pii.audit_entry SET {column} = {value} WHERE audit_id = {at(shop, place)}")
    assert errors(shop) == [(CHANGED, place)]


def test_a_changed_line_of_a_batch(shop):
    """Breaks when the orders that one entry lists can be changed."""
    for order in (4, 5):
        add_order(shop, order)
    run_cycle(shop)
    seal(shop)
    (entry, place), *_ = shop.sql("SELECT e.audit_id, l.position FROM amazon_pii.audit_entry AS e JOIN amazon_pii.audit_link AS l USING (audit_id) WHERE lines IS NOT NULL")
    lines = shop.value("SELECT lines FROM amazon_pii.audit_entry WHERE audit_id = %s", [entry])
    for other in (lines.replace(number(5), number(6)), lines.replace(",", ", "), lines[:-1], "[]"):
        tamper(shop, f"UPDATE amazon_pii.audit_entry SET lines = '{other}' WHERE audit_id = {entry}")
        assert errors(shop) == [(CHANGED, place)]
    tamper(shop, f"UPDATE amazon_pii.audit_entry SET lines = '{lines}' WHERE audit_id = {entry}")
    assert errors(shop) == []


def test_an_entry_that_is_moved_to_another_policy(shop):
    tamper(shop, f"UPDATE amazon_pii.audit_entry SET policy = 'other' WHERE audit_id = {at(shop, 2)}")
    assert errors(shop) == [(CHANGED, 2)]


def test_an_entry_that_is_gone(shop):
    """Breaks when a missing entry does not show, whether its link is there or not."""
    tamper(shop, f"DELETE FROM amazon_pii.audit_entry WHERE audit_id = {at(shop, 2)}")
    assert errors(shop) == [("the entry is missing", 2)]
    tamper(shop, "DELETE FROM amazon_pii.audit_link WHERE position = 2")
    assert errors(shop) == [("link 2 is missing", 2)]
    tamper(shop, "DELETE FROM amazon_pii.audit_link WHERE position = 3")
    assert ("links 2 to 3 are missing", 2) in errors(shop)


def test_a_link_that_is_gone_or_another(shop):
    """Breaks when an entry can be taken out of its chain, or a link be changed."""
    entry = at(shop, 2)
    tamper(shop, "DELETE FROM amazon_pii.audit_link WHERE position = 2")
    assert errors(shop) == [("link 2 is missing", 2), ("the entry has no link: it was made up, or its link was removed", None)]
    # Renumbered, so that there is no gap.
    tamper(shop, "UPDATE amazon_pii.audit_link SET position = position - 1 WHERE position > 2")
    assert (CHANGED, 2) in errors(shop)
    assert shop.value("SELECT audit_id FROM amazon_pii.verify_audit_log('shop') WHERE finding LIKE 'the entry has no link%'") == entry


def test_entries_that_change_places(shop):
    """Breaks when the order of two entries can be changed."""
    two, three = at(shop, 2), at(shop, 3)
    tamper(shop, "UPDATE amazon_pii.audit_link SET audit_id = -audit_id WHERE position IN (2, 3)",
           f"UPDATE amazon_pii.audit_link SET audit_id = CASE position WHEN 2 THEN {three} ELSE {two} END WHERE position IN (2, 3)")
    assert errors(shop)[:2] == [(CHANGED, 2), (CHANGED, 3)]
    # With their codes.
    tamper(shop, "UPDATE amazon_pii.audit_link SET position = -position WHERE position IN (2, 3)",
           "UPDATE amazon_pii.audit_link SET position = CASE position WHEN -2 THEN 3 ELSE 2 END WHERE position < 0")
    assert errors(shop) != []


def test_entries_that_change_their_numbers(shop):
    two, three = at(shop, 2), at(shop, 3)
    tamper(shop, "ALTER TABLE amazon_pii.audit_entry ALTER audit_id SET GENERATED BY DEFAULT",
           "UPDATE amazon_pii.audit_entry SET audit_id = -audit_id", f"UPDATE amazon_pii.audit_entry SET audit_id = CASE audit_id WHEN -{two} THEN {three} "
           f"WHEN -{three} THEN {two} ELSE -audit_id END")
    assert errors(shop) == [(CHANGED, 2), (CHANGED, 3)]


def test_the_newest_entries_are_gone(shop):
    """Breaks when the end of the chain can be cut off, with links and all."""
    end = last(shop)
    tamper(shop, f"DELETE FROM amazon_pii.audit_entry WHERE audit_id = {at(shop, end)}", f"DELETE FROM amazon_pii.audit_link WHERE position = {end}")
    assert errors(shop) == [(f"link {end} is missing", end)]
    # The chain goes on after it, and the gap stays.
    add_order(shop, 9)
    run_cycle(shop)
    seal(shop)
    assert errors(shop) == [(f"link {end} is missing", end)]
    # A head that says otherwise.
    tamper(shop, f"UPDATE amazon_pii.audit_chain SET position = {end - 1}, code = (SELECT code FROM amazon_pii.audit_link WHERE position = {end - 1} AND chain = 'shop') WHERE chain = 'shop'",
           f"DELETE FROM amazon_pii.audit_link WHERE position > {end} AND chain = 'shop'")
    assert ("the head was changed", None) in errors(shop)


@pytest.mark.parametrize("statement, what", [
    ("DELETE FROM amazon_pii.audit_chain WHERE chain = 'shop'", "missing"),
    ("UPDATE amazon_pii.audit_chain SET position = position - 1 WHERE chain = 'shop'", "changed"),
    ("UPDATE amazon_pii.audit_chain SET code = '\\x00' WHERE chain = 'shop'", "changed"),
    ("UPDATE amazon_pii.audit_chain SET sealed_at = now() WHERE chain = 'shop'", "changed"),
    ("UPDATE amazon_pii.audit_chain SET mac = (SELECT mac FROM amazon_pii.audit_chain WHERE chain = '') WHERE chain = 'shop'", "changed")])
def test_the_head(shop, statement, what):
    """Breaks when the newest entries can be cut off together with the head, or the sealer makes a new head and says nothing."""
    shop.sql("CALL amazon_pii.rotate_key()", user="pii_admin")
    seal(shop)
    end = last(shop)
    tamper(shop, f"DELETE FROM amazon_pii.audit_entry WHERE audit_id = {at(shop, end)}",
           f"DELETE FROM amazon_pii.audit_link WHERE chain = 'shop' AND position = {end}", statement)
    assert (f"the head {'is' if what == 'missing' else 'was'} {what}", None) in errors(shop)
    for order in (7, 8):
        add_order(shop, order)
        run_cycle(shop)
    seal(shop)
    found = errors(shop)
    assert [f for f in found if f[0].startswith(f"tampered with: the head was {what}; the chain goes on after link {end - 1}")] != []


def test_the_sealer_is_no_way_to_a_new_chain(shop):
    """Breaks when who deletes entries and the whole chain gets a chain over what is left, from the sealer, that verifies."""
    gone = at(shop, 3)
    tamper(shop, f"DELETE FROM amazon_pii.audit_entry WHERE audit_id = {gone}", "DELETE FROM amazon_pii.audit_link", "DELETE FROM amazon_pii.audit_chain")
    assert ("links before it were removed", None) in errors(shop)
    run_cycle(shop)
    seal(shop)
    assert last(shop) > 5
    found = errors(shop)
    assert found != [] and {f[0] for f in found} == {"links before it were removed"}


def test_the_chain_made_anew_over_all_entries_is_as_good(shop):
    """What lost its links and no entry proves the same: nothing is missing."""
    tamper(shop, "DELETE FROM amazon_pii.audit_link", "DELETE FROM amazon_pii.audit_chain")
    run_cycle(shop)
    seal(shop)
    assert errors(shop) == []


def test_links_need_the_key(shop):
    """Breaks when a link can be made without the master key: by its code, or by one of another place."""
    end = last(shop)
    tamper(shop, f"DELETE FROM amazon_pii.audit_entry WHERE audit_id = {at(shop, 3)}", "DELETE FROM amazon_pii.audit_link WHERE chain = 'shop' AND position = 3",
           "UPDATE amazon_pii.audit_link SET position = -position WHERE chain = 'shop' AND position > 3",
           "UPDATE amazon_pii.audit_link SET position = -position - 1, code = sha256(code) WHERE chain = 'shop' AND position < 0")
    assert {p for f, p in errors(shop) if f == CHANGED} >= set(range(3, end))


def test_an_entry_that_was_made_up(shop):
    """Breaks when an entry can be added behind the extension's back: it is not linked, or its code is wrong."""
    seal(shop)
    insert = "INSERT INTO amazon_pii.audit_entry (\"user\", action, policy{}) VALUES ('pii_operator', 'retrieve', 'shop'{})"
    shop.sql(insert.format("", ""))
    assert errors(shop) == [("the entry has no link: it was made up, or its link was removed", None)]
    shop.sql(insert.format(", key_id, mac", ", (SELECT max(key_id) FROM amazon_pii.audit_entry), '\\x00'"))
    assert ("the entry was changed", None) in errors(shop)
    shop.sql("INSERT INTO amazon_pii.audit_pending SELECT 'shop', audit_id FROM amazon_pii.audit_entry WHERE mac = '\\x00'")
    seal(shop)
    place = shop.value("SELECT position FROM amazon_pii.audit_link AS l JOIN amazon_pii.audit_entry USING (audit_id) WHERE mac = '\\x00'")
    assert (CHANGED, place) in errors(shop)


def test_an_entry_that_is_removed_before_it_is_linked(shop):
    """Breaks when the moments before an entry is linked are enough to get rid of it without a trace."""
    shop.sql("SELECT amazon_pii.peek(%s, 'curious')", [number(2)], "pii_operator")
    (entry,) = [r[0] for r in shop.sql("SELECT audit_id FROM amazon_pii.audit_pending WHERE chain = 'shop'")]
    assert errors(shop) == [] and ("entries are not linked yet", 2) in [(f[2], f[5]) for f in verify(shop)]
    tamper(shop, f"UPDATE amazon_pii.audit_entry SET reason = 'nothing' WHERE audit_id = {entry}")
    assert errors(shop) == [("the entry was changed", None)]
    tamper(shop, f"DELETE FROM amazon_pii.audit_entry WHERE audit_id = {entry}")
    assert errors(shop) == [("the entry was removed before it was linked", None)]
    seal(shop)
    place = shop.value("SELECT position FROM amazon_pii.audit_link WHERE audit_id = %s", [entry])
    assert errors(shop) == [("the entry was removed before it was linked", place)]


def test_a_head_that_was_kept(shop):
    """Breaks when somebody can put everything back to an earlier state, and whoever has kept a later head does not see it."""
    shop.sql("CREATE TABLE public.was AS SELECT * FROM amazon_pii.audit_entry; CREATE TABLE public.links AS SELECT * FROM amazon_pii.audit_link; "
             "CREATE TABLE public.heads AS SELECT * FROM amazon_pii.audit_chain")
    early = head(shop)
    add_order(shop, 9)
    run_cycle(shop)
    kept = head(shop)
    assert kept[0] > early[0] and errors(shop, position=kept[0], code=kept[1]) == []
    assert errors(shop, position=early[0], code=early[1].upper()) == []
    tamper(shop, "DELETE FROM amazon_pii.audit_entry", "DELETE FROM amazon_pii.audit_link", "DELETE FROM amazon_pii.audit_chain", "DELETE FROM amazon_pii.audit_pending",
           "INSERT INTO amazon_pii.audit_entry OVERRIDING SYSTEM VALUE SELECT * FROM public.was", "INSERT INTO amazon_pii.audit_link SELECT * FROM public.links",
           "INSERT INTO amazon_pii.audit_chain SELECT * FROM public.heads")
    assert errors(shop) == [], "nothing inside of the database knows better"
    assert errors(shop, position=kept[0], code=kept[1]) == [("the chain ends before the link that was kept: it was cut off", kept[0])]
    for order in range(10, 14):
        add_order(shop, order)
        run_cycle(shop)
    seal(shop)
    assert errors(shop, position=kept[0], code=kept[1]) == [("the link is not the one that was kept: the chain was cut off and grew again", kept[0])]
    assert errors(shop, position=early[0], code=early[1]) == []


def test_a_link_of_another_history(shop):
    """Breaks when a link does not depend on those before it: one that the extension itself made, in a state that was put back since,
    could take the place of another."""
    end = head(shop)[0]
    seal(shop)
    kept = ("entry", "link", "chain", "pending")
    for table in kept:
        shop.sql(f"CREATE TABLE public.{table} AS SELECT * FROM amazon_pii.audit_{table}")

    def history(*reasons):
        for reason in reasons:
            shop.sql("SELECT amazon_pii.peek(%s, %s)", [number(2), reason], "pii_operator")
            seal(shop)

    place = last(shop) + 1
    history("first", "second", "third")
    shop.sql(f"CREATE TABLE public.other_link AS SELECT * FROM amazon_pii.audit_link WHERE chain = 'shop' AND position = {place}; "
             "CREATE TABLE public.other_entry AS SELECT * FROM amazon_pii.audit_entry WHERE audit_id = (SELECT audit_id FROM public.other_link)")
    tamper(shop, *(f"DELETE FROM amazon_pii.audit_{t}" for t in kept),
           *(f"INSERT INTO amazon_pii.audit_{t} {'OVERRIDING SYSTEM VALUE' if t == 'entry' else ''} SELECT * FROM public.{t}" for t in kept))
    history("really", "second", "third")
    assert place > end and errors(shop) == []
    tamper(shop, f"DELETE FROM amazon_pii.audit_entry WHERE audit_id = {at(shop, place)}", f"DELETE FROM amazon_pii.audit_link WHERE chain = 'shop' AND position = {place}",
           "INSERT INTO amazon_pii.audit_entry OVERRIDING SYSTEM VALUE SELECT * FROM public.other_entry", "INSERT INTO amazon_pii.audit_link SELECT * FROM public.other_link")
    assert errors(shop) == [(CHANGED, place + 1)]


# Writers and the sealer


def test_nobody_waits_for_the_sealer(shop):
    """Breaks when a cycle, an access or a change of a policy waits until somebody's sealing is over, when two sealers link at the
    same time, or when what they leave is not linked later."""
    shop.sql("CREATE FUNCTION public.wait() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
             "WHILE EXISTS (SELECT FROM public.gate) LOOP PERFORM pg_sleep(0.01); END LOOP; RETURN NULL; END$$; "
             "CREATE TABLE public.gate (shut boolean); GRANT ALL ON public.gate TO PUBLIC; INSERT INTO public.gate VALUES (true); "
             "CREATE TRIGGER wait AFTER INSERT ON amazon_pii.audit_link FOR EACH STATEMENT EXECUTE FUNCTION public.wait()")
    shop.apply_policy(shop_policy(policy="second"))
    first = Background(shop, "CALL amazon_pii.run_cycle('shop')")
    wait_until(lambda: shop.value("SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'", [first.pid]) == 1)
    links = shop.value("SELECT count(*) FROM amazon_pii.audit_link")
    add_order(shop, 31)
    # A turn is a policy's: these two run beside each other, and beside the one that seals.
    cycles = [Background(shop, "CALL amazon_pii.run_cycle(%s)", [policy]) for policy in ("second", "shop", None)]
    for cycle in cycles:
        cycle.result(timeout=30)
    assert shop.sql("SELECT DISTINCT status FROM amazon_pii.orders WHERE order_key = '[\"31\"]'") == [("redacted",)]
    shop.sql("SELECT amazon_pii.peek(%s, 'help', policy => 'shop')", [number(2)], "pii_operator")
    shop.apply_policy(shop_policy(policy="second", placeholder="***"))
    assert shop.value("SELECT count(*) > 4 FROM amazon_pii.audit_pending") is True
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_link") == links and first.is_alive()
    shop.sql("DELETE FROM public.gate")
    first.result()
    seal(shop)
    assert errors(shop) == [] and errors(shop, "second") == []


def test_entries_that_commit_late_come_later(shop):
    """Breaks when an entry is lost, or said to be missing, because a transaction that began before others ended after them."""
    seal(shop)
    late = shop.connect("pii_operator", autocommit=False)
    late.cursor().execute("SELECT amazon_pii.hold(%s, 'lawsuit', now() + '10 days'::interval)", [number(1)])
    add_order(shop, 9)
    run_cycle(shop)
    end = last(shop)
    late.commit()
    late.close()
    seal(shop)
    ids = [r[0] for r in shop.sql("SELECT audit_id FROM amazon_pii.audit_link WHERE chain = 'shop' ORDER BY position")]
    assert len(ids) == end + 1 and ids != sorted(ids) and errors(shop) == []


def test_many_writers_at_once(shop):
    """Breaks when sealing beside writers loses an entry, links one twice, or takes an untouched log for a changed one."""
    stop = threading.Event()
    troubles = []

    def access(order):
        with shop.connect("pii_operator") as connection:
            while not stop.is_set():
                try:
                    connection.cursor().execute("SELECT amazon_pii.peek(%s, 'load')", [number(order)])
                except Exception as e:  # noqa: BLE001
                    troubles.append(e)

    threads = [threading.Thread(target=access, args=(order,)) for order in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for order in range(40, 46):
        add_order(shop, order)
        run_cycle(shop)
        assert errors(shop) == []
    stop.set()
    for thread in threads:
        thread.join()
    assert troubles == []
    assert errors(shop) == []
    seal(shop)
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_link WHERE chain = 'shop'") == shop.value("SELECT count(*) FROM amazon_pii.audit_entry WHERE policy = 'shop'")


def test_an_idle_cycle_seals_and_stays_idle(shop):
    """Breaks when a cycle with nothing due looks at the log again and again, or leaves what others wrote unlinked."""
    seal(shop)
    run_cycle(shop, "shop")
    shop.sql("SELECT amazon_pii.peek(%s, 'help')", [number(2)], "pii_operator")
    runs = shop.value("SELECT count(*) FROM amazon_pii.run")
    for _ in range(2):
        run_cycle(shop)
        assert shop.value("SELECT count(*) FROM amazon_pii.audit_pending") == 0
        assert shop.value("SELECT count(*) FROM amazon_pii.run") == runs


# Keys


def test_entries_from_before_there_was_a_key(db):
    """Breaks when what was written without a master key is not linked once there is one, or a chain can be begun only once."""
    open_shop(db)
    db.apply_policy(shop_policy())
    db.sql("INSERT INTO amazon_pii.audit_entry (\"user\", action, policy) VALUES ('x', 'earlier', 'shop')")
    run_cycle(db)
    seal(db)
    lines = {f[2]: f[5] for f in verify(db)}
    assert lines["entries have no code of their own: no master key was configured when they were written"] == 1
    assert errors(db) == []


@pytest.fixture
def keys(shop):
    class Keys:
        def use(self, text):
            path = shop.cluster.base / f"chain-{secrets.token_hex(4)}"
            shop.cluster.write_key(path)
            path.write_text(text)
            shop.sql(f"ALTER SYSTEM SET amazon_pii.key_file = '{path}'")
            shop.cluster.reload()
            wait_until(lambda: shop.value("SHOW amazon_pii.key_file") == str(path))
            # Sessions that are open notice it with their next statement; new ones have it.
            for user in ("pii_admin", "pii_auditor"):
                shop.session(user).close()

    yield Keys()
    shop.sql("ALTER SYSTEM RESET amazon_pii.key_file")
    shop.cluster.reload()


def test_another_master_key(shop, keys):
    """Breaks when a chain does not go on under a new key, when a missing key passes silently, or one that is needed may retire."""
    seal(shop)
    old_text, new_text = shop.cluster.key_file.read_text(), secrets.token_hex(32) + "\n"
    old = shop.value("SELECT key_id FROM amazon_pii.audit_chain WHERE chain = 'shop'")
    keys.use(new_text + old_text)
    status = "SELECT may_retire, audit_entries FROM amazon_pii.key_status WHERE master_key_id = %s"
    assert shop.value("SELECT key_id FROM amazon_pii.audit_chain WHERE chain = 'shop'") == old
    assert shop.sql(status, [old], "pii_auditor")[0][0] is False
    shop.sql("CALL amazon_pii.rotate_key()", user="pii_admin")
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_chain WHERE key_id = %s", [old]) == 0
    retire, entries = shop.sql(status, [old], "pii_auditor")[0]
    assert retire is True and entries == shop.value("SELECT count(*) FROM amazon_pii.audit_entry WHERE key_id = %s", [old])
    assert errors(shop) == []
    add_order(shop, 9)
    run_cycle(shop)
    seal(shop)
    assert errors(shop) == [] and errors(shop, "") == []
    keys.use(new_text)
    found = errors(shop)
    assert len(found) == 1 and found[0][0] == f"codes could not be checked: master key {old} is not configured"
    keys.use(new_text + old_text)
    assert errors(shop) == []


def test_without_any_key(shop):
    shop.sql("ALTER SYSTEM SET amazon_pii.key_file = '/nowhere'")
    shop.cluster.reload()
    try:
        wait_until(lambda: shop.value("SHOW amazon_pii.key_file") == "/nowhere")
        with refused("F0000"):
            verify(shop)
    finally:
        shop.sql("ALTER SYSTEM RESET amazon_pii.key_file")
        shop.cluster.reload()


# audit_for


@pytest.mark.parametrize("value", ["11 months", "364 days", "365 days", "0 days", "1 month", "nonsense", "-2 years", "9000 years"])
def test_an_audit_log_of_less_than_a_year_is_refused(shop, value):
    with refused("22023", "audit_for"):
        shop.apply_policy(shop_policy(audit_for=value))
    for good in ("12 months", "1 year", "366 days", "10 years"):
        shop.apply_policy(shop_policy(audit_for=good))


def aged(db, entries, age):
    """The entries as they would be if they had been written earlier: without codes of their own, and before any link."""
    tamper(db, "DELETE FROM amazon_pii.audit_link", "DELETE FROM amazon_pii.audit_chain", "UPDATE amazon_pii.audit_entry SET links_before = NULL, mac = NULL, key_id = NULL",
           f"UPDATE amazon_pii.audit_entry SET at = at - '{age}'::interval WHERE audit_id IN (SELECT audit_id FROM amazon_pii.audit_entry WHERE policy = 'shop' ORDER BY 1 LIMIT {entries})")
    seal(db)


def trim(db):
    db.sql("UPDATE amazon_pii.audit_chain SET next_trim_at = now()")
    run_cycle(db)
    seal(db)


def test_audit_for_ends_entries_and_leaves_a_checkpoint(shop):
    """Breaks when entries stay for ever, go too early, or the rest does not verify afterwards; or when it is done in each cycle."""
    shop.apply_policy(shop_policy(audit_for="2 years"))
    seal(shop)
    aged(shop, 4, "3 years")
    kept, code = head(shop)
    entry = at(shop, 4)
    after_four = shop.value("SELECT encode(code, 'hex') FROM amazon_pii.audit_link WHERE chain = 'shop' AND position = 4")
    trim(shop)
    assert shop.sql("SELECT position, entries FROM amazon_pii.audit_checkpoint WHERE chain = 'shop'") == [(4, 4)]
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_entry WHERE audit_id <= %s AND policy = 'shop'", [entry]) == 0
    assert shop.value("SELECT min(position) FROM amazon_pii.audit_link WHERE chain = 'shop'") == 5
    assert shop.sql("SELECT detail FROM amazon_pii.audit_log WHERE action = 'trim_audit_log'") == [("audit_for is over: 4 entries, up to link 4",)]
    assert errors(shop) == [] and errors(shop, position=kept, code=code) == [] and errors(shop, position=4, code=after_four) == []
    info = [f for f in verify(shop) if f[1] == "info" and f[2].startswith("audit_for is over")]
    assert [(f[3], f[5], f[6]) for f in info] == [(4, 4, after_four)]
    warned = [f[2] for f in verify(shop, "shop", 2, "00") if f[1] == "warning"]
    assert warned == ["the link that was kept is gone with audit_for, and cannot be compared"]
    trim(shop)
    assert shop.sql("SELECT position, entries FROM amazon_pii.audit_checkpoint") == [(4, 4)]


def test_many_entries_are_ended_in_batches(shop):
    """Breaks when more entries than one page holds are ended by halves, or in one transaction."""
    shop.apply_policy(shop_policy(audit_for="1 year"))
    tamper(shop, "INSERT INTO amazon_pii.audit_entry (\"user\", action, policy, lines) SELECT 'x', 'earlier', 'shop', repeat('x', 10000) FROM generate_series(1, 1700)")
    aged(shop, 100000, "400 days")
    count = shop.value("SELECT count(*) FROM amazon_pii.audit_entry WHERE policy = 'shop'")
    assert errors(shop) == []
    trim(shop)
    assert shop.value("SELECT entries FROM amazon_pii.audit_checkpoint") == count > 1700
    assert len(shop.sql("SELECT xmin FROM amazon_pii.audit_entry WHERE action = 'trim_audit_log'")) >= 4
    assert errors(shop) == []


def test_a_changed_time_ends_nothing(shop):
    """Breaks when whoever changes an entry's time has the extension itself remove it."""
    shop.apply_policy(shop_policy(audit_for="1 year"))
    seal(shop)
    tamper(shop, "UPDATE amazon_pii.audit_entry SET at = at - '5 years'::interval WHERE policy = 'shop'")
    count = shop.value("SELECT count(*) FROM amazon_pii.audit_entry WHERE policy = 'shop'")
    shop.sql("UPDATE amazon_pii.audit_chain SET next_trim_at = now()")
    run_cycle(shop)
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_entry WHERE policy = 'shop'") >= count
    assert "link 1 does not hold" in shop.value("SELECT last_error FROM amazon_pii.status")
    assert (CHANGED, 1) in errors(shop)


@pytest.mark.parametrize("statement, finding", [
    ("UPDATE amazon_pii.audit_checkpoint SET position = 6", "the checkpoint was changed"),
    ("UPDATE amazon_pii.audit_checkpoint SET entries = 3", "the checkpoint was changed"),
    ("UPDATE amazon_pii.audit_checkpoint SET last_at = now()", "the checkpoint was changed"),
    ("UPDATE amazon_pii.audit_checkpoint SET code = '\\x00'", "the checkpoint was changed"),
    ("DELETE FROM amazon_pii.audit_checkpoint", "links 1 to 4 are missing")])
def test_the_checkpoint(shop, statement, finding):
    """Breaks when the beginning of a chain can be cut off by moving the checkpoint."""
    aged(shop, 4, "30 years")
    trim(shop)
    assert errors(shop) == []
    shop.sql(statement)
    assert finding in [f[0] for f in errors(shop)]


def test_a_chain_without_a_policy_stays_as_long_as_any(shop):
    """Breaks when entries of no policy, or of a dropped one, end before those of a policy."""
    shop.apply_policy(shop_policy(audit_for="1 year"))
    shop.apply_policy(shop_policy(policy="second", audit_for="6 years"))
    shop.sql("CALL amazon_pii.rotate_key()", user="pii_admin")
    shop.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user="pii_admin")
    tamper(shop, "DELETE FROM amazon_pii.audit_link", "DELETE FROM amazon_pii.audit_chain",
           "UPDATE amazon_pii.audit_entry SET links_before = NULL, mac = NULL, key_id = NULL, at = at - '5 years'::interval",
           "INSERT INTO amazon_pii.audit_pending SELECT DISTINCT ON (policy) COALESCE(policy, ''), audit_id FROM amazon_pii.audit_entry ON CONFLICT DO NOTHING")
    seal(shop)
    trim(shop)
    assert shop.sql("SELECT chain FROM amazon_pii.audit_checkpoint") == []
    shop.apply_policy(shop_policy(policy="second", audit_for="2 years"))
    trim(shop)
    assert [r[0] for r in shop.sql("SELECT chain FROM amazon_pii.audit_checkpoint ORDER BY 1")] == ["", "second", "shop"]
    assert all(errors(shop, chain) == [] for chain in ("", "second", "shop"))


# Dumps


def test_a_restored_log_verifies(shop):
    """Breaks when a dump loses a part of the chains, or a restored chain does not go on."""
    aged(shop, 3, "30 years")
    trim(shop)
    shop.sql("SELECT amazon_pii.peek(%s, 'help')", [number(2)], "pii_operator")
    position, code = head(shop)
    dump = shop.cluster.client("pg_dump", "-d", shop.name).stdout
    other = new_database(shop.cluster, "template0")
    try:
        other.psql(dump)
        assert errors(other, position=position, code=code) == []
        run_cycle(other)
        seal(other)
        assert last(other) > position and errors(other, position=position, code=code) == []
    finally:
        other.drop()


def test_the_worker_seals(preloaded_db):
    """Breaks when nobody calls a cycle and entries stay unlinked."""
    db = open_shop(preloaded_db)
    db.apply_policy(shop_policy())
    add_order(db, 1)
    linked = "SELECT string_agg(DISTINCT e.action, ',') FROM amazon_pii.audit_link JOIN amazon_pii.audit_entry AS e USING (audit_id)"
    wait_until(lambda: db.value(linked) == "apply_policy,archive,redact")
    db.sql("SELECT amazon_pii.peek(%s, 'help')", [number(1)], "pii_operator")
    wait_until(lambda: db.value("SELECT count(*) FROM amazon_pii.audit_pending") == 0)
    assert errors(db) == []


def test_a_standby_can_verify(shop):
    """Breaks when the log can be verified on the primary alone: there is no worker that could note the result, and no lock to take."""
    seal(shop)
    with standby_of(shop.cluster) as standby:
        found = standby.sql("SELECT severity FROM amazon_pii.verify_audit_log()", user="pii_auditor", dbname=shop.name)
        assert found == [("ok",)]
        assert standby.sql("SELECT amazon_pii.evidence('shop')->>'policy'", user="pii_auditor", dbname=shop.name) == [("shop",)]
