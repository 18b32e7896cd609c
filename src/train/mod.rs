//! Training: one loop for every stage. `stage/<name>.rs` says what the loss is and what is trained;
//! this file says how a run goes on: accumulate, clip, step, log, save, resume.
//!
//! A run works in `OUT.partial/` (`state-STEP.safetensors`, `metrics.jsonl` and the same for TensorBoard, `samples.jsonl`, `provenance.json`) and
//! `OUT` appears, whole, at the end. Started again with the same settings, it goes on from the last save, bit for bit on the CPU.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Input, Provenance};
use crate::data::{Batch, Batches};
use crate::model::Lm;
use crate::op::matmul::roughly;
use crate::op::runtime::pooled;
use crate::weights::Precision;
use crate::{Error, Result};

mod at_once;
mod clip;
mod config;
pub mod cost;
mod events;
mod json_lines;
pub mod optimizer;
pub mod params;
mod recovery;
#[cfg(test)]
mod rounded_tests;
pub mod runs;
mod samples;
pub mod stage;
mod state;
pub mod teacher;
#[cfg(test)]
mod tests;

pub use clip::{Clip, ClipBy};
pub use config::{
    Length, LrSchedule, LrScheduler, OnDivergence, TrainConfig, TrainSettings, check_batch,
};
pub use optimizer::{Optimizer, OptimizerConfig, OptimizerName};
pub use params::{ParamGroup, Update};
pub use recovery::Skipped;
pub use samples::{Sample, read_samples};
pub use stage::{Shares, Stage};

use at_once::AtOnce;
use clip::Norms;

use state::Run;
pub use state::read_metrics;

/// One line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// From 1.
    pub step: u64,
    /// Tokens seen since the run began.
    pub tokens: u64,
    #[serde(deserialize_with = "number_or_null")]
    pub loss: f64,
    pub lr: f64,
    /// Before clipping; one for all, in ILD one for every candidate's layers.
    pub grad_norm: Vec<f64>,
    /// The same of each layer, over all candidates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layer_grad_norm: Vec<f64>,
    /// The stage's own figures, by name.
    #[serde(flatten)]
    pub terms: serde_json::Map<String, serde_json::Value>,
    pub tokens_per_s: f64,
    /// The step was not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<Skipped>,
}

/// What is not a number is null in JSON.
fn number_or_null<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

impl StepMetrics {
    /// The loss and the stage's own figures, those that are numbers.
    fn figures(&self) -> BTreeMap<String, f64> {
        let terms = self.terms.iter();
        let terms = terms.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
        // That of a step that was left out is no number.
        let loss = Some(("loss".to_owned(), self.loss)).filter(|(_, loss)| loss.is_finite());
        loss.into_iter().chain(terms).collect()
    }
}

/// What the surroundings of a run decide; none of it changes the result but its record, and what a run that diverges goes back to: its last
/// save.
pub struct RunOptions<'a> {
    /// Where the result goes.
    pub out: PathBuf,
    /// Folder whose tokenizer files the result gets.
    pub tokenizer: PathBuf,
    /// For the result's record.
    pub sources: Sources,
    /// Replace an existing result, and drop a partial run with other settings.
    pub force: bool,
    /// Steps between saves.
    pub save_every: u64,
    /// Saves that are kept; the newest that is whole is gone on from.
    pub keep_last: usize,
    /// Asked after every step: true saves and stops.
    pub stop: &'a dyn Fn() -> bool,
    /// Measures the student on held-out text every so many steps and after the last; its figures join the
    /// step's.
    pub validation: Option<Validation<'a>>,
    /// Told of every step, and how many there are.
    pub observe: &'a mut dyn FnMut(&StepMetrics, u64),
}

/// What a run goes on from, and what it reads, by name.
#[derive(Debug, Default, Clone)]
pub struct Sources {
    /// Of the checkpoint that it trains.
    pub record: Provenance,
    pub inputs: Vec<Input>,
}

impl Sources {
    /// That of the result of `steps` steps.
    fn record(&self, stage: &Stage, config: &TrainConfig, steps: u64) -> Provenance {
        let (name, settings) = stage.settings(config);
        let mut recorded = checkpoint::Step::new(name, settings, self.inputs.clone());
        recorded.steps = Some(steps);
        self.record.clone().then(recorded)
    }
}

/// Figures by name.
pub type Figures = Vec<(String, f64)>;

/// How a student is measured while it learns.
pub struct Validation<'a> {
    /// Steps between measurements.
    pub every: u64,
    /// The result is the student whose first figure was the lowest; else the last one.
    pub keep_best: bool,
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
    let device = stage.student().map(|student| student.device().clone());
    let on_metal = device.is_some_and(|device| device.is_metal());
    if config.optimizer.is_eight_bit() && on_metal {
        return Err(Error::invalid(
            "moments of 8 bits are for the CPU and CUDA: choose an optimizer without _8bit, or another --device",
        ));
    }
    if config.weights != Precision::F32 && on_metal {
        return Err(Error::invalid(
            "weights in bf16 are for the CPU and CUDA: leave weights f32, or choose another --device",
        ));
    }
    if config.mixer_lr.is_some() && !stage.groups_mut().iter().any(|group| group.has_mixers()) {
        return Err(Error::invalid(
            "mixer_lr is for mixers that replaced attention: none is trained here",
        ));
    }
    let record = options.sources.record(stage, config, steps);
    let key = stage.key(config)?;
    let mut run = Run::open(&options, key, record, config.seq_len, stage)?;
    let mut recent: Vec<(u64, Duration)> = Vec::new();
    while run.step < steps {
        let started = Instant::now();
        let step = run.step;
        let segment = stage.start_step(step, steps);
        let slower = recovery::slowed(&run.metrics, config.on_divergence);
        let mut update = config.update(step - segment.start, segment.end - segment.start);
        update.rules = update.rules.slowed(slower);
        let of_segment = run.metrics.get(segment.start as usize..);
        let most = recovery::most(of_segment.unwrap_or_default(), config.spike);
        let batches = config
            .batches_of(step)
            .map(|index| data.batch(config.seed, index, config.batch_size, config.seq_len));
        let batches = batches.collect::<Result<Vec<_>>>()?;
        let tokens = batches.iter().map(|b| (b.rows * b.len) as u64).sum();
        let mut taken = take_step(stage, &batches, &update, most);
        let due = (step + 1).is_multiple_of(options.save_every.max(1));
        // What was applied before the step came to nothing cannot be taken back.
        let begun = stage.at_once().take();
        let mut ruined = begun.is_some_and(|begun| begun.is_begun());
        if taken.is_ok()
            && (due || step + 1 == steps)
            && let Err(error) = check_finite(stage)
        {
            (taken, ruined) = (Err(error), true);
        }
        let (taken, skipped) = match taken {
            Ok(taken) => (taken, None),
            Err(error) => {
                let skipped = recovery::skip(&run, stage, &batches, (error, ruined), config)?;
                (Step::untaken(), Some(skipped))
            }
        };
        let Step {
            loss,
            mut terms,
            grad_norm,
            layer_grad_norm,
            ..
        } = taken;
        let elapsed = started.elapsed();
        run.step += 1;
        let mut judged = None;
        if let (Some(validation), Some(student)) = (&options.validation, stage.student())
            && (run.step.is_multiple_of(validation.every.max(1)) || run.step == steps)
        {
            let found = (validation.measure)(student)?;
            judged = found.first().map(|(name, _)| name.clone());
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
            lr: update.rules.lr(),
            grad_norm,
            layer_grad_norm,
            terms,
            tokens_per_s: seen as f64 / seconds.as_secs_f64(),
            skipped,
        };
        (options.observe)(&metrics, steps);
        run.log(metrics)?;
        if let (
            Some(Validation {
                keep_best: true, ..
            }),
            Some(judged),
        ) = (&options.validation, &judged)
        {
            run.keep_best(stage, &options, judged)?;
        }
        if due || run.step == steps {
            // Before the save that counts it.
            run.sample(stage)?;
        }
        let stopped = (options.stop)() && run.step < steps;
        if stopped && !due {
            check_finite(stage).map_err(|e| run.diverged(&e.to_string(), config))?;
        }
        if due || stopped {
            run.save(stage, options.keep_last)?;
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

/// A stage that trains the given layers.
type OfLayers<'a> = Box<dyn Fn(&[usize]) -> Result<Stage<'a>> + 'a>;

/// How a stage is carried out.
pub enum Training<'a> {
    AtOnce(Box<Stage<'a>>),
    /// ILD, some layers at a time, with the memory that these take, to the result of all at once. Pieces that are finished stand in
    /// `OUT.partial`.
    ByLayers {
        stage: OfLayers<'a>,
        data: &'a dyn Batches,
        /// Of the model.
        layers: usize,
        at_once: usize,
    },
    /// ILD whose layers were trained elsewhere: the stage trains none.
    Joined {
        stage: Box<Stage<'a>>,
        pieces: Vec<PathBuf>,
    },
}

impl<'a> From<Stage<'a>> for Training<'a> {
    fn from(stage: Stage<'a>) -> Self {
        Self::AtOnce(Box::new(stage))
    }
}

impl Training<'_> {
    pub fn data(&self) -> &dyn Batches {
        match self {
            Self::AtOnce(stage) | Self::Joined { stage, .. } => stage.data(),
            Self::ByLayers { data, .. } => *data,
        }
    }

    /// Times that the steps are taken.
    pub fn passes(&self) -> u64 {
        match self {
            Self::AtOnce(_) => 1,
            Self::ByLayers {
                layers, at_once, ..
            } => layers.div_ceil(*at_once) as u64,
            Self::Joined { .. } => 0,
        }
    }

    /// # Errors
    /// As [`train`], or pieces that [`Stage::take`] refuses.
    pub fn carry_out(self, config: &TrainConfig, options: RunOptions) -> Result<Vec<StepMetrics>> {
        let passes = self.passes();
        match self {
            Self::AtOnce(mut stage) => train(&mut stage, config, options),
            Self::Joined { mut stage, pieces } => join(&mut stage, &pieces, config, &options),
            Self::ByLayers {
                stage,
                layers,
                at_once,
                ..
            } => {
                let mut whole = stage(&[])?;
                let key = whole.key(config)?;
                let workplace = workplace(&options)?;
                // By it the run is known before the first piece is done.
                options.sources.record.write(&workplace)?;
                let of_pass = config.steps(whole.data().examples(config.seq_len))?;
                let of_pass = of_pass * config.tokens_per_step() as u64;
                let all: Vec<usize> = (0..layers).collect();
                let mut pieces = Vec::new();
                for (pass, layers) in (0..).zip(all.chunks(at_once)) {
                    let (first, last) = (layers[0], layers[layers.len() - 1]);
                    let out = workplace.join(format!("{}{first}-{last}", state::PIECES));
                    if out.exists()
                        && let Err(error) = stage::piece(&out, &key)
                    {
                        match options.force {
                            true => state::remove(&out)?,
                            false => return Err(error),
                        }
                    }
                    if !out.exists() {
                        let observe = &mut |metrics: &StepMetrics, steps: u64| {
                            let step = pass * steps + metrics.step;
                            let shown = StepMetrics {
                                step,
                                tokens: pass * of_pass + metrics.tokens,
                                ..metrics.clone()
                            };
                            (options.observe)(&shown, passes * steps);
                        };
                        let options = RunOptions {
                            out: out.clone(),
                            tokenizer: options.tokenizer.clone(),
                            sources: options.sources.clone(),
                            validation: None,
                            observe,
                            ..options
                        };
                        train(&mut stage(layers)?, config, options)?;
                    }
                    pieces.push(out);
                }
                join(&mut whole, &pieces, config, &options)
            }
        }
    }
}

/// The folder of a run that is made of pieces.
///
/// # Errors
/// One in which a run of all layers at once has stopped, unless it may be dropped.
fn workplace(options: &RunOptions) -> Result<PathBuf> {
    let folder = partial_folder(&options.out);
    std::fs::create_dir_all(&folder).map_err(Error::io("cannot create", &folder))?;
    for (_, save) in state::saves(&folder)? {
        if !options.force {
            let message = "an unfinished run of all layers at once is here: go on with it, or drop it with --force";
            return Err(Error::file(&folder, message));
        }
        std::fs::remove_file(&save).map_err(Error::io("cannot remove", &save))?;
    }
    Ok(folder)
}

/// Makes the result of `stage`, which trains nothing itself, of pieces that were trained elsewhere.
fn join(
    stage: &mut Stage,
    pieces: &[PathBuf],
    config: &TrainConfig,
    options: &RunOptions,
) -> Result<Vec<StepMetrics>> {
    checkpoint::check_output(&options.out, options.force, &[&options.tokenizer])?;
    let key = stage.key(config)?;
    stage.take(pieces, &key)?;
    let mut metrics = Vec::new();
    for piece in pieces {
        merge(
            &mut metrics,
            state::read_metrics(&piece.join(state::METRICS))?,
        );
    }
    let workplace = workplace(options)?;
    let result = workplace.join(state::RESULT);
    state::remove(&result)?;
    let record = options.sources.record(stage, config, metrics.len() as u64);
    let record = state::described(record, &metrics);
    stage.write(&result, &options.tokenizer, &key, &record)?;
    state::publish(&result, stage.data(), &metrics, &workplace, options)?;
    Ok(metrics)
}

/// Adds to every step what other layers' were like.
fn merge(metrics: &mut Vec<StepMetrics>, of_others: Vec<StepMetrics>) {
    if metrics.is_empty() {
        *metrics = of_others;
        return;
    }
    for (all, other) in metrics.iter_mut().zip(of_others) {
        all.loss += other.loss;
        all.grad_norm.extend(other.grad_norm);
        let layers = all.layer_grad_norm.len().max(other.layer_grad_norm.len());
        all.layer_grad_norm.resize(layers, 0.0);
        // Layers of pieces are different ones.
        for (norm, other) in all.layer_grad_norm.iter_mut().zip(other.layer_grad_norm) {
            *norm += other;
        }
        for (name, value) in other.terms {
            let sum = |known: &serde_json::Value| Some(known.as_f64()? + value.as_f64()?);
            let sum = all.terms.get(&name).and_then(sum);
            all.terms.insert(name, sum.map_or(value, Into::into));
        }
        all.skipped = all.skipped.take().or(other.skipped);
    }
}

/// What is kept is whole.
fn check_finite(stage: &mut Stage) -> Result<()> {
    let mut groups = stage.groups_mut().into_iter();
    groups.try_for_each(|group| group.check_finite())
}

/// What a step was like.
pub struct Step {
    pub loss: f64,
    /// The stage's own figures.
    pub terms: serde_json::Map<String, serde_json::Value>,
    /// As [`StepMetrics`] has them.
    pub grad_norm: Vec<f64>,
    pub layer_grad_norm: Vec<f64>,
    /// Where the time went, in seconds, in order.
    pub phases: Vec<(&'static str, f64)>,
}

impl Step {
    fn untaken() -> Self {
        Self {
            loss: f64::NAN,
            terms: serde_json::Map::new(),
            grad_norm: Vec::new(),
            layer_grad_norm: Vec::new(),
            phases: Vec::new(),
        }
    }
}

/// # Errors
/// [`Error::Diverged`]: a loss that is not finite, or above `most`.
fn check_loss(loss: f64, most: f64) -> Result<()> {
    if !loss.is_finite() {
        return Err(Error::Diverged(format!("the loss is {loss}")));
    }
    match loss > most {
        true => Err(Error::Diverged(format!(
            "the loss is {loss:.4}, a spike above {most:.4}"
        ))),
        false => Ok(()),
    }
}

/// One step on micro-batches that count as one large batch: gradients, clip, update.
///
/// # Errors
/// [`Error::Diverged`]: a loss above `most`, a loss or a gradient that is not finite. Nothing was updated then, so that what is kept is always
/// whole; where gradients are applied as they appear, [`Stage::at_once`] has what was.
pub fn take_step(stage: &mut Stage, batches: &[Batch], update: &Update, most: f64) -> Result<Step> {
    roughly(|| pooled(|| step(stage, batches, update, most)))
}

fn step(stage: &mut Stage, batches: &[Batch], update: &Update, most: f64) -> Result<Step> {
    if let (true, [_]) = (update.clip.is_apart(), batches) {
        *stage.at_once() = Some(AtOnce::new(*update, most));
    }
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
    check_loss(loss, most)?;
    let optimizing = Instant::now();
    let groups = stage.groups_mut().into_iter();
    let mut norms = groups
        .map(|group| group.norms())
        .collect::<Result<Vec<_>>>()?;
    for (group, norms) in stage.groups_mut().into_iter().zip(&norms) {
        group.update(norms, update)?;
    }
    if let Some(applied) = stage.at_once().take() {
        applied.add_to(&mut norms);
    }
    let mut layers = Vec::new();
    norms
        .iter()
        .for_each(|norms| norms.add_to_layers(&mut layers));
    phases.push(("clip and update", optimizing.elapsed().as_secs_f64()));
    let named = sums.into_iter().map(|(name, value)| (name, value.into()));
    Ok(Step {
        loss,
        terms: named.collect(),
        grad_norm: norms.iter().map(Norms::of_all).collect(),
        layer_grad_norm: layers
            .into_iter()
            .map(|square| short(square.sqrt()))
            .collect(),
        phases,
    })
}

/// With three digits, as these are many and to be looked at.
fn short(norm: f64) -> f64 {
    format!("{norm:.2e}").parse().unwrap_or(norm)
}

/// What DPO computes once, inside of a run that is not finished.
pub const FROZEN: &str = "frozen.safetensors";

/// Where a run that is not finished keeps its things.
pub fn partial_folder(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    out.with_file_name(name)
}
