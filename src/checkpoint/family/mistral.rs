//! Hugging Face's Mistral `config.json`: a Llama whose attention may be within a window.

use std::path::Path;

use serde_json::Value;

use super::llama;
use crate::checkpoint::Fields;
use crate::model::ModelConfig;
use crate::{Error, Result};

/// # Errors
/// As [`llama::read`]; a window that is shorter than the context.
pub(super) fn read(path: &Path, value: &Value) -> Result<ModelConfig> {
    let config = llama::read(path, value)?;
    let f = Fields {
        path,
        object: value,
    };
    let context = config.max_position_embeddings;
    // Where it is missing transformers take 4,096.
    if value.get("sliding_window").is_none() {
        return Err(Error::file(
            path,
            "sliding_window is missing: add it, null if attention is not within a window",
        ));
    }
    match f.maybe_size("sliding_window")? {
        Some(window) if window < context => Err(Error::file(
            path,
            format!(
                "sliding_window {window} is below max_position_embeddings {context}: attention within a window is not \
                 supported in a teacher. Up to {window} tokens there is no difference: set sliding_window to null and \
                 max_position_embeddings to {window}"
            ),
        )),
        _ => Ok(config),
    }
}
