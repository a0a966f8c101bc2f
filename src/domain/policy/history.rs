//! `history`: a line of the shop's own for each access, and how its texts are made.

use serde_json::Value;

use super::document::{Node, suggestion};
use super::{PolicyError, QualifiedName};

type Result<T> = std::result::Result<T, PolicyError>;

/// Where accesses are written besides the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// The table, as in SQL.
    pub table: String,
    /// What each column gets, in the document's order. Never empty.
    pub columns: Vec<(String, Source)>,
}

/// What a column gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A text with words that are replaced.
    Text(Template),
    /// An expression over the order's row.
    Order(String),
}

/// A text with words that are replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Plain(String),
    Word(Word),
}

/// A word that stands for something of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word {
    Number,
    Reason,
    User,
    Actor,
    At,
    Action,
}

const WORDS: [(&str, Word); 6] = [
    ("number", Word::Number),
    ("reason", Word::Reason),
    ("user", Word::User),
    ("actor", Word::Actor),
    ("at", Word::At),
    ("action", Word::Action),
];

/// What the words stand for.
#[derive(Debug, Clone, Copy)]
pub struct Access<'a> {
    pub number: &'a str,
    pub reason: Option<&'a str>,
    pub user: &'a str,
    pub actor: Option<&'a str>,
    pub at: &'a str,
    pub action: &'a str,
}

impl Access<'_> {
    fn word(&self, word: Word) -> Option<&str> {
        match word {
            Word::Number => Some(self.number),
            Word::Reason => self.reason,
            Word::User => Some(self.user),
            Word::Actor => self.actor,
            Word::At => Some(self.at),
            Word::Action => Some(self.action),
        }
    }
}

impl Template {
    /// Reads a template: `:word` is a word, `::` a colon.
    ///
    /// # Errors
    /// The word that is unknown.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(':') {
            plain.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(':') {
                plain.push(':');
                rest = after;
                continue;
            }
            let end = rest
                .find(|c: char| !c.is_ascii_alphabetic() && c != '_')
                .unwrap_or(rest.len());
            if end == 0 {
                plain.push(':');
                continue;
            }
            let (_, word) = WORDS
                .iter()
                .find(|(name, _)| *name == &rest[..end])
                .ok_or_else(|| rest[..end].to_owned())?;
            if !plain.is_empty() {
                pieces.push(Piece::Plain(std::mem::take(&mut plain)));
            }
            pieces.push(Piece::Word(*word));
            rest = &rest[end..];
        }
        plain.push_str(rest);
        if !plain.is_empty() || pieces.is_empty() {
            pieces.push(Piece::Plain(plain));
        }
        Ok(Self(pieces))
    }

    /// The text for an access. A word alone that stands for nothing is NULL.
    pub fn fill(&self, access: &Access<'_>) -> Option<String> {
        match self.0.as_slice() {
            [Piece::Word(word)] => access.word(*word).map(str::to_owned),
            pieces => Some(
                pieces
                    .iter()
                    .map(|piece| match piece {
                        Piece::Plain(text) => text.as_str(),
                        Piece::Word(word) => access.word(*word).unwrap_or_default(),
                    })
                    .collect(),
            ),
        }
    }
}

/// Reads the key `history`.
pub(super) fn history(node: &Node<'_>) -> Result<History> {
    let history = node.object(&["table", "columns"])?;
    let table = history.need("table")?;
    let name = table.text()?;
    if let Err(error) = QualifiedName::parse(&name) {
        return Err(PolicyError {
            hint: error.hint,
            ..table.error(error.problem)
        });
    }
    let columns = history.need("columns")?;
    let map = columns.map("an object of columns and what they get")?;
    if map.is_empty() {
        return Err(columns
            .error("names no column")
            .with_hint("Say what each column of the history gets."));
    }
    let columns = map
        .into_iter()
        .map(|(column, node)| Ok((column.to_owned(), source(&node)?)))
        .collect::<Result<_>>()?;
    Ok(History { table: name, columns })
}

fn source(node: &Node<'_>) -> Result<Source> {
    let known: Vec<&str> = WORDS.iter().map(|(name, _)| *name).collect();
    match node.value() {
        Value::Object(_) => Ok(Source::Order(node.object(&["order"])?.need("order")?.text()?)),
        Value::String(text) => Template::parse(text).map(Source::Text).map_err(|word| {
            let hint = format!("{} Write \"::\" for a colon.", suggestion(&word, &known));
            node.error(format!("unknown word \":{word}\"")).with_hint(hint)
        }),
        Value::Number(_) | Value::Bool(_) => {
            let plain = Piece::Plain(node.value().to_string());
            Ok(Source::Text(Template(vec![plain])))
        }
        _ => Err(node
            .error("is neither a text nor an expression")
            .with_hint("Write a text such as \":action of order :number: :reason\", or {\"order\": \"customer_id\"}.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCESS: Access<'_> = Access {
        number: "302-1234567-1234567",
        reason: Some("return"),
        user: "clerk",
        actor: None,
        at: "2026-11-01 10:00:00+00",
        action: "retrieve",
    };

    fn filled(template: &str) -> Option<String> {
        Template::parse(template).unwrap().fill(&ACCESS)
    }

    #[test]
    fn words_are_replaced() {
        assert_eq!(
            filled(":action of :number: :reason").unwrap(),
            "retrieve of 302-1234567-1234567: return"
        );
        assert_eq!(filled("::at 10:30, by :user(:actor)").unwrap(), ":at 10:30, by clerk()");
        assert_eq!(filled(":at").unwrap(), ACCESS.at);
        assert_eq!(filled(":actor"), None);
        assert_eq!(filled("").unwrap(), "");
        assert_eq!(filled("plain:").unwrap(), "plain:");
    }

    #[test]
    fn an_unknown_word_is_refused() {
        assert_eq!(Template::parse("by :users"), Err("users".to_owned()));
    }
}
