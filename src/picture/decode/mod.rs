//! From bytes to pixels: 8 bits a channel, sRGB. Each module decodes one format.
//!
//! A picture that a decoder gets wrong is refused, so that the original is served: never wrong pixels.

mod animated;
pub(super) mod animation;
#[cfg(feature = "read-avif")]
pub(super) mod avif;
mod bmp;
mod colours;
mod deadline;
pub(super) mod exif;
mod gif;
mod ico;
mod jpeg;
#[cfg(feature = "read-jxl")]
pub(super) mod jxl;
mod large_jpeg;
mod png;
mod tiff;
mod webp;

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::DynamicImage;
use image::metadata::Orientation;

pub use self::animated::is_animated;
pub(super) use self::animated::png_frames;
use super::{PictureError, RenderLimits, resize};
use crate::image::MediaType;
use crate::image::bounds::Bounds;

/// A decoded picture, not yet upright: a small one is turned in less time and memory.
#[derive(Debug)]
pub(super) struct Decoded {
    pixels: DynamicImage,
    orientation: Orientation,
}

impl Decoded {
    /// Width and height with the orientation applied.
    pub(super) fn upright(&self) -> (u32, u32) {
        upright((self.pixels.width(), self.pixels.height()), self.orientation)
    }

    /// Fits the picture into bounds, and applies the orientation.
    pub(super) fn resized(self, bounds: Bounds) -> Result<DynamicImage, PictureError> {
        let mut picture = resize::resize(self.pixels, unturned(bounds, self.orientation))?;
        picture.apply_orientation(self.orientation);
        Ok(picture)
    }

    /// Fits the picture into one bounds and into others, and applies the orientation to both.
    pub(super) fn resized_twice(
        self,
        one: Bounds,
        other: Bounds,
    ) -> Result<(DynamicImage, DynamicImage), PictureError> {
        let [one, other] = [one, other].map(|bounds| unturned(bounds, self.orientation));
        let (mut one, mut other) = resize::resize_twice(self.pixels, one, other)?;
        one.apply_orientation(self.orientation);
        other.apply_orientation(self.orientation);
        Ok((one, other))
    }
}

/// Bounds for a picture before its orientation is applied.
fn unturned(bounds: Bounds, orientation: Orientation) -> Bounds {
    match upright((0, 1), orientation) {
        (0, _) => bounds,
        _turned => Bounds { width: bounds.height, height: bounds.width, ..bounds },
    }
}

/// The size of a picture after its orientation is applied.
fn upright((width, height): (u32, u32), orientation: Orientation) -> (u32, u32) {
    match orientation {
        Orientation::Rotate90
        | Orientation::Rotate270
        | Orientation::Rotate90FlipH
        | Orientation::Rotate270FlipH => (height, width),
        Orientation::NoTransforms
        | Orientation::Rotate180
        | Orientation::FlipHorizontal
        | Orientation::FlipVertical => (width, height),
    }
}

/// The size of a source, and the memory that its pixels take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measure {
    size: (u32, u32),
    orientation: Orientation,
    /// Bytes that decoding takes at most, the product included.
    decoding: u64,
    /// Bytes of the decoded picture.
    decoded: u64,
    /// Bytes held beside the decoded picture while it is scaled.
    held: u64,
}

impl Measure {
    /// Measures a source. `beside` are the bytes that its decoder needs at most, beside the decoded picture and the source.
    fn new(
        size: (u32, u32),
        orientation: Orientation,
        has_alpha: bool,
        beside: u64,
        source: &[u8],
    ) -> Measure {
        let decoded = pixels(size) * if has_alpha { 4 } else { 3 };
        let decoding = decoded + beside + 2 * source.len() as u64;
        Measure { size, orientation, decoding, decoded, held: 0 }
    }

    /// The same for a picture that a process of its own decodes. Both processes hold its pixels as PNG for a while.
    fn apart(self) -> Measure {
        Measure { decoding: self.decoding + 2 * self.decoded, held: self.decoded, ..self }
    }

    /// Bytes that decoding takes at most.
    pub(super) fn decoding(&self) -> u64 {
        self.decoding
    }

    /// Width and height with the orientation applied.
    pub(super) fn upright(&self) -> (u32, u32) {
        upright(self.size, self.orientation)
    }

    /// True if the decoded picture has alpha.
    pub(super) fn may_be_transparent(&self) -> bool {
        self.decoded > 3 * pixels(self.size)
    }

    /// Bytes that decoding takes at most, and scaling to a size.
    pub(super) fn memory(&self, width: u32, height: u32) -> u64 {
        let (width, height) = (u64::from(width), u64::from(height));
        let (_, rows) = self.upright();
        // The product, its copy that is turned, and between the two passes over the source all of its rows.
        let scaling = 4 * width * (2 * height + u64::from(rows).max(height));
        self.decoding.max(self.decoded + self.held + scaling)
    }
}

/// Width times height.
fn pixels((width, height): (u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

/// Refuses a picture of too many pixels. Comes before anything is allocated for them.
fn check_pixels(size: (u32, u32), limits: RenderLimits) -> Result<(), PictureError> {
    let (width, height) = size;
    if pixels(size) > limits.pixels {
        return Err(PictureError::TooManyPixels { width, height, limit: limits.pixels });
    }
    Ok(())
}

/// Decodes an image, or its first frame, with the orientation applied and the colours converted to sRGB.
pub fn decode(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<DynamicImage, PictureError> {
    let Decoded { mut pixels, orientation } = decode_unturned(bytes, media_type, limits)?;
    pixels.apply_orientation(orientation);
    Ok(pixels)
}

/// The same as [`decode`], but for the orientation.
pub(super) fn decode_unturned(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Decoded, PictureError> {
    guarded(|| decode_or_panic(bytes, media_type, limits))
}

/// Measures an image, or its first frame, by its head.
pub(super) fn measure(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Measure, PictureError> {
    guarded(|| measure_or_panic(bytes, media_type, limits))
}

fn guarded<T>(decode: impl FnOnce() -> Result<T, PictureError>) -> Result<T, PictureError> {
    // A decoder that panics on what nobody tried yet refuses a picture. Nothing that it leaves behind is used again.
    let decoded = catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_panic| Err(PictureError::Unsupported("the decoder panicked".to_owned())));
    decoded.map_err(|error| match error {
        PictureError::TimedOut => PictureError::DecodingTimedOut,
        error => error,
    })
}

fn measure_or_panic(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Measure, PictureError> {
    let measured = match media_type {
        MediaType::Png => png::measure(bytes, limits),
        MediaType::Jpeg => jpeg::measure(bytes, limits),
        MediaType::Gif => gif::measure(bytes, limits),
        MediaType::WebP => webp::measure(bytes, limits),
        MediaType::Bmp => bmp::measure(bytes, limits),
        MediaType::Ico => ico::measure(bytes, limits),
        MediaType::Tiff => tiff::measure(bytes, limits),
        #[cfg(feature = "read-avif")]
        MediaType::Avif => avif::measure(bytes, limits),
        #[cfg(not(feature = "read-avif"))]
        MediaType::Avif => Err(PictureError::Opaque(media_type)),
        #[cfg(feature = "read-jxl")]
        MediaType::JpegXl => jxl::measure(bytes, limits),
        #[cfg(not(feature = "read-jxl"))]
        MediaType::JpegXl => Err(PictureError::Opaque(media_type)),
        MediaType::Heic | MediaType::Svg => Err(PictureError::Opaque(media_type)),
    }?;
    Ok(if media_type.is_decoded_apart() { measured.apart() } else { measured })
}

fn decode_or_panic(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<Decoded, PictureError> {
    // The decoders rely on it: it has refused what is too large.
    let Measure { orientation, .. } = measure_or_panic(bytes, media_type, limits)?;
    let pixels = match media_type {
        MediaType::Png => png::decode(bytes, limits),
        MediaType::Jpeg => jpeg::decode(bytes, limits),
        MediaType::Gif => gif::decode(bytes, limits),
        MediaType::WebP => webp::decode(bytes, limits),
        MediaType::Bmp => bmp::decode(bytes, limits),
        MediaType::Ico => ico::decode(bytes, limits),
        MediaType::Tiff => tiff::decode(bytes, limits),
        #[cfg(feature = "read-avif")]
        MediaType::Avif => avif::decode(bytes, limits),
        #[cfg(not(feature = "read-avif"))]
        MediaType::Avif => Err(PictureError::Opaque(media_type)),
        #[cfg(feature = "read-jxl")]
        MediaType::JpegXl => jxl::decode(bytes, limits),
        #[cfg(not(feature = "read-jxl"))]
        MediaType::JpegXl => Err(PictureError::Opaque(media_type)),
        MediaType::Heic | MediaType::Svg => Err(PictureError::Opaque(media_type)),
    }?;
    Ok(Decoded { pixels, orientation })
}

#[cfg(any(feature = "read-avif", feature = "read-jxl"))]
fn unsupported(text: &str) -> PictureError {
    PictureError::Unsupported(text.to_owned())
}

/// An error of a decoder for the client: the deadline, or else the first line of its text, shortened.
fn broken(error: &dyn std::fmt::Display, limits: RenderLimits) -> PictureError {
    if let Err(late) = limits.check_time() {
        return late;
    }
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    PictureError::Broken(line.chars().take(200).collect())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::ImageFormat;

    use super::*;

    #[test]
    fn a_source_is_measured_by_its_head() {
        let limits = RenderLimits { pixels: 100_000_000, deadline: None };
        let decoding = |picture: &DynamicImage, format, media_type| {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, format).unwrap();
            let bytes = bytes.into_inner();
            let measure = measure(&bytes, media_type, limits).unwrap();
            (measure.decoding - 2 * bytes.len() as u64) / 10_000
        };
        let (png, jpeg) =
            ((ImageFormat::Png, MediaType::Png), (ImageFormat::Jpeg, MediaType::Jpeg));
        for (picture, (format, media_type), bytes) in [
            (DynamicImage::new_rgb8(100, 100), png, 3),
            (DynamicImage::new_rgba8(100, 100), png, 4),
            (DynamicImage::new_rgba16(100, 100), png, 4),
            // Row by row.
            (DynamicImage::new_luma8(100, 100), png, 3),
            // Planes of 104×104 samples, their coefficients, and the product.
            (DynamicImage::new_rgb8(100, 100), jpeg, 9 + 3),
            // The strip twice, the picture, and a row of values.
            (
                DynamicImage::new_rgba16(100, 100),
                (ImageFormat::Tiff, MediaType::Tiff),
                8 + 8 + 4 + 2,
            ),
        ] {
            assert_eq!(decoding(&picture, format, media_type), bytes, "{format:?}");
        }
        let too_large = RenderLimits { pixels: 9_999, deadline: None };
        let mut bytes = Cursor::new(Vec::new());
        DynamicImage::new_rgb8(100, 100).write_to(&mut bytes, ImageFormat::Png).unwrap();
        let refused = measure(bytes.get_ref(), MediaType::Png, too_large);
        assert!(matches!(refused, Err(PictureError::TooManyPixels { .. })), "{refused:?}");
    }
}
