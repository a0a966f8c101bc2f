"""SECURITY.md's table of who may do what is the specification: the privileges are compared with it, cell by cell, and
the functions refuse by themselves whoever lacks the capability, whatever was granted."""
import re

import psycopg2
import pytest
from conftest import ROOT

TEXT = (ROOT / "SECURITY.md").read_text()
ROLES = ["amazon_pii_admin", "amazon_pii_operator", "amazon_pii_auditor", "public"]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT[: TEXT.index("## What is defended")].splitlines()
    if line.startswith("| ")
][1:]


def documented(pattern):
    """{name: the set of roles that may} for the names in the first cells of the table."""
    out = {}
    for action, *cells in ROWS:
        assert len(cells) == len(ROLES), action
        may = {role for role, cell in zip(ROLES, cells) if cell.startswith("yes")}
        for name in re.findall(pattern, action):
            assert name not in out, name
            out[name] = may
    return out


def test_the_functions_are_granted_as_the_table_says(db):
    granted = {}
    for name, signature in db.sql(
        "SELECT proname, oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'amazon_pii'::regnamespace"
        " AND prorettype NOT IN ('trigger'::regtype, 'event_trigger'::regtype)"
    ):
        may = {r for r in ROLES if db.value("SELECT has_function_privilege(%s, %s, 'EXECUTE')", [r, signature])}
        assert granted.setdefault(name, may) == may, signature
    assert granted == documented(r"`(\w+)\(\)`")


def test_the_views_are_granted_as_the_table_says(db):
    views = [v for (v,) in db.sql("SELECT relname FROM pg_class WHERE relnamespace = 'amazon_pii'::regnamespace AND relkind = 'v'")]
    granted = {v: {r for r in ROLES if db.value("SELECT has_table_privilege(%s, %s, 'SELECT')", [r, f"amazon_pii.{v}"])} for v in views}
    assert granted == documented(r"^view `(\w+)`")


def test_nobody_else_gets_anything(db):
    # Reading a state table, writing to a view or creating a trigger with our functions.
    every = "SELECT c.oid::regclass::text, c.relkind FROM pg_class c WHERE c.relnamespace = 'amazon_pii'::regnamespace AND c.relkind IN ('r', 'v', 'S')"
    for name, kind in db.sql(every):
        for role in ROLES:
            if kind == "S":
                assert not db.value("SELECT has_sequence_privilege(%s, %s, 'USAGE, SELECT, UPDATE')", [role, name]), (role, name)
                continue
            what = "INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER" + (", SELECT" if kind == "r" else "")
            assert not db.value("SELECT has_table_privilege(%s, %s, %s)", [role, name, what]), (role, name)
    for role in ROLES:
        assert not db.value("SELECT has_schema_privilege(%s, 'amazon_pii', 'CREATE')", [role])
        triggers = db.sql(
            "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'amazon_pii'::regnamespace"
            " AND prorettype IN ('trigger'::regtype, 'event_trigger'::regtype) AND has_function_privilege(%s, oid, 'EXECUTE')", [role],
        )
        assert triggers == []
    assert not db.value("SELECT has_schema_privilege('public', 'amazon_pii', 'USAGE')")


@pytest.mark.parametrize("call", [
    "SELECT amazon_pii.apply_policy('{}')", "SELECT amazon_pii.check_policy('{}')", "SELECT amazon_pii.enable_policy('x')",
    "SELECT amazon_pii.take_turn('x')", "SELECT amazon_pii.disable_policy('x', 'maintenance')", "SELECT amazon_pii.drop_policy('x')", "CALL amazon_pii.run_cycle()",
    "SELECT amazon_pii.unflag('x', 'x')", "SELECT amazon_pii.erase('x', 'x')", "SELECT amazon_pii.shred('x', 'x')",
    "SELECT amazon_pii.forget('x', 'x')", "SELECT amazon_pii.certificate('x')", "SELECT amazon_pii.retrieve('x', 'x')", "SELECT amazon_pii.end_retrieval('x')",
    "SELECT amazon_pii.peek('x', 'x')", "SELECT amazon_pii.hold('x', 'x', now())", "SELECT amazon_pii.release('x')",
    "SELECT amazon_pii.find_orders('x')", "SELECT amazon_pii.preview('x')", "SELECT amazon_pii.explain_order('x')",
    "SELECT amazon_pii.verify('x')", "SELECT amazon_pii.files_due('x')", "SELECT amazon_pii.ack_file(1)", "SELECT amazon_pii.preset('cin7')",
    "SELECT amazon_pii.mark_exported('x', now())", "SELECT amazon_pii.find_duplicates('x')", "SELECT amazon_pii.assert_mergeable('x', '1', '2')",
    "CALL amazon_pii.sanitize_copy('x')", "SELECT amazon_pii.backup_check()", "SELECT amazon_pii.adopt_copy()", "SELECT amazon_pii.reconcile()", "SELECT amazon_pii.archive_ddl()", "SELECT amazon_pii.check_archive('x.y')", "SELECT amazon_pii.archive_status()",
    "CALL amazon_pii.rotate_key()", "SELECT amazon_pii.key_status()", "SELECT amazon_pii.verify_audit_log()", "SELECT amazon_pii.evidence('x')",
    "SELECT amazon_pii.set_canary('x')",
])
def test_a_grant_on_a_function_is_no_capability(db, call):
    # A careless GRANT EXECUTE … TO PUBLIC would otherwise open the archive to everybody.
    db.sql("GRANT USAGE ON SCHEMA amazon_pii TO nobody_special; GRANT EXECUTE ON ALL ROUTINES IN SCHEMA amazon_pii TO nobody_special")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="amazon_pii_|must be"):
        db.sql(call, user="nobody_special")


def test_every_function_was_tried_above():
    tried = set(re.findall(r"amazon_pii\.(\w+)\(", str(test_a_grant_on_a_function_is_no_capability.pytestmark)))
    assert tried == set(documented(r"`(\w+)\(\)`"))


def test_the_audit_log_is_append_only_for_superusers_too(db):
    for statement in ("DELETE FROM", "TRUNCATE"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="append-only"):
            db.sql(f"{statement} amazon_pii.audit_entry")
    with pytest.raises(psycopg2.errors.InsufficientPrivilege, match="append-only"):
        db.sql("SET session_replication_role = replica; UPDATE amazon_pii.audit_entry SET reason = NULL")
    db.sql("RESET session_replication_role")


def test_key_settings_are_hidden_from_ordinary_users(preloaded_db):
    # A command that fetches a key may hold a password. Without preloading the server does not know that they are secret.
    for setting in ("amazon_pii.key_file", "amazon_pii.key_command", "amazon_pii.tombstone_file"):
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            preloaded_db.sql(f"SHOW {setting}", user="nobody_special")
