//! Launches of both norms.

use candle_core::{DType, Result, bail};

use crate::op::cuda::{Arg, Array, Gpu, Launch, named, parts, sum_rows};

/// Channels of a group, each with a sum in the 99 KB of shared memory that a block has on every device since Ampere.
const WIDEST: usize = 24_576;

pub fn forward<G: Gpu>(gpu: &G, x: &G::Array, weight: &G::Array, eps: f32) -> Result<G::Array> {
    let (d, dtype) = (weight.len(), x.dtype());
    let out = gpu.empty(dtype, x.len())?;
    let args = [
        x.into(),
        weight.into(),
        (&out).into(),
        Arg::int(d)?,
        eps.into(),
    ];
    Launch::rows(named("rms_norm", dtype), x.len() / d, d, dtype).run(gpu, &args)?;
    Ok(out)
}

/// Gradients of `x` and `weight`.
pub fn backward<G: Gpu>(
    gpu: &G,
    x: &G::Array,
    weight: &G::Array,
    dout: &G::Array,
    eps: f32,
) -> Result<[G::Array; 2]> {
    let (d, dtype) = (weight.len(), x.dtype());
    let rows = x.len() / d;
    let (launch, dweight) = back(gpu, "rms_norm_back", rows, d, d, dtype)?;
    let dx = gpu.empty(dtype, x.len())?;
    let args = [
        x.into(),
        weight.into(),
        dout.into(),
        (&dx).into(),
        (&dweight).into(),
        Arg::int(rows)?,
        Arg::int(d)?,
        eps.into(),
    ];
    launch.run(gpu, &args)?;
    Ok([dx, sum_rows(gpu, &dweight, d, dtype)?])
}

pub fn gated_forward<G: Gpu>(
    gpu: &G,
    y: &G::Array,
    z: &G::Array,
    weight: &G::Array,
    group: usize,
    eps: f32,
) -> Result<G::Array> {
    let dtype = y.dtype();
    let out = gpu.empty(dtype, y.len())?;
    let args = [
        y.into(),
        z.into(),
        weight.into(),
        (&out).into(),
        Arg::int(weight.len() / group)?,
        Arg::int(group)?,
        eps.into(),
    ];
    let groups = y.len() / group;
    Launch::rows(named("gated_rms_norm", dtype), groups, group, dtype).run(gpu, &args)?;
    Ok(out)
}

/// Gradients of `y`, `z` and `weight`.
pub fn gated_backward<G: Gpu>(
    gpu: &G,
    y: &G::Array,
    z: &G::Array,
    weight: &G::Array,
    dout: &G::Array,
    group: usize,
    eps: f32,
) -> Result<[G::Array; 3]> {
    let (d, dtype) = (weight.len(), y.dtype());
    let rows = y.len() / d;
    let (launch, dweight) = back(gpu, "gated_rms_norm_back", rows, d, group, dtype)?;
    let dy = gpu.empty(dtype, y.len())?;
    let dz = gpu.empty(dtype, y.len())?;
    let args = [
        y.into(),
        z.into(),
        weight.into(),
        dout.into(),
        (&dy).into(),
        (&dz).into(),
        (&dweight).into(),
        Arg::int(rows)?,
        Arg::int(group)?,
        eps.into(),
    ];
    launch.run(gpu, &args)?;
    Ok([dy, dz, sum_rows(gpu, &dweight, d, dtype)?])
}

/// The launch of a backward pass, and where its blocks leave their parts of the weight's gradient.
fn back<G: Gpu>(
    gpu: &G,
    kernel: &str,
    rows: usize,
    d: usize,
    group: usize,
    dtype: DType,
) -> Result<(Launch, G::Array)> {
    if group > WIDEST {
        bail!("rms_norm: groups of {group} channels where the kernel takes up to {WIDEST}");
    }
    let parts = parts(rows);
    let mut launch = Launch::rows(named(kernel, dtype), parts, group, dtype);
    launch.grid[1] = d / group;
    launch.shared = group * size_of::<f32>();
    Ok((launch, gpu.empty(DType::F32, parts * d)?))
}
