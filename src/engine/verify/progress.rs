//! How far a search is, for the caller and for whoever looks at pg_stat_activity.

use std::time::{Duration, Instant};

use crate::pg::activity::Activity;
use crate::pg::error::Result;

/// How often the caller hears of it.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// How often others see something new: often enough to be waited for, seldom enough to cost nothing.
const SHOW_EVERY: Duration = Duration::from_millis(200);

/// Counts, and words of our own.
pub(super) struct Progress {
    policy: String,
    orders: i64,
    read: i64,
    counted: i64,
    rows: u64,
    activity: Activity,
    shown: Option<Instant>,
    told: Instant,
}

impl Progress {
    pub(super) fn begin(policy: &str, orders: i64) -> Self {
        Self {
            policy: policy.to_owned(),
            orders,
            read: 0,
            counted: 0,
            rows: 0,
            activity: Activity::begin(),
            shown: None,
            told: Instant::now(),
        }
    }

    /// The archive of another order was read.
    pub(super) fn order(&mut self) -> Result<()> {
        self.read += 1;
        self.tell(None)
    }

    /// It was read once more, to be counted.
    pub(super) fn counting(&mut self) -> Result<()> {
        self.counted += 1;
        self.tell(None)
    }

    /// A table comes next.
    pub(super) fn table(&mut self, table: &str) -> Result<()> {
        self.shown = None;
        self.tell(Some(table))
    }

    /// Rows of a table were searched.
    pub(super) fn rows(&mut self, table: &str, rows: usize) -> Result<()> {
        self.rows += rows as u64;
        self.tell(Some(table))
    }

    fn tell(&mut self, table: Option<&str>) -> Result<()> {
        pgrx::check_for_interrupts!();
        if self.shown.is_some_and(|at| at.elapsed() < SHOW_EVERY) {
            return Ok(());
        }
        self.shown = Some(Instant::now());
        let at = table.map(|t| format!(", now in {t}")).unwrap_or_default();
        let text = format!(
            "policy {}: {} of {} orders looked for, {} rows searched{at}, {} orders counted",
            self.policy, self.read, self.orders, self.rows, self.counted
        );
        self.activity.show(&format!("amazon_pii verify, {text}"));
        if self.told.elapsed() > TELL_EVERY {
            self.told = Instant::now();
            pgrx::notice!("{text}");
        }
        Ok(())
    }
}
