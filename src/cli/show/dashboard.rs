//! `--dashboard`: a training run on the whole terminal. Without it, and where there is no terminal,
//! [`Progress`](super::Progress) shows it.

use std::cell::{Cell, RefCell};
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use console::Term;
use indicatif::HumanDuration;

use super::{bytes, interrupt, screen, thousands};
use crate::op::runtime::peak_memory;
use crate::train::StepMetrics;
use crate::watch::Watch;

/// Owns the terminal until it is dropped.
pub struct Dashboard {
    view: RefCell<View>,
    drawn: Cell<Option<Instant>>,
}

/// What is to be seen.
#[derive(Default)]
struct View {
    name: String,
    steps: usize,
    last: Option<StepMetrics>,
    /// When the first step was told, and which it was: a resumed run does not start at 0.
    first: Option<(Instant, u64)>,
    /// Over tokens.
    loss: Vec<(f64, f64)>,
    eval_kl: Vec<(f64, f64)>,
    note: String,
}

/// Between two pictures.
const EVERY: Duration = Duration::from_millis(200);

impl Dashboard {
    /// None where standard output or standard error is no terminal.
    pub fn open() -> Option<Self> {
        if !io::stdout().is_terminal() || !io::stderr().is_terminal() {
            return None;
        }
        screen::take().ok()?;
        Some(Self {
            view: RefCell::default(),
            drawn: Cell::default(),
        })
    }

    /// A step is done.
    pub fn step(&self, metrics: &StepMetrics) {
        let now = Instant::now();
        self.view.borrow_mut().step(metrics, now);
        if self.drawn.get().is_none_or(|drawn| now - drawn >= EVERY) {
            self.draw(now);
        }
    }

    fn draw(&self, now: Instant) {
        let (height, width) = Term::stderr().size();
        let (width, height) = (usize::from(width), usize::from(height));
        let stopping = interrupt::asked();
        screen::show(&self.view.borrow().lines(width, height, now, stopping));
        self.drawn.set(Some(now));
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        screen::give_back();
    }
}

impl Watch for Dashboard {
    fn start(&self, stage: &str, all: usize) {
        interrupt::install();
        self.view.replace(View {
            name: stage.to_owned(),
            steps: all,
            ..View::default()
        });
        self.draw(Instant::now());
    }

    /// [`Dashboard::step`] says more.
    fn at(&self, _: usize, _: &str) {}

    fn note(&self, line: &str) {
        self.view.borrow_mut().note = line.to_owned();
        self.draw(Instant::now());
    }

    fn stop(&self) -> bool {
        interrupt::asked()
    }
}

const STOPPING: &str = "stopping at the next safe point; press Ctrl-C again to stop at once";
/// Of the bar, in characters.
const BAR: usize = 40;

impl View {
    fn step(&mut self, metrics: &StepMetrics, now: Instant) {
        let tokens = metrics.tokens as f64;
        self.first.get_or_insert((now, metrics.step));
        self.loss.push((tokens, metrics.loss));
        let eval_kl = metrics.terms.get("eval_kl").and_then(|kl| kl.as_f64());
        self.eval_kl.extend(eval_kl.map(|kl| (tokens, kl)));
        self.last = Some(metrics.clone());
    }

    /// The picture: figures, bar, curves one above the other, and the last note.
    fn lines(&self, width: usize, height: usize, now: Instant, stopping: bool) -> Vec<String> {
        let mut lines = vec![self.figures(), self.progress(now)];
        let curves = [("loss", &self.loss), ("eval_kl", &self.eval_kl)];
        let curves = curves.iter().filter(|(_, points)| !points.is_empty());
        let room = height.saturating_sub(lines.len() + 1);
        let each = room / curves.clone().count().max(1);
        for (name, points) in curves {
            lines.extend(curve(name, points, width, each));
        }
        lines.resize(height.saturating_sub(1), String::new());
        lines.push(match stopping {
            true => STOPPING.into(),
            false => self.note.clone(),
        });
        let cut = |line: String| line.chars().take(width).collect();
        lines.into_iter().map(cut).collect()
    }

    fn figures(&self) -> String {
        let mut text = self.name.clone();
        if let Some(last) = &self.last {
            text += &format!("  loss {:.4}", last.loss);
            if let Some((_, kl)) = self.eval_kl.last() {
                text += &format!("  eval_kl {kl:.4}");
            }
            let [tokens, rate] = [last.tokens as usize, last.tokens_per_s as usize].map(thousands);
            text += &format!("  {tokens} tokens, {rate} a second");
        }
        match peak_memory() {
            Some(peak) => text + &format!("  memory {} at most", bytes(peak)),
            None => text,
        }
    }

    /// `█████░░░░░ 120/400, 3m left`
    fn progress(&self, now: Instant) -> String {
        let done = self.last.as_ref().map_or(0, |m| m.step as usize);
        let full = (BAR * done.min(self.steps)).checked_div(self.steps);
        let full = full.unwrap_or(0);
        let bar = "█".repeat(full) + &"░".repeat(BAR - full);
        let text = format!("{bar} {done}/{}", self.steps);
        match self.first {
            Some((since, from)) if done > from as usize && done < self.steps => {
                let each = (now - since).as_secs_f64() / (done - from as usize) as f64;
                let left = Duration::from_secs_f64(each * (self.steps - done) as f64);
                format!("{text}, {:#} left", HumanDuration(left))
            }
            _ => text,
        }
    }
}

/// Before a curve's picture.
const MARGIN: usize = 12;

/// A curve in `height` lines: its name, the picture between its greatest and its least value, and the tokens that it goes over.
/// Nothing where there is no room.
fn curve(name: &str, points: &[(f64, f64)], width: usize, height: usize) -> Vec<String> {
    let (columns, rows) = (width.saturating_sub(MARGIN), height.saturating_sub(2));
    if columns == 0 || rows == 0 {
        return Vec::new();
    }
    let bounds = |of: fn(&(f64, f64)) -> f64| {
        let values = points.iter().map(of);
        let low = values.clone().fold(f64::INFINITY, f64::min);
        let high = values.fold(f64::NEG_INFINITY, f64::max);
        [low, high]
    };
    let (x, y) = (bounds(|point| point.0), bounds(|point| point.1));
    let mut lines = vec![name.to_owned()];
    for (i, row) in picture(points, [columns, rows], x, y).iter().enumerate() {
        let label = match i {
            0 => format!("{:.4}", y[1]),
            last if last == rows - 1 => format!("{:.4}", y[0]),
            _ => String::new(),
        };
        lines.push(format!("{label:>width$} {row}", width = MARGIN - 1));
    }
    let [from, to] = x.map(|tokens| thousands(tokens as usize));
    let room = columns.saturating_sub(from.len());
    lines.push(format!("{:MARGIN$}{from}{to:>room$}", ""));
    lines
}

/// Dots of a braille character, by their column and row (U+2800 is none of them).
const DOTS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];

/// Points joined by lines, two by four dots a character; `x` and `y`: what is at the edges.
fn picture(
    points: &[(f64, f64)],
    [columns, rows]: [usize; 2],
    x: [f64; 2],
    y: [f64; 2],
) -> Vec<String> {
    let place = |value: f64, [low, high]: [f64; 2], dots: usize| match high > low {
        true => (value - low) / (high - low) * (dots - 1) as f64,
        false => 0.0,
    };
    let at = |point: &(f64, f64)| {
        let down = (4 * rows - 1) as f64 - place(point.1, y, 4 * rows);
        (place(point.0, x, 2 * columns), down)
    };
    let mut cells = vec![vec![0u8; columns]; rows];
    let mut before = points.first().map(at);
    for (right, down) in points.iter().map(at) {
        let from = before.replace((right, down)).unwrap_or((right, down));
        let steps = (right - from.0).abs().max((down - from.1).abs()).ceil();
        for i in 0..=steps as usize {
            let share = i as f64 / steps.max(1.0);
            let [right, down] = [(from.0, right), (from.1, down)]
                .map(|(from, to)| (from + share * (to - from)).round() as usize);
            cells[down / 4][right / 2] |= DOTS[right % 2][down % 4];
        }
    }
    let character = |dots: u8| char::from_u32(0x2800 + u32::from(dots)).unwrap_or(' ');
    let line = |row: Vec<u8>| row.into_iter().map(character).collect();
    cells.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_has_figures_curves_and_time() {
        let started = Instant::now();
        let mut view = View {
            name: "kd".into(),
            steps: 400,
            note: "a note".into(),
            ..View::default()
        };
        let empty = view.lines(80, 20, started, false);
        assert_eq!((empty.len(), empty[19].as_str()), (20, "a note"));
        assert!(empty[1].ends_with("░ 0/400"), "{}", empty[1]);
        for i in 0..=60u64 {
            let terms = match i.is_multiple_of(20) {
                true => serde_json::json!({ "eval_kl": 1.0 / (i + 1) as f64 }),
                false => serde_json::json!({}),
            };
            let metrics = StepMetrics {
                // Resumed at step 40.
                step: 40 + i,
                tokens: 100 * (40 + i),
                loss: 3.0 - i as f64 / 60.0,
                lr: 0.1,
                grad_norm: vec![1.0],
                layer_grad_norm: Vec::new(),
                terms: terms.as_object().unwrap().clone(),
                tokens_per_s: 1234.5,
                skipped: None,
            };
            view.step(&metrics, started + Duration::from_secs(i));
        }
        let now = started + Duration::from_secs(60);
        let lines = view.lines(80, 20, now, false);
        let whole = lines.join("\n");
        let figures = "kd  loss 2.0000  eval_kl 0.0164  10,000 tokens, 1,234 a second";
        assert!(lines[0].starts_with(figures), "{whole}");
        assert!(lines[1].starts_with("██████████░") && lines[1].ends_with("100/400, 5m left"));
        assert_eq!((lines[2].as_str(), lines[10].as_str()), ("loss", "eval_kl"));
        // It falls from the upper left to the lower right.
        assert!(lines[3].starts_with("     3.0000 ⠉"), "{whole}");
        assert!(
            lines[8].starts_with("     2.0000 ⠀") && lines[8].ends_with('⣀'),
            "{whole}"
        );
        assert!(lines[9].ends_with(" 10,000") && lines[9].contains("4,000"));
        assert!(view.lines(80, 20, now, true)[19].starts_with("stopping"));
        // In the smallest of terminals there is no panic, and never a line too many.
        for (width, height) in [(0, 0), (5, 1), (20, 4), (13, 9)] {
            let lines = view.lines(width, height, now, false);
            assert_eq!(lines.len(), height.max(1), "{width} x {height}");
        }
    }

    #[test]
    fn lines_join_points() {
        let rising = picture(&[(0.0, 0.0), (3.0, 3.0)], [2, 1], [0.0, 3.0], [0.0, 3.0]);
        assert_eq!(rising, ["⡠⠊"]);
        // One value, many times.
        let flat = picture(&[(0.0, 1.0), (3.0, 1.0)], [2, 1], [0.0, 3.0], [1.0, 1.0]);
        assert_eq!(flat, ["⣀⣀"]);
        assert_eq!(picture(&[], [1, 1], [0.0, 1.0], [0.0, 1.0]), ["\u{2800}"]);
    }
}
