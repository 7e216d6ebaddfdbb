//! The judge of all checkers, and of the simulation in `src/store/simulation/`: by a history of what was stored, which answers were
//! possible, and how late the others came.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A change: a key comes to hold a value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    /// The value's number, 0 for none.
    pub(crate) number: u64,
    /// The earliest moment at which it took effect.
    pub(crate) from: Instant,
    /// The latest one. `None` as long as nobody knows that it took effect.
    pub(crate) to: Option<Instant>,
}

/// The steps of each key, in the order in which they take effect.
pub(crate) type History = HashMap<u64, Vec<Step>>;

/// An answer that counts as current.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) source: &'static str,
    pub(crate) key: u64,
    pub(crate) number: u64,
    pub(crate) asked: Instant,
    pub(crate) answered: Instant,
    /// Number of the answers that had come when it was asked for.
    pub(crate) before: usize,
}

/// The judgement on some answers.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// The longest time between a change and a request that still got the value before it.
    pub(crate) latest: Duration,
    pub(crate) wrong: Vec<String>,
}

/// Judges answers, in the order in which they came. An answer is right if its value was stored at some moment between `bound`
/// before the request and the end of the answer, and if nothing newer had been seen before the request. Keys without a history
/// are not judged.
pub(crate) fn judge(history: &History, answers: &[Seen], bound: Duration) -> Verdict {
    let mut verdict = Verdict::default();
    // For each key the answers so far, and the newest step that had been seen after each.
    let mut newest: HashMap<u64, Vec<(usize, usize)>> = HashMap::new();
    for (place, seen) in answers.iter().enumerate() {
        let Some(steps) = history.get(&seen.key) else { continue };
        let newest = newest.entry(seen.key).or_default();
        let before = newest.partition_point(|(place, _)| *place < seen.before);
        let known = newest[..before].last().map_or(0, |(_, step)| *step);
        let Some((_, late)) = sources(steps, seen).last() else {
            verdict.wrong.push(format!("{}: never stored", told(seen)));
            continue;
        };
        verdict.latest = verdict.latest.max(late);
        if late > bound {
            verdict.wrong.push(format!("{}: replaced {late:?} before", told(seen)));
            continue;
        }
        // A key may have been absent several times. The first that fits leaves later answers the most room.
        let mut possible = sources(steps, seen).filter(|(_, late)| *late <= bound);
        if let Some((step, _)) = possible.find(|(step, _)| *step >= known) {
            let so_far = newest.last().map_or(0, |(_, step)| *step);
            newest.push((place, so_far.max(step)));
        } else {
            let known = steps[known].number;
            verdict.wrong.push(format!("{}: {known} had been seen before", told(seen)));
        }
    }
    verdict
}

/// The steps that an answer may come from, and for how long each had certainly been replaced when it was asked for.
fn sources(steps: &[Step], seen: &Seen) -> impl Iterator<Item = (usize, Duration)> {
    let is_it = |step: &Step| step.number == seen.number && step.from <= seen.answered;
    let late = |step: usize| {
        let replaced = steps[step + 1..].iter().find_map(|next| next.to);
        replaced.map_or(Duration::ZERO, |at| seen.asked.saturating_duration_since(at))
    };
    (0..steps.len()).filter(move |step| is_it(&steps[*step])).map(move |step| (step, late(step)))
}

fn told(seen: &Seen) -> String {
    let Seen { source, key, number, asked, answered, .. } = seen;
    format!("k{key} = {number} from {source}, after {:?}", *answered - *asked)
}

/// A history of `changes`, each a number and the second in which it took effect, and answers of numbers asked for and given at once.
fn verdict_on(changes: &[(u64, u64)], answers: &[(u64, u64)], bound: u64) -> Vec<String> {
    let begin = Instant::now();
    let at = |second: u64| begin + Duration::from_secs(second);
    let step = |(number, second): &(u64, u64)| Step {
        number: *number,
        from: at(*second),
        to: Some(at(*second)),
    };
    let seen = |(before, (number, second)): (usize, &(u64, u64))| {
        let (asked, answered) = (at(*second), at(*second));
        Seen { source: "memory", key: 0, number: *number, asked, answered, before }
    };
    let history = HashMap::from([(0, changes.iter().map(step).collect())]);
    let answers: Vec<Seen> = answers.iter().enumerate().map(seen).collect();
    judge(&history, &answers, Duration::from_secs(bound)).wrong
}

#[test]
fn an_answer_is_judged_by_the_time_of_its_replacement() {
    let changes = [(0, 0), (1, 10), (2, 20), (0, 30)];
    assert_eq!(verdict_on(&changes, &[(0, 5), (1, 10), (1, 22), (2, 32), (0, 40)], 2), [""; 0]);
    let wrong = verdict_on(&changes, &[(1, 23)], 2);
    assert_eq!(wrong, ["k0 = 1 from memory, after 0ns: replaced 3s before"]);
    let wrong = verdict_on(&changes, &[(2, 19)], 2);
    assert_eq!(wrong, ["k0 = 2 from memory, after 0ns: never stored"]);
}

#[test]
fn an_answer_is_never_older_than_one_that_was_there_before() {
    let changes = [(0, 0), (1, 10), (2, 20), (0, 30)];
    let wrong = verdict_on(&changes, &[(2, 20), (1, 21)], 2);
    assert_eq!(wrong, ["k0 = 1 from memory, after 0ns: 2 had been seen before"]);
    let wrong = verdict_on(&changes, &[(0, 30), (2, 31)], 2);
    assert_eq!(wrong, ["k0 = 2 from memory, after 0ns: 0 had been seen before"]);
}
