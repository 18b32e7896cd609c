//! Causal grouped-query attention with document boundaries, block by block: no `T × S` matrix of all
//! heads ever exists (after FlashAttention, arXiv 2205.14135).

mod cpu;
pub mod online;
mod plain;
#[cfg(test)]
mod tests;

use crate::op::route::{Kernels, Route};
use std::sync::Mutex;

use super::Documents;
use crate::op::cpu::{host, slice};
use candle_core::{CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor, bail};
use cpu::{Heads, Problem};

const KERNELS: Kernels = Kernels::f32("attention");

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
    if KERNELS.route(&[q, k, v]) == Route::Plain {
        return plain::causal_attention(q, k, v, scale, sight);
    }
    let op = CausalAttention {
        scale: scale as f32,
        sight: sight.clone(),
        log_sums: Mutex::new(Vec::new()),
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
    /// Of every query's scores, `[B, T, H]`: kept by the forward pass for the backward pass.
    log_sums: Mutex<Vec<f32>>,
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
        *self.log_sums.lock().unwrap_or_else(|e| e.into_inner()) = log_sums;
        Ok((CpuStorage::F32(y), (b, t, h, v_dim).into()))
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
            &self.log_sums.lock().unwrap_or_else(|e| e.into_inner()),
        );
        Ok((
            Some(Tensor::from_vec(dq, q.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(dk, k.shape(), &Device::Cpu)?),
            Some(Tensor::from_vec(dv, v.shape(), &Device::Cpu)?),
        ))
    }
}
