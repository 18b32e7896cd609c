//! Attention in tensor operations: all scores at once.

use super::Sight;
use candle_core::{D, Result, Tensor};

pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    sight: &Sight,
) -> Result<Tensor> {
    let (b, t, h, _) = q.dims4()?;
    let (_, s, g, _) = k.dims4()?;
    // [B, S, G, X] → [B, H, S, X]
    let spread = |x: &Tensor| -> Result<Tensor> {
        let x_dim = x.dim(D::Minus1)?;
        x.contiguous()?
            .reshape((b, s, g, 1, x_dim))?
            .broadcast_as((b, s, g, h / g, x_dim))?
            .reshape((b, s, h, x_dim))?
            .transpose(1, 2)?
            .contiguous()
    };
    let q = q.transpose(1, 2)?.contiguous()?;
    let scores = (q.matmul(&spread(k)?.transpose(2, 3)?.contiguous()?)? * scale)?;
    let scores = scores.broadcast_add(&mask(b, t, s, sight, q.device())?.to_dtype(q.dtype())?)?;
    let largest = scores.max_keepdim(D::Minus1)?.detach();
    let weights = scores.broadcast_sub(&largest)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    weights.matmul(&spread(v)?)?.transpose(1, 2)?.contiguous()
}

/// `[B, 1, T, S]`: 0 where a query sees a key, a very negative number elsewhere.
fn mask(
    b: usize,
    t: usize,
    s: usize,
    sight: &Sight,
    device: &candle_core::Device,
) -> Result<Tensor> {
    let mut mask = Vec::with_capacity(b * t * s);
    for row in 0..b {
        for i in 0..t {
            let (start, at) = (sight.start(row, i), s - t + i);
            let (far, near) = sight.bounds(start, at);
            let seen = |j: usize| (start..far).contains(&j) || (near..=at).contains(&j);
            mask.extend((0..s).map(|j| if seen(j) { 0f32 } else { -1e30 }));
        }
    }
    Tensor::from_vec(mask, (b, 1, t, s), device)
}
