"""A server whose clock stands where a test puts it, so that weeks pass in seconds. The server's processes, and nobody else, get
their time from libfaketime; timeouts, which count by the monotonic clock, stay real."""
from datetime import datetime, timedelta, timezone
from pathlib import Path

from conftest import Database, add_extension, server_with

LIBRARIES = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


class Simulated:
    """A server, and the moment that it believes in."""

    def __init__(self, start, **options):
        assert LIBRARIES, "libfaketime is missing: scripts/setup installs it"
        self.now = start
        self.cluster = server_with(before_start=self._fake, **options)

    def _fake(self, cluster):
        self.file = cluster.base / "clock"
        self._write()
        cluster.environment.update(
            LD_PRELOAD=str(LIBRARIES[0]), FAKETIME_TIMESTAMP_FILE=str(self.file), FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1", NO_FAKE_STAT="1",
        )

    def _write(self):
        # In one piece: a process may read the clock at any moment.
        new = self.file.with_suffix(".new")
        new.write_text(self.now.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S\n"))
        new.chmod(0o644)
        new.replace(self.file)

    def move_to(self, moment):
        assert moment >= self.now, "time goes one way"
        self.now = moment
        self._write()

    def hours(self, count):
        """Each of the next hours, the clock set to it."""
        for _ in range(count):
            self.move_to(self.now + timedelta(hours=1))
            yield self.now

    def days(self, count):
        """Each of the next days, the clock set to it."""
        for _ in range(count):
            self.move_to(self.now + timedelta(days=1))
            yield self.now


def running(start):
    """For a fixture: a server that believes in this moment, until the tests that use it are over."""
    world = Simulated(start)
    yield world
    world.cluster.destroy()


def database_in(world, open_tables):
    """For a fixture: a database on such a server, with the extension and what `open_tables` makes in it."""
    name = f"walk{world.now:%m%d%H}"
    world.cluster.create_database(name)
    add_extension(world.cluster, name)
    world.cluster.sql(f"GRANT CREATE ON DATABASE {name} TO shop_owner")
    db = Database(world.cluster, name)
    yield open_tables(db)
    db.drop()


def utc(*parts):
    return datetime(*parts, tzinfo=timezone.utc)
