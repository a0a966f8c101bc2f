//! What keeps a cycle from being in the way: batches that take a limited time, and pauses. Between two batches
//! nothing is locked, and it is nobody's turn.

use std::time::Duration;

use crate::domain::pace::{Batch, Size};
use crate::pg::error::Result;
use crate::pg::guc;
use crate::pg::xact::Boundary;

/// After a batch that somebody waited for there is a pause as long as that batch was, up to this.
const LONGEST_BREATH: Duration = Duration::from_secs(1);

/// The pace of one process of a cycle.
pub struct Pace {
    boundary: Boundary,
    size: Size,
    breath: Duration,
}

impl Pace {
    /// At the beginning.
    pub fn new(boundary: Boundary) -> Self {
        Self {
            boundary,
            size: Size::default(),
            breath: Duration::ZERO,
        }
    }

    /// Orders in the next batch.
    pub fn size(&self) -> i64 {
        self.size.next(guc::batch_size())
    }

    /// After a batch.
    pub fn learn(&mut self, batch: &Batch) {
        self.size.learn(batch, guc::batch_time(), guc::batch_size());
        self.breath = if batch.waited_for {
            batch.took.min(LONGEST_BREATH)
        } else {
            Duration::ZERO
        };
    }

    /// Between two batches; commits if there is anything to wait for.
    ///
    /// # Errors
    /// A cancel, or errors of the server.
    pub fn wait(&mut self) -> Result<()> {
        let breath = self.breath;
        let pause = || breath.max(guc::batch_pause());
        self.boundary.reload()?;
        if !pause().is_zero() {
            self.boundary.rest(pause)?;
        }
        Ok(())
    }
}
