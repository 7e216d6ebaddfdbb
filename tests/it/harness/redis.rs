//! A real redis-server on a free port.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use redis::AsyncTypedCommands;
use redis::aio::MultiplexedConnection;

use super::until;

/// A server that is stopped with the test, by its own process id.
pub(crate) struct RedisServer {
    child: Child,
    pub(crate) port: u16,
    pub(crate) dir: tempfile::TempDir,
    arguments: Vec<String>,
}

impl RedisServer {
    pub(crate) async fn start() -> RedisServer {
        RedisServer::start_with(&[]).await
    }

    /// Starts with further directives, `--name value …`.
    pub(crate) async fn start_with(arguments: &[&str]) -> RedisServer {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let arguments: Vec<String> = arguments.iter().map(|&text| text.into()).collect();
        let child = spawn(port, dir.path(), &arguments);
        let server = RedisServer { child, port, dir, arguments };
        server.until_ready().await;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// A connection for the test itself.
    pub(crate) async fn connect(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.url()).unwrap();
        let config = redis::AsyncConnectionConfig::new()
            .set_response_timeout(Some(std::time::Duration::from_secs(30)));
        client.get_multiplexed_async_connection_with_config(&config).await.unwrap()
    }

    pub(crate) async fn set(&self, id: &str, value: &[u8]) {
        self.connect().await.set(format!("image:{id}"), value).await.unwrap();
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again on the same port, with what it saved.
    pub(crate) async fn restart(&mut self) {
        self.child = spawn(self.port, self.dir.path(), &self.arguments);
        self.until_ready().await;
    }

    /// Sends it a signal, such as `STOP` or `CONT`.
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    async fn until_ready(&self) {
        let socket = self.socket();
        until("redis-server answers", || async {
            let client = redis::Client::open(format!("redis+unix://{}", socket.display())).unwrap();
            match client.get_multiplexed_async_connection().await {
                Ok(_) => true,
                // A password that isn't known here is an answer as well.
                Err(error) => error.to_string().contains("NOAUTH"),
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

fn spawn(port: u16, dir: &Path, arguments: &[String]) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
        .arg(dir)
        .args(["--unixsocket", "redis.sock", "--logfile", "redis.log"])
        .args(arguments)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server is needed: apt-get install redis-server")
}

/// A port that nobody listens on at this moment.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
