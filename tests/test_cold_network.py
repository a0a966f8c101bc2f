"""A cold server from which the network is cut: packets get lost, and nobody says so. The server is in a network namespace of its own."""
import psycopg2
import pytest
from cluster import wait_until
from cold import DATABASE, FOREIGN, ROLE, back, cold_server, shop_beside
from conftest import server_with
from network import FarServer
from support import Background, fill, order_number, order_value, run_cycle, shop_policy, states
from test_cold_faults import SLOW, recovers, says, shop_is_free, shop_is_free_meanwhile
from test_cold_returns import waiting
from test_returns import RETURNS, policy

# How long anybody waits is for our side to say. Together with the end of what was being sent that is less than this, in seconds.
PATIENCE = 60
LIMITS = {"connect_timeout": "2", "tcp_user_timeout": "2000", "keepalives_idle": "1", "keepalives_interval": "1", "keepalives_count": "2"}
WAYS = pytest.mark.parametrize("how", ["no answers", "unplugged"])


@pytest.fixture(scope="module")
def near():
    server = server_with(conf=["amazon_pii.archive_timeout = '5s'", "autovacuum = off"])
    yield server
    server.destroy()


@pytest.fixture
def cold():
    # It notices soon, too, that nobody is there any more.
    server = cold_server(FarServer, conf=["tcp_keepalives_idle = 1", "tcp_keepalives_interval = 1", "tcp_keepalives_count = 3"])
    yield server
    server.destroy()


@pytest.fixture
def far(near, cold):
    db = shop_beside(near, cold, LIMITS)
    yield db
    db.drop()


def nothing_is_left(db):
    """No transaction is open, and nothing of the shop's is locked."""
    others = "pid <> pg_backend_pid() AND datname = current_database()"
    assert db.sql(f"SELECT pid, state, query FROM pg_stat_activity WHERE {others} AND xact_start IS NOT NULL") == []
    assert db.sql("""SELECT l.relation::regclass, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                     WHERE c.relnamespace = 'shop'::regnamespace AND l.pid <> pg_backend_pid()""") == []
    shop_is_free(db)


def gives_up(db, cycle, orders):
    """The cycle ends by itself, and nothing was redacted."""
    shop_is_free_meanwhile(db, cycle.pid)
    counts = cycle.result(PATIENCE)[0]
    assert counts[2:4] == (0, 0) and counts[4] == orders
    assert set(states(db).values()) == {"original"}
    says(db, "")
    nothing_is_left(db)


@WAYS
def test_in_the_middle_of_sending(far, cold, how):
    """Breaks when our side waits for an answer for ever, takes what it has sent for archived, or sends it twice."""
    fill(far, 30)
    far.apply_policy(shop_policy(archive=FOREIGN))
    cold.sql(SLOW.replace("0.01", "0.05"), dbname=DATABASE)
    cycle = Background(far, "CALL amazon_pii.run_cycle('shop')")
    sending = "SELECT 1 FROM pg_stat_activity WHERE usename = %s AND query LIKE 'INSERT%%' AND state = 'active'"
    wait_until(lambda: cold.sql(sending, [ROLE]), interval=0.01)
    cold.wire.cut(how)
    gives_up(far, cycle, 30)
    # A new connection gets no further.
    gives_up(far, Background(far, "CALL amazon_pii.run_cycle('shop')"), 30)
    cold.wire.mend()
    cold.sql("DROP TRIGGER slow ON cold.document", dbname=DATABASE)
    recovers(far, cold, 30)


@WAYS
def test_while_a_connection_was_idle(far, cold, how):
    """A session's connection is open, and does not know. Breaks when its next use waits for ever, or the session never gets a new one."""
    fill(far, 3)
    far.apply_policy(shop_policy(archive=FOREIGN))
    # The session is one and the same.
    assert run_cycle(far)["redacted"] == 3
    connected = "SELECT pid FROM pg_stat_activity WHERE usename = %s"
    assert cold.sql(connected, [ROLE])
    cold.wire.cut(how)
    fill(far, 9, first=4)
    counts = run_cycle(far)
    assert (counts["redacted"], counts["failed"], counts["overdue"]) == (0, 0, 6)
    assert [o for o, s in states(far).items() if s == "redacted"] == [1, 2, 3]
    nothing_is_left(far)
    cold.wire.mend()
    recovers(far, cold, 9)


def test_the_server_left_while_nobody_could_hear(far, cold):
    """The server ends an idle connection, and we do not hear of it. Breaks when that costs more than one attempt."""
    fill(far, 3)
    far.apply_policy(shop_policy(archive=FOREIGN))
    assert run_cycle(far)["redacted"] == 3
    cold.wire.cut()
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s"
    assert cold.sql(ended, [ROLE])
    wait_until(lambda: not cold.sql("SELECT 1 FROM pg_stat_activity WHERE usename = %s", [ROLE]))
    cold.wire.mend()
    fill(far, 6, first=4)
    run_cycle(far)
    assert run_cycle(far)["overdue"] == 0
    recovers(far, cold, 6)


@WAYS
def test_people_get_an_answer(far, cold, how):
    """Breaks when peek waits for ever, or leaves the order locked."""
    fill(far, 3)
    far.apply_policy(shop_policy(archive=FOREIGN))
    run_cycle(far)
    ask = "SELECT amazon_pii.peek(%s, 'test')"
    assert "Gift 2" in str(far.value(ask, [order_number(2)], "pii_operator"))
    cold.wire.cut(how)
    for _ in range(2):
        # The first has a connection, the second needs one.
        call = Background(far, "SELECT * FROM amazon_pii.retrieve(%s, 'test')", [order_number(2)], "pii_operator")
        with pytest.raises(psycopg2.OperationalError) as caught:
            call.result(PATIENCE)
        assert caught.value.pgcode == "08006"
        nothing_is_left(far)
    assert order_value(far, 2) == "redacted"
    cold.wire.mend()
    assert "Gift 2" in str(far.value(ask, [order_number(2)], "pii_operator"))


def test_a_return_is_booked_all_the_same(far, cold):
    """P11. Breaks when an INSERT of the shop's asks a server from which no packets come."""
    far.psql(RETURNS)
    fill(far, 3)
    far.apply_policy(policy(archive=FOREIGN, retrieve_for=["shop_owner"]))
    run_cycle(far)
    cold.wire.cut()
    session = far.connect("shop_owner")
    session.cursor().execute("INSERT INTO shop.returns (order_id) VALUES (2)")
    # Whoever asks in vain is told.
    assert session.notices == []
    session.close()
    run_cycle(far)
    assert order_value(far, 2) == "redacted" and waiting(far) == 1
    nothing_is_left(far)
    back(cold)
    wait_until(lambda: run_cycle(far) and order_value(far, 2) == "retrieved", PATIENCE, 0.2)
    assert states(far)[2] == "original" and waiting(far) == 0
