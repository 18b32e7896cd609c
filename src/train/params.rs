//! Trained tensors with their gradients, and what the optimizer remembers of them.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use super::clip::{Clip, Norms};
use super::optimizer::{Optimizer, Role, Roles, SavedTensors, State};
use crate::op::adamw::sum_of_squares;
use crate::weights::{Place, Weights};
use crate::{Error, Result};

struct Param {
    var: Var,
    role: Role,
    state: State,
    grad: Option<Tensor>,
    /// Updates so far: AdamW's bias correction counts a parameter's own.
    steps: u64,
}

/// `value`, unless it is not finite.
fn finite(value: f64, what: &str, name: &str) -> Result<f64> {
    match value.is_finite() {
        true => Ok(value),
        false => Err(Error::Diverged(format!("{what} {name} is not finite"))),
    }
}

/// How gradients become a step.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    pub clip: Clip,
    pub rules: Optimizer,
}

/// Parameters that are clipped together, if they are not clipped by layer.
pub struct ParamGroup {
    params: BTreeMap<String, Param>,
}

impl ParamGroup {
    /// Makes variables (f32) of the weights that `trained` picks and returns, with the group, all weights as a model in
    /// `place` should see them; what is not trained stays as it is kept.
    pub fn new(
        weights: &Weights,
        trained: impl Fn(&str) -> bool,
        roles: &Roles,
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
                    role: roles.of(name, var.dims()),
                    state: State::None,
                    var,
                    grad: None,
                    steps: 0,
                },
            );
        }
        Ok((Self { params }, seen.into()))
    }

    pub fn is_trained(&self, name: &str) -> bool {
        self.params.contains_key(name)
    }

    /// Whether mixers that replaced attention are among them.
    pub(super) fn has_mixers(&self) -> bool {
        self.params.values().any(|param| param.role.in_mixer())
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

    /// The norms of the gradients.
    ///
    /// # Errors
    /// Names the tensor whose gradient is not finite.
    pub fn norms(&self) -> Result<Norms> {
        let mut norms = Norms::default();
        for (name, param) in &self.params {
            if let Some(grad) = &param.grad {
                let square = finite(sum_of_squares(grad)?, "the gradient of", name)?;
                norms.count(name, square);
            }
        }
        Ok(norms)
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

    /// Clips gradients of these norms ([`ParamGroup::norms`]), steps and forgets them. Parameters without a gradient stay as they
    /// are.
    pub fn update(&mut self, norms: &Norms, update: &Update) -> Result<()> {
        for (name, param) in &mut self.params {
            let Some(grad) = param.grad.take() else {
                continue;
            };
            let scale = norms.scale(update.clip, name);
            param.steps += 1;
            let Param {
                var,
                role,
                state,
                steps,
                ..
            } = param;
            state.step(var, role, &grad, scale, *steps, &update.rules)?;
        }
        Ok(())
    }

    /// The values, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.params
            .iter()
            .map(|(name, p)| (name.as_str(), p.var.as_tensor()))
    }

    /// Values, states and counts of updates under `prefix`, to be saved before anything goes on: they share the group's memory.
    pub(super) fn save(&self, prefix: &str, into: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, param) in &self.params {
            let value = param.var.as_tensor().detach();
            into.insert(format!("{prefix}.param.{name}"), value);
            for (kind, tensor) in param.state.tensors()? {
                into.insert(format!("{prefix}.{kind}.{name}"), tensor);
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
        let steps = format!("{prefix}.steps");
        let found = from.get(&steps).filter(|s| s.dims() == [self.params.len()]);
        let steps = found.ok_or_else(|| Error::invalid(format!("it lacks {steps}")))?;
        let mut saved = Saved {
            steps: steps.to_vec1()?,
            tensors: Vec::new(),
        };
        for ((name, param), steps) in self.params.iter().zip(&saved.steps) {
            let of_param = SavedTensors {
                prefix,
                param: name,
                all: from,
            };
            let value = of_param.find("param", param.var.dims())?;
            let state = State::read(&of_param, param.var.dims())?;
            match (value, &state) {
                (None, _) => return Err(of_param.lacks("param")),
                (Some(_), State::None) if *steps > 0 => return Err(of_param.lacks("moments")),
                (Some(value), _) => saved.tensors.push((value, state)),
            }
        }
        Ok(saved)
    }

    /// Goes back to what was saved.
    pub(super) fn restore(&mut self, saved: Saved) -> Result<()> {
        let saved = saved.tensors.into_iter().zip(saved.steps);
        for (param, ((value, state), steps)) in self.params.values_mut().zip(saved) {
            let device = param.var.device().clone();
            param.var.set(&value.to_device(&device)?)?;
            param.state = state.onto(&device)?;
            param.steps = steps as u64;
        }
        Ok(())
    }
}

/// A group's parameters as a save has them, in the order of their names.
pub(super) struct Saved {
    steps: Vec<i64>,
    tensors: Vec<(Tensor, State)>,
}
