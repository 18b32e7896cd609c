//! Hugging Face's Mistral `config.json`: a Llama whose attention may be within a window.

use std::path::Path;

use serde_json::{Value, json};

use super::{Family, Traits, check_window, llama};
use crate::checkpoint::Fields;
use crate::model::ModelConfig;
use crate::{Error, Result};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    architecture: "MistralForCausalLM",
    traits: Traits::NONE,
    read,
    fields: |_| json!({ "sliding_window": null }),
};

fn read(path: &Path, object: &Value) -> Result<ModelConfig> {
    let config = llama::read(path, object)?;
    let f = Fields { path, object };
    // Where it is missing transformers take 4,096.
    if object.get("sliding_window").is_none() {
        return Err(Error::file(
            path,
            "sliding_window is missing: add it, null if attention is not within a window",
        ));
    }
    check_window(
        &f,
        f.maybe_size("sliding_window")?,
        config.max_position_embeddings,
    )?;
    Ok(config)
}
