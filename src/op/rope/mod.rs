//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

mod cpu;
pub mod cuda;
mod plain;
#[cfg(test)]
mod tests;

use crate::op::cpu::{host, slice};
#[cfg(feature = "cuda")]
use crate::op::cuda::Cuda;
use crate::op::route::{Kernels, Route};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

pub use cpu::turn_head;

const KERNELS: Kernels = Kernels::f32("rope").cuda(&[DType::F32, DType::BF16]);

/// Which dims of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Dim `i` with `i + K/2` (Hugging Face Llama).
    Halves,
    /// Dim `2i` with `2i + 1` (DeepSeek, AMD).
    Interleaved,
}

/// `x [B, T, H, K]`, `cos, sin [T, K/2]` → `[B, T, H, K]`, every dim staying where it was: each pair
/// `(a, b)` becomes `(a cos − b sin, b cos + a sin)`. The tables get no gradient.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
    let (_, t, _, k) = x.dims4()?;
    if k % 2 != 0 || cos.dims() != [t, k / 2] || sin.dims() != cos.dims() {
        bail!(
            "rope: x {:?} wants tables [{t}, {}], not {:?} and {:?}",
            x.shape(),
            k / 2,
            cos.shape(),
            sin.shape()
        );
    }
    if let Some(half) = KERNELS.rounds(&[x, cos, sin]) {
        let [x, cos, sin] = [x, cos, sin].map(|x| x.to_dtype(DType::F32));
        return rope(&x?, &cos?, &sin?, layout)?.to_dtype(half);
    }
    if KERNELS.route(&[x, cos, sin]) == Route::Plain {
        return plain::rope(x, cos, sin, layout);
    }
    let op = Rope {
        cos: cos.contiguous()?,
        sin: sin.contiguous()?,
        layout,
        back: false,
    };
    x.contiguous()?.apply_op1(op)
}

struct Rope {
    cos: Tensor,
    sin: Tensor,
    layout: RopeLayout,
    /// Turn by the negative angles (times the same magnitude): the transposed map.
    back: bool,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (cos_storage, cos_layout) = self.cos.storage_and_layout();
        let (sin_storage, sin_layout) = self.sin.storage_and_layout();
        let (_, _, h, k) = x_layout.shape().dims4()?;
        let y = cpu::rope(
            slice(x, x_layout)?,
            slice(host(&cos_storage)?, cos_layout)?,
            slice(host(&sin_storage)?, sin_layout)?,
            [h, k],
            self.layout,
            if self.back { -1. } else { 1. },
        );
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, x_layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let gpu = Cuda::new(&x.device)?;
        let (_, _, h, k) = x_layout.shape().dims4()?;
        let x = gpu.array(x, x_layout)?;
        let (cos, sin) = (gpu.tensor(&self.cos)?, gpu.tensor(&self.sin)?);
        let sign = if self.back { -1. } else { 1. };
        let y = cuda::rope(&gpu, &x, &cos, &sin, [h, k], self.layout, sign)?;
        Ok((y.into_storage()?, x_layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let op = Rope {
            cos: self.cos.clone(),
            sin: self.sin.clone(),
            layout: self.layout,
            back: !self.back,
        };
        Ok(Some(dy.contiguous()?.apply_op1_no_bwd(&op)?))
    }
}
