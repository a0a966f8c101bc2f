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
use crate::pg::invalidation::{self, Stamp};
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

/// A plan, what it was made of, and when, as far as the server had said by then what changes.
struct Kept {
    stamp: Stamp,
    tables: Vec<pg_sys::Oid>,
    /// Of these tables.
    print: String,
    record: Record,
    plan: Rc<Plan>,
}

thread_local! {
    static KEPT: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
}

/// What the session keeps of a policy, if it `fits` and is as good as new: nothing was said of its tables since, or, where something
/// was, they are what they were. To be vacuumed or analyzed is no change.
fn kept(policy: &str, fits: impl Fn(&Record) -> bool) -> Result<Option<Rc<Plan>>> {
    let now = invalidation::stamp();
    let known = KEPT.with_borrow(|kept| {
        let found = kept.iter().find(|k| k.plan.policy == policy)?;
        let good = found.stamp.policies == now.policies && fits(&found.record);
        good.then(|| {
            let print = (found.stamp != now).then(|| (found.tables.clone(), found.print.clone()));
            (Rc::clone(&found.plan), print)
        })
    });
    let Some((plan, changed)) = known else {
        return Ok(None);
    };
    if let Some((tables, print)) = changed {
        if as_extension(|| catalog::print(&tables))? != print {
            return Ok(None);
        }
        KEPT.with_borrow_mut(|kept| {
            let same = kept.iter_mut().find(|k| Rc::ptr_eq(&k.plan, &plan));
            if let Some(same) = same {
                same.stamp = now;
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
        match sql::as_of_now(|| kept(policy, |_| true))? {
            Some(plan) => Ok(plan),
            None => Self::current(policy),
        }
    }

    /// [`Plan::load`], from what the session keeps where neither the policy nor one of its tables has changed.
    ///
    /// # Errors
    /// As [`Plan::load`].
    pub fn current(policy: &str) -> Result<Rc<Self>> {
        // What changes is said whatever the transaction sees.
        sql::as_of_now(|| {
            if KEPT.with_borrow(|kept| kept.iter().any(|k| k.plan.policy == policy)) {
                let record = Record::read(policy)?;
                if let Some(plan) = kept(policy, |known| *known == record)? {
                    return Ok(plan);
                }
            }
            Self::anew(policy)
        })
    }

    /// Nothing that it is made of is older than the stamp and the print that it is kept with, or it is not kept.
    fn anew(policy: &str) -> Result<Rc<Self>> {
        let tables = tables(policy)?;
        invalidation::watch(tables.iter().copied());
        let stamp = invalidation::stamp();
        let print = as_extension(|| catalog::print(&tables))?;
        let record = Record::read(policy)?;
        let mut others = record.relations.iter().map(|r| r.oid(1));
        let are_watched = others.all(|oid| oid.is_ok_and(|oid| tables.contains(&oid)));
        let plan = Rc::new(Self::from_record(policy, &record)?);
        KEPT.with_borrow_mut(|kept| {
            kept.retain(|k| k.stamp.policies == stamp.policies && k.plan.policy != policy);
            if are_watched && stamp == invalidation::stamp() {
                kept.push(Kept {
                    stamp,
                    tables,
                    print,
                    record,
                    plan: Rc::clone(&plan),
                });
            }
        });
        Ok(plan)
    }
}

/// The tables of a policy.
fn tables(policy: &str) -> Result<Vec<pg_sys::Oid>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT DISTINCT t.relation::oid FROM amazon_pii.policy_table t WHERE t.policy = $1",
            &[Arg::Text(Some(policy))],
        )
    })?;
    rows.iter().map(|r| r.oid(0)).collect()
}
