//! Decodes animations, one frame at a time, as browsers show them.

use image::metadata::Orientation;
use image::{DynamicImage, RgbaImage};

use super::super::{AnimationLimits, PictureError, RenderLimits};
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
        _ => gif::Frames::read(bytes, limits).map(Source::Gif),
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
        canvas.draw(frame);
        let pixels = DynamicImage::ImageRgba8(canvas.pixels.clone());
        show(Shown { picture: Decoded { pixels, orientation: outline.orientation }, duration })?;
    }
    Ok(())
}

enum Source<'a> {
    Gif(gif::Frames<'a>),
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
    fn draw(&mut self, patch: Patch) {
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
