//! Settings, alphabetical. What a data protection officer would sign lives in the policy instead.

use std::ffi::CString;
use std::time::Duration;

use pgrx::{GucContext, GucFlags, GucRegistry, GucSetting};

static ACTOR: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static ARCHIVE_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(30_000);
static BATCH_PAUSE: GucSetting<i32> = GucSetting::<i32>::new(0);
static BATCH_SIZE: GucSetting<i32> = GucSetting::<i32>::new(1000);
static BATCH_TIME: GucSetting<i32> = GucSetting::<i32>::new(100);
static DATABASES: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static ENABLED: GucSetting<bool> = GucSetting::<bool>::new(true);
static KEY_COMMAND: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static KEY_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static NAPTIME: GucSetting<i32> = GucSetting::<i32>::new(60);
static REPLICA_LAG: GucSetting<i32> = GucSetting::<i32>::new(64);
static REPLICA_WAIT: GucSetting<i32> = GucSetting::<i32>::new(300);
static STATEMENT_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(300_000);
static TOMBSTONE_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(None);
static WORKERS: GucSetting<i32> = GucSetting::<i32>::new(1);

/// Defines the settings; called once, from `_PG_init`.
pub fn register() {
    GucRegistry::define_string_guc(
        c"amazon_pii.actor",
        c"The application's own user, recorded in the audit log beside the session user.",
        c"Set by applications that share one database role. Recorded, never trusted.",
        &ACTOR,
        GucContext::Userset,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.archive_timeout",
        c"Longest time that one access to a foreign archive may take.",
        c"Then it counts as not reachable. What the foreign data wrapper does outside of statements, such as connecting, has its own limits.",
        &ARCHIVE_TIMEOUT,
        100,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.batch_pause",
        c"Pause between two batches of a cycle.",
        c"Zero: none, unless somebody has waited for a row that a batch had locked. Nothing is locked during a pause.",
        &BATCH_PAUSE,
        0,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.batch_size",
        c"Orders in one transaction of a cycle, at most.",
        c"Batches are smaller where so many would take longer than amazon_pii.batch_time.",
        &BATCH_SIZE,
        1,
        100_000,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.batch_time",
        c"How long a transaction of a cycle, which holds row locks, should take.",
        c"Batches become smaller or larger accordingly, and smaller when somebody waits for their locks.",
        &BATCH_TIME,
        1,
        3_600_000,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_string_guc(
        c"amazon_pii.databases",
        c"Databases that the background worker serves, separated by commas.",
        c"Empty: every database that has the extension.",
        &DATABASES,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_bool_guc(
        c"amazon_pii.enabled",
        c"Whether the background worker runs cycles.",
        c"Off stops archiving and redaction by the worker; deadlines go on and are shown as overdue.",
        &ENABLED,
        GucContext::Sighup,
        GucFlags::default(),
    );
    GucRegistry::define_string_guc(
        c"amazon_pii.key_command",
        c"Shell command that prints the master keys, the current one first.",
        c"Run as the server's user whenever a key is needed. Takes precedence over amazon_pii.key_file.",
        &KEY_COMMAND,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_string_guc(
        c"amazon_pii.key_file",
        c"File with the master keys, the current one first.",
        c"One key a line, 64 hexadecimal digits or base64 of 32 bytes; refused when others than its owner can read it.",
        &KEY_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.naptime",
        c"Time between two cycles of the background worker.",
        c"",
        &NAPTIME,
        1,
        86_400,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.replica_lag",
        c"WAL that a connected standby or subscriber may have to catch up with before a cycle waits for it.",
        c"A cycle waits between two batches while one that is further behind falls back further. -1: never.",
        &REPLICA_LAG,
        -1,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.replica_wait",
        c"Longest time that a cycle waits at once for standbys and subscribers.",
        c"Then it goes on, and waits for none of them that has not caught up meanwhile.",
        &REPLICA_WAIT,
        1,
        86_400,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.statement_timeout",
        c"Longest time that a cycle's statement on the user's tables, or amazon_pii.key_command, may take.",
        c"Zero: no limit. An order whose statement takes longer fails, and waits like any other that failed.",
        &STATEMENT_TIMEOUT,
        0,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_string_guc(
        c"amazon_pii.tombstone_file",
        c"File, outside of the data directory, that tells after a restore which archives have been destroyed since.",
        c"Absolute path; made when it is missing, refused when others than its owner can read or write it. Empty: none is kept.",
        &TOMBSTONE_FILE,
        GucContext::Sighup,
        GucFlags::SUPERUSER_ONLY,
    );
    GucRegistry::define_int_guc(
        c"amazon_pii.workers",
        c"Background workers that may run cycles at the same time, one a database.",
        c"",
        &WORKERS,
        1,
        64,
        GucContext::Sighup,
        GucFlags::default(),
    );
    // SAFETY: NUL-terminated constant; called once, at load.
    unsafe {
        #[cfg(feature = "pg14")]
        pgrx::pg_sys::EmitWarningsOnPlaceholders(c"amazon_pii".as_ptr());
        #[cfg(not(feature = "pg14"))]
        pgrx::pg_sys::MarkGUCPrefixReserved(c"amazon_pii".as_ptr());
    }
}

fn text(setting: &GucSetting<Option<CString>>) -> Option<String> {
    setting
        .get()
        .map(|c| c.to_string_lossy().into_owned())
        .filter(|s| !s.is_empty())
}

/// The application's own user, if it set one; blanks are none.
pub fn actor() -> Option<String> {
    text(&ACTOR).filter(|actor| !actor.trim().is_empty())
}

/// Milliseconds that one access to a foreign archive may take.
pub fn archive_timeout() -> i32 {
    ARCHIVE_TIMEOUT.get()
}

/// Pause between two batches.
pub fn batch_pause() -> Duration {
    Duration::from_millis(BATCH_PAUSE.get().unsigned_abs().into())
}

/// Orders in one transaction, at most.
pub fn batch_size() -> i64 {
    i64::from(BATCH_SIZE.get())
}

/// How long one of a batch's transactions should take.
pub fn batch_time() -> Duration {
    Duration::from_millis(BATCH_TIME.get().unsigned_abs().into())
}

/// Databases to serve; empty means discovery.
pub fn databases() -> Vec<String> {
    text(&DATABASES)
        .map(|list| {
            list.split(',')
                .map(|d| d.trim().to_owned())
                .filter(|d| !d.is_empty())
                .collect()
        })
        .unwrap_or_default()
}

/// Whether the worker runs cycles.
pub fn enabled() -> bool {
    ENABLED.get()
}

/// Command that prints the master keys.
pub fn key_command() -> Option<String> {
    text(&KEY_COMMAND)
}

/// File with the master keys.
pub fn key_file() -> Option<String> {
    text(&KEY_FILE)
}

/// Seconds between two cycles.
pub fn naptime() -> u64 {
    NAPTIME.get().unsigned_abs().into()
}

/// Bytes that a replica may be behind before a cycle waits for it; `None` when it never does.
pub fn replica_lag() -> Option<u64> {
    u64::try_from(REPLICA_LAG.get()).ok().map(|megabytes| megabytes << 20)
}

/// Longest time that a cycle waits at once for a replica.
pub fn replica_wait() -> Duration {
    Duration::from_secs(REPLICA_WAIT.get().unsigned_abs().into())
}

/// Milliseconds that a statement with code of a table's owner may take in a cycle; 0 is no limit.
pub fn statement_timeout() -> i32 {
    STATEMENT_TIMEOUT.get()
}

/// File that tells which archives have been destroyed.
pub fn tombstone_file() -> Option<String> {
    text(&TOMBSTONE_FILE)
}

/// Workers that may run at the same time.
pub fn workers() -> usize {
    WORKERS.get().unsigned_abs() as usize
}

/// Bytes that the server gives to a maintenance command: `maintenance_work_mem`.
pub fn maintenance_memory() -> usize {
    // SAFETY: a plain variable, in kilobytes, never negative.
    let kilobytes = unsafe { pgrx::pg_sys::maintenance_work_mem };
    kilobytes.unsigned_abs() as usize * 1024
}
