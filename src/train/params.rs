//! Trained tensors with their gradients and moments.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};

use crate::op::adamw::{AdamW, adamw_step, sum_of_squares};
use crate::op::muon::{Muon, muon_step};
use crate::weights::Weights;
use crate::{Error, Result};

/// The rules of one step.
#[derive(Debug, Clone, Copy)]
pub struct Optimizer {
    pub adamw: AdamW,
    /// For weight matrices, where it is given; all else follows AdamW.
    pub muon: Option<Muon>,
}

struct Param {
    var: Var,
    /// First and second moments, `[2, ..]`; Muon uses the first for its momentum.
    moments: Tensor,
    grad: Option<Tensor>,
    /// Of the matrices in it ([`MixerConfig::stacked`](crate::mixer::MixerConfig::stacked)).
    rows: Vec<usize>,
}

/// A weight that maps activations to activations: Muon's. Embedding and head map tokens.
fn is_matrix(name: &str, var: &Var) -> bool {
    var.rank() == 2 && name.starts_with("model.layers.")
}

/// Parameters that are clipped together.
pub struct ParamGroup {
    params: BTreeMap<String, Param>,
}

impl ParamGroup {
    /// Makes variables (f32) of the tensors that `trained` picks and returns, with the group, all weights
    /// as a model should see them. `stacked`: the rows of the matrices in a tensor that holds several.
    pub fn new(
        weights: &Weights,
        trained: impl Fn(&str) -> bool,
        stacked: &BTreeMap<String, Vec<usize>>,
    ) -> Result<(Self, Weights)> {
        let mut params = BTreeMap::new();
        let mut seen = weights.to_map();
        for (name, tensor) in weights.iter().filter(|(name, _)| trained(name)) {
            // A copy: the source (the teacher) must stay as it is.
            let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?.copy()?)?;
            let mut shape = tensor.dims().to_vec();
            shape.insert(0, 2);
            seen.insert(name.to_owned(), var.as_tensor().clone());
            params.insert(
                name.to_owned(),
                Param {
                    moments: Tensor::zeros(shape, DType::F32, tensor.device())?,
                    var,
                    grad: None,
                    rows: stacked.get(name).cloned().unwrap_or_default(),
                },
            );
        }
        Ok((Self { params }, Weights::new(seen)))
    }

    /// Adds the group's gradients of one backward pass.
    pub fn add(&mut self, grads: &GradStore) -> Result<()> {
        for param in self.params.values_mut() {
            if let Some(grad) = grads.get(param.var.as_tensor()) {
                param.grad = Some(match param.grad.take() {
                    Some(sum) => (sum + grad)?,
                    None => grad.clone(),
                });
            }
        }
        Ok(())
    }

    /// Clips, steps and forgets the gradients; returns their norm before clipping. Parameters without a
    /// gradient stay as they are.
    pub fn update(&mut self, clip: f64, step: u64, optimizer: &Optimizer) -> Result<f64> {
        let mut squares = 0.0;
        for grad in self.params.values().filter_map(|p| p.grad.as_ref()) {
            squares += sum_of_squares(grad)?;
        }
        let norm = squares.sqrt();
        let scale = if clip > 0.0 && norm > clip {
            clip / norm
        } else {
            1.0
        };
        for (name, param) in &mut self.params {
            let Some(grad) = param.grad.take() else {
                continue;
            };
            match optimizer.muon.filter(|_| is_matrix(name, &param.var)) {
                Some(hyper) => {
                    let momentum = param.moments.get(0)?;
                    let before = param.var.as_tensor();
                    let (value, momentum) =
                        muon_step(before, &grad, &momentum, &param.rows, scale, &hyper)?;
                    param.var.set(&value)?;
                    param.moments = Tensor::stack(&[&momentum, &momentum.zeros_like()?], 0)?;
                }
                None => {
                    let (value, moments) = (param.var.as_tensor(), &param.moments);
                    adamw_step(value, &grad, moments, scale, step, &optimizer.adamw)?;
                }
            }
        }
        Ok(norm)
    }

    /// The values, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.params
            .iter()
            .map(|(name, p)| (name.as_str(), p.var.as_tensor()))
    }

    /// Values and moments under `prefix`, to be saved.
    pub(super) fn save(&self, prefix: &str, into: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, param) in &self.params {
            into.insert(
                format!("{prefix}.param.{name}"),
                param.var.as_tensor().copy()?,
            );
            into.insert(format!("{prefix}.moments.{name}"), param.moments.copy()?);
        }
        Ok(())
    }

    /// # Errors
    /// Names the tensor that the save lacks.
    pub(super) fn restore(&mut self, prefix: &str, from: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, param) in &mut self.params {
            let find = |kind: &str| {
                let name = format!("{prefix}.{kind}.{name}");
                from.get(&name)
                    .ok_or_else(|| Error::invalid(format!("the saved run lacks {name}")))
            };
            param
                .var
                .set(&find("param")?.to_device(param.var.device())?)?;
            param.moments = find("moments")?.to_device(param.var.device())?.copy()?;
        }
        Ok(())
    }
}
