//! Reading orders of which some may hold a value that is too large to travel: those are left out, nobody else.

use super::gather::{self, Gathered};
use super::plan::Plan;
use super::records::Stored;
use super::walk::Values;
use crate::pg::error::{Error, Result};

/// What could be read.
pub struct Portable {
    /// Positions, in the list of orders, of those that could be read. The orders of `gathered` are positions in this list.
    pub kept: Vec<usize>,
    pub gathered: Gathered,
    /// Why the others could not.
    pub refused: Vec<Error>,
}

/// [`gather::gather`] without the orders that hold a value that is too large.
///
/// # Errors
/// As [`gather::gather`], such values aside.
pub fn gather(plan: &Plan, orders: &[Values]) -> Result<Portable> {
    let error = match gather::gather(plan, orders, &Stored::by_keys(plan, orders)?) {
        Ok(gathered) => {
            return Ok(Portable {
                kept: (0..orders.len()).collect(),
                gathered,
                refused: Vec::new(),
            });
        }
        Err(e) if e.is_too_large() => e,
        Err(e) => return Err(e),
    };
    let mut out = Portable {
        kept: Vec::new(),
        gathered: Gathered {
            exists: Vec::new(),
            records: Vec::new(),
        },
        refused: Vec::new(),
    };
    if orders.len() < 2 {
        out.refused.push(error);
        return Ok(out);
    }
    let middle = orders.len() / 2;
    for (first, half) in [(0, &orders[..middle]), (middle, &orders[middle..])] {
        out.append(gather(plan, half)?, first);
    }
    Ok(out)
}

impl Portable {
    /// Adds what was read of the orders from position `first` on.
    fn append(&mut self, mut more: Self, first: usize) {
        for record in &mut more.gathered.records {
            record.order += self.kept.len();
        }
        self.kept.extend(more.kept.into_iter().map(|i| first + i));
        self.gathered.exists.append(&mut more.gathered.exists);
        self.gathered.records.append(&mut more.gathered.records);
        self.refused.append(&mut more.refused);
    }

    /// Reads more orders after those that were read before; `first` is the position of the first of them.
    ///
    /// # Errors
    /// As [`gather::gather`].
    pub fn extend(&mut self, plan: &Plan, orders: &[Values], first: usize) -> Result<()> {
        self.append(gather(plan, orders)?, first);
        Ok(())
    }
}
