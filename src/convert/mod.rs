//! From a Llama to a hybrid: the layer plan (sizes only), then the weights (initialised, or whole layers
//! of an ILD bank).

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::mixer::{self, AttentionWeights, MixerConfig};
use crate::model::ModelConfig;
use crate::weights::Weights;
use crate::{Error, Result};

mod plan;
pub use plan::{LayerKind, PlanOptions, plan};

/// How mixers are born from attention weights.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Init {
    /// As published (spec 1.2, 1.3).
    Reference,
}

/// All tensors of `student` from the teacher's: MLPs, norms, embedding and head copied, mixers converted.
/// The same seed gives the same weights.
///
/// # Errors
/// When a layer of the plan cannot be born from the teacher's layer.
pub fn compose(
    teacher: &ModelConfig,
    weights: &Weights,
    student: &ModelConfig,
    init: Init,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (name, _) in student.params() {
        if weights.contains(&name) {
            tensors.insert(name.clone(), weights.get(&name)?);
        }
    }
    for (i, config) in student.layers.iter().enumerate() {
        let prefix = format!("model.layers.{i}");
        let source = weights.at(&prefix).at(teacher.layers[i].prefix());
        let born = match config {
            // Copied above, under the same names.
            MixerConfig::Attention(_) => continue,
            MixerConfig::Mla(c) => {
                let attention = AttentionWeights::new(teacher.attention(i)?, &source)?;
                match init {
                    Init::Reference => mixer::mla::reference(c, &attention)?,
                }
            }
            MixerConfig::Mamba2(c) => {
                let attention = AttentionWeights::new(teacher.attention(i)?, &source)?;
                // Each layer draws from a stream of its own.
                let seed = seed
                    .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                    .wrapping_add(i as u64);
                match init {
                    Init::Reference => mixer::mamba2::reference(c, &attention, seed)?,
                }
            }
        };
        for (name, tensor) in born {
            tensors.insert(format!("{prefix}.{}.{name}", config.prefix()), tensor);
        }
    }
    Ok(tensors)
}

/// All tensors of `student`, every layer taken whole (mixer, MLP and norms) from the bank's model of that
/// mixer; embedding, final norm and head from the teacher (spec 1.1).
///
/// # Errors
/// When the bank has no model with that mixer, or one of other sizes.
pub fn compose_from_bank(
    teacher: &Weights,
    student: &ModelConfig,
    bank: &[(ModelConfig, Weights)],
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (i, config) in student.layers.iter().enumerate() {
        let prefix = format!("model.layers.{i}.");
        let Some((_, weights)) = bank
            .iter()
            .find(|(model, _)| model.layers.get(i) == Some(config))
        else {
            return Err(Error::invalid(format!(
                "the bank has no {} layer {i} with the sizes of the plan: train the bank with the same ranks",
                config.name()
            )));
        };
        for (name, tensor) in weights.iter().filter(|(name, _)| name.starts_with(&prefix)) {
            tensors.insert(name.to_owned(), tensor.clone());
        }
    }
    for (name, _) in student.params() {
        if !name.starts_with("model.layers.") {
            tensors.insert(name.clone(), teacher.get(&name)?);
        }
    }
    Ok(tensors)
}
