//! The cold path, stage by stage and as a whole: the cost of a request for an unknown image.
//!
//! `cargo bench --bench cold`. The decoders of `base64` and `base64-simd` are measured beside the one in use.

#![expect(clippy::unwrap_used, reason = "a bench whose parts fail has nothing to measure")]

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Arc;

use afterimage::image::record::{self, Content, Record};
use afterimage::image::{ImageId, MediaType, Metadata, Representation, Version};
use afterimage::picture::sniff::sniff;
use afterimage::{Cache, CacheLimits};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

#[path = "../tests/it/harness/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the tests use all of it")]
mod harness;

use harness::png;

fn base64_of<'a>(record: &'a Record<'_>) -> &'a str {
    match &record.content {
        Content::Inline(text) => text,
        Content::Offloaded(_) => unreachable!("the record has base64_data"),
    }
}

fn cache() -> Cache {
    Cache::new(CacheLimits {
        images: NonZeroUsize::new(50).unwrap(),
        bytes: 50 << 20,
        derived: 8 << 20,
        recent: 0,
    })
}

fn stages(criterion: &mut Criterion) {
    for (name, length) in [("50 KB", 50_000), ("1 MB", 1_000_000)] {
        let image = png(1, length);
        let value = record::encode(&image, MediaType::Png, Some(std::time::SystemTime::UNIX_EPOCH));
        let parsed = Record::parse(&value).unwrap();
        let text = base64_of(&parsed);
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(value.len() as u64));
        let mut stage = |name: &str, run: &mut dyn FnMut()| {
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                bencher.iter(&mut *run);
            });
        };

        stage("parse", &mut || {
            black_box(Record::parse(black_box(&value)).unwrap());
        });
        stage("decode, in use", &mut || {
            black_box(record::decode(black_box(text)).unwrap());
        });
        stage("decode by base64", &mut || {
            black_box(STANDARD.decode(black_box(text)).unwrap());
        });
        stage("decode by base64-simd", &mut || {
            black_box(base64_simd::STANDARD.decode_to_vec(black_box(text)).unwrap());
        });
        stage("decode by base64-turbo", &mut || {
            black_box(base64_turbo::STANDARD.decode(black_box(text)).unwrap());
        });
        stage("hash", &mut || {
            black_box(Version::of(black_box(&value)));
        });
        stage("sniff", &mut || {
            black_box(sniff(black_box(&image)));
        });
        let (cache, id) = (cache(), ImageId::parse("a").unwrap());
        let metadata = Arc::new(Metadata::new(Version::of(&value), MediaType::Png, length, None));
        let kept = Representation { metadata, body: Bytes::from(image.clone()) };
        stage("insert", &mut || {
            black_box(cache.insert(&id, kept.clone().into()));
        });
        stage("whole", &mut || {
            let version = Version::of(black_box(&value));
            assert!(cache.get_image(&id, Version::of(b"")).is_none());
            let parsed = Record::parse(&value).unwrap();
            let decoded = record::decode(base64_of(&parsed)).unwrap();
            let metadata = Metadata::new(version, decoded.media_type, decoded.bytes.len(), None);
            let body = cache.count(decoded.bytes);
            let image = Representation { metadata: Arc::new(metadata), body };
            black_box(cache.insert(&id, image.into()));
        });
    }
}

criterion_group!(cold, stages);
criterion_main!(cold);
