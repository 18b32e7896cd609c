//! What a step follows. An optimizer is a file here, its names ([`OptimizerName`], [`OptimizerConfig`]), its rules of a step
//! ([`Matrices`]) and what it remembers of a parameter ([`State`]); a fused kernel, where it has one, stands in `op/`.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::model::ModelConfig;
use crate::op::adamw::AdamW;
use crate::{Error, Result};

mod adamw;
mod galore;
mod muon;
#[cfg(test)]
mod tests;

pub use galore::GaloreConfig;
pub use muon::Muon;

use adamw::Moments;
use galore::Projected;

/// What a step follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerName {
    #[default]
    Adamw,
    /// AdamW whose moments take a byte each (blockwise dynamic quantisation, arXiv 2110.02861).
    #[value(name = "adamw_8bit")]
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// Muon for the layers' matrices, AdamW for all else.
    Muon,
    /// AdamW of the layers' matrices in a subspace of their gradients (arXiv 2403.03507), AdamW for all else.
    Galore,
    /// The same with moments of a byte each.
    #[value(name = "galore_8bit")]
    #[serde(rename = "galore_8bit")]
    Galore8bit,
}

/// The same with its settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "name", rename_all = "snake_case")]
pub enum OptimizerConfig {
    Adamw,
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// The peak learning rate of what Muon leaves to AdamW.
    Muon {
        adamw_lr: f64,
    },
    Galore(GaloreConfig),
    #[serde(rename = "galore_8bit")]
    Galore8bit(GaloreConfig),
}

impl OptimizerConfig {
    /// The rules of a step: `adamw` at that step's learning rate, which is this share of the peak.
    pub fn rules(self, adamw: AdamW, share: f64, mixers: f64) -> Optimizer {
        let matrices = match self {
            Self::Adamw | Self::Adamw8bit => Matrices::Adamw,
            Self::Muon { .. } => Matrices::Muon(Muon::of(&adamw)),
            Self::Galore(config) | Self::Galore8bit(config) => Matrices::Galore(config),
        };
        let adamw = match self {
            Self::Muon { adamw_lr } => AdamW {
                lr: adamw_lr * share,
                ..adamw
            },
            _ => adamw,
        };
        Optimizer {
            adamw,
            eight_bit: self.is_eight_bit(),
            matrices,
            mixers,
        }
    }

    pub fn is_eight_bit(self) -> bool {
        matches!(self, Self::Adamw8bit | Self::Galore8bit(_))
    }

    /// Bytes of what is remembered of a parameter.
    pub fn state_bytes(self, name: &str, shape: &[usize]) -> usize {
        let eight_bit = self.is_eight_bit();
        let entries = shape.iter().product();
        match (self, matrix(name, shape)) {
            (Self::Muon { .. }, Some(_)) => muon::state_bytes(entries),
            (Self::Galore(config) | Self::Galore8bit(config), Some(sides)) => {
                config.state_bytes(sides, eight_bit)
            }
            _ => Moments::bytes(entries, eight_bit),
        }
    }

    /// Matrices of a parameter's size that its step makes on its way.
    pub fn made(self) -> usize {
        match self {
            Self::Adamw | Self::Adamw8bit => 0,
            Self::Muon { .. } => muon::MADE,
            Self::Galore(_) | Self::Galore8bit(_) => galore::MADE,
        }
    }
}

/// The sides of a weight that maps activations to activations, which Muon and GaLore are for: embedding and head map tokens.
fn matrix(name: &str, shape: &[usize]) -> Option<[usize; 2]> {
    match shape {
        &[m, n] if name.starts_with("model.layers.") => Some([m, n]),
        _ => None,
    }
}

/// What a parameter is, as far as rules differ by it.
#[derive(Debug, Clone)]
pub struct Role {
    is_matrix: bool,
    /// Weight decay is for matrices, embedding and head. Norms, biases, `A_log`, `dt_bias`, `D` (one dimension) and the depthwise
    /// convolution's taps (three) are no maps that shrink.
    decays: bool,
    /// Of a mixer that replaced attention.
    in_mixer: bool,
    /// A mixer reads it whole ([`MixerConfig::read`](crate::mixer::MixerConfig::read)).
    is_read: bool,
    /// Of the matrices in it ([`MixerConfig::stacked`](crate::mixer::MixerConfig::stacked)).
    rows: Vec<usize>,
}

impl Role {
    pub fn is_matrix(&self) -> bool {
        self.is_matrix
    }

    pub fn in_mixer(&self) -> bool {
        self.in_mixer
    }

    /// Whether it may be kept in bf16: of a matrix nothing is asked but products.
    pub fn may_be_rounded(&self) -> bool {
        self.decays && !self.is_read
    }
}

/// The roles of a model's parameters.
pub struct Roles {
    mixers: Vec<String>,
    stacked: BTreeMap<String, Vec<usize>>,
    read: BTreeSet<String>,
}

impl Roles {
    pub fn new(config: &ModelConfig) -> Self {
        let (mut stacked, mut read) = (BTreeMap::new(), BTreeSet::new());
        for (i, mixer) in config.layers.iter().enumerate() {
            let prefix = config.mixer_prefix(i);
            for (name, rows) in mixer.stacked() {
                stacked.insert(format!("{prefix}{name}"), rows);
            }
            read.extend(mixer.read().iter().map(|name| format!("{prefix}{name}")));
        }
        let mixers = config.converted().into_iter();
        Self {
            mixers: mixers.map(|i| config.mixer_prefix(i)).collect(),
            stacked,
            read,
        }
    }

    pub fn of(&self, name: &str, shape: &[usize]) -> Role {
        Role {
            is_matrix: matrix(name, shape).is_some(),
            decays: shape.len() == 2,
            in_mixer: self.mixers.iter().any(|prefix| name.starts_with(prefix)),
            is_read: self.read.contains(name),
            rows: self.stacked.get(name).cloned().unwrap_or_default(),
        }
    }
}

/// The rules of one step.
#[derive(Debug, Clone, Copy)]
pub struct Optimizer {
    pub adamw: AdamW,
    /// AdamW's moments of large tensors in 8 bits.
    pub eight_bit: bool,
    pub matrices: Matrices,
    /// Learning rates of the mixers that replaced attention, over those of all else.
    pub mixers: f64,
}

/// What the layers' matrices follow.
#[derive(Debug, Clone, Copy)]
pub enum Matrices {
    Adamw,
    Muon(Muon),
    Galore(GaloreConfig),
}

impl Optimizer {
    /// Of the weight matrices.
    pub fn lr(&self) -> f64 {
        match &self.matrices {
            Matrices::Muon(muon) => muon.lr,
            Matrices::Adamw | Matrices::Galore(_) => self.adamw.lr,
        }
    }

    /// With all learning rates times `factor`.
    pub fn slowed(mut self, factor: f64) -> Self {
        self.adamw.lr *= factor;
        if let Matrices::Muon(muon) = &mut self.matrices {
            muon.lr *= factor;
        }
        self
    }

    /// Those that a parameter follows.
    fn of(&self, role: &Role) -> Self {
        let mut own = match role.in_mixer {
            true => self.slowed(self.mixers),
            false => *self,
        };
        if !role.decays {
            own.adamw.weight_decay = 0.0;
        }
        own
    }
}

/// What an optimizer remembers of a parameter's gradients.
#[derive(Default)]
pub enum State {
    /// No step yet.
    #[default]
    None,
    Adamw(Moments),
    /// Momentum.
    Muon(Tensor),
    Galore(Projected),
}

impl State {
    /// Steps a parameter (f32, in place) for the `steps`-th time, its gradient times `grad_scale`.
    pub fn step(
        &mut self,
        value: &Tensor,
        role: &Role,
        grad: &Tensor,
        grad_scale: f64,
        steps: u64,
        optimizer: &Optimizer,
    ) -> Result<()> {
        let rules = optimizer.of(role);
        match rules.matrices {
            Matrices::Muon(muon) if role.is_matrix => {
                let momentum = match std::mem::take(self) {
                    Self::Muon(momentum) => momentum,
                    _ => value.zeros_like()?.detach(),
                };
                let (stepped, momentum) =
                    muon::muon_step(value, grad, &momentum, &role.rows, grad_scale, &muon)?;
                overwrite(value, &stepped)?;
                *self = Self::Muon(momentum);
            }
            Matrices::Galore(galore)
                if role.is_matrix && galore.projects(value.dims2()?.into()) =>
            {
                if !matches!(self, Self::Galore(_)) {
                    *self = Self::Galore(Projected::new(grad, &galore, rules.eight_bit)?);
                }
                let Self::Galore(state) = self else {
                    unreachable!("just made")
                };
                let stepped = state.step(value, grad, grad_scale, steps, &galore, &rules.adamw)?;
                overwrite(value, &stepped)?;
            }
            matrices => {
                if !matches!(self, Self::Adamw(_)) {
                    *self = Self::Adamw(Moments::zeros(value, rules.eight_bit)?);
                }
                let Self::Adamw(moments) = self else {
                    unreachable!("just made")
                };
                let adamw = match matrices {
                    Matrices::Galore(galore) if role.is_matrix => galore.unprojected(rules.adamw),
                    _ => rules.adamw,
                };
                moments.step(value, grad, grad_scale, steps, &adamw)?;
            }
        }
        Ok(())
    }

    /// In tensors, by their kinds.
    pub fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        match self {
            Self::None => Ok(Vec::new()),
            Self::Adamw(moments) => moments.tensors(),
            Self::Muon(momentum) => Ok(vec![(MOMENTUM, momentum.clone())]),
            Self::Galore(state) => state.tensors(),
        }
    }

    /// What [`State::tensors`] gave of a parameter of this shape; nothing where there are none.
    ///
    /// # Errors
    /// Names the tensor that has another shape.
    pub fn read(saved: &SavedTensors, shape: &[usize]) -> Result<Self> {
        if let Some(momentum) = saved.find(MOMENTUM, shape)? {
            return Ok(Self::Muon(momentum));
        }
        if let Some(state) = Projected::read(saved, shape)? {
            return Ok(Self::Galore(state));
        }
        let moments = Moments::read(saved, shape)?;
        Ok(moments.map_or(Self::None, Self::Adamw))
    }

    pub fn onto(self, device: &candle_core::Device) -> Result<Self> {
        Ok(match self {
            Self::None => Self::None,
            Self::Adamw(moments) => Self::Adamw(moments.onto(device)?),
            Self::Muon(momentum) => Self::Muon(momentum.to_device(device)?),
            Self::Galore(state) => Self::Galore(state.onto(device)?),
        })
    }
}

/// Copies `value` into the storage of `target`, which all that shares it then shows.
pub fn overwrite(target: &Tensor, value: &Tensor) -> Result<()> {
    let value = value.contiguous()?.flatten_all()?;
    Ok(target.detach().flatten_all()?.slice_set(&value, 0, 0)?)
}

const MOMENTUM: &str = "momentum";

/// Tensors of one parameter in a save.
pub struct SavedTensors<'a> {
    pub prefix: &'a str,
    pub param: &'a str,
    pub all: &'a BTreeMap<String, Tensor>,
}

impl SavedTensors<'_> {
    fn name(&self, kind: &str) -> String {
        format!("{}.{kind}.{}", self.prefix, self.param)
    }

    pub fn lacks(&self, kind: &str) -> Error {
        Error::invalid(format!("it lacks {}", self.name(kind)))
    }

    /// # Errors
    /// Another shape.
    pub fn find(&self, kind: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let name = self.name(kind);
        match self.all.get(&name) {
            Some(found) if found.dims() != shape => Err(Error::invalid(format!(
                "{name} has the shape {:?} instead of {shape:?}",
                found.dims()
            ))),
            found => Ok(found.cloned()),
        }
    }
}
