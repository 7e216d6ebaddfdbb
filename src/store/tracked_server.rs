//! The identity of the server that announces changes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use redis::aio::MultiplexedConnection;
use redis::{ErrorKind, RedisResult};
use tokio::sync::Notify;

/// The server that announces changes. Data must come from that very server: after a failover the address may lead to
/// another one, while connections to the old one live on.
#[derive(Debug, Default)]
pub(super) struct TrackedServer {
    /// Grows with each tracking connection. A data connection that was opened in an earlier generation is not used any
    /// more.
    generation: AtomicU64,
    /// The `run_id` of the server, if it may be asked.
    run_id: Mutex<Option<String>>,
    /// Notified when a data connection leads to another server.
    pub(super) mismatch: Notify,
}

impl TrackedServer {
    /// Begins a generation: a new tracking connection is about to be relied upon.
    pub(super) fn renew(&self, run_id: Option<String>) {
        *self.run_id.lock().unwrap_or_else(PoisonError::into_inner) = run_id;
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Forgets the server: no changes are announced for now, so data may come from anywhere.
    pub(super) fn end(&self) {
        *self.run_id.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The present generation, to which a connection that is opened now belongs.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Checks that a new data connection leads to the tracked server, before its first reply is used.
    pub(super) fn check(&self, run_id: Option<&str>) -> RedisResult<()> {
        let tracked = self.run_id.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(tracked), Some(run_id)) = (tracked.as_deref(), run_id)
            && tracked != run_id
        {
            self.mismatch.notify_one();
            return Err((ErrorKind::Io, "the address leads to another server now").into());
        }
        Ok(())
    }
}

/// Asks a server for its `run_id` (`INFO server`), if the user may.
pub(super) async fn run_id(connection: &mut MultiplexedConnection) -> Option<String> {
    let info: String = redis::cmd("INFO").arg("server").query_async(connection).await.ok()?;
    run_id_in(&info)
}

/// Parses the `run_id` in the answer to `INFO server`.
pub(super) fn run_id_in(info: &str) -> Option<String> {
    info.lines().find_map(|line| line.strip_prefix("run_id:")).map(str::to_owned)
}
