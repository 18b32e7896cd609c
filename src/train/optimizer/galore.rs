//! GaLore (Zhao et al. 2024, arXiv 2403.03507): AdamW of a weight matrix in the span of its gradient's leading singular vectors, so
//! that moments take `rank` rows or columns instead of all.
//!
//! For `W [M, N]` with `M ≤ N`: every so many steps `P [M, R]` are the leading left singular vectors of the gradient `G`; a step is
//! `W ← (1 − lr · weight_decay) W − lr · scale · P Adam(Pᵀ G)`, where `Adam` is the direction of AdamW on `[R, N]`. For `M > N` the
//! right vectors stand on the other side. Moments stay as they are when the vectors change, as in the authors' code; new vectors have the
//! signs that agree with the old ones.

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::SavedTensors;
use super::adamw::Moments;
use crate::mixer::linalg::{eigen, matrix, tensor};
use crate::op::adamw::AdamW;
use crate::{Error, Result};

/// The same on the command line and in a recipe's `train.galore`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct GaloreConfig {
    /// GaLore's rank: a matrix whose smaller side is no larger follows AdamW as it is.
    #[arg(long = "galore-rank", value_name = "RANK", default_value_t = Self::default().rank)]
    pub rank: usize,
    /// Steps between new subspaces of GaLore.
    #[arg(long = "galore-interval", value_name = "STEPS", default_value_t = Self::default().interval)]
    pub interval: u64,
    /// Learning rate of GaLore's matrices, over that of all else.
    #[arg(long = "galore-scale", value_name = "TIMES", default_value_t = Self::default().scale)]
    pub scale: f64,
}

impl Default for GaloreConfig {
    fn default() -> Self {
        Self {
            rank: 128,
            interval: 200,
            scale: 0.25,
        }
    }
}

impl GaloreConfig {
    /// # Errors
    /// Names the field that cannot work.
    pub fn validate(&self) -> Result<()> {
        let wrong = |name: &str, value: &dyn std::fmt::Display| {
            Err(Error::invalid(format!(
                "galore.{name} {value} must be above 0"
            )))
        };
        match self {
            Self { rank: 0, .. } => wrong("rank", &0),
            Self { interval: 0, .. } => wrong("interval", &0),
            Self { scale, .. } if !(*scale > 0.0 && scale.is_finite()) => wrong("scale", scale),
            _ => Ok(()),
        }
    }

    /// Whether a matrix has more directions than the rank.
    pub fn projects(&self, [m, n]: [usize; 2]) -> bool {
        self.rank < m.min(n)
    }

    pub fn state_bytes(&self, [m, n]: [usize; 2], eight_bit: bool) -> usize {
        match self.projects([m, n]) {
            true => {
                let basis = m.min(n) * self.rank * size_of::<f32>();
                basis + Moments::bytes(self.rank * m.max(n), eight_bit)
            }
            false => Moments::bytes(m * n, eight_bit),
        }
    }

    /// AdamW's rules for a matrix that is not projected: the span of all directions is the matrix itself.
    pub fn unprojected(&self, adamw: AdamW) -> AdamW {
        AdamW {
            lr: adamw.lr * self.scale,
            weight_decay: adamw.weight_decay / self.scale,
            ..adamw
        }
    }
}

/// Matrices of a parameter's size that a step makes: the update, it scaled, what is kept, and the new value.
pub const MADE: usize = 4;

/// What is remembered of a matrix.
pub struct Projected {
    /// `[M, R]` for `M ≤ N`, else `[N, R]`.
    basis: Tensor,
    /// Of `[R, N]`, or `[M, R]`.
    moments: Moments,
}

impl Projected {
    /// Before the first step, of which `grad` is the gradient.
    pub fn new(grad: &Tensor, config: &GaloreConfig, eight_bit: bool) -> Result<Self> {
        let basis = leading(grad, config.rank)?;
        let moments = Moments::zeros(&project(grad, &basis)?, eight_bit)?;
        Ok(Self { basis, moments })
    }

    /// The parameter's value after its `steps`-th step.
    pub fn step(
        &mut self,
        param: &Tensor,
        grad: &Tensor,
        grad_scale: f64,
        steps: u64,
        config: &GaloreConfig,
        adamw: &AdamW,
    ) -> Result<Tensor> {
        let GaloreConfig {
            rank,
            interval,
            scale,
        } = *config;
        if steps > 1 && (steps - 1).is_multiple_of(interval) {
            self.basis = aligned(&leading(grad, rank)?, &self.basis)?;
        }
        let projected = project(grad, &self.basis)?;
        // What AdamW makes of 0 is its step.
        let moved = projected.zeros_like()?.detach();
        let undecayed = AdamW {
            weight_decay: 0.0,
            ..*adamw
        };
        let moments = &mut self.moments;
        moments.step(&moved, &projected, grad_scale, steps, &undecayed)?;
        let kept = (param * (1.0 - adamw.lr * adamw.weight_decay))?;
        Ok((kept + (project_back(&moved, &self.basis, param.dims())? * scale)?)?)
    }

    pub fn tensors(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let mut tensors = self.moments.tensors()?;
        tensors.push((BASIS, self.basis.clone()));
        Ok(tensors)
    }

    pub fn read(saved: &SavedTensors, shape: &[usize]) -> Result<Option<Self>> {
        let (Some(basis), &[m, n]) = (saved.all.get(&saved.name(BASIS)), shape) else {
            return Ok(None);
        };
        let rank = basis.dims().last().copied().unwrap_or(0);
        let (side, projected) = match m <= n {
            true => (m, [rank, n]),
            false => (n, [m, rank]),
        };
        let basis = saved.find(BASIS, &[side, rank])?;
        let moments = Moments::read(saved, &projected)?;
        Ok(basis
            .zip(moments)
            .map(|(basis, moments)| Self { basis, moments }))
    }

    pub fn onto(self, device: &Device) -> Result<Self> {
        Ok(Self {
            basis: self.basis.to_device(device)?,
            moments: self.moments.onto(device)?,
        })
    }
}

const BASIS: &str = "basis";

/// Vectors with the signs that agree with those before: moments go on in the same direction.
fn aligned(basis: &Tensor, before: &Tensor) -> Result<Tensor> {
    let dots = (basis * before)?.sum_keepdim(0)?;
    let signs = dots.ge(0f32)?.to_dtype(basis.dtype())?.affine(2.0, -1.0)?;
    Ok(basis.broadcast_mul(&signs)?)
}

/// `[M, N]` to `[R, N]` or `[M, R]`.
fn project(grad: &Tensor, basis: &Tensor) -> Result<Tensor> {
    let (m, n) = grad.dims2()?;
    Ok(match m <= n {
        true => basis.t()?.matmul(grad)?,
        false => grad.matmul(basis)?,
    })
}

/// `[R, N]` or `[M, R]` to `shape`, `[M, N]`.
fn project_back(moved: &Tensor, basis: &Tensor, shape: &[usize]) -> Result<Tensor> {
    Ok(match shape[0] <= shape[1] {
        true => basis.matmul(moved)?,
        false => moved.matmul(&basis.t()?)?,
    })
}

/// Directions beside those that are wanted, and products with the gradient and its transpose: the randomised range finder of Halko,
/// Martinsson & Tropp (2011, arXiv 0909.4061, algorithm 4.4) with a Rayleigh-Ritz step, for AdamW is not the same in a turned basis.
const MORE: usize = 8;
const TURNS: usize = 2;

/// The `rank` leading singular vectors of `grad [M, N]` on its smaller side: `[min(M, N), rank]`.
pub(super) fn leading(grad: &Tensor, rank: usize) -> Result<Tensor> {
    let (m, n) = grad.dims2()?;
    let grad = match m <= n {
        true => grad.detach(),
        false => grad.detach().t()?,
    };
    // The gradient's size is nothing to its vectors, and its products' might not be finite.
    let largest = grad.abs()?.flatten_all()?.max(0)?;
    let grad = grad.broadcast_div(&largest.maximum(1e-30)?)?;
    let (short, long) = grad.dims2()?;
    let count = (rank + MORE).min(short);
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let draws: Vec<f32> = (0..long * count)
        .map(|_| random.random_range(-1.0..1.0))
        .collect();
    let device = grad.device();
    let draws = Tensor::from_vec(draws, (long, count), &Device::Cpu)?.to_device(device)?;
    let orthonormal = |x: &Tensor| -> Result<Tensor> {
        let q = matrix(x)?.qr().compute_thin_Q();
        Ok(tensor(&q)?.to_device(device)?)
    };
    let transposed = grad.t()?;
    let mut basis = orthonormal(&grad.matmul(&draws)?)?;
    for _ in 0..TURNS {
        basis = orthonormal(&grad.matmul(&transposed.matmul(&basis)?)?)?;
    }
    let inside = matrix(&transposed.matmul(&basis)?)?;
    let vectors = eigen(&(inside.transpose() * &inside))?.vectors;
    let turned = tensor(&vectors)?.to_device(device)?;
    Ok(basis.matmul(&turned.narrow(1, 0, rank)?.contiguous()?)?)
}
