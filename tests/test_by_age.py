"""Rows that no order leads to (`by_age`): they go by their age, without a copy, and nothing else does."""
import copy
import json
import time
from contextlib import closing

import pytest
from cluster import wait_until
from support import (
    PLACEHOLDER, Background, add_order, documents, number, open_shop, refused, report_statistics,
    run_cycle, shop_policy,
)

TABLES = """
SET ROLE shop_owner;
CREATE TABLE shop.raw_mail (id bigint PRIMARY KEY, received_at timestamptz, sender text, body text, kept boolean NOT NULL DEFAULT false);
CREATE INDEX ON shop.raw_mail (received_at);
CREATE TABLE shop.jobs (id bigint PRIMARY KEY, queued_at timestamp NOT NULL, payload jsonb, note text, tries int);
CREATE INDEX ON shop.jobs (queued_at);
CREATE TABLE shop.staging (day date NOT NULL, line int NOT NULL, raw text, PRIMARY KEY (day, line)) PARTITION BY RANGE (day);
CREATE TABLE shop.staging_old PARTITION OF shop.staging FOR VALUES FROM (MINVALUE) TO ('2025-01-01');
CREATE TABLE shop.staging_new PARTITION OF shop.staging FOR VALUES FROM ('2025-01-01') TO (MAXVALUE);
"""
MAIL = {"table": "shop.raw_mail", "at": "received_at", "after": "30 days", "on_redact": "delete", "archive": False}
JOBS = {"table": "shop.jobs", "at": "queued_at", "after": "30 days", "archive": False,
        "redact": {"payload": {"json": ["$.buyer"]}, "note": "placeholder"}}
STAGING = {"table": "shop.staging", "at": "day", "after": "30 days", "on_redact": "delete", "archive": False}


def aged_policy(*entries, **changes):
    return shop_policy(by_age=copy.deepcopy(list(entries)), **changes)


@pytest.fixture
def shop(db):
    open_shop(db)
    db.psql(TABLES)
    return db


def add_mail(db, first, last, age, **columns):
    db.sql("INSERT INTO shop.raw_mail (id, received_at, sender, body, kept) "
           "SELECT i, now() - %s::interval, 'Sender' || i, 'Body' || i, %s FROM generate_series(%s, %s) AS i",
           [age, columns.get("kept", False), first, last], "shop_owner")


def add_jobs(db, first, last, age):
    db.sql("INSERT INTO shop.jobs SELECT i, timezone('UTC', now()) - %s::interval, jsonb_build_object('buyer', 'Buyer' || i, 'sku', i), "
           "'Note' || i, 0 FROM generate_series(%s, %s) AS i", [age, first, last], "shop_owner")


def ids(db, table="shop.raw_mail"):
    return [row[0] for row in db.sql(f"SELECT id FROM {table} ORDER BY id")]


def look_again(db):
    """As if the time of the next look had come."""
    db.sql("UPDATE amazon_pii.aged_table SET next_look_at = now(); UPDATE amazon_pii.aged_row SET next_attempt_at = now()")


def line(db, entry="by_age[0]"):
    return db.sql("SELECT overdue, failed, last_error FROM amazon_pii.by_age WHERE entry = %s", [entry])[0]


def test_rows_go_by_their_age_without_a_copy(shop):
    """Breaks when old rows stay, young ones go, or anybody's copy of them is kept."""
    add_mail(shop, 1, 2500, "31 days")
    add_mail(shop, 3000, 3002, "29 days")
    shop.sql("INSERT INTO shop.raw_mail VALUES (4000, NULL, 'Sender', 'Body')", user="shop_owner")
    add_jobs(shop, 1, 3, "31 days")
    add_jobs(shop, 4, 5, "29 days")
    shop.sql("INSERT INTO shop.staging SELECT d, n, 'Raw' FROM unnest(ARRAY[date '2020-01-01', current_date - 31, current_date - 29]) AS d, "
             "generate_series(1, 2) AS n", user="shop_owner")
    shop.apply_policy(aged_policy(MAIL, JOBS, STAGING))
    counts = run_cycle(shop)
    assert counts == {"flagged": 0, "archived": 0, "redacted": 0, "failed": 0, "overdue": 0}
    assert ids(shop) == [3000, 3001, 3002, 4000]
    assert shop.sql("SELECT id, payload::text, note, tries FROM shop.jobs ORDER BY id") == [
        *[(i, f'{{"sku": {i}, "buyer": "{PLACEHOLDER}"}}', PLACEHOLDER, 0) for i in (1, 2, 3)],
        *[(i, f'{{"sku": {i}, "buyer": "Buyer{i}"}}', f"Note{i}", 0) for i in (4, 5)],
    ]
    assert shop.value("SELECT count(*) FILTER (WHERE day < current_date - 30) || ' ' || count(*) FROM shop.staging") == "0 2"
    assert documents(shop) == {}
    assert shop.value("SELECT aged FROM amazon_pii.runs ORDER BY run_id DESC LIMIT 1") == 2500 + 3 + 4
    log = dict(shop.sql("SELECT split_part(detail, ':', 1), sum(substring(detail FROM ': (\\d+) rows')::int) FROM amazon_pii.audit_log "
                        "WHERE action = 'by_age' AND order_key IS NULL AND mac IS NOT NULL GROUP BY 1"))
    assert log == {"shop.raw_mail": 2500, "shop.jobs": 3, "shop.staging": 4}
    assert shop.sql("SELECT * FROM amazon_pii.aged_row") == []


def test_the_document_must_say_that_nothing_is_archived(shop):
    """Breaks when rows can be lost by somebody who did not say so."""
    said = copy.deepcopy(MAIL)
    del said["archive"]
    for entry, problem, hint in (
        (said, "by_age[0].archive: is missing", '"archive": false'),
        ({**MAIL, "archive": True}, "cannot be archived", "may go for good"),
        ({**MAIL, "redact": ["body"]}, "names columns of rows that are deleted", "Leave"),
        ({**MAIL, "on_redact": "update"}, "says nothing of what happens", "on_redact"),
        ({**MAIL, "aftr": "1 day"}, 'unknown key "aftr"', "after"),
        ({**MAIL, "after": "soon"}, "by_age[0].after: not an interval", "29 days"),
        ({**MAIL, "at": "sender"}, "by_age[0].at: not a timestamp or date", "timestamptz"),
        ({**MAIL, "at": "received"}, "by_age[0].at", ""),
        ({**MAIL, "where": "sender"}, "not a condition", ""),
        ({**MAIL, "where": "nobody = 1"}, "a column does not exist", ""),
        ({**MAIL, "table": "shop.orders", "at": "shipped_at"}, "is the table of orders", "orders"),
        ({**MAIL, "table": "shop.nowhere"}, "does not exist", ""),
        ({**JOBS, "redact": ["queued_at"]}, "serves as key or age", ""),
        ({**JOBS, "redact": ["id"]}, "part of its key", ""),
        ({**JOBS, "redact": {"tries": "placeholder"}}, "", ""),
    ):
        found = [row for row in shop.check_policy(aged_policy(entry)) if row[0] == "error"]
        assert found and problem in " ".join(found[0][1:3]) and hint in found[0][3], (entry, found)
        with pytest.raises(Exception) as caught:
            shop.apply_policy(aged_policy(entry))
        assert caught.value.pgcode[:2] != "XX"
    shop.psql("SET ROLE shop_owner; SET search_path = shop; ALTER TABLE orders RENAME TO o; CREATE TABLE orders (LIKE raw_mail INCLUDING ALL)")
    assert [r for r in shop.check_policy(aged_policy({**MAIL, "table": "shop.o"}, orders={**shop_policy()["orders"], "table": "shop.o"})) if r[0] == "error"]


def test_what_would_fail_is_found_when_applied(shop):
    """Breaks when a treatment, a cascade, or a table of another policy shows on day 30 only."""
    add_jobs(shop, 1, 3, "1 day")
    add_mail(shop, 1, 3, "1 day")
    before = shop.sql("SELECT * FROM shop.jobs ORDER BY id")
    shop.psql("SET ROLE shop_owner; ALTER TABLE shop.jobs ADD CHECK (note LIKE 'Note%')")
    rows = shop.check_policy(aged_policy(JOBS))
    assert [(r[0], r[1]) for r in rows] == [("error", "shop.jobs")] and "23514" in rows[0][2]
    assert shop.sql("SELECT * FROM shop.jobs ORDER BY id") == before
    shop.psql("SET ROLE shop_owner; CREATE TABLE shop.attachments (id int PRIMARY KEY, mail bigint REFERENCES shop.raw_mail ON DELETE CASCADE)")
    rows = shop.check_policy(aged_policy(MAIL))
    assert [(r[0], r[1]) for r in rows] == [("error", "shop.raw_mail")] and "shop.attachments" in rows[0][2]
    shop.psql("SET ROLE shop_owner; DROP TABLE shop.attachments; DROP INDEX shop.raw_mail_received_at_idx")
    rows = shop.check_policy(aged_policy(MAIL))
    assert [(r[0], r[1], r[3]) for r in rows] == [("warning", "shop.raw_mail", 'CREATE INDEX ON "shop"."raw_mail" ("received_at");')]
    shop.psql("SET ROLE shop_owner; " + rows[0][3])
    assert shop.check_policy(aged_policy(MAIL)) == []
    assert ids(shop) == [1, 2, 3]
    shop.apply_policy(aged_policy(MAIL))
    other = shop_policy(policy="other", linked=[{"table": "shop.raw_mail", "on": {"id": "id"}, "redact": ["body"]}])
    rows = shop.check_policy(other)
    assert [r[:2] for r in rows] == [("error", "shop.raw_mail")] and '"shop"' in rows[0][2]
    shop.apply_policy(shop_policy())
    shop.apply_policy(other)
    assert [r[:2] for r in shop.check_policy(aged_policy(MAIL))] == [("error", "shop.raw_mail")]
    shop.apply_policy(aged_policy(STAGING, policy="third"))
    assert shop.check_policy(aged_policy(STAGING)) == []


def test_one_bad_row_stops_nobody_else(shop):
    """Breaks when a row that cannot be removed keeps others, or is tried without a pause, or cannot be seen."""
    add_mail(shop, 1, 20, "40 days")
    add_jobs(shop, 1, 5, "40 days")
    shop.psql("""SET ROLE shop_owner; CREATE TABLE shop.answers (mail bigint REFERENCES shop.raw_mail);
        CREATE FUNCTION shop.no_note() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF NEW.id = 2 THEN RAISE EXCEPTION 'Jane Doe' USING ERRCODE = 'AB123'; END IF; RETURN NEW; END $$;""")
    shop.apply_policy(aged_policy(MAIL, {**JOBS, "where": "id <> 5"}, enabled=False))
    # The trial would have found these: they came later.
    shop.psql("SET ROLE shop_owner; INSERT INTO shop.answers VALUES (3), (17);"
              "CREATE TRIGGER no_note BEFORE UPDATE ON shop.jobs FOR EACH ROW EXECUTE FUNCTION shop.no_note()")
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    assert run_cycle(shop)["failed"] == 3
    assert ids(shop) == [3, 17]
    assert shop.sql("SELECT id, note FROM shop.jobs ORDER BY id") == [(1, PLACEHOLDER), (2, "Note2"), (3, PLACEHOLDER), (4, PLACEHOLDER), (5, "Note5")]
    overdue, failed, error = line(shop)
    assert (overdue, failed) == (2, 2) and error.startswith("23503")
    assert line(shop, "by_age[1]")[:2] == (1, 1) and line(shop, "by_age[1]")[2].startswith("AB123")
    (rows, error), = shop.sql("SELECT rows_overdue, last_error FROM amazon_pii.status")
    assert rows == 3 and error and "Jane" not in str(shop.sql("SELECT * FROM amazon_pii.audit_log")) + str(shop.sql("SELECT * FROM amazon_pii.status"))
    # It waits, and is not counted again meanwhile.
    assert run_cycle(shop)["failed"] == 0
    shop.psql("SET ROLE shop_owner; DELETE FROM shop.answers WHERE mail = 3; DROP TRIGGER no_note ON shop.jobs")
    look_again(shop)
    assert run_cycle(shop)["failed"] == 1
    assert ids(shop) == [17] and shop.value("SELECT note FROM shop.jobs WHERE id = 2") == PLACEHOLDER
    assert shop.sql("SELECT row_key, attempts FROM amazon_pii.aged_row") == [('["17"]', 2)]
    shop.psql("SET ROLE shop_owner; DROP TABLE shop.answers")
    look_again(shop)
    run_cycle(shop)
    assert ids(shop) == [] and shop.sql("SELECT * FROM amazon_pii.aged_row") == []
    assert shop.value("SELECT rows_overdue FROM amazon_pii.status") == 0


def test_a_locked_row_is_left_for_later(shop):
    """Breaks when a cycle waits for somebody's row, or forgets it."""
    add_mail(shop, 1, 5, "40 days")
    shop.apply_policy(aged_policy({**MAIL, "where": "NOT kept"}))
    with closing(shop.connect("shop_owner", autocommit=False)) as other:
        other.cursor().execute("SELECT * FROM shop.raw_mail WHERE id = 2 FOR UPDATE")
        assert run_cycle(shop)["failed"] == 0
        assert ids(shop) == [2] and line(shop) == (1, 0, None)
        other.cursor().execute("UPDATE shop.raw_mail SET kept = true WHERE id = 2")
        other.commit()
    look_again(shop)
    run_cycle(shop)
    # It does not meet the condition any more.
    assert ids(shop) == [2] and line(shop) == (0, 0, None) and shop.sql("SELECT * FROM amazon_pii.aged_row") == []


def test_a_row_whose_trigger_waits_stops_nobody_else(shop):
    """Breaks when what a trigger of one row waits for keeps the others from going; or a locked table is waited for row by row."""
    add_mail(shop, 1, 20, "40 days")
    shop.psql("""SET ROLE shop_owner; CREATE TABLE shop.held (id int); INSERT INTO shop.held VALUES (1);
        CREATE FUNCTION shop.want() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN IF OLD.id = 5 THEN UPDATE shop.held SET id = 1; END IF; RETURN OLD; END $$;
        CREATE TRIGGER want BEFORE DELETE ON shop.raw_mail FOR EACH ROW EXECUTE FUNCTION shop.want();""")
    shop.apply_policy(aged_policy(MAIL))
    with closing(shop.connect("shop_owner", autocommit=False)) as other:
        other.cursor().execute("UPDATE shop.held SET id = 2")
        assert run_cycle(shop)["failed"] == 0
        assert ids(shop) == [5] and line(shop) == (1, 0, None)
        other.rollback()
        add_mail(shop, 21, 22, "40 days")
        other.cursor().execute("LOCK TABLE shop.raw_mail")
        look_again(shop)
        begun = time.monotonic()
        run_cycle(shop)
        assert time.monotonic() - begun < 30 and shop.sql("SELECT last_error FROM amazon_pii.status") == [(None,)]
        other.rollback()
    run_cycle(shop)
    assert ids(shop) == []


def test_a_row_that_comes_back_or_comes_late_is_found(shop):
    """Breaks when what a pass has left behind is never looked at again."""
    add_jobs(shop, 1, 3, "40 days")
    add_jobs(shop, 4, 4, "31 days")
    add_mail(shop, 1, 1, "40 days", kept=True)
    add_mail(shop, 2, 2, "35 days")
    shop.apply_policy(aged_policy(JOBS, {**MAIL, "where": "NOT kept"}))
    run_cycle(shop)
    shop.sql("UPDATE shop.jobs SET note = 'again' WHERE id = 1; UPDATE shop.raw_mail SET kept = false", user="shop_owner")
    add_jobs(shop, 5, 5, "35 days")
    look_again(shop)
    run_cycle(shop)
    # A pass goes on where the last one ended: it costs what is due. Once a day it begins anew.
    assert shop.sql("SELECT id FROM shop.jobs WHERE note <> %s ORDER BY id", [PLACEHOLDER]) == [(1,), (5,)] and ids(shop) == [1]
    shop.sql("UPDATE amazon_pii.aged_table SET begun_at = begun_at - '1 day'::interval")
    look_again(shop)
    run_cycle(shop)
    assert shop.sql("SELECT id FROM shop.jobs WHERE note <> %s", [PLACEHOLDER]) == [] and ids(shop) == []


def test_an_idle_cycle_looks_again_in_time(shop):
    """Breaks when a cycle that has nothing to do misses that a row has grown old, or looks each time."""
    add_mail(shop, 1, 1, "29 days 23:59:50")
    add_jobs(shop, 1, 1, "1 day")
    shop.apply_policy(aged_policy(MAIL, JOBS))
    run_cycle(shop)
    assert ids(shop) == [1]
    due, later = shop.sql("SELECT next_look_at <= now() + '10 s'::interval, next_look_at > now() + '50 min'::interval FROM amazon_pii.by_age ORDER BY entry")
    assert due[0] and later[1]
    run_cycle(shop)
    assert ids(shop) == [1]

    def gone():
        run_cycle(shop)
        return ids(shop) == []
    wait_until(gone, 20, 0.3)
    # Nothing is read for nothing.
    before = shop.value("SELECT xmin::text FROM amazon_pii.aged_table WHERE entry = 'by_age[1]'")
    runs = shop.value("SELECT count(*) FROM amazon_pii.runs")
    run_cycle(shop)
    assert shop.value("SELECT xmin::text FROM amazon_pii.aged_table WHERE entry = 'by_age[1]'") == before
    assert shop.value("SELECT count(*) FROM amazon_pii.runs") == runs


def test_preview_and_switches(shop):
    """Breaks when rows go under a policy that is switched off, or are not shown as overdue, or a preview says otherwise."""
    add_mail(shop, 1, 4, "40 days")
    add_mail(shop, 5, 6, "10 days")
    add_jobs(shop, 1, 2, "40 days")
    shop.apply_policy(aged_policy(MAIL, JOBS, enabled=False))
    run_cycle(shop)
    assert ids(shop) == [1, 2, 3, 4, 5, 6]
    assert shop.value("SELECT rows_overdue FROM amazon_pii.status") == 6
    preview = "SELECT table_name, orders, records FROM amazon_pii.preview('shop', now() + %s::interval) WHERE action = 'by_age' ORDER BY 1"
    assert shop.sql(preview, ["0 s"], "pii_auditor") == [("shop.jobs", 0, 2), ("shop.raw_mail", 0, 4)]
    assert shop.sql(preview, ["21 days"], "pii_auditor") == [("shop.jobs", 0, 2), ("shop.raw_mail", 0, 6)]
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    run_cycle(shop)
    assert ids(shop) == [5, 6] and shop.value("SELECT rows_overdue FROM amazon_pii.status") == 0
    assert shop.sql(preview, ["0 s"], "pii_auditor") == []
    shop.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user="pii_admin")
    assert shop.sql("SELECT policy FROM amazon_pii.aged_table UNION ALL SELECT policy FROM amazon_pii.aged_row") == []


def test_before_its_date_a_policy_touches_nothing(shop):
    """Breaks when rows go before the policy is in effect, or each cycle looks for them until then."""
    add_mail(shop, 1, 2, "40 days")
    shop.apply_policy(aged_policy(MAIL, effective_from="2099-01-01", loosened="test"))
    run_cycle(shop)
    assert ids(shop) == [1, 2] and line(shop) == (0, 0, None)
    assert shop.value("SELECT next_look_at = '2099-01-01 00:00+00' FROM amazon_pii.by_age")
    preview = "SELECT records FROM amazon_pii.preview('shop', %s) WHERE action = 'by_age'"
    assert shop.sql(preview, ["2098-12-31"], "pii_auditor") == [] and shop.sql(preview, ["2099-01-02"], "pii_auditor") == [(2,)]
    shop.apply_policy(aged_policy(MAIL, effective_from="2020-01-01"))
    run_cycle(shop)
    assert ids(shop) == []


def test_another_owner_suspends_and_code_runs_as_the_owner(shop):
    """Breaks when rows of by_age are handled with anybody's rights but their table's owner's."""
    add_mail(shop, 1, 2, "40 days")
    shop.psql("""SET ROLE shop_owner; CREATE TABLE shop.ran (who name);
        CREATE FUNCTION shop.seen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO shop.ran VALUES (current_user); RETURN OLD; END $$;
        CREATE TRIGGER seen BEFORE DELETE ON shop.raw_mail FOR EACH ROW EXECUTE FUNCTION shop.seen();
        CREATE FUNCTION shop.ok(bigint) RETURNS boolean LANGUAGE plpgsql AS
            $$ BEGIN RETURN current_user = 'shop_owner'; END $$;""")
    shop.apply_policy(aged_policy({**MAIL, "where": "shop.ok(id)"}))
    shop.sql("GRANT USAGE, CREATE ON SCHEMA shop TO other_owner; ALTER TABLE shop.raw_mail OWNER TO other_owner")
    with refused("42501", "has another owner now"):
        run_cycle(shop, "shop")
    assert ids(shop) == [1, 2]
    shop.sql("ALTER TABLE shop.raw_mail OWNER TO shop_owner")
    run_cycle(shop)
    assert ids(shop) == [] and shop.sql("SELECT DISTINCT who FROM shop.ran") == [("shop_owner",)]
    shop.psql("CREATE TABLE public.theirs (id int PRIMARY KEY, at timestamptz); ALTER TABLE public.theirs OWNER TO other_owner")
    with refused("42501", "must be owner of table"):
        shop.apply_policy(aged_policy({**MAIL, "table": "public.theirs", "at": "at"}))


def test_each_batch_is_announced_without_personal_data(shop):
    """Breaks when nobody who listens learns of it, or learns too much."""
    add_mail(shop, 1, 3, "40 days")
    shop.apply_policy(aged_policy(MAIL))
    with closing(shop.connect()) as listener:
        listener.cursor().execute("LISTEN amazon_pii")
        run_cycle(shop)
        wait_until(lambda: listener.poll() or listener.notifies)
        told = [json.loads(n.payload) for n in listener.notifies]
    assert told == [{"policy": "shop", "status": "by_age", "table": "shop.raw_mail", "count": 3}]


def test_only_old_rows_are_read(shop):
    """Breaks when the cost of a look grows with the table."""
    add_mail(shop, 1, 20000, "1 day")
    add_mail(shop, 20001, 20003, "40 days")
    shop.apply_policy(aged_policy(MAIL))
    report_statistics(shop, "pii_admin", "shop_owner")
    read = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_user_tables WHERE relname = 'raw_mail'"
    before = shop.sql(read)[0]
    run_cycle(shop)
    report_statistics(shop, "pii_admin")
    after = shop.sql(read)[0]
    assert (after[0] - before[0], after[1] - before[1] < 30) == (0, True), (before, after)
    assert len(ids(shop)) == 20000


def test_a_cycle_that_was_interrupted_is_carried_on(shop):
    """Breaks when a crash between batches loses its place, or a row is left half done."""
    add_mail(shop, 1, 50, "40 days")
    shop.psql("""SET ROLE shop_owner; CREATE FUNCTION shop.slow() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN IF OLD.id = 30 THEN PERFORM pg_sleep(600); END IF; RETURN OLD; END $$;""")
    shop.apply_policy(aged_policy(MAIL))
    shop.psql("SET ROLE shop_owner; CREATE TRIGGER slow BEFORE DELETE ON shop.raw_mail FOR EACH ROW EXECUTE FUNCTION shop.slow()")
    cycle = Background(shop, "CALL amazon_pii.run_cycle()")
    wait_until(lambda: shop.sql("SELECT pid FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'", [cycle.pid]))
    shop.sql("SELECT pg_terminate_backend(%s)", [cycle.pid])
    with pytest.raises(Exception):
        cycle.result()
    left = ids(shop)
    assert 30 in left
    shop.psql("SET ROLE shop_owner; DROP TRIGGER slow ON shop.raw_mail")
    run_cycle(shop)
    assert ids(shop) == []


def test_orders_go_on_beside_it(shop):
    """Breaks when a broken by_age table keeps orders from being redacted."""
    add_order(shop, 1)
    add_mail(shop, 1, 1, "40 days")
    shop.psql("SET ROLE shop_owner; CREATE FUNCTION shop.broken(bigint) RETURNS boolean LANGUAGE sql AS 'SELECT true'")
    shop.apply_policy(aged_policy({**MAIL, "where": "shop.broken(id)"}))
    shop.psql("SET ROLE shop_owner; CREATE OR REPLACE FUNCTION shop.broken(bigint) RETURNS boolean LANGUAGE sql AS 'SELECT 1 / 0 = 1'")
    assert run_cycle(shop)["redacted"] == 1
    assert "22012" in shop.value("SELECT last_error FROM amazon_pii.status")
    assert shop.value("SELECT status FROM amazon_pii.orders WHERE order_number = %s", [number(1)]) == "redacted"
    assert ids(shop) == [1]
