//! The search through all orders of steps.

use std::collections::HashMap;
use std::fmt::Write;

use super::scenario::Scenario;
use super::steps::Step;
use super::world::World;
use crate::index::Rule;

/// The result of a search.
pub(super) enum Found {
    /// No violation.
    Nothing(Seen),
    /// A violation, with the steps that lead to it.
    Violation(String),
}

/// The extent of a search.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    /// Different states.
    pub(super) states: usize,
    /// Orders of steps from the beginning to a state without a next step. Most share states, and were not walked one by one.
    pub(super) schedules: u128,
}

/// Takes every order of steps, the shortest first, until one violates what is promised.
pub(super) fn explore(scenario: Scenario, without: Option<Rule>) -> Found {
    let mut search = Search { scenario, without, states: Vec::new(), numbers: HashMap::new() };
    let first = World::new(scenario, without);
    search.numbers.insert(first.fingerprint(), 0);
    search.states.push(State { before: None, after: Vec::new() });
    let mut next = 0;
    while next < search.states.len() {
        if let Err(violation) = search.go_on_from(next) {
            return Found::Violation(violation);
        }
        next += 1;
    }
    Found::Nothing(Seen { states: search.states.len(), schedules: search.schedules() })
}

struct Search {
    scenario: Scenario,
    without: Option<Rule>,
    states: Vec<State>,
    /// The states by their fingerprints.
    numbers: HashMap<u64, usize>,
}

struct State {
    /// The step that first led here, and the state that it was taken in.
    before: Option<(usize, Step)>,
    after: Vec<usize>,
}

impl Search {
    /// Takes each step that can come next.
    fn go_on_from(&mut self, number: usize) -> Result<(), String> {
        let path = self.path(number);
        let world = self.replay(&path);
        let steps = world.next_steps();
        let mut here = Some(world);
        for (left, step) in (0..steps.len()).rev().zip(steps) {
            // The last one goes on from here; the others begin anew.
            let last = if left == 0 { here.take() } else { None };
            let mut world = last.unwrap_or_else(|| self.replay(&path));
            let checked = world.take(step).and_then(|()| world.check());
            checked.map_err(|violation| timeline(&path, step, &violation))?;
            let new = self.states.len();
            let after = *self.numbers.entry(world.fingerprint()).or_insert(new);
            if after == new {
                self.states.push(State { before: Some((number, step)), after: Vec::new() });
            }
            self.states[number].after.push(after);
        }
        Ok(())
    }

    fn path(&self, mut number: usize) -> Vec<Step> {
        let mut path = Vec::new();
        while let Some((before, step)) = self.states[number].before {
            path.push(step);
            number = before;
        }
        path.reverse();
        path
    }

    fn replay(&self, path: &[Step]) -> World {
        let mut world = World::new(self.scenario, self.without);
        for step in path {
            world.take(*step).expect("these steps were taken before");
        }
        world
    }

    /// The number of ways from the first state to one without a next step. No way comes back to a state, since every step
    /// uses something up.
    fn schedules(&self) -> u128 {
        let mut known: Vec<Option<u128>> = vec![None; self.states.len()];
        let mut open = vec![0];
        while let Some(number) = open.last().copied() {
            let after = &self.states[number].after;
            let unknown = after.iter().filter(|it| known[**it].is_none());
            let before = open.len();
            open.extend(unknown);
            if open.len() == before {
                let sum = after.iter().filter_map(|it| known[*it]).sum();
                known[number] = Some(if after.is_empty() { 1 } else { sum });
                open.pop();
            }
        }
        known[0].unwrap_or_default()
    }
}

/// The steps to a violation, one a line.
fn timeline(path: &[Step], last: Step, violation: &str) -> String {
    let mut timeline = String::new();
    for step in path.iter().chain([&last]) {
        let _ = writeln!(timeline, "    {step:?}");
    }
    let _ = write!(timeline, "    violation: {violation}");
    timeline
}
