//! Decoupled weight decay Adam (Loshchilov & Hutter 2019), in place.

mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
mod eight_bit;
mod plain;
#[cfg(test)]
mod tests;

use crate::op::cpu::{host, slice};
#[cfg(feature = "cuda")]
use crate::op::cuda::Cuda;
use crate::op::route::{Kernels, Route};
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};

pub use eight_bit::{BLOCK, Moments, Placed, adamw_8bit_step};

const KERNELS: Kernels = Kernels::f32("adamw").cuda(&[DType::F32]);

/// The hyperparameters of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// A step shrinks the parameter by the factor `1 − lr · weight_decay`.
    pub weight_decay: f64,
}

/// Updates `param` and `moments [2, ..param]` (first, second; zeros before step 1) in place for step
/// `step` (from 1), with the bias correction of the paper. The gradient is multiplied by `grad_scale`
/// first (global-norm clipping).
///
/// Both must be contiguous: every tensor that shares their storage, such as the model's, sees the
/// update.
pub fn adamw_step(
    param: &Tensor,
    grad: &Tensor,
    moments: &Tensor,
    grad_scale: f64,
    step: u64,
    hyper: &AdamW,
) -> Result<()> {
    if grad.dims() != param.dims() || moments.dims().split_first() != Some((&2, param.dims())) {
        bail!(
            "adamw: parameter {:?}, gradient {:?} and moments {:?} do not fit",
            param.shape(),
            grad.shape(),
            moments.shape()
        );
    }
    if !param.is_contiguous() || !moments.is_contiguous() {
        bail!(
            "adamw: parameter {:?} and its moments must be contiguous",
            param.shape()
        );
    }
    if step == 0 {
        bail!("adamw: steps count from 1");
    }
    if KERNELS.route(&[param, grad, moments]) == Route::Plain {
        return plain::adamw_step(param, grad, moments, grad_scale, step, hyper);
    }
    #[cfg(feature = "cuda")]
    if param.device().is_cuda() {
        let grad = grad.contiguous()?;
        let gpu = Cuda::of(param)?;
        let [p, g, m] = [gpu.tensor(param)?, gpu.tensor(&grad)?, gpu.tensor(moments)?];
        return cuda::step(&gpu, &p, &g, &m, grad_scale, step, hyper);
    }
    moments.inplace_op2(&grad.contiguous()?, &UpdateMoments { grad_scale, hyper })?;
    param.inplace_op2(moments, &UpdateParam(factors(step, hyper)))
}

fn factors(step: u64, hyper: &AdamW) -> cpu::Factors {
    cpu::Factors {
        keep: (1. - hyper.lr * hyper.weight_decay) as f32,
        rate: (hyper.lr / (1. - hyper.beta1.powf(step as f64))) as f32,
        deviation: (1. / (1. - hyper.beta2.powf(step as f64)).sqrt()) as f32,
        eps: hyper.eps as f32,
    }
}

/// [`adamw_step`] with moments in 8 bits.
///
/// # Errors
/// A parameter that is not f32, not on the CPU or a GPU with CUDA, or not where its moments are.
pub fn adamw_8bit(
    param: &Tensor,
    grad: &Tensor,
    moments: &mut Placed,
    grad_scale: f64,
    step: u64,
    hyper: &AdamW,
) -> Result<()> {
    let grad = grad.contiguous()?;
    let moments = match (KERNELS.route(&[param, &grad]), moments) {
        (Route::Cpu, Placed::Host(moments)) => std::sync::Mutex::new(moments),
        #[cfg(feature = "cuda")]
        (Route::Cuda, Placed::Device { codes, scales }) => {
            let gpu = Cuda::of(param)?;
            let [p, g] = [gpu.tensor(param)?, gpu.tensor(&grad)?];
            let [codes, scales] = [gpu.tensor(codes)?, gpu.tensor(scales)?];
            return cuda::step_8bit(&gpu, &p, &g, [&codes, &scales], grad_scale, step, hyper);
        }
        _ => bail!(
            "adamw_8bit: moments in 8 bits are for f32 parameters on the CPU or with CUDA, not {:?} on {:?}",
            param.dtype(),
            param.device().location()
        ),
    };
    let update = Update8 {
        moments,
        grad_scale,
        step,
        hyper,
    };
    param.inplace_op2(&grad, &update)
}

struct Update8<'a> {
    moments: std::sync::Mutex<&'a mut Moments>,
    grad_scale: f64,
    step: u64,
    hyper: &'a AdamW,
}

impl InplaceOp2 for Update8<'_> {
    fn name(&self) -> &'static str {
        "adamw with moments in 8 bits"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        let (param, grad) = (slice_mut(param, param_layout)?, slice(grad, grad_layout)?);
        let mut moments = self.moments.lock().expect("held by this step alone");
        adamw_8bit_step(
            param,
            grad,
            &mut moments,
            self.grad_scale,
            self.step,
            self.hyper,
        );
        Ok(())
    }
}

/// Entries of a half type that are widened at a time.
const PIECE: usize = 1 << 22;

/// Sum of squares of a tensor of any layout, accumulated in f64 (f32 on Metal) in a fixed order.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    if matches!(x.dtype(), DType::BF16 | DType::F16) {
        let x = x.flatten_all()?;
        let starts = (0..x.elem_count()).step_by(PIECE);
        let squares = starts.map(|start| {
            let piece = x.narrow(0, start, PIECE.min(x.elem_count() - start))?;
            sum_of_squares(&piece.to_dtype(DType::F32)?)
        });
        return squares.sum();
    }
    if KERNELS.route(&[x]) == Route::Plain {
        return plain::sum_of_squares(x);
    }
    let x = x.contiguous()?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        let gpu = Cuda::of(&x)?;
        let sums = cuda::sum_of_squares(&gpu, &gpu.tensor(&x)?)?;
        let count = crate::op::cuda::Array::len(&sums);
        return Ok(sums.into_tensor(count)?.to_vec1::<f64>()?.iter().sum());
    }
    let (storage, layout) = x.storage_and_layout();
    Ok(cpu::sum_of_squares(slice(host(&storage)?, layout)?))
}

/// In place on the moments, from the gradient.
struct UpdateMoments<'a> {
    grad_scale: f64,
    hyper: &'a AdamW,
}

impl InplaceOp2 for UpdateMoments<'_> {
    fn name(&self) -> &'static str {
        "adamw moments"
    }

    fn cpu_fwd(
        &self,
        moments: &mut CpuStorage,
        moments_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> Result<()> {
        let moments = slice_mut(moments, moments_layout)?;
        let grad = slice(grad, grad_layout)?;
        let betas = [self.hyper.beta1, self.hyper.beta2];
        let rests = betas.map(|beta| (1. - beta) as f32);
        let betas = betas.map(|beta| beta as f32);
        cpu::update_moments(moments, grad, self.grad_scale as f32, betas, rests);
        Ok(())
    }
}

/// In place on the parameter, from the updated moments: candle lends one tensor for writing at a time.
struct UpdateParam(cpu::Factors);

impl InplaceOp2 for UpdateParam {
    fn name(&self) -> &'static str {
        "adamw parameter"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        moments: &CpuStorage,
        moments_layout: &Layout,
    ) -> Result<()> {
        let param = slice_mut(param, param_layout)?;
        cpu::update_param(param, slice(moments, moments_layout)?, &self.0);
        Ok(())
    }
}

fn slice_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(entries), Some((start, end))) => Ok(&mut entries[start..end]),
        _ => bail!("adamw: a contiguous f32 tensor is wanted"),
    }
}
