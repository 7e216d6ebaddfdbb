//! Tells the type of an image from its bytes alone.
//!
//! Declared types are never trusted: with a wrong one, `nosniff` makes browsers show nothing, and an SVG under a
//! raster type is a security hole. The signatures are those of the WHATWG MIME Sniffing standard §6.1 where it has
//! them. The crates that were tried take any two bytes `BM` for a bitmap and miss most HEIC brands; here a signature
//! has as much of the header as the format fixes.

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
    } else if is_svg(bytes) {
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

/// `BM`, and a size that the information header has in some version of the format.
fn is_bmp(bytes: &[u8]) -> bool {
    bytes.starts_with(b"BM")
        && bytes.get(14..18).and_then(|size| size.try_into().ok()).is_some_and(|size| {
            matches!(u32::from_le_bytes(size), 12 | 16 | 40 | 52 | 56 | 64 | 108 | 124)
        })
}

/// An icon directory with at least one entry, whose reserved byte is zero. Cursors (type 2) aren't icons.
fn is_ico(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\0\0\x01\0")
        && bytes.get(4..6).is_some_and(|count| count != b"\0\0")
        && bytes.get(9) == Some(&0)
}

/// An XML document in an ASCII-compatible encoding with the root element `svg`. Before that may come a byte order mark,
/// white space, the XML declaration, processing instructions, comments and a document type (XML 1.0 §2.8).
fn is_svg(bytes: &[u8]) -> bool {
    let mut rest = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    loop {
        rest = rest.trim_ascii_start();
        let skipped = if rest.starts_with(b"<?") {
            after(rest, b"?>")
        } else if rest.starts_with(b"<!--") {
            after(&rest[4..], b"-->")
        } else if rest.len() >= 9 && rest[..9].eq_ignore_ascii_case(b"<!doctype") {
            after_doctype(rest)
        } else {
            break;
        };
        match skipped {
            Some(tail) => rest = tail,
            None => return false,
        }
    }
    let name = |prefix: &[u8]| {
        rest.strip_prefix(prefix)
            .and_then(<[u8]>::first)
            .is_some_and(|next| next.is_ascii_whitespace() || matches!(next, b'>' | b'/'))
    };
    name(b"<svg") || name(b"<svg:svg")
}

fn after<'a>(bytes: &'a [u8], end: &[u8]) -> Option<&'a [u8]> {
    let at = bytes.windows(end.len()).position(|window| window == end)?;
    bytes.get(at + end.len()..)
}

/// The text after a document type, which may have an internal subset in brackets with `>` inside.
fn after_doctype(bytes: &[u8]) -> Option<&[u8]> {
    let plain = bytes.iter().position(|byte| *byte == b'>')?;
    if bytes[..plain].contains(&b'[') {
        after(after(bytes, b"]")?, b">")
    } else {
        bytes.get(plain + 1..)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_signature_is_known() {
        let bmp = [b"BM".as_slice(), &[0; 12], &[40, 0, 0, 0]].concat();
        let ico = [0, 0, 1, 0, 1, 0, 16, 16, 0, 0, 1, 0];
        let cases: [(&[u8], MediaType); 21] = [
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
            (b"\xef\xbb\xbf\n<svg>", MediaType::Svg),
            (b"<?xml version='1.0'?><!-- > --><svg/>", MediaType::Svg),
            (b"<!DOCTYPE svg PUBLIC 'a' 'b'>\n<svg\n>", MediaType::Svg),
            (b"<!doctype svg [<!ENTITY a 'b'>]><svg >", MediaType::Svg),
            (b"<svg:svg xmlns:svg='http://www.w3.org/2000/svg'>", MediaType::Svg),
        ];
        for (bytes, media_type) in cases {
            assert_eq!(sniff(bytes), Some(media_type), "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn bytes_that_only_look_like_an_image_have_no_type() {
        let cases: [&[u8]; 16] = [
            b"",
            b"BM",
            b"BMW is a car maker from Munich",
            b"\0\0\x01\0",
            b"\0\0\x02\0\x01\0\x10\x10\0\0",
            b"\0\0\0\x18ftypisom\0\0\0\0mp41avc1",
            b"\0\0\0\xffftypavif",
            b"\0\0\0\0ftyp",
            b"RIFF\0\0\0\0WAVEfmt ",
            b"<html><svg></svg></html>",
            b"<svgfoo>",
            b"<svg",
            b"<!-- <svg>",
            b"<!doctype svg [ <svg>",
            b"<!DOCTYPE html><html></html>",
            b"hello",
        ];
        for bytes in cases {
            assert_eq!(sniff(bytes), None, "{}", bytes.escape_ascii());
        }
    }
}
