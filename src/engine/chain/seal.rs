//! The sealer: links entries that are committed and have no link yet.

use super::end::{Found, Head};
use super::{PAGE, PAGE_BYTES, bytes, link_code, lock, policy_of, waiting};
use crate::domain::vault::MasterKeys;
use crate::engine::audit::{self, AuditEntry, COLUMNS, Stored, WIDTH};
use crate::pg::error::{Error, Result};
use crate::pg::identity::on_keys;
use crate::pg::sql::{self, Arg, Row};
use crate::pg::subxact::subtransaction;

/// What a step did.
#[derive(Default)]
pub struct Sealed {
    /// There is more to link.
    pub more: bool,
    /// Chains that could not be sealed.
    pub troubles: Vec<(String, Error)>,
}

/// Links the next entries of each chain, if nobody else is at it: then they are in good hands. In a transaction of its own, for
/// the lock is given back with it.
///
/// # Errors
/// A cancel; errors of the server.
pub fn step(keys: &MasterKeys) -> Result<Sealed> {
    let mut sealed = Sealed::default();
    if !lock()?.try_take()? {
        return Ok(sealed);
    }
    for chain in waiting()?.0 {
        match subtransaction(|| one(keys, &chain)) {
            Err(e) if e.is_cancel() => return Err(e),
            Err(e) => sealed.troubles.push((chain, e)),
            Ok(more) => sealed.more |= more,
        }
    }
    Ok(sealed)
}

/// Links the next entries of a chain. Whether there are more.
fn one(keys: &MasterKeys, chain: &str) -> Result<bool> {
    let head = match Head::find(keys, chain)? {
        Found::Sound(head) => head,
        Found::NoKey(id, _) => {
            return Err(Error::no_key(format!(
                "the audit log of policy \"{chain}\" ends with a code of master key {id}, which is not configured"
            )));
        }
        Found::Missing => begin(keys, chain, "missing")?,
        Found::Changed => begin(keys, chain, "changed")?,
    };
    let rows = pending(chain)?;
    let (mut position, mut code) = (head.position, head.code);
    let (mut positions, mut ids, mut codes, mut seen) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in &rows {
        let audit_id = row.int(WIDTH)?;
        seen.push(audit_id);
        // It has its link: the note came with a dump, or was made up.
        if row.bool(WIDTH + 1)? {
            continue;
        }
        position += 1;
        code = link_code(
            keys.current(),
            chain,
            position,
            audit_id,
            &code,
            Stored::read(row)?.as_ref(),
        )
        .to_vec();
        positions.push(position);
        ids.push(audit_id);
        codes.push(code.clone());
    }
    if !positions.is_empty() {
        on_keys(|| {
            sql::execute(
                "INSERT INTO amazon_pii.audit_link (chain, position, audit_id, key_id, code) SELECT $1, n.position, n.audit_id, $2, n.code \
                 FROM ROWS FROM (pg_catalog.unnest($3), pg_catalog.unnest($4), pg_catalog.unnest($5)) AS n (position, audit_id, code)",
                &[
                    Arg::Text(Some(chain)),
                    Arg::Text(Some(keys.current().id())),
                    Arg::Ints(positions),
                    Arg::Ints(ids),
                    Arg::ByteArrays(codes.iter().map(Vec::as_slice).collect()),
                ],
            )
        })?;
        Head::write(keys, chain, position, code)?;
    }
    let more = !seen.is_empty();
    on_keys(|| {
        sql::execute(
            "DELETE FROM amazon_pii.audit_pending WHERE chain = $1 AND audit_id = ANY ($2)",
            &[Arg::Text(Some(chain)), Arg::Ints(seen)],
        )
    })?;
    Ok(more)
}

/// The next entries of a chain that are noted as pending, each with whether it has a link; without the columns of an entry where
/// it is gone.
fn pending(chain: &str) -> Result<Vec<Row>> {
    on_keys(|| {
        sql::read(
            &format!(
                // ident-ok: names of our own columns
                "SELECT {COLUMNS}, s.noted, EXISTS (SELECT FROM amazon_pii.audit_link AS l WHERE l.audit_id = s.noted) \
                 FROM (SELECT p.audit_id AS noted, \
                        pg_catalog.sum(COALESCE(pg_catalog.octet_length(a.lines), 0)) OVER (ORDER BY p.audit_id) \
                            - COALESCE(pg_catalog.octet_length(a.lines), 0) AS before \
                    FROM (SELECT * FROM amazon_pii.audit_pending AS q WHERE q.chain = $1 ORDER BY q.audit_id LIMIT $2) AS p \
                    LEFT JOIN amazon_pii.audit_entry AS a ON a.audit_id = p.audit_id) AS s \
                 LEFT JOIN amazon_pii.audit_entry AS e ON e.audit_id = s.noted WHERE s.before < $3 ORDER BY s.noted"
            ),
            &[Arg::Text(Some(chain)), Arg::Int(PAGE), Arg::Int(PAGE_BYTES)],
        )
    })
}

/// A head for a chain that has no sound one. Where nothing was linked before, all of its entries are: they come from a version
/// that knew no chains. Otherwise somebody has tampered with it: it goes on, and says so for ever.
fn begin(keys: &MasterKeys, chain: &str, what: &str) -> Result<Head> {
    let place = [Arg::Text(Some(chain))];
    let (last, checkpoint) = on_keys(|| {
        Ok((
            sql::read(
                "SELECT l.position, pg_catalog.encode(l.code, 'hex') FROM amazon_pii.audit_link AS l WHERE l.chain = $1 \
                 ORDER BY l.position DESC LIMIT 1",
                &place,
            )?,
            sql::read(
                "SELECT c.position, pg_catalog.encode(c.code, 'hex') FROM amazon_pii.audit_checkpoint AS c WHERE c.chain = $1",
                &place,
            )?,
        ))
    })?;
    let Some(end) = last.first().or(checkpoint.first()) else {
        let all = if chain.is_empty() {
            "INSERT INTO amazon_pii.audit_pending (chain, audit_id) SELECT $1, e.audit_id FROM amazon_pii.audit_entry AS e \
             WHERE e.policy IS NULL ON CONFLICT DO NOTHING"
        } else {
            "INSERT INTO amazon_pii.audit_pending (chain, audit_id) SELECT $1, e.audit_id FROM amazon_pii.audit_entry AS e \
             WHERE e.policy = $1 ON CONFLICT DO NOTHING"
        };
        on_keys(|| sql::execute(all, &place))?;
        let head = Head::write(keys, chain, 0, Vec::new())?;
        if what == "changed" {
            tell(keys, chain, what, 0)?;
        }
        return Ok(head);
    };
    let position = end.int(0)?;
    let head = Head::write(keys, chain, position, bytes(end, 1)?)?;
    tell(keys, chain, what, position)?;
    Ok(head)
}

fn tell(keys: &MasterKeys, chain: &str, what: &str, position: i64) -> Result<()> {
    audit::insert_under(
        Some(keys),
        &[AuditEntry {
            policy: policy_of(chain),
            detail: Some(format!("the head was {what}; the chain goes on after link {position}")),
            ..AuditEntry::new(super::verify::BROKEN)?
        }],
    )
}
