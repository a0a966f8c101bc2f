"""pg_upgrade from the server of UPGRADE_FROM, a pg_config, to the one that is tested. Needs the extension in two servers, so that it is
run by `make test-upgrade` only."""
import os

from cluster import HERE, Cluster, Programs, wait_until
from conftest import Database, add_extension, new_database, server_with
from every_state import build, goes_on, shown, tables_with
from support import add_order, refused

OLD = Programs(os.environ["UPGRADE_FROM"])


def upgraded(old):
    """A server with what the old one had, which is stopped."""
    # What initdb does by itself differs between versions; pg_upgrade wants the same.
    new = Cluster(preload=True, conf=["amazon_pii.naptime = '1s'", "amazon_pii.enabled = off"],
                  initdb=["--no-data-checksums"] if HERE.major >= 18 else [])
    try:
        new.key_file.write_text(old.key_file.read_text())
        done = new.run("pg_upgrade", "-b", OLD.bindir, "-B", HERE.bindir, "-d", old.data, "-D", new.data, "-U", "postgres", "-s", new.base,
                       cwd=new.base, check=False)
        logs = sorted((new.data / "pg_upgrade_output.d").glob("*/log/*.log"))
        assert done.returncode == 0, done.stdout + "".join(f"\n{log.name}: {log.read_text()[-1500:]}" for log in logs)
        new.start()
        return new
    except BaseException:
        new.destroy()
        raise


def test_every_order_goes_on_after_pg_upgrade():
    """Breaks when the catalog of the extension, its states or the archive do not survive, or when the worker starts before somebody has said
    that this is the original."""
    assert OLD.major < HERE.major
    old = server_with(programs=OLD)
    new = None
    try:
        db = new_database(old, "template0")
        add_extension(old, db.name)
        orders = build(db)
        before = shown(db)
        old.stop()
        new = upgraded(old)
        there = Database(new, db.name)
        assert there.value("SHOW server_version_num")[:2] == str(HERE.major)
        assert shown(there) == before
        said = "SELECT last_error FROM amazon_pii.status"
        add_order(there, 16, customer=None)
        there.sql("ALTER SYSTEM SET amazon_pii.enabled = on")
        new.reload()
        wait_until(lambda: "this one is a copy" in (there.value(said, user="pii_auditor") or ""))
        assert tables_with(there, "Name16") == ["addresses"]
        there.sql("ALTER SYSTEM SET amazon_pii.enabled = off")
        new.reload()
        wait_until(lambda: there.value("SHOW amazon_pii.enabled") == "off")
        assert there.value("SELECT amazon_pii.adopt_copy()", user="pii_admin") == 1
        goes_on(there, {**orders, 16: "redacted"})
        with refused("42501", "append-only"):
            there.sql("DELETE FROM amazon_pii.audit_entry")
    finally:
        for server in filter(None, (new, old)):
            server.destroy()
