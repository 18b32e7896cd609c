//! Trained tensors with their gradients, and what the optimizer remembers of them.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use super::clip::{Clip, Norms};
use super::optimizer::{Optimizer, Role, Roles, SavedTensors, State, overwrite};
use crate::hash::Hash;
use crate::model::Group;
use crate::op::Documents;
use crate::op::adamw::sum_of_squares;
use crate::op::linear::{Matrix, Trained, WeightGradient};
use crate::weights::{Place, Precision, Weights};
use crate::{Error, Result};

struct Param {
    value: Value,
    role: Role,
    state: State,
    /// In f32.
    grad: Option<Tensor>,
    /// Updates so far: AdamW's bias correction counts a parameter's own.
    steps: u64,
}

/// What is trained, as it is kept: models share its storage.
enum Value {
    /// f32
    Full(Var),
    Rounded(Trained),
}

impl Value {
    /// A copy: the source (the teacher) must stay as it is.
    fn new(weight: &Matrix, role: &Role, place: &Place) -> Result<Self> {
        let tensor = weight.to_tensor()?.to_dtype(DType::F32)?;
        match place.trained {
            Precision::Bf16 if role.may_be_rounded() => {
                let tensor = tensor.to_device(&place.device)?;
                Ok(Self::Rounded(Trained::new(&tensor, place.compute)?))
            }
            _ => {
                let tensor = tensor.copy()?.to_device(&place.device)?;
                Ok(Self::Full(Var::from_tensor(&tensor)?))
            }
        }
    }

    fn tensor(&self) -> &Tensor {
        match self {
            Self::Full(var) => var.as_tensor(),
            Self::Rounded(matrix) => matrix.entries(),
        }
    }

    /// As a model that learns sees it.
    fn weight(&self) -> Matrix {
        match self {
            Self::Full(var) => var.as_tensor().clone().into(),
            Self::Rounded(matrix) => Matrix::Trained(matrix.clone()),
        }
    }

    /// Of a backward pass, if it went through here.
    fn gradient(&self, grads: &GradStore) -> Result<Option<Tensor>> {
        match self {
            Self::Full(var) => Ok(grads.get(var.as_tensor()).cloned()),
            Self::Rounded(matrix) => Ok(matrix.take_gradient()?),
        }
    }

    /// Changes it by `step`, in f32; what is rounded draws by `key`.
    fn change(&self, key: u64, step: impl FnOnce(&Tensor) -> Result<()>) -> Result<()> {
        match self {
            Self::Full(var) => step(var.as_tensor()),
            Self::Rounded(matrix) => {
                let value = matrix.entries().to_dtype(DType::F32)?;
                step(&value)?;
                Ok(matrix.round(&value, key)?)
            }
        }
    }
}

impl Param {
    fn add(&mut self, grad: Tensor) -> Result<()> {
        self.grad = Some(match self.grad.take() {
            Some(sum) => (sum + grad)?,
            None => grad,
        });
        Ok(())
    }
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
    /// Learning rates are shares of the size of a group's matrices.
    pub scale_parameter: bool,
    /// Of what is drawn to round weights.
    pub seed: u64,
}

impl Update {
    /// Of the draws of a parameter's `steps`-th update: the same whatever else is trained, and after a resume.
    fn key(&self, name: &str, steps: u64) -> u64 {
        let key = Hash::of(&self.seed.to_le_bytes());
        key.with(&steps.to_le_bytes()).with(name.as_bytes()).bits()
    }
}

/// Parameters that are clipped together, if they are not clipped by layer.
pub struct ParamGroup {
    params: BTreeMap<String, Param>,
    /// Of the layers' matrices among them, before the first step: the median of their root mean squares; 1 where there are none.
    size: f64,
}

/// The median of the root mean squares of the layers' matrices.
fn size(params: &BTreeMap<String, Param>) -> Result<f64> {
    let matrices = params.values().filter(|param| param.role.is_matrix());
    let mut sizes = matrices
        .map(|param| {
            let value = param.value.tensor();
            Ok((sum_of_squares(value)? / value.elem_count() as f64).sqrt())
        })
        .collect::<Result<Vec<f64>>>()?;
    sizes.sort_by(f64::total_cmp);
    Ok(sizes.get(sizes.len() / 2).copied().unwrap_or(1.0))
}

/// Whether so many entries may have gradients for each of several parts of a batch.
pub(super) fn may_part(entries: usize) -> bool {
    entries <= 1 << 24
}

impl ParamGroup {
    /// Takes the weights that `trained` picks, as `place` says, and returns, with the group, all weights as a model there should
    /// see them; what is not trained stays as it is kept.
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
            let role = roles.of(name, &weight.shape());
            let value = Value::new(weight, &role, place)?;
            seen.insert(name.clone(), value.weight());
            params.insert(
                name.clone(),
                Param {
                    value,
                    role,
                    state: State::None,
                    grad: None,
                    steps: 0,
                },
            );
        }
        let size = size(&params)?;
        Ok((Self { params, size }, seen.into()))
    }

    /// Groups of a batch `x [B, T, ..]` that may go back beside each other, each with gradients of its own: where these are no burden. What is
    /// rounded sums its gradient up in the order in which it comes, so that its batch stays whole.
    pub(super) fn groups(&self, x: &Tensor, documents: &Documents) -> Result<Vec<Group>> {
        let values = || self.params.values().map(|param| &param.value);
        let entries = values().map(|value| value.tensor().elem_count()).sum();
        match may_part(entries) && values().all(|value| matches!(value, Value::Full(_))) {
            true => Group::of(x, Some(documents)),
            false => Ok(vec![Group::whole(x.dim(0)?, Some(documents))]),
        }
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

    /// A gradient of it to be summed up, zero.
    ///
    /// # Errors
    /// A name that is not trained.
    pub fn gradient(&mut self, name: &str) -> Result<WeightGradient> {
        Ok(self.param(name)?.value.weight().gradient()?)
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
        self.param(name)?.add(grad)
    }

    /// Adds the group's gradients of one backward pass.
    pub fn add(&mut self, grads: &GradStore) -> Result<()> {
        for param in self.params.values_mut() {
            if let Some(grad) = param.value.gradient(grads)? {
                param.add(grad)?;
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
    pub(super) fn forget(&mut self) -> Result<()> {
        for param in self.params.values_mut() {
            param.grad = None;
            // Of a pass that has not come to its end.
            if let Value::Rounded(matrix) = &param.value {
                matrix.take_gradient()?;
            }
        }
        Ok(())
    }

    /// # Errors
    /// Names the tensor that holds a value which is not finite.
    pub fn check_finite(&self) -> Result<()> {
        for (name, param) in &self.params {
            finite(sum_of_squares(param.value.tensor())?, "the trained", name)?;
        }
        Ok(())
    }

    /// Clips gradients of these norms ([`ParamGroup::norms`]), steps and forgets them. Parameters without a gradient stay as they
    /// are.
    pub fn update(&mut self, norms: &Norms, update: &Update) -> Result<()> {
        let rules = match update.scale_parameter {
            true => update.rules.slowed(self.size),
            false => update.rules,
        };
        for (name, param) in &mut self.params {
            let Some(grad) = param.grad.take() else {
                continue;
            };
            let scale = norms.scale(update.clip, name);
            param.steps += 1;
            let Param {
                value,
                role,
                state,
                steps,
                ..
            } = param;
            value.change(update.key(name, *steps), |value| {
                state.step(value, role, &grad, scale, *steps, &rules)
            })?;
        }
        Ok(())
    }

    /// The values, by name, as they are kept.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.params
            .iter()
            .map(|(name, p)| (name.as_str(), p.value.tensor()))
    }

    /// Values, states and counts of updates under `prefix`, to be saved before anything goes on: they share the group's memory.
    pub(super) fn save(&self, prefix: &str, into: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, param) in &self.params {
            let value = param.value.tensor().detach();
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
            let value = of_param.find("param", param.value.tensor().dims())?;
            let state = State::read(&of_param, param.value.tensor().dims())?;
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
            let device = param.value.tensor().device().clone();
            overwrite(param.value.tensor(), &value.to_device(&device)?)?;
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
