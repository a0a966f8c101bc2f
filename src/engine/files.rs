//! Files outside of the database. With the redaction of a row an entry goes to an outbox, in the same transaction; whoever
//! deletes files takes it from there and acknowledges it. Until then the order is not clean. A path may hold personal data:
//! it lies in the outbox sealed, under a key of its own, and leaves it with the acknowledgement.

use std::collections::{HashMap, HashSet};

use pgrx::datum::TimestampWithTimeZone;
use zeroize::Zeroizing;

use super::audit::{self, AuditEntry, Line};
use super::due::Due;
use super::gather::LiveRecord;
use super::plan::{Plan, Table};
use super::records::{Fate, Stored};
use super::redact::Target;
use super::state;
use super::vault::wrapped_anew;
use super::walk::{FIRST, Values, by_key};
use crate::domain::vault::{Binding, DataKey, KeyBinding, MasterKeys, VaultError};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys, require_role, session_user};
use crate::pg::sql::{self, Arg, Row};
use crate::pg::{keys, xact};
use crate::worker::evidence;

/// A file that goes with a row of a batch.
pub struct File<'a> {
    order: usize,
    table: &'a str,
    record_key: &'a str,
    path: Zeroizing<String>,
    /// The row had been done with, and came back.
    back: bool,
}

/// Where the files of rows lie, by their keys; nothing for a row without one.
///
/// # Errors
/// Errors of the server or of the owner's expression.
pub fn paths(plan: &Plan, table: &Table, keys: &[&Values]) -> Result<Vec<Option<Zeroizing<String>>>> {
    let mut out: Vec<_> = keys.iter().map(|_| None).collect();
    let Some(files) = &table.files else { return Ok(out) };
    let marks = std::iter::once(&plan.document.placeholder).chain(&plan.document.also_redacted);
    let marks: Vec<&str> = marks.map(String::as_str).collect();
    let keys: Vec<Values> = keys.iter().map(|k| (*k).clone()).collect();
    for found in by_key(plan, table, &keys, &[files.to_string()])? {
        let path = found.row.text(FIRST)?.filter(|p| !p.is_empty() && !marks.contains(p));
        out[found.input] = path.map(|p| Zeroizing::new(p.to_owned()));
    }
    Ok(out)
}

/// The files of the rows that are about to be overwritten or removed, and locked; and, when an order is redacted for the
/// first time, of its rows that hold nothing else.
///
/// # Errors
/// As [`paths`].
pub(super) fn found<'a>(
    plan: &'a Plan,
    batch: &[Due],
    stored: &Stored,
    targets: &[Target<'a>],
    clean: impl Iterator<Item = &'a LiveRecord>,
    excluded: &HashSet<usize>,
) -> Result<Vec<File<'a>>> {
    let mut out = Vec::new();
    if plan.tables.iter().all(|t| t.files.is_none()) {
        return Ok(out);
    }
    // Order, table, key.
    let mut rows: Vec<(usize, usize, &'a Values, &'a str)> = Vec::new();
    for target in targets {
        if !target.only_marked
            && target.orders.iter().all(|o| !excluded.contains(o))
            && let Some(order) = target.orders.first()
        {
            rows.push((*order, target.table, target.write.key, target.key_text));
        }
    }
    // A shared row without personal data was overwritten with another order.
    for record in clean {
        let first = batch[record.order].redacted_version.is_none() && !plan.tables[record.table].shared;
        if first && !excluded.contains(&record.order) {
            rows.push((record.order, record.table, &record.key, &record.key_text));
        }
    }
    for (index, table) in plan.tables.iter().enumerate().filter(|(_, t)| t.files.is_some()) {
        let mine: Vec<_> = rows.iter().filter(|r| r.1 == index).collect();
        let keys: Vec<&Values> = mine.iter().map(|r| r.2).collect();
        for ((order, _, _, record_key), path) in mine.into_iter().zip(paths(plan, table, &keys)?) {
            let Some(path) = path else { continue };
            out.push(File {
                order: *order,
                table: &table.archived_as,
                record_key,
                path,
                back: stored.fate(*order, &table.archived_as, record_key) == Some(Fate::Archived),
            });
        }
    }
    Ok(out)
}

/// What tells a path from others, without telling it: under the current master key, then under older ones.
fn macs(plan: &Plan, keys: &MasterKeys, batch: &[Due], file: &File<'_>) -> Result<Vec<[u8; 32]>> {
    let order = batch[file.order].order_key.as_str();
    let whole = message(&plan.policy, order, file.table, file.record_key, &file.path)?;
    Ok(keys.all().map(|key| key.mac(MAC, &whole)).collect())
}

/// What the code of a path is for.
const MAC: &[u8] = b"amazon_pii file";

fn message(policy: &str, order: &str, table: &str, record_key: &str, path: &str) -> Result<Zeroizing<Vec<u8>>> {
    serde_json::to_vec(&(policy, order, table, record_key, path))
        .map(Zeroizing::new)
        .map_err(|_| Error::internal("a path cannot be written"))
}

/// Puts files into the outbox. One that waits already, or that was deleted and whose row has not come back, is not due again.
///
/// # Errors
/// Errors of the server; no random numbers.
pub fn note(plan: &Plan, keys: &MasterKeys, batch: &[Due], files: &[File<'_>]) -> Result<()> {
    if files.is_empty() {
        return Ok(());
    }
    let macs = files
        .iter()
        .map(|f| macs(plan, keys, batch, f))
        .collect::<Result<Vec<_>>>()?;
    let orders: Vec<&str> = files.iter().map(|f| batch[f.order].order_key.as_str()).collect();
    let rows = on_keys(|| {
        sql::write_bytes(
            "SELECT f.path_mac, f.acknowledged_at IS NULL FROM amazon_pii.file_outbox f \
             WHERE f.policy IS NOT DISTINCT FROM $1 AND f.order_key = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&orders)],
        )
    })?;
    let mut known: HashMap<Vec<u8>, bool> = HashMap::new();
    for row in &rows {
        *known.entry(row.bytes(0)?.to_vec()).or_default() |= row.bool(1)?;
    }
    let mut new: Vec<usize> = Vec::new();
    for (i, macs) in macs.iter().enumerate() {
        let waits = macs.iter().filter_map(|mac| known.get(mac.as_slice()).copied());
        let again = match waits.reduce(|a, b| a | b) {
            None => true,
            Some(waits) => !waits && files[i].back,
        };
        if again {
            known.insert(macs[0].to_vec(), true);
            new.push(i);
        }
    }
    if new.is_empty() {
        return Ok(());
    }
    let ids = as_extension(|| {
        sql::write(
            "SELECT pg_catalog.nextval(pg_catalog.pg_get_serial_sequence('amazon_pii.file_outbox', 'file_id')) \
             FROM pg_catalog.generate_series(1, $1)",
            &[Arg::Int(new.len() as i64)],
        )
    })?;
    let ids = ids.iter().map(|r| r.int(0)).collect::<Result<Vec<_>>>()?;
    let (mut wrapped, mut sealed) = (Vec::new(), Vec::new());
    for (i, id) in new.iter().zip(&ids) {
        let (wrap, seal) = seal(keys, &plan.policy, *id, &files[*i].path)
            .map_err(|e| Error::internal(format!("sealing failed: {e}")))?;
        wrapped.push(wrap);
        sealed.push(seal);
    }
    let text = |f: &dyn Fn(usize) -> Option<String>| new.iter().map(|i| f(*i)).collect::<Vec<_>>();
    let numbers = text(&|i| batch[files[i].order].number.clone());
    as_extension(|| {
        sql::execute(
            "INSERT INTO amazon_pii.file_outbox (file_id, policy, order_key, order_number, table_name, record_key, path_mac, \
                    master_key_id, wrapped, sealed, overdue_at) OVERRIDING SYSTEM VALUE \
             SELECT i, $1, o, n, t, r, m, $2, w, s, pg_catalog.now() + $3::interval \
             FROM ROWS FROM (pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7), \
                  pg_catalog.unnest($8), pg_catalog.unnest($9), pg_catalog.unnest($10), pg_catalog.unnest($11)) AS f (i, o, n, t, r, m, w, s)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(keys.current().id())),
                Arg::Text(Some(&plan.document.files_within)),
                Arg::Ints(ids.clone()),
                Arg::Texts(new.iter().map(|i| Some(orders[*i])).collect()),
                Arg::opt_texts(&numbers),
                Arg::Texts(new.iter().map(|i| Some(files[*i].table)).collect()),
                Arg::Texts(new.iter().map(|i| Some(files[*i].record_key)).collect()),
                Arg::ByteArrays(new.iter().map(|i| macs[*i][0].as_slice()).collect()),
                Arg::ByteArrays(wrapped.iter().map(Vec::as_slice).collect()),
                Arg::ByteArrays(sealed.iter().map(Vec::as_slice).collect()),
            ],
        )
    })?;
    let mut due: Vec<String> = new.iter().map(|i| orders[*i].to_owned()).collect();
    due.dedup();
    state::announce_keys(&plan.policy, "files_due", &due)
}

/// Where a sealed path belongs: to its entry, whatever becomes of the order's key.
fn place(id: i64) -> String {
    format!("file {id}")
}

/// A path, and the key that it is sealed under, wrapped.
fn seal(keys: &MasterKeys, policy: &str, id: i64, path: &str) -> std::result::Result<(Vec<u8>, Vec<u8>), VaultError> {
    let key_id = place(id);
    let key = DataKey::generate()?;
    let wrapped = key.wrap(keys.current(), &owner(policy, &key_id))?;
    Ok((wrapped, key.seal(&binding(policy, id, &key_id), path.as_bytes())?))
}

fn owner<'a>(policy: &'a str, key_id: &'a str) -> KeyBinding<'a> {
    KeyBinding {
        policy,
        order_key: "",
        key_id,
    }
}

fn binding<'a>(policy: &'a str, id: i64, key_id: &'a str) -> Binding<'a> {
    Binding {
        policy,
        order_key: "",
        table: "",
        record_key: "",
        version: id,
        key_id,
    }
}

/// The path of an entry; nothing where it cannot be opened.
fn open(keys: &MasterKeys, row: &Row, policy: &str, id: i64) -> Result<Option<String>> {
    let key_id = place(id);
    let Some(master) = keys.get(row.str(5)?) else {
        return Ok(None);
    };
    let Ok(key) = DataKey::unwrap(row.bytes(6)?, master, &owner(policy, &key_id)) else {
        return Ok(None);
    };
    let plain = key.open(&binding(policy, id, &key_id), row.bytes(7)?).ok();
    Ok(plain.and_then(|plain| String::from_utf8(plain.to_vec()).ok()))
}

/// Wraps the keys of the next files anew, after this one, that the current master key does not wrap. Returns how many, and the file
/// after which to go on, if there may be more.
///
/// # Errors
/// Errors of the server; no random numbers.
pub fn rewrap(keys: &MasterKeys, after: i64, size: i64) -> Result<(i64, Option<i64>)> {
    let current = Arg::Text(Some(keys.current().id()));
    let rows = as_extension(|| {
        sql::write_bytes(
            "SELECT f.file_id, f.policy, f.order_key, f.table_name, f.record_key, f.master_key_id, f.wrapped, f.sealed \
             FROM amazon_pii.file_outbox f WHERE f.file_id > $1 \
                AND f.acknowledged_at IS NULL AND f.master_key_id <> $2 ORDER BY f.file_id LIMIT $3 FOR UPDATE SKIP LOCKED",
            &[Arg::Int(after), current.clone(), Arg::Int(size)],
        )
    })?;
    let (mut ids, mut wraps, mut macs) = (Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        let (id, policy) = (row.int(0)?, row.str(1)?);
        let Some(path) = open(keys, row, policy, id)? else {
            continue;
        };
        let key_id = place(id);
        if let Some(wrapped) = wrapped_anew(keys, row.str(5)?, row.bytes(6)?, &owner(policy, &key_id))? {
            let whole = message(policy, row.str(2)?, row.str(3)?, row.str(4)?, &path)?;
            ids.push(id);
            wraps.push(wrapped);
            macs.push(keys.current().mac(MAC, &whole));
        }
    }
    let rewrapped = ids.len() as i64;
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.file_outbox f SET wrapped = n.w, path_mac = n.m, master_key_id = $3 \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($4)) AS n (i, w, m) WHERE f.file_id = n.i",
            &[
                Arg::Ints(ids),
                Arg::ByteArrays(wraps.iter().map(Vec::as_slice).collect()),
                current,
                Arg::ByteArrays(macs.iter().map(|m| m.as_slice()).collect()),
            ],
        )
    })?;
    let last = rows.last().filter(|_| i64::try_from(rows.len()) == Ok(size));
    Ok((rewrapped, last.map(|r| r.int(0)).transpose()?))
}

/// A file that is to be deleted.
pub struct Waiting {
    pub id: i64,
    pub policy: String,
    pub order_key: String,
    pub table: String,
    pub record_key: String,
    /// Nothing where it cannot be opened.
    pub path: Option<String>,
    pub due_since: TimestampWithTimeZone,
}

/// Who deletes files, and who may see what is in them anyway.
const MAY: &[&str] = &["amazon_pii_files", "amazon_pii_operator"];

/// The next files that are to be deleted, the oldest first. That their paths are opened is on record before they are.
///
/// # Errors
/// The caller lacks the capability; no evidence worker; no master key.
pub fn due(policy: Option<&str>, most: Option<i64>) -> Result<Vec<Waiting>> {
    require_role(MAY, "see which files are to be deleted")?;
    let rows = as_extension(|| {
        sql::write_bytes(
            "SELECT f.file_id, f.policy, f.order_key, f.table_name, f.record_key, f.master_key_id, f.wrapped, f.sealed, \
                    (EXTRACT(epoch FROM f.due_since) * 1000000)::bigint, f.order_number \
             FROM amazon_pii.file_outbox f WHERE f.acknowledged_at IS NULL AND ($1::text IS NULL OR f.policy = $1) \
             ORDER BY f.file_id LIMIT $2",
            &[Arg::Text(policy), Arg::Int(most.unwrap_or(100).max(0))],
        )
    })?;
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let keys = keys::master_keys()?;
    for part in rows.chunk_by(|a, b| matches!((a.str(1), b.str(1)), (Ok(a), Ok(b)) if a == b)) {
        let Some(first) = part.first() else { continue };
        let lines = part
            .iter()
            .map(|r| {
                Ok(Line {
                    order_key: r.string(2)?,
                    order_number: r.owned(9)?,
                    detail: format!("file {}", r.str(0)?),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        evidence::record(&AuditEntry {
            policy: Some(first.string(1)?),
            lines,
            ..AuditEntry::new("files_due")?
        })?;
    }
    rows.iter()
        .map(|row| {
            let (id, policy) = (row.int(0)?, row.string(1)?);
            Ok(Waiting {
                path: open(&keys, row, &policy, id)?,
                id,
                policy,
                order_key: row.string(2)?,
                table: row.string(3)?,
                record_key: row.string(4)?,
                due_since: xact::to_server(row.int(8)?)?,
            })
        })
        .collect()
}

/// A file was deleted. Whether it was waiting still.
///
/// # Errors
/// The caller lacks the capability; there is no such file.
pub fn acknowledge(id: i64) -> Result<bool> {
    require_role(MAY, "acknowledge a file")?;
    let (user, id) = (session_user(), Arg::Int(id));
    let rows = as_extension(|| {
        sql::write(
            "UPDATE amazon_pii.file_outbox f SET acknowledged_at = pg_catalog.now(), acknowledged_by = $2, wrapped = NULL, sealed = NULL, \
                master_key_id = NULL WHERE f.file_id = $1 AND f.acknowledged_at IS NULL \
             RETURNING f.policy, f.order_key, f.order_number, f.table_name, f.record_key",
            &[id.clone(), Arg::Text(Some(&user))],
        )
    })?;
    let Some(row) = rows.first() else {
        let known = as_extension(|| sql::read("SELECT true FROM amazon_pii.file_outbox WHERE file_id = $1", &[id]))?;
        if known.is_empty() {
            return Err(Error::undefined("there is no such file")
                .hint("amazon_pii.files_due() lists the files that are to be deleted."));
        }
        return Ok(false);
    };
    let (policy, order) = (row.string(0)?, row.string(1)?);
    audit::insert(&[AuditEntry {
        policy: Some(policy.clone()),
        order_key: Some(order.clone()),
        order_number: row.owned(2)?,
        detail: Some(format!("{} {}", row.str(3)?, row.str(4)?)),
        ..AuditEntry::new("ack_file")?
    }])?;
    let left = as_extension(|| {
        sql::read(
            "SELECT true FROM amazon_pii.file_outbox f WHERE f.policy = $1 AND f.order_key = $2 AND f.acknowledged_at IS NULL LIMIT 1",
            &[Arg::Text(Some(&policy)), Arg::Text(Some(&order))],
        )
    })?;
    if left.is_empty() {
        state::announce_keys(&policy, "files_gone", &[order])?;
    }
    Ok(true)
}

/// Orders that are no longer tracked: their files stay.
///
/// # Errors
/// Errors of the server.
pub fn forget(policy: &str, orders: &[String]) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.file_outbox f WHERE f.policy = $1 AND f.order_key = ANY ($2) AND f.acknowledged_at IS NULL",
            &[Arg::Text(Some(policy)), Arg::texts(orders)],
        )
    })?;
    Ok(())
}

/// For `explain_order`: each file of an order, and whether it is still to be deleted.
///
/// # Errors
/// Errors of the server.
pub fn explained(policy: &str, order: &str) -> Result<Vec<(String, String)>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT f.table_name, f.record_key, f.due_since, f.acknowledged_at FROM amazon_pii.file_outbox f \
             WHERE f.policy = $1 AND f.order_key = $2 ORDER BY f.file_id",
            &[Arg::Text(Some(policy)), Arg::Text(Some(order))],
        )
    })?;
    rows.iter()
        .map(|r| {
            let detail = match r.text(3)? {
                None => format!("to be deleted since {}", r.str(2)?),
                Some(at) => format!("to be deleted since {}, acknowledged {at}", r.str(2)?),
            };
            Ok((format!("{} {}", r.str(0)?, r.str(1)?), detail))
        })
        .collect()
}
