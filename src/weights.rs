//! Named tensors on their way from a checkpoint (or a trainer's variables) into a model.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

/// A shared map of tensors, seen from a prefix: `weights.at("model.layers.0").get("mlp.up_proj.weight")`.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: Arc<BTreeMap<String, Tensor>>,
    prefix: String,
}

impl Weights {
    pub fn new(tensors: BTreeMap<String, Tensor>) -> Self {
        Self {
            tensors: Arc::new(tensors),
            prefix: String::new(),
        }
    }

    /// The same tensors seen from `name` on.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self {
            tensors: self.tensors.clone(),
            prefix: format!("{}{name}.", self.prefix),
        }
    }

    /// # Errors
    /// Names the tensor when it is absent. Checkpoints are checked as a whole when they are opened, so
    /// this is met only by weights that were put together by hand.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let full = format!("{}{name}", self.prefix);
        self.tensors
            .get(&full)
            .cloned()
            .ok_or_else(|| Error::invalid(format!("tensor {full} is missing")))
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(&format!("{}{name}", self.prefix))
    }

    /// Full names and tensors, in name order, whatever the prefix.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t))
    }

    /// The map itself (cloned handles, shared storage).
    pub fn to_map(&self) -> BTreeMap<String, Tensor> {
        self.tensors.as_ref().clone()
    }

    /// A view of the same storage that records no gradient graph.
    pub fn detach(&self) -> Self {
        Self {
            tensors: Arc::new(
                self.tensors
                    .iter()
                    .map(|(n, t)| (n.clone(), t.detach()))
                    .collect(),
            ),
            prefix: self.prefix.clone(),
        }
    }

    pub fn to_device(&self, device: &Device, dtype: DType) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (name, t) in self.tensors.iter() {
            tensors.insert(name.clone(), t.to_dtype(dtype)?.to_device(device)?);
        }
        Ok(Self {
            tensors: Arc::new(tensors),
            prefix: self.prefix.clone(),
        })
    }
}
