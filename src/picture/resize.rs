//! Scales a picture down to bounds.

use fast_image_resize::images::{Image, ImageRef};
use fast_image_resize::{MulDiv, PixelType, ResizeOptions, Resizer};
use image::{DynamicImage, RgbImage, RgbaImage};

use super::PictureError;
use crate::image::bounds::{Bounds, Fit};

/// The size of the product, and the part of the source that it shows.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    width: u32,
    height: u32,
    /// Rectangle of the source: left, top, width and height.
    cut: (f64, f64, f64, f64),
}

/// Fits a picture into bounds. Transparent pixels have no weight (colours are premultiplied). Averages are taken of
/// sRGB values, which is the default of browsers, Pillow and libvips, too.
pub fn resize(picture: DynamicImage, bounds: Bounds) -> Result<DynamicImage, PictureError> {
    let plan = plan(picture.width(), picture.height(), bounds);
    if plan.keeps(&picture) {
        return Ok(picture);
    }
    Ok(scaled(picture, [plan])?.remove(0))
}

/// Fits a picture into one bounds and into others.
pub(super) fn resize_twice(
    picture: DynamicImage,
    one: Bounds,
    other: Bounds,
) -> Result<(DynamicImage, DynamicImage), PictureError> {
    let plans = [one, other].map(|bounds| plan(picture.width(), picture.height(), bounds));
    let mut both = scaled(picture, plans)?;
    let other = both.remove(1);
    Ok((both.remove(0), other))
}

/// Scales a picture as each plan says.
fn scaled<const N: usize>(
    mut picture: DynamicImage,
    plans: [Plan; N],
) -> Result<Vec<DynamicImage>, PictureError> {
    let kept = plans.map(|plan| plan.keeps(&picture).then(|| picture.clone()));
    let failed = |error: &dyn std::fmt::Display| PictureError::Encoding(error.to_string());
    let alpha = super::is_transparent(&picture);
    // In place: the resizer would make a copy of the whole.
    let alphas = MulDiv::new();
    if alpha && let DynamicImage::ImageRgba8(pixels) = &mut picture {
        let (width, height) = pixels.dimensions();
        let mut pixels = Image::from_slice_u8(width, height, pixels, PixelType::U8x4)
            .map_err(|error| failed(&error))?;
        alphas.multiply_alpha_inplace(&mut pixels).map_err(|error| failed(&error))?;
    }
    let (pixel, source) = match &picture {
        DynamicImage::ImageRgba8(pixels) => (PixelType::U8x4, pixels.as_raw()),
        DynamicImage::ImageRgb8(pixels) => (PixelType::U8x3, pixels.as_raw()),
        _ => return Err(PictureError::Encoding("pixels of an unknown kind".to_owned())),
    };
    let source = ImageRef::new(picture.width(), picture.height(), source, pixel)
        .map_err(|error| failed(&error))?;
    let product = |plan: Plan| {
        let mut product = Image::new(plan.width, plan.height, pixel);
        let (left, top, width, height) = plan.cut;
        let options = ResizeOptions::new().crop(left, top, width, height).use_alpha(false);
        Resizer::new().resize(&source, &mut product, &options).map_err(|error| failed(&error))?;
        if alpha {
            alphas.divide_alpha_inplace(&mut product).map_err(|error| failed(&error))?;
        }
        let pixels = product.into_vec();
        let product = match pixel {
            PixelType::U8x4 => {
                RgbaImage::from_raw(plan.width, plan.height, pixels).map(DynamicImage::ImageRgba8)
            }
            _ => RgbImage::from_raw(plan.width, plan.height, pixels).map(DynamicImage::ImageRgb8),
        };
        product.ok_or_else(|| PictureError::Encoding("pixels are missing".to_owned()))
    };
    let products = plans.into_iter().zip(kept);
    products.map(|(plan, kept)| kept.map_or_else(|| product(plan), Ok)).collect()
}

/// Width and height of a picture of some size after it is fitted into bounds.
pub(crate) fn size((width, height): (u32, u32), bounds: Bounds) -> (u32, u32) {
    let plan = plan(width, height, bounds);
    (plan.width, plan.height)
}

impl Plan {
    /// Returns whether the product is the picture as it is.
    fn keeps(self, picture: &DynamicImage) -> bool {
        let size = (picture.width(), picture.height());
        let whole = (0.0, 0.0, f64::from(size.0), f64::from(size.1));
        (self.width, self.height) == size && self.cut == whole
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes are positive and smaller than the source or its bounds"
)]
fn plan(width: u32, height: u32, bounds: Bounds) -> Plan {
    let (w, h) = (f64::from(width), f64::from(height));
    let whole = (0.0, 0.0, w, h);
    let (across, down) =
        (bounds.width.map(|it| f64::from(it) / w), bounds.height.map(|it| f64::from(it) / h));
    let most = if bounds.enlarge { f64::INFINITY } else { 1.0 };
    let pixels = |length: f64| (length.round() as u32).max(1);
    let scaled = |scale: f64| {
        let scale = scale.min(most);
        Plan { width: pixels(w * scale), height: pixels(h * scale), cut: whole }
    };
    match (across, down, bounds.fit) {
        (None, None, _) => Plan { width, height, cut: whole },
        (Some(scale), None, _) | (None, Some(scale), _) => scaled(scale),
        (Some(across), Some(down), Fit::Contain) => scaled(across.min(down)),
        (Some(across), Some(down), Fit::Fill) => Plan {
            width: pixels(w * across.min(most)),
            height: pixels(h * down.min(most)),
            cut: whole,
        },
        (Some(across), Some(down), Fit::Cover) => {
            // Bounds that are larger than the source shrink to its size and keep their shape.
            let wanted = across.max(down).max(f64::MIN_POSITIVE);
            let reduced = (most / wanted).min(1.0);
            let (bounds_w, bounds_h) = (w * across * reduced, h * down * reduced);
            let scale = wanted * reduced;
            let (cut_w, cut_h) = ((bounds_w / scale).min(w), (bounds_h / scale).min(h));
            Plan {
                width: pixels(bounds_w),
                height: pixels(bounds_h),
                cut: ((w - cut_w) / 2.0, (h - cut_h) / 2.0, cut_w, cut_h),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use image::{Rgba, RgbaImage};

    use super::*;

    fn bounds(width: u32, height: u32, fit: Fit) -> Bounds {
        let some = |length| Some(length).filter(|it| *it > 0);
        Bounds { width: some(width), height: some(height), fit, enlarge: false }
    }

    #[test]
    fn a_picture_keeps_its_shape_inside_bounds_and_is_cut_to_cover_them() {
        let wide = (400, 200);
        assert_eq!(size(wide, bounds(100, 100, Fit::Contain)), (100, 50));
        assert_eq!(size(wide, bounds(100, 0, Fit::Contain)), (100, 50));
        assert_eq!(size(wide, bounds(0, 100, Fit::Contain)), (200, 100));
        assert_eq!(size(wide, bounds(100, 100, Fit::Cover)), (100, 100));
        assert_eq!(plan(400, 200, bounds(100, 100, Fit::Cover)).cut, (100.0, 0.0, 200.0, 200.0));
        assert_eq!(size(wide, bounds(100, 100, Fit::Fill)), (100, 100));
        assert_eq!(size((10_000, 1), bounds(16, 16, Fit::Contain)), (16, 1));
    }

    #[test]
    fn nothing_is_enlarged_unless_it_may_be() {
        let small = (40, 20);
        for fit in [Fit::Contain, Fit::Fill] {
            assert_eq!(size(small, bounds(100, 100, fit)), (40, 20));
        }
        // The shape of the bounds, as large as the source allows.
        assert_eq!(size(small, bounds(100, 100, Fit::Cover)), (20, 20));
        let enlarged = Bounds { enlarge: true, ..bounds(100, 100, Fit::Cover) };
        assert_eq!(size(small, enlarged), (100, 100));
        assert_eq!(size((1, 1), enlarged), (100, 100));
    }

    #[test]
    fn the_colour_of_transparent_pixels_does_not_show() {
        let mut pixels = RgbaImage::from_pixel(64, 64, Rgba([255, 0, 0, 0]));
        for x in 0..32 {
            for y in 0..64 {
                pixels.put_pixel(x, y, Rgba([0, 0, 255, 255]));
            }
        }
        let small = resize(DynamicImage::ImageRgba8(pixels), bounds(9, 9, Fit::Contain)).unwrap();
        for pixel in small.to_rgba8().pixels().filter(|pixel| pixel.0[3] > 8) {
            assert!(pixel.0[0] < 16, "{pixel:?}");
        }
    }
}
