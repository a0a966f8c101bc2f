"""Alarms: canary orders, unusual numbers and quotas that are used up. They reach the log, the audit log and whoever listens, and
a rollback reaches none of them."""
import json
import re

import pytest
from cluster import wait_until
from conftest import new_database
from support import PLACEHOLDER, add_customer, add_invoice, add_order, number, open_shop, order_value, payloads, refused, run_cycle, shop_policy
from test_quota import ADMIN, OPERATOR, OVER, REASON, call, peek, quota

AUDITOR = "pii_auditor"
CANARY = number(1)
PII = ("Gift1", "Note1", "Name1", "Street 1", "City1", "First1", "Last1", "buyer1", "+49", "BillTo1", "LineNote1")
ALARMS = 'SELECT "user", actor, order_number, reason, detail FROM amazon_pii.audit_log WHERE action = \'alarm\' ORDER BY audit_id'


@pytest.fixture
def shop(db):
    """Orders 1 to 5 are redacted; the first is a canary."""
    open_shop(db)
    add_customer(db, 1)
    for order in range(1, 6):
        add_order(db, order, customer=1 if order == 1 else None)
    add_invoice(db, 1, 1)
    quota(db)
    run_cycle(db)
    assert order_value(db, 1) == "redacted"
    db.sql("SELECT amazon_pii.set_canary(%s)", [CANARY], ADMIN)
    db.mark = len(db.cluster.log_text())
    return db


def alarms(db):
    return db.sql(ALARMS, user=AUDITOR)


def warnings(db):
    """The lines that the server's log has got since the fixture, of this database's workers."""
    text = db.cluster.log_text()[db.mark:]
    return [line.split("WARNING:  ")[1] for line in text.splitlines() if "WARNING:  amazon_pii: alarm" in line]


class Listener:
    """Hears the channel as somebody who has no capability at all."""

    def __init__(self, db, user="nobody_special"):
        self.session = db.connect(user)
        self.session.cursor().execute("LISTEN amazon_pii")

    def heard(self):
        return [told for told in map(json.loads, payloads(self.session)) if told["status"] == "alarm"]


@pytest.mark.parametrize("function", ["peek", "retrieve"])
def test_opening_a_canary_raises_the_alarm_and_a_rollback_does_not_reach_it(shop, function):
    """The issue's own words. Breaks when one of the three ways is silent, waits for a COMMIT, or says more than it should."""
    listener = Listener(shop)
    session = shop.connect(OPERATOR)
    with session.cursor() as cursor:
        cursor.execute("SET amazon_pii.actor = 'agent 7'")
        cursor.execute(f"BEGIN; SELECT amazon_pii.{function}(%s, %s)", [CANARY, REASON])
        wait_until(listener.heard)
        assert len(alarms(shop)) == 1, "before the transaction has ended"
        cursor.execute("ROLLBACK")
    assert session.notices == [], "whoever opens a canary is not told"
    session.close()
    assert alarms(shop) == [(OPERATOR, "agent 7", CANARY, REASON, f"canary order: {function}")]
    assert listener.heard() == [{"policy": "shop", "status": "alarm", "count": 0, "orders": [], "complete": True}]
    assert warnings(shop) == [f'amazon_pii: alarm: policy "shop", user "{OPERATOR}", actor "agent 7": canary order: {function}']
    assert not [word for word in (*PII, CANARY, REASON) if word in str(warnings(shop)) + str(payloads(listener.session))]
    assert shop.value("SELECT mac IS NOT NULL FROM amazon_pii.audit_log WHERE action = 'alarm'")


def test_other_orders_raise_none(shop):
    """Breaks when an ordinary access is an alarm, or one of another policy's order with the same number."""
    for order in (2, 3):
        peek(shop, order)
    call(shop, "retrieve", number(2))
    shop.sql("UPDATE amazon_pii.canary SET policy = 'other'")
    peek(shop, 1)
    assert alarms(shop) == [] and warnings(shop) == []


def test_a_canary_lives_as_any_order(shop):
    """Breaks when a canary does not give what was archived, does not come back, or is not redacted again."""
    assert "Gift1" in json.dumps(peek(shop, 1))
    call(shop, "retrieve", CANARY)
    assert shop.value("SELECT gift_message FROM shop.orders WHERE id = 1") == "Gift1"
    shop.sql("SELECT amazon_pii.end_retrieval(%s)", [CANARY], OPERATOR)
    run_cycle(shop)
    assert shop.value("SELECT gift_message FROM shop.orders WHERE id = 1") == PLACEHOLDER
    assert [a[4] for a in alarms(shop)] == ["canary order: peek", "canary order: retrieve"]


def test_an_attempt_that_the_quota_refuses_is_an_alarm_too(shop):
    """Breaks when somebody who has used up the quota can look for canaries unnoticed, or is told of one by the error."""
    quota(shop, 1, alarm_per_day=50)
    peek(shop, 2)
    messages = []
    for order in (3, 1):
        with refused(OVER) as caught:
            peek(shop, order)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert [(a[2], a[4]) for a in alarms(shop)] == [
        (None, "retrievals_per_day 1: 1 before, 1 more asked for"), (CANARY, "canary order: peek")]


def test_a_return_for_a_canary_is_an_alarm(shop):
    """Breaks when a canary can be had by booking a return for it."""
    shop.sql("CREATE TABLE shop.returns (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id bigint NOT NULL REFERENCES shop.orders); "
             "CREATE INDEX ON shop.returns (order_id); GRANT USAGE ON SCHEMA shop TO PUBLIC; GRANT INSERT ON shop.returns TO PUBLIC", user="shop_owner")
    document = shop_policy()
    document["linked"].append({"table": "shop.returns", "on": {"order_id": "id"}, "retrieve_on_insert": True})
    shop.apply_policy(document)
    session = shop.connect(OPERATOR, autocommit=False)
    session.cursor().execute("INSERT INTO shop.returns (order_id) VALUES (2), (1)")
    session.rollback()
    session.close()
    assert alarms(shop) == [(OPERATOR, None, CANARY, "automatic: returns", "canary order: retrieve")]


def test_unusual_numbers(shop):
    """Breaks when the alarm comes too early, not at all, with every further call, or not for each person."""
    quota(shop, alarm_per_day=2)
    listener = Listener(shop)
    expected = []
    for had in range(1, 10):
        peek(shop, 2, actor="agent 1")
        if had in (3, 5, 9):
            expected.append((OPERATOR, "agent 1", None, REASON, f"{had} orders today, more than 2 are unusual"))
        assert alarms(shop) == expected, had
    for _ in range(2):
        peek(shop, 3, actor="agent 2")
    assert alarms(shop) == expected
    wait_until(lambda: len(listener.heard()) == 3)
    assert warnings(shop)[0] == f'amazon_pii: alarm: policy "shop", user "{OPERATOR}", actor "agent 1": 3 orders today, more than 2 are unusual'
    assert len(warnings(shop)) == 3


def test_half_of_a_quota_is_unusual_and_so_is_all_of_it(shop):
    """Breaks when a quota has no alarm of its own, a database user's with all its actors included."""
    quota(shop, 4, user_retrievals_per_day=6)
    for i in range(5):
        try:
            peek(shop, 2)
        except Exception as error:
            assert i == 4 and error.pgcode == OVER
    for actor, passes in (("a", True), ("b", True), ("c", False), ("d", False)):
        if passes:
            peek(shop, 2, actor=actor)
        else:
            with refused(OVER):
                peek(shop, 2, actor=actor)
    assert [a[1:2] + a[4:] for a in alarms(shop)] == [
        (None, "3 orders today, more than 2 are unusual"),
        (None, "4 orders of this database user today, more than 3 are unusual"),
        (None, "retrievals_per_day 4: 4 before, 1 more asked for"),
        ("c", "user_retrievals_per_day 6: 6 before, 1 more asked for"),
    ]


def test_the_log_shows_an_actor_harmlessly(shop):
    """Breaks when an application's user writes lines of their own into the server's log."""
    peek(shop, 1, actor='x\n2026-11-11 LOG:  all is well "' + "y" * 500)
    (line,) = warnings(shop)
    assert 'actor "x\\n2026-11-11 LOG:  all is well \\"yyy' in line and "y" * 100 not in line


# Choosing them

def test_who_chooses_canaries_and_who_knows_them(shop):
    """Breaks when an operator can learn which orders are canaries, from a view, a function, a table or an error."""
    assert shop.sql("SELECT policy, order_number, set_by FROM amazon_pii.canaries", user=ADMIN) == [("shop", CANARY, ADMIN)]
    assert shop.sql("SELECT policy, order_number FROM amazon_pii.canaries", user=AUDITOR) == [("shop", CANARY)]
    assert shop.sql("SELECT action, \"user\", order_number FROM amazon_pii.audit_log WHERE action = 'set_canary'", user=AUDITOR) == [
        ("set_canary", ADMIN, CANARY)]
    for user in (OPERATOR, AUDITOR, "nobody_special", "shop_owner"):
        for statement in ("SELECT amazon_pii.set_canary(%s)", "SELECT amazon_pii.set_canary(%s, false)"):
            with refused("42501"):
                shop.sql(statement, [CANARY], user)
    for relation in ("canaries", "canary", "access_count"):
        with refused("42501"):
            shop.sql(f"TABLE amazon_pii.{relation}", user=OPERATOR)

    def seen(order):
        """All that an operator can read of an order, with its number and key, times and ids left out."""
        names = {"n": number(order), "k": f'["{order}"]'}
        reads = ["explain_order(%(n)s)", "find_orders(%(n)s)"]
        reads += [f"{view} AS v WHERE order_key = %(k)s" for view in ("orders", "records", "overdue", "upcoming", "files")]
        text = str([shop.sql(f"SELECT * FROM amazon_pii.{read}", names, OPERATOR) for read in reads])
        text = text.replace(number(order), "N").replace(f'["{order}"]', "K")
        return re.sub(r"datetime\.datetime\([^)]*(\([^)]*\))?[^)]*\)|[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:.+]+|\b[0-9]+\b", "#", text)

    shop.sql("SELECT amazon_pii.set_canary(%s, false)", [CANARY], ADMIN)
    shop.sql("SELECT amazon_pii.set_canary(%s)", [number(3)], ADMIN)
    assert seen(2) == seen(3)
    assert "canary" not in seen(3).lower()


def test_canaries_are_taken_back_and_mistakes_are_found(shop):
    """Breaks when a mistyped number is a canary that nobody can open, or an order stays one."""
    with refused("P0002", "no flagged order"):
        shop.sql("SELECT amazon_pii.set_canary('404-0000000-0000000')", user=ADMIN)
    with refused("P0002", "is no canary") as caught:
        shop.sql("SELECT amazon_pii.set_canary(%s, false)", [number(2)], ADMIN)
    assert "canaries" in caught.value.diag.message_hint
    for nothing in ("NULL", "%s, NULL"):
        with refused("22023"):
            shop.sql(f"SELECT amazon_pii.set_canary({nothing})", [CANARY] if "%" in nothing else None, ADMIN)
    shop.sql("SELECT amazon_pii.set_canary(%s)", [CANARY], ADMIN)
    shop.sql("SELECT amazon_pii.set_canary(%s, canary => false, policy => 'shop')", [CANARY], ADMIN)
    peek(shop, 1)
    assert alarms(shop) == [] and shop.sql("TABLE amazon_pii.canaries") == []
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'unset_canary'") == 1


def test_a_canary_stays_one(shop):
    """Breaks when a new version of the policy, another key, or a policy that is dropped and applied again forgets it."""
    quota(shop, 50)
    shop.sql("ALTER TABLE shop.addresses DROP CONSTRAINT addresses_order_id_fkey; ALTER TABLE shop.invoices DROP CONSTRAINT invoices_order_id_fkey; "
             "UPDATE shop.orders SET id = 101 WHERE id = 1; UPDATE shop.addresses SET order_id = 101 WHERE order_id = 1; "
             "UPDATE shop.invoices SET order_id = 101 WHERE order_id = 1", user="shop_owner")
    peek(shop, 1)
    shop.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user=ADMIN)
    quota(shop, 50)
    run_cycle(shop)
    peek(shop, 1)
    assert len(alarms(shop)) == 2


def test_a_dump_carries_the_canaries(shop):
    """Breaks when a restored database has none."""
    dump = shop.cluster.client("pg_dump", "-d", shop.name).stdout
    copy_of = new_database(shop.cluster, "template0")
    try:
        copy_of.psql(dump)
        peek(copy_of, 1)
        assert [a[2] for a in alarms(copy_of)] == [CANARY]
    finally:
        copy_of.drop()
