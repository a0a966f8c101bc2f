//! What a destruction of archives leaves behind outside of the database: a line of the tombstone file, before it commits.

use super::home::IS_HERE;
use crate::domain::tombstone::{TOGETHER, Tombstone, What, new_id};
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::origin::this_database;
use crate::pg::sql::{self, Arg};
use crate::pg::xact::{self, Mode, Own};
use crate::pg::{keys, tombstones};

pub use crate::pg::tombstones::When;

/// Notes that archives are destroyed: keys of orders, each with the newest of its data keys.
///
/// # Errors
/// The file cannot be used, or no master key; nothing may be destroyed then.
pub fn write(
    policy: &str,
    master: Option<&MasterKeys>,
    what: What,
    when: When,
    orders: &[(String, i64)],
) -> Result<()> {
    for orders in orders.chunks(TOGETHER) {
        line(policy, master, what, when, orders, None)?;
    }
    Ok(())
}

/// Notes that this database takes the place of another one for a policy.
///
/// # Errors
/// As [`write()`].
pub fn adopted(policy: &str, former: &str) -> Result<()> {
    line(policy, None, What::Adopted, When::AtCommit, &[], Some(former))
}

fn line(
    policy: &str,
    master: Option<&MasterKeys>,
    what: What,
    when: When,
    orders: &[(String, i64)],
    of: Option<&str>,
) -> Result<()> {
    if !tombstones::is_configured() {
        return Ok(());
    }
    let at_hand;
    let master = match master {
        Some(keys) => keys,
        None => {
            at_hand = keys::master_keys()?;
            &at_hand
        }
    };
    let rows = on_keys(|| {
        sql::read(
            // ident-ok: made of constants.
            &format!(
                "SELECT p.lineage, CASE WHEN {IS_HERE} THEN COALESCE(p.home, $2) ELSE $2 END FROM amazon_pii.policy p WHERE p.policy = $1"
            ),
            &[Arg::Text(Some(policy)), Arg::Text(Some(&this_database()))],
        )
    })?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    let tombstone = Tombstone {
        id: new_id().map_err(|e| Error::internal(e.to_string()))?,
        at: xact::timestamp_text(xact::now()?),
        what,
        policy: policy.to_owned(),
        lineage: row.string(0)?,
        home: row.string(1)?,
        orders: orders.to_vec(),
        of: of.map(str::to_owned),
    };
    lock_of(&tombstone.id)?.take(Mode::Alone)?;
    tombstones::write(tombstone, master.current().signer(), when)
}

/// The lock that the transaction of a line has until it ends: while somebody has it, whether it comes true is open.
///
/// # Errors
/// Errors of the server.
pub fn lock_of(id: &str) -> Result<Own> {
    let part = |from, to| id.get(from..to).and_then(|t| u32::from_str_radix(t, 16).ok());
    lock(
        part(0, 8).unwrap_or_default(),
        part(8, 12).and_then(|n| u16::try_from(n).ok()).unwrap_or_default(),
    )
}

/// The right to change how far this database has read.
///
/// # Errors
/// Errors of the server.
pub fn mark_lock() -> Result<Own> {
    lock(0, 0)
}

fn lock(object: u32, kind: u16) -> Result<Own> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT 'amazon_pii.tombstone_mark'::pg_catalog.regclass::pg_catalog.oid",
            &[],
        )
    })?;
    let class = rows.first().ok_or_else(|| Error::internal("no row"))?.oid(0)?;
    Ok(Own { class, object, kind })
}
