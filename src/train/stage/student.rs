//! A model whose weights are (partly) trained.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Result;
use crate::checkpoint::{self, Format};
use crate::model::{Lm, ModelConfig};
use crate::train::params::ParamGroup;
use crate::weights::Weights;

pub struct Student {
    pub lm: Lm,
    pub params: ParamGroup,
    weights: Weights,
}

impl Student {
    pub fn new(
        config: &ModelConfig,
        weights: &Weights,
        trained: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let mut stacked = BTreeMap::new();
        for (i, mixer) in config.layers.iter().enumerate() {
            for (name, rows) in mixer.stacked() {
                stacked.insert(format!("model.layers.{i}.{}.{name}", mixer.prefix()), rows);
            }
        }
        let (params, weights) = ParamGroup::new(weights, trained, &stacked)?;
        Ok(Self {
            lm: Lm::new(config, &weights)?,
            params,
            weights,
        })
    }

    /// The same weights (shared, as they are now) without gradients, for evaluation.
    pub fn snapshot(&self) -> Result<Lm> {
        Lm::new(&self.lm.config, &self.weights.detach())
    }

    pub fn write(&self, out: &Path, tokenizer: &Path) -> Result<()> {
        self.write_as(Format::Zebroid, out, tokenizer)
    }

    pub fn write_as(&self, format: Format, out: &Path, tokenizer: &Path) -> Result<()> {
        let tensors = self.weights.to_map();
        checkpoint::save(
            out,
            format,
            &self.lm.config,
            &tensors,
            Some(tokenizer),
            false,
        )
    }

    /// A fingerprint of config and weights.
    pub fn hash(&self) -> Result<String> {
        checkpoint::fingerprint(&self.lm.config, &self.weights)
    }
}
