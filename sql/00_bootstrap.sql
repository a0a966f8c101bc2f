-- What everything else stands on.

-- Names and operators of this script are the server's own, whatever the database's schemas hold.
SET LOCAL search_path TO pg_catalog, pg_temp;

DO $$
BEGIN
    IF pg_catalog.getdatabaseencoding() OPERATOR(pg_catalog.<>) 'UTF8' THEN
        RAISE EXCEPTION 'amazon_pii needs a database with encoding UTF8'
            USING ERRCODE = 'feature_not_supported';
    END IF;
END
$$;

-- Roles are the cluster's: another database's amazon_pii may have made them.
DO $$
DECLARE
    capability pg_catalog.text;
BEGIN
    FOREACH capability IN ARRAY ARRAY['amazon_pii_admin', 'amazon_pii_operator', 'amazon_pii_auditor', 'amazon_pii_files'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) capability) THEN
            EXECUTE pg_catalog.format('CREATE ROLE %I NOLOGIN', capability);
        END IF;
    END LOOP;
END
$$;

-- Plain, without IF NOT EXISTS: a schema that somebody else prepared is refused.
CREATE SCHEMA amazon_pii;
REVOKE ALL ON SCHEMA amazon_pii FROM PUBLIC;
COMMENT ON SCHEMA amazon_pii IS 'Retention of the personal data of Amazon orders';
