//! The orientation that EXIF metadata say.

use image::metadata::Orientation;

/// The rotation that a picture needs, by its EXIF metadata. These begin with a mark in JPEG only, but some writers put it into
/// WebP, too.
///
/// The first entry counts that is one number from 1 to 8. It should be a SHORT, and Chromium heeds no other type; Pillow heeds all
/// but BYTE.
pub(in crate::picture) fn orientation(exif: &[u8]) -> Orientation {
    // The last byte of the mark is padding, and some writers don't keep it zero.
    let tiff = if exif.starts_with(b"Exif\0") { exif.get(6..).unwrap_or_default() } else { exif };
    first_valid(tiff).unwrap_or(Orientation::NoTransforms)
}

/// True unless the metadata are empty but for their mark.
pub(in crate::picture) fn has_content(exif: &[u8]) -> bool {
    exif.strip_prefix(b"Exif\0").map_or(exif.len(), |rest| rest.len().saturating_sub(1)) > 8
}

/// The first valid orientation in the first directory (TIFF 6.0, section 2).
fn first_valid(tiff: &[u8]) -> Option<Orientation> {
    const ORIENTATION: u16 = 0x0112;
    let big_endian = match tiff.first_chunk()? {
        b"II\x2a\0" => false,
        b"MM\0\x2a" => true,
        _ => return None,
    };
    let short = |at: &[u8]| {
        let bytes = *at.first_chunk()?;
        Some(if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let long = |at: &[u8]| {
        let bytes = *at.first_chunk()?;
        Some(if big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    };
    let directory = tiff.get(usize::try_from(long(&tiff[4..])?).ok()?..)?;
    let count = usize::from(short(directory)?);
    let entries = directory.get(2..)?.chunks_exact(12).take(count);
    entries.into_iter().find_map(|entry| {
        if short(entry)? != ORIENTATION || long(&entry[4..])? != 1 {
            return None;
        }
        let value = match short(&entry[2..])? {
            // SBYTE, SHORT and SSHORT, LONG and SLONG.
            6 => u32::from(entry[8]),
            3 | 8 => u32::from(short(&entry[8..])?),
            4 | 9 => long(&entry[8..])?,
            _ => return None,
        };
        Orientation::from_exif(u8::try_from(value).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of entries, each a tag, a type, a count and two bytes of value, in one byte order.
    fn exif(big_endian: bool, entries: &[(u16, u16, u32, u16)]) -> Vec<u8> {
        let short = |it: u16| if big_endian { it.to_be_bytes() } else { it.to_le_bytes() };
        let long = |it: u32| if big_endian { it.to_be_bytes() } else { it.to_le_bytes() };
        let mut exif = if big_endian { b"MM".to_vec() } else { b"II".to_vec() };
        exif.extend(short(42).into_iter().chain(long(8)));
        exif.extend(short(u16::try_from(entries.len()).unwrap()));
        for (tag, kind, count, value) in entries {
            exif.extend(short(*tag).into_iter().chain(short(*kind)).chain(long(*count)));
            exif.extend(short(*value).into_iter().chain(short(0)));
        }
        exif
    }

    #[test]
    fn the_first_valid_orientation_counts() {
        let turned = Orientation::Rotate90;
        let none = Orientation::NoTransforms;
        for (entries, expected) in [
            (&[(0x112, 3, 1, 6)][..], turned),
            (&[(0x132, 3, 1, 1), (0x112, 3, 1, 6), (0x100, 3, 1, 1)], turned),
            (&[(0x112, 3, 1, 6), (0x112, 3, 1, 1)], turned),
            (&[(0x112, 3, 1, 1), (0x112, 3, 1, 6)], none),
            (&[(0x112, 3, 1, 0), (0x112, 3, 1, 9), (0x112, 3, 1, 6)], turned),
            (&[(0x112, 3, 1, 262)], none),
            (&[(0x112, 3, 2, 6)], none),
            (&[(0x112, 7, 1, 1), (0x112, 3, 1, 6)], turned),
        ] {
            for big_endian in [false, true] {
                let exif = exif(big_endian, entries);
                assert_eq!(orientation(&exif), expected, "{entries:?}");
                let marked = [b"Exif\0\xff", &exif[..]].concat();
                assert_eq!(orientation(&marked), expected, "{entries:?}");
            }
        }
        for kind in 0..16 {
            let is_whole = matches!(kind, 3 | 4 | 6 | 8 | 9);
            let expected = if is_whole { turned } else { none };
            assert_eq!(orientation(&exif(false, &[(0x112, kind, 1, 6)])), expected, "type {kind}");
        }
    }

    #[test]
    fn metadata_that_end_early_say_no_more_than_they_have() {
        let whole = exif(true, &[(0x100, 3, 1, 1), (0x112, 3, 1, 6)]);
        assert_eq!(orientation(&whole), Orientation::Rotate90);
        for length in 0..whole.len() {
            assert_eq!(orientation(&whole[..length]), Orientation::NoTransforms, "{length}");
        }
    }
}
