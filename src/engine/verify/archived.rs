//! The archive from one end to the other, in the order of the orders' keys.

use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;

use crate::domain::sought;
use crate::domain::treatment::Outcome;
use crate::domain::vault::MasterKeys;
use crate::domain::words::{Hashing, Sought};
use crate::engine::plan::{Plan, Table};
use crate::engine::vault::{self, Newest, OrderArchive};
use crate::engine::walk::key_parts;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{Identity, OWN_PATH, act_as, as_extension};
use crate::pg::sql::{self, Arg};

/// Orders in one page.
const PAGE: i64 = 500;

/// Bytes of sealed documents that are opened together, one order's at least.
const TOGETHER: usize = 16 << 20;

/// The orders whose personal data should be gone. What was retrieved is back rightfully.
const GONE: &str = "(o.status = 'redacted' OR (o.status = 'gone' AND o.redact_due_at <= pg_catalog.now()))";

/// How many orders there are to look for.
///
/// # Errors
/// Errors of the server.
pub(super) fn count(plan: &Plan) -> Result<i64> {
    let rows = as_extension(|| {
        sql::read(
            &format!("SELECT pg_catalog.count(*) FROM amazon_pii.order_state o WHERE o.policy = $1 AND {GONE}"),
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    rows.first().ok_or_else(|| Error::internal("no row"))?.int(0)
}

/// Tables of which a key has changed and the archive has yet to follow, with the number of orders.
///
/// # Errors
/// Errors of the server.
pub(super) fn moved(plan: &Plan) -> Result<Vec<(String, i64)>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT n.table_name, pg_catalog.count(DISTINCT COALESCE(n.order_key, n.new_key)) FROM amazon_pii.renamed n \
             WHERE n.policy = $1 GROUP BY 1 ORDER BY 1",
            &[Arg::Text(Some(&plan.policy))],
        )
    })?;
    rows.iter().map(|r| Ok((r.string(0)?, r.int(1)?))).collect()
}

/// Calls `f` with the archive of each order whose key comes after `after` and not after `upto`, until it breaks off.
///
/// # Errors
/// As `f`; the archive cannot be read.
pub(super) fn each(
    plan: &Plan,
    master: &MasterKeys,
    after: Option<&str>,
    upto: Option<&str>,
    mut f: impl FnMut(&str, &OrderArchive) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let mut after = after.map(str::to_owned);
    loop {
        let keys = page(plan, after.as_deref(), upto)?;
        let sizes = vault::sizes(&plan.archive, &plan.policy, &keys)?;
        let mut rest = keys.as_slice();
        let mut sizes = sizes.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(together(sizes));
            sizes = &sizes[now.len()..];
            rest = later;
            let cold = vault::fetch(&plan.archive, &plan.policy, now)?;
            let archives = vault::open(&plan.archive, master, &plan.policy, now, &cold)?;
            for key in now {
                let Some(archive) = archives.get(key) else { continue };
                if f(key, archive)?.is_break() {
                    return Ok(());
                }
            }
        }
        match keys.into_iter().next_back() {
            Some(last) => after = Some(last),
            None => return Ok(()),
        }
    }
}

/// How many of the first orders are opened together.
fn together(sizes: &[usize]) -> usize {
    let mut sum = 0;
    let fit = sizes.iter().take_while(|size| {
        sum += **size;
        sum <= TOGETHER
    });
    fit.count().max(1)
}

/// The keys of the next orders, by the primary key.
fn page(plan: &Plan, after: Option<&str>, upto: Option<&str>) -> Result<Vec<String>> {
    let pins = &[
        ("enable_seqscan", "off"),
        ("enable_sort", "off"),
        ("enable_bitmapscan", "off"),
    ];
    let rows = act_as(Identity::Extension, OWN_PATH, pins, || {
        sql::read(
            &format!(
                "SELECT o.order_key FROM amazon_pii.order_state o WHERE o.policy = $1 AND o.order_key > $2 \
                 AND ($3::text IS NULL OR o.order_key <= $3) AND {GONE} ORDER BY o.order_key LIMIT $4"
            ),
            &[
                Arg::Text(Some(&plan.policy)),
                // Keys are JSON arrays: all come after the empty text.
                Arg::Text(Some(after.unwrap_or(""))),
                Arg::Text(upto),
                Arg::Int(PAGE),
            ],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// What redaction itself writes: found everywhere, and nobody's.
pub(super) fn own_words(plan: &Plan) -> impl Iterator<Item = &str> {
    let constants = plan
        .tables
        .iter()
        .flat_map(|t| &t.cells)
        .filter_map(|c| c.treatment.as_ref()?.constant());
    std::iter::once(plan.document.placeholder.as_str())
        .chain(plan.document.also_redacted.iter().map(String::as_str))
        .chain(constants)
}

/// One order's archive, as it is looked for.
pub(super) struct Archived {
    pub sought: HashSet<Sought>,
    /// Its rows in the shop's tables.
    pub rows: Vec<u64>,
    /// Tables of documents that could not be opened.
    pub unopened: BTreeSet<String>,
}

impl Archived {
    pub(super) fn of(plan: &Plan, hashing: &Hashing, ours: &HashSet<Sought>, archive: &OrderArchive) -> Self {
        let mut out = Self {
            sought: HashSet::new(),
            rows: Vec::new(),
            unopened: BTreeSet::new(),
        };
        for (table, key, newest) in archive.records() {
            out.rows.push(hashing.row(table, key));
            if newest.damaged || newest.is_empty() {
                out.unopened.insert(table.to_owned());
            }
            let known = plan.tables.iter().find(|t| t.archived_as == table);
            record(known, key, newest, |text| {
                out.sought.extend(hashing.sought(text).filter(|s| !ours.contains(s)));
            });
        }
        out
    }
}

/// Calls `f` with each text that redaction took from a record, in whichever version.
fn record(table: Option<&Table>, key: &str, newest: &Newest, mut f: impl FnMut(&str)) {
    let key = key_parts(key).unwrap_or_default();
    for archived in newest.cells() {
        let cell = table.and_then(|t| {
            let at = t.cells.iter().position(|c| c.archived_as == archived.name)?;
            t.cells[at].treatment.as_ref()
        });
        for text in newest.versions(archived.name) {
            // One that cannot be treated any more went as a whole.
            let treated = cell.map(|c| c.apply(Some(text), &key).unwrap_or(Outcome::Null));
            sought::texts(archived.type_name, text, treated.as_ref(), &mut f);
        }
    }
}
