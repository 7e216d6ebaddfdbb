//! Connections to Redis for commands and replies, which reconnect when they break.
//!
//! The client's own `ConnectionManager` gives up after a connect that failed by anything but I/O: a password that was
//! wrong for a moment would be wrong until a restart.

use std::num::NonZeroU8;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult,
    ServerErrorKind,
};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::StoreError;
use super::connector::Connector;
use super::server::{CurrentServer, ServerInfo, is_full};
use super::standing::GIVEN_UP;
use crate::coalesce::Flight;

/// A shared attempt to connect, and its result.
type Opening = Arc<Flight<RedisResult<MultiplexedConnection>>>;

/// Connections for commands and replies.
#[derive(Debug)]
pub(super) struct DataConnections {
    connections: Vec<SharedConnection>,
    /// Connection that is considered first, so that all of them are used.
    turn: AtomicUsize,
    /// The server that data and pushes come from.
    pub(super) current: Arc<CurrentServer>,
    /// Idle exclusive connections, each with the generation in which it was opened.
    idle: Mutex<Vec<(u64, MultiplexedConnection)>>,
    /// One permit for each exclusive connection.
    exclusive: Semaphore,
    connector: Connector,
    config: AsyncConnectionConfig,
}

/// A connection with one user, whose commands may depend on earlier ones (`WATCH`): it never reconnects. Dropped without
/// [`ExclusiveConnection::give_back`] it is closed, since its state is unknown.
pub(super) struct ExclusiveConnection<'a> {
    pool: &'a DataConnections,
    generation: u64,
    connection: MultiplexedConnection,
    _permit: SemaphorePermit<'a>,
}

impl ExclusiveConnection<'_> {
    /// Sends commands and reads their replies.
    pub(super) async fn query<T: FromRedisValue>(
        &mut self,
        commands: &Pipeline,
    ) -> Result<T, StoreError> {
        tokio::select! {
            biased;
            () = self.pool.current.left(self.generation) => Err(given_up()),
            replies = commands.query_async(&mut self.connection) => {
                replies.map_err(|error| self.pool.current.failed(self.generation, error).into())
            }
        }
    }

    /// Returns the connection to the pool. Nothing that was sent over it may have an effect on later commands.
    pub(super) fn give_back(self) {
        let mut idle = self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push((self.generation, self.connection));
    }
}

impl DataConnections {
    /// Prepares `count` connections; each connects when it is first needed.
    pub(super) fn new(
        count: NonZeroU8,
        connector: &Connector,
        config: &AsyncConnectionConfig,
    ) -> DataConnections {
        let current = Arc::new(CurrentServer::default());
        let connections = (0..count.get())
            .map(|_| SharedConnection::new(connector.clone(), config.clone(), Arc::clone(&current)))
            .collect();
        DataConnections {
            connections,
            turn: AtomicUsize::new(0),
            current,
            idle: Mutex::default(),
            exclusive: Semaphore::new(count.get().into()),
            connector: connector.clone(),
            config: config.clone(),
        }
    }

    /// Takes a connection for exclusive use. There are as many of these as there are shared ones.
    pub(super) async fn exclusive(&self) -> Result<ExclusiveConnection<'_>, StoreError> {
        let closed = |_closed| StoreError::unreachable("the store is being closed");
        let permit = self.exclusive.acquire().await.map_err(closed)?;
        let generation = self.current.generation();
        let idle = || {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.retain(|(of, _)| *of == generation);
            idle.pop()
        };
        while let Some((_, mut connection)) = idle() {
            // Redis may have closed it meanwhile.
            if redis::cmd("PING").exec_async(&mut connection).await.is_ok() {
                return Ok(ExclusiveConnection {
                    pool: self,
                    generation,
                    connection,
                    _permit: permit,
                });
            }
        }
        let (connector, config) = (self.connector.clone(), self.config.clone());
        let opening =
            SharedConnection::new(connector, config, Arc::clone(&self.current)).opening(generation);
        let connection = opened(&opening).await?;
        Ok(ExclusiveConnection { pool: self, generation, connection, _permit: permit })
    }

    /// Opens a new connection to see where the address leads.
    pub(super) async fn look(&self) -> RedisResult<(MultiplexedConnection, ServerInfo)> {
        open(&self.connector, &self.config).await
    }

    /// Sends commands over the connection with the fewest pending ones: a reply of a megabyte holds up those behind it.
    pub(super) async fn query<T: FromRedisValue>(
        &self,
        commands: &Pipeline,
        retry: Retry,
    ) -> Result<T, StoreError> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let (before, from_turn) = self.connections.split_at(turn);
        let connection = from_turn
            .iter()
            .chain(before)
            .min_by_key(|connection| connection.pending())
            .expect("[redis] connections is at least 1");
        connection.query(commands, retry).await
    }
}

/// A connection that is closed, being opened or open, and the number of its pending commands.
#[derive(Debug)]
struct SharedConnection {
    connector: Connector,
    config: AsyncConnectionConfig,
    current: Arc<CurrentServer>,
    /// `None` while it is closed. Commands that need it while it is being opened share that attempt and its failure.
    opening: Arc<Mutex<Option<(u64, Opening)>>>,
    pending: AtomicUsize,
}

/// Rule for commands whose connection broke before the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// Sends them again: they only read.
    Once,
    /// Doesn't send them again: they write, and may have been executed.
    Never,
}

impl SharedConnection {
    /// Prepares a connection, which connects when it is first needed.
    fn new(
        connector: Connector,
        config: AsyncConnectionConfig,
        current: Arc<CurrentServer>,
    ) -> SharedConnection {
        let (opening, pending) = (Arc::default(), AtomicUsize::new(0));
        SharedConnection { connector, config, current, opening, pending }
    }

    /// Number of commands that wait for a reply.
    fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }

    /// Sends commands and reads their replies. A connection that Redis closed while it was idle is noticed only here, so
    /// commands that may be repeated are sent again over a new one.
    async fn query<T: FromRedisValue>(
        &self,
        commands: &Pipeline,
        retry: Retry,
    ) -> Result<T, StoreError> {
        let _pending = PendingCommand::on(&self.pending);
        let mut broken = false;
        loop {
            let generation = self.current.generation();
            let opening = self.opening(generation);
            let mut connection = tokio::select! {
                // First: nothing that a connection of an earlier generation still says may be used.
                biased;
                () = self.current.left(generation) => continue,
                connection = opened(&opening) => connection?,
            };
            let mut unanswered = Unanswered::new(&self.opening, &opening);
            let replies = tokio::select! {
                biased;
                () = self.current.left(generation) => match retry {
                    Retry::Once => continue,
                    Retry::Never => return Err(given_up()),
                },
                replies = commands.query_async(&mut connection) => replies,
            };
            unanswered.is_answered = true;
            let error = match replies {
                Ok(replies) => return Ok(replies),
                Err(error) => error,
            };
            // After a timeout too: the peer may acknowledge for ever and never answer. The next command takes a new
            // connection.
            if error.is_timeout() || error.is_unrecoverable_error() {
                forget(&self.opening, &opening);
            }
            match self.current.failed(generation, error) {
                CommandFailure::Broken(_) if !broken && retry == Retry::Once => broken = true,
                failure => return Err(failure.into()),
            }
        }
    }

    /// Returns the attempt of this generation, pending or complete, or begins one.
    fn opening(&self, generation: u64) -> Opening {
        let mut slot = lock(&self.opening);
        if let Some((of, opening)) = &*slot
            && *of == generation
        {
            return Arc::clone(opening);
        }
        let (opening, completion) = Flight::new();
        *slot = Some((generation, Arc::clone(&opening)));
        let (connector, config, current) =
            (self.connector.clone(), self.config.clone(), Arc::clone(&self.current));
        let (slot, mine) = (Arc::clone(&self.opening), Arc::clone(&opening));
        // Ends by itself, within the time-outs to connect and to answer.
        tokio::spawn(async move {
            let opened = open(&connector, &config).await.and_then(|(connection, server)| {
                current.check(generation, &server)?;
                Ok(connection)
            });
            if opened.is_err() {
                forget(&slot, &mine);
            }
            completion.complete(opened);
        });
        opening
    }
}

/// Opens a connection, and asks what it leads to.
async fn open(
    connector: &Connector,
    config: &AsyncConnectionConfig,
) -> RedisResult<(MultiplexedConnection, ServerInfo)> {
    let mut connection = connector.connect(config).await?;
    let server = ServerInfo::ask(&mut connection).await?;
    Ok((connection, server))
}

/// The failure of a write whose generation ended before the reply.
pub(super) fn given_up() -> StoreError {
    StoreError::unreachable(
        "the connection was given up before the reply; the write may have been made",
    )
}

async fn opened(opening: &Opening) -> Result<MultiplexedConnection, CommandFailure> {
    match opening.outcome().await {
        Ok(connection) => connection.map_err(CommandFailure::NotOpened),
        Err(lost) => {
            Err(CommandFailure::NotOpened((ErrorKind::Client, "", lost.to_string()).into()))
        }
    }
}

/// Closes the connection, unless it has been opened again since.
fn forget(slot: &Mutex<Option<(u64, Opening)>>, opening: &Opening) {
    let mut slot = lock(slot);
    if slot.as_ref().is_some_and(|(_, it)| Arc::ptr_eq(it, opening)) {
        *slot = None;
    }
}

/// Guard that closes a connection if nobody waits for its reply any more after [`GIVEN_UP`]. A caller's deadline may come
/// before the client's time-out, and then nothing else would tell that the connection is dead.
struct Unanswered<'a> {
    slot: &'a Mutex<Option<(u64, Opening)>>,
    opening: &'a Opening,
    since: Instant,
    is_answered: bool,
}

impl<'a> Unanswered<'a> {
    fn new(slot: &'a Mutex<Option<(u64, Opening)>>, opening: &'a Opening) -> Unanswered<'a> {
        Unanswered { slot, opening, since: Instant::now(), is_answered: false }
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.is_answered && self.since.elapsed() >= GIVEN_UP {
            forget(self.slot, self.opening);
        }
    }
}

type Slot<'a> = MutexGuard<'a, Option<(u64, Opening)>>;

fn lock(slot: &Mutex<Option<(u64, Opening)>>) -> Slot<'_> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Failure of commands, by the progress that they made.
#[derive(Debug)]
pub(super) enum CommandFailure {
    /// No connection could be opened.
    NotOpened(RedisError),
    /// The connection broke before the reply.
    Broken(RedisError),
    /// Redis answered with an error, or not in time.
    Answered(RedisError),
    /// The reply was not awaited, or not read.
    NotRead(StoreError),
}

impl CommandFailure {
    /// Classifies the failure of commands that were sent.
    pub(super) fn after_sending(error: RedisError) -> CommandFailure {
        if error.is_unrecoverable_error() && !error.is_timeout() {
            CommandFailure::Broken(error)
        } else {
            CommandFailure::Answered(error)
        }
    }
}

/// True if a write was refused because the server is a replica.
pub(super) fn is_read_only(error: &RedisError) -> bool {
    error.to_string().contains("READONLY")
}

impl From<CommandFailure> for StoreError {
    fn from(failure: CommandFailure) -> StoreError {
        match failure {
            CommandFailure::NotRead(error) => error,
            CommandFailure::NotOpened(error) | CommandFailure::Answered(error)
                if error.code() == Some("NOPERM") =>
            {
                StoreError::forbidden(error)
            }
            CommandFailure::NotOpened(error) | CommandFailure::Answered(error)
                if is_full(&error) || error.code() == Some("BUSY") =>
            {
                StoreError::unreachable(error)
            }
            CommandFailure::NotOpened(error) if matches!(error.kind(), ErrorKind::Server(_)) => {
                StoreError::refused(error)
            }
            CommandFailure::NotOpened(error) | CommandFailure::Broken(error) => {
                StoreError::unreachable(error)
            }
            CommandFailure::Answered(error) if error.is_timeout() => StoreError::TimedOut,
            CommandFailure::Answered(error) if error.code() == Some("WRONGTYPE") => {
                StoreError::WrongType
            }
            // In a transaction the code is inside the text of EXEC's own error.
            CommandFailure::Answered(error) if error.to_string().contains("WRONGTYPE") => {
                StoreError::WrongType
            }
            CommandFailure::Answered(error) if is_read_only(&error) => {
                StoreError::unreachable(error)
            }
            CommandFailure::Answered(error) => match error.kind() {
                ErrorKind::Server(
                    ServerErrorKind::BusyLoading
                    | ServerErrorKind::MasterDown
                    | ServerErrorKind::ClusterDown
                    | ServerErrorKind::TryAgain,
                ) => StoreError::unreachable(error),
                _ => StoreError::refused(error),
            },
        }
    }
}

/// Guard that counts a command as pending until it is dropped, cancelled or not.
struct PendingCommand<'a>(&'a AtomicUsize);

impl<'a> PendingCommand<'a> {
    fn on(count: &'a AtomicUsize) -> PendingCommand<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        PendingCommand(count)
    }
}

impl Drop for PendingCommand<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
