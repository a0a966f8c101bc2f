-- The SQL surface. Functions check the caller in Rust before they switch; PUBLIC may execute none of them.

CREATE FUNCTION amazon_pii.apply_policy(document jsonb) RETURNS text
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'apply_policy_wrapper';
COMMENT ON FUNCTION amazon_pii.apply_policy(jsonb) IS
    'Checks a policy document and applies it as a new policy or a new version; returns name and version. Needs amazon_pii_admin and ownership of every table in it';

CREATE FUNCTION amazon_pii.check_policy(document jsonb)
    RETURNS TABLE (severity text, object text, problem text, hint text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'check_policy_wrapper';
COMMENT ON FUNCTION amazon_pii.check_policy(jsonb) IS
    'Lists what is wrong with a policy document, trying it on real rows; applies nothing. Needs amazon_pii_admin and ownership of every table in it';

CREATE FUNCTION amazon_pii.preset(name text) RETURNS jsonb
    LANGUAGE c STABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'preset_wrapper';
COMMENT ON FUNCTION amazon_pii.preset(text) IS
    'A policy document to start one''s own from: cin7 (order system with a CRM; redacts for good) or pixi (shops, address books, histories; archives). 22023 for any other name. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.enable_policy(policy text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'enable_policy_wrapper';
COMMENT ON FUNCTION amazon_pii.enable_policy(text) IS 'Lets cycles archive and redact under a policy. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.disable_policy(policy text, reason text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'disable_policy_with_reason_wrapper';
COMMENT ON FUNCTION amazon_pii.disable_policy(text, text) IS
    'Stops cycles under a policy; orders are still flagged, and shown as overdue. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.drop_policy(policy text, reason text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'drop_policy_for_wrapper';
COMMENT ON FUNCTION amazon_pii.drop_policy(text, text) IS
    'Removes a policy, its triggers and the states of its orders; archive, keys and audit log stay. While it has something to redact, or a hold, a reason is required (22023). Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.mark_exported(policy text, upto timestamptz, back boolean DEFAULT false) RETURNS bigint
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'mark_exported_wrapper';
COMMENT ON FUNCTION amazon_pii.mark_exported(text, timestamptz, boolean) IS
    'Notes that the accounting data of orders whose anchor is not after this moment is exported; returns how many orders that adds. An earlier moment than the last needs back => true. Needs amazon_pii_admin';

CREATE PROCEDURE amazon_pii.run_cycle(
    policy text DEFAULT NULL, sweep boolean DEFAULT false,
    INOUT flagged bigint DEFAULT 0, INOUT archived bigint DEFAULT 0, INOUT redacted bigint DEFAULT 0,
    INOUT failed bigint DEFAULT 0, INOUT overdue bigint DEFAULT 0)
    LANGUAGE c AS 'MODULE_PATHNAME', 'run_cycle_wrapper';
COMMENT ON PROCEDURE amazon_pii.run_cycle(text, boolean, bigint, bigint, bigint, bigint, bigint) IS
    'One cycle now, of one policy or of all, committing batch by batch; sweep => true also looks at every order. Not inside a transaction block (25001). Needs amazon_pii_admin';

CREATE PROCEDURE amazon_pii.sanitize_copy(policy text,
    INOUT flagged bigint DEFAULT 0, INOUT archived bigint DEFAULT 0, INOUT redacted bigint DEFAULT 0,
    INOUT failed bigint DEFAULT 0, INOUT overdue bigint DEFAULT 0)
    LANGUAGE c AS 'MODULE_PATHNAME', 'sanitize_copy_wrapper';
COMMENT ON PROCEDURE amazon_pii.sanitize_copy(text, bigint, bigint, bigint, bigint, bigint) IS
    'In a copy of the database in which the policy was applied: redacts every order that it finds, at once and without a copy, and destroys what came along of the archive, committing batch by batch. Refused where the policy is at work (55000), and inside a transaction block (25001). Needs amazon_pii_admin';

CREATE PROCEDURE amazon_pii.rotate_key(INOUT rewrapped bigint DEFAULT 0, INOUT remaining bigint DEFAULT 0)
    LANGUAGE c AS 'MODULE_PATHNAME', 'rotate_key_wrapper';
COMMENT ON PROCEDURE amazon_pii.rotate_key(bigint, bigint) IS
    'Wraps all data keys by the current master key, the first that is configured, committing batch by batch; documents stay as they are. remaining: those that are still wrapped by another key. Not inside a transaction block (25001). Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.key_status()
    RETURNS TABLE (master_key_id text, current boolean, configured boolean, data_keys bigint, files bigint, audit_entries bigint, may_retire boolean)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'key_status_wrapper';
COMMENT ON FUNCTION amazon_pii.key_status() IS
    'The master keys by their ids, and what depends on each; NULL where the configured keys cannot be read. Needs amazon_pii_admin or amazon_pii_auditor';
CREATE VIEW amazon_pii.key_status WITH (security_barrier) AS SELECT * FROM amazon_pii.key_status();
COMMENT ON VIEW amazon_pii.key_status IS
    'The master keys by their ids: whether configured, how many data keys and keys of files each wraps, how many audit entries it signed; may_retire: nothing needs it to be opened';

CREATE FUNCTION amazon_pii.adopt_copy(policy text DEFAULT NULL) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'adopt_copy_wrapper';
COMMENT ON FUNCTION amazon_pii.adopt_copy(text) IS
    'Says that this database, a copy of the one in which policies were applied, takes its place: the worker''s cycles, and those that write to a cold server, are refused before. Never while the original is at work. Returns how many policies were adopted; NULL: all. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.reconcile(policy text DEFAULT NULL)
    RETURNS TABLE (policy_name text, order_key text, order_number text, destroyed text, destroyed_at timestamptz, came_back text)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'reconcile_wrapper';
COMMENT ON FUNCTION amazon_pii.reconcile(text) IS
    'After a restore: destroys again what the tombstone file says was shredded, purged or forgotten since the backup, and has the next cycle redact personal data that came back with it, without a copy. Until then archives of the policy are not opened (55000). One row an order that came back; NULL: all policies. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.archive_ddl(foreign_table text DEFAULT 'cold.document', server text DEFAULT 'cold', host text DEFAULT 'cold.example.com',
        database text DEFAULT 'archive', role text DEFAULT 'amazon_pii_archiver')
    RETURNS TABLE (run_on text, statement text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'archive_ddl_wrapper';
COMMENT ON FUNCTION amazon_pii.archive_ddl(text, text, text, text, text) IS
    'The statements that make a foreign archive with postgres_fdw: those to run on the cold server, then those to run here as a superuser or the extension''s owner; passwords are left open. Runs nothing. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.check_archive(foreign_table text)
    RETURNS TABLE (severity text, object text, problem text, hint text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'check_archive_wrapper';
COMMENT ON FUNCTION amazon_pii.check_archive(text) IS
    'What keeps a foreign table from holding an archive: its columns, owners, user mapping and options, and a document that is written, read back and rolled back on its server. No row: nothing. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.backup_check()
    RETURNS TABLE (severity text, object text, problem text, hint text)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'backup_check_wrapper';
COMMENT ON FUNCTION amazon_pii.backup_check() IS
    'Whether a dump of this database holds what is needed to open the archive: error: something is missing, or a dump leaves it out; info: what belongs to a backup and is elsewhere. Reads all states. Needs amazon_pii_admin or amazon_pii_auditor';

CREATE FUNCTION amazon_pii.archive_status()
    RETURNS TABLE (policy text, foreign_table text, deadline text, unsent bigint, unsent_since timestamptz, to_delete bigint,
        up_at timestamptz, down_since timestamptz, last_error text, to_retrieve bigint, to_retrieve_since timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'archive_status_wrapper';
COMMENT ON FUNCTION amazon_pii.archive_status() IS
    'How the foreign archives stand, one row a policy that has one. Needs amazon_pii_admin or amazon_pii_auditor';
CREATE VIEW amazon_pii.archive_status WITH (security_barrier) AS SELECT * FROM amazon_pii.archive_status();
COMMENT ON VIEW amazon_pii.archive_status IS
    'Foreign archives: documents that are here and not known to be there, and since when; orders and records still to be deleted there; when a cycle used the server last, since when it does not answer and why; orders that are to come back by themselves, and since when';

CREATE FUNCTION amazon_pii.take_turn(policy text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'take_turn_wrapper';
COMMENT ON FUNCTION amazon_pii.take_turn(text) IS
    'Keeps cycles of a policy waiting until the transaction ends, for maintenance of its tables. Granted to nobody';

CREATE FUNCTION amazon_pii.preview(policy text, as_of timestamptz DEFAULT pg_catalog.now())
    RETURNS TABLE (action text, table_name text, orders bigint, records bigint)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'preview_wrapper';
COMMENT ON FUNCTION amazon_pii.preview(text, timestamptz) IS
    'What a cycle at that moment would do, from the tables as they are; changes nothing. Needs amazon_pii_admin, amazon_pii_operator or amazon_pii_auditor';

CREATE FUNCTION amazon_pii.retrieve(order_number text, reason text DEFAULT NULL, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS TABLE (order_key text, table_name text, records bigint, cells bigint, kept bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'retrieve_wrapper';
COMMENT ON FUNCTION amazon_pii.retrieve(text, text, text, text) IS
    'Writes the archived personal data of a redacted order back, read-only, for the policy''s retrieved_for; kept counts cells that no longer held what redaction left. Logged before anything is opened, even if rolled back. Needs amazon_pii_operator. P0002 unknown, P0003 ambiguous, 55000 not redacted, 55006 already retrieved, 42704 purged, 22023 bad reason or no actor, 53400 over the quota, 08006 archive unreachable';

CREATE FUNCTION amazon_pii.end_retrieval(order_number text, policy text DEFAULT NULL, key text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'end_retrieval_wrapper';
COMMENT ON FUNCTION amazon_pii.end_retrieval(text, text, text) IS
    'Ends a retrieval early; the next cycle redacts the order again. Needs amazon_pii_operator';

CREATE FUNCTION amazon_pii.peek(order_number text, reason text DEFAULT NULL, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS jsonb LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'peek_wrapper';
COMMENT ON FUNCTION amazon_pii.peek(text, text, text, text) IS
    'Gives the archived personal data of an order to the caller alone, without writing it back. Logged and counted before anything is opened, even if rolled back. Needs amazon_pii_operator. 53400 over the quota';

CREATE FUNCTION amazon_pii.set_canary(order_number text, canary boolean DEFAULT true, policy text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'set_canary_wrapper';
COMMENT ON FUNCTION amazon_pii.set_canary(text, boolean, text) IS
    'Makes an order a canary, which raises the alarm when somebody opens it, or an ordinary order again. Needs amazon_pii_admin. P0002 unknown or no canary, P0003 ambiguous';

CREATE FUNCTION amazon_pii.find_orders(search text)
    RETURNS TABLE (policy text, order_key text, order_number text, status text, matched_by text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'find_orders_wrapper';
COMMENT ON FUNCTION amazon_pii.find_orders(text) IS
    'Flagged orders by their number, or by the number of a linked record such as an invoice. Needs amazon_pii_operator or amazon_pii_admin';

CREATE FUNCTION amazon_pii.hold(order_number text, reason text, until timestamptz, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS void LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'hold_wrapper';
COMMENT ON FUNCTION amazon_pii.hold(text, text, timestamptz, text, text) IS
    'Pauses the redaction of an order until a moment in the future; archiving goes on. The archive of an order that is redacted, or was deleted, is kept until then. More than 30 days need a reason. Needs amazon_pii_operator';

CREATE FUNCTION amazon_pii.release(order_number text, policy text DEFAULT NULL, key text DEFAULT NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'release_wrapper';
COMMENT ON FUNCTION amazon_pii.release(text, text, text) IS 'Ends a hold of an order or of its archive. Needs amazon_pii_operator';

CREATE FUNCTION amazon_pii.unflag(order_number text, reason text DEFAULT NULL, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS TABLE (order_key text, table_name text, records bigint, cells bigint, kept bigint)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'unflag_wrapper';
COMMENT ON FUNCTION amazon_pii.unflag(text, text, text, text) IS
    'Writes an order''s personal data back for good and stops tracking it, for the victims of a wrong policy; the archive stays. Needs amazon_pii_admin';

CREATE FUNCTION amazon_pii.erase(order_number text, reason text DEFAULT NULL, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS void LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'erase_wrapper';
COMMENT ON FUNCTION amazon_pii.erase(text, text, text, text) IS
    'Makes an order due at once: the next cycle archives and redacts it, whatever its clock says. Needs amazon_pii_admin. 55000 held or deleted';

CREATE FUNCTION amazon_pii.shred(order_number text, reason text DEFAULT NULL, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS void LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'shred_wrapper';
COMMENT ON FUNCTION amazon_pii.shred(text, text, text, text) IS
    'Destroys the data keys and the archived documents of a redacted order: nothing brings its personal data back. Needs amazon_pii_admin. 55000 not redacted or held, 42704 already destroyed';

CREATE FUNCTION amazon_pii.forget(order_number text, reason text DEFAULT NULL, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS void LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'forget_wrapper';
COMMENT ON FUNCTION amazon_pii.forget(text, text, text, text) IS
    'Both: the next cycle redacts the order and destroys its archive in the same transaction; what an import brings back later is redacted without being archived. Needs amazon_pii_admin. 55000 held';

CREATE FUNCTION amazon_pii.certificate(order_number text, policy text DEFAULT NULL, key text DEFAULT NULL)
    RETURNS jsonb LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'certificate_wrapper';
COMMENT ON FUNCTION amazon_pii.certificate(text, text, text) IS
    'What was done to an order, when, why, by whom, to how many records, with a digest of its audit entries; no personal data. 55000 until it is done. Needs amazon_pii_admin or amazon_pii_auditor';

CREATE FUNCTION amazon_pii.explain_order(order_number text)
    RETURNS TABLE (step text, object text, detail text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'explain_order_wrapper';
COMMENT ON FUNCTION amazon_pii.explain_order(text) IS
    'Why an order was flagged, its anchor, what is due when, what keeps each record alive; no values. Needs amazon_pii_admin, amazon_pii_operator or amazon_pii_auditor';

CREATE FUNCTION amazon_pii.verify(policy text, scope text DEFAULT 'linked')
    RETURNS TABLE (table_name text, column_name text, problem text, orders bigint)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'verify_wrapper';
COMMENT ON FUNCTION amazon_pii.verify(text, text) IS
    'Looks for archived values of redacted orders in the tables of the policy (linked), of their schemas (schema) or of the database: counts by column, never a value; and what it could not search. Logged like an access. Needs amazon_pii_admin or amazon_pii_auditor';

CREATE FUNCTION amazon_pii.verify_audit_log(policy text DEFAULT NULL, head_position bigint DEFAULT NULL, head_code text DEFAULT NULL)
    RETURNS TABLE (chain text, severity text, finding text, link_position bigint, audit_id bigint, entries bigint,
                   first_at timestamptz, last_at timestamptz, code text)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'verify_audit_log_wrapper';
COMMENT ON FUNCTION amazon_pii.verify_audit_log(text, bigint, text) IS
    'Checks the chain of a policy''s audit log, or all of them: a line a chain with its head, and a line for each entry that was changed, removed, moved or made up. An earlier head, kept elsewhere, shows whether the chain was cut off and grew again. The chain of entries without a policy is ''''. Needs amazon_pii_admin or amazon_pii_auditor';

CREATE FUNCTION amazon_pii.evidence(policy text, "from" timestamptz DEFAULT NULL, "to" timestamptz DEFAULT NULL) RETURNS jsonb
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'evidence_wrapper';
COMMENT ON FUNCTION amazon_pii.evidence(text, timestamptz, timestamptz) IS
    'For an assessor: orders by state and by days until archived and redacted, what is overdue and why, what is kept longer, retrievals by user and reason, keys, versions of the policy, results of verify and verify_audit_log; from a moment until before another. No personal data; changes nothing. Needs amazon_pii_admin or amazon_pii_auditor';

CREATE FUNCTION amazon_pii.files_due(policy text DEFAULT NULL, max bigint DEFAULT 100)
    RETURNS TABLE (file_id bigint, policy_name text, order_key text, table_name text, record_key text, path text, due_since timestamptz)
    LANGUAGE c VOLATILE PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'files_due_wrapper';
COMMENT ON FUNCTION amazon_pii.files_due(text, bigint) IS
    'Files outside of the database that are to be deleted, because their rows were redacted: the oldest first. Logged before a path is opened. Needs amazon_pii_files or amazon_pii_operator';

CREATE FUNCTION amazon_pii.ack_file(file_id bigint) RETURNS boolean
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'ack_file_wrapper';
COMMENT ON FUNCTION amazon_pii.ack_file(bigint) IS
    'Says that a file was deleted; false: that was said before. Its order is clean when all of its files are. Needs amazon_pii_files or amazon_pii_operator. 42704 unknown';

CREATE FUNCTION amazon_pii.find_duplicates(policy text)
    RETURNS TABLE (duplicate bigint, customer_key text)
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'find_duplicates_wrapper';
COMMENT ON FUNCTION amazon_pii.find_duplicates(text) IS
    'Customers that are the same by the policy''s duplicate_by, in groups: keys, never a value; those whose orders are archived, redacted or retrieved are left out. Needs amazon_pii_admin or amazon_pii_operator';

CREATE FUNCTION amazon_pii.assert_mergeable(policy text, key_a text, key_b text) RETURNS void
    LANGUAGE c VOLATILE STRICT PARALLEL UNSAFE AS 'MODULE_PATHNAME', 'assert_mergeable_wrapper';
COMMENT ON FUNCTION amazon_pii.assert_mergeable(text, text, text) IS
    'Fails (55000) unless the personal data of both customers is where it was: nothing of it archived, redacted or retrieved. Needs amazon_pii_admin or amazon_pii_operator';
-- Triggers of ours on the user's tables. Nobody needs EXECUTE to fire one; creating one does.
CREATE FUNCTION amazon_pii.on_change() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'on_change_wrapper';
COMMENT ON FUNCTION amazon_pii.on_change() IS 'Flags orders and notices changes; made and dropped by the extension';

CREATE FUNCTION amazon_pii.on_apply() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'on_apply_wrapper';
COMMENT ON FUNCTION amazon_pii.on_apply() IS 'Notes the keys of rows that logical replication applies; made and dropped by the extension';

CREATE FUNCTION amazon_pii.on_assign() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'on_assign_wrapper';
COMMENT ON FUNCTION amazon_pii.on_assign() IS 'Gives Amazon orders the generic customer; made and dropped by the extension';

CREATE FUNCTION amazon_pii.on_ignore() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'on_ignore_wrapper';
COMMENT ON FUNCTION amazon_pii.on_ignore() IS 'Keeps the personal data of retrieved rows as it is; made and dropped by the extension';

CREATE FUNCTION amazon_pii.on_reimport() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'on_reimport_wrapper';
COMMENT ON FUNCTION amazon_pii.on_reimport() IS 'Keeps redacted cells as they are when they are written again; made and dropped by the extension';

CREATE FUNCTION amazon_pii.refuse_change() RETURNS trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'refuse_change_wrapper';
COMMENT ON FUNCTION amazon_pii.refuse_change() IS 'Keeps the audit log append-only, for superusers too';
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON amazon_pii.audit_entry
    FOR EACH STATEMENT EXECUTE FUNCTION amazon_pii.refuse_change();
ALTER TABLE amazon_pii.audit_entry ENABLE ALWAYS TRIGGER append_only;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON amazon_pii.audit_link
    FOR EACH STATEMENT EXECUTE FUNCTION amazon_pii.refuse_change();
ALTER TABLE amazon_pii.audit_link ENABLE ALWAYS TRIGGER append_only;

-- New partitions get their triggers with the command that makes or attaches them.
CREATE FUNCTION amazon_pii.on_ddl() RETURNS event_trigger
    LANGUAGE c AS 'MODULE_PATHNAME', 'on_ddl_wrapper';
COMMENT ON FUNCTION amazon_pii.on_ddl() IS 'Gives new partitions of a policy''s tables their triggers';
CREATE EVENT TRIGGER amazon_pii_ddl ON ddl_command_end WHEN TAG IN ('CREATE TABLE', 'ALTER TABLE')
    EXECUTE FUNCTION amazon_pii.on_ddl();
