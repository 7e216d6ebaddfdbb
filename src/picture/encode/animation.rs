//! Animated WebP, by libwebp: a frame has the pixels that differ from the one before.

use image::DynamicImage;
use webpx::AnimationEncoder as Encoder;

use super::failed;
use crate::picture::{PictureError, is_transparent};

/// Most pixels of a frame. The encoder can't be stopped within one, and noise takes a second for each million.
const MOST_PIXELS: u64 = 1 << 22;

/// Pixels up to which a frame of few colours is tried without loss: noise in 150 colours takes four seconds for each million.
const EXACT_PIXELS: u64 = 1 << 20;

/// The memory that encoding takes at most, in bytes, with frames of some size. Noise was measured, which takes the most.
/// Fails for frames that would take too long.
pub(in super::super) fn memory(
    (width, height): (u32, u32),
    frames: u32,
) -> Result<u64, PictureError> {
    let pixels = u64::from(width) * u64::from(height);
    if pixels > MOST_PIXELS {
        return Err(PictureError::SlowAnimation);
    }
    // A picture and its encoder, with alpha; three canvases; and the file, of which noise of quality 100 takes 2.2 bytes a
    // pixel. Its parts are there twice when it is put together, and once more when it is handed over.
    Ok(pixels * (52 + 12) + pixels * u64::from(frames) * 7)
}

/// Encodes one frame after the other.
pub(in super::super) struct AnimationEncoder {
    encoder: Encoder,
    /// The time at which the next frame begins, in milliseconds.
    time: i32,
}

impl AnimationEncoder {
    /// Begins an animation that is shown a number of times; 0 for without end.
    pub(in super::super) fn new(
        (width, height): (u32, u32),
        quality: u8,
        plays: u16,
    ) -> Result<Self, PictureError> {
        // The encoder tries without loss what has fewer than 194 colours, and both ways what has more than 30.
        let tries_exact = u64::from(width) * u64::from(height) <= EXACT_PIXELS;
        let encoder = Encoder::with_options(width, height, tries_exact, plays.into());
        let mut encoder = encoder.map_err(|error| failed(&error))?;
        encoder.set_quality(quality.into());
        Ok(AnimationEncoder { encoder, time: 0 })
    }

    /// Adds a frame that is shown for some milliseconds.
    pub(in super::super) fn add(
        &mut self,
        picture: &DynamicImage,
        duration: u32,
    ) -> Result<(), PictureError> {
        let added = match picture {
            DynamicImage::ImageRgba8(pixels) if is_transparent(picture) => {
                self.encoder.add_frame_rgba(pixels, self.time)
            }
            DynamicImage::ImageRgb8(pixels) => self.encoder.add_frame_rgb(pixels, self.time),
            _ => self.encoder.add_frame_rgb(&picture.to_rgb8(), self.time),
        };
        added.map_err(|error| failed(&error))?;
        let next = i32::try_from(duration).ok().and_then(|it| self.time.checked_add(it));
        self.time = next.ok_or_else(|| failed(&"the animation lasts longer than 24 days"))?;
        Ok(())
    }

    /// The file.
    pub(in super::super) fn finish(self) -> Result<Vec<u8>, PictureError> {
        self.encoder.finish(self.time).map_err(|error| failed(&error))
    }
}
