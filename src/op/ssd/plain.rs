//! The plain recurrence, a step at a time: any device and float type, differentiable.

use super::{Documents, SsdShape};
use candle_core::{D, DType, Device, Result, Tensor};

/// Returns `y [B, T, H·P]`.
pub(super) fn ssd(
    xbc: &Tensor,
    dt: &Tensor,
    params: &Tensor,
    shape: SsdShape,
    documents: Option<&Documents>,
) -> Result<Tensor> {
    let SsdShape {
        heads: h,
        groups: g,
        head_dim: p,
        d_state: n,
        ..
    } = shape;
    let (b, t, _) = xbc.dims3()?;
    let dtype = xbc.dtype();
    let row = |i: usize| params.get(i)?.reshape((1, 1, h)); // [1, 1, H]
    let (a_log, dt_bias, skip) = (row(0)?, row(1)?, row(2)?.unsqueeze(3)?);

    let x = heads_of_groups(&xbc.narrow(2, 0, g * p)?, g, h / g, p)?; // [B, T, H, P]
    let b_in = heads_of_groups(&xbc.narrow(2, g * p, g * n)?, g, h / g, n)?; // [B, T, H, N]
    let c_out = xbc.narrow(2, g * (p + n), h * n)?.reshape((b, t, h, n))?;
    let delta = softplus(&dt.broadcast_add(&dt_bias)?)?; // [B, T, H]
    let mut decay = delta.broadcast_mul(&a_log.exp()?.neg()?)?.exp()?;
    if let Some(documents) = documents {
        let keep = (0..b).flat_map(|row| documents.row(row).iter().enumerate());
        let keep = keep.map(|(position, &start)| (position != start as usize) as u8 as f32);
        let keep = Tensor::from_iter(keep, &Device::Cpu)?.reshape((b, t, 1))?;
        decay = decay.broadcast_mul(&keep.to_device(xbc.device())?.to_dtype(dtype)?)?;
    }

    let mut s = Tensor::zeros((b, h, p, n), dtype, xbc.device())?;
    let mut ys = Vec::with_capacity(t);
    let scaled_x = x.broadcast_mul(&delta.unsqueeze(D::Minus1)?)?;
    for i in 0..t {
        let at = |tensor: &Tensor| tensor.narrow(1, i, 1)?.squeeze(1);
        let input = at(&scaled_x)?
            .unsqueeze(3)?
            .broadcast_mul(&at(&b_in)?.unsqueeze(2)?)?;
        let kept = s.broadcast_mul(&at(&decay)?.reshape((b, h, 1, 1))?)?;
        s = (kept + input)?; // [B, H, P, N]
        ys.push(
            s.broadcast_mul(&at(&c_out)?.unsqueeze(2)?)?
                .sum(D::Minus1)?,
        ); // [B, H, P]
    }
    let y = (Tensor::stack(&ys, 1)? + x.broadcast_mul(&skip)?)?;
    y.reshape((b, t, h * p))
}

/// `[B, T, G·K]` → `[B, T, H, K]`: each group serves `repeat = H / G` heads.
fn heads_of_groups(x: &Tensor, groups: usize, repeat: usize, k: usize) -> Result<Tensor> {
    let (b, t, _) = x.dims3()?;
    x.reshape((b, t, groups, 1, k))?
        .broadcast_as((b, t, groups, repeat, k))?
        .reshape((b, t, groups * repeat, k))
}

/// `max(x, 0) + ln(1 + e)` with `e = exp(−|x|)`. Plain `ln(1 + e)` would lose the small steps of f32,
/// so the logarithm is the series of `2 atanh(z)`, `z = e / (2 + e) ≤ 1/3`.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let terms = if x.dtype() == DType::F64 { 16 } else { 7 };
    let e = x.abs()?.neg()?.exp()?;
    let z = (&e / (&e + 2.)?)?;
    let z_squared = z.sqr()?;
    let mut series = z.ones_like()?.affine(1. / (2 * terms + 1) as f64, 0.)?;
    for k in (0..terms).rev() {
        series = (series * &z_squared)?.affine(1., 1. / (2 * k + 1) as f64)?;
    }
    x.relu()? + ((series * z)? * 2.)?
}
