//! From bytes to pixels: 8 bits a channel, sRGB, upright.

use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};
use moxcms::{ColorProfile, DataColorSpace, Layout, TransformOptions};

use super::{PictureError, RenderLimits};
use crate::image::MediaType;

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

/// Decodes an image, or its first frame, with the orientation applied and the colours converted to sRGB.
pub fn decode(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<DynamicImage, PictureError> {
    // The TIFF decoder panics on tiled planes. Nothing that a decoder leaves behind is used again.
    catch_unwind(AssertUnwindSafe(|| decode_or_panic(bytes, media_type, limits)))
        .unwrap_or_else(|_panic| Err(PictureError::Broken("the decoder panicked".to_owned())))
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

/// An error of a decoder for the client: its first line, shortened.
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
