//! A run on disk: what it is, how far it is, how it ends.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::events::Events;
use super::json_lines::{line, read_lines};
use super::params::Saved;
use super::samples::Samples;
use super::stage::Stage;
use super::{RunOptions, StepMetrics, TrainConfig, partial_folder};
use crate::checkpoint::{self, EVENTS, Kept, Key, Provenance, SAMPLES, keep, kept};
use crate::data::Batches;
use crate::{Error, Result};

/// A save is `state-STEP.safetensors`.
pub(super) const STATE: &str = "state";
/// Layers that are trained by themselves stand in `layers-FIRST-LAST`.
pub(super) const PIECES: &str = "layers-";
/// The student that was judged best.
pub(super) const BEST: &str = "best";
pub(super) const METRICS: &str = "metrics.jsonl";
/// What it learned from.
const MANIFEST: &str = "data.json";
/// Inside the run, until it is moved.
pub(super) const RESULT: &str = "result";

pub(super) struct Run {
    pub folder: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps done at the last save.
    pub saved: u64,
    key: Key,
    /// Of all steps so far.
    pub metrics: Vec<StepMetrics>,
    log: fs::File,
    /// The same for TensorBoard.
    events: Events,
    samples: Samples,
    /// Of the result, as far as it is known: the last step is this run.
    record: Provenance,
}

impl Run {
    /// A fresh run in `OUT.partial`, or the one that stands there, restored into `stage`, with windows of `len` tokens.
    ///
    /// # Errors
    /// A partial run with other settings, unless `force` drops it.
    pub fn open(
        options: &RunOptions,
        key: Key,
        record: Provenance,
        len: usize,
        stage: &mut Stage,
    ) -> Result<Run> {
        let (folder, force) = (partial_folder(&options.out), options.force);
        fs::create_dir_all(&folder).map_err(Error::io("cannot create", &folder))?;
        let mut step = 0;
        let found = saves(&folder)?;
        let mut saves = found.clone();
        while let Some((_, path)) = saves.pop() {
            match read_state(&path, &key, stage) {
                Ok(Some((at, groups))) => {
                    step = at;
                    restore(stage, groups)?;
                    break;
                }
                Ok(None) => {}
                Err(error) if force => tracing::warn!("starting over: {error}"),
                Err(error) if !saves.is_empty() => {
                    tracing::warn!("{error}; going on from the one before")
                }
                Err(error) => return Err(error),
            }
        }
        // What was passed over would be taken for newer than what is saved next.
        for (_, path) in &found[found.len().min(saves.len() + usize::from(step > 0))..] {
            fs::remove_file(path).map_err(Error::io("cannot remove", path))?;
        }
        if step == 0 {
            remove(&folder.join(BEST))?;
        }
        let log_path = folder.join(METRICS);
        let mut metrics = match step {
            0 => Vec::new(),
            _ => read_metrics(&log_path)?,
        };
        metrics.retain(|m| m.step <= step);
        if metrics.len() as u64 != step {
            tracing::warn!(
                "{} has {} of the {step} steps that are saved: curves and counts of this run lack the others",
                log_path.display(),
                metrics.len()
            );
        }
        let lines: String = metrics.iter().map(line).collect();
        checkpoint::write_atomic(&log_path, lines.as_bytes())?;
        let log = fs::OpenOptions::new().append(true).open(&log_path);
        let log = log.map_err(Error::io("cannot write", &log_path))?;
        let events = Events::open(&folder.join(EVENTS), &metrics)?;
        let (tokenizer, data) = (&options.tokenizer, stage.data());
        let samples = Samples::open(&folder, step, tokenizer, data, len)?;
        record.write(&folder)?;
        Ok(Run {
            folder,
            step,
            saved: step,
            key,
            metrics,
            log,
            events,
            samples,
            record,
        })
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.metrics.last().map_or(0, |m| m.tokens)
    }

    /// Of a step that cannot be gone on from: where it came up, and what can be done.
    pub fn diverged(&self, why: &str, config: &TrainConfig) -> Error {
        let batches = config.batches_of(self.step);
        let batches = match config.accumulation {
            1 => format!("batch {}", batches.start),
            _ => format!("batches {} to {}", batches.start, batches.end - 1),
        };
        Error::Diverged(format!(
            "{why} at step {} ({batches} of seed {}): lower --lr (now {}) or --clip (now {}); the save of step {} is in {}",
            self.step + 1,
            config.seed,
            config.lr,
            config.clip,
            self.saved,
            self.folder.display()
        ))
    }

    pub fn log(&mut self, metrics: StepMetrics) -> Result<()> {
        let written = self.log.write_all(line(&metrics).as_bytes());
        written.map_err(Error::io("cannot write", &self.folder.join(METRICS)))?;
        self.events.log(&metrics)?;
        self.metrics.push(metrics);
        Ok(())
    }

    /// Records what the student writes now; a bank has none.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn sample(&mut self, stage: &Stage) -> Result<()> {
        match stage.student() {
            Some(student) => self.samples.draw(student, self.step),
            None => Ok(()),
        }
    }

    /// Saves, and removes all but the `most` newest saves.
    ///
    /// # Errors
    /// A disk that does not take it: says which save is still there.
    pub fn save(&mut self, stage: &mut Stage, most: usize) -> Result<()> {
        // The steps are on the disk before the save that counts them.
        let synced = self.log.sync_data();
        synced.map_err(Error::io("cannot write", &self.folder.join(METRICS)))?;
        let mut tensors = Default::default();
        for (i, group) in stage.groups_mut().into_iter().enumerate() {
            group.save(&format!("group{i}"), &mut tensors)?;
        }
        let path = self
            .folder
            .join(format!("{STATE}-{:08}.safetensors", self.step));
        if let Err(error) = keep(&path, &self.key, self.step, &tensors) {
            if self.saved > 0 {
                tracing::error!(
                    "step {} is not saved; the save of step {} is still in {}: mend this and run the same command again",
                    self.step,
                    self.saved,
                    self.folder.display()
                );
            }
            return Err(error);
        }
        self.saved = self.step;
        let saves = saves(&self.folder)?;
        for (_, path) in &saves[..saves.len().saturating_sub(most.max(1))] {
            fs::remove_file(path).map_err(Error::io("cannot remove", path))?;
        }
        Ok(())
    }

    /// Gives the stage the weights and moments of the last save again.
    pub fn go_back(&self, stage: &mut Stage) -> Result<()> {
        let path = self
            .folder
            .join(format!("{STATE}-{:08}.safetensors", self.saved));
        match read_state(&path, &self.key, stage)? {
            Some((_, groups)) => restore(stage, groups),
            None => Err(Error::file(
                &path,
                "this save is gone; start over with --force",
            )),
        }
    }

    /// Writes the student as the result if no step before the last was judged better, by this figure.
    ///
    /// # Errors
    /// A disk that does not take it.
    pub fn keep_best(&self, stage: &Stage, options: &RunOptions, judged: &str) -> Result<()> {
        let of = |m: &StepMetrics| m.terms.get(judged)?.as_f64();
        let Some((last, before)) = self.metrics.split_last() else {
            return Ok(());
        };
        // What is no number is not better.
        let Some(now) = of(last) else {
            return Ok(());
        };
        if before.iter().filter_map(of).any(|before| before <= now) {
            return Ok(());
        }
        let best = self.folder.join(BEST);
        remove(&best)?;
        let record = described(self.record.clone(), &self.metrics);
        stage.write(&best, &options.tokenizer, &self.key, &record)
    }

    /// Writes the result beside the run, moves it to `OUT` in one rename and removes the run.
    pub fn finish(self, stage: &Stage, options: &RunOptions) -> Result<Vec<StepMetrics>> {
        let best = self.folder.join(BEST);
        let keeps_best = options.validation.as_ref().is_some_and(|v| v.keep_best);
        let result = match keeps_best && best.exists() {
            true => best,
            false => {
                let result = self.folder.join(RESULT);
                remove(&result)?;
                let record = described(self.record, &self.metrics);
                stage.write(&result, &options.tokenizer, &self.key, &record)?;
                result
            }
        };
        self.samples.write(&result.join(SAMPLES))?;
        publish(&result, stage.data(), &self.metrics, &self.folder, options)?;
        Ok(self.metrics)
    }
}

/// The record of a run that has come so far.
pub(super) fn described(mut record: Provenance, metrics: &[StepMetrics]) -> Provenance {
    if let (Some(step), Some(last)) = (record.steps.last_mut(), metrics.last()) {
        step.tokens = Some(last.tokens);
        step.figures = last.figures();
    }
    record
}

/// Moves a result to `OUT` in one rename, its metrics in it, and removes the folder that it was made in.
///
/// # Errors
/// A disk that does not take it.
pub(super) fn publish(
    result: &Path,
    data: &dyn Batches,
    metrics: &[StepMetrics],
    workplace: &Path,
    options: &RunOptions,
) -> Result<()> {
    let lines: String = metrics.iter().map(line).collect();
    checkpoint::write_atomic(&result.join(METRICS), lines.as_bytes())?;
    if let Some(manifest) = data.manifest() {
        let text = serde_json::to_string_pretty(&manifest).expect("names and numbers serialise");
        checkpoint::write_atomic(&result.join(MANIFEST), text.as_bytes())?;
    }
    let events = workplace.join(EVENTS);
    match events.exists() {
        true => {
            let copy = result.join(EVENTS);
            fs::copy(&events, &copy).map_err(Error::io("cannot write", &copy))?;
        }
        false => drop(Events::open(&result.join(EVENTS), metrics)?),
    }
    checkpoint::replace_folder(result, &options.out, options.force)?;
    fs::remove_dir_all(workplace).map_err(Error::io("cannot remove", workplace))
}

pub(super) fn remove(folder: &Path) -> Result<()> {
    match folder.exists() {
        true => fs::remove_dir_all(folder).map_err(Error::io("cannot remove", folder)),
        false => Ok(()),
    }
}

/// The saves in a run's folder, by their steps, oldest first.
pub(super) fn saves(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut saves = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
        let path = entry.map_err(Error::io("cannot list", folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let name = name.and_then(|name| name.strip_suffix(".safetensors"));
        let step = match name.and_then(|name| name.strip_prefix(STATE)) {
            // Of a version that kept one.
            Some("") => Some(0),
            Some(step) => step.strip_prefix('-').and_then(|step| step.parse().ok()),
            None => None,
        };
        saves.extend(step.map(|step| (step, path)));
    }
    saves.sort();
    Ok(saves)
}

fn restore(stage: &mut Stage, groups: Vec<Saved>) -> Result<()> {
    let groups = stage.groups_mut().into_iter().zip(groups);
    groups
        .into_iter()
        .try_for_each(|(group, saved)| group.restore(saved))
}

/// The step of a save and the groups in it, if there is one.
///
/// # Errors
/// A save of other settings, or one that cannot be read as a whole.
fn read_state(path: &Path, key: &Key, stage: &mut Stage) -> Result<Option<(u64, Vec<Saved>)>> {
    let damaged = |error: Error| {
        Error::file(
            path,
            format!("this save cannot be gone on from ({error}); start over with --force"),
        )
    };
    let (step, tensors) = match kept(path, key).map_err(damaged)? {
        Kept::Nothing => return Ok(None),
        Kept::Found { done, tensors } => (done, tensors),
        Kept::Other(difference) => {
            return Err(Error::file(
                path.parent().unwrap_or(path),
                format!(
                    "an unfinished run with other settings is here ({difference}); repeat its command to go on, \
                     choose another output, or drop it with --force"
                ),
            ));
        }
    };
    let groups = stage.groups_mut().into_iter().enumerate();
    let groups = groups.map(|(i, group)| group.saved(&format!("group{i}"), &tensors));
    let groups = groups.collect::<Result<_>>().map_err(damaged)?;
    Ok(Some((step, groups)))
}

/// The steps of a run.
///
/// # Errors
/// A file that cannot be read.
pub fn read_metrics(path: &Path) -> Result<Vec<StepMetrics>> {
    read_lines(path)
}
