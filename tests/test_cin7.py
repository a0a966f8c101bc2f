"""What Cin7's retention guide promises, line by line, on tables of that kind (fixtures/cin7.sql) under the preset `cin7`. Each
test's first line quotes the behaviour."""
from datetime import timedelta

import pytest
from simulated import database_in, running, utc
from support import FIXTURES, PLACEHOLDER, refused, run_cycle

PII = ("first_name", "last_name", "delivery_address_1", "delivery_address_2", "billing_address_1", "billing_address_2", "email", "phone")


def open_cin7(db):
    db.psql(FIXTURES / "cin7.sql")
    db.sql("INSERT INTO cin7.tenants VALUES (1, 'old', NULL), (2, 'new', NULL)", user="shop_owner")
    db.sql("INSERT INTO cin7.members (id, company, source) VALUES (1, 'Amazon orders', 'generic')", user="shop_owner")
    return db


@pytest.fixture
def cin7(db):
    return open_cin7(db)


def preset(db, **changes):
    document = db.value("SELECT amazon_pii.preset('cin7')", user="pii_admin")
    return {**document, "enabled": True, **changes}


def reference(sale):
    return f"113-1234567-{sale:07d}"


def add_sale(db, sale, source="Amazon US", tenant=1, member=None):
    """A sale, not dispatched, with a member of its own as an importer makes one."""
    if member is None:
        member = sale + 1000
        db.sql("INSERT INTO cin7.members VALUES (%s, NULL, %s, %s, %s, %s, 'import')",
               [member, f"First{sale}", f"Last{sale}", f"m{sale}@example.invalid", f"+61 2 {sale}"], "shop_owner")
    db.sql("""INSERT INTO cin7.sales (id, tenant_id, reference, source, member_id, first_name, last_name, email, phone, delivery_address_1,
        delivery_address_2, delivery_city, delivery_postcode, delivery_country, billing_address_1, billing_address_2, billing_city,
        billing_postcode, billing_country, total) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, '2000', 'AU', %s, %s, %s, '3000', 'AU', 9.90)""",
           [sale, tenant, reference(sale), source, member, f"First{sale}", f"Last{sale}", f"s{sale}@example.invalid", f"+61 2 {sale}",
            f"{sale} Nowhere Road", f"Unit {sale}", f"Town{sale}", f"{sale} Elsewhere Road", "", f"Town{sale}"], "shop_owner")


def dispatch(db, sale, ago="31 days", last=True):
    """A shipment; with the last one the sale is fully dispatched."""
    db.sql("INSERT INTO cin7.shipments (sale_id, dispatched_at, tracking_code) VALUES (%s, now() - %s::interval, %s)",
           [sale, ago, f"TR{sale}"], "shop_owner")
    if last:
        db.sql("UPDATE cin7.sales SET dispatch_status = 'Fully dispatched' WHERE id = %s", [sale], "shop_owner")


def values(db, sale, columns=PII):
    return db.sql(f"SELECT {', '.join(columns)} FROM cin7.sales WHERE id = %s", [sale])[0]


def status(db, sale):
    found = db.sql("SELECT status FROM amazon_pii.orders WHERE order_key = %s", [f'["{sale}"]'])
    return found[0][0] if found else None


def readable(db):
    """The sales whose buyer can still be read."""
    return [sale for (sale,) in db.sql("SELECT id FROM cin7.sales WHERE first_name <> '[Redacted]' ORDER BY id")]


# The preset, and which columns are personal data

def test_the_preset_fits_the_fixture(cin7):
    add_sale(cin7, 1)
    dispatch(cin7, 1)
    assert cin7.check_policy(preset(cin7)) == []


def test_the_listed_columns_are_replaced_for_billing_and_delivery(cin7):
    """First name, last name, delivery and billing address lines 1 and 2, e-mail, phone: literally "[Redacted]", but empty ones."""
    cin7.apply_policy(preset(cin7))
    add_sale(cin7, 1)
    dispatch(cin7, 1)
    before = dict(zip(PII, values(cin7, 1)))
    assert run_cycle(cin7)["redacted"] == 1
    assert values(cin7, 1) == tuple(PLACEHOLDER if before[c] else before[c] for c in PII)
    assert before["billing_address_2"] == "" and list(before.values()).count("") == 1
    kept = ("delivery_country", "billing_country", "total::text", "source", "reference")
    assert values(cin7, 1, kept) == ("AU", "AU", "9.90", "Amazon US", reference(1))
    assert cin7.value("SELECT count(*) FROM cin7.shipments WHERE tracking_code = '[Redacted]'") == 1


# "Only fully dispatched orders; 30 days after the dispatch date"; "details are readable until then"

@pytest.fixture(scope="module")
def simulated():
    yield from running(utc(2027, 1, 10))


@pytest.fixture
def walked(simulated):
    yield from database_in(simulated, open_cin7)


def test_partly_dispatched_orders_are_not_due_and_details_are_readable_until_thirty_days_after_the_last_dispatch(simulated, walked):
    """By the shipments table, or by the column of systems that keep none."""
    walked.apply_policy(preset(walked))
    for sale in (1, 2, 3):
        add_sale(walked, sale)
    # One waits for its second parcel, which leaves on day 20; one has none but a date; one is never complete.
    dispatch(walked, 1, "0 days", last=False)
    walked.sql("UPDATE cin7.sales SET dispatched_at = now() WHERE id = 2", user="shop_owner")
    dispatch(walked, 3, "0 days", last=False)
    begin = simulated.now
    gone = {}
    for now in simulated.days(55):
        day = (now - begin).days
        if day == 20:
            dispatch(walked, 1, "0 days")
        run_cycle(walked)
        for sale in {1, 2, 3} - set(readable(walked)):
            gone.setdefault(sale, day)
    assert gone == {1: 50, 2: 30}
    assert status(walked, 3) == "flagged"


# "Daily check for any order that has PII"

def test_a_day_that_was_missed_is_caught_up(simulated, walked):
    """The server is down for three days, triggers were off before: the next check finds all of it."""
    walked.apply_policy(preset(walked))
    add_sale(walked, 1)
    dispatch(walked, 1, "28 days")
    run_cycle(walked)
    walked.sql("ALTER TABLE cin7.sales DISABLE TRIGGER USER; ALTER TABLE cin7.shipments DISABLE TRIGGER USER", user="shop_owner")
    add_sale(walked, 2)
    dispatch(walked, 2, "28 days")
    walked.sql("ALTER TABLE cin7.sales ENABLE TRIGGER USER; ALTER TABLE cin7.shipments ENABLE TRIGGER USER", user="shop_owner")
    simulated.cluster.stop()
    simulated.move_to(simulated.now + timedelta(days=3))
    simulated.cluster.start()
    counts = run_cycle(walked)
    assert (counts["flagged"], counts["redacted"], counts["overdue"]) == (1, 2, 0)
    assert readable(walked) == []


# "Existing customers' orders are modified in retrospect"

def test_existing_orders_are_redacted_in_retrospect_in_batches_with_progress(cin7):
    """At the first enabling; the run's row counts up while it works, batch by batch."""
    cin7.sql("""INSERT INTO cin7.sales (id, tenant_id, reference, source, member_id, dispatched_at, first_name)
        SELECT i, 1, 'A' || i, CASE WHEN i % 10 = 0 THEN 'Shopify' ELSE 'Amazon UK' END, 1, now() - '90 days'::interval, 'First' || i
          FROM generate_series(1, 1000) AS i""", user="shop_owner")
    cin7.apply_policy(preset(cin7))
    cin7.sql("""CREATE TABLE cin7.seen (redacted bigint);
        CREATE FUNCTION cin7.look() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN INSERT INTO cin7.seen SELECT r.redacted FROM amazon_pii.runs AS r WHERE r.finished_at IS NULL; RETURN NULL; END $$""")
    cin7.sql("CREATE TRIGGER look AFTER UPDATE ON cin7.sales FOR EACH STATEMENT EXECUTE FUNCTION cin7.look()")
    cin7.sql("ALTER FUNCTION cin7.look() OWNER TO postgres; GRANT ALL ON cin7.seen TO shop_owner")
    counts = run_cycle(cin7)
    assert (counts["flagged"], counts["redacted"], counts["overdue"]) == (900, 900, 0)
    assert readable(cin7) == [i for i in range(1, 1001) if i % 10 == 0]
    steps = [n for (n,) in cin7.sql("SELECT DISTINCT redacted FROM cin7.seen ORDER BY 1")]
    assert len(steps) >= 3 and steps[0] == 0 and steps[-1] < 900


# "No CRM record for Amazon orders; they go to a generic record, or one of the user's choice, which can be changed"

def member_of(db, sale):
    return db.value("SELECT member_id FROM cin7.sales WHERE id = %s", [sale])


def test_amazon_orders_go_to_the_generic_record_and_the_importers_goes_with_its_order(cin7):
    """By INSERT, UPDATE and upsert; the generic record itself is never redacted; another channel's customers stay."""
    cin7.apply_policy(preset(cin7))
    add_sale(cin7, 1)
    add_sale(cin7, 2, source="Shopify")
    assert (member_of(cin7, 1), member_of(cin7, 2)) == (1, 1002)
    # A sync that sends the old member again, and one that upserts.
    cin7.sql("UPDATE cin7.sales SET member_id = 1001 WHERE id = 1", user="shop_owner")
    assert member_of(cin7, 1) == 1
    cin7.sql("""INSERT INTO cin7.sales (id, tenant_id, reference, source, member_id) VALUES (1, 1, 'x', 'Amazon US', 1001)
        ON CONFLICT (id) DO UPDATE SET member_id = EXCLUDED.member_id""", user="shop_owner")
    assert member_of(cin7, 1) == 1
    dispatch(cin7, 1)
    assert run_cycle(cin7)["redacted"] == 1
    members = "SELECT id, company, first_name, email FROM cin7.members ORDER BY id"
    assert cin7.sql(members) == [(1, "Amazon orders", None, None), (1001, None, PLACEHOLDER, PLACEHOLDER), (1002, None, "First2", "m2@example.invalid")]


def test_the_importers_record_goes_at_once_where_the_policy_says_so(cin7):
    """`"orphan": "now"`: it does not wait for the dispatch; the sale's own details do."""
    document = preset(cin7)
    document["orders"]["assign_customer"]["orphan"] = "now"
    cin7.apply_policy(document)
    add_sale(cin7, 1)
    run_cycle(cin7)
    assert cin7.sql("SELECT first_name, email FROM cin7.members WHERE id = 1001") == [(PLACEHOLDER, PLACEHOLDER)]
    assert cin7.value("SELECT first_name FROM cin7.sales WHERE id = 1") == "First1"


def test_another_generic_record_can_be_chosen_for_new_orders(cin7):
    """Changing the policy changes new orders, and no old one."""
    document = preset(cin7)
    cin7.apply_policy(document)
    add_sale(cin7, 1)
    cin7.sql("INSERT INTO cin7.members (id, company, source) VALUES (2, 'Amazon EU', 'generic')", user="shop_owner")
    document["orders"]["assign_customer"]["to"] = 2
    cin7.apply_policy(document)
    add_sale(cin7, 2)
    assert (member_of(cin7, 1), member_of(cin7, 2)) == (1, 2)


# "Replaced with [Redacted]; nothing is kept"

def test_nothing_is_kept(cin7):
    """The order's key and documents are gone when the redaction has committed: nobody gets anything back."""
    cin7.apply_policy(preset(cin7))
    add_sale(cin7, 1)
    dispatch(cin7, 1)
    run_cycle(cin7)
    assert values(cin7, 1, ("first_name", "email")) == (PLACEHOLDER,) * 2
    assert cin7.sql("SELECT (SELECT count(*) FROM amazon_pii_archive.document), (SELECT count(*) FROM amazon_pii_archive.data_key)") == [(0, 0)]
    assert status(cin7, 1) == "purged"
    for call in ("peek", "retrieve"):
        with refused("42704"):
            cin7.sql(f"SELECT amazon_pii.{call}(%s, 'return')", [reference(1)], "pii_operator")


# "Takes effect on one date for old customers and from the start for new ones"

def test_it_takes_effect_on_a_date_for_old_customers_and_at_once_for_new_ones(simulated, walked):
    """effective_from by an expression over the order's row; before it, orders are flagged and previewed, not touched."""
    document = preset(walked)
    document["orders"]["effective_from"] = "(SELECT t.redaction_from FROM cin7.tenants AS t WHERE t.id = sales.tenant_id)"
    walked.sql("UPDATE cin7.tenants SET redaction_from = now() + '10 days'::interval WHERE id = 1", user="shop_owner")
    walked.apply_policy(document)
    for sale, tenant in ((1, 1), (2, 2)):
        add_sale(walked, sale, tenant=tenant)
        dispatch(walked, sale)
    begin = simulated.now
    gone = {}
    for now in simulated.days(12):
        counts = run_cycle(walked)
        assert counts["overdue"] == 0
        for sale in {1, 2} - set(readable(walked)):
            gone.setdefault(sale, (now - begin).days)
    assert gone == {2: 1, 1: 10}


# "Manual Payment: INV/7 Jane Doe"

def test_names_inside_kept_text_are_taken_out(cin7):
    """The payment's number stays, the buyer's name in it does not."""
    cin7.apply_policy(preset(cin7, archive_for="10 years"))
    add_sale(cin7, 1)
    dispatch(cin7, 1)
    cin7.sql("INSERT INTO cin7.payments (sale_id, reference) VALUES (1, 'Manual Payment: INV/7 first1 LAST1'), (1, 'card')", user="shop_owner")
    run_cycle(cin7)
    assert cin7.sql("SELECT reference FROM cin7.payments ORDER BY id") == [(f"Manual Payment: INV/7 {PLACEHOLDER} {PLACEHOLDER}",), ("card",)]
    cin7.sql("SELECT amazon_pii.retrieve(%s, 'return')", [reference(1)], "pii_operator")
    assert cin7.value("SELECT reference FROM cin7.payments ORDER BY id LIMIT 1") == "Manual Payment: INV/7 first1 LAST1"
