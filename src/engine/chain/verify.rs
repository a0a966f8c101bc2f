//! Whether the audit log is what was written: nothing of it changed, removed, moved or made up. Page by page, whatever its length.

use std::collections::{BTreeMap, BTreeSet};

use super::end::{Checkpoint, Found, Head};
use super::{Link, PAGE, PAGE_BYTES, link_code, links, lock};
use crate::domain::vault::MasterKeys;
use crate::engine::audit::{AuditEntry, COLUMNS, OwnCode, Stored, WIDTH};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys, require_role};
use crate::pg::sql::{self, Arg};
use crate::pg::{keys, xact};
use crate::worker::evidence;

/// The action of an entry that says that a chain had lost its head.
pub const BROKEN: &str = "audit_chain_broken";

/// Findings of one chain that are listed; more are counted.
const LISTED: usize = 1000;

/// A line of the result.
#[derive(Default)]
pub struct Finding {
    pub chain: String,
    /// `ok`, `info`, `warning` or `error`.
    pub severity: &'static str,
    pub finding: String,
    pub position: Option<i64>,
    pub audit_id: Option<i64>,
    pub entries: Option<i64>,
    /// Microseconds since 1970-01-01 UTC.
    pub first_at: Option<i64>,
    pub last_at: Option<i64>,
    /// Of the head or the checkpoint.
    pub code: Option<String>,
}

/// An end of the chain that somebody has kept: place and code of what was its last link then.
pub struct Kept<'a> {
    pub position: i64,
    pub code: &'a str,
}

/// Checks one chain, or all of them.
///
/// # Errors
/// No such chain, no master key, an end without its chain.
pub fn verify(chain: Option<&str>, kept: Option<Kept<'_>>) -> Result<Vec<Finding>> {
    require_role(&["amazon_pii_admin", "amazon_pii_auditor"], "verify the audit log")?;
    if kept.is_some() && chain.is_none() {
        return Err(Error::invalid("a head belongs to one chain").hint("Name its policy, too."));
    }
    let keys = keys::master_keys()?;
    let known = chains()?;
    let all: Vec<String> = match chain {
        None => known.into_iter().collect(),
        Some(name) if known.contains(name) => vec![name.to_owned()],
        Some(name) => {
            return Err(
                Error::undefined(format!("there is no audit log of a policy \"{name}\""))
                    .hint("'' stands for the entries that have no policy."),
            );
        }
    };
    let mut out = Vec::new();
    // Nobody links or removes meanwhile: sealers do not wait, they come back. A standby can neither take it nor needs it.
    let quiet = match xact::in_recovery() {
        true => None,
        false => Some(Quiet::begin()?),
    };
    for chain in all {
        let mut check = Check::new(&keys, &chain, kept.as_ref());
        check.run()?;
        out.push(check.findings());
    }
    drop(quiet);
    for findings in &out {
        note(findings)?;
    }
    Ok(out.into_iter().flatten().collect())
}

/// While it lives no chain changes.
struct Quiet(xact::Own);

impl Quiet {
    fn begin() -> Result<Self> {
        let lock = lock()?;
        lock.hold()?;
        Ok(Self(lock))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// The result goes into the log itself, by another process: the caller may be allowed to read only.
fn note(findings: &[Finding]) -> Result<()> {
    let Some(summary) = findings.first() else { return Ok(()) };
    if xact::in_recovery() {
        return Ok(());
    }
    let errors = findings.iter().skip(1).filter(|f| f.severity == "error").count();
    let detail = serde_json::json!({
        "entries": summary.entries, "errors": errors, "head_position": summary.position, "head_code": summary.code,
    });
    let noted = evidence::record(&AuditEntry {
        policy: super::policy_of(&summary.chain),
        detail: Some(detail.to_string()),
        ..AuditEntry::new("verify_audit_log")?
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

/// All chains, of dropped policies and without a head too.
fn chains() -> Result<BTreeSet<String>> {
    let rows = as_extension(|| {
        sql::read(
            "WITH RECURSIVE k (chain) AS ((SELECT l.chain FROM amazon_pii.audit_link AS l ORDER BY l.chain LIMIT 1) \
                UNION ALL SELECT (SELECT l.chain FROM amazon_pii.audit_link AS l WHERE l.chain > k.chain ORDER BY l.chain LIMIT 1) \
                FROM k WHERE k.chain IS NOT NULL), \
             n (chain) AS ((SELECT e.policy FROM amazon_pii.audit_entry AS e WHERE e.policy IS NOT NULL ORDER BY e.policy LIMIT 1) \
                UNION ALL SELECT (SELECT e.policy FROM amazon_pii.audit_entry AS e WHERE e.policy > n.chain ORDER BY e.policy LIMIT 1) \
                FROM n WHERE n.chain IS NOT NULL) \
             SELECT k.chain FROM k WHERE k.chain IS NOT NULL UNION SELECT n.chain FROM n WHERE n.chain IS NOT NULL \
             UNION SELECT h.chain FROM amazon_pii.audit_chain AS h UNION SELECT c.chain FROM amazon_pii.audit_checkpoint AS c \
             UNION SELECT p.policy FROM amazon_pii.policy AS p UNION SELECT q.chain FROM amazon_pii.audit_pending AS q \
             UNION SELECT '' WHERE EXISTS (SELECT FROM amazon_pii.audit_entry AS e WHERE e.policy IS NULL)",
            &[],
        )
    })?;
    rows.iter().map(|r| r.string(0)).collect()
}

/// The check of one chain.
struct Check<'a> {
    keys: &'a MasterKeys,
    chain: &'a str,
    kept: Option<&'a Kept<'a>>,
    /// The code at the place that was kept, once it was passed.
    passed: Option<Vec<u8>>,
    found: Vec<Finding>,
    errors: i64,
    entries: i64,
    without_code: i64,
    /// Entries that are not linked yet.
    pending: i64,
    first_at: Option<i64>,
    last_at: Option<i64>,
    /// Codes that could not be checked, by the master key that it takes.
    keyless: BTreeMap<String, i64>,
    head: Option<Head>,
    /// The last link that is there.
    position: i64,
    code: Vec<u8>,
}

impl<'a> Check<'a> {
    fn new(keys: &'a MasterKeys, chain: &'a str, kept: Option<&'a Kept<'a>>) -> Self {
        Self {
            keys,
            chain,
            kept,
            passed: None,
            found: Vec::new(),
            errors: 0,
            entries: 0,
            without_code: 0,
            pending: 0,
            first_at: None,
            last_at: None,
            keyless: BTreeMap::new(),
            head: None,
            position: 0,
            code: Vec::new(),
        }
    }

    fn error(&mut self, finding: impl Into<String>, position: Option<i64>, audit_id: Option<i64>) {
        self.errors += 1;
        self.say("error", finding, position, audit_id);
    }

    fn say(
        &mut self,
        severity: &'static str,
        finding: impl Into<String>,
        position: Option<i64>,
        audit_id: Option<i64>,
    ) {
        if self.found.len() < LISTED {
            self.found.push(Finding {
                chain: self.chain.to_owned(),
                severity,
                finding: finding.into(),
                position,
                audit_id,
                ..Finding::default()
            });
        }
    }

    /// Several lines of the same kind are one.
    fn count(&mut self, severity: &'static str, finding: impl Into<String>, entries: i64) {
        if entries > 0 {
            self.errors += i64::from(severity == "error");
            self.say(severity, finding, None, None);
            if let Some(last) = self.found.last_mut() {
                last.entries = Some(entries);
            }
        }
    }

    fn run(&mut self) -> Result<()> {
        self.beginning()?;
        let begun = self.position;
        loop {
            let page = links(self.chain, self.position, None)?;
            if page.is_empty() {
                break;
            }
            for link in &page {
                self.link(link);
            }
        }
        self.ending()?;
        self.unlinked()?;
        self.removed_early()?;
        self.compare_kept(begun);
        self.count("info", "entries are not linked yet", self.pending);
        self.count(
            "info",
            "entries have no code of their own: no master key was configured when they were written",
            self.without_code,
        );
        for (id, count) in std::mem::take(&mut self.keyless) {
            self.count(
                "error",
                format!("codes could not be checked: master key {id} is not configured"),
                count,
            );
        }
        Ok(())
    }

    /// Where the chain begins: at its first link, or where a checkpoint says.
    fn beginning(&mut self) -> Result<()> {
        let found = Checkpoint::find(self.keys, self.chain)?;
        let Some(c) = self.end(found, "checkpoint") else {
            return Ok(());
        };
        self.position = c.position;
        let upto = c.last_at.as_deref().unwrap_or("?");
        self.say(
            "info",
            format!("audit_for is over for the first entries, up to {upto}"),
            Some(c.position),
            None,
        );
        if let Some(last) = self.found.last_mut() {
            last.entries = Some(c.entries);
            last.code = Some(hex::encode(&c.code));
        }
        self.pass(c.position, &c.code);
        self.code = c.code;
        Ok(())
    }

    /// An end of the chain, unless it is not to be believed.
    fn end<T>(&mut self, found: Found<T>, what: &str) -> Option<T> {
        match found {
            Found::Sound(end) => Some(end),
            Found::NoKey(id, end) => {
                *self.keyless.entry(id).or_default() += 1;
                Some(end)
            }
            Found::Changed => {
                self.error(format!("the {what} was changed"), None, None);
                None
            }
            Found::Missing => None,
        }
    }

    /// Remembers the code at the place that was kept.
    fn pass(&mut self, position: i64, code: &[u8]) {
        if self.kept.is_some_and(|kept| kept.position == position) {
            self.passed = Some(code.to_vec());
        }
    }

    fn link(&mut self, link: &Link) {
        let (at, id) = (Some(link.position), Some(link.audit_id));
        let gap = link.position != self.position + 1;
        if gap {
            self.gap(self.position + 1, link.position - 1);
        }
        match &link.entry {
            None => {
                let early = || {
                    let key = self.keys.get(&link.key_id)?;
                    let code = link_code(key, self.chain, link.position, link.audit_id, &self.code, None);
                    Some(code == link.code[..])
                };
                if !gap && early() == Some(true) {
                    self.error("the entry was removed before it was linked", at, id);
                } else {
                    self.error("the entry is missing", at, id);
                }
            }
            Some(entry) => {
                self.entries += 1;
                if let Some(written) = link.written {
                    self.first_at = Some(self.first_at.map_or(written, |t| t.min(written)));
                    self.last_at = Some(self.last_at.map_or(written, |t| t.max(written)));
                }
                let own = self.own(entry);
                let holds = if gap {
                    Some(true)
                } else {
                    link.holds(self.keys, self.chain, &self.code)
                };
                match (own, holds) {
                    (false, _) | (_, Some(false)) => self.error("the entry or its link was changed, or moved", at, id),
                    (true, Some(true)) => {}
                    (true, None) => *self.keyless.entry(link.key_id.clone()).or_default() += 1,
                }
                if entry.links_before().is_some_and(|before| before >= link.position) {
                    self.error("links before it were removed", at, id);
                }
                if entry.action() == BROKEN {
                    self.error(format!("tampered with: {}", entry.detail().unwrap_or_default()), at, id);
                }
            }
        }
        self.position = link.position;
        self.code.clone_from(&link.code);
        self.pass(link.position, &link.code);
    }

    fn gap(&mut self, from: i64, to: i64) {
        let finding = if from >= to {
            format!("link {from} is missing")
        } else {
            format!("links {from} to {to} are missing")
        };
        self.error(finding, Some(from), None);
    }

    /// Whether the entry's own code does not contradict it.
    fn own(&mut self, entry: &Stored) -> bool {
        match entry.own_code(self.keys) {
            OwnCode::Holds => true,
            OwnCode::Wrong => false,
            OwnCode::Missing => {
                self.without_code += 1;
                true
            }
            OwnCode::NoKey(id) => {
                *self.keyless.entry(id).or_default() += 1;
                true
            }
        }
    }

    fn ending(&mut self) -> Result<()> {
        let found = Head::find(self.keys, self.chain)?;
        if matches!(found, Found::Missing) && self.position > 0 {
            self.error("the head is missing", None, None);
        }
        let Some(head) = self.end(found, "head") else {
            return Ok(());
        };
        if head.position > self.position {
            self.gap(self.position + 1, head.position);
        } else if head.position < self.position {
            self.error("links come after the head", Some(head.position + 1), None);
        } else if head.code != self.code {
            self.error(
                "the last link is not the one that the head knows",
                Some(head.position),
                None,
            );
        }
        self.head = Some(head);
        Ok(())
    }

    /// Entries of the chain that have no link.
    fn unlinked(&mut self) -> Result<()> {
        let none_yet = self.head.is_none() && self.position == 0;
        let end = self.head.as_ref().map_or(self.position, |head| head.position);
        let mut after = i64::MIN;
        loop {
            let rows = on_keys(|| {
                sql::read(
                    &format!(
                        // ident-ok: names of our own columns
                        "SELECT {COLUMNS}, s.noted FROM (SELECT f.audit_id, f.noted, pg_catalog.sum(f.size) OVER (ORDER BY f.audit_id) - f.size AS before \
                            FROM (SELECT a.audit_id, COALESCE(pg_catalog.octet_length(a.lines), 0) AS size, \
                                    EXISTS (SELECT FROM amazon_pii.audit_pending AS p WHERE p.audit_id = a.audit_id AND p.chain = $1) AS noted \
                                FROM amazon_pii.audit_entry AS a WHERE a.audit_id > $2 AND COALESCE(a.policy, '') = $1 \
                                AND NOT EXISTS (SELECT FROM amazon_pii.audit_link AS l WHERE l.audit_id = a.audit_id) \
                                ORDER BY a.audit_id LIMIT $3) AS f) AS s \
                         JOIN amazon_pii.audit_entry AS e ON e.audit_id = s.audit_id WHERE s.before < $4 ORDER BY e.audit_id"
                    ),
                    &[
                        Arg::Text(Some(self.chain)),
                        Arg::Int(after),
                        Arg::Int(PAGE),
                        Arg::Int(PAGE_BYTES),
                    ],
                )
            })?;
            if rows.is_empty() {
                return Ok(());
            }
            for row in &rows {
                let Some(entry) = Stored::read(row)? else { continue };
                after = entry.id;
                let id = Some(entry.id);
                if !self.own(&entry) {
                    self.error("the entry was changed", None, id);
                } else if entry.links_before().is_some_and(|before| before > end) {
                    self.error("links before it were removed", None, id);
                } else if !none_yet && !row.bool(WIDTH)? {
                    self.error(
                        "the entry has no link: it was made up, or its link was removed",
                        None,
                        id,
                    );
                } else {
                    self.pending += 1;
                }
            }
        }
    }

    /// Notes of entries that are gone.
    fn removed_early(&mut self) -> Result<()> {
        let rows = on_keys(|| {
            sql::read(
                "SELECT p.audit_id FROM amazon_pii.audit_pending AS p WHERE p.chain = $1 \
                 AND NOT EXISTS (SELECT FROM amazon_pii.audit_entry AS e WHERE e.audit_id = p.audit_id) \
                 AND NOT EXISTS (SELECT FROM amazon_pii.audit_link AS l WHERE l.audit_id = p.audit_id) ORDER BY p.audit_id LIMIT $2",
                &[Arg::Text(Some(self.chain)), Arg::Int(LISTED as i64)],
            )
        })?;
        for row in &rows {
            let id = Some(row.int(0)?);
            self.error("the entry was removed before it was linked", None, id);
        }
        Ok(())
    }

    fn compare_kept(&mut self, begun: i64) {
        let Some(kept) = self.kept else { return };
        let at = Some(kept.position);
        let end = self.head.as_ref().map_or(self.position, |head| head.position);
        match &self.passed {
            // A chain without links has no code.
            _ if kept.position == 0 => {}
            Some(code) if hex::encode(code).eq_ignore_ascii_case(kept.code.trim()) => {}
            Some(_) => self.error(
                "the link is not the one that was kept: the chain was cut off and grew again",
                at,
                None,
            ),
            None if kept.position > end => {
                self.error("the chain ends before the link that was kept: it was cut off", at, None)
            }
            None if kept.position < begun => self.say(
                "warning",
                "the link that was kept is gone with audit_for, and cannot be compared",
                at,
                None,
            ),
            // Missing: that was said.
            None => {}
        }
    }

    /// The chain as a whole first.
    fn findings(self) -> Vec<Finding> {
        let sound = self.errors == 0;
        let mut out = vec![Finding {
            chain: self.chain.to_owned(),
            severity: if sound { "ok" } else { "error" },
            finding: if sound {
                "every entry is what was written".to_owned()
            } else {
                format!("{} findings, see the next lines", self.errors)
            },
            position: self.head.as_ref().map(|head| head.position),
            audit_id: None,
            entries: Some(self.entries + self.pending),
            first_at: self.first_at,
            last_at: self.last_at,
            code: self.head.as_ref().map(|head| hex::encode(&head.code)),
        }];
        out.extend(self.found);
        out
    }
}
