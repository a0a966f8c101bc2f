"""What one would write by hand instead. All of them overwrite the same cells of the same rows as a cycle does."""
from shop import DUE, PII

SECRET = "an invented passphrase"

SELECT_DUE = f"CREATE TEMP TABLE due ON COMMIT DROP AS SELECT id, customer_id FROM shop.orders WHERE {DUE}; ANALYZE due"


def overwrite(table, source="FROM due AS d"):
    where, columns = PII[table]
    treated = ", ".join(f"{c} = CASE WHEN o.{c} <> '' THEN '[Redacted]' ELSE o.{c} END" for c in columns)
    return f"UPDATE shop.{table} AS o SET {treated} {source} WHERE {where}"


def document(table):
    return "jsonb_build_object(" + ", ".join(f"'{c}', o.{c}" for c in PII[table][1]) + ")"


def copy_in_clear(table):
    return (f"INSERT INTO backup.document SELECT d.id, '{table}', o.id, {document(table)} FROM due AS d "
            f"JOIN shop.{table} AS o ON {PII[table][0]}")


def copy_by_aes(table):
    # OFFSET 0: the vector that is stored must be the one that was used.
    return (f"INSERT INTO backup.sealed SELECT s.order_id, '{table}', s.id, s.iv, "
            f"encrypt_iv(convert_to(s.document::text, 'UTF8'), decode(repeat('5a', 32), 'hex'), s.iv, 'aes-cbc/pad:pkcs') "
            f"FROM (SELECT d.id AS order_id, o.id, {document(table)} AS document, gen_random_bytes(16) AS iv FROM due AS d "
            f"JOIN shop.{table} AS o ON {PII[table][0]} OFFSET 0) AS s")


BACKUP = """
CREATE SCHEMA backup;
CREATE TABLE backup.document (order_id bigint, table_name text, record_id bigint, document jsonb NOT NULL,
    PRIMARY KEY (order_id, table_name, record_id));
CREATE TABLE backup.sealed (order_id bigint, table_name text, record_id bigint, iv bytea, sealed bytea NOT NULL,
    PRIMARY KEY (order_id, table_name, record_id));
"""


def set_based(*steps):
    return "; ".join(["BEGIN", SELECT_DUE, *(step(table) for step in steps for table in PII), "COMMIT"])


def loop(orders):
    """Order by order, as procedures that grew in a shop do it."""
    body = "".join(
        f"""
        INSERT INTO backup.sealed SELECT d.id, '{table}', o.id, NULL, pgp_sym_encrypt({document(table)}::text, '{SECRET}')
          FROM shop.{table} AS o WHERE {PII[table][0]};
        {overwrite(table, "")};"""
        for table in PII
    )
    return f"""DO $$
DECLARE
    d record;
BEGIN
    FOR d IN SELECT id, customer_id FROM shop.orders WHERE {DUE} ORDER BY id LIMIT {orders} LOOP{body}
    END LOOP;
END
$$"""


BARE = set_based(overwrite)
PLAIN = set_based(copy_in_clear, overwrite)
AES = set_based(copy_by_aes, overwrite)
