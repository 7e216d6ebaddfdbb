//! Pixels: synchronous, pure, without I/O. Nothing here knows HTTP, the store or the cache.

pub mod decode;
pub(crate) mod demo;
pub mod encode;
pub mod placeholder;
pub mod resize;
pub mod sniff;
pub mod strip;

use std::time::Instant;

use image::{DynamicImage, RgbaImage};

use self::decode::animation::{self, Outline};
use self::encode::AnimationEncoder;
use crate::image::MediaType;
use crate::image::bounds::{Bounds, Fit};
use crate::image::variant::{Format, Variant};

/// The limits of one render.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenderLimits {
    /// The pixels that the source may have: width times height.
    pub pixels: u64,
    /// The time at which the render is given up; `None` for never. Decoders check it whenever they read on, the WebP
    /// encoder before each group of rows; the other steps are checked before they begin, and bounded by `pixels` and
    /// the size of the product.
    pub deadline: Option<Instant>,
}

impl RenderLimits {
    /// Fails after the deadline.
    pub(crate) fn check_time(self) -> Result<(), PictureError> {
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(PictureError::TimedOut),
            _ => Ok(()),
        }
    }
}

/// The limits of an animation whose frames are all rendered. Over them, its first frame is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnimationLimits {
    /// Most frames.
    pub frames: u32,
    /// Most pixels of all frames: width times height times frames.
    pub pixels: u64,
}

/// The reason for which there is no picture. The text may be shown to clients.
///
/// It has the text of a codec's error instead of the error itself, since it is cloned for all who wait for the picture.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    /// The format is served as it is, and not decoded.
    #[error("{} isn't decoded here, so it can't be had in another format", .0.as_str())]
    Opaque(MediaType),
    /// The format is decoded, but not this kind of it.
    #[error("the image is of a kind that isn't decoded here: {0}")]
    Unsupported(String),
    /// The picture would take too much memory.
    #[error("the image has {width}×{height} pixels, the limit is {limit} ([pictures] max_pixels)")]
    TooManyPixels {
        /// Width of the source.
        width: u32,
        /// Height of the source.
        height: u32,
        /// Most pixels that a source may have.
        limit: u64,
    },
    /// The animation would take too long.
    #[error(
        "the animation has {frames} frames, of {pixels} pixels together, the limits are {} and {} ([pictures] \
         max_animation_frames, max_animation_pixels)", .most.frames, .most.pixels
    )]
    TooManyFrames {
        /// The number of frames.
        frames: u32,
        /// The pixels of all frames.
        pixels: u64,
        /// The limits.
        most: AnimationLimits,
    },
    /// Half of the time is over, and the animation isn't done.
    #[error("the animation takes too long to make ([pictures] timeout)")]
    SlowAnimation,
    /// A frame of the animation can't be shown. The first one may be whole.
    #[error("the animation is broken: {0}")]
    BrokenAnimation(String),
    /// The bytes are a part of an image, or only begin like one.
    #[error("the image is broken: {0}")]
    Broken(String),
    /// The format has no room for so many pixels a side.
    #[error("{} has at most {longest} pixels a side", .format.name())]
    TooLong {
        /// The format.
        format: Format,
        /// Most pixels a side.
        longest: u32,
    },
    /// The pixels can't be encoded in the format.
    #[error("the image can't be encoded: {0}")]
    Encoding(String),
    /// Nobody asked for this format alone, and another one makes the picture smaller.
    #[error("{} would be larger than another format", .0.name())]
    NotSmaller(Format),
    /// The metadata can't be removed from the file.
    #[error("the metadata can't be removed from the image")]
    NotStripped,
    /// The picture would take more memory than there is for all.
    #[error(
        "the picture takes {needed} bytes to make, the limit is {limit} ([limits] fetch_bytes)"
    )]
    TooMuchMemory {
        /// Bytes at most, at the same time.
        needed: u64,
        /// Bytes for everything that is fetched, rendered and sent.
        limit: u64,
    },
    /// The process that decodes this format can't be started, or was ended by somebody else.
    #[error("the image can't be decoded now: {0}")]
    NoDecoder(String),
    /// The deadline has passed.
    #[error("the picture takes too long to make ([pictures] timeout)")]
    TimedOut,
    /// The deadline has passed while the source was decoded.
    #[error("the image takes too long to decode ([pictures] timeout)")]
    DecodingTimedOut,
}

impl PictureError {
    /// True if another attempt might succeed in time.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, PictureError::TimedOut | PictureError::DecodingTimedOut)
    }
}

/// An encoded picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// The file.
    pub bytes: Vec<u8>,
    /// True if it has as many pixels as its source.
    pub at_full_size: bool,
}

/// Renders a variant of an image: decodes, resizes, orients and encodes. Takes milliseconds to a second, and as much memory
/// as [`memory`] says.
pub fn render(
    bytes: &[u8],
    media_type: MediaType,
    variant: Variant,
    limits: RenderLimits,
) -> Result<Product, PictureError> {
    let picture = decode::decode_unturned(bytes, media_type, limits)?;
    let size = picture.upright();
    limits.check_time()?;
    let picture = picture.resized(variant.bounds())?;
    limits.check_time()?;
    product_of(&picture, size, variant, limits)
}

fn product_of(
    picture: &DynamicImage,
    source: (u32, u32),
    variant: Variant,
    limits: RenderLimits,
) -> Result<Product, PictureError> {
    let at_full_size = (picture.width(), picture.height()) == source;
    Ok(Product { bytes: encode::encode(picture, variant, limits)?, at_full_size })
}

/// The memory that [`render`] takes at most, in bytes, told from the head of the source. No pixel is decoded. Fails for a
/// product that has no room in its format.
pub fn memory(
    bytes: &[u8],
    media_type: MediaType,
    variant: Variant,
    limits: RenderLimits,
) -> Result<u64, PictureError> {
    let source = decode::measure(bytes, media_type, limits)?;
    let (width, height) = resize::size(source.upright(), variant.bounds());
    check_sides(variant.format(), width.max(height))?;
    let product = u64::from(width) * u64::from(height);
    let encoding = encode::memory(variant, product, source.may_be_transparent());
    Ok(source.memory(width, height).max(encoding))
}

/// Renders an animation as animated WebP: decodes, resizes, orients and encodes one frame after the other. Takes as much
/// memory as [`animation_memory`] says.
pub fn render_animation(
    bytes: &[u8],
    media_type: MediaType,
    variant: Variant,
    limits: RenderLimits,
    most: AnimationLimits,
) -> Result<Product, PictureError> {
    let Some(outline) = Outline::read(bytes, media_type, limits)? else {
        // One whole frame, which shows nothing else.
        return render(bytes, media_type, variant, limits);
    };
    outline.check(limits, most)?;
    let source = outline.measure(bytes).upright();
    let size = resize::size(source, variant.bounds());
    let mut encoder = AnimationEncoder::new(size, variant.quality(), outline.plays())?;
    // The other half is left to the first frame, for which somebody waits then.
    let now = Instant::now();
    let half = |deadline: Instant| now + deadline.saturating_duration_since(now) / 2;
    let limits = RenderLimits { deadline: limits.deadline.map(half), ..limits };
    let outcome = animation::decode_each(bytes, media_type, &outline, limits, |frame| {
        let picture = frame.picture.resized(variant.bounds())?;
        limits.check_time()?;
        encoder.add(&picture, frame.duration)
    });
    let outcome = outcome.and_then(|()| limits.check_time());
    outcome
        .map_err(|error| if error.is_timeout() { PictureError::SlowAnimation } else { error })?;
    Ok(Product { bytes: encoder.finish()?, at_full_size: size == source })
}

/// The memory that [`render_animation`] takes at most, in bytes, told from the headers of the source. No pixel is decoded.
/// Fails for an animation that is over the limits, or has no room in the format.
pub fn animation_memory(
    bytes: &[u8],
    media_type: MediaType,
    variant: Variant,
    limits: RenderLimits,
    most: AnimationLimits,
) -> Result<u64, PictureError> {
    let Some(outline) = Outline::read(bytes, media_type, limits)? else {
        return memory(bytes, media_type, variant, limits);
    };
    outline.check(limits, most)?;
    let source = outline.measure(bytes);
    let (width, height) = resize::size(source.upright(), variant.bounds());
    check_sides(Format::WebP, width.max(height))?;
    let encoding = encode::animation_memory((width, height), outline.frames())?;
    Ok(outline.held() + source.memory(width, height) + encoding)
}

/// Refuses a picture that has no room in a format.
fn check_sides(format: Format, length: u32) -> Result<(), PictureError> {
    let longest = match format {
        // Of fourteen bits (RFC 9649 §2.5).
        Format::WebP => 16_383,
        // The limit of libjpeg; the format's is 65,535.
        Format::Jpeg => 65_500,
        Format::Avif => 65_535,
        Format::Png => return Ok(()),
    };
    if length > longest {
        return Err(PictureError::TooLong { format, longest });
    }
    Ok(())
}

/// The memory that decoding a picture takes at most, in bytes, told from its head.
pub(crate) fn decoding_memory(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<u64, PictureError> {
    Ok(decode::measure(bytes, media_type, limits)?.decoding())
}

/// The memory that [`preview`] takes at most.
pub fn preview_memory(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<u64, PictureError> {
    Ok(decode::measure(bytes, media_type, limits)?.memory(HASHED, HASHED))
}

/// The width and height of an image, told from its head, with the orientation applied.
pub fn dimensions(
    bytes: &[u8],
    media_type: MediaType,
    limits: RenderLimits,
) -> Result<(u32, u32), PictureError> {
    Ok(decode::measure(bytes, media_type, limits)?.upright())
}

/// Longest side in pixels that a ThumbHash can be made of.
const HASHED: u32 = 100;

const HASHED_BOUNDS: Bounds =
    Bounds { width: Some(HASHED), height: Some(HASHED), fit: Fit::Contain, enlarge: false };

/// The frames of an image, told from their headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frames {
    /// The number of frames; 1 of a picture that doesn't move.
    pub count: u32,
    /// Milliseconds of all frames; 0 of a picture that doesn't move.
    pub duration: u64,
}

/// Counts the frames of an image. No pixel is decoded. `None` if their number can't be told: of AVIF and JPEG XL that move,
/// and of a broken image.
#[must_use]
pub fn frames(bytes: &[u8], media_type: MediaType, limits: RenderLimits) -> Option<Frames> {
    const STILL: Frames = Frames { count: 1, duration: 0 };
    match media_type {
        MediaType::Png => Some(decode::png_frames(bytes).unwrap_or(STILL)),
        MediaType::Gif | MediaType::WebP => {
            let outline = Outline::read(bytes, media_type, limits).ok()?;
            Some(outline.map_or(STILL, |outline| outline.all()))
        }
        _ => (!decode::is_animated(bytes, media_type)).then_some(STILL),
    }
}

/// The preview of an image, for pages that wait for its pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preview {
    /// Width in pixels, with the orientation applied.
    pub width: u32,
    /// Height in pixels, with the orientation applied.
    pub height: u32,
    /// ThumbHash (evanw/thumbhash): some 25 bytes from which a script draws a blurred picture.
    pub thumbhash: Vec<u8>,
    /// The frames; `None` if their number can't be told.
    pub frames: Option<Frames>,
}

/// Makes the preview of an image. `frames` are those of the original: what another process has decoded of it has one.
pub fn preview(
    bytes: &[u8],
    media_type: MediaType,
    frames: Option<Frames>,
    limits: RenderLimits,
) -> Result<Preview, PictureError> {
    let picture = decode::decode_unturned(bytes, media_type, limits)?;
    let size = picture.upright();
    Ok(preview_of(size, picture.resized(HASHED_BOUNDS)?, frames))
}

/// Renders a variant and makes the preview, for those who need both: most of the time goes into the decoding, which is done
/// once.
pub fn render_with_preview(
    bytes: &[u8],
    media_type: MediaType,
    variant: Variant,
    frames: Option<Frames>,
    limits: RenderLimits,
) -> Result<(Product, Preview), PictureError> {
    let picture = decode::decode_unturned(bytes, media_type, limits)?;
    let size = picture.upright();
    limits.check_time()?;
    let (product, hashed) = picture.resized_twice(variant.bounds(), HASHED_BOUNDS)?;
    let preview = preview_of(size, hashed, frames);
    limits.check_time()?;
    Ok((product_of(&product, size, variant, limits)?, preview))
}

fn preview_of(
    (width, height): (u32, u32),
    hashed: DynamicImage,
    frames: Option<Frames>,
) -> Preview {
    let small: RgbaImage = hashed.into_rgba8();
    let (w, h) = (small.width() as usize, small.height() as usize);
    let thumbhash = fast_thumbhash::rgba_to_thumb_hash(w, h, small.as_raw());
    Preview { width, height, thumbhash, frames }
}

/// True if some pixel isn't opaque.
fn is_transparent(picture: &DynamicImage) -> bool {
    match picture {
        DynamicImage::ImageRgba8(pixels) => pixels.pixels().any(|pixel| pixel.0[3] < 255),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use image::{Rgba, RgbaImage};

    use super::*;
    use crate::image::variant::{RequestedFormat, Transform};

    const LIMITS: RenderLimits = RenderLimits { pixels: 1_000_000, deadline: None };
    const MOST: AnimationLimits = AnimationLimits { frames: 100, pixels: 1_000_000 };

    fn variant(width: u32) -> Variant {
        let width = Some(width).filter(|it| *it > 0);
        let bounds = Bounds { width, height: None, fit: Fit::Contain, enlarge: false };
        let format = RequestedFormat::Exactly(Format::WebP);
        let transform = Transform { bounds, format, quality: None, default_quality: 90, effort: 4 };
        transform.variant(MediaType::Png).unwrap()
    }

    /// Bars that move, in few colours, so that they are encoded without loss.
    fn frame(number: u32) -> RgbaImage {
        RgbaImage::from_fn(40, 20, |x, y| match (x / 5 + y / 10 + number) % 4 {
            0 => Rgba([255, 0, 0, 255]),
            1 => Rgba([0, 0, 255, 255]),
            2 => Rgba([255, 255, 0, 255]),
            _ => Rgba([0, 0, 0, 0]),
        })
    }

    /// A GIF whose frames replace each other.
    fn gif(frames: u32, delay: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = gif::Encoder::new(&mut bytes, 40, 20, &[]).unwrap();
        encoder.set_repeat(gif::Repeat::Finite(2)).unwrap();
        for number in 0..frames {
            let mut pixels = frame(number).into_raw();
            let mut frame = gif::Frame::from_rgba_speed(40, 20, &mut pixels, 10);
            frame.delay = delay;
            frame.dispose = gif::DisposalMethod::Background;
            encoder.write_frame(&frame).unwrap();
        }
        drop(encoder);
        bytes
    }

    fn rendered(bytes: &[u8], media_type: MediaType, width: u32) -> Vec<(RgbaImage, u32)> {
        let product = render_animation(bytes, media_type, variant(width), LIMITS, MOST).unwrap();
        assert_eq!(product.at_full_size, width == 0);
        frames(&product.bytes)
    }

    /// The frames of a WebP with their durations.
    fn frames(webp: &[u8]) -> Vec<(RgbaImage, u32)> {
        let mut decoder = webpx::AnimationDecoder::new(webp).unwrap();
        let frames = decoder.decode_all().unwrap().into_iter();
        let frames = frames.map(|frame| {
            let pixels = RgbaImage::from_raw(frame.width, frame.height, frame.data).unwrap();
            (pixels, frame.duration_ms)
        });
        frames.collect()
    }

    #[test]
    fn an_animation_keeps_its_pixels_durations_and_loops() {
        let gif = gif(5, 7);
        let once = render_animation(&gif, MediaType::Gif, variant(0), LIMITS, MOST).unwrap().bytes;
        let info = webpx::AnimationDecoder::new(&once).unwrap().info().clone();
        // Two repetitions are three times.
        assert_eq!((info.frame_count, info.loop_count), (5, 3));
        let twice = render_animation(&once, MediaType::WebP, variant(0), LIMITS, MOST).unwrap();
        assert_eq!(webpx::AnimationDecoder::new(&twice.bytes).unwrap().info().loop_count, 3);
        for webp in [&once, &twice.bytes] {
            for (number, (pixels, duration)) in (0..).zip(frames(webp)) {
                let expected = frame(number);
                let visible = |pixel: &Rgba<u8>| if pixel.0[3] == 0 { [0; 4] } else { pixel.0 };
                assert!(
                    pixels.pixels().map(visible).eq(expected.pixels().map(visible)),
                    "{number}"
                );
                assert_eq!(duration, 70);
            }
        }
    }

    #[test]
    fn an_animation_is_resized_frame_by_frame() {
        let frames = rendered(&gif(4, 0), MediaType::Gif, 20);
        assert_eq!(frames.len(), 4);
        for (number, (pixels, duration)) in (0..).zip(frames) {
            let expected = resize::resize(frame(number).into(), variant(20).bounds()).unwrap();
            let expected = expected.to_rgba8();
            assert_eq!((pixels.dimensions(), duration), ((20, 10), 100));
            let differences =
                pixels.pixels().zip(expected.pixels().copied()).map(|(one, other)| {
                    let visible = |pixel: Rgba<u8>, channel: usize| {
                        i32::from(pixel.0[channel]) * i32::from(pixel.0[3]) / 255
                    };
                    (0..3).map(|it| (visible(*one, it) - visible(other, it)).abs()).sum::<i32>()
                });
            // Lossy, as a still picture is.
            assert!(differences.sum::<i32>() < 3 * 200 * 16, "{number}");
        }
    }

    #[test]
    fn over_its_limits_an_animation_is_refused_before_it_is_decoded() {
        let gif = gif(5, 7);
        for (most, fits) in [
            (AnimationLimits { frames: 5, pixels: 5 * 800 }, true),
            (AnimationLimits { frames: 4, pixels: 5 * 800 }, false),
            (AnimationLimits { frames: 5, pixels: 5 * 800 - 1 }, false),
        ] {
            let rendered = render_animation(&gif, MediaType::Gif, variant(0), LIMITS, most);
            let memory = animation_memory(&gif, MediaType::Gif, variant(0), LIMITS, most);
            assert_eq!((rendered.is_ok(), memory.is_ok()), (fits, fits));
            let refused = |it: Option<PictureError>| {
                fits || matches!(it, Some(PictureError::TooManyFrames { .. }))
            };
            assert!(refused(rendered.err()) && refused(memory.err()));
        }
    }

    #[test]
    fn ten_thousand_frames_of_four_thousand_megapixels_take_no_memory() {
        // Only the first frame is as small as the canvas.
        let small = gif(1, 7);
        let huge = [&[b','][..], &[0, 0, 0, 0, 255, 255, 255, 255, 0, 2, 1, 0, 0]].concat();
        let hostile = [&small[..small.len() - 1], &huge.repeat(10_000), b";"].concat();
        let most = AnimationLimits { frames: u32::MAX, pixels: 1_000_000_000 };
        let error = render_animation(&hostile, MediaType::Gif, variant(0), LIMITS, most);
        assert!(matches!(error, Err(PictureError::TooManyFrames { frames: 10_001, .. })));
        let mut canvas = gif(2, 7);
        canvas[6..10].fill(255);
        let error = render_animation(&canvas, MediaType::Gif, variant(0), LIMITS, most);
        assert!(matches!(error, Err(PictureError::TooManyPixels { .. })), "{error:?}");
    }

    #[test]
    fn a_file_that_is_cut_off_shows_its_whole_frames_and_no_others() {
        let whole = gif(4, 7);
        let all = rendered(&whole, MediaType::Gif, 0);
        for end in 60..whole.len() {
            let cut = &whole[..end];
            match render_animation(cut, MediaType::Gif, variant(0), LIMITS, MOST) {
                Ok(product) => {
                    let frames = frames(&product.bytes);
                    let pixels = |it: &(RgbaImage, u32)| it.0.clone();
                    assert!(
                        frames.iter().map(pixels).eq(all.iter().take(frames.len()).map(pixels))
                    );
                    assert!(frames.len() < 4 || end + 1 >= whole.len(), "{end}");
                }
                Err(PictureError::Broken(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
        let webp =
            render_animation(&whole, MediaType::Gif, variant(0), LIMITS, MOST).unwrap().bytes;
        for end in (60..webp.len()).step_by(7) {
            render_animation(&webp[..end], MediaType::WebP, variant(0), LIMITS, MOST).unwrap_err();
        }
    }

    #[test]
    fn a_broken_frame_in_the_middle_breaks_the_animation_and_not_its_first_frame() {
        let mut gif = gif(3, 7);
        // The smallest code size of the second frame.
        let control = b"!\xf9\x04";
        let second = gif.windows(3).enumerate().filter(|it| it.1 == control).nth(1).unwrap().0;
        let flags = gif[second + 17];
        let table = if flags & 0x80 == 0 { 0 } else { 6 << (flags & 7) };
        gif[second + 18 + table] = 99;
        let error = render_animation(&gif, MediaType::Gif, variant(0), LIMITS, MOST).unwrap_err();
        assert!(
            matches!(&error, PictureError::BrokenAnimation(it) if it.contains("frame 2")),
            "{error}"
        );
        assert!(render(&gif, MediaType::Gif, variant(0), LIMITS).is_ok());
    }

    #[test]
    fn one_frame_stays_a_still() {
        let product = render_animation(&gif(1, 7), MediaType::Gif, variant(0), LIMITS, MOST);
        let product = product.unwrap();
        assert!(!product.bytes.windows(4).any(|it| it == b"ANIM"));
        assert_eq!(product, render(&gif(1, 7), MediaType::Gif, variant(0), LIMITS).unwrap());
    }

    #[test]
    fn an_animation_that_takes_too_long_ends_between_two_frames() {
        let late = RenderLimits { deadline: Some(Instant::now()), ..LIMITS };
        let gif = gif(3, 7);
        let error = render_animation(&gif, MediaType::Gif, variant(0), late, MOST).unwrap_err();
        assert!(
            matches!(error, PictureError::SlowAnimation | PictureError::DecodingTimedOut),
            "{error}"
        );
        let huge = RenderLimits { pixels: 50_000_000, ..LIMITS };
        let mut wide = Vec::new();
        let mut encoder = gif::Encoder::new(&mut wide, 3000, 2000, &[0, 0, 0]).unwrap();
        for _ in 0..2 {
            let values = vec![0; 6_000_000];
            encoder
                .write_frame(&gif::Frame::from_indexed_pixels(3000, 2000, values, None))
                .unwrap();
        }
        drop(encoder);
        let most = AnimationLimits { frames: 2, pixels: 50_000_000 };
        let memory = |width| animation_memory(&wide, MediaType::Gif, variant(width), huge, most);
        assert_eq!(memory(0), Err(PictureError::SlowAnimation));
        assert!(memory(640).is_ok());
    }
}
