"""Quotas: how many orders somebody may have opened in a day. Counted where a rollback does not reach, and never twice for one
place."""
import json
import threading

import psycopg2
import pytest
from cluster import wait_until
from conftest import new_database
from simulated import database_in, running, utc
from support import (
    PLACEHOLDER, Background, add_order, number, open_shop, order_value, refused, run_cycle, shop_policy, snapshot,
)

OPERATOR, ADMIN = "pii_operator", "pii_admin"
REASON = "ticket 4711"
OVER = "53400"


@pytest.fixture
def shop(db):
    """Orders 1 to 6 are redacted; two more bear one number."""
    open_shop(db)
    for order in range(1, 7):
        add_order(db, order)
    for order in (7, 8):
        add_order(db, order)
        db.sql("UPDATE shop.orders SET external_no = 'twice' WHERE id = %s", [order], "shop_owner")
    quota(db)
    run_cycle(db)
    assert order_value(db, 1) == order_value(db, 8) == "redacted"
    return db


def quota(db, *per_day, **changes):
    """A new version of the policy."""
    db.apply_policy(shop_policy(**({"retrievals_per_day": per_day[0]} if per_day else {}), **changes))


def call(db, function, order_number, user=OPERATOR, actor=None):
    """One call in a session of its own, which ends in a rollback if it is a peek."""
    session = db.connect(user, autocommit=False)
    try:
        with session.cursor() as cursor:
            if actor is not None:
                cursor.execute("SELECT set_config('amazon_pii.actor', %s, false)", [actor])
            cursor.execute(f"SELECT * FROM amazon_pii.{function}(%s, %s)", [order_number, REASON])
            rows = cursor.fetchall()
        (session.rollback if function == "peek" else session.commit)()
        return rows
    finally:
        session.close()


def peek(db, order=1, **options):
    return call(db, "peek", number(order), **options)


def actions(db):
    return [r[0] for r in db.sql("SELECT action FROM amazon_pii.audit_log WHERE action ~ '^(peek|retrieve|unflag)' ORDER BY audit_id")]


def counts(db):
    """{(counted by, name): (orders, automatic, refused)}"""
    rows = db.sql("SELECT counted_by, name, orders, automatic, refused FROM amazon_pii.access_count")
    return {tuple(r[:2]): tuple(r[2:]) for r in rows}


def test_past_the_quota_nothing_is_opened(shop):
    """Breaks when the quota is not heeded, when the refused call opens or writes something, or nobody sees that it was made."""
    quota(shop, 3)
    assert "Gift1" in json.dumps(peek(shop, 1))
    assert call(shop, "retrieve", number(2))
    peek(shop, 1)
    after = snapshot(shop)
    for function in ("peek", "retrieve"):
        with refused(OVER, "the quota of 3 orders a day of this user is used up") as caught:
            call(shop, function, number(3))
        diagnosis = caught.value.diag
        assert diagnosis.message_detail == "3 were retrieved or peeked at today, 1 more were asked for."
        tomorrow = shop.value("SELECT to_char((now() AT TIME ZONE 'UTC')::date + 1, 'YYYY-MM-DD')")
        assert f"begins anew at {tomorrow} 00:00:00 UTC" in diagnosis.message_hint
        assert '"retrievals_per_day" in policy "shop"' in diagnosis.message_hint and "amazon_pii_admin" in diagnosis.message_hint
    assert snapshot(shop) == after and order_value(shop, 3) == "redacted"
    assert actions(shop) == ["peek", "retrieve", "peek", "peek_refused", "retrieve_refused"]
    refusals = shop.sql("SELECT \"user\", order_number, order_key, reason, detail, mac IS NOT NULL FROM amazon_pii.audit_log WHERE action = 'peek_refused'")
    assert refusals == [(OPERATOR, number(3), '["3"]', REASON, "retrievals_per_day 3: 3 before, 1 more asked for", True)]
    assert counts(shop) == {("user", OPERATOR): (3, 0, 2), ("user_in_all", OPERATOR): (3, 0, 0)}


def test_a_rollback_does_not_give_the_place_back(shop):
    """The issue's own words. Breaks when entry or quota are in the caller's transaction, also in a savepoint."""
    quota(shop, 2)
    session = shop.connect(OPERATOR)
    with session.cursor() as cursor:
        cursor.execute("BEGIN; SELECT amazon_pii.peek(%s, %s); ROLLBACK", [number(1), REASON])
        cursor.execute("BEGIN; SAVEPOINT s; SELECT amazon_pii.retrieve(%s, %s); ROLLBACK TO s", [number(2), REASON])
        with refused(OVER):
            cursor.execute("SELECT amazon_pii.peek(%s, %s)", [number(1), REASON])
    session.close()
    assert actions(shop) == ["peek", "retrieve", "peek_refused"]
    assert order_value(shop, 2) == "redacted"


def test_a_read_only_transaction_is_counted(shop):
    """Breaks when peek needs, or spares, a write of the caller's."""
    quota(shop, 1)
    session = shop.connect(OPERATOR)
    session.set_session(readonly=True)
    with session.cursor() as cursor:
        cursor.execute("SELECT amazon_pii.peek(%s, %s)", [number(1), REASON])
        with refused(OVER):
            cursor.execute("SELECT amazon_pii.peek(%s, %s)", [number(1), REASON])
    session.close()


def test_a_call_that_fails_before_costs_nothing(shop):
    """Breaks when a bad reason, an unknown number or an order in the wrong state uses up the quota."""
    quota(shop, 1)
    add_order(shop, 9, "3 days")
    for function, arguments, state in (("peek", ("404-0000000-0000000", REASON), "P0002"), ("peek", (number(1), "a@example.invalid"), "22023"),
                                       ("retrieve", (number(9), REASON), "55000"), ("peek", (number(9), REASON), "55000")):
        with refused(state):
            shop.sql(f"SELECT amazon_pii.{function}(%s, %s)", arguments, OPERATOR)
    assert counts(shop) == {}
    peek(shop)


def test_an_actor_has_a_quota_of_its_own(shop):
    """Breaks when the agents of one application share a quota, one agent has two, or blanks are somebody."""
    quota(shop, 2)
    shop.sql("CREATE ROLE second_app LOGIN; GRANT amazon_pii_operator TO second_app")
    try:
        peek(shop, actor="agent 1")
        peek(shop, actor=" agent 1 ", user="second_app")
        for user in (OPERATOR, "second_app"):
            with refused(OVER, "of this actor"):
                peek(shop, actor="agent 1", user=user)
        peek(shop, actor="agent 2")
        # Without an actor by user, a user of the same name as an actor included.
        peek(shop, actor=OPERATOR)
        for blank in (None, "  "):
            peek(shop, actor=blank)
        with refused(OVER, "of this user"):
            peek(shop, actor="")
    finally:
        shop.sql("DROP ROLE second_app")
    assert {k: v[0] for k, v in counts(shop).items()} == {
        ("actor", "agent 1"): 2, ("actor", "agent 2"): 1, ("actor", OPERATOR): 1, ("user", OPERATOR): 2,
        ("user_in_all", OPERATOR): 5, ("user_in_all", "second_app"): 1}


def test_a_very_long_actor_is_counted_too(shop):
    """Breaks when a name that no index can hold evades the quota, or is mixed up with another one."""
    quota(shop, 1)
    for last in "ab":
        peek(shop, actor="x" * 100_000 + last)
        with refused(OVER, "of this actor"):
            peek(shop, actor="x" * 100_000 + last)


def test_new_actors_do_not_evade_the_bound_of_a_database_user(shop):
    """Breaks when whoever names another actor for each call has no limit where the policy sets one."""
    quota(shop, 2, user_retrievals_per_day=5)
    for i in range(5):
        peek(shop, actor=f"agent {i}")
    for actor in ("agent 9", None):
        with refused(OVER, "the quota of 5 orders a day of this database user is used up") as caught:
            peek(shop, actor=actor)
        assert "user_retrievals_per_day" in caught.value.diag.message_hint
    assert call(shop, "unflag", number(1), user=ADMIN), "another database user has its own"


def test_a_policy_may_require_an_actor(shop):
    """Breaks when a call by order number gets through without an actor, or one with it does not."""
    quota(shop, require_actor=True)
    statements = [
        (OPERATOR, "peek(%(n)s, %(r)s)"), (OPERATOR, "retrieve(%(n)s, %(r)s)"), (OPERATOR, "end_retrieval(%(n)s)"),
        (OPERATOR, "hold(%(n)s, %(r)s, '2999-01-01')"), (OPERATOR, "release(%(n)s)"),
        (ADMIN, "erase(%(n)s, %(r)s)"), (ADMIN, "unflag(%(n)s, %(r)s)"), ("postgres", "peek(%(n)s, %(r)s)"),
    ]
    for blank in ("", "   "):
        for user, statement in statements:
            session = shop.connect(user)
            with session.cursor() as cursor:
                cursor.execute("SELECT set_config('amazon_pii.actor', %s, false)", [blank])
                with refused("22023", 'policy "shop" wants to know who asks') as caught:
                    cursor.execute(f"SELECT amazon_pii.{statement}", {"n": number(1), "r": REASON})
            session.close()
            assert "SET amazon_pii.actor" in caught.value.diag.message_hint
    assert actions(shop) == [] and counts(shop) == {}
    for user, statement in statements:
        session = shop.connect(user, autocommit=False)
        with session.cursor() as cursor:
            cursor.execute("SET LOCAL amazon_pii.actor = 'agent 1'")
            try:
                cursor.execute(f"SELECT amazon_pii.{statement}", {"n": number(1), "r": REASON})
                session.commit()
            except psycopg2.Error as error:
                assert error.pgcode != "22023", error
        session.close()
    assert actions(shop) == ["peek", "retrieve", "unflag"]


def test_a_number_that_stands_for_two_orders_costs_two(shop):
    """Breaks when orders are opened of which only some were free, or a call is counted instead of its orders."""
    quota(shop, 3)
    assert len(call(shop, "peek", "twice")[0][0]) == 2
    with refused(OVER) as caught:
        call(shop, "retrieve", "twice")
    assert caught.value.diag.message_detail == "2 were retrieved or peeked at today, 2 more were asked for."
    assert order_value(shop, 7) == order_value(shop, 8) == "redacted"
    peek(shop, 1)
    assert actions(shop) == ["peek", "peek", "retrieve_refused", "retrieve_refused", "peek"]


def test_nobody_is_exempt(shop):
    """Breaks when a superuser, or an administrator who writes orders back for good, passes the quota."""
    quota(shop, 1)
    for user, function in (("postgres", "peek"), (ADMIN, "unflag")):
        call(shop, function, number(1 if function == "peek" else 2), user=user)
        with refused(OVER):
            call(shop, function, number(3), user=user)
    assert order_value(shop, 2) is None and order_value(shop, 3) == "redacted"


def test_session_users_are_counted_and_not_the_roles_that_they_take(shop):
    """Breaks when SET ROLE gives somebody a second quota."""
    quota(shop, 1)
    shop.sql("CREATE ROLE clerk LOGIN; GRANT pii_operator TO clerk")
    try:
        peek(shop, user="clerk")
        session = shop.connect("clerk")
        with session.cursor() as cursor:
            cursor.execute("SET ROLE pii_operator")
            with refused(OVER):
                cursor.execute("SELECT amazon_pii.peek(%s, %s)", [number(1), REASON])
        session.close()
        peek(shop)
    finally:
        shop.sql("DROP ROLE clerk")


def test_a_changed_quota_counts_at_once(shop):
    """Breaks when a session goes on with the quota that it began with, or a new version of the policy forgets what was had."""
    peek(shop)
    quota(shop, 1)
    session = shop.connect(OPERATOR)
    with session.cursor() as cursor:
        for per_day, passes in ((1, False), (2, True), (2, False)):
            quota(shop, per_day)
            if passes:
                cursor.execute("SELECT amazon_pii.peek(%s, %s)", [number(1), REASON])
            else:
                with refused(OVER):
                    cursor.execute("SELECT amazon_pii.peek(%s, %s)", [number(1), REASON])
    session.close()


def test_policies_have_quotas_of_their_own(shop):
    """Breaks when the orders of one policy use up another's quota."""
    shop.sql("CREATE TABLE shop.other (id bigint PRIMARY KEY, no text, at date, note text); "
             "INSERT INTO shop.other VALUES (1, 'other 1', current_date - 40, 'Other1')", user="shop_owner")
    shop.apply_policy({"policy": "other", "enabled": True, "retrievals_per_day": 1,
                       "orders": {"table": "shop.other", "number": "no", "amazon": "true", "anchor": "at", "redact": ["note"]}})
    run_cycle(shop)
    quota(shop, 1)
    peek(shop)
    assert "Other1" in json.dumps(call(shop, "peek", "other 1"))
    for order_number in (number(1), "other 1"):
        with refused(OVER):
            call(shop, "peek", order_number)


# At the same time

def counter_lock(db):
    """A superuser's transaction that has all counters locked."""
    lock = db.connect(autocommit=False)
    lock.cursor().execute("LOCK TABLE amazon_pii.access_count IN EXCLUSIVE MODE")
    return lock


def recorders_wait(db, count):
    waiting = ("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'amazon_pii evidence' "
               "AND wait_event_type = 'Lock'")
    wait_until(lambda: db.value(waiting) == count, 30, 0.005, f"there are never {count} that wait")


def peeking(db, **options):
    return Background(db, "SELECT amazon_pii.peek(%s, %s)::text", [number(1), REASON], OPERATOR, **options)


def outcome(call):
    try:
        assert "Gift1" in call.result()[0][0]
        return "through"
    except psycopg2.Error as error:
        return error.pgcode


@pytest.mark.parametrize("had", [0, 2])
@pytest.mark.parametrize("same", ["user", "actor", "user in all"])
def test_of_two_calls_for_the_last_place_one_gets_through(shop, same, had):
    """Breaks when two processes read the count before either has written it, be it the first of a day or not."""
    limits = {"user_retrievals_per_day": had + 1}
    if same != "user in all":
        limits = {"retrievals_per_day": had + 1}
    shop.apply_policy(shop_policy(**limits))
    for _ in range(5):
        shop.sql("DELETE FROM amazon_pii.access_count")
        actors = {"user": ("", ""), "actor": ("a", "a"), "user in all": ("b", "c")}[same]
        for _ in range(had):
            peek(shop, actor=actors[0])
        lock = counter_lock(shop)
        calls = [peeking(shop, options=f"-c amazon_pii.actor={actor}") for actor in actors]
        recorders_wait(shop, 2)
        lock.rollback()
        lock.close()
        assert sorted(outcome(c) for c in calls) == [OVER, "through"]
        assert sum(c[2] for c in counts(shop).values()) == 1
    assert "deadlock" not in shop.cluster.log_text()


def test_many_at_once_have_no_more_than_the_quota(shop):
    """Breaks when anybody slips through among many, deadlocks, or is refused although a place was free."""
    quota(shop, 7)
    outcomes = []

    def some():
        for _ in range(4):
            try:
                peek(shop)
                outcomes.append("through")
            except psycopg2.Error as error:
                outcomes.append(error.pgcode)

    threads = [threading.Thread(target=some) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [OVER] * 5 + ["through"] * 7
    assert actions(shop).count("peek") == 7 and counts(shop)["user", OPERATOR] == (7, 0, 5)


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_caller_that_goes_away_meanwhile(shop, how):
    """Breaks when somebody who cancels at the right moment has had an order that is not counted, or whose entry is missing."""
    quota(shop, 1)
    lock = counter_lock(shop)
    caller = peeking(shop)
    recorders_wait(shop, 1)
    shop.sql(f"SELECT {how}(%s)", [caller.pid])
    with pytest.raises(psycopg2.Error):
        caller.result()
    lock.rollback()
    lock.close()
    at_work = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'amazon_pii evidence'"
    wait_until(lambda: shop.sql(at_work) == [])
    # It was on its way already: recorded and counted, though nothing was handed out.
    assert actions(shop) == ["peek"] and counts(shop)["user", OPERATOR] == (1, 0, 0)
    with refused(OVER):
        peek(shop)


def test_a_recorder_that_is_ended_meanwhile(shop):
    """Breaks when an order is opened although its entry, or its count, went with the process that was to write them."""
    quota(shop, 2)
    lock = counter_lock(shop)
    caller = peeking(shop)
    recorders_wait(shop, 1)
    shop.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'amazon_pii evidence'")
    through = None
    try:
        wait_until(lambda: not caller.is_alive() or shop.sql(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'amazon_pii evidence' AND wait_event_type = 'Lock'"))
    finally:
        lock.rollback()
        lock.close()
        through = outcome(caller) == "through"
    assert actions(shop).count("peek") == through
    assert counts(shop).get(("user", OPERATOR), (0,))[0] == through


def test_a_count_that_cannot_be_written_refuses_the_access(shop):
    """Breaks when an order is opened uncounted because somebody has the counters locked."""
    quota(shop, 5)
    lock = counter_lock(shop)
    with refused("53000", "could not be recorded"):
        peek(shop)
    lock.rollback()
    lock.close()
    assert actions(shop) == [] and counts(shop) == {}
    peek(shop)


# Days

def test_the_next_day_begins_anew_and_old_counts_go(shop):
    """Breaks when a quota is for ever, or counts are kept for ever."""
    quota(shop, 1)
    peek(shop)
    with refused(OVER):
        peek(shop)
    shop.sql("UPDATE amazon_pii.access_count SET day = day - 1")
    peek(shop)
    shop.sql("UPDATE amazon_pii.access_count SET day = day - 30")
    peek(shop)
    days = "SELECT DISTINCT (now() AT TIME ZONE 'UTC')::date - day FROM amazon_pii.access_count ORDER BY 1"
    assert [r[0] for r in shop.sql(days)] == [0, 30]


@pytest.fixture(scope="module")
def berlin_time():
    """Half past ten in Greenwich, half past eleven in Berlin."""
    yield from running(utc(2026, 11, 10, 22, 30))


def test_a_day_ends_at_midnight_of_the_policys_time_zone(berlin_time):
    """Breaks when the day is the server's, or somebody else's."""
    for db in database_in(berlin_time, open_shop):
        add_order(db, 1)
        quota(db, 1, timezone="Europe/Berlin")
        run_cycle(db)
        peek(db)
        berlin_time.move_to(utc(2026, 11, 10, 22, 59, 58))
        with refused(OVER) as caught:
            peek(db)
        assert "begins anew at 2026-11-11 00:00:00 CET" in caught.value.diag.message_hint
        berlin_time.move_to(utc(2026, 11, 10, 23, 0, 0))
        peek(db)
        with refused(OVER) as caught:
            peek(db)
        assert "begins anew at 2026-11-12 00:00:00 CET" in caught.value.diag.message_hint


# What comes back by itself

def test_automatic_retrievals_are_counted_and_never_refused(shop):
    """P11. Breaks when a quota, or a missing actor, keeps a return from being booked or its order from coming back."""
    shop.sql("CREATE TABLE shop.returns (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id bigint NOT NULL REFERENCES shop.orders); "
             "CREATE INDEX ON shop.returns (order_id); GRANT USAGE ON SCHEMA shop TO PUBLIC; GRANT INSERT ON shop.returns TO PUBLIC", user="shop_owner")
    document = shop_policy(retrievals_per_day=1, require_actor=True, alarm_per_day=2)
    document["linked"].append({"table": "shop.returns", "on": {"order_id": "id"}, "retrieve_on_insert": True})
    shop.apply_policy(document)
    shop.sql("INSERT INTO shop.returns (order_id) VALUES (1), (2)", user=OPERATOR)
    shop.sql("INSERT INTO shop.returns (order_id) VALUES (3)", user=OPERATOR)
    assert [order_value(shop, n) for n in (1, 2, 3)] == ["retrieved"] * 3
    assert shop.value("SELECT gift_message FROM shop.orders WHERE id = 3") == "Gift3"
    assert counts(shop)["user", OPERATOR] == (0, 3, 0)
    alarms = "SELECT \"user\", reason, detail FROM amazon_pii.audit_log WHERE action = 'alarm'"
    assert shop.sql(alarms) == [(OPERATOR, "automatic: returns", "3 orders today, more than 2 are unusual")]
    peek(shop, 4, actor="agent 1")
    quota(shop, 1)
    peek(shop, 4)
    with refused(OVER):
        peek(shop, 4)
    assert shop.value("SELECT gift_message FROM shop.orders WHERE id = 4") == PLACEHOLDER


# Policies

@pytest.mark.parametrize("change, words", [
    ({"retrievals_per_day": 0}, "whole number, 1 or more"), ({"retrievals_per_day": "many"}, "must be a number, not a text"),
    ({"retrievals_per_day": 2.5}, "whole number"), ({"retrieval_per_day": 5}, 'unknown key "retrieval_per_day"'),
    ({"retrievals_per_day": 5, "user_retrievals_per_day": 4}, 'is lower than "retrievals_per_day"'),
    ({"alarm_per_day": -1}, "whole number"), ({"require_actor": "yes"}, "true or false"),
])
def test_what_is_wrong_is_found_when_applied(shop, change, words):
    """Breaks when a quota that means nothing is accepted."""
    with refused("22023", words):
        shop.apply_policy(shop_policy(**change))


def test_a_dump_carries_the_counts(shop):
    """Breaks when restoring a dump gives everybody a new quota."""
    quota(shop, 1)
    peek(shop)
    dump = shop.cluster.client("pg_dump", "-d", shop.name).stdout
    copy_of = new_database(shop.cluster, "template0")
    try:
        copy_of.psql(dump)
        with refused(OVER):
            peek(copy_of)
    finally:
        copy_of.drop()
