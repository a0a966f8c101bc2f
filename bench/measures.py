"""What is measured. Each function measures once, on copies of its own, and adds to the results; a round calls them all."""
import secrets
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import baselines
import shop
from cluster import BINDIR, clean_environment
from server import Sampler, percentile, private_bytes, say
from support import Background

RETRIEVALS = 200
IDLE_CALLS = 50
SINGLE_UPDATES = 5000
UPDATE_TURNS = 7
# Seconds in which an application's sessions begin.
WARMING = 2


class Measures:
    def __init__(self, bench, sizes):
        self.bench, self.sizes = bench, sizes
        # name -> one value a round
        self.found = defaultdict(list)
        self.skipped = {}

    def add(self, name, value):
        self.found[name].append(value)

    def tell(self, name, text):
        say(f"  {name}: {text}")

    # The job, and the same by hand

    def baseline(self, name, statement, extension=None, share=1):
        if name in self.skipped:
            return
        with self.bench.copy("shop") as db:
            if extension:
                if not db.has_contrib(extension):
                    self.skipped[name] = f"this server has no {extension}"
                    return
                db.sql(f"CREATE EXTENSION {extension}")
            db.sql(baselines.BACKUP)
            seconds, wal, _ = self.bench.timed(db, statement)
            if share == 1:
                shop.check_overwritten(db, self.sizes.due)
        self.add(name, seconds * share)
        self.add(f"{name} wal", wal * share)
        self.tell(name, f"{seconds * share:.2f} s")

    def bare(self):
        self.baseline("bare", baselines.BARE)

    def plain(self):
        self.baseline("plain", baselines.PLAIN)

    def aes(self):
        self.baseline("aes", baselines.AES, "pgcrypto")

    def loop(self):
        self.baseline("loop", baselines.loop(self.sizes.due // 10), "pgcrypto", share=10)

    def cycle(self):
        with self.bench.copy("ready") as db:
            seconds, wal = self.bench.cycle(db, self.sizes.due)
            shop.check_overwritten(db, self.sizes.due)
        self.add("cycle", seconds)
        self.add("cycle wal", wal)
        self.tell("cycle", f"{seconds:.2f} s")

    def two_workers(self):
        """Counts only if a second process was seen at work in the database."""
        if "two workers" in self.skipped:
            return
        self.bench.set("amazon_pii.workers", 2)
        try:
            with self.bench.copy("ready") as db:
                db.sql("SELECT 1", user="pii_admin")
                own = db.session("pii_admin").info.backend_pid
                helpers = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND pid <> %s AND backend_type LIKE 'amazon_pii%%'"
                watcher = self.bench.cluster.connect()

                def look():
                    with watcher.cursor() as cursor:
                        cursor.execute(helpers, [db.name, own])
                        return cursor.fetchone()[0]

                with Sampler(look, 0.02) as sampler:
                    seconds, _ = self.bench.cycle(db, self.sizes.due)
                watcher.close()
                shop.check_overwritten(db, self.sizes.due)
        finally:
            self.bench.set("amazon_pii.workers", 1)
        if not any(sampler.seen):
            self.skipped["two workers"] = "not yet"
            return
        self.add("two workers", seconds)
        self.tell("two workers", f"{seconds:.2f} s")

    def tables(self):
        """The same number due in tables of different sizes, and in tables of other kinds."""
        kinds = [kind for kind in shop.KINDS if kind != "bigint"]
        for name in [f"due in {orders}" for orders in self.sizes.tables] + kinds:
            with self.bench.copy(name) as db:
                seconds, _ = self.bench.cycle(db, self.sizes.same_due)
            self.add(name, seconds / self.sizes.same_due)
            self.tell(name, f"{seconds / self.sizes.same_due * 1e6:.0f} µs a due order")

    # What comes after, and what must cost nothing

    def memory_and_after(self):
        """Private memory in the course of a cycle; then, on what it left, cycles with nothing due and retrievals."""
        with self.bench.copy("ready") as db:
            self.memory(db, self.sizes.due)
            self.bench.settle(db)
            self.idle(db)
            self.verify(db)
            self.retrievals(db)
            self.rotation(db)

    def large(self):
        """Ten times the orders, where the size of the tables is the question: once, one thing after the other in one database."""
        s, of = self.sizes, "large "
        self.bench.build("large", s.large, 0, extension=True)
        db = self.bench.only("large")
        # The first one finds what was imported, and is not measured.
        self.bench.cycle(db, 0, sweep=True)
        self.bench.settle(db)
        self.sweep(db, of)
        self.make_due(db, 0, s.same_due)
        seconds, _ = self.bench.cycle(db, s.same_due)
        self.add("due in large", seconds / s.same_due)
        self.tell("due in large", f"{seconds / s.same_due * 1e6:.0f} µs a due order")
        self.idle(db, of)
        self.make_due(db, s.same_due, s.large_due)
        self.memory(db, s.large_due, of, before=s.same_due)
        self.bench.settle(db)
        self.verify(db, of)
        self.retrievals(db, of)

    def make_due(self, db, already, due):
        say(f"making {due:,} orders due")
        shop.make_due(db, already, due)
        self.bench.settle(db)

    def memory(self, db, due, of="", before=0):
        db.sql("SELECT * FROM amazon_pii.policies", user="pii_admin")
        pid = db.session("pii_admin").info.backend_pid
        watcher = db.connect()

        def look():
            with watcher.cursor() as cursor:
                cursor.execute("SELECT COALESCE(max(redacted), 0) FROM amazon_pii.runs WHERE finished_at IS NULL")
                return cursor.fetchone()[0], private_bytes(pid)

        with Sampler(look) as sampler:
            seconds, _ = self.bench.cycle(db, due, before=before)
        watcher.close()
        # Batches: the first tenth, and the last but one. After the last batch comes ANALYZE, which has a sample of each table in memory.
        first = [size for done, size in sampler.seen if 0 < done <= due / 10]
        last = [size for done, size in sampler.seen if due * 8 / 10 <= done < due * 9 / 10]
        if not first or not last:
            self.skipped[of + "memory"] = "the cycle was too short to be watched"
            return
        self.add(of + "memory", max(size for _, size in sampler.seen))
        self.add(of + "memory growth", max(last) / max(first))
        self.tell(of + "memory", f"{max(first) / 1e6:.1f} MB at the beginning, {max(last) / 1e6:.1f} MB at the end; {seconds:.2f} s")

    def idle(self, db, of=""):
        before = self.bench.scans(db)
        db.sql("SELECT * FROM amazon_pii.policies", user="pii_admin")
        times = [self.bench.timed(db, "CALL amazon_pii.run_cycle('shop')", "pii_admin")[0] for _ in range(IDLE_CALLS)]
        self.nothing_scanned(db, before, "cycles with nothing due")
        self.add(of + "idle", median(times))
        self.tell(of + "nothing due", f"{median(times) * 1e3:.2f} ms")

    def sweep(self, db, of=""):
        swept, _ = self.bench.cycle(db, 0, sweep=True)
        # The pass is the work of one process; so is the count.
        db.sql("SET max_parallel_workers_per_gather = 0")
        counted, _, _ = self.bench.timed(db, "SELECT count(*) FROM shop.orders WHERE channel = 'amazon'")
        self.add(of + "sweep", swept)
        self.add(of + "count", counted)
        self.tell(of + "sweep", f"{swept:.2f} s, count(*) {counted:.2f} s")

    def verify(self, db, of=""):
        """A search in which nothing is found, and the private memory of its session."""
        db.sql("SELECT * FROM amazon_pii.policies", user="pii_admin")
        pid = db.session("pii_admin").info.backend_pid
        with Sampler(lambda: private_bytes(pid)) as sampler:
            seconds, _, rows = self.bench.timed(db, "SELECT * FROM amazon_pii.verify('shop', 'schema')", "pii_admin")
        if rows:
            raise SystemExit(f"error: verify has found {rows}")
        self.add(of + "verify", seconds)
        self.add(of + "verify memory", max(sampler.seen, default=0))
        self.tell(of + "verify", f"{seconds:.2f} s, {self.found[of + 'verify memory'][-1] / 1e6:.0f} MB")

    def retrievals(self, db, of=""):
        numbers = [n for (n,) in db.sql(
            "SELECT order_number FROM amazon_pii.orders WHERE status = 'redacted' ORDER BY md5(order_number) LIMIT %s", [RETRIEVALS])]
        before = self.bench.scans(db)
        session = db.session("pii_operator")
        times = []
        for number in numbers:
            with session.cursor() as cursor:
                started = time.perf_counter()
                cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'measurement')", [number])
                times.append(time.perf_counter() - started)
        self.nothing_scanned(db, before, "retrievals")
        self.add(of + "retrieve p50", median(times))
        self.add(of + "retrieve p99", percentile(times, 99))
        self.tell(of + "retrieval", f"p50 {median(times) * 1e3:.1f} ms, p99 {percentile(times, 99) * 1e3:.1f} ms")

    def rotation(self, db):
        """Every data key under a new master key."""
        key = self.bench.cluster.key_file
        old = key.read_text()
        key.write_text(secrets.token_hex(32) + "\n" + old)
        try:
            seconds, _, rows = self.bench.timed(db, "CALL amazon_pii.rotate_key()", "pii_admin")
        finally:
            # The next database begins with the first key again.
            key.write_text(old)
        if rows != [(self.sizes.due, 0)]:
            raise SystemExit(f"error: {self.sizes.due} data keys should have been wrapped anew, not {rows}")
        self.add("rotation", seconds)
        self.tell("rotation of the master key", f"{seconds:.2f} s")

    def nothing_scanned(self, db, before, what):
        after = self.bench.scans(db)
        if after != before:
            raise SystemExit(f"error: {what} have scanned {', '.join(t for t in after if after[t] != before[t])}")

    def retrospect(self):
        """Flagging what was there before the policy, and a sweep that finds everything known."""
        orders = self.sizes.orders
        with self.bench.copy("shop") as db:
            db.sql("CREATE EXTENSION amazon_pii")
            db.apply_policy(shop.policy(**shop.FAR))
            seconds, _ = self.bench.cycle(db, 0)
            flagged = db.value("SELECT count(*) FROM amazon_pii.orders")
            assert flagged == (orders + 1) // 2, f"{flagged} orders were flagged"
            self.add("retrospect", seconds)
            self.tell("flagging in retrospect", f"{seconds:.2f} s")
            self.bench.settle(db)
            self.sweep(db)

    # What the shop itself notices

    def export(self, folder):
        """Files for COPY, written once."""
        with self.bench.copy("shop") as db:
            for table in shop.TABLES:
                db.sql(f"COPY shop.{table} TO '{folder}/{table}'")

    def imports(self, folder):
        for name in ("without", "with"):
            with self.bench.copy(f"empty {name}") as db:
                times = {}
                for table in ("customers", "orders", "addresses", "invoices"):
                    times[table], _, _ = self.bench.timed(db, f"COPY shop.{table} FROM '{folder}/{table}'")
                if name == "with":
                    flagged = db.value("SELECT count(*) FROM amazon_pii.order_state")
                    assert flagged == (self.sizes.orders + 1) // 2, f"{flagged} orders were flagged"
            self.add(f"import {name}", sum(times.values()))
            self.add(f"import orders {name}", times["orders"])
        self.tell("import", ", ".join(f"{n} {self.found[f'import {n}'][-1]:.2f} s (orders {self.found[f'import orders {n}'][-1]:.2f} s)"
                                      for n in ("without", "with")))

    def updates(self):
        """In turns on two copies that stay: a difference of some percent drowns in anything else."""
        orders = self.sizes.orders
        rows = min(SINGLE_UPDATES, orders // 4)
        statements = {
            # A loop in the server: a client's round trips would hide what an update costs.
            "single": f"DO $$ BEGIN FOR i IN 1..{rows} LOOP "
                      f"UPDATE shop.orders SET total = total + 1 WHERE id = {orders // 2 * 2 - 2 * rows} + 2 * i; END LOOP; END $$",
            "set": f"UPDATE shop.orders SET total = total + 1 WHERE channel = 'web' AND id > {orders * 3 // 5}",
        }
        times = defaultdict(list)
        copies = {"without": self.bench.copied("shop"), "with": self.bench.copied("ready")}
        try:
            for turn in range(UPDATE_TURNS):
                for name in sorted(copies, reverse=turn % 2 == 1):
                    for kind, statement in statements.items():
                        seconds, _, _ = self.bench.timed(copies[name], statement, "shop_owner")
                        # The first turn fills the caches.
                        if turn:
                            times[kind, name].append(seconds)
        finally:
            for db in copies.values():
                db.drop()
        for (kind, name), values in times.items():
            self.add(f"update {kind} {name}", median(values))
        self.tell("update", ", ".join(f"{k} {median(times[k, 'with']) / median(times[k, 'without']):.3f} ×" for k in statements))

    # What the shop's users notice

    SCRIPT = """\\set id random(1, {orders})
BEGIN;
SELECT status, total FROM shop.orders WHERE id = :id;
SELECT city FROM shop.addresses WHERE order_id = :id;
UPDATE shop.orders SET total = total + 1 WHERE id = :id;
END;
"""

    def latency(self):
        if not (BINDIR / "pgbench").exists():
            self.skipped["latency during"] = "this server has no pgbench"
            return
        cycle = self.found["cycle"][-1]
        alone = min(max(cycle, 5), 20)
        jobs = []
        with self.bench.copy("ready") as db:
            timer = threading.Timer(WARMING + alone, lambda: jobs.append(Background(db, "CALL amazon_pii.run_cycle('shop')")))
            timer.start()
            seen = self.traffic(db, int(WARMING + alone + 2 * cycle + 2))
            timer.join()
            jobs[0].result(600)
            began, ended = db.sql("SELECT extract(epoch FROM min(started_at))::float, extract(epoch FROM max(finished_at))::float "
                                  "FROM amazon_pii.runs WHERE redacted > 0")[0]
        # The application's sessions are there when the cycle begins; what comes when it is over does not count.
        first = min(at for at, _ in seen) + WARMING
        without = [latency for at, latency in seen if first <= at < began]
        during = [latency for at, latency in seen if began <= at <= ended]
        if not during:
            self.skipped["latency during"] = "the cycle was too short to be watched"
            return
        self.add("latency without", percentile(without, 99))
        self.add("latency during", percentile(during, 99))
        self.add("longest during", max(during))
        self.tell("latency", f"p99 {percentile(without, 99) * 1e3:.2f} ms, during a cycle {percentile(during, 99) * 1e3:.2f} ms, "
                             f"longest {max(during) * 1e3:.0f} ms, of {len(during)}")

    def traffic(self, db, seconds):
        """[(time of its end, latency)] of transactions that arrive at a given rate, each counted from its arrival."""
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script"
            script.write_text(self.SCRIPT.format(orders=self.sizes.orders))
            command = [BINDIR / "pgbench", "-n", "-c", "4", "-R", "200", "-T", str(seconds), "-M", "prepared", "-l",
                       "--log-prefix", f"{folder}/log", "-f", script, "-h", self.bench.cluster.base, "-p", str(self.bench.cluster.port),
                       "-U", "shop_owner", db.name]
            done = subprocess.run(list(map(str, command)), env=clean_environment(folder), text=True, capture_output=True)
            if done.returncode:
                raise SystemExit(f"error: pgbench: {done.stderr}")
            lines = [line.split() for log in Path(folder).glob("log.*") for line in log.read_text().splitlines()]
        return [(int(words[4]) + int(words[5]) / 1e6, int(words[2]) / 1e6) for words in lines if words[2].isdigit()]
