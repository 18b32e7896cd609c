//! Both norms in tensor operations.

use candle_core::{D, Result, Tensor};

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    unit(x, eps)?.broadcast_mul(weight)
}

pub fn gated_rms_norm(
    y: &Tensor,
    z: &Tensor,
    weight: &Tensor,
    group: usize,
    eps: f64,
) -> Result<Tensor> {
    let v = (y * z.silu()?)?.contiguous()?;
    let d = weight.dims1()?;
    let by_group = v.reshape((v.elem_count() / d, d / group, group))?;
    unit(&by_group, eps)?
        .reshape(v.shape())?
        .broadcast_mul(weight)
}

/// `x` over its root mean square along the last axis.
fn unit(x: &Tensor, eps: f64) -> Result<Tensor> {
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean + eps)?.sqrt()?)
}
