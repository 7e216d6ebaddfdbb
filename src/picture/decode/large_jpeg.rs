//! Decodes large JPEGs of the usual kinds by zune-jpeg, through the crate `image`: it keeps a few rows where jpeg-decoder keeps
//! whole planes.

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use super::super::{PictureError, RenderLimits};
use super::deadline::DeadlineReader;
use super::{broken, check_pixels, colours, pixels};

/// Reads the head of an image. The decoder gets its limits before anything is allocated for pixels.
fn open(bytes: &[u8], limits: RenderLimits) -> Result<impl ImageDecoder + '_, PictureError> {
    let mut reader =
        ImageReader::with_format(DeadlineReader::new(bytes, limits), ImageFormat::Jpeg);
    reader.limits(memory((0, 0), bytes));
    let mut decoder = reader.into_decoder().map_err(|error| broken(&error, limits))?;
    let size = decoder.dimensions();
    check_pixels(size, limits)?;
    decoder.set_limits(memory(size, bytes)).map_err(|error| broken(&error, limits))?;
    Ok(decoder)
}

/// Decodes an image, and converts its colours by the profile in it.
pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let mut decoder = open(bytes, limits)?;
    let profile = decoder.icc_profile().ok().flatten();
    let picture = DynamicImage::from_decoder(decoder).map_err(|error| broken(&error, limits))?;
    let mut picture = DynamicImage::ImageRgb8(picture.into_rgb8());
    if let Some(profile) = profile {
        colours::to_srgb(&mut picture, &profile)?;
    }
    Ok(picture)
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
