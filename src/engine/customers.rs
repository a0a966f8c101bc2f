//! Customers some of whose orders are archived: they are no duplicates of anybody, and are not merged.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

use super::alive::{self, other_policies};
use super::plan::{Customer, Plan, Table};
use super::walk::{FIRST, Hop, Values, by_key, hop, key_parts, key_text};
use crate::domain::policy::Policy;
use crate::pg::error::{Error, Result};
use crate::pg::ident;
use crate::pg::identity::{Identity, OWN_PATH, act_as, as_extension, on_keys, require_role};
use crate::pg::sql::{self, Arg};

/// Who may ask.
const ROLES: &[&str] = &["amazon_pii_admin", "amazon_pii_operator"];

/// What may have become of a customer's personal data, the later the more telling.
const STATES: [&str; 4] = ["waiting", "archived", "redacted", "retrieved"];

/// How an order has a customer: its key, and the position of the customer in a list.
pub type OrderOf = (usize, String);

/// The customer of a policy, or why it has none.
fn customer(plan: &Plan) -> Result<(&Customer, &Table)> {
    let customer = plan.customer.as_ref().ok_or_else(|| {
        Error::wrong_state(format!(
            "policy \"{}\" does not say where its customers are",
            plan.policy
        ))
        .hint("Mark the entry that orders point at with \"role\": \"customer\" and apply the policy again.")
    })?;
    Ok((customer, &plan.tables[plan.entries[customer.entry].table]))
}

/// What the personal data of each of these customers is, if an order has archived it. `also` are orders that had one of
/// them a moment ago.
///
/// # Errors
/// Errors of the server or of the owners' expressions.
pub fn states(plan: &Plan, keys: &[Values], also: &[OrderOf]) -> Result<Vec<Option<&'static str>>> {
    let (_, table) = customer(plan)?;
    let mut out = vec![None; keys.len()];
    let texts = keys.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    let others = other_policies(plan)?;
    for user in std::iter::once(plan).chain(others.iter().map(Rc::as_ref)) {
        let same = |t: &Table| t.relation.oid == table.relation.oid;
        let Some(theirs) = user.tables.iter().position(same) else {
            continue;
        };
        let (users, _) = alive::users(user, theirs, keys, None)?;
        let mut of: Vec<OrderOf> = users.into_iter().map(|(row, order, _)| (row, order)).collect();
        if std::ptr::eq(user, plan) {
            of.extend_from_slice(also);
        }
        let archived_as = &user.tables[theirs].archived_as;
        let rows = on_keys(|| {
            sql::read(
                "SELECT r.record_key, r.status FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (o, k) \
                 JOIN amazon_pii.records AS r ON r.policy = $1 AND r.order_key = n.o AND r.table_name = $4 AND r.record_key = n.k \
                 UNION ALL SELECT s.record_key, s.status FROM amazon_pii.record_state AS s \
                 WHERE s.table_name = $4 AND s.record_key = ANY ($5)",
                &[
                    Arg::Text(Some(&user.policy)),
                    Arg::Texts(of.iter().map(|(_, order)| Some(order.as_str())).collect()),
                    Arg::Texts(of.iter().map(|(row, _)| Some(texts[*row].as_str())).collect()),
                    Arg::Text(Some(archived_as)),
                    Arg::texts(&texts),
                ],
            )
        })?;
        for row in &rows {
            let (key, status) = (row.str(0)?, row.str(1)?);
            let state = STATES.iter().position(|s| *s == status);
            for (i, _) in texts.iter().enumerate().filter(|(_, t)| *t == key) {
                out[i] = out[i].max(state);
            }
        }
    }
    Ok(out.into_iter().map(|at| at.map(|i| STATES[i])).collect())
}

/// Two customers that look the same.
pub struct Duplicate {
    /// Counts the groups, from 1.
    pub group: i64,
    pub key: String,
}

/// Customers that are the same by `duplicate_by`, those left out some of whose orders are archived.
///
/// # Errors
/// The policy does not exist, or does not say what is compared; errors of the server or of the owner's expressions.
pub fn find_duplicates(policy: &str) -> Result<Vec<Duplicate>> {
    require_role(ROLES, "look for duplicates among customers")?;
    let plan = Plan::current(policy)?;
    let (customer, table) = customer(&plan)?;
    if customer.duplicate_by.is_empty() {
        return Err(Error::wrong_state(format!(
            "policy \"{policy}\" does not say which customers are duplicates"
        ))
        .hint("Give the customer's entry a \"duplicate_by\": columns that are the same in duplicates."));
    }
    let found = alike(&plan, customer, table)?;
    let keys: Vec<&str> = found.iter().map(|(_, key)| key.as_str()).collect();
    let archived = as_extension(|| {
        // Whichever policy it is: the name in the archive is the table's.
        let rows = sql::read(
            "SELECT DISTINCT r.record_key FROM amazon_pii.records AS r WHERE r.table_name = $1 AND r.record_key = ANY ($2) \
             AND r.status <> 'gone'",
            &[Arg::Text(Some(&table.archived_as)), Arg::texts(&keys)],
        )?;
        rows.iter().map(|r| r.string(0)).collect::<Result<HashSet<_>>>()
    })?;
    let mut groups: BTreeMap<i64, Vec<String>> = BTreeMap::new();
    for (group, key) in found.into_iter().filter(|(_, key)| !archived.contains(key)) {
        groups.entry(group).or_default().push(key);
    }
    let groups = groups.into_values().filter(|keys| keys.len() > 1);
    Ok(groups
        .zip(1..)
        .flat_map(|(keys, group)| keys.into_iter().map(move |key| Duplicate { group, key }))
        .collect())
}

/// The rows of the customers table that are like another: (group, key). A text is compared without its blanks, in lower case.
fn alike(plan: &Plan, customer: &Customer, table: &Table) -> Result<Vec<(i64, String)>> {
    let bare = |e: String| {
        format!(
            "(pg_catalog.lower(pg_catalog.regexp_replace({e} COLLATE pg_catalog.\"default\", '\\s+', '', 'g')) COLLATE pg_catalog.\"C\")"
        )
    };
    let by: Vec<String> = customer
        .duplicate_by
        .iter()
        .map(|e| bare(format!("COALESCE({}, '')", ident::out(e))))
        .collect();
    let by_list = by.join(", ");
    let keys = table.key_list().join(", ");
    // A mark says nothing of whose it is: all of them would be one large group.
    let no_mark: Vec<String> = by
        .iter()
        .map(|e| format!("{e} OPERATOR(pg_catalog.<>) ALL ($1)"))
        .collect();
    let filter = plan.entries[customer.entry].filter.as_ref();
    let filter = filter.map(|f| format!(" AND {f}")).unwrap_or_default();
    let query = format!(
        "SELECT \"amazon_pii.n\", {keys} FROM (SELECT {keys}, pg_catalog.dense_rank() OVER (ORDER BY {by_list}) AS \"amazon_pii.n\", \
            pg_catalog.count(*) OVER (PARTITION BY {by_list}) AS \"amazon_pii.c\" FROM {} AS {} \
            WHERE pg_catalog.concat({by_list}) OPERATOR(pg_catalog.<>) '' AND {}{filter}) AS \"amazon_pii.all\" \
         WHERE \"amazon_pii.c\" OPERATOR(pg_catalog.>) 1 ORDER BY \"amazon_pii.n\", {keys}",
        table.relation,
        table.relation.name,
        no_mark.join(" AND "),
    );
    let marks: Vec<String> = marks(&plan.document)
        .map(|m| m.split_whitespace().collect::<String>().to_lowercase())
        .collect();
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::read(&query, &[Arg::texts(&marks)])
    })
    .map_err(|e| e.at(&table.relation.shown()))?;
    rows.iter()
        .map(|r| Ok((r.int(0)?, key_text(&r.texts(1..1 + table.key.len())?)?)))
        .collect()
}

fn marks(policy: &Policy) -> impl Iterator<Item = &str> {
    std::iter::once(policy.placeholder.as_str()).chain(policy.also_redacted.iter().map(String::as_str))
}

/// Refuses two customers of which an order of one has archived it.
///
/// # Errors
/// 55000 for that; one does not exist, or both are the same.
pub fn assert_mergeable(policy: &str, a: &str, b: &str) -> Result<()> {
    require_role(ROLES, "ask whether customers can be merged")?;
    let plan = Plan::current(policy)?;
    let (_, table) = customer(&plan)?;
    let keys = [given_key(table, a)?, given_key(table, b)?];
    if keys[0] == keys[1] {
        return Err(Error::invalid("both customers are the same").hint("Give the keys of two customers."));
    }
    let there: HashSet<usize> = by_key(&plan, table, &keys, &["true".to_owned()])?
        .iter()
        .map(|f| f.input)
        .collect();
    for (i, key) in keys.iter().enumerate() {
        if !there.contains(&i) {
            return Err(
                Error::no_row(format!("there is no customer {}", key_text(key)?)).hint(format!(
                    "A key is written as amazon_pii.find_duplicates() gives it, a JSON array; {} has it.",
                    table.relation.shown()
                )),
            );
        }
    }
    refuse_archived(&keys, &states(&plan, &keys, &[])?).map_or(Ok(()), Err)
}

/// Why some customers cannot be merged.
pub fn refuse_archived(keys: &[Values], states: &[Option<&'static str>]) -> Option<Error> {
    let (key, state) = keys.iter().zip(states).find_map(|(k, s)| Some((k, (*s)?)))?;
    // One that waits for another order is archived with those that are done.
    let state = if state == "waiting" { "archived" } else { state };
    Some(Error::not_mergeable(&key_text(key).unwrap_or_default(), state))
}

/// A key as it was given: a JSON array, or the value alone where the key is one column.
fn given_key(table: &Table, text: &str) -> Result<Values> {
    let wrong = || {
        let columns: Vec<&str> = table.key.iter().map(|(name, _)| name.bare()).collect();
        Error::invalid("this is no key of a customer").hint(format!(
            "Write it as a JSON array of texts, one for each of: {}.",
            columns.join(", ")
        ))
    };
    let key = match key_parts(text) {
        Ok(parts) => parts,
        Err(_) if table.key.len() == 1 => vec![Some(text.to_owned())],
        Err(_) => return Err(wrong()),
    };
    if key.len() != table.key.len() || key.iter().any(Option::is_none) {
        return Err(wrong());
    }
    // As the type writes it, or no stored key would be found.
    let parameters: Vec<String> = (1..=key.len()).map(|i| format!("${i}")).collect();
    let types = table.key.iter().map(|(_, oid)| *oid);
    let args: Vec<Arg<'_>> = types
        .zip(&key)
        .map(|(oid, part)| Arg::Typed(oid, part.as_deref()))
        .collect();
    let rows = act_as(Identity::Owner(table.owner), OWN_PATH, &[], || {
        sql::read(&format!("SELECT {}", parameters.join(", ")), &args)
    })
    .map_err(|e| if e.is_cancel() { e } else { wrong() })?;
    rows.first()
        .ok_or_else(|| Error::internal("no row"))?
        .texts(0..key.len())
}

/// The customers that values of the orders' side of the link lead to: for each of them the keys of its rows.
///
/// # Errors
/// As [`by_key`].
pub fn behind(plan: &Plan, customer: &Customer, links: &[Values]) -> Result<HashMap<usize, Vec<Values>>> {
    let entry = &plan.entries[customer.entry];
    let select = plan.tables[entry.table].key_list();
    let mut out: HashMap<usize, Vec<Values>> = HashMap::new();
    for found in hop(plan, &Hop::into_entry(plan, entry, &select), links)? {
        let key = found.row.texts(FIRST..FIRST + select.len())?;
        out.entry(found.input).or_default().push(key);
    }
    Ok(out)
}
