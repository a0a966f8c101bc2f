//! What a cell holds after redaction, worked out on the text forms of values.
//!
//! Every treatment is a fixed point: applied to its own result it changes nothing. Otherwise the check for PII that came
//! back would archive what redaction itself had written.

#[cfg(test)]
mod tests;

use std::borrow::Cow;

use serde_json::Value;

use super::array_text::{ArrayError, redact_array};
use super::json_text::{JsonError, JsonRule};
use super::policy;
use super::scrub::{Marks, Names};

/// What kind of column a treatment is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// text, varchar, char, citext, and domains over them.
    Text,
    /// json or jsonb.
    Json,
    /// An array of a type of shape `Text`.
    TextArray,
    /// Everything else.
    Other,
}

/// What to do with a cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// Nothing: it is NULL, empty, or holds the result already.
    Keep,
    /// Write NULL.
    Null,
    /// Write this, by the type's input function.
    Text(Cow<'a, str>),
    /// Write what the policy's SQL expression gives.
    Sql,
    /// Write it without the names of its order, which are not known here.
    Scrub,
}

/// Why a treatment does not fit its column. The caller names the column.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct TreatmentProblem {
    /// What is wrong.
    pub problem: String,
    /// A sentence: what to write instead.
    pub hint: String,
}

/// Why a cell cannot be redacted. Never holds anything of the cell.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreatError {
    /// A JSON column's document is beyond our limits.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// An array column's text is no array.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// A unique value was asked for without a key to make it of.
    #[error("record has no key to make a unique value of")]
    NoKey,
}

/// A treatment of the policy, checked against its column.
#[derive(Debug, Clone)]
pub struct Treatment {
    action: Action,
    shape: Shape,
    blank_padded: bool,
    placeholder: String,
    marks: Vec<String>,
}

#[derive(Debug, Clone)]
enum Action {
    Null,
    Constant(String),
    Unique(String),
    Json(JsonRule),
    Elements,
    Prefix(usize),
    Sql,
    Scrub,
}

const KEY: &str = "{key}";

impl Treatment {
    /// Checks a treatment against its column. `also_redacted` are the marks of earlier tools, `blank_padded` is true for `char(n)`.
    pub fn compile(
        treatment: &policy::Treatment,
        shape: Shape,
        nullable: bool,
        placeholder: &str,
        also_redacted: &[String],
        blank_padded: bool,
    ) -> Result<Self, TreatmentProblem> {
        let action = Compile {
            shape,
            nullable,
            placeholder,
            marks: also_redacted,
        }
        .action(treatment)?;
        Ok(Treatment {
            action,
            shape,
            blank_padded: blank_padded && matches!(shape, Shape::Text | Shape::TextArray),
            placeholder: placeholder.to_string(),
            marks: also_redacted.to_vec(),
        })
    }

    /// The one text that every cell gets, if the treatment has one.
    pub fn constant(&self) -> Option<&str> {
        match &self.action {
            Action::Constant(text) => Some(text),
            _ => None,
        }
    }

    /// Replaces [`constant`](Self::constant) by its form as the column's own type prints it (`true` as `t`, `0` as `0.00`):
    /// cells are compared as text, and without this the treatment would not recognise its own result.
    pub fn set_constant(&mut self, printed: String) {
        if let Action::Constant(text) = &mut self.action {
            *text = printed;
        }
    }

    /// What to do with a cell of the record with this key.
    pub fn apply(&self, cell: Option<&str>, record_key: &[Option<String>]) -> Result<Outcome<'_>, TreatError> {
        let Some(cell) = cell.filter(|cell| !self.is_empty(cell)) else {
            return Ok(Outcome::Keep);
        };
        if matches!(self.action, Action::Sql) {
            return Ok(Outcome::Sql);
        }
        if self.is_redacted(cell) {
            return Ok(Outcome::Keep);
        }
        let result: Cow<'_, str> = match &self.action {
            Action::Null => return Ok(Outcome::Null),
            Action::Sql => return Ok(Outcome::Sql),
            Action::Scrub => return Ok(Outcome::Scrub),
            Action::Constant(text) => text.into(),
            Action::Unique(template) => {
                let key: Vec<&str> = record_key.iter().flatten().map(String::as_str).collect();
                if key.is_empty() {
                    return Err(TreatError::NoKey);
                }
                template.replace(KEY, &key.join("-")).into()
            }
            // A text column may hold anything; what cannot be read as JSON, nor is within its limits, goes as a whole.
            Action::Json(rule) if self.shape == Shape::Text => rule
                .apply_to_text(cell)
                .map_or_else(|_| (&self.placeholder).into(), Into::into),
            Action::Json(rule) => rule.apply(cell)?.into(),
            Action::Elements => redact_array(cell, ',', |element| {
                let stays = self.is_empty(element) || self.is_mark(element);
                if stays {
                    element.to_string()
                } else {
                    self.placeholder.clone()
                }
            })?
            .into(),
            Action::Prefix(length) => cell.chars().take(*length).collect::<String>().into(),
        };
        Ok(if self.same(cell, &result) {
            Outcome::Keep
        } else {
            Outcome::Text(result)
        })
    }

    /// Whether a cell of a redacted record is as this treatment leaves it, rather than one that held nothing. What an
    /// expression gives cannot be told here.
    pub fn has_left(&self, cell: Option<&str>, record_key: &[Option<String>]) -> Result<bool, TreatError> {
        match (&self.action, cell) {
            (Action::Sql, _) | (Action::Null, None) => Ok(true),
            (_, None) => Ok(false),
            (_, Some(text)) => Ok(!self.is_empty(text) && self.apply(cell, record_key)? == Outcome::Keep),
        }
    }

    /// A text without these names, as long as the column has room for it; `None` for another treatment, and where the text
    /// has none of them.
    pub fn scrub(&self, cell: &str, names: &Names, room: Option<usize>) -> Option<String> {
        if !matches!(self.action, Action::Scrub) {
            return None;
        }
        let scrubbed = names.scrub(self.significant(cell), self.marks(), room);
        (!self.same(cell, &scrubbed)).then_some(scrubbed)
    }

    /// What may stand in place of a value.
    pub fn marks(&self) -> Marks<'_> {
        Marks {
            placeholder: &self.placeholder,
            others: &self.marks,
        }
    }

    /// Whether it leaves something of a value, which others may go on changing.
    pub fn leaves_rest(&self) -> bool {
        matches!(self.action, Action::Json(_))
    }

    fn is_redacted(&self, cell: &str) -> bool {
        match self.shape {
            Shape::Text => self.is_mark(cell),
            Shape::Other => self.marks.iter().any(|mark| mark == cell),
            // Marks of these stand inside.
            Shape::Json | Shape::TextArray => false,
        }
    }

    fn is_mark(&self, text: &str) -> bool {
        self.same(text, &self.placeholder) || self.marks.iter().any(|mark| self.same(text, mark))
    }

    fn is_empty(&self, text: &str) -> bool {
        self.significant(text).is_empty()
    }

    fn same(&self, a: &str, b: &str) -> bool {
        self.significant(a) == self.significant(b)
    }

    /// `char(n)` pads with blanks that mean nothing.
    fn significant<'t>(&self, text: &'t str) -> &'t str {
        if self.blank_padded {
            text.trim_end_matches(' ')
        } else {
            text
        }
    }
}

struct Compile<'a> {
    shape: Shape,
    nullable: bool,
    placeholder: &'a str,
    marks: &'a [String],
}

impl Compile<'_> {
    fn action(&self, treatment: &policy::Treatment) -> Result<Action, TreatmentProblem> {
        use policy::Treatment as T;
        match (treatment, self.shape) {
            (T::Default | T::Placeholder, Shape::Text) => Ok(Action::Constant(self.placeholder.to_string())),
            (T::Default | T::ArrayPlaceholder, Shape::TextArray) => Ok(Action::Elements),
            (T::Default, Shape::Json) => problem(
                "JSON columns have no default treatment",
                r#"Name the paths that hold personal data, for example {"json": ["$.ShippingAddress.Name"]}."#,
            ),
            (T::Default, Shape::Other) if self.nullable => Ok(Action::Null),
            (T::Default, Shape::Other) => problem(
                "column is NOT NULL and its type has no default treatment",
                r#"Give it a constant, {"value": ...}, or an expression, {"sql": "..."}."#,
            ),
            (T::Placeholder, _) => problem(
                format!("the placeholder does not fit {}", self.named()),
                format!("Use {}.", self.alternatives()),
            ),
            (T::Null, _) => self.null(),
            (T::Value(value), _) => self.value(value),
            (T::Unique(template), Shape::Text) if template.contains(KEY) => Ok(Action::Unique(template.clone())),
            (T::Unique(_), Shape::Text) => problem(
                "the template of the unique value does not contain {key}",
                r#"Write it like {"unique": "redacted-{key}@redacted.invalid"}."#,
            ),
            (T::Json(paths), Shape::Json | Shape::Text) if !paths.is_empty() => {
                self.rule(JsonRule::redacting(paths, self.placeholder, self.marks))
            }
            (T::Json(_), Shape::Json | Shape::Text) => problem(
                "the list of JSON paths is empty",
                r#"Name the paths that hold personal data, or those to keep: {"json": {"keep": ["$.AmazonOrderId"]}}."#,
            ),
            (T::JsonKeep(paths), Shape::Json | Shape::Text) => {
                self.rule(JsonRule::keeping(paths, self.placeholder, self.marks))
            }
            (T::Prefix(0), Shape::Text) => problem(
                "a prefix of no characters keeps nothing",
                r#"Use "placeholder", or a prefix of 1 or more."#,
            ),
            (T::Prefix(length), Shape::Text) => Ok(Action::Prefix(*length)),
            (T::Sql(_), _) => Ok(Action::Sql),
            (T::Unique(_), _) => self.misfit("a unique text"),
            (T::Json(_) | T::JsonKeep(_), _) => self.misfit("a JSON treatment"),
            (T::ArrayPlaceholder, _) => self.misfit("an array treatment"),
            (T::Prefix(_), _) => self.misfit("a prefix"),
            (T::Scrub(_), Shape::Text) => Ok(Action::Scrub),
            (T::Scrub(_), _) => self.misfit("scrubbing"),
        }
    }

    fn null(&self) -> Result<Action, TreatmentProblem> {
        if self.nullable {
            return Ok(Action::Null);
        }
        problem(
            "column is NOT NULL and cannot be set to null",
            format!("Use {}.", self.alternatives()),
        )
    }

    fn value(&self, value: &Value) -> Result<Action, TreatmentProblem> {
        Ok(Action::Constant(match (value, self.shape) {
            (Value::Null, _) => return self.null(),
            (value, Shape::Json) => value.to_string(),
            (Value::String(text), _) => text.clone(),
            (Value::Number(_) | Value::Bool(_), _) => value.to_string(),
            (Value::Array(_) | Value::Object(_), _) => {
                return problem(
                    format!(
                        "the value for {} is neither a string, a number, a boolean nor null",
                        self.named()
                    ),
                    r#"Write it as a string, in the form that the column's type reads, for example {"value": "{}"}."#,
                );
            }
        }))
    }

    fn rule(&self, rule: Result<JsonRule, JsonError>) -> Result<Action, TreatmentProblem> {
        rule.map(Action::Json).or_else(|error| {
            problem(
                error.to_string(),
                "Paths are JSONPath as in RFC 9535, for example \"$.OrderItems[*].GiftMessageText\".",
            )
        })
    }

    fn misfit(&self, what: &str) -> Result<Action, TreatmentProblem> {
        problem(
            format!("{what} does not fit {}", self.named()),
            format!("Use {}.", self.alternatives()),
        )
    }

    fn named(&self) -> &'static str {
        match self.shape {
            Shape::Text => "a text column",
            Shape::Json => "a JSON column",
            Shape::TextArray => "an array of texts",
            Shape::Other => "a column of this type",
        }
    }

    fn alternatives(&self) -> String {
        let own = match self.shape {
            Shape::Text => r#""placeholder", "#,
            Shape::Json => r#"{"json": ["$.path"]}, "#,
            Shape::TextArray => r#"{"array": "placeholder"}, "#,
            Shape::Other => "",
        };
        let null = if self.nullable { r#""null", "# } else { "" };
        format!(r#"{own}{null}{{"value": ...}} or {{"sql": "..."}}"#)
    }
}

fn problem<T>(problem: impl Into<String>, hint: impl Into<String>) -> Result<T, TreatmentProblem> {
    Err(TreatmentProblem {
        problem: problem.into(),
        hint: hint.into(),
    })
}
