//! WebP, by libwebp.

use image::DynamicImage;
use webpx::{Encoder, EncoderConfig, Stop, StopReason};

use super::failed;
use super::flatness::{colours, flatness};
use crate::picture::{PictureError, RenderLimits, is_transparent};

/// Pixels up to which WebP without loss is tried: it takes three times the memory.
pub(super) const EXACT_PIXELS: u64 = 1 << 21;

/// Pixels up to which libwebp buffers its tokens. Without them it takes 1.9 times as long and, of noise, a quarter of the
/// memory.
pub(super) const BUFFERED_PIXELS: u64 = 1 << 22;

/// Encodes a picture, without loss if that is smaller.
pub(super) fn encode(
    picture: &DynamicImage,
    quality: u8,
    effort: u8,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    let lossy = lossy(picture, quality, effort, limits)?;
    if !may_be_smaller_exactly(picture) {
        return Ok(lossy);
    }
    let exact = exact(picture, limits)?;
    Ok(if exact.len() <= lossy.len() { exact } else { lossy })
}

/// True of text, diagrams and interfaces, of which lossless WebP is often smaller. It never was for more colours, which
/// come from slopes and photographs; 512×512 pixels of those take a tenth of a second.
fn may_be_smaller_exactly(picture: &DynamicImage) -> bool {
    /// Colours of dithered and posterised pictures.
    const FEW: u64 = 16;
    /// Colours of an interface with smooth letters, and pixels for each of them: a thumbnail has fewer.
    const MANY: u64 = 2048;
    const PIXELS_EACH: u64 = 32;
    if pixels(picture) > EXACT_PIXELS {
        return false;
    }
    let flatness = flatness(picture);
    let most = if flatness > 0.5 { MANY.min(pixels(picture) / PIXELS_EACH).max(FEW) } else { FEW };
    flatness > 0.2 && colours(picture, most).is_some()
}

/// Encodes lossy WebP by libwebp. `effort` is its method: 0 is quick, 6 is small and takes nine times as long.
pub fn lossy(
    picture: &DynamicImage,
    quality: u8,
    effort: u8,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    let config = EncoderConfig::new().quality(f32::from(quality)).method(effort);
    libwebp(picture, limits, config.low_memory(pixels(picture) > BUFFERED_PIXELS))
}

/// Encodes lossless WebP by libwebp, which is small for pictures of few colours only.
pub fn exact(picture: &DynamicImage, limits: RenderLimits) -> Result<Vec<u8>, PictureError> {
    libwebp(picture, limits, EncoderConfig::new().lossless(true))
}

fn libwebp(
    picture: &DynamicImage,
    limits: RenderLimits,
    config: EncoderConfig,
) -> Result<Vec<u8>, PictureError> {
    let (width, height) = (picture.width(), picture.height());
    let opaque;
    let encoder = match picture {
        DynamicImage::ImageRgba8(pixels) if is_transparent(picture) => {
            Encoder::new_rgba(pixels.as_raw(), width, height)
        }
        DynamicImage::ImageRgb8(pixels) => Encoder::new_rgb(pixels.as_raw(), width, height),
        _ => {
            opaque = picture.to_rgb8();
            Encoder::new_rgb(opaque.as_raw(), width, height)
        }
    };
    encoder.config(config).encode(DeadlineProgress(limits)).map_err(|error| {
        match limits.check_time() {
            Ok(()) => failed(&error),
            Err(late) => late,
        }
    })
}

fn pixels(picture: &DynamicImage) -> u64 {
    u64::from(picture.width()) * u64::from(picture.height())
}

/// Stops the encoder after the deadline.
struct DeadlineProgress(RenderLimits);

impl Stop for DeadlineProgress {
    fn check(&self) -> Result<(), StopReason> {
        self.0.check_time().map_err(|_late| StopReason::TimedOut)
    }
}

#[cfg(test)]
mod tests {
    use image::{Rgba, RgbaImage};

    use super::*;

    const LIMITS: RenderLimits = RenderLimits { pixels: 1_000_000, deadline: None };

    fn is_exact(bytes: &[u8]) -> bool {
        bytes.windows(4).any(|it| it == b"VP8L")
    }

    #[test]
    fn a_flat_picture_is_encoded_without_loss() {
        // Bars, some of them translucent.
        let flat = RgbaImage::from_fn(256, 256, |x, y| match (x / 32 + y / 64) % 3 {
            0 => Rgba([255, 255, 255, 255]),
            1 => Rgba([37, 99, 235, 255]),
            _ => Rgba([220, 38, 38, 128]),
        });
        let opaque = DynamicImage::ImageRgba8(flat.clone()).into_rgb8();
        for picture in [DynamicImage::ImageRgba8(flat), DynamicImage::ImageRgb8(opaque)] {
            let bytes = encode(&picture, 80, 4, LIMITS).unwrap();
            assert!(is_exact(&bytes));
            assert!(bytes.len() < 400, "{}", bytes.len());
        }
    }

    #[test]
    fn slopes_and_noise_are_not_tried_without_loss() {
        let byte = |value: u32| u8::try_from(value & 255).unwrap();
        let slope =
            RgbaImage::from_fn(256, 256, |x, y| Rgba([byte(x), byte(y), byte(x / 2 + y / 2), 255]));
        let noise = RgbaImage::from_fn(256, 256, |x, y| {
            let value = (x * 7919 + y * 104_729).wrapping_mul(2_654_435_761) >> 8;
            Rgba([byte(value), byte(value >> 8), byte(value >> 4), 255])
        });
        for picture in [slope, noise] {
            assert!(!may_be_smaller_exactly(&picture.into()));
        }
    }
}
