//! Who receives this server's WAL, and how far behind each is. Read where `pg_stat_replication` reads it, which shows that to
//! few roles only: what is taken from here is a number of bytes, and it is lent to nobody.

use pgrx::pg_sys;

use crate::domain::lag::Replica;

/// Standbys and subscribers that are connected. Costs no statement.
pub fn connected() -> Vec<Replica> {
    let mut found = Vec::new();
    // SAFETY: shared memory that lives as long as the server, with a place for each of `max_wal_senders` processes. Numbers
    // are read without the places' locks: each is one aligned word, and one that is a moment old does no harm.
    unsafe {
        if pg_sys::WalSndCtl.is_null() {
            return found;
        }
        let places = (&raw const (*pg_sys::WalSndCtl).walsnds).cast::<pg_sys::WalSnd>();
        for n in 0..usize::try_from(pg_sys::max_wal_senders).unwrap_or(0) {
            let place = places.add(n);
            let pid = (&raw const (*place).pid).read_volatile();
            let state = (&raw const (*place).state).read_volatile();
            let sends = matches!(
                state,
                pg_sys::WalSndState::WALSNDSTATE_CATCHUP | pg_sys::WalSndState::WALSNDSTATE_STREAMING
            );
            if pid == 0 || !sends {
                continue;
            }
            let replayed = (&raw const (*place).apply).read_volatile();
            let written = (&raw const (*place).write).read_volatile();
            // What only stores WAL replays none of it; one that has just connected has not said anything.
            let Some(upto) = [replayed, written].into_iter().find(|at| *at != 0) else {
                continue;
            };
            found.push(Replica {
                pid,
                // What is not written yet counts, too: commits need not wait for that.
                behind: pg_sys::GetXLogInsertRecPtr().saturating_sub(upto),
            });
        }
    }
    found
}
