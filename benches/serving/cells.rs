//! Measurements: figures by load, size, server and round.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

/// One measurement, figure by figure.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// All measurements of one server under one load.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) section: &'static str,
    pub(crate) load: String,
    pub(crate) size: String,
    pub(crate) server: String,
    /// Figures by round, `None` for a failed one, so that two servers can be compared round by round.
    samples: Vec<Option<Figures>>,
    /// Reason of the last failed round.
    pub(crate) trouble: Option<String>,
}

/// A figure over the rounds: the median, and the 10th and the 90th percentile, which are the extremes of a few rounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Cell {
    pub(crate) fn new(section: &'static str, load: &str, size: &str, server: &str) -> Cell {
        let [load, size, server] = [load, size, server].map(String::from);
        Cell { section, load, size, server, samples: Vec::new(), trouble: None }
    }

    pub(crate) fn add(&mut self, measured: Result<Figures>) {
        match measured {
            Ok(figures) => self.samples.push(Some(figures)),
            Err(error) => {
                self.samples.push(None);
                self.trouble = Some(format!("{error:#}").replace(['\n', '|'], " "));
            }
        }
    }

    pub(crate) fn spread(&self, figure: &str) -> Option<Spread> {
        let of = |sample: &Option<Figures>| sample.as_ref()?.get(figure).copied();
        Spread::of(self.samples.iter().filter_map(of).collect())
    }

    pub(crate) fn median(&self, figure: &str) -> Option<f64> {
        self.spread(figure).map(|it| it.median)
    }

    /// Divides a figure by another cell's, round by round, since a disturbance of the machine affects both.
    pub(crate) fn over(&self, figure: &str, other: &Cell, others: &str) -> Option<Spread> {
        let ratio = |(ours, theirs): (&Option<Figures>, &Option<Figures>)| {
            Some(ours.as_ref()?.get(figure)? / theirs.as_ref()?.get(others)?)
        };
        Spread::of(self.samples.iter().zip(&other.samples).filter_map(ratio).collect())
    }

    fn json(&self) -> Value {
        let mut names: Vec<&str> =
            self.samples.iter().flatten().flat_map(BTreeMap::keys).copied().collect();
        names.sort_unstable();
        names.dedup();
        let figures: serde_json::Map<_, _> = names
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), self.spread(name)?.json())))
            .collect();
        json!({
            "section": self.section,
            "load": self.load,
            "size": self.size,
            "server": self.server,
            "samples": self.samples.iter().flatten().count(),
            "figures": figures,
            "trouble": self.trouble,
        })
    }
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Option<Spread> {
        figures.retain(|it| it.is_finite());
        figures.sort_by(f64::total_cmp);
        let median = match figures.len() {
            0 => return None,
            // A quick run has two rounds: the mean, since the upper one alone would be the worse.
            even if even % 2 == 0 => f64::midpoint(figures[even / 2 - 1], figures[even / 2]),
            odd => figures[odd / 2],
        };
        let (low, high) = (percentile(&figures, 0.1), percentile(&figures, 0.9));
        Some(Spread { median, low, high })
    }

    pub(crate) fn json(self) -> Value {
        json!({"median": self.median, "low": self.low, "high": self.high})
    }
}

/// The cells of all sections that have run.
#[derive(Debug, Default)]
pub(crate) struct Results {
    pub(crate) cells: Vec<Cell>,
}

impl Results {
    pub(crate) fn find(
        &self,
        section: &str,
        load: &str,
        size: &str,
        server: &str,
    ) -> Option<&Cell> {
        self.cells.iter().find(|it| {
            it.section == section && it.load == load && it.size == size && it.server == server
        })
    }

    pub(crate) fn json(&self) -> Value {
        self.cells.iter().map(Cell::json).collect()
    }
}

/// Measures each cell once per round. Adjacent cells of the same load are measured in direct succession; their order
/// rotates from round to round.
pub(crate) fn take_turns(
    rounds: usize,
    cells: &mut [Cell],
    mut measure: impl FnMut(&Cell, usize) -> Result<Figures>,
) {
    for round in 0..rounds {
        for group in cells.chunk_by_mut(|one, next| one.load == next.load && one.size == next.size)
        {
            let first = round % group.len();
            group.rotate_left(first);
            for cell in &mut *group {
                eprintln!(
                    "{}, round {} of {rounds}: {} {} {}",
                    cell.section,
                    round + 1,
                    cell.load,
                    cell.size,
                    cell.server
                );
                let measured = measure(cell, round);
                cell.add(measured);
            }
            group.rotate_right(first);
        }
    }
}

/// Converts a count to a figure.
#[expect(clippy::cast_precision_loss, reason = "counts here are far below 2^53")]
pub(crate) fn float(count: u64) -> f64 {
    count as f64
}

/// Percentile of sorted figures: the least one that a part of them doesn't exceed.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rank is between 0 and the count"
)]
pub(crate) fn percentile(sorted: &[f64], part: f64) -> f64 {
    let rank = (part * float(sorted.len() as u64)).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
