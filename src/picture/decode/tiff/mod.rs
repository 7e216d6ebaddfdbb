//! Decodes the first page of a TIFF.
//!
//! The crate `tiff` reads the tags. Its own decoder has no palettes, faxes of Group 3, nor subsampled colours, ignores the order
//! of bits and multiplied alpha, and panics on tiled planes.

mod chunk;
mod page;

use image::{DynamicImage, RgbImage, RgbaImage};

use super::super::{PictureError, RenderLimits};
use super::{Measure, colours, pixels};
use page::{Colours, Numbers, Page};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    /// Rows of values, palettes and tables.
    const BESIDES: u64 = 64;
    let page = Page::read(bytes, limits)?;
    // A strip or tile as it is in the file, its JPEG with planes and coefficients, and its samples.
    let chunk = if page.compression == 7 { 18 } else { 2 };
    let inks = if page.colours == Colours::Cmyk { 5 + 3 } else { 0 };
    let row = BESIDES * u64::from(page.chunk.0) * page.samples as u64;
    let beside = chunk * page.chunk_bytes() + inks * pixels(page.size) + row;
    Ok(Measure::new(page.size, page.orientation, page.alpha.is_some(), beside, bytes))
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let page = Page::read(bytes, limits)?;
    // Floats from 0 to 1 are as common as those from 0 to 255, and no tag tells which they are.
    let mut scale = 255.0;
    if page.numbers == Numbers::Float {
        let mut most = 0.0_f64;
        each_row(&page, bytes, limits, |_, values| {
            most = values.iter().copied().filter(|it| it.is_finite()).fold(most, f64::max);
        })?;
        scale = if most <= 1.0 { 1.0 } else { 255.0 };
    } else if page.bits <= 16 {
        scale = f64::from((1_u32 << page.bits) - 1);
    }
    let (width, height) = page.size;
    let channels = match (page.colours, page.alpha) {
        (Colours::Cmyk, None) => 4,
        (Colours::Cmyk, Some(_)) => 5,
        (_, None) => 3,
        (_, Some(_)) => 4,
    };
    let mut picture = vec![0; width as usize * height as usize * channels];
    each_row(&page, bytes, limits, |first, values| {
        let values = values.chunks_exact(page.samples);
        for (pixel, values) in picture[first * channels..].chunks_exact_mut(channels).zip(values) {
            paint(&page, scale, values, pixel);
        }
    })?;
    let profile = page.profile.as_deref();
    if page.colours == Colours::Cmyk {
        let alpha: Vec<u8> = picture.iter().skip(4).step_by(channels).copied().collect();
        if channels == 5 {
            let mut nth = 0;
            picture.retain(|_| {
                nth += 1;
                nth % 5 != 0
            });
        }
        let rgb = colours::cmyk_to_rgb(&picture, profile);
        if page.alpha.is_none() {
            return finished(RgbImage::from_raw(width, height, rgb).map(DynamicImage::ImageRgb8));
        }
        let (rgb, _) = rgb.as_chunks::<3>();
        let rgba = rgb.iter().zip(alpha).flat_map(|([r, g, b], a)| [*r, *g, *b, a]).collect();
        return finished(RgbaImage::from_raw(width, height, rgba).map(DynamicImage::ImageRgba8));
    }
    let mut picture = finished(match page.alpha {
        Some(_) => RgbaImage::from_raw(width, height, picture).map(DynamicImage::ImageRgba8),
        None => RgbImage::from_raw(width, height, picture).map(DynamicImage::ImageRgb8),
    })?;
    if let Some(profile) = profile {
        colours::to_srgb(&mut picture, profile)?;
    }
    Ok(picture)
}

fn refused(reason: &str) -> PictureError {
    PictureError::Unsupported(reason.to_owned())
}

fn cut_off(reason: &str) -> PictureError {
    PictureError::Broken(reason.to_owned())
}

fn finished(picture: Option<DynamicImage>) -> Result<DynamicImage, PictureError> {
    picture.ok_or_else(|| refused("the strips and tiles don't make a picture"))
}

/// Unpacks all strips and tiles. The closure gets the number of the first pixel of a row of them, and the values of its pixels
/// inside of the picture.
fn each_row(
    page: &Page,
    bytes: &[u8],
    limits: RenderLimits,
    mut each: impl FnMut(usize, &[f64]),
) -> Result<(), PictureError> {
    let (width, height) = page.size;
    let (across, down) = page.chunks();
    let planes = if page.is_planar { page.samples } else { 1 };
    let row_bytes = usize::try_from(page.row_bytes()).unwrap_or(usize::MAX);
    let (mut plane_values, mut values) = (Vec::new(), Vec::new());
    for nth in 0..across as usize * down as usize {
        let (column, row) = (nth % across as usize, nth / across as usize);
        let (x, y) = (column * page.chunk.0 as usize, row * page.chunk.1 as usize);
        let top = u32::try_from(y).unwrap_or(height);
        let mut unpacked = Vec::with_capacity(planes);
        for plane in 0..planes {
            let nth = plane * across as usize * down as usize + nth;
            let (chunk, rows) = page.chunk_in(bytes, nth, top)?;
            unpacked.push(chunk::unpack(page, chunk, rows, limits)?);
        }
        let columns = (page.chunk.0 as usize).min(width as usize - x);
        let rows = (page.chunk.1 as usize).min(height as usize - y);
        for row in 0..rows {
            limits.check_time()?;
            let of = |plane: usize| &unpacked[plane][row * row_bytes..(row + 1) * row_bytes];
            if planes == 1 {
                chunk::values(page, of(0), &mut values);
            } else {
                values.clear();
                values.resize(columns * planes, 0.0);
                for plane in 0..planes {
                    chunk::values(page, of(plane), &mut plane_values);
                    let samples = values.iter_mut().skip(plane).step_by(planes);
                    samples.zip(&plane_values).for_each(|(to, value)| *to = *value);
                }
            }
            let inside = values.get(..columns * page.samples);
            each((y + row) * width as usize + x, inside.ok_or_else(|| cut_off("a row is short"))?);
        }
    }
    Ok(())
}

/// Converts the values of a pixel to colours, and alpha if there is some. `scale` is the value of full light.
fn paint(page: &Page, scale: f64, values: &[f64], pixel: &mut [u8]) {
    let full = |value: f64| value / scale;
    let alpha = page.alpha.map(|(at, is_multiplied)| (full(values[at]), is_multiplied));
    let unmultiplied = |value: f64| match alpha {
        Some((alpha, true)) if alpha > 0.0 => (value / alpha).min(1.0),
        Some((_, true)) => 0.0,
        _ => value,
    };
    match page.colours {
        Colours::WhiteIsZero => pixel[..3].fill(to_8_bits(unmultiplied(1.0 - full(values[0])))),
        Colours::BlackIsZero => pixel[..3].fill(to_8_bits(unmultiplied(full(values[0])))),
        Colours::Palette => {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "these are whole numbers of up to 8 bits"
            )]
            let at = values[0] as usize;
            let colours = page.palette.len() / 3;
            for (nth, to) in pixel[..3].iter_mut().enumerate() {
                let value = page.palette[nth * colours + at];
                *to = to_8_bits(unmultiplied(f64::from(value) / 65535.0));
            }
        }
        Colours::Rgb => {
            for (to, value) in pixel[..3].iter_mut().zip(values) {
                *to = to_8_bits(unmultiplied(full(*value)));
            }
        }
        // What a JPEG has unpacked is RGB already.
        Colours::YCbCr if page.compression == 7 => {
            for (to, value) in pixel[..3].iter_mut().zip(values) {
                *to = to_8_bits(full(*value));
            }
        }
        Colours::YCbCr => {
            let (y, cb, cr) = (values[0], values[1] - 128.0, values[2] - 128.0);
            let (of_red, of_blue) = page.weights;
            let red = y + cr * (2.0 - 2.0 * of_red);
            let blue = y + cb * (2.0 - 2.0 * of_blue);
            let green = (y - of_red * red - of_blue * blue) / (1.0 - of_red - of_blue);
            for (to, value) in pixel[..3].iter_mut().zip([red, green, blue]) {
                *to = to_8_bits(unmultiplied(full(value)));
            }
        }
        Colours::Cmyk => {
            for (to, value) in pixel[..4].iter_mut().zip(values) {
                *to = to_8_bits(unmultiplied(full(*value)));
            }
        }
    }
    if let (Some((alpha, _)), Some(to)) = (alpha, pixel.last_mut()) {
        *to = to_8_bits(alpha);
    }
}

/// From 0 to 1 to 0 to 255. What is no number becomes 0.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a cast of a float ends at the bounds of its type"
)]
fn to_8_bits(value: f64) -> u8 {
    // Rounds: `round` calls a function, and took as long as all else.
    (value * 255.0 + 0.5) as u8
}

#[cfg(test)]
mod tests {
    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    const LIMITS: RenderLimits = RenderLimits { pixels: 10_000, deadline: None };

    /// A TIFF of one strip of 4×1 pixels, whose tags are SHORTs. Later ones replace the first.
    fn tiff(strip: &[u8], tags: &[(u16, &[u16])]) -> Vec<u8> {
        let length = u16::try_from(strip.len()).unwrap();
        let defaults: [(u16, &[u16]); 8] = [
            (256, &[4]),
            (257, &[1]),
            (258, &[8]),
            (259, &[1]),
            (262, &[1]),
            (273, &[8]),
            (278, &[1]),
            (279, &[length]),
        ];
        let mut all: std::collections::BTreeMap<u16, &[u16]> = defaults.into();
        all.extend(tags.iter().copied());
        let directory = u32::from(8 + length + length % 2);
        let mut values = directory + 2 + 12 * u32::try_from(all.len()).unwrap() + 4;
        let mut bytes = b"II\x2a\0".to_vec();
        bytes.extend(directory.to_le_bytes());
        bytes.extend(strip);
        bytes.resize(directory as usize, 0);
        bytes.extend(u16::try_from(all.len()).unwrap().to_le_bytes());
        let mut outside = Vec::new();
        for (tag, numbers) in all {
            let mut value: Vec<u8> = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
            let count = u32::try_from(numbers.len()).unwrap();
            if value.len() > 4 {
                let offset = values.to_le_bytes();
                values += u32::try_from(value.len()).unwrap();
                outside.extend(std::mem::replace(&mut value, offset.to_vec()));
            }
            value.resize(4, 0);
            bytes.extend(tag.to_le_bytes().into_iter().chain(3_u16.to_le_bytes()));
            bytes.extend(count.to_le_bytes().into_iter().chain(value));
        }
        bytes.extend([0; 4]);
        bytes.extend(outside);
        bytes
    }

    fn decoded(bytes: &[u8]) -> Result<DynamicImage, PictureError> {
        decode(bytes, MediaType::Tiff, LIMITS)
    }

    /// The red channel of the pixels.
    fn reds(strip: &[u8], tags: &[(u16, &[u16])]) -> Vec<u8> {
        let picture = decoded(&tiff(strip, tags)).unwrap();
        picture.to_rgb8().pixels().map(|pixel| pixel.0[0]).collect()
    }

    #[test]
    fn grey_of_all_depths_is_shown() {
        for (strip, tags, expected) in [
            (&[0b1010_0000_u8][..], &[(258, &[1_u16][..])][..], [255, 0, 255, 0]),
            (&[0b0101_0000], &[(258, &[1]), (262, &[0])], [255, 0, 255, 0]),
            (&[0b0000_0101], &[(258, &[1]), (266, &[2])], [255, 0, 255, 0]),
            (&[0b0001_1011], &[(258, &[2])], [0, 85, 170, 255]),
            (&[0x0f, 0x36], &[(258, &[4])], [0, 255, 51, 102]),
            (&[0, 1, 2, 255], &[], [0, 1, 2, 255]),
            (&[0, 0x0f, 0xff, 0x80, 0x08, 0x00], &[(258, &[12])], [0, 255, 128, 128]),
            (&[0, 0, 0xff, 0xff, 0, 0x80, 1, 1], &[(258, &[16])], [0, 255, 128, 1]),
        ] {
            assert_eq!(reds(strip, tags), expected, "{tags:?}");
        }
    }

    #[test]
    fn floats_to_one_and_to_255_are_shown() {
        let floats = |values: [f32; 4]| values.map(f32::to_le_bytes).concat();
        let tags: [(u16, &[u16]); 2] = [(258, &[32]), (339, &[3])];
        assert_eq!(reds(&floats([0.0, 0.2, 1.0, f32::NAN]), &tags), [0, 51, 255, 0]);
        assert_eq!(reds(&floats([-5.0, 1.0, 255.0, 3e9]), &tags), [0, 1, 255, 255]);
    }

    #[test]
    fn alpha_is_told_by_its_tag() {
        let strip: Vec<u8> = [[100, 50, 0, 100]; 4].concat();
        let rgb: [(u16, &[u16]); 3] = [(258, &[8; 4]), (262, &[2]), (277, &[4])];
        for (kind, expected) in [
            (Some(&[0_u16][..]), [100, 50, 0, 255]),
            (Some(&[1]), [255, 128, 0, 100]),
            (Some(&[2]), [100, 50, 0, 100]),
            (None, [100, 50, 0, 100]),
        ] {
            let tags: Vec<_> = rgb.into_iter().chain(kind.map(|kind| (338, kind))).collect();
            let picture = decoded(&tiff(&strip, &tags)).unwrap();
            assert_eq!(picture.color().has_alpha(), expected[3] < 255);
            assert_eq!(picture.to_rgba8().get_pixel(3, 0).0, expected, "{kind:?}");
        }
    }

    #[test]
    fn a_palette_is_applied() {
        let mut palette = [0; 12];
        (palette[1], palette[6], palette[11]) = (0xffff, 0xffff, 0x8080);
        let tags: [(u16, &[u16]); 3] = [(258, &[2]), (262, &[3]), (320, &palette)];
        let picture = decoded(&tiff(&[0b0001_1011], &tags)).unwrap().into_rgb8();
        assert_eq!(picture.as_raw(), &[0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 128]);
        assert!(decoded(&tiff(&[0b0001_1011], &tags[..2])).is_err());
    }

    #[test]
    fn subsampled_colours_are_shared() {
        // Four pixels of brightness, and the blue and the red that they share.
        let strip = [10, 60, 0, 0, 128, 128, 110, 160, 0, 0, 128, 128];
        let tags: [(u16, &[u16]); 3] = [(258, &[8; 3]), (262, &[6]), (277, &[3])];
        assert_eq!(reds(&strip, &tags), [10, 60, 110, 160]);
    }

    #[test]
    fn planes_and_tiles_are_put_together() {
        let strip: Vec<u8> =
            (0..2 * 3 * 16 * 16).map(|it| u8::try_from(it / 256).unwrap()).collect();
        let tiles = [0, 256, 512, 768, 1024, 1280].map(|it| it + 8);
        let tags: [(u16, &[u16]); 9] = [
            (256, &[20]),
            (258, &[8; 3]),
            (262, &[2]),
            (277, &[3]),
            (284, &[2]),
            (322, &[16]),
            (323, &[16]),
            (324, &tiles),
            (325, &[256; 6]),
        ];
        let mut bytes = tiff(&strip, &tags);
        // A page with tiles has no strips.
        for tag in [273_u16, 278, 279] {
            let entry = [tag.to_le_bytes(), [3, 0]].concat();
            let at = bytes.windows(4).rposition(|it| it == entry).unwrap();
            bytes[at..at + 2].copy_from_slice(&(tag + 65000 - 300).to_le_bytes());
        }
        let picture = decoded(&bytes).unwrap().into_rgb8();
        assert_eq!(picture.get_pixel(15, 0).0, [0, 2, 4]);
        assert_eq!(picture.get_pixel(16, 0).0, [1, 3, 5]);
    }

    #[test]
    fn a_page_is_turned_as_its_tag_says() {
        let bytes = tiff(&[0, 1, 2, 3], &[(274, &[8])]);
        assert_eq!(measure(&bytes, LIMITS).unwrap().upright(), (1, 4));
        assert_eq!(decoded(&bytes).unwrap().to_luma8().as_raw(), &[3, 2, 1, 0]);
    }

    #[test]
    fn what_is_not_decoded_right_is_refused() {
        for (strip, tags) in [
            // Signed; half floats; colours of Lab; an unknown compression; a strip that is cut; a huge one.
            (&[0_u8; 4][..], &[(339, &[2_u16][..])][..]),
            (&[0; 8], &[(258, &[16]), (339, &[3])]),
            (&[0; 12], &[(258, &[8; 3]), (262, &[8]), (277, &[3])]),
            (&[0; 4], &[(259, &[50000])]),
            (&[0; 3], &[]),
            (&[0; 4], &[(256, &[u16::MAX]), (257, &[u16::MAX])]),
        ] {
            assert!(decoded(&tiff(strip, tags)).is_err(), "{tags:?}");
        }
        let whole = tiff(&[0, 1, 2, 3], &[]);
        for length in 0..whole.len() - 4 {
            assert!(decoded(&whole[..length]).is_err(), "{length}");
        }
    }
}
