//! Preference optimisation: the model makes chosen answers likelier than rejected ones, measured against
//! what it was at the start. The log-probabilities of that frozen model are computed once, before the first step,
//! and stored, so that no second model is resident.

use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::student::{Student, Summand};
use super::{Shares, Terms, ids, next_token_losses, scalar};
use crate::checkpoint::{Kept, Key, keep, kept};
use crate::data::{Batch, Batches, Lengths, Preferences};
use crate::model::{LOGITS, Lm, Parts, pieces};
use crate::numerics;
use crate::op::matmul::roughly;
use crate::watch::Watch;
use crate::weights::Place;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// `−ln σ(β h)` with `h` the gain in log-probability of chosen over rejected (DPO, arXiv 2305.18290).
    #[default]
    Sigmoid,
    /// `(h − 1/(2β))²`, log-probabilities a token (IPO, arXiv 2310.12036; a mean per token, as TRL has it).
    Ipo,
    /// `−ln σ(β (π_c − π_r) − γ)`, log-probabilities a token, no frozen model (SimPO, arXiv 2405.14734).
    Simpo,
}

/// The same on the command line and in a recipe's `[dpo]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct DpoConfig {
    /// Which preference loss.
    #[arg(long, alias = "dpo-loss", value_enum, default_value_t = Self::default().loss)]
    pub loss: DpoLoss,
    /// How closely the model stays to what it was.
    #[arg(long, default_value_t = Self::default().beta)]
    pub beta: f64,
    /// The margin that SimPO asks for.
    #[arg(long, default_value_t = Self::default().gamma)]
    pub gamma: f64,
    /// Tokens of a prompt that are kept, its last ones.
    #[arg(long, default_value_t = Self::default().max_prompt)]
    pub max_prompt: usize,
    /// Longest prompt with its answer, in tokens.
    #[arg(long, default_value_t = Self::default().max_length)]
    pub max_length: usize,
}

impl Default for DpoConfig {
    fn default() -> Self {
        Self {
            loss: DpoLoss::Sigmoid,
            beta: 0.01,
            gamma: 0.0,
            max_prompt: 512,
            max_length: 1024,
        }
    }
}

impl DpoConfig {
    /// How pairs are cut.
    pub fn lengths(&self) -> Lengths {
        Lengths {
            max_prompt: self.max_prompt,
            max_length: self.max_length,
        }
    }

    /// # Errors
    /// Names the field that cannot work.
    pub fn validate(&self) -> Result<()> {
        let (beta, gamma) = (self.beta, self.gamma);
        if !(beta > 0.0 && beta.is_finite()) {
            return Err(Error::invalid(format!("beta {beta} must be above 0")));
        }
        if !gamma.is_finite() {
            return Err(Error::invalid(format!("gamma {gamma} must be a number")));
        }
        // A token of the prompt, and one of the answer that it predicts.
        for (name, value, least) in [
            ("max_prompt", self.max_prompt, 1),
            ("max_length", self.max_length, 2),
        ] {
            if value < least {
                return Err(Error::invalid(format!(
                    "{name} {value} must be at least {least}"
                )));
            }
        }
        Ok(())
    }

    /// Rewards of the rows `[2P]` (chosen, rejected, ..), and the loss of every pair `[P]`.
    /// `log_probs` sums of answers, `frozen` the same of the model as it was, `lengths` their tokens.
    fn loss(
        &self,
        log_probs: &Tensor,
        frozen: &Tensor,
        lengths: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let gains = match self.loss {
            DpoLoss::Sigmoid => (log_probs - frozen)?,
            DpoLoss::Ipo => ((log_probs - frozen)? / lengths)?,
            DpoLoss::Simpo => (log_probs / lengths)?,
        };
        let pairs = gains.reshape(((), 2))?;
        let h = (pairs.narrow(1, 0, 1)? - pairs.narrow(1, 1, 1)?)?.squeeze(1)?;
        let loss = match self.loss {
            DpoLoss::Sigmoid => softplus(&(h * -self.beta)?)?,
            DpoLoss::Ipo => (h - 0.5 / self.beta)?.sqr()?,
            DpoLoss::Simpo => softplus(&h.affine(-self.beta, self.gamma)?)?,
        };
        Ok(((gains * self.beta)?, loss))
    }
}

/// `ln(1 + eˣ)`, for large `x` too.
fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok((x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?)
}

pub struct Dpo {
    pub student: Student,
    config: DpoConfig,
    data_hash: String,
    /// `[chosen, rejected]` of every pair.
    frozen: Vec<[f32; 2]>,
}

impl Dpo {
    /// `stored`: a file of the frozen model's log-probabilities; read if it is of this model and data, else written.
    ///
    /// # Errors
    /// Settings that cannot work, a file that cannot be written, or [`Error::Interrupted`].
    pub fn new(
        student: &Parts,
        pairs: &Preferences,
        config: DpoConfig,
        stored: &Path,
        place: &Place,
        watch: &dyn Watch,
    ) -> Result<Self> {
        config.validate()?;
        let student = Student::new(student, |_| true, place)?;
        let key = serde_json::json!({ "student": student.hash()?, "pairs": pairs.hash() });
        let key = Key::new(numerics::Stage::Dpo, student.lm.device(), key);
        let log_probs = match kept(stored, &key)? {
            Kept::Found { mut tensors, .. } => tensors.remove(LOG_PROBS),
            Kept::Nothing | Kept::Other(_) => None,
        };
        let log_probs = match log_probs {
            Some(log_probs) => log_probs,
            None => {
                // As a step computes them: before the first the model is what it was.
                let log_probs = roughly(|| frozen(student.snapshot(), pairs, watch))?;
                let tensors = [(LOG_PROBS.to_owned(), log_probs.clone())];
                keep(stored, &key, pairs.len() as u64, &tensors.into())?;
                log_probs
            }
        };
        let frozen = log_probs.to_vec2::<f32>()?;
        let frozen = frozen.iter().map(|pair| [pair[0], pair[1]]).collect();
        Ok(Self {
            student,
            config,
            data_hash: pairs.hash(),
            frozen,
        })
    }

    /// What it is told to do, as recipes spell it.
    pub(super) fn settings(&self) -> serde_json::Value {
        serde_json::json!({ "objective": self.config })
    }

    pub(super) fn identity(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({
            "stage": "dpo",
            "student": self.student.hash()?,
            "pairs": self.data_hash,
            "dpo": self.config,
        }))
    }

    pub(super) fn backward(&mut self, batch: &Batch, shares: &Shares) -> Result<Terms> {
        let device = self.student.lm.device().clone();
        let ids = ids(batch, &device)?;
        let pass = self.student.forward(&ids, &batch.documents, |_| None)?;
        let mut answers = Answers::new(batch);
        self.student
            .look(&pass, |range, logits| answers.add(range, logits))?;
        let (log_probs, lengths) = answers.of_rows(&device)?;
        let frozen: Vec<f32> = (batch.examples.iter().enumerate())
            .map(|(row, pair)| self.frozen[*pair][row % 2])
            .collect();
        let frozen = Tensor::from_vec(frozen, batch.rows, &device)?;
        let log_probs = Var::from_tensor(&log_probs)?;
        let (rewards, losses) = self.config.loss(&log_probs, &frozen, &lengths)?;
        let loss = (losses.mean_all()? * shares.rows)?;
        if let Some(step) = &mut self.student.at_once {
            step.judge(scalar(&loss)?)?;
        }
        // The loss is one of the rows' sums: what a token's log-probability is worth is what its row's is.
        let grads = loss.backward()?;
        let worth = grads.get(&log_probs).map(|g| g.to_vec1::<f32>());
        let worth = worth.transpose()?.unwrap_or_else(|| vec![0.0; batch.rows]);
        let by_token = |range: Range<usize>, logits: &Tensor| {
            let weights = range.clone().map(|i| -worth[i / batch.len] * batch.mask[i]);
            let weights = Tensor::from_iter(weights, &device)?;
            Ok(vec![Summand {
                name: "",
                value: (next_token_losses(batch, range, logits)? * weights)?.sum_all()?,
                weight: 1.0,
            }])
        };
        (self.student).back(pass, |_| None, by_token)?;
        let rewards = rewards.reshape(((), 2))?.to_vec2::<f32>()?;
        let mean = |of: &dyn Fn(&Vec<f32>) -> f32| {
            shares.rows * f64::from(rewards.iter().map(of).sum::<f32>()) / rewards.len() as f64
        };
        let named = [
            ("accuracy", mean(&|r| f32::from(u8::from(r[0] > r[1])))),
            ("margin", mean(&|r| r[0] - r[1])),
            ("reward_chosen", mean(&|r| r[0])),
            ("reward_rejected", mean(&|r| r[1])),
        ];
        Ok(Terms {
            loss: scalar(&loss)?,
            named: named.map(|(name, value)| (name.to_owned(), value)).into(),
            phases: Vec::new(),
        })
    }
}

/// Summed log-probabilities of a batch's answers.
struct Answers<'a> {
    batch: &'a Batch,
    sums: Vec<f64>,
}

impl<'a> Answers<'a> {
    fn new(batch: &'a Batch) -> Self {
        Self {
            batch,
            sums: vec![0.0; batch.rows],
        }
    }

    /// The logits of some positions.
    fn add(&mut self, range: Range<usize>, logits: &Tensor) -> Result<()> {
        let losses = next_token_losses(self.batch, range.clone(), logits)?.to_vec1::<f32>()?;
        for (i, loss) in range.zip(losses) {
            self.sums[i / self.batch.len] -= f64::from(loss * self.batch.mask[i]);
        }
        Ok(())
    }

    /// Of every row: the sum, and the answer's tokens; both `[rows]`.
    fn of_rows(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let sums = Tensor::from_iter(self.sums.iter().map(|sum| *sum as f32), device)?;
        let rows = self.batch.mask.chunks(self.batch.len);
        let lengths = Tensor::from_iter(rows.map(|mask| mask.iter().sum::<f32>()), device)?;
        Ok((sums, lengths))
    }
}

/// Pairs a forward pass of the frozen model.
pub const CHUNK: usize = 8;

/// `[pairs, 2]`: chosen, rejected.
fn frozen(lm: &Lm, pairs: &Preferences, watch: &dyn Watch) -> Result<Tensor> {
    watch.start("dpo, frozen model", pairs.len());
    let order: Vec<usize> = (0..pairs.len()).collect();
    let mut found = Vec::with_capacity(2 * order.len());
    for chunk in order.chunks(CHUNK) {
        let batch = pairs.rows(chunk);
        let hidden = lm.hidden(&ids(&batch, lm.device())?, Some(&batch.documents))?;
        let mut answers = Answers::new(&batch);
        for range in pieces(batch.targets.len(), lm.config.vocab_size, LOGITS) {
            let logits = lm.logits(&hidden, &range)?;
            answers.add(range, &logits)?;
        }
        found.extend(answers.sums.iter().map(|sum| *sum as f32));
        watch.reached(found.len() / 2, order.len(), "pairs")?;
    }
    Ok(Tensor::from_vec(
        found,
        (pairs.len(), 2),
        &candle_core::Device::Cpu,
    )?)
}

const LOG_PROBS: &str = "log_probs";

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    #[test]
    fn losses_are_what_the_papers_say_and_have_their_gradients() {
        let tensor = |x: [f64; 4]| Tensor::new(&x, &Device::Cpu).unwrap();
        let (now, before, lengths) = (
            [-3.0, -5.0, -8.0, -4.0],
            tensor([-4.0, -4.5, -7.0, -5.0]),
            tensor([2.0, 3.0, 4.0, 2.0]),
        );
        let sigma = |x: f64| -(1.0 / (1.0 + (-x).exp())).ln();
        for (loss, expected) in [
            // h = 1.0 + 0.5 and −1.0 − 1.0.
            (DpoLoss::Sigmoid, [sigma(0.2 * 1.5), sigma(0.2 * -2.0)]),
            // h = 1/2 + 0.5/3 and −1/4 − 1/2.
            (
                DpoLoss::Ipo,
                [(0.5 + 0.5 / 3.0 - 2.5f64).powi(2), (-0.75 - 2.5f64).powi(2)],
            ),
            // π = −3/2 + 5/3 and −2 + 2.
            (
                DpoLoss::Simpo,
                [sigma(0.2 * (5.0 / 3.0 - 1.5) - 0.3), sigma(-0.3)],
            ),
        ] {
            let config = DpoConfig {
                loss,
                beta: 0.2,
                gamma: 0.3,
                ..DpoConfig::default()
            };
            let of = |x: &Tensor| config.loss(x, &before, &lengths).unwrap().1;
            let x = Var::from_tensor(&tensor(now)).unwrap();
            let found = of(x.as_tensor());
            for (a, b) in found.to_vec1::<f64>().unwrap().iter().zip(expected) {
                assert!((a - b).abs() < 1e-12, "{loss:?}: {a} for {b}");
            }
            let grads = found.sum_all().unwrap().backward().unwrap();
            let grads = grads.get(&x).unwrap().to_vec1::<f64>().unwrap();
            for (i, grad) in grads.iter().enumerate() {
                let at = |step: f64| {
                    let mut moved = now;
                    moved[i] += step;
                    of(&tensor(moved))
                        .sum_all()
                        .unwrap()
                        .to_scalar::<f64>()
                        .unwrap()
                };
                let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
                assert!(
                    (slope - grad).abs() < 1e-8,
                    "{loss:?} {i}: {grad} for {slope}"
                );
            }
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let default = DpoConfig::default();
        assert_eq!((default.max_prompt, default.max_length), (512, 1024));
        for (config, part) in [
            (
                DpoConfig {
                    beta: 0.0,
                    ..default
                },
                "beta 0",
            ),
            (
                DpoConfig {
                    max_prompt: 0,
                    ..default
                },
                "max_prompt 0 must be at least 1",
            ),
            (
                DpoConfig {
                    max_length: 1,
                    ..default
                },
                "max_length 1 must be at least 2",
            ),
        ] {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
