//! What a cycle has to do with a cold server besides its batches.

use std::collections::HashSet;

use super::Run;
use crate::engine::rekey;
use crate::engine::state;
use crate::engine::turn;
use crate::pg::error::Result;
use crate::pg::xact::Mode;

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
