//! How to train: what is asked ([`TrainSettings`], one flag or key a field) and what it means ([`TrainConfig`]).

use std::f64::consts::PI;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::clip::{Clip, ClipBy};
use super::optimizer::{GaloreConfig, OptimizerConfig, OptimizerName};
use super::params::Update;
use crate::op::adamw::AdamW;
use crate::weights::Precision;
use crate::{Error, Result};

/// How the learning rate falls, after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Half a cosine over all steps.
    #[default]
    Cosine,
    /// Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): the peak, then a straight line over the last
    /// `decay` of the steps.
    Wsd,
}

/// What follows a step whose loss or gradient is not finite, or whose loss is a spike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OnDivergence {
    /// The run ends; its last save stays.
    Stop,
    /// The step is left out; after three in a row the weights are those of the last save again.
    #[default]
    Skip,
    /// The same, and from each return on the learning rate is halved.
    Lower,
}

/// Share of the steps in which wsd falls, where nobody says.
const WSD_DECAY: f64 = 0.5;
/// Times the usual loss.
const SPIKE: f64 = 10.0;
/// A step's tokens are held in memory, as one large batch.
const MOST_TOKENS: usize = 1 << 24;

/// What a person says of a training run; [`TrainConfig`] is what it means. The same on the command line and in a
/// recipe's `train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSettings {
    /// Optimizer steps.
    #[arg(long)]
    pub steps: Option<u64>,
    /// Tokens to train on, rounded down to whole steps.
    #[arg(long, conflicts_with = "steps")]
    pub tokens: Option<u64>,
    /// Passes over the data [default, if neither tokens nor steps are given: 1].
    #[arg(long, conflicts_with_all = ["steps", "tokens"])]
    pub epochs: Option<f64>,
    /// Windows (or preference pairs) per micro-batch.
    #[arg(long, default_value_t = Self::default().batch_size)]
    pub batch_size: usize,
    /// Micro-batches per step.
    #[arg(long, default_value_t = Self::default().accumulation)]
    pub accumulation: usize,
    /// Tokens per window.
    #[arg(long, default_value_t = Self::default().seq_len)]
    pub seq_len: usize,
    /// How trained matrices are kept; bf16 takes half the memory, rounds stochastically, and is what a GPU computes in then.
    #[arg(long, value_enum, default_value_t = Self::default().weights)]
    #[serde(skip_serializing_if = "is_default")]
    pub weights: Precision,
    /// What a step follows.
    #[arg(long, value_enum, default_value_t = Self::default().optimizer)]
    pub optimizer: OptimizerName,
    /// Peak learning rate.
    #[arg(long, default_value_t = Self::default().lr)]
    pub lr: f64,
    /// Peak learning rate of what Muon leaves to AdamW: embedding, head, norms, vectors [default: that of --lr].
    #[arg(long)]
    pub adamw_lr: Option<f64>,
    /// Peak learning rate of the mixers that replaced attention; that of --adamw-lr is in proportion [default: that of --lr].
    #[arg(long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer_lr: Option<f64>,
    /// Learning rates are shares of the size of the weights: times the median root mean square of the layers' matrices that are trained, as they
    /// are at first. One rate suits teachers whose weights differ in size (Adafactor's scale_parameter, arXiv 1804.04235).
    #[arg(long)]
    #[serde(skip_serializing_if = "is_default")]
    pub scale_parameter: bool,
    #[command(flatten)]
    #[serde(skip_serializing_if = "is_default")]
    pub galore: GaloreConfig,
    /// Share of the steps that warm up linearly.
    #[arg(long, default_value_t = Self::default().warmup)]
    pub warmup: f64,
    /// How the learning rate falls.
    #[arg(long, value_enum, default_value_t = Self::default().lr_scheduler)]
    pub lr_scheduler: LrScheduler,
    /// Share of the steps in which wsd falls; 1 is a straight line from the beginning [default: 0.5].
    #[arg(long)]
    pub decay: Option<f64>,
    /// Learning rate at the end, as a share of the peak.
    #[arg(long, default_value_t = Self::default().min_lr)]
    pub min_lr: f64,
    /// Decoupled weight decay, times the learning rate, of matrices: not of norms, biases, convolutions, A_log, dt_bias and D.
    #[arg(long, default_value_t = Self::default().weight_decay)]
    pub weight_decay: f64,
    /// AdamW's decay of first moments.
    #[arg(long, default_value_t = Self::default().beta1)]
    pub beta1: f64,
    /// AdamW's decay of second moments.
    #[arg(long, default_value_t = Self::default().beta2)]
    pub beta2: f64,
    /// AdamW's term against division by 0.
    #[arg(long, default_value_t = Self::default().eps)]
    pub eps: f64,
    /// Gradient norm is clipped to this; 0 never clips.
    #[arg(long, default_value_t = Self::default().clip)]
    pub clip: f64,
    /// What is clipped together; by layer (or never, --clip 0) gradients are applied as they appear where --accumulation is 1, and are
    /// never all in memory.
    #[arg(long, value_enum, default_value_t = Self::default().clip_by)]
    #[serde(skip_serializing_if = "is_default")]
    pub clip_by: ClipBy,
    /// What follows a step whose loss or gradient is not finite, or whose loss is a spike.
    #[arg(long, value_enum, default_value_t = Self::default().on_divergence)]
    pub on_divergence: OnDivergence,
    /// A loss is a spike above so many times the median of the last 50 steps, if it is above those of the beginning too; 0: never.
    #[arg(long, value_name = "TIMES", default_value_t = Self::default().spike)]
    pub spike: f64,
    /// Seed of the data order, and of what an initialisation draws.
    #[arg(long, default_value_t = Self::default().seed)]
    pub seed: u64,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            steps: None,
            tokens: None,
            epochs: None,
            batch_size: 16,
            accumulation: 1,
            seq_len: 256,
            weights: Precision::default(),
            optimizer: OptimizerName::Adamw,
            lr: 1e-3,
            adamw_lr: None,
            mixer_lr: None,
            scale_parameter: false,
            galore: GaloreConfig::default(),
            warmup: 0.01,
            lr_scheduler: LrScheduler::Cosine,
            decay: None,
            min_lr: 0.0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            clip: 1.0,
            clip_by: ClipBy::default(),
            on_divergence: OnDivergence::default(),
            spike: SPIKE,
            seed: 0,
        }
    }
}

impl TrainSettings {
    /// What the settings mean.
    ///
    /// # Errors
    /// Names the field that cannot work, or that would not be read.
    pub fn settle(&self) -> Result<TrainConfig> {
        check_batch(self.batch_size, self.accumulation, self.seq_len)?;
        let numbers = [
            ("lr", self.lr, 0.0..=1.0),
            ("warmup", self.warmup, 0.0..=1.0),
            ("adamw_lr", self.adamw_lr.unwrap_or(0.0), 0.0..=1.0),
            ("mixer_lr", self.mixer_lr.unwrap_or(0.0), 0.0..=1.0),
            (
                "decay",
                self.decay.unwrap_or(WSD_DECAY),
                f64::MIN_POSITIVE..=1.0,
            ),
            ("min_lr", self.min_lr, 0.0..=1.0),
            ("weight_decay", self.weight_decay, 0.0..=f64::MAX),
            ("beta1", self.beta1, 0.0..=1.0 - f64::EPSILON),
            ("beta2", self.beta2, 0.0..=1.0 - f64::EPSILON),
            ("eps", self.eps, 0.0..=f64::MAX),
            ("clip", self.clip, 0.0..=f64::MAX),
            ("spike", self.spike, 0.0..=f64::MAX),
        ];
        for (name, value, range) in numbers {
            if !range.contains(&value) {
                let (low, high) = (range.start(), range.end());
                let wanted = match *high == f64::MAX {
                    true => format!("a number at or above {low}"),
                    false => format!("between {low} and {high}"),
                };
                return Err(Error::invalid(format!("{name} {value} must be {wanted}")));
            }
        }
        Ok(TrainConfig {
            length: self.length()?,
            batch_size: self.batch_size,
            accumulation: self.accumulation,
            seq_len: self.seq_len,
            lr: self.lr,
            weights: self.weights,
            optimizer: self.optimizer()?,
            mixer_lr: match self.mixer_lr {
                Some(_) if self.lr == 0.0 => {
                    return Err(Error::invalid(
                        "mixer_lr beside lr 0: to train the mixers alone is objective.trained (--trained) mixers",
                    ));
                }
                rate => rate,
            },
            scale_parameter: self.scale_parameter,
            warmup: self.warmup,
            schedule: match (self.lr_scheduler, self.decay) {
                (LrScheduler::Cosine, None) => LrSchedule::Cosine,
                (LrScheduler::Cosine, Some(_)) => return unread("decay", "lr_scheduler wsd"),
                (LrScheduler::Wsd, decay) => LrSchedule::Wsd {
                    decay: decay.unwrap_or(WSD_DECAY),
                },
            },
            min_lr: self.min_lr,
            weight_decay: self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            clip: self.clip,
            clip_by: self.clip_by,
            on_divergence: self.on_divergence,
            spike: self.spike,
            seed: self.seed,
        })
    }

    fn optimizer(&self) -> Result<OptimizerConfig> {
        use OptimizerName as Name;
        if self.adamw_lr.is_some() && self.optimizer != Name::Muon {
            return unread("adamw_lr", "optimizer muon");
        }
        let galore = [Name::Galore, Name::Galore8bit];
        if !is_default(&self.galore) && !galore.contains(&self.optimizer) {
            return unread("galore", "optimizer galore or galore_8bit");
        }
        self.galore.validate()?;
        Ok(match self.optimizer {
            Name::Adamw => OptimizerConfig::Adamw,
            Name::Adamw8bit => OptimizerConfig::Adamw8bit,
            Name::Muon => OptimizerConfig::Muon {
                adamw_lr: self.adamw_lr.unwrap_or(self.lr),
            },
            Name::Galore => OptimizerConfig::Galore(self.galore),
            Name::Galore8bit => OptimizerConfig::Galore8bit(self.galore),
        })
    }

    fn length(&self) -> Result<Length> {
        match (self.steps, self.tokens, self.epochs) {
            (Some(steps), None, None) => Ok(Length::Steps(steps)),
            (None, Some(tokens), None) => Ok(Length::Tokens(tokens)),
            (None, None, epochs) => match epochs.unwrap_or(1.0) {
                epochs if epochs > 0.0 && epochs.is_finite() => Ok(Length::Epochs(epochs)),
                epochs => Err(Error::invalid(format!("epochs {epochs} must be above 0"))),
            },
            _ => Err(Error::invalid("steps, tokens and epochs: give one of them")),
        }
    }
}

fn unread<T>(name: &str, owner: &str) -> Result<T> {
    Err(Error::invalid(format!("{name} is for {owner}")))
}

/// # Errors
/// No tokens, or more than a step can hold.
pub fn check_batch(batch_size: usize, accumulation: usize, seq_len: usize) -> Result<()> {
    for (name, value) in [
        ("batch_size", batch_size),
        ("accumulation", accumulation),
        ("seq_len", seq_len),
    ] {
        if value == 0 {
            return Err(Error::invalid(format!("{name} must not be 0")));
        }
    }
    let batch = batch_size.saturating_mul(seq_len);
    match batch.saturating_mul(accumulation) > MOST_TOKENS {
        true => Err(Error::invalid(format!(
            "batch_size {batch_size} of seq_len {seq_len}, {accumulation} times a step: at most {MOST_TOKENS} tokens a step"
        ))),
        false => Ok(()),
    }
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Rounded down to whole steps.
    Tokens(u64),
    /// Passes over the data.
    Epochs(f64),
}

/// How the learning rate falls.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum LrSchedule {
    Cosine,
    /// Straight, over this share of the steps.
    Wsd {
        decay: f64,
    },
}

/// How to train; everything here decides the result, so a resumed run must agree with it. Made by
/// [`TrainSettings::settle`], which says what each field is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainConfig {
    pub length: Length,
    pub batch_size: usize,
    pub accumulation: usize,
    pub seq_len: usize,
    pub lr: f64,
    #[serde(skip_serializing_if = "is_default")]
    pub weights: Precision,
    pub optimizer: OptimizerConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixer_lr: Option<f64>,
    #[serde(skip_serializing_if = "is_default")]
    pub scale_parameter: bool,
    pub warmup: f64,
    pub schedule: LrSchedule,
    pub min_lr: f64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub clip: f64,
    #[serde(skip_serializing_if = "is_default")]
    pub clip_by: ClipBy,
    #[serde(skip_serializing_if = "is_default")]
    pub on_divergence: OnDivergence,
    #[serde(skip_serializing_if = "is_usual_spike")]
    pub spike: f64,
    pub seed: u64,
}

// Runs that began before there was a choice go on.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_usual_spike(spike: &f64) -> bool {
    *spike == SPIKE
}

impl TrainConfig {
    /// Optimizer steps on `examples` windows or pairs.
    ///
    /// # Errors
    /// Fewer tokens than one step has, or no step at all.
    pub fn steps(&self, examples: usize) -> Result<u64> {
        let per_step = self.batch_size * self.accumulation;
        let steps = match self.length {
            Length::Steps(steps) => steps,
            Length::Tokens(tokens) => tokens / self.tokens_per_step() as u64,
            Length::Epochs(epochs) => (epochs * examples as f64 / per_step as f64) as u64,
        };
        match (steps, self.length) {
            (0, Length::Tokens(tokens)) => Err(Error::invalid(format!(
                "tokens {tokens} is less than one step ({} tokens)",
                self.tokens_per_step()
            ))),
            (0, _) => Err(Error::invalid(format!(
                "no step to train: {examples} examples, {per_step} a step"
            ))),
            _ => Ok(steps),
        }
    }

    /// Tokens a step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch_size * self.accumulation * self.seq_len
    }

    /// Indices of the micro-batches of step `step` (from 0).
    pub(super) fn batches_of(&self, step: u64) -> Range<u64> {
        let parts = self.accumulation as u64;
        step * parts..(step + 1) * parts
    }

    /// The learning rate of step `step` (from 0) of `steps`.
    pub fn lr_at(&self, step: u64, steps: u64) -> f64 {
        self.lr * self.share_at(step, steps)
    }

    /// Linear warm-up times the scheduler's fall.
    fn share_at(&self, step: u64, steps: u64) -> f64 {
        let warmup = (self.warmup * steps as f64).ceil().max(1.0);
        let rise = ((step + 1) as f64 / warmup).min(1.0);
        let done = step as f64 / steps as f64;
        let fall = match self.schedule {
            LrSchedule::Cosine => 0.5 * (1.0 + (PI * done).cos()),
            LrSchedule::Wsd { decay } => ((1.0 - done) / decay).min(1.0),
        };
        rise * (self.min_lr + (1.0 - self.min_lr) * fall)
    }

    pub fn clip(&self) -> Clip {
        Clip {
            norm: self.clip,
            by: self.clip_by,
        }
    }

    /// Whether gradients are applied as they appear.
    pub fn applies_at_once(&self) -> bool {
        self.accumulation == 1 && self.clip().is_apart()
    }

    /// What step `step` (from 0) of `steps` follows.
    pub fn update(&self, step: u64, steps: u64) -> Update {
        let share = self.share_at(step, steps);
        let adamw = AdamW {
            lr: self.lr_at(step, steps),
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
        };
        let mixers = self.mixer_lr.map_or(1.0, |rate| rate / self.lr);
        Update {
            clip: self.clip(),
            rules: self.optimizer.rules(adamw, share, mixers),
            scale_parameter: self.scale_parameter,
            seed: self.seed,
        }
    }
}
