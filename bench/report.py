"""What was measured, as a table and as a plot: each measure as a share of its goal."""
import os
import re
from datetime import date
from statistics import median
from xml.sax.saxutils import escape

from cluster import pg_config
from server import memory

LATER = "not yet"


class Row:
    """A measure and its goal; `label` is what the plot calls it. Without a value, `shown` says why."""

    def __init__(self, label, what, goal, unit, value, raw, shown=None):
        self.label, self.what, self.goal, self.unit, self.value, self.raw = label, what, goal, unit, value, raw
        self.shown = shown or ("–" if value is None else f"{number(value)} {unit}")

    @property
    def share(self):
        return None if self.value is None or self.goal is None else self.value / self.goal

    @property
    def goal_text(self):
        return "" if self.goal is None else f"≤ {number(self.goal, True)} {self.unit}"


def number(value, exact=False):
    if exact:
        return f"{value:g}"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(value):
    return f"{value * 1e6:.0f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"


def rows(measures):
    """The goals, and what was found. Medians of the rounds."""
    s = measures.sizes
    found = {name: median(values) for name, values in measures.found.items()}
    out = []

    def why(*names):
        return next((measures.skipped[n] for n in names if n in measures.skipped), LATER)

    def ratio(label, what, goal, above, below, show=seconds):
        if above in found and below in found:
            out.append(Row(label, what, goal, "×", found[above] / found[below], f"{show(found[above])} : {show(found[below])}"))
        else:
            out.append(Row(label, what, goal, "×", None, "", why(above, below)))

    def amount(label, what, goal, unit, name, scale, raw):
        if name in found:
            out.append(Row(label, what, goal, unit, found[name] * scale, raw(found)))
        else:
            out.append(Row(label, what, goal, unit, None, "", why(name)))

    def megabytes(value):
        return f"{value / 1e6:.0f} MB"

    ratio("cycle : plain", f"cycle over {s.due:,} due orders, one worker : plain", 1.5, "cycle", "plain")
    ratio("cycle, two workers : plain", "the same, two workers : plain", 1.0, "two workers", "plain")
    costs = {f"due in {orders}": orders for orders in s.tables} | ({"due in large": s.large} if s.large else {})
    low, high = min(costs, key=found.get), max(costs, key=found.get)
    sizes = ", ".join(f"{orders:,}" for orders in costs.values())
    ratio("small and large tables", f"cost of a due order, {s.same_due:,} due, in tables of {sizes} orders: highest : lowest", 1.25, high, low)
    for kind, goal, text in (("partitioned", 1.25, "100 partitions by date"), ("uuid", 1.2, "uuid keys"),
                             ("composite", 1.2, "composite keys")):
        ratio(text, f"cost of a due order, {text} : plain table, bigint", goal, kind, f"due in {s.tables[0]}")
    # What only tables of that size can tell is told of the largest that there are.
    of, orders, due = ("large ", s.large, s.large_due) if s.large else ("", s.orders, s.due)
    amount("nothing due", f"cycle with nothing due, {orders:,} orders; no table is scanned", 5, "ms", of + "idle", 1e3,
           lambda f: seconds(f[of + "idle"]))
    amount("private memory", f"private memory of a cycle, {due:,} due", 100, "MB", of + "memory", 1e-6,
           lambda f: f"{f[of + 'memory'] / 1e6:.1f} MB")
    amount("private memory, end : beginning", "the same, batches of the ninth tenth : of the first", 1.05, "×", of + "memory growth", 1, lambda f: "")
    ratio("import", f"import, COPY of {s.orders:,} orders with addresses, customers, invoices : without the extension", 1.2,
          "import with", "import without")
    ratio("import, orders alone", "the orders table alone", 1.5, "import orders with", "import orders without")
    ratio("other orders updated one by one", "UPDATE of another channel's orders, one by one : without the extension", 1.05,
          "update single with", "update single without")
    ratio("other orders updated together", "the same, one statement for many", 1.05, "update set with", "update set without")
    ratio("application's p99 during a cycle", "application's latency during a cycle, p99 : without one", 1.5,
          "latency during", "latency without")
    if "longest during" in found:
        out[-1].raw += f", longest {seconds(found['longest during'])}"
    ratio("WAL of a cycle : bare", "WAL of a cycle : bare", 1.6, "cycle wal", "bare wal", megabytes)
    amount("retrieval, p99", f"retrieval of an order, {due:,} archived, p99; no table is scanned", 30, "ms", of + "retrieve p99", 1e3,
           lambda f: f"p50 {seconds(f[of + 'retrieve p50'])}, p99 {seconds(f[of + 'retrieve p99'])}")
    ratio("sweep : count(*)", f"sweep of {orders:,} orders, all known : SELECT count(*) by one process", 2.0, of + "sweep", of + "count")
    out.append(Row("", "flagging of existing orders at the first enabling", None, "µs an order",
                   found["retrospect"] / ((s.orders + 1) // 2) * 1e6, seconds(found["retrospect"])))
    if of + "verify" in found:
        out.append(Row("", f"verify, {due:,} orders redacted, in tables of {orders:,}", None, "s a million orders",
                       found[of + "verify"] / orders * 1e6,
                       f"{seconds(found[of + 'verify'])}, {megabytes(found[of + 'verify memory'])} of private memory"))
    else:
        out.append(Row("", "verify", None, "", None, "", why(of + "verify")))
    if "rotation" in found:
        out.append(Row("", f"rotation of the master key, {s.due:,} orders archived", None, "µs an order",
                       found["rotation"] / s.due * 1e6, seconds(found["rotation"])))
    else:
        out.append(Row("", "rotation of the master key", None, "", None, "", why("rotation")))
    return out


def baseline_rows(measures):
    """(name, what it is, seconds, in terms of plain)"""
    meaning = {
        "bare": "four set-based UPDATEs in one transaction, nothing kept",
        "plain": "the same, after four INSERT … SELECT of JSON documents in clear",
        "aes": "plain with pgcrypto's encrypt_iv and random vectors",
        "loop": "a PL/pgSQL loop with pgp_sym_encrypt, order by order; measured on a tenth of the orders, times ten",
        "cycle": "amazon_pii: sealed, archived, read back, compared, overwritten, audited",
        "two workers": "the same with two workers",
    }
    plain = median(measures.found["plain"])
    for name, text in meaning.items():
        if measures.found.get(name):
            value = median(measures.found[name])
            yield name, text, seconds(value), f"{value / plain:.2f}"
        else:
            yield name, text, "", measures.skipped.get(name, LATER)


def machine():
    cores = len(os.sched_getaffinity(0))
    version = re.search(r"[\d.]+", pg_config("version")).group()
    return f"{cores} cores, {round(memory() / 2**30)} GB of RAM, PostgreSQL {version}"


def table(header, lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines]) + "\n"


def when(measures):
    rounds = f"median of {measures.sizes.rounds} rounds" if measures.sizes.rounds > 1 else "one round"
    if measures.sizes.large:
        rounds += f"; {measures.sizes.large:,} orders once"
    return f"{date.today().isoformat()}, {machine()}, {rounds}"


def markdown(measures, settings):
    s = measures.sizes
    goals = table(["what", "goal", "measured", "raw"], [[r.what, r.goal_text, r.shown, r.raw] for r in rows(measures)])
    ways = table(["way", "what it is", "time", ": plain"], baseline_rows(measures))
    return f"""# How fast

{when(measures)}. Written by `make bench`.

{s.orders:,} orders, each with an address, a customer and an invoice in four tables with the usual indexes; every second order is
Amazon's, {s.due:,} are due. Each measurement has a fresh copy of one database, after a checkpoint; the ways take turns. The
server is durable; autovacuum is off while it is measured: {settings}.

{goals}
## The ways to overwrite the same rows

{ways}"""


def readme(measures):
    """The part of the README between the marks."""
    lines = [[r.what, r.goal_text, r.shown] for r in rows(measures) if r.goal is not None]
    return f"""![Each measure as a share of its goal](bench/result.svg)

{when(measures)}; times in [bench/RESULT.md](bench/RESULT.md):

{table(["what", "goal", "measured"], lines)}"""


WIDTH, LEFT, RIGHT, TOP, STEP, BAR = 960, 250, 200, 64, 30, 16
# Beyond this many goals a bar is cut off.
LONGEST = 2.5

STYLE = """
  .page { fill: #ffffff } text { fill: #24292f; font: 13px sans-serif } .small { fill: #57606a; font-size: 12px }
  .title { font-size: 15px; font-weight: bold } .met { fill: #2f7d4f } .missed { fill: #c2571a } .goal { stroke: #24292f }
  .grid { stroke: #d0d7de }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3 } .small { fill: #9198a1 } .met { fill: #3fb070 } .missed { fill: #f0883e }
    .goal { stroke: #e6edf3 } .grid { stroke: #30363d }
  }
"""


def svg(measures):
    plotted = [r for r in rows(measures) if r.share is not None]
    height = TOP + STEP * len(plotted) + 24
    unit = (WIDTH - LEFT - RIGHT) / LONGEST
    end = TOP + STEP * len(plotted)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">',
        "<title>amazon_pii: each measure as a share of its goal</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        '<text class="title" x="16" y="26">Each measure as a share of its goal (shorter is better)</text>',
        f'<text class="small" x="16" y="46">{escape(when(measures))}</text>',
    ]
    for half in range(1, int(LONGEST * 2) + 1):
        x = LEFT + unit * half / 2
        mark = "goal" if half == 2 else "grid"
        parts.append(f'<line class="{mark}" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{end}"/>')
        label = "goal" if half == 2 else f"{half / 2:g} ×"
        parts.append(f'<text class="small" x="{x:.1f}" y="{end + 16}" text-anchor="middle">{label}</text>')
    for i, row in enumerate(plotted):
        y = TOP + STEP * i
        length = min(row.share, LONGEST) * unit
        kind = "met" if row.share <= 1 else "missed"
        parts.append(f'<text x="{LEFT - 10}" y="{y + 13}" text-anchor="end">{escape(row.label)}</text>')
        parts.append(f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 16}" y="{y + 13}">{escape(row.shown)}<tspan class="small" dx="8">goal '
                     f'{escape(row.goal_text)}</tspan></text>')
    parts.append("</svg>\n")
    return "\n".join(parts)
