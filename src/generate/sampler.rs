//! From logits to a token.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
        Ok(())
    }
}

#[derive(Debug)]
pub struct Sampler {
    params: SamplingParams,
    random: ChaCha8Rng,
}

impl Sampler {
    pub fn new(params: &SamplingParams) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(params.seed),
            params: params.clone(),
        }
    }

    /// The next token of `logits [V]`; `-inf` is never drawn.
    ///
    /// # Errors
    /// Logits of which one is not a number or infinite: the weights are broken.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
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
        let p = &self.params;
        if p.temperature == 0.0 {
            return Ok(argmax(logits));
        }
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let logit = |i: u32| logits[i as usize];
        // Ties keep the vocabulary's order, so that a seed gives one text.
        order.sort_by(|a, b| logit(*b).total_cmp(&logit(*a)));
        if p.top_k > 0 {
            order.truncate(p.top_k);
        }
        let best = logit(order[0]) as f64;
        let weight = |i: u32| ((logit(i) as f64 - best) / p.temperature).exp();
        let mut weights: Vec<f64> = order.iter().map(|i| weight(*i)).collect();
        let keep = weights.iter().take_while(|w| **w >= p.min_p).count();
        weights.truncate(keep.max(1));
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let nucleus = weights.iter().take_while(|w| {
            let inside = reached < p.top_p * total;
            reached += **w;
            inside
        });
        let nucleus = nucleus.count().max(1);
        let total: f64 = weights[..nucleus].iter().sum();
        let mut left = self.random.random::<f64>() * total;
        let chosen = weights[..nucleus].iter().position(|w| {
            left -= w;
            left < 0.0
        });
        Ok(order[chosen.unwrap_or(nucleus - 1)])
    }
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
        let mut sampler = Sampler::new(&params);
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[sampler.sample(&LOGITS).unwrap() as usize] += 1;
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
            let sample = |logits: &[f32]| Sampler::new(&params).sample(logits);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
                let message = sample(&[0.0, bad, 1.0]).unwrap_err().to_string();
                assert!(message.contains("for token 1"), "{message}");
            }
            assert_eq!(sample(&[f32::NEG_INFINITY, 0.0]).unwrap(), 1);
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
            let mut sampler = Sampler::new(&params);
            (0..50)
                .map(|_| sampler.sample(&LOGITS).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(), draw());
    }
}
