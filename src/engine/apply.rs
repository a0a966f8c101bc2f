//! Applying, enabling, disabling and dropping policies.

use pgrx::pg_sys;

use super::audit::{self, AuditEntry};
use super::check::{self, Problem, Severity};
use super::columns;
use super::loosening::Loosened;
use super::plan::{Plan, require_ownership};
use super::reconcile;
use super::vault::Place;
use super::{assign, by_age, chain, history, loosening, state, sweep, trigger_ddl, vault};
use crate::domain::policy::{Export, Policy, PolicyError, QualifiedName, ReasonRule};
use crate::domain::preset;
use crate::domain::reason::{self, ReasonError};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role, session_user};
use crate::pg::origin::this_database;
use crate::pg::sql::{self, Arg};
use crate::pg::xact::timestamp_text;
use crate::pg::{catalog, identity, invalidation, keys};

/// Parses a document and makes it ready in the caller's name, checking that the caller owns every table.
fn ready(document: &str) -> Result<Plan> {
    let policy = Policy::parse(document).map_err(|e| {
        let error = Error::invalid(e.to_string());
        match e.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    })?;
    let mut oids = vec![table(&policy.orders.table, "orders.table")?];
    for linked in &policy.linked {
        oids.push(table(&linked.table, &format!("linked \"{}\"", linked.alias))?);
    }
    for (at, aged) in policy.by_age.iter().enumerate() {
        oids.push(table(&aged.table, &format!("by_age[{at}].table"))?);
    }
    if let Some(history) = &policy.history {
        oids.push(table(&history.table, "history.table")?);
    }
    let path = catalog::search_path();
    // Ownership first: nobody learns of, or runs, anything in tables of others.
    let facts = as_extension(|| catalog::facts(&oids))?;
    for oid in &oids {
        if let Some(facts) = facts.iter().find(|f| f.relation.oid == *oid) {
            require_ownership(&facts.relation, facts.owner)?;
        }
    }
    intervals(&policy)?;
    for role in &policy.retrieve_for {
        if !identity::role_exists(role) {
            return Err(
                Error::undefined(format!("retrieve_for: role \"{role}\" does not exist"))
                    .hint("Name the roles under which returns and credits are inserted."),
            );
        }
    }
    let mut plan = Plan::build(policy, &path, &oids)?;
    plan.own_lines = history::tables_with_lines(&plan)?;
    plan.generic = assign::generic(&plan)?;
    Ok(plan)
}

/// What is wrong with a document, or with the name of one.
fn invalid(error: PolicyError) -> Error {
    let told = Error::invalid(error.to_string());
    match error.hint {
        Some(hint) => told.hint(hint),
        None => told,
    }
}

/// The document of a preset.
///
/// # Errors
/// There is none of that name; the caller is no member of `amazon_pii_admin`.
pub fn preset(name: &str) -> Result<&'static str> {
    require_role(&["amazon_pii_admin"], "read a preset")?;
    preset::document(name).map_err(invalid)
}

/// The OID of a table that the document names.
fn table(name: &str, place: &str) -> Result<pg_sys::Oid> {
    let parsed = QualifiedName::parse(name).map_err(|e| Error::invalid(format!("{place}: {}", e.problem)))?;
    catalog::find(parsed.schema.as_deref(), &parsed.name)?.ok_or_else(|| {
        Error::undefined(format!("{place}: table {name} does not exist")).hint(
            "Tables are named as in SQL, with their schema: \"shop.orders\", or \"\\\"My Shop\\\".\\\"Orders\\\"\".",
        )
    })
}

/// Intervals are PostgreSQL's; their relation is what the clock stands on.
fn intervals(policy: &Policy) -> Result<()> {
    let named = [
        ("archive_after", Some(&policy.archive_after)),
        ("redact_after", Some(&policy.redact_after)),
        ("retrieved_for", Some(&policy.retrieved_for)),
        ("archive_for", Some(&policy.archive_for)),
        ("audit_for", Some(&policy.audit_for)),
        ("files_within", Some(&policy.files_within)),
        ("orders.stale_after", policy.orders.stale_after.as_ref()),
    ];
    let named = named.into_iter().filter_map(|(n, t)| t.map(|t| (n.to_owned(), t)));
    let ages = policy.by_age.iter().enumerate();
    for (name, text) in named.chain(ages.map(|(at, aged)| (format!("by_age[{at}].after"), &aged.after))) {
        let positive = as_extension(|| {
            let rows = sql::read("SELECT $1::interval >= '0'::interval", &[Arg::Text(Some(text))])?;
            rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
        });
        match positive {
            Ok(true) => {}
            Err(e) if e.is_cancel() => return Err(e),
            _ => {
                return Err(Error::invalid(format!("{name}: not an interval of zero or more"))
                    .hint("Write it as PostgreSQL does, for example \"29 days\"."));
            }
        }
    }
    // Orders and entries of any age are compared with these.
    let future = "SELECT pg_catalog.now() + '10000 years'::interval + $1::interval IS NOT NULL";
    let past = "SELECT pg_catalog.now() - $1::interval IS NOT NULL";
    for (name, what, text, far) in [
        ("archive_for", "the archive", &policy.archive_for, future),
        ("audit_for", "the audit log", &policy.audit_for, past),
    ] {
        match as_extension(|| sql::read(far, &[Arg::Text(Some(text))])) {
            Ok(_) => {}
            Err(e) if e.is_cancel() => return Err(e),
            Err(_) => {
                return Err(Error::invalid(format!("{name}: too long"))
                    .hint(format!("Write how long {what} is kept, for example \"10 years\".")));
            }
        }
    }
    chain::kept_long_enough(&policy.audit_for)?;
    let ordered = as_extension(|| {
        let rows = sql::read(
            "SELECT $1::interval <= $2::interval",
            &[
                Arg::Text(Some(&policy.archive_after)),
                Arg::Text(Some(&policy.redact_after)),
            ],
        )?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
    })?;
    if !ordered {
        return Err(Error::invalid("archive_after is longer than redact_after")
            .hint("Personal data is archived before it is redacted, by default 29 and 30 days after the anchor."));
    }
    loosening::of_policy(policy).map(|_| ())
}

/// Everything that is wrong with a document; applies nothing.
///
/// # Errors
/// The caller is no member of `amazon_pii_admin`; errors of the server that are not the document's.
pub fn check(document: &str) -> Result<Vec<Problem>> {
    require_role(&["amazon_pii_admin"], "check a policy")?;
    let plan = match crate::pg::subxact::subtransaction(|| ready(document)) {
        Ok(plan) => plan,
        Err(e) if e.is_cancel() => return Err(e),
        Err(e) => return Ok(vec![Problem::of(&e)]),
    };
    let mut out = check::problems(&plan)?;
    match crate::pg::subxact::trial(|| vault::create(&plan.archive)) {
        Ok(()) => {}
        Err(e) if e.is_cancel() => return Err(e),
        Err(e) => out.push(Problem::of(&e)),
    }
    out.extend(places(&plan)?);
    if let Err(e) = keys::master_keys() {
        out.push(Problem::of(&e));
    }
    out.extend(loosening::changed_clock(&plan)?);
    out.extend(loosening::told(&plan.document)?);
    Ok(out)
}

/// Checks and applies a document: a new policy, or a new version of one.
///
/// # Errors
/// The first problem that is an error; not owner of a table; no master key.
pub fn apply(document: &str) -> Result<String> {
    require_role(&["amazon_pii_admin"], "apply a policy")?;
    keys::master_keys()?;
    let plan = ready(document)?;
    let problems = check::problems(&plan)?;
    for problem in problems.into_iter().chain(places(&plan)?) {
        match problem.severity {
            Severity::Error => {
                return Err(Error::invalid(format!("{}: {}", problem.object, problem.problem)).hint(problem.hint));
            }
            Severity::Warning | Severity::Info => {
                pgrx::notice!("{}: {} ({})", problem.object, problem.problem, problem.hint)
            }
        }
    }
    vault::create(&plan.archive)?;
    if plan.archive.foreign.is_some() && former(&plan.policy)?.is_some_and(|f| f.foreign != plan.archive.foreign) {
        vault::resend(&plan.archive, &plan.policy)?;
    }
    let loosened = loosening::of_policy(&plan.document)?;
    let (version, changed) = store(&plan, document, &loosened)?;
    trigger_ddl::drop_all(&plan.policy)?;
    trigger_ddl::ensure(&plan)?;
    audit::insert(&[AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(version),
        reason: loosened.because.clone().filter(|_| !loosened.lines().is_empty()),
        detail: Some(loosened.lines().join("; ")).filter(|d| !d.is_empty()),
        ..AuditEntry::new("apply_policy")?
    }])?;
    if changed {
        reschedule(&plan)?;
    }
    crate::worker::wake();
    Ok(format!("{} version {version}", plan.policy))
}

/// What is wrong with a foreign archive, the one that the policy wants and the one that it has.
fn places(plan: &Plan) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    if let Some(foreign) = &plan.archive.foreign {
        out.extend(check::archive::problems(foreign)?);
    }
    if let Some(former) = former(&plan.policy)? {
        out.extend(check::archive::left_behind(&plan.policy, &former, &plan.archive)?);
    }
    Ok(out)
}

/// Where the archive of a policy was to be so far.
fn former(policy: &str) -> Result<Option<Place>> {
    let known = as_extension(|| {
        sql::read(
            "SELECT p.document FROM amazon_pii.policy p WHERE p.policy = $1 \
             UNION ALL (SELECT v.document FROM amazon_pii.policy_version v WHERE v.policy = $1 ORDER BY v.version DESC LIMIT 1)",
            &[Arg::Text(Some(policy))],
        )
    })?;
    let former = known.first().and_then(|row| Policy::parse(row.str(0).ok()?).ok());
    Ok(former.as_ref().map(Place::of))
}

/// Writes the document. Returns its version, and whether it replaces an older one.
fn store(plan: &Plan, document: &str, loosened: &Loosened) -> Result<(i64, bool)> {
    let user = session_user();
    let path = catalog::schemas_searched();
    // Since a dump was restored no cycle may have been here.
    columns::see(&plan.policy)?;
    as_extension(|| {
        let known = sql::write(
            "SELECT version, document FROM amazon_pii.policy WHERE policy = $1 FOR UPDATE",
            &[Arg::Text(Some(&plan.policy))],
        )?;
        let (version, new) = match known.first() {
            None => {
                let kept = sql::read(
                    "SELECT COALESCE(pg_catalog.max(version), 0) + 1 FROM amazon_pii.policy_version WHERE policy = $1",
                    &[Arg::Text(Some(&plan.policy))],
                )?;
                (kept.first().ok_or_else(|| Error::internal("no row"))?.int(0)?, true)
            }
            Some(row) => {
                // A damaged document is none that could be the same.
                let parsed = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
                let same = parsed(row.str(1)?).is_some_and(|known| Some(known) == parsed(document));
                (row.int(0)? + i64::from(!same), !same)
            }
        };
        let schemas = sql::read(
            "SELECT COALESCE(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_array(n.oid::bigint, n.nspname) ORDER BY u.i), '[]')::text \
             FROM pg_catalog.unnest($1) WITH ORDINALITY AS u (name, i) JOIN pg_catalog.pg_namespace AS n ON n.nspname = u.name",
            &[Arg::texts(&path)],
        )?;
        let schemas = schemas.first().ok_or_else(|| Error::internal("no row"))?.string(0)?;
        sql::execute(
            "INSERT INTO amazon_pii.policy AS p (policy, version, document, enabled, search_path, applied_by, report_only_until, export, path_schemas, loosened, home, \
                effective_from, postponed_since, loosened_because) \
             VALUES ($1, $2, $3, $4, $5, $6, $7::timestamptz, $8, $9, $10, $11, $12::timestamptz, $13::timestamptz, $14) ON CONFLICT (policy) DO UPDATE SET version = EXCLUDED.version, \
                document = EXCLUDED.document, search_path = EXCLUDED.search_path, applied_at = pg_catalog.now(), \
                applied_by = EXCLUDED.applied_by, \
                report_only_until = EXCLUDED.report_only_until, path_schemas = EXCLUDED.path_schemas, export = EXCLUDED.export, loosened = EXCLUDED.loosened, \
                effective_from = EXCLUDED.effective_from, postponed_since = EXCLUDED.postponed_since, loosened_because = EXCLUDED.loosened_because, export_looked_at = NULL, suspended = NULL, last_error = NULL",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Int(version),
                Arg::Text(Some(document)),
                Arg::Bool(plan.document.enabled),
                Arg::Text(Some(&plan.search_path)),
                Arg::Text(Some(&user)),
                Arg::Text(plan.document.report_only_until.map(timestamp_text).as_deref()),
                Arg::Text(plan.document.export.map(|e| match e {
                    Export::Warn => "warn",
                    Export::Require => "require",
                })),
                Arg::Text(Some(&schemas)),
                Arg::Text(loosened.clocks.as_deref()),
                // Of a new policy: a copy is not adopted in passing.
                Arg::Text(Some(&this_database())),
                Arg::Text(plan.document.effective_from.map(timestamp_text).as_deref()),
                Arg::Text(loosened.postponed_since.as_deref()),
                Arg::Text(loosened.because.as_deref()),
            ],
        )?;
        if new {
            sql::execute(
                "INSERT INTO amazon_pii.policy_version (policy, version, document, applied_by) VALUES ($1, $2, $3, $4)",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Int(version),
                    Arg::Text(Some(document)),
                    Arg::Text(Some(&user)),
                ],
            )?;
        }
        if known.is_empty() {
            reconcile::begin()?;
        }
        // They may be due by another date now.
        sql::execute(
            "UPDATE amazon_pii.orphan SET next_attempt_at = '-infinity' WHERE policy = $1 AND apart = 'due'",
            &[Arg::Text(Some(&plan.policy))],
        )?;
        let mut names = sql::write(
            "DELETE FROM amazon_pii.policy_table WHERE policy = $1 RETURNING relation::oid, archived_as",
            &[Arg::Text(Some(&plan.policy))],
        )?
        .iter()
        .map(|r| Ok((r.oid(0)?, r.string(1)?)))
        .collect::<Result<Vec<_>>>()?;
        let entries = plan.entries.iter().map(|e| (e.alias.as_str(), &plan.tables[e.table]));
        let aged = plan.by_age.iter().map(|a| (a.name.as_str(), &a.table));
        let history = plan.history.iter().map(|h| (history::NAME, &h.table));
        for (entry, table) in entries.chain(aged).chain(history) {
            let archived_as = archived_as(&mut names, table.relation.oid, table.relation.shown());
            sql::execute(
                "INSERT INTO amazon_pii.policy_table (policy, entry, relation, owner, archived_as, numbered_in, whole) \
                 VALUES ($1, $2, $3::regclass, $4, $5, $3, $6)",
                &[
                    Arg::Text(Some(&plan.policy)),
                    Arg::Text(Some(entry)),
                    Arg::Oid(table.relation.oid),
                    Arg::Text(Some(&crate::pg::error::role_name(table.owner))),
                    Arg::Text(Some(&archived_as)),
                    // Of the history, too, only what we write there matters.
                    Arg::Bool(table.delete || entry == history::NAME),
                ],
            )?;
        }
        by_age::begin(plan)?;
        columns::store(plan, &names, version - i64::from(new))?;
        invalidation::announce_policy_change();
        Ok((version, new && !known.is_empty()))
    })
}

/// The name under which the archive knows a table: the one it got first, and never that of another table.
fn archived_as(names: &mut Vec<(pg_sys::Oid, String)>, relation: pg_sys::Oid, shown: String) -> String {
    if let Some((_, known)) = names.iter().find(|(oid, _)| *oid == relation) {
        return known.clone();
    }
    let mut name = shown.clone();
    let mut number = 1;
    while names.iter().any(|(_, taken)| *taken == name) {
        number += 1;
        name = format!("{shown} ({number})");
    }
    names.push((relation, name.clone()));
    name
}

/// A new version: clocks of orders that are not redacted follow it, and those that are done are looked at again.
fn reschedule(plan: &Plan) -> Result<()> {
    // What an order's own row says of its date of effect is found by the sweep that is asked for here; until then the old
    // date stands.
    const EFFECTIVE: &str = "GREATEST($4::timestamptz, CASE WHEN $5 THEN effective_at END)";
    let due = |after: &str| {
        let due = ["COALESCE(anchor_at + ", after, "::interval, stale_at)"].concat();
        [
            "CASE WHEN status <> 'flagged' AND ",
            &due,
            " IS NOT NULL THEN GREATEST(",
            &due,
            ", ",
            EFFECTIVE,
            ") END",
        ]
        .concat()
    };
    let (archive, redact) = (&due("$2"), &due("$3"));
    as_extension(|| {
        sql::execute(
            &[
                "UPDATE amazon_pii.order_state SET pushed_by = NULL, effective_at = ",
                EFFECTIVE,
                ", archive_due_at = ",
                archive,
                ", redact_due_at = ",
                redact,
                ", next_due_at = CASE WHEN status = 'scheduled' THEN ",
                archive,
                " WHEN status = 'archived' THEN GREATEST(",
                redact,
                ", held_until) WHEN status = 'failed' AND ",
                EFFECTIVE,
                " > pg_catalog.now() THEN CASE WHEN archived_at IS NULL THEN ",
                archive,
                " ELSE GREATEST(",
                redact,
                ", held_until) END ELSE next_due_at END WHERE policy = $1 AND asked IS NULL AND (status IN ('scheduled', 'archived', 'failed') \
                    OR status = 'flagged' AND effective_at IS DISTINCT FROM ",
                EFFECTIVE,
                ") AND follows IS NULL",
            ]
            .concat(),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&plan.document.archive_after)),
                Arg::Text(Some(&plan.document.redact_after)),
                Arg::Text(plan.document.effective_from.map(timestamp_text).as_deref()),
                Arg::Bool(plan.effective.is_some()),
            ],
        )
    })?;
    sweep::request(plan)
}

/// Switches a policy on.
///
/// # Errors
/// It does not exist; the caller is no member of `amazon_pii_admin`.
pub fn enable(policy: &str) -> Result<()> {
    require_role(&["amazon_pii_admin"], "enable a policy")?;
    switch(policy, None)
}

/// Switches a policy off, for a reason: what is due stays where it is.
///
/// # Errors
/// As [`enable`]; the reason is missing, or unusable.
pub fn disable(policy: &str, reason: Option<&str>) -> Result<()> {
    require_role(&["amazon_pii_admin"], "disable a policy")?;
    let reason = reason::check(reason, ReasonRule::Required).map_err(|e| {
        let hint = match e {
            ReasonError::Missing => "Say in a few words why nothing is to be redacted: disable_policy('…', 'reason').",
            other => other.hint(),
        };
        Error::invalid(e.to_string()).hint(hint)
    })?;
    switch(policy, Some(&reason))
}

/// On, or off for a reason.
fn switch(policy: &str, off: Option<&str>) -> Result<()> {
    let version = as_extension(|| {
        let rows = sql::write(
            "UPDATE amazon_pii.policy SET enabled = $2 IS NULL, disabled_reason = $2, \
                disabled_at = CASE WHEN $2 IS NOT NULL THEN CASE WHEN enabled THEN pg_catalog.now() ELSE COALESCE(disabled_at, pg_catalog.now()) END END WHERE policy = $1 RETURNING version",
            &[Arg::Text(Some(policy)), Arg::Text(off)],
        )?;
        by_age::look_now(policy)?;
        invalidation::announce_policy_change();
        rows.first().map(|r| r.int(0)).transpose()
    })?
    .ok_or_else(|| missing(policy))?;
    let action = if off.is_none() {
        "enable_policy"
    } else {
        "disable_policy"
    };
    audit::insert(&[AuditEntry {
        policy: Some(policy.to_owned()),
        policy_version: Some(version),
        reason: off.map(str::to_owned),
        ..AuditEntry::new(action)?
    }])?;
    state::announce_keys(policy, action, &[])?;
    crate::worker::wake();
    Ok(())
}

pub(super) fn missing(policy: &str) -> Error {
    Error::undefined(format!("policy \"{policy}\" does not exist"))
        .hint("The view amazon_pii.policies lists the policies.")
}
