"""Shows the main job on a throw-away server and checks what it shows: the background worker archives and redacts two
orders of a small shop, a person takes one back and gives it up again. Ends with status 1 if anything differs."""
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from cluster import BINDIR, Cluster, wait_until  # noqa: E402

DATABASE = "shop"
FIRST, SECOND = "303-0000001-0000001", "303-0000002-0000002"
# Values of the first two orders that only they use. The second buyer's name, e-mail address and phone also belong to
# an order of the shop's own site; that they stay in the customer's row is part of the demonstration.
GONE = [
    "Ottilie", "Erfundene Gasse", "x1y2z3@", "30 5550101", "52.500000001", "Zum Geburtstag", "Fa. Muster", "Hof 3",
    "k4k4k4@", "PO-4711-B", "Hinterhof", "Muster & Sohn OHG", "DE999000111", "TRK-000-112-B",
]
STAYS = ["Lager Nord", "Hafenstraße 1", "LU99900011", "Marktplatz S.à r.l.", "59.90", "112.00", "Philippa Probe", "Leopold Erdacht"]
ROLES = """
CREATE ROLE shop_owner LOGIN;
CREATE ROLE dba LOGIN;
CREATE ROLE clerk LOGIN;
CREATE ROLE auditor LOGIN;
GRANT shop_owner TO dba;
"""
CAPABILITIES = "GRANT amazon_pii_admin TO dba; GRANT amazon_pii_operator TO clerk; GRANT amazon_pii_auditor TO auditor;"
ORDER = f"SELECT * FROM shop.overview WHERE external_no = '{FIRST}'"
# Every row of the shop, as one text.
EVERYTHING = """
SELECT jsonb_build_object('customers', (SELECT jsonb_agg(to_jsonb(c) ORDER BY id) FROM shop.customers c),
    'orders', (SELECT jsonb_agg(to_jsonb(o) ORDER BY id) FROM shop.orders o),
    'addresses', (SELECT jsonb_agg(to_jsonb(a) ORDER BY id) FROM shop.addresses a),
    'payloads', (SELECT jsonb_agg(to_jsonb(p) ORDER BY order_id) FROM shop.payloads p))::text"""


class Demo:
    def __init__(self, server):
        self.server = server

    def say(self, text):
        print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)

    def show(self, query, user, wide=False):
        """Prints a statement with the role that runs it, and what psql makes of its result."""
        print(f"{user}=> {' '.join(query.split())};")
        settings = ["\\pset footer off", "\\pset null '∅'", "\\x on" if wide else ""]
        script = "\n".join([*settings, f"{query};", ""])
        print(self.server.psql(script, DATABASE, user).stdout.rstrip() + "\n", flush=True)

    def sql(self, query, user="postgres"):
        return self.server.sql(query, user=user, dbname=DATABASE)

    def value(self, query, user="postgres"):
        return self.sql(query, user)[0][0]

    def check(self, right, what):
        if not right:
            raise SystemExit(f"error: not so: {what}")
        print(f"  checked: {what}", flush=True)

    def orders(self):
        return dict(self.sql("SELECT order_number, status FROM amazon_pii.orders"))

    def wait_for(self, wanted):
        try:
            wait_until(lambda: self.orders() == wanted)
        except TimeoutError:
            raise SystemExit(f"error: the worker does not finish: {self.orders()}\n{self.server.log_text()[-2000:]}") from None

    def dump(self):
        """What a backup of the whole database would hold, the extension's own tables and the archive included."""
        return self.server.client("pg_dump", "-d", DATABASE).stdout


def run(server):
    d = Demo(server)
    server.sql(ROLES)
    server.create_database(DATABASE)
    d.sql("CREATE EXTENSION amazon_pii")
    server.sql(CAPABILITIES)
    server.sql(f"GRANT CREATE ON DATABASE {DATABASE} TO shop_owner")
    server.psql(HERE / "shop.sql", DATABASE, "shop_owner")
    server.psql(HERE / "orders.sql", DATABASE, "shop_owner")
    policy = (HERE / "policy.json").read_text()

    d.say("A shop has five orders; four are Amazon's. This is one that was dispatched 41 days ago:")
    d.show(ORDER, "shop_owner", wide=True)
    before = d.value(EVERYTHING)
    d.check(all(value in d.dump() for value in GONE + STAYS), "a dump of the database holds the buyers' data")

    d.say("The DBA has the policy (demo/policy.json) checked, applies it, and looks what a cycle would do:")
    literal = policy.replace("'", "''")
    problems = d.sql(f"SELECT severity, object, problem FROM amazon_pii.check_policy('{literal}')", "dba")
    d.check(problems == [], "check_policy has tried the policy on the real rows and finds nothing wrong")
    applied = d.value(f"SELECT amazon_pii.apply_policy('{literal}')", "dba")
    d.check(applied == "shop version 1", f"apply_policy says: {applied}")
    d.show("SELECT * FROM amazon_pii.preview('shop')", "dba")
    d.check(d.value(EVERYTHING) == before, "nothing has been changed yet")

    d.say("The policy is enabled. From here on the background worker does the work:")
    d.show("SELECT amazon_pii.enable_policy('shop')", "dba")
    started = time.monotonic()
    done = {FIRST: "redacted", SECOND: "redacted", "303-0000003-0000003": "archived", "303-0000004-0000004": "scheduled"}
    d.wait_for(done)
    d.check(True, f"the worker needed {time.monotonic() - started:.1f} s")
    users = d.sql("SELECT DISTINCT started_by FROM amazon_pii.runs")
    d.check(users == [("postgres",)], "every cycle was the worker's own, nobody called one")
    d.show("SELECT order_number, status, archived_at::date, redacted_at::date, redact_due_at::date FROM amazon_pii.orders ORDER BY 1", "dba")
    d.say("The same order now:")
    d.show(ORDER, "shop_owner", wide=True)
    check_redacted(d)
    redacted = d.value(EVERYTHING)

    d.say("The second buyer also bought in the shop's own web shop, so the customer's row waits for that order:")
    d.show("SELECT id, name, email, phone FROM shop.customers ORDER BY id", "shop_owner")
    d.show("SELECT table_name, record_key, status FROM amazon_pii.records WHERE status = 'waiting'", "dba")
    d.check(
        d.sql("SELECT record_key FROM amazon_pii.records WHERE status = 'waiting'") == [('["2"]',)],
        "only the shared customer waits",
    )

    d.say("The archive holds sealed documents, here the first bytes of some:")
    columns = "table_name, record_key, version, key_id, length(sealed) AS bytes, encode(substr(sealed, 1, 12), 'hex') || '…' AS sealed"
    d.show(f"SELECT order_key, {columns} FROM amazon_pii_archive.document ORDER BY 1, 2 LIMIT 5", "postgres")
    sealed = b"".join(bytes(s) for (s,) in d.sql("SELECT sealed FROM amazon_pii_archive.document"))
    d.check(not any(value.encode() in sealed for value in GONE), "no value can be read in the sealed documents")

    d.say("A parcel came back. A clerk takes the order's data back, with a reason:")
    d.show(f"SELECT table_name, records, cells FROM amazon_pii.retrieve('{FIRST}', 'parcel came back, ticket 4711')", "clerk")
    d.show(ORDER, "shop_owner", wide=True)
    now = json.loads(d.value(EVERYTHING))
    original = json.loads(before)
    same = [now[t][0] == original[t][0] for t in ("orders", "customers", "addresses", "payloads")]
    d.check(same == [True] * 4, "every cell of the order is back as it was")
    d.check(now["addresses"][1]["name"] == "[Redacted]", "the other order stays redacted")

    d.say("It is done sooner than the 30 days that a retrieval lasts. The worker redacts the order again:")
    d.show(f"SELECT amazon_pii.end_retrieval('{FIRST}')", "clerk")
    d.wait_for(done)
    d.check(d.value(EVERYTHING) == redacted, "all is as it was before the retrieval")

    d.say("What the auditor sees:")
    log = 'SELECT audit_id AS id, at::time(0), "user", action, order_number, reason, detail FROM amazon_pii.audit_log ORDER BY audit_id'
    d.show(log, "auditor")
    retrievals = d.sql("SELECT \"user\", order_number, reason FROM amazon_pii.audit_log WHERE action = 'retrieve'", "auditor")
    d.check(retrievals == [("clerk", FIRST, "parcel came back, ticket 4711")], "the retrieval is in the log, with its reason")
    status = "SELECT policy, enabled, scheduled, archived, redacted, retrieved, failed, overdue, records_waiting, worker, last_error FROM amazon_pii.status"
    d.show(status, "auditor", wide=True)
    wanted = ("shop", True, 1, 1, 2, 0, 0, 0, 1, "running", None)
    d.check(d.sql(status, "auditor") == [wanted], "nothing has failed, nothing is overdue, the worker runs")
    check_redacted(d)
    d.check(not any(value in server.log_text() for value in [*GONE, "Balthasar", "Philippa", "Leopold"]), "the server's log holds no buyer's data")


def check_redacted(d):
    dump = d.dump()
    d.check([v for v in GONE if v in dump] == [], f"a dump of the database holds none of {len(GONE)} values of the two buyers")
    d.check(all(v in dump for v in STAYS), "the shop's own addresses, the amounts, and orders that are not due are untouched")


def main():
    keep = os.environ.get("KEEP") not in (None, "", "0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = Cluster(preload=True, conf=["amazon_pii.naptime = '1s'"])
    ended_well = False
    try:
        server.start()
        run(server)
        ended_well = True
    finally:
        if keep and ended_well:
            server.leave()
        else:
            server.destroy()
    print("\nAll of it is as it should be.")
    if keep:
        stop = server.as_owner(BINDIR / "pg_ctl", "-D", server.data, "-m", "fast", "stop")
        print("The server was left running (log in as dba, clerk, auditor, shop_owner or postgres):")
        print(f"  {BINDIR}/psql -h {server.base} -p {server.port} -U dba {DATABASE}")
        print("Stop and remove it with:")
        print(f"  {shlex.join(stop)} && rm -rf {server.base}")


if __name__ == "__main__":
    main()
