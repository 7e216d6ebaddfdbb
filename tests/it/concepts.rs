//! The example backend and page in a real Chromium: images appear while they are made.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use redis::AsyncTypedCommands;
use serde::Deserialize;

use crate::browser::CHROMIUM;
use crate::fronts::{Front, Kind};
use crate::harness::redis::free_port;
use crate::harness::server::program;
use crate::harness::{Process, RedisServer, etag, record, until};
use crate::variants::{encoded, picture};

/// Longest time in which the page shows its images.
const PATIENCE: Duration = Duration::from_secs(90);

/// A child process that is killed with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// State of the page.
#[derive(Debug, Deserialize)]
struct State {
    job: String,
    sources: Vec<String>,
    /// Addresses that each image was set to, in order.
    shown: Vec<Vec<String>>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_backend_of_the_examples_is_short() {
    let text = std::fs::read_to_string(root().join("examples/backend/main.py")).unwrap();
    assert!(text.lines().count() < 80, "{}", text.lines().count());
}

/// Server that the page's requests for images and events reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reached {
    Afterimage,
    /// nginx with the shipped configuration.
    Nginx,
    /// A proxy that answers 502 while Afterimage is away.
    OtherProxy,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_shows_thumbnails_then_images_and_misses_no_change_after_a_reconnect() {
    check_page(Reached::Afterimage).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_behind_nginx_misses_no_change_after_a_restart_of_afterimage() {
    check_page(Reached::Nginx).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_behind_a_proxy_that_answered_502_connects_again() {
    check_page(Reached::OtherProxy).await;
}

async fn check_page(reached: Reached) {
    let redis = RedisServer::start().await;
    let (backend_port, port) = (free_port(), free_port());
    let page = format!("http://127.0.0.1:{backend_port}");
    let serve = || {
        let mut command = program();
        command.args(["--redis-url", &redis.url(), "--log-filter", "warn"]);
        command.args(["--http-cors-origins", &format!("[{page:?}]"), "--http-max-age", "1s"]);
        Process::listening(command, &format!("127.0.0.1:{port}"))
    };
    let mut afterimage = serve();
    let origin = afterimage.address;
    let front = match reached {
        Reached::Afterimage => None,
        Reached::Nginx => Some(Front::configured(Kind::Nginx, origin, |text| text).await),
        Reached::OtherProxy => {
            let intercepted = "error_page 502 503 504 = @events_later;";
            let change = |text: String| {
                assert!(text.contains(intercepted));
                text.replace(intercepted, "")
            };
            Some(Front::configured(Kind::Nginx, origin, change).await)
        }
    };
    let images_at = front.as_ref().map_or(origin, |front| front.address);
    let backend = Command::new(root().join("target/python/bin/uvicorn"))
        .args(["main:app", "--app-dir", "examples/backend", "--port", &backend_port.to_string()])
        .current_dir(root())
        .env("REDIS_URL", redis.url())
        .env("IMAGES_URL", format!("http://{images_at}"))
        .env("SECONDS_PER_STEP", "0.5")
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .expect("uvicorn is needed in target/python: run tests/run.sh, which installs it");
    let _backend = Ends(backend);
    until("the backend answers", || async {
        tokio::net::TcpStream::connect(("127.0.0.1", backend_port)).await.is_ok()
    })
    .await;

    let screenshot = root().join(format!("target/tmp/concepts_{reached:?}.png"));
    let mut chromium = Command::new("node")
        .arg(root().join("tests/browser/concepts.mjs"))
        .arg(root().join("target/browser"))
        .args([CHROMIUM, &page])
        .arg(&screenshot)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut orders = chromium.stdin.take().unwrap();
    let lines = BufReader::new(chromium.stdout.take().unwrap()).lines();
    let _chromium = Ends(chromium);
    let (sender, received) = mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let mut shown = move || {
        let line = received.recv_timeout(PATIENCE).expect("the page doesn't show its images");
        serde_json::from_str::<State>(&line).unwrap()
    };
    let first = tokio::task::block_in_place(&mut shown);
    assert_eq!(first.sources.len(), 3);
    for (number, shown) in first.shown.iter().enumerate() {
        // The rough and the finished image: the event's thumbnail comes before each image.
        let path = format!("/images/concept_{}_{number}?v=", first.job);
        assert!(shown.len() >= 2, "{shown:?}");
        assert_eq!(shown[0], "data:image/webp;base64", "{shown:?}");
        assert!(shown.last().unwrap().contains(&path), "{shown:?}");
    }
    assert!(screenshot.metadata().unwrap().len() > 10_000);

    // All three are replaced while the server is down; the page reconnects by itself, and shows them.
    afterimage.kill();
    let mut connection = redis.connect().await;
    let mut tags = Vec::new();
    for number in 0..3_u8 {
        let value = record(&encoded(&picture(80 * number, 512, 512), image::ImageFormat::Png));
        connection.set(format!("image:concept_{}_{number}", first.job), &value).await.unwrap();
        tags.push(etag(&value));
    }
    if let Some(front) = &front {
        // The page has come back and was turned away: after the line of its stream there is one of another request.
        until("the page has tried to connect again", || async {
            let answers: Vec<bool> = front
                .requests()
                .lines()
                .filter(|line| line.contains("GET /events"))
                .map(|line| line.contains("\" 502 "))
                .collect();
            answers.len() >= 2 && answers.contains(&(reached == Reached::OtherProxy))
        })
        .await;
    }
    let _afterimage = serve();
    writeln!(orders, "again").unwrap();
    let second = tokio::task::block_in_place(&mut shown);
    for (source, tag) in second.sources.iter().zip(tags) {
        assert!(source.ends_with(tag.trim_matches('"')), "{source} {tag}");
    }
}
