//! How a document becomes a plan: tables are looked up, expressions checked, treatments compiled.

use pgrx::pg_sys;

use super::{Aged, AnchorPlan, CellColumn, Customer, EXPRESSION_HINT, Entry, Table};
use crate::domain::policy::{Anchor, ByAge, Linked, OnRedact, Policy, Redact, RetrieveOnInsert, Treatment as Rule};
use crate::domain::treatment::{Shape, Treatment};
use crate::pg::catalog::{self, TableFacts};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Expr;
use crate::pg::identity::{Identity, act_as};
use crate::pg::sql::{self, Arg};

/// Makes a document ready, piece by piece.
pub struct Builder<'a> {
    pub(super) document: &'a Policy,
    pub(super) search_path: &'a str,
    /// Of every table that the document names.
    pub(super) facts: &'a [TableFacts],
    pub tables: Vec<Table>,
    pub(super) entries: Vec<Entry>,
}

impl Builder<'_> {
    /// A table that no order leads to. Its key tells which row is which.
    pub fn table_apart(&self, oid: pg_sys::Oid, shown: &str) -> Result<Table> {
        let mut apart = Builder {
            document: self.document,
            search_path: self.search_path,
            facts: self.facts,
            tables: Vec::new(),
            entries: Vec::new(),
        };
        apart.table(oid, shown, None)?;
        apart.tables.pop().ok_or_else(|| Error::internal("no table"))
    }

    /// The table with this OID, added if it is new.
    pub(super) fn table(&mut self, oid: pg_sys::Oid, shown: &str, key: Option<&[String]>) -> Result<usize> {
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
        let facts = self.facts.iter().find(|f| f.relation.oid == oid).cloned();
        let facts = facts.ok_or_else(|| Error::undefined(format!("table {shown} does not exist")))?;
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
            marks: Vec::new(),
            delete: false,
            no_copy: false,
            files: None,
            shared: false,
            amazon_only: false,
            facts,
        });
        Ok(self.tables.len() - 1)
    }

    /// An expression over a table's row: parsed, or the column of exactly that name.
    pub fn expression(&self, table: usize, text: &str, place: &str) -> Result<Expr> {
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

    /// Refuses columns that are to be kept and do not exist.
    pub(super) fn kept(&self, table: usize, columns: &[String], place: &str) -> Result<()> {
        let facts = &self.tables[table].facts;
        match columns.iter().find(|c| facts.column(c).is_none()) {
            None => Ok(()),
            Some(missing) => Err(Error::undefined(format!(
                "{place}.keep: column \"{missing}\" of {} does not exist",
                facts.relation.shown()
            ))
            .hint(nearest(facts, missing))),
        }
    }

    /// The types of expressions, found out as the table's owner.
    pub fn types(&self, table: usize, expressions: &[Expr], place: &str) -> Result<Vec<pg_sys::Oid>> {
        let table = &self.tables[table];
        act_as(Identity::Owner(table.owner), self.search_path, &[], || {
            catalog::expression_types(&table.relation, expressions)
        })
        .map_err(|e| e.at(place).hint(EXPRESSION_HINT))
    }

    /// The types in which the values of a link travel to the other side, below all domains: the CHECK of a domain is
    /// code of its owner, and would run as the other side's.
    pub(super) fn link_types(&self, table: usize, expressions: &[Expr], place: &str) -> Result<Vec<pg_sys::Oid>> {
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

    pub(super) fn linked(&mut self, linked: &Linked, oid: pg_sys::Oid) -> Result<()> {
        let place = format!("linked \"{}\"", linked.alias);
        let table = self.table(oid, &linked.table, linked.key.as_deref())?;
        self.kept(table, &linked.keep, &place)?;
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
        let retrieve_on_insert = match &linked.retrieve_on_insert {
            RetrieveOnInsert::Never => None,
            RetrieveOnInsert::Always => Some(None),
            RetrieveOnInsert::When(text) => Some(Some(self.expression(
                table,
                text,
                &format!("{place}.retrieve_on_insert"),
            )?)),
        };
        // A row belongs to one parent when the parent's side of the link is a key of the parent.
        let exclusive = self.entries[parent].exclusive
            && self.tables[parent_table].facts.keys.iter().any(|key| {
                key.iter()
                    .all(|column| on_parent.iter().any(|e| *e == Expr::column(column)))
            });
        let first = self.tables[table].cells.is_empty();
        let cells = if matches!(linked.on_redact, OnRedact::Delete) {
            self.whole_row(table, !linked.archive)?
        } else {
            self.cells(table, &linked.redact, &place)?
        };
        let own = &mut self.tables[table];
        if first {
            own.no_copy = !linked.archive;
        } else if !cells.is_empty() && own.no_copy == linked.archive {
            return Err(Error::invalid(format!(
                "entries disagree on {}: archived or not",
                own.relation.shown()
            )));
        }
        self.files(table, linked.files.as_deref(), &place)?;
        self.marks(table, &linked.mark, &place)?;
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
            retrieve_on_insert,
            exclusive,
        });
        Ok(())
    }

    /// Rows that no order leads to; their table is none of the others.
    pub(super) fn aged(&self, name: String, aged: &ByAge, oid: pg_sys::Oid) -> Result<Aged> {
        if let Some(known) = self.tables.iter().find(|t| t.relation.oid == oid) {
            return Err(
                Error::invalid(format!("{name}: {} is a table of the orders", known.relation.shown()))
                    .hint("Its rows go with their orders."),
            );
        }
        let mut own = Builder {
            document: self.document,
            search_path: self.search_path,
            facts: self.facts,
            tables: Vec::new(),
            entries: Vec::new(),
        };
        let table = own.table(oid, &aged.table, aged.key.as_deref())?;
        own.cells(table, &aged.redact, &name)?;
        own.kept(table, &aged.keep, &name)?;
        let place = format!("{name}.at");
        let at = own.expression(table, &aged.at, &place)?;
        let at_type = own
            .link_types(table, std::slice::from_ref(&at), &place)?
            .first()
            .copied();
        let at_type = at_type
            .filter(|t| matches!(*t, pg_sys::TIMESTAMPTZOID | pg_sys::TIMESTAMPOID | pg_sys::DATEOID))
            .ok_or_else(|| {
                Error::invalid(format!("{place}: not a timestamp or date"))
                    .hint("Convert it in the expression, for example created_on::timestamptz.")
            })?;
        let filter = aged
            .filter
            .as_deref()
            .map(|w| own.expression(table, w, &format!("{name}.where")))
            .transpose()?;
        let mut table = own.tables.swap_remove(table);
        table.delete = matches!(aged.on_redact, OnRedact::Delete);
        Ok(Aged {
            name,
            table,
            at,
            at_type,
            filter,
            after: aged.after.clone(),
        })
    }

    /// Where the files of a table's rows lie; entries that say so must agree.
    pub(super) fn files(&mut self, index: usize, text: Option<&str>, place: &str) -> Result<()> {
        let Some(text) = text else { return Ok(()) };
        let files = self.expression(index, text, &format!("{place}.files"))?;
        let table = &mut self.tables[index];
        if table.files.as_ref().is_some_and(|known| *known != files) {
            return Err(Error::invalid(format!(
                "entries disagree on the files of {}",
                table.relation.shown()
            )));
        }
        table.files = Some(files);
        Ok(())
    }

    /// Every stored column of a row that goes as a whole; without a copy it goes by its key, whatever else is in it.
    pub(super) fn whole_row(&mut self, index: usize, no_copy: bool) -> Result<Vec<usize>> {
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
                    names: Vec::new(),
                    room: None,
                    type_shown: c.type_shown.clone(),
                    archived_as: c.name.bare().to_owned(),
                    said: c.name.bare().to_owned(),
                    former: Vec::new(),
                })
                .collect();
        }
        let is_key = |cell: &CellColumn| table.key.iter().any(|(name, _)| *name == cell.name);
        Ok((0..table.cells.len())
            .filter(|i| !no_copy || is_key(&table.cells[*i]))
            .collect())
    }

    /// Compiles the treatments of an entry into the table's cells; entries that name one column must agree.
    pub(super) fn cells(&mut self, index: usize, redact: &Redact, place: &str) -> Result<Vec<usize>> {
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
                        names: Vec::new(),
                        room: column.max_length.and_then(|n| usize::try_from(n).ok()),
                        type_shown: column.type_shown.clone(),
                        archived_as: name.clone(),
                        said: name.clone(),
                        former: Vec::new(),
                    });
                    cells.push(self.tables[index].cells.len() - 1);
                }
            }
        }
        Ok(cells)
    }

    /// A constant as the column would give it back: 0 becomes 0.00 in numeric(10,2).
    pub fn canonical(&self, table: usize, column: &catalog::Column, constant: &str, place: &str) -> Result<String> {
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
    pub(super) fn instant(&self, table: usize, text: &str, place: &str) -> Result<String> {
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

    /// The customer's entry, if an order points at it itself.
    pub(super) fn customer(&self, linked: &Linked) -> Result<Option<Customer>> {
        let Some(entry) = self
            .entries
            .iter()
            .position(|e| e.alias == linked.alias && e.parent == Some(0))
        else {
            return Ok(None);
        };
        let place = format!("linked \"{}\".duplicate_by", linked.alias);
        let by = linked.duplicate_by.iter();
        let duplicate_by = by
            .map(|text| self.expression(self.entries[entry].table, text, &place))
            .collect::<Result<_>>()?;
        Ok(Some(Customer { entry, duplicate_by }))
    }

    pub(super) fn anchor(&self, anchor: &Anchor) -> Result<AnchorPlan> {
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

pub(super) fn nearest(facts: &TableFacts, name: &str) -> String {
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
pub(super) fn refuse_redacted_links(tables: &[Table], entries: &[Entry], number: Option<&Expr>) -> Result<()> {
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
