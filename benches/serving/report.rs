//! Tables of cells.

use crate::cells::{Cell, Results, Spread};
use crate::table::{self, figure};

/// A column of figures beside the size and the server.
pub(crate) enum Column {
    /// Median of a figure, with a number of digits.
    Median { title: &'static str, figure: &'static str, digits: usize },
    /// The reference's figure divided by the row's.
    Ratio { title: &'static str, figure: &'static str, reference: &'static str },
}

use Column::{Median, Ratio};

/// Usual columns: throughput, processor time and latency, with ratios to a reference.
pub(crate) const fn usual(reference: &'static str) -> [Column; 8] {
    [
        Median { title: "requests/s", figure: "requests_per_second", digits: 0 },
        Ratio { title: "rate: afterimage ÷ it", figure: "requests_per_second", reference },
        Median { title: "CPU µs/request", figure: "cpu_us", digits: 1 },
        Ratio { title: "CPU: afterimage ÷ it", figure: "cpu_us", reference },
        Median { title: "Redis CPU µs", figure: "store_cpu_us", digits: 1 },
        Median { title: "p50 ms", figure: "p50_ms", digits: 2 },
        Median { title: "p99 ms", figure: "p99_ms", digits: 2 },
        Median { title: "busy", figure: "busy", digits: 2 },
    ]
}

/// Prints all measurements under one load.
pub(crate) fn print<'a>(
    results: &Results,
    section: &str,
    load: &str,
    columns: impl IntoIterator<Item = &'a Column>,
) {
    let columns: Vec<&Column> = columns.into_iter().collect();
    let cells = results.cells.iter().filter(|it| it.section == section && it.load == load);
    let cells: Vec<&Cell> = cells.collect();
    let troubled = cells.iter().any(|it| it.trouble.is_some());
    let mut head = vec!["size", "server"];
    head.extend(columns.iter().map(|column| match column {
        Median { title, .. } | Ratio { title, .. } => title,
    }));
    if troubled {
        head.push(table::TROUBLE);
    }
    let rows: Vec<Vec<String>> = cells
        .iter()
        .map(|cell| {
            let mut row = vec![cell.size.clone(), cell.server.clone()];
            row.extend(columns.iter().map(|column| match column {
                Median { figure: name, digits, .. } => figure(cell.median(name), *digits),
                Ratio { figure, reference, .. } => {
                    let ours = results.find(section, load, &cell.size, reference);
                    ratio(ours.and_then(|it| it.over(figure, cell, figure)))
                }
            }));
            row.extend(cell.trouble.clone());
            row
        })
        .collect();
    table::print(2, &head, &rows);
}

/// Formats a ratio: the median and the range of the rounds.
pub(crate) fn ratio(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "–".to_owned(),
        |it| format!("{:.2} ({:.2}–{:.2})", it.median, it.low, it.high),
    )
}
