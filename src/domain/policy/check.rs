//! What the entries of a policy must be to each other. Entries are in the document's order here.

use super::document::suggestion;
use super::{
    Anchor, AssignCustomer, Linked, ManualOrders, Merge, Orders, Orphan, Policy, PolicyError, QualifiedName, Redact,
    RetrieveOnInsert, Role, Treatment,
};

type Result<T> = std::result::Result<T, PolicyError>;

/// Checks all that needs more than one entry.
pub(super) fn consistent(policy: &Policy) -> Result<()> {
    aliases(&policy.linked)?;
    parents(&policy.linked)?;
    anchors(&policy.orders, &policy.linked)?;
    customer(policy)?;
    let at_once = |a: &AssignCustomer| a.orphan == Orphan::Now;
    if policy.archive.foreign_table.is_some() && policy.orders.assign_customer.as_ref().is_some_and(at_once) {
        let problem = "a row cannot go before its order where the archive is a foreign table";
        return Err(PolicyError::new("orders.assign_customer.orphan", problem)
            .with_hint("Write \"archive\", the default: the row goes with its order."));
    }
    if !policy.retrieve_for.is_empty()
        && policy
            .linked
            .iter()
            .all(|l| l.retrieve_on_insert == RetrieveOnInsert::Never)
    {
        return Err(
            PolicyError::new("retrieve_for", "needs an entry with \"retrieve_on_insert\"")
                .with_hint("Say on the entry of the returns or credits that a new row has its order retrieved."),
        );
    }
    let tables = Tables::of(policy)?;
    by_age(policy, &tables)?;
    tables.agree()?;
    tables.keep_apart(policy)?;
    tables.identify(policy)?;
    tables.mark(policy)
}

fn aliases(linked: &[Linked]) -> Result<()> {
    for (at, entry) in linked.iter().enumerate() {
        // Names under which the tables of `by_age` are kept.
        if entry.alias.starts_with("by_age[") {
            return Err(PolicyError::new(
                format!("linked[{at}].as"),
                "a name that begins with \"by_age[\" is reserved",
            )
            .with_hint("Give the entry another name."));
        }
        if let Some(first) = linked[..at].iter().position(|other| other.alias == entry.alias) {
            let problem = format!("entry \"{}\" has the name of linked[{first}]", entry.alias);
            return Err(PolicyError::new(format!("linked[{at}].as"), problem)
                .with_hint("Give each entry a name of its own with \"as\"."));
        }
    }
    Ok(())
}

/// Whatever an order leads to goes with its order, archived; what else is in the same table is not told apart safely.
fn by_age(policy: &Policy, tables: &Tables<'_>) -> Result<()> {
    for (at, entry) in policy.by_age.iter().enumerate() {
        let name = QualifiedName::parse(&entry.table)?;
        if let Some((place, ..)) = tables.0.iter().find(|(_, known, _)| *known == name) {
            let problem = format!("{} is the table of {place}", entry.table);
            return Err(
                PolicyError::new(format!("by_age[{at}].table"), problem).with_hint("Its rows go with their orders.")
            );
        }
        let scrubbed = |(_, treatment): &(&str, &Treatment)| matches!(treatment, Treatment::Scrub(_));
        if let Some((column, _)) = entry.redact.columns().find(scrubbed) {
            let problem = "scrubs names, and no order stands behind these rows whose names they could be";
            return Err(PolicyError::new(format!("by_age[{at}].redact.{column}"), problem)
                .with_hint("Redact the column as a whole."));
        }
        let key = entry.key.iter().flatten();
        if let Some(column) = key
            .chain([&entry.at])
            .find(|c| entry.redact.columns().any(|(name, _)| name == *c))
        {
            let problem = format!("column \"{column}\" serves as key or age and is redacted");
            return Err(PolicyError::new(format!("by_age[{at}].redact.{column}"), problem)
                .with_hint("Use a column that holds no personal data."));
        }
    }
    Ok(())
}

fn parents(linked: &[Linked]) -> Result<()> {
    for (at, entry) in linked.iter().enumerate() {
        let mut above = entry;
        // A chain longer than the list has met an entry twice.
        for _ in 0..=linked.len() {
            let Some(parent) = &above.parent else { break };
            match linked.iter().find(|other| other.alias == *parent) {
                Some(next) => above = next,
                None if above.alias == entry.alias => {
                    return Err(no_entry(&format!("linked[{at}].parent"), parent, linked, true));
                }
                // The entry above is refused with its own place.
                None => break,
            }
            if above.alias == entry.alias {
                return Err(
                    PolicyError::new(format!("linked[{at}].parent"), "parents form a circle")
                        .with_hint("Leave \"parent\" out where the orders table is the parent."),
                );
            }
        }
    }
    Ok(())
}

fn anchors(orders: &Orders, linked: &[Linked]) -> Result<()> {
    for (at, anchor) in orders.anchor.iter().enumerate() {
        let Anchor::Linked { linked: name, .. } = anchor else {
            continue;
        };
        if !linked.iter().any(|entry| entry.alias == *name) {
            let path = match orders.anchor.len() {
                1 => "orders.anchor.linked".to_owned(),
                _ => format!("orders.anchor[{at}].linked"),
            };
            return Err(no_entry(&path, name, linked, false));
        }
    }
    Ok(())
}

/// What is asked of the customer needs exactly one entry that is the customer's, and one that an order points at.
fn customer(policy: &Policy) -> Result<()> {
    let is_customer = |entry: &&Linked| entry.role == Some(Role::Customer);
    for (at, entry) in policy.linked.iter().enumerate().filter(|(_, e)| !is_customer(e)) {
        let (by, merge) = (!entry.duplicate_by.is_empty(), entry.merge != Merge::Allow);
        if let Some(key) = by.then_some("duplicate_by").or(merge.then_some("merge")) {
            return Err(
                PolicyError::new(format!("linked[{at}].{key}"), "is for the customer's entry")
                    .with_hint("Add \"role\": \"customer\" where the customer is."),
            );
        }
    }
    let asks = |entry: &Linked| !entry.duplicate_by.is_empty() || entry.merge != Merge::Allow;
    let assign = policy.orders.assign_customer.as_ref();
    let needs = match policy.linked.iter().position(asks) {
        _ if assign.is_some() => "orders.assign_customer".to_owned(),
        _ if policy.orders.manual_orders != ManualOrders::Allow => "orders.manual_orders".to_owned(),
        Some(at) if policy.linked[at].merge != Merge::Allow => format!("linked[{at}].merge"),
        Some(at) => format!("linked[{at}].duplicate_by"),
        None => return Ok(()),
    };
    match policy.customer() {
        Some(entry) if entry.parent.is_none() => match assign {
            Some(assign) if entry.on.len() != 1 || entry.on[0].1 != assign.column => {
                let problem = format!(
                    "column \"{}\" is not what leads to entry \"{}\"",
                    assign.column, entry.alias
                );
                Err(PolicyError::new("orders.assign_customer.column", problem)
                    .with_hint("Name the column on the right side of the customer's \"on\"."))
            }
            _ => Ok(()),
        },
        Some(entry) => Err(PolicyError::new(
            needs,
            format!("the customer's entry \"{}\" hangs on another entry", entry.alias),
        )
        .with_hint("Link the customer to the orders table itself.")),
        None => {
            let count = policy.linked.iter().filter(is_customer).count();
            let problem = format!("needs exactly one entry with \"role\": \"customer\", and there are {count}");
            Err(PolicyError::new(needs, problem)
                .with_hint("Mark the entry of the customers table with \"role\": \"customer\"."))
        }
    }
}

fn no_entry(path: &str, name: &str, linked: &[Linked], parent: bool) -> PolicyError {
    let known: Vec<&str> = linked.iter().map(|entry| entry.alias.as_str()).collect();
    let hint = suggestion(name, &known);
    let hint = if parent {
        format!("{hint} Leave \"parent\" out for the orders table.")
    } else {
        hint
    };
    PolicyError::new(path, format!("no entry is named \"{name}\"")).with_hint(hint)
}

/// Every place that names a table, with what is redacted there.
struct Tables<'a>(Vec<(String, QualifiedName, &'a Redact)>);

impl<'a> Tables<'a> {
    fn of(policy: &'a Policy) -> Result<Self> {
        let mut tables = vec![(
            "orders".to_owned(),
            QualifiedName::parse(&policy.orders.table)?,
            &policy.orders.redact,
        )];
        for (at, entry) in policy.linked.iter().enumerate() {
            tables.push((
                format!("linked[{at}]"),
                QualifiedName::parse(&entry.table)?,
                &entry.redact,
            ));
        }
        Ok(Self(tables))
    }

    /// Two entries of one table may reach the same row, so a column has one treatment wherever it is named.
    fn agree(&self) -> Result<()> {
        for (at, (path, table, redact)) in self.0.iter().enumerate() {
            for (first, _, other) in self.0[..at].iter().filter(|(_, name, _)| name == table) {
                for (column, treatment) in redact.columns() {
                    let earlier = other.columns().find(|(name, _)| *name == column);
                    if earlier.is_some_and(|(_, earlier)| !compatible(treatment, earlier)) {
                        let problem = format!("treatment of \"{column}\" differs from that in {first}");
                        return Err(PolicyError::new(format!("{path}.redact.{column}"), problem)
                            .with_hint("Both entries name the same table; give the column one treatment."));
                    }
                }
            }
        }
        Ok(())
    }

    /// A column is redacted or kept, not both, in all entries of its table.
    fn keep_apart(&self, policy: &Policy) -> Result<()> {
        let kept = std::iter::once(&policy.orders.keep).chain(policy.linked.iter().map(|entry| &entry.keep));
        for ((path, table, _), columns) in self.0.iter().zip(kept) {
            for column in columns {
                let redacts = |redact: &Redact| redact.columns().any(|(name, _)| name == column);
                if let Some((other, ..)) = self.0.iter().find(|(_, name, redact)| name == table && redacts(redact)) {
                    let problem = format!("column \"{column}\" is kept, and redacted in {other}");
                    return Err(PolicyError::new(format!("{path}.keep"), problem)
                        .with_hint("Name it in one of the two places."));
                }
            }
        }
        for (at, entry) in policy.by_age.iter().enumerate() {
            if let Some((column, _)) = entry
                .redact
                .columns()
                .find(|(name, _)| entry.keep.iter().any(|k| k == name))
            {
                let problem = format!("column \"{column}\" is kept, and redacted");
                return Err(PolicyError::new(format!("by_age[{at}].keep"), problem)
                    .with_hint("Name it in one of the two places."));
            }
        }
        Ok(())
    }

    /// What finds a row must still find it when the row is redacted. Expressions are tried on rows when applied.
    fn identify(&self, policy: &Policy) -> Result<()> {
        let orders = &policy.orders;
        let key = orders.key.iter().flatten();
        for column in key {
            self.keeps(0, column, "orders.key", "key")?;
        }
        if let Some(number) = &orders.number {
            self.keeps(0, number, "orders.number", "number")?;
        }
        for (at, entry) in policy.linked.iter().enumerate() {
            let path = format!("linked[{at}]");
            for column in entry.key.iter().flatten() {
                self.keeps(at + 1, column, &format!("{path}.key"), "key")?;
            }
            if let Some(number) = &entry.number {
                self.keeps(at + 1, number, &format!("{path}.number"), "number")?;
            }
            let parent = entry
                .parent
                .as_ref()
                .and_then(|name| policy.linked.iter().position(|e| e.alias == *name));
            for (child, above) in &entry.on {
                let path = format!("{path}.on.{child}");
                self.keeps(at + 1, child, &path, "link")?;
                self.keeps(parent.map_or(0, |parent| parent + 1), above, &path, "link")?;
            }
        }
        Ok(())
    }

    /// A mark is set on the rows of a table, whichever entries lead to them, and holds no personal data.
    fn mark(&self, policy: &Policy) -> Result<()> {
        let of_entries = policy.linked.iter().map(|entry| &entry.mark);
        let marks: Vec<&Vec<(String, String)>> = std::iter::once(&policy.orders.mark).chain(of_entries).collect();
        for (at, mark) in marks.iter().enumerate() {
            let (place, table, _) = &self.0[at];
            for (column, expression) in *mark {
                let path = format!("{place}.mark.{column}");
                self.keeps(at, column, &path, "mark")?;
                for (first, other) in marks[..at].iter().enumerate().filter(|(i, _)| self.0[*i].1 == *table) {
                    if other
                        .iter()
                        .any(|(name, earlier)| name == column && earlier != expression)
                    {
                        let problem = format!("expression for \"{column}\" differs from that in {}", self.0[first].0);
                        return Err(PolicyError::new(path, problem)
                            .with_hint("Both entries name the same table; give the column one expression."));
                    }
                }
            }
        }
        Ok(())
    }

    /// Refuses a column that any entry of the same table redacts.
    fn keeps(&self, place: usize, column: &str, path: &str, purpose: &str) -> Result<()> {
        let (_, table, _) = &self.0[place];
        let redacted = |redact: &Redact| redact.columns().any(|(name, _)| name == column);
        match self
            .0
            .iter()
            .find(|(_, name, redact)| name == table && redacted(redact))
        {
            None => Ok(()),
            Some((redacting, ..)) => {
                let problem = format!("column \"{column}\" serves as {purpose} and is redacted in {redacting}");
                Err(PolicyError::new(path, problem).with_hint("Use a column that holds no personal data."))
            }
        }
    }
}

/// The default is placeholder or NULL, whichever suits the type, which is not known here.
fn compatible(a: &Treatment, b: &Treatment) -> bool {
    use Treatment::{Default, Null, Placeholder};
    a == b || matches!((a, b), (Default, Placeholder | Null) | (Placeholder | Null, Default))
}

/// Orders entries so that every parent precedes its children, otherwise as in the document.
pub(super) fn parents_first(mut waiting: Vec<Linked>) -> Result<Vec<Linked>> {
    let mut sorted: Vec<Linked> = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let placed = |name: &String| sorted.iter().any(|entry| entry.alias == *name);
        let Some(next) = waiting
            .iter()
            .position(|entry| entry.parent.as_ref().is_none_or(placed))
        else {
            return Err(PolicyError::new("linked", "parents form a circle"));
        };
        sorted.push(waiting.remove(next));
    }
    Ok(sorted)
}
