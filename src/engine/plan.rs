//! A policy made ready to run: its tables, their keys and types, compiled treatments, checked expressions.

use std::fmt::Display;

use pgrx::pg_sys;

use crate::domain::policy::{Anchor, OnRedact, Policy, Redact, Shared, Treatment as Rule};
use crate::domain::treatment::{Shape, Treatment};
use crate::pg::catalog::{self, TableFacts};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{self, Expr, Ident, Relation};
use crate::pg::identity::{self, Identity, act_as, as_extension};
use crate::pg::sql::{self, Arg};

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
    /// The declared type with its modifier, as SQL.
    pub type_shown: String,
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

    /// [`ident::out`] of a value of this column.
    pub fn out(&self, value: impl Display) -> String {
        ident::out(self.read(value))
    }
}

/// A table of a policy; several entries may reach it.
pub struct Table {
    pub relation: Relation,
    pub owner: pg_sys::Oid,
    pub key: Vec<(Ident, pg_sys::Oid)>,
    pub cells: Vec<CellColumn>,
    /// The name under which the archive knows it: the one it had when a policy first named it, whatever it is called now.
    pub archived_as: String,
    /// Redaction removes the row.
    pub delete: bool,
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
    /// Each row belongs to one order at most.
    pub exclusive: bool,
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
    pub anchors: Vec<AnchorPlan>,
    pub amazon: Expr,
    pub number: Option<Expr>,
    pub replaces: Option<Expr>,
    /// A time with zone: when the order was placed.
    pub placed: Option<String>,
    pub archive_schema: Ident,
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
        let (row, relations) = as_extension(|| {
            let rows = sql::read(
                "SELECT version, document, search_path, enabled, suspended FROM amazon_pii.policy WHERE policy = $1",
                &[Arg::Text(Some(policy))],
            )?;
            let row = rows.into_iter().next().ok_or_else(|| {
                Error::undefined(format!("policy \"{policy}\" does not exist"))
                    .hint("The view amazon_pii.policies lists the policies.")
            })?;
            let relations = sql::read(
                "SELECT t.entry, t.relation::oid, t.owner, COALESCE(r.rolname, ''), t.archived_as FROM amazon_pii.policy_table t \
                 LEFT JOIN pg_catalog.pg_class c ON c.oid = t.relation LEFT JOIN pg_catalog.pg_roles r ON r.oid = c.relowner \
                 WHERE t.policy = $1",
                &[Arg::Text(Some(policy))],
            )?;
            Ok((row, relations))
        })?;
        let document = Policy::parse(row.str(1)?).map_err(|e| Error::invalid(e.to_string()))?;
        let mut oids = Vec::new();
        for alias in std::iter::once("").chain(document.linked.iter().map(|l| l.alias.as_str())) {
            let known = relations
                .iter()
                .find(|r| r.str(0).is_ok_and(|a| a == alias))
                .ok_or_else(|| Error::undefined(format!("a table of policy \"{policy}\" is not recorded")))?;
            if known.str(3)?.is_empty() {
                return Err(
                    Error::undefined(format!("a table of policy \"{policy}\" no longer exists"))
                        .detail(format!(
                            "It is the table of entry \"{}\".",
                            if alias.is_empty() { "orders" } else { alias }
                        ))
                        .hint("Apply the policy again without it."),
                );
            }
            if known.str(2)? != known.str(3)? {
                return Err(
                    Error::privilege(format!("a table of policy \"{policy}\" has another owner now"))
                        .hint("Apply the policy again, as a member of the new owner."),
                );
            }
            oids.push(known.oid(1)?);
        }
        let mut plan = Self::build(document, row.str(2)?, &oids)?;
        for (entry, known) in plan.entries.iter().map(|e| (e.table, &e.alias)) {
            if let Some(row) = relations.iter().find(|r| r.str(0).is_ok_and(|a| a == known)) {
                plan.tables[entry].archived_as = row.string(4)?;
            }
        }
        plan.version = row.int(0)?;
        plan.enabled = row.bool(3)?;
        plan.suspended = row.owned(4)?;
        Ok(plan)
    }

    /// Makes a document ready for the given tables: the orders table's OID first, then one for each linked entry.
    ///
    /// # Errors
    /// The first thing that cannot work, naming the object.
    pub fn build(document: Policy, search_path: &str, oids: &[pg_sys::Oid]) -> Result<Self> {
        let mut builder = Builder {
            document: &document,
            search_path,
            tables: Vec::new(),
            entries: Vec::new(),
        };
        let orders = &document.orders;
        let orders_oid = oids.first().copied().unwrap_or(pg_sys::InvalidOid);
        let table = builder.table(orders_oid, &orders.table, orders.key.as_deref())?;
        let cells = builder.cells(table, &orders.redact, "orders")?;
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
        let anchors = orders
            .anchor
            .iter()
            .map(|a| builder.anchor(a))
            .collect::<Result<Vec<_>>>()?;
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
        Ok(Self {
            policy: document.policy.clone(),
            version: 0,
            enabled: document.enabled,
            suspended: None,
            search_path: search_path.to_owned(),
            archive_schema: Ident::new(document.archive.schema.clone()),
            document,
            tables,
            entries,
            anchors,
            amazon,
            number,
            replaces,
            placed,
        })
    }

    /// Whether rows of entry `index` can start an order's clock.
    pub fn anchored_by(&self, index: usize) -> bool {
        self.anchors
            .iter()
            .any(|a| matches!(a, AnchorPlan::Linked { entry, .. } if *entry == index))
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

struct Builder<'a> {
    document: &'a Policy,
    search_path: &'a str,
    tables: Vec<Table>,
    entries: Vec<Entry>,
}

impl Builder<'_> {
    /// The table with this OID, added if it is new.
    fn table(&mut self, oid: pg_sys::Oid, shown: &str, key: Option<&[String]>) -> Result<usize> {
        if let Some(known) = self.tables.iter().position(|t| t.relation.oid == oid) {
            let same = key.is_none_or(|k| k.iter().eq(self.tables[known].key.iter().map(|(n, _)| n.bare())));
            return if same {
                Ok(known)
            } else {
                Err(Error::invalid(format!(
                    "table {shown} is given different keys by two entries"
                )))
            };
        }
        let facts = as_extension(|| catalog::facts(oid))?
            .ok_or_else(|| Error::undefined(format!("table {shown} does not exist")))?;
        refuse_kind(&facts)?;
        let name = facts.relation.shown();
        let key: Vec<String> = match key {
            Some(wanted) => {
                let sorted = |k: &[String]| {
                    let mut k = k.to_vec();
                    k.sort();
                    k
                };
                if let Some(missing) = wanted.iter().find(|c| facts.column(c).is_none()) {
                    return Err(
                        Error::undefined(format!("column \"{missing}\" of the key of {name} does not exist"))
                            .hint(nearest(&facts, missing)),
                    );
                }
                if !facts.keys.iter().any(|k| sorted(k) == sorted(wanted)) {
                    return Err(Error::invalid(format!("the key of {name} is not unique")).hint(
                        "A key needs a unique index that is not partial and not deferrable, over NOT NULL columns.",
                    ));
                }
                wanted.to_vec()
            }
            None => facts.keys.first().cloned().ok_or_else(|| {
                Error::invalid(format!("table {name} has no usable key"))
                    .hint("Add a primary key, or a unique index over NOT NULL columns and name them in \"key\".")
            })?,
        };
        let key = key
            .iter()
            .filter_map(|k| facts.column(k))
            .map(|c| (c.name.clone(), c.type_oid))
            .collect();
        self.tables.push(Table {
            relation: facts.relation.clone(),
            owner: facts.owner,
            archived_as: facts.relation.shown(),
            key,
            cells: Vec::new(),
            delete: false,
            shared: false,
            amazon_only: false,
            facts,
        });
        Ok(self.tables.len() - 1)
    }

    /// An expression over a table's row: parsed, or the column of exactly that name.
    fn expression(&self, table: usize, text: &str, place: &str) -> Result<Expr> {
        let facts = &self.tables[table].facts;
        if facts.column(text).is_some() {
            return Ok(Expr::column(text));
        }
        Expr::parse(text).ok_or_else(|| {
            Error::invalid(format!(
                "{place}: neither a column of {} nor an SQL expression",
                facts.relation.shown()
            ))
        })
    }

    /// The types of expressions, found out as the table's owner.
    fn types(&self, table: usize, expressions: &[Expr], place: &str) -> Result<Vec<pg_sys::Oid>> {
        let table = &self.tables[table];
        act_as(Identity::Owner(table.owner), self.search_path, &[], || {
            catalog::expression_types(&table.relation, expressions)
        })
        .map_err(|e| e.at(place).hint(EXPRESSION_HINT))
    }

    /// The types in which the values of a link travel to the other side, below all domains: the CHECK of a domain is
    /// code of its owner, and would run as the other side's.
    fn link_types(&self, table: usize, expressions: &[Expr], place: &str) -> Result<Vec<pg_sys::Oid>> {
        let types = self.types(table, expressions, place)?;
        types
            .into_iter()
            .map(|oid| {
                sql::plain_type(oid).ok_or_else(|| {
                    Error::unsupported(format!("{place}: a value of type {} cannot link", sql::type_name(oid)))
                        .hint("Link by columns of plain types.")
                })
            })
            .collect()
    }

    fn linked(&mut self, linked: &crate::domain::policy::Linked, oid: pg_sys::Oid) -> Result<()> {
        let place = format!("linked \"{}\"", linked.alias);
        let table = self.table(oid, &linked.table, linked.key.as_deref())?;
        let parent = match &linked.parent {
            None => 0,
            Some(name) => self
                .entries
                .iter()
                .position(|e| e.alias == *name)
                .ok_or_else(|| Error::invalid(format!("{place}: parent \"{name}\" is no entry")))?,
        };
        let parent_table = self.entries[parent].table;
        let mut on_child = Vec::new();
        let mut on_parent = Vec::new();
        for (child, from) in &linked.on {
            on_child.push(self.expression(table, child, &format!("{place}.on"))?);
            on_parent.push(self.expression(parent_table, from, &format!("{place}.on"))?);
        }
        let on_child_types = self.link_types(table, &on_child, &format!("{place}.on"))?;
        let on_parent_types = self.link_types(parent_table, &on_parent, &format!("{place}.on"))?;
        let filter = linked
            .filter
            .as_deref()
            .map(|w| self.expression(table, w, &format!("{place}.where")))
            .transpose()?;
        let not_before = match &linked.not_before {
            Some(text) => Some(self.instant(table, text, &format!("{place}.not_before"))?),
            None => None,
        };
        let number = linked
            .number
            .as_deref()
            .map(|n| self.expression(table, n, &format!("{place}.number")))
            .transpose()?;
        // A row belongs to one parent when the parent's side of the link is a key of the parent.
        let exclusive = self.entries[parent].exclusive
            && self.tables[parent_table].facts.keys.iter().any(|key| {
                key.iter()
                    .all(|column| on_parent.iter().any(|e| *e == Expr::column(column)))
            });
        let cells = if matches!(linked.on_redact, OnRedact::Delete) {
            self.whole_row(table)?
        } else {
            self.cells(table, &linked.redact, &place)?
        };
        self.entries.push(Entry {
            alias: linked.alias.clone(),
            table,
            parent: Some(parent),
            on_child,
            on_child_types,
            on_parent,
            on_parent_types,
            filter,
            cells,
            not_before,
            number,
            exclusive,
        });
        Ok(())
    }

    /// Every stored column of a row that goes as a whole.
    fn whole_row(&mut self, index: usize) -> Result<Vec<usize>> {
        let table = &mut self.tables[index];
        if !table.cells.is_empty() && !table.delete {
            return Err(Error::invalid(format!(
                "entries disagree on {}: delete or redact",
                table.relation.shown()
            )));
        }
        table.delete = true;
        if table.cells.is_empty() {
            table.cells = table
                .facts
                .columns
                .iter()
                .filter(|c| !c.generated)
                .map(|c| CellColumn {
                    name: c.name.clone(),
                    type_oid: c.type_oid,
                    shape: Shape::Other,
                    base_type: c.base_type,
                    alone: alone(c),
                    padded: false,
                    treatment: None,
                    rule: None,
                    expression: None,
                    type_shown: c.type_shown.clone(),
                })
                .collect();
        }
        Ok((0..table.cells.len()).collect())
    }

    /// Compiles the treatments of an entry into the table's cells; entries that name one column must agree.
    fn cells(&mut self, index: usize, redact: &Redact, place: &str) -> Result<Vec<usize>> {
        let listed: Vec<(String, Rule)> = match redact {
            Redact::Nothing => Vec::new(),
            Redact::Columns(names) => names.iter().map(|n| (n.clone(), Rule::Default)).collect(),
            Redact::Treatments(pairs) => pairs.clone(),
        };
        let mut cells = Vec::new();
        for (name, rule) in listed {
            let place = format!("{place}.redact.{name}");
            let facts = &self.tables[index].facts;
            let shown = facts.relation.shown();
            let column = facts
                .column(&name)
                .ok_or_else(|| {
                    Error::undefined(format!("column \"{name}\" of {shown} does not exist")).hint(nearest(facts, &name))
                })?
                .clone();
            if self.tables[index].key.iter().any(|(k, _)| *k == column.name) {
                return Err(Error::invalid(format!(
                    "column \"{name}\" of {shown} is part of its key and cannot be redacted"
                ))
                .hint("Name another key in \"key\", or leave the column out of \"redact\"."));
            }
            if column.generated {
                return Err(Error::invalid(format!(
                    "column \"{name}\" of {shown} is generated and cannot be overwritten"
                ))
                .hint("Redact the columns that it is generated from."));
            }
            if self.tables[index].delete {
                return Err(Error::invalid(format!("entries disagree on {shown}: delete or redact")));
            }
            let shape = shape_of(&column);
            let padded = column.base_type == pg_sys::BPCHAROID;
            let mut treatment = Treatment::compile(
                &rule,
                shape,
                !column.not_null,
                &self.document.placeholder,
                &self.document.also_redacted,
                padded,
            )
            .map_err(|e| Error::invalid(format!("{place}: {}", e.problem)).hint(e.hint))?;
            if let Some(constant) = treatment.constant().map(str::to_owned) {
                treatment.set_constant(self.canonical(index, &column, &constant, &place)?);
            }
            let expression = match &rule {
                Rule::Sql(text) => Some(self.expression(index, text, &place)?),
                _ => None,
            };
            let known = self.tables[index].cells.iter().position(|c| c.name == column.name);
            match known {
                Some(known) if self.tables[index].cells[known].rule.as_ref() == Some(&rule) => cells.push(known),
                Some(_) => {
                    return Err(Error::invalid(format!(
                        "entries disagree on the treatment of column \"{name}\" of {shown}"
                    )));
                }
                None => {
                    self.tables[index].cells.push(CellColumn {
                        name: column.name.clone(),
                        type_oid: column.type_oid,
                        shape,
                        base_type: column.base_type,
                        alone: alone(&column),
                        padded,
                        treatment: Some(treatment),
                        rule: Some(rule),
                        expression,
                        type_shown: column.type_shown.clone(),
                    });
                    cells.push(self.tables[index].cells.len() - 1);
                }
            }
        }
        Ok(cells)
    }

    /// A constant as the column would give it back: 0 becomes 0.00 in numeric(10,2).
    fn canonical(&self, table: usize, column: &catalog::Column, constant: &str, place: &str) -> Result<String> {
        let table = &self.tables[table];
        let rows = act_as(Identity::Owner(table.owner), self.search_path, &[], || {
            sql::read(
                &format!("SELECT CAST($1 AS {})", column.type_shown),
                &[Arg::Typed(column.type_oid, Some(constant))],
            )
        })
        .map_err(|e| {
            e.at(place)
                .hint("Write a {\"value\": …} that the column's type and its constraints accept, or use \"null\".")
        })?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.string(0)
    }

    /// SQL that gives a time with zone for an expression that is a timestamp or a date.
    fn instant(&self, table: usize, text: &str, place: &str) -> Result<String> {
        let expression = self.expression(table, text, place)?;
        let oid = self
            .types(table, std::slice::from_ref(&expression), place)?
            .first()
            .copied();
        let zone = self.document.timezone.replace('\'', "''");
        match oid {
            Some(pg_sys::TIMESTAMPTZOID) => Ok(expression.to_string()),
            Some(pg_sys::TIMESTAMPOID | pg_sys::DATEOID) => Ok(format!(
                "pg_catalog.timezone('{zone}', {expression}::pg_catalog.timestamp)"
            )),
            _ => Err(Error::invalid(format!("{place}: not a timestamp or date"))
                .hint("Convert it in the expression, for example created_on::timestamptz.")),
        }
    }

    fn anchor(&self, anchor: &Anchor) -> Result<AnchorPlan> {
        match anchor {
            Anchor::Expression(text) => Ok(AnchorPlan::Order(self.instant(0, text, "orders.anchor")?)),
            Anchor::Linked {
                linked,
                at,
                filter,
                complete,
            } => {
                let entry = self
                    .entries
                    .iter()
                    .position(|e| e.alias == *linked)
                    .ok_or_else(|| Error::invalid(format!("orders.anchor: \"{linked}\" is no entry")))?;
                let table = self.entries[entry].table;
                Ok(AnchorPlan::Linked {
                    entry,
                    at: self.instant(table, at, "orders.anchor.at")?,
                    filter: filter
                        .as_deref()
                        .map(|w| self.expression(table, w, "orders.anchor.where"))
                        .transpose()?,
                    complete: complete
                        .as_deref()
                        .map(|c| self.expression(0, c, "orders.anchor.complete"))
                        .transpose()?,
                })
            }
        }
    }
}

/// Elements of a domain over arrays stay whole, those of a domain over composites do not.
fn alone(column: &catalog::Column) -> bool {
    column.is_composite || (column.is_array && column.type_oid == column.base_type)
}

/// What kind of values a column holds.
fn shape_of(column: &catalog::Column) -> Shape {
    match column.base_type {
        pg_sys::TEXTOID | pg_sys::VARCHAROID | pg_sys::BPCHAROID | pg_sys::NAMEOID => Shape::Text,
        pg_sys::JSONOID | pg_sys::JSONBOID => Shape::Json,
        pg_sys::TEXTARRAYOID | pg_sys::VARCHARARRAYOID | pg_sys::BPCHARARRAYOID => Shape::TextArray,
        // citext and other text types of extensions take a text like text does.
        base if sql::type_name(base).ends_with(".citext") => Shape::Text,
        _ => Shape::Other,
    }
}

fn nearest(facts: &TableFacts, name: &str) -> String {
    facts
        .columns
        .iter()
        .map(|c| c.name.bare())
        .max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)))
        .map_or_else(
            || "The table has no columns.".to_owned(),
            |best| format!("Perhaps you meant \"{best}\"."),
        )
}

fn refuse_kind(facts: &TableFacts) -> Result<()> {
    let name = facts.relation.shown();
    let problem = match facts.kind {
        'v' => "is a view",
        'm' => "is a materialized view",
        'f' => "is a foreign table",
        kind if kind != 'r' && kind != 'p' => "is no table",
        _ if facts.has_children => "has tables that inherit from it",
        _ if facts.has_rules => "has rules",
        _ if facts.forced_rls => "applies row-level security to its owner",
        _ if !facts.persistent => "is temporary or unlogged",
        _ => return Ok(()),
    };
    Err(Error::invalid(format!("{name} {problem}")).hint("Ordinary and partitioned tables can be in a policy."))
}

/// A link, number or key must stay what it is when PII goes.
fn refuse_redacted_links(tables: &[Table], entries: &[Entry], number: Option<&Expr>) -> Result<()> {
    let refuse = |table: &Table, expressions: &[Expr], what: &str| {
        // Rows that go as a whole take their links with them.
        if table.delete {
            return Ok(());
        }
        match table
            .cells
            .iter()
            .find(|c| expressions.contains(&Expr::column(c.name.bare())))
        {
            Some(cell) => Err(Error::invalid(format!(
                "column \"{}\" of {} is redacted and cannot be {what}",
                cell.name.bare(),
                table.relation.shown()
            ))),
            None => Ok(()),
        }
    };
    for entry in entries {
        refuse(&tables[entry.table], &entry.on_child, "a link")?;
        if let Some(parent) = entry.parent {
            refuse(&tables[entries[parent].table], &entry.on_parent, "a link")?;
        }
        if let Some(number) = &entry.number {
            refuse(&tables[entry.table], std::slice::from_ref(number), "a number")?;
        }
    }
    if let Some(number) = number {
        refuse(&tables[0], std::slice::from_ref(number), "the order number")?;
    }
    Ok(())
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
