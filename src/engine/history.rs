//! The shop's own history: a line for each access, besides the audit log. What it says there is known by its key and its
//! words, and is none of the personal data that the same table may hold.

use std::collections::HashMap;

use pgrx::pg_sys;

use super::audit::By;
use super::gather::LiveRecord;
use super::plan::{Builder, EXPRESSION_HINT, Plan, Table};
use super::walk::{FIRST, Values, batch_column, batch_rows, by_key, key_parts, key_text, select_all};
use crate::domain::policy::{Access, History as Document, Policy, Source, Template};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{Expr, Ident};
use crate::pg::identity::{Identity, act_as, as_extension, on_keys};
use crate::pg::sql::{self, Arg};
use crate::pg::trigger::EngineWrite;
use crate::pg::{catalog, xact};

/// The name under which the history is one of a policy's tables.
pub const NAME: &str = Policy::HISTORY;

/// A history, ready to be written to.
pub struct History {
    pub table: Table,
    pub columns: Vec<Column>,
}

/// A column of it.
pub struct Column {
    name: Ident,
    type_oid: pg_sys::Oid,
    text: Option<Template>,
    /// Over the order's row, as text.
    order: Option<Expr>,
}

impl History {
    /// Makes the key `history` ready for its table.
    ///
    /// # Errors
    /// The first thing that cannot work, naming the object.
    pub fn build(builder: &Builder<'_>, document: &Document, oid: pg_sys::Oid) -> Result<Self> {
        let table = builder.table_apart(oid, &document.table)?;
        let mut columns = Vec::new();
        for (name, source) in &document.columns {
            let place = format!("history.columns.{name}");
            let shown = table.relation.shown();
            let column = table.facts.column(name).ok_or_else(|| {
                Error::undefined(format!("{place}: column \"{name}\" of {shown} does not exist"))
                    .hint("Name the columns of the history as they are called in the catalog.")
            })?;
            if column.generated || column.is_array || column.is_composite {
                return Err(
                    Error::invalid(format!("{place}: column \"{name}\" of {shown} cannot be written"))
                        .hint("Generated columns, arrays and rows are left out."),
                );
            }
            let order = match source {
                Source::Text(_) => None,
                Source::Order(text) => {
                    let expression = builder.expression(0, text, &place)?;
                    builder.types(0, std::slice::from_ref(&expression), &place)?;
                    Some(expression)
                }
            };
            columns.push(Column {
                name: column.name.clone(),
                type_oid: column.type_oid,
                text: match source {
                    Source::Text(template) => Some(template.clone()),
                    Source::Order(_) => None,
                },
                order,
            });
        }
        Ok(Self { table, columns })
    }

    /// The expressions over the order's row, for those who check them.
    pub fn expressions(&self) -> impl Iterator<Item = (String, &Expr)> {
        let named = self.columns.iter().filter_map(|c| Some((c, c.order.as_ref()?)));
        named.map(|(c, e)| (format!("history.columns.{}", c.name.bare()), e))
    }
}

/// The positions of a policy's tables that hold lines of ours, whichever version of it wrote them.
///
/// # Errors
/// Errors of the server.
pub fn tables_with_lines(plan: &Plan) -> Result<Vec<usize>> {
    let oids = plan
        .tables
        .iter()
        .map(|t| i64::from(u32::from(t.relation.oid)))
        .collect();
    let rows = as_extension(|| {
        sql::read(
            "SELECT n.i - 1 FROM pg_catalog.unnest($1) WITH ORDINALITY AS n (t, i) \
             WHERE EXISTS (SELECT FROM amazon_pii.own_row AS r WHERE r.relation = n.t::pg_catalog.oid::pg_catalog.regclass)",
            &[Arg::Ints(oids)],
        )
    })?;
    let mut out = Vec::new();
    for row in &rows {
        out.push(usize::try_from(row.int(0)?).map_err(|_| Error::internal("an ordinality is out of range"))?);
    }
    let own = plan.history.as_ref().map(|h| h.table.relation.oid);
    out.extend((0..plan.tables.len()).filter(|i| Some(plan.tables[*i].relation.oid) == own));
    Ok(out)
}

/// Writes a line for each of these orders, in the caller's transaction, as the owner of the history. An order whose row is
/// gone has none.
///
/// # Errors
/// The shop's table refuses it: so is what was asked for.
pub fn write(plan: &Plan, action: &str, orders: &[String], number: &str, reason: Option<&str>) -> Result<()> {
    let Some(history) = &plan.history else { return Ok(()) };
    // Deferred triggers of the caller fire as the caller.
    xact::fire_deferred()?;
    lines(plan, history, &By::session(), action, orders, (number, reason))?;
    xact::defer_again()
}

/// [`write()`] without a look at what is deferred.
///
/// # Errors
/// As [`write()`].
pub fn lines(
    plan: &Plan,
    history: &History,
    by: &By,
    action: &str,
    orders: &[String],
    (number, reason): (&str, Option<&str>),
) -> Result<()> {
    let at = xact::timestamp_text(xact::now()?);
    let access = Access {
        number,
        reason,
        user: &by.user,
        actor: by.actor.as_deref(),
        at: &at,
        action,
    };
    let keys = orders.iter().map(|k| key_parts(k)).collect::<Result<Vec<_>>>()?;
    let from_order: Vec<Expr> = history.columns.iter().filter_map(|c| c.order.clone()).collect();
    let found = by_key(plan, plan.orders(), &keys, &select_all(&from_order))?;
    if found.is_empty() {
        return Ok(());
    }
    let mut columns: Vec<Vec<Option<String>>> = vec![Vec::new(); history.columns.len()];
    for f in &found {
        let mut next = FIRST;
        for (column, values) in history.columns.iter().zip(&mut columns) {
            values.push(match &column.text {
                Some(template) => template.fill(&access),
                None => {
                    next += 1;
                    f.row.owned(next - 1)?
                }
            });
        }
    }
    let written = insert(plan, history, &columns)?;
    remember(history, &written)
}

/// A line that was written: its key, and what it says in the columns whose words are ours.
type Line = (String, HashMap<String, Option<String>>);

fn insert(plan: &Plan, history: &History, columns: &[Vec<Option<String>>]) -> Result<Vec<Line>> {
    let table = &history.table;
    let shown = table.relation.shown();
    let names: Vec<String> = history.columns.iter().map(|c| c.name.to_string()).collect();
    let args: Vec<Arg<'_>> = history
        .columns
        .iter()
        .zip(columns)
        .map(|(c, values)| Arg::Array(c.type_oid, values.iter().map(Option::as_deref).collect()))
        .collect();
    let values: Vec<String> = (0..names.len()).map(|i| batch_column(i).to_string()).collect();
    let mut returned = table.key_list();
    let keys = returned.len();
    let ours: Vec<&Column> = history.columns.iter().filter(|c| c.text.is_some()).collect();
    returned.extend(ours.iter().map(|c| c.name.to_string()));
    let query = format!(
        "INSERT INTO {} ({}) SELECT {} FROM {} RETURNING {}",
        table.relation,
        names.join(", "),
        values.join(", "),
        batch_rows(0..names.len()),
        returned.join(", "),
    );
    let oids: Vec<pg_sys::Oid> = as_extension(|| catalog::with_partitions(table.relation.oid))?
        .iter()
        .map(|p| p.oid)
        .collect();
    let rows = act_as(Identity::Owner(table.owner), &plan.search_path, &[], || {
        let _ours = EngineWrite::begin(&oids);
        sql::write(&query, &args)
    })
    .map_err(|e| {
        e.at(&shown)
            .hint("This is the table of \"history\"; it must take a line for each access.")
    })?;
    // What a trigger of the table has made of our words is not ours: it may have added the buyer's name.
    let sent = history.columns.iter().zip(columns).filter(|(c, _)| c.text.is_some());
    let sent: Vec<&Vec<Option<String>>> = sent.map(|(_, values)| values).collect();
    rows.iter()
        .map(|r| {
            let texts = ours.iter().zip(&sent).zip(r.texts(keys..returned.len())?);
            let said = texts.filter(|((_, sent), text)| sent.contains(text));
            let said = said.map(|((column, _), text)| (column.name.bare().to_owned(), text));
            Ok((key_text(&r.texts(0..keys)?)?, said.collect()))
        })
        .collect()
}

fn remember(history: &History, lines: &[Line]) -> Result<()> {
    let words: Vec<Option<String>> = lines.iter().map(|(_, said)| serde_json::to_string(said).ok()).collect();
    on_keys(|| {
        sql::execute(
            "INSERT INTO amazon_pii.own_row AS r (relation, row_key, words) \
             SELECT $1::pg_catalog.regclass, k, w FROM ROWS FROM (pg_catalog.unnest($2), pg_catalog.unnest($3)) AS n (k, w) \
             ON CONFLICT (relation, row_key) DO UPDATE SET words = EXCLUDED.words, written_at = pg_catalog.now()",
            &[
                Arg::Oid(history.table.relation.oid),
                Arg::Texts(lines.iter().map(|(key, _)| Some(key.as_str())).collect()),
                Arg::opt_texts(&words),
            ],
        )
    })?;
    Ok(())
}

/// Takes our own words out of what was read of the shop's rows: a cell that still says what we wrote holds nobody's personal
/// data. One that says something else by now is like any other.
///
/// # Errors
/// Errors of the server.
pub fn leave_own(plan: &Plan, records: &mut Vec<LiveRecord>) -> Result<()> {
    for index in &plan.own_lines {
        let table = &plan.tables[*index];
        let mine: Vec<&str> = records
            .iter()
            .filter(|r| r.table == *index)
            .map(|r| r.key_text.as_str())
            .collect();
        if mine.is_empty() {
            continue;
        }
        let rows = on_keys(|| {
            sql::read(
                "SELECT r.row_key, r.words FROM amazon_pii.own_row AS r WHERE r.relation = $1::pg_catalog.regclass AND r.row_key = ANY ($2)",
                &[Arg::Oid(table.relation.oid), Arg::texts(&mine)],
            )
        })?;
        let mut said: HashMap<String, HashMap<String, Option<String>>> = HashMap::new();
        for row in &rows {
            let words = serde_json::from_str(row.str(1)?)
                .map_err(|_| Error::internal("what a line of ours says is damaged"))?;
            said.insert(row.string(0)?, words);
        }
        for record in records.iter_mut().filter(|r| r.table == *index) {
            let Some(words) = said.get(&record.key_text) else {
                continue;
            };
            for (column, cell) in table.cells.iter().zip(&mut record.cells) {
                let same = |c: &mut super::gather::LiveCell| {
                    words
                        .get(column.name.bare())
                        .is_some_and(|w| w.as_deref() == c.value.as_deref())
                };
                cell.take_if(same);
            }
        }
        // A row that goes as a whole stays while it says what we wrote.
        if table.delete {
            records.retain(|r| {
                let left = |words: &HashMap<String, Option<String>>| {
                    table
                        .cells
                        .iter()
                        .zip(&r.cells)
                        .any(|(column, cell)| words.contains_key(column.name.bare()) && cell.is_some())
                };
                r.table != *index || said.get(&r.key_text).is_none_or(left)
            });
        }
    }
    Ok(())
}

/// What a trial writes: the longest of everything.
///
/// # Errors
/// As [`write()`].
pub fn try_out(plan: &Plan, history: &History, order: &Values) -> Result<()> {
    let reason = "x".repeat(50);
    lines(
        plan,
        history,
        &By::session(),
        "retrieve",
        &[key_text(order)?],
        ("302-1234567-1234567", Some(&reason)),
    )
    .map_err(|e| {
        if e.hint_text().is_none() {
            e.hint(EXPRESSION_HINT)
        } else {
            e
        }
    })
}
