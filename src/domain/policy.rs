//! The policy document: typed, complete and consistent in itself once `Policy::parse` has returned it.
//!
//! What needs the server (do the tables exist, are the intervals intervals, do the treatments fit) is checked when the
//! policy is applied.

mod access;
mod check;
mod columns;
mod document;
mod history;
mod moment;
mod name;
mod read;
#[cfg(test)]
mod tests;

use chrono::{DateTime, NaiveTime, Utc};
use chrono_tz::Tz;
use serde::Deserialize;

use super::quota::Limits;
pub use history::{Access, History, Source, Template};
pub use name::QualifiedName;

/// What a policy document asks for, defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// The policy's name: a letter, then letters, digits and underscores, at most 40 in all.
    pub policy: String,
    /// The table whose rows are the orders.
    pub orders: Orders,
    /// The entries that belong to an order, parents before their children.
    pub linked: Vec<Linked>,
    /// Rows that no order leads to, in the document's order.
    pub by_age: Vec<ByAge>,
    /// What stands in place of personal text.
    pub placeholder: String,
    /// Marks of earlier tools, which count as redacted already.
    pub also_redacted: Vec<String>,
    /// From the anchor to the archive, as the text of a PostgreSQL interval.
    pub archive_after: String,
    /// From the anchor to the redaction, as the text of a PostgreSQL interval.
    pub redact_after: String,
    /// From a retrieval to the next redaction, as the text of a PostgreSQL interval.
    pub retrieved_for: String,
    /// How long a file may wait for its deletion before its order is overdue, as the text of a PostgreSQL interval.
    pub files_within: String,
    /// How long the archive keeps a document, as the text of a PostgreSQL interval.
    pub archive_for: String,
    /// How long the audit log keeps an entry, as the text of a PostgreSQL interval; a year at least.
    pub audit_for: String,
    /// Where archived documents go.
    pub archive: Archive,
    /// What happens on the deadline while the archive cannot be reached.
    pub deadline: Deadline,
    /// The hours in which the worker may work, if they are limited.
    pub window: Option<Window>,
    /// The zone in which a time without zone is read; known to the time zone database.
    pub timezone: String,
    /// Whether the first apply enables the policy.
    pub enabled: bool,
    /// Before this moment orders are flagged and shown, and not touched.
    pub effective_from: Option<DateTime<Utc>>,
    /// Before this moment cycles say what they would do, and flag only.
    pub report_only_until: Option<DateTime<Utc>>,
    /// What the export of accounting data means to redaction, if the document says so.
    pub export: Option<Export>,
    /// What a write to a retrieved order's personal data meets.
    pub when_retrieved: WhenRetrieved,
    /// What a write of personal data to a redacted order meets.
    pub on_reimport: OnReimport,
    /// Whether access needs a reason.
    pub reason: ReasonRule,
    /// Why personal data is kept for longer than 30 days.
    pub loosened: Option<String>,
    /// Where accesses are written besides the audit log.
    pub history: Option<History>,
    /// Roles that need not be operators for `retrieve_on_insert`.
    pub retrieve_for: Vec<String>,
    /// How many orders somebody may have opened in a day.
    pub limits: Limits,
    /// Whether calls by order number need `amazon_pii.actor`.
    pub require_actor: bool,
}

/// The archive of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// The schema that holds it: documents and data keys, or, beside a foreign table, the data keys and what has yet to be sent.
    pub schema: String,
    /// A foreign table that takes the documents, by its schema and name.
    pub foreign_table: Option<(String, String)>,
}

/// What happens on the deadline while the archive cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Deadline {
    /// Nothing is overwritten before the foreign table holds its copy.
    #[default]
    Wait,
    /// What is due is overwritten; the sealed copy stays here until it can be sent.
    Spool,
}

/// The hours of a day in which the worker may work. May span midnight; is never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// The first moment of it.
    pub from: NaiveTime,
    /// The first moment after it.
    pub to: NaiveTime,
    /// The zone whose clocks show these times.
    pub timezone: Tz,
}

/// The orders table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orders {
    /// The table, as in SQL.
    pub table: String,
    /// The key's columns; the primary key by default.
    pub key: Option<Vec<String>>,
    /// A column or expression: what people know the order by.
    pub number: Option<String>,
    /// A condition that is true for Amazon's orders; by default, the number has Amazon's form.
    pub amazon: Option<String>,
    /// When the clock starts: the first that is not NULL. Never empty.
    pub anchor: Vec<Anchor>,
    /// An expression that gives the number of the order that this one replaces.
    pub replaces: Option<String>,
    /// A column or expression: when the order was placed.
    pub placed: Option<String>,
    /// How long after `placed` an order without an anchor is stale, as the text of a PostgreSQL interval.
    pub stale_after: Option<String>,
    /// What happens to a stale order.
    pub stale: Stale,
    /// A column or expression: the moment before which the order is not touched.
    pub effective_from: Option<String>,
    /// What an order of another channel meets whose customer Amazon orders have.
    pub manual_orders: ManualOrders,
    /// The customer that Amazon orders get instead of the importer's.
    pub assign_customer: Option<AssignCustomer>,
    /// The personal data in the order's own row.
    pub redact: Redact,
    /// Columns that are known to hold none.
    pub keep: Vec<String>,
    /// A column or expression: where a file of the row's lies, outside of the database.
    pub files: Option<String>,
    /// Columns that say of the order that it is redacted, with an expression for each.
    pub mark: Vec<(String, String)>,
}

/// What starts an order's clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Anchor {
    /// A column of the order's row, or an expression over it.
    Expression(String),
    /// The last moment over linked rows.
    Linked {
        /// The entry's name.
        linked: String,
        /// A column of its rows, or an expression over them.
        at: String,
        /// The condition that a row must meet to count (`where`).
        filter: Option<String>,
        /// A condition over the order, without which it is not complete.
        complete: Option<String>,
    },
}

/// Rows that belong to an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linked {
    /// The table, as in SQL.
    pub table: String,
    /// The entry's name, unique in the policy (`as`).
    pub alias: String,
    /// The entry that this one hangs on; the orders table if there is none.
    pub parent: Option<String>,
    /// The key's columns; the primary key by default.
    pub key: Option<Vec<String>>,
    /// Pairs of columns or expressions, this table's and its parent's. Never empty.
    pub on: Vec<(String, String)>,
    /// The condition that a row must meet (`where`).
    pub filter: Option<String>,
    /// A column or expression: what people know such a row by (an invoice number).
    pub number: Option<String>,
    /// A column or expression: the moment before which the deadline of the order may not run.
    pub not_before: Option<String>,
    /// The personal data in these rows.
    pub redact: Redact,
    /// Columns that are known to hold none.
    pub keep: Vec<String>,
    /// Columns that say of a row that it is redacted, with an expression for each.
    pub mark: Vec<(String, String)>,
    /// Whether a row is overwritten or removed.
    pub on_redact: OnRedact,
    /// What these rows are to the order.
    pub role: Option<Role>,
    /// Columns or expressions over a row that are the same in duplicates of it.
    pub duplicate_by: Vec<String>,
    /// What pointing an order to another of these rows meets, when one of both is archived.
    pub merge: Merge,
    /// Which orders keep a row alive that several of them use.
    pub shared: Shared,
    /// Whether a new row has its order retrieved.
    pub retrieve_on_insert: RetrieveOnInsert,
    /// Whether a row is archived before it is overwritten or removed.
    pub archive: bool,
    /// A column or expression: where a file of the row's lies, outside of the database.
    pub files: Option<String>,
}

/// Rows that no order leads to, and that hold personal data until they are old. They are not archived: the document has said
/// so in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ByAge {
    /// The table, as in SQL.
    pub table: String,
    /// The key's columns; the primary key by default.
    pub key: Option<Vec<String>>,
    /// A column or expression: the moment from which a row's age counts.
    pub at: String,
    /// The age, as the text of a PostgreSQL interval.
    pub after: String,
    /// The condition that a row must meet (`where`).
    pub filter: Option<String>,
    /// The personal data in these rows; nothing where they go as a whole.
    pub redact: Redact,
    /// Columns that are known to hold none.
    pub keep: Vec<String>,
    /// Whether a row is overwritten or removed.
    pub on_redact: OnRedact,
}

/// The columns of a table that hold personal data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Redact {
    /// None: the entry is a bridge to others.
    Nothing,
    /// Columns that take the default treatment of their type.
    Columns(Vec<String>),
    /// Columns with the treatment of each, in the document's order.
    Treatments(Vec<(String, Treatment)>),
}

impl Redact {
    /// Every column with its treatment, in the document's order.
    pub fn columns(&self) -> impl Iterator<Item = (&str, &Treatment)> {
        let (plain, treated): (&[String], &[(String, Treatment)]) = match self {
            Self::Nothing => (&[], &[]),
            Self::Columns(columns) => (columns, &[]),
            Self::Treatments(columns) => (&[], columns),
        };
        plain
            .iter()
            .map(|column| (column.as_str(), &Treatment::Default))
            .chain(treated.iter().map(|(column, treatment)| (column.as_str(), treatment)))
    }
}

/// What redaction puts in place of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Treatment {
    /// Whatever suits the column's type.
    Default,
    /// The policy's placeholder.
    Placeholder,
    /// NULL.
    Null,
    /// A constant.
    Value(serde_json::Value),
    /// A text that holds `{key}`, and so differs from row to row.
    Unique(String),
    /// The values at these JSON paths.
    Json(Vec<String>),
    /// All values but those at these JSON paths.
    JsonKeep(Vec<String>),
    /// The value of an expression over the row.
    Sql(String),
    /// The placeholder for each element.
    ArrayPlaceholder,
    /// The first characters, this many.
    Prefix(usize),
    /// The text without the order's own values of these columns, each named as entry and column.
    Scrub(Vec<String>),
}

/// What a write to a retrieved order's personal data meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenRetrieved {
    /// An error.
    #[default]
    Refuse,
    /// The statement goes on, the value stays.
    Ignore,
}

/// What a write of personal data to a redacted order meets: the channel sends the order again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReimport {
    /// It goes through; the next cycle archives what is new, and redacts it.
    #[default]
    Redact,
    /// What redaction left stays, the rest of the write goes through.
    Keep,
    /// An error.
    Refuse,
}

/// Whether access to personal data needs a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReasonRule {
    /// It does.
    #[default]
    Required,
    /// It may be left out.
    Optional,
}

/// What happens to an order whose accounting data is not exported when it is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Export {
    /// It is redacted; that is told before and after.
    Warn,
    /// It waits.
    Require,
}

/// What happens to an order that has no anchor for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stale {
    /// It is shown and announced.
    #[default]
    Report,
    /// It is redacted all the same.
    Redact,
}

/// What redaction does to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRedact {
    /// Overwrites its personal data.
    #[default]
    Update,
    /// Removes it.
    Delete,
}

/// What the rows of an entry are to the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Its customer.
    Customer,
}

/// Whether a new row has its order retrieved, if that is redacted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetrieveOnInsert {
    Never,
    Always,
    /// When it meets this condition.
    When(String),
}

/// The customer that Amazon orders get instead of the importer's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssignCustomer {
    /// The column of the orders table that points at the customer.
    pub column: String,
    /// What it holds for the generic customer, as text.
    pub to: String,
    /// When the row goes that the order was imported with.
    pub orphan: Orphan,
}

/// When a customer's row goes that no order is left for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Orphan {
    /// With the order that it was imported with.
    #[default]
    Archive,
    /// At once.
    Now,
}

/// What an order of another channel meets whose customer Amazon orders have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ManualOrders {
    /// Nothing.
    #[default]
    Allow,
    /// A warning, and a line in the audit log.
    Warn,
    /// An error.
    Refuse,
}

/// What a merge of customers meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Merge {
    /// Nothing.
    #[default]
    Allow,
    /// An error, when one of them is archived.
    Refuse,
}

/// Which orders keep a shared row alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shared {
    /// Those of every channel.
    #[default]
    Any,
    /// Amazon's only.
    Amazon,
}

/// What is wrong with a policy document, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}{problem}", .path, if .path.is_empty() { "" } else { ": " })]
pub struct PolicyError {
    /// The place in the document, such as `linked[2].redact.name`; empty for the document as a whole.
    pub path: String,
    /// What is wrong there.
    pub problem: String,
    /// What would be right, as a sentence.
    pub hint: Option<String>,
}

impl PolicyError {
    /// An error without a hint.
    pub fn new(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            problem: problem.into(),
            hint: None,
        }
    }

    /// The same error with a hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl Policy {
    /// The customer's entry, where exactly one has that role.
    pub fn customer(&self) -> Option<&Linked> {
        let mut customers = self.linked.iter().filter(|l| l.role == Some(Role::Customer));
        customers.next().filter(|_| customers.next().is_none())
    }

    /// Reads a policy document.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let value = document::load(text)?;
        let mut policy = read::policy(&document::Node::root(&value))?;
        check::consistent(&policy)?;
        policy.linked = check::parents_first(std::mem::take(&mut policy.linked))?;
        Ok(policy)
    }
}
