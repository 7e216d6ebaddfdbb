//! From bytes to pixels: 8 bits a channel, sRGB.

use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{
    ColorType, DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, RgbImage,
    RgbaImage,
};
use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

use super::{PictureError, RenderLimits, resize};
use crate::image::MediaType;
use crate::image::bounds::Bounds;

fn format(media_type: MediaType) -> Option<ImageFormat> {
    match media_type {
        MediaType::Png => Some(ImageFormat::Png),
        MediaType::Jpeg => Some(ImageFormat::Jpeg),
        MediaType::Gif => Some(ImageFormat::Gif),
        MediaType::WebP => Some(ImageFormat::WebP),
        MediaType::Bmp => Some(ImageFormat::Bmp),
        MediaType::Ico => Some(ImageFormat::Ico),
        MediaType::Tiff => Some(ImageFormat::Tiff),
        MediaType::Avif | MediaType::Heic | MediaType::JpegXl | MediaType::Svg => None,
    }
}

/// True for an image with more than one frame. Only headers are read: no pixel is decoded, and nothing is allocated,
/// whatever they claim.
#[must_use]
pub fn is_animated(bytes: &[u8], media_type: MediaType) -> bool {
    match media_type {
        MediaType::Png => png_is_animated(bytes),
        MediaType::WebP => webp_is_animated(bytes),
        MediaType::Gif => gif_is_animated(bytes),
        _ => None,
    }
    .unwrap_or(false)
}

/// An animated PNG has `acTL` before its pixels (PNG, third edition, §11.3.6.1).
fn png_is_animated(bytes: &[u8]) -> Option<bool> {
    let mut at = 8;
    loop {
        let (length, rest) = bytes.get(at..)?.split_first_chunk()?;
        match rest.get(..4)? {
            b"acTL" => return Some(true),
            b"IDAT" => return Some(false),
            _ => at += 12 + u32::from_be_bytes(*length) as usize,
        }
    }
}

/// Reads the animation flag of an extended WebP file (RFC 9649 §2.7).
fn webp_is_animated(bytes: &[u8]) -> Option<bool> {
    Some(bytes.get(12..16)? == b"VP8X" && bytes.get(20)? & 2 != 0)
}

/// Looks for a second image descriptor in a GIF (`GIF89a` §20). The blocks before it are skipped by their lengths.
fn gif_is_animated(bytes: &[u8]) -> Option<bool> {
    let table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 6 << (flags & 7) };
    let mut at = 13 + table(*bytes.get(10)?);
    let mut frames = 0;
    loop {
        at += match bytes.get(at)? {
            b',' if frames == 1 => return Some(true),
            b',' => {
                frames += 1;
                11 + table(*bytes.get(at + 9)?)
            }
            b'!' => 2,
            _ => return Some(false),
        };
        // Data come in blocks of up to 255 bytes; an empty block is the last.
        while let length @ 1.. = *bytes.get(at)? {
            at += 1 + usize::from(length);
        }
        at += 1;
    }
}

/// A decoded picture, not yet upright: a small one is turned in less time and memory.
#[derive(Debug)]
pub(super) struct Decoded {
    pixels: DynamicImage,
    orientation: Orientation,
}

impl Decoded {
    /// Width and height with the orientation applied.
    pub(super) fn upright(&self) -> (u32, u32) {
        upright((self.pixels.width(), self.pixels.height()), self.orientation)
    }

    /// Fits the picture into bounds, and applies the orientation.
    pub(super) fn resized(self, bounds: Bounds) -> Result<DynamicImage, PictureError> {
        let mut picture = resize::resize(self.pixels, unturned(bounds, self.orientation))?;
        picture.apply_orientation(self.orientation);
        Ok(picture)
    }

    /// Fits the picture into one bounds and into others, and applies the orientation to both.
    pub(super) fn resized_twice(
        self,
        one: Bounds,
        other: Bounds,
    ) -> Result<(DynamicImage, DynamicImage), PictureError> {
        let [one, other] = [one, other].map(|bounds| unturned(bounds, self.orientation));
        let (mut one, mut other) = resize::resize_twice(self.pixels, one, other)?;
        one.apply_orientation(self.orientation);
        other.apply_orientation(self.orientation);
        Ok((one, other))
    }
}

/// Bounds for a picture before its orientation is applied.
fn unturned(bounds: Bounds, orientation: Orientation) -> Bounds {
    match upright((0, 1), orientation) {
        (0, _) => bounds,
        _turned => Bounds { width: bounds.height, height: bounds.width, ..bounds },
    }
}

/// The size of a picture after its orientation is applied.
fn upright((width, height): (u32, u32), orientation: Orientation) -> (u32, u32) {
    match orientation {
        Orientation::Rotate90
        | Orientation::Rotate270
        | Orientation::Rotate90FlipH
        | Orientation::Rotate270FlipH => (height, width),
        Orientation::NoTransforms
        | Orientation::Rotate180
        | Orientation::FlipHorizontal
        | Orientation::FlipVertical => (width, height),
    }
}

/// The size of a source, and the memory that its pixels take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measure {
    size: (u32, u32),
    orientation: Orientation,
    /// Bytes that decoding takes at most.
    decoding: u64,
    /// Bytes of the decoded picture.
    decoded: u64,
}

impl Measure {
    /// Width and height with the orientation applied.
    pub(super) fn upright(&self) -> (u32, u32) {
        upright(self.size, self.orientation)
    }

    /// Bytes that decoding takes at most, and scaling to a size.
    pub(super) fn memory(&self, width: u32, height: u32) -> u64 {
        let (width, height) = (u64::from(width), u64::from(height));
        let (_, rows) = self.upright();
        // The product, its copy that is turned, and between the two passes over the source all of its rows.
        let scaling = 4 * width * (2 * height + u64::from(rows).max(height));
        self.decoding.max(self.decoded + scaling)
    }
}

/// Decodes an image, or its first frame, with the orientation applied and the colours converted to sRGB.
pub fn decode(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<DynamicImage, PictureError> {
    let Decoded { mut pixels, orientation } = decode_unturned(bytes, media_type, limits)?;
    pixels.apply_orientation(orientation);
    Ok(pixels)
}

/// The same as [`decode`], but for the orientation.
pub(super) fn decode_unturned(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Decoded, PictureError> {
    guarded(|| decode_or_panic(bytes, media_type, limits))
}

/// Measures an image, or its first frame, by its head.
pub(super) fn measure(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Measure, PictureError> {
    guarded(|| measure_or_panic(bytes, media_type, limits))
}

fn guarded<T>(decode: impl FnOnce() -> Result<T, PictureError>) -> Result<T, PictureError> {
    // The TIFF decoder panics on tiled planes. Nothing that a decoder leaves behind is used again.
    let decoded = catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_panic| Err(PictureError::Broken("the decoder panicked".to_owned())));
    decoded.map_err(|error| match error {
        PictureError::TimedOut => PictureError::DecodingTimedOut,
        error => error,
    })
}

fn measure_or_panic(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Measure, PictureError> {
    let Source { bytes, format, mut decoder } = open(bytes, media_type, limits)?;
    let size = decoder.dimensions();
    let pixels = u64::from(size.0) * u64::from(size.1);
    let colour = decoder.color_type();
    let decoded = pixels * if colour.has_alpha() { 4 } else { 3 };
    let is_direct = matches!(colour, ColorType::Rgb8 | ColorType::Rgba8);
    let whole = if is_direct || is_read_by_rows(bytes, format, colour) {
        decoded
    } else {
        decoder.total_bytes() + decoded
    };
    // What the decoders keep beside their output, by their code.
    let beside = match format {
        // The coefficients of all scans.
        ImageFormat::Jpeg if jpeg_is_progressive(bytes).unwrap_or(false) => 6 * pixels,
        ImageFormat::WebP if bytes.get(12..16) == Some(b"VP8L") => 4 * pixels,
        // Planes of brightness, two of colour at half the resolution, and of alpha.
        ImageFormat::WebP => {
            if colour.has_alpha() {
                5 * pixels / 2
            } else {
                3 * pixels / 2
            }
        }
        ImageFormat::Gif => 4 * pixels,
        ImageFormat::Tiff => decoder.total_bytes(),
        _ => 0,
    };
    let orientation = orientation(&mut decoder);
    let decoding = whole + beside + 2 * bytes.len() as u64;
    Ok(Measure { size, orientation, decoding, decoded })
}

/// An image whose head was read.
struct Source<'a, D> {
    bytes: &'a [u8],
    format: ImageFormat,
    decoder: D,
}

/// Reads the head of an image.
fn open(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Source<'_, impl ImageDecoder + '_>, PictureError> {
    let mut format = format(media_type).ok_or(PictureError::Opaque(media_type))?;
    let mut bytes = bytes;
    if let (ImageFormat::Ico, Some(png)) = (format, png_of_icon(bytes)) {
        (format, bytes) = (ImageFormat::Png, png);
    }
    if format == ImageFormat::Jpeg && jpeg_is_in_scans(bytes).unwrap_or(false) {
        return Err(PictureError::Broken(
            "a baseline JPEG with a scan for each component can't be decoded".to_owned(),
        ));
    }
    let bytes_in_time = DeadlineReader { bytes: Cursor::new(bytes), limits };
    let mut reader = ImageReader::with_format(bytes_in_time, format);
    let broken = |error: &ImageError| match limits.check_time() {
        Ok(()) => broken(error),
        Err(late) => late,
    };
    // The PNG decoder unpacks a profile when it is created, so it needs its memory limit before that.
    let size = png_size(bytes).filter(|_| format == ImageFormat::Png).unwrap_or((0, 0));
    reader.limits(memory(size, bytes.len(), limits)?);
    let mut decoder = reader.into_decoder().map_err(|error| broken(&error))?;
    // This comes before anything is allocated for the pixels.
    let memory = memory(decoder.dimensions(), bytes.len(), limits)?;
    decoder.set_limits(memory).map_err(|error| broken(&error))?;
    Ok(Source { bytes, format, decoder })
}

fn decode_or_panic(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Decoded, PictureError> {
    let Source { bytes, format, mut decoder } = open(bytes, media_type, limits)?;
    let broken = |error: &ImageError| match limits.check_time() {
        Ok(()) => broken(error),
        Err(late) => late,
    };
    let orientation = orientation(&mut decoder);
    let profile = decoder.icc_profile().ok().flatten();
    let picture = if is_read_by_rows(bytes, format, decoder.color_type()) {
        let size = decoder.dimensions();
        drop(decoder);
        let read = png_by_rows(bytes, size, limits);
        read.map_err(|error| match limits.check_time() {
            Ok(()) => shortened(&error.to_string()),
            Err(late) => late,
        })?
    } else {
        DynamicImage::from_decoder(decoder).map_err(|error| broken(&error))?
    };
    let mut picture = if picture.color().has_alpha() {
        DynamicImage::ImageRgba8(picture.into_rgba8())
    } else {
        DynamicImage::ImageRgb8(picture.into_rgb8())
    };
    if let Some(profile) = profile {
        to_srgb(&mut picture, &profile);
    }
    Ok(Decoded { pixels: picture, orientation })
}

/// True for a PNG of 16 bits a channel that can be read row by row. Its pixels would take twice the memory, and their copy of
/// 8 bits a channel half as much again.
fn is_read_by_rows(bytes: &[u8], format: ImageFormat, colour: ColorType) -> bool {
    /// The interlace method in the first chunk (PNG, third edition, §11.2.1).
    const INTERLACE: usize = 28;
    let is_deep =
        matches!(colour, ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16);
    format == ImageFormat::Png && is_deep && bytes.get(INTERLACE) == Some(&0)
}

/// Decodes a PNG of 16 bits a channel to 8 bits.
fn png_by_rows(
    bytes: &[u8],
    (width, height): (u32, u32),
    limits: RenderLimits,
) -> Result<DynamicImage, png::DecodingError> {
    /// Enough for rows. Nothing else is read.
    const MEMORY: usize = 64 << 20;
    let bytes_in_time = DeadlineReader { bytes: Cursor::new(bytes), limits };
    let mut decoder = png::Decoder::new_with_limits(bytes_in_time, png::Limits { bytes: MEMORY });
    decoder.set_transformations(png::Transformations::EXPAND);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info()?;
    // A grey value is that of all three colours.
    let (colour, _depth) = reader.output_color_type();
    let [red, green, blue, alpha] = match colour {
        png::ColorType::Grayscale | png::ColorType::Indexed => [0, 0, 0, 0],
        png::ColorType::GrayscaleAlpha => [0, 0, 0, 1],
        png::ColorType::Rgb => [0, 1, 2, 0],
        png::ColorType::Rgba => [0, 1, 2, 3],
    };
    let channels: &[usize] =
        if alpha > 0 { &[red, green, blue, alpha] } else { &[red, green, blue] };
    let line = width as usize * channels.len();
    let mut pixels = vec![0; line * height as usize];
    for line in pixels.chunks_exact_mut(line) {
        let Some(row) = reader.next_row()? else { break };
        let (values, _) = row.data().as_chunks::<2>();
        let source = values.chunks_exact(colour.samples());
        for (pixel, values) in line.chunks_exact_mut(channels.len()).zip(source) {
            for (value, channel) in pixel.iter_mut().zip(channels) {
                *value = to_8_bits(u16::from_be_bytes(values[*channel]));
            }
        }
    }
    let picture = if alpha > 0 {
        RgbaImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgba8)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
    };
    Ok(picture.expect("each row has its pixels"))
}

/// Rounds as `image` does.
#[expect(clippy::cast_possible_truncation, reason = "65535 becomes 255")]
fn to_8_bits(value: u16) -> u8 {
    ((u32::from(value) + 128) / 257) as u8
}

/// True for a progressive JPEG, whose coefficients are all kept until its last scan.
fn jpeg_is_progressive(bytes: &[u8]) -> Option<bool> {
    let mut at = 2;
    loop {
        while bytes.get(at..at + 2)? == [0xff, 0xff] {
            at += 1;
        }
        let (marker, segment) = (*bytes.get(at + 1)?, bytes.get(at + 2..)?);
        match marker {
            0xc2 | 0xc6 | 0xca | 0xce => return Some(true),
            0xc0 | 0xc1 | 0xda => return Some(false),
            _ => at += 2 + usize::from(u16::from_be_bytes(*segment.first_chunk()?)),
        }
    }
}

/// A reader that fails after the deadline, and with it the decoder.
struct DeadlineReader<'a> {
    bytes: Cursor<&'a [u8]>,
    limits: RenderLimits,
}

impl DeadlineReader<'_> {
    fn check(&self) -> io::Result<()> {
        self.limits.check_time().map_err(|late| io::Error::new(io::ErrorKind::TimedOut, late))
    }
}

impl Read for DeadlineReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        self.bytes.read(buffer)
    }
}

impl BufRead for DeadlineReader<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        /// Bytes that are read between two looks at the time.
        const PIECE: usize = 64 * 1024;
        self.check()?;
        let rest = self.bytes.fill_buf()?;
        Ok(&rest[..rest.len().min(PIECE)])
    }

    fn consume(&mut self, read: usize) {
        self.bytes.consume(read);
    }
}

impl Seek for DeadlineReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.bytes.seek(to)
    }
}

/// The rotation that the picture needs. EXIF begins with a mark in JPEG only, but some writers put it into WebP, too.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    let plain = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let exif = decoder.exif_metadata().ok().flatten();
    let marked = exif.as_deref().and_then(|exif| exif.strip_prefix(b"Exif\0\0"));
    marked.and_then(Orientation::from_exif_chunk).unwrap_or(plain)
}

/// The memory limit of a decoder for an image of some size.
fn memory(
    (width, height): (u32, u32),
    length: usize,
    limits: RenderLimits,
) -> Result<image::Limits, PictureError> {
    /// For a colour profile, and for the parts of tiles beyond the edges of the picture.
    const BESIDES: u64 = 32 << 20;
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.pixels {
        return Err(PictureError::TooManyPixels { width, height, limit: limits.pixels });
    }
    let mut memory = image::Limits::default();
    // A pixel has at most four channels of sixteen bits, and a decoder needs up to as much again. Texts are kept as
    // they are in the file.
    let most = pixels.saturating_mul(16).saturating_add(2 * length as u64).saturating_add(BESIDES);
    memory.max_alloc = Some(most);
    Ok(memory)
}

/// Width and height of a PNG, with which its first chunk begins.
fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let (width, rest) = bytes.get(16..)?.split_first_chunk()?;
    Some((u32::from_be_bytes(*width), u32::from_be_bytes(*rest.first_chunk()?)))
}

/// True for a JPEG that isn't progressive but has a scan for each component. Such files are rare. If their colour has
/// half the resolution, zune-jpeg decodes them to stripes without an error (zune-image#419, mended after 0.5.15).
fn jpeg_is_in_scans(bytes: &[u8]) -> Option<bool> {
    let (mut at, mut components) = (2, 0);
    loop {
        // A marker (ITU-T T.81, annex B) is 0xff, perhaps repeated, and its code.
        while bytes.get(at..at + 2)? == [0xff, 0xff] {
            at += 1;
        }
        let (marker, segment) = (*bytes.get(at + 1)?, bytes.get(at + 2..)?);
        let length = usize::from(u16::from_be_bytes(*segment.first_chunk()?));
        match marker {
            // Baseline and extended sequential: the number of components, if they differ in resolution.
            0xc0 | 0xc1 => {
                let all = *segment.get(7)?;
                let (each, _) = segment.get(8..)?.get(..3 * usize::from(all))?.as_chunks::<3>();
                let differ = each.iter().any(|it| it[1] != each[0][1]);
                components = if differ { all } else { 0 };
            }
            // The first scan: its number of components.
            0xda => return Some(components > *segment.get(2)?),
            0xc2..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => return Some(false),
            _ => {}
        }
        at += 2 + length;
    }
}

/// The PNG inside an icon, if its best picture is one. The icon decoder sets it no limits, and refuses PNGs without
/// alpha, which favicon generators write.
fn png_of_icon(bytes: &[u8]) -> Option<&[u8]> {
    let count = u16::from_le_bytes(*bytes.get(4..)?.first_chunk()?);
    let (entries, _) = bytes.get(6..)?.get(..16 * usize::from(count))?.as_chunks::<16>();
    // The choice must be that of the icon decoder, which gets all other icons. A side of 0 means 256.
    let score = |entry: &[u8; 16]| {
        let side = |at: usize| u32::from(entry[at].wrapping_sub(1)) + 1;
        (u16::from_le_bytes([entry[6], entry[7]]), side(0) * side(1))
    };
    let (last, others) = entries.split_last()?;
    let best = others.iter().fold(last, |best, it| if score(it) > score(best) { it } else { best });
    let offset = u32::from_le_bytes(*best.last_chunk()?);
    bytes.get(usize::try_from(offset).ok()?..).filter(|it| it.starts_with(b"\x89PNG\r\n\x1a\n"))
}

/// Converts colours by an embedded profile. Like in browsers, a profile that is malformed, or of another space than the
/// decoded pixels (CMYK), is ignored.
fn to_srgb(picture: &mut DynamicImage, profile: &[u8]) {
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

/// An error of a decoder for the client: its first line, shortened.
fn broken(error: &ImageError) -> PictureError {
    shortened(&error.to_string())
}

fn shortened(text: &str) -> PictureError {
    let line = text.lines().next().unwrap_or_default();
    PictureError::Broken(line.chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    use super::*;

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
            assert!(is_read_by_rows(&bytes, ImageFormat::Png, picture.color()));
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

    #[test]
    fn a_source_is_measured_by_its_head() {
        let limits = RenderLimits { pixels: 100_000_000, deadline: None };
        let decoding = |picture: &DynamicImage, format, media_type| {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, format).unwrap();
            let bytes = bytes.into_inner();
            let measure = measure(&bytes, media_type, limits).unwrap();
            (measure.decoding - 2 * bytes.len() as u64) / 10_000
        };
        let (png, jpeg) =
            ((ImageFormat::Png, MediaType::Png), (ImageFormat::Jpeg, MediaType::Jpeg));
        for (picture, (format, media_type), bytes) in [
            (DynamicImage::new_rgb8(100, 100), png, 3),
            (DynamicImage::new_rgba8(100, 100), png, 4),
            (DynamicImage::new_rgba16(100, 100), png, 4),
            // In grey first, then in colours.
            (DynamicImage::new_luma8(100, 100), png, 1 + 3),
            (DynamicImage::new_rgb8(100, 100), jpeg, 3),
            (DynamicImage::new_rgba16(100, 100), (ImageFormat::Tiff, MediaType::Tiff), 8 + 4 + 8),
        ] {
            assert_eq!(decoding(&picture, format, media_type), bytes, "{format:?}");
        }
        let too_large = RenderLimits { pixels: 9_999, deadline: None };
        let mut bytes = Cursor::new(Vec::new());
        DynamicImage::new_rgb8(100, 100).write_to(&mut bytes, ImageFormat::Png).unwrap();
        let refused = measure(bytes.get_ref(), MediaType::Png, too_large);
        assert!(matches!(refused, Err(PictureError::TooManyPixels { .. })), "{refused:?}");
    }

    #[test]
    fn a_jpeg_that_would_come_out_in_stripes_is_refused() {
        let pixels: Vec<u8> = (0..48 * 32 * 3).map(|it| u8::try_from(it % 251).unwrap()).collect();
        let decoded = |sampling, in_scans| {
            let mut bytes = Vec::new();
            let mut encoder = Encoder::new(&mut bytes, 90);
            encoder.set_sampling_factor(sampling);
            encoder.set_optimized_huffman_tables(in_scans);
            encoder.encode(&pixels, 48, 32, ColorType::Rgb).unwrap();
            decode(&bytes, MediaType::Jpeg, RenderLimits { pixels: 10_000, deadline: None })
        };
        assert!(decoded(SamplingFactor::F_2_2, false).is_ok());
        assert!(decoded(SamplingFactor::F_1_1, true).is_ok());
        let refused = decoded(SamplingFactor::F_2_2, true).unwrap_err();
        assert!(refused.to_string().contains("a scan for each component"), "{refused}");
    }
}
