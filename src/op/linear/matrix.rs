//! A weight matrix, however it is kept.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::gradient::WeightGradient;
use super::observer::Observer;
use super::stored::Stored;
use super::trained::Trained;
use crate::op::cpu::entries;

/// `[N, K]`, the weight of `y = x Wᵀ`. Models and mixers know no more of how it is kept.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// Trained, or about to be: a tensor in the type that is computed with.
    Dense(Tensor),
    /// As a file has it, read where it stands; computed with in f32 on the CPU, never trained.
    Stored(Stored),
    /// In bf16, trained where it stands.
    Trained(Trained),
}

impl From<Tensor> for Matrix {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl Matrix {
    /// `[N, K]`
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(w) => w.dims2(),
            Self::Stored(w) => Ok((w.rows(), w.width())),
            Self::Trained(w) => Ok(w.dims()),
        }
    }

    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::Dense(w) => w.dims().to_vec(),
            Self::Stored(w) => vec![w.rows(), w.width()],
            Self::Trained(w) => vec![w.dims().0, w.dims().1],
        }
    }

    /// Rows `from .. from + count`.
    pub fn rows(&self, from: usize, count: usize) -> Result<Self> {
        Ok(match self {
            Self::Dense(w) => Self::Dense(w.narrow(0, from, count)?),
            Self::Stored(w) => Self::Stored(w.slice(from, count)?),
            Self::Trained(w) => Self::Trained(w.slice(from, count)?),
        })
    }

    /// Rows `ids` (u32, any of them any number of times), in the type that is computed with: `[ids, K]`. Of a matrix that is not dense
    /// they are no part of candle's graph.
    pub fn gather(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => w.index_select(ids, 0),
            Self::Stored(w) => w.gather(&ids.to_vec1::<u32>()?),
            Self::Trained(w) => w.narrow()?.index_select(ids, 0)?.to_dtype(w.compute()),
        }
    }

    /// The whole of it in the type that is computed with.
    pub fn to_tensor(&self) -> Result<Tensor> {
        match self {
            Self::Dense(w) => Ok(w.clone()),
            Self::Stored(w) => w.to_tensor(),
            Self::Trained(w) => w.narrow()?.to_dtype(w.compute()),
        }
    }

    /// To be read where it stands: the matrix itself, or the entries in f32.
    pub fn stored(&self) -> Result<Stored> {
        match self {
            Self::Stored(stored) => Ok(stored.clone()),
            Self::Dense(_) | Self::Trained(_) => {
                let (rows, width) = self.dims()?;
                Ok(Stored::of_entries(&self.to_host()?, rows, width))
            }
        }
    }

    /// The entries, row after row.
    pub fn to_host(&self) -> Result<Vec<f32>> {
        entries(&self.to_tensor()?)
    }

    /// The same matrix, and what sees the inputs of its products (and of those of its rows).
    pub fn observed(&self) -> Result<(Self, Arc<Observer>)> {
        let stored = self.stored()?;
        let observer = Arc::new(Observer::new(stored.width()));
        Ok((Self::Stored(stored.observed_by(observer.clone())), observer))
    }

    /// The same, without a gradient graph.
    pub fn detach(&self) -> Self {
        match self {
            Self::Dense(w) => Self::Dense(w.detach()),
            Self::Stored(_) => self.clone(),
            Self::Trained(w) => Self::Trained(w.detach()),
        }
    }

    /// The gradient of a matrix like this, zero.
    pub fn gradient(&self) -> Result<WeightGradient> {
        WeightGradient::zeros(self.dims()?, self.dtype(), self.device())
    }

    /// What activations are computed in.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(w) => w.dtype(),
            Self::Stored(_) => DType::F32,
            Self::Trained(w) => w.compute(),
        }
    }

    pub fn device(&self) -> &Device {
        match self {
            Self::Dense(w) => w.device(),
            Self::Stored(_) => &Device::Cpu,
            Self::Trained(w) => w.entries().device(),
        }
    }
}
