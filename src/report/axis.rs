//! Axes: which part of the numbers a plot shows, where its ticks are, how they are written.

/// Maps values to pixels, linearly or by logarithm.
#[derive(Debug, Clone)]
pub struct Axis {
    low: f64,
    high: f64,
    log: bool,
    pixels: (f64, f64),
    pub ticks: Vec<f64>,
}

impl Axis {
    /// An axis over `values` (those that are [`usable`]), or over 0..1 for none.
    /// `room` is the share of the span left free at both ends.
    pub fn over(values: impl Iterator<Item = f64>, log: bool, room: f64) -> Self {
        let mut range = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|&v| usable(v, log)) {
            let value = scaled(value, log);
            range = (range.0.min(value), range.1.max(value));
        }
        let (mut low, mut high) = range;
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let span = high - low;
        // A single value gets a span of its own so that it lies in the middle.
        let room = match span > 1e-12 * high.abs().max(low.abs()) {
            true => span * room,
            false if log => 0.5,
            false => (0.1 * high.abs()).max(0.5),
        };
        let mut axis = Self {
            low: low - room,
            high: high + room,
            log,
            pixels: (0.0, 1.0),
            ticks: Vec::new(),
        };
        axis.ticks = axis.choose_ticks();
        axis
    }

    /// The same axis drawn from pixel `from` (its low end) to `to`.
    pub fn drawn(mut self, from: f64, to: f64) -> Self {
        self.pixels = (from, to);
        self
    }

    pub fn pixel(&self, value: f64) -> f64 {
        let share = (scaled(value, self.log) - self.low) / (self.high - self.low);
        self.pixels.0 + share * (self.pixels.1 - self.pixels.0)
    }

    fn choose_ticks(&self) -> Vec<f64> {
        if !self.log {
            return linear_ticks(self.low, self.high);
        }
        let (first, last) = (self.low.floor() as i32, self.high.ceil() as i32);
        let inside = |value: &f64| (self.low..=self.high).contains(&value.log10());
        // The sparsest of these that still gives three ticks; many decades are thinned out.
        let every = (last - first) as usize / 8 + 1;
        for digits in [&[1.0][..], &[1.0, 3.0], &[1.0, 2.0, 5.0]] {
            let step = if digits.len() == 1 { every } else { 1 };
            let decades = (first..=last).step_by(step);
            let ticks =
                decades.flat_map(|decade| digits.iter().map(move |d| d * 10f64.powi(decade)));
            let ticks: Vec<_> = ticks.filter(inside).collect();
            if ticks.len() >= 3 {
                return ticks;
            }
        }
        linear_ticks(10f64.powf(self.low), 10f64.powf(self.high))
    }
}

/// Whether a value can be drawn at all: finite, and positive on a logarithmic axis.
pub fn usable(value: f64, log: bool) -> bool {
    value.is_finite() && (!log || value > 0.0)
}

fn scaled(value: f64, log: bool) -> f64 {
    if log { value.log10() } else { value }
}

/// Four to eight multiples of 1, 2 or 5 times a power of ten.
fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 6.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = power
        * [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .find(|m| m * power >= rough)
            .unwrap_or(10.0);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A number as short as four digits allow: `0.25`, `20k`, `1.5M`, `3e-5`.
pub fn short(value: f64) -> String {
    let size = value.abs();
    if !value.is_finite() {
        return "–".to_owned();
    }
    if size != 0.0 && !(1e-3..1e12).contains(&size) {
        let text = format!("{value:.2e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{exponent}", trimmed(digits));
    }
    let units = [(1e9, "G"), (1e6, "M"), (1e4, "k")];
    let (unit, suffix) = units
        .into_iter()
        .find(|&(unit, _)| size >= unit)
        .unwrap_or((1.0, ""));
    let unit = if suffix == "k" { 1e3 } else { unit };
    let value = value / unit;
    let decimals = match value.abs() {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        v if v >= 1.0 => 3,
        _ => 4,
    };
    format!("{}{suffix}", trimmed(&format!("{value:.decimals$}")))
}

fn trimmed(number: &str) -> &str {
    match number.contains('.') {
        true => number.trim_end_matches('0').trim_end_matches('.'),
        false => number,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.25, "0.25"),
            (-3.0, "-3"),
            (1234.0, "1234"),
            (20_000.0, "20k"),
            (1.5e6, "1.5M"),
            (3e-5, "3e-5"),
            (1e13, "1e13"),
            (0.001, "0.001"),
            (f64::NAN, "–"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn ticks_are_few_round_and_inside() {
        let cases: [(f64, f64, bool); 7] = [
            (0.0, 1.0, false),
            (-3.7, 12.2, false),
            (1e5, 1.1e5, false),
            (2.0, 3.0, true),
            (1e-4, 1e3, true),
            (1e-30, 1e30, true),
            (0.5, 0.5, true),
        ];
        for (low, high, log) in cases {
            let axis = Axis::over([low, high].into_iter(), log, 0.05).drawn(0.0, 100.0);
            let ticks = &axis.ticks;
            assert!((2..=10).contains(&ticks.len()), "{low}..{high}: {ticks:?}");
            assert!(
                ticks
                    .iter()
                    .all(|&t| (-1e-6..=100.0 + 1e-6).contains(&axis.pixel(t))),
                "{ticks:?}"
            );
        }
        assert_eq!(
            linear_ticks(0.0, 1.0),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
    }

    #[test]
    fn unusable_values_are_ignored() {
        let values = [f64::NAN, f64::INFINITY, -1.0, 0.0, 10.0, 1000.0];
        let axis = Axis::over(values.into_iter(), true, 0.0).drawn(0.0, 100.0);
        assert_eq!((axis.pixel(10.0), axis.pixel(1000.0)), (0.0, 100.0));
    }
}
