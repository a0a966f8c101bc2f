-- State. No personal data in any of these tables: keys, times, counts and words of our own.
-- Every table has a primary key, so that publications FOR ALL TABLES can replicate it. Keys and names are compared byte by
-- byte: cheap, and the same under every locale.

CREATE TABLE amazon_pii.policy (
    policy          text        COLLATE "C" PRIMARY KEY,
    version         int         NOT NULL,
    document        text        NOT NULL,
    enabled         boolean     NOT NULL,
    search_path     text        NOT NULL,
    path_schemas    text,
    applied_at      timestamptz NOT NULL DEFAULT pg_catalog.now(),
    applied_by      name        NOT NULL,
    suspended       text,
    sweep_started_at timestamptz,
    sweep_after     text,
    swept_at        timestamptz,
    rechecked_at    timestamptz,
    recheck_page    bigint      NOT NULL DEFAULT 0,
    recheck_left    bigint      NOT NULL DEFAULT 0,
    cycled_at       timestamptz,
    structure       numeric,
    last_error      text,
    report_only_until timestamptz,
    export          text,
    exported_upto   timestamptz,
    export_looked_at timestamptz,
    loosened        text,
    disabled_at     timestamptz,
    disabled_reason text,
    keys_changed_at timestamptz,
    home            text,
    effective_from  timestamptz,
    postponed_since timestamptz,
    loosened_because text,
    lineage         text        NOT NULL DEFAULT pg_catalog.gen_random_uuid()::text
);
COMMENT ON TABLE amazon_pii.policy IS 'One row a policy: the document in force';
COMMENT ON COLUMN amazon_pii.policy.search_path IS 'The path under which expressions and code of the tables'' owners run';
COMMENT ON COLUMN amazon_pii.policy.path_schemas IS 'The schemas of that path when the policy was applied: JSON array of [number, name]';
COMMENT ON COLUMN amazon_pii.policy.suspended IS 'Why cycles leave this policy alone until it is applied again';
COMMENT ON COLUMN amazon_pii.policy.report_only_until IS 'Before this moment cycles only say what they would do';
COMMENT ON COLUMN amazon_pii.policy.export IS 'warn or require; NULL where the document does not say';
COMMENT ON COLUMN amazon_pii.policy.exported_upto IS 'The accounting data of orders whose clock started up to this moment is exported';
COMMENT ON COLUMN amazon_pii.policy.export_looked_at IS 'When orders that are not exported were last looked for';
COMMENT ON COLUMN amazon_pii.policy.loosened IS 'How long personal data is kept, and why, where that is more than 30 days';
COMMENT ON COLUMN amazon_pii.policy.loosened_because IS 'The reason that the document gives';
COMMENT ON COLUMN amazon_pii.policy.effective_from IS 'Before this moment orders are not touched, by the document';
COMMENT ON COLUMN amazon_pii.policy.postponed_since IS 'Since when effective_from or report_only_until have kept the policy from its work without a break; NULL: they do not';
COMMENT ON COLUMN amazon_pii.policy.disabled_reason IS 'Why it was switched off; NULL where it never was on';
COMMENT ON COLUMN amazon_pii.policy.keys_changed_at IS 'When a rotation began: cycles under way read the master keys anew';
COMMENT ON COLUMN amazon_pii.policy.home IS 'The database in which it is at work: system identifier and number; of a cluster made from a backup also where that ended or began; NULL: the one of the next cycle';
COMMENT ON COLUMN amazon_pii.policy.lineage IS 'Tells policies of one name apart in the tombstone file; copies of the database have it in common';
COMMENT ON COLUMN amazon_pii.policy.recheck_page IS 'Page of order_state from which redacted orders are looked at again';
COMMENT ON COLUMN amazon_pii.policy.recheck_left IS 'Pages that are left of today''s share';
COMMENT ON COLUMN amazon_pii.policy.structure IS 'What the last cycle saw of the catalog; while that stays, a cycle with nothing due does nothing';
COMMENT ON COLUMN amazon_pii.policy.sweep_after IS 'Key after which an unfinished sweep goes on';

CREATE TABLE amazon_pii.policy_version (
    policy          text        COLLATE "C" NOT NULL,
    version         int         NOT NULL,
    document        text        NOT NULL,
    applied_at      timestamptz NOT NULL DEFAULT pg_catalog.now(),
    applied_by      name        NOT NULL,
    PRIMARY KEY (policy, version)
);
COMMENT ON TABLE amazon_pii.policy_version IS 'Every document that was ever in force';

-- regclass, not oid: it survives dump and restore, and follows a rename.
CREATE TABLE amazon_pii.policy_table (
    policy          text        COLLATE "C" NOT NULL,
    entry           text        NOT NULL,
    relation        regclass    NOT NULL,
    owner           name        NOT NULL,
    archived_as     text        NOT NULL,
    numbered_in     oid         NOT NULL,
    whole           boolean     NOT NULL,
    PRIMARY KEY (policy, entry)
);
COMMENT ON COLUMN amazon_pii.policy_table.numbered_in IS 'The table whose columns have the numbers in policy_column; another one than relation after a dump was restored';
COMMENT ON COLUMN amazon_pii.policy_table.whole IS 'Its rows go as a whole, or it is the history: no column of it has to be classified';
COMMENT ON COLUMN amazon_pii.policy_table.archived_as IS 'The name under which the archive knows the table, whatever it is called now';
COMMENT ON TABLE amazon_pii.policy_table IS 'The tables of a policy and their owners when it was applied; entry '''' is the orders table';

CREATE TABLE amazon_pii.policy_column (
    policy          text        COLLATE "C" NOT NULL,
    table_name      text        COLLATE "C" NOT NULL,
    archived_as     text        COLLATE "C" NOT NULL,
    number          int,
    name            text        COLLATE "C" NOT NULL,
    seen_as         text        COLLATE "C" NOT NULL,
    former          text,
    named           boolean     NOT NULL,
    read            boolean     NOT NULL,
    PRIMARY KEY (policy, table_name, archived_as)
);
COMMENT ON TABLE amazon_pii.policy_column IS 'The columns of a policy''s tables that were there when it was first applied, or that it names; all others are unclassified';
COMMENT ON COLUMN amazon_pii.policy_column.table_name IS 'The name under which the archive knows the table';
COMMENT ON COLUMN amazon_pii.policy_column.archived_as IS 'The name under which the archive knows the column, whatever it is called now';
COMMENT ON COLUMN amazon_pii.policy_column.number IS 'By which a renamed column is found; NULL: it is gone';
COMMENT ON COLUMN amazon_pii.policy_column.name IS 'Its name in the document in force';
COMMENT ON COLUMN amazon_pii.policy_column.seen_as IS 'Its name when a cycle last looked, by which it is found in a restored dump';
COMMENT ON COLUMN amazon_pii.policy_column.former IS 'Earlier names: JSON array of [last version of the policy that has it, name]';
COMMENT ON COLUMN amazon_pii.policy_column.named IS 'The document needs it';
COMMENT ON COLUMN amazon_pii.policy_column.read IS 'An expression of the policy reads it, and would have to be rewritten if it were renamed';

CREATE TABLE amazon_pii.order_state (
    policy          text        COLLATE "C" NOT NULL,
    order_key       text        COLLATE "C" NOT NULL,
    order_number    text        COLLATE "C",
    status          text        NOT NULL CHECK (status IN
                        ('flagged', 'scheduled', 'archived', 'redacted', 'retrieved', 'failed', 'gone')),
    flagged_at      timestamptz NOT NULL DEFAULT pg_catalog.now(),
    flagged_by      text        NOT NULL DEFAULT 'import',
    anchor_at       timestamptz,
    stale_at        timestamptz,
    archive_due_at  timestamptz,
    archived_at     timestamptz,
    redact_due_at   timestamptz,
    redacted_at     timestamptz,
    redacted_version int,
    retrieved_at    timestamptz,
    retrieved_until timestamptz,
    held_until      timestamptz,
    held_since      timestamptz,
    hold_reason     text,
    pushed_by       text,
    attempts        int         NOT NULL DEFAULT 0,
    next_attempt_at timestamptz,
    last_error      text,
    next_due_at     timestamptz,
    records         text,
    effective_at    timestamptz,
    asked           text        CHECK (asked IN ('erase', 'forget', 'forgotten', 'revived')),
    purged_at       timestamptz,
    key_generation  bigint,
    follows         text        COLLATE "C",
    redacted_first_at timestamptz,
    archive_held_until timestamptz,
    archive_held_since timestamptz,
    archive_hold_reason text,
    -- The order's key first: it alone finds a row, whatever the server believes of the number of policies.
    PRIMARY KEY (order_key, policy)
);
COMMENT ON TABLE amazon_pii.order_state IS 'One row a flagged order';
COMMENT ON COLUMN amazon_pii.order_state.order_key IS 'JSON array of the key''s text forms';
COMMENT ON COLUMN amazon_pii.order_state.effective_at IS 'Before this moment the order is not touched; NULL: from the start';
COMMENT ON COLUMN amazon_pii.order_state.stale_at IS 'When an order without an anchor is stale; NULL where the policy does not say';
COMMENT ON COLUMN amazon_pii.order_state.next_due_at IS 'When a cycle has to look at the order again; NULL: nothing to do';
COMMENT ON COLUMN amazon_pii.order_state.records IS 'The rows of the user''s that hold, or held, its personal data: JSON array of [table, key, entry, newest archived version]';
COMMENT ON COLUMN amazon_pii.order_state.asked IS 'What was asked for: erase or forget until that is done; forgotten: what comes back is redacted without a copy; revived: what a restore brought back is, this one time';
COMMENT ON COLUMN amazon_pii.order_state.purged_at IS 'When its archive was destroyed; NULL while there may be one. Views show such an order as purged';
COMMENT ON COLUMN amazon_pii.order_state.key_generation IS 'The newest of its data keys that were destroyed: the next one is another';
COMMENT ON COLUMN amazon_pii.order_state.follows IS 'The retrieved order that it replaces: it is redacted when that retrieval ends';
COMMENT ON COLUMN amazon_pii.order_state.redacted_first_at IS 'When it was redacted for the first time, whatever came back since';
COMMENT ON COLUMN amazon_pii.order_state.hold_reason IS 'Why it is held, where that is for more than 30 days';
COMMENT ON COLUMN amazon_pii.order_state.archive_held_until IS 'Before this moment its archive is not destroyed; NULL: nobody holds it, or a cycle has seen the end of that';
COMMENT ON COLUMN amazon_pii.order_state.archive_hold_reason IS 'Why its archive is held, where that is for more than 30 days';
CREATE INDEX order_state_follows ON amazon_pii.order_state (follows, policy) WHERE follows IS NOT NULL;
-- Partial: an import of orders that are not dispatched yet does not touch it.
CREATE INDEX order_state_due ON amazon_pii.order_state (policy, next_due_at) WHERE next_due_at IS NOT NULL;
CREATE INDEX order_state_stale ON amazon_pii.order_state (policy, stale_at) WHERE status = 'flagged' AND stale_at IS NOT NULL;
-- In the order in which archives come to the end of their time, whatever the policy says that this is. Those that are held have none.
CREATE INDEX order_state_kept ON amazon_pii.order_state (policy, COALESCE(redacted_at, redact_due_at))
    WHERE status IN ('redacted', 'gone') AND purged_at IS NULL AND archive_held_until IS NULL;
CREATE INDEX order_state_archive_held ON amazon_pii.order_state (policy, archive_held_until) WHERE archive_held_until IS NOT NULL;
-- With the two above, all redacted and deleted orders: a sweep asks whether there are any.
CREATE INDEX order_state_purged ON amazon_pii.order_state (policy) WHERE status IN ('redacted', 'gone') AND purged_at IS NOT NULL;
-- By hash: numbers come in no order, and are only ever asked for one by one.
CREATE INDEX order_state_number ON amazon_pii.order_state USING hash (order_number);

CREATE TABLE amazon_pii.record_state (
    policy          text        COLLATE "C" NOT NULL,
    order_key       text        COLLATE "C" NOT NULL,
    table_name      text        COLLATE "C" NOT NULL,
    record_key      text        COLLATE "C" NOT NULL,
    status          text        NOT NULL CHECK (status IN ('archived', 'waiting', 'retrieved', 'gone', 'redacted')),
    changed_at      timestamptz NOT NULL DEFAULT pg_catalog.now(),
    witness         text,
    PRIMARY KEY (order_key, policy, table_name, record_key)
);
COMMENT ON TABLE amazon_pii.record_state IS 'Records that do not fare as their order does: waiting, retrieved, gone, come back after redaction, or redacted before it';
COMMENT ON COLUMN amazon_pii.record_state.witness IS 'The order that was last seen keeping a shared record alive';
CREATE INDEX record_state_retrieved ON amazon_pii.record_state (table_name, record_key) WHERE status = 'retrieved';
-- The newest entry of a record names the order that was last seen keeping it alive.
CREATE INDEX record_state_waiting ON amazon_pii.record_state (record_key, table_name, changed_at) WHERE status = 'waiting';
CREATE INDEX record_state_record ON amazon_pii.record_state (table_name, record_key);

CREATE TABLE amazon_pii.sweep_slice (
    policy          text        COLLATE "C" NOT NULL,
    first_after     text        COLLATE "C" NOT NULL,
    upto            text        COLLATE "C",
    stamp           bigint      NOT NULL,
    orders          bigint      NOT NULL,
    digest          numeric     NOT NULL,
    compared_at     timestamptz NOT NULL DEFAULT pg_catalog.now(),
    changed_at      timestamptz NOT NULL DEFAULT pg_catalog.now(),
    seen_at         timestamptz NOT NULL DEFAULT pg_catalog.now(),
    PRIMARY KEY (policy, first_after),
    CHECK (upto <> first_after)
);
COMMENT ON TABLE amazon_pii.sweep_slice IS 'Slices of the orders table and their sums when each of their orders was last compared with its state';
COMMENT ON COLUMN amazon_pii.sweep_slice.first_after IS 'The key after which the slice begins; empty: at the first';
COMMENT ON COLUMN amazon_pii.sweep_slice.upto IS 'The last key that belongs to it; NULL: to the end';
COMMENT ON COLUMN amazon_pii.sweep_slice.changed_at IS 'Since when the sum has been the same';
COMMENT ON COLUMN amazon_pii.sweep_slice.seen_at IS 'When that was last found so, where it has been so for weeks';
COMMENT ON COLUMN amazon_pii.sweep_slice.stamp IS 'The way in which the sum was made: others are not compared with it';

CREATE TABLE amazon_pii.touched (
    touched_id      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy          text        COLLATE "C" NOT NULL,
    entry           text        NOT NULL,
    row_key         text,
    touched_at      timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    attempts        int         NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT '-infinity',
    error           text
);
COMMENT ON TABLE amazon_pii.touched IS 'Keys that a trigger could only note: rows applied by logical replication, rows whose flagging failed';

CREATE TABLE amazon_pii.news (
    news_id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy          text        NOT NULL,
    status          text        NOT NULL,
    orders          text[],
    order_count     bigint      NOT NULL
);
COMMENT ON TABLE amazon_pii.news IS 'What triggers did to orders, one row a statement and status, until the next cycle has announced it';
COMMENT ON COLUMN amazon_pii.news.orders IS 'Keys of the first of them';

CREATE TABLE amazon_pii.renamed (
    renamed_id      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy          text        COLLATE "C" NOT NULL,
    table_name      text        COLLATE "C" NOT NULL,
    old_key         text        NOT NULL,
    new_key         text        NOT NULL,
    order_key       text
);
COMMENT ON COLUMN amazon_pii.renamed.order_key IS 'The order whose record it is; NULL where the order''s own key changed';
COMMENT ON TABLE amazon_pii.renamed IS 'Changes of keys that the archive has yet to follow';

CREATE TABLE amazon_pii.aged_table (
    policy          text        COLLATE "C" NOT NULL,
    entry           text        COLLATE "C" NOT NULL,
    next_look_at    timestamptz NOT NULL DEFAULT '-infinity',
    begun_at        timestamptz,
    passed          text,
    overdue         bigint      NOT NULL DEFAULT 0,
    PRIMARY KEY (policy, entry)
);
COMMENT ON TABLE amazon_pii.aged_table IS 'Tables of by_age: rows that no order leads to';
COMMENT ON COLUMN amazon_pii.aged_table.next_look_at IS 'When a cycle has to look for old rows again';
COMMENT ON COLUMN amazon_pii.aged_table.begun_at IS 'When a pass over all old rows last began';
COMMENT ON COLUMN amazon_pii.aged_table.passed IS 'The last row that it has looked at: JSON array of its moment and its key''s text forms';
COMMENT ON COLUMN amazon_pii.aged_table.overdue IS 'Rows that were past their age and there when a cycle last looked';

CREATE TABLE amazon_pii.aged_row (
    policy          text        COLLATE "C" NOT NULL,
    entry           text        COLLATE "C" NOT NULL,
    row_key         text        COLLATE "C" NOT NULL,
    attempts        int         NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL,
    last_error      text,
    PRIMARY KEY (policy, entry, row_key)
);
COMMENT ON TABLE amazon_pii.aged_row IS 'Rows of by_age that are set aside until they are tried again: they failed, or somebody had locked them';
COMMENT ON COLUMN amazon_pii.aged_row.last_error IS 'NULL: it was locked';

CREATE TABLE amazon_pii.file_outbox (
    file_id         bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy          text        COLLATE "C" NOT NULL,
    order_key       text        COLLATE "C" NOT NULL,
    order_number    text        COLLATE "C",
    table_name      text        COLLATE "C" NOT NULL,
    record_key      text        COLLATE "C" NOT NULL,
    path_mac        bytea       NOT NULL,
    master_key_id   text,
    wrapped         bytea,
    sealed          bytea,
    due_since       timestamptz NOT NULL DEFAULT pg_catalog.now(),
    overdue_at      timestamptz NOT NULL,
    acknowledged_at timestamptz,
    acknowledged_by name,
    CHECK ((acknowledged_at IS NULL) = (sealed IS NOT NULL AND wrapped IS NOT NULL AND master_key_id IS NOT NULL))
);
COMMENT ON TABLE amazon_pii.file_outbox IS 'Files outside of the database whose rows were redacted: somebody has to delete them';
COMMENT ON COLUMN amazon_pii.file_outbox.path_mac IS 'Tells under the master key whether a path is the same';
COMMENT ON COLUMN amazon_pii.file_outbox.sealed IS 'The path, which may hold personal data, under a key of its own; gone with the acknowledgement';
COMMENT ON COLUMN amazon_pii.file_outbox.wrapped IS 'That key, wrapped by the master key';
CREATE INDEX file_outbox_order ON amazon_pii.file_outbox (order_key, policy);
CREATE INDEX file_outbox_waiting ON amazon_pii.file_outbox (policy, file_id) WHERE acknowledged_at IS NULL;
-- For changes of keys.
CREATE INDEX file_outbox_record ON amazon_pii.file_outbox (table_name, record_key);

CREATE TABLE amazon_pii.orphan (
    orphan_id       bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy          text        COLLATE "C" NOT NULL,
    order_key       text        COLLATE "C" NOT NULL,
    order_number    text        COLLATE "C",
    link            text,
    noted_at        timestamptz NOT NULL DEFAULT pg_catalog.now(),
    next_attempt_at timestamptz NOT NULL DEFAULT '-infinity',
    table_name      text        COLLATE "C",
    record_key      text        COLLATE "C",
    apart           text        CHECK (apart IN ('due', 'done'))
);
COMMENT ON TABLE amazon_pii.orphan IS 'Customers that orders were imported with before they got the generic one, and what hangs on them';
COMMENT ON COLUMN amazon_pii.orphan.link IS 'What the order pointed at the customer with, until a cycle has found the row';
COMMENT ON COLUMN amazon_pii.orphan.apart IS 'due: the row is redacted at once; done: it was; NULL: it goes with its order';
CREATE INDEX orphan_new ON amazon_pii.orphan (policy, next_attempt_at) WHERE record_key IS NULL;
CREATE UNIQUE INDEX orphan_record ON amazon_pii.orphan (record_key, table_name, policy, order_key) WHERE record_key IS NOT NULL;
CREATE INDEX orphan_order ON amazon_pii.orphan (order_key, policy);
CREATE INDEX orphan_due ON amazon_pii.orphan (policy, next_attempt_at) WHERE apart = 'due';
-- The orders that still need a row, and those that have let go of it, however many there are of the others; the newest last.
CREATE INDEX orphan_user ON amazon_pii.orphan (record_key, table_name, policy, orphan_id)
    WHERE record_key IS NOT NULL AND apart IS DISTINCT FROM 'done';
CREATE INDEX orphan_done ON amazon_pii.orphan (record_key, table_name, policy, orphan_id) WHERE apart = 'done';

-- regclass, as in policy_table.
CREATE TABLE amazon_pii.own_row (
    relation        regclass    NOT NULL,
    row_key         text        COLLATE "C" NOT NULL,
    words           text        NOT NULL,
    written_at      timestamptz NOT NULL DEFAULT pg_catalog.now(),
    PRIMARY KEY (relation, row_key)
);
COMMENT ON TABLE amazon_pii.own_row IS 'Lines that the extension wrote into a history of the shop''s: what they say is not redacted';
COMMENT ON COLUMN amazon_pii.own_row.words IS 'JSON object of the columns and what was written there, expressions over the order left out';
CREATE TABLE amazon_pii.run (
    run_id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy          text        COLLATE "C" NOT NULL,
    started_at      timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    finished_at     timestamptz,
    started_by      name        NOT NULL,
    pid             int         NOT NULL,
    flagged         bigint      NOT NULL DEFAULT 0,
    archived        bigint      NOT NULL DEFAULT 0,
    redacted        bigint      NOT NULL DEFAULT 0,
    failed          bigint      NOT NULL DEFAULT 0,
    overdue         bigint      NOT NULL DEFAULT 0,
    note            text,
    aged            bigint      NOT NULL DEFAULT 0
);
COMMENT ON TABLE amazon_pii.run IS 'Cycles; one without finished_at was interrupted';
COMMENT ON COLUMN amazon_pii.run.aged IS 'Rows of by_age that were removed or overwritten';
COMMENT ON COLUMN amazon_pii.run.note IS 'What the cycle waits for, or did not wait for any longer';
CREATE INDEX run_policy ON amazon_pii.run (policy, run_id);

CREATE TABLE amazon_pii.cold_server (
    policy          text        COLLATE "C" PRIMARY KEY,
    up_at           timestamptz,
    down_since      timestamptz,
    last_error      text,
    was_down        boolean     NOT NULL DEFAULT false
);
COMMENT ON TABLE amazon_pii.cold_server IS 'What cycles know of the server behind a policy''s foreign archive';
COMMENT ON COLUMN amazon_pii.cold_server.up_at IS 'When a cycle last used it';
COMMENT ON COLUMN amazon_pii.cold_server.was_down IS 'Whether it was down before what the row says now';

-- No unique key over the order: two transactions of the shop's that insert returns for it must not wait for each other.
CREATE TABLE amazon_pii.retrieval_queue (
    queue_id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    policy          text        COLLATE "C" NOT NULL,
    order_key       text        COLLATE "C" NOT NULL,
    entry           text        COLLATE "C" NOT NULL,
    inserted_by     name        NOT NULL,
    actor           text,
    queued_at       timestamptz NOT NULL DEFAULT pg_catalog.now(),
    attempts        int         NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT '-infinity',
    last_error      text
);
COMMENT ON TABLE amazon_pii.retrieval_queue IS 'Redacted orders for which a return or a credit was inserted, and that come back when the cold server with their archive has answered';
COMMENT ON COLUMN amazon_pii.retrieval_queue.entry IS 'The entry with retrieve_on_insert';
COMMENT ON COLUMN amazon_pii.retrieval_queue.inserted_by IS 'The role that inserted the row, and might have the order retrieved';
COMMENT ON COLUMN amazon_pii.retrieval_queue.actor IS 'The application''s own user at that time';
COMMENT ON COLUMN amazon_pii.retrieval_queue.next_attempt_at IS 'After an error of the order''s own; a server that does not answer is asked by each cycle';
CREATE INDEX retrieval_queue_order ON amazon_pii.retrieval_queue (order_key, policy);
CREATE INDEX retrieval_queue_due ON amazon_pii.retrieval_queue (policy, next_attempt_at);

CREATE TABLE amazon_pii.heartbeat (
    worker          text        PRIMARY KEY,
    pid             int         NOT NULL,
    beat_at         timestamptz NOT NULL,
    last_error      text
);
COMMENT ON TABLE amazon_pii.heartbeat IS 'When the background worker was last seen in this database';

CREATE TABLE amazon_pii.audit_entry (
    audit_id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at              timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
    "user"          name        NOT NULL,
    actor           text,
    action          text        NOT NULL,
    policy          text,
    policy_version  int,
    order_key       text,
    order_number    text        COLLATE "C",
    reason          text,
    detail          text,
    key_id          text,
    mac             bytea,
    lines           text,
    links_before    bigint
);
COMMENT ON TABLE amazon_pii.audit_entry IS 'Who did what to which order, under which policy version, why and when; append-only';
COMMENT ON COLUMN amazon_pii.audit_entry.links_before IS 'Links that its chain had when it was written; its own link comes later';
COMMENT ON COLUMN amazon_pii.audit_entry.lines IS 'Where one entry speaks of a batch: JSON array of [order key, order number, detail]';
CREATE INDEX audit_entry_order ON amazon_pii.audit_entry (policy, order_key);

-- The chains of the audit log, one a policy. Beside the entries, so that whoever writes one waits for nobody: a sealer links them
-- when they are committed. A chain is named by its policy, and by '' where its entries have none.
CREATE TABLE amazon_pii.audit_pending (
    chain           text        COLLATE "C" NOT NULL,
    audit_id        bigint      NOT NULL,
    PRIMARY KEY (chain, audit_id)
);
COMMENT ON TABLE amazon_pii.audit_pending IS 'Entries of the audit log that are not linked into their chain yet';

CREATE TABLE amazon_pii.audit_link (
    chain           text        COLLATE "C" NOT NULL,
    position        bigint      NOT NULL,
    audit_id        bigint      NOT NULL UNIQUE,
    key_id          text        NOT NULL,
    code            bytea       NOT NULL,
    PRIMARY KEY (chain, position)
);
COMMENT ON TABLE amazon_pii.audit_link IS 'The order of the entries of a chain; append-only but for what audit_for ends';
COMMENT ON COLUMN amazon_pii.audit_link.code IS 'Under the master key, over the place, the whole entry and the code of the link before it';

CREATE TABLE amazon_pii.audit_chain (
    chain           text        COLLATE "C" PRIMARY KEY,
    position        bigint      NOT NULL,
    code            bytea       NOT NULL,
    sealed_at       timestamptz NOT NULL,
    key_id          text        NOT NULL,
    mac             bytea       NOT NULL,
    next_trim_at    timestamptz NOT NULL DEFAULT pg_catalog.now() + '1 day'::interval
);
COMMENT ON TABLE amazon_pii.audit_chain IS 'The head of each chain: place and code of its last link, under a code of its own';
COMMENT ON COLUMN amazon_pii.audit_chain.next_trim_at IS 'When entries that are past audit_for are looked for again';

CREATE TABLE amazon_pii.audit_checkpoint (
    chain           text        COLLATE "C" PRIMARY KEY,
    position        bigint      NOT NULL,
    code            bytea       NOT NULL,
    entries         bigint      NOT NULL,
    last_at         timestamptz,
    made_at         timestamptz NOT NULL,
    key_id          text        NOT NULL,
    mac             bytea       NOT NULL
);
COMMENT ON TABLE amazon_pii.audit_checkpoint IS 'What stands for the beginning of a chain that audit_for has ended';
COMMENT ON COLUMN amazon_pii.audit_checkpoint.position IS 'The last link that was removed';
COMMENT ON COLUMN amazon_pii.audit_checkpoint.entries IS 'How many were removed, all in all';
COMMENT ON COLUMN amazon_pii.audit_checkpoint.last_at IS 'When the newest of them was written';
CREATE TABLE amazon_pii.access_count (
    policy          text        COLLATE "C" NOT NULL,
    day             date        NOT NULL,
    counted_by      text        COLLATE "C" NOT NULL CHECK (counted_by IN ('actor', 'user', 'user_in_all')),
    name            text        COLLATE "C" NOT NULL,
    orders          bigint      NOT NULL DEFAULT 0,
    automatic       bigint      NOT NULL DEFAULT 0,
    refused         bigint      NOT NULL DEFAULT 0,
    PRIMARY KEY (policy, day, counted_by, name)
);
COMMENT ON TABLE amazon_pii.access_count IS 'How many orders somebody has had opened in a day: what quotas and alarms go by';
COMMENT ON COLUMN amazon_pii.access_count.day IS 'In the policy''s time zone';
COMMENT ON COLUMN amazon_pii.access_count.counted_by IS 'actor: whom the application named; user: a database user, where it named nobody; user_in_all: a database user, whomever it named';
COMMENT ON COLUMN amazon_pii.access_count.name IS 'The actor or user; where that is very long, its SHA-256';
COMMENT ON COLUMN amazon_pii.access_count.automatic IS 'Orders that came back with a return or a credit: no quota stops these';
COMMENT ON COLUMN amazon_pii.access_count.refused IS 'Calls over the quota';

CREATE TABLE amazon_pii.canary (
    policy          text        COLLATE "C" NOT NULL,
    order_number    text        COLLATE "C" NOT NULL,
    set_at          timestamptz NOT NULL DEFAULT pg_catalog.now(),
    set_by          name        NOT NULL,
    PRIMARY KEY (policy, order_number)
);
COMMENT ON TABLE amazon_pii.canary IS 'Orders that nobody has a reason to open: whoever does raises the alarm';

CREATE TABLE amazon_pii.tombstone_mark (
    one             boolean     PRIMARY KEY DEFAULT true CHECK (one),
    position        bigint      NOT NULL,
    code            text        COLLATE "C" NOT NULL,
    noted_at        timestamptz NOT NULL DEFAULT pg_catalog.now()
);
COMMENT ON TABLE amazon_pii.tombstone_mark IS 'How much of the tombstone file this database knows: what it says beyond is new, or was destroyed after the backup that was restored';
COMMENT ON COLUMN amazon_pii.tombstone_mark.position IS 'In bytes from its beginning';
COMMENT ON COLUMN amazon_pii.tombstone_mark.code IS 'Of the last line before: whether it is the same file';

-- Survive a dump: everything but the triggers' notes of the moment and the sweep's sums, which are made anew. Call by call, since each updates one row.
DO $$
DECLARE
    kept text;
BEGIN
    FOREACH kept IN ARRAY ARRAY['policy', 'policy_version', 'policy_table', 'policy_column', 'order_state', 'record_state', 'renamed', 'aged_table', 'aged_row',
            'file_outbox', 'own_row', 'orphan', 'run', 'audit_entry', 'audit_pending', 'audit_link', 'audit_chain', 'audit_checkpoint',
            'access_count', 'canary', 'tombstone_mark', 'retrieval_queue'] LOOP
        PERFORM pg_extension_config_dump(('amazon_pii.' || kept)::regclass, '');
    END LOOP;
    PERFORM pg_extension_config_dump(pg_get_serial_sequence('amazon_pii.renamed', 'renamed_id')::regclass, '');
    PERFORM pg_extension_config_dump(pg_get_serial_sequence('amazon_pii.file_outbox', 'file_id')::regclass, '');
    PERFORM pg_extension_config_dump(pg_get_serial_sequence('amazon_pii.orphan', 'orphan_id')::regclass, '');
    PERFORM pg_extension_config_dump(pg_get_serial_sequence('amazon_pii.run', 'run_id')::regclass, '');
    PERFORM pg_extension_config_dump(pg_get_serial_sequence('amazon_pii.retrieval_queue', 'queue_id')::regclass, '');
    PERFORM pg_extension_config_dump(pg_get_serial_sequence('amazon_pii.audit_entry', 'audit_id')::regclass, '');
END
$$;
