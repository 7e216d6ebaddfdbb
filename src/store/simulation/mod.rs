//! The tracking connection, the data connections and the index against simulated servers, under a clock that is turned.
//!
//! A seed makes a run of some seconds: a writer, readers, and faults one after the other. Time stands still while anything
//! can be done, so a run takes milliseconds. A seed repeats its run but for one thing: of tasks that wait for the same event,
//! tokio wakes any first. The network and Redis are simulated (`server.rs`); the tasks, the client's protocol and the index
//! are the real ones. The judge is that of the integration tests.
//!
//! ```sh
//! AFTERIMAGE_TEST_SEED=17 cargo test --lib simulation -- --nocapture
//! ```

#[path = "../../../tests/it/judge.rs"]
mod judge;
mod reader;
mod resp;
mod run;
mod server;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tokio::time::timeout;

use crate::image::ImageId;
use crate::index::{Rule, Rules};
use crate::settings::Settings;
use reader::MEMORY;
use run::run;

pub(super) use server::Network;

/// Seeds in the tests. `just prove` runs more.
const SEEDS: u64 = 500;

/// The number of seeds, or the only one.
fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().map(|it| it.parse::<u64>().expect("a number"));
    if let Some(seed) = number("AFTERIMAGE_TEST_SEED") {
        return seed..seed + 1;
    }
    0..number("AFTERIMAGE_TEST_SEEDS").unwrap_or(SEEDS)
}

#[test]
fn no_answer_is_older_than_the_bound_whatever_fails() {
    let began = Instant::now();
    let seeds = seeds();
    let (next, count) = (AtomicU64::new(seeds.start), seeds.end - seeds.start);
    let some_of_them = || {
        let (mut answers, mut memory) = (0, 0);
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return (answers, memory);
            }
            let report = run(seed, Rules::default());
            if !report.wrong.is_empty() {
                // Nobody begins another one.
                next.store(seeds.end, Ordering::Relaxed);
                let faults = report.faults.join("\n");
                panic!("AFTERIMAGE_TEST_SEED={seed} repeats this:\n{faults}\n{:#?}", report.wrong);
            }
            answers += report.answers.len();
            memory += report.answers.iter().filter(|it| it.source == MEMORY).count();
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let (answers, memory) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(some_of_them)).collect();
        let counts = threads.into_iter().map(|thread| thread.join().expect("no violation"));
        counts.fold((0, 0), |all, these| (all.0 + these.0, all.1 + these.1))
    });
    println!(
        "simulation: {count} seeds, {answers} answers, {memory} of them from memory, in {:.1?}, 0 violations",
        began.elapsed()
    );
}

/// The first seed whose run is wrong without a rule.
fn seed_that_needs(rule: Rule) -> Option<(u64, String)> {
    (0..SEEDS).find_map(|seed| {
        let wrong = run(seed, Rules::without(rule)).wrong.into_iter().next()?;
        Some((seed, wrong))
    })
}

#[test]
fn the_simulation_notices_a_rule_that_is_left_out() {
    let rules =
        [Rule::PushReplacesEntry, Rule::PushInvalidatesFetch, Rule::EpochBegins, Rule::LeaseEnds];
    for rule in rules {
        let (seed, wrong) = seed_that_needs(rule).unwrap_or_else(|| panic!("none needs {rule:?}"));
        println!("without {rule:?}, seed {seed}: {wrong}");
    }
}

/// The deadline of a fetch comes before the time-out of its command, so the time-out alone would never close the connection.
#[tokio::test(start_paused = true)]
async fn a_data_connection_that_is_silent_is_given_up_by_those_who_leave_first() {
    let network = Network::new(1);
    let settings = Settings::load(&[]).unwrap();
    let store = network.store(&settings);
    let id = ImageId::parse("a").unwrap();
    network.write("image:a", 1);
    let connections = settings.redis.connections.get();
    let size = || timeout(settings.redis.response_timeout.mul_f64(0.9), store.size(&id));
    for _ in 0..connections {
        assert_eq!(size().await.unwrap().unwrap(), 1);
    }
    network.silence(false);
    for _ in 0..connections {
        size().await.unwrap_err();
    }
    assert_eq!(size().await.unwrap().unwrap(), 1);
}
