//! RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) and the gated, grouped form of Mamba2.

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
use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail,
};

pub use cpu::{gated_row, norm_row, norm_rows};

const KERNELS: Kernels = Kernels::f32("rms_norm").cuda(&[DType::F32, DType::BF16]);

/// `x / sqrt(mean(x²) + eps) · weight`; `x [.., D]`, `weight [D]` → `[.., D]` in the type of x.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let d = weight.dims1()?;
    if x.dims().last() != Some(&d) {
        bail!(
            "rms_norm: x {:?} does not end with the {d} channels of its weight",
            x.shape()
        );
    }
    let weight = &weight.to_dtype(x.dtype())?;
    if let Some(half) = KERNELS.rounds(&[x, weight]) {
        let [x, weight] = [x, weight].map(|x| x.to_dtype(DType::F32));
        return rms_norm(&x?, &weight?, eps)?.to_dtype(half);
    }
    if KERNELS.route(&[x, weight]) == Route::Plain {
        return plain::rms_norm(x, weight, eps);
    }
    let op = RmsNorm { eps: eps as f32 };
    x.contiguous()?.apply_op2(&weight.contiguous()?, op)
}

/// `v / sqrt(mean_group(v²) + eps) · weight` with `v = y · silu(z)`, groups of `group` neighbouring
/// channels (Mamba2, arXiv 2405.21060). `y, z [.., D]`, `weight [D]` → `[.., D]` in the type of y and z.
pub fn gated_rms_norm(
    y: &Tensor,
    z: &Tensor,
    weight: &Tensor,
    group: usize,
    eps: f64,
) -> Result<Tensor> {
    let d = weight.dims1()?;
    if y.dims() != z.dims() || y.dims().last() != Some(&d) || group == 0 || d % group != 0 {
        bail!(
            "gated_rms_norm: y {:?} and z {:?} want one shape that ends with {d} channels in groups of {group}",
            y.shape(),
            z.shape()
        );
    }
    let weight = &weight.to_dtype(y.dtype())?;
    if let Some(half) = KERNELS.rounds(&[y, z, weight]) {
        let [y, z, weight] = [y, z, weight].map(|x| x.to_dtype(DType::F32));
        return gated_rms_norm(&y?, &z?, &weight?, group, eps)?.to_dtype(half);
    }
    if KERNELS.route(&[y, z, weight]) == Route::Plain {
        return plain::gated_rms_norm(y, z, weight, group, eps);
    }
    let op = GatedRmsNorm {
        group,
        eps: eps as f32,
    };
    y.contiguous()?
        .apply_op3(&z.contiguous()?, &weight.contiguous()?, op)
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = cpu::forward(slice(x, x_layout)?, slice(weight, weight_layout)?, self.eps);
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Cuda::new(&x.device)?;
        let (x, weight) = (gpu.array(x, x_layout)?, gpu.array(weight, weight_layout)?);
        let y = cuda::forward(&gpu, &x, &weight, self.eps)?;
        Ok((y.into_storage()?, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let gpu = Cuda::of(&dy)?;
            let [x_entries, w, dy] = [gpu.tensor(x)?, gpu.tensor(weight)?, gpu.tensor(&dy)?];
            let [dx, dw] = cuda::backward(&gpu, &x_entries, &w, &dy, self.eps)?;
            let [dx, dw] = [dx.into_tensor(x.shape())?, dw.into_tensor(weight.shape())?];
            return Ok((Some(dx), Some(dw)));
        }
        let (x_storage, x_layout) = x.storage_and_layout();
        let (w_storage, w_layout) = weight.storage_and_layout();
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let (dx, dw) = cpu::backward(
            slice(host(&x_storage)?, x_layout)?,
            slice(host(&w_storage)?, w_layout)?,
            slice(host(&dy_storage)?, dy_layout)?,
            self.eps,
        );
        Ok((
            Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(dw, weight.shape(), &Device::Cpu)?),
        ))
    }
}

struct GatedRmsNorm {
    group: usize,
    eps: f32,
}

impl CustomOp3 for GatedRmsNorm {
    fn name(&self) -> &'static str {
        "gated_rms_norm"
    }

    fn cpu_fwd(
        &self,
        y: &CpuStorage,
        y_layout: &Layout,
        z: &CpuStorage,
        z_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = cpu::gated_forward(
            slice(y, y_layout)?,
            slice(z, z_layout)?,
            slice(weight, weight_layout)?,
            self.group,
            self.eps,
        );
        Ok((CpuStorage::F32(out), y_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        y: &CudaStorage,
        y_layout: &Layout,
        z: &CudaStorage,
        z_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Cuda::new(&y.device)?;
        let (y, z) = (gpu.array(y, y_layout)?, gpu.array(z, z_layout)?);
        let weight = gpu.array(weight, weight_layout)?;
        let out = cuda::gated_forward(&gpu, &y, &z, &weight, self.group, self.eps)?;
        Ok((out.into_storage()?, y_layout.shape().clone()))
    }

    fn bwd(
        &self,
        y: &Tensor,
        z: &Tensor,
        weight: &Tensor,
        _out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dout = dout.contiguous()?;
        #[cfg(feature = "cuda")]
        if dout.device().is_cuda() {
            let gpu = Cuda::of(&dout)?;
            let [y_entries, z_entries] = [gpu.tensor(y)?, gpu.tensor(z)?];
            let [w, dout] = [gpu.tensor(weight)?, gpu.tensor(&dout)?];
            let [dy, dz, dw] = cuda::gated_backward(
                &gpu, &y_entries, &z_entries, &w, &dout, self.group, self.eps,
            )?;
            return Ok((
                Some(dy.into_tensor(y.shape())?),
                Some(dz.into_tensor(z.shape())?),
                Some(dw.into_tensor(weight.shape())?),
            ));
        }
        let (y_storage, y_layout) = y.storage_and_layout();
        let (z_storage, z_layout) = z.storage_and_layout();
        let (w_storage, w_layout) = weight.storage_and_layout();
        let (d_storage, d_layout) = dout.storage_and_layout();
        let [dy, dz, dw] = cpu::gated_backward(
            slice(host(&y_storage)?, y_layout)?,
            slice(host(&z_storage)?, z_layout)?,
            slice(host(&w_storage)?, w_layout)?,
            slice(host(&d_storage)?, d_layout)?,
            self.group,
            self.eps,
        );
        Ok((
            Some(Tensor::from_vec(dy, y.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(dz, z.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(dw, weight.shape(), &Device::Cpu)?),
        ))
    }
}
