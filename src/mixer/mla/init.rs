//! MLA from attention weights.

use candle_core::{DType, Device, Tensor};
use faer::{Mat, Scale};

use super::{MlaConfig, Spectrum};
use crate::Result;
use crate::mixer::AttentionWeights;
use crate::mixer::linalg::{svd, tensor};

/// The published initialisation (the joint SVD of X-EcoMLA, arXiv 2503.11132): singular values in the
/// down-projections, the first `nope` and last `rope` rows of each head, the shared rotary key as the
/// plain mean over key heads. Tensors are named after the mixer's prefix.
///
/// # Errors
/// When the attention's sizes cannot give this MLA: ranks above what the matrices have, head dims above
/// the teacher's.
pub fn published(c: &MlaConfig, attention: &AttentionWeights) -> Result<Vec<(String, Tensor)>> {
    let a = &attention.config;
    let (h, g, hd) = (a.num_attention_heads, a.num_key_value_heads, a.head_dim);
    let (nope, rope) = (c.qk_nope_head_dim, c.qk_rope_head_dim);
    let (_, hidden) = attention.q.dims2()?;
    c.fits(a, hidden)?;

    let [mut q, k, v] = attention.linear(None)?.matrices()?;
    if a.attention_multiplier.is_some() {
        q *= Scale(a.scale() / c.scale());
    }
    let q = svd(&q)?;
    let q_down = scaled_rows(&q.s, &q.v, c.q_lora_rank);
    let q_rows: Vec<usize> = (0..h)
        .flat_map(|head| {
            (0..nope)
                .chain(hd - rope..hd)
                .map(move |row| head * hd + row)
        })
        .collect();
    let q_up = Mat::from_fn(q_rows.len(), c.q_lora_rank, |i, j| q.u[(q_rows[i], j)]);

    let keys = repeat_heads(&k, g, c.kv_heads());
    let values = repeat_heads(&v, g, c.kv_heads());
    let (key_rows, d) = (keys.nrows(), keys.ncols());
    let joint = svd(&Mat::from_fn(2 * key_rows, d, |i, j| match i < key_rows {
        true => keys[(i, j)],
        false => values[(i - key_rows, j)],
    }))?;
    let latent = scaled_rows(&joint.s, &joint.v, c.kv_lora_rank);
    let kv_rows: Vec<usize> = (0..c.kv_heads())
        .flat_map(|head| {
            let key = (0..nope).map(move |row| head * hd + row);
            key.chain((0..hd).map(move |row| key_rows + head * hd + row))
        })
        .collect();
    let kv_up = Mat::from_fn(kv_rows.len(), c.kv_lora_rank, |i, j| {
        joint.u[(kv_rows[i], j)]
    });

    // The mean over heads is the same before and after repeating them.
    let heads = c.kv_heads();
    let down = Mat::from_fn(c.kv_lora_rank + rope, d, |i, j| match i < c.kv_lora_rank {
        true => latent[(i, j)],
        false => {
            let row = hd - rope + i - c.kv_lora_rank;
            (0..heads)
                .map(|head| keys[(head * hd + row, j)])
                .sum::<f64>()
                / heads as f64
        }
    });

    named(c, [&q_down, &q_up, &down, &kv_up], attention)
}

/// An MLA's tensors: its down- and up-projections of queries, of keys and values (where there are biases, those of a down-projection are
/// its last column), and the attention's output.
pub(super) fn named(
    c: &MlaConfig,
    [q_down, q_up, down, up]: [&Mat<f64>; 4],
    attention: &AttentionWeights,
) -> Result<Vec<(String, Tensor)>> {
    let (d, _) = attention.o.dims2()?;
    let mut tensors = vec![
        ("q_b_proj.weight".to_owned(), tensor(q_up)?),
        ("kv_b_proj.weight".to_owned(), tensor(up)?),
        ("out_proj.weight".to_owned(), attention.o.clone()),
    ];
    for (name, m) in [("q_a_proj", q_down), ("kv_a_proj_with_mqa", down)] {
        let all = tensor(m)?;
        let weight = all.narrow(1, 0, d)?.contiguous()?;
        tensors.push((format!("{name}.weight"), weight));
        if c.attention_bias {
            let bias = all.narrow(1, d, 1)?.flatten_all()?.contiguous()?;
            tensors.push((format!("{name}.bias"), bias));
        }
    }
    tensors.extend(unit_norms(c)?);
    Ok(tensors)
}

/// The energies (squared singular values) that X-EcoMLA chooses ranks by: of the joint keys and values,
/// and of the queries, un-weighted.
pub fn published_spectrum(attention: &AttentionWeights) -> Result<Spectrum> {
    let [queries, keys, values] = attention.linear(None)?.matrices()?;
    let rows = keys.nrows();
    let joint = Mat::from_fn(2 * rows, keys.ncols(), |i, j| match i < rows {
        true => keys[(i, j)],
        false => values[(i - rows, j)],
    });
    let energies =
        |m: &Mat<f64>| -> Result<Vec<f64>> { Ok(svd(m)?.s.iter().map(|s| s * s).collect()) };
    Ok(Spectrum {
        kv: energies(&joint)?,
        q: energies(&queries)?,
    })
}

/// The latents' norms, if the config has them, at 1.
fn unit_norms(c: &MlaConfig) -> Result<Vec<(String, Tensor)>> {
    if !c.use_lora_layer_norm {
        return Ok(Vec::new());
    }
    let ranks = [
        ("q_a_layernorm", c.q_lora_rank),
        ("kv_a_layernorm", c.kv_lora_rank),
    ];
    let ones = |rank: usize| Tensor::ones(rank, DType::F32, &Device::Cpu);
    let each = ranks.map(|(name, rank)| Ok((format!("{name}.weight"), ones(rank)?)));
    each.into_iter().collect()
}

/// `diag(S[:rank]) · Vᵀ[:rank]`, `[rank, D]`.
fn scaled_rows(s: &[f64], v: &Mat<f64>, rank: usize) -> Mat<f64> {
    Mat::from_fn(rank, v.nrows(), |i, j| s[i] * v[(j, i)])
}

/// Each of `from` heads of rows `to / from` times in a row (`use_full_kv_head`).
fn repeat_heads(m: &Mat<f64>, from: usize, to: usize) -> Mat<f64> {
    let rows = m.nrows() / from;
    Mat::from_fn(to * rows, m.ncols(), |i, j| {
        let head = i / rows / (to / from);
        m[(head * rows + i % rows, j)]
    })
}
