//! A model that does not run yet.

use rayon::prelude::*;

use super::{Lm, ModelConfig};
use crate::Result;
use crate::hash::Hash;
use crate::mixer::AttentionWeights;
use crate::weights::{Place, Weights};

/// Sizes and weights, on the host: what a checkpoint holds, what composing and training give.
#[derive(Debug, Clone)]
pub struct Parts {
    pub config: ModelConfig,
    pub weights: Weights,
}

impl Parts {
    pub fn new(config: ModelConfig, weights: impl Into<Weights>) -> Self {
        Self {
            config,
            weights: weights.into(),
        }
    }

    /// The model, ready to run.
    pub fn lm(&self, place: &Place) -> Result<Lm> {
        Lm::new(&self.config, &self.weights.to(place)?)
    }

    /// The projections of layer `index`, in f32.
    ///
    /// # Errors
    /// A layer that is not attention.
    pub fn attention(&self, index: usize) -> Result<AttentionWeights> {
        let config = self.config.attention(index)?;
        let layer = self.weights.at(format!("model.layers.{index}"));
        AttentionWeights::new(config, &layer.at(self.config.layers[index].prefix()))
    }

    /// A fingerprint of sizes and values.
    pub fn hash(&self) -> Result<String> {
        let sizes = serde_json::to_string(&self.config).expect("configs serialise");
        let all: Vec<_> = self.weights.iter().collect();
        let each = all.into_par_iter().map(|(name, weight)| -> Result<Hash> {
            let hash = Hash::of(name.as_bytes());
            let rows = weight.to_host()?;
            Ok(rows
                .iter()
                .fold(hash, |hash, x| hash.with(&x.to_le_bytes())))
        });
        let each = each.collect::<Result<Vec<Hash>>>()?;
        let all = each.iter().fold(Hash::of(sizes.as_bytes()), |all, one| {
            all.with(one.to_string().as_bytes())
        });
        Ok(all.to_string())
    }
}
