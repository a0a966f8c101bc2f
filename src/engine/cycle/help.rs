//! Other processes that take a share of a cycle.

use serde::{Deserialize, Serialize};

use super::{Counts, Run};
use crate::engine::batch::Batches;
use crate::engine::due::{Clock, Share};
use crate::engine::plan::Plan;
use crate::engine::reconcile;
use crate::engine::rotation::Keyring;
use crate::engine::turn;
use crate::pg::error::Result;
use crate::pg::identity::session_user;
use crate::pg::xact::{Boundary, Mode};
use crate::pg::{deadline, guc};
use crate::worker::helper::Team;

/// What a helper is told.
#[derive(Serialize, Deserialize)]
pub struct Task {
    pub policy: String,
    version: i64,
    clock: Clock,
    pub share: Share,
    /// In whose name it works.
    pub user: String,
    pub actor: Option<String>,
}

/// Works on a share of another process's cycle, until nothing of it is due. Called with an open transaction, leaves one
/// open.
///
/// # Errors
/// As [`run`](super::run); the other process does what is left then.
pub fn help(task: Task, tell: impl Fn(&Counts)) -> Result<()> {
    let _limited = deadline::limit();
    let boundary = Boundary::Worker;
    boundary.commit()?;
    let plan = Plan::load(&task.policy)?;
    if plan.version != task.version {
        return Ok(());
    }
    let keys = Keyring::load(&task.policy)?;
    let mut batches = Batches::new(&plan, keys, task.clock, boundary);
    batches.share = task.share;
    batches.mode = Mode::Shared;
    batches.unreconciled = reconcile::left_alone(&task.policy)?.0;
    batches.tell = Some(&tell);
    boundary.commit()?;
    loop {
        let batch = batches.take()?;
        if batch.is_empty() {
            if !batches.last_looks()? {
                return Ok(());
            }
        } else {
            batches.work(batch)?;
        }
    }
}

impl Run<'_> {
    pub(super) fn call_help(&mut self) -> Result<()> {
        self.helped = true;
        // Another cycle of this policy may have helpers: that one first.
        let right = turn::hold_help(&self.plan.policy)?;
        let of = u32::try_from(guc::workers()).unwrap_or(1);
        let team = Team::call(right, of, |share| Task {
            policy: self.plan.policy.clone(),
            version: self.plan.version,
            clock: self.batches.clock.clone(),
            share,
            user: session_user(),
            actor: guc::actor(),
        })?;
        self.batches.share = Share { of, parts: vec![0] };
        self.batches.mode = Mode::Shared;
        self.team = Some(team);
        // With nobody to be had this takes all parts back at once.
        if self.team.as_ref().is_some_and(Team::is_done) {
            self.go_on_alone();
        }
        Ok(())
    }

    /// The team has ended. What it may have left is looked for once more.
    pub(super) fn go_on_alone(&mut self) {
        if let Some(team) = self.team.take() {
            self.batches.counts.add(team.counts());
            team.dismiss();
        }
        self.batches.share = Share::whole();
        self.batches.mode = Mode::Alone;
    }
}
