"""Runs tests/pg_regress and tests/isolation by PostgreSQL's own drivers: one test a file, each in a fresh database that
has the extension, so that no file depends on another. A file without expected output fails."""
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import BINDIR, pg_config

HERE = Path(__file__).resolve().parent
OWN_DRIVERS = Path(pg_config("pgxs")).parent.parent / "test"
DEBIAN_DRIVERS = Path("/usr/lib/postgresql/15/lib/pgxs/src/test")


@functools.cache
def driver(name):
    """The server's own driver, or Debian's where the server came without: drivers are clients."""
    for folder in (OWN_DRIVERS, DEBIAN_DRIVERS):
        path = folder / name
        if path.exists() and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.fail(f"no {name} that runs, neither in {OWN_DRIVERS} nor in {DEBIAN_DRIVERS}")


def names(folder, ending):
    return sorted(path.stem for path in (HERE / folder).glob("*" + ending))


def run(db, program, inputdir, names, output):
    """Where the results are is part of the failure, so that a person can read and judge them."""
    arguments = [
        f"--inputdir={inputdir}", f"--outputdir={output}", f"--bindir={BINDIR}", f"--dbname={db.name}", "--use-existing",
        f"--host={db.cluster.base}", f"--port={db.cluster.port}", "--user=postgres",
    ]
    for name in names:
        assert (inputdir / "expected" / f"{name}.out").exists(), f"{name} has no expected output"
    done = db.cluster.client(program, *arguments, *names, check=False)
    if done.returncode:
        kept = HERE.parent / "target" / "regress" / names[-1]
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(output, kept)
        diffs = kept / "regression.diffs"
        text = diffs.read_text(errors="replace") if diffs.exists() else done.stdout
        pytest.fail(f"{text}\nresults are kept in {kept}", pytrace=False)


@pytest.mark.parametrize("name", [n for n in names("pg_regress/sql", ".sql") if n != "setup"])
def test_regress(db, name, tmp_path):
    folder = HERE / "pg_regress"
    first = ["setup"] if (folder / "sql" / "setup.sql").exists() else []
    run(db, driver("regress/pg_regress"), folder, [*first, name], tmp_path)


@pytest.mark.parametrize("name", names("isolation/specs", ".spec"))
def test_isolation(db, name, tmp_path):
    run(db, driver("isolation/pg_isolation_regress"), HERE / "isolation", [name], tmp_path)
