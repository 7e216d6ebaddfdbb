//! The cache: insertions, hits, evictions, forms and a budget that changes, from several threads.

use std::num::NonZeroUsize;
use std::sync::Arc;

use bytes::Bytes;
use shuttle::thread;

use super::explore;
use crate::cache::{Cache, CacheKey, CacheLimits, Held, Insertion, OVERHEAD};
use crate::image::bounds::Bounds;
use crate::image::variant::Transform;
use crate::image::{
    Image, ImageId, MediaType, Metadata, Representation, RepresentationKind, Version,
};

/// Length of each body.
const LENGTH: usize = 1024;

/// Bytes that each representation counts for.
const EACH: usize = LENGTH + OVERHEAD;

/// All images that the scenarios insert.
const NAMES: [&str; 3] = ["a", "b", "c"];
const VERSIONS: [u8; 2] = [1, 2];

/// Room for eight representations, of which two are originals.
const LIMITS: CacheLimits = CacheLimits {
    images: NonZeroUsize::new(2).expect("not zero"),
    bytes: 8 * EACH,
    derived: 2 * EACH,
    recent: 2 * EACH,
};

fn id(name: &str) -> ImageId {
    ImageId::parse(name).unwrap()
}

fn version(number: u8) -> Version {
    Version::of(&[number])
}

/// The bytes of an image or of its form: its name, its version, and the width of the form.
fn body(name: &str, number: u8, width: u8) -> Vec<u8> {
    let mut body = vec![number; LENGTH];
    body[0] = name.as_bytes()[0];
    body[1] = width;
    body
}

fn image(cache: &Cache, name: &str, number: u8) -> Image {
    let metadata = Metadata::new(version(number), MediaType::Png, LENGTH, None);
    let body = cache.count(body(name, number, 0));
    Representation { metadata: Arc::new(metadata), body }.into()
}

fn form(cache: &Cache, name: &str, number: u8, width: u8) -> Representation {
    let bounds = Bounds { width: Some(width.into()), ..Transform::THUMBNAIL.bounds };
    let transform = Transform { bounds, ..Transform::THUMBNAIL };
    let variant = transform.variant(MediaType::Png).expect("a PNG has variants");
    let original = Metadata::new(version(number), MediaType::Png, LENGTH, None);
    let metadata = Arc::new(original.variant(variant, LENGTH));
    Representation { metadata, body: cache.count(body(name, number, width)) }
}

fn insert_form(cache: &Cache, name: &str, number: u8, width: u8) -> Insertion {
    let key = CacheKey::Image(id(name), version(number));
    cache.insert_variant(key, form(cache, name, number, width))
}

/// Gets the bytes of an image, which must be those of its name and version.
fn get(cache: &Cache, name: &str, number: u8) -> Option<Bytes> {
    let hit = cache.get(&id(name), version(number), RepresentationKind::Original)?;
    assert_eq!(hit.body, body(name, number, 0), "the bytes of another image");
    Some(hit.body)
}

/// Checks the limits, which hold at every moment.
fn within_limits(cache: &Cache) {
    let held = cache.held();
    assert!(held.images <= LIMITS.images.get() && held.bytes <= LIMITS.bytes, "{held:?}");
}

/// Checks the counts of a cache that nobody changes, and that it is empty once all is removed. Somebody holds some bytes still.
fn counts_are_right(cache: &Cache, held_outside: usize) {
    let all = || NAMES.iter().flat_map(|name| VERSIONS.map(|number| (id(name), version(number))));
    cache.make_room();
    let (mut images, mut representations) = (0, 0);
    for (id, version) in all() {
        let found = cache.representations(&id, version);
        images += usize::from(cache.contains(&id, version));
        representations += found.len();
    }
    let in_flight = held_outside;
    assert_eq!(cache.held(), Held { images, bytes: representations * EACH, in_flight });
    within_limits(cache);
    for (id, version) in all() {
        cache.remove(&id, version);
    }
    assert_eq!(cache.held(), Held { images: 0, bytes: 0, in_flight });
}

#[test]
fn counts_and_bytes_are_right_while_images_come_and_go() {
    let situations = ["hit", "miss", "held while it left"];
    explore("images come and go", 1500, &situations, |reached| {
        let cache = Arc::new(Cache::new(LIMITS));
        let insert = |name: &'static str, numbers: [u8; 2]| {
            let cache = Arc::clone(&cache);
            thread::spawn(move || {
                for number in numbers {
                    cache.insert(&id(name), image(&cache, name, number));
                    within_limits(&cache);
                }
                cache.remove(&id(name), version(numbers[0]));
            })
        };
        let threads = [insert("a", [1, 2]), insert("b", [2, 1]), insert("c", [1, 2])];
        let reader = {
            let (cache, reached) = (Arc::clone(&cache), reached.clone());
            thread::spawn(move || {
                let mut held = Vec::new();
                for (name, number) in [("a", 1), ("b", 2), ("a", 2), ("c", 1)] {
                    reached.note(if let Some(body) = get(&cache, name, number) {
                        held.push((name, number, body));
                        "hit"
                    } else {
                        "miss"
                    });
                }
                for (name, number, bytes) in &held {
                    if !cache.contains(&id(name), version(*number)) {
                        reached.note("held while it left");
                    }
                    assert_eq!(*bytes, body(name, *number, 0));
                }
                held
            })
        };
        for thread in threads {
            thread.join().unwrap();
        }
        drop(reader.join().unwrap());
        counts_are_right(&cache, 0);
    });
}

#[test]
fn forms_and_originals_share_the_bytes_without_exceeding_them() {
    let situations = ["forms left", "all forms stayed"];
    explore("forms and originals share the bytes", 1500, &situations, |reached| {
        let cache = Arc::new(Cache::new(LIMITS));
        let forms = |name: &'static str, first: u8| {
            let cache = Arc::clone(&cache);
            thread::spawn(move || {
                for width in first..first + 4 {
                    insert_form(&cache, name, 1, width);
                    within_limits(&cache);
                }
            })
        };
        let threads = [forms("a", 10), forms("a", 13)];
        let originals = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || {
                for name in ["a", "b"] {
                    cache.insert(&id(name), image(&cache, name, 1));
                    within_limits(&cache);
                }
                get(&cache, "b", 1)
            })
        };
        let remover = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || cache.remove(&id("a"), version(1)))
        };
        for thread in threads {
            thread.join().unwrap();
        }
        remover.join().unwrap();
        let held = originals.join().unwrap();
        let left = cache.representations(&id("a"), version(1)).len();
        reached.note(if left < 7 { "forms left" } else { "all forms stayed" });
        // The cache may have it still.
        cache.remove(&id("b"), version(1));
        counts_are_right(&cache, held.as_ref().map_or(0, Bytes::len));
    });
}

#[test]
fn images_that_are_not_kept_leave_and_one_thread_sees_to_it() {
    let situations = ["hit", "refused", "duty"];
    explore("images that are not kept leave", 1500, &situations, |reached| {
        // An image is more than a quarter of it, and isn't kept.
        let limits = CacheLimits { bytes: 2 * EACH, derived: 0, ..LIMITS };
        let cache = Arc::new(Cache::new(limits));
        let duties = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let insert = |name: &'static str| {
            let (cache, reached, duties) =
                (Arc::clone(&cache), reached.clone(), Arc::clone(&duties));
            thread::spawn(move || {
                let insertion = cache.insert(&id(name), image(&cache, name, 1));
                assert_eq!(insertion, Insertion::TooLarge);
                if cache.begin_to_release().is_some() {
                    let others = duties.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    assert_eq!(others, 0, "two threads have the duty");
                    reached.note("duty");
                }
                reached.note(if get(&cache, name, 1).is_some() { "hit" } else { "refused" });
            })
        };
        let threads = [insert("a"), insert("b"), insert("c")];
        let resizer = {
            let cache = Arc::clone(&cache);
            thread::spawn(move || {
                cache.set_recent_bytes(0);
                cache.make_room();
                cache.set_recent_bytes(EACH);
            })
        };
        for thread in threads {
            thread.join().unwrap();
        }
        resizer.join().unwrap();
        // One more, so that the limit of now holds.
        cache.insert(&id("a"), image(&cache, "a", 2));
        assert_eq!(cache.held(), Held { images: 0, bytes: 0, in_flight: LENGTH });
        counts_are_right(&cache, 0);
    });
}
