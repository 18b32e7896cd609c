//! What is told of a training run, by commands and recipes alike.

use std::path::Path;

use crate::Result;
use crate::data::Batches;
use crate::train::{StepMetrics, TrainConfig, partial_folder};
use crate::watch::Watch;

/// A run to `out` begins: its steps, and where their metrics can be followed.
///
/// # Errors
/// Data that the settings do not fit.
pub fn start_training(
    watch: &dyn Watch,
    name: &str,
    config: &TrainConfig,
    data: &dyn Batches,
    out: &Path,
) -> Result<()> {
    data.check(config.batch_size, config.seq_len)?;
    let steps = config.steps(data.examples(config.seq_len))?;
    watch.start(name, steps as usize);
    let metrics = partial_folder(out).join("metrics.jsonl");
    watch.note(&format!(
        "{name}: metrics of every step in {}",
        metrics.display()
    ));
    Ok(())
}

/// A step of it.
pub fn tell_step(watch: &dyn Watch, metrics: &StepMetrics) {
    let (loss, speed) = (metrics.loss, metrics.tokens_per_s);
    let note = format!("loss {loss:.4} {speed:.0} tokens/s");
    watch.at(metrics.step as usize, &note);
}
