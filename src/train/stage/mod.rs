//! What is trained, and towards what. A stage is a file here and a variant of [`Stage`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::TrainConfig;
use super::at_once::AtOnce;
use super::params::ParamGroup;
use crate::checkpoint::{Kept, Key, Provenance, keep, kept_in_place};
use crate::data::{Batch, Batches, Corpus, Preferences};
use crate::model::Lm;
use crate::numerics;
use crate::op::linear::Matrix;
use crate::op::loss::cross_entropy;
use crate::{Error, Result};

pub mod dpo;
pub mod ild;
pub mod kd;
pub mod pretrain;
pub mod student;

pub use dpo::Dpo;
pub use ild::Ild;
pub use kd::Kd;
pub use pretrain::Pretrain;
pub use student::Student;

/// A loss and the figures it is made of, of one micro-batch.
#[derive(Debug, Default)]
pub struct Terms {
    pub loss: f64,
    pub named: Vec<(String, f64)>,
    /// Where the time went, in seconds, for `bench train`.
    pub phases: Vec<(&'static str, f64)>,
}

/// How much of a step's whole a micro-batch is. A loss that is a mean, or relative to a size, of a micro-batch
/// alone, times the share of what it was divided by, is its part of the whole's.
#[derive(Debug, Clone)]
pub struct Shares {
    /// Of all rows.
    pub rows: f64,
    /// Of all positions.
    pub positions: f64,
    /// Of the positions whose next token is to be learned.
    pub learned: f64,
    /// Of the sums of squares of ILD's targets, in the order of its terms; empty for a batch alone.
    pub energies: Vec<f64>,
}

impl Shares {
    /// Of a step of one batch.
    pub fn alone() -> Self {
        Self {
            rows: 1.0,
            positions: 1.0,
            learned: 1.0,
            energies: Vec::new(),
        }
    }

    fn of(batches: &[Batch]) -> Vec<Self> {
        let learned = |b: &Batch| b.mask.iter().map(|m| f64::from(*m)).sum::<f64>();
        let rows = share(batches.iter().map(|b| b.rows as f64));
        let positions = share(batches.iter().map(|b| (b.rows * b.len) as f64));
        let learned = share(batches.iter().map(learned));
        let each = |i: usize| Self {
            rows: rows[i],
            positions: positions[i],
            learned: learned[i],
            energies: Vec::new(),
        };
        (0..batches.len()).map(each).collect()
    }
}

/// Each part over the sum of all.
fn share(parts: impl Iterator<Item = f64>) -> Vec<f64> {
    let parts: Vec<f64> = parts.collect();
    let whole: f64 = parts.iter().sum();
    let each = |part: &f64| if whole > 0.0 { part / whole } else { 0.0 };
    match parts.as_slice() {
        [_] => vec![1.0],
        parts => parts.iter().map(each).collect(),
    }
}

/// Seconds since the last lap.
struct Laps(std::time::Instant);

impl Laps {
    fn new() -> Self {
        Self(std::time::Instant::now())
    }

    fn lap(&mut self) -> f64 {
        std::mem::replace(&mut self.0, std::time::Instant::now())
            .elapsed()
            .as_secs_f64()
    }
}

/// What is trained, with what it learns from.
pub enum Stage<'a> {
    Ild(Ild, &'a Corpus),
    Kd(Box<Kd>, &'a Corpus),
    Dpo(Dpo, &'a Preferences),
    Pretrain(Pretrain, &'a Corpus),
}

impl<'a> Stage<'a> {
    pub fn data(&self) -> &'a dyn Batches {
        match self {
            Stage::Ild(_, text) | Stage::Kd(_, text) | Stage::Pretrain(_, text) => *text,
            Stage::Dpo(_, pairs) => *pairs,
        }
    }

    /// Everything that decides the result.
    pub fn key(&self, train: &TrainConfig) -> Result<Key> {
        let (stage, of, lm) = match self {
            Stage::Ild(s, _) => (s.identity()?, numerics::Stage::Ild, s.teacher()),
            Stage::Kd(s, _) => (s.identity()?, numerics::Stage::Kd, &s.student.lm),
            Stage::Dpo(s, _) => (s.identity()?, numerics::Stage::Dpo, &s.student.lm),
            Stage::Pretrain(s, _) => (s.identity()?, numerics::Stage::Pretrain, &s.student.lm),
        };
        let inputs = json!({ "stage": stage, "train": train, "data": self.data().hash() });
        Ok(Key::new(of, lm.device(), inputs))
    }

    /// What records call it, and its settings as recipes spell them.
    pub fn settings(&self, train: &TrainConfig) -> (&'static str, Value) {
        let (name, mut settings) = match self {
            Stage::Ild(s, _) => ("ild", s.settings()),
            Stage::Kd(s, _) => ("kd", s.settings()),
            Stage::Dpo(s, _) => ("dpo", s.settings()),
            Stage::Pretrain(..) => ("pretrain", json!({})),
        };
        settings["train"] = json!(train);
        (name, settings)
    }

    /// The one model that is trained, as it is now; a bank has several.
    pub fn student(&self) -> Option<&Lm> {
        match self {
            Stage::Ild(s, _) => s.snapshot(),
            Stage::Kd(s, _) => Some(s.student.snapshot()),
            Stage::Dpo(s, _) => Some(s.student.snapshot()),
            Stage::Pretrain(s, _) => Some(s.student.snapshot()),
        }
    }

    /// The layers that are trained here, if others are trained elsewhere.
    pub fn piece(&self) -> Option<&[usize]> {
        match self {
            Stage::Ild(s, _) => s.piece(),
            Stage::Kd(..) | Stage::Dpo(..) | Stage::Pretrain(..) => None,
        }
    }

    /// What computes the loss of tokens, and whose it is.
    pub fn models(&self) -> Vec<(&'static str, &Lm)> {
        let student = self.student().map(|student| ("student", student));
        let teacher = match self {
            Stage::Ild(s, _) => Some(s.teacher()),
            Stage::Kd(s, _) => s.teacher().lm(),
            Stage::Dpo(..) | Stage::Pretrain(..) => None,
        };
        let teacher = teacher.map(|teacher| ("teacher", teacher));
        teacher.into_iter().chain(student).collect()
    }

    /// Told before every step; the steps that have a schedule of the learning rate of their own, of which it is
    /// one.
    pub fn start_step(&mut self, step: u64, steps: u64) -> Range<u64> {
        match self {
            Stage::Kd(s, _) => s.start_step(step, steps),
            _ => 0..steps,
        }
    }

    /// What each micro-batch of a step counts, so that their sum is the loss of one large batch.
    pub fn shares(&self, batches: &[Batch]) -> Result<Vec<Shares>> {
        let mut shares = Shares::of(batches);
        if let (Stage::Ild(s, _), true) = (self, batches.len() > 1) {
            s.share_energies(batches, &mut shares)?;
        }
        Ok(shares)
    }

    /// Adds the gradients of the batch's part of a step's loss to the groups; the terms are parts too.
    pub fn backward(&mut self, batch: &Batch, shares: &Shares) -> Result<Terms> {
        match self {
            Stage::Ild(s, _) => s.backward(batch, shares),
            Stage::Kd(s, _) => s.backward(batch, shares),
            Stage::Dpo(s, _) => s.backward(batch, shares),
            Stage::Pretrain(s, _) => s.backward(batch, shares),
        }
    }

    /// Takes over the layers of pieces, which must be all, each once.
    ///
    /// # Errors
    /// A piece of other settings, teacher or data, or layers that are in none or in two of them.
    pub fn take(&mut self, pieces: &[PathBuf], key: &Key) -> Result<()> {
        let Stage::Ild(ild, _) = self else {
            return Err(Error::invalid("only ILD is made of pieces"));
        };
        let read = pieces.iter().map(|folder| piece(folder, key));
        ild.take(read.collect::<Result<_>>()?)
    }

    pub fn groups_mut(&mut self) -> Vec<&mut ParamGroup> {
        match self {
            Stage::Ild(s, _) => s.groups_mut(),
            Stage::Kd(s, _) => vec![&mut s.student.params],
            Stage::Dpo(s, _) => vec![&mut s.student.params],
            Stage::Pretrain(s, _) => vec![&mut s.student.params],
        }
    }

    /// Where gradients are to be applied as they appear in the next step, and what was in one that came to nothing.
    pub fn at_once(&mut self) -> &mut Option<AtOnce> {
        match self {
            Stage::Ild(s, _) => &mut s.at_once,
            Stage::Kd(s, _) => &mut s.student.at_once,
            Stage::Dpo(s, _) => &mut s.student.at_once,
            Stage::Pretrain(s, _) => &mut s.student.at_once,
        }
    }

    /// Writes the result as one or more checkpoint folders, tokenizer files included. A piece is a folder with the layers
    /// that were trained, for [`Stage::take`] of a stage of the same `key`.
    pub fn write(
        &self,
        out: &Path,
        tokenizer: &Path,
        key: &Key,
        record: &Provenance,
    ) -> Result<()> {
        match self {
            Stage::Ild(s, _) if s.piece().is_some_and(|layers| !layers.is_empty()) => {
                keep(&out.join(PIECE), key, 0, &s.layers())
            }
            Stage::Ild(s, _) => s.write(out, tokenizer, record),
            Stage::Kd(s, _) => s.student.write(out, tokenizer, record),
            Stage::Dpo(s, _) => s.student.write(out, tokenizer, record),
            Stage::Pretrain(s, _) => s.write(out, tokenizer, record),
        }
    }
}

/// The layers in the folder of a piece.
///
/// # Errors
/// A piece of other settings, teacher or data, or none.
pub fn piece(folder: &Path, key: &Key) -> Result<BTreeMap<String, Matrix>> {
    match kept_in_place(&folder.join(PIECE), key)? {
        Kept::Found { tensors, .. } => Ok(tensors),
        Kept::Nothing => Err(Error::file(
            folder,
            "no piece (train ild --only-layers makes one)",
        )),
        Kept::Other(difference) => Err(Error::file(
            folder,
            format!(
                "this piece was trained with other settings ({difference}): repeat its command, or drop what is unfinished with --force"
            ),
        )),
    }
}

/// In the folder of a piece.
const PIECE: &str = "layers.safetensors";

/// `[B, T]` ids of a batch.
pub fn ids(batch: &Batch, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_slice(
        &batch.input_ids,
        (batch.rows, batch.len),
        device,
    )?)
}

/// `[B, T, C]` → `[B·T, C]`.
fn rows(x: &Tensor) -> Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    Ok(x.reshape((b * t, c))?)
}

fn scalar(x: &Tensor) -> Result<f64> {
    Ok(x.to_dtype(candle_core::DType::F64)?.to_scalar()?)
}

/// `−ln p` of the text's next tokens behind rows `range` of a batch, whose logits `[rows, V]` are given: `[rows]`.
fn next_token_losses(batch: &Batch, range: Range<usize>, logits: &Tensor) -> Result<Tensor> {
    let targets = Tensor::new(&batch.targets[range], logits.device())?;
    Ok(cross_entropy(logits, &targets)?)
}

/// The part of rows `range` in the mean of a batch's per-row losses over the positions whose next token is to be learned.
fn masked_sum(rows: &Tensor, batch: &Batch, range: Range<usize>) -> Result<Tensor> {
    let count = batch.mask.iter().sum::<f32>().max(1.0) as f64;
    let mask = Tensor::new(&batch.mask[range], rows.device())?;
    let mask = mask.to_dtype(rows.dtype())?;
    Ok(((rows * mask)?.sum_all()? / count)?)
}
