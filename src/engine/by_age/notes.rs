//! What our own tables know of rows by age: when to look, how far a pass has come, which rows are set aside. Set-based, as
//! the extension's owner. Keys and counts, never a value.

use std::collections::HashSet;

use pgrx::pg_sys;

use crate::domain::clock::backoff;
use crate::engine::due::Clock;
use crate::engine::plan::{Aged, Plan};
use crate::engine::state::notify;
use crate::engine::walk::{Values, key_text};
use crate::pg::error::{Error, Result};
use crate::pg::guc;
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::sql::{self, Arg, Row};

/// A row that could not be handled.
pub(super) struct Trouble<'a> {
    pub(super) key: &'a str,
    /// Nothing where somebody had it locked.
    pub(super) error: Option<String>,
}

/// A policy was applied: all of its tables are looked at from the beginning.
///
/// # Errors
/// Errors of the server.
pub fn begin(plan: &Plan) -> Result<()> {
    for statement in [
        "DELETE FROM amazon_pii.aged_table WHERE policy = $1",
        "DELETE FROM amazon_pii.aged_row WHERE policy = $1",
    ] {
        sql::execute(statement, &[Arg::Text(Some(&plan.policy))])?;
    }
    for aged in &plan.by_age {
        sql::execute(
            "INSERT INTO amazon_pii.aged_table (policy, entry) VALUES ($1, $2)",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(&aged.name))],
        )?;
    }
    Ok(())
}

/// The next cycle looks for old rows.
///
/// # Errors
/// Errors of the server.
pub fn look_now(policy: &str) -> Result<()> {
    sql::execute(
        "UPDATE amazon_pii.aged_table SET next_look_at = '-infinity' WHERE policy = $1",
        &[Arg::Text(Some(policy))],
    )?;
    Ok(())
}

/// Whether a policy is at work, in this version.
pub(super) fn in_force(policy: &str, version: i64) -> Result<bool> {
    as_extension(|| {
        let rows = sql::read(
            "SELECT true FROM amazon_pii.policy p WHERE p.policy = $1 AND p.version = $2 AND p.enabled AND p.suspended IS NULL",
            &[Arg::Text(Some(policy)), Arg::Int(version)],
        )?;
        Ok(!rows.is_empty())
    })
}

/// Which of these moments are not after another, all of one type.
pub(super) fn not_after(at_type: pg_sys::Oid, moments: &[Option<String>], upto: &str) -> Result<Vec<bool>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT COALESCE(m <= $2, false) FROM pg_catalog.unnest($1) WITH ORDINALITY AS n (m, i) ORDER BY i",
            &[
                Arg::Array(at_type, moments.iter().map(Option::as_deref).collect()),
                Arg::Typed(at_type, Some(upto)),
            ],
        )
    })?;
    rows.iter().map(|r| r.bool(0)).collect()
}

/// Tells whoever listens, once a batch.
pub(super) fn announce(policy: &str, status: &str, table: &str, count: i64) -> Result<()> {
    let payload = serde_json::json!({ "policy": policy, "status": status, "table": table, "count": count });
    notify(&payload)
}

/// What is noted of one table.
pub(super) struct Notes<'a> {
    pub(super) plan: &'a Plan,
    pub(super) aged: &'a Aged,
}

impl Notes<'_> {
    /// The position after which a pass goes on, if it is time for one. `vanish`: it begins with the oldest row anyway.
    pub(super) fn begin(&self, clock: &Clock, vanish: bool) -> Result<Option<Option<String>>> {
        let rows = self.run(
            "UPDATE amazon_pii.aged_table a SET \
                passed = CASE WHEN $5 OR a.begun_at IS NULL OR a.begun_at <= $3::timestamptz - '1 day'::interval THEN NULL ELSE a.passed END, \
                begun_at = CASE WHEN $5 OR a.begun_at IS NULL OR a.begun_at <= $3::timestamptz - '1 day'::interval THEN $3::timestamptz ELSE a.begun_at END \
             WHERE a.policy = $1 AND a.entry = $2 AND a.next_look_at <= GREATEST($3::timestamptz, $4::timestamptz) RETURNING a.passed",
            vec![
                Arg::Text(Some(&clock.now)),
                Arg::Text(Some(&clock.redact)),
                Arg::Bool(vanish),
            ],
        )?;
        rows.first().map(|r| r.owned(0)).transpose()
    }

    /// The same, without beginning one.
    pub(super) fn peek(&self, clock: &Clock) -> Result<Option<Option<String>>> {
        let rows = self.run(
            "SELECT a.passed FROM amazon_pii.aged_table a WHERE a.policy = $1 AND a.entry = $2 AND a.next_look_at <= $3::timestamptz",
            vec![Arg::Text(Some(&clock.now))],
        )?;
        rows.first().map(|r| r.owned(0)).transpose()
    }

    /// The youngest moment that is old at `horizon`, in the form of the table's own type, so that an index on it serves.
    pub(super) fn cutoff(&self, horizon: &str) -> Result<String> {
        let rows = as_extension(|| {
            sql::read(
                match self.aged.at_type {
                    pg_sys::TIMESTAMPTZOID => "SELECT $1::timestamptz - $2::interval, $3",
                    pg_sys::DATEOID => "SELECT pg_catalog.timezone($3, $1::timestamptz - $2::interval)::date",
                    _ => "SELECT pg_catalog.timezone($3, $1::timestamptz - $2::interval)",
                },
                &[
                    Arg::Text(Some(horizon)),
                    Arg::Text(Some(&self.aged.after)),
                    Arg::Text(Some(&self.plan.document.timezone)),
                ],
            )
        })?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
    }

    /// Rows that were set aside and whose time has come.
    pub(super) fn to_try_again(&self, now: &str, limit: i64) -> Result<Vec<String>> {
        let rows = self.run(
            "SELECT r.row_key FROM amazon_pii.aged_row r WHERE r.policy = $1 AND r.entry = $2 AND r.next_attempt_at <= $3::timestamptz \
             ORDER BY r.next_attempt_at LIMIT $4",
            vec![Arg::Text(Some(now)), Arg::Int(limit)],
        )?;
        rows.iter().map(|r| r.string(0)).collect()
    }

    /// Those of these rows that are set aside.
    pub(super) fn set_aside_of(&self, keys: &[String]) -> Result<HashSet<String>> {
        let rows = self.run(
            "SELECT r.row_key FROM amazon_pii.aged_row r WHERE r.policy = $1 AND r.entry = $2 AND r.row_key = ANY ($3)",
            vec![Arg::texts(keys)],
        )?;
        rows.iter().map(|r| r.string(0)).collect()
    }

    /// Writes down which of these rows are set aside now; the others are done with. How many have an error.
    pub(super) fn settle(&self, keys: &[String], troubles: &[Trouble<'_>]) -> Result<i64> {
        let bad: HashSet<&str> = troubles.iter().map(|t| t.key).collect();
        let fine: Vec<&str> = keys.iter().map(String::as_str).filter(|k| !bad.contains(k)).collect();
        self.run(
            "DELETE FROM amazon_pii.aged_row r WHERE r.policy = $1 AND r.entry = $2 AND r.row_key = ANY ($3)",
            vec![Arg::texts(&fine)],
        )?;
        for trouble in troubles {
            let attempts = match &trouble.error {
                None => 0,
                Some(_) => 1,
            };
            let rows = self.run(
                "INSERT INTO amazon_pii.aged_row AS r (policy, entry, row_key, attempts, next_attempt_at, last_error) \
                 VALUES ($1, $2, $3, $4, pg_catalog.now(), $5) ON CONFLICT (policy, entry, row_key) DO UPDATE \
                    SET attempts = r.attempts + EXCLUDED.attempts, last_error = EXCLUDED.last_error RETURNING r.attempts",
                vec![
                    Arg::Text(Some(trouble.key)),
                    Arg::Int(attempts),
                    Arg::Text(trouble.error.as_deref()),
                ],
            )?;
            let known = rows.first().ok_or_else(|| Error::internal("no row"))?.int(0)?;
            let wait = match &trouble.error {
                None => i64::try_from(guc::naptime()).unwrap_or(60),
                Some(_) => backoff(u32::try_from(known).unwrap_or(u32::MAX)).num_seconds(),
            };
            self.run(
                "UPDATE amazon_pii.aged_row r SET next_attempt_at = pg_catalog.now() + pg_catalog.make_interval(secs => $4::float8) \
                 WHERE r.policy = $1 AND r.entry = $2 AND r.row_key = $3",
                vec![Arg::Text(Some(trouble.key)), Arg::Int(wait)],
            )?;
        }
        Ok(troubles.iter().filter(|t| t.error.is_some()).count() as i64)
    }

    /// How far a pass has come.
    pub(super) fn passed(&self, position: Option<(&String, &Values)>) -> Result<()> {
        let Some((at, key)) = position else { return Ok(()) };
        let mut parts = vec![Some(at.clone())];
        parts.extend(key.iter().cloned());
        let text = key_text(&parts)?;
        self.run(
            "UPDATE amazon_pii.aged_table a SET passed = $3 WHERE a.policy = $1 AND a.entry = $2",
            vec![Arg::Text(Some(&text))],
        )?;
        Ok(())
    }

    /// A pass is over; `next` is the next moment that is not old yet. How many rows are overdue. Rows that come meanwhile may
    /// be older than that, so it is not long until somebody looks again.
    pub(super) fn finish(&self, next: Option<&str>) -> Result<i64> {
        let due = match self.aged.at_type {
            pg_sys::TIMESTAMPTZOID => "$3::timestamptz",
            _ => "pg_catalog.timezone($5, $3::timestamp)",
        };
        // ident-ok: fixed words only.
        let statement = format!(
            "UPDATE amazon_pii.aged_table a SET \
                next_look_at = LEAST({due} + $4::interval, \
                    pg_catalog.now() + LEAST($4::interval, '1 hour'::interval), \
                    (SELECT pg_catalog.min(r.next_attempt_at) FROM amazon_pii.aged_row r WHERE r.policy = $1 AND r.entry = $2)), \
                overdue = (SELECT pg_catalog.count(*) FROM amazon_pii.aged_row r WHERE r.policy = $1 AND r.entry = $2) \
             WHERE a.policy = $1 AND a.entry = $2 RETURNING a.overdue"
        );
        let rows = self.run(
            &statement,
            vec![
                Arg::Text(next),
                Arg::Text(Some(&self.aged.after)),
                Arg::Text(Some(&self.plan.document.timezone)),
            ],
        )?;
        rows.first().map_or(Ok(0), |r| r.int(0))
    }

    /// Nobody looks before this moment.
    pub(super) fn wait(&self, from: &str) -> Result<()> {
        self.run(
            "UPDATE amazon_pii.aged_table a SET next_look_at = $3::timestamptz WHERE a.policy = $1 AND a.entry = $2",
            vec![Arg::Text(Some(from))],
        )?;
        Ok(())
    }

    /// What was counted while nothing is done.
    pub(super) fn counted(&self, overdue: i64) -> Result<()> {
        self.run(
            "UPDATE amazon_pii.aged_table a SET overdue = $3, next_look_at = pg_catalog.now() + '1 hour'::interval WHERE a.policy = $1 AND a.entry = $2",
            vec![Arg::Int(overdue)],
        )?;
        Ok(())
    }

    /// A statement with policy and entry as its first parameters.
    fn run(&self, statement: &str, more: Vec<Arg<'_>>) -> Result<Vec<Row>> {
        let mut args = vec![Arg::Text(Some(&self.plan.policy)), Arg::Text(Some(&self.aged.name))];
        args.extend(more);
        on_keys(|| sql::write(statement, &args))
    }
}
