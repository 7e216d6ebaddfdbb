//! Requests as the read path makes them, without HTTP, pictures and memory for bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};

use crate::image::{ImageId, MediaType, Metadata, Version};
use crate::index::{Admission, Digest, FetchLease, FetchResult, Index, Known, Lookup};
use crate::store::redis::RedisStore;

pub(super) const MEMORY: &str = "memory";

/// Longest time that a request waits for the store.
const PATIENCE: Duration = Duration::from_secs(2);

/// The value of a key, 0 for none; `None` if the store didn't answer.
type Outcome = Option<u64>;

/// The index and the store under test.
#[derive(Clone)]
pub(super) struct Reader {
    pub(super) index: Arc<Index<Outcome>>,
    pub(super) store: Arc<RedisStore>,
    /// The numbers of the values that were read, by version.
    pub(super) numbers: Arc<Mutex<HashMap<Version, u64>>>,
}

/// An answer that counts as current.
pub(super) struct Answer {
    pub(super) number: u64,
    /// Memory or the store.
    pub(super) source: &'static str,
}

impl Reader {
    /// Reads a key; `None` for a failure, and for what is marked as stale.
    pub(super) async fn read(&self, id: &ImageId) -> Option<Answer> {
        let looked_up = loop {
            match self.index.look_up(id) {
                Ok(found) => break found,
                // Until the lease is renewed or the connection is lost.
                Err(renewed) => timeout(PATIENCE, renewed).await.ok()?,
            }
        };
        let flight = match looked_up {
            Lookup::Current(known) => {
                return Some(Answer { number: self.number_of(&known), source: MEMORY });
            }
            Lookup::Stale(_) | Lookup::Ask(Admission::Full) => return None,
            Lookup::Ask(Admission::Join(flight)) => flight,
            Lookup::Ask(Admission::Lead(lease)) => {
                let flight = lease.flight();
                tokio::spawn(self.clone().lead(lease));
                flight
            }
        };
        let number = flight.outcome().await.ok()??;
        Some(Answer { number, source: "the store" })
    }

    async fn lead(self, mut lease: FetchLease<Outcome>) {
        let deadline = Instant::now() + PATIENCE;
        let fetch = async {
            lease.mark_sent().await;
            let size = self.store.size(lease.id()).await.ok()?;
            self.store.get(lease.id(), size).await.ok()
        };
        let Some(stored) = timeout_at(deadline, fetch).await.ok().flatten() else {
            return lease.complete(None);
        };
        let (known, digest, number) = match stored {
            None => (Known::Absent, None, 0),
            Some(stored) => {
                let version = Version::of(&stored.value);
                let number = std::str::from_utf8(&stored.value).unwrap().parse().unwrap();
                self.numbers.lock().unwrap().insert(version, number);
                let metadata = Metadata::new(version, MediaType::Png, 1, None);
                (Known::Present(Arc::new(metadata)), Some(Digest::of(&stored.value)), number)
            }
        };
        lease.keep(FetchResult { known, digest, expires: None });
        lease.complete(Some(number));
    }

    pub(super) fn number_of(&self, known: &Known) -> u64 {
        known.version().map_or(0, |version| self.numbers.lock().unwrap()[&version])
    }
}
