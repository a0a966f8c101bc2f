//! Data keys under another master key: they are unwrapped and wrapped again, what they seal stays as it is.

use super::schema::refuse_foreign_hands;
use crate::domain::vault::{DataKey, KeyBinding, MasterKeys};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg};

/// The schemas that hold an archive, those of dropped policies too.
///
/// # Errors
/// Errors of the server.
pub fn schemas() -> Result<Vec<Ident>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_catalog.pg_class d ON d.relnamespace = n.oid AND d.relname = 'document' AND d.relkind IN ('r', 'p', 'f') \
                JOIN pg_catalog.pg_extension e ON e.extname = 'amazon_pii' \
             WHERE c.relname = 'data_key' AND c.relkind IN ('r', 'p') \
                AND NOT EXISTS (SELECT FROM pg_catalog.pg_roles r WHERE r.oid IN (n.nspowner, c.relowner, d.relowner) \
                    AND r.oid <> e.extowner AND NOT r.rolsuper) \
                AND 5 = (SELECT pg_catalog.count(*) FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped \
                    AND a.attname IN ('policy', 'order_key', 'key_id', 'wrapped', 'master_key_id')) ORDER BY n.nspname",
            &[],
        )
    })?;
    rows.iter().map(|r| Ok(Ident::new(r.string(0)?))).collect()
}

/// How many data keys of an archive each master key wraps.
///
/// # Errors
/// Errors of the server.
pub fn wrapped_by(schema: &Ident) -> Result<Vec<(String, i64)>> {
    let rows = as_extension(|| {
        refuse_foreign_hands(schema)?;
        sql::read(
            &format!("SELECT d.master_key_id, pg_catalog.count(*) FROM {schema}.data_key d GROUP BY d.master_key_id"),
            &[],
        )
    })?;
    rows.iter().map(|r| Ok((r.string(0)?, r.int(1)?))).collect()
}

/// Where a pass through the data keys of an archive is: order, policy, data key.
pub type Place = [String; 3];

/// What one step did.
pub struct Step {
    pub rewrapped: i64,
    /// Where the next one goes on; none at the end.
    pub next: Option<Place>,
}

/// Wraps the next data keys anew that the current master key does not wrap. Those that cannot be unwrapped stay as they are, and
/// so do those that somebody has locked.
///
/// # Errors
/// Errors of the server.
pub fn rewrap(schema: &Ident, keys: &MasterKeys, after: Option<&Place>, size: i64) -> Result<Step> {
    let current = keys.current();
    let [order, policy, key] = after.map_or([""; 3], |place| [&*place[0], &*place[1], &*place[2]]);
    let rows = on_keys(|| {
        refuse_foreign_hands(schema)?;
        sql::write_bytes(
            &format!(
                "SELECT d.order_key, d.policy, d.key_id, d.wrapped, d.master_key_id FROM {schema}.data_key d \
                 WHERE (d.order_key, d.policy, d.key_id) > ($1, $2, $3) AND d.master_key_id <> $4 \
                 ORDER BY d.order_key, d.policy, d.key_id LIMIT $5 FOR UPDATE SKIP LOCKED"
            ),
            &[
                Arg::Text(Some(order)),
                Arg::Text(Some(policy)),
                Arg::Text(Some(key)),
                Arg::Text(Some(current.id())),
                Arg::Int(size),
            ],
        )
    })?;
    let (mut places, mut wraps) = (Vec::new(), Vec::new());
    for row in &rows {
        let binding = KeyBinding {
            order_key: row.str(0)?,
            policy: row.str(1)?,
            key_id: row.str(2)?,
        };
        if let Some(wrapped) = wrapped_anew(keys, row.str(4)?, row.bytes(3)?, &binding)? {
            places.push([row.str(0)?, row.str(1)?, row.str(2)?]);
            wraps.push(wrapped);
        }
    }
    let column = |i: usize| Arg::Texts(places.iter().map(|p| Some(p[i])).collect());
    on_keys(|| {
        sql::execute(
            &format!(
                "UPDATE {schema}.data_key d SET wrapped = n.w, master_key_id = $5 FROM ROWS FROM (pg_catalog.unnest($1), \
                    pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (o, p, k, w) \
                 WHERE d.order_key = n.o AND d.policy = n.p AND d.key_id = n.k"
            ),
            &[
                column(0),
                column(1),
                column(2),
                Arg::ByteArrays(wraps.iter().map(Vec::as_slice).collect()),
                Arg::Text(Some(current.id())),
            ],
        )
    })?;
    let last = rows.last().filter(|_| i64::try_from(rows.len()) == Ok(size));
    Ok(Step {
        rewrapped: wraps.len() as i64,
        next: last
            .map(|r| Ok::<_, Error>([r.string(0)?, r.string(1)?, r.string(2)?]))
            .transpose()?,
    })
}

/// A data key under the current master key; nothing where it cannot be unwrapped.
///
/// # Errors
/// No random numbers.
pub fn wrapped_anew(
    keys: &MasterKeys,
    master_key_id: &str,
    wrapped: &[u8],
    binding: &KeyBinding<'_>,
) -> Result<Option<Vec<u8>>> {
    let master = keys.get(master_key_id);
    let Some(key) = master.and_then(|master| DataKey::unwrap(wrapped, master, binding).ok()) else {
        return Ok(None);
    };
    let anew = key.wrap(keys.current(), binding);
    anew.map(Some)
        .map_err(|e| Error::internal(format!("sealing failed: {e}")))
}
