//! Changes that a watched store announces, and the coherence that they maintain.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootInstant;
use crate::image::ImageId;

/// An announcement of a watched store.
#[derive(Debug, Clone)]
pub enum Change {
    /// From now on every change is announced over the connection with this number. Numbers only grow.
    TrackingStarted {
        /// Counted from 1.
        connection: u64,
        /// Validity of the announcement.
        lease: Lease,
    },
    /// Every change up to now has been announced over this connection.
    Heartbeat {
        /// Number of the connection.
        connection: u64,
        /// Validity of the announcement.
        lease: Lease,
        /// Time that the store took to answer.
        round_trip: Duration,
    },
    /// This process has run all along, so the last heartbeat is still to be relied upon.
    Awake {
        /// Number of the connection.
        connection: u64,
        /// Validity of the announcement.
        lease: Lease,
    },
    /// Result of a probe while changes aren't announced: the store answers, or it doesn't.
    Probed(Coherence),
    /// From now on nothing is announced over this connection.
    TrackingLost {
        /// Number of the connection.
        connection: u64,
        /// The last time at which every change was certainly announced.
        last_heard: BootInstant,
        /// The state that remains.
        coherence: Coherence,
    },
    /// This key was written or removed, or has expired.
    Invalidated(ImageId),
    /// Any key may have changed.
    Flushed,
}

/// Time for which announcements may be relied upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// For ever: all changes are made in this process.
    Endless,
    /// Up to this time, unless a heartbeat renews it.
    Until(BootInstant),
}

/// State of a store's announcements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Coherence {
    /// Every change is announced: metadata is current until then.
    Coherent,
    /// The store answers and doesn't announce changes, for this reason: every request asks it.
    Unverified(Arc<str>),
    /// The store doesn't answer, for this reason.
    Unreachable(Arc<str>),
}

impl Coherence {
    /// The names of all states.
    pub const NAMES: [&'static str; 3] = ["coherent", "unverified", "unreachable"];

    /// The name of the state, for people and machines.
    #[must_use]
    pub fn name(&self) -> &'static str {
        let [coherent, unverified, unreachable] = Coherence::NAMES;
        match self {
            Coherence::Coherent => coherent,
            Coherence::Unverified(_) => unverified,
            Coherence::Unreachable(_) => unreachable,
        }
    }

    /// The reason for not being coherent.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Coherence::Coherent => None,
            Coherence::Unverified(reason) | Coherence::Unreachable(reason) => Some(reason),
        }
    }
}

/// Callback for the changes of a store. It must not block.
#[derive(Clone)]
pub struct ChangeListener(Arc<dyn Fn(Change) + Send + Sync>);

impl ChangeListener {
    /// Wraps a function that applies each change.
    pub fn new(apply: impl Fn(Change) + Send + Sync + 'static) -> ChangeListener {
        ChangeListener(Arc::new(apply))
    }

    pub(super) fn notify(&self, change: Change) {
        (self.0)(change);
    }
}

impl fmt::Debug for ChangeListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChangeListener")
    }
}
