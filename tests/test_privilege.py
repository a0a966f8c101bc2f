"""P8: no privilege is lent. Table owners' code runs with the owner's rights, whoever makes it run; nobody gets what was not
granted. The attacker's side is fixtures/traps.sql."""
import psycopg2.extras
import pytest
from cluster import wait_until
from conftest import SUPERUSER
from support import (
    FIXTURES, PLACEHOLDER, add_customer, add_order, number, open_shop, order_value, run_cycle, shop_policy,
)

PLANTED = {"before", "after", "statement", "deferred", "check", "domain", "index", "generated"}
EXPRESSIONS = {"amazon", "number", "anchor", "where", "on", "not_before", "sql"}
ALL = PLANTED | EXPRESSIONS | {"cast", "operator", "default", "bait"}


def trapped_policy(**changes):
    """A policy each of whose expressions is a trap."""
    return shop_policy(
        orders={
            "table": "shop.orders", "number": "CASE WHEN shop.attack('number') THEN external_no END",
            "amazon": "shop.attack('amazon') AND channel = 'amazon'",
            "anchor": "CASE WHEN shop.attack('anchor') THEN shipped_at END", "redact": ["gift_message", "shop_note"],
        },
        linked=[
            {"table": "shop.addresses", "on": {"CASE WHEN shop.attack('on') THEN order_id END": "id"},
             "where": "shop.attack('where')", "not_before": "CASE WHEN shop.attack('not_before') THEN now() - '40 days'::interval END",
             "redact": {"name": {"sql": "shop.attack_value('sql', '[gone]')"}, "line1": "placeholder", "mood": "null"}},
            {"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["first_name", "last_name"]},
            {"table": "shop.parcels", "on": {"order_no": "external_no::varchar"}, "redact": ["label"],
             "number": "CASE WHEN shop.attack('number') THEN 'P' || id END"},
        ],
        **changes,
    )


def plant(db):
    """An order and a web order in a shop full of traps, all of them asleep."""
    open_shop(db)
    db.psql(FIXTURES / "traps.sql")
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    add_order(db, 2, channel="web")
    db.sql("UPDATE shop.addresses SET mood = 'bad'; INSERT INTO shop.parcels VALUES (1, %s, 'Label1')", [number(1)], "shop_owner")
    return db


def arm(db, places=ALL):
    db.sql("INSERT INTO shop.armed SELECT unnest(%s)", [list(places)], "shop_owner")


def disarm(db):
    db.sql("DELETE FROM shop.armed", user="shop_owner")


def called(db, prefix):
    rows = db.sql("SELECT sequencename FROM pg_sequences WHERE schemaname = 'shop' AND last_value IS NOT NULL")
    return {r[0].removeprefix(prefix) for r in rows if r[0].startswith(prefix)}


def assert_unharmed(db, ran):
    """The traps in `ran` ran, none as anybody but the owner of the tables, and none of their attempts got through."""
    assert called(db, "as_another") == set()
    assert called(db, "hit_") == set()
    assert db.sql("SELECT n FROM boss.ledger") == [(1,)]
    assert db.sql("SELECT n FROM other.ledger") == [(1,)]
    assert db.sql("SELECT rolname FROM pg_roles WHERE (rolsuper AND rolname <> 'postgres') OR rolname = 'pwned'") == []
    assert ran <= called(db, "at_")


@pytest.fixture
def traps(db):
    return plant(db)


@pytest.fixture
def flagged(traps):
    """The policy is applied, nothing is archived, the traps are armed."""
    traps.apply_policy(trapped_policy())
    arm(traps)
    return traps


@pytest.fixture
def redacted(traps):
    """The order is redacted, and then the traps are armed."""
    traps.apply_policy(trapped_policy())
    assert run_cycle(traps)["redacted"] == 1
    arm(traps)
    return traps


# Each way on which the owner's code is made to run


def test_the_traps_work(traps):
    """Breaks when the traps themselves are blunt: then no other test here would show anything."""
    arm(traps, {"before"})
    traps.sql("UPDATE shop.orders SET gift_message = 'x'")
    hits = called(traps, "hit_")
    assert called(traps, "as_another")
    assert {"boss_write", "other_write", "state_write", "create_role", "passwords", "set_role", "temporary", "later"} <= hits
    traps.sql("DROP ROLE IF EXISTS pwned; ALTER ROLE shop_owner NOSUPERUSER")


@pytest.mark.parametrize("caller", [SUPERUSER, "pii_admin"])
@pytest.mark.parametrize("call", ["check_policy", "apply_policy"])
def test_traps_at_the_trial(traps, caller, call):
    """Breaks when the trial of a policy evaluates or writes as its caller."""
    arm(traps)
    getattr(traps, call)(trapped_policy(), caller)
    assert_unharmed(traps, PLANTED | EXPRESSIONS)


@pytest.mark.parametrize("caller", [SUPERUSER, "pii_admin"])
def test_traps_in_a_cycle(flagged, caller):
    """Breaks when a cycle reads or writes a table as the one who called it."""
    counts = run_cycle(flagged, user=caller)
    assert_unharmed(flagged, PLANTED | EXPRESSIONS)
    assert counts["redacted"] == 1
    assert flagged.value("SELECT gift_message FROM shop.orders WHERE id = 1") == PLACEHOLDER
    assert flagged.value("SELECT name FROM shop.addresses WHERE order_id = 1") == "[gone]"


def test_traps_in_the_worker(preloaded_db):
    """Breaks when the worker, a superuser, does not put its rights away."""
    db = plant(preloaded_db)
    arm(db)
    db.apply_policy(trapped_policy())
    wait_until(lambda: order_value(db, 1) == "redacted")
    assert_unharmed(db, PLANTED | EXPRESSIONS)


@pytest.mark.parametrize("caller", [SUPERUSER, "pii_operator", "pii_admin"])
def test_traps_when_written_back(redacted, caller):
    """Breaks when retrieve or unflag writes as its caller, or leaves something of the owner's pending for COMMIT."""
    function = "unflag" if caller == "pii_admin" else "retrieve"
    with redacted.connect(caller, autocommit=False) as session, session.cursor() as cursor:
        cursor.execute(f"SELECT sum(cells) FROM amazon_pii.{function}(%s, 'return')", [number(1)])
        cells = cursor.fetchone()[0]
    assert_unharmed(redacted, PLANTED)
    assert cells >= 7
    assert redacted.value("SELECT gift_message FROM shop.orders WHERE id = 1") == "Gift1"


@pytest.mark.parametrize("importer", [SUPERUSER, "nobody_special"])
def test_traps_in_expressions_at_import(traps, importer):
    """Breaks when an expression of the policy is evaluated as whoever inserts the row."""
    traps.apply_policy(trapped_policy())
    traps.sql("GRANT INSERT, SELECT, UPDATE ON shop.orders, shop.addresses TO nobody_special", user="shop_owner")
    # The shop's own triggers run as the one who inserts: that is PostgreSQL's rule, and no doing of ours.
    arm(traps, EXPRESSIONS)
    traps.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at) VALUES (3, %s, 'amazon', now())", [number(3)], importer)
    traps.sql("INSERT INTO shop.addresses (order_id, name) VALUES (3, 'x')", user=importer)
    traps.sql("UPDATE shop.orders SET shipped_at = now() - '1 day'::interval WHERE id = 3", user=importer)
    assert_unharmed(traps, {"amazon", "number", "anchor", "where"})
    assert order_value(traps, 3) == "scheduled"


@pytest.mark.parametrize("query, user", [
    ("SELECT * FROM amazon_pii.preview('shop')", "pii_auditor"),
    ("SELECT * FROM amazon_pii.preview('shop')", SUPERUSER),
    ("SELECT * FROM amazon_pii.explain_order('303-1234567-0000001')", SUPERUSER),
    ("SELECT * FROM amazon_pii.find_orders('P1')", "pii_operator"),
    ("SELECT * FROM amazon_pii.find_orders('P1')", SUPERUSER),
])
def test_traps_when_people_look(redacted, query, user):
    """Breaks when a function that only reads evaluates expressions as its caller."""
    redacted.sql(query, user=user)
    assert_unharmed(redacted, {"number"} if "find_orders" in query else {"amazon", "anchor"})


# Deferred triggers


PENDING = """
CREATE SCHEMA mine;
CREATE TABLE mine.seen (who name);
CREATE TABLE mine.bait (n int);
GRANT ALL ON SCHEMA mine TO PUBLIC;
GRANT ALL ON ALL TABLES IN SCHEMA mine TO PUBLIC;
CREATE FUNCTION mine.late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO mine.seen VALUES (current_user);
    BEGIN
        UPDATE shop.customers SET tier = 'pwned';
        INSERT INTO mine.seen VALUES ('pwned');
    EXCEPTION WHEN insufficient_privilege THEN NULL;
    END;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON mine.bait DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION mine.late();
"""


def test_what_the_caller_of_retrieve_left_pending_runs_as_the_caller(redacted):
    """Breaks when deferred triggers of the caller fire inside the switch: they would write to the shop as its owner."""
    disarm(redacted)
    redacted.sql("GRANT CREATE ON DATABASE " + redacted.name + " TO pii_operator")
    redacted.sql(PENDING, user="pii_operator")
    with redacted.connect("pii_operator", autocommit=False) as session, session.cursor() as cursor:
        cursor.execute("INSERT INTO mine.bait VALUES (1)")
        cursor.execute("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)])
    assert redacted.sql("SELECT who FROM mine.seen") == [("pii_operator",)]
    assert redacted.sql("SELECT DISTINCT tier FROM shop.customers") == [("normal",)]
    assert redacted.value("SELECT gift_message FROM shop.orders WHERE id = 1") == "Gift1"


def test_what_the_caller_of_apply_policy_left_pending_runs_as_the_caller(traps):
    """Breaks when the trial fires the caller's deferred triggers as the owner of the tables."""
    traps.sql("GRANT CREATE ON DATABASE " + traps.name + " TO pii_admin")
    traps.sql(PENDING, user="pii_admin")
    with traps.connect("pii_admin", autocommit=False) as session, session.cursor() as cursor:
        cursor.execute("INSERT INTO mine.bait VALUES (1)")
        cursor.execute("SELECT amazon_pii.apply_policy(%s::jsonb)", [psycopg2.extras.Json(trapped_policy())])
    assert traps.sql("SELECT who FROM mine.seen WHERE who <> 'pwned'") == [("pii_admin",)]
