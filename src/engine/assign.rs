//! No customer of an Amazon order's own: the order is pointed at a generic one before it is written. What becomes of the row that
//! the importer had made: [`orphan`](super::orphan).

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use pgrx::pg_sys;

use super::plan::{Builder, Customer, Plan};
use super::triggers::{call_key, made_for, speaks_for};
use super::walk::{Hop, Values, hop, key_text};
use crate::domain::policy::{AssignCustomer, Orphan, Policy};
use crate::engine::check::{Problem, Severity};
use crate::pg::catalog;
use crate::pg::error::{Error, Result};
use crate::pg::ident::{Expr, Ident};
use crate::pg::identity::{self, Identity, as_extension};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::{Event, TriggerCall, is_engine_write};
use crate::pg::{invalidation, prepared};

/// Where Amazon orders are pointed at.
pub struct Assign {
    pub column: Ident,
    /// As the column's type writes it.
    pub to: String,
    /// The row that an order was imported with is redacted at once.
    pub orphans_at_once: bool,
}

impl Assign {
    /// Makes the key `assign_customer` ready.
    ///
    /// # Errors
    /// The column does not exist, or cannot be written before the row is.
    pub fn build(builder: &Builder<'_>, document: &AssignCustomer) -> Result<Self> {
        let table = &builder.tables[0];
        let place = "orders.assign_customer";
        let shown = table.relation.shown();
        let column = table.facts.column(&document.column).ok_or_else(|| {
            Error::undefined(format!(
                "{place}: column \"{}\" of {shown} does not exist",
                document.column
            ))
            .hint("Name the column that points at the customer.")
        })?;
        let plain = [
            pg_sys::INT2OID,
            pg_sys::INT4OID,
            pg_sys::INT8OID,
            pg_sys::TEXTOID,
            pg_sys::VARCHAROID,
            pg_sys::UUIDOID,
        ];
        if column.generated || !plain.contains(&column.type_oid) || table.key.iter().any(|(k, _)| *k == column.name) {
            return Err(Error::invalid(format!(
                "{place}: column \"{}\" of {shown} cannot be written",
                document.column
            ))
            .hint("It must be a column of whole numbers, text or uuid, neither generated nor part of the key."));
        }
        Ok(Self {
            column: column.name.clone(),
            orphans_at_once: document.orphan == Orphan::Now,
            to: builder.canonical(0, column, &document.to, place).map_err(|e| {
                if e.is_cancel() {
                    return e;
                }
                Error::invalid(format!(
                    "{place}.to: no value of column \"{}\" of {shown}",
                    document.column
                ))
                .hint("Write what the column holds for the generic customer.")
            })?,
        })
    }
}

/// The generic customers of a policy, of all its versions: orders that were pointed at a former one still are.
///
/// # Errors
/// Errors of the server.
pub fn generic(plan: &Plan) -> Result<Vec<(usize, String)>> {
    let mut out = Vec::new();
    let entries = |column: &str| -> Vec<usize> {
        let wanted = [Expr::column(column)];
        (0..plan.entries.len())
            .filter(|i| plan.entries[*i].parent == Some(0) && plan.entries[*i].on_parent == wanted)
            .collect()
    };
    if let Some(assign) = &plan.assign {
        out.extend(
            entries(assign.column.bare())
                .into_iter()
                .map(|i| (i, assign.to.clone())),
        );
    }
    let rows = as_extension(|| {
        sql::read(
            "SELECT v.document FROM amazon_pii.policy_version AS v WHERE v.policy = $1 AND pg_catalog.strpos(v.document, 'assign_customer') > 0",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    for row in &rows {
        let document = Policy::parse(row.str(0)?).ok().and_then(|p| p.orders.assign_customer);
        let Some(former) = document else { continue };
        let mut reached = entries(&former.column);
        if reached.is_empty() {
            // The column was renamed since.
            reached.extend(plan.customer.as_ref().map(|c| c.entry));
        }
        for index in reached {
            let is_uuid = plan.entries[index].on_parent_types == [pg_sys::UUIDOID];
            let to = if is_uuid {
                former.to.to_lowercase()
            } else {
                former.to.clone()
            };
            if !out.iter().any(|(i, known)| *i == index && *known == to) {
                out.push((index, to));
            }
        }
    }
    Ok(out)
}

/// Whether the values of a link lead from an order to a generic customer.
pub fn is_generic(plan: &Plan, entry: usize, link: &Values) -> bool {
    let [Some(value)] = link.as_slice() else { return false };
    plan.generic.iter().any(|(i, to)| *i == entry && to == value)
}

/// That there is such a customer, and that the column may change on its way into the table.
///
/// # Errors
/// Errors of the server.
pub fn problem(plan: &Plan) -> Result<Vec<Problem>> {
    let (Some(assign), Some(customer)) = (&plan.assign, &plan.customer) else {
        return Ok(Vec::new());
    };
    let place = "orders.assign_customer";
    let mut out = Vec::new();
    if !exists(plan, customer, &assign.to)? {
        out.push(Problem {
            severity: Severity::Error,
            object: place.to_owned(),
            problem: format!("there is no customer {}", assign.to),
            hint: "Insert the generic customer first.".to_owned(),
        });
    }
    let partitioned = as_extension(|| {
        let oids = catalog::with_partitions(plan.orders().relation.oid)?;
        let oids = oids.iter().map(|r| i64::from(u32::from(r.oid))).collect();
        sql::read(
            "SELECT true FROM pg_catalog.pg_partitioned_table AS p JOIN pg_catalog.pg_attribute AS a ON a.attrelid = p.partrelid \
             WHERE p.partrelid::bigint = ANY ($1) AND a.attname = $2 AND (a.attnum = ANY (p.partattrs::int2[]) OR p.partexprs IS NOT NULL)",
            &[Arg::Ints(oids), Arg::Text(Some(assign.column.bare()))],
        )
    })?;
    if !partitioned.is_empty() {
        out.push(Problem {
            severity: Severity::Error,
            object: place.to_owned(),
            problem: format!("the orders table is partitioned by column \"{}\"", assign.column.bare()),
            hint: "A row cannot change its partition on its way into the table.".to_owned(),
        });
    }
    Ok(out)
}

/// Whether there is such a customer.
///
/// # Errors
/// Errors of the server.
pub fn exists(plan: &Plan, customer: &Customer, to: &str) -> Result<bool> {
    let entry = &plan.entries[customer.entry];
    let reach = Hop {
        limit: Some(1),
        ..Hop::into_entry(plan, entry, &[])
    };
    Ok(!hop(plan, &reach, &[vec![Some(to.to_owned())]])?.is_empty())
}

/// What a trigger needs of its policy, in one state of the catalog.
struct Ready {
    trigger: pg_sys::Oid,
    generation: u64,
    /// None: a partition that was detached.
    plan: Option<Rc<Plan>>,
    /// Whether a row is Amazon's, and its number.
    query: Rc<str>,
}

thread_local! {
    static READY: RefCell<Vec<Ready>> = const { RefCell::new(Vec::new()) };
}

fn ready(call: &TriggerCall) -> Result<(Option<Rc<Plan>>, Rc<str>)> {
    let generation = invalidation::generation();
    let known = READY.with_borrow(|r| {
        let same = |k: &&Ready| k.trigger == call.trigger && k.generation == generation;
        r.iter().find(same).map(|k| (k.plan.clone(), k.query.clone()))
    });
    if let Some(known) = known {
        return Ok(known);
    }
    let (plan, query) = subtransaction(|| {
        let [policy, _] = made_for(call)?;
        invalidation::watch(std::iter::once(call.relation));
        let plan = Plan::cached(&policy)?;
        let own = plan.assign.is_some() && speaks_for(plan.orders(), call)?;
        let number = plan
            .number
            .as_ref()
            .map_or_else(|| "NULL".to_owned(), |n| format!("{n}::pg_catalog.text"));
        let name: &Ident = &plan.orders().relation.name;
        // A plan is kept for the text: of another shape of the table it would be wrong.
        let query = format!(
            "SELECT {} IS TRUE, {number} FROM (SELECT ($1).*) AS {name} /* {} */",
            plan.amazon,
            shape(&plan)
        );
        Ok((Some(plan).filter(|_| own), query))
    })?;
    let query: Rc<str> = query.into();
    READY.with_borrow_mut(|r| {
        r.retain(|k| k.trigger != call.trigger);
        r.push(Ready {
            trigger: call.trigger,
            generation,
            plan: plan.clone(),
            query: query.clone(),
        });
    });
    Ok((plan, query))
}

/// A number that stands for the columns of the orders table.
fn shape(plan: &Plan) -> u64 {
    let mut hasher = DefaultHasher::new();
    for column in &plan.orders().facts.columns {
        (
            column.number,
            column.name.bare(),
            &column.type_shown,
            u32::from(column.type_oid),
        )
            .hash(&mut hasher);
    }
    hasher.finish()
}

/// The row that is about to be written, with the generic customer if it is an Amazon order.
///
/// # Errors
/// A cancel only: what goes wrong otherwise is noted, and the row goes through as it is.
pub fn assign(call: &TriggerCall) -> Result<pg_sys::Datum> {
    if is_engine_write(call.relation) {
        return Ok(call.written());
    }
    let _impatient = identity::impatient();
    let outcome = ready(call).and_then(|(plan, query)| match plan {
        Some(plan) => assigned(&plan, &query, call),
        None => Ok(None),
    });
    match outcome {
        Ok(Some(row)) => Ok(row),
        Ok(None) => Ok(call.written()),
        Err(e) if e.is_cancel() => Err(e),
        Err(e) => {
            let noted = subtransaction(|| note_error(call, &e));
            if noted.is_err() {
                pgrx::warning!(
                    "amazon_pii could not give an order the generic customer: {}",
                    e.stored()
                );
            }
            Ok(call.written())
        }
    }
}

fn assigned(plan: &Plan, query: &str, call: &TriggerCall) -> Result<Option<pg_sys::Datum>> {
    let (Some(assign), Some(customer)) = (&plan.assign, &plan.customer) else {
        return Ok(None);
    };
    let column = assign.column.bare();
    let new = call.column(column)?;
    if new.as_deref() == Some(&assign.to) {
        return Ok(None);
    }
    let orders = plan.orders();
    let amazon = |old: bool| {
        // Values that are stored out of line are fetched, and may be damaged.
        let written = subtransaction(|| Ok(call.row(old)))?;
        let rows = prepared::rows_as(Identity::Owner(orders.owner), &plan.search_path, query, &[written])?;
        let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
        Ok::<_, Error>((row.bool(0)?, row.owned(1)?))
    };
    let (is_amazon, number) = amazon(false)?;
    if !is_amazon {
        return Ok(None);
    }
    // One that had its customer before the policy said so keeps it: what is new is pointed elsewhere.
    if call.event == Event::Update && call.old_column(column)? == new && amazon(true)?.0 {
        return Ok(None);
    }
    subtransaction(|| {
        if !exists(plan, customer, &assign.to)? {
            return Err(Error::undefined(format!(
                "orders.assign_customer: there is no customer {}",
                assign.to
            )));
        }
        if let Some(value) = new.filter(|v| !is_generic(plan, customer.entry, &vec![Some(v.clone())])) {
            prepared::execute(
                "INSERT INTO amazon_pii.orphan (policy, order_key, order_number, link) VALUES ($1, $2, $3, $4)",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(&key_text(&call_key(plan, orders, call)?)?)),
                    Arg::Text(number.as_deref()),
                    Arg::Text(Some(&key_text(&[Some(value)])?)),
                ],
            )?;
        }
        call.with_value(column, &assign.to).map(Some)
    })
}

/// `status` says that a row went through unassigned, until the next cycle has looked at it.
fn note_error(call: &TriggerCall, error: &Error) -> Result<()> {
    let [policy, alias] = made_for(call)?;
    let plan = Plan::cached(&policy)?;
    let key = key_text(&call_key(&plan, plan.orders(), call)?)?;
    as_extension(|| {
        sql::execute(
            "INSERT INTO amazon_pii.touched (policy, entry, row_key, error) VALUES ($1, $2, $3, $4)",
            &[
                Arg::Text(Some(&policy)),
                Arg::Text(Some(&alias)),
                Arg::Text(Some(&key)),
                Arg::Text(Some(&error.stored())),
            ],
        )
    })?;
    Ok(())
}
