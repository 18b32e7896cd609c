//! The same on a GPU.

use std::sync::Arc;

use candle_core::Result;

use super::{Decoder, LORA_NORM_EPS, MlaConfig};
use crate::mixer::batch::{Batch, Plan};
use crate::mixer::rotary::Rotary;
use crate::op::cuda::{Array, Gpu, upload_each};
use crate::op::linear::cuda::{Groups, Weight, add_bias};
use crate::op::paged_attention::cuda::{Heads, attend, write};
use crate::op::rms_norm::cuda::forward as rms_norm;
use crate::op::rope::RopeLayout;
use crate::op::rope::cuda::rope;

/// What decoding needs of the layer, in arrays `A` of a device.
#[derive(Debug)]
pub struct OnGpu<A> {
    config: MlaConfig,
    q_a_proj: Weight<A>,
    q_b_proj: Weight<A>,
    latent_proj: Weight<A>,
    rope_proj: Option<Weight<A>>,
    /// `[G, nope, R]`
    key_up: Groups<A>,
    /// `[G, R, V]`
    value_up: Groups<A>,
    out_proj: Weight<A>,
    /// Of the queries' latent, the latent and the rotary key.
    biases: Option<[A; 3]>,
    norms: Option<[A; 2]>,
    rotary: Arc<Rotary>,
}

impl Decoder {
    pub(in crate::mixer) fn on<G: Gpu>(&self, gpu: &G) -> Result<OnGpu<G::Array>> {
        let c = &self.config;
        let (g, r) = (c.kv_heads(), c.kv_lora_rank);
        Ok(OnGpu {
            config: c.clone(),
            q_a_proj: Weight::new(gpu, &self.q_a_proj)?,
            q_b_proj: Weight::new(gpu, &self.q_b_proj)?,
            latent_proj: Weight::new(gpu, &self.latent_proj)?,
            rope_proj: match &self.rope_proj {
                Some(w) => Some(Weight::new(gpu, w)?),
                None => None,
            },
            key_up: Groups {
                entries: gpu.upload_f32(&self.key_up)?,
                dims: [g, c.qk_nope_head_dim, r],
            },
            value_up: Groups {
                entries: gpu.upload_f32(&self.value_up)?,
                dims: [g, r, c.v_head_dim],
            },
            out_proj: Weight::new(gpu, &self.out_proj)?,
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
            groups: 1,
            dim: c.kv_lora_rank + c.qk_rope_head_dim,
            v_dim: c.kv_lora_rank,
            values: None,
            scale: c.scale() as f32,
        }
    }

    pub(in crate::mixer) fn prepare(&self, plan: &mut Plan) -> Result<()> {
        if self.config.qk_rope_head_dim > 0 {
            plan.turn(&self.rotary, 0);
            plan.turn(&self.rotary, self.config.qk_nope_head_dim / 2);
        }
        plan.tile(self.heads().together()?);
        Ok(())
    }

    /// `x [N, D]` → `[N, D]`.
    pub(in crate::mixer) fn mix<G: Gpu<Array = A>>(
        &self,
        batch: &Batch<G>,
        layer: usize,
        x: &A,
    ) -> Result<A> {
        let (c, gpu) = (&self.config, batch.gpu);
        let (h, r, rope_dim) = (c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim);
        let mut low = self.q_a_proj.product(gpu, x)?;
        let mut latents = self.latent_proj.product(gpu, x)?;
        let keys = self.rope_proj.as_ref().map(|w| w.product(gpu, x));
        let mut keys = keys.transpose()?;
        if let Some([of_q, of_latent, of_key]) = &self.biases {
            add_bias(gpu, &low, of_q)?;
            add_bias(gpu, &latents, of_latent)?;
            if let Some(keys) = &keys {
                add_bias(gpu, keys, of_key)?;
            }
        }
        if let Some([q_norm, kv_norm]) = &self.norms {
            low = rms_norm(gpu, &low, q_norm, LORA_NORM_EPS as f32)?;
            latents = rms_norm(gpu, &latents, kv_norm, LORA_NORM_EPS as f32)?;
        }
        let mut q = self.q_b_proj.product(gpu, &low)?;
        if let Some(keys) = &mut keys {
            let pairs = RopeLayout::Interleaved;
            let [cos, sin] = batch.turns(&self.rotary, 0);
            *keys = rope(gpu, keys, cos, sin, [1, rope_dim], pairs, 1.)?;
            let [cos, sin] = batch.turns(&self.rotary, c.qk_nope_head_dim / 2);
            q = rope(gpu, &q, cos, sin, [h, c.qk_head_dim()], pairs, 1.)?;
        }
        let (heads, (places, planes)) = (self.heads(), batch.pages(layer));
        write(gpu, &places, planes, [0, 1], &latents, keys.as_ref())?;
        let queries = self
            .key_up
            .product(gpu, &q, [h, c.qk_head_dim()], rope_dim)?;
        let tiles = batch.tiles(heads.together()?);
        let contexts = attend(gpu, &places, tiles, planes, &heads, &queries)?;
        let values = self.value_up.product(gpu, &contexts, [h, r], 0)?;
        self.out_proj.product(gpu, &values)
    }
}
