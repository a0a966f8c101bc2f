//! Plans that a session keeps. To build one costs a dozen statements on catalogs; what can make it old is asked for in two.

use std::cell::RefCell;
use std::rc::Rc;

use pgrx::pg_sys;

use super::columns::{self, Known};
use super::{Plan, path};
use crate::domain::policy::Policy;
use crate::pg::catalog;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::invalidation;
use crate::pg::sql::{self, Arg, Row};

/// A policy as our tables have it, and the owners that its tables have now.
#[derive(PartialEq, Eq)]
pub(super) struct Record {
    /// Version, document, search path, whether it is enabled, why it is suspended, the schemas of the path when it was applied.
    pub(super) row: Row,
    /// For each entry its table, the table's owner when it was applied and now (empty: none), its archived name, and its name and
    /// schema now.
    pub(super) relations: Vec<Row>,
    /// Its columns as they are now.
    pub(super) columns: Vec<Row>,
    /// The schemas of its search path as they are now.
    pub(super) schemas: Vec<Row>,
}

impl Record {
    pub(super) fn read(policy: &str) -> Result<Self> {
        as_extension(|| {
            let rows = sql::read(
                "SELECT version, document, search_path, enabled, suspended, path_schemas FROM amazon_pii.policy WHERE policy = $1",
                &[Arg::Text(Some(policy))],
            )?;
            let row = rows.into_iter().next().ok_or_else(|| {
                Error::undefined(format!("policy \"{policy}\" does not exist"))
                    .hint("The view amazon_pii.policies lists the policies.")
            })?;
            let relations = sql::read(
                "SELECT t.entry, t.relation::oid, t.owner, COALESCE(r.rolname, ''), t.archived_as, c.relname, n.nspname FROM amazon_pii.policy_table t \
                 LEFT JOIN pg_catalog.pg_class c ON c.oid = t.relation LEFT JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_catalog.pg_roles r ON r.oid = c.relowner \
                 WHERE t.policy = $1 ORDER BY t.entry",
                &[Arg::Text(Some(policy))],
            )?;
            let columns = columns::read(policy)?;
            let schemas = path::schemas(row.text(5)?)?;
            Ok(Self {
                row,
                relations,
                columns,
                schemas,
            })
        })
    }
}

impl Record {
    /// Gives a document the names that its columns have now, and returns the known columns.
    pub(super) fn follow(&self, document: &mut Policy) -> Result<Vec<Known>> {
        let known = self.columns.iter().map(Known::of).collect::<Result<Vec<_>>>()?;
        columns::follow(document, &known, |entry| {
            let row = self.relations.iter().find(|r| r.str(0).is_ok_and(|a| a == entry))?;
            row.string(4).ok()
        })?;
        Ok(known)
    }
}

/// A plan, what it was made of, and the generation of the catalog in which it was.
struct Kept {
    generation: u64,
    policies: u64,
    /// Of its tables.
    print: String,
    record: Record,
    plan: Rc<Plan>,
}

thread_local! {
    static KEPT: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
}

impl Record {
    fn tables(&self) -> Result<Vec<pg_sys::Oid>> {
        self.relations.iter().map(|r| r.oid(1)).collect()
    }
}

/// What the session keeps of a policy, if it is as good as new: nothing was said of its tables, or, where something was, they are what
/// they were. To be vacuumed or analyzed is no change.
fn kept(policy: &str, fits: impl Fn(&Kept) -> bool) -> Result<Option<Rc<Plan>>> {
    let generation = invalidation::generation();
    let find = |k: &&Kept| k.plan.policy == policy && fits(k);
    let known = KEPT.with_borrow(|kept| {
        let k = kept.iter().find(find)?;
        Some((k.generation, k.print.clone(), Rc::clone(&k.plan), k.record.tables()))
    });
    let Some((at, print, plan, tables)) = known else {
        return Ok(None);
    };
    if at != generation {
        if as_extension(|| catalog::print(&tables?))? != print {
            return Ok(None);
        }
        KEPT.with_borrow_mut(|kept| {
            let same = kept.iter_mut().find(|k| Rc::ptr_eq(&k.plan, &plan));
            if let Some(same) = same {
                same.generation = generation;
            }
        });
    }
    Ok(Some(plan))
}

impl Plan {
    /// [`Plan::current`] as far as the server has said what changed: for triggers, which ask nothing where nothing has.
    ///
    /// # Errors
    /// As [`Plan::load`].
    pub fn cached(policy: &str) -> Result<Rc<Self>> {
        let policies = invalidation::generation_of_policies();
        match kept(policy, |k| k.policies == policies)? {
            Some(plan) => Ok(plan),
            None => Self::current(policy),
        }
    }

    /// [`Plan::load`], from what the session keeps where neither the policy nor one of its tables has changed.
    ///
    /// # Errors
    /// As [`Plan::load`].
    pub fn current(policy: &str) -> Result<Rc<Self>> {
        let policies = invalidation::generation_of_policies();
        let record = Record::read(policy)?;
        if let Some(plan) = kept(policy, |k| k.policies == policies && k.record == record)? {
            return Ok(plan);
        }
        // Watched before it is built: what changes meanwhile makes the plan old at once.
        let tables = record.tables()?;
        invalidation::watch(tables.iter().copied());
        let (generation, policies) = (invalidation::generation(), invalidation::generation_of_policies());
        let print = as_extension(|| catalog::print(&tables))?;
        let plan = Rc::new(Self::from_record(policy, &record)?);
        KEPT.with_borrow_mut(|kept| {
            kept.retain(|k| k.policies == policies && k.plan.policy != policy);
            kept.push(Kept {
                generation,
                policies,
                print,
                record,
                plan: Rc::clone(&plan),
            });
        });
        Ok(plan)
    }
}
