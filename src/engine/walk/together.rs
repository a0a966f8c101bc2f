//! Few rows of many partitions. An index of a partitioned table has a tree for each partition, and where the links do not tell
//! partitions apart each input is looked up in all of them: in one pass a partition that costs half of what it does input by
//! input.

use std::collections::HashMap;

use pgrx::pg_sys;

use super::{Found, Hop, Values};
use crate::engine::plan::Plan;
use crate::pg::catalog::{self, Compare};
use crate::pg::error::{Error, Result};
use crate::pg::ident::Expr;
use crate::pg::identity::{Identity, act_as};
use crate::pg::prepared::{self, FIRST_FEW_FOR_A_WHILE};
use crate::pg::sql::{Arg, Row};

/// Rows that are read at most; where there are more, inputs are asked one by one, each for its first few.
const MOST: usize = 5000;

/// Whether inputs can be told apart again by the text of what was found, and whether that pays.
pub(super) fn pays(hop: &Hop<'_>, inputs: usize) -> bool {
    let exact = |oid: &pg_sys::Oid| {
        matches!(
            *oid,
            pg_sys::INT2OID | pg_sys::INT4OID | pg_sys::INT8OID | pg_sys::UUIDOID
        )
    };
    let single = hop.on.len() == 1 && hop.own_types.iter().chain(hop.types).all(exact);
    single && inputs > 1 && hop.table.facts.kind == 'p' && hop.table.has_index(hop.on)
}

/// All rows of these inputs, as [`super::hop`] would find them if it had no limit; `None` where they are many.
///
/// # Errors
/// As there.
pub(super) fn all(plan: &Plan, hop: &Hop<'_>, inputs: &[Values], usable: &[usize]) -> Result<Option<Vec<Found>>> {
    let on: Option<&Expr> = hop.on.first();
    let (Some(on), Some(own), Some(given)) = (on, hop.own_types.first(), hop.types.first()) else {
        return Ok(None);
    };
    let each = hop.limit.map_or(MOST, |n| n as usize);
    let most = each.saturating_mul(usable.len()).min(MOST);
    let table = hop.table;
    let filter = hop.filter.map(|f| format!(" AND {f}")).unwrap_or_default();
    let select: String = hop.select.iter().map(|s| format!(", {s}")).collect();
    let query = format!(
        "SELECT {on}{select} FROM {} AS {} WHERE {on} {} ANY ($1){filter} LIMIT {}",
        table.relation,
        table.relation.name,
        catalog::operator(Compare::Equal, *own, *given),
        most + 1,
    );
    let values = usable.iter().map(|i| inputs[*i].first().and_then(Option::as_deref));
    let values: Vec<Option<&str>> = values.collect();
    let mut positions: HashMap<&str, Vec<usize>> = HashMap::with_capacity(usable.len());
    for (i, value) in usable.iter().zip(&values) {
        positions.entry(value.unwrap_or_default()).or_default().push(*i);
    }
    let args = [Arg::Array(*given, values.clone())];
    let rows = act_as(
        Identity::Owner(table.owner),
        &plan.search_path,
        FIRST_FEW_FOR_A_WHILE,
        || prepared::for_a_while(&query, &args),
    )
    .map_err(|e| e.at(&table.relation.shown()))?;
    if rows.len() > most {
        return Ok(None);
    }
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        let inputs = positions.get(row.str(0)?);
        let inputs = inputs.ok_or_else(|| Error::internal("a row was found that nobody asked for"))?;
        found.extend(inputs.iter().map(|input| Found {
            input: *input,
            row: Row::clone(&row),
        }));
    }
    Ok(Some(found))
}
