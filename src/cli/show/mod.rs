//! What commands print: every command writes to standard output and standard error through this folder alone
//! (the standard macros panic where a pipe is closed or a disk is full, and clippy refuses them here).

use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::watch::Watch;
use crate::{Error, Result};

pub mod dashboard;
pub mod forecast;
pub mod interrupt;
mod screen;

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

/// What this process was started with, as a shell takes it.
pub fn command_line() -> String {
    let quoted = |word: String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
        match !word.is_empty() && word.chars().all(plain) {
            true => word,
            false => format!("'{}'", word.replace('\'', r"'\''")),
        }
    };
    let words: Vec<String> = std::env::args().map(quoted).collect();
    words.join(" ")
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
        1_048_576..10_737_418_240 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", n as f64 / 1_073_741_824.0),
    }
}

/// Time from one line of progress to the next, where there is no terminal; the first comes earlier.
const EVERY: Duration = Duration::from_secs(10);
/// A stage below this leaves no trace.
const SHORT: Duration = Duration::from_secs(2);

/// How far a command is, on standard error: a bar on a terminal, elsewhere a line now and then, whatever
/// `--verbose` says. From the first stage on, Ctrl-C asks to stop.
#[derive(Default)]
pub struct Progress {
    stage: RefCell<Option<Stage>>,
    /// When the next line is due; at once, before the first.
    due: Cell<Option<Instant>>,
}

/// What is being done.
struct Stage {
    name: String,
    all: usize,
    done: usize,
    note: String,
    started: Instant,
    /// When the first step was told, and which it was: a resumed stage does not start at 0.
    first: Option<(Instant, usize)>,
    /// Hidden where standard error is no terminal.
    bar: ProgressBar,
}

impl Watch for Progress {
    fn start(&self, stage: &str, all: usize) {
        interrupt::install();
        self.end();
        let style =
            ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {msg} [{elapsed} < {eta}]");
        let bar = ProgressBar::new(all as u64);
        bar.set_style(style.expect("a fixed template"));
        bar.set_prefix(stage.to_owned());
        bar.tick();
        let stage = Stage {
            name: stage.to_owned(),
            all,
            done: 0,
            note: String::new(),
            started: Instant::now(),
            first: None,
            bar,
        };
        self.tell(&stage, SHORT);
        self.stage.replace(Some(stage));
    }

    fn at(&self, done: usize, note: &str) {
        if let Some(stage) = self.stage.borrow_mut().as_mut() {
            stage.at(done, note, Instant::now());
            self.tell(stage, EVERY);
        }
    }

    fn note(&self, text: &str) {
        match self.stage.borrow().as_ref() {
            Some(stage) if !stage.bar.is_hidden() => stage.bar.println(text),
            _ => note(text),
        }
    }

    fn stop(&self) -> bool {
        interrupt::asked()
    }
}

impl Progress {
    /// A line if there is no bar and one is due; the next is due `then` later.
    fn tell(&self, stage: &Stage, then: Duration) {
        let now = Instant::now();
        if stage.bar.is_hidden() && self.due(now, then) {
            note(stage.line(now));
        }
    }

    fn due(&self, now: Instant, then: Duration) -> bool {
        let due = self.due.get().is_none_or(|due| now >= due);
        if due {
            self.due.set(Some(now + then));
        }
        due
    }

    fn end(&self) {
        let Some(stage) = self.stage.take() else {
            return;
        };
        let now = Instant::now();
        match (now - stage.started < SHORT, stage.bar.is_hidden()) {
            (true, _) => stage.bar.finish_and_clear(),
            (false, true) => note(stage.line(now)),
            (false, false) => stage.bar.abandon(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

impl Stage {
    fn at(&mut self, done: usize, note: &str, now: Instant) {
        if self.first.is_none() {
            self.first = Some((now, done));
            self.bar.set_position(done as u64);
            self.bar.reset_eta();
        }
        (self.done, self.note) = (done, note.to_owned());
        self.bar.set_position(done as u64);
        self.bar.set_message(note.to_owned());
    }

    /// `select: 12/64 windows, 14s, 61s left`
    fn line(&self, now: Instant) -> String {
        let mut line = format!("{}:", self.name);
        if self.all > 0 {
            line += &format!(" {}/{}", self.done, self.all);
        }
        if !self.note.is_empty() {
            line += &format!(" {}", self.note);
        }
        let elapsed = now - self.started;
        if elapsed < Duration::from_secs(1) {
            return line;
        }
        line += &format!(", {:#}", HumanDuration(elapsed));
        if let Some((since, from)) = self.first
            && self.done > from
            && self.done < self.all
        {
            let each = (now - since).as_secs_f64() / (self.done - from) as f64;
            let left = Duration::from_secs_f64(each * (self.all - self.done) as f64);
            line += &format!(", {:#} left", HumanDuration(left));
        }
        line
    }
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

    #[test]
    fn the_first_line_comes_at_once_and_the_others_at_intervals() {
        let (progress, started) = (Progress::default(), Instant::now());
        let told = (0..60).filter(|second| {
            let then = if *second == 0 { SHORT } else { EVERY };
            progress.due(started + Duration::from_secs(*second), then)
        });
        assert_eq!(told.collect::<Vec<_>>(), [0, 2, 12, 22, 32, 42, 52]);
    }

    #[test]
    fn lines_say_what_how_far_and_how_long() {
        let started = Instant::now();
        let after = |seconds| started + Duration::from_secs(seconds);
        let mut stage = Stage {
            name: "kd".into(),
            all: 100,
            done: 0,
            note: String::new(),
            started,
            first: None,
            bar: ProgressBar::hidden(),
        };
        assert_eq!(stage.line(started), "kd: 0/100");
        // It goes on from step 39; what came before its first step says nothing of the others.
        stage.at(40, "loss 2.5", after(30));
        assert_eq!(stage.line(after(30)), "kd: 40/100 loss 2.5, 30s");
        stage.at(50, "loss 2.4", after(40));
        assert_eq!(stage.line(after(40)), "kd: 50/100 loss 2.4, 40s, 50s left");
        stage.at(100, "loss 2.1", after(90));
        assert_eq!(stage.line(after(90)), "kd: 100/100 loss 2.1, 2m");
        (stage.all, stage.done, stage.note) = (0, 0, String::new());
        assert_eq!(stage.line(started), "kd:");
    }
}
