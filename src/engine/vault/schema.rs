//! Where the archive lies.

use super::place::Place;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg};

/// Creates schema and tables if they are not there; found again after DROP and CREATE EXTENSION.
///
/// # Errors
/// A schema of that name that belongs to somebody else, or that holds other tables under our names.
pub fn create(place: &Place) -> Result<()> {
    let schema = &place.schema;
    as_extension(|| {
        refuse_foreign_hands(schema)?;
        let known = sql::read(
            "SELECT true FROM pg_catalog.pg_namespace n WHERE n.nspname = $1",
            &[Arg::Text(Some(schema.bare()))],
        )?;
        match known.first() {
            Some(_) => {}
            None => {
                sql::execute(&format!("CREATE SCHEMA {schema}"), &[])?;
                sql::execute(&format!("REVOKE ALL ON SCHEMA {schema} FROM PUBLIC"), &[])?;
            }
        }
        // Keys are compared byte by byte: cheap, and the same under every locale.
        sql::execute(
            &format!(
                "CREATE TABLE IF NOT EXISTS {schema}.document (policy text COLLATE \"C\" NOT NULL, \
                 order_key text COLLATE \"C\" NOT NULL, table_name text COLLATE \"C\" NOT NULL, record_key text COLLATE \"C\" NOT NULL, version bigint NOT NULL, sealed bytea NOT NULL, \
                 key_id text NOT NULL, archived_at timestamptz NOT NULL DEFAULT pg_catalog.now(), \
                 PRIMARY KEY (order_key, policy, table_name, record_key, version))"
            ),
            &[],
        )?;
        sql::execute(
            &format!(
                "CREATE TABLE IF NOT EXISTS {schema}.data_key (policy text COLLATE \"C\" NOT NULL, \
                 order_key text COLLATE \"C\" NOT NULL, key_id text COLLATE \"C\" NOT NULL, wrapped bytea NOT NULL, master_key_id text NOT NULL, \
                 created_at timestamptz NOT NULL DEFAULT pg_catalog.now(), PRIMARY KEY (order_key, policy, key_id))"
            ),
            &[],
        )?;
        // Ciphertext does not compress; trying costs time.
        sql::execute(
            &format!("ALTER TABLE {schema}.document ALTER COLUMN sealed SET STORAGE EXTERNAL"),
            &[],
        )?;
        sql::execute(
            &format!("REVOKE ALL ON {schema}.document, {schema}.data_key FROM PUBLIC"),
            &[],
        )?;
        sql::execute(
            &format!(
                "COMMENT ON TABLE {schema}.document IS 'Sealed personal data of Amazon orders, one row a version of a record'"
            ),
            &[],
        )?;
        sql::execute(
            &format!(
                "COMMENT ON TABLE {schema}.data_key IS 'The data keys of the documents, wrapped by the master key'"
            ),
            &[],
        )?;
        if place.foreign.is_some() {
            outbox(schema)?;
        }
        Ok(())
    })
}

/// What is kept here beside a foreign table: which documents it has, and which it is to delete.
fn outbox(schema: &Ident) -> Result<()> {
    for statement in [
        format!("ALTER TABLE {schema}.document ADD COLUMN IF NOT EXISTS sent_at timestamptz"),
        format!(
            "COMMENT ON COLUMN {schema}.document.sent_at IS 'When the foreign table was found to hold the same; NULL: not that we knew'"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.doomed (policy text COLLATE \"C\" NOT NULL, order_key text COLLATE \"C\" NOT NULL, \
                table_name text COLLATE \"C\" NOT NULL DEFAULT '', record_key text COLLATE \"C\" NOT NULL DEFAULT '', key_upto bigint NOT NULL, \
                doomed_at timestamptz NOT NULL DEFAULT pg_catalog.now(), PRIMARY KEY (order_key, policy, table_name, record_key))"
        ),
        format!("REVOKE ALL ON {schema}.doomed FROM PUBLIC"),
        format!(
            "COMMENT ON TABLE {schema}.doomed IS \
                'Documents that the foreign table is still to delete: of an order, or of one record, under data keys up to a number'"
        ),
    ] {
        sql::execute(&statement, &[])?;
    }
    Ok(())
}

/// Refuses a schema, or tables under our names in it, that anybody but the extension's owner or a superuser owns: what
/// they would find there they could read, and their triggers would run as the extension's owner.
pub(super) fn refuse_foreign_hands(schema: &Ident) -> Result<()> {
    let name = schema.bare();
    if name.starts_with("pg_") || ["amazon_pii", "information_schema", "public"].contains(&name) {
        return Err(Error::invalid(format!("the archive cannot lie in schema {schema}"))
            .hint("Name a schema of its own in \"archive\"; it is created for you."));
    }
    let foreign = sql::read(
        "SELECT o.owner FROM (SELECT n.nspowner FROM pg_catalog.pg_namespace n WHERE n.nspname = $1 \
            UNION ALL SELECT c.relowner FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
            WHERE n.nspname = $1 AND c.relname IN ('document', 'data_key', 'doomed')) AS o (owner), pg_catalog.pg_extension e \
         WHERE e.extname = 'amazon_pii' AND o.owner <> e.extowner \
           AND NOT (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.oid = o.owner) LIMIT 1",
        &[Arg::Text(Some(name))],
    )?;
    if foreign.is_empty() {
        return Ok(());
    }
    Err(
        Error::privilege(format!("schema {schema} for the archive belongs to another role"))
            .hint("Name another schema in \"archive\"; it is created for you."),
    )
}
