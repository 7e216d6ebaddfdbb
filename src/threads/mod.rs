//! Orders of threads and tasks: `coalesce`, `cache` and `events` with the locks, atomics and channels of [`crate::sync`], whose
//! every step a scheduler chooses.
//!
//! ```text
//! cargo test --locked --features shuttle --lib threads::
//! AFTERIMAGE_TEST_SCHEDULE=91… cargo test --locked --features shuttle --lib threads::cache::…    one order again
//! ```
//!
//! Half of the orders are random, and half have few changes of the task (PCT), which finds what needs one task to stand
//! still for long. A violation is a failed assertion, a deadlock, or a task that doesn't end. Its schedule is printed. A
//! time-out never passes here, so a wakeup that is lost is a deadlock. The scenarios of `events` are in `events/threads.rs`.

mod cache;
mod coalesce;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::{Config, MaxSteps, Runner};

/// Schedulers choose the same each time, unless `SHUTTLE_RANDOM_SEED` is set. The order within a `HashMap` still differs.
const SEED: u64 = 1;

/// Most changes of the task in one order of PCT, and one more.
const DEPTH: usize = 4;

/// Situations that schedules have reached. Those that a test is about must be among them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reached(Arc<Mutex<BTreeMap<&'static str, usize>>>);

impl Reached {
    pub(crate) fn note(&self, situation: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(situation).or_default() += 1;
    }
}

/// Explores a scenario in a number of orders by each scheduler. Every situation must be reached.
pub(crate) fn explore(
    name: &str,
    schedules: usize,
    situations: &[&str],
    scenario: impl Fn(&Reached) + Clone + Send + Sync + 'static,
) {
    let reached = Reached::default();
    let scenario = {
        let reached = reached.clone();
        move || scenario(&reached)
    };
    if let Ok(schedule) = std::env::var("AFTERIMAGE_TEST_SCHEDULE") {
        shuttle::replay(scenario, &schedule);
        return;
    }
    let mut config = Config::new();
    config.stack_size = 0x40_000;
    config.max_steps = MaxSteps::FailAfter(20_000);
    config.silence_warnings = true;
    let random = RandomScheduler::new_from_seed(SEED, schedules);
    let pct = PctScheduler::new_from_seed(SEED, DEPTH, schedules);
    let run = Runner::new(random, config.clone()).run(scenario.clone())
        + Runner::new(pct, config).run(scenario);
    let reached = reached.0.lock().unwrap_or_else(PoisonError::into_inner);
    for situation in situations {
        assert!(reached.contains_key(situation), "no schedule reaches: {situation}");
    }
    println!("shuttle: {name}: {run} schedules, 0 violations {reached:?}");
}
