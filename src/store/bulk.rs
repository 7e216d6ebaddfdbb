//! Large values, over connections that have one reader or writer at a time.
//!
//! The client for the other commands reads a reply into a buffer that grows by doubling, and copies the value out of it.
//! Here the length is known before the first byte, so the value is read once, into its final buffer, by the task that
//! awaits it. `benches/README.md` has the figures. A value that is written is sent from where it is: the other client makes
//! three copies of it.

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{BufMut, Bytes};
use redis::io::tcp::{TcpSettings, socket2::SockRef};
use redis::{ConnectionAddr, ConnectionInfo, ErrorKind, Pipeline, RedisError};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::{CommandFailure, given_up};
use super::server::{CurrentServer, ServerInfo, is_refusal};
use super::{StoreError, Stored};
use crate::settings;

/// Smallest value, in bytes, for which the saved copy is worth a connection of its own.
pub(super) const LARGE: u64 = 64 * 1024;

/// Longest line of a reply that is accepted.
const MAX_LINE: u64 = 4096;

/// Longest reply to one of the questions about the server that is accepted: ten times the usual.
const MAX_INFO: usize = 64 * 1024;

/// Connections for large values.
#[derive(Debug)]
pub(super) struct BulkConnections {
    address: Address,
    /// First commands on a new connection: login and database.
    greeting: Pipeline,
    current: Arc<CurrentServer>,
    connect_timeout: Duration,
    response_timeout: Duration,
    /// The generation in which the user turned out not to be allowed to run `INFO`.
    without_info: Mutex<Option<u64>>,
    /// Idle connections, each with the generation in which it was opened.
    idle: Mutex<Vec<(u64, BulkConnection)>>,
    /// One permit for each connection.
    permits: Semaphore,
}

#[derive(Debug)]
enum Address {
    Tcp(String, u16, TcpSettings),
    Unix(PathBuf),
}

impl BulkConnections {
    /// Prepares the connections; `None` if Redis is reached over TLS, which costs more than is saved here.
    pub(super) fn new(
        info: &ConnectionInfo,
        settings: &settings::RedisSettings,
        current: Arc<CurrentServer>,
    ) -> Option<BulkConnections> {
        let address = match info.addr() {
            ConnectionAddr::Tcp(host, port) => {
                Address::Tcp(host.clone(), *port, info.tcp_settings().clone())
            }
            ConnectionAddr::Unix(path) => Address::Unix(path.clone()),
            _ => return None,
        };
        let (login, mut greeting) = (info.redis_settings(), redis::pipe());
        if let Some(password) = login.password() {
            greeting.cmd("AUTH").arg(login.username()).arg(password);
        }
        if login.db() != 0 {
            greeting.cmd("SELECT").arg(login.db());
        }
        Some(BulkConnections {
            address,
            greeting,
            current,
            without_info: Mutex::default(),
            connect_timeout: settings.connect_timeout,
            response_timeout: settings.response_timeout,
            idle: Mutex::default(),
            permits: Semaphore::new(settings.connections.get().into()),
        })
    }

    /// Gets a value and its remaining time, unless the value is over the limit. [`CommandFailure::NotOpened`] sends the
    /// caller to the other connections: this one tries neither several addresses at once nor another login.
    pub(super) async fn get(
        &self,
        key: &str,
        limit: usize,
    ) -> Result<Option<Stored>, CommandFailure> {
        let deadline = Instant::now() + self.response_timeout;
        let _permit = self.permit(deadline).await?;
        loop {
            let generation = self.current.generation();
            tokio::select! {
                // First: nothing that a connection of an earlier generation still says may be used.
                biased;
                () = self.current.left(generation) => {}
                read = self.get_in(generation, key, limit, deadline) => return read,
            }
        }
    }

    /// Waits for a connection's permit.
    async fn permit(&self, deadline: Instant) -> Result<SemaphorePermit<'_>, CommandFailure> {
        match timeout_at(deadline, self.permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(CommandFailure::NotRead(StoreError::TimedOut)),
        }
    }

    /// Writes a value, with further arguments of `SET`, in a transaction that tells what was there before. It is never sent
    /// twice. [`CommandFailure::NotOpened`] sends the caller to the other connections.
    pub(super) async fn put(
        &self,
        key: &str,
        value: &Bytes,
        arguments: &[String],
    ) -> Result<BulkWritten, CommandFailure> {
        let deadline = Instant::now() + self.response_timeout;
        let _permit = self.permit(deadline).await?;
        loop {
            let generation = self.current.generation();
            let mut connection = tokio::select! {
                biased;
                () = self.current.left(generation) => continue,
                connection = self.open(generation) => connection?,
            };
            let written = tokio::select! {
                biased;
                () = self.current.left(generation) => {
                    return Err(CommandFailure::NotRead(given_up()));
                }
                written = timeout_at(deadline, connection.put(key, value, arguments)) => written,
            };
            let Ok(written) = written else {
                return Err(CommandFailure::NotRead(StoreError::TimedOut));
            };
            let written = written.map_err(|error| self.current.failed(generation, error))?;
            self.idle().push((generation, connection));
            return Ok(written);
        }
    }

    /// An idle connection that still answers, or a new one.
    async fn open(&self, generation: u64) -> Result<BulkConnection, CommandFailure> {
        if let Some(mut connection) = self.take_idle(generation) {
            let answered = timeout(self.connect_timeout, connection.ping()).await;
            if matches!(answered, Ok(Ok(()))) {
                return Ok(connection);
            }
            self.idle().clear();
        }
        self.connect_in_time(generation).await
    }

    fn take_idle(&self, generation: u64) -> Option<BulkConnection> {
        let mut idle = self.idle();
        idle.retain(|(of, _)| *of == generation);
        idle.pop().map(|(_, connection)| connection)
    }

    async fn connect_in_time(&self, generation: u64) -> Result<BulkConnection, CommandFailure> {
        if *self.without_info() == Some(generation) {
            return Err(CommandFailure::NotOpened(unexpected()));
        }
        let connection = timeout(self.connect_timeout, self.connect(generation)).await;
        let timed_out = |_elapsed| Err(io::Error::from(io::ErrorKind::TimedOut).into());
        connection.unwrap_or_else(timed_out).map_err(CommandFailure::NotOpened)
    }

    async fn get_in(
        &self,
        generation: u64,
        key: &str,
        limit: usize,
        deadline: Instant,
    ) -> Result<Option<Stored>, CommandFailure> {
        if let Some(connection) = self.take_idle(generation) {
            let read = self.read(connection, generation, key, limit, deadline).await;
            if let Err(CommandFailure::Broken(_) | CommandFailure::NotRead(StoreError::TimedOut)) =
                read
            {
                // Like this connection, the others were closed by Redis or lead to a machine that is gone.
                self.idle().clear();
            }
            if !matches!(read, Err(CommandFailure::Broken(_))) {
                return read;
            }
        }
        let connection = self.connect_in_time(generation).await?;
        self.read(connection, generation, key, limit, deadline).await
    }

    /// Reads a value. The connection is kept only after success: in any other case, cancellation included, it isn't known
    /// which bytes are still to come.
    async fn read(
        &self,
        mut connection: BulkConnection,
        generation: u64,
        key: &str,
        limit: usize,
        deadline: Instant,
    ) -> Result<Option<Stored>, CommandFailure> {
        let stored = timeout_at(deadline, connection.get(key, limit)).await;
        let stored =
            stored.unwrap_or_else(|_elapsed| Err(CommandFailure::NotRead(StoreError::TimedOut)))?;
        self.idle().push((generation, connection));
        Ok(stored)
    }

    async fn connect(&self, generation: u64) -> Result<BulkConnection, RedisError> {
        let socket: Box<dyn BulkIo> = match &self.address {
            Address::Tcp(host, port, settings) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                let socket = SockRef::from(&stream);
                socket.set_tcp_nodelay(settings.nodelay())?;
                if let Some(keepalive) = settings.keepalive() {
                    socket.set_tcp_keepalive(keepalive)?;
                }
                socket.set_tcp_user_timeout(settings.user_timeout())?;
                Box::new(stream)
            }
            Address::Unix(path) => Box::new(UnixStream::connect(path).await?),
        };
        let mut connection = BulkConnection(BufReader::new(socket));
        let mut greeting = self.greeting.clone();
        greeting.cmd("INFO").arg("server").cmd("INFO").arg("replication");
        connection.0.write_all(&greeting.get_packed_pipeline()).await?;
        for _command in self.greeting.cmd_iter() {
            let line = connection.line().await?;
            error_in(&line)?;
        }
        // Without INFO the other connections serve: they can also tell the server by CLIENT INFO.
        let mut info = Vec::new();
        for _section in 0..2 {
            match length_in(&connection.line().await?) {
                Ok(Some(length)) if length <= MAX_INFO => {
                    info.extend(connection.bytes(length).await?);
                }
                Err(error) if is_refusal(&error) => {
                    *self.without_info() = Some(generation);
                    return Err(error);
                }
                Err(error) => return Err(error),
                Ok(_) => return Err(unexpected()),
            }
        }
        let server = ServerInfo::from_text(&String::from_utf8_lossy(&info));
        if !server.is_identified() {
            *self.without_info() = Some(generation);
            return Err(unexpected());
        }
        self.current.check(generation, &server)?;
        Ok(connection)
    }

    fn without_info(&self) -> MutexGuard<'_, Option<u64>> {
        self.without_info.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(u64, BulkConnection)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

trait BulkIo: AsyncRead + AsyncWrite + Debug + Send + Sync + Unpin {}

impl<S: AsyncRead + AsyncWrite + Debug + Send + Sync + Unpin> BulkIo for S {}

/// A connection with no reply outstanding.
#[derive(Debug)]
struct BulkConnection(BufReader<Box<dyn BulkIo>>);

/// The result of a write that Redis answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BulkWritten {
    /// There was a value before.
    pub(super) existed: bool,
    /// The value was written: its `NX` or `XX` held.
    pub(super) done: bool,
}

impl BulkConnection {
    async fn ping(&mut self) -> Result<(), RedisError> {
        self.0.write_all(&redis::cmd("PING").get_packed_command()).await?;
        if self.line().await? == b"+PONG" { Ok(()) } else { Err(unexpected()) }
    }

    /// Writes a value, as `RedisStore::put` does.
    async fn put(
        &mut self,
        key: &str,
        value: &[u8],
        arguments: &[String],
    ) -> Result<BulkWritten, RedisError> {
        let mut before = redis::pipe();
        before.cmd("MULTI").cmd("EXISTS").arg(key);
        let mut before = before.get_packed_pipeline();
        before.extend_from_slice(format!("*{}\r\n", 3 + arguments.len()).as_bytes());
        for argument in ["SET", key] {
            before.extend_from_slice(format!("${}\r\n{argument}\r\n", argument.len()).as_bytes());
        }
        before.extend_from_slice(format!("${}\r\n", value.len()).as_bytes());
        let mut after = b"\r\n".to_vec();
        for argument in arguments {
            after.extend_from_slice(format!("${}\r\n{argument}\r\n", argument.len()).as_bytes());
        }
        after.extend_from_slice(&redis::cmd("EXEC").get_packed_command());
        for part in [&before, value, &after] {
            self.0.write_all(part).await?;
        }
        // MULTI, EXISTS and SET are answered one by one, then all of them together. An error of one says more than that of
        // EXEC, which follows it.
        for _command in 0..3 {
            error_in(&self.line().await?)?;
        }
        let line = self.line().await?;
        error_in(&line)?;
        if line != b"*2" {
            return Err(unexpected());
        }
        let existed = integer_in(&self.line().await?)? > 0;
        let line = self.line().await?;
        error_in(&line)?;
        match &*line {
            b"+OK" => Ok(BulkWritten { existed, done: true }),
            b"$-1" | b"_" => Ok(BulkWritten { existed, done: false }),
            _ => Err(unexpected()),
        }
    }

    /// Gets value and remaining time in one round trip, as `RedisStore::get` does.
    async fn get(&mut self, key: &str, limit: usize) -> Result<Option<Stored>, CommandFailure> {
        let mut commands = redis::pipe();
        commands.cmd("GET").arg(key).cmd("PTTL").arg(key);
        let sent = self.0.write_all(&commands.get_packed_pipeline()).await;
        sent.map_err(|error| CommandFailure::Broken(error.into()))?;
        let line = self.line().await.map_err(CommandFailure::Broken)?;
        let value = match length_in(&line).map_err(CommandFailure::after_sending)? {
            Some(size) if size > limit => {
                let size = size as u64;
                return Err(CommandFailure::NotRead(StoreError::TooLarge { size, limit }));
            }
            Some(size) => Some(self.bytes(size).await.map_err(CommandFailure::Broken)?),
            None => None,
        };
        let line = self.line().await.map_err(CommandFailure::Broken)?;
        let milliseconds = integer_in(&line).map_err(CommandFailure::after_sending)?;
        Ok(value.map(|value| Stored::with_pttl(Bytes::from(value), milliseconds)))
    }

    /// Reads the next line and strips its end.
    async fn line(&mut self) -> Result<Vec<u8>, RedisError> {
        let mut line = Vec::new();
        (&mut self.0).take(MAX_LINE).read_until(b'\n', &mut line).await?;
        if !line.ends_with(b"\r\n") {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        line.truncate(line.len() - 2);
        Ok(line)
    }

    /// Reads `length` bytes and the line end behind them, which is stripped.
    async fn bytes(&mut self, length: usize) -> Result<Vec<u8>, RedisError> {
        let all = length + 2;
        let mut bytes = Vec::with_capacity(all);
        while bytes.len() < all {
            let left = all - bytes.len();
            if self.0.read_buf(&mut (&mut bytes).limit(left)).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
        bytes.truncate(length);
        Ok(bytes)
    }
}

/// Parses the length of a bulk string; `None` for nil.
fn length_in(line: &[u8]) -> Result<Option<usize>, RedisError> {
    match line.strip_prefix(b"$") {
        Some(b"-1") => Ok(None),
        Some(digits) => number(digits).map(Some),
        None => Err(error_in(line).err().unwrap_or_else(unexpected)),
    }
}

fn integer_in(line: &[u8]) -> Result<i64, RedisError> {
    match line.strip_prefix(b":") {
        Some(digits) => number(digits),
        None => Err(error_in(line).err().unwrap_or_else(unexpected)),
    }
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Result<T, RedisError> {
    std::str::from_utf8(digits).ok().and_then(|it| it.parse().ok()).ok_or_else(unexpected)
}

/// Parses an error reply, if the line is one.
fn error_in(line: &[u8]) -> Result<(), RedisError> {
    if line.starts_with(b"-") {
        redis::parse_redis_value(&[line, b"\r\n"].concat())?.extract_error()?;
    }
    Ok(())
}

fn unexpected() -> RedisError {
    (ErrorKind::Parse, "not a reply to this command").into()
}
