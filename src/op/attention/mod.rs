//! Causal grouped-query attention with document boundaries, block by block: no `T × S` matrix of all
//! heads ever exists (after FlashAttention, arXiv 2205.14135).

mod cpu;
#[cfg(any(feature = "cuda", test))]
mod cuda;
pub mod online;
mod plain;
#[cfg(test)]
mod tests;

use crate::op::route::{Kernels, Route};
use std::sync::OnceLock;

use super::Documents;
use crate::op::cpu::{host, slice};
#[cfg(feature = "cuda")]
use crate::op::cuda::{Cuda, Gpu};
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail};
use cpu::{Heads, Problem};

const KERNELS: Kernels = Kernels::f32("attention").cuda(&[DType::F32, DType::BF16]);

/// Entries of keys and of values that CUDA's kernels take, at most.
const LARGEST: [usize; 2] = [192, 128];

/// Which keys a query sees, beside that none comes after it.
#[derive(Debug, Clone, Default)]
pub struct Sight {
    /// Of packed sequences: from the document's start on. Needs `S = T`.
    pub documents: Option<Documents>,
    /// The nearest keys and the first ones only.
    pub window: Option<Window>,
}

/// A sliding window with attention sinks (StreamingLLM, arXiv 2309.17453).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Keys up to and with the query's own.
    pub size: usize,
    /// First keys of a document, seen from everywhere.
    pub sinks: usize,
}

impl From<Option<&Documents>> for Sight {
    fn from(documents: Option<&Documents>) -> Self {
        Self {
            documents: documents.cloned(),
            ..Self::default()
        }
    }
}

impl Sight {
    /// Where the document of query `t` of row `b` starts.
    fn start(&self, b: usize, t: usize) -> usize {
        let row = |d: &Documents| d.row(b)[t] as usize;
        self.documents.as_ref().map_or(0, row)
    }

    /// Keys that a query at key position `at`, of a document from `start` on, sees: up to the first bound, and from the second
    /// up to itself.
    fn bounds(&self, start: usize, at: usize) -> (usize, usize) {
        match self.window {
            None => (start, start),
            Some(window) => {
                let near = (at + 1).saturating_sub(window.size).max(start);
                ((start + window.sinks).min(near), near)
            }
        }
    }
}

/// `q [B, T, H, K]`, `k [B, S, G, K]`, `v [B, S, G, V]` → `[B, T, H, V]`, `H` a multiple of `G`; query `t` stands at key `S − T + t`.
/// Views with contiguous heads are read where they stand.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    sight: &Sight,
) -> Result<Tensor> {
    let (b, t, h, dim) = q.dims4()?;
    let (_, s, g, _) = k.dims4()?;
    let (_, _, _, v_dim) = v.dims4()?;
    if k.dims() != [b, s, g, dim] || v.dims() != [b, s, g, v_dim] || g == 0 || h % g != 0 || t > s {
        bail!(
            "attention: q {:?}, k {:?} and v {:?} do not fit",
            q.shape(),
            k.shape(),
            v.shape()
        );
    }
    if let Some(d) = &sight.documents
        && ((d.batch(), d.len()) != (b, t) || s != t)
    {
        bail!(
            "attention: documents [{}, {}] do not fit q {:?} and {s} keys",
            d.batch(),
            d.len(),
            q.shape()
        );
    }
    if let Some(half) = KERNELS.rounds(&[q, k, v]) {
        let [q, k, v] = [q, k, v].map(|x| x.to_dtype(DType::F32));
        return causal_attention(&q?, &k?, &v?, scale, sight)?.to_dtype(half);
    }
    // Of CUDA's kernels.
    let strange = q.device().is_cuda() && (scale <= 0. || dim > LARGEST[0] || v_dim > LARGEST[1]);
    if strange || KERNELS.route(&[q, k, v]) == Route::Plain {
        return plain::causal_attention(q, k, v, scale, sight);
    }
    let op = CausalAttention {
        scale: scale as f32,
        sight: sight.clone(),
        log_sums: OnceLock::new(),
    };
    q.contiguous()?
        .apply_op3(&with_heads(k)?, &with_heads(v)?, op)
}

/// The tensor itself if its last axis is contiguous, else a copy.
fn with_heads(x: &Tensor) -> Result<Tensor> {
    match x.stride().last() {
        Some(1) => Ok(x.clone()),
        _ => x.force_contiguous(),
    }
}

struct CausalAttention {
    scale: f32,
    sight: Sight,
    /// Of every query's scores, `[B, T, H]` on the CPU, `[B, H, T]` on a GPU: kept by the forward pass for the backward pass.
    log_sums: OnceLock<Tensor>,
}

impl CausalAttention {
    fn problem<'a>(
        &'a self,
        q: &'a [f32],
        q_dims: &[usize],
        k: Heads<'a>,
        v: Heads<'a>,
    ) -> Problem<'a> {
        Problem {
            q,
            q_dims: [q_dims[0], q_dims[1], q_dims[2], q_dims[3]],
            k,
            v,
            scale: self.scale,
            sight: &self.sight,
        }
    }
}

#[cfg(feature = "cuda")]
impl CausalAttention {
    fn launches<'a, G: Gpu>(
        &'a self,
        gpu: &'a G,
        q: &'a G::Array,
        q_dims: &[usize],
        [k, v]: [cuda::Heads<'a, G::Array>; 2],
    ) -> cuda::Attention<'a, G> {
        cuda::Attention {
            gpu,
            q,
            q_dims: [q_dims[0], q_dims[1], q_dims[2], q_dims[3]],
            k,
            v,
            scale: self.scale,
            sight: &self.sight,
        }
    }
}

impl CustomOp3 for CausalAttention {
    fn name(&self) -> &'static str {
        "causal_attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (b, t, h, _) = q_layout.shape().dims4()?;
        let (_, _, _, v_dim) = v_layout.shape().dims4()?;
        let (k, v) = (Heads::of(k, k_layout)?, Heads::of(v, v_layout)?);
        let (y, log_sums) = self
            .problem(slice(q, q_layout)?, q_layout.dims(), k, v)
            .forward();
        let log_sums = Tensor::from_vec(log_sums, (b, t, h), &Device::Cpu)?;
        self.log_sums.get_or_init(|| log_sums);
        Ok((CpuStorage::F32(y), (b, t, h, v_dim).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        q_layout: &Layout,
        k: &CudaStorage,
        k_layout: &Layout,
        v: &CudaStorage,
        v_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (b, t, h, _) = q_layout.shape().dims4()?;
        let (_, _, _, v_dim) = v_layout.shape().dims4()?;
        let gpu = Cuda::new(&q.device)?;
        let [q, k, v] = [
            gpu.array(q, q_layout)?,
            gpu.view(k, k_layout)?,
            gpu.view(v, v_layout)?,
        ];
        let heads = [
            cuda::Heads::of(&k, k_layout)?,
            cuda::Heads::of(&v, v_layout)?,
        ];
        let launches = self.launches(&gpu, &q, q_layout.dims(), heads);
        let [y, log_sums] = launches.forward()?;
        let log_sums = log_sums.into_tensor((b, h, t))?;
        self.log_sums.get_or_init(|| log_sums);
        Ok((y.into_storage()?, (b, t, h, v_dim).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let kept = self.log_sums.get();
        let log_sums = kept.expect("candle records the operation after its forward pass");
        #[cfg(feature = "cuda")]
        if dy.device().is_cuda() {
            let gpu = Cuda::of(&dy)?;
            let [k_entries, v_entries] = [gpu.tensor_view(k)?, gpu.tensor_view(v)?];
            let heads = [
                cuda::Heads::of(&k_entries, k.layout())?,
                cuda::Heads::of(&v_entries, v.layout())?,
            ];
            let [q_entries, y, dy] = [gpu.tensor(q)?, gpu.tensor(y)?, gpu.tensor(&dy)?];
            let launches = self.launches(&gpu, &q_entries, q.dims(), heads);
            let [dq, dk, dv] = launches.backward(&y, &dy, &gpu.tensor(log_sums)?)?;
            return Ok((
                Some(dq.into_tensor(q.shape())?),
                Some(dk.into_tensor(k.shape())?),
                Some(dv.into_tensor(v.shape())?),
            ));
        }
        let (sums_storage, sums_layout) = log_sums.storage_and_layout();
        let (q_storage, q_layout) = q.storage_and_layout();
        let (k_storage, k_layout) = k.storage_and_layout();
        let (v_storage, v_layout) = v.storage_and_layout();
        let (y_storage, y_layout) = y.storage_and_layout();
        let (dy_storage, dy_layout) = dy.storage_and_layout();
        let heads = (
            Heads::of(host(&k_storage)?, k_layout)?,
            Heads::of(host(&v_storage)?, v_layout)?,
        );
        let problem = self.problem(
            slice(host(&q_storage)?, q_layout)?,
            q.dims(),
            heads.0,
            heads.1,
        );
        let [dq, dk, dv] = problem.backward(
            slice(host(&y_storage)?, y_layout)?,
            slice(host(&dy_storage)?, dy_layout)?,
            slice(host(&sums_storage)?, sums_layout)?,
        );
        Ok((
            Some(Tensor::from_vec(dq, q.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(dk, k.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(dv, v.shape(), &Device::Cpu)?),
        ))
    }
}
