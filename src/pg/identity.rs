//! Acting as somebody: as a table's owner on the user's tables, as the extension's owner on our own.
//! The same switch that ANALYZE makes before it calls code of a table's owner.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString};

use pgrx::pg_sys;

use super::deadline;
use super::error::{Error, Result};
use super::sql;
use super::subxact::subtransaction;
use super::version;
use super::xact;

/// On whose behalf a statement runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// The owner of the extension: our own tables and the archive, nothing of the user's.
    Extension,
    /// The owner of a user's table: rows, expressions, triggers and casts run with this role's rights and no others.
    Owner(pg_sys::Oid),
}

/// Settings under which values leave and come back, whatever the session has set: the same text on both ways. Values as
/// the server shows them, without units.
const PINNED: &[(&str, &str)] = &[
    ("DateStyle", "ISO, YMD"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    ("xmloption", "content"),
    ("xmlbinary", "base64"),
    ("array_nulls", "on"),
    ("standard_conforming_strings", "on"),
    ("transform_null_equals", "off"),
    ("row_security", "off"),
    ("session_replication_role", "origin"),
    // A trigger's RAISE WARNING '%', OLD would otherwise reach the server log, or the caller.
    ("client_min_messages", "error"),
    ("log_min_messages", "fatal"),
    ("lock_timeout", "2000"),
    ("jit", "off"),
    ("max_parallel_workers_per_gather", "0"),
    ("plan_cache_mode", "force_custom_plan"),
];

/// A path without the user's schemas, for statements on our own tables.
pub const OWN_PATH: &str = "pg_catalog, pg_temp";

/// Planner settings for statements that start from a batch's keys: the only sane plan is a loop over an index, and
/// tables that were never analyzed must not talk the planner into another.
pub const KEYED: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// Runs `f` in a subtransaction as `who`, with `search_path`, the pinned settings and `extra`, which comes before them; all of
/// it is undone on every way out.
///
/// # Errors
/// As `f`; an error of the server keeps its SQLSTATE only.
pub fn act_as<T>(who: Identity, search_path: &str, extra: &[(&str, &str)], f: impl FnOnce() -> Result<T>) -> Result<T> {
    match who {
        Identity::Extension => switch(extension_owner()?, search_path, extra, f),
        Identity::Owner(role) => {
            let _unheard = Unheard::begin();
            deadline::within(|| switch(role, search_path, extra, f))
        }
    }
}

fn switch<T>(role: pg_sys::Oid, search_path: &str, extra: &[(&str, &str)], f: impl FnOnce() -> Result<T>) -> Result<T> {
    subtransaction(|| {
        let mut saved_user = pg_sys::InvalidOid;
        let mut saved_context = 0;
        // SAFETY: plain getters and setters of backend state. On an error the subtransaction's abort restores user,
        // context and settings; on success the lines below do.
        let nest_level = unsafe {
            pg_sys::GetUserIdAndSecContext(&mut saved_user, &mut saved_context);
            pg_sys::SetUserIdAndSecContext(
                role,
                saved_context | (pg_sys::SECURITY_LOCAL_USERID_CHANGE | pg_sys::SECURITY_RESTRICTED_OPERATION) as i32,
            );
            pg_sys::NewGUCNestLevel()
        };
        set_local("search_path", search_path)?;
        let pinned = PINNED
            .iter()
            .filter(|(name, _)| extra.iter().all(|(other, _)| other != name));
        for (name, value) in pinned.chain(extra) {
            set_local(name, value)?;
        }
        if IMPATIENT.get() {
            set_local("lock_timeout", "200")?;
        }
        let value = f()?;
        // SAFETY: as above; `nest_level` is the level opened above.
        unsafe {
            pg_sys::AtEOXact_GUC(false, nest_level);
            pg_sys::SetUserIdAndSecContext(saved_user, saved_context);
        }
        Ok(value)
    })
}

/// Keeps what a table owner's code says from the caller: RAISE INFO obeys no setting. Ends when dropped.
struct Unheard(pg_sys::CommandDest::Type);

impl Unheard {
    fn begin() -> Self {
        // SAFETY: a backend-local variable that says where messages go; the results of the caller's statement have
        // their own receiver.
        unsafe {
            let saved = pg_sys::whereToSendOutput;
            pg_sys::whereToSendOutput = pg_sys::CommandDest::DestNone;
            Self(saved)
        }
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { pg_sys::whereToSendOutput = self.0 }
    }
}

/// [`act_as`] the extension's owner, on our own tables.
///
/// # Errors
/// As `f`.
pub fn as_extension<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    act_as(Identity::Extension, OWN_PATH, &[], f)
}

/// [`as_extension`], for statements that start from a batch's keys: our own tables grow with the shop, and are never
/// analyzed where autovacuum is off.
///
/// # Errors
/// As `f`.
pub fn on_keys<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    act_as(Identity::Extension, OWN_PATH, KEYED, f)
}

/// Sets one setting for the innermost nest level, whose end undoes whatever happened to it there; one that has the value
/// already needs no setting.
fn set_local(name: &str, value: &str) -> Result<()> {
    let text = |s: &str| CString::new(s).map_err(|_| Error::internal("a setting holds a NUL"));
    let (name, value) = (text(name)?, text(value)?);
    // SAFETY: NUL-terminated name; the result is NULL or a string of the server's, read before anything else is done.
    unsafe {
        let current = pg_sys::GetConfigOption(name.as_ptr(), true, false);
        if !current.is_null() && CStr::from_ptr(current) == value.as_c_str() {
            return Ok(());
        }
    }
    // SAFETY: both strings live through the call, which copies them. PGC_SUSET because the pins must hold whatever
    // the current role may set; they end with the nest level.
    unsafe {
        pg_sys::set_config_option(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_SESSION,
            pg_sys::GucAction::GUC_ACTION_SAVE,
            true,
            0,
            false,
        );
    }
    Ok(())
}

/// While it lives, switches wait for locks for a moment only: in a trigger the user's statement waits with them.
#[must_use]
pub struct Impatient(bool);

/// Begins to be impatient; ends when dropped, on every way out of the block.
pub fn impatient() -> Impatient {
    Impatient(IMPATIENT.replace(true))
}

impl Drop for Impatient {
    fn drop(&mut self) {
        IMPATIENT.set(self.0);
    }
}

thread_local! {
    static HELPED: RefCell<Option<String>> = const { RefCell::new(None) };
    static IMPATIENT: Cell<bool> = const { Cell::new(false) };
    /// (extension, its owner): looked up once a backend, again after DROP and CREATE EXTENSION. Of our version: an extension
    /// never goes back to an earlier one.
    static OWNER: Cell<(pg_sys::Oid, pg_sys::Oid)> = const { Cell::new((pg_sys::InvalidOid, pg_sys::InvalidOid)) };
}

/// The role that owns the extension, and so its tables.
///
/// # Errors
/// The extension is not installed in this database, or is of another version there than this library.
pub fn extension_owner() -> Result<pg_sys::Oid> {
    owner_where(version::require_same)
}

/// [`as_extension`], also where the extension is of another version: for what was the same in all of them.
///
/// # Errors
/// As `f`.
pub fn as_extension_of_any_version<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    switch(owner_where(|_| Ok(()))?, OWN_PATH, &[], f)
}

/// The extension's owner, if its version may be `good`.
fn owner_where(good: fn(&str) -> Result<()>) -> Result<pg_sys::Oid> {
    // SAFETY: catalog lookup inside a transaction, NUL-terminated name.
    let extension = unsafe { pg_sys::get_extension_oid(c"amazon_pii".as_ptr(), true) };
    if extension == pg_sys::InvalidOid {
        return Err(Error::undefined(
            "extension \"amazon_pii\" is not installed in this database",
        ));
    }
    let (known, owner) = OWNER.get();
    if known == extension {
        return Ok(owner);
    }
    let rows = sql::read(
        "SELECT extowner, extversion, xmin FROM pg_catalog.pg_extension WHERE oid OPERATOR(pg_catalog.=) $1",
        &[sql::Arg::Oid(extension)],
    )?;
    let row = rows.first().ok_or_else(|| Error::internal("extension has no owner"))?;
    let (owner, version) = (row.oid(0)?, row.str(1)?);
    good(version)?;
    // ALTER EXTENSION … UPDATE may yet be rolled back.
    let written_by = row.str(2)?.parse().unwrap_or(0);
    if version::require_same(version).is_ok() && !xact::is_own(written_by) {
        OWNER.set((extension, owner));
    }
    Ok(owner)
}

/// The role in whose name the caller runs: the current user outside of any switch of ours.
pub fn current_role() -> pg_sys::Oid {
    // SAFETY: plain getter.
    unsafe { pg_sys::GetUserId() }
}

/// Whether `member` has the privileges of `role`; superusers have all.
pub fn has_privileges(member: pg_sys::Oid, role: pg_sys::Oid) -> bool {
    // SAFETY: catalog lookup inside a transaction.
    unsafe { pg_sys::has_privs_of_role(member, role) }
}

/// Whether the current user is a superuser.
pub fn is_superuser() -> bool {
    // SAFETY: catalog lookup inside a transaction.
    unsafe { pg_sys::superuser() }
}

/// Whether the current user has the privileges of a role that is named.
pub fn has_role(role: &str) -> bool {
    named(role).is_some_and(|oid| has_privileges(current_role(), oid))
}

/// Whether a user, by its name, has the privileges of a role that is named.
pub fn user_has_role(user: &str, role: &str) -> bool {
    match (named(user), named(role)) {
        (Some(user), Some(role)) => has_privileges(user, role),
        _ => false,
    }
}

/// Whether there is a role of that name.
pub fn role_exists(role: &str) -> bool {
    named(role).is_some()
}

fn named(role: &str) -> Option<pg_sys::Oid> {
    let name = CString::new(role).ok()?;
    // SAFETY: NUL-terminated name; a missing role gives InvalidOid.
    let oid = unsafe { pg_sys::get_role_oid(name.as_ptr(), true) };
    (oid != pg_sys::InvalidOid).then_some(oid)
}

/// Refuses unless the current user is a member of one of the named capability roles. Who calls a function hears first of all if
/// the extension in the database is of another version than this library.
///
/// # Errors
/// 42501, naming the roles; another version.
pub fn require_role(roles: &[&str], what: &str) -> Result<()> {
    if roles.iter().any(|role| has_role(role)) {
        return extension_owner().map(drop);
    }
    Err(Error::privilege(format!("permission denied to {what}"))
        .detail(format!("It needs the privileges of {}.", roles.join(" or "))))
}

/// The name that the session logged in under, or took with SET SESSION AUTHORIZATION; in a process that helps another, the
/// other's.
pub fn session_user() -> String {
    // SAFETY: plain getter.
    let own = || super::error::role_name(unsafe { pg_sys::GetSessionUserId() });
    HELPED.with_borrow(|helped| helped.clone().unwrap_or_else(own))
}

/// This process works for somebody else's session from now on. That is a name in records, no right.
pub fn work_for(session_user: String) {
    HELPED.set(Some(session_user));
}
