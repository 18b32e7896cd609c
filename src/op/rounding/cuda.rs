//! The launch of stochastic rounding.

use candle_core::Result;

use crate::op::cuda::{Arg, Array, Gpu, Launch};

/// `from` in f32, `to` in bf16.
pub fn round<G: Gpu>(gpu: &G, from: &G::Array, to: &G::Array, key: u64) -> Result<()> {
    let [first, second] = super::halves(key).map(|half| Arg::I32(half as i32));
    let args = [from.into(), to.into(), Arg::long(from.len()), first, second];
    Launch::elements("round_bf16", from.len(), 1).run(gpu, &args)
}
