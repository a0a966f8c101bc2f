//! Which columns mean anything to a policy. An UPDATE that leaves them as they were is none of its business, and found out
//! without a statement.

use std::cell::RefCell;
use std::collections::HashSet;

use pgrx::pg_sys;

use super::plan::{AnchorPlan, Plan, Table};
use super::triggers::{made_for, speaks_for};
use crate::pg::columns;
use crate::pg::error::Result;
use crate::pg::ident::Expr;
use crate::pg::identity::{Identity, act_as, as_extension};
use crate::pg::invalidation;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::transition::{Differing, Watch};
use crate::pg::trigger::TriggerCall;

/// What a trigger has to watch.
enum Watched {
    /// Every column: an expression reads the whole row, or has a subquery.
    All,
    These(Watch),
    /// A partition that was detached: it is none of the policy's any more.
    Nothing,
}

/// What is left of an UPDATE.
pub enum Left {
    /// Nothing that means anything.
    Nothing,
    /// The rows that this call shows.
    Call(TriggerCall),
    /// All of it.
    Everything,
}

/// A table and its column that refers to a table and its column.
type Link = (pg_sys::Oid, String, pg_sys::Oid, String);

/// A trigger, the state of the catalog in which its columns were found, and these.
type Known = (pg_sys::Oid, u64, Watched);

thread_local! {
    static KNOWN: RefCell<Vec<Known>> = const { RefCell::new(Vec::new()) };
    static REFERRED: RefCell<Vec<(u64, Link, bool)>> = const { RefCell::new(Vec::new()) };
}

/// Whether no row can refer to a new one of this entry yet: a foreign key, checked at once, wants it to be there before.
///
/// # Errors
/// Errors of the server.
pub fn is_referred_to_later(plan: &Plan, index: usize) -> Result<bool> {
    let entry = &plan.entries[index];
    let (Some(parent), [from], [to]) = (entry.parent, entry.on_parent.as_slice(), entry.on_child.as_slice()) else {
        return Ok(false);
    };
    let (child, parent) = (&plan.tables[entry.table], &plan.tables[plan.entries[parent].table]);
    let column = |table: &Table, link: &Expr| {
        let mut columns = table.facts.columns.iter().map(|c| c.name.bare());
        columns.find(|name| *link == Expr::column(name)).map(str::to_owned)
    };
    let (Some(from), Some(to)) = (column(parent, from), column(child, to)) else {
        return Ok(false);
    };
    let generation = invalidation::generation();
    let link = (parent.relation.oid, from, child.relation.oid, to);
    let known = REFERRED.with_borrow(|r| {
        r.iter()
            .find(|(g, l, _)| *g == generation && *l == link)
            .map(|(_, _, is)| *is)
    });
    if let Some(known) = known {
        return Ok(known);
    }
    let rows = as_extension(|| {
        sql::read(
            "SELECT true FROM pg_catalog.pg_constraint AS c WHERE c.contype = 'f' AND c.convalidated AND NOT c.condeferrable \
                AND c.conrelid = $1 AND c.confrelid = $3 \
                AND c.conkey = ARRAY(SELECT a.attnum FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = $1 AND a.attname = $2) \
                AND c.confkey = ARRAY(SELECT a.attnum FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = $3 AND a.attname = $4) \
                AND NOT EXISTS (SELECT FROM pg_catalog.pg_trigger AS t WHERE t.tgconstraint = c.oid AND t.tgenabled NOT IN ('O', 'A'))",
            &[
                Arg::Oid(link.0),
                Arg::Text(Some(&link.1)),
                Arg::Oid(link.2),
                Arg::Text(Some(&link.3)),
            ],
        )
    })?;
    let is = !rows.is_empty();
    REFERRED.with_borrow_mut(|r| {
        r.retain(|(g, l, _)| *g == generation && *l != link);
        r.push((generation, link, is));
    });
    Ok(is)
}

/// The rows of an UPDATE that differ in a column that means something.
///
/// # Errors
/// A cancel, or a lock that could not be had in time.
pub fn left_of(call: &TriggerCall) -> Result<Left> {
    let generation = invalidation::generation();
    let known = KNOWN.with_borrow_mut(|k| {
        let at = k.iter().position(|(trigger, _, _)| *trigger == call.trigger)?;
        Some(k.swap_remove(at))
    });
    let watched = match known {
        Some((_, at, watched)) if at == generation => watched,
        stale => {
            if let Some((_, _, Watched::These(watch))) = stale {
                watch.free();
            }
            match subtransaction(|| find(call)) {
                Ok(watched) => watched,
                Err(e) if e.is_cancel() || e.is_lock() => return Err(e),
                // Whatever it is: where it matters, the trigger meets it again, and notes it.
                Err(_) => return Ok(Left::Everything),
            }
        }
    };
    // Taken out meanwhile: an error that unwinds from here leaves nothing behind that could be used again.
    let left = match &watched {
        Watched::All => Left::Everything,
        Watched::Nothing => Left::Nothing,
        Watched::These(watch) => match watch.differing(call) {
            Differing::None => Left::Nothing,
            Differing::Some(call) => Left::Call(call),
            Differing::Unknown => Left::Everything,
        },
    };
    KNOWN.with_borrow_mut(|k| k.push((call.trigger, generation, watched)));
    Ok(left)
}

fn find(call: &TriggerCall) -> Result<Watched> {
    let [policy, alias] = made_for(call)?;
    // A partition's columns have numbers of their own.
    invalidation::watch(std::iter::once(call.relation));
    let plan = Plan::cached(&policy)?;
    let entry = plan.entry(&alias)?;
    if !speaks_for(&plan.tables[entry.table], call)? {
        return Ok(Watched::Nothing);
    }
    match names(&plan, entry.table)? {
        Some(names) => {
            let keys = plan.tables[entry.table].key.len();
            Ok(Watched::These(Watch::of(call, &names, keys)?))
        }
        None => Ok(Watched::All),
    }
}

/// The columns of a table that the policy's expressions read, those of its key, which come first, and those that it treats;
/// `None` for all.
fn names(plan: &Plan, index: usize) -> Result<Option<Vec<String>>> {
    let table = &plan.tables[index];
    let mut names: Vec<String> = table.key.iter().map(|(name, _)| name.bare().to_owned()).collect();
    names.extend(table.cells.iter().map(|c| c.name.bare().to_owned()));
    let expressions = expressions(plan, index);
    if !expressions.is_empty() {
        let query = format!(
            "SELECT {} FROM {} AS {}",
            expressions.join(", "),
            table.relation,
            table.relation.name
        );
        let read = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
            columns::read_by(&query)
        })?;
        match read {
            Some(read) => names.extend(read),
            None => return Ok(None),
        }
    }
    Ok(Some(names))
}

/// The columns that expressions of the policy read, those left out that are bare columns themselves: these are found again
/// under another name. Of an expression that reads the whole row, or has a subquery, that cannot be said.
///
/// # Errors
/// Errors of the server.
pub fn read_by_expressions(plan: &Plan, table: &Table) -> Result<HashSet<String>> {
    let zone = plan.document.timezone.replace('\'', "''");
    let bare: HashSet<String> = table
        .facts
        .columns
        .iter()
        .flat_map(|column| {
            let expression = Expr::column(column.name.bare());
            let moment = [
                "pg_catalog.timezone('",
                &zone,
                "', ",
                &expression.to_string(),
                "::pg_catalog.timestamp)",
            ]
            .concat();
            [
                expression.to_string(),
                moment,
                Expr::amazon_number(&expression).to_string(),
            ]
        })
        .collect();
    let mut out = HashSet::new();
    let mut all: Vec<String> = table.files.iter().map(Expr::to_string).collect();
    all.extend(table.marks.iter().map(|m| m.expression.to_string()));
    let same = |t: &Table| t.relation.oid == table.relation.oid;
    for index in (0..plan.tables.len()).filter(|i| same(&plan.tables[*i])) {
        all.extend(expressions(plan, index));
    }
    for entry in plan.entries.iter().filter(|e| same(&plan.tables[e.table])) {
        all.extend(entry.retrieve_on_insert.iter().flatten().map(Expr::to_string));
    }
    if let Some(customer) = &plan.customer
        && same(&plan.tables[plan.entries[customer.entry].table])
    {
        all.extend(customer.duplicate_by.iter().map(Expr::to_string));
    }
    if same(plan.orders()) {
        let history = plan.history.iter().flat_map(|h| h.expressions());
        all.extend(history.map(|(_, e)| e.to_string()));
    }
    for aged in plan.by_age.iter().filter(|a| same(&a.table)) {
        all.push(aged.at.to_string());
        all.extend(aged.filter.iter().map(Expr::to_string));
        let cells = aged.table.cells.iter().filter_map(|c| c.expression.as_ref());
        all.extend(cells.map(Expr::to_string));
    }
    for expression in all.iter().filter(|e| !bare.contains(*e)) {
        let query = format!("SELECT {expression} FROM {} AS {}", table.relation, table.relation.name);
        let read = subtransaction(|| {
            act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
                columns::read_by(&query)
            })
        });
        match read {
            Err(e) if e.is_cancel() => return Err(e),
            // One that fails is told by the check.
            read => out.extend(read.ok().flatten().into_iter().flatten()),
        }
    }
    Ok(out)
}

/// Everything that the policy evaluates over a row of a table.
fn expressions(plan: &Plan, index: usize) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let table = &plan.tables[index];
    out.extend(
        table
            .cells
            .iter()
            .filter_map(|c| c.expression.as_ref())
            .map(Expr::to_string),
    );
    for entry in &plan.entries {
        if entry.table == index {
            out.extend(entry.on_child.iter().map(Expr::to_string));
            out.extend(entry.filter.iter().chain(&entry.number).map(Expr::to_string));
            out.extend(entry.not_before.clone());
        }
        if entry.parent.is_some_and(|p| plan.entries[p].table == index) {
            out.extend(entry.on_parent.iter().map(Expr::to_string));
        }
    }
    for anchor in &plan.anchors {
        match anchor {
            AnchorPlan::Order(sql) if index == 0 => out.push(sql.clone()),
            AnchorPlan::Linked {
                entry,
                at,
                filter,
                complete,
            } => {
                if plan.entries[*entry].table == index {
                    out.push(at.clone());
                    out.extend(filter.iter().map(Expr::to_string));
                }
                if index == 0 {
                    out.extend(complete.iter().map(Expr::to_string));
                }
            }
            AnchorPlan::Order(_) => {}
        }
    }
    if index == 0 {
        out.push(plan.amazon.to_string());
        out.extend(plan.number.iter().chain(&plan.replaces).map(Expr::to_string));
        out.extend(plan.placed.iter().chain(&plan.effective).cloned());
    }
    out
}
