"""Who may do what: every function and view by every role, the log that nobody can rewrite, and what LISTEN tells."""
import json
import select

import pytest
from cluster import wait_until
from support import add_customer, add_invoice, add_order, number, open_shop, refused, run_cycle, shop_policy

ONE = number(1)
ADMIN, OPERATOR, AUDITOR = "pii_admin", "pii_operator", "pii_auditor"
EVERYBODY = (ADMIN, OPERATOR, AUDITOR)
FUNCTIONS = {
    "apply_policy(jsonb)": ("SELECT amazon_pii.apply_policy('{}')", {ADMIN}),
    "check_policy(jsonb)": ("SELECT * FROM amazon_pii.check_policy('{}')", {ADMIN}),
    "enable_policy(text)": ("SELECT amazon_pii.enable_policy('nothing')", {ADMIN}),
    "disable_policy(text,text)": ("SELECT amazon_pii.disable_policy('nothing', 'maintenance')", {ADMIN}),
    "drop_policy(text,text)": ("SELECT amazon_pii.drop_policy('nothing')", {ADMIN}),
    "run_cycle(text,boolean,bigint,bigint,bigint,bigint,bigint)": ("CALL amazon_pii.run_cycle('nothing')", {ADMIN}),
    "rotate_key(bigint,bigint)": ("CALL amazon_pii.rotate_key()", {ADMIN}),
    "adopt_copy(text)": ("SELECT amazon_pii.adopt_copy()", {ADMIN}),
    "reconcile(text)": ("SELECT * FROM amazon_pii.reconcile('nothing')", {ADMIN}),
    "archive_ddl(text,text,text,text,text)": ("SELECT * FROM amazon_pii.archive_ddl()", {ADMIN}),
    "check_archive(text)": ("SELECT * FROM amazon_pii.check_archive('nothing.at_all')", {ADMIN}),
    "sanitize_copy(text,bigint,bigint,bigint,bigint,bigint)": ("CALL amazon_pii.sanitize_copy('nothing')", {ADMIN}),
    "backup_check()": ("SELECT * FROM amazon_pii.backup_check()", {ADMIN, AUDITOR}),
    "archive_status()": ("SELECT * FROM amazon_pii.archive_status()", {ADMIN, AUDITOR}),
    "key_status()": ("SELECT * FROM amazon_pii.key_status()", {ADMIN, AUDITOR}),
    "unflag(text,text,text,text)": ("SELECT amazon_pii.unflag('nothing', 'x')", {ADMIN}),
    "erase(text,text,text,text)": ("SELECT amazon_pii.erase('nothing', 'x')", {ADMIN}),
    "shred(text,text,text,text)": ("SELECT amazon_pii.shred('nothing', 'x')", {ADMIN}),
    "forget(text,text,text,text)": ("SELECT amazon_pii.forget('nothing', 'x')", {ADMIN}),
    "certificate(text,text,text)": ("SELECT amazon_pii.certificate('nothing')", {ADMIN, AUDITOR}),
    "retrieve(text,text,text,text)": ("SELECT amazon_pii.retrieve('nothing', 'x')", {OPERATOR}),
    "peek(text,text,text,text)": ("SELECT amazon_pii.peek('nothing', 'x')", {OPERATOR}),
    "end_retrieval(text,text,text)": ("SELECT amazon_pii.end_retrieval('nothing')", {OPERATOR}),
    "hold(text,text,timestamp with time zone,text,text)": ("SELECT amazon_pii.hold('nothing', 'x', '2999-01-01')", {OPERATOR}),
    "release(text,text,text)": ("SELECT amazon_pii.release('nothing')", {OPERATOR}),
    "find_orders(text)": ("SELECT amazon_pii.find_orders('nothing')", {ADMIN, OPERATOR}),
    "find_duplicates(text)": ("SELECT amazon_pii.find_duplicates('nothing')", {ADMIN, OPERATOR}),
    "assert_mergeable(text,text,text)": ("SELECT amazon_pii.assert_mergeable('nothing', '1', '2')", {ADMIN, OPERATOR}),
    "preview(text,timestamp with time zone)": ("SELECT amazon_pii.preview('nothing')", set(EVERYBODY)),
    "explain_order(text)": ("SELECT amazon_pii.explain_order('nothing')", set(EVERYBODY)),
    "mark_exported(text,timestamp with time zone,boolean)": ("SELECT amazon_pii.mark_exported('nothing', now())", {ADMIN}),
    "set_canary(text,boolean,text)": ("SELECT amazon_pii.set_canary('nothing')", {ADMIN}),
    "files_due(text,bigint)": ("SELECT amazon_pii.files_due('nothing')", {OPERATOR}),
    "ack_file(bigint)": ("SELECT amazon_pii.ack_file(1)", {OPERATOR}),
    "preset(text)": ("SELECT amazon_pii.preset('nothing')", {ADMIN}),
    "verify_audit_log(text,bigint,text)": ("SELECT amazon_pii.verify_audit_log('nothing')", {ADMIN, AUDITOR}),
    "evidence(text,timestamp with time zone,timestamp with time zone)": ("SELECT amazon_pii.evidence('nothing')", {ADMIN, AUDITOR}),
    "verify(text,text)": ("SELECT amazon_pii.verify('nothing')", {ADMIN, AUDITOR}),
    # Triggers cannot be called; making one of them needs EXECUTE.
    "on_change()": ("CREATE TRIGGER mine AFTER INSERT ON pg_temp.mine EXECUTE FUNCTION amazon_pii.on_change()", set()),
    "on_apply()": ("CREATE TRIGGER mine AFTER INSERT ON pg_temp.mine EXECUTE FUNCTION amazon_pii.on_apply()", set()),
    "refuse_change()": ("CREATE TRIGGER mine AFTER INSERT ON pg_temp.mine EXECUTE FUNCTION amazon_pii.refuse_change()", set()),
    "on_ddl()": ("SELECT amazon_pii.on_ddl()", set()),
}
VIEWS = {
    "audit_log": set(EVERYBODY), "canaries": {ADMIN, AUDITOR}, "runs": set(EVERYBODY), "status": set(EVERYBODY), "kept_longer": set(EVERYBODY), "policies": {ADMIN, AUDITOR},
    "unclassified": set(EVERYBODY), "by_age": set(EVERYBODY), "files": set(EVERYBODY),
    "key_status": {ADMIN, AUDITOR}, "archive_status": {ADMIN, AUDITOR},
    "orders": {ADMIN, OPERATOR}, "records": {ADMIN, OPERATOR}, "overdue": {ADMIN, OPERATOR}, "upcoming": {ADMIN, OPERATOR},
}
USERS = (*EVERYBODY, "nobody_special", "shop_owner")


@pytest.fixture
def shop(db):
    """Order 1 is redacted."""
    open_shop(db)
    add_order(db, 1)
    db.apply_policy(shop_policy())
    run_cycle(db)
    return db


def call(db, function, *arguments, user=OPERATOR):
    return db.sql(f"SELECT * FROM amazon_pii.{function}({', '.join(['%s'] * len(arguments))})", arguments, user)


def test_roles_have_their_functions_and_nothing_else(shop):
    """Breaks when a function can be called by a role that it is not for, is refused to one that it is for, or is in no list."""
    known = {r[0] for r in shop.sql("SELECT replace(oid::regprocedure::text, 'amazon_pii.', '') FROM pg_proc "
                                    "WHERE pronamespace = 'amazon_pii'::regnamespace")}
    listed = set(FUNCTIONS)
    named = {k for k in known if k not in listed and k.split("(")[0] in {name.split("(")[0] for name in listed}}
    assert not named, "the signature of a listed function has changed"
    # Trigger and helper functions that are nobody's need no line.
    for unlisted in known - listed:
        grants = [u for u in USERS if shop.value("SELECT has_function_privilege(%s, %s, 'EXECUTE')", [u, f"amazon_pii.{unlisted}"])]
        assert grants == [], unlisted
    assert listed <= known
    for user in USERS:
        shop.sql("CREATE TEMP TABLE mine (n int)", user=user)
        for name, (statement, allowed) in FUNCTIONS.items():
            with pytest.raises(Exception) as caught:
                shop.sql(statement, user=user)
                raise AssertionError(f"{user}: {name} has nothing to refuse") if user not in allowed else ValueError
            denied = getattr(caught.value, "pgcode", None) == "42501"
            assert denied == (user not in allowed), f"{user}: {name}: {caught.value}"


def test_roles_have_their_views_and_no_table(shop):
    """Breaks when a role can read what it should not, or write anything of the extension's."""
    views = {r[0] for r in shop.sql("SELECT relname FROM pg_class WHERE relnamespace = 'amazon_pii'::regnamespace AND relkind = 'v'")}
    assert views == set(VIEWS)
    for user in USERS:
        for view, allowed in VIEWS.items():
            if user in allowed:
                shop.sql(f"SELECT * FROM amazon_pii.{view}", user=user)
            else:
                with refused("42501"):
                    shop.sql(f"SELECT * FROM amazon_pii.{view}", user=user)
    rights = """
        SELECT r, c.oid::regclass::text, p FROM pg_class AS c, unnest(%s) AS r, unnest(%s) AS p
         WHERE c.relnamespace IN ('amazon_pii'::regnamespace, 'amazon_pii_archive'::regnamespace) AND c.relkind IN ('r', 'v', 'p')
           AND has_table_privilege(r, c.oid, p) AND NOT (c.relkind = 'v' AND p = 'SELECT')"""
    privileges = ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"]
    assert shop.sql(rights, [list(USERS), privileges]) == []
    assert [u for u in USERS if shop.value("SELECT has_schema_privilege(%s, 'amazon_pii_archive', 'USAGE')", [u])] == []


def test_a_view_does_not_hand_its_reader_the_hidden_rows(shop):
    """Breaks when a cheap function in WHERE sees rows of a view before its own conditions, or runs with the owner's rights."""
    for view in VIEWS:
        assert shop.value("SELECT 'security_barrier=true' = ANY (reloptions) FROM pg_class WHERE oid = %s::regclass", [f"amazon_pii.{view}"])


@pytest.mark.parametrize("statement", [
    "UPDATE {} SET reason = 'better'", "DELETE FROM {}", "DELETE FROM {} WHERE false", "TRUNCATE {}",
    "INSERT INTO {} (audit_id, \"user\", action) OVERRIDING SYSTEM VALUE SELECT min(audit_id), 'x', 'x' FROM amazon_pii.audit_entry "
    "ON CONFLICT (audit_id) DO UPDATE SET reason = 'x'"])
@pytest.mark.parametrize("user", ["postgres", AUDITOR, ADMIN])
def test_the_audit_log_is_append_only(shop, statement, user):
    """Breaks when the log can be rewritten, by its owner, by a superuser, or as a replica."""
    before = shop.sql("SELECT a::text FROM amazon_pii.audit_entry AS a ORDER BY audit_id")
    session = shop.connect(user)
    with session.cursor() as cursor:
        for role in ("origin", "replica") if user == "postgres" else ("",):
            if role:
                cursor.execute(f"SET session_replication_role = {role}")
            with pytest.raises(Exception) as caught:
                cursor.execute(statement.format("amazon_pii.audit_entry"))
            assert caught.value.pgcode == "42501"
            with pytest.raises(Exception):
                cursor.execute(statement.format("amazon_pii.audit_log"))
    session.close()
    assert shop.sql("SELECT a::text FROM amazon_pii.audit_entry AS a ORDER BY audit_id") == before


def test_who_it_was_is_the_session_user(shop):
    """Breaks when SET ROLE hides who looked."""
    shop.sql("GRANT pii_operator TO nobody_special")
    session = shop.connect("nobody_special")
    with session.cursor() as cursor:
        cursor.execute("SET ROLE pii_operator; SELECT amazon_pii.peek(%s, 'return')", [ONE])
    session.close()
    shop.sql("REVOKE pii_operator FROM nobody_special")
    assert shop.sql("SELECT \"user\" FROM amazon_pii.audit_log WHERE action = 'peek'") == [("nobody_special",)]


def test_notifications_tell_what_changed_and_no_pii(db):
    """P9. Breaks when a change of state is not announced, or a payload holds a value of a row."""
    open_shop(db)
    add_customer(db, 1)
    db.apply_policy(shop_policy())
    listener = db.connect("nobody_special")
    listener.cursor().execute("LISTEN amazon_pii")
    add_order(db, 1, customer=1)
    add_invoice(db, 1, 1)
    db.sql("INSERT INTO shop.orders (id, external_no, channel, shipped_at, gift_message) SELECT i, 'n' || i, 'amazon', "
           "now() - '40 days'::interval, 'Gift1' FROM generate_series(1000, 2499) AS i", user="shop_owner")
    run_cycle(db)
    call(db, "retrieve", ONE, "return")
    call(db, "hold", ONE, "dispute", "2999-01-01")
    call(db, "release", ONE)
    call(db, "end_retrieval", ONE)
    run_cycle(db)
    call(db, "unflag", ONE, "wrong policy", user=ADMIN)
    seen = []

    def heard():
        select.select([listener], [], [], 0)
        listener.poll()
        while listener.notifies:
            seen.append(listener.notifies.pop(0).payload)
        return any('"unflagged"' in payload for payload in seen)

    wait_until(heard)
    listener.close()
    assert not [p for p in seen for word in ("Gift1", "Name1", "Street 1", "First1", "buyer1", "+49", "BillTo1", ONE) if word in p]
    said = [json.loads(p) for p in seen]
    assert {s["status"] for s in said} >= {"archived", "redacted", "retrieved", "hold", "release", "end_retrieval", "unflagged"}
    assert all(s["policy"] == "shop" for s in said) and all(len(p.encode()) < 8000 for p in seen)
    first = [s for s in said if s["status"] == "redacted"]
    assert sum(s["count"] for s in first) == 1502, "1501 orders, one of them twice"
    assert all(s["complete"] == (len(s["orders"]) == s["count"]) for s in first)
