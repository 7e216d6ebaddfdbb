//! The bytes that are kept in memory: one LRU of decoded images, keyed by (id, version).

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use crate::image::{ImageId, Representation, Version};

/// A bounded LRU of decoded images behind a mutex.
///
/// It never holds more images than its count nor more bytes than its budget. What a version means
/// never changes, so an entry is never wrong; whether it is *current* is not known here. The lock
/// is held for a few map operations and never shows outside.
#[derive(Debug)]
pub struct Cache {
    entries: Mutex<Entries>,
    budget: usize,
    largest: usize,
}

#[derive(Debug)]
struct Entries {
    by_version: LruCache<(ImageId, Version), Representation>,
    bytes: usize,
}

/// How much a cache holds at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Images.
    pub images: usize,
    /// Bytes of their bodies.
    pub bytes: usize,
}

/// Whether an image was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It is in the cache now.
    Yes,
    /// It is larger than a quarter of the budget.
    TooLarge,
}

impl Cache {
    /// An empty cache with room for some images and some bytes of them.
    #[must_use]
    pub fn new(images: NonZeroUsize, budget: usize) -> Cache {
        // Made by `unbounded` and bounded by hand: `LruCache::new` allocates for its whole capacity at
        // once, which a generous setting would pay at start.
        let mut by_version = LruCache::unbounded();
        by_version.resize(images);
        let entries = Mutex::new(Entries { by_version, bytes: 0 });
        Cache { entries, budget, largest: budget / 4 }
    }

    /// The image, which becomes the most recently used.
    #[must_use]
    pub fn get(&self, id: &ImageId, version: Version) -> Option<Representation> {
        self.lock().by_version.get(&(id.clone(), version)).cloned()
    }

    /// Keeps an image, and drops the least recently used ones that it has no room beside.
    pub fn insert(&self, id: &ImageId, image: Representation) -> Kept {
        let length = image.body.len();
        if length > self.largest {
            return Kept::TooLarge;
        }
        // The bytes of what is dropped are freed after the lock: unmapping a megabyte takes longer than
        // everything that is done under it.
        let mut dropped = Vec::new();
        let mut entries = self.lock();
        let key = (id.clone(), image.facts.version);
        if let Some((_, old)) = entries.by_version.push(key, image) {
            entries.bytes -= old.body.len();
            dropped.push(old);
        }
        entries.bytes += length;
        while entries.bytes > self.budget {
            let Some((_, old)) = entries.by_version.pop_lru() else {
                break;
            };
            entries.bytes -= old.body.len();
            dropped.push(old);
        }
        drop(entries);
        Kept::Yes
    }

    /// Drops an image that nobody will ask for again, since another version has its place.
    pub fn remove(&self, id: &ImageId, version: Version) {
        let mut entries = self.lock();
        let removed = entries.by_version.pop(&(id.clone(), version));
        if let Some(image) = &removed {
            entries.bytes -= image.body.len();
        }
        drop(entries);
    }

    /// How much is held now.
    #[must_use]
    pub fn held(&self) -> Held {
        let entries = self.lock();
        Held { images: entries.by_version.len(), bytes: entries.bytes }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;

    use super::*;
    use crate::image::{Facts, MediaType};

    fn cache(images: usize, budget: usize) -> Cache {
        Cache::new(NonZeroUsize::new(images).unwrap(), budget)
    }

    fn id(text: &str) -> ImageId {
        ImageId::parse(text).unwrap()
    }

    /// An image of a length, whose version is made from the given text.
    fn image(version: &str, length: usize) -> Representation {
        let version = Version::of(version.as_bytes());
        let facts = Arc::new(Facts::new(version, MediaType::Png, length, None));
        Representation { facts, body: Bytes::from(vec![0; length]) }
    }

    fn has(cache: &Cache, name: &str, version: &str) -> bool {
        cache.get(&id(name), Version::of(version.as_bytes())).is_some()
    }

    #[test]
    fn never_more_images_than_the_count() {
        let cache = cache(2, 1000);
        for name in ["a", "b", "c"] {
            cache.insert(&id(name), image("1", 10));
        }
        assert_eq!(cache.held(), Held { images: 2, bytes: 20 });
        assert!(!has(&cache, "a", "1") && has(&cache, "b", "1") && has(&cache, "c", "1"));
    }

    #[test]
    fn never_more_bytes_than_the_budget() {
        let cache = cache(100, 100);
        for name in ["a", "b", "c", "d", "e"] {
            assert_eq!(cache.insert(&id(name), image("1", 25)), Kept::Yes);
            assert!(cache.held().bytes <= 100);
        }
        assert!(!has(&cache, "a", "1") && has(&cache, "b", "1"));
        assert_eq!(cache.held(), Held { images: 4, bytes: 100 });
    }

    #[test]
    fn what_was_used_last_leaves_last() {
        let cache = cache(2, 1000);
        cache.insert(&id("a"), image("1", 1));
        cache.insert(&id("b"), image("1", 1));
        assert!(has(&cache, "a", "1"));
        cache.insert(&id("c"), image("1", 1));
        assert!(has(&cache, "a", "1") && !has(&cache, "b", "1"));
    }

    #[test]
    fn an_image_over_a_quarter_of_the_budget_is_not_kept_and_drives_nothing_out() {
        let cache = cache(10, 100);
        cache.insert(&id("a"), image("1", 25));
        assert_eq!(cache.insert(&id("b"), image("1", 26)), Kept::TooLarge);
        assert_eq!(cache.held(), Held { images: 1, bytes: 25 });
    }

    #[test]
    fn the_same_version_again_is_counted_once() {
        let cache = cache(10, 100);
        cache.insert(&id("a"), image("1", 20));
        cache.insert(&id("a"), image("1", 20));
        assert_eq!(cache.held(), Held { images: 1, bytes: 20 });
    }

    #[test]
    fn an_image_is_found_under_its_own_version_only() {
        let cache = cache(10, 100);
        cache.insert(&id("a"), image("1", 5));
        assert!(has(&cache, "a", "1") && !has(&cache, "a", "2") && !has(&cache, "b", "1"));
    }

    #[test]
    fn a_removed_image_gives_its_bytes_back() {
        let cache = cache(10, 100);
        cache.insert(&id("a"), image("1", 20));
        cache.remove(&id("a"), Version::of(b"2"));
        assert_eq!(cache.held(), Held { images: 1, bytes: 20 });
        cache.remove(&id("a"), Version::of(b"1"));
        assert_eq!(cache.held(), Held { images: 0, bytes: 0 });
    }

    #[test]
    fn a_hit_shares_the_bytes() {
        let cache = cache(10, 100);
        let kept = image("1", 5);
        cache.insert(&id("a"), kept.clone());
        let hit = cache.get(&id("a"), kept.facts.version).unwrap();
        assert_eq!(hit.body.as_ptr(), kept.body.as_ptr());
    }
}
