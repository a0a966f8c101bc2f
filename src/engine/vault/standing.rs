//! How the archives behind foreign tables stand.

use pgrx::datum::TimestampWithTimeZone;

use super::cold::on;
use super::place::{Foreign, Place};
use crate::domain::policy::Policy;
use crate::pg::error::{Error, Result};
use crate::pg::ident::Ident;
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg, Row};
use crate::pg::xact;

/// Whether a foreign table holds a document of a policy.
///
/// # Errors
/// It cannot be read.
pub fn holds_any(foreign: &Foreign, policy: &str) -> Result<bool> {
    let rows = on(foreign, || {
        sql::read(
            &format!("SELECT d.version FROM {foreign} d WHERE d.policy = $1 LIMIT 1"),
            &[Arg::Text(Some(policy))],
        )
    })?;
    Ok(!rows.is_empty())
}

/// One policy's archive.
pub struct Standing {
    pub policy: String,
    pub foreign_table: String,
    /// As in the policy: wait or spool.
    pub deadline: &'static str,
    /// Documents that are here and not known to be there, and since when.
    pub unsent: i64,
    pub unsent_since: Option<TimestampWithTimeZone>,
    /// Orders and records that are to be deleted there.
    pub to_delete: i64,
    /// Orders that are to come back by themselves when it answers, and since when.
    pub to_retrieve: i64,
    pub to_retrieve_since: Option<TimestampWithTimeZone>,
    /// When a cycle used it last.
    pub up_at: Option<TimestampWithTimeZone>,
    /// Since when it does not answer, and why.
    pub down_since: Option<TimestampWithTimeZone>,
    pub last_error: Option<String>,
}

/// Of all policies with a foreign archive.
///
/// # Errors
/// Errors of the server.
pub fn standing() -> Result<Vec<Standing>> {
    let policies = as_extension(|| {
        sql::read(
            "SELECT p.policy, p.document FROM amazon_pii.policy p ORDER BY p.policy",
            &[],
        )
    })?;
    let mut out = Vec::new();
    for row in &policies {
        let Ok(document) = Policy::parse(row.str(1)?) else {
            continue;
        };
        let place = Place::of(&document);
        let Some(foreign) = &place.foreign else { continue };
        let schema: &Ident = &place.schema;
        let rows = as_extension(|| {
            sql::read(
                &format!(
                    "SELECT d.n, {}, (SELECT pg_catalog.count(*) FROM {schema}.doomed x WHERE x.policy = $1), {}, {}, c.last_error, r.n, {} \
                     FROM (SELECT pg_catalog.count(*), pg_catalog.min(t.archived_at) FROM {schema}.document t \
                        WHERE t.policy = $1 AND t.sent_at IS NULL) AS d (n, since) \
                     CROSS JOIN (SELECT pg_catalog.count(DISTINCT q.order_key), pg_catalog.min(q.queued_at) FROM amazon_pii.retrieval_queue q \
                        WHERE q.policy = $1) AS r (n, since) LEFT JOIN amazon_pii.cold_server c ON c.policy = $1",
                    micros("d.since"),
                    micros("c.up_at"),
                    micros("c.down_since"),
                    micros("r.since")
                ),
                &[Arg::Text(row.text(0)?)],
            )
        })?;
        for rest in rows {
            out.push(Standing {
                policy: row.string(0)?,
                foreign_table: foreign.shown(),
                deadline: if place.spool { "spool" } else { "wait" },
                unsent: rest.int(0)?,
                unsent_since: time(&rest, 1)?,
                to_delete: rest.int(2)?,
                up_at: time(&rest, 3)?,
                down_since: time(&rest, 4)?,
                last_error: rest.owned(5)?,
                to_retrieve: rest.int(6)?,
                to_retrieve_since: time(&rest, 7)?,
            });
        }
    }
    Ok(out)
}

/// A time as a number that travels exactly.
fn micros(column: &str) -> String {
    // ident-ok: a column of ours.
    format!("(EXTRACT(epoch FROM {column}) * 1000000)::bigint")
}

fn time(row: &Row, at: usize) -> Result<Option<TimestampWithTimeZone>> {
    let micros = row.text(at)?.map(str::parse::<i64>).transpose();
    let micros = micros.map_err(|_| Error::internal("a time is no number"))?;
    micros.map(xact::to_server).transpose()
}
