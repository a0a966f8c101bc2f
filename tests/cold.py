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
    """A TCP proxy. `cut()` swallows what comes on connections that are open, and refuses new ones, without a reset. `trouble` is what
    went wrong without being asked to, for whoever wonders why a test failed."""

    def __init__(self, target):
        self.target = target
        self.whole = threading.Event()
        self.whole.set()
        self.delay = 0
        self.trouble = []
        self._pairs = []
        self._listener = None
        self._place = Port()
        self.port = self._place.number
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
                threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    def _note(self, what, error):
        self.trouble.append(f"{datetime.now(timezone.utc):%H:%M:%S.%f} {what}: {error!r}")

    def _copy(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self.whole.is_set():
                    # Read, acknowledged, and gone.
                    continue
                if self.delay:
                    threading.Event().wait(self.delay)
                target.sendall(data)
            if self.whole.is_set():
                target.shutdown(socket.SHUT_WR)

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
    """The server, its certificate, and the wire to it."""

    def __init__(self, conf=()):
        self._place = Port()
        self.port_there = self._place.number
        super().__init__(key=False, conf=[
            f"listen_addresses = '{ADDRESS}'", f"port = {self.port_there}", "ssl = on", "log_statement = 'all'",
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
        hba.write_text(f"local all all trust\nhostssl {DATABASE} {ROLE} {ADDRESS}/32 scram-sha-256\n")
        self.wire = Wire(self.port_there)

    def destroy(self):
        self.wire.close()
        super().destroy()
        self._place.close()

    def last_words(self):
        """What may explain why it was not reached."""
        lines = [line for line in self.log_text().splitlines() if "LOG:  execute" not in line and "LOG:  statement" not in line]
        return "\n".join([*lines[-60:], *(f"wire: {line}" for line in self.wire.trouble[-20:])])

    def documents(self, columns="order_key, table_name, record_key, version", where="true"):
        return self.sql(f"SELECT {columns} FROM cold.document WHERE {where} ORDER BY 1, 2, 3, 4", dbname=DATABASE)

    def count(self, where="true"):
        return self.sql(f"SELECT count(*) FROM cold.document WHERE {where}", dbname=DATABASE)[0][0]

    def places(self):
        """How many documents, and how many different places they have."""
        return self.sql(
            "SELECT count(*), count(DISTINCT (policy, order_key, table_name, record_key, version)) FROM cold.document", dbname=DATABASE)[0]


def cold_server(**options):
    server = ColdServer(**options)
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
    server_options = {"port": str(cold.wire.port), "hostaddr": ADDRESS, **(options or {})}
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
