"""Measures what the extension costs, beside what one would write by hand, on one throw-away server. Prints the table; with
--write, also keeps it. Sizes come from the environment: ORDERS, DUE, ROUNDS, FULL=1 for ten times the orders where the size
of the tables is the question."""
import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import report  # noqa: E402
from measures import Measures  # noqa: E402
from server import Bench, say, settings  # noqa: E402
from shop import KINDS  # noqa: E402

MARKS = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.S)


class Sizes:
    def __init__(self, quick):
        def given(name, default):
            return int(os.environ.get(name) or default)

        self.orders = given("ORDERS", 50_000 if quick else 1_000_000)
        self.due = given("DUE", 5_000 if quick else 100_000)
        self.rounds = given("ROUNDS", 1 if quick else 3)
        full = bool(given("FULL", 0))
        if not 100 <= self.due <= self.orders // 5:
            raise SystemExit("error: DUE is at least 100, and at most a fifth of ORDERS: every second order is Amazon's")
        # The same number due in tables of different sizes.
        self.same_due = self.due // 10
        self.tables = [self.orders // 10, self.orders]
        # Measured once, in a database of its own.
        self.large, self.large_due = (self.orders * 10, self.due * 10) if full else (0, 0)


def build(bench, sizes):
    bench.build("shop", sizes.orders, sizes.due)
    bench.build("ready", sizes.orders, sizes.due, extension=True)
    bench.build("empty without", 0, 0)
    bench.build("empty with", 0, 0, extension=True)
    for orders in sizes.tables:
        bench.build(f"due in {orders}", orders, sizes.same_due, extension=True)
    for kind in KINDS:
        if kind != "bigint":
            bench.build(kind, sizes.tables[0], sizes.same_due, extension=True, kind=kind)


def measure(sizes):
    with Bench() as bench, tempfile.TemporaryDirectory(prefix="apii-", dir="/tmp") as folder:
        # The server writes and reads the files of the import itself.
        os.chown(folder, bench.cluster.owner.pw_uid, bench.cluster.owner.pw_gid)
        build(bench, sizes)
        m = Measures(bench, sizes)
        m.export(folder)
        for turn in range(sizes.rounds):
            say(f"round {turn + 1} of {sizes.rounds}")
            steps = [m.bare, m.plain, m.aes, m.loop, m.cycle, m.two_workers, m.tables, m.memory_and_after, m.retrospect,
                     lambda: m.imports(folder), m.updates]
            for step in reversed(steps) if turn % 2 else steps:
                step()
            # It runs for as long as a cycle takes.
            m.latency()
        if sizes.large:
            m.large()
        return m


def write(measures, conditions):
    (HERE / "RESULT.md").write_text(report.markdown(measures, conditions))
    (HERE / "result.svg").write_text(report.svg(measures))
    readme = HERE.parent / "README.md"
    text, marks = MARKS.subn(lambda m: m[1] + report.readme(measures) + m[2], readme.read_text())
    assert marks == 1, "README.md has lost its marks"
    readme.write_text(text)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="few orders, one round: tells whether it works, not how fast")
    arguments.add_argument("--write", action="store_true", help="keep the result in bench/ and in the README")
    options = arguments.parse_args()
    started = time.monotonic()
    measures = measure(Sizes(options.quick))
    conditions = "; ".join(line for line in settings() if line.startswith(("shared_buffers", "work_mem", "max_wal_size")))
    print(report.markdown(measures, conditions))
    if options.write:
        write(measures, conditions)
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
