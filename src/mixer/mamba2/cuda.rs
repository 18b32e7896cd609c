//! The same on a GPU.

use candle_core::Result;

use super::{Decoder, Mamba2Config, NORM_EPS};
use crate::mixer::batch::Batch;
use crate::op::cuda::{Array, Gpu};
use crate::op::linear::cuda::Weight;
use crate::op::mamba2_step::cuda::{Own, Projected, Sizes, step};

/// What decoding needs of the layer, in arrays `A` of a device.
#[derive(Debug)]
pub struct OnGpu<A> {
    config: Mamba2Config,
    z_proj: Weight<A>,
    xbc_proj: Weight<A>,
    dt_proj: Weight<A>,
    /// `[W, C]`
    taps: A,
    bias: A,
    /// `A_log`, `dt_bias`, `D`, `[3, H]`.
    params: A,
    norm: A,
    out_proj: Weight<A>,
}

impl Decoder {
    pub(in crate::mixer) fn on<G: Gpu>(&self, gpu: &G) -> Result<OnGpu<G::Array>> {
        Ok(OnGpu {
            config: self.config.clone(),
            z_proj: Weight::new(gpu, &self.z_proj)?,
            xbc_proj: Weight::new(gpu, &self.xbc_proj)?,
            dt_proj: Weight::new(gpu, &self.dt_proj)?,
            taps: gpu.upload_f32(&self.taps)?,
            bias: gpu.upload_f32(&self.bias)?,
            params: gpu.upload_f32(&self.params)?,
            norm: gpu.upload_f32(&self.norm)?,
            out_proj: Weight::new(gpu, &self.out_proj)?,
        })
    }
}

impl<A: Array> OnGpu<A> {
    /// `u [N, D]` → `[N, D]`.
    pub(in crate::mixer) fn mix<G: Gpu<Array = A>>(
        &self,
        batch: &Batch<G>,
        layer: usize,
        u: &A,
    ) -> Result<A> {
        let (c, gpu) = (&self.config, batch.gpu);
        let tokens = Projected {
            z: &self.z_proj.product(gpu, u)?,
            xbc: &self.xbc_proj.product(gpu, u)?,
            dt: &self.dt_proj.product(gpu, u)?,
        };
        let own = Own {
            taps: &self.taps,
            bias: &self.bias,
            params: &self.params,
            norm: &self.norm,
        };
        let sizes = Sizes {
            heads: c.num_heads,
            groups: c.groups(),
            projected: c.num_kv_heads,
            p: c.head_dim,
            n: c.d_state,
            width: c.d_conv,
            eps: NORM_EPS as f32,
        };
        let y = step(gpu, &batch.states(layer), &tokens, &own, sizes)?;
        self.out_proj.product(gpu, &y)
    }
}
