//! Orphans that go at once, before their orders: copied in one transaction, read back, compared and overwritten in the next, as
//! whole orders are. One that anybody else uses goes with its order.

use std::collections::{HashMap, HashSet};

use crate::domain::vault::MasterKeys;
use crate::engine::alive;
use crate::engine::archive;
use crate::engine::due::{self, Clock, Due};
use crate::engine::gather::LiveRecord;
use crate::engine::plan::Plan;
use crate::engine::redact;
use crate::engine::turn;
use crate::pg::error::{Error, Result};
use crate::pg::guc;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::xact::{Boundary, Mode};

/// Orders that one row may be copied for; with more it goes with the last of them.
const MOST: i64 = 5000;

/// A table's name in the archive and a row's key.
pub type Place = (String, String);

/// Rows that are due by themselves, with the orders that were imported with them.
#[derive(Default)]
pub struct Rows(HashMap<Place, Vec<String>>);

impl Rows {
    /// Whether a row that was found for an order is one of these.
    pub fn has(&self, plan: &Plan, due: &Due, record: &LiveRecord) -> bool {
        let place = (plan.tables[record.table].archived_as.clone(), record.key_text.clone());
        self.0.get(&place).is_some_and(|orders| orders.contains(&due.order_key))
    }

    fn orders(&self) -> Vec<&str> {
        let mut orders: Vec<&str> = self.0.values().flatten().map(String::as_str).collect();
        orders.sort_unstable();
        orders.dedup();
        orders
    }
}

/// A policy's way through them.
pub struct Apart<'a> {
    pub plan: &'a Plan,
    pub keys: &'a MasterKeys,
    pub clock: &'a Clock,
    pub boundary: Boundary,
    /// What went wrong with a row.
    pub trouble: Option<Error>,
}

impl Apart<'_> {
    /// Redacts those that are due, `size` rows at a time. Ends the transaction.
    ///
    /// # Errors
    /// A cancel, or errors of our own tables.
    pub fn all(&mut self, size: i64) -> Result<()> {
        loop {
            turn::take(&self.plan.policy, Mode::Alone)?;
            let rows = self.take(size)?;
            if rows.0.is_empty() {
                return self.boundary.commit();
            }
            self.boundary.commit()?;
            self.work(rows)?;
        }
    }

    /// The next rows. They wait for a while, whatever happens: an interrupted batch is not repeated at once.
    fn take(&self, size: i64) -> Result<Rows> {
        let policy = Arg::Text(Some(&self.plan.policy));
        let next = on_keys(|| {
            sql::read(
                "SELECT DISTINCT n.table_name, n.record_key FROM (SELECT r.table_name, r.record_key FROM amazon_pii.orphan r \
                    WHERE r.policy = $1 AND r.apart = 'due' AND r.next_attempt_at <= pg_catalog.now() ORDER BY r.next_attempt_at LIMIT $2) AS n",
                &[policy.clone(), Arg::Int(size)],
            )
        })?;
        if next.is_empty() {
            return Ok(Rows::default());
        }
        let mut places = (Vec::new(), Vec::new());
        for row in &next {
            places.0.push(row.string(0)?);
            places.1.push(row.string(1)?);
        }
        // Of the tables that the policy names no more, and of orders that are redacted, or gone, nothing is due by itself.
        let tables: Vec<&str> = self.plan.tables.iter().map(|t| t.archived_as.as_str()).collect();
        on_keys(|| {
            sql::execute(
                // ident-ok: made of constants.
                &format!(
                    "UPDATE amazon_pii.orphan r SET apart = NULL FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (t, k) \
                     WHERE r.policy = $1 AND r.apart = 'due' AND r.table_name = n.t AND r.record_key = n.k \
                     AND (n.t <> ALL ($4) OR NOT EXISTS (SELECT FROM amazon_pii.order_state o WHERE o.policy = r.policy \
                        AND o.order_key = r.order_key AND {}))",
                    due::UNTOUCHED
                ),
                &[
                    policy.clone(),
                    Arg::texts(&places.0),
                    Arg::texts(&places.1),
                    Arg::texts(&tables),
                ],
            )
        })?;
        let entries = on_keys(|| {
            sql::write(
                "UPDATE amazon_pii.orphan r SET next_attempt_at = pg_catalog.now() + pg_catalog.make_interval(secs => $5) \
                 FROM (SELECT f.orphan_id FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (t, k) \
                    CROSS JOIN LATERAL (SELECT q.orphan_id FROM amazon_pii.orphan q WHERE q.policy = $1 AND q.table_name = n.t \
                        AND q.record_key = n.k AND q.apart = 'due' AND q.apart IS DISTINCT FROM 'done' LIMIT $4 + 1) AS f) AS w (id) \
                 WHERE r.orphan_id = w.id RETURNING r.table_name, r.record_key, r.order_key",
                &[
                    policy.clone(),
                    Arg::texts(&places.0),
                    Arg::texts(&places.1),
                    Arg::Int(MOST),
                    Arg::Int(i64::try_from(guc::naptime()).unwrap_or(60)),
                ],
            )
        })?;
        let mut rows = Rows::default();
        for entry in &entries {
            let place = (entry.string(0)?, entry.string(1)?);
            rows.0.entry(place).or_default().push(entry.string(2)?);
        }
        let many: Vec<Place> = rows
            .0
            .extract_if(|_, orders| i64::try_from(orders.len()).is_ok_and(|n| n > MOST))
            .map(|(place, _)| place)
            .collect();
        self.write(&many, None)?;
        Ok(rows)
    }

    /// All of them together; if that fails, row by row, so that a bad one stops nobody else.
    fn work(&mut self, rows: Rows) -> Result<()> {
        let mut rest = vec![rows];
        while let Some(rows) = rest.pop() {
            let outcome = self.together(&rows);
            match outcome {
                Err(e) if e.is_cancel() => return Err(e),
                Err(e) => {
                    self.boundary.rollback();
                    turn::take(&self.plan.policy, Mode::Alone)?;
                    if rows.0.len() > 1 && !e.is_lock() {
                        rest.extend(rows.0.into_iter().map(|row| Rows(HashMap::from([row]))));
                    } else if !e.is_lock() {
                        self.wait(rows)?;
                        self.trouble = Some(e);
                    }
                    self.boundary.commit()?;
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn together(&self, rows: &Rows) -> Result<()> {
        turn::take(&self.plan.policy, Mode::Alone)?;
        let (mut batch, rows) = self.locked(rows)?;
        subtransaction(|| archive::apart(self.plan, self.keys, &mut batch, &rows))?;
        self.boundary.commit()?;
        turn::take(&self.plan.policy, Mode::Alone)?;
        // Held, retrieved or asked for meanwhile: they wait.
        let (batch, rows) = self.locked(&rows)?;
        let others = alive::other_policies(self.plan)?;
        let outcome = subtransaction(|| redact::apart(self.plan, &others, self.keys, self.clock, &batch, &rows))?;
        let needed: Vec<Place> = outcome.needed.iter().cloned().collect();
        self.write(&needed, None)?;
        let done = rows
            .0
            .keys()
            .filter(|p| !outcome.needed.contains(*p) && !outcome.left.contains(*p));
        self.write(&done.cloned().collect::<Vec<_>>(), Some("done"))?;
        self.boundary.commit()
    }

    /// Locks the orders of rows; without those rows of which not every order can be had now.
    fn locked(&self, rows: &Rows) -> Result<(Vec<Due>, Rows)> {
        let mut batch = due::untouched(self.plan, self.clock, &rows.orders())?;
        let had: HashSet<&str> = batch.iter().map(|d| d.order_key.as_str()).collect();
        let all = rows.0.iter();
        let all = all.filter(|(_, orders)| orders.iter().all(|o| had.contains(o.as_str())));
        let rows = Rows(all.map(|(place, orders)| (place.clone(), orders.clone())).collect());
        let wanted: HashSet<String> = rows.orders().into_iter().map(str::to_owned).collect();
        batch.retain(|d| wanted.contains(&d.order_key));
        Ok((batch, rows))
    }

    /// A row that failed is tried again in an hour, or goes with its order.
    fn wait(&self, rows: Rows) -> Result<()> {
        let (tables, keys): (Vec<String>, Vec<String>) = rows.0.into_keys().unzip();
        on_keys(|| {
            sql::execute(
                "UPDATE amazon_pii.orphan r SET next_attempt_at = pg_catalog.now() + '1 hour'::interval \
                 FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (t, k) \
                 WHERE r.policy = $1 AND r.apart = 'due' AND r.table_name = n.t AND r.record_key = n.k",
                &[
                    Arg::Text(Some(&self.plan.policy)),
                    Arg::texts(&tables),
                    Arg::texts(&keys),
                ],
            )
        })?;
        Ok(())
    }

    /// What becomes of rows that were due.
    fn write(&self, places: &[Place], apart: Option<&str>) -> Result<()> {
        if places.is_empty() {
            return Ok(());
        }
        let (tables, keys): (Vec<&str>, Vec<&str>) = places.iter().map(|(t, k)| (t.as_str(), k.as_str())).unzip();
        on_keys(|| {
            sql::execute(
                "UPDATE amazon_pii.orphan r SET apart = $4 FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (t, k) \
                 WHERE r.policy = $1 AND r.apart = 'due' AND r.table_name = n.t AND r.record_key = n.k",
                &[
                    Arg::Text(Some(&self.plan.policy)),
                    Arg::texts(&tables),
                    Arg::texts(&keys),
                    Arg::Text(apart),
                ],
            )
        })?;
        Ok(())
    }
}
