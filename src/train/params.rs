//! Trained tensors with their gradients and moments.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::op::adamw::{self, AdamW, adamw_8bit, adamw_step, sum_of_squares};
use crate::op::muon::{Muon, muon_step};
use crate::weights::{Place, Weights};
use crate::{Error, Result};

/// The rules of one step.
#[derive(Debug, Clone, Copy)]
pub struct Optimizer {
    pub adamw: AdamW,
    /// AdamW's moments of large tensors in 8 bits.
    pub eight_bit: bool,
    /// For weight matrices, where it is given; all else follows AdamW.
    pub muon: Option<Muon>,
}

impl Optimizer {
    /// Of the weight matrices.
    pub fn lr(&self) -> f64 {
        self.muon.map_or(self.adamw.lr, |muon| muon.lr)
    }

    /// With all learning rates times `factor`.
    pub fn slowed(mut self, factor: f64) -> Self {
        self.adamw.lr *= factor;
        if let Some(muon) = &mut self.muon {
            muon.lr *= factor;
        }
        self
    }
}

/// Whether moments of a tensor of so many entries are kept in 8 bits, where the optimizer has such.
pub(super) fn in_eight_bits(entries: usize) -> bool {
    entries >= SMALL
}

struct Param {
    var: Var,
    moments: Moments,
    grad: Option<Tensor>,
    /// Updates so far: AdamW's bias correction counts a parameter's own.
    steps: u64,
    /// Of the matrices in it ([`MixerConfig::stacked`](crate::mixer::MixerConfig::stacked)).
    rows: Vec<usize>,
}

/// What an optimizer remembers of a parameter's gradients.
enum Moments {
    /// No step yet.
    None,
    /// First and second, `[2, ..]`; Muon uses the first for its momentum.
    Full(Tensor),
    EightBit(adamw::Moments),
}

impl Moments {
    /// Those in full, zeros before the first step.
    fn full(&mut self, of: &Tensor) -> Result<&mut Tensor> {
        if !matches!(self, Self::Full(_)) {
            let shape: Vec<usize> = [2].into_iter().chain(of.dims().iter().copied()).collect();
            *self = Self::Full(Tensor::zeros(shape, DType::F32, of.device())?);
        }
        match self {
            Self::Full(moments) => Ok(moments),
            _ => unreachable!("just made"),
        }
    }

    fn eight_bit(&mut self, of: &Tensor) -> &mut adamw::Moments {
        if !matches!(self, Self::EightBit(_)) {
            *self = Self::EightBit(adamw::Moments::zeros(of.elem_count()));
        }
        match self {
            Self::EightBit(moments) => moments,
            _ => unreachable!("just made"),
        }
    }
}

/// Entries below which a tensor's moments stay in full under 8 bits (bitsandbytes' `min_8bit_size`).
const SMALL: usize = 4096;

/// A weight that maps activations to activations: Muon's. Embedding and head map tokens.
fn is_matrix(name: &str, var: &Var) -> bool {
    var.rank() == 2 && name.starts_with("model.layers.")
}

/// `value`, unless it is not finite.
fn finite(value: f64, what: &str, name: &str) -> Result<f64> {
    match value.is_finite() {
        true => Ok(value),
        false => Err(Error::Diverged(format!("{what} {name} is not finite"))),
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
            seen.insert(name.clone(), var.as_tensor().clone().into());
            params.insert(
                name.clone(),
                Param {
                    moments: Moments::None,
                    var,
                    grad: None,
                    steps: 0,
                    rows: stacked.get(name).cloned().unwrap_or_default(),
                },
            );
        }
        Ok((Self { params }, seen.into()))
    }

    pub fn is_trained(&self, name: &str) -> bool {
        self.params.contains_key(name)
    }

    fn param(&mut self, name: &str) -> Result<&mut Param> {
        let found = self.params.get_mut(name);
        found.ok_or_else(|| Error::invalid(format!("{name} is not trained")))
    }

    /// # Errors
    /// A name that is not trained.
    pub fn value(&mut self, name: &str) -> Result<&Tensor> {
        Ok(self.param(name)?.var.as_tensor())
    }

    #[cfg(test)]
    pub fn grads(&self) -> BTreeMap<String, Tensor> {
        let grads = self.params.iter();
        let grads = grads.filter_map(|(name, p)| Some((name.clone(), p.grad.clone()?)));
        grads.collect()
    }

    /// Adds a gradient.
    ///
    /// # Errors
    /// A name that is not trained.
    pub fn add_to(&mut self, name: &str, grad: Tensor) -> Result<()> {
        let param = self.param(name)?;
        param.grad = Some(match param.grad.take() {
            Some(sum) => (sum + grad)?,
            None => grad,
        });
        Ok(())
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

    /// The weight with the largest gradient, and its norm.
    pub(super) fn steepest(&self) -> Result<Option<(String, f64)>> {
        let mut steepest: Option<(&String, f64)> = None;
        for (name, param) in &self.params {
            let Some(grad) = &param.grad else { continue };
            let square = sum_of_squares(grad)?;
            if steepest.is_none_or(|(_, most)| square > most) {
                steepest = Some((name, square));
            }
        }
        Ok(steepest.map(|(name, square)| (name.clone(), square.sqrt())))
    }

    /// Drops the gradients.
    pub(super) fn forget(&mut self) {
        self.params.values_mut().for_each(|param| param.grad = None);
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
                    let before = param.var.as_tensor();
                    let moments = param.moments.full(before)?;
                    let momentum = moments.get(0)?;
                    let (value, momentum) =
                        muon_step(before, &grad, &momentum, &param.rows, scale, &hyper)?;
                    *moments = Tensor::stack(&[&momentum, &momentum.zeros_like()?], 0)?;
                    param.var.set(&value)?;
                }
                None => {
                    let (value, steps, rules) =
                        (param.var.as_tensor(), param.steps, &optimizer.adamw);
                    match optimizer.eight_bit && in_eight_bits(value.elem_count()) {
                        true => {
                            let moments = param.moments.eight_bit(value);
                            adamw_8bit(value, &grad, moments, scale, steps, rules)?;
                        }
                        false => {
                            let moments = param.moments.full(value)?;
                            adamw_step(value, &grad, moments, scale, steps, rules)?;
                        }
                    }
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

    /// Values, moments and counts of updates under `prefix`, to be saved before anything goes on: they share the group's memory.
    pub(super) fn save(&self, prefix: &str, into: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, param) in &self.params {
            let value = param.var.as_tensor().detach();
            into.insert(format!("{prefix}.param.{name}"), value);
            match &param.moments {
                Moments::None => {}
                Moments::Full(moments) => {
                    into.insert(format!("{prefix}.moments.{name}"), moments.clone());
                }
                Moments::EightBit(adamw::Moments { codes, scales }) => {
                    let codes = Tensor::from_slice(codes, codes.len(), &Device::Cpu)?;
                    let scales = Tensor::from_slice(scales, scales.len(), &Device::Cpu)?;
                    into.insert(format!("{prefix}.codes.{name}"), codes);
                    into.insert(format!("{prefix}.scales.{name}"), scales);
                }
            }
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
        for ((name, param), steps) in self.params.iter().zip(&saved.steps) {
            let value = find(format!("{prefix}.param.{name}"), param.var.dims())?;
            let entries = param.var.elem_count();
            let codes = format!("{prefix}.codes.{name}");
            let moments = if from.contains_key(&codes) {
                let scales = 2 * entries.div_ceil(adamw::BLOCK);
                let scales = find(format!("{prefix}.scales.{name}"), &[scales])?;
                Moments::EightBit(adamw::Moments {
                    codes: find(codes, &[2 * entries])?.to_vec1()?,
                    scales: scales.to_vec1()?,
                })
            } else if *steps > 0 {
                let shape = [2].into_iter().chain(param.var.dims().iter().copied());
                let shape: Vec<usize> = shape.collect();
                Moments::Full(find(format!("{prefix}.moments.{name}"), &shape)?)
            } else {
                Moments::None
            };
            saved.tensors.push((value, moments));
        }
        Ok(saved)
    }

    /// Goes back to what was saved.
    pub(super) fn restore(&mut self, saved: Saved) -> Result<()> {
        let saved = saved.tensors.into_iter().zip(saved.steps);
        for (param, ((value, moments), steps)) in self.params.values_mut().zip(saved) {
            let device = param.var.device().clone();
            param.var.set(&value.to_device(&device)?)?;
            param.moments = match moments {
                Moments::Full(moments) => Moments::Full(moments.to_device(&device)?),
                other => other,
            };
            param.steps = steps as u64;
        }
        Ok(())
    }
}

/// A group's parameters as a save has them, in the order of their names.
pub(super) struct Saved {
    steps: Vec<i64>,
    tensors: Vec<(Tensor, Moments)>,
}
