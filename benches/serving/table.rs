//! Markdown tables with aligned columns, readable on a terminal too.

/// Title of the column that explains missing figures.
pub(crate) const TROUBLE: &str = "trouble";

/// Prints a table. The first columns are left-aligned names, the others right-aligned figures.
pub(crate) fn print(names: usize, head: &[&str], rows: &[Vec<String>]) {
    let head: Vec<String> = head.iter().map(|&it| String::from(it)).collect();
    let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
    let width = |column: usize| {
        let all = std::iter::once(&head).chain(rows);
        all.map(|row| cell(row, column).chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let left = |column: usize| column < names || head[column] == TROUBLE;
    println!();
    for (number, row) in std::iter::once(&head).chain(rows).enumerate() {
        let cells = widths.iter().enumerate().map(|(column, &width)| {
            let cell = cell(row, column);
            if left(column) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        println!("| {} |", cells.collect::<Vec<_>>().join(" | "));
        if number == 0 {
            let rule = widths.iter().enumerate().map(|(column, &width)| {
                let line = "-".repeat(width.max(3) - 1);
                if left(column) { format!("{line}-") } else { format!("{line}:") }
            });
            println!("| {} |", rule.collect::<Vec<_>>().join(" | "));
        }
    }
    println!();
}

/// Formats a figure with a number of digits, or as a dash if there is none.
pub(crate) fn figure(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.digits$}"))
}
