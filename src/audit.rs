//! The auditor (`[audit]`): compares a sample of what the index claims to be current with the store, and counts what isn't.
//!
//! It proves nothing and mends nothing. It turns "nothing stale in our tests" into a figure that every operator sees.

use std::sync::Arc;
use std::time::Duration;

use crate::budget::FetchBudget;
use crate::cpu::Cpu;
use crate::index::{Claim, ClaimedContent, Digest, Index};
use crate::metrics::Metrics;
use crate::read::Outcome;
use crate::settings::AuditSettings;
use crate::store::{Store, StoreError};
use crate::task::Task;

/// Time for the push of a change that was found before it. A claim that outlives this is stale.
const GRACE: Duration = Duration::from_secs(1);

/// Compares claims of the index with the store.
#[derive(Debug)]
pub(crate) struct Auditor {
    pub(crate) index: Arc<Index<Outcome>>,
    pub(crate) store: Arc<Store>,
    pub(crate) budget: Arc<FetchBudget>,
    pub(crate) cpu: Cpu,
    pub(crate) metrics: Arc<Metrics>,
}

impl Auditor {
    /// Starts the audits, unless they are off.
    pub(crate) fn start(self, settings: &AuditSettings) -> Option<Task> {
        let (interval, entries) = (settings.interval, settings.entries.get());
        (!interval.is_zero()).then(|| Task::start("auditor", self.run(interval, entries)))
    }

    async fn run(self, interval: Duration, entries: usize) {
        loop {
            tokio::time::sleep(interval).await;
            let mut doubtful = Vec::new();
            for claim in self.index.sample(entries) {
                match self.holds(&claim).await {
                    Some(true) => {
                        self.metrics.audit_checked.inc();
                    }
                    Some(false) => doubtful.push(claim),
                    None => {}
                }
            }
            if doubtful.is_empty() {
                continue;
            }
            // All of them at once: the push of each has been on its way for long enough.
            tokio::time::sleep(GRACE).await;
            for claim in doubtful {
                self.metrics.audit_checked.inc();
                if self.index.still_claims(&claim) {
                    self.metrics.audit_stale.inc();
                    tracing::error!(id = %claim.id, "stale: the store has another value than the index claims");
                }
            }
        }
    }

    /// True if the store holds what the index claims; `None` if it can't be told now.
    async fn holds(&self, claim: &Claim) -> Option<bool> {
        let unreadable = Some(claim.content == ClaimedContent::Unreadable);
        let size = match self.store.size(&claim.id).await {
            Ok(size) => size,
            Err(StoreError::WrongType | StoreError::TooLarge { .. }) => return unreadable,
            Err(_) => return None,
        };
        let _reservation = self.budget.reserve(None, size).await.ok()?;
        let content = match self.store.get(&claim.id, size).await {
            Ok(None) => ClaimedContent::Absent,
            Ok(Some(stored)) => {
                let value = stored.value;
                let digest = self.cpu.run_on(value.len(), move || Digest::of(&value)).await;
                ClaimedContent::Value(digest)
            }
            Err(StoreError::WrongType | StoreError::TooLarge { .. }) => return unreadable,
            Err(_) => return None,
        };
        Some(content == claim.content)
    }
}
