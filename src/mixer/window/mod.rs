//! Sliding-window attention with sinks: each token sees the nearest tokens (Mistral, arXiv 2310.06825) and the first ones
//! (StreamingLLM, arXiv 2309.17453), so that the cache stops growing. It is the teacher's attention with the same weights;
//! positions are those of the text, not of the cache.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::attention::{Attention, AttentionConfig};
use super::sizes::{MAX_POSITIONS, at_most, bounded};
use super::{Cost, Param, Pass, Windows};
use crate::Result;
use crate::op::Documents;
use crate::op::attention::{Sight, Window as Reach};
use crate::weights::Weights;

mod cuda;
mod decode;
pub mod plan;
pub use cuda::OnGpu;
pub use decode::Decoder;

/// Its fields stand beside those of the attention, as in Mistral's `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct WindowConfig {
    pub attention: AttentionConfig,
    /// Nearest tokens that are seen, a token itself among them.
    pub sliding_window: usize,
    /// First tokens that are seen from everywhere.
    pub num_sink_tokens: usize,
}

const OWN: [&str; 2] = ["sliding_window", "num_sink_tokens"];

impl TryFrom<Map<String, Value>> for WindowConfig {
    type Error = String;

    fn try_from(mut fields: Map<String, Value>) -> std::result::Result<Self, String> {
        let [sliding_window, num_sink_tokens] = OWN.map(|name| match fields.remove(name) {
            Some(value) => serde_json::from_value(value).map_err(|e| format!("{name}: {e}")),
            None => Err(format!("missing field `{name}`")),
        });
        let attention = serde_json::from_value(Value::Object(fields));
        Ok(Self {
            attention: attention.map_err(|e| e.to_string())?,
            sliding_window: sliding_window?,
            num_sink_tokens: num_sink_tokens?,
        })
    }
}

impl From<WindowConfig> for Map<String, Value> {
    fn from(config: WindowConfig) -> Self {
        let mut fields = match serde_json::to_value(&config.attention) {
            Ok(Value::Object(fields)) => fields,
            _ => unreachable!("configs serialise as objects"),
        };
        let own = OWN
            .into_iter()
            .zip([config.sliding_window, config.num_sink_tokens]);
        fields.extend(own.map(|(name, size)| (name.to_owned(), size.into())));
        fields
    }
}

impl WindowConfig {
    fn reach(&self) -> Reach {
        Reach {
            size: self.sliding_window,
            sinks: self.num_sink_tokens,
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        bounded("sliding_window", self.sliding_window, MAX_POSITIONS)?;
        at_most("num_sink_tokens", self.num_sink_tokens, MAX_POSITIONS)?;
        self.attention.validate()
    }

    pub(super) fn show(&self) -> String {
        let own = format!(
            "last {} first {}",
            self.sliding_window, self.num_sink_tokens
        );
        format!("{}, {own}", self.attention.show())
    }

    pub(super) fn params(&self, hidden: usize) -> Vec<Param> {
        self.attention.params(hidden)
    }

    pub(super) fn cost(&self, hidden: usize, length: usize) -> Cost {
        let most = self.sliding_window + self.num_sink_tokens;
        self.attention.cost(hidden, length.min(most))
    }

    pub(super) fn pass(&self, windows: Windows) -> Pass {
        let reach = self.sliding_window.saturating_add(self.num_sink_tokens);
        self.attention.pass_within(windows, reach)
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
            attention: Attention::new(&config.attention, weights)?,
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
