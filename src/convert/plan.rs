//! The layer plan: which mixer each layer gets, with which sizes, checked before a weight is touched.

use serde::{Deserialize, Serialize};

use crate::mixer::{
    AttentionConfig, Mamba2Config, MixerConfig, MlaConfig, RopeConfig, RopeScaling,
};
use crate::model::ModelConfig;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LayerKind {
    /// Kept as the teacher has it.
    Attention,
    Mla,
    Mamba2,
}

/// What a person says of the student; what is left out follows from the teacher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanOptions {
    /// One kind a layer, first to last.
    pub layers: Vec<LayerKind>,
    /// Default: an eighth of the teacher's keys and values, in multiples of 8.
    pub kv_lora_rank: Option<usize>,
    /// Default: three quarters of the teacher's query rank, in multiples of 8.
    pub q_lora_rank: Option<usize>,
    /// Default: half the head.
    pub qk_rope_head_dim: Option<usize>,
    /// Default: the rest of the head.
    pub qk_nope_head_dim: Option<usize>,
    #[serde(default)]
    pub use_lora_layer_norm: bool,
    /// Keys and values of the latent for every query head.
    #[serde(default)]
    pub use_full_kv_head: bool,
    #[serde(default)]
    pub repeat_kv_before_conv: bool,
    /// YaRN inside MLA layers: factor and original window.
    pub yarn: Option<(f64, usize)>,
    /// Positions a chunk of the scan.
    pub chunk_size: usize,
}

impl PlanOptions {
    pub fn new(layers: Vec<LayerKind>) -> Self {
        Self {
            layers,
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

    /// Kinds for `count` layers: `mla` and `attention` where said, Mamba2 elsewhere.
    ///
    /// # Errors
    /// A layer past the last, or named twice.
    pub fn place(count: usize, mla: &[usize], attention: &[usize]) -> Result<Vec<LayerKind>> {
        let mut kinds = vec![LayerKind::Mamba2; count];
        let mut seen = vec![false; count];
        let wanted = mla.iter().map(|i| (*i, LayerKind::Mla));
        for (i, kind) in wanted.chain(attention.iter().map(|i| (*i, LayerKind::Attention))) {
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
}

/// The student's config.
///
/// # Errors
/// Names the layer and the size that the teacher cannot give.
pub fn plan(teacher: &ModelConfig, options: &PlanOptions) -> Result<ModelConfig> {
    let (given, have) = (options.layers.len(), teacher.layers.len());
    if given != have {
        return Err(Error::invalid(format!(
            "the plan names {given} layers, the teacher has {have}"
        )));
    }
    let mut student = teacher.clone();
    for (i, kind) in options.layers.iter().enumerate() {
        let at = |e: Error| Error::invalid(format!("layer {i}: {e}"));
        let attention = teacher.attention(i)?;
        student.layers[i] = match kind {
            LayerKind::Attention => continue,
            LayerKind::Mla => {
                let config = mla(teacher, attention, options).map_err(at)?;
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

fn mla(teacher: &ModelConfig, a: &AttentionConfig, options: &PlanOptions) -> Result<MlaConfig> {
    let (h, g, hd) = (a.num_attention_heads, a.num_key_value_heads, a.head_dim);
    let multiple_of_8 = |n: usize| n.div_ceil(8) * 8;
    let q_rank = teacher.hidden_size.min(h * hd);
    let kv_heads = if options.use_full_kv_head { h } else { g };
    let rope_dims = options
        .qk_rope_head_dim
        .unwrap_or_else(|| hd - options.qk_nope_head_dim.unwrap_or(hd / 2).min(hd));
    let nope = options
        .qk_nope_head_dim
        .unwrap_or_else(|| hd.saturating_sub(rope_dims));
    let Some(rope) = &a.rope else {
        return Err(Error::invalid(
            "the teacher's attention has no RoPE to take over",
        ));
    };
    Ok(MlaConfig {
        num_attention_heads: h,
        num_key_value_heads: kv_heads,
        q_lora_rank: options
            .q_lora_rank
            .unwrap_or_else(|| multiple_of_8(q_rank * 3 / 4).min(q_rank)),
        kv_lora_rank: options
            .kv_lora_rank
            .unwrap_or_else(|| multiple_of_8(2 * g * hd / 8).min(teacher.hidden_size)),
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
            let kinds = PlanOptions::place(teacher.layers.len(), &mla, &[]).unwrap();
            let student = plan(
                teacher,
                &PlanOptions {
                    q_lora_rank: Some(q),
                    kv_lora_rank: Some(kv),
                    qk_rope_head_dim: Some(rope),
                    yarn: Some((factor, 8192)),
                    ..PlanOptions::new(kinds)
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
            let mut options = PlanOptions::new(vec![LayerKind::Mla, LayerKind::Mamba2]);
            change(&mut options);
            plan(&teacher, &options).unwrap_err().to_string()
        };
        assert!(say(|o| o.kv_lora_rank = Some(65)).contains("kv_lora_rank 65 is above 64"));
        assert!(say(|o| o.q_lora_rank = Some(0)).contains("q_lora_rank must not be 0"));
        assert!(say(|o| o.qk_rope_head_dim = Some(12)).contains("above the teacher's head_dim 8"));
        assert!(say(|o| o.qk_rope_head_dim = Some(3)).contains("even"));
        assert!(
            say(|o| o.layers = vec![LayerKind::Mla]).contains("names 1 layers, the teacher has 2")
        );
        let place = |mla: &[usize]| PlanOptions::place(5, mla, &[]).unwrap_err().to_string();
        assert!(place(&[7]).contains("layer 7 does not exist"));
        assert!(place(&[1, 1]).contains("twice"));
    }
}
