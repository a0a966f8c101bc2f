"""P8: what a caller, a neighbour or a table owner may not get at by names, paths, schemas and errors."""
import json
from contextlib import closing

import psycopg2
import pytest
from conftest import SUPERUSER
from support import (
    PLACEHOLDER, Background, add_customer, add_order, go_on, hurry, number, open_shop, order_value, refused, run_cycle,
    shop_policy, stop_at, stopped, sweep,
)

# What an intruder's code leaves behind: the names under which it ran.
SPY = """
CREATE SCHEMA spy AUTHORIZATION nobody_special;
GRANT USAGE, CREATE ON SCHEMA spy TO nobody_special;
SET ROLE nobody_special;
CREATE TABLE spy.seen (who name);
CREATE SEQUENCE spy.ran;
GRANT USAGE ON SCHEMA spy TO PUBLIC;
GRANT ALL ON spy.seen, spy.ran TO PUBLIC;
CREATE FUNCTION spy.look() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_catalog.nextval('spy.ran');
    INSERT INTO spy.seen VALUES (current_user);
    RETURN true;
EXCEPTION WHEN OTHERS THEN RETURN true;
END $$;
"""


@pytest.fixture
def shop(db):
    open_shop(db)
    add_customer(db, 1)
    add_order(db, 1, customer=1)
    return db


@pytest.fixture
def applied(shop):
    shop.apply_policy(shop_policy())
    return shop


@pytest.fixture
def spied(shop):
    shop.psql(SPY)
    return shop


def spied_upon(db):
    """Whether code of nobody_special's ran."""
    return db.value("SELECT is_called FROM spy.ran")


# Whose tables


def foreign_tables(db):
    db.sql("CREATE SCHEMA theirs; CREATE TABLE theirs.orders (id bigint PRIMARY KEY, order_id bigint, no text, at timestamptz, who text); "
           "CREATE INDEX ON theirs.orders (order_id); INSERT INTO theirs.orders VALUES (1, 1, '303-1234567-0000001', now(), 'Their1')",
           user="other_owner")


@pytest.mark.parametrize("document", [
    {"policy": "grab", "orders": {"table": "theirs.orders", "number": "no", "anchor": "at", "redact": ["who"]}},
    shop_policy(linked=[{"table": "theirs.orders", "on": {"order_id": "id"}, "redact": ["who"]}]),
    shop_policy(linked=[{"table": "amazon_pii.order_state", "on": {"order_key": "id::text"}}]),
    shop_policy(linked=[{"table": "pg_catalog.pg_authid", "on": {"rolname": "id::text"}, "redact": ["rolpassword"]}]),
])
def test_nobody_applies_a_policy_to_tables_of_others(shop, document):
    """Breaks when ownership of every table is not checked first."""
    foreign_tables(shop)
    with refused("42501", "must be owner of table"):
        shop.apply_policy(document)
    found = shop.check_policy(document)
    assert len(found) == 1 and found[0][0] == "error" and "must be owner of table" in found[0][2]
    assert shop.sql("SELECT * FROM amazon_pii.policies") == []
    assert shop.sql("SELECT who FROM theirs.orders") == [("Their1",)]
    assert shop.sql("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'amazon_pii%'") == []


def test_a_table_that_changes_hands_suspends_the_policy(applied):
    """Breaks when a cycle goes on under the new owner's rights, who never agreed, or writes with the old one's."""
    applied.sql("GRANT USAGE, CREATE ON SCHEMA shop TO other_owner; ALTER TABLE shop.addresses OWNER TO other_owner")
    with refused("42501", "has another owner now"):
        run_cycle(applied, "shop")
    assert applied.value("SELECT name FROM shop.addresses") == "Name1"
    assert "another owner" in applied.value("SELECT last_error FROM amazon_pii.status")
    applied.sql("GRANT other_owner TO pii_admin")
    try:
        applied.apply_policy(shop_policy())
        run_cycle(applied)
        assert applied.value("SELECT name FROM shop.addresses") == PLACEHOLDER
    finally:
        applied.sql("REVOKE other_owner FROM pii_admin")


# The archive's schema


@pytest.mark.parametrize("schema", ["shop", "theirs", "public", "pg_catalog", "information_schema", "amazon_pii"])
def test_the_archive_goes_into_no_schema_of_somebody_elses(shop, schema):
    """Breaks when an administrator can point the extension at a schema that is not for archives."""
    foreign_tables(shop)
    with pytest.raises(psycopg2.Error) as caught:
        shop.apply_policy(shop_policy(archive={"schema": schema}))
    assert caught.value.pgcode in ("42501", "22023")
    assert shop.sql("SELECT 1 FROM pg_class WHERE relname IN ('document', 'data_key')") == []


FALSE_ARCHIVE = """
CREATE TABLE {0}.document (policy text, order_key text, table_name text, record_key text, version bigint, sealed bytea, key_id text,
    archived_at timestamptz DEFAULT now(), PRIMARY KEY (policy, order_key, table_name, record_key, version));
CREATE TABLE {0}.data_key (policy text, order_key text, key_id text, wrapped bytea, master_key_id text,
    created_at timestamptz DEFAULT now(), PRIMARY KEY (policy, order_key, key_id));
GRANT ALL ON {0}.document, {0}.data_key TO PUBLIC;
CREATE FUNCTION spy.look_row() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM spy.look(); RETURN NEW; END';
CREATE TRIGGER look BEFORE INSERT ON {0}.document FOR EACH ROW EXECUTE FUNCTION spy.look_row();
CREATE TRIGGER look BEFORE INSERT ON {0}.data_key FOR EACH ROW EXECUTE FUNCTION spy.look_row();
"""


def test_an_archive_that_somebody_prepared_is_refused(spied):
    """Breaks when tables of others are taken for the archive: their triggers would run as the extension's owner."""
    spied.sql("CREATE SCHEMA common; GRANT ALL ON SCHEMA common TO nobody_special")
    spied.sql(FALSE_ARCHIVE.format("common"), user="nobody_special")
    document = shop_policy(archive={"schema": "common"})
    with refused("42501", "common"):
        spied.apply_policy(document)
    assert spied.sql("SELECT * FROM amazon_pii.policies") == []
    assert not spied_upon(spied)


def test_an_archive_that_was_replaced_is_not_written_to(spied):
    """Breaks when a cycle takes whatever bears the archive's name: its triggers would run as the extension's owner."""
    spied.apply_policy(shop_policy())
    spied.sql("DROP SCHEMA amazon_pii_archive CASCADE; CREATE SCHEMA amazon_pii_archive AUTHORIZATION nobody_special")
    spied.sql(FALSE_ARCHIVE.format("amazon_pii_archive"), user="nobody_special")
    run_cycle(spied)
    assert not spied_upon(spied)
    assert spied.value("SELECT count(*) FROM amazon_pii_archive.data_key") == 0
    assert spied.value("SELECT gift_message FROM shop.orders") == "Gift1"
    assert order_value(spied, 1) == "failed"


# Names and paths


def test_operators_on_the_path_of_whoever_applies_are_not_ours(spied):
    """Breaks when a statement of ours leaves an operator or function to the caller's search_path."""
    spied.sql("CREATE FUNCTION spy.joined(text[], text[]) RETURNS text[] LANGUAGE plpgsql AS "
              "'BEGIN PERFORM spy.look(); RETURN pg_catalog.array_cat($1, $2); END'; "
              "CREATE OPERATOR spy.|| (LEFTARG = text[], RIGHTARG = text[], FUNCTION = spy.joined); "
              "CREATE FUNCTION spy.is(name, text) RETURNS boolean LANGUAGE plpgsql AS "
              "'BEGIN PERFORM spy.look(); RETURN $1::pg_catalog.text OPERATOR(pg_catalog.=) $2; END'; "
              "CREATE OPERATOR spy.= (LEFTARG = name, RIGHTARG = text, FUNCTION = spy.is)", user="nobody_special")
    with closing(spied.connect()) as session, session.cursor() as cursor:
        for path in ("shop, spy", "spy, shop, pg_catalog"):
            cursor.execute("SELECT pg_catalog.set_config('search_path', %s, false)", [path])
            cursor.execute("SELECT amazon_pii.apply_policy(%s::pg_catalog.jsonb)", [json.dumps(shop_policy())])
            cursor.execute("SELECT * FROM amazon_pii.find_orders('x')")
            cursor.execute("CALL amazon_pii.run_cycle('shop')")
    assert not spied_upon(spied)


def test_operators_on_the_policys_path_are_not_ours(spied):
    """Breaks when keys are compared by whatever `=` the path finds first: a neighbour's code would run as the owner."""
    spied.sql("CREATE FUNCTION spy.is(varchar, varchar) RETURNS boolean LANGUAGE plpgsql AS "
              "'BEGIN PERFORM spy.look(); RETURN $1::text = $2::text; END'; "
              "CREATE OPERATOR spy.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = spy.is); "
              "CREATE OPERATOR spy.> (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = spy.is)", user="nobody_special")
    spied.sql("CREATE TABLE shop.sales (no varchar(30) PRIMARY KEY, at timestamptz, gift text); "
              "CREATE TABLE shop.parcels (no varchar(30) PRIMARY KEY, sale varchar(30), label text); CREATE INDEX ON shop.parcels (sale); "
              "INSERT INTO shop.sales VALUES ('303-1234567-0000009', now() - '40 days'::interval, 'Gift9'); "
              "INSERT INTO shop.parcels VALUES ('P9', '303-1234567-0000009', 'Label9')", user="shop_owner")
    document = {"policy": "shop", "enabled": True,
                "orders": {"table": "shop.sales", "number": "no", "anchor": "at", "redact": ["gift"]},
                "linked": [{"table": "shop.parcels", "on": {"sale": "no"}, "number": "no", "redact": ["label"]}]}
    with closing(spied.connect("pii_admin")) as session, session.cursor() as cursor:
        cursor.execute("SET search_path = shop, spy")
        cursor.execute("SELECT amazon_pii.apply_policy(%s::jsonb)", [json.dumps(document)])
    sweep(spied)
    assert spied.sql("SELECT gift, label FROM shop.sales, shop.parcels") == [(PLACEHOLDER, PLACEHOLDER)]
    spied.sql("UPDATE shop.parcels SET label = 'again'", user="shop_owner")
    run_cycle(spied)
    spied.sql("SELECT * FROM amazon_pii.retrieve('303-1234567-0000009', 'return')", user="pii_operator")
    spied.sql("UPDATE shop.sales SET at = at", user="shop_owner")
    spied.sql("SELECT * FROM amazon_pii.find_orders('P9')", user="pii_operator")
    assert spied.sql("SELECT DISTINCT who FROM spy.seen") == []
    assert not spied_upon(spied)


def test_types_of_one_owner_do_not_run_as_another(spied):
    """Breaks when a link's values travel in the other side's own type: the CHECK of its domain would run as this side's owner."""
    spied.sql("CREATE FUNCTION shop.see(bigint) RETURNS boolean LANGUAGE plpgsql AS "
              "'BEGIN IF current_user <> ''shop_owner'' THEN PERFORM spy.look(); END IF; RETURN true; END'; "
              "CREATE DOMAIN shop.number AS bigint CHECK (shop.see(VALUE)); GRANT USAGE ON SCHEMA shop TO other_owner; "
              "CREATE TABLE shop.sales (id bigint PRIMARY KEY, no text, at timestamptz, buyer shop.number); "
              "INSERT INTO shop.sales VALUES (9, '303-1234567-0000009', now() - '40 days'::interval, 7)", user="shop_owner")
    spied.sql("CREATE SCHEMA theirs; CREATE TABLE theirs.buyers (id bigint PRIMARY KEY, name text); INSERT INTO theirs.buyers VALUES (7, 'Name7')",
              user="other_owner")
    spied.sql("GRANT USAGE ON SCHEMA spy TO PUBLIC")
    document = {"policy": "shop", "enabled": True, "orders": {"table": "shop.sales", "number": "no", "anchor": "at"},
                "linked": [{"table": "theirs.buyers", "on": {"id": "buyer"}, "redact": ["name"]}]}
    spied.apply_policy(document, SUPERUSER)
    sweep(spied)
    assert spied.sql("SELECT name FROM theirs.buyers") == [(PLACEHOLDER,)]
    assert spied.sql("SELECT who FROM spy.seen") == []
    assert not spied_upon(spied)


def test_unqualified_names_in_the_shops_triggers_still_work(shop):
    """Breaks when the owner's code runs without the search_path that was in effect when the policy was applied."""
    shop.sql("CREATE TABLE shop.changes (n bigint); "
             "CREATE FUNCTION shop.log() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO changes VALUES (NEW.id); RETURN NEW; END'; "
             "CREATE TRIGGER log BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.log()", user="shop_owner")
    with closing(shop.connect("pii_admin")) as session, session.cursor() as cursor:
        cursor.execute("SET search_path = shop, public")
        cursor.execute("SELECT amazon_pii.apply_policy(%s::jsonb)", [json.dumps(shop_policy())])
    with closing(shop.connect("pii_admin")) as session, session.cursor() as cursor:
        cursor.execute("SET search_path = pg_temp")
        cursor.execute("CREATE TEMP TABLE changes (n bigint)")
        cursor.execute("CALL amazon_pii.run_cycle()")
        cursor.execute("SELECT count(*) FROM changes")
        assert cursor.fetchone() == (0,), "the caller's temporary table was taken for the shop's"
    assert shop.sql("SELECT n FROM shop.changes") == [(1,)]
    assert shop.value("SELECT gift_message FROM shop.orders") == PLACEHOLDER


# Row-level security


def test_rows_hidden_from_others_are_redacted_all_the_same(shop):
    """Breaks when rows are read or written as somebody to whom the table's policies apply."""
    shop.sql("ALTER TABLE shop.orders ENABLE ROW LEVEL SECURITY; ALTER TABLE shop.addresses ENABLE ROW LEVEL SECURITY; "
             "GRANT USAGE ON SCHEMA shop TO nobody_special; GRANT SELECT, INSERT ON shop.orders TO nobody_special; "
             "CREATE POLICY insert_only ON shop.orders FOR INSERT TO nobody_special WITH CHECK (true)", user="shop_owner")
    shop.apply_policy(shop_policy())
    shop.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) VALUES (2, %s, 'amazon', now() - '40 days'::interval, 'Gift2')",
             [number(2)], "nobody_special")
    assert shop.sql("SELECT * FROM shop.orders", user="nobody_special") == []
    assert run_cycle(shop)["redacted"] == 2
    assert shop.sql("SELECT DISTINCT gift_message FROM shop.orders") == [(PLACEHOLDER,)]


def test_rows_hidden_from_the_owner_raise_instead_of_hiding(applied):
    """Breaks when security forced upon the owner makes orders look as if they were gone or done."""
    applied.sql("ALTER TABLE shop.addresses ENABLE ROW LEVEL SECURITY; ALTER TABLE shop.addresses FORCE ROW LEVEL SECURITY", user="shop_owner")
    with refused("22023", "row-level security"):
        run_cycle(applied, "shop")
    assert order_value(applied, 1) in (None, "flagged", "scheduled")
    assert "row-level security" in applied.value("SELECT last_error FROM amazon_pii.status")
    applied.sql("ALTER TABLE shop.addresses NO FORCE ROW LEVEL SECURITY", user="shop_owner")
    assert run_cycle(applied)["redacted"] == 1


def test_rows_hidden_from_an_expression_raise_instead_of_hiding(shop):
    """Breaks without row_security = off: an order would be taken for none of Amazon's because a row is hidden."""
    shop.sql("CREATE SCHEMA theirs; CREATE TABLE theirs.amazon (id bigint); INSERT INTO theirs.amazon VALUES (1), (2); "
             "GRANT USAGE ON SCHEMA theirs TO PUBLIC; GRANT SELECT ON theirs.amazon TO PUBLIC", user="other_owner")
    shop.apply_policy(shop_policy(orders={**shop_policy()["orders"], "amazon": "id IN (SELECT a.id FROM theirs.amazon AS a)"}))
    shop.sql("ALTER TABLE theirs.amazon ENABLE ROW LEVEL SECURITY", user="other_owner")
    add_order(shop, 2)
    assert order_value(shop, 2) == "failed"
    run_cycle(shop)
    assert order_value(shop, 1) is None and order_value(shop, 2) == "failed"
    assert shop.value("SELECT last_error FROM amazon_pii.status").startswith("42501")
    shop.sql("ALTER TABLE theirs.amazon DISABLE ROW LEVEL SECURITY", user="other_owner")
    hurry(shop)
    run_cycle(shop)
    assert (order_value(shop, 1), order_value(shop, 2)) == ("redacted", "redacted")


# Locks, cancels, leftovers


def test_a_neighbours_lock_does_not_stop_redaction(applied):
    """Breaks when cycles take turns by an advisory lock, which anybody sees in pg_locks and may take and keep."""
    stop_at(applied, "orders", 1)
    first = Background(applied, "CALL amazon_pii.run_cycle('shop')")
    busy = stopped(applied)
    second = Background(applied, "CALL amazon_pii.run_cycle('shop')").wait_for_lock(applied)
    held = "SELECT locktype FROM pg_locks WHERE pid = ANY (%s) AND locktype IN ('advisory', 'userlock')"
    assert applied.sql(held, [[busy, second.pid]]) == []
    go_on(applied)
    applied.sql("SELECT pg_cancel_backend(%s)", [busy])
    with pytest.raises(psycopg2.errors.QueryCanceled):
        first.result()
    assert second.result()[0][2] == 1


@pytest.mark.parametrize("code", ["query_canceled", "admin_shutdown"])
def test_a_pretended_cancel_stops_nobody_else(shop, code):
    """Breaks when an error that the owner's code chooses is believed to be a cancel: one table could stop every policy."""
    add_order(shop, 2)
    shop.sql("CREATE FUNCTION shop.stop() RETURNS trigger LANGUAGE plpgsql AS "
             f"'BEGIN IF NEW.id = 1 THEN RAISE EXCEPTION USING ERRCODE = ''{code}''; END IF; RETURN NEW; END'", user="shop_owner")
    shop.apply_policy(shop_policy())
    shop.sql("CREATE TRIGGER stop BEFORE UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.stop()", user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert (order_value(shop, 1), order_value(shop, 2)) == ("failed", "redacted")


def test_a_partition_that_left_the_table_has_no_say(db):
    """Breaks when the triggers of a detached partition still speak for the policy, whoever owns that table now."""
    db.sql("CREATE SCHEMA shop; CREATE TABLE shop.orders (id bigint, day date, external_no text, shipped_at timestamptz, gift text, "
           "PRIMARY KEY (id, day)) PARTITION BY RANGE (day); "
           "CREATE TABLE shop.orders_1 PARTITION OF shop.orders FOR VALUES FROM ('2026-01-01') TO ('2026-02-01'); "
           "CREATE TABLE shop.orders_2 PARTITION OF shop.orders FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')", user="shop_owner")
    db.apply_policy({"policy": "shop", "enabled": True,
                     "orders": {"table": "shop.orders", "number": "external_no", "anchor": "shipped_at", "redact": ["gift"]}})
    db.sql("INSERT INTO shop.orders VALUES (1, '2026-01-05', %s, now() - '40 days'::interval, 'Gift1')", [number(1)], "shop_owner")
    db.sql("ALTER TABLE shop.orders DETACH PARTITION shop.orders_2", user="shop_owner")
    db.sql("GRANT USAGE, CREATE ON SCHEMA shop TO nobody_special; ALTER TABLE shop.orders_2 OWNER TO nobody_special")
    db.sql("INSERT INTO shop.orders_2 VALUES (1, '2026-01-05', 'forged', NULL, 'x')", user="nobody_special")
    db.sql("DELETE FROM shop.orders_2", user="nobody_special")
    db.sql("TRUNCATE shop.orders_2", user="nobody_special")
    assert db.sql("SELECT order_number, status FROM amazon_pii.orders") == [(number(1), "scheduled")]
