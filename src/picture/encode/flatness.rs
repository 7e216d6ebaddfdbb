//! Quick measures by which encoders choose their method.

use std::collections::HashSet;

use image::DynamicImage;

/// The share of pixels that are equal to those on their left and above them: 0 of noise, 1 of a single colour. Every
/// fourth row counts, which takes less than a hundredth of the time of any encoder.
pub(super) fn flatness(picture: &DynamicImage) -> f32 {
    match picture {
        DynamicImage::ImageRgb8(pixels) => share::<3>(pixels.as_raw(), pixels.width()),
        DynamicImage::ImageRgba8(pixels) => share::<4>(pixels.as_raw(), pixels.width()),
        _ => 0.0,
    }
}

#[expect(clippy::cast_precision_loss, reason = "a share needs no more digits")]
fn share<const BYTES: usize>(bytes: &[u8], width: u32) -> f32 {
    /// Rows from one that counts to the next.
    const STEP: usize = 4;
    let (pixels, _) = bytes.as_chunks::<BYTES>();
    let (mut equal, mut all) = (0_usize, 1_usize);
    for rows in pixels.chunks_exact(2 * width.max(1) as usize).step_by(STEP / 2) {
        let (above, row) = rows.split_at(rows.len() / 2);
        let pairs = row.windows(2).zip(&above[1..]);
        equal += pairs.filter(|(pair, above)| pair[0] == pair[1] && pair[1] == **above).count();
        all += row.len() - 1;
    }
    equal as f32 / all as f32
}

/// The number of colours; `None` for more than a limit, which is found soon in a photograph.
pub(super) fn colours(picture: &DynamicImage, limit: u64) -> Option<u64> {
    match picture {
        DynamicImage::ImageRgb8(pixels) => distinct(pixels.as_raw().as_chunks::<3>().0, limit),
        DynamicImage::ImageRgba8(pixels) => distinct(pixels.as_raw().as_chunks::<4>().0, limit),
        _ => None,
    }
}

fn distinct<const BYTES: usize>(pixels: &[[u8; BYTES]], limit: u64) -> Option<u64> {
    let mut colours = HashSet::new();
    // Only where runs begin: hashing each pixel would take long.
    for run in pixels.chunk_by(|one, other| one == other) {
        colours.insert(run[0]);
        if colours.len() as u64 > limit {
            return None;
        }
    }
    Some(colours.len() as u64)
}
