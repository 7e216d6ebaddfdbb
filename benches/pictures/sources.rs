//! Source pictures: PNG of 1024×1024 pixels, the same on every machine.

use std::fs;
use std::path::PathBuf;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{Rgb, RgbImage};

use crate::installed;

/// Side of each picture, in pixels.
const SIDE: u32 = 1024;

/// A picture as a file and as its bytes.
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) file: PathBuf,
    pub(crate) bytes: Vec<u8>,
    pub(crate) picture: RgbImage,
}

/// Returns all source pictures, and the reason if one is missing.
pub(crate) fn all() -> (Vec<Source>, Option<String>) {
    let mut sources = vec![source("drawn", drawn()), source("synthetic photo", synthetic())];
    let missing = match installed::photograph() {
        Ok(pixels) => {
            sources.push(source("photograph", photograph(&pixels)));
            None
        }
        Err(error) => Some(error),
    };
    (sources, missing)
}

fn source(name: &'static str, picture: RgbImage) -> Source {
    let mut bytes = Vec::new();
    let encoder =
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive);
    picture.write_with_encoder(encoder).unwrap();
    let folder = installed::folder();
    fs::create_dir_all(&folder).unwrap();
    let file = folder.join(name.replace(' ', "-")).with_extension("png");
    fs::write(&file, &bytes).unwrap();
    Source { name, file, bytes, picture }
}

/// Draws rings of light and a hard edge, as in the demo images; without grain, so that it compresses well.
fn drawn() -> RgbImage {
    const RINGS: [(f32, f32, f32, [f32; 3]); 3] = [
        (0.25, 0.3, 0.14, [30.0, 170.0, 180.0]),
        (0.55, 0.62, 0.2, [150.0, 70.0, 230.0]),
        (0.8, 0.35, 0.12, [255.0, 120.0, 40.0]),
    ];
    paint(|x, y| {
        let mut light = [10.0, 11.0, 18.0];
        for (left, top, radius, colour) in RINGS {
            let distance = (x - left).hypot(y - top) / radius;
            let rim = (-((distance - 1.0) * 9.0).powi(2)).exp();
            let haze = 0.35 * (-distance * distance * 0.7).exp();
            let disc = if distance < 0.4 { 0.5 } else { 0.0 };
            for (sum, colour) in light.iter_mut().zip(colour) {
                *sum += colour * (rim + haze + disc);
            }
        }
        light
    })
}

/// Draws gradients, texture at every scale, and sensor grain, as in a photograph.
fn synthetic() -> RgbImage {
    let mut grain = 0x2545_f491_u32;
    paint(|x, y| {
        let texture = |scale: f32, seed: u32| {
            let octave = |n: u8| {
                let frequency = scale * f32::from(1_u16 << n);
                smooth_noise(x * frequency, y * frequency, seed + u32::from(n))
                    * 0.55_f32.powi(n.into())
            };
            (0..7).map(octave).sum::<f32>()
        };
        let (background, tint) = (texture(4.0, 1), texture(3.0, 40));
        let slope = 150.0 - 110.0 * y + 40.0 * x;
        let light = slope + 55.0 * background;
        [light + 30.0 * tint, light + 8.0 * background, light - 34.0 * tint].map(|value| {
            // The sum of three uniform values is nearly normal.
            let mut noise = || {
                grain = grain.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f32::from((grain >> 24).to_le_bytes()[0]) / 255.0 - 0.5
            };
            value + 5.0 * (noise() + noise() + noise())
        })
    })
}

/// Continuous noise from -1 to 1: random values at whole coordinates, interpolated between them.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "coordinates are positive and small"
)]
fn smooth_noise(x: f32, y: f32, seed: u32) -> f32 {
    let at = |x: u32, y: u32| {
        let mut hash = x.wrapping_mul(0x9e37_79b1)
            ^ y.wrapping_mul(0x85eb_ca77)
            ^ seed.wrapping_mul(0xc2b2_ae3d);
        hash = (hash ^ hash >> 15).wrapping_mul(0x2c1b_3c6d);
        hash = (hash ^ hash >> 12).wrapping_mul(0x297a_2d39);
        ((hash ^ hash >> 15) >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let ease = |part: f32| part * part * (3.0 - 2.0 * part);
    let mix = |from: f32, to: f32, part: f32| from + (to - from) * part;
    let (left, top) = (x as u32, y as u32);
    let (across, down) = (ease(x.fract()), ease(y.fract()));
    let above = mix(at(left, top), at(left + 1, top), across);
    let below = mix(at(left, top + 1), at(left + 1, top + 1), across);
    mix(above, below, down)
}

/// Extends the wide photograph to a square with its mirrored last quarter, since scaling would blur it.
fn photograph(pixels: &[u8]) -> RgbImage {
    let height = u32::try_from(pixels.len()).unwrap() / 3 / SIDE;
    let photograph = RgbImage::from_raw(SIDE, height, pixels.to_vec()).unwrap();
    RgbImage::from_fn(SIDE, SIDE, |x, y| {
        *photograph.get_pixel(x, if y < height { y } else { 2 * height - 1 - y })
    })
}

/// Renders a function of the unit square that gives the light at each point.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "coordinates are small, and a clamped colour fits its byte"
)]
fn paint(mut light: impl FnMut(f32, f32) -> [f32; 3]) -> RgbImage {
    RgbImage::from_fn(SIDE, SIDE, |x, y| {
        let light = light(x as f32 / SIDE as f32, y as f32 / SIDE as f32);
        Rgb(light.map(|value| value.clamp(0.0, 255.0) as u8))
    })
}
