//! Afterimage, in this process or as the program in a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use afterimage::settings::{self, Settings};
use afterimage::{App, Listener, Listeners, Stop};
use bytes::Bytes;
use hyper::Method;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::client::{Answer, Client};
use super::redis::RedisServer;

/// A server in this process, started by the same function as in the program.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Address of the admin listener, if there is one.
    pub(crate) admin: SocketAddr,
    stop: Option<oneshot::Sender<Stop>>,
    running: JoinHandle<()>,
}

impl Server {
    /// Starts a server that reads from a Redis, with further settings such as `("cache.images", "3")`.
    pub(crate) async fn on(redis: &RedisServer, settings: &[(&str, &str)]) -> Server {
        let url = redis.url();
        let mut all = vec![("redis.url", url.as_str())];
        all.extend_from_slice(settings);
        Server::start(&all).await
    }

    pub(crate) async fn start(settings: &[(&str, &str)]) -> Server {
        Server::serve(App::build(load(settings)).await.unwrap())
    }

    /// Waits until the server is coherent: the store's tracking is on.
    pub(crate) async fn coherent(self) -> Server {
        super::until("the server is coherent", || async { self.coherence().await == "coherent" })
            .await;
        self
    }

    /// Returns the state of coherence that `/readyz` reports; empty if it reports none.
    pub(crate) async fn coherence(&self) -> String {
        let ready = self.get("/readyz").await;
        let body: serde_json::Value = serde_json::from_slice(&ready.body).unwrap();
        body["coherence"].as_str().unwrap_or_default().to_owned()
    }

    pub(crate) fn serve(app: Arc<App>) -> Server {
        let listeners = Listeners::bind(&app.settings).unwrap();
        let address = |listener: &Listener| listener.local_addr();
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
        let (main, admin) = (address(&listeners.main), listeners.admin.as_ref().and_then(address));
        let (stop, stopped) = oneshot::channel();
        let shutdown = async { stopped.await.unwrap_or(Stop::AtOnce) };
        let running = tokio::spawn(afterimage::serve(app, listeners, shutdown));
        Server {
            address: main.unwrap_or(nowhere),
            admin: admin.unwrap_or(nowhere),
            stop: Some(stop),
            running,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        super::get(self.address, path, &[]).await
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Answer {
        Client::connect(self.address).await.send(method, path, headers, body).await.unwrap()
    }

    /// Fetches a metric's value by its name.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        metric(&self.get("/metrics").await, name)
    }

    pub(crate) fn begin_to_stop(&mut self, stop: Stop) {
        self.stop.take().unwrap().send(stop).unwrap();
    }

    /// Stops the server gracefully, and waits until it has stopped.
    pub(crate) async fn stop(mut self) {
        self.begin_to_stop(Stop::AtOnce);
        self.ended().await;
    }

    /// Waits until the server has stopped.
    pub(crate) async fn ended(mut self) {
        (&mut self.running).await.unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// Finds a metric's value on a page of metrics.
pub(crate) fn metric(page: &Answer, name: &str) -> u64 {
    let text = std::str::from_utf8(&page.body).unwrap();
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .unwrap_or_else(|| panic!("no metric {name} in:\n{text}"))
}

/// Settings that most tests aren't about: rights, which those in `access` set back, and broken pictures, since the images of many are
/// noise behind a signature.
const OPEN: [(&str, &str); 4] = [
    ("writes.local", "true"),
    ("writes.verify", "false"),
    ("events.prefix", "open"),
    ("gallery.enabled", "false"),
];

/// Default settings with some of them overridden, as on the command line.
pub(crate) fn load(given: &[(&str, &str)]) -> Settings {
    let all = settings::described();
    let overrides: Vec<_> = [("http.listen", "127.0.0.1:0")]
        .iter()
        .chain(&OPEN)
        .chain(given)
        .map(|(key, text)| {
            let setting = all.iter().find(|setting| setting.key == *key).expect(key);
            setting.overridden(text, "test".into())
        })
        .collect();
    let mut settings = Settings::load(&overrides).unwrap();
    // Not the program of the tests.
    settings.pictures.program = env!("CARGO_BIN_EXE_afterimage").into();
    settings
}

/// The program in a process of its own, killed with the test.
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
}

/// Command that runs the program without environment variables that it would read.
pub(crate) fn program() -> Command {
    program_below(&[])
}

/// The same, started by another program and its arguments. For figures of a release build, `AFTERIMAGE_TEST_PROGRAM` is the
/// path of one.
pub(crate) fn program_below(starter: &[&str]) -> Command {
    let given = std::env::var("AFTERIMAGE_TEST_PROGRAM");
    let program = given.as_deref().unwrap_or(env!("CARGO_BIN_EXE_afterimage"));
    let words: Vec<&str> = [starter, &[program]].concat();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    for (name, _) in std::env::vars() {
        if name.starts_with("AFTERIMAGE_") || name == "PORT" || name == "REDIS_URL" {
            command.env_remove(name);
        }
    }
    for (key, text) in OPEN {
        command.env(format!("AFTERIMAGE_{}", key.replace('.', "_").to_uppercase()), text);
    }
    command
}

/// Command that runs the program with the rights of its defaults, and makes its token for Redis below a folder.
pub(crate) fn program_with_rights(runtime_dir: &Path) -> Command {
    let mut command = program();
    for (key, _) in OPEN {
        command.env_remove(format!("AFTERIMAGE_{}", key.replace('.', "_").to_uppercase()));
    }
    command.env("XDG_RUNTIME_DIR", runtime_dir);
    command
}

impl Process {
    /// Starts the program on a free port, with an embedded store in a folder.
    pub(crate) fn embedded(dir: &Path) -> Process {
        let mut command = program();
        command.arg("--embedded-dir").arg(dir);
        Process::start(command)
    }

    pub(crate) fn start(command: Command) -> Process {
        Process::listening(command, "127.0.0.1:0")
    }

    pub(crate) fn listening(mut command: Command, listen: &str) -> Process {
        let mut child =
            command.args(["--http-listen", listen]).stdout(Stdio::piped()).spawn().unwrap();
        // The first line names the address: "afterimage serves http://127.0.0.1:8000/images/{id} from …".
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut first = String::new();
        lines.read_line(&mut first).unwrap();
        let (_, url) = first.split_once("://").unwrap_or_else(|| panic!("no address in {first:?}"));
        let address = url.split('/').next().and_then(|address| address.parse().ok());
        // A Unix socket has no address.
        let address = address.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 1)));
        // The pipe is drained, so that the program never blocks on it.
        std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
        Process { child, address }
    }

    /// Kills the process (`kill -9`).
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends the process a signal, such as `TERM`.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// Resident memory in bytes (`VmRSS` of proc(5)).
    pub(crate) fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// Most resident memory so far in bytes (`VmHWM` of proc(5)).
    pub(crate) fn most_resident(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
