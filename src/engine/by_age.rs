//! Rows that no order leads to, and that may not grow older than their policy says: sessions, job queues, raw mail, staging
//! tables. They are found by their age, batch by batch, each batch one transaction, and removed or overwritten without a
//! copy: the policy says in words that there is to be none.
//!
//! Old rows are looked at in the order of their age. Where handled rows vanish, a pass begins with the oldest; otherwise it
//! goes on where the last one ended, and begins anew once a day, for what has come late or back.

mod notes;

use notes::{Notes, Trouble};
pub use notes::{begin, look_now};

use std::collections::HashSet;
use std::time::Instant;

use super::audit::{self, AuditEntry};
use super::due::Clock;
use super::gather::{self, LiveRecord};
use super::overwrite::{self, RowWrite};
use super::pace::Pace;
use super::paging::{bounded, qualified};
use super::plan::{Aged, Plan};
use super::turn;
use super::walk::{self, FIRST, Values, key_parts, key_text};
use crate::domain::pace::Batch;
use crate::domain::vault::MasterKeys;
use crate::pg::catalog::{self, Compare};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{Expr, Relation};
use crate::pg::identity::{Identity, act_as};
use crate::pg::sql::{self, Arg, Row};
use crate::pg::subxact::{subtransaction, trial};
use crate::pg::xact::{self, Boundary, Mode, timestamp_text};

/// Rows that are counted at most, where a policy is not at work and they are only shown.
const COUNTED: i64 = 100_000;

/// Rows that `check_policy` tries from each end.
const TRIED: i64 = 20;

/// By the index on the moment, in its order.
const IN_ORDER: &[(&str, &str)] = &[("enable_seqscan", "off"), ("enable_bitmapscan", "off")];

/// What became of old rows.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Removed or overwritten.
    pub rows: i64,
    /// Set aside with an error.
    pub failed: i64,
}

/// Where a pass is: the moment of the last row, and its key.
struct Position {
    at: String,
    key: Values,
}

/// One pass over the old rows of a table.
pub struct Pass<'a> {
    plan: &'a Plan,
    aged: &'a Aged,
    keys: &'a MasterKeys,
    clock: &'a Clock,
    boundary: Boundary,
    notes: Notes<'a>,
    /// The youngest moment that is old.
    upto: String,
    after: Option<Position>,
    /// Rows that were set aside and are tried again come first.
    again: bool,
    over: bool,
}

/// From when the policy is in effect, where that is after this moment.
fn not_before(plan: &Plan, horizon: &str) -> Option<String> {
    let from = plan.document.effective_from.map(timestamp_text);
    from.filter(|from| from.as_str() > horizon)
}

/// The policy, in the version that is at work, may go on.
fn in_force(plan: &Plan) -> Result<bool> {
    notes::in_force(&plan.policy, plan.version)
}

impl<'a> Pass<'a> {
    /// A pass over a table for which it is time; `None` where it is not.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn begin(
        plan: &'a Plan,
        aged: &'a Aged,
        keys: &'a MasterKeys,
        clock: &'a Clock,
        boundary: Boundary,
    ) -> Result<Option<Self>> {
        let notes = Notes { plan, aged };
        if let Some(from) = not_before(plan, &clock.redact) {
            notes.wait(&from)?;
            return Ok(None);
        }
        // Handled rows are not met again where they are gone, unless a condition leaves others in between.
        let vanish = aged.table.delete && aged.filter.is_none();
        let Some(passed) = notes.begin(clock, vanish)? else {
            return Ok(None);
        };
        let after = passed.as_deref().map(position).transpose()?;
        Ok(Some(Self {
            plan,
            aged,
            keys,
            clock,
            boundary,
            upto: notes.cutoff(&clock.redact)?,
            notes,
            after,
            again: true,
            over: false,
        }))
    }

    /// The next batch, in a transaction of its own; `None` when there is nothing left.
    ///
    /// # Errors
    /// A cancel; what concerns one row alone sets that row aside.
    pub fn batch(&mut self, pace: &mut Pace) -> Result<Option<Done>> {
        if self.over {
            return Ok(None);
        }
        turn::take(&self.plan.policy, Mode::Alone)?;
        if !in_force(self.plan)? {
            self.over = true;
            return Ok(None);
        }
        let begun = Instant::now();
        let limit = pace.size();
        let keys = if self.again {
            let keys = self.notes.to_try_again(&self.clock.now, limit)?;
            self.again = keys.len() as i64 == limit;
            keys
        } else {
            self.page(limit)?
        };
        let rows = keys.len();
        let (done, bytes) = self.handle(keys)?;
        self.notes.passed(self.after.as_ref().map(|p| (&p.at, &p.key)))?;
        if self.over {
            self.finish()?;
        }
        let waited_for = xact::is_waited_for();
        self.boundary.commit()?;
        pace.learn(&Batch {
            orders: i64::try_from(rows).unwrap_or(i64::MAX),
            took: begun.elapsed(),
            text: bytes,
            waited_for,
        });
        Ok(Some(done))
    }

    /// The keys of the next old rows, without those that are set aside.
    fn page(&mut self, limit: i64) -> Result<Vec<String>> {
        let rows = page(self.plan, self.aged, &self.upto, self.after.as_ref(), limit, false)?;
        self.over = (rows.len() as i64) < limit;
        let width = self.aged.table.key.len();
        if let Some(last) = rows.last() {
            self.after = Some(Position {
                at: last.string(width)?,
                key: last.texts(0..width)?,
            });
        }
        let keys = rows
            .iter()
            .map(|r| key_text(&r.texts(0..width)?))
            .collect::<Result<Vec<_>>>()?;
        let aside = self.notes.set_aside_of(&keys)?;
        Ok(keys.into_iter().filter(|k| !aside.contains(k)).collect())
    }

    /// Removes or overwrites these rows, as far as they are old still, and nobody has them locked.
    fn handle(&mut self, keys: Vec<String>) -> Result<(Done, usize)> {
        let mut done = Done::default();
        if keys.is_empty() {
            return Ok((done, 0));
        }
        xact::fire_deferred()?;
        let values = keys.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
        let locked = overwrite::lock_old(self.plan, self.aged, &values.iter().collect::<Vec<_>>(), &self.upto)?;
        let (ours, others): (Vec<_>, Vec<_>) = keys.iter().zip(locked).partition(|(_, locked)| *locked);
        let ours: Vec<&str> = ours.into_iter().map(|(k, _)| k.as_str()).collect();
        let others: Vec<&str> = others.into_iter().map(|(k, _)| k.as_str()).collect();
        let mut troubles: Vec<Trouble<'_>> = Vec::new();
        for key in self.still_old(&others)? {
            troubles.push(Trouble { key, error: None });
        }
        let mut bytes = 0;
        match subtransaction(|| self.treat(&ours)) {
            Ok((rows, text)) => {
                done.rows = rows;
                bytes = text;
            }
            Err(e) if e.is_cancel() => return Err(e),
            // Each row alone would wait for the table as long as they did together.
            Err(e) if e.is_lock() && overwrite::is_table_locked(self.plan, &self.aged.table)? => return Err(e),
            // One bad row stops nobody else.
            Err(_) => {
                for key in &ours {
                    match subtransaction(|| self.treat(&[*key])) {
                        Ok((rows, text)) => {
                            done.rows += rows;
                            bytes += text;
                        }
                        Err(e) if e.is_cancel() => return Err(e),
                        Err(e) => troubles.push(Trouble {
                            key,
                            error: (!e.is_lock()).then(|| e.stored()),
                        }),
                    }
                }
            }
        }
        done.failed = self.notes.settle(&keys, &troubles)?;
        self.tell(done, &troubles)?;
        Ok((done, bytes))
    }

    /// Those of these rows that are there and old: somebody has them locked.
    fn still_old<'k>(&self, keys: &[&'k str]) -> Result<Vec<&'k str>> {
        let Aged {
            table,
            at,
            at_type,
            filter,
            ..
        } = self.aged;
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let values = keys.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
        let select = [
            at.to_string(),
            filter.as_ref().map_or_else(|| "true".to_owned(), ToString::to_string),
        ];
        let found = walk::by_key(self.plan, table, &values, &select)?;
        let mut moments = Vec::new();
        let mut positions = Vec::new();
        for f in found {
            if f.row.text(FIRST + 1)? == Some("t") {
                moments.push(f.row.owned(FIRST)?);
                positions.push(f.input);
            }
        }
        let old = notes::not_after(*at_type, &moments, &self.upto)?;
        Ok(positions
            .into_iter()
            .zip(old)
            .filter(|(_, old)| *old)
            .map(|(i, _)| keys[i])
            .collect())
    }

    /// Removes or overwrites rows that are locked. How many there were, and how much text they held.
    fn treat(&self, keys: &[&str]) -> Result<(i64, usize)> {
        let table = &self.aged.table;
        if keys.is_empty() {
            return Ok((0, 0));
        }
        if table.delete {
            let values = keys.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
            delete_rows(self.plan, self.aged, values.iter())?;
            return Ok((keys.len() as i64, 0));
        }
        let records = gather::rows_of(self.plan, table, keys)?;
        let records: Vec<&LiveRecord> = records.iter().flatten().collect();
        let bytes = records.iter().map(|r| bytes_of(r)).sum();
        Ok((overwrite_rows(self.plan, self.aged, &records)?, bytes))
    }

    /// In the audit log, and to whoever listens.
    fn tell(&self, done: Done, troubles: &[Trouble<'_>]) -> Result<()> {
        let shown = self.aged.table.relation.shown();
        let entry = |action: &str, detail: String| {
            Ok::<_, Error>(AuditEntry {
                policy: Some(self.plan.policy.clone()),
                policy_version: Some(self.plan.version),
                detail: Some(detail),
                ..AuditEntry::new(action)?
            })
        };
        let mut entries = Vec::new();
        if done.rows > 0 {
            let what = if self.aged.table.delete {
                "deleted"
            } else {
                "overwritten"
            };
            entries.push(entry("by_age", format!("{shown}: {} rows {what}", done.rows))?);
            notes::announce(&self.plan.policy, "by_age", &shown, done.rows)?;
        }
        if let Some(error) = troubles.iter().find_map(|t| t.error.as_deref()) {
            entries.push(entry("by_age_failed", format!("{} rows, {error}", done.failed))?);
            notes::announce(&self.plan.policy, "by_age_failed", &shown, done.failed)?;
        }
        audit::insert_under(Some(self.keys), &entries)
    }

    /// Everything was looked at: when is it time again?
    fn finish(&self) -> Result<()> {
        let next = youngest_after(self.plan, self.aged, &self.upto)?;
        let overdue = self.notes.finish(next.as_deref())?;
        if overdue > 0 {
            let shown = self.aged.table.relation.shown();
            notes::announce(&self.plan.policy, "by_age_overdue", &shown, overdue)?;
        }
        Ok(())
    }
}

fn bytes_of(record: &LiveRecord) -> usize {
    let cells = record.cells.iter().flatten();
    cells.filter_map(|c| c.value.as_deref()).map(str::len).sum()
}

/// Removes rows that are locked, or of a trial, by their keys.
fn delete_rows<'k>(plan: &Plan, aged: &Aged, keys: impl Iterator<Item = &'k Values>) -> Result<()> {
    let rows: Vec<RowWrite<'_>> = keys.map(|key| RowWrite { key, cells: Vec::new() }).collect();
    if rows.is_empty() {
        return Ok(());
    }
    overwrite::delete(plan, &aged.table, &rows.iter().collect::<Vec<_>>())
}

/// Overwrites the personal data of rows that are locked, or of a trial. How many had some.
fn overwrite_rows(plan: &Plan, aged: &Aged, records: &[&LiveRecord]) -> Result<i64> {
    let table = &aged.table;
    let pii = records.iter().map(|r| r.pii_in(table)).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for (record, pii) in records.iter().zip(&pii).filter(|(_, pii)| !pii.is_empty()) {
        if let Some(cells) = record.writes(pii, |_, live| Ok(Some(live)))? {
            let key = &record.key;
            rows.push(RowWrite { key, cells });
        }
    }
    overwrite::update(plan, table, &rows.iter().collect::<Vec<_>>(), overwrite::Marks::Set)?;
    Ok(rows.len() as i64)
}

fn position(text: &str) -> Result<Position> {
    let mut parts = key_parts(text)?.into_iter();
    let at = parts.next().flatten();
    Ok(Position {
        at: at.ok_or_else(|| Error::internal("a stored position has no moment"))?,
        key: parts.collect(),
    })
}

/// Keys and moments of old rows in the order of their age, those after a position; with `youngest`, the other way round.
fn page(
    plan: &Plan,
    aged: &Aged,
    upto: &str,
    after: Option<&Position>,
    limit: i64,
    youngest: bool,
) -> Result<Vec<Row>> {
    let Aged {
        table,
        at,
        at_type,
        filter,
        ..
    } = aged;
    let (relation, keys): (&Relation, _) = (&table.relation, qualified(table));
    let operator = |compare| catalog::operator(compare, *at_type, *at_type);
    let mut args = vec![Arg::Int(limit), Arg::Typed(*at_type, Some(upto))];
    let mut conditions = vec![format!("{at} {} $2", operator(Compare::NotGreater))];
    conditions.extend(filter.iter().map(ToString::to_string));
    if let Some(Position { at: moment, key }) = after {
        let further = bounded(table, &keys, Compare::Greater, 4);
        // The first condition is for the index.
        conditions.push(format!("NOT {at} {} $3", operator(Compare::Less)));
        conditions.push(format!("({at} {} $3 OR {further})", operator(Compare::Greater)));
        args.push(Arg::Typed(*at_type, Some(moment)));
        let typed = table.key.iter().zip(key);
        args.extend(typed.map(|((_, oid), v)| Arg::Typed(*oid, v.as_deref())));
    }
    let way = if youngest { " DESC" } else { "" };
    let order: Vec<String> = std::iter::once(at.to_string())
        .chain(keys.iter().cloned())
        .map(|e| format!("{e}{way}"))
        .collect();
    let query = format!(
        "SELECT {}, {at} FROM {} AS {} WHERE {} ORDER BY {} LIMIT $1",
        keys.join(", "),
        relation,
        relation.name,
        conditions.join(" AND "),
        order.join(", "),
    );
    read(plan, aged, &query, &args)
}

/// The next moment that is not old yet.
fn youngest_after(plan: &Plan, aged: &Aged, upto: &str) -> Result<Option<String>> {
    let (at, relation): (&Expr, &Relation) = (&aged.at, &aged.table.relation);
    let query = format!(
        "SELECT {at} FROM {relation} AS {} WHERE {at} {} $1 ORDER BY {at} LIMIT 1",
        relation.name,
        catalog::operator(Compare::Greater, aged.at_type, aged.at_type),
    );
    let rows = read(plan, aged, &query, &[Arg::Typed(aged.at_type, Some(upto))])?;
    rows.first().map(|r| r.string(0)).transpose()
}

fn read(plan: &Plan, aged: &Aged, query: &str, args: &[Arg<'_>]) -> Result<Vec<Row>> {
    let table = &aged.table;
    let pins = if table.has_index(std::slice::from_ref(&aged.at)) {
        IN_ORDER
    } else {
        &[]
    };
    act_as(Identity::Owner(table.owner), &plan.search_path, pins, || {
        sql::read(query, args)
    })
    .map_err(|e| e.at(&table.relation.shown()))
}

/// How many rows a cycle at `as_of` would remove or overwrite.
///
/// # Errors
/// Errors of the server or of the owner's expressions.
pub fn preview(plan: &Plan, aged: &Aged, as_of: &str) -> Result<i64> {
    if not_before(plan, as_of).is_some() {
        return Ok(0);
    }
    let upto = Notes { plan, aged }.cutoff(as_of)?;
    let width = aged.table.key.len();
    let mut after: Option<Position> = None;
    let mut count = 0;
    loop {
        let rows = page(plan, aged, &upto, after.as_ref(), 1000, false)?;
        if aged.table.delete {
            count += rows.len() as i64;
        } else {
            let keys = rows
                .iter()
                .map(|r| key_text(&r.texts(0..width)?))
                .collect::<Result<Vec<_>>>()?;
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            for record in gather::rows_of(plan, &aged.table, &keys)?.iter().flatten() {
                count += i64::from(!record.pii_in(&aged.table)?.is_empty());
            }
        }
        pgrx::check_for_interrupts!();
        match rows.last() {
            Some(last) if rows.len() == 1000 => {
                after = Some(Position {
                    at: last.string(width)?,
                    key: last.texts(0..width)?,
                });
            }
            _ => return Ok(count),
        }
    }
}

/// Where the policy is not at work: how many rows are past their age, for whoever looks.
///
/// # Errors
/// Errors of the server or of the owner's expressions.
pub fn count(plan: &Plan, clock: &Clock) -> Result<()> {
    if not_before(plan, &clock.now).is_some() {
        return Ok(());
    }
    for aged in &plan.by_age {
        let notes = Notes { plan, aged };
        let Some(passed) = notes.peek(clock)? else { continue };
        let after = passed.as_deref().map(position).transpose()?;
        let upto = notes.cutoff(&clock.now)?;
        let rows = page(plan, aged, &upto, after.as_ref(), COUNTED, false)?;
        notes.counted(rows.len() as i64)?;
    }
    Ok(())
}

/// Tries the real treatment on the oldest and the youngest rows, for whoever rolls it back. What fails is the error; `None`
/// where a treatment changes its own result, with its column.
///
/// # Errors
/// As the treatment's.
pub fn try_out(plan: &Plan, aged: &Aged) -> Result<Option<String>> {
    let table = &aged.table;
    let upto = "infinity";
    let mut keys: Vec<String> = Vec::new();
    let mut seen = HashSet::new();
    for youngest in [false, true] {
        for row in page(plan, aged, upto, None, TRIED, youngest)? {
            let key = key_text(&row.texts(0..table.key.len())?)?;
            if seen.insert(key.clone()) {
                keys.push(key);
            }
        }
    }
    let values = keys.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
    let locked = overwrite::lock_old(plan, aged, &values.iter().collect::<Vec<_>>(), upto)?;
    let free: Vec<(&str, &Values)> = keys
        .iter()
        .map(String::as_str)
        .zip(&values)
        .zip(locked)
        .filter_map(|(row, locked)| locked.then_some(row))
        .collect();
    if table.delete {
        delete_rows(plan, aged, free.iter().map(|(_, key)| *key))?;
        return Ok(None);
    }
    let keys: Vec<&str> = free.iter().map(|(key, _)| *key).collect();
    let records = gather::rows_of(plan, table, &keys)?;
    overwrite_rows(plan, aged, &records.iter().flatten().collect::<Vec<_>>())?;
    for record in gather::rows_of(plan, table, &keys)?.iter().flatten() {
        if let Some((i, _)) = record.pii_in(table)?.first() {
            return Ok(Some(table.cells[*i].name.bare().to_owned()));
        }
    }
    Ok(None)
}

/// [`try_out`], rolled back.
///
/// # Errors
/// As [`try_out`].
pub fn tried(plan: &Plan, aged: &Aged) -> Result<Option<String>> {
    trial(|| try_out(plan, aged))
}
