//! Decodes WebP, its first frame, or all in turn, by libwebp, which browsers use, too.
//!
//! The container is read here, by the rules of libwebp's `demux.c`, and only the chunks of one picture are given to the decoder: it
//! needs no flags then, allocates nothing for other frames, and its deadline is checked between pieces.

use image::metadata::Orientation;
use image::{DynamicImage, RgbImage, RgbaImage};
use webpx::{ColorMode, DecodeStatus, Limits, StreamingDecoder};

use super::super::{PictureError, RenderLimits};
use super::animation::{Disposal, Outline, Patch};
use super::{Measure, broken, check_pixels, colours, exif, pixels};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    let source = Source::read(bytes)?;
    check_pixels(source.canvas, limits)?;
    let frame = pixels(source.frame.size);
    let planes = match source.frame.coding() {
        // Pixels of four bytes, and the smaller pictures that say how they are predicted and coded.
        Coding::Lossless => 5 * frame,
        // The plane of alpha, and if it is compressed, the same as of a lossless picture.
        Coding::LossyWithAlpha => 6 * frame,
        Coding::Lossy => 0,
    };
    // Some rows, and the decoder's copy of the source while it grows.
    let beside = planes + 256 * u64::from(source.frame.size.0) + 2 * bytes.len() as u64;
    Ok(Measure::new(source.canvas, source.orientation, source.has_alpha, beside, bytes))
}

/// Decodes a picture in pieces of the source. The time is checked between them: a piece of a lossless picture, which may be all of
/// it, can't be interrupted.
pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let source = Source::read(bytes)?;
    check_pixels(source.canvas, limits)?;
    let (width, height) = source.canvas;
    let (mode, channels) =
        if source.has_alpha { (ColorMode::Rgba, 4) } else { (ColorMode::Rgb, 3) };
    let row = width as usize * channels;
    let mut pixels = vec![0; row * height as usize];
    // Around a first frame that is smaller, the canvas stays transparent, whatever its background colour is.
    let (left, top) = source.frame.at;
    let start = row * top as usize + channels * left as usize;
    source.frame.decode(&mut pixels[start..], row, mode, limits)?;
    let picture = if source.has_alpha {
        RgbaImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgba8)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
    };
    let mut picture = picture.expect("each row has its pixels");
    // Browsers ignore a profile of greys here.
    let profile = source.profile.filter(|profile| profile.get(16..20) != Some(b"GRAY"));
    if let Some(profile) = profile {
        colours::to_srgb(&mut picture, profile)?;
    }
    Ok(picture)
}

/// The parts of a file that the first picture is made of.
struct Source<'a> {
    canvas: (u32, u32),
    frame: Frame<'a>,
    has_alpha: bool,
    orientation: Orientation,
    profile: Option<&'a [u8]>,
}

/// A picture on the canvas.
struct Frame<'a> {
    at: (u32, u32),
    size: (u32, u32),
    /// The chunk of alpha, with its header.
    alpha: Option<&'a [u8]>,
    /// The chunk of the picture, with its header.
    image: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Lossy,
    LossyWithAlpha,
    Lossless,
}

impl<'a> Source<'a> {
    fn read(bytes: &'a [u8]) -> Result<Source<'a>, PictureError> {
        // Bytes after the RIFF chunk are ignored.
        let riff = Chunks(bytes).next().ok_or_else(|| reason(CUT_OFF))??;
        let chunks = Chunks(riff.payload.get(4..).unwrap_or_default());
        let first = chunks.clone().next().ok_or_else(|| reason("it has no picture"))??;
        if first.name == *b"VP8X" {
            return Source::extended(first.payload, chunks);
        }
        let frame = Frame::read(chunks, (0, 0))?;
        Ok(Source {
            canvas: frame.size,
            has_alpha: frame.has_own_alpha(),
            frame,
            orientation: Orientation::NoTransforms,
            profile: None,
        })
    }

    /// Reads the extended format (RFC 9649 §2.7).
    fn extended(header: &'a [u8], chunks: Chunks<'a>) -> Result<Source<'a>, PictureError> {
        const ANIMATION: u8 = 0x02;
        const EXIF: u8 = 0x08;
        const ALPHA: u8 = 0x10;
        const PROFILE: u8 = 0x20;
        const RESERVED: u8 = 0xc1;
        let header =
            header.as_array::<10>().ok_or_else(|| reason("its header has no valid size"))?;
        let flags = header[0];
        if flags & RESERVED != 0 {
            return Err(reason("its header has reserved flags"));
        }
        let canvas = (1 + u24_at(header, 4), 1 + u24_at(header, 7));
        let is_animation = flags & ANIMATION != 0;

        // A part is only valid with its flag. All chunks are walked: one that is cut off makes the file invalid.
        let (mut frame, mut exif, mut profile) = (None, None, None);
        let mut rest = chunks;
        rest.next();
        loop {
            let from_here = rest.clone();
            let Some(chunk) = rest.next() else { break };
            let chunk = chunk?;
            match &chunk.name {
                b"VP8X" => return Err(reason("it has two headers")),
                b"ICCP" if flags & PROFILE != 0 => _ = profile.get_or_insert(chunk.payload),
                b"EXIF" if flags & EXIF != 0 => _ = exif.get_or_insert(chunk.payload),
                b"ALPH" | b"VP8 " | b"VP8L" if is_animation || frame.is_some() => {
                    return Err(reason("it has a picture too many"));
                }
                b"ALPH" | b"VP8 " | b"VP8L" => {
                    let still = Frame::read(from_here, (0, 0))?;
                    if still.alpha.is_some() {
                        rest.next();
                    }
                    frame = Some(still);
                }
                b"ANMF" if is_animation && frame.is_none() => {
                    frame = Some(Frame::of_animation(chunk.payload)?);
                }
                _ => {}
            }
        }
        let mut frame = frame.ok_or_else(|| reason("it has no picture"))?;
        let has_alpha = flags & ALPHA != 0;
        if !has_alpha && is_animation && (frame.alpha.is_some() || frame.has_own_alpha()) {
            // Decoders differ: some show it opaque.
            return Err(reason("a frame has alpha, and the header denies it"));
        }
        if !has_alpha {
            frame.alpha = None;
        }
        let fits = |at: u32, length: u32, canvas: u32| {
            if is_animation { at + length <= canvas } else { length == canvas }
        };
        if !fits(frame.at.0, frame.size.0, canvas.0) || !fits(frame.at.1, frame.size.1, canvas.1) {
            return Err(reason("its picture and its canvas differ in size"));
        }
        let exif = exif.map_or(Orientation::NoTransforms, exif::orientation);
        Ok(Source {
            canvas,
            // In a lossless still picture, its own header counts.
            has_alpha: has_alpha || frame.has_own_alpha() || frame.size != canvas,
            frame,
            orientation: exif,
            // Chromium ignores it in animations.
            profile: profile.filter(|_| !is_animation),
        })
    }
}

impl<'a> Frame<'a> {
    /// Reads the picture with which the chunks begin, maybe with alpha before it.
    fn read(mut chunks: Chunks<'a>, at: (u32, u32)) -> Result<Frame<'a>, PictureError> {
        let mut next = || chunks.next().ok_or_else(|| reason("it has no picture"))?;
        let first = next()?;
        let (alpha, image) =
            if first.name == *b"ALPH" { (Some(first.whole), next()?) } else { (None, first) };
        let size = match &image.name {
            b"VP8 " => size_of_lossy(image.payload),
            b"VP8L" if alpha.is_none() => size_of_lossless(image.payload),
            _ => None,
        };
        let size = size.ok_or_else(|| reason("its picture has no valid header"))?;
        Ok(Frame { at, size, alpha, image: image.whole })
    }

    /// Reads a frame of an animation (RFC 9649 §2.7.1.1, `ANMF`).
    fn of_animation(payload: &'a [u8]) -> Result<Frame<'a>, PictureError> {
        let (header, chunks) =
            payload.split_first_chunk::<16>().ok_or_else(|| reason("a frame is too short"))?;
        // The size is that of the picture, whatever the header of the frame says.
        Frame::read(Chunks(chunks), (2 * u24_at(header, 0), 2 * u24_at(header, 3)))
    }

    fn coding(&self) -> Coding {
        match (self.image.starts_with(b"VP8L"), self.alpha) {
            (true, _) => Coding::Lossless,
            (false, Some(_)) => Coding::LossyWithAlpha,
            (false, None) => Coding::Lossy,
        }
    }

    /// True for a lossless picture whose header says that it has alpha (RFC 9649 §3.4).
    fn has_own_alpha(&self) -> bool {
        self.coding() == Coding::Lossless && self.image.get(12).is_some_and(|it| it & 0x10 != 0)
    }

    /// Decodes into rows of a canvas, that begin `row` bytes after each other.
    fn decode(
        &self,
        pixels: &mut [u8],
        row: usize,
        mode: ColorMode,
        limits: RenderLimits,
    ) -> Result<(), PictureError> {
        /// Pieces are at least so large. Each costs a look at what was not enough before it, and a copy of the source.
        const PIECE: usize = 64 * 1024;
        const MOST_PIECES: usize = 16;
        let decoder = StreamingDecoder::with_buffer(pixels, row, mode);
        let mut decoder = decoder.map_err(|error| broken(&error, limits))?.limits(Limits::none());
        let (container, alpha) = (self.container(), self.alpha.unwrap_or_default());
        let piece = PIECE.max((alpha.len() + self.image.len()).div_ceil(MOST_PIECES));
        let padding = if alpha.len() % 2 == 1 { &[0_u8][..] } else { &[] };
        let pieces = [&*container].into_iter().chain(alpha.chunks(piece)).chain([padding]);
        let pieces = pieces.chain(self.image.chunks(piece)).chain([&[0_u8][..]]);
        for piece in pieces.filter(|piece| !piece.is_empty()) {
            limits.check_time()?;
            match decoder.append(piece) {
                Ok(DecodeStatus::Complete) => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(broken(&error, limits)),
            }
        }
        Err(reason("its picture is broken"))
    }

    /// The begin of a file with this picture alone. Alpha needs the extended format.
    fn container(&self) -> Vec<u8> {
        let size = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
        let padded = |chunk: &[u8]| chunk.len().next_multiple_of(2);
        let mut header = Vec::new();
        if self.alpha.is_some() {
            let [width, height] = [self.size.0, self.size.1].map(|side| (side - 1).to_le_bytes());
            header = [b"VP8X", &size(10), &[0x10, 0, 0, 0], &width[..3], &height[..3]].concat();
        }
        let length = 4 + header.len() + padded(self.alpha.unwrap_or_default()) + padded(self.image);
        [b"RIFF", &size(length)[..], b"WEBP", &header].concat()
    }
}

/// A chunk of a RIFF file (RFC 9649 §2.3).
#[derive(Debug, Clone, Copy)]
struct Chunk<'a> {
    name: [u8; 4],
    payload: &'a [u8],
    /// The chunk with its header, and without its padding.
    whole: &'a [u8],
}

/// Describes an animation by the headers of its frames. `None` for a still picture.
pub(super) fn outline(bytes: &[u8]) -> Result<Option<Outline>, PictureError> {
    let source = Source::read(bytes)?;
    let Some(frames) = Frames::of(bytes, &source)? else { return Ok(None) };
    let (canvas, orientation) = (source.canvas, source.orientation);
    let mut outline =
        Outline { canvas, orientation, frames: 0, largest: 0, duration: 0, plays: frames.plays };
    for payload in frames.payloads {
        // No picture fits into fewer bytes: it is refused when it is decoded.
        outline.frames += 1;
        outline.duration += payload.get(12..15).map_or(0, |it| u64::from(u24_at(it, 0)));
    }
    // A frame isn't larger than the canvas. Its decoder takes as much as that of the first one, or of the worst.
    outline.largest = pixels(canvas);
    Ok(Some(outline))
}

/// The frames of an animation, decoded in turn.
pub(super) struct Frames<'a> {
    canvas: (u32, u32),
    has_alpha: bool,
    /// Number of times that they are shown; 0 for without end.
    plays: u16,
    payloads: Payloads<'a>,
}

/// The payloads of `ANMF` chunks.
struct Payloads<'a>(Chunks<'a>);

impl<'a> Iterator for Payloads<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.0.by_ref().map_while(Result::ok).find(|it| it.name == *b"ANMF").map(|it| it.payload)
    }
}

impl<'a> Frames<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Result<Frames<'a>, PictureError> {
        let source = Source::read(bytes)?;
        Frames::of(bytes, &source)?.ok_or_else(|| reason("it is no animation"))
    }

    /// The frames of a source whose chunks are whole.
    fn of(bytes: &'a [u8], source: &Source<'_>) -> Result<Option<Frames<'a>>, PictureError> {
        const ANIMATION: u8 = 0x02;
        const ALPHA: u8 = 0x10;
        let riff = Chunks(bytes).next().ok_or_else(|| reason(CUT_OFF))??;
        let mut chunks = Chunks(riff.payload.get(4..).unwrap_or_default());
        let header = chunks.next().ok_or_else(|| reason("it has no picture"))??;
        let flags = header.payload.first().copied().unwrap_or_default();
        if header.name != *b"VP8X" || flags & ANIMATION == 0 {
            return Ok(None);
        }
        let mut parameters = chunks.clone().map_while(Result::ok).filter(|it| it.name == *b"ANIM");
        // The background colour, which browsers ignore, and the number of times.
        let plays = match parameters.next().map(|it| it.payload) {
            Some([_, _, _, _, low, high, ..]) => u16::from_le_bytes([*low, *high]),
            _ => return Err(reason("its animation has no parameters")),
        };
        let (canvas, has_alpha) = (source.canvas, flags & ALPHA != 0);
        Ok(Some(Frames { canvas, has_alpha, plays, payloads: Payloads(chunks) }))
    }

    pub(super) fn next(&mut self, limits: RenderLimits) -> Result<Patch, PictureError> {
        const DISPOSES: u8 = 0x01;
        const REPLACES: u8 = 0x02;
        let payload = self.payloads.next().ok_or_else(|| reason("it has no further frame"))?;
        let frame = Frame::of_animation(payload)?;
        if !self.has_alpha && (frame.alpha.is_some() || frame.has_own_alpha()) {
            return Err(reason("a frame has alpha, and the header denies it"));
        }
        let (at, size) = (frame.at, frame.size);
        if at.0 + size.0 > self.canvas.0 || at.1 + size.1 > self.canvas.1 {
            return Err(reason("a frame lies beyond the canvas"));
        }
        let mut pixels = RgbaImage::new(size.0, size.1);
        frame.decode(&mut pixels, 4 * size.0 as usize, ColorMode::Rgba, limits)?;
        let flags = payload[15];
        Ok(Patch {
            at,
            pixels,
            duration: u24_at(payload, 12),
            blends: flags & REPLACES == 0,
            disposal: if flags & DISPOSES == 0 { Disposal::Keep } else { Disposal::Clear },
        })
    }
}

/// Chunks one after the other. The last of them may be an error, for one that is cut off.
#[derive(Clone)]
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = Result<Chunk<'a>, PictureError>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = std::mem::take(&mut self.0);
        if bytes.is_empty() {
            return None;
        }
        let whole = bytes.first_chunk::<8>().and_then(|header| {
            let [a, b, c, d, size @ ..] = *header;
            let whole = bytes.get(..8 + u32::from_le_bytes(size) as usize)?;
            Some(Chunk { name: [a, b, c, d], payload: &whole[8..], whole })
        });
        let Some(chunk) = whole else { return Some(Err(reason(CUT_OFF))) };
        self.0 = bytes.get(chunk.whole.len().next_multiple_of(2)..).unwrap_or_default();
        Some(Ok(chunk))
    }
}

/// Width and height of a key frame (RFC 6386 §9.1).
fn size_of_lossy(payload: &[u8]) -> Option<(u32, u32)> {
    let header = payload.first_chunk::<10>()?;
    let length = |at: usize| u32::from(u16::from_le_bytes([header[at], header[at + 1]]) & 0x3fff);
    let size = (length(6), length(8));
    (header[3..6] == [0x9d, 0x01, 0x2a] && pixels(size) > 0).then_some(size)
}

/// Width and height of a lossless picture (RFC 9649 §3.4).
fn size_of_lossless(payload: &[u8]) -> Option<(u32, u32)> {
    let [signature, bits @ ..] = payload.first_chunk::<5>()?;
    let bits = u32::from_le_bytes(*bits);
    (*signature == 0x2f).then_some((1 + (bits & 0x3fff), 1 + (bits >> 14 & 0x3fff)))
}

/// A number of 24 bits in a header that is long enough.
fn u24_at(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], 0])
}

const CUT_OFF: &str = "it is cut off";

fn reason(reason: &str) -> PictureError {
    PictureError::Broken(format!("the WebP can't be read: {reason}"))
}

#[cfg(test)]
mod tests {
    use webpx::{Encoder, Unstoppable};

    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    const LIMITS: RenderLimits = RenderLimits { pixels: 10_000, deadline: None };
    const SIZE: (u32, u32) = (9, 5);

    fn colours() -> Vec<[u8; 4]> {
        (0..45).map(|at| [5 * at, 255 - 5 * at, 44 - at, 100 + 3 * at]).collect()
    }

    /// The chunks of a picture.
    fn encoded(is_lossless: bool) -> Vec<(&'static [u8; 4], Vec<u8>)> {
        let pixels = colours().concat();
        let encoder = Encoder::new_rgba(&pixels, SIZE.0, SIZE.1).lossless(is_lossless);
        let file = encoder.encode(Unstoppable).unwrap();
        let chunks = Chunks(&file[12..]).map(Result::unwrap);
        let names = [b"ALPH", b"VP8 ", b"VP8L"];
        let known = |chunk: &Chunk<'_>| names.into_iter().find(|name| **name == chunk.name);
        chunks.filter_map(|it| Some((known(&it)?, it.payload.to_vec()))).collect()
    }

    fn chunk(name: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_le_bytes();
        let padding = &[0][..payload.len() % 2];
        [&name[..], &size, payload, padding].concat()
    }

    fn file(chunks: &[Vec<u8>]) -> Vec<u8> {
        chunk(*b"RIFF", &[b"WEBP".as_slice(), &chunks.concat()].concat())
    }

    fn header(flags: u8, (width, height): (u8, u8)) -> Vec<u8> {
        chunk(*b"VP8X", &[flags, 0, 0, 0, width - 1, 0, 0, height - 1, 0, 0])
    }

    fn shown(file: &[u8]) -> Result<DynamicImage, PictureError> {
        decode(file, MediaType::WebP, LIMITS)
    }

    fn pixels_of(file: &[u8]) -> Vec<[u8; 4]> {
        shown(file).unwrap().into_rgba8().pixels().map(|pixel| pixel.0).collect()
    }

    fn chunks_of(picture: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
        picture.iter().flat_map(|(name, payload)| chunk(**name, payload)).collect()
    }

    #[test]
    fn flags_of_chunks_that_are_missing_are_ignored() {
        let lossless = chunks_of(&encoded(true));
        let lossy = encoded(false);
        let [_alpha, lossy_image] = &lossy[..] else { panic!("alpha and a picture") };
        let opaque = chunk(*lossy_image.0, &lossy_image.1);
        let expected = pixels_of(&file(std::slice::from_ref(&opaque)));
        assert!(expected.iter().all(|pixel| pixel[3] == 255));
        for flags in [0, 0x04, 0x08, 0x10, 0x20, 0x3c] {
            let with_header = file(&[header(flags, (9, 5)), lossless.clone()]);
            assert_eq!(pixels_of(&with_header), colours(), "{flags:#x}");
            let with_header = file(&[header(flags, (9, 5)), opaque.clone()]);
            assert_eq!(pixels_of(&with_header), expected, "{flags:#x}");
        }
        for reserved in [0x01, 0x40, 0x80] {
            shown(&file(&[header(reserved, (9, 5)), opaque.clone()])).unwrap_err();
        }
    }

    #[test]
    fn alpha_beside_a_lossy_picture_needs_its_flag() {
        let lossy = chunks_of(&encoded(false));
        let with_flag = pixels_of(&file(&[header(0x10, (9, 5)), lossy.clone()]));
        let alpha = |pixels: &[[u8; 4]]| pixels.iter().map(|pixel| pixel[3]).collect::<Vec<_>>();
        assert_eq!(alpha(&with_flag), alpha(&colours()));
        let without = pixels_of(&file(&[header(0, (9, 5)), lossy]));
        assert_eq!(alpha(&without), [255; 45]);
    }

    #[test]
    fn chunks_that_nobody_knows_and_bytes_after_the_end_are_ignored() {
        let picture = chunks_of(&encoded(true));
        let (odd, empty) = (chunk(*b"odd ", b"123"), chunk(*b"none", b""));
        let mut with_others = file(&[header(0x10, (9, 5)), odd.clone(), picture.clone(), empty]);
        with_others.extend(b"RIFFrubbish");
        assert_eq!(pixels_of(&with_others), colours());
        let mut before_header = file(&[odd, header(0x10, (9, 5)), picture.clone()]);
        shown(&before_header).unwrap_err();
        before_header = file(&[header(0x10, (9, 5)), picture.clone(), picture]);
        shown(&before_header).unwrap_err();
    }

    #[test]
    fn a_picture_has_the_size_of_its_canvas() {
        for size in [(9, 6), (8, 5), (90, 50)] {
            let error = shown(&file(&[header(0x10, size), chunks_of(&encoded(true))])).unwrap_err();
            assert!(error.to_string().contains("differ in size"), "{error}");
        }
    }

    #[test]
    fn the_first_frame_lies_on_a_transparent_canvas() {
        let frame = |x: u8, y: u8| {
            let place = [x / 2, 0, 0, y / 2, 0, 0, 8, 0, 0, 4, 0, 0, 100, 0, 0, 0];
            chunk(*b"ANMF", &[&place[..], &chunks_of(&encoded(true))].concat())
        };
        let white = chunk(*b"ANIM", &[255, 255, 255, 255, 0, 0]);
        let animation =
            |flags, x, y| file(&[header(flags, (20, 10)), white.clone(), frame(x, y), frame(0, 0)]);
        let picture = shown(&animation(0x12, 4, 2)).unwrap().into_rgba8();
        assert_eq!(picture.dimensions(), (20, 10));
        for (x, y, pixel) in picture.enumerate_pixels() {
            let inside = (4..13).contains(&x) && (2..7).contains(&y);
            let expected = if inside { colours()[((y - 2) * 9 + x - 4) as usize] } else { [0; 4] };
            assert_eq!(pixel.0, expected, "{x},{y}");
        }
        shown(&animation(0x12, 12, 2)).unwrap_err();
        shown(&animation(0x12, 4, 6)).unwrap_err();
        // The flag of alpha is missing.
        shown(&animation(0x02, 4, 2)).unwrap_err();
    }

    #[test]
    fn the_first_orientation_counts_with_and_without_its_mark() {
        let exif = |orientation: u8| {
            let head = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0";
            [&head[..], &[orientation, 0, 0, 0, 0, 0, 0]].concat()
        };
        let with = |flags, exifs: &[Vec<u8>]| {
            let exifs = exifs.iter().flat_map(|exif| chunk(*b"EXIF", exif)).collect();
            let picture = shown(&file(&[header(flags, (9, 5)), chunks_of(&encoded(true)), exifs]));
            let picture = picture.unwrap();
            (picture.width(), picture.height())
        };
        assert_eq!(with(0x18, &[exif(6), exif(3)]), (5, 9));
        assert_eq!(with(0x18, &[[b"Exif\0\0".as_slice(), &exif(6)].concat()]), (5, 9));
        assert_eq!(with(0x10, &[exif(6)]), (9, 5));
    }

    #[test]
    fn a_part_of_a_picture_is_refused() {
        let whole = file(&[header(0x10, (9, 5)), chunks_of(&encoded(false))]);
        for end in 0..whole.len() {
            shown(&whole[..end]).unwrap_err();
        }
        let mut image = encoded(true).pop().unwrap();
        image.1.truncate(image.1.len() / 2);
        shown(&file(&[chunk(*image.0, &image.1)])).unwrap_err();
    }

    #[test]
    fn pieces_make_the_same_picture() {
        // More than a piece, since noise can't be compressed.
        let mut state = 1_u32;
        let noise = (0..300 * 200 * 4).map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3] | 1
        });
        let noise: Vec<u8> = noise.collect();
        let limits = RenderLimits { pixels: 100_000, deadline: None };
        for is_lossless in [false, true] {
            let encoder = Encoder::new_rgba(&noise, 300, 200).lossless(is_lossless).quality(95.0);
            let file = encoder.encode(Unstoppable).unwrap();
            assert!(file.len() > 64 * 1024, "{}", file.len());
            let picture = decode(&file, MediaType::WebP, limits).unwrap();
            assert_eq!(picture.as_bytes(), webpx::decode_rgba(&file).unwrap().0);
        }
    }

    /// An animation of two frames, the second of which has a place and flags of its own.
    fn animation(parameters: &[u8], place: (u8, u8), flags: u8, picture: &[u8]) -> Vec<u8> {
        let frame = |(x, y): (u8, u8), flags: u8, picture: &[u8]| {
            let header = [x / 2, 0, 0, y / 2, 0, 0, 8, 0, 0, 4, 0, 0, 0x70, 0x11, 1, flags];
            chunk(*b"ANMF", &[&header[..], picture].concat())
        };
        let first = frame((0, 0), 0, &chunks_of(&encoded(true)));
        let parameters = chunk(*b"ANIM", parameters);
        file(&[header(0x12, (20, 10)), parameters, first, frame(place, flags, picture)])
    }

    const TWICE: [u8; 6] = [255, 255, 255, 255, 2, 0];

    #[test]
    fn frames_have_the_place_time_and_way_of_their_headers() {
        let picture = chunks_of(&encoded(true));
        for (flags, blends, disposal) in [
            (0, true, Disposal::Keep),
            (1, true, Disposal::Clear),
            (2, false, Disposal::Keep),
            (3, false, Disposal::Clear),
        ] {
            let file = animation(&TWICE, (4, 2), flags, &picture);
            let outline = outline(&file).unwrap().unwrap();
            assert_eq!((outline.canvas, outline.frames, outline.plays), ((20, 10), 2, 2));
            assert_eq!(outline.duration, 2 * 0x1_1170);
            let mut frames = Frames::read(&file).unwrap();
            assert_eq!(frames.next(LIMITS).unwrap().at, (0, 0));
            let patch = frames.next(LIMITS).unwrap();
            assert_eq!((patch.at, patch.duration), ((4, 2), 0x1_1170));
            assert_eq!((patch.blends, patch.disposal), (blends, disposal));
            assert!(patch.pixels.pixels().map(|it| it.0).eq(colours()));
            assert!(frames.next(LIMITS).is_err());
        }
    }

    #[test]
    fn frames_that_decoders_show_differently_are_refused() {
        let picture = chunks_of(&encoded(true));
        for (place, picture) in
            [((12, 2), &picture[..]), ((4, 6), &picture), ((4, 2), &picture[..20]), ((4, 2), &[])]
        {
            let file = animation(&TWICE, place, 0, picture);
            let mut frames = Frames::read(&file).unwrap();
            frames.next(LIMITS).unwrap();
            assert!(frames.next(LIMITS).is_err(), "{place:?}");
        }
        assert!(Frames::read(&animation(&[0; 5], (4, 2), 0, &picture)).is_err());
        let still = file(&[header(0x10, (9, 5)), picture]);
        assert!(outline(&still).unwrap().is_none());
    }
}
