//! The tracking connection, over which Redis pushes every change, and its supervisor.
//!
//! This is not the client's `ConnectionManager`, which reconnects silently and without tracking, and passes pushes through
//! another task, out of order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, Client, ErrorKind, PushInfo, PushKind, RedisError, ServerErrorKind,
    Value,
};
use tokio::sync::Notify;

use super::connection::DataConnections;
use super::tracked_server::run_id;
use super::{Change, ChangeListener, Coherence, Lease};
use crate::image::ImageId;
use crate::task::Task;

/// Interval of heartbeats, and time limit of each. A silent partition is noticed within the sum of the two.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Validity of one heartbeat: until the next one must have been answered.
const LEASE: Duration = Duration::from_secs(2);

/// Pauses between attempts to connect: from the first, doubled up to the last, each with jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Pause between attempts on a server without tracking. It may be replaced by one that has it.
const UNSUPPORTED_PAUSE: Duration = Duration::from_secs(30);

/// Supervisor of the tracking connection.
#[derive(Debug)]
pub(super) struct Tracking {
    /// Speaks RESP3, which has pushes.
    pub(super) client: Client,
    pub(super) key_prefix: String,
    pub(super) connect_timeout: Duration,
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
    /// The server has no `CLIENT TRACKING … BCAST`, or doesn't permit it.
    #[error("the server can't push changes: {0}")]
    Unsupported(#[source] RedisError),
    /// The server accepted the command and doesn't track.
    #[error("the server can't push changes: CLIENT TRACKINGINFO answers {0:?}")]
    Inactive(Value),
}

/// State of one tracking connection, shared by the client's push callback and the supervisor.
#[derive(Debug)]
struct TrackingConnection {
    connection: u64,
    listener: ChangeListener,
    data: Arc<DataConnections>,
    key_prefix: String,
    /// Time at which the last answered heartbeat was sent: every change before it has been announced.
    last_heard: Mutex<Instant>,
    /// The loss is announced once: the first reason is the cause, later ones are consequences.
    loss_announced: AtomicBool,
    ended: Notify,
}

impl Tracking {
    /// Starts the supervisor.
    pub(super) fn start(self) -> Task {
        Task::start("tracking", self.supervise())
    }

    /// Connects, tracks and sends heartbeats, again and again, until the store is dropped.
    async fn supervise(self) {
        let (mut pause, mut logged) = (FIRST_PAUSE, None);
        for number in 1.. {
            let tracking = Arc::new(TrackingConnection {
                connection: number,
                listener: self.listener.clone(),
                data: Arc::clone(&self.data),
                key_prefix: self.key_prefix.clone(),
                last_heard: Mutex::new(Instant::now()),
                loss_announced: AtomicBool::new(false),
                ended: Notify::new(),
            });
            let coherence = match self.connect(&tracking).await {
                Ok((connection, run_id)) => {
                    // First, so that every fetch of the new epoch uses a new connection.
                    self.data.tracked.renew(run_id);
                    let lease = Lease::Until(Instant::now() + LEASE);
                    self.listener.notify(Change::TrackingStarted { connection: number, lease });
                    tracing::info!(connection = number, "coherent: redis pushes every change");
                    logged = None;
                    let began = Instant::now();
                    let coherence = tokio::select! {
                        coherence = tracking.send_heartbeats(connection) => coherence,
                        () = self.data.tracked.mismatch.notified() => {
                            Coherence::Unverified("the address leads to another server now".into())
                        }
                    };
                    // A connection that breaks at once doesn't reset the pause.
                    if began.elapsed() > 2 * LAST_PAUSE {
                        pause = FIRST_PAUSE;
                    }
                    coherence
                }
                Err(failure) => {
                    if !matches!(failure, TrackingFailure::Passing(_)) {
                        pause = UNSUPPORTED_PAUSE;
                    }
                    Coherence::Unverified(failure.to_string().into())
                }
            };
            tracking.lose(&coherence);
            // Again: the connection may have been lost before the generation was renewed.
            self.data.tracked.end();
            // Without tracking every request asks Redis, so it matters whether Redis answers.
            let coherence = match tokio::time::timeout(HEARTBEAT, self.data.ping()).await {
                Ok(Ok(())) => coherence,
                Ok(Err(error)) => Coherence::Unreachable(error.to_string().into()),
                Err(_elapsed) => Coherence::Unreachable("PING was not answered".into()),
            };
            self.listener.notify(Change::Probed(coherence.clone()));
            // Logged once for each reason: an outage of an hour is one line.
            if logged.as_ref() != Some(&coherence) {
                let (state, reason) = (coherence.name(), coherence.reason());
                tracing::warn!(state, reason, "not coherent: every request asks redis");
                logged = Some(coherence);
            }
            tokio::time::sleep(pause.mul_f64(fastrand::f64().mul_add(0.5, 0.75))).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Opens a connection that certainly tracks: `CLIENT TRACKINGINFO` is checked as well, since `OK` alone proves little.
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
        tracking.exec_async(&mut connection).await.map_err(TrackingFailure::from_tracking)?;
        let info: Value =
            info.query_async(&mut connection).await.map_err(TrackingFailure::from_tracking)?;
        if is_tracking(&info, &self.key_prefix) {
            Ok((connection, run_id))
        } else {
            Err(TrackingFailure::Inactive(info))
        }
    }
}

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
                self.lose(&closed());
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
        if let Some(id) = id.and_then(|id| ImageId::parse(id).ok()) {
            self.listener.notify(Change::Invalidated(id));
        }
    }

    fn lose(&self, coherence: &Coherence) {
        if self.loss_announced.swap(true, Ordering::SeqCst) {
            return;
        }
        // At once: the server may restart with a new `run_id` before the supervisor runs.
        self.data.tracked.end();
        self.listener.notify(Change::TrackingLost {
            connection: self.connection,
            last_heard: *self.last_heard.lock().unwrap_or_else(PoisonError::into_inner),
            coherence: coherence.clone(),
        });
    }

    /// Sends heartbeats until the connection is lost; returns the remaining state.
    async fn send_heartbeats(&self, mut connection: MultiplexedConnection) -> Coherence {
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
                    let reason = format!("the heartbeat was not answered within {HEARTBEAT:?}");
                    return Coherence::Unverified(reason.into());
                }
            }
        }
    }
}

/// State after a disconnection, until the next attempt to connect.
fn closed() -> Coherence {
    Coherence::Unverified("the tracking connection was closed".into())
}

impl TrackingFailure {
    /// Classifies the failure of a command that only servers with tracking have.
    fn from_tracking(error: RedisError) -> TrackingFailure {
        match error.kind() {
            ErrorKind::Server(ServerErrorKind::ResponseError | ServerErrorKind::NoPerm) => {
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
fn is_tracking(info: &Value, key_prefix: &str) -> bool {
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
