//! The audit log: who did what to which order, under which policy version, why, when. Counts and words of our own,
//! never a value.

use serde::{Deserialize, Serialize};

use super::plan::Plan;
use crate::domain::vault::MasterKeys;
use crate::pg::error::Result;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::{guc, identity, keys};

/// One entry. Times are the server's.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct AuditEntry {
    pub user: String,
    pub actor: Option<String>,
    pub action: String,
    pub policy: Option<String>,
    pub policy_version: Option<i64>,
    pub order_key: Option<String>,
    pub order_number: Option<String>,
    pub reason: Option<String>,
    pub detail: Option<String>,
    /// The orders of a batch, where one entry speaks of many.
    #[serde(default)]
    pub lines: Vec<Line>,
}

/// What happened to one order of a batch.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    pub order_key: String,
    pub order_number: Option<String>,
    pub detail: String,
}

impl AuditEntry {
    /// An entry in the name of the session's user and of the application's own user, if it set one.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn new(action: &str) -> Result<Self> {
        Ok(Self {
            user: identity::session_user(),
            actor: guc::actor(),
            action: action.to_owned(),
            ..Self::default()
        })
    }

    /// The lines as they are stored.
    fn lines_text(&self) -> Option<String> {
        let lines: Vec<_> = self
            .lines
            .iter()
            .map(|l| (&l.order_key, &l.order_number, &l.detail))
            .collect();
        (!lines.is_empty()).then(|| serde_json::to_string(&lines).unwrap_or_default())
    }

    /// What the entry's code covers, each part with its length, so that no two entries read the same.
    fn message(&self, id: i64, at: &str) -> Vec<u8> {
        let version = self.policy_version.map(|v| v.to_string());
        let id = id.to_string();
        let mut out = Vec::new();
        let parts = [
            Some(id.as_str()),
            Some(at),
            Some(self.user.as_str()),
            self.actor.as_deref(),
            Some(self.action.as_str()),
            self.policy.as_deref(),
            version.as_deref(),
            self.order_key.as_deref(),
            self.order_number.as_deref(),
            self.reason.as_deref(),
            self.detail.as_deref(),
        ];
        let lines = self.lines.iter().flat_map(|l| {
            [
                Some(l.order_key.as_str()),
                l.order_number.as_deref(),
                Some(l.detail.as_str()),
            ]
        });
        for part in parts.into_iter().chain(lines) {
            match part {
                None => out.push(0),
                Some(text) => {
                    out.push(1);
                    out.extend((text.len() as u64).to_be_bytes());
                    out.extend(text.as_bytes());
                }
            }
        }
        out
    }
}

/// Appends entries, each with its own code under the current master key; without a key, without a code.
///
/// # Errors
/// Errors of the server.
pub fn insert(entries: &[AuditEntry]) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    insert_under(keys::master_keys().ok().as_ref(), entries)
}

/// [`insert`] under keys that are at hand: fetching them may run a command.
///
/// # Errors
/// As [`insert`].
pub fn insert_under(keys: Option<&MasterKeys>, entries: &[AuditEntry]) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    as_extension(|| {
        // Number and time first, since the code covers them.
        let rows = sql::write(
            "SELECT pg_catalog.nextval(pg_catalog.pg_get_serial_sequence('amazon_pii.audit_entry', 'audit_id')), \
                    pg_catalog.clock_timestamp() FROM pg_catalog.generate_series(1, $1)",
            &[Arg::Int(entries.len() as i64)],
        )?;
        let mut ids = Vec::new();
        let mut times = Vec::new();
        let mut codes = Vec::new();
        for (row, entry) in rows.iter().zip(entries) {
            let (id, at) = (row.int(0)?, row.string(1)?);
            if let Some(keys) = keys {
                codes.push(keys.current().mac(b"amazon_pii audit entry", &entry.message(id, &at)));
            }
            ids.push(id);
            times.push(at);
        }
        let key_id = keys.map(|k| k.current().id().to_owned());
        let column = |f: fn(&AuditEntry) -> Option<&str>| Arg::Texts(entries.iter().map(f).collect());
        let versions: Vec<Option<String>> = entries
            .iter()
            .map(|e| e.policy_version.map(|v| v.to_string()))
            .collect();
        let lines: Vec<Option<String>> = entries.iter().map(AuditEntry::lines_text).collect();
        sql::execute(
            "INSERT INTO amazon_pii.audit_entry (audit_id, at, \"user\", actor, action, policy, policy_version, order_key, \
                    order_number, reason, detail, mac, key_id, lines) OVERRIDING SYSTEM VALUE \
             SELECT id, at::timestamptz, u, actor, action, policy, version::int, okey, number, reason, detail, mac, $13, lines \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), \
                  pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8), \
                  pg_catalog.unnest($9), pg_catalog.unnest($10), pg_catalog.unnest($11), pg_catalog.unnest($12), \
                  pg_catalog.unnest($14)) AS e (id, at, u, actor, action, policy, version, okey, number, reason, detail, mac, lines)",
            &[
                Arg::Ints(ids),
                Arg::texts(&times),
                column(|e| Some(&e.user)),
                column(|e| e.actor.as_deref()),
                column(|e| Some(&e.action)),
                column(|e| e.policy.as_deref()),
                Arg::opt_texts(&versions),
                column(|e| e.order_key.as_deref()),
                column(|e| e.order_number.as_deref()),
                column(|e| e.reason.as_deref()),
                column(|e| e.detail.as_deref()),
                Arg::ByteArrays(codes.iter().map(|c| c.as_slice()).collect()),
                Arg::Text(key_id.as_deref()),
                Arg::opt_texts(&lines),
            ],
        )?;
        Ok(())
    })
}

/// Appends one entry for the orders of a batch, with one code over all of them: an order costs no row of its own.
///
/// # Errors
/// As [`insert`].
pub fn insert_batch(keys: &MasterKeys, action: &str, plan: &Plan, lines: Vec<Line>) -> Result<()> {
    let mut entry = AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        ..AuditEntry::new(action)?
    };
    match <[Line; 1]>::try_from(lines) {
        Ok([line]) => {
            entry.order_key = Some(line.order_key);
            entry.order_number = line.order_number;
            entry.detail = Some(line.detail);
        }
        Err(lines) if lines.is_empty() => return Ok(()),
        Err(lines) => entry.lines = lines,
    }
    insert_under(Some(keys), &[entry])
}
