//! Where an archive lies: in a schema of this database, or behind a foreign table on a cold server. Data keys are here in both
//! cases, so that neither server alone can open anything.

use std::fmt;

use crate::domain::policy::{Deadline, Policy};
use crate::pg::error::{Error, Result};
use crate::pg::ident::{Ident, Relation};
use crate::pg::sql::{self, Arg};

/// The place of a policy's archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Data keys, and documents: all of them, or those that the foreign table does not hold for certain.
    pub schema: Ident,
    pub foreign: Option<Foreign>,
    /// What is due is overwritten although the foreign table does not answer.
    pub spool: bool,
}

impl Place {
    /// Of a policy.
    pub fn of(policy: &Policy) -> Self {
        Self {
            schema: Ident::new(policy.archive.schema.clone()),
            foreign: policy.archive.foreign_table.as_ref().map(|(schema, name)| Foreign {
                schema: Ident::new(schema.clone()),
                name: Ident::new(name.clone()),
            }),
            spool: policy.deadline == Deadline::Spool,
        }
    }
}

/// A foreign table; `Display` quotes its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    pub schema: Ident,
    pub name: Ident,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// What is wrong with a foreign table that is to hold documents; nothing of it depends on the server behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    Missing,
    NotForeign,
    /// Table, schema or server belong to a role that could lead documents elsewhere.
    ForeignHands,
    /// Triggers, constraints or defaults of its own: code that would run with the extension owner's rights.
    OwnCode,
}

impl Flaw {
    /// As part of a sentence on the table.
    pub fn words(self) -> &'static str {
        match self {
            Self::Missing => "does not exist",
            Self::NotForeign => "is no foreign table",
            Self::ForeignHands => {
                "lies in a schema, or on a foreign server, of a role that is neither the extension's owner nor a superuser, or belongs to one"
            }
            Self::OwnCode => "has triggers, constraints, or expressions of its own",
        }
    }
}

impl Foreign {
    /// As people write it.
    pub fn shown(&self) -> String {
        let relation = Relation {
            oid: pgrx::pg_sys::InvalidOid,
            schema: self.schema.clone(),
            name: self.name.clone(),
        };
        relation.shown()
    }

    /// What makes it unfit to hold documents, if anything does. Looked at before each use: whoever made it may have been replaced.
    ///
    /// # Errors
    /// Errors of the server.
    pub fn flaw(&self) -> Result<Option<Flaw>> {
        let rows = sql::read(
            "SELECT c.relkind = 'f', \
                EXISTS (SELECT FROM pg_catalog.pg_roles r, pg_catalog.pg_extension e WHERE e.extname = 'amazon_pii' \
                    AND r.oid IN (c.relowner, n.nspowner, s.srvowner) AND r.oid <> e.extowner AND NOT r.rolsuper), \
                EXISTS (SELECT FROM pg_catalog.pg_trigger t WHERE t.tgrelid = c.oid) \
                    OR EXISTS (SELECT FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'c') \
                    OR EXISTS (SELECT FROM pg_catalog.pg_attrdef d WHERE d.adrelid = c.oid) \
                    OR EXISTS (SELECT FROM pg_catalog.pg_inherits i WHERE c.oid IN (i.inhparent, i.inhrelid)) \
             FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
                LEFT JOIN pg_catalog.pg_foreign_table f ON f.ftrelid = c.oid LEFT JOIN pg_catalog.pg_foreign_server s ON s.oid = f.ftserver \
             WHERE n.nspname = $1 AND c.relname = $2",
            &[Arg::Text(Some(self.schema.bare())), Arg::Text(Some(self.name.bare()))],
        )?;
        let Some(row) = rows.first() else {
            return Ok(Some(Flaw::Missing));
        };
        Ok(if !row.bool(0)? {
            Some(Flaw::NotForeign)
        } else if row.bool(1)? {
            Some(Flaw::ForeignHands)
        } else if row.bool(2)? {
            Some(Flaw::OwnCode)
        } else {
            None
        })
    }

    /// Refuses one that is unfit.
    pub(super) fn refuse_unfit(&self) -> Result<()> {
        match self.flaw()? {
            None => Ok(()),
            Some(flaw) => Err(Error::unreachable(&self.shown(), &format!("it {}", flaw.words()))),
        }
    }
}
