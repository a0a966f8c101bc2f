//! Whether a foreign table can hold an archive: what the catalog says of it, and a document that is written there, read back and
//! rolled back.

use pgrx::pg_sys;

use super::{Problem, Severity};
use crate::domain::policy::QualifiedName;
use crate::engine::vault::{self, Foreign, Place};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};
use crate::pg::subxact::{subtransaction, trial};

/// The columns of a document, in their order.
const COLUMNS: &[(&str, &str)] = &[
    ("policy", "text"),
    ("order_key", "text"),
    ("table_name", "text"),
    ("record_key", "text"),
    ("version", "bigint"),
    ("sealed", "bytea"),
    ("key_id", "text"),
    ("archived_at", "timestamp with time zone"),
];

/// Settings of a connection without which a server that has vanished keeps us waiting longer than we want.
const PATIENCE: &[&str] = &["connect_timeout", "tcp_user_timeout", "keepalives_idle"];

/// A foreign table by its name as in SQL.
///
/// # Errors
/// It is no name with a schema.
pub fn named(table: &str) -> Result<Foreign> {
    let parsed = QualifiedName::parse(table).map_err(|e| Error::invalid(e.to_string()))?;
    let schema = parsed.schema.ok_or_else(|| {
        Error::invalid("a foreign table's name needs its schema").hint("Write it as in SQL: cold.document.")
    })?;
    Ok(Foreign {
        schema: Ident::new(schema),
        name: Ident::new(parsed.name),
    })
}

/// What keeps a foreign table from holding an archive, or makes it a bad one. Connects to its server.
///
/// # Errors
/// A cancel; errors of the server that are not the table's.
pub fn problems(foreign: &Foreign) -> Result<Vec<Problem>> {
    let mut out = Vec::new();
    let shown = foreign.shown();
    if let Some(flaw) = as_extension(|| foreign.flaw())? {
        let hint =
            "amazon_pii.archive_ddl() prints what makes a right one; a superuser, or the extension's owner, runs it.";
        out.push(Problem::new(Severity::Error, &shown, flaw.words(), hint));
        return Ok(out);
    }
    columns(foreign, &mut out)?;
    connection(foreign, &mut out)?;
    if out.iter().any(|p| p.severity == Severity::Error) {
        return Ok(out);
    }
    match vault::in_time(foreign, || trial(|| write_and_read(foreign))) {
        Ok(Written {
            same: true,
            twice: false,
        }) => {}
        Ok(Written { same: false, .. }) => out.push(Problem::new(
            Severity::Error,
            &shown,
            "gives back something else than was written",
            "Its columns need the types that amazon_pii.archive_ddl() gives them, on both servers.",
        )),
        Ok(Written { twice: true, .. }) => out.push(Problem::new(
            Severity::Warning,
            &shown,
            "takes the same document twice",
            "Give the table on the cold server the primary key that amazon_pii.archive_ddl() shows.",
        )),
        Err(e) if e.is_cancel() => return Err(e),
        Err(e) => out.push(Problem::of(&vault::error(foreign, e).at(&shown))),
    }
    Ok(out)
}

fn columns(foreign: &Foreign, out: &mut Vec<Problem>) -> Result<()> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT a.attname, pg_catalog.format_type(a.atttypid, NULL) FROM pg_catalog.pg_attribute a \
                JOIN pg_catalog.pg_class c ON c.oid = a.attrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped",
            &[
                Arg::Text(Some(foreign.schema.bare())),
                Arg::Text(Some(foreign.name.bare())),
            ],
        )
    })?;
    for (name, wanted) in COLUMNS {
        let mut found = None;
        for row in &rows {
            if row.str(0)? == *name {
                found = row.owned(1)?;
            }
        }
        if found.as_deref() != Some(wanted) {
            let problem = match found {
                None => format!("has no column \"{name}\""),
                Some(found) => format!("column \"{name}\" has type {found}"),
            };
            out.push(Problem::new(
                Severity::Error,
                foreign.shown(),
                problem,
                format!("It needs \"{name}\" of type {wanted}; amazon_pii.archive_ddl() prints the whole table."),
            ));
        }
    }
    Ok(())
}

/// The user mapping, and, where postgres_fdw makes the connection, its options.
fn connection(foreign: &Foreign, out: &mut Vec<Problem>) -> Result<()> {
    let rows = as_extension(|| {
        sql::read(
            "SELECT w.fdwname = 'postgres_fdw', s.srvname, \
                (SELECT pg_catalog.max(CASE WHEN m.umuser = e.extowner THEN 2 ELSE 1 END) FROM pg_catalog.pg_user_mappings m \
                    WHERE m.srvid = s.oid AND m.umuser IN (0, e.extowner)), \
                o.k, o.v, pg_catalog.pg_get_userbyid(e.extowner) \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                JOIN pg_catalog.pg_foreign_table f ON f.ftrelid = c.oid JOIN pg_catalog.pg_foreign_server s ON s.oid = f.ftserver \
                JOIN pg_catalog.pg_foreign_data_wrapper w ON w.oid = s.srvfdw JOIN pg_catalog.pg_extension e ON e.extname = 'amazon_pii' \
                LEFT JOIN LATERAL (SELECT x.option_name, x.option_value FROM pg_catalog.pg_options_to_table(s.srvoptions) AS x \
                    UNION ALL SELECT y.option_name, y.option_value FROM pg_catalog.pg_options_to_table(f.ftoptions) AS y) AS o (k, v) ON true \
             WHERE n.nspname = $1 AND c.relname = $2",
            &[
                Arg::Text(Some(foreign.schema.bare())),
                Arg::Text(Some(foreign.name.bare())),
            ],
        )
    })?;
    let first = rows.first().ok_or_else(|| Error::internal("no row"))?;
    let (postgres, server, owner) = (first.bool(0)?, first.string(1)?, first.string(5)?);
    let place = format!("server \"{server}\"");
    let warn = |problem: &str, hint: String| Problem::new(Severity::Warning, place.as_str(), problem, hint);
    match first.text(2)? {
        Some("2") => {}
        Some(_) => out.push(warn(
            "has a user mapping for everybody",
            format!(
                "Make one for \"{owner}\" alone, the extension's owner: whoever may use the server reaches the archive."
            ),
        )),
        None if postgres => out.push(Problem::new(
            Severity::Error,
            place.as_str(),
            format!("has no user mapping for \"{owner}\""),
            "The archive is written by the extension's owner; amazon_pii.archive_ddl() prints the statement.",
        )),
        None => {}
    }
    if !postgres {
        return Ok(());
    }
    let mut options: Vec<(&str, &str)> = Vec::new();
    for row in &rows {
        if let (Some(name), Some(value)) = (row.text(3)?, row.text(4)?) {
            options.push((name, value));
        }
    }
    // Of the table after those of the server, which they go before.
    let option = |name: &str| options.iter().rev().find(|(k, _)| *k == name).map(|(_, v)| *v);
    let is_remote = option("host").is_some_and(|h| !h.starts_with('/')) || option("hostaddr").is_some();
    if is_remote && option("sslmode") != Some("verify-full") {
        out.push(warn(
            "does not verify whom it talks to",
            "Set sslmode 'verify-full' and sslrootcert.".to_owned(),
        ));
    }
    let missing: Vec<&str> = PATIENCE.iter().copied().filter(|name| option(name).is_none()).collect();
    if is_remote && !missing.is_empty() {
        out.push(warn(
            "may keep a cycle waiting when it vanishes from the network",
            format!("Set {}.", missing.join(", ")),
        ));
    }
    let batch = option("batch_size").and_then(|b| b.parse::<i64>().ok()).unwrap_or(1);
    if batch < 100 {
        out.push(warn(
            "takes documents one by one",
            "Set batch_size '1000' on the server or on the table.".to_owned(),
        ));
    }
    Ok(())
}

/// What became of a document that was tried.
struct Written {
    same: bool,
    twice: bool,
}

fn write_and_read(foreign: &Foreign) -> Result<Written> {
    // No float, no text, holds all of it.
    const VERSION: i64 = 9_007_199_254_740_993;
    const AT: &str = "2020-02-29 12:34:56.789012+00";
    let sealed: Vec<u8> = (0..=u8::MAX).collect();
    let place = ["amazon_pii check", "[\"Ω ' \\\" %\"]", "a.b", "[\"1\"]", "1"];
    let args = [
        Arg::Text(Some(place[0])),
        Arg::Text(Some(place[1])),
        Arg::Text(Some(place[2])),
        Arg::Text(Some(place[3])),
        Arg::Int(VERSION),
        Arg::ByteArrays(vec![&sealed]),
        Arg::Text(Some(place[4])),
        Arg::Typed(pg_sys::TIMESTAMPTZOID, Some(AT)),
    ];
    let insert = format!(
        "INSERT INTO {foreign} (policy, order_key, table_name, record_key, version, sealed, key_id, archived_at) \
         SELECT $1, $2, $3, $4, $5, s, $7, $8 FROM pg_catalog.unnest($6) AS n (s)"
    );
    as_extension(|| {
        sql::execute(&insert, &args)?;
        let rows = sql::write_bytes(
            &format!(
                "SELECT d.table_name, d.record_key, d.version, d.sealed, d.key_id, d.archived_at::text FROM {foreign} d \
                 WHERE d.policy = $1 AND d.order_key = ANY ($2)"
            ),
            &[Arg::Text(Some(place[0])), Arg::texts(&[place[1]])],
        )?;
        let same = match rows.as_slice() {
            [row] => {
                row.str(0)? == place[2]
                    && row.str(1)? == place[3]
                    && row.int(2)? == VERSION
                    && row.bytes(3)? == sealed.as_slice()
                    && row.str(4)? == place[4]
                    && row.str(5)? == AT
            }
            _ => false,
        };
        let twice = match subtransaction(|| sql::execute(&insert, &args)) {
            Ok(_) => true,
            Err(e) if e.is_duplicate() => false,
            Err(e) => return Err(e),
        };
        sql::execute(
            &format!("DELETE FROM {foreign} d WHERE d.policy = $1 AND d.order_key = ANY ($2) AND d.key_id = ANY ($3)"),
            &[
                Arg::Text(Some(place[0])),
                Arg::texts(&[place[1]]),
                Arg::texts(&[place[4]]),
            ],
        )?;
        Ok(Written { same, twice })
    })
}

/// What keeps a policy from leaving the place where its documents are: some are still there, or it cannot be told.
///
/// # Errors
/// As [`problems`].
pub fn left_behind(policy: &str, former: &Place, place: &Place) -> Result<Option<Problem>> {
    let Some(foreign) = former.foreign.as_ref().filter(|f| place.foreign.as_ref() != Some(*f)) else {
        return Ok(None);
    };
    let hint = "Copy the policy's rows to the new place, columns as they are, and delete them from the old one; then apply the policy again.";
    let problem = |words: String| Some(Problem::new(Severity::Error, foreign.shown(), words, hint));
    if as_extension(|| foreign.flaw())?.is_some() {
        // The table is gone: nothing can be copied from it, and the policy must go on.
        return Ok(None);
    }
    match vault::holds_any(foreign, policy) {
        Ok(false) => Ok(None),
        Ok(true) => Ok(problem(format!("still holds documents of policy \"{policy}\""))),
        Err(e) if e.is_cancel() => Err(e),
        Err(e) => Ok(problem(format!(
            "may still hold documents of policy \"{policy}\": {}",
            e.stored()
        ))),
    }
}

/// What a foreign archive is made with.
pub struct Wanted<'a> {
    pub table: &'a str,
    pub server: &'a str,
    pub host: &'a str,
    pub database: &'a str,
    pub role: &'a str,
}

/// The statements that make a foreign archive: (where to run it, statement).
///
/// # Errors
/// A name that is none; errors of the server.
pub fn ddl(wanted: &Wanted<'_>) -> Result<Vec<(&'static str, String)>> {
    const THERE: &str = "cold server";
    const HERE: &str = "here";
    let foreign = named(wanted.table)?;
    let (server, role) = (Ident::new(wanted.server), Ident::new(wanted.role));
    let texts = as_extension(|| {
        sql::read(
            "SELECT pg_catalog.quote_literal($1), pg_catalog.quote_literal($2), pg_catalog.quote_literal($3), \
                pg_catalog.quote_literal($4), pg_catalog.quote_literal($5), pg_catalog.pg_get_userbyid(e.extowner) \
             FROM pg_catalog.pg_extension e WHERE e.extname = 'amazon_pii'",
            &[
                Arg::Text(Some(wanted.host)),
                Arg::Text(Some(wanted.database)),
                Arg::Text(Some(wanted.role)),
                Arg::Text(Some(foreign.schema.bare())),
                Arg::Text(Some(foreign.name.bare())),
            ],
        )
    })?;
    let row = texts.first().ok_or_else(|| Error::internal("no row"))?;
    let (host, database, user) = (row.str(0)?, row.str(1)?, row.str(2)?);
    let (schema_text, name_text) = (row.str(3)?, row.str(4)?);
    let owner = Ident::new(row.str(5)?);
    let Foreign { schema, name } = &foreign;
    let columns = |key: &str| {
        let mut lines: Vec<String> = COLUMNS
            .iter()
            .map(|(column, kind)| {
                let collate = if *kind == "text" { " COLLATE \"C\"" } else { "" };
                format!("    {column} {kind}{collate} NOT NULL")
            })
            .collect();
        lines.extend((!key.is_empty()).then(|| format!("    {key}")));
        lines.join(",\n")
    };
    let there = columns("PRIMARY KEY (order_key, policy, table_name, record_key, version)");
    let here = columns("");
    Ok(vec![
        (THERE, format!("CREATE ROLE {role} LOGIN PASSWORD '…';")),
        // What it has committed must survive a crash there: we give up our own copy.
        (THERE, format!("ALTER ROLE {role} SET synchronous_commit = on;")),
        (THERE, format!("CREATE SCHEMA {schema};")),
        (THERE, format!("CREATE TABLE {foreign} (\n{there}\n);")),
        (
            THERE,
            format!("ALTER TABLE {foreign} ALTER COLUMN sealed SET STORAGE EXTERNAL;"),
        ),
        (THERE, format!("REVOKE ALL ON SCHEMA {schema} FROM PUBLIC;")),
        (THERE, format!("GRANT USAGE ON SCHEMA {schema} TO {role};")),
        (THERE, format!("GRANT SELECT, INSERT, DELETE ON {foreign} TO {role};")),
        (HERE, "CREATE EXTENSION IF NOT EXISTS postgres_fdw;".to_owned()),
        (
            HERE,
            format!(
                "CREATE SERVER {server} FOREIGN DATA WRAPPER postgres_fdw OPTIONS (\n    host {host}, dbname {database},\n    \
                 sslmode 'verify-full', sslrootcert '/etc/ssl/certs/ca-certificates.crt',\n    \
                 connect_timeout '10', tcp_user_timeout '15000', keepalives_idle '5', keepalives_interval '5', keepalives_count '2',\n    \
                 batch_size '1000', fetch_size '10000'\n);"
            ),
        ),
        (
            HERE,
            format!("CREATE USER MAPPING FOR {owner} SERVER {server} OPTIONS (user {user}, password '…');"),
        ),
        (HERE, format!("CREATE SCHEMA IF NOT EXISTS {schema};")),
        (HERE, format!("REVOKE ALL ON SCHEMA {schema} FROM PUBLIC;")),
        (
            HERE,
            format!(
                "CREATE FOREIGN TABLE {schema}.{name} (\n{here}\n) SERVER {server} OPTIONS (schema_name {schema_text}, table_name {name_text});"
            ),
        ),
    ])
}
