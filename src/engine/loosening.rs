//! What keeps personal data for longer than the 30 days that Amazon allows: it takes a reason, and `status` shows it while it lasts.

use super::check::{Problem, Severity};
use super::plan::Plan;
use crate::domain::policy::{Policy, ReasonRule};
use crate::domain::reason;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::xact::timestamp_text;

/// What a document asks for that Amazon does not allow, and why.
#[derive(Debug, Default)]
pub struct Loosened {
    /// How long personal data is kept, and why; nothing where that is no more than 30 days, in whatever month.
    pub clocks: Option<String>,
    /// How far ahead the beginning of the work is, and why, where that is more than 30 days.
    pub postponed: Option<String>,
    /// Since when the policy has been kept from its work without a break, also by its version so far.
    pub postponed_since: Option<String>,
    /// The reason that it gives.
    pub because: Option<String>,
}

impl Loosened {
    /// What it loosens, with the reason.
    pub fn lines(&self) -> Vec<&str> {
        [&self.clocks, &self.postponed]
            .into_iter()
            .flatten()
            .map(String::as_str)
            .collect()
    }
}

/// How a document loosens what Amazon allows.
///
/// # Errors
/// It does not say why, or the reason is unusable.
pub fn of_policy(policy: &Policy) -> Result<Loosened> {
    let because = match &policy.loosened {
        None => None,
        Some(why) => {
            let why = reason::check(Some(why), ReasonRule::Required);
            Some(why.map_err(|e| Error::invalid(format!("loosened: {e}")).hint(e.hint()))?)
        }
    };
    let clocks = long_clocks(policy)?;
    let (postponed, postponed_since) = far_ahead(policy)?;
    if because.is_none() && !(clocks.is_empty() && postponed.is_empty()) {
        let mut problems: Vec<String> = clocks
            .iter()
            .map(|(name, _, problem)| format!("{name}: {problem}"))
            .collect();
        problems.extend(
            postponed
                .iter()
                .map(|(name, _)| format!("{name}: more than 30 days ahead")),
        );
        return Err(Error::invalid(problems.join("; "))
            .hint("Say in \"loosened\" why, in 50 characters at most; status shows it for as long as it lasts."));
    }
    let told = |parts: Vec<String>| {
        let why = because.as_ref().filter(|_| !parts.is_empty())?;
        Some(format!("{}: {why}", parts.join(", ")))
    };
    Ok(Loosened {
        clocks: told(
            clocks
                .iter()
                .map(|(name, after, _)| format!("{name} is {after}"))
                .collect(),
        ),
        postponed: told(postponed.iter().map(|(name, at)| format!("{name} is {at}")).collect()),
        postponed_since,
        because,
    })
}

/// What a document keeps for too long: (key, how long, what is wrong with that).
fn long_clocks(policy: &Policy) -> Result<Vec<(String, &str, &'static str)>> {
    const LONG: &str = "longer than the 30 days that Amazon allows";
    let mut long = Vec::new();
    let clocks = [
        ("redact_after", &policy.redact_after),
        ("retrieved_for", &policy.retrieved_for),
    ];
    let clocks = clocks
        .into_iter()
        .map(|(name, after)| (name.to_owned(), after.as_str()));
    let ages = policy.by_age.iter().enumerate();
    for (name, after) in clocks.chain(ages.map(|(at, aged)| (format!("by_age[{at}].after"), aged.after.as_str()))) {
        if is_longer(after, "0 days", "30 days")? {
            long.push((name, after, LONG));
        }
    }
    // A day is what a job that deletes files needs, whatever the clock is.
    let files = &policy.files_within;
    let has_files = policy.orders.files.is_some() || policy.linked.iter().any(|entry| entry.files.is_some());
    if has_files && is_longer(files, "0 days", "1 day")? && is_longer(&policy.redact_after, files, "31 days")? {
        const FILES: &str = "files may stay for more than a day past the 30 days that Amazon allows";
        long.push(("files_within".to_owned(), files.as_str(), FILES));
    }
    Ok(long)
}

/// Whether two intervals, one after the other, can be more than a third, from whatever month's beginning on.
fn is_longer(first: &str, second: &str, limit: &str) -> Result<bool> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.bool_or(m.t + $1::interval + $2::interval > m.t + $3::interval) FROM pg_catalog.generate_series( \
                '2026-01-01'::timestamp, '2029-12-01'::timestamp, '1 month'::interval) AS m (t)",
            &[Arg::Text(Some(first)), Arg::Text(Some(second)), Arg::Text(Some(limit))],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
}

/// A key of a document, and the moment that it names.
type Ahead = (&'static str, String);

/// The moments before which a document keeps cycles from their work, where they are far ahead. And since when the
/// policy has been kept from it: putting off again and again is one.
fn far_ahead(policy: &Policy) -> Result<(Vec<Ahead>, Option<String>)> {
    let moments = [
        ("effective_from", policy.effective_from.map(timestamp_text)),
        ("report_only_until", policy.report_only_until.map(timestamp_text)),
    ];
    let rows = as_extension(|| {
        sql::read(
            "SELECT COALESCE($2::timestamptz > GREATEST(s.since + '30 days'::interval, pg_catalog.now()), false), \
                    COALESCE($3::timestamptz > GREATEST(s.since + '30 days'::interval, pg_catalog.now()), false), \
                    $2::timestamptz::text, $3::timestamptz::text, \
                    CASE WHEN GREATEST($2::timestamptz, $3::timestamptz) > pg_catalog.now() THEN s.since END \
             FROM (SELECT COALESCE((SELECT p.postponed_since FROM amazon_pii.policy AS p WHERE p.policy = $1 \
                AND GREATEST(p.effective_from, p.report_only_until) > pg_catalog.now()), pg_catalog.now()) AS since) AS s",
            &[
                Arg::Text(Some(&policy.policy)),
                Arg::Text(moments[0].1.as_deref()),
                Arg::Text(moments[1].1.as_deref()),
            ],
        )
    })?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    let mut far = Vec::new();
    for (at, (name, _)) in moments.iter().enumerate() {
        if row.bool(at)? {
            far.push((*name, row.string(at + 2)?));
        }
    }
    Ok((far, row.owned(4)?))
}

/// What a document loosens, as lines of `check_policy`.
///
/// # Errors
/// As [`of_policy`].
pub fn told(policy: &Policy) -> Result<Vec<Problem>> {
    let found = of_policy(policy)?;
    Ok(found
        .lines()
        .into_iter()
        .map(|line| {
            Problem::new(
                Severity::Info,
                "loosened",
                line,
                "Personal data stays longer than Amazon allows; status and evidence show it while it lasts.",
            )
        })
        .collect())
}

/// Where a document changes the clock of a policy: how many orders become due, and when.
///
/// # Errors
/// Errors of the server.
pub fn changed_clock(plan: &Plan) -> Result<Vec<Problem>> {
    let rows = as_extension(|| {
        sql::read(
            "WITH due AS (SELECT GREATEST(COALESCE(o.anchor_at + $2::interval, o.stale_at), o.held_until, o.effective_at) AS at \
                FROM amazon_pii.order_state AS o WHERE o.policy = $1 AND o.redacted_version IS NULL AND o.asked IS NULL AND o.follows IS NULL \
                AND o.status IN ('scheduled', 'archived', 'failed')) \
             SELECT (p.document::pg_catalog.jsonb OPERATOR(pg_catalog.->>) 'redact_after'), pg_catalog.count(d.at) FILTER (WHERE d.at <= pg_catalog.now()), \
                pg_catalog.count(d.at) FILTER (WHERE d.at > pg_catalog.now() AND d.at <= pg_catalog.now() + '7 days'::interval), \
                pg_catalog.count(d.at) FILTER (WHERE d.at > pg_catalog.now() + '7 days'::interval), \
                pg_catalog.min(d.at) FILTER (WHERE d.at > pg_catalog.now()), pg_catalog.max(d.at) \
             FROM amazon_pii.policy AS p LEFT JOIN due AS d ON true WHERE p.policy = $1 GROUP BY p.document",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&plan.document.redact_after)),
            ],
        )
    })?;
    let Some(row) = rows.first() else { return Ok(Vec::new()) };
    let before = row.text(0)?.unwrap_or("30 days");
    if before == plan.document.redact_after {
        return Ok(Vec::new());
    }
    let (now, soon, later) = (row.int(1)?, row.int(2)?, row.int(3)?);
    let mut problem =
        format!("instead of {before}: {now} orders become due at once, {soon} within 7 days, {later} later");
    if let (Some(first), Some(last)) = (row.text(4)?, row.text(5)?) {
        problem.push_str(&format!("; the next at {first}, the last at {last}"));
    }
    Ok(vec![Problem::new(
        Severity::Info,
        "redact_after",
        problem,
        "Orders that are redacted stay redacted.",
    )])
}
