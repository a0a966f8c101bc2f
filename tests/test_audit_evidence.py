"""evidence(): what an assessor gets, and that no personal data is in it."""
import json

import pytest
from support import (
    add_customer, add_invoice, add_order, number, open_shop, refused, run_cycle, shop_policy,
)


@pytest.fixture
def shop(db):
    """Orders 1 to 3 redacted after 40, 41 and 42 days; 4 was archived after 29.5 days, 5 and 6 wait, 7 is not dispatched."""
    open_shop(db)
    add_customer(db, 1)
    for order, age in ((1, "40 days"), (2, "41 days"), (3, "42 days"), (4, "29 days 12 hours"), (5, "10 days"), (6, "3 days"), (7, None)):
        add_order(db, order, age, customer=1 if order == 1 else None)
    add_invoice(db, 1, 1)
    db.apply_policy(shop_policy())
    run_cycle(db)
    return db


def evidence(db, policy="shop", start=None, end=None, user="pii_auditor"):
    return db.value("SELECT amazon_pii.evidence(%s, %s, %s)", [policy, start, end], user)


def test_orders_by_state_and_by_days(shop):
    """Breaks when the counts are not those of the orders, days count from elsewhere than the anchor, or the worst is another."""
    found = evidence(shop)
    assert found["orders_by_state"] == {"redacted": 3, "archived": 1, "scheduled": 2, "flagged": 1}
    assert found["orders"] == {"flagged": 7, "archived": 4, "redacted": 3, "archive_destroyed": 0, "deadline_moved": 0}
    redacted = found["days_until_redacted"]
    assert redacted["orders"] == 3 and redacted["without_anchor"] == 0
    assert redacted["by_days"] == [{"days": d, "orders": 1} for d in (40, 41, 42)]
    assert (redacted["worst"]["days"], redacted["worst"]["order_key"], redacted["worst"]["order_number"]) == (42, '["3"]', number(3))
    archived = found["days_until_archived"]
    assert archived["orders"] == 4 and archived["by_days"][0] == {"days": 29, "orders": 1} and archived["worst"]["days"] == 42
    shop.sql("UPDATE amazon_pii.order_state SET pushed_by = 'invoices' WHERE order_key = '[\"3\"]'")
    found = evidence(shop)
    assert found["orders"]["deadline_moved"] == 1 and found["days_until_redacted"]["worst"]["moved_by"] == "invoices"
    assert found["policy"] == "shop" and found["issued_by"] == "pii_auditor" and found["from"] is None


def test_what_is_redacted_again_took_no_longer(shop):
    """Breaks when a retrieval, or PII that came back, makes an order look as if it had been redacted too late."""
    shop.sql("SELECT amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator")
    shop.sql("UPDATE shop.addresses SET name = 'Back' WHERE order_id = 2", user="shop_owner")
    shop.sql("UPDATE amazon_pii.order_state SET redacted_first_at = redacted_first_at - '10 days'::interval, retrieved_until = now() WHERE order_key IN ('[\"1\"]', '[\"2\"]'); "
             "UPDATE amazon_pii.order_state SET next_due_at = now() WHERE order_key = '[\"1\"]'")
    assert run_cycle(shop)["redacted"] == 2
    assert [(d["days"], d["orders"]) for d in evidence(shop)["days_until_redacted"]["by_days"]] == [(30, 1), (31, 1), (42, 1)]


def test_the_period(shop):
    """Breaks when something of another time counts, or what is on the border counts twice."""
    shop.sql("UPDATE amazon_pii.order_state SET redacted_first_at = '2026-03-01', archived_at = '2026-02-28', flagged_at = '2026-02-01' WHERE order_key = '[\"1\"]'")
    march = evidence(shop, start="2026-03-01", end="2026-04-01")
    assert (march["orders"]["flagged"], march["orders"]["archived"], march["orders"]["redacted"]) == (0, 0, 1)
    february = evidence(shop, start="2026-02-01", end="2026-03-01")
    assert (february["orders"]["flagged"], february["orders"]["archived"], february["orders"]["redacted"]) == (1, 1, 0)
    assert february["retrievals"] == [] and february["audit_log"]["by_action"] == {}
    assert february["from"].startswith("2026-02-01") and february["to"].startswith("2026-03-01")
    with refused("22023", "before it begins"):
        evidence(shop, start="2026-03-01", end="2026-02-01")
    with refused("22023", "finite"):
        evidence(shop, start="-infinity")


def test_overdue_orders_with_their_reasons(shop):
    """Breaks when an order that is late does not show, or without the reason."""
    assert evidence(shop)["overdue"] == {"orders": 0, "worst_days": None, "by_reason": [], "worst": []}
    add_order(shop, 8, "33 days")
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'moving servers')", user="pii_admin")
    run_cycle(shop)
    found = evidence(shop)["overdue"]
    assert (found["orders"], found["worst_days"]) == (1, 3) and found["by_reason"] == [{"reason": "enable_policy", "orders": 1, "worst_days": 3}]
    (worst,) = found["worst"]
    assert (worst["order_key"], worst["order_number"], worst["days"], worst["reason"]) == ('["8"]', number(8), 3, "enable_policy")
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    shop.sql("CREATE FUNCTION shop.no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF OLD.order_id = 8 THEN RAISE '%', OLD.name; END IF; RETURN NEW; END$$; "
             "CREATE TRIGGER no BEFORE UPDATE ON shop.addresses FOR EACH ROW EXECUTE FUNCTION shop.no()", user="shop_owner")
    assert run_cycle(shop)["failed"] == 1
    found = evidence(shop)["overdue"]
    assert found["orders"] == 1 and found["by_reason"][0]["reason"].startswith("P0001") and "Name8" not in json.dumps(found)


def test_what_keeps_data_longer(shop):
    """Breaks when a disabled policy, a longer clock or a long hold is not in it while it lasts, or stays in it."""
    quiet = evidence(shop)["kept_longer"]
    assert quiet == {"now": [], "because": None, "postponed_since": None, "enabled": True, "disabled_since": None, "disabled_reason": None,
                     "holds": [], "orders": [], "dropped": None, "switched": []}
    shop.apply_policy(shop_policy(redact_after="60 days", loosened="tax audit"))
    shop.sql("SELECT amazon_pii.hold(%s, 'lawsuit 12', now() + '90 days'::interval)", [number(5)], "pii_operator")
    shop.sql("SELECT amazon_pii.hold(%s, 'short', now() + '5 days'::interval)", [number(6)], "pii_operator")
    shop.sql("SELECT amazon_pii.disable_policy('shop', 'moving servers')", user="pii_admin")
    found = evidence(shop)["kept_longer"]
    disabled, clock, hold = found["now"]
    assert disabled.startswith("disabled since ") and clock == "redact_after is 60 days: tax audit"
    assert hold == "1 orders held for more than 30 days: lawsuit 12"
    assert (found["enabled"], found["disabled_reason"]) == (False, "moving servers") and found["disabled_since"] is not None
    assert [(h["order_number"], h["reason"]) for h in found["holds"]] == [(number(5), "lawsuit 12")]
    assert [(s["action"], s["user"], s["reason"]) for s in found["switched"]] == [("disable_policy", "pii_admin", "moving servers")]
    shop.sql("SELECT amazon_pii.enable_policy('shop')", user="pii_admin")
    shop.sql("SELECT amazon_pii.release(%s)", [number(5)], "pii_operator")
    shop.apply_policy(shop_policy())
    found = evidence(shop)["kept_longer"]
    assert (found["now"], found["enabled"], found["disabled_since"], found["holds"]) == ([], True, None, [])
    assert len(found["switched"]) == 2


def test_retrievals_by_user_and_reason(shop):
    """Breaks when an access is not counted, or counts for another user or reason."""
    shop.sql("SET amazon_pii.actor = 'clerk7'", user="pii_operator")
    for order, function, why in ((1, "peek", "return"), (2, "peek", "return"), (3, "retrieve", "recall"), (1, "peek", "invoice")):
        shop.sql(f"SELECT * FROM amazon_pii.{function}(%s, %s)", [number(order), why], "pii_operator")
    found = {(r["user"], r["actor"], r["action"], r["reason"]): r["orders"] for r in evidence(shop)["retrievals"]}
    who = ("pii_operator", "clerk7")
    assert found == {(*who, "peek", "return"): 2, (*who, "retrieve", "recall"): 1, (*who, "peek", "invoice"): 1}


def test_keys_versions_and_cycles(shop):
    """Breaks when a key, a rotation or a version of the policy is not in it."""
    shop.apply_policy(shop_policy(retrieved_for="7 days", audit_for="3 years"))
    shop.sql("CALL amazon_pii.rotate_key()", user="pii_admin")
    found = evidence(shop)
    (key,) = found["keys"]
    assert key["current"] is True and key["configured"] is True and key["data_keys"] > 0 and key["may_retire"] is False
    assert [r["user"] for r in found["key_rotations"]] == ["pii_admin", "pii_admin"]
    assert {r["key_id"] for r in found["key_rotations"]} == {key["master_key_id"]}
    versions = found["policy_versions"]
    assert [(v["version"], v["applied_by"], v["redact_after"], v["retrieved_for"], v["audit_for"]) for v in versions] == [
        (1, "pii_admin", "30 days", "30 days", "10 years"), (2, "pii_admin", "30 days", "7 days", "3 years")]
    assert len({v["sha256"] for v in versions}) == 2
    assert found["cycles"]["with_work"] == 1 and found["cycles"]["interrupted"] == 0 and found["cycles"]["last_at"] is not None
    # A version counts for as long as it is in force.
    shop.sql("UPDATE amazon_pii.policy_version SET applied_at = CASE version WHEN 1 THEN '2026-01-01' ELSE '2026-02-01' END::timestamptz")
    assert [v["version"] for v in evidence(shop, start="2026-01-10", end="2026-01-20")["policy_versions"]] == [1]
    assert [v["version"] for v in evidence(shop, start="2026-01-10", end="2026-02-20")["policy_versions"]] == [1, 2]
    assert [v["version"] for v in evidence(shop, start="2026-02-10", end="2026-02-20")["policy_versions"]] == [2]


def test_results_of_verification(shop):
    """Breaks when nobody can show later what verify and verify_audit_log found, when, and who ran them."""
    assert evidence(shop)["verification"] == {"personal_data": [], "audit_log": []}
    shop.sql("SELECT * FROM amazon_pii.verify('shop')", user="pii_auditor")
    shop.sql("CREATE TABLE shop.notes (v text); INSERT INTO shop.notes VALUES ('for Street 1')", user="shop_owner")
    shop.sql("SELECT * FROM amazon_pii.verify('shop', 'schema')", user="pii_admin")
    shop.sql("SELECT * FROM amazon_pii.verify_audit_log('shop')", user="pii_admin")
    found = evidence(shop)["verification"]
    second, first = found["personal_data"]
    assert (first["user"], first["result"]["scope"], first["result"]["columns"]) == ("pii_auditor", "linked", [])
    assert (second["user"], second["result"]["scope"]) == ("pii_admin", "schema")
    assert second["result"]["columns"] == [{"table": "shop.notes", "column": "v", "orders": 1}]
    assert second["result"]["columns_with_personal_data"] == 1
    (log,) = found["audit_log"]
    assert log["result"]["errors"] == 0 and log["result"]["head_position"] > 0 and len(log["result"]["head_code"]) == 64
    head = evidence(shop)["audit_log"]
    assert head["head_code"] == log["result"]["head_code"] and head["not_linked_yet"] == 5 and head["removed_by_audit_for"] == 0
    assert head["by_action"]["verify_result"] == 2


def test_no_personal_data(shop):
    """P9. Breaks when a value of a row gets into the evidence, on whatever way an order has gone."""
    add_order(shop, 8, "33 days")
    shop.sql("SELECT * FROM amazon_pii.retrieve(%s, 'return')", [number(1)], "pii_operator")
    shop.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + '60 days'::interval)", [number(5)], "pii_operator")
    shop.sql("CREATE FUNCTION shop.no() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE '%', OLD; END$$; "
             "CREATE TRIGGER no BEFORE UPDATE ON shop.addresses FOR EACH ROW EXECUTE FUNCTION shop.no()", user="shop_owner")
    run_cycle(shop)
    shop.sql("SELECT * FROM amazon_pii.verify('shop', 'database')", user="pii_admin")
    text = json.dumps(evidence(shop)) + str(shop.sql("SELECT * FROM amazon_pii.verify_audit_log()", user="pii_auditor"))
    for order in range(1, 9):
        for word in ("Gift", "Note", "Name", "Street ", "City", "First", "Last", "BillTo", "LineNote"):
            assert f"{word}{order}" not in text, (word, order)
        assert f"buyer{order}@" not in text and f"+49 666 {order:04d}" not in text and f"Z{order}" not in text
    assert number(8) in text


def test_who_may_ask(shop):
    """Breaks when evidence is for anybody, or for nobody, or writes."""
    for user in ("pii_operator", "nobody_special", "shop_owner"):
        with refused("42501"):
            evidence(shop, user=user)
    assert evidence(shop, user="pii_admin")["issued_by"] == "pii_admin"
    with refused("42704", "does not exist"):
        evidence(shop, "nothing")
    with refused("22023", "must not be null"):
        evidence(shop, None)
    session = shop.connect("pii_auditor", autocommit=False)
    with session.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ ONLY; SELECT amazon_pii.evidence('shop')")
        cursor.execute("SELECT txid_current_if_assigned()")
        assert cursor.fetchone() == (None,)
    session.close()


def test_a_dropped_policy_leaves_its_evidence(shop):
    shop.sql("SELECT amazon_pii.drop_policy('shop', 'test')", user="pii_admin")
    found = evidence(shop)
    assert found["orders_by_state"] == {} and found["kept_longer"]["now"] is None and len(found["policy_versions"]) == 1
    assert found["audit_log"]["by_action"]["drop_policy"] == 1


def test_without_a_master_key(shop):
    """Breaks when a missing key keeps an assessor from what needs none."""
    shop.sql("ALTER SYSTEM SET amazon_pii.key_file = '/nowhere'")
    shop.cluster.reload()
    shop.session("pii_auditor").close()
    try:
        assert [k["configured"] for k in evidence(shop)["keys"]] == [None]
    finally:
        shop.sql("ALTER SYSTEM RESET amazon_pii.key_file")
        shop.cluster.reload()
