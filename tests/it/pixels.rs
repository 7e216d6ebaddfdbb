//! Pictures: their pixels against Pillow's, and hostile files.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage::image::MediaType;
use afterimage::image::bounds::{Bounds, Fit};
use afterimage::image::variant::{Format, RequestedFormat, Transform, Variant};
use afterimage::picture::decode;
use afterimage::picture::sniff::sniff;
use afterimage::picture::{self, AnimationLimits, PictureError, RenderLimits};
use tempfile::TempDir;

use crate::browser::{CHROMIUM, browser_folder};

const LIMITS: RenderLimits = RenderLimits { pixels: 50_000_000, deadline: None };
/// Formats that this build can decode. AVIF products are read by Pillow alone.
const READABLE: [Format; 3] = [Format::WebP, Format::Jpeg, Format::Png];
const AS_IT_IS: Bounds = Bounds { width: None, height: None, fit: Fit::Contain, enlarge: false };

/// Largest allowed distance of a lossy product's PSNR below that of libwebp or libjpeg-turbo, in decibels.
const BELOW_PEER: f64 = 1.0;

/// Allowed distance of a product from Pillow's: the largest difference of a pixel's channel, and the least PSNR of the
/// picture, in decibels.
#[derive(Clone, Copy, Debug)]
struct Bound {
    difference: u64,
    psnr: f64,
}

/// Bound of lossless formats.
const EXACT: Bound = Bound { difference: 0, psnr: 99.0 };
/// Bound of formats whose decoders may round differently.
const ROUNDED: Bound = Bound { difference: 1, psnr: 48.0 };
/// Bound of JPEG. No standard fixes the inverse transform and the colour transform to the last bit.
const LOSSY: Bound = Bound { difference: 6, psnr: 56.0 };
/// Bound of JPEG with subsampled colours, which each decoder interpolates differently.
const SUBSAMPLED: Bound = Bound { difference: 10, psnr: 48.0 };

/// Bound of resized pictures: the same filter with another order of rounding and clipping, visible at white lines on black.
const RESIZED: Bound = Bound { difference: 48, psnr: 42.0 };
/// Bound of lossy products, where a single pixel at an edge may differ much. The PSNR applies to AVIF alone, whose quality
/// means something else to each encoder; [`BELOW_PEER`] applies to the others.
const ENCODED: Bound = Bound { difference: 255, psnr: 30.0 };

struct Case {
    source: String,
    bounds: Bounds,
    format: Format,
    quality: u8,
    bound: Bound,
}

impl Case {
    /// Renders the source as PNG, without loss.
    fn of(source: &str, bound: Bound) -> Case {
        Case {
            source: source.to_owned(),
            bounds: AS_IT_IS,
            format: Format::Png,
            quality: 85,
            bound,
        }
    }
}

/// A folder with the sources that Pillow made.
struct References(TempDir);

impl References {
    fn make() -> References {
        let folder = tempfile::tempdir().unwrap();
        reference("sources", folder.path(), None);
        References(folder)
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.path().join(name)).unwrap()
    }

    /// Renders the products, measures them with Pillow, and fails with a list of those out of bounds.
    fn compare(&self, cases: &[Case]) {
        let mut products = Vec::new();
        for (number, case) in cases.iter().enumerate() {
            let bytes = self.read(&case.source);
            let media_type = sniff(&bytes).unwrap();
            let variant = variant(case.bounds, case.format, case.quality, media_type);
            let product = picture::render(&bytes, media_type, variant, LIMITS)
                .unwrap_or_else(|error| panic!("{}: {error}", case.source))
                .bytes;
            assert_eq!(sniff(&product), Some(case.format.media_type()), "{}", case.source);
            let name = format!("{number}.{}", case.format.name());
            fs::write(self.0.path().join(&name), product).unwrap();
            let fit = match case.bounds {
                AS_IT_IS => None,
                Bounds { fit: Fit::Contain, .. } => Some("contain"),
                Bounds { fit: Fit::Cover, .. } => Some("cover"),
                Bounds { fit: Fit::Fill, .. } => Some("fill"),
            };
            products.push(serde_json::json!({
                "source": case.source,
                "product": name,
                "fit": fit,
                "width": case.bounds.width,
                "height": case.bounds.height,
                "flat": case.format == Format::Jpeg,
                "quality": case.quality,
            }));
        }
        let products = serde_json::to_vec(&products).unwrap();
        let measured = reference("measure", self.0.path(), Some(&products));
        let measured: Vec<serde_json::Value> = serde_json::from_slice(&measured).unwrap();
        assert_eq!(measured.len(), cases.len());
        let mut off = String::new();
        for (case, it) in cases.iter().zip(measured) {
            let (difference, psnr) =
                (it["difference"].as_u64().unwrap(), it["psnr"].as_f64().unwrap());
            let peer = it["peer"].as_f64();
            let line = format!(
                "{} {}x{} {:?} as {}: {} of {}, off by {difference} at most, {psnr:.1} dB (peer {peer:.1?}), beside it {}",
                case.source,
                case.bounds.width.unwrap_or(0),
                case.bounds.height.unwrap_or(0),
                case.bounds.fit,
                case.format.name(),
                it["size"],
                it["expected"],
                it["beside"],
            );
            println!("{line}");
            let least = peer.map_or(case.bound.psnr, |it| it - BELOW_PEER);
            let near = difference <= case.bound.difference && psnr >= least;
            if !near || it["size"] != it["expected"] || it["beside"] != serde_json::json!([]) {
                writeln!(off, "{line}, but {:?}", case.bound).unwrap();
            }
        }
        assert!(off.is_empty(), "\n{off}");
    }
}

fn variant(bounds: Bounds, format: Format, quality: u8, media_type: MediaType) -> Variant {
    // With a quality the result is a variant, even if nothing else changes.
    let format = RequestedFormat::Exactly(format);
    let effort = Transform::EFFORT;
    let transform =
        Transform { bounds, format, quality: Some(quality), default_quality: quality, effort };
    resolved(transform, media_type)
}

/// Variant of `/images/{id}/thumbnail`.
fn thumbnail(media_type: MediaType) -> Variant {
    resolved(Transform::THUMBNAIL, media_type)
}

fn resolved(transform: Transform, media_type: MediaType) -> Variant {
    transform.variant(media_type).expect("a variant, not the original")
}

fn reference(step: &str, folder: &Path, input: Option<&[u8]>) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/python/bin/python");
    assert!(
        python.exists(),
        "Pillow is needed in target/python: run tests/run.sh, which installs it"
    );
    let mut child = Command::new(python)
        .arg(root.join("tests/pixels/reference.py"))
        .arg(step)
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.unwrap_or_default()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "Pillow is needed in target/python: run tests/run.sh, which installs it"
    );
    output.stdout
}

#[test]
fn every_format_is_decoded_to_the_same_pixels_as_by_pillow() {
    let exact = [
        "rgb.png",
        "rgba.png",
        "grey.png",
        "grey-alpha.png",
        "palette.png",
        "palette-4-bit.png",
        "palette-transparent.png",
        "key.png",
        "grey-key.png",
        "1-bit.png",
        "16-bit-grey.png",
        "16-bit-rgb.png",
        "16-bit-rgba.png",
        "interlaced.png",
        "plain.gif",
        "interlaced.gif",
        "transparent.gif",
        "transparent-interlaced.gif",
        "lossless.webp",
        "lossless-alpha.webp",
        "24-bit.bmp",
        "palette.bmp",
        "grey.bmp",
        "1-bit.bmp",
        "rgb.tif",
        "rgba.tif",
        "grey.tif",
        "16-bit-grey.tif",
        "1-bit.tif",
        "lzw.tif",
        "deflate.tif",
        "packbits.tif",
        "png.ico",
        "bmp.ico",
        "many.ico",
        "rgb-png.ico",
    ]
    .map(|it| Case::of(it, EXACT));
    let rounded = ["lossy.webp", "lossy-alpha.webp", "cmyk.tif"].map(|it| Case::of(it, ROUNDED));
    let lossy =
        ["baseline.jpg", "progressive.jpg", "restarts.jpg", "grey.jpg", "cmyk.jpg", "jpeg.tif"]
            .map(|it| Case::of(it, LOSSY));
    let subsampled =
        ["4-2-2.jpg", "4-2-0.jpg", "progressive-4-2-0.jpg"].map(|it| Case::of(it, SUBSAMPLED));
    let cases: Vec<_> = exact.into_iter().chain(rounded).chain(lossy).chain(subsampled).collect();
    References::make().compare(&cases);
}

#[test]
fn a_resized_picture_has_the_same_pixels_as_by_pillow() {
    let mut cases = Vec::new();
    for fit in [Fit::Contain, Fit::Cover, Fit::Fill] {
        for (width, height) in [(64, 64), (100, 30), (17, 111), (193, 64), (1, 1)] {
            let (width, height) = (Some(width), Some(height));
            let bounds = Bounds { width, height, fit, enlarge: false };
            for (source, bound) in [
                ("rgb.png", RESIZED),
                ("rgba.png", RESIZED),
                ("grey-alpha.png", RESIZED),
                ("16-bit-rgb.png", RESIZED),
                ("transparent.gif", RESIZED),
                ("lossless.webp", RESIZED),
                ("24-bit.bmp", RESIZED),
                ("lzw.tif", RESIZED),
                ("baseline.jpg", RESIZED),
                ("4-2-0.jpg", RESIZED),
            ] {
                cases.push(Case { bounds, ..Case::of(source, bound) });
            }
        }
        // Enlarged.
        let bounds = Bounds { width: Some(301), height: Some(299), fit, enlarge: true };
        for source in ["rgb.png", "rgba.png"] {
            cases.push(Case { bounds, ..Case::of(source, RESIZED) });
        }
    }
    References::make().compare(&cases);
}

#[test]
fn all_eight_exif_orientations_are_rendered_upright() {
    let small = Bounds { width: Some(60), height: Some(60), ..AS_IT_IS };
    let mut cases = Vec::new();
    for turn in 1..=8 {
        for (kind, bound) in [("jpg", LOSSY), ("png", EXACT), ("webp", EXACT), ("tif", EXACT)] {
            let source = format!("turn-{turn}.{kind}");
            cases.push(Case::of(&source, bound));
            // The bounds are those of the upright picture.
            cases.push(Case { bounds: small, ..Case::of(&source, RESIZED) });
        }
    }
    // Some writers put the `Exif` mark before the data, as in JPEG.
    cases.extend((1..=8).map(|turn| Case::of(&format!("turn-{turn}-marked.webp"), EXACT)));
    let references = References::make();
    references.compare(&cases);
    let preview = |turn: u8| {
        let bytes = references.read(&format!("turn-{turn}.jpg"));
        let preview = picture::preview(&bytes, MediaType::Jpeg, None, LIMITS).unwrap();
        (preview.width, preview.height)
    };
    assert_eq!(preview(1), (193, 127));
    assert_eq!(preview(6), (127, 193));
}

#[test]
fn colours_follow_the_embedded_profile() {
    // Both libraries convert through 8-bit tables.
    let converted = Bound { difference: 2, psnr: 55.0 };
    let lossy = Bound { difference: 24, psnr: 50.0 };
    let mut cases = Vec::new();
    for profile in ["swapped", "p3", "adobe"] {
        for (kind, bound) in [
            (".png", converted),
            ("-alpha.png", converted),
            (".jpg", lossy),
            (".webp", converted),
            (".tif", converted),
        ] {
            cases.push(Case::of(&format!("{profile}{kind}"), bound));
        }
    }
    References::make().compare(&cases);
}

/// Mean difference of a channel, of 255, between a picture in Chromium and our variant of it.
const NEAR_CHROMIUM: f64 = 2.0;

#[test]
fn colours_are_those_of_chromium() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new(root.join("target/python/bin/python"))
        .arg(root.join("tests/pixels/tagged.py"))
        .arg(folder.path())
        .status();
    assert!(made.unwrap().success(), "Pillow is needed in target/python: run tests/run.sh");
    let mut pairs = Vec::new();
    for original in files(folder.path()) {
        let bytes = fs::read(&original).unwrap();
        let name = original.file_name().unwrap().to_str().unwrap();
        let media_type = sniff(&bytes).unwrap();
        let variant = variant(AS_IT_IS, Format::Png, 0, media_type);
        let rendered = picture::render(&bytes, media_type, variant, LIMITS);
        let rendered = rendered.unwrap_or_else(|error| panic!("{name}: {error}"));
        let product = format!("{name}.product.png");
        fs::write(folder.path().join(&product), rendered.bytes).unwrap();
        pairs.push(serde_json::json!({"original": name, "product": product}));
    }
    assert!(pairs.len() > 20, "{} pictures", pairs.len());
    let list = serde_json::to_vec(&pairs).unwrap();
    fs::write(folder.path().join("list.json"), list).unwrap();
    let compared = Command::new("timeout")
        .args(["--kill-after=5", "120", "node"])
        .arg(root.join("tests/pixels/colours.mjs"))
        .args([browser_folder().as_os_str(), CHROMIUM.as_ref(), folder.path().as_os_str()])
        .output()
        .unwrap();
    assert!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stderr));
    let compared: Vec<serde_json::Value> = serde_json::from_slice(&compared.stdout).unwrap();
    assert_eq!(compared.len(), pairs.len());
    let is_far = |it: &&serde_json::Value| it["error"].as_f64().is_none_or(|it| it > NEAR_CHROMIUM);
    let far: Vec<_> = compared.iter().filter(is_far).collect();
    assert!(far.is_empty(), "{far:#?}");
}

#[test]
fn transparent_red_does_not_bleed_into_blue() {
    let references = References::make();
    let bounds = |fit| Bounds { width: Some(31), height: Some(23), fit, enlarge: false };
    let mut cases = Vec::new();
    for source in ["hidden.png", "hidden.webp", "hidden.tif"] {
        for fit in [Fit::Contain, Fit::Cover, Fit::Fill] {
            cases.push(Case { bounds: bounds(fit), ..Case::of(source, RESIZED) });
            let bytes = references.read(source);
            let media_type = sniff(&bytes).unwrap();
            for format in READABLE {
                let variant = variant(bounds(fit), format, 85, media_type);
                let product = picture::render(&bytes, media_type, variant, LIMITS).unwrap().bytes;
                let shown = decode::decode(&product, format.media_type(), LIMITS).unwrap();
                let shown = shown.into_rgba8();
                for (x, y, pixel) in shown.enumerate_pixels() {
                    let [red, green, blue, alpha] = pixel.0.map(i32::from);
                    let ground = if format == Format::Jpeg { green } else { 0 };
                    // On white, red equals green; elsewhere there is no red. Lossy formats change both a little.
                    let bled = alpha > 16 && red > ground + 24;
                    assert!(!bled, "{source} {format:?} {x},{y}: {red} {green} {blue} {alpha}");
                }
            }
        }
    }
    references.compare(&cases);
}

#[test]
fn lossy_encoders_lose_no_more_than_libwebp_and_libjpeg_turbo() {
    let mut cases = Vec::new();
    let small = Bounds { width: Some(96), height: Some(96), ..AS_IT_IS };
    for source in ["rgb.png", "rgba.png", "grey.png", "palette-transparent.png", "baseline.jpg"] {
        for bounds in [AS_IT_IS, small] {
            for quality in [40, 85, 95] {
                for format in [Format::Avif, Format::WebP, Format::Jpeg] {
                    // AVIF at quality 40 loses more than the other formats.
                    let psnr = if quality < 85 { 25.0 } else { ENCODED.psnr };
                    let bound = Bound { psnr, ..ENCODED };
                    cases.push(Case { bounds, format, quality, ..Case::of(source, bound) });
                }
            }
        }
    }
    References::make().compare(&cases);
}

#[test]
fn a_rendered_picture_carries_no_metadata() {
    let references = References::make();
    let mark = b"what stays when the light is gone";
    let holds = |bytes: &[u8], part: &[u8]| bytes.windows(part.len()).any(|it| it == part);
    let mut cases = Vec::new();
    for source in ["told.png", "told.jpg", "told.webp", "told.tif", "told.gif"] {
        let bytes = references.read(source);
        assert!(holds(&bytes, mark), "{source} must carry metadata");
        let media_type = sniff(&bytes).unwrap();
        for format in Format::ALL {
            let lossy = Bound { difference: 24, psnr: 46.0 };
            let bound = if format == Format::Png { lossy } else { ENCODED };
            cases.push(Case { format, ..Case::of(source, bound) });
            for variant in [thumbnail(media_type), variant(AS_IT_IS, format, 85, media_type)] {
                let product = picture::render(&bytes, media_type, variant, LIMITS).unwrap().bytes;
                for part in [
                    &mark[..],
                    b"Exif",
                    b"eXIf",
                    b"EXIF",
                    b"ICC_PROFILE",
                    b"ICCP",
                    b"iCCP",
                    b"xmp",
                    b"XMP ",
                ] {
                    assert!(!holds(&product, part), "{source} as {format:?} carries {part:?}");
                }
            }
        }
    }
    references.compare(&cases);
}

#[test]
fn an_animation_is_rendered_as_its_first_frame() {
    let references = References::make();
    let moving = ["moving.png", "moving.gif", "moving.webp", "covered.png"];
    references.compare(&moving.map(|it| Case::of(it, EXACT)));
    for entry in fs::read_dir(references.0.path()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        // Products are in the same folder.
        if name.starts_with(|it: char| it.is_ascii_digit()) {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let media_type = sniff(&bytes).unwrap();
        assert_eq!(decode::is_animated(&bytes, media_type), moving.contains(&name), "{name}");
    }
}

/// Environment variable that names the folder of hostile files and of the report to the child process.
const CHILD: &str = "AFTERIMAGE_TEST_HOSTILE_FILES";
/// Limits of the child process.
const HOSTILE: RenderLimits = RenderLimits { pixels: 10_000_000, deadline: None };
/// Largest allowed peak of memory in MiB: sixteen bytes per pixel, and the process's own.
const MOST_MEMORY: u64 = 16 * 10 + 64;
/// Longest allowed time for a file, far above what any takes.
const LONGEST: Duration = Duration::from_mins(1);

#[test]
fn a_hostile_file_gives_a_picture_or_a_clear_error_in_bounded_memory_and_time() {
    const NAME: &str = "a_hostile_file_gives_a_picture_or_a_clear_error_in_bounded_memory_and_time";
    if let Some(folder) = std::env::var_os(CHILD) {
        take_hostile_files(Path::new(&folder));
        return;
    }
    // A process of its own: its peak of memory is due to these files, and the report names a file that kills it.
    let folder = tempfile::tempdir().unwrap();
    let (bombs_folder, sources) = (folder.path().join("bombs"), folder.path().join("sources"));
    fs::create_dir(&bombs_folder).unwrap();
    fs::create_dir(&sources).unwrap();
    for (name, bytes) in bombs() {
        fs::write(bombs_folder.join(name), bytes).unwrap();
    }
    reference("sources", &sources, None);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([&format!("pixels::{NAME}"), "--exact", "--nocapture"])
        .env(CHILD, folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > Duration::from_mins(15) {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let report = fs::read_to_string(folder.path().join("report")).unwrap();
    let last = report.lines().last().unwrap_or_default();
    assert!(
        status.is_some_and(|it| it.success()),
        "the child process ended with {status:?} at {last}"
    );

    let mut off = String::new();
    let mut all = 0;
    let (mut taken, mut pictures, mut highest, mut slowest) = (0, 0, (0, ""), (0, ""));
    for line in report.lines().filter(|it| it.starts_with("took")) {
        let fields: Vec<&str> = line.split('\t').collect();
        let [_, name, milliseconds, kibibytes, outcome] = fields[..] else { panic!("{line}") };
        let milliseconds: u64 = milliseconds.parse().unwrap();
        let mebibytes = kibibytes.parse::<u64>().unwrap() / 1024;
        taken += 1;
        all += milliseconds;
        pictures += u64::from(outcome.starts_with("picture"));
        highest = highest.max((mebibytes, name));
        slowest = slowest.max((milliseconds, name));
        let named = name.strip_prefix("bomb ").and_then(|it| it.split_once(": "));
        let wanted = named.is_none_or(|(wanted, _)| outcome.starts_with(wanted));
        let slow = u128::from(milliseconds) > LONGEST.as_millis();
        let panicked = outcome.contains(", panic ");
        if panicked || !wanted || slow || mebibytes > MOST_MEMORY {
            writeln!(off, "{name}: {outcome}, {milliseconds} ms, {mebibytes} MiB").unwrap();
        }
    }
    println!(
        "{taken} files, {pictures} pictures in {all} ms; {highest:?} MiB at most, {slowest:?} ms at most"
    );
    assert!(off.is_empty(), "\n{off}");
    assert!(taken > 2_500 && pictures > 700, "{taken} files, {pictures} pictures");
}

/// Renders each file as the service would. Reports its name before, and the outcome after.
fn take_hostile_files(folder: &Path) {
    let mut report = File::create(folder.join("report")).unwrap();
    // A hard stop well above the bound: this limit also counts memory that is reserved and not used.
    rlimit::Resource::AS.set(4 << 30, 4 << 30).unwrap();
    // Caught panics are recorded too.
    let panicked = Arc::new(Mutex::new(String::new()));
    panic::set_hook(Box::new({
        let panicked = Arc::clone(&panicked);
        move |panic| *panicked.lock().unwrap() = panic.to_string()
    }));
    let mut take = |name: &str, bytes: &[u8]| {
        writeln!(report, "takes\t{name}").unwrap();
        forget_peak();
        let start = Instant::now();
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| outcome(bytes)));
        let outcome = outcome.unwrap_or_else(|_| "none".to_owned());
        let panicked = std::mem::take(&mut *panicked.lock().unwrap());
        let outcome =
            if panicked.is_empty() { outcome } else { format!("{outcome}, panic {panicked}") };
        let (took, peak) = (start.elapsed().as_millis(), peak());
        let outcome = outcome.replace(['\n', '\t'], " ");
        writeln!(report, "took\t{name}\t{took}\t{peak}\t{outcome}").unwrap();
    };

    for path in files(&folder.join("bombs")) {
        let name = path.file_name().unwrap().to_str().unwrap();
        take(&format!("bomb {name}"), &fs::read(&path).unwrap());
    }
    let damaged = std::env::var("AFTERIMAGE_TEST_DAMAGED").ok();
    let damaged: usize = damaged.map_or(5, |it| it.parse().expect("a number of files"));
    let (parts, last) = if damaged > 5 { (8, 6) } else { (4, 2) };
    let mut chance = fastrand::Rng::with_seed(5);
    for path in files(&folder.join("sources")) {
        let (name, bytes) = (path.file_name().unwrap().to_str().unwrap(), fs::read(&path).unwrap());
        // The other orientations differ in a byte only.
        if name.starts_with("turn-") && !name.starts_with("turn-6") {
            continue;
        }
        for part in 0..parts {
            let length = bytes.len() * part / parts;
            take(&format!("{name} cut at {length}"), &bytes[..length]);
        }
        for length in (bytes.len().saturating_sub(last)..bytes.len()).chain(0..12) {
            take(&format!("{name} cut at {length}"), &bytes[..length.min(bytes.len())]);
        }
        for number in 0..damaged {
            let mut bytes = bytes.clone();
            // Half of the damage goes to the header, where most traps are.
            let reach = if number % 2 == 0 { 200 } else { bytes.len() };
            for _ in 0..=number % 4 {
                let at = chance.usize(..reach.min(bytes.len()));
                bytes[at] = if number % 3 == 0 { 255 } else { chance.u8(..) };
            }
            take(&format!("{name} damaged {number}"), &bytes);
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = files(&root.join("target/corpus"));
    assert!(corpus.len() > 700, "Pillow's images are needed: run tests/run.sh, which gets them");
    for path in corpus {
        let name = path.strip_prefix(root).unwrap().display().to_string();
        take(&name, &fs::read(&path).unwrap());
    }
}

/// Outcome of a render of these bytes. Each other decoder gets the bytes too, and must survive them.
fn outcome(bytes: &[u8]) -> String {
    const ALL: [MediaType; 7] = [
        MediaType::Png,
        MediaType::Jpeg,
        MediaType::Gif,
        MediaType::WebP,
        MediaType::Bmp,
        MediaType::Ico,
        MediaType::Tiff,
    ];
    let own = sniff(bytes);
    for media_type in ALL {
        std::hint::black_box(decode::is_animated(bytes, media_type));
        if Some(media_type) != own {
            drop(decode::decode(bytes, media_type, HOSTILE));
        }
    }
    let Some(media_type) = own else { return "no image".to_owned() };
    let start = Instant::now();
    std::hint::black_box(decode::is_animated(bytes, media_type));
    assert!(start.elapsed() < Duration::from_secs(1), "is_animated took {:?}", start.elapsed());
    let most = AnimationLimits { frames: 20, pixels: 2_000_000 };
    let variant = thumbnail(MediaType::Png);
    let memory = picture::animation_memory(bytes, media_type, variant, HOSTILE, most);
    match picture::render_animation(bytes, media_type, variant, HOSTILE, most) {
        Ok(product) => {
            memory.unwrap();
            assert_eq!(sniff(&product.bytes), Some(MediaType::WebP));
        }
        Err(PictureError::Encoding(error)) => panic!("{error}"),
        Err(_refused) => {}
    }
    match picture::render(bytes, media_type, thumbnail(MediaType::Png), HOSTILE) {
        Ok(product) => {
            assert_eq!(sniff(&product.bytes), Some(MediaType::WebP));
            format!("picture of {media_type:?}")
        }
        Err(error @ PictureError::TooManyPixels { .. }) => format!("large {error}"),
        Err(error @ PictureError::Broken(_)) => format!("broken {error}"),
        Err(error @ (PictureError::Opaque(_) | PictureError::Unsupported(_))) => {
            format!("opaque {error}")
        }
        Err(error) => panic!("{error}"),
    }
}

/// Lists the files of a folder recursively, sorted by name.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Resets the peak of resident memory to its present value: 5 in `proc_pid_clear_refs(5)`.
fn forget_peak() {
    fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// Peak of resident memory in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|it| it.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Small files that demand much memory or time. The name begins with the expected outcome, if only one is right.
#[expect(clippy::too_many_lines, reason = "a list of files, and the functions that write them")]
fn bombs() -> Vec<(String, Vec<u8>)> {
    let le16 = |number: u16| number.to_le_bytes();
    let le32 = |number: u32| number.to_le_bytes();
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>| all.push((name.to_owned(), bytes));

    // PNG.
    let grey = |side: u32| {
        png(
            side,
            side,
            1,
            0,
            &[],
            &zeros((side as usize).div_ceil(8) * side as usize + side as usize),
        )
    };
    add("large: PNG of 30,000 by 30,000", grey(30_000));
    add("picture: PNG of 3,000 by 3,000 in few bytes", grey(3_000));
    add("large: PNG with the largest sides", png(0x7fff_ffff, 0x7fff_ffff, 16, 6, &[], &zeros(9)));
    add("broken: PNG with no pixels", png(0, 0, 8, 2, &[], &zeros(9)));
    add("broken: PNG that lacks its pixels", png(3_000, 3_000, 16, 6, &[], &zeros(9)));
    add(
        "picture: PNG with the most memory a pixel",
        png(3_000, 3_000, 16, 6, &[], &zeros(3_000 * (8 * 3_000 + 1))),
    );
    add("picture: PNG with too much data", png(8, 8, 8, 0, &[], &zeros(300 << 20)));
    let profile = [b"a\0\0".to_vec(), zeros(300 << 20)].concat();
    let bombed = png(8, 8, 8, 6, &[chunk(*b"iCCP", &profile)], &zeros(8 * 33));
    add("picture: PNG with 300 MiB of profile", bombed.clone());
    let small = |kind, before: &[u8]| {
        let body = [before, &zeros(300 << 20)].concat();
        png(8, 8, 8, 6, &[chunk(kind, &body)], &zeros(8 * 33))
    };
    add("picture: PNG with 300 MiB of text", small(*b"zTXt", b"a\0\0"));
    add("picture: PNG with 300 MiB of XMP", small(*b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0"));
    let text = chunk(*b"tEXt", &[b"a\0".to_vec(), vec![b'a'; 20 << 20]].concat());
    add("picture: PNG with 20 MiB of plain text", png(8, 8, 8, 6, &[text], &zeros(8 * 33)));
    let many: Vec<_> = (0..200_000).map(|_| chunk(*b"tEXt", b"a\0b")).collect();
    add("picture: PNG with 200,000 texts", png(8, 8, 8, 6, &many, &zeros(8 * 33)));
    let whole = png(8, 8, 8, 6, &[], &zeros(8 * 33));
    // Browsers show the second.
    for (name, at) in [
        ("broken: PNG with a wrong checksum of its header", 16 + 13),
        ("picture: PNG with a wrong checksum of its pixels", whole.len() - 13),
    ] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        add(name, bytes);
    }
    let mut chunks =
        vec![chunk(*b"acTL", &[100_000_u32.to_be_bytes(), 0_u32.to_be_bytes()].concat())];
    chunks.extend((0..100_000_u32).map(|number| {
        let sides = [number, 8, 8, 0, 0].map(u32::to_be_bytes).concat();
        chunk(*b"fcTL", &[sides, vec![0, 1, 0, 1, 0, 0]].concat())
    }));
    add(": PNG of 100,000 frames", png(8, 8, 8, 6, &chunks, &zeros(8 * 33)));

    // GIF.
    let frame = |width: u16, height: u16| {
        [&b","[..], &[0; 4], &le16(width), &le16(height), &[0, 2, 2, 0x4c, 1, 0]].concat()
    };
    let gif = |width: u16, height: u16, frames: &[u8]| {
        let head =
            [&b"GIF89a"[..], &le16(width), &le16(height), &[0x80, 0, 0, 0, 0, 0, 255, 255, 255]];
        [head.concat(), frames.to_vec(), b";".to_vec()].concat()
    };
    add("picture: GIF of 100,000 frames", gif(1, 1, &frame(1, 1).repeat(100_000)));
    add(
        "large: GIF with a screen of 65,535 by 65,535",
        gif(u16::MAX, u16::MAX, &frame(1, 1).repeat(3)),
    );
    add(
        "large: GIF with a frame of 65,535 by 65,535",
        gif(1, 1, &frame(u16::MAX, u16::MAX).repeat(3)),
    );
    add(": GIF whose pixels are missing", gif(3_000, 3_000, &frame(3_000, 3_000)));
    add("broken: GIF without frames", gif(8, 8, &[]));
    let comment =
        [&b"!\xfe"[..], &[&[255_u8][..], &[b'a'; 255]].concat().repeat(80_000), &[0]].concat();
    add("picture: GIF with 20 MiB of comment", gif(1, 1, &[comment, frame(1, 1)].concat()));

    // JPEG.
    let jpeg = |width: u16, height: u16, sof: u8, components: u8, rest: &[u8]| {
        let mut bytes = b"\xff\xd8\xff\xdb\0\x43\0".to_vec();
        bytes.extend([1; 64]);
        bytes.extend([0xff, sof, 0, 8 + 3 * components, 8]);
        bytes.extend(height.to_be_bytes());
        bytes.extend(width.to_be_bytes());
        bytes.push(components);
        for number in 1..=components {
            bytes.extend([number, 0x11, 0]);
        }
        // One code of one bit for zero, in both tables.
        for class in [0x00, 0x10] {
            bytes.extend([0xff, 0xc4, 0, 20, class, 1]);
            bytes.extend([0; 16]);
        }
        bytes.extend(rest);
        bytes.extend(b"\xff\xd9");
        bytes
    };
    let scan = |from: u8, to: u8, approximation: u8, data: &[u8]| {
        [&[0xff, 0xda, 0, 8, 1, 1, 0, from, to, approximation], data].concat()
    };
    add(
        "large: JPEG of 65,500 by 65,500",
        jpeg(65_500, 65_500, 0xc0, 1, &scan(0, 63, 0, &[0; 99])),
    );
    add(
        "large: JPEG of 65,500 by 65,500, progressive",
        jpeg(65_500, 65_500, 0xc2, 3, &scan(0, 0, 0, &[0; 99])),
    );
    add(": JPEG that lacks its pixels", jpeg(3_000, 3_000, 0xc0, 1, &scan(0, 63, 0, &[0; 99])));
    add(
        ": JPEG that lacks its pixels, progressive",
        jpeg(3_000, 3_000, 0xc2, 3, &scan(0, 0, 0, &[0; 99])),
    );
    add("opaque: JPEG without height", jpeg(3_000, 0, 0xc0, 1, &scan(0, 63, 0, &[0; 99])));
    // A few bytes make the decoder pass over the whole picture again: one code ends 32,767 blocks at once.
    let end = [&b"\xff\xc4\0\x14\x10\x01"[..], &[0; 15], &[0xe0]].concat();
    let passes = scan(1, 63, 0, &[0; 20]).repeat(40_000);
    let scans = [scan(0, 0, 0, &vec![0; 40_000]), end, passes].concat();
    add(": JPEG of 40,000 passes", jpeg(3_100, 3_100, 0xc2, 1, &scans));

    // TIFF.
    let tiff = |tags: &[(u16, u16, u32, u32)]| {
        let mut bytes = b"II\x2a\0\x08\0\0\0".to_vec();
        bytes.extend(le16(u16::try_from(tags.len()).unwrap()));
        for &(tag, kind, count, value) in tags {
            bytes.extend([le16(tag), le16(kind)].concat());
            bytes.extend([le32(count), le32(value)].concat());
        }
        bytes.extend([0; 4]);
        bytes.extend([0; 4096]);
        bytes
    };
    let sides = |width, height| {
        [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    };
    let strips = |width, height, count: u32, rows| {
        [
            &sides(width, height)[..],
            &[(273, 4, count, 8), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, count, 8)],
        ]
        .concat()
    };
    add(": TIFF of 4 billion by 4 billion", tiff(&strips(u32::MAX, u32::MAX, 1, u32::MAX)));
    add(": TIFF of 4 billion strips", tiff(&strips(8, u32::MAX, u32::MAX, 1)));
    add(": TIFF with more strips than rows", tiff(&strips(3_000, 3_000, u32::MAX, 1)));
    add(": TIFF with strips of no rows", tiff(&strips(3_000, 3_000, 1, 0)));
    let tiles = |across, down, count| {
        [
            &sides(3_000, 3_000)[..],
            &[
                (277, 3, 1, 1),
                (322, 4, 1, across),
                (323, 4, 1, down),
                (324, 4, count, 8),
                (325, 4, count, 8),
            ],
        ]
        .concat()
    };
    add(": TIFF with tiles of 4 billion", tiff(&tiles(u32::MAX - 15, u32::MAX - 15, 1)));
    add(": TIFF with tiles of a gigabyte", tiff(&tiles(32_768, 32_768, 1)));
    add(": TIFF with tiles of nothing", tiff(&tiles(0, 0, 1)));
    add(": TIFF with 4 billion tiles", tiff(&tiles(16, 16, u32::MAX)));
    let samples =
        [&strips(3_000, 3_000, 1, 3_000)[..], &[(277, 3, 1, 65_535), (258, 3, 1, 64)]].concat();
    add(": TIFF with 65,535 samples a pixel", tiff(&samples));
    let told =
        [&strips(8, 8, 1, 8)[..], &[(34_675, 7, u32::MAX, 8), (700, 1, u32::MAX, 8)]].concat();
    add(": TIFF with 4 GiB of profile", tiff(&told));

    // BMP.
    let bmp = |width: i32, height: i32, bits: u16, compression: u32, colours: u32| {
        let mut bytes = [&b"BM"[..], &le32(70_000), &[0; 4], &le32(54), &le32(40)].concat();
        bytes.extend([width.to_le_bytes(), height.to_le_bytes()].concat());
        bytes.extend([le16(1), le16(bits)].concat());
        bytes.extend([compression, 0, 0, 0, colours, 0].map(u32::to_le_bytes).concat());
        bytes.extend([0; 2048]);
        bytes
    };
    add("large: BMP of the largest size, upside down", bmp(i32::MAX, i32::MIN, 24, 0, 0));
    add("large: BMP with the smallest number as height", bmp(8, i32::MIN, 24, 0, 0));
    add(": BMP of a negative width", bmp(-8, 8, 24, 0, 0));
    add("large: BMP of 65,000 by 65,000, upside down", bmp(65_000, -65_000, 24, 0, 0));
    add("broken: BMP that lacks its pixels", bmp(3_000, 3_000, 24, 0, 0));
    add(": BMP that lacks its pixels, compressed", bmp(3_000, 3_000, 8, 1, 256));
    add(": BMP with 4 billion colours", bmp(8, 8, 8, 0, u32::MAX));
    add(": BMP of no pixels", bmp(0, 0, 24, 0, 0));

    // ICO.
    let ico = |entries: u16, side: u8, length: u32, inner: &[u8]| {
        let mut bytes = [le16(0), le16(1), le16(entries)].concat();
        let start = 6 + 16 * u32::from(entries);
        for _ in 0..entries {
            bytes.extend([side, side, 0, 0]);
            bytes.extend([le16(1), le16(32)].concat());
            bytes.extend([le32(length), le32(start)].concat());
        }
        bytes.extend(inner);
        bytes
    };
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap();
    add("picture: ICO of a PNG", ico(1, 8, length(&whole), &whole));
    add(": ICO of a PNG with 300 MiB of profile", ico(1, 8, length(&bombed), &bombed));
    let huge = grey(30_000);
    add("large: ICO of a PNG of 30,000 by 30,000", ico(1, 0, length(&huge), &huge));
    add("picture: ICO of 65,535 pictures", ico(u16::MAX, 8, length(&whole), &whole));
    add(": ICO that lacks its pictures", ico(u16::MAX, 8, 99, &[])[..999].to_vec());
    let mut nested = whole.clone();
    for _ in 0..100 {
        nested = ico(1, 8, length(&nested), &nested);
    }
    add("no image: ICO of an ICO of an ICO", nested);
    let mut itself = ico(1, 8, 22, &[]);
    itself[18..22].copy_from_slice(&le32(0));
    add(": ICO of itself", itself);

    // WebP.
    let riff = |chunks: &[u8]| [&b"RIFF"[..], &le32(length(chunks) + 4), b"WEBP", chunks].concat();
    let part = |kind: &[u8; 4], declared: u32, body: &[u8]| {
        [&kind[..], &le32(declared), body, &[0][..body.len() % 2]].concat()
    };
    let le24 = |number: u32| number.to_le_bytes()[..3].to_vec();
    let extended = |flags: u8, width: u32, height: u32| {
        part(b"VP8X", 10, &[vec![flags, 0, 0, 0], le24(width - 1), le24(height - 1)].concat())
    };
    // Each channel has one code of no bits: a picture of one colour.
    let lossless = |side: u32| {
        let head = (side - 1) | ((side - 1) << 14);
        let mut body = vec![0x2f];
        body.extend(le32(head));
        body.extend([0x88, 0x88, 0x08, 0, 0, 0, 0, 0, 0, 0]);
        part(b"VP8L", length(&body), &body)
    };
    add(": WebP of 16,384 by 16,384", riff(&lossless(16_384)));
    add(": WebP of 3,000 by 3,000 in few bytes", riff(&lossless(3_000)));
    add(
        ": WebP with the largest canvas",
        riff(&[extended(0, 1 << 24, 1 << 8), lossless(8)].concat()),
    );
    add(
        ": WebP with a canvas of 2^48 pixels",
        riff(&[extended(0, 1 << 24, 1 << 24), lossless(8)].concat()),
    );
    add(": WebP larger than its canvas", riff(&[extended(0, 8, 8), lossless(16_384)].concat()));
    for (kind, flag) in
        [(b"ICCP", 0x20), (b"EXIF", 0x08), (b"XMP ", 0x04), (b"ALPH", 0x10), (b"ANIM", 0x02)]
    {
        let parts = [extended(flag, 8, 8), part(kind, 0xffff_fff0, &[]), lossless(8)].concat();
        let kind = std::str::from_utf8(kind).unwrap();
        add(&format!(": WebP with 4 GiB of {kind}"), riff(&parts));
    }
    let animation = part(b"ANIM", 6, &[0; 6]);
    let inner = lossless(8);
    let body = [le24(0), le24(0), le24(7), le24(7), le24(100), vec![0], inner].concat();
    let frames = part(b"ANMF", length(&body), &body).repeat(100_000);
    add(": WebP of 100,000 frames", riff(&[extended(2, 8, 8), animation.clone(), frames].concat()));
    let frame = part(b"ANMF", length(&body), &body);
    add(
        ": WebP of a small frame on a large canvas",
        riff(&[extended(2, 3_000, 3_000), animation, frame].concat()),
    );
    all
}

fn png(width: u32, height: u32, depth: u8, colour: u8, before: &[Vec<u8>], data: &[u8]) -> Vec<u8> {
    let sides = [width.to_be_bytes(), height.to_be_bytes()].concat();
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    bytes.extend(chunk(*b"IHDR", &[sides, vec![depth, colour, 0, 0, 0]].concat()));
    bytes.extend(before.concat());
    bytes.extend(chunk(*b"IDAT", data));
    bytes.extend(chunk(*b"IEND", &[]));
    bytes
}

fn chunk(kind: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(&kind);
    crc.update(body);
    let length = u32::try_from(body.len()).unwrap();
    [&length.to_be_bytes()[..], &kind, body, &crc.sum().to_be_bytes()].concat()
}

/// Compresses a number of zero bytes.
fn zeros(length: usize) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    let block = vec![0; 1 << 16];
    let mut left = length;
    while left > 0 {
        let part = left.min(block.len());
        encoder.write_all(&block[..part]).unwrap();
        left -= part;
    }
    encoder.finish().unwrap()
}
