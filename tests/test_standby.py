"""A streaming standby does nothing of its own, and takes the cycle over when it is promoted."""
from cluster import wait_until
from conftest import Database, add_extension, new_database, server_with
from every_state import EVERY_STATE, build, found, goes_on, shown, tables_with
from support import add_order, number, refused, standby_of

OURS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'amazon_pii%'"


def test_a_promoted_standby_takes_the_cycle_over():
    """Breaks when a standby works or fails loudly before it is promoted, or when somebody has to start the cycle after that."""
    # Its worker is idle, so that there is something to do when it is lost.
    primary = server_with(preload=True, conf=["amazon_pii.naptime = '1s'", "amazon_pii.enabled = off"])
    try:
        db = new_database(primary, "template0")
        add_extension(primary, db.name)
        orders = build(db)
        add_order(db, 16, customer=None)
        with standby_of(primary, preload=True) as standby:
            standby.configure("amazon_pii.enabled = on")
            standby.reload()
            there = Database(standby, db.name)
            # What is written from now on is streamed, not copied.
            add_order(db, 17, customer=None)
            wait_until(lambda: tables_with(there, "Name17") == ["addresses"])
            assert shown(there) == shown(db) and found(there) == {**orders, 16: "scheduled", 17: "scheduled"}
            assert standby.sql(OURS) == [(0,)]
            assert there.value("SELECT overdue >= 2 FROM amazon_pii.status", user="pii_auditor")
            for call in ("run_cycle()", "sanitize_copy('shop')", "rotate_key()"):
                with refused("25006", "during recovery"):
                    there.sql(f"CALL amazon_pii.{call}", user="pii_admin")
            for call, user in (("disable_policy('shop', 'test')", "pii_admin"), (f"retrieve('{number(1)}', 'test')", "pii_operator"),
                               (f"release('{number(6)}')", "pii_operator")):
                with refused("25006"):
                    there.sql(f"SELECT amazon_pii.{call}", user=user)
            with refused("55000", "during recovery"):
                there.sql("SELECT amazon_pii.peek(%s, 'test')", [number(1)], "pii_operator")
            position = standby.sql("SELECT pg_last_wal_replay_lsn()")
            primary.stop("immediate")
            assert tables_with(there, "Name17") == ["addresses"] and standby.sql("SELECT pg_last_wal_replay_lsn()") >= position
            assert "ERROR" not in "".join(line for line in standby.log_text().splitlines(True) if "amazon_pii worker" in line)
            standby.run("pg_ctl", "-D", standby.data, "-w", "-s", "promote")
            wait_until(lambda: {**found(there), 7: "failed"} == {**orders, 16: "redacted", 17: "redacted"}, 60)
            assert tables_with(there, "Name16") == tables_with(there, "Name17") == []
            wait_until(lambda: there.value("SELECT worker FROM amazon_pii.status", user="pii_auditor") == "running")
            assert there.value("SELECT started_by FROM amazon_pii.runs ORDER BY run_id DESC LIMIT 1") == "postgres"
            there.sql("ALTER SYSTEM SET amazon_pii.enabled = off")
            standby.reload()
            wait_until(lambda: there.value("SHOW amazon_pii.enabled") == "off")
            goes_on(there, {**EVERY_STATE, 16: "redacted", 17: "redacted"})
            there.drop()
    finally:
        primary.destroy()
