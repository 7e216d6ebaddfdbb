//! Converts colours to sRGB.

use image::DynamicImage;
use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

/// Converts colours by an embedded profile. Like in browsers, a profile that is malformed, or of another space than the
/// decoded pixels (CMYK), is ignored.
pub(super) fn to_srgb(picture: &mut DynamicImage, profile: &[u8]) {
    /// Bytes that are converted at a time: whole pixels of three and of four channels.
    const PIECE: usize = 12 * 4096;
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
    // In pieces: a copy of the whole would take as much memory again.
    let mut source = Vec::with_capacity(PIECE);
    for pixels in pixels.chunks_mut(PIECE) {
        source.clear();
        source.extend_from_slice(pixels);
        if transform.transform(&source, pixels).is_err() {
            pixels.copy_from_slice(&source);
        }
    }
}
