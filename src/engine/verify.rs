//! Looks for personal data that should be gone: archived values of redacted orders, compared with the texts of tables.
//!
//! A pass puts the archived values of as many orders as memory allows into a filter, as hashes; looks up every run of words
//! of every searched column in it, and marks what it finds; then reads the archive of these orders once more, and counts
//! those of which a value was marked. Memory is bounded by `maintenance_work_mem` however many orders there are: where it
//! is too little for all of them, there are several passes.

mod archived;
mod places;
mod progress;
mod rightful;
mod scan;

use std::collections::{BTreeMap, HashSet};
use std::ops::ControlFlow;
use std::rc::Rc;

use super::alive;
use super::audit::AuditEntry;
use super::plan::Plan;
use crate::domain::filter::{Filter, mix};
use crate::domain::vault::MasterKeys;
use crate::domain::words::{Hashing, Sought};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, current_role, has_role, require_role};
use crate::pg::sql;
use crate::pg::{guc, keys};
use crate::worker::evidence;
use archived::Archived;
use places::Place;
use progress::Progress;

/// Values and rows that an order has on average, for the first guess of a filter's size.
const ENTRIES_EACH: usize = 32;

/// A filter that small costs nothing, in bytes: a few orders may have many values.
const SMALL: usize = 8 << 20;

/// How a problem begins that is personal data.
const FOUND: &str = "personal data found";

/// Columns that the log lists.
const NOTED: usize = 100;

/// How far the search goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The policy's own tables.
    Linked,
    /// All tables of their schemas.
    Schema,
    /// All tables of the database.
    Database,
}

impl Scope {
    const WORDS: [(&str, Self); 3] = [
        ("linked", Self::Linked),
        ("schema", Self::Schema),
        ("database", Self::Database),
    ];

    fn of(word: &str) -> Result<Self> {
        let found = Self::WORDS.iter().find(|(w, _)| *w == word);
        found.map(|(_, scope)| *scope).ok_or_else(|| {
            Error::invalid(format!("unknown scope \"{word}\"")).hint("It is linked, schema or database.")
        })
    }
}

/// A line of the result: a column in which something was found, or what could not be searched.
pub struct Finding {
    pub table: String,
    pub column: Option<String>,
    pub problem: String,
    pub orders: Option<i64>,
}

/// Searches the tables in `scope` for archived values of redacted orders. Hands out no value; changes nothing.
///
/// # Errors
/// The policy does not exist, the archive or the master key cannot be read, or the access could not be recorded.
pub fn verify(policy: &str, scope: &str) -> Result<Vec<Finding>> {
    require_role(&["amazon_pii_admin", "amazon_pii_auditor"], "verify a policy")?;
    let word = scope;
    let scope = Scope::of(word)?;
    let plan = Plan::current(policy)?;
    let master = keys::master_keys()?;
    // All of the archive is opened: that is an access like any other.
    evidence::record(&AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        detail: Some(format!("scope {word}")),
        ..AuditEntry::new("verify")?
    })?;
    // Who may write to a table could put guesses into it, and learn which of them are somebody's name.
    let guesser = (!has_role("amazon_pii_admin")).then(current_role);
    let places = places::find(&plan, scope, guesser)?;
    let mut search = Search::new(&plan, &master, places)?;
    let mut after = None;
    while let Some(upto) = search.pass(after.as_deref())? {
        after = Some(upto);
    }
    let found = search.findings();
    note(&plan, word, &found)?;
    Ok(found)
}

/// The result goes into the log, too: counts by column, for whoever asks for evidence later. The search is not lost where that
/// cannot be.
fn note(plan: &Plan, scope: &str, findings: &[Finding]) -> Result<()> {
    let (found, not_searched): (Vec<_>, Vec<_>) = findings.iter().partition(|f| f.problem.starts_with(FOUND));
    let listed = found
        .iter()
        .take(NOTED)
        .map(|f| serde_json::json!({ "table": f.table, "column": f.column, "orders": f.orders }));
    let detail = serde_json::json!({
        "scope": scope,
        "columns_with_personal_data": found.len(),
        "columns": listed.collect::<Vec<_>>(),
        "not_searched": not_searched.len(),
    });
    let noted = evidence::record(&AuditEntry {
        policy: Some(plan.policy.clone()),
        policy_version: Some(plan.version),
        detail: Some(detail.to_string()),
        ..AuditEntry::new("verify_result")?
    });
    match noted {
        Err(e) if e.is_cancel() => Err(e),
        Err(e) => {
            pgrx::warning!("the result could not be recorded: {}", e.stored());
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// A column that is searched, over all passes.
#[derive(Default)]
struct Counted {
    orders: i64,
    /// Something was marked in this pass.
    hit: bool,
    /// Marks that it may still make in this pass.
    left: usize,
    /// It would have needed more.
    cut: bool,
    /// A value of it could not be read.
    too_large: bool,
}

/// One call.
struct Search<'a> {
    plan: &'a Plan,
    others: Vec<Rc<Plan>>,
    master: &'a MasterKeys,
    hashing: Hashing,
    /// What redaction itself writes.
    ours: HashSet<Sought>,
    places: Vec<Place>,
    /// For each place its columns.
    counted: Vec<Vec<Counted>>,
    /// Places that could not be read, with the reason.
    unread: BTreeMap<usize, String>,
    /// Orders of which a document could not be opened, by its table.
    unopened: BTreeMap<String, i64>,
    /// Orders whose documents are under another key than their rows until the next cycle, by table.
    moved: Vec<(String, i64)>,
    /// What is looked for in this pass.
    sought: Filter,
    /// What was found of it: where, or that somebody has it rightfully.
    marks: Filter,
    progress: Progress,
}

impl<'a> Search<'a> {
    fn new(plan: &'a Plan, master: &'a MasterKeys, places: Vec<Place>) -> Result<Self> {
        let orders = archived::count(plan)?;
        let wanted = Filter::bytes_for(
            usize::try_from(orders)
                .unwrap_or(usize::MAX)
                .saturating_mul(ENTRIES_EACH),
        );
        let bytes = wanted.max(SMALL).min(guc::maintenance_memory() / 2);
        let hashing = Hashing::new();
        Ok(Self {
            plan,
            others: alive::other_policies(plan)?,
            master,
            ours: archived::own_words(plan).filter_map(|w| hashing.sought(w)).collect(),
            hashing,
            counted: places
                .iter()
                .map(|p| p.columns.iter().map(|_| Counted::default()).collect())
                .collect(),
            unread: BTreeMap::new(),
            unopened: BTreeMap::new(),
            moved: archived::moved(plan)?,
            places,
            sought: Filter::with_bytes(bytes),
            marks: Filter::with_bytes(bytes),
            progress: Progress::begin(&plan.policy, orders),
        })
    }

    /// One pass, over orders whose key comes after `after`. Returns the last one that it was about, or `None` when there
    /// is no other.
    fn pass(&mut self, after: Option<&str>) -> Result<Option<String>> {
        let last = self.collect(after)?;
        if self.sought.entries() > 0 {
            for place in 0..self.places.len() {
                self.look_through(place)?;
            }
            if self.counted.iter().flatten().any(|c| c.hit) {
                self.count(after, last.as_deref())?;
            }
        }
        self.sought.clear();
        self.marks.clear();
        self.counted.iter_mut().flatten().for_each(|c| c.hit = false);
        Ok(last)
    }

    /// Puts the archived values of the next orders into the filter. Returns the last order that had room, if there is one
    /// after it.
    fn collect(&mut self, after: Option<&str>) -> Result<Option<String>> {
        let (plan, master) = (self.plan, self.master);
        let mut last = None;
        archived::each(plan, master, after, None, |key, archive| {
            self.progress.order()?;
            let archived = Archived::of(plan, &self.hashing, &self.ours, archive);
            for table in archived.unopened {
                *self.unopened.entry(table).or_default() += 1;
            }
            let hashes = archived.sought.iter().flat_map(Sought::hashes).chain(archived.rows);
            hashes.for_each(|h| _ = self.sought.insert(h));
            if self.sought.is_full() {
                last = Some(key.to_owned());
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(last)
    }

    /// Searches one table; one that cannot be read is part of the result.
    fn look_through(&mut self, place: usize) -> Result<()> {
        if self.places[place].unsearched.is_some() || self.unread.contains_key(&place) {
            return Ok(());
        }
        let share = (self.marks.capacity().saturating_sub(self.marks.entries())) / 2;
        let columns = &mut self.counted[place];
        let each = (share / columns.len().max(1)).max(1);
        columns.iter_mut().for_each(|c| c.left = each);
        match scan::table(self, place) {
            Err(e) if e.is_cancel() => Err(e),
            Err(e) => {
                self.unread.insert(place, e.shown());
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Notes that something was found in a column.
    fn mark(&mut self, place: usize, column: usize, hash: u64) {
        let mark = in_column(place, column, hash);
        let counted = &mut self.counted[place][column];
        if counted.left > 0 {
            counted.hit = true;
            counted.left -= usize::from(self.marks.insert(mark));
        } else if !self.marks.contains(mark) {
            counted.cut = true;
        }
    }

    /// Notes that somebody has it rightfully.
    fn leave_out(&mut self, hash: u64) {
        self.marks.insert(left_out(hash));
    }

    fn is_left_out(&self, hash: u64) -> bool {
        self.marks.contains(left_out(hash))
    }

    /// Counts the orders of which something was marked.
    fn count(&mut self, after: Option<&str>, upto: Option<&str>) -> Result<()> {
        let (plan, master) = (self.plan, self.master);
        archived::each(plan, master, after, upto, |_, archive| {
            self.progress.counting()?;
            let mut sought = Archived::of(plan, &self.hashing, &self.ours, archive).sought;
            sought.retain(|s| !s.is_there(|h| self.is_left_out(h)));
            for (place, columns) in self.counted.iter_mut().enumerate() {
                for (column, counted) in columns.iter_mut().enumerate().filter(|(_, c)| c.hit) {
                    let there = |h| self.marks.contains(in_column(place, column, h));
                    counted.orders += i64::from(sought.iter().any(|s| s.is_there(there)));
                }
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    fn findings(self) -> Vec<Finding> {
        let (mut found, mut unsearched) = (Vec::new(), Vec::new());
        for (at, (place, counted)) in self.places.iter().zip(&self.counted).enumerate() {
            let finding = |column: Option<&str>, problem: &str, orders| Finding {
                table: place.relation.shown(),
                column: column.map(str::to_owned),
                problem: problem.to_owned(),
                orders,
            };
            let not = |column, why: &str| finding(column, &format!("not searched: {why}"), None);
            for (column, c) in place.columns.iter().zip(counted) {
                let name = Some(column.name.bare());
                match (c.orders, c.cut) {
                    (0, _) => {}
                    (n, false) => found.push(finding(name, FOUND, Some(n))),
                    (n, true) => found.push(finding(
                        name,
                        "personal data found, of more orders than counted",
                        Some(n),
                    )),
                }
                if c.too_large {
                    unsearched.push(not(name, "some values are too large"));
                }
            }
            if let Some(why) = place.unsearched.or(self.unread.get(&at).map(String::as_str)) {
                unsearched.push(not(None, why));
            } else {
                unsearched.extend(place.bytes.iter().map(|name| not(Some(name.bare()), "bytea")));
            }
        }
        let uncompared = |why: &str, (table, orders)| Finding {
            table,
            column: None,
            problem: format!("not compared: {why}"),
            orders: Some(orders),
        };
        let unopened = self.unopened.into_iter();
        unsearched.extend(unopened.map(|u| uncompared("an archived document cannot be opened", u)));
        let moved = self.moved.into_iter();
        unsearched.extend(moved.map(|m| uncompared("the archive follows a change of keys with the next cycle", m)));
        found.extend(unsearched);
        found
    }
}

fn in_column(place: usize, column: usize, hash: u64) -> u64 {
    mix(hash ^ mix((place as u64) << 32 | column as u64))
}

fn left_out(hash: u64) -> u64 {
    in_column(u32::MAX as usize, 0, hash)
}

/// Schemas that hold an archive, of this policy or of another.
fn archives() -> Result<Vec<String>> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT 'amazon_pii_archive' UNION SELECT v.document::pg_catalog.json->'archive'->>'schema' FROM amazon_pii.policy_version v \
             WHERE v.document::pg_catalog.json->'archive'->>'schema' IS NOT NULL",
            &[],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}
