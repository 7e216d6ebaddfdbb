//! Decodes WebP.

use image::{DynamicImage, ImageFormat};

use super::super::{PictureError, RenderLimits};
use super::{Measure, by_image};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    by_image::measure(bytes, ImageFormat::WebP, limits, |pixels, colour| match () {
        () if bytes.get(12..16) == Some(b"VP8L") => 4 * pixels(),
        // Planes of brightness, two of colour at half the resolution, and of alpha.
        () if colour.has_alpha() => 5 * pixels() / 2,
        () => 3 * pixels() / 2,
    })
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    by_image::decode(bytes, ImageFormat::WebP, limits)
}
