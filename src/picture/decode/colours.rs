//! Converts colours to sRGB.

use std::borrow::Cow;
use std::sync::Arc;

use image::DynamicImage;
use moxcms::{
    Chromaticity, CicpColorPrimaries, CicpProfile, ColorPrimaries, ColorProfile, DataColorSpace,
    Layout, MatrixCoefficients, ParsingOptions, RenderingIntent, ToneReprCurve,
    TransferCharacteristics, Transform8BitExecutor, Transform16BitExecutor, TransformOptions,
};

use super::super::PictureError;

/// Bytes that are converted at a time: whole pixels of three and of four channels. A copy of the whole would take as much
/// memory again.
const PIECE: usize = 12 * 4096;

/// Converts colours by an embedded profile. Like in browsers, a profile that is malformed, or of another space than the decoded
/// pixels, is ignored. A profile of greys counts if each pixel is grey. Refuses a profile that counts, but can't be applied.
pub(super) fn to_srgb(picture: &mut DynamicImage, profile: &[u8]) -> Result<(), PictureError> {
    match Colours::of_profile(profile) {
        Some(Colours::Known(profile)) => convert(picture, &profile),
        Some(Colours::Refused) => return Err(refused()),
        None => {}
    }
    Ok(())
}

/// The error for colours that can't be converted rightly.
pub(super) fn refused() -> PictureError {
    PictureError::Unsupported(
        "its colours are HDR, CIE XYZ, or by a grey profile with tables".to_owned(),
    )
}

/// Converts colours by a profile for RGB or for greys.
pub(super) fn convert(picture: &mut DynamicImage, profile: &ColorProfile) {
    let (pixels, channels) = match picture {
        DynamicImage::ImageRgb8(pixels) => (&mut **pixels, 3),
        DynamicImage::ImageRgba8(pixels) => (&mut **pixels, 4),
        _ => return,
    };
    let is_grey = |pixel: &[u8]| pixel[0] == pixel[1] && pixel[1] == pixel[2];
    if profile.color_space == DataColorSpace::Gray && !pixels.chunks_exact(channels).all(is_grey) {
        return;
    }
    let Some(transform) = rgb_transform(profile, channels) else {
        return;
    };
    let mut source = Vec::with_capacity(PIECE);
    for pixels in pixels.chunks_mut(PIECE) {
        source.clear();
        source.extend_from_slice(pixels);
        if transform.transform(&source, pixels).is_err() {
            pixels.copy_from_slice(&source);
        }
    }
}

/// A value of 16 bits in 8.
#[cfg(any(feature = "read-avif", feature = "read-jxl"))]
pub(super) fn narrow(value: u16) -> u8 {
    let narrowed = (u32::from(value) * 255 + 32_767) / 65_535;
    u8::try_from(narrowed).unwrap_or(u8::MAX)
}

/// A transform for pixels of RGB, or of RGBA, with 16 bits a channel. In 8 bits, dark colours of a profile with a flat curve would
/// be one and the same. `None` if they are sRGB already.
pub(super) fn deep_transform(
    profile: &ColorProfile,
    channels: usize,
) -> Option<Arc<Transform16BitExecutor>> {
    rgb_transform(profile, channels)?;
    let (profile, layout) = (of_greys(profile), layout(channels));
    profile
        .create_transform_16bit(layout, &ColorProfile::new_srgb(), layout, options(&profile))
        .ok()
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

fn layout(channels: usize) -> Layout {
    if channels == 4 { Layout::Rgba } else { Layout::Rgb }
}

/// The transform of a profile for RGB or for greys. `None` if it would change nothing.
fn rgb_transform(profile: &ColorProfile, channels: usize) -> Option<Arc<Transform8BitExecutor>> {
    let profile = of_greys(profile);
    if profile.color_space != DataColorSpace::Rgb {
        return None;
    }
    let transform = transform(&profile, layout(channels), layout(channels))?;
    (!changes_nothing(&*transform, channels)).then_some(transform)
}

/// For a profile for greys, a profile for RGB with its curve: grey stays grey (ICC.1:2022 §F.2).
fn of_greys(profile: &ColorProfile) -> Cow<'_, ColorProfile> {
    match &profile.gray_trc {
        Some(curve) if profile.color_space == DataColorSpace::Gray => {
            let mut grey = ColorProfile::new_srgb();
            set_curve(&mut grey, curve);
            Cow::Owned(grey)
        }
        _ => Cow::Borrowed(profile),
    }
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

fn transform(
    profile: &ColorProfile,
    from: Layout,
    to: Layout,
) -> Option<Arc<Transform8BitExecutor>> {
    profile.create_transform_8bit(from, &ColorProfile::new_srgb(), to, options(profile)).ok()
}

/// The options of a transform. Of several tables the perceptual one counts, or else the colorimetric one: there are no others after
/// [`parse`].
fn options(profile: &ColorProfile) -> TransformOptions {
    let rendering_intent = match profile.lut_a_to_b_perceptual {
        None if profile.lut_a_to_b_colorimetric.is_some() => RenderingIntent::RelativeColorimetric,
        _ => RenderingIntent::Perceptual,
    };
    TransformOptions {
        rendering_intent,
        // Code points are read by `Colours`.
        allow_use_cicp_transfer: false,
        ..TransformOptions::default()
    }
}

/// The colours of a picture.
#[derive(Debug)]
pub(super) enum Colours {
    /// A profile for RGB, for greys or for CMYK.
    Known(Box<ColorProfile>),
    /// Colours that can't be converted rightly: PQ and HLG, which are brighter than white, and which each program darkens in its
    /// own way; CIE XYZ as primaries; tables for greys. Such a picture must be refused.
    Refused,
}

impl Colours {
    /// The colours that a profile says. The code points in it come first, as in browsers. `None` if it is malformed.
    pub(super) fn of_profile(bytes: &[u8]) -> Option<Colours> {
        let profile = parse(bytes)?;
        let tables = [&profile.lut_a_to_b_perceptual, &profile.lut_a_to_b_colorimetric];
        if profile.color_space == DataColorSpace::Gray && tables.iter().any(|it| it.is_some()) {
            return Some(Colours::Refused);
        }
        // In a profile, browsers take the curves of cameras for that of sRGB.
        let points = profile.cicp.as_ref().filter(|points| points.full_range);
        let colours = points.and_then(|points| {
            let transfer = match points.transfer_characteristics as u8 {
                1 | 6 | 11 | 14 | 15 => 13,
                transfer => transfer,
            };
            Colours::of_code_points(points.color_primaries as u8, transfer)
        });
        Some(colours.unwrap_or_else(|| Colours::Known(Box::new(profile))))
    }

    /// The colours of code points (ITU-T H.273 §8.1, §8.2). `None` if one of them isn't known.
    pub(super) fn of_code_points(primaries: u8, transfer: u8) -> Option<Colours> {
        /// CIE XYZ: moxcms has no finite values for it.
        const XYZ: u8 = 10;
        let mut profile = ColorProfile::new_from_cicp(CicpProfile {
            color_primaries: CicpColorPrimaries::try_from(primaries).ok()?,
            // Only for the primaries.
            transfer_characteristics: TransferCharacteristics::Srgb,
            matrix_coefficients: MatrixCoefficients::Identity,
            full_range: true,
        });
        // Reserved primaries set nothing.
        profile.cicp.take()?;
        // Parameters as in `para` of a profile (ICC.1:2022 §10.18).
        let curve: &[f32] = match transfer {
            // BT.709, BT.601, xvYCC and BT.2020 are shown as by a screen (BT.1886), not by the inverse of the camera's curve.
            1 | 6 | 11 | 14 | 15 => &[2.4],
            4 => &[2.2],
            5 => &[2.8],
            // SMPTE ST 240.
            7 => &[1.0 / 0.45, 1.0 / 1.1115, 0.1115 / 1.1115, 0.25, 0.0913],
            8 => &[1.0],
            13 => &[2.4, 1.0 / 1.055, 0.055 / 1.055, 1.0 / 12.92, 0.040_45],
            // SMPTE ST 428-1: the root of 52.37 / 48.
            17 => &[2.6, 1.034_08, 0.0],
            16 | 18 => return Some(Colours::Refused),
            _ => return None,
        };
        if primaries == XYZ {
            return Some(Colours::Refused);
        }
        set_curve(&mut profile, &ToneReprCurve::Parametric(curve.to_vec()));
        Some(Colours::Known(Box::new(profile)))
    }

    /// The colours of a gamma as in `gAMA` of PNG, with white, red, green and blue if they aren't those of sRGB. `None` stands for
    /// sRGB, which browsers also show if a value is impossible.
    pub(super) fn of_gamma(gamma: f32, chromaticities: Option<[(f32, f32); 4]>) -> Option<Colours> {
        /// Gammas that count as that of sRGB (libpng's `PNG_GAMMA_THRESHOLD`).
        const NEUTRAL: std::ops::Range<f32> = 0.95..1.05;
        if gamma <= 0.0 {
            return None;
        }
        let mut profile = ColorProfile::new_srgb();
        match chromaticities {
            None if NEUTRAL.contains(&(gamma * 2.2)) => return None,
            None => {}
            Some(all) => {
                let possible = |(x, y): &(f32, f32)| *x <= 1.0 && *y <= 1.0;
                let [white, red, green, blue] = all.map(|(x, y)| Chromaticity::new(x, y));
                if !all.iter().all(possible) || white.y == 0.0 {
                    return None;
                }
                let primaries = ColorPrimaries { red, green, blue };
                profile.update_rgb_colorimetry(white.to_xyyb(), primaries);
                // On a line the primaries make no colours, and a white or a primary without brightness has no finite values.
                let area =
                    (green.x - red.x) * (blue.y - red.y) - (blue.x - red.x) * (green.y - red.y);
                let volume = profile.colorant_matrix().determinant()?;
                if area.abs() < 1e-6 || !volume.is_normal() {
                    return None;
                }
            }
        }
        set_curve(&mut profile, &ToneReprCurve::Parametric(vec![1.0 / gamma]));
        Some(Colours::Known(Box::new(profile)))
    }
}

/// Gives the three channels of a profile a curve.
fn set_curve(profile: &mut ColorProfile, curve: &ToneReprCurve) {
    profile.cicp = None;
    profile.red_trc = Some(curve.clone());
    profile.green_trc = Some(curve.clone());
    profile.blue_trc = Some(curve.clone());
}

/// Reads a profile (ICC.1:2022 §7). Refuses what browsers do; but mistakes in tags that don't count here, for which moxcms refuses
/// all of it, are hidden from it.
fn parse(bytes: &[u8]) -> Option<ColorProfile> {
    /// The start of the table of tags.
    const TABLE: usize = 132;
    /// A signature, an offset and a length.
    const ENTRY: usize = 12;
    const TAGS: [&[u8; 4]; 10] =
        [b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC", b"kTRC", b"A2B0", b"A2B1", b"cicp"];
    let word = |bytes: &[u8], at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let limits = ParsingOptions { max_allowed_trc_size: 1 << 16, ..ParsingOptions::default() };
    let length = usize::try_from(word(bytes, 0)?).ok()?;
    if length >= limits.max_profile_size {
        return None;
    }
    let mut bytes = bytes.get(..length)?.to_vec();
    let count = usize::try_from(word(&bytes, TABLE - 4)?).ok()?;
    let mut has_tables = false;
    let mut is_legacy = false;
    for at in (0..count).map(|it| TABLE + it * ENTRY) {
        let (start, size) = (word(&bytes, at + 4)? as usize, word(&bytes, at + 8)? as usize);
        let tag = bytes.get(start..start.checked_add(size)?)?.first_chunk::<4>()?;
        let signature = bytes.get(at..at + 4)?;
        if !TAGS.iter().any(|it| *it == signature) {
            bytes[at..at + 4].fill(0);
        } else if signature.starts_with(b"A2B") {
            has_tables = true;
            is_legacy = tag == b"mft2";
        }
    }
    // The white of the connection space is D50 (§7.2.16).
    let white = [68, 72, 76].map(|at| word(&bytes, at).map_or(0.0, |it| f64::from(it) / 65536.0));
    let is_d50 =
        white.iter().zip([0.9642, 1.0, 0.8249]).all(|(it, wanted)| (it - wanted).abs() < 0.01);
    if bytes[8] > 4 || !is_d50 || !matches!(&bytes[20..24], b"XYZ " | b"Lab ") {
        return None;
    }
    // Lab values of 16 bits are as in old profiles in `mft2`, and only there (§6.3.4.2); moxcms goes by the version.
    bytes[8..12].copy_from_slice(if is_legacy { &[2, 0x40, 0, 0] } else { &[4, 0x40, 0, 0] });
    // The kind of the device has no effect.
    bytes[12..16].copy_from_slice(b"mntr");
    if !has_tables && &bytes[16..20] == b"RGB " {
        // Three primaries are in XYZ.
        bytes[20..24].copy_from_slice(b"XYZ ");
    }
    let profile = ColorProfile::new_from_slice_with_options(&bytes, limits).ok()?;
    let curves = [&profile.red_trc, &profile.green_trc, &profile.blue_trc, &profile.gray_trc];
    // Browsers ignore a curve to Lab.
    if profile.color_space == DataColorSpace::Gray
        && !has_tables
        && profile.pcs != DataColorSpace::Xyz
    {
        return None;
    }
    let are_possible = curves.into_iter().flatten().all(is_possible);
    are_possible.then_some(profile)
}

/// False for a curve whose formula has no values (ICC.1:2022 §10.18).
fn is_possible(curve: &ToneReprCurve) -> bool {
    match curve {
        ToneReprCurve::Lut(_) => true,
        ToneReprCurve::Parametric(parameters) => match parameters[..] {
            [gamma] => gamma >= 0.0,
            // The part that is a power begins at -b/a, or at d.
            [gamma, a, b] | [gamma, a, b, _] => gamma >= 0.0 && a > 0.0 && b <= 0.0,
            [gamma, a, b, c, d] | [gamma, a, b, c, d, _, _] => {
                gamma >= 0.0 && a >= 0.0 && c >= 0.0 && d >= 0.0 && a * d + b >= 0.0
            }
            _ => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use image::{RgbImage, RgbaImage};

    use super::*;

    /// Tags by their signatures.
    type Tags<'a> = [(&'a [u8; 4], Vec<u8>)];

    /// A profile of a space, to XYZ or Lab.
    fn profile(space: &[u8], connection: &[u8], tags: &Tags) -> Vec<u8> {
        let mut table = u32::try_from(tags.len()).unwrap().to_be_bytes().to_vec();
        let mut body: Vec<u8> = Vec::new();
        for (signature, data) in tags {
            table.extend(*signature);
            for number in [132 + 12 * tags.len() + body.len(), data.len()] {
                table.extend(u32::try_from(number).unwrap().to_be_bytes());
            }
            body.extend(data);
        }
        let mut bytes = vec![0; 128];
        bytes[8] = 2;
        bytes[16..20].copy_from_slice(space);
        bytes[20..24].copy_from_slice(connection);
        bytes[36..40].copy_from_slice(b"acsp");
        bytes[68..80].copy_from_slice(&[0, 0, 0xf6, 0xd6, 0, 1, 0, 0, 0, 0, 0xd3, 0x2d]);
        bytes.extend(table);
        bytes.extend(body);
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        bytes
    }

    fn curve(numbers: &[u16]) -> Vec<u8> {
        let mut bytes = b"curv\0\0\0\0".to_vec();
        bytes.extend(u32::try_from(numbers.len()).unwrap().to_be_bytes());
        bytes.extend(numbers.iter().flat_map(|it| it.to_be_bytes()));
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// The linear profile of primaries that are green, blue and red.
    fn turned() -> Vec<(&'static [u8; 4], Vec<u8>)> {
        let srgb = ColorProfile::new_srgb();
        #[expect(clippy::cast_possible_truncation, reason = "less than one")]
        let fixed = |number: f64| ((number * 65536.0).round() as i32).to_be_bytes();
        let primary = |it: moxcms::Xyzd| [*b"XYZ ", [0; 4], fixed(it.x), fixed(it.y), fixed(it.z)];
        let mut tags = vec![
            (b"rXYZ", primary(srgb.green_colorant).concat()),
            (b"gXYZ", primary(srgb.blue_colorant).concat()),
            (b"bXYZ", primary(srgb.red_colorant).concat()),
        ];
        tags.extend([b"rTRC", b"gTRC", b"bTRC"].map(|tag| (tag, curve(&[]))));
        tags
    }

    /// A table of a CMYK device whose colour is all black ink, and whose black ink has none. In 8 bits (ICC.1:2022 §10.11), or
    /// in 16 bits of old Lab values.
    fn inks(is_deep: bool) -> Vec<u8> {
        let mut bytes = if is_deep { b"mft2".to_vec() } else { b"mft1".to_vec() };
        bytes.extend([0, 0, 0, 0, 4, 3, 2, 0]);
        bytes.extend([0; 36]);
        if is_deep {
            bytes.extend([0, 2, 0, 2]);
        }
        let identity: Vec<u8> = if is_deep { vec![0, 0, 255, 255] } else { (0..=255).collect() };
        bytes.extend(identity.repeat(4));
        for node in 0..16 {
            let is_light = node & 0b1110 == 0;
            let value =
                |light: u8, one: u8, next: u8| if is_deep { vec![one, next] } else { vec![light] };
            let light = if is_light { value(255, 255, 0) } else { value(0, 0, 0) };
            bytes.extend([light, value(128, 128, 0), value(128, 128, 0)].concat());
        }
        bytes.extend(identity.repeat(3));
        bytes
    }

    fn shown(profile: &[u8], pixel: [u8; 3]) -> [u8; 3] {
        let mut picture = DynamicImage::ImageRgb8(RgbImage::from_pixel(1, 1, image::Rgb(pixel)));
        to_srgb(&mut picture, profile).unwrap();
        picture.to_rgb8().get_pixel(0, 0).0
    }

    #[test]
    fn a_profile_of_primaries_is_applied() {
        assert_eq!(shown(&profile(b"RGB ", b"XYZ ", &turned()), [55, 0, 255]), [255, 128, 0]);
        let mut tags = turned();
        // Mistakes in tags without effect.
        tags.push((b"desc", b"desc\0\0\0\0\xff\xff\xff\xff".to_vec()));
        tags.push((b"B2A0", b"nothing of the kind".to_vec()));
        assert_eq!(shown(&profile(b"RGB ", b"XYZ ", &tags), [55, 0, 255]), [255, 128, 0]);
    }

    #[test]
    fn a_grey_profile_is_applied_to_greys_only() {
        let linear = profile(b"GRAY", b"XYZ ", &[(b"kTRC", curve(&[]))]);
        assert_eq!(shown(&linear, [55; 3]), [128; 3]);
        assert_eq!(shown(&linear, [55, 55, 56]), [55, 55, 56]);
        let table = profile(b"GRAY", b"XYZ ", &[(b"kTRC", curve(&[65535, 0]))]);
        assert_eq!(shown(&table, [255; 3]), [0; 3]);
        let mut picture = RgbaImage::from_pixel(1, 1, image::Rgba([55, 55, 55, 9])).into();
        to_srgb(&mut picture, &linear).unwrap();
        assert_eq!(picture.to_rgba8().get_pixel(0, 0).0, [128, 128, 128, 9]);
    }

    #[test]
    fn a_profile_of_another_space_or_a_broken_one_is_ignored() {
        let pixel = [55, 0, 255];
        let good = profile(b"RGB ", b"XYZ ", &turned());
        assert_eq!(shown(&profile(b"CMYK", b"Lab ", &[(b"A2B0", inks(false))]), pixel), pixel);
        for length in [0, 4, 100, 131, 140, good.len() - 1] {
            assert_eq!(shown(&good[..length], pixel), pixel, "{length}");
        }
        for (at, value) in [(8, 5), (36, 0), (69, 9), (20, 0), (128, 255), (139, 255), (143, 255)] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(shown(&bad, pixel), pixel, "{at}");
        }
    }

    #[test]
    fn code_points_in_a_profile_count() {
        let with = |primaries, transfer| {
            let mut tags = turned();
            tags.push((b"cicp", [*b"cicp", [0; 4], [primaries, transfer, 0, 1]].concat()));
            profile(b"RGB ", b"XYZ ", &tags)
        };
        assert_eq!(shown(&with(1, 13), [55, 0, 255]), [55, 0, 255]);
        assert_eq!(shown(&with(1, 8), [55, 0, 255]), [128, 0, 255]);
        // Unknown ones don't.
        assert_eq!(shown(&with(2, 2), [55, 0, 255]), [255, 128, 0]);
        let is_refused =
            |profile: &[u8]| to_srgb(&mut DynamicImage::new_rgb8(1, 1), profile).is_err();
        assert!(is_refused(&with(9, 16)) && is_refused(&with(9, 18)));
        assert!(!is_refused(&with(1, 13)) && !is_refused(b""));
    }

    #[test]
    fn inks_become_light_by_their_profile() {
        let pixels = [0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 255];
        for is_deep in [false, true] {
            for tag in [b"A2B0", b"A2B1"] {
                let table = profile(b"CMYK", b"Lab ", &[(tag, inks(is_deep))]);
                let shown = cmyk_to_rgb(&pixels, Some(&table));
                let near = |one: &[u8], other: u8| one.iter().all(|it| it.abs_diff(other) < 3);
                assert!(near(&shown[..3], 255), "{shown:?}");
                assert!(near(&shown[3..6], 0), "{shown:?}");
            }
        }
        // Without a profile, or with one that is not for inks.
        let light = [255, 255, 255, 0, 255, 255, 0, 0, 0];
        let other = profile(b"RGB ", b"XYZ ", &turned());
        assert_eq!(cmyk_to_rgb(&pixels, None), light);
        assert_eq!(cmyk_to_rgb(&pixels, Some(&other)), light);
        assert_eq!(cmyk_to_rgb(&[0, 51, 102, 128], None), [127, 101, 76]);
        // Whole pieces, and the rest.
        let many = [9, 0, 0, 0].repeat(PIECE / 4 + 5);
        assert_eq!(cmyk_to_rgb(&many, None), [246, 255, 255].repeat(PIECE / 4 + 5));
    }
}
