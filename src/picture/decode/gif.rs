//! Decodes the first frame of a GIF.

use image::metadata::Orientation;
use image::{DynamicImage, RgbaImage};

use super::super::{PictureError, RenderLimits};
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
}
