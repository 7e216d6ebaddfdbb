//! Tells the type of an image from its bytes alone.
//!
//! Declared types are never trusted: with a wrong one, `nosniff` makes browsers show nothing, and an SVG under a
//! raster type is a security hole. The signatures are those of the WHATWG MIME Sniffing standard §6.1 where it has
//! them. The crates that were tried take any two bytes `BM` for a bitmap and miss most HEIC brands; here a signature
//! has as much of the header as the format fixes.

mod svg;

use crate::image::MediaType;

/// The type of an image; `None` if the bytes are no image of a known type.
#[must_use]
pub fn sniff(bytes: &[u8]) -> Option<MediaType> {
    let starts = |signature: &[u8]| bytes.starts_with(signature);
    let holds = |at: usize, part: &[u8]| bytes.get(at..at + part.len()) == Some(part);

    if starts(b"\x89PNG\r\n\x1a\n") {
        Some(MediaType::Png)
    } else if starts(b"\xff\xd8\xff") {
        Some(MediaType::Jpeg)
    } else if starts(b"GIF87a") || starts(b"GIF89a") {
        Some(MediaType::Gif)
    } else if starts(b"RIFF") && holds(8, b"WEBPVP8") {
        Some(MediaType::WebP)
    } else if starts(b"\xff\x0a") || starts(b"\0\0\0\x0cJXL \r\n\x87\n") {
        Some(MediaType::JpegXl)
    } else if holds(4, b"ftyp") {
        iso_media(bytes)
    } else if starts(b"II\x2a\0")
        || starts(b"MM\0\x2a")
        || starts(b"II\x2b\0")
        || starts(b"MM\0\x2b")
    {
        Some(MediaType::Tiff)
    } else if is_bmp(bytes) {
        Some(MediaType::Bmp)
    } else if is_ico(bytes) {
        Some(MediaType::Ico)
    } else if svg::is_svg(bytes) {
        Some(MediaType::Svg)
    } else {
        None
    }
}

/// Tells AVIF from HEIC, which are both ISO base media files (ISO 14496-12 §4.3). The major brand decides; if it is a
/// structural one, the first compatible brand that names a codec.
fn iso_media(bytes: &[u8]) -> Option<MediaType> {
    let size = u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?);
    let header = bytes.get(..usize::try_from(size).ok()?)?;
    let compatible = header.get(16..).unwrap_or_default().chunks_exact(4);
    std::iter::once(header.get(8..12)?).chain(compatible).find_map(|brand| match brand {
        b"avif" | b"avis" => Some(MediaType::Avif),
        b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" | b"hevm" | b"hevs" => {
            Some(MediaType::Heic)
        }
        _ => None,
    })
}

/// Tells a bitmap from text that begins with `BM`, by the size of its information header.
fn is_bmp(bytes: &[u8]) -> bool {
    bytes.starts_with(b"BM") && bytes.get(14..).is_some_and(starts_with_bmp_header)
}

/// Tells whether bytes start with the size of an information header: that of Windows 2, 3, 4 or 5, or one of those that
/// OS/2 2 may cut its own to.
fn starts_with_bmp_header(bytes: &[u8]) -> bool {
    bytes.first_chunk().is_some_and(|size| match u32::from_le_bytes(*size) {
        12 | 42 | 46 | 108 | 124 => true,
        size => (16..=64).contains(&size) && size.is_multiple_of(4),
    })
}

/// Tells an icon directory by an entry whose picture is there, and is a PNG or a bitmap. Cursors (type 2) aren't icons.
///
/// The other fields of an entry say nothing: .NET writes 255 into the reserved byte, others leave planes, bit count and
/// size at 0. A file that is cut off in its first entry is told by the reserved byte.
fn is_ico(bytes: &[u8]) -> bool {
    let Some((directory, entries)) = bytes.split_first_chunk::<6>() else { return false };
    let [0, 0, 1, 0, count @ ..] = directory else { return false };
    let count = usize::from(u16::from_le_bytes(*count));
    let (entries, _) = entries.as_chunks::<16>();
    let starts_at = |entry: &[u8; 16]| {
        let [.., a, b, c, d] = *entry;
        usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX)
    };
    let is_picture = |entry: &[u8; 16]| {
        let picture = bytes.get(starts_at(entry)..).unwrap_or_default();
        picture.starts_with(b"\x89PNG\r\n\x1a\n") || starts_with_bmp_header(picture)
    };
    entries.iter().take(count).any(is_picture)
        || entries.is_empty() && count > 0 && matches!(bytes.get(9), Some(0 | 255))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signature_is_known() {
        let bmp = [b"BM".as_slice(), &[0; 12], &[40, 0, 0, 0]].concat();
        let ico = [0, 0, 1, 0, 1, 0, 16, 16, 0, 0, 1, 0];
        let cases: [(&[u8], MediaType); 16] = [
            (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", MediaType::Png),
            (b"\xff\xd8\xff\xe0\0\x10JFIF", MediaType::Jpeg),
            (b"GIF87a\0", MediaType::Gif),
            (b"GIF89a\0", MediaType::Gif),
            (b"RIFF\0\0\0\0WEBPVP8 ", MediaType::WebP),
            (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", MediaType::Avif),
            (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", MediaType::Avif),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", MediaType::Heic),
            (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix", MediaType::Heic),
            (b"\xff\x0a\0", MediaType::JpegXl),
            (b"\0\0\0\x0cJXL \r\n\x87\n\0", MediaType::JpegXl),
            (b"II\x2a\0\x08\0\0\0", MediaType::Tiff),
            (b"MM\0\x2a\0\0\0\x08", MediaType::Tiff),
            (&bmp, MediaType::Bmp),
            (&ico, MediaType::Ico),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", MediaType::Svg),
        ];
        for (bytes, media_type) in cases {
            assert_eq!(sniff(bytes), Some(media_type), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn bytes_that_only_look_like_an_image_have_no_type() {
        let cases: [&[u8]; 14] = [
            b"",
            b"BM",
            b"BMW is a car maker from Munich",
            b"\0\0\x01\0",
            b"\0\0\x01\0 is how an icon begins",
            b"\0\0\x01\0text",
            b"\0\0\x02\0\x01\0\x10\x10\0\0",
            b"\0\0\0\x18ftypisom\0\0\0\0mp41avc1",
            b"\0\0\0\xffftypavif",
            b"\0\0\0\0ftyp",
            b"RIFF\0\0\0\0WAVEfmt ",
            b"<html><svg></svg></html>",
            b"<svgfoo>",
            b"hello",
        ];
        for bytes in cases {
            assert_eq!(sniff(bytes), None, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn an_icon_is_told_by_the_picture_of_an_entry() {
        let ico = |count: u16, entry: [u8; 8], offset: u32, picture: &[u8]| {
            let (count, offset) = (count.to_le_bytes(), offset.to_le_bytes());
            let parts: [&[u8]; 6] = [&[0, 0, 1, 0], &count, &entry, &[0xff; 4], &offset, picture];
            parts.concat()
        };
        let (plain, dib) = ([16, 16, 0, 0, 1, 0, 32, 0], [40, 0, 0, 0, 16, 0]);
        for bytes in [
            ico(1, plain, 22, &dib),
            ico(1, plain, 22, b"\x89PNG\r\n\x1a\n"),
            ico(1, [0, 0, 0, 255, 1, 0, 32, 0], 22, &dib),
            ico(1, [0, 0, 7, 7, 0, 0, 0, 0], 22, &dib),
            ico(9, plain, 22, &dib),
            ico(2, plain, u32::MAX, &ico(1, plain, 38, &dib)[6..]),
            ico(1, plain, 22, &[124, 0, 0, 0]),
        ] {
            assert_eq!(sniff(&bytes), Some(MediaType::Ico), "{}", bytes.escape_ascii());
        }
        for bytes in [
            ico(0, plain, 22, &dib),
            ico(1, plain, 22, b"text"),
            ico(1, plain, 23, &dib),
            ico(1, plain, u32::MAX, &dib),
            ico(1, plain, 22, &[]),
            ico(1, plain, u32::MAX, &ico(1, plain, 38, &dib)[6..]),
        ] {
            assert_eq!(sniff(&bytes), None, "{}", bytes.escape_ascii());
        }
    }
}
