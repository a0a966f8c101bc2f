//! Holds: an order keeps its personal data, or what was redacted keeps its archive, until a moment in the future.

use super::{Order, Target, change};
use crate::engine::orphan;
use crate::pg::error::{Error, Result};
use crate::pg::identity::{as_extension, require_role};
use crate::pg::sql::{self, Arg};

/// Whether there is nothing left but the archive, over `o`.
const ARCHIVE_ONLY: &str = "o.status IN ('redacted', 'gone')";

/// Since when an order is held without a break, over `o`.
const HELD_SINCE: &str = "COALESCE(CASE WHEN o.held_until > pg_catalog.now() THEN o.held_since END, pg_catalog.now())";

/// Since when its archive is. A hold that was on the order when its row was deleted goes on.
const ARCHIVE_HELD_SINCE: &str = "COALESCE(CASE WHEN o.archive_held_until > pg_catalog.now() THEN o.archive_held_since \
     WHEN o.held_until > pg_catalog.now() THEN o.held_since END, pg_catalog.now())";

/// Whether a hold until $3 is longer than 30 days, or keeps an order for so long past its date. The same before the statement that
/// writes it and after: then its beginning is the one that was written.
fn held_long() -> String {
    // ident-ok: made of constants.
    format!(
        "(CASE WHEN {ARCHIVE_ONLY} THEN $3::timestamptz > {ARCHIVE_HELD_SINCE} + '30 days'::interval \
            ELSE COALESCE($3::timestamptz > {HELD_SINCE} + '30 days'::interval OR $3::timestamptz > o.redact_due_at + '30 days'::interval, false) END)"
    )
}

/// Pauses redaction until a moment in the future; of an order that is redacted, or was deleted, keeps the archive until then.
///
/// # Errors
/// Unknown, ambiguous, nothing left to hold, a moment that is past, bad reason.
pub fn hold(target: &Target<'_>, reason: Option<&str>, until: &str) -> Result<()> {
    require_role(&["amazon_pii_operator"], "hold an order")?;
    let future = as_extension(|| {
        let rows = sql::read(
            "SELECT $1::timestamptz > pg_catalog.now() AND pg_catalog.isfinite($1::timestamptz)",
            &[Arg::Text(Some(until))],
        )?;
        rows.first().ok_or_else(|| Error::internal("no row"))?.bool(0)
    })?;
    let why = reason.map(str::trim).filter(|r| !r.is_empty());
    if !future {
        return Err(Error::invalid("the end of a hold must lie in the future")
            .hint("Give a time after now; amazon_pii.release() ends a hold."));
    }
    change(
        target,
        Some(reason),
        "hold",
        |order: &Order| order.status != "purged" && !order.ending,
        (
            "holds no personal data any more, or is to be redacted at once",
            "What is purged cannot be held, and nothing that is to be erased or forgotten.",
        ),
        |plan, orders| {
            let held_long = held_long();
            let long = as_extension(|| {
                sql::write(
                    // ident-ok: made of constants.
                    &format!(
                        "UPDATE amazon_pii.order_state o SET \
                            held_until = CASE WHEN {ARCHIVE_ONLY} THEN held_until ELSE $3::timestamptz END, \
                            held_since = CASE WHEN {ARCHIVE_ONLY} THEN held_since ELSE {HELD_SINCE} END, \
                            hold_reason = CASE WHEN {ARCHIVE_ONLY} THEN hold_reason WHEN {held_long} THEN $4 END, \
                            archive_held_until = CASE WHEN {ARCHIVE_ONLY} THEN $3::timestamptz ELSE archive_held_until END, \
                            archive_held_since = CASE WHEN {ARCHIVE_ONLY} THEN {ARCHIVE_HELD_SINCE} ELSE archive_held_since END, \
                            archive_hold_reason = CASE WHEN NOT {ARCHIVE_ONLY} THEN archive_hold_reason WHEN {held_long} THEN $4 END, \
                            next_due_at = CASE WHEN archived_at IS NULL OR {ARCHIVE_ONLY} THEN next_due_at \
                                ELSE GREATEST(next_due_at, $3::timestamptz) END \
                         WHERE policy = $1 AND order_key = ANY ($2) RETURNING {held_long}"
                    ),
                    &[
                        Arg::Text(Some(&plan.policy)),
                        Arg::texts(orders),
                        Arg::Text(Some(until)),
                        Arg::Text(why),
                    ],
                )
            })?;
            let is_long = long.iter().map(|r| r.bool(0)).collect::<Result<Vec<_>>>()?;
            if why.is_none() && is_long.contains(&true) {
                return Err(Error::invalid("a hold of more than 30 days needs a reason")
                    .hint("Say in a few words why; status shows it while the hold lasts."));
            }
            Ok(())
        },
    )
}

/// Ends a hold, of the order and of its archive.
///
/// # Errors
/// Unknown, ambiguous, not held, or no longer.
pub fn release(target: &Target<'_>) -> Result<()> {
    require_role(&["amazon_pii_operator"], "release an order")?;
    change(
        target,
        None,
        "release",
        |order| order.held || order.archive_held,
        ("is not held", "amazon_pii.explain_order() shows where it stands."),
        |plan, orders| {
            as_extension(|| {
                sql::execute(
                    // ident-ok: made of constants.
                    &format!(
                        "UPDATE amazon_pii.order_state o SET held_until = NULL, held_since = NULL, hold_reason = NULL, \
                            archive_held_until = NULL, archive_held_since = NULL, archive_hold_reason = NULL, \
                            next_due_at = CASE WHEN {ARCHIVE_ONLY} OR held_until IS NULL THEN next_due_at \
                                WHEN retrieved_until IS NOT NULL THEN retrieved_until \
                                WHEN archived_at IS NOT NULL THEN redact_due_at ELSE archive_due_at END \
                         WHERE policy = $1 AND order_key = ANY ($2)"
                    ),
                    &[Arg::Text(Some(&plan.policy)), Arg::texts(orders)],
                )
            })?;
            orphan::hurry(plan, orders)?;
            crate::worker::wake();
            Ok(())
        },
    )
}
