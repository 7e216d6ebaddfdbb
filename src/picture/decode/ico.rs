//! Decodes the best picture of an icon.

use image::{DynamicImage, ImageFormat};

use super::super::{PictureError, RenderLimits};
use super::{Measure, by_image, png};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    match png_of_icon(bytes) {
        Some(png) => png::measure(png, limits),
        None => by_image::measure(bytes, ImageFormat::Ico, limits, |_, _| 0),
    }
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    match png_of_icon(bytes) {
        Some(png) => png::decode(png, limits),
        None => by_image::decode(bytes, ImageFormat::Ico, limits),
    }
}

/// The PNG inside an icon, if its best picture is one. The icon decoder sets it no limits, and refuses PNGs without
/// alpha, which favicon generators write.
fn png_of_icon(bytes: &[u8]) -> Option<&[u8]> {
    let count = u16::from_le_bytes(*bytes.get(4..)?.first_chunk()?);
    let (entries, _) = bytes.get(6..)?.get(..16 * usize::from(count))?.as_chunks::<16>();
    // The choice must be that of the icon decoder, which gets all other icons. A side of 0 means 256.
    let score = |entry: &[u8; 16]| {
        let side = |at: usize| u32::from(entry[at].wrapping_sub(1)) + 1;
        (u16::from_le_bytes([entry[6], entry[7]]), side(0) * side(1))
    };
    let (last, others) = entries.split_last()?;
    let best = others.iter().fold(last, |best, it| if score(it) > score(best) { it } else { best });
    let offset = u32::from_le_bytes(*best.last_chunk()?);
    bytes.get(usize::try_from(offset).ok()?..).filter(|it| it.starts_with(b"\x89PNG\r\n\x1a\n"))
}
