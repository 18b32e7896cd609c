//! Launches of the rotation.

use candle_core::Result;

use super::RopeLayout;
use crate::op::cuda::{Arg, Array, Gpu, Launch, named, pack};

/// `x [B, T, H, K]` with `dims = [H, K]`, tables `[T, K/2]`; `sign` −1 turns back.
pub fn rope<G: Gpu>(
    gpu: &G,
    x: &G::Array,
    cos: &G::Array,
    sin: &G::Array,
    [heads, k]: [usize; 2],
    layout: RopeLayout,
    sign: f32,
) -> Result<G::Array> {
    let dtype = x.dtype();
    let y = gpu.empty(dtype, x.len())?;
    if k == 0 {
        return Ok(y);
    }
    let (kernel, pairs) = match layout {
        RopeLayout::Halves => ("rope_halves", pack(dtype)),
        RopeLayout::Interleaved => ("rope_interleaved", pack(dtype) / 2),
    };
    let (heads_in_all, half) = (x.len() / k, k / 2);
    let args = [
        x.into(),
        cos.into(),
        sin.into(),
        (&y).into(),
        Arg::long(heads_in_all),
        Arg::int(cos.len() / half)?,
        Arg::int(heads)?,
        Arg::int(half)?,
        sign.into(),
    ];
    let threads = heads_in_all * half.div_ceil(pairs);
    Launch::elements(named(kernel, dtype), threads, 1).run(gpu, &args)?;
    Ok(y)
}
