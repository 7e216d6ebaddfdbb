//! Passes changes on to the parts, in the one order that is right.

use std::sync::Arc;

use crate::events::Hub;
use crate::image::ImageId;
use crate::index::Index;
use crate::metrics::Metrics;
use crate::offload::Mover;
use crate::read::Outcome;
use crate::store::Change;

/// The parts that learn of changes.
#[derive(Debug, Clone)]
pub(crate) struct Changes {
    /// Times pushes and counts them.
    pub metrics: Arc<Metrics>,
    /// Invalidates what it knows.
    pub index: Arc<Index<Outcome>>,
    /// Tells browsers.
    pub events: Arc<Hub>,
    /// Moves what was written, if an object store is configured.
    pub mover: Option<Arc<Mover>>,
}

impl Changes {
    /// Passes on a change that the store reports.
    pub(crate) fn apply(&self, change: &Change) {
        match change {
            Change::Invalidated(id) => {
                self.metrics.invalidations.inc();
                self.metrics.push_received(id);
            }
            Change::Flushed => {
                self.metrics.invalidations.inc();
            }
            Change::Heartbeat { round_trip, .. } => self.metrics.observe_heartbeat(*round_trip),
            Change::TrackingLost { .. } => self.metrics.expect_no_pushes(),
            Change::TrackingStarted { .. } | Change::Awake { .. } | Change::Probed(_) => {}
        }
        // The index comes first: the others read, and must not be shown what was there before.
        self.index.apply(change.clone());
        self.events.apply(change);
        if let Some(mover) = &self.mover {
            mover.apply(change);
        }
    }

    /// Passes on a write that this server has made. The push reports it too, but later; a client that has read the answer
    /// to the write must not be served the version before it. The mover leaves it to the push.
    pub(crate) fn apply_own_write(&self, id: &ImageId) {
        let change = Change::Invalidated(id.clone());
        self.index.apply(change.clone());
        self.events.apply(&change);
    }
}
