//! The triggers on the user's tables: made by the extension, light, and unable to fail the user's statement.

use std::cell::RefCell;
use std::rc::Rc;

use super::flag;
use super::guard;
use super::plan::{Plan, Table};
use super::rekey;
use super::touched;
use super::walk::{self, key_text};
use crate::domain::policy::WhenRetrieved;
use crate::pg::catalog;
use crate::pg::error::{Error, Result};
use crate::pg::ident::{Ident, Relation};
use crate::pg::identity::{self, Identity, act_as, as_extension};
use crate::pg::invalidation;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::{Event, TriggerCall, engine_is_writing, is_engine_write};

/// A kind of trigger: its suffix, what stands around its table in CREATE TRIGGER, and its function.
struct Kind {
    suffix: &'static str,
    when: &'static str,
    after: &'static str,
    function: &'static str,
    scope: Scope,
}

/// Which tables have a trigger.
#[derive(PartialEq, Eq)]
enum Scope {
    /// Every table and each of its partitions: a parent's statement triggers do not fire for what is inserted into a
    /// partition.
    Every,
    /// The orders table and each of its partitions.
    Orders,
    /// Every table that holds rows, for what logical replication applies. Not a partitioned one: its row triggers are
    /// given to each new partition in the name of whoever makes that, who may not use our functions.
    Replica,
    /// Likewise, where the policy ignores writes to retrieved rows instead of refusing them.
    Ignoring,
}

const KINDS: &[Kind] = &[
    Kind {
        suffix: "insert",
        when: "AFTER INSERT",
        after: "REFERENCING NEW TABLE AS amazon_pii_new FOR EACH STATEMENT",
        function: "on_change",
        scope: Scope::Every,
    },
    Kind {
        suffix: "update",
        when: "AFTER UPDATE",
        after: "REFERENCING OLD TABLE AS amazon_pii_old NEW TABLE AS amazon_pii_new FOR EACH STATEMENT",
        function: "on_change",
        scope: Scope::Every,
    },
    Kind {
        suffix: "delete",
        when: "AFTER DELETE",
        after: "REFERENCING OLD TABLE AS amazon_pii_old FOR EACH STATEMENT",
        function: "on_change",
        scope: Scope::Orders,
    },
    Kind {
        suffix: "truncate",
        when: "AFTER TRUNCATE",
        after: "FOR EACH STATEMENT",
        function: "on_change",
        scope: Scope::Orders,
    },
    Kind {
        suffix: "apply",
        when: "AFTER INSERT OR UPDATE",
        after: "FOR EACH ROW",
        function: "on_apply",
        scope: Scope::Replica,
    },
    Kind {
        suffix: "ignore",
        when: "BEFORE UPDATE",
        after: "FOR EACH ROW",
        function: "on_ignore",
        scope: Scope::Ignoring,
    },
];

impl Kind {
    /// Whether a table of the policy, or a partition of one, is to have it.
    fn belongs(&self, plan: &Plan, table: usize, holds_rows: bool) -> bool {
        match self.scope {
            Scope::Every => true,
            Scope::Orders => table == 0,
            Scope::Replica => holds_rows,
            Scope::Ignoring => {
                holds_rows
                    && !plan.tables[table].cells.is_empty()
                    && matches!(plan.document.when_retrieved, WhenRetrieved::Ignore)
            }
        }
    }
}

fn name(policy: &str, suffix: &str) -> Ident {
    Ident::new(format!("amazon_pii_{policy}_{suffix}"))
}

/// The trigger's arguments: the policy and the first entry of the table.
fn arguments(plan: &Plan, table: usize) -> String {
    let alias = plan
        .entries
        .iter()
        .find(|e| e.table == table)
        .map_or("", |e| e.alias.as_str());
    let quoted = |s: &str| format!("'{}'", s.replace('\'', "''"));
    format!("{}, {}", quoted(&plan.policy), quoted(alias))
}

/// Creates the triggers that are missing, on the policy's tables and on each of their partitions: a parent's
/// statement triggers do not fire for what is inserted into a partition.
///
/// # Errors
/// Errors of the server, for example a lock that could not be had in time.
pub fn ensure(plan: &Plan) -> Result<()> {
    as_extension(|| {
        for (index, table) in plan.tables.iter().enumerate() {
            let arguments = arguments(plan, index);
            for relation in catalog::with_partitions(table.relation.oid)? {
                let known = existing(&relation, &plan.policy)?;
                let holds_rows = catalog::holds_rows(relation.oid);
                for kind in KINDS.iter().filter(|k| k.belongs(plan, index, holds_rows)) {
                    let name = name(&plan.policy, kind.suffix);
                    if known.contains(&name) {
                        continue;
                    }
                    create(&format!(
                        "CREATE TRIGGER {name} {} ON {relation} {} EXECUTE FUNCTION amazon_pii.{}({arguments})",
                        kind.when, kind.after, kind.function
                    ))?;
                    if kind.scope == Scope::Replica {
                        create(&format!("ALTER TABLE {relation} ENABLE REPLICA TRIGGER {name}"))?;
                    }
                }
            }
        }
        Ok(())
    })
}

fn create(statement: &str) -> Result<()> {
    sql::execute(statement, &[]).map(|_| ())
}

fn existing(relation: &Relation, policy: &str) -> Result<Vec<Ident>> {
    let rows = sql::read(
        "SELECT tgname FROM pg_catalog.pg_trigger WHERE tgrelid = $1 AND pg_catalog.starts_with(tgname::text, $2)",
        &[
            Arg::Oid(relation.oid),
            Arg::Text(Some(&format!("amazon_pii_{policy}_"))),
        ],
    )?;
    rows.iter().map(|r| Ok(Ident::new(r.str(0)?))).collect()
}

/// Drops a policy's triggers from every table that has them.
///
/// # Errors
/// Errors of the server.
pub fn drop_all(policy: &str) -> Result<()> {
    as_extension(|| {
        let names: Vec<String> = KINDS
            .iter()
            .map(|kind| name(policy, kind.suffix).bare().to_owned())
            .collect();
        let rows = sql::read(
            "SELECT t.tgname, n.nspname, c.relname FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid \
             JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE t.tgname::text = ANY ($1) AND t.tgparentid = 0 AND NOT t.tgisinternal",
            &[Arg::texts(&names)],
        )?;
        for row in &rows {
            let (trigger, schema, table) = (
                Ident::new(row.str(0)?),
                Ident::new(row.str(1)?),
                Ident::new(row.str(2)?),
            );
            create(&format!("DROP TRIGGER IF EXISTS {trigger} ON {schema}.{table}"))?;
        }
        Ok(())
    })
}

thread_local! {
    /// Plans of this session's triggers, thrown away when a table or policy of theirs changes.
    static PLANS: RefCell<Vec<(u64, Rc<Plan>)>> = const { RefCell::new(Vec::new()) };
}

/// The plan of a policy, from the session's cache if nothing has changed.
pub fn cached(policy: &str) -> Result<Rc<Plan>> {
    let generation = invalidation::generation();
    let known = PLANS.with_borrow(|plans| {
        plans
            .iter()
            .find(|(g, p)| *g == generation && p.policy == policy)
            .map(|(_, p)| Rc::clone(p))
    });
    if let Some(plan) = known {
        return Ok(plan);
    }
    // Read before loading: what changes meanwhile makes the plan old at once.
    invalidation::watch(std::iter::empty())?;
    let generation = invalidation::generation();
    let plan = Rc::new(Plan::load(policy)?);
    invalidation::watch(plan.tables.iter().map(|t| t.relation.oid))?;
    PLANS.with_borrow_mut(|plans| {
        plans.retain(|(g, p)| *g == generation && p.policy != policy);
        plans.push((generation, Rc::clone(&plan)));
    });
    Ok(plan)
}

/// What a statement of the user's did to a table of a policy. Never fails that statement, the guard of retrieved rows
/// and a cancel aside.
///
/// # Errors
/// Only those two.
pub fn changed(call: &TriggerCall) -> Result<()> {
    if is_engine_write(call.relation) {
        return Ok(());
    }
    let [policy, alias] = call.args.as_slice() else {
        return Err(Error::internal(
            "a trigger of amazon_pii has other arguments than it was made with",
        ));
    };
    // The user's statement waits for a row of ours for a moment only.
    let _impatient = identity::impatient();
    let outcome = subtransaction(|| {
        let plan = cached(policy)?;
        let entry = plan
            .entries
            .iter()
            .find(|e| e.alias == *alias)
            .ok_or_else(|| Error::undefined(format!("policy \"{policy}\" has no entry \"{alias}\"")))?;
        let table = entry.table;
        if !speaks_for(&plan.tables[table], call)? {
            return Ok(None);
        }
        let refused = if call.event == Event::Update && !engine_is_writing() {
            guard::refusal(&plan, &plan.tables[table], call)?
        } else {
            None
        };
        if refused.is_none() {
            note(&plan, table, call)?;
        }
        Ok(refused)
    });
    match outcome {
        Ok(None) => Ok(()),
        Ok(Some(refusal)) => Err(refusal),
        Err(e) if e.is_cancel() => Err(e),
        Err(e) => {
            remember(policy, alias, call, &e);
            Ok(())
        }
    }
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
    if call.event == Event::Update {
        rekey::changed(plan, table, call)?;
    }
    if table == 0 {
        match call.event {
            Event::Insert | Event::Update => {
                let facts = flag::in_transition(plan, call)?;
                flag::upsert(plan, &facts, "import", true)?;
                if call.event == Event::Update {
                    // One that is tracked stays so, whatever an import calls it now.
                    let keys = transition_keys(plan, plan.orders(), call, "amazon_pii_new AS new_or_old", "true")?;
                    flag::look_again(plan, &keys)?;
                }
            }
            Event::Delete => deleted(plan, call)?,
            Event::Truncate => truncated(plan)?,
        }
    }
    if matches!(call.event, Event::Insert | Event::Update) {
        for (index, entry) in plan
            .entries
            .iter()
            .enumerate()
            .filter(|(_, e)| e.table == table && e.parent.is_some())
        {
            let links = walk::select_all(&entry.on_child);
            let filter = entry.filter.as_ref().map(|f| format!(" WHERE {f}")).unwrap_or_default();
            // A row that moved to another order may have set the clock of the one that it left.
            let rows = if call.event == Event::Update && plan.anchored_by(index) {
                "(TABLE amazon_pii_new UNION ALL TABLE amazon_pii_old)"
            } else {
                "amazon_pii_new"
            };
            let query = format!(
                "SELECT DISTINCT {} FROM {rows} AS {}{filter}",
                links.join(", "),
                plan.tables[table].relation.name
            );
            let owner = Identity::Owner(plan.tables[table].owner);
            let starts = act_as(owner, &plan.search_path, &[], || sql::in_trigger(call, &query, &[]))?
                .iter()
                .map(|r| Ok((0, r.texts(0..links.len())?)))
                .collect::<Result<Vec<_>>>()?;
            flag::linked_changed(plan, &touched::orders_above(plan, index, starts)?)?;
        }
    }
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

/// Orders that were deleted; one whose records are elsewhere and not done goes on until they are.
fn deleted(plan: &Plan, call: &TriggerCall) -> Result<()> {
    let keys = transition_keys(plan, plan.orders(), call, "amazon_pii_old AS new_or_old", "true")?;
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.order_state o SET status = 'gone', next_due_at = NULL WHERE o.policy = $1 AND o.order_key = ANY ($2) \
                AND o.status <> 'gone' AND NOT EXISTS (SELECT FROM amazon_pii.record_state r WHERE r.policy = o.policy AND r.order_key = o.order_key \
                AND r.status IN ('archived', 'waiting', 'retrieved') AND r.entry <> '')",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&keys)],
        )
    })?;
    Ok(())
}

fn truncated(plan: &Plan) -> Result<()> {
    as_extension(|| {
        // A single partition may have been truncated: the next sweep says which orders are left.
        sql::execute(
            "UPDATE amazon_pii.order_state o SET status = 'gone', next_due_at = NULL WHERE o.policy = $1 AND o.status <> 'gone' \
                AND NOT EXISTS (SELECT FROM amazon_pii.record_state r WHERE r.policy = o.policy AND r.order_key = o.order_key \
                AND r.status IN ('archived', 'waiting', 'retrieved') AND r.entry <> '')",
            &[Arg::Text(Some(&plan.policy))],
        )?;
        sql::execute(
            "UPDATE amazon_pii.policy SET swept_at = NULL, sweep_started_at = NULL, sweep_after = NULL WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    Ok(())
}

/// When flagging fails the statement goes through: its rows are noted by their keys, and the next cycle has them. Only
/// rows of our own are inserted, so that nobody waits for the user's transaction.
fn remember(policy: &str, alias: &str, call: &TriggerCall, error: &Error) {
    if subtransaction(|| note_keys(policy, alias, call, error)).is_ok() {
        return;
    }
    // Not even the keys can be had: the next cycle looks at every order.
    let noted = subtransaction(|| {
        as_extension(|| {
            sql::execute(
                "INSERT INTO amazon_pii.touched (policy, entry, row_key, error) VALUES ($1, $2, NULL, $3)",
                &[
                    Arg::Text(Some(policy)),
                    Arg::Text(Some(alias)),
                    Arg::Text(Some(&error.stored())),
                ],
            )
        })
    });
    if noted.is_err() {
        pgrx::warning!(
            "amazon_pii could not note that flagging failed for policy \"{policy}\"; the daily sweep finds the orders"
        );
    }
}

/// Notes the statement's rows; orders are flagged as failed where it was not just a lock that they have to wait for.
fn note_keys(policy: &str, alias: &str, call: &TriggerCall, error: &Error) -> Result<()> {
    let from = match call.event {
        Event::Insert | Event::Update => "amazon_pii_new AS new_or_old",
        Event::Delete => "amazon_pii_old AS new_or_old",
        Event::Truncate => return Err(error.clone()),
    };
    let plan = cached(policy)?;
    let entry = plan.entries.iter().find(|e| e.alias == *alias);
    let table = &plan.tables[entry.ok_or_else(|| error.clone())?.table];
    let keys = transition_keys(&plan, table, call, from, "true")?;
    as_extension(|| {
        if alias.is_empty() && !error.is_lock() && call.event != Event::Delete {
            // The next cycle evaluates them again; those that are no Amazon orders are dropped by then.
            sql::execute(
                "INSERT INTO amazon_pii.order_state (policy, order_key, status, flagged_by, last_error) \
                 SELECT $1, k, 'failed', 'failed', $3 FROM pg_catalog.unnest($2) AS k ON CONFLICT DO NOTHING",
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
    let [policy, alias] = call.args.as_slice() else {
        return Ok(());
    };
    let outcome = subtransaction(|| {
        let plan = cached(policy)?;
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

thread_local! {
    /// Our own CREATE TRIGGER statements are no news.
    static IN_DDL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// A DDL command ended: new partitions of a policy's tables get their triggers. Never fails that command.
///
/// # Errors
/// A cancel.
pub fn structure_changed() -> Result<()> {
    if IN_DDL.replace(true) {
        return Ok(());
    }
    let outcome = subtransaction(|| {
        let policies = as_extension(|| {
            sql::read(
                "SELECT DISTINCT t.policy FROM pg_catalog.pg_event_trigger_ddl_commands() c JOIN amazon_pii.policy_table t \
                 ON t.relation::oid IN (SELECT a.relid FROM pg_catalog.pg_partition_ancestors(c.objid) a) \
                 WHERE c.classid = 'pg_catalog.pg_class'::regclass",
                &[],
            )
        })?;
        for row in &policies {
            ensure(&Plan::load(row.str(0)?)?)?;
        }
        Ok(())
    });
    IN_DDL.set(false);
    match outcome {
        Err(e) if e.is_cancel() => Err(e),
        Err(_) => {
            pgrx::warning!("amazon_pii could not look after new partitions; the next cycle does");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}
