"""What hangs holds nobody up: code of a table's owner that does not end fails its own order; a key command that does not end
can be interrupted, and its time is limited, too."""
import os
import signal
import time

import psycopg2
import pytest
from cluster import alive, wait_until
from conftest import add_extension, new_database, server_with
from support import (
    Background, fill, go_on, hurry, open_shop, order_number, order_row, order_value, refused, retrieve, run_cycle, shop_policy, states, stop_at, stopped,
)

BAD = 7
WORKING = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'amazon_pii worker' AND datname = %s"
# Short beside what does not end, long beside what does.
LIMIT = "2s"


@pytest.fixture(scope="module")
def server():
    """A worker that looks often, on a server whose configuration is this module's own."""
    server = server_with(preload=True, conf=["amazon_pii.naptime = '1s'", f"amazon_pii.statement_timeout = '{LIMIT}'"])
    yield server
    server.destroy()


@pytest.fixture
def shop(server):
    database = new_database(server, "template0")
    add_extension(database.cluster, database.name)
    fill(open_shop(database), 10)
    yield database
    database.drop()


def set_on(db, name, value):
    """Changes a setting of the server, until the reload has reached a session."""
    quoted = value.replace("\\", "\\\\")
    db.cluster.configure(f"{name} = '{quoted}'")
    db.cluster.reload()
    # A session in which nobody has called us yet knows the setting from the file alone, once that was read again.
    wait_until(lambda: db.value("SELECT current_setting(%s, true)", [name]) == value)


def enable(db):
    """After what may hang was made: it would hang in the trial of apply_policy, too, where whoever applies can cancel."""
    db.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")


@pytest.fixture
def patient(shop):
    """The owner's code may take as long as it likes."""
    set_on(shop, "amazon_pii.statement_timeout", "0")
    yield shop
    set_on(shop, "amazon_pii.statement_timeout", LIMIT)


# Code of a table's owner


@pytest.mark.parametrize("table", ["orders", "customers"])
def test_code_of_the_owner_that_does_not_end_fails_its_order_alone(shop, table):
    """Breaks when code of an owner can hold a worker for as long as it likes, or when its time-out ends the cycle."""
    shop.apply_policy(shop_policy(enabled=False))
    stop_at(shop, table, BAD)
    enable(shop)
    wait_until(lambda: order_value(shop, BAD) == "failed")
    wait_until(lambda: sum(s == "redacted" for s in states(shop).values()) == 9)
    error = order_row(shop, BAD, "last_error")[0]
    assert error.startswith("57014: ") and "amazon_pii.statement_timeout" in error
    assert shop.value("SELECT worker_error FROM amazon_pii.status") is None
    go_on(shop)
    hurry(shop)
    wait_until(lambda: states(shop)[BAD] == "redacted")


def test_a_called_cycle_is_limited_too_and_goes_on(db):
    """Breaks when only the worker's cycles are limited, or when a time-out is taken for a cancel of the CALL."""
    fill(open_shop(db), 10)
    db.apply_policy(shop_policy())
    stop_at(db, "orders", BAD)
    set_on(db, "amazon_pii.statement_timeout", LIMIT)
    try:
        counts = run_cycle(db)
    finally:
        set_on(db, "amazon_pii.statement_timeout", "5min")
    assert (counts["redacted"], counts["failed"]) == (9, 1)
    assert order_value(db, BAD, "last_error").startswith("57014: ")


def test_a_cancel_still_ends_the_call(patient):
    """Breaks when a cancel by a user is taken for a time-out, and the cycle goes on."""
    set_on(patient, "amazon_pii.statement_timeout", "1h")
    patient.apply_policy(shop_policy(enabled=False))
    stop_at(patient, "orders", BAD)
    try:
        set_on(patient, "amazon_pii.enabled", "off")
        # One that has begun goes by the old settings.
        wait_until(lambda: not patient.sql(WORKING, [patient.name]))
        enable(patient)
        call = Background(patient, "CALL amazon_pii.run_cycle()")
        assert wait_until(lambda: stopped(patient)) == call.pid
        patient.sql("SELECT pg_cancel_backend(%s)", [call.pid])
        with refused("57014"):
            call.result()
        assert order_value(patient, BAD, "last_error") is None and order_value(patient, BAD) != "failed"
    finally:
        set_on(patient, "amazon_pii.enabled", "on")


def test_code_that_swallows_its_time_out_fails_all_the_same(shop):
    """Breaks when an owner's handler for canceled queries makes an overlong statement look well done."""
    shop.apply_policy(shop_policy(enabled=False))
    shop.sql("CREATE FUNCTION shop.stubborn() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN BEGIN PERFORM pg_catalog.pg_sleep(600); "
             "EXCEPTION WHEN query_canceled THEN NULL; END; RETURN NEW; END $$; "
             f"CREATE TRIGGER stubborn BEFORE UPDATE ON shop.orders FOR EACH ROW WHEN (OLD.id = {BAD}) EXECUTE FUNCTION shop.stubborn()",
             user="shop_owner")
    enable(shop)
    wait_until(lambda: order_value(shop, BAD) == "failed")
    assert order_value(shop, BAD, "last_error").startswith("57014: ")
    wait_until(lambda: sum(s == "redacted" for s in states(shop).values()) == 9)


def test_an_expression_that_does_not_end_is_limited(shop):
    """Breaks when the sweep evaluates an owner's expressions without a limit."""
    shop.sql("CREATE FUNCTION shop.sent(id bigint, at timestamptz) RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN "
             f"IF id = {BAD} AND EXISTS (SELECT FROM shop.slow) THEN PERFORM pg_catalog.pg_sleep(600); END IF; RETURN at; END $$; "
             "CREATE TABLE shop.slow (n int)", user="shop_owner")
    shop.apply_policy(shop_policy(enabled=False, orders={**shop_policy()["orders"], "anchor": "shop.sent(id, shipped_at)"}))
    shop.sql("INSERT INTO shop.slow VALUES (1)", user="shop_owner")
    enable(shop)
    wait_until(lambda: sum(s == "redacted" for s in states(shop).values()) == 9)
    assert states(shop)[BAD] == "original"
    wait_until(lambda: (shop.value("SELECT last_error FROM amazon_pii.status") or "").startswith("57014: "))
    shop.sql("DELETE FROM shop.slow", user="shop_owner")
    hurry(shop)
    wait_until(lambda: states(shop)[BAD] == "redacted")


# The key command


@pytest.fixture
def hanging_key(server, tmp_path_factory):
    """A key command that writes down what it is and then hangs; what it started hangs, too."""
    noted = server.base / "noted"
    server.configure("amazon_pii.statement_timeout = '0'", f"amazon_pii.key_command = 'echo $$ > {noted}; sleep 600 & wait'")
    server.reload()
    yield noted
    server.configure(f"amazon_pii.statement_timeout = '{LIMIT}'", "amazon_pii.key_command = ''")
    server.reload()


def group(noted):
    """The live processes of the command's group."""
    leader = int(wait_until(lambda: noted.exists() and noted.read_text().strip()))
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and alive(int(entry)):
            try:
                if os.getpgid(int(entry)) == leader:
                    found.append(int(entry))
            except ProcessLookupError:
                pass
    return found


def test_a_worker_whose_key_command_hangs_ends_within_a_second(shop, hanging_key):
    """Breaks when the wait for the key command hears no signal, or leaves its processes behind."""
    hanging_key.unlink(missing_ok=True)
    shop.cluster.configure("amazon_pii.key_command = ''")
    shop.cluster.reload()
    wait_until(lambda: shop.value("SHOW amazon_pii.key_command") == "")
    shop.apply_policy(shop_policy())
    shop.cluster.configure(f"amazon_pii.key_command = 'echo $$ > {hanging_key}; sleep 600 & wait'")
    shop.cluster.reload()
    wait_until(lambda: len(group(hanging_key)) == 2)
    pid = wait_until(lambda: shop.sql(WORKING, [shop.name]))[0][0]
    processes = group(hanging_key)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid), interval=0.01)
    assert time.monotonic() - began < 1
    wait_until(lambda: not any(alive(p) for p in processes), timeout=1, interval=0.01)


def test_a_key_command_can_be_canceled(db):
    """Breaks when a session that waits for the key command cannot be canceled."""
    open_shop(db)
    db.apply_policy(shop_policy())
    noted = db.cluster.base / "noted"
    set_on(db, "amazon_pii.key_command", f"echo $$ > {noted}; sleep 600")
    try:
        call = Background(db, "CALL amazon_pii.run_cycle()")
        processes = wait_until(lambda: group(noted))
        db.sql("SELECT pg_cancel_backend(%s)", [call.pid])
        with refused("57014"):
            call.result(5)
        wait_until(lambda: not any(alive(p) for p in processes), timeout=1, interval=0.01)
    finally:
        set_on(db, "amazon_pii.key_command", "")


@pytest.mark.parametrize("command, limit, words", [
    ("sleep 600", "200ms", "took longer than amazon_pii.statement_timeout"),
    ("exec >&-; sleep 600", "200ms", "took longer than amazon_pii.statement_timeout"),
    ("cat KEY; exit 3", "1min", "failed"),
    ("printf \"\\377\"", "1min", "printed something that is no text"),
])
def test_a_key_command_that_gives_no_key(db, command, limit, words):
    """Breaks when a key command without a result is waited for for ever, or is believed."""
    open_shop(db)
    db.apply_policy(shop_policy())
    set_on(db, "amazon_pii.statement_timeout", limit)
    set_on(db, "amazon_pii.key_command", command.replace("KEY", str(db.cluster.key_file)))
    try:
        with refused("F0000", words):
            db.sql("CALL amazon_pii.run_cycle('shop')", user="pii_admin")
        assert words in db.value("SELECT last_error FROM amazon_pii.status")
    finally:
        set_on(db, "amazon_pii.key_command", "")
        set_on(db, "amazon_pii.statement_timeout", "5min")


def test_a_key_command_gives_the_key(db):
    """Breaks when the output of a command that takes its time, or comes in pieces, is not all read."""
    fill(open_shop(db), 3)
    key = db.cluster.key_file.read_text().strip()
    set_on(db, "amazon_pii.key_command", f"printf {key[:20]}; sleep 0.1; echo {key[20:]}")
    try:
        db.apply_policy(shop_policy())
        assert run_cycle(db)["redacted"] == 3
    finally:
        set_on(db, "amazon_pii.key_command", "")
    # The same key as the file's.
    assert retrieve(db, order_number(1))


def test_the_time_limit_leaves_no_trace(db):
    """Breaks when a timer that runs out late cancels what the session does next."""
    fill(open_shop(db), 20)
    set_on(db, "amazon_pii.statement_timeout", "1ms")
    try:
        db.apply_policy(shop_policy())
        for _ in range(20):
            hurry(db)
            run_cycle(db)
            assert db.value("SELECT count(*) FROM generate_series(1, 50000)", user="pii_admin") == 50000
    except psycopg2.Error as error:
        raise AssertionError("a time-out reached the session") from error
    finally:
        set_on(db, "amazon_pii.statement_timeout", "5min")
    hurry(db)
    run_cycle(db)
    assert set(states(db).values()) == {"redacted"}
