//! Grouped-query attention with RoPE, as Llama has it.

use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::pass::attention_pass;
use super::rotary::{RopeConfig, Rotary};
use super::sizes::{MAX_HEADS, MAX_WIDTH, at_most, bounded, bounded_heads};
use super::{Cost, Param, Pass, Windows};
use crate::op::Documents;
use crate::op::attention::{Sight, causal_attention};
use crate::op::linear::{Matrix, linear};
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
}

mod decode;
pub use decode::Decoder;

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
    pub(super) fn validate(&self) -> Result<()> {
        at_most("num_attention_heads", self.num_attention_heads, MAX_HEADS)?;
        validate_heads(self.num_attention_heads, self.num_key_value_heads)?;
        bounded("head_dim", self.head_dim, MAX_WIDTH)?;
        bounded_heads("head_dim", self.num_attention_heads, self.head_dim)?;
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
        vec![
            ("q_proj.weight".into(), vec![q, hidden]),
            ("k_proj.weight".into(), vec![kv, hidden]),
            ("v_proj.weight".into(), vec![kv, hidden]),
            ("o_proj.weight".into(), vec![hidden, q]),
        ]
    }

    pub(super) fn cost(&self, hidden: usize, length: usize) -> Cost {
        let (h, g, hd) = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        );
        Cost {
            params: 2 * hidden * (h + g) * hd,
            cached: length.saturating_mul(2 * g * hd),
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
        Pass {
            kept: inner.kept + windows.tokens() * (h + 2 * g) * hd + turned,
            ..inner
        }
    }
}

/// The projections of an attention layer: what other mixers are born from.
#[derive(Debug, Clone)]
pub struct AttentionWeights {
    pub config: AttentionConfig,
    /// `[H·hd, D]`
    pub q: Tensor,
    /// `[G·hd, D]`
    pub k: Tensor,
    /// `[G·hd, D]`
    pub v: Tensor,
    /// `[D, H·hd]`
    pub o: Tensor,
}

impl AttentionWeights {
    /// `weights` seen from the mixer's prefix.
    pub fn new(config: &AttentionConfig, weights: &Weights) -> Result<Self> {
        Ok(Self {
            config: config.clone(),
            q: weights.get("q_proj.weight")?,
            k: weights.get("k_proj.weight")?,
            v: weights.get("v_proj.weight")?,
            o: weights.get("o_proj.weight")?,
        })
    }

    /// Under their names after the prefix.
    pub(super) fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = [
            ("q", &self.q),
            ("k", &self.k),
            ("v", &self.v),
            ("o", &self.o),
        ];
        let named = named.map(|(name, tensor)| (format!("{name}_proj.weight"), tensor.clone()));
        named.into()
    }
}

#[derive(Debug)]
pub struct Attention {
    config: AttentionConfig,
    q_proj: Matrix,
    k_proj: Matrix,
    v_proj: Matrix,
    o_proj: Matrix,
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
        let q = linear(x, &self.q_proj)?.reshape((b, t, h, hd))?;
        let k = linear(x, &self.k_proj)?.reshape((b, t, g, hd))?;
        let v = linear(x, &self.v_proj)?.reshape((b, t, g, hd))?;
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
        let y = causal_attention(q, k, v, (hd as f64).powf(-0.5), sight)?;
        Ok(linear(&y.reshape((b, t, h * hd))?, &self.o_proj)?)
    }

    pub(super) fn forward(&self, x: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let [q, k, v] = self.project(x)?;
        self.attend(&q, &k, &v, &documents.into())
    }
}
