//! Decoders, each under the limits of a render.

use std::time::{Duration, Instant};

use image::DynamicImage;

use crate::image::MediaType;
use crate::image::bounds::{Bounds, Fit};
use crate::image::variant::{Format, RequestedFormat, Transform, Variant};
use crate::picture::sniff::sniff;
use crate::picture::strip::traits;
use crate::picture::{self, AnimationLimits, Product, RenderLimits, decode, resize};

/// Most pixels of a source.
const PIXELS: u64 = 1_000_000;

const ANIMATION: AnimationLimits = AnimationLimits { frames: 20, pixels: PIXELS };

/// Time for each step.
const TIME: Duration = Duration::from_secs(2);

/// Time behind the deadline for what isn't interrupted, on a machine that is busy.
const LATE: Duration = Duration::from_secs(20);

/// A JPEG of a width.
const SMALL: Transform = Transform {
    bounds: Bounds { width: Some(40), height: None, fit: Fit::Contain, enlarge: false },
    format: RequestedFormat::Exactly(Format::Jpeg),
    quality: Some(60),
    default_quality: 60,
    effort: 0,
};

/// Declares a target for each type.
macro_rules! decoders {
    ($($name:ident: $media_type:ident)*) => {
        $(
            #[doc = concat!("Decodes ", stringify!($media_type), ".")]
            pub fn $name(data: &[u8]) {
                check(data, MediaType::$media_type);
            }
        )*
    };
}

decoders! {
    png: Png
    jpeg: Jpeg
    gif: Gif
    webp: WebP
    bmp: Bmp
    ico: Ico
    tiff: Tiff
}

/// Reads what this process reads of AVIF: its pixels have a process of their own.
pub fn avif(data: &[u8]) {
    check_head(data, MediaType::Avif);
}

/// Reads what this process reads of JPEG XL.
pub fn jxl(data: &[u8]) {
    check_head(data, MediaType::JpegXl);
}

/// Checks that a head is refused, or measured within the limits.
fn check_head(data: &[u8], media_type: MediaType) {
    if sniff(data) != Some(media_type) {
        return;
    }
    within_time(|| traits(data, media_type));
    let limits = RenderLimits { pixels: PIXELS, deadline: Some(Instant::now() + TIME) };
    if let Ok((width, height)) = within_time(|| picture::dimensions(data, media_type, limits)) {
        assert!(u64::from(width) * u64::from(height) <= PIXELS, "{width}×{height}");
        let memory = picture::decoding_memory(data, media_type, limits).expect("measured before");
        assert!(memory >= 3 * u64::from(width) * u64::from(height), "{memory} bytes");
    }
}

/// Checks that a file is refused, or has the size that was measured, in memory and time that were announced.
fn check(data: &[u8], media_type: MediaType) {
    if sniff(data) != Some(media_type) {
        return;
    }
    let limits = || RenderLimits { pixels: PIXELS, deadline: Some(Instant::now() + TIME) };
    let measured = picture::dimensions(data, media_type, limits());
    let decoded = within_time(|| decode::decode(data, media_type, limits()));
    let Ok(size) = measured else {
        assert!(decoded.is_err(), "{media_type:?}: decoded and not measured");
        return;
    };
    assert!(u64::from(size.0) * u64::from(size.1) <= PIXELS, "{size:?}");
    if let Ok(decoded) = decoded {
        assert_eq!((decoded.width(), decoded.height()), size, "{media_type:?}");
        assert!(matches!(decoded, DynamicImage::ImageRgb8(_) | DynamicImage::ImageRgba8(_)));
        let most = picture::decoding_memory(data, media_type, limits()).expect("measured before");
        assert!(decoded.as_bytes().len() as u64 <= most, "{most} bytes were announced");
    }
    for variant in [SMALL, Transform::THUMBNAIL].map(|it| it.variant(media_type)) {
        let variant = variant.expect("another format or size");
        let memory = picture::memory(data, media_type, variant, limits());
        let product = within_time(|| picture::render(data, media_type, variant, limits()));
        if let Ok(product) = product {
            check_product(&product, variant, size, memory.expect("a product needs memory"));
        }
    }
    if traits(data, media_type).animated {
        check_animation(data, media_type, size, limits());
    }
}

fn check_animation(data: &[u8], media_type: MediaType, size: (u32, u32), limits: RenderLimits) {
    let transform = Transform { format: RequestedFormat::Exactly(Format::WebP), ..SMALL };
    let Some(variant) = transform.variant(media_type) else { return };
    let memory = picture::animation_memory(data, media_type, variant, limits, ANIMATION);
    let product =
        within_time(|| picture::render_animation(data, media_type, variant, limits, ANIMATION));
    if let Ok(product) = product {
        check_product(&product, variant, size, memory.expect("a product needs memory"));
    }
}

/// Checks the type, the size and the length of a product.
fn check_product(product: &Product, variant: Variant, source: (u32, u32), memory: u64) {
    let expected = resize::size(source, variant.bounds());
    let media_type = variant.format().media_type();
    assert_eq!(sniff(&product.bytes), Some(media_type));
    let limits = RenderLimits { pixels: u64::MAX, deadline: None };
    assert_eq!(picture::dimensions(&product.bytes, media_type, limits), Ok(expected));
    assert_eq!(product.at_full_size, expected == source);
    // A file of a few pixels is mostly header.
    assert!(product.bytes.len() as u64 <= memory + 4096, "{memory} bytes were announced");
}

fn within_time<T>(work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let done = work();
    assert!(began.elapsed() < TIME + LATE, "took {:?}", began.elapsed());
    done
}
