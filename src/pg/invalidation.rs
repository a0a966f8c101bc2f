//! Tells when a table that a cached plan knows has changed: the server's own invalidation messages.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::error::Result;
use super::identity::as_extension;
use super::sql::{self, Arg};

thread_local! {
    static GENERATION: Cell<u64> = const { Cell::new(1) };
    static WATCHED: RefCell<BTreeSet<u32>> = const { RefCell::new(BTreeSet::new()) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Changes whenever a watched table did, in whatever session.
pub fn generation() -> u64 {
    GENERATION.get()
}

/// Watches tables, and the tables that hold the policies.
///
/// # Errors
/// Errors of the server.
pub fn watch(relations: impl Iterator<Item = pg_sys::Oid>) -> Result<()> {
    if !REGISTERED.replace(true) {
        // SAFETY: registered once a backend, for its whole life; the callback only sets backend-local values.
        unsafe {
            pg_sys::CacheRegisterRelcacheCallback(Some(relation_changed), pg_sys::Datum::from(0));
            // Plans name their tables with their schemas.
            pg_sys::CacheRegisterSyscacheCallback(
                pg_sys::SysCacheIdentifier::NAMESPACEOID as i32,
                Some(schema_changed),
                pg_sys::Datum::from(0),
            );
        }
    }
    // Whoever writes to the shop's tables need not have rights on our schema.
    let own = as_extension(|| sql::read("SELECT 'amazon_pii.policy'::pg_catalog.regclass::pg_catalog.oid", &[]))?;
    let own = own.iter().map(|r| r.oid(0)).collect::<Result<Vec<_>>>()?;
    WATCHED.with_borrow_mut(|w| w.extend(relations.chain(own).map(u32::from)));
    Ok(())
}

/// Tells every session that a policy has changed, at commit.
///
/// # Errors
/// Errors of the server.
pub fn announce_policy_change() -> Result<()> {
    let rows = sql::read(
        "SELECT $1::pg_catalog.regclass::pg_catalog.oid",
        &[Arg::Text(Some("amazon_pii.policy"))],
    )?;
    for row in &rows {
        let oid = row.oid(0)?;
        // SAFETY: sends an invalidation message for an existing relation at the end of the transaction.
        unsafe { pg_sys::CacheInvalidateRelcacheByRelid(oid) };
    }
    Ok(())
}

#[pg_guard]
extern "C-unwind" fn schema_changed(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    GENERATION.set(GENERATION.get() + 1);
}

#[pg_guard]
extern "C-unwind" fn relation_changed(_arg: pg_sys::Datum, relation: pg_sys::Oid) {
    let ours = relation == pg_sys::InvalidOid
        || WATCHED
            .try_with(|w| w.try_borrow().is_ok_and(|w| w.contains(&u32::from(relation))))
            .unwrap_or(true);
    if ours {
        GENERATION.set(GENERATION.get() + 1);
    }
}
