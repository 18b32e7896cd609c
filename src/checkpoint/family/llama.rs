//! Hugging Face's Llama `config.json`: what the other families' have too.

use std::path::Path;

use serde_json::{Value, json};

use super::{Family, Traits};
use crate::checkpoint::Fields;
use crate::mixer::sizes::{MAX_LAYERS, bounded};
use crate::mixer::{AttentionConfig, MixerConfig, RopeConfig, RopeScaling};
use crate::model::{FORMAT_VERSION, ModelConfig};
use crate::{Error, Result};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    traits: Traits::NONE,
    read,
    fields: |_| json!({}),
};

/// # Errors
/// Names the field that is missing, of a wrong type, or asks for what is not supported.
pub(in crate::checkpoint) fn read(path: &Path, value: &Value) -> Result<ModelConfig> {
    let f = Fields {
        path,
        object: value,
    };
    supported(&f)?;
    let layers = f.size("num_hidden_layers")?;
    bounded("num_hidden_layers", layers, MAX_LAYERS).map_err(|e| Error::file(path, e))?;
    let hidden = f.size("hidden_size")?;
    let heads = f.size("num_attention_heads")?;
    let head_dim = match f.maybe_size("head_dim")? {
        Some(dim) => dim,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(Error::file(
                path,
                format!(
                    "hidden_size {hidden} does not divide into {heads} heads, and head_dim is missing"
                ),
            ));
        }
    };
    let kv_heads = f.maybe_size("num_key_value_heads")?.unwrap_or(heads);
    let attention = AttentionConfig::new(heads, kv_heads, head_dim, Some(rope(path, value)?));
    let config = ModelConfig {
        model_type: ModelConfig::MODEL_TYPE.into(),
        format_version: FORMAT_VERSION,
        hidden_size: hidden,
        intermediate_size: f.size("intermediate_size")?,
        vocab_size: f.size("vocab_size")?,
        max_position_embeddings: f.maybe_size("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: f.number("rms_norm_eps", 1e-6)?,
        tie_word_embeddings: f.flag("tie_word_embeddings")?,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        logits_scaling: 1.0,
        bos_token_id: f.ids("bos_token_id")?.first().copied(),
        eos_token_id: f.ids("eos_token_id")?,
        layers: vec![MixerConfig::Attention(attention); layers],
        converted: None,
    };
    config.validate().map_err(|e| Error::file(path, e))?;
    Ok(config)
}

/// # Errors
/// Names the field that asks for what no layer here computes.
pub(in crate::checkpoint) fn supported(f: &Fields) -> Result<()> {
    for field in ["attention_bias", "mlp_bias"] {
        if f.flag(field)? {
            return Err(Error::file(
                f.path,
                format!("{field}: true is not supported"),
            ));
        }
    }
    match f.given("hidden_act") {
        Some(other) if other != "silu" => Err(Error::file(
            f.path,
            format!("hidden_act {other} is not supported, only \"silu\""),
        )),
        _ => Ok(()),
    }
}

/// `rope_theta` with `rope_scaling`, or the newer `rope_parameters` that holds both.
fn rope(path: &Path, value: &Value) -> Result<RopeConfig> {
    let f = Fields {
        path,
        object: value,
    };
    let parameters = f.object("rope_parameters")?;
    let scaling = match parameters {
        Some(parameters) => Some(parameters),
        None => f.object("rope_scaling")?,
    };
    let theta = Fields {
        path,
        object: parameters.unwrap_or(value),
    };
    Ok(RopeConfig {
        theta: theta.number("rope_theta", 10_000.0)?,
        scaling: scaling
            .map(|s| read_scaling(path, s))
            .transpose()?
            .flatten(),
        inv_freq: None,
    })
}

pub(in crate::checkpoint) fn read_scaling(
    path: &Path,
    value: &Value,
) -> Result<Option<RopeScaling>> {
    let f = Fields {
        path,
        object: value,
    };
    let kind = match f.given("rope_type").or_else(|| f.given("type")) {
        Some(Value::String(kind)) => kind.as_str(),
        Some(other) => {
            return Err(Error::file(
                path,
                format!("rope_scaling: rope_type must be a name, not {other}"),
            ));
        }
        None if f.given("factor").is_some() => {
            return Err(Error::file(path, "rope_scaling: rope_type is missing"));
        }
        None => "default",
    };
    let factor = || match f.given("factor") {
        Some(_) => f.number("factor", 1.0),
        None => Err(Error::file(path, "rope_scaling: factor is missing")),
    };
    // Of YaRN, as DeepSeek's code reads it; only what follows from the factor is computed here.
    for (field, usual) in [("mscale", 1.0), ("mscale_all_dim", 0.0)] {
        let found = f.number(field, usual)?;
        if found != usual {
            return Err(Error::file(
                path,
                format!("rope_scaling: {field} {found} is not supported, only {usual}"),
            ));
        }
    }
    Ok(match kind {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: factor()? }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: f.number("low_freq_factor", 1.0)?,
            high_freq_factor: f.number("high_freq_factor", 4.0)?,
            original_max_position_embeddings: f.size("original_max_position_embeddings")?,
        }),
        "yarn" => Some(RopeScaling::Yarn {
            factor: factor()?,
            original_max_position_embeddings: f.size("original_max_position_embeddings")?,
            beta_fast: f.number("beta_fast", 32.0)?,
            beta_slow: f.number("beta_slow", 1.0)?,
            attention_factor: match f.given("attention_factor") {
                Some(_) => Some(f.number("attention_factor", 1.0)?),
                None => None,
            },
        }),
        other => {
            return Err(Error::file(
                path,
                format!("rope_scaling type {other} is not supported: none, linear, llama3 or yarn"),
            ));
        }
    })
}

/// The fields that those of other families and AMD's have too.
pub(in crate::checkpoint) fn base(
    config: &ModelConfig,
    a: &AttentionConfig,
    theta: f64,
    scaling: Value,
) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers.len(),
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_key_value_heads,
        "head_dim": a.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": match config.eos_token_id.as_slice() {
            [one] => json!(one),
            list => json!(list),
        },
        "use_cache": true,
    })
}
