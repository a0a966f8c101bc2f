//! What a policy asks for when orders get a customer: none of another channel's for a customer of Amazon's, no merge of one
//! whose personal data is archived.

use std::collections::{HashMap, HashSet};

use super::audit::{self, AuditEntry, Line};
use super::customers::{self, OrderOf};
use super::plan::{Customer, Plan};
use super::walk::{Hop, Values, hop, key_text, select_all};
use crate::domain::policy::{ManualOrders, Merge};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::{Identity, act_as};
use crate::pg::sql;
use crate::pg::trigger::{Event, TriggerCall};

/// Orders that a warning names in the audit log.
const NAMED: usize = 1000;

/// A row of the orders table: its key, its customer, its number, whether it is Amazon's.
struct Points {
    key: Values,
    customer: Values,
    number: Option<String>,
    amazon: bool,
}

/// Why what a statement did to the orders table is refused, if it is.
///
/// # Errors
/// Errors of the server or of the owners' expressions.
pub fn refusal(plan: &Plan, call: &TriggerCall) -> Result<Option<Error>> {
    let Some(customer) = &plan.customer else {
        return Ok(None);
    };
    let manual = plan.document.orders.manual_orders;
    let merge = plan.document.customer().is_some_and(|c| c.merge == Merge::Refuse);
    match call.event {
        Event::Insert if manual != ManualOrders::Allow => {
            // Few customers are looked for, however many orders there are.
            let links = distinct(plan, customer, call)?;
            if of_amazon(plan, customer, &links)?.is_empty() {
                return Ok(None);
            }
            let new = rows(plan, customer, call, "amazon_pii_new")?;
            by_hand(plan, customer, &new)
        }
        Event::Update if merge || manual != ManualOrders::Allow => {
            let before: HashMap<Values, Values> = rows(plan, customer, call, "amazon_pii_old")?
                .into_iter()
                .map(|p| (p.key, p.customer))
                .collect();
            let mut moved = rows(plan, customer, call, "amazon_pii_new")?;
            moved.retain(|p| before.get(&p.key) != Some(&p.customer));
            if moved.is_empty() {
                return Ok(None);
            }
            if merge && let Some(refused) = merged(plan, customer, &before, &moved)? {
                return Ok(Some(refused));
            }
            if manual == ManualOrders::Allow {
                return Ok(None);
            }
            by_hand(plan, customer, &moved)
        }
        _ => Ok(None),
    }
}

/// The customers that orders of other channels point at, each once.
fn distinct(plan: &Plan, customer: &Customer, call: &TriggerCall) -> Result<Vec<Values>> {
    let links = select_all(&plan.entries[customer.entry].on_parent);
    let name: &Ident = &plan.orders().relation.name;
    let query = format!(
        "SELECT DISTINCT {} FROM amazon_pii_new AS {name} WHERE {} IS NOT TRUE",
        links.join(", "),
        plan.amazon
    );
    let rows = read(plan, call, &query)?;
    rows.iter().map(|r| r.texts(0..links.len())).collect()
}

fn rows(plan: &Plan, customer: &Customer, call: &TriggerCall, from: &'static str) -> Result<Vec<Points>> {
    let mut select = plan.orders().key_list();
    let keys = select.len();
    select.extend(select_all(&plan.entries[customer.entry].on_parent));
    let width = select.len();
    select.push(format!("{} IS TRUE", plan.amazon));
    select.extend(plan.number.iter().map(|n| format!("{n}::pg_catalog.text")));
    let name: &Ident = &plan.orders().relation.name;
    let query = format!("SELECT {} FROM {from} AS {name}", select.join(", "));
    read(plan, call, &query)?
        .iter()
        .map(|r| {
            Ok(Points {
                key: r.texts(0..keys)?,
                customer: r.texts(keys..width)?,
                amazon: r.bool(width)?,
                number: plan.number.as_ref().map(|_| r.owned(width + 1)).transpose()?.flatten(),
            })
        })
        .collect()
}

fn read(plan: &Plan, call: &TriggerCall, query: &str) -> Result<Vec<sql::Row>> {
    let owner = Identity::Owner(plan.orders().owner);
    act_as(owner, &plan.search_path, &[], || sql::in_trigger(call, query, &[]))
}

/// Of these customers those that an Amazon order points at.
fn of_amazon(plan: &Plan, customer: &Customer, links: &[Values]) -> Result<HashSet<Values>> {
    let entry = &plan.entries[customer.entry];
    let reach = Hop {
        table: plan.orders(),
        on: &entry.on_parent,
        own_types: &entry.on_parent_types,
        types: &entry.on_parent_types,
        filter: Some(&plan.amazon),
        select: &[],
        limit: Some(1),
    };
    Ok(hop(plan, &reach, links)?
        .iter()
        .map(|f| links[f.input].clone())
        .collect())
}

/// Orders of other channels for a customer of Amazon orders: refused, or told.
fn by_hand(plan: &Plan, customer: &Customer, orders: &[Points]) -> Result<Option<Error>> {
    let others: Vec<&Points> = orders.iter().filter(|p| !p.amazon).collect();
    let links: HashSet<&Values> = others.iter().map(|p| &p.customer).collect();
    let theirs = of_amazon(plan, customer, &links.into_iter().cloned().collect::<Vec<_>>())?;
    let mixed: Vec<&Points> = others.into_iter().filter(|p| theirs.contains(&p.customer)).collect();
    if mixed.is_empty() {
        return Ok(None);
    }
    if plan.document.orders.manual_orders == ManualOrders::Refuse {
        return Ok(Some(Error::manual_order(&plan.policy)));
    }
    pgrx::warning!(
        "{} orders of other channels are for customers of Amazon orders (policy \"{}\")",
        mixed.len(),
        plan.policy
    );
    let named = mixed.iter().take(NAMED);
    let lines = named
        .map(|p| {
            Ok(Line {
                order_key: key_text(&p.key)?,
                order_number: p.number.clone(),
                detail: "for a customer of Amazon orders".to_owned(),
            })
        })
        .collect::<Result<_>>()?;
    audit::insert(&[AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        lines,
        ..AuditEntry::new("manual_order")?
    }])?;
    Ok(None)
}

/// Why orders may not move from one customer to another.
fn merged(
    plan: &Plan,
    customer: &Customer,
    before: &HashMap<Values, Values>,
    moved: &[Points],
) -> Result<Option<Error>> {
    let whole = |link: &Values| link.iter().all(Option::is_some);
    let mut links: Vec<Values> = Vec::new();
    let mut at: HashMap<&Values, usize> = HashMap::new();
    let mut had: Vec<OrderOf> = Vec::new();
    for order in moved {
        let Some(old) = before
            .get(&order.key)
            .filter(|old| whole(old) && whole(&order.customer))
        else {
            continue;
        };
        for link in [old, &order.customer] {
            at.entry(link).or_insert_with(|| {
                links.push(link.clone());
                links.len() - 1
            });
        }
        had.push((at[old], key_text(&order.key)?));
    }
    // (position of the customer's row, its key), by the links that lead to it.
    let rows = customers::behind(plan, customer, &links)?;
    let mut keys: Vec<Values> = Vec::new();
    let mut first: HashMap<usize, std::ops::Range<usize>> = HashMap::new();
    for (link, found) in rows {
        let from = keys.len();
        keys.extend(found);
        first.insert(link, from..keys.len());
    }
    let also: Vec<OrderOf> = had
        .iter()
        .flat_map(|(link, order)| {
            first
                .get(link)
                .cloned()
                .into_iter()
                .flatten()
                .map(|row| (row, order.clone()))
        })
        .collect();
    let states = customers::states(plan, &keys, &also)?;
    Ok(customers::refuse_archived(&keys, &states))
}
