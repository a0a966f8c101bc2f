//! A policy made ready to run: its tables, their keys and types, compiled treatments, checked expressions.

mod build;
mod cache;
mod columns;
mod marks;
mod names;
mod path;

pub use build::Builder;
use build::refuse_redacted_links;
use cache::Record;
pub use columns::{TODAY, former};

use std::fmt::Display;

use super::assign::{self, Assign};
use super::history::{self, History};
use super::vault::Place;

use pgrx::pg_sys;

use crate::domain::policy::{Policy, Shared, Treatment as Rule};
use crate::domain::treatment::{Outcome, Shape, Treatment};
use crate::pg::catalog::{self, TableFacts};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{self, Expr, Ident, Relation};
use crate::pg::identity::{self, as_extension};

/// What to do about an expression that the server does not accept.
pub const EXPRESSION_HINT: &str = "Try it in a SELECT from the table, as the table's owner; functions and types of other schemas need their schema's name.";

/// A column that a policy treats.
pub struct CellColumn {
    pub name: Ident,
    pub type_oid: pg_sys::Oid,
    pub shape: Shape,
    base_type: pg_sys::Oid,
    /// Its values cannot travel in one array: unnest would flatten arrays, and take composites apart.
    pub alone: bool,
    /// char(n): blanks at the end are padding.
    pub padded: bool,
    /// Part of a row that goes as a whole, without a treatment of its own.
    pub treatment: Option<Treatment>,
    /// As the policy says it.
    rule: Option<Rule>,
    /// The expression of a `sql` treatment.
    pub expression: Option<Expr>,
    /// Where the names of a `scrub` treatment are: tables and their cells.
    pub names: Vec<(usize, usize)>,
    /// Characters at most.
    pub room: Option<usize>,
    /// The declared type with its modifier, as SQL.
    pub type_shown: String,
    /// The name under which the archive knows it, whatever it is called now.
    pub archived_as: String,
    /// Its name in the document in force.
    said: String,
    /// Earlier names, each with the last version of the policy that has it.
    former: Vec<(i64, String)>,
}

impl CellColumn {
    /// The treatment as the policy says it; none for a row that goes as a whole.
    pub fn rule(&self) -> Option<&Rule> {
        self.rule.as_ref()
    }

    /// SQL that reads a value of this column so that its text form leaves nothing out: the output function of xml drops
    /// the declaration.
    pub fn read(&self, value: impl Display) -> String {
        if self.base_type == pg_sys::XMLOID {
            format!("CAST({value} AS pg_catalog.text)")
        } else {
            value.to_string()
        }
    }

    /// [`ident::out`] of a value of this column. Texts are their own output, and casting them calls nobody.
    pub fn out(&self, value: impl Display) -> String {
        match self.base_type {
            pg_sys::TEXTOID | pg_sys::VARCHAROID => {
                format!("(CAST({value} AS pg_catalog.text) COLLATE pg_catalog.\"C\")")
            }
            _ => ident::out(self.read(value)),
        }
    }
}

/// A column that says of a row that it is redacted.
pub struct Mark {
    pub name: Ident,
    pub expression: Expr,
}

/// A table of a policy; several entries may reach it.
pub struct Table {
    pub relation: Relation,
    pub owner: pg_sys::Oid,
    pub key: Vec<(Ident, pg_sys::Oid)>,
    pub cells: Vec<CellColumn>,
    pub marks: Vec<Mark>,
    /// The name under which the archive knows it: the one it had when a policy first named it, whatever it is called now.
    pub archived_as: String,
    /// Redaction removes the row.
    pub delete: bool,
    /// Nothing of its rows is archived: the policy says so in words.
    pub no_copy: bool,
    /// Where a file of a row's lies, outside of the database.
    pub files: Option<Expr>,
    /// Several orders may use one of its rows.
    pub shared: bool,
    /// Only Amazon orders keep its rows alive.
    pub amazon_only: bool,
    pub facts: TableFacts,
}

impl Table {
    /// Whether an index can serve lookups by these expressions.
    pub fn has_index(&self, expressions: &[Expr]) -> bool {
        let columns: Vec<String> = self.facts.columns.iter().map(|c| c.name.bare().to_owned()).collect();
        let wanted: Vec<&String> = columns
            .iter()
            .filter(|c| expressions.iter().any(|e| *e == Expr::column(c)))
            .collect();
        self.facts
            .indexed
            .iter()
            .any(|index| index.first().is_some_and(|lead| wanted.contains(&lead)))
            || self
                .facts
                .indexed_expressions
                .iter()
                .any(|shown| expressions.iter().any(|e| e.same_text(shown)))
    }

    /// Statements that find rows by the key keep their plans for a while: [`crate::pg::prepared`].
    pub fn keeps_plans(&self) -> bool {
        self.facts.kind == 'p'
    }

    /// What must become of a text in one of its cells; `None` in a row that goes as a whole.
    ///
    /// # Errors
    /// The treatment cannot be applied; names the column, not the value.
    pub fn treat(&self, cell: usize, text: Option<&str>, key: &[Option<String>]) -> Result<Option<Outcome<'_>>> {
        let column = &self.cells[cell];
        let Some(treatment) = &column.treatment else {
            return Ok(None);
        };
        treatment.apply(text, key).map(Some).map_err(|e| {
            Error::unsupported(format!(
                "column \"{}\" of {}: {e}",
                column.name.bare(),
                self.relation.shown()
            ))
        })
    }

    /// The key columns as a select list.
    pub fn key_list(&self) -> Vec<String> {
        self.key.iter().map(|(name, _)| name.to_string()).collect()
    }
}

/// A way to a table: from its parent's rows, or from the keys of orders.
pub struct Entry {
    /// Empty for the orders table.
    pub alias: String,
    pub table: usize,
    pub parent: Option<usize>,
    pub on_child: Vec<Expr>,
    pub on_child_types: Vec<pg_sys::Oid>,
    pub on_parent: Vec<Expr>,
    pub on_parent_types: Vec<pg_sys::Oid>,
    pub filter: Option<Expr>,
    /// Which of the table's cells this entry treats.
    pub cells: Vec<usize>,
    pub not_before: Option<String>,
    pub number: Option<Expr>,
    /// A new row has its order retrieved, if it meets the condition.
    pub retrieve_on_insert: Option<Option<Expr>>,
    /// Each row belongs to one order at most.
    pub exclusive: bool,
}

/// Rows that no order leads to.
pub struct Aged {
    /// Its place in the document, which is also its name among the policy's tables.
    pub name: String,
    pub table: Table,
    /// The moment from which a row's age counts.
    pub at: Expr,
    pub at_type: pg_sys::Oid,
    pub filter: Option<Expr>,
    pub after: String,
}

/// The entry that is the customer's, where exactly one is, and it is linked to the orders table.
pub struct Customer {
    pub entry: usize,
    /// What is the same in duplicates.
    pub duplicate_by: Vec<Expr>,
}

/// One of the moments that may start the clock.
pub enum AnchorPlan {
    /// A time with zone, as SQL over the order row.
    Order(String),
    /// The last of the linked rows.
    Linked {
        entry: usize,
        at: String,
        filter: Option<Expr>,
        complete: Option<Expr>,
    },
}

/// A policy, ready.
pub struct Plan {
    pub policy: String,
    pub version: i64,
    pub document: Policy,
    pub search_path: String,
    pub enabled: bool,
    pub suspended: Option<String>,
    pub tables: Vec<Table>,
    /// The first is the orders table; parents come before children.
    pub entries: Vec<Entry>,
    /// Tables apart: no order leads to their rows.
    pub by_age: Vec<Aged>,
    pub anchors: Vec<AnchorPlan>,
    pub amazon: Expr,
    pub number: Option<Expr>,
    pub replaces: Option<Expr>,
    /// A time with zone: when the order was placed.
    pub placed: Option<String>,
    /// A time with zone: before it the order is not touched.
    pub effective: Option<String>,
    pub customer: Option<Customer>,
    pub assign: Option<Assign>,
    /// Generic customers, of former versions of the policy too: an entry, and the value that leads to the row.
    pub generic: Vec<(usize, String)>,
    pub history: Option<History>,
    /// Tables that hold lines of the history that we wrote.
    pub own_lines: Vec<usize>,
    pub archive: Place,
    /// `archive_for` is nothing: an order's archive ends with its redaction.
    pub keeps_nothing: bool,
}

impl Plan {
    /// The orders table.
    pub fn orders(&self) -> &Table {
        &self.tables[0]
    }

    /// Loads a policy that was applied.
    ///
    /// # Errors
    /// It does not exist, or no longer fits its tables (suspended: a table is missing or has another owner).
    pub fn load(policy: &str) -> Result<Self> {
        Self::from_record(policy, &Record::read(policy)?)
    }

    /// Whether the columns that a policy needs are there.
    ///
    /// # Errors
    /// One is not, or has another name inside of an expression.
    pub fn find_columns(policy: &str) -> Result<()> {
        let record = Record::read(policy)?;
        let mut document = Policy::parse(record.row.str(1)?).map_err(|e| Error::invalid(e.to_string()))?;
        record.follow(&mut document).map(drop)
    }

    fn from_record(policy: &str, record: &Record) -> Result<Self> {
        let Record {
            row,
            relations,
            schemas,
            ..
        } = record;
        let mut document = Policy::parse(row.str(1)?).map_err(|e| Error::invalid(e.to_string()))?;
        let mut oids = Vec::new();
        let aged: Vec<String> = (0..document.by_age.len()).map(Policy::by_age_name).collect();
        let linked = document.linked.iter().map(|l| l.alias.as_str());
        let history = document.history.iter().map(|_| history::NAME);
        let apart = aged.iter().map(String::as_str).chain(history);
        for alias in std::iter::once("").chain(linked).chain(apart) {
            let known = relations
                .iter()
                .find(|r| r.str(0).is_ok_and(|a| a == alias))
                .ok_or_else(|| Error::undefined(format!("a table of policy \"{policy}\" is not recorded")))?;
            if known.str(3)?.is_empty() {
                return Err(Error::undefined(format!(
                    "table {} of policy \"{policy}\" no longer exists",
                    known.str(4)?
                ))
                .detail(format!(
                    "It is the table of entry \"{}\".",
                    if alias.is_empty() { "orders" } else { alias }
                ))
                .hint("Apply the policy again without it."));
            }
            if known.str(2)? != known.str(3)? {
                return Err(
                    Error::privilege(format!("a table of policy \"{policy}\" has another owner now"))
                        .hint("Apply the policy again, as a member of the new owner."),
                );
            }
            oids.push(known.oid(1)?);
        }
        let known = record.follow(&mut document)?;
        let path = path::today(row.str(2)?, row.text(5)?, schemas)?;
        let mut plan = Self::build(document, &path, &oids)?;
        for (entry, known) in plan.entries.iter().map(|e| (e.table, &e.alias)) {
            if let Some(row) = relations.iter().find(|r| r.str(0).is_ok_and(|a| a == known)) {
                plan.tables[entry].archived_as = row.string(4)?;
            }
        }
        columns::mark(&mut plan, &known);
        plan.version = row.int(0)?;
        plan.enabled = row.bool(3)?;
        plan.suspended = row.owned(4)?;
        plan.own_lines = history::tables_with_lines(&plan)?;
        plan.generic = assign::generic(&plan)?;
        Ok(plan)
    }

    /// Makes a document ready for the given tables: the orders table's OID first, then one for each linked
    /// entry, then one for each of `by_age`, then that of the history.
    ///
    /// # Errors
    /// The first thing that cannot work, naming the object.
    pub fn build(document: Policy, search_path: &str, oids: &[pg_sys::Oid]) -> Result<Self> {
        let facts = as_extension(|| catalog::facts(oids))?;
        let mut builder = Builder {
            document: &document,
            search_path,
            facts: &facts,
            tables: Vec::new(),
            entries: Vec::new(),
        };
        let orders = &document.orders;
        let orders_oid = oids.first().copied().unwrap_or(pg_sys::InvalidOid);
        let table = builder.table(orders_oid, &orders.table, orders.key.as_deref())?;
        let cells = builder.cells(table, &orders.redact, "orders")?;
        builder.kept(table, &orders.keep, "orders")?;
        builder.files(table, orders.files.as_deref(), "orders")?;
        builder.marks(table, &orders.mark, "orders")?;
        builder.entries.push(Entry {
            alias: String::new(),
            table,
            parent: None,
            on_child: Vec::new(),
            on_child_types: Vec::new(),
            on_parent: Vec::new(),
            on_parent_types: Vec::new(),
            filter: None,
            cells,
            not_before: None,
            number: None,
            retrieve_on_insert: None,
            exclusive: true,
        });
        for (linked, oid) in document.linked.iter().zip(oids.iter().skip(1)) {
            builder.linked(linked, *oid)?;
        }
        let number = orders
            .number
            .as_deref()
            .map(|e| builder.expression(0, e, "orders.number"))
            .transpose()?;
        let amazon = match &orders.amazon {
            Some(text) => builder.expression(0, text, "orders.amazon")?,
            None => {
                let number = number.as_ref().ok_or_else(|| {
                    Error::invalid("orders.amazon: missing")
                        .hint("Give a condition in \"amazon\", or the order number's column in \"number\".")
                })?;
                Expr::amazon_number(number)
            }
        };
        let replaces = orders
            .replaces
            .as_deref()
            .map(|e| builder.expression(0, e, "orders.replaces"))
            .transpose()?;
        let placed = orders
            .placed
            .as_deref()
            .map(|e| builder.instant(0, e, "orders.placed"))
            .transpose()?;
        let effective = orders
            .effective_from
            .as_deref()
            .map(|e| builder.instant(0, e, "orders.effective_from"))
            .transpose()?;
        let customer = document.customer().map(|c| builder.customer(c)).transpose()?.flatten();
        let anchors = orders
            .anchor
            .iter()
            .map(|a| builder.anchor(a))
            .collect::<Result<Vec<_>>>()?;
        let by_age = document
            .by_age
            .iter()
            .zip(oids.iter().skip(1 + document.linked.len()))
            .enumerate()
            .map(|(i, (aged, oid))| builder.aged(Policy::by_age_name(i), aged, *oid))
            .collect::<Result<Vec<_>>>()?;
        let assign = orders.assign_customer.as_ref();
        let assign = assign.map(|a| Assign::build(&builder, a)).transpose()?;
        let history = match (
            &document.history,
            oids.get(1 + document.linked.len() + document.by_age.len()),
        ) {
            (Some(history), Some(oid)) => Some(History::build(&builder, history, *oid)?),
            _ => None,
        };
        let Builder {
            mut tables, entries, ..
        } = builder;
        for (index, table) in tables.iter_mut().enumerate() {
            let mine = || entries.iter().filter(|e| e.table == index);
            table.shared = mine().any(|e| !e.exclusive) || mine().count() > 1;
            table.amazon_only = mine().next().is_some()
                && mine().all(|e| {
                    document
                        .linked
                        .iter()
                        .any(|l| l.alias == e.alias && matches!(l.shared, Shared::Amazon))
                });
        }
        refuse_redacted_links(&tables, &entries, number.as_ref())?;
        marks::refuse(&tables, &entries, number.as_ref())?;
        names::resolve(&mut tables, &entries)?;
        Ok(Self {
            keeps_nothing: super::purge::is_nothing(&document.archive_for)?,
            policy: document.policy.clone(),
            version: 0,
            enabled: document.enabled,
            suspended: None,
            search_path: search_path.to_owned(),
            archive: Place::of(&document),
            document,
            tables,
            entries,
            by_age,
            anchors,
            amazon,
            number,
            replaces,
            placed,
            effective,
            customer,
            assign,
            generic: Vec::new(),
            history,
            own_lines: Vec::new(),
        })
    }

    /// Whether some orders may not be in effect yet.
    pub fn is_dated(&self) -> bool {
        self.effective.is_some() || self.document.effective_from.is_some()
    }

    /// The entry of that alias.
    ///
    /// # Errors
    /// There is none.
    pub fn entry(&self, alias: &str) -> Result<&Entry> {
        let entry = self.entries.iter().find(|e| e.alias == alias);
        entry.ok_or_else(|| Error::undefined(format!("policy \"{}\" has no entry \"{alias}\"", self.policy)))
    }

    /// Whether rows of entry `index` can start an order's clock, or lead to rows that can.
    pub fn anchored_by(&self, index: usize) -> bool {
        self.anchors
            .iter()
            .any(|a| matches!(a, AnchorPlan::Linked { entry, .. } if self.path(*entry).contains(&index)))
    }

    /// Whether the links of an entry's rows are the keys of orders, text by text: values that are equal look the same.
    pub fn links_are_keys(&self, index: usize) -> bool {
        let (entry, key) = (&self.entries[index], &self.orders().key);
        let integer = |oid| matches!(oid, pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID);
        entry.parent == Some(0)
            && entry.on_parent.len() == key.len()
            && key.iter().enumerate().all(|(i, (name, oid))| {
                let child = entry.on_child_types[i];
                entry.on_parent[i] == Expr::column(name.bare())
                    && (integer(child) && integer(*oid) || child == *oid && child == pg_sys::UUIDOID)
            })
    }

    /// For an entry that hangs on the orders by nothing but their key: which parts of the key its link is made of. Its rows can
    /// be found when the order's own row is gone.
    pub fn key_link(&self, index: usize) -> Option<Vec<usize>> {
        let entry = &self.entries[index];
        let key = &self.orders().key;
        let part = |e: &Expr| key.iter().position(|(name, _)| *e == Expr::column(name.bare()));
        (entry.parent == Some(0)).then(|| entry.on_parent.iter().map(part).collect())?
    }

    /// The key of an order, where it is one whole number.
    pub fn number_key(&self) -> Option<&Ident> {
        match self.orders().key.as_slice() {
            [(name, pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID)] => Some(name),
            _ => None,
        }
    }

    /// The column of an entry's rows that holds the key of their order, where that is one whole number.
    pub fn order_column(&self, index: usize) -> Option<&Ident> {
        let entry = &self.entries[index];
        let integer = |oid: &pg_sys::Oid| matches!(*oid, pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID);
        let ([link], [oid]) = (entry.on_child.as_slice(), entry.on_child_types.as_slice()) else {
            return None;
        };
        if !integer(oid) || entry.filter.is_some() || !self.links_are_keys(index) {
            return None;
        }
        let columns = &self.tables[entry.table].facts.columns;
        columns
            .iter()
            .map(|c| &c.name)
            .find(|name| *link == Expr::column(name.bare()))
    }

    /// The entries that lead from the orders to entry `index`, the orders table left out.
    pub fn path(&self, index: usize) -> Vec<usize> {
        let mut path = Vec::new();
        let mut at = index;
        while let Some(parent) = self.entries[at].parent {
            path.push(at);
            at = parent;
        }
        path.reverse();
        path
    }
}

/// Refuses unless the caller owns the table or is a member of its owner.
///
/// # Errors
/// 42501.
pub fn require_ownership(relation: &Relation, owner: pg_sys::Oid) -> Result<()> {
    if identity::has_privileges(identity::current_role(), owner) {
        return Ok(());
    }
    Err(Error::privilege(format!("must be owner of table {}", relation.shown()))
        .hint("Whoever applies a policy must own its tables or be a member of their owners."))
}
