//! Mixers that decode on a GPU.

use candle_core::Result;

use super::batch::{Batch, Plan};
use super::{Decoder, attention, mamba2, mla, window};
use crate::op::cuda::{Array, Gpu};

/// A mixer that reads the next tokens of sequences, in f32 over weights that stand in arrays `A` of a device.
#[derive(Debug)]
pub enum OnGpu<A> {
    Attention(attention::OnGpu<A>),
    Mla(mla::OnGpu<A>),
    Mamba2(mamba2::OnGpu<A>),
    Window(window::OnGpu<A>),
}

impl Decoder {
    /// The same on a device.
    ///
    /// # Errors
    /// A device without room for the weights.
    pub fn on<G: Gpu>(&self, gpu: &G) -> Result<OnGpu<G::Array>> {
        Ok(match self {
            Self::Attention(m) => OnGpu::Attention(m.on(gpu)?),
            Self::Mla(m) => OnGpu::Mla(m.on(gpu)?),
            Self::Mamba2(m) => OnGpu::Mamba2(m.on(gpu)?),
            Self::Window(m) => OnGpu::Window(m.on(gpu)?),
        })
    }
}

impl<A: Array> OnGpu<A> {
    /// Asks for what [`OnGpu::mix`] reads of the host.
    ///
    /// # Errors
    /// Sizes that no kernel is made for.
    pub fn prepare(&self, plan: &mut Plan) -> Result<()> {
        match self {
            Self::Attention(m) => m.prepare(plan),
            Self::Mla(m) => m.prepare(plan),
            Self::Mamba2(_) => Ok(()),
            Self::Window(m) => {
                m.prepare(plan);
                Ok(())
            }
        }
    }

    /// The next tokens of some sequences, as layer `layer` of their memories, in which there is room for them: `x [N, D]` → `[N, D]`.
    pub fn mix<G: Gpu<Array = A>>(&self, batch: &Batch<G>, layer: usize, x: &A) -> Result<A> {
        match self {
            Self::Attention(m) => m.mix(batch, layer, x),
            Self::Mla(m) => m.mix(batch, layer, x),
            Self::Mamba2(m) => m.mix(batch, layer, x),
            Self::Window(m) => m.mix(batch, layer, x),
        }
    }
}
