//! What the tombstone file says beyond what this database knows to have read: usually what was destroyed a moment ago; after a restore,
//! what was destroyed since the backup.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use crate::domain::policy::Policy;
use crate::domain::tombstone::{NoKey, Reader, Tombstone, What};
use crate::domain::vault::MasterKeys;
use crate::engine::tombstone::lock_of;
use crate::engine::vault::{self, Place};
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, on_keys};
use crate::pg::keys;
use crate::pg::origin::this_database;
use crate::pg::sql::{self, Arg};
use crate::pg::tombstones::{self, Book};

/// Orders that are looked at together.
const TOGETHER: usize = 5000;

/// How far this database has read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mark {
    pub position: u64,
    /// Of the last line before.
    pub code: String,
}

impl Mark {
    fn read() -> Result<Self> {
        let rows = as_extension(|| sql::read("SELECT m.position, m.code FROM amazon_pii.tombstone_mark AS m", &[]))?;
        rows.first().map_or_else(
            || Ok(Self::default()),
            |row| {
                Ok(Self {
                    position: row.int(0)?.unsigned_abs(),
                    code: row.string(1)?,
                })
            },
        )
    }

    /// Notes it, where the database has one policy and has noted nothing before.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn write_first(&self) -> Result<()> {
        as_extension(|| {
            sql::execute(
                "INSERT INTO amazon_pii.tombstone_mark AS m (position, code) SELECT $1, $2 \
                 WHERE 1 = (SELECT pg_catalog.count(*) FROM amazon_pii.policy) ON CONFLICT (one) DO NOTHING",
                &[
                    Arg::Int(i64::try_from(self.position).unwrap_or(i64::MAX)),
                    Arg::Text(Some(&self.code)),
                ],
            )
        })?;
        Ok(())
    }

    /// Notes it.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn write(&self) -> Result<()> {
        as_extension(|| {
            sql::execute(
                "INSERT INTO amazon_pii.tombstone_mark AS m (position, code) VALUES ($1, $2) \
                 ON CONFLICT (one) DO UPDATE SET position = EXCLUDED.position, code = EXCLUDED.code, noted_at = EXCLUDED.noted_at",
                &[
                    Arg::Int(i64::try_from(self.position).unwrap_or(i64::MAX)),
                    Arg::Text(Some(&self.code)),
                ],
            )
        })?;
        Ok(())
    }
}

/// What is wrong with the file as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Where this database had read to it does not say what it said.
    Replaced,
    /// At so many places lines were changed or taken out.
    Changed(usize),
}

impl Trouble {
    /// As a sentence.
    pub fn words(self) -> String {
        match self {
            Self::Replaced => {
                "the tombstone file is not the one that this database knows: it was replaced, shortened or lost"
                    .to_owned()
            }
            Self::Changed(places) => {
                format!("the tombstone file is not what was written: lines were changed or removed at {places} places")
            }
        }
    }
}

/// A line with the mark after it.
struct Read {
    tombstone: Tombstone,
    mark: Mark,
}

/// The end of the file, from where this database has read to.
pub struct Tail {
    pub trouble: Option<Trouble>,
    from: Mark,
    lines: Vec<Read>,
    /// After all of it.
    pub end: Mark,
}

/// An archive that was destroyed, and that this database does not know to be.
#[derive(Debug, Clone)]
pub struct Unknown {
    pub policy: String,
    pub order_key: String,
    pub generation: i64,
    pub what: What,
    pub at: String,
    /// Of which line.
    line: usize,
}

/// A policy, as tombstones name it.
struct Lineage {
    lineage: String,
    /// The database in which it is at work, those whose place that took, and those that took its place.
    homes: HashSet<String>,
    place: Place,
}

/// What was found.
pub struct Found {
    pub tail: Tail,
    pub unknown: Vec<Unknown>,
    /// Lines of which it is not known yet whether they come true.
    open: HashSet<usize>,
}

impl Tail {
    /// `None` where nothing is configured, or nothing was ever written.
    ///
    /// # Errors
    /// The file cannot be read, or a master key that signed lines of it is not at hand.
    fn load() -> Result<Option<Self>> {
        if !tombstones::is_configured() {
            return Ok(None);
        }
        let from = Mark::read()?;
        let mut tail = Self {
            trouble: None,
            from: from.clone(),
            lines: Vec::new(),
            end: from.clone(),
        };
        let Some(mut book) = Book::open()? else {
            if from.position == 0 {
                return Ok(None);
            }
            tail.trouble = Some(Trouble::Replaced);
            tail.end = Mark::default();
            return Ok(Some(tail));
        };
        if book.code_at(from.position)?.as_ref() != Some(&from.code) {
            tail.trouble = Some(Trouble::Replaced);
            tail.end = Mark::default();
        }
        if tail.end.position < book.size {
            tail.read(&mut book, &keys::master_keys()?)?;
        }
        Ok(Some(tail))
    }

    fn read(&mut self, book: &mut Book, keys: &MasterKeys) -> Result<()> {
        let mut reader = Reader::new(keys, self.end.code.clone());
        let lines = &mut self.lines;
        let mut last = self.end.position;
        book.lines(self.end.position, |line, end| {
            last = end;
            match reader.read(line) {
                Ok(None) => {}
                Ok(Some(tombstone)) => {
                    let (position, code) = (end, reader.after.clone());
                    let mark = Mark { position, code };
                    lines.push(Read { tombstone, mark });
                }
                Err(NoKey(id)) => {
                    return Err(Error::no_key(format!(
                        "master key {id}, which signed a part of the tombstone file, is not among the configured keys"
                    ))
                    .hint("Add it to the key file, after the current key."));
                }
            }
            Ok(())
        })?;
        self.end = Mark {
            position: last,
            code: book.code_at(last)?.unwrap_or_default(),
        };
        if reader.flaws() > 0 {
            self.trouble = self.trouble.or(Some(Trouble::Changed(reader.flaws())));
        }
        Ok(())
    }

    /// What it says of policies of this database.
    fn says(&self, policies: &BTreeMap<String, Lineage>) -> Vec<Unknown> {
        let of = |what| self.lines.iter().filter(move |l| l.tombstone.what == what);
        let void: HashSet<&str> = of(What::Void).filter_map(|l| l.tombstone.of.as_deref()).collect();
        let mut out = Vec::new();
        for (line, read) in self.lines.iter().enumerate() {
            let tombstone = &read.tombstone;
            let is_ours = policies
                .get(&tombstone.policy)
                .is_some_and(|p| p.lineage == tombstone.lineage && p.homes.contains(&tombstone.home));
            if !is_ours || !tombstone.what.destroys() || void.contains(tombstone.id.as_str()) {
                continue;
            }
            out.extend(tombstone.orders.iter().map(|(order_key, generation)| Unknown {
                policy: tombstone.policy.clone(),
                order_key: order_key.clone(),
                generation: *generation,
                what: tombstone.what,
                at: tombstone.at.clone(),
                line,
            }));
        }
        out
    }

    /// The policies of this database, or one of them.
    fn policies(&self, policy: Option<&str>) -> Result<BTreeMap<String, Lineage>> {
        let rows = on_keys(|| {
            sql::read(
                "SELECT p.policy, p.lineage, COALESCE(p.home, $2), p.document FROM amazon_pii.policy p WHERE $1 IS NULL OR p.policy = $1",
                &[Arg::Text(policy), Arg::Text(Some(&this_database()))],
            )
        })?;
        let mut out = BTreeMap::new();
        for row in &rows {
            let (policy, lineage, home) = (row.string(0)?, row.string(1)?, row.string(2)?);
            let document = Policy::parse(row.str(3)?).map_err(|e| Error::invalid(e.to_string()))?;
            let mut homes = HashSet::from([home]);
            let adopted = |t: &&Tombstone| t.what == What::Adopted && t.policy == policy && t.lineage == lineage;
            let adopted: Vec<&Tombstone> = self.lines.iter().map(|l| &l.tombstone).filter(adopted).collect();
            // As often as there is another one among them.
            let mut before = 0;
            while homes.len() > before {
                before = homes.len();
                for tombstone in &adopted {
                    let Some(former) = &tombstone.of else { continue };
                    if homes.contains(former) || homes.contains(&tombstone.home) {
                        homes.extend([former.clone(), tombstone.home.clone()]);
                    }
                }
            }
            let place = Place::of(&document);
            out.insert(policy, Lineage { lineage, homes, place });
        }
        Ok(out)
    }

    /// The mark before the first of these lines; after all where there is none.
    fn before(&self, lines: impl Iterator<Item = usize>) -> Mark {
        match lines.min() {
            None => self.end.clone(),
            Some(0) => self.from.clone(),
            Some(line) => self.lines.get(line - 1).map_or(self.from.clone(), |l| l.mark.clone()),
        }
    }
}

/// Those that this database does not know to be destroyed: a data key is there, or the order's state says nothing of it.
fn unknown(said: Vec<Unknown>, policies: &BTreeMap<String, Lineage>) -> Result<Vec<Unknown>> {
    let mut out = Vec::new();
    for part in said
        .chunk_by(|a, b| a.policy == b.policy)
        .flat_map(|p| p.chunks(TOGETHER))
    {
        let Some(policy) = part.first() else { continue };
        let Some(lineage) = policies.get(&policy.policy) else {
            continue;
        };
        let orders: Vec<(&str, i64)> = part.iter().map(|u| (u.order_key.as_str(), u.generation)).collect();
        let mut found: BTreeSet<usize> = vault::surviving(&lineage.place, &policy.policy, &orders)?
            .into_iter()
            .collect();
        let rows = on_keys(|| {
            sql::read(
                "SELECT n.i - 1 FROM ROWS FROM (pg_catalog.unnest($1), pg_catalog.unnest($2), pg_catalog.unnest($3), pg_catalog.unnest($4)) \
                    WITH ORDINALITY AS n (p, k, g, f, i) \
                 LEFT JOIN amazon_pii.order_state o ON o.policy = n.p AND o.order_key = n.k \
                 WHERE o.policy IS NULL OR COALESCE(o.key_generation, 0) < n.g \
                    OR n.f = 1 AND (o.asked IN ('forget', 'forgotten')) IS NOT TRUE",
                &[
                    Arg::Texts(part.iter().map(|u| Some(u.policy.as_str())).collect()),
                    Arg::Texts(part.iter().map(|u| Some(u.order_key.as_str())).collect()),
                    Arg::Ints(part.iter().map(|u| u.generation).collect()),
                    Arg::Ints(part.iter().map(|u| i64::from(u.what == What::Forgotten)).collect()),
                ],
            )
        })?;
        for row in &rows {
            found.extend(usize::try_from(row.int(0)?).ok());
        }
        out.extend(found.into_iter().filter_map(|i| part.get(i).cloned()));
    }
    Ok(out)
}

/// Looks for what this database does not know, of one policy or of all. What other transactions are just doing does not count.
///
/// # Errors
/// As [`Tail::load`]; errors of the server.
pub fn look(policy: Option<&str>) -> Result<Option<Found>> {
    let mut over: HashSet<String> = HashSet::new();
    loop {
        let Some(tail) = Tail::load()? else { return Ok(None) };
        let (mut found, mut open, mut again) = (Vec::new(), HashSet::new(), false);
        if !tail.lines.is_empty() {
            let policies = tail.policies(policy)?;
            for item in unknown(tail.says(&policies), &policies)? {
                let id = &tail.lines[item.line].tombstone.id;
                if over.contains(id) {
                    found.push(item);
                } else if open.contains(&item.line) {
                } else if lock_of(id)?.try_take()? {
                    // Its transaction is over: what became of it is seen by looking again.
                    over.insert(id.clone());
                    again = true;
                } else {
                    open.insert(item.line);
                }
            }
        }
        if !again {
            let unknown = found;
            return Ok(Some(Found { tail, unknown, open }));
        }
    }
}

impl Found {
    /// How far there is nothing unknown and nothing open.
    pub fn known_upto(&self) -> Mark {
        self.tail
            .before(self.unknown.iter().map(|u| u.line).chain(self.open.iter().copied()))
    }

    /// Whether this database has read all of it.
    pub fn is_read(&self) -> bool {
        self.tail.trouble.is_none() && self.tail.from == self.tail.end
    }

    /// Why nobody may open an archive, if so.
    ///
    /// # Errors
    /// The file, or this database, was turned back.
    pub fn refuse(&self) -> Result<()> {
        if let Some(trouble) = self.tail.trouble {
            return Err(Error::unreconciled(trouble.words()));
        }
        let Some(first) = self.unknown.first() else {
            return Ok(());
        };
        let orders: HashSet<&str> = self.unknown.iter().map(|u| u.order_key.as_str()).collect();
        Err(Error::unreconciled(format!(
            "policy \"{}\": the archives of {} orders were destroyed, of which this database knows nothing: it was restored from a backup",
            first.policy,
            orders.len()
        )))
    }
}
