//! Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434) as Zebra-Llama uses it: low-rank queries,
//! one latent for keys and values, one rotary key shared by all heads, `G` key/value heads (X-EcoMLA, arXiv 2503.11132).
//!
//! `c = W_a x [R]`, `k_rope = RoPE(W_r x)`, per kv head `[k_nope; v] = W_b c`, per query head
//! `[q_nope; q_rope] = W_qb W_qa x`, rotary pairs adjacent (interleaved).

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::attention::{AttentionConfig, validate_heads};
use super::pass::attention_pass;
use super::rotary::{RopeConfig, Rotary};
use super::sizes::{MAX_HEADS, MAX_WIDTH, at_most, bounded, bounded_heads};
use super::{Cost, Param, Pass, Windows};
use crate::op::Documents;
use crate::op::attention::{Sight, causal_attention};
use crate::op::linear::{Matrix, biased, linear};
use crate::op::rms_norm::rms_norm;
use crate::op::rope::{RopeLayout, rope};
use crate::weights::Weights;
use crate::{Error, Result};

mod cuda;
mod decode;
mod init;
pub mod plan;
pub mod rank;
mod refined;
pub use cuda::OnGpu;
pub use decode::Decoder;
pub use init::{published, published_spectrum};
pub use refined::{refined, spectrum};

/// Energies that a rank keeps or cuts off, falling.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// Of keys and values.
    pub kv: Vec<f64>,
    /// Of queries.
    pub q: Vec<f64>,
}

/// Of the norms on the latents (AMD's default).
const LORA_NORM_EPS: f64 = 1e-6;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlaConfig {
    /// `H`
    pub num_attention_heads: usize,
    /// Of the attention it takes the place of.
    pub num_key_value_heads: usize,
    /// Un-rotated keys and values for every query head, not for `num_key_value_heads`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub use_full_kv_head: bool,
    pub q_lora_rank: usize,
    /// `R`
    pub kv_lora_rank: usize,
    pub qk_nope_head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    /// RMSNorm on the two latents.
    #[serde(default)]
    pub use_lora_layer_norm: bool,
    /// The two latents and the rotary key have a bias (DeepSeek's name; here the output has none).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attention_bias: bool,
    pub rope: RopeConfig,
}

impl MlaConfig {
    fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim.saturating_add(self.qk_rope_head_dim)
    }

    /// What scores are multiplied by.
    fn scale(&self) -> f64 {
        (self.qk_head_dim() as f64).powf(-0.5)
    }

    /// `G`: heads of the un-rotated keys and the values.
    pub fn kv_heads(&self) -> usize {
        match self.use_full_kv_head {
            true => self.num_attention_heads,
            false => self.num_key_value_heads,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        at_most("num_attention_heads", self.num_attention_heads, MAX_HEADS)?;
        validate_heads(self.num_attention_heads, self.num_key_value_heads)?;
        for (name, value) in [
            ("q_lora_rank", self.q_lora_rank),
            ("kv_lora_rank", self.kv_lora_rank),
            ("v_head_dim", self.v_head_dim),
        ] {
            bounded(name, value, MAX_WIDTH)?;
        }
        at_most("qk_nope_head_dim", self.qk_nope_head_dim, MAX_WIDTH)?;
        at_most("qk_rope_head_dim", self.qk_rope_head_dim, MAX_WIDTH)?;
        let of_query = "qk_nope_head_dim + qk_rope_head_dim";
        bounded(of_query, self.qk_head_dim(), MAX_WIDTH)?;
        bounded_heads(of_query, self.num_attention_heads, self.qk_head_dim())?;
        let of_value = self.qk_nope_head_dim + self.v_head_dim;
        bounded_heads(
            "qk_nope_head_dim + v_head_dim",
            self.num_attention_heads,
            of_value,
        )?;
        if !self.qk_nope_head_dim.is_multiple_of(2) {
            return Err(Error::invalid(format!(
                "qk_nope_head_dim {} must be even (rotary pairs start after it)",
                self.qk_nope_head_dim
            )));
        }
        self.rope.validate(self.qk_rope_head_dim)
    }

    pub(super) fn show(&self) -> String {
        format!(
            "q {} kv {} rope {} nope {}",
            self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim
        )
    }

    /// # Errors
    /// When an attention layer of a model with `hidden` channels cannot be turned into this MLA: ranks
    /// above what its matrices have, head dims above its own.
    pub fn fits(&self, a: &AttentionConfig, hidden: usize) -> Result<()> {
        let (h, g, hd) = (a.num_attention_heads, a.num_key_value_heads, a.head_dim);
        let (heads, kv_heads) = (self.num_attention_heads, self.kv_heads());
        let q_rank = hidden.min(h * hd);
        let kv_rank = hidden.min(2 * kv_heads * hd);
        let problem = if self.q_lora_rank > q_rank {
            format!(
                "q_lora_rank {} is above {q_rank}, the rank of the teacher's q_proj",
                self.q_lora_rank
            )
        } else if self.kv_lora_rank > kv_rank {
            format!(
                "kv_lora_rank {} is above {kv_rank}, the rank of the teacher's keys and values",
                self.kv_lora_rank
            )
        } else if self.qk_head_dim() > hd {
            format!(
                "qk_nope_head_dim {} + qk_rope_head_dim {} is above the teacher's head_dim {hd}",
                self.qk_nope_head_dim, self.qk_rope_head_dim
            )
        } else if self.v_head_dim != hd {
            format!(
                "v_head_dim {} must be the teacher's head_dim {hd}",
                self.v_head_dim
            )
        } else if self.attention_bias != a.attention_bias {
            "attention_bias must be that of the teacher".to_owned()
        } else if heads != h || (kv_heads != g && kv_heads != h) {
            format!(
                "{heads} query and {kv_heads} key/value heads do not fit the teacher's {h} and {g}"
            )
        } else {
            return Ok(());
        };
        Err(Error::invalid(problem))
    }

    pub(super) fn params(&self, hidden: usize) -> Vec<Param> {
        let (h, g) = (self.num_attention_heads, self.kv_heads());
        let kv = g * (self.qk_nope_head_dim + self.v_head_dim);
        let mut params = vec![
            ("q_a_proj.weight".into(), vec![self.q_lora_rank, hidden]),
            (
                "q_b_proj.weight".into(),
                vec![h * self.qk_head_dim(), self.q_lora_rank],
            ),
            (
                "kv_a_proj_with_mqa.weight".into(),
                vec![self.kv_lora_rank + self.qk_rope_head_dim, hidden],
            ),
            ("kv_b_proj.weight".into(), vec![kv, self.kv_lora_rank]),
            ("out_proj.weight".into(), vec![hidden, h * self.v_head_dim]),
        ];
        if self.use_lora_layer_norm {
            params.push(("q_a_layernorm.weight".into(), vec![self.q_lora_rank]));
            params.push(("kv_a_layernorm.weight".into(), vec![self.kv_lora_rank]));
        }
        if self.attention_bias {
            let wide = self.kv_lora_rank + self.qk_rope_head_dim;
            params.push(("q_a_proj.bias".into(), vec![self.q_lora_rank]));
            params.push(("kv_a_proj_with_mqa.bias".into(), vec![wide]));
        }
        params
    }

    pub(super) fn stacked(&self) -> Vec<(&'static str, Vec<usize>)> {
        let rows = vec![self.kv_lora_rank, self.qk_rope_head_dim];
        vec![("kv_a_proj_with_mqa.weight", rows)]
    }

    pub(super) fn full_cache(&self) -> usize {
        2 * self.num_key_value_heads * self.v_head_dim
    }

    pub(super) fn cost(&self, hidden: usize, length: usize) -> Cost {
        let (h, g) = (self.num_attention_heads, self.kv_heads());
        let (rq, r, rope) = (self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim);
        let query = rq * (hidden + h * self.qk_head_dim());
        let key_value = (r + rope) * hidden + g * (self.qk_nope_head_dim + self.v_head_dim) * r;
        let norms = if self.use_lora_layer_norm { rq + r } else { 0 };
        let biases = if self.attention_bias {
            rq + r + rope
        } else {
            0
        };
        Cost {
            params: query + key_value + h * self.v_head_dim * hidden + norms + biases,
            cached: length.saturating_mul(r + rope),
            state: 0,
        }
    }

    pub(super) fn pass(&self, windows: Windows) -> Pass {
        let (h, g) = (self.num_attention_heads, self.kv_heads());
        let (rq, r) = (self.q_lora_rank, self.kv_lora_rank);
        let (nope, rope, v) = (
            self.qk_nope_head_dim,
            self.qk_rope_head_dim,
            self.v_head_dim,
        );
        let inner = attention_pass(windows, [h, g], [nope + rope, v], windows.len);
        let norms = if self.use_lora_layer_norm { 2 } else { 1 };
        // Queries and the shared key before and after they turn; the keys side by side, and again with their heads in a row.
        let (turns, joins) = match (rope > 0, nope > 0) {
            (true, true) => (2, 2),
            (true, false) => (2, 0),
            (false, _) => (1, 0),
        };
        let norms = norms + usize::from(self.attention_bias);
        let queries = norms * rq + turns * h * (nope + rope);
        let latent = norms * r + turns * rope;
        let expanded = g * (nope + v) + joins * g * (nope + rope);
        let tables = windows.len * (nope + 2 * rope);
        // Keys' and values' rows of one tensor, each in a row of its own.
        let apart = g * (nope + v) * r;
        Pass {
            kept: inner.kept + windows.tokens() * (queries + latent + expanded) + tables + apart,
            ..inner
        }
    }
}

#[derive(Debug)]
pub struct Mla {
    config: MlaConfig,
    q_a_proj: Matrix,
    q_b_proj: Matrix,
    /// Rows of the latent, `[R, D]`.
    latent_proj: Matrix,
    /// Rows of the shared rotary key, `[rope, D]`, where there are rotary dims.
    rope_proj: Option<Matrix>,
    /// Key rows of `kv_b_proj`, `[G, nope, R]`.
    key_up: Tensor,
    /// Value rows of `kv_b_proj`, `[G, V, R]`.
    value_up: Tensor,
    out_proj: Matrix,
    /// Of the queries' latent, the latent and the rotary key.
    biases: Option<[Tensor; 3]>,
    norms: Option<(Tensor, Tensor)>,
    /// Turns whole query heads: the first `nope` dims stand still.
    query_rotary: Rotary,
    key_rotary: Arc<Rotary>,
}

impl Mla {
    pub(super) fn new(c: &MlaConfig, weights: &Weights) -> Result<Self> {
        let (g, r) = (c.kv_heads(), c.kv_lora_rank);
        let (nope, rope, v) = (c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim);
        let down = weights.matrix("kv_a_proj_with_mqa.weight")?;
        let up = weights.get("kv_b_proj.weight")?.reshape((g, nope + v, r))?;
        let norms = match c.use_lora_layer_norm {
            true => Some((
                weights.get("q_a_layernorm.weight")?,
                weights.get("kv_a_layernorm.weight")?,
            )),
            false => None,
        };
        Ok(Self {
            q_a_proj: weights.matrix("q_a_proj.weight")?,
            q_b_proj: weights.matrix("q_b_proj.weight")?,
            latent_proj: down.rows(0, r)?,
            rope_proj: (rope > 0).then(|| down.rows(r, rope)).transpose()?,
            key_up: up.narrow(1, 0, nope)?,
            value_up: up.narrow(1, nope, v)?,
            out_proj: weights.matrix("out_proj.weight")?,
            biases: match c.attention_bias {
                true => {
                    let down = weights.get("kv_a_proj_with_mqa.bias")?;
                    let (latent, key) = (down.narrow(0, 0, r)?, down.narrow(0, r, rope)?);
                    Some([weights.get("q_a_proj.bias")?, latent, key])
                }
                false => None,
            },
            norms,
            query_rotary: Rotary::new(&c.rope, rope, nope),
            key_rotary: Arc::new(Rotary::new(&c.rope, rope, 0)),
            config: c.clone(),
        })
    }

    /// `[B, T, H, nope + rope]`, rotated.
    fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, _) = x.dims3()?;
        let mut low = linear(x, &self.q_a_proj)?;
        if let Some([bias, _, _]) = &self.biases {
            low = biased(&low, bias)?;
        }
        if let Some((norm, _)) = &self.norms {
            low = rms_norm(&low, norm, LORA_NORM_EPS)?;
        }
        let c = &self.config;
        let q = linear(&low, &self.q_b_proj)?;
        let q = q.reshape((b, t, c.num_attention_heads, c.qk_head_dim()))?;
        if self.rope_proj.is_none() {
            return Ok(q);
        }
        let (cos, sin) = self.query_rotary.tables(t, x)?;
        Ok(rope(&q, &cos, &sin, RopeLayout::Interleaved)?)
    }

    /// The normed latent `[B, T, R]` and the rotated shared key `[B, T, 1, rope]`, if there is one.
    fn latent(&self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let (b, t, _) = x.dims3()?;
        let mut latent = linear(x, &self.latent_proj)?;
        if let Some([_, bias, _]) = &self.biases {
            latent = biased(&latent, bias)?;
        }
        if let Some((_, norm)) = &self.norms {
            latent = rms_norm(&latent, norm, LORA_NORM_EPS)?;
        }
        let Some(rope_proj) = &self.rope_proj else {
            return Ok((latent, None));
        };
        let mut key = linear(x, rope_proj)?;
        if let Some([_, _, bias]) = &self.biases {
            key = biased(&key, bias)?;
        }
        let key = key.reshape((b, t, 1, self.config.qk_rope_head_dim))?;
        let (cos, sin) = self.key_rotary.tables(t, x)?;
        let key = rope(&key, &cos, &sin, RopeLayout::Interleaved)?;
        Ok((latent, Some(key)))
    }

    /// Keys and values expanded from `latent [B, S, R]` and `key [B, S, 1, rope]`, then attention.
    fn attend(
        &self,
        q: &Tensor,
        latent: &Tensor,
        key: Option<&Tensor>,
        sight: &Sight,
    ) -> Result<Tensor> {
        let c = &self.config;
        let (b, s, r) = latent.dims3()?;
        let (g, nope, v) = (c.kv_heads(), c.qk_nope_head_dim, c.v_head_dim);
        let expand = |up: &Tensor, dim: usize| -> Result<Tensor> {
            let up = up.reshape((g * dim, r))?.to_dtype(latent.dtype())?;
            let flat = linear(latent, &up.into())?;
            Ok(flat.reshape((b, s, g, dim))?)
        };
        let values = expand(&self.value_up, v)?;
        let own = (nope > 0).then(|| expand(&self.key_up, nope)).transpose()?;
        let shared = key
            .map(|key| key.broadcast_as((b, s, g, c.qk_rope_head_dim)))
            .transpose()?;
        let parts: Vec<Tensor> = own.into_iter().chain(shared).collect();
        let keys = Tensor::cat(&parts, HEAD_DIM)?;
        let y = causal_attention(q, &keys, &values, self.config.scale(), sight)?;
        self.output(&y)
    }

    /// `y [B, T, H, V]` → `[B, T, D]`.
    fn output(&self, y: &Tensor) -> Result<Tensor> {
        let (b, t, h, v) = y.dims4()?;
        Ok(linear(&y.reshape((b, t, h * v))?, &self.out_proj)?)
    }

    pub(super) fn forward(&self, x: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let (latent, key) = self.latent(x)?;
        let q = self.queries(x)?;
        self.attend(&q, &latent, key.as_ref(), &documents.into())
    }
}

/// The last axis of `[B, T, heads, dim]`.
const HEAD_DIM: usize = 3;
