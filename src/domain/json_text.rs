//! Redaction of JSON as text: every byte outside the redacted values stays as it was.
//!
//! Rewriting the text, instead of printing a parsed document, is what keeps blanks, key order, repeated keys, escapes and the
//! digits of numbers.

mod scan;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use serde_json::Value;
use serde_json_path::JsonPath;

use scan::{Id, Kind, Scan};

/// Readings times values, at most: what a document with thousands of repeated keys may cost.
const MAX_WORK: usize = 5_000_000;

/// Why a rule cannot be compiled, or a document not be redacted. Never holds anything of a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// The text is not JSON.
    #[error("text is not valid JSON")]
    Invalid,
    /// Nested deeper than we walk.
    #[error("JSON is nested deeper than {} levels", scan::MAX_DEPTH)]
    TooDeep,
    /// Repeated keys multiply the work beyond a limit.
    #[error("JSON repeats its keys too often")]
    TooManyRepeatedKeys,
    /// A path of the policy is not RFC 9535.
    #[error("JSON path \"{path}\" is not valid at position {position}: {reason}")]
    Path {
        /// The path as written in the policy.
        path: String,
        /// Counted in characters from 1.
        position: usize,
        /// What the parser expected.
        reason: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Redact,
    Keep,
}

/// Which values of a JSON document are redacted, and by what.
#[derive(Debug, Clone)]
pub struct JsonRule {
    mode: Mode,
    paths: Vec<JsonPath>,
    placeholder: String,
    marks: Vec<String>,
}

impl JsonRule {
    /// Redacts what the paths (RFC 9535) select. Strings that equal one of `marks` stay, as those that equal the placeholder do.
    pub fn redacting(paths: &[String], placeholder: &str, marks: &[String]) -> Result<Self, JsonError> {
        Self::compile(Mode::Redact, paths, placeholder, marks)
    }

    /// Redacts everything but what the paths select and what is below that.
    pub fn keeping(paths: &[String], placeholder: &str, marks: &[String]) -> Result<Self, JsonError> {
        Self::compile(Mode::Keep, paths, placeholder, marks)
    }

    fn compile(mode: Mode, paths: &[String], placeholder: &str, marks: &[String]) -> Result<Self, JsonError> {
        let paths = paths
            .iter()
            .map(|path| {
                JsonPath::parse(path).map_err(|e| JsonError::Path {
                    path: path.clone(),
                    position: e.position(),
                    reason: e.message().to_string(),
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(JsonRule {
            mode,
            paths,
            placeholder: placeholder.to_string(),
            marks: marks.to_vec(),
        })
    }

    /// The text with its values redacted: strings become the placeholder, numbers and booleans null; null and "" stay.
    ///
    /// One pass only. A rule whose filter reads a value that the rule redacts may find more, or less, in its own result;
    /// whoever registers such a rule applies it twice and compares.
    pub fn apply(&self, text: &str) -> Result<String, JsonError> {
        self.rewrite(text, false)
    }

    /// As [`apply`](Self::apply), but a document that is no more than one string, number or boolean is redacted even if
    /// no path selects it: what a text column holds then is a bare value, out of the reach of any path into it.
    pub fn apply_to_text(&self, text: &str) -> Result<String, JsonError> {
        self.rewrite(text, self.mode == Mode::Redact)
    }

    fn rewrite(&self, text: &str, bare_root: bool) -> Result<String, JsonError> {
        let scan = Scan::new(text)?;
        if scan.readings().saturating_mul(scan.nodes.len()) > MAX_WORK && scan.readings() > 1 {
            return Err(JsonError::TooManyRepeatedKeys);
        }
        let mut hit = vec![false; scan.nodes.len()];
        for reading in 0..scan.readings() {
            let document = scan.value(scan.root, reading);
            let selected: HashSet<*const Value> = self
                .paths
                .iter()
                .flat_map(|path| path.query(&document).all())
                .map(std::ptr::from_ref)
                .collect();
            Walk {
                scan: &scan,
                selected: &selected,
                mode: self.mode,
                hit: &mut hit,
            }
            .visit(scan.root, &document, reading, false);
        }
        if bare_root && !matches!(scan.nodes[scan.root].kind, Kind::Array(_) | Kind::Object(_)) {
            hit[scan.nodes[scan.root].place] = true;
        }
        let mut edits = Vec::new();
        self.collect(&scan, scan.root, false, &hit, &mut edits);
        // Nodes were visited key by key; repeated keys are not in the order of the text.
        edits.sort_unstable_by_key(|edit| edit.start);
        Ok(self.splice(text, &edits))
    }

    fn collect(&self, scan: &Scan, id: Id, above: bool, hit: &[bool], edits: &mut Vec<Edit>) {
        let node = &scan.nodes[id];
        let redact = above || hit[node.place];
        match &node.kind {
            Kind::Array(items) => items
                .iter()
                .for_each(|&item| self.collect(scan, item, redact, hit, edits)),
            Kind::Object(members) => members
                .iter()
                .flat_map(|(_, first)| scan.all_of(first))
                .for_each(|&id| self.collect(scan, id, redact, hit, edits)),
            Kind::String(s) if redact && !self.stays(s) => {
                edits.push(Edit {
                    start: node.start,
                    end: node.end,
                    string: true,
                });
            }
            Kind::Number | Kind::Bool(_) if redact => {
                edits.push(Edit {
                    start: node.start,
                    end: node.end,
                    string: false,
                });
            }
            _ => {}
        }
    }

    fn stays(&self, string: &str) -> bool {
        string.is_empty() || string == self.placeholder || self.marks.iter().any(|mark| mark == string)
    }

    fn splice(&self, text: &str, edits: &[Edit]) -> String {
        let placeholder = Value::from(self.placeholder.as_str()).to_string();
        let mut out = String::with_capacity(text.len());
        let mut done = 0;
        for edit in edits {
            out.push_str(&text[done..edit.start]);
            out.push_str(if edit.string { &placeholder } else { "null" });
            done = edit.end;
        }
        out.push_str(&text[done..]);
        out
    }
}

struct Edit {
    start: usize,
    end: usize,
    string: bool,
}

/// Carries what paths selected in one reading over to the places of the text.
struct Walk<'s, 'a> {
    scan: &'s Scan<'a>,
    /// Values by their address in the reading, which is what a path's result borrows from.
    selected: &'s HashSet<*const Value>,
    mode: Mode,
    hit: &'s mut [bool],
}

impl Walk<'_, '_> {
    fn visit(&mut self, id: Id, value: &Value, reading: usize, above: bool) {
        let scan = self.scan;
        let node = &scan.nodes[id];
        let selected = above || self.selected.contains(&std::ptr::from_ref(value));
        if selected && self.mode == Mode::Redact {
            self.hit[node.place] = true;
        }
        match (&node.kind, value) {
            (Kind::Array(items), Value::Array(values)) => {
                for (&item, value) in items.iter().zip(values) {
                    self.visit(item, value, reading, selected);
                }
            }
            (Kind::Object(members), Value::Object(map)) => {
                for (key, first) in members {
                    let (id, reading) = scan.chosen(*first, reading);
                    if let Some(value) = map.get(key) {
                        self.visit(id, value, reading, selected);
                    }
                }
            }
            // To be kept, a value must be selected in every reading that shows it.
            _ if self.mode == Mode::Keep && !selected => self.hit[node.place] = true,
            _ => {}
        }
    }
}
