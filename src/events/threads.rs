//! Orders of threads and tasks around streams of events: see [`crate::threads`].
//!
//! The hub, the streams and their subscriptions are the real ones. The store and the maker of events are a few numbers here.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use shuttle::future::block_on;
use shuttle::thread;

use super::content::{Encode, Event, ImageState, Inline, Unknown};
use super::{Followed, Hub, Subscription};
use crate::image::{ImageId, Version};
use crate::index::{Index, IndexLimits};
use crate::metrics::Metrics;
use crate::read::Reader;
use crate::store::Change;
use crate::sync::{Mutex, spawn, yield_now};
use crate::threads::explore;

/// State of each image in the end. Every change makes the number greater.
const LAST: u8 = 3;

/// Most ids that a stream holds, and that a subscription does: those that are due, and the events that were made.
const MOST_HELD: (usize, usize) = (2, 4);

/// Stands in for the maker of events: the state of an image is a number.
#[derive(Debug, Default)]
pub(super) struct EventMaker(Mutex<HashMap<ImageId, u8>>);

impl EventMaker {
    pub(super) fn new(_: Arc<Reader>, _: Encode, _: usize) -> EventMaker {
        unreachable!("an exploration starts no server")
    }

    fn number(&self, id: &ImageId) -> u8 {
        let numbers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.get(id).copied().unwrap_or_default()
    }

    fn set(&self, id: &ImageId, number: u8) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), number);
    }

    /// The event of the state now. Some states are read slowly.
    pub(super) async fn event(
        self: &Arc<Self>,
        id: &ImageId,
        _inline: Inline,
        sent: Option<ImageState>,
    ) -> Result<Option<Event>, Unknown> {
        let number = self.number(id);
        let state = ImageState::Present(Version::of(&[number]));
        if sent == Some(state) {
            return Ok(None);
        }
        if number % 2 == 1 {
            yield_now().await;
        }
        Ok(Some(Event { state, text: format!("{id} {number}").into() }))
    }

    #[expect(clippy::unused_self, reason = "as the real one")]
    pub(super) fn list(&self, prefix: &str, _complete: bool, _ids: &[ImageId]) -> Bytes {
        format!("{prefix} list").into()
    }

    #[expect(clippy::unused_self, reason = "as the real one")]
    pub(super) fn resync(&self, prefix: &str) -> Bytes {
        format!("{prefix} resync").into()
    }
}

/// The parts that a scenario needs. Those that it doesn't explore are made once.
#[derive(Clone)]
struct Parts {
    index: Arc<Index<crate::read::Outcome>>,
    metrics: Arc<Metrics>,
}

impl Parts {
    fn new() -> Parts {
        let many = NonZeroUsize::new(8).unwrap();
        let limits = IndexLimits {
            entries: many,
            absent: many,
            waiters: 8,
            fetches: 8,
            serve_stale_for: Duration::ZERO,
        };
        Parts { index: Arc::new(Index::new(limits)), metrics: Arc::new(Metrics::new()) }
    }
}

/// A hub, its streams and the images.
#[derive(Clone)]
struct World {
    parts: Parts,
    hub: Arc<Hub>,
    maker: Arc<EventMaker>,
}

fn id(text: &str) -> ImageId {
    ImageId::parse(text).unwrap()
}

fn ids() -> [ImageId; 2] {
    [id("a1"), id("a2")]
}

impl World {
    fn new(parts: &Parts) -> World {
        World { parts: parts.clone(), hub: Arc::default(), maker: Arc::default() }
    }

    fn subscribe(&self, followed: Followed) -> Subscription {
        Subscription::explored(&self.hub, &self.maker, &self.parts.metrics, followed)
    }

    fn subscribe_to_ids(&self) -> Subscription {
        self.subscribe(Followed::Ids(ids().into()))
    }

    /// Changes both images, each in a thread of its own. All changes of the first are announced. The change of the second
    /// is, too, or only that everything may have changed.
    fn change(&self, everything: bool) -> [thread::JoinHandle<()>; 2] {
        let ([first, second], one, other) = (ids(), self.clone(), self.clone());
        let one = thread::spawn(move || {
            for number in 1..=LAST {
                one.maker.set(&first, number);
                one.hub.apply(&Change::Invalidated(first.clone()));
            }
        });
        let other = thread::spawn(move || {
            other.maker.set(&second, LAST);
            let change =
                if everything { Change::Flushed } else { Change::Invalidated(second.clone()) };
            other.hub.apply(&change);
        });
        [one, other]
    }

    /// Reads a stream until it has told the newest state of both images. If a change or a wakeup is lost, it never does.
    async fn read_to_the_end(&self, subscription: &mut Subscription) -> (usize, usize) {
        let mut told = HashMap::new();
        let (mut events, mut resyncs) = (0, 0);
        while ids().iter().any(|id| told.get(id) != Some(&LAST)) {
            let (stream, own) = subscription.held();
            assert!(stream <= MOST_HELD.0 && own <= MOST_HELD.1, "{stream} and {own} ids");
            let event = subscription.next().await.expect("a stream doesn't end by itself");
            let event = std::str::from_utf8(&event).unwrap();
            let (name, state) = event.split_once(' ').unwrap();
            if state == "resync" {
                resyncs += 1;
                told = ids().map(|id| (id.clone(), self.maker.number(&id))).into();
                continue;
            }
            events += 1;
            let number = state.parse().unwrap();
            let before = told.insert(id(name), number);
            assert!(
                before.is_none_or(|before| before <= number),
                "an older state after a newer one"
            );
        }
        (events, resyncs)
    }

    /// Runs a future beside the task that passes changes on.
    async fn with_dispatch<T>(&self, work: impl Future<Output = T>) -> T {
        let world = self.clone();
        let dispatch = spawn(async move {
            world.hub.dispatch(&world.parts.index, Duration::MAX).await;
        });
        let done = work.await;
        dispatch.abort();
        let _aborted = dispatch.await;
        done
    }
}

/// Reads one stream while images change.
fn explore_one(
    name: &str,
    situations: &[&str],
    everything: bool,
    followed: impl Fn() -> Followed + Clone + Send + Sync + 'static,
) {
    let parts = Parts::new();
    explore(name, 500, situations, move |reached| {
        let world = World::new(&parts);
        let mut subscription = world.subscribe(followed());
        let writers = world.change(everything);
        block_on(world.with_dispatch(async {
            let (events, resyncs) = world.read_to_the_end(&mut subscription).await;
            for (is_reached, situation) in [
                (events < 4, "skipped a state"),
                (events > 2, "told a state in between"),
                (resyncs > 0, "resync"),
            ] {
                if is_reached {
                    reached.note(situation);
                }
            }
            assert!(everything || resyncs == 0);
        }));
        for writer in writers {
            writer.join().unwrap();
        }
        drop(subscription);
        assert!(world.hub.is_unused());
    });
}

#[test]
fn a_stream_tells_the_newest_state_however_slowly_it_is_read() {
    let followed = || Followed::Ids(ids().into());
    let situations = ["skipped a state", "told a state in between"];
    explore_one("a slow reader gets the newest state", &situations, false, followed);
    explore_one("and so it does when everything changes", &situations, true, followed);
}

#[test]
fn a_stream_of_changes_tells_each_change_or_that_it_may_have_missed_some() {
    let followed = || Followed::Changes("a".to_owned());
    explore_one("a stream of changes", &["told a state in between"], false, followed);
    explore_one("a stream of changes of everything", &["resync"], true, followed);
}

#[test]
fn a_stream_that_ends_while_it_is_told_leaves_the_others_alone() {
    let (parts, situations) = (Parts::new(), ["ended early"]);
    explore("a stream ends while it is told", 350, &situations, move |reached| {
        let world = World::new(&parts);
        let (mut stays, mut leaves) = (world.subscribe_to_ids(), world.subscribe_to_ids());
        let writers = world.change(true);
        block_on(world.with_dispatch(async {
            let (reached, other) = (reached.clone(), world.clone());
            let first = spawn(async move {
                leaves.next().await;
                if ids().iter().any(|id| other.maker.number(id) != LAST) {
                    reached.note("ended early");
                }
                drop(leaves);
            });
            let other = world.clone();
            let late = spawn(async move {
                let mut subscription = other.subscribe_to_ids();
                other.read_to_the_end(&mut subscription).await;
            });
            world.read_to_the_end(&mut stays).await;
            first.await.unwrap();
            late.await.unwrap();
        }));
        for writer in writers {
            writer.join().unwrap();
        }
        drop(stays);
        assert!(world.hub.is_unused());
    });
}
