//! The connection over which Redis pushes every change, and the supervisor that keeps it.
//!
//! Own it, all of it: the client's `ConnectionManager` reconnects without a word and without tracking, and
//! passes pushes on through another task, out of the order in which they came.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, PushInfo, PushKind, RedisError, ServerErrorKind,
    Value,
};
use tokio::sync::Notify;

use super::connection::{DataPath, run_id};
use super::{Change, ChangeListener, Coherence, Lease};
use crate::image::ImageId;
use crate::task::Task;

/// How often the connection is asked whether it is alive, and how long it may take to say so. A partition
/// that nobody reports is noticed within the sum of the two.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long one sign of tracking is good for: until the next one is due at the latest.
const LEASE: Duration = Duration::from_secs(2);

/// Between attempts to connect: from the first, doubled up to the last, each with jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Between attempts where the server can't do it. It may be replaced by one that can.
const UNSUPPORTED_PAUSE: Duration = Duration::from_secs(30);

/// What a tracking connection needs.
#[derive(Debug)]
pub(super) struct Tracking {
    /// One that speaks RESP3: pushes are a part of it.
    pub(super) client: Client,
    pub(super) key_prefix: String,
    pub(super) connect_timeout: Duration,
    pub(super) listener: ChangeListener,
    /// Where the data comes from: the same server, or nothing can be relied upon.
    pub(super) data: Arc<DataPath>,
}

/// Why there is no tracking.
#[derive(Debug)]
enum TrackingFailure {
    /// One that may pass: no server, one that is loading, too many clients, a wrong password.
    Passing(RedisError),
    /// A server that has no `CLIENT TRACKING … BCAST`, or doesn't let us.
    Unsupported(String),
}

/// What the connection and its supervisor share.
#[derive(Debug)]
struct TrackingConnection {
    connection: u64,
    listener: ChangeListener,
    data: Arc<DataPath>,
    key_prefix: String,
    /// When the last heartbeat was sent that was answered: everything up to then has been told.
    last_heard: Mutex<Instant>,
    /// Its end is told once: the first reason is the true one, and what follows is only its consequence.
    told: AtomicBool,
    ended: Notify,
}

impl Tracking {
    /// Starts the supervisor.
    pub(super) fn start(self) -> Task {
        Task::start("tracking", self.supervise())
    }

    /// Connect, track, beat, and again, for as long as the store lives.
    async fn supervise(self) {
        let (mut pause, mut said) = (FIRST_PAUSE, None);
        for number in 1.. {
            let tracking = Arc::new(TrackingConnection {
                connection: number,
                listener: self.listener.clone(),
                data: Arc::clone(&self.data),
                key_prefix: self.key_prefix.clone(),
                last_heard: Mutex::new(Instant::now()),
                told: AtomicBool::new(false),
                ended: Notify::new(),
            });
            let coherence = match self.connect(&tracking).await {
                Ok((connection, run_id)) => {
                    // First, so that whatever is fetched in the new epoch comes over a new connection.
                    self.data.tracked.renew(run_id);
                    let lease = Lease::Until(Instant::now() + LEASE);
                    self.listener.notify(Change::TrackingStarted { connection: number, lease });
                    tracing::info!(connection = number, "coherent: redis pushes every change");
                    said = None;
                    let began = Instant::now();
                    let coherence = tokio::select! {
                        coherence = tracking.beat(connection) => coherence,
                        () = self.data.tracked.elsewhere.notified() => {
                            Coherence::Unverified("the address leads to another server now".into())
                        }
                    };
                    // One that came and went at once is no reason to hurry.
                    if began.elapsed() > 2 * LAST_PAUSE {
                        pause = FIRST_PAUSE;
                    }
                    coherence
                }
                Err(failure) => {
                    if matches!(failure, TrackingFailure::Unsupported(_)) {
                        pause = UNSUPPORTED_PAUSE;
                    }
                    failure.coherence()
                }
            };
            tracking.lose(&coherence);
            // Again: it may have been lost before it was renewed.
            self.data.tracked.end();
            // Without tracking the images are asked for, if there is somebody to ask.
            let coherence = match tokio::time::timeout(HEARTBEAT, self.data.ping()).await {
                Ok(Ok(())) => coherence,
                Ok(Err(error)) => Coherence::Unreachable(error.to_string().into()),
                Err(_elapsed) => Coherence::Unreachable("no answer to a PING".into()),
            };
            self.listener.notify(Change::Probed(coherence.clone()));
            // Once for each reason: an outage of an hour is one line.
            if said.as_ref() != Some(&coherence) {
                let (state, reason) = (coherence.name(), coherence.reason());
                tracing::warn!(state, reason, "not coherent: redis is asked on each request");
                said = Some(coherence);
            }
            tokio::time::sleep(pause.mul_f64(fastrand::f64().mul_add(0.5, 0.75))).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// A connection that is known to track: what the server says it does is looked at, not only its `OK`.
    async fn connect(
        &self,
        tracking: &Arc<TrackingConnection>,
    ) -> Result<(MultiplexedConnection, Option<String>), TrackingFailure> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.connect_timeout))
            .set_response_timeout(Some(HEARTBEAT))
            .set_push_sender({
                let tracking = Arc::clone(tracking);
                move |push| {
                    tracking.apply(&push);
                    Ok::<(), ()>(())
                }
            });
        let mut connection =
            self.client.get_multiplexed_async_connection_with_config(&config).await?;
        let run_id = run_id(&mut connection).await;

        let mut tracking = redis::cmd("CLIENT");
        tracking.arg("TRACKING").arg("ON").arg("BCAST");
        if !self.key_prefix.is_empty() {
            tracking.arg("PREFIX").arg(&self.key_prefix);
        }
        let mut info = redis::cmd("CLIENT");
        info.arg("TRACKINGINFO");
        tracking.exec_async(&mut connection).await.map_err(TrackingFailure::of_tracking)?;
        let said: Value =
            info.query_async(&mut connection).await.map_err(TrackingFailure::of_tracking)?;
        if tracks(&said, &self.key_prefix) {
            Ok((connection, run_id))
        } else {
            Err(TrackingFailure::Unsupported(format!("CLIENT TRACKINGINFO says {said:?}")))
        }
    }
}

impl TrackingConnection {
    /// Called by the connection for each push, in the order in which they came, before any reply behind them.
    fn apply(&self, push: &PushInfo) {
        match push.kind {
            PushKind::Invalidate => match push.data.as_slice() {
                [Value::Array(keys)] => keys.iter().for_each(|key| self.changed(key)),
                // FLUSHALL and FLUSHDB name no key; what isn't understood might mean any.
                _ => self.listener.notify(Change::Flushed),
            },
            PushKind::Disconnection => {
                self.lose(&closed());
                self.ended.notify_one();
            }
            _ => {}
        }
    }

    fn changed(&self, key: &Value) {
        let Value::BulkString(key) = key else {
            return self.listener.notify(Change::Flushed);
        };
        // A key that no id can name is never asked for.
        let id = std::str::from_utf8(key).ok().and_then(|key| key.strip_prefix(&self.key_prefix));
        if let Some(id) = id.and_then(|id| ImageId::parse(id).ok()) {
            self.listener.notify(Change::Invalidated(id));
        }
    }

    fn lose(&self, coherence: &Coherence) {
        if self.told.swap(true, Ordering::SeqCst) {
            return;
        }
        // At once: the server may be started again, under a new `run_id`, before the supervisor looks.
        self.data.tracked.end();
        self.listener.notify(Change::TrackingLost {
            connection: self.connection,
            last_heard: *self.last_heard.lock().unwrap_or_else(PoisonError::into_inner),
            coherence: coherence.clone(),
        });
    }

    /// Asks the connection for its tracking each second, until it has none; gives what is left.
    async fn beat(&self, mut connection: MultiplexedConnection) -> Coherence {
        let mut interval = tokio::time::interval(HEARTBEAT);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.ended.notified() => return closed(),
                _ = interval.tick() => {}
            }
            let sent = Instant::now();
            let ping = redis::cmd("PING");
            match tokio::time::timeout(HEARTBEAT, ping.exec_async(&mut connection)).await {
                Ok(Ok(())) => {
                    *self.last_heard.lock().unwrap_or_else(PoisonError::into_inner) = sent;
                    let lease = Lease::Until(sent + LEASE);
                    let (connection, round_trip) = (self.connection, sent.elapsed());
                    self.listener.notify(Change::Heartbeat { connection, lease, round_trip });
                }
                Ok(Err(error)) if error.is_connection_dropped() => return closed(),
                Ok(Err(error)) => return Coherence::Unverified(error.to_string().into()),
                Err(_elapsed) => {
                    let reason = format!("no heartbeat within {HEARTBEAT:?}");
                    return Coherence::Unverified(reason.into());
                }
            }
        }
    }
}

/// Redis is asked until the next attempt to connect says whether it is there at all.
fn closed() -> Coherence {
    Coherence::Unverified("the tracking connection was closed".into())
}

impl TrackingFailure {
    fn coherence(&self) -> Coherence {
        match self {
            TrackingFailure::Passing(error) => {
                Coherence::Unverified(format!("no tracking connection: {error}").into())
            }
            TrackingFailure::Unsupported(why) => {
                Coherence::Unverified(format!("the server doesn't tell of changes: {why}").into())
            }
        }
    }

    /// Of the commands that only a server has which can do it.
    fn of_tracking(error: RedisError) -> TrackingFailure {
        match error.kind() {
            ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm) => {
                TrackingFailure::Unsupported(error.to_string())
            }
            _ => TrackingFailure::from(error),
        }
    }
}

impl From<RedisError> for TrackingFailure {
    fn from(error: RedisError) -> TrackingFailure {
        match error.kind() {
            ErrorKind::RESP3NotSupported => TrackingFailure::Unsupported(error.to_string()),
            _ => TrackingFailure::Passing(error),
        }
    }
}

/// Whether `CLIENT TRACKINGINFO` says: on, by broadcast, for this prefix (or for all, where there is none).
fn tracks(info: &Value, key_prefix: &str) -> bool {
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

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}
