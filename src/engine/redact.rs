//! The second transaction of a batch: open the committed copies, compare, overwrite.

mod apart;
mod changes;
mod shared;

pub use apart::apart;
use changes::Changes;
pub use shared::Sharing;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use super::again::Besides;
use super::alive::{self, Keeper};
use super::archive::{line, settle_gone, taken_out};
use super::audit;
use super::due::{Asked, Clock, Due};
use super::files;
use super::former::Former;
use super::gather::{self, Gathered, LiveRecord};
use super::orphan;
use super::overwrite::{self, CellWrite, Marks, RowWrite};
use super::plan::Plan;
use super::purge::{self, Why};
use super::records::{self, Stored};
use super::scrub;
use super::state;
use super::vault::{self, Cold, Newest, OrderArchive};
use super::walk::Values;
use crate::domain::treatment::Outcome;
use crate::domain::vault::MasterKeys;
use crate::pg::error::{Error, Result};
use crate::pg::xact;

/// What one transaction did; positions are into the batch.
#[derive(Debug, Default)]
pub struct Redacted {
    /// How many orders are redacted now that were not, or whose personal data had come back.
    pub done: i64,
    /// How much text the batch holds.
    pub bytes: usize,
    /// Edited since they were archived: to be archived again first.
    pub unproven: Vec<usize>,
    /// Somebody else has a row locked.
    pub locked: Vec<usize>,
    /// Shared rows that were left alone.
    pub waiting: Vec<alive::Waiting>,
    /// Orders, of this batch and of others, of which triggers of the shop's wrote rows meanwhile.
    pub besides: Vec<String>,
    /// How many rows others may share.
    pub shared: usize,
}

/// A row to be overwritten, for all orders of the batch that reach it.
pub(super) struct Target<'a> {
    pub(super) orders: Vec<usize>,
    pub(super) table: usize,
    pub(super) write: RowWrite<'a>,
    pub(super) key_text: &'a str,
    /// The entry that led to it, and by which values.
    entry: usize,
    link: Option<&'a Values>,
    /// Reached by no link any more: whoever it belongs to now may need it.
    stored: bool,
    /// Other orders may need it.
    shared: bool,
    /// Nothing of it is overwritten.
    pub(super) only_marked: bool,
    locked: bool,
}

/// For orders of a batch, a moment and the entry that says so.
type Moments = BTreeMap<usize, (String, usize)>;

/// Overwrites the PII of a batch.
///
/// # Errors
/// Anything: nothing of the batch is kept then. An archived document that cannot be opened is an error when its
/// value is needed.
pub fn batch(
    plan: &Plan,
    others: &[Rc<Plan>],
    keys: &MasterKeys,
    clock: &Clock,
    sharing: &Sharing,
    cold: &Cold,
    batch: &mut [Due],
) -> Result<Redacted> {
    let seen: Vec<Option<Vec<LiveRecord>>> = batch.iter_mut().map(|d| d.seen.take()).collect();
    let batch: &[Due] = batch;
    let order_keys: Vec<&str> = batch.iter().map(|d| d.order_key.as_str()).collect();
    // The copies first: read back from what is committed, here or before this transaction began, and opened, before any row is locked.
    let archive = vault::open(&plan.archive, keys, &plan.policy, &order_keys, cold)?;
    let stored = Stored::of(plan, batch)?;
    let mut live = look(plan, batch, seen, &stored)?;
    scrub::fill(plan, &mut live.records, &archive, &order_keys);
    let mut out = Redacted::default();
    let (late, set_aside) = late_rows(plan, clock, batch, &mut live.records)?;
    let mut excluded: HashSet<usize> = push_back(plan, clock, batch, &live.records)?;
    // One that is forgotten stays known: it may be imported again.
    let gone: HashSet<usize> = (0..batch.len())
        .filter(|i| live.is_gone(*i) && !batch[*i].asked.forgets())
        .collect();
    settle_gone(plan, keys, &gone.iter().map(|i| &batch[*i]).collect::<Vec<_>>())?;
    excluded.extend(&gone);
    let former = Former::load(plan, batch.iter().map(|d| d.redacted_version))?;
    let mut pii = Vec::with_capacity(live.records.len());
    for record in &live.records {
        // Of what is left out anyway a treatment may even fail.
        let left_out = excluded.contains(&record.order);
        pii.push(if left_out { Vec::new() } else { record.pii(plan)? });
    }
    let found = live.records.iter().zip(&pii);
    let mut targets = targets(plan, &former, batch, found, &archive, &mut excluded, &mut out)?;

    // Deferred triggers of the caller fire as the caller, not as a table's owner.
    xact::fire_deferred()?;
    let look = shared::Look {
        plan,
        others,
        clock,
        batch,
        apart: None,
    };
    let waiting = look.lock(sharing, &mut targets, &mut excluded, &mut out)?;
    let clean = live.records.iter().zip(&pii).filter(|(_, pii)| pii.is_empty());
    let files = files::found(plan, batch, &stored, &targets, clean.map(|(r, _)| r), &excluded)?;
    let besides = Besides::begin();
    write(plan, &targets, &excluded)?;
    files::note(plan, keys, batch, &files)?;

    let mut changes = Changes::default();
    for target in &targets {
        changes.overwritten(plan, batch, &stored, target, &excluded);
    }
    for (target, keeper) in &waiting {
        let Some(first) = target.orders.iter().find(|order| !excluded.contains(order)) else {
            continue;
        };
        let order_key = &batch[*first].order_key;
        let witness = match keeper {
            Keeper::Own(order) | Keeper::Other { order, .. } => order,
            // It is the one that comes back for the row.
            Keeper::Unsure => order_key,
        };
        changes.waiting(plan, batch, target, &excluded, witness);
        out.waiting.push(alive::Waiting {
            order_key: order_key.clone(),
            keeper: keeper.clone(),
        });
    }
    let done: Vec<usize> = (0..batch.len()).filter(|i| !excluded.contains(i)).collect();
    out.besides = besides.orders(&plan.policy);
    changes.left(plan, batch, &stored, &done, &live.records, &set_aside);
    records::write(plan, &changes.list)?;
    records::shared_done(&changes.shared)?;
    orphan::let_go(plan, done.iter().map(|i| &batch[*i]))?;
    let count = |i: usize| changes.counts.get(&i).copied().unwrap_or_default();
    // One that was looked at again and found clean is no event.
    let (overwritten, clean): (Vec<usize>, Vec<usize>) = done
        .into_iter()
        .partition(|i| batch[*i].status != "redacted" || count(*i).0 > 0);
    let mut lines = Vec::new();
    for i in &overwritten {
        let (count, waits) = count(*i);
        let detail = if waits == 0 {
            format!("{count} records")
        } else {
            format!("{count} records, {waits} waiting for other orders")
        };
        lines.push(line(&batch[*i], detail));
    }
    // An order that came back for a row it had to leave was counted before.
    let counted = overwritten
        .iter()
        .filter(|i| batch[**i].status != "redacted" || changes.anew.contains(i) && !batch[**i].came_back);
    out.done = counted.count() as i64;
    let dues = |list: Vec<usize>| list.into_iter().map(|i| &batch[i]).collect::<Vec<_>>();
    let (overwritten, clean) = (dues(overwritten), dues(clean));
    state::redacted(plan, &overwritten)?;
    state::rechecked(plan, &clean)?;
    for (order, (moment, by)) in late.into_iter().filter(|(order, _)| !excluded.contains(order)) {
        state::pushed(plan, &batch[order], &moment, &plan.entries[by].alias)?;
    }
    let ended = |i: &usize| {
        let due = &batch[*i];
        // Where nothing is left of an earlier end there is nothing to end again.
        let kept = archive.contains_key(&due.order_key) || !due.purged;
        due.asked == Asked::Forget || plan.keeps_nothing && kept && !due.archive_held
    };
    let of = |due: &Due| purge::Ended {
        order_key: due.order_key.clone(),
        order_number: due.number.clone(),
    };
    // Those that come back for what triggers have copied need their names once more: the last time ends the archive.
    let back: HashSet<&str> = out.besides.iter().map(String::as_str).collect();
    let ending: Vec<usize> = (0..batch.len())
        .filter(|i| !excluded.contains(i) && ended(i) && !back.contains(batch[*i].order_key.as_str()))
        .collect();
    let set_back: Vec<&Due> = excluded.difference(&gone).map(|i| &batch[*i]).collect();
    state::copied(plan, &set_back)?;
    audit::insert_batch(keys, "redact", plan, lines)?;
    state::announce(plan, "redacted", &overwritten)?;
    for (asked, why) in [(true, Why::Forgotten), (false, Why::Over)] {
        let orders = ending.iter().map(|i| &batch[*i]);
        let orders: Vec<_> = orders.filter(|d| (d.asked == Asked::Forget) == asked).map(of).collect();
        // What an older version does not end, a purge does when the new one says so.
        if !orders.is_empty() && (asked || purge::still_says(plan)?) {
            purge::end(plan, keys, orders, why)?;
        }
    }
    out.bytes = live.bytes();
    Ok(out)
}

/// The rows of a batch: those that its first transaction has just archived, and those of the other orders as they are now.
/// What has changed in between makes the statement that overwrites fail.
fn look(plan: &Plan, batch: &[Due], seen: Vec<Option<Vec<LiveRecord>>>, stored: &Stored) -> Result<Gathered> {
    let unseen: Vec<usize> = (0..batch.len()).filter(|i| seen[*i].is_none()).collect();
    let inputs: Vec<Values> = unseen.iter().map(|i| batch[*i].key.clone()).collect();
    let fresh = gather::gather(plan, &inputs, &stored.of_some(&unseen))?;
    let mut out = Gathered {
        exists: vec![true; batch.len()],
        records: Vec::new(),
    };
    for (i, exists) in unseen.iter().zip(fresh.exists) {
        out.exists[*i] = exists;
    }
    let again = fresh.records.into_iter().map(|r| (unseen[r.order], r));
    let known = seen.into_iter().enumerate();
    let known = known.flat_map(|(i, records)| records.into_iter().flatten().map(move |r| (i, r)));
    for (order, record) in known.chain(again) {
        out.records.push(LiveRecord { order, ..record });
    }
    Ok(out)
}

/// Takes out the rows that came after their order was redacted and are not due by their own date: nothing else waits
/// for them. Returns the first such date of each order, and the rows.
fn late_rows(
    plan: &Plan,
    clock: &Clock,
    batch: &[Due],
    records: &mut Vec<LiveRecord>,
) -> Result<(Moments, Vec<LiveRecord>)> {
    let dated = |r: &LiveRecord| {
        batch[r.order].status == "redacted" && !batch[r.order].asked.at_once() && r.not_before.is_some()
    };
    let moments: Vec<String> = records
        .iter()
        .filter(|r| dated(r))
        .filter_map(|r| r.not_before.as_ref().map(|(moment, _)| moment.clone()))
        .collect();
    let mut young = state::still_young(plan, &moments, &clock.redact)?.into_iter();
    let mut late: Moments = BTreeMap::new();
    let (mut kept, mut set_aside) = (Vec::with_capacity(records.len()), Vec::new());
    for record in records.drain(..) {
        let is_late = dated(&record) && young.next().unwrap_or(false);
        if !is_late {
            kept.push(record);
            continue;
        }
        // One without PII is no reason to come back.
        if let Some(first) = &record.not_before
            && !record.pii(plan)?.is_empty()
        {
            let known = late.entry(record.order).or_insert_with(|| first.clone());
            if first.0 < known.0 {
                *known = first.clone();
            }
        }
        set_aside.push(record);
    }
    *records = kept;
    Ok((late, set_aside))
}

/// Orders that a younger linked record keeps from being redacted now.
fn push_back(plan: &Plan, clock: &Clock, batch: &[Due], records: &[LiveRecord]) -> Result<HashSet<usize>> {
    let mut latest: Moments = BTreeMap::new();
    for record in records {
        let Some((moment, by)) = record
            .not_before
            .as_ref()
            .filter(|_| !batch[record.order].asked.at_once())
        else {
            continue;
        };
        let known = latest.entry(record.order).or_insert_with(|| (moment.clone(), *by));
        if known.0 < *moment {
            *known = (moment.clone(), *by);
        }
    }
    let moments: Vec<String> = latest.values().map(|v| v.0.clone()).collect();
    let young = state::still_young(plan, &moments, &clock.redact)?;
    let mut excluded = HashSet::new();
    for ((order, (moment, by)), young) in latest.into_iter().zip(young) {
        if young {
            state::pushed(plan, &batch[order], &moment, &plan.entries[by].alias)?;
            excluded.insert(order);
        }
    }
    Ok(excluded)
}

/// What has to be written, row by row; orders whose live values are not the archived ones are excluded.
fn targets<'a>(
    plan: &Plan,
    former: &Former,
    batch: &[Due],
    found: impl Iterator<Item = (&'a LiveRecord, &'a Vec<(usize, Outcome<'a>)>)>,
    archive: &'a HashMap<String, OrderArchive>,
    excluded: &mut HashSet<usize>,
    out: &mut Redacted,
) -> Result<Vec<Target<'a>>> {
    let mut targets: Vec<Target<'a>> = Vec::new();
    let mut known: HashMap<(usize, &str), usize> = HashMap::new();
    for (record, pii) in found {
        if excluded.contains(&record.order) {
            continue;
        }
        let due = &batch[record.order];
        let table = &plan.tables[record.table];
        let newest = archive
            .get(&due.order_key)
            .and_then(|a| a.record(&table.archived_as, &record.key_text));
        let cells = if !table.no_copy && taken_out(plan, due, record, newest).next().is_some() {
            None
        } else if pii.is_empty() && !is_marked(plan, due, record) {
            continue;
        } else {
            proven(plan, former, due, record, pii, newest)?
        };
        let Some(cells) = cells else {
            excluded.insert(record.order);
            out.unproven.push(record.order);
            continue;
        };
        let at = *known.entry((record.table, &record.key_text)).or_insert(targets.len());
        if at == targets.len() {
            targets.push(Target {
                orders: vec![record.order],
                table: record.table,
                write: RowWrite {
                    key: &record.key,
                    cells,
                },
                key_text: &record.key_text,
                entry: record.entry,
                link: record.link.as_ref(),
                stored: record.stored,
                shared: false,
                only_marked: pii.is_empty(),
                locked: false,
            });
            continue;
        }
        let target = &mut targets[at];
        target.stored &= record.stored;
        target.only_marked &= pii.is_empty();
        target.orders.push(record.order);
        for (slot, cell) in target.write.cells.iter_mut().zip(cells) {
            if !matches!(slot, CellWrite::Write { .. }) && !matches!(cell, CellWrite::Leave) {
                *slot = cell;
            }
        }
    }
    targets.sort_unstable_by_key(|t| (t.table, t.link.map(|_| t.entry), t.key_text));
    Ok(targets)
}

/// Whether the order's own row is marked although it holds no PII: the mark speaks of the order.
fn is_marked(plan: &Plan, due: &Due, record: &LiveRecord) -> bool {
    record.table == 0 && !record.stored && !plan.tables[0].marks.is_empty() && due.status != "redacted"
}

/// The cells of a record as they are to be compared and written, or `None` when the archive does not hold every one of
/// its PII cells exactly as it is.
///
/// # Errors
/// The archive holds a document of this record that cannot be opened.
fn proven<'a>(
    plan: &Plan,
    former: &Former,
    due: &Due,
    record: &'a LiveRecord,
    pii: &'a [(usize, Outcome<'_>)],
    newest: Option<&'a Newest>,
) -> Result<Option<Vec<CellWrite<'a>>>> {
    let table = &plan.tables[record.table];
    record.writes(pii, |i, live| {
        // There is to be no copy: it must be what was read, and no more.
        if table.no_copy || due.asked.without_copy() {
            return Ok(Some(live));
        }
        let opened = newest.and_then(|n| n.cell(&table.cells[i].archived_as));
        Ok(match opened {
            // What the statement compares with is the opened value, never the one that was read.
            Some(opened) if opened.text == live => Some(opened.text),
            // Our own output under an earlier version: what it stands for is archived.
            Some(opened) if former.left(plan, due.redacted_version, record, i, &opened) => Some(live),
            _ if newest.is_some_and(|n| n.damaged) => {
                return Err(Error::damaged(format!(
                    "the archived copy of a record of {} cannot be opened",
                    table.relation.shown()
                )));
            }
            _ => None,
        })
    })
}

fn write(plan: &Plan, targets: &[Target<'_>], excluded: &HashSet<usize>) -> Result<()> {
    // Children first: a row that goes would take those that refer to it along before they are compared.
    for (index, table) in plan.tables.iter().enumerate().rev() {
        let rows: Vec<&RowWrite<'_>> = targets
            .iter()
            .filter(|t| t.table == index && t.orders.iter().all(|o| !excluded.contains(o)))
            .map(|t| &t.write)
            .collect();
        if rows.is_empty() {
            continue;
        }
        if table.delete {
            overwrite::delete(plan, table, &rows)?;
        } else {
            overwrite::update(plan, table, &rows, Marks::Set)?;
        }
    }
    Ok(())
}
