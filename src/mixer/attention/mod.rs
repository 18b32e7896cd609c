//! Grouped-query attention with RoPE, as Llama has it; with the biases of Qwen2, the norms of Qwen3, the scale of Granite.

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

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

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionConfig {
    /// `H`
    pub num_attention_heads: usize,
    /// `G`, a divisor of `H`
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Absent: no position embedding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<RopeConfig>,
    /// Queries, keys and values have a bias (Qwen2).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attention_bias: bool,
    /// Of the RMSNorm over each head of the queries and keys, before they turn (Qwen3); absent: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qk_norm_eps: Option<f64>,
    /// What scores are multiplied by (Granite); absent: `head_dim^-½`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_multiplier: Option<f64>,
}

mod cuda;
mod decode;
mod weights;
pub use cuda::OnGpu;
pub use decode::Decoder;
pub use weights::AttentionWeights;

/// # Errors
/// Names the head count that does not fit.
pub(super) fn validate_heads(heads: usize, kv_heads: usize) -> Result<()> {
    if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(Error::invalid(format!(
            "num_attention_heads {heads} must be a positive multiple of num_key_value_heads {kv_heads}"
        )));
    }
    Ok(())
}

impl AttentionConfig {
    /// As Llama has it.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize, rope: Option<RopeConfig>) -> Self {
        Self {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            rope,
            attention_bias: false,
            qk_norm_eps: None,
            attention_multiplier: None,
        }
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f64 {
        let usual = || (self.head_dim as f64).powf(-0.5);
        self.attention_multiplier.unwrap_or_else(usual)
    }

    pub(super) fn validate(&self) -> Result<()> {
        at_most("num_attention_heads", self.num_attention_heads, MAX_HEADS)?;
        validate_heads(self.num_attention_heads, self.num_key_value_heads)?;
        bounded("head_dim", self.head_dim, MAX_WIDTH)?;
        bounded_heads("head_dim", self.num_attention_heads, self.head_dim)?;
        for (name, value) in [
            ("qk_norm_eps", self.qk_norm_eps),
            ("attention_multiplier", self.attention_multiplier),
        ] {
            if let Some(value) = value.filter(|v| !(1e-30..1e30).contains(v)) {
                return Err(Error::invalid(format!("{name} {value} must be above 0")));
            }
        }
        match &self.rope {
            Some(rope) => rope.validate(self.head_dim),
            None => Ok(()),
        }
    }

    pub(super) fn show(&self) -> String {
        format!(
            "{}/{} heads x {}",
            self.num_attention_heads, self.num_key_value_heads, self.head_dim
        )
    }

    pub(super) fn params(&self, hidden: usize) -> Vec<Param> {
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let mut params: Vec<Param> = vec![
            ("q_proj.weight".into(), vec![q, hidden]),
            ("k_proj.weight".into(), vec![kv, hidden]),
            ("v_proj.weight".into(), vec![kv, hidden]),
            ("o_proj.weight".into(), vec![hidden, q]),
        ];
        if self.attention_bias {
            let rows = [("q", q), ("k", kv), ("v", kv)];
            params.extend(rows.map(|(name, rows)| (format!("{name}_proj.bias"), vec![rows])));
        }
        if self.qk_norm_eps.is_some() {
            params.extend(
                ["q", "k"].map(|name| (format!("{name}_norm.weight"), vec![self.head_dim])),
            );
        }
        params
    }

    pub(super) fn full_cache(&self) -> usize {
        2 * self.num_key_value_heads * self.head_dim
    }

    pub(super) fn cost(&self, hidden: usize, length: usize) -> Cost {
        let (h, g, hd) = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        );
        let biases = if self.attention_bias {
            (h + 2 * g) * hd
        } else {
            0
        };
        let norms = if self.qk_norm_eps.is_some() {
            2 * hd
        } else {
            0
        };
        Cost {
            params: 2 * hidden * (h + g) * hd + biases + norms,
            cached: length.saturating_mul(self.full_cache()),
            state: 0,
        }
    }

    pub(super) fn pass(&self, windows: Windows) -> Pass {
        self.pass_within(windows, windows.len)
    }

    /// The same where a token sees at most `reach`.
    pub(super) fn pass_within(&self, windows: Windows, reach: usize) -> Pass {
        let (h, g, hd) = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        );
        let inner = attention_pass(windows, [h, g], [hd, hd], reach);
        // Queries and keys before and after they turn, and the tables; values.
        let turned = match self.rope {
            Some(_) => windows.tokens() * (h + g) * hd + windows.len * hd,
            None => 0,
        };
        let biased = if self.attention_bias { h + 2 * g } else { 0 };
        let normed = if self.qk_norm_eps.is_some() { h + g } else { 0 };
        let projected = h + 2 * g + biased + normed;
        Pass {
            kept: inner.kept + windows.tokens() * projected * hd + turned,
            ..inner
        }
    }
}

#[derive(Debug)]
pub struct Attention {
    config: AttentionConfig,
    q_proj: Matrix,
    k_proj: Matrix,
    v_proj: Matrix,
    o_proj: Matrix,
    /// Of queries, keys and values, where they have one.
    biases: Option<[Tensor; 3]>,
    /// Of queries and keys, `[hd]` each, where they are normed.
    norms: Option<[Tensor; 2]>,
    rotary: Option<Arc<Rotary>>,
}

impl Attention {
    pub(super) fn new(config: &AttentionConfig, weights: &Weights) -> Result<Self> {
        Ok(Self {
            config: config.clone(),
            q_proj: weights.matrix("q_proj.weight")?,
            k_proj: weights.matrix("k_proj.weight")?,
            v_proj: weights.matrix("v_proj.weight")?,
            o_proj: weights.matrix("o_proj.weight")?,
            biases: config.biases(weights)?,
            norms: config.norms(weights)?,
            rotary: config
                .rope
                .as_ref()
                .map(|r| Arc::new(Rotary::new(r, config.head_dim, 0))),
        })
    }

    /// Queries `[B, T, H, hd]`, keys and values `[B, T, G, hd]`, rotated.
    pub(super) fn project(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let (b, t, _) = x.dims3()?;
        let c = &self.config;
        let (h, g, hd) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
        let mut q = linear(x, &self.q_proj)?;
        let mut k = linear(x, &self.k_proj)?;
        let mut v = linear(x, &self.v_proj)?;
        if let Some([of_q, of_k, of_v]) = &self.biases {
            q = biased(&q, of_q)?;
            k = biased(&k, of_k)?;
            v = biased(&v, of_v)?;
        }
        let mut q = q.reshape((b, t, h, hd))?;
        let mut k = k.reshape((b, t, g, hd))?;
        let v = v.reshape((b, t, g, hd))?;
        if let (Some([of_q, of_k]), Some(eps)) = (&self.norms, c.qk_norm_eps) {
            q = rms_norm(&q, of_q, eps)?;
            k = rms_norm(&k, of_k, eps)?;
        }
        let Some(rotary) = &self.rotary else {
            return Ok([q, k, v]);
        };
        let (cos, sin) = rotary.tables(t, x)?;
        Ok([
            rope(&q, &cos, &sin, RopeLayout::Halves)?,
            rope(&k, &cos, &sin, RopeLayout::Halves)?,
            v,
        ])
    }

    pub(super) fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        sight: &Sight,
    ) -> Result<Tensor> {
        let (b, t, h, hd) = q.dims4()?;
        let y = causal_attention(q, k, v, self.config.scale(), sight)?;
        Ok(linear(&y.reshape((b, t, h * hd))?, &self.o_proj)?)
    }

    pub(super) fn forward(&self, x: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let [q, k, v] = self.project(x)?;
        self.attend(&q, &k, &v, &documents.into())
    }
}
