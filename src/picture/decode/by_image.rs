//! Decodes by the crate `image`.

use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use super::super::{PictureError, RenderLimits};
use super::deadline::DeadlineReader;
use super::{Measure, broken, check_pixels, colours, exif, pixels};

/// Reads the head of an image. The decoder gets its limits before anything is allocated for pixels.
pub(super) fn open(
    bytes: &[u8],
    format: ImageFormat,
    limits: RenderLimits,
) -> Result<impl ImageDecoder + '_, PictureError> {
    let mut reader = ImageReader::with_format(DeadlineReader::new(bytes, limits), format);
    reader.limits(memory((0, 0), bytes));
    let mut decoder = reader.into_decoder().map_err(|error| broken(&error, limits))?;
    let size = decoder.dimensions();
    check_pixels(size, limits)?;
    decoder.set_limits(memory(size, bytes)).map_err(|error| broken(&error, limits))?;
    Ok(decoder)
}

/// Measures an image. `beside` are the bytes that the decoder keeps beside its output.
pub(super) fn measure(
    bytes: &[u8],
    format: ImageFormat,
    limits: RenderLimits,
    beside: impl FnOnce(&dyn Fn() -> u64, ColorType) -> u64,
) -> Result<Measure, PictureError> {
    let mut decoder = open(bytes, format, limits)?;
    let (size, colour) = (decoder.dimensions(), decoder.color_type());
    let is_direct = matches!(colour, ColorType::Rgb8 | ColorType::Rgba8);
    let converted = if is_direct { 0 } else { decoder.total_bytes() };
    let beside = beside(&|| pixels(size), colour);
    let orientation = orientation(&mut decoder);
    Ok(Measure::new(size, orientation, colour.has_alpha(), converted + beside, bytes))
}

/// Decodes an image, and converts its colours by the profile in it.
pub(super) fn decode(
    bytes: &[u8],
    format: ImageFormat,
    limits: RenderLimits,
) -> Result<DynamicImage, PictureError> {
    let mut decoder = open(bytes, format, limits)?;
    let profile = decoder.icc_profile().ok().flatten();
    let picture = DynamicImage::from_decoder(decoder).map_err(|error| broken(&error, limits))?;
    let mut picture = in_8_bits(picture);
    if let Some(profile) = profile {
        colours::to_srgb(&mut picture, &profile)?;
    }
    Ok(picture)
}

/// Converts a picture to 8 bits a channel, with alpha if it has it.
pub(super) fn in_8_bits(picture: DynamicImage) -> DynamicImage {
    if picture.color().has_alpha() {
        DynamicImage::ImageRgba8(picture.into_rgba8())
    } else {
        DynamicImage::ImageRgb8(picture.into_rgb8())
    }
}

/// The rotation that the picture needs.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    let exif = decoder.exif_metadata().ok().flatten();
    exif.map_or(Orientation::NoTransforms, |exif| exif::orientation(&exif))
}

/// The memory limit of a decoder for an image of some size.
fn memory(size: (u32, u32), bytes: &[u8]) -> image::Limits {
    /// For a colour profile, and for the parts of tiles beyond the edges of the picture.
    const BESIDES: u64 = 32 << 20;
    let mut memory = image::Limits::default();
    // A pixel has at most four channels of sixteen bits, and a decoder needs up to as much again. Texts are kept as
    // they are in the file.
    let most = pixels(size).saturating_mul(16) + 2 * bytes.len() as u64 + BESIDES;
    memory.max_alloc = Some(most);
    memory
}
