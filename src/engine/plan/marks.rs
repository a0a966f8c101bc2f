//! Columns that say of a row that it is redacted: set with the overwrite, set back by a retrieval.

use super::build::{Builder, nearest};
use super::{Entry, Mark, Table};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Expr;

impl Builder<'_> {
    /// Adds the marks of an entry to its table.
    pub(super) fn marks(&mut self, index: usize, listed: &[(String, String)], place: &str) -> Result<()> {
        for (name, text) in listed {
            let place = format!("{place}.mark.{name}");
            let table = &self.tables[index];
            let shown = table.relation.shown();
            let refused = |problem: &str, hint: &str| {
                Err(Error::invalid(format!("column \"{name}\" of {shown} {problem}")).hint(hint))
            };
            if table.delete {
                return refused("marks rows that redaction removes", "Leave \"mark\" out of this entry.");
            }
            let column = table.facts.column(name).ok_or_else(|| {
                Error::undefined(format!("column \"{name}\" of {shown} does not exist"))
                    .hint(nearest(&table.facts, name))
            })?;
            if column.generated || column.identity {
                return refused("is generated and cannot be a mark", "Use a column that can be written.");
            }
            if column.not_null && !column.has_default {
                return refused(
                    "is NOT NULL and has no default: a retrieval could not take the mark back",
                    "Give the column a default, or let it be NULL.",
                );
            }
            let name = column.name.clone();
            let expression = self.expression(index, text, &place)?;
            if self.tables[index].marks.iter().all(|m| m.name != name) {
                self.tables[index].marks.push(Mark { name, expression });
            }
        }
        Ok(())
    }
}

/// Refuses marks in columns by which rows are known or found.
pub(super) fn refuse(tables: &[Table], entries: &[Entry], number: Option<&Expr>) -> Result<()> {
    for (index, table) in tables.iter().enumerate() {
        for mark in &table.marks {
            let column = Expr::column(mark.name.bare());
            let is_key = table.key.iter().any(|(name, _)| *name == mark.name);
            let leads = entries.iter().any(|entry| {
                let own = entry.table == index
                    && (entry.on_child.contains(&column) || entry.number.as_ref() == Some(&column));
                let above =
                    entry.parent.is_some_and(|p| entries[p].table == index) && entry.on_parent.contains(&column);
                own || above
            });
            let is_number = index == 0 && number == Some(&column);
            if is_key || leads || is_number || table.cells.iter().any(|c| c.name == mark.name) {
                return Err(Error::invalid(format!(
                    "column \"{}\" of {} is a key, a link, a number or redacted, and cannot be a mark",
                    mark.name.bare(),
                    table.relation.shown()
                ))
                .hint("Use a column of its own."));
            }
        }
    }
    Ok(())
}
