//! From a JSON document to the typed policy: keys, types, words and defaults.

use chrono::NaiveTime;
use chrono_tz::Tz;
use serde_json::Value;

use super::access::limits;
use super::document::{Node, Object, nearest, suggestion};
use super::history::history;
use super::moment::moment;
use super::{
    Anchor, Archive, AssignCustomer, ByAge, Deadline, Export, Linked, OnRedact, Orders, Orphan, Policy, PolicyError,
    QualifiedName, Redact, RetrieveOnInsert, Role, Shared, Treatment, Window,
};

type Result<T> = std::result::Result<T, PolicyError>;

const POLICY: &[&str] = &[
    "policy",
    "orders",
    "linked",
    "by_age",
    "placeholder",
    "also_redacted",
    "archive_after",
    "redact_after",
    "retrieved_for",
    "archive_for",
    "audit_for",
    "archive",
    "files_within",
    "deadline",
    "window",
    "timezone",
    "enabled",
    "effective_from",
    "report_only_until",
    "export",
    "when_retrieved",
    "on_reimport",
    "reason",
    "loosened",
    "history",
    "retrieve_for",
    "retrievals_per_day",
    "user_retrievals_per_day",
    "alarm_per_day",
    "require_actor",
];
const ORDERS: &[&str] = &[
    "table",
    "key",
    "number",
    "amazon",
    "anchor",
    "replaces",
    "placed",
    "stale_after",
    "stale",
    "effective_from",
    "manual_orders",
    "assign_customer",
    "redact",
    "files",
    "keep",
    "mark",
];
const ANCHOR: &[&str] = &["linked", "at", "where", "complete"];
const LINKED: &[&str] = &[
    "table",
    "as",
    "parent",
    "key",
    "on",
    "where",
    "number",
    "not_before",
    "redact",
    "keep",
    "mark",
    "on_redact",
    "role",
    "duplicate_by",
    "merge",
    "shared",
    "archive",
    "files",
    "retrieve_on_insert",
];
const BY_AGE: &[&str] = &[
    "table",
    "key",
    "at",
    "after",
    "where",
    "redact",
    "keep",
    "on_redact",
    "archive",
];
const ARCHIVE: &[&str] = &["schema", "foreign_table"];
const WINDOW: &[&str] = &["from", "to", "timezone"];
const TREATMENTS: &[&str] = &["value", "unique", "json", "sql", "array", "prefix", "scrub"];

/// Reads the whole document.
pub(super) fn policy(root: &Node<'_>) -> Result<Policy> {
    let document = root.object(POLICY)?;
    let name = document.need("policy")?;
    let timezone = document
        .get("timezone")
        .map(|node| zone(&node))
        .transpose()?
        .unwrap_or(Tz::UTC);
    let linked = match document.get("linked") {
        Some(node) => node
            .list("a list of tables")?
            .iter()
            .map(linked)
            .collect::<Result<_>>()?,
        None => Vec::new(),
    };
    Ok(Policy {
        policy: policy_name(&name)?,
        orders: orders(&document.need("orders")?)?,
        linked,
        by_age: match document.get("by_age") {
            Some(node) => node
                .list("a list of tables")?
                .iter()
                .map(by_age)
                .collect::<Result<_>>()?,
            None => Vec::new(),
        },
        placeholder: document.text_or("placeholder", "[Redacted]")?,
        also_redacted: match document.get("also_redacted") {
            Some(node) => node.texts("a list of texts")?,
            None => Vec::new(),
        },
        archive_after: document.text_or("archive_after", "29 days")?,
        redact_after: document.text_or("redact_after", "30 days")?,
        retrieved_for: document.text_or("retrieved_for", "30 days")?,
        files_within: document.text_or("files_within", "1 day")?,
        archive_for: document.text_or("archive_for", "10 years")?,
        deadline: deadline(&document)?,
        audit_for: document.text_or("audit_for", "10 years")?,
        archive: archive(document.get("archive").as_ref())?,
        window: document.get("window").map(|node| window(&node, timezone)).transpose()?,
        timezone: timezone.name().to_owned(),
        enabled: flag(&document, "enabled")?,
        effective_from: document
            .get("effective_from")
            .map(|node| moment(&node, timezone))
            .transpose()?,
        report_only_until: document
            .get("report_only_until")
            .map(|node| moment(&node, timezone))
            .transpose()?,
        export: document
            .get("export")
            .map(|node| node.word::<Export>(&["warn", "require"]))
            .transpose()?,
        when_retrieved: document.word_or_default("when_retrieved", &["refuse", "ignore"])?,
        on_reimport: document.word_or_default("on_reimport", &["redact", "keep", "refuse"])?,
        reason: document.word_or_default("reason", &["required", "optional"])?,
        loosened: document.text("loosened")?,
        retrieve_for: match document.get("retrieve_for") {
            Some(node) => node.some_texts("a list of roles")?,
            None => Vec::new(),
        },
        history: document.get("history").map(|node| history(&node)).transpose()?,
        limits: limits(&document)?,
        require_actor: flag(&document, "require_actor")?,
    })
}

/// True or false; false if left out.
fn flag(object: &Object<'_>, key: &str) -> Result<bool> {
    let flag = object.get(key).map(|node| node.boolean()).transpose()?;
    Ok(flag.unwrap_or(false))
}

fn policy_name(node: &Node<'_>) -> Result<String> {
    let name = node.text()?;
    let right = name.len() <= 40
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if right {
        return Ok(name);
    }
    Err(node
        .error("is not a policy's name")
        .with_hint("Use at most 40 lower-case letters, digits and underscores, and start with a letter."))
}

fn orders(node: &Node<'_>) -> Result<Orders> {
    let orders = node.object(ORDERS)?;
    let placed = orders.text("placed")?;
    let stale_after = orders.text("stale_after")?;
    if let (Some(node), None) = (orders.get("stale_after"), &placed) {
        return Err(node
            .error("needs \"placed\"")
            .with_hint("Name the column that says when an order was placed."));
    }
    if let (Some(node), None) = (orders.get("stale"), &stale_after) {
        return Err(node
            .error("needs \"stale_after\"")
            .with_hint("Say after which time an order is stale."));
    }
    Ok(Orders {
        table: table(&orders.need("table")?)?.0,
        key: orders.get("key").map(|node| columns(&node)).transpose()?,
        number: orders.text("number")?,
        amazon: orders.text("amazon")?,
        anchor: anchors(&orders.need("anchor")?)?,
        replaces: orders.text("replaces")?,
        placed,
        stale_after,
        stale: orders.word_or_default("stale", &["report", "redact"])?,
        effective_from: orders.text("effective_from")?,
        manual_orders: orders.word_or_default("manual_orders", &["allow", "warn", "refuse"])?,
        assign_customer: orders
            .get("assign_customer")
            .map(|node| assign_customer(&node))
            .transpose()?,
        redact: redact(orders.get("redact").as_ref())?,
        keep: keep(&orders)?,
        files: files(&orders, orders.get("redact").is_some())?,
        mark: mark(orders.get("mark").as_ref())?,
    })
}

fn linked(node: &Node<'_>) -> Result<Linked> {
    let entry = node.object(LINKED)?;
    let (table, name) = table(&entry.need("table")?)?;
    let on_redact = entry.word_or_default("on_redact", &["update", "delete"])?;
    let treated = entry.get("redact").is_some() || on_redact == OnRedact::Delete;
    let archive = entry.get("archive");
    if let (Some(node), false) = (&archive, treated) {
        return Err(node
            .error("says what becomes of rows that stay as they are")
            .with_hint("Leave it out, or name columns in \"redact\"."));
    }
    let redact = redact(entry.get("redact").as_ref())?;
    if let (Some(node), Redact::Nothing) = (entry.get("mark"), &redact) {
        return Err(node
            .error("marks rows of which nothing is redacted")
            .with_hint("A row is marked when its columns in \"redact\" are overwritten."));
    }
    Ok(Linked {
        table,
        alias: entry.text("as")?.unwrap_or(name.name),
        parent: entry.text("parent")?,
        key: entry.get("key").map(|node| columns(&node)).transpose()?,
        on: on(&entry.need("on")?)?,
        filter: entry.text("where")?,
        number: entry.text("number")?,
        not_before: entry.text("not_before")?,
        redact,
        keep: keep(&entry)?,
        mark: mark(entry.get("mark").as_ref())?,
        on_redact,
        role: entry
            .get("role")
            .map(|node| node.word::<Role>(&["customer"]))
            .transpose()?,
        duplicate_by: match entry.get("duplicate_by") {
            Some(node) => node.some_texts("a list of columns or expressions")?,
            None => Vec::new(),
        },
        merge: entry.word_or_default("merge", &["allow", "refuse"])?,
        shared: entry.word_or_default::<Shared>("shared", &["any", "amazon"])?,
        retrieve_on_insert: match entry.get("retrieve_on_insert") {
            None => RetrieveOnInsert::Never,
            Some(node) => match node.value() {
                Value::Bool(true) => RetrieveOnInsert::Always,
                Value::Bool(false) => RetrieveOnInsert::Never,
                Value::String(_) => RetrieveOnInsert::When(node.text()?),
                _ => {
                    return Err(node
                        .error("is neither true nor a condition")
                        .with_hint("Write true, or an SQL condition over the new row."));
                }
            },
        },
        archive: archive.map(|node| node.boolean()).transpose()?.unwrap_or(true),
        files: files(&entry, treated)?,
    })
}

/// Where a row's file lies. It goes with what is redacted in the row: where nothing is, nobody would know when it is done.
fn files(entry: &Object<'_>, treated: bool) -> Result<Option<String>> {
    match entry.get("files") {
        Some(node) if !treated => Err(node
            .error("belongs to rows that stay as they are")
            .with_hint("Name columns in \"redact\", the one with the file's path too.")),
        _ => entry.text("files"),
    }
}

fn by_age(node: &Node<'_>) -> Result<ByAge> {
    let entry = node.object(BY_AGE)?;
    let on_redact = entry.word_or_default("on_redact", &["update", "delete"])?;
    let columns = redact(entry.get("redact").as_ref())?;
    match (&on_redact, &columns) {
        (OnRedact::Update, Redact::Nothing) => {
            return Err(node
                .error("says nothing of what happens to its rows")
                .with_hint("Name columns in \"redact\", or write \"on_redact\": \"delete\"."));
        }
        (OnRedact::Delete, Redact::Columns(_) | Redact::Treatments(_)) => {
            return Err(entry
                .need("redact")?
                .error("names columns of rows that are deleted")
                .with_hint("Leave \"redact\" or \"on_redact\" out."));
        }
        _ => {}
    }
    // Nobody loses data without having said so.
    let archive = entry.need("archive").map_err(|e| {
        e.with_hint("Rows by age are not archived: write \"archive\": false to say that they may go for good.")
    })?;
    if archive.boolean()? {
        return Err(archive
            .error("rows by age cannot be archived")
            .with_hint("Write false, if they may go for good; otherwise link the table to the orders."));
    }
    Ok(ByAge {
        table: table(&entry.need("table")?)?.0,
        key: entry.get("key").map(|node| self::columns(&node)).transpose()?,
        at: entry.need("at")?.text()?,
        after: entry.need("after")?.text()?,
        filter: entry.text("where")?,
        redact: columns,
        keep: keep(&entry)?,
        on_redact,
    })
}

fn assign_customer(node: &Node<'_>) -> Result<AssignCustomer> {
    let assign = node.object(&["column", "to", "orphan"])?;
    let to = assign.need("to")?;
    let text = match to.value() {
        Value::Number(number) => number.to_string(),
        Value::String(_) => to.text()?,
        _ => {
            return Err(to
                .error("is neither a number nor a text")
                .with_hint("Write the key of the generic customer."));
        }
    };
    let orphan = assign.get("orphan");
    Ok(AssignCustomer {
        column: assign.need("column")?.text()?,
        to: text,
        orphan: orphan.map_or(Ok(Orphan::Archive), |node| node.word(&["archive", "now"]))?,
    })
}

fn table(node: &Node<'_>) -> Result<(String, QualifiedName)> {
    let text = node.text()?;
    match QualifiedName::parse(&text) {
        Ok(name) => Ok((text, name)),
        Err(error) => Err(PolicyError {
            hint: error.hint,
            ..node.error(error.problem)
        }),
    }
}

/// A list of columns, or one column alone.
fn columns(node: &Node<'_>) -> Result<Vec<String>> {
    match node.value() {
        Value::String(_) => Ok(vec![node.text()?]),
        _ => node.some_texts("a list of columns"),
    }
}

fn on(node: &Node<'_>) -> Result<Vec<(String, String)>> {
    let pairs = node.map("an object of this table's columns and its parent's")?;
    if pairs.is_empty() {
        return Err(node
            .error("joins nothing")
            .with_hint("Map a column of this table to a column of its parent."));
    }
    pairs
        .into_iter()
        .map(|(child, parent)| Ok((child.to_owned(), parent.text()?)))
        .collect()
}

fn anchors(node: &Node<'_>) -> Result<Vec<Anchor>> {
    match node.value() {
        Value::Array(_) => {
            let anchors = node.list("a list of anchors")?;
            if anchors.is_empty() {
                return Err(node.error("is an empty list"));
            }
            anchors.iter().map(anchor).collect()
        }
        _ => Ok(vec![anchor(node)?]),
    }
}

fn anchor(node: &Node<'_>) -> Result<Anchor> {
    if !node.value().is_object() {
        return node.text().map(Anchor::Expression);
    }
    let anchor = node.object(ANCHOR)?;
    Ok(Anchor::Linked {
        linked: anchor.need("linked")?.text()?,
        at: anchor.need("at")?.text()?,
        filter: anchor.text("where")?,
        complete: anchor.text("complete")?,
    })
}

fn redact(node: Option<&Node<'_>>) -> Result<Redact> {
    let Some(node) = node else {
        return Ok(Redact::Nothing);
    };
    if node.value().is_array() {
        return node.some_texts("a list of columns").map(Redact::Columns);
    }
    let columns = node.map("a list of columns, or an object of columns and treatments")?;
    if columns.is_empty() {
        return Err(node
            .error("names no column")
            .with_hint("Leave the key out for a table that only links others."));
    }
    let treatments = columns
        .into_iter()
        .map(|(column, node)| Ok((column.to_owned(), treatment(&node)?)));
    treatments.collect::<Result<_>>().map(Redact::Treatments)
}

fn keep(entry: &Object<'_>) -> Result<Vec<String>> {
    let kept = entry.get("keep").map(|node| node.texts("a list of columns"));
    kept.transpose().map(Option::unwrap_or_default)
}

/// Columns with an expression for each.
fn mark(node: Option<&Node<'_>>) -> Result<Vec<(String, String)>> {
    let Some(node) = node else {
        return Ok(Vec::new());
    };
    let columns = node.map("an object of columns and expressions, such as {\"pii_redacted_at\": \"now()\"}")?;
    if columns.is_empty() {
        return Err(node.error("names no column"));
    }
    columns
        .into_iter()
        .map(|(column, expression)| Ok((column.to_owned(), expression.text()?)))
        .collect()
}

fn treatment(node: &Node<'_>) -> Result<Treatment> {
    if let Value::String(word) = node.value() {
        return match word.as_str() {
            "placeholder" => Ok(Treatment::Placeholder),
            "null" => Ok(Treatment::Null),
            _ => Err(unknown_treatment(node, word)),
        };
    }
    // A wrong type is best answered with all that a treatment can be.
    if !node.value().is_object() {
        return Err(node
            .error("is not a treatment")
            .with_hint("Write \"placeholder\", \"null\" or an object such as {\"prefix\": 2}."));
    }
    let object = node.object(TREATMENTS)?;
    let Some((kind, argument)) = object.only() else {
        return Err(node
            .error("must say exactly one treatment")
            .with_hint("Keep one key of the object."));
    };
    match kind {
        "value" if argument.value().is_null() => Ok(Treatment::Null),
        "value" => Ok(Treatment::Value(argument.value().clone())),
        "unique" => unique(&argument),
        "json" if argument.value().is_object() => {
            let keep = argument.object(&["keep"])?.need("keep")?;
            // Nothing to keep is meant: every leaf is redacted.
            Ok(Treatment::JsonKeep(paths(&keep, keep.texts("a list of JSON paths")?)?))
        }
        "json" => Ok(Treatment::Json(paths(
            &argument,
            argument.some_texts("a list of JSON paths")?,
        )?)),
        "sql" => argument.text().map(Treatment::Sql),
        "array" => match argument.text()?.as_str() {
            "placeholder" => Ok(Treatment::ArrayPlaceholder),
            word => Err(argument
                .error(format!("unknown word \"{word}\""))
                .with_hint("Only \"placeholder\" is known here.")),
        },
        "prefix" => argument.count().map(Treatment::Prefix),
        "scrub" => argument
            .some_texts("a list of entries' columns, such as \"customers.last_name\"")
            .map(Treatment::Scrub),
        _ => Err(unknown_treatment(node, kind)),
    }
}

fn unknown_treatment(node: &Node<'_>, word: &str) -> PolicyError {
    let known = [&["placeholder", "null"], TREATMENTS].concat();
    node.error(format!("unknown treatment \"{word}\""))
        .with_hint(suggestion(word, &known))
}

/// Without the key, the second row under a unique constraint could not be redacted.
fn unique(node: &Node<'_>) -> Result<Treatment> {
    let text = node.text()?;
    if text.contains("{key}") {
        return Ok(Treatment::Unique(text));
    }
    Err(node
        .error("has no \"{key}\"")
        .with_hint("Write a text such as \"redacted-{key}@redacted.invalid\"."))
}

/// Paths are compiled with the treatment; here only what is no path at all is caught, with its place.
fn paths(node: &Node<'_>, paths: Vec<String>) -> Result<Vec<String>> {
    match paths.iter().position(|path| !path.starts_with('$')) {
        None => Ok(paths),
        Some(at) => {
            let items = node.list("a list of JSON paths")?;
            Err(items[at]
                .error("is not a JSON path")
                .with_hint("Start it with $, as in $.ShippingAddress.Name."))
        }
    }
}

fn archive(node: Option<&Node<'_>>) -> Result<Archive> {
    let schema = "amazon_pii_archive";
    let Some(node) = node else {
        return Ok(Archive {
            schema: schema.to_owned(),
            foreign_table: None,
        });
    };
    let archive = node.object(ARCHIVE)?;
    Ok(Archive {
        schema: archive.text_or("schema", schema)?,
        foreign_table: archive.get("foreign_table").map(|node| foreign(&node)).transpose()?,
    })
}

fn foreign(node: &Node<'_>) -> Result<(String, String)> {
    let name = QualifiedName::parse(&node.text()?).map_err(|e| {
        node.error(e.problem).with_hint(
            e.hint
                .unwrap_or_else(|| "Write it as in SQL: cold.document.".to_owned()),
        )
    })?;
    let schema = name.schema.ok_or_else(|| {
        node.error("a foreign table's name needs its schema")
            .with_hint("Write it as in SQL: cold.document.")
    })?;
    Ok((schema, name.name))
}

fn deadline(document: &Object<'_>) -> Result<Deadline> {
    let deadline = document.word_or_default("deadline", &["wait", "spool"])?;
    let foreign = document
        .get("archive")
        .is_some_and(|node| node.value().get("foreign_table").is_some());
    match document.get("deadline") {
        Some(node) if deadline == Deadline::Spool && !foreign => Err(node
            .error("\"spool\" needs a foreign archive")
            .with_hint("An archive of this database is reached whenever its tables are; name a \"foreign_table\" in \"archive\".")),
        _ => Ok(deadline),
    }
}

fn window(node: &Node<'_>, default: Tz) -> Result<Window> {
    let window = node.object(WINDOW)?;
    let from = time(&window.need("from")?)?;
    let to = time(&window.need("to")?)?;
    if from == to {
        return Err(node
            .error("window begins when it ends")
            .with_hint("Leave the window out to work at any hour, or give it two different times."));
    }
    let timezone = window
        .get("timezone")
        .map(|node| zone(&node))
        .transpose()?
        .unwrap_or(default);
    Ok(Window { from, to, timezone })
}

fn time(node: &Node<'_>) -> Result<NaiveTime> {
    let text = node.text()?;
    // chrono takes the 60 of a leap second, which no clock of a window shows.
    let time = ["%H:%M", "%H:%M:%S"]
        .iter()
        .find_map(|form| NaiveTime::parse_from_str(&text, form).ok());
    time.filter(|_| !text.ends_with(":60")).ok_or_else(|| {
        node.error("is not a time of day")
            .with_hint("Write hours and minutes, as in \"01:00\".")
    })
}

fn zone(node: &Node<'_>) -> Result<Tz> {
    let text = node.text()?;
    text.parse().map_err(|_| {
        let names = || chrono_tz::TZ_VARIANTS.iter().map(|zone| zone.name());
        let exact = names().find(|name| name.eq_ignore_ascii_case(&text));
        let hint = match exact.or_else(|| nearest(&text, names())) {
            Some(name) => format!("Perhaps you meant \"{name}\"."),
            None => "Use a name of the time zone database, such as \"Europe/Berlin\".".to_owned(),
        };
        node.error(format!("unknown time zone \"{text}\"")).with_hint(hint)
    })
}
