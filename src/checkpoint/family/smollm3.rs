//! Hugging Face's SmolLM3 `config.json`: a Llama in which every fourth layer has no positions.

use std::path::Path;

use serde_json::{Value, json};

use super::{Family, Traits, check_optional_window, llama, with_attention};
use crate::Result;
use crate::checkpoint::Fields;
use crate::mixer::MixerConfig;
use crate::model::ModelConfig;

pub(super) const FAMILY: Family = Family {
    model_type: "smollm3",
    architecture: "SmolLM3ForCausalLM",
    traits: Traits {
        no_rope_layers: true,
        ..Traits::NONE
    },
    read,
    fields,
};

const THETA: f64 = 2_000_000.0;
/// Where it is missing, as transformers take it.
const INTERVAL: usize = 4;
/// A list of a number a layer: 1 where it has positions, in spite of the name.
const LAYERS: &str = "no_rope_layers";

fn read(path: &Path, object: &Value) -> Result<ModelConfig> {
    // Where they are missing, as transformers take them: older ones wrote only what differs.
    let mut object = object.clone();
    if object.get("tie_word_embeddings").is_none() {
        object["tie_word_embeddings"] = json!(true);
    }
    if object.get("rope_theta").is_none() && object.get("rope_parameters").is_none() {
        object["rope_theta"] = json!(THETA);
    }
    let object = &object;
    let config = llama::read(path, object)?;
    let f = Fields { path, object };
    check_optional_window(&f, config.max_position_embeddings)?;
    let count = config.layers.len();
    let turns: Vec<bool> = match f.given(LAYERS) {
        Some(list) => {
            let list = list.as_array().filter(|list| list.len() == count);
            let wanted = format!("a list of {count} numbers, 0 or 1");
            let list = list.ok_or_else(|| f.wrong(LAYERS, &wanted))?;
            let turns = list.iter().map(|layer| match layer.as_u64() {
                Some(turns @ 0..=1) => Ok(turns == 1),
                _ => Err(f.wrong(LAYERS, &wanted)),
            });
            turns.collect::<Result<_>>()?
        }
        None => {
            let interval = f.maybe_size("no_rope_layer_interval")?.unwrap_or(INTERVAL);
            (0..count)
                .map(|i| !(i + 1).is_multiple_of(interval))
                .collect()
        }
    };
    Ok(with_attention(config, |i, a| {
        a.rope = a.rope.take().filter(|_| turns[i]);
    }))
}

fn fields(config: &ModelConfig) -> Value {
    let turns = |layer: &MixerConfig| match layer {
        MixerConfig::Attention(a) => u8::from(a.rope.is_some()),
        _ => 1,
    };
    let layers: Vec<u8> = config.layers.iter().map(turns).collect();
    json!({ LAYERS: layers, "use_sliding_window": false })
}
