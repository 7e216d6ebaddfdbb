//! The cache alone: its hit ratios beside those of a plain LRU, the time of a hit, and the memory of a representation.
//!
//! `cargo bench --bench cache`

#![expect(clippy::unwrap_used, reason = "a bench whose parts fail has nothing to measure")]
#![expect(clippy::cast_precision_loss, reason = "figures to be read by people")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use afterimage::image::variant::Transform;
use afterimage::image::{
    ImageId, MediaType, Metadata, Representation, RepresentationKind, Version,
};
use afterimage::{Cache, CacheKey, CacheLimits};
use bytes::Bytes;
use lru::LruCache;

const IMAGES: usize = 1_000;
const KEPT: usize = 50;
const REQUESTS: usize = 400_000;

fn main() {
    hit_ratios();
    time_of_a_hit();
    memory_of_a_form();
}

/// Requested images by their number, with their lengths.
struct Mix {
    name: &'static str,
    requests: Vec<usize>,
    length: fn(usize) -> usize,
}

fn hit_ratios() {
    println!(
        "Hit ratios of {REQUESTS} requests for {IMAGES} images by Zipf's law (s = 0.9), with room for {KEPT}:\n"
    );
    println!("| mix | plain LRU | this cache |\n|---|--:|--:|");
    let even = |_| 50_000;
    let uneven = |image: usize| 200_000 << ((image.wrapping_mul(2_654_435_761) >> 8) % 6);
    let steady = zipf(|_, image| image);
    let with_crawler = |requests: &[usize]| {
        let one_in_five = requests
            .iter()
            .enumerate()
            .map(|(request, image)| if request % 5 == 0 { IMAGES + request } else { *image });
        one_in_five.collect()
    };
    let with_scans = |requests: &[usize]| {
        let scanned = requests.iter().enumerate().map(|(request, image)| {
            if request % 20_000 < 2_000 { IMAGES + request } else { *image }
        });
        scanned.collect()
    };
    for mix in [
        Mix { name: "steady", requests: steady.clone(), length: even },
        Mix {
            name: "every fifth request a crawler's",
            requests: with_crawler(&steady),
            length: even,
        },
        Mix {
            name: "2,000 other images in a row, ten times",
            requests: with_scans(&steady),
            length: even,
        },
        Mix {
            name: "other favourites after every 2,000 requests",
            requests: zipf(|request, image| (image + request / 2_000 * 37) % IMAGES),
            length: even,
        },
        Mix {
            name: "other favourites after every 20,000 requests",
            requests: zipf(|request, image| (image + request / 20_000 * 37) % IMAGES),
            length: even,
        },
        Mix { name: "of 0.2 to 6.4 MB", requests: steady.clone(), length: uneven },
        Mix {
            name: "of 0.2 to 6.4 MB, with a crawler",
            requests: with_crawler(&steady),
            length: uneven,
        },
    ] {
        let (lru, own) = (mix.hits_of_an_lru(), mix.hits_of_the_cache());
        let percent = |hits: usize| 100.0 * hits as f64 / mix.requests.len() as f64;
        println!("| {} | {:.1} % | {:.1} % |", mix.name, percent(lru), percent(own));
    }
}

impl Mix {
    fn hits_of_an_lru(&self) -> usize {
        let (mut lru, mut bytes, mut hits) = (LruCache::unbounded(), 0, 0);
        for image in &self.requests {
            if lru.get(image).is_some() {
                hits += 1;
                continue;
            }
            let length = (self.length)(*image);
            lru.put(*image, length);
            bytes += length;
            while lru.len() > KEPT || bytes > 42 << 20 {
                bytes -= lru.pop_lru().unwrap().1;
            }
        }
        hits
    }

    fn hits_of_the_cache(&self) -> usize {
        let (cache, all) = (cache(KEPT), Bytes::from(vec![0; 7 << 20]));
        let ids: Vec<ImageId> = self.requests.iter().map(|image| id(*image)).collect();
        let (version, kind) = (Version::of(b""), RepresentationKind::Original);
        let mut hits = 0;
        for (image, id) in self.requests.iter().zip(&ids) {
            if cache.get(id, version, kind).is_some() {
                hits += 1;
                continue;
            }
            let length = (self.length)(*image);
            let metadata = Arc::new(Metadata::new(version, MediaType::Png, length, None));
            let body = all.slice(..length);
            cache.insert(id, Representation { metadata, body }.into());
        }
        hits
    }
}

/// Images by Zipf's law, renumbered by a function of the request and the rank.
fn zipf(renumbered: impl Fn(usize, usize) -> usize) -> Vec<usize> {
    const S: f64 = 0.9;
    let mut sum = 0.0;
    let chances: Vec<f64> = (1..=IMAGES)
        .map(|rank| {
            sum += (rank as f64).powf(-S);
            sum
        })
        .collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64
    };
    let rank = |chance: f64| chances.partition_point(|it| *it < chance * sum).min(IMAGES - 1);
    (0..REQUESTS).map(|request| renumbered(request, rank(random()))).collect()
}

fn time_of_a_hit() {
    println!("\nTime of a hit, in one thread:\n\n| images in memory | ns |\n|---|--:|");
    for images in [50, 50_000] {
        let (cache, version) = (cache(images * 2), Version::of(b""));
        let ids: Vec<ImageId> = (0..images).map(id).collect();
        for id in &ids {
            let metadata = Arc::new(Metadata::new(version, MediaType::Png, 100, None));
            let body = Bytes::from(vec![0; 100]);
            cache.insert(id, Representation { metadata, body }.into());
        }
        let round = || {
            let began = Instant::now();
            for request in 0..200_000_usize {
                let id = &ids[request.wrapping_mul(7919) % images];
                black_box(cache.get(id, version, RepresentationKind::Original).unwrap());
            }
            began.elapsed().as_nanos() as f64 / 2e5
        };
        let mut rounds: Vec<f64> = (0..30).map(|_| round()).collect();
        // The quickest: on a busy machine the others measure the machine.
        rounds.sort_by(f64::total_cmp);
        println!("| {images} | {:.0} |", rounds[0]);
    }
}

/// Bytes that the kernel counts for each form of a few bytes, which is its overhead.
fn memory_of_a_form() {
    const FORMS: usize = 30_000;
    let cache = cache(1);
    let Some(variant) = Transform::THUMBNAIL.variant(MediaType::Png) else {
        unreachable!("a PNG has a thumbnail");
    };
    let before = resident();
    for form in 0..FORMS {
        let version = Version::of(&form.to_le_bytes());
        let original = Metadata::new(version, MediaType::Png, 1, None);
        let metadata = Arc::new(original.variant(variant, 34));
        let body = cache.count(vec![0_u8; 34]);
        cache.insert_variant(CacheKey::Image(id(form), version), Representation { metadata, body });
    }
    let grown = resident() - before;
    println!("\n{} bytes of memory for a form of 34 bytes", grown / FORMS);
}

fn cache(images: usize) -> Cache {
    Cache::new(CacheLimits {
        images: NonZeroUsize::new(images).unwrap(),
        bytes: (50 << 20).max(images * 2048),
        derived: 8 << 20,
        recent: 0,
    })
}

fn id(number: usize) -> ImageId {
    ImageId::parse(&format!("image-{number}")).unwrap()
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}
