//! Decodes PNG.

use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, RgbImage, RgbaImage};

use super::super::{PictureError, RenderLimits};
use super::deadline::DeadlineReader;
use super::{Measure, broken, by_image, check_pixels, colours};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    // The decoder unpacks a profile when it is created, so the size is checked before that.
    check_pixels(png_size(bytes).unwrap_or((0, 0)), limits)?;
    let decoder = by_image::open(bytes, ImageFormat::Png, limits)?;
    let (size, colour) = (decoder.dimensions(), decoder.color_type());
    drop(decoder);
    let measure = by_image::measure(bytes, ImageFormat::Png, limits, |_, _| 0)?;
    if !is_read_by_rows(bytes, colour) {
        return Ok(measure);
    }
    Ok(Measure::new(size, measure.orientation, colour.has_alpha(), 0, bytes))
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    let mut decoder = by_image::open(bytes, ImageFormat::Png, limits)?;
    if !is_read_by_rows(bytes, decoder.color_type()) {
        drop(decoder);
        return by_image::decode(bytes, ImageFormat::Png, limits);
    }
    let profile = decoder.icc_profile().ok().flatten();
    let size = decoder.dimensions();
    drop(decoder);
    let mut picture = png_by_rows(bytes, size, limits).map_err(|error| broken(&error, limits))?;
    if let Some(profile) = profile {
        colours::to_srgb(&mut picture, &profile);
    }
    Ok(picture)
}

/// True for a PNG of 16 bits a channel that can be read row by row. Its pixels would take twice the memory, and their copy of
/// 8 bits a channel half as much again.
fn is_read_by_rows(bytes: &[u8], colour: ColorType) -> bool {
    /// The interlace method in the first chunk (PNG, third edition, §11.2.1).
    const INTERLACE: usize = 28;
    let is_deep =
        matches!(colour, ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16);
    is_deep && bytes.get(INTERLACE) == Some(&0)
}

/// Decodes a PNG of 16 bits a channel to 8 bits.
fn png_by_rows(
    bytes: &[u8],
    (width, height): (u32, u32),
    limits: RenderLimits,
) -> Result<DynamicImage, png::DecodingError> {
    /// Enough for rows. Nothing else is read.
    const MEMORY: usize = 64 << 20;
    let bytes_in_time = DeadlineReader::new(bytes, limits);
    let mut decoder = png::Decoder::new_with_limits(bytes_in_time, png::Limits { bytes: MEMORY });
    decoder.set_transformations(png::Transformations::EXPAND);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let mut reader = decoder.read_info()?;
    // A grey value is that of all three colours.
    let (colour, _depth) = reader.output_color_type();
    let [red, green, blue, alpha] = match colour {
        png::ColorType::Grayscale | png::ColorType::Indexed => [0, 0, 0, 0],
        png::ColorType::GrayscaleAlpha => [0, 0, 0, 1],
        png::ColorType::Rgb => [0, 1, 2, 0],
        png::ColorType::Rgba => [0, 1, 2, 3],
    };
    let channels: &[usize] =
        if alpha > 0 { &[red, green, blue, alpha] } else { &[red, green, blue] };
    let line = width as usize * channels.len();
    let mut pixels = vec![0; line * height as usize];
    for line in pixels.chunks_exact_mut(line) {
        let Some(row) = reader.next_row()? else { break };
        let (values, _) = row.data().as_chunks::<2>();
        let source = values.chunks_exact(colour.samples());
        for (pixel, values) in line.chunks_exact_mut(channels.len()).zip(source) {
            for (value, channel) in pixel.iter_mut().zip(channels) {
                *value = to_8_bits(u16::from_be_bytes(values[*channel]));
            }
        }
    }
    let picture = if alpha > 0 {
        RgbaImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgba8)
    } else {
        RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
    };
    Ok(picture.expect("each row has its pixels"))
}

/// Rounds as `image` does.
#[expect(clippy::cast_possible_truncation, reason = "65535 becomes 255")]
fn to_8_bits(value: u16) -> u8 {
    ((u32::from(value) + 128) / 257) as u8
}

/// Width and height of a PNG, with which its first chunk begins.
fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let (width, rest) = bytes.get(16..)?.split_first_chunk()?;
    Some((u32::from_be_bytes(*width), u32::from_be_bytes(*rest.first_chunk()?)))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    #[test]
    fn a_deep_png_that_is_read_row_by_row_is_the_same_picture() {
        let value = |x: u32, y: u32, channel: u32| {
            u16::try_from((x * 7919 + y * 104_729 + channel * 31_337) % 65_536).unwrap()
        };
        let (width, height) = (61, 33);
        let pixel = |x, y| [0, 1, 2, 3].map(|channel| value(x, y, channel));
        let whole = ::image::ImageBuffer::from_fn(width, height, |x, y| ::image::Rgba(pixel(x, y)));
        let whole = DynamicImage::ImageRgba16(whole);
        let limits = RenderLimits { pixels: 10_000, deadline: None };
        for picture in [
            DynamicImage::ImageLuma16(whole.to_luma16()),
            DynamicImage::ImageLumaA16(whole.to_luma_alpha16()),
            DynamicImage::ImageRgb16(whole.to_rgb16()),
            whole,
        ] {
            let mut bytes = Cursor::new(Vec::new());
            picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
            let bytes = bytes.into_inner();
            assert!(is_read_by_rows(&bytes, picture.color()));
            let shown = decode(&bytes, MediaType::Png, limits).unwrap();
            if picture.color().has_alpha() {
                assert_eq!(shown, DynamicImage::ImageRgba8(picture.to_rgba8()));
            } else {
                assert_eq!(shown, DynamicImage::ImageRgb8(picture.to_rgb8()));
            }
            // A part of a picture is none.
            let cut = &bytes[..bytes.len() / 2];
            let error = decode(cut, MediaType::Png, limits).unwrap_err();
            assert!(matches!(error, PictureError::Broken(_)), "{error}");
        }
    }
}
