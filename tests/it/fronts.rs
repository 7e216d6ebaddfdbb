//! Caches in front: nginx and Varnish, each with the configuration that is shipped for it.

use std::fs::{self, File, Permissions};
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use redis::AsyncTypedCommands;
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::events::Events;
use crate::harness::redis::free_port;
use crate::harness::server::program;
use crate::harness::{Answer, Client, Process, RedisServer, Server, etag, get, png, record, until};

/// Runs each test behind each front.
macro_rules! behind_every_front {
    ($($test:ident)*) => {
        behind_every_front!(@module nginx, Kind::Nginx, $($test)*);
        behind_every_front!(@module varnish, Kind::Varnish, $($test)*);
    };
    (@module $module:ident, $kind:expr, $($test:ident)*) => {
        mod $module {
            use super::Kind;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test($kind).await;
                }
            )*
        }
    };
}

behind_every_front! {
    a_second_request_is_answered_by_the_front_alone
    a_stale_copy_is_revalidated_and_not_sent_again
    a_replaced_image_appears_once_the_copy_is_stale
    a_removed_image_is_gone_once_the_copy_is_stale
    a_versioned_url_shows_a_new_image_without_a_purge
    a_url_with_an_unknown_version_always_reaches_afterimage
    a_404_is_not_cached
    each_coding_is_cached_apart_and_revalidated_by_its_own_etag
    codings_are_cached_apart_if_responses_also_vary_by_origin
    simultaneous_requests_for_a_cold_image_cost_one_get
    the_front_serves_its_copy_while_afterimage_is_down_and_recovers
    images_stay_available_while_redis_is_down
    the_front_serves_its_copy_if_afterimage_answers_503
    writes_are_refused_and_operator_routes_are_not_public
    a_write_forwarded_by_the_front_is_refused_by_afterimage
    a_prefix_is_not_followed_through_the_front
    a_request_has_the_same_id_in_the_front_and_in_afterimage
    events_pass_the_front_unbuffered
    a_page_is_asked_to_come_back_while_afterimage_takes_no_stream
}

/// Kind of front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Nginx,
    Varnish,
}

/// Pattern by which both configurations tell reads from writes.
const METHODS: &str = r#""^(GET|HEAD|OPTIONS)$""#;

const BRIEF: (&str, &str) = ("http.max_age", "1s");

/// A cache in front of Afterimage, stopped with the test, by its process id.
pub(crate) struct Front {
    kind: Kind,
    child: Child,
    pub(crate) address: SocketAddr,
    dir: TempDir,
}

impl Front {
    async fn of(kind: Kind, origin: SocketAddr) -> Front {
        Front::configured(kind, origin, |text| text).await
    }

    /// Starts a front with the shipped configuration, except for the ports and a change.
    pub(crate) async fn configured(
        kind: Kind,
        origin: SocketAddr,
        change: impl FnOnce(String) -> String,
    ) -> Front {
        let dir = tempfile::tempdir().unwrap();
        // Both drop root's rights, and must still read the folder.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (name, ports) = match kind {
            Kind::Nginx => (
                "nginx.conf",
                [
                    ("listen 8080;", format!("listen {address};")),
                    ("server 127.0.0.1:8000;", format!("server {origin};")),
                ],
            ),
            Kind::Varnish => (
                "varnish.vcl",
                [
                    (r#""127.0.0.1""#, format!(r#""{}""#, origin.ip())),
                    (r#""8000""#, format!(r#""{}""#, origin.port())),
                ],
            ),
        };
        let shipped = format!("{}/config/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut text = change(fs::read_to_string(shipped).unwrap());
        for (old, new) in ports {
            assert_eq!(text.matches(old).count(), 1, "{old} in {name}");
            text = text.replace(old, &new);
        }
        let config = dir.path().join(name);
        fs::write(&config, text).unwrap();

        let mut command = match kind {
            Kind::Nginx => {
                let mut command = Command::new("nginx");
                command
                    .arg("-p")
                    .arg(dir.path())
                    .arg("-c")
                    .arg(&config)
                    .args(["-g", "daemon off;"]);
                command
            }
            Kind::Varnish => {
                let mut command = Command::new("varnishd");
                command.args(["-F", "-T", "none", "-s", "malloc,64m", "-a", &address.to_string()]);
                command.arg("-n").arg(dir.path().join("varnish")).arg("-f").arg(&config);
                // The first is what the configuration's comment asks for; the others make it a small instance.
                for parameter in ["http_gzip_support=off", "thread_pool_min=10", "vsl_space=1M"] {
                    command.args(["-p", parameter]);
                }
                command
            }
        };
        let log = File::create(dir.path().join("log")).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{error}: apt-get install nginx varnish"));
        let mut front = Front { kind, child, address, dir };
        let start = Instant::now();
        while TcpStream::connect(address).await.is_err() {
            let ended = front.child.try_wait().unwrap();
            let patient = start.elapsed() < crate::harness::PATIENCE;
            assert!(ended.is_none() && patient, "{ended:?} {}", front.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        front
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// nginx's lines about finished requests.
    pub(crate) fn requests(&self) -> String {
        fs::read_to_string(self.dir.path().join("access.log")).unwrap()
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        get(self.address, path, headers).await
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Answer {
        Client::connect(self.address).await.send(method, path, headers, body).await.unwrap()
    }

    /// The front's own member of `Cache-Status`, which is the last one, without its name.
    fn says(&self, answer: &Answer) -> String {
        let name = match self.kind {
            Kind::Nginx => "nginx; ",
            Kind::Varnish => "varnish; ",
        };
        let lines = answer.headers.get_all("cache-status").iter();
        let members: Vec<_> = lines.flat_map(|line| line.to_str().unwrap().split(", ")).collect();
        let last = members.last().and_then(|member| member.strip_prefix(name));
        last.unwrap_or_else(|| panic!("{answer:?}")).to_owned()
    }

    fn hit(&self, answer: &Answer) -> bool {
        self.says(answer).starts_with("hit")
    }

    /// Tells if the response is a stale copy, served in place of an error.
    fn stale(&self, answer: &Answer) -> bool {
        match self.kind {
            Kind::Nginx => self.says(answer) == "fwd=stale; detail=origin-failed",
            Kind::Varnish => self.says(answer).starts_with("hit; ttl=-"),
        }
    }

    async fn until_hit(&self, path: &str, headers: &[(&str, &str)]) {
        until("the front has it", || async { self.hit(&self.get(path, headers).await) }).await;
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        // SIGTERM first: both have child processes, which a SIGKILL would leave behind.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let start = Instant::now();
        while let Ok(None) = self.child.try_wait() {
            if start.elapsed() > Duration::from_secs(10) {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Number of image GETs that Afterimage has answered with this status.
async fn answered(server: &Server, status: u16) -> u64 {
    let page = server.get("/metrics").await;
    let name = format!(
        r#"afterimage_requests_total{{route="/images/{{id}}",method="GET",status="{status}"}} "#
    );
    let text = str::from_utf8(&page.body).unwrap();
    text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0)
}

/// Asserts that the response is this image.
fn is_image(answer: &Answer, bytes: &[u8], etag: &str) {
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert!(answer.body == bytes, "other bytes: {:?}", answer.headers);
    assert_eq!(answer.header("etag"), etag);
}

async fn a_second_request_is_answered_by_the_front_alone(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let front = Front::of(kind, server.address).await;
    let bytes = png(1, 300_000);
    let value = record(&bytes);
    redis.set("a", &value).await;

    let first = front.get("/images/a", &[]).await;
    is_image(&first, &bytes, &etag(&value));
    assert_eq!(front.says(&first), "fwd=miss");
    assert_eq!(first.header("cache-control"), "public, max-age=3600, immutable");
    assert_ne!(first.header("server-timing"), "");
    front.until_hit("/images/a", &[]).await;

    let before = answered(&server, 200).await;
    for _ in 0..20 {
        let answer = front.get("/images/a", &[]).await;
        is_image(&answer, &bytes, &etag(&value));
        assert!(front.hit(&answer), "{answer:?}");
        assert_eq!(answer.header("cache-control"), "public, max-age=3600, immutable");
        assert_eq!(answer.header("server-timing"), "");
    }
    let known = front.get("/images/a", &[("if-none-match", &etag(&value))]).await;
    assert_eq!(known.status, StatusCode::NOT_MODIFIED);
    let part = front.get("/images/a", &[("range", "bytes=1000-1999")]).await;
    assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.body, bytes[1000..2000]);
    let head = front.send(Method::HEAD, "/images/a", &[], Bytes::new()).await;
    assert_eq!((head.status, head.header("content-length")), (StatusCode::OK, "300000"));
    // Cookies and credentials make no difference.
    let cookie = [("cookie", "a=b"), ("authorization", "Basic eDp5")];
    assert!(front.hit(&front.get("/images/a", &cookie).await));
    for status in [200, 206, 304] {
        assert_eq!(answered(&server, status).await, if status == 200 { before } else { 0 });
    }
}

async fn a_stale_copy_is_revalidated_and_not_sent_again(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[BRIEF]).await;
    let front = Front::of(kind, server.address).await;
    let bytes = png(1, 100_000);
    let value = record(&bytes);
    redis.set("a", &value).await;
    front.until_hit("/images/a", &[]).await;
    let sent = answered(&server, 200).await;

    until("the copy was revalidated twice", || async {
        is_image(&front.get("/images/a", &[]).await, &bytes, &etag(&value));
        answered(&server, 304).await >= 2
    })
    .await;
    assert_eq!(answered(&server, 200).await, sent);
}

async fn a_replaced_image_appears_once_the_copy_is_stale(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[BRIEF]).await;
    let front = Front::of(kind, server.address).await;
    let (old, new) = (png(1, 5000), png(2, 5000));
    redis.set("a", &record(&old)).await;
    front.until_hit("/images/a", &[]).await;
    redis.set("a", &record(&new)).await;
    until("the new image is shown", || async {
        let answer = front.get("/images/a", &[]).await;
        let is_new = answer.header("etag") == etag(&record(&new));
        let expected = if is_new { &new } else { &old };
        is_image(&answer, expected, &etag(&record(expected)));
        is_new
    })
    .await;
    // The old image never returns.
    for _ in 0..20 {
        is_image(&front.get("/images/a", &[]).await, &new, &etag(&record(&new)));
    }
}

async fn a_removed_image_is_gone_once_the_copy_is_stale(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[BRIEF]).await;
    let front = Front::of(kind, server.address).await;
    redis.set("a", &record(&png(1, 5000))).await;
    front.until_hit("/images/a", &[]).await;
    redis.connect().await.del("image:a").await.unwrap();
    until("the image is gone", || async {
        front.get("/images/a", &[]).await.status == StatusCode::NOT_FOUND
    })
    .await;
    // Simultaneous requests don't bring it back.
    for _ in 0..10 {
        let asked = (0..10).map(|_| tokio::spawn(get(front.address, "/images/a", &[])));
        for answer in asked.collect::<Vec<_>>() {
            answer.await.unwrap().problem(404, "absent");
        }
    }
}

async fn a_versioned_url_shows_a_new_image_without_a_purge(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let front = Front::of(kind, server.address).await;
    let (old, new) = (png(1, 5000), png(2, 5000));
    let (old_tag, new_tag) = (etag(&record(&old)), etag(&record(&new)));
    let versioned = |tag: &str| format!("/images/a?v={}", tag.trim_matches('"'));
    redis.set("a", &record(&old)).await;
    front.until_hit("/images/a", &[]).await;
    front.until_hit(&versioned(&old_tag), &[]).await;

    redis.set("a", &record(&new)).await;
    until("Afterimage was told", || async {
        server.get("/images/a").await.header("etag") == new_tag
    })
    .await;
    let answer = front.get(&versioned(&new_tag), &[]).await;
    is_image(&answer, &new, &new_tag);
    assert_eq!(answer.header("cache-control"), "public, max-age=31536000, immutable");
    front.until_hit(&versioned(&new_tag), &[]).await;

    // The other addresses still give the old image.
    let answer = front.get(&versioned(&old_tag), &[]).await;
    is_image(&answer, &old, &old_tag);
    assert_eq!(answer.header("cache-control"), "public, max-age=31536000, immutable");
    is_image(&front.get("/images/a", &[]).await, &old, &old_tag);
}

async fn a_url_with_an_unknown_version_always_reaches_afterimage(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let front = Front::of(kind, server.address).await;
    let (old, new) = (png(1, 5000), png(2, 5000));
    let new_tag = etag(&record(&new));
    let path = format!("/images/a?v={}", new_tag.trim_matches('"'));
    redis.set("a", &record(&old)).await;

    // A page that names the new version before it is written gets the old one, and the front doesn't store that.
    for requests in 1..=3 {
        let answer = front.get(&path, &[]).await;
        is_image(&answer, &old, &etag(&record(&old)));
        assert_eq!(answer.header("cache-control"), "no-cache");
        assert_eq!(answered(&server, 200).await, requests);
    }
    redis.set("a", &record(&new)).await;
    until("Afterimage was told", || async {
        server.get("/images/a").await.header("etag") == new_tag
    })
    .await;
    is_image(&front.get(&path, &[]).await, &new, &new_tag);
    front.until_hit(&path, &[]).await;
}

async fn a_404_is_not_cached(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let front = Front::of(kind, server.address).await;
    for requests in 1..=3 {
        front.get("/images/a", &[]).await.problem(404, "absent");
        assert_eq!(answered(&server, 404).await, requests);
    }
    let bytes = png(1, 5000);
    redis.set("a", &record(&bytes)).await;
    until("Afterimage was told", || async {
        server.get("/images/a").await.status == StatusCode::OK
    })
    .await;
    is_image(&front.get("/images/a", &[]).await, &bytes, &etag(&record(&bytes)));
    front.until_hit("/images/a", &[]).await;
}

/// Values of `Accept-Encoding`, and the coding of the response.
const CODINGS: [(&str, &str); 5] = [
    ("br", "br"),
    ("gzip", "gzip"),
    ("identity", ""),
    ("gzip, deflate, br, zstd", "br"),
    ("gzip;q=1.0, br;q=0", "gzip"),
];

fn svg() -> Vec<u8> {
    let paths = "<path d='M0 0L1 1'/>".repeat(500);
    format!("<svg xmlns='http://www.w3.org/2000/svg'>{paths}</svg>").into_bytes()
}

/// Asserts that the response is the SVG in this coding.
fn is_coded(answer: &Answer, coding: &str) {
    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    assert_eq!(answer.header("content-encoding"), coding, "{:?}", answer.headers);
    assert_eq!(answer.header("content-type"), "image/svg+xml");
    assert_eq!(answer.header("vary"), "Accept-Encoding");
    let suffix = if coding.is_empty() { String::new() } else { format!("-{coding}1") };
    let tag = etag(&record(&svg()));
    assert_eq!(answer.header("etag"), format!("\"{}{suffix}\"", tag.trim_matches('"')));
    let mut decoded = Vec::new();
    match coding {
        "br" => brotli::Decompressor::new(&answer.body[..], 4096).read_to_end(&mut decoded),
        "gzip" => flate2::read::GzDecoder::new(&answer.body[..]).read_to_end(&mut decoded),
        _ => (&answer.body[..]).read_to_end(&mut decoded),
    }
    .unwrap();
    assert!(decoded == svg(), "other bytes: {:?}", answer.headers);
}

async fn each_coding_is_cached_apart_and_revalidated_by_its_own_etag(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[BRIEF]).await;
    let front = Front::of(kind, server.address).await;
    redis.set("a", &record(&svg())).await;
    for (accepted, coding) in CODINGS {
        is_coded(&front.get("/images/a", &[("accept-encoding", accepted)]).await, coding);
        front.until_hit("/images/a", &[("accept-encoding", accepted)]).await;
    }
    is_coded(&front.get("/images/a", &[]).await, "");
    front.until_hit("/images/a", &[]).await;

    let sent = answered(&server, 200).await;
    until("each was revalidated", || async {
        for (accepted, coding) in CODINGS {
            let accept = ("accept-encoding", accepted);
            let answer = front.get("/images/a", &[accept]).await;
            is_coded(&answer, coding);
            let known = ("if-none-match", answer.header("etag"));
            let answer = front.get("/images/a", &[accept, known]).await;
            assert_eq!(answer.status, StatusCode::NOT_MODIFIED);
        }
        answered(&server, 304).await >= 10
    })
    .await;
    assert_eq!(answered(&server, 200).await, sent);
}

async fn codings_are_cached_apart_if_responses_also_vary_by_origin(kind: Kind) {
    let redis = RedisServer::start().await;
    let origins = r#"["https://a.example", "https://b.example"]"#;
    let server = Server::on(&redis, &[("http.cors_origins", origins)]).await;
    let front = Front::of(kind, server.address).await;
    redis.set("a", &record(&svg())).await;
    for _ in 0..3 {
        for (accepted, coding) in CODINGS {
            for origin in ["https://a.example", "https://b.example"] {
                let headers = [("accept-encoding", accepted), ("origin", origin)];
                let answer = front.get("/images/a", &headers).await;
                assert_eq!(
                    answer.header("content-encoding"),
                    coding,
                    "{accepted}: {:?}",
                    answer.headers
                );
                assert_eq!(answer.header("access-control-allow-origin"), origin);
            }
            let answer = front.get("/images/a", &[("accept-encoding", accepted)]).await;
            assert_eq!(
                answer.header("content-encoding"),
                coding,
                "{accepted}: {:?}",
                answer.headers
            );
        }
    }
}

async fn simultaneous_requests_for_a_cold_image_cost_one_get(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let front = Front::of(kind, server.address).await;
    let bytes = png(1, 200_000);
    let value = record(&bytes);
    redis.set("a", &value).await;
    let asked = (0..50).map(|_| tokio::spawn(get(front.address, "/images/a", &[])));
    for answer in asked.collect::<Vec<_>>() {
        is_image(&answer.await.unwrap(), &bytes, &etag(&value));
    }
    assert_eq!(server.metric("afterimage_fetches_total").await, 1);
}

async fn the_front_serves_its_copy_while_afterimage_is_down_and_recovers(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[BRIEF]).await;
    let front = Front::of(kind, server.address).await;
    let (old, new) = (png(1, 5000), png(2, 5000));
    let old_tag = etag(&record(&old));
    redis.set("a", &record(&old)).await;
    front.until_hit("/images/a", &[]).await;
    let address = server.address.to_string();
    server.stop().await;
    until("the old copy is used", || async {
        let answer = front.get("/images/a", &[]).await;
        is_image(&answer, &old, &old_tag);
        front.stale(&answer)
    })
    .await;
    for _ in 0..20 {
        is_image(&front.get("/images/a", &[]).await, &old, &old_tag);
    }
    assert!(front.get("/images/b", &[]).await.status.is_server_error());

    redis.set("a", &record(&new)).await;
    let _server = Server::on(&redis, &[BRIEF, ("http.listen", &address)]).await;
    until("Afterimage is found again", || async {
        front.get("/images/a", &[]).await.header("etag") == etag(&record(&new))
    })
    .await;
    is_image(&front.get("/images/a", &[]).await, &new, &etag(&record(&new)));
}

async fn images_stay_available_while_redis_is_down(kind: Kind) {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[BRIEF]).await.coherent().await;
    let front = Front::of(kind, server.address).await;
    let bytes = png(1, 5000);
    let value = record(&bytes);
    redis.set("a", &value).await;
    redis.set("b", &value).await;
    front.until_hit("/images/a", &[]).await;
    // `b` is in Afterimage's memory, and not in the front's.
    assert_eq!(server.get("/images/b").await.status, StatusCode::OK);

    redis.kill();
    let count = async |served: &str| {
        let page = server.get("/metrics").await;
        let name = format!(r#"afterimage_reads_total{{served="{served}"}} "#);
        let text = str::from_utf8(&page.body).unwrap();
        text.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok()).unwrap_or(0_u64)
    };
    until("Afterimage serves stale images", || async {
        is_image(&front.get("/images/a", &[]).await, &bytes, &etag(&value));
        count("stale").await >= 2
    })
    .await;
    is_image(&front.get("/images/b", &[]).await, &bytes, &etag(&value));
    let unknown = front.get("/images/c", &[]).await;
    unknown.problem(503, "store-unavailable");
    assert_eq!(unknown.header("retry-after"), "1");

    redis.restart().await;
    let new = png(2, 5000);
    redis.set("a", &record(&new)).await;
    redis.set("b", &value).await;
    until("the new image is shown", || async {
        let answer = front.get("/images/a", &[]).await;
        assert!(answer.status == StatusCode::OK || answer.status == StatusCode::NOT_FOUND);
        answer.header("etag") == etag(&record(&new))
    })
    .await;
    // An unchanged image carries no trace of the outage either.
    until("the responses no longer mention the outage", || async {
        let answer = front.get("/images/b", &[]).await;
        is_image(&answer, &bytes, &etag(&value));
        answer.header("cache-control") == "public, max-age=1, immutable"
            && !answer
                .headers
                .get_all("cache-status")
                .iter()
                .any(|it| it.to_str().unwrap().contains("store-unreachable"))
    })
    .await;
}

async fn the_front_serves_its_copy_if_afterimage_answers_503(kind: Kind) {
    outlives_503(kind, |text| text).await;
}

/// Covers a first request that comes more than ten seconds after the copy became stale: without a grace period.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn varnish_serves_a_copy_past_its_grace_only_in_place_of_an_error() {
    outlives_503(Kind::Varnish, |text| {
        assert!(text.contains("set req.grace = 10s;"));
        text.replace("set req.grace = 10s;", "set req.grace = 0s;")
    })
    .await;
}

async fn outlives_503(kind: Kind, change: impl FnOnce(String) -> String) {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[BRIEF]).await;
    let front = Front::configured(kind, server.address, change).await;
    let bytes = png(1, 5000);
    let value = record(&bytes);
    redis.set("a", &value).await;
    front.until_hit("/images/a", &[]).await;

    // A new Afterimage without its store knows no image.
    redis.kill();
    let address = server.address.to_string();
    server.stop().await;
    let server = Server::on(&redis, &[BRIEF, ("http.listen", &address)]).await;
    until("Afterimage has only 503, and the front its copy", || async {
        let answer = front.get("/images/a", &[]).await;
        is_image(&answer, &bytes, &etag(&value));
        front.stale(&answer) && answered(&server, 503).await >= 3
    })
    .await;
    // Afterimage goes away, and the front hasn't noticed yet.
    server.stop().await;
    for _ in 0..20 {
        is_image(&front.get("/images/a", &[]).await, &bytes, &etag(&value));
    }
}

async fn writes_are_refused_and_operator_routes_are_not_public(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let front = Front::of(kind, server.address).await;
    let value = Bytes::from(record(&png(1, 5000)));
    let headers = [("content-type", "application/json"), ("host", "localhost")];
    for method in [Method::PUT, Method::POST, Method::DELETE, Method::PATCH] {
        let answer = front.send(method, "/images/a", &headers, value.clone()).await;
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED, "{answer:?}");
        assert_eq!(answer.header("allow"), "GET, HEAD, OPTIONS");
    }
    front.get("/images/a", &[]).await.problem(404, "absent");
    for path in ["/metrics", "/healthz", "/readyz", "/images/../metrics", "/images/%2e%2e/metrics"]
    {
        let answer = front.get(path, &[]).await;
        assert!(answer.status.is_client_error(), "{path} {answer:?}");
    }
    // No write came through.
    let page = server.get("/metrics").await;
    let text = str::from_utf8(&page.body).unwrap();
    assert!(!text.contains(r#"method="PUT""#), "{text}");
}

async fn a_write_forwarded_by_the_front_is_refused_by_afterimage(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let front = Front::configured(kind, server.address, |text| {
        assert!(text.contains(METHODS));
        text.replace(METHODS, r#""^""#)
    })
    .await;
    let value = Bytes::from(record(&png(1, 5000)));
    let headers = [("content-type", "application/json"), ("host", "localhost")];
    let answer = front.send(Method::PUT, "/images/a", &headers, value.clone()).await;
    answer.problem(403, "not-from-here");
    // The front's headers cause the refusal: the same request is accepted without the front.
    let answer = server.send(Method::PUT, "/images/a", &headers, value).await;
    assert_eq!(answer.status, StatusCode::CREATED);
}

async fn a_prefix_is_not_followed_through_the_front(kind: Kind) {
    let redis = RedisServer::start().await;
    // Afterimage itself would list.
    let server = Server::on(&redis, &[("events.prefix", "open")]).await;
    let front = Front::of(kind, server.address).await;
    for (query, status) in [
        ("prefix=a", 403),
        ("inline=none&prefix=a", 403),
        ("%70refix=a", 403),
        ("prefix=a&lastEventId=%26ids=", 403),
        ("ids=a&prefix=a", 400),
        ("ids=a&%70refix=a", 400),
        ("%70refix=a&ids=", 400),
    ] {
        let answer = front.get(&format!("/events?{query}"), &[]).await;
        assert_eq!(answer.status, status, "{query} {answer:?}");
    }
}

async fn events_pass_the_front_unbuffered(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("events.heartbeat", "500ms")]).await.coherent().await;
    let front = Front::of(kind, server.address).await;
    let mut events = Events::of(front.address, "ids=a").await;
    assert_eq!(events.next().await.name, "concept_absent");
    for seed in 0..3 {
        let began = Instant::now();
        redis.set("a", &record(&png(seed, 500))).await;
        let tag = etag(&record(&png(seed, 500)));
        assert_eq!(events.next().await.id, tag.trim_matches('"'));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }
    // Heartbeats pass too.
    assert_eq!(events.block().await.unwrap(), ":");
    // As many ids as a stream may name, each as long as it may be.
    let ids: Vec<_> = (0..100).map(|number| format!("{number:0>128}")).collect();
    let path = format!("/events?ids={}", ids.join(","));
    assert_eq!(front.send(Method::HEAD, &path, &[], Bytes::new()).await.status, StatusCode::OK);
}

async fn a_page_is_asked_to_come_back_while_afterimage_takes_no_stream(kind: Kind) {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("events.connections", "1")]).await.coherent().await;
    let front = Front::of(kind, server.address).await;
    let page = [("accept", "text/event-stream"), ("origin", "https://a.example")];
    let comes_back = async || {
        let answer = front.get("/events?ids=a", &page).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        assert_eq!(answer.header("content-type"), "text/event-stream");
        assert_eq!(answer.header("cache-control"), "no-cache, no-transform");
        assert_eq!(answer.header("access-control-allow-origin"), "*");
        let text = str::from_utf8(&answer.body).unwrap();
        assert!(text.starts_with("retry: 2000\n") && text.ends_with("\n\n"), "{text:?}");
    };
    let mut events = Events::of(front.address, "ids=a").await;
    assert_eq!(events.next().await.name, "concept_absent");
    // There is no place for another stream, then no server.
    comes_back().await;
    let address = server.address.to_string();
    server.stop().await;
    while events.block().await.is_some() {}
    for _ in 0..3 {
        comes_back().await;
    }
    // Other errors, and other clients, are told the truth.
    assert!(front.get("/events?ids=a", &[]).await.status.is_server_error());

    let server = Server::on(&redis, &[("http.listen", &address)]).await.coherent().await;
    until("the front finds Afterimage again", || async {
        front.get("/images/a", &[]).await.status == StatusCode::NOT_FOUND
    })
    .await;
    front.get("/events?ids=%20", &page).await.problem(400, "bad-id");
    let mut events = Events::of(front.address, "ids=a").await;
    assert_eq!(events.next().await.name, "concept_absent");
    drop(server);
}

async fn a_request_has_the_same_id_in_the_front_and_in_afterimage(kind: Kind) {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 5000))).await;
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = program();
    command.args(["--redis-url", &redis.url(), "--log-format", "json"]);
    command.stderr(log.reopen().unwrap());
    let afterimage = Process::start(command);
    let front = Front::of(kind, afterimage.address).await;

    let given = front.get("/images/a", &[("x-request-id", "mine")]).await;
    assert_eq!(given.header("x-request-id"), "mine");
    let made = front.get("/images/b", &[]).await;
    for name in ["mine", made.header("x-request-id")] {
        assert_ne!(name, "");
        until("Afterimage has logged it", || async {
            let text = fs::read_to_string(log.path()).unwrap();
            text.lines().any(|line| line.contains(&format!("\"{name}\"")))
        })
        .await;
    }
    // A cached copy doesn't carry the id of the request that filled the cache.
    front.until_hit("/images/a", &[]).await;
    let (first, second) = (front.get("/images/a", &[]).await, front.get("/images/a", &[]).await);
    assert!(front.hit(&first) && front.hit(&second));
    assert_ne!(first.header("x-request-id"), "mine");
    assert_ne!(first.header("x-request-id"), "");
    assert_ne!(first.header("x-request-id"), second.header("x-request-id"));
}
