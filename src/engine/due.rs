//! Which orders a cycle takes next.

use std::collections::HashMap;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::gather::LiveRecord;
use super::plan::Plan;
use super::records::RecordList;
use super::walk::{Values, key_parts};
use crate::domain::clock::Horizons;
use crate::domain::policy::Export;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{Identity, OWN_PATH, act_as, on_keys};
use crate::pg::sql::{self, Arg, Row};
use crate::pg::xact::timestamp_text;

/// An order that a batch works on.
pub struct Due {
    pub order_key: String,
    pub key: Values,
    pub number: Option<String>,
    pub status: String,
    /// Its copy has been archived once.
    pub archived: bool,
    /// Its PII is to be overwritten now; otherwise archived only.
    pub redact: bool,
    pub attempts: u32,
    /// The policy's version when it was redacted last.
    pub redacted_version: Option<i64>,
    /// What was asked for.
    pub asked: Asked,
    /// Its archive was destroyed.
    pub purged: bool,
    /// Somebody holds its archive.
    pub archive_held: bool,
    /// The newest of its data keys that were destroyed.
    pub generation: i64,
    /// The rows that hold, or held, its personal data.
    pub records: Rc<RecordList>,
    /// What the order's state says of them, as far as this batch knows.
    pub listed: Option<String>,
    /// Which transaction has written the order's state last, as far as this batch knows. Whoever adds something to an order that a
    /// cycle may be at writes it.
    pub written_by: String,
    /// This batch has stored its copy.
    pub copied: bool,
    /// It was redacted in this cycle, and comes back for rows that triggers wrote because of that.
    pub came_back: bool,
    /// Its rows as this batch has archived them: what is overwritten next need not be looked for again.
    pub seen: Option<Vec<LiveRecord>>,
}

/// What people asked for: [`ending`](super::ending).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Nothing,
    /// To be redacted at once.
    Erase,
    /// To be redacted at once; then its archive is destroyed.
    Forget,
    /// That was done: what comes back is redacted without a copy.
    Forgotten,
    /// A restore brought its personal data back after its archive was destroyed: redacted at once without a copy, this one time.
    Revived,
}

impl Asked {
    fn of(word: Option<&str>) -> Result<Self> {
        match word {
            None => Ok(Self::Nothing),
            Some("erase") => Ok(Self::Erase),
            Some("forget") => Ok(Self::Forget),
            Some("forgotten") => Ok(Self::Forgotten),
            Some("revived") => Ok(Self::Revived),
            Some(_) => Err(Error::internal("an order was asked for something unknown")),
        }
    }

    /// Whether nothing else says when its records are due.
    pub fn at_once(self) -> bool {
        self != Self::Nothing
    }

    /// Whether it is known for good that it was, or is being, forgotten: it stays tracked when it is deleted.
    pub fn forgets(self) -> bool {
        matches!(self, Self::Forget | Self::Forgotten)
    }

    /// Whether it is redacted without a copy: that was destroyed before.
    pub fn without_copy(self) -> bool {
        matches!(self, Self::Forgotten | Self::Revived)
    }
}

impl Due {
    /// From [`COLUMNS`].
    fn read(row: &Row) -> Result<Self> {
        Ok(Self {
            order_key: row.string(0)?,
            key: key_parts(row.str(0)?)?,
            number: row.owned(1)?,
            status: row.string(2)?,
            archived: row.bool(3)?,
            redact: false,
            attempts: u32::try_from(row.int(4)?).unwrap_or(u32::MAX),
            redacted_version: row.text(5)?.and_then(|v| v.parse().ok()),
            records: Rc::new(RecordList::parse(row.text(6)?)?),
            listed: row.owned(6)?,
            asked: Asked::of(row.text(7)?)?,
            purged: row.bool(8)?,
            archive_held: row.bool(10)?,
            generation: row.int(9)?,
            written_by: row.string(11)?,
            copied: false,
            came_back: false,
            seen: None,
        })
    }

    /// Whether the live values have to be archived (again) before anything is overwritten.
    pub fn needs_copy(&self) -> bool {
        self.status != "archived" && !self.asked.without_copy()
    }
}

/// The instants of one cycle, fixed at its start so that it ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Clock {
    pub now: String,
    pub archive: Option<String>,
    pub redact: String,
}

impl Clock {
    /// As text, for statements.
    pub fn new(now: chrono::DateTime<chrono::Utc>, horizons: &Horizons) -> Self {
        Self {
            now: timestamp_text(now),
            archive: horizons.archive.map(timestamp_text),
            redact: timestamp_text(horizons.redact),
        }
    }
}

/// Which of a policy's orders one process of a cycle takes. Each order is in one part only: between the two transactions
/// of a batch nobody else of the same cycle takes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Share {
    /// How many parts there are.
    pub of: u32,
    pub parts: Vec<u32>,
}

impl Share {
    /// All orders.
    pub fn whole() -> Self {
        Self { of: 1, parts: vec![0] }
    }
}

/// What [`Due`] holds of an order, from `o`.
const COLUMNS: &str = "o.order_key, o.order_number, o.status, o.archived_at IS NOT NULL, o.attempts, o.redacted_version, o.records, \
     o.asked, o.purged_at IS NOT NULL, COALESCE(o.key_generation, 0), COALESCE(o.archive_held_until > pg_catalog.now(), false), o.xmin";

/// The condition that an order has yet to be redacted for the first time, over `o`.
pub const UNTOUCHED: &str =
    "(o.redacted_version IS NULL AND o.status IN ('flagged', 'scheduled', 'archived', 'failed'))";

/// The condition that an order is in one of the parts $8 of $7.
const IN_SHARE: &str = "($7::bigint = 1 OR (pg_catalog.hashtextextended(o.order_key, 0) & 9223372036854775807) % $7::bigint = ANY ($8::bigint[]))";

/// The condition under which an order's overwrite is due, over `o` with $2 = now and $4 = the redaction horizon. No window is
/// a reason to touch an order before it is in effect.
const REDACT_DUE: &str = "(o.held_until IS NULL OR o.held_until <= $2::timestamptz) \
     AND (o.effective_at IS NULL OR o.effective_at <= $2::timestamptz) AND (o.status = 'redacted' \
     OR CASE WHEN o.status = 'retrieved' OR o.retrieved_until IS NOT NULL THEN o.retrieved_until ELSE o.redact_due_at END <= $4::timestamptz)";

/// The condition that an order's accounting data is exported, or the order was redacted once, or is to be erased; $1 = the policy.
const EXPORTED: &str = "(o.redacted_at IS NOT NULL OR o.asked IS NOT NULL OR COALESCE(o.anchor_at, o.stale_at, o.redact_due_at) <= \
     (SELECT x.exported_upto FROM amazon_pii.policy x WHERE x.policy = $1))";

/// [`REDACT_DUE`] under a policy, $1: where it requires the export, nothing is overwritten before.
pub fn redact_due(plan: &Plan) -> String {
    match plan.document.export {
        Some(Export::Require) => [REDACT_DUE, " AND ", EXPORTED].concat(),
        Some(Export::Warn) | None => REDACT_DUE.to_owned(),
    }
}

/// The condition that a cycle may go on: the policy is at work, in version $5.
const IN_FORCE: &str = "EXISTS (SELECT FROM amazon_pii.policy p WHERE p.policy = $1 AND p.version = $5 \
     AND p.enabled AND p.suspended IS NULL)";

/// The index has the orders in the order of their deadlines: a backlog is not sorted for each batch.
const IN_ORDER: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_sort", "off"),
];

/// Locks and returns the next orders that have something to do, oldest deadline first; those that another cycle or a
/// retrieval has locked are left out.
///
/// # Errors
/// Errors of the server.
pub fn take(plan: &Plan, clock: &Clock, share: &Share, limit: i64) -> Result<Vec<Due>> {
    let redact_due = redact_due(plan);
    let rows = act_as(Identity::Extension, OWN_PATH, IN_ORDER, || {
        sql::write(
            // ident-ok: made of constants.
            &format!(
                "SELECT {COLUMNS}, COALESCE({redact_due}, false) \
                 FROM amazon_pii.order_state o \
                 WHERE o.policy = $1 AND o.next_due_at <= GREATEST($2::timestamptz, $4::timestamptz) \
                   AND (o.next_attempt_at IS NULL OR o.next_attempt_at <= $2::timestamptz) \
                   AND ((o.archived_at IS NULL AND o.archive_due_at <= $3::timestamptz) OR ({redact_due})) AND {IN_FORCE} AND {IN_SHARE} \
                 ORDER BY o.next_due_at LIMIT $6 FOR UPDATE OF o SKIP LOCKED"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::Text(clock.archive.as_deref()),
                Arg::Text(Some(&clock.redact)),
                Arg::Int(plan.version),
                Arg::Int(limit),
                Arg::Int(i64::from(share.of)),
                Arg::Ints(share.parts.iter().map(|p| i64::from(*p)).collect()),
            ],
        )
    })?;
    rows.iter()
        .map(|r| {
            Ok(Due {
                redact: r.bool(12)?,
                ..Due::read(r)?
            })
        })
        .collect()
}

/// Locks those of some orders that were never redacted, and may be touched: they are tracked, in effect, and nothing holds them.
///
/// # Errors
/// Errors of the server.
pub fn untouched(plan: &Plan, clock: &Clock, orders: &[&str]) -> Result<Vec<Due>> {
    let rows = on_keys(|| {
        sql::write(
            // ident-ok: made of constants.
            &format!(
                "SELECT {COLUMNS} FROM amazon_pii.order_state o WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($3) \
                 AND {UNTOUCHED} AND (o.held_until IS NULL OR o.held_until <= $2::timestamptz) \
                 AND (o.effective_at IS NULL OR o.effective_at <= $2::timestamptz) AND {IN_FORCE} \
                 FOR UPDATE OF o SKIP LOCKED"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::texts(orders),
                Arg::Text(None),
                Arg::Int(plan.version),
            ],
        )
    })?;
    rows.iter().map(Due::read).collect()
}

/// How many orders a cycle would archive now, and how many it would redact.
///
/// # Errors
/// Errors of the server.
pub fn count(plan: &Plan, clock: &Clock) -> Result<(i64, i64)> {
    let redact_due = redact_due(plan);
    let rows = act_as(Identity::Extension, OWN_PATH, IN_ORDER, || {
        sql::read(
            // ident-ok: made of constants.
            &format!(
                "SELECT pg_catalog.count(*) FILTER (WHERE d.copy), pg_catalog.count(*) FILTER (WHERE d.redact) FROM ( \
                    SELECT o.archived_at IS NULL AND (COALESCE(o.archive_due_at <= $3::timestamptz, false) OR COALESCE({redact_due}, false)), \
                           o.status <> 'redacted' AND COALESCE({redact_due}, false) FROM amazon_pii.order_state o \
                    WHERE o.policy = $1 AND o.next_due_at <= GREATEST($2::timestamptz, $4::timestamptz)) AS d (copy, redact)"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::Text(clock.archive.as_deref()),
                Arg::Text(Some(&clock.redact)),
            ],
        )
    })?;
    let row = rows.first().ok_or_else(|| Error::internal("no row"))?;
    Ok((row.int(0)?, row.int(1)?))
}

/// Locks orders again that were let go while a cold server was asked for their copies; returns those that could be, and are still
/// what [`take`] took.
///
/// # Errors
/// Errors of the server.
pub fn take_again(plan: &Plan, clock: &Clock, batch: Vec<Due>) -> Result<Vec<Due>> {
    let keys: Vec<&str> = batch.iter().map(|d| d.order_key.as_str()).collect();
    let redact_due = redact_due(plan);
    let rows = on_keys(|| {
        sql::write(
            // ident-ok: made of constants.
            &format!(
                "SELECT {COLUMNS}, COALESCE({redact_due}, false) FROM amazon_pii.order_state o \
                 WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($6) AND o.next_due_at <= GREATEST($2::timestamptz, $4::timestamptz) \
                   AND (o.next_attempt_at IS NULL OR o.next_attempt_at <= $2::timestamptz) \
                   AND ((o.archived_at IS NULL AND o.archive_due_at <= $3::timestamptz) OR ({redact_due})) AND {IN_FORCE} \
                 FOR UPDATE OF o SKIP LOCKED"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::Text(clock.archive.as_deref()),
                Arg::Text(Some(&clock.redact)),
                Arg::Int(plan.version),
                Arg::texts(&keys),
            ],
        )
    })?;
    let mut locked = HashMap::with_capacity(rows.len());
    for row in &rows {
        let due = Due {
            redact: row.bool(12)?,
            ..Due::read(row)?
        };
        locked.insert(due.order_key.clone(), due);
    }
    Ok(batch
        .into_iter()
        .filter_map(|old| {
            let now = locked.remove(&old.order_key)?;
            let same = now.status == old.status && now.listed == old.listed && now.needs_copy() == old.needs_copy();
            same.then_some(Due {
                came_back: old.came_back,
                ..now
            })
        })
        .collect())
}

/// Locks orders again for the next transaction of their batch; returns those that could be.
///
/// # Errors
/// Errors of the server.
pub fn relock(plan: &Plan, clock: &Clock, batch: Vec<Due>) -> Result<Vec<Due>> {
    let keys: Vec<&str> = batch.iter().map(|d| d.order_key.as_str()).collect();
    let redact_due = redact_due(plan);
    let rows = on_keys(|| {
        sql::write(
            // Meanwhile it may have been retrieved or held: whether it is due is asked again.
            // ident-ok: made of constants.
            &format!(
                "SELECT o.order_key, o.status, o.asked, o.purged_at IS NOT NULL, o.records, COALESCE(o.archive_held_until > pg_catalog.now(), false), o.xmin \
                 FROM amazon_pii.order_state o \
                 WHERE o.policy IS NOT DISTINCT FROM $1 AND o.order_key = ANY ($3) \
                 AND o.status IN ('scheduled', 'archived', 'redacted', 'retrieved', 'failed') AND ({redact_due}) \
                 AND (o.held_until IS NULL OR o.held_until <= pg_catalog.now()) AND {IN_FORCE} FOR UPDATE OF o SKIP LOCKED"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Text(Some(&clock.now)),
                Arg::texts(&keys),
                Arg::Text(Some(&clock.redact)),
                Arg::Int(plan.version),
            ],
        )
    })?;
    let locked: HashMap<&str, &Row> = rows.iter().map(|r| Ok((r.str(0)?, r))).collect::<Result<_>>()?;
    let mut out = Vec::with_capacity(batch.len());
    for mut due in batch {
        let Some(now) = locked.get(due.order_key.as_str()) else {
            continue;
        };
        // Another cycle may have done it, or have listed another row: then it is taken again as it is now.
        if (now.str(1)? != "redacted" || due.status == "redacted") && now.text(4)? == due.listed.as_deref() {
            // Somebody has added rows meanwhile, it may be.
            if now.str(6)? != due.written_by {
                due.seen = None;
            }
            let (asked, purged, archive_held) = (Asked::of(now.text(2)?)?, now.bool(3)?, now.bool(5)?);
            out.push(Due {
                asked,
                purged,
                archive_held,
                ..due
            });
        }
    }
    Ok(out)
}
