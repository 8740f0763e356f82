//! Tables in Markdown.

use std::time::Duration;

/// Prints a table; the first column is text, the others are figures.
pub(crate) fn print(heads: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([heads[column].chars().count(), 3]).max().unwrap_or(3)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cell = |(column, text): (usize, &str)| {
            let width = widths[column];
            if column == 0 { format!("{text:<width$}") } else { format!("{text:>width$}") }
        };
        format!("| {} |", cells.enumerate().map(cell).collect::<Vec<_>>().join(" | "))
    };
    println!("{}", line(&mut heads.iter().copied()));
    let rule = |(column, &width): (usize, &usize)| {
        if column == 0 { "-".repeat(width + 2) } else { format!("{}:", "-".repeat(width + 1)) }
    };
    println!("|{}|", widths.iter().enumerate().map(rule).collect::<Vec<_>>().join("|"));
    for row in rows {
        println!("{}", line(&mut row.iter().map(String::as_str)));
    }
    println!();
}

/// The median.
///
/// # Panics
/// If there are no figures.
pub(crate) fn median<T: Copy + PartialOrd>(figures: impl IntoIterator<Item = T>) -> T {
    let mut figures: Vec<T> = figures.into_iter().collect();
    figures.sort_by(|a, b| a.partial_cmp(b).expect("figures are numbers"));
    figures[figures.len() / 2]
}

/// Three significant digits; a dash for a ratio to zero.
pub(crate) fn figure(value: f64) -> String {
    match value {
        value if !value.is_finite() => "-".into(),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// Mebibytes.
pub(crate) fn mebibytes(bytes: u64) -> String {
    figure(bytes as f64 / f64::from(1 << 20))
}

/// Milliseconds.
pub(crate) fn milliseconds(time: Duration) -> String {
    figure(time.as_secs_f64() * 1e3)
}
