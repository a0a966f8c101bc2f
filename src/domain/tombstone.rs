//! Tombstones: lines of a file that outlives the database, one for each destruction of archives. A restore of the database does not
//! turn the file back, so that what was destroyed since can be destroyed again. No personal data: keys of orders, numbers, times.
//!
//! Each line has a code under a master key, over what it says and over the code of the line before it: nobody without a key can write,
//! change or take out one unseen.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::message::Message;
use super::vault::{MasterKeys, Signer, VaultError};

/// Most orders in one line.
pub const TOGETHER: usize = 500;

/// What a line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// Archives were destroyed because their time was over.
    Purged,
    /// Archives were destroyed because somebody asked for that.
    Shredded,
    /// The same, and what comes back is to be redacted without a copy.
    Forgotten,
    /// The line named by `of` did not come true: its transaction was rolled back.
    Void,
    /// The database took the place of the one named by `of`.
    Adopted,
}

impl What {
    /// As the file has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Purged => "purged",
            Self::Shredded => "shredded",
            Self::Forgotten => "forgotten",
            Self::Void => "void",
            Self::Adopted => "adopted",
        }
    }

    /// Whether archives were destroyed.
    pub fn destroys(self) -> bool {
        matches!(self, Self::Purged | Self::Shredded | Self::Forgotten)
    }
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tombstone {
    /// 32 hexadecimal digits.
    pub id: String,
    pub at: String,
    pub what: What,
    pub policy: String,
    /// Tells policies of one name apart; copies of a database have it in common.
    pub lineage: String,
    /// The database in which it happened.
    pub home: String,
    /// Keys of orders, each with the newest of its data keys that were destroyed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orders: Vec<(String, i64)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<String>,
}

impl Tombstone {
    fn code(&self, after: &str, signer: &Signer) -> String {
        let mut message = Message::default();
        for part in [
            &self.id,
            &self.at,
            self.what.word(),
            &self.policy,
            &self.lineage,
            &self.home,
        ] {
            message = message.text(Some(part));
        }
        message = message.text(self.of.as_deref()).text(Some(after));
        for (order, generation) in &self.orders {
            message = message.text(Some(order)).number(*generation);
        }
        hex::encode(signer.mac(b"amazon_pii tombstone", message.as_bytes()))
    }

    /// When it was written: microseconds since 1970-01-01 UTC.
    pub fn micros(at: &str) -> Option<i64> {
        let at = chrono::DateTime::parse_from_str(at, "%Y-%m-%d %H:%M:%S%.f%#z").ok()?;
        Some(at.timestamp_micros())
    }

    /// The line, with its end, that comes after the one with this code.
    pub fn line(&self, after: &str, signer: &Signer) -> String {
        let line = Line {
            tombstone: self.clone(),
            after: after.to_owned(),
            key: signer.id().to_owned(),
            code: self.code(after, signer),
        };
        // Texts and numbers always are JSON.
        serde_json::to_string(&line).unwrap_or_default() + "\n"
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    tombstone: Tombstone,
    /// The code of the line before; empty in the first.
    after: String,
    key: String,
    code: String,
}

/// A new id.
///
/// # Errors
/// No random bytes from the operating system.
pub fn new_id() -> Result<String, VaultError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|_| VaultError::NoRandom)?;
    Ok(hex::encode(bytes))
}

/// The code that a line says to have; `None` where it is none.
pub fn code_of(line: &[u8]) -> Option<String> {
    serde_json::from_slice::<Line>(line).ok().map(|l| l.code)
}

/// A master key that is not at hand, by its id.
#[derive(Debug, PartialEq, Eq)]
pub struct NoKey(pub String);

/// Reads lines one after the other, and notices what is missing between them.
pub struct Reader<'a> {
    keys: &'a MasterKeys,
    /// The code of the last line that is one.
    pub after: String,
    /// Lines since then that are none: a write that was cut off, or somebody's doing, which the next line tells.
    unclear: usize,
    /// Places where lines were changed or taken out.
    flaws: usize,
}

impl<'a> Reader<'a> {
    /// From after the line with this code on.
    pub fn new(keys: &'a MasterKeys, after: String) -> Self {
        Self {
            keys,
            after,
            unclear: 0,
            flaws: 0,
        }
    }

    /// The next line, without its end.
    ///
    /// # Errors
    /// Its key is not at hand.
    pub fn read(&mut self, line: &[u8]) -> Result<Option<Tombstone>, NoKey> {
        let Ok(line) = serde_json::from_slice::<Line>(line) else {
            self.unclear += 1;
            return Ok(None);
        };
        let Some(key) = self.keys.get(&line.key) else {
            return Err(NoKey(line.key));
        };
        if line.tombstone.code(&line.after, &key.signer()) != line.code {
            self.unclear += 1;
            return Ok(None);
        }
        if line.after == self.after {
            // What lies between two lines that follow each other was never part of the file.
            self.unclear = 0;
        } else {
            self.flaws += 1 + std::mem::take(&mut self.unclear);
        }
        self.after = line.code;
        Ok(Some(line.tombstone))
    }

    /// At how many places lines were changed or taken out, up to here.
    pub fn flaws(&self) -> usize {
        self.flaws + self.unclear
    }
}
