//! Launches of AdamW, in place on the arrays.

use candle_core::{DType, Result};

use super::AdamW;
use super::eight_bit::BLOCK;
use crate::op::cuda::{Arg, Array, Gpu, Launch, parts};

/// What a step multiplies by, in the kernels' order.
fn factors<'a, A>(grad_scale: f64, step: u64, hyper: &AdamW) -> [Arg<'a, A>; 9] {
    let f = super::factors(step, hyper);
    [
        grad_scale as f32,
        hyper.beta1 as f32,
        hyper.beta2 as f32,
        (1. - hyper.beta1) as f32,
        (1. - hyper.beta2) as f32,
        f.keep,
        f.rate,
        f.deviation,
        f.eps,
    ]
    .map(Arg::F32)
}

/// `moments [2, n]`
pub fn step<G: Gpu>(
    gpu: &G,
    param: &G::Array,
    grad: &G::Array,
    moments: &G::Array,
    grad_scale: f64,
    step: u64,
    hyper: &AdamW,
) -> Result<()> {
    let n = param.len();
    let mut args = vec![param.into(), grad.into(), moments.into(), Arg::long(n)];
    args.extend(factors(grad_scale, step, hyper));
    Launch::elements("adamw_f32", n, 4).run(gpu, &args)
}

/// `codes [2, n]` (u8), `scales [2, blocks]`
pub fn step_8bit<G: Gpu>(
    gpu: &G,
    param: &G::Array,
    grad: &G::Array,
    [codes, scales]: [&G::Array; 2],
    grad_scale: f64,
    step: u64,
    hyper: &AdamW,
) -> Result<()> {
    let n = param.len();
    let mut args = vec![
        param.into(),
        grad.into(),
        codes.into(),
        scales.into(),
        Arg::long(n),
    ];
    args.extend(factors(grad_scale, step, hyper));
    let launch = Launch {
        kernel: "adamw_8bit".into(),
        // Some blocks of entries for each of the device's, which has their codes' meanings at hand.
        grid: [n.div_ceil(BLOCK).min(4096), 1, 1],
        threads: BLOCK as u32,
        shared: 0,
    };
    launch.run(gpu, &args)
}

/// Parts of the sum, in f64.
pub fn sum_of_squares<G: Gpu>(gpu: &G, x: &G::Array) -> Result<G::Array> {
    let mut launch = Launch::elements("sum_of_squares", x.len(), 1);
    launch.grid[0] = parts(launch.grid[0]);
    let sums = gpu.empty(DType::F64, launch.grid[0])?;
    launch.run(gpu, &[x.into(), (&sums).into(), Arg::long(x.len())])?;
    Ok(sums)
}
