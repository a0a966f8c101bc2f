//! The audit log: who did what to which order, under which policy version, why, when. Counts and words of our own,
//! never a value.

use serde::{Deserialize, Serialize};

use super::plan::Plan;
use crate::domain::message::Message;
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Result, role_name};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg, Row};
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

/// In whose name something is done.
#[derive(Debug, Clone)]
pub struct By {
    pub user: String,
    /// The application's own user.
    pub actor: Option<String>,
}

impl By {
    /// The session's user.
    pub fn session() -> Self {
        Self {
            user: identity::session_user(),
            actor: guc::actor(),
        }
    }

    /// The current role: in a trigger, the one that the statement runs as.
    pub fn role() -> Self {
        Self {
            user: role_name(identity::current_role()),
            actor: guc::actor(),
        }
    }
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

    /// What the entry's own code covers, and the kind of message that this is.
    fn message(&self, id: i64, at: &str, links_before: Option<i64>) -> (&'static [u8], Message) {
        let version = self.policy_version.map(|v| v.to_string());
        let parts = [
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
        let (kind, message): (&[u8], _) = match links_before {
            // Written by a version that knew no chains.
            None => (b"amazon_pii audit entry", Message::default()),
            Some(links) => (b"amazon_pii audit entry of a chain", Message::default().number(links)),
        };
        let message = message.number(id);
        (kind, parts.into_iter().chain(lines).fold(message, Message::text))
    }
}

/// An entry as it is stored.
pub struct Stored {
    pub id: i64,
    entry: AuditEntry,
    at: String,
    links_before: Option<i64>,
    key_id: Option<String>,
    mac: Option<Vec<u8>>,
    /// Its columns as texts: what a link seals.
    columns: Vec<Option<String>>,
}

/// The columns that [`Stored::read`] reads.
pub const COLUMNS: &str = "e.audit_id, e.at, e.\"user\", e.actor, e.action, e.policy, e.policy_version, e.order_key, e.order_number, \
    e.reason, e.detail, e.key_id, pg_catalog.encode(e.mac, 'hex'), e.lines, e.links_before";

/// How many these are.
pub const WIDTH: usize = 15;

const LINES: usize = 13;

/// Whether an entry is what was written.
#[derive(Debug, PartialEq, Eq)]
pub enum OwnCode {
    /// It has no code: no master key was to be had.
    Missing,
    Holds,
    Wrong,
    /// By the master key of this id, which is not at hand.
    NoKey(String),
}

impl Stored {
    /// From the first [`WIDTH`] columns of a row; `None` where there is no entry.
    ///
    /// # Errors
    /// Other columns than [`COLUMNS`].
    pub fn read(row: &Row) -> Result<Option<Self>> {
        let columns = row.texts(0..WIDTH)?;
        if columns[0].is_none() {
            return Ok(None);
        }
        let number = |i: usize| columns[i].as_deref().and_then(|t| t.parse::<i64>().ok());
        let text = |i: usize| columns[i].clone();
        type Lines = Vec<(String, Option<String>, String)>;
        let lines = columns[LINES].as_deref().map(serde_json::from_str::<Lines>);
        let lines = lines.and_then(std::result::Result::ok).unwrap_or_default();
        Ok(Some(Self {
            id: number(0).unwrap_or_default(),
            at: text(1).unwrap_or_default(),
            entry: AuditEntry {
                user: text(2).unwrap_or_default(),
                actor: text(3),
                action: text(4).unwrap_or_default(),
                policy: text(5),
                policy_version: number(6),
                order_key: text(7),
                order_number: text(8),
                reason: text(9),
                detail: text(10),
                lines: lines
                    .into_iter()
                    .map(|(order_key, order_number, detail)| Line {
                        order_key,
                        order_number,
                        detail,
                    })
                    .collect(),
            },
            key_id: text(11),
            mac: columns[12].as_deref().and_then(|t| hex::decode(t).ok()),
            links_before: number(14),
            columns,
        }))
    }

    /// What was done.
    pub fn action(&self) -> &str {
        &self.entry.action
    }

    /// When it was written, as text.
    pub fn at(&self) -> &str {
        &self.at
    }

    pub fn detail(&self) -> Option<&str> {
        self.entry.detail.as_deref()
    }

    /// How many links its chain had when it was written; `None` where it had no chain.
    pub fn links_before(&self) -> Option<i64> {
        self.links_before
    }

    /// Adds all of it, as it is stored.
    pub fn add_to(&self, message: Message) -> Message {
        self.columns.iter().map(Option::as_deref).fold(message, Message::text)
    }

    /// Whether its own code holds.
    pub fn own_code(&self, keys: &MasterKeys) -> OwnCode {
        let (Some(key_id), Some(mac)) = (&self.key_id, &self.mac) else {
            return OwnCode::Missing;
        };
        let Some(key) = keys.get(key_id) else {
            return OwnCode::NoKey(key_id.clone());
        };
        let (kind, message) = self.entry.message(self.id, &self.at, self.links_before);
        // The code is over the lines, not over how they are written: nobody wrote them otherwise.
        let lines = self.entry.lines_text();
        if lines == self.columns[LINES] && key.mac(kind, message.as_bytes()) == mac[..] {
            OwnCode::Holds
        } else {
            OwnCode::Wrong
        }
    }
}

/// Appends entries, each with its own code under the current master key; without a key, without a code. A sealer links them
/// into their chain when they are committed.
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
        // Number, time and what the chain has so far come first, since the code covers them.
        let rows = sql::write(
            // The head of its chain is read, not locked: whoever writes an entry waits for nobody.
            "SELECT pg_catalog.nextval(pg_catalog.pg_get_serial_sequence('amazon_pii.audit_entry', 'audit_id')), \
                    pg_catalog.clock_timestamp(), COALESCE((SELECT c.position FROM amazon_pii.audit_chain AS c \
                        WHERE c.chain = COALESCE(n.policy, '')), 0) FROM pg_catalog.unnest($1) AS n (policy)",
            &[Arg::Texts(entries.iter().map(|e| e.policy.as_deref()).collect())],
        )?;
        let mut ids = Vec::new();
        let mut times = Vec::new();
        let mut links = Vec::new();
        let mut codes = Vec::new();
        for (row, entry) in rows.iter().zip(entries) {
            let (id, at, before) = (row.int(0)?, row.string(1)?, row.int(2)?);
            if let Some(keys) = keys {
                let (kind, message) = entry.message(id, &at, Some(before));
                codes.push(keys.current().mac(kind, message.as_bytes()));
            }
            ids.push(id);
            times.push(at);
            links.push(before);
        }
        let key_id = keys.map(|k| k.current().id().to_owned());
        let column = |f: fn(&AuditEntry) -> Option<&str>| Arg::Texts(entries.iter().map(f).collect());
        let versions: Vec<Option<String>> = entries
            .iter()
            .map(|e| e.policy_version.map(|v| v.to_string()))
            .collect();
        let lines: Vec<Option<String>> = entries.iter().map(AuditEntry::lines_text).collect();
        sql::execute(
            "WITH entry AS (INSERT INTO amazon_pii.audit_entry (audit_id, at, \"user\", actor, action, policy, policy_version, order_key, \
                    order_number, reason, detail, mac, key_id, lines, links_before) OVERRIDING SYSTEM VALUE \
             SELECT id, at::timestamptz, u, actor, action, policy, version::int, okey, number, reason, detail, mac, $13, lines, links \
             FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), \
                  pg_catalog.unnest($5), pg_catalog.unnest($6), pg_catalog.unnest($7), pg_catalog.unnest($8), \
                  pg_catalog.unnest($9), pg_catalog.unnest($10), pg_catalog.unnest($11), pg_catalog.unnest($12), \
                  pg_catalog.unnest($14), pg_catalog.unnest($15)) \
                  AS e (id, at, u, actor, action, policy, version, okey, number, reason, detail, mac, lines, links) \
             RETURNING audit_id, policy) \
             INSERT INTO amazon_pii.audit_pending (chain, audit_id) SELECT COALESCE(policy, ''), audit_id FROM entry",
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
                Arg::Ints(links),
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
