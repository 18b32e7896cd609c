//! Hugging Face's Granite `config.json` (dense): a Llama with multipliers of embeddings, scores, residuals and logits.

use std::path::Path;

use serde_json::{Value, json};

use super::{Family, Traits, llama, with_attention};
use crate::checkpoint::Fields;
use crate::mixer::MixerConfig;
use crate::model::ModelConfig;
use crate::{Error, Result};

pub(super) const FAMILY: Family = Family {
    model_type: "granite",
    architecture: "GraniteForCausalLM",
    traits: Traits {
        multipliers: true,
        ..Traits::NONE
    },
    read,
    fields,
};

fn read(path: &Path, object: &Value) -> Result<ModelConfig> {
    let mut config = llama::read(path, object)?;
    let f = Fields { path, object };
    // All are 1 where they are missing.
    config.embedding_multiplier = f.number("embedding_multiplier", 1.0)?;
    config.residual_multiplier = f.number("residual_multiplier", 1.0)?;
    config.logits_scaling = f.number("logits_scaling", 1.0)?;
    let scale = f.number("attention_multiplier", 1.0)?;
    let config = with_attention(config, |_, a| a.attention_multiplier = Some(scale));
    config.validate().map_err(|e| Error::file(path, e))?;
    Ok(config)
}

fn fields(config: &ModelConfig) -> Value {
    let scale = match &config.layers[0] {
        MixerConfig::Attention(a) => a.scale(),
        _ => 1.0,
    };
    let mut fields = json!({ "attention_multiplier": scale });
    for (name, value) in config.multipliers() {
        fields[name] = json!(value);
    }
    fields
}
