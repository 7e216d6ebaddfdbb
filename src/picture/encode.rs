//! From pixels to bytes.

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{DynamicImage, Rgb, RgbImage};
use webpx::{Stop, StopReason};

use super::{PictureError, RenderLimits};
use crate::image::variant::{Format, Variant};

/// Encodes a picture in the format and quality of a variant, without metadata.
pub fn encode(
    picture: &DynamicImage,
    variant: Variant,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    match variant.format() {
        Format::Avif => avif(picture, variant.quality()),
        Format::WebP => webp(picture, variant.quality(), variant.effort(), limits),
        Format::Jpeg => jpeg(picture, variant.quality()),
        Format::Png => png(picture),
    }
}

/// The memory that encoding takes at most, in bytes for each pixel, the pixels included.
pub(super) fn memory(format: Format) -> u64 {
    match format {
        Format::WebP | Format::Jpeg => 8,
        Format::Png => 12,
        Format::Avif => 64,
    }
}

/// Encodes lossy WebP by libwebp. `effort` is its method: 0 is quick, 6 is small and takes nine times as long.
pub fn webp(
    picture: &DynamicImage,
    quality: u8,
    effort: u8,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    libwebp(picture, limits, |encoder| encoder.quality(f32::from(quality)).method(effort))
}

/// Encodes lossless WebP by libwebp, which is small for pictures of few colours only.
pub fn exact_webp(picture: &DynamicImage, limits: RenderLimits) -> Result<Vec<u8>, PictureError> {
    libwebp(picture, limits, |encoder| encoder.lossless(true))
}

fn libwebp(
    picture: &DynamicImage,
    limits: RenderLimits,
    set: impl FnOnce(webpx::Encoder) -> webpx::Encoder,
) -> Result<Vec<u8>, PictureError> {
    /// Longest side in pixels that the format allows.
    const LONGEST: u32 = 16_383;
    let (width, height) = (picture.width(), picture.height());
    if width.max(height) > LONGEST {
        return Err(failed(&format!("WebP has at most {LONGEST} pixels a side")));
    }
    let opaque;
    let encoder = match picture {
        DynamicImage::ImageRgba8(pixels) if super::is_transparent(picture) => {
            webpx::Encoder::new_rgba(pixels.as_raw(), width, height)
        }
        DynamicImage::ImageRgb8(pixels) => webpx::Encoder::new_rgb(pixels.as_raw(), width, height),
        _ => {
            opaque = picture.to_rgb8();
            webpx::Encoder::new_rgb(opaque.as_raw(), width, height)
        }
    };
    set(encoder).encode(DeadlineProgress(limits)).map_err(|error| match limits.check_time() {
        Ok(()) => failed(&error),
        Err(late) => late,
    })
}

/// Stops the encoder after the deadline.
struct DeadlineProgress(RenderLimits);

impl Stop for DeadlineProgress {
    fn check(&self) -> Result<(), StopReason> {
        self.0.check_time().map_err(|_late| StopReason::TimedOut)
    }
}

/// Encodes AVIF by rav1e at its quickest: 512×512 pixels take a third of a second on one core, six times as long as
/// WebP.
pub fn avif(picture: &DynamicImage, quality: u8) -> Result<Vec<u8>, PictureError> {
    const QUICKEST: u8 = 10;
    let encoder = ravif::Encoder::new()
        .with_quality(f32::from(quality))
        .with_alpha_quality(f32::from(quality))
        .with_speed(QUICKEST)
        .with_num_threads(Some(1));
    let size = |length: u32| usize::try_from(length).unwrap_or(usize::MAX);
    let (width, height) = (size(picture.width()), size(picture.height()));
    let outcome = if super::is_transparent(picture) {
        let pixels = picture.to_rgba8();
        let pixels: Vec<_> = pixels.pixels().map(|it| ravif::RGBA8::from(it.0)).collect();
        encoder.encode_rgba(ravif::Img::new(&pixels[..], width, height))
    } else {
        let pixels = picture.to_rgb8();
        let pixels: Vec<_> = pixels.pixels().map(|it| ravif::RGB8::from(it.0)).collect();
        encoder.encode_rgb(ravif::Img::new(&pixels[..], width, height))
    };
    outcome.map(|encoded| encoded.avif_file).map_err(|error| failed(&error))
}

/// Encodes baseline JPEG in one scan. Transparent pixels are put on white, the background of most pages.
pub fn jpeg(picture: &DynamicImage, quality: u8) -> Result<Vec<u8>, PictureError> {
    let flat = flatten(picture);
    let sides = (u16::try_from(flat.width()), u16::try_from(flat.height()));
    let (Ok(width), Ok(height)) = sides else {
        return Err(failed(&"JPEG has at most 65,535 pixels a side"));
    };
    let mut bytes = Vec::new();
    // Optimised Huffman tables would make a picture of 512×512 pixels 1 to 9 % smaller, but with them the encoder
    // writes a scan for each component. Few others do, and zune-jpeg, which `image` uses, decodes that to stripes.
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, quality);
    // The default takes the colour of one pixel for all four, which frays edges between colours.
    encoder.set_chroma_subsampling_method(jpeg_encoder::ChromaSubsamplingMethod::Average);
    encoder
        .encode(flat.as_raw(), width, height, jpeg_encoder::ColorType::Rgb)
        .map_err(|error| failed(&error))?;
    Ok(bytes)
}

fn png(picture: &DynamicImage) -> Result<Vec<u8>, PictureError> {
    let mut bytes = Vec::new();
    let encoder =
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive);
    picture.write_with_encoder(encoder).map_err(|error| failed(&error))?;
    Ok(bytes)
}

#[expect(clippy::cast_possible_truncation, reason = "an average of bytes is a byte")]
fn flatten(picture: &DynamicImage) -> RgbImage {
    let DynamicImage::ImageRgba8(pixels) = picture else {
        return picture.to_rgb8();
    };
    RgbImage::from_fn(pixels.width(), pixels.height(), |x, y| {
        let [r, g, b, a] = pixels.get_pixel(x, y).0;
        let alpha = u32::from(a);
        Rgb([r, g, b].map(|it| ((u32::from(it) * alpha + 255 * (255 - alpha) + 127) / 255) as u8))
    })
}

fn failed(error: &dyn std::fmt::Display) -> PictureError {
    PictureError::Encoding(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::image::MediaType;
    use crate::picture::decode;

    #[test]
    fn a_jpeg_that_is_stored_again_is_decoded_to_the_same_picture() {
        let colour = |x, y| Rgb([x, y, x ^ y].map(|it: u32| u8::try_from(it & 255).unwrap()));
        let picture = RgbImage::from_fn(200, 120, |x, y| colour(x / 2, 255 - y));
        let bytes = jpeg(&DynamicImage::ImageRgb8(picture.clone()), 85).unwrap();
        let limits = RenderLimits { pixels: 24_000, deadline: None };
        let shown = decode::decode(&bytes, MediaType::Jpeg, limits).unwrap().into_rgb8();
        let differences = picture.iter().zip(shown.iter()).map(|(it, other)| it.abs_diff(*other));
        let sum: u64 = differences.map(u64::from).sum();
        assert!(sum < 5 * 3 * 24_000, "{} a channel", sum / (3 * 24_000));
    }

    #[test]
    fn the_webp_encoder_stops_when_the_time_is_over() {
        let picture = DynamicImage::new_rgb8(2000, 2000);
        let deadline = Some(Instant::now() + Duration::from_millis(1));
        let limits = RenderLimits { pixels: 4_000_000, deadline };
        assert_eq!(webp(&picture, 85, 6, limits), Err(PictureError::TimedOut));
        let limits = RenderLimits { deadline: None, ..limits };
        assert!(webp(&picture, 85, 0, limits).is_ok());
    }
}
