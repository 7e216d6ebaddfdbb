//! Browser caching: a real Chromium shows a page with three images.
//!
//! The number of requests is read from Afterimage's metrics; the browser's own reports about its cache are only a second
//! source.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Cursor, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use hyper::Method;
use image::{DynamicImage, ImageFormat, Rgb, RgbImage};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::harness::{Client, RedisServer, Server, etag, record, until};

/// Path of Debian's Chromium.
pub(crate) const CHROMIUM: &str = "/usr/bin/chromium";

/// Longest duration of a browser action. The script gives up earlier, and reports at which step.
const PATIENCE: Duration = Duration::from_secs(90);

const IDS: [&str; 3] = ["hero_abc123", "logo_def456", "photo_ghi789"];

const WIDTH: u32 = 160;
const HEIGHT: u32 = 120;

/// The folder with the packages that drive Chromium, and with those that pages use.
pub(crate) fn browser_folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/browser");
    assert!(
        folder.join("node_modules/vite").exists(),
        "vite is needed in target/browser: run tests/run.sh, which installs it"
    );
    folder
}

/// A script of this folder's for Node.
pub(crate) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser").join(name)
}

/// Runs a script that makes many checks in one Chromium and prints a line of JSON for each, and prints its lines. Fails with those
/// that aren't `ok`.
pub(crate) async fn passes_checks(name: &str, arguments: &[&str]) {
    // What a script waits for in a page has no end of its own.
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "300", "node"]);
    command.arg(script(name)).arg(browser_folder()).arg(CHROMIUM).args(arguments);
    command.stderr(Stdio::inherit());
    let run = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let printed = String::from_utf8(run.stdout).unwrap();
    print!("{printed}");
    let checks: Vec<Value> = printed.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
    let failed: Vec<_> = checks.iter().filter(|check| check["ok"] == false).collect();
    assert!(failed.is_empty() && run.status.success(), "{failed:#?}");
    let made = checks.iter().filter(|check| check["ok"] == true).count();
    assert!(made > 5, "only {made} checks were made");
}

#[tokio::test]
async fn a_cross_site_page_shows_its_images_again_without_a_request() {
    let shelf = Shelf::start(&[]).await;
    let images_at = format!("http://{}", shelf.server.address);
    shows_its_images_again_without_a_request(&shelf, &images_at).await;
}

#[tokio::test]
async fn a_page_behind_a_development_proxy_shows_its_images_again_without_a_request() {
    let shelf = Shelf::start(&[]).await;
    shows_its_images_again_without_a_request(&shelf, "").await;
}

async fn shows_its_images_again_without_a_request(shelf: &Shelf, images_at: &str) {
    let site = Site::start(shelf.server.address).await;
    let mut chromium = Chromium::start();
    site.shows(IDS.map(|id| format!("{images_at}/images/{id}")));
    assert_eq!(shelf.answered().await, counts(&[]));

    let first = chromium.loads(&json!({ "open": site.url })).await;
    assert_eq!(first.wire(), [Some(200); 3]);
    chromium.draws(&first, &shelf.pictures).await;
    assert_eq!(shelf.answered().await, counts(&[("GET 200", 3)]));

    for again in [
        json!({ "reload": null }),
        json!({ "leave_and_come_back": null }),
        json!({ "open": site.url }),
        json!({ "restart": site.url }),
    ] {
        let second = chromium.loads(&again).await;
        assert!(second.requests.iter().all(|it| it.cache.is_some()), "{again}: {second:?}");
        chromium.draws(&second, &shelf.pictures).await;
        assert_eq!(shelf.answered().await, counts(&[("GET 200", 3)]), "{again}");
    }

    let forced = chromium.loads(&json!({ "reload_past_cache": null })).await;
    assert_eq!(forced.wire(), [Some(200); 3]);
    assert_eq!(shelf.answered().await, counts(&[("GET 200", 6)]));
}

#[tokio::test]
async fn a_reload_revalidates_an_image_in_its_own_tab_and_a_forced_reload_fetches_it() {
    let shelf = Shelf::start(&[]).await;
    let mut chromium = Chromium::start();
    let url = format!("http://{}/images/{}", shelf.server.address, IDS[0]);
    let open = json!({ "open": url });

    let first = chromium.loads(&open).await;
    assert_eq!(first.wire(), [Some(200)]);
    assert_eq!((first.images[0].width, first.images[0].height), (WIDTH, HEIGHT));
    // Another tab takes it from the cache. A reload of the document itself revalidates it, `immutable` or not.
    for (action, wire, conditional, answered) in [
        (&open, None, false, counts(&[("GET 200", 1)])),
        (&json!({ "reload": null }), Some(304), true, counts(&[("GET 200", 1), ("GET 304", 1)])),
        (
            &json!({ "reload_past_cache": null }),
            Some(200),
            false,
            counts(&[("GET 200", 2), ("GET 304", 1)]),
        ),
        (&open, None, false, counts(&[("GET 200", 2), ("GET 304", 1)])),
    ] {
        let loaded = chromium.loads(action).await;
        assert_eq!(loaded.wire(), [wire], "{action}");
        assert_eq!(loaded.requests[0].conditional, conditional, "{action}");
        assert_eq!((loaded.images[0].width, loaded.images[0].height), (WIDTH, HEIGHT), "{action}");
        assert_eq!(shelf.answered().await, answered, "{action}");
    }
}

#[tokio::test]
async fn a_replaced_image_is_fetched_once_under_its_new_version() {
    let mut shelf = Shelf::start(&[]).await;
    let site = Site::start(shelf.server.address).await;
    let mut chromium = Chromium::start();
    let open = json!({ "open": site.url });
    let images_at = format!("http://{}/images", shelf.server.address);

    site.shows(shelf.versions().map(|version| format!("{images_at}/{version}")));
    let before = chromium.loads(&open).await;
    chromium.draws(&before, &shelf.pictures).await;
    assert_eq!(shelf.answered().await, counts(&[("GET 200", 3)]));

    shelf.replace(1, Picture::new(4, ImageFormat::Png)).await;
    site.shows(shelf.versions().map(|version| format!("{images_at}/{version}")));
    let after = chromium.loads(&open).await;
    chromium.draws(&after, &shelf.pictures).await;
    let asked: Vec<_> = after.requests.iter().filter(|it| it.wire.is_some()).collect();
    assert_eq!(asked.len(), 1, "{after:?}");
    assert_eq!(asked[0].address, format!("{images_at}/{}", shelf.versions()[1]));
    assert_eq!((asked[0].wire, asked[0].conditional), (Some(200), false));
    assert_eq!(shelf.answered().await, counts(&[("GET 200", 4)]));

    for again in [open, json!({ "reload": null }), json!({ "restart": site.url })] {
        let loaded = chromium.loads(&again).await;
        chromium.draws(&loaded, &shelf.pictures).await;
        assert_eq!(shelf.answered().await, counts(&[("GET 200", 4)]), "{again}");
    }
}

#[tokio::test]
async fn a_reload_shows_a_replaced_image_under_its_plain_url() {
    let mut shelf = Shelf::start(&[]).await;
    let mut chromium = Chromium::start();
    let url = format!("http://{}/images/{}", shelf.server.address, IDS[0]);
    chromium.loads(&json!({ "open": url })).await;

    let wide = Picture::from(RgbImage::from_pixel(2 * WIDTH, HEIGHT, Rgb([9, 8, 7])));
    shelf.replace(0, wide).await;
    let kept = chromium.loads(&json!({ "open": url })).await;
    assert_eq!((kept.images[0].width, kept.wire()), (WIDTH, vec![None]));
    let reloaded = chromium.loads(&json!({ "reload": null })).await;
    assert_eq!((reloaded.images[0].width, reloaded.wire()), (2 * WIDTH, vec![Some(200)]));
    assert!(reloaded.requests[0].conditional);
    assert_eq!(shelf.answered().await, counts(&[("GET 200", 2)]));
}

#[tokio::test]
async fn a_cross_site_page_can_read_the_timing_of_its_images() {
    let shelf = Shelf::start(&[]).await;
    let site = Site::start(shelf.server.address).await;
    let mut chromium = Chromium::start();
    site.shows(IDS.map(|id| format!("http://{}/images/{id}", shelf.server.address)));

    chromium.loads(&json!({ "open": site.url })).await;
    let first = chromium.acts(&json!({ "timings": null })).await;
    chromium.loads(&json!({ "reload": null })).await;
    let second = chromium.acts(&json!({ "timings": null })).await;
    for timings in [&first, &second] {
        assert_eq!(timings.as_array().unwrap().len(), 3, "{timings}");
    }
    for (id, picture) in IDS.iter().zip(&shelf.pictures) {
        // The entries are in the order in which the loads finished.
        let of = |timings: &Value| {
            let mut listed = timings.as_array().unwrap().iter();
            listed.find(|it| it["name"].as_str().unwrap().ends_with(id)).unwrap().clone()
        };
        let (first, second) = (of(&first), of(&second));
        let number = |name: &str| first[name].as_f64().unwrap();
        assert_eq!(first["encodedBodySize"], picture.bytes.len(), "{first}");
        assert!(number("transferSize") > number("encodedBodySize"), "{first}");
        let moments = ["fetchStart", "requestStart", "responseStart", "responseEnd"].map(number);
        assert!(moments[0] > 0.0 && moments.is_sorted(), "{first}");
        // The image was cold: it was fetched, hashed and decoded.
        let parts: Vec<_> = first["serverTiming"].as_array().unwrap().iter().collect();
        let names: Vec<_> = parts.iter().map(|it| it["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["store", "hash", "decode"], "{first}");
        assert!(parts.iter().all(|it| it["duration"].as_f64().unwrap() > 0.0), "{first}");

        assert_eq!(second["transferSize"], 0, "{second}");
        assert_eq!(second["deliveryType"], "cache", "{second}");
    }
}

#[tokio::test]
async fn a_cross_origin_script_reads_images_if_cors_allows_it() {
    // The site starts first, since the server's settings need its origin. It has no server to forward to yet.
    for listed in [false, true] {
        let site = Site::start(([127, 0, 0, 1], 1).into()).await;
        let origins = if listed { json!([site.origin()]) } else { json!(["*"]) }.to_string();
        let shelf = Shelf::start(&[("http.cors_origins", &origins)]).await;
        let mut chromium = Chromium::start();
        let urls = IDS.map(|id| format!("http://{}/images/{id}", shelf.server.address));
        site.shows(urls.clone());
        let loaded = chromium.loads(&json!({ "open": site.url })).await;
        chromium.draws(&loaded, &shelf.pictures).await;

        let (length, known) = (shelf.pictures[0].bytes.len(), etag(&shelf.pictures[0].value));
        let unconditional = chromium.fetches(&urls[0], &json!({})).await;
        assert_eq!(unconditional["status"], 200, "{unconditional}");
        assert_eq!(unconditional["length"], length);
        assert_eq!(unconditional["headers"]["etag"], known);

        // Ranges of a cached image and of an uncached one. The browser makes the first 206 itself.
        for (index, url) in [(0, &urls[0]), (1, &format!("{}?v=1", urls[1]))] {
            let Picture { bytes, value, .. } = &shelf.pictures[index];
            let range = chromium.fetches(url, &json!({ "range": "bytes=10-109" })).await;
            assert_eq!(range["status"], 206, "{range}");
            assert_eq!(range["length"], 100);
            let content_range = format!("bytes 10-109/{}", bytes.len());
            assert_eq!(range["headers"]["content-range"], content_range);
            assert_eq!(range["headers"]["etag"], etag(value));
        }
        assert_eq!(shelf.answered().await["GET 206"], 1);
        // None of these requests needs a preflight.
        assert!(!shelf.answered().await.contains_key("OPTIONS 200"));

        // A custom header needs a preflight, whose result the browser remembers.
        for _ in 0..2 {
            let named = chromium.fetches(&urls[0], &json!({ "x-request-id": "a-1" })).await;
            assert_eq!(named["status"], 200, "{named}");
            assert_eq!(shelf.answered().await["OPTIONS 200"], 1);
        }
        // Chromium sends this request: a script's own condition bypasses its caches.
        let unchanged = chromium.fetches(&urls[0], &json!({ "if-none-match": known })).await;
        assert_eq!(unchanged["status"], 304, "{unchanged}");
        assert_eq!(unchanged["headers"]["etag"], known);
    }
}

#[tokio::test]
async fn without_cors_a_cross_origin_script_is_refused_and_the_image_is_still_shown() {
    let other = r#"["https://elsewhere.example"]"#;
    for settings in [&[][..], &[("http.cors_origins", other)]] {
        let shelf = Shelf::start(settings).await;
        let site = Site::start(shelf.server.address).await;
        let mut chromium = Chromium::start();
        let urls = IDS.map(|id| format!("http://{}/images/{id}", shelf.server.address));
        site.shows(urls.clone());
        let loaded = chromium.loads(&json!({ "open": site.url })).await;
        chromium.draws(&loaded, &shelf.pictures).await;
        for headers in
            [json!({}), json!({ "range": "bytes=10-109" }), json!({ "if-none-match": "\"x\"" })]
        {
            let refused = chromium.fetches(&urls[0], &headers).await;
            assert_eq!(refused["error"], "TypeError: Failed to fetch", "{headers}: {refused}");
        }
        // The same script may read an image of its own origin.
        let own = chromium.fetches(&format!("/images/{}", IDS[0]), &json!({})).await;
        assert_eq!(own["status"], 200, "{own}");
    }
}

/// Three images in Redis, and Afterimage before it.
struct Shelf {
    redis: RedisServer,
    server: Server,
    pictures: [Picture; 3],
}

impl Shelf {
    async fn start(settings: &[(&str, &str)]) -> Shelf {
        let redis = RedisServer::start().await;
        let server = Server::on(&redis, settings).await.coherent().await;
        let formats = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];
        let pictures = [0, 1, 2].map(|index| Picture::new(index, formats[index]));
        for (id, picture) in IDS.iter().zip(&pictures) {
            redis.set(id, &picture.value).await;
        }
        Shelf { redis, server, pictures }
    }

    /// Replaces an image as a backend does, and waits until Afterimage serves the new version.
    async fn replace(&mut self, index: usize, picture: Picture) {
        self.redis.set(IDS[index], &picture.value).await;
        let path = format!("/images/{}", IDS[index]);
        until("the new image is served", || async {
            // A HEAD, since `answered` doesn't count it.
            let head = self.server.send(Method::HEAD, &path, &[], Bytes::new()).await;
            head.header("etag") == etag(&picture.value)
        })
        .await;
        self.pictures[index] = picture;
    }

    /// Versioned addresses as a backend gives them out, with the MD5 of the record.
    fn versions(&self) -> [String; 3] {
        [0, 1, 2].map(|index| {
            let etag = etag(&self.pictures[index].value);
            format!("{}?v={}", IDS[index], etag.trim_matches('"'))
        })
    }

    /// Number of image requests answered, by method and status, without the test's own HEADs.
    async fn answered(&self) -> BTreeMap<String, u64> {
        let page = self.server.get("/metrics").await;
        let counted = r#"afterimage_requests_total{route="/images/{id}",method=""#;
        std::str::from_utf8(&page.body)
            .unwrap()
            .lines()
            .filter_map(|line| {
                let (method, rest) = line.strip_prefix(counted)?.split_once("\",status=\"")?;
                let (status, count) = rest.split_once("\"} ")?;
                Some((format!("{method} {status}"), count.parse().unwrap()))
            })
            // Some counters exist from the start, at zero.
            .filter(|(what, count)| !what.starts_with("HEAD ") && *count > 0)
            .collect()
    }
}

fn counts(expected: &[(&str, u64)]) -> BTreeMap<String, u64> {
    expected.iter().map(|&(what, count)| (what.to_owned(), count)).collect()
}

/// A decodable image and its pixels.
struct Picture {
    bytes: Vec<u8>,
    /// The record in Redis.
    value: Vec<u8>,
    pixels: RgbImage,
}

impl Picture {
    /// Draws a picture with its own colours and enough detail not to compress to a trifle.
    fn new(number: usize, format: ImageFormat) -> Picture {
        let colours = [[220, 40, 40], [30, 160, 60], [40, 80, 220], [230, 200, 30], [150, 40, 180]];
        let pixels = RgbImage::from_fn(WIDTH, HEIGHT, |x, y| {
            let (left, down) = (x.abs_diff(WIDTH / 2), y.abs_diff(HEIGHT / 2));
            let ring = (left * left + down * down) / 300 % 2 == 0;
            let shade = u8::try_from(x / 2).unwrap();
            Rgb(colours[number].map(|it: u8| if ring { it } else { it / 2 + shade }))
        });
        let picture = Picture::encoded(pixels, format);
        assert!(picture.bytes.len() > 2048, "{format:?}");
        picture
    }

    fn encoded(pixels: RgbImage, format: ImageFormat) -> Picture {
        let mut bytes = Cursor::new(vec![]);
        DynamicImage::from(pixels).write_to(&mut bytes, format).unwrap();
        let bytes = bytes.into_inner();
        // A JPEG's pixels differ a little from those that were encoded.
        let pixels = image::load_from_memory(&bytes).unwrap().into_rgb8();
        Picture { value: record(&bytes), bytes, pixels }
    }
}

impl From<RgbImage> for Picture {
    fn from(pixels: RgbImage) -> Picture {
        Picture::encoded(pixels, ImageFormat::Png)
    }
}

/// A site whose page shows three images, and which forwards `/images` as a front end's development server does.
struct Site {
    /// Address of the page. It is cross-site to 127.0.0.1: the host differs, not only the port.
    url: String,
    html: Arc<Mutex<String>>,
    serving: JoinHandle<()>,
}

impl Site {
    async fn start(afterimage: SocketAddr) -> Site {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://localhost:{}/", listener.local_addr().unwrap().port());
        let html = Arc::new(Mutex::new(String::new()));
        let page = Arc::clone(&html);
        let routes = Router::new()
            // `no-store`, so that coming back to the page loads it and its images again.
            .route(
                "/",
                get(async move || {
                    ([("cache-control", "no-store")], Html(page.lock().unwrap().clone()))
                }),
            )
            .route("/images/{id}", get(forward))
            .with_state(afterimage);
        let serving = tokio::spawn(async { axum::serve(listener, routes).await.unwrap() });
        Site { url, html, serving }
    }

    fn origin(&self) -> &str {
        self.url.trim_end_matches('/')
    }

    /// Makes the page show these images side by side.
    fn shows(&self, images: [String; 3]) {
        let mut html = String::from(
            "<!doctype html><link rel=icon href='data:,'><style>img { position: absolute; top: 0 }</style>",
        );
        for (left, image) in (0..).step_by(WIDTH as usize).zip(images) {
            write!(html, "<img src='{image}' style='left: {left}px'>").unwrap();
        }
        *self.html.lock().unwrap() = html;
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Forwards a request and its response unchanged, on a connection of its own.
async fn forward(State(afterimage): State<SocketAddr>, request: Request) -> Response {
    let headers: Vec<_> = request
        .headers()
        .iter()
        .filter(|(name, _)| *name != "connection")
        .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
        .collect();
    let path = request.uri().path_and_query().unwrap().as_str();
    let mut client = Client::connect(afterimage).await;
    let answer = client.send(request.method().clone(), path, &headers, Bytes::new()).await.unwrap();
    (answer.status, answer.headers, answer.body).into_response()
}

/// A browser with a profile of its own, moved by `tests/browser/images.mjs`.
struct Chromium {
    /// Declared first, so that it ends before its profile is removed.
    script: Script,
    profile: tempfile::TempDir,
}

/// Images and requests of one page load.
#[derive(Debug, Deserialize)]
struct Loaded {
    images: Vec<Shown>,
    requests: Vec<ImageRequest>,
}

#[derive(Debug, Deserialize)]
struct Shown {
    width: u32,
    height: u32,
}

/// A request for an image, including those that the browser's cache answered.
#[derive(Debug, Deserialize)]
struct ImageRequest {
    address: String,
    /// Status of the response on the wire; `None` if the request didn't leave the browser.
    wire: Option<u16>,
    conditional: bool,
    /// Cache of the browser that answered, if one did.
    cache: Option<String>,
}

impl Loaded {
    fn wire(&self) -> Vec<Option<u16>> {
        self.requests.iter().map(|it| it.wire).collect()
    }
}

impl Chromium {
    fn start() -> Chromium {
        let profile = tempfile::tempdir().unwrap();
        let script = Script::start(profile.path());
        Chromium { script, profile }
    }

    /// Performs an action that loads a page. `{"restart": url}` restarts the browser first, then opens the page.
    async fn loads(&mut self, action: &Value) -> Loaded {
        let Some(url) = action.get("restart") else {
            return serde_json::from_value(self.acts(action).await).unwrap();
        };
        self.script.end();
        self.script = Script::start(self.profile.path());
        serde_json::from_value(self.acts(&json!({ "open": url })).await).unwrap()
    }

    /// Calls `fetch` from a script in the page.
    async fn fetches(&mut self, url: &str, headers: &Value) -> Value {
        self.acts(&json!({ "fetch": [url, headers] })).await
    }

    async fn acts(&mut self, action: &Value) -> Value {
        let answer = self.script.acts(action).await;
        assert!(answer.get("failed").is_none(), "{action}: {answer}");
        answer
    }

    /// Asserts that the screen shows these pictures, each in its place.
    async fn draws(&mut self, loaded: &Loaded, pictures: &[Picture; 3]) {
        let sizes: Vec<_> = loaded.images.iter().map(|it| (it.width, it.height)).collect();
        assert_eq!(sizes, [(WIDTH, HEIGHT); 3]);
        let path = self.profile.path().join("screen.png");
        self.acts(&json!({ "screenshot": path })).await;
        let screen = image::open(path).unwrap().into_rgb8();
        for (left, picture) in (0..).step_by(WIDTH as usize).zip(pictures) {
            let differs = picture.pixels.enumerate_pixels().find(|(x, y, pixel)| {
                let drawn = screen.get_pixel(left + x, *y);
                // JPEG decoders may round differently.
                drawn.0.iter().zip(pixel.0).any(|(drawn, pixel)| drawn.abs_diff(pixel) > 8)
            });
            assert_eq!(differs, None, "at {left}");
        }
    }
}

/// The running script. It reads one line per action and writes one line per result.
struct Script {
    child: Child,
    actions: Option<ChildStdin>,
    seen: mpsc::UnboundedReceiver<String>,
}

impl Script {
    fn start(profile: &Path) -> Script {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = root.join("target/browser");
        assert!(Path::new(CHROMIUM).exists(), "chromium is needed: apt-get install chromium");
        assert!(
            folder.join("node_modules/playwright-core").exists(),
            "playwright-core is needed in target/browser: run tests/run.sh, which installs it"
        );
        let mut child = Command::new("node")
            .arg(root.join("tests/browser/images.mjs"))
            .args([&folder, Path::new(CHROMIUM), profile])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("node is needed: apt-get install nodejs");
        let (actions, lines) = (child.stdin.take(), child.stdout.take().unwrap());
        let (tell, seen) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        Script { child, actions, seen }
    }

    async fn acts(&mut self, action: &Value) -> Value {
        // Writing to a script that has ended fails; the missing line is reported below.
        let _ = writeln!(self.actions.as_mut().unwrap(), "{action}");
        let line = tokio::time::timeout(PATIENCE, self.seen.recv()).await;
        let line = line.unwrap_or_else(|_| panic!("no result within {PATIENCE:?}: {action}"));
        serde_json::from_str(&line.unwrap_or_else(|| panic!("the script ended at {action}")))
            .unwrap()
    }

    /// Closes the browser, and waits until it has written its profile.
    fn end(&mut self) {
        drop(self.actions.take());
        let _ = self.child.wait();
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.end();
    }
}
