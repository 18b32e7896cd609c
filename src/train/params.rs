//! Trained tensors with their gradients and moments.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::op::adamw::{AdamW, adamw_step, sum_of_squares};
use crate::op::muon::{Muon, muon_step};
use crate::weights::{Place, Weights};
use crate::{Error, Result};

/// The rules of one step.
#[derive(Debug, Clone, Copy)]
pub struct Optimizer {
    pub adamw: AdamW,
    /// For weight matrices, where it is given; all else follows AdamW.
    pub muon: Option<Muon>,
}

impl Optimizer {
    /// Of the weight matrices.
    pub fn lr(&self) -> f64 {
        self.muon.map_or(self.adamw.lr, |muon| muon.lr)
    }
}

struct Param {
    var: Var,
    /// First and second moments, `[2, ..]`; Muon uses the first for its momentum.
    moments: Tensor,
    grad: Option<Tensor>,
    /// Updates so far: AdamW's bias correction counts a parameter's own.
    steps: u64,
    /// Of the matrices in it ([`MixerConfig::stacked`](crate::mixer::MixerConfig::stacked)).
    rows: Vec<usize>,
}

/// A weight that maps activations to activations: Muon's. Embedding and head map tokens.
fn is_matrix(name: &str, var: &Var) -> bool {
    var.rank() == 2 && name.starts_with("model.layers.")
}

/// `value`, unless it is not finite.
fn finite(value: f64, what: &str, name: &str) -> Result<f64> {
    match value.is_finite() {
        true => Ok(value),
        false => Err(Error::invalid(format!("{what} {name} is not finite"))),
    }
}

/// Parameters that are clipped together.
pub struct ParamGroup {
    params: BTreeMap<String, Param>,
}

impl ParamGroup {
    /// Makes variables (f32) of the weights that `trained` picks and returns, with the group, all weights as a model in
    /// `place` should see them; what is not trained stays as it is kept. `stacked`: the rows of the matrices in a tensor that holds several.
    pub fn new(
        weights: &Weights,
        trained: impl Fn(&str) -> bool,
        stacked: &BTreeMap<String, Vec<usize>>,
        place: &Place,
    ) -> Result<(Self, Weights)> {
        let mut params = BTreeMap::new();
        let (picked, frozen): (BTreeMap<_, _>, BTreeMap<_, _>) = weights
            .to_map()
            .into_iter()
            .partition(|(name, _)| trained(name));
        let mut seen = Weights::from(frozen).to(place)?.to_map();
        for (name, weight) in &picked {
            // A copy: the source (the teacher) must stay as it is.
            let tensor = weight.to_tensor()?.to_dtype(DType::F32)?.copy()?;
            let var = Var::from_tensor(&tensor.to_device(&place.device)?)?;
            let mut shape = tensor.dims().to_vec();
            shape.insert(0, 2);
            seen.insert(name.clone(), var.as_tensor().clone().into());
            params.insert(
                name.clone(),
                Param {
                    moments: Tensor::zeros(shape, DType::F32, &place.device)?,
                    var,
                    grad: None,
                    steps: 0,
                    rows: stacked.get(name).cloned().unwrap_or_default(),
                },
            );
        }
        Ok((Self { params }, seen.into()))
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

    /// The norm of all gradients.
    ///
    /// # Errors
    /// Names the tensor whose gradient is not finite.
    pub fn grad_norm(&self) -> Result<f64> {
        let mut squares = 0.0;
        for (name, param) in &self.params {
            if let Some(grad) = &param.grad {
                let square = finite(sum_of_squares(grad)?, "the gradient of", name)?;
                squares += square;
            }
        }
        Ok(squares.sqrt())
    }

    /// # Errors
    /// Names the tensor that holds a value which is not finite.
    pub fn check_finite(&self) -> Result<()> {
        for (name, param) in &self.params {
            finite(sum_of_squares(param.var.as_tensor())?, "the trained", name)?;
        }
        Ok(())
    }

    /// Clips gradients of norm `norm` ([`ParamGroup::grad_norm`]), steps and forgets them. Parameters without a
    /// gradient stay as they are.
    pub fn update(&mut self, norm: f64, clip: f64, optimizer: &Optimizer) -> Result<()> {
        let scale = if clip > 0.0 && norm > clip {
            clip / norm
        } else {
            1.0
        };
        for (name, param) in &mut self.params {
            let Some(grad) = param.grad.take() else {
                continue;
            };
            param.steps += 1;
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
                    adamw_step(value, &grad, moments, scale, param.steps, &optimizer.adamw)?;
                }
            }
        }
        Ok(())
    }

    /// The values, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.params
            .iter()
            .map(|(name, p)| (name.as_str(), p.var.as_tensor()))
    }

    /// Values, moments and counts of updates under `prefix`, to be saved.
    pub(super) fn save(&self, prefix: &str, into: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, param) in &self.params {
            into.insert(
                format!("{prefix}.param.{name}"),
                param.var.as_tensor().copy()?,
            );
            into.insert(format!("{prefix}.moments.{name}"), param.moments.copy()?);
        }
        let steps: Vec<i64> = self.params.values().map(|p| p.steps as i64).collect();
        let steps = Tensor::from_vec(steps, self.params.len(), &Device::Cpu)?;
        into.insert(format!("{prefix}.steps"), steps);
        Ok(())
    }

    /// What [`ParamGroup::save`] saved, checked to be of these parameters.
    ///
    /// # Errors
    /// Names the tensor that the save lacks or that has another shape.
    pub(super) fn saved(&self, prefix: &str, from: &BTreeMap<String, Tensor>) -> Result<Saved> {
        let find = |name: String, shape: &[usize]| {
            let found = from.get(&name);
            let found = found.ok_or_else(|| Error::invalid(format!("it lacks {name}")))?;
            match found.dims() == shape {
                true => Ok(found.clone()),
                false => Err(Error::invalid(format!(
                    "{name} has the shape {:?} instead of {shape:?}",
                    found.dims()
                ))),
            }
        };
        let mut saved = Saved {
            steps: find(format!("{prefix}.steps"), &[self.params.len()])?.to_vec1()?,
            tensors: Vec::new(),
        };
        for (name, param) in &self.params {
            let value = find(format!("{prefix}.param.{name}"), param.var.dims())?;
            let moments = find(format!("{prefix}.moments.{name}"), param.moments.dims())?;
            saved.tensors.push((value, moments));
        }
        Ok(saved)
    }

    /// Goes back to what was saved.
    pub(super) fn restore(&mut self, saved: &Saved) -> Result<()> {
        let saved = saved.tensors.iter().zip(&saved.steps);
        for (param, ((value, moments), steps)) in self.params.values_mut().zip(saved) {
            let device = param.var.device().clone();
            param.var.set(&value.to_device(&device)?)?;
            param.moments = moments.to_device(&device)?.copy()?;
            param.steps = *steps as u64;
        }
        Ok(())
    }
}

/// A group's parameters as a save has them, in the order of their names.
pub(super) struct Saved {
    steps: Vec<i64>,
    /// Values and moments.
    tensors: Vec<(Tensor, Tensor)>,
}
