"""P8: who may call what; functions of ours in hands they are not made for; and the script of CREATE EXTENSION, run in a
database that somebody has prepared for it."""
import psycopg2.extras
import pytest
from conftest import Database, add_extension
from support import PLACEHOLDER, add_order, number, open_shop, refused, run_cycle, shop_policy


@pytest.fixture
def applied(db):
    open_shop(db)
    add_order(db, 1)
    db.apply_policy(shop_policy())
    return db


# Rights


def test_public_gets_nothing(db):
    """Breaks when a new function, table, view, sequence or schema is left with a right for PUBLIC."""
    assert db.sql("SELECT p.oid::regprocedure::text FROM pg_proc AS p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a "
                  "WHERE p.pronamespace = 'amazon_pii'::regnamespace AND a.grantee = 0") == []
    assert db.sql("SELECT c.relname FROM pg_class AS c, aclexplode(c.relacl) AS a WHERE c.relnamespace = 'amazon_pii'::regnamespace "
                  "AND a.grantee = 0") == []
    assert db.sql("SELECT 1 FROM pg_namespace AS n, aclexplode(n.nspacl) AS a WHERE n.nspname = 'amazon_pii' AND a.grantee = 0") == []
    assert db.sql("SELECT a.privilege_type FROM pg_class AS c, aclexplode(c.relacl) AS a WHERE c.relnamespace = 'amazon_pii'::regnamespace "
                  "AND c.relkind <> 'v' AND a.grantee <> c.relowner") == []


def test_no_function_runs_as_its_definer(db):
    """Breaks when a function of ours becomes SECURITY DEFINER: whatever its callers can make it do it does as a superuser."""
    assert db.sql("SELECT proname FROM pg_proc WHERE pronamespace = 'amazon_pii'::regnamespace AND prosecdef") == []


# Each call, who may make it, and with which arguments it does no harm where it is allowed.
CALLS = {
    "SELECT amazon_pii.apply_policy('{}')": {"pii_admin"},
    "SELECT * FROM amazon_pii.check_policy('{}')": {"pii_admin"},
    "SELECT amazon_pii.enable_policy('shop')": {"pii_admin"},
    "SELECT amazon_pii.disable_policy('none', 'maintenance')": {"pii_admin"},
    "SELECT amazon_pii.drop_policy('none')": {"pii_admin"},
    "CALL amazon_pii.run_cycle('none')": {"pii_admin"},
    "SELECT * FROM amazon_pii.unflag('none')": {"pii_admin"},
    "SELECT amazon_pii.erase('none', 'return')": {"pii_admin"},
    "SELECT amazon_pii.shred('none', 'return')": {"pii_admin"},
    "SELECT amazon_pii.forget('none', 'return')": {"pii_admin"},
    "SELECT amazon_pii.certificate('none')": {"pii_admin", "pii_auditor"},
    "SELECT * FROM amazon_pii.retrieve('none', 'return')": {"pii_operator"},
    "SELECT amazon_pii.peek('none', 'return')": {"pii_operator"},
    "SELECT amazon_pii.end_retrieval('none')": {"pii_operator"},
    "SELECT amazon_pii.hold('none', 'return', now() + '1 day'::interval)": {"pii_operator"},
    "SELECT amazon_pii.release('none')": {"pii_operator"},
    "SELECT * FROM amazon_pii.find_orders('none')": {"pii_operator", "pii_admin"},
    "SELECT * FROM amazon_pii.preview('shop')": {"pii_operator", "pii_admin", "pii_auditor"},
    "SELECT * FROM amazon_pii.explain_order('none')": {"pii_operator", "pii_admin", "pii_auditor"},
    "SELECT * FROM amazon_pii.policies": {"pii_admin", "pii_auditor"},
    "SELECT * FROM amazon_pii.status": {"pii_operator", "pii_admin", "pii_auditor"},
    "SELECT * FROM amazon_pii.runs": {"pii_operator", "pii_admin", "pii_auditor"},
    "SELECT * FROM amazon_pii.orders": {"pii_operator", "pii_admin"},
    "SELECT * FROM amazon_pii.records": {"pii_operator", "pii_admin"},
    "SELECT * FROM amazon_pii.overdue": {"pii_operator", "pii_admin"},
    "SELECT * FROM amazon_pii.upcoming": {"pii_operator", "pii_admin"},
    "SELECT * FROM amazon_pii.audit_log": {"pii_operator", "pii_admin", "pii_auditor"},
    "SELECT * FROM amazon_pii.canaries": {"pii_admin", "pii_auditor"},
    "SELECT amazon_pii.set_canary('x')": {"pii_admin"},
    "SELECT * FROM amazon_pii.canary": set(),
    "UPDATE amazon_pii.access_count SET orders = 0": set(),
    "SELECT * FROM amazon_pii.order_state": set(),
    "SELECT * FROM amazon_pii.audit_entry": set(),
    "SELECT * FROM amazon_pii_archive.document": set(),
    "SELECT * FROM amazon_pii_archive.data_key": set(),
    "INSERT INTO amazon_pii.touched (policy, entry) VALUES ('shop', '')": set(),
    "UPDATE amazon_pii.orders SET attempts = 0": set(),
    "DELETE FROM amazon_pii.audit_entry": set(),
}
USERS = ("pii_admin", "pii_operator", "pii_auditor", "shop_owner", "other_owner", "nobody_special")


@pytest.mark.parametrize("call", CALLS)
def test_who_may_call_what(applied, call):
    """Breaks when a role is given more, or less, than it is for. A table owner gets nothing by owning tables."""
    for user in USERS:
        try:
            applied.sql(call, user=user)
            code = None
        except psycopg2.Error as e:
            code = e.pgcode
        assert (code != "42501") == (user in CALLS[call]), f"{user}: {code}"


def test_the_caller_is_whoever_calls_now(applied):
    """Breaks when rights are taken from the session's user: SET ROLE and definers' functions would not put them away."""
    with applied.connect() as session, session.cursor() as cursor:
        cursor.execute("SET LOCAL ROLE nobody_special")
        with refused("42501"):
            cursor.execute("SELECT * FROM amazon_pii.explain_order('none')")
    applied.sql("GRANT USAGE ON SCHEMA amazon_pii TO nobody_special; "
                "GRANT EXECUTE ON ALL ROUTINES IN SCHEMA amazon_pii TO nobody_special")
    for call in [c for c in CALLS if "amazon_pii." in c and "(" in c and "touched" not in c]:
        with refused("42501", "permission denied to"):
            applied.sql(call, user="nobody_special")


def test_status_needs_no_library(applied):
    """Breaks when the view asks for a setting that a session does not have before it called one of our functions."""
    applied.sql("INSERT INTO amazon_pii.heartbeat (worker, pid, beat_at) VALUES ('database', 1, now() - '1 day'::interval)")
    session = applied.connect("pii_auditor")
    with session.cursor() as cursor:
        cursor.execute("SELECT worker FROM amazon_pii.status")
        assert cursor.fetchone()[0].startswith("not running since")
    session.close()


# Functions and settings where they do not belong


@pytest.mark.parametrize("function", ["on_change()", "on_apply()", "on_ignore()", "on_reimport()", "on_ddl()", "refuse_change()"])
def test_trigger_functions_cannot_be_called(applied, function):
    """Breaks when one of them, called by hand, crashes the server or does something."""
    for user in USERS:
        with refused("42501"):
            applied.sql(f"SELECT amazon_pii.{function} IS NULL", user=user)
    try:
        applied.sql(f"SELECT amazon_pii.{function} IS NULL")
    except psycopg2.Error as e:
        assert e.pgcode in ("0A000", "22023", "39P03", "XX000", "42809")
    assert applied.value("SELECT 1") == 1


@pytest.mark.parametrize("user", ["shop_owner", "nobody_special", "pii_admin"])
def test_nobody_makes_a_trigger_of_ours(applied, user):
    """Breaks when a user can attach on_change to a table of his own, and so speak for somebody's policy."""
    applied.sql(f"GRANT CREATE ON DATABASE {applied.name} TO {user}")
    applied.sql("CREATE SCHEMA mine; CREATE TABLE mine.orders (id bigint PRIMARY KEY)", user=user)
    for function in ("on_change", "on_apply", "on_ignore", "on_reimport"):
        with refused("42501"):
            applied.sql(f"CREATE TRIGGER t AFTER INSERT ON mine.orders FOR EACH ROW EXECUTE FUNCTION amazon_pii.{function}('shop', '')", user=user)


@pytest.mark.parametrize("kind", [
    "AFTER INSERT OR DELETE OR UPDATE ON {} FOR EACH ROW", "BEFORE INSERT OR UPDATE ON {} FOR EACH ROW",
    "AFTER INSERT OR UPDATE OR DELETE ON {} FOR EACH STATEMENT", "BEFORE TRUNCATE ON {} FOR EACH STATEMENT",
])
@pytest.mark.parametrize("arguments", ["", "'shop'", "'shop', ''", "'shop', 'addresses', 'x'", "'none', ''"])
def test_a_trigger_of_ours_where_it_does_not_belong_does_nothing(applied, kind, arguments):
    """Breaks when on_change trusts that it hangs where the extension put it: a superuser may have hung it elsewhere."""
    before = applied.sql("SELECT * FROM amazon_pii.order_state")
    applied.sql("CREATE TABLE mine (id bigint PRIMARY KEY, n int); GRANT ALL ON mine TO nobody_special")
    applied.sql(f"CREATE TRIGGER t {kind.format('mine')} EXECUTE FUNCTION amazon_pii.on_change({arguments})")
    for statement in ("INSERT INTO mine VALUES (1), (2)", "UPDATE mine SET n = 1", "DELETE FROM mine", "TRUNCATE mine"):
        try:
            applied.sql(statement, user="nobody_special")
        except psycopg2.Error as e:
            assert "trigger" in str(e)
    assert applied.sql("SELECT * FROM amazon_pii.order_state") == before


def test_nobody_names_a_key_or_a_command(applied, tmp_path):
    """Breaks when a setting that a session made before the library was loaded is believed: key_command runs as the server's user."""
    run_cycle(applied)
    mark = applied.cluster.base / "pwned"
    for options in ("", f"-c amazon_pii.key_command=touch\\ {mark}"):
        session = applied.connect("pii_operator", options=options)
        with session.cursor() as cursor:
            if not options:
                cursor.execute("SET amazon_pii.key_command = %s", [f"touch {mark}"])
            cursor.execute("SELECT amazon_pii.peek(%s, 'return')::text", [number(1)])
            assert "Gift1" in cursor.fetchone()[0]
            with refused("42501"):
                cursor.execute("SHOW amazon_pii.key_command")
        session.close()
    # Whoever hides the real setting from his own session has no key there, and no other one either.
    with applied.connect("pii_operator", options="-c amazon_pii.key_file=/etc/passwd") as session, session.cursor() as cursor:
        with refused("F0000", "no master key is configured"):
            cursor.execute("SELECT amazon_pii.peek(%s, 'return')", [number(1)])
    session.close()
    for setting in ("key_command", "key_file", "databases", "naptime", "enabled"):
        with refused("55P02"):
            applied.sql(f"LOAD 'amazon_pii'; SET amazon_pii.{setting} = '1'")
    assert not mark.exists()


# The script


PREPARED = """
CREATE TABLE public.seen (who name, what text);
GRANT ALL ON public.seen TO PUBLIC;
CREATE FUNCTION public.saw(what text) RETURNS void LANGUAGE sql AS $$ INSERT INTO public.seen VALUES (current_user, what) $$;
CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE plpgsql AS $$ BEGIN PERFORM public.saw('now'); RETURN pg_catalog.now(); END $$;
CREATE FUNCTION public.format(text, name) RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM public.saw('format'); RETURN ''; END $$;
CREATE FUNCTION public.format(text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM public.saw('format'); RETURN ''; END $$;
CREATE FUNCTION public.pg_extension_config_dump(regclass, text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM public.saw('dump'); END $$;
CREATE FUNCTION public.pg_get_serial_sequence(text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM public.saw('serial'); RETURN $1; END $$;
CREATE FUNCTION public.same(name, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN PERFORM public.saw('='); RETURN true; END $$;
CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = text, FUNCTION = public.same);
CREATE FUNCTION public.joined(text, text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN PERFORM public.saw('||'); RETURN 'public.seen'; END $$;
CREATE OPERATOR public.|| (LEFTARG = text, RIGHTARG = text, FUNCTION = public.joined);
CREATE TABLE public.policy (policy text);
CREATE TABLE public.order_state (policy text);
CREATE DOMAIN public.text AS pg_catalog.text CHECK (public.saw('text') IS NULL);
CREATE TABLE public.pg_roles (rolname name);
"""


@pytest.fixture
def bare(cluster):
    name = "bare"
    cluster.create_database(name)
    cluster.sql("GRANT CREATE ON DATABASE bare TO nobody_special")
    database = Database(cluster, name)
    database.sql("GRANT CREATE ON SCHEMA public TO nobody_special")
    yield database
    database.drop()


@pytest.mark.parametrize("path", ["public", "public, pg_catalog", '"$user", public, pg_temp'])
def test_the_script_calls_nothing_that_others_made(bare, path):
    """Breaks when a name or operator of the script is looked up in a schema in which others may create."""
    bare.psql(PREPARED, user="nobody_special")
    session = bare.connect()
    with session.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE policy (policy pg_catalog.text); CREATE TEMP TABLE pg_roles (rolname name)")
        cursor.execute(f"SET search_path = {path}")
        cursor.execute("CREATE EXTENSION amazon_pii")
    session.close()
    assert bare.sql("SELECT * FROM public.seen") == []
    assert bare.sql("SELECT c.relname FROM pg_class AS c JOIN pg_depend AS d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid "
                    "AND d.deptype = 'e' JOIN pg_extension AS e ON e.oid = d.refobjid WHERE e.extname = 'amazon_pii' "
                    "AND c.relnamespace <> 'amazon_pii'::regnamespace") == []
    open_shop(bare)
    add_order(bare, 1)
    bare.sql("SET search_path = public, pg_catalog")
    bare.sql("SELECT amazon_pii.apply_policy(%s::jsonb)", [psycopg2.extras.Json(shop_policy())])
    bare.sql("CALL amazon_pii.run_cycle()")
    assert bare.sql("SELECT gift_message FROM shop.orders") == [(PLACEHOLDER,)]
    assert bare.sql("SELECT * FROM public.seen") == []


def test_a_schema_that_somebody_prepared_is_refused(bare):
    """Breaks when CREATE EXTENSION moves into a schema that is somebody's, with whatever is in it."""
    bare.sql("CREATE SCHEMA amazon_pii; CREATE TABLE amazon_pii.policy (policy text)", user="nobody_special")
    with refused("42P06"):
        add_extension(bare.cluster, bare.name)
    assert bare.sql("SELECT 1 FROM pg_extension WHERE extname = 'amazon_pii'") == []


def test_only_a_superuser_creates_the_extension(bare):
    """Breaks when the extension becomes trusted, or no longer asks for a superuser."""
    with refused("42501"):
        bare.sql("CREATE EXTENSION amazon_pii", user="nobody_special")
