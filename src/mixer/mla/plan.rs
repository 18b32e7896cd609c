//! MLA in a layer plan: how it is spelled, and its sizes beside a teacher's attention.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::MlaConfig;
use super::rank::{RANK_STEP, RankRule};
use crate::mixer::{AttentionConfig, MixerOptions, RopeConfig, RopeScaling};
use crate::{Error, Result};

/// Where nothing turns.
const THETA: f64 = 10_000.0;

/// `mla`, `mla:KV_RANK` or `mla:KV_RANK:Q_RANK`: with ranks of its own, or the plan's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MlaKind {
    pub kv_lora_rank: Option<usize>,
    pub q_lora_rank: Option<usize>,
}

impl MlaKind {
    pub(crate) const SPELLINGS: &str = "mla, mla:KV_RANK or mla:KV_RANK:Q_RANK";

    /// From what stands after the name; `None`: not spelled so.
    pub(crate) fn parse(arguments: &[&str]) -> Option<Self> {
        let rank = |i: usize| {
            let number = arguments.get(i).map(|text| text.parse());
            number.transpose().ok()
        };
        (arguments.len() <= 2).then_some(())?;
        Some(Self {
            kv_lora_rank: rank(0)?,
            q_lora_rank: rank(1)?,
        })
    }

    /// The config in the place of attention `a` of a model with `hidden` channels.
    ///
    /// # Errors
    /// Names the size that the attention cannot give, or a rank that depends on its weights.
    pub(crate) fn settle(
        &self,
        a: &AttentionConfig,
        hidden: usize,
        options: &MixerOptions,
    ) -> Result<MlaConfig> {
        let (h, g, hd) = (a.num_attention_heads, a.num_key_value_heads, a.head_dim);
        let rounded = |n: usize| n.div_ceil(RANK_STEP) * RANK_STEP;
        let full_q_rank = hidden.min(h * hd);
        let rank = |own: Option<usize>, rule: &Option<RankRule>, default: usize| match (own, rule) {
            (Some(rank), _) => Ok(rank),
            (None, Some(RankRule::Fixed(rank))) => Ok(*rank),
            (None, None) => Ok(default),
            (None, Some(rule)) => Err(Error::invalid(format!(
                "the rank {rule} depends on the teacher's weights"
            ))),
        };
        let default_q = rounded(full_q_rank * 3 / 4).min(full_q_rank);
        let default_kv = rounded(2 * g * hd / 8).min(hidden);
        let rope_dims = match &a.rope {
            Some(_) => options
                .qk_rope_head_dim
                .unwrap_or_else(|| hd - options.qk_nope_head_dim.unwrap_or(hd / 2).min(hd)),
            // A layer without positions (SmolLM3 has some) has nothing to turn.
            None => 0,
        };
        let plain_dims = match &a.rope {
            Some(_) => options.qk_nope_head_dim,
            None => None,
        };
        let config = MlaConfig {
            num_attention_heads: h,
            num_key_value_heads: g,
            use_full_kv_head: options.use_full_kv_head,
            q_lora_rank: rank(self.q_lora_rank, &options.q_lora_rank, default_q)?,
            kv_lora_rank: rank(self.kv_lora_rank, &options.kv_lora_rank, default_kv)?,
            qk_nope_head_dim: plain_dims.unwrap_or_else(|| hd.saturating_sub(rope_dims)),
            qk_rope_head_dim: rope_dims,
            v_head_dim: hd,
            use_lora_layer_norm: options.use_lora_layer_norm,
            attention_bias: a.attention_bias,
            // Llama 3's own scaling is not carried into MLA layers, as published.
            rope: RopeConfig {
                theta: a.rope.as_ref().map_or(THETA, |rope| rope.theta),
                scaling: options
                    .yarn
                    .filter(|_| rope_dims > 0)
                    .map(|(factor, window)| RopeScaling::Yarn {
                        factor,
                        original_max_position_embeddings: window,
                        beta_fast: 32.0,
                        beta_slow: 1.0,
                        attention_factor: None,
                    }),
                inv_freq: None,
            },
        };
        config.fits(a, hidden)?;
        Ok(config)
    }
}

impl fmt::Display for MlaKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("mla")?;
        let mut ranks = [self.kv_lora_rank, self.q_lora_rank].into_iter().flatten();
        ranks.try_for_each(|rank| write!(f, ":{rank}"))
    }
}
