//! The search path of a policy, whose schemas may have been renamed since it was applied.

use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::sql::{self, Arg, Row};

/// For each schema of a stored path: its name then, whether a schema has that name, whether it is the same one, and what
/// the same one is called now.
pub(super) fn schemas(stored: Option<&str>) -> Result<Vec<Row>> {
    match stored {
        None => Ok(Vec::new()),
        Some(stored) => sql::read(
            "SELECT s->>1, n.oid IS NOT NULL, COALESCE(n.oid = (s->>0)::oid, false), o.nspname \
             FROM pg_catalog.jsonb_array_elements($1::pg_catalog.jsonb) WITH ORDINALITY AS j (s, i) \
             LEFT JOIN pg_catalog.pg_namespace AS n ON n.nspname = s->>1 LEFT JOIN pg_catalog.pg_namespace AS o ON o.oid = (s->>0)::oid \
             ORDER BY j.i",
            &[Arg::Text(Some(stored))],
        ),
    }
}

/// The path as it is today.
///
/// # Errors
/// A schema has another name and another schema has its name: whose code that would run nobody has decided.
pub(super) fn today(path: &str, stored: Option<&str>, schemas: &[Row]) -> Result<String> {
    if stored.is_none() {
        return Ok(path.to_owned());
    }
    let mut out = Vec::new();
    for row in schemas {
        let (name, exists, is_same, now) = (row.str(0)?, row.bool(1)?, row.bool(2)?, row.text(3)?);
        match now {
            Some(now) if exists && !is_same => {
                return Err(Error::wrong_state(format!(
                    "schema \"{name}\" of the policy's search path is called \"{now}\" now, and another has its name"
                ))
                .hint("Apply the policy again with the search_path that it is to have."));
            }
            Some(now) if !exists => out.push(Ident::new(now).to_string()),
            _ => out.push(Ident::new(name).to_string()),
        }
    }
    out.push("pg_temp".to_owned());
    Ok(out.join(", "))
}
