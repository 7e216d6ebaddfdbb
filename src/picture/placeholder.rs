//! Draws placeholders: a background with a readable text in the middle.

use ab_glyph::{Font, FontRef, GlyphId, PxScale, point};
use image::{DynamicImage, Rgb, RgbImage};

use super::{PictureError, RenderLimits, encode};

/// Longest text drawn, in characters; the rest is cut off.
pub const MAX_TEXT: usize = 100;

/// Inter Semi Bold (SIL Open Font License 1.1) with the characters of European languages only, made by
/// `assets/subset.py`.
const FONT: &[u8] = include_bytes!("../../assets/placeholder.otf");

/// Share of the width and of the height that the text leaves free at either end.
const MARGIN: f32 = 0.08;
/// Largest share of the height that a line takes.
const LINE_SHARE: f32 = 0.25;
const MAX_LINES: usize = 3;
/// Factor by which a further line must make the letters larger.
const WORTH_A_LINE: f32 = 1.2;
/// Lowest line with letters, in pixels: in lower lines they would be specks, so none are drawn.
const LOWEST_LINE: f32 = 6.0;

/// Least contrast of readable text (WCAG 2.2 §1.4.3).
const LEAST_CONTRAST: f32 = 4.5;
/// Colours of text in the order of preference. On any single colour black or white reaches a contrast of 4.58.
const TEXT_COLOURS: [Rgb<u8>; 3] = [Rgb([51, 65, 85]), Rgb([255, 255, 255]), Rgb([0, 0, 0])];

/// The size and content of a placeholder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placeholder {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The background of the text.
    pub background: Background,
    /// The colour of the text; `None` for one that is readable on the background.
    pub text_colour: Option<Rgb<u8>>,
    /// The text; `None` for the size, as in `640×400`. It may be empty.
    ///
    /// It is wrapped at white space. Characters that the font lacks show as boxes.
    pub text: Option<String>,
}

/// The background of a placeholder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Background {
    /// One colour.
    Plain(Rgb<u8>),
    /// From the first colour at the top left to the second one at the bottom right.
    Gradient(Rgb<u8>, Rgb<u8>),
}

impl Default for Background {
    /// A blue grey that gets darker and keeps its tint. Lossy WebP would make stripes of blue and green of a tint that
    /// changes this slowly, and a tenth more bytes.
    fn default() -> Self {
        Self::Gradient(Rgb([234, 239, 247]), Rgb([196, 201, 209]))
    }
}

/// Renders a placeholder as WebP in as few bytes as possible, since it is rendered once.
pub fn webp(placeholder: &Placeholder, limits: RenderLimits) -> Result<Vec<u8>, PictureError> {
    const QUALITY: u8 = 85;
    const EFFORT: u8 = 6;
    let picture = DynamicImage::ImageRgb8(draw(placeholder));
    let lossy = encode::webp(&picture, QUALITY, EFFORT, limits)?;
    // Lossless WebP of a gradient takes many times as long, and with a text on the default one it is larger.
    if matches!(placeholder.background, Background::Gradient(..)) {
        return Ok(lossy);
    }
    let exact = encode::exact_webp(&picture, limits)?;
    Ok(if exact.len() < lossy.len() { exact } else { lossy })
}

/// The memory that [`webp`] takes at most, in bytes: the lossless encoder takes most of it.
#[must_use]
pub fn memory(placeholder: &Placeholder) -> u64 {
    28 * u64::from(placeholder.width) * u64::from(placeholder.height)
}

/// Draws a placeholder in three bytes a pixel: 1920×1080 takes about 5 ms, 4096×4096 about 40.
#[must_use]
pub fn draw(placeholder: &Placeholder) -> RgbImage {
    let &Placeholder { width, height, background, text_colour, ref text } = placeholder;
    let ramp = ramp(background, width, height);
    let mut picture = paint(&ramp, width, height);

    let font = FontRef::try_from_slice(FONT).expect("each test that draws reads it");
    let text = text.clone().unwrap_or_else(|| format!("{width}×{height}"));
    let Some(lettering) = Lettering::fit(&font, &text, width, height) else {
        return picture;
    };
    let text_colour = text_colour.or_else(|| readable_on(&ramp)).unwrap_or_else(|| {
        // The gradient runs from so dark to so light that no colour is readable on all of it.
        let plate = ramp[ramp.len() / 2];
        lettering.fill_behind(&mut picture, plate);
        readable_on(&[plate]).unwrap_or(TEXT_COLOURS[0])
    });
    lettering.draw(&font, &mut picture, text_colour);
    picture
}

/// Parses a colour: `rrggbb` or `rgb` in hexadecimal digits of either case.
#[must_use]
pub fn parse_colour(text: &str) -> Option<Rgb<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|it| u8::try_from(it).ok());
    let digits: Vec<u8> = text.as_bytes().iter().map(digit).collect::<Option<_>>()?;
    match digits[..] {
        [red, green, blue] => Some(Rgb([red, green, blue].map(|value| value * 0x11))),
        [r1, r2, g1, g2, b1, b2] => Some(Rgb([r1 << 4 | r2, g1 << 4 | g2, b1 << 4 | b2])),
        _ => None,
    }
}

/// The colours from corner to corner. A diagonal at 45° has one colour, so row `y` has the colours from `y` on.
fn ramp(background: Background, width: u32, height: u32) -> Vec<Rgb<u8>> {
    let count = (width + height).saturating_sub(1);
    match background {
        Background::Plain(colour) => vec![colour; count as usize],
        Background::Gradient(from, to) => {
            (0..count).map(|at| mix(from, to, at, count.saturating_sub(1).max(1))).collect()
        }
    }
}

fn mix(from: Rgb<u8>, to: Rgb<u8>, part: u32, whole: u32) -> Rgb<u8> {
    let channel = |index: usize| {
        let (from, to) = (u32::from(from.0[index]), u32::from(to.0[index]));
        let value = (from * (whole - part) + to * part + whole / 2) / whole;
        u8::try_from(value).unwrap_or(u8::MAX)
    };
    Rgb([channel(0), channel(1), channel(2)])
}

/// Paints the background without dithering: steps of one value are hardly visible, and repeated rows compress well.
fn paint(ramp: &[Rgb<u8>], width: u32, height: u32) -> RgbImage {
    let colours: Vec<u8> = ramp.iter().flat_map(|colour| colour.0).collect();
    let row = 3 * width as usize;
    let mut pixels = Vec::with_capacity(row * height as usize);
    for y in 0..height as usize {
        pixels.extend_from_slice(&colours[3 * y..3 * y + row]);
    }
    RgbImage::from_raw(width, height, pixels).expect("there are as many rows as it is high")
}

/// The first text colour with enough contrast to each of the colours.
fn readable_on(colours: &[Rgb<u8>]) -> Option<Rgb<u8>> {
    let mut distinct = colours.to_vec();
    distinct.dedup();
    let backgrounds: Vec<f32> = distinct.into_iter().map(luminance).collect();
    TEXT_COLOURS.into_iter().find(|text_colour| {
        let text_colour = luminance(*text_colour);
        backgrounds.iter().all(|background| contrast(text_colour, *background) >= LEAST_CONTRAST)
    })
}

/// The relative luminance of WCAG 2.2.
fn luminance(colour: Rgb<u8>) -> f32 {
    let [red, green, blue] = colour.0.map(|value| {
        let value = f32::from(value) / 255.0;
        if value <= 0.04045 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
    });
    0.2126 * red + 0.7152 * green + 0.0722 * blue
}

/// The contrast ratio of WCAG 2.2 between two luminances, from 1 to 21.
fn contrast(one: f32, other: f32) -> f32 {
    (one.max(other) + 0.05) / (one.min(other) + 0.05)
}

/// A text with its lines, size and place.
struct Lettering {
    lines: Vec<TextLine>,
    /// Height of a line in pixels.
    size: f32,
    /// The middle of the picture.
    x: f32,
    y: f32,
}

/// Glyphs in a row, measured in heights of the line.
struct TextLine {
    glyphs: Vec<(GlyphId, f32)>,
    /// Left edge and width of the visible letters, without the space beside them: so a line looks centred.
    left: f32,
    width: f32,
}

impl TextLine {
    fn set(font: &FontRef, text: &str) -> Self {
        let height = font.height_unscaled();
        let mut glyphs: Vec<(GlyphId, f32)> = Vec::new();
        let (mut pen, mut left, mut right) = (0.0, f32::MAX, f32::MIN);
        for character in text.chars() {
            let glyph = glyph_or_box(font, character);
            if let Some((last, _)) = glyphs.last() {
                pen += font.kern_unscaled(*last, glyph) / height;
            }
            if let Some(outline) = font.outline(glyph) {
                left = left.min(pen + outline.bounds.min.x / height);
                right = right.max(pen + outline.bounds.max.x / height);
            }
            glyphs.push((glyph, pen));
            pen += font.h_advance_unscaled(glyph) / height;
        }
        Self { glyphs, left, width: right - left }
    }
}

/// The glyph of a character, or a box if the font lacks it: its own sign is a pile of bars, which looks like a fault.
fn glyph_or_box(font: &FontRef, character: char) -> GlyphId {
    match font.glyph_id(character) {
        GlyphId(0) => font.glyph_id('□'),
        glyph => glyph,
    }
}

/// True for characters that control or modify others: they are left out rather than shown as boxes.
fn is_invisible(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}'
                | '\u{300}'..='\u{36f}'
                | '\u{200b}'..='\u{200f}'
                | '\u{202a}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{fe00}'..='\u{fe0f}'
                | '\u{feff}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

impl Lettering {
    /// Fits a text in as few lines and as large as possible; `None` if there is no text or no room for it.
    #[expect(clippy::cast_precision_loss, reason = "pictures have a few thousand pixels a side")]
    fn fit(font: &FontRef, text: &str, width: u32, height: u32) -> Option<Self> {
        let shown = |it: &char| it.is_whitespace() || !is_invisible(*it);
        let text: String = text.chars().filter(shown).take(MAX_TEXT).collect();
        let words: Vec<&str> = text.split_whitespace().collect();
        let widths: Vec<f32> = words.iter().map(|word| TextLine::set(font, word).width).collect();
        let space = font.h_advance_unscaled(font.glyph_id(' ')) / font.height_unscaled();
        let (width, height) = (width as f32, height as f32);
        let room = 1.0 - 2.0 * MARGIN;

        let mut best: Option<Self> = None;
        for count in 1..=MAX_LINES.min(words.len()) {
            let mut rest = words.as_slice();
            let lines = balance(&widths, space, count).1.into_iter().map(|length| {
                let (line, after) = rest.split_at(length);
                rest = after;
                TextLine::set(font, &line.join(" "))
            });
            let lines: Vec<TextLine> = lines.collect();
            let widest = lines.iter().map(|line| line.width).fold(0.0, f32::max);
            let size =
                (room * width / widest).min(room * height / count as f32).min(LINE_SHARE * height);
            if best.as_ref().is_none_or(|least| size > WORTH_A_LINE * least.size) {
                best = Some(Self { lines, size, x: width / 2.0, y: height / 2.0 });
            }
        }
        best.filter(|it| it.size >= LOWEST_LINE)
    }

    /// Draws the letters, blended in sRGB values as browsers do: in linear light, dark letters on a light background
    /// look thin.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "coordinates are small, and a value between two bytes fits one"
    )]
    fn draw(&self, font: &FontRef, picture: &mut RgbImage, text_colour: Rgb<u8>) {
        let top = self.y - self.size * self.lines.len() as f32 / 2.0;
        let ascent = font.ascent_unscaled() / font.height_unscaled();
        for (index, line) in self.lines.iter().enumerate() {
            let left = self.x - self.size * (line.left + line.width / 2.0);
            // The baseline is on whole pixels, which makes the feet of the letters sharp.
            let baseline = (top + self.size * (index as f32 + ascent)).round();
            for (glyph, x) in &line.glyphs {
                let position = point(left + self.size * x, baseline);
                let glyph = glyph.with_scale_and_position(PxScale::from(self.size), position);
                let Some(outline) = font.outline_glyph(glyph) else {
                    continue;
                };
                let corner = outline.px_bounds().min;
                outline.draw(|x, y, coverage| {
                    let (x, y) = (corner.x + x as f32, corner.y + y as f32);
                    if x < 0.0 || y < 0.0 {
                        return;
                    }
                    if let Some(pixel) = picture.get_pixel_mut_checked(x as u32, y as u32) {
                        for (value, text_colour) in pixel.0.iter_mut().zip(text_colour.0) {
                            let background = f32::from(*value);
                            let text_colour = f32::from(text_colour);
                            *value = (background + (text_colour - background) * coverage.min(1.0))
                                .round() as u8;
                        }
                    }
                });
            }
        }
    }

    /// Fills a rectangle that is half a line wider than the text and a quarter of a line higher.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "coordinates are small, and one below zero becomes zero"
    )]
    fn fill_behind(&self, picture: &mut RgbImage, colour: Rgb<u8>) {
        let widest = self.lines.iter().map(|line| line.width).fold(0.0, f32::max);
        let across = self.size * (widest + 0.5) / 2.0;
        let down = self.size * (self.lines.len() as f32 + 0.25) / 2.0;
        let columns = (self.x - across) as u32..((self.x + across) as u32).min(picture.width());
        let rows = (self.y - down) as u32..((self.y + down) as u32).min(picture.height());
        for y in rows {
            for x in columns.clone() {
                picture.put_pixel(x, y, colour);
            }
        }
    }
}

/// Breaks words of these widths into `count` lines so that the widest is as narrow as possible. Returns its width, and
/// the number of words in each line.
fn balance(words: &[f32], space: f32, count: usize) -> (f32, Vec<usize>) {
    let line = |words: &[f32]| words.iter().map(|width| width + space).sum::<f32>() - space;
    if count <= 1 {
        return (line(words), vec![words.len()]);
    }
    (1..=words.len() + 1 - count)
        .map(|first| {
            let (rest, mut lengths) = balance(&words[first..], space, count - 1);
            lengths.insert(0, first);
            (rest.max(line(&words[..first])), lengths)
        })
        .min_by(|(one, _), (other, _)| one.total_cmp(other))
        .expect("there are as many words as lines")
}

#[cfg(test)]
mod tests {
    use image::codecs::png::{CompressionType, FilterType, PngEncoder};

    use super::*;

    const WHITE: Rgb<u8> = Rgb([255, 255, 255]);
    const BLACK: Rgb<u8> = Rgb([0, 0, 0]);

    fn placeholder(width: u32, height: u32, text: Option<&str>) -> Placeholder {
        let text = text.map(String::from);
        Placeholder { width, height, background: Background::default(), text_colour: None, text }
    }

    /// The first and the last column and row with letters.
    fn bounds(placeholder: &Placeholder) -> Option<[u32; 4]> {
        let blank = draw(&Placeholder { text: Some(String::new()), ..placeholder.clone() });
        let picture = draw(placeholder);
        picture
            .enumerate_pixels()
            .filter(|(x, y, pixel)| blank.get_pixel(*x, *y) != *pixel)
            .map(|(x, y, _)| [x, y, x, y])
            .reduce(|a, b| [a[0].min(b[0]), a[1].min(b[1]), a[2].max(b[2]), a[3].max(b[3])])
    }

    #[test]
    fn without_a_text_the_size_is_drawn_and_with_an_empty_one_nothing() {
        let size = draw(&placeholder(640, 400, None));
        assert_eq!(size, draw(&placeholder(640, 400, Some("640×400"))));
        assert_ne!(size, draw(&placeholder(640, 400, Some("640x400"))));
        for empty in ["", " \t\n", "\u{200b}"] {
            assert_eq!(bounds(&placeholder(640, 400, Some(empty))), None, "{empty:?}");
        }
    }

    #[test]
    fn a_gradient_begins_and_ends_in_its_colours() {
        let (from, to) = (Rgb([200, 10, 0]), Rgb([0, 20, 255]));
        for (width, height) in [(64, 64), (1, 50), (50, 1), (641, 7), (4096, 4096)] {
            let background = Background::Gradient(from, to);
            let picture = draw(&Placeholder { background, ..placeholder(width, height, Some("")) });
            assert_eq!(picture.dimensions(), (width, height));
            assert_eq!(*picture.get_pixel(0, 0), from);
            assert_eq!(*picture.get_pixel(width - 1, height - 1), to);
        }
    }

    #[test]
    fn a_plain_background_has_one_colour() {
        let background = Background::Plain(Rgb([1, 2, 3]));
        let picture = draw(&Placeholder { background, ..placeholder(33, 21, Some("")) });
        assert!(picture.pixels().all(|pixel| *pixel == Rgb([1, 2, 3])));
    }

    /// `benches/pictures` has the figures of further kinds.
    #[test]
    fn a_placeholder_as_webp_is_at_least_30_per_cent_smaller_than_as_png_or_jpeg() {
        let limits = RenderLimits { pixels: u64::MAX, deadline: None };
        let colourful = Background::Gradient(Rgb([255, 136, 0]), Rgb([136, 0, 255]));
        let backgrounds = [Background::default(), Background::Plain(Rgb([30, 41, 59])), colourful];
        let texts = [None, Some("")];
        let kinds =
            backgrounds.into_iter().flat_map(|background| texts.map(|text| (background, text)));
        let sizes = [(64, 64), (320, 200), (512, 512), (640, 360), (1024, 1024), (1920, 1080)];
        let mut all: Vec<_> = kinds
            .flat_map(|(background, text)| {
                sizes.map(|(w, h)| Placeholder { background, ..placeholder(w, h, text) })
            })
            .collect();
        // Colours that lossy WebP is at its worst with.
        let (background, text_colour) =
            (Background::Plain(Rgb([0, 0, 255])), Some(Rgb([255, 0, 0])));
        let long = "A picture of a mountain at dawn that the model is still working on";
        all.push(Placeholder { background, text_colour, ..placeholder(640, 360, Some(long)) });
        for drawn in all {
            let picture = DynamicImage::ImageRgb8(draw(&drawn));
            let webp = webp(&drawn, limits).unwrap().len();
            // Either of the others as small as its library can make it.
            let mut jpeg = Vec::new();
            let mut encoder = jpeg_encoder::Encoder::new(&mut jpeg, 85);
            encoder.set_optimized_huffman_tables(true);
            encoder.set_chroma_subsampling_method(jpeg_encoder::ChromaSubsamplingMethod::Average);
            let [across, down] = [drawn.width, drawn.height].map(|it| u16::try_from(it).unwrap());
            let colours = jpeg_encoder::ColorType::Rgb;
            encoder.encode(picture.as_bytes(), across, down, colours).unwrap();
            let mut png = Vec::new();
            let (slow, adaptive) = (CompressionType::Best, FilterType::Adaptive);
            let encoder = PngEncoder::new_with_quality(&mut png, slow, adaptive);
            picture.write_with_encoder(encoder).unwrap();
            for (format, length) in [("PNG", png.len()), ("JPEG", jpeg.len())] {
                assert!(webp * 10 <= length * 7, "{drawn:?}: {webp} bytes, as {format} {length}");
            }
        }
    }

    #[test]
    fn text_has_a_contrast_of_at_least_4_5_on_any_background() {
        let steps = (0..=255).step_by(5);
        for (red, green) in steps.clone().flat_map(|red| steps.clone().map(move |it| (red, it))) {
            for blue in steps.clone() {
                let background = Rgb([red, green, blue]);
                let text_colour = readable_on(&[background]).unwrap();
                assert!(contrast(luminance(text_colour), luminance(background)) >= LEAST_CONTRAST);
            }
        }
        assert!(readable_on(&ramp(Background::default(), 640, 400)).is_some());
        assert!((contrast(luminance(BLACK), luminance(WHITE)) - 21.0).abs() < 0.001);
    }

    #[test]
    fn a_text_stands_on_a_plate_where_no_colour_is_readable_on_the_gradient() {
        let background = Background::Gradient(BLACK, WHITE);
        assert_eq!(readable_on(&ramp(background, 640, 400)), None);
        let drawn = Placeholder { background, ..placeholder(640, 400, None) };
        let blank = draw(&Placeholder { text: Some(String::new()), ..drawn.clone() });
        let picture = draw(&drawn);
        let plate = Rgb([128, 128, 128]);
        // The middle is inside the cross, and left of the text its plate is seen.
        assert_eq!(*picture.get_pixel(320, 200), BLACK);
        let [left, top, right, bottom] = bounds(&drawn).unwrap();
        for (x, y) in [(left, top), (right, top), (left, bottom), (right, bottom)] {
            assert_eq!(*picture.get_pixel(x, y), plate);
            assert_ne!(blank.get_pixel(x, y), picture.get_pixel(x, y));
        }
    }

    #[test]
    fn a_text_colour_that_was_chosen_is_kept() {
        let background = Background::Plain(WHITE);
        let text_colour = Some(Rgb([250, 250, 0]));
        let picture =
            draw(&Placeholder {
                background, text_colour, ..placeholder(320, 200, Some("■■■"))
            });
        assert_eq!(*picture.get_pixel(160, 100), Rgb([250, 250, 0]));
    }

    #[test]
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "coordinates are small"
    )]
    fn a_text_stays_inside_the_margins_and_in_the_middle() {
        let long =
            "A picture of a mountain at dawn that the model is still working on, seen from afar";
        let texts =
            [None, Some("ÅÉgjpyQ|"), Some("j"), Some("Wörter Ελληνικά Кириллица"), Some(long)];
        for (width, height) in
            [(64, 64), (320, 200), (1200, 630), (1920, 1080), (90, 900), (900, 90)]
        {
            for text in texts {
                let Some([left, top, right, bottom]) = bounds(&placeholder(width, height, text))
                else {
                    assert!(width.min(height) < 100, "{text:?} isn't drawn at {width}×{height}");
                    continue;
                };
                let (across, down) =
                    ((width as f32 * MARGIN) as u32, (height as f32 * MARGIN) as u32);
                // A pixel may be touched by rounding.
                assert!(left + 1 >= across && right < width - across + 1, "{text:?} {width}");
                assert!(top + 1 >= down && bottom < height - down + 1, "{text:?} {height}");
                let off = (left + right).abs_diff(width - 1);
                assert!(off <= 2, "{text:?} is off by {off} at {width}×{height}");
            }
        }
    }

    #[test]
    fn a_long_text_is_wrapped_into_balanced_lines() {
        assert_eq!(balance(&[1.0, 1.0, 1.0, 1.0], 0.5, 2), (2.5, vec![2, 2]));
        assert_eq!(balance(&[9.0, 1.0, 1.0], 0.5, 2), (9.0, vec![1, 2]));
        assert_eq!(balance(&[1.0, 2.0, 3.0], 0.5, 3), (3.0, vec![1, 1, 1]));
        let font = FontRef::try_from_slice(FONT).unwrap();
        let lines = |text: &str, width, height| {
            Lettering::fit(&font, text, width, height).unwrap().lines.len()
        };
        assert_eq!(lines("Hello world", 640, 400), 1);
        assert_eq!(lines("Hello world", 300, 400), 2);
        assert_eq!(lines("a picture that takes a while to be painted", 640, 400), 3);
        assert_eq!(lines("a picture that takes a while to be painted", 900, 60), 1);
    }

    #[test]
    fn tiny_and_extreme_sizes_are_drawn() {
        let long = "W".repeat(MAX_TEXT) + " tail";
        for width in [1, 2, 3, 7, 16, 4096] {
            for height in [1, 2, 3, 7, 16, 4096] {
                for text in [None, Some("i"), Some(long.as_str())] {
                    let background = Background::Gradient(BLACK, WHITE);
                    let drawn = Placeholder { background, ..placeholder(width, height, text) };
                    assert_eq!(draw(&drawn).dimensions(), (width, height));
                }
            }
        }
        assert_eq!(bounds(&placeholder(8, 8, None)), None);
    }

    #[test]
    fn characters_that_the_font_lacks_are_boxes_and_modifiers_are_left_out() {
        let cjk = draw(&placeholder(320, 200, Some("漢")));
        assert_eq!(cjk, draw(&placeholder(320, 200, Some("□"))));
        assert_eq!(cjk, draw(&placeholder(320, 200, Some("\u{10ffff}"))));
        let plain = draw(&placeholder(320, 200, Some("★ e")));
        let modified = "★\u{fe0f}\r\ne\u{301}\u{0} \u{200d}";
        assert_eq!(plain, draw(&placeholder(320, 200, Some(modified))));
    }

    #[test]
    fn a_text_that_is_too_long_is_cut_off() {
        let full = "word ".repeat(MAX_TEXT / 5);
        let longer = full.clone() + &"more ".repeat(10_000);
        assert_eq!(
            draw(&placeholder(640, 400, Some(&full))),
            draw(&placeholder(640, 400, Some(&longer)))
        );
    }

    #[test]
    fn the_font_has_the_letters_of_european_languages() {
        let font = FontRef::try_from_slice(FONT).unwrap();
        for character in "AZaz09×ßẞÀÿĀſȘțΑωάЀяґ–—‘’“”„…•€₽₴→✓★".chars()
        {
            assert_ne!(font.glyph_id(character), GlyphId(0), "{character}");
        }
        assert!(font.kern_unscaled(font.glyph_id('A'), font.glyph_id('V')) < 0.0);
    }

    #[test]
    fn colours_are_three_or_six_hexadecimal_digits() {
        assert_eq!(parse_colour("0a1Bff"), Some(Rgb([10, 27, 255])));
        assert_eq!(parse_colour("fA0"), Some(Rgb([255, 170, 0])));
        for wrong in
            ["", "#fff", "ff", "ffff", "fffff", "fffffff", "ggg", "+ff", " fff", "ﬀf", "é1"]
        {
            assert_eq!(parse_colour(wrong), None, "{wrong}");
        }
    }
}
