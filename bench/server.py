"""The server that is measured, its template databases, and the instruments."""
import os
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import shop
from cluster import MAJOR, SUPERUSER, Cluster, wait_until
from conftest import TEMPLATE, Database, new_database, prepare


def say(text):
    print(text, flush=True)


def memory():
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def percentile(values, percent):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def settings():
    """As an administrator would set up a server of this size. It is durable. What would begin at any moment, autovacuum
    and timed checkpoints, is off: each measurement begins after a checkpoint, on analyzed tables."""
    shared = min(max(memory() // 8, 128 << 20), 4 << 30) >> 20
    return [
        f"shared_buffers = {shared}MB", "work_mem = 64MB", "maintenance_work_mem = 512MB", "max_wal_size = 8GB",
        "checkpoint_timeout = 1h", "wal_level = replica", "autovacuum = off", "max_worker_processes = 16",
        # The worker has its place, and keeps to a database where nothing is measured.
        "amazon_pii.databases = 'postgres'", "log_min_messages = error",
    ]


class Bench:
    """A server with template databases. Every measurement gets a fresh copy of one."""

    def __init__(self):
        self.cluster = Cluster(preload=True, fsync=True, conf=settings())
        self.templates = {}

    def __enter__(self):
        self.cluster.start()
        prepare(self.cluster)
        return self

    def __exit__(self, *_):
        self.cluster.destroy()

    def build(self, name, orders, due, extension=False, kind="bigint"):
        """A template database with that many orders. With the extension, all of Amazon's were flagged at import; the sweep
        of the day was done before there was anything to find."""
        say(f"building template {name}: {orders:,} orders" + (f", {due:,} due" if extension else ""))
        db = new_database(self.cluster, TEMPLATE if extension else "template0")
        shop.create(db, kind)
        if extension:
            db.apply_policy(shop.policy(kind))
            db.sql("CALL amazon_pii.run_cycle('shop')", user="pii_admin")
        shop.fill(db, orders, due, kind)
        shop.add_foreign_keys(db, kind)
        self.settle(db)
        self.templates[name] = db.name
        self.cluster.close_connections()

    def settle(self, db):
        """As autovacuum would leave it."""
        db.sql("VACUUM (FREEZE, ANALYZE)")

    @contextmanager
    def copy(self, template):
        """A fresh copy, dropped afterwards. The copy is on disk, and so is everything else, when the block begins."""
        db = self.copied(template)
        try:
            yield db
        finally:
            db.drop()

    def only(self, template):
        """The template itself, which is none any more: it is as large as a disk may have room for once."""
        self.cluster.sql("CHECKPOINT")
        return Database(self.cluster, self.templates.pop(template))

    def copied(self, template):
        strategy = " STRATEGY = FILE_COPY" if MAJOR >= 15 else ""
        name = f"copy_{time.monotonic_ns()}"
        self.cluster.sql("CHECKPOINT")
        self.cluster.sql(f'CREATE DATABASE {name} TEMPLATE "{self.templates[template]}"{strategy}')
        self.cluster.sql(f"GRANT CREATE ON DATABASE {name} TO shop_owner")
        self.cluster.sql("CHECKPOINT")
        return Database(self.cluster, name)

    # Instruments

    def timed(self, db, statement, user=SUPERUSER):
        """(seconds, bytes of WAL, rows) of a statement in a session that is open already."""
        session = db.session(user)
        before = self.wal()
        with session.cursor() as cursor:
            started = time.perf_counter()
            cursor.execute(statement)
            seconds = time.perf_counter() - started
            rows = cursor.fetchall() if cursor.description else None
        return seconds, self.wal() - before, rows

    def wal(self):
        return int(self.cluster.sql("SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0])

    def cycle(self, db, orders, sweep=False, before=0):
        """A cycle in which exactly that many orders are archived and redacted, besides those that were before."""
        # Whoever calls it has looked at something before: the session's catalog caches and library are there.
        db.sql("SELECT * FROM amazon_pii.policies", user="pii_admin")
        seconds, wal, _ = self.timed(db, f"CALL amazon_pii.run_cycle('shop', {sweep})", "pii_admin")
        done = db.sql("SELECT redacted, failed, overdue FROM amazon_pii.status")
        if done != [(before + orders, 0, 0)]:
            raise SystemExit(f"error: {orders} orders should have been redacted; redacted, failed and overdue are {done}")
        return seconds, wal

    def set(self, name, value):
        """A setting of the whole server, in force when this returns."""
        self.cluster.sql(f"ALTER SYSTEM SET {name} = '{value}'")
        self.cluster.reload()
        wait_until(lambda: self.cluster.sql(f"SELECT setting FROM pg_settings WHERE name = '{name}'")[0][0] == str(value))

    def scans(self, db):
        """{table: sequential scans} of the shop, the state and the archive, when every session of the database has ended and
        told its share."""
        for session in db._sessions.values():
            session.close()
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        wait_until(lambda: self.cluster.sql(others, [db.name])[0][0] == 0)
        return dict(db.sql("SELECT relname, seq_scan FROM pg_stat_user_tables WHERE schemaname IN ('shop', 'amazon_pii_archive') "
                           "OR relname IN ('order_state', 'record_state', 'audit_entry')"))


class Sampler(threading.Thread):
    """Calls `look` again and again until the block ends; what it returned is in `seen`."""

    def __init__(self, look, interval=0.05):
        super().__init__(daemon=True)
        self.look, self.interval, self.seen, self._stop_it = look, interval, [], threading.Event()

    def run(self):
        while not self._stop_it.wait(self.interval):
            self.seen.append(self.look())

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._stop_it.set()
        self.join()


def private_bytes(pid):
    """Memory that would be free if the process ended: what it has written to its private mappings. Pages of shared memory count as
    private, too, while only one process has touched them; those mappings are left out."""
    total, private = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if len(words) > 1 and len(words[1]) == 4 and words[1][3] in "ps":
            private = words[1][3] == "p"
        elif private and words[0] == "Private_Dirty:":
            total += int(words[1]) * 1024
    return total
