//! The two ends of a chain: the head, which says where it ends, and the checkpoint, which says where it begins once `audit_for` has
//! ended its first entries. Both have codes of their own: nobody without a master key can move them.

use super::{bytes, lock};
use crate::domain::message::Message;
use crate::domain::vault::{MasterKey, MasterKeys};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::xact::Mode;

/// An end as it was found.
pub enum Found<T> {
    Missing,
    Sound(T),
    /// Its code does not fit.
    Changed,
    /// Signed by the master key of this id, which is not at hand.
    NoKey(String, T),
}

/// Where a chain ends: its last link. A chain without links has position 0 and no code.
pub struct Head {
    pub position: i64,
    pub code: Vec<u8>,
    sealed_at: String,
}

impl Head {
    fn mac(&self, key: &MasterKey, chain: &str) -> [u8; 32] {
        let message = Message::default()
            .text(Some(chain))
            .number(self.position)
            .bytes(Some(&self.code))
            .text(Some(&self.sealed_at));
        key.mac(b"amazon_pii audit head", message.as_bytes())
    }

    /// Reads the head of a chain.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn find(keys: &MasterKeys, chain: &str) -> Result<Found<Self>> {
        let rows = on_keys(|| {
            sql::read(
                "SELECT h.position, pg_catalog.encode(h.code, 'hex'), h.sealed_at, h.key_id, pg_catalog.encode(h.mac, 'hex') \
                 FROM amazon_pii.audit_chain AS h WHERE h.chain = $1",
                &[Arg::Text(Some(chain))],
            )
        })?;
        let Some(row) = rows.first() else {
            return Ok(Found::Missing);
        };
        let head = Self {
            position: row.int(0)?,
            code: bytes(row, 1)?,
            sealed_at: row.string(2)?,
        };
        let mac = bytes(row, 4)?;
        let right = keys.get(row.str(3)?).map(|key| head.mac(key, chain) == mac[..]);
        Ok(Found::judged(head, right, row.str(3)?))
    }

    /// Writes it: whoever does has the lock of the sealer.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn write(keys: &MasterKeys, chain: &str, position: i64, code: Vec<u8>) -> Result<Self> {
        let head = Self {
            position,
            code,
            sealed_at: now()?,
        };
        let mac = head.mac(keys.current(), chain);
        on_keys(|| {
            sql::execute(
                "INSERT INTO amazon_pii.audit_chain AS h (chain, position, code, sealed_at, key_id, mac) \
                 VALUES ($1, $2, pg_catalog.decode($3, 'hex'), $4::timestamptz, $5, pg_catalog.decode($6, 'hex')) \
                 ON CONFLICT (chain) DO UPDATE SET position = EXCLUDED.position, code = EXCLUDED.code, sealed_at = EXCLUDED.sealed_at, \
                    key_id = EXCLUDED.key_id, mac = EXCLUDED.mac",
                &[
                    Arg::Text(Some(chain)),
                    Arg::Int(position),
                    Arg::Text(Some(&hex::encode(&head.code))),
                    Arg::Text(Some(&head.sealed_at)),
                    Arg::Text(Some(keys.current().id())),
                    Arg::Text(Some(&hex::encode(mac))),
                ],
            )
        })?;
        Ok(head)
    }
}

/// Where a chain begins: after this link.
pub struct Checkpoint {
    pub position: i64,
    pub code: Vec<u8>,
    /// How many entries were removed, all in all.
    pub entries: i64,
    /// When the newest of them was written.
    pub last_at: Option<String>,
    made_at: String,
}

impl Checkpoint {
    fn mac(&self, key: &MasterKey, chain: &str) -> [u8; 32] {
        let message = Message::default()
            .text(Some(chain))
            .number(self.position)
            .bytes(Some(&self.code))
            .number(self.entries)
            .text(self.last_at.as_deref())
            .text(Some(&self.made_at));
        key.mac(b"amazon_pii audit checkpoint", message.as_bytes())
    }

    /// Reads the checkpoint of a chain.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn find(keys: &MasterKeys, chain: &str) -> Result<Found<Self>> {
        let rows = on_keys(|| {
            sql::read(
                "SELECT c.position, pg_catalog.encode(c.code, 'hex'), c.entries, c.last_at, c.made_at, c.key_id, pg_catalog.encode(c.mac, 'hex') \
                 FROM amazon_pii.audit_checkpoint AS c WHERE c.chain = $1",
                &[Arg::Text(Some(chain))],
            )
        })?;
        let Some(row) = rows.first() else {
            return Ok(Found::Missing);
        };
        let checkpoint = Self {
            position: row.int(0)?,
            code: bytes(row, 1)?,
            entries: row.int(2)?,
            last_at: row.owned(3)?,
            made_at: row.string(4)?,
        };
        let mac = bytes(row, 6)?;
        let right = keys.get(row.str(5)?).map(|key| checkpoint.mac(key, chain) == mac[..]);
        Ok(Found::judged(checkpoint, right, row.str(5)?))
    }

    /// Writes it, as [`Head::write`] does.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn write(
        keys: &MasterKeys,
        chain: &str,
        position: i64,
        code: &[u8],
        entries: i64,
        last_at: Option<String>,
    ) -> Result<()> {
        let checkpoint = Self {
            position,
            code: code.to_vec(),
            entries,
            last_at,
            made_at: now()?,
        };
        let mac = checkpoint.mac(keys.current(), chain);
        on_keys(|| {
            sql::execute(
                "INSERT INTO amazon_pii.audit_checkpoint AS c (chain, position, code, entries, last_at, made_at, key_id, mac) \
                 VALUES ($1, $2, pg_catalog.decode($3, 'hex'), $4, $5::timestamptz, $6::timestamptz, $7, pg_catalog.decode($8, 'hex')) \
                 ON CONFLICT (chain) DO UPDATE SET position = EXCLUDED.position, code = EXCLUDED.code, entries = EXCLUDED.entries, \
                    last_at = EXCLUDED.last_at, made_at = EXCLUDED.made_at, key_id = EXCLUDED.key_id, mac = EXCLUDED.mac",
                &[
                    Arg::Text(Some(chain)),
                    Arg::Int(position),
                    Arg::Text(Some(&hex::encode(code))),
                    Arg::Int(entries),
                    Arg::Text(checkpoint.last_at.as_deref()),
                    Arg::Text(Some(&checkpoint.made_at)),
                    Arg::Text(Some(keys.current().id())),
                    Arg::Text(Some(&hex::encode(mac))),
                ],
            )
        })?;
        Ok(())
    }
}

impl<T> Found<T> {
    /// By whether its code is right, which takes the master key of this id.
    fn judged(value: T, right: Option<bool>, key_id: &str) -> Self {
        match right {
            None => Self::NoKey(key_id.to_owned(), value),
            Some(true) => Self::Sound(value),
            Some(false) => Self::Changed,
        }
    }
}

fn now() -> Result<String> {
    let rows = as_extension(|| sql::read("SELECT pg_catalog.clock_timestamp()", &[]))?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
}

/// Signs heads and checkpoints by the current master key, so that the former one is not needed for them. What is not as it was
/// written stays as it is.
///
/// # Errors
/// Errors of the server.
pub fn resign(keys: &MasterKeys) -> Result<()> {
    // A sealer has it for moments.
    lock()?.take(Mode::Alone)?;
    let rows = as_extension(|| {
        sql::read(
            "SELECT h.chain FROM amazon_pii.audit_chain AS h WHERE h.key_id <> $1 \
             UNION SELECT c.chain FROM amazon_pii.audit_checkpoint AS c WHERE c.key_id <> $1",
            &[Arg::Text(Some(keys.current().id()))],
        )
    })?;
    for row in &rows {
        let chain = row.str(0)?;
        if let Found::Sound(head) = Head::find(keys, chain)? {
            Head::write(keys, chain, head.position, head.code)?;
        }
        if let Found::Sound(c) = Checkpoint::find(keys, chain)? {
            Checkpoint::write(keys, chain, c.position, &c.code, c.entries, c.last_at)?;
        }
    }
    Ok(())
}

/// How many heads and checkpoints each master key has signed, and how many links of entries that another one signed, or none.
///
/// # Errors
/// Errors of the server.
pub fn signed_by() -> Result<Vec<(String, i64, i64)>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT s.key_id, pg_catalog.sum(s.ends)::bigint, pg_catalog.sum(s.links)::bigint FROM ( \
                SELECT h.key_id, 1, 0 FROM amazon_pii.audit_chain AS h \
                UNION ALL SELECT c.key_id, 1, 0 FROM amazon_pii.audit_checkpoint AS c \
                UNION ALL SELECT l.key_id, 0, 1 FROM amazon_pii.audit_link AS l LEFT JOIN amazon_pii.audit_entry AS e USING (audit_id) \
                    WHERE e.key_id IS DISTINCT FROM l.key_id) AS s (key_id, ends, links) GROUP BY s.key_id",
            &[],
        )
    })?;
    rows.iter().map(|r| Ok((r.string(0)?, r.int(1)?, r.int(2)?))).collect()
}
