//! Background tasks that end with their owner, and their pauses.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::task::JoinHandle;

/// Varies a pause by a quarter either way, so that servers that failed together don't try again together.
pub(crate) fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(fastrand::f64().mul_add(0.5, 0.75))
}

/// A background task. Dropping it aborts the task; an earlier end is logged with its name.
#[derive(Debug)]
pub(crate) struct Task(JoinHandle<()>);

impl Task {
    /// Spawns the task on the current runtime.
    pub(crate) fn start(
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> Task {
        Task(tokio::spawn(async move {
            match AssertUnwindSafe(work).catch_unwind().await {
                Ok(()) => tracing::debug!(name, "task ended"),
                Err(_panic) => tracing::error!(name, "task panicked"),
            }
        }))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
