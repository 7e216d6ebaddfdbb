//! Baseline JPEG in one scan, by jpeg-encoder.

use std::borrow::Cow;

use image::{DynamicImage, Rgb, RgbImage};
use jpeg_encoder::{ChromaSubsamplingMethod, ColorType, Encoder, SamplingFactor};

use super::{Output, failed, huffman};
use crate::picture::{PictureError, RenderLimits};

/// Encodes a picture. Transparent pixels are put on white, the background of most pages.
pub fn encode(
    picture: &DynamicImage,
    quality: u8,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    /// Highest quality at which four pixels share a colour, as with sharp.
    const LAST_SUBSAMPLED: u8 = 90;
    let flat = flatten(picture);
    let sides = (u16::try_from(flat.width()), u16::try_from(flat.height()));
    let (Ok(width), Ok(height)) = sides else {
        return Err(failed(&"JPEG has at most 65,535 pixels a side"));
    };
    let mut output = Output::new(limits);
    // With optimised tables the encoder would write a scan for each component. Few others do, and some decoders make
    // stripes of that.
    let mut encoder = Encoder::new(&mut output, quality);
    let subsampled = quality <= LAST_SUBSAMPLED;
    encoder.set_sampling_factor(if subsampled {
        SamplingFactor::F_2_2
    } else {
        SamplingFactor::F_1_1
    });
    // The default takes the colour of one pixel for all four, which frays edges between colours.
    encoder.set_chroma_subsampling_method(ChromaSubsamplingMethod::Average);
    let outcome = if flat.pixels().all(|Rgb([r, g, b])| r == g && g == b) {
        let grey: Vec<u8> = flat.pixels().map(|pixel| pixel.0[0]).collect();
        encoder.encode(&grey, width, height, ColorType::Luma)
    } else {
        encoder.encode(flat.as_raw(), width, height, ColorType::Rgb)
    };
    output.check_time()?;
    outcome.map_err(|error| failed(&error))?;
    let bytes = output.bytes;
    // Beyond a byte for each pixel the gain is small, and the memory isn't.
    let is_dense = bytes.len() as u64 > 4096 + u64::from(width) * u64::from(height);
    let optimised = if is_dense { None } else { huffman::optimise(&bytes) };
    Ok(optimised.unwrap_or(bytes))
}

#[expect(clippy::cast_possible_truncation, reason = "an average of bytes is a byte")]
fn flatten(picture: &DynamicImage) -> Cow<'_, RgbImage> {
    match picture {
        DynamicImage::ImageRgb8(pixels) => Cow::Borrowed(pixels),
        DynamicImage::ImageRgba8(pixels) => {
            Cow::Owned(RgbImage::from_fn(pixels.width(), pixels.height(), |x, y| {
                let [r, g, b, a] = pixels.get_pixel(x, y).0;
                let alpha = u32::from(a);
                let on_white =
                    |it| ((u32::from(it) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
                Rgb([r, g, b].map(on_white))
            }))
        }
        _ => Cow::Owned(picture.to_rgb8()),
    }
}
