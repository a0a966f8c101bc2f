//! Which of some rows differ most from each other: the ones on which a treatment is worth trying.

use std::collections::{BTreeSet, HashMap, HashSet};

/// A column with more values than this tells nothing about the kinds of rows that there are.
const KINDS: usize = 20;

/// What is known of a row, without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sketch {
    /// For each treated column how large its value is; `None` for NULL.
    pub sizes: Vec<Option<i64>>,
    /// For each other column something that is the same for the same value.
    pub kinds: Vec<Option<i64>>,
}

/// Positions of at most `most` rows: the largest and the smallest values of each treated column, each combination of
/// treated columns that are NULL, and each value of the columns that have few of them.
pub fn choose(rows: &[Sketch], most: usize) -> Vec<usize> {
    let mut wanted = Vec::new();
    let width = |of: fn(&Sketch) -> usize| rows.iter().map(of).max().unwrap_or(0);
    for column in 0..width(|r| r.sizes.len()) {
        let sized = || (0..rows.len()).filter_map(|i| Some((*rows[i].sizes.get(column)?.as_ref()?, i)));
        wanted.extend(sized().max().map(|(_, i)| i));
        wanted.extend(sized().min().map(|(_, i)| i));
    }
    let mut empty: HashSet<Vec<bool>> = HashSet::new();
    wanted.extend((0..rows.len()).filter(|i| empty.insert(rows[*i].sizes.iter().map(Option::is_none).collect())));
    for column in 0..width(|r| r.kinds.len()) {
        let mut first: HashMap<Option<i64>, usize> = HashMap::new();
        for (i, row) in rows.iter().enumerate() {
            first.entry(row.kinds.get(column).copied().flatten()).or_insert(i);
        }
        if first.len() <= KINDS {
            let found: BTreeSet<usize> = first.into_values().collect();
            wanted.extend(found);
        }
    }
    let mut seen = HashSet::new();
    wanted.retain(|i| seen.insert(*i));
    wanted.truncate(most);
    wanted
}

#[cfg(test)]
mod tests {
    use super::{KINDS, Sketch, choose};

    fn sized(first: Option<i64>, second: Option<i64>) -> Sketch {
        Sketch {
            sizes: vec![first, second],
            kinds: Vec::new(),
        }
    }

    #[test]
    fn takes_the_largest_the_smallest_and_those_with_nulls() {
        let some = [
            sized(Some(5), Some(5)),
            sized(Some(9), Some(5)),
            sized(Some(1), Some(5)),
            sized(Some(5), None),
            sized(Some(6), None),
        ];
        let mut chosen = choose(&some, 10);
        chosen.sort_unstable();
        // 2 and 0 are the last and the first of those that are equally large in the second column.
        assert_eq!(chosen, [0, 1, 2, 3]);
    }

    #[test]
    fn takes_one_of_each_kind_unless_there_are_many() {
        let many: Vec<Sketch> = (0..100)
            .map(|i| Sketch {
                sizes: Vec::new(),
                kinds: vec![Some(i), Some(i64::from(i == 70)), None],
            })
            .collect();
        assert_eq!(choose(&many, 10), [0, 70]);
        assert_eq!(choose(&many[..KINDS], KINDS).len(), KINDS);
        assert_eq!(choose(&many[..KINDS], 3).len(), 3);
    }

    #[test]
    fn of_nothing_it_takes_nothing() {
        assert!(choose(&[], 10).is_empty());
    }
}
