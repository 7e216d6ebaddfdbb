//! From pixels to bytes. Each module encodes one format.

mod animation;
mod avif;
mod flatness;
mod huffman;
mod jpeg;
mod png;
mod webp;

use std::io::{self, Write};

use image::DynamicImage;

pub(super) use self::animation::{AnimationEncoder, memory as animation_memory};
pub use self::jpeg::encode as jpeg;
pub use self::webp::{exact as exact_webp, lossy as webp};
use super::{PictureError, RenderLimits};
use crate::image::variant::{Format, Variant};

/// Encodes a picture in the format and quality of a variant, without metadata.
pub fn encode(
    picture: &DynamicImage,
    variant: Variant,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    match variant.format() {
        Format::Avif if variant.only_if_smaller() && avif::is_larger_than_webp(picture) => {
            Err(PictureError::NotSmaller(Format::Avif))
        }
        Format::Avif => avif::encode(picture, variant.quality()),
        Format::WebP => webp::encode(picture, variant.quality(), variant.effort(), limits),
        Format::Jpeg => jpeg::encode(picture, variant.quality(), limits),
        Format::Png => png::encode(picture, limits),
    }
}

/// The memory that encoding takes at most, in bytes, the pixels included. Noise was measured, which takes the most.
pub(super) fn memory(variant: Variant, pixels: u64, may_be_transparent: bool) -> u64 {
    let each = match variant.format() {
        // Alpha is coded without loss whatever the quality.
        Format::WebP if may_be_transparent => 52,
        Format::WebP if pixels <= webp::EXACT_PIXELS => 44,
        Format::WebP if pixels <= webp::BUFFERED_PIXELS => 38,
        Format::Png if pixels <= png::OPTIMISED_PIXELS => 32,
        Format::WebP | Format::Jpeg | Format::Png => 12,
        Format::Avif if variant.quality() <= 80 => 88,
        Format::Avif => 384,
    };
    pixels * each
}

/// Collects what an encoder writes, and stops it after the deadline.
struct Output {
    bytes: Vec<u8>,
    limits: RenderLimits,
}

impl Output {
    fn new(limits: RenderLimits) -> Self {
        Output { bytes: Vec::new(), limits }
    }

    fn check_time(&self) -> Result<(), PictureError> {
        self.limits.check_time()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        /// Bytes between two looks at the clock: encoders write some bytes at a time.
        const STEP: usize = 16 * 1024;
        let before = self.bytes.len() / STEP;
        let missing = bytes.len().saturating_sub(self.bytes.capacity() - self.bytes.len());
        if missing > 0 {
            // Not twice as much, as a vector takes by itself: products are large.
            self.bytes.reserve_exact(bytes.len().max(self.bytes.len() / 4).max(4096));
        }
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() / STEP > before {
            self.check_time().map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failed(error: &dyn std::fmt::Display) -> PictureError {
    PictureError::Encoding(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use image::{Rgb, RgbImage};

    use super::*;
    use crate::image::MediaType;
    use crate::picture::decode;

    const LIMITS: RenderLimits = RenderLimits { pixels: 4_000_000, deadline: None };

    /// A picture with slopes, edges and fine texture in all three channels.
    fn busy(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            Rgb([x * 2, !y, (x ^ y) * 3].map(|it: u32| u8::try_from(it & 255).unwrap()))
        })
    }

    fn shown(bytes: &[u8], media_type: MediaType) -> DynamicImage {
        decode::decode(bytes, media_type, LIMITS).unwrap()
    }

    #[test]
    fn encoders_stop_when_the_time_is_over() {
        let picture = DynamicImage::ImageRgb8(busy(1500, 1500));
        let deadline = Some(Instant::now() + Duration::from_millis(1));
        let limits = RenderLimits { deadline, ..LIMITS };
        assert_eq!(webp(&picture, 85, 6, limits), Err(PictureError::TimedOut));
        assert_eq!(jpeg::encode(&picture, 85, limits), Err(PictureError::TimedOut));
        assert_eq!(png::encode(&picture, limits), Err(PictureError::TimedOut));
        assert!(webp(&picture, 85, 0, LIMITS).is_ok());
    }

    #[test]
    fn a_jpeg_that_is_stored_again_is_decoded_to_the_same_picture() {
        for (width, height) in [(200, 120), (17, 9), (1, 1)] {
            let picture = RgbImage::from_fn(width, height, |x, y| {
                Rgb([x, y, x ^ y].map(|it: u32| u8::try_from(it & 255).unwrap()))
            });
            for quality in [85, 95] {
                let bytes = jpeg::encode(&picture.clone().into(), quality, LIMITS).unwrap();
                let shown = shown(&bytes, MediaType::Jpeg).into_rgb8();
                let differences =
                    picture.iter().zip(shown.iter()).map(|(it, other)| it.abs_diff(*other));
                let sum: u32 = differences.map(u32::from).sum();
                assert!(sum < 5 * 3 * width * height, "{sum} of {width}×{height}");
            }
        }
    }

    #[test]
    fn a_jpeg_has_one_scan_with_tables_of_its_own_and_the_same_pixels() {
        for quality in [1, 80, 90, 91, 99] {
            let picture = busy(333, 77);
            let optimised = jpeg::encode(&picture.clone().into(), quality, LIMITS).unwrap();
            let scans = optimised.windows(2).filter(|it| *it == [0xFF, 0xDA]).count();
            assert_eq!(scans, 1);

            let mut plain = Vec::new();
            let mut encoder = jpeg_encoder::Encoder::new(&mut plain, quality);
            let subsampled = jpeg_encoder::SamplingFactor::F_2_2;
            let full = jpeg_encoder::SamplingFactor::F_1_1;
            encoder.set_sampling_factor(if quality > 90 { full } else { subsampled });
            encoder.set_chroma_subsampling_method(jpeg_encoder::ChromaSubsamplingMethod::Average);
            encoder.encode(&picture, 333, 77, jpeg_encoder::ColorType::Rgb).unwrap();
            assert!(optimised.len() <= plain.len(), "{quality}");
            assert_eq!(shown(&optimised, MediaType::Jpeg), shown(&plain, MediaType::Jpeg));
        }
    }

    #[test]
    fn a_broken_jpeg_is_not_rewritten() {
        let mut bytes = Vec::new();
        let encoder = jpeg_encoder::Encoder::new(&mut bytes, 80);
        encoder.encode(&busy(40, 40), 40, 40, jpeg_encoder::ColorType::Rgb).unwrap();
        assert!(huffman::optimise(&bytes).is_some());
        for end in 0..bytes.len() {
            let cut = [&bytes[..end], &[0xFF, 0xD9]].concat();
            assert!(end == bytes.len() - 2 || huffman::optimise(&cut).is_none(), "{end}");
            let mut flipped = bytes.clone();
            flipped[end] ^= 0x41;
            // It mustn't panic.
            huffman::optimise(&flipped);
        }
    }

    #[test]
    fn a_grey_picture_is_a_grey_jpeg() {
        let grey = RgbImage::from_fn(64, 64, |x, y| Rgb([u8::try_from(x + 2 * y).unwrap(); 3]));
        let bytes = jpeg::encode(&grey.into(), 90, LIMITS).unwrap();
        let frame = bytes.windows(2).position(|it| it == [0xFF, 0xC0]).unwrap();
        assert_eq!(bytes[frame + 9], 1, "components");
        let shown = shown(&bytes, MediaType::Jpeg).into_rgb8();
        assert!(shown.pixels().all(|it| it.0[0] == it.0[1] && it.0[1] == it.0[2]));
    }
}
