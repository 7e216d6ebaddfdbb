//! Every order of events of the real index, for small worlds.
//!
//! A world is an index, a Redis that a few lines stand in for, the tracking connection between them, and some requests. Its
//! next step is any that could come next: a write takes place, a message arrives, a reply arrives, a connection breaks, time
//! passes. The search takes each of them in turn, from the beginning again for each (an index can't be copied), and
//! recognises states that it has seen. After every step the [`World`] is checked: see [`World::check`].
//!
//! ```text
//!   SET ──▶ Redis ──▶ wire (pushes and replies, in order) ──▶ client: pushes at once ──────────▶ index
//!                                                               └─ replies by way of a task ──▶ index
//! ```

mod check;
mod scenario;
mod search;
mod steps;
mod world;

use std::time::Instant;

use super::Rule;
use scenario::Scenario;
use search::{Found, Seen, explore};

/// Small worlds that together have every kind of event.
const SCENARIOS: [(&str, Scenario); 7] = [
    ("two keys", TWO_KEYS),
    ("connections that begin and break", CONNECTIONS),
    ("requests that join, leave and are cancelled", WAITING),
    ("leases and expiry", LEASES),
    ("evictions, deletions and flushes", EVICTIONS),
    ("outages", OUTAGES),
    ("outages after a flush", FLUSHED),
];
const TWO_KEYS: Scenario = Scenario { keys: 2, writes: 2, fetches: 2, losses: 1, ..NOTHING };
const CONNECTIONS: Scenario =
    Scenario { tracked: false, slow: true, writes: 1, fetches: 1, losses: 2, ..NOTHING };
const WAITING: Scenario =
    Scenario { writes: 1, fetches: 2, joins: 2, cancels: 1, losses: 1, ..NOTHING };
const LEASES: Scenario =
    Scenario { writes: 1, expires: true, fetches: 2, ticks: 3, beats: 1, asks: true, ..NOTHING };
const EVICTIONS: Scenario =
    Scenario { keys: 2, writes: 1, deletes: true, flushes: 1, fetches: 2, entries: 1, ..NOTHING };
const OUTAGES: Scenario =
    Scenario { writes: 2, fetches: 2, losses: 1, ticks: 1, unreachable: true, ..NOTHING };
const FLUSHED: Scenario = Scenario {
    writes: 1,
    flushes: 1,
    fetches: 1,
    joins: 1,
    losses: 1,
    unreachable: true,
    ..NOTHING
};
const NOTHING: Scenario = Scenario::NOTHING;

/// True where `just prove` asks for all of it.
fn is_wide() -> bool {
    std::env::var_os("AFTERIMAGE_TEST_PROOF").is_some_and(|it| it == "wide")
}

/// A scenario with more of what makes its states many.
fn wide(scenario: Scenario) -> Scenario {
    Scenario { writes: scenario.writes + 1, ..scenario }
}

#[test]
fn no_order_of_events_makes_the_index_serve_what_was_replaced() {
    let began = Instant::now();
    let (mut states, mut schedules) = (0, 0_u128);
    for (name, scenario) in SCENARIOS {
        let began = Instant::now();
        let scenario = if is_wide() { wide(scenario) } else { scenario };
        match explore(scenario, None) {
            Found::Nothing(seen) => {
                let Seen { states: new, schedules: ways } = seen;
                println!(
                    "explorer: {name}: {ways} schedules, {new} states, {:.1?}",
                    began.elapsed()
                );
                states += new;
                schedules += ways;
            }
            Found::Violation(timeline) => panic!("{name}:\n{timeline}"),
        }
    }
    println!(
        "explorer: explored {schedules} schedules ({states} states) in {:.1?}, 0 violations",
        began.elapsed()
    );
}

/// Tests that without a rule an order of events breaks the promise, and that the explorer finds it.
macro_rules! each_rule_is_needed {
    ($($name:ident: $rule:ident, $scenario:ident;)*) => {
        $(
            #[test]
            fn $name() {
                match explore($scenario, Some(Rule::$rule)) {
                    Found::Violation(timeline) => println!("without {:?}:\n{timeline}", Rule::$rule),
                    Found::Nothing(_) => panic!("no order of events needs {:?}", Rule::$rule),
                }
            }
        )*

        #[test]
        fn there_is_a_test_for_each_rule() {
            assert_eq!([$(Rule::$rule),*], Rule::ALL);
        }
    };
}

each_rule_is_needed! {
    without_the_end_of_an_entry_by_a_push_it_stays: PushReplacesEntry, TWO_KEYS;
    without_the_guard_an_old_reply_stays: PushInvalidatesFetch, TWO_KEYS;
    without_epochs_an_entry_outlives_its_connection: EpochBegins, TWO_KEYS;
    without_detaching_a_request_joins_a_fetch_from_before: EpochDetachesFetches, FLUSHED;
    without_its_epoch_a_reply_from_before_is_kept: ResultOfItsEpoch, TWO_KEYS;
    without_its_invalidation_a_fetch_that_no_push_finds_is_kept: SuccessorInvalidates, LEASES;
    without_a_bound_a_request_joins_a_fetch_that_was_sent_before_it: JoinsUnsentOnly, WAITING;
    without_expiry_a_value_stays: ExpiryEnds, LEASES;
    without_a_lease_a_silent_connection_is_relied_upon: LeaseEnds, LEASES;
    without_the_number_of_the_lost_a_broken_connection_is_relied_upon: LostBeforeAnnounced, CONNECTIONS;
    without_forgetting_a_flushed_value_is_served_in_an_outage: FlushForgets, FLUSHED;
    without_contradiction_an_outage_takes_a_step_back: ResultContradictsEntry, OUTAGES;
    without_its_invalidation_a_fetch_brings_what_was_seen_to_be_replaced: ResultInvalidatesFetch, TWO_KEYS;
    without_the_time_of_the_question_a_value_looks_younger_than_it_is: AgeFromQuestion, OUTAGES;
}
