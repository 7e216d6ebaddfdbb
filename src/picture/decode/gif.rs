//! Decodes GIF: its first frame, or all in turn.

use image::metadata::Orientation;
use image::{DynamicImage, RgbaImage};

use super::super::{PictureError, RenderLimits};
use super::animation::{Disposal, Outline, Patch};
use super::deadline::DeadlineReader;
use super::{Measure, broken, check_pixels, pixels};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    let FirstFrame { size, .. } = first_frame(bytes, limits)?;
    // The frame before it gets its colours.
    Ok(Measure::new(size, Orientation::NoTransforms, true, pixels(size), bytes))
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let FirstFrame { size, mut decoder, frame } = first_frame(bytes, limits)?;
    let (left, top) = (u32::from(frame.left), u32::from(frame.top));
    let colours = colours(&decoder, &frame, limits)?;
    let mut values = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut values).map_err(|error| broken(&error, limits))?;

    // Around the frame the screen stays transparent: browsers don't show its background colour.
    let (width, height) = size;
    let mut picture = RgbaImage::new(width, height);
    let lines = picture.chunks_exact_mut(4 * width as usize).skip(top as usize);
    for (line, values) in lines.zip(values.chunks_exact(usize::from(frame.width))) {
        let (line, _) = line.as_chunks_mut::<4>();
        for (pixel, value) in line[left as usize..].iter_mut().zip(values) {
            *pixel = colours[usize::from(*value)];
        }
    }
    Ok(DynamicImage::ImageRgba8(picture))
}

/// The colours of a frame.
fn colours(
    decoder: &gif::Decoder<DeadlineReader<'_>>,
    frame: &gif::Frame<'_>,
    limits: RenderLimits,
) -> Result<[[u8; 4]; 256], PictureError> {
    let palette = decoder.palette().map_err(|error| broken(&error, limits))?;
    // A value beyond the palette is black.
    let mut colours = [[0, 0, 0, 255]; 256];
    let (entries, _) = palette.as_chunks::<3>();
    for (colour, [red, green, blue]) in colours.iter_mut().zip(entries) {
        *colour = [*red, *green, *blue, 255];
    }
    if let Some(transparent) = frame.transparent {
        colours[usize::from(transparent)] = [0; 4];
    }
    Ok(colours)
}

/// A GIF that is read up to the pixels of its first frame.
struct FirstFrame<'a> {
    /// The logical screen (`GIF89a` §18), enlarged to the first frame as in browsers. It has no pixels in some files.
    size: (u32, u32),
    decoder: gif::Decoder<DeadlineReader<'a>>,
    /// Place, size and transparent value.
    frame: gif::Frame<'static>,
}

fn first_frame(bytes: &[u8], limits: RenderLimits) -> Result<FirstFrame<'_>, PictureError> {
    let mut options = gif::DecodeOptions::new();
    // Extensions that nobody knows are passed over (`GIF89a` §23).
    options.allow_unknown_blocks(true);
    let bytes = DeadlineReader::new(bytes, limits);
    let mut decoder = options.read_info(bytes).map_err(|error| broken(&error, limits))?;
    let frame = decoder.next_frame_info().map_err(|error| broken(&error, limits))?.cloned();
    let frame = frame.ok_or_else(|| PictureError::Broken("the GIF has no frame".to_owned()))?;
    if frame.width == 0 || frame.height == 0 {
        return Err(PictureError::Broken("the first frame of the GIF has no pixels".to_owned()));
    }
    let side = |screen: u16, start: u16, length: u16| {
        u32::from(screen).max(u32::from(start) + u32::from(length))
    };
    let width = side(decoder.width(), frame.left, frame.width);
    let height = side(decoder.height(), frame.top, frame.height);
    check_pixels((width, height), limits)?;
    Ok(FirstFrame { size: (width, height), decoder, frame })
}

/// Describes a GIF by the headers of its frames. A frame that is cut off isn't counted, nor is what follows a block that
/// isn't valid.
pub(super) fn outline(bytes: &[u8], limits: RenderLimits) -> Result<Outline, PictureError> {
    let FirstFrame { size, .. } = first_frame(bytes, limits)?;
    let mut outline = Outline {
        canvas: size,
        orientation: Orientation::NoTransforms,
        frames: 0,
        largest: 0,
        duration: 0,
        plays: 1,
    };
    let mut headers = Headers::new(bytes);
    for header in headers.by_ref() {
        outline.frames += 1;
        outline.largest = outline.largest.max(header.pixels);
        outline.duration += u64::from(header.duration);
    }
    outline.plays = headers.plays;
    Ok(outline)
}

/// The frames of a GIF, decoded in turn.
pub(super) struct Frames<'a> {
    decoder: gif::Decoder<DeadlineReader<'a>>,
    headers: Headers<'a>,
    /// The first frame, whose header is read already.
    first: Option<gif::Frame<'static>>,
}

impl<'a> Frames<'a> {
    pub(super) fn read(bytes: &'a [u8], limits: RenderLimits) -> Result<Self, PictureError> {
        let FirstFrame { decoder, frame, .. } = first_frame(bytes, limits)?;
        Ok(Frames { decoder, headers: Headers::new(bytes), first: Some(frame) })
    }

    pub(super) fn next(&mut self, limits: RenderLimits) -> Result<Patch, PictureError> {
        let missing = || PictureError::Broken("the GIF has no further frame".to_owned());
        let header = self.headers.next().ok_or_else(missing)?;
        let frame = if let Some(first) = self.first.take() {
            first
        } else {
            let next = self.decoder.next_frame_info().map_err(|error| broken(&error, limits))?;
            next.cloned().ok_or_else(missing)?
        };
        let (width, height) = (u32::from(frame.width), u32::from(frame.height));
        // The header was checked before: the decoder must see the same frame.
        if pixels((width, height)) != header.pixels {
            return Err(PictureError::Broken(
                "a frame of the GIF must have the same size for its header and its decoder"
                    .to_owned(),
            ));
        }
        let mut picture = RgbaImage::new(width, height);
        if header.pixels > 0 {
            let colours = colours(&self.decoder, &frame, limits)?;
            let mut values = vec![0; self.decoder.buffer_size()];
            self.decoder.read_into_buffer(&mut values).map_err(|error| broken(&error, limits))?;
            for (pixel, value) in picture.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *pixel = colours[usize::from(value)];
            }
        }
        Ok(Patch {
            at: (frame.left.into(), frame.top.into()),
            pixels: picture,
            duration: header.duration,
            blends: true,
            disposal: header.disposal,
        })
    }
}

/// The header of a frame.
struct Header {
    pixels: u64,
    /// Milliseconds.
    duration: u32,
    disposal: Disposal,
}

/// The headers of the whole frames of a GIF (`GIF89a` §20). Data are skipped by their lengths.
struct Headers<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Flags and delay of the graphic control extension that was read last.
    control: (u8, u16),
    /// Number of times that the frames are shown, as far as they were read; 0 for without end.
    plays: u16,
}

impl<'a> Headers<'a> {
    fn new(bytes: &'a [u8]) -> Headers<'a> {
        let flags = bytes.get(10).copied().unwrap_or_default();
        Headers { bytes, at: 13 + table(flags), control: (0, 0), plays: 1 }
    }

    /// Skips blocks of data. The last one is empty.
    fn skip_data(&mut self) -> Option<()> {
        while let length @ 1.. = *self.bytes.get(self.at)? {
            self.at += 1 + usize::from(length);
        }
        self.at += 1;
        Some(())
    }

    fn read_extension(&mut self) -> Option<()> {
        let (label, data) = self.bytes.get(self.at + 1..)?.split_first()?;
        match (label, data) {
            (0xf9, [4..=255, flags, low, high, ..]) => {
                self.control = (*flags, u16::from_le_bytes([*low, *high]));
            }
            // The extension of Netscape: the number of times that the frames are shown again, or 0 for without end.
            (0xff, [11, name @ ..]) => {
                let (name, data) = name.split_first_chunk::<11>()?;
                if let b"NETSCAPE2.0" | b"ANIMEXTS1.0" = name
                    && let [3..=255, 1, low, high, ..] = data
                {
                    let repeats = u16::from_le_bytes([*low, *high]);
                    self.plays = if repeats == 0 { 0 } else { repeats.saturating_add(1) };
                }
            }
            _ => {}
        }
        self.at += 2;
        self.skip_data()
    }
}

/// Bytes of a table of colours.
fn table(flags: u8) -> usize {
    if flags & 0x80 == 0 { 0 } else { 6 << (flags & 7) }
}

impl Iterator for Headers<'_> {
    type Item = Header;

    fn next(&mut self) -> Option<Header> {
        loop {
            match *self.bytes.get(self.at)? {
                b'!' => self.read_extension()?,
                b',' => break,
                _ => return None,
            }
        }
        let header: &[u8; 9] = self.bytes.get(self.at + 1..)?.first_chunk()?;
        let [_, _, _, _, width, more_width, height, more_height, flags] = *header;
        self.at += 11 + table(flags);
        self.skip_data()?;
        let (flags, delay) = std::mem::take(&mut self.control);
        let side = |low, high| u32::from(u16::from_le_bytes([low, high]));
        Some(Header {
            pixels: pixels((side(width, more_width), side(height, more_height))),
            // Browsers show frames without a delay, or with one that no screen could keep, for a tenth of a second.
            duration: if delay <= 1 { 100 } else { 10 * u32::from(delay) },
            disposal: match flags >> 2 & 7 {
                2 => Disposal::Clear,
                // Some programs write the third bit in place of the number (Chromium, Firefox).
                3 | 4 => Disposal::Restore,
                _ => Disposal::Keep,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{decode, measure};
    use super::*;
    use crate::image::MediaType;

    const LIMITS: RenderLimits = RenderLimits { pixels: 1000, deadline: None };

    const COLOURS: [[u8; 4]; 4] = [[1, 1, 1, 255], [2, 2, 2, 255], [0, 0, 0, 255], [0; 4]];

    /// A GIF with two colours and one frame, 2×1 at 1,0, with the values 0 and 1; the third colour is missing.
    fn gif(screen: [u8; 4], extension: &[u8], size: [u8; 4], codes: &[u8]) -> Vec<u8> {
        let [width, _, height, _] = screen;
        [
            b"GIF89a".as_slice(),
            &[width, 0, height, 0, 0x80, 1, 0, 1, 1, 1, 2, 2, 2],
            extension,
            &[b',', 1, 0, 0, 0],
            &size,
            // The smallest codes have two bits, so three with those for clearing and for the end.
            &[0, 2],
            codes,
            b";",
        ]
        .concat()
    }

    /// Clear, 0, 1, end; clear, 2, 3, end.
    const ZERO_AND_ONE: [u8; 4] = [2, 0b0100_0100, 0b0000_1010, 0];
    const TWO_AND_THREE: [u8; 4] = [2, 0b1101_0100, 0b0000_1010, 0];

    fn shown(gif: &[u8]) -> ((u32, u32), Vec<[u8; 4]>) {
        let picture = decode(gif, MediaType::Gif, LIMITS).unwrap().into_rgba8();
        assert_eq!(measure(gif, MediaType::Gif, LIMITS).unwrap().upright(), picture.dimensions());
        (picture.dimensions(), picture.pixels().map(|pixel| pixel.0).collect())
    }

    #[test]
    fn the_screen_grows_to_the_first_frame_and_is_transparent_around_it() {
        let [one, two, _, none] = COLOURS;
        for (screen, size, pixels) in [
            ([0, 0, 0, 0], (3, 1), vec![none, one, two]),
            ([0, 0, 1, 0], (3, 1), vec![none, one, two]),
            ([2, 0, 1, 0], (3, 1), vec![none, one, two]),
            ([4, 0, 2, 0], (4, 2), vec![none, one, two, none, none, none, none, none]),
        ] {
            let gif = gif(screen, &[], [2, 0, 1, 0], &ZERO_AND_ONE);
            assert_eq!(shown(&gif), (size, pixels), "{screen:?}");
        }
    }

    #[test]
    fn values_beyond_the_palette_are_black_unless_transparent() {
        let [_, _, black, none] = COLOURS;
        let control = [b'!', 0xf9, 4, 1, 0, 0, 3, 0];
        // An extension that nobody knows changes nothing.
        let unknown = [b'!', 0x42, 2, 1, 2, 0];
        for (extension, last) in [(&control[..], none), (&unknown, black), (&[], black)] {
            let gif = gif([3, 0, 1, 0], extension, [2, 0, 1, 0], &TWO_AND_THREE);
            assert_eq!(shown(&gif).1, [none, black, last]);
        }
    }

    #[test]
    fn a_part_of_a_frame_is_refused() {
        let whole = gif([0; 4], &[], [2, 0, 1, 0], &ZERO_AND_ONE);
        // The trailer may be missing.
        assert_eq!(shown(&whole[..whole.len() - 1]).0, (3, 1));
        let too_few = gif([0; 4], &[], [2, 0, 2, 0], &ZERO_AND_ONE);
        let no_pixels = gif([9, 0, 9, 0], &[], [0, 0, 1, 0], &ZERO_AND_ONE);
        for broken in [&whole[..whole.len() - 4], &whole[..20], &too_few, &no_pixels] {
            decode(broken, MediaType::Gif, LIMITS).unwrap_err();
        }
        let too_large = gif([0; 4], &[], [2, 1, 1, 1], &ZERO_AND_ONE);
        let error = decode(&too_large, MediaType::Gif, LIMITS).unwrap_err();
        assert!(matches!(error, PictureError::TooManyPixels { .. }), "{error}");
    }

    /// A frame of one pixel, of the second colour.
    const DOT: [u8; 14] = [b',', 0, 0, 0, 0, 1, 0, 1, 0, 0, 2, 2, 0x4c, 1];

    fn moving(loops: &[u8], frames: &[(u8, u16)], end: &[u8]) -> Vec<u8> {
        let mut gif = b"GIF89a\x01\0\x01\0\x80\0\0\x01\x01\x01\x02\x02\x02".to_vec();
        gif.extend(loops);
        for (flags, delay) in frames {
            let [low, high] = delay.to_le_bytes();
            gif.extend([b'!', 0xf9, 4, *flags, low, high, 0, 0]);
            gif.extend(DOT);
            gif.push(0);
        }
        [&gif, end].concat()
    }

    #[test]
    fn durations_are_those_that_browsers_show() {
        let frames: Vec<_> = [0, 1, 2, 10, 65_535].map(|delay| (0, delay)).into();
        let gif = moving(&[], &frames, b";");
        let durations: Vec<_> = Headers::new(&gif).map(|it| it.duration).collect();
        assert_eq!(durations, [100, 100, 20, 100, 655_350]);
        assert_eq!(outline(&gif, LIMITS).unwrap().duration, 655_670);
    }

    #[test]
    fn disposals_are_those_that_browsers_know() {
        use Disposal::{Clear, Keep, Restore};
        let frames: Vec<_> = (0..8).map(|number| (number << 2, 5)).collect();
        let gif = moving(&[], &frames, b";");
        let disposals: Vec<_> = Headers::new(&gif).map(|it| it.disposal).collect();
        assert_eq!(disposals, [Keep, Keep, Clear, Restore, Restore, Keep, Keep, Keep]);
    }

    #[test]
    fn frames_are_shown_once_more_than_they_are_repeated() {
        let netscape = |count: u16| {
            let [low, high] = count.to_le_bytes();
            [&b"!\xff\x0bNETSCAPE2.0\x03\x01"[..], &[low, high, 0]].concat()
        };
        let plays = |loops: &[u8], end: &[u8]| {
            outline(&moving(loops, &[(0, 5), (0, 5)], end), LIMITS).unwrap().plays
        };
        assert_eq!(plays(&[], b";"), 1);
        assert_eq!(plays(b"!\xff\x0bXMP DataXMP\x03\x01\x07\0\0", b";"), 1);
        for (count, expected) in [(0, 0), (1, 2), (3, 4), (65_535, 65_535)] {
            assert_eq!(plays(&netscape(count), b";"), expected);
            assert_eq!(plays(&[], &netscape(count)), expected);
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_is_no_frame() {
        let whole = moving(&[], &[(0, 5), (0, 5), (0, 5)], b";");
        let each = 8 + DOT.len() + 1;
        for end in whole.len() - 1 - each..=whole.len() {
            let expected = if end + 1 >= whole.len() { 3 } else { 2 };
            assert_eq!(outline(&whole[..end], LIMITS).unwrap().frames, expected, "{end}");
        }
        let frames = outline(&moving(&[], &[(0, 5), (0, 5)], b"\x99,,,"), LIMITS).unwrap().frames;
        assert_eq!(frames, 2);
    }
}
