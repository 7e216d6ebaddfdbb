//! Decodes animations, one frame at a time, as browsers show them.

use image::metadata::Orientation;
use image::{DynamicImage, RgbaImage};

use super::super::{AnimationLimits, Frames, PictureError, RenderLimits};
use super::{Decoded, Measure, check_pixels, gif, guarded, pixels, webp};
use crate::image::MediaType;

/// An animation by the headers of its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Outline {
    /// Width and height of the canvas, not yet upright.
    pub(super) canvas: (u32, u32),
    pub(super) orientation: Orientation,
    /// The number of whole frames.
    pub(super) frames: u32,
    /// Pixels of the largest frame: one may be larger than the canvas.
    pub(super) largest: u64,
    /// Milliseconds of all frames.
    pub(super) duration: u64,
    /// Number of times that it is shown; 0 for without end.
    pub(super) plays: u16,
}

impl Outline {
    /// Reads the headers. `None` for a picture that doesn't move. No pixel is decoded.
    pub(in super::super) fn read(
        bytes: &[u8],
        media_type: MediaType,
        limits: RenderLimits,
    ) -> Result<Option<Outline>, PictureError> {
        let outline = guarded(|| match media_type {
            MediaType::Gif => gif::outline(bytes, limits).map(Some),
            MediaType::WebP => webp::outline(bytes),
            _ => Ok(None),
        })?;
        Ok(outline.filter(|outline| outline.frames > 1))
    }

    /// Refuses an animation that is over the limits. Comes before anything is allocated for its pixels.
    pub(in super::super) fn check(
        &self,
        limits: RenderLimits,
        most: AnimationLimits,
    ) -> Result<(), PictureError> {
        check_pixels(self.canvas, limits)?;
        let each = pixels(self.canvas).max(self.largest);
        let all = each.saturating_mul(self.frames.into());
        if self.frames > most.frames || all > most.pixels {
            return Err(PictureError::TooManyFrames { frames: self.frames, pixels: all, most });
        }
        // The encoder counts in 31 bits.
        if self.duration > i32::MAX as u64 {
            return Err(PictureError::BrokenAnimation("it lasts longer than 24 days".to_owned()));
        }
        Ok(())
    }

    /// The size of the source, and the memory that it takes to decode a frame and to scale the canvas.
    pub(in super::super) fn measure(&self, source: &[u8]) -> Measure {
        // A frame in values and colours; of WebP, what its decoder takes for it, some rows, and the source.
        let rows = 256 * u64::from(self.canvas.0) + 2 * source.len() as u64;
        Measure::new(self.canvas, self.orientation, true, 10 * self.largest + rows, source)
    }

    /// Bytes that are held from frame to frame: the canvas, and what a frame hides.
    pub(in super::super) fn held(&self) -> u64 {
        8 * pixels(self.canvas)
    }

    /// The frames together.
    pub(in super::super) fn all(&self) -> Frames {
        Frames { count: self.frames, duration: self.duration }
    }

    /// The number of frames.
    pub(in super::super) fn frames(&self) -> u32 {
        self.frames
    }

    /// Number of times that it is shown; 0 for without end.
    pub(in super::super) fn plays(&self) -> u16 {
        self.plays
    }
}

/// A frame of an animation, on the whole canvas.
pub(in super::super) struct Shown {
    pub(in super::super) picture: Decoded,
    /// Milliseconds.
    pub(in super::super) duration: u32,
}

/// Decodes the frames of an animation in turn, and gives each to `show`. Ends with the first failure.
pub(in super::super) fn decode_each(
    bytes: &[u8],
    media_type: MediaType,
    outline: &Outline,
    limits: RenderLimits,
    mut show: impl FnMut(Shown) -> Result<(), PictureError>,
) -> Result<(), PictureError> {
    let mut source = guarded(|| match media_type {
        MediaType::WebP => webp::Frames::read(bytes).map(Source::WebP),
        _ => gif::Frames::read(bytes, limits).map(|it| Source::Gif(Box::new(it))),
    })?;
    let mut canvas = Canvas::new(outline.canvas);
    for number in 1..=outline.frames {
        limits.check_time()?;
        let frame = guarded(|| match &mut source {
            Source::Gif(frames) => frames.next(limits),
            Source::WebP(frames) => frames.next(limits),
        });
        // The first frame may be whole.
        let frame = frame.map_err(|error| match error {
            PictureError::DecodingTimedOut => PictureError::TimedOut,
            error => PictureError::BrokenAnimation(format!("frame {number}: {error}")),
        })?;
        let duration = frame.duration;
        canvas.draw(&frame);
        let pixels = DynamicImage::ImageRgba8(canvas.pixels.clone());
        show(Shown { picture: Decoded { pixels, orientation: outline.orientation }, duration })?;
    }
    Ok(())
}

enum Source<'a> {
    Gif(Box<gif::Frames<'a>>),
    WebP(webp::Frames<'a>),
}

/// A decoded frame, not yet on its canvas.
pub(super) struct Patch {
    /// Left and top.
    pub(super) at: (u32, u32),
    pub(super) pixels: RgbaImage,
    /// Milliseconds.
    pub(super) duration: u32,
    /// True if it is laid over the canvas; otherwise it replaces what is there.
    pub(super) blends: bool,
    pub(super) disposal: Disposal,
}

/// The way in which a frame makes place for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disposal {
    /// It stays.
    Keep,
    /// Its place becomes transparent. Browsers show no background colour.
    Clear,
    /// Its place becomes what it was before.
    Restore,
}

/// The canvas of an animation.
struct Canvas {
    pixels: RgbaImage,
    /// Left and top of the place that the next frame changes first, and its pixels then.
    undo: Option<((u32, u32), RgbaImage)>,
}

impl Canvas {
    fn new((width, height): (u32, u32)) -> Canvas {
        Canvas { pixels: RgbaImage::new(width, height), undo: None }
    }

    /// Disposes of the frame before, and draws one. What lies beyond the canvas is cut off.
    fn draw(&mut self, patch: &Patch) {
        if let Some((at, before)) = self.undo.take() {
            self.put(at, &before, false);
        }
        let (left, top) = patch.at;
        let width = patch.pixels.width().min(self.pixels.width().saturating_sub(left));
        let height = patch.pixels.height().min(self.pixels.height().saturating_sub(top));
        if width == 0 || height == 0 {
            return;
        }
        let undo = match patch.disposal {
            Disposal::Keep => None,
            Disposal::Clear => Some(RgbaImage::new(width, height)),
            Disposal::Restore => {
                let place = image::imageops::crop_imm(&self.pixels, left, top, width, height);
                Some(place.to_image())
            }
        };
        self.undo = undo.map(|before| (patch.at, before));
        self.put(patch.at, &patch.pixels, patch.blends);
    }

    fn put(&mut self, (left, top): (u32, u32), patch: &RgbaImage, blends: bool) {
        for (row, above) in self.pixels.rows_mut().skip(top as usize).zip(patch.rows()) {
            for (pixel, above) in row.skip(left as usize).zip(above) {
                pixel.0 = if blends { over(pixel.0, above.0) } else { above.0 };
            }
        }
    }
}

/// A pixel over another (RFC 9649 §2.7.1.1, alpha-blending). Alpha isn't premultiplied.
#[expect(clippy::cast_possible_truncation, reason = "an average of bytes is a byte")]
fn over(below: [u8; 4], above: [u8; 4]) -> [u8; 4] {
    match (below[3], above[3]) {
        (_, 0) => below,
        (_, 255) | (0, _) => above,
        (of_below, of_above) => {
            // In parts of 255².
            let one = 255 * u32::from(of_above);
            let other = (255 - u32::from(of_above)) * u32::from(of_below);
            let all = one + other;
            let mut mixed = [0; 4];
            for (channel, mixed) in mixed.iter_mut().enumerate().take(3) {
                let sum = one * u32::from(above[channel]) + other * u32::from(below[channel]);
                *mixed = ((sum + all / 2) / all) as u8;
            }
            mixed[3] = ((all + 127) / 255) as u8;
            mixed
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RED: [u8; 4] = [255, 0, 0, 255];
    const GREEN: [u8; 4] = [0, 255, 0, 255];
    const NONE: [u8; 4] = [0; 4];

    fn patch(left: u32, colour: [u8; 4], width: u32, blends: bool, disposal: Disposal) -> Patch {
        let pixels = RgbaImage::from_pixel(width, 1, image::Rgba(colour));
        Patch { at: (left, 0), pixels, duration: 10, blends, disposal }
    }

    /// A row of four pixels after each patch.
    fn shown(patches: Vec<Patch>) -> Vec<[[u8; 4]; 4]> {
        let mut canvas = Canvas::new((4, 1));
        let rows = patches.into_iter().map(|patch| {
            canvas.draw(&patch);
            [0, 1, 2, 3].map(|x| canvas.pixels.get_pixel(x, 0).0)
        });
        rows.collect()
    }

    #[test]
    fn a_frame_makes_place_as_its_disposal_says() {
        for (disposal, after) in
            [(Disposal::Keep, RED), (Disposal::Clear, NONE), (Disposal::Restore, GREEN)]
        {
            let rows = shown(vec![
                patch(0, GREEN, 4, true, Disposal::Keep),
                patch(1, RED, 2, true, disposal),
                patch(3, NONE, 1, true, Disposal::Keep),
            ]);
            assert_eq!(rows[1], [GREEN, RED, RED, GREEN]);
            assert_eq!(rows[2], [GREEN, after, after, GREEN], "{disposal:?}");
        }
    }

    #[test]
    fn what_lies_beyond_the_canvas_is_cut_off() {
        for disposal in [Disposal::Keep, Disposal::Clear, Disposal::Restore] {
            let rows = shown(vec![
                patch(3, RED, 9, true, disposal),
                patch(4, GREEN, 1, true, disposal),
                patch(65_535, GREEN, 1, true, disposal),
            ]);
            assert_eq!(rows[0], [NONE, NONE, NONE, RED]);
            let left = if disposal == Disposal::Keep { RED } else { NONE };
            assert_eq!(rows[2], [NONE, NONE, NONE, left]);
        }
    }

    #[test]
    fn a_translucent_frame_is_mixed_with_the_canvas_or_replaces_it() {
        let half = [0, 0, 255, 128];
        let first = || patch(0, RED, 2, true, Disposal::Keep);
        let [_, mixed] = shown(vec![first(), patch(1, half, 2, true, Disposal::Keep)])[..] else {
            panic!("two rows")
        };
        assert_eq!(mixed, [RED, [127, 0, 128, 255], half, NONE]);
        let replaced = shown(vec![first(), patch(1, half, 2, false, Disposal::Keep)])[1];
        assert_eq!(replaced, [RED, half, half, NONE]);
        // Alpha of both: 1 - (1 - 0.2) × (1 - 0.4).
        assert_eq!(over([0, 100, 0, 102], [200, 0, 0, 51])[3], 133);
    }
}
