//! Markdown tables with aligned columns, readable on a terminal too.

/// Prints a table. The first columns are left-aligned names, the others right-aligned figures.
pub(crate) fn print(names: usize, head: &[&str], rows: &[Vec<String>]) {
    let head: Vec<String> = head.iter().map(|&it| String::from(it)).collect();
    let all = || std::iter::once(&head).chain(rows);
    let width = |column: usize| all().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    println!();
    for (number, row) in all().enumerate() {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column < names { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        println!("| {} |", cells.collect::<Vec<_>>().join(" | "));
        if number == 0 {
            let rule = widths.iter().enumerate().map(|(column, &width)| {
                let line = "-".repeat(width.max(3) - 1);
                if column < names { format!("{line}-") } else { format!("{line}:") }
            });
            println!("| {} |", rule.collect::<Vec<_>>().join(" | "));
        }
    }
    println!();
}
