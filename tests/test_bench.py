"""What `make bench` rests on: its ways do the same work, its instruments count what they say, its report can be read. Nothing
is timed here, and no result is written."""
import mmap
import os
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from conftest import ROOT, new_database
from support import run_cycle

sys.path.insert(0, str(ROOT / "bench"))

import baselines  # noqa: E402
import report  # noqa: E402
import shop  # noqa: E402
from measures import Measures  # noqa: E402
from server import private_bytes  # noqa: E402

ORDERS, DUE = 400, 40
CELLS = "SELECT * FROM (" + " UNION ALL ".join(
    f"SELECT '{table}', id, ARRAY[{', '.join(columns)}]::text[] FROM shop.{table}" for table, (_, columns) in shop.PII.items()
) + ") AS c ORDER BY 1, 2"


@pytest.fixture
def stocked(cluster):
    """Makes databases with the shop in it."""
    made = []

    def make(kind="bigint", policy=False):
        db = new_database(cluster)
        made.append(db)
        shop.create(db, kind)
        if policy:
            db.apply_policy(shop.policy(kind))
        shop.fill(db, ORDERS, DUE, kind)
        shop.add_foreign_keys(db, kind)
        return db

    yield make
    for db in made:
        db.drop()


@pytest.mark.parametrize("way", ["BARE", "PLAIN", "AES"])
def test_by_hand_the_same_cells_are_overwritten_as_by_a_cycle(stocked, way):
    ours, by_hand = stocked(policy=True), stocked()
    assert run_cycle(ours)["redacted"] == DUE
    if way == "AES":
        by_hand.need_contrib("pgcrypto")
        by_hand.sql("CREATE EXTENSION pgcrypto")
    by_hand.sql(baselines.BACKUP)
    by_hand.sql(getattr(baselines, way))
    shop.check_overwritten(by_hand, DUE)
    assert by_hand.sql(CELLS) == ours.sql(CELLS)
    kept = by_hand.value("SELECT (SELECT count(*) FROM backup.document) + (SELECT count(*) FROM backup.sealed)")
    assert kept == (0 if way == "BARE" else 4 * DUE)


def test_the_loop_does_its_part_of_them(stocked):
    db = stocked()
    db.need_contrib("pgcrypto")
    db.sql("CREATE EXTENSION pgcrypto")
    db.sql(baselines.BACKUP)
    db.sql(baselines.loop(DUE // 10))
    assert db.value("SELECT count(*) FROM shop.addresses WHERE name = '[Redacted]'") == DUE // 10


@pytest.mark.parametrize("kind", [kind for kind in shop.KINDS if kind != "bigint"])
def test_other_kinds_of_tables_hold_the_same(stocked, kind):
    db = stocked(kind, policy=True)
    assert run_cycle(db)["redacted"] == DUE
    shop.check_overwritten(db, DUE)
    if kind == "partitioned":
        assert db.value("SELECT count(*) FROM pg_inherits WHERE inhparent = 'shop.orders'::regclass") == 100


def test_incomplete_work_is_not_measured(stocked):
    db = stocked()
    with pytest.raises(SystemExit, match="should have been overwritten"):
        shop.check_overwritten(db, DUE)


def test_shared_memory_is_nobodys_own():
    size = 32 << 20
    before = private_bytes(os.getpid())
    shared = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    shared.write(b"x" * size)
    in_between = private_bytes(os.getpid())
    own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own.write(b"x" * size)
    # Writing needs a buffer of its own, which is freed; and libraries that others load are shared from then on.
    assert private_bytes(os.getpid()) - in_between > size / 2
    assert in_between - before < size / 2


def measured(**found):
    sizes = SimpleNamespace(orders=1_000_000, due=100_000, rounds=3, tables=[100_000, 1_000_000], same_due=10_000, large=0, large_due=0)
    m = Measures(None, sizes)
    m.skipped["aes"] = "this server has no pgcrypto"
    values = {"bare": [4, 9, 5], "plain": [8.0], "cycle": [12.0], "retrospect": [30.0], "due in 100000": [1e-4],
              "due in 1000000": [1.5e-4], **found}
    for name, rounds in values.items():
        m.found[name] = rounds
    return m


def test_the_table_shows_ratios_goals_and_what_is_missing():
    text = report.markdown(measured(), "settings")
    assert "| cycle over 100,000 due orders, one worker : plain | ≤ 1.5 × | 1.50 × | 12.00 s : 8.00 s |" in text
    assert "highest : lowest | ≤ 1.25 × | 1.50 × | 150 µs : 100 µs |" in text
    assert "| the same, two workers : plain | ≤ 1 × | not yet |  |" in text
    assert "| bare | four set-based UPDATEs in one transaction, nothing kept | 5.00 s | 0.62 |" in text
    assert "| this server has no pgcrypto |" in text
    assert os.uname().nodename not in text and str(ROOT) not in text


def test_large_tables_are_told_of_where_they_were_measured():
    m = measured(idle=[0.001], **{"large idle": [0.002], "due in large": [2e-4]})
    m.sizes.large, m.sizes.large_due = 10_000_000, 1_000_000
    text = report.markdown(m, "settings")
    assert "in tables of 100,000, 1,000,000, 10,000,000 orders: highest : lowest | ≤ 1.25 × | 2.00 × | 200 µs : 100 µs |" in text
    assert "| cycle with nothing due, 10,000,000 orders; no table is scanned | ≤ 5 ms | 2.00 ms |" in text
    assert "10,000,000 orders once" in text


def test_the_plot_is_xml_and_shows_what_misses_its_goal():
    picture = ElementTree.fromstring(report.svg(measured(idle=[0.001], **{"two workers": [800.0]})))
    bars = [e.get("class") for e in picture.iter("{http://www.w3.org/2000/svg}rect") if e.get("class") != "page"]
    assert bars == ["met", "missed", "missed", "met"]
    width = float(picture.get("width"))
    assert all(float(e.get("x")) + float(e.get("width")) < width for e in picture.iter("{http://www.w3.org/2000/svg}rect") if e.get("x"))
    assert "prefers-color-scheme: dark" in picture.find("{http://www.w3.org/2000/svg}style").text


def test_the_readme_has_a_place_for_the_result():
    import bench

    assert len(bench.MARKS.findall((ROOT / "README.md").read_text())) == 1
