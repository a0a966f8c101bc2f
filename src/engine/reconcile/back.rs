//! `reconcile()`: what came back goes again.

use std::collections::BTreeMap;

use super::tail::{Found, Unknown, look};
use crate::domain::policy::Policy;
use crate::domain::tombstone::What;
use crate::engine::audit::{self, AuditEntry, Line};
use crate::engine::state;
use crate::engine::tombstone;
use crate::engine::vault::{self, DestroyedAgain, Place};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys, require_role};
use crate::pg::sql::{self, Arg};
use crate::pg::tombstones;
use crate::pg::xact::Mode;

/// Orders of one statement, and of one entry of the audit log.
const TOGETHER: usize = 1000;

/// An order that came back.
pub struct Back {
    pub policy: String,
    pub order_key: String,
    pub order_number: Option<String>,
    /// How its archive was destroyed, and when.
    pub destroyed: &'static str,
    pub destroyed_at: String,
    /// What of it was there again.
    pub came_back: &'static str,
}

/// Destroys again what was destroyed since the backup from which this database was restored, and has redacted what came back. From then
/// on archives can be opened again.
///
/// # Errors
/// The caller is no member of `amazon_pii_admin`; no file is configured; the policy does not exist; the file cannot be read, or a master
/// key that signed a part of it is not at hand; an archive cannot be written.
pub fn reconcile(policy: Option<&str>) -> Result<Vec<Back>> {
    require_role(&["amazon_pii_admin"], "reconcile after a restore")?;
    if !tombstones::is_configured() {
        return Err(Error::wrong_state("amazon_pii.tombstone_file is not set")
            .hint("It tells what was destroyed after a backup was made; without it nobody knows."));
    }
    let policies = as_extension(|| {
        sql::read(
            "SELECT p.policy, p.version, p.document FROM amazon_pii.policy p WHERE $1 IS NULL OR p.policy = $1 ORDER BY 1",
            &[Arg::Text(policy)],
        )
    })?;
    if let (Some(name), true) = (policy, policies.is_empty()) {
        return Err(Error::undefined(format!("policy \"{name}\" does not exist"))
            .hint("The view amazon_pii.policies lists the policies."));
    }
    // Two at a time would tell the same twice; cycles do not wait.
    tombstone::mark_lock()?.take(Mode::Alone)?;
    let found = look(policy)?;
    let trouble = found.as_ref().and_then(|f| f.tail.trouble);
    if let (Some(trouble), Some(_)) = (trouble, policy) {
        return Err(Error::wrong_state(trouble.words())
            .hint("Call amazon_pii.reconcile() for all policies: it takes the file as it is."));
    }
    let unknown = found.as_ref().map(|f| f.unknown.as_slice()).unwrap_or_default();
    let mut out = Vec::new();
    for row in &policies {
        let ended = newest(unknown.iter().filter(|u| matches!(row.str(0), Ok(p) if p == u.policy)));
        let document = Policy::parse(row.str(2)?).map_err(|e| Error::invalid(e.to_string()))?;
        let scope = Scope {
            policy: row.str(0)?,
            version: row.int(1)?,
            place: Place::of(&document),
        };
        out.extend(scope.end_again(&ended)?);
    }
    if let Some(trouble) = trouble {
        pgrx::warning!("{}; from now on it is taken as it is", trouble.words());
        audit::insert(&[AuditEntry {
            detail: Some(trouble.words()),
            ..AuditEntry::new("reconcile")?
        }])?;
    }
    match (found, trouble) {
        (Some(found), Some(_)) => found.tail.end.write()?,
        (Some(_), None) => look(None)?
            .as_ref()
            .map(Found::known_upto)
            .map_or(Ok(()), |mark| mark.write())?,
        (None, _) => {}
    }
    crate::worker::wake();
    Ok(out)
}

/// Each order once, with all that was destroyed of it.
fn newest<'a>(unknown: impl Iterator<Item = &'a Unknown>) -> Vec<Unknown> {
    let mut out: BTreeMap<&str, Unknown> = BTreeMap::new();
    for item in unknown {
        out.entry(&item.order_key)
            .and_modify(|known| {
                known.generation = known.generation.max(item.generation);
                // Forgotten is for good; otherwise the last one counts.
                if known.what != What::Forgotten {
                    known.what = item.what;
                }
                known.at.clone_from(&item.at);
            })
            .or_insert_with(|| item.clone());
    }
    out.into_values().collect()
}

struct Scope<'a> {
    policy: &'a str,
    version: i64,
    place: Place,
}

impl Scope<'_> {
    fn end_again(&self, ended: &[Unknown]) -> Result<Vec<Back>> {
        let mut out = Vec::new();
        for part in ended.chunks(TOGETHER) {
            out.extend(self.part(part)?);
        }
        if ended.is_empty() {
            self.tell("nothing came back".to_owned(), &[])?;
        }
        Ok(out)
    }

    fn part(&self, part: &[Unknown]) -> Result<Vec<Back>> {
        // The states first, as everywhere.
        let keys: Vec<&str> = part.iter().map(|u| u.order_key.as_str()).collect();
        on_keys(|| {
            sql::write(
                "SELECT FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($2) \
                 ORDER BY o.order_key FOR UPDATE",
                &[Arg::Text(Some(self.policy)), Arg::texts(&keys)],
            )
        })?;
        let orders: Vec<(&str, i64)> = part.iter().map(|u| (u.order_key.as_str(), u.generation)).collect();
        let destroyed = vault::destroy_upto(&self.place, self.policy, &orders)?;
        let states = self.states(part, &destroyed)?;
        let mut out = Vec::with_capacity(part.len());
        for (item, destroyed) in part.iter().zip(&destroyed) {
            let state = states.get(item.order_key.as_str());
            let archive = destroyed.data_keys + destroyed.documents > 0;
            let data = state.is_some_and(|(_, is_back)| *is_back);
            out.push(Back {
                policy: self.policy.to_owned(),
                order_key: item.order_key.clone(),
                order_number: state.and_then(|(number, _)| number.clone()),
                destroyed: item.what.word(),
                destroyed_at: item.at.clone(),
                came_back: match (archive, data) {
                    (true, true) => "archive and personal data",
                    (true, false) => "archive",
                    (false, true) => "personal data",
                    (false, false) => "state",
                },
            });
        }
        let sum = |of: fn(&DestroyedAgain) -> i64| destroyed.iter().map(of).sum::<i64>();
        self.tell(
            format!(
                "{} orders; {} data keys and {} documents destroyed again",
                part.len(),
                sum(|d| d.data_keys),
                sum(|d| d.documents)
            ),
            &out,
        )?;
        state::announce_keys(
            self.policy,
            "purged",
            &keys.into_iter().map(str::to_owned).collect::<Vec<_>>(),
        )?;
        Ok(out)
    }

    /// What is back in the shop's tables becomes due at once and is redacted without a copy: that was destroyed. Of an order that is not
    /// known at all its state is put back, so that it is known when it is imported. Returns each order's number, and whether its personal
    /// data is back.
    fn states(
        &self,
        part: &[Unknown],
        destroyed: &[DestroyedAgain],
    ) -> Result<BTreeMap<String, (Option<String>, bool)>> {
        let is = |of: fn(&Unknown, &DestroyedAgain) -> bool| {
            Arg::Ints(part.iter().zip(destroyed).map(|(u, d)| i64::from(of(u, d))).collect())
        };
        let rows = on_keys(|| {
            sql::write(
                "WITH n AS MATERIALIZED (SELECT p, k, g, f = 1 AS f, l = 1 AS l FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), \
                    pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5)) AS n (p, k, g, f, l)), \
                 w AS MATERIALIZED (SELECT n.*, o.status IN ('flagged', 'scheduled', 'archived', 'failed', 'retrieved') AS back, \
                        o.status IN ('flagged', 'scheduled', 'archived', 'failed', 'retrieved') OR n.f \
                            OR o.status = 'redacted' AND COALESCE(o.next_due_at <= pg_catalog.now(), false) AS act \
                    FROM n JOIN amazon_pii.order_state o ON o.policy = n.p AND o.order_key = n.k) \
                 UPDATE amazon_pii.order_state o SET key_generation = NULLIF(GREATEST(o.key_generation, w.g), 0), \
                    purged_at = CASE WHEN w.l THEN o.purged_at ELSE COALESCE(o.purged_at, pg_catalog.now()) END, \
                    asked = CASE WHEN w.f THEN 'forgotten' WHEN w.act THEN 'revived' ELSE o.asked END, \
                    status = CASE WHEN o.status IN ('flagged', 'archived', 'failed') THEN 'scheduled' \
                        WHEN o.status = 'gone' AND w.f THEN 'redacted' ELSE o.status END, \
                    archived_at = CASE WHEN w.act THEN COALESCE(o.archived_at, pg_catalog.now()) ELSE o.archived_at END, \
                    redact_due_at = CASE WHEN w.back THEN LEAST(o.redact_due_at, pg_catalog.now()) ELSE o.redact_due_at END, \
                    retrieved_until = CASE WHEN o.retrieved_until IS NOT NULL THEN LEAST(o.retrieved_until, pg_catalog.now()) END, \
                    held_until = CASE WHEN NOT w.act THEN o.held_until END, held_since = CASE WHEN NOT w.act THEN o.held_since END, \
                    hold_reason = CASE WHEN NOT w.act THEN o.hold_reason END, \
                    archive_held_until = CASE WHEN w.l THEN o.archive_held_until END, \
                    archive_held_since = CASE WHEN w.l THEN o.archive_held_since END, \
                    archive_hold_reason = CASE WHEN w.l THEN o.archive_hold_reason END, \
                    effective_at = CASE WHEN w.act THEN LEAST(o.effective_at, pg_catalog.now()) ELSE o.effective_at END, \
                    pushed_by = CASE WHEN NOT w.act THEN o.pushed_by END, \
                    next_due_at = CASE WHEN w.act THEN pg_catalog.now() ELSE o.next_due_at END, \
                    attempts = 0, next_attempt_at = NULL, last_error = NULL \
                 FROM w WHERE o.policy = w.p AND o.order_key = w.k RETURNING o.order_key, o.order_number, w.back",
                &[
                    Arg::Texts(vec![Some(self.policy); part.len()]),
                    Arg::Texts(part.iter().map(|u| Some(u.order_key.as_str())).collect()),
                    Arg::Ints(part.iter().map(|u| u.generation).collect()),
                    is(|u, _| u.what == What::Forgotten),
                    is(|_, d| d.is_archived_since),
                ],
            )
        })?;
        let mut out = BTreeMap::new();
        for row in &rows {
            out.insert(row.string(0)?, (row.owned(1)?, row.bool(2)?));
        }
        let missing: Vec<&Unknown> = part.iter().filter(|u| !out.contains_key(&u.order_key)).collect();
        on_keys(|| {
            sql::execute(
                "INSERT INTO amazon_pii.order_state (policy, order_key, status, flagged_by, archived_at, redact_due_at, redacted_at, redacted_version, \
                    next_due_at, asked, purged_at, key_generation, redacted_first_at) \
                 SELECT p, k, CASE WHEN f = 1 THEN 'redacted' ELSE 'gone' END, 'reconcile', t::timestamptz, t::timestamptz, t::timestamptz, $6, \
                    CASE WHEN f = 1 THEN pg_catalog.now() END, CASE WHEN f = 1 THEN 'forgotten' END, pg_catalog.now(), NULLIF(g, 0), t::timestamptz \
                 FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5)) \
                    AS n (p, k, g, f, t)",
                &[
                    Arg::Texts(vec![Some(self.policy); missing.len()]),
                    Arg::Texts(missing.iter().map(|u| Some(u.order_key.as_str())).collect()),
                    Arg::Ints(missing.iter().map(|u| u.generation).collect()),
                    Arg::Ints(missing.iter().map(|u| i64::from(u.what == What::Forgotten)).collect()),
                    Arg::Texts(missing.iter().map(|u| Some(u.at.as_str())).collect()),
                    Arg::Int(self.version),
                ],
            )
        })?;
        Ok(out)
    }

    fn tell(&self, detail: String, orders: &[Back]) -> Result<()> {
        let lines = orders.iter().map(|b| Line {
            order_key: b.order_key.clone(),
            order_number: b.order_number.clone(),
            detail: format!("{} at {}; came back: {}", b.destroyed, b.destroyed_at, b.came_back),
        });
        let entry = AuditEntry {
            policy: Some(self.policy.to_owned()),
            policy_version: Some(self.version),
            ..AuditEntry::new("reconcile")?
        };
        let (all, each) = (
            AuditEntry {
                detail: Some(detail),
                ..entry.clone()
            },
            AuditEntry {
                lines: lines.collect(),
                ..entry
            },
        );
        let entries = [all, each];
        audit::insert(if orders.is_empty() { &entries[..1] } else { &entries })
    }
}
