//! Decodes BMP.

use image::{DynamicImage, ImageFormat};

use super::super::{PictureError, RenderLimits};
use super::{Measure, by_image};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    by_image::measure(bytes, ImageFormat::Bmp, limits, |_, _| 0)
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    by_image::decode(bytes, ImageFormat::Bmp, limits)
}
