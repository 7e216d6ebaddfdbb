//! Large values over connections of their own, each of which one reader has at a time.
//!
//! The client that carries the other commands reads a reply into a buffer that grows by doubling, and copies the value
//! out of it. Here its length is known before its first byte, so that it is read once, into the room that it keeps, by
//! whoever waits for it. `benches/README.md` has the figures.

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{BufMut, Bytes};
use redis::io::tcp::{TcpSettings, socket2::SockRef};
use redis::{ConnectionAddr, ConnectionInfo, ErrorKind, Pipeline, RedisError};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use super::connection::{CommandFailure, Tracked, run_id_in};
use super::{StoreError, Stored};
use crate::settings;

/// Values of this many bytes are large: what is saved is worth a connection for as long as they take.
pub(super) const LARGE: u64 = 64 * 1024;

/// The longest line of a reply that is read.
const LONGEST_LINE: u64 = 4096;

/// The longest text that a server says of itself: it is ten times as long as any.
const LONGEST_INFO: usize = 64 * 1024;

/// The connections that large values come over.
#[derive(Debug)]
pub(super) struct ValuePath {
    address: Address,
    /// What is said first over a new connection.
    greeting: Pipeline,
    tracked: Arc<Tracked>,
    connect_timeout: Duration,
    response_timeout: Duration,
    /// Those that nobody reads from at the moment, with the generation that each was opened in.
    idle: Mutex<Vec<(u64, BulkConnection)>>,
    /// One permit for each of those that may exist.
    turns: Semaphore,
}

#[derive(Debug)]
enum Address {
    Tcp(String, u16, TcpSettings),
    Unix(PathBuf),
}

impl ValuePath {
    /// None where Redis is reached over TLS, which costs more than is saved here.
    pub(super) fn new(
        info: &ConnectionInfo,
        settings: &settings::RedisSettings,
        tracked: Arc<Tracked>,
    ) -> Option<ValuePath> {
        let address = match info.addr() {
            ConnectionAddr::Tcp(host, port) => {
                Address::Tcp(host.clone(), *port, info.tcp_settings().clone())
            }
            ConnectionAddr::Unix(path) => Address::Unix(path.clone()),
            _ => return None,
        };
        let (who, mut greeting) = (info.redis_settings(), redis::pipe());
        if let Some(password) = who.password() {
            greeting.cmd("AUTH").arg(who.username()).arg(password);
        }
        if who.db() != 0 {
            greeting.cmd("SELECT").arg(who.db());
        }
        Some(ValuePath {
            address,
            greeting,
            tracked,
            connect_timeout: settings.connect_timeout,
            response_timeout: settings.response_timeout,
            idle: Mutex::default(),
            turns: Semaphore::new(settings.connections.get().into()),
        })
    }

    /// A value and what is left of its life, unless it is over the limit. [`CommandFailure::NotOpened`] where
    /// this way is closed, which tries neither several addresses at once nor another login.
    pub(super) async fn get(
        &self,
        key: &str,
        limit: usize,
    ) -> Result<Option<Stored>, CommandFailure> {
        let late = Instant::now() + self.response_timeout;
        let turn = timeout_at(late, self.turns.acquire()).await;
        let Ok(Ok(_turn)) = turn else {
            return Err(CommandFailure::NotRead(StoreError::TimedOut));
        };
        let generation = self.tracked.generation();
        let idle = {
            let mut idle = self.idle();
            idle.retain(|(of, _)| *of == generation);
            idle.pop()
        };
        if let Some((_, connection)) = idle {
            let read = self.read(connection, generation, key, limit, late).await;
            if let Err(CommandFailure::Broken(_) | CommandFailure::NotRead(StoreError::TimedOut)) =
                read
            {
                // As this one the others were closed by the other side, or lead to where nobody is any more.
                self.idle().clear();
            }
            if !matches!(read, Err(CommandFailure::Broken(_))) {
                return read;
            }
        }
        let connection = timeout(self.connect_timeout, self.connect()).await;
        let timed_out = |_late| Err(io::Error::from(io::ErrorKind::TimedOut).into());
        let connection = connection.unwrap_or_else(timed_out).map_err(CommandFailure::NotOpened)?;
        let late = Instant::now() + self.response_timeout;
        self.read(connection, generation, key, limit, late).await
    }

    /// Asks for a value. The connection is kept only where everything went well: in any other case, an end of waiting
    /// among them, nobody knows what is still to come over it.
    async fn read(
        &self,
        mut connection: BulkConnection,
        generation: u64,
        key: &str,
        limit: usize,
        late: Instant,
    ) -> Result<Option<Stored>, CommandFailure> {
        let stored = timeout_at(late, connection.get(key, limit)).await;
        let stored =
            stored.unwrap_or_else(|_late| Err(CommandFailure::NotRead(StoreError::TimedOut)))?;
        self.idle().push((generation, connection));
        Ok(stored)
    }

    async fn connect(&self) -> Result<BulkConnection, RedisError> {
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
        greeting.cmd("INFO").arg("server");
        connection.0.write_all(&greeting.get_packed_pipeline()).await?;
        for _command in self.greeting.cmd_iter() {
            let line = connection.line().await?;
            error_in(&line)?;
        }
        let line = connection.line().await?;
        let info = match length_in(&line) {
            Ok(Some(length)) if length > LONGEST_INFO => return Err(unexpected()),
            Ok(Some(length)) => connection.bytes(length).await?,
            Ok(None) => Vec::new(),
            // Whoever may not ask goes on. Other errors, as that there are too many clients, are said before the end.
            Err(error) if error.code() == Some("NOPERM") => Vec::new(),
            Err(error) if error.to_string().contains("unknown command") => Vec::new(),
            Err(error) => return Err(error),
        };
        self.tracked.check(run_id_in(&String::from_utf8_lossy(&info)).as_deref())?;
        Ok(connection)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<(u64, BulkConnection)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

trait BulkIo: AsyncRead + AsyncWrite + Debug + Send + Sync + Unpin {}

impl<S: AsyncRead + AsyncWrite + Debug + Send + Sync + Unpin> BulkIo for S {}

/// A connection that waits for nothing.
#[derive(Debug)]
struct BulkConnection(BufReader<Box<dyn BulkIo>>);

impl BulkConnection {
    /// Value and remaining time in one round trip, as `RedisStore::get` asks for them.
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
        Ok(value.map(|value| Stored::of(Bytes::from(value), milliseconds)))
    }

    /// The next line, without its end.
    async fn line(&mut self) -> Result<Vec<u8>, RedisError> {
        let mut line = Vec::new();
        (&mut self.0).take(LONGEST_LINE).read_until(b'\n', &mut line).await?;
        if !line.ends_with(b"\r\n") {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        line.truncate(line.len() - 2);
        Ok(line)
    }

    /// So many bytes and the end of their line, which is left out.
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

/// How long the string is that begins with this line, if there is one.
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

/// An error that Redis says in a line.
fn error_in(line: &[u8]) -> Result<(), RedisError> {
    if line.starts_with(b"-") {
        redis::parse_redis_value(&[line, b"\r\n"].concat())?.extract_error()?;
    }
    Ok(())
}

fn unexpected() -> RedisError {
    (ErrorKind::Parse, "not a reply to this command").into()
}
