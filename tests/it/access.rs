//! Rights: who may write, list and look, under which names, and whom proxies name.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use redis::AsyncTypedCommands;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::browser::{CHROMIUM, browser_folder, script};
use crate::events::Events;
use crate::harness::redis::free_port;
use crate::harness::server::{program, program_with_rights};
use crate::harness::{
    Answer, Client, PATIENCE, Protocol, Proxy, RedisServer, Server, get, png, record, until,
};

long_tests! {
    #[tokio::test(flavor = "multi_thread")] nobody_writes_through_a_proxy_without_a_token
    #[tokio::test(flavor = "multi_thread")] no_page_of_another_origin_or_under_a_rebound_name_writes_or_reads
    #[tokio::test(flavor = "multi_thread")] haproxy_and_nginx_tell_who_the_client_is
    #[tokio::test(flavor = "multi_thread")] a_refusal_reaches_nodes_fetch_while_it_sends
    #[tokio::test(flavor = "multi_thread")] a_refusal_reaches_curl_over_http_2
    #[tokio::test] a_refused_client_that_dawdles_holds_no_place_and_is_cut_off
    #[tokio::test] the_printed_curl_line_works
}

/// The rights of the defaults, which the harness widens for other tests.
const DEFAULTS: [(&str, &str); 2] = [("writes.local", "false"), ("events.prefix", "token")];
const TOKENS: (&str, &str) = ("writes.tokens", r#"["a-token-of-some-length"]"#);
const BEARER: (&str, &str) = ("authorization", "Bearer a-token-of-some-length");
const PNG: (&str, &str) = ("content-type", "image/png");

async fn guarded(redis: &RedisServer, settings: &[(&str, &str)]) -> Server {
    Server::on(redis, &[&DEFAULTS, settings].concat()).await
}

async fn put(address: SocketAddr, headers: &[(&str, &str)]) -> Answer {
    let body = Bytes::from(png(1, 1000));
    let headers = [&[PNG], headers].concat();
    Client::connect(address).await.send(Method::PUT, "/images/a", &headers, body).await.unwrap()
}

/// Sends a raw request on a connection of its own, and returns the whole answer.
async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// A program that is stopped with the test, by its process id, and the folder for its files.
struct Running {
    child: Child,
    dir: TempDir,
}

impl Running {
    fn spawn(dir: TempDir, mut command: Command) -> Running {
        let program = command.get_program().to_owned();
        command.stdin(Stdio::null());
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}: apt-get install {0}", program.display()));
        Running { child, dir }
    }

    async fn until_it_listens(self, address: SocketAddr) -> Running {
        until("it listens", || async { TcpStream::connect(address).await.is_ok() }).await;
        self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // SIGTERM, so that child processes end too.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

/// The program with its defaults, and what it prints.
struct Program {
    running: Running,
    address: SocketAddr,
    output: String,
    log: PathBuf,
}

impl Program {
    /// Starts it on a port, with arguments, and waits for its text.
    async fn start(port: u16, arguments: &[&str], last_words: &str) -> Program {
        let dir = tempfile::tempdir().unwrap();
        let (printed, log) = (dir.path().join("printed"), dir.path().join("log"));
        let mut command = program_with_rights(&dir.path().join("run"));
        command.args(["--http-listen", &format!("127.0.0.1:{port}")]).args(arguments);
        command.stdout(fs::File::create(&printed).unwrap());
        command.stderr(fs::File::create(&log).unwrap());
        let running = Running::spawn(dir, command);
        let text = || fs::read_to_string(&printed).unwrap();
        until("its text is printed", || async { text().contains(last_words) }).await;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        Program { output: text(), running, address, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The path that the curl line has.
    fn token_file(&self) -> PathBuf {
        let (_, rest) = self.output.split_once("Bearer $(cat ").expect(&self.output);
        rest.split_once(')').unwrap().0.into()
    }
}

#[tokio::test]
async fn without_tokens_a_start_makes_one_that_only_its_user_reads() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().to_str().unwrap();
    let (port, arguments) = (free_port(), ["--embedded-dir", store]);
    let program = Program::start(port, &arguments, "curl -T").await;
    let file = program.token_file();
    assert_eq!(file, dir.path().join(format!("write-token-{port}")));
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
    let token = fs::read_to_string(&file).unwrap().trim().to_owned();
    let bearer = format!("Bearer {token}");
    let bearer = ("authorization", bearer.as_str());

    // A first start with the defaults is no reason for a warning.
    assert!(!program.log().contains("WARN"), "{}", program.log());

    let address = program.address;
    put(address, &[]).await.problem(401, "unauthorised");
    put(address, &[("host", "localhost")]).await.problem(401, "unauthorised");
    put(address, &[BEARER]).await.problem(401, "invalid-token");
    assert_eq!(put(address, &[bearer]).await.status, StatusCode::CREATED);
    get(address, "/events?prefix=a", &[]).await.problem(401, "unauthorised");
    let mut events = Events::with(address, "prefix=a", &[bearer]).await;
    assert_eq!(events.next().await.name, "concept_progress");

    // The command reads the file.
    let picture = dir.path().join("picture");
    fs::write(&picture, png(2, 1000)).unwrap();
    let run = |command: &mut Command| {
        command.args(["put", "b", picture.to_str().unwrap(), "--embedded-dir", store]);
        command.args(["--http-listen", &address.to_string()]).output().unwrap()
    };
    let done = run(&mut program_with_rights(dir.path()));
    assert!(done.status.success(), "{done:?}");
    assert_eq!(get(address, "/images/b", &[]).await.body, png(2, 1000));
    for text in [&program.log(), &program.output] {
        assert!(!text.contains(&token), "{text}");
    }
    drop(program);

    // It is the same after the next start, unless others could have read it.
    let again = Program::start(port, &arguments, "curl -T").await;
    assert_eq!(fs::read_to_string(&file).unwrap().trim(), token);
    drop(again);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let mut refused = program_with_rights(dir.path());
    let refused = refused.args(["--http-listen", &address.to_string()]).args(arguments);
    let refused = refused.output().unwrap();
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(!refused.status.success() && message.contains("has the mode 0644"), "{message}");
    assert!(message.contains(file.to_str().unwrap()) && !message.contains(&token), "{message}");
}

#[tokio::test]
async fn with_redis_the_token_is_in_the_runtime_folder() {
    let redis = RedisServer::start().await;
    let (port, url) = (free_port(), redis.url());
    let program = Program::start(port, &["--redis-url", &url], "curl -T").await;
    let folder = program.running.dir.path().join("run/afterimage");
    assert_eq!(program.token_file(), folder.join(format!("write-token-{port}")));
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o7777, 0o700);
}

#[tokio::test]
async fn a_server_that_can_make_no_token_serves_and_nobody_writes() {
    let redis = RedisServer::start().await;
    redis.set("b", &record(&png(1, 100))).await;
    let dir = tempfile::tempdir().unwrap();
    // A file is where the folder should be.
    let blocked = dir.path().join("blocked");
    fs::write(&blocked, "").unwrap();
    let (printed, log) = (dir.path().join("printed"), dir.path().join("log"));
    let port = free_port();
    let mut command = program_with_rights(&blocked);
    command.args(["--redis-url", &redis.url(), "--http-listen", &format!("127.0.0.1:{port}")]);
    command.stdout(fs::File::create(printed).unwrap());
    command.stderr(fs::File::create(&log).unwrap());
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let _running = Running::spawn(dir, command).until_it_listens(address).await;
    until("it serves", || async { get(address, "/images/b", &[]).await.status == 200 }).await;
    put(address, &[]).await.problem(401, "unauthorised");
    put(address, &[BEARER]).await.problem(401, "unauthorised");
    get(address, "/events?prefix=a", &[]).await.problem(401, "unauthorised");
    until("the log says so", || async {
        fs::read_to_string(&log).unwrap().contains("no token can be made")
    })
    .await;
}

#[tokio::test]
async fn no_token_is_made_where_nobody_needs_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().to_str().unwrap();
    let has_token = || {
        let mut names = fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name());
        names.any(|name| name.to_str().unwrap().starts_with("write-token"))
    };
    for off in [
        &["--writes-enabled", "false", "--events-prefix", "off"][..],
        &["--writes-local", "true", "--events-prefix", "open"],
        &["--writes-tokens", r#"["a-token-of-some-length"]"#],
    ] {
        let arguments = ["--embedded-dir", store, "--gallery-enabled", "false"];
        let arguments = [&arguments, off].concat();
        let program = Program::start(free_port(), &arguments, "afterimage serves").await;
        until("it serves", || async { get(program.address, "/healthz", &[]).await.status == 200 })
            .await;
        assert!(!program.output.contains("Bearer"), "{}", program.output);
        assert!(!has_token(), "{off:?}");
    }
}

async fn the_printed_curl_line_works() {
    let dir = tempfile::tempdir().unwrap();
    // A path that a shell would take apart.
    let store = dir.path().join("it's a store");
    let arguments = ["--embedded-dir", store.to_str().unwrap()];
    let program = Program::start(free_port(), &arguments, "curl -T").await;
    fs::write(dir.path().join("picture.png"), png(1, 1000)).unwrap();
    let line = program.output.lines().find(|line| line.contains("curl -T")).unwrap();
    let run = Command::new("sh").current_dir(dir.path()).args(["-c", line]).output().unwrap();
    assert!(run.status.success(), "{line}: {run:?}");
    assert_eq!(get(program.address, "/images/my_image", &[]).await.body, png(1, 1000));
}

#[tokio::test]
async fn a_prefix_is_followed_with_a_token_alone() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let followed = async |server: &Server, query: &str, headers: &[(&str, &str)]| {
        let mut client = Client::connect(server.address).await;
        // The stream doesn't end, so only its head is asked for.
        let path = format!("/events?{query}");
        client.send(Method::HEAD, &path, headers, Bytes::new()).await.unwrap().status.as_u16()
    };
    let (evil, wrong) = (("host", "evil.example"), ("authorization", "Bearer not-a-token-at-all"));
    for (settings, query, headers, status) in [
        (vec![TOKENS], "prefix=a", vec![], 401),
        (vec![TOKENS], "prefix=", vec![], 401),
        (vec![TOKENS], "prefix=a", vec![wrong], 401),
        (vec![TOKENS], "prefix=a", vec![BEARER], 200),
        (vec![TOKENS], "prefix=", vec![BEARER], 200),
        (vec![TOKENS], "prefix=a", vec![BEARER, evil], 200),
        (vec![TOKENS, ("writes.enabled", "false")], "prefix=a", vec![BEARER], 200),
        // Nobody has a token. An address alone proves nothing.
        (vec![], "prefix=a", vec![], 401),
        (vec![("writes.local", "true")], "prefix=a", vec![], 401),
        (vec![("events.prefix", "open")], "prefix=a", vec![], 200),
        (vec![("events.prefix", "open")], "prefix=", vec![], 401),
        (vec![("events.prefix", "open")], "prefix=a", vec![evil], 421),
        (vec![("events.prefix", "open"), TOKENS], "prefix=", vec![BEARER], 200),
        (vec![("events.prefix", "off"), TOKENS], "prefix=a", vec![BEARER], 403),
        // Whoever knows an id may follow it.
        (vec![("events.prefix", "off")], "ids=a", vec![], 200),
        (vec![], "ids=a", vec![evil], 200),
    ] {
        let server = guarded(&redis, &settings).await;
        let told = followed(&server, query, &headers).await;
        assert_eq!(told, status, "{settings:?} {query} {headers:?}");
    }
    let off = guarded(&redis, &[("events.prefix", "off")]).await;
    off.get("/events?prefix=a").await.problem(403, "listing-off");
}

#[tokio::test]
async fn under_a_rebound_name_nothing_is_listed_measured_or_written() {
    let redis = RedisServer::start().await;
    let server = guarded(&redis, &[("writes.local", "true")]).await.coherent().await;
    let evil = [("host", "evil.example")];
    put(server.address, &evil).await.problem(403, "not-from-here");
    assert_eq!(put(server.address, &[]).await.status, StatusCode::CREATED);
    for protocol in [Protocol::Http1, Protocol::Http2] {
        for (host, status) in [
            ("evil.example", 421),
            ("afterimage", 421),
            ("127.0.0.1.evil.example:80", 421),
            ("127.0.0.1:80", 200),
            ("[::1]:8000", 200),
            ("localhost", 200),
            ("images.localhost:80", 200),
        ] {
            let stream = TcpStream::connect(server.address).await.unwrap();
            let mut client = Client::over(protocol, stream, host).await;
            let headers = if protocol == Protocol::Http1 { vec![("host", host)] } else { vec![] };
            let metrics = client.get("/metrics", &headers).await;
            assert_eq!(metrics.status, status, "{protocol:?} {host}");
            // Images may be behind any name, such as that of a CDN.
            for path in ["/images/a", "/healthz", "/readyz", "/openapi.json"] {
                let answer = client.get(path, &headers).await;
                assert_eq!(answer.status, StatusCode::OK, "{protocol:?} {host} {path}");
            }
        }
    }
    get(server.address, "/metrics", &evil).await.problem(421, "misdirected");
    // A request without a host may come from anywhere.
    let old = exchange(server.address, "GET /metrics HTTP/1.0\r\n\r\n").await;
    assert!(old.split_once(' ').unwrap().1.starts_with("421 "), "{old}");

    let apart = guarded(&redis, &[("admin.listen", "127.0.0.1:0")]).await;
    assert_eq!(get(apart.admin, "/metrics", &evil).await.status, StatusCode::OK);
}

#[tokio::test]
async fn with_hosts_no_other_name_is_answered() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let hosts = ("http.hosts", r#"["Images.example", "metrics.example"]"#);
    let server = guarded(&redis, &[hosts, TOKENS]).await.coherent().await;
    let paths = ["/images/a", "/images/a/info", "/images/a/thumbnail", "/metrics", "/nothing"];
    // Again, since the fast loop answers the second one.
    for _ in 0..2 {
        for path in paths {
            for other in ["evil.example", "a.images.example", "images.example.evil.example"] {
                let host = [("host", other)];
                get(server.address, path, &host).await.problem(421, "misdirected");
            }
            for own in ["images.example", "IMAGES.EXAMPLE:443", "images.example.", "127.0.0.1"] {
                let status = get(server.address, path, &[("host", own)]).await.status;
                assert_ne!(status, StatusCode::MISDIRECTED_REQUEST, "{own} {path}");
            }
        }
    }
    let evil = ("host", "evil.example");
    put(server.address, &[evil, BEARER]).await.problem(421, "misdirected");
    assert_eq!(put(server.address, &[BEARER]).await.status, StatusCode::OK);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(server.address, path, &[evil]).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn the_host_of_an_absolute_target_counts() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let server = guarded(&redis, &[("writes.local", "true")]).await;
    redis.set("b", &record(&png(1, 100))).await;
    let drawing = "<svg xmlns='http://www.w3.org/2000/svg'/>";
    let put = |version: &str, target: &str, host: &str| {
        let length = drawing.len();
        format!(
            "PUT {target} HTTP/{version}\r\nHost: {host}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{drawing}"
        )
    };
    let status = async |request: String| {
        let answer = exchange(server.address, &request).await;
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    for version in ["1.1", "1.0"] {
        for (target, host, expected) in [
            ("/images/b", "127.0.0.1", 200),
            ("http://127.0.0.1/images/b", "127.0.0.1", 200),
            ("http://127.0.0.1/images/b", "evil.example", 200),
            ("http://evil.example/images/b", "127.0.0.1", 403),
            ("http://evil.example:80/images/b", "localhost", 403),
            ("http://127.0.0.1@evil.example/images/b", "127.0.0.1", 400),
            ("http://[evil.example]/images/b", "127.0.0.1", 400),
            ("/images/b", "evil.example", 403),
        ] {
            let told = status(put(version, target, host)).await;
            assert_eq!(told, expected, "HTTP/{version} {target} {host}");
        }
        let metrics = |target: &str| {
            format!("GET {target} HTTP/{version}\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        };
        assert_eq!(status(metrics("http://127.0.0.1/metrics")).await, 200);
        assert_eq!(status(metrics("http://evil.example/metrics")).await, 421);
    }
}

/// Finds the line of a request in the access log.
async fn logged(log: &Path, id: &str) -> Value {
    let line = || {
        let text = fs::read_to_string(log).unwrap();
        text.lines().find(|line| line.contains(&format!("\"{id}\""))).map(str::to_owned)
    };
    until("the request is logged", || async { line().is_some() }).await;
    serde_json::from_str(&line().unwrap()).unwrap()
}

#[tokio::test]
async fn the_log_has_the_client_that_a_trusted_proxy_names() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let url = redis.url();
    for (proxies, is_trusted) in [(r#"["127.0.0.1", "10.0.0.0/8"]"#, true), ("[]", false)] {
        let arguments =
            ["--redis-url", &url, "--log-format", "json", "--http-trusted-proxies", proxies];
        let program = Program::start(free_port(), &arguments, "afterimage serves").await;
        let mut number = 0;
        for path in ["/images/a", "/images/a", "/openapi.json"] {
            for (name, line, client) in [
                ("x-forwarded-for", "1.1.1.1, 192.0.2.1, 10.0.0.1", Some("192.0.2.1")),
                ("forwarded", "for=\"[2001:db8::1]:9\"", Some("2001:db8::1")),
                ("x-forwarded-for", "unknown", None),
                ("accept", "*/*", None),
            ] {
                number += 1;
                let id = format!("number-{number}");
                get(program.address, path, &[(name, line), ("x-request-id", &id)]).await;
                let told = logged(&program.log, &id).await;
                assert!(told["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{told}");
                let expected = client.filter(|_| is_trusted).map_or(Value::Null, Value::from);
                assert_eq!(told["client"], expected, "{told}");
            }
        }
    }
}

#[tokio::test]
async fn with_the_proxy_protocol_only_trusted_proxies_connect() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let url = redis.url();
    let request =
        "GET /images/a HTTP/1.1\r\nHost: a\r\nX-Request-Id: ID\r\nConnection: close\r\n\r\n";
    let start = async |proxies: &str| {
        let arguments =
            ["--redis-url", &url, "--log-format", "json", "--http-proxy-protocol", "true"];
        let arguments = [
            &arguments[..],
            &["--http-trusted-proxies", proxies, "--http-header-timeout", "300ms"],
        ];
        Program::start(free_port(), &arguments.concat(), "afterimage serves").await
    };
    let program = start(r#"["127.0.0.1"]"#).await;
    for (header, id, peer) in [
        ("PROXY TCP4 192.0.2.1 10.0.0.1 4660 80\r\n", "first", "192.0.2.1:4660"),
        ("PROXY TCP6 2001:db8::1 ::1 9 80\r\n", "second", "[2001:db8::1]:9"),
        ("PROXY UNKNOWN\r\n", "third", "127.0.0.1:"),
    ] {
        let answer =
            exchange(program.address, &format!("{header}{}", request.replace("ID", id))).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let told = logged(&program.log, id).await;
        assert!(told["peer"].as_str().unwrap().starts_with(peer), "{told}");
    }
    // Closed without an answer: no header, half a header, and nothing at all.
    for start in [request, "PROXY TCP4 192.0.2.1", ""] {
        let mut stream = TcpStream::connect(program.address).await.unwrap();
        stream.write_all(start.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert_eq!(answer, b"", "{start}");
    }
    // Others can't name anybody, nor connect.
    let program = start(r#"["192.0.2.7"]"#).await;
    let mut stream = TcpStream::connect(program.address).await.unwrap();
    let _ = stream.write_all(b"PROXY TCP4 192.0.2.1 10.0.0.1 4660 80\r\n").await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert_eq!(answer, b"");

    let mut refused = program_with_rights(Path::new("/"));
    refused.args(["--redis-url", &url, "--http-listen", "127.0.0.1:0"]);
    let refused = refused.args(["--http-proxy-protocol", "true"]).output().unwrap();
    let message = String::from_utf8(refused.stderr).unwrap();
    assert!(message.contains("[http] proxy_protocol needs [http] trusted_proxies"), "{message}");
}

/// Sends bodies with Python's client, which sends all of one before it reads anything, and returns what it got for each.
fn sends_with_python(address: SocketAddr, requests: &Value) -> Vec<Value> {
    let script = r#"
import http.client, json, sys
port, requests = json.loads(sys.argv[1])
for method, path, headers, size in requests:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, body=b"x" * size, headers=headers)
        answer = connection.getresponse()
        answer.read()
        print(json.dumps(answer.status))
    except Exception as error:
        print(json.dumps(repr(error)))
"#;
    let arguments = json!([address.port(), requests]).to_string();
    let run = Command::new("python3").args(["-c", script, &arguments]).output().unwrap();
    assert!(run.status.success(), "{run:?}");
    let text = String::from_utf8(run.stdout).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_reaches_a_client_that_sends_its_whole_body_first() {
    const BYTES: usize = 20_000_000;
    let redis = RedisServer::start().await;
    let server = guarded(&redis, &[TOKENS, ("records.max_value", "16MiB")]).await;
    let json = json!({"content-type": "application/json"});
    let right = json!({"content-type": "application/json", "authorization": BEARER.1});
    let text = json!({"content-type": "text/html", "authorization": BEARER.1});
    let elsewhere = json!({"host": "a b"});
    let requests = json!([
        ["PUT", "/images/a", json, BYTES],
        ["POST", "/images", json, BYTES],
        ["PUT", "/images/a", right, BYTES],
        ["PUT", "/images/a", text, BYTES],
        ["PUT", "/images/-", right, BYTES],
        ["PATCH", "/images/a", right, BYTES],
        ["POST", "/nothing", right, BYTES],
        ["POST", "/images", elsewhere, BYTES],
    ]);
    let told = tokio::task::spawn_blocking({
        let address = server.address;
        move || sends_with_python(address, &requests)
    });
    let told = told.await.unwrap();
    assert_eq!(told, [401, 401, 413, 415, 400, 405, 404, 400].map(Value::from));
    // Whoever asks for leave first is told without sending anything.
    let head = "PUT /images/a HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\nExpect: 100-continue\r\n\r\n";
    let answer = exchange(server.address, head).await;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    // A body is read to its end if its length is within the bound, and the connection goes on.
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut client = Client::speaking(protocol, server.address).await;
        for _ in 0..3 {
            let body = Bytes::from(vec![0; 1_000_000]);
            let answer = client.send(Method::PUT, "/images/a", &[PNG], body).await.unwrap();
            answer.problem(401, "unauthorised");
        }
        assert_eq!(client.get("/healthz", &[]).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn bodies_without_the_right_to_write_take_nothing_of_the_budget_of_writes() {
    let redis = RedisServer::start().await;
    let settings = [TOKENS, ("limits.write_bytes", "1MiB"), ("redis.response_timeout", "1s")];
    let server = guarded(&redis, &settings).await;
    let mut stalled = Vec::new();
    for _ in 0..10 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let head = "PUT /images/b HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: 300000\r\n\r\nx";
        stream.write_all(head.as_bytes()).await.unwrap();
        // It is refused before its body has come.
        let mut status = [0; 12];
        stream.read_exact(&mut status).await.unwrap();
        assert_eq!(&status, b"HTTP/1.1 401");
        stalled.push(stream);
    }
    let body = Bytes::from(png(1, 300_000));
    let written = server.send(Method::PUT, "/images/a", &[PNG, BEARER], body).await;
    assert_eq!(written.status, StatusCode::CREATED, "{written:?}");
}

async fn a_refusal_reaches_nodes_fetch_while_it_sends() {
    let redis = RedisServer::start().await;
    let server = guarded(&redis, &[TOKENS]).await;
    let script = r#"
const told = [];
for (let round = 0; round < 5; round++) {
  const body = new Uint8Array(20_000_000);
  try {
    const answer = await fetch(process.argv[1], { method: "PUT", body });
    await answer.text();
    told.push(answer.status);
  } catch (error) {
    told.push(String(error.cause ?? error));
  }
}
console.log(JSON.stringify(told));
"#;
    let url = format!("http://{}/images/a", server.address);
    let run = tokio::task::spawn_blocking(move || {
        let run =
            Command::new("node").args(["--input-type=module", "-e", script, "--", &url]).output();
        run.expect("node is needed: apt-get install nodejs")
    });
    let run = run.await.unwrap();
    assert!(run.status.success(), "{run:?}");
    let told: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(told, json!([401, 401, 401, 401, 401]));
}

async fn a_refused_client_that_dawdles_holds_no_place_and_is_cut_off() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let server = guarded(&redis, &[TOKENS, ("limits.requests", "1")]).await.coherent().await;
    let mut dawdling = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let head = "PUT /images/a HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nx";
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 401");
        dawdling.push(stream);
    }
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    for mut stream in dawdling {
        // The end of the connection, or its reset: there is nothing more to be told.
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection stays open");
    }
}

async fn a_refusal_reaches_curl_over_http_2() {
    let redis = RedisServer::start().await;
    let server = guarded(&redis, &[TOKENS]).await;
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    fs::write(&large, vec![0; 20_000_000]).unwrap();
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--http2-prior-knowledge", "-H", "Expect:", "-o", "/dev/null", "-T"])
        .arg(large);
    curl.args(["-w", "%{http_code}", &format!("http://{}/images/a", server.address)]);
    let run = tokio::task::spawn_blocking(move || {
        curl.output().expect("curl is needed: apt-get install curl")
    });
    let run = run.await.unwrap();
    assert!(run.status.success() && run.stdout == b"401", "{run:?}");
}

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port()))
}

fn folder() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    // nginx drops root's rights, and must still read the folder.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// nginx with nothing but a `proxy_pass`, and further lines.
async fn nginx(origin: SocketAddr, lines: &str) -> (Running, SocketAddr) {
    let (dir, address) = (folder(), address());
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|name| format!("{name}_temp_path {name};\n"))
        .concat();
    let text = format!(
        "daemon off; pid nginx.pid; error_log error.log;\nevents {{}}\nhttp {{\naccess_log off;\n{temporary}\
        server {{ listen {address}; location / {{ proxy_pass http://{origin}; {lines} }} }}\n}}\n"
    );
    fs::write(dir.path().join("nginx.conf"), text).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-p").arg(dir.path()).arg("-c").arg(dir.path().join("nginx.conf"));
    command.stderr(Stdio::null());
    (Running::spawn(dir, command).until_it_listens(address).await, address)
}

/// `HAProxy` with its defaults, and further words about its server.
async fn haproxy(origin: SocketAddr, words: &str, lines: &str) -> (Running, SocketAddr) {
    let (dir, address) = (folder(), address());
    let text = format!(
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n\
        frontend all\n  bind {address}\n  default_backend images\n\
        backend images\n  server afterimage {origin} {words}\n{lines}"
    );
    fs::write(dir.path().join("haproxy.cfg"), text).unwrap();
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(dir.path().join("haproxy.cfg"));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    (Running::spawn(dir, command).until_it_listens(address).await, address)
}

/// Vite's development server with the short form of its proxy, which passes everything on.
async fn vite(origin: SocketAddr) -> (Running, SocketAddr) {
    let address = address();
    let mut command = Command::new("node");
    command.arg(script("vite.mjs")).arg(browser_folder());
    command.args([address.port().to_string(), format!("http://{origin}")]);
    command.stdout(Stdio::null());
    (Running::spawn(folder(), command).until_it_listens(address).await, address)
}

async fn nobody_writes_through_a_proxy_without_a_token() {
    let redis = RedisServer::start().await;
    let strict = guarded(&redis, &[TOKENS]).await;
    let made = guarded(&redis, &[]).await;
    // The rule of earlier versions, for which this shows the risk.
    let lenient = guarded(&redis, &[("writes.local", "true")]).await;
    let mut written_by_strangers = Vec::new();
    for (server, is_lenient) in [(&strict, false), (&made, false), (&lenient, true)] {
        let origin = server.address;
        let forwarder = Proxy::to(origin.port()).await;
        let fronts = [
            ("nginx", nginx(origin, "").await),
            ("nginx that keeps Host", nginx(origin, "proxy_set_header Host $host;").await),
            ("HAProxy", haproxy(origin, "", "").await),
            ("Vite", vite(origin).await),
        ];
        let forwarder = ("a TCP forwarder", forwarder.address);
        let addresses = fronts.iter().map(|(name, (_, address))| (*name, *address));
        for (name, address) in addresses.chain([forwarder]) {
            for host in [None, Some(("host", "localhost")), Some(("host", "127.0.0.1"))] {
                let headers: Vec<_> = host.into_iter().collect();
                let stored = put(address, &headers).await;
                let mut client = Client::connect(address).await;
                let removed = client.send(Method::DELETE, "/images/a", &headers, Bytes::new());
                let removed = removed.await.unwrap();
                if is_lenient {
                    if stored.status.is_success() {
                        written_by_strangers.push(name);
                    }
                    continue;
                }
                stored.problem(401, "unauthorised");
                removed.problem(401, "unauthorised");
                let listed = get(address, "/events?prefix=a", &headers).await;
                listed.problem(401, "unauthorised");
            }
        }
        // Whoever has a token writes through each of them.
        if std::ptr::eq(server, &raw const strict) {
            for (name, (_, address)) in &fronts {
                let answer = put(*address, &[BEARER]).await;
                assert!(answer.status.is_success(), "{name}: {answer:?}");
            }
        }
    }
    written_by_strangers.dedup();
    println!("with [writes] local strangers write through {written_by_strangers:?}");
    assert!(!written_by_strangers.is_empty(), "the risk that the setting names is gone");
}

/// Runs a script of attempts in a page in Chromium, and returns what each got.
async fn attempts(page: &str, attempts: Value, map: &str) -> Vec<Value> {
    let profile = tempfile::tempdir().unwrap();
    let mut command = Command::new("node");
    command.arg(script("access.mjs")).arg(browser_folder()).arg(CHROMIUM).arg(profile.path());
    command.args([page, map, &attempts.to_string()]);
    let run = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    serde_json::from_slice(&run.stdout).unwrap()
}

async fn no_page_of_another_origin_or_under_a_rebound_name_writes_or_reads() {
    let redis = RedisServer::start().await;
    // The most lenient settings, with a token and without one.
    let lenient = guarded(&redis, &[("writes.local", "true"), ("events.prefix", "open")]).await;
    let strict = guarded(&redis, &[]).await;
    for server in [&lenient, &strict] {
        let (own, port) = (format!("http://{}", server.address), server.address.port());
        let write = |base: &str| {
            json!([
                [format!("{base}/images/a"), {"method": "PUT", "image": true}],
                [format!("{base}/images"), {"method": "POST", "image": true}],
                [format!("{base}/images"), {"method": "POST", "image": true, "mode": "no-cors"}],
                [format!("{base}/images/b"), {"method": "DELETE"}],
                [format!("{base}/metrics"), {}],
                [format!("{base}/events?prefix=b"), {}],
            ])
        };
        redis.set("b", &record(&png(1, 100))).await;
        // A page of another origin: an error page of another server is enough of one.
        let site = guarded(&redis, &[]).await;
        let page = format!("http://localhost:{}/openapi.json", site.address.port());
        let told = attempts(&page, write(&own), "").await;
        for (index, told) in told.iter().enumerate() {
            // The third is sent, and its answer is hidden.
            let expected = if index == 2 { json!(0) } else { json!("TypeError: Failed to fetch") };
            assert_eq!(*told, expected, "{index}: {told}");
        }
        // A page whose name leads here by now: its requests are of the same origin.
        let rebound = format!("http://evil.example:{port}");
        let page = format!("{rebound}/openapi.json");
        let told = attempts(&page, write(&rebound), "MAP evil.example 127.0.0.1").await;
        let (refused, hidden) = if std::ptr::eq(server, &raw const lenient) {
            (json!(403), json!(421))
        } else {
            (json!(401), json!(401))
        };
        assert_eq!(told[..2], [refused.clone(), refused.clone()]);
        assert_eq!(told[3..], [refused, json!(421), hidden]);
        // Nothing was written or removed.
        let keys = redis.connect().await.keys("*").await.unwrap();
        assert_eq!(keys, ["image:b"]);
    }
}

async fn haproxy_and_nginx_tell_who_the_client_is() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let url = redis.url();
    let arguments = ["--redis-url", &url, "--log-format", "json"];
    let arguments = [&arguments[..], &["--http-trusted-proxies", r#"["127.0.0.1"]"#]].concat();
    let plain = Program::start(free_port(), &arguments, "afterimage serves").await;
    let arguments = [&arguments[..], &["--http-proxy-protocol", "true"]].concat();
    let announced = Program::start(free_port(), &arguments, "afterimage serves").await;
    let add = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;";
    for (index, (front, program)) in [
        (nginx(plain.address, add).await, &plain),
        (haproxy(plain.address, "", "  option forwardfor\n").await, &plain),
        (haproxy(announced.address, "send-proxy", "").await, &announced),
        (haproxy(announced.address, "send-proxy-v2", "").await, &announced),
    ]
    .into_iter()
    .enumerate()
    {
        // A client on another address of this machine, which names somebody else.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        let stream = socket.connect(front.1).await.unwrap();
        let mut client = Client::over(Protocol::Http1, stream, "a.example").await;
        let id = format!("front-{index}");
        let lie = ("x-forwarded-for", "192.0.2.66");
        let answer = client.get("/images/a", &[("x-request-id", &id), lie]).await;
        assert_eq!(answer.status, StatusCode::OK, "{index}");
        let told = logged(&program.log, &id).await;
        let who = if index < 2 { told["client"].clone() } else { told["peer"].clone() };
        assert!(who.as_str().unwrap().starts_with("127.0.0.9"), "{index}: {told}");
    }
}

#[tokio::test]
async fn a_health_check_asks_the_admin_listener_that_the_containers_settings_have() {
    let settings = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/container.toml");
    let (public, admin) = (address(), address());
    let dir = tempfile::tempdir().unwrap();
    let with = |command: &mut Command| {
        command.arg("--config").arg(&settings);
        command.args(["--http-listen", &public.to_string(), "--embedded-dir"]).arg(dir.path());
        command.args(["--admin-listen", &admin.to_string()]);
    };
    let mut command = program();
    with(&mut command);
    command.stdout(Stdio::null());
    let _running = Running::spawn(folder(), command).until_it_listens(admin).await;
    for path in ["/metrics", "/healthz", "/readyz"] {
        get(public, path, &[]).await.problem(404, "unknown-address");
        assert_eq!(get(admin, path, &[]).await.status, StatusCode::OK);
    }
    let mut health = program();
    health.arg("health");
    with(&mut health);
    assert!(health.output().unwrap().status.success());
    // The ports of the file itself.
    let text = fs::read_to_string(settings).unwrap();
    assert!(
        text.contains("listen = \"0.0.0.0:8000\"") && text.contains("listen = \"0.0.0.0:8001\"")
    );
}
