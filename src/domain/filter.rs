//! A set of hashes in a fixed number of bytes (a Bloom filter): what was put in is always found, what was not hardly ever.

/// Bits that an entry may take before the filter counts as full: then two in a hundred thousand others seem to be in it.
const BITS_EACH: usize = 24;

/// Bits that are set for an entry.
const PROBES: u64 = 10;

/// A filter. It never grows.
pub struct Filter {
    words: Vec<u64>,
    entries: usize,
}

impl Filter {
    /// An empty filter of about that many bytes.
    pub fn with_bytes(bytes: usize) -> Self {
        Self {
            words: vec![0; (bytes / 8).max(1)],
            entries: 0,
        }
    }

    /// Bytes that so many entries need.
    pub fn bytes_for(entries: usize) -> usize {
        entries.saturating_mul(BITS_EACH) / 8
    }

    /// Entries until it is full.
    pub fn capacity(&self) -> usize {
        self.words.len() * 64 / BITS_EACH
    }

    /// Entries that were new when they were put in.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Whether more entries would make it unreliable.
    pub fn is_full(&self) -> bool {
        self.entries >= self.capacity()
    }

    /// Puts an entry in; whether it was new.
    pub fn insert(&mut self, hash: u64) -> bool {
        let mut new = false;
        for (word, bit) in probes(hash, self.words.len()) {
            new |= self.words[word] & bit == 0;
            self.words[word] |= bit;
        }
        self.entries += usize::from(new);
        new
    }

    /// Whether it was put in.
    pub fn contains(&self, hash: u64) -> bool {
        probes(hash, self.words.len()).all(|(word, bit)| self.words[word] & bit != 0)
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.entries = 0;
    }
}

fn probes(hash: u64, words: usize) -> impl Iterator<Item = (usize, u64)> {
    let bits = words as u128 * 64;
    let step = mix(hash) | 1;
    (0..PROBES).map(move |i| {
        let spread = mix(hash.wrapping_add(step.wrapping_mul(i)));
        let at = ((u128::from(spread) * bits) >> 64) as usize;
        (at / 64, 1 << (at % 64))
    })
}

/// Spreads a number over all 64 bits.
pub fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look like hashes.
    fn hash(n: u64) -> u64 {
        mix(n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    // Broken: a value that was archived is overlooked, or everything looks like one.
    #[test]
    fn finds_what_was_put_in_and_hardly_anything_else() {
        let mut filter = Filter::with_bytes(1 << 16);
        let capacity = filter.capacity() as u64;
        (0..capacity).for_each(|n| assert!(filter.insert(hash(n)) || n > capacity / 2));
        assert!((0..capacity).all(|n| filter.contains(hash(n)) && !filter.insert(hash(n))));
        let wrong = (capacity..capacity + 1_000_000)
            .filter(|n| filter.contains(hash(*n)))
            .count();
        assert!(wrong < 100, "{wrong} of a million");
        filter.clear();
        assert!(!filter.contains(hash(1)) && filter.entries() == 0);
    }

    // Broken: memory grows with the number of orders.
    #[test]
    fn it_is_full_and_does_not_grow() {
        let mut filter = Filter::with_bytes(Filter::bytes_for(1000));
        let size = filter.words.len();
        let put = (0..).map(hash).take_while(|h| {
            filter.insert(*h);
            !filter.is_full()
        });
        assert!((990..=1010).contains(&put.count()));
        assert_eq!(filter.words.len(), size);
    }
}
