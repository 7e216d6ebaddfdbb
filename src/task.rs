//! Tasks that go on by themselves.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use tokio::task::JoinHandle;

/// A task that ends with its owner, and whose end is logged if it comes before.
#[derive(Debug)]
pub(crate) struct Task(JoinHandle<()>);

impl Task {
    /// Starts it.
    pub(crate) fn start(
        name: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> Task {
        Task(tokio::spawn(async move {
            match AssertUnwindSafe(work).catch_unwind().await {
                Ok(()) => tracing::debug!(name, "a task has ended"),
                Err(_panic) => tracing::error!(name, "a task has panicked"),
            }
        }))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
