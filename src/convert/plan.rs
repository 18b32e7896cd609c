//! The layer plan: which mixer each layer gets, with which sizes, checked before a weight is touched.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ranks::RankRule;
use crate::mixer::{
    AttentionConfig, Mamba2Config, MixerConfig, MlaConfig, RopeConfig, RopeScaling,
};
use crate::model::ModelConfig;
use crate::{Error, Result};

/// What a layer becomes. As text: `attention`, `mamba2`, `mla`, `mla:KV_RANK` or `mla:KV_RANK:Q_RANK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LayerKind {
    /// Kept as the teacher has it.
    Attention,
    /// With ranks of its own, or the plan's.
    Mla {
        kv_lora_rank: Option<usize>,
        q_lora_rank: Option<usize>,
    },
    Mamba2,
}

impl LayerKind {
    /// MLA with the plan's ranks.
    pub const MLA: Self = LayerKind::Mla {
        kv_lora_rank: None,
        q_lora_rank: None,
    };
}

impl FromStr for LayerKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(format!(
                "layer {text:?}: choose attention, mamba2, mla, mla:KV_RANK or mla:KV_RANK:Q_RANK"
            ))
        };
        let mut parts = text.split(':');
        let name = parts.next().unwrap_or_default();
        let mut rank = || -> Result<Option<usize>> {
            let part = parts.next().map(str::parse).transpose();
            part.map_err(|_| wrong())
        };
        let ranks = [rank()?, rank()?];
        match (name, ranks, parts.next()) {
            ("attention", [None, None], None) => Ok(LayerKind::Attention),
            ("mamba2", [None, None], None) => Ok(LayerKind::Mamba2),
            ("mla", [kv_lora_rank, q_lora_rank], None) => Ok(LayerKind::Mla {
                kv_lora_rank,
                q_lora_rank,
            }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for LayerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayerKind::Attention => f.write_str("attention"),
            LayerKind::Mamba2 => f.write_str("mamba2"),
            LayerKind::Mla {
                kv_lora_rank,
                q_lora_rank,
            } => {
                f.write_str("mla")?;
                [kv_lora_rank, q_lora_rank]
                    .into_iter()
                    .flatten()
                    .try_for_each(|rank| write!(f, ":{rank}"))
            }
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

/// What a person says of the student; what is left out follows from the teacher. The same on the command
/// line and in a recipe's `[plan]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct PlanOptions {
    /// Layers that become MLA; the others become Mamba2.
    #[arg(long, value_delimiter = ',', value_name = "I,J,..")]
    pub mla: Vec<usize>,
    /// Layers that keep their attention.
    #[arg(long, value_delimiter = ',', value_name = "I,J,..")]
    pub attention: Vec<usize>,
    /// One mixer a layer, first to last: attention, mamba2, mla, mla:KV_RANK or mla:KV_RANK:Q_RANK.
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND,..", conflicts_with_all = ["mla", "attention"])]
    pub layers: Option<Vec<LayerKind>>,
    /// Rank of the key/value latent: a number, energy:SHARE (X-EcoMLA's rule, layer by layer), budget:P%
    /// of the teacher's KV cache or budget:BYTES a token over all MLA layers [default: an eighth of the
    /// teacher's keys and values].
    #[arg(long = "kv-rank", value_name = "RANK")]
    pub kv_lora_rank: Option<RankRule>,
    /// Rank of the queries: a number or energy:SHARE [default: three quarters of the teacher's].
    #[arg(long = "q-rank", value_name = "RANK")]
    pub q_lora_rank: Option<RankRule>,
    /// Rotated dims of a head [default: half].
    #[arg(long = "rope-dim", value_name = "DIMS")]
    pub qk_rope_head_dim: Option<usize>,
    /// Un-rotated dims of a head [default: the rest].
    #[arg(long = "nope-dim", value_name = "DIMS")]
    pub qk_nope_head_dim: Option<usize>,
    /// RMSNorm on the latents.
    #[arg(long = "lora-layer-norm")]
    pub use_lora_layer_norm: bool,
    /// Latent keys and values for every query head.
    #[arg(long = "full-kv-head")]
    pub use_full_kv_head: bool,
    /// Repeat x and B to all heads before the convolution.
    #[arg(long)]
    pub repeat_kv_before_conv: bool,
    /// YaRN in MLA layers: factor over the original window, e.g. 32,8192. As published; refined layers turn as
    /// the teacher's do.
    #[arg(long, value_name = "FACTOR,WINDOW", value_parser = yarn)]
    pub yarn: Option<(f64, usize)>,
    /// Positions a chunk of the Mamba2 scan.
    #[arg(long, default_value_t = 256)]
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

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            mla: Vec::new(),
            attention: Vec::new(),
            layers: None,
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

impl PlanOptions {
    /// The options with these layers.
    pub fn with_layers(&self, layers: Vec<LayerKind>) -> Self {
        Self {
            mla: Vec::new(),
            attention: Vec::new(),
            layers: Some(layers),
            ..self.clone()
        }
    }

    /// Kinds for a teacher of `count` layers.
    ///
    /// # Errors
    /// Another number of layers, a layer past the last, or one named twice.
    pub fn kinds(&self, count: usize) -> Result<Vec<LayerKind>> {
        if let Some(layers) = &self.layers {
            return match layers.len() == count {
                true => Ok(layers.clone()),
                false => Err(Error::invalid(format!(
                    "the plan names {} layers, the teacher has {count}",
                    layers.len()
                ))),
            };
        }
        let mut kinds = vec![LayerKind::Mamba2; count];
        let mut seen = vec![false; count];
        let mla = self.mla.iter().map(|i| (*i, LayerKind::MLA));
        let kept = self.attention.iter().map(|i| (*i, LayerKind::Attention));
        for (i, kind) in mla.chain(kept) {
            if i >= count {
                return Err(Error::invalid(format!(
                    "layer {i} does not exist: the teacher has layers 0 to {}",
                    count - 1
                )));
            }
            if std::mem::replace(&mut seen[i], true) {
                return Err(Error::invalid(format!("layer {i} is named twice")));
            }
            kinds[i] = kind;
        }
        Ok(kinds)
    }

    /// Rotated and un-rotated dims of a head of `hd`.
    pub(super) fn head_dims(&self, hd: usize) -> (usize, usize) {
        let rope = self
            .qk_rope_head_dim
            .unwrap_or_else(|| hd - self.qk_nope_head_dim.unwrap_or(hd / 2).min(hd));
        let nope = self
            .qk_nope_head_dim
            .unwrap_or_else(|| hd.saturating_sub(rope));
        (rope, nope)
    }

    /// Whether a rank depends on the teacher's weights.
    pub fn needs_weights(&self) -> bool {
        let open = |r: &Option<RankRule>| !matches!(r, None | Some(RankRule::Fixed(_)));
        open(&self.kv_lora_rank) || open(&self.q_lora_rank)
    }
}

/// The student's config.
///
/// # Errors
/// Names the layer and the size that the teacher cannot give, or a rank that depends on weights
/// ([`super::settle_ranks`] makes it a number).
pub fn plan(teacher: &ModelConfig, options: &PlanOptions) -> Result<ModelConfig> {
    let mut student = teacher.clone();
    for (i, kind) in options.kinds(teacher.layers.len())?.into_iter().enumerate() {
        let at = |e: Error| Error::invalid(format!("layer {i}: {e}"));
        let attention = teacher.attention(i)?;
        student.layers[i] = match kind {
            LayerKind::Attention => continue,
            LayerKind::Mla {
                kv_lora_rank,
                q_lora_rank,
            } => {
                let ranks = (kv_lora_rank, q_lora_rank);
                let config = mla(teacher, attention, options, ranks).map_err(at)?;
                config.fits(attention, teacher.hidden_size).map_err(at)?;
                MixerConfig::Mla(config)
            }
            LayerKind::Mamba2 => MixerConfig::Mamba2(Mamba2Config {
                num_heads: attention.num_attention_heads,
                num_kv_heads: attention.num_key_value_heads,
                head_dim: attention.head_dim,
                d_state: attention.head_dim,
                d_conv: 4,
                repeat_kv_before_conv: options.repeat_kv_before_conv,
                chunk_size: options.chunk_size,
            }),
        };
    }
    student.validate()?;
    Ok(student)
}

/// Ranks are multiples of this, as the reference's must be.
pub(super) const RANK_STEP: usize = 8;

fn mla(
    teacher: &ModelConfig,
    a: &AttentionConfig,
    options: &PlanOptions,
    (kv_rank, q_rank): (Option<usize>, Option<usize>),
) -> Result<MlaConfig> {
    let (h, g, hd) = (a.num_attention_heads, a.num_key_value_heads, a.head_dim);
    let rounded = |n: usize| n.div_ceil(RANK_STEP) * RANK_STEP;
    let full_q_rank = teacher.hidden_size.min(h * hd);
    let (rope_dims, nope) = options.head_dims(hd);
    let Some(rope) = &a.rope else {
        return Err(Error::invalid(
            "the teacher's attention has no RoPE to take over",
        ));
    };
    let settled = |own: Option<usize>, rule: &Option<RankRule>, default: usize| match (own, rule) {
        (Some(rank), _) => Ok(rank),
        (None, None) => Ok(default),
        (None, Some(RankRule::Fixed(rank))) => Ok(*rank),
        (None, Some(rule)) => Err(Error::invalid(format!(
            "the rank {rule} depends on the teacher's weights"
        ))),
    };
    let default_q = rounded(full_q_rank * 3 / 4).min(full_q_rank);
    let default_kv = rounded(2 * g * hd / 8).min(teacher.hidden_size);
    Ok(MlaConfig {
        num_attention_heads: h,
        num_key_value_heads: g,
        use_full_kv_head: options.use_full_kv_head,
        q_lora_rank: settled(q_rank, &options.q_lora_rank, default_q)?,
        kv_lora_rank: settled(kv_rank, &options.kv_lora_rank, default_kv)?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rope_dims,
        v_head_dim: hd,
        use_lora_layer_norm: options.use_lora_layer_norm,
        // Llama 3's own scaling is not carried into MLA layers (spec 1.2).
        rope: RopeConfig {
            theta: rope.theta,
            scaling: options.yarn.map(|(factor, window)| RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: window,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor: None,
            }),
            inv_freq: None,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama(layers: usize, d: usize, h: usize, g: usize, hd: usize, ff: usize) -> ModelConfig {
        let attention = AttentionConfig {
            num_attention_heads: h,
            num_key_value_heads: g,
            head_dim: hd,
            rope: Some(RopeConfig::new(500_000.0)),
        };
        ModelConfig {
            model_type: ModelConfig::MODEL_TYPE.into(),
            format_version: crate::model::FORMAT_VERSION,
            hidden_size: d,
            intermediate_size: ff,
            vocab_size: 128_256,
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: d < 4096,
            bos_token_id: Some(128_000),
            eos_token_id: vec![128_009],
            layers: vec![MixerConfig::Attention(attention); layers],
        }
    }

    /// The six released models: KV ratios and parameter counts as published (spec 1.9, 1.10).
    #[test]
    fn published_kv_ratios_and_parameter_counts() {
        let one = llama(16, 2048, 32, 8, 64, 8192);
        let three = llama(28, 3072, 24, 8, 128, 8192);
        let eight = llama(32, 4096, 32, 8, 128, 14336);
        let every = |step: usize, n: usize| (0..n).map(|i| i * step).collect::<Vec<_>>();
        let cases = [
            (
                &one,
                vec![0, 5, 10, 14],
                1344,
                128,
                32,
                32.0,
                "3.91",
                "1.286",
            ),
            (&one, every(2, 8), 1344, 128, 32, 32.0, "7.81", "1.267"),
            (
                &three,
                vec![0, 5, 10, 16, 21, 26],
                1536,
                128,
                64,
                32.0,
                "2.01",
                "3.390",
            ),
            (&three, every(2, 14), 1536, 128, 64, 32.0, "4.69", "3.269"),
            (
                &eight,
                vec![0, 4, 8, 12, 16, 20, 25, 30],
                2048,
                160,
                64,
                8.0,
                "2.73",
                "8.379",
            ),
            (&eight, every(2, 16), 2048, 160, 64, 8.0, "5.47", "8.186"),
        ];
        for (teacher, mla, q, kv, rope, factor, ratio, billions) in cases {
            let student = plan(
                teacher,
                &PlanOptions {
                    mla,
                    q_lora_rank: Some(RankRule::Fixed(q)),
                    kv_lora_rank: Some(RankRule::Fixed(kv)),
                    qk_rope_head_dim: Some(rope),
                    yarn: Some((factor, 8192)),
                    ..PlanOptions::default()
                },
            )
            .unwrap();
            assert_eq!(format!("{:.2}", 100.0 * student.kv_ratio(teacher)), ratio);
            assert_eq!(
                format!("{:.3}", student.cost().params as f64 / 1e9),
                billions
            );
        }
    }

    #[test]
    fn impossible_sizes_are_named() {
        let teacher = llama(2, 64, 8, 4, 8, 172);
        let say = |change: fn(&mut PlanOptions)| {
            let mut options = PlanOptions {
                mla: vec![0],
                ..PlanOptions::default()
            };
            change(&mut options);
            plan(&teacher, &options).unwrap_err().to_string()
        };
        assert!(
            say(|o| o.kv_lora_rank = Some(RankRule::Fixed(65)))
                .contains("kv_lora_rank 65 is above 64")
        );
        assert!(
            say(|o| o.q_lora_rank = Some(RankRule::Fixed(0))).contains("q_lora_rank must not be 0")
        );
        assert!(say(|o| o.qk_rope_head_dim = Some(12)).contains("above the teacher's head_dim 8"));
        assert!(say(|o| o.qk_rope_head_dim = Some(3)).contains("even"));
        assert!(
            say(|o| o.layers = Some(vec![LayerKind::MLA]))
                .contains("names 1 layers, the teacher has 2")
        );
        assert!(say(|o| o.mla = vec![7]).contains("layer 7 does not exist"));
        assert!(say(|o| o.mla = vec![1, 1]).contains("twice"));
        assert!(say(|o| o.kv_lora_rank = Some(RankRule::Energy(0.9))).contains("energy:0.9"));
    }

    #[test]
    fn layers_are_read_as_they_are_written() {
        let layers = ["attention", "mamba2", "mla", "mla:16", "mla:16:48"];
        for text in layers {
            assert_eq!(text.parse::<LayerKind>().unwrap().to_string(), text);
        }
        for text in ["mlaa", "mamba2:3", "mla:x", "mla:1:2:3", ""] {
            let message = text.parse::<LayerKind>().unwrap_err().to_string();
            assert!(message.contains("choose attention"), "{message}");
        }
        let teacher = llama(2, 64, 8, 4, 8, 172);
        let options = PlanOptions {
            layers: Some(vec!["mla:16:40".parse().unwrap(), LayerKind::MLA]),
            ..PlanOptions::default()
        };
        let student = plan(&teacher, &options).unwrap();
        let ranks = student.layers.iter().map(|layer| match layer {
            MixerConfig::Mla(c) => (c.kv_lora_rank, c.q_lora_rank),
            _ => unreachable!(),
        });
        assert_eq!(ranks.collect::<Vec<_>>(), [(16, 40), (8, 48)]);
    }
}
