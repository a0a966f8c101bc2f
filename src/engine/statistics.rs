//! What the planner remembers of columns that were overwritten: `pg_statistic` keeps values of theirs, in extended statistics and for
//! expressions of indexes too, until the table is analyzed again.

use super::plan::{Plan, Table};
use crate::pg::error::Result;
use crate::pg::ident::{Ident, Relation};
use crate::pg::identity::{Identity, OWN_PATH, act_as};
use crate::pg::sql::{self, Arg};

/// The tables of a policy of which something is redacted.
pub fn tables(plan: &Plan) -> impl Iterator<Item = &Table> {
    let all = plan.tables.iter().chain(plan.by_age.iter().map(|aged| &aged.table));
    all.filter(|table| !table.cells.is_empty())
}

/// The relations of a table, itself or partitions, that are to be analyzed: statistics hold values of its redacted columns, and its
/// rows have changed since. At most once a day, or when a tenth has changed, as autovacuum would. A partitioned table has statistics
/// over all partitions only if somebody asked for them; then it is analyzed as a whole.
///
/// # Errors
/// Errors of the server.
fn outdated(table: &Table) -> Result<Vec<Relation>> {
    let columns: Vec<&str> = table.cells.iter().map(|cell| cell.name.bare()).collect();
    // What this session has not reported yet counts, too: a CALL reports when it is over.
    let rows = act_as(Identity::Owner(table.owner), OWN_PATH, &[], || {
        sql::read(
            "WITH remembers AS MATERIALIZED ( \
                SELECT c.oid, n.nspname, c.relname, c.relkind, c.reltuples, \
                       pg_catalog.pg_stat_get_mod_since_analyze(c.oid) + pg_catalog.pg_stat_get_xact_tuples_updated(c.oid) \
                            + pg_catalog.pg_stat_get_xact_tuples_deleted(c.oid) AS changed, \
                       GREATEST(pg_catalog.pg_stat_get_last_analyze_time(c.oid), pg_catalog.pg_stat_get_last_autoanalyze_time(c.oid)) AS at \
                  FROM (SELECT $1 UNION SELECT p.relid::oid FROM pg_catalog.pg_partition_tree($1) AS p) AS t (oid) \
                  JOIN pg_catalog.pg_class AS c ON c.oid = t.oid JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace \
                 WHERE EXISTS (SELECT FROM pg_catalog.pg_stats AS s WHERE s.schemaname = n.nspname AND s.tablename = c.relname \
                    AND s.attname = ANY ($2) \
                    AND (s.most_common_vals IS NOT NULL OR s.histogram_bounds IS NOT NULL OR s.most_common_elems IS NOT NULL))), \
             due AS MATERIALIZED (SELECT r.* FROM remembers AS r WHERE r.relkind <> 'p' AND r.changed > 0 \
                AND (r.at IS NULL OR r.at < pg_catalog.now() - '1 day'::interval OR r.changed >= r.reltuples / 10)), \
             whole AS MATERIALIZED (SELECT r.* FROM remembers AS r WHERE r.relkind = 'p' AND r.oid = $1 AND EXISTS (SELECT FROM due)) \
             SELECT w.oid, w.nspname, w.relname FROM whole AS w \
             UNION ALL SELECT d.oid, d.nspname, d.relname FROM due AS d WHERE NOT EXISTS (SELECT FROM whole)",
            &[Arg::Oid(table.relation.oid), Arg::texts(&columns)],
        )
    })?;
    rows.iter()
        .map(|row| {
            Ok(Relation {
                oid: row.oid(0)?,
                schema: Ident::new(row.string(1)?),
                name: Ident::new(row.string(2)?),
            })
        })
        .collect()
}

/// Analyzes a table again, as its owner, where that is due. Nothing is waited for, and what has the table now keeps it: ANALYZE
/// passes over it then, and the next cycle that does something tries again.
///
/// # Errors
/// Errors of the server, those of the owner's code in indexes and statistics among them.
pub fn renew(plan: &Plan, table: &Table) -> Result<()> {
    for relation in outdated(table)? {
        act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
            sql::execute(&format!("ANALYZE (SKIP_LOCKED) {relation}"), &[])
        })?;
    }
    Ok(())
}
