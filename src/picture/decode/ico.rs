//! Decodes the best picture of an icon.

use image::DynamicImage;
use image::metadata::Orientation;

use super::super::{PictureError, RenderLimits};
use super::bmp::{Bitmap, DecodedBitmap, Place};
use super::{Measure, check_pixels, pixels, png};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    match best_picture(bytes)? {
        Picture::Png(png) => png::measure(png, limits),
        Picture::Bitmap(bitmap) => {
            check_pixels(bitmap.size, limits)?;
            // The picture without its mask.
            let beside = 4 * pixels(bitmap.size);
            Ok(Measure::new(bitmap.size, Orientation::NoTransforms, true, beside, bytes))
        }
    }
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    match best_picture(bytes)? {
        Picture::Png(png) => png::decode(png, limits),
        Picture::Bitmap(bitmap) => {
            check_pixels(bitmap.size, limits)?;
            let DecodedBitmap { picture, has_alpha, rest } = bitmap.decode(limits)?;
            // The mask would hide smooth edges that alpha draws.
            if has_alpha {
                return Ok(picture);
            }
            // If all alpha is zero, it isn't meant.
            let picture = DynamicImage::ImageRgb8(picture.into_rgb8());
            // A few icons lack it: then the next picture follows, or nothing, and all is opaque.
            let end = bytes.len() - rest.len();
            let next = entries(bytes).map(|it| it.offset).filter(|offset| *offset >= end).min();
            let mask = &rest[..next.map_or(rest.len(), |next| (next - end).min(rest.len()))];
            if mask.is_empty() { Ok(picture) } else { masked(picture, mask, bitmap.is_top_down) }
        }
    }
}

/// One of the pictures in an icon.
enum Picture<'a> {
    Png(&'a [u8]),
    Bitmap(Box<Bitmap<'a>>),
}

/// An entry in the directory.
struct Entry {
    size: (u32, u32),
    /// Bits of a pixel.
    depth: u16,
    length: usize,
    offset: usize,
}

/// The directory of an icon, or nothing if it is cut off.
fn entries(bytes: &[u8]) -> impl DoubleEndedIterator<Item = Entry> {
    let count = bytes.get(4..6).map_or(0, |it| usize::from(u16::from_le_bytes([it[0], it[1]])));
    let directory = bytes.get(6..).and_then(|it| it.get(..16 * count)).unwrap_or_default();
    let (entries, _) = directory.as_chunks::<16>();
    entries.iter().map(|entry| {
        let [width, height, colours, _, _, _, depth @ .., _, _, _, _, _, _, _, _] = *entry;
        let number = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| entry[at + byte]));
        // Zero means 256.
        let side = |side: u8| u32::from(side.wrapping_sub(1)) + 1;
        let depth = match u16::from_le_bytes(depth) {
            // Some have the number of colours instead.
            0 => u16::try_from((side(colours) - 1).checked_ilog2().map_or(0, |it| it + 1))
                .unwrap_or(8),
            depth => depth,
        };
        let (length, offset) = (number(8) as usize, number(12) as usize);
        Entry { size: (side(width), side(height)), depth, length, offset }
    })
}

/// The largest picture of an icon, by its directory; the deepest of these; the first of these. So does Chromium.
fn best_picture(bytes: &[u8]) -> Result<Picture<'_>, PictureError> {
    // Of equal ones the last is taken.
    let best = entries(bytes).rev().max_by_key(|entry| (pixels(entry.size), entry.depth));
    let best = best.ok_or_else(|| broken("its directory is empty or cut off"))?;
    // Depth, size and length in the directory are wrong in many icons: the header of the picture counts.
    let picture = bytes.get(best.offset..).unwrap_or_default();
    if picture.starts_with(b"\x89PNG") {
        return Ok(Picture::Png(picture));
    }
    // A few writers give the height of the bitmap alone.
    let declared = &picture[..best.length.min(picture.len())];
    if let Ok(bitmap) = Bitmap::read(declared, Place::Icon { has_double_height: false })
        && bitmap.size == best.size
        && bitmap.is_complete()
    {
        return Ok(Picture::Bitmap(Box::new(bitmap)));
    }
    let bitmap = Bitmap::read(picture, Place::Icon { has_double_height: true })?;
    Ok(Picture::Bitmap(Box::new(bitmap)))
}

/// Makes the pixels transparent that the mask after a bitmap says: a bit each, in rows of whole 32 bits, in the order of the
/// bitmap's.
fn masked(
    picture: DynamicImage,
    mask: &[u8],
    is_top_down: bool,
) -> Result<DynamicImage, PictureError> {
    let mut picture = picture.into_rgba8();
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let row_size = width.div_ceil(8);
    let padded = row_size.next_multiple_of(4);
    if mask.len() < padded * (height - 1) + row_size {
        return Err(broken("its mask is cut off"));
    }
    let lines: &mut [u8] = &mut picture;
    for (y, bits) in mask.chunks(padded).take(height).enumerate() {
        let line = if is_top_down { y } else { height - 1 - y };
        let (line, _) = lines[4 * width * line..4 * width * (line + 1)].as_chunks_mut::<4>();
        for (x, pixel) in line.iter_mut().enumerate() {
            if bits[x / 8] << (x % 8) & 0x80 != 0 {
                *pixel = [0; 4];
            }
        }
    }
    Ok(DynamicImage::ImageRgba8(picture))
}

fn broken(reason: &str) -> PictureError {
    PictureError::Broken(format!("the icon can't be read: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    const LIMITS: RenderLimits = RenderLimits { pixels: 1000, deadline: None };

    /// An icon of pictures: width and height and depth in the directory, and the bytes.
    fn icon(pictures: &[((u8, u8), u16, &[u8])]) -> Vec<u8> {
        let count = u16::try_from(pictures.len()).unwrap();
        let mut icon = [[0, 0, 1, 0].as_slice(), &count.to_le_bytes()].concat();
        let mut offset = icon.len() + 16 * pictures.len();
        for ((width, height), depth, picture) in pictures {
            icon.extend([*width, *height, 0, 0, 1, 0]);
            icon.extend(depth.to_le_bytes());
            icon.extend(u32::try_from(picture.len()).unwrap().to_le_bytes());
            icon.extend(u32::try_from(offset).unwrap().to_le_bytes());
            offset += picture.len();
        }
        for (_, _, picture) in pictures {
            icon.extend(*picture);
        }
        icon
    }

    /// A bitmap two pixels wide and one high, with the height of both bitmap and mask, and a mask over the second pixel.
    fn bitmap(depth: u16, row: &[u8]) -> Vec<u8> {
        let mut header = [0; 40];
        header[0] = 40;
        header[4] = 2;
        header[8] = 2;
        header[14..16].copy_from_slice(&depth.to_le_bytes());
        [&header, row, &[0x40, 0, 0, 0]].concat()
    }

    fn shown(icon: &[u8]) -> Vec<[u8; 4]> {
        let picture = decode(icon, MediaType::Ico, LIMITS).unwrap();
        picture.into_rgba8().pixels().map(|pixel| pixel.0).collect()
    }

    #[test]
    fn a_mask_is_for_pictures_without_alpha() {
        let masked = [[3, 2, 1, 255], [0; 4]];
        let deep = bitmap(24, &[1, 2, 3, 4, 5, 6, 0, 0]);
        assert_eq!(shown(&icon(&[((2, 1), 24, &deep)])), masked);
        let alpha = bitmap(32, &[1, 2, 3, 100, 4, 5, 6, 50]);
        // The depth in the directory doesn't matter.
        for depth in [1, 8, 32] {
            let icon = icon(&[((2, 1), depth, &alpha)]);
            assert_eq!(shown(&icon), [[3, 2, 1, 100], [6, 5, 4, 50]]);
        }
        let no_alpha = bitmap(32, &[1, 2, 3, 0, 4, 5, 6, 0]);
        assert_eq!(shown(&icon(&[((2, 1), 32, &no_alpha)])), masked);
    }

    #[test]
    fn a_picture_whose_mask_is_missing_is_opaque() {
        let bitmap = bitmap(24, &[1, 2, 3, 4, 5, 6, 0, 0]);
        let whole = bitmap.len();
        let opaque = [[3, 2, 1, 255], [6, 5, 4, 255]];
        let missing = &bitmap[..whole - 4];
        assert_eq!(shown(&icon(&[((2, 1), 24, missing)])), opaque);
        assert_eq!(shown(&icon(&[((2, 1), 24, missing), ((1, 1), 24, &bitmap)])), opaque);
        // All bits may be there without the padding.
        assert_eq!(shown(&icon(&[((2, 1), 24, &bitmap[..whole - 3])]))[1], [0; 4]);
    }

    #[test]
    fn a_height_without_the_mask_is_understood() {
        let mut bitmap = bitmap(24, &[1, 2, 3, 4, 5, 6, 0, 0]);
        bitmap[8] = 1;
        assert_eq!(shown(&icon(&[((2, 1), 24, &bitmap)])), [[3, 2, 1, 255], [0; 4]]);
    }

    #[test]
    fn the_largest_picture_is_chosen_then_the_deepest_then_the_first() {
        let [one, two, three] =
            [1, 2, 3].map(|grey| bitmap(24, &[grey, grey, grey, grey, grey, grey, 0, 0]));
        let grey = |pictures: &[((u8, u8), u16, &[u8])]| shown(&icon(pictures))[0][0];
        assert_eq!(grey(&[((2, 1), 24, &one), ((0, 1), 4, &two), ((9, 9), 32, &three)]), 2);
        assert_eq!(grey(&[((2, 1), 8, &one), ((2, 1), 32, &two), ((2, 1), 24, &three)]), 2);
        assert_eq!(grey(&[((2, 1), 24, &one), ((2, 1), 24, &two), ((1, 1), 24, &three)]), 1);
    }

    #[test]
    fn an_icon_that_is_cut_off_is_refused() {
        let whole = icon(&[((2, 1), 24, &bitmap(24, &[1, 2, 3, 4, 5, 6, 0, 0]))]);
        // After the pixels, there are two bytes of padding and four of the mask.
        for end in 0..whole.len() - 6 {
            decode(&whole[..end], MediaType::Ico, LIMITS).unwrap_err();
        }
        let mut outside = whole;
        outside[18..22].copy_from_slice(&u32::MAX.to_le_bytes());
        decode(&outside, MediaType::Ico, LIMITS).unwrap_err();
    }
}
