//! What earlier versions of a policy left in a cell is our own output, not somebody's data: a new version overwrites it,
//! and archives nothing of it.

use std::collections::HashMap;

use super::gather::LiveRecord;
use super::plan::Plan;
use crate::domain::document::Cell;
use crate::domain::policy::{Policy, Redact, Treatment as Rule};
use crate::domain::treatment::{Outcome, Treatment};
use crate::pg::error::Result;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// The documents under which orders of a batch were redacted, by version.
#[derive(Default)]
pub struct Former(HashMap<i64, Policy>);

impl Former {
    /// Loads those versions that are not in force any more.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn load(plan: &Plan, versions: impl Iterator<Item = Option<i64>>) -> Result<Self> {
        let versions: Vec<i64> = versions.flatten().filter(|v| *v != plan.version).collect();
        if versions.is_empty() {
            return Ok(Self::default());
        }
        let rows = as_extension(|| {
            sql::read(
                "SELECT version, document FROM amazon_pii.policy_version WHERE policy = $1 AND version = ANY ($2)",
                &[Arg::Text(Some(&plan.policy)), Arg::Ints(versions)],
            )
        })?;
        let mut out = HashMap::new();
        for row in &rows {
            if let Ok(document) = Policy::parse(row.str(1)?) {
                out.insert(row.int(0)?, document);
            }
        }
        Ok(Self(out))
    }

    /// Whether a live cell holds what the version under which its order was redacted made of the archived value.
    pub fn left(
        &self,
        plan: &Plan,
        version: Option<i64>,
        record: &LiveRecord,
        cell: usize,
        archived: &Cell<'_>,
    ) -> bool {
        let Some(document) = version.and_then(|v| self.0.get(&v)) else {
            return false;
        };
        let Some(treatment) = treatment(plan, document, version.unwrap_or_default(), record, cell) else {
            return false;
        };
        let live = record.cells[cell].as_ref().and_then(|c| c.value.as_deref());
        match treatment.apply(archived.text, &record.key) {
            Ok(Outcome::Text(text)) => live.map(|l| l.trim_end_matches(' ')) == Some(text.trim_end_matches(' ')),
            Ok(Outcome::Null) => live.is_none(),
            _ => false,
        }
    }
}

/// How a document treated a cell that the policy in force treats.
fn treatment(plan: &Plan, document: &Policy, version: i64, record: &LiveRecord, cell: usize) -> Option<Treatment> {
    let entry = &plan.entries[record.entry];
    let table = &plan.tables[record.table];
    let column = &table.cells[cell];
    let redact = if entry.alias.is_empty() {
        &document.orders.redact
    } else {
        &document.linked.iter().find(|l| l.alias == entry.alias)?.redact
    };
    let name = column.name_under(version);
    let rule = match redact {
        Redact::Nothing => None,
        Redact::Columns(names) => names.iter().any(|n| n == name).then_some(Rule::Default),
        Redact::Treatments(pairs) => pairs.iter().find(|(n, _)| n == name).map(|(_, r)| r.clone()),
    }?;
    let nullable = !table.facts.column(column.name.bare())?.not_null;
    Treatment::compile(
        &rule,
        column.shape,
        nullable,
        &document.placeholder,
        &document.also_redacted,
        column.padded,
    )
    .ok()
}
