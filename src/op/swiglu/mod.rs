//! SwiGLU (Shazeer 2020, arXiv 2002.05202).

mod cpu;
pub mod cuda;
mod plain;
mod projected;
#[cfg(test)]
mod tests;

use crate::op::cpu::{host, slice};
#[cfg(feature = "cuda")]
use crate::op::cuda::Cuda;
use crate::op::route::{Kernels, Route};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, bail};

pub use cpu::swiglu_row;
pub use projected::swiglu_of;

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
        let y = cpu::forward(slice(gate, gate_layout)?, slice(up, up_layout)?);
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
        let mut dg = slice(host(&gate_storage)?, gate_layout)?.to_vec();
        let mut du = slice(host(&up_storage)?, up_layout)?.to_vec();
        cpu::backward(&mut dg, &mut du, slice(host(&dy_storage)?, dy_layout)?);
        Ok((
            Some(Tensor::from_vec(dg, gate.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(du, up.shape(), &Device::Cpu)?),
        ))
    }
}
