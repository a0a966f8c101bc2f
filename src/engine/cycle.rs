//! One pass over what is due: flag, archive, redact, batch by batch, each batch two transactions. The same code
//! serves the worker, `CALL run_cycle()` and the tests.

mod cold;
mod help;
mod record;
mod sanitize;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::batch::{Batches, COME_BACK};
use super::by_age;
use super::chain;
use super::check;
use super::columns;
use super::due::Clock;
use super::export;
use super::home;
use super::idle;
use super::news;
use super::orphan;
use super::pace::Pace;
use super::plan::{Aged, Plan};
use super::purge;
use super::reconcile;
use super::report;
use super::rotation::Keyring;
use super::statistics;
use super::sweep;
use super::touched;
use super::trigger_ddl;
use super::turn;
use crate::domain::clock::horizons;
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::xact::{self, Boundary, Mode};
use crate::pg::{deadline, guc, keys};
use crate::worker::helper::Team;

pub use cold::wants_back_in;
pub use help::{Task, help};
pub use record::note_error;
use record::{announce_overdue, overdue};
pub use sanitize::sanitize;

/// How often a long run says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// How often a long run seals the audit log; at its end it is sealed in any case.
const SEAL_EVERY: Duration = Duration::from_secs(60);

/// Rows of orphans that are handled together.
const ORPHANS: i64 = 50;

/// What a cycle did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub flagged: i64,
    pub archived: i64,
    pub redacted: i64,
    pub failed: i64,
    /// Orders that are past their deadline when the cycle ends.
    pub overdue: i64,
}

impl Counts {
    /// Adds what another did.
    pub fn add(&mut self, other: Self) {
        self.flagged += other.flagged;
        self.archived += other.archived;
        self.redacted += other.redacted;
        self.failed += other.failed;
        self.overdue += other.overdue;
    }
}

/// Runs one cycle of one policy, or of all. Called with an open transaction, leaves one open.
///
/// # Errors
/// A named policy does not exist, the caller canceled, or (for a named policy) the policy cannot run at all; what was
/// committed before stays. Without a name one broken policy stops no other.
pub fn run(policy: Option<&str>, sweep: bool, boundary: Boundary) -> Result<Counts> {
    let _limited = deadline::limit();
    // The caller's snapshot may be older than what was committed since: begin anew, in our own isolation.
    boundary.commit()?;
    let rows = on_keys(|| {
        sql::read(
            &format!(
                "SELECT p.policy, {} FROM amazon_pii.policy p WHERE $1 IS NULL OR p.policy = $1 ORDER BY p.policy", // ident-ok: a constant
                chain::WAITS
            ),
            &[Arg::Text(policy)],
        )
    })?;
    let names = rows.iter().map(|r| r.string(0)).collect::<Result<Vec<_>>>()?;
    if let (Some(name), true) = (policy, names.is_empty()) {
        return Err(Error::undefined(format!("policy \"{name}\" does not exist"))
            .hint("The view amazon_pii.policies lists the policies."));
    }
    // A cycle with nothing to do asks nothing more of the audit log.
    let mut to_seal = rows.first().map_or(Ok(true), |r| r.bool(1))?;
    let mut total = Counts::default();
    for name in names {
        let outcome = run_policy(&name, sweep, boundary);
        to_seal |= !matches!(outcome, Ok(None));
        match outcome {
            Ok(counts) => total.add(counts.unwrap_or_default()),
            Err(e) if e.is_cancel() => return Err(e),
            // Another cycle works on this policy for long; it is in good hands.
            Err(e) if e.is_lock() && policy.is_none() => {
                boundary.rollback();
                total.overdue += overdue(&name)?;
            }
            Err(e) => {
                boundary.rollback();
                total.overdue += overdue(&name)?;
                note_error(&name, &e)?;
                boundary.commit()?;
                if policy.is_some() {
                    return Err(e);
                }
            }
        }
    }
    if to_seal {
        reconcile::settle(boundary)?;
        chain::round(boundary)?;
    }
    Ok(total)
}

struct Run<'a> {
    plan: &'a Plan,
    boundary: Boundary,
    batches: Batches<'a>,
    /// Other processes that work on the same cycle.
    team: Option<Team>,
    /// Had a team: once a cycle is enough.
    helped: bool,
    /// Of its row in `run`, once it has one.
    id: Option<i64>,
    /// Rows that no order leads to, and that were removed or overwritten.
    aged: i64,
    /// What went wrong with flagging.
    trouble: Option<Error>,
    /// When the caller was last told how far it is.
    told: Instant,
    /// When the audit log was last sealed.
    sealed: Instant,
}

/// `None` where there was nothing to do.
fn run_policy(policy: &str, sweep: bool, boundary: Boundary) -> Result<Option<Counts>> {
    if !sweep && idle::ends(policy)? {
        boundary.commit()?;
        return Ok(None);
    }
    match subtransaction(|| news::announce(policy)) {
        Err(e) if e.is_cancel() => return Err(e),
        // They stay for the next cycle; what is due does not wait for that.
        _ => boundary.commit()?,
    }
    turn::take(policy, Mode::Alone)?;
    // As it is before anything is looked at: what changes meanwhile is looked at again.
    let structure = idle::structure(policy)?;
    let plan = Plan::current(policy)?;
    if idle::is_changed(policy, structure.as_deref())? {
        columns::catch_up(&plan)?;
        columns::see(policy)?;
        check::still_sound(&plan)?;
    }
    if !plan.enabled || plan.suspended.is_some() {
        let counts = Counts {
            overdue: overdue(policy)?,
            ..Counts::default()
        };
        if counts.overdue > 0 {
            announce_overdue(policy, counts.overdue)?;
        }
        let clock = clock(&plan)?;
        match subtransaction(|| by_age::count(&plan, &clock)) {
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if !e.is_lock() => _ = note_error(policy, &e)?,
            _ => {}
        }
        boundary.commit()?;
        return Ok(Some(counts));
    }
    home::refuse_elsewhere(&plan, boundary)?;
    let keys = Keyring::load(policy)?;
    let clock = clock(&plan)?;
    boundary.commit()?;
    let mut run = Run::new(&plan, keys, clock, boundary);
    run.flag(sweep)?;
    run.leave_alone()?;
    // What flagging has just found due belongs to this cycle.
    run.batches.clock = self::clock(&plan)?;
    match report::remark(&plan, &run.batches.clock)? {
        Some(remark) => run.only_report(&remark)?,
        None => {
            run.all_that_is_due()?;
            run.purge()?;
            run.send_the_rest()?;
            run.by_age()?;
            run.statistics()?;
        }
    }
    run.step(|run| export::look(run.plan))?;
    run.batches.counts.overdue = overdue(policy)?;
    if run.batches.counts.overdue > 0 {
        announce_overdue(policy, run.batches.counts.overdue)?;
    }
    run.finish(structure.as_deref())?;
    boundary.commit()?;
    Ok(Some(run.batches.counts))
}

/// The instants of a cycle that begins now.
fn clock(plan: &Plan) -> Result<Clock> {
    let now = xact::now()?;
    Ok(Clock::new(now, &horizons(plan.document.window.as_ref(), now)))
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan, keys: Keyring, clock: Clock, boundary: Boundary) -> Self {
        Self {
            plan,
            boundary,
            batches: Batches::new(plan, keys, clock, boundary),
            team: None,
            helped: false,
            id: None,
            aged: 0,
            trouble: None,
            told: Instant::now(),
            sealed: Instant::now(),
        }
    }
}

impl Run<'_> {
    /// New partitions, keys that triggers could only note, orders that returns wait for, and the sweep when it is due. What fails
    /// here is told, and keeps nothing that is due from being done.
    fn flag(&mut self, sweep: bool) -> Result<()> {
        self.step(|run| trigger_ddl::ensure(run.plan))?;
        self.step(|run| {
            let (flagged, trouble) = touched::settle(run.plan)?;
            run.batches.counts.flagged += flagged;
            run.trouble = trouble.or(run.trouble.take());
            Ok(())
        })?;
        self.step(|run| run.settle_orphans().map(|_| ()))?;
        self.follow_keys()?;
        self.bring_back()?;
        if sweep {
            self.step(|run| sweep::request(run.plan))?;
        }
        let mut more = true;
        while more {
            more = false;
            self.step(|run| {
                if let Some(slice) = sweep::slice(run.plan, &run.batches.clock)? {
                    run.batches.counts.flagged += slice.flagged;
                    run.trouble = slice.trouble.or(run.trouble.take());
                    run.start()?;
                    more = true;
                }
                Ok(())
            })?;
        }
        self.step(|run| sweep::stale(run.plan))
    }

    /// What a restore brought back, and is to be destroyed first, is no cycle's to archive.
    fn leave_alone(&mut self) -> Result<()> {
        self.step(|run| {
            let (orders, why) = reconcile::left_alone(&run.plan.policy)?;
            run.batches.unreconciled = orders;
            why.map_or(Ok(()), Err)
        })
    }

    /// Runs a step in a transaction of its own.
    ///
    /// # Errors
    /// A cancel only: a lock that somebody's open transaction has is waited for another time, anything else is told.
    fn step(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        match subtransaction(|| step(self)) {
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if !e.is_lock() => self.trouble = Some(e),
            _ => {}
        }
        self.boundary.commit()
    }

    /// What it would do. A row in `run` says so; cycles that say the same have one.
    fn only_report(&mut self, remark: &str) -> Result<()> {
        pgrx::notice!("policy {} {remark}", self.plan.policy);
        if self.id.is_none() && report::repeats(self.plan, remark)? {
            return Ok(());
        }
        self.start()?;
        self.batches.pace.note(Some(remark))
    }

    /// Orders first, then orphans that go at once. Triggers of the shop's may write what hangs on an orphan because of that: then again,
    /// some times at most.
    fn all_that_is_due(&mut self) -> Result<()> {
        for round in 0..=COME_BACK {
            self.work()?;
            if self.plan.generic.is_empty() {
                return Ok(());
            }
            self.orphans()?;
            let mut more = false;
            self.step(|run| {
                turn::take(&run.plan.policy, Mode::Alone)?;
                more = if round < COME_BACK {
                    run.settle_orphans()?
                } else {
                    orphan::postpone(run.plan)?
                };
                Ok(())
            })?;
            if !more {
                return Ok(());
            }
        }
        self.trouble = Some(Error::not_overwritten(
            "triggers copy the personal data of an orphan again whenever it is overwritten",
        ));
        Ok(())
    }

    /// Lists what triggers noted of orphans; whether there was anything.
    fn settle_orphans(&mut self) -> Result<bool> {
        let (any, trouble) = orphan::settle(self.plan, &self.batches.clock)?;
        self.trouble = trouble.or(self.trouble.take());
        Ok(any)
    }

    fn orphans(&mut self) -> Result<()> {
        let clock = self.batches.clock.clone();
        let mut apart = orphan::Apart {
            plan: self.plan,
            keys: &mut self.batches.keys,
            clock: &clock,
            boundary: self.boundary,
            trouble: None,
            tried: HashSet::new(),
        };
        let outcome = apart.all(ORPHANS);
        self.trouble = apart.trouble.or(self.trouble.take());
        self.go_on_after(outcome)
    }

    /// After a part that commits by itself.
    ///
    /// # Errors
    /// A cancel only, as in [`Run::step`].
    fn go_on_after(&mut self, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) => {
                self.boundary.rollback();
                if !e.is_lock() {
                    self.trouble = Some(e);
                }
            }
            Ok(()) => {}
        }
        Ok(())
    }

    /// All orders that are due. Calls others for help when that is much, and takes over from those that end too early.
    fn work(&mut self) -> Result<()> {
        loop {
            if let Some(team) = &self.team {
                self.batches.share.parts = std::iter::once(0).chain(team.left_alone()).collect();
            }
            let batch = self.batches.take()?;
            if !batch.is_empty() {
                self.start()?;
                match self.batches.work(batch) {
                    // All wait for it; the next cycle asks again.
                    Err(e) if e.is_unreachable() => {
                        self.trouble = Some(e);
                        self.go_on_alone();
                        return Ok(());
                    }
                    done => done?,
                }
                self.report()?;
                self.seal()?;
                if self.team.is_none() && !self.helped && self.batches.is_backlog() && guc::workers() > 1 {
                    self.call_help()?;
                }
                continue;
            }
            if self.batches.last_looks()? {
                continue;
            }
            match &self.team {
                None => return Ok(()),
                Some(team) if team.is_done() => self.go_on_alone(),
                Some(team) => {
                    team.wait();
                    self.report()?;
                    self.boundary.commit()?;
                }
            }
        }
    }

    /// A long cycle seals its part of the audit log now and then.
    fn seal(&mut self) -> Result<()> {
        let mut more = self.sealed.elapsed() > SEAL_EVERY;
        while more {
            self.sealed = Instant::now();
            more = false;
            self.step(|run| {
                more = chain::seal(&run.batches.keys)?.more;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Archives that are past their time, batch by batch.
    fn purge(&mut self) -> Result<()> {
        loop {
            let mut count = 0;
            self.step(|run| {
                turn::take(&run.plan.policy, run.batches.mode)?;
                run.batches.keys.refresh(&run.plan.policy)?;
                purge::let_go(&run.plan.policy)?;
                count = purge::step(run.plan, &run.batches.keys, run.batches.pace.size())?;
                if count > 0 {
                    run.start()?;
                }
                Ok(())
            })?;
            if count == 0 {
                return Ok(());
            }
            self.batches.pace.wait()?;
        }
    }

    /// Rows that no order leads to, table by table: what goes wrong with one keeps no other from being done.
    fn by_age(&mut self) -> Result<()> {
        let plan = self.plan;
        for aged in &plan.by_age {
            let outcome = self.grown_old(aged);
            self.go_on_after(outcome.map_err(|e| if e.is_cancel() { e } else { e.at(&aged.name) }))?;
        }
        Ok(())
    }

    /// What the planner remembers of what is overwritten now. A transaction for each table: until its end ANALYZE has a lock that lets
    /// all reads and writes through.
    fn statistics(&mut self) -> Result<()> {
        let plan = self.plan;
        if self.id.is_none() {
            return Ok(());
        }
        for table in statistics::tables(plan) {
            self.step(|_| statistics::renew(plan, table).map_err(|e| e.at(&table.relation.shown())))?;
        }
        Ok(())
    }

    fn grown_old(&mut self, aged: &Aged) -> Result<()> {
        let (keys, clock) = (keys::master_keys()?, self.batches.clock.clone());
        let mut pace = Pace::new(self.boundary);
        let Some(mut pass) = by_age::Pass::begin(self.plan, aged, &keys, &clock, self.boundary)? else {
            return Ok(());
        };
        self.boundary.commit()?;
        while let Some(done) = pass.batch(&mut pace)? {
            self.aged += done.rows;
            self.batches.counts.failed += done.failed;
            if done != by_age::Done::default() {
                self.start()?;
                self.record(false)?;
                pace.run = self.id;
                self.boundary.commit()?;
                pace.wait()?;
            }
        }
        Ok(())
    }
}
