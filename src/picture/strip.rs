//! Metadata that are embedded in a file: finds them by the file's headers, and removes them without touching the pixels.
//!
//! The lists are of what is kept, so that of a new kind of metadata nothing is given away. What changes the look of a picture
//! is kept: colours, transparency, the timing of frames.

use std::ops::Range;

use image::metadata::Orientation;

#[cfg(feature = "read-avif")]
use super::decode::avif;
#[cfg(feature = "read-jxl")]
use super::decode::jxl;
use super::decode::{exif, is_animated};
use crate::image::{Embedded, MediaType, Traits};

/// Tells the traits of an image. Only headers are read: no pixel is decoded.
#[must_use]
pub fn traits(bytes: &[u8], media_type: MediaType) -> Traits {
    let embedded = match media_type {
        MediaType::Jpeg | MediaType::Png | MediaType::WebP | MediaType::Gif => {
            match Parts::of(bytes, media_type) {
                Some(parts) if parts.is_turned() => Embedded::Inseparable,
                Some(parts) if parts.has_removed => Embedded::Removable,
                Some(_) => Embedded::Nothing,
                // A decoder may read what this can't.
                None => Embedded::Inseparable,
            }
        }
        // Tags for pixels and for everything else stand in one directory.
        MediaType::Tiff if tiff_is_bare(bytes) != Some(true) => Embedded::Inseparable,
        // Places of items would have to be moved.
        #[cfg(feature = "read-avif")]
        MediaType::Avif if avif::has_metadata(bytes) != Some(false) => Embedded::Inseparable,
        #[cfg(feature = "read-jxl")]
        MediaType::JpegXl if jxl::has_metadata(bytes) != Some(false) => Embedded::Inseparable,
        MediaType::Tiff
        | MediaType::Bmp
        | MediaType::Ico
        | MediaType::Avif
        | MediaType::Heic
        | MediaType::JpegXl
        | MediaType::Svg => Embedded::Nothing,
    };
    Traits { animated: is_animated(bytes, media_type), embedded }
}

/// True for a TIFF of one directory without a tag that isn't about pixels, and upright (TIFF 6.0, section 2).
fn tiff_is_bare(bytes: &[u8]) -> Option<bool> {
    const ORIENTATION: u16 = 274;
    const COLOUR_PROFILE: u16 = 34675;
    let big_endian = match bytes.first_chunk()? {
        b"II\x2a\0" => false,
        b"MM\0\x2a" => true,
        _big_tiff => return None,
    };
    let short = |at: usize| {
        let two = *bytes.get(at..)?.first_chunk()?;
        Some(if big_endian { u16::from_be_bytes(two) } else { u16::from_le_bytes(two) })
    };
    let long = |at: usize| {
        let four = *bytes.get(at..)?.first_chunk()?;
        Some(if big_endian { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) })
    };
    let directory = usize::try_from(long(4)?).ok()?;
    let count = usize::from(short(directory)?);
    let after = directory.checked_add(2 + 12 * count)?;
    let mut entries = (0..count).map(|number| directory + 2 + 12 * number);
    let is_bare = entries.all(|entry| match short(entry) {
        Some(ORIENTATION) => short(entry + 8) == Some(1),
        // Size, coding, layout, resolution, colours and JPEG tables, but no names, dates and programs.
        Some(
            254..=266
            | 273
            | 277..=284
            | 290..=301
            | 317..=325
            | 332..=347
            | 512..=532
            | COLOUR_PROFILE,
        ) => true,
        _ => false,
    });
    Some(is_bare && long(after)? == 0)
}

/// Removes the metadata from a file, all but the orientation. `None` for a type whose metadata can't be removed, and for a
/// file whose structure can't be read.
#[must_use]
pub fn strip(bytes: &[u8], media_type: MediaType) -> Option<Vec<u8>> {
    let parts = Parts::of(bytes, media_type)?;
    let mut stripped = Vec::with_capacity(bytes.len());
    let exif = parts.is_turned().then(|| exif_of(parts.orientation));
    match media_type {
        MediaType::Jpeg => {
            stripped.extend_from_slice(&bytes[..2]);
            if let Some(exif) = exif {
                // The length counts its own two bytes, and the mark.
                stripped.extend_from_slice(&[0xff, 0xe1, 0, 2 + 6 + EXIF_LENGTH]);
                stripped.extend_from_slice(b"Exif\0\0");
                stripped.extend_from_slice(&exif);
            }
            parts.copy(bytes, &mut stripped);
        }
        MediaType::Png => {
            stripped.extend_from_slice(&bytes[..PNG_HEADER]);
            if let Some(exif) = exif {
                let chunk = [&b"eXIf"[..], &exif].concat();
                stripped.extend_from_slice(&[0, 0, 0, EXIF_LENGTH]);
                stripped.extend_from_slice(&chunk);
                stripped.extend_from_slice(&crc(&chunk));
            }
            parts.copy(bytes, &mut stripped);
        }
        MediaType::WebP => {
            stripped.extend_from_slice(&bytes[..12]);
            parts.copy(bytes, &mut stripped);
            let is_extended = stripped.get(12..16) == Some(b"VP8X");
            if let Some(flags) = stripped.get_mut(20).filter(|_| is_extended) {
                *flags &= !(WEBP_EXIF | WEBP_XMP);
                if let Some(exif) = exif {
                    *flags |= WEBP_EXIF;
                    stripped.extend_from_slice(b"EXIF");
                    stripped.extend_from_slice(&[EXIF_LENGTH, 0, 0, 0]);
                    stripped.extend_from_slice(&exif);
                }
            }
            let length = u32::try_from(stripped.len() - 8).ok()?;
            stripped[4..8].copy_from_slice(&length.to_le_bytes());
        }
        _gif => parts.copy(bytes, &mut stripped),
    }
    Some(stripped)
}

/// The length of [`exif_of`]: even, as WebP needs it.
const EXIF_LENGTH: u8 = 26;

/// EXIF metadata of nothing but an orientation: a TIFF header and one directory of one tag (EXIF 2.32 §4.6.4).
fn exif_of(orientation: Orientation) -> [u8; EXIF_LENGTH as usize] {
    let mut exif = *b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\0\0\0\0\0\0\0";
    exif[19] = orientation.to_exif();
    exif
}

/// The signature of a PNG and its first chunk.
const PNG_HEADER: usize = 33;

/// Flags of the first chunk of a WebP file (RFC 9649 §2.7).
const WEBP_EXIF: u8 = 0b1000;
const WEBP_XMP: u8 = 0b0100;

/// The check sum of a PNG's chunk, its name included.
fn crc(chunk: &[u8]) -> [u8; 4] {
    let mut crc = flate2::Crc::new();
    crc.update(chunk);
    crc.sum().to_be_bytes()
}

/// The parts of a file that are kept, behind its first bytes.
#[derive(Debug)]
struct Parts {
    kept: Vec<Range<usize>>,
    has_removed: bool,
    /// The orientation by the first EXIF metadata.
    orientation: Orientation,
    has_exif: bool,
}

impl Parts {
    /// Reads the structure of a file.
    fn of(bytes: &[u8], media_type: MediaType) -> Option<Parts> {
        let mut parts = Parts {
            kept: Vec::new(),
            has_removed: false,
            orientation: Orientation::NoTransforms,
            has_exif: false,
        };
        match media_type {
            MediaType::Jpeg => parts.read_jpeg(bytes)?,
            MediaType::Png => parts.read_png(bytes)?,
            MediaType::WebP => parts.read_webp(bytes)?,
            MediaType::Gif => parts.read_gif(bytes)?,
            _ => return None,
        }
        Some(parts)
    }

    /// Reads the segments of a JPEG (ITU-T T.81, annex B).
    fn read_jpeg(&mut self, bytes: &[u8]) -> Option<()> {
        const START_OF_SCAN: u8 = 0xda;
        const END_OF_IMAGE: u8 = 0xd9;
        let (mut at, mut has_scan) = (2, false);
        loop {
            let start = at;
            // A marker is 0xff, perhaps repeated, and its code.
            while bytes.get(at..at + 2)? == [0xff, 0xff] {
                at += 1;
            }
            let [0xff, marker] = *bytes.get(at..)?.first_chunk()? else { return None };
            at += 2;
            if matches!(marker, 0x01 | 0xd0..=END_OF_IMAGE) {
                self.keep(start..at);
                if marker == END_OF_IMAGE {
                    // Phones append films and further pictures.
                    self.has_removed |= at < bytes.len();
                    return Some(());
                }
                continue;
            }
            let length = u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?);
            let segment = bytes.get(at..)?.get(2..usize::from(length))?;
            at += usize::from(length);
            let is_kept = match marker {
                0xe0 => segment.starts_with(b"JFIF\0"),
                0xe2 => segment.starts_with(b"ICC_PROFILE\0"),
                0xee => segment.starts_with(b"Adobe"),
                0xe1..=0xef | 0xfe => false,
                _ => true,
            };
            // Some writers put empty ones first, and some fill the mark with another byte.
            if marker == 0xe1
                && !has_scan
                && segment.starts_with(b"Exif\0")
                && exif::has_content(segment)
            {
                self.see_exif(segment);
            }
            self.keep_if(is_kept, start..at);
            if marker != START_OF_SCAN {
                continue;
            }
            has_scan = true;
            let scan = bytes.get(at..)?;
            let is_marker =
                |at: &usize| !matches!(scan.get(at + 1), None | Some(0 | 0xd0..=0xd7 | 0xff));
            let Some(length) = memchr::memchr_iter(0xff, scan).find(is_marker) else {
                self.keep(at..bytes.len());
                return Some(());
            };
            self.keep(at..at + length);
            at += length;
        }
    }

    /// Reads the chunks of a PNG (third edition, §5.3).
    fn read_png(&mut self, bytes: &[u8]) -> Option<()> {
        let (mut at, mut has_pixels) = (PNG_HEADER, false);
        if bytes.get(12..16)? != b"IHDR" || bytes.len() < at {
            return None;
        }
        while let Some((length, rest)) = bytes.get(at..)?.split_first_chunk() {
            let Some(kind) = rest.get(..4) else { break };
            let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
            let end = at.checked_add(12)?.checked_add(length)?.min(bytes.len());
            has_pixels |= kind == b"IDAT";
            if kind == b"eXIf"
                && !has_pixels
                && let Some((chunk, check)) = rest.split_at_checked(4 + length)
                && check.first_chunk() == Some(&crc(chunk))
            {
                // The mark of JPEG has no place here.
                self.see_exif(if chunk[4..].starts_with(b"Exif") { b"" } else { &chunk[4..] });
            }
            let is_critical = kind[0].is_ascii_uppercase();
            let is_kept = is_critical
                || matches!(
                    kind,
                    b"tRNS"
                        | b"gAMA"
                        | b"cHRM"
                        | b"sRGB"
                        | b"iCCP"
                        | b"cICP"
                        | b"mDCV"
                        | b"cLLI"
                        | b"sBIT"
                        | b"bKGD"
                        | b"pHYs"
                        | b"acTL"
                        | b"fcTL"
                        | b"fdAT"
                );
            self.keep_if(is_kept, at..end);
            at = end;
            if kind == b"IEND" {
                break;
            }
        }
        self.has_removed |= at < bytes.len();
        Some(())
    }

    /// Reads the chunks of a WebP file (RFC 9649 §2.3).
    fn read_webp(&mut self, bytes: &[u8]) -> Option<()> {
        let length = u32::from_le_bytes(*bytes.get(4..)?.first_chunk()?);
        let whole = usize::try_from(length).ok()?.checked_add(8)?.min(bytes.len());
        let bytes_of_all = bytes.len();
        let bytes = bytes.get(..whole)?;
        let mut at = 12;
        if !matches!(bytes.get(at..)?.first_chunk()?, b"VP8X" | b"VP8 " | b"VP8L") {
            return None;
        }
        // Without its flag it means nothing.
        let has_flag = bytes[at..].starts_with(b"VP8X")
            && bytes.get(20).is_some_and(|flags| flags & WEBP_EXIF != 0);
        while let Some((kind, rest)) = bytes.get(at..)?.split_first_chunk::<4>() {
            let Some(length) = rest.first_chunk() else { break };
            let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
            // Padded to an even length.
            let end = at.checked_add(8)?.checked_add(length)?.checked_next_multiple_of(2)?;
            let end = end.min(bytes.len());
            if kind == b"EXIF"
                && has_flag
                && let Some(exif) = rest.get(4..4 + length)
            {
                self.see_exif(exif);
            }
            let is_kept =
                matches!(kind, b"VP8X" | b"VP8 " | b"VP8L" | b"ALPH" | b"ANIM" | b"ANMF" | b"ICCP");
            self.keep_if(is_kept, at..end);
            at = end;
        }
        self.has_removed |= at < bytes_of_all;
        (!self.kept.is_empty()).then_some(())
    }

    /// Reads the blocks of a GIF (`GIF89a` §§12, 18 to 27).
    fn read_gif(&mut self, bytes: &[u8]) -> Option<()> {
        let table = |flags: u8| if flags & 0x80 == 0 { 0 } else { 6 << (flags & 7) };
        let mut at = 13 + table(*bytes.get(10)?);
        self.keep(0..at.min(bytes.len()));
        while let Some(first) = bytes.get(at) {
            let start = at;
            let is_kept = match first {
                b',' => {
                    let Some(flags) = bytes.get(at + 9) else { break };
                    // The descriptor, its table, and the size of codes.
                    at += 11 + table(*flags);
                    true
                }
                b'!' => {
                    let label = bytes.get(at + 1);
                    let name = bytes.get(at + 3..at + 14).unwrap_or_default();
                    at += 2;
                    match label {
                        Some(0xf9) => true,
                        Some(0xff) => matches!(name, b"NETSCAPE2.0" | b"ANIMEXTS1.0"),
                        _comment_or_text => false,
                    }
                }
                b';' => {
                    at += 1;
                    self.keep(start..at);
                    break;
                }
                _ => return None,
            };
            // Data come in blocks of up to 255 bytes; an empty block is the last.
            while let Some(length @ 1..) = bytes.get(at) {
                at += 1 + usize::from(*length);
            }
            at = (at + 1).min(bytes.len());
            self.keep_if(is_kept, start..at);
        }
        self.has_removed |= at < bytes.len();
        Some(())
    }

    /// Takes the orientation from EXIF metadata, as the decoder does: those that it ignores must not turn a picture that is
    /// stripped. Of several the first count.
    fn see_exif(&mut self, tags: &[u8]) {
        if !self.has_exif {
            self.has_exif = true;
            self.orientation = exif::orientation(tags);
        }
    }

    fn is_turned(&self) -> bool {
        self.orientation != Orientation::NoTransforms
    }

    fn keep_if(&mut self, is_kept: bool, range: Range<usize>) {
        if is_kept {
            self.keep(range);
        } else {
            self.has_removed = true;
        }
    }

    fn keep(&mut self, range: Range<usize>) {
        match self.kept.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.kept.push(range),
        }
    }

    fn copy(&self, bytes: &[u8], to: &mut Vec<u8>) {
        for range in &self.kept {
            to.extend_from_slice(&bytes[range.clone()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{DynamicImage, ImageFormat, RgbImage};

    use super::super::RenderLimits;
    use super::super::decode::decode;
    use super::*;

    fn picture() -> DynamicImage {
        let colour = |x: u32, y: u32| [x, y, x ^ y].map(|it| u8::try_from(it * 7 % 256).unwrap());
        DynamicImage::ImageRgb8(RgbImage::from_fn(33, 21, |x, y| image::Rgb(colour(x, y))))
    }

    fn exif(orientation: Orientation) -> Vec<u8> {
        [&exif_of(orientation)[..], b"a secret place"].concat()
    }

    fn segment(marker: u8, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len() + 2).unwrap().to_be_bytes();
        [&[0xff, marker][..], &length, content].concat()
    }

    fn chunk(kind: [u8; 4], content: &[u8]) -> Vec<u8> {
        let mut crc = flate2::Crc::new();
        crc.update(&kind);
        crc.update(content);
        let length = u32::try_from(content.len()).unwrap().to_be_bytes();
        [&length, &kind[..], content, &crc.sum().to_be_bytes()].concat()
    }

    fn inserted(bytes: &[u8], at: usize, parts: &[Vec<u8>]) -> Vec<u8> {
        [&bytes[..at], &parts.concat(), &bytes[at..]].concat()
    }

    fn encoded(format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        picture().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    fn jpeg() -> Vec<u8> {
        let mut bytes = Vec::new();
        let encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
        let picture = picture().into_rgb8();
        encoder.encode(picture.as_raw(), 33, 21, jpeg_encoder::ColorType::Rgb).unwrap();
        bytes
    }

    fn has_secret(bytes: &[u8]) -> bool {
        bytes.windows(6).any(|window| window == b"secret")
    }

    #[test]
    fn metadata_are_removed_and_nothing_else() {
        let (jpeg, png, gif) = (jpeg(), encoded(ImageFormat::Png), encoded(ImageFormat::Gif));
        let none = Orientation::NoTransforms;
        let tags = [&b"Exif\0\0"[..], &exif(none)].concat();
        let application = b"!\xff\x0bXMP DataXMP\x06secret\0";
        for (media_type, plain, tagged) in [
            (MediaType::Jpeg, &jpeg, inserted(&jpeg, 2, &[segment(0xe1, &tags)])),
            (MediaType::Jpeg, &jpeg, inserted(&jpeg, 2, &[segment(0xfe, b"secret")])),
            (MediaType::Jpeg, &jpeg, inserted(&jpeg, 2, &[segment(0xe2, b"MPF\0secret")])),
            (MediaType::Jpeg, &jpeg, [&jpeg[..], b"a secret film"].concat()),
            (MediaType::Jpeg, &jpeg, [&jpeg[..], b"a secret picture\xff\xd9"].concat()),
            (MediaType::Jpeg, &jpeg, inserted(&jpeg, jpeg.len() - 2, &[segment(0xe1, &tags)])),
            (MediaType::Png, &png, inserted(&png, PNG_HEADER, &[chunk(*b"eXIf", &exif(none))])),
            (MediaType::Png, &png, inserted(&png, PNG_HEADER, &[chunk(*b"tEXt", b"a\0secret")])),
            (MediaType::Png, &png, inserted(&png, png.len() - 12, &[chunk(*b"zZZz", b"secret")])),
            (MediaType::Png, &png, [&png[..], b"secret"].concat()),
            (MediaType::Gif, &gif, inserted(&gif, gif.len() - 1, &[b"!\xfe\x06secret\0".to_vec()])),
            (MediaType::Gif, &gif, inserted(&gif, gif.len() - 1, &[application.to_vec()])),
            (MediaType::Gif, &gif, [&gif[..], b"secret"].concat()),
        ] {
            assert!(has_secret(&tagged));
            assert_eq!(traits(plain, media_type), Traits::default(), "{media_type:?}");
            assert_eq!(traits(&tagged, media_type).embedded, Embedded::Removable, "{media_type:?}");
            assert!(strip(&tagged, media_type).as_ref() == Some(plain), "{media_type:?}");
            assert!(strip(plain, media_type).as_ref() == Some(plain), "{media_type:?}");
        }
    }

    #[test]
    fn the_metadata_of_webp_are_removed_with_their_flags() {
        let mut bytes = Vec::new();
        let picture = picture();
        let encoder = webpx::Encoder::new_rgb(picture.as_bytes(), 33, 21);
        bytes.extend(encoder.lossless(true).encode(webpx::Unstoppable).unwrap());
        let webp = |flags: u8, orientation| {
            let exif = exif(orientation);
            let extended = [&b"VP8X\x0a\0\0\0"[..], &[flags, 0, 0, 0, 32, 0, 0, 20, 0, 0]].concat();
            let length = u32::try_from(exif.len()).unwrap().to_le_bytes();
            let tags = [&b"EXIF"[..], &length, &exif, b"XMP \x06\0\0\0secret"].concat();
            let body = [&extended, &bytes[12..], &tags].concat();
            let length = u32::try_from(body.len() + 4).unwrap().to_le_bytes();
            [&b"RIFF"[..], &length, b"WEBP", &body].concat()
        };
        let tagged = webp(0b1100, Orientation::NoTransforms);
        assert_eq!(traits(&tagged, MediaType::WebP).embedded, Embedded::Removable);
        let stripped = strip(&tagged, MediaType::WebP).unwrap();
        assert!(!has_secret(&stripped) && stripped[20] == 0 && stripped.len() == bytes.len() + 18);
        assert_eq!(traits(&stripped, MediaType::WebP), Traits::default());

        let turned = webp(0b1100, Orientation::Rotate90);
        assert_eq!(traits(&turned, MediaType::WebP).embedded, Embedded::Inseparable);
        let stripped = strip(&turned, MediaType::WebP).unwrap();
        assert!(!has_secret(&stripped) && stripped[20] == 0b1000);
        assert_eq!(traits(&stripped, MediaType::WebP).embedded, Embedded::Inseparable);
        // Without the flag it isn't turned.
        let ignored = webp(0b0100, Orientation::Rotate90);
        assert_eq!(traits(&ignored, MediaType::WebP).embedded, Embedded::Removable);
    }

    #[test]
    fn exif_that_the_decoder_ignores_turns_no_stripped_picture() {
        let turned = exif(Orientation::Rotate90);
        let marked = [&b"Exif\0\0"[..], &turned].concat();
        let (jpeg, png) = (jpeg(), encoded(ImageFormat::Png));
        let mut damaged = chunk(*b"eXIf", &turned);
        *damaged.last_mut().unwrap() ^= 1;
        let (in_jpeg, in_png) = (jpeg.len() - 2, png.len() - 12);
        for (media_type, bytes) in [
            (MediaType::Png, inserted(&png, PNG_HEADER, &[damaged])),
            (MediaType::Png, inserted(&png, PNG_HEADER, &[chunk(*b"eXIf", &marked)])),
            (MediaType::Png, inserted(&png, in_png, &[chunk(*b"eXIf", &turned)])),
            (MediaType::Jpeg, inserted(&jpeg, in_jpeg, &[segment(0xe1, &marked)])),
        ] {
            let limits = RenderLimits { pixels: 1000, deadline: None };
            let shown = decode(&bytes, media_type, limits).unwrap();
            assert_eq!((shown.width(), shown.height()), (33, 21));
            assert_eq!(traits(&bytes, media_type).embedded, Embedded::Removable, "{media_type:?}");
            let stripped = strip(&bytes, media_type).unwrap();
            assert!(decode(&stripped, media_type, limits).unwrap() == shown, "{media_type:?}");
        }
    }

    #[test]
    fn a_webp_that_begins_with_no_picture_is_not_stripped() {
        for bytes in [&b"RIFF\x0c\0\0\0WEBPVP8f\0\0\0\0"[..], b"RIFF\x0c\0\0\0WEBPVP8X\x0a\0"] {
            assert_eq!(strip(bytes, MediaType::WebP), None);
            assert_eq!(traits(bytes, MediaType::WebP).embedded, Embedded::Inseparable);
        }
    }

    #[test]
    fn a_picture_that_is_turned_keeps_its_orientation_alone() {
        let turned = [&b"Exif\0\0"[..], &exif(Orientation::Rotate270)].concat();
        let later = [&b"Exif\0\0"[..], &exif(Orientation::NoTransforms)].concat();
        let (jpeg, png) = (jpeg(), encoded(ImageFormat::Png));
        for (media_type, bytes) in [
            (MediaType::Jpeg, inserted(&jpeg, 2, &[segment(0xe1, &turned), segment(0xe1, &later)])),
            (
                MediaType::Png,
                inserted(&png, PNG_HEADER, &[chunk(*b"eXIf", &exif(Orientation::Rotate270))]),
            ),
        ] {
            assert_eq!(traits(&bytes, media_type).embedded, Embedded::Inseparable);
            let stripped = strip(&bytes, media_type).unwrap();
            assert!(!has_secret(&stripped));
            let parts = Parts::of(&stripped, media_type).unwrap();
            assert_eq!(parts.orientation, Orientation::Rotate270, "{media_type:?}");
            // Nothing else is left.
            assert_eq!(strip(&stripped, media_type).as_ref(), Some(&stripped));
        }
    }

    #[test]
    fn the_scans_of_a_progressive_jpeg_are_kept() {
        let mut bytes = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 90);
        encoder.set_progressive(true);
        encoder.set_restart_interval(2);
        let picture = picture().into_rgb8();
        encoder.encode(picture.as_raw(), 33, 21, jpeg_encoder::ColorType::Rgb).unwrap();
        assert_eq!(strip(&bytes, MediaType::Jpeg).as_ref(), Some(&bytes));
        let cut = &bytes[..bytes.len() - 40];
        assert_eq!(strip(cut, MediaType::Jpeg).as_deref(), Some(cut));
    }

    #[test]
    fn a_tiff_has_metadata_if_it_has_other_tags_than_those_of_its_pixels() {
        let plain = encoded(ImageFormat::Tiff);
        assert_eq!(traits(&plain, MediaType::Tiff), Traits::default());
        let directory =
            usize::try_from(u32::from_le_bytes(plain[4..8].try_into().unwrap())).unwrap();
        for tag in [270_u16, 306, 700, 34665, 34853] {
            let mut tagged = plain.clone();
            tagged[directory + 2..directory + 4].copy_from_slice(&tag.to_le_bytes());
            assert_eq!(traits(&tagged, MediaType::Tiff).embedded, Embedded::Inseparable, "{tag}");
        }
    }

    #[test]
    fn a_file_of_any_length_is_read_without_a_panic() {
        for (media_type, whole) in [
            (MediaType::Jpeg, jpeg()),
            (MediaType::Png, encoded(ImageFormat::Png)),
            (MediaType::Gif, encoded(ImageFormat::Gif)),
            (MediaType::Tiff, encoded(ImageFormat::Tiff)),
            (MediaType::WebP, b"RIFF\x30\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()),
        ] {
            for length in 0..whole.len() {
                let _ = traits(&whole[..length], media_type);
                let _ = strip(&whole[..length], media_type);
            }
        }
    }
}
