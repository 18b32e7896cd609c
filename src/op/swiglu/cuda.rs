//! Launches of SwiGLU.

use candle_core::Result;

use crate::op::cuda::{Arg, Array, Gpu, Launch, named, pack};

pub fn forward<G: Gpu>(gpu: &G, gate: &G::Array, up: &G::Array) -> Result<G::Array> {
    let (n, dtype) = (gate.len(), gate.dtype());
    let y = gpu.empty(dtype, n)?;
    let args = [gate.into(), up.into(), (&y).into(), Arg::long(n)];
    Launch::elements(named("swiglu", dtype), n, pack(dtype)).run(gpu, &args)?;
    Ok(y)
}

/// Gradients of `gate` and `up`.
pub fn backward<G: Gpu>(
    gpu: &G,
    gate: &G::Array,
    up: &G::Array,
    dy: &G::Array,
) -> Result<[G::Array; 2]> {
    let (n, dtype) = (gate.len(), gate.dtype());
    let (dgate, dup) = (gpu.empty(dtype, n)?, gpu.empty(dtype, n)?);
    let args = [
        gate.into(),
        up.into(),
        dy.into(),
        (&dgate).into(),
        (&dup).into(),
        Arg::long(n),
    ];
    Launch::elements(named("swiglu_back", dtype), n, pack(dtype)).run(gpu, &args)?;
    Ok([dgate, dup])
}
