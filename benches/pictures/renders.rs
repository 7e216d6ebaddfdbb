//! Variants beside sharp's, from the same files in the same formats and qualities.

use std::fs;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::image::MediaType;
use afterimage::image::bounds::{Bounds, Fit};
use afterimage::image::variant::{Format, RequestedFormat, Transform, Variant};
use afterimage::picture::decode::decode;
use afterimage::picture::encode::encode;
use afterimage::picture::resize::resize;
use afterimage::picture::{RenderLimits, render};
use image::RgbImage;
use image::imageops::{self, FilterType};
use serde_json::{Value, json};

use crate::installed;
use crate::peer::{Done, Peer};
use crate::sources::{self, Source};
use crate::table;

const LIMITS: RenderLimits = RenderLimits { pixels: 50_000_000, deadline: None };
/// Rounds of each case; in each round ours runs first, then sharp.
const ROUNDS: usize = 7;
/// Duration of one round of ours, but at least two images.
const ROUND: Duration = Duration::from_millis(250);
/// Rounds of each case for the stages.
const STAGED_ROUNDS: usize = 3;

struct Job {
    name: &'static str,
    transform: Transform,
}

/// The most frequent jobs: a picture for a page in two formats, and a thumbnail.
fn jobs() -> [Job; 3] {
    let page = |format| Transform {
        bounds: Bounds { width: Some(512), height: Some(512), fit: Fit::Contain, enlarge: false },
        format: RequestedFormat::Exactly(format),
        quality: None,
        default_quality: 80,
        effort: Transform::EFFORT,
    };
    [
        Job { name: "512×512 WebP", transform: page(Format::WebP) },
        Job { name: "512×512 JPEG", transform: page(Format::Jpeg) },
        Job { name: "64×64 WebP", transform: Transform::THUMBNAIL },
    ]
}

impl Job {
    fn variant(&self) -> Variant {
        self.transform.variant(MediaType::Png).expect("a variant, not the original")
    }

    /// Job for sharp with the same quality, effort, subsampling and Huffman tables.
    fn for_peer(&self) -> Value {
        let variant = self.variant();
        let quality = variant.quality();
        let mut job = self.size_for_peer();
        (job["format"], job["options"]) = match variant.format() {
            Format::WebP => {
                (json!("webp"), json!({"quality": quality, "effort": variant.effort()}))
            }
            Format::Jpeg => {
                let options = json!({
                    "quality": quality,
                    "chromaSubsampling": "4:2:0",
                    "optimiseCoding": true,
                    "mozjpeg": false,
                });
                (json!("jpeg"), options)
            }
            Format::Avif | Format::Png => unreachable!("no job has this format"),
        };
        job
    }

    /// Job for sharp that resizes without encoding.
    fn size_for_peer(&self) -> Value {
        let Bounds { width, height, fit, .. } = self.transform.bounds;
        let fit = match fit {
            Fit::Contain => "inside",
            Fit::Cover => "cover",
            Fit::Fill => "fill",
        };
        json!({"width": width, "height": height, "fit": fit, "format": "raw"})
    }
}

/// Time of ours per image, in milliseconds.
struct Taken {
    wall: f64,
    processor: f64,
}

/// Measurements of one source and job, round by round.
struct Case<'a> {
    source: &'a Source,
    job: &'a Job,
    ours: Vec<Taken>,
    theirs: Vec<Done>,
}

pub(crate) fn run() {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let (sources, missing) = sources::all();
    if let Some(why) = missing {
        println!("The photograph is missing: {why}.");
    }
    let jobs = jobs();
    let mut peer = Peer::start(cores);
    if let Ok(Peer { versions: (sharp, vips), .. }) = &peer {
        println!(
            "Afterimage beside sharp {sharp} with libvips {vips}, {ROUNDS} rounds by turns, medians;"
        );
        println!("× is the median of the rounds' ratios, ours to sharp's.");
    }
    for source in &sources {
        println!("{}: 1024×1024 PNG of {} bytes", source.name, source.bytes.len());
    }
    let mut take = |parallelism: usize| -> Vec<Case> {
        let cases = sources.iter().flat_map(|source| jobs.iter().map(move |job| (source, job)));
        cases.map(|(source, job)| measure(source, job, parallelism, &mut peer)).collect()
    };
    let (alone, together) = (take(1), take(cores));
    print_alone(&alone);
    print_products(&alone, &mut peer);
    print_together(&together, cores);
    print_stages(&sources, &jobs, &mut peer);
    if let Err(why) = peer {
        println!("Figures of sharp are missing: {why}.\n");
    }
}

fn measure<'a>(
    source: &'a Source,
    job: &'a Job,
    parallelism: usize,
    peer: &mut Result<Peer, String>,
) -> Case<'a> {
    let (variant, for_peer) = (job.variant(), job.for_peer());
    // The first images fill caches, and determine the number per round.
    let first = ours(source, variant, parallelism, parallelism);
    // Each thread makes the same number, so that none waits for the others at the end.
    let iterations = in_a_round(first.wall).max(2).next_multiple_of(parallelism);
    theirs(peer, source, &for_peer, parallelism, parallelism);
    let mut case = Case { source, job, ours: Vec::new(), theirs: Vec::new() };
    for _ in 0..ROUNDS {
        case.ours.push(ours(source, variant, iterations, parallelism));
        case.theirs.extend(theirs(peer, source, &for_peer, iterations, parallelism));
    }
    case
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a few dozen at the most"
)]
fn in_a_round(milliseconds: f64) -> usize {
    (ROUND.as_secs_f64() * 1000.0 / milliseconds.max(1.0)) as usize
}

fn ours(source: &Source, variant: Variant, iterations: usize, parallelism: usize) -> Taken {
    let left = AtomicUsize::new(iterations);
    let next = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |it| it.checked_sub(1));
    let lane = || {
        let begin = processor_time();
        while next().is_ok() {
            black_box(render(&source.bytes, MediaType::Png, variant, LIMITS).unwrap());
        }
        processor_time() - begin
    };
    let begin = Instant::now();
    let processor = thread::scope(|scope| {
        let lanes: Vec<_> = (0..parallelism).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().map(|it| it.join().unwrap()).sum::<f64>()
    });
    let wall = milliseconds(begin.elapsed());
    let images = f64::from(u32::try_from(iterations).unwrap());
    Taken { wall: wall / images, processor: processor / images }
}

/// Runs a job with sharp. `None` if sharp is missing or fails; a failure ends its measurements.
fn theirs(
    peer: &mut Result<Peer, String>,
    source: &Source,
    job: &Value,
    iterations: usize,
    parallelism: usize,
) -> Option<Done> {
    let done = peer.as_mut().ok()?.run(&source.file, job, iterations, parallelism);
    done.map_err(|why| *peer = Err(why)).ok()
}

/// Processor time of this thread in milliseconds, if Linux reports it. A render starts no other threads.
fn processor_time() -> f64 {
    let schedstat = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = schedstat.split(' ').next().and_then(|it| it.parse().ok());
    nanoseconds.map_or(f64::NAN, |it| milliseconds(Duration::from_nanos(it)))
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn print_alone(cases: &[Case]) {
    println!("\nOne image at a time on one thread, in milliseconds (× below 1: ours is quicker):");
    let head = ["source", "job", "ours", "sharp", "×", "ours, CPU", "sharp, CPU", "CPU ×"];
    let rows = cases.iter().map(|case| {
        let [ours, theirs, ratio] = case.compare(|it| it.wall, |it| it.wall);
        let [our_cpu, their_cpu, cpu_ratio] = case.compare(|it| it.processor, |it| it.processor);
        case.row(&[
            figure(ours, 1),
            figure(theirs, 1),
            figure(ratio, 2),
            figure(our_cpu, 1),
            figure(their_cpu, 1),
            figure(cpu_ratio, 2),
        ])
    });
    table::print(2, &head, &rows.collect::<Vec<_>>());
}

fn print_together(cases: &[Case], cores: usize) {
    println!(
        "On all cores, {cores} images at a time, in images a second (× above 1: ours is quicker):"
    );
    let head = ["source", "job", "ours", "sharp", "×", "ours, CPU ms", "sharp, CPU ms", "CPU ×"];
    let rows = cases.iter().map(|case| {
        let [ours, theirs, ratio] = case.compare(|it| 1000.0 / it.wall, |it| 1000.0 / it.wall);
        let [our_cpu, their_cpu, cpu_ratio] = case.compare(|it| it.processor, |it| it.processor);
        case.row(&[
            figure(ours, 0),
            figure(theirs, 0),
            figure(ratio, 2),
            figure(our_cpu, 1),
            figure(their_cpu, 1),
            figure(cpu_ratio, 2),
        ])
    });
    table::print(2, &head, &rows.collect::<Vec<_>>());
    let shares = cases.iter().flat_map(|case| &case.ours);
    let shares = shares.map(|it| it.processor / it.wall / f64::from(u32::try_from(cores).unwrap()));
    let share = 100.0 * median(shares.collect());
    if share < 90.0 {
        println!(
            "Other programs were running: ours had {share:.0} % of the cores. Trust the CPU × column instead.\n"
        );
    }
}

/// Prints size and PSNR of the products, against a lossless result of a third library. One decoder reads the products of
/// both sides.
fn print_products(cases: &[Case], peer: &mut Result<Peer, String>) {
    println!(
        "Products: bytes, and PSNR in decibels against the source resized by `image`, Lanczos 3:"
    );
    let head = ["source", "job", "ours, bytes", "sharp, bytes", "×", "ours, dB", "sharp, dB"];
    let rows = cases.iter().map(|case| {
        let ours = render(&case.source.bytes, MediaType::Png, case.job.variant(), LIMITS);
        let ours = ours.unwrap().bytes;
        let theirs = case.theirs.last().map(|it| &it.product[..]).unwrap_or_default();
        let reference = case.reference();
        let mut near = |name: &str, bytes: &[u8]| {
            let file = installed::folder().join(name);
            fs::write(&file, bytes).unwrap();
            let pixels = peer.as_mut().ok().map(|peer| peer.pixels(&file));
            pixels.and_then(Result::ok).map_or(f64::NAN, |it| psnr(&it, reference.as_raw()))
        };
        let (our_psnr, their_psnr) = (near("ours", &ours), near("sharps", theirs));
        case.row(&[
            figure(size(&ours), 0),
            figure(size(theirs), 0),
            figure(size(&ours) / size(theirs), 3),
            figure(our_psnr, 2),
            figure(their_psnr, 2),
        ])
    });
    table::print(2, &head, &rows.collect::<Vec<_>>());
}

fn psnr(one: &[u8], other: &[u8]) -> f64 {
    assert_eq!(one.len(), other.len(), "the pictures have different sizes");
    let squares = one.iter().zip(other).map(|(one, other)| {
        let difference = f64::from(*one) - f64::from(*other);
        difference * difference
    });
    10.0 * (255.0 * 255.0 * size(one) / squares.sum::<f64>()).log10()
}

/// Size as a number; NaN without bytes.
#[expect(clippy::cast_precision_loss, reason = "a picture has less than 2^53 bytes")]
fn size(bytes: &[u8]) -> f64 {
    if bytes.is_empty() { f64::NAN } else { bytes.len() as f64 }
}

/// Prints the time of each stage. Ours is the quickest of many runs, which other programs have disturbed the least.
/// Sharp works on some rows of a picture at a time, so its stages are differences between decoding, decoding and
/// resizing, and the whole job.
fn print_stages(sources: &[Source], jobs: &[Job], peer: &mut Result<Peer, String>) {
    println!(
        "Time of each stage on one thread, in milliseconds (sharp: CPU time, by differences):"
    );
    let head = [
        "source",
        "job",
        "decode",
        "resize",
        "encode",
        "sharp decode",
        "sharp resize",
        "sharp encode",
    ];
    let mut rows = Vec::new();
    for source in sources {
        for job in jobs {
            let iterations = in_a_round(ours(source, job.variant(), 1, 1).wall).max(2);
            let (mut stages, mut their_stages) =
                ([const { Vec::new() }; 3], [const { Vec::new() }; 3]);
            for _ in 0..STAGED_ROUNDS {
                for _ in 0..iterations {
                    for (all, it) in stages.iter_mut().zip(staged(source, job.variant())) {
                        all.push(it);
                    }
                }
                let until = [json!({"format": "raw"}), job.size_for_peer(), job.for_peer()];
                let mut before = 0.0;
                for (all, until) in their_stages.iter_mut().zip(&until) {
                    if let Some(done) = theirs(peer, source, until, iterations, 1) {
                        all.push(done.processor - before);
                        before = done.processor;
                    }
                }
            }
            let mut row = vec![source.name.to_owned(), job.name.to_owned()];
            let quickest = |all: Vec<f64>| all.into_iter().fold(f64::NAN, f64::min);
            row.extend(stages.map(|it| figure(quickest(it), 2)));
            row.extend(their_stages.map(|it| figure(median(it), 2)));
            rows.push(row);
        }
    }
    table::print(2, &head, &rows);
}

/// Time of decoding, resizing and encoding, with the same functions as `render`.
fn staged(source: &Source, variant: Variant) -> [f64; 3] {
    let begin = Instant::now();
    let picture = decode(&source.bytes, MediaType::Png, LIMITS).unwrap();
    let decoded = Instant::now();
    let picture = resize(picture, variant.bounds()).unwrap();
    let resized = Instant::now();
    black_box(encode(&picture, variant, LIMITS).unwrap());
    [decoded - begin, resized - decoded, resized.elapsed()].map(milliseconds)
}

impl Case<'_> {
    fn reference(&self) -> RgbImage {
        let Bounds { width, height, .. } = self.job.transform.bounds;
        let (width, height) = (width.unwrap(), height.unwrap());
        imageops::resize(&self.source.picture, width, height, FilterType::Lanczos3)
    }

    /// Medians of ours, of theirs, and of their ratios.
    fn compare(&self, ours: impl Fn(&Taken) -> f64, theirs: impl Fn(&Done) -> f64) -> [f64; 3] {
        let ours: Vec<f64> = self.ours.iter().map(ours).collect();
        let theirs: Vec<f64> = self.theirs.iter().map(theirs).collect();
        let ratios = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
        [median(ours), median(theirs), median(ratios)]
    }

    fn row(&self, figures: &[String]) -> Vec<String> {
        let names = [self.source.name, self.job.name].map(String::from);
        names.iter().chain(figures).cloned().collect()
    }
}

/// Median; NaN without figures.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}

fn figure(value: f64, digits: usize) -> String {
    if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
}
