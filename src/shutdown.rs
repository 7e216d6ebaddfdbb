//! The server's way from serving to its end.

use std::sync::Arc;

use tokio::sync::watch;

/// Stages of a server's life, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Requests are answered.
    Serving,
    /// Requests are answered, but `/readyz` says no, and HTTP/1.1 answers close their connections.
    Stopping,
    /// Requests in progress are finished, and event streams end. No new connection is accepted.
    Draining,
    /// Connections are cut.
    Over,
}

/// The current [`Phase`], shared by all who have to know it. Clones share one phase.
#[derive(Debug, Clone)]
pub(crate) struct Shutdown(Arc<watch::Sender<Phase>>);

impl Shutdown {
    /// Begins in [`Phase::Serving`].
    #[must_use]
    pub(crate) fn new() -> Shutdown {
        Shutdown(Arc::new(watch::Sender::new(Phase::Serving)))
    }

    /// Moves on to a phase. There is no way back: an earlier phase changes nothing.
    pub(crate) fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|current| {
            let later = phase > *current;
            if later {
                *current = phase;
            }
            later
        });
    }

    /// Returns whether the server was told to stop.
    #[must_use]
    pub(crate) fn is_stopping(&self) -> bool {
        *self.0.borrow() >= Phase::Stopping
    }

    /// Waits until a phase has begun.
    pub(crate) async fn reached(&self, phase: Phase) {
        // The sender outlives this borrow, so there is no error.
        let _ = self.0.subscribe().wait_for(|current| *current >= phase).await;
    }
}

impl Default for Shutdown {
    fn default() -> Shutdown {
        Shutdown::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_go_forward_and_wake_those_who_wait() {
        let shutdown = Shutdown::new();
        assert!(!shutdown.is_stopping());
        let waiting = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.reached(Phase::Draining).await }
        });
        shutdown.advance(Phase::Over);
        shutdown.advance(Phase::Stopping);
        waiting.await.unwrap();
        shutdown.reached(Phase::Over).await;
        assert!(shutdown.is_stopping());
    }
}
