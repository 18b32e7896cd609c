//! Hugging Face's Qwen3 `config.json`: a Llama that norms the heads of queries and keys.

use std::path::Path;

use serde_json::{Value, json};

use super::{Family, Traits, check_optional_window, llama, with_attention};
use crate::checkpoint::Fields;
use crate::model::ModelConfig;
use crate::{Error, Result};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    traits: Traits {
        qk_norm: true,
        ..Traits::NONE
    },
    read,
    fields: |_| json!({ "use_sliding_window": false }),
};

/// Where it is missing, as transformers take it.
const HEAD_DIM: usize = 128;

fn read(path: &Path, object: &Value) -> Result<ModelConfig> {
    let config = llama::read(path, object)?;
    let f = Fields { path, object };
    check_optional_window(&f, config.max_position_embeddings)?;
    let head_dim = f.maybe_size("head_dim")?.unwrap_or(HEAD_DIM);
    let eps = config.rms_norm_eps;
    let config = with_attention(config, |_, a| {
        a.head_dim = head_dim;
        a.qk_norm_eps = Some(eps);
    });
    config.validate().map_err(|e| Error::file(path, e))?;
    Ok(config)
}
