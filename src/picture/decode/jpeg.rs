//! Decodes JPEG.
//!
//! The decoder is jpeg-decoder: its pixels are those of libjpeg-turbo, and so those of browsers, with all samplings and scans.
//! It takes the last EXIF segment and the components' names before the Adobe segment, so the head is read here. It keeps
//! whole planes, so large pictures of the usual kinds go to zune-jpeg, the decoder of `image`, which keeps a few rows. That one
//! errs by up to 20 in the last columns of subsampled colours, and by more in other kinds (zune-image#419 and its like).

use std::io::BufReader;

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, RgbImage};
use jpeg_decoder::{ColorTransform, Decoder};

use super::super::{PictureError, RenderLimits};
use super::deadline::DeadlineReader;
use super::{Measure, broken, check_pixels, colours, exif, large_jpeg, pixels};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    let head = Head::read(bytes)?;
    check_pixels(head.size, limits)?;
    let orientation = head.exif.map_or(Orientation::NoTransforms, exif::orientation);
    Ok(Measure::new(head.size, orientation, false, head.beside(), bytes))
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let head = Head::read(bytes)?;
    if head.is_large_and_usual() {
        return large_jpeg::decode(bytes, limits);
    }
    head.check_upsampling()?;
    let decoded = head.decode(bytes, head.colours(), limits)?;
    let (width, height) = head.size;
    let profile = head.profile();
    let is_cmyk = head.components.len() == 4;
    let picture = match head.components.len() {
        1 => GrayImage::from_raw(width, height, decoded)
            .map(|grey| DynamicImage::ImageLuma8(grey).into_rgb8()),
        4 => RgbImage::from_raw(width, height, colours::cmyk_to_rgb(&decoded, profile.as_deref())),
        _ => RgbImage::from_raw(width, height, decoded),
    };
    let picture = picture.ok_or_else(|| broken_off("the decoder left pixels out"))?;
    let mut picture = DynamicImage::ImageRgb8(picture);
    if let Some(profile) = profile.filter(|_| !is_cmyk) {
        colours::to_srgb(&mut picture, &profile)?;
    }
    Ok(picture)
}

/// Decodes a JPEG inside of a TIFF, of at most some size: its size, and its samples. Three samples a pixel are red, green and
/// blue, converted if they were of YCbCr. Inks are inverted.
pub(super) fn decode_chunk(
    bytes: &[u8],
    most: (u32, u32),
    is_ycbcr: bool,
    limits: RenderLimits,
) -> Result<((u32, u32), Vec<u8>), PictureError> {
    let head = Head::read(bytes)?;
    if head.size.0 > most.0 || head.size.1 > most.1 {
        return Err(refused("a JPEG must have the size of its strip or tile"));
    }
    head.check_upsampling()?;
    let colours = match head.components.len() {
        1 => ColorTransform::Grayscale,
        3 if is_ycbcr => ColorTransform::YCbCr,
        3 => ColorTransform::RGB,
        _ => ColorTransform::CMYK,
    };
    let decoded = head.decode(bytes, colours, limits)?;
    Ok((head.size, decoded))
}

fn refused(reason: &str) -> PictureError {
    PictureError::Unsupported(reason.to_owned())
}

fn broken_off(reason: &str) -> PictureError {
    PictureError::Broken(reason.to_owned())
}

/// A component of the frame: its name, and its samples in each direction for each block of the coarsest.
#[derive(Debug, Clone, Copy)]
struct Component {
    id: u8,
    across: u8,
    down: u8,
}

/// The part of a JPEG before its first scan.
#[derive(Debug)]
struct Head<'a> {
    size: (u32, u32),
    is_progressive: bool,
    /// False if the first scan has less than all components.
    is_interleaved: bool,
    components: Vec<Component>,
    is_jfif: bool,
    /// The colour transform that an Adobe segment names.
    adobe: Option<u8>,
    exif: Option<&'a [u8]>,
    /// Chunks of the colour profile, each with its number and their count.
    profile: Vec<(u8, u8, &'a [u8])>,
}

impl<'a> Head<'a> {
    /// Reads the head, and refuses the processes and the samplings that would not be decoded to the right pixels.
    fn read(bytes: &'a [u8]) -> Result<Head<'a>, PictureError> {
        let mut head = Head {
            size: (0, 0),
            is_progressive: false,
            is_interleaved: false,
            components: Vec::new(),
            is_jfif: false,
            adobe: None,
            exif: None,
            profile: Vec::new(),
        };
        let mut rest = bytes.get(2..).unwrap_or_default();
        while let Some((marker, segment, after)) = next_segment(rest) {
            rest = after;
            match marker {
                // Baseline, extended sequential and progressive (ITU-T T.81, table B.1).
                0xc0..=0xc2 => head.read_frame(marker, segment)?,
                0xc3 | 0xc5..=0xc7 | 0xc9..=0xcf if marker != 0xcc => {
                    return Err(refused(
                        "a lossless, arithmetic or hierarchical JPEG isn't decoded",
                    ));
                }
                0xda => return head.check_scan(segment),
                0xe0 if segment.starts_with(b"JFIF\0") => head.is_jfif = true,
                // The first counts in browsers.
                0xe1 if segment.starts_with(b"Exif\0") && exif::has_content(segment) => {
                    head.exif = head.exif.or(Some(segment));
                }
                0xe2 => {
                    let chunk = segment.strip_prefix(b"ICC_PROFILE\0");
                    if let Some([number, count, chunk @ ..]) = chunk {
                        head.profile.push((*number, *count, chunk));
                    }
                }
                0xee if segment.starts_with(b"Adobe") => head.adobe = segment.get(11).copied(),
                _ => {}
            }
        }
        Err(broken_off("the JPEG ends before its first scan"))
    }

    /// Decodes the samples, and converts them from some colours.
    fn decode(
        &self,
        bytes: &[u8],
        colours: ColorTransform,
        limits: RenderLimits,
    ) -> Result<Vec<u8>, PictureError> {
        /// Bytes between two looks at the time. The decoder reads byte by byte. In a progressive JPEG a few bytes may stand for many
        /// thousands of blocks.
        const PIECE: usize = 4096;
        let reader = BufReader::with_capacity(PIECE, DeadlineReader::new(bytes, limits));
        let mut decoder = Decoder::new(reader);
        decoder.set_color_transform(colours);
        decoder.set_max_decoding_buffer_size(usize::try_from(4 * pixels(self.size)).unwrap_or(0));
        decoder.decode().map_err(|error| match error {
            jpeg_decoder::Error::Unsupported(kind) => refused(&format!("{kind:?}")),
            // Browsers go on without them.
            jpeg_decoder::Error::Format(text) if text.contains("RST") => refused(&text),
            error => broken(&error, limits),
        })
    }

    /// Reads a frame header (ITU-T T.81, B.2.2).
    fn read_frame(&mut self, marker: u8, segment: &[u8]) -> Result<(), PictureError> {
        let [8, h1, h0, w1, w0, count, components @ ..] = segment else {
            return Err(refused("a JPEG must have 8 bits a channel"));
        };
        let side = |high, low| u32::from(u16::from_be_bytes([high, low]));
        self.size = (side(*w1, *w0), side(*h1, *h0));
        self.is_progressive = marker == 0xc2;
        let (components, _) = components.as_chunks::<3>();
        let components = components.iter().take(usize::from(*count));
        self.components = components
            .map(|[id, factors, _]| Component { id: *id, across: factors >> 4, down: factors & 15 })
            .collect();
        let is_valid = |it: &Component| (1..=4).contains(&it.across) && (1..=4).contains(&it.down);
        if !matches!(self.components.len(), 1 | 3 | 4) || !self.components.iter().all(is_valid) {
            return Err(refused("a JPEG must have 1, 3 or 4 components of valid samplings"));
        }
        Ok(())
    }

    /// Refuses a JPEG whose scans the decoder reads wrongly. In scans of one component it takes the number of blocks from the
    /// whole picture, which is right only for components with the most samples and with one (ITU-T T.81, A.2.2).
    fn check_scan(mut self, segment: &[u8]) -> Result<Head<'a>, PictureError> {
        if self.components.is_empty() {
            return Err(broken_off("a JPEG must have a frame before its first scan"));
        }
        let all = self.components.len();
        self.is_interleaved = segment.first().is_some_and(|count| usize::from(*count) == all);
        let (across, down) = self.most_samples();
        let is_between = |it: &Component| {
            (it.across > 1 && it.across < across) || (it.down > 1 && it.down < down)
        };
        let has_own_scans = self.is_progressive || !self.is_interleaved;
        if has_own_scans && self.components.iter().any(is_between) {
            return Err(refused("a JPEG of three resolutions in several scans isn't decoded"));
        }
        Ok(self)
    }

    /// True for a picture that zune-jpeg decodes well, and in much less memory.
    fn is_large_and_usual(&self) -> bool {
        /// Pixels that take up to 72 MB in the other decoder.
        const LARGE: u64 = 4_000_000;
        let are_usual = match &self.components[..] {
            [_] => true,
            [first, others @ ..] => {
                let is_one = |it: &Component| it.across == 1 && it.down == 1;
                matches!(self.colours(), ColorTransform::YCbCr)
                    && first.across <= 2
                    && first.down <= 2
                    && others.iter().all(is_one)
            }
            [] => false,
        };
        are_usual && self.is_interleaved && pixels(self.size) > LARGE
    }

    /// Refuses the few sizes at which the decoder interpolates samples and libjpeg repeats them (`jinit_upsampler`): pictures of
    /// up to four columns, and of one row or column.
    fn check_upsampling(&self) -> Result<(), PictureError> {
        let (width, height) = self.size;
        let (across, down) = self.most_samples();
        let differs = |it: &Component| {
            let samples =
                |side: u32, of: u8, most: u8| (side * u32::from(of)).div_ceil(most.into());
            let is_one = samples(width, it.across, across) * samples(height, it.down, down) == 1;
            let is_narrow = width <= 4 && it.across * 2 == across;
            let is_coarse = it.across * 2 < across || it.down * 2 < down;
            !is_one && (is_narrow || is_coarse && (width == 1 || height == 1))
        };
        if self.components.iter().any(differs) {
            return Err(refused("a JPEG of so few pixels must have all samples of its colours"));
        }
        Ok(())
    }

    fn most_samples(&self) -> (u8, u8) {
        let most = |of: fn(&Component) -> u8| self.components.iter().map(of).max().unwrap_or(1);
        (most(|it| it.across), most(|it| it.down))
    }

    /// The colours of the components, as libjpeg tells them (`default_decompress_parms`).
    fn colours(&self) -> ColorTransform {
        match (&self.components[..], self.adobe) {
            ([_], _) => ColorTransform::Grayscale,
            ([_, _, _, _], Some(0) | None) => ColorTransform::CMYK,
            ([_, _, _, _], Some(_)) => ColorTransform::YCCK,
            (_, Some(0)) if !self.is_jfif => ColorTransform::RGB,
            (components, None)
                if !self.is_jfif && components.iter().map(|it| it.id).eq(*b"RGB") =>
            {
                ColorTransform::RGB
            }
            (_, _) => ColorTransform::YCbCr,
        }
    }

    /// The bytes that the decoder keeps beside the picture: a plane of samples for each component, and their coefficients. Those
    /// of a baseline JPEG queue up for the threads that transform them.
    fn beside(&self) -> u64 {
        if self.is_large_and_usual() {
            let converted = u64::from(self.components.len() == 1);
            let coefficients = if self.is_progressive { 6 } else { 0 };
            return (converted + coefficients) * pixels(self.size);
        }
        let (across, down) = self.most_samples();
        let blocks = |side: u32, most: u8| u64::from(side.div_ceil(8 * u32::from(most)));
        let groups = blocks(self.size.0, across) * blocks(self.size.1, down);
        let samples = |it: &Component| 64 * groups * u64::from(it.across) * u64::from(it.down);
        let samples: u64 = self.components.iter().map(samples).sum();
        let product = if self.components.len() == 3 { 0 } else { 4 * pixels(self.size) };
        let coefficients = if self.is_progressive { 4 * samples } else { 2 * samples };
        samples + coefficients + product
    }

    /// The colour profile, if all its chunks are there (ICC.1, annex B.4).
    fn profile(&self) -> Option<Vec<u8>> {
        let mut chunks = self.profile.clone();
        chunks.sort_by_key(|(number, ..)| *number);
        let count = u8::try_from(chunks.len()).ok().filter(|count| *count > 0)?;
        let is_whole = (1..=count).eq(chunks.iter().map(|(number, ..)| *number))
            && chunks.iter().all(|(_, of, _)| *of == count);
        is_whole.then(|| chunks.iter().flat_map(|(.., chunk)| *chunk).copied().collect())
    }
}

/// The next marker that has a segment, its segment, and the bytes after it. Bytes before a marker are passed over, as
/// libjpeg does.
fn next_segment(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let mut at = 0;
    loop {
        // A marker (ITU-T T.81, B.1.1.2) is 0xff, perhaps repeated, and its code.
        at += bytes.get(at..)?.iter().position(|byte| *byte == 0xff)?;
        at += bytes.get(at..)?.iter().position(|byte| *byte != 0xff)?;
        match bytes.get(at)? {
            // No marker, a restart, the start, and TEM: these have no segment.
            0 | 1 | 0xd0..=0xd8 => {}
            0xd9 => return None,
            marker => {
                let length = usize::from(u16::from_be_bytes(*bytes.get(at + 1..)?.first_chunk()?));
                let segment = bytes.get(at + 3..at + 1 + length)?;
                return Some((*marker, segment, &bytes[at + 1 + length..]));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    const LIMITS: RenderLimits = RenderLimits { pixels: 10_000, deadline: None };

    fn decoded(bytes: &[u8]) -> Result<DynamicImage, PictureError> {
        decode(bytes, MediaType::Jpeg, LIMITS)
    }

    fn encoded(size: (u16, u16), setup: impl FnOnce(&mut Encoder<&mut Vec<u8>>)) -> Vec<u8> {
        let values = usize::from(size.0) * usize::from(size.1) * 3;
        let pixels: Vec<u8> = (0..values).map(|it| u8::try_from(it % 251).unwrap()).collect();
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, 90);
        setup(&mut encoder);
        encoder.encode(&pixels, size.0, size.1, ColorType::Rgb).unwrap();
        bytes
    }

    fn rgb(setup: impl FnOnce(&mut Encoder<&mut Vec<u8>>)) -> Vec<u8> {
        encoded((48, 33), setup)
    }

    /// A JPEG with segments put in after its start.
    fn with_segments(bytes: &[u8], segments: &[(u8, &[u8])]) -> Vec<u8> {
        let mut with = bytes[..2].to_vec();
        for (marker, segment) in segments {
            with.extend([0xff, *marker]);
            with.extend(u16::try_from(segment.len() + 2).unwrap().to_be_bytes());
            with.extend(*segment);
        }
        with.extend(&bytes[2..]);
        with
    }

    /// The offset of the frame header behind its length.
    fn frame(bytes: &[u8]) -> usize {
        let marker = |it: &[u8]| it[0] == 0xff && (0xc0..=0xc2).contains(&it[1]);
        bytes.windows(2).position(marker).unwrap() + 4
    }

    #[test]
    fn a_scan_for_each_component_makes_the_same_picture() {
        for sampling in [
            SamplingFactor::F_1_1,
            SamplingFactor::F_2_1,
            SamplingFactor::F_1_2,
            SamplingFactor::F_2_2,
            SamplingFactor::F_4_1,
            SamplingFactor::F_4_2,
        ] {
            let picture = |in_scans, progressive| {
                let bytes = rgb(|encoder| {
                    encoder.set_sampling_factor(sampling);
                    encoder.set_optimized_huffman_tables(in_scans);
                    encoder.set_progressive(progressive);
                });
                decoded(&bytes).unwrap()
            };
            let interleaved = picture(false, false);
            assert_eq!(picture(true, false), interleaved, "{sampling:?}");
            assert_eq!(picture(true, true), interleaved, "{sampling:?}");
        }
    }

    #[test]
    fn scans_that_the_decoder_reads_wrongly_are_refused() {
        for (in_scans, expected) in [(false, true), (true, false)] {
            let mut bytes = rgb(|encoder| {
                encoder.set_sampling_factor(SamplingFactor::F_2_2);
                encoder.set_optimized_huffman_tables(in_scans);
            });
            let components = frame(&bytes) + 6;
            bytes[components + 1] = 0x42;
            bytes[components + 4] = 0x21;
            assert_eq!(Head::read(&bytes).is_ok(), expected, "{in_scans}");
        }
    }

    #[test]
    fn processes_that_are_not_decoded_are_refused() {
        let plain = rgb(|_| {});
        let at = frame(&plain);
        // 12 bits; lossless; arithmetic; two components; no rows, which a later segment may give.
        let changes: [&[(usize, u8)]; 5] = [
            &[(at, 12)],
            &[(at - 3, 0xc3)],
            &[(at - 3, 0xc9)],
            &[(at + 5, 2)],
            &[(at + 1, 0), (at + 2, 0)],
        ];
        for changes in changes {
            let mut bytes = plain.clone();
            for (at, byte) in changes {
                bytes[*at] = *byte;
            }
            let error = decoded(&bytes).unwrap_err();
            assert!(matches!(error, PictureError::Unsupported(_)), "{error}");
        }
        for length in (0..plain.len()).step_by(7) {
            assert!(decoded(&plain[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn the_first_exif_segment_counts() {
        let plain = rgb(|_| {});
        let exif = |orientation| {
            let head = b"Exif\0\0II\x2a\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0";
            [head, &[orientation, 0, 0, 0][..]].concat()
        };
        let (turned, upright, empty) = (exif(6), exif(1), b"Exif\0\0");
        for (segments, expected) in [
            (&[&turned[..], &upright][..], (33, 48)),
            (&[&upright, &turned], (48, 33)),
            (&[empty, &turned], (33, 48)),
            (&[b"http://ns.adobe.com/xap/1.0/\0", &turned], (33, 48)),
        ] {
            let segments: Vec<_> = segments.iter().map(|segment| (0xe1, *segment)).collect();
            let bytes = with_segments(&plain, &segments);
            let size = measure(&bytes, LIMITS).unwrap().upright();
            assert_eq!(size, expected, "{segments:?}");
            let picture = decoded(&bytes).unwrap();
            assert_eq!((picture.width(), picture.height()), expected);
        }
    }

    #[test]
    fn a_profile_is_put_together_by_the_numbers_of_its_chunks() {
        let plain = rgb(|_| {});
        for (chunks, expected) in [
            (&[&b"\x01\x01ab"[..]][..], Some(&b"ab"[..])),
            (&[b"\x02\x02cd", b"\x01\x02ab"], Some(b"abcd")),
            (&[b"\x02\x02cd"], None),
            (&[b"\x01\x02ab", b"\x01\x02ab"], None),
            (&[b"\x00\x01ab"], None),
            (&[], None),
        ] {
            let chunks: Vec<_> =
                chunks.iter().map(|chunk| [b"ICC_PROFILE\0", *chunk].concat()).collect();
            let segments: Vec<_> = chunks.iter().map(|chunk| (0xe2, &chunk[..])).collect();
            let bytes = with_segments(&plain, &segments);
            assert_eq!(Head::read(&bytes).unwrap().profile().as_deref(), expected, "{chunks:?}");
        }
    }

    #[test]
    fn colours_are_told_as_libjpeg_tells_them() {
        let plain = rgb(|_| {});
        let mut bare = plain.clone();
        // Without the JFIF segment.
        bare.drain(2..4 + usize::from(u16::from_be_bytes([plain[4], plain[5]])));
        let adobe = |transform| [b"Adobe\0\x64\0\0\0\0", &[transform][..]].concat();
        let named = |ids: &[u8; 3]| {
            let mut bytes = bare.clone();
            let at = frame(&bytes);
            for (nth, id) in ids.iter().enumerate() {
                bytes[at + 6 + 3 * nth] = *id;
            }
            bytes
        };
        for (bytes, adobe, expected) in [
            (&plain, None, ColorTransform::YCbCr),
            (&plain, Some(adobe(0)), ColorTransform::YCbCr),
            (&bare, Some(adobe(0)), ColorTransform::RGB),
            (&bare, Some(adobe(1)), ColorTransform::YCbCr),
            (&named(b"RGB"), None, ColorTransform::RGB),
            (&named(b"RGB"), Some(adobe(1)), ColorTransform::YCbCr),
            (&named(&[1, 2, 3]), Some(adobe(0)), ColorTransform::RGB),
            (&named(&[0, 1, 2]), None, ColorTransform::YCbCr),
        ] {
            let segments: Vec<_> = adobe.iter().map(|adobe| (0xee, &adobe[..])).collect();
            let bytes = with_segments(bytes, &segments);
            assert_eq!(Head::read(&bytes).unwrap().colours(), expected, "{segments:?}");
        }
    }

    #[test]
    fn sizes_at_which_samples_are_repeated_are_refused() {
        let shown = |size, sampling| {
            let setup = |encoder: &mut Encoder<&mut Vec<u8>>| encoder.set_sampling_factor(sampling);
            decoded(&encoded(size, setup)).is_ok()
        };
        for (size, sampling, expected) in [
            ((1, 1), SamplingFactor::F_2_2, true),
            ((2, 2), SamplingFactor::F_2_2, true),
            ((3, 1), SamplingFactor::F_2_1, false),
            ((4, 4), SamplingFactor::F_2_2, false),
            ((5, 4), SamplingFactor::F_2_2, true),
            ((4, 4), SamplingFactor::F_1_1, true),
            ((4, 4), SamplingFactor::F_1_2, true),
            ((1, 9), SamplingFactor::F_4_2, false),
        ] {
            assert_eq!(shown(size, sampling), expected, "{size:?} {sampling:?}");
        }
    }
}
