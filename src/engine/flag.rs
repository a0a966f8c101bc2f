//! Which rows are Amazon orders, and when their clocks start.

use std::collections::{BTreeMap, HashSet};

use pgrx::pg_sys;

use super::news::{self, Tell};
use super::plan::{AnchorPlan, Plan};
use super::replacement;
use super::walk::{self, Values, down, key_text};
use crate::pg::error::Result;
use crate::pg::identity::{Identity, OWN_PATH, act_as, as_extension, on_keys};
use crate::pg::prepared;
use crate::pg::sql::{self, Arg, Row};
use crate::pg::subxact::subtransaction;
use crate::pg::trigger::TriggerCall;
use crate::pg::xact::timestamp_text;

/// A row of the orders table that is to be flagged.
#[derive(Debug, Clone)]
pub struct OrderFact {
    pub key: Values,
    pub key_text: String,
    pub number: Option<String>,
    /// The moment the clock starts, UTC; `None` while it has not.
    pub anchor: Option<String>,
    /// When it was placed, for orders whose clock never starts.
    pub placed: Option<String>,
    /// The moment before which it is not touched, where its own row says so.
    pub effective: Option<String>,
    /// The number of the order that it replaces.
    pub replaces: Option<String>,
}

/// The columns that decide about an order, in the order in which [`facts`] reads them.
pub(super) fn select(plan: &Plan) -> Vec<String> {
    let mut out = plan.orders().key_list();
    let or_null = |e: Option<String>| e.unwrap_or_else(|| "NULL::pg_catalog.text".to_owned());
    out.push(or_null(plan.number.as_ref().map(|n| format!("{n}::pg_catalog.text"))));
    out.push(plan.amazon.to_string());
    out.push(or_null(plan.replaces.as_ref().map(|r| format!("{r}::pg_catalog.text"))));
    out.push(
        plan.placed
            .clone()
            .unwrap_or_else(|| "NULL::pg_catalog.timestamptz".to_owned()),
    );
    for anchor in &plan.anchors {
        out.push(match anchor {
            AnchorPlan::Order(sql) => sql.clone(),
            AnchorPlan::Linked { complete, .. } => {
                complete.as_ref().map_or_else(|| "true".to_owned(), ToString::to_string)
            }
        });
    }
    out.extend(plan.effective.clone());
    out
}

/// The rows that may have to be flagged: Amazon's own, and those that replace another.
pub(super) fn candidates(plan: &Plan) -> String {
    match &plan.replaces {
        Some(replaces) => format!("({} OR {replaces} IS NOT NULL)", plan.amazon),
        None => plan.amazon.to_string(),
    }
}

/// Evaluates the rows of a trigger's transition table.
///
/// # Errors
/// Errors of the server or of the owner's expressions.
pub fn in_transition(plan: &Plan, call: &TriggerCall) -> Result<Vec<OrderFact>> {
    let table = plan.orders();
    let query = format!(
        "SELECT {} FROM amazon_pii_new AS {} WHERE {}",
        select(plan).join(", "),
        table.relation.name,
        candidates(plan)
    );
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        sql::in_trigger(call, &query, &[])
    })?;
    facts(plan, rows.iter().map(|r| (r, 0)))
}

/// Evaluates orders by their keys.
///
/// # Errors
/// As [`in_transition`].
pub fn by_keys(plan: &Plan, keys: &[Values]) -> Result<Vec<OrderFact>> {
    let mut select = select(plan);
    select.push(candidates(plan));
    let last = walk::FIRST + select.len() - 1;
    let found = walk::by_key(plan, plan.orders(), keys, &select)?;
    facts(
        plan,
        found
            .iter()
            .filter(|f| f.row.bool(last).unwrap_or(false))
            .map(|f| (&f.row, walk::FIRST)),
    )
}

/// Reads what [`select`] selected, and adds what linked rows say about the anchor.
pub(super) fn facts<'a>(plan: &Plan, rows: impl Iterator<Item = (&'a Row, usize)>) -> Result<Vec<OrderFact>> {
    let width = plan.orders().key.len();
    let mut candidates = Vec::new();
    for (row, base) in rows {
        let key = row.texts(base..base + width)?;
        let at = base + width;
        let fact = OrderFact {
            key_text: key_text(&key)?,
            key,
            number: row.owned(at)?,
            anchor: None,
            placed: row.owned(at + 3)?,
            effective: match plan.effective {
                Some(_) => row.owned(at + 4 + plan.anchors.len())?,
                None => None,
            },
            replaces: row.owned(at + 2)?,
        };
        candidates.push((fact, row, at));
    }
    // Each row is there once, and in most imports in the order of its key.
    if !candidates.is_sorted_by(|(a, ..), (b, ..)| by_length(&a.key_text) < by_length(&b.key_text)) {
        let mut seen = HashSet::new();
        candidates.retain(|(fact, ..)| seen.insert(fact.key_text.clone()));
    }
    let mut replaced = Vec::new();
    for (_, row, at) in &candidates {
        if !row.bool(at + 1)? {
            replaced.extend(row.text(at + 2)?);
        }
    }
    let flagged = flagged_numbers(plan, &replaced)?;
    let is_flagged = |row: &Row, at: usize| -> Result<bool> {
        Ok(row.bool(at + 1)? || row.text(at + 2)?.is_some_and(|r| flagged.contains(r)))
    };
    let mut kept = Vec::with_capacity(candidates.len());
    for (fact, row, at) in candidates {
        if is_flagged(row, at)? {
            kept.push((fact, row, at));
        }
    }
    let moments = linked_moments(plan, &kept)?;
    kept.into_iter()
        .enumerate()
        .map(|(order, (fact, row, at))| {
            let mut anchor = None;
            for (i, linked) in moments.iter().enumerate() {
                anchor = match linked {
                    None => row.owned(at + 4 + i)?,
                    Some(linked) if row.bool(at + 4 + i)? => linked.get(&order).cloned().flatten(),
                    Some(_) => None,
                };
                if anchor.is_some() {
                    break;
                }
            }
            Ok(OrderFact { anchor, ..fact })
        })
        .collect()
}

/// Numbers as text are in order among those of one length.
fn by_length(key: &str) -> (usize, &str) {
    (key.len(), key)
}

/// The last moment of orders' linked rows, by their place in a list of orders.
type Moments = BTreeMap<usize, Option<String>>;

/// For each anchor that is in linked rows what these say.
fn linked_moments(plan: &Plan, orders: &[(OrderFact, &Row, usize)]) -> Result<Vec<Option<Moments>>> {
    let mut inputs: Vec<Values> = Vec::new();
    let mut out = Vec::new();
    for anchor in &plan.anchors {
        out.push(match anchor {
            AnchorPlan::Order(_) => None,
            AnchorPlan::Linked { entry, at, filter, .. } => {
                if inputs.is_empty() {
                    inputs = orders.iter().map(|(fact, ..)| fact.key.clone()).collect();
                }
                Some(last_moments(plan, &inputs, *entry, at, filter.as_ref())?)
            }
        });
    }
    Ok(out)
}

/// The last moment of each order's linked rows; absent without a row, `None` while one has no moment.
fn last_moments(
    plan: &Plan,
    orders: &[Values],
    entry: usize,
    at: &str,
    filter: Option<&crate::pg::ident::Expr>,
) -> Result<Moments> {
    let mut out = Moments::new();
    for found in down(plan, orders, entry, &[at.to_owned()], filter)? {
        let moment = found.row.owned(walk::FIRST)?;
        out.entry(found.input)
            // UTC in ISO form sorts as text.
            .and_modify(|known| *known = known.take().zip(moment.clone()).map(|(a, b)| a.max(b)))
            .or_insert(moment);
    }
    Ok(out)
}

/// Which of these numbers belong to orders that are flagged.
fn flagged_numbers(plan: &Plan, numbers: &[&str]) -> Result<HashSet<String>> {
    if numbers.is_empty() {
        return Ok(HashSet::new());
    }
    let rows = as_extension(|| {
        sql::read(
            "SELECT DISTINCT order_number FROM amazon_pii.order_state WHERE policy = $1 AND order_number = ANY ($2)",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(numbers)],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// The rows that orders get when they are flagged. `OFFSET 0` keeps each moment from being worked out once for every column
/// that is made of it. Arrays side by side, and not in FROM, where the server would write each down first.
const ROWS: &str = "INSERT INTO amazon_pii.order_state AS o (policy, order_key, order_number, status, flagged_by, anchor_at, \
           archive_due_at, redact_due_at, next_due_at, stale_at) \
             SELECT $1, k, n, CASE WHEN a IS NULL THEN 'flagged' ELSE 'scheduled' END, $5, a, a + $6::interval, \
                    a + $7::interval, a + $6::interval, CASE WHEN a IS NULL THEN p + $9::interval END \
             FROM (SELECT k, n, p, CASE WHEN pg_catalog.isfinite(t) THEN t END AS a \
                   FROM (SELECT pg_catalog.unnest($2) AS k, pg_catalog.unnest($3) AS n, pg_catalog.unnest($4::timestamptz[]) AS t, \
                        pg_catalog.unnest($8::timestamptz[]) AS p) AS u OFFSET 0) AS s ";

/// [`ROWS`] of a policy under which an order may not be in effect yet: nothing is due before it is.
const DATED_ROWS: &str = "INSERT INTO amazon_pii.order_state AS o (policy, order_key, order_number, status, flagged_by, anchor_at, \
           archive_due_at, redact_due_at, next_due_at, stale_at, effective_at) \
             SELECT $1, k, n, CASE WHEN a IS NULL THEN 'flagged' ELSE 'scheduled' END, $5, a, \
                    CASE WHEN a IS NOT NULL THEN GREATEST(a + $6::interval, e) END, \
                    CASE WHEN a IS NOT NULL THEN GREATEST(a + $7::interval, e) END, \
                    CASE WHEN a IS NOT NULL THEN GREATEST(a + $6::interval, e) END, \
                    CASE WHEN a IS NULL AND p + $9::interval IS NOT NULL THEN GREATEST(p + $9::interval, e) END, e \
             FROM (SELECT k, n, p, CASE WHEN pg_catalog.isfinite(t) THEN t END AS a, \
                          NULLIF(GREATEST(f, $11::timestamptz), '-infinity') AS e \
                   FROM (SELECT pg_catalog.unnest($2) AS k, pg_catalog.unnest($3) AS n, pg_catalog.unnest($4::timestamptz[]) AS t, \
                        pg_catalog.unnest($8::timestamptz[]) AS p, pg_catalog.unnest($10::timestamptz[]) AS f) AS u OFFSET 0) AS s ";

/// Rows that were there before are looked up as they were before the statement; new ones need no such look.
const UP_TO_DATE: &str = "WHERE NOT EXISTS (SELECT FROM amazon_pii.order_state AS e WHERE e.policy = $1 AND e.order_key = s.k \
                AND e.status <> 'gone' AND e.order_number IS NOT DISTINCT FROM s.n AND (e.archived_at IS NOT NULL \
                     OR e.anchor_at IS NOT DISTINCT FROM s.a \
                        AND e.stale_at IS NOT DISTINCT FROM CASE WHEN s.a IS NULL THEN s.p + $9::interval END)) ";

/// [`UP_TO_DATE`] for [`DATED_ROWS`].
const DATED_UP_TO_DATE: &str = "WHERE NOT EXISTS (SELECT FROM amazon_pii.order_state AS e WHERE e.policy = $1 AND e.order_key = s.k \
                AND e.status <> 'gone' AND e.order_number IS NOT DISTINCT FROM s.n \
                AND (e.effective_at IS NOT DISTINCT FROM s.e OR e.status IN ('redacted', 'retrieved') OR e.asked IS NOT NULL) AND (e.archived_at IS NOT NULL \
                     OR e.anchor_at IS NOT DISTINCT FROM s.a AND e.stale_at IS NOT DISTINCT FROM \
                        CASE WHEN s.a IS NULL AND s.p + $9::interval IS NOT NULL THEN GREATEST(s.p + $9::interval, s.e) END)) ";

/// What becomes of orders that are known: which of them are looked at again, and what is told. A date of effect that moved
/// moves what is due, until the order is redacted.
fn known(again: &str, dated: bool) -> String {
    const MOVED: &str = "o.status NOT IN ('redacted', 'retrieved') AND o.asked IS NULL AND o.effective_at IS DISTINCT FROM EXCLUDED.effective_at";
    const DUE: &str =
        "GREATEST(COALESCE(o.anchor_at + $7::interval, o.stale_at, o.redact_due_at), EXCLUDED.effective_at";
    let [redact_due, next_due, set, changed] = if dated {
        [
            format!("WHEN {MOVED} THEN {DUE}) "),
            format!(
                "WHEN {MOVED} AND o.archived_at IS NULL THEN EXCLUDED.next_due_at WHEN {MOVED} THEN {DUE}, o.held_until) "
            ),
            format!(
                "effective_at = CASE WHEN o.status = 'gone' OR {MOVED} THEN EXCLUDED.effective_at ELSE o.effective_at END, \
                 pushed_by = CASE WHEN {MOVED} THEN NULL ELSE o.pushed_by END, "
            ),
            format!("OR ({MOVED}) "),
        ]
    } else {
        Default::default()
    };
    format!(
        "ON CONFLICT (policy, order_key) DO UPDATE SET \
                order_number = EXCLUDED.order_number, stale_at = EXCLUDED.stale_at, {set}\
                status = CASE WHEN o.status IN ('flagged', 'scheduled') AND o.archived_at IS NULL AND o.asked IS NULL OR o.status = 'gone' THEN EXCLUDED.status ELSE o.status END, \
                anchor_at = CASE WHEN o.archived_at IS NULL OR o.status = 'gone' THEN EXCLUDED.anchor_at ELSE o.anchor_at END, \
                archive_due_at = CASE WHEN o.archived_at IS NULL AND o.asked IS NULL OR o.status = 'gone' THEN EXCLUDED.archive_due_at ELSE o.archive_due_at END, \
                redact_due_at = CASE WHEN o.archived_at IS NULL AND o.asked IS NULL OR o.status = 'gone' THEN EXCLUDED.redact_due_at {redact_due}ELSE o.redact_due_at END, \
                archived_at = CASE WHEN o.status = 'gone' THEN NULL ELSE o.archived_at END, \
                redacted_version = CASE WHEN o.status <> 'gone' OR o.order_number IS NOT DISTINCT FROM EXCLUDED.order_number THEN o.redacted_version END, \
                redacted_at = CASE WHEN o.status = 'gone' THEN NULL ELSE o.redacted_at END, \
                redacted_first_at = CASE WHEN o.status = 'gone' THEN NULL ELSE o.redacted_first_at END, \
                purged_at = CASE WHEN o.status = 'gone' THEN NULL ELSE o.purged_at END, \
                next_due_at = CASE WHEN o.status IN ('flagged', 'scheduled') AND o.archived_at IS NULL AND o.asked IS NULL OR o.status = 'gone' THEN EXCLUDED.next_due_at \
                    {next_due}WHEN o.status = 'redacted' AND {again} THEN pg_catalog.now() ELSE o.next_due_at END \
             WHERE o.status = 'gone' OR o.order_number IS DISTINCT FROM EXCLUDED.order_number \
                OR (o.archived_at IS NULL AND o.anchor_at IS DISTINCT FROM EXCLUDED.anchor_at) \
                OR (o.archived_at IS NULL AND o.stale_at IS DISTINCT FROM EXCLUDED.stale_at) {changed}\
                OR (o.status = 'redacted' AND (o.next_due_at IS NULL OR o.next_due_at > pg_catalog.now()) AND {again}\
         ) RETURNING o.order_key, o.status, o.xmax = 0 AS is_new), \
     changed AS (SELECT w.order_key, CASE WHEN w.is_new THEN 'flagged' ELSE (SELECT CASE WHEN b.status = 'gone' THEN 'flagged' \
            WHEN b.status = 'flagged' AND w.status = 'scheduled' THEN 'scheduled' END FROM amazon_pii.order_state AS b \
         WHERE b.policy = $1 AND b.order_key = w.order_key) END AS news FROM written AS w) "
    )
}

/// Writes what was found: new orders are flagged, clocks of those that are not archived yet follow their anchor, and
/// with `touched` redacted ones are looked at again by the next cycle. Returns the number of newly flagged orders, where
/// it is the one that tells.
///
/// # Errors
/// Errors of the server.
pub fn upsert(plan: &Plan, facts: &[OrderFact], by: &str, touched: bool, tell: Tell) -> Result<i64> {
    if facts.is_empty() {
        return Ok(0);
    }
    let flagged = write(plan, facts, by, touched, tell)?;
    if plan.replaces.is_some() {
        replacement::follow(plan, &facts.iter().collect::<Vec<_>>())?;
    }
    Ok(flagged)
}

fn write(plan: &Plan, facts: &[OrderFact], by: &str, touched: bool, tell: Tell) -> Result<i64> {
    // Neighbours in the index, one after the other.
    let mut facts: Vec<&OrderFact> = facts.iter().collect();
    facts.sort_by(|a, b| a.key_text.cmp(&b.key_text));
    let interval = |text| Arg::Typed(pg_sys::INTERVALOID, text);
    let dated = plan.is_dated();
    let from = plan.document.effective_from.map(timestamp_text);
    let mut args = vec![
        Arg::Text(Some(&plan.policy)),
        Arg::Texts(facts.iter().map(|f| Some(f.key_text.as_str())).collect()),
        Arg::Texts(facts.iter().map(|f| f.number.as_deref()).collect()),
        Arg::Texts(facts.iter().map(|f| f.anchor.as_deref()).collect()),
        Arg::Text(Some(by)),
        interval(Some(plan.document.archive_after.as_str())),
        interval(Some(plan.document.redact_after.as_str())),
        Arg::Texts(facts.iter().map(|f| f.placed.as_deref()).collect()),
        interval(plan.document.orders.stale_after.as_deref()),
    ];
    if dated {
        args.push(Arg::Texts(facts.iter().map(|f| f.effective.as_deref()).collect()));
        args.push(Arg::Text(from.as_deref()));
    }
    let (rows, up_to_date) = if dated {
        (DATED_ROWS, DATED_UP_TO_DATE)
    } else {
        (ROWS, UP_TO_DATE)
    };
    if facts.len() >= MANY && matches!(tell, Tell::Later) && !any_known(plan, &facts)? {
        match subtransaction(|| insert(plan, &facts, rows, &args)) {
            // One was known after all.
            Err(e) if e.is_duplicate() => {}
            done => return done.map(|()| 0),
        }
    }
    // A conflict locks its row even where nothing changes, and waits for whoever has it: a sweep leaves out what is up to
    // date. Not so a trigger, which must see what a cycle is doing to the order.
    let (only, again) = if touched { ("", "true") } else { (up_to_date, "false") };
    let statement = |end| ["WITH written AS (", rows, only, &known(again, dated), end].concat();
    match tell {
        Tell::Now => {
            let told = statement("SELECT order_key, news FROM changed WHERE news IS NOT NULL");
            news::tell(
                &plan.policy,
                &act_as(Identity::Extension, OWN_PATH, SWEPT, || sql::write(&told, &args))?,
            )
        }
        Tell::Later if touched => prepared::execute(&statement(news::NOTE), &args).map(|_| 0),
        // May be planned in several ways.
        Tell::Later => act_as(Identity::Extension, OWN_PATH, SWEPT, || {
            sql::execute(&statement(news::NOTE), &args)
        })
        .map(|_| 0),
    }
}

/// As for keys; and while the states seem to be few they are not to be read once and kept, and compared with each order.
const SWEPT: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
    ("enable_material", "off"),
];

/// Flags orders none of which is known. An index that finds one ends it.
fn insert(plan: &Plan, facts: &[&OrderFact], rows: &str, args: &[Arg<'_>]) -> Result<()> {
    on_keys(|| sql::execute(rows, args))?;
    let keys: Vec<&str> = facts.iter().map(|f| f.key_text.as_str()).collect();
    news::flagged(&plan.policy, &keys)
}

/// From this many orders on it pays to try whether all of them are new: a row that may conflict costs a second look at the
/// index, and a second record in the log.
const MANY: usize = 1000;

/// Whether any of some of these orders is known.
fn any_known(plan: &Plan, facts: &[&OrderFact]) -> Result<bool> {
    let some: Vec<&str> = facts
        .iter()
        .step_by(facts.len().div_ceil(20))
        .map(|f| f.key_text.as_str())
        .collect();
    let rows = on_keys(|| {
        sql::read(
            "SELECT true FROM amazon_pii.order_state WHERE policy IS NOT DISTINCT FROM $1 AND order_key = ANY ($2) LIMIT 1",
            &[Arg::Text(Some(&plan.policy)), Arg::texts(&some)],
        )
    })?;
    Ok(!rows.is_empty())
}
