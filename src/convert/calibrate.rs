//! The calibration pass: the teacher reads a text, and what its mixers read and write is kept as
//! statistics of every layer, beside a sample of the text to fit projections to and another to test on.
//!
//! A pass over a long text can be interrupted: it works in `FILE.partial` and goes on from there.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Kept, Key, Store, keep, kept};
use crate::data::{Batch, Batches, Corpus};
use crate::mixer::calibration::{Statistics, sums};
use crate::model::{Lm, Parts};
use crate::numerics;
use crate::watch::Watch;
use crate::weights::Place;
use crate::{Error, Result};

/// How much of the text is read, and for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrationConfig {
    /// Tokens that the statistics are taken over (as many as the text has, if fewer).
    #[arg(
        id = "calibration_tokens",
        long = "calibration-tokens",
        value_name = "TOKENS",
        default_value_t = Self::default().tokens
    )]
    pub tokens: usize,
    /// Tokens of these that output projections are fitted to.
    #[arg(long = "fit-tokens", value_name = "TOKENS", default_value_t = Self::default().fit_tokens)]
    pub fit_tokens: usize,
    /// Tokens after all of these that the result is tested on.
    #[arg(
        long = "held-out-tokens",
        value_name = "TOKENS",
        default_value_t = Self::default().held_out_tokens
    )]
    pub held_out_tokens: usize,
    /// Tokens a window.
    #[arg(
        id = "calibration_seq_len",
        long = "calibration-seq-len",
        value_name = "TOKENS",
        default_value_t = Self::default().seq_len
    )]
    pub seq_len: usize,
}

impl Default for CalibrationConfig {
    fn default() -> Self {
        Self {
            tokens: 131_072,
            fit_tokens: 32_768,
            held_out_tokens: 8_192,
            seq_len: 256,
        }
    }
}

/// Windows for the statistics, for the fit and held out.
struct Split {
    all: usize,
    fit: usize,
    held_out: usize,
}

impl CalibrationConfig {
    /// # Errors
    /// A window of no tokens, or a text that does not fill one window to fit and one to hold out.
    pub fn check(&self, corpus: &Corpus) -> Result<()> {
        self.split(corpus).map(|_| ())
    }

    /// # Errors
    /// As [`CalibrationConfig::check`].
    fn split(&self, corpus: &Corpus) -> Result<Split> {
        let sizes = [
            ("tokens", self.tokens),
            ("fit_tokens", self.fit_tokens),
            ("seq_len", self.seq_len),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(Error::invalid(format!(
                "the calibration's {name} must not be 0"
            )));
        }
        let windows = |tokens: usize| (tokens / self.seq_len).max(1);
        let have = corpus.windows(self.seq_len);
        if have < 2 {
            return Err(Error::invalid(format!(
                "the calibration text has {} tokens; it needs two windows of {}",
                corpus.tokens(),
                self.seq_len
            )));
        }
        // A short text holds a tenth back.
        let held_out = windows(self.held_out_tokens).min(have.div_ceil(10));
        let all = windows(self.tokens).min(have - held_out);
        Ok(Split {
            all,
            fit: windows(self.fit_tokens).min(all),
            held_out,
        })
    }
}

/// What the pass found.
#[derive(Debug, Clone)]
pub struct Calibration {
    /// One a layer.
    pub layers: Vec<Statistics>,
    /// What output projections are fitted to.
    pub fit: Batch,
    /// What nothing was fitted to.
    pub held_out: Batch,
    /// Tokens that the statistics are over.
    pub tokens: usize,
    /// A fingerprint of the text.
    pub data: String,
}

/// What decides a calibration.
///
/// # Errors
/// A teacher that cannot be read.
pub fn calibration_key(
    teacher: &Parts,
    place: &Place,
    corpus: &Corpus,
    config: &CalibrationConfig,
) -> Result<Key> {
    let inputs = serde_json::json!({
        "teacher": teacher.hash()?,
        "data": corpus.hash(),
        "calibration": config,
    });
    Ok(Key::new(
        numerics::Stage::Calibration,
        &place.device,
        inputs,
    ))
}

/// Windows a forward pass.
pub const CHUNK: usize = 8;
/// Forward passes between saves.
const SAVE_EVERY: usize = 16;

/// The calibration of `teacher` on the beginning of `corpus`. It is kept in `folder`, in a file named by
/// what decides it, and read from there if it was made before.
///
/// # Errors
/// Too little text, a file that cannot be written or that another process is making, or
/// [`Error::Interrupted`] (what was done is saved).
pub fn calibrate(
    teacher: &Parts,
    place: &Place,
    corpus: &Corpus,
    config: &CalibrationConfig,
    folder: &Path,
    watch: &dyn Watch,
) -> Result<Calibration> {
    let split = config.split(corpus)?;
    let fit = corpus.ordered(0, split.fit, config.seq_len)?;
    let held_out = corpus.ordered(split.all, split.held_out, config.seq_len)?;
    let key = calibration_key(teacher, place, corpus, config)?;
    let file = Store::new(folder).path("calibration", &key);
    let file = file.with_extension("safetensors");
    let mut sums = Sums {
        key,
        windows: 0,
        tensors: BTreeMap::new(),
    };
    let finished = |sums: &Sums| {
        let (fit, held_out) = (fit.clone(), held_out.clone());
        sums.calibration(teacher, fit, held_out, corpus.hash())
    };
    let partial = file.with_extension("partial");
    let drop_partial = || match partial.exists() {
        true => std::fs::remove_file(&partial).map_err(Error::io("cannot remove", &partial)),
        false => Ok(()),
    };
    sums.restore(&file)?;
    if sums.windows == split.all {
        // Killed after its last save, an earlier pass left it.
        drop_partial()?;
        return finished(&sums);
    }
    let _lock = checkpoint::lock(&file)?;
    sums.restore(&partial)?;
    watch.start("calibrate", split.all);
    let lm = teacher.lm(place)?;
    let mut passes = 0;
    while sums.windows < split.all {
        let count = CHUNK.min(split.all - sums.windows);
        sums.add(&lm, &corpus.ordered(sums.windows, count, config.seq_len)?)?;
        passes += 1;
        watch.at(sums.windows, "windows");
        let stopped = watch.stop() && sums.windows < split.all;
        if stopped || passes % SAVE_EVERY == 0 {
            sums.save(&partial)?;
        }
        if stopped {
            return Err(Error::Interrupted(format!(
                "{} of {} calibration windows are saved in {}; run the same command again to go on",
                sums.windows,
                split.all,
                partial.display()
            )));
        }
    }
    sums.save(&file)?;
    drop_partial()?;
    finished(&sums)
}

/// Sums over the windows read so far, in f64, and their place on disk.
struct Sums {
    key: Key,
    windows: usize,
    tensors: BTreeMap<String, Tensor>,
}

const SUMS: [&str; 4] = ["input", "input_products", "output", "output_squares"];

fn name(layer: usize, sum: &str) -> String {
    format!("layers.{layer}.{sum}")
}

impl Sums {
    /// One forward pass.
    fn add(&mut self, teacher: &Lm, batch: &Batch) -> Result<()> {
        let shape = (batch.rows, batch.len);
        let ids = Tensor::from_slice(&batch.input_ids, shape, teacher.device())?;
        let mut hidden = teacher.embed(&ids)?;
        for (i, layer) in teacher.layers.iter().enumerate() {
            let input = layer.mixer_input(&hidden)?;
            let output = layer.mixer.forward(&input, Some(&batch.documents))?;
            hidden = layer.finish(&hidden, &output)?;
            for (sum, value) in SUMS.iter().zip(sums(&input, &output)?) {
                let key = name(i, sum);
                let total = match self.tensors.remove(&key) {
                    Some(total) => (total + value)?,
                    None => value,
                };
                self.tensors.insert(key, total);
            }
        }
        self.windows += batch.rows;
        Ok(())
    }

    fn save(&self, path: &Path) -> Result<()> {
        keep(path, &self.key, self.windows as u64, &self.tensors)
    }

    /// Takes over what a file holds, if it is of the same calibration.
    fn restore(&mut self, path: &Path) -> Result<()> {
        if let Kept::Found { done, tensors } = kept(path, &self.key)? {
            self.windows = done as usize;
            self.tensors = tensors;
        }
        Ok(())
    }

    fn calibration(
        &self,
        teacher: &Parts,
        fit: Batch,
        held_out: Batch,
        data: String,
    ) -> Result<Calibration> {
        let tokens = self.windows * fit.len;
        let layer = |i: usize| -> Result<Statistics> {
            let attention = teacher.attention(i)?;
            let sum = |sum: &str| -> Result<Tensor> {
                let key = name(i, sum);
                let missing = || Error::invalid(format!("the saved calibration lacks {key}"));
                let tensor = self.tensors.get(&key).ok_or_else(missing)?;
                Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)
            };
            let [a, b, c, d] = SUMS.map(sum);
            Statistics::new(&attention, tokens, [&a?, &b?, &c?, &d?])
        };
        Ok(Calibration {
            layers: (0..teacher.config.layers.len())
                .map(layer)
                .collect::<Result<_>>()?,
            fit,
            held_out,
            tokens,
            data,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::data::{Packing, Tokenizer, stories};
    use crate::watch::Quiet;

    #[test]
    fn an_interrupted_pass_goes_on_and_ends_the_same() {
        let teacher = Checkpoint::open(Path::new("assets/teacher")).unwrap();
        let parts = teacher.parts().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("stories.jsonl");
        stories::write_jsonl(&data, 1, 60).unwrap();
        let tokenizer = Tokenizer::open(&teacher.folder).unwrap();
        let corpus = Corpus::load(&data, &tokenizer, Packing::Documents).unwrap();
        let config = CalibrationConfig {
            tokens: 4096,
            fit_tokens: 512,
            held_out_tokens: 256,
            seq_len: 64,
        };
        let run = |folder: &Path, watch: &Quiet| {
            calibrate(&parts, &Place::cpu(), &corpus, &config, folder, watch)
        };
        let quiet = Quiet::default();
        let straight = run(&folder.path().join("straight"), &quiet).unwrap();
        assert_eq!((straight.tokens, quiet.steps()), (4096, 8));
        let broken = folder.path().join("broken");
        let stopped = run(&broken, &Quiet::stop_after(3)).unwrap_err();
        assert!(matches!(stopped, Error::Interrupted(_)), "{stopped}");
        // Another process that goes on with it is not disturbed.
        let held = std::fs::read_dir(&broken).unwrap().next().unwrap().unwrap();
        let held = checkpoint::lock(&held.path().with_extension("safetensors")).unwrap();
        let refused = run(&broken, &quiet).unwrap_err().to_string();
        assert!(refused.contains("another zebroid process"), "{refused}");
        drop(held);
        let rest = Quiet::default();
        let resumed = run(&broken, &rest).unwrap();
        assert_eq!(rest.steps(), 5, "three of eight passes were saved");
        assert_eq!(std::fs::read_dir(&broken).unwrap().count(), 1);
        let again = run(&broken, &rest).unwrap();
        assert_eq!(rest.steps(), 5, "nothing is read twice");
        for other in [&resumed, &again] {
            for (a, b) in straight.layers.iter().zip(&other.layers) {
                assert_eq!(a.input_moment, b.input_moment);
                assert_eq!(a.output_square, b.output_square);
            }
            assert_eq!(other.held_out.input_ids, straight.held_out.input_ids);
        }
        assert!(
            !straight
                .fit
                .examples
                .iter()
                .any(|w| straight.held_out.examples.contains(w))
        );
    }
}
