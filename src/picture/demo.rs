//! Draws the demo images: light that stays in the eye after its source is gone.

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{DynamicImage, Rgb, RgbImage};

use super::{PictureError, RenderLimits, encode};
use crate::image::MediaType;

/// A ring of light in the unit square.
struct Glow {
    x: f32,
    y: f32,
    radius: f32,
    colour: [f32; 3],
}

const EMBER: [f32; 3] = [255.0, 120.0, 40.0];
const TEAL: [f32; 3] = [30.0, 170.0, 180.0];
const VIOLET: [f32; 3] = [150.0, 70.0, 230.0];

/// The id, the type and the bytes of a demo image.
type DemoImage = (&'static str, MediaType, Vec<u8>);

/// Draws the four demo images: id, type and bytes.
pub(crate) fn draw() -> Result<Vec<DemoImage>, PictureError> {
    let pair = [
        Glow { x: 0.36, y: 0.42, radius: 0.22, colour: EMBER },
        Glow { x: 0.62, y: 0.56, radius: 0.26, colour: TEAL },
    ];
    let one = [Glow { x: 0.5, y: 0.5, radius: 0.3, colour: VIOLET }];
    let crowd = [
        Glow { x: 0.25, y: 0.3, radius: 0.14, colour: TEAL },
        Glow { x: 0.55, y: 0.62, radius: 0.2, colour: VIOLET },
        Glow { x: 0.8, y: 0.35, radius: 0.12, colour: EMBER },
    ];

    // Grain keeps a PNG from compressing away: this one should have about a megabyte, like those of image models.
    let mut png = Vec::new();
    let encoder = PngEncoder::new_with_quality(&mut png, CompressionType::Fast, FilterType::Sub);
    paint(768, 768, &pair, 3)
        .write_with_encoder(encoder)
        .map_err(|error| PictureError::Encoding(error.to_string()))?;
    let limits = RenderLimits { pixels: u64::MAX, deadline: None };
    let jpeg = encode::jpeg(&paint(960, 540, &one, 4), 85, limits)?;
    let webp = encode::exact_webp(&paint(512, 512, &crowd, 0), limits)?;
    Ok(vec![
        ("hero_abc123", MediaType::Png, png),
        ("concept_0", MediaType::Jpeg, jpeg),
        ("concept_1", MediaType::WebP, webp),
        ("concept_2", MediaType::Svg, SVG.as_bytes().to_vec()),
    ])
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "coordinates are small, and a clamped colour fits its byte"
)]
fn paint(width: u32, height: u32, glows: &[Glow], grain: u32) -> DynamicImage {
    let scale = width.min(height) as f32;
    // A linear congruential generator: the same grain on every machine.
    let mut noise = 0x2545_f491_u32;
    let image = RgbImage::from_fn(width, height, |x, y| {
        let mut light = [10.0, 11.0, 18.0];
        for glow in glows {
            let dx = (x as f32 - glow.x * width as f32) / scale;
            let dy = (y as f32 - glow.y * height as f32) / scale;
            let distance = (dx * dx + dy * dy).sqrt() / glow.radius;
            // A bright rim, and a haze that falls off on both sides of it.
            let rim = (-((distance - 1.0) * 9.0).powi(2)).exp();
            let haze = 0.35 * (-distance * distance * 0.7).exp();
            for (sum, colour) in light.iter_mut().zip(glow.colour) {
                *sum += colour * (rim + haze);
            }
        }
        Rgb(light.map(|value| {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let offset = (noise >> 24) % (2 * grain + 1);
            (value + offset as f32 - grain as f32).clamp(0.0, 255.0) as u8
        }))
    });
    DynamicImage::ImageRgb8(image)
}

const SVG: &str = r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 400" width="640" height="400">
  <defs>
    <radialGradient id="glow">
      <stop offset="0.55" stop-color="#12131c"/>
      <stop offset="0.7" stop-color="#ff7828"/>
      <stop offset="1" stop-color="#12131c" stop-opacity="0"/>
    </radialGradient>
  </defs>
  <rect width="640" height="400" fill="#12131c"/>
  <circle cx="250" cy="200" r="150" fill="url(#glow)" opacity="0.9"/>
  <circle cx="330" cy="200" r="150" fill="url(#glow)" opacity="0.5"/>
  <circle cx="410" cy="200" r="150" fill="url(#glow)" opacity="0.2"/>
</svg>
"##;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageId;
    use crate::picture::sniff::sniff;

    #[test]
    fn the_demo_images_are_what_they_say_and_one_has_about_a_megabyte() {
        let images = draw().unwrap();
        let ids: Vec<&str> = images.iter().map(|(id, _, _)| *id).collect();
        assert_eq!(ids, ["hero_abc123", "concept_0", "concept_1", "concept_2"]);
        for (id, media_type, bytes) in &images {
            ImageId::parse(id).unwrap();
            assert_eq!(sniff(bytes), Some(*media_type));
        }
        let hero = images[0].2.len();
        assert!((900_000..1_200_000).contains(&hero), "{hero} bytes");
    }
}
