//! Training: one loop for every stage. `stage/<name>.rs` says what the loss is and what is trained;
//! this file says how a run goes on: accumulate, clip, step, log, save, resume.
//!
//! A run works in `OUT.partial/` (`state.safetensors`, `metrics.jsonl`) and `OUT` appears, whole, at
//! the end. Started again with the same settings, it goes on from the last save, bit for bit on the CPU.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::data::{Batch, Batches};
use crate::model::Lm;
use crate::{Error, Result};

pub mod params;
pub mod stage;
mod state;
#[cfg(test)]
mod tests;

pub use params::{Optimizer, ParamGroup};
pub use stage::{Shares, Stage};

use crate::op::adamw::AdamW;
use crate::op::muon::Muon;
use state::Run;

/// What a step follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerName {
    #[default]
    Adamw,
    /// Muon for the layers' matrices, AdamW for all else.
    Muon,
}

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

const MUON_MOMENTUM: f64 = 0.95;
/// Share of the steps in which wsd falls, where nobody says.
const WSD_DECAY: f64 = 0.5;

/// How to train; everything here decides the result, so a resumed run must agree with it. The same on the
/// command line and in a recipe's `train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
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
    /// What a step follows.
    #[arg(long, value_enum, default_value_t = Self::default().optimizer)]
    pub optimizer: OptimizerName,
    /// Peak learning rate.
    #[arg(long, default_value_t = Self::default().lr)]
    pub lr: f64,
    /// Peak learning rate of what Muon leaves to AdamW: embedding, head, norms, vectors [default: that of --lr].
    #[arg(long)]
    pub adamw_lr: Option<f64>,
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
    /// Decoupled weight decay, times the learning rate.
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
    /// Global gradient norm is clipped to this; 0 never clips.
    #[arg(long, default_value_t = Self::default().clip)]
    pub clip: f64,
    /// Seed of the data order, and of what an initialisation draws.
    #[arg(long, default_value_t = Self::default().seed)]
    pub seed: u64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            steps: None,
            tokens: None,
            epochs: None,
            batch_size: 16,
            accumulation: 1,
            seq_len: 256,
            optimizer: OptimizerName::Adamw,
            lr: 1e-3,
            adamw_lr: None,
            warmup: 0.01,
            lr_scheduler: LrScheduler::Cosine,
            decay: None,
            min_lr: 0.0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            clip: 1.0,
            seed: 0,
        }
    }
}

impl TrainConfig {
    /// # Errors
    /// Names the field that cannot work.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("batch_size", self.batch_size),
            ("accumulation", self.accumulation),
            ("seq_len", self.seq_len),
        ];
        for (name, value) in positive {
            if value == 0 {
                return Err(Error::invalid(format!("{name} must not be 0")));
            }
        }
        // A step's tokens are held in memory, as one large batch.
        let most = 1 << 24;
        let batch = self.batch_size.saturating_mul(self.seq_len);
        if batch.saturating_mul(self.accumulation) > most {
            return Err(Error::invalid(format!(
                "batch_size {} of seq_len {}, {} times a step: at most {most} tokens a step",
                self.batch_size, self.seq_len, self.accumulation
            )));
        }
        let numbers = [
            ("lr", self.lr, 0.0..=1.0),
            ("warmup", self.warmup, 0.0..=1.0),
            ("adamw_lr", self.adamw_lr.unwrap_or(0.0), 0.0..=1.0),
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
        // What would not be read is a mistake.
        for (name, given, owner, owned) in [
            (
                "adamw_lr",
                self.adamw_lr.is_some(),
                "optimizer muon",
                self.optimizer == OptimizerName::Muon,
            ),
            (
                "decay",
                self.decay.is_some(),
                "lr_scheduler wsd",
                self.lr_scheduler == LrScheduler::Wsd,
            ),
        ] {
            if given && !owned {
                return Err(Error::invalid(format!("{name} is for {owner}")));
            }
        }
        let lengths = [
            self.steps.is_some(),
            self.tokens.is_some(),
            self.epochs.is_some(),
        ];
        if lengths.iter().filter(|given| **given).count() > 1 {
            return Err(Error::invalid("steps, tokens and epochs: give one of them"));
        }
        match self.epochs {
            Some(epochs) if !(epochs > 0.0 && epochs.is_finite()) => {
                Err(Error::invalid(format!("epochs {epochs} must be above 0")))
            }
            _ => Ok(()),
        }
    }

    /// Optimizer steps on `examples` windows or pairs.
    ///
    /// # Errors
    /// Fewer tokens than one step has, or no step at all.
    pub fn steps(&self, examples: usize) -> Result<u64> {
        let steps = match (self.steps, self.tokens) {
            (Some(steps), _) => steps,
            (None, Some(tokens)) => tokens / self.tokens_per_step() as u64,
            (None, None) => {
                let per_step = (self.batch_size * self.accumulation) as f64;
                (self.epochs.unwrap_or(1.0) * examples as f64 / per_step) as u64
            }
        };
        match (steps, self.tokens) {
            (0, Some(tokens)) => Err(Error::invalid(format!(
                "tokens {tokens} is less than one step ({} tokens)",
                self.tokens_per_step()
            ))),
            (0, None) => Err(Error::invalid(format!(
                "no step to train: {examples} examples, {} a step",
                self.batch_size * self.accumulation
            ))),
            _ => Ok(steps),
        }
    }

    /// Tokens a step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch_size * self.accumulation * self.seq_len
    }

    /// Indices of the micro-batches of step `step` (from 0).
    fn batches_of(&self, step: u64) -> std::ops::Range<u64> {
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
        let fall = match self.lr_scheduler {
            LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            LrScheduler::Wsd => ((1.0 - done) / self.decay.unwrap_or(WSD_DECAY)).min(1.0),
        };
        rise * (self.min_lr + (1.0 - self.min_lr) * fall)
    }

    fn rules(&self, step: u64, steps: u64) -> Optimizer {
        let lr = self.lr_at(step, steps);
        let adamw = AdamW {
            lr: match (self.optimizer, self.adamw_lr) {
                (OptimizerName::Muon, Some(peak)) => peak * self.share_at(step, steps),
                _ => lr,
            },
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
        };
        let muon = Muon {
            lr,
            momentum: MUON_MOMENTUM,
            weight_decay: self.weight_decay,
        };
        Optimizer {
            adamw,
            muon: (self.optimizer == OptimizerName::Muon).then_some(muon),
        }
    }
}

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// Tokens seen since the run began.
    pub tokens: u64,
    pub loss: f64,
    pub lr: f64,
    /// Before clipping; one a parameter group.
    pub grad_norm: Vec<f64>,
    /// The stage's own figures, by name.
    #[serde(flatten)]
    pub terms: serde_json::Map<String, serde_json::Value>,
    pub tokens_per_s: f64,
}

/// What the surroundings of a run decide; none of it changes the result.
pub struct RunOptions<'a> {
    /// Where the result goes.
    pub out: PathBuf,
    /// Folder whose tokenizer files the result gets.
    pub tokenizer: PathBuf,
    /// Replace an existing result, and drop a partial run with other settings.
    pub force: bool,
    /// Steps between saves.
    pub save_every: u64,
    /// Asked after every step: true saves and stops.
    pub stop: &'a dyn Fn() -> bool,
    /// Measures the student on held-out text every so many steps and after the last; its figures join the
    /// step's.
    pub validation: Option<Validation<'a>>,
    /// Told of every step, and how many there are.
    pub observe: &'a mut dyn FnMut(&StepMetrics, u64),
}

/// Figures by name.
pub type Figures = Vec<(String, f64)>;

/// How a student is measured while it learns.
pub struct Validation<'a> {
    /// Steps between measurements.
    pub every: u64,
    /// What the student is like now.
    pub measure: &'a dyn Fn(&Lm) -> Result<Figures>,
}

/// Steps whose speed the reported rate averages over.
const RATE_WINDOW: usize = 20;

/// Trains `stage` on `data` and writes `OUT`. Returns the metrics of all steps, resumed ones included.
///
/// # Errors
/// Before the first step: settings that cannot work, an existing output, a partial run with other
/// settings. During it: a loss that is not a number (the last save stays), [`Error::Interrupted`] when
/// `stop` says so (everything is saved).
pub fn train(
    stage: &mut Stage,
    data: &dyn Batches,
    config: &TrainConfig,
    options: RunOptions,
) -> Result<Vec<StepMetrics>> {
    config.validate()?;
    checkpoint::check_output(&options.out, options.force, &[&options.tokenizer])?;
    data.check(config.batch_size, config.seq_len)?;
    let steps = config.steps(data.examples(config.seq_len))?;
    let identity = serde_json::json!({
        "stage": stage.identity()?,
        "train": config,
        "data": data.hash(),
    });
    let mut run = Run::open(&options.out, &identity, options.force, stage)?;
    let mut recent: Vec<(u64, Duration)> = Vec::new();
    while run.step < steps {
        let started = Instant::now();
        let step = run.step;
        let segment = stage.start_step(step, steps);
        let rules = config.rules(step - segment.start, segment.end - segment.start);
        let batches = config
            .batches_of(step)
            .map(|index| data.batch(config.seed, index, config.batch_size, config.seq_len));
        let batches = batches.collect::<Result<Vec<_>>>()?;
        let tokens = batches.iter().map(|b| (b.rows * b.len) as u64).sum();
        let Step {
            loss,
            mut terms,
            grad_norm,
            ..
        } = take_step(stage, &batches, config.clip, &rules)
            .map_err(|e| run.diverged(e, step, config))?;
        let elapsed = started.elapsed();
        run.step += 1;
        if let (Some(validation), Some(student)) = (&options.validation, stage.student())
            && (run.step.is_multiple_of(validation.every.max(1)) || run.step == steps)
        {
            let found = (validation.measure)(&student.snapshot()?)?;
            terms.extend(found.into_iter().map(|(name, value)| (name, value.into())));
        }
        recent.push((tokens, elapsed));
        let window = &recent[recent.len().saturating_sub(RATE_WINDOW)..];
        let seconds = window.iter().map(|(_, t)| t).sum::<Duration>();
        let seen: u64 = window.iter().map(|(n, _)| n).sum();
        let metrics = StepMetrics {
            step: run.step,
            tokens: run.tokens() + tokens,
            loss,
            lr: rules.lr(),
            grad_norm,
            terms,
            tokens_per_s: seen as f64 / seconds.as_secs_f64(),
        };
        (options.observe)(&metrics, steps);
        run.log(metrics)?;
        let stopped = (options.stop)() && run.step < steps;
        let save = stopped || run.step.is_multiple_of(options.save_every.max(1));
        if save || run.step == steps {
            let mut groups = stage.groups_mut().into_iter();
            let finite = groups.try_for_each(|group| group.check_finite());
            finite.map_err(|e| run.diverged(e, step, config))?;
        }
        if save {
            run.save(stage)?;
        }
        if stopped {
            return Err(Error::Interrupted(format!(
                "step {} of {} is saved in {}; run the same command again to go on",
                run.step,
                steps,
                run.folder.display()
            )));
        }
    }
    run.finish(stage, &options)
}

/// What a step was like.
pub struct Step {
    pub loss: f64,
    /// The stage's own figures.
    pub terms: serde_json::Map<String, serde_json::Value>,
    /// Before clipping; one a parameter group.
    pub grad_norm: Vec<f64>,
    /// Where the time went, in seconds, in order.
    pub phases: Vec<(&'static str, f64)>,
}

/// One step on micro-batches that count as one large batch: gradients, clip, update.
///
/// # Errors
/// A loss or a gradient that is not finite: nothing was updated then, so that what is kept is always whole.
pub fn take_step(
    stage: &mut Stage,
    batches: &[Batch],
    clip: f64,
    rules: &Optimizer,
) -> Result<Step> {
    let shares = stage.shares(batches)?;
    let mut loss = 0.0;
    let mut sums: Vec<(String, f64)> = Vec::new();
    let mut phases: Vec<(&'static str, f64)> = Vec::new();
    for (batch, share) in batches.iter().zip(&shares) {
        let terms = stage.backward(batch, share)?;
        loss += terms.loss;
        for (name, value) in terms.named {
            match sums.iter_mut().find(|(known, _)| *known == name) {
                Some(sum) => sum.1 += value,
                None => sums.push((name, value)),
            }
        }
        for (name, seconds) in terms.phases {
            match phases.iter_mut().find(|(known, _)| *known == name) {
                Some(sum) => sum.1 += seconds,
                None => phases.push((name, seconds)),
            }
        }
    }
    if !loss.is_finite() {
        return Err(Error::invalid(format!("the loss is {loss}")));
    }
    let optimizing = Instant::now();
    let groups = stage.groups_mut();
    let grad_norm = groups.into_iter().map(|group| group.grad_norm());
    let grad_norm = grad_norm.collect::<Result<Vec<f64>>>()?;
    for (group, norm) in stage.groups_mut().into_iter().zip(&grad_norm) {
        group.update(*norm, clip, rules)?;
    }
    phases.push(("clip and update", optimizing.elapsed().as_secs_f64()));
    let named = sums.into_iter().map(|(name, value)| (name, value.into()));
    Ok(Step {
        loss,
        terms: named.collect(),
        grad_norm,
        phases,
    })
}

/// Where a run that is not finished keeps its things.
pub fn partial_folder(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    out.with_file_name(name)
}
