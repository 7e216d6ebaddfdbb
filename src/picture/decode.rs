//! From bytes to pixels: 8 bits a channel, sRGB, upright.

use std::io::Cursor;

use image::codecs::gif::GifDecoder;
use image::codecs::png::PngDecoder;
use image::codecs::webp::WebPDecoder;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};
use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

use super::PictureError;
use crate::image::MediaType;

/// What a picture may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of the source: width times height.
    pub pixels: u64,
}

/// Whether images of a type can be decoded.
///
/// AVIF, HEIC and JPEG XL can't: their decoders are C libraries of the system, or take minutes to build. They are
/// served as they are. So is SVG, which has no pixels.
#[must_use]
pub fn is_decodable(media_type: MediaType) -> bool {
    format(media_type).is_some()
}

fn format(media_type: MediaType) -> Option<ImageFormat> {
    match media_type {
        MediaType::Png => Some(ImageFormat::Png),
        MediaType::Jpeg => Some(ImageFormat::Jpeg),
        MediaType::Gif => Some(ImageFormat::Gif),
        MediaType::WebP => Some(ImageFormat::WebP),
        MediaType::Bmp => Some(ImageFormat::Bmp),
        MediaType::Ico => Some(ImageFormat::Ico),
        MediaType::Tiff => Some(ImageFormat::Tiff),
        MediaType::Avif | MediaType::Heic | MediaType::JpegXl | MediaType::Svg => None,
    }
}

/// Whether an image has more than one frame. Looks at the headers, and for a GIF past its first frame.
#[must_use]
pub fn is_animated(bytes: &[u8], media_type: MediaType) -> bool {
    let source = Cursor::new(bytes);
    match media_type {
        MediaType::Png => PngDecoder::new(source).and_then(|it| it.is_apng()).unwrap_or(false),
        MediaType::WebP => WebPDecoder::new(source).is_ok_and(|it| it.has_animation()),
        MediaType::Gif => {
            use image::AnimationDecoder;
            // The decoder is lazy: no more than two frames are ever looked at.
            GifDecoder::new(source).is_ok_and(|it| it.into_frames().take(2).flatten().count() > 1)
        }
        _ => false,
    }
}

/// The pixels of an image, or of its first frame, with its orientation applied and its colours in sRGB.
pub fn decode(
    bytes: &[u8],
    media_type: MediaType,
    limits: Limits,
) -> Result<DynamicImage, PictureError> {
    let format = format(media_type).ok_or(PictureError::Opaque(media_type))?;
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    // Sixteen bits in four channels are the most that a pixel has, and a decoder keeps up to as much beside.
    let mut memory = image::Limits::default();
    memory.max_alloc = Some(limits.pixels.saturating_mul(16));
    reader.limits(memory);
    let mut decoder = reader.into_decoder().map_err(|error| broken(&error))?;
    // Before anything is allocated for them.
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > limits.pixels {
        return Err(PictureError::TooManyPixels { width, height, limit: limits.pixels });
    }
    let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
    let profile = decoder.icc_profile().ok().flatten();
    let picture = DynamicImage::from_decoder(decoder).map_err(|error| broken(&error))?;
    let mut picture = if picture.color().has_alpha() {
        DynamicImage::ImageRgba8(picture.into_rgba8())
    } else {
        DynamicImage::ImageRgb8(picture.into_rgb8())
    };
    if let Some(profile) = profile {
        to_srgb(&mut picture, &profile);
    }
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// Converts colours by an embedded profile. One that can't be read, or is of another space than the pixels were
/// decoded to (CMYK), is passed over, as browsers do.
fn to_srgb(picture: &mut DynamicImage, profile: &[u8]) {
    let Ok(profile) = ColorProfile::new_from_slice(profile) else {
        return;
    };
    if profile.color_space != DataColorSpace::Rgb {
        return;
    }
    let layout = if picture.color().has_alpha() { Layout::Rgba } else { Layout::Rgb };
    let srgb = ColorProfile::new_srgb();
    let options = TransformOptions::default();
    let Ok(transform) = profile.create_transform_8bit(layout, &srgb, layout, options) else {
        return;
    };
    let pixels = match picture {
        DynamicImage::ImageRgb8(pixels) => &mut **pixels,
        DynamicImage::ImageRgba8(pixels) => &mut **pixels,
        _ => return,
    };
    let source = pixels.to_vec();
    if transform.transform(&source, pixels).is_err() {
        pixels.copy_from_slice(&source);
    }
}

/// What a client may know of an error: its first line, and not too much of it.
fn broken(error: &ImageError) -> PictureError {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    PictureError::Broken(line.chars().take(200).collect())
}
