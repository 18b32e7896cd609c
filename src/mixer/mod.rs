//! Sequence mixers: what stands between a layer's first norm and its residual addition.
//!
//! A mixer is a folder (its place in a plan, config, forward, decoding, what it remembers, cost, birth from attention
//! weights) and a variant of [`LayerKind`], [`MixerConfig`], [`Mixer`] and [`Decoder`]; the laws in
//! `tests.rs` run over every variant.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::op::Documents;
use crate::weights::Weights;

pub mod attention;
pub mod batch;
pub mod calibration;
#[cfg(test)]
mod calibration_tests;
pub mod cuda;
pub mod kind;
pub mod linalg;
pub mod mamba2;
pub mod memory;
pub mod mla;
mod paged;
pub mod pass;
pub mod rotary;
pub mod shelf;
pub mod sizes;
#[cfg(test)]
mod tests;
pub mod window;
pub mod work;

use calibration::{Sample, Statistics};

pub use attention::{Attention, AttentionConfig, AttentionWeights};
pub use kind::{LayerKind, MixerOptions};
pub use mamba2::{Mamba2, Mamba2Config};
pub use memory::{CacheType, Full, Keeps, Memory, Pool, Span};
pub use mla::{Mla, MlaConfig};
pub use pass::{Pass, Windows};
pub use rotary::{RopeConfig, RopeScaling};
pub use window::{Window, WindowConfig};
pub use work::Work;

/// A tensor a mixer owns: its name after the layer's prefix, and its shape.
pub type Param = (String, Vec<usize>);

/// One layer's mixer and its sizes, as `config.json` of our format spells it (tag `mixer`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "mixer", rename_all = "snake_case")]
pub enum MixerConfig {
    Attention(AttentionConfig),
    Mla(MlaConfig),
    Mamba2(Mamba2Config),
    Window(WindowConfig),
}

/// What a mixer needs to be stored, and to run a sequence of a given length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Trained scalars.
    pub params: usize,
    /// Scalars of KV cache at the length that was asked for.
    pub cached: usize,
    /// Scalars of recurrent state, whatever the length.
    pub state: usize,
}

impl std::ops::Add for Cost {
    type Output = Cost;
    fn add(self, other: Cost) -> Cost {
        Cost {
            params: self.params + other.params,
            cached: self.cached + other.cached,
            state: self.state + other.state,
        }
    }
}

impl MixerConfig {
    /// The tag in `config.json`, the name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            MixerConfig::Attention(_) => "attention",
            MixerConfig::Mla(_) => "mla",
            MixerConfig::Mamba2(_) => "mamba2",
            MixerConfig::Window(_) => "window",
        }
    }

    /// The mixer's prefix inside a layer (`model.layers.N.<prefix>`), as Hugging Face and AMD name it.
    pub fn prefix(&self) -> &'static str {
        match self {
            MixerConfig::Attention(_) | MixerConfig::Window(_) => "self_attn",
            MixerConfig::Mla(_) => "mla",
            MixerConfig::Mamba2(_) => "mamba",
        }
    }

    /// # Errors
    /// Names the field and value that no mixer can be made from.
    pub fn validate(&self) -> Result<()> {
        match self {
            MixerConfig::Attention(c) => c.validate(),
            MixerConfig::Mla(c) => c.validate(),
            MixerConfig::Mamba2(c) => c.validate(),
            MixerConfig::Window(c) => c.validate(),
        }
    }

    /// Every tensor of this mixer in a model of `hidden` channels.
    pub fn params(&self, hidden: usize) -> Vec<Param> {
        match self {
            MixerConfig::Attention(c) => c.params(hidden),
            MixerConfig::Mla(c) => c.params(hidden),
            MixerConfig::Mamba2(c) => c.params(hidden),
            MixerConfig::Window(c) => c.params(hidden),
        }
    }

    /// Weights that hold several matrices, one above the other: the tensor's name and each matrix's rows.
    pub fn stacked(&self) -> Vec<(&'static str, Vec<usize>)> {
        match self {
            MixerConfig::Attention(_) | MixerConfig::Window(_) => vec![],
            MixerConfig::Mla(c) => c.stacked(),
            MixerConfig::Mamba2(c) => c.stacked(),
        }
    }

    /// Matrices that are taken apart as tensors, not only multiplied by.
    pub fn read(&self) -> &'static [&'static str] {
        match self {
            MixerConfig::Mla(_) => &["kv_b_proj.weight"],
            MixerConfig::Attention(_) | MixerConfig::Mamba2(_) | MixerConfig::Window(_) => &[],
        }
    }

    /// The tensor that makes the mixer's output of what its heads give, `[D, ..]`.
    pub fn output(&self) -> &'static str {
        match self {
            MixerConfig::Attention(_) | MixerConfig::Window(_) => "o_proj.weight",
            MixerConfig::Mla(_) | MixerConfig::Mamba2(_) => "out_proj.weight",
        }
    }

    /// The sizes, for people.
    pub fn show(&self) -> String {
        match self {
            MixerConfig::Attention(c) => c.show(),
            MixerConfig::Mla(c) => c.show(),
            MixerConfig::Mamba2(c) => c.show(),
            MixerConfig::Window(c) => c.show(),
        }
    }

    /// The mixer from the attention in whose place it stands.
    ///
    /// # Errors
    /// When the attention's sizes cannot give it.
    pub fn born(&self, attention: &AttentionWeights, birth: &Birth) -> Result<Born> {
        let mut config = self.clone();
        let tensors = match (&mut config, birth) {
            (MixerConfig::Attention(_) | MixerConfig::Window(_), _) => attention.tensors(),
            (MixerConfig::Mla(c), Birth::Published { .. }) => mla::published(c, attention)?,
            (
                MixerConfig::Mla(c),
                Birth::Refined {
                    statistics,
                    samples,
                },
            ) => {
                let (chosen, fitted) = mla::refined(c, attention, statistics, samples)?;
                *c = chosen;
                fitted.tensors
            }
            (MixerConfig::Mamba2(c), Birth::Published { seed }) => {
                mamba2::published(c, attention, *seed)?
            }
            (
                MixerConfig::Mamba2(c),
                Birth::Refined {
                    statistics,
                    samples,
                },
            ) => mamba2::refined(c, attention, statistics, samples)?.tensors,
        };
        Ok(Born { config, tensors })
    }

    /// What a sequence of `length` tokens costs in a model of `hidden` channels, by closed formulas.
    pub fn cost(&self, hidden: usize, length: usize) -> Cost {
        match self {
            MixerConfig::Attention(c) => c.cost(hidden, length),
            MixerConfig::Mla(c) => c.cost(hidden, length),
            MixerConfig::Mamba2(c) => c.cost(hidden),
            MixerConfig::Window(c) => c.cost(hidden, length),
        }
    }

    /// Scalars that attention with this mixer's keys and values caches for a token: of a converted layer the teacher's.
    pub fn full_cache(&self) -> usize {
        match self {
            MixerConfig::Attention(c) => c.full_cache(),
            MixerConfig::Mla(c) => c.full_cache(),
            MixerConfig::Mamba2(c) => c.full_cache(),
            MixerConfig::Window(c) => c.attention.full_cache(),
        }
    }

    /// What training `windows` takes beyond the mixer's input, its output and the products with its weights.
    pub fn pass(&self, windows: Windows) -> Pass {
        match self {
            MixerConfig::Attention(c) => c.pass(windows),
            MixerConfig::Mla(c) => c.pass(windows),
            MixerConfig::Mamba2(c) => c.pass(windows),
            MixerConfig::Window(c) => c.pass(windows),
        }
    }
}

/// How a mixer comes from attention.
pub enum Birth<'a> {
    /// As published; what it draws follows from the seed.
    Published { seed: u64 },
    /// Fitted to the attention on text.
    Refined {
        statistics: &'a Statistics,
        samples: &'a [Sample],
    },
}

/// A mixer that came from attention.
pub struct Born {
    /// Where it turned by frequencies of its own, it says so.
    pub config: MixerConfig,
    /// By their names after the mixer's prefix.
    pub tensors: Vec<(String, Tensor)>,
}

/// A mixer with its weights.
#[derive(Debug)]
pub enum Mixer {
    Attention(Attention),
    Mla(Mla),
    Mamba2(Mamba2),
    Window(Window),
}

impl Mixer {
    /// `weights` seen from the mixer's prefix.
    pub fn new(config: &MixerConfig, weights: &Weights) -> Result<Self> {
        Ok(match config {
            MixerConfig::Attention(c) => Mixer::Attention(Attention::new(c, weights)?),
            MixerConfig::Mla(c) => Mixer::Mla(Mla::new(c, weights)?),
            MixerConfig::Mamba2(c) => Mixer::Mamba2(Mamba2::new(c, weights)?),
            MixerConfig::Window(c) => Mixer::Window(Window::new(c, weights)?),
        })
    }

    /// Whole sequences, for training: `x [B, T, D]` → `[B, T, D]`.
    pub fn forward(&self, x: &Tensor, documents: Option<&Documents>) -> Result<Tensor> {
        match self {
            Mixer::Attention(m) => m.forward(x, documents),
            Mixer::Mla(m) => m.forward(x, documents),
            Mixer::Mamba2(m) => m.forward(x, documents),
            Mixer::Window(m) => m.forward(x, documents),
        }
    }

    /// The layer as it decodes, on the CPU.
    pub fn decoder(&self) -> Result<Decoder> {
        Ok(match self {
            Mixer::Attention(m) => Decoder::Attention(m.decoder()?),
            Mixer::Mla(m) => Decoder::Mla(m.decoder()?),
            Mixer::Mamba2(m) => Decoder::Mamba2(m.decoder()?),
            Mixer::Window(m) => Decoder::Window(m.decoder()?),
        })
    }
}

/// A mixer that reads the next tokens of sequences, in f32 over weights as they are stored. What it gives for a token does not depend on
/// what is read beside it, nor on where a sequence was cut into pieces.
#[derive(Debug)]
pub enum Decoder {
    Attention(attention::Decoder),
    Mla(mla::Decoder),
    Mamba2(mamba2::Decoder),
    Window(window::Decoder),
}

impl Decoder {
    /// What it remembers of a sequence.
    pub fn keeps(&self) -> Keeps {
        match self {
            Decoder::Attention(m) => m.keeps(),
            Decoder::Mla(m) => m.keeps(),
            Decoder::Mamba2(m) => m.keeps(),
            Decoder::Window(m) => m.keeps(),
        }
    }

    /// The next tokens of some sequences, as layer `layer` of their memories, in which there is room for them: `x [N, D]` → `out [N, D]`.
    pub fn mix(
        &self,
        layer: usize,
        x: &[f32],
        spans: &mut [Span],
        out: &mut [f32],
        work: &mut Work,
    ) {
        match self {
            Decoder::Attention(m) => m.mix(layer, x, spans, out, work),
            Decoder::Mla(m) => m.mix(layer, x, spans, out, work),
            Decoder::Mamba2(m) => m.mix(layer, x, spans, out, work),
            Decoder::Window(m) => m.mix(layer, x, spans, out, work),
        }
    }
}
