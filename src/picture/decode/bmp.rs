//! Decodes BMP, and the bitmaps in icons, which lack the header of a file.
//!
//! Windows, OS/2 and Windows CE extended the format without a common specification: the names are those of the Windows SDK
//! (`wingdi.h`), and what it leaves open is done as in Chromium 156. The bitmaps of the BMP Suite (jsummers/bmpsuite) are the
//! measure. The decoder of `image` ignores masks of alpha, and can't read the bitmaps in icons without their masks.

use image::metadata::Orientation;
use image::{DynamicImage, RgbImage, RgbaImage};

use super::super::{PictureError, RenderLimits};
use super::{Measure, check_pixels, colours, pixels};
use crate::image::MediaType;

/// Bytes of the file header (`BITMAPFILEHEADER`).
const FILE_HEADER: usize = 14;

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    let bitmap = Bitmap::of_file(bytes)?;
    check_pixels(bitmap.size, limits)?;
    Ok(Measure::new(bitmap.size, Orientation::NoTransforms, bitmap.has_alpha(), 0, bytes))
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let bitmap = Bitmap::of_file(bytes)?;
    check_pixels(bitmap.size, limits)?;
    Ok(bitmap.decode(limits)?.picture)
}

/// The header and the palette of a bitmap, with the bytes of its pixels.
pub(super) struct Bitmap<'a> {
    pub(super) size: (u32, u32),
    pub(super) is_top_down: bool,
    /// Bits of a pixel: 1, 2, 4, 8, 16, 24 or 32.
    depth: usize,
    is_compressed: bool,
    /// Red, green, blue and alpha in a pixel of 16 bits or more.
    channels: [Channel; 4],
    /// Colours of the values of a pixel of up to 8 bits. Values beyond the palette of the file are black.
    palette: [[u8; 3]; 256],
    /// The pixels, and the bytes after them.
    data: &'a [u8],
    /// ICC profile of the colours, if they aren't sRGB.
    profile: Option<&'a [u8]>,
}

/// The surroundings of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// A file. The pixels are at an offset from the information header, or follow the palette.
    File { pixels_at: Option<usize> },
    /// An icon, with a mask of transparency after the bitmap. The height in the header is that of both, or of the bitmap
    /// alone.
    Icon { has_double_height: bool },
}

/// A decoded bitmap.
pub(super) struct DecodedBitmap<'a> {
    pub(super) picture: DynamicImage,
    /// True if some alpha isn't zero.
    pub(super) has_alpha: bool,
    /// The bytes after the pixels.
    pub(super) rest: &'a [u8],
}

impl<'a> Bitmap<'a> {
    fn of_file(bytes: &'a [u8]) -> Result<Bitmap<'a>, PictureError> {
        let header = bytes.get(FILE_HEADER..).unwrap_or_default();
        let pixels_at = match u32_at(bytes, 10) as usize {
            0 => None,
            at => Some(at.checked_sub(FILE_HEADER).ok_or_else(|| broken(OVERLAP))?),
        };
        Bitmap::read(header, Place::File { pixels_at })
    }

    /// Reads a bitmap that begins with its information header.
    pub(super) fn read(bytes: &'a [u8], place: Place) -> Result<Bitmap<'a>, PictureError> {
        let header_size = u32_at(bytes, 0) as usize;
        // `BITMAPCOREHEADER` 12, `BITMAPINFOHEADER` 40, with masks 52 and 56, `BITMAPV4HEADER` 108, `BITMAPV5HEADER` 124.
        // OS/2 2.x has 64, of which the last fields may be left out; they are zero then.
        if !matches!(header_size, 12 | 16..=64 | 108 | 124) {
            return Err(broken("the size of its header is that of no version of BMP"));
        }
        let header = bytes.get(..header_size).ok_or_else(|| broken("its header is cut off"))?;
        let (width, height, depth, compression) = if header_size == 12 {
            (u16_at(header, 4).into(), u16_at(header, 6).into(), u16_at(header, 10), 0)
        } else {
            let side = |at| u32_at(header, at).cast_signed();
            (side(4), side(8), u16_at(header, 14), u32_at(header, 16))
        };
        let height =
            if place == (Place::Icon { has_double_height: true }) { height / 2 } else { height };
        let size = (u32::try_from(width).unwrap_or(0), height.unsigned_abs());
        if pixels(size) == 0 {
            return Err(broken("it has no pixels"));
        }

        let in_file = matches!(place, Place::File { .. });
        let depth = usize::from(depth);
        let (depth_of_pixels, is_compressed) = match (compression, depth) {
            (0, 1 | 2 | 4 | 8 | 16 | 24 | 32) | (3 | 6, 16 | 32) => (depth, false),
            // The depth in the header may be less; the palette has no more colours then.
            (1, 1..=8) if in_file => (8, true),
            (2, 1..=4) if in_file => (4, true),
            (4, 24) if in_file => (24, true),
            // Fax coding, JPEG and PNG: printers get these.
            (3, 1) | (4 | 5, _) => return Err(PictureError::Opaque(MediaType::Bmp)),
            _ => return Err(broken("its depth and its compression don't go together")),
        };
        let (channels, palette, end) = if depth_of_pixels < 16 {
            let (palette, end) = palette(bytes, header, depth, place)?;
            ([0; 4].map(Channel::new), palette, end)
        } else {
            let (masks, end) = masks(bytes, header, depth, place)?;
            (channels(masks)?, [[0; 3]; 256], end)
        };
        let data_at = match place {
            Place::File { pixels_at: Some(at) } if at < end => return Err(broken(OVERLAP)),
            Place::File { pixels_at: Some(at) } => at,
            Place::File { pixels_at: None } | Place::Icon { .. } => end,
        };
        Ok(Bitmap {
            size,
            is_top_down: height < 0,
            depth: depth_of_pixels,
            is_compressed,
            channels,
            palette,
            data: bytes.get(data_at..).unwrap_or_default(),
            profile: profile(bytes, header)?,
        })
    }

    /// True if a pixel may be transparent.
    pub(super) fn has_alpha(&self) -> bool {
        self.channels[3].mask != 0
    }

    /// Decodes the pixels, and converts their colours to sRGB.
    pub(super) fn decode(&self, limits: RenderLimits) -> Result<DecodedBitmap<'a>, PictureError> {
        let (width, height) = self.size;
        let (picture, has_alpha, rest) = if self.has_alpha() {
            let (pixels, rest) = self.rows::<4>(limits)?;
            let has_alpha = pixels.iter().skip(3).step_by(4).any(|alpha| *alpha != 0);
            let picture = RgbaImage::from_raw(width, height, pixels);
            (picture.map(DynamicImage::from), has_alpha, rest)
        } else {
            let (pixels, rest) = if self.is_compressed {
                (self.runs(limits)?, &[][..])
            } else {
                self.rows::<3>(limits)?
            };
            (RgbImage::from_raw(width, height, pixels).map(DynamicImage::from), false, rest)
        };
        let mut picture = picture.expect("each row has its pixels");
        if let Some(profile) = self.profile {
            colours::to_srgb(&mut picture, profile)?;
        }
        Ok(DecodedBitmap { picture, has_alpha, rest })
    }

    /// True if no row of an uncompressed bitmap is cut off. The last may lack its padding.
    pub(super) fn is_complete(&self) -> bool {
        let (row_size, padded) = self.row_size();
        self.data.len() >= padded * (self.size.1 as usize - 1) + row_size
    }

    /// Bytes of a row that isn't compressed, without and with its padding.
    fn row_size(&self) -> (usize, usize) {
        let row_size = (self.size.0 as usize * self.depth).div_ceil(8);
        (row_size, row_size.next_multiple_of(4))
    }

    /// Decodes rows that aren't compressed, to `N` channels. Returns the bytes after them, too.
    fn rows<const N: usize>(
        &self,
        limits: RenderLimits,
    ) -> Result<(Vec<u8>, &'a [u8]), PictureError> {
        let (width, height) = (self.size.0 as usize, self.size.1 as usize);
        if !self.is_complete() {
            return Err(broken(CUT_OFF));
        }
        let (_, padded) = self.row_size();
        let mut pixels = vec![0; width * height * N];
        for (y, row) in self.data.chunks(padded).take(height).enumerate() {
            limits.check_time()?;
            let line = if self.is_top_down { y } else { height - 1 - y };
            let (line, _) = pixels[line * width * N..][..width * N].as_chunks_mut::<N>();
            for (x, pixel) in line.iter_mut().enumerate() {
                pixel.copy_from_slice(&self.pixel(row, x)[..N]);
            }
        }
        Ok((pixels, self.data.get(padded * height..).unwrap_or_default()))
    }

    /// Decodes the pixel at some place in a row.
    fn pixel(&self, row: &[u8], x: usize) -> [u8; 4] {
        if self.depth < 16 {
            // The first pixel has the highest bits of its byte.
            let bit = x * self.depth;
            let [red, green, blue] = self.colour(row[bit / 8] << (bit % 8) >> (8 - self.depth));
            return [red, green, blue, 255];
        }
        let size = self.depth / 8;
        let mut value = [0; 4];
        value[..size].copy_from_slice(&row[x * size..][..size]);
        let value = u32::from_le_bytes(value);
        [0, 1, 2, 3].map(|channel| self.channels[channel].of(value))
    }

    fn colour(&self, value: u8) -> [u8; 3] {
        self.palette[usize::from(value)]
    }

    /// Decodes compressed pixels to RGB (`BI_RLE8` and `BI_RLE4`, and that of OS/2 for 24 bits). Pixels that are left out are
    /// black: some decoders leave them transparent, others take the first colour.
    fn runs(&self, limits: RenderLimits) -> Result<Vec<u8>, PictureError> {
        let (width, height) = (self.size.0 as usize, self.size.1 as usize);
        let mut pixels = vec![0; width * height * 3];
        let (mut x, mut y) = (0, 0);
        let mut data = self.data;
        let mut take = |count| data.split_off(..count);
        loop {
            limits.check_time()?;
            let Some(&[count, code]) = take(2) else {
                // The mark of the end may be missing after the last pixel.
                let is_whole = y >= height || (y == height - 1 && x == width);
                return if is_whole { Ok(pixels) } else { Err(broken(CUT_OFF)) };
            };
            let (count, is_literal) = match (count, code) {
                (0, 0) => {
                    (x, y) = (0, y + 1);
                    continue;
                }
                (0, 1) => return Ok(pixels),
                (0, 2) => {
                    let Some(&[right, down]) = take(2) else { return Err(broken(CUT_OFF)) };
                    (x, y) = (x + usize::from(right), y + usize::from(down));
                    if x > width {
                        return Err(broken(OUTSIDE));
                    }
                    continue;
                }
                (0, count) => (usize::from(count), true),
                (count, _) => (usize::from(count), false),
            };
            if y >= height {
                return Ok(pixels);
            }
            if is_literal && x + count > width {
                return Err(broken(OUTSIDE));
            }
            let run: &[u8] = if is_literal {
                // Padded to 16 bits.
                let size = (count * self.depth).div_ceil(8);
                take(size.next_multiple_of(2)).ok_or_else(|| broken(CUT_OFF))?
            } else if self.depth == 24 {
                let Some(&[green, red]) = take(2) else { return Err(broken(CUT_OFF)) };
                &[code, green, red]
            } else {
                &[code]
            };
            let line = if self.is_top_down { y } else { height - 1 - y };
            // A run may go beyond the row; some writers fill up its bytes.
            let end = width.min(x + count);
            let line = &mut pixels[3 * (line * width + x)..3 * (line * width + end)];
            let (line, _) = line.as_chunks_mut();
            for (at, pixel) in line.iter_mut().enumerate() {
                *pixel = match (self.depth, if is_literal { at } else { 0 }) {
                    // Two pixels take turns.
                    (4, first) => {
                        let byte = run[first / 2];
                        self.colour(if at % 2 == 0 { byte >> 4 } else { byte & 15 })
                    }
                    (8, at) => self.colour(run[at]),
                    (_, at) => [run[3 * at + 2], run[3 * at + 1], run[3 * at]],
                };
            }
            x = end;
        }
    }
}

/// A channel of colour, or alpha, in a pixel.
struct Channel {
    mask: u32,
    shift: u32,
    /// The values in 8 bits.
    values: [u8; 256],
}

impl Channel {
    fn new(mask: u32) -> Channel {
        let shift = mask.trailing_zeros() % 32;
        let bits = (mask >> shift).count_ones();
        let most = (1 << bits.min(8)) - 1;
        let mut values = [0; 256];
        for (value, eight_bits) in (0..=most).zip(&mut values) {
            *eight_bits = u8::try_from((value * 255 + most / 2) / most.max(1)).unwrap_or(255);
        }
        // Of more than 8 bits the highest count.
        Channel { mask, shift: shift + bits.saturating_sub(8), values }
    }

    fn of(&self, pixel: u32) -> u8 {
        // The value has 8 bits at most, since a mask has its bits side by side.
        self.values[((pixel & self.mask) >> self.shift) as usize & 255]
    }
}

/// The channels of red, green, blue and alpha. Each has its bits side by side.
fn channels(masks: [u32; 4]) -> Result<[Channel; 4], PictureError> {
    let bits = |mask: u32| mask >> (mask.trailing_zeros() % 32);
    if masks.iter().any(|mask| bits(*mask) & bits(*mask).wrapping_add(1) != 0) {
        return Err(broken("the bits of a channel aren't side by side"));
    }
    Ok(masks.map(Channel::new))
}

/// The masks of red, green, blue and alpha for pixels of 16 bits or more, and the offset of what follows them.
fn masks(
    bytes: &[u8],
    header: &[u8],
    depth: usize,
    place: Place,
) -> Result<([u32; 4], usize), PictureError> {
    let mut masks = match depth {
        16 => [0x7c00, 0x03e0, 0x001f, 0],
        _ => [0x00ff_0000, 0xff00, 0x00ff, 0],
    };
    let compression = u32_at(header, 16);
    // In the last versions of the header, which would end before them otherwise.
    let (in_header, alpha_in_header) =
        (matches!(header.len(), 52 | 56 | 108 | 124), matches!(header.len(), 56 | 108 | 124));
    let mut end = header.len();
    // `BI_BITFIELDS`, and `BI_ALPHABITFIELDS` of Windows CE. A core header has no compression.
    if header.len() > 12 && matches!(compression, 3 | 6) {
        let count = if compression == 6 || alpha_in_header { 4 } else { 3 };
        let at = if in_header { 40 } else { header.len() };
        end = end.max(at + 4 * count);
        let in_file = bytes.get(at..end).ok_or_else(|| broken("its masks are cut off"))?;
        for (at, mask) in masks.iter_mut().take(count).enumerate() {
            *mask = u32_at(in_file, 4 * at);
        }
    } else if depth == 32 && header.len() >= 108 {
        // Whatever a mask of alpha says here, the fourth byte is meant.
        masks[3] = if u32_at(header, 52) == 0 { 0 } else { 0xff00_0000 };
    } else if depth == 32 && matches!(place, Place::Icon { .. }) {
        // In a file without a mask, the fourth byte isn't alpha: many writers leave it undefined.
        masks[3] = 0xff00_0000;
    }
    // Some masks of alpha have bits that the pixels haven't.
    let bits = if depth == 32 { u32::MAX } else { (1 << depth) - 1 };
    Ok((masks.map(|mask| mask & bits), end))
}

/// The palette for pixels of up to 8 bits, and the offset of what follows it.
fn palette(
    bytes: &[u8],
    header: &[u8],
    depth: usize,
    place: Place,
) -> Result<([[u8; 3]; 256], usize), PictureError> {
    // A core header is followed by three bytes a colour, and knows no shorter palette.
    let entry = if header.len() == 12 { 3 } else { 4 };
    let most = 1 << depth;
    let count = u32_at(header, 32) as usize;
    let end_of = |count: usize| header.len() + entry * count;
    let count = match place {
        Place::File { pixels_at: Some(at) } if count == 0 => {
            // A shorter palette whose size isn't in the header ends where the pixels begin.
            most.min(at.saturating_sub(header.len()) / entry)
        }
        Place::File { pixels_at: Some(at) } if end_of(count.min(most)) > at => {
            return Err(broken(OVERLAP));
        }
        _ if count == 0 => most,
        _ => count.min(most),
    };
    let end = end_of(count);
    let colours = bytes.get(header.len()..end).ok_or_else(|| broken("its palette is cut off"))?;
    let mut palette = [[0; 3]; 256];
    for (colour, bytes) in palette.iter_mut().zip(colours.chunks_exact(entry)) {
        *colour = [bytes[2], bytes[1], bytes[0]];
    }
    Ok((palette, end))
}

/// The ICC profile that a header of version 5 names. Like browsers, it's the only description of colours that is used:
/// calibrated colours are zero or wrong in many files.
fn profile<'a>(bytes: &'a [u8], header: &[u8]) -> Result<Option<&'a [u8]>, PictureError> {
    const PROFILE_EMBEDDED: u32 = u32::from_be_bytes(*b"MBED");
    if header.len() < 124 || u32_at(header, 56) != PROFILE_EMBEDDED {
        return Ok(None);
    }
    let (at, size) = (u32_at(header, 112) as usize, u32_at(header, 116) as usize);
    let profile = bytes.get(at..).and_then(|it| it.get(..size));
    profile.map(Some).ok_or_else(|| broken("its colour profile is cut off"))
}

const CUT_OFF: &str = "its pixels are cut off";
const OUTSIDE: &str = "it has pixels outside of its size";
const OVERLAP: &str = "its pixels begin in its header";

fn broken(reason: &str) -> PictureError {
    PictureError::Broken(format!("the bitmap can't be read: {reason}"))
}

/// The field at an offset; zero after the end.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |it| u32::from_le_bytes(*it))
}

/// The field at an offset; zero after the end.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |it| u16::from_le_bytes(*it))
}

#[cfg(test)]
mod tests {
    use super::super::decode;
    use super::*;

    const LIMITS: RenderLimits = RenderLimits { pixels: 1000, deadline: None };

    /// A file with a header of some size: width, height, depth, compression, colours, masks, and all that follows the header.
    fn file(
        size: usize,
        (width, height): (i32, i32),
        (depth, compression, colours): (u16, u32, u32),
        masks: [u32; 4],
        rest: &[u8],
    ) -> Vec<u8> {
        let mut header = vec![0; size];
        let mut put = |at: usize, field: &[u8]| {
            header[at..at + field.len()].copy_from_slice(field);
        };
        put(0, &u32::try_from(size).unwrap().to_le_bytes());
        put(4, &width.to_le_bytes());
        put(8, &height.to_le_bytes());
        put(14, &depth.to_le_bytes());
        put(16, &compression.to_le_bytes());
        put(32, &colours.to_le_bytes());
        for (mask, at) in masks.iter().zip((40..).step_by(4)).take((size - 40) / 4) {
            put(at, &mask.to_le_bytes());
        }
        [b"BM", &[0; 12][..], &header, rest].concat()
    }

    /// The pixels of a file, row by row from the top.
    fn shown(file: &[u8]) -> Vec<[u8; 4]> {
        let picture = decode(file, MediaType::Bmp, LIMITS).unwrap();
        picture.into_rgba8().pixels().map(|pixel| pixel.0).collect()
    }

    const STANDARD: [u32; 4] = [0xff_0000, 0xff00, 0xff, 0xff00_0000];

    #[test]
    fn alpha_needs_a_mask() {
        let pixels = [[1, 2, 3, 100], [4, 5, 6, 0]].concat();
        let with_alpha = [[3, 2, 1, 100], [6, 5, 4, 0]];
        let opaque = [[3, 2, 1, 255], [6, 5, 4, 255]];
        for (size, compression, expected) in [
            (40, 0, opaque),
            (52, 3, opaque),
            (56, 3, with_alpha),
            (56, 0, opaque),
            (108, 3, with_alpha),
            (108, 0, with_alpha),
            (124, 3, with_alpha),
        ] {
            let file = file(size, (2, 1), (32, compression, 0), STANDARD, &pixels);
            assert_eq!(shown(&file), expected, "{size} {compression}");
        }
        // `BI_ALPHABITFIELDS`: the masks follow the header.
        let masks = STANDARD.map(u32::to_le_bytes).concat();
        let windows_ce = file(40, (2, 1), (32, 6, 0), STANDARD, &[masks, pixels].concat());
        assert_eq!(shown(&windows_ce), with_alpha);
    }

    #[test]
    fn channels_have_the_bits_of_their_masks() {
        let colours = |file: &[u8]| shown(file)[0];
        let pixel = |value: u32| value.to_le_bytes();
        let deep = file(
            56,
            (1, 1),
            (32, 3, 0),
            [0x3ff, 0xf_fc00, 0x3ff0_0000, 0xc000_0000],
            &pixel(0x8008_03ff),
        );
        assert_eq!(colours(&deep), [255, 128, 0, 170]);
        let shallow = file(56, (1, 1), (16, 3, 0), [0xf00, 0xf0, 0xf, 0xf000], &pixel(0x8f10));
        assert_eq!(colours(&shallow), [255, 17, 0, 136]);
        let without_masks = file(40, (1, 1), (16, 0, 0), STANDARD, &pixel(0xfc10));
        assert_eq!(colours(&without_masks), [255, 0, 132, 255]);
        let apart = file(56, (1, 1), (32, 3, 0), [0x00f7_0000, 0xff00, 0xff, 0], &pixel(0));
        decode(&apart, MediaType::Bmp, LIMITS).unwrap_err();
    }

    #[test]
    fn values_beyond_the_palette_are_black() {
        let palette = [[1, 2, 3, 0], [4, 5, 6, 0]].concat();
        for (depth, row) in
            [(8, [0, 1, 2, 0]), (4, [0x01, 0x20, 0, 0]), (2, [0b0001_1000, 0, 0, 0])]
        {
            let file = file(40, (3, 1), (depth, 0, 2), STANDARD, &[&palette[..], &row].concat());
            assert_eq!(shown(&file), [[3, 2, 1, 255], [6, 5, 4, 255], [0, 0, 0, 255]], "{depth}");
        }
    }

    #[test]
    fn rows_are_shown_in_their_order() {
        let rows = [1, 1, 1, 0, 2, 2, 2, 0];
        let upwards = file(40, (1, 2), (24, 0, 0), STANDARD, &rows);
        assert_eq!(shown(&upwards), [[2, 2, 2, 255], [1, 1, 1, 255]]);
        let downwards = file(40, (1, -2), (24, 0, 0), STANDARD, &rows);
        assert_eq!(shown(&downwards), [[1, 1, 1, 255], [2, 2, 2, 255]]);
        // Of the last row the padding may be missing, and no pixel.
        assert_eq!(shown(&upwards[..upwards.len() - 1]).len(), 2);
        let error = decode(&upwards[..upwards.len() - 2], MediaType::Bmp, LIMITS).unwrap_err();
        assert!(error.to_string().contains("cut off"), "{error}");
    }

    #[test]
    fn a_compressed_bitmap_is_shown() {
        let palette = [[0, 0, 0, 0], [1, 1, 1, 0], [2, 2, 2, 0], [3, 3, 3, 0]].concat();
        let greys = |depth, compression, runs: &[u8]| {
            let rest = [&palette[..], runs].concat();
            let file = file(40, (5, 2), (depth, compression, 4), STANDARD, &rest);
            let picture = decode(&file, MediaType::Bmp, LIMITS)?.into_rgb8();
            Ok::<_, PictureError>(picture.pixels().map(|pixel| pixel.0[0]).collect::<Vec<_>>())
        };
        // A run, three literal pixels, and a run that is too long.
        let bytes = [2, 1, 0, 3, 1, 2, 3, 0, 0, 0, 9, 3, 0, 1];
        assert_eq!(greys(8, 1, &bytes), Ok(vec![3, 3, 3, 3, 3, 1, 1, 1, 2, 3]));
        let nibbles = [2, 0x12, 0, 3, 0x12, 0x30, 0, 0, 9, 0x31, 0, 1];
        assert_eq!(greys(4, 2, &nibbles), Ok(vec![3, 1, 3, 1, 3, 1, 2, 1, 2, 3]));
        // What is left out is black; the mark of the end may be missing after the last pixel.
        let delta = [1, 1, 0, 2, 2, 1, 2, 2];
        assert_eq!(greys(8, 1, &delta), Ok(vec![0, 0, 0, 2, 2, 1, 0, 0, 0, 0]));
        for broken in [&bytes[..8], &[0, 6, 1, 1, 1, 1, 1, 1], &[0, 2, 6, 0, 1, 1], &[0, 9, 1]] {
            greys(8, 1, broken).unwrap_err();
        }
    }

    #[test]
    fn what_printers_get_isnt_decoded() {
        for (depth, compression) in [(1, 3), (0, 4), (0, 5)] {
            let file = file(64, (1, 1), (depth, compression, 0), STANDARD, &[0; 64]);
            let error = decode(&file, MediaType::Bmp, LIMITS).unwrap_err();
            assert_eq!(error, PictureError::Opaque(MediaType::Bmp));
        }
    }

    #[test]
    fn sizes_and_offsets_of_a_hostile_header_are_refused() {
        let sizes = [(0, 1), (1, 0), (-1, 1), (1, i32::MIN), (i32::MAX, i32::MAX), (1, 1)];
        for size in sizes {
            for (depth, compression) in
                [(1, 0), (8, 1), (24, 0), (24, 4), (32, 3), (32, 6), (31, 0)]
            {
                for header in [40, 56, 108, 124] {
                    let mut file =
                        file(header, size, (depth, compression, u32::MAX), STANDARD, &[]);
                    decode(&file, MediaType::Bmp, LIMITS).unwrap_err();
                    file[10..14].copy_from_slice(&u32::MAX.to_le_bytes());
                    decode(&file, MediaType::Bmp, LIMITS).unwrap_err();
                    file.truncate(20);
                    decode(&file, MediaType::Bmp, LIMITS).unwrap_err();
                }
            }
        }
    }
}
