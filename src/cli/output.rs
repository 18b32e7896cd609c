//! What commands print: every command writes to standard output and standard error through this file alone
//! (the standard macros panic where a pipe is closed or a disk is full, and clippy refuses them here).

use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::train::StepMetrics;
use crate::{Error, Result};

/// Writes to standard output, at once.
///
/// # Errors
/// [`Error::Closed`] where nobody reads on (`| head`): it ends a command quietly, with exit code 0 as in
/// ripgrep, since whoever closed the pipe has what they wanted. A full disk is a failure.
pub fn print(text: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.to_string().as_bytes());
    printed(written.and_then(|()| out.flush()))
}

/// An object over several lines.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string_pretty(value).expect("reports serialise");
    print(json + "\n")
}

/// An object on a line of its own.
///
/// # Errors
/// As [`print`].
pub fn print_line(value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string(value).expect("reports serialise");
    print(json + "\n")
}

/// What became of writing to standard output.
///
/// # Errors
/// As [`print`].
pub fn printed(written: io::Result<()>) -> Result<()> {
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Error::Closed,
        _ => Error::io("cannot write to", Path::new("standard output"))(error),
    })
}

/// A line on standard error. Where it cannot be written there is nobody to tell.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Tries the file that a command will write when its work is done, before the work begins.
///
/// # Errors
/// A folder of that name, or a place that does not exist or takes no file.
pub fn check_file(path: &Path) -> Result<()> {
    if path.is_dir() || path.file_name().is_none() {
        return Err(Error::file(path, "a folder; name a file to write"));
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        let message = format!(
            "no such folder to write {} into; make it first",
            path.display()
        );
        return Err(Error::file(parent, message));
    }
    tempfile::Builder::new()
        .prefix(".zebroid-")
        .tempfile_in(parent)
        .map(drop)
        .map_err(Error::io("cannot write into", parent))
}

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
