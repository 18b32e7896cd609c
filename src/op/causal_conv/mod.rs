//! Depthwise causal convolution with optional SiLU (the short convolution of Mamba, Gu & Dao 2023).

mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
mod plain;
mod resume;
#[cfg(test)]
mod tests;

use super::Documents;
use crate::op::cpu::{Rows, host, slice, with_rows};
#[cfg(feature = "cuda")]
use crate::op::cuda::Cuda;
use crate::op::route::{Kernels, Route};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};

pub use resume::resume;

/// Taps that the kernel for CUDA has registers for (`WIDTH` there).
const CUDA_WIDEST: usize = 4;

const KERNELS: Kernels = Kernels::f32("causal_conv").cuda(&[DType::F32, DType::BF16]);

/// `x [B, T, C]`, `weight [C, W]` (last tap = the present), `bias [C]` → `[B, T, C]`; a tap that would
/// reach before the sequence or its document reads zero. `x` may be a view whose last axis is
/// contiguous (a narrowed projection): it is read in place. Weight and bias may be in another type than x, which is the value's.
pub fn causal_conv(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    silu: bool,
    documents: Option<&Documents>,
) -> Result<Tensor> {
    let (b, t, c) = x.dims3()?;
    let (weight_c, w) = weight.dims2()?;
    if weight_c != c || w == 0 || bias.dims() != [c] {
        bail!(
            "causal_conv: x {:?} wants weight [{c}, W] and bias [{c}], not {:?} and {:?}",
            x.shape(),
            weight.shape(),
            bias.shape()
        );
    }
    if let Some(documents) = documents
        && (documents.batch(), documents.len()) != (b, t)
    {
        bail!(
            "causal_conv: documents [{}, {}] do not fit x {:?}",
            documents.batch(),
            documents.len(),
            x.shape()
        );
    }
    let [weight, bias] = [weight, bias].map(|w| w.to_dtype(x.dtype()));
    let (weight, bias) = (&weight?, &bias?);
    if let Some(half) = KERNELS.rounds(&[x, weight, bias]) {
        let [x, weight, bias] = [x, weight, bias].map(|x| x.to_dtype(DType::F32));
        return causal_conv(&x?, &weight?, &bias?, silu, documents)?.to_dtype(half);
    }
    let too_wide = x.device().is_cuda() && w > CUDA_WIDEST;
    if too_wide || KERNELS.route(&[x, weight, bias]) == Route::Plain {
        return plain::causal_conv(x, weight, bias, silu, documents);
    }
    let taps = weight.t()?.contiguous()?;
    let documents = documents.cloned();
    with_rows(x)?.apply_op3(&taps, &bias.contiguous()?, CausalConv { silu, documents })
}

struct CausalConv {
    silu: bool,
    documents: Option<Documents>,
}

impl CausalConv {
    fn kernel<'a>(&'a self, x: Rows<'a>, taps: &'a [f32], bias: &'a [f32]) -> cpu::Conv<'a> {
        cpu::Conv {
            x,
            taps,
            bias,
            silu: self.silu,
            documents: self.documents.as_ref(),
        }
    }
}

#[cfg(feature = "cuda")]
impl CausalConv {
    fn launches<'a, G: crate::op::cuda::Gpu>(
        &'a self,
        gpu: &'a G,
        x: &'a G::Array,
        layout: &Layout,
        taps: &'a G::Array,
        bias: &'a G::Array,
    ) -> Result<cuda::Conv<'a, G>> {
        let (b, t, c) = layout.shape().dims3()?;
        let &[batch, row, 1] = layout.stride() else {
            bail!("an operand with a contiguous last axis is wanted, not {layout:?}");
        };
        Ok(cuda::Conv {
            gpu,
            rows: cuda::Rows {
                x,
                dims: [b, t, c],
                strides: [batch, row],
            },
            taps,
            bias,
            silu: self.silu,
            documents: self.documents.as_ref(),
        })
    }
}

/// Operands: x, taps `[W, C]` (the transposed weight: channels side by side) and bias.
impl CustomOp3 for CausalConv {
    fn name(&self) -> &'static str {
        "causal_conv"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        taps: &CpuStorage,
        taps_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (taps, bias) = (slice(taps, taps_layout)?, slice(bias, bias_layout)?);
        let y = self.kernel(Rows::of(x, x_layout)?, taps, bias).forward();
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        taps: &CudaStorage,
        taps_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let gpu = Cuda::new(&x.device)?;
        let (x, taps) = (gpu.view(x, x_layout)?, gpu.array(taps, taps_layout)?);
        let bias = gpu.array(bias, bias_layout)?;
        let y = self.launches(&gpu, &x, x_layout, &taps, &bias)?.forward()?;
        Ok((y.into_storage()?, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        taps: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (w, c) = taps.dims2()?;
        let (want_x, want_taps) = (x.track_op(), taps.track_op() || bias.track_op());
        let dy = dy.contiguous()?;
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let gpu = Cuda::of(&dy)?;
            let [rows, dy] = [gpu.tensor_view(x)?, gpu.tensor(&dy)?];
            let [taps, bias] = [gpu.tensor(taps)?, gpu.tensor(bias)?];
            let conv = self.launches(&gpu, &rows, x.layout(), &taps, &bias)?;
            let (dx, dtaps) = conv.backward(&dy, want_x)?;
            let dx = dx.map(|dx| dx.into_tensor(x.shape())).transpose()?;
            let dtaps = dtaps.into_tensor((w + 1, c))?;
            return Ok((dx, Some(dtaps.narrow(0, 0, w)?), Some(dtaps.get(w)?)));
        }
        let (x_storage, x_layout) = x.storage_and_layout();
        let (taps_storage, taps_layout) = taps.storage_and_layout();
        let (bias_storage, bias_layout) = bias.storage_and_layout();
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let taps = slice(host(&taps_storage)?, taps_layout)?;
        let bias = slice(host(&bias_storage)?, bias_layout)?;
        let kernel = self.kernel(Rows::of(host(&x_storage)?, x_layout)?, taps, bias);
        let dy = slice(host(&dy_storage)?, dy_layout)?;
        let (dx, dtaps) = kernel.backward(dy, want_x, want_taps);
        let dx = want_x.then(|| Tensor::from_vec(dx, x.shape(), &Device::Cpu));
        if !want_taps {
            return Ok((dx.transpose()?, None, None));
        }
        let dtaps = Tensor::from_vec(dtaps, (w + 1, c), &Device::Cpu)?;
        Ok((
            dx.transpose()?,
            Some(dtaps.narrow(0, 0, w)?),
            Some(dtaps.get(w)?),
        ))
    }
}
