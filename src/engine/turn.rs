//! Who works on a policy: locks that cycles, and the processes of one, take.

use sha2::{Digest, Sha256};

use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql;
use crate::pg::xact::{Mode, Own};

/// What a lock of a policy is for.
#[derive(Clone, Copy)]
enum Kind {
    Turn = 0,
    Commit = 1,
    Help = 2,
}

fn lock(policy: &str, kind: Kind) -> Result<Own> {
    let class = as_extension(|| {
        let rows = sql::read("SELECT 'amazon_pii.policy'::pg_catalog.regclass::pg_catalog.oid", &[])?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.oid(0)
    })?;
    let digest = Sha256::digest(policy.as_bytes());
    Ok(Own {
        class,
        object: u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]),
        kind: kind as u16,
    })
}

/// Two cycles of one policy take turns, batch by batch; correctness rests on the row locks in `order_state`, and on
/// [`before_commit`]. Who holds the turn alone keeps all others waiting until the transaction ends; the processes of one
/// cycle share theirs.
///
/// # Errors
/// 55P03 when the session's `lock_timeout` is over: outside of the pins, the wait has no limit but the session's own.
pub fn take(policy: &str, mode: Mode) -> Result<()> {
    lock(policy, Kind::Turn)?.take(mode)
}

/// From here on this transaction sees what others of the policy have committed, and they what it commits, one after the
/// other. Last thing in a batch: it waits for the others' commits.
///
/// # Errors
/// As [`take`].
pub fn before_commit(policy: &str) -> Result<()> {
    lock(policy, Kind::Commit)?.take(Mode::Alone)
}

/// [`before_commit`] among the cycles of all policies. After that, where both are wanted.
///
/// # Errors
/// As [`take`].
pub fn before_commit_of_any() -> Result<()> {
    // No policy has this name.
    before_commit("")
}

/// The right to have helpers, for one cycle of a policy at a time; until the guard gives it back, or a rollback does.
///
/// # Errors
/// As [`take`].
pub fn hold_help(policy: &str) -> Result<Helped> {
    let lock = lock(policy, Kind::Help)?;
    lock.hold()?;
    Ok(Helped(lock))
}

/// See [`hold_help`].
pub struct Helped(Own);

impl Helped {
    /// Others may have helpers now.
    pub fn release(self) {
        self.0.release();
    }
}
