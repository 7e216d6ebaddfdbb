//! Tells moving pictures from still ones.

use super::super::Frames;
#[cfg(any(feature = "read-avif", feature = "read-jxl"))]
use super::guarded;
use crate::image::MediaType;

/// True for an image with more than one frame. Only headers are read: no pixel is decoded, and nothing is allocated,
/// whatever they claim.
#[must_use]
pub fn is_animated(bytes: &[u8], media_type: MediaType) -> bool {
    match media_type {
        MediaType::Png => png_is_animated(bytes),
        MediaType::WebP => webp_is_animated(bytes),
        MediaType::Gif => gif_is_animated(bytes),
        #[cfg(feature = "read-avif")]
        MediaType::Avif => guarded(|| Ok(super::avif::is_animated(bytes))).ok(),
        #[cfg(feature = "read-jxl")]
        MediaType::JpegXl => guarded(|| Ok(super::jxl::is_animated(bytes))).ok(),
        _ => None,
    }
    .unwrap_or(false)
}

/// An animated PNG has `acTL` before its pixels, with the number of frames (PNG, third edition, §11.3.6.1).
fn png_is_animated(bytes: &[u8]) -> Option<bool> {
    let mut at = 8;
    loop {
        let (length, rest) = bytes.get(at..)?.split_first_chunk()?;
        match rest.get(..4)? {
            b"acTL" => return Some(u32::from_be_bytes(*rest.get(4..)?.first_chunk()?) > 1),
            b"IDAT" => return Some(false),
            _ => at += 12 + u32::from_be_bytes(*length) as usize,
        }
    }
}

/// Counts the frames of an animated PNG, and adds up their delays, which are fractions of a second (PNG, third edition,
/// §11.3.6.2). `None` for a picture that doesn't move.
pub(in super::super) fn png_frames(bytes: &[u8]) -> Option<Frames> {
    if !png_is_animated(bytes)? {
        return None;
    }
    let u16_at = |payload: &[u8], at: usize| {
        Some(u64::from(u16::from_be_bytes(*payload.get(at..)?.first_chunk()?)))
    };
    let mut frames = Frames { count: 0, duration: 0 };
    let mut at = 8;
    while let Some((length, rest)) = bytes.get(at..).and_then(|it| it.split_first_chunk()) {
        if rest.starts_with(b"fcTL") {
            let (delay, parts) = (u16_at(rest, 24)?, u16_at(rest, 26)?);
            frames.count += 1;
            frames.duration += 1000 * delay / if parts == 0 { 100 } else { parts };
        }
        at += 12 + u32::from_be_bytes(*length) as usize;
    }
    (frames.count > 1).then_some(frames)
}

/// Reads the animation flag of an extended WebP file, and looks for a second frame (RFC 9649 §2.7). Chunks that are cut off
/// aren't counted.
fn webp_is_animated(bytes: &[u8]) -> Option<bool> {
    if bytes.get(12..16)? != b"VP8X" || bytes.get(20)? & 2 == 0 {
        return Some(false);
    }
    let mut at = 12;
    let mut frames = 0;
    loop {
        let (name, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
        frames += u32::from(name == b"ANMF");
        if frames > 1 {
            return Some(true);
        }
        let size = u32::from_le_bytes(*rest.first_chunk()?) as usize;
        at += 8 + size.next_multiple_of(2);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_frame_isnt_animated() {
        let frame = [b',', 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 2, 0x44, 1, 0];
        let screen = b"GIF89a\x01\0\x01\0\0\0\0";
        for (frames, after, expected) in
            [(1, &b";"[..], false), (1, b";,,,,", false), (1, b"", false), (2, b";", true)]
        {
            let gif = [&screen[..], &frame.repeat(frames), after].concat();
            assert_eq!(is_animated(&gif, MediaType::Gif), expected, "{frames}");
        }

        let chunk = |name: &[u8; 4], payload: &[u8]| {
            let size = u32::try_from(payload.len()).unwrap();
            (size, [name, payload].concat())
        };
        // A delay of 3/20 of a second, and one of 3 hundredths.
        let control = |parts: u8| [&[0; 20][..], &[0, 3, 0, parts, 0, 0]].concat();
        let png = |frames: u8| {
            let chunks = [chunk(b"IHDR", &[0; 13]), chunk(b"acTL", &[0, 0, 0, frames, 0, 0, 0, 0])];
            let further = [chunk(b"fcTL", &control(20)), chunk(b"fcTL", &control(0))];
            let chunks = chunks.into_iter().chain([chunk(b"IDAT", &[])]).chain(further);
            let chunks =
                chunks.flat_map(|(size, it)| [&size.to_be_bytes()[..], &it, &[0; 4]].concat());
            b"\x89PNG\r\n\x1a\n".iter().copied().chain(chunks).collect::<Vec<_>>()
        };
        assert!(!is_animated(&png(1), MediaType::Png));
        assert!(is_animated(&png(2), MediaType::Png));
        assert_eq!(png_frames(&png(1)), None);
        assert_eq!(png_frames(&png(2)), Some(Frames { count: 2, duration: 150 + 30 }));

        let webp = |flags: u8, frames: usize| {
            let header = [b"VP8X".as_slice(), &[10, 0, 0, 0, flags, 0, 0, 0, 0, 0, 0, 0, 0, 0]];
            // Odd, and padded.
            let frames = b"ANMF\x01\0\0\0\0\0".repeat(frames);
            [b"RIFF\0\0\0\0WEBP".as_slice(), &header.concat(), &frames].concat()
        };
        assert!(!is_animated(&webp(2, 1), MediaType::WebP));
        assert!(!is_animated(&webp(0, 2), MediaType::WebP));
        assert!(is_animated(&webp(2, 2), MediaType::WebP));
    }
}
