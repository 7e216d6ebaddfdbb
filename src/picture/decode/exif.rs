//! The orientation that EXIF metadata say.

use image::metadata::Orientation;

/// The rotation that a picture needs, by its EXIF metadata. These begin with a mark in JPEG only, but some writers put it into
/// WebP, too.
pub(in crate::picture) fn orientation(exif: &[u8]) -> Orientation {
    let exif = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif);
    Orientation::from_exif_chunk(exif).unwrap_or(Orientation::NoTransforms)
}
