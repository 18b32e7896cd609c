//! Sliding-window attention with sinks: each token sees the nearest tokens (Mistral, arXiv 2310.06825) and the first ones
//! (StreamingLLM, arXiv 2309.17453), so that the cache stops growing. It is the teacher's attention with the same weights;
//! positions are those of the text, not of the cache.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::attention::{Attention, AttentionConfig};
use super::rotary::RopeConfig;
use super::sizes::{MAX_POSITIONS, at_most, bounded};
use super::{Cost, Param, Pass, Windows};
use crate::Result;
use crate::op::Documents;
use crate::op::attention::{Sight, Window as Reach};
use crate::weights::Weights;

mod decode;
pub mod plan;
pub use decode::Decoder;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowConfig {
    /// `H`
    pub num_attention_heads: usize,
    /// `G`, a divisor of `H`
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Absent: no position embedding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope: Option<RopeConfig>,
    /// Nearest tokens that are seen, a token itself among them.
    pub sliding_window: usize,
    /// First tokens that are seen from everywhere.
    pub num_sink_tokens: usize,
}

impl WindowConfig {
    fn attention(&self) -> AttentionConfig {
        AttentionConfig {
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            rope: self.rope.clone(),
        }
    }

    fn reach(&self) -> Reach {
        Reach {
            size: self.sliding_window,
            sinks: self.num_sink_tokens,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        bounded("sliding_window", self.sliding_window, MAX_POSITIONS)?;
        at_most("num_sink_tokens", self.num_sink_tokens, MAX_POSITIONS)?;
        self.attention().validate()
    }

    pub(super) fn show(&self) -> String {
        let own = format!(
            "last {} first {}",
            self.sliding_window, self.num_sink_tokens
        );
        format!("{}, {own}", self.attention().show())
    }

    pub(super) fn params(&self, hidden: usize) -> Vec<Param> {
        self.attention().params(hidden)
    }

    pub(super) fn cost(&self, hidden: usize, length: usize) -> Cost {
        let most = self.sliding_window + self.num_sink_tokens;
        self.attention().cost(hidden, length.min(most))
    }

    pub(super) fn pass(&self, windows: Windows) -> Pass {
        let reach = self.sliding_window.saturating_add(self.num_sink_tokens);
        self.attention().pass_within(windows, reach)
    }
}

#[derive(Debug)]
pub struct Window {
    attention: Attention,
    reach: Reach,
}

impl Window {
    pub(super) fn new(config: &WindowConfig, weights: &Weights) -> Result<Self> {
        Ok(Self {
            attention: Attention::new(&config.attention(), weights)?,
            reach: config.reach(),
        })
    }

    pub(super) fn forward(&self, x: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        let [q, k, v] = self.attention.project(x)?;
        let sight = Sight {
            documents: documents.cloned(),
            window: Some(self.reach),
        };
        self.attention.attend(&q, &k, &v, &sight)
    }
}
