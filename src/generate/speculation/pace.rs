//! Whether guessing pays, by the clock.

use std::collections::BTreeMap;

/// Share of the time that guesses may cost without having paid.
const ALLOWED: f64 = 0.01;
/// Plain passes that they may cost before anything is known of them.
const TRIAL: f64 = 1.0;
/// Plain passes that gains are kept for.
const CREDIT: f64 = 8.0;
/// Plain passes of a batch size before it is compared with.
const KNOWN: usize = 3;
/// Passes with guesses before a plain one is measured again: the longer the text, the slower.
const AGAIN: usize = 64;

#[derive(Default)]
pub(in crate::generate) struct Pace {
    /// By sequences in the pass: plain passes, and their seconds (a running mean).
    plain: BTreeMap<usize, (usize, f64)>,
    spent: f64,
    /// Seconds that plain passes would have taken less (negative: guesses have paid).
    lost: f64,
    since_plain: usize,
    #[cfg(test)]
    always: bool,
}

impl Pace {
    #[cfg(test)]
    pub fn always() -> Self {
        Self {
            always: true,
            ..Self::default()
        }
    }

    /// Whether the next pass, of so many sequences, should have guesses.
    pub fn pays(&self, sequences: usize) -> bool {
        #[cfg(test)]
        if self.always {
            return true;
        }
        let Some((_, plain)) = self.plain.get(&sequences).filter(|p| p.0 >= KNOWN) else {
            return false;
        };
        self.since_plain < AGAIN && self.lost <= ALLOWED * self.spent + TRIAL * plain
    }

    /// A pass of `sequences` that brought `tokens` in `seconds`.
    pub fn tell(&mut self, sequences: usize, tokens: usize, guessed: bool, seconds: f64) {
        self.spent += seconds;
        let (count, plain) = self.plain.entry(sequences).or_default();
        if guessed {
            self.since_plain += 1;
            self.lost += seconds - *plain * tokens as f64 / sequences as f64;
            self.lost = self.lost.max(-CREDIT * *plain);
            return;
        }
        self.since_plain = 0;
        *count += 1;
        let newest = (1.0 / *count as f64).max(0.2);
        *plain += newest * (seconds - *plain);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds that 2,000 tokens take when a pass with guesses takes `cost` plain ones and brings `gain` tokens.
    fn run(cost: f64, gain: usize) -> f64 {
        let mut pace = Pace::default();
        let (mut tokens, mut seconds) = (0, 0.0);
        while tokens < 2000 {
            let guessed = pace.pays(1);
            let (brought, took) = if guessed { (gain, cost) } else { (1, 1.0) };
            pace.tell(1, brought, guessed, took);
            tokens += brought;
            seconds += took;
        }
        seconds
    }

    #[test]
    fn guesses_that_do_not_pay_end() {
        assert!(run(1.5, 1) < 2000.0 / 0.98);
        assert!(run(6.0, 1) < 2000.0 / 0.98);
        assert!(run(1.2, 3) < 2000.0 * 0.42);
    }
}
