//! Tells when a table that a cached plan knows has changed: the server's own invalidation messages.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use pgrx::pg_sys;
use pgrx::prelude::*;

use super::catalog;

thread_local! {
    static GENERATION: Cell<u64> = const { Cell::new(1) };
    static POLICIES: Cell<u64> = const { Cell::new(1) };
    static OWN: Cell<u32> = const { Cell::new(0) };
    static WATCHED: RefCell<BTreeSet<u32>> = const { RefCell::new(BTreeSet::new()) };
    static REGISTERED: Cell<bool> = const { Cell::new(false) };
}

/// Changes whenever a watched table did, in whatever session.
pub fn generation() -> u64 {
    GENERATION.get()
}

/// What had been said of changes at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub generation: u64,
    /// Changes whenever a policy or a schema may have; not for a watched table alone.
    pub policies: u64,
}

/// What has been said until now.
pub fn stamp() -> Stamp {
    Stamp {
        generation: GENERATION.get(),
        policies: POLICIES.get(),
    }
}

/// Watches tables, and the table that holds the policies.
pub fn watch(relations: impl Iterator<Item = pg_sys::Oid>) {
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
    OWN.set(policies().map_or(0, u32::from));
    WATCHED.with_borrow_mut(|w| w.extend(relations.map(u32::from)));
}

/// The table that holds the policies.
fn policies() -> Option<pg_sys::Oid> {
    catalog::find(Some("amazon_pii"), "policy").ok().flatten()
}

/// Tells every session that a policy has changed, at commit.
pub fn announce_policy_change() {
    if let Some(oid) = policies() {
        // SAFETY: sends an invalidation message for an existing relation at the end of the transaction.
        unsafe { pg_sys::CacheInvalidateRelcacheByRelid(oid) };
    }
}

#[pg_guard]
extern "C-unwind" fn schema_changed(_arg: pg_sys::Datum, _cache: i32, _hash: u32) {
    POLICIES.set(POLICIES.get() + 1);
    GENERATION.set(GENERATION.get() + 1);
}

#[pg_guard]
extern "C-unwind" fn relation_changed(_arg: pg_sys::Datum, relation: pg_sys::Oid) {
    let all = relation == pg_sys::InvalidOid || u32::from(relation) == OWN.get();
    let ours = all
        || WATCHED
            .try_with(|w| w.try_borrow().is_ok_and(|w| w.contains(&u32::from(relation))))
            .unwrap_or(true);
    if all {
        POLICIES.set(POLICIES.get() + 1);
    }
    if ours {
        GENERATION.set(GENERATION.get() + 1);
    }
}
