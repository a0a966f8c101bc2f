"""The extension can be created and dropped, and the servers that tests run on behave as the other tests rely on."""
import pytest
from cluster import Cluster, alive, wait_until


def test_extension_has_the_version_of_the_crate(db, version):
    assert db.value("SELECT extversion FROM pg_extension WHERE extname = 'amazon_pii'") == version
    available = db.value("SELECT default_version FROM pg_available_extensions WHERE name = 'amazon_pii'")
    assert available == version


def test_library_loads(db):
    db.sql("LOAD 'amazon_pii'")


def test_preloaded_server_starts_and_has_the_extension(preloaded_db, version):
    assert preloaded_db.value("SHOW shared_preload_libraries") == "amazon_pii"
    assert preloaded_db.value("SELECT extversion FROM pg_extension WHERE extname = 'amazon_pii'") == version


def test_test_logins_are_not_superusers(db):
    assert db.sql("SELECT rolname FROM pg_roles WHERE rolsuper AND rolname !~ '^pg_'") == [("postgres",)]


def test_server_killed_at_once_comes_back_with_what_was_committed():
    with Cluster(fsync=True) as server:
        server.sql("CREATE TABLE kept (n int)")
        server.sql("INSERT INTO kept SELECT generate_series(1, 1000)")
        open_transaction = server.connect(autocommit=False)
        open_transaction.cursor().execute("INSERT INTO kept VALUES (0)")
        processes = [server.pid, *server.children()]
        assert len(processes) > 3
        server.kill9()
        assert not any(alive(pid) for pid in processes)
        assert server.pid is None
        server.start()
        assert server.sql("SELECT count(*), min(n) FROM kept") == [(1000, 1)]
        assert "was interrupted" in server.log_text()


def test_waiting_ends_with_an_error_when_nothing_happens():
    with pytest.raises(TimeoutError, match="never"):
        wait_until(lambda: False, timeout=0.1, message="never")
