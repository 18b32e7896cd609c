//! Mamba2 from attention weights.

use candle_core::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Mamba2Config;
use crate::Result;
use crate::mixer::AttentionWeights;

/// The published initialisation (MambaInLlama, arXiv 2408.15237): x ← V, B ← K, C ← Q, output ← O; gate, steps
/// and convolution as torch initialises a linear layer and a convolution; `A ~ U[1, 16]`,
/// `Δ ~ logU[1e-3, 0.1]`, `D = 1`. Tensors are named after the mixer's prefix.
///
/// # Errors
/// When the attention's heads are not this mixer's.
pub fn published(
    c: &Mamba2Config,
    attention: &AttentionWeights,
    seed: u64,
) -> Result<Vec<(String, Tensor)>> {
    let attention = &attention.linear(None)?;
    let a = &attention.config;
    let h = a.num_attention_heads;
    c.fits(a)?;
    let (_, d) = attention.q.dims2()?;
    let mut random = Random(ChaCha8Rng::seed_from_u64(seed));
    let bound = 1.0 / (d as f64).sqrt();
    let z = random.uniform(&[c.d_inner(), d], bound)?;
    let dt = random.uniform(&[h, d], bound)?;
    // The teacher may stand in another dtype; new rows take it on.
    let like = |t: &Tensor| t.to_dtype(attention.q.dtype());
    let in_proj = Tensor::cat(
        &[
            &like(&z)?,
            &attention.v,
            &attention.k,
            &attention.q,
            &like(&dt)?,
        ],
        0,
    )?;

    let channels = c.conv_channels();
    let tap = 1.0 / (c.d_conv as f64).sqrt();
    let a_log = random.each(h, |r| r.random_range(1f64..16.0).ln())?;
    let dt_bias = random.each(h, |r| {
        let (low, high) = (1e-3f64.ln(), 0.1f64.ln());
        let step = r.random_range(low..high).exp().max(1e-4);
        // The inverse of softplus.
        step + (-(-step).exp_m1()).ln()
    })?;
    let ones = |n: usize| Tensor::ones(n, candle_core::DType::F32, &Device::Cpu);
    let conv = random.uniform(&[channels, 1, c.d_conv], tap)?;
    let mut bias = random.uniform(&[channels], tap)?;
    if let Some(projected) = channel_biases(c, attention)? {
        // What the taps make of a constant.
        bias = (bias + (conv.sum((1, 2))? * projected)?)?;
    }
    Ok(vec![
        ("in_proj.weight".to_owned(), in_proj),
        ("conv1d.weight".to_owned(), conv),
        ("conv1d.bias".to_owned(), bias),
        ("dt_bias".to_owned(), dt_bias),
        ("A_log".to_owned(), a_log),
        ("D".to_owned(), ones(h)?),
        ("norm.weight".to_owned(), ones(c.d_inner())?),
        ("out_proj.weight".to_owned(), attention.o.clone()),
    ])
}

/// The biases of values, keys and queries for the convolution's channels, `[C]`, where there are biases. The mixer's own projection has none: behind it
/// stands the convolution's.
pub(super) fn channel_biases(
    c: &Mamba2Config,
    attention: &AttentionWeights,
) -> Result<Option<Tensor>> {
    let Some([q, k, v]) = &attention.biases else {
        return Ok(None);
    };
    let (g, groups) = (c.num_kv_heads, c.groups());
    let repeated = |bias: &Tensor| -> Result<Tensor> {
        let dim = bias.elem_count() / g;
        let heads = bias.reshape((g, 1, dim))?;
        Ok(heads.broadcast_as((g, groups / g, dim))?.flatten_all()?)
    };
    Ok(Some(Tensor::cat(&[&repeated(v)?, &repeated(k)?, q], 0)?))
}

struct Random(ChaCha8Rng);

impl Random {
    /// `U(−bound, bound)`.
    fn uniform(&mut self, shape: &[usize], bound: f64) -> Result<Tensor> {
        let n = shape.iter().product();
        Ok(self
            .each(n, |r| r.random_range(-bound..bound))?
            .reshape(shape)?)
    }

    fn each(&mut self, n: usize, mut draw: impl FnMut(&mut ChaCha8Rng) -> f64) -> Result<Tensor> {
        let data: Vec<f32> = (0..n).map(|_| draw(&mut self.0) as f32).collect();
        Ok(Tensor::from_vec(data, n, &Device::Cpu)?)
    }
}
