//! Families of pretrained models: what their `config.json` says, one file each.

use std::path::Path;

use serde_json::{Value, json};

use super::Fields;
use crate::mixer::{AttentionConfig, MixerConfig, RopeConfig};
use crate::model::ModelConfig;
use crate::{Error, Result};

mod granite;
pub(super) mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod smollm3;

pub(super) struct Family {
    /// As `config.json` says it.
    pub model_type: &'static str,
    /// Of Hugging Face's class.
    pub architecture: &'static str,
    /// Its models have just these.
    pub traits: Traits,
    /// # Errors
    /// Names the field that is missing, of a wrong type, or asks for what is not supported.
    pub read: fn(&Path, &Value) -> Result<ModelConfig>,
    /// What its `config.json` has beside or other than a Llama's.
    pub fields: fn(&ModelConfig) -> Value,
}

/// SmolLM, SmolLM2 and TinyLlama say `llama` too. What two families can say is written as the first of them.
pub(super) const ALL: [Family; 6] = [
    llama::FAMILY,
    mistral::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    smollm3::FAMILY,
    granite::FAMILY,
];

/// Families that are asked for, and what it is in them that no layer here computes. By the beginning of `model_type`.
pub(super) const REFUSED: [(&str, &str); 14] = [
    (
        "gemma",
        "norms by 1 + weight, GELU and (Gemma 2) soft caps of scores and logits",
    ),
    ("phi3", "queries, keys and values in one matrix"),
    ("phi", "layer norms and parallel attention and MLP"),
    ("mixtral", "experts"),
    ("qwen2_moe", "experts"),
    ("qwen3_moe", "experts"),
    ("qwen3_next", "gated delta nets"),
    ("granitemoe", "experts"),
    ("deepseek", "experts and MLA as it was pretrained"),
    ("gpt_oss", "experts and learned sinks of attention"),
    ("olmo2", "norms behind mixer and MLP"),
    ("cohere", "layer norms and parallel attention and MLP"),
    ("falcon", "layer norms and parallel attention and MLP"),
    ("gpt", "learned positions and layer norms"),
];

/// What makes models of a family other than a Llama.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Traits {
    /// Queries, keys and values have biases.
    pub attention_bias: bool,
    /// Heads of queries and keys are normed.
    pub qk_norm: bool,
    /// Embeddings, scores, residuals or logits are multiplied.
    pub multipliers: bool,
    /// Some layers have no positions.
    pub no_rope_layers: bool,
}

impl Traits {
    pub const NONE: Self = Self {
        attention_bias: false,
        qk_norm: false,
        multipliers: false,
        no_rope_layers: false,
    };

    pub fn of(config: &ModelConfig) -> Self {
        let layers = || {
            config.layers.iter().filter_map(|layer| match layer {
                MixerConfig::Attention(a) => Some(a),
                _ => None,
            })
        };
        Self {
            attention_bias: layers().any(|a| a.attention_bias),
            qk_norm: layers().any(|a| a.qk_norm_eps.is_some()),
            multipliers: config.multipliers().iter().any(|(_, value)| *value != 1.0)
                || layers().any(|a| a.attention_multiplier.is_some()),
            no_rope_layers: layers().any(|a| a.rope.is_none()),
        }
    }
}

/// A config with every layer's attention changed by `change`, which is told the layer.
fn with_attention(
    mut config: ModelConfig,
    change: impl Fn(usize, &mut AttentionConfig),
) -> ModelConfig {
    for (i, layer) in config.layers.iter_mut().enumerate() {
        if let MixerConfig::Attention(attention) = layer {
            change(i, attention);
        }
    }
    config
}

/// # Errors
/// Attention within a window that is shorter than the context.
fn check_window(f: &Fields, window: Option<usize>, context: usize) -> Result<()> {
    match window {
        Some(window) if window < context => Err(Error::file(
            f.path,
            format!(
                "sliding_window {window} is below max_position_embeddings {context}: attention within a window is not \
                 supported in a teacher. Up to {window} tokens there is no difference: set sliding_window to null and \
                 max_position_embeddings to {window}"
            ),
        )),
        _ => Ok(()),
    }
}

/// As [`check_window`], of families in which a window is used where `use_sliding_window` or `layer_types` says so.
fn check_optional_window(f: &Fields, context: usize) -> Result<()> {
    let types = f.given("layer_types").and_then(Value::as_array);
    let full = types.is_none_or(|types| types.iter().all(|kind| kind == "full_attention"));
    match f.flag("use_sliding_window")? || !full {
        true => check_window(f, f.maybe_size("sliding_window")?, context),
        false => Ok(()),
    }
}

/// The `config.json` of the family that has such models.
///
/// # Errors
/// When a layer is not attention, layers differ in more than having positions, or no family has all of it.
pub(super) fn write(config: &ModelConfig) -> Result<Value> {
    let refuse = |why: String| Err(Error::invalid(format!("{why}: use --format zebroid")));
    let MixerConfig::Attention(first) = &config.layers[0] else {
        return refuse(format!(
            "layer 0 ({}) is not attention, the one mixer that Hugging Face's formats have",
            config.layers[0].name()
        ));
    };
    let mut rope: Option<&RopeConfig> = None;
    for (i, layer) in config.layers.iter().enumerate() {
        let same = match layer {
            MixerConfig::Attention(a) => {
                let turns = rope.is_none() || a.rope.is_none() || rope == a.rope.as_ref();
                rope = rope.or(a.rope.as_ref());
                let of_first = AttentionConfig {
                    rope: a.rope.clone(),
                    ..first.clone()
                };
                turns && *a == of_first
            }
            _ => false,
        };
        if !same {
            return refuse(format!(
                "layer {i} ({}) differs from layer 0: Hugging Face's formats have attention of one size in all layers",
                layer.name()
            ));
        }
    }
    let Some(rope) = rope.filter(|rope| rope.inv_freq.is_none()) else {
        return refuse("Hugging Face's formats need RoPE with the standard frequencies".into());
    };
    if first
        .qk_norm_eps
        .is_some_and(|eps| eps != config.rms_norm_eps)
    {
        return refuse("the norms of heads have another epsilon than those of layers".into());
    }
    let traits = Traits::of(config);
    let Some(family) = ALL.iter().find(|family| family.traits == traits) else {
        return refuse(format!(
            "no family of Hugging Face's is as this model is, {traits:?}"
        ));
    };
    let mut value = llama::base(config, first, rope.theta, json!(rope.scaling));
    value["model_type"] = json!(family.model_type);
    value["architectures"] = json!([family.architecture]);
    if let (Some(all), Value::Object(own)) = (value.as_object_mut(), (family.fields)(config)) {
        all.extend(own);
    }
    Ok(value)
}
