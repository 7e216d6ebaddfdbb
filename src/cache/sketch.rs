//! Counts uses: a count-min sketch whose counts fade.

use std::hash::{BuildHasher, Hash};

use lru::DefaultHasher;

/// Counters of a block, which is one cache line.
const BLOCK: usize = 64;

/// Counters that a name has, each in a quarter of its block.
const ROWS: usize = 4;

/// Uses after which all counts are halved, for each entry of the area. With fewer an image that is asked for now and then
/// isn't told from one that is asked for once; with more, new favourites wait for long. `benches/cache.rs` has both.
const PERIOD: usize = 40;

/// Least number of entries that the uses are counted for.
const LEAST: usize = 50;

/// Approximate numbers of uses, of any number of names in fixed memory.
///
/// A count is never too low. It is too high only where all four counters of a name are shared with names that are used
/// more. The hash has a random seed, so nobody can choose names that share them.
#[derive(Debug)]
pub(super) struct Sketch {
    hasher: DefaultHasher,
    blocks: Box<[[u8; BLOCK]]>,
    /// Uses since the counts were halved, and the number at which they are halved next.
    uses: usize,
    period: usize,
}

impl Sketch {
    /// A sketch for an area of about so many entries.
    pub(super) fn new(entries: usize) -> Sketch {
        let entries = entries.clamp(LEAST, 1 << 20);
        let blocks = vec![[0; BLOCK]; (entries / 4).max(64).next_power_of_two()];
        let hasher = DefaultHasher::default();
        Sketch { hasher, blocks: blocks.into(), uses: 0, period: entries * PERIOD }
    }

    /// Counts a use.
    pub(super) fn add(&mut self, name: impl Hash) {
        let (block, places) = self.places(name);
        let block = &mut self.blocks[block];
        let least = places.iter().map(|place| block[*place]).min().unwrap_or(0);
        // The others are too high already.
        for place in places {
            if block[place] == least {
                block[place] = least.saturating_add(1);
            }
        }
        self.uses += 1;
        if self.uses >= self.period {
            self.uses /= 2;
            self.blocks.as_flattened_mut().iter_mut().for_each(|count| *count /= 2);
        }
    }

    /// The number of recent uses, at most 255.
    pub(super) fn uses(&self, name: impl Hash) -> u32 {
        let (block, places) = self.places(name);
        let counts = places.map(|place| self.blocks[block][place]);
        counts.into_iter().min().unwrap_or(0).into()
    }

    /// The block of a name, and the places of its counters there.
    fn places(&self, name: impl Hash) -> (usize, [usize; ROWS]) {
        let hash = self.hasher.hash_one(name);
        let [a, b, c, d, place @ ..] = hash.to_le_bytes();
        let block = u32::from_le_bytes(place) as usize & (self.blocks.len() - 1);
        let quarter = BLOCK / ROWS;
        let place = |row: usize, byte: u8| row * quarter + usize::from(byte) % quarter;
        (block, [place(0, a), place(1, b), place(2, c), place(3, d)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_are_counted_by_name_and_fade() {
        let mut sketch = Sketch::new(1);
        for _ in 0..100 {
            sketch.add("often");
        }
        sketch.add("once");
        assert!(sketch.uses("often") >= 100 && (1..100).contains(&sketch.uses("once")));
        for number in 0..2 * sketch.period {
            sketch.add(number);
        }
        assert!(sketch.uses("often") <= 60, "{}", sketch.uses("often"));
    }

    #[test]
    fn a_count_stays_at_its_highest() {
        let mut sketch = Sketch::new(1000);
        for _ in 0..1000 {
            sketch.add("a");
        }
        assert_eq!(sketch.uses("a"), 255);
    }
}
