//! A cycle's way to a cold server. Each access is a transaction of its own: it holds no lock on the shop's tables, nor on the states of
//! orders, however long the server takes; and what the server does at COMMIT cannot undo anything of ours.

use std::collections::HashSet;

use super::due::Due;
use super::plan::Plan;
use super::rekey;
use super::state;
use super::turn;
use super::vault::{self, Cold};
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::xact::{Boundary, Mode};

/// Orders that are sent together when nothing else is to be done.
const TOGETHER: i64 = 100;

/// One process's way.
pub struct Way<'a> {
    plan: &'a Plan,
    boundary: Boundary,
    /// It did not answer; in this cycle it is not asked again.
    down: Option<Error>,
    /// It did.
    up: bool,
}

/// What was read.
#[derive(Default)]
pub struct Found {
    pub cold: Cold,
    /// Orders of which it could not be read, each with the reason.
    pub failed: Vec<(String, Error)>,
}

/// What became of copies that were to be sent.
#[derive(Default)]
pub struct Shipped {
    /// What the server has of their orders.
    pub cold: Cold,
    /// Orders that it refused, each with the reason.
    pub failed: Vec<(String, Error)>,
    /// Orders with something here that is not there yet.
    pub left: HashSet<String>,
}

impl<'a> Way<'a> {
    pub fn new(plan: &'a Plan, boundary: Boundary) -> Self {
        Self {
            plan,
            boundary,
            down: None,
            up: false,
        }
    }

    /// Whether it did not answer, and the policy goes on without.
    pub fn is_down(&self) -> bool {
        self.down.is_some()
    }

    /// Why it is not asked any more in this cycle.
    pub fn why_down(&self) -> Option<&Error> {
        self.down.as_ref()
    }

    /// What it has of these orders. Begins with a new transaction, and ends with one.
    ///
    /// # Errors
    /// It does not answer, and the policy waits for it; a cancel.
    pub fn look(&mut self, mode: Mode, orders: &[String]) -> Result<Found> {
        let plan = self.plan;
        self.found(mode, orders, |orders| vault::fetch(&plan.archive, &plan.policy, orders))
    }

    /// [`Way::look`], for documents that are to be moved.
    ///
    /// # Errors
    /// As [`Way::look`].
    pub fn look_to_move(&mut self, mode: Mode, orders: &[String]) -> Result<Found> {
        let plan = self.plan;
        self.found(mode, orders, |orders| {
            vault::fetch_to_move(&plan.archive, &plan.policy, orders)
        })
    }

    fn found(&mut self, mode: Mode, orders: &[String], access: impl Fn(&[&str]) -> Result<Cold>) -> Result<Found> {
        let (parts, failed) = self.each(mode, orders, access)?;
        let mut cold = Cold::default();
        parts.into_iter().for_each(|part| cold.add(part));
        Ok(Found { cold, failed })
    }

    /// Sends what is here and not there, and reads it back. Begins with a new transaction, and ends with one.
    ///
    /// # Errors
    /// As [`Way::look`].
    pub fn ship(&mut self, keys: &MasterKeys, mode: Mode, orders: &[String]) -> Result<Shipped> {
        let plan = self.plan;
        let (_, failed) = self.each(mode, orders, |orders| {
            vault::send(&plan.archive, keys, &plan.policy, orders)
        })?;
        let sent: Vec<String> = orders
            .iter()
            .filter(|order| failed.iter().all(|(of, _)| of != *order))
            .cloned()
            .collect();
        let mut shipped = Shipped {
            failed,
            ..Shipped::default()
        };
        let (proofs, unread) = self.each(mode, &sent, |orders| vault::prove(&plan.archive, &plan.policy, orders))?;
        shipped.failed.extend(unread);
        for (cold, left) in proofs {
            shipped.cold.add(cold);
            shipped.left.extend(left);
        }
        // Where the policy goes on without the server, the copies here are the ones that count.
        if self.is_down() && plan.archive.spool {
            shipped.left.clear();
        }
        Ok(shipped)
    }

    /// Runs an access for all of these orders, or, where it fails for a reason of one of them, for each. Nothing once it is down.
    #[allow(clippy::type_complexity)]
    fn each<T>(
        &mut self,
        mode: Mode,
        orders: &[String],
        access: impl Fn(&[&str]) -> Result<T>,
    ) -> Result<(Vec<T>, Vec<(String, Error)>)> {
        let (mut done, mut failed) = (Vec::new(), Vec::new());
        if let Some(e) = &self.down {
            // Only who goes on without it takes nothing for an answer.
            return if self.plan.archive.spool {
                Ok((done, failed))
            } else {
                Err(e.clone())
            };
        }
        let all: Vec<&str> = orders.iter().map(String::as_str).collect();
        let mut parts = vec![all.as_slice()];
        let mut slow = HashSet::new();
        while let Some(part) = parts.pop() {
            if part.is_empty() {
                continue;
            }
            // Who has the policy's turn is no order's fault, and no server's.
            turn::take(&self.plan.policy, mode)?;
            let error = match self.apart(|| access(part)) {
                Ok(result) => {
                    self.up = true;
                    done.push(result);
                    continue;
                }
                Err(e) if e.is_cancel() => return Err(e),
                Err(e) => e,
            };
            // It may only be too much at once.
            if error.is_unreachable() && !(error.is_out_of_time() && self.answers(mode)?) {
                self.gave_up(error)?;
                break;
            }
            match part {
                // A moment's slowness is no order's fault either.
                [order] if error.is_out_of_time() && slow.insert(*order) => parts.push(part),
                [order] => failed.push(((*order).to_owned(), error)),
                _ if error.is_out_of_time() => {
                    let (first, rest) = part.split_at(part.len() / 2);
                    parts.extend([rest, first]);
                }
                // One of them is at fault.
                _ => parts.extend(part.chunks(1).rev()),
            }
        }
        Ok((done, failed))
    }

    /// Whether it answers at all.
    fn answers(&self, mode: Mode) -> Result<bool> {
        let (place, policy) = (&self.plan.archive, &self.plan.policy);
        turn::take(policy, mode)?;
        match self.apart(|| vault::fetch(place, policy, &["[]"])) {
            Ok(_) => Ok(true),
            Err(e) if e.is_cancel() => Err(e),
            Err(_) => Ok(false),
        }
    }

    /// Runs an access, and ends the transaction.
    fn apart<T>(&self, access: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(foreign) = &self.plan.archive.foreign else {
            return Err(Error::internal("an archive has no foreign table"));
        };
        vault::in_time(foreign, || {
            let mut made = false;
            let result = subtransaction(|| {
                let value = access()?;
                made = true;
                Ok(value)
            });
            let committed = match result {
                Ok(value) => self.boundary.try_commit().map(|()| value),
                Err(e) => {
                    self.boundary.rollback();
                    Err(e)
                }
            };
            // The server has a part in what ends an access, too: the savepoint's release, and the commit.
            committed.map_err(|e| if made { vault::error(foreign, e) } else { e })
        })
    }

    fn gave_up(&mut self, e: Error) -> Result<()> {
        if !self.plan.archive.spool {
            self.down = Some(e.clone());
            return Err(e);
        }
        self.down = Some(e);
        Ok(())
    }

    /// Sends what is still here when nothing else is to be done: what was kept while the server did not answer, what an archive of
    /// this database held before; deletes there what was destroyed. Begins with a new transaction, and ends with one. Returns the error
    /// of an order.
    ///
    /// # Errors
    /// As [`Way::look`].
    pub fn rest(&mut self, keys: &MasterKeys) -> Result<Option<Error>> {
        let (place, policy) = (&self.plan.archive, &self.plan.policy);
        if place.foreign.is_none() || self.is_down() {
            return Ok(None);
        }
        let mut trouble = None;
        let mut after: Option<String> = None;
        loop {
            let orders = vault::unsent(place, policy, after.as_deref(), TOGETHER)?;
            self.boundary.commit()?;
            let Some(last) = orders.last().cloned() else { break };
            let shipped = self.ship(keys, Mode::Alone, &orders)?;
            trouble = trouble.or_else(|| shipped.failed.into_iter().next().map(|(_, e)| e));
            if self.is_down() {
                break;
            }
            after = Some(last);
        }
        trouble = trouble.or(self.tidy()?);
        let was_down = !self.up && !self.is_down() && was_down(policy)?;
        self.boundary.commit()?;
        if was_down {
            // Nobody has asked it anything: whether it answers is all that is wanted.
            self.look(Mode::Alone, &["[]".to_owned()])?;
        }
        Ok(trouble)
    }

    /// What is kept here for orders that are redacted meanwhile goes.
    fn tidy(&mut self) -> Result<Option<Error>> {
        let plan = self.plan;
        let mut trouble = None;
        let mut after: Option<String> = None;
        while !self.is_down() {
            let orders = vault::done_with(&plan.archive, &plan.policy, after.as_deref(), TOGETHER)?;
            self.boundary.commit()?;
            let Some(last) = orders.last().cloned() else { break };
            let (_, failed) = self.each(Mode::Alone, &orders, |orders| {
                vault::tidy(&plan.archive, &plan.policy, orders)
            })?;
            trouble = trouble.or_else(|| failed.into_iter().next().map(|(_, e)| e));
            after = Some(last);
        }
        Ok(trouble)
    }

    /// What is known of the server at the end of a cycle: noted, and announced when it changes. Returns why it is not used.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn note(&self) -> Result<Option<Error>> {
        if let Some(foreign) = self.plan.archive.foreign.as_ref().filter(|_| self.up || self.is_down()) {
            note(&self.plan.policy, &foreign.shown(), self.down.as_ref())?;
        }
        Ok(self.down.clone())
    }
}

/// Those of some orders that can be archived and redacted without what a cold server has of them: it has nothing that is needed.
/// And the others.
///
/// # Errors
/// Errors of the server.
pub fn may_go_on(plan: &Plan, batch: Vec<Due>) -> Result<(Vec<Due>, Vec<Due>)> {
    let moved: HashSet<String> = rekey::pending(plan)?.into_iter().collect();
    // What was redacted once is told from new personal data by its copy.
    Ok(batch
        .into_iter()
        .partition(|d| d.redacted_version.is_none() && !d.purged && !moved.contains(&d.order_key)))
}

/// Whether it did not answer when a cycle asked last.
fn was_down(policy: &str) -> Result<bool> {
    let rows = on_keys(|| {
        sql::read(
            "SELECT EXISTS (SELECT FROM amazon_pii.cold_server c WHERE c.policy = $1 AND c.down_since IS NOT NULL)",
            &[Arg::Text(Some(policy))],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
}

fn note(policy: &str, foreign: &str, down: Option<&Error>) -> Result<()> {
    let rows = on_keys(|| {
        sql::write(
            "INSERT INTO amazon_pii.cold_server AS c (policy, up_at, down_since, last_error) \
             VALUES ($1, CASE WHEN $2 IS NULL THEN pg_catalog.clock_timestamp() END, CASE WHEN $2 IS NOT NULL THEN pg_catalog.clock_timestamp() END, $2) \
             ON CONFLICT (policy) DO UPDATE SET up_at = CASE WHEN $2 IS NULL THEN pg_catalog.clock_timestamp() ELSE c.up_at END, \
                down_since = CASE WHEN $2 IS NOT NULL THEN COALESCE(c.down_since, pg_catalog.clock_timestamp()) END, last_error = $2, \
                was_down = c.down_since IS NOT NULL \
             RETURNING c.was_down",
            &[Arg::Text(Some(policy)), Arg::Text(down.map(Error::stored).as_deref())],
        )
    })?;
    let was_down = rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)?;
    if was_down == down.is_some() {
        return Ok(());
    }
    let status = if down.is_some() {
        "archive_unreachable"
    } else {
        "archive_reachable"
    };
    state::notify(&serde_json::json!({ "policy": policy, "status": status, "foreign_table": foreign }))
}
