"""A subtransaction of ours ends on the cold server, too, with a savepoint that is released there: when just that fails, what was begun is
rolled back here, and nothing is left open."""
import contextlib

import pytest
from cold import DATABASE, FOREIGN, ROLE, Wire, cold_server, join
from conftest import add_extension, new_database, server_with
from support import add_order, number, open_shop, order_value, run_cycle, shop_policy


class Scissors(Wire):
    """A wire that breaks as soon as somebody sends these words over it, once."""

    at = None

    def _copy(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.at and self.at in data:
                    self.at = None
                    source.close()
                    target.close()
                    return
                target.sendall(data)


@pytest.fixture(scope="module")
def near():
    server = server_with()
    yield server
    server.destroy()


@pytest.fixture
def cold():
    server = cold_server()
    # What is sent can only be read where it is not encrypted.
    with (server.data / "pg_hba.conf").open("a") as hba:
        hba.write(f"hostnossl {DATABASE} {ROLE} 127.0.0.1/32 scram-sha-256\n")
    server.reload()
    server.wire.close()
    server.wire = Scissors(server.port_there)
    yield server
    server.destroy()


@pytest.fixture
def far(near, cold):
    db = new_database(near, "template0")
    add_extension(db.cluster, db.name)
    db.need_contrib("postgres_fdw")
    join(open_shop(db), cold, {"sslmode": "disable"})
    yield db
    db.drop()


def test_a_cycle_whose_connection_breaks_at_a_release(far, cold):
    """Breaks when the release is not caught like what came before it: then an outer subtransaction ends the inner one, and the cycle stands
    in one that nobody ends. And when the cycle does not go on by itself, or something is overwritten without proof."""
    add_order(far, 1)
    far.apply_policy(shop_policy(archive=FOREIGN))
    far.session("pii_admin").close()
    cold.wire.at = b"RELEASE SAVEPOINT"
    assert run_cycle(far)["redacted"] == 0
    assert cold.wire.at is None and order_value(far, 1) == "scheduled"
    assert "08006" in far.value("SELECT last_error FROM amazon_pii.status", user="pii_auditor")
    assert run_cycle(far)["redacted"] == 1
    assert order_value(far, 1) == "redacted" and far.value("SELECT last_error FROM amazon_pii.status") is None
    assert "Name1" in str(far.value("SELECT amazon_pii.peek(%s, 'test')", [number(1)], "pii_operator"))
