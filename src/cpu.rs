//! CPU work on blocking threads, at most one piece per core.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// Work on up to this many bytes runs where it is: it takes less than a fifth of a millisecond, and moving it to another
/// thread would cost a share of that.
const INLINE_LIMIT: usize = 64 * 1024;

/// A permit per core for work that takes longer than an async worker may be held up.
#[derive(Debug, Clone)]
pub struct Cpu(Arc<Semaphore>);

impl Cpu {
    /// One permit for each of `cores`.
    #[must_use]
    pub fn new(cores: usize) -> Cpu {
        Cpu(Arc::new(Semaphore::new(cores)))
    }

    /// Runs work on a blocking thread as soon as a core is free for it. The work must not panic.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let permit = Arc::clone(&self.0).acquire_owned().await;
        let work = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        work.await.expect("the work doesn't panic, and the runtime ends after its requests")
    }

    /// Runs work on `length` bytes: in place if they are few, otherwise like [`Cpu::run`].
    pub async fn run_on<T: Send + 'static>(
        &self,
        length: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        if length <= INLINE_LIMIT { work() } else { self.run(work).await }
    }
}
