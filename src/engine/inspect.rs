//! Looking without touching: what a cycle would do, and why an order is where it is.

use std::collections::{BTreeMap, BTreeSet};

use super::access::queued;
use super::by_age;
use super::files;
use super::flag::{self, OrderFact};
use super::paging::{self, Range};
use super::plan::{AnchorPlan, Plan};
use super::portable;
use super::walk::{Values, key_parts};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role};
use crate::pg::sql::{self, Arg};
use crate::pg::xact::timestamp_text;

/// What a cycle would do with one table.
pub struct Preview {
    pub action: &'static str,
    pub table: String,
    pub orders: i64,
    pub records: i64,
}

/// Orders in one step of a preview.
const STEP: i64 = 1000;

/// What a cycle at `as_of` would do, from the source tables as they are; windows are left out of account.
///
/// # Errors
/// The policy does not exist; errors of the server or of the owners' expressions.
pub fn preview(policy: &str, as_of: &str) -> Result<Vec<Preview>> {
    require_role(
        &["amazon_pii_admin", "amazon_pii_operator", "amazon_pii_auditor"],
        "preview a policy",
    )?;
    let plan = Plan::current(policy)?;
    // (action, table) → orders and records.
    let mut counts: BTreeMap<(usize, usize), (BTreeSet<String>, i64)> = BTreeMap::new();
    let mut after: Option<Values> = None;
    loop {
        let range = Range {
            after: after.as_ref(),
            upto: None,
        };
        let page = paging::page(&plan, range, STEP)?;
        let actions = actions(&plan, &page.facts, as_of)?;
        for (fact, action) in page.facts.iter().zip(&actions) {
            if action.new {
                counts.entry((0, 0)).or_default().0.insert(fact.key_text.clone());
            }
        }
        for (index, wanted) in [(1, true), (2, false)] {
            let due: Vec<&OrderFact> = page
                .facts
                .iter()
                .zip(&actions)
                .filter(|(_, a)| if wanted { a.archive } else { a.redact })
                .map(|(f, _)| f)
                .collect();
            let keys: Vec<Values> = due.iter().map(|f| f.key.clone()).collect();
            let read = portable::gather(&plan, &keys)?;
            for record in read.gathered.records {
                if record.pii(&plan)?.is_empty() || (index == 1 && plan.tables[record.table].no_copy) {
                    continue;
                }
                let slot = counts.entry((index, record.table)).or_default();
                slot.0.insert(due[read.kept[record.order]].key_text.clone());
                slot.1 += 1;
            }
        }
        pgrx::check_for_interrupts!();
        match page.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    let mut out: Vec<Preview> = counts
        .into_iter()
        .map(|((action, table), (orders, records))| Preview {
            action: ["flag", "archive", "redact"][action],
            table: plan.tables[table].relation.shown(),
            orders: orders.len() as i64,
            records,
        })
        .collect();
    for aged in &plan.by_age {
        let records = by_age::preview(&plan, aged, as_of)?;
        if records > 0 {
            out.push(Preview {
                action: "by_age",
                table: aged.table.relation.shown(),
                orders: 0,
                records,
            });
        }
    }
    Ok(out)
}

struct Action {
    new: bool,
    archive: bool,
    redact: bool,
}

/// What is due for orders as of a moment, by their state or, for those not flagged yet, by their anchor.
fn actions(plan: &Plan, facts: &[OrderFact], as_of: &str) -> Result<Vec<Action>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT o.order_key IS NULL, \
                    (o.archived_at IS NULL) AND COALESCE(o.archive_due_at, CASE WHEN n.a IS NOT NULL THEN GREATEST(n.a::timestamptz + $5::interval, n.e::timestamptz, $8::timestamptz) END) <= $4::timestamptz, \
                    (o.held_until IS NULL OR o.held_until <= $4::timestamptz) AND CASE WHEN o.status = 'redacted' THEN false \
                        WHEN o.status = 'retrieved' THEN o.retrieved_until <= $4::timestamptz \
                        ELSE COALESCE(o.redact_due_at, CASE WHEN n.a IS NOT NULL THEN GREATEST(n.a::timestamptz + $6::interval, n.e::timestamptz, $8::timestamptz) END) <= $4::timestamptz END \
             FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($7)) WITH ORDINALITY AS n (k, a, e, i) \
             LEFT JOIN amazon_pii.order_state o ON o.policy = $1 AND o.order_key = n.k ORDER BY n.i",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Texts(facts.iter().map(|f| Some(f.key_text.as_str())).collect()),
                Arg::Texts(facts.iter().map(|f| f.anchor.as_deref()).collect()),
                Arg::Text(Some(as_of)),
                Arg::Text(Some(&plan.document.archive_after)),
                Arg::Text(Some(&plan.document.redact_after)),
                Arg::Texts(facts.iter().map(|f| f.effective.as_deref()).collect()),
                Arg::Text(plan.document.effective_from.map(timestamp_text).as_deref()),
            ],
        )
    })?;
    rows.iter()
        .map(|r| {
            Ok(Action {
                new: r.bool(0)?,
                archive: r.bool(1)?,
                redact: r.bool(2)?,
            })
        })
        .collect()
}

/// One line of an explanation.
pub struct Step {
    pub step: &'static str,
    pub object: String,
    pub detail: String,
}

/// Why an order was flagged, where its anchor came from, what is due when and what keeps each record alive; no values.
///
/// # Errors
/// No flagged order has the number.
pub fn explain(number: &str) -> Result<Vec<Step>> {
    require_role(
        &["amazon_pii_admin", "amazon_pii_operator", "amazon_pii_auditor"],
        "explain an order",
    )?;
    let orders = as_extension(|| {
        sql::read(
            "SELECT policy, order_key, status, flagged_at, flagged_by, anchor_at, archive_due_at, archived_at, redact_due_at, \
                    redacted_at, redacted_version, retrieved_until, held_until, pushed_by, attempts, next_attempt_at, last_error, \
                    effective_at, effective_at > pg_catalog.now(), purged_at, asked, \
                    CASE WHEN purged_at IS NOT NULL AND status IN ('redacted', 'gone') THEN 'purged' ELSE status END, follows, archive_held_until \
             FROM amazon_pii.order_state WHERE order_number = $1 ORDER BY policy, order_key",
            &[Arg::Text(Some(number))],
        )
    })?;
    if orders.is_empty() {
        return Err(Error::unknown_order(number));
    }
    let mut out = Vec::new();
    for o in &orders {
        let (policy, key) = (o.string(0)?, o.string(1)?);
        let object = format!("{policy} {key}");
        let mut say = |step: &'static str, detail: String| {
            out.push(Step {
                step,
                object: object.clone(),
                detail,
            })
        };
        let or_none = |i: usize| o.text(i).map(|t| t.unwrap_or("not yet").to_owned());
        say("flagged", format!("{} by {}", o.str(3)?, o.str(4)?));
        say("status", o.string(21)?);
        let plan = Plan::current(&policy);
        say(
            "anchor",
            format!(
                "{}{}",
                or_none(5)?,
                plan.as_ref().map(|p| origin(p, &key)).unwrap_or_default()
            ),
        );
        if let Some(from) = o.text(17)? {
            let until = if o.bool(18)? {
                "; until then it is only flagged and shown"
            } else {
                ""
            };
            say("effective", format!("from {from}{until}"));
        }
        say("archive", format!("due {}, done {}", or_none(6)?, or_none(7)?));
        let pushed = o
            .text(13)?
            .map(|by| format!(", pushed back by {by}"))
            .unwrap_or_default();
        let version = o.text(10)?.map(|v| format!(" under version {v}")).unwrap_or_default();
        say(
            "redact",
            format!("due {}{pushed}, done {}{version}", or_none(8)?, or_none(9)?),
        );
        if let Some(until) = o.text(11)? {
            say("retrieved", format!("until {until}"));
        }
        if let Some(original) = o.text(22)? {
            say(
                "follows",
                format!("the retrieval of order {original}, which it replaces"),
            );
        }
        if let Some(until) = o.text(12)? {
            say("held", format!("until {until}"));
        }
        if let Some(until) = o.text(23)? {
            say("archive held", format!("until {until}"));
        }
        if let Some(asked) = o.text(20)? {
            say("asked", asked.to_owned());
        }
        if let Some(at) = o.text(19)? {
            say("purged", format!("archive destroyed {at}"));
        }
        if let Some(error) = o.text(16)? {
            say(
                "failed",
                format!("{error}; {} attempts, next {}", o.str(14)?, or_none(15)?),
            );
        }
        if let Err(e) = &plan {
            say("policy", e.stored());
        }
        let records = as_extension(|| {
            sql::read(
                "SELECT r.table_name, r.record_key, r.status, r.version, s.witness FROM amazon_pii.records r \
                 LEFT JOIN amazon_pii.record_state s USING (policy, order_key, table_name, record_key) \
                 WHERE r.policy = $1 AND r.order_key = $2 ORDER BY r.table_name, r.record_key",
                &[Arg::Text(Some(&policy)), Arg::Text(Some(&key))],
            )
        })?;
        for r in &records {
            let alive = r
                .text(4)?
                .map(|w| format!(", kept alive by order {w}"))
                .unwrap_or_default();
            out.push(Step {
                step: "record",
                object: format!("{} {}", r.str(0)?, r.str(1)?),
                detail: match r.int(3)? {
                    0 => format!("{}, not archived{alive}", r.str(2)?),
                    version => format!("{}, archived version {version}{alive}", r.str(2)?),
                },
            });
        }
        for detail in queued::explained(&policy, &key)? {
            out.push(Step {
                step: "comes back",
                object: object.clone(),
                detail,
            });
        }
        for (object, detail) in files::explained(&policy, &key)? {
            out.push(Step {
                step: "file",
                object,
                detail,
            });
        }
    }
    Ok(out)
}

/// Which of the policy's anchors counts now.
fn origin(plan: &Plan, key: &str) -> String {
    let first_of_many = plan.anchors.len() > 1;
    let what = match plan.anchors.first() {
        Some(AnchorPlan::Linked { entry, .. }) => format!("the last of entry {}", plan.entries[*entry].alias),
        _ => "an expression over the order".to_owned(),
    };
    let exists = key_parts(key)
        .and_then(|k| flag::by_keys(plan, &[k]))
        .is_ok_and(|f| !f.is_empty());
    match (exists, first_of_many) {
        (false, _) => " (the order no longer matches the policy, or is gone)".to_owned(),
        (true, false) => format!(" ({what})"),
        (true, true) => format!(" (the first of {} anchors that is not null)", plan.anchors.len()),
    }
}
