//! Named weights on their way from a checkpoint (or a trainer's variables) into a model.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::op::linear::{Matrix, wide};
use crate::{Error, Result};

/// A shared map of weights, seen from a prefix: `weights.at("model.layers.0").get("mlp.up_proj.weight")`. Matrices may
/// stand as a file has them; what is no matrix is dense.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    all: Arc<BTreeMap<String, Matrix>>,
    prefix: String,
}

impl From<BTreeMap<String, Matrix>> for Weights {
    fn from(all: BTreeMap<String, Matrix>) -> Self {
        Self {
            all: Arc::new(all),
            prefix: String::new(),
        }
    }
}

impl From<&BTreeMap<String, Tensor>> for Weights {
    fn from(tensors: &BTreeMap<String, Tensor>) -> Self {
        Self::new(tensors.clone())
    }
}

impl From<&Weights> for Weights {
    fn from(weights: &Weights) -> Self {
        weights.clone()
    }
}

impl Weights {
    pub fn new(tensors: BTreeMap<String, Tensor>) -> Self {
        let all = tensors.into_iter().map(|(name, t)| (name, t.into()));
        all.collect::<BTreeMap<String, Matrix>>().into()
    }

    /// The same weights seen from `name` on.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self {
            all: self.all.clone(),
            prefix: format!("{}{name}.", self.prefix),
        }
    }

    /// A weight in the type that is computed with.
    ///
    /// # Errors
    /// Names the tensor when it is absent. Checkpoints are checked as a whole when they are opened, so
    /// this is met only by weights that were put together by hand. A matrix that is trained in bf16: a tensor of it would neither
    /// move nor get a gradient.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        match self.matrix(name)? {
            Matrix::Trained(_) => Err(Error::invalid(format!(
                "{}{name} is trained in bf16, and can only be multiplied by",
                self.prefix
            ))),
            matrix => Ok(matrix.to_tensor()?),
        }
    }

    /// A matrix, as it is kept.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub fn matrix(&self, name: &str) -> Result<Matrix> {
        let full = format!("{}{name}", self.prefix);
        let found = self.all.get(&full).cloned();
        found.ok_or_else(|| Error::invalid(format!("tensor {full} is missing")))
    }

    pub fn contains(&self, name: &str) -> bool {
        self.all.contains_key(&format!("{}{name}", self.prefix))
    }

    /// Full names and weights, in name order, whatever the prefix.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Matrix)> {
        self.all.iter().map(|(name, w)| (name.as_str(), w))
    }

    /// The map itself (cloned handles, shared storage).
    pub fn to_map(&self) -> BTreeMap<String, Matrix> {
        self.all.as_ref().clone()
    }

    /// A view of the same storage that records no gradient graph.
    pub fn detach(&self) -> Self {
        let all = self.all.iter().map(|(n, w)| (n.clone(), w.detach()));
        Self {
            all: Arc::new(all.collect()),
            prefix: self.prefix.clone(),
        }
    }

    /// Where and in what `place` says.
    pub fn to(&self, place: &Place) -> Result<Self> {
        let mut all = BTreeMap::new();
        for (name, w) in self.all.iter() {
            let moved = match (w, place.frozen) {
                // It shares its entries with what trains it.
                (Matrix::Trained(_), _) => w.clone(),
                (Matrix::Stored(_), Frozen::Stored) if place.device.is_cpu() => w.clone(),
                _ => {
                    let dtype = match w.shape().len() {
                        2 => place.compute,
                        _ => wide(place.compute),
                    };
                    let w = w.to_tensor()?.to_dtype(dtype)?;
                    w.to_device(&place.device)?.into()
                }
            };
            all.insert(name.clone(), moved);
        }
        Ok(Self {
            all: Arc::new(all),
            prefix: self.prefix.clone(),
        })
    }
}

/// How weights are kept that are not trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Frozen {
    /// As the file has them, read where they stand (on the CPU; other devices get them in the type that is computed with).
    #[default]
    Stored,
    /// Widened once: more memory, and no less time where many tokens go through at once.
    F32,
}

/// How matrices are kept that are trained. Norms, biases, convolutions, `A_log`, `dt_bias` and `D` stay in f32, and so do gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    F32,
    /// Rounded stochastically after every step, without a copy in f32.
    Bf16,
}

impl Precision {
    /// What products are computed in, teacher included: on a GPU the type of the matrices, on the CPU, which has no products in bf16,
    /// f32. Sums over layers, norms, recurrent states, losses and steps are in f32 in either ([`wide`]).
    pub fn compute(self, on_cpu: bool) -> DType {
        match (self, on_cpu) {
            (Self::Bf16, false) => DType::BF16,
            _ => DType::F32,
        }
    }
}

/// Where a model computes, and in which types: decided once, for a whole command.
#[derive(Debug, Clone)]
pub struct Place {
    pub device: Device,
    pub frozen: Frozen,
    /// Of what is trained.
    pub trained: Precision,
    /// Of activations between the products of a layer.
    pub compute: DType,
}

impl Place {
    pub fn new(device: Device, frozen: Frozen) -> Self {
        Self {
            device,
            frozen,
            trained: Precision::F32,
            compute: DType::F32,
        }
    }

    /// The same for a run that trains.
    pub fn training(&self, trained: Precision) -> Self {
        Self {
            trained,
            compute: trained.compute(self.device.is_cpu()),
            ..self.clone()
        }
    }

    pub fn cpu() -> Self {
        Self::new(Device::Cpu, Frozen::Stored)
    }

    /// The same on the CPU: what decodes elsewhere takes its weights from there.
    pub fn host(&self) -> Self {
        Self {
            device: Device::Cpu,
            ..self.clone()
        }
    }
}
