//! One fetch from the store, for all requests that wait for it.

use std::sync::Arc;

use futures_util::FutureExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::Reader;
use super::answer::{ReadError, ReadFailure, Timing};
use super::decode::Opened;
use crate::budget::OverBudget;
use crate::cache::Insertion;
use crate::cache_status::CacheStatus;
use crate::clock::BootInstant;
use crate::coalesce::Lost;
use crate::image::record::Corrupt;
use crate::image::{Image, ImageId};
use crate::index::{Admission, Digest, FetchLease, FetchResult, Known};
use crate::limit::Turn;
use crate::metrics::Shed;
use crate::offload::RemoteImage;
use crate::peer::PeerKey;
use crate::store::StoreError;

/// The outcome that one fetch brings to all who wait for it.
pub(crate) type Outcome = Result<Fetch, FetchError>;

/// The result of a fetch that the store answered.
#[derive(Debug, Clone)]
pub struct Fetch {
    found: Found,
    /// The expiry of the value.
    expires: Option<BootInstant>,
    timing: Timing,
}

/// The content of a key.
#[derive(Debug, Clone)]
enum Found {
    /// An image, whose bytes were in memory (`None`) or were decoded and inserted.
    Image(Image, Option<Insertion>),
    /// An image in the object store.
    Offloaded(Arc<RemoteImage>),
    /// A value that is no image.
    Corrupt(Corrupt),
    /// No value.
    Absent,
}

/// Reasons for a failed fetch.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    /// The store didn't answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Memory is full.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// Nobody waits for it any more.
    #[error("the fetch was given up, since nobody waits for it")]
    GivenUp,
}

impl From<FetchError> for ReadError {
    fn from(error: FetchError) -> ReadError {
        match error {
            FetchError::Store(error) => ReadError::Store(error),
            FetchError::OverBudget(error) => ReadError::OverBudget(error),
            FetchError::GivenUp => ReadError::Lost(Lost),
        }
    }
}

/// An image that a fetch found.
pub(super) enum Fetched {
    /// With its bytes.
    Image(Image),
    /// In the object store.
    Remote(Arc<RemoteImage>),
}

impl Reader {
    /// Waits for the fetch that this request joins or leads.
    pub(super) async fn fetch(
        self: &Arc<Self>,
        id: &ImageId,
        client: Option<PeerKey>,
        mut admission: Admission<Outcome>,
    ) -> Result<(Fetched, CacheStatus, Timing), ReadFailure> {
        let (mut is_first, mut turn) = (true, None);
        let (Fetch { found, timing, .. }, collapsed) = loop {
            let (flight, collapsed) = match admission {
                Admission::Join(flight) => {
                    turn = None;
                    self.metrics.collapsed.inc();
                    (flight, true)
                }
                Admission::Lead(lease) => {
                    if turn.is_none()
                        && let Some(client) = client
                    {
                        turn = self.turns.take(client).now_or_never();
                        if turn.is_none() {
                            // Whoever else asks for this image meanwhile leads, rather than wait for this client's turns as well.
                            lease.complete(Err(OverBudget::FetchShare.into()));
                            turn = Some(self.wait_for_turn(client).await?);
                            admission = self.index.ask(id);
                            continue;
                        }
                    }
                    let flight = lease.flight();
                    // A task of its own: it ends by itself, within the store's time-outs. If it panics, it drops its lease, and
                    // those who wait are told.
                    tokio::spawn(Arc::clone(self).lead(lease, client, turn.take()));
                    (flight, false)
                }
                Admission::Full => {
                    self.metrics.count_shed(Shed::Waiters);
                    return Err(ReadFailure::unknown(ReadError::Busy));
                }
            };
            let outcome = flight.outcome().await.map_err(ReadFailure::unknown)?;
            // It is another client that has its share.
            if let Err(FetchError::OverBudget(OverBudget::FetchShare)) = outcome
                && collapsed
                && std::mem::take(&mut is_first)
            {
                admission = self.index.ask(id);
                continue;
            }
            let fetch = outcome.map_err(ReadFailure::unknown)?;
            // A request that joined late may have begun after the value expired.
            if collapsed && fetch.expires.is_some_and(|expires| self.index.clock().now() >= expires)
            {
                admission = self.index.ask(id);
            } else {
                break (fetch, collapsed);
            }
        };
        let not_stored = CacheStatus::Fetched { collapsed, stored: false };
        let error = match found {
            Found::Image(image, None) => {
                let status = CacheStatus::Revalidated { collapsed };
                return Ok((Fetched::Image(image), status, timing));
            }
            Found::Image(image, Some(insertion)) => {
                let stored = insertion == Insertion::Stored;
                let status = CacheStatus::Fetched { collapsed, stored };
                return Ok((Fetched::Image(image), status, timing));
            }
            Found::Offloaded(remote) => return Ok((Fetched::Remote(remote), not_stored, timing)),
            Found::Absent => ReadError::Absent,
            Found::Corrupt(corrupt) => ReadError::Corrupt(corrupt),
        };
        Err(ReadFailure { error, cache_status: Some(not_stored), timing })
    }

    /// Waits for a client's turn to fetch. If it doesn't come in time, that is because of the client's own fetches, and says nothing
    /// of the store.
    async fn wait_for_turn(&self, client: PeerKey) -> Result<Turn<PeerKey>, ReadFailure> {
        let turn = timeout(self.patience, self.turns.take(client)).await;
        turn.map_err(|_elapsed| ReadFailure::unknown(OverBudget::FetchShare))
    }

    /// Fetches an image for all who wait, and keeps what it found before they are told. The turn lasts until then.
    ///
    /// A push that comes meanwhile may be that of the very value that was read. Then the image is fetched once more, for
    /// nobody in particular: otherwise an outage would find its bytes in memory and nothing known of them.
    async fn lead(
        self: Arc<Self>,
        lease: FetchLease<Outcome>,
        client: Option<PeerKey>,
        _turn: Option<Turn<PeerKey>>,
    ) {
        let id = lease.id().clone();
        if self.lead_once(lease, client, FetchLease::give_up_if_unwanted).await
            && let Admission::Lead(lease) = self.index.ask(&id)
        {
            self.lead_once(lease, client, |_| false).await;
        }
    }

    /// Returns true if a change has overtaken an image on its way. A fetch that is given up costs the store no more than the
    /// question for a length.
    async fn lead_once(
        &self,
        mut lease: FetchLease<Outcome>,
        client: Option<PeerKey>,
        is_given_up: impl Fn(&FetchLease<Outcome>) -> bool,
    ) -> bool {
        // One deadline for all that the store is waited for, so that time-outs don't add up.
        let deadline = Instant::now() + self.patience;
        let asked = async {
            timeout_at(deadline, lease.mark_sent())
                .await
                .map_err(|_elapsed| StoreError::TimedOut)?;
            if is_given_up(&lease) {
                return Err(FetchError::GivenUp);
            }
            self.metrics.fetches.inc();
            self.ask_store(lease.id(), client, deadline, || is_given_up(&lease)).await
        };
        let asked = asked.await;
        let outcome = asked.map(|(fetch, digest)| {
            let known = match &fetch.found {
                Found::Image(image, _) => Known::Present(Arc::clone(&image.original.metadata)),
                Found::Offloaded(remote) => Known::Offloaded(Arc::clone(remote)),
                Found::Corrupt(corrupt) => Known::Corrupt(corrupt.clone()),
                Found::Absent => Known::Absent,
            };
            let result = FetchResult { known, digest, expires: fetch.expires };
            if let Some(version) = lease.keep(result) {
                self.cache.remove(lease.id(), version);
            }
            fetch
        });
        if let Err(FetchError::Store(error)) = &outcome {
            self.metrics.count_store_error(error);
        }
        let is_image = outcome
            .as_ref()
            .is_ok_and(|it| matches!(it.found, Found::Image(..) | Found::Offloaded(_)));
        let is_overtaken = is_image && lease.is_overtaken();
        lease.complete(outcome);
        is_overtaken
    }

    /// Asks the store, and decodes its answer.
    async fn ask_store(
        &self,
        id: &ImageId,
        client: Option<PeerKey>,
        deadline: Instant,
        is_given_up: impl Fn() -> bool,
    ) -> Result<(Fetch, Option<Digest>), FetchError> {
        let began = Instant::now();
        let too_late = |_elapsed| StoreError::TimedOut;
        let value = async {
            let size = timeout_at(deadline, self.store.size(id)).await.map_err(too_late)??;
            // Memory for the value, until it is decoded and dropped.
            let left = deadline.saturating_duration_since(Instant::now());
            let reservation = self.budget.reserve_within(client, size, left).await?;
            if is_given_up() {
                return Err(FetchError::GivenUp);
            }
            // The time to live is counted from before the question, so that an expiry is never later here than there.
            let asked = self.index.clock().now();
            let stored =
                timeout_at(deadline, self.store.get(id, size)).await.map_err(too_late)??;
            Ok::<_, FetchError>((stored, asked, reservation))
        };
        let value = value.await;
        let mut timing = Timing { store: began.elapsed(), ..Timing::default() };
        let without_value = |found| Ok((Fetch { found, expires: None, timing }, None));
        let (stored, asked, _reservation) = match value {
            Ok(value) => value,
            Err(FetchError::Store(StoreError::WrongType)) => {
                return without_value(self.unreadable(id, Corrupt::WrongType));
            }
            Err(FetchError::Store(StoreError::TooLarge { size, limit })) => {
                return without_value(self.unreadable(id, Corrupt::TooLarge { size, limit }));
            }
            Err(error) => return Err(error),
        };
        let Some(stored) = stored else {
            return without_value(Found::Absent);
        };
        let expires = stored.time_to_live.map(|left| asked + left);
        let (opened, digest, decoding) = self.decode(id, stored.value).await;
        timing.hash = decoding.hash;
        timing.decode = decoding.decode;
        let found = match opened {
            Opened::InMemory(image) => Found::Image(image, None),
            Opened::Decoded(original) => {
                let began = Instant::now();
                let (image, insertion) = self.originals.admit(id, original).await;
                timing.decode += began.elapsed();
                Found::Image(image, Some(insertion))
            }
            Opened::Offloaded(remote) => Found::Offloaded(Arc::new(remote)),
            Opened::Corrupt(corrupt) => Found::Corrupt(corrupt),
        };
        Ok((Fetch { found, expires, timing }, Some(digest)))
    }

    /// A value that the store doesn't hand out is a corrupt record.
    fn unreadable(&self, id: &ImageId, corrupt: Corrupt) -> Found {
        self.corrupt_log.report(id, None, &corrupt);
        Found::Corrupt(corrupt)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::time::Duration;

    use futures_util::poll;

    use super::super::FETCHES_EACH;
    use super::*;
    use crate::server::tests::app;

    #[tokio::test]
    async fn a_client_that_waits_for_its_turns_keeps_no_other_waiting() {
        let (app, _dir) = app(&[]).await;
        let (reader, id) = (&app.reader, ImageId::parse("a").unwrap());
        let [busy, other] = [1, 2].map(|end| PeerKey::V4([192, 0, 2, end].into()));
        let mut turns = Vec::new();
        for _ in 0..FETCHES_EACH {
            turns.push(reader.turns.take(busy).await);
        }
        let is_absent = |opened: Result<_, ReadFailure>| {
            matches!(opened.map(drop).unwrap_err().error, ReadError::Absent)
        };
        let mut first = pin!(reader.open(&id, Some(busy)));
        assert!(poll!(&mut first).is_pending());
        let second = timeout(Duration::from_secs(20), reader.open(&id, Some(other))).await;
        assert!(is_absent(second.expect("it waits for the turns of the busy client")));
        assert!(poll!(&mut first).is_pending());
        turns.pop();
        assert!(is_absent(first.await));
    }
}
