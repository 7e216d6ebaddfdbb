//! AVIF, by ravif and rav1e.

use image::DynamicImage;
use ravif::{Encoder, Img, RGB8, RGBA8};

use super::failed;
use super::flatness::flatness;
use crate::picture::{PictureError, is_transparent};

/// Encodes a picture by rav1e without its assembly: 512×512 pixels take 0.3 to 0.6 seconds on one core.
pub(super) fn encode(picture: &DynamicImage, quality: u8) -> Result<Vec<u8>, PictureError> {
    /// A tenth smaller at the same SSIMULACRA2 than at 10, the quickest, in a quarter more time. 8 is 4 % smaller in three
    /// times the time.
    const SPEED: u8 = 9;
    let quality = ravif_quality(quality);
    let encoder = Encoder::new()
        .with_quality(quality)
        .with_alpha_quality(quality)
        .with_speed(SPEED)
        .with_num_threads(Some(1));
    let size = |length: u32| usize::try_from(length).unwrap_or(usize::MAX);
    let (width, height) = (size(picture.width()), size(picture.height()));
    let outcome = if is_transparent(picture) {
        let pixels = picture.to_rgba8();
        let pixels: Vec<_> = pixels.pixels().map(|it| RGBA8::from(it.0)).collect();
        encoder.encode_rgba(Img::new(&pixels[..], width, height))
    } else {
        let pixels = picture.to_rgb8();
        let pixels: Vec<_> = pixels.pixels().map(|it| RGB8::from(it.0)).collect();
        encoder.encode_rgb(Img::new(&pixels[..], width, height))
    };
    outcome.map(|encoded| encoded.avif_file).map_err(|error| failed(&error))
}

/// True of text, diagrams and interfaces, of which AVIF has up to four times the bytes of WebP. Photographs have no flat parts.
pub(super) fn is_larger_than_webp(picture: &DynamicImage) -> bool {
    flatness(picture) > 0.2
}

/// The quality of ravif with the SSIMULACRA2 that WebP has at a quality, the mean of photographs. There AVIF has 0.7 to
/// 1.0 times the bytes.
fn ravif_quality(webp: u8) -> f32 {
    const POINTS: [(f32, f32); 6] =
        [(0.0, 15.0), (37.0, 45.0), (65.0, 65.0), (80.0, 82.0), (92.0, 90.0), (100.0, 100.0)];
    let webp = f32::from(webp);
    let segment = POINTS.windows(2).find(|points| webp <= points[1].0);
    match segment {
        Some(&[(from, low), (to, high)]) => low + (high - low) * (webp - from) / (to - from),
        _ => 100.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_higher_quality_is_a_higher_quality_of_the_encoder() {
        assert!((ravif_quality(80) - 82.0).abs() < 0.01);
        assert!((1..100).all(|it| ravif_quality(it) < ravif_quality(it + 1)));
        assert!((1..=100).all(|it| (1.0..=100.0).contains(&ravif_quality(it))));
    }
}
