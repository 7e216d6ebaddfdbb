//! Listings: which images with a prefix there are, for all streams that wait for it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::stream::Stream;
use crate::image::ImageId;
use crate::sync::yield_now;

/// Longest time that work for many streams goes on before others have their turn.
#[cfg(not(feature = "shuttle"))]
const SLICE: Duration = Duration::from_micros(250);

/// An exploration is the same each time, whatever the clock shows: others have their turn always.
#[cfg(feature = "shuttle")]
const SLICE: Duration = Duration::ZERO;

/// A listing visits every key of the store. So at most one third of the time is spent on them, but for the first moment.
const SHARE: u32 = 3;
const AHEAD: Duration = Duration::from_secs(3);

/// Longest pause before a listing.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The images with a prefix, as they were listed. All streams with the prefix share it.
#[derive(Debug)]
pub(super) struct Listing {
    /// No more than a stream may name.
    pub(super) ids: Vec<ImageId>,
    /// There were no more than these.
    pub(super) complete: bool,
    /// Position in the log of changes when it began: what has changed from there on may differ.
    pub(super) began: u64,
}

/// Work for many streams, in slices.
#[derive(Debug)]
pub(super) struct Slices(std::time::Instant);

impl Slices {
    pub(super) fn begin() -> Slices {
        Slices(std::time::Instant::now())
    }

    /// Lets others have their turn, if it is time.
    pub(super) async fn pause(&mut self) {
        if self.0.elapsed() >= SLICE {
            yield_now().await;
            self.0 = std::time::Instant::now();
        }
    }
}

/// Bounds the time that listings take.
#[derive(Debug)]
pub(super) struct Pace {
    /// Time at which all listings up to now would be paid for.
    paid: Instant,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Pace {
        Pace { paid: now }
    }

    /// Time until the next listing may begin.
    pub(super) fn pause(&self, now: Instant) -> Duration {
        self.paid.saturating_duration_since(now).saturating_sub(AHEAD)
    }

    /// Notes a listing that has ended now.
    pub(super) fn note(&mut self, began: Instant, now: Instant) {
        let paid = self.paid.max(began) + (now - began) * SHARE;
        self.paid = paid.min(now + AHEAD + LONGEST_PAUSE);
    }
}

/// The streams with one prefix that wait for a listing.
#[derive(Debug)]
pub(super) struct Waiting {
    /// With the number of the listing that each waits for.
    pub(super) streams: Vec<(Arc<Stream>, u64)>,
    ids: Vec<ImageId>,
    /// The same: a listing may name an id twice.
    found: HashSet<ImageId>,
}

impl Waiting {
    pub(super) fn new(streams: Vec<(Arc<Stream>, u64)>) -> Waiting {
        Waiting { streams, ids: Vec::new(), found: HashSet::new() }
    }

    /// Adds an id that was found; false if there are `most` already.
    fn add(&mut self, id: &ImageId, most: usize) -> bool {
        if self.found.contains(id) {
            return true;
        }
        if self.ids.len() == most {
            return false;
        }
        self.found.insert(id.clone());
        self.ids.push(id.clone());
        true
    }

    /// True unless all clients have left.
    fn is_wanted(&self) -> bool {
        self.streams.iter().any(|(stream, _)| Arc::strong_count(stream) > 1)
    }

    /// Hands its listing to each stream.
    pub(super) async fn end(self, complete: bool, began: u64, slices: &mut Slices) -> Arc<Listing> {
        let listing = Arc::new(Listing { ids: self.ids, complete, began });
        for some in self.streams.chunks(64) {
            for (stream, number) in some {
                stream.end_listing(*number, &listing);
            }
            slices.pause().await;
        }
        listing
    }
}

/// All that wait for one listing, by their prefixes.
#[derive(Debug, Default)]
pub(super) struct AllWaiting {
    by_prefix: HashMap<String, Waiting>,
    lengths: BTreeSet<usize>,
}

impl AllWaiting {
    pub(super) fn add(&mut self, prefix: String, waiting: Waiting) {
        self.lengths.insert(prefix.len());
        self.by_prefix.insert(prefix, waiting);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_prefix.is_empty()
    }

    /// The beginning that all prefixes have in common.
    pub(super) fn common_prefix(&self) -> String {
        let common = self.by_prefix.keys().map(String::as_str).reduce(|common, prefix| {
            let same = common.bytes().zip(prefix.bytes()).take_while(|(a, b)| a == b).count();
            &common[..same]
        });
        common.unwrap_or_default().to_owned()
    }

    /// Adds ids that were found. Gives those who have `most` by now, which are not all.
    pub(super) async fn found(
        &mut self,
        ids: &[ImageId],
        most: usize,
        slices: &mut Slices,
    ) -> Vec<(String, Waiting)> {
        let mut full = Vec::new();
        for id in ids {
            for length in self.lengths.iter().take_while(|length| **length <= id.as_str().len()) {
                let prefix = &id.as_str()[..*length];
                if let Some(waiting) = self.by_prefix.get_mut(prefix)
                    && !waiting.add(id, most)
                {
                    full.extend(self.by_prefix.remove_entry(prefix));
                }
            }
            slices.pause().await;
        }
        full
    }

    /// Drops those whose clients have all left.
    pub(super) fn drop_unwanted(&mut self) {
        self.by_prefix.retain(|_, waiting| waiting.is_wanted());
    }

    /// Gives those who have all that there are.
    pub(super) fn into_rest(self) -> impl Iterator<Item = (String, Waiting)> {
        self.by_prefix.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_take_no_more_than_their_share_of_the_time() {
        let start = Instant::now();
        let (mut pace, mut now, mut listed) = (Pace::new(start), start, Duration::ZERO);
        while now - start < Duration::from_mins(1) {
            let began = now + pace.pause(now);
            now = began + Duration::from_millis(300);
            pace.note(began, now);
            listed += now - began;
        }
        let share = listed.as_secs_f64() / (now - start).as_secs_f64();
        assert!((0.3..0.4).contains(&share), "{share}");
        // A long one doesn't keep others waiting for ever.
        let ended = now + Duration::from_mins(10);
        pace.note(now, ended);
        assert_eq!(pace.pause(ended), LONGEST_PAUSE);
    }

    #[tokio::test]
    async fn one_listing_serves_all_prefixes_up_to_their_bound() {
        let id = |text: &str| ImageId::parse(text).unwrap();
        let mut all = AllWaiting::default();
        for prefix in ["ab", "abc", "ax"] {
            all.add(prefix.to_owned(), Waiting::new(Vec::new()));
        }
        assert_eq!(all.common_prefix(), "a");
        let ids = ["abc1", "ab2", "ax1", "abc1", "abc3", "ab4", "b"].map(id);
        let full = all.found(&ids, 3, &mut Slices::begin()).await;
        let names = |waiting: &Waiting| -> Vec<String> {
            waiting.ids.iter().map(ToString::to_string).collect()
        };
        assert_eq!((full.len(), full[0].0.as_str()), (1, "ab"));
        assert_eq!(names(&full[0].1), ["abc1", "ab2", "abc3"]);
        let mut rest: Vec<_> = all.into_rest().map(|(it, waiting)| (it, names(&waiting))).collect();
        rest.sort();
        let expected = [("abc", vec!["abc1", "abc3"]), ("ax", vec!["ax1"])];
        let expected = expected.map(|(prefix, ids)| {
            (prefix.to_owned(), ids.into_iter().map(str::to_owned).collect::<Vec<_>>())
        });
        assert_eq!(rest, expected);
    }
}
