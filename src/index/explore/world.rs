//! A small world around a real index.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use futures_util::FutureExt;

use super::scenario::Scenario;
use super::steps::{Key, Step};
use crate::clock::{BootInstant, Clock};
use crate::coalesce::Flight;
use crate::image::{ImageId, MediaType, Metadata, Version};
use crate::index::{
    Admission, FetchLease, FetchResult, Index, IndexLimits, Known, Lookup, Rule, Rules,
};
use crate::store::{Change, Coherence, Lease};

/// A tick of the clock. A fetch, a push and a reply take none, or as many as pass meanwhile.
const TICK: Duration = Duration::from_secs(1);

/// The beginning of a tick.
pub(super) fn moment(tick: u64) -> BootInstant {
    BootInstant::after_boot(Duration::from_secs(tick))
}

/// Ticks for which a heartbeat is relied upon.
pub(super) const LEASE: u64 = 2;

/// Ticks for which a version may be served in an outage.
const SERVE_STALE_FOR: u64 = 3;

/// The number of a version: writes are numbered over all keys. 0 is no value, at the beginning.
pub(super) type Number = u64;

/// A message on the tracking connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Message {
    /// A push that names a key, for the write with this number.
    Push(Key, Number),
    /// A push that names none, after the write with this number.
    Nil(Number),
    /// The reply to the first heartbeat, which was sent then.
    Tracked { connection: u64, sent: u64 },
    /// The reply to a later one.
    Beat { connection: u64, sent: u64 },
}

/// A value in Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Value {
    pub(super) number: Number,
    /// The tick in which it is gone.
    expires: Option<u64>,
}

/// The reply to a GET.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Reply {
    value: Option<Value>,
    /// The number of the last write of the key.
    written: Number,
}

/// The stage of a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Registered,
    Sent,
    Served(Reply),
    Over,
}

/// A fetch, and the requests that wait for it.
pub(super) struct Fetch {
    pub(super) key: Key,
    pub(super) stage: Stage,
    pub(super) lease: Option<FetchLease<Number>>,
    flight: Option<Arc<Flight<Number>>>,
    /// The number of the last write that a waiting request must see.
    pub(super) must_see: Number,
}

impl Fetch {
    pub(super) fn leads(&self, flight: &Arc<Flight<Number>>) -> bool {
        self.lease.as_ref().is_some_and(|it| Arc::ptr_eq(&it.flight, flight))
    }

    /// True if it waits for another one, which was sent before it.
    pub(super) fn waits_for(&self, other: &Fetch) -> bool {
        let before = self.lease.as_ref().and_then(|lease| lease.before.as_ref());
        before.zip(other.flight.as_ref()).is_some_and(|(before, it)| Arc::ptr_eq(before, it))
    }

    /// True unless it has to wait for another one.
    pub(super) fn may_send(&self) -> bool {
        let before = self.lease.as_ref().and_then(|lease| lease.before.as_ref());
        before.is_none_or(|it| it.outcome().now_or_never().is_some())
    }
}

/// A state of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Past {
    /// The number of the value, 0 if there was none.
    pub(super) value: Number,
    /// The number of the write that made it so, deletions included.
    pub(super) written: Number,
    /// The tick in which it ended.
    pub(super) until: Option<u64>,
}

/// An index, and everything around it.
pub(super) struct World {
    /// The events that are left to happen.
    pub(super) left: Scenario,
    pub(super) index: Arc<Index<Number>>,
    pub(super) ids: [ImageId; 2],
    clock: &'static AtomicU64,
    /// The values in Redis.
    pub(super) values: [Option<Value>; 2],
    /// The number of the last write of each key, deletions included.
    pub(super) written: [Number; 2],
    numbers: Number,
    /// The states of each key, the present one last.
    pub(super) past: [Vec<Past>; 2],
    /// The number of the last write of each key whose push has arrived.
    pub(super) told: [Number; 2],
    /// The newest write of each key that a request was answered as of.
    pub(super) seen: [Number; 2],
    pub(super) connection: u64,
    /// The connection no longer leads to Redis.
    pub(super) is_broken: bool,
    /// The client knows.
    pub(super) is_noticed: bool,
    /// The connection was announced to the index.
    pub(super) is_announced: bool,
    pub(super) wire: VecDeque<Message>,
    pub(super) announcements: VecDeque<Message>,
    /// The tick in which the last heartbeat that was announced was sent.
    pub(super) heard: u64,
    pub(super) fetches: Vec<Fetch>,
}

impl World {
    pub(super) fn new(scenario: Scenario, without: Option<Rule>) -> World {
        thread_local! {
            /// One for each thread, since a clock lives for ever.
            static CLOCK: &'static AtomicU64 = Box::leak(Box::default());
        }
        let clock = CLOCK.with(|it| *it);
        clock.store(0, Ordering::SeqCst);
        let limits = IndexLimits {
            entries: NonZeroUsize::new(scenario.entries).unwrap(),
            absent: NonZeroUsize::new(scenario.entries).unwrap(),
            waiters: usize::MAX,
            fetches: usize::MAX,
            serve_stale_for: TICK * u32::try_from(SERVE_STALE_FOR).unwrap(),
        };
        let rules = without.map_or_else(Rules::default, Rules::without);
        let index = Index::with_rules(limits, rules, Clock::by_hand(clock));
        let mut world = World {
            left: scenario,
            index: Arc::new(index),
            ids: ["a", "b"].map(|id| ImageId::parse(id).unwrap()),
            clock,
            values: [None; 2],
            written: [0; 2],
            numbers: 0,
            past: [(); 2].map(|()| vec![Past { value: 0, written: 0, until: None }]),
            told: [0; 2],
            seen: [0; 2],
            connection: 0,
            is_broken: true,
            is_noticed: true,
            is_announced: false,
            wire: VecDeque::new(),
            announcements: VecDeque::new(),
            heard: 0,
            fetches: Vec::new(),
        };
        if scenario.tracked {
            for step in [Step::Track, Step::Arrive] {
                world.take(step).expect("nothing is known yet");
            }
        }
        world
    }

    pub(super) fn now(&self) -> u64 {
        self.clock.load(Ordering::SeqCst) / u64::try_from(TICK.as_nanos()).unwrap()
    }

    /// Takes a step. An error if those who wait for a fetch get a wrong answer or none.
    pub(super) fn take(&mut self, step: Step) -> Result<(), String> {
        match step {
            Step::Write(key) => self.write(key, true, None),
            Step::WriteExpiring(key) => self.write(key, true, Some(self.now() + 1)),
            Step::Delete(key) => self.write(key, false, None),
            Step::Flush => {
                self.left.flushes -= 1;
                self.numbers += 1;
                for key in 0..self.left.keys {
                    self.written[key] = self.numbers;
                    self.replace(key, None);
                }
                if !self.is_broken {
                    self.wire.push_back(Message::Nil(self.numbers));
                }
            }
            Step::Track => {
                self.connection += 1;
                (self.is_broken, self.is_noticed, self.is_announced) = (false, false, false);
                let (connection, sent) = (self.connection, self.now());
                self.wire.push_back(Message::Tracked { connection, sent });
            }
            Step::Beat => {
                self.left.beats -= 1;
                let (connection, sent) = (self.connection, self.now());
                self.wire.push_back(Message::Beat { connection, sent });
            }
            Step::Arrive => self.arrive(),
            Step::Announce => self.announce(),
            Step::Break => {
                self.left.losses -= 1;
                self.is_broken = true;
            }
            Step::Notice => self.notice(),
            Step::Request(key) => {
                let found = self.index.look_up(&self.ids[key]).expect("the lease holds");
                match found {
                    Lookup::Ask(admission) => self.request(key, admission),
                    found => unreachable!("such a request isn't made: {found:?}"),
                }
            }
            Step::Ask(key) => self.request(key, self.index.ask(&self.ids[key])),
            Step::Send(number) => {
                // No two fetches are sent in the same moment.
                self.clock.fetch_add(1, Ordering::SeqCst);
                let lease = self.fetches[number].lease.as_mut().unwrap();
                lease.mark_sent().now_or_never().expect("there is nothing to wait for");
                self.fetches[number].stage = Stage::Sent;
                if !self.left.slow {
                    self.serve(number);
                }
            }
            Step::Serve(number) => self.serve(number),
            Step::Reply(number) => self.reply(number)?,
            Step::Leave(number) => {
                self.left.cancels -= 1;
                let fetch = &mut self.fetches[number];
                fetch.flight = None;
                let lease = fetch.lease.take().unwrap();
                if !lease.give_up_if_unwanted() {
                    return Err("a fetch that nobody waits for isn't given up".to_owned());
                }
                fetch.stage = Stage::Over;
            }
            Step::Panic(number) => {
                self.left.cancels -= 1;
                let fetch = &mut self.fetches[number];
                drop(fetch.lease.take());
                let flight = fetch.flight.take().unwrap();
                fetch.stage = Stage::Over;
                if !matches!(flight.outcome().now_or_never(), Some(Err(_))) {
                    return Err("those who wait for a fetch that panicked aren't told".to_owned());
                }
            }
            Step::Tick => {
                self.left.ticks -= 1;
                let tick = u64::try_from(TICK.as_nanos()).unwrap();
                self.clock.fetch_add(tick, Ordering::SeqCst);
                for key in 0..self.left.keys {
                    // Redis answers as if it were gone at once, and pushes later, or never.
                    let now = self.now();
                    if self.values[key].is_some_and(|it| it.expires.is_some_and(|end| end <= now)) {
                        self.replace(key, None);
                    }
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, key: Key, is_value: bool, expires: Option<u64>) {
        self.left.writes -= 1;
        self.numbers += 1;
        let number = self.numbers;
        self.written[key] = number;
        self.replace(key, is_value.then_some(Value { number, expires }));
        if !self.is_broken {
            self.wire.push_back(Message::Push(key, number));
        }
    }

    /// The key has another value, by the last write or because it expired.
    fn replace(&mut self, key: Key, value: Option<Value>) {
        let now = self.now();
        let written = self.written[key];
        let past = &mut self.past[key];
        // Nothing else depends on the time of a write, so without outages it would only make more states.
        past.last_mut().unwrap().until = self.left.unreachable.then_some(now);
        past.push(Past { value: value.map_or(0, |it| it.number), written, until: None });
        self.values[key] = value;
    }

    fn serve(&mut self, number: usize) {
        let key = self.fetches[number].key;
        let reply = Reply { value: self.values[key], written: self.written[key] };
        self.fetches[number].stage = Stage::Served(reply);
    }

    fn arrive(&mut self) {
        let message = self.wire.pop_front().unwrap();
        match message {
            Message::Push(key, number) => {
                self.told[key] = self.told[key].max(number);
                self.index.apply(Change::Invalidated(self.ids[key].clone()));
            }
            Message::Nil(number) => {
                self.told = self.told.map(|told| told.max(number));
                self.index.apply(Change::Flushed);
            }
            Message::Tracked { .. } | Message::Beat { .. } => {
                self.announcements.push_back(message);
                if !self.left.slow {
                    self.announce();
                }
            }
        }
    }

    fn announce(&mut self) {
        let lease = |sent| Lease::Until(moment(sent + LEASE));
        match self.announcements.pop_front().unwrap() {
            Message::Tracked { connection, sent } => {
                let lease = lease(sent);
                self.index.apply(Change::TrackingStarted { connection, lease });
                (self.is_announced, self.heard) = (true, sent);
            }
            Message::Beat { connection, sent } => {
                let (lease, round_trip) = (lease(sent), Duration::ZERO);
                self.index.apply(Change::Heartbeat { connection, lease, round_trip });
                self.heard = sent;
            }
            Message::Push(..) | Message::Nil(_) => unreachable!("pushes aren't announced"),
        }
    }

    fn notice(&mut self) {
        self.is_noticed = true;
        self.wire.clear();
        let reason = "it broke".into();
        let coherence = if self.left.unreachable {
            Coherence::Unreachable(reason)
        } else {
            Coherence::Unverified(reason)
        };
        let last_heard = moment(self.heard);
        self.index.apply(Change::TrackingLost {
            connection: self.connection,
            last_heard,
            coherence,
        });
    }

    /// True if a request for a key would join or lead a fetch, and may.
    pub(super) fn can_request(&self, key: Key) -> bool {
        let state = self.index.lock();
        let (id, now) = (&self.ids[key], self.index.clock.now());
        let has_lease = state.coherence != Coherence::Coherent || state.is_coherent_at(now);
        let is_current = state.is_coherent_at(now)
            && state.peek(id).is_some_and(|it| it.is_current_at(state.epoch, now));
        drop(state);
        let is_unreachable = matches!(self.index.coherence(), Coherence::Unreachable(_));
        let is_stale = is_unreachable && self.index.last_known(id).is_some();
        has_lease && !is_current && !is_stale && self.can_ask(key)
    }

    /// The same, whatever is known.
    pub(super) fn can_ask(&self, key: Key) -> bool {
        let state = self.index.lock();
        let is_coherent = state.is_coherent_at(self.index.clock.now());
        let joins = |it: &&Arc<Flight<Number>>| {
            (is_coherent && !it.is_invalidated())
                || !it.is_sent()
                || !state.rules.hold(Rule::JoinsUnsentOnly)
        };
        let can_join = state.flights.get(&self.ids[key]).as_ref().is_some_and(joins);
        if can_join { self.left.joins > 0 } else { self.left.fetches > 0 }
    }

    fn request(&mut self, key: Key, admission: Admission<Number>) {
        let coherent = self.index.coherence() == Coherence::Coherent;
        // While every change is pushed, a request may be answered with what was current at its beginning as far as anybody
        // here knew. Otherwise it must see every write that was acknowledged by then.
        let must_see = if coherent { self.told[key] } else { self.written[key] };
        let must_see = must_see.max(self.seen[key]);
        match admission {
            Admission::Lead(lease) => {
                self.left.fetches -= 1;
                let flight = Some(lease.flight());
                let stage = Stage::Registered;
                self.fetches.push(Fetch { key, stage, lease: Some(lease), flight, must_see });
            }
            Admission::Join(flight) => {
                self.left.joins -= 1;
                let is_it = |it: &&mut Fetch| it.leads(&flight);
                let fetch = self.fetches.iter_mut().find(is_it).expect("flights have a leader");
                fetch.must_see = fetch.must_see.max(must_see);
            }
            Admission::Full => unreachable!("there are no limits"),
        }
    }

    fn reply(&mut self, number: usize) -> Result<(), String> {
        let fetch = &mut self.fetches[number];
        let key = fetch.key;
        let Stage::Served(reply) = std::mem::replace(&mut fetch.stage, Stage::Over) else {
            unreachable!("only a fetch that was served has a reply");
        };
        let (must_see, flight) = (fetch.must_see, fetch.flight.take().unwrap());
        let mut lease = fetch.lease.take().unwrap();
        let known = match reply.value {
            Some(value) => present(value.number),
            None => Known::Absent,
        };
        let expires = reply.value.and_then(|it| it.expires).map(moment);
        let result = FetchResult { known, digest: None, expires };
        lease.keep(result);
        lease.complete(reply.written);
        self.seen[key] = self.seen[key].max(reply.written);
        match flight.outcome().now_or_never() {
            Some(Ok(written)) if written >= must_see => Ok(()),
            Some(Ok(written)) => Err(format!(
                "a request was answered as of write {written}, and write {must_see} was told before it began"
            )),
            outcome => Err(format!("those who wait for a fetch aren't told: {outcome:?}")),
        }
    }
}

/// The number of the write that made a value; 0 if there is none.
pub(super) fn number_of(known: &Known) -> Number {
    known.version().map_or(0, |of| {
        let number = versions().iter().position(|it| *it == of).unwrap();
        Number::try_from(number).unwrap()
    })
}

fn present(number: Number) -> Known {
    let version = versions()[usize::try_from(number).unwrap()];
    Known::Present(Arc::new(Metadata::new(version, MediaType::Png, 1, None)))
}

/// The versions of the values, by their numbers.
fn versions() -> &'static [Version] {
    static VERSIONS: LazyLock<Vec<Version>> =
        LazyLock::new(|| (0..16_u64).map(|it| Version::of(&it.to_le_bytes())).collect());
    &VERSIONS
}
