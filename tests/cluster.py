"""A throw-away PostgreSQL server: its own data directory, socket directory and key file, started, stopped and killed by
its own process ids. As root, everything of the server runs as the user `postgres`."""
import atexit
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg2

PG_CONFIG = os.environ.get("PG_CONFIG") or "/usr/lib/postgresql/15/bin/pg_config"
SUPERUSER = "postgres"
# The server listens on its own socket directory alone, so one number serves them all.
PORT = 5432


def pg_config(option, program=PG_CONFIG):
    return subprocess.check_output([program, f"--{option}"], text=True).strip()


class Programs:
    """A server's programs and libraries, by its pg_config."""

    def __init__(self, program):
        self.bindir = Path(pg_config("bindir", program))
        self.libdir = Path(pg_config("libdir", program))
        self.major = int(pg_config("version", program).split()[1].split(".")[0])


HERE = Programs(PG_CONFIG)
BINDIR = HERE.bindir
MAJOR = HERE.major


def wait_until(predicate, timeout=30, interval=0.05, message=None):
    """Returns the predicate's first true result; a test waits on conditions, never for a time."""
    deadline = time.monotonic() + timeout
    while True:
        result = predicate()
        if result:
            return result
        if time.monotonic() > deadline:
            raise TimeoutError(message or f"no success within {timeout} s: {predicate}")
        time.sleep(interval)


def clean_environment(home, programs=HERE):
    """Neither the caller's libpq settings nor RUST_BACKTRACE (pgrx would put backtraces into errors) reach a server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "RUST_", "CARGO", "LC_"))}
    kept.update(HOME=str(home), LANG="C.UTF-8", LC_ALL="C.UTF-8", TZ="UTC", PATH=f"{programs.bindir}:{os.environ['PATH']}")
    # The modules of a server that was moved would load the system's libpq, of another version.
    kept["LD_LIBRARY_PATH"] = str(programs.libdir)
    return kept


class Cluster:
    """`conf` is lines for postgresql.conf; `preload` loads the library at start, which brings the background worker;
    `environment` is what the server finds in its environment besides the usual; `programs` are those of another server than the
    one that is tested, `initdb` more options."""

    _running = set()

    def __init__(self, preload=False, conf=(), fsync=False, key=True, environment=None, programs=HERE, initdb=()):
        self.programs = programs
        self.environment = dict(environment or {})
        self.owner = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
        # Socket paths are limited to 107 bytes: a short name below /tmp, wherever TMPDIR points.
        self.base = Path(tempfile.mkdtemp(prefix="apii-", dir="/tmp"))
        self.data = self.base / "data"
        self.log = self.base / "log"
        self.key_file = self.base / "key"
        self.port = PORT
        os.chown(self.base, self.owner.pw_uid, self.owner.pw_gid)
        self._connections = []
        if key:
            self.write_key(self.key_file)
        try:
            self.run("initdb", "-D", self.data, "-U", SUPERUSER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", *initdb)
            lines = [
                "listen_addresses = ''",
                f"unix_socket_directories = '{self.base}'",
                f"port = {self.port}",
                "max_connections = 50",
                "shared_buffers = 32MB",
                "timezone = 'UTC'",
                "log_timezone = 'UTC'",
                "lc_messages = 'C'",
                "log_line_prefix = '%m [%p] %q%u@%d '",
                # Imports by two-phase commit and by logical replication are part of what is promised.
                "max_prepared_transactions = 10",
                "wal_level = logical",
            ]
            if not fsync:
                lines += ["fsync = off", "synchronous_commit = off", "full_page_writes = off"]
            if key:
                lines.append(f"amazon_pii.key_file = '{self.key_file}'")
            if preload:
                lines.append("shared_preload_libraries = 'amazon_pii'")
            self.configure(*lines, *conf)
        except BaseException:
            shutil.rmtree(self.base, ignore_errors=True)
            raise

    @classmethod
    def running(cls):
        """The servers of this process that run."""
        return list(cls._running)

    # Files and processes of the server's user

    def as_owner(self, *command):
        prefix = ["runuser", "-u", self.owner.pw_name, "--"] if os.geteuid() == 0 else []
        return prefix + [str(word) for word in command]

    def run(self, program, *arguments, check=True, **options):
        """Runs one of the server's programs as the server's user."""
        return self._run(self.as_owner(self.programs.bindir / program, *arguments), check, **options)

    def client(self, program, *arguments, check=True, env=None, **options):
        """Runs a client program as whoever runs the tests, set up to connect here as the superuser."""
        where = {"PGHOST": str(self.base), "PGPORT": str(self.port), "PGUSER": SUPERUSER, **(env or {})}
        return self._run([str(self.programs.bindir / program), *map(str, arguments)], check, where, **options)

    def _run(self, command, check, env=None, **options):
        done = subprocess.run(
            command, env={**clean_environment(self.base, self.programs), **(env or {})}, text=True, cwd=options.pop("cwd", "/"),
            stdin=options.pop("stdin", None if "input" in options else subprocess.DEVNULL),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}\n{self.log_text()[-4000:]}")
        return done

    def write_key(self, path, mode=0o600):
        """A new random key file that only the server's user can read."""
        path = Path(path)
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n")
        os.chown(path, self.owner.pw_uid, self.owner.pw_gid)
        path.chmod(mode)
        return path

    def configure(self, *lines):
        """Appends lines to postgresql.conf; the last one of a name counts. Takes effect at reload() or restart()."""
        with open(self.data / "postgresql.conf", "a") as file:
            file.write("\n".join(lines) + "\n")

    # Life

    @property
    def pid(self):
        """The postmaster's process id, or None."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n")[0])
        except (OSError, ValueError):
            return None
        return pid if alive(pid) else None

    def start(self, check=True):
        # pg_ctl's child inherits standard output, which therefore must not be a pipe that somebody waits on.
        with open(os.devnull, "w") as nothing:
            command = self.as_owner(self.programs.bindir / "pg_ctl", "-D", self.data, "-l", self.log, "-w", "-t", "60", "-s", "start")
            done = subprocess.run(
                command, env={**clean_environment(self.base, self.programs), **self.environment}, cwd="/", stdin=nothing, stdout=nothing,
                stderr=nothing,
            )
        if done.returncode and check:
            raise RuntimeError(f"the server does not start:\n{self.log_text()[-4000:]}")
        if not done.returncode:
            Cluster._running.add(self)
        return done.returncode == 0

    def stop(self, mode="fast"):
        """`fast`, `immediate` or `smart`, by way of pg_ctl and this data directory."""
        self.close_connections()
        if self.pid:
            self.run("pg_ctl", "-D", self.data, "-m", mode, "-w", "-t", "60", "-s", "stop")
        Cluster._running.discard(self)

    def restart(self, mode="fast"):
        self.stop(mode)
        self.start()

    def reload(self):
        self.run("pg_ctl", "-D", self.data, "-s", "reload")

    def children(self):
        """The process ids of the postmaster's children: backends, workers and all."""
        return children_of(self.pid) if self.pid else []

    def kill9(self):
        """SIGKILL to the postmaster and every child of it, as a power cut would: nothing gets to clean up."""
        postmaster = self.pid
        assert postmaster, "the server is not running"
        # A stopped postmaster forks no more, so the list of its children is complete.
        os.kill(postmaster, signal.SIGSTOP)
        wait_until(lambda: process_state(postmaster)[0] == "T", interval=0.001, message="the postmaster does not stop")
        victims = [postmaster, *children_of(postmaster)]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        wait_until(lambda: not any(alive(pid) for pid in victims), message="killed processes are still there")
        # Where nobody reaps orphans the dead postmaster's id stays taken, and its lock files would be believed.
        for left in (self.data / "postmaster.pid", self.base / f".s.PGSQL.{self.port}.lock"):
            left.unlink(missing_ok=True)
        Cluster._running.discard(self)
        self.close_connections()

    def destroy(self):
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.base, ignore_errors=True)

    def leave(self):
        """The server outlives this process; whoever asked for that stops it."""
        Cluster._running.discard(self)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.destroy()

    def log_text(self):
        try:
            return self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # Sessions

    def connect(self, user=SUPERUSER, dbname="postgres", autocommit=True, **options):
        """A psycopg2 connection. It is closed when the server is stopped, if not before."""
        connection = psycopg2.connect(
            host=str(self.base), port=self.port, user=user, dbname=dbname, **{"application_name": "test", **options}
        )
        connection.autocommit = autocommit
        self._connections.append(connection)
        return connection

    def close_connections(self):
        for connection in self._connections:
            connection.close()
        self._connections.clear()

    def sql(self, query, params=None, user=SUPERUSER, dbname="postgres"):
        """One statement in a session of its own; its rows, or None."""
        connection = self.connect(user, dbname)
        try:
            with connection.cursor() as cursor:
                cursor.execute(query, params)
                return cursor.fetchall() if cursor.description else None
        finally:
            connection.close()
            self._connections.remove(connection)

    def psql(self, script, dbname="postgres", user=SUPERUSER, check=True, variables=()):
        """Runs a file (a Path) or a text by psql, stopping at the first error; the result has `stdout` and `returncode`."""
        arguments = ["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", user, "-d", dbname]
        for name, value in dict(variables).items():
            arguments += ["-v", f"{name}={value}"]
        if isinstance(script, Path):
            return self.client("psql", *arguments, "-f", script.resolve(), check=check)
        return self.client("psql", *arguments, "-f", "-", check=check, input=script)

    def create_database(self, name, template="template0"):
        """A worker that is looking at the template for a moment blocks the copy: tried again until it has gone."""

        def create():
            try:
                self.sql(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
                return True
            except psycopg2.errors.ObjectInUse:
                return False

        wait_until(create, message=f"{template} stays in use")

    def drop_database(self, name):
        def drop():
            try:
                self.sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
                return True
            except psycopg2.errors.ObjectInUse:
                return False

        wait_until(drop, message=f"{name} stays in use")


def process_state(pid):
    """(state, parent) from /proc, or None. The program's name stands in brackets and may hold anything."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1])


def alive(pid):
    state = process_state(pid)
    return state is not None and state[0] not in "ZX"


def children_of(parent):
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            state = process_state(entry)
            if state and state[1] == parent and state[0] not in "ZX":
                found.append(int(entry))
    return found


@atexit.register
def destroy_what_is_left():
    for cluster in Cluster.running():
        cluster.destroy()
