//! The tracking connection, over which Redis pushes every change, and its supervisor.
//!
//! This is not the client's `ConnectionManager`, which reconnects silently and without tracking, and passes pushes through
//! another task, out of order.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{Fuse, FusedFuture};
use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, ErrorKind, PushInfo, PushKind, RedisError, RedisResult, ServerErrorKind,
    Value,
};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior};

use super::advice::OutageLog;
use super::connection::{DataConnections, Retry};
use super::connector::Connector;
use super::server::{self, Role, RoleCommand, ServerInfo, Unusable, text};
use super::standing::{GIVEN_UP, Standing};
use super::{Change, ChangeListener, Coherence, Lease, StoreError};
use crate::clock::{BootInstant, Clock};
use crate::image::ImageId;
use crate::task::{Task, jittered};

/// Interval at which this process shows that it runs.
const TICK: Duration = Duration::from_millis(50);

/// Pauses between attempts to connect: from the first, doubled up to the last, each with jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Pause between attempts on a server without tracking. It may be replaced by one that has it.
const UNSUPPORTED_PAUSE: Duration = Duration::from_secs(30);

/// Interval of probes while the server isn't tracked.
const LOOK: Duration = Duration::from_secs(2);

/// Supervisor of the tracking connection.
#[derive(Debug)]
pub(super) struct Tracking {
    /// The server's address without its password, for the log.
    pub(super) address: String,
    /// Speaks RESP3, which has pushes.
    pub(super) connector: Connector,
    /// `[redis] tracking`. Without it the server is only looked at.
    pub(super) is_on: bool,
    pub(super) key_prefix: String,
    pub(super) connect_timeout: Duration,
    /// Set if a key is written now and then, to see that its push comes.
    pub(super) canary: bool,
    pub(super) clock: Clock,
    pub(super) listener: ChangeListener,
    /// The data connections. They must lead to the same server.
    pub(super) data: Arc<DataConnections>,
}

/// Failure to start tracking.
#[derive(Debug, thiserror::Error)]
enum TrackingFailure {
    /// The failure may pass: no server, one that is loading, too many clients, a wrong password.
    #[error("no tracking connection: {0}")]
    Passing(#[source] RedisError),
    /// The user may not run a command, which can be changed at any time.
    #[error("the server can't push changes to this user: {0}")]
    Forbidden(#[source] RedisError),
    /// The server has no `CLIENT TRACKING … BCAST`.
    #[error("the server can't push changes: {0}")]
    Unsupported(#[source] RedisError),
    /// The server accepted the command and doesn't track.
    #[error("the server can't push changes: CLIENT TRACKINGINFO answers {0:?}")]
    Inactive(Value),
    /// Nothing tells the server from another one, so a switched address would not be noticed.
    #[error(
        "the server can't be told from another one: the user must be allowed to run INFO or CLIENT INFO"
    )]
    Unidentified,
    /// The server must not be read from.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// `[redis] tracking` is off.
    #[error("tracking is off ([redis] tracking)")]
    Off,
    /// No command tells the server's role, so a demotion would not be noticed.
    #[error("the server's role is unknown: the user must be allowed to run HELLO, ROLE or INFO")]
    RoleUnknown,
}

/// A connection that tracks.
struct Tracked {
    connection: MultiplexedConnection,
    server: ServerInfo,
    role_command: RoleCommand,
    /// The first heartbeat was sent then, and has been answered.
    heard: BootInstant,
}

/// State of one tracking connection, shared by the client's push callback and the supervisor.
#[derive(Debug)]
struct TrackingConnection {
    number: u64,
    listener: ChangeListener,
    data: Arc<DataConnections>,
    key_prefix: String,
    /// Time at which the last answered heartbeat was sent: every change before it has been announced.
    last_heard: Mutex<BootInstant>,
    /// The loss is announced once: the first reason is the cause, later ones are consequences.
    loss_announced: AtomicBool,
    ended: Notify,
    /// Key that this server writes to see its push, behind the prefix.
    canary: String,
    canary_heard: Notify,
}

impl Tracking {
    /// Starts the supervisor.
    pub(super) fn start(self) -> Task {
        Task::start("tracking", self.supervise())
    }

    /// Connects, tracks and sends heartbeats, again and again, until the store is dropped.
    async fn supervise(self) {
        let mut pause = FIRST_PAUSE;
        let mut log = OutageLog::new(self.address.clone(), self.is_on);
        // No id begins with a tilde. One key for each server: another one's push proves nothing here.
        let canary = format!("~afterimage:canary:{:016x}", fastrand::u64(..));
        for number in 1.. {
            let tracking = Arc::new(TrackingConnection {
                number,
                listener: self.listener.clone(),
                data: Arc::clone(&self.data),
                key_prefix: self.key_prefix.clone(),
                last_heard: Mutex::new(self.clock.now()),
                loss_announced: AtomicBool::new(false),
                ended: Notify::new(),
                canary: canary.clone(),
                canary_heard: Notify::new(),
            });
            let connected =
                if self.is_on { self.connect(&tracking).await } else { Err(TrackingFailure::Off) };
            let mut until_next = None;
            let coherence = match connected {
                Ok(tracked) => {
                    // First, so that every fetch of the new epoch asks this server.
                    self.data.current.track(tracked.server.clone());
                    tracking.heard(tracked.heard);
                    let standing = Standing::new(tracked.heard);
                    let lease = standing.lease(self.clock.now());
                    let lease = lease.unwrap_or(Lease::Until(tracked.heard));
                    self.listener.notify(Change::TrackingStarted { connection: number, lease });
                    let redis = &self.address;
                    tracing::info!(
                        connection = number,
                        redis,
                        "coherent: redis pushes every change"
                    );
                    log.end();
                    let began = self.clock.now();
                    let reason = tokio::select! {
                        biased;
                        reason = self.keep(&tracking, tracked, standing) => reason,
                        reason = self.data.current.doubted() => reason.to_owned(),
                    };
                    // A connection that breaks at once doesn't reset the pause.
                    if self.clock.elapsed(began) > 2 * LAST_PAUSE {
                        pause = FIRST_PAUSE;
                    }
                    Coherence::Unverified(reason.into())
                }
                Err(failure) => {
                    match failure {
                        TrackingFailure::Unsupported(_) | TrackingFailure::Inactive(_) => {
                            until_next = Some(UNSUPPORTED_PAUSE);
                        }
                        TrackingFailure::Off => until_next = Some(Duration::MAX),
                        _ => {}
                    }
                    Coherence::Unverified(failure.to_string().into())
                }
            };
            tracking.lose(&coherence);
            // Again: the connection may have been lost before the server was tracked.
            self.data.current.end_tracking();
            let until_next = until_next.unwrap_or_else(|| {
                let before = pause;
                pause = (pause * 2).min(LAST_PAUSE);
                jittered(before)
            });
            self.watch(until_next, &coherence, &mut log).await;
        }
    }

    /// Probes the server from time to time while it isn't tracked. Every request asks it meanwhile, so it must answer, and be
    /// a primary.
    async fn watch(&self, duration: Duration, coherence: &Coherence, log: &mut OutageLog) {
        let begin = Instant::now();
        loop {
            let coherence = match self.probe().await {
                Ok(()) => coherence.clone(),
                Err(reason) => Coherence::Unreachable(reason.into()),
            };
            self.listener.notify(Change::Probed(coherence.clone()));
            log.tell(&coherence, Instant::now());
            let left = duration.saturating_sub(begin.elapsed());
            tokio::time::sleep(left.min(LOOK)).await;
            if left <= LOOK {
                return;
            }
        }
    }

    /// Checks that records can be read: that the address leads to a primary, to which the data connections lead as well,
    /// and that the user may. An error says why not.
    async fn probe(&self) -> Result<(), String> {
        let mut probe = redis::pipe();
        probe.add_command(self.read_probe());
        let read = tokio::time::timeout(GIVEN_UP, self.data.query::<(u64,)>(&probe, Retry::Once));
        let look = tokio::time::timeout(GIVEN_UP, self.data.look());
        let (read, looked) = tokio::join!(read, look);
        // Where no new connection can be opened, an open one may still do.
        if let Ok(Ok((_, server))) = looked {
            if let Err(unusable) = server.check_readable() {
                self.data.current.reopen();
                return Err(unusable.to_string());
            }
            // Another server than theirs: then they are opened anew.
            let _ = self.data.current.check(self.data.current.generation(), &server);
        }
        match read {
            Ok(Ok(_) | Err(StoreError::WrongType)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_elapsed) => Err(StoreError::TimedOut.to_string()),
        }
    }

    /// A command that is refused where reading an image would be: by a server that is loading, or by an ACL.
    fn read_probe(&self) -> redis::Cmd {
        redis::cmd("STRLEN").arg(format!("{}~", self.key_prefix)).to_owned()
    }

    /// Opens a connection that certainly tracks: `CLIENT TRACKINGINFO` is checked as well, since `OK` alone proves little.
    async fn connect(
        &self,
        tracking: &Arc<TrackingConnection>,
    ) -> Result<Tracked, TrackingFailure> {
        // No response timeout: after a pause of this process it would be over before the answer has been read.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(None)
            .set_push_sender({
                let tracking = Arc::clone(tracking);
                move |push| {
                    tracking.apply(&push);
                    Ok::<(), ()>(())
                }
            });
        let connected = async {
            let connection = self.connector.connect(&config).await?;
            self.track(connection).await
        };
        let timed_out = |_elapsed| {
            let error = std::io::Error::from(std::io::ErrorKind::TimedOut);
            Err(TrackingFailure::Passing(error.into()))
        };
        let limit = self.connect_timeout + GIVEN_UP;
        tokio::time::timeout(limit, connected).await.unwrap_or_else(timed_out)
    }

    /// Begins to track over a connection, and sends the first heartbeat: until a server can read records, nothing has begun.
    async fn track(
        &self,
        mut connection: MultiplexedConnection,
    ) -> Result<Tracked, TrackingFailure> {
        let server = ServerInfo::ask(&mut connection).await?;
        server.check_readable()?;
        if !server.is_identified() {
            return Err(TrackingFailure::Unidentified);
        }
        let role_command = server.role_command.ok_or(TrackingFailure::RoleUnknown)?;

        let mut tracking = redis::cmd("CLIENT");
        tracking.arg("TRACKING").arg("ON").arg("BCAST");
        if !self.key_prefix.is_empty() {
            tracking.arg("PREFIX").arg(&self.key_prefix);
        }
        let mut info = redis::cmd("CLIENT");
        info.arg("TRACKINGINFO");
        tracking.exec_async(&mut connection).await.map_err(TrackingFailure::from_tracking)?;
        let info: Value =
            info.query_async(&mut connection).await.map_err(TrackingFailure::from_tracking)?;
        if !is_tracking(&info, &self.key_prefix) {
            return Err(TrackingFailure::Inactive(info));
        }
        let heard = self.clock.now();
        self.beat(connection.clone(), role_command).await?;
        Ok(Tracked { connection, server, role_command, heard })
    }

    /// Sends a heartbeat: can records be read, and is the server still a primary? Every change before it was announced
    /// before it is answered.
    async fn beat(
        &self,
        mut connection: MultiplexedConnection,
        role_command: RoleCommand,
    ) -> Result<(), TrackingFailure> {
        let mut heartbeat = redis::pipe();
        heartbeat.add_command(self.read_probe()).add_command(role_command.command());
        heartbeat.ignore_errors();
        let replies: Vec<RedisResult<Value>> = heartbeat.query_async(&mut connection).await?;
        let mut replies = replies.into_iter();
        let mut next = || replies.next().unwrap_or(Ok(Value::Nil));
        match next() {
            // The key may be of any type: it was looked at.
            Err(error) if error.code() != Some("WRONGTYPE") => return Err(error.into()),
            _ => {}
        }
        match role_command.role_in(&next()?) {
            Some(Role::Primary) => Ok(()),
            Some(Role::Replica) => Err(Unusable(server::REPLICA).into()),
            None => Err(TrackingFailure::RoleUnknown),
        }
    }

    /// Keeps a tracking connection in use for as long as it may be relied upon; returns the reason for which it may not.
    ///
    /// The lease that is announced ends soon, and is announced again with each tick: for as long as this process runs, the
    /// heartbeats are answered and the address leads to this server.
    async fn keep(
        &self,
        tracking: &TrackingConnection,
        tracked: Tracked,
        mut standing: Standing,
    ) -> String {
        let Tracked { connection, role_command, heard, .. } = tracked;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut beat, mut verification) = (pin!(Fuse::terminated()), pin!(Fuse::terminated()));
        let (mut beat_sent, mut verification_began) = (heard, heard);
        let generation = self.data.current.generation();
        loop {
            tokio::select! {
                biased;
                () = tracking.ended.notified() => return CLOSED.to_owned(),
                answered = &mut beat => match answered {
                    Ok(()) => {
                        tracking.heard(beat_sent);
                        standing.heard(beat_sent);
                        let round_trip = self.clock.elapsed(beat_sent);
                        if let Some(lease) = standing.lease(self.clock.now()) {
                            let connection = tracking.number;
                            tracking.listener.notify(Change::Heartbeat { connection, lease, round_trip });
                        }
                    }
                    Err(TrackingFailure::Passing(error)) if error.is_connection_dropped() => {
                        return CLOSED.to_owned();
                    }
                    Err(failure) => return failure.to_string(),
                },
                verified = &mut verification => match verified {
                    Ok(()) => standing.verified(verification_began),
                    Err(reason) => standing.not_verified(reason),
                },
                _ = ticks.tick() => {
                    let now = self.clock.now();
                    if let Err(reason) = standing.tick(now) {
                        return reason;
                    }
                    if let Some(lease) = standing.lease(now) {
                        tracking.listener.notify(Change::Awake { connection: tracking.number, lease });
                    }
                    if standing.wants_heartbeat(now, beat_sent) && beat.is_terminated() {
                        beat_sent = now;
                        beat.set(self.beat(connection.clone(), role_command).fuse());
                    }
                    if standing.wants_verification(now, verification_began)
                        && verification.is_terminated()
                    {
                        verification_began = now;
                        verification.set(self.verify(tracking, generation).fuse());
                    }
                }
            }
        }
    }

    /// Opens a new connection to the address and compares where it leads. Another server ends the generation.
    async fn verify(&self, tracking: &TrackingConnection, generation: u64) -> Result<(), String> {
        let looked = tokio::time::timeout(2 * GIVEN_UP, self.data.look()).await;
        let looked = looked.map_err(|_elapsed| "it doesn't answer".to_owned())?;
        let (connection, server) = looked.map_err(|error| error.to_string())?;
        self.data.current.check(generation, &server).map_err(|unusable| unusable.to_string())?;
        if self.canary && !self.sees_canary(tracking, connection).await {
            let reason = "a key was written and no push of it came ([redis] canary)";
            self.data.current.doubt(generation, reason);
        }
        Ok(())
    }

    /// Writes a key of this server's own and waits for its push; false if none came. A write that is refused proves nothing.
    async fn sees_canary(
        &self,
        tracking: &TrackingConnection,
        mut connection: MultiplexedConnection,
    ) -> bool {
        let mut write = redis::cmd("SET");
        let key = format!("{}{}", self.key_prefix, tracking.canary);
        write.arg(key).arg("").arg("PX").arg(60_000);
        // Twice: this process may have paused, and not have read the push yet.
        for _ in 0..2 {
            let heard = tracking.canary_heard.notified();
            if let Err(error) = write.exec_async(&mut connection).await {
                tracing::debug!(%error, "the canary isn't written");
                return true;
            }
            if tokio::time::timeout(GIVEN_UP, heard).await.is_ok() {
                return true;
            }
        }
        false
    }
}

/// Applies pushes to a tracking connection that is open, and returns the changes that it announces.
#[cfg(any(test, fuzzing))]
pub(super) fn announced(pushes: &[PushInfo], key_prefix: &str) -> RedisResult<Vec<Change>> {
    let client = redis::Client::open("redis://127.0.0.1/")?;
    let (connector, config) = (Connector::Redis(client), AsyncConnectionConfig::new());
    let data = DataConnections::new(std::num::NonZeroU8::MIN, &connector, &config);
    let changes = Arc::new(Mutex::new(Vec::new()));
    let listener = ChangeListener::new({
        let changes = Arc::clone(&changes);
        move |change| changes.lock().unwrap_or_else(PoisonError::into_inner).push(change)
    });
    let tracking = TrackingConnection {
        number: 1,
        listener,
        data: Arc::new(data),
        key_prefix: key_prefix.to_owned(),
        last_heard: Mutex::new(Clock::default().now()),
        loss_announced: AtomicBool::new(false),
        ended: Notify::new(),
        canary: "~canary".to_owned(),
        canary_heard: Notify::new(),
    };
    for push in pushes {
        tracking.apply(push);
    }
    let mut changes = changes.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(std::mem::take(&mut changes))
}

/// Reason after a disconnection.
const CLOSED: &str = "the tracking connection was closed";

impl TrackingConnection {
    /// Applies a push. The client calls it in the order of the wire, before any reply behind the push.
    fn apply(&self, push: &PushInfo) {
        match push.kind {
            PushKind::Invalidate => match push.data.as_slice() {
                [Value::Array(keys)] => keys.iter().for_each(|key| self.invalidate(key)),
                // FLUSHALL and FLUSHDB name no key; anything unknown might mean any key.
                _ => self.listener.notify(Change::Flushed),
            },
            PushKind::Disconnection => {
                self.lose(&Coherence::Unverified(CLOSED.into()));
                self.ended.notify_one();
            }
            _ => {}
        }
    }

    fn invalidate(&self, key: &Value) {
        let Value::BulkString(key) = key else {
            return self.listener.notify(Change::Flushed);
        };
        // A key that isn't the prefix and a valid id is never requested.
        let id = std::str::from_utf8(key).ok().and_then(|key| key.strip_prefix(&self.key_prefix));
        match id {
            Some(id) if id == self.canary => self.canary_heard.notify_waiters(),
            Some(id) => {
                if let Ok(id) = ImageId::parse(id) {
                    self.listener.notify(Change::Invalidated(id));
                }
            }
            None => {}
        }
    }

    fn lose(&self, coherence: &Coherence) {
        if self.loss_announced.swap(true, Ordering::SeqCst) {
            return;
        }
        // At once: what the data connections are about to hear may come from a server that is no longer the primary.
        self.data.current.end_tracking();
        self.listener.notify(Change::TrackingLost {
            connection: self.number,
            last_heard: *self.last_heard.lock().unwrap_or_else(PoisonError::into_inner),
            coherence: coherence.clone(),
        });
    }

    fn heard(&self, sent: BootInstant) {
        *self.last_heard.lock().unwrap_or_else(PoisonError::into_inner) = sent;
    }
}

impl TrackingFailure {
    /// Classifies the failure of a command that only servers with tracking have.
    fn from_tracking(error: RedisError) -> TrackingFailure {
        match error.kind() {
            ErrorKind::Server(ServerErrorKind::NoPerm) => TrackingFailure::Forbidden(error),
            ErrorKind::Server(ServerErrorKind::ResponseError) => {
                TrackingFailure::Unsupported(error)
            }
            _ => TrackingFailure::from(error),
        }
    }
}

impl From<RedisError> for TrackingFailure {
    fn from(error: RedisError) -> TrackingFailure {
        match error.kind() {
            ErrorKind::RESP3NotSupported => TrackingFailure::Unsupported(error),
            _ => TrackingFailure::Passing(error),
        }
    }
}

/// Returns true if `CLIENT TRACKINGINFO` reports tracking: on, by broadcast, for this prefix (for all keys if it is empty).
pub(super) fn is_tracking(info: &Value, key_prefix: &str) -> bool {
    let Value::Map(fields) = info else {
        return false;
    };
    let holds = |field: &str, wanted: &str| {
        fields.iter().filter(|(name, _)| text(name) == Some(field)).any(
            |(_, values)| match values {
                Value::Array(values) | Value::Set(values) => {
                    values.iter().any(|value| text(value) == Some(wanted))
                }
                _ => false,
            },
        )
    };
    holds("flags", "on") && holds("flags", "bcast") && holds("prefixes", key_prefix)
}
