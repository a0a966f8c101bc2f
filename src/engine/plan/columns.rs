//! Columns by their numbers: what a document calls by its bare name is found again under another. Names inside of
//! expressions are not rewritten; a policy that has one of a column that is called otherwise by now must be applied again.

use super::{CellColumn, Plan};
use crate::domain::policy::Policy;
use crate::pg::error::{Error, Result};
use crate::pg::sql::{self, Arg, Row};

/// A known column, as it is now.
pub(super) struct Known {
    /// The name under which the archive knows its table.
    table: String,
    archived_as: String,
    /// The name in the document in force.
    name: String,
    former: Vec<(i64, String)>,
    /// An expression of the policy reads it.
    read: bool,
    /// The table's name for people.
    shown: String,
    /// What it is called; none: it is gone.
    now: Option<String>,
}

/// Where the columns of a policy, $1, are today: by their numbers, or by the names that they were last seen under where the
/// table is another one since, restored from a dump. One that was made anew takes the place of one that the document names.
pub const TODAY: &str = "SELECT c.table_name, c.archived_as, c.name, c.former, c.read, t.relation::pg_catalog.regclass::pg_catalog.text AS shown, \
        COALESCE(n.attname, s.attname)::pg_catalog.text AS now, COALESCE(n.attnum, s.attnum)::pg_catalog.int4 AS place, c.policy \
     FROM amazon_pii.policy_column AS c \
     JOIN (SELECT DISTINCT e.archived_as, e.relation, e.relation::oid = e.numbered_in AS numbered FROM amazon_pii.policy_table AS e \
            WHERE e.policy = $1) AS t ON t.archived_as = c.table_name \
     LEFT JOIN pg_catalog.pg_attribute AS n ON t.numbered AND n.attrelid = t.relation AND n.attnum = c.number AND NOT n.attisdropped \
     LEFT JOIN pg_catalog.pg_attribute AS s ON n.attnum IS NULL AND s.attrelid = t.relation AND s.attnum > 0 AND NOT s.attisdropped \
       AND CASE WHEN NOT t.numbered THEN s.attname = c.seen_as ELSE c.named AND s.attname = c.name AND NOT EXISTS ( \
           SELECT FROM amazon_pii.policy_column AS k WHERE k.policy = c.policy AND k.table_name = c.table_name AND k.number = s.attnum) END \
     WHERE c.policy = $1 ORDER BY c.table_name, c.archived_as";

/// Reads what [`Known::of`] takes.
pub(super) fn read(policy: &str) -> Result<Vec<Row>> {
    sql::read(TODAY, &[Arg::Text(Some(policy))])
}

/// Former names as they are stored.
pub fn former(text: Option<&str>) -> Result<Vec<(i64, String)>> {
    match text {
        None => Ok(Vec::new()),
        Some(text) => serde_json::from_str(text).map_err(|_| Error::internal("former names of a column")),
    }
}

impl Known {
    pub(super) fn of(row: &Row) -> Result<Self> {
        Ok(Self {
            table: row.string(0)?,
            archived_as: row.string(1)?,
            name: row.string(2)?,
            former: former(row.text(3)?)?,
            read: row.bool(4)?,
            shown: row.string(5)?,
            now: row.owned(6)?,
        })
    }
}

/// Gives a document the names that its columns have now. `table` gives the name under which the archive knows an entry's
/// table.
///
/// # Errors
/// A column that the document names is gone, or one that an expression reads has another name.
pub(super) fn follow(document: &mut Policy, known: &[Known], table: impl Fn(&str) -> Option<String>) -> Result<()> {
    const HINT: &str = "Apply the policy again without it, or with the column that took its place.";
    let column = |entry: &str, name: &str| {
        let table = table(entry)?;
        known.iter().find(|k| k.table == table && k.name == name)
    };
    // To keep what is gone is no harm.
    let gone = |entry: &str, name: &str| column(entry, name).is_some_and(|k| k.now.is_none());
    document.orders.keep.retain(|name| !gone("", name));
    for entry in &mut document.linked {
        let alias = &entry.alias;
        entry.keep.retain(|name| !gone(alias, name));
    }
    for (i, entry) in document.by_age.iter_mut().enumerate() {
        let name = Policy::by_age_name(i);
        entry.keep.retain(|column| !gone(&name, column));
    }
    let mut lost: Option<&Known> = None;
    document.rename_columns(|entry, text| {
        let column = column(entry, text)?;
        if column.now.is_none() {
            lost.get_or_insert(column);
        }
        column.now.clone()
    });
    if let Some(lost) = lost {
        return Err(
            Error::undefined(format!("column \"{}\" of {} no longer exists", lost.name, lost.shown)).hint(HINT),
        );
    }
    match known.iter().find(|k| k.read && k.now.as_ref() != Some(&k.name)) {
        None => Ok(()),
        Some(Known {
            name, shown, now: None, ..
        }) => Err(Error::undefined(format!(
            "column \"{name}\" of {shown}, which an expression of the policy reads, no longer exists"
        ))
        .hint(HINT)),
        Some(Known {
            name,
            shown,
            now: Some(now),
            ..
        }) => Err(Error::undefined(format!(
            "column \"{name}\" of {shown}, which an expression of the policy reads, is called \"{now}\" now"
        ))
        .hint("Apply the policy again, with that name in the expression.")),
    }
}

/// Tells the cells of a plan under which names the archive and earlier documents know them.
pub(super) fn mark(plan: &mut Plan, known: &[Known]) {
    for table in &mut plan.tables {
        for cell in &mut table.cells {
            let found = known
                .iter()
                .find(|k| k.table == table.archived_as && k.now.as_deref() == Some(cell.name.bare()));
            if let Some(found) = found {
                cell.archived_as.clone_from(&found.archived_as);
                cell.said.clone_from(&found.name);
                cell.former.clone_from(&found.former);
            }
        }
    }
}

impl CellColumn {
    /// What a version of the policy calls it.
    pub fn name_under(&self, version: i64) -> &str {
        let former = self.former.iter().find(|(last, _)| version <= *last);
        former.map_or(&self.said, |(_, name)| name)
    }
}
