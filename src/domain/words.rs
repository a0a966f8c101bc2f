//! Texts as sequences of words: how an archived value is looked for in any other text, whatever stands around it.
//!
//! A word is a run of letters and digits, in lower case; blanks and punctuation only end it. So `Ada Invented` is found in
//! `ADA  INVENTED`, in `{"name": "Ada Invented"}` and in `'ada':1 'invented':2`. Nothing is kept but hashes under a key of the
//! call.

use std::hash::{BuildHasher, RandomState};

use super::filter::mix;

/// Shorter values are found everywhere. In characters, a blank between words included.
const TELLING: usize = 6;

/// Words that are looked up together; a longer value is taken apart.
const WINDOW: usize = 8;

/// Parts of a long value, besides its end, that must all be found.
const PARTS: usize = 8;

/// No phone number has more digits.
const DIGITS: usize = 20;

/// What stands between the digits of a phone number: that many characters at most.
const SEPARATORS: usize = 3;

/// What a hash stands for.
#[derive(Clone, Copy)]
enum Tag {
    Words = 1,
    Digits,
    Row,
}

/// A value as it is looked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Sought {
    /// All of them must be found: the value, or the parts of a long one.
    words: Vec<u64>,
    /// Or the digits of a phone number.
    digits: Option<u64>,
}

impl Sought {
    /// What to look up.
    pub fn hashes(&self) -> impl Iterator<Item = u64> {
        self.words.iter().copied().chain(self.digits)
    }

    /// Whether it is there, if `there` says so of its hashes.
    pub fn is_there(&self, there: impl Fn(u64) -> bool) -> bool {
        self.words.iter().all(|h| there(*h)) || self.digits.is_some_and(there)
    }
}

/// A word of a text.
#[derive(Clone, Copy, Default)]
struct Word {
    hash: u64,
    characters: usize,
    /// Digits only: their number and [`Hashing::base`] to the power of it.
    number: Option<(u64, usize, u64)>,
    /// What stands before it may stand inside a phone number.
    joined: bool,
}

/// The way in which values and texts are hashed, different in every call.
pub struct Hashing {
    key: RandomState,
    base: u64,
}

impl Hashing {
    /// A new random key.
    pub fn new() -> Self {
        let key = RandomState::new();
        let base = key.hash_one("base") | 1;
        Self { key, base }
    }

    /// A value as it is looked for; `None` where it is too short to tell anything.
    pub fn sought(&self, value: &str) -> Option<Sought> {
        let mut words = Vec::new();
        self.split(value, |w| words.push(w));
        let phone = value.chars().all(|c| c.is_ascii_digit() || separates(c));
        let number = words.iter().try_fold((0, 0, 1), |n, w| Some(self.join(n, w.number?)));
        let digits = number
            .filter(|(_, count, _)| phone && (TELLING..=DIGITS).contains(count))
            .map(|n| tagged(Tag::Digits, n.0, n.1));
        let length = words.iter().map(|w| w.characters + 1).sum::<usize>().saturating_sub(1);
        if length < TELLING {
            // The digits of `1 23 45` would be as long as the text itself.
            return None;
        }
        let mut parts: Vec<&[Word]> = words.chunks_exact(WINDOW).take(PARTS).collect();
        parts.push(&words[words.len().saturating_sub(WINDOW)..]);
        parts.dedup_by_key(|p| p.as_ptr());
        let words = parts.iter().map(|p| self.window(p)).collect();
        Some(Sought { words, digits })
    }

    /// Calls `f` with the hash of whatever in a text might be a value.
    pub fn windows(&self, text: &str, mut f: impl FnMut(u64)) {
        let mut last: [Word; WINDOW] = Default::default();
        let (mut at, mut count) = (0, 0);
        self.split(text, |word| {
            last[at % WINDOW] = word;
            count = (count + 1).min(WINDOW);
            self.ending_here(&last, at, count, &mut f);
            at += 1;
        });
    }

    /// A row of the shop's, by its table and key.
    pub fn row(&self, table: &str, key: &str) -> u64 {
        tagged(Tag::Row, self.key.hash_one((table, key)), 0)
    }

    /// The windows that end with the word at `at`.
    fn ending_here(&self, last: &[Word; WINDOW], at: usize, count: usize, f: &mut impl FnMut(u64)) {
        let (mut sum, mut power, mut length) = (0_u64, 1_u64, 0);
        let (mut number, mut joined) = (Some((0, 0, 1)), true);
        for back in 0..count {
            let word = &last[(at + WINDOW - back) % WINDOW];
            sum = sum.wrapping_add(word.hash.wrapping_mul(power));
            power = power.wrapping_mul(self.base);
            length += word.characters + usize::from(back > 0);
            if length >= TELLING {
                f(tagged(Tag::Words, sum, back + 1));
            }
            number = number
                .filter(|_| joined)
                .and_then(|n| word.number.map(|w| self.join(w, n)))
                .filter(|(_, digits, _)| *digits <= DIGITS);
            joined = word.joined;
            if let Some((value, digits, _)) = number
                && digits >= TELLING
            {
                f(tagged(Tag::Digits, value, digits));
            }
        }
    }

    /// What [`ending_here`](Self::ending_here) says of exactly these words.
    fn window(&self, words: &[Word]) -> u64 {
        let sum = words
            .iter()
            .fold(0_u64, |sum, w| sum.wrapping_mul(self.base).wrapping_add(w.hash));
        tagged(Tag::Words, sum, words.len())
    }

    /// The digits of two words, one after the other.
    fn join(&self, a: (u64, usize, u64), b: (u64, usize, u64)) -> (u64, usize, u64) {
        (
            a.0.wrapping_mul(b.2).wrapping_add(b.0),
            a.1.saturating_add(b.1),
            a.2.wrapping_mul(b.2),
        )
    }

    fn split(&self, text: &str, mut f: impl FnMut(Word)) {
        let mut lower = String::new();
        let mut characters = 0;
        let (mut gap, mut narrow) = (0, true);
        for c in text.chars().chain(std::iter::once(' ')) {
            if c.is_alphanumeric() {
                lower.extend(c.to_lowercase());
                characters += 1;
                continue;
            }
            if !lower.is_empty() {
                f(self.word(&lower, characters, narrow && gap <= SEPARATORS));
                lower.clear();
                (characters, gap, narrow) = (0, 0, true);
            }
            gap += 1;
            narrow &= separates(c);
        }
    }

    fn word(&self, lower: &str, characters: usize, joined: bool) -> Word {
        let digits = lower.len() <= DIGITS && lower.bytes().all(|b| b.is_ascii_digit());
        let number = digits.then(|| {
            lower.bytes().fold((0, 0, 1), |n, b| {
                self.join(n, (u64::from(b), 1, self.base.wrapping_add(2)))
            })
        });
        Word {
            hash: self.key.hash_one(lower),
            characters,
            number,
            joined,
        }
    }
}

/// Whether it stands between the digits of phone numbers.
fn separates(c: char) -> bool {
    matches!(c, ' ' | '\u{a0}' | '\u{202f}' | '+' | '-' | '–' | '/' | '.' | '(' | ')')
}

fn tagged(tag: Tag, hash: u64, length: usize) -> u64 {
    mix(hash ^ mix((tag as u64) << 32 | length as u64))
}

/// A text without JSON's escapes, where it has any: the words on both sides of `\n` are two, `\u00e9` is a letter.
pub fn unescaped(text: &str) -> Option<String> {
    if !text.contains('\\') {
        return None;
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars();
    let mut high = 0;
    while let Some(c) = rest.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match rest.next() {
            Some('u') => {
                let code = rest.as_str().get(..4).and_then(|hex| u32::from_str_radix(hex, 16).ok());
                let Some(code) = code else { continue };
                rest = rest.as_str()[4..].chars();
                match code {
                    0xd800..0xdc00 => high = code,
                    0xdc00..0xe000 => {
                        let both = 0x1_0000 + ((high & 0x3ff) << 10) + (code & 0x3ff);
                        out.push(char::from_u32(both).unwrap_or(' '));
                    }
                    _ => out.push(char::from_u32(code).unwrap_or(' ')),
                }
            }
            // A second backslash is one of JSON in JSON.
            Some('\\') => out.push('\\'),
            _ => out.push(' '),
        }
    }
    Some(out)
}

/// The words of a tsvector in the order of their positions, from its text form; those without positions come first.
pub fn in_order(vector: &str) -> String {
    let mut words: Vec<(u32, String)> = Vec::new();
    let mut rest = vector.chars().peekable();
    while let Some(c) = rest.next() {
        if c != '\'' {
            continue;
        }
        let mut word = String::new();
        while let Some(c) = rest.next() {
            match c {
                '\'' if rest.peek() == Some(&'\'') => word.extend(rest.next()),
                '\'' => break,
                '\\' => word.extend(rest.next()),
                c => word.push(c),
            }
        }
        let mut positions = String::new();
        if rest.next_if_eq(&':').is_some() {
            while let Some(c) = rest.next_if(|c| *c != ' ') {
                positions.push(c);
            }
        }
        let number = |p: &str| p.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
        words.extend(positions.split(',').map(|p| (number(p), word.clone())));
    }
    words.sort_by_key(|w| w.0);
    words.into_iter().map(|w| w.1).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[path = "words/tests.rs"]
mod tests;
