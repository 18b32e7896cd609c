//! Attention over pages of rotated keys and values.

use std::sync::Arc;

use super::{Attention, AttentionConfig};
use crate::Result;
use crate::mixer::memory::{Keeps, Span, reach};
use crate::mixer::paged::{Heads, attend};
use crate::mixer::rotary::{Rotary, Table};
use crate::mixer::work::Work;
use crate::op::cpu::entries;
use crate::op::linear::{Part, Stored, add_bias, products};
use crate::op::rms_norm::norm_rows;
use crate::op::rope::{RopeLayout, turn_head};

/// What decoding needs of the layer.
#[derive(Debug)]
pub struct Decoder {
    pub(in crate::mixer) config: AttentionConfig,
    pub(super) q_proj: Stored,
    pub(super) k_proj: Stored,
    pub(super) v_proj: Stored,
    pub(super) o_proj: Stored,
    /// Of queries, keys and values.
    pub(super) biases: Option<[Vec<f32>; 3]>,
    /// Of queries and keys.
    pub(super) norms: Option<[Vec<f32>; 2]>,
    pub(super) rotary: Option<Arc<Rotary>>,
}

/// Queries `[N, H, hd]`, keys and values `[N, G, hd]`, rotated, and room for the heads' outputs, `[N, H, hd]`.
pub(in crate::mixer) type Projected<'a> = [&'a mut [f32]; 4];

impl Attention {
    pub(in crate::mixer) fn decoder(&self) -> Result<Decoder> {
        Ok(Decoder {
            config: self.config.clone(),
            q_proj: self.q_proj.stored()?,
            k_proj: self.k_proj.stored()?,
            v_proj: self.v_proj.stored()?,
            o_proj: self.o_proj.stored()?,
            biases: match &self.biases {
                Some([q, k, v]) => Some([entries(q)?, entries(k)?, entries(v)?]),
                None => None,
            },
            norms: match &self.norms {
                Some([q, k]) => Some([entries(q)?, entries(k)?]),
                None => None,
            },
            rotary: self.rotary.clone(),
        })
    }
}

impl Decoder {
    pub(in crate::mixer) fn keeps(&self) -> Keeps {
        Keeps {
            planes: 2 * self.config.num_key_value_heads,
            dim: self.config.head_dim,
            state: 0,
        }
    }

    /// Projects and turns `x [N, D]`, lets `heads` fill the outputs, and projects them into `out [N, D]`.
    pub(in crate::mixer) fn around(
        &self,
        x: &[f32],
        spans: &mut [Span],
        out: &mut [f32],
        work: &mut Work,
        heads: impl FnOnce(&mut [Span], Projected),
    ) {
        let c = &self.config;
        let (h, g, hd) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let n = x.len() / self.q_proj.width();
        let Work { scratch, arena, .. } = work;
        let [q, k, v, y] = arena.split([n * h * hd, n * g * hd, n * g * hd, n * h * hd]);
        let mut parts = [
            Part {
                w: &self.q_proj,
                y: q,
            },
            Part {
                w: &self.k_proj,
                y: k,
            },
            Part {
                w: &self.v_proj,
                y: v,
            },
        ];
        products(x, &mut parts, scratch);
        if let Some([of_q, of_k, of_v]) = &self.biases {
            add_bias(q, of_q);
            add_bias(k, of_k);
            add_bias(v, of_v);
        }
        if let (Some([of_q, of_k]), Some(eps)) = (&self.norms, c.qk_norm_eps) {
            // What the heads are written to later is room until then.
            norm_rows(q, of_q, eps as f32, y);
            norm_rows(k, of_k, eps as f32, y);
        }
        if let Some(rotary) = &self.rotary {
            let table = rotary.table(reach(spans));
            for span in spans.iter() {
                for (t, row) in span.rows.clone().enumerate() {
                    let position = span.first() + t;
                    turn(&mut q[row * h * hd..][..h * hd], hd, &table, position);
                    turn(&mut k[row * g * hd..][..g * hd], hd, &table, position);
                }
            }
        }
        heads(spans, [q, k, v, &mut *y]);
        products(
            y,
            &mut [Part {
                w: &self.o_proj,
                y: out,
            }],
            scratch,
        );
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
        let (h, g, hd) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        self.around(x, spans, out, work, |spans, [q, k, v, y]| {
            for span in spans.iter_mut() {
                let first = span.first();
                for (t, row) in span.rows.clone().enumerate() {
                    for head in 0..g {
                        let range = (row * g + head) * hd..(row * g + head + 1) * hd;
                        span.memory.write(layer, head, first + t, &k[range.clone()]);
                        span.memory.write(layer, g + head, first + t, &v[range]);
                    }
                }
                let heads = Heads {
                    groups: g,
                    rep: h / g,
                    dim: hd,
                    v_dim: hd,
                    values: Some(g),
                    scale: c.scale() as f32,
                };
                let (start, len) = (span.rows.start, span.rows.len());
                let query = |t: usize, head: usize| &q[((start + t) * h + head) * hd..][..hd];
                let y = &mut y[start * h * hd..][..len * h * hd];
                attend(span.memory, layer, &heads, query, y);
            }
        });
    }
}

/// All heads of a token.
fn turn(heads: &mut [f32], hd: usize, table: &Table, position: usize) {
    let (cos, sin) = table.at(position);
    for head in heads.chunks_exact_mut(hd) {
        turn_head(head, cos, sin, RopeLayout::Halves);
    }
}
