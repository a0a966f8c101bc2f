//! What triggers did to orders, for the next cycle to announce: a trigger must not NOTIFY, which no prepared transaction
//! can. One row a statement and kind of news, whatever the number of orders.

use super::state;
use crate::pg::error::{Error, Result};
use crate::pg::identity::as_extension;
use crate::pg::sql::{self, Arg, Row};

/// How an event is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tell {
    /// By a cycle, at its commit.
    Now,
    /// By a trigger: noted, for the next cycle.
    Later,
}

/// Orders of which one payload can list the keys; of the others it has their number.
const LISTED: usize = 300;

/// Notes orders that a trigger flagged.
///
/// # Errors
/// Errors of the server.
pub fn flagged(policy: &str, orders: &[&str]) -> Result<()> {
    note(policy, "flagged", orders)
}

/// Notes what a trigger did to orders.
///
/// # Errors
/// Errors of the server.
pub fn note(policy: &str, status: &str, orders: &[impl AsRef<str>]) -> Result<()> {
    as_extension(|| {
        sql::execute(
            "INSERT INTO amazon_pii.news (policy, status, orders, order_count) VALUES ($1, $4, $2, $3)",
            &[
                Arg::Text(Some(policy)),
                Arg::texts(&orders[..orders.len().min(LISTED)]),
                Arg::Int(i64::try_from(orders.len()).unwrap_or(i64::MAX)),
                Arg::Text(Some(status)),
            ],
        )
    })?;
    Ok(())
}

/// The end of a trigger's statement that begins with `WITH changed AS (… RETURNING order_key, … AS news)` and has the
/// policy in $1. News may be NULL. Keys beyond what one payload can list are counted only.
pub const NOTE: &str = "INSERT INTO amazon_pii.news (policy, status, orders, order_count) \
    SELECT $1, n.news, (SELECT pg_catalog.array_agg(s.order_key) FROM (SELECT c.order_key FROM changed AS c \
        WHERE c.news = n.news LIMIT 300) AS s), n.order_count \
    FROM (SELECT c.news, pg_catalog.count(*) AS order_count FROM changed AS c WHERE c.news IS NOT NULL GROUP BY c.news) AS n";

/// Rows in one step.
const STEP: i64 = 1000;

/// Announces what was noted, one payload a kind of news.
///
/// # Errors
/// Errors of the server.
pub fn announce(policy: &str) -> Result<()> {
    loop {
        let rows = as_extension(|| {
            sql::write(
                "WITH told AS (DELETE FROM amazon_pii.news WHERE news_id IN (SELECT n.news_id FROM amazon_pii.news AS n \
                    WHERE n.policy = $1 ORDER BY n.news_id LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING news_id, status, orders, order_count) \
                 SELECT t.status, pg_catalog.sum(t.order_count), pg_catalog.to_json(ARRAY(SELECT k FROM told AS s, \
                    pg_catalog.unnest(s.orders) AS k WHERE s.status = t.status ORDER BY s.news_id LIMIT 300)) \
                 FROM told AS t GROUP BY t.status ORDER BY pg_catalog.min(t.news_id)",
                &[Arg::Text(Some(policy)), Arg::Int(STEP)],
            )
        })?;
        if rows.is_empty() {
            return Ok(());
        }
        for row in &rows {
            let keys: Vec<String> = serde_json::from_str(row.str(2)?)
                .map_err(|_| Error::internal("a note of orders is no list of keys"))?;
            state::announce_some(policy, row.str(0)?, &keys, row.int(1)?)?;
        }
    }
}

/// Announces news of [`Tell::Now`]: rows of key and news. Returns how many orders are newly flagged.
///
/// # Errors
/// Errors of the server.
pub fn tell(policy: &str, rows: &[Row]) -> Result<i64> {
    let mut flagged = 0;
    for status in ["flagged", "scheduled"] {
        let mut keys = Vec::new();
        for row in rows {
            if row.text(1)? == Some(status) {
                keys.push(row.string(0)?);
            }
        }
        state::announce_keys(policy, status, &keys)?;
        if status == "flagged" {
            flagged = i64::try_from(keys.len()).unwrap_or(i64::MAX);
        }
    }
    Ok(flagged)
}
