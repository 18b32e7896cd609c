//! Training: one loop for every stage. `stage/<name>.rs` says what the loss is and what is trained;
//! this file says how a run goes on: accumulate, clip, step, log, save, resume.
//!
//! A run works in `OUT.partial/` (`state.safetensors`, `metrics.jsonl`) and `OUT` appears, whole, at
//! the end. Started again with the same settings, it goes on from the last save, bit for bit on the CPU.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::data::Batch;
use crate::model::Lm;
use crate::{Error, Result};

mod config;
pub mod cost;
pub mod params;
pub mod stage;
mod state;
#[cfg(test)]
mod tests;

pub use config::{
    Length, LrSchedule, LrScheduler, OptimizerConfig, OptimizerName, TrainConfig, TrainSettings,
    check_batch,
};
pub use params::{Optimizer, ParamGroup};
pub use stage::{Shares, Stage};

use state::Run;

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

/// Trains `stage` and writes `OUT`. Returns the metrics of all steps, resumed ones included.
///
/// # Errors
/// Before the first step: settings that cannot work, an existing output, a partial run with other
/// settings. During it: a loss that is not a number (the last save stays), [`Error::Interrupted`] when
/// `stop` says so (everything is saved).
pub fn train(
    stage: &mut Stage,
    config: &TrainConfig,
    options: RunOptions,
) -> Result<Vec<StepMetrics>> {
    checkpoint::check_output(&options.out, options.force, &[&options.tokenizer])?;
    let data = stage.data();
    data.check(config.batch_size, config.seq_len)?;
    let steps = config.steps(data.examples(config.seq_len))?;
    let device = stage.student().map(|student| student.lm.device().clone());
    if config.optimizer == OptimizerConfig::Adamw8bit && device.is_some_and(|d| !d.is_cpu()) {
        return Err(Error::invalid(
            "optimizer adamw_8bit is for the CPU so far: choose adamw, or --device cpu",
        ));
    }
    let mut run = Run::open(&options.out, stage.key(config)?, options.force, stage)?;
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
            let found = (validation.measure)(student.snapshot())?;
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
