//! The connections to Redis that carry commands and replies, and are made anew when they break.
//!
//! The client's own `ConnectionManager` never tries again after a connect that failed by anything but I/O: a
//! password that was wrong for a moment would be wrong until a restart.

use std::num::NonZeroU8;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult,
    ServerErrorKind,
};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};

use super::StoreError;
use crate::coalesce::Flight;

/// Lands with the connection, which is open from then on.
type Opening = Arc<Flight<RedisResult<MultiplexedConnection>>>;

/// Which server tells of changes. Data has to come from that very server: an address may lead to another one
/// tomorrow, after a failover, while connections to the old one go on.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    /// Grows with each tracking connection. A data connection that was opened before the present one is not
    /// used any more.
    generation: AtomicU64,
    /// The `run_id` of the server, where it may be known.
    run_id: Mutex<Option<String>>,
    /// Rung when a data connection leads to another server.
    pub(super) elsewhere: Notify,
}

impl Tracked {
    /// A new tracking connection is about to be relied upon.
    pub(super) fn renew(&self, run_id: Option<String>) {
        *self.run_id.lock().unwrap_or_else(PoisonError::into_inner) = run_id;
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Nobody tells of changes for now, so data may come from anywhere.
    pub(super) fn end(&self) {
        *self.run_id.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Which tracking connection is relied upon. What is opened now is of this generation.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Looks whether a new data connection leads to the server that is tracked. To be asked before the first reply could
    /// be taken for one of that server.
    pub(super) fn check(&self, run_id: Option<&str>) -> RedisResult<()> {
        let tracked = self.run_id.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(tracked), Some(run_id)) = (tracked.as_deref(), run_id)
            && tracked != run_id
        {
            self.elsewhere.notify_one();
            return Err((ErrorKind::Io, "the address leads to another server now").into());
        }
        Ok(())
    }
}

/// What a server calls itself since its start (`INFO server`), where that may be asked.
pub(super) async fn run_id(connection: &mut MultiplexedConnection) -> Option<String> {
    let info: String = redis::cmd("INFO").arg("server").query_async(connection).await.ok()?;
    run_id_in(&info)
}

pub(super) fn run_id_in(info: &str) -> Option<String> {
    info.lines().find_map(|line| line.strip_prefix("run_id:")).map(str::to_owned)
}

/// The connections that carry data.
#[derive(Debug)]
pub(super) struct DataPath {
    connections: Vec<SharedConnection>,
    /// Which connection is looked at first, so that all of them are used.
    turn: AtomicUsize,
    /// The server that tells of changes, which data has to come from as well.
    pub(super) tracked: Arc<Tracked>,
    /// Connections for commands that depend on those before them, which nobody uses at the moment, each with the
    /// generation that it was opened in.
    idle: Mutex<Vec<(u64, MultiplexedConnection)>>,
    /// One permit for each of those that may exist.
    alone: Semaphore,
    client: Client,
    config: AsyncConnectionConfig,
}

/// A connection that nobody else sends commands over, so that they may depend on those before them: it is never another
/// one, as those that reconnect become. Dropped without [`Alone::give_back`], it is closed, since nobody knows what
/// state it is in.
pub(super) struct Alone<'a> {
    path: &'a DataPath,
    generation: u64,
    connection: MultiplexedConnection,
    _permit: SemaphorePermit<'a>,
}

impl Alone<'_> {
    /// Sends commands and reads their replies.
    pub(super) async fn query<T: FromRedisValue>(
        &mut self,
        commands: &Pipeline,
    ) -> Result<T, StoreError> {
        let replies = commands.query_async(&mut self.connection).await;
        replies.map_err(|error| CommandFailure::after_sending(error).into())
    }

    /// For the next one to use: nothing of what was sent over it lasts.
    pub(super) fn give_back(self) {
        let mut idle = self.path.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push((self.generation, self.connection));
    }
}

impl DataPath {
    /// Some connections, of which each connects when it is first needed.
    pub(super) fn new(
        count: NonZeroU8,
        client: &Client,
        config: &AsyncConnectionConfig,
    ) -> DataPath {
        let tracked = Arc::new(Tracked::default());
        let connections = (0..count.get())
            .map(|_| SharedConnection::new(client.clone(), config.clone(), Arc::clone(&tracked)))
            .collect();
        DataPath {
            connections,
            turn: AtomicUsize::new(0),
            tracked,
            idle: Mutex::default(),
            alone: Semaphore::new(count.get().into()),
            client: client.clone(),
            config: config.clone(),
        }
    }

    /// A connection of one's own, one of as many as there are for everybody.
    pub(super) async fn alone(&self) -> Result<Alone<'_>, StoreError> {
        let closed = |_closed| StoreError::Unreachable("it is being closed".to_owned());
        let permit = self.alone.acquire().await.map_err(closed)?;
        let generation = self.tracked.generation();
        let idle = || {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            idle.retain(|(of, _)| *of == generation);
            idle.pop()
        };
        while let Some((_, mut connection)) = idle() {
            // The other side may have closed it meanwhile.
            if redis::cmd("PING").exec_async(&mut connection).await.is_ok() {
                return Ok(Alone { path: self, generation, connection, _permit: permit });
            }
        }
        let (client, config) = (self.client.clone(), self.config.clone());
        let opening = SharedConnection::new(client, config, Arc::clone(&self.tracked)).opening();
        let connection = opened(&opening).await?;
        Ok(Alone { path: self, generation, connection, _permit: permit })
    }

    /// Asks whether the server answers where the data comes from.
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        let (_pong,): (String,) = self.query(redis::pipe().cmd("PING"), Repeat::Once).await?;
        Ok(())
    }

    /// Over the connection with the fewest commands waiting: a reply of a megabyte holds up what is behind it.
    pub(super) async fn query<T: FromRedisValue>(
        &self,
        commands: &Pipeline,
        repeat: Repeat,
    ) -> Result<T, StoreError> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let (before, from_turn) = self.connections.split_at(turn);
        let connection = from_turn
            .iter()
            .chain(before)
            .min_by_key(|connection| connection.waiting())
            .expect("settings ask for at least one connection");
        connection.query(commands, repeat).await
    }
}

/// A connection that is open, being opened or closed, and how many commands wait on it.
#[derive(Debug)]
struct SharedConnection {
    client: Client,
    config: AsyncConnectionConfig,
    tracked: Arc<Tracked>,
    /// None while it is closed. Whoever needs it while it is being opened shares that attempt and its failure.
    opening: Arc<Mutex<Option<(u64, Opening)>>>,
    waiting: AtomicUsize,
}

/// Whether commands may be sent again when their connection broke before the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// They read: twice is as good as once.
    Once,
    /// They write: they may have been carried out.
    Never,
}

impl SharedConnection {
    /// Connects when it is first needed.
    fn new(
        client: Client,
        config: AsyncConnectionConfig,
        tracked: Arc<Tracked>,
    ) -> SharedConnection {
        let (opening, waiting) = (Arc::default(), AtomicUsize::new(0));
        SharedConnection { client, config, tracked, opening, waiting }
    }

    /// How many commands wait for a reply.
    fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Sends commands and reads their replies. A connection that the other side closed while it was idle is
    /// noticed only now, so what may be repeated is sent again over a new one.
    async fn query<T: FromRedisValue>(
        &self,
        commands: &Pipeline,
        repeat: Repeat,
    ) -> Result<T, StoreError> {
        let _waiting = Queued::on(&self.waiting);
        match self.try_once(commands).await {
            Err(CommandFailure::Broken(_)) if repeat == Repeat::Once => {
                self.try_once(commands).await
            }
            result => result,
        }
        .map_err(StoreError::from)
    }

    async fn try_once<T: FromRedisValue>(&self, commands: &Pipeline) -> Result<T, CommandFailure> {
        let opening = self.opening();
        let mut connection = opened(&opening).await?;
        commands.query_async(&mut connection).await.map_err(|error| {
            // After a time-out too: it may hang for ever behind a peer that acknowledges and never answers. The next
            // command takes a new one.
            if error.is_timeout() || error.is_unrecoverable_error() {
                forget(&self.opening, &opening);
            }
            CommandFailure::after_sending(error)
        })
    }

    /// The attempt under way or landed; begins one where there is none.
    fn opening(&self) -> Opening {
        let generation = self.tracked.generation();
        let mut slot = lock(&self.opening);
        if let Some((of, opening)) = &*slot
            && *of == generation
        {
            return Arc::clone(opening);
        }
        let (opening, completion) = Flight::new();
        *slot = Some((generation, Arc::clone(&opening)));
        let (client, config, tracked) =
            (self.client.clone(), self.config.clone(), Arc::clone(&self.tracked));
        let (slot, mine) = (Arc::clone(&self.opening), Arc::clone(&opening));
        // Ends by itself, within the connect time-out.
        tokio::spawn(async move {
            let mut opened = client.get_multiplexed_async_connection_with_config(&config).await;
            match &mut opened {
                Ok(connection) => {
                    let run_id = run_id(connection).await;
                    if let Err(elsewhere) = tracked.check(run_id.as_deref()) {
                        forget(&slot, &mine);
                        opened = Err(elsewhere);
                    }
                }
                Err(_) => forget(&slot, &mine),
            }
            completion.complete(opened);
        });
        opening
    }
}

async fn opened(opening: &Opening) -> Result<MultiplexedConnection, CommandFailure> {
    match opening.outcome().await {
        Ok(connection) => connection.map_err(CommandFailure::NotOpened),
        Err(lost) => {
            Err(CommandFailure::NotOpened((ErrorKind::Client, "", lost.to_string()).into()))
        }
    }
}

/// Closes the connection, unless it was opened anew since.
fn forget(slot: &Mutex<Option<(u64, Opening)>>, opening: &Opening) {
    let mut slot = lock(slot);
    if slot.as_ref().is_some_and(|(_, it)| Arc::ptr_eq(it, opening)) {
        *slot = None;
    }
}

type Slot<'a> = MutexGuard<'a, Option<(u64, Opening)>>;

fn lock(slot: &Mutex<Option<(u64, Opening)>>) -> Slot<'_> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far commands got.
#[derive(Debug)]
pub(super) enum CommandFailure {
    /// There was no connection for them.
    NotOpened(RedisError),
    /// The connection broke before the reply.
    Broken(RedisError),
    /// Redis answered with an error, or not in time.
    Answered(RedisError),
    /// The reply was not waited for, or not read.
    NotRead(StoreError),
}

impl CommandFailure {
    /// Of commands that were sent.
    pub(super) fn after_sending(error: RedisError) -> CommandFailure {
        if error.is_unrecoverable_error() && !error.is_timeout() {
            CommandFailure::Broken(error)
        } else {
            CommandFailure::Answered(error)
        }
    }
}

impl From<CommandFailure> for StoreError {
    fn from(failure: CommandFailure) -> StoreError {
        match failure {
            CommandFailure::NotRead(error) => error,
            CommandFailure::NotOpened(error) if matches!(error.kind(), ErrorKind::Server(_)) => {
                StoreError::Refused(error.to_string())
            }
            CommandFailure::NotOpened(error) | CommandFailure::Broken(error) => {
                StoreError::Unreachable(error.to_string())
            }
            CommandFailure::Answered(error) if error.is_timeout() => StoreError::TimedOut,
            CommandFailure::Answered(error) if error.code() == Some("WRONGTYPE") => {
                StoreError::WrongType
            }
            // In a transaction the code stands inside the text of EXEC's own error.
            CommandFailure::Answered(error) if error.to_string().contains("WRONGTYPE") => {
                StoreError::WrongType
            }
            CommandFailure::Answered(error) => match error.kind() {
                ErrorKind::Server(
                    ServerErrorKind::BusyLoading
                    | ServerErrorKind::MasterDown
                    | ServerErrorKind::ClusterDown
                    | ServerErrorKind::TryAgain,
                ) => StoreError::Unreachable(error.to_string()),
                _ => StoreError::Refused(error.to_string()),
            },
        }
    }
}

/// Counts a command as waiting for as long as it lives, cancelled or not.
struct Queued<'a>(&'a AtomicUsize);

impl<'a> Queued<'a> {
    fn on(count: &'a AtomicUsize) -> Queued<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        Queued(count)
    }
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
