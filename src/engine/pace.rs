//! What keeps a cycle from being in the way: batches that take a limited time, pauses, and regard for replicas. Between two
//! batches nothing is locked, and it is nobody's turn.

use std::time::{Duration, Instant};

use crate::domain::lag::{Advice, Replica, Watch};
use crate::domain::pace::{Batch, Size};
use crate::pg::error::Result;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::xact::Boundary;
use crate::pg::{guc, replicas};

/// How long to wait before replicas are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// After a batch that somebody waited for there is a pause as long as that batch was, up to this.
const LONGEST_BREATH: Duration = Duration::from_secs(1);

/// How often a wait is told to whoever called the cycle.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// The pace of one process of a cycle.
pub struct Pace {
    boundary: Boundary,
    /// Of the cycle's row in `run`; a helper has none, and says nothing.
    pub run: Option<i64>,
    size: Size,
    breath: Duration,
    watch: Watch,
    begun: Instant,
    /// What stays in the cycle's row.
    remark: Option<String>,
}

impl Pace {
    /// At the beginning.
    pub fn new(boundary: Boundary) -> Self {
        Self {
            boundary,
            run: None,
            size: Size::default(),
            breath: Duration::ZERO,
            watch: Watch::default(),
            begun: Instant::now(),
            remark: None,
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

    /// Before the first batch: how far behind replicas are without it.
    pub fn look(&mut self) {
        if let Some(limit) = guc::replica_lag() {
            self.watch
                .look(self.begun.elapsed(), &replicas::connected(), limit, guc::replica_wait());
        }
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
        self.wait_for_replicas()
    }

    fn wait_for_replicas(&mut self) -> Result<()> {
        let mut told: Option<Instant> = None;
        while let Some(limit) = guc::replica_lag() {
            let advice = self
                .watch
                .look(self.begun.elapsed(), &replicas::connected(), limit, guc::replica_wait());
            match advice {
                Advice::GoOn => break,
                Advice::WaitFor(replica) => {
                    let due = told.is_none_or(|at| at.elapsed() > TELL_EVERY);
                    if due && self.run.is_some() {
                        let text = format!("waits for a replica: {}", shown(&replica));
                        self.note(Some(&text))?;
                        if told.is_some() {
                            pgrx::notice!("the cycle {text}");
                        }
                    }
                    if due {
                        told = Some(Instant::now());
                    }
                    self.boundary.rest(|| LOOK_AGAIN)?;
                }
                Advice::GiveUp(replica) => {
                    if self.run.is_some() {
                        let text = format!("went on although a replica lags: {}", shown(&replica));
                        pgrx::warning!("a cycle of amazon_pii {text}");
                        self.remark = Some(text);
                    }
                    break;
                }
            }
        }
        if told.is_some() {
            self.note(self.remark.as_deref())?;
        }
        Ok(())
    }

    /// For the view `runs`.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn note(&self, text: Option<&str>) -> Result<()> {
        let Some(run) = self.run else { return Ok(()) };
        as_extension(|| {
            sql::execute(
                "UPDATE amazon_pii.run SET note = $2 WHERE run_id = $1",
                &[Arg::Int(run), Arg::Text(text)],
            )
        })?;
        Ok(())
    }
}

/// By the number under which `pg_stat_replication` has more.
fn shown(replica: &Replica) -> String {
    format!(
        "the one of process {} is {} MB behind",
        replica.pid,
        replica.behind >> 20
    )
}
