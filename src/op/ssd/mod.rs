//! The state-space dual of Mamba2 (Dao & Gu 2024).

mod backward;
mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
mod lanes;
mod plain;
mod resume;
#[cfg(test)]
mod tests;

use super::Documents;
use crate::op::cpu::{Rows, host, slice, with_rows};
#[cfg(feature = "cuda")]
use crate::op::cuda::{Cuda, Gpu};
use crate::op::route::{Kernels, Route};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use std::sync::OnceLock;

pub use resume::resume;

const KERNELS: Kernels = Kernels::f32("ssd").cuda(&[DType::F32, DType::BF16]);
/// Entries of x, and of a state's rows, that CUDA's kernels take, at most.
const LARGEST: usize = 128;

/// Sizes of one SSD call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SsdShape {
    /// `H`
    pub heads: usize,
    /// `G`: heads of x and B; head `h` reads group `h / (H / G)`.
    pub groups: usize,
    /// `P`
    pub head_dim: usize,
    /// `N`
    pub d_state: usize,
    /// Positions that the kernel works on at a time, and between the states that its backward pass
    /// keeps; never changes the answer.
    pub chunk: usize,
}

impl SsdShape {
    /// Channels of `xbc`: `G·P + G·N + H·N`.
    pub fn channels(&self) -> usize {
        self.groups * (self.head_dim + self.d_state) + self.heads * self.d_state
    }

    /// Entries of the states of all heads that are kept before every chunk, in whole tiles.
    pub fn chunk_states(&self) -> usize {
        let whole = |entries: usize| entries.next_multiple_of(lanes::LANES);
        self.heads * whole(self.head_dim) * whole(self.d_state)
    }

    fn check(&self, xbc: &Tensor, dt: &Tensor, params: &Tensor) -> Result<()> {
        let h = self.heads;
        if self.groups == 0 || !h.is_multiple_of(self.groups) || h == 0 {
            bail!("ssd: {h} heads do not share {} groups evenly", self.groups);
        }
        if self.chunk == 0 {
            bail!("ssd: the chunk must be at least one position");
        }
        let (b, t, channels) = xbc.dims3()?;
        if channels != self.channels() || dt.dims() != [b, t, h] || params.dims() != [3, h] {
            bail!(
                "ssd: {self:?} wants xbc [B, T, {}], dt [B, T, {h}] and params [3, {h}], not {:?}, {:?} and {:?}",
                self.channels(),
                xbc.shape(),
                dt.shape(),
                params.shape()
            );
        }
        Ok(())
    }
}

/// Per head: `Δ = softplus(dt + dt_bias)`, `S ← exp(−exp(A_log)·Δ) S + Δ x ⊗ B`, `y = S C + D x`.
/// `xbc [B, T, G·P + G·N + H·N]` (x, B, C side by side), `dt [B, T, H]`, `params [3, H]` (rows A_log,
/// dt_bias, D) → `y [B, T, H·P]`. The state is zero where a document starts.
///
/// Steps are in the type of `params`, and so is all else, but for `xbc` and `y` where the kernel takes another: bf16 on a GPU.
pub fn ssd(
    xbc: &Tensor,
    dt: &Tensor,
    params: &Tensor,
    shape: SsdShape,
    documents: Option<&Documents>,
) -> Result<Tensor> {
    shape.check(xbc, dt, params)?;
    let (b, t, _) = xbc.dims3()?;
    if let Some(documents) = documents
        && (documents.batch(), documents.len()) != (b, t)
    {
        bail!(
            "ssd: documents [{}, {}] do not fit xbc {:?}",
            documents.batch(),
            documents.len(),
            xbc.shape()
        );
    }
    let dt = &dt.to_dtype(params.dtype())?;
    let on_gpu = xbc.device().is_cuda() && params.dtype() == DType::F32;
    let xbc = &match on_gpu && KERNELS.cuda.contains(&xbc.dtype()) {
        true => xbc.clone(),
        false => xbc.to_dtype(params.dtype())?,
    };
    let too_large = on_gpu && shape.head_dim.max(shape.d_state) > LARGEST;
    if too_large
        || KERNELS.route(&[xbc]) == Route::Plain
        || KERNELS.route(&[dt, params]) == Route::Plain
    {
        let xbc = xbc.to_dtype(params.dtype())?;
        return plain::ssd(&xbc, dt, params, shape, documents);
    }
    let op = Ssd {
        shape,
        documents: documents.cloned(),
        chunk_starts: [xbc, dt, params]
            .iter()
            .any(|x| x.track_op())
            .then(OnceLock::new),
    };
    with_rows(xbc)?.apply_op3(&with_rows(dt)?, &params.contiguous()?, op)
}

struct Ssd {
    shape: SsdShape,
    documents: Option<Documents>,
    /// What the forward pass keeps for the backward pass, if there will be one.
    chunk_starts: Option<OnceLock<Kept>>,
}

/// The states before every chunk.
enum Kept {
    Tiles(Vec<Vec<lanes::Tile>>),
    /// `[B, chunks, H, P, N]`, of the chunks of the GPU's kernels.
    #[cfg(feature = "cuda")]
    Entering(Tensor),
}

#[cfg(feature = "cuda")]
impl Ssd {
    fn launches<'a, G: Gpu>(
        &'a self,
        gpu: &'a G,
        [xbc, dt]: [cuda::Rows<'a, G::Array>; 2],
        params: &'a G::Array,
    ) -> cuda::Ssd<'a, G> {
        cuda::Ssd {
            gpu,
            xbc,
            dt,
            params,
            shape: self.shape,
            documents: self.documents.as_ref(),
        }
    }
}

impl CustomOp3 for Ssd {
    fn name(&self) -> &'static str {
        "ssd"
    }

    fn cpu_fwd(
        &self,
        xbc: &CpuStorage,
        xbc_layout: &Layout,
        dt: &CpuStorage,
        dt_layout: &Layout,
        params: &CpuStorage,
        params_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (b, t, _) = xbc_layout.shape().dims3()?;
        let kernel = cpu::Ssd {
            xbc: Rows::of(xbc, xbc_layout)?,
            dt: Rows::of(dt, dt_layout)?,
            params: slice(params, params_layout)?,
            shape: self.shape,
            documents: self.documents.as_ref(),
        };
        let forward = kernel.forward(self.chunk_starts.is_some());
        if let Some(cell) = &self.chunk_starts {
            cell.get_or_init(|| Kept::Tiles(forward.chunk_starts));
        }
        let y_shape = Shape::from((b, t, self.shape.heads * self.shape.head_dim));
        Ok((CpuStorage::F32(forward.y), y_shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        xbc: &CudaStorage,
        xbc_layout: &Layout,
        dt: &CudaStorage,
        dt_layout: &Layout,
        params: &CudaStorage,
        params_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (b, t, _) = xbc_layout.shape().dims3()?;
        let gpu = Cuda::new(&xbc.device)?;
        let [xbc, dt] = [gpu.view(xbc, xbc_layout)?, gpu.view(dt, dt_layout)?];
        let rows = [
            cuda::Rows::of(&xbc, xbc_layout)?,
            cuda::Rows::of(&dt, dt_layout)?,
        ];
        let params = gpu.array(params, params_layout)?;
        let [y, entering] = self.launches(&gpu, rows, &params).forward()?;
        if let Some(cell) = &self.chunk_starts {
            let entries = crate::op::cuda::Array::len(&entering);
            let entering = entering.into_tensor(entries)?;
            cell.get_or_init(|| Kept::Entering(entering));
        }
        let y_shape = Shape::from((b, t, self.shape.heads * self.shape.head_dim));
        Ok((y.into_storage()?, y_shape))
    }

    /// The gradients share all their work: each is computed, those not wanted are dropped.
    fn bwd(
        &self,
        xbc: &Tensor,
        dt: &Tensor,
        params: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let kept = self.chunk_starts.as_ref().and_then(OnceLock::get);
        let kept = kept.expect("candle records the operation after its forward pass");
        // Without the feature there is one kind.
        #[cfg_attr(not(feature = "cuda"), allow(clippy::infallible_destructuring_match))]
        let chunk_starts = match kept {
            Kept::Tiles(tiles) => tiles,
            #[cfg(feature = "cuda")]
            Kept::Entering(entering) => {
                let dy = dy.contiguous()?;
                let gpu = Cuda::of(&dy)?;
                let [xbc_entries, dt_entries] = [gpu.tensor_view(xbc)?, gpu.tensor_view(dt)?];
                let rows = [
                    cuda::Rows::of(&xbc_entries, xbc.layout())?,
                    cuda::Rows::of(&dt_entries, dt.layout())?,
                ];
                let params_entries = gpu.tensor(params)?;
                let launches = self.launches(&gpu, rows, &params_entries);
                let [dy, entering] = [gpu.tensor(&dy)?, gpu.tensor(entering)?];
                let [dxbc, ddt, dparams] = launches.backward(&dy, &entering)?;
                return Ok((
                    Some(dxbc.into_tensor(xbc.shape())?),
                    Some(ddt.into_tensor(dt.shape())?),
                    Some(dparams.into_tensor(params.shape())?),
                ));
            }
        };
        let dy = with_rows(dy)?;
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let dy_rows = Rows::of(host(&dy_storage)?, dy_layout)?;
        let documents = self.documents.as_ref();
        let gradients = with_kernel(xbc, dt, params, self.shape, documents, |kernel| {
            kernel.backward(dy_rows, chunk_starts)
        })?;
        let wanted = |operand: &Tensor, gradient: Vec<f32>| {
            let tensor = || Tensor::from_vec(gradient, operand.shape(), &Device::Cpu);
            operand.track_op().then(tensor).transpose()
        };
        Ok((
            wanted(xbc, gradients.xbc)?,
            wanted(dt, gradients.dt)?,
            wanted(params, gradients.params)?,
        ))
    }
}

/// Calls `work` with the kernel over the storage of the operands.
fn with_kernel<R>(
    xbc: &Tensor,
    dt: &Tensor,
    params: &Tensor,
    shape: SsdShape,
    documents: Option<&Documents>,
    work: impl FnOnce(cpu::Ssd) -> R,
) -> Result<R> {
    let (xbc_storage, xbc_layout) = xbc.storage_and_layout();
    let (dt_storage, dt_layout) = dt.storage_and_layout();
    let (params_storage, params_layout) = params.storage_and_layout();
    Ok(work(cpu::Ssd {
        xbc: Rows::of(host(&xbc_storage)?, xbc_layout)?,
        dt: Rows::of(host(&dt_storage)?, dt_layout)?,
        params: slice(host(&params_storage)?, params_layout)?,
        shape,
        documents,
    }))
}
