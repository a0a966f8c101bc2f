//! Where the names are that a `scrub` treatment looks for.

use super::{Entry, Table};
use crate::domain::policy::Treatment as Rule;
use crate::domain::treatment::Shape;
use crate::pg::error::{Error, Result};

/// Finds the columns that `scrub` treatments name, when all entries are there.
///
/// # Errors
/// One is no redacted column of text.
pub(super) fn resolve(tables: &mut [Table], entries: &[Entry]) -> Result<()> {
    // What may be named, as a policy names it.
    let mut known: Vec<(String, (usize, usize))> = Vec::new();
    for entry in entries {
        let alias = if entry.alias.is_empty() { "orders" } else { &entry.alias };
        for cell in &entry.cells {
            let column = &tables[entry.table].cells[*cell];
            let is_text = column.shape == Shape::Text || (tables[entry.table].delete && column.room.is_none());
            if is_text && !matches!(column.rule(), Some(Rule::Scrub(_) | Rule::Sql(_))) {
                known.push((format!("{alias}.{}", column.name.bare()), (entry.table, *cell)));
            }
        }
    }
    for table in tables {
        let shown = table.relation.shown();
        for cell in &mut table.cells {
            let Some(Rule::Scrub(names)) = &cell.rule else { continue };
            for name in names {
                let found = known.iter().filter(|(of, _)| of == name).map(|(_, place)| *place);
                let before = cell.names.len();
                cell.names.extend(found);
                if cell.names.len() == before {
                    let column = cell.name.bare();
                    let all: Vec<&str> = known.iter().map(|(of, _)| of.as_str()).collect();
                    let nearest = all
                        .iter()
                        .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
                    let hint = nearest.map_or_else(
                        || "Nothing but redacted columns of text can be named.".to_owned(),
                        |n| format!("Perhaps you meant \"{n}\". Name an entry and a column of text that is redacted there; the orders table is \"orders\"."),
                    );
                    return Err(Error::invalid(format!(
                        "column \"{column}\" of {shown}: scrub names \"{name}\", which is no redacted column of text"
                    ))
                    .hint(hint));
                }
            }
        }
    }
    Ok(())
}
