//! From logits to a token.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::constraint::{Constraint, Format};
use crate::model::{Ask, Row};
use crate::op::sample::cuda::Draw;
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Only the `k` likeliest; 0: all.
    pub top_k: usize,
    /// Only the likeliest that together reach this probability; 1: all.
    pub top_p: f64,
    /// Only those at least this share of the likeliest's probability; 0: all.
    pub min_p: f64,
    pub seed: u64,
    /// `None`: [`MAX_TOKENS`], or what the model's context leaves behind the prompt.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Logits of tokens that the prompt or the answer has are divided by it (multiplied, if negative); 1: not (CTRL, arXiv 1909.05858).
    pub repetition_penalty: f64,
    /// Taken from the logits of tokens that the answer has (OpenAI's).
    pub presence_penalty: f64,
    /// The same for every time that it has them.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Say each token's log-probability, and those of so many likeliest.
    pub logprobs: Option<usize>,
    /// Say the log-probability of each token of the prompt but the first too, and those of so many likeliest.
    pub prompt_logprobs: Option<usize>,
    /// Special tokens that the text shows, by their spelling; others it leaves out.
    pub shown_tokens: Vec<&'static str>,
    /// What the whole answer must look like.
    pub format: Option<Format>,
}

/// Where nobody says how many.
pub const MAX_TOKENS: usize = 200;

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            max_tokens: None,
            stop: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            shown_tokens: Vec::new(),
            format: None,
        }
    }
}

impl SamplingParams {
    /// # Errors
    /// Names the setting out of range.
    pub fn validate(&self) -> Result<()> {
        let say = |name: &str, value: f64, range: &str| {
            Err(Error::invalid(format!("{name} {value} must lie {range}")))
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return say("temperature", self.temperature, "at or above 0");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return say("top_p", self.top_p, "above 0 and at most at 1");
        }
        if !(0.0..1.0).contains(&self.min_p) {
            return say("min_p", self.min_p, "at or above 0 and below 1");
        }
        if !(0.01..=100.0).contains(&self.repetition_penalty) {
            let value = self.repetition_penalty;
            return say("repetition_penalty", value, "between 0.01 and 100");
        }
        for (name, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !(-2.0..=2.0).contains(&value) {
                return say(name, value, "between -2 and 2");
            }
        }
        match self.stop.iter().any(String::is_empty) {
            true => Err(Error::invalid(
                "a stop text is empty: it would end every answer",
            )),
            false => Ok(()),
        }
    }
}

/// How likely a token was, before temperature and limits.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Logprob {
    pub token: u32,
    pub logprob: f64,
    /// The likeliest tokens, falling.
    pub top: Vec<(u32, f64)>,
}

/// A token that was chosen.
#[derive(Debug)]
pub struct Drawn {
    pub token: u32,
    /// Where it was asked for.
    pub logprob: Option<Logprob>,
    /// With it the answer is whole: its form allows nothing more.
    pub last: bool,
}

#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    random: ChaCha8Rng,
    constraint: Option<Constraint>,
    /// How often the answer has each token.
    counts: BTreeMap<u32, usize>,
    /// Tokens of the prompt, where they matter.
    prompt: BTreeSet<u32>,
}

impl Sampler {
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let matter = params.repetition_penalty != 1.0;
        Self {
            random: ChaCha8Rng::seed_from_u64(params.seed),
            constraint: None,
            params: params.clone(),
            counts: BTreeMap::new(),
            prompt: prompt.iter().filter(|_| matter).copied().collect(),
        }
    }

    pub(super) fn constrained(self, constraint: Option<Constraint>) -> Self {
        Self { constraint, ..self }
    }

    /// The same, before its first token, with random numbers of its own.
    pub(super) fn seeded(&self, seed: u64) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(seed),
            ..self.clone()
        }
    }

    /// The same, to guess what it will draw.
    pub(super) fn to_guess(&self) -> Self {
        let mut guess = self.clone();
        guess.params.logprobs = None;
        guess
    }

    /// What it needs to know of the next row.
    pub(super) fn ask(&self) -> Ask {
        let p = &self.params;
        let plain = p.repetition_penalty == 1.0
            && p.presence_penalty == 0.0
            && p.frequency_penalty == 0.0
            && p.logit_bias.is_empty();
        if !plain || p.logprobs.is_some() || self.constraint.is_some() {
            return Ask::Logits;
        }
        if p.temperature == 0.0 {
            return Ask::Best;
        }
        Ask::Draw(Draw {
            temperature: p.temperature as f32,
            top_k: u32::try_from(p.top_k).unwrap_or(0),
            top_p: p.top_p as f32,
            min_p: p.min_p as f32,
            // The number that it goes by when it takes the token.
            uniform: self.random.clone().random::<f64>() as f32,
        })
    }

    /// The next token of what follows a row.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub(super) fn take(&mut self, row: Row) -> Result<Drawn> {
        match row {
            Row::Logits(logits) => self.sample(logits),
            Row::Token(token) => {
                *self.counts.entry(token).or_default() += 1;
                if self.params.temperature > 0.0 {
                    self.random.random::<f64>();
                }
                Ok(Drawn {
                    token,
                    logprob: None,
                    last: false,
                })
            }
        }
    }

    /// The next token of `logits [V]`, which are changed on the way; `-inf` is never drawn.
    ///
    /// # Errors
    /// Logits of which one is not a number or infinite: the weights are broken. A form that cannot be followed any further.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Drawn> {
        if let Some(token) = logits
            .iter()
            .position(|l| l.is_nan() || *l == f32::INFINITY)
        {
            return Err(Error::invalid(format!(
                "the model gives {} for token {token}: its weights, or what they compute, are not finite; \
                 go back to a checkpoint from before",
                logits[token]
            )));
        }
        let plain = self.params.logprobs.map(|top| (logits.to_vec(), top));
        self.penalise(logits);
        if let Some(constraint) = &mut self.constraint {
            constraint.apply(logits)?;
        }
        let token = match self.params.temperature == 0.0 {
            true => argmax(logits),
            false => self.draw(logits),
        };
        *self.counts.entry(token).or_default() += 1;
        let last = match &mut self.constraint {
            Some(constraint) => constraint.take(token)?,
            None => false,
        };
        let logprob = plain.map(|(logits, top)| logprob(&logits, token, top));
        Ok(Drawn {
            token,
            logprob,
            last,
        })
    }

    fn penalise(&self, logits: &mut [f32]) {
        let p = &self.params;
        if p.repetition_penalty != 1.0 {
            let seen: BTreeSet<u32> = self.counts.keys().chain(&self.prompt).copied().collect();
            for token in seen {
                let logit = &mut logits[token as usize];
                *logit = match *logit > 0.0 {
                    true => {
                        (f64::from(*logit) / p.repetition_penalty).min(f64::from(f32::MAX)) as f32
                    }
                    false => (f64::from(*logit) * p.repetition_penalty) as f32,
                };
            }
        }
        if p.presence_penalty != 0.0 || p.frequency_penalty != 0.0 {
            for (token, count) in &self.counts {
                let taken = p.presence_penalty + p.frequency_penalty * *count as f64;
                logits[*token as usize] -= taken as f32;
            }
        }
        for (token, bias) in &p.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let p = &self.params;
        let best = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
        let weight = |i: u32| (f64::from(logits[i as usize] - best) / p.temperature).exp();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // Ties keep the vocabulary's order, so that a seed gives one text.
        let by_logit = |a: &u32, b: &u32| {
            let (x, y) = (logits[*a as usize], logits[*b as usize]);
            y.total_cmp(&x).then(a.cmp(b))
        };
        if p.top_k > 0 && p.top_k < order.len() {
            order.select_nth_unstable_by(p.top_k - 1, by_logit);
            order.truncate(p.top_k);
        }
        if p.min_p > 0.0 {
            order.retain(|i| weight(*i) >= p.min_p);
        }
        let total: f64 = order.iter().map(|i| weight(*i)).sum();
        if p.top_p < 1.0 {
            order = nucleus(order, by_logit, weight, p.top_p * total);
        }
        let total: f64 = order.iter().map(|i| weight(*i)).sum();
        let mut left = self.random.random::<f64>() * total;
        let chosen = order.iter().find(|i| {
            left -= weight(**i);
            left < 0.0
        });
        *chosen.unwrap_or_else(|| {
            order
                .iter()
                .find(|i| weight(**i) > 0.0)
                .unwrap_or(&order[0])
        })
    }
}

/// The likeliest whose weights together reach `wanted`; only those are sorted that may be among them.
fn nucleus(
    all: Vec<u32>,
    by_logit: impl Fn(&u32, &u32) -> Ordering + Copy,
    weight: impl Fn(u32) -> f64,
    wanted: f64,
) -> Vec<u32> {
    for least in [1e-3, 0.0] {
        let mut likely: Vec<u32> = all
            .iter()
            .filter(|i| weight(**i) >= least)
            .copied()
            .collect();
        likely.sort_unstable_by(by_logit);
        let mut reached = 0.0;
        let inside = likely.iter().take_while(|i| {
            let inside = reached < wanted;
            reached += weight(**i);
            inside
        });
        let inside = inside.count();
        if reached >= wanted || least == 0.0 {
            likely.truncate(inside.max(1));
            return likely;
        }
    }
    all
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let best = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
    let sum: f64 = logits.iter().map(|l| f64::from(l - best).exp()).sum();
    let sum = sum.ln();
    logits.iter().map(|l| f64::from(l - best) - sum).collect()
}

/// How likely `token` was by `logits [V]`, and the `top` likeliest.
pub(super) fn logprob(logits: &[f32], token: u32, top: usize) -> Logprob {
    let logprobs = log_softmax(logits);
    Logprob {
        token,
        logprob: logprobs[token as usize],
        top: likeliest(&logprobs, top),
    }
}

/// The `count` likeliest, falling.
fn likeliest(logprobs: &[f64], count: usize) -> Vec<(u32, f64)> {
    let by = |a: &u32, b: &u32| {
        let (x, y) = (logprobs[*a as usize], logprobs[*b as usize]);
        y.total_cmp(&x).then(a.cmp(b))
    };
    let mut order: Vec<u32> = (0..logprobs.len() as u32).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, by);
        order.truncate(count);
    }
    order.sort_unstable_by(by);
    order
        .into_iter()
        .map(|i| (i, logprobs[i as usize]))
        .collect()
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| match logits[i] > logits[best] {
        true => i,
        false => best,
    };
    (0..logits.len()).fold(0, better) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 4] = [1.0, 3.0, 2.0, -1.0];

    fn drawn(params: SamplingParams) -> [usize; 4] {
        let mut sampler = Sampler::new(&params, &[]);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[sampler.sample(&mut LOGITS.clone()).unwrap().token as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_likeliest() {
        assert_eq!(drawn(SamplingParams::default()), [0, 4000, 0, 0]);
        assert_eq!(argmax(&[0.0, 1.0, 1.0]), 1);
    }

    #[test]
    fn logits_that_are_not_numbers_are_an_error() {
        for temperature in [0.0, 1.0] {
            let params = SamplingParams {
                temperature,
                ..Default::default()
            };
            let sample = |logits: &[f32]| Sampler::new(&params, &[]).sample(&mut logits.to_vec());
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let message = sample(&[0.0, bad, 1.0]).unwrap_err().to_string();
                assert!(message.contains("for token 1"), "{message}");
            }
            assert_eq!(sample(&[f32::NEG_INFINITY, 0.0]).unwrap().token, 1);
        }
    }

    #[test]
    fn plain_sampling_follows_softmax() {
        let counts = drawn(SamplingParams {
            temperature: 1.0,
            ..Default::default()
        });
        let total: f32 = LOGITS.iter().map(|l| l.exp()).sum();
        for (count, logit) in counts.iter().zip(LOGITS) {
            let expected = 4000.0 * logit.exp() / total;
            assert!(
                (*count as f32 - expected).abs() < 4.0 * expected.sqrt() + 4.0,
                "{counts:?}"
            );
        }
    }

    #[test]
    fn limits_cut_the_tail() {
        let with = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams {
                temperature: 1.0,
                ..Default::default()
            };
            change(&mut params);
            drawn(params)
        };
        let [a, _, c, d] = with(|p| p.top_k = 2);
        assert!(a == 0 && d == 0 && c > 0);
        // Probabilities: 0.09, 0.66, 0.24, 0.01.
        let [a, _, c, d] = with(|p| p.top_p = 0.8);
        assert!(a == 0 && d == 0 && c > 0);
        let [a, b, c, d] = with(|p| p.min_p = 0.5);
        assert!(a + c + d == 0 && b == 4000);
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let params = SamplingParams {
            temperature: 1.0,
            seed: 5,
            ..Default::default()
        };
        let draw = || {
            let mut sampler = Sampler::new(&params, &[]);
            (0..50)
                .map(|_| sampler.sample(&mut LOGITS.clone()).unwrap().token)
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
    }

    #[test]
    fn penalties_and_biases_move_what_they_name() {
        let next = |change: &dyn Fn(&mut SamplingParams), prompt: &[u32], before: usize| {
            let mut params = SamplingParams::default();
            change(&mut params);
            let mut sampler = Sampler::new(&params, prompt);
            let drawn = (0..=before).map(|_| sampler.sample(&mut LOGITS.clone()).unwrap().token);
            drawn.last().unwrap()
        };
        assert_eq!(next(&|p| p.repetition_penalty = 2.0, &[1], 0), 2);
        assert_eq!(next(&|p| p.presence_penalty = 1.5, &[1], 0), 1);
        assert_eq!(next(&|p| p.presence_penalty = 1.5, &[], 1), 2);
        assert_eq!(next(&|p| p.frequency_penalty = 0.6, &[], 1), 1);
        assert_eq!(next(&|p| p.frequency_penalty = 0.6, &[], 2), 2);
        assert_eq!(next(&|p| p.logit_bias = vec![(3, 10.0)], &[], 0), 3);
    }

    #[test]
    fn log_probabilities_are_those_of_the_model() {
        let params = SamplingParams {
            temperature: 5.0,
            logprobs: Some(2),
            logit_bias: vec![(0, 100.0)],
            ..Default::default()
        };
        let mut sampler = Sampler::new(&params, &[]);
        let Drawn { token, logprob, .. } = sampler.sample(&mut LOGITS.clone()).unwrap();
        let logprob = logprob.unwrap();
        let total: f64 = LOGITS.iter().map(|l| f64::from(*l).exp()).sum();
        assert_eq!((token, logprob.token), (0, 0));
        assert!((logprob.logprob - (1.0 - total.ln())).abs() < 1e-9);
        let top: Vec<u32> = logprob.top.iter().map(|(token, _)| *token).collect();
        assert_eq!(top, [1, 2]);
    }
}
