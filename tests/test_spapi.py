"""The main job on orders as Amazon's APIs answer them: Amazon's own samples where they are at hand, and invented orders
that fill every field which the API can give to a buyer. After a cycle no buyer's value is left in any column of any
source table, nothing else has changed, and a retrieval brings every column back to the byte."""
import json
from pathlib import Path

import pytest
from amazon_samples import PLACEHOLDER, REPORT_COLUMNS, Importer, leaves, parse, redacted

FIXTURES = Path(__file__).resolve().parent / "fixtures"
PATHS = json.loads((FIXTURES / "spapi_paths.json").read_text())
V0, V2026 = {"json": PATHS["v0"]}, {"json": PATHS["2026-01-01"]}
BOTH = {"json": PATHS["v0"] + PATHS["2026-01-01"]}


def as_received(treatment):
    return {"raw": treatment, "raw_json": treatment, "raw_text": treatment}


POLICY = {
    "policy": "spapi",
    "enabled": True,
    "orders": {
        "table": "spapi.orders",
        "number": "amazon_order_id",
        "anchor": "dispatched_at",
        "redact": {
            **dict.fromkeys(
                ["buyer_name", "buyer_email", "buyer_county", "buyer_company", "purchase_order", "drop_off", "instructions"],
                "placeholder",
            ),
            "raw": BOTH,
        },
    },
    "linked": [
        {
            "table": "spapi.addresses", "on": {"order_id": "id"}, "where": "kind = 'recipient'",
            "redact": ["name", "company", "lines", "city", "district", "state", "zip", "country", "phone", "latitude", "longitude"],
        },
        {"table": "spapi.items", "on": {"order_id": "id"}, "redact": ["gift_message", "customized_url", "cancel_reason"]},
        {
            "table": "spapi.tax_registrations", "on": {"order_id": "id"}, "where": "entity = 'BUYER'",
            "redact": {"legal_name": "placeholder", "number": "placeholder", "address": {"json": {"keep": []}}},
        },
        {"table": "spapi.payments", "on": {"order_id": "id"}, "redact": ["acquirer", "authorization_code", "card_brand"]},
        {"table": "spapi.parcels", "on": {"order_id": "id"}, "redact": ["tracking"]},
        {"table": "spapi.regulated_fields", "on": {"order_id": "id"}, "redact": ["value"]},
        {"table": "spapi.payloads_v0", "on": {"order_id": "id"}, "redact": as_received(V0)},
        {"table": "spapi.payloads_2026", "on": {"order_id": "id"}, "redact": as_received(V2026)},
        {"table": "spapi.answer_orders", "on": {"order_id": "id"}},
        {"table": "spapi.answers", "parent": "answer_orders", "on": {"id": "answer_id"}, "redact": as_received(BOTH)},
        {
            "table": 'spapi."Report Lines"', "as": "report", "on": {"order-id": "amazon_order_id"}, "redact": REPORT_COLUMNS,
        },
    ],
}
JSON_COLUMNS = ("raw", "raw_json", "raw_text")
# Columns that hold the placeholder, or nothing, once their row is redacted; where not every row is a buyer's, which are.
PLAIN_COLUMNS = {
    "orders": ["buyer_name", "buyer_email", "buyer_county", "buyer_company", "purchase_order", "drop_off", "instructions"],
    "addresses": ["name", "company", "city", "district", "state", "zip", "country", "phone", "latitude", "longitude"],
    "items": ["gift_message", "customized_url", "cancel_reason"],
    "tax_registrations": ["legal_name", "number"],
    "payments": ["acquirer", "authorization_code", "card_brand"],
    "parcels": ["tracking"],
    "regulated_fields": ["value"],
    "Report Lines": REPORT_COLUMNS,
}
SELLERS_ROWS = {"addresses": ("kind", "ship_from"), "tax_registrations": ("entity", "MARKETPLACE")}
# What the policy redacts besides, each with a check of its own below.
CONTAINERS = {("addresses", "lines"), ("tax_registrations", "address")}


def snapshot(db):
    """Every column of every row of every table as its text: {table: {row number: {column: text}}}."""
    out = {}
    tables = db.sql("SELECT relname FROM pg_class WHERE relnamespace = 'spapi'::regnamespace AND relkind = 'r'")
    for (table,) in tables:
        columns = [r[0] for r in db.sql(
            "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            [f'spapi."{table}"'],
        )]
        key = db.value(
            "SELECT string_agg(quote_ident(attname), ', ') FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY (indkey)"
            " WHERE indrelid = %s::regclass AND indisprimary", [f'spapi."{table}"'],
        )
        texts = ", ".join(f'"{column}"::text' for column in columns)
        rows = db.sql(f'SELECT {texts} FROM spapi."{table}" ORDER BY {key}')
        out[table] = {number: dict(zip(columns, row)) for number, row in enumerate(rows)}
    return out


def cells(state):
    for table, rows in state.items():
        for number, row in rows.items():
            for column, text in row.items():
                yield (table, number, column), row, text


def is_sellers(table, row):
    column, value = SELLERS_ROWS.get(table, (None, None))
    return column is not None and row[column] == value


def check_redacted(before, after, buyers, others):
    """Column by column what must have become of it; then a search for every value of a buyer's, wherever it may be."""
    assert {t: len(r) for t, r in after.items()} == {t: len(r) for t, r in before.items()}
    for (table, number, column), row, old in cells(before):
        new = after[table][number][column]
        place = f"{table} {number} {column}"
        if column in JSON_COLUMNS:
            if old is not None:
                assert parse(new) == redacted(parse(old)), place
        elif (table, column) in CONTAINERS and not is_sellers(table, row):
            continue
        elif column in PLAIN_COLUMNS.get(table, ()) and not is_sellers(table, row):
            wanted = old if old in (None, "") else PLACEHOLDER
            if column in ("latitude", "longitude"):
                wanted = None
            assert (new or "").rstrip(" ") == (wanted or "") and (new is None) == (wanted is None), place
        else:
            assert new == old, f"{place} is not a buyer's"
    # One and two characters (a state, a house number) occur anywhere; their columns were compared above.
    searched = {value for value in buyers if len(value) > 2}
    assert len(searched) > 20
    for (table, number, column), _, text in cells(after):
        if not text:
            continue
        for value in searched:
            if value in text:
                # What the seller's own data says may stay: the samples give one address to buyer and seller.
                for own in others:
                    if value in own:
                        text = text.replace(own, "")
                assert value not in text, f"{table} {number} {column}"


def buyers_and_others(texts):
    buyers, others = set(), set()
    for text in texts:
        for _, value, is_buyers in leaves(parse(text)):
            if isinstance(value, str):
                (buyers if is_buyers else others).add(value)
    return buyers, others


def life(db, importer, buyers, others):
    """Import, cycle, search, retrieve, compare; for any orders that are in the tables."""
    before = snapshot(db)
    numbers = sorted(importer.keys)
    flagged = db.sql("SELECT order_number FROM amazon_pii.orders ORDER BY 1")
    assert [n for (n,) in flagged] == numbers, "not every order was flagged when it was imported"

    ((new, archived, gone, failed, overdue),) = db.sql("CALL amazon_pii.run_cycle('spapi')", user="pii_admin")
    errors = db.sql("SELECT order_number, last_error FROM amazon_pii.orders WHERE last_error IS NOT NULL")
    assert (new, archived, gone, failed, overdue, errors) == (0, len(numbers), len(numbers), 0, 0, [])
    after = snapshot(db)
    check_redacted(before, after, buyers, others)
    sealed = b"".join(bytes(s) for (s,) in db.sql("SELECT sealed FROM amazon_pii_archive.document"))
    assert not [v for v in buyers if len(v) > 5 and v.encode() in sealed]
    ((_, archived, _, failed, _),) = db.sql("CALL amazon_pii.run_cycle('spapi', sweep => true)", user="pii_admin")
    assert (archived, failed) == (0, 0)
    assert snapshot(db) == after, "a second look changed what was redacted"

    for number in numbers:
        kept = db.value("SELECT sum(kept) FROM amazon_pii.retrieve(%s, 'test')", [number], user="pii_operator")
        assert kept in (None, 0), number
    back = snapshot(db)
    different = [place for (place, _, text) in cells(before) if back[place[0]][place[1]][place[2]] != text]
    assert different == []
    assert back == before

    for number in numbers:
        db.sql("SELECT amazon_pii.end_retrieval(%s)", [number], user="pii_operator")
    db.sql("CALL amazon_pii.run_cycle('spapi')", user="pii_admin")
    assert snapshot(db) == after
    log = db.cluster.log_text()
    assert not [v for v in buyers if len(v) > 8 and v in log]


@pytest.fixture
def importer(db):
    db.psql(FIXTURES / "spapi.sql")
    warnings = [r for r in db.check_policy(POLICY) if r[0] == "error"]
    assert warnings == []
    db.apply_policy(POLICY)
    return Importer(db)


def test_amazons_own_samples(db, importer, spapi):
    # A field that Amazon's documents have and the policy's paths miss would stay in a payload for ever.
    files = sorted([*spapi.glob("ordersV0.*.json"), *spapi.glob("orders2026.*.json")])
    assert len(files) >= 25
    for path in files:
        importer.sample(path.name, path.read_text())
    buyers, others = buyers_and_others(path.read_text() for path in files)
    for path in spapi.glob("flatfile.GET_FLAT_FILE_ORDERS_DATA.sample.tsv"):
        more = importer.report(path.read_text())
        buyers |= more[0]
        others |= more[1]
    assert db.value('SELECT count(*) FROM spapi."Report Lines"') == 6
    life(db, importer, buyers, others)


def test_every_field_that_can_be_a_buyers(db, importer):
    # The samples leave out many fields: tax identities, delivery preferences, payment traces.
    texts = {name: (FIXTURES / name).read_text() for name in ("orders_v0.json", "orders_2026.json")}
    for name, text in texts.items():
        importer.sample(name, text)
    buyers, others = buyers_and_others(texts.values())
    life(db, importer, buyers, others)
    assert not buyers & others, "an invented value that is on both sides proves nothing"


def test_two_treatments_of_other_types(db, importer):
    # Arrays and whole JSON documents are compared by their elements here, not by the rules of the payloads.
    for name in ("orders_v0.json", "orders_2026.json"):
        importer.sample(name, (FIXTURES / name).read_text())
    db.sql("CALL amazon_pii.run_cycle('spapi')", user="pii_admin")
    lines = db.sql("SELECT lines FROM spapi.addresses WHERE kind = 'recipient' ORDER BY id")
    assert lines == [([PLACEHOLDER, "", None] + [PLACEHOLDER] * 4,)] * 2
    addresses = db.sql("SELECT entity, address::text FROM spapi.tax_registrations ORDER BY id")
    members = f'{{"name": "{PLACEHOLDER}", "addressLine1": "{PLACEHOLDER}", "city": "{PLACEHOLDER}"}}'
    assert addresses[0] == ("BUYER", members)
    assert addresses[1][0] == "MARKETPLACE" and "Marktgasse 1" in addresses[1][1]
