//! Converts colours to sRGB.

use std::borrow::Cow;
use std::sync::Arc;

use image::DynamicImage;
use moxcms::{
    ColorProfile, DataColorSpace, Layout, ParsingOptions, RenderingIntent, Transform8BitExecutor,
    TransformOptions,
};

/// Bytes that are converted at a time: whole pixels of three and of four channels. A copy of the whole would take as much
/// memory again.
const PIECE: usize = 12 * 4096;

/// Converts colours by an embedded profile. Like in browsers, a profile that is malformed, or of another space than the decoded
/// pixels, is ignored. A profile of greys counts if each pixel is grey.
pub(super) fn to_srgb(picture: &mut DynamicImage, profile: &[u8]) {
    if let Some(profile) = parse(profile) {
        convert(picture, &profile);
    }
}

/// Converts colours by a profile for RGB or for greys.
pub(super) fn convert(picture: &mut DynamicImage, profile: &ColorProfile) {
    let (pixels, channels) = match picture {
        DynamicImage::ImageRgb8(pixels) => (&mut **pixels, 3),
        DynamicImage::ImageRgba8(pixels) => (&mut **pixels, 4),
        _ => return,
    };
    match profile.color_space {
        DataColorSpace::Rgb => convert_rgb(pixels, channels, profile),
        DataColorSpace::Gray => convert_grey(pixels, channels, profile),
        _ => None,
    };
}

/// Converts ink to light: from C, M, Y, K, where 255 is all of the ink, to R, G, B.
///
/// A profile that is malformed, or not for CMYK, is ignored. Without one each ink takes its part of the light, as in browsers.
pub(super) fn cmyk_to_rgb(pixels: &[u8], profile: Option<&[u8]>) -> Vec<u8> {
    let mut converted = vec![0; pixels.len() / 4 * 3];
    let profile = profile.and_then(parse).filter(|it| it.color_space == DataColorSpace::Cmyk);
    let transform = profile.and_then(|it| transform(&it, Layout::Rgba, Layout::Rgb));
    let pieces = pixels.chunks(PIECE).zip(converted.chunks_mut(PIECE / 4 * 3));
    for (pixels, converted) in pieces {
        let whole = &pixels[..pixels.len() / 4 * 4];
        let done = transform.as_ref().is_some_and(|it| it.transform(whole, converted).is_ok());
        if !done {
            let (inks, _) = pixels.as_chunks::<4>();
            let (lights, _) = converted.as_chunks_mut::<3>();
            for ([c, m, y, k], light) in inks.iter().zip(lights) {
                *light = [c, m, y].map(|ink| product(255 - ink, 255 - k));
            }
        }
    }
    converted
}

/// The product of two parts of 255.
#[expect(clippy::cast_possible_truncation, reason = "255 times 255 becomes 255")]
fn product(one: u8, other: u8) -> u8 {
    (u16::from(one) * u16::from(other) / 255) as u8
}

fn convert_rgb(pixels: &mut [u8], channels: usize, profile: &ColorProfile) -> Option<()> {
    let layout = if channels == 4 { Layout::Rgba } else { Layout::Rgb };
    let transform = transform(profile, layout, layout)?;
    if changes_nothing(&*transform, channels) {
        return None;
    }
    let mut source = Vec::with_capacity(PIECE);
    for pixels in pixels.chunks_mut(PIECE) {
        source.clear();
        source.extend_from_slice(pixels);
        if transform.transform(&source, pixels).is_err() {
            pixels.copy_from_slice(&source);
        }
    }
    Some(())
}

/// True for a transform from a space like sRGB: no colour of a grid changes by more than 1.
fn changes_nothing(transform: &Transform8BitExecutor, channels: usize) -> bool {
    let steps = || (0..=255_u8).step_by(15);
    let grid =
        steps().flat_map(|r| steps().flat_map(move |g| steps().map(move |b| [r, g, b, 255])));
    let grid: Vec<u8> = grid.flat_map(|pixel| pixel.into_iter().take(channels)).collect();
    let mut converted = vec![0; grid.len()];
    transform.transform(&grid, &mut converted).is_ok()
        && grid.iter().zip(&converted).all(|(one, other)| one.abs_diff(*other) <= 1)
}

fn convert_grey(pixels: &mut [u8], channels: usize, profile: &ColorProfile) -> Option<()> {
    let is_grey = |pixel: &[u8]| pixel[0] == pixel[1] && pixel[1] == pixel[2];
    if !pixels.chunks_exact(channels).all(is_grey) {
        return None;
    }
    let greys: Vec<u8> = (0..=255).collect();
    let mut colours = [0; 3 * 256];
    transform(profile, Layout::Gray, Layout::Rgb)?.transform(&greys, &mut colours).ok()?;
    let (colours, _) = colours.as_chunks::<3>();
    for pixel in pixels.chunks_exact_mut(channels) {
        let grey = usize::from(pixel[0]);
        pixel[..3].copy_from_slice(&colours[grey]);
    }
    Some(())
}

/// The transform of a profile to sRGB. Of several tables it takes the perceptual one, or else the colorimetric one: there are no
/// others after [`parse`].
fn transform(
    profile: &ColorProfile,
    from: Layout,
    to: Layout,
) -> Option<Arc<Transform8BitExecutor>> {
    let rendering_intent = match profile.lut_a_to_b_perceptual {
        None if profile.lut_a_to_b_colorimetric.is_some() => RenderingIntent::RelativeColorimetric,
        _ => RenderingIntent::Perceptual,
    };
    let options = TransformOptions { rendering_intent, ..TransformOptions::default() };
    profile.create_transform_8bit(from, &ColorProfile::new_srgb(), to, options).ok()
}

/// Reads a profile, but only the tags that count here: in any other one moxcms would refuse a mistake.
fn parse(bytes: &[u8]) -> Option<ColorProfile> {
    /// The start of the table of tags (ICC.1:2022 §7.3).
    const TABLE: usize = 132;
    /// A signature, an offset and a length.
    const ENTRY: usize = 12;
    const TAGS: [&[u8; 4]; 10] =
        [b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC", b"A2B0", b"A2B1", b"cicp"];
    let limits = ParsingOptions::default();
    if bytes.len() >= limits.max_profile_size {
        return None;
    }
    let mut bytes = Cow::Borrowed(bytes);
    let count = u32::from_be_bytes(*bytes.get(TABLE - 4..)?.first_chunk()?);
    for at in (0..count as usize).map(|it| TABLE + it * ENTRY) {
        let tag = bytes.get(at..at + 4)?;
        if !TAGS.iter().any(|it| *it == tag) {
            bytes.to_mut()[at..at + 4].fill(0);
        }
    }
    ColorProfile::new_from_slice_with_options(&bytes, limits).ok()
}
