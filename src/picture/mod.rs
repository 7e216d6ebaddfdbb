//! Pixels: sync, pure, without I/O. Nothing here knows of HTTP, the store or the cache.

pub mod decode;
pub mod demo;
pub mod encode;
pub mod placeholder;
pub mod resize;
pub mod sniff;

use std::time::Instant;

use image::{DynamicImage, RgbaImage};

use crate::image::MediaType;
use crate::image::variant::Variant;

/// What a picture may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenderLimits {
    /// Of the source: width times height.
    pub pixels: u64,
    /// When it has to be made; `None` for any time. Decoders notice it when they read on, the WebP encoder when it goes
    /// on to the next rows, the others between their work and the next; what those may take is bounded by `pixels` and
    /// by the size of the product.
    pub deadline: Option<Instant>,
}

impl RenderLimits {
    /// Whether there is time left.
    pub(crate) fn check_time(self) -> Result<(), PictureError> {
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(PictureError::TimedOut),
            _ => Ok(()),
        }
    }
}

/// Why there is no picture. Its text may be shown to a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    /// Its format is served as it is, and not decoded.
    #[error("{} is not decoded here, so it can't be had in another format", .0.as_str())]
    Opaque(MediaType),
    /// It would take too much memory.
    #[error("the image has {width}×{height} pixels, the limit is {limit} ([pictures] max_pixels)")]
    TooManyPixels {
        /// Of the source.
        width: u32,
        /// Of the source.
        height: u32,
        /// Of the product.
        limit: u64,
    },
    /// The bytes begin like an image and are none, or not a whole one.
    #[error("the image is broken: {0}")]
    Broken(String),
    /// The pixels can't be written in the format.
    #[error("the image can't be encoded: {0}")]
    Encoding(String),
    /// It isn't made in time.
    #[error("the picture takes too long to make ([pictures] timeout)")]
    TimedOut,
}

/// Makes a variant of an image: decode, orient, resize, encode. Takes milliseconds to a second, and up to twelve
/// bytes a pixel of the source.
pub fn render(
    bytes: &[u8],
    media_type: MediaType,
    variant: Variant,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    let picture = decode::decode(bytes, media_type, limits)?;
    limits.check_time()?;
    let picture = resize::resize(picture, variant.bounds())?;
    limits.check_time()?;
    encode::encode(&picture, variant, limits)
}

/// What is to be known of an image before its pixels are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preview {
    /// In pixels, as it is shown: with its orientation applied.
    pub width: u32,
    /// In pixels, as it is shown.
    pub height: u32,
    /// A ThumbHash (evanw/thumbhash): some 25 bytes that a script makes a blurred picture of.
    pub thumbhash: Vec<u8>,
}

/// The preview of an image.
pub fn preview(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Preview, PictureError> {
    /// The most that a ThumbHash is made of.
    const HASHED: u32 = 100;
    let picture = decode::decode(bytes, media_type, limits)?;
    let (width, height) = (picture.width(), picture.height());
    let bounds = resize::Bounds {
        width: Some(HASHED),
        height: Some(HASHED),
        fit: resize::Fit::Contain,
        enlarge: false,
    };
    let small: RgbaImage = resize::resize(picture, bounds)?.into_rgba8();
    let (w, h) = (small.width() as usize, small.height() as usize);
    let thumbhash = fast_thumbhash::rgba_to_thumb_hash(w, h, small.as_raw());
    Ok(Preview { width, height, thumbhash })
}

/// Whether a picture has pixels that aren't opaque.
fn is_transparent(picture: &DynamicImage) -> bool {
    match picture {
        DynamicImage::ImageRgba8(pixels) => pixels.pixels().any(|pixel| pixel.0[3] < 255),
        _ => false,
    }
}
