//! What commands print: tables and progress.

use indicatif::{ProgressBar, ProgressStyle};

use crate::train::StepMetrics;

/// Rows under headers, columns aligned: the first to the left, the others to the right.
pub fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headers.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded = cells
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, width))| match i {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(headers.to_vec());
    text += &line(
        widths
            .iter()
            .map(|w| &RULE[..3 * w.min(&(RULE.len() / 3))])
            .collect(),
    );
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

/// 60 times `─`, three bytes each.
const RULE: &str = "────────────────────────────────────────────────────────────";

/// `1234567` → `1,234,567`.
pub fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes for people.
pub fn bytes(n: usize) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        _ => format!("{:.1} MiB", n as f64 / 1_048_576.0),
    }
}

/// A bar on standard error (hidden where that is no terminal) with time left.
pub fn progress(what: &str, total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    let style =
        ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg} [{elapsed} < {eta}]");
    bar.set_style(style.expect("a fixed template"));
    bar.set_prefix(what.to_owned());
    bar
}

/// Shows a training step on its bar.
pub fn show_step(bar: &ProgressBar, metrics: &StepMetrics) {
    bar.set_position(metrics.step);
    bar.set_message(format!(
        "loss {:.4} {:.0} tokens/s",
        metrics.loss, metrics.tokens_per_s
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let text = table(
            &["name", "n"],
            &[
                vec!["a".into(), "100".into()],
                vec!["long name".into(), "2".into()],
            ],
        );
        assert_eq!(
            text,
            "name         n\n─────────  ───\na          100\nlong name    2\n"
        );
        assert_eq!(thousands(1_234_567), "1,234,567");
    }
}
