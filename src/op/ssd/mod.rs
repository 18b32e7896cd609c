//! The state-space dual of Mamba2 (Dao & Gu 2024).

mod backward;
mod cpu;
mod lanes;
mod plain;
mod resume;
#[cfg(test)]
mod tests;

use super::Documents;
use crate::op::cpu::{Rows, host, slice, with_rows};
use crate::op::route::{Kernels, Route};
use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, bail};
use std::sync::OnceLock;

pub use resume::resume;

const KERNELS: Kernels = Kernels::f32("ssd");

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
    if KERNELS.route(&[xbc, dt, params]) == Route::Plain {
        return plain::ssd(xbc, dt, params, shape, documents);
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
    chunk_starts: Option<OnceLock<Vec<Vec<lanes::Tile>>>>,
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
            cell.get_or_init(|| forward.chunk_starts);
        }
        let y_shape = Shape::from((b, t, self.shape.heads * self.shape.head_dim));
        Ok((CpuStorage::F32(forward.y), y_shape))
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
        let dy = with_rows(dy)?;
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let dy_rows = Rows::of(host(&dy_storage)?, dy_layout)?;
        let documents = self.documents.as_ref();
        let kept = self.chunk_starts.as_ref().and_then(OnceLock::get);
        let chunk_starts = kept.expect("candle records the operation after its forward pass");
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
