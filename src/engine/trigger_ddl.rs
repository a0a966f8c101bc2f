//! Making and dropping the triggers on the user's tables.

use super::plan::Plan;
use crate::domain::policy::{OnReimport, WhenRetrieved};
use crate::pg::catalog;
use crate::pg::error::Result;
use crate::pg::ident::{Ident, Relation};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
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
    /// The orders table and those whose rows start clocks, and each of their partitions.
    Clocks,
    /// Every table that holds rows, for what logical replication applies. Not a partitioned one: its row triggers are
    /// given to each new partition in the name of whoever makes that, who may not use our functions.
    Replica,
    /// The orders table, likewise, where Amazon orders get a generic customer.
    Assigning,
    /// Likewise, where the policy ignores writes to retrieved rows instead of refusing them.
    Ignoring,
    /// Likewise, where the policy keeps redacted cells as they are.
    Keeping,
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
        scope: Scope::Clocks,
    },
    Kind {
        suffix: "truncate",
        when: "AFTER TRUNCATE",
        after: "FOR EACH STATEMENT",
        function: "on_change",
        scope: Scope::Clocks,
    },
    Kind {
        suffix: "apply",
        when: "AFTER INSERT OR UPDATE",
        after: "FOR EACH ROW",
        function: "on_apply",
        scope: Scope::Replica,
    },
    Kind {
        suffix: "assign",
        when: "BEFORE INSERT OR UPDATE",
        after: "FOR EACH ROW",
        function: "on_assign",
        scope: Scope::Assigning,
    },
    Kind {
        suffix: "ignore",
        when: "BEFORE UPDATE",
        after: "FOR EACH ROW",
        function: "on_ignore",
        scope: Scope::Ignoring,
    },
    Kind {
        suffix: "keep",
        when: "BEFORE UPDATE",
        after: "FOR EACH ROW",
        function: "on_reimport",
        scope: Scope::Keeping,
    },
];

impl Kind {
    /// Whether a table of the policy, or a partition of one, is to have it.
    fn belongs(&self, plan: &Plan, table: usize, holds_rows: bool) -> bool {
        match self.scope {
            Scope::Every => true,
            Scope::Clocks => {
                table == 0 || (0..plan.entries.len()).any(|e| plan.entries[e].table == table && plan.anchored_by(e))
            }
            Scope::Replica => holds_rows,
            Scope::Keeping => {
                holds_rows
                    && !plan.tables[table].cells.is_empty()
                    && !plan.tables[table].delete
                    && matches!(plan.document.on_reimport, OnReimport::Keep)
            }
            Scope::Assigning => table == 0 && holds_rows && plan.assign.is_some(),
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
    let nested = IN_DDL.replace(true);
    let outcome = as_extension(|| {
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
    });
    IN_DDL.set(nested);
    outcome
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
    /// Our own statements are no news.
    static IN_DDL: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// A DDL command ended: new partitions of a policy's tables get their triggers. Never fails that command.
///
/// # Errors
/// A cancel.
pub fn structure_changed() -> Result<()> {
    // What the script of an extension makes is no partition of the shop's; our own changes our tables on the way.
    if catalog::is_creating_extension() || IN_DDL.replace(true) {
        return Ok(());
    }
    let outcome = subtransaction(|| {
        let policies = as_extension(|| {
            sql::read(
                // While a dump is being restored, its own statements bring the triggers.
                "SELECT t.policy, pg_catalog.bool_or(t.relation::oid <> c.objid OR r.relkind = 'p') \
                 FROM pg_catalog.pg_event_trigger_ddl_commands() c JOIN amazon_pii.policy_table t \
                   ON t.relation::oid = c.objid OR t.relation::oid IN (SELECT a.relid FROM pg_catalog.pg_partition_ancestors(c.objid) a) \
                 JOIN pg_catalog.pg_class r ON r.oid = t.relation \
                 WHERE c.classid = 'pg_catalog.pg_class'::regclass AND t.relation::oid = t.numbered_in GROUP BY 1",
                &[],
            )
        })?;
        for row in &policies {
            let policy = row.str(0)?;
            match subtransaction(|| Plan::find_columns(policy)) {
                Ok(()) if row.bool(1)? => ensure(&Plan::load(policy)?)?,
                Ok(()) => {}
                Err(e) if e.is_cancel() || e.is_lock() => return Err(e),
                // The shop's statement goes through; whoever sent it hears what comes of it.
                Err(e) => pgrx::warning!("amazon_pii policy \"{policy}\" stops: {}", e.shown()),
            }
        }
        Ok(())
    });
    IN_DDL.set(false);
    match outcome {
        Err(e) if e.is_cancel() => Err(e),
        Err(e) if e.is_other_version() => {
            pgrx::warning!(
                "{}; new partitions are looked after by the first cycle after an update",
                e.shown()
            );
            Ok(())
        }
        Err(_) => {
            pgrx::warning!("amazon_pii could not look after new partitions; the next cycle does");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}
