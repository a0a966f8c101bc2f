//! The rows that hold, or held, personal data of an order. The order's own state lists them, and says what became of
//! them; a row of `record_state` is written only for one that fares otherwise: waiting, retrieved, gone, come back. That
//! begins with redaction: an order that was never redacted has none, orphans that went before it aside.

use std::collections::HashMap;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::due::Due;
use super::plan::Plan;
use super::state::policy_each;
use super::walk::{Values, key_text};
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// One row of the user's, as its order lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed(
    /// The table's name in the archive.
    pub String,
    /// Its key, as JSON text.
    pub String,
    /// The alias of the entry that led to it.
    pub String,
    /// Newest archived version.
    pub i64,
);

/// What an order lists.
#[derive(Debug, Clone, Default)]
pub struct RecordList(Vec<Listed>);

impl RecordList {
    /// Reads the stored form; NULL is an empty list.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: Option<&str>) -> Result<Self> {
        text.map_or_else(
            || Ok(Self::default()),
            |t| {
                let list = serde_json::from_str(t).map(Self);
                list.map_err(|_| Error::internal("a stored list of records is damaged"))
            },
        )
    }

    /// The stored form; `None` for an empty list.
    pub fn text(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| serde_json::to_string(&self.0).unwrap_or_default())
    }

    /// Lists a record, or its newer version.
    pub fn put(&mut self, record: Listed) {
        match self.0.iter_mut().find(|l| l.0 == record.0 && l.1 == record.1) {
            Some(known) => known.3 = record.3,
            None => self.0.push(record),
        }
    }

    /// Whether it lists this record.
    pub fn lists(&self, table: &str, key: &str) -> bool {
        self.0.iter().any(|l| l.0 == table && l.1 == key)
    }

    /// The newest archived version of a record that it knows of.
    pub fn version(&self, table: &str, key: &str) -> i64 {
        let listed = self.0.iter().find(|l| l.0 == table && l.1 == key);
        listed.map_or(0, |l| l.3)
    }

    /// Follows changes of keys. Returns those that concern it: (old, new).
    pub fn rename(&mut self, table: &str, renames: &HashMap<&str, &str>) -> Vec<(String, String)> {
        let mut done = Vec::new();
        for listed in self.0.iter_mut().filter(|l| l.0 == table) {
            if let Some(new) = renames.get(listed.1.as_str()) {
                done.push((std::mem::replace(&mut listed.1, (*new).to_owned()), (*new).to_owned()));
            }
        }
        done
    }

    pub fn iter(&self) -> impl Iterator<Item = &Listed> {
        self.0.iter()
    }
}

/// How a record fares that does not fare as its order does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It holds personal data although its order is redacted.
    Archived,
    /// Another order keeps it alive.
    Waiting,
    /// Its personal data was written back.
    Retrieved,
    /// The row does not exist any more.
    Gone,
    /// It was redacted, although its order is not yet.
    Redacted,
}

impl Fate {
    fn word(self) -> &'static str {
        match self {
            Self::Archived => "archived",
            Self::Waiting => "waiting",
            Self::Retrieved => "retrieved",
            Self::Gone => "gone",
            Self::Redacted => "redacted",
        }
    }

    fn of(word: &str) -> Result<Self> {
        let all = [
            Self::Archived,
            Self::Waiting,
            Self::Retrieved,
            Self::Gone,
            Self::Redacted,
        ];
        all.into_iter()
            .find(|f| f.word() == word)
            .ok_or_else(|| Error::internal("a record has an unknown state"))
    }
}

/// What is stored of the records of a batch; positions are into the batch.
#[derive(Default)]
pub struct Stored {
    lists: Vec<(Rc<RecordList>, bool)>,
    fates: HashMap<(usize, String, String), Fate>,
}

impl Stored {
    /// What is stored of the orders of a batch.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn of(plan: &Plan, batch: &[Due]) -> Result<Self> {
        let may_have = |d: &Due| d.redacted_version.is_some() || !plan.generic.is_empty();
        let asked = batch.iter().enumerate().filter(|(_, d)| may_have(d));
        Ok(Self {
            lists: batch
                .iter()
                .map(|d| (d.records.clone(), d.redacted_version.is_some()))
                .collect(),
            fates: fates(plan, asked.map(|(i, d)| (d.order_key.as_str(), i)).collect())?,
        })
    }

    /// The same of some orders of the batch, which are at these positions.
    pub fn of_some(&self, positions: &[usize]) -> Self {
        let new: HashMap<usize, usize> = positions.iter().enumerate().map(|(new, old)| (*old, new)).collect();
        let fates = self.fates.iter();
        let fates = fates.filter_map(|((order, table, key), fate)| {
            let order = new.get(order)?;
            Some(((*order, table.clone(), key.clone()), *fate))
        });
        Self {
            lists: positions.iter().map(|i| self.lists[*i].clone()).collect(),
            fates: fates.collect(),
        }
    }

    /// [`Stored::of`] orders of which only the keys are known.
    ///
    /// # Errors
    /// As [`Stored::of`].
    pub fn by_keys(plan: &Plan, keys: &[Values]) -> Result<Self> {
        let texts = keys.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
        let keys: Vec<&str> = texts.iter().map(String::as_str).collect();
        let rows = on_keys(|| {
            sql::read(
                "SELECT o.order_key, o.records, o.redacted_version IS NOT NULL FROM amazon_pii.order_state o \
                 WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2)",
                &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
            )
        })?;
        let mut lists = vec![(Rc::default(), false); keys.len()];
        let positions: HashMap<&str, usize> = keys.iter().enumerate().map(|(i, k)| (*k, i)).collect();
        for row in &rows {
            if let Some(i) = positions.get(row.str(0)?) {
                lists[*i] = (Rc::new(RecordList::parse(row.text(1)?)?), row.bool(2)?);
            }
        }
        Ok(Self {
            lists,
            fates: fates(plan, positions)?,
        })
    }

    /// How a record fares, if not as its order.
    pub fn fate(&self, order: usize, table: &str, key: &str) -> Option<Fate> {
        if self.fates.is_empty() {
            return None;
        }
        self.fates.get(&(order, table.to_owned(), key.to_owned())).copied()
    }

    /// The records that hold personal data still, or may: (order, record).
    pub fn open(&self) -> impl Iterator<Item = (usize, &Listed)> {
        self.lists
            .iter()
            .enumerate()
            .flat_map(move |(order, (list, redacted))| {
                list.iter()
                    .filter(move |l| match self.fate(order, &l.0, &l.1) {
                        None => !redacted,
                        Some(fate) => fate != Fate::Gone,
                    })
                    .map(move |l| (order, l))
            })
    }
}

/// The fates of records of these orders, which are given with their positions.
fn fates(plan: &Plan, orders: HashMap<&str, usize>) -> Result<HashMap<(usize, String, String), Fate>> {
    let mut out = HashMap::new();
    if orders.is_empty() {
        return Ok(out);
    }
    let keys: Vec<&str> = orders.keys().copied().collect();
    let rows = on_keys(|| {
        sql::read(
            "SELECT r.order_key, r.table_name, r.record_key, r.status FROM amazon_pii.record_state r \
             WHERE r.policy IS NOT DISTINCT FROM $1 AND r.order_key = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )
    })?;
    for row in &rows {
        if let Some(i) = orders.get(row.str(0)?) {
            out.insert((*i, row.string(1)?, row.string(2)?), Fate::of(row.str(3)?)?);
        }
    }
    Ok(out)
}

/// A record with its new fate; `None`: as its order.
pub struct Change<'a> {
    pub order_key: &'a str,
    pub table: &'a str,
    pub record_key: &'a str,
    pub fate: Option<Fate>,
    /// The order that keeps it alive.
    pub witness: Option<&'a str>,
}

/// Writes down how records fare.
///
/// # Errors
/// Errors of the server.
pub fn write<'a>(plan: &'a Plan, changes: &[Change<'a>]) -> Result<()> {
    let (own, as_order): (Vec<&Change<'a>>, Vec<&Change<'a>>) = changes.iter().partition(|c| c.fate.is_some());
    if !as_order.is_empty() {
        on_keys(|| {
            sql::execute(
                "DELETE FROM amazon_pii.record_state r USING ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), \
                    pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (p, o, t, k) \
                 WHERE r.policy = n.p AND r.order_key = n.o AND r.table_name = n.t AND r.record_key = n.k",
                &places(plan, &as_order),
            )
        })?;
    }
    if own.is_empty() {
        return Ok(());
    }
    let mut args = places(plan, &own);
    args.push(Arg::Texts(own.iter().map(|c| c.fate.map(Fate::word)).collect()));
    args.push(Arg::Texts(own.iter().map(|c| c.witness).collect()));
    on_keys(|| {
        sql::execute(
            "INSERT INTO amazon_pii.record_state AS r (policy, order_key, table_name, record_key, status, witness) \
             SELECT p, o, t, k, s, w FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), \
                    pg_catalog.unnest($4), pg_catalog.unnest($5), pg_catalog.unnest($6)) AS n (p, o, t, k, s, w) \
             ON CONFLICT (policy, order_key, table_name, record_key) DO UPDATE \
                SET status = EXCLUDED.status, witness = EXCLUDED.witness, changed_at = pg_catalog.now()",
            &args,
        )
    })?;
    Ok(())
}

/// Policy, order, table and key of each, as the first parameters of a statement.
fn places<'a>(plan: &'a Plan, changes: &[&Change<'a>]) -> Vec<Arg<'a>> {
    vec![
        policy_each(plan, changes.len()),
        Arg::Texts(changes.iter().map(|c| Some(c.order_key)).collect()),
        Arg::Texts(changes.iter().map(|c| Some(c.table)).collect()),
        Arg::Texts(changes.iter().map(|c| Some(c.record_key)).collect()),
    ]
}

/// Shared rows that were overwritten: no order waits for them any more, of whichever policy, and those that were imported with
/// them have let go.
///
/// # Errors
/// Errors of the server.
pub fn shared_done(records: &[(&str, &str)]) -> Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    on_keys(|| {
        sql::execute(
            "WITH done AS (DELETE FROM amazon_pii.record_state r WHERE r.status = 'waiting' AND r.record_key = ANY ($1) \
                AND pg_catalog.concat_ws('|', r.table_name, r.record_key) = ANY ($2) \
                RETURNING r.policy, r.order_key, r.table_name, r.record_key) \
             UPDATE amazon_pii.orphan o SET apart = 'done' FROM done d WHERE o.policy = d.policy AND o.order_key = d.order_key \
                AND o.table_name = d.table_name AND o.record_key = d.record_key",
            &[
                Arg::Texts(records.iter().map(|(_, key)| Some(*key)).collect()),
                Arg::texts(&records.iter().map(|(t, k)| format!("{t}|{k}")).collect::<Vec<_>>()),
            ],
        )
    })?;
    Ok(())
}
