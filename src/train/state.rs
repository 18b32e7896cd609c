//! A run on disk: what it is, how far it is, how it ends.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::params::Saved;
use super::stage::Stage;
use super::{RunOptions, StepMetrics, TrainConfig, partial_folder};
use crate::checkpoint::{self, Kept, Key, keep, kept};
use crate::{Error, Result};

const STATE: &str = "state.safetensors";
const METRICS: &str = "metrics.jsonl";
/// What it learned from.
const MANIFEST: &str = "data.json";

pub(super) struct Run {
    pub folder: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Steps done at the last save.
    pub saved: u64,
    key: Key,
    metrics: Vec<StepMetrics>,
    log: fs::File,
}

impl Run {
    /// A fresh run in `OUT.partial`, or the one that stands there, restored into `stage`.
    ///
    /// # Errors
    /// A partial run with other settings, unless `force` drops it.
    pub fn open(out: &Path, key: Key, force: bool, stage: &mut Stage) -> Result<Run> {
        let folder = partial_folder(out);
        fs::create_dir_all(&folder).map_err(Error::io("cannot create", &folder))?;
        let mut step = 0;
        match read_state(&folder.join(STATE), &key, stage) {
            Ok(Some((at, groups))) => {
                step = at;
                for (group, saved) in stage.groups_mut().into_iter().zip(groups) {
                    group.restore(saved)?;
                }
            }
            Ok(None) => {}
            Err(error) if force => tracing::warn!("starting over: {error}"),
            Err(error) => return Err(error),
        }
        let log_path = folder.join(METRICS);
        let metrics = read_metrics(&log_path, step)?;
        let lines: String = metrics.iter().map(line).collect();
        checkpoint::write_atomic(&log_path, lines.as_bytes())?;
        let log = fs::OpenOptions::new().append(true).open(&log_path);
        let log = log.map_err(Error::io("cannot write", &log_path))?;
        Ok(Run {
            folder,
            step,
            saved: step,
            key,
            metrics,
            log,
        })
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.metrics.last().map_or(0, |m| m.tokens)
    }

    /// Of a value that is not finite in step `step` (from 0): where it came up, and what can be done.
    pub fn diverged(&self, error: Error, step: u64, config: &TrainConfig) -> Error {
        let batches = config.batches_of(step);
        let batches = match config.accumulation {
            1 => format!("batch {}", batches.start),
            _ => format!("batches {} to {}", batches.start, batches.end - 1),
        };
        Error::invalid(format!(
            "{error} at step {} ({batches} of seed {}): lower --lr (now {}) or --clip (now {}); the save of step {} is in {}",
            step + 1,
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
        self.metrics.push(metrics);
        Ok(())
    }

    pub fn save(&mut self, stage: &mut Stage) -> Result<()> {
        let mut tensors = Default::default();
        for (i, group) in stage.groups_mut().into_iter().enumerate() {
            group.save(&format!("group{i}"), &mut tensors)?;
        }
        keep(&self.folder.join(STATE), &self.key, self.step, &tensors)?;
        self.saved = self.step;
        Ok(())
    }

    /// Writes the result beside the run, moves it to `OUT` in one rename and removes the run.
    pub fn finish(self, stage: &Stage, options: &RunOptions) -> Result<Vec<StepMetrics>> {
        let result = self.folder.join("result");
        if result.exists() {
            fs::remove_dir_all(&result).map_err(Error::io("cannot remove", &result))?;
        }
        stage.write(&result, &options.tokenizer)?;
        let metrics = result.join(METRICS);
        fs::copy(self.folder.join(METRICS), &metrics)
            .map_err(Error::io("cannot write", &metrics))?;
        if let Some(manifest) = stage.data().manifest() {
            let text =
                serde_json::to_string_pretty(&manifest).expect("names and numbers serialise");
            checkpoint::write_atomic(&result.join(MANIFEST), text.as_bytes())?;
        }
        checkpoint::replace_folder(&result, &options.out, options.force)?;
        fs::remove_dir_all(&self.folder).map_err(Error::io("cannot remove", &self.folder))?;
        Ok(self.metrics)
    }
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

fn line(metrics: &StepMetrics) -> String {
    serde_json::to_string(metrics).expect("numbers and names serialise") + "\n"
}

/// The lines up to `step`; a line that a crash cut off lies after the save and is dropped.
fn read_metrics(path: &Path, step: u64) -> Result<Vec<StepMetrics>> {
    if step == 0 || !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str::<StepMetrics>(line).ok())
        .filter(|m| m.step <= step)
        .collect())
}
