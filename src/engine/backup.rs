//! Whether a dump of this database holds what is needed to open the archive.

use super::check::{Problem, Severity};
use super::rotation;
use super::vault;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{as_extension, require_role};
use crate::pg::sql;
use crate::pg::tombstones;

/// What a dump of this database would lack, as errors; what belongs to it and is elsewhere, as infos.
///
/// # Errors
/// The caller is no member of `amazon_pii_admin` or `amazon_pii_auditor`; errors of the server.
pub fn check() -> Result<Vec<Problem>> {
    require_role(&["amazon_pii_admin", "amazon_pii_auditor"], "check what a backup needs")?;
    let mut out = Vec::new();
    for schema in vault::schemas()? {
        tables(&schema, &mut out)?;
        without_keys(&schema, &mut out)?;
    }
    for key in rotation::status()? {
        let object = format!("master key {}", key.id);
        let count = key.used.data_keys + key.used.files;
        if count == 0 {
            continue;
        }
        if key.is_configured == Some(true) {
            let problem = format!("{count} data keys need it, and it is in no dump");
            let hint = "Keep the key file, or what key_command reads, apart from the dumps, and as long as the oldest of them.";
            out.push(Problem::new(Severity::Info, object, problem, hint));
        } else {
            let problem = format!("{count} data keys need it, and it is not among the configured keys");
            let hint = "Find it, add it to the key file after the current key, and call amazon_pii.rotate_key().";
            out.push(Problem::new(Severity::Error, object, problem, hint));
        }
    }
    out.push(tombstone_file());
    for archive in vault::standing()? {
        let problem = format!("the documents of policy \"{}\" are on its server", archive.policy);
        let hint = "Back that server up, too: its documents open with the data keys of this database's dump, and with nothing else.";
        out.push(Problem::new(Severity::Info, archive.foreign_table, problem, hint));
    }
    Ok(out)
}

/// What tells after a restore what was destroyed since.
fn tombstone_file() -> Problem {
    let object = "amazon_pii.tombstone_file";
    if !tombstones::is_configured() {
        let hint = "Set it to a file outside of the data directory, on storage that a restore does not turn back.";
        let problem = "is not set: after a restore nobody knows what was shredded or purged since the backup";
        return Problem::new(Severity::Info, object, problem, hint);
    }
    match tombstones::Book::open() {
        Ok(_) => {
            let hint =
                "Never restore it with the database: keep the newest one. After a restore call amazon_pii.reconcile().";
            Problem::new(
                Severity::Info,
                object,
                "tells what was destroyed since a backup, and is in no dump",
                hint,
            )
        }
        Err(e) => Problem::new(Severity::Error, object, e.shown(), e.hint_text().unwrap_or_default()),
    }
}

/// Tables that pg_dump leaves out, wholly or with their rows.
fn tables(schema: &Ident, out: &mut Vec<Problem>) -> Result<()> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT c.relname, c.relpersistence <> 'p', EXISTS (SELECT FROM pg_catalog.pg_depend d \
                WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = c.oid AND d.deptype = 'e') \
                    OR EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.classid = 'pg_catalog.pg_namespace'::pg_catalog.regclass \
                        AND d.objid = n.oid AND d.deptype = 'e') \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relname IN ('document', 'data_key', 'doomed') AND c.relkind IN ('r', 'p') ORDER BY 1",
            &[sql::Arg::Text(Some(schema.bare()))],
        )
    })?;
    for row in &rows {
        let object = format!("{}.{}", schema.bare(), row.str(0)?);
        if row.bool(1)? {
            let hint = "ALTER TABLE … SET LOGGED: a crash empties it, and a base backup or a standby has it empty.";
            out.push(Problem::new(Severity::Error, object.as_str(), "is unlogged", hint));
        }
        if row.bool(2)? {
            let hint = "ALTER EXTENSION … DROP TABLE or SCHEMA: pg_dump leaves out what an extension owns.";
            out.push(Problem::new(Severity::Error, object, "belongs to an extension", hint));
        }
    }
    Ok(())
}

/// Orders whose archive does not open with what is here, whatever a dump holds.
fn without_keys(schema: &Ident, out: &mut Vec<Problem>) -> Result<()> {
    let rows = as_extension(|| {
        sql::read(
            &format!(
                "SELECT (SELECT pg_catalog.count(DISTINCT (d.policy, d.order_key)) FROM {schema}.document d WHERE NOT EXISTS ( \
                        SELECT FROM {schema}.data_key k WHERE k.order_key = d.order_key AND k.policy = d.policy AND k.key_id = d.key_id)), \
                    (SELECT pg_catalog.count(*) FROM amazon_pii.order_state o JOIN amazon_pii.policy p ON p.policy = o.policy \
                     WHERE COALESCE(p.document::pg_catalog.json->'archive'->>'schema', 'amazon_pii_archive') = $1 AND o.archived_at IS NOT NULL \
                        AND o.purged_at IS NULL AND o.asked IS DISTINCT FROM 'forgotten' \
                        AND EXISTS (SELECT FROM pg_catalog.jsonb_array_elements(o.records::pg_catalog.jsonb) AS l (item) WHERE (l.item->>3)::int > 0) \
                        AND NOT EXISTS (SELECT FROM {schema}.data_key k WHERE k.order_key = o.order_key AND k.policy = o.policy))"
            ),
            &[sql::Arg::Text(Some(schema.bare()))],
        )
    })?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    let hint = "Restore the rows of data_key from a backup: without them these documents cannot be opened.";
    let object = format!("{}.data_key", schema.bare());
    if row.int(0)? > 0 {
        let problem = format!("the data keys of documents of {} orders are missing", row.int(0)?);
        out.push(Problem::new(Severity::Error, object.as_str(), problem, hint));
    }
    if row.int(1)? > 0 {
        let problem = format!("{} archived orders have no data key", row.int(1)?);
        out.push(Problem::new(Severity::Error, object, problem, hint));
    }
    Ok(())
}
