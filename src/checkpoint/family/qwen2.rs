//! Hugging Face's Qwen2 `config.json` (Qwen2.5 too): a Llama with biases on queries, keys and values.

use std::path::Path;

use serde_json::{Value, json};

use super::{Family, Traits, check_optional_window, llama, with_attention};
use crate::Result;
use crate::checkpoint::Fields;
use crate::model::ModelConfig;

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    traits: Traits {
        attention_bias: true,
        ..Traits::NONE
    },
    read,
    fields: |_| json!({ "use_sliding_window": false }),
};

fn read(path: &Path, object: &Value) -> Result<ModelConfig> {
    let config = llama::read(path, object)?;
    check_optional_window(&Fields { path, object }, config.max_position_embeddings)?;
    Ok(with_attention(config, |_, a| a.attention_bias = true))
}
