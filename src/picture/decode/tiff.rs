//! Decodes the first page of a TIFF.

use image::{DynamicImage, ImageFormat};

use super::super::{PictureError, RenderLimits};
use super::{Measure, by_image};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    by_image::measure(bytes, ImageFormat::Tiff, limits, |pixels, colour| {
        pixels() * u64::from(colour.bytes_per_pixel())
    })
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    by_image::decode(bytes, ImageFormat::Tiff, limits)
}
