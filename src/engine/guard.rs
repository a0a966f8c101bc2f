//! PII of a retrieved order is read-only for everyone but the extension: refused, or, where the policy says so, ignored.

use pgrx::pg_sys;

use super::plan::{Plan, Table};
use super::triggers::{call_key, speaks_for, transition_keys};
use super::walk::key_text;
use crate::pg::catalog::{self, Compare};
use crate::pg::error::{Error, Result};
use crate::pg::ident;
use crate::pg::prepared;
use crate::pg::sql::Arg;
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::{Instead, TriggerCall, is_engine_write};

/// Whether any row of a table is retrieved now.
fn any_retrieved(table: &str) -> Result<bool> {
    let rows = prepared::rows(
        "SELECT true FROM amazon_pii.record_state WHERE status = 'retrieved' AND table_name = $1 LIMIT 1",
        &[Arg::Text(Some(table))],
    )?;
    Ok(!rows.is_empty())
}

/// Whether some of these rows are retrieved now.
fn is_retrieved(table: &str, keys: &[String]) -> Result<bool> {
    let rows = prepared::rows(
        "SELECT true FROM amazon_pii.record_state WHERE status = 'retrieved' AND table_name = $1 AND record_key = ANY ($2) LIMIT 1",
        &[Arg::Text(Some(table)), Arg::texts(keys)],
    )?;
    Ok(!rows.is_empty())
}

/// Why an UPDATE is refused, if it changed PII of a retrieved row.
///
/// # Errors
/// Errors of the server.
pub fn refusal(plan: &Plan, table: &Table, call: &TriggerCall) -> Result<Option<Error>> {
    let shown = table.archived_as.clone();
    if table.cells.is_empty() || !any_retrieved(&shown)? {
        return Ok(None);
    }
    let same_key: Vec<String> = table
        .key
        .iter()
        .map(|(k, oid)| {
            let equal = catalog::operator(Compare::Equal, *oid, *oid);
            format!("new_or_old.{k} {equal} amazon_pii_new.{k}")
        })
        .collect();
    let differs: Vec<String> = table
        .cells
        .iter()
        .map(|c| {
            let (old, new) = (format!("new_or_old.{}", c.name), format!("amazon_pii_new.{}", c.name));
            format!("{} IS DISTINCT FROM {}", ident::out(old), ident::out(new))
        })
        .collect();
    let keys = transition_keys(
        plan,
        table,
        call,
        &format!(
            "amazon_pii_old AS new_or_old LEFT JOIN amazon_pii_new ON {}",
            same_key.join(" AND ")
        ),
        &differs.join(" OR "),
    )?;
    Ok((!keys.is_empty() && is_retrieved(&shown, &keys)?).then(|| Error::read_only(&shown)))
}

/// The row that an UPDATE shall write: its own, with the PII of a retrieved row as it was.
///
/// # Errors
/// A cancel; otherwise the statement goes through, and the refusing guard has the last word.
pub fn ignore(call: &TriggerCall) -> Result<pg_sys::Datum> {
    let args = call.args();
    let [policy, alias] = args.as_slice() else {
        return Ok(call.new_row());
    };
    if is_engine_write(call.relation) {
        return Ok(call.new_row());
    }
    let kept = subtransaction(|| {
        let plan = Plan::cached(policy)?;
        let Some(entry) = plan.entries.iter().find(|e| e.alias == *alias) else {
            return Ok(None);
        };
        let table = &plan.tables[entry.table];
        if !speaks_for(table, call)? {
            return Ok(None);
        }
        let key = call_key(&plan, table, call)?;
        if !is_retrieved(&table.archived_as, &[key_text(&key)?])? {
            return Ok(None);
        }
        Ok(Some(
            table.cells.iter().map(|c| c.name.bare().to_owned()).collect::<Vec<_>>(),
        ))
    });
    match kept {
        Ok(Some(columns)) => {
            let old: Vec<(&str, Instead)> = columns.iter().map(|c| (c.as_str(), Instead::Old)).collect();
            call.with_values(&old)
        }
        Ok(None) => Ok(call.new_row()),
        Err(e) if e.is_cancel() => Err(e),
        Err(_) => Ok(call.new_row()),
    }
}
