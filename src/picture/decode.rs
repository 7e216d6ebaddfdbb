//! From bytes to pixels: 8 bits a channel, sRGB, upright.

use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};
use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

use super::{PictureError, RenderLimits};
use crate::image::MediaType;

/// Whether images of a type can be decoded.
///
/// AVIF, HEIC and JPEG XL can't: their decoders are C libraries of the system, or take minutes to build. They are
/// served as they are. So is SVG, which has no pixels.
#[must_use]
pub fn is_decodable(media_type: MediaType) -> bool {
    format(media_type).is_some()
}

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

/// Whether an image has more than one bounds. Looks at headers alone: no pixel is decoded, and nothing is allocated,
/// whatever they say.
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

/// An animated PNG says so before its pixels (PNG, third edition, §11.3.6.1).
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

/// The second of the flags of an extended WebP file (RFC 9649 §2.7).
fn webp_is_animated(bytes: &[u8]) -> Option<bool> {
    Some(bytes.get(12..16)? == b"VP8X" && bytes.get(20)? & 2 != 0)
}

/// Whether a GIF has a second image descriptor (`GIF89a` §20). What is between them is passed over by its length.
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
        // Data in blocks of up to 255 bytes; an empty one is the last.
        while let length @ 1.. = *bytes.get(at)? {
            at += 1 + usize::from(length);
        }
        at += 1;
    }
}

/// The pixels of an image, or of its first bounds, with its orientation applied and its colours in sRGB.
pub fn decode(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<DynamicImage, PictureError> {
    // The decoder of TIFF panics where planes are tiled. Nothing of what a decoder leaves behind is used again.
    catch_unwind(AssertUnwindSafe(|| decode_or_panic(bytes, media_type, limits)))
        .unwrap_or_else(|_panic| Err(PictureError::Broken("the decoder gave up on it".to_owned())))
}

fn decode_or_panic(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<DynamicImage, PictureError> {
    let format = format(media_type).ok_or(PictureError::Opaque(media_type))?;
    if let (ImageFormat::Ico, Some(png)) = (format, png_of_icon(bytes)) {
        return decode_or_panic(png, MediaType::Png, limits);
    }
    if format == ImageFormat::Jpeg && jpeg_is_in_scans(bytes).unwrap_or(false) {
        return Err(PictureError::Broken(
            "a baseline JPEG with a scan for each component isn't decoded here".to_owned(),
        ));
    }
    let bytes_in_time = DeadlineReader { bytes: Cursor::new(bytes), limits };
    let mut reader = ImageReader::with_format(bytes_in_time, format);
    let broken = |error: &ImageError| match limits.check_time() {
        Ok(()) => broken(error),
        Err(late) => late,
    };
    // The PNG decoder unpacks a profile as soon as it is made, so it is told before that how much it may take.
    let size = png_size(bytes).filter(|_| format == ImageFormat::Png).unwrap_or((0, 0));
    reader.limits(memory(size, bytes.len(), limits)?);
    let mut decoder = reader.into_decoder().map_err(|error| broken(&error))?;
    // Before anything is allocated for the pixels.
    let memory = memory(decoder.dimensions(), bytes.len(), limits)?;
    decoder.set_limits(memory).map_err(|error| broken(&error))?;
    let orientation = orientation(&mut decoder);
    let profile = decoder.icc_profile().ok().flatten();
    let picture = DynamicImage::from_decoder(decoder).map_err(|error| broken(&error))?;
    let mut picture = if picture.color().has_alpha() {
        DynamicImage::ImageRgba8(picture.into_rgba8())
    } else {
        DynamicImage::ImageRgb8(picture.into_rgb8())
    };
    if let Some(profile) = profile {
        to_srgb(&mut picture, &profile);
    }
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// Bytes that can be read as long as there is time: a decoder that reads on after that fails.
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
        /// So much is read before the time is looked at again.
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

/// How the picture has to be turned. Some writers put before EXIF, in WebP too, the mark that it has in JPEG alone.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    let plain = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let exif = decoder.exif_metadata().ok().flatten();
    let marked = exif.as_deref().and_then(|exif| exif.strip_prefix(b"Exif\0\0"));
    marked.and_then(Orientation::from_exif_chunk).unwrap_or(plain)
}

/// What a decoder may allocate for an image of some size.
fn memory(
    (width, height): (u32, u32),
    length: usize,
    limits: RenderLimits,
) -> Result<image::Limits, PictureError> {
    /// For a profile, and for what tiles have beyond the edge of the picture.
    const BESIDES: u64 = 32 << 20;
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.pixels {
        return Err(PictureError::TooManyPixels { width, height, limit: limits.pixels });
    }
    let mut memory = image::Limits::default();
    // Sixteen bits in four channels are the most that a pixel has, and a decoder keeps up to as much beside. Texts
    // are kept as they are in the file.
    let most = pixels.saturating_mul(16).saturating_add(2 * length as u64).saturating_add(BESIDES);
    memory.max_alloc = Some(most);
    Ok(memory)
}

/// The width and height of a PNG, which its first chunk begins with.
fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let (width, rest) = bytes.get(16..)?.split_first_chunk()?;
    Some((u32::from_be_bytes(*width), u32::from_be_bytes(*rest.first_chunk()?)))
}

/// Whether a JPEG that isn't progressive has its components in scans of their own. They are few, and zune-jpeg makes
/// stripes of those whose colour has half of the resolution, without an error (zune-image#419, mended after 0.5.15).
fn jpeg_is_in_scans(bytes: &[u8]) -> Option<bool> {
    let (mut at, mut components) = (2, 0);
    loop {
        // Markers (ITU-T T.81, annex B): 0xff, maybe more of these, and what it is.
        while bytes.get(at..at + 2)? == [0xff, 0xff] {
            at += 1;
        }
        let (marker, segment) = (*bytes.get(at + 1)?, bytes.get(at + 2..)?);
        let length = usize::from(u16::from_be_bytes(*segment.first_chunk()?));
        match marker {
            // Baseline and extended sequential: how many components there are, where they differ in resolution.
            0xc0 | 0xc1 => {
                let all = *segment.get(7)?;
                let (each, _) = segment.get(8..)?.get(..3 * usize::from(all))?.as_chunks::<3>();
                let differ = each.iter().any(|it| it[1] != each[0][1]);
                components = if differ { all } else { 0 };
            }
            // The first scan: how many it has.
            0xda => return Some(components > *segment.get(2)?),
            0xc2..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => return Some(false),
            _ => {}
        }
        at += 2 + length;
    }
}

/// The PNG inside an icon, if its best picture is one. The icon decoder has no limits for it, and refuses those
/// without alpha, which favicon generators write.
fn png_of_icon(bytes: &[u8]) -> Option<&[u8]> {
    let count = u16::from_le_bytes(*bytes.get(4..)?.first_chunk()?);
    let (entries, _) = bytes.get(6..)?.get(..16 * usize::from(count))?.as_chunks::<16>();
    // As the icon decoder chooses, which gets those that aren't PNG. A side of 0 means 256.
    let score = |entry: &[u8; 16]| {
        let side = |at: usize| u32::from(entry[at].wrapping_sub(1)) + 1;
        (u16::from_le_bytes([entry[6], entry[7]]), side(0) * side(1))
    };
    let (last, others) = entries.split_last()?;
    let best = others.iter().fold(last, |best, it| if score(it) > score(best) { it } else { best });
    let offset = u32::from_le_bytes(*best.last_chunk()?);
    bytes.get(usize::try_from(offset).ok()?..).filter(|it| it.starts_with(b"\x89PNG\r\n\x1a\n"))
}

/// Converts colours by an embedded profile. One that can't be read, or is of another space than the pixels were
/// decoded to (CMYK), is passed over, as browsers do.
fn to_srgb(picture: &mut DynamicImage, profile: &[u8]) {
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
    let source = pixels.to_vec();
    if transform.transform(&source, pixels).is_err() {
        pixels.copy_from_slice(&source);
    }
}

/// What a client may know of an error: its first line, and not too much of it.
fn broken(error: &ImageError) -> PictureError {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    PictureError::Broken(line.chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    use super::*;

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
