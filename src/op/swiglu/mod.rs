//! SwiGLU (Shazeer 2020, arXiv 2002.05202).

pub mod cuda;
mod plain;
#[cfg(test)]
mod tests;

use crate::op::cpu::{exp, host, slice};
#[cfg(feature = "cuda")]
use crate::op::cuda::Cuda;
use crate::op::isa::vectorised;
use crate::op::route::{Kernels, Route};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

const KERNELS: Kernels = Kernels::f32("swiglu").cuda(&[DType::F32, DType::BF16]);

/// `silu(gate) · up`; same shapes.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        bail!(
            "swiglu: gate {:?} and up {:?} differ",
            gate.shape(),
            up.shape()
        );
    }
    if let Some(half) = KERNELS.rounds(&[gate, up]) {
        let [gate, up] = [gate, up].map(|x| x.to_dtype(DType::F32));
        return swiglu(&gate?, &up?)?.to_dtype(half);
    }
    if KERNELS.route(&[gate, up]) == Route::Plain {
        return plain::swiglu(gate, up);
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, Swiglu)
}

/// Any entries: `gate` in, `silu(gate) · up` out.
#[inline]
pub fn swiglu_row(gate: &mut [f32], up: &[f32]) {
    vectorised!(for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1. + exp(-*gate)) * up;
    })
}

/// Entries a task.
const BLOCK: usize = 1 << 14;

struct Swiglu;

impl CustomOp2 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, gate_layout)?, slice(up, up_layout)?);
        let mut y = vec![0.; gate.len()];
        y.par_chunks_mut(BLOCK)
            .zip(gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)))
            .for_each(|(y, (gate, up))| {
                y.copy_from_slice(gate);
                swiglu_row(y, up);
            });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        gate: &CudaStorage,
        gate_layout: &Layout,
        up: &CudaStorage,
        up_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Cuda::new(&gate.device)?;
        let (gate, up) = (gpu.array(gate, gate_layout)?, gpu.array(up, up_layout)?);
        let y = cuda::forward(&gpu, &gate, &up)?;
        Ok((y.into_storage()?, gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let gpu = Cuda::of(&dy)?;
            let [g, u, dy] = [gpu.tensor(gate)?, gpu.tensor(up)?, gpu.tensor(&dy)?];
            let [dg, du] = cuda::backward(&gpu, &g, &u, &dy)?;
            let [dg, du] = [dg.into_tensor(gate.shape())?, du.into_tensor(up.shape())?];
            return Ok((Some(dg), Some(du)));
        }
        let (gate_storage, gate_layout) = gate.storage_and_layout();
        let (up_storage, up_layout) = up.storage_and_layout();
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let g = slice(host(&gate_storage)?, gate_layout)?;
        let u = slice(host(&up_storage)?, up_layout)?;
        let dy = slice(host(&dy_storage)?, dy_layout)?;
        let (mut dg, mut du) = (vec![0.; g.len()], vec![0.; g.len()]);
        dg.par_chunks_mut(BLOCK)
            .zip(du.par_chunks_mut(BLOCK))
            .zip(
                g.par_chunks(BLOCK)
                    .zip(u.par_chunks(BLOCK))
                    .zip(dy.par_chunks(BLOCK)),
            )
            .for_each(|((dg, du), ((g, u), dy))| {
                vectorised!(for i in 0..g.len() {
                    let sigmoid = 1. / (1. + exp(-g[i]));
                    let silu = g[i] * sigmoid;
                    du[i] = dy[i] * silu;
                    dg[i] = dy[i] * u[i] * (sigmoid + silu * (1. - sigmoid));
                })
            });
        Ok((
            Some(Tensor::from_vec(dg, gate.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(du, up.shape(), &Device::Cpu)?),
        ))
    }
}
