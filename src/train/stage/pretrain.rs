//! Next-token cross-entropy inside each document: a model from scratch, or one that is trained on.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::student::{Student, Summand};
use super::{Shares, Terms, ids, masked_sum, next_token_losses};
use crate::Result;
use crate::checkpoint::{Format, Provenance};
use crate::data::Batch;
use crate::model::{ModelConfig, Parts};
use crate::weights::Place;

pub struct Pretrain {
    pub student: Student,
}

impl Pretrain {
    /// All weights are trained.
    pub fn new(parts: &Parts, place: &Place) -> Result<Self> {
        Ok(Self {
            student: Student::new(parts, |_| true, place)?,
        })
    }

    pub(super) fn identity(&self) -> Result<serde_json::Value> {
        Ok(serde_json::json!({ "stage": "pretrain", "student": self.student.hash()? }))
    }

    pub(super) fn backward(&mut self, batch: &Batch, shares: &Shares) -> Result<Terms> {
        let ids = ids(batch, self.student.lm.device())?;
        let loss = |range: Range<usize>, logits: &Tensor| {
            let losses = next_token_losses(batch, range.clone(), logits)?;
            let value = masked_sum(&losses, batch, range)?;
            Ok(vec![Summand {
                name: "ce",
                value: (value * shares.learned)?,
                weight: 1.0,
            }])
        };
        let learned = self.student.learn(&ids, &batch.documents, |_| None, loss)?;
        Ok(Terms {
            loss: learned.loss,
            named: Vec::new(),
            phases: learned.phases,
        })
    }

    pub(super) fn write(&self, out: &Path, tokenizer: &Path, record: &Provenance) -> Result<()> {
        let format = match self.student.lm.config.converted().is_empty() {
            true => Format::Llama,
            false => Format::Zebroid,
        };
        self.student.write_as(format, out, tokenizer, record)
    }
}

/// A model of the config's sizes with fresh weights: normal of deviation 0.02, the projections back into the residual
/// stream divided by `√(2 L)` (GPT-2), norms 1.
///
/// # Errors
/// Sizes that make no model.
pub fn fresh(config: &ModelConfig, seed: u64) -> Result<Parts> {
    config.validate()?;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let depth = (2.0 * config.layers.len() as f64).sqrt();
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.params() {
        let tensor = if name.ends_with("norm.weight") {
            Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu)?
        } else {
            let back = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let deviation = if back { 0.02 / depth } else { 0.02 };
            let n = shape.iter().product();
            let data: Vec<f32> = (0..n)
                .map(|_| (deviation * normal(&mut random)) as f32)
                .collect();
            Tensor::from_vec(data, shape, &Device::Cpu)?
        };
        tensors.insert(name, tensor);
    }
    Ok(Parts::new(config.clone(), &tensors))
}

/// A standard normal draw (Box & Muller).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    use rand::RngExt;
    let (u, v): (f64, f64) = (random.random(), random.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}
