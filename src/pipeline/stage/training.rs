//! What the stages that train share; what is told of a run, by commands and recipes alike.

use std::path::Path;

use clap::ValueEnum;

use super::{Context, Student};
use crate::checkpoint::Key;
use crate::data::Batches;
use crate::mixer::Windows;
use crate::model::ModelConfig;
use crate::pipeline::need::{Need, Supply, fingerprint};
use crate::train::cost::{Learner, StepSizes};
use crate::train::{
    self, RunOptions, Skipped, Sources, StepMetrics, TrainConfig, TrainSettings, Training,
    partial_folder,
};
use crate::watch::Watch;
use crate::{Error, Result};

/// A run to `out` begins: its steps, and where their metrics can be followed.
///
/// # Errors
/// Data that the settings do not fit.
pub fn start_training(
    watch: &dyn Watch,
    name: &str,
    config: &TrainConfig,
    training: &Training,
    out: &Path,
) -> Result<()> {
    let data = training.data();
    data.check(config.batch_size, config.seq_len)?;
    let steps = config.steps(data.examples(config.seq_len))?;
    watch.start(name, (training.passes() * steps) as usize);
    let place = partial_folder(out);
    let place = match training {
        Training::AtOnce(_) => place.join("metrics.jsonl"),
        Training::ByLayers { .. } | Training::Joined { .. } => place,
    };
    watch.note(&format!(
        "{name}: metrics of every step in {}",
        place.display()
    ));
    Ok(())
}

/// A step of it.
pub fn tell_step(watch: &dyn Watch, metrics: &StepMetrics) {
    let (loss, speed) = (metrics.loss, metrics.tokens_per_s);
    if let Some(Skipped { why, back_to }) = &metrics.skipped {
        let back = back_to.map(|step| format!("; the weights are those of step {step} again"));
        let (step, back) = (metrics.step, back.unwrap_or_default());
        watch.note(&format!("step {step} is left out: {why}{back}"));
    }
    let note = format!("loss {loss:.4} {speed:.0} tokens/s");
    watch.at(metrics.step as usize, &note);
}

/// How long a run is and what it follows, in a few words.
pub(super) fn summary(train: &TrainSettings) -> String {
    let length = match (train.steps, train.tokens) {
        (Some(steps), _) => format!("{steps} steps"),
        (None, Some(tokens)) => millions(tokens),
        (None, None) => format!("{} epochs", train.epochs.unwrap_or(1.0)),
    };
    let name = train.optimizer.to_possible_value();
    let optimizer = name.map_or_else(String::new, |name| name.get_name().to_owned());
    let mixers = train.mixer_lr.map(|rate| format!(" (mixers {rate:e})"));
    format!(
        "{length}, {optimizer}, lr {:e}{}",
        train.lr,
        mixers.unwrap_or_default()
    )
}

pub(super) fn millions(tokens: u64) -> String {
    format!("{:.3} M tokens", tokens as f64 / 1e6)
}

/// # Errors
/// Data that do not fill the run's batches.
pub(super) fn fill(data: &dyn Batches, train: &TrainSettings) -> Result<()> {
    let train = train.settle()?;
    data.check(train.batch_size, train.seq_len)?;
    train.steps(data.examples(train.seq_len)).map(drop)
}

/// Of a learner's weights with their moments: bytes of a save, and those that an update reads and writes (with the gradients).
pub(super) fn saved(learner: Learner, config: &TrainConfig) -> (usize, f64) {
    let weights = learner.bytes(config.weights);
    let moments = learner.moments(config.optimizer);
    let gradients = size_of::<f32>() * learner.entries();
    let moved = 2 * weights + gradients + 2 * moments;
    (weights + moments, moved as f64)
}

/// What KD or DPO of `learner` takes; `text`: tokens that an epoch has.
pub(super) fn trained_need(
    config: &TrainConfig,
    learner: Learner,
    teacher: Option<&ModelConfig>,
    windows: Windows,
    text: Option<u64>,
    with: &Supply,
) -> Need {
    let student = learner.config;
    let per_step = windows.tokens() * config.accumulation;
    let tokens = with.length(config, text, per_step);
    let weights = learner.bytes(config.weights);
    let left = with.free.saturating_sub(weights);
    let compute = config.weights.compute(with.mapped);
    let step = StepSizes {
        learner,
        teacher,
        windows,
        accumulation: config.accumulation,
        weights: config.weights,
        compute,
        optimizer: config.optimizer,
        anew: learner.is_short(windows, left),
        at_once: config.applies_at_once(),
    };
    let kept = student.parameters() - learner.entries();
    let file = |phase| with.weights(phase, "hybrid", (with.student, student), compute);
    let taken = match kept {
        0 => step.memory(),
        _ => file(step.memory()),
    };
    let opened = fingerprint(student, 1).with("trained weights", weights);
    let (state, moved) = saved(learner, config);
    let steps = tokens.unwrap_or(0) as f64 / per_step as f64;
    let width = with.student as f64 / student.parameters() as f64;
    Need {
        phases: vec![file(opened), taken],
        student: Some(weights + (kept as f64 * width) as usize),
        scratch: 2 * state,
        tokens,
        operations: Some(step.operations()),
        moved: moved * steps,
        measured: true,
        compute,
        ..Need::default()
    }
}

/// Trains a stage to its folder, or reads the metrics of one that is done.
pub(super) fn trained<'a>(
    name: &str,
    key: &Key,
    settings: &TrainSettings,
    with: &Context,
    training: impl FnOnce() -> Result<(Training<'a>, Sources)>,
) -> Result<(Student, Vec<StepMetrics>)> {
    let mut config = settings.settle()?;
    config.seed = config.seed.wrapping_add(with.common.seed);
    let folder = with.store.path(&name.replace(' ', ""), key);
    let metrics = match folder.exists() {
        true => {
            // Killed between its last two acts, a run leaves its workplace.
            let left = partial_folder(&folder);
            if left.exists() {
                std::fs::remove_dir_all(&left).map_err(Error::io("cannot remove", &left))?;
            }
            train::read_metrics(&folder.join("metrics.jsonl"))?
        }
        false => {
            let ((training, sources), around) = (training()?, with.surroundings);
            start_training(around.watch, name, &config, &training, &folder)?;
            training.carry_out(
                &config,
                RunOptions {
                    out: folder.clone(),
                    tokenizer: with.base.folder().to_owned(),
                    sources,
                    force: false,
                    save_every: around.save_every,
                    keep_last: 1,
                    validation: None,
                    stop: &|| around.watch.stop(),
                    observe: &mut |metrics, _| tell_step(around.watch, metrics),
                },
            )?
        }
    };
    let key = key.to_string();
    Ok((Student { folder, key }, metrics))
}
