//! Master keys: what each of them wraps, and the change to another one. Data keys are wrapped anew, in batches that commit; what
//! they seal is never touched. Whoever is interrupted goes on with what is left. Of one database: others may have the same keys.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::time::{Duration, Instant};

use super::audit::{self, AuditEntry};
use super::chain;
use super::files;
use super::reconcile;
use super::turn;
use super::vault;
use crate::domain::vault::MasterKeys;
use crate::pg::error::Result;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::keys;
use crate::pg::sql::{self, Arg};
use crate::pg::worker;
use crate::pg::xact::{Boundary, Mode};

/// The master keys of a cycle. It may go on for hours, and wraps nothing by a key that has been replaced meanwhile.
pub struct Keyring {
    keys: MasterKeys,
    /// When the last rotation began that these keys know of.
    changed_at: Option<String>,
}

impl Keyring {
    /// As they are now.
    ///
    /// # Errors
    /// No usable master key.
    pub fn load(policy: &str) -> Result<Self> {
        // First when, so that a change in between is noticed later.
        let changed_at = changed_at(policy)?;
        let keys = keys::master_keys()?;
        Ok(Self { keys, changed_at })
    }

    /// Reads them again if a rotation has begun. To be asked when it is the cycle's turn: a rotation waits for those.
    ///
    /// # Errors
    /// As [`Keyring::load`].
    pub fn refresh(&mut self, policy: &str) -> Result<()> {
        if changed_at(policy)? != self.changed_at {
            // The setting may have changed with the key.
            worker::reload_if_asked();
            *self = Self::load(policy)?;
        }
        Ok(())
    }
}

impl Deref for Keyring {
    type Target = MasterKeys;

    fn deref(&self) -> &MasterKeys {
        &self.keys
    }
}

fn changed_at(policy: &str) -> Result<Option<String>> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT p.keys_changed_at FROM amazon_pii.policy p WHERE p.policy = $1",
            &[Arg::Text(Some(policy))],
        )
    })?;
    rows.first().map_or(Ok(None), |r| r.owned(0))
}

/// From here on no cycle wraps by a former key: those under way are told, and their batches waited for.
fn announce(boundary: Boundary) -> Result<()> {
    let rows = as_extension(|| {
        sql::write(
            "UPDATE amazon_pii.policy SET keys_changed_at = pg_catalog.clock_timestamp() RETURNING policy",
            &[],
        )
    })?;
    boundary.commit()?;
    for row in &rows {
        turn::take(row.str(0)?, Mode::Alone)?;
        boundary.commit()?;
    }
    Ok(())
}

/// Data keys that one transaction wraps anew.
const BATCH: i64 = 2000;

/// How often a long rotation says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// What a rotation did.
#[derive(Default)]
pub struct Rotated {
    pub rewrapped: i64,
    /// Still wrapped by another master key: that one is not configured, they are damaged, or somebody had them locked.
    pub remaining: i64,
}

/// Wraps everything anew that another master key than the current one wraps. Called with an open transaction, leaves one open.
///
/// # Errors
/// No usable master key; a cancel; errors of the server. What was committed before stays.
pub fn rotate(boundary: Boundary) -> Result<Rotated> {
    boundary.commit()?;
    let keys = keys::master_keys()?;
    let current = keys.current().id().to_owned();
    note(&keys, format!("to master key {current}"))?;
    announce(boundary)?;
    let mut out = Rotated::default();
    let mut told = Instant::now();
    let mut done = |rewrapped: i64, out: &mut Rotated| {
        out.rewrapped += rewrapped;
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            pgrx::notice!("{} data keys wrapped anew so far", out.rewrapped);
        }
        boundary.commit()
    };
    for schema in vault::schemas()? {
        let mut at = None;
        loop {
            let step = vault::rewrap(&schema, &keys, at.as_ref(), BATCH)?;
            done(step.rewrapped, &mut out)?;
            at = step.next;
            if at.is_none() {
                break;
            }
        }
    }
    let mut at = Some(0);
    while let Some(after) = at {
        let (rewrapped, next) = files::rewrap(&keys, after, BATCH)?;
        done(rewrapped, &mut out)?;
        at = next;
    }
    chain::resign(&keys)?;
    boundary.commit()?;
    // What former keys have signed is read while they are at hand.
    reconcile::settle(boundary)?;
    let others = used()?.into_iter().filter(|(id, _)| *id != current);
    out.remaining = others.map(|(_, used)| used.data_keys + used.files).sum();
    if out.remaining > 0 {
        pgrx::warning!(
            "{} data keys are still wrapped by other master keys; amazon_pii.key_status shows by which",
            out.remaining
        );
    }
    note(&keys, format!("{} wrapped anew, {} not", out.rewrapped, out.remaining))?;
    boundary.commit()?;
    Ok(out)
}

fn note(keys: &MasterKeys, detail: String) -> Result<()> {
    audit::insert_under(
        Some(keys),
        &[AuditEntry {
            detail: Some(detail),
            ..AuditEntry::new("rotate_key")?
        }],
    )
}

/// What depends on a master key.
#[derive(Default)]
pub struct Used {
    /// Data keys of archived orders.
    pub data_keys: i64,
    /// Keys of files that are still to be deleted.
    pub files: i64,
    /// Entries of the audit log that it signed, by themselves or in their chain.
    pub audit_entries: i64,
    /// Heads and checkpoints of chains that it signed.
    audit_ends: i64,
}

/// By the id of the master key.
fn used() -> Result<BTreeMap<String, Used>> {
    let mut out: BTreeMap<String, Used> = BTreeMap::new();
    for schema in vault::schemas()? {
        for (id, count) in vault::wrapped_by(&schema)? {
            out.entry(id).or_default().data_keys += count;
        }
    }
    let count = |statement: &str| as_extension(|| sql::read(statement, &[]));
    let files = "SELECT f.master_key_id, pg_catalog.count(*) FROM amazon_pii.file_outbox f WHERE f.master_key_id IS NOT NULL \
        GROUP BY f.master_key_id";
    for row in &count(files)? {
        out.entry(row.string(0)?).or_default().files = row.int(1)?;
    }
    let entries = "SELECT e.key_id, pg_catalog.count(*) FROM amazon_pii.audit_entry e WHERE e.key_id IS NOT NULL GROUP BY e.key_id";
    for row in &count(entries)? {
        out.entry(row.string(0)?).or_default().audit_entries = row.int(1)?;
    }
    for (id, ends, links) in chain::signed_by()? {
        let used = out.entry(id).or_default();
        used.audit_ends = ends;
        used.audit_entries += links;
    }
    Ok(out)
}

/// A master key that is configured or that something depends on.
pub struct Status {
    pub id: String,
    /// Unknown where no key can be had.
    pub is_current: Option<bool>,
    pub is_configured: Option<bool>,
    pub used: Used,
}

impl Status {
    /// Whether nothing can be opened with it alone, and no chain of the audit log goes on from what it signed.
    pub fn may_retire(&self) -> bool {
        let used = &self.used;
        self.is_current == Some(false) && used.data_keys == 0 && used.files == 0 && used.audit_ends == 0
    }
}

/// Every master key that is configured or that something depends on, the current one first.
///
/// # Errors
/// Errors of the server.
pub fn status() -> Result<Vec<Status>> {
    let keys = match keys::master_keys() {
        Err(e) if e.is_cancel() => return Err(e),
        keys => keys.ok(),
    };
    let mut used = used()?;
    let mut out = Vec::new();
    for (i, id) in keys.iter().flat_map(MasterKeys::ids).enumerate() {
        out.push(Status {
            id: id.to_owned(),
            is_current: Some(i == 0),
            is_configured: Some(true),
            used: used.remove(id).unwrap_or_default(),
        });
    }
    let known = keys.is_some().then_some(false);
    out.extend(used.into_iter().map(|(id, used)| Status {
        id,
        is_current: known,
        is_configured: known,
        used,
    }));
    Ok(out)
}
