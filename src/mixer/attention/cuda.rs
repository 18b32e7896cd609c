//! The same on a GPU.

use std::sync::Arc;

use candle_core::Result;

use super::{AttentionConfig, Decoder};
use crate::mixer::batch::{Batch, Plan};
use crate::mixer::rotary::Rotary;
use crate::op::cuda::{Array, Gpu, upload_each};
use crate::op::linear::cuda::{Weight, add_bias};
use crate::op::paged_attention::cuda::{Heads, attend, write};
use crate::op::rms_norm::cuda::forward as rms_norm;
use crate::op::rope::RopeLayout;
use crate::op::rope::cuda::rope;

/// What decoding needs of the layer, in arrays `A` of a device.
#[derive(Debug)]
pub struct OnGpu<A> {
    pub(in crate::mixer) config: AttentionConfig,
    q_proj: Weight<A>,
    k_proj: Weight<A>,
    v_proj: Weight<A>,
    o_proj: Weight<A>,
    biases: Option<[A; 3]>,
    norms: Option<[A; 2]>,
    rotary: Option<Arc<Rotary>>,
}

impl Decoder {
    pub(in crate::mixer) fn on<G: Gpu>(&self, gpu: &G) -> Result<OnGpu<G::Array>> {
        Ok(OnGpu {
            config: self.config.clone(),
            q_proj: Weight::new(gpu, &self.q_proj)?,
            k_proj: Weight::new(gpu, &self.k_proj)?,
            v_proj: Weight::new(gpu, &self.v_proj)?,
            o_proj: Weight::new(gpu, &self.o_proj)?,
            biases: upload_each(gpu, self.biases.as_ref())?,
            norms: upload_each(gpu, self.norms.as_ref())?,
            rotary: self.rotary.clone(),
        })
    }
}

impl<A: Array> OnGpu<A> {
    fn heads(&self) -> Heads {
        let c = &self.config;
        Heads {
            heads: c.num_attention_heads,
            groups: c.num_key_value_heads,
            dim: c.head_dim,
            v_dim: c.head_dim,
            values: Some(c.num_key_value_heads),
            scale: c.scale() as f32,
        }
    }

    /// Asks for what [`OnGpu::around`] reads.
    pub(in crate::mixer) fn prepare_around(&self, plan: &mut Plan) {
        if let Some(rotary) = &self.rotary {
            plan.turn(rotary, 0);
        }
    }

    pub(in crate::mixer) fn prepare(&self, plan: &mut Plan) -> Result<()> {
        self.prepare_around(plan);
        plan.tile(self.heads().together()?);
        Ok(())
    }

    /// Projects and turns `x [N, D]`, lets `heads` make `[N, H, hd]` of queries, keys and values, and projects that: `[N, D]`.
    pub(in crate::mixer) fn around<G: Gpu<Array = A>>(
        &self,
        batch: &Batch<G>,
        x: &A,
        heads: impl FnOnce([&A; 3]) -> Result<A>,
    ) -> Result<A> {
        let (c, gpu) = (&self.config, batch.gpu);
        let (h, g, hd) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let mut q = self.q_proj.product(gpu, x)?;
        let mut k = self.k_proj.product(gpu, x)?;
        let v = self.v_proj.product(gpu, x)?;
        if let Some([of_q, of_k, of_v]) = &self.biases {
            add_bias(gpu, &q, of_q)?;
            add_bias(gpu, &k, of_k)?;
            add_bias(gpu, &v, of_v)?;
        }
        if let (Some([of_q, of_k]), Some(eps)) = (&self.norms, c.qk_norm_eps) {
            q = rms_norm(gpu, &q, of_q, eps as f32)?;
            k = rms_norm(gpu, &k, of_k, eps as f32)?;
        }
        if let Some(rotary) = &self.rotary {
            let [cos, sin] = batch.turns(rotary, 0);
            q = rope(gpu, &q, cos, sin, [h, hd], RopeLayout::Halves, 1.)?;
            k = rope(gpu, &k, cos, sin, [g, hd], RopeLayout::Halves, 1.)?;
        }
        self.o_proj.product(gpu, &heads([&q, &k, &v])?)
    }

    /// `x [N, D]` → `[N, D]`.
    pub(in crate::mixer) fn mix<G: Gpu<Array = A>>(
        &self,
        batch: &Batch<G>,
        layer: usize,
        x: &A,
    ) -> Result<A> {
        let (gpu, heads) = (batch.gpu, self.heads());
        let (places, planes) = batch.pages(layer);
        let g = heads.groups;
        self.around(batch, x, |[q, k, v]| {
            write(gpu, &places, planes, [0, g], k, None)?;
            write(gpu, &places, planes, [g, g], v, None)?;
            let tiles = batch.tiles(heads.together()?);
            attend(gpu, &places, tiles, planes, &heads, q)
        })
    }
}
