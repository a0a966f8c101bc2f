//! What triggers could not see: keys they could only note, existing orders at the first enabling, changes made while
//! triggers were off. In slices, each a transaction of its own. A slice whose sum is what it was when its orders were
//! compared one by one is left at that.

mod recheck;
mod slices;

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::due::Clock;
use super::flag;
use super::news::Tell;
use super::paging::{self, End, Page, Range, Sum};
use super::plan::Plan;
use super::state;
use super::walk::{Values, key_parts, key_text};
use crate::domain::policy::Stale;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::subtransaction;
use slices::Known;
pub use slices::forget as forget_sums;

/// Orders in one slice. One that grew to twice as many is split.
const SLICE: i64 = 10_000;

/// Orders that are evaluated together where some of a slice cannot be.
const SMALL: i64 = 1000;

/// How long slices are left at their sums before what was found is committed.
const STRETCH: Duration = Duration::from_millis(200);

/// Asks for a full pass now, whatever the last one's date.
///
/// # Errors
/// Errors of the server.
pub fn request(plan: &Plan) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET sweep_started_at = pg_catalog.clock_timestamp(), sweep_after = NULL, rechecked_at = NULL \
             WHERE policy = $1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    Ok(())
}

/// What a slice did.
#[derive(Default)]
pub struct Slice {
    /// Orders that are new.
    pub flagged: i64,
    /// The error of a row that could not be evaluated.
    pub trouble: Option<Error>,
}

/// Rows of a slice that may fail; when more do, it is the policy that is wrong, not a row.
const BAD_ROWS: usize = 20;

/// The orders of the next slice. When they cannot be evaluated together they are one by one, and those that fail are
/// noted: a bad row keeps no other from being flagged.
///
/// A known slice ends where it did, unless it has grown too much.
fn page(plan: &Plan, range: Range<'_>, known: bool) -> Result<(Page, Option<Error>)> {
    let mut error = None;
    let most = if known { 2 * SLICE } else { SLICE };
    for limit in [most, SLICE, SMALL] {
        match subtransaction(|| paging::page(plan, range, limit)) {
            Ok(page) if limit > SLICE && page.next.is_some() => {}
            Ok(page) => return Ok((page, None)),
            Err(e) if e.is_cancel() || e.is_lock() => return Err(e),
            Err(e) => error = Some(e),
        }
    }
    let (keys, next) = paging::page_of_keys(plan, End::First, range, SMALL)?;
    let (mut facts, mut bad) = (Vec::new(), Vec::new());
    for key in keys {
        match subtransaction(|| flag::by_keys(plan, std::slice::from_ref(&key))) {
            Ok(found) => facts.extend(found),
            Err(e) if e.is_cancel() || e.is_lock() || bad.len() >= BAD_ROWS => return Err(e),
            Err(_) => bad.push(key_text(&key)?),
        }
    }
    as_extension(|| {
        sql::execute(
            "INSERT INTO amazon_pii.touched (policy, entry, row_key, error) SELECT $1, '', k, $3 FROM pg_catalog.unnest($2) AS k \
             WHERE NOT EXISTS (SELECT FROM amazon_pii.touched t WHERE t.policy = $1 AND t.entry = '' AND t.row_key = k)",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::texts(&bad),
                Arg::Text(error.as_ref().map(Error::stored).as_deref()),
            ],
        )
    })?;
    let page = Page { facts, next, sum: None };
    Ok((page, error))
}

/// Does the next slice of a pass that is due or under way; `None` when there is none. Returns how many orders are new.
///
/// # Errors
/// Errors of the server or of the owner's expressions; the pass goes on there with the next cycle.
pub fn slice(plan: &Plan, clock: &Clock) -> Result<Option<Slice>> {
    let rows = as_extension(|| {
        sql::write(
            "SELECT COALESCE(sweep_started_at > swept_at, sweep_started_at IS NOT NULL), \
                    swept_at IS NULL OR swept_at <= $2::timestamptz - '1 day'::interval, sweep_after, rechecked_at IS NULL, swept_at IS NULL, version \
             FROM amazon_pii.policy WHERE policy = $1 FOR UPDATE",
            &[Arg::Text(Some(&plan.policy)), Arg::Text(Some(&clock.now))],
        )
    })?;
    let row = rows
        .first()
        .ok_or_else(|| Error::undefined(format!("policy \"{}\" was dropped", plan.policy)))?;
    // What a new version has asked for is not done by the old one.
    if row.int(5)? != plan.version {
        return Ok(None);
    }
    let (under_way, due) = (row.bool(0)?, row.bool(1)?);
    if !under_way && !due {
        return recheck::step(plan, clock);
    }
    let after = row.owned(2)?.filter(|_| under_way);
    let trust = match (row.bool(4)?, row.bool(3)?) {
        // On the first pass, and on the first after orders were given up as a whole, no sum says anything.
        (true, _) => Trust::None,
        (false, true) => Trust::Sums,
        (false, false) => Trust::Rest,
    };
    let (mut done, next) = pass(plan, after, trust)?;
    let finished = next.is_none();
    as_extension(|| {
        sql::execute(
            "UPDATE amazon_pii.policy SET sweep_started_at = CASE WHEN $2 THEN sweep_started_at ELSE pg_catalog.clock_timestamp() END, \
                sweep_after = CASE WHEN $3 THEN NULL ELSE $4 END, \
                swept_at = CASE WHEN $3 THEN pg_catalog.clock_timestamp() ELSE swept_at END \
             WHERE policy = $1",
            &[
                Arg::Text(Some(&plan.policy)),
                Arg::Bool(under_way),
                Arg::Bool(finished),
                Arg::Text(next.as_deref()),
            ],
        )
    })?;
    if finished {
        done.flagged += recheck::begin(plan, clock, row.bool(3)?)?;
        slices::tidy(plan)?;
        trim()?;
    }
    Ok(Some(done))
}

/// How much a pass relies on what the last ones found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    None,
    /// Every sum is made anew.
    Sums,
    /// Those of slices in which nothing has changed for weeks once a week only: what is imported now is elsewhere.
    Rest,
}

/// Goes on after a key (none: from the beginning), and says where it came to (none: to the end).
fn pass(plan: &Plan, after: Option<String>, trust: Trust) -> Result<(Slice, Option<String>)> {
    let stamp = paging::stamp(plan);
    let chain = match stamp {
        Some(stamp) => slices::chain(plan, stamp, after.as_deref())?,
        None => Vec::new(),
    };
    let known = if trust == Trust::None {
        0
    } else {
        unchanged(plan, after.as_deref(), &chain, trust)?
    };
    if let Some(last) = known.checked_sub(1).and_then(|i| chain.get(i)) {
        return Ok((Slice::default(), last.upto.clone()));
    }
    // Order by order: as many known slices as make one, or whatever comes next.
    let mut orders = 0;
    let mut together = chain
        .iter()
        .take_while(|slice| {
            orders += slice.sum.rows;
            orders <= SLICE
        })
        .count()
        .max(1);
    let start = parts(after.as_deref())?;
    let (page, trouble, bound) = loop {
        let bound = chain.get(together - 1).and_then(|s| s.upto.as_deref());
        let end = parts(bound)?;
        let range = Range {
            after: start.as_ref(),
            upto: end.as_ref(),
        };
        let (page, trouble) = page(plan, range, !chain.is_empty())?;
        // One that has become empty is united with the next, so that each slice leads on to greater keys.
        if bound.is_none() || page.sum.is_none_or(|sum| sum.rows > 0) {
            break (page, trouble, bound);
        }
        together += 1;
    };
    let covered = &chain[..together.min(chain.len())];
    let next = match &page.next {
        Some(key) => Some(key_text(key)?),
        None => bound.map(str::to_owned),
    };
    let flagged = flag::upsert(plan, &page.facts, "sweep", false, Tell::Now)?;
    if let Some(stamp) = stamp {
        let after = after.as_deref();
        let sum = page.sum.filter(|_| trouble.is_none());
        slices::replace(plan, stamp, after, covered, next.as_deref(), sum)?;
        // What is left of a slice still ends where it did, or all that come after it would begin elsewhere.
        if let (Some(next), Some(bound)) = (next.as_deref(), bound)
            && next != bound
        {
            slices::replace(plan, stamp, Some(next), &[], Some(bound), None)?;
        }
    }
    Ok((Slice { flagged, trouble }, next))
}

thread_local! {
    /// How many slices are summed up by one statement: their sums add up to its own. All that are known where nothing has
    /// changed; where something has, one, or some of many, and then twice as many each time.
    static STRIDE: Cell<usize> = const { Cell::new(slices::AHEAD as usize) };
}

/// From more slices than these on, it pays to see first whether the last of them has changed: what is new comes at the end.
const MANY: usize = 64;

/// How many of these slices, from the first on, are what they were when their orders were compared.
fn unchanged(plan: &Plan, after: Option<&str>, chain: &[Known], trust: Trust) -> Result<usize> {
    let began = Instant::now();
    let (mut at, mut count, mut seen) = (after, 0, Vec::new());
    let trusted = |slice: &Known| trust == Trust::Rest && slice.settled && slice.seen;
    while let Some(slice) = chain.get(count) {
        if !slice.fresh || (count > 0 && began.elapsed() > STRETCH) {
            break;
        }
        if trusted(slice) {
            at = slice.upto.as_deref();
            count += 1;
            continue;
        }
        let stride = STRIDE.get();
        let group = chain[count..].iter().take(stride);
        let group = group.take_while(|s| s.fresh && !trusted(s)).count();
        let group = shortened(plan, &chain[count..count + group])?;
        if !same(plan, at, group)? {
            STRIDE.set(if group.len() > MANY { MANY } else { 1 });
            if group.len() == 1 {
                break;
            }
            continue;
        }
        STRIDE.set((2 * stride).min(slices::AHEAD as usize));
        for slice in group {
            if slice.settled {
                seen.push(at.unwrap_or_default());
            }
            at = slice.upto.as_deref();
        }
        count += group.len();
    }
    slices::seen(plan, &seen)?;
    Ok(count)
}

/// Many slices without those at their end that have changed: a look at the last of them is cheap beside one at all.
fn shortened<'a>(plan: &Plan, mut group: &'a [Known]) -> Result<&'a [Known]> {
    while group.len() > MANY {
        let (before, last) = group.split_at(group.len() - 1);
        let after = before.last().and_then(|s| s.upto.as_deref());
        if same(plan, after, last)? {
            break;
        }
        group = &group[..group.len() - (group.len() / 8).max(1)];
    }
    Ok(group)
}

/// Whether the sum of slices, each of which begins where the one before it ends, is what it was.
fn same(plan: &Plan, after: Option<&str>, slices: &[Known]) -> Result<bool> {
    let Some(last) = slices.last() else { return Ok(true) };
    let (after, upto) = (parts(after)?, parts(last.upto.as_deref())?);
    let range = Range {
        after: after.as_ref(),
        upto: upto.as_ref(),
    };
    let known = Sum {
        rows: slices.iter().map(|s| s.sum.rows).sum(),
        digest: slices.iter().map(|s| s.sum.digest).sum(),
    };
    // One that cannot be summed up has a row that cannot be evaluated, which is for the slow way to find.
    match subtransaction(|| paging::sum(plan, range, slices.len() > MANY)) {
        Err(e) if e.is_cancel() || e.is_lock() => Err(e),
        sum => Ok(sum.is_ok_and(|s| s == Some(known))),
    }
}

fn parts(key: Option<&str>) -> Result<Option<Values>> {
    key.map(key_parts).transpose()
}

/// Cycles of more than thirteen months ago are nobody's business any more.
fn trim() -> Result<()> {
    as_extension(|| {
        sql::execute(
            "DELETE FROM amazon_pii.run WHERE started_at < pg_catalog.now() - '13 months'::interval",
            &[],
        )
    })?;
    Ok(())
}

/// Orders whose clock never started although they were placed long ago: announced, or due at once where the policy
/// says so.
///
/// # Errors
/// Errors of the server.
pub fn stale(plan: &Plan) -> Result<()> {
    if plan.placed.is_none() || plan.document.orders.stale_after.is_none() {
        return Ok(());
    }
    let redact = matches!(plan.document.orders.stale, Stale::Redact);
    let keys = as_extension(|| {
        let statement = if redact {
            "UPDATE amazon_pii.order_state SET status = 'scheduled', archive_due_at = stale_at, redact_due_at = stale_at, \
                next_due_at = stale_at WHERE policy = $1 AND status = 'flagged' AND stale_at <= pg_catalog.now() RETURNING order_key"
        } else {
            "SELECT order_key FROM amazon_pii.order_state WHERE policy = $1 AND status = 'flagged' AND stale_at <= pg_catalog.now()"
        };
        let rows = sql::write(statement, &[Arg::Text(Some(&plan.policy))])?;
        rows.iter().map(|r| r.string(0)).collect::<Result<Vec<_>>>()
    })?;
    state::announce_keys(&plan.policy, "stale", &keys)
}
