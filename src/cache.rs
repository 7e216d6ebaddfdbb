//! The bytes that are kept in memory: one LRU of decoded images, keyed by (id, version).

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use lru::LruCache;

use crate::image::{Image, ImageId, Representation, RepresentationKind, Version};

/// A bounded LRU of decoded images behind a mutex.
///
/// It never holds more images than its count nor more bytes than its budget. All forms of an image are
/// one entry: they count together and leave together. What a version means never changes, so an entry is
/// never wrong; whether it is *current* is not known here. The lock is held for a few map operations and
/// never shows outside.
#[derive(Debug)]
pub struct Cache {
    entries: Mutex<Entries>,
    budget: usize,
    largest: usize,
    alive: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Entries {
    by_version: LruCache<(ImageId, Version), Vec<Representation>>,
    bytes: usize,
}

/// How much there is at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Images in the cache.
    pub images: usize,
    /// Bytes of their bodies.
    pub bytes: usize,
    /// Bytes of bodies that are in memory outside the cache: on their way to a client, or to the cache.
    pub in_flight: usize,
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
        Cache { entries, budget, largest: budget / 4, alive: Arc::default() }
    }

    /// A body that is counted for as long as anyone holds it, so that what slow clients keep from being
    /// freed is known.
    #[must_use]
    pub fn count(&self, body: impl AsRef<[u8]> + Send + 'static) -> Bytes {
        self.alive.fetch_add(body.as_ref().len(), Ordering::Relaxed);
        Bytes::from_owner(Counted { body, alive: Arc::clone(&self.alive) })
    }

    /// A form of an image, which becomes the most recently used.
    #[must_use]
    pub fn get(
        &self,
        id: &ImageId,
        version: Version,
        form: RepresentationKind,
    ) -> Option<Representation> {
        let mut entries = self.lock();
        let forms = entries.by_version.get(&(id.clone(), version))?;
        forms.iter().find(|it| it.metadata.kind == form).cloned()
    }

    /// An image in all its forms.
    #[must_use]
    pub fn get_image(&self, id: &ImageId, version: Version) -> Option<Image> {
        let mut entries = self.lock();
        let forms = entries.by_version.get(&(id.clone(), version))?;
        let original =
            forms.iter().find(|it| it.metadata.kind == RepresentationKind::Original)?.clone();
        let coded =
            forms.iter().filter(|it| matches!(it.metadata.kind, RepresentationKind::Coded(_)));
        Some(Image { original, coded: coded.cloned().collect() })
    }

    /// Keeps an image, and drops the least recently used ones that it has no room beside.
    pub fn insert(&self, id: &ImageId, image: Image) -> Kept {
        let mut forms = image.coded;
        forms.push(image.original);
        self.keep(id, forms)
    }

    /// Keeps a further form of an image, whether the others are kept or not.
    pub fn insert_form(&self, id: &ImageId, form: Representation) -> Kept {
        self.keep(id, vec![form])
    }

    fn keep(&self, id: &ImageId, mut forms: Vec<Representation>) -> Kept {
        let Some(first) = forms.first() else {
            return Kept::Yes;
        };
        let version = first.metadata.version;
        if length(&forms) > self.largest {
            return Kept::TooLarge;
        }
        // The bytes of what is dropped are freed after the lock: unmapping a megabyte takes longer than
        // everything that is done under it.
        let mut dropped = Vec::new();
        let mut entries = self.lock();
        let key = (id.clone(), version);
        if let Some(old) = entries.by_version.pop(&key) {
            entries.bytes -= length(&old);
            let replaced = |it: &Representation| {
                forms.iter().any(|form| form.metadata.kind == it.metadata.kind)
            };
            let (replaced, others): (Vec<_>, Vec<_>) = old.into_iter().partition(replaced);
            forms.extend(others);
            dropped.push(replaced);
        }
        entries.bytes += length(&forms);
        if let Some((_, old)) = entries.by_version.push(key, forms) {
            entries.bytes -= length(&old);
            dropped.push(old);
        }
        while entries.bytes > self.budget {
            let Some((_, old)) = entries.by_version.pop_lru() else {
                break;
            };
            entries.bytes -= length(&old);
            dropped.push(old);
        }
        drop(entries);
        Kept::Yes
    }

    /// Drops an image that nobody will ask for again, since another version has its place.
    pub fn remove(&self, id: &ImageId, version: Version) {
        let mut entries = self.lock();
        let removed = entries.by_version.pop(&(id.clone(), version));
        if let Some(forms) = &removed {
            entries.bytes -= length(forms);
        }
        drop(entries);
    }

    /// How much there is now.
    #[must_use]
    pub fn held(&self) -> Held {
        let entries = self.lock();
        let (images, bytes) = (entries.by_version.len(), entries.bytes);
        drop(entries);
        let in_flight = self.alive.load(Ordering::Relaxed).saturating_sub(bytes);
        Held { images, bytes, in_flight }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many bytes some forms have.
fn length(forms: &[Representation]) -> usize {
    forms.iter().map(|it| it.body.len()).sum()
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
            assert_eq!(cache.insert(&id(name), image("1", 25)), Kept::Yes);
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
        assert_eq!(cache.insert(&id("b"), image("1", 26)), Kept::TooLarge);
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
    fn the_forms_of_an_image_count_together_and_leave_together() {
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
        // One that is made later comes to the others.
        let metadata = cache.get(&id("a"), version, RepresentationKind::Original).unwrap().metadata;
        let Ok(Resolved::Variant(variant)) = Transform::THUMBNAIL.resolve(MediaType::Png) else {
            panic!("a PNG has a thumbnail");
        };
        let metadata = Arc::new(metadata.variant(variant, 7));
        let thumbnail = Representation { metadata, body: Bytes::from(vec![0; 7]) };
        cache.insert_form(&id("a"), thumbnail.clone());
        cache.insert_form(&id("a"), thumbnail);
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
