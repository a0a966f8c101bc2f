//! Reads a table from end to end, as its owner, and looks up every run of words in it.

use super::Search;
use super::rightful::rightful;
use crate::domain::words::{in_order, unescaped};
use crate::engine::walk::Values;
use crate::pg::cursor::Cursor;
use crate::pg::error::Result;
use crate::pg::ident::{Ident, Relation};
use crate::pg::identity::{Identity, OWN_PATH, act_as};

/// Rows in one page.
const PAGE: usize = 1000;

/// What was found in treated columns of a row: right or wrong, as whose row it is.
struct Judged {
    key: Values,
    /// (Column, hash)
    hits: Vec<(usize, u64)>,
}

/// Searches one place.
///
/// # Errors
/// It cannot be read as its owner.
pub(super) fn table(search: &mut Search<'_>, at: usize) -> Result<()> {
    let place = &search.places[at];
    if place.columns.is_empty() {
        return Ok(());
    }
    let shown = place.relation.shown();
    let key = place
        .table
        .map(|t| search.plan.tables[t].key.as_slice())
        .unwrap_or_default();
    let columns = place.columns.iter().map(|c| &c.name);
    let select: Vec<&Ident> = key.iter().map(|(name, _)| name).chain(columns).collect();
    let query = select_from(&select, &place.relation, place.only);
    let keys = key.len();
    let owner = Identity::Owner(place.owner);
    search.progress.table(&shown)?;
    let cursor = act_as(owner, OWN_PATH, &[], || Cursor::open(&query))?;
    let mut pages = || {
        loop {
            let mut judged = Vec::new();
            let rows = act_as(owner, OWN_PATH, &[], || page(search, at, keys, &cursor, &mut judged))?;
            settle(search, at, judged)?;
            search.progress.rows(&shown, rows)?;
            if rows < PAGE {
                return Ok(());
            }
        }
    };
    let searched = pages();
    cursor.close();
    searched
}

fn select_from(columns: &[&Ident], relation: &Relation, only: bool) -> String {
    let list: Vec<String> = columns.iter().map(ToString::to_string).collect();
    if only {
        format!("SELECT {} FROM ONLY {relation}", list.join(", "))
    } else {
        format!("SELECT {} FROM {relation}", list.join(", "))
    }
}

/// Marks what is in the next rows, and adds what depends on whose row it is to `judged`.
fn page(search: &mut Search<'_>, at: usize, keys: usize, cursor: &Cursor, judged: &mut Vec<Judged>) -> Result<usize> {
    cursor.page(PAGE, |row| {
        let mut open = Vec::new();
        for column in 0..search.places[at].columns.len() {
            let text = match row.text(keys + column) {
                Ok(text) => text,
                Err(e) if e.is_too_large() => {
                    search.counted[at][column].too_large = true;
                    continue;
                }
                Err(e) => return Err(e),
            };
            let Some(text) = text.filter(|t| *t != search.plan.document.placeholder) else {
                continue;
            };
            let treated = search.places[at].columns[column].treated;
            for hash in look_up(search, at, column, text) {
                if treated {
                    open.push((column, hash));
                } else {
                    search.mark(at, column, hash);
                }
            }
        }
        if !open.is_empty() {
            let key = (0..keys)
                .map(|k| Ok(row.text(k)?.map(str::to_owned)))
                .collect::<Result<_>>()?;
            judged.push(Judged { key, hits: open });
        }
        Ok(())
    })
}

/// What of a text is looked for.
fn look_up(search: &Search<'_>, at: usize, column: usize, text: &str) -> Vec<u64> {
    let mut found = Vec::new();
    let mut look = |text: &str| {
        search.hashing.windows(text, |hash| {
            // Towns and the like are in many rows: of the first one it is found out whose it is.
            if search.sought.contains(hash) && !search.is_left_out(hash) {
                found.push(hash);
            }
        });
    };
    if search.places[at].columns[column].vector {
        look(&in_order(text));
    } else {
        look(text);
        if let Some(text) = unescaped(text) {
            look(&text);
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Whatever a row holds rightfully is not looked for anywhere else either: who could say whose it is there?
fn settle(search: &mut Search<'_>, at: usize, judged: Vec<Judged>) -> Result<()> {
    let Some(table) = search.places[at].table.filter(|_| !judged.is_empty()) else {
        return Ok(());
    };
    let keys: Vec<Values> = judged.iter().map(|j| j.key.clone()).collect();
    let rightful = rightful(search, table, &keys)?;
    for (row, rightful) in judged.into_iter().zip(rightful) {
        for (column, hash) in row.hits {
            if rightful {
                search.leave_out(hash);
            } else {
                search.mark(at, column, hash);
            }
        }
    }
    Ok(())
}
