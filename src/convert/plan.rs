//! The layer plan: what is asked ([`PlanOptions`]) and what it means for a teacher ([`LayerPlan`]), checked before a weight
//! is touched.

use serde::{Deserialize, Serialize};

use crate::mixer::{LayerKind, MixerConfig, MixerOptions};
use crate::model::ModelConfig;
use crate::{Error, Result};

/// What a person says of the student; what is left out follows from the teacher. The same on the command
/// line and in a recipe's `[plan]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct PlanOptions {
    /// Layers that become MLA; the others become Mamba2.
    #[arg(long, value_delimiter = ',', value_name = "I,J,..")]
    pub mla: Vec<usize>,
    /// Layers that keep their attention.
    #[arg(long, value_delimiter = ',', value_name = "I,J,..")]
    pub attention: Vec<usize>,
    /// One mixer a layer, first to last: attention, mamba2, mla[:KV_RANK[:Q_RANK]] or window[:SIZE[:SINKS]].
    #[arg(long, value_delimiter = ',', value_name = "KIND,KIND,..", conflicts_with_all = ["mla", "attention"])]
    pub layers: Option<Vec<LayerKind>>,
    #[command(flatten)]
    #[serde(flatten)]
    pub sizes: MixerOptions,
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

    /// Whether a rank depends on the teacher's weights.
    pub fn needs_weights(&self) -> bool {
        self.sizes.has_open_ranks()
    }

    /// What the options mean.
    ///
    /// # Errors
    /// Names the layer and the size that the teacher cannot give, or a rank that depends on weights
    /// ([`super::settle_ranks`] makes it a number).
    pub fn settle(&self, teacher: &ModelConfig) -> Result<LayerPlan> {
        let kinds = self.kinds(teacher.layers.len())?;
        let layers = kinds.iter().enumerate().map(|(i, kind)| {
            let at = |e: Error| Error::invalid(format!("layer {i}: {e}"));
            let (attention, width) = (teacher.attention(i)?, teacher.hidden_size);
            kind.settle(attention, width, &self.sizes).map_err(at)
        });
        let converted = |i: &usize| kinds[*i] != LayerKind::Attention;
        Ok(LayerPlan {
            layers: layers.collect::<Result<_>>()?,
            converted: (0..kinds.len()).filter(converted).collect(),
        })
    }
}

/// The mixer of every layer, all sizes numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPlan {
    pub layers: Vec<MixerConfig>,
    /// Layers that are no longer the teacher's.
    pub converted: Vec<usize>,
}

impl LayerPlan {
    /// The teacher's config with these layers.
    ///
    /// # Errors
    /// Sizes that cannot work together.
    pub fn student(self, teacher: &ModelConfig) -> Result<ModelConfig> {
        let student = ModelConfig {
            layers: self.layers,
            converted: Some(self.converted),
            ..teacher.clone()
        };
        student.validate()?;
        Ok(student)
    }
}

/// The student's config.
///
/// # Errors
/// As [`PlanOptions::settle`] and [`LayerPlan::student`].
pub fn plan(teacher: &ModelConfig, options: &PlanOptions) -> Result<ModelConfig> {
    options.settle(teacher)?.student(teacher)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mixer::mla::rank::RankRule;
    use crate::mixer::{AttentionConfig, RopeConfig};

    fn llama(layers: usize, d: usize, h: usize, g: usize, hd: usize, ff: usize) -> ModelConfig {
        let attention = AttentionConfig::new(h, g, hd, Some(RopeConfig::new(500_000.0)));
        ModelConfig {
            model_type: ModelConfig::MODEL_TYPE.into(),
            format_version: crate::model::FORMAT_VERSION,
            hidden_size: d,
            intermediate_size: ff,
            vocab_size: 128_256,
            max_position_embeddings: 131_072,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: d < 4096,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logits_scaling: 1.0,
            bos_token_id: Some(128_000),
            eos_token_id: vec![128_009],
            layers: vec![MixerConfig::Attention(attention); layers],
            converted: None,
        }
    }

    /// The six released models: KV ratios and parameter counts as published (arXiv 2505.17272).
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
                    sizes: MixerOptions {
                        q_lora_rank: Some(RankRule::Fixed(q)),
                        kv_lora_rank: Some(RankRule::Fixed(kv)),
                        qk_rope_head_dim: Some(rope),
                        yarn: Some((factor, 8192)),
                        ..MixerOptions::default()
                    },
                    ..PlanOptions::default()
                },
            )
            .unwrap();
            assert_eq!(
                format!(
                    "{:.2}",
                    100.0 * student.kv_ratio(teacher, teacher.max_position_embeddings)
                ),
                ratio
            );
            assert_eq!(
                format!("{:.3}", student.parameters() as f64 / 1e9),
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
            say(|o| o.sizes.kv_lora_rank = Some(RankRule::Fixed(65)))
                .contains("kv_lora_rank 65 is above 64")
        );
        assert!(
            say(|o| o.sizes.q_lora_rank = Some(RankRule::Fixed(0)))
                .contains("q_lora_rank must not be 0")
        );
        assert!(
            say(|o| o.sizes.qk_rope_head_dim = Some(12)).contains("above the teacher's head_dim 8")
        );
        assert!(say(|o| o.sizes.qk_rope_head_dim = Some(3)).contains("even"));
        assert!(
            say(|o| o.layers = Some(vec![LayerKind::MLA]))
                .contains("names 1 layers, the teacher has 2")
        );
        assert!(say(|o| o.mla = vec![7]).contains("layer 7 does not exist"));
        assert!(say(|o| o.mla = vec![1, 1]).contains("twice"));
        assert!(say(|o| o.sizes.kv_lora_rank = Some(RankRule::Energy(0.9))).contains("energy:0.9"));
    }

    #[test]
    fn a_layer_may_have_ranks_of_its_own() {
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
        assert_eq!(student.converted(), [0, 1]);
    }
}
