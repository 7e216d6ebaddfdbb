//! One run: a writer, readers and faults, and what was wrong.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use tokio::time::{Instant, advance, sleep};

use super::judge::{History, Seen, Step, judge};
use super::reader::{Answer, Reader};
use super::server::Network;
use crate::clock::Clock;
use crate::image::ImageId;
use crate::index::{Index, IndexLimits, Rules};
use crate::settings::Settings;
use crate::store::ChangeListener;

/// The defaults.
static SETTINGS: LazyLock<Settings> = LazyLock::new(|| Settings::load(&[]).unwrap());

const KEYS: usize = 3;
const READERS: usize = 3;

/// A heartbeat is relied upon for so long. A push that is late counts from the next heartbeat, whose answer is behind it.
const LEASE: Duration = Duration::from_millis(500);

/// Two seconds between comparisons of where the address leads, and two at most for each of them.
const SWITCH: Duration = Duration::from_secs(4);

/// Time in which everything must be known again after the last fault: the longest pause between attempts to connect is 30 s.
const SETTLED: Duration = Duration::from_secs(40);

/// The account of a run.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub(super) faults: Vec<String>,
    pub(super) answers: Vec<Seen>,
    pub(super) wrong: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The tracking connection, or every connection, is closed.
    Close {
        only_tracking: bool,
    },
    /// The same without a word to either end.
    Silence {
        only_tracking: bool,
    },
    /// The primary becomes a replica in its place; the address follows later.
    Demotion,
    /// The address leads to another primary, and connections to the old one live on.
    Switch,
    /// Redis starts again.
    Restart,
    Loading,
    NoTracking,
    NoInfo,
    /// Every connection is closed again and again, and none can be opened for a while.
    Storm,
    Slow,
    /// This process doesn't run for a while.
    Pause,
}

const FAULTS: [Fault; 13] = [
    Fault::Close { only_tracking: true },
    Fault::Close { only_tracking: false },
    Fault::Silence { only_tracking: true },
    Fault::Silence { only_tracking: false },
    Fault::Demotion,
    Fault::Switch,
    Fault::Restart,
    Fault::Loading,
    Fault::NoTracking,
    Fault::NoInfo,
    Fault::Storm,
    Fault::Slow,
    Fault::Pause,
];

struct Simulation {
    network: Network,
    reader: Reader,
    ids: Vec<ImageId>,
    history: History,
    /// The number of the last write.
    last: u64,
    random: fastrand::Rng,
    bound: Duration,
    report: Arc<Mutex<Report>>,
}

/// Runs a seed.
pub(super) fn run(seed: u64, rules: Rules) -> Report {
    // Jitter comes from here.
    fastrand::seed(seed);
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut simulation = Simulation::start(seed, rules);
        simulation.go().await;
        std::mem::take(&mut *simulation.report.lock().unwrap())
    })
}

impl Simulation {
    fn start(seed: u64, rules: Rules) -> Simulation {
        let network = Network::new(seed);
        let limits = IndexLimits {
            entries: NonZeroUsize::MAX,
            absent: NonZeroUsize::MAX,
            waiters: 100,
            fetches: 100,
            serve_stale_for: Duration::from_mins(10),
        };
        let clock = Clock::of_tokio();
        let index = Arc::new(Index::with_rules(limits, rules, clock));
        let mut store = network.store(&SETTINGS);
        let listener = {
            let index = Arc::clone(&index);
            ChangeListener::new(move |change| index.apply(change))
        };
        store.watch(clock, listener);
        let numbers = Arc::new(Mutex::new(HashMap::new()));
        let reader = Reader { index, store: Arc::new(store), numbers };
        Simulation {
            network,
            reader,
            ids: (0..KEYS).map(|key| ImageId::parse(&format!("k{key}")).unwrap()).collect(),
            history: (0..KEYS as u64).map(|key| (key, vec![step_now(0)])).collect(),
            last: 0,
            random: fastrand::Rng::with_seed(!seed),
            bound: LEASE,
            report: Arc::default(),
        }
    }

    async fn go(&mut self) {
        let readers: Vec<_> = (0..READERS).map(|number| self.start_reader(number)).collect();
        self.write_for(300).await;
        for _ in 0..2 {
            let fault = FAULTS[self.random.usize(..FAULTS.len())];
            self.report.lock().unwrap().faults.push(format!("{fault:?}"));
            if matches!(fault, Fault::Switch) {
                self.bound = SWITCH;
            }
            self.inject(fault).await;
            self.write_for(300).await;
        }
        self.network.end_turn();
        for reader in readers {
            reader.abort();
        }
        self.settle().await;
        self.judge();
    }

    async fn inject(&mut self, fault: Fault) {
        let network = self.network.clone();
        match fault {
            Fault::Close { only_tracking } => network.close(only_tracking),
            Fault::Silence { only_tracking } => {
                network.silence(only_tracking);
                self.write_for(700).await;
            }
            Fault::Demotion => {
                network.fail_over(false);
                self.write_for(700).await;
                network.address_follows();
            }
            Fault::Switch => {
                network.fail_over(true);
                self.write_for(2500).await;
            }
            Fault::Restart => network.restart(),
            Fault::Loading => {
                network.set_loading(true);
                self.write_for(600).await;
                network.set_loading(false);
            }
            Fault::NoTracking | Fault::NoInfo => {
                network.set_denied(fault == Fault::NoTracking, fault == Fault::NoInfo);
                network.close(false);
                self.write_for(600).await;
                network.set_denied(false, false);
            }
            Fault::Storm => {
                for _ in 0..4 {
                    network.set_refuses(self.random.bool());
                    network.close(false);
                    self.write_for(100).await;
                }
                network.set_refuses(false);
            }
            Fault::Slow => {
                network.set_slowness(Duration::from_millis(self.random.u64(50..1500)));
                self.write_for(900).await;
                network.set_slowness(Duration::ZERO);
            }
            Fault::Pause => {
                for key in 0..KEYS {
                    self.write(key);
                }
                network.end_turn();
                advance(Duration::from_millis(self.random.u64(50..3000))).await;
            }
        }
    }

    fn write(&mut self, key: usize) {
        self.last += 1;
        self.network.write(&format!("image:{}", self.ids[key]), self.last);
        self.history.get_mut(&(key as u64)).unwrap().push(step_now(self.last));
    }

    async fn write_for(&mut self, milliseconds: u64) {
        let end = Instant::now() + Duration::from_millis(milliseconds);
        while Instant::now() < end {
            let key = self.random.usize(..KEYS);
            self.write(key);
            sleep(Duration::from_micros(self.random.u64(100..60_000))).await;
            self.network.end_turn();
        }
    }

    fn start_reader(&self, number: usize) -> tokio::task::JoinHandle<()> {
        let (reader, ids) = (self.reader.clone(), self.ids.clone());
        let report = Arc::clone(&self.report);
        let mut random = fastrand::Rng::with_seed(self.random.clone().u64(..) ^ number as u64);
        tokio::spawn(async move {
            loop {
                sleep(Duration::from_micros(random.u64(100..30_000))).await;
                let key = random.usize(..ids.len());
                let (asked, before) = (now(), report.lock().unwrap().answers.len());
                let Some(answer) = reader.read(&ids[key]).await else { continue };
                let Answer { number, source } = answer;
                let (key, answered) = (key as u64, now());
                let seen = Seen { source, key, number, asked, answered, before };
                report.lock().unwrap().answers.push(seen);
            }
        })
    }

    /// Waits until every key is known again, as what it is.
    async fn settle(&mut self) {
        let end = Instant::now() + SETTLED;
        loop {
            for id in &self.ids {
                self.reader.read(id).await;
            }
            let known = self.reader.index.peek(&self.ids);
            let number = |key: usize| Some(self.reader.number_of(known[key].as_ref()?));
            let known: Vec<_> = (0..KEYS).map(number).collect();
            let last = |key| Some(self.history.get(&key)?.last()?.number);
            let last: Vec<_> = (0..KEYS as u64).map(last).collect();
            if known == last {
                return;
            }
            if Instant::now() > end {
                let coherence = self.reader.index.coherence();
                let wrong =
                    format!("{last:?} were written last, and {known:?} is known, {coherence:?}");
                return self.report.lock().unwrap().wrong.push(wrong);
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    fn judge(&mut self) {
        let report = &mut *self.report.lock().unwrap();
        let verdict = judge(&self.history, &report.answers, self.bound);
        report.wrong.extend(verdict.wrong);
    }
}

/// The clock of the judge, which stands still with that of the simulation.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

fn step_now(number: u64) -> Step {
    Step { number, from: now(), to: Some(now()) }
}
