//! The same on a GPU.

use candle_core::Result;

use super::{Decoder, Reach};
use crate::mixer::attention;
use crate::mixer::batch::{Batch, Plan};
use crate::op::cuda::{Array, Gpu};
use crate::op::window_step::cuda::step;

/// What decoding needs of the layer, in arrays `A` of a device.
#[derive(Debug)]
pub struct OnGpu<A> {
    attention: attention::OnGpu<A>,
    reach: Reach,
}

impl Decoder {
    pub(in crate::mixer) fn on<G: Gpu>(&self, gpu: &G) -> Result<OnGpu<G::Array>> {
        Ok(OnGpu {
            attention: self.attention.on(gpu)?,
            reach: self.reach,
        })
    }
}

impl<A: Array> OnGpu<A> {
    pub(in crate::mixer) fn prepare(&self, plan: &mut Plan) {
        self.attention.prepare_around(plan);
    }

    /// `x [N, D]` → `[N, D]`.
    pub(in crate::mixer) fn mix<G: Gpu<Array = A>>(
        &self,
        batch: &Batch<G>,
        layer: usize,
        x: &A,
    ) -> Result<A> {
        let c = &self.attention.config;
        let sizes = [c.num_attention_heads, c.num_key_value_heads, c.head_dim];
        let places = batch.states(layer);
        self.attention.around(batch, x, |qkv| {
            step(batch.gpu, &places, qkv, sizes, self.reach, c.scale() as f32)
        })
    }
}
