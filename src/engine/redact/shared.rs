//! Rows that orders outside of a batch may need: which of its rows a batch locks, and which it leaves alone.

use std::collections::HashSet;
use std::rc::Rc;

use super::{Redacted, Target};
use crate::engine::alive::{self, Keeper};
use crate::engine::due::{Clock, Due};
use crate::engine::orphan::Rows;
use crate::engine::overwrite;
use crate::engine::plan::Plan;
use crate::engine::walk::Values;
use crate::pg::error::Result;

/// Of so many shared rows one at most may be kept by another order where the look before the lock is spared.
const FEW: usize = 50;

/// How often the shared rows of a cycle turn out to be needed by others.
///
/// Whoever uses a row is asked before it is locked, so that a row that stays is not locked in vain, and again when nobody
/// can begin to use it any more. Where orders are partitioned a look is dear, and while hardly any row stays the second
/// alone will do.
#[derive(Debug, Default)]
pub struct Sharing {
    /// Of the last batch that had any: how many rows may be shared, and how many were left alone.
    last: Option<(usize, usize)>,
}

impl Sharing {
    /// After a batch.
    pub fn learn(&mut self, outcome: &Redacted) {
        if outcome.shared > 0 {
            self.last = Some((outcome.shared, outcome.waiting.len()));
        }
    }

    fn is_rare(&self) -> bool {
        self.last.is_some_and(|(shared, left)| left * FEW <= shared)
    }
}

/// A batch that looks for the users of its rows.
pub(super) struct Look<'a> {
    pub(super) plan: &'a Plan,
    pub(super) others: &'a [Rc<Plan>],
    pub(super) clock: &'a Clock,
    pub(super) batch: &'a [Due],
    /// Rows that go before their orders.
    pub(super) apart: Option<&'a Rows>,
}

type Waiting<'a> = Vec<(Target<'a>, Keeper)>;

impl Look<'_> {
    /// Locks every row before the first is written, but for the shared ones that an order outside of this batch still needs:
    /// those are taken out of `targets`, and returned. An order with a row that somebody else has locked, or that is not the
    /// order's any more, is left out.
    pub(super) fn lock<'a>(
        &self,
        sharing: &Sharing,
        targets: &mut Vec<Target<'a>>,
        excluded: &mut HashSet<usize>,
        out: &mut Redacted,
    ) -> Result<Waiting<'a>> {
        self.mark_shared(targets);
        out.shared = targets.iter().filter(|t| t.shared).count();
        let look_first = !self.is_dear() || !sharing.is_rare();
        let mut waiting = Vec::new();
        if look_first {
            waiting = self.take_out(excluded, targets)?;
        }
        self.try_lock(targets)?;
        if !look_first && targets.iter().any(|t| t.shared && !t.locked) {
            // Whoever has locked it may be using it: then it is left alone, and no order waits for the lock.
            waiting = self.take_out(excluded, targets)?;
        }
        for target in targets.iter().filter(|t| !t.locked) {
            for order in &target.orders {
                if excluded.insert(*order) {
                    out.locked.push(*order);
                }
            }
        }
        // What began to use a shared row before it was locked is seen by this look.
        waiting.extend(self.take_out(excluded, targets)?);
        Ok(waiting)
    }

    /// Whether whoever uses a shared row is looked for in many partitions.
    fn is_dear(&self) -> bool {
        let partitioned = |entry: usize| self.plan.tables[self.plan.entries[entry].table].facts.kind == 'p';
        let mut entries = self.plan.entries.iter();
        self.others.is_empty() && entries.any(|e| self.plan.tables[e.table].shared && e.parent.is_some_and(partitioned))
    }

    fn mark_shared(&self, targets: &mut [Target<'_>]) {
        for (index, table) in self.plan.tables.iter().enumerate() {
            let named = |p: &Rc<Plan>| p.tables.iter().any(|t| t.relation.oid == table.relation.oid);
            let every = table.shared || self.others.iter().any(named);
            for target in targets.iter_mut().filter(|t| t.table == index) {
                target.shared = (every || target.stored || self.apart.is_some()) && !target.only_marked;
            }
        }
    }

    /// Takes out of `targets` the shared rows that an order outside of this batch still needs.
    fn take_out<'a>(&self, excluded: &HashSet<usize>, targets: &mut Vec<Target<'a>>) -> Result<Waiting<'a>> {
        let (staying, leaving): (Vec<_>, Vec<_>) =
            self.batch.iter().enumerate().partition(|(i, _)| excluded.contains(i));
        let keys = |list: Vec<(usize, &Due)>| list.into_iter().map(|(_, d)| d.order_key.clone()).collect::<Vec<_>>();
        let ours = alive::Ours {
            // An order that stays needs what its links lead to.
            leaving: if self.apart.is_some() {
                Vec::new()
            } else {
                keys(leaving)
            },
            staying: keys(staying),
            apart: self.apart,
        };
        let mut waiting = Vec::new();
        for table in 0..self.plan.tables.len() {
            let asked = |t: &Target<'_>| t.table == table && t.shared;
            let rows: Vec<alive::Asked> = targets
                .iter()
                .filter(|t| asked(t))
                .map(|t| alive::Asked {
                    key: t.write.key.clone(),
                    whole: t.orders.iter().any(|o| self.batch[*o].status == "redacted"),
                })
                .collect();
            if rows.is_empty() {
                continue;
            }
            let mut keepers = alive::keepers(self.plan, self.others, table, &rows, &ours, self.clock)?.into_iter();
            let (mut keep, mut wait) = (Vec::new(), Vec::new());
            for target in targets.drain(..) {
                let keeper = if asked(&target) { keepers.next().flatten() } else { None };
                match keeper {
                    Some(keeper) => wait.push((target, keeper)),
                    None => keep.push(target),
                }
            }
            *targets = keep;
            waiting.extend(wait);
        }
        Ok(waiting)
    }

    /// Locks the rows that nobody else has locked.
    fn try_lock(&self, targets: &mut [Target<'_>]) -> Result<()> {
        let plan = self.plan;
        for part in
            targets.chunk_by_mut(|a, b| (a.table, a.link.map(|_| a.entry)) == (b.table, b.link.map(|_| b.entry)))
        {
            let Some(first) = part.first() else { continue };
            let table = &plan.tables[first.table];
            let links: Vec<&Values> = part.iter().filter_map(|t| t.link).collect();
            let links = first.link.map(|_| (&plan.entries[first.entry], links.as_slice()));
            let keys = part.iter().map(|t| t.write.key);
            let locked = overwrite::lock(
                plan,
                table,
                keys,
                links,
                table.shared || table.delete || self.apart.is_some(),
            )?;
            for (target, locked) in part.iter_mut().zip(locked) {
                target.locked = locked;
            }
        }
        Ok(())
    }
}
