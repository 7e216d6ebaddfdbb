//! Runs of the checker, and their report.

use std::process::ExitCode;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use crate::model::{BOUND, Checked, GOAL};
use crate::rules::{Rule, Rules};
use crate::scenario::{Bound, Scenario};
use crate::scenarios::{LIMITS, SCENARIOS, needing};
use crate::words::timeline;

/// Result of one run.
pub(crate) struct Outcome {
    /// States that were visited.
    pub(crate) states: usize,
    /// The shortest way to a violation, in words.
    pub(crate) violation: Option<String>,
    /// The client served the present value after the last step. Only looked for if all rules are kept.
    pub(crate) reached: bool,
}

/// Explores a scenario under some rules, and checks a bound.
pub(crate) fn check(scenario: Scenario, rules: Rules, bound: Bound) -> Outcome {
    let goal = rules == Rules::ALL && bound == scenario.bound;
    let model = Checked { scenario, rules, bound, goal };
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let reached = checker.discovery(GOAL).is_some();
    let states = checker.unique_state_count();
    let violation = checker.discovery(BOUND).map(|path| timeline(&model, &path.into_vec()));
    if violation.is_some() && goal {
        // With one property the search stops at the first violation, which is the shortest.
        let model = Checked { goal: false, ..model };
        let checker = model.checker().spawn_bfs().join();
        let violation = checker.discovery(BOUND).map(|path| timeline(&model, &path.into_vec()));
        return Outcome { states, violation, reached };
    }
    Outcome { states, violation, reached }
}

/// Formats a number with commas.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Checks all scenarios, that their bounds are tight, and that each rule is needed.
pub(crate) fn all(verbose: bool) -> ExitCode {
    let began = Instant::now();
    let (mut states, mut violations, mut failures) = (0, 0, 0);
    for scenario in SCENARIOS {
        let began = Instant::now();
        let outcome = check(scenario, Rules::ALL, scenario.bound);
        states += outcome.states;
        if verbose {
            println!(
                "{}: {:?}, {} states, {:.1?}",
                scenario.name,
                scenario.bound,
                grouped(outcome.states),
                began.elapsed()
            );
        }
        if let Some(timeline) = outcome.violation {
            violations += 1;
            println!("{}: {:?} is exceeded:\n{timeline}", scenario.name, scenario.bound);
        } else if outcome.reached != scenario.serves_again {
            failures += 1;
            println!("{}: serves_again is {}", scenario.name, outcome.reached);
        }
    }
    println!(
        "cluster model: {} scenarios, {} states, {:.0} s, {violations} violations",
        SCENARIOS.len(),
        grouped(states),
        began.elapsed().as_secs_f64()
    );

    let mut tight = 0;
    for scenario in SCENARIOS {
        let bound = scenario.bound.tighter();
        if check(scenario, Rules::ALL, bound).violation.is_some() {
            tight += 1;
        } else {
            println!("{}: {bound:?} would hold too", scenario.name);
        }
    }
    println!("cluster model: {tight} of {} bounds are tight", SCENARIOS.len());

    let mut limits = 0;
    for scenario in LIMITS {
        if check(scenario, Rules::ALL, scenario.bound).violation.is_some() {
            limits += 1;
        } else {
            println!("{}: {:?} holds after all", scenario.name, scenario.bound);
        }
    }
    println!("cluster model: {limits} of {} known limits found", LIMITS.len());

    let mut caught = 0;
    for rule in Rule::ALL {
        let scenario = needing(rule);
        let began = Instant::now();
        let outcome = check(scenario, Rules::without(rule), scenario.bound);
        if outcome.violation.is_some() {
            caught += 1;
        } else {
            println!("without {rule:?}: no violation of {:?} in {}", scenario.bound, scenario.name);
        }
        if verbose {
            println!(
                "without {rule:?}: {}, {} states, {:.1?}",
                scenario.name,
                grouped(outcome.states),
                began.elapsed()
            );
        }
    }
    println!("cluster model: {caught} of {} mutations caught", Rule::ALL.len());
    if verbose {
        println!("all of it: {:.1?}", began.elapsed());
    }
    let holds = violations == 0 && failures == 0;
    let needed = tight == SCENARIOS.len() && limits == LIMITS.len() && caught == Rule::ALL.len();
    if holds && needed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints the shortest counterexample for each rule left out, and for each bound that is a tick tighter.
pub(crate) fn timelines() -> ExitCode {
    for rule in Rule::ALL {
        let scenario = needing(rule);
        let outcome = check(scenario, Rules::without(rule), scenario.bound);
        println!(
            "without {rule:?}, in \"{}\":\n{}\n",
            scenario.name,
            outcome.violation.unwrap_or_else(|| String::from("  no violation"))
        );
    }
    for scenario in SCENARIOS {
        let bound = scenario.bound.tighter();
        let outcome = check(scenario, Rules::ALL, bound);
        println!(
            "\"{}\" is later than {bound:?}:\n{}\n",
            scenario.name,
            outcome.violation.unwrap_or_else(|| String::from("  no violation"))
        );
    }
    for scenario in LIMITS {
        let outcome = check(scenario, Rules::ALL, scenario.bound);
        println!(
            "\"{}\" is later than {:?}:\n{}\n",
            scenario.name,
            scenario.bound,
            outcome.violation.unwrap_or_else(|| String::from("  no violation"))
        );
    }
    ExitCode::SUCCESS
}

/// Prints the scenarios in which a rule is needed. Returns false if no rule has this name.
pub(crate) fn without(name: &str) -> bool {
    let Some(rule) = Rule::ALL.into_iter().find(|rule| format!("{rule:?}") == name) else {
        return false;
    };
    for scenario in SCENARIOS {
        let outcome = check(scenario, Rules::without(rule), scenario.bound);
        match outcome.violation {
            Some(timeline) => println!("needed: {}\n{timeline}", scenario.name),
            None => println!("not needed: {}", scenario.name),
        }
    }
    true
}

/// Checks the scenarios whose names begin so. Returns false if there is none.
pub(crate) fn one(name: &str) -> bool {
    let mut found = false;
    for scenario in SCENARIOS.into_iter().filter(|it| it.name.starts_with(name)) {
        found = true;
        let began = Instant::now();
        let outcome = check(scenario, Rules::ALL, scenario.bound);
        println!("{}: {} states, {:.1?}", scenario.name, grouped(outcome.states), began.elapsed());
        if let Some(timeline) = outcome.violation {
            println!("{timeline}");
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenarios::QUICK;

    #[test]
    fn the_bounds_of_small_scenarios_hold_and_are_tight() {
        for scenario in QUICK {
            let outcome = check(scenario, Rules::ALL, scenario.bound);
            if let Some(timeline) = outcome.violation {
                panic!("{}: {:?} is exceeded:\n{timeline}", scenario.name, scenario.bound);
            }
            assert_eq!(outcome.reached, scenario.serves_again, "{}", scenario.name);
            let bound = scenario.bound.tighter();
            let outcome = check(scenario, Rules::ALL, bound);
            assert!(outcome.violation.is_some(), "{}: {bound:?} holds too", scenario.name);
        }
    }

    #[test]
    fn each_rule_is_needed() {
        for rule in Rule::ALL {
            let scenario = needing(rule);
            let outcome = check(scenario, Rules::without(rule), scenario.bound);
            assert!(outcome.violation.is_some(), "{rule:?} isn't needed in {}", scenario.name);
        }
    }

    #[test]
    fn the_known_limits_are_found() {
        for scenario in LIMITS {
            let outcome = check(scenario, Rules::ALL, scenario.bound);
            assert!(outcome.violation.is_some(), "{} is within its bound", scenario.name);
        }
    }

    #[test]
    fn names_are_unique() {
        for (at, scenario) in SCENARIOS.iter().enumerate() {
            assert!(SCENARIOS[..at].iter().all(|it| it.name != scenario.name), "{}", scenario.name);
        }
    }

    #[test]
    fn numbers_are_grouped_by_threes() {
        assert_eq!(grouped(8_270_000), "8,270,000");
        assert_eq!(grouped(159), "159");
    }
}
