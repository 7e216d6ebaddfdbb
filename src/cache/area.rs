//! A bounded part of the cache, with admission by use (W-TinyLFU).
//!
//! A newcomer enters a small *window*, which is an LRU. An entry that leaves the window is compared with the entries that would
//! have to leave the main LRU for it, by their numbers of recent uses, and enters only if it has as many as all of them
//! together. So images that are asked for once, such as a crawler's, pass through the window and drive nothing out, and a
//! large image must be worth all the small ones that it displaces. The two ideas are from "`TinyLFU`: A Highly Efficient Cache
//! Admission Policy" (Einziger, Friedman and Manes, 2017) and "Lightweight Robust Size Aware Cache Management" (Einziger
//! and others, 2022).

use std::hash::Hash;

use lru::LruCache;

use super::sketch::Sketch;

/// The window's share of an area, as one part in so many.
const WINDOW: usize = 16;

/// Most entries that one newcomer is compared with. If these are worth less than it, so are the others.
const MAX_COMPARED: usize = 64;

/// A key of an area.
pub(super) trait AreaKey: Hash + Eq + Clone {
    /// The part of the key whose uses are counted.
    fn name(&self) -> impl Hash + '_;
}

/// The limits of an area.
#[derive(Debug, Clone, Copy)]
pub(super) struct AreaLimits {
    pub(super) entries: usize,
    pub(super) bytes: usize,
}

/// A window and a main LRU, bounded together.
#[derive(Debug)]
pub(super) struct Area<K: AreaKey, V> {
    main: Lru<K, V>,
    window: Lru<K, V>,
    window_limits: AreaLimits,
    sketch: Sketch,
}

/// Entries in the order of their last use, with their bytes.
#[derive(Debug)]
struct Lru<K: Hash + Eq, V> {
    entries: LruCache<K, Slot<V>>,
    bytes: usize,
}

#[derive(Debug)]
struct Slot<V> {
    value: V,
    bytes: usize,
}

impl<K: AreaKey, V> Area<K, V> {
    /// An empty area, most of the time with these limits. `counted` is the number of entries whose uses are told apart
    /// well.
    pub(super) fn new(limits: AreaLimits, counted: usize) -> Area<K, V> {
        let entries = (limits.entries / WINDOW).max(1);
        // The same share of the bytes: of one entry all, of two a half.
        let bytes = (limits.bytes / limits.entries.max(1)).max(limits.bytes / WINDOW);
        Area {
            main: Lru::new(),
            window: Lru::new(),
            window_limits: AreaLimits { entries, bytes },
            sketch: Sketch::new(counted),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.main.entries.len() + self.window.entries.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.main.bytes + self.window.bytes
    }

    /// Finds an entry, and counts the use.
    pub(super) fn get(&mut self, key: &K) -> Option<&V> {
        let slot = match self.main.entries.get(key) {
            None => self.window.entries.get(key)?,
            slot => slot?,
        };
        self.sketch.add(key.name());
        Some(&slot.value)
    }

    /// Finds an entry without using it.
    pub(super) fn peek(&self, key: &K) -> Option<&V> {
        let slot = self.main.entries.peek(key).or_else(|| self.window.entries.peek(key));
        slot.map(|slot| &slot.value)
    }

    /// The number of recent uses of a name.
    pub(super) fn uses(&self, key: &K) -> u32 {
        self.sketch.uses(key.name())
    }

    /// Counts a use of an entry that isn't here.
    pub(super) fn count_use(&mut self, key: &K) {
        self.sketch.add(key.name());
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        self.main.remove(key).or_else(|| self.window.remove(key))
    }

    /// Inserts an entry and counts it as a use. Returns true if the entry is kept. What leaves for it, or itself, is
    /// added to `left`.
    pub(super) fn insert(
        &mut self,
        key: K,
        value: V,
        bytes: usize,
        limits: AreaLimits,
        left: &mut Vec<(K, V)>,
    ) -> bool {
        self.sketch.add(key.name());
        if let Some(old) = self.remove(&key) {
            left.push((key.clone(), old));
        }
        let slot = Slot { value, bytes };
        if bytes > self.window_limits.bytes {
            return self.admit(key, slot, limits, left);
        }
        self.window.push(key, slot);
        while self.window.is_over(self.window_limits) {
            let Some((key, slot)) = self.window.pop() else { break };
            self.admit(key, slot, limits, left);
        }
        self.shrink(limits.bytes, left);
        true
    }

    /// Evicts the least recently used entries until no more than `bytes` are left.
    pub(super) fn shrink(&mut self, bytes: usize, left: &mut Vec<(K, V)>) {
        while self.bytes() > bytes {
            let Some((key, slot)) = self.main.pop().or_else(|| self.window.pop()) else { break };
            left.push((key, slot.value));
        }
    }

    /// Moves an entry into the main LRU, if it is worth what must leave for it.
    fn admit(&mut self, key: K, slot: Slot<V>, limits: AreaLimits, left: &mut Vec<(K, V)>) -> bool {
        let limits = AreaLimits {
            entries: limits.entries.saturating_sub(self.window_limits.entries),
            bytes: limits.bytes.saturating_sub(self.window_limits.bytes),
        };
        if limits.entries == 0 || slot.bytes > limits.bytes || !self.is_worth(&key, &slot, limits) {
            left.push((key, slot.value));
            return false;
        }
        self.main.push(key, slot);
        while self.main.is_over(limits) {
            let Some((key, slot)) = self.main.pop() else { break };
            left.push((key, slot.value));
        }
        true
    }

    /// True if an entry was used as often as all together that would leave for it.
    fn is_worth(&self, key: &K, slot: &Slot<V>, limits: AreaLimits) -> bool {
        let own = self.uses(key);
        let (mut entries, mut bytes) = (self.main.entries.len() + 1, self.main.bytes + slot.bytes);
        let mut uses = 0;
        for (victim, it) in self.main.entries.iter().rev().take(MAX_COMPARED) {
            if entries <= limits.entries && bytes <= limits.bytes {
                break;
            }
            uses += self.uses(victim);
            if uses > own {
                return false;
            }
            entries -= 1;
            bytes -= it.bytes;
        }
        true
    }
}

impl<K: Hash + Eq, V> Lru<K, V> {
    fn new() -> Lru<K, V> {
        // Unbounded, since `LruCache::new` allocates for its whole capacity at once.
        Lru { entries: LruCache::unbounded(), bytes: 0 }
    }

    fn is_over(&self, limits: AreaLimits) -> bool {
        self.entries.len() > limits.entries || self.bytes > limits.bytes
    }

    /// Adds an entry that isn't there yet.
    fn push(&mut self, key: K, slot: Slot<V>) {
        self.bytes += slot.bytes;
        self.entries.put(key, slot);
    }

    fn pop(&mut self) -> Option<(K, Slot<V>)> {
        let (key, slot) = self.entries.pop_lru()?;
        self.bytes -= slot.bytes;
        Some((key, slot))
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        let slot = self.entries.pop(key)?;
        self.bytes -= slot.bytes;
        Some(slot.value)
    }
}
