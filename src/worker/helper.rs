//! Processes that help a cycle: each works on its share of a policy's orders, in the name of the session whose cycle it
//! is, and ends with it. One that ends too early costs nothing but speed.

use std::time::Duration;

use pgrx::prelude::*;

use crate::engine::cycle::{self, Counts, Task};
use crate::engine::due::Share;
use crate::engine::turn::Helped;
use crate::pg::error::{Error, Result};
use crate::pg::identity;
use crate::pg::worker::segment::{Answer, Segment};
use crate::pg::worker::{self, Connection, Errand, Kind, Member};

/// The errand's number is the segment's handle.
const HELPER: Kind = Kind {
    name: "amazon_pii helper",
    function: "amazon_pii_helper_main",
};

/// How long to wait for the end of a helper before the counts are told again.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The helpers of a cycle. They end when this is dropped.
pub struct Team {
    /// With the part of the orders that each of them has.
    members: Vec<(u32, Member)>,
    of: u32,
    right: Helped,
}

impl Team {
    /// Asks for helpers, so that `of` processes work in all. There may be fewer.
    ///
    /// # Errors
    /// Never in practice.
    pub fn call(right: Helped, of: u32, task: impl Fn(Share) -> Task) -> Result<Self> {
        let mut members = Vec::new();
        for part in 1..of {
            let share = Share { of, parts: vec![part] };
            let request =
                serde_json::to_vec(&task(share)).map_err(|_| Error::internal("a task cannot be written as JSON"))?;
            let Some(member) = Member::start(HELPER, &request) else {
                break;
            };
            members.push((part, member));
        }
        Ok(Self { members, of, right })
    }

    /// The parts that nobody works on (any more).
    pub fn left_alone(&self) -> Vec<u32> {
        let at_work = |part: &u32| self.members.iter().any(|(p, m)| p == part && !m.handle.stopped());
        (1..self.of).filter(|part| !at_work(part)).collect()
    }

    /// Whether all of them have ended.
    pub fn is_done(&self) -> bool {
        self.members.iter().all(|(_, m)| m.handle.stopped())
    }

    /// Waits for an end among them, for a moment.
    pub fn wait(&self) {
        if !self.is_done() {
            worker::sleep(LOOK_EVERY);
        }
    }

    /// What they did so far.
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        for (_, member) in &self.members {
            let [archived, redacted, failed] = member.segment.numbers();
            sum.add(Counts {
                archived,
                redacted,
                failed,
                ..Counts::default()
            });
        }
        sum
    }

    /// The cycle goes on without them.
    pub fn dismiss(self) {
        self.right.release();
    }
}

/// Where the process of a helper starts.
#[allow(unsafe_code)]
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn amazon_pii_helper_main(argument: pg_sys::Datum) {
    let errand = Errand::unpack(argument);
    // Gone when the cycle has ended meanwhile.
    let Some(segment) = Segment::attach(errand.number) else {
        return;
    };
    worker::enter(Connection::Database(errand.database));
    // Whoever keeps a cycle waiting keeps its helpers waiting, too.
    worker::wait_for_locks();
    let answer = match work(&segment) {
        Ok(()) => Answer::Done,
        Err(e) => {
            worker::log(&e, "a helper ended early");
            Answer::Failed(e.stored())
        }
    };
    segment.answer(&answer);
    segment.wake();
    worker::report_idle();
}

fn work(segment: &Segment) -> Result<()> {
    let task: Task =
        serde_json::from_slice(&segment.request()).map_err(|_| Error::internal("a task cannot be read"))?;
    identity::work_for(task.user.clone());
    worker::set_actor(task.actor.as_deref().unwrap_or(""));
    worker::report_running("amazon_pii: helping with a cycle");
    worker::open_transaction(|| {
        cycle::help(task, |counts| {
            segment.tell([counts.archived, counts.redacted, counts.failed]);
        })
    })
}
