"""The reason of an access, stored in the shop's own history of the customer: what is written there, as whom, and that it
stays when the same table is redacted."""
import copy

import pytest
from support import (
    PLACEHOLDER, add_customer, add_order, end_retrieval, hurry, number, open_shop, refused, retrieve, run_cycle, shop_policy, sweep,
)

TABLES = """
SET ROLE shop_owner;
CREATE TABLE shop.history (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer_id bigint NOT NULL REFERENCES shop.customers,
    order_id bigint, at timestamptz NOT NULL DEFAULT now(), kind varchar(20), note text, who text, weight int);
CREATE INDEX ON shop.history (order_id);
"""
HISTORY = {"table": "shop.history", "columns": {
    "customer_id": {"order": "customer_id"}, "order_id": {"order": "id"}, "at": ":at", "kind": "amazon_pii :action", "weight": 3,
    "note": ":action of order :number: :reason", "who": ":user (:actor)"}}
ENTRY = {"table": "shop.history", "on": {"order_id": "id"}, "redact": ["note", "who"]}


def policy(history=None, **changes):
    return shop_policy(history={**copy.deepcopy(HISTORY), **(history or {})}, **changes)


def with_entry(**entry):
    document = policy()
    document["linked"].append({**ENTRY, **entry})
    return document


@pytest.fixture
def shop(db):
    """Orders 1 and 2 were dispatched long ago."""
    open_shop(db)
    db.psql(TABLES)
    for n in (1, 2):
        add_customer(db, n)
        add_order(db, n, customer=n)
    return db


def lines(db, columns="customer_id, order_id, kind, note, who, weight"):
    return db.sql(f"SELECT {columns} FROM shop.history ORDER BY id")


def test_each_access_with_a_reason_leaves_a_line(shop):
    """pixi: a reason, 50 characters at most, stored in the customer's history. Breaks when an action writes none, or
    something else."""
    shop.apply_policy(policy())
    add_order(shop, 3, customer=2)
    shop.sql("SELECT amazon_pii.hold(%s, 'dispute', now() + '1 day'::interval)", [number(3)], "pii_operator")
    run_cycle(shop)
    shop.sql("SET amazon_pii.actor = 'erp-7'", user="pii_operator")
    retrieve(shop, number(1), "x" * 50)
    shop.sql("SELECT amazon_pii.unflag(%s, 'wrong policy')", [number(2)], "pii_admin")
    assert lines(shop) == [
        (2, 3, "amazon_pii hold", f"hold of order {number(3)}: dispute", "pii_operator ()", 3),
        (1, 1, "amazon_pii retrieve", f"retrieve of order {number(1)}: {'x' * 50}", "pii_operator (erp-7)", 3),
        (2, 2, "amazon_pii unflag", f"unflag of order {number(2)}: wrong policy", "pii_admin ()", 3)]
    assert shop.value("SELECT bool_and(at BETWEEN now() - '1 minute'::interval AND now()) FROM shop.history")
    assert shop.value("SELECT count(*) FROM amazon_pii.audit_log WHERE action = 'retrieve'") == 1


def test_what_ends_an_order_leaves_a_line_too(shop):
    """Breaks when erase, shred or forget is only in the audit log; forget has one line an order, done or not."""
    shop.apply_policy(policy())
    add_order(shop, 3, shipped="2 days", customer=1)
    run_cycle(shop)
    for action, order in (("erase", 3), ("shred", 1), ("forget", 2)):
        shop.sql(f"SELECT amazon_pii.{action}(%s, 'request 7')", [number(order)], "pii_admin")
    assert lines(shop, "order_id, kind, note") == [
        (order, f"amazon_pii {action}", f"{action} of order {number(order)}: request 7") for action, order in (("erase", 3), ("shred", 1), ("forget", 2))]


def test_a_line_goes_with_the_callers_transaction(shop):
    """Breaks when a line stays of something that was rolled back."""
    shop.apply_policy(policy())
    run_cycle(shop)
    session = shop.connect("pii_operator", autocommit=False)
    session.cursor().execute("SELECT amazon_pii.retrieve(%s, 'return')", [number(1)])
    session.rollback()
    session.close()
    assert lines(shop) == []
    assert shop.value("SELECT count(*) FROM amazon_pii.own_row") == 0


def test_the_owner_writes_the_line(shop):
    """P8. Breaks when triggers and defaults of the history run with the rights of the caller or of the extension."""
    shop.sql("CREATE TABLE shop.seen (who name); CREATE FUNCTION shop.look() RETURNS trigger LANGUAGE plpgsql AS "
             "$$BEGIN INSERT INTO shop.seen VALUES (current_user); RETURN NEW; END$$; "
             "CREATE TRIGGER look BEFORE INSERT ON shop.history FOR EACH ROW EXECUTE FUNCTION shop.look()", user="shop_owner")
    shop.apply_policy(policy())
    shop.sql("DELETE FROM shop.seen", user="shop_owner")
    run_cycle(shop)
    retrieve(shop, number(1))
    assert shop.sql("SELECT who FROM shop.seen") == [("shop_owner",)]


def test_a_history_that_refuses_the_line_refuses_the_access(shop):
    """Breaks when an order is retrieved that the history says nothing of."""
    shop.apply_policy(policy())
    run_cycle(shop)
    shop.sql("ALTER TABLE shop.history ADD CHECK (kind = '')", user="shop_owner")
    with refused("23514", "shop.history"):
        retrieve(shop, number(1))
    assert shop.value("SELECT status FROM amazon_pii.orders WHERE order_key = '[\"1\"]'") == "redacted"


def write_there(shop):
    """Our line and one of the shop's own, both of order 1 once it is redacted."""
    run_cycle(shop)
    retrieve(shop, number(1), "return 4711")
    end_retrieval(shop, number(1))
    shop.sql("INSERT INTO shop.history (customer_id, order_id, note, who) VALUES (1, 1, 'Last1 called', 'Last1')", user="shop_owner")
    run_cycle(shop)


OURS = (f"retrieve of order {number(1)}: return 4711", "pii_operator ()")


def test_our_words_are_not_redacted(shop):
    """Breaks when the history is an entry whose note is redacted, and takes the reason along; or spares the shop's own lines."""
    shop.apply_policy(with_entry())
    write_there(shop)
    assert lines(shop, "note, who") == [OURS, (PLACEHOLDER, PLACEHOLDER)]
    sweep(shop)
    shop.sql("UPDATE amazon_pii.order_state SET next_due_at = now()")
    assert run_cycle(shop)["redacted"] == 0
    assert lines(shop, "note, who")[0] == OURS
    retrieve(shop, number(1), "again")
    assert lines(shop, "note")[:2] == [(OURS[0],), ("Last1 called",)]
    assert shop.sql("SELECT DISTINCT status FROM amazon_pii.records WHERE table_name = 'shop.history'") == [("retrieved",)]


def test_what_a_trigger_adds_to_our_words_is_not_ours(shop):
    """P9. Breaks when the buyer's name that a trigger of the history puts into our line is kept in clear, and spared."""
    shop.sql("CREATE FUNCTION shop.add() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.note := NEW.note || ' for ' || "
             "(SELECT a.name FROM shop.addresses AS a WHERE a.order_id = NEW.order_id); RETURN NEW; END $$; "
             "CREATE TRIGGER add BEFORE INSERT ON shop.history FOR EACH ROW EXECUTE FUNCTION shop.add()", user="shop_owner")
    shop.apply_policy(with_entry())
    write_there(shop)
    assert "Name1" not in str(shop.sql("SELECT words FROM amazon_pii.own_row"))
    assert [note for note, in lines(shop, "note")] == [PLACEHOLDER, PLACEHOLDER] and lines(shop, "who")[0] == (OURS[1],)


def test_words_that_somebody_wrote_over_ours_are(shop):
    """P7. Breaks when a line is spared for ever because it once was ours."""
    shop.apply_policy(with_entry())
    write_there(shop)
    shop.sql("UPDATE shop.history SET note = note || ' for Last1' WHERE note = %s", [OURS[0]], user="shop_owner")
    assert run_cycle(shop)["redacted"] == 1
    assert lines(shop, "note, who")[0] == (PLACEHOLDER, OURS[1])


def test_our_lines_stay_where_rows_go_as_a_whole(shop):
    """Breaks when "on_redact": "delete" removes the reason."""
    shop.apply_policy({**with_entry(), "linked": [*shop_policy()["linked"], {
        "table": "shop.history", "on": {"order_id": "id"}, "on_redact": "delete"}]})
    write_there(shop)
    assert lines(shop, "note, who") == [OURS]


def test_our_words_stay_when_the_policy_forgets_the_history(shop):
    """Breaks when what earlier versions wrote becomes personal data."""
    shop.apply_policy(with_entry())
    write_there(shop)
    document = with_entry()
    del document["history"]
    shop.apply_policy(document)
    sweep(shop)
    hurry(shop)
    run_cycle(shop)
    assert lines(shop, "note, who")[0] == OURS


def test_an_order_that_is_gone_has_no_line(shop):
    """Breaks when a customer that nobody knows keeps an order from being retrieved."""
    shop.apply_policy(policy())
    run_cycle(shop)
    shop.sql("UPDATE shop.addresses SET order_id = 2; DELETE FROM shop.orders WHERE id = 1", user="shop_owner")
    retrieve(shop, number(2))
    assert [line[0] for line in lines(shop)] == [2]


@pytest.mark.parametrize("history, words, hint", [
    ({"columns": {"note": ":reson"}}, 'unknown word ":reson"', ":reason"),
    ({"columns": {"nots": ":reason"}}, 'column "nots" of shop.history does not exist', ""),
    ({"columns": {}}, "names no column", ""),
    ({"columns": {"note": None}}, "neither a text nor an expression", "customer_id"),
    ({"columns": {"customer_id": {"order": "no_such"}}}, "history.columns.customer_id", ""),
    ({"columns": {"note": ":reason"}}, "shop.history", ""),
    ({"columns": {"customer_id": {"order": "customer_id"}, "kind": ":reason"}}, "shop.history", ""),
    ({"table": "shop.histories"}, "shop.histories does not exist", ""),
    ({"tabel": "shop.history"}, 'unknown key "tabel"', '"table"'),
], ids=["word", "column", "none", "no text", "expression", "not null", "too long", "table", "key"])
def test_what_the_history_would_refuse_is_found_when_applied(shop, history, words, hint):
    """Breaks when it is found out by the first person who retrieves an order."""
    found = [f for f in shop.check_policy(policy(history)) if f[0] == "error"]
    assert len(found) == 1 and words in f"{found[0][1]}: {found[0][2]}" and hint.replace(":", "") in found[0][3], found
    assert lines(shop) == []


def test_the_history_must_be_ones_own(shop):
    """P8. Breaks when an administrator can have lines written into somebody else's table."""
    shop.sql("CREATE SCHEMA theirs; CREATE TABLE theirs.history (id int PRIMARY KEY, note text)", user="other_owner")
    with refused("42501", "must be owner of table theirs.history"):
        shop.apply_policy(policy({"table": "theirs.history", "columns": {"note": ":reason"}}))
    shop.apply_policy(policy())
    shop.sql("GRANT USAGE, CREATE ON SCHEMA shop TO other_owner; ALTER TABLE shop.history OWNER TO other_owner")
    with refused("42501", "has another owner now"):
        run_cycle(shop, "shop")
