//! Rows that go before their orders.

use std::collections::HashSet;
use std::rc::Rc;

use super::shared::{Look, Sharing};
use super::{Redacted, targets, write};
use crate::domain::vault::MasterKeys;
use crate::engine::archive::{line, look};
use crate::engine::due::{Clock, Due};
use crate::engine::former::Former;
use crate::engine::orphan::{Place, Rows};
use crate::engine::plan::Plan;
use crate::engine::records::{self, Change, Fate, Stored};
use crate::engine::vault::Cold;
use crate::engine::{audit, files};
use crate::pg::error::Result;
use crate::pg::xact;

/// What became of the rows; of those that are in neither list nothing is left to redact.
#[derive(Default)]
pub struct Outcome {
    /// Another order uses them, or the row's own order by a link.
    pub needed: HashSet<Place>,
    /// Locked by somebody, or edited since they were archived.
    pub left: HashSet<Place>,
}

/// Overwrites some rows of orders that are not due yet.
///
/// # Errors
/// As [`batch`](super::batch).
pub fn apart(
    plan: &Plan,
    others: &[Rc<Plan>],
    keys: &MasterKeys,
    clock: &Clock,
    batch: &[Due],
    rows: &Rows,
) -> Result<Outcome> {
    let stored = Stored::of(plan, batch)?;
    let (mut live, archive) = look(plan, keys, batch, &stored, &Cold::default())?;
    live.records.retain(|r| rows.has(plan, &batch[r.order], r));
    let pii = live.records.iter().map(|r| r.pii(plan)).collect::<Result<Vec<_>>>()?;
    let (mut excluded, mut out) = (HashSet::new(), Redacted::default());
    let found = live.records.iter().zip(&pii);
    let mut targets = targets(
        plan,
        &Former::default(),
        batch,
        found,
        &archive,
        &mut excluded,
        &mut out,
    )?;
    xact::fire_deferred()?;
    let locking = Look {
        plan,
        others,
        clock,
        batch,
        apart: Some(rows),
    };
    let waiting = locking.lock(&Sharing::default(), &mut targets, &mut excluded, &mut out)?;
    let files = files::found(plan, batch, &stored, &targets, std::iter::empty(), &excluded)?;
    write(plan, &targets, &excluded)?;
    files::note(plan, keys, batch, &files)?;

    let mut changes = Vec::new();
    let mut counts = vec![0_usize; batch.len()];
    for target in targets
        .iter()
        .filter(|t| t.orders.iter().all(|o| !excluded.contains(o)))
    {
        for order in &target.orders {
            counts[*order] += 1;
            changes.push(Change {
                order_key: &batch[*order].order_key,
                table: &plan.tables[target.table].archived_as,
                record_key: target.key_text,
                fate: Some(Fate::Redacted),
                witness: None,
            });
        }
    }
    records::write(plan, &changes)?;
    records::shared_done(&changes.iter().map(|c| (c.table, c.record_key)).collect::<Vec<_>>())?;
    let lines = batch.iter().zip(&counts).filter(|(_, count)| **count > 0);
    let lines = lines.map(|(due, count)| line(due, format!("{count} records, before the order")));
    audit::insert_batch(keys, "redact", plan, lines.collect())?;
    let place = |table: usize, key: &str| (plan.tables[table].archived_as.clone(), key.to_owned());
    let left = live.records.iter().filter(|r| excluded.contains(&r.order));
    Ok(Outcome {
        needed: waiting.iter().map(|(t, _)| place(t.table, t.key_text)).collect(),
        left: left.map(|r| place(r.table, &r.key_text)).collect(),
    })
}
