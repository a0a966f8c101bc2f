//! What becomes of the records of a batch, written down.

use std::collections::{HashMap, HashSet};

use super::Target;
use crate::engine::due::Due;
use crate::engine::gather::LiveRecord;
use crate::engine::plan::Plan;
use crate::engine::records::{Change, Fate, Listed, Stored};

/// What becomes of the records of a batch.
#[derive(Default)]
pub(super) struct Changes<'a> {
    pub(super) list: Vec<Change<'a>>,
    /// (table, key) of the shared rows that were overwritten.
    pub(super) shared: Vec<(&'a str, &'a str)>,
    /// How many records of an order were overwritten, and how many wait.
    pub(super) counts: HashMap<usize, (usize, usize)>,
    /// Orders of which a record was overwritten that had not been waiting for others.
    pub(super) anew: HashSet<usize>,
    /// (order, table, key) of those that wait.
    waits: HashSet<(usize, &'a str, &'a str)>,
}

impl<'a> Changes<'a> {
    pub(super) fn overwritten(
        &mut self,
        plan: &'a Plan,
        batch: &'a [Due],
        stored: &Stored,
        target: &Target<'a>,
        excluded: &HashSet<usize>,
    ) {
        if target.only_marked || target.orders.iter().any(|o| excluded.contains(o)) {
            return;
        }
        let table = plan.tables[target.table].archived_as.as_str();
        for order in &target.orders {
            self.counts.entry(*order).or_default().0 += 1;
            let fate = stored.fate(*order, table, target.key_text);
            if fate != Some(Fate::Waiting) {
                self.anew.insert(*order);
            }
            if fate.is_some() {
                self.put(&batch[*order], table, target.key_text, None, None);
            }
        }
        if target.shared {
            self.shared.push((table, target.key_text));
        }
    }

    pub(super) fn waiting(
        &mut self,
        plan: &'a Plan,
        batch: &'a [Due],
        target: &Target<'a>,
        excluded: &HashSet<usize>,
        witness: &'a str,
    ) {
        let table = plan.tables[target.table].archived_as.as_str();
        for order in target.orders.iter().filter(|order| !excluded.contains(order)) {
            self.counts.entry(*order).or_default().1 += 1;
            self.waits.insert((*order, table, target.key_text));
            let fate = Some(Fate::Waiting);
            self.put(&batch[*order], table, target.key_text, fate, Some(witness));
        }
    }

    /// Records of finished orders that had nothing to overwrite: clean, or their row is gone. Those set aside for a later date
    /// hold personal data still.
    pub(super) fn left<'r>(
        &mut self,
        plan: &'a Plan,
        batch: &'a [Due],
        stored: &Stored,
        done: &[usize],
        live: &'r [LiveRecord],
        set_aside: &'r [LiveRecord],
    ) where
        'a: 'r,
    {
        let mut found: Vec<Vec<(&str, &str)>> = batch.iter().map(|_| Vec::new()).collect();
        let place = |r: &'r LiveRecord| (plan.tables[r.table].archived_as.as_str(), r.key_text.as_str());
        for r in live.iter().chain(set_aside) {
            found[r.order].push(place(r));
        }
        let removes = |table: &str| plan.tables.iter().any(|t| t.delete && t.archived_as == table);
        let later: HashSet<(usize, (&str, &str))> = set_aside.iter().map(|r| (r.order, place(r))).collect();
        for order in done {
            let due = &batch[*order];
            found[*order].sort_unstable();
            for Listed(table, key, ..) in due.records.iter() {
                let place = (table.as_str(), key.as_str());
                if later.contains(&(*order, place)) || self.waits.contains(&(*order, place.0, place.1)) {
                    continue;
                }
                let is_there = found[*order].binary_search(&place).is_ok();
                let fate = match (stored.fate(*order, table, key), is_there) {
                    (Some(Fate::Archived | Fate::Retrieved | Fate::Redacted), true) => None,
                    (Some(Fate::Redacted), false) => Some(Fate::Gone).filter(|_| !removes(table)),
                    (Some(Fate::Archived | Fate::Retrieved | Fate::Waiting), false) => Some(Fate::Gone),
                    (None, false) if due.redacted_version.is_none() => Some(Fate::Gone),
                    _ => continue,
                };
                self.put(due, table, key, fate, None);
            }
        }
    }

    fn put(&mut self, due: &'a Due, table: &'a str, record_key: &'a str, fate: Option<Fate>, witness: Option<&'a str>) {
        self.list.push(Change {
            order_key: &due.order_key,
            table,
            record_key,
            fate,
            witness,
        });
    }
}
