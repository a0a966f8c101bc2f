"""A second, real PostgreSQL server that holds the archive: over TLS with a certificate that is checked, by a password, in a table
made with what `archive_ddl` prints; and a wire in between that can be cut."""
import contextlib
import os
import re
import secrets
import socket
import threading
from datetime import datetime, timezone

import trustme
from cluster import Cluster, wait_until
from conftest import add_extension, new_database
from support import open_shop

# What the certificate names, and where connections go without looking that name up.
HOST = "localhost"
ADDRESS = "127.0.0.1"
FOREIGN = {"foreign_table": "cold.document"}
ROLE = "amazon_pii_archiver"
DATABASE = "archive"


class Port:
    """A TCP port that is ours until close(), whether or not anything listens there. The kernel gives it to no other process, nor to a
    connection that goes out: the socket that keeps it was bound alone. Only what sets SO_REUSEADDR and asks for this very number, such
    as our server, can be bound beside it."""

    def __init__(self):
        self._keeper = socket.socket()
        self._keeper.bind((ADDRESS, 0))
        self._keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.number = self._keeper.getsockname()[1]

    def listener(self):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, self.number))
        listener.listen(50)
        return listener

    def close(self):
        self._keeper.close()


class Wire:
    """A TCP proxy. `cut()` swallows what comes on connections that are open, and refuses new ones, without a reset. `break_at` ends a
    connection instead of that packet of ours, the next being 1. `trouble` is what went wrong without being asked to, for whoever wonders why
    a test failed."""

    def __init__(self, target):
        self.target = target
        self.whole = threading.Event()
        self.whole.set()
        self.delay = 0
        self.break_at = None
        self.trouble = []
        self._pairs = []
        self._listener = None
        self._place = Port()
        self.address, self.port = ADDRESS, self._place.number
        self.mend()

    def mend(self):
        if self._listener:
            return
        self._listener = self._place.listener()
        self.whole.set()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener):
        while True:
            try:
                near, _ = listener.accept()
            except OSError as error:
                if listener is self._listener:
                    self._note("no connection is taken any more", error)
                return
            try:
                far = socket.create_connection((ADDRESS, self.target))
            except OSError as error:
                self._note("the server is not reached", error)
                near.close()
                continue
            self._pairs.append((near, far))
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(a, b, a is near), daemon=True).start()

    def _note(self, what, error):
        self.trouble.append(f"{datetime.now(timezone.utc):%H:%M:%S.%f} {what}: {error!r}")

    def _breaks(self):
        if self.break_at is None:
            return False
        self.break_at -= 1
        if self.break_at > 0:
            return False
        self.break_at = None
        return True

    def _copy(self, source, target, ours):
        try:
            while data := source.recv(65536):
                if not self.whole.is_set():
                    # Read, acknowledged, and gone.
                    continue
                if self.delay:
                    threading.Event().wait(self.delay)
                if ours and self._breaks():
                    raise OSError
                target.sendall(data)
            if self.whole.is_set():
                target.shutdown(socket.SHUT_WR)
        except OSError:
            # One end is gone, killed perhaps. The other must hear of it: nobody has cut the wire.
            if self.whole.is_set():
                for end in (source, target):
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def cut(self):
        self.whole.clear()
        self._stop_listening()

    def _stop_listening(self):
        listener, self._listener = self._listener, None
        if listener:
            # A thread that waits for a connection would keep it open.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def close(self):
        self._stop_listening()
        self._place.close()
        for pair in self._pairs:
            for end in pair:
                end.close()


class ColdServer(Cluster):
    """The server, its certificate, and the wire to it. One that is elsewhere says where it listens, who comes, and what leads there."""

    def __init__(self, conf=(), listens=ADDRESS, comes=ADDRESS, wire=None):
        self._place = Port() if wire is None else None
        self.port_there = self._place.number if self._place else wire.port
        super().__init__(key=False, conf=[
            f"listen_addresses = '{listens}'", f"port = {self.port_there}", "ssl = on", "log_statement = 'all'",
            "log_connections = on", "log_disconnections = on", *conf,
        ])
        # The number of the socket's file, too.
        self.port = self.port_there
        self.password = secrets.token_hex(16)
        authority = trustme.CA()
        self.ca = self.base / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        certificate = authority.issue_cert(HOST)
        for path, blob in ((self.data / "server.key", certificate.private_key_pem), (self.data / "server.crt", certificate.cert_chain_pems[0])):
            path.touch(mode=0o600)
            path.write_bytes(blob.bytes())
            os.chown(path, self.owner.pw_uid, self.owner.pw_gid)
        self.ca.chmod(0o644)
        self.base.chmod(0o755)
        hba = self.data / "pg_hba.conf"
        hba.write_text(f"local all all trust\nhostssl {DATABASE} {ROLE} {comes}/32 scram-sha-256\n")
        self.wire = wire or Wire(self.port_there)

    def destroy(self):
        try:
            super().destroy()
        finally:
            self.wire.close()
            if self._place:
                self._place.close()

    def last_words(self):
        """What may explain why it was not reached."""
        lines = [line[:200] for line in self.log_text().splitlines() if re.match(r"\d{4}-", line)]
        told = [line for line in lines if not re.search("LOG:  (execute|statement)|DETAIL:|host=.local.|user=postgres ", line)]
        return "\n".join([*told[-60:], "…", *lines[-20:], *(f"wire: {line}" for line in self.wire.trouble[-20:])])

    def documents(self, columns="order_key, table_name, record_key, version", where="true"):
        return self.sql(f"SELECT {columns} FROM cold.document WHERE {where} ORDER BY 1, 2, 3, 4", dbname=DATABASE)

    def count(self, where="true"):
        return self.sql(f"SELECT count(*) FROM cold.document WHERE {where}", dbname=DATABASE)[0][0]

    def places(self):
        """How many documents, and how many different places they have."""
        return self.sql(
            "SELECT count(*), count(DISTINCT (policy, order_key, table_name, record_key, version)) FROM cold.document", dbname=DATABASE)[0]


def cold_server(kind=ColdServer, **options):
    server = kind(**options)
    try:
        server.start()
        server.create_database(DATABASE)
    except BaseException:
        server.destroy()
        raise
    return server


def join(db, cold, options=None, mapping=True):
    """Runs what archive_ddl() prints, on both sides, with the blanks filled in."""
    rows = db.sql("SELECT run_on, statement FROM amazon_pii.archive_ddl('cold.document', host => %s, database => %s, role => %s)",
                  [HOST, DATABASE, ROLE], "pii_admin")
    server_options = {"port": str(cold.wire.port), "hostaddr": cold.wire.address, **(options or {})}
    for place, statement in rows:
        statement = statement.replace("password '…'", f"password '{cold.password}'").replace("PASSWORD '…'", f"PASSWORD '{cold.password}'")
        statement = statement.replace("/etc/ssl/certs/ca-certificates.crt", str(cold.ca))
        if place == "cold server":
            if statement.startswith("CREATE ROLE") and cold.sql("SELECT 1 FROM pg_roles WHERE rolname = %s", [ROLE]):
                continue
            if cold.sql("SELECT to_regclass('cold.document')", dbname=DATABASE)[0][0] and re.match("CREATE (TABLE|SCHEMA)", statement):
                continue
            cold.sql(statement, dbname=DATABASE)
        elif mapping or not statement.startswith("CREATE USER MAPPING"):
            db.sql(statement)
    for name, value in server_options.items():
        known = db.value("SELECT count(*) FROM pg_foreign_server, pg_options_to_table(srvoptions) WHERE option_name = %s", [name])
        db.sql(f"ALTER SERVER cold OPTIONS ({'SET' if known else 'ADD'} {name} '{value}')")
    # Connections of sessions that are open know the old options.
    return db


def shop_beside(server, cold, options=None):
    """A database of its own with the shop of the tests, joined to the cold server."""
    db = new_database(server, "template0")
    add_extension(server, db.name)
    db.need_contrib("postgres_fdw")
    return join(open_shop(db), cold, options)


def status(db):
    """The row of archive_status by its columns' names."""
    with db.session("pii_auditor").cursor() as cursor:
        cursor.execute("SELECT * FROM amazon_pii.archive_status")
        rows = cursor.fetchall()
        assert len(rows) == 1, rows
        return dict(zip((c.name for c in cursor.description), rows[0]))


def back(cold):
    """The server answers again."""
    cold.wire.mend()
    if not cold.pid:
        cold.start()
    wait_until(lambda: cold.sql("SELECT 1"), message="the cold server does not come back")
