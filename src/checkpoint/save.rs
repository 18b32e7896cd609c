//! Writing: into a temporary sibling first, then one rename.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::json;

use super::family;
use super::files::{INDEX, bytes_of, write_matrices};
use super::output::{COMPANIONS, check_output};
use super::provenance::Provenance;
use super::{Format, amd, card, fp8, gguf, replace};
use crate::atomic::{parent, private, usual, write_atomic};
use crate::gguf::Gguf;
use crate::model::ModelConfig;
use crate::op::linear::Matrix;
use crate::weights::Weights;
use crate::{Error, Result};

/// Largest file of weights, in bytes; above it they are sharded, as Hugging Face does.
const SHARD: usize = 5_000_000_000;

/// Writes a checkpoint folder: config, weights, the tokenizer files of `source`, and how it came to be (`record`), with a model
/// card. A failure leaves what stood at `out` before. A GGUF file holds no record.
///
/// # Errors
/// A config that the format cannot say, an existing `out` without `force`, a disk that does not take it.
pub fn save(
    out: &Path,
    format: Format,
    config: &ModelConfig,
    weights: impl Into<Weights>,
    source: Option<&Path>,
    record: &Provenance,
    force: bool,
) -> Result<()> {
    let inputs: Vec<&Path> = source.into_iter().collect();
    check_output(out, force, &inputs)?;
    let weights = weights.into();
    let configs = match format {
        Format::Gguf => {
            let source = source.ok_or_else(|| {
                Error::file(out, "a GGUF file holds a tokenizer, and there is none")
            })?;
            let storage = |_: &str, weight: &Matrix| gguf::storage_of(weight);
            return gguf::save_gguf(
                out,
                config,
                &weights,
                source,
                force,
                &storage,
                &gguf::as_kept,
            );
        }
        Format::Zebroid => vec![("config.json", json!(config))],
        Format::Llama => {
            let mut value = family::write(config)?;
            fp8::declare(&mut value, &weights.to_map());
            vec![("config.json", value)]
        }
        Format::Amd if weights.iter().any(|(_, weight)| fp8::is_fp8(weight)) => {
            return Err(Error::file(
                out,
                "AMD's format has no matrices in 8 bits: write format zebroid, or round them first (zebroid export --dtype bf16)",
            ));
        }
        Format::Amd => {
            let (base, hybrid) = amd::write(config)?;
            vec![("config.json", base), ("hybrid_config.json", hybrid)]
        }
    };
    // Dropped, and so removed, when anything below fails.
    let parent = parent(out);
    let partial = private(".zebroid-")
        .tempdir_in(&parent)
        .map_err(Error::io("cannot write into", &parent))?;
    let folder = partial.path();
    #[cfg(unix)]
    fs::set_permissions(folder, usual(0o755)).map_err(Error::io("cannot write into", folder))?;
    write_weights(folder, &fp8::with_scales(&weights.to_map())?, SHARD)?;
    for (name, value) in configs {
        let text = serde_json::to_string_pretty(&value).expect("configs serialise") + "\n";
        write_atomic(&folder.join(name), text.as_bytes())?;
    }
    if let Some(source) = source.filter(|source| Gguf::is_named(source)) {
        let json = serde_json::to_vec_pretty(&gguf::tokenizer_json(source)?);
        let json = json.expect("JSON is written");
        write_atomic(&folder.join("tokenizer.json"), &json)?;
    }
    for name in COMPANIONS {
        if let Some(from) = source.map(|s| s.join(name)).filter(|f| f.exists()) {
            fs::copy(&from, folder.join(name)).map_err(Error::io("cannot copy", &from))?;
        }
    }
    card::write(folder, record, config, format)?;
    replace::replace_folder(folder, out, force)?;
    // The folder has moved; there is nothing left to remove.
    let _ = partial.keep();
    Ok(())
}

fn write_weights(folder: &Path, weights: &BTreeMap<String, Matrix>, limit: usize) -> Result<()> {
    let mut shards: Vec<(usize, BTreeMap<String, Matrix>)> = vec![(0, BTreeMap::new())];
    for (name, weight) in weights {
        let bytes = bytes_of(weight);
        let (filled, shard) = shards.last_mut().expect("starts with one");
        if *filled > 0 && *filled + bytes > limit {
            shards.push((bytes, [(name.clone(), weight.clone())].into()));
        } else {
            *filled += bytes;
            shard.insert(name.clone(), weight.clone());
        }
    }
    let count = shards.len();
    if count == 1 {
        return write_matrices(
            &folder.join("model.safetensors"),
            &shards[0].1,
            Default::default(),
        );
    }
    let mut map = serde_json::Map::new();
    for (i, (_, shard)) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        write_matrices(&folder.join(&name), shard, Default::default())?;
        map.extend(shard.keys().map(|tensor| (tensor.clone(), json!(name))));
    }
    let total: usize = shards.iter().map(|(bytes, _)| bytes).sum();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    write_atomic(&folder.join(INDEX), index.to_string().as_bytes())
}

#[cfg(test)]
pub(super) fn write_sharded(
    folder: &Path,
    tensors: &BTreeMap<String, candle_core::Tensor>,
    limit: usize,
) -> Result<()> {
    write_weights(folder, &Weights::from(tensors).to_map(), limit)
}
