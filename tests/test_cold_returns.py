"""Returns and credits where the archive is on a cold server: the insert depends on nothing but this database, and the order comes back in the
background."""
import json

import psycopg2
import pytest
from cluster import wait_until
from cold import DATABASE, FOREIGN, back, cold_server, shop_beside, status
from conftest import server_with
from support import PLACEHOLDER, Background, add_customer, add_order, end_retrieval, number, order_value, payloads, refused, retrieve, run_cycle
from test_returns import LOG, RETURNS, comes_back, gift, policy

QUEUE = "SELECT order_key, entry, inserted_by, actor, attempts, last_error FROM amazon_pii.retrieval_queue ORDER BY queue_id"
HURRY = "UPDATE amazon_pii.retrieval_queue SET next_attempt_at = '-infinity'"


@pytest.fixture(scope="module")
def near():
    """Cycles are called, or begin when somebody wakes the worker."""
    server = server_with(preload=True, conf=["amazon_pii.naptime = '1h'", "amazon_pii.archive_timeout = '5s'"])
    yield server
    server.destroy()


@pytest.fixture(scope="module")
def shared_cold():
    server = cold_server()
    yield server
    server.destroy()


@pytest.fixture
def cold(shared_cold):
    yield shared_cold
    back(shared_cold)
    shared_cold.sql("DROP SCHEMA IF EXISTS cold CASCADE", dbname=DATABASE)


def shop(server, cold, **changes):
    """Orders 1 to 3, redacted, each with a customer of its own; their archive is away."""
    db = shop_beside(server, cold)
    db.psql(RETURNS)
    for n in (1, 2, 3):
        add_customer(db, n)
        add_order(db, n, customer=n)
    db.apply_policy(policy(archive=FOREIGN, retrieve_for=["shop_owner"], **changes))
    run_cycle(db)
    assert [gift(db, n) for n in (1, 2, 3)] == [PLACEHOLDER] * 3
    return db


@pytest.fixture
def redacted(cluster, cold):
    """Without a worker: cycles run when they are called."""
    db = shop(cluster, cold)
    yield db
    db.drop()


@pytest.fixture
def served(near, cold):
    db = shop(near, cold)
    yield db
    db.drop()


def waiting(db):
    """How many orders wait, as people see it; the table says the same."""
    queued = len({row[0] for row in db.sql(QUEUE)})
    assert db.value("SELECT retrievals_waiting FROM amazon_pii.status", user="pii_auditor") == queued
    row = status(db)
    assert row["to_retrieve"] == queued and (row["to_retrieve_since"] is not None) == (queued > 0)
    return queued


def test_the_worker_brings_the_order_back(served):
    """Breaks when nobody is woken, another order comes back too, the log is silent or names somebody else, or the order does not go again."""
    session = served.connect("shop_owner")
    with session.cursor() as cursor:
        cursor.execute("SET amazon_pii.actor = 'clerk 7'; INSERT INTO shop.returns (order_id, note) VALUES (1, 'Last1')")
    session.close()
    wait_until(lambda: order_value(served, 1) == "retrieved")
    assert [gift(served, n) for n in (1, 2)] == ["Gift1", PLACEHOLDER]
    assert served.value("SELECT last_name FROM shop.customers WHERE id = 1") == "Last1"
    assert served.value("SELECT retrieved_until - retrieved_at = '30 days' FROM amazon_pii.orders WHERE order_key = '[\"1\"]'")
    assert served.sql(LOG) == [("shop_owner", "retrieve", '["1"]', number(1), "automatic: returns")]
    assert served.value("SELECT actor FROM amazon_pii.audit_log WHERE action = 'retrieve'") == "clerk 7"
    assert waiting(served) == 0
    with refused("55000", "read-only"):
        served.sql("UPDATE shop.orders SET gift_message = 'x' WHERE id = 1", user="shop_owner")
    end_retrieval(served, number(1))
    wait_until(lambda: order_value(served, 1) == "redacted")
    assert gift(served, 1) == served.value("SELECT note FROM shop.returns") == PLACEHOLDER


def test_a_call_does_it_too_and_announces_it(redacted):
    """Breaks when only the worker retrieves, the trigger does it itself or NOTIFYs, or nobody hears of it."""
    listener = redacted.connect("pii_operator")
    listener.cursor().execute("LISTEN amazon_pii")
    comes_back(redacted, 1)
    assert (gift(redacted, 1), order_value(redacted, 1), redacted.sql(LOG)) == (PLACEHOLDER, "redacted", [])
    assert redacted.sql(QUEUE) == [('["1"]', "returns", "shop_owner", None, 0, None)] and waiting(redacted) == 1
    assert payloads(listener) == []
    run_cycle(redacted)
    assert [(n["status"], n["orders"]) for n in map(json.loads, payloads(listener))] == [("retrieved", ['["1"]'])]
    assert gift(redacted, 1) == "Gift1" and waiting(redacted) == 0
    # Nothing is left to do.
    run_cycle(redacted)
    assert len(redacted.sql(LOG)) == 1


def test_a_server_that_is_down_keeps_no_return_from_being_booked(served, cold):
    """P11. Breaks when the insert fails or waits, when the order is lost, or nobody sees that it waits and why."""
    cold.stop()
    comes_back(served, 1)
    assert served.value("SELECT count(*) FROM shop.returns") == 1
    wait_until(lambda: status(served)["down_since"])
    assert (gift(served, 1), order_value(served, 1), served.sql(LOG)) == (PLACEHOLDER, "redacted", [])
    assert waiting(served) == 1
    wait_until(lambda: "08001" in (served.sql(QUEUE)[0][5] or ""))
    assert "08001" in served.value("SELECT last_error FROM amazon_pii.status", user="pii_auditor")
    steps = served.sql("SELECT object, detail FROM amazon_pii.explain_order(%s) WHERE step = 'comes back'", [number(1)], "pii_operator")
    assert [o for o, _ in steps] == ['shop ["1"]'] and "entry returns" in steps[0][1] and "08001" in steps[0][1]
    comes_back(served, 2)
    assert waiting(served) == 2
    # By itself, long before the naptime is over.
    cold.start()
    wait_until(lambda: [order_value(served, n) for n in (1, 2, 3)] == ["retrieved", "retrieved", "redacted"], 60)
    assert [gift(served, n) for n in (1, 2)] == ["Gift1", "Gift2"]
    assert [line[2] for line in served.sql(LOG)] == ['["1"]', '["2"]']
    assert waiting(served) == 0
    wait_until(lambda: served.value("SELECT last_error FROM amazon_pii.status", user="pii_auditor") is None)


def test_a_cold_server_that_was_away_is_asked_again_soon(served, cold):
    """Breaks when one connection that fails keeps what is due waiting for a whole naptime."""
    cold.stop()
    add_order(served, 7)
    served.sql("SELECT amazon_pii.erase(%s, 'asked by the buyer')", [number(7)], "pii_admin")
    wait_until(lambda: status(served)["down_since"])
    cold.start()
    wait_until(lambda: order_value(served, 7) == "redacted", 60)


def test_it_goes_with_the_transaction(redacted, cold):
    """Breaks when an order comes back for a return that was rolled back."""
    session = redacted.connect("shop_owner", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.returns (order_id) VALUES (1)")
        cursor.execute("SAVEPOINT s; INSERT INTO shop.returns (order_id) VALUES (2); ROLLBACK TO s; INSERT INTO shop.returns (order_id) VALUES (3)")
        run_cycle(redacted)
    assert redacted.sql(LOG) == []
    session.rollback()
    run_cycle(redacted)
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.returns (order_id) VALUES (1)")
        cursor.execute("SAVEPOINT s; INSERT INTO shop.returns (order_id) VALUES (2); ROLLBACK TO s; INSERT INTO shop.returns (order_id) VALUES (3)")
    session.commit()
    session.close()
    run_cycle(redacted)
    assert [order_value(redacted, n) for n in (1, 2, 3)] == ["retrieved", "redacted", "retrieved"]
    assert [line[2] for line in redacted.sql(LOG)] == ['["1"]', '["3"]']


def test_a_prepared_transaction(redacted):
    """Breaks when the trigger does what no prepared transaction can."""
    session = redacted.connect("shop_owner", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.returns (order_id) VALUES (1)")
        cursor.execute("PREPARE TRANSACTION 'returned'")
    session.close()
    run_cycle(redacted)
    assert order_value(redacted, 1) == "redacted"
    redacted.sql("COMMIT PREPARED 'returned'")
    run_cycle(redacted)
    assert order_value(redacted, 1) == "retrieved"


def test_many_inserts_for_one_order(redacted, cold):
    """Breaks when an order is retrieved or logged more than once, when one transaction waits for another, or orders are fetched one by one."""
    comes_back(redacted, 1, 2, 1, 2, 1)
    comes_back(redacted, 1, 2)
    assert len(redacted.sql(QUEUE)) == 2
    session = redacted.connect("shop_owner", autocommit=False)
    session.cursor().execute("INSERT INTO shop.returns (order_id) VALUES (3)")
    Background(redacted, "INSERT INTO shop.returns (order_id) VALUES (3)", user="shop_owner").result(30)
    session.commit()
    session.close()
    assert len(redacted.sql(QUEUE)) == 4 and waiting(redacted) == 3
    before = cold.log_text().count("SELECT order_key, table_name")
    run_cycle(redacted)
    assert cold.log_text().count("SELECT order_key, table_name") == before + 1
    assert [order_value(redacted, n) for n in (1, 2, 3)] == ["retrieved"] * 3
    assert [line[2] for line in redacted.sql(LOG)] == ['["1"]', '["2"]', '["3"]']
    assert waiting(redacted) == 0 and redacted.value("SELECT count(*) FROM shop.returns") == 9
    # What holds its data stays as it is.
    until = order_value(redacted, 1, "retrieved_until")
    comes_back(redacted, 1)
    run_cycle(redacted)
    assert order_value(redacted, 1, "retrieved_until") == until and len(redacted.sql(LOG)) == 3


def test_returns_come_before_archive_work(redacted, cold):
    """Breaks when an order that somebody waits for comes after all that is to be sent."""
    for n in range(11, 16):
        add_order(redacted, n)
    comes_back(redacted, 1)
    redacted.sql("CREATE FUNCTION shop.seen() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
                 "RAISE EXCEPTION 'order 1 is still redacted' USING ERRCODE = 'P0099'; END$$; "
                 "CREATE TRIGGER seen BEFORE UPDATE ON shop.addresses FOR EACH ROW WHEN (OLD.order_id > 10) EXECUTE FUNCTION shop.seen()",
                 user="shop_owner")
    redacted.sql("CREATE OR REPLACE FUNCTION shop.seen() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
                 "IF (SELECT gift_message FROM shop.orders WHERE id = 1) <> 'Gift1' THEN "
                 "RAISE EXCEPTION 'order 1 is still redacted' USING ERRCODE = 'P0099'; END IF; RETURN NEW; END$$", user="shop_owner")
    assert run_cycle(redacted) == {"flagged": 0, "archived": 5, "redacted": 5, "failed": 0, "overdue": 0}
    assert gift(redacted, 1) == "Gift1"


def test_quotas_and_alarms_count_it(cluster, cold):
    """As with an archive of this database: no quota refuses it, it counts for alarms, and what people may have stays the same. Breaks when it is
    counted for somebody else, or not at all."""
    db = shop(cluster, cold, retrievals_per_day=1, alarm_per_day=2)
    try:
        comes_back(db, 1, 2, 3, user="pii_operator")
        run_cycle(db)
        assert [order_value(db, n) for n in (1, 2, 3)] == ["retrieved"] * 3
        counts = db.sql("SELECT counted_by, name, orders, automatic, refused FROM amazon_pii.access_count ORDER BY 1")
        assert counts == [("user", "pii_operator", 0, 3, 0), ("user_in_all", "pii_operator", 0, 3, 0)]
        alarms = db.sql("SELECT \"user\", detail FROM amazon_pii.audit_log WHERE action = 'alarm'", user="pii_auditor")
        assert [a[0] for a in alarms] == ["pii_operator"] and "more than 2 are unusual" in alarms[0][1]
        end_retrieval(db, number(1))
        run_cycle(db)
        assert retrieve(db, number(1))
    finally:
        db.drop()


def test_a_role_that_may_not_retrieve(redacted):
    """P8. Breaks when whoever may insert a return gets the buyer's data back later, or a right is asked for only when it was inserted."""
    session = redacted.connect("nobody_special")
    with session.cursor() as cursor:
        cursor.execute("INSERT INTO shop.returns (order_id) VALUES (1)")
    assert "1 redacted orders were not retrieved" in session.notices[-1]
    session.close()
    assert redacted.sql(QUEUE) == []
    comes_back(redacted, 2, user="pii_operator")
    redacted.sql("REVOKE amazon_pii_operator FROM pii_operator")
    try:
        run_cycle(redacted)
    finally:
        redacted.sql("GRANT amazon_pii_operator TO pii_operator")
    assert [order_value(redacted, n) for n in (1, 2)] == ["redacted", "redacted"] and redacted.sql(QUEUE) == []
    assert redacted.sql(LOG) == [("nobody_special", "retrieve_refused", '["1"]', number(1), "automatic: returns"),
                                 ("pii_operator", "retrieve_refused", '["2"]', number(2), "automatic: returns")]


def test_an_order_that_is_not_there_any_more(redacted, cold):
    """Breaks when a purged or deleted order stays in the queue for ever, comes back, or goes without a word."""
    cold.stop()
    comes_back(redacted, 1, 2, 3)
    run_cycle(redacted)
    redacted.sql("SELECT amazon_pii.shred(%s, 'asked by the buyer')", [number(1)], "pii_admin")
    redacted.sql("DELETE FROM shop.returns WHERE order_id = 2; DELETE FROM shop.addresses WHERE order_id = 2; DELETE FROM shop.orders WHERE id = 2",
                 user="shop_owner")
    redacted.sql("SELECT amazon_pii.forget(%s, 'asked by the buyer')", [number(3)], "pii_admin")
    assert waiting(redacted) == 3
    back(cold)
    run_cycle(redacted)
    assert redacted.sql(QUEUE) == []
    assert [(line[1], line[2], line[3]) for line in redacted.sql(LOG)] == [("retrieve_dropped", f'["{n}"]', number(n)) for n in (1, 2, 3)]
    details = [d for (d,) in redacted.sql("SELECT detail FROM amazon_pii.audit_log WHERE action = 'retrieve_dropped' ORDER BY audit_id")]
    assert "no longer exists" in details[0] and "deleted" in details[1] and "no longer exists" in details[2]
    assert [gift(redacted, n) for n in (1, 3)] == [PLACEHOLDER] * 2


def test_a_policy_that_does_not_say_so_any_more(redacted, cold):
    """Breaks when orders come back by way of a policy that was disabled, changed or dropped after the return."""
    comes_back(redacted, 1)
    redacted.sql("SELECT amazon_pii.disable_policy('shop', 'test')", user="pii_admin")
    run_cycle(redacted)
    assert order_value(redacted, 1) == "redacted" and waiting(redacted) == 1
    redacted.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    run_cycle(redacted)
    assert order_value(redacted, 1) == "retrieved"
    comes_back(redacted, 2)
    redacted.apply_policy(policy(False, archive=FOREIGN))
    run_cycle(redacted)
    assert order_value(redacted, 2) == "redacted" and redacted.sql(QUEUE) == []
    assert redacted.sql(LOG)[-1][1:3] == ("retrieve_dropped", '["2"]')
    redacted.apply_policy(policy(archive=FOREIGN, retrieve_for=["shop_owner"]))
    comes_back(redacted, 3)
    assert len(redacted.sql(QUEUE)) == 1
    redacted.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user="pii_admin")
    assert redacted.sql(QUEUE) == []


def test_one_that_fails_stops_no_other(redacted, cold):
    """P3. Breaks when a damaged document keeps other orders from coming back, is tried in every cycle, or fills the log."""
    comes_back(redacted, 1, 2)
    damage = "set_byte(sealed, 20, get_byte(sealed, 20) # 1)"
    where = "WHERE order_key = '[\"1\"]' AND table_name = 'shop.addresses'"
    cold.sql(f"UPDATE cold.document SET sealed = {damage} {where}", dbname=DATABASE)
    run_cycle(redacted)
    assert [order_value(redacted, n) for n in (1, 2)] == ["redacted", "retrieved"]
    (row,) = redacted.sql(QUEUE)
    assert row[0] == '["1"]' and row[4] == 1 and row[5].startswith("XX001") and waiting(redacted) == 1
    assert "XX001" in redacted.value("SELECT last_error FROM amazon_pii.status", user="pii_auditor")
    run_cycle(redacted)
    assert redacted.sql(QUEUE) == [row]
    redacted.sql(HURRY)
    run_cycle(redacted)
    assert redacted.sql(QUEUE)[0][4] == 2
    assert redacted.value("SELECT next_attempt_at > now() + interval '1 minute' FROM amazon_pii.retrieval_queue")
    assert [line[1] for line in redacted.sql(LOG) if line[2] == '["1"]'] == ["retrieve", "retrieve_failed", "retrieve"]
    # Whoever repairs it need not insert anything again.
    cold.sql(f"UPDATE cold.document SET sealed = {damage} {where}", dbname=DATABASE)
    redacted.sql(HURRY)
    run_cycle(redacted)
    assert gift(redacted, 1) == "Gift1" and waiting(redacted) == 0
    assert redacted.value("SELECT last_error FROM amazon_pii.status", user="pii_auditor") is None


def test_a_row_that_somebody_has_locked(redacted):
    """Breaks when a cycle waits for the shop for ever, or blames the order."""
    comes_back(redacted, 1, 2)
    session = redacted.connect("shop_owner", autocommit=False)
    session.cursor().execute("SELECT FROM shop.addresses WHERE order_id = 1 FOR UPDATE")
    Background(redacted, "CALL amazon_pii.run_cycle()").result(60)
    assert [order_value(redacted, n) for n in (1, 2)] == ["redacted", "retrieved"]
    assert redacted.sql(QUEUE)[0][4:] == (0, None)
    session.rollback()
    session.close()
    redacted.sql(HURRY)
    run_cycle(redacted)
    assert gift(redacted, 1) == "Gift1"


def test_nothing_of_the_shop_is_locked_while_the_server_is_asked(redacted, cold):
    """Breaks when the state of an order or a row of the shop's is locked while the cycle waits for the server."""
    comes_back(redacted, 1)
    gate = cold.connect(dbname=DATABASE, autocommit=False)
    gate.cursor().execute("LOCK TABLE cold.document IN ACCESS EXCLUSIVE MODE")
    cycle = Background(redacted, "CALL amazon_pii.run_cycle('shop')")
    try:
        wait_until(lambda: cold.sql("SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'", [DATABASE]))
        with redacted.connect("shop_owner", autocommit=False) as session, session.cursor() as cursor:
            cursor.execute("LOCK TABLE shop.orders, shop.addresses, shop.customers, shop.returns IN ACCESS EXCLUSIVE MODE NOWAIT")
            session.rollback()
        redacted.sql("SELECT FROM amazon_pii.order_state FOR UPDATE NOWAIT")
        # Another return is booked meanwhile.
        Background(redacted, "INSERT INTO shop.returns (order_id) VALUES (1), (2)", user="shop_owner").result(30)
    finally:
        gate.rollback()
        gate.close()
    cycle.result()
    run_cycle(redacted)
    assert [order_value(redacted, n) for n in (1, 2)] == ["retrieved", "retrieved"] and len(redacted.sql(LOG)) == 2


def test_a_change_of_the_key_is_followed(redacted):
    """Breaks when an order whose key changed after the return is not found any more."""
    redacted.sql("ALTER TABLE shop.returns DROP CONSTRAINT returns_order_id_fkey; ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey",
                 user="shop_owner")
    comes_back(redacted, 1)
    redacted.sql("UPDATE shop.orders SET id = 101 WHERE id = 1; UPDATE shop.addresses SET order_id = 101 WHERE order_id = 1;"
                 "UPDATE shop.returns SET order_id = 101", user="shop_owner")
    run_cycle(redacted)
    run_cycle(redacted)
    assert gift(redacted, 101) == "Gift1" and order_value(redacted, 101) == "retrieved"


def test_a_history_names_who_inserted(cluster, cold):
    """Breaks when the shop's own history says that the worker, or whoever called the cycle, brought the order back."""
    db = shop_beside(cluster, cold)
    db.psql(RETURNS)
    db.sql("CREATE TABLE shop.history (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id bigint, note text)", user="shop_owner")
    add_order(db, 1)
    db.apply_policy(policy(archive=FOREIGN, retrieve_for=["shop_owner"], history={"table": "shop.history", "columns": {
        "order_id": {"order": "id"}, "note": ":action :number by :user (:reason)"}}))
    try:
        run_cycle(db)
        comes_back(db, 1)
        run_cycle(db)
        assert db.sql("SELECT order_id, note FROM shop.history") == [(1, f"retrieve {number(1)} by shop_owner (automatic: returns)")]
    finally:
        db.drop()


def test_spool_waits_for_the_server_too(cluster, cold):
    """Breaks when half of an archive is given back because the other half could not be read."""
    db = shop(cluster, cold, deadline="spool")
    try:
        cold.stop()
        comes_back(db, 1)
        run_cycle(db)
        assert order_value(db, 1) == "redacted" and waiting(db) == 1 and "08001" in db.sql(QUEUE)[0][5]
        back(cold)
        run_cycle(db)
        assert gift(db, 1) == "Gift1" and waiting(db) == 0
    finally:
        db.drop()


def test_the_queue_is_in_a_dump_and_holds_no_personal_data(redacted):
    """Breaks when a dump forgets who waits, or the table holds more than keys and names."""
    comes_back(redacted, 1)
    dump = redacted.cluster.client("pg_dump", "-d", redacted.name).stdout
    assert "COPY amazon_pii.retrieval_queue" in dump
    (text,) = redacted.sql("SELECT q::text FROM amazon_pii.retrieval_queue q")[0]
    assert not any(word in text for word in ("Gift", "Name", "Last1", "Street"))
    for role in ("shop_owner", "pii_operator", "pii_auditor", "pii_admin"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            redacted.sql("SELECT FROM amazon_pii.retrieval_queue", user=role)


def test_the_check_says_that_it_takes_a_while(redacted):
    """Breaks when the policy is refused, or nobody is told that the order is not there when the INSERT returns."""
    found = [f for f in redacted.check_policy(policy(archive=FOREIGN)) if "retrieve_on_insert" in f[1]]
    assert len(found) == 1 and found[0][0] == "info" and "in the background" in found[0][2]
    assert not [f for f in redacted.check_policy(policy()) if "retrieve_on_insert" in f[1]]


def test_a_sanitized_copy_brings_nothing_back(redacted):
    """Breaks when a copy asks the original's server, or puts a buyer's data back."""
    comes_back(redacted, 1)
    redacted.sql("UPDATE amazon_pii.policy SET home = 'elsewhere:1'")
    with refused("55000", "is a copy"):
        run_cycle(redacted, "shop")
    assert order_value(redacted, 1) == "redacted" and waiting(redacted) == 1
    redacted.sql("CALL amazon_pii.sanitize_copy('shop')", user="pii_admin")
    assert redacted.sql(QUEUE) == [] and gift(redacted, 1) == PLACEHOLDER
