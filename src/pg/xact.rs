//! Transactions of a cycle: committed batch by batch, by a procedure or by a worker.

use std::time::{Duration, Instant};

use pgrx::pg_sys;

use super::error::{Error, Result};
use super::ident::Ident;
use super::identity::as_extension;
use super::sql;
use super::subxact::{outside_subtransactions, subtransaction};
use super::worker;

/// Who owns the transactions that a cycle commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// `CALL`: a non-atomic SPI session is open around the cycle.
    Procedure,
    /// A background worker between transactions of its own.
    Worker,
}

impl Boundary {
    /// Commits what was done and begins the next transaction: READ COMMITTED, writable, whatever the session's defaults
    /// are.
    ///
    /// # Errors
    /// Errors of COMMIT unwind.
    pub fn commit(self) -> Result<()> {
        self.commit_and(|| ())
    }

    /// [`Boundary::commit`], and something that must be done when it is committed, even where a cancel or the session's end comes
    /// right then: plain code, which cannot fail.
    ///
    /// # Errors
    /// As [`Boundary::commit`].
    pub fn commit_and(self, then: impl FnOnce()) -> Result<()> {
        // SAFETY: no subtransaction is open and no SPI session but the procedure's own: every step of the engine
        // closes what it opened.
        unsafe {
            match self {
                Self::Procedure => {
                    pg_sys::SPI_commit();
                    then();
                }
                Self::Worker => {
                    pg_sys::CommitTransactionCommand();
                    then();
                    // A worker that writes must say so itself, or autovacuum never hears of the dead rows.
                    pg_sys::pgstat_report_stat(false);
                    // Nobody else moves now() on in a worker.
                    pg_sys::SetCurrentStatementStartTimestamp();
                    pg_sys::StartTransactionCommand();
                }
            }
            begin_read_committed();
            pgrx::check_for_interrupts!();
        }
        Ok(())
    }

    /// [`Boundary::commit`] where COMMIT itself may fail: a foreign server has a part in it. Then the transaction is rolled back,
    /// and the next one has begun all the same.
    ///
    /// # Errors
    /// What COMMIT raised.
    pub fn try_commit(self) -> Result<()> {
        let committed = outside_subtransactions(|| match self {
            // SAFETY: as in `commit`.
            Self::Procedure => unsafe { pg_sys::SPI_commit() },
            // SAFETY: as in `commit`; only what may fail is inside.
            Self::Worker => unsafe { pg_sys::CommitTransactionCommand() },
        });
        // SAFETY: as in `commit`. After an error SPI has aborted and begun a transaction by itself.
        unsafe {
            if self == Self::Worker {
                if committed.is_err() {
                    pg_sys::AbortCurrentTransaction();
                }
                pg_sys::pgstat_report_stat(false);
                pg_sys::SetCurrentStatementStartTimestamp();
                pg_sys::StartTransactionCommand();
            }
            begin_read_committed();
        }
        committed
    }

    /// Reads the configuration again when the server was told to, so that a long cycle heeds it. Commits in that case.
    ///
    /// # Errors
    /// As [`Boundary::commit`].
    pub fn reload(self) -> Result<()> {
        if worker::is_reload_asked() {
            self.commit()?;
            worker::reload_if_asked();
        }
        Ok(())
    }

    /// Commits, and waits: a worker outside of any transaction, a procedure in one that has done nothing yet and holds
    /// neither a lock nor a snapshot. How long is asked again when the configuration has changed.
    ///
    /// # Errors
    /// As [`Boundary::commit`].
    pub fn rest(self, time: impl Fn() -> Duration) -> Result<()> {
        self.commit()?;
        if self == Self::Worker {
            // SAFETY: as in `commit`; after an error here an abort finds nothing to abort.
            unsafe {
                pg_sys::CommitTransactionCommand();
                pg_sys::pgstat_report_stat(true);
            }
            worker::report_idle();
        }
        let begun = Instant::now();
        loop {
            worker::reload_if_asked();
            let left = time().saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            worker::sleep(left);
        }
        if self == Self::Worker {
            worker::report_running_again();
            // SAFETY: as in `commit`.
            unsafe {
                pg_sys::SetCurrentStatementStartTimestamp();
                pg_sys::StartTransactionCommand();
                begin_read_committed();
            }
        }
        Ok(())
    }

    /// Rolls back and begins anew.
    pub fn rollback(self) {
        // SAFETY: as in `commit`.
        unsafe {
            match self {
                Self::Procedure => pg_sys::SPI_rollback(),
                Self::Worker => {
                    pg_sys::AbortCurrentTransaction();
                    // Nobody else moves now() on in a worker.
                    pg_sys::SetCurrentStatementStartTimestamp();
                    pg_sys::StartTransactionCommand();
                }
            }
            begin_read_committed();
        }
    }
}

/// # Safety
/// Right after the start of a transaction, before its first snapshot.
unsafe fn begin_read_committed() {
    // SAFETY: backend-local variables, free to set until the first snapshot is taken.
    unsafe {
        pg_sys::XactIsoLevel = pg_sys::XACT_READ_COMMITTED as i32;
        pg_sys::XactReadOnly = false;
        pg_sys::XactDeferrable = false;
    }
}

/// Runs `f` with a non-atomic SPI session open, in which [`Boundary::Procedure`] can commit.
///
/// # Errors
/// As `f`.
pub fn non_atomic<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    // SAFETY: connected and finished in pairs; on an error the transaction's end cleans up.
    unsafe {
        if pg_sys::SPI_connect_ext(pg_sys::SPI_OPT_NONATOMIC as i32) != pg_sys::SPI_OK_CONNECT as i32 {
            return Err(Error::internal("no SPI session"));
        }
        let result = f();
        pg_sys::SPI_finish();
        result
    }
}

/// Fires the caller's pending deferred triggers now, as the caller: inside the switch to an owner they would run with
/// the owner's rights, and after a write there they could not fire at all.
///
/// # Errors
/// What a pending constraint raises unwinds, as it would at COMMIT.
pub fn fire_deferred() -> Result<()> {
    subtransaction(|| {
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        // SAFETY: plain getters and setters of backend state; on an error the subtransaction's abort restores both.
        // COMMIT would run these triggers as the outer user: inside a SECURITY DEFINER function the current one is the
        // function's owner.
        unsafe {
            pg_sys::GetUserIdAndSecContext(&mut user, &mut context);
            pg_sys::SetUserIdAndSecContext(pg_sys::GetOuterUserId(), 0);
        }
        sql::execute("SET CONSTRAINTS ALL IMMEDIATE", &[])?;
        // SAFETY: as above.
        unsafe { pg_sys::SetUserIdAndSecContext(user, context) };
        Ok(())
    })
}

/// After [`fire_deferred`]: constraints that are declared INITIALLY DEFERRED wait for COMMIT again. What the caller had
/// set itself cannot be read back; a constraint of its own choosing stays IMMEDIATE.
///
/// # Errors
/// Errors of the server.
pub fn defer_again() -> Result<()> {
    as_extension(|| {
        // SET CONSTRAINTS takes names, which several constraints of a schema may share. It takes partitions' along.
        let rows = sql::read(
            "SELECT n.nspname, c.conname FROM pg_catalog.pg_constraint c JOIN pg_catalog.pg_namespace n ON n.oid = c.connamespace \
             WHERE pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND c.conrelid <> 0 AND (c.connamespace, c.conname) IN ( \
                SELECT d.connamespace, d.conname FROM pg_catalog.pg_constraint d WHERE d.condeferred) \
             GROUP BY n.nspname, c.conname HAVING pg_catalog.bool_and(c.condeferred) ORDER BY 1, 2",
            &[],
        )?;
        if rows.is_empty() {
            return Ok(());
        }
        let names = rows
            .iter()
            .map(|r| Ok(format!("{}.{}", Ident::new(r.str(0)?), Ident::new(r.str(1)?))))
            .collect::<Result<Vec<_>>>()?;
        sql::execute(&format!("SET CONSTRAINTS {} DEFERRED", names.join(", ")), &[])?;
        Ok(())
    })
}

/// Whether somebody waits for a row that this transaction has locked or written.
pub fn is_waited_for() -> bool {
    // SAFETY: a plain getter, and a look at a lock that every transaction with an id holds until it ends. Whoever waits
    // for one of its rows waits for that; of several who want the same row, the first.
    unsafe {
        let id = pg_sys::GetTopTransactionIdIfAny();
        if id == pg_sys::InvalidTransactionId {
            return false;
        }
        let tag = pg_sys::LOCKTAG {
            locktag_field1: id.into_inner(),
            locktag_type: pg_sys::LockTagType::LOCKTAG_TRANSACTION as u8,
            locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
            ..Default::default()
        };
        pg_sys::LockHasWaiters(&tag, pg_sys::ExclusiveLock as pg_sys::LOCKMODE, false)
    }
}

/// Whether the transaction may not write.
pub fn is_read_only() -> bool {
    // SAFETY: plain getter.
    unsafe { pg_sys::XactReadOnly }
}

/// Whether the server replays somebody else's WAL.
pub fn in_recovery() -> bool {
    // SAFETY: plain getter.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Whether the session writes what another database has written, as logical replication does.
pub fn is_replica() -> bool {
    // SAFETY: reads a backend-local setting.
    unsafe { pg_sys::SessionReplicationRole == pg_sys::SESSION_REPLICATION_ROLE_REPLICA as i32 }
}

/// Refuses a procedure that commits where it cannot.
///
/// # Errors
/// It was called inside a transaction block, or on a standby.
pub fn require_commits(is_atomic: bool, what: &str) -> Result<()> {
    if is_atomic {
        return Err(Error::in_transaction(what));
    }
    if in_recovery() {
        return Err(Error::in_recovery(what));
    }
    Ok(())
}

/// Whether a row that this transaction id wrote is the current transaction's own.
pub fn is_own(xid: u32) -> bool {
    // SAFETY: looks at backend-local state; any number may be asked for.
    unsafe { pg_sys::TransactionIdIsCurrentTransactionId(pg_sys::TransactionId::from_inner(xid)) }
}

/// The current time in UTC, from the server.
///
/// # Errors
/// Never in practice.
pub fn now() -> Result<chrono::DateTime<chrono::Utc>> {
    // SAFETY: plain getter.
    let micros = unsafe { pg_sys::GetCurrentTimestamp() };
    instant(micros)
}

/// From 1970-01-01 to 2000-01-01, in microseconds.
const EPOCH_SHIFT: i64 = 946_684_800_000_000;

/// Microseconds since 2000-01-01 UTC, PostgreSQL's clock, as an instant.
fn instant(micros: i64) -> Result<chrono::DateTime<chrono::Utc>> {
    micros
        .checked_add(EPOCH_SHIFT)
        .and_then(chrono::DateTime::from_timestamp_micros)
        .ok_or_else(|| Error::internal("a time is out of range"))
}

/// A time that came as an argument, as text in UTC.
///
/// # Errors
/// It is infinite.
pub fn from_server(at: pgrx::datum::TimestampWithTimeZone) -> Result<String> {
    let micros: pg_sys::TimestampTz = at.into();
    if micros == i64::MAX || micros == i64::MIN {
        return Err(Error::invalid("the time must be finite"));
    }
    instant(micros).map(timestamp_text)
}

/// A time as a result, from microseconds since 1970-01-01 UTC.
///
/// # Errors
/// It is out of range.
pub fn to_server(micros: i64) -> Result<pgrx::datum::TimestampWithTimeZone> {
    let shifted = micros.checked_sub(EPOCH_SHIFT);
    shifted
        .and_then(|micros| pgrx::datum::TimestampWithTimeZone::try_from(micros).ok())
        .ok_or_else(|| Error::internal("a time is out of range"))
}

/// A time as PostgreSQL reads it.
pub fn timestamp_text(at: chrono::DateTime<chrono::Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S%.6f+00").to_string()
}

/// A lock of our own kind: no SQL of anybody else's can take it, as it could an advisory one.
#[derive(Debug, Clone, Copy)]
pub struct Own {
    /// One of our tables.
    pub class: pg_sys::Oid,
    pub object: u32,
    /// Tells several locks of one object apart.
    pub kind: u16,
}

/// Whether others may have the lock at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Alone,
    Shared,
}

impl Own {
    /// Takes it until the transaction ends, so that nothing a failed call leaves behind can stop redaction.
    ///
    /// # Errors
    /// 55P03 when the session's `lock_timeout` is over.
    pub fn take(self, mode: Mode) -> Result<()> {
        let mode = match mode {
            Mode::Alone => pg_sys::ExclusiveLock,
            Mode::Shared => pg_sys::ShareLock,
        };
        subtransaction(|| {
            // SAFETY: inside a transaction; the tag is of this database and of a relation of ours, and is released with it.
            unsafe {
                pg_sys::LockDatabaseObject(
                    self.class,
                    pg_sys::Oid::from(self.object),
                    self.kind,
                    mode as pg_sys::LOCKMODE,
                );
            }
            Ok(())
        })
    }

    /// Takes it until the transaction ends, unless somebody has it. Whether it did.
    ///
    /// # Errors
    /// Never in practice.
    pub fn try_take(self) -> Result<bool> {
        subtransaction(|| {
            // SAFETY: inside a transaction, with which the lock is released; a complete tag.
            let got =
                unsafe { pg_sys::LockAcquire(&self.tag(), pg_sys::ExclusiveLock as pg_sys::LOCKMODE, false, true) };
            Ok(got != pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL)
        })
    }

    /// Takes it for several transactions: until [`Own::release`], or until one of them is rolled back.
    ///
    /// # Errors
    /// As [`Own::take`].
    pub fn hold(self) -> Result<()> {
        subtransaction(|| {
            // SAFETY: a complete tag; a rollback of the transaction releases this too, so a failed cycle leaves nothing.
            unsafe { pg_sys::LockAcquire(&self.tag(), pg_sys::ExclusiveLock as pg_sys::LOCKMODE, true, false) };
            Ok(())
        })
    }

    /// Gives back what [`Own::hold`] took, if no rollback did: the server warns of a lock that is not there.
    pub fn release(self) {
        let (tag, mode) = (self.tag(), pg_sys::ExclusiveLock as pg_sys::LOCKMODE);
        // SAFETY: a complete tag, taken once more at most and given back as often.
        unsafe {
            let held = match pg_sys::LockAcquire(&tag, mode, true, true) {
                pg_sys::LockAcquireResult::LOCKACQUIRE_NOT_AVAIL => 0,
                pg_sys::LockAcquireResult::LOCKACQUIRE_OK => 1,
                _ => 2,
            };
            for _ in 0..held {
                pg_sys::LockRelease(&tag, mode, true);
            }
        }
    }

    fn tag(self) -> pg_sys::LOCKTAG {
        pg_sys::LOCKTAG {
            // SAFETY: plain variable.
            locktag_field1: unsafe { pg_sys::MyDatabaseId }.to_u32(),
            locktag_field2: self.class.to_u32(),
            locktag_field3: self.object,
            locktag_field4: self.kind,
            locktag_type: pg_sys::LockTagType::LOCKTAG_OBJECT as u8,
            locktag_lockmethodid: pg_sys::DEFAULT_LOCKMETHOD as u8,
        }
    }
}
