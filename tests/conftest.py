"""Fixtures: a plain server for the whole run, a preloaded one per module that asks for it, a fresh database per test."""
import itertools
import json
import re
from pathlib import Path

import pytest

from cluster import SUPERUSER, Cluster

ROOT = Path(__file__).resolve().parent.parent

# Logins. None of them is a superuser; what each may do comes from its memberships alone. `pii_admin` may apply policies
# to shop_owner's tables and to nobody else's.
ROLES = """
CREATE ROLE shop_owner LOGIN;
CREATE ROLE other_owner LOGIN;
CREATE ROLE nobody_special LOGIN;
CREATE ROLE pii_admin LOGIN;
CREATE ROLE pii_operator LOGIN;
CREATE ROLE pii_auditor LOGIN;
GRANT shop_owner TO pii_admin;
"""
# The extension's roles exist once it was created in some database of the server.
CAPABILITIES = """
GRANT amazon_pii_admin TO pii_admin;
GRANT amazon_pii_operator TO pii_operator;
GRANT amazon_pii_auditor TO pii_auditor;
"""
TEMPLATE = "with_amazon_pii"
numbers = itertools.count(1)


def prepare(cluster):
    """Roles, and a template database that has the extension."""
    cluster.sql(ROLES)
    cluster.create_database(TEMPLATE)
    add_extension(cluster, TEMPLATE)
    cluster.sql(CAPABILITIES)


def add_extension(cluster, dbname):
    cluster.sql("CREATE EXTENSION amazon_pii", dbname=dbname)


class Database:
    """One database of a cluster; a session per user is opened when first needed and kept."""

    def __init__(self, cluster, name):
        self.cluster = cluster
        self.name = name
        self._sessions = {}

    def connect(self, user=SUPERUSER, autocommit=True, **options):
        return self.cluster.connect(user, self.name, autocommit, **options)

    def session(self, user=SUPERUSER):
        connection = self._sessions.get(user)
        if connection is None or connection.closed:
            connection = self._sessions[user] = self.connect(user)
        return connection

    def sql(self, query, params=None, user=SUPERUSER):
        """Runs a statement and commits it; its rows as a list of tuples, or None."""
        with self.session(user).cursor() as cursor:
            cursor.execute(query, params)
            return cursor.fetchall() if cursor.description else None

    def value(self, query, params=None, user=SUPERUSER):
        """The single value of a query."""
        rows = self.sql(query, params, user)
        assert len(rows) == 1 and len(rows[0]) == 1, f"not one value: {rows}"
        return rows[0][0]

    def psql(self, script, user=SUPERUSER, **options):
        return self.cluster.psql(script, self.name, user, **options)

    def apply_policy(self, document, user="pii_admin"):
        return self.value("SELECT amazon_pii.apply_policy(%s::jsonb)", [json.dumps(document)], user)

    def check_policy(self, document, user="pii_admin"):
        return self.sql("SELECT * FROM amazon_pii.check_policy(%s::jsonb)", [json.dumps(document)], user)

    def has_contrib(self, extension):
        return self.value("SELECT count(*) FROM pg_available_extensions WHERE name = %s", [extension]) == 1

    def need_contrib(self, extension):
        """Skips the test where the server came without this contrib module."""
        if not self.has_contrib(extension):
            pytest.skip(f"this server has no {extension}")

    def drop(self):
        for connection in self._sessions.values():
            connection.close()
        self.cluster.drop_database(self.name)


def new_database(cluster, template=TEMPLATE):
    name = f"t{next(numbers)}"
    cluster.create_database(name, template)
    # Privileges on a database are not copied from its template.
    cluster.sql(f"GRANT CREATE ON DATABASE {name} TO shop_owner, other_owner")
    return Database(cluster, name)


def copy_of(db):
    """A database that was made from this one. Whoever is connected stays away for that moment, a worker included."""
    name = f"{db.name}_copy"
    db.cluster.sql(f"ALTER DATABASE {db.name} ALLOW_CONNECTIONS false")
    db.cluster.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [db.name])
    for user in list(db._sessions):
        db._sessions.pop(user).close()
    db.cluster.create_database(name, db.name)
    db.cluster.sql(f"ALTER DATABASE {db.name} ALLOW_CONNECTIONS true")
    return Database(db.cluster, name)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that failed beside a cold server shows what that server saw."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for server in Cluster.running():
            if hasattr(server, "last_words"):
                report.sections.append(("the cold server", server.last_words()))


@pytest.fixture(scope="session")
def cluster():
    """The plain server: the library is not preloaded, so no worker runs."""
    server = Cluster()
    try:
        server.start()
        prepare(server)
        yield server
    finally:
        server.destroy()


@pytest.fixture
def db(cluster):
    database = new_database(cluster)
    yield database
    database.drop()


def server_with(before_start=None, **options):
    """A running server with the logins of the tests, and no database yet: one with a worker could not be copied from.
    `before_start` is called with it first."""
    server = Cluster(**options)
    try:
        if before_start:
            before_start(server)
        server.start()
        server.sql(ROLES)
        server.create_database("roles")
        add_extension(server, "roles")
        server.sql(CAPABILITIES)
        server.drop_database("roles")
    except BaseException:
        server.destroy()
        raise
    return server


@pytest.fixture(scope="module")
def preloaded():
    """A server with the background worker, for one module. The worker looks often."""
    server = server_with(preload=True, conf=["amazon_pii.naptime = '1s'"])
    yield server
    server.destroy()


@pytest.fixture
def preloaded_db(preloaded):
    """No template that has the extension here: the worker would visit it, and a visited database cannot be copied."""
    database = new_database(preloaded, "template0")
    add_extension(preloaded, database.name)
    yield database
    database.drop()


@pytest.fixture(scope="session")
def version():
    """The extension's version as Cargo.toml has it."""
    return re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M).group(1)


@pytest.fixture(scope="session")
def spapi():
    """Amazon's own sample payloads. They are not part of this repository."""
    folder = ROOT.parent / "shared" / "spapi"
    if not folder.is_dir():
        pytest.skip("Amazon's sample payloads are not here (../shared/spapi)")
    return folder
