//! What triggers see of orphans: rows that the shop writes although no order leads to them any more.

use super::{NEEDING, tops};
use crate::engine::plan::Plan;
use crate::engine::walk::{self, FIRST, Hop, Values, hop, key_parts, key_text, own_key, select_all};
use crate::pg::error::Result;
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg};

/// Orders of a written row that are told at once; of more, the newest.
const TOLD: i64 = 50;

/// Of rows of an entry that were written, given by their links, the orders that were imported with them. What these rows
/// hold now has come back. What hangs on such a row is listed by the next cycle.
///
/// # Errors
/// Errors of the server.
pub fn orders_of(plan: &Plan, entry: usize, links: &[(usize, Values)]) -> Result<Vec<Values>> {
    if plan.generic.is_empty() || links.is_empty() {
        return Ok(Vec::new());
    }
    note_below(plan, entry, links)?;
    let table = &plan.tables[plan.entries[entry].table];
    if own_key(table, &plan.entries[entry]).is_none_or(|p| p.len() != table.key.len()) {
        return Ok(Vec::new());
    }
    let keys = links.iter().map(|(_, k)| key_text(k)).collect::<Result<Vec<_>>>()?;
    let found = on_keys(|| {
        sql::write(
            "WITH found AS MATERIALIZED (SELECT DISTINCT r.policy, r.order_key, r.table_name, r.record_key FROM pg_catalog.unnest($3) AS n (k) \
                CROSS JOIN LATERAL (SELECT * FROM amazon_pii.orphan AS r WHERE r.policy = $1 AND r.table_name = $2 AND r.record_key = n.k \
                    AND r.apart IS DISTINCT FROM 'done' ORDER BY r.orphan_id DESC LIMIT $4) AS r), \
             back AS (INSERT INTO amazon_pii.record_state (policy, order_key, table_name, record_key, status) \
                SELECT f.policy, f.order_key, f.table_name, f.record_key, 'archived' FROM found AS f JOIN amazon_pii.order_state AS o \
                    ON o.policy = f.policy AND o.order_key = f.order_key AND o.redacted_version IS NOT NULL ON CONFLICT DO NOTHING) \
             SELECT order_key FROM found",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&table.archived_as)),
                Arg::texts(&keys),
                Arg::Int(TOLD),
            ],
        )
    })?;
    found.iter().map(|r| key_parts(r.str(0)?)).collect()
}

/// Notes the newest order that was imported with a customer when something that hangs on this customer is written, or the customer
/// itself after the order has let go of it. Rows of our own are inserted, and none is changed, so that nobody waits for the shop's
/// transaction.
fn note_below(plan: &Plan, entry: usize, links: &[(usize, Values)]) -> Result<()> {
    let tops = tops(plan);
    let Some(to) = plan.path(entry).into_iter().find(|e| tops.contains(e)) else {
        return Ok(());
    };
    let is_it = entry == to;
    let top = &plan.entries[to];
    let table = &plan.tables[top.table];
    let mut select = table.key_list();
    select.extend(select_all(&top.on_child));
    let rows = if is_it {
        let inputs: Vec<Values> = links.iter().map(|(_, link)| link.clone()).collect();
        let own = Hop {
            types: &top.on_child_types,
            ..Hop::into_entry(plan, top, &select)
        };
        hop(plan, &own, &inputs)?
    } else {
        walk::up_to(plan, (entry, to), links.to_vec(), &select)?
    };
    let (mut keys, mut ways) = (Vec::new(), Vec::new());
    for found in rows {
        let key = FIRST + table.key.len();
        keys.push(key_text(&found.row.texts(FIRST..key)?)?);
        ways.push(key_text(&found.row.texts(key..FIRST + select.len())?)?);
    }
    if keys.is_empty() {
        return Ok(());
    }
    let newest = |which: &str| {
        // ident-ok: made of constants.
        format!(
            "(SELECT r.orphan_id, r.order_key, r.apart FROM amazon_pii.orphan AS r WHERE r.policy = $1 AND r.table_name = $2 \
                AND r.record_key = n.k AND {which} ORDER BY r.orphan_id DESC LIMIT 1)"
        )
    };
    on_keys(|| {
        sql::execute(
            // ident-ok: made of constants.
            &format!(
                "INSERT INTO amazon_pii.orphan (policy, order_key, link) \
                 SELECT DISTINCT $1, r.order_key, n.l FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4)) AS n (k, l) \
                 CROSS JOIN LATERAL (SELECT q.order_key, q.apart FROM ({} UNION ALL {}) AS q ORDER BY q.orphan_id DESC LIMIT 1) AS r \
                 WHERE (NOT $5 OR r.apart = 'done') AND NOT EXISTS (SELECT FROM amazon_pii.orphan AS w WHERE w.policy = $1 \
                    AND w.order_key = r.order_key AND w.record_key IS NULL AND w.link = n.l)",
                newest(NEEDING),
                newest("r.apart = 'done'")
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&table.archived_as)),
                Arg::texts(&keys),
                Arg::texts(&ways),
                Arg::Bool(is_it),
            ],
        )
    })?;
    Ok(())
}
