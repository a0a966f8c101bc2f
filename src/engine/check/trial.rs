//! A trial of the real treatment on real rows, for whoever rolls it back.

use std::collections::{HashMap, HashSet};

use super::{Problem, Severity, copies, sample, unique};
use crate::domain::treatment::Outcome;
use crate::engine::files;
use crate::engine::flag;
use crate::engine::gather::{self, LiveRecord};
use crate::engine::history;
use crate::engine::overwrite::{self, Marks, RowWrite};
use crate::engine::plan::{Plan, Table};
use crate::engine::portable;
use crate::engine::records::Stored;
use crate::engine::scrub;
use crate::engine::walk::{self, Values};
use crate::pg::error::Result;
use crate::pg::subxact::trial;
use crate::pg::xact;

/// Orders that are read at a time, and text after which no more are.
const SLICE: usize = 20;
const MUCH_TEXT: usize = 32 * 1024 * 1024;

/// Treats some real orders and rolls everything back.
pub(super) fn try_out(plan: &Plan, open: &[unique::Open]) -> Result<Vec<Problem>> {
    let wanted = sample::orders(plan)?;
    // Triggers that the caller left pending fire as the caller.
    xact::fire_deferred()?;
    let (sample, mut before, mut out) = read(plan, &wanted)?;
    let no_keys: &[&str] = &[];
    scrub::fill(plan, &mut before.records, &HashMap::new(), no_keys);
    let facts = flag::by_keys(plan, &sample)?;
    if let (Some(history), Some(order)) = (&plan.history, sample.first()) {
        match trial(|| history::try_out(plan, history, order)) {
            Ok(()) => {}
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if e.is_lock() => {}
            Err(e) => out.push(Problem::new(
                Severity::Error,
                "history",
                e.shown(),
                e.hint_text().unwrap_or_default(),
            )),
        }
    }
    for (index, table) in plan.tables.iter().enumerate() {
        let records: Vec<&LiveRecord> = distinct(before.records.iter().filter(|r| r.table == index));
        let tried = trial(|| {
            files::paths(plan, table, &records.iter().map(|r| &r.key).collect::<Vec<_>>())?;
            let pii = records.iter().map(|r| r.pii(plan)).collect::<Result<Vec<_>>>()?;
            let rows = rows(&records, &pii, index == 0 && !table.marks.is_empty())?;
            let locked = overwrite::lock(plan, table, rows.iter().map(|r| r.key), None, false)?;
            let rows: Vec<RowWrite<'_>> = rows
                .into_iter()
                .zip(locked)
                .filter(|(_, l)| *l)
                .map(|(r, _)| r)
                .collect();
            if rows.is_empty() {
                return Ok((unique::settle(plan, index, open, &[])?, Vec::new()));
            }
            let each: Vec<&RowWrite<'_>> = rows.iter().collect();
            let written = copies::written()?;
            if table.delete {
                overwrite::delete(plan, table, &each)?;
                return Ok((copies::problems(plan, table, &written)?, Vec::new()));
            }
            overwrite::update(plan, table, &each, Marks::Set)?;
            let mut found = copies::problems(plan, table, &written)?;
            let keys: Vec<Values> = rows.into_iter().map(|r| r.key.clone()).collect();
            found.extend(unique::settle(plan, index, open, &keys)?);
            let (problems, new) = compare(plan, table, &sample, &before, &facts)?;
            found.extend(problems);
            Ok((found, new))
        });
        match tried {
            Ok((found, new)) => {
                out.extend(found);
                if any_exists(plan, &new)? {
                    out.push(other_rows(table));
                }
            }
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) if e.is_lock() => {}
            Err(e) => out.push(Problem::new(
                Severity::Error,
                table.relation.shown(),
                format!("the treatment fails on existing rows: {}", e.stored()),
                e.hint_text()
                    .unwrap_or("Choose a treatment that the table's constraints and triggers accept."),
            )),
        }
    }
    Ok(out)
}

/// Reads the orders that are to be tried. One with a value that is too large to be archived will fail by itself, and so
/// it is left out with a warning; and what is read must fit into memory.
fn read(plan: &Plan, wanted: &[Values]) -> Result<(Vec<Values>, gather::Gathered, Vec<Problem>)> {
    let mut read = portable::gather(plan, &[])?;
    for (slice, orders) in wanted.chunks(SLICE).enumerate() {
        read.extend(plan, orders, slice * SLICE)?;
        if read.gathered.bytes() > MUCH_TEXT {
            break;
        }
    }
    let mut warnings: Vec<Problem> = Vec::new();
    for error in &read.refused {
        let words = error.shown();
        let (object, problem) = words.split_once(": ").unwrap_or(("policy", &words));
        if warnings.iter().all(|w| w.object != object || w.problem != problem) {
            let hint = error.hint_text().unwrap_or_default();
            warnings.push(Problem::new(Severity::Warning, object, problem, hint));
        }
    }
    let sample = read.kept.iter().map(|i| wanted[*i].clone()).collect();
    Ok((sample, read.gathered, warnings))
}

/// One record a row, whichever orders reach it.
fn distinct<'a>(records: impl Iterator<Item = &'a LiveRecord>) -> Vec<&'a LiveRecord> {
    let mut seen = HashSet::new();
    records.filter(|r| seen.insert(r.key_text.clone())).collect()
}

fn rows<'a>(
    records: &[&'a LiveRecord],
    pii: &'a [Vec<(usize, Outcome<'_>)>],
    marked: bool,
) -> Result<Vec<RowWrite<'a>>> {
    let mut out = Vec::new();
    for (record, pii) in records.iter().zip(pii).filter(|(_, pii)| marked || !pii.is_empty()) {
        if let Some(cells) = record.writes(pii, |_, live| Ok(Some(live)))? {
            out.push(RowWrite {
                key: &record.key,
                cells,
            });
        }
    }
    Ok(out)
}

/// Table and key of a row.
type Row = (usize, Values);

/// Rows to which a link leads that it did not lead to before.
fn other_rows(table: &Table) -> Problem {
    Problem::new(
        Severity::Error,
        table.relation.shown(),
        "a link or condition of the policy gives another result once its columns are redacted",
        "Link by keys, not by columns that hold personal data.",
    )
}

/// Whether some of these rows, by table and key, are there without the trial: others were written by its triggers, and
/// belong to their order by right.
fn any_exists(plan: &Plan, new: &[Row]) -> Result<bool> {
    for (index, table) in plan.tables.iter().enumerate() {
        let keys: Vec<Values> = new
            .iter()
            .filter(|(t, _)| *t == index)
            .map(|(_, key)| key.clone())
            .collect();
        if !keys.is_empty() && !walk::by_key(plan, table, &keys, &[])?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the policy says of the same orders after the treatment must be what it said before, and the treatment must
/// find nothing more to do. Also returns the rows that were not reached before.
fn compare(
    plan: &Plan,
    table: &Table,
    sample: &[Values],
    before: &gather::Gathered,
    facts: &[flag::OrderFact],
) -> Result<(Vec<Problem>, Vec<Row>)> {
    let mut out = Vec::new();
    let mut after = gather::gather(plan, sample, &Stored::by_keys(plan, sample)?)?;
    let no_keys: &[&str] = &[];
    scrub::fill(plan, &mut after.records, &HashMap::new(), no_keys);
    let name = |r: &LiveRecord| (r.order, r.table, r.key_text.clone());
    let reached = |g: &gather::Gathered| g.records.iter().map(name).collect::<HashSet<_>>();
    let (were, are) = (reached(before), reached(&after));
    if !were.is_subset(&are) {
        out.push(other_rows(table));
    }
    let is_new = |r: &&LiveRecord| !were.contains(&name(r));
    let new = after
        .records
        .iter()
        .filter(is_new)
        .map(|r| (r.table, r.key.clone()))
        .collect();
    let shown = |list: &[flag::OrderFact]| -> Vec<[Option<String>; 4]> {
        let mut all: Vec<_> = list
            .iter()
            .map(|f| {
                [
                    Some(f.key_text.clone()),
                    f.number.clone(),
                    f.anchor.clone(),
                    f.effective.clone(),
                ]
            })
            .collect();
        all.sort();
        all
    };
    if shown(facts) != shown(&flag::by_keys(plan, sample)?) {
        out.push(Problem::new(
            Severity::Error,
            table.relation.shown(),
            match plan.effective {
                None => "\"amazon\", \"number\" or \"anchor\" gives another result once its columns are redacted",
                Some(_) => "\"amazon\", \"number\", \"anchor\" or \"effective_from\" gives another result once its columns are redacted",
            },
            "Leave the columns that these expressions read out of \"redact\".",
        ));
    }
    for record in after
        .records
        .iter()
        .filter(|r| plan.tables[r.table].relation == table.relation && !is_new(r))
    {
        if let Some((i, _)) = record.pii(plan)?.first() {
            out.push(Problem::new(
                Severity::Error,
                format!("{}.{}", table.relation.shown(), table.cells[*i].name.bare()),
                "the treatment changes its own result again",
                "A treatment must leave what it has written as it is.",
            ));
            break;
        }
    }
    Ok((out, new))
}
