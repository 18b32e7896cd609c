//! A model whose weights are (partly) trained.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Result;
use crate::checkpoint::{self, Format};
use crate::model::{Lm, Parts};
use crate::train::params::ParamGroup;
use crate::weights::{Place, Weights};

pub struct Student {
    pub lm: Lm,
    pub params: ParamGroup,
    weights: Weights,
}

impl Student {
    /// `trained`: which weights, by name.
    pub fn new(parts: &Parts, trained: impl Fn(&str) -> bool, place: &Place) -> Result<Self> {
        let config = &parts.config;
        let mut stacked = BTreeMap::new();
        for (i, mixer) in config.layers.iter().enumerate() {
            for (name, rows) in mixer.stacked() {
                stacked.insert(format!("model.layers.{i}.{}.{name}", mixer.prefix()), rows);
            }
        }
        let (params, weights) = ParamGroup::new(&parts.weights, trained, &stacked, place)?;
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
        let (config, weights) = (&self.lm.config, &self.weights);
        checkpoint::save(out, format, config, weights, Some(tokenizer), false)
    }

    /// A fingerprint of config and weights.
    pub fn hash(&self) -> Result<String> {
        Parts::new(self.lm.config.clone(), &self.weights).hash()
    }
}
