//! Tells moving pictures from still ones.

use crate::image::MediaType;

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
