//! Decodes JPEG XL, or its first frame, by jxl-rs, which Chromium uses, too.

mod head;

use std::io::{self, IoSliceMut, Read};

use image::metadata::Orientation;
use image::{DynamicImage, RgbImage, RgbaImage};
use jxl::api::{
    AlphaMode, Endianness, Event, ExtraChannel, JxlBasicInfo, JxlBitDepth, JxlBitstreamInput,
    JxlColorEncoding, JxlColorProfile, JxlColorType, JxlDataFormat, JxlDecoder, JxlDecoderOptions,
    JxlOutputBuffer, JxlPixelFormat, JxlPrimaries, JxlTransferFunction, JxlWhitePoint,
    ProfileLevel,
};
use moxcms::{ColorProfile, DataColorSpace};

use self::head::Head;
use super::super::{PictureError, RenderLimits};
use super::colours::{Colours, narrow};
use super::deadline::DeadlineReader;
use super::{Measure, broken, check_pixels, colours, unsupported};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    let Head { size, extra_channels, .. } = Head::read(bytes).ok_or_else(cut_off)?;
    check_pixels(size, limits)?;
    check_channels(extra_channels)?;
    let pixels = super::pixels(size);
    // Numbers of four bytes, of the picture and of a frame that it refers to; the picture in 16 bits; some groups.
    let planes = 2 * (3 + u64::from(extra_channels)) * pixels * 4;
    let beside = planes + 8 * pixels + GROUPS + 2 * bytes.len() as u64;
    // The first further channel is alpha, mostly.
    Ok(Measure::new(size, Orientation::NoTransforms, extra_channels > 0, beside, bytes))
}

/// Refuses channels that nobody sees, and that take memory.
fn check_channels(extra: u32) -> Result<(), PictureError> {
    if extra > 4 {
        return Err(unsupported("JPEG XL with many channels"));
    }
    Ok(())
}

/// Bytes of the groups that are decoded at a time, and of tables.
const GROUPS: u64 = 32 << 20;

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let mut source = Source::open(bytes, limits)?;
    let profile = source.profile()?;
    let transform = profile.and_then(|profile| colours::deep_transform(&profile, 3));
    let (width, height) = source.size;
    let channels = source.kind().samples_per_pixel();
    let stride = width as usize * channels * 2;
    let pixels = source.decode_pixels(stride, limits)?;
    let mut shown = Vec::with_capacity(width as usize * height as usize * source.channels());
    let (mut row, mut alpha, mut converted) = (Vec::new(), Vec::new(), Vec::new());
    for samples in pixels.chunks_exact(stride) {
        limits.check_time()?;
        row.clear();
        alpha.clear();
        let (samples, _) = samples.as_chunks::<2>();
        for pixel in samples.chunks_exact(channels) {
            let value = |at: usize| u16::from_ne_bytes(pixel[at]);
            match channels {
                1 | 2 => row.extend([value(0); 3]),
                _ => row.extend([value(0), value(1), value(2)]),
            }
            if source.has_alpha {
                alpha.push(narrow(value(channels - 1)));
            }
        }
        let mut row = &row[..];
        if let Some(transform) = &transform {
            converted.resize(row.len(), 0);
            if transform.transform(row, &mut converted).is_ok() {
                row = &converted;
            }
        }
        if alpha.is_empty() {
            shown.extend(row.iter().map(|it| narrow(*it)));
            continue;
        }
        let (colours, _) = row.as_chunks::<3>();
        for ([r, g, b], alpha) in colours.iter().zip(&alpha) {
            shown.extend([narrow(*r), narrow(*g), narrow(*b), *alpha]);
        }
    }
    let picture = if source.has_alpha {
        RgbaImage::from_raw(width, height, shown).map(DynamicImage::ImageRgba8)
    } else {
        RgbImage::from_raw(width, height, shown).map(DynamicImage::ImageRgb8)
    };
    Ok(picture.expect("each row has its pixels"))
}

/// True if a JPEG XL has boxes beside its pixels: EXIF, XMP, or what a JPEG had. `None` if its structure can't be read.
pub(in super::super) fn has_metadata(bytes: &[u8]) -> Option<bool> {
    const PIXELS: [&[u8; 4]; 6] = [b"JXL ", b"ftyp", b"jxlc", b"jxlp", b"jxll", b"jxli"];
    if bytes.starts_with(b"\xff\x0a") {
        return Some(false);
    }
    for found in boxes(bytes) {
        let (kind, _) = found?;
        if !PIXELS.contains(&kind) {
            return Some(true);
        }
    }
    Some(false)
}

/// The boxes of a container with their kinds; `None` for one that can't be read, which ends them.
fn boxes(bytes: &[u8]) -> impl Iterator<Item = Option<(&[u8; 4], &[u8])>> {
    let mut rest = Some(bytes);
    std::iter::from_fn(move || {
        let bytes = rest.take().filter(|bytes| !bytes.is_empty())?;
        let found = first_box(bytes);
        if let Some((_, _, behind)) = found {
            rest = Some(behind);
        }
        Some(found.map(|(kind, content, _)| (kind, content)))
    })
}

/// The kind of the first box, its content, and what is behind it.
fn first_box(bytes: &[u8]) -> Option<(&[u8; 4], &[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let kind = rest.first_chunk::<4>()?;
    let (head, length) = match u32::from_be_bytes(*length) {
        0 => (8, bytes.len()),
        1 => (16, usize::try_from(u64::from_be_bytes(*bytes.get(8..)?.first_chunk()?)).ok()?),
        length => (8, length as usize),
    };
    Some((kind, bytes.get(head..length)?, bytes.get(length..)?))
}

/// True for a JPEG XL that moves.
pub(super) fn is_animated(bytes: &[u8]) -> bool {
    Head::read(bytes).is_some_and(|head| head.is_animated)
}

/// A decoder that has read the header.
struct Source<'a> {
    decoder: JxlDecoder,
    input: Input<'a>,
    info: JxlBasicInfo,
    size: (u32, u32),
    has_alpha: bool,
}

impl<'a> Source<'a> {
    fn open(bytes: &'a [u8], limits: RenderLimits) -> Result<Source<'a>, PictureError> {
        /// Samples of a frame to which a small picture refers.
        const SMALL: u64 = 1 << 20;
        let mut options = JxlDecoderOptions::default();
        options.alpha_mode = AlphaMode::Unpremultiplied;
        options.max_profile_level = ProfileLevel::Main10;
        options.high_precision = true;
        let most = limits.pixels.saturating_mul(7).max(SMALL);
        options.sample_limit = Some(usize::try_from(most).unwrap_or(usize::MAX));
        let mut decoder = JxlDecoder::new(options);
        let mut input = Input { reader: DeadlineReader::new(bytes, limits), left: bytes.len() };
        match decoder.process(&mut input, None, None).map_err(|error| broken(&error, limits))? {
            Event::BasicInfo => {}
            _ => return Err(cut_off()),
        }
        let info = decoder.basic_info().cloned().ok_or_else(cut_off)?;
        let short = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        let size = (short(info.size.0), short(info.size.1));
        check_pixels(size, limits)?;
        let is = |kind| info.extra_channels.iter().any(|channel| channel.ec_type == kind);
        let is_cmyk = decoder.embedded_color_profile().is_some_and(JxlColorProfile::is_cmyk);
        if is(ExtraChannel::Black) || is_cmyk {
            return Err(unsupported("JPEG XL in inks"));
        }
        if is(ExtraChannel::SpotColor) {
            return Err(unsupported("JPEG XL with spot colours"));
        }
        let has_alpha = is(ExtraChannel::Alpha);
        Ok(Source { decoder, input, info, size, has_alpha })
    }

    /// Channels of the picture that is shown.
    fn channels(&self) -> usize {
        if self.has_alpha { 4 } else { 3 }
    }

    /// The kind of pixels that are decoded.
    fn kind(&self) -> JxlColorType {
        let profile = self.decoder.embedded_color_profile();
        match (profile.is_some_and(|it| it.channels() == 1), self.has_alpha) {
            (true, false) => JxlColorType::Grayscale,
            (true, true) => JxlColorType::GrayscaleAlpha,
            (false, false) => JxlColorType::Rgb,
            (false, true) => JxlColorType::Rgba,
        }
    }

    /// The colours of the pixels that are decoded in 16 bits. `None` for sRGB.
    fn profile(&mut self) -> Result<Option<Box<ColorProfile>>, PictureError> {
        use JxlTransferFunction::{HLG, PQ};
        let said = self.decoder.embedded_color_profile();
        let is_bright = |it: &JxlColorProfile| matches!(it.transfer_function(), Some(PQ | HLG));
        let is_float = matches!(self.info.bit_depth, JxlBitDepth::Float { .. });
        if said.is_some_and(is_bright)
            || (is_float && self.info.tone_mapping.intensity_target > 255.0)
        {
            return Err(colours::refused());
        }
        let format = JxlDataFormat::U16 { endianness: Endianness::native(), bit_depth: 16 };
        let wanted = JxlPixelFormat {
            color_type: self.kind(),
            color_data_format: Some(format),
            extra_channel_format: vec![None; self.info.extra_channels.len()],
        };
        self.decoder.set_pixel_format(wanted).map_err(|error| unsupported(&error.to_string()))?;
        let unknown = || unsupported("JPEG XL in unknown colours");
        let profile = self.decoder.output_color_profile().ok_or_else(unknown)?;
        if is_srgb(profile) {
            return Ok(None);
        }
        let icc = profile.try_as_icc().ok_or_else(unknown)?;
        let is_grey = profile.channels() == 1;
        match Colours::of_profile(&icc).ok_or_else(unknown)? {
            Colours::Refused => Err(colours::refused()),
            Colours::Known(profile) => match profile.color_space {
                DataColorSpace::Gray if is_grey => Ok(Some(profile)),
                DataColorSpace::Rgb if !is_grey => Ok(Some(profile)),
                _ => Err(unknown()),
            },
        }
    }

    /// Decodes the first frame. Rows have samples of 16 bits in the order of this machine.
    fn decode_pixels(
        &mut self,
        stride: usize,
        limits: RenderLimits,
    ) -> Result<Vec<u8>, PictureError> {
        let height = self.size.1 as usize;
        // The decoder writes at even addresses.
        let mut bytes = vec![0; stride * height + 1];
        let start = bytes.as_ptr().align_offset(2).min(1);
        let mut buffers = [JxlOutputBuffer::new_with_stride(
            &mut bytes[start..start + stride * height],
            height,
            stride,
            stride,
        )];
        loop {
            limits.check_time()?;
            let event = self.decoder.process(&mut self.input, Some(&mut buffers), None);
            match event.map_err(|error| broken(&error, limits))? {
                Event::FrameComplete { .. } => break,
                Event::BasicInfo | Event::FrameHeader => {}
                Event::NeedMoreInput { .. } | Event::Complete => return Err(cut_off()),
            }
        }
        bytes.drain(..start);
        bytes.truncate(stride * height);
        Ok(bytes)
    }
}

/// True for a profile of sRGB, or of greys with its curve.
fn is_srgb(profile: &JxlColorProfile) -> bool {
    use JxlColorEncoding::{GrayscaleColorSpace, RgbColorSpace};
    match profile {
        JxlColorProfile::Simple(RgbColorSpace {
            white_point,
            primaries,
            transfer_function,
            ..
        }) => {
            *white_point == JxlWhitePoint::D65
                && *primaries == JxlPrimaries::SRGB
                && *transfer_function == JxlTransferFunction::SRGB
        }
        JxlColorProfile::Simple(GrayscaleColorSpace { transfer_function, .. }) => {
            *transfer_function == JxlTransferFunction::SRGB
        }
        _ => false,
    }
}

/// Bytes that are read before a deadline.
struct Input<'a> {
    reader: DeadlineReader<'a>,
    left: usize,
}

impl JxlBitstreamInput for Input<'_> {
    fn available_bytes(&mut self) -> io::Result<usize> {
        Ok(self.left)
    }

    fn read(&mut self, buffers: &mut [IoSliceMut]) -> io::Result<usize> {
        let mut count = 0;
        for buffer in buffers {
            let read = self.reader.read(buffer)?;
            self.left -= read;
            count += read;
            if read < buffer.len() {
                break;
            }
        }
        Ok(count)
    }
}

fn cut_off() -> PictureError {
    PictureError::Broken("the JPEG XL is cut off".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RenderLimits = RenderLimits { pixels: 1_000_000, deadline: None };

    fn case(name: &str) -> Vec<u8> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
        std::fs::read(format!("{folder}/{name}.jxl")).unwrap()
    }

    #[test]
    fn each_kind_shows_the_same_picture() {
        for (name, at, expected) in [
            ("jxl-lossless", (15, 8), [250, 120, 20, 255]),
            ("jxl-lossy", (11, 19), [250, 120, 11, 255]),
            ("jxl-container", (11, 19), [250, 120, 11, 255]),
            ("jxl-of-jpeg", (13, 17), [250, 119, 21, 255]),
            ("jxl-of-turned-jpeg", (20, 12), [249, 119, 20, 255]),
            ("jxl-alpha", (2, 22), [10, 168, 25, 87]),
            ("jxl-display-p3", (64, 38), [255, 110, 0, 255]),
            ("jxl-grey", (64, 38), [147, 147, 147, 255]),
        ] {
            let picture = decode(&case(name), LIMITS).unwrap();
            let measured = measure(&case(name), LIMITS).unwrap();
            assert_eq!(measured.size, (picture.width(), picture.height()), "{name}");
            let shown = picture.to_rgba8().get_pixel(at.0, at.1).0;
            let is_near = shown.iter().zip(expected).all(|(it, other)| it.abs_diff(other) < 4);
            assert!(is_near, "{name}: {shown:?}");
        }
    }

    #[test]
    fn what_cannot_be_shown_is_refused() {
        let refused = decode(&case("jxl-pq"), LIMITS);
        assert!(matches!(refused, Err(PictureError::Unsupported(_))), "{refused:?}");
        let small = RenderLimits { pixels: 3_071, deadline: None };
        let refused = measure(&case("jxl-lossy"), small);
        assert!(matches!(refused, Err(PictureError::TooManyPixels { .. })), "{refused:?}");
        let whole = case("jxl-lossy");
        for length in (0..whole.len()).step_by(97) {
            let refused = decode(&whole[..length], LIMITS);
            assert!(matches!(refused, Err(PictureError::Broken(_))), "{length}: {refused:?}");
        }
    }

    #[test]
    fn metadata_are_told_from_pixels() {
        assert_eq!(has_metadata(&case("jxl-lossy")), Some(false));
        assert_eq!(has_metadata(&case("jxl-container")), Some(false));
        assert_eq!(has_metadata(&case("jxl-of-turned-jpeg")), Some(true));
        assert_eq!(has_metadata(&case("jxl-of-jpeg")), Some(true));
    }
}
