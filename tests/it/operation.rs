//! Operation: TLS, sockets, the admin listener, graceful shutdown, logs and metrics.

use std::collections::HashMap;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use afterimage::Stop;
use bytes::Bytes;
use hyper::{Method, StatusCode};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::harness::server::{metric, program};
use crate::harness::{
    Client, PATIENCE, Process, Protocol, RedisServer, Server, certificates, etag, get, png, record,
    until,
};

long_tests! {
    #[tokio::test(flavor = "multi_thread")] a_stop_under_load_loses_no_request
    #[tokio::test(flavor = "multi_thread")] thousands_of_slow_and_idle_clients_do_not_disturb_the_others
}

#[tokio::test]
async fn tls_serves_both_protocols_and_a_renewed_certificate_without_a_restart() {
    let (first, second) = (certificates(), certificates());
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let install = |from: &Path| {
        for name in ["server.pem", "server.key"] {
            std::fs::copy(from.join(name), dir.path().join(name)).unwrap();
        }
    };
    install(first.path());
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 3000))).await;
    let settings = [
        ("http.tls_cert_file", path("server.pem")),
        ("http.tls_key_file", path("server.key")),
        ("http.tls_reload_interval", "20ms".to_owned()),
    ];
    let settings = settings.each_ref().map(|(name, value)| (*name, value.as_str()));
    let server = Server::on(&redis, &settings).await;

    for (offered, protocol) in [
        (vec![b"h2".to_vec(), b"http/1.1".to_vec()], Protocol::Http2),
        (vec![b"http/1.1".to_vec()], Protocol::Http1),
        (vec![], Protocol::Http1),
    ] {
        let stream = handshake(server.address, first.path(), offered.clone()).await.unwrap();
        let agreed = stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec);
        assert_eq!(agreed, offered.first().cloned());
        let mut client = Client::over(protocol, stream, "localhost").await;
        assert_eq!(client.get("/images/a", &[]).await.status, StatusCode::OK);
    }

    // A key that doesn't match, as while the files are being replaced, changes nothing.
    std::fs::copy(second.path().join("server.pem"), path("server.pem")).unwrap();
    assert!(handshake(server.address, first.path(), vec![]).await.is_ok());
    install(second.path());
    until("the new certificate is in use", || async {
        handshake(server.address, second.path(), vec![]).await.is_ok()
    })
    .await;
    assert!(handshake(server.address, first.path(), vec![]).await.is_err());
}

async fn handshake(
    address: SocketAddr,
    authority: &Path,
    protocols: Vec<Vec<u8>>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority.join("ca.pem")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols;
    let stream = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

#[test]
fn an_unusable_certificate_stops_the_start_and_the_error_names_its_setting() {
    let (first, second) = (certificates(), certificates());
    let dir = tempfile::tempdir().unwrap();
    let (pem, key) = (first.path().join("server.pem"), second.path().join("server.key"));
    let start = |arguments: &[&Path]| {
        let mut command = program();
        command.arg("--embedded-dir").arg(dir.path()).args(["--http-listen", "127.0.0.1:0"]);
        command.arg("--http-tls-cert-file").arg(arguments[0]);
        if let Some(key) = arguments.get(1) {
            command.arg("--http-tls-key-file").arg(key);
        }
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(start(&[&pem]).contains("tls_key_file, or none"));
    assert!(start(&[&pem, &key]).contains("don't fit together"));
    assert!(
        start(&[Path::new("/no/such.pem"), &key]).contains("/no/such.pem ([http] tls_cert_file)")
    );
}

#[tokio::test]
async fn a_unix_socket_serves_reads_only_and_is_replaced_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("afterimage.sock");
    let listen = format!("unix:{}", socket.display());
    let start = || {
        let mut command = program();
        command.arg("--embedded-dir").arg(dir.path().join("store"));
        Process::listening(command, &listen)
    };
    let ask = |method: Method, path: &'static str| {
        let socket = socket.clone();
        async move {
            let stream = UnixStream::connect(socket).await.unwrap();
            let mut client = Client::over(Protocol::Http1, stream, "localhost").await;
            let json = [("content-type", "application/json")];
            let record = Bytes::from(record(&png(1, 100)));
            client.send(method, path, &json, record).await.unwrap()
        }
    };
    let mut server = start();
    assert_eq!(ask(Method::GET, "/healthz").await.status, StatusCode::OK);
    ask(Method::PUT, "/images/a").await.problem(403, "not-from-here");
    let health = program().args(["health", "--http-listen", &listen]).output().unwrap();
    assert!(health.status.success(), "{}", String::from_utf8_lossy(&health.stderr));

    // A second server can't take the socket of a running one. A socket left behind by a killed one is replaced.
    let mut second = program();
    second.arg("--embedded-dir").arg(dir.path().join("other")).args(["--http-listen", &listen]);
    let second = second.output().unwrap();
    assert!(String::from_utf8_lossy(&second.stderr).contains("[http] listen"));
    server.kill();
    assert!(socket.exists());
    let mut server = start();
    assert_eq!(ask(Method::GET, "/healthz").await.status, StatusCode::OK);
    server.signal("TERM");
    assert!(server.child.wait().unwrap().success());
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_socket_passed_by_systemd_replaces_the_configured_listener() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    // As systemd does: descriptor 3 listens, and LISTEN_PID names the process that it is for.
    let script = "import os, socket, sys\n\
        s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
        s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); os.dup2(s.fileno(), 3); os.set_inheritable(3, True)\n\
        os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n\
        os.execv(sys.argv[2], sys.argv[2:])";
    let mut command = Command::new("python3");
    command.args(["-c", script, &address.port().to_string(), env!("CARGO_BIN_EXE_afterimage")]);
    command.arg("--embedded-dir").arg(dir.path());
    // The configured address can't be bound.
    let process = Process::listening(command, "192.0.2.1:80");
    assert_eq!(process.address, address);
    assert_eq!(get(address, "/healthz", &[]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn operator_routes_can_have_their_own_listener() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let settings = [("admin.listen", "127.0.0.1:0"), ("limits.connections", "3")];
    let server = Server::on(&redis, &settings).await;
    until("the store was reached", || async {
        get(server.admin, "/readyz", &[]).await.status == StatusCode::OK
    })
    .await;
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(get(server.admin, path, &[]).await.status, StatusCode::OK, "{path}");
        get(server.address, path, &[]).await.problem(404, "unknown-address");
    }
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    get(server.admin, "/images/a", &[]).await.problem(404, "unknown-address");
    // The admin listener works while the main one is full.
    until("earlier connections are closed", || async {
        metric(&get(server.admin, "/metrics", &[]).await, "afterimage_connections") == 0
    })
    .await;
    let held = (Client::connect(server.address).await, Client::connect(server.address).await);
    until("the main listener is full", || async {
        let request = "GET /images/a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        crate::connections::exchange(server.address, request).await.starts_with("HTTP/1.1 503 ")
    })
    .await;
    assert_eq!(get(server.admin, "/readyz", &[]).await.status, StatusCode::OK);
    drop(held);
}

#[tokio::test]
async fn an_announced_stop_fails_readiness_first_and_asks_clients_to_close() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let mut server = Server::on(&redis, &[("http.shutdown_delay", "500ms")]).await;
    let mut kept = Client::connect(server.address).await;
    let mut multiplexed = Client::speaking(Protocol::Http2, server.address).await;
    assert_eq!(kept.get("/images/a", &[]).await.header("connection"), "");
    assert_eq!(multiplexed.get("/images/a", &[]).await.status, StatusCode::OK);
    server.begin_to_stop(Stop::Announced);
    until("the server reports that it isn't ready", || async {
        server.get("/readyz").await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    server.get("/readyz").await.problem(503, "stopping");
    // Requests are still answered, with `Connection: close`.
    let last = kept.get("/images/a", &[]).await;
    assert_eq!((last.status, last.header("connection")), (StatusCode::OK, "close"));
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    assert_eq!(multiplexed.get("/images/a", &[]).await.status, StatusCode::OK);
    until("the listener is closed", || async { TcpStream::connect(server.address).await.is_err() })
        .await;
    server.ended().await;
}

#[tokio::test]
async fn an_unfinished_request_delays_a_stop_no_longer_than_the_shutdown_timeout() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let server = Server::on(&redis, &[("http.shutdown_timeout", "300ms")]).await;
    redis.signal("STOP");
    let address = server.address;
    let waiting = tokio::spawn(async move {
        let mut client = Client::connect(address).await;
        client.send(Method::GET, "/images/a", &[], Bytes::new()).await
    });
    until("the request is in the server", || async {
        server.metric("afterimage_requests_in_flight").await == 1
    })
    .await;
    tokio::time::timeout(Duration::from_secs(3), server.stop()).await.unwrap();
    assert!(waiting.await.unwrap().is_err());
    redis.signal("CONT");
}

/// Closed-loop clients that keep their connections as long as possible, behind a load balancer that polls `/readyz` and
/// opens no new connections to a server that isn't ready.
struct Load {
    ready: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: Vec<tokio::task::JoinHandle<Option<String>>>,
}

impl Load {
    fn start(address: SocketAddr, protocol: Protocol, clients: usize, path: &'static str) -> Load {
        let (ready, answered) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        let balancer = Arc::clone(&ready);
        tokio::spawn(async move {
            while get(address, "/readyz", &[]).await.status == StatusCode::OK {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            balancer.store(false, Ordering::Relaxed);
        });
        let clients = (0..clients)
            .map(|_| {
                let (ready, answered) = (Arc::clone(&ready), Arc::clone(&answered));
                tokio::spawn(async move {
                    while ready.load(Ordering::Relaxed) {
                        let mut client = Client::speaking(protocol, address).await;
                        if let Err(lost) = ask_on(&mut client, path, &answered).await {
                            return Some(lost);
                        }
                    }
                    None
                })
            })
            .collect();
        Load { ready, answered, clients }
    }

    /// Descriptions of the lost requests, once all clients have ended.
    async fn losses(self) -> Vec<String> {
        assert!(!self.ready.load(Ordering::Relaxed));
        let mut losses = Vec::new();
        for client in self.clients {
            losses.extend(client.await.unwrap());
        }
        losses
    }
}

/// Sends requests until the server asks to close, or until a request is lost.
async fn ask_on(client: &mut Client, path: &str, answered: &AtomicU64) -> Result<(), String> {
    loop {
        match client.send(Method::GET, path, &[], Bytes::new()).await {
            Ok(answer) if answer.status == StatusCode::OK => {
                answered.fetch_add(1, Ordering::Relaxed);
                if answer.header("connection") == "close" {
                    return Ok(());
                }
            }
            Ok(answer) => return Err(format!("{answer:?}")),
            // A request that was never sent can be retried elsewhere, and so can a stream that GOAWAY excludes (RFC 9113 §6.8).
            Err(error) if error.is_canceled() || error.is_closed() => return Ok(()),
            Err(error) if format!("{error:?}").contains("GoAway(b\"\", NO_ERROR") => return Ok(()),
            Err(error) => return Err(format!("{error:?}")),
        }
    }
}

async fn a_stop_under_load_loses_no_request() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 50_000))).await;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut command = program();
        command.args(["--redis-url", &redis.url(), "--http-shutdown-delay", "300ms"]);
        command.args(["--log-access", "false"]);
        let mut server = Process::start(command);
        let load = Load::start(server.address, protocol, 32, "/images/a");
        until("there is load", || async { load.answered.load(Ordering::Relaxed) > 1000 }).await;
        server.signal("TERM");
        let ended = tokio::task::spawn_blocking(move || server.child.wait().unwrap().success());
        assert!(tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap());
        let answered = Arc::clone(&load.answered);
        let losses = load.losses().await;
        println!(
            "{protocol:?}: {} answered, {} lost",
            answered.load(Ordering::Relaxed),
            losses.len()
        );
        assert!(losses.is_empty(), "{protocol:?}: {losses:?}");
    }
}

async fn thousands_of_slow_and_idle_clients_do_not_disturb_the_others() {
    const SLOW: usize = 2000;
    const IDLE: usize = 5000;
    rlimit::increase_nofile_limit(20_000).unwrap();
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 50_000))).await;
    let mut command = program();
    command.args([
        "--redis-url",
        &redis.url(),
        "--http-header-timeout",
        "8s",
        "--log-access",
        "false",
    ]);
    let server = Process::start(command);
    let mib = |bytes: u64| bytes >> 20;
    let connections =
        async || metric(&get(server.address, "/metrics", &[]).await, "afterimage_connections");
    let mut client = Client::connect(server.address).await;
    let mut steps = HashMap::new();
    let mut step = async |name: &'static str| {
        // Requests are served all the while.
        for _ in 0..200 {
            let answer = client.get("/images/a", &[]).await;
            assert_eq!(answer.status, StatusCode::OK);
        }
        steps.insert(name, mib(server.resident()));
        println!("{name}: {} MiB resident, {} connections", steps[name], connections().await);
    };
    step("at first").await;

    let mut idle = Vec::new();
    for _ in 0..IDLE {
        let mut other = Client::connect(server.address).await;
        assert_eq!(other.get("/images/a", &[]).await.status, StatusCode::OK);
        idle.push(other);
    }
    step("with 5,000 idle connections").await;

    let (slow, start) = (Arc::new(AtomicU64::new(0)), Instant::now());
    for _ in 0..SLOW {
        let slow = Arc::clone(&slow);
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        tokio::spawn(async move {
            use tokio::io::AsyncWriteExt;
            // A byte each half second, until the header time-out.
            stream.write_all(b"GET /images/a HTTP/1.1\r\nHost: a\r\nX: ").await.unwrap();
            while stream.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            slow.fetch_add(1, Ordering::Relaxed);
        });
    }
    step("with 2,000 slow heads as well").await;
    while slow.load(Ordering::Relaxed) < SLOW as u64 {
        assert!(
            start.elapsed() < 3 * PATIENCE,
            "{} slow clients were disconnected",
            slow.load(Ordering::Relaxed)
        );
        step("while the slow ones are disconnected").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    step("when the slow ones are gone").await;
    // The idle connections are still open and served.
    for other in idle.iter_mut().step_by(100) {
        assert_eq!(other.get("/images/a", &[]).await.status, StatusCode::OK);
    }
    drop(idle);
    until("all connections are closed", || async { connections().await <= 2 }).await;
    step("at last").await;
}

#[tokio::test]
async fn every_response_has_the_request_id_of_its_client_or_a_new_one() {
    let server = Server::start(&[("redis.url", "redis://127.0.0.1:1")]).await;
    let own = get(server.address, "/images/a", &[("x-request-id", "abc-1/2")]).await;
    assert_eq!(own.header("x-request-id"), "abc-1/2");
    let (one, other) = (server.get("/healthz").await, server.get("/nothing").await);
    assert_eq!(one.header("x-request-id").len(), 32);
    assert_ne!(one.header("x-request-id"), other.header("x-request-id"));
    let unfit = get(server.address, "/healthz", &[("x-request-id", "a b")]).await;
    assert_eq!(unfit.header("x-request-id").len(), 32);
}

/// The program with its log in a file.
pub(crate) struct Logging {
    pub(crate) process: Process,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Logging {
    pub(crate) fn start(arguments: &[&str]) -> Logging {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        let mut command = program();
        command.args(arguments).stderr(Stdio::from(std::fs::File::create(&file).unwrap()));
        Logging { process: Process::start(command), file, _dir: dir }
    }

    /// Stops the program, and returns its whole log.
    pub(crate) fn end(mut self) -> String {
        self.process.signal("INT");
        assert!(self.process.child.wait().unwrap().success());
        let mut text = String::new();
        std::fs::File::open(&self.file).unwrap().read_to_string(&mut text).unwrap();
        text
    }
}

#[tokio::test]
async fn the_log_has_one_line_per_request_as_text_or_json_and_no_secret() {
    let redis = RedisServer::start_with(&["--requirepass", "hunter2"]).await;
    let url = format!("redis://:hunter2@127.0.0.1:{}", redis.port);
    let value = record(&png(1, 3000));
    let client = redis::Client::open(url.as_str()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    redis::cmd("SET").arg("image:a").arg(&value).exec_async(&mut connection).await.unwrap();

    let server =
        Logging::start(&["--redis-url", &url, "--log-format", "json", "--log-filter", "debug"]);
    let address = server.process.address;
    let fields = [("x-request-id", "mine"), ("authorization", "Bearer hunter2")];
    assert_eq!(get(address, "/images/a?v=1", &fields).await.status, StatusCode::OK);
    let tag = etag(&value);
    let fields = [("x-request-id", "again"), ("if-none-match", tag.as_str())];
    assert_eq!(get(address, "/images/a", &fields).await.status, StatusCode::NOT_MODIFIED);
    let log = server.end();
    assert!(!log.contains("hunter2"), "{log}");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |id: &str| {
        let mut lines = lines.iter().filter(|line| line["id"] == id);
        let line = lines.next().unwrap_or_else(|| panic!("no line for {id} in {log}"));
        assert!(lines.next().is_none());
        line
    };
    let first = of("mine");
    assert_eq!(first["target"], "afterimage::access");
    assert_eq!(first["level"], "INFO");
    assert_eq!(first["method"], "GET");
    assert_eq!(first["path"], "/images/a?v=1");
    assert_eq!(first["status"], 200);
    assert_eq!(first["bytes"], 3000);
    assert_eq!(first["cache"], "afterimage; fwd=miss; stored");
    assert_eq!(first["whole"], true);
    assert!(first["duration_ms"].as_f64().unwrap() > 0.0);
    assert!(first["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    let again = of("again");
    assert_eq!((&again["status"], &again["bytes"]), (&304.into(), &0.into()));

    let server = Logging::start(&["--redis-url", &url]);
    get(server.process.address, "/images/a", &[("x-request-id", "mine")]).await;
    let log = server.end();
    let line = log.lines().find(|line| line.contains("mine")).unwrap();
    assert!(line.contains("INFO") && line.contains("status=200"), "{line}");
}

#[tokio::test]
async fn requests_of_operators_are_logged_only_when_they_are_refused_or_fail() {
    let redis = RedisServer::start().await;
    let url = redis.url();
    for admin in [false, true] {
        let port = crate::harness::redis::free_port();
        let listen = format!("127.0.0.1:{port}");
        let mut arguments = vec!["--redis-url", &url, "--log-format", "json"];
        if admin {
            arguments.extend(["--admin-listen", &listen]);
        }
        let server = Logging::start(&arguments);
        let main = server.process.address;
        let operators = if admin { listen.parse().unwrap() } else { main };
        until("the server is ready", || async {
            get(operators, "/readyz", &[]).await.status == StatusCode::OK
        })
        .await;
        for path in ["/healthz", "/readyz", "/metrics"] {
            get(operators, path, &[("x-request-id", "routine")]).await;
        }
        get(operators, "/readyz?x", &[("x-request-id", "refused")])
            .await
            .problem(400, "bad-parameter");
        get(main, "/images/absent", &[("x-request-id", "public")]).await.problem(404, "absent");
        if admin {
            // There is nothing for operators on the public listener, so these are a stranger's.
            get(main, "/metrics", &[("x-request-id", "stranger")]).await;
        }
        let log = server.end();
        assert!(!log.contains("routine"), "{log}");
        let wanted = ["refused", "public", "stranger"].into_iter().take(2 + usize::from(admin));
        for id in wanted {
            assert_eq!(log.matches(id).count(), 1, "{id}: {log}");
        }
    }

    let server = Logging::start(&["--redis-url", "redis://127.0.0.1:1", "--log-format", "json"]);
    let fields = [("x-request-id", "unlucky")];
    let answer = get(server.process.address, "/readyz", &fields).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    let log = server.end();
    let line = log.lines().find(|line| line.contains("unlucky")).unwrap();
    assert!(line.contains("WARN") && line.contains("can't be reached"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_combined_format_has_the_lines_of_nginx_and_no_client_can_forge_one() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 3000))).await;
    let url = redis.url();
    let server = Logging::start(&["--redis-url", &url, "--log-format", "combined"]);
    let address = server.process.address;
    let agent = "Mozilla/5.0 (\"quoted\" \\ back) x\" 200 1 \"-\" \"forged\"";
    let fields = [("referer", "https://app.example/?q=\"x\""), ("user-agent", agent)];
    // From the store, from memory in the fast loop, and from memory over HTTP/2.
    let mut client = Client::connect(address).await;
    for _ in 0..2 {
        assert_eq!(client.get("/images/a?v=1", &fields).await.status, StatusCode::OK);
    }
    let mut multiplexed = Client::speaking(Protocol::Http2, address).await;
    assert_eq!(multiplexed.get("/images/a?v=1", &fields).await.status, StatusCode::OK);
    client.send(Method::HEAD, "/images/a", &[], Bytes::new()).await.unwrap();
    get(address, "/images/absent", &[]).await.problem(404, "absent");
    // A stop would wait for them.
    drop((client, multiplexed));
    let log = server.end();

    let escaped = r#""https://app.example/?q=\x22x\x22" "Mozilla/5.0 (\x22quoted\x22 \x5C back) x\x22 200 1 \x22-\x22 \x22forged\x22""#;
    for (line, times) in [
        (format!(r#""GET /images/a?v=1 HTTP/1.1" 200 3000 {escaped}"#), 2),
        (format!(r#""GET /images/a?v=1 HTTP/2.0" 200 3000 {escaped}"#), 1),
        (r#""HEAD /images/a HTTP/1.1" 200 0 "-" "-""#.to_owned(), 1),
        (r#""GET /images/absent HTTP/1.1" 404 "#.to_owned(), 1),
    ] {
        assert_eq!(log.matches(&line).count(), times, "{line} in {log}");
    }
    assert_eq!(requests_in(&log), 5, "{log}");

    // The cause of a failure is a line of text beside the request's.
    let server =
        Logging::start(&["--redis-url", "redis://127.0.0.1:1", "--log-format", "combined"]);
    get(server.process.address, "/images/a", &[("x-request-id", "unlucky")]).await;
    let log = server.end();
    assert!(log.contains(r#""GET /images/a HTTP/1.1" 503 "#), "{log}");
    let cause = log.lines().find(|line| line.contains("unlucky")).unwrap();
    assert!(cause.contains("WARN") && cause.contains("can't be reached"), "{cause}");
    assert_eq!(requests_in(&log), 1, "{log}");
}

/// Returns the number of lines that are requests, to the expression that scripts use for the combined format.
fn requests_in(log: &str) -> usize {
    const SCRIPT: &str = r#"
import re, sys
from datetime import datetime
combined = re.compile(r'(\S+) (\S+) (\S+) \[([^\]]+)\] "([A-Z]+) ([^ "]+) (HTTP/[0-9.]+)" ([0-9]{3}) ([0-9]+|-) "([^"]*)" "([^"]*)"')
requests = [it for it in map(combined.fullmatch, sys.stdin.read().splitlines()) if it]
for request in requests:
    age = datetime.now().timestamp() - datetime.strptime(request[4], "%d/%b/%Y:%H:%M:%S %z").timestamp()
    assert request[1] == "127.0.0.1" and -60 < age < 600, request[0]
print(len(requests))
"#;
    let mut child = Command::new("python3")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), log.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{log}");
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn a_failure_is_logged_once_with_its_request_even_without_an_access_log() {
    let server = Logging::start(&[
        "--redis-url",
        "redis://127.0.0.1:1",
        "--log-access",
        "false",
        "--log-format",
        "json",
    ]);
    let address = server.process.address;
    let answer = get(address, "/images/a", &[("x-request-id", "unlucky")]).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    // The client doesn't see the store's host; the operator's log does.
    assert!(!String::from_utf8_lossy(&answer.body).contains("127.0.0.1"));
    get(address, "/images/-", &[("x-request-id", "wrong")]).await.problem(400, "bad-id");
    let log = server.end();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("unlucky")).collect();
    let [line] = lines[..] else { panic!("{log}") };
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((&line["level"], &line["status"]), (&"WARN".into(), &503.into()));
    assert!(line["error"].as_str().unwrap().contains("can't be reached"), "{line}");
    assert_eq!(line["path"], "/images/a");
    assert!(!log.contains("wrong"), "{log}");
}

#[tokio::test]
async fn the_metrics_count_requests_and_reads_and_time_pushes_and_heartbeats() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let value = record(&png(1, 3000));
    let json = [("content-type", "application/json")];
    server.send(Method::PUT, "/images/a", &json, Bytes::from(value.clone())).await;
    for _ in 0..3 {
        assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    }
    server.get("/images/absent").await.problem(404, "absent");
    server.send("BREW".parse().unwrap(), "/images/a", &[], Bytes::new()).await;
    let page = server.get("/metrics").await;
    let requests = |method: &str, status: u16| {
        metric(
            &page,
            &format!(
                "afterimage_requests_total{{route=\"/images/{{id}}\",method=\"{method}\",status=\"{status}\"}}"
            ),
        )
    };
    assert_eq!((requests("GET", 200), requests("GET", 404)), (3, 1));
    assert_eq!((requests("PUT", 201), requests("other", 405)), (1, 1));
    assert_eq!(metric(&page, "afterimage_reads_total{served=\"hit\"}"), 2);
    assert_eq!(metric(&page, "afterimage_reads_total{served=\"fetched\"}"), 2);
    let coherent =
        |state: &str| metric(&page, &format!("afterimage_coherence{{state=\"{state}\"}}"));
    assert_eq!((coherent("coherent"), coherent("unverified"), coherent("unreachable")), (1, 0, 0));
    let seconds = "afterimage_request_duration_seconds_count{route=\"/images/{id}\"}";
    assert_eq!(metric(&page, seconds), 6);
    assert!(metric(&page, "afterimage_response_bytes_total") >= 9000);
    until("the push of the write has arrived", || async {
        server.metric("afterimage_push_latency_seconds_count").await == 1
    })
    .await;
    until("a heartbeat came back", || async {
        server.metric("afterimage_tracking_round_trip_seconds_count").await >= 1
    })
    .await;
}
