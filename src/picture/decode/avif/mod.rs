//! Decodes AVIF: the primary item, or the first frame of a film, as Chromium and libavif show it.
//!
//! The container is read here, and AV1 is decoded by rav1d. EXIF metadata don't turn the picture; the properties of the item do.

mod av1;
mod boxes;
mod meta;
mod source;
mod yuv;

use image::{DynamicImage, RgbImage, RgbaImage};
use moxcms::{ColorProfile, DataColorSpace};

use self::av1::{Header, Layout};
use self::source::{Layer, Source};
use self::yuv::{Converter, Matrix, Plane, Range};
use super::super::{PictureError, RenderLimits};
use super::colours::{Colours, narrow};
use super::{Measure, check_pixels, colours, pixels, unsupported};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    /// Tables of a colour profile in 16 bits.
    const TABLES: u64 = 4 << 20;
    let source = Source::read(bytes)?;
    check_pixels(source.colour.size, limits)?;
    let mut most = memory(&source, &source.colour)?;
    if let Some(alpha) = &source.alpha {
        most = most.max(memory(&source, alpha)?) + pixels(alpha.size);
    }
    // Rows of samples, and of colours in 16 bits.
    let rows = 64 * u64::from(source.colour.size.0);
    let profile = source.profile.map_or(0, |profile| 5 * profile.len() as u64);
    let beside = most + rows + profile + TABLES;
    let [_, _, width, height] = source.crop;
    let has_alpha = source.alpha.is_some();
    Ok(Measure::new((width, height), source.orientation, has_alpha, beside, bytes))
}

/// Bytes that it takes at most to decode a layer.
fn memory(source: &Source, layer: &Layer) -> Result<u64, PictureError> {
    let first = first(layer)?;
    let header = av1::header(&source.data(first)?)?;
    let canvas = if layer.cells.len() > 1 { header.planes(layer.size) } else { 0 };
    Ok(canvas + header.memory(first.size))
}

fn first<'s, 'a>(layer: &'s Layer<'a>) -> Result<&'s source::Cell<'a>, PictureError> {
    layer.cells.first().ok_or_else(|| broken("its grid has no cells"))
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let source = Source::read(bytes)?;
    check_pixels(source.colour.size, limits)?;
    let first = av1::header(&source.data(first(&source.colour)?)?)?;
    // Told before the pixels are decoded.
    let (header, matrix, profile) = colours_of(&source, first)?;
    let alpha =
        source.alpha.as_ref().map(|alpha| decode_alpha(&source, alpha, limits)).transpose()?;
    let frame = Frame::decode(&source, &source.colour, limits)?;
    let transform = profile.and_then(|it| colours::deep_transform(&it, 3));
    let planes = frame.planes();
    let mut converter = Converter::new(&planes, &header, matrix);
    let [left, top, width, height] = source.crop;
    let channels = if alpha.is_some() { 4 } else { 3 };
    let mut pixels = Vec::with_capacity(width as usize * height as usize * channels);
    let (mut row, mut in_srgb) = (Vec::new(), Vec::new());
    let (from, to) = (left as usize, (left + width) as usize);
    for y in top..top + height {
        limits.check_time()?;
        converter.convert(y, &mut row);
        let start = y as usize * source.colour.size.0 as usize;
        let alpha = alpha.as_ref().map(|alpha| &alpha[start + from..start + to]);
        let row = &mut row[3 * from..3 * to];
        if let Some(alpha) = alpha.filter(|_| source.is_premultiplied) {
            divide(row, alpha);
        }
        let mut shown = &*row;
        if let Some(transform) = &transform {
            in_srgb.resize(row.len(), 0);
            if transform.transform(row, &mut in_srgb).is_ok() {
                shown = &in_srgb;
            }
        }
        let shown = shown.iter().map(|it| narrow(*it));
        match alpha {
            None => pixels.extend(shown),
            Some(alpha) => {
                let start = pixels.len();
                pixels.resize(start + 4 * alpha.len(), 0);
                let mut shown = shown;
                let (to, _) = pixels[start..].as_chunks_mut::<4>();
                for (pixel, alpha) in to.iter_mut().zip(alpha) {
                    pixel[..3].fill_with(|| shown.next().unwrap_or_default());
                    pixel[3] = *alpha;
                }
            }
        }
    }
    let picture = if channels == 4 {
        RgbaImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgba8)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
    };
    Ok(picture.expect("each row has its pixels"))
}

/// True if an AVIF has metadata beside its pictures: EXIF, XMP or the like. `None` if its structure can't be read.
pub(in super::super) fn has_metadata(bytes: &[u8]) -> Option<bool> {
    if source::moving(bytes).ok()?.is_some() {
        // Its tracks have times and names, too.
        return Some(true);
    }
    Some(source::meta(bytes).ok()?.has_metadata())
}

/// True if an AVIF is shown as a film.
pub(super) fn is_animated(bytes: &[u8]) -> bool {
    matches!(source::moving(bytes), Ok(Some(_)))
}

/// The range, the matrix and the profile of the colours. The profile and the code points of the container come first, those of AV1
/// count without them (ISO/IEC 23000-22 §7.3.6.4).
fn colours_of(
    source: &Source,
    mut header: Header,
) -> Result<(Header, Matrix, Option<Box<ColorProfile>>), PictureError> {
    let mut points = header.points.map(u16::from);
    if let Some(said) = source.points {
        points = said.points;
        header.is_full_range = said.is_full_range;
    }
    let [primaries, transfer, matrix] = points.map(|it| u8::try_from(it).unwrap_or(u8::MAX));
    let is_grey = header.layout == Layout::Grey;
    let matrix = Matrix::of(if is_grey { 2 } else { matrix });
    let matrix = matrix.ok_or_else(|| unsupported("AVIF with a rare matrix of colours"))?;
    if matrix == Matrix::Identity && header.layout != Layout::Full {
        return Err(broken("its colours have no matrix, but are subsampled"));
    }
    let colours = match source.profile {
        Some(profile) => Some(
            Colours::of_profile(profile)
                .ok_or_else(|| unsupported("AVIF with a colour profile that can't be read"))?,
        ),
        None if (primaries, transfer) == (2, 2) => None,
        None => {
            let primaries = if primaries == 2 { 1 } else { primaries };
            // As in profiles, browsers take the curves of cameras for that of sRGB.
            let transfer = if matches!(transfer, 1 | 2 | 6 | 14 | 15) { 13 } else { transfer };
            // Browsers show no picture with that of xvYCC.
            let known = Some(transfer).filter(|it| *it != 11);
            let colours = known.and_then(|it| Colours::of_code_points(primaries, it));
            Some(colours.ok_or_else(|| unsupported("AVIF with rare primaries or a rare curve"))?)
        }
    };
    let profile = match colours {
        Some(Colours::Refused) => return Err(colours::refused()),
        Some(Colours::Known(profile)) => Some(profile),
        None => None,
    };
    // Chromium shows no picture with a profile of another space.
    let fits = |profile: &ColorProfile| match profile.color_space {
        DataColorSpace::Gray => is_grey,
        space => space == DataColorSpace::Rgb,
    };
    if profile.as_deref().is_some_and(|profile| !fits(profile)) {
        return Err(unsupported("AVIF with a colour profile of another space"));
    }
    Ok((header, matrix, profile))
}

/// Decodes alpha to 8 bits.
fn decode_alpha(
    source: &Source,
    layer: &Layer,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    let frame = Frame::decode(source, layer, limits)?;
    let range = Range::of(&frame.header);
    let plane = frame.planes()[0];
    let mut alpha = Vec::with_capacity(layer.size.0 as usize * layer.size.1 as usize);
    let mut row = Vec::new();
    for y in 0..layer.size.1 {
        limits.check_time()?;
        plane.read(y, &mut row);
        alpha.extend(row.iter().map(|it| narrow(yuv::deep(range.bright(f32::from(*it))))));
    }
    Ok(alpha)
}

/// The planes of a decoded picture.
struct Frame {
    header: Header,
    size: (u32, u32),
    planes: Vec<(Samples, usize)>,
}

enum Samples {
    Decoder(re_rav1d::dav1d::Plane),
    Canvas(Vec<u8>),
}

impl Frame {
    /// Decodes the cells of a layer.
    fn decode(source: &Source, layer: &Layer, limits: RenderLimits) -> Result<Frame, PictureError> {
        let first = first(layer)?;
        let header = av1::header(&source.data(first)?)?;
        let mut frame = Frame { header, size: layer.size, planes: Vec::new() };
        if layer.cells.len() == 1 && first.size == layer.size {
            let picture = av1::decode(first, &source.data(first)?, &header, limits)?;
            let planes = (0..header.layout.planes()).map(|number| av1::plane(&picture, number));
            frame.planes.extend(planes.map(|(plane, stride)| (Samples::Decoder(plane), stride)));
            return Ok(frame);
        }
        // Colours that two cells share would be known to neither.
        let (layout, (width, height)) = (header.layout, first.size);
        let is_halved = matches!(layout, Layout::Quarters | Layout::Halves);
        if (is_halved && width % 2 != 0) || (layout == Layout::Quarters && height % 2 != 0) {
            return Err(unsupported("AVIF with cells of an odd size"));
        }
        for number in 0..layout.planes() {
            let (width, height) = layout.plane(number, layer.size);
            let stride = width as usize * header.sample();
            frame.planes.push((Samples::Canvas(vec![0; stride * height as usize]), stride));
        }
        let mut at = (0, 0);
        for cell in &layer.cells {
            let data = source.data(cell)?;
            if !av1::header(&data)?.is_like(&header) {
                return Err(unsupported("AVIF with cells of different kinds"));
            }
            let picture = av1::decode(cell, &data, &header, limits)?;
            frame.draw(&picture, at, cell.size);
            at.0 += cell.size.0;
            if at.0 >= cell.size.0 * layer.columns {
                at = (0, at.1 + cell.size.1);
            }
        }
        Ok(frame)
    }

    /// Draws a cell on the canvas. Pixels beyond its edges are cut off.
    fn draw(&mut self, picture: &re_rav1d::dav1d::Picture, at: (u32, u32), size: (u32, u32)) {
        let (layout, sample) = (self.header.layout, self.header.sample());
        for (number, (samples, stride)) in self.planes.iter_mut().enumerate() {
            let Samples::Canvas(canvas) = samples else { continue };
            let (plane, plane_stride) = av1::plane(picture, number);
            let (left, top) = layout.plane(number, at);
            let (width, height) = layout.plane(number, size);
            let (whole_width, whole_height) = layout.plane(number, self.size);
            let width = width.min(whole_width.saturating_sub(left)) as usize * sample;
            let height = height.min(whole_height.saturating_sub(top));
            for row in 0..height as usize {
                let to = (top as usize + row) * *stride + left as usize * sample;
                let from = row * plane_stride;
                canvas[to..to + width].copy_from_slice(&plane[from..from + width]);
            }
        }
    }

    fn planes(&self) -> Vec<Plane<'_>> {
        let planes = self.planes.iter().enumerate();
        let planes = planes.map(|(number, (samples, stride))| Plane {
            bytes: match samples {
                Samples::Decoder(plane) => plane,
                Samples::Canvas(canvas) => canvas,
            },
            stride: *stride,
            size: self.header.layout.plane(number, self.size),
            sample: self.header.sample(),
        });
        planes.collect()
    }
}

/// Divides colours by alpha, by which they were multiplied.
fn divide(row: &mut [u16], alpha: &[u8]) {
    let (pixels, _) = row.as_chunks_mut::<3>();
    for (pixel, alpha) in pixels.iter_mut().zip(alpha) {
        let alpha = u32::from(*alpha);
        for value in pixel {
            let divided = (u32::from(*value) * 255 + alpha / 2).checked_div(alpha).unwrap_or(0);
            *value = u16::try_from(divided).unwrap_or(u16::MAX);
        }
    }
}

fn broken(text: &str) -> PictureError {
    PictureError::Broken(format!("AVIF: {text}"))
}

#[cfg(test)]
mod tests {
    use image::metadata::Orientation;

    use super::*;

    const LIMITS: RenderLimits = RenderLimits { pixels: 1_000_000, deadline: None };

    fn case(name: &str) -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
        std::fs::read(format!("{folder}/{name}.avif")).unwrap()
    }

    fn pixel(name: &str, x: u32, y: u32) -> [u8; 4] {
        decode(&case(name), LIMITS).unwrap().to_rgba8().get_pixel(x, y).0
    }

    #[test]
    fn each_kind_shows_the_same_picture() {
        for name in [
            "avif-420",
            "avif-422-10-bits",
            "avif-444-12-bits-limited",
            "avif-identity-matrix",
            "avif-ycgco",
            "avif-camera-curve",
            "avif-sequence",
            "avif-exif-orientation-is-ignored",
        ] {
            let shown = pixel(name, 16, 16);
            let is_near =
                shown.iter().zip([250, 120, 20, 255]).all(|(it, other)| it.abs_diff(other) < 4);
            assert!(is_near, "{name}: {shown:?}");
        }
        assert_eq!(pixel("avif-grey", 14, 9), [147, 147, 147, 255]);
    }

    #[test]
    fn alpha_is_shown_and_colours_are_divided_by_it() {
        for name in ["avif-alpha", "avif-alpha-premultiplied"] {
            let shown = pixel(name, 8, 22);
            let is_near =
                shown.iter().zip([250, 120, 20, 121]).all(|(it, other)| it.abs_diff(other) < 4);
            assert!(is_near, "{name}: {shown:?}");
        }
        let mut row = [0, 100, 65535, 10_000, 20_000, 30_000];
        divide(&mut row, &[0, 51]);
        assert_eq!(row, [0, 0, 0, 50_000, 65_535, 65_535]);
    }

    #[test]
    fn a_picture_is_measured_by_its_properties() {
        for (name, size, orientation) in [
            ("avif-rotated", (64, 48), Orientation::Rotate90),
            ("avif-rotated-then-mirrored", (64, 48), Orientation::Rotate90FlipH),
            ("avif-clap", (40, 30), Orientation::NoTransforms),
            ("avif-grid", (128, 128), Orientation::NoTransforms),
        ] {
            let measured = measure(&case(name), LIMITS).unwrap();
            assert_eq!((measured.size, measured.orientation), (size, orientation), "{name}");
            let decoded = decode(&case(name), LIMITS).unwrap();
            assert_eq!((decoded.width(), decoded.height()), size, "{name}");
        }
        let small = RenderLimits { pixels: 3_071, deadline: None };
        let refused = decode(&case("avif-420"), small);
        assert!(matches!(refused, Err(PictureError::TooManyPixels { .. })), "{refused:?}");
    }

    #[test]
    fn a_picture_that_would_be_shown_wrongly_is_refused() {
        for name in ["avif-pq", "avif-clap-off-origin"] {
            let refused = decode(&case(name), LIMITS);
            assert!(matches!(refused, Err(PictureError::Unsupported(_))), "{name}: {refused:?}");
        }
    }

    #[test]
    fn metadata_are_told_from_pictures() {
        assert_eq!(has_metadata(&case("avif-alpha")), Some(false));
        assert_eq!(has_metadata(&case("avif-exif-orientation-is-ignored")), Some(true));
        assert_eq!(has_metadata(&case("avif-sequence")), Some(true));
        assert!(is_animated(&case("avif-sequence")) && !is_animated(&case("avif-grid")));
    }

    #[test]
    fn a_broken_file_is_measured_without_a_panic() {
        for name in ["avif-alpha", "avif-grid", "avif-sequence", "avif-icc-table"] {
            let whole = case(name);
            for length in 0..whole.len().min(600) {
                _ = measure(&whole[..length], LIMITS);
            }
            for at in 0..whole.len().min(600) {
                for value in [0, 0x7f, 0xff] {
                    let mut bytes = whole.clone();
                    bytes[at] = value;
                    _ = measure(&bytes, LIMITS);
                }
            }
        }
    }
}
