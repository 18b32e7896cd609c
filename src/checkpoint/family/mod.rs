//! Families of pretrained models: what their `config.json` says, one file each.

use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::model::ModelConfig;

pub(super) mod llama;
mod mistral;

/// Reads a `config.json`.
type Read = fn(&Path, &Value) -> Result<ModelConfig>;

/// By `model_type`. SmolLM, SmolLM2 and TinyLlama say `llama` too.
pub(super) const ALL: [(&str, Read); 2] = [("llama", llama::read), ("mistral", mistral::read)];
