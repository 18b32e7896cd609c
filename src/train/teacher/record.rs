//! A token's targets in as few bytes: `k + 1` logits of 16 bits, then `k` ids of as many bits as the vocabulary asks for, in whole bytes.
//!
//! A logit is the distance to the row's greatest in steps of 2⁻¹¹, so every probability is right within a factor of e^±0.00024, and what
//! is below the greatest by e⁻³² or more counts as that.

use std::ops::Range;

use crate::op::loss::{ABSENT, NO_TOKEN};

/// Steps a nat.
const STEPS: f32 = 2048.0;
/// What is not there.
const NONE: u16 = u16::MAX;

/// What a student learns some positions from: of each the likeliest tokens and all others together.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// Tokens a position.
    pub k: usize,
    /// The likeliest first: `[M, k]`, with [`NO_TOKEN`] where there are fewer.
    pub tokens: Vec<u32>,
    /// Up to a constant, that of all others last: `[M, k + 1]`, with [`ABSENT`] for what is not there.
    pub logits: Vec<f32>,
}

impl Targets {
    /// Of no position.
    pub fn new(k: usize) -> Self {
        Self {
            k,
            tokens: Vec::new(),
            logits: Vec::new(),
        }
    }

    /// Adds a position: at most `k` tokens, the likeliest first, their logits, and that of the others.
    pub fn push(&mut self, tokens: &[u32], logits: impl Iterator<Item = f32>, rest: f32) {
        let end = self.tokens.len() + self.k;
        self.tokens.extend(tokens);
        self.tokens.resize(end, NO_TOKEN);
        let end = self.logits.len() + self.k;
        self.logits.extend(logits);
        self.logits.resize(end, ABSENT);
        self.logits.push(rest);
    }

    /// Of some of the positions.
    pub fn part(&self, range: Range<usize>) -> Self {
        let k = self.k;
        Self {
            k,
            tokens: self.tokens[range.start * k..range.end * k].to_vec(),
            logits: self.logits[range.start * (k + 1)..range.end * (k + 1)].to_vec(),
        }
    }

    /// Moves tokens that a vocabulary of `size` has not to the others.
    pub fn narrow(&mut self, size: usize) {
        let rows = self.tokens.chunks_mut(self.k);
        for (tokens, logits) in rows.zip(self.logits.chunks_mut(self.k + 1)) {
            let (logits, rest) = logits.split_at_mut(self.k);
            for (token, logit) in tokens.iter_mut().zip(logits) {
                if *token as usize >= size && *token != NO_TOKEN {
                    *token = NO_TOKEN;
                    rest[0] = log_sum(rest[0], std::mem::replace(logit, ABSENT));
                }
            }
            // A student that has no other token can give them nothing.
            if tokens.iter().filter(|token| **token != NO_TOKEN).count() == size {
                rest[0] = ABSENT;
            }
        }
    }
}

/// `ln(eᵃ + eᵇ)`.
fn log_sum(a: f32, b: f32) -> f32 {
    a.max(b) + (-(a - b).abs()).exp().ln_1p()
}

/// How a position's targets are stored.
#[derive(Debug, Clone, Copy)]
pub struct Record {
    pub k: usize,
    /// Of an id.
    bits: usize,
}

impl Record {
    pub fn new(k: usize, vocab_size: usize) -> Self {
        let largest = vocab_size.saturating_sub(1);
        Self {
            k,
            bits: (usize::BITS - largest.leading_zeros()).max(1) as usize,
        }
    }

    /// Of a position.
    pub fn bytes(&self) -> usize {
        2 * (self.k + 1) + (self.k * self.bits).div_ceil(8)
    }

    pub fn write(&self, targets: &Targets, to: &mut Vec<u8>) {
        let rows = targets.tokens.chunks(self.k);
        for (tokens, logits) in rows.zip(targets.logits.chunks(self.k + 1)) {
            let greatest = logits.iter().copied().fold(ABSENT, f32::max);
            for logit in logits {
                let code = match *logit {
                    ABSENT => NONE,
                    // Rounded and cut by the conversion.
                    logit => ((STEPS * (greatest - logit)).round() as u16).min(NONE - 1),
                };
                to.extend(code.to_le_bytes());
            }
            let (mut word, mut held) = (0u64, 0);
            for token in tokens {
                let id = if *token == NO_TOKEN { 0 } else { *token };
                word |= u64::from(id) << held;
                held += self.bits;
                while held >= 8 {
                    to.push(word as u8);
                    (word, held) = (word >> 8, held - 8);
                }
            }
            if held > 0 {
                to.push(word as u8);
            }
        }
    }

    /// Adds the positions in `bytes`, which are whole.
    pub fn read(&self, bytes: &[u8], to: &mut Targets) {
        for record in bytes.chunks_exact(self.bytes()) {
            let (codes, ids) = record.split_at(2 * (self.k + 1));
            let (codes, _) = codes.as_chunks::<2>();
            let codes = codes.iter().map(|code| u16::from_le_bytes(*code));
            let logit = |code: u16| match code {
                NONE => ABSENT,
                code => f32::from(code) / -STEPS,
            };
            let (mut word, mut held, mut ids) = (0u64, 0, ids.iter());
            for code in codes.clone().take(self.k) {
                while held < self.bits {
                    let next = ids.next().copied().unwrap_or_default();
                    (word, held) = (word | u64::from(next) << held, held + 8);
                }
                let id = word & ((1 << self.bits) - 1);
                (word, held) = (word >> self.bits, held - self.bits);
                to.tokens.push(match code {
                    NONE => NO_TOKEN,
                    _ => id as u32,
                });
            }
            to.logits.extend(codes.map(logit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for (k, vocab_size, bytes) in [
            (1, 1, 5),
            (3, 2, 9),
            (64, 512, 202),
            (64, 128_256, 266),
            (5, 1 << 31, 32),
        ] {
            let record = Record::new(k, vocab_size);
            assert_eq!(record.bytes(), bytes);
            let mut targets = Targets::new(k);
            for row in 0..9u32 {
                // Rows with fewer tokens, and ids of all sizes.
                let tokens = 0..(k as u32).saturating_sub(row % 3);
                let id =
                    |i: u32| (vocab_size as u32 - 1).wrapping_sub(i * 7 + row) % vocab_size as u32;
                let tokens: Vec<u32> = tokens.map(id).collect();
                let logits = (0..tokens.len()).map(|i| -0.3 * i as f32);
                targets.push(&tokens, logits, -1.5 + row as f32);
            }
            let mut written = Vec::new();
            record.write(&targets, &mut written);
            assert_eq!(written.len(), 9 * bytes);
            let mut read = Targets::new(k);
            record.read(&written, &mut read);
            assert_eq!(read.tokens, targets.tokens);
            let rows = targets.logits.chunks(k + 1).zip(read.logits.chunks(k + 1));
            for (was, is) in rows {
                let greatest = was.iter().copied().fold(ABSENT, f32::max);
                for (was, is) in was.iter().zip(is) {
                    let wanted = if *was == ABSENT {
                        ABSENT
                    } else {
                        was - greatest
                    };
                    assert!((wanted - is).abs() <= 0.5 / STEPS + 1e-6, "{was} {is}");
                }
            }
        }
    }

    #[test]
    fn far_logits_are_cut_and_not_lost() {
        let mut targets = Targets::new(2);
        targets.push(&[4, 5], [90.0, -3.0].into_iter(), -50.0);
        let (record, mut written) = (Record::new(2, 8), Vec::new());
        record.write(&targets, &mut written);
        let mut read = Targets::new(2);
        record.read(&written, &mut read);
        let least = -65_534.0 / STEPS;
        assert_eq!(read.logits, [0.0, least, least]);
    }

    #[test]
    fn tokens_that_a_student_has_not_join_the_others() {
        let mut targets = Targets::new(3);
        targets.push(
            &[9, 1, 2],
            [0.4, 0.3, 0.2].map(f32::ln).into_iter(),
            0.1f32.ln(),
        );
        let mut small = targets.clone();
        targets.narrow(9);
        assert_eq!(targets.tokens, [NO_TOKEN, 1, 2]);
        let expected = [ABSENT, 0.3f32.ln(), 0.2f32.ln(), 0.5f32.ln()];
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-6;
        assert!(targets.logits.iter().zip(&expected).all(near));
        small.tokens[2] = 0;
        small.narrow(2);
        assert_eq!(small.logits[3], ABSENT);
    }
}
