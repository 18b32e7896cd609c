//! Decoding with the up-projections absorbed: queries are taken to the latent space, attention is multi-query over the cached latents
//! themselves, and values leave the latent space afterwards (DeepSeek-V2, arXiv 2405.04434). A prompt is read in the same way, so that
//! it does not matter where it ends.

use std::sync::Arc;

use super::{LORA_NORM_EPS, Mla, MlaConfig};
use crate::Result;
use crate::mixer::memory::{Keeps, Span, reach};
use crate::mixer::paged::{Heads, attend};
use crate::mixer::rotary::Rotary;
use crate::mixer::work::Work;
use crate::op::attention::online::add_products;
use crate::op::cpu::entries;
use crate::op::isa::Isa;
use crate::op::linear::{Part, Stored, add_bias, products};
use crate::op::rms_norm::norm_rows;
use crate::op::rope::{RopeLayout, turn_head};
use crate::op::team::fill;

/// What decoding needs of the layer.
#[derive(Debug)]
pub struct Decoder {
    pub(super) config: MlaConfig,
    pub(super) q_a_proj: Stored,
    pub(super) q_b_proj: Stored,
    pub(super) latent_proj: Stored,
    pub(super) rope_proj: Option<Stored>,
    /// `[G, nope, R]`
    pub(super) key_up: Vec<f32>,
    /// `[G, R, V]`
    pub(super) value_up: Vec<f32>,
    pub(super) out_proj: Stored,
    /// Of the queries' latent, the latent and the rotary key.
    pub(super) biases: Option<[Vec<f32>; 3]>,
    pub(super) norms: Option<[Vec<f32>; 2]>,
    pub(super) rotary: Arc<Rotary>,
}

impl Mla {
    pub(in crate::mixer) fn decoder(&self) -> Result<Decoder> {
        let norms = match &self.norms {
            Some((q, kv)) => Some([entries(q)?, entries(kv)?]),
            None => None,
        };
        Ok(Decoder {
            config: self.config.clone(),
            q_a_proj: self.q_a_proj.stored()?,
            q_b_proj: self.q_b_proj.stored()?,
            latent_proj: self.latent_proj.stored()?,
            rope_proj: self.rope_proj.as_ref().map(|w| w.stored()).transpose()?,
            key_up: entries(&self.key_up)?,
            value_up: entries(&self.value_up.transpose(1, 2)?)?,
            out_proj: self.out_proj.stored()?,
            biases: match &self.biases {
                Some([q, latent, key]) => Some([entries(q)?, entries(latent)?, entries(key)?]),
                None => None,
            },
            norms,
            rotary: self.key_rotary.clone(),
        })
    }
}

/// Heads that read a page together, at most.
const TOGETHER: usize = 16;
/// Multiplications below which other threads are not worth waking.
const ALONE: usize = 1 << 16;

impl Decoder {
    pub(in crate::mixer) fn keeps(&self) -> Keeps {
        Keeps {
            planes: 1,
            dim: self.config.kv_lora_rank + self.config.qk_rope_head_dim,
            state: 0,
        }
    }

    /// `x [N, D]` → `out [N, D]`.
    pub(in crate::mixer) fn mix(
        &self,
        layer: usize,
        x: &[f32],
        spans: &mut [Span],
        out: &mut [f32],
        work: &mut Work,
    ) {
        let c = &self.config;
        let (h, g, r, v) = (
            c.num_attention_heads,
            c.kv_heads(),
            c.kv_lora_rank,
            c.v_head_dim,
        );
        let (nope, rope, qk) = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.qk_head_dim());
        let (n, rep, wide) = (x.len() / self.q_a_proj.width(), h / g, r + rope);
        let Work { scratch, arena, .. } = work;
        let [low, latents, keys, q, absorbed, contexts, values, y] = arena.split([
            n * c.q_lora_rank,
            n * r,
            n * rope,
            n * h * qk,
            n * h * wide,
            n * h * r,
            n * h * v,
            n * h * v,
        ]);
        let mut parts = vec![
            Part {
                w: &self.q_a_proj,
                y: &mut *low,
            },
            Part {
                w: &self.latent_proj,
                y: &mut *latents,
            },
        ];
        if let Some(w) = &self.rope_proj {
            parts.push(Part { w, y: &mut *keys });
        }
        products(x, &mut parts, scratch);
        if let Some([of_q, of_latent, of_key]) = &self.biases {
            add_bias(low, of_q);
            add_bias(latents, of_latent);
            add_bias(keys, of_key);
        }
        if let Some([q_norm, kv_norm]) = &self.norms {
            norm_rows(low, q_norm, LORA_NORM_EPS as f32, y);
            norm_rows(latents, kv_norm, LORA_NORM_EPS as f32, y);
        }
        products(
            low,
            &mut [Part {
                w: &self.q_b_proj,
                y: &mut *q,
            }],
            scratch,
        );
        let table = self.rotary.table(reach(spans));
        for span in spans.iter_mut() {
            let first = span.first();
            for (t, row) in span.rows.clone().enumerate() {
                let cached = &mut absorbed[..wide];
                cached[..r].copy_from_slice(&latents[row * r..][..r]);
                if rope > 0 {
                    let (cos, sin) = table.at(first + t);
                    let key = &mut keys[row * rope..][..rope];
                    turn_head(key, cos, sin, RopeLayout::Interleaved);
                    cached[r..].copy_from_slice(key);
                    for head in q[row * h * qk..][..h * qk].chunks_exact_mut(qk) {
                        turn_head(&mut head[nope..], cos, sin, RopeLayout::Interleaved);
                    }
                }
                span.memory.write(layer, 0, first + t, cached);
            }
        }
        // By groups, for each reads a matrix of its own: [G, N, rep, R + rope].
        let absorb = |group: usize, out: &mut [f32]| {
            let mut low = vec![0f32; n * rep * r];
            let weights: Vec<f32> = (0..n * rep)
                .flat_map(|i| {
                    let head = i / rep * h + group * rep + i % rep;
                    &q[head * qk..][..nope]
                })
                .copied()
                .collect();
            if nope > 0 {
                let up = &self.key_up[group * nope * r..][..nope * r];
                add_products(Isa::here(), &weights, up, r, r, &mut low);
            }
            for (i, out) in out.chunks_exact_mut(wide).enumerate() {
                let head = i / rep * h + group * rep + i % rep;
                out[..r].copy_from_slice(&low[i * r..][..r]);
                out[r..].copy_from_slice(&q[head * qk + nope..][..rope]);
            }
        };
        fill(n * h * nope * r >= ALONE, absorbed, n * rep * wide, absorb);
        let rows = (1..=TOGETHER).rev().find(|rows| h.is_multiple_of(*rows));
        let rows = rows.unwrap_or(1);
        let heads = Heads {
            groups: h / rows,
            rep: rows,
            dim: wide,
            v_dim: r,
            values: None,
            scale: c.scale() as f32,
        };
        for span in spans.iter_mut() {
            let (start, len) = (span.rows.start, span.rows.len());
            let query = |t: usize, head: usize| {
                let at = (head / rep * n + start + t) * rep + head % rep;
                &absorbed[at * wide..][..wide]
            };
            let contexts = &mut contexts[start * h * r..][..len * h * r];
            attend(span.memory, layer, &heads, query, contexts);
        }
        // [G, N, rep, V]
        let leave = |group: usize, out: &mut [f32]| {
            let weights: Vec<f32> = (0..n * rep)
                .flat_map(|i| {
                    let head = i / rep * h + group * rep + i % rep;
                    &contexts[head * r..][..r]
                })
                .copied()
                .collect();
            out.fill(0.);
            let up = &self.value_up[group * r * v..][..r * v];
            add_products(Isa::here(), &weights, up, v, v, out);
        };
        fill(n * h * r * v >= ALONE, values, n * rep * v, leave);
        for (i, value) in values.chunks_exact(rep * v).enumerate() {
            let (group, row) = (i / n, i % n);
            y[(row * h + group * rep) * v..][..rep * v].copy_from_slice(value);
        }
        products(
            y,
            &mut [Part {
                w: &self.out_proj,
                y: out,
            }],
            scratch,
        );
    }
}
