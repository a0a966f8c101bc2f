//! The batches of a cycle: each takes the next orders that are due, copies them to the archive in one transaction and
//! overwrites them in the next. Several processes may do this for one policy, each with its share of the orders.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use super::alive;
use super::archive;
use super::audit;
use super::cold;
use super::cycle::Counts;
use super::due::{self, Clock, Due, Share};
use super::overwrite;
use super::pace::Pace;
use super::plan::Plan;
use super::reconcile;
use super::redact;
use super::rotation::Keyring;
use super::state;
use super::turn;
use super::vault::Cold;
use crate::domain::pace::Batch;
use crate::pg::error::{Error, Result};
use crate::pg::guc;
use crate::pg::subxact::subtransaction;
use crate::pg::xact::{self, Boundary, Mode};

/// Full batches in a row after which there is probably work for more than one.
const BACKLOG: u32 = 2;

/// How often an order comes back in one cycle for what triggers of the shop's write when its rows are overwritten. A history
/// is done after one time, the history of a history after two.
pub const COME_BACK: u32 = 3;

/// One process's way through what is due.
pub struct Batches<'a> {
    pub plan: &'a Plan,
    pub keys: Keyring,
    pub clock: Clock,
    pub boundary: Boundary,
    /// What this process did.
    pub counts: Counts,
    /// Who is told when it is committed.
    pub tell: Option<&'a dyn Fn(&Counts)>,
    pub share: Share,
    /// Other processes of the same cycle have the same turn.
    pub mode: Mode,
    pub pace: Pace,
    /// Its way to a cold server, where the archive has one.
    pub cold: cold::Way<'a>,
    /// Orders that wait for `reconcile()`.
    pub unreconciled: HashSet<String>,
    sharing: redact::Sharing,
    full: u32,
    /// When the batch's orders were locked.
    taken: Instant,
    /// Orders that were already archived again in this cycle: a second time they wait.
    set_back: HashSet<String>,
    /// Orders that come back for a shared row when nothing else is due.
    last: Vec<String>,
    /// How often orders came back for what triggers of the shop's had written.
    besides: HashMap<String, u32>,
}

impl<'a> Batches<'a> {
    /// Of a cycle that has all orders to itself.
    pub fn new(plan: &'a Plan, keys: Keyring, clock: Clock, boundary: Boundary) -> Self {
        Self {
            plan,
            keys,
            clock,
            boundary,
            counts: Counts::default(),
            tell: None,
            share: Share::whole(),
            mode: Mode::Alone,
            pace: Pace::new(boundary),
            cold: cold::Way::new(plan, boundary),
            unreconciled: HashSet::new(),
            sharing: redact::Sharing::default(),
            full: 0,
            taken: Instant::now(),
            set_back: HashSet::new(),
            last: Vec::new(),
            besides: HashMap::new(),
        }
    }

    /// Whether there is probably more to do than one process should do alone.
    pub fn is_backlog(&self) -> bool {
        self.full >= BACKLOG
    }

    /// The next batch, locked; empty when nothing is due. After a full one this may take its time.
    ///
    /// # Errors
    /// A cancel, or errors of the server.
    pub fn take(&mut self) -> Result<Vec<Due>> {
        if self.full > 0 {
            self.pace.wait()?;
        } else {
            self.pace.look();
        }
        turn::take(&self.plan.policy, self.mode)?;
        self.keys.refresh(&self.plan.policy)?;
        self.taken = Instant::now();
        let limit = self.pace.size();
        let mut batch = due::take(self.plan, &self.clock, &self.share, limit)?;
        let taken = batch.len();
        while !self.unreconciled.is_empty() && !batch.is_empty() {
            let apart = |due: &Due| self.unreconciled.contains(&due.order_key);
            let (left, rest): (Vec<Due>, Vec<Due>) = batch.into_iter().partition(apart);
            for due in &left {
                self.fail(due, &reconcile::reason())?;
            }
            batch = rest;
            if left.is_empty() || !batch.is_empty() {
                break;
            }
            batch = due::take(self.plan, &self.clock, &self.share, limit)?;
        }
        for due in &mut batch {
            due.came_back = self.besides.contains_key(&due.order_key);
        }
        self.full = if i64::try_from(taken) == Ok(limit) {
            self.full + 1
        } else {
            0
        };
        Ok(batch)
    }

    /// Nothing is due: orders that come back for rows with many users are now; whether there are any. Ends the transaction.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn last_looks(&mut self) -> Result<bool> {
        let last = std::mem::take(&mut self.last);
        alive::come_back(self.plan, &self.clock, &last)?;
        self.boundary.commit()?;
        Ok(!last.is_empty())
    }

    /// Copies and overwrites what [`Batches::take`] took. Ends the transaction.
    ///
    /// # Errors
    /// A cancel, or errors of our own tables; what concerns one order alone sets that order back.
    pub fn work(&mut self, batch: Vec<Due>) -> Result<()> {
        let orders = i64::try_from(batch.len()).unwrap_or(i64::MAX);
        let (copy, ready): (Vec<Due>, Vec<Due>) = batch.into_iter().partition(Due::needs_copy);
        let (copy, known) = self.know(copy)?;
        let mut to_redact = ready;
        let mut bytes = 0;
        for (mut orders, mut archived) in
            self.contained(copy, |run, orders| archive::batch(run.plan, &run.keys, orders, &known))?
        {
            self.counts.archived += archived.orders;
            bytes += archived.bytes;
            for (due, (records, seen)) in orders.iter_mut().zip(archived.found) {
                // Otherwise the state that it gets next says so.
                if !due.redact || due.archived {
                    due.listed = records.text();
                }
                due.records = records;
                if let Some(by) = archived.written.remove(&due.order_key) {
                    due.written_by = by;
                }
                due.seen = Some(seen).filter(|_| due.redact);
                due.copied = true;
            }
            to_redact.extend(orders);
        }
        let mut waited_for = xact::is_waited_for();
        self.commit()?;
        let copying = self.taken.elapsed();

        let (mut to_redact, proof) = self.ship(to_redact)?;
        turn::take(&self.plan.policy, self.mode)?;
        self.keys.refresh(&self.plan.policy)?;
        let begun = Instant::now();
        to_redact.retain(|d| d.redact);
        let locked = due::relock(self.plan, &self.clock, to_redact)?;
        if !locked.is_empty() {
            let others = alive::other_policies(self.plan)?;
            let results = self.contained(locked, |run, orders| {
                redact::batch(run.plan, &others, &run.keys, &run.clock, &run.sharing, &proof, orders)
            })?;
            let mut waiting = Vec::new();
            for (orders, outcome) in results {
                bytes = bytes.max(outcome.bytes);
                self.sharing.learn(&outcome);
                self.settle(&orders, &outcome)?;
                waiting.extend(outcome.waiting);
            }
            let last = alive::settle(self.plan, &others, &self.clock, &waiting, self.mode == Mode::Shared)?;
            self.last.extend(last);
        }
        waited_for |= xact::is_waited_for();
        self.commit()?;
        self.pace.learn(&Batch {
            orders,
            took: copying.max(begun.elapsed()),
            text: bytes,
            waited_for,
        });
        Ok(())
    }

    /// Commits a part of a batch, which counts from then on.
    fn commit(&self) -> Result<()> {
        self.boundary.commit_and(|| {
            if let Some(tell) = self.tell {
                tell(&self.counts);
            }
        })
    }

    /// What a cold server has of orders that are to be archived: without a lock on them, which are taken again afterwards.
    fn know(&mut self, copy: Vec<Due>) -> Result<(Vec<Due>, Cold)> {
        if self.plan.archive.foreign.is_none() || copy.is_empty() {
            return Ok((copy, Cold::default()));
        }
        self.boundary.commit()?;
        let keys: Vec<String> = copy.iter().map(|d| d.order_key.clone()).collect();
        let cold::Found { cold, failed } = self.cold.look(self.mode, &keys)?;
        turn::take(&self.plan.policy, self.mode)?;
        self.keys.refresh(&self.plan.policy)?;
        self.taken = Instant::now();
        let mut again = due::take_again(self.plan, &self.clock, copy)?;
        if self.cold.is_down() {
            let (first, later) = cold::may_go_on(self.plan, again)?;
            again = first;
            self.wait(&later)?;
        }
        self.fail_those(&mut again, failed)?;
        Ok((again, cold))
    }

    /// Sends the copies of a batch to the cold server, and reads them back: what is returned may be overwritten.
    fn ship(&mut self, batch: Vec<Due>) -> Result<(Vec<Due>, Cold)> {
        if self.plan.archive.foreign.is_none() || batch.is_empty() {
            return Ok((batch, Cold::default()));
        }
        let mut batch = batch;
        let keys: Vec<String> = batch.iter().map(|d| d.order_key.clone()).collect();
        let shipped = self.cold.ship(&self.keys, self.mode, &keys)?;
        turn::take(&self.plan.policy, self.mode)?;
        self.fail_those(&mut batch, shipped.failed)?;
        let (mut unsent, mut sent): (Vec<Due>, Vec<Due>) =
            batch.into_iter().partition(|d| shipped.left.contains(&d.order_key));
        if self.cold.is_down() {
            // It answered a moment ago, and does not any more.
            let (first, later) = cold::may_go_on(self.plan, sent)?;
            sent = first;
            unsent.extend(later);
        }
        self.wait(&unsent)?;
        self.boundary.commit()?;
        Ok((sent, shipped.cold))
    }

    /// Orders that wait for the cold server, as they would for a row that is locked.
    fn wait(&self, orders: &[Due]) -> Result<()> {
        let all: Vec<&Due> = orders.iter().collect();
        state::copied(self.plan, &all)?;
        state::set_back(self.plan, &all, i64::try_from(guc::naptime()).unwrap_or(60), false)
    }

    /// Sets back those that the cold server refused, each with its error.
    fn fail_those(&mut self, batch: &mut Vec<Due>, failed: Vec<(String, Error)>) -> Result<()> {
        for (order, error) in failed {
            if let Some(at) = batch.iter().position(|d| d.order_key == order) {
                let due = batch.remove(at);
                self.fail(&due, &error)?;
            }
        }
        Ok(())
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
        let mut back = Vec::new();
        for order in &outcome.besides {
            let times = self.besides.entry(order.clone()).or_default();
            *times += 1;
            if *times <= COME_BACK {
                back.push(order.as_str());
            } else if let Some(due) = orders.iter().find(|d| d.order_key == *order) {
                self.fail(
                    due,
                    &Error::not_overwritten("triggers copy its personal data again whenever it is overwritten"),
                )?;
            }
        }
        alive::come_back(self.plan, &self.clock, &back)?;
        for due in stubborn {
            self.fail(
                due,
                &Error::not_overwritten("its personal data differs from its archived copy again and again"),
            )?;
        }
        Ok(())
    }

    /// Runs a step for a whole batch in one subtransaction; only when that fails, order by order, so that one bad
    /// order stops nobody else. A step takes what was seen of the orders: when it has failed, they are looked at again.
    fn contained<T>(
        &mut self,
        mut batch: Vec<Due>,
        step: impl Fn(&Self, &mut [Due]) -> Result<T>,
    ) -> Result<Vec<(Vec<Due>, T)>> {
        let mut out = Vec::new();
        if batch.is_empty() {
            return Ok(out);
        }
        let seen = batch.iter().any(|d| d.seen.is_some());
        let mut whole = subtransaction(|| step(self, &mut batch));
        if seen && matches!(&whole, Err(e) if !e.is_cancel() && !e.is_lock()) {
            whole = subtransaction(|| step(self, &mut batch));
        }
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
                    let mut alone = [due];
                    match subtransaction(|| step(self, &mut alone)) {
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
}
