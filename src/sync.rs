//! Locks, atomics, channels and tasks of the modules whose orders of threads are explored (`src/threads/`): those of `std`
//! and `tokio`, or with the feature `shuttle` models of them, whose every step a scheduler chooses.
//!
//! A build with the feature serves nothing: the models work only inside of an exploration.

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(feature = "shuttle"))]
pub(crate) use tokio::{
    spawn,
    sync::{Notify, Semaphore, futures, watch},
    task::yield_now,
    time,
};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle_tokio::{
    sync::{Notify, Semaphore, futures, watch},
    task::yield_now,
    time,
};

/// The panic of a task that a scenario wants. Any other ends the exploration.
#[cfg(feature = "shuttle")]
pub(crate) struct WantedPanic;

/// Spawns a task. As in tokio, its panic drops the task and nothing else.
#[cfg(feature = "shuttle")]
pub(crate) fn spawn<F>(work: F) -> shuttle_tokio::task::JoinHandle<Option<F::Output>>
where
    F: Future<Output: Send> + Send + 'static,
{
    use futures_util::FutureExt;

    shuttle_tokio::spawn(async move {
        let ended = std::panic::AssertUnwindSafe(work).catch_unwind().await;
        match ended {
            Ok(output) => Some(output),
            Err(panic) if panic.is::<WantedPanic>() => None,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
