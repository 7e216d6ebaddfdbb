//! The program as a service of an operating system: reloads, readiness, and an upgrade on a socket that stays open.

use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use image::ImageFormat;

use crate::harness::server::{metric, program, program_below, program_with_rights};
use crate::harness::{Client, Process, RedisServer, certificates, get, png, record, until};
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test(flavor = "multi_thread")] a_reload_and_an_upgrade_refuse_and_fail_no_request
}

const PNG: (&str, &str) = ("content-type", "image/png");

/// The program with a settings file and a log that can be read.
struct Service {
    process: Process,
    dir: tempfile::TempDir,
}

impl Service {
    fn start(settings: &str) -> Service {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("my.toml"), settings).unwrap();
        let mut command = program_with_rights(&dir.path().join("run"));
        command.arg("--config").arg(dir.path().join("my.toml"));
        command.arg("--dir").arg(dir.path().join("store"));
        command.stderr(std::fs::File::create(dir.path().join("log")).unwrap());
        Service { process: Process::start(command), dir }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Changes the settings file, sends `SIGHUP`, and waits for a line of the log. Returns what was logged since.
    async fn reload(&self, settings: &str, line: &str) -> String {
        let before = self.log().len();
        std::fs::write(self.dir.path().join("my.toml"), settings).unwrap();
        self.process.signal("HUP");
        let since = || self.log()[before..].to_owned();
        until(line, || async { since().contains(line) }).await;
        since()
    }

    async fn put(&self, token: &str) -> StatusCode {
        let bearer = format!("Bearer {token}");
        let headers = [PNG, ("authorization", bearer.as_str())];
        let bytes = encoded(&picture(1, 40, 20), ImageFormat::Png);
        let mut client = Client::connect(self.process.address).await;
        client.send(Method::PUT, "/images/a", &headers, bytes.into()).await.unwrap().status
    }
}

#[tokio::test]
async fn sighup_reloads_tokens_limits_and_the_log_filter() {
    let tokens = |one: &str| format!("[writes]\ntokens = [\"{one}-0123456789abcdef\"]\n");
    let service = Service::start(&tokens("first"));
    assert_eq!(service.put("first-0123456789abcdef").await, StatusCode::CREATED);
    assert_eq!(service.put("second-0123456789abcdef").await, StatusCode::UNAUTHORIZED);

    let told = service.reload(&tokens("second"), "settings reloaded").await;
    assert!(told.contains("changed=\"writes.tokens\"") && !told.contains("0123456789"), "{told}");
    assert_eq!(service.put("second-0123456789abcdef").await, StatusCode::OK);
    assert_eq!(service.put("first-0123456789abcdef").await, StatusCode::UNAUTHORIZED);

    // A limit holds for connections that come later, and the filter for lines that come later.
    let settings = tokens("second")
        + "[limits]\nconnections = 1\nheader_bytes = \"8KiB\"\n[log]\nfilter = \"warn\"\n";
    let before = service.log().len();
    service.reload(&settings, "").await;
    let address = service.process.address;
    until("there is one place alone", || async {
        // The place of an earlier connection may not be free yet.
        let mut one = Client::connect(address).await;
        let answered = one.send(Method::GET, "/healthz", &[], Bytes::new()).await;
        let answered = answered.is_ok_and(|it| it.status == StatusCode::OK);
        let mut other = Client::connect(address).await;
        let refused = other.send(Method::GET, "/healthz", &[], Bytes::new()).await;
        answered && refused.map_or(true, |it| it.status == StatusCode::SERVICE_UNAVAILABLE)
    })
    .await;
    let long = "x".repeat(10_000);
    until("a head may be shorter", || async {
        let mut client = Client::connect(address).await;
        let answer = client.send(Method::GET, "/healthz", &[("x", &long)], Bytes::new()).await;
        answer.is_ok_and(|it| it.status.as_u16() == 431)
    })
    .await;

    // By now a line would have been written.
    let told = service.log()[before..].to_owned();
    assert!(!told.contains("reloaded"), "{told}");

    // Settings that need a restart are named at each reload; wrong ones change nothing.
    let settings = tokens("third") + "[http]\nmax_age = \"5s\"\n[cache]\nimages = 5\n";
    let told = service.reload(&settings, "need a restart").await;
    assert!(told.contains("settings=\"cache.images, http.max_age\""), "{told}");
    // A file that is just being written would leave nobody who may write.
    let told = service.reload("", "not reloaded").await;
    assert!(told.contains("[writes] must still have a token"), "{told}");
    let told = service.reload("[http]\nmax_agee = 5\n", "not reloaded").await;
    assert!(told.contains("did you mean `http.max_age`?"), "{told}");
    assert_eq!(service.put("third-0123456789abcdef").await, StatusCode::OK);
    let told = service.reload(&(tokens("third") + "[http\n"), "not reloaded").await;
    assert!(told.contains("my.toml:3: the file must be TOML"), "{told}");
    assert_eq!(service.put("third-0123456789abcdef").await, StatusCode::OK);
}

#[tokio::test]
async fn sighup_reads_a_renewed_certificate_at_once() {
    let files = certificates();
    let path = |name: &str| files.path().join(name).to_str().unwrap().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let [chain, key] = ["chain.pem", "key.pem"].map(|name| dir.path().join(name));
    let install = |name: &str| {
        std::fs::copy(path(&format!("{name}.pem")), &chain).unwrap();
        std::fs::copy(path(&format!("{name}.key")), &key).unwrap();
    };
    install("server");
    let [chain_path, key_path] = [&chain, &key].map(|it| it.to_str().unwrap());
    let settings = format!(
        "[http]\ntls_cert_file = \"{chain_path}\"\ntls_key_file = \"{key_path}\"\ntls_reload_interval = \"1day\"\n"
    );
    let service = Service::start(&settings);
    let subject = || {
        let mut command = Command::new("sh");
        let connect = format!(
            "openssl s_client -connect {} </dev/null 2>/dev/null | openssl x509 -noout -subject",
            service.process.address
        );
        String::from_utf8(command.args(["-c", &connect]).output().unwrap().stdout).unwrap()
    };
    assert!(subject().contains("server"), "{}", subject());
    install("client");
    service.reload(&settings, "certificate renewed").await;
    assert!(subject().contains("client"), "{}", subject());
}

/// Waits for a message to systemd that has a text.
fn until_told(socket: &UnixDatagram, text: &str) {
    let (mut buffer, deadline) = ([0; 4096], Instant::now() + crate::harness::PATIENCE);
    while Instant::now() < deadline {
        let length = socket.recv(&mut buffer).expect(text);
        if String::from_utf8_lossy(&buffer[..length]).lines().any(|line| line.starts_with(text)) {
            return;
        }
    }
    panic!("systemd was not told {text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_of_readiness_reloads_life_and_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
    let mut command = program();
    command.arg("--dir").arg(dir.path().join("store"));
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "20000");
    let mut process = Process::start(command);
    until_told(&socket, "READY=1");
    until_told(&socket, "WATCHDOG=1");
    process.signal("HUP");
    until_told(&socket, "RELOADING=1");
    until_told(&socket, "READY=1");
    process.signal("INT");
    until_told(&socket, "STOPPING=1");
    assert!(process.child.wait().unwrap().success());
}

/// Starts the program on a socket that this process keeps open, as systemd does (`LISTEN_FDS`).
fn on_socket(listener: &TcpListener, redis: &RedisServer, runtime: &Path) -> Child {
    // The third descriptor is the socket, and the process id is that of the program.
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" 3<&0 0</dev/null";
    let mut command = program_below(&["bash", "-c", script]);
    command.env("REDIS_URL", redis.url()).env("XDG_RUNTIME_DIR", runtime);
    command.stdin(OwnedFd::from(listener.try_clone().unwrap()));
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut first = String::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    lines.read_line(&mut first).unwrap();
    assert!(first.starts_with("afterimage serves "), "{first}");
    std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
    child
}

/// Requests at a steady rate, half of them on connections of their own.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    failed: Arc<AtomicUsize>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    const CLIENTS: usize = 20;
    const INTERVAL: Duration = Duration::from_millis(20);

    fn start(address: SocketAddr) -> Load {
        let (stop, answered, failed) = (Arc::default(), Arc::default(), Arc::default());
        let clients = (0..Load::CLIENTS).map(|number| {
            let (stop, answered, failed): (Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>) =
                (Arc::clone(&stop), Arc::clone(&answered), Arc::clone(&failed));
            tokio::spawn(async move {
                let mut ticks = tokio::time::interval(Load::INTERVAL);
                let mut kept: Option<Client> = None;
                while !stop.load(Ordering::Relaxed) {
                    ticks.tick().await;
                    let mut client = match kept.take() {
                        Some(client) => client,
                        None => Client::connect(address).await,
                    };
                    match client.send(Method::GET, "/images/a", &[], Bytes::new()).await {
                        Ok(answer) if answer.status == StatusCode::OK => {
                            answered.fetch_add(1, Ordering::Relaxed);
                            let is_last = answer.header("connection") == "close";
                            kept = (number % 2 == 0 && !is_last).then_some(client);
                        }
                        other => {
                            println!("failed: {other:?}");
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            })
        });
        let clients = clients.collect();
        Load { stop, answered, failed, clients }
    }

    /// Waits for some further answers.
    async fn answers(&self, more: usize) {
        let before = self.answered.load(Ordering::Relaxed);
        until("requests are answered", || async {
            self.answered.load(Ordering::Relaxed) >= before + more
        })
        .await;
    }
}

async fn a_reload_and_an_upgrade_refuse_and_fail_no_request() {
    let (redis, runtime) = (RedisServer::start().await, tempfile::tempdir().unwrap());
    redis.set("a", &record(&png(1, 10_000))).await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut old = on_socket(&listener, &redis, runtime.path());
    let began = Instant::now();
    let load = Load::start(address);
    load.answers(500).await;
    for _ in 0..3 {
        signal(&old, "HUP");
        load.answers(300).await;
    }
    // As `systemctl restart` does: the old one ends, then the new one starts. The socket stays open.
    signal(&old, "TERM");
    assert!(tokio::task::spawn_blocking(move || old.wait()).await.unwrap().unwrap().success());
    let mut new = on_socket(&listener, &redis, runtime.path());
    load.answers(1000).await;
    load.stop.store(true, Ordering::Relaxed);
    for client in load.clients {
        client.await.unwrap();
    }
    let answered = load.answered.load(Ordering::Relaxed);
    println!("{answered} requests answered in {:?}", began.elapsed());
    assert_eq!(load.failed.load(Ordering::Relaxed), 0);
    until("every other connection is closed", || async {
        metric(&get(address, "/metrics", &[]).await, "afterimage_connections") == 1
    })
    .await;
    new.kill().unwrap();
    new.wait().unwrap();
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
}
