//! Orphans that go at once, before their orders: copied in one transaction, read back, compared and overwritten in the next, as
//! whole orders are. One that anybody else uses goes with its order.

use std::collections::{HashMap, HashSet};

use crate::engine::alive;
use crate::engine::archive;
use crate::engine::due::{self, Clock, Due};
use crate::engine::gather::LiveRecord;
use crate::engine::overwrite;
use crate::engine::plan::Plan;
use crate::engine::redact;
use crate::engine::rotation::Keyring;
use crate::engine::state;
use crate::engine::turn;
use crate::pg::error::{Error, Result};
use crate::pg::guc;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::xact::{Boundary, Mode};

/// Orders that one row may be copied for; with more it goes with the last of them.
const MOST: i64 = 1000;

/// A table's name in the archive and a row's key.
pub type Place = (String, String);

/// An order that is to let go of a row.
#[derive(Clone)]
struct Entry {
    id: i64,
    order: String,
}

/// Rows that are due by themselves, with the orders that were imported with them.
#[derive(Default)]
pub struct Rows(HashMap<Place, Vec<Entry>>);

impl Rows {
    /// Whether a row that was found for an order is one of these.
    pub fn has(&self, plan: &Plan, due: &Due, record: &LiveRecord) -> bool {
        let place = (plan.tables[record.table].archived_as.clone(), record.key_text.clone());
        let entries = self.0.get(&place);
        entries.is_some_and(|e| e.iter().any(|e| e.order == due.order_key))
    }

    /// The orders that let go of a row together, as a JSON array.
    pub fn together(&self, table: &str, key: &str) -> String {
        let entries = self.0.get(&(table.to_owned(), key.to_owned()));
        let orders = entries.into_iter().flatten().map(|e| e.order.as_str());
        serde_json::Value::from_iter(orders).to_string()
    }

    fn orders(&self) -> Vec<&str> {
        let mut orders: Vec<&str> = self.0.values().flatten().map(|e| e.order.as_str()).collect();
        orders.sort_unstable();
        orders.dedup();
        orders
    }

    fn ids(&self, of: impl Fn(&Place) -> bool) -> Vec<i64> {
        let entries = self.0.iter().filter(|(place, _)| of(place));
        entries.flat_map(|(_, e)| e).map(|e| e.id).collect()
    }
}

/// A policy's way through them.
pub struct Apart<'a> {
    pub plan: &'a Plan,
    pub keys: &'a mut Keyring,
    pub clock: &'a Clock,
    pub boundary: Boundary,
    /// What went wrong with a row.
    pub trouble: Option<Error>,
    /// Rows that were taken in this pass: each once, whoever has locked an order of theirs.
    pub tried: HashSet<Place>,
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
            self.boundary.commit()?;
            match rows {
                None => return Ok(()),
                Some(rows) if rows.0.is_empty() => {}
                Some(rows) => self.work(rows)?,
            }
        }
    }

    /// The next rows. They wait for a while, whatever happens: what was interrupted is not repeated at once. `None`: there are no
    /// more; empty: those that came next are not due by themselves after all.
    fn take(&mut self, size: i64) -> Result<Option<Rows>> {
        let next = on_keys(|| {
            sql::read(
                "SELECT DISTINCT n.table_name, n.record_key FROM (SELECT r.table_name, r.record_key FROM amazon_pii.orphan r \
                    WHERE r.policy = $1 AND r.apart = 'due' AND r.next_attempt_at <= $3::timestamptz ORDER BY r.next_attempt_at LIMIT $2) AS n",
                &[
                    Arg::Text(Some(&self.plan.policy)),
                    Arg::Int(size),
                    Arg::Text(Some(&self.clock.now)),
                ],
            )
        })?;
        let mut places = (Vec::new(), Vec::new());
        for row in &next {
            let place = (row.string(0)?, row.string(1)?);
            if self.tried.insert(place.clone()) {
                places.0.push(place.0);
                places.1.push(place.1);
            }
        }
        let found = on_keys(|| {
            sql::write(
                // The second condition is that of the index.
                // ident-ok: made of constants.
                &format!(
                    "SELECT f.orphan_id, n.t, n.k, f.order_key, EXISTS (SELECT FROM amazon_pii.order_state o WHERE o.policy = $1 \
                        AND o.order_key = f.order_key AND {}) FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (t, k) \
                     CROSS JOIN LATERAL (SELECT q.orphan_id, q.order_key FROM amazon_pii.orphan q WHERE q.policy = $1 AND q.table_name = n.t \
                        AND q.record_key = n.k AND q.apart = 'due' AND q.apart IS DISTINCT FROM 'done' LIMIT $4 FOR UPDATE SKIP LOCKED) AS f",
                    due::UNTOUCHED
                ),
                &[
                    Arg::Text(Some(&self.plan.policy)),
                    Arg::texts(&places.0),
                    Arg::texts(&places.1),
                    Arg::Int(MOST + 1),
                ],
            )
        })?;
        if found.is_empty() {
            return Ok(None);
        }
        let mut rows = Rows::default();
        let mut with_order = Vec::new();
        for row in &found {
            let (id, place) = (row.int(0)?, (row.string(1)?, row.string(2)?));
            // Of tables that the policy names no more, and of orders that are redacted, or gone, nothing is due by itself.
            let is_named = self.plan.tables.iter().any(|t| t.archived_as == place.0);
            if is_named && row.bool(4)? && super::at_once(self.plan) {
                let order = row.string(3)?;
                rows.0.entry(place).or_default().push(Entry { id, order });
            } else {
                with_order.push(id);
            }
        }
        let many = rows
            .0
            .extract_if(|_, orders| i64::try_from(orders.len()).is_ok_and(|n| n > MOST));
        with_order.extend(many.flat_map(|(_, entries)| entries).map(|e| e.id));
        on_keys(|| {
            sql::execute(
                "UPDATE amazon_pii.orphan r SET apart = NULL WHERE r.orphan_id = ANY ($1)",
                &[Arg::Ints(with_order)],
            )?;
            sql::execute(
                "UPDATE amazon_pii.orphan r SET next_attempt_at = GREATEST(o.held_until, o.effective_at, \
                    pg_catalog.now() + pg_catalog.make_interval(secs => $2)) FROM amazon_pii.order_state o \
                 WHERE r.orphan_id = ANY ($1) AND o.policy = r.policy AND o.order_key = r.order_key",
                &[
                    Arg::Ints(rows.ids(|_| true)),
                    Arg::Int(i64::try_from(guc::naptime()).unwrap_or(60)),
                ],
            )
        })?;
        Ok(Some(rows))
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
                    // A whole table is locked: each row alone would wait for it as long as these did.
                    let is_in_vain = e.is_lock() && overwrite::is_locked(self.plan)?;
                    if rows.0.len() > 1 && !is_in_vain {
                        rest.extend(rows.0.into_iter().map(|row| Rows(HashMap::from([row]))));
                    } else if !e.is_lock() {
                        self.fail(&rows, &e)?;
                        self.trouble = Some(e);
                    }
                    self.boundary.commit()?;
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn together(&mut self, rows: &Rows) -> Result<()> {
        turn::take(&self.plan.policy, Mode::Alone)?;
        self.keys.refresh(&self.plan.policy)?;
        let (mut batch, rows) = self.locked(rows)?;
        subtransaction(|| archive::apart(self.plan, self.keys, &mut batch, &rows))?;
        self.boundary.commit()?;
        turn::take(&self.plan.policy, Mode::Alone)?;
        self.keys.refresh(&self.plan.policy)?;
        // Held, or asked for, meanwhile: they wait.
        let (batch, rows) = self.locked(&rows)?;
        let others = alive::other_policies(self.plan)?;
        let outcome = subtransaction(|| redact::apart(self.plan, &others, self.keys, self.clock, &batch, &rows))?;
        let done = rows.ids(|p| !outcome.needed.contains(p) && !outcome.left.contains(p));
        on_keys(|| {
            sql::execute(
                "UPDATE amazon_pii.orphan r SET apart = 'done' WHERE r.orphan_id = ANY ($1)",
                &[Arg::Ints(done)],
            )?;
            // One that came to the same row meanwhile lets go of it soon.
            sql::execute(
                "UPDATE amazon_pii.orphan r SET apart = NULL WHERE r.orphan_id = ANY ($1) AND NOT EXISTS (SELECT FROM amazon_pii.orphan q \
                    WHERE q.policy = r.policy AND q.table_name = r.table_name AND q.record_key = r.record_key AND q.apart = 'due' \
                    AND q.apart IS DISTINCT FROM 'done' AND q.orphan_id <> ALL ($1))",
                &[Arg::Ints(rows.ids(|p| outcome.needed.contains(p)))],
            )
        })?;
        self.boundary.commit()
    }

    /// Locks the orders of rows; without those rows of which not every order can be had now.
    fn locked(&self, rows: &Rows) -> Result<(Vec<Due>, Rows)> {
        let mut batch = due::untouched(self.plan, self.clock, &rows.orders())?;
        let had: HashSet<&str> = batch.iter().map(|d| d.order_key.as_str()).collect();
        let all = rows.0.iter();
        let all = all.filter(|(_, entries)| entries.iter().all(|e| had.contains(e.order.as_str())));
        let rows = Rows(all.map(|(place, entries)| (place.clone(), entries.clone())).collect());
        let wanted: HashSet<&str> = rows.orders().into_iter().collect();
        batch.retain(|d| wanted.contains(d.order_key.as_str()));
        Ok((batch, rows))
    }

    /// Rows that failed are tried again in an hour, or go with their orders, which say why.
    fn fail(&self, rows: &Rows, error: &Error) -> Result<()> {
        on_keys(|| {
            sql::execute(
                "UPDATE amazon_pii.orphan r SET next_attempt_at = pg_catalog.now() + '1 hour'::interval WHERE r.orphan_id = ANY ($1)",
                &[Arg::Ints(rows.ids(|_| true))],
            )
        })?;
        for order in rows.orders() {
            state::troubled(self.plan, order, error)?;
        }
        Ok(())
    }
}
