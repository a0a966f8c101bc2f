//! The triggers on the user's tables: made by the extension, light, and unable to fail the user's statement.

use std::cell::Cell;

use super::access;
use super::again;
use super::customer_guard;
use super::flag;
use super::gone;
use super::guard;
use super::news::{self, Tell};
use super::plan::{Plan, Table};
use super::reimport;
use super::rekey;
use super::touched;
use super::walk::{self, Values, key_text};
use super::watched::{self, Left};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{Expr, Ident};
use crate::pg::identity::{self, Identity, act_as, as_extension, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::transition;
use crate::pg::trigger::{Event, TriggerCall, engine_is_writing, is_engine_write};
use crate::pg::xact;

/// Rows of a statement that take no subtransaction to look through.
const FEW: i64 = 1000;

/// The policy and the entry that a trigger was made for.
///
/// # Errors
/// Somebody made the trigger otherwise.
pub fn made_for(call: &TriggerCall) -> Result<[String; 2]> {
    call.args()
        .try_into()
        .map_err(|_| Error::internal("a trigger of amazon_pii has other arguments than it was made with"))
}

/// What a statement of the user's did to a table of a policy. Never fails that statement, the guards that the policy asks
/// for and a cancel aside.
///
/// # Errors
/// Only these.
pub fn changed(call: &TriggerCall) -> Result<()> {
    if is_engine_write(call.relation) {
        return Ok(());
    }
    // The user's statement waits for a row of ours for a moment only.
    let _impatient = identity::impatient();
    // Few rows are in memory, and nothing can go wrong with them: most statements end here.
    let few = call.event == Event::Update && call.updated_rows() <= FEW;
    let looked = if few {
        watched::left_of(call)
    } else {
        Ok(Left::Everything)
    };
    if matches!(looked, Ok(Left::Nothing)) {
        return Ok(());
    }
    let [policy, alias] = &made_for(call)?;
    let mut comes_back = None;
    let outcome = subtransaction(|| {
        let mut left = looked?;
        if call.event == Event::Update && !few {
            left = watched::left_of(call)?;
        }
        let call = match &left {
            Left::Nothing => return Ok(None),
            Left::Call(some) => some,
            Left::Everything => call,
        };
        let plan = Plan::cached(policy)?;
        let table = plan.entry(alias)?.table;
        if !speaks_for(&plan.tables[table], call)? {
            return Ok(None);
        }
        // What the user's triggers write because the engine does is no import.
        let by_user = !engine_is_writing();
        if by_user && call.event == Event::Update {
            let refused = guard::refusal(&plan, &plan.tables[table], call)?;
            if refused.is_some() {
                return Ok(refused);
            }
            let refused = reimport::refusal(&plan, table, call)?;
            if refused.is_some() {
                return Ok(refused);
            }
        }
        if by_user && call.event == Event::Insert && retrieves(&plan, table) {
            comes_back = Some((plan.clone(), table));
        }
        note(&plan, table, call)?;
        if table == 0 && by_user {
            let refused = customer_guard::refusal(&plan, call)?;
            if refused.is_some() {
                return Ok(refused);
            }
        }
        if by_user && call.event == Event::Insert {
            let refused = reimport::inserted(&plan, table, call)?;
            if refused.is_some() {
                return Ok(refused);
            }
        }
        Ok(None)
    });
    match outcome {
        Ok(None) => {}
        Ok(Some(refusal)) => return Err(refusal),
        Err(e) if e.is_cancel() => return Err(e),
        // A lock that was not to be had, say, is no reason to forget a return.
        Err(e) => remember(policy, alias, call, &e),
    }
    match comes_back {
        Some((plan, table)) => access::inserted(&plan, table, call),
        None => Ok(()),
    }
}

/// Whether rows of a table have the order that they belong to retrieved.
fn retrieves(plan: &Plan, table: usize) -> bool {
    plan.entries
        .iter()
        .any(|e| e.table == table && e.retrieve_on_insert.is_some())
}

/// Whether the table that fired is the policy's, or a partition of it: one that was detached kept its triggers, and may
/// be anybody's now.
///
/// # Errors
/// Errors of the server.
pub fn speaks_for(table: &Table, call: &TriggerCall) -> Result<bool> {
    if call.relation == table.relation.oid {
        return Ok(true);
    }
    let rows = as_extension(|| {
        sql::read(
            "SELECT true FROM pg_catalog.pg_partition_ancestors($1) AS a WHERE a.relid = $2",
            &[Arg::Oid(call.relation), Arg::Oid(table.relation.oid)],
        )
    })?;
    Ok(!rows.is_empty())
}

/// Flags orders, and marks those whose records changed.
fn note(plan: &Plan, table: usize, call: &TriggerCall) -> Result<()> {
    if call.event == Event::Update && !call.same_keys {
        rekey::changed(plan, table, call)?;
    }
    if table == 0 {
        match call.event {
            Event::Insert | Event::Update => {
                let facts = flag::in_transition(plan, call)?;
                flag::upsert(plan, &facts, "import", true, Tell::Later)?;
                if call.event == Event::Update {
                    // One that is tracked stays so, whatever an import calls it now.
                    if let Some(key) = plan.number_key() {
                        again::look_again_at_numbers(plan, &transition::integers(call, key.bare())?)?;
                    } else {
                        let keys = transition_keys(plan, plan.orders(), call, "amazon_pii_new AS new_or_old", "true")?;
                        again::look_again(plan, &keys)?;
                    }
                }
            }
            Event::Delete => gone::deleted(plan, call)?,
            Event::Truncate => gone::truncated(plan)?,
        }
    } else if call.event == Event::Truncate {
        // Whose clocks its rows had started cannot be told any more.
        let entry = plan.entries.iter().find(|e| e.table == table);
        note_all(&plan.policy, entry.map_or("", |e| &e.alias), None)?;
    }
    if call.event != Event::Truncate {
        for (index, _) in plan.entries.iter().enumerate().filter(|(i, e)| {
            e.table == table && e.parent.is_some() && (call.event != Event::Delete || plan.anchored_by(*i))
        }) {
            let only_new = call.event == Event::Insert || call.event == Event::Update && !plan.anchored_by(index);
            if let Some(column) = plan.order_column(index).filter(|_| only_new) {
                again::numbered_changed(plan, &transition::integers(call, column.bare())?, Tell::Later)?;
                continue;
            }
            if call.event == Event::Insert && watched::is_referred_to_later(plan, index)? {
                continue;
            }
            // A row that moved to another order may have set the clock of the one that it left.
            let rows = match call.event {
                Event::Delete => "amazon_pii_old",
                Event::Update if plan.anchored_by(index) => "(TABLE amazon_pii_new UNION ALL TABLE amazon_pii_old)",
                _ => "amazon_pii_new",
            };
            let orders = orders_of_rows(plan, index, call, rows, None)?;
            if call.event == Event::Delete {
                clocks_changed(plan, &orders)?;
            } else {
                again::linked_changed(plan, &orders, Tell::Later)?;
            }
        }
    }
    Ok(())
}

/// The keys of the orders that rows of a transition table belong to by entry `index`, of those that also meet `condition`.
///
/// # Errors
/// Errors of the server or of the owner's expressions.
pub fn orders_of_rows(
    plan: &Plan,
    index: usize,
    call: &TriggerCall,
    rows: &str,
    condition: Option<&Expr>,
) -> Result<Vec<Values>> {
    let entry = &plan.entries[index];
    let table = &plan.tables[entry.table];
    let links = walk::select_all(&entry.on_child);
    let conditions: Vec<String> = entry.filter.iter().chain(condition).map(ToString::to_string).collect();
    let filter = if conditions.is_empty() {
        String::new()
    } else {
        format!(" WHERE {}", conditions.join(" AND "))
    };
    let name: &Ident = &table.relation.name;
    let query = format!("SELECT DISTINCT {} FROM {rows} AS {name}{filter}", links.join(", "));
    let starts = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::in_trigger(call, &query, &[])
    })?
    .iter()
    .map(|r| Ok((0, r.texts(0..links.len())?)))
    .collect::<Result<Vec<_>>>()?;
    touched::orders_above(plan, index, starts)
}

/// Orders some of whose rows that start clocks were deleted. Noted only: the next cycle sets their clocks before it does
/// anything else.
fn clocks_changed(plan: &Plan, orders: &[Values]) -> Result<()> {
    if orders.is_empty() {
        return Ok(());
    }
    let keys = orders.iter().map(|k| key_text(k)).collect::<Result<Vec<_>>>()?;
    on_keys(|| {
        sql::execute(
            "INSERT INTO amazon_pii.touched (policy, entry, row_key) SELECT o.policy, '', o.order_key FROM amazon_pii.order_state AS o \
             WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) AND o.archived_at IS NULL AND o.status <> 'gone'",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )
    })?;
    Ok(())
}

/// Keys of the rows in a transition table that meet a condition.
pub fn transition_keys(
    plan: &Plan,
    table: &Table,
    call: &TriggerCall,
    from: &str,
    condition: &str,
) -> Result<Vec<String>> {
    let query = format!(
        "SELECT {} FROM {from} WHERE {condition}",
        key_columns(table, "new_or_old")
    );
    act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::in_trigger(call, &query, &[])
    })?
    .iter()
    .map(|r| key_text(&r.texts(0..table.key.len())?))
    .collect()
}

fn key_columns(table: &Table, alias: &str) -> String {
    table
        .key_list()
        .iter()
        .map(|k| format!("{alias}.{k}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// When flagging fails the statement goes through: its rows are noted by their keys, and the next cycle has them. Only
/// rows of our own are inserted, so that nobody waits for the user's transaction.
fn remember(policy: &str, alias: &str, call: &TriggerCall, error: &Error) {
    if error.is_other_version() {
        tell_of_version(error);
        return;
    }
    if subtransaction(|| note_keys(policy, alias, call, error)).is_ok() {
        return;
    }
    // Not even the keys can be had: the next cycle looks at every order.
    let noted = subtransaction(|| note_all(policy, alias, Some(error)));
    if noted.is_err() {
        pgrx::warning!(
            "amazon_pii could not note that flagging failed for policy \"{policy}\"; the daily sweep finds the orders"
        );
    }
}

/// Rows are flagged by the sweep that follows an update. Logical replication applies them one by one, and is told once.
fn tell_of_version(error: &Error) {
    thread_local! {
        static TOLD: Cell<bool> = const { Cell::new(false) };
    }
    if !TOLD.replace(true) || !xact::is_replica() {
        pgrx::warning!(
            "{}; what is written now is flagged by the sweep that follows an update",
            error.shown()
        );
    }
}

/// The next cycle looks at every order.
fn note_all(policy: &str, alias: &str, error: Option<&Error>) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "INSERT INTO amazon_pii.touched (policy, entry, row_key, error) VALUES ($1, $2, NULL, $3)",
            &[
                Arg::Text(Some(policy)),
                Arg::Text(Some(alias)),
                Arg::Text(error.map(Error::stored).as_deref()),
            ],
        )
    })?;
    Ok(())
}

/// Notes the statement's rows; orders are flagged as failed where it was not just a lock that they have to wait for.
fn note_keys(policy: &str, alias: &str, call: &TriggerCall, error: &Error) -> Result<()> {
    let from = match call.event {
        Event::Insert | Event::Update => "amazon_pii_new AS new_or_old",
        Event::Delete if alias.is_empty() => "amazon_pii_old AS new_or_old",
        // Of rows that are gone the keys lead to no order.
        Event::Delete | Event::Truncate => return Err(error.clone()),
    };
    let plan = Plan::cached(policy)?;
    let entry = plan.entries.iter().find(|e| e.alias == *alias);
    let table = &plan.tables[entry.ok_or_else(|| error.clone())?.table];
    let keys = transition_keys(&plan, table, call, from, "true")?;
    as_extension(|| {
        if alias.is_empty() && !error.is_lock() && call.event != Event::Delete {
            // The next cycle evaluates them again; those that are no Amazon orders are dropped by then.
            sql::execute(
                &[
                    "WITH changed AS (INSERT INTO amazon_pii.order_state (policy, order_key, status, flagged_by, last_error) \
                        SELECT $1, k, 'failed', 'failed', $3 FROM pg_catalog.unnest($2) AS k ON CONFLICT DO NOTHING \
                        RETURNING order_key, 'failed' AS news) ",
                    news::NOTE,
                ]
                .concat(),
                &[
                    Arg::Text(Some(policy)),
                    Arg::texts(&keys),
                    Arg::Text(Some(&error.stored())),
                ],
            )?;
        }
        sql::execute(
            "INSERT INTO amazon_pii.touched (policy, entry, row_key, error) SELECT $1, $2, k, $4 FROM pg_catalog.unnest($3) AS k",
            &[
                Arg::Text(Some(policy)),
                Arg::Text(Some(alias)),
                Arg::texts(&keys),
                Arg::Text((!error.is_lock()).then(|| error.stored()).as_deref()),
            ],
        )
    })?;
    Ok(())
}

/// The key of the row that fired a row trigger, under the pinned settings, whatever the session's are.
///
/// # Errors
/// A key column does not exist any more.
pub fn call_key(plan: &Plan, table: &Table, call: &TriggerCall) -> Result<Vec<Option<String>>> {
    act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        table.key.iter().map(|(name, _)| call.column(name.bare())).collect()
    })
}

/// Logical replication applied a row: its key is noted, the next cycle does the rest.
///
/// # Errors
/// None that reach the apply worker, a cancel aside.
pub fn applied(call: &TriggerCall) -> Result<()> {
    let args = call.args();
    let [policy, alias] = args.as_slice() else {
        return Ok(());
    };
    let outcome = subtransaction(|| {
        let plan = Plan::cached(policy)?;
        let entry = plan.entries.iter().find(|e| e.alias == *alias);
        let table = entry.map_or_else(|| plan.orders(), |e| &plan.tables[e.table]);
        if !speaks_for(table, call)? {
            return Ok(());
        }
        let key = call_key(&plan, table, call)?;
        as_extension(|| {
            sql::execute(
                "INSERT INTO amazon_pii.touched (policy, entry, row_key) VALUES ($1, $2, $3)",
                &[
                    Arg::Text(Some(policy)),
                    Arg::Text(Some(alias)),
                    Arg::Text(Some(&key_text(&key)?)),
                ],
            )
        })?;
        Ok(())
    });
    match outcome {
        Err(e) if e.is_cancel() => Err(e),
        Err(e) => {
            remember(policy, alias, call, &e);
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}
