//! What a layer is asked to become: a name with what it says of itself. The plan's options and the teacher's attention
//! settle the rest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::mla::plan::MlaKind;
use super::mla::rank::RankRule;
use super::window::plan::WindowKind;
use super::{AttentionConfig, Mamba2Config, MixerConfig};
use crate::{Error, Result};

/// As text: `attention`, `mamba2`, `mla`, `mla:KV_RANK`, `mla:KV_RANK:Q_RANK`, `window`, `window:SIZE` or `window:SIZE:SINKS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LayerKind {
    /// Kept as the teacher has it.
    Attention,
    Mla(MlaKind),
    Mamba2,
    Window(WindowKind),
}

impl LayerKind {
    /// MLA with the plan's ranks.
    pub const MLA: Self = LayerKind::Mla(MlaKind {
        kv_lora_rank: None,
        q_lora_rank: None,
    });

    /// The window with its default sizes.
    pub const WINDOW: Self = LayerKind::Window(WindowKind {
        sliding_window: None,
        num_sink_tokens: None,
    });

    /// What a plan says of a layer, where that is this kind with sizes of its own, else this kind.
    pub fn specified(self, planned: Self) -> Self {
        match (self, planned) {
            (Self::MLA, LayerKind::Mla(_)) | (Self::WINDOW, LayerKind::Window(_)) => planned,
            _ => self,
        }
    }

    /// As a folder's name.
    pub fn folder(&self) -> String {
        self.to_string().replace(':', "-")
    }

    /// The mixer in the place of `attention` in a model with `hidden` channels.
    ///
    /// # Errors
    /// Names the size that the attention cannot give.
    pub fn settle(
        &self,
        attention: &AttentionConfig,
        hidden: usize,
        options: &MixerOptions,
    ) -> Result<MixerConfig> {
        Ok(match self {
            LayerKind::Attention => MixerConfig::Attention(attention.clone()),
            LayerKind::Mla(kind) => MixerConfig::Mla(kind.settle(attention, hidden, options)?),
            LayerKind::Mamba2 => MixerConfig::Mamba2(Mamba2Config::settle(attention, options)),
            LayerKind::Window(kind) => MixerConfig::Window(kind.settle(attention)),
        })
    }
}

impl FromStr for LayerKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let arguments: Vec<&str> = parts.collect();
        let kind = match (name, arguments.as_slice()) {
            ("attention", []) => Some(LayerKind::Attention),
            ("mamba2", []) => Some(LayerKind::Mamba2),
            ("mla", arguments) => MlaKind::parse(arguments).map(LayerKind::Mla),
            ("window", arguments) => WindowKind::parse(arguments).map(LayerKind::Window),
            _ => None,
        };
        kind.ok_or_else(|| {
            Error::invalid(format!(
                "layer {text:?}: choose attention, mamba2, {}, {}",
                MlaKind::SPELLINGS,
                WindowKind::SPELLINGS
            ))
        })
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayerKind::Attention => f.write_str("attention"),
            LayerKind::Mamba2 => f.write_str("mamba2"),
            LayerKind::Mla(kind) => kind.fmt(f),
            LayerKind::Window(kind) => kind.fmt(f),
        }
    }
}

impl TryFrom<String> for LayerKind {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<LayerKind> for String {
    fn from(kind: LayerKind) -> String {
        kind.to_string()
    }
}

/// What a plan says of its mixers' sizes; what is left out follows from the teacher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default)]
pub struct MixerOptions {
    /// Rank of the key/value latent: a number, energy:SHARE (X-EcoMLA's rule, layer by layer), budget:P%
    /// of the teacher's KV cache or budget:BYTES a token over all MLA layers [default: an eighth of the
    /// teacher's keys and values].
    #[arg(long, visible_alias = "kv-rank", value_name = "RANK")]
    pub kv_lora_rank: Option<RankRule>,
    /// Rank of the queries: a number or energy:SHARE [default: three quarters of the teacher's].
    #[arg(long, visible_alias = "q-rank", value_name = "RANK")]
    pub q_lora_rank: Option<RankRule>,
    /// Rotated dims of a head [default: half].
    #[arg(long, visible_alias = "rope-dim", value_name = "DIMS")]
    pub qk_rope_head_dim: Option<usize>,
    /// Un-rotated dims of a head [default: the rest].
    #[arg(long, visible_alias = "nope-dim", value_name = "DIMS")]
    pub qk_nope_head_dim: Option<usize>,
    /// RMSNorm on the latents.
    #[arg(long, visible_alias = "lora-layer-norm")]
    pub use_lora_layer_norm: bool,
    /// Latent keys and values for every query head.
    #[arg(long, visible_alias = "full-kv-head")]
    pub use_full_kv_head: bool,
    /// Repeat x and B to all heads before the convolution.
    #[arg(long)]
    pub repeat_kv_before_conv: bool,
    /// YaRN in MLA layers: factor over the original window, e.g. 32,8192. As published; refined layers turn as
    /// the teacher's do.
    #[arg(long, value_name = "FACTOR,WINDOW", value_parser = yarn)]
    pub yarn: Option<(f64, usize)>,
    /// Positions per chunk of the Mamba2 scan.
    #[arg(long, default_value_t = Self::default().chunk_size)]
    pub chunk_size: usize,
}

fn yarn(text: &str) -> std::result::Result<(f64, usize), String> {
    let parts = text
        .split_once(',')
        .ok_or("give FACTOR,WINDOW, e.g. 32,8192")?;
    let factor = parts
        .0
        .parse()
        .map_err(|_| format!("{} is no number", parts.0))?;
    let window = parts
        .1
        .parse()
        .map_err(|_| format!("{} is no number of positions", parts.1))?;
    Ok((factor, window))
}

impl Default for MixerOptions {
    fn default() -> Self {
        Self {
            kv_lora_rank: None,
            q_lora_rank: None,
            qk_rope_head_dim: None,
            qk_nope_head_dim: None,
            use_lora_layer_norm: false,
            use_full_kv_head: false,
            repeat_kv_before_conv: false,
            yarn: None,
            chunk_size: 256,
        }
    }
}

impl MixerOptions {
    /// Whether a rank depends on the teacher's weights.
    pub fn has_open_ranks(&self) -> bool {
        let rules = [self.kv_lora_rank, self.q_lora_rank];
        rules.iter().flatten().any(RankRule::is_open)
    }

    /// Ranks that depend on the teacher's weights left at their defaults.
    pub fn without_open_ranks(&self) -> Self {
        let number = |rule: Option<RankRule>| rule.filter(|r| !r.is_open());
        Self {
            kv_lora_rank: number(self.kv_lora_rank),
            q_lora_rank: number(self.q_lora_rank),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_read_as_they_are_written() {
        let layers = [
            "attention",
            "mamba2",
            "mla",
            "mla:16",
            "mla:16:48",
            "window",
            "window:8",
            "window:8:0",
        ];
        for text in layers {
            assert_eq!(text.parse::<LayerKind>().unwrap().to_string(), text);
        }
        for text in ["mlaa", "mamba2:3", "mla:x", "mla:1:2:3", ""] {
            let message = text.parse::<LayerKind>().unwrap_err().to_string();
            assert!(message.contains("choose attention"), "{message}");
        }
    }
}
