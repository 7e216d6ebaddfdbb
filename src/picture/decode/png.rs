//! Decodes PNG.

use std::sync::Arc;

use image::{DynamicImage, RgbImage, RgbaImage};
use moxcms::{ColorProfile, DataColorSpace, Transform16BitExecutor};
use png::{BitDepth, ColorType, DecodingError, Info, InterlaceInfo, Reader};

use super::super::{PictureError, RenderLimits};
use super::colours::Colours;
use super::deadline::DeadlineReader;
use super::{Measure, broken, check_pixels, colours, exif};
use crate::image::MediaType;

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    let reader = open(bytes, limits)?;
    let info = reader.info();
    // The mark of EXIF in JPEG has no place here (§11.3.4.5), and browsers ignore what follows it.
    let exif = info.exif_metadata.as_deref().filter(|exif| !exif.starts_with(b"Exif"));
    let orientation = exif::orientation(exif.unwrap_or_default());
    let profile = info.icc_profile.as_ref().map_or(0, |profile| profile.len());
    // The tables of a profile are four times as large as numbers of four bytes.
    let beside = rows(info.width) + 5 * profile as u64;
    Ok(Measure::new(info.size(), orientation, has_alpha(info), beside, bytes))
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let mut reader = open(bytes, limits)?;
    let info = reader.info();
    if info.color_type == ColorType::Indexed && info.palette.is_none() {
        return Err(PictureError::Broken("the palette is missing before the pixels".to_owned()));
    }
    let profile = match colours_of(info) {
        Some(Colours::Refused) => return Err(PictureError::Opaque(MediaType::Png)),
        Some(Colours::Known(profile)) => Some(profile),
        None => None,
    };
    let is_deep = info.bit_depth == BitDepth::Sixteen;
    let (deep, profile) = if is_deep { (profile, None) } else { (None, profile) };
    let unpacker = Unpacker::new(info, deep.as_ref());
    let mut picture = decode_pixels(&mut reader, unpacker).map_err(|it| broken(&it, limits))?;
    if let Some(profile) = profile {
        colours::convert(&mut picture, &profile);
    }
    Ok(picture)
}

/// Bytes of the rows that are kept: as they are read, the one before, unpacked, and converted.
fn rows(width: u32) -> u64 {
    /// Four channels of 16 bits.
    const PIXEL: u64 = 8;
    7 * PIXEL * u64::from(width)
}

/// Reads the chunks before the pixels.
fn open(bytes: &[u8], limits: RenderLimits) -> Result<Reader<DeadlineReader<'_>>, PictureError> {
    /// Largest colour profile, unpacked. A few bytes become many when it is unpacked.
    const PROFILE: u64 = 8 << 20;
    // The size comes first in the file: nothing is unpacked before it is checked.
    check_pixels(size(bytes).unwrap_or((0, 0)), limits)?;
    let width = size(bytes).map_or(0, |(width, _)| width);
    let memory = rows(width) + PROFILE + 2 * bytes.len() as u64;
    let memory = png::Limits { bytes: usize::try_from(memory).unwrap_or(usize::MAX) };
    let reader = DeadlineReader::new(bytes, limits);
    let mut decoder = png::Decoder::new_with_limits(reader, memory);
    decoder.set_ignore_text_chunk(true);
    decoder.read_info().map_err(|error| broken(&error, limits))
}

/// Width and height of a PNG, with which its first chunk begins.
fn size(bytes: &[u8]) -> Option<(u32, u32)> {
    let (width, rest) = bytes.get(16..)?.split_first_chunk()?;
    Some((u32::from_be_bytes(*width), u32::from_be_bytes(*rest.first_chunk()?)))
}

/// The colours of a PNG, by the chunk that comes first in this order: `cICP`, `iCCP`, `sRGB`, `gAMA` with or without `cHRM` (PNG,
/// third edition, §4.3). Where the standard leaves it open they are those that Chromium shows. `None` is sRGB.
fn colours_of(info: &Info) -> Option<Colours> {
    let is_grey = matches!(info.color_type, ColorType::Grayscale | ColorType::GrayscaleAlpha);
    let points = info.coding_independent_code_points.as_ref();
    // Chromium ignores video range.
    let points = points.filter(|points| points.is_video_full_range_image);
    if let Some(colours) =
        points.and_then(|it| Colours::of_code_points(it.color_primaries, it.transfer_function))
    {
        return Some(colours);
    }
    if let Some(colours) = info.icc_profile.as_ref().and_then(|it| Colours::of_profile(it)) {
        // A profile of another space than the pixels counts as if nothing were said. One for RGB may be in a grey picture.
        let fits = match &colours {
            Colours::Known(profile) => match profile.color_space {
                DataColorSpace::Gray => is_grey,
                space => space == DataColorSpace::Rgb,
            },
            Colours::Refused => true,
        };
        return fits.then_some(colours);
    }
    if info.srgb.is_some() {
        return None;
    }
    // `cHRM` alone says too little: no values without a curve.
    let gamma = info.gama_chunk?.into_value();
    let chromaticities = info.chrm_chunk.map(|it| {
        [it.white, it.red, it.green, it.blue].map(|(x, y)| (x.into_value(), y.into_value()))
    });
    Colours::of_gamma(gamma, chromaticities)
}

/// True if the pixels have alpha. Only types without may have `tRNS`.
fn has_alpha(info: &Info) -> bool {
    matches!(info.color_type, ColorType::GrayscaleAlpha | ColorType::Rgba) || info.trns.is_some()
}

/// Decodes the pixels row by row to 8 bits a channel: of the whole in 16 bits there is never more than a row.
fn decode_pixels(
    reader: &mut Reader<DeadlineReader>,
    mut unpacker: Unpacker,
) -> Result<DynamicImage, DecodingError> {
    let info = reader.info();
    let (width, height) = info.size();
    let pixel = unpacker.pixel;
    let line = width as usize * pixel;
    let mut pixels = vec![0; line * height as usize];
    if !info.interlaced && unpacker.is_idle() {
        for line in pixels.chunks_exact_mut(line) {
            reader.read_row(line)?;
        }
    } else {
        let (mut below, mut unpacked) = (0, vec![0; line]);
        // Nothing is read after the last row, since the rest may be missing.
        for _ in 0..count_rows(info) {
            let Some(row) = reader.next_interlaced_row()? else { break };
            match row.interlace() {
                InterlaceInfo::Null(_) => {
                    unpacker.unpack(row.data(), &mut pixels[below..below + line]);
                    below += line;
                }
                InterlaceInfo::Adam7(pass) => {
                    unpacker.unpack(row.data(), &mut unpacked);
                    let bits = if pixel == 4 { 32 } else { 24 };
                    png::expand_interlaced_row(&mut pixels, line, &unpacked, pass, bits);
                }
            }
        }
    }
    let picture = if pixel == 4 {
        RgbaImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgba8)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
    };
    Ok(picture.expect("each row has its pixels"))
}

/// Rows in the file: those of seven passes if it is interlaced (PNG, third edition, §8.1).
fn count_rows(info: &Info) -> u32 {
    /// Left, top and vertical distance of the pixels of each pass.
    const PASSES: [(u32, u32, u32); 7] =
        [(0, 0, 8), (4, 0, 8), (0, 4, 8), (2, 0, 4), (0, 2, 4), (1, 0, 2), (0, 1, 2)];
    if !info.interlaced {
        return info.height;
    }
    let passes = PASSES.iter().filter(|(left, _, _)| info.width > *left);
    passes.map(|(_, top, down)| info.height.saturating_sub(*top).div_ceil(*down)).sum()
}

/// Unpacks rows to 8 bits a channel of RGB or RGBA.
struct Unpacker {
    colour: ColorType,
    depth: u8,
    /// Channels, and bytes, of an unpacked pixel.
    pixel: usize,
    palette: [[u8; 4]; 256],
    /// The colour that is transparent in a picture without alpha.
    key: Option<Vec<u16>>,
    /// The conversion of the colours of 16 bits.
    transform: Option<Arc<Transform16BitExecutor>>,
    /// The values of a row, as they are read.
    values: Vec<u16>,
    /// The row in RGB or RGBA.
    row: Vec<u16>,
    converted: Vec<u16>,
}

impl Unpacker {
    /// An unpacker that converts pixels of 16 bits by a profile.
    fn new(info: &Info, deep: Option<&ColorProfile>) -> Unpacker {
        let (colour, depth) = (info.color_type, info.bit_depth as u8);
        let pixel = if has_alpha(info) { 4 } else { 3 };
        let transform = deep.and_then(|profile| colours::deep_transform(profile, pixel));
        let mut key = None;
        if colour != ColorType::Indexed {
            key = info.trns.as_deref().map(|key| match depth {
                16 => {
                    let (values, _) = key.as_chunks::<2>();
                    values.iter().map(|it| u16::from_be_bytes(*it)).collect()
                }
                // One byte for each channel. Its bits beyond the depth should be masked (§11.3.1.1), but with them browsers and
                // Pillow find no pixel.
                _ => key.iter().map(|it| u16::from(*it)).collect(),
            });
        }
        let (values, row, converted) = (Vec::new(), Vec::new(), Vec::new());
        let palette = palette(info);
        Unpacker { colour, depth, pixel, palette, key, transform, values, row, converted }
    }

    /// True if rows are as they should be.
    fn is_idle(&self) -> bool {
        let is_colour = matches!(self.colour, ColorType::Rgb | ColorType::Rgba);
        self.depth == 8 && is_colour && self.key.is_none()
    }

    /// Unpacks a row, or as much of it as there is room for.
    fn unpack(&mut self, row: &[u8], pixels: &mut [u8]) {
        self.values.clear();
        match self.depth {
            16 => {
                let (values, _) = row.as_chunks::<2>();
                self.values.extend(values.iter().map(|it| u16::from_be_bytes(*it)));
            }
            8 => self.values.extend(row.iter().map(|it| u16::from(*it))),
            depth => {
                // From the highest bits to the lowest.
                let shifts = || (0..8 / depth).rev().map(move |it| it * depth);
                let most = (1 << depth) - 1;
                let values = row.iter().flat_map(|it| shifts().map(move |by| (it >> by) & most));
                self.values.extend(values.map(u16::from));
            }
        }
        if self.colour == ColorType::Indexed {
            for (pixel, index) in pixels.chunks_exact_mut(self.pixel).zip(&self.values) {
                pixel.copy_from_slice(&self.palette[usize::from(*index)][..self.pixel]);
            }
            return;
        }
        let most = u16::MAX >> (16 - self.depth);
        self.row.clear();
        for values in self.values.chunks_exact(self.colour.samples()) {
            // A grey value is that of all three colours.
            let (colour, alpha) = match *values {
                [grey] => ([grey; 3], most),
                [grey, alpha] => ([grey; 3], alpha),
                [red, green, blue, alpha] => ([red, green, blue], alpha),
                _ => ([values[0], values[1], values[2]], most),
            };
            self.row.extend(colour);
            if self.pixel == 4 {
                let is_key = self.key.as_ref().is_some_and(|key| key == values);
                self.row.push(if is_key { 0 } else { alpha });
            }
        }
        let mut unpacked = &self.row;
        if let Some(transform) = &self.transform {
            self.converted.resize(self.row.len(), 0);
            if transform.transform(&self.row, &mut self.converted).is_ok() {
                unpacked = &self.converted;
            }
        }
        for (byte, value) in pixels.iter_mut().zip(unpacked) {
            *byte = to_8_bits(*value, self.depth);
        }
    }
}

/// The colours of a palette. For those that aren't there, which is an error, browsers take the last.
fn palette(info: &Info) -> [[u8; 4]; 256] {
    let (colours, _) = info.palette.as_deref().unwrap_or_default().as_chunks::<3>();
    let transparency = info.trns.as_deref().unwrap_or_default();
    // There may be more values of alpha than colours.
    let alphas = transparency.iter().copied().chain(std::iter::repeat(255));
    let mut entries =
        colours.iter().zip(alphas).map(|([red, green, blue], alpha)| [*red, *green, *blue, alpha]);
    let mut last = [0, 0, 0, 255];
    std::array::from_fn(|_| {
        last = entries.next().unwrap_or(last);
        last
    })
}

/// Scales a value from a depth in bits. 16 bits are rounded as `image` does.
#[expect(clippy::cast_possible_truncation, reason = "the largest value becomes 255")]
fn to_8_bits(value: u16, depth: u8) -> u8 {
    match depth {
        16 => ((u32::from(value) + 128) / 257) as u8,
        8 => value as u8,
        _ => (value * (255 / ((1 << depth) - 1))) as u8,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    #[test]
    fn a_deep_png_that_is_read_row_by_row_is_the_same_picture() {
        let value = |x: u32, y: u32, channel: u32| {
            u16::try_from((x * 7919 + y * 104_729 + channel * 31_337) % 65_536).unwrap()
        };
        let (width, height) = (61, 33);
        let pixel = |x, y| [0, 1, 2, 3].map(|channel| value(x, y, channel));
        let whole = ::image::ImageBuffer::from_fn(width, height, |x, y| ::image::Rgba(pixel(x, y)));
        let whole = DynamicImage::ImageRgba16(whole);
        let limits = RenderLimits { pixels: 10_000, deadline: None };
        for picture in [
            DynamicImage::ImageLuma16(whole.to_luma16()),
            DynamicImage::ImageLumaA16(whole.to_luma_alpha16()),
            DynamicImage::ImageRgb16(whole.to_rgb16()),
            whole,
        ] {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
            let bytes = bytes.into_inner();
            let shown = decode(&bytes, MediaType::Png, limits).unwrap();
            if picture.color().has_alpha() {
                assert_eq!(shown, DynamicImage::ImageRgba8(picture.to_rgba8()));
            } else {
                assert_eq!(shown, DynamicImage::ImageRgb8(picture.to_rgb8()));
            }
            // A part of a picture is none.
            let cut = &bytes[..bytes.len() / 2];
            let error = decode(cut, MediaType::Png, limits).unwrap_err();
            assert!(matches!(error, PictureError::Broken(_)), "{error}");
        }
    }
}
