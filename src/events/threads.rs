//! Orders of threads and tasks around streams of events: see [`crate::threads`].
//!
//! The hub, the streams, their subscriptions and the listings are the real ones. The store and the maker of events are a few numbers
//! here: the state of each image, and 0 for one that is absent.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use shuttle::future::block_on;
use shuttle::thread;

use super::content::{Encode, Event, ImageState, Inline, Unknown};
use super::hub::ListIds;
use super::{Followed, Hub, Subscription};
use crate::image::{ImageId, Version};
use crate::index::{Index, IndexLimits};
use crate::metrics::Metrics;
use crate::read::Reader;
use crate::store::{self, Change, Cursor, Lease, StoreError};
use crate::sync::{Mutex, Notify, spawn, yield_now};
use crate::threads::explore;

/// State of each image in the end. Every change makes the number greater.
const LAST: u8 = 3;

/// Most ids that a stream holds, and that a subscription does: those that are due, and the events that were made.
const MOST_HELD: (usize, usize) = (2, 4);

/// Stands in for the maker of events: the state of an image is a number.
#[derive(Debug, Default)]
pub(super) struct EventMaker {
    numbers: Mutex<HashMap<ImageId, u8>>,
    /// Notified when a listing has looked for the first image.
    looked: Notify,
}

impl EventMaker {
    pub(super) fn new(_: Arc<Reader>, _: Encode, _: usize) -> EventMaker {
        unreachable!("an exploration starts no server")
    }

    fn number(&self, id: &ImageId) -> u8 {
        let numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.get(id).copied().unwrap_or_default()
    }

    fn set(&self, id: &ImageId, number: u8) {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), number);
    }

    /// The event of the state now. Some states are read slowly.
    pub(super) async fn event(
        self: &Arc<Self>,
        id: &ImageId,
        _inline: Inline,
        sent: Option<ImageState>,
    ) -> Result<Option<Event>, Unknown> {
        let number = self.number(id);
        let state = match number {
            0 => ImageState::Absent,
            _ => ImageState::Present(Version::of(&[number])),
        };
        if sent == Some(state) {
            return Ok(None);
        }
        if number % 2 == 1 {
            yield_now().await;
        }
        Ok(Some(Event { state, text: format!("{id} {number}").into() }))
    }

    #[expect(clippy::unused_self, reason = "as the real one")]
    pub(super) fn list(&self, prefix: &str, complete: bool, ids: &[ImageId]) -> Bytes {
        assert!(complete, "a stream may name all of these images");
        let ids: Vec<&str> = ids.iter().map(ImageId::as_str).collect();
        format!("{prefix} list {}", ids.join(",")).into()
    }

    #[expect(clippy::unused_self, reason = "as the real one")]
    pub(super) fn resync(&self, prefix: &str) -> Bytes {
        format!("{prefix} resync").into()
    }
}

/// Lists one image at a time.
impl ListIds for EventMaker {
    async fn list_ids(
        &self,
        _beginning: &str,
        from: Option<Cursor>,
    ) -> Result<store::Page, StoreError> {
        let at = from.map_or(0, |from| from.as_str().parse().unwrap());
        yield_now().await;
        let ids = listed().into_iter().skip(at).take(1).filter(|id| self.number(id) > 0).collect();
        if at == 0 {
            self.looked.notify_one();
        }
        let next = (at + 1 < listed().len()).then(|| Cursor::parse(&(at + 1).to_string()));
        Ok(store::Page { ids, next })
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
        let index = Index::new(limits);
        // Only then are listings kept for later streams.
        index.apply(Change::TrackingStarted { connection: 1, lease: Lease::Endless });
        Parts { index: Arc::new(index), metrics: Arc::new(Metrics::new()) }
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

/// The images of a scenario with listings. The last one is removed.
fn listed() -> [ImageId; 3] {
    [id("a1"), id("a2"), id("a3")]
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
        let ([first, second], one) = (ids(), self.clone());
        let one = thread::spawn(move || {
            for number in 1..=LAST {
                one.maker.set(&first, number);
                one.hub.apply(&Change::Invalidated(first.clone()));
            }
        });
        let change = if everything { Change::Flushed } else { Change::Invalidated(second.clone()) };
        [one, self.set(&second, LAST, change)]
    }

    /// Sets the state of an image and announces a change, in a thread.
    fn set(&self, id: &ImageId, number: u8, change: Change) -> thread::JoinHandle<()> {
        let (world, id) = (self.clone(), id.clone());
        thread::spawn(move || {
            world.maker.set(&id, number);
            world.hub.apply(&change);
        })
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

    /// Runs a future beside the tasks that pass changes on and list images.
    async fn with_tasks<T>(&self, work: impl Future<Output = T>) -> T {
        let (world, other) = (self.clone(), self.clone());
        let tasks = [
            spawn(async move { world.hub.dispatch(&world.parts.index, Duration::MAX).await }),
            spawn(async move { other.hub.list(&*other.maker, &other.parts.index, 8).await }),
        ];
        let done = work.await;
        for task in tasks {
            task.abort();
            let _aborted = task.await;
        }
        done
    }
}

/// A page that follows a prefix: it shows what it is told, and drops what a list lacks.
#[derive(Default)]
struct Page {
    shown: BTreeMap<ImageId, u8>,
    lists: usize,
}

impl Page {
    /// Reads one event.
    async fn read(&mut self, subscription: &mut Subscription) {
        let event = subscription.next().await.expect("a stream doesn't end by itself");
        let event = std::str::from_utf8(&event).unwrap();
        if let Some(ids) = event.strip_prefix("a list ") {
            self.lists += 1;
            self.shown.retain(|id, _| ids.split(',').any(|it| it == id.as_str()));
            return;
        }
        let (name, number) = event.split_once(' ').unwrap();
        let (id, number) = (id(name), number.parse().unwrap());
        if number == 0 {
            self.shown.remove(&id);
        } else {
            let before = self.shown.insert(id, number);
            assert!(before.is_none_or(|it| it <= number), "an older state after a newer one");
        }
    }

    /// Reads until it has had a number of lists, and shows what is there in the end.
    async fn read_until_right(&mut self, subscription: &mut Subscription, lists: usize) {
        while self.lists < lists || self.shown != ids().map(|id| (id, LAST)).into() {
            self.read(subscription).await;
        }
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
        let writers = block_on(world.with_tasks(async {
            let writers = world.change(everything);
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
            writers
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
        let writers = block_on(world.with_tasks(async {
            let writers = world.change(true);
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
            writers
        }));
        for writer in writers {
            writer.join().unwrap();
        }
        drop(stays);
        assert!(world.hub.is_unused());
    });
}

/// Pages with a prefix show what is there in the end. The images change at once, or once the first page has a list; the second page
/// comes meanwhile, and the third after all changes.
fn explore_listings(name: &str, is_listed_first: bool, everything: bool) {
    let parts = Parts::new();
    let follow = |world: &World| world.subscribe(Followed::Prefix("a".to_owned()));
    explore(name, 350, &["came before the last change"], move |reached| {
        let world = World::new(&parts);
        let [first, second, removed] = listed();
        world.maker.set(&second, 1);
        world.maker.set(&removed, 1);
        block_on(world.with_tasks(async {
            let (mut early, mut page) = (follow(&world), Page::default());
            while is_listed_first && page.lists == 0 {
                page.read(&mut early).await;
            }
            let of_second =
                if everything { Change::Flushed } else { Change::Invalidated(second.clone()) };
            let (storing, its_first) = (world.clone(), first.clone());
            // Stored while a listing is under way, which has missed it.
            let storing = spawn(async move {
                storing.maker.looked.notified().await;
                storing
                    .set(&its_first, LAST, Change::Invalidated(its_first.clone()))
                    .join()
                    .unwrap();
            });
            let writers = [
                world.set(&second, LAST, of_second),
                world.set(&removed, 0, Change::Invalidated(removed.clone())),
            ];
            let (meanwhile, its_reached) = (world.clone(), reached.clone());
            let meanwhile = spawn(async move {
                let mut subscription = follow(&meanwhile);
                if meanwhile.maker.number(&listed()[0]) != LAST {
                    its_reached.note("came before the last change");
                }
                Page::default().read_until_right(&mut subscription, 1).await;
            });
            // After a change of everything there is a list again.
            page.read_until_right(&mut early, if everything { 2 } else { 1 }).await;
            meanwhile.await.unwrap();
            storing.await.unwrap();
            for writer in writers {
                writer.join().unwrap();
            }
            Page::default().read_until_right(&mut follow(&world), 1).await;
        }));
        assert!(world.hub.is_unused());
    });
}

#[test]
fn a_page_with_a_prefix_shows_what_is_there_whenever_it_was_listed() {
    explore_listings("pages with a prefix", false, false);
    explore_listings("and after a list", true, false);
    explore_listings("and after everything may have changed", true, true);
}
