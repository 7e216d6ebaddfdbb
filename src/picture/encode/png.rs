//! PNG in the smallest form that has exactly these pixels: grey, indexed or in colours.

use std::borrow::Cow;
use std::io::Write;
use std::time::Instant;

use image::DynamicImage;
use png::{BitDepth, ColorType, Compression, Encoder, Filter};

use super::flatness::flatness;
use super::{Output, failed};
use crate::picture::{PictureError, RenderLimits};

type Colour = [u8; 4];

/// Encodes a picture without loss.
pub(super) fn encode(
    picture: &DynamicImage,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    /// Pixels of a thumbnail.
    const SMALL: u64 = 1 << 16;
    /// Flatness of drawings and interfaces.
    const FLAT: f32 = 0.5;
    let size = (picture.width(), picture.height());
    let forms = match picture {
        DynamicImage::ImageRgb8(picture) => {
            let pixels = picture.pixels().map(|pixel| {
                let [r, g, b] = pixel.0;
                [r, g, b, 255]
            });
            forms(&pixels, size.0, ColorType::Rgb, picture.as_raw())
        }
        DynamicImage::ImageRgba8(picture) => {
            let pixels = picture.pixels().map(|pixel| pixel.0);
            forms(&pixels, size.0, ColorType::Rgba, picture.as_raw())
        }
        other => return encode(&DynamicImage::ImageRgba8(other.to_rgba8()), limits),
    };
    limits.check_time()?;
    // Twice the time makes photographs half a per cent smaller, and flat pictures 1 to 5.
    let level = if area(size) <= SMALL || flatness(picture) > FLAT { 2 } else { 1 };
    let mut smallest: Option<Vec<u8>> = None;
    for form in forms {
        let bytes = if area(size) <= OPTIMISED_PIXELS {
            form.optimise(size, level, limits)?
        } else {
            form.encode(size, limits)?
        };
        if smallest.as_ref().is_none_or(|it| bytes.len() < it.len()) {
            smallest = Some(bytes);
        }
    }
    smallest.ok_or_else(|| failed(&"the picture has no form in PNG"))
}

fn area((width, height): (u32, u32)) -> u64 {
    u64::from(width) * u64::from(height)
}

/// Pixels up to which oxipng works. Its steps can't be stopped, and take six times the memory of the pixels.
pub(super) const OPTIMISED_PIXELS: u64 = 1 << 21;

/// The pixels of a picture in one of the forms of PNG (PNG, third edition, §6.1).
struct Form<'a> {
    colour: ColorType,
    /// Bits of a sample.
    depth: u8,
    palette: Option<Palette>,
    /// Rows that begin at a byte.
    samples: Cow<'a, [u8]>,
}

/// The forms that are worth a trial. There are two of up to 256 colours, which may be flat or a slope.
fn forms<'raw>(
    pixels: &(impl Iterator<Item = Colour> + Clone),
    width: u32,
    colour: ColorType,
    raw: &'raw [u8],
) -> Vec<Form<'raw>> {
    let width = width as usize;
    let Survey { is_opaque, grey_depth, palette } =
        Survey::of(pixels.clone(), colour == ColorType::Rgba);
    let form = |colour, depth, samples| Form { colour, depth, palette: None, samples };
    let direct = || match (grey_depth, is_opaque) {
        (Some(depth), true) => {
            let samples = pixels.clone().map(|[grey, ..]| grey >> (8 - depth));
            form(ColorType::Grayscale, depth, Cow::Owned(pack(samples, width, depth)))
        }
        (Some(_), false) => {
            let samples = pixels.clone().flat_map(|[grey, _, _, alpha]| [grey, alpha]).collect();
            form(ColorType::GrayscaleAlpha, 8, Cow::Owned(samples))
        }
        (None, true) if colour == ColorType::Rgba => {
            let samples = pixels.clone().flat_map(|[r, g, b, _]| [r, g, b]).collect();
            form(ColorType::Rgb, 8, Cow::Owned(samples))
        }
        _ => form(colour, 8, Cow::Borrowed(raw)),
    };

    let Some(mut palette) = palette else { return vec![direct()] };
    let depth = palette.depth();
    if grey_depth.is_some_and(|grey_depth| is_opaque && grey_depth <= depth) {
        return vec![direct()];
    }
    palette.sort();
    let indices = pixels.clone().filter_map(|colour| palette.index(colour));
    let samples = Cow::Owned(pack(indices, width, depth));
    let indexed = Form { colour: ColorType::Indexed, depth, palette: Some(palette), samples };
    if depth < 8 && indexed.samples.len() > 1024 { vec![indexed] } else { vec![indexed, direct()] }
}

impl Form<'_> {
    /// Encodes by oxipng: tries filters and orders of the palette, and compresses by libdeflate.
    fn optimise(
        self,
        (width, height): (u32, u32),
        level: u8,
        limits: RenderLimits,
    ) -> Result<Vec<u8>, PictureError> {
        let colour = match self.colour {
            ColorType::Grayscale => oxipng::ColorType::Grayscale { transparent_shade: None },
            ColorType::GrayscaleAlpha => oxipng::ColorType::GrayscaleAlpha,
            ColorType::Rgb => oxipng::ColorType::RGB { transparent_color: None },
            ColorType::Rgba => oxipng::ColorType::RGBA,
            ColorType::Indexed => {
                let colours = self.palette.iter().flat_map(|palette| &palette.colours);
                let palette =
                    colours.map(|[r, g, b, a]| oxipng::RGBA8::new(*r, *g, *b, *a)).collect();
                oxipng::ColorType::Indexed { palette }
            }
        };
        let depth = match self.depth {
            1 => oxipng::BitDepth::One,
            2 => oxipng::BitDepth::Two,
            4 => oxipng::BitDepth::Four,
            _ => oxipng::BitDepth::Eight,
        };
        let mut options = oxipng::Options::from_preset(level);
        options.timeout = limits.deadline.map(|it| it.saturating_duration_since(Instant::now()));
        let outcome =
            oxipng::RawImage::new(width, height, colour, depth, self.samples.into_owned())
                .and_then(|picture| picture.create_optimized_png(&options));
        limits.check_time()?;
        outcome.map_err(|error| failed(&error))
    }

    /// Encodes row by row, in little memory.
    fn encode(&self, size: (u32, u32), limits: RenderLimits) -> Result<Vec<u8>, PictureError> {
        let mut output = Output::new(limits);
        let outcome = self.write(size, &mut output);
        limits.check_time()?;
        outcome.map_err(|error| failed(&error))?;
        Ok(output.bytes)
    }

    fn write(
        &self,
        (width, height): (u32, u32),
        output: &mut Output,
    ) -> Result<(), png::EncodingError> {
        /// Bytes of an IDAT chunk.
        const CHUNK: usize = 1 << 16;
        let limits = output.limits;
        let mut encoder = Encoder::new(output, width, height);
        encoder.set_color(self.colour);
        encoder.set_depth(match self.depth {
            1 => BitDepth::One,
            2 => BitDepth::Two,
            4 => BitDepth::Four,
            _ => BitDepth::Eight,
        });
        if let Some(palette) = &self.palette {
            let colours = palette.colours.iter();
            encoder.set_palette(
                colours.clone().flat_map(|[r, g, b, _]| [*r, *g, *b]).collect::<Vec<_>>(),
            );
            let transparent = colours.map(|colour| colour[3]).take_while(|alpha| *alpha < 255);
            let transparent: Vec<_> = transparent.collect();
            if !transparent.is_empty() {
                encoder.set_trns(transparent);
            }
        }
        // Filters help slopes and noise. Indices repeat better without them.
        let has_slopes = self.depth == 8 && self.colour != ColorType::Indexed;
        encoder.set_compression(Compression::Balanced);
        encoder.set_filter(if has_slopes { Filter::Adaptive } else { Filter::NoFilter });
        let mut writer = encoder.write_header()?;
        let mut rows = writer.stream_writer_with_size(CHUNK)?;
        for part in self.samples.chunks(CHUNK) {
            rows.write_all(part)?;
            limits.check_time().map_err(std::io::Error::other)?;
        }
        rows.finish()?;
        writer.finish()
    }
}

/// The colours of a picture.
struct Survey {
    is_opaque: bool,
    /// Bits of a sample of grey; `None` for a picture in colours.
    grey_depth: Option<u8>,
    /// `None` for more than 256 colours.
    palette: Option<Palette>,
}

impl Survey {
    fn of(pixels: impl Iterator<Item = Colour>, has_alpha: bool) -> Self {
        let mut survey =
            Survey { is_opaque: true, grey_depth: Some(1), palette: Some(Palette::new()) };
        let mut last = None;
        for colour in pixels {
            if last == Some(colour) {
                continue;
            }
            last = Some(colour);
            let [r, g, b, alpha] = colour;
            survey.is_opaque &= alpha == 255;
            survey.grey_depth = match survey.grey_depth {
                Some(depth) if r == g && g == b => Some(depth.max(grey_depth(r))),
                _ => None,
            };
            if survey.palette.as_mut().is_some_and(|palette| palette.index(colour).is_none()) {
                survey.palette = None;
            }
            let may_be_opaque = has_alpha && survey.is_opaque;
            if survey.grey_depth.is_none() && survey.palette.is_none() && !may_be_opaque {
                break;
            }
        }
        survey
    }
}

/// The fewest bits of a sample that has exactly this value (PNG, third edition, §13.12).
fn grey_depth(value: u8) -> u8 {
    match value {
        0 | 255 => 1,
        _ if value.is_multiple_of(85) => 2,
        _ if value.is_multiple_of(17) => 4,
        _ => 8,
    }
}

/// Packs samples into bytes, the first one in the high bits (PNG, third edition, §7.2).
fn pack(samples: impl Iterator<Item = u8>, width: usize, depth: u8) -> Vec<u8> {
    if depth == 8 {
        return samples.collect();
    }
    let mut bytes = Vec::new();
    let (mut column, mut byte, mut free) = (0, 0, 8);
    for sample in samples {
        column += 1;
        free -= depth;
        byte |= sample << free;
        if free == 0 || column == width {
            bytes.push(byte);
            (byte, free) = (0, 8);
        }
        if column == width {
            column = 0;
        }
    }
    bytes
}

/// Up to 256 colours, and a hash table of their indices.
struct Palette {
    colours: Vec<Colour>,
    /// Indices, with open addressing.
    slots: Vec<Option<u8>>,
}

impl Palette {
    const SLOT_BITS: u32 = 10;

    fn new() -> Self {
        Palette { colours: Vec::new(), slots: vec![None; 1 << Self::SLOT_BITS] }
    }

    /// The index of a colour, which is added if it is missing. `None` if there is no room for it.
    fn index(&mut self, colour: Colour) -> Option<u8> {
        // Fibonacci hashing.
        let hash = u32::from_le_bytes(colour).wrapping_mul(0x9E37_79B9);
        let mut slot = (hash >> (u32::BITS - Self::SLOT_BITS)) as usize;
        // A quarter of the slots is used at most, so that there is an empty one.
        while let Some(index) = self.slots[slot] {
            if self.colours[usize::from(index)] == colour {
                return Some(index);
            }
            slot = (slot + 1) % self.slots.len();
        }
        let index = u8::try_from(self.colours.len()).ok()?;
        self.colours.push(colour);
        self.slots[slot] = Some(index);
        Some(index)
    }

    /// Puts the transparent colours first, since tRNS ends with the last of them.
    fn sort(&mut self) {
        let mut colours = std::mem::replace(self, Self::new()).colours;
        colours.sort_by_key(|colour| colour[3] == 255);
        for colour in colours {
            self.index(colour);
        }
    }

    /// Bits of an index.
    fn depth(&self) -> u8 {
        match self.colours.len() {
            0..=2 => 1,
            3..=4 => 2,
            5..=16 => 4,
            _ => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use image::{Rgba, RgbaImage};

    use super::*;
    use crate::image::MediaType;
    use crate::picture::decode;

    const LIMITS: RenderLimits = RenderLimits { pixels: 10_000_000, deadline: None };

    /// Encodes by both encoders, and checks the pixels. Returns bits of a sample and colour type (IHDR).
    fn encoded(picture: &RgbaImage) -> (u8, u8) {
        let mut head = None;
        let opaque = picture.pixels().all(|it| it.0[3] == 255);
        let mut pictures = vec![DynamicImage::ImageRgba8(picture.clone())];
        if opaque {
            pictures.push(DynamicImage::ImageRgb8(pictures[0].to_rgb8()));
        }
        for picture in pictures {
            let size = (picture.width(), picture.height());
            let rgba = picture.to_rgba8();
            for form in forms(&rgba.pixels().map(|it| it.0), size.0, ColorType::Rgba, rgba.as_raw())
            {
                let bytes = form.encode(size, LIMITS).unwrap();
                assert_eq!(
                    decode::decode(&bytes, MediaType::Png, LIMITS).unwrap().to_rgba8(),
                    rgba
                );
            }
            let bytes = encode(&picture, LIMITS).unwrap();
            assert_eq!(decode::decode(&bytes, MediaType::Png, LIMITS).unwrap().to_rgba8(), rgba);
            head = Some((bytes[24], bytes[25]));
        }
        head.unwrap()
    }

    #[test]
    fn a_picture_of_few_colours_has_few_bits() {
        let hue = |index: u32| {
            let byte = |value: u32| u8::try_from(value & 255).unwrap();
            Rgba([byte(index * 53), byte(index * 101 + 40), byte(index * 29 + 90), 255])
        };
        // Odd widths end rows within a byte.
        for (count, depth) in [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)] {
            let picture = RgbaImage::from_fn(131, 97, |x, y| hue((x / 3 + y * y) % count));
            assert_eq!(encoded(&picture), (depth, 3), "{count} colours");
        }
        let byte = |value: u32| u8::try_from(value & 255).unwrap();
        let many = RgbaImage::from_fn(131, 97, |x, y| Rgba([byte(x), byte(y), byte(x ^ y), 255]));
        assert_eq!(encoded(&many), (8, 2));
    }

    #[test]
    fn a_grey_picture_has_no_colours() {
        for (step, depth) in [(255, 1), (85, 2), (17, 4), (1, 8)] {
            let picture = RgbaImage::from_fn(131, 97, |x, y| {
                let value = u8::try_from((x * 3 + y) % (255 / step + 1) * step).unwrap();
                Rgba([value, value, value, 255])
            });
            assert_eq!(encoded(&picture), (depth, 0), "steps of {step}");
        }
        let translucent = RgbaImage::from_fn(131, 97, |x, y| {
            let byte = |value: u32| u8::try_from(value & 255).unwrap();
            Rgba([byte(x * 5), byte(x * 5), byte(x * 5), byte(y * x)])
        });
        assert_eq!(encoded(&translucent), (8, 4));
    }

    #[test]
    fn a_palette_keeps_alpha_and_the_colour_below_it() {
        let colours = [[255, 0, 0, 255], [0, 0, 255, 0], [0, 255, 0, 0], [9, 9, 9, 77]];
        let picture = RgbaImage::from_fn(64, 64, |x, y| Rgba(colours[((x + y / 7) % 4) as usize]));
        assert_eq!(encoded(&picture), (2, 3));
    }

    #[test]
    fn a_single_pixel_and_a_single_row_are_encoded() {
        for (width, height) in [(1, 1), (9, 1), (1, 9)] {
            encoded(&RgbaImage::from_pixel(width, height, Rgba([1, 2, 3, 4])));
            encoded(&RgbaImage::from_pixel(width, height, Rgba([255, 255, 255, 255])));
        }
    }
}
