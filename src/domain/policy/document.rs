//! A JSON document with the place of each value, so that every complaint can name its place.

use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::PolicyError;

type Result<T> = std::result::Result<T, PolicyError>;

/// Parses the text, refusing what would silently lose a part of it.
pub(super) fn load(text: &str) -> Result<Value> {
    let invalid = |error: serde_json::Error| PolicyError::new("", format!("policy is not valid JSON: {error}"));
    let mut duplicate = None;
    let mut reader = serde_json::Deserializer::from_str(text);
    UniqueKeys {
        path: String::new(),
        duplicate: &mut duplicate,
    }
    .deserialize(&mut reader)
    .map_err(invalid)?;
    match duplicate {
        Some(path) => Err(PolicyError::new(path, "key appears twice").with_hint("Keep one of them.")),
        None => serde_json::from_str(text).map_err(invalid),
    }
}

/// The known name that was probably meant, if any is near.
pub(super) fn nearest<'k>(word: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let word = word.to_lowercase();
    known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&word, &name.to_lowercase()), name))
        .filter(|(likeness, _)| *likeness >= 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// A hint that names the probable word, or all words when none is near.
pub(super) fn suggestion(word: &str, known: &[&str]) -> String {
    match nearest(word, known.iter().copied()) {
        Some(name) => format!("Perhaps you meant \"{name}\"."),
        None if known.is_empty() => "There is none that could be named here.".to_owned(),
        None => format!(
            "Known here: {}.",
            known.iter().map(|k| format!("\"{k}\"")).collect::<Vec<_>>().join(", ")
        ),
    }
}

/// A value and its place.
#[derive(Debug, Clone)]
pub(super) struct Node<'a> {
    value: &'a Value,
    path: String,
}

impl<'a> Node<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        Self {
            value,
            path: String::new(),
        }
    }

    pub(super) fn value(&self) -> &'a Value {
        self.value
    }

    pub(super) fn error(&self, problem: impl Into<String>) -> PolicyError {
        PolicyError::new(self.path.as_str(), problem)
    }

    fn not_a(&self, wanted: &str) -> PolicyError {
        let found = match self.value {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(_) => "a number",
            Value::String(_) => "a text",
            Value::Array(_) => "a list",
            Value::Object(_) => "an object",
        };
        let error = self.error(format!("must be {wanted}, not {found}"));
        if self.value.is_null() {
            error.with_hint("Leave the key out for its default.")
        } else {
            error
        }
    }

    /// An object with any keys, in the document's order.
    pub(super) fn map(&self, wanted: &str) -> Result<Vec<(&'a str, Node<'a>)>> {
        let Value::Object(map) = self.value else {
            return Err(self.not_a(wanted));
        };
        map.iter()
            .map(|(key, value)| {
                let node = Node {
                    value,
                    path: child(&self.path, key),
                };
                if blank(key) {
                    return Err(self.error("has an empty name"));
                }
                no_nul(key, &node)?;
                Ok((key.as_str(), node))
            })
            .collect()
    }

    /// An object with none but the known keys.
    pub(super) fn object(&self, known: &[&str]) -> Result<Object<'a>> {
        let Value::Object(map) = self.value else {
            return Err(self.not_a("an object"));
        };
        if let Some((key, value)) = map.iter().find(|(key, _)| !known.contains(&key.as_str())) {
            let node = Node {
                value,
                path: child(&self.path, key),
            };
            return Err(node
                .error(format!("unknown key \"{key}\""))
                .with_hint(suggestion(key, known)));
        }
        Ok(Object {
            map,
            path: self.path.clone(),
        })
    }

    pub(super) fn list(&self, wanted: &str) -> Result<Vec<Node<'a>>> {
        let Value::Array(items) = self.value else {
            return Err(self.not_a(wanted));
        };
        Ok(items
            .iter()
            .enumerate()
            .map(|(at, value)| Node {
                value,
                path: format!("{}[{at}]", self.path),
            })
            .collect())
    }

    /// A list of texts, none twice.
    pub(super) fn texts(&self, wanted: &str) -> Result<Vec<String>> {
        let mut texts = Vec::new();
        for node in self.list(wanted)? {
            let text = node.text()?;
            if texts.contains(&text) {
                return Err(node.error(format!("\"{text}\" appears twice")));
            }
            texts.push(text);
        }
        Ok(texts)
    }

    /// Like `texts`, with one at least.
    pub(super) fn some_texts(&self, wanted: &str) -> Result<Vec<String>> {
        let texts = self.texts(wanted)?;
        if texts.is_empty() {
            Err(self.error("is an empty list"))
        } else {
            Ok(texts)
        }
    }

    pub(super) fn text(&self) -> Result<String> {
        let Value::String(text) = self.value else {
            return Err(self.not_a("a text"));
        };
        if blank(text) {
            return Err(self.error("is empty"));
        }
        no_nul(text, self)?;
        Ok(text.clone())
    }

    pub(super) fn boolean(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.not_a("true or false"))
    }

    pub(super) fn count(&self) -> Result<usize> {
        if !self.value.is_number() {
            return Err(self.not_a("a number"));
        }
        let count = self
            .value
            .as_u64()
            .filter(|n| *n > 0)
            .and_then(|n| usize::try_from(n).ok());
        count.ok_or_else(|| self.error("must be a whole number, 1 or more"))
    }

    /// One of a few words, which serde turns into its variant.
    pub(super) fn word<T: DeserializeOwned>(&self, known: &[&str]) -> Result<T> {
        let word = self.text()?;
        let unknown = || {
            self.error(format!("unknown word \"{word}\""))
                .with_hint(suggestion(&word, known))
        };
        if !known.contains(&word.as_str()) {
            return Err(unknown());
        }
        T::deserialize(self.value).map_err(|_| unknown())
    }
}

/// An object whose keys are all known.
#[derive(Debug)]
pub(super) struct Object<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Object<'a> {
    pub(super) fn get(&self, key: &str) -> Option<Node<'a>> {
        self.map.get(key).map(|value| Node {
            value,
            path: child(&self.path, key),
        })
    }

    pub(super) fn need(&self, key: &str) -> Result<Node<'a>> {
        self.get(key)
            .ok_or_else(|| PolicyError::new(child(&self.path, key), "is missing"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<String>> {
        self.get(key).map(|node| node.text()).transpose()
    }

    pub(super) fn text_or(&self, key: &str, default: &str) -> Result<String> {
        Ok(self.text(key)?.unwrap_or_else(|| default.to_owned()))
    }

    pub(super) fn word_or_default<T: DeserializeOwned + Default>(&self, key: &str, known: &[&str]) -> Result<T> {
        self.get(key).map_or_else(|| Ok(T::default()), |node| node.word(known))
    }

    /// The only key with its value, where an object says one thing.
    pub(super) fn only(&self) -> Option<(&'a str, Node<'a>)> {
        let mut keys = self.map.iter();
        match (keys.next(), keys.next()) {
            (Some((key, value)), None) => Some((
                key,
                Node {
                    value,
                    path: child(&self.path, key),
                },
            )),
            _ => None,
        }
    }
}

fn child(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

fn blank(text: &str) -> bool {
    text.trim().is_empty()
}

/// No text of PostgreSQL can hold U+0000, and jsonb refuses it.
fn no_nul(text: &str, node: &Node<'_>) -> Result<()> {
    if text.contains('\0') {
        Err(node.error("holds a NUL character"))
    } else {
        Ok(())
    }
}

/// Walks a document for the first key that an object has twice; serde_json would keep the last without a word.
struct UniqueKeys<'d> {
    path: String,
    duplicate: &'d mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for UniqueKeys<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for UniqueKeys<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> std::result::Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<(), A::Error> {
        let mut at = 0;
        loop {
            let path = format!("{}[{at}]", self.path);
            match items.next_element_seed(UniqueKeys {
                path,
                duplicate: &mut *self.duplicate,
            })? {
                Some(()) => at += 1,
                None => return Ok(()),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> std::result::Result<(), A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = entries.next_key::<String>()? {
            let path = child(&self.path, &key);
            if !keys.insert(key) {
                self.duplicate.get_or_insert_with(|| path.clone());
            }
            entries.next_value_seed(UniqueKeys {
                path,
                duplicate: &mut *self.duplicate,
            })?;
        }
        Ok(())
    }
}
