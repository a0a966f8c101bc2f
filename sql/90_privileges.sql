-- Revoke first, grant by name. Tables are nobody's but the extension's owner; people read views.

REVOKE ALL ON ALL TABLES IN SCHEMA amazon_pii FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA amazon_pii FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA amazon_pii FROM PUBLIC;

GRANT USAGE ON SCHEMA amazon_pii TO amazon_pii_admin, amazon_pii_operator, amazon_pii_auditor, amazon_pii_files;

GRANT EXECUTE ON FUNCTION amazon_pii.apply_policy(jsonb), amazon_pii.check_policy(jsonb), amazon_pii.preset(text), amazon_pii.enable_policy(text),
    amazon_pii.disable_policy(text, text), amazon_pii.drop_policy(text, text), amazon_pii.unflag(text, text, text, text),
    amazon_pii.mark_exported(text, timestamptz, boolean), amazon_pii.set_canary(text, boolean, text),
    amazon_pii.erase(text, text, text, text), amazon_pii.shred(text, text, text, text), amazon_pii.forget(text, text, text, text)
    TO amazon_pii_admin;
GRANT EXECUTE ON PROCEDURE amazon_pii.run_cycle(text, boolean, bigint, bigint, bigint, bigint, bigint) TO amazon_pii_admin;
GRANT EXECUTE ON FUNCTION amazon_pii.retrieve(text, text, text, text), amazon_pii.end_retrieval(text, text, text),
    amazon_pii.peek(text, text, text, text), amazon_pii.hold(text, text, timestamptz, text, text),
    amazon_pii.release(text, text, text)
    TO amazon_pii_operator;
GRANT EXECUTE ON FUNCTION amazon_pii.files_due(text, bigint), amazon_pii.ack_file(bigint) TO amazon_pii_operator, amazon_pii_files;
GRANT EXECUTE ON FUNCTION amazon_pii.find_orders(text), amazon_pii.find_duplicates(text),
    amazon_pii.assert_mergeable(text, text, text) TO amazon_pii_admin, amazon_pii_operator;
GRANT EXECUTE ON FUNCTION amazon_pii.verify(text, text), amazon_pii.certificate(text, text, text),
    amazon_pii.verify_audit_log(text, bigint, text), amazon_pii.evidence(text, timestamptz, timestamptz) TO amazon_pii_admin, amazon_pii_auditor;
GRANT EXECUTE ON FUNCTION amazon_pii.preview(text, timestamptz), amazon_pii.explain_order(text)
    TO amazon_pii_admin, amazon_pii_operator, amazon_pii_auditor;

GRANT EXECUTE ON FUNCTION amazon_pii.adopt_copy(text), amazon_pii.reconcile(text), amazon_pii.archive_ddl(text, text, text, text, text), amazon_pii.check_archive(text) TO amazon_pii_admin;
GRANT EXECUTE ON FUNCTION amazon_pii.archive_status(), amazon_pii.backup_check() TO amazon_pii_admin, amazon_pii_auditor;
GRANT SELECT ON amazon_pii.archive_status TO amazon_pii_admin, amazon_pii_auditor;
GRANT EXECUTE ON PROCEDURE amazon_pii.rotate_key(bigint, bigint), amazon_pii.sanitize_copy(text, bigint, bigint, bigint, bigint, bigint) TO amazon_pii_admin;
GRANT EXECUTE ON FUNCTION amazon_pii.key_status() TO amazon_pii_admin, amazon_pii_auditor;
GRANT SELECT ON amazon_pii.key_status TO amazon_pii_admin, amazon_pii_auditor;

GRANT SELECT ON amazon_pii.policies TO amazon_pii_admin, amazon_pii_auditor;
GRANT SELECT ON amazon_pii.status, amazon_pii.kept_longer, amazon_pii.unclassified, amazon_pii.runs, amazon_pii.by_age, amazon_pii.files
    TO amazon_pii_admin, amazon_pii_operator, amazon_pii_auditor;
GRANT SELECT ON amazon_pii.orders, amazon_pii.records, amazon_pii.overdue, amazon_pii.upcoming
    TO amazon_pii_admin, amazon_pii_operator;
-- Of which operators see their own entries.
GRANT SELECT ON amazon_pii.audit_log TO amazon_pii_admin, amazon_pii_operator, amazon_pii_auditor;
GRANT SELECT ON amazon_pii.canaries TO amazon_pii_admin, amazon_pii_auditor;
