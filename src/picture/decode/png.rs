//! Decodes PNG.

use std::sync::Arc;

use image::{DynamicImage, RgbImage, RgbaImage};
use moxcms::{ColorProfile, DataColorSpace, Transform16BitExecutor};
use png::{BitDepth, ColorType, DecodingError, Info, InterlaceInfo, Reader};

use super::super::{PictureError, RenderLimits};
use super::colours::Colours;
use super::deadline::DeadlineReader;
use super::{Measure, broken, check_pixels, colours, exif};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    let reader = open(bytes, limits)?;
    if !has_end(bytes) {
        return Err(PictureError::Broken("the PNG ends before its last chunk".to_owned()));
    }
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
        Some(Colours::Refused) => return Err(colours::refused()),
        Some(Colours::Known(profile)) => Some(profile),
        None => None,
    };
    let is_deep = info.bit_depth == BitDepth::Sixteen;
    let (deep, profile) = if is_deep { (profile, None) } else { (None, profile) };
    let unpacker = Unpacker::new(info, deep.as_deref());
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

/// True for a PNG with its last chunk: a part of a file isn't taken for a picture, even if it has all pixels.
fn has_end(bytes: &[u8]) -> bool {
    let mut at = 8;
    while let Some((length, kind)) = bytes.get(at..).and_then(<[u8]>::split_first_chunk) {
        if kind.starts_with(b"IEND") {
            return true;
        }
        at = at.saturating_add(12).saturating_add(u32::from_be_bytes(*length) as usize);
    }
    false
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
        let (mut below, mut row_of_pass) = (0, vec![0; line]);
        // Nothing is read after the last row, since the rest may be missing.
        for _ in 0..count_rows(info) {
            let Some(row) = reader.next_interlaced_row()? else { break };
            match row.interlace() {
                InterlaceInfo::Null(_) => {
                    unpacker.unpack(row.data(), &mut pixels[below..below + line]);
                    below += line;
                }
                InterlaceInfo::Adam7(pass) => {
                    unpacker.unpack(row.data(), &mut row_of_pass);
                    let bits = if pixel == 4 { 32 } else { 24 };
                    png::expand_interlaced_row(&mut pixels, line, &row_of_pass, pass, bits);
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

    use image::ImageFormat;

    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    const LIMITS: RenderLimits = RenderLimits { pixels: 10_000, deadline: None };

    /// A chunk; its checksum is that of `png`'s encoder.
    type Chunk<'a> = ([u8; 4], &'a [u8]);

    /// Encodes a picture of one row, with chunks before it.
    fn encode(colour: ColorType, depth: BitDepth, chunks: &[Chunk], row: &[u8]) -> Vec<u8> {
        let width = row.len() * 8 / (colour.samples() * depth as usize);
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, u32::try_from(width).unwrap(), 1);
        encoder.set_color(colour);
        encoder.set_depth(depth);
        if colour == ColorType::Indexed {
            encoder.set_palette(vec![0; 3]);
        }
        let mut writer = encoder.write_header().unwrap();
        for (kind, data) in chunks {
            writer.write_chunk(png::chunk::ChunkType(*kind), data).unwrap();
        }
        writer.write_image_data(row).unwrap();
        writer.finish().unwrap();
        bytes
    }

    fn pixels(bytes: &[u8]) -> Vec<u8> {
        decode(bytes, MediaType::Png, LIMITS).unwrap().into_bytes()
    }

    fn rgb(chunks: &[Chunk], row: &[u8]) -> Vec<u8> {
        pixels(&encode(ColorType::Rgb, BitDepth::Eight, chunks, row))
    }

    const LINEAR: Chunk = (*b"gAMA", &100_000_u32.to_be_bytes());

    #[test]
    fn a_gamma_is_applied_but_for_one_like_that_of_srgb() {
        assert_eq!(rgb(&[LINEAR], &[55, 55, 0]), [128, 128, 0]);
        for neutral in [0_u32, 43_200, 45_455, 47_700] {
            let chunk = neutral.to_be_bytes();
            assert_eq!(rgb(&[(*b"gAMA", &chunk)], &[55, 55, 0]), [55, 55, 0], "{neutral}");
        }
        // Darkest and brightest.
        assert_eq!(rgb(&[(*b"gAMA", &[0, 0, 0, 1])], &[55, 255, 0]), [0, 255, 0]);
        assert_eq!(rgb(&[(*b"gAMA", &[255; 4])], &[55, 255, 0]), [255, 255, 0]);
    }

    #[test]
    fn the_most_exact_chunk_says_the_colours() {
        let p3 = (*b"cICP", &[12, 13, 0, 1][..]);
        let srgb = (*b"sRGB", &[0][..]);
        let green = [0, 255, 0];
        assert_eq!(rgb(&[srgb, LINEAR], &[55, 55, 0]), [55, 55, 0]);
        assert_eq!(rgb(&[srgb, p3], &[115, 250, 128]), [0, 254, 111]);
        // Video range, and primaries that are reserved.
        assert_eq!(rgb(&[(*b"cICP", &[12, 13, 0, 0])], &green), green);
        assert_eq!(rgb(&[(*b"cICP", &[3, 13, 0, 1]), LINEAR], &[55, 55, 0]), [128, 128, 0]);
        // Primaries without a curve.
        let chromaticities: Vec<u8> = [31270_u32, 32900, 68000, 32000, 26500, 69000, 15000, 6000]
            .iter()
            .flat_map(|it| it.to_be_bytes())
            .collect();
        let primaries = (*b"cHRM", &chromaticities[..]);
        assert_eq!(rgb(&[primaries], &green), green);
        let gamma = 45_455_u32.to_be_bytes();
        let shown = rgb(&[(*b"gAMA", &gamma), primaries], &[115, 250, 128]);
        assert!(shown[0] < 5 && shown[1] > 250, "{shown:?}");
        // Impossible ones.
        for (white, other) in [(0, 0), (u32::MAX, u32::MAX), (30_000, 30_000)] {
            let all = [[white; 2], [other; 2], [other; 2], [other; 2]];
            let all: Vec<u8> = all.iter().flatten().flat_map(|it| it.to_be_bytes()).collect();
            assert_eq!(rgb(&[LINEAR, (*b"cHRM", &all)], &green), green);
        }
    }

    #[test]
    fn colours_brighter_than_white_are_refused() {
        for transfer in [16, 18] {
            let chunk = [9, transfer, 0, 1];
            let bytes = encode(ColorType::Rgb, BitDepth::Eight, &[(*b"cICP", &chunk)], &[1, 2, 3]);
            let refused = decode(&bytes, MediaType::Png, LIMITS);
            assert_eq!(refused, Err(colours::refused()));
            assert_eq!(measure(&bytes, LIMITS).unwrap().upright(), (1, 1));
        }
    }

    #[test]
    fn greys_of_each_depth_get_their_colours() {
        let grey = |depth, row: &[u8]| {
            let shown = pixels(&encode(ColorType::Grayscale, depth, &[LINEAR], row));
            shown.chunks(3).map(|pixel| pixel[0]).collect::<Vec<_>>()
        };
        assert_eq!(grey(BitDepth::One, &[0b0101_0000])[..3], [0, 255, 0]);
        assert_eq!(grey(BitDepth::Two, &[0b0001_1011]), [0, 156, 213, 255]);
        assert_eq!(grey(BitDepth::Four, &[0x3f]), [124, 255]);
        assert_eq!(grey(BitDepth::Eight, &[55]), [128]);
        // Less than a step of eight bits above black.
        assert_eq!(grey(BitDepth::Sixteen, &[0, 128]), [6]);
    }

    #[test]
    fn the_colour_of_transparent_pixels_is_kept() {
        let chunks = [(*b"tRNS", &[0, 55, 0, 55, 0, 0][..]), LINEAR];
        let bytes = encode(ColorType::Rgb, BitDepth::Eight, &chunks, &[55, 55, 0, 55, 55, 1]);
        assert_eq!(pixels(&bytes), [128, 128, 0, 0, 128, 128, 13, 255]);
    }

    #[test]
    fn a_palette_may_have_too_few_colours_and_too_many_alphas() {
        let indices = [0, 1, 2, 7];
        let palette = [9, 9, 9, 1, 2, 3];
        let shown = |alphas: &[u8]| {
            let chunks = [(*b"tRNS", alphas)];
            let mut bytes = encode(ColorType::Indexed, BitDepth::Eight, &chunks, &indices);
            // The encoder writes a palette of one colour.
            let at = bytes.windows(4).position(|it| it == b"PLTE").unwrap() - 4;
            let mut chunk = vec![0, 0, 0, 6];
            chunk.extend(b"PLTE");
            chunk.extend(palette);
            let mut crc = flate2::Crc::new();
            crc.update(&chunk[4..]);
            chunk.extend(crc.sum().to_be_bytes());
            bytes.splice(at..at + 15, chunk);
            pixels(&bytes)
        };
        let last = [1, 2, 3, 8];
        let expected = [[9, 9, 9, 7], last, last, last].concat();
        assert_eq!(shown(&[7, 8]), expected);
        assert_eq!(shown(&[7, 8, 3, 4, 5, 6, 6, 6]), expected);
        assert_eq!(shown(&[7])[4..8], [1, 2, 3, 255]);
    }

    #[test]
    fn a_part_of_a_file_is_no_picture() {
        let whole = encode(ColorType::Rgb, BitDepth::Eight, &[], &[55, 44, 33]);
        assert_eq!(pixels(&whole), [55, 44, 33]);
        let data = whole.windows(4).position(|it| it == b"IEND").unwrap() - 4;
        for end in [data, data - 14] {
            let cut = decode(&whole[..end], MediaType::Png, LIMITS).unwrap_err();
            assert!(matches!(cut, PictureError::Broken(_)), "{cut}");
        }
    }

    #[test]
    fn an_interlaced_picture_is_the_same() {
        let deep = |number: &u8| [*number; 6];
        let mut rows = Vec::new();
        // The pixels of a picture of 5 by 3 in the rows of its passes (PNG, third edition, §8.1).
        for row in [&[0][..], &[4], &[2], &[10, 12, 14], &[1, 3], &[11, 13], &[5, 6, 7, 8, 9]] {
            rows.push(0);
            rows.extend(row.iter().flat_map(deep));
        }
        let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut packed, &rows).unwrap();
        let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
        let head = [0, 0, 0, 5, 0, 0, 0, 3, 16, 2, 0, 0, 1];
        let data = packed.finish().unwrap();
        for (kind, data) in [(b"IHDR", &head[..]), (b"IDAT", &data), (b"IEND", &[])] {
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(kind);
            bytes.extend(data);
            let mut crc = flate2::Crc::new();
            crc.update(kind);
            crc.update(data);
            bytes.extend(crc.sum().to_be_bytes());
        }
        let expected: Vec<u8> = (0..15).flat_map(|number| [number; 3]).collect();
        assert_eq!(pixels(&bytes), expected);
    }

    #[test]
    fn a_deep_png_is_the_same_picture() {
        let value = |x: u32, y: u32, channel: u32| {
            u16::try_from((x * 7919 + y * 104_729 + channel * 31_337) % 65_536).unwrap()
        };
        let (width, height) = (61, 33);
        let pixel = |x, y| [0, 1, 2, 3].map(|channel| value(x, y, channel));
        let whole = ::image::ImageBuffer::from_fn(width, height, |x, y| ::image::Rgba(pixel(x, y)));
        let whole = DynamicImage::ImageRgba16(whole);
        for picture in [
            DynamicImage::ImageLuma16(whole.to_luma16()),
            DynamicImage::ImageLumaA16(whole.to_luma_alpha16()),
            DynamicImage::ImageRgb16(whole.to_rgb16()),
            whole,
        ] {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
            let bytes = bytes.into_inner();
            let shown = decode(&bytes, MediaType::Png, LIMITS).unwrap();
            if picture.color().has_alpha() {
                assert_eq!(shown, DynamicImage::ImageRgba8(picture.to_rgba8()));
            } else {
                assert_eq!(shown, DynamicImage::ImageRgb8(picture.to_rgb8()));
            }
            // A part of a picture is none.
            let cut = &bytes[..bytes.len() / 2];
            let error = decode(cut, MediaType::Png, LIMITS).unwrap_err();
            assert!(matches!(error, PictureError::Broken(_)), "{error}");
        }
    }
}
