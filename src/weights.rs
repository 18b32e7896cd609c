//! Named tensors on their way from a checkpoint (or a trainer's variables) into a model.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::op::linear::{Matrix, Stored};
use crate::{Error, Result};

/// A shared map of tensors, seen from a prefix: `weights.at("model.layers.0").get("mlp.up_proj.weight")`.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    tensors: Arc<BTreeMap<String, Tensor>>,
    /// Matrices that are left as a file has them.
    stored: Arc<BTreeMap<String, Stored>>,
    prefix: String,
}

impl Weights {
    pub fn new(tensors: BTreeMap<String, Tensor>) -> Self {
        Self {
            tensors: Arc::new(tensors),
            ..Self::default()
        }
    }

    /// With matrices that are left as a file has them; nothing trains or walks these.
    pub fn with_stored(
        tensors: BTreeMap<String, Tensor>,
        stored: BTreeMap<String, Stored>,
    ) -> Self {
        Self {
            tensors: Arc::new(tensors),
            stored: Arc::new(stored),
            prefix: String::new(),
        }
    }

    /// The same tensors seen from `name` on.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self {
            tensors: self.tensors.clone(),
            stored: self.stored.clone(),
            prefix: format!("{}{name}.", self.prefix),
        }
    }

    /// # Errors
    /// Names the tensor when it is absent. Checkpoints are checked as a whole when they are opened, so
    /// this is met only by weights that were put together by hand.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        Ok(self.matrix(name)?.to_tensor()?)
    }

    /// A matrix, as it is kept.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn matrix(&self, name: &str) -> Result<Matrix> {
        let full = format!("{}{name}", self.prefix);
        let dense = self.tensors.get(&full).cloned().map(Matrix::Dense);
        let found = dense.or_else(|| self.stored.get(&full).cloned().map(Matrix::Stored));
        found.ok_or_else(|| Error::invalid(format!("tensor {full} is missing")))
    }

    pub fn contains(&self, name: &str) -> bool {
        let full = format!("{}{name}", self.prefix);
        self.tensors.contains_key(&full) || self.stored.contains_key(&full)
    }

    /// Full names and tensors, in name order, whatever the prefix; matrices left as stored are not among them.
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
            stored: self.stored.clone(),
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
            stored: self.stored.clone(),
            prefix: self.prefix.clone(),
        })
    }
}
