//! Finding orders by what people know them by.

use std::collections::BTreeMap;

use super::plan::Plan;
use super::touched;
use super::walk::{self, FIRST};
use crate::pg::error::Result;
use crate::pg::identity::{as_extension, require_role};
use crate::pg::sql::{self, Arg};
/// An order that a search found.
pub struct Hit {
    pub policy: String,
    pub order_key: String,
    pub order_number: Option<String>,
    pub status: String,
    pub matched_by: String,
}

/// Finds flagged orders by their own number, or by the number of a linked record (an invoice).
///
/// # Errors
/// Errors of the server.
pub fn find_orders(search: &str) -> Result<Vec<Hit>> {
    require_role(&["amazon_pii_operator", "amazon_pii_admin"], "search orders")?;
    let policies = as_extension(|| sql::read("SELECT policy FROM amazon_pii.policy ORDER BY policy", &[]))?;
    let mut hits = Vec::new();
    for policy in &policies {
        let plan = Plan::current(policy.str(0)?)?;
        let mut matches: BTreeMap<String, String> = BTreeMap::new();
        for (index, entry) in plan.entries.iter().enumerate() {
            let Some(number) = &entry.number else { continue };
            let links = walk::select_all(&entry.on_child);
            let starts = walk::hop(
                &plan,
                &walk::Hop {
                    table: &plan.tables[entry.table],
                    on: &[number.as_text()],
                    own_types: &[pgrx::pg_sys::TEXTOID],
                    types: &[pgrx::pg_sys::TEXTOID],
                    filter: entry.filter.as_ref(),
                    select: &links,
                    limit: None,
                },
                &[vec![Some(search.to_owned())]],
            )?
            .into_iter()
            .map(|f| Ok((0, f.row.texts(FIRST..FIRST + links.len())?)))
            .collect::<Result<Vec<_>>>()?;
            for key in touched::orders_above(&plan, index, starts)? {
                matches
                    .entry(walk::key_text(&key)?)
                    .or_insert_with(|| entry.alias.clone());
            }
        }
        let keys: Vec<&String> = matches.keys().collect();
        let rows = as_extension(|| {
            sql::read(
                "SELECT order_key, order_number, status, order_number = $2 FROM amazon_pii.orders \
                 WHERE policy = $1 AND order_key = ANY ($3) \
                 UNION SELECT order_key, order_number, status, true FROM amazon_pii.orders WHERE policy = $1 AND order_number = $2 \
                 ORDER BY 1",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(search)),
                    Arg::texts(&keys),
                ],
            )
        })?;
        for row in &rows {
            let key = row.string(0)?;
            let by = if row.bool(3)? {
                "order number".to_owned()
            } else {
                matches.get(&key).cloned().unwrap_or_default()
            };
            hits.push(Hit {
                policy: plan.policy.clone(),
                order_number: row.owned(1)?,
                status: row.string(2)?,
                matched_by: by,
                order_key: key,
            });
        }
    }
    Ok(hits)
}
