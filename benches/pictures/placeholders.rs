//! What drawn placeholders weigh as WebP, which is how they are sent, and as PNG and JPEG.

use afterimage::picture::RenderLimits;
use afterimage::picture::placeholder::{Background, Placeholder, draw, webp};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{Rgb, RgbImage};

use crate::table;

const SIZES: [(u32, u32); 6] =
    [(64, 64), (320, 200), (512, 512), (640, 360), (1024, 1024), (1920, 1080)];
/// Of JPEG; that of WebP, where it is lossy.
const QUALITY: u8 = 85;
/// How much smaller than either of the others WebP is to be, in per cent.
const PROMISED: f64 = 30.0;

const LONG: &str =
    "A picture of a mountain at dawn that the model is still working on, seen from afar";

/// A name, a background, a text colour and a text.
type Kind = (&'static str, Background, Option<Rgb<u8>>, Option<&'static str>);

fn kinds() -> [Kind; 9] {
    let plain = Background::Plain(Rgb([30, 41, 59]));
    let gradient = Background::Gradient(Rgb([255, 136, 0]), Rgb([136, 0, 255]));
    let steep = Background::Gradient(Rgb([0, 0, 0]), Rgb([255, 255, 255]));
    let glaring = Background::Plain(Rgb([0, 0, 255]));
    [
        ("default, its size", Background::default(), None, None),
        ("default, no text", Background::default(), None, Some("")),
        ("default, long text", Background::default(), None, Some(LONG)),
        ("plain, its size", plain, None, None),
        ("plain, no text", plain, None, Some("")),
        ("red on blue, long text", glaring, Some(Rgb([255, 0, 0])), Some(LONG)),
        ("orange to violet, its size", gradient, None, None),
        ("orange to violet, long text", gradient, None, Some(LONG)),
        ("black to white, its size", steep, None, None),
    ]
}

pub(crate) fn run() {
    println!(
        "Placeholders in bytes: WebP as it is sent, PNG and JPEG of quality {QUALITY} at their smallest;"
    );
    println!("and how much smaller WebP is than each:");
    let limits = RenderLimits { pixels: u64::MAX, deadline: None };
    let (mut rows, mut missed) = (Vec::new(), Vec::new());
    for (name, background, text_colour, text) in kinds() {
        for (width, height) in SIZES {
            let text = text.map(String::from);
            let placeholder = Placeholder { width, height, background, text_colour, text };
            let picture = draw(&placeholder);
            let png = smallest_png(&picture).len();
            let jpeg = smallest_jpeg(&picture).len();
            let webp = webp(&placeholder, limits).unwrap().len();
            let (than_png, than_jpeg) = (smaller(webp, png), smaller(webp, jpeg));
            let size = format!("{width}×{height}");
            if than_png.min(than_jpeg) < PROMISED {
                missed.push(format!(
                    "{name}, {size}: {than_png:.1} % smaller than PNG, {than_jpeg:.1} % than JPEG"
                ));
            }
            rows.push(vec![
                name.to_owned(),
                size,
                webp.to_string(),
                png.to_string(),
                jpeg.to_string(),
                format!("{than_png:.1} %"),
                format!("{than_jpeg:.1} %"),
            ]);
        }
    }
    let head = ["placeholder", "size", "WebP", "PNG", "JPEG", "than PNG", "than JPEG"];
    table::print(2, &head, &rows);
    println!(
        "At least {PROMISED} % smaller than both: {} of {}.",
        rows.len() - missed.len(),
        rows.len()
    );
    for miss in missed {
        println!("Missed by {miss}.");
    }
}

/// Smaller than what is sent as PNG, which is quicker: slow compression, with whichever filter suits the picture.
fn smallest_png(picture: &RgbImage) -> Vec<u8> {
    let filters = [FilterType::NoFilter, FilterType::Up, FilterType::Paeth, FilterType::Adaptive];
    let all = filters.map(|filter| {
        let mut bytes = Vec::new();
        let encoder = PngEncoder::new_with_quality(&mut bytes, CompressionType::Best, filter);
        picture.write_with_encoder(encoder).unwrap();
        bytes
    });
    all.into_iter().min_by_key(Vec::len).unwrap()
}

/// Smaller than what is sent as JPEG, whose Huffman tables are the standard's.
fn smallest_jpeg(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, QUALITY);
    encoder.set_optimized_huffman_tables(true);
    encoder.set_chroma_subsampling_method(jpeg_encoder::ChromaSubsamplingMethod::Average);
    let [width, height] = [picture.width(), picture.height()].map(|it| it.try_into().unwrap());
    encoder.encode(picture, width, height, jpeg_encoder::ColorType::Rgb).unwrap();
    bytes
}

/// By how many per cent of the other.
#[expect(clippy::cast_precision_loss, reason = "a picture has less than 2^53 bytes")]
fn smaller(webp: usize, other: usize) -> f64 {
    100.0 - 100.0 * webp as f64 / other as f64
}
