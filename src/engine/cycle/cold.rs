//! What a cycle has to do with a cold server besides its batches.

use std::collections::HashSet;

use super::Run;
use crate::engine::access::queued;
use crate::engine::cold::Found;
use crate::engine::rekey;
use crate::engine::state;
use crate::engine::turn;
use crate::pg::error::Result;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::xact::Mode;

/// Least seconds between two looks at a cold server that did not answer.
const LEAST: i64 = 5;

/// After how many seconds a cycle should begin, whatever the naptime is: a cold server that did not answer is asked again after as long
/// as it has been away, and orders that failed to come back have times of their own. `None`: there is no reason to.
///
/// # Errors
/// Errors of the server.
pub fn wants_back_in() -> Result<Option<u32>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.ceil(LEAST( \
                (SELECT pg_catalog.min(GREATEST($1, EXTRACT(epoch FROM pg_catalog.now() - c.down_since))) FROM amazon_pii.cold_server c \
                    JOIN amazon_pii.policy p ON p.policy = c.policy WHERE c.down_since IS NOT NULL AND p.enabled AND p.suspended IS NULL), \
                (SELECT pg_catalog.min(EXTRACT(epoch FROM q.next_attempt_at - pg_catalog.now())) FROM amazon_pii.retrieval_queue q \
                    JOIN amazon_pii.policy p ON p.policy = q.policy \
                    WHERE q.next_attempt_at > pg_catalog.now() AND p.enabled AND p.suspended IS NULL)))::bigint",
            &[Arg::Int(LEAST)],
        )
    })?;
    let seconds = rows.first().map(|r| r.text(0)).transpose()?.flatten();
    Ok(seconds.map(|s| s.parse().unwrap_or(u32::MAX)))
}

impl Run<'_> {
    /// Lets the archive follow changes of keys.
    pub(super) fn follow_keys(&mut self) -> Result<()> {
        let mut orders = Vec::new();
        if self.plan.archive.foreign.is_some() {
            orders = rekey::pending(self.plan)?;
            self.boundary.commit()?;
        }
        let found = match self.batches.cold.look_to_move(Mode::Alone, &orders) {
            Err(e) if e.is_unreachable() => {
                self.trouble = Some(e);
                return Ok(());
            }
            found => found?,
        };
        // Nothing moves that was not read: half of an archive would be left behind.
        if self.batches.cold.is_down() {
            return Ok(());
        }
        self.step(|run| {
            turn::take(&run.plan.policy, Mode::Alone)?;
            run.batches.keys.refresh(&run.plan.policy)?;
            for (order, error) in &found.failed {
                state::troubled(run.plan, order, error)?;
            }
            let unread: HashSet<&str> = found.failed.iter().map(|(order, _)| order.as_str()).collect();
            for (order, error) in rekey::settle(run.plan, &run.batches.keys, &found.cold, &unread)? {
                state::troubled(run.plan, &order, &error)?;
            }
            Ok(())
        })
    }

    /// Orders that came with a return or a credit. What the cold server has of them is fetched before anything is locked.
    pub(super) fn bring_back(&mut self) -> Result<()> {
        let mut after = 0;
        loop {
            let waiting = queued::next(self.plan, after)?;
            self.boundary.commit()?;
            let Some(last) = waiting.last() else { return Ok(()) };
            after = last.id;
            let orders: Vec<String> = waiting.iter().map(|q| q.order_key.clone()).collect();
            let mut found = Found::default();
            if self.plan.archive.foreign.is_some() {
                match self.batches.cold.look(Mode::Alone, &orders) {
                    Err(e) if e.is_unreachable() => self.trouble = Some(e),
                    outcome => found = outcome?,
                }
            }
            if let Some(down) = self.batches.cold.why_down() {
                queued::wait(&self.plan.policy, down)?;
                return self.boundary.commit();
            }
            for order in &waiting {
                turn::take(&self.plan.policy, Mode::Alone)?;
                self.batches.keys.refresh(&self.plan.policy)?;
                let unread = found.failed.iter().find(|(key, _)| *key == order.order_key);
                let outcome = match unread {
                    Some((_, e)) => Err(e.clone()),
                    None => subtransaction(|| queued::retrieve(self.plan, &self.batches.keys, order, &found.cold)),
                };
                match outcome {
                    Err(e) if e.is_cancel() => return Err(e),
                    Err(e) => queued::fail(self.plan, &self.batches.keys, order, &e)?,
                    Ok(()) => {}
                }
                self.boundary.commit()?;
            }
        }
    }

    /// What is still to be sent to a cold server, or to be deleted there; and what is known of it.
    pub(super) fn send_the_rest(&mut self) -> Result<()> {
        if self.plan.archive.foreign.is_none() {
            return Ok(());
        }
        self.batches.keys.refresh(&self.plan.policy)?;
        match self.batches.cold.rest(&self.batches.keys) {
            Ok(None) => {}
            Ok(Some(e)) => self.trouble = Some(e),
            Err(e) => self.go_on_after(Err(e))?,
        }
        let down = self.batches.cold.note()?;
        self.trouble = down.or(self.trouble.take());
        self.boundary.commit()
    }
}
