//! Background workers, as far as the server is concerned: registering, starting, signals, sleeping, transactions.

pub mod board;
pub mod desk;
pub mod segment;

use std::ffi::{CStr, CString, c_char, c_int};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use pgrx::pg_sys;
use pgrx::pg_sys::PgTryBuilder;

use super::error::{Error, Result};

/// The library in which the server looks up entry points.
const LIBRARY: &str = "amazon_pii";

/// What a worker of ours is called and where it starts. The name is also its `backend_type`, which begins with
/// `amazon_pii`: the status view looks for that. Both are shorter than the server's 96 bytes.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    pub function: &'static str,
}

impl Kind {
    fn worker(self) -> pg_sys::BackgroundWorker {
        let mut worker = pg_sys::BackgroundWorker {
            bgw_flags: (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as c_int,
            // On a standby nothing of ours starts before it is promoted.
            bgw_start_time: pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished,
            bgw_restart_time: pg_sys::BGW_NEVER_RESTART,
            ..Default::default()
        };
        put(&mut worker.bgw_name, self.name);
        put(&mut worker.bgw_type, self.name);
        put(&mut worker.bgw_library_name, LIBRARY);
        put(&mut worker.bgw_function_name, self.function);
        worker
    }
}

/// Copies into a field that is all zeros, leaving at least the last one.
fn put(field: &mut [c_char], text: &str) {
    let room = field.len().saturating_sub(1);
    for (to, from) in field.iter_mut().take(room).zip(text.bytes()) {
        *to = from as c_char;
    }
}

/// What a dynamic worker is told: a database, and a number whose meaning its kind defines.
#[derive(Debug, Clone, Copy)]
pub struct Errand {
    pub database: pg_sys::Oid,
    pub number: u32,
}

impl Errand {
    fn pack(self) -> pg_sys::Datum {
        pg_sys::Datum::from(u64::from(self.number) << 32 | u64::from(self.database.to_u32()))
    }

    /// Reads the argument of a worker's entry point.
    pub fn unpack(datum: pg_sys::Datum) -> Self {
        let packed = datum.value() as u64;
        Self {
            database: pg_sys::Oid::from((packed & 0xffff_ffff) as u32),
            number: (packed >> 32) as u32,
        }
    }
}

/// Whether the library is being loaded by the postmaster, which alone can register a static worker. Not so during
/// pg_upgrade, where nothing of ours may run.
pub fn preloading() -> bool {
    // SAFETY: plain variables of the server.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress && !pg_sys::IsBinaryUpgrade }
}

/// Registers a worker that the postmaster keeps running.
pub fn register(kind: Kind, restart_after: Duration) {
    let mut worker = kind.worker();
    worker.bgw_restart_time = c_int::try_from(restart_after.as_secs()).unwrap_or(1).max(1);
    // SAFETY: a fully initialised struct, which the server copies.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) }
}

/// A dynamic worker that was asked for. Its end sets the latch of the process that holds this.
#[derive(Debug)]
pub struct Handle(*mut pg_sys::BackgroundWorkerHandle);

/// A worker with the segment that it works on. It ends when this is dropped, or when this process ends.
#[derive(Debug)]
pub struct Member {
    // Dropped before the handle, which it refers to.
    pub segment: segment::Segment,
    pub handle: Handle,
}

impl Member {
    /// Asks for a worker that is told `request`; `None` when the server has no room for one.
    pub fn start(kind: Kind, request: &[u8]) -> Option<Self> {
        let segment = segment::Segment::create(request)?;
        let errand = Errand {
            database: current_database(),
            number: segment.handle(),
        };
        let handle = Handle::start(kind, errand)?;
        segment.outlive_transactions(&handle);
        Some(Self { segment, handle })
    }
}

impl Handle {
    /// Asks the postmaster for a worker; `None` when no slot is free.
    pub fn start(kind: Kind, errand: Errand) -> Option<Self> {
        let mut worker = kind.worker();
        worker.bgw_main_arg = errand.pack();
        let mut handle = std::ptr::null_mut();
        // SAFETY: a fully initialised struct, which the server copies. The handle is allocated in a context that lives
        // as long as the process, since it outlives the transaction.
        let started = unsafe {
            worker.bgw_notify_pid = pg_sys::MyProcPid;
            let context = pg_sys::MemoryContextSwitchTo(pg_sys::TopMemoryContext);
            let started = pg_sys::RegisterDynamicBackgroundWorker(&mut worker, &mut handle);
            pg_sys::MemoryContextSwitchTo(context);
            started
        };
        if !started {
            // Whoever asks again finds room.
            desk::dismiss();
        }
        // Not `then_some`: a handle that was never given must not be made, and so not dropped.
        started.then(|| Self(handle))
    }

    /// Whether the worker has ended, or will never start.
    pub fn stopped(&self) -> bool {
        let mut pid = 0;
        // SAFETY: the handle is valid until it is dropped.
        unsafe { pg_sys::GetBackgroundWorkerPid(self.0, &mut pid) == pg_sys::BgwHandleStatus::BGWH_STOPPED }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: palloc'd by the server for us and not used afterwards.
        unsafe { pg_sys::pfree(self.0.cast()) }
    }
}

/// The server's own handlers: pgrx's guards wrap functions that are called, a signal handler is installed as it is.
mod handler {
    use std::ffi::c_int;

    unsafe extern "C-unwind" {
        pub(super) fn die(signal: c_int);
        #[link_name = "SignalHandlerForConfigReload"]
        pub(super) fn config_reload(signal: c_int);
    }
}

/// What a worker connects to.
#[derive(Debug, Clone, Copy)]
pub enum Connection {
    /// Catalogs that all databases share, and so no database whose DROP would have to wait.
    SharedCatalogs,
    Database(pg_sys::Oid),
}

/// Settings of a worker's session, above what a database or role has set.
const SETTINGS: &[(&CStr, &CStr)] = &[
    (c"application_name", c"amazon_pii"),
    (c"search_path", c"pg_catalog, pg_temp"),
    (c"default_transaction_isolation", c"read committed"),
    (c"default_transaction_read_only", c"off"),
    (c"default_transaction_deferrable", c"off"),
    (c"max_parallel_workers_per_gather", c"0"),
    (c"statement_timeout", c"0"),
    (c"idle_in_transaction_session_timeout", c"0"),
    (c"lock_timeout", c"5s"),
    (c"client_min_messages", c"error"),
];

/// First thing in a worker: signals, connection as the bootstrap superuser (table owners often cannot log in), settings.
/// A database that is gone ends the process.
pub fn enter(connection: Connection) {
    // SAFETY: at the start of a worker's main function, once. `die` rather than pgrx's handler, which does not
    // interrupt a running statement; SIGINT keeps the server's handler, on which pg_cancel_backend depends.
    unsafe {
        install(pg_sys::SIGHUP as c_int, handler::config_reload);
        install(pg_sys::SIGTERM as c_int, handler::die);
        pg_sys::BackgroundWorkerUnblockSignals();
        match connection {
            Connection::SharedCatalogs => {
                pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
            }
            Connection::Database(oid) => {
                pg_sys::BackgroundWorkerInitializeConnectionByOid(oid, pg_sys::InvalidOid, 0);
            }
        }
    }
    for (name, value) in SETTINGS {
        set(name, value);
    }
    // What it was started with may be older than what the server has told it since.
    reload_if_asked();
}

/// # Safety
/// The handler is async-signal-safe.
unsafe fn install(signal: c_int, handler: unsafe extern "C-unwind" fn(c_int)) {
    // SAFETY: the caller's.
    unsafe {
        #[cfg(not(feature = "pg18"))]
        pg_sys::pqsignal(signal, Some(handler));
        #[cfg(feature = "pg18")]
        pg_sys::pqsignal_be(signal, Some(handler));
    }
}

fn set(name: &CStr, value: &CStr) {
    // SAFETY: NUL-terminated strings, which the server copies. The source outranks what ALTER ROLE and ALTER DATABASE
    // set, and survives a reload.
    unsafe {
        pg_sys::SetConfigOption(
            name.as_ptr(),
            value.as_ptr(),
            pg_sys::GucContext::PGC_SUSET,
            pg_sys::GucSource::PGC_S_OVERRIDE,
        );
    }
}

/// Lets this session wait for locks for as long as it lives: somebody else ends it.
pub fn wait_for_locks() {
    set(c"lock_timeout", c"0");
}

/// The application's own user in whose name this session works.
pub fn set_actor(actor: &str) {
    if let Ok(actor) = CString::new(actor) {
        set(c"amazon_pii.actor", &actor);
    }
}

/// Makes commits of this session wait for the disk, where the server is set up not to.
pub fn commit_durably() {
    // SAFETY: plain variable; 0 is SYNCHRONOUS_COMMIT_OFF.
    if unsafe { pg_sys::synchronous_commit } == 0 {
        set(c"synchronous_commit", c"local");
    }
}

/// Sleeps until the latch is set or the time is over. SIGTERM does not return from here.
pub fn sleep(at_most: Duration) {
    let flags = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    let millis = at_most.as_millis().clamp(1, 86_400_000) as std::ffi::c_long;
    // SAFETY: this process's own latch. It is reset before whatever it announces is looked at.
    unsafe {
        pg_sys::WaitLatch(pg_sys::MyLatch, flags as c_int, millis, pg_sys::PG_WAIT_EXTENSION);
        pg_sys::ResetLatch(pg_sys::MyLatch);
    }
    pgrx::check_for_interrupts!();
}

/// Whether there was a SIGHUP since the configuration was read.
pub fn is_reload_asked() -> bool {
    // SAFETY: a flag that a signal handler sets.
    unsafe { (&raw const pg_sys::ConfigReloadPending).read_volatile() != 0 }
}

/// Reads the configuration again after a SIGHUP; whether it did.
pub fn reload_if_asked() -> bool {
    if !is_reload_asked() {
        return false;
    }
    // SAFETY: the flag is set by the signal handler. In a session it is cleared here, and between two statements by the
    // server.
    unsafe {
        (&raw mut pg_sys::ConfigReloadPending).write_volatile(0);
        pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
    }
    true
}

/// Runs `f` in a transaction with a snapshot: committed on `Ok`, rolled back on `Err` and on an error of the server.
///
/// # Errors
/// As `f`; an error of the server keeps its SQLSTATE only.
pub fn transaction<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    open_transaction(|| {
        // SAFETY: inside a transaction; popped before COMMIT, by the abort otherwise.
        unsafe { pg_sys::PushActiveSnapshot(pg_sys::GetTransactionSnapshot()) };
        let value = f()?;
        // SAFETY: pushed above, and `f` leaves none of its own.
        unsafe { pg_sys::PopActiveSnapshot() };
        Ok(value)
    })
}

/// Like [`transaction`], for code that commits in between and keeps a transaction open: no snapshot is held.
///
/// # Errors
/// As [`transaction`].
pub fn open_transaction<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    let body = || {
        // SAFETY: no transaction is open; COMMIT ends the one that is open then.
        unsafe {
            pg_sys::SetCurrentStatementStartTimestamp();
            pg_sys::StartTransactionCommand();
            let value = f()?;
            pg_sys::CommitTransactionCommand();
            Ok(value)
        }
    };
    let result = PgTryBuilder::new(AssertUnwindSafe(body))
        .catch_others(|e| Err(e.into()))
        .catch_rust_panic(|e| Err(e.into()))
        .execute();
    // SAFETY: aborting is what ends a transaction in any state, also when an error was caught in the middle of it.
    unsafe {
        if result.is_err() {
            pg_sys::AbortCurrentTransaction();
        }
        pg_sys::pgstat_report_stat(true);
    }
    result
}

/// What pg_stat_activity shows of this worker while it works.
pub fn report_running(what: &str) {
    let text = CString::new(what).unwrap_or_default();
    // SAFETY: NUL-terminated; the server copies it.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, text.as_ptr()) }
}

/// After [`report_idle`]: the worker goes on with what it said last.
pub fn report_running_again() {
    // SAFETY: as in `report_idle`.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, std::ptr::null()) }
}

/// The worker waits, or is about to end.
pub fn report_idle() {
    // SAFETY: NULL is allowed and leaves the last text.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_IDLE, std::ptr::null()) }
}

/// The database of this process; invalid in a process without one.
pub fn current_database() -> pg_sys::Oid {
    // SAFETY: plain variable.
    unsafe { pg_sys::MyDatabaseId }
}

/// This process.
pub fn pid() -> i64 {
    // SAFETY: plain variable.
    i64::from(unsafe { pg_sys::MyProcPid })
}

/// A database that takes connections.
#[derive(Debug, Clone)]
pub struct Database {
    pub oid: pg_sys::Oid,
    pub name: String,
    pub template: bool,
}

/// All databases that take connections. Works without a connection to any of them, and so without SQL.
///
/// # Errors
/// Errors of the server.
pub fn databases() -> Result<Vec<Database>> {
    transaction(|| {
        let mut found = Vec::new();
        // SAFETY: a sequential scan of a shared catalog: rows are read while the scan holds them, as the struct that
        // the catalog's fixed part is.
        unsafe {
            let relation = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as c_int);
            let scan = pg_sys::table_beginscan_catalog(relation, 0, std::ptr::null_mut());
            loop {
                let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                if tuple.is_null() {
                    break;
                }
                let row = &*pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_database>();
                // -2 marks a database whose DROP was interrupted.
                if row.datallowconn && row.datconnlimit != -2 {
                    found.push(Database {
                        oid: row.oid,
                        name: CStr::from_ptr(row.datname.data.as_ptr()).to_string_lossy().into_owned(),
                        template: row.datistemplate,
                    });
                }
            }
            pg_sys::table_endscan(scan);
            pg_sys::table_close(relation, pg_sys::AccessShareLock as c_int);
        }
        Ok(found)
    })
}

/// A line in the server's log.
pub fn log(error: &Error, what: &str) {
    pgrx::log!("amazon_pii: {what}: {}", error.stored());
}
