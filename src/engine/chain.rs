//! The audit log as chains, one a policy: each link has a code over its entry and the code of the link before it. Whoever writes an
//! entry notes it as pending and waits for nobody; one sealer at a time links what is committed, in an order of its own.

mod end;
mod seal;
mod trim;
mod verify;

use std::collections::BTreeSet;

use super::audit::{COLUMNS, Stored, WIDTH};
use super::cycle;
use crate::domain::message::Message;
use crate::domain::vault::{MasterKey, MasterKeys};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg, Row};
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::{TriggerCall, is_engine_write};
use crate::pg::xact::{Boundary, Own};
use crate::pg::{keys, worker};

pub use end::{resign, signed_by};
pub use seal::step as seal;
pub use trim::{DEFAULT as KEPT_FOR, kept_long_enough};
pub use verify::{Kept, verify};

/// Entries that are looked at together, and the bytes of theirs beyond which there are fewer.
const PAGE: i64 = 500;
const PAGE_BYTES: i64 = 8 << 20;

/// What anybody's statement on the audit log meets. The extension itself removes what is past `audit_for`.
///
/// # Errors
/// It is not the extension's.
pub fn refuse_change(call: &TriggerCall) -> Result<()> {
    if is_engine_write(call.relation) {
        return Ok(());
    }
    Err(Error::privilege("the audit log is append-only"))
}

/// The right to change links, heads and checkpoints.
fn lock() -> Result<Own> {
    let class = as_extension(|| {
        let rows = sql::read(
            "SELECT 'amazon_pii.audit_chain'::pg_catalog.regclass::pg_catalog.oid",
            &[],
        )?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.oid(0)
    })?;
    Ok(Own {
        class,
        object: 0,
        kind: 0,
    })
}

/// Whether there is anything to link, or to look for that may be past its time: for those who are at another statement anyway.
pub const WAITS: &str = "(EXISTS (SELECT FROM amazon_pii.audit_pending) \
    OR EXISTS (SELECT FROM amazon_pii.policy AS y WHERE NOT EXISTS (SELECT FROM amazon_pii.audit_chain AS h WHERE h.chain = y.policy)) \
    OR EXISTS (SELECT FROM amazon_pii.audit_chain AS h WHERE h.next_trim_at <= pg_catalog.now()))";

/// The chains that have something to link, and those of which the beginning may be past its time.
fn waiting() -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let rows = on_keys(|| {
        sql::read(
            // One look into the index for each chain, however much waits.
            "WITH RECURSIVE c (chain) AS ((SELECT p.chain FROM amazon_pii.audit_pending AS p ORDER BY p.chain LIMIT 1) \
                UNION ALL SELECT (SELECT p.chain FROM amazon_pii.audit_pending AS p WHERE p.chain > c.chain ORDER BY p.chain LIMIT 1) \
                FROM c WHERE c.chain IS NOT NULL) \
             SELECT c.chain, true FROM c WHERE c.chain IS NOT NULL \
             UNION ALL SELECT y.policy, true FROM amazon_pii.policy AS y \
                WHERE NOT EXISTS (SELECT FROM amazon_pii.audit_chain AS h WHERE h.chain = y.policy) \
             UNION ALL SELECT h.chain, false FROM amazon_pii.audit_chain AS h WHERE h.next_trim_at <= pg_catalog.now()",
            &[],
        )
    })?;
    let (mut pending, mut old) = (BTreeSet::new(), BTreeSet::new());
    for row in &rows {
        let chains = if row.bool(1)? { &mut pending } else { &mut old };
        chains.insert(row.string(0)?);
    }
    Ok((pending, old))
}

/// Links what was committed, and removes what is past its time. At the end of all that cycles do: where there is nothing to do it
/// costs one statement. Called with an open transaction, leaves one open.
///
/// # Errors
/// A cancel only; anything else is told, and tried again by the next cycle.
pub fn round(boundary: Boundary) -> Result<()> {
    let outcome = work(boundary);
    match outcome {
        Err(e) if e.is_cancel() => Err(e),
        Err(e) => {
            boundary.rollback();
            worker::log(&e, "the audit log could not be sealed");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

fn work(boundary: Boundary) -> Result<()> {
    let (pending, old) = subtransaction(waiting)?;
    if pending.is_empty() && old.is_empty() {
        return Ok(());
    }
    let keys = match keys::master_keys() {
        Err(e) if e.is_cancel() => return Err(e),
        // Cycles say so themselves; entries wait until there is one.
        Err(_) => return Ok(()),
        Ok(keys) => keys,
    };
    let mut troubles = Vec::new();
    for chain in &old {
        loop {
            let outcome = subtransaction(|| trim::step(&keys, chain));
            match outcome {
                Err(e) if e.is_cancel() => return Err(e),
                Err(e) => troubles.push((chain.clone(), e)),
                Ok(more) => {
                    boundary.commit()?;
                    if more {
                        continue;
                    }
                }
            }
            break;
        }
        boundary.commit()?;
    }
    loop {
        let outcome = subtransaction(|| seal(&keys));
        boundary.commit()?;
        let sealed = match outcome {
            Err(e) if e.is_cancel() => return Err(e),
            outcome => outcome?,
        };
        if !sealed.more {
            troubles.extend(sealed.troubles);
            break;
        }
    }
    for (chain, e) in troubles.iter().filter(|(_, e)| !e.is_lock()) {
        if !cycle::note_error(chain, e)? {
            worker::log(e, "the audit log could not be sealed");
        }
    }
    boundary.commit()
}

/// The code of a link; `entry` is `None` where it was removed before anybody could link it.
fn link_code(
    key: &MasterKey,
    chain: &str,
    position: i64,
    audit_id: i64,
    before: &[u8],
    entry: Option<&Stored>,
) -> [u8; 32] {
    let message = Message::default()
        .text(Some(chain))
        .number(position)
        .number(audit_id)
        .bytes(Some(before));
    let message = match entry {
        None => message.text(None),
        Some(entry) => entry.add_to(message),
    };
    key.mac(b"amazon_pii audit link", message.as_bytes())
}

/// One link and its entry, as they are stored.
struct Link {
    position: i64,
    audit_id: i64,
    key_id: String,
    code: Vec<u8>,
    entry: Option<Stored>,
    /// Microseconds since 1970-01-01 UTC.
    written: Option<i64>,
    /// Of the entry: before the horizon that was asked for.
    old: bool,
}

impl Link {
    fn read(row: &Row) -> Result<Self> {
        Ok(Self {
            entry: Stored::read(row)?,
            position: row.int(WIDTH)?,
            audit_id: row.int(WIDTH + 1)?,
            key_id: row.string(WIDTH + 2)?,
            code: bytes(row, WIDTH + 3)?,
            written: row.text(WIDTH + 4)?.and_then(|t| t.parse().ok()),
            old: row.bool(WIDTH + 5)?,
        })
    }

    /// Whether its code is right after this one; `None` where its key is not at hand.
    fn holds(&self, keys: &MasterKeys, chain: &str, before: &[u8]) -> Option<bool> {
        let key = keys.get(&self.key_id)?;
        let code = link_code(key, chain, self.position, self.audit_id, before, self.entry.as_ref());
        Some(code == self.code[..])
    }
}

/// The next links of a chain with their entries, by their positions.
fn links(chain: &str, after: i64, horizon: Option<&str>) -> Result<Vec<Link>> {
    let rows = on_keys(|| {
        sql::read(
            &format!(
                // ident-ok: names of our own columns
                "SELECT {COLUMNS}, s.position, s.linked, s.link_key, s.link_code, \
                    CASE WHEN pg_catalog.isfinite(e.at) THEN (pg_catalog.date_part('epoch', e.at) * 1000000)::bigint END, \
                    COALESCE(e.at < $3::timestamptz, true) \
                 FROM (SELECT l.position, l.audit_id AS linked, l.key_id AS link_key, pg_catalog.encode(l.code, 'hex') AS link_code, \
                        pg_catalog.sum(COALESCE(pg_catalog.octet_length(a.lines), 0)) OVER (ORDER BY l.position) \
                            - COALESCE(pg_catalog.octet_length(a.lines), 0) AS before \
                    FROM (SELECT * FROM amazon_pii.audit_link AS k WHERE k.chain = $1 AND k.position > $2 ORDER BY k.position LIMIT $4) AS l \
                    LEFT JOIN amazon_pii.audit_entry AS a ON a.audit_id = l.audit_id) AS s \
                 LEFT JOIN amazon_pii.audit_entry AS e ON e.audit_id = s.linked WHERE s.before < $5 ORDER BY s.position"
            ),
            &[
                Arg::Text(Some(chain)),
                Arg::Int(after),
                Arg::Text(horizon),
                Arg::Int(PAGE),
                Arg::Int(PAGE_BYTES),
            ],
        )
    })?;
    rows.iter().map(Link::read).collect()
}

/// Bytes that a statement gave as hexadecimal digits.
fn bytes(row: &Row, i: usize) -> Result<Vec<u8>> {
    hex::decode(row.str(i)?).map_err(|_| Error::internal("a result column holds no hexadecimal digits"))
}

/// What an entry of a chain has in its column `policy`.
fn policy_of(chain: &str) -> Option<String> {
    (!chain.is_empty()).then(|| chain.to_owned())
}
