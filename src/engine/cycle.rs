//! One pass over what is due: flag, archive, redact, batch by batch, each batch two transactions. The same code
//! serves the worker, `CALL run_cycle()` and the tests.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::alive;
use super::archive;
use super::audit;
use super::due::{self, Clock, Due};
use super::news;
use super::overwrite;
use super::plan::Plan;
use super::redact;
use super::rekey;
use super::state;
use super::sweep;
use super::touched;
use super::trigger_ddl;
use crate::domain::clock::horizons;
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, session_user};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::xact::{self, Boundary};
use crate::pg::{deadline, guc, keys};

/// A batch of which nothing is known yet may hold scanned invoices.
const FIRST_BATCH: i64 = 16;

/// Text in one batch above which the next one is smaller; a batch needs several times as much memory.
const MUCH_TEXT: usize = 16 * 1024 * 1024;

/// How often a long run says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);

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
    fn add(&mut self, other: Self) {
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
    let names = as_extension(|| {
        let rows = sql::read(
            "SELECT p.policy FROM amazon_pii.policy p WHERE $1 IS NULL OR p.policy = $1 ORDER BY p.policy",
            &[Arg::Text(policy)],
        )?;
        rows.iter().map(|r| r.string(0)).collect::<Result<Vec<_>>>()
    })?;
    if let (Some(name), true) = (policy, names.is_empty()) {
        return Err(Error::undefined(format!("policy \"{name}\" does not exist"))
            .hint("The view amazon_pii.policies lists the policies."));
    }
    let mut total = Counts::default();
    for name in names {
        match run_policy(&name, sweep, boundary) {
            Ok(counts) => total.add(counts),
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
    Ok(total)
}

/// What is wrong with a policy as a whole, for `status`.
fn note_error(policy: &str, error: &Error) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET last_error = $2 WHERE policy = $1 AND last_error IS DISTINCT FROM $2",
            &[Arg::Text(Some(policy)), Arg::Text(Some(&error.stored()))],
        )
    })?;
    Ok(())
}

/// Two cycles of one policy take turns, batch by batch; correctness rests on the row locks in `order_state`. Who holds
/// the turn keeps them waiting until the transaction ends.
///
/// # Errors
/// 55P03 when the session's `lock_timeout` is over.
pub fn take_turn(policy: &str) -> Result<()> {
    let class = as_extension(|| {
        let rows = sql::read("SELECT 'amazon_pii.policy'::pg_catalog.regclass::pg_catalog.oid", &[])?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.oid(0)
    })?;
    // Outside of the pins: the wait for the other cycle has no limit but the session's own.
    let digest = Sha256::digest(policy.as_bytes());
    xact::take_turn(class, u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]))
}

struct Run<'a> {
    plan: &'a Plan,
    keys: MasterKeys,
    clock: Clock,
    boundary: Boundary,
    counts: Counts,
    /// Of its row in `run`, once it has one.
    id: Option<i64>,
    /// Orders in the next batch: few at first, and fewer where they hold much.
    limit: i64,
    /// What went wrong with flagging.
    trouble: Option<Error>,
    /// When the caller was last told how far it is.
    told: Instant,
    /// Orders that were already archived again in this cycle: a second time they wait.
    set_back: HashSet<String>,
}

fn run_policy(policy: &str, sweep: bool, boundary: Boundary) -> Result<Counts> {
    match subtransaction(|| news::announce(policy)) {
        Err(e) if e.is_cancel() => return Err(e),
        // They stay for the next cycle; what is due does not wait for that.
        _ => boundary.commit()?,
    }
    take_turn(policy)?;
    let plan = Plan::load(policy)?;
    if !plan.enabled || plan.suspended.is_some() {
        let counts = Counts {
            overdue: overdue(policy)?,
            ..Counts::default()
        };
        if counts.overdue > 0 {
            announce_overdue(policy, counts.overdue)?;
        }
        boundary.commit()?;
        return Ok(counts);
    }
    let keys = keys::master_keys()?;
    let clock = clock(&plan)?;
    boundary.commit()?;
    let mut run = Run {
        plan: &plan,
        keys,
        clock,
        boundary,
        counts: Counts::default(),
        id: None,
        limit: FIRST_BATCH,
        trouble: None,
        told: Instant::now(),
        set_back: HashSet::new(),
    };
    run.flag(sweep)?;
    // What flagging has just found due belongs to this cycle.
    run.clock = self::clock(&plan)?;
    while run.batch()? {
        run.report()?;
    }
    run.counts.overdue = overdue(policy)?;
    if run.counts.overdue > 0 {
        announce_overdue(policy, run.counts.overdue)?;
    }
    run.finish()?;
    boundary.commit()?;
    Ok(run.counts)
}

/// The instants of a cycle that begins now.
fn clock(plan: &Plan) -> Result<Clock> {
    let now = xact::now()?;
    Ok(Clock::new(now, &horizons(plan.document.window.as_ref(), now)))
}

impl Run<'_> {
    /// New partitions, keys that triggers could only note, and the sweep when it is due. What fails here is told, and
    /// keeps nothing that is due from being done.
    fn flag(&mut self, sweep: bool) -> Result<()> {
        self.step(|run| trigger_ddl::ensure(run.plan))?;
        self.step(|run| {
            let (flagged, trouble) = touched::settle(run.plan)?;
            run.counts.flagged += flagged;
            run.trouble = trouble.or(run.trouble.take());
            Ok(())
        })?;
        self.step(|run| {
            for (order, error) in rekey::settle(run.plan, &run.keys)? {
                state::troubled(run.plan, &order, &error)?;
            }
            Ok(())
        })?;
        if sweep {
            self.step(|run| sweep::request(run.plan))?;
        }
        let mut more = true;
        while more {
            more = false;
            self.step(|run| {
                if let Some(slice) = sweep::slice(run.plan, &run.clock)? {
                    run.counts.flagged += slice.flagged;
                    run.trouble = slice.trouble.or(run.trouble.take());
                    run.start()?;
                    more = true;
                }
                Ok(())
            })?;
        }
        self.step(|run| sweep::stale(run.plan))
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

    /// One batch; false when nothing is due any more.
    fn batch(&mut self) -> Result<bool> {
        take_turn(&self.plan.policy)?;
        let batch = due::take(self.plan, &self.clock, self.limit.min(guc::batch_size()))?;
        if batch.is_empty() {
            self.boundary.commit()?;
            return Ok(false);
        }
        self.start()?;
        let (copy, ready): (Vec<Due>, Vec<Due>) = batch.into_iter().partition(Due::needs_copy);
        let mut to_redact = ready;
        let mut bytes = 0;
        for (mut orders, archived) in self.contained(copy, |run, orders| archive::batch(run.plan, &run.keys, orders))? {
            self.counts.archived += archived.orders;
            bytes += archived.bytes;
            for (due, records) in orders.iter_mut().zip(archived.records) {
                due.records = records;
                due.copied = true;
            }
            to_redact.extend(orders.into_iter().filter(|d| d.redact));
        }
        self.boundary.commit()?;

        take_turn(&self.plan.policy)?;
        to_redact.retain(|d| d.redact);
        let locked = due::relock(self.plan, &self.clock, to_redact)?;
        if !locked.is_empty() {
            let others = alive::other_policies(self.plan)?;
            let results = self.contained(locked, |run, orders| {
                redact::batch(run.plan, &others, &run.keys, &run.clock, orders)
            })?;
            for (orders, outcome) in results {
                bytes = bytes.max(outcome.bytes);
                self.settle(&orders, &outcome)?;
            }
        }
        self.limit = if bytes > MUCH_TEXT {
            (self.limit / 4).max(1)
        } else {
            (self.limit * 4).min(guc::batch_size())
        };
        self.boundary.commit()?;
        Ok(true)
    }

    /// Orders that were not redacted in their batch go back, each for its reason.
    fn settle(&mut self, orders: &[Due], outcome: &redact::Redacted) -> Result<()> {
        self.counts.redacted += outcome.done;
        let wait = i64::try_from(guc::naptime()).unwrap_or(60);
        let locked: Vec<&Due> = outcome.locked.iter().map(|i| &orders[*i]).collect();
        state::set_back(self.plan, &locked, wait, false)?;
        let (again, stubborn): (Vec<&Due>, Vec<&Due>) = outcome
            .unproven
            .iter()
            .map(|i| &orders[*i])
            .partition(|d| self.set_back.insert(d.order_key.clone()));
        state::set_back(self.plan, &again, 0, true)?;
        for due in stubborn {
            self.fail(
                due,
                &Error::not_overwritten("its personal data differs from its archived copy again and again"),
            )?;
        }
        Ok(())
    }

    /// Runs a step for a whole batch in one subtransaction; only when that fails, order by order, so that one bad
    /// order stops nobody else.
    fn contained<T>(
        &mut self,
        batch: Vec<Due>,
        step: impl Fn(&Self, &[Due]) -> Result<T>,
    ) -> Result<Vec<(Vec<Due>, T)>> {
        let mut out = Vec::new();
        if batch.is_empty() {
            return Ok(out);
        }
        let whole = subtransaction(|| step(self, &batch));
        match whole {
            Ok(result) => out.push((batch, result)),
            Err(e) if e.is_cancel() => return Err(e),
            // A whole table is locked: each order alone would wait for it as long as the batch did.
            Err(e) if e.is_lock() && overwrite::is_locked(self.plan)? => {
                let all: Vec<&Due> = batch.iter().collect();
                state::copied(self.plan, &all)?;
                state::set_back(self.plan, &all, i64::try_from(guc::naptime()).unwrap_or(60), false)?;
            }
            Err(_) => {
                for due in batch {
                    let alone = [due];
                    match subtransaction(|| step(self, &alone)) {
                        Ok(result) => out.push((alone.into(), result)),
                        Err(e) if e.is_cancel() => return Err(e),
                        Err(e) => self.fail(&alone[0], &e)?,
                    }
                }
            }
        }
        Ok(out)
    }

    /// Sets an order back with its error; a lock that was not to be had is nobody's fault.
    fn fail(&mut self, due: &Due, error: &Error) -> Result<()> {
        state::copied(self.plan, &[due])?;
        if error.is_lock() {
            return state::set_back(self.plan, &[due], i64::try_from(guc::naptime()).unwrap_or(60), false);
        }
        self.counts.failed += 1;
        state::failed(self.plan, due, error)?;
        audit::insert_under(
            Some(&self.keys),
            &[audit::AuditEntry {
                detail: Some(error.stored()),
                ..archive::entry("failed", self.plan, due)?
            }],
        )?;
        state::announce(self.plan, "failed", &[due])
    }

    /// The run's row, once there is something to do: an idle cycle leaves none.
    fn start(&mut self) -> Result<()> {
        if self.id.is_some() {
            return Ok(());
        }
        let rows = as_extension(|| {
            sql::write(
                "INSERT INTO amazon_pii.run (policy, started_by, pid) VALUES ($1, $2, pg_catalog.pg_backend_pid()) RETURNING run_id",
                &[Arg::Text(Some(&self.plan.policy)), Arg::Text(Some(&session_user()))],
            )
        })?;
        self.id = rows.first().map(|r| r.int(0)).transpose()?;
        Ok(())
    }

    /// Progress, for whoever watches and for the run's row.
    fn report(&mut self) -> Result<()> {
        let c = self.counts;
        if self.told.elapsed() > TELL_EVERY {
            self.told = Instant::now();
            pgrx::notice!(
                "policy {}: {} archived, {} redacted, {} failed so far",
                self.plan.policy,
                c.archived,
                c.redacted,
                c.failed
            );
        }
        self.record(false)
    }

    /// The counts so far, or at the end.
    fn record(&self, finished: bool) -> Result<()> {
        let Some(id) = self.id else { return Ok(()) };
        let c = self.counts;
        as_extension(|| {
            sql::execute(
                "UPDATE amazon_pii.run SET flagged = $2, archived = $3, redacted = $4, failed = $5, overdue = $6, \
                    finished_at = CASE WHEN $7 THEN pg_catalog.clock_timestamp() END WHERE run_id = $1",
                &[
                    Arg::Int(id),
                    Arg::Int(c.flagged),
                    Arg::Int(c.archived),
                    Arg::Int(c.redacted),
                    Arg::Int(c.failed),
                    Arg::Int(c.overdue),
                    Arg::Bool(finished),
                ],
            )
        })?;
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        as_extension(|| {
            sql::execute(
                "UPDATE amazon_pii.policy SET cycled_at = pg_catalog.clock_timestamp(), last_error = $2 WHERE policy = $1",
                &[
                    Arg::Text(Some(&self.plan.policy)),
                    Arg::Text(self.trouble.as_ref().map(Error::stored).as_deref()),
                ],
            )
        })?;
        self.record(true)
    }
}

fn overdue(policy: &str) -> Result<i64> {
    as_extension(|| {
        let rows = sql::read(
            "SELECT pg_catalog.count(*) FROM amazon_pii.overdue WHERE policy = $1",
            &[Arg::Text(Some(policy))],
        )?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.int(0)
    })
}

fn announce_overdue(policy: &str, count: i64) -> Result<()> {
    let payload = serde_json::json!({ "policy": policy, "status": "overdue", "count": count });
    as_extension(|| {
        sql::write(
            "SELECT pg_catalog.pg_notify('amazon_pii', $1)",
            &[Arg::Text(Some(&payload.to_string()))],
        )
    })?;
    Ok(())
}
