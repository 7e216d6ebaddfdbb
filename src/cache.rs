//! The bytes in memory: one LRU of decoded images, keyed by (id, version).

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use lru::LruCache;

use crate::image::{Image, ImageId, Representation, RepresentationKind, Version};

/// A bounded LRU of decoded images behind a mutex.
///
/// It never holds more images than its count nor more bytes than its budget. All representations of an image are one
/// entry: they count together and leave together. A version never changes, so an entry is never wrong; whether it is
/// *current* is the index's business. The lock is held for a few map operations and never shows outside.
#[derive(Debug)]
pub struct Cache {
    entries: Mutex<Entries>,
    budget: usize,
    largest: usize,
    alive: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Entries {
    by_key: LruCache<CacheKey, Vec<Representation>>,
    bytes: usize,
}

/// The key of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CacheKey {
    /// A version of an image.
    Image(ImageId, Version),
    /// A drawn placeholder, by the hash of its description.
    Placeholder(Version),
}

/// Memory in use at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Images in the cache.
    pub images: usize,
    /// Bytes of their bodies.
    pub bytes: usize,
    /// Bytes of bodies outside the cache: on their way to a client, or to the cache.
    pub in_flight: usize,
}

/// The outcome of an insertion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Insertion {
    /// The image is in the cache.
    Stored,
    /// The image is larger than a quarter of the budget.
    TooLarge,
}

impl Cache {
    /// An empty cache with room for some images and some bytes of them.
    #[must_use]
    pub fn new(images: NonZeroUsize, budget: usize) -> Cache {
        // Unbounded and then resized: `LruCache::new` allocates for its whole capacity at once, which a generous
        // setting would pay at start.
        let mut by_key = LruCache::unbounded();
        by_key.resize(images);
        let entries = Mutex::new(Entries { by_key, bytes: 0 });
        Cache { entries, budget, largest: budget / 4, alive: Arc::default() }
    }

    /// A body that is counted for as long as anyone holds it, so that the memory that slow clients keep is known.
    #[must_use]
    pub fn count(&self, body: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        self.alive.fetch_add(body.as_ref().len(), Ordering::Relaxed);
        Bytes::from_owner(Counted { body, alive: Arc::clone(&self.alive) })
    }

    /// A representation of an image, which becomes the most recently used.
    #[must_use]
    pub fn get(
        &self,
        id: &ImageId,
        version: Version,
        kind: RepresentationKind,
    ) -> Option<Representation> {
        self.find(&CacheKey::Image(id.clone(), version), kind)
    }

    /// A representation, whose entry becomes the most recently used.
    #[must_use]
    pub fn find(&self, key: &CacheKey, kind: RepresentationKind) -> Option<Representation> {
        let mut entries = self.lock();
        let representations = entries.by_key.get(key)?;
        representations.iter().find(|it| it.metadata.kind == kind).cloned()
    }

    /// An image with its content codings.
    #[must_use]
    pub fn get_image(&self, id: &ImageId, version: Version) -> Option<Image> {
        let mut entries = self.lock();
        let all = entries.by_key.get(&CacheKey::Image(id.clone(), version))?;
        let original = all.iter().find(|it| it.metadata.kind == RepresentationKind::Original)?;
        let coded =
            all.iter().filter(|it| matches!(it.metadata.kind, RepresentationKind::Coded(_)));
        Some(Image { original: original.clone(), coded: coded.cloned().collect() })
    }

    /// True if the original of a version is in memory.
    #[must_use]
    pub fn contains(&self, id: &ImageId, version: Version) -> bool {
        let entries = self.lock();
        let all = entries.by_key.peek(&CacheKey::Image(id.clone(), version));
        all.is_some_and(|all| all.iter().any(|it| it.metadata.kind == RepresentationKind::Original))
    }

    /// Inserts an image, and evicts the least recently used ones until there is room.
    pub fn insert(&self, id: &ImageId, image: Image) -> Insertion {
        let key = CacheKey::Image(id.clone(), image.original.metadata.version);
        let mut representations = image.coded;
        representations.push(image.original);
        self.put(key, representations)
    }

    /// Inserts one more representation into an entry, or makes an entry of it.
    pub fn insert_variant(&self, key: CacheKey, variant: Representation) -> Insertion {
        self.put(key, vec![variant])
    }

    fn put(&self, key: CacheKey, mut new: Vec<Representation>) -> Insertion {
        if length(&new) > self.largest {
            return Insertion::TooLarge;
        }
        // Freed after the lock: unmapping a megabyte takes longer than everything that is done under it.
        let mut dropped = Vec::new();
        let mut entries = self.lock();
        if let Some(old) = entries.by_key.pop(&key) {
            entries.bytes -= length(&old);
            let is_replaced =
                |it: &Representation| new.iter().any(|new| new.metadata.kind == it.metadata.kind);
            let (replaced, others): (Vec<_>, Vec<_>) = old.into_iter().partition(is_replaced);
            new.extend(others);
            dropped.push(replaced);
        }
        entries.bytes += length(&new);
        if let Some((_, old)) = entries.by_key.push(key, new) {
            entries.bytes -= length(&old);
            dropped.push(old);
        }
        while entries.bytes > self.budget {
            let Some((_, old)) = entries.by_key.pop_lru() else {
                break;
            };
            entries.bytes -= length(&old);
            dropped.push(old);
        }
        drop(entries);
        Insertion::Stored
    }

    /// Removes a version that another one has replaced.
    pub fn remove(&self, id: &ImageId, version: Version) {
        let mut entries = self.lock();
        let removed = entries.by_key.pop(&CacheKey::Image(id.clone(), version));
        if let Some(representations) = &removed {
            entries.bytes -= length(representations);
        }
        drop(entries);
    }

    /// The memory in use now.
    #[must_use]
    pub fn held(&self) -> Held {
        let entries = self.lock();
        let (images, bytes) = (entries.by_key.len(), entries.bytes);
        drop(entries);
        let in_flight = self.alive.load(Ordering::Relaxed).saturating_sub(bytes);
        Held { images, bytes, in_flight }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bytes of some representations.
fn length(representations: &[Representation]) -> usize {
    representations.iter().map(|it| it.body.len()).sum()
}

/// The owner of a body's bytes.
struct Counted<B: AsRef<[u8]>> {
    body: B,
    alive: Arc<AtomicUsize>,
}

impl<B: AsRef<[u8]>> AsRef<[u8]> for Counted<B> {
    fn as_ref(&self) -> &[u8] {
        self.body.as_ref()
    }
}

impl<B: AsRef<[u8]>> Drop for Counted<B> {
    fn drop(&mut self) {
        self.alive.fetch_sub(self.body.as_ref().len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::image::coding::Coding;
    use crate::image::variant::{Resolved, Transform};
    use crate::image::{MediaType, Metadata};

    fn cache(images: usize, budget: usize) -> Cache {
        Cache::new(NonZeroUsize::new(images).unwrap(), budget)
    }

    fn id(text: &str) -> ImageId {
        ImageId::parse(text).unwrap()
    }

    /// An image of a length, whose version is made from the given text.
    fn image(version: &str, length: usize) -> Image {
        let version = Version::of(version.as_bytes());
        let metadata = Arc::new(Metadata::new(version, MediaType::Png, length, None));
        let original = Representation { metadata, body: Bytes::from(vec![0; length]) };
        original.into()
    }

    fn has(cache: &Cache, name: &str, version: &str) -> bool {
        cache
            .get(&id(name), Version::of(version.as_bytes()), RepresentationKind::Original)
            .is_some()
    }

    fn holds(cache: &Cache, images: usize, bytes: usize) {
        let held = cache.held();
        assert_eq!((held.images, held.bytes), (images, bytes));
    }

    #[test]
    fn never_more_images_than_the_count() {
        let cache = cache(2, 1000);
        for name in ["a", "b", "c"] {
            cache.insert(&id(name), image("1", 10));
        }
        holds(&cache, 2, 20);
        assert!(!has(&cache, "a", "1") && has(&cache, "b", "1") && has(&cache, "c", "1"));
    }

    #[test]
    fn never_more_bytes_than_the_budget() {
        let cache = cache(100, 100);
        for name in ["a", "b", "c", "d", "e"] {
            assert_eq!(cache.insert(&id(name), image("1", 25)), Insertion::Stored);
            assert!(cache.held().bytes <= 100);
        }
        assert!(!has(&cache, "a", "1") && has(&cache, "b", "1"));
        holds(&cache, 4, 100);
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
        assert_eq!(cache.insert(&id("b"), image("1", 26)), Insertion::TooLarge);
        holds(&cache, 1, 25);
    }

    #[test]
    fn the_same_version_again_is_counted_once() {
        let cache = cache(10, 100);
        cache.insert(&id("a"), image("1", 20));
        cache.insert(&id("a"), image("1", 20));
        holds(&cache, 1, 20);
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
        holds(&cache, 1, 20);
        cache.remove(&id("a"), Version::of(b"1"));
        holds(&cache, 0, 0);
    }

    #[test]
    fn a_hit_shares_the_bytes() {
        let cache = cache(10, 100);
        let kept = image("1", 5);
        cache.insert(&id("a"), kept.clone());
        let hit = cache
            .get(&id("a"), kept.original.metadata.version, RepresentationKind::Original)
            .unwrap();
        assert_eq!(hit.body.as_ptr(), kept.original.body.as_ptr());
    }

    #[test]
    fn the_representations_of_an_image_count_together_and_leave_together() {
        let cache = cache(1, 1000);
        let mut both = image("1", 30);
        let metadata = Arc::new(both.original.metadata.coded(Coding::Gzip, 10));
        both.coded.push(Representation { metadata, body: Bytes::from(vec![0; 10]) });
        let version = both.original.metadata.version;
        cache.insert(&id("a"), both);
        holds(&cache, 1, 40);
        let coded = cache.get(&id("a"), version, RepresentationKind::Coded(Coding::Gzip)).unwrap();
        assert_eq!(coded.body.len(), 10);
        assert!(cache.get(&id("a"), version, RepresentationKind::Coded(Coding::Brotli)).is_none());
        assert_eq!(cache.get_image(&id("a"), version).unwrap().coded.len(), 1);
        // A variant that is made later joins them.
        let metadata = cache.get(&id("a"), version, RepresentationKind::Original).unwrap().metadata;
        let Ok(Resolved::Variant(variant)) = Transform::THUMBNAIL.resolve(MediaType::Png) else {
            panic!("a PNG has a thumbnail");
        };
        let metadata = Arc::new(metadata.variant(variant, 7));
        let thumbnail = Representation { metadata, body: Bytes::from(vec![0; 7]) };
        let key = CacheKey::Image(id("a"), version);
        cache.insert_variant(key.clone(), thumbnail.clone());
        cache.insert_variant(key, thumbnail);
        holds(&cache, 1, 47);
        assert!(cache.get(&id("a"), version, RepresentationKind::Variant(variant)).is_some());
        cache.insert(&id("b"), image("1", 5));
        holds(&cache, 1, 5);
    }

    #[test]
    fn bytes_that_a_client_still_holds_are_known_after_they_have_left() {
        let cache = cache(1, 1000);
        let mut first = image("1", 30);
        first.original.body = cache.count(vec![0; 30]);
        let on_its_way = first.original.body.clone();
        assert_eq!(cache.held().in_flight, 30);
        cache.insert(&id("a"), first);
        assert_eq!(cache.held().in_flight, 0);
        cache.remove(&id("a"), Version::of(b"1"));
        assert_eq!(cache.held().in_flight, 30);
        drop(on_its_way);
        assert_eq!(cache.held().in_flight, 0);
    }
}
