//! Writing: into a temporary sibling first, then one rename.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::family::llama;
use super::files::{INDEX, bytes_of, write_matrices};
use super::{Format, amd, bank, replace};
use crate::model::ModelConfig;
use crate::op::linear::Matrix;
use crate::weights::Weights;
use crate::{Error, Result};

/// Files of the source that go along with the weights.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Largest file of weights, in bytes; above it they are sharded, as Hugging Face does.
const SHARD: usize = 5_000_000_000;

/// # Errors
/// When `out` exists and `force` does not allow to replace it, holds what zebroid did not write, is one of
/// `inputs` or stands inside or around one; or its parent cannot hold it. To be asked before long work
/// begins.
pub fn check_output(out: &Path, force: bool, inputs: &[&Path]) -> Result<()> {
    if out.file_name().is_none() {
        return Err(Error::file(out, "not a name for an output folder"));
    }
    if let Ok(place) = out.canonicalize() {
        let clash = |input: &&&Path| {
            let input = input.canonicalize().unwrap_or_else(|_| input.to_path_buf());
            place.starts_with(&input) || input.starts_with(&place)
        };
        if let Some(input) = inputs.iter().find(clash) {
            let message = format!("{} is read: choose another output", input.display());
            return Err(Error::file(out, message));
        }
    }
    replaceable(out, force)?;
    let parent = parent(out);
    fs::create_dir_all(&parent).map_err(Error::io("cannot create", &parent))?;
    private(".zebroid-")
        .tempfile_in(&parent)
        .map(drop)
        .map_err(Error::io("cannot write into", &parent))
}

/// # Errors
/// When something stands at `out` that must stay: without `force` anything, with it what is no checkpoint,
/// bank or finished run.
pub(super) fn replaceable(out: &Path, force: bool) -> Result<()> {
    if out.symlink_metadata().is_err() {
        return Ok(());
    }
    if !force {
        let message = "already exists; choose another output, or replace it with --force";
        return Err(Error::file(out, message));
    }
    if !out.is_dir() || out.is_symlink() {
        return Err(Error::file(out, "not a folder; choose another output"));
    }
    match foreign(out)? {
        Some(entry) => Err(Error::file(
            &entry,
            format!(
                "not written by zebroid, so --force does not remove it: choose another output than {}, or move it away",
                out.display()
            ),
        )),
        None => Ok(()),
    }
}

/// The first entry of a folder that is no part of a checkpoint, or of a bank, whose candidates are folders of
/// their own.
fn foreign(folder: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(folder).map_err(Error::io("cannot list", folder))? {
        let path = entry.map_err(Error::io("cannot list", folder))?.path();
        let found = match path.is_dir() && !path.is_symlink() {
            // A folder inside a candidate is nobody's.
            true if path.join("config.json").is_file() => foreign(&path)?,
            true => Some(path),
            false => (!written_here(&path)).then_some(path),
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn written_here(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let known = [
        "config.json",
        "hybrid_config.json",
        "metrics.jsonl",
        INDEX,
        bank::INDEX,
    ];
    let shard = name.starts_with("model-") && name.ends_with(".safetensors");
    name == "model.safetensors"
        || shard
        || known.contains(&name.as_ref())
        || COMPANIONS.contains(&name.as_ref())
}

pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Writes a checkpoint folder: config, weights, and the tokenizer files of `source`. A failure leaves
/// what stood at `out` before.
///
/// # Errors
/// A config that the format cannot say, an existing `out` without `force`, a disk that does not take it.
pub fn save(
    out: &Path,
    format: Format,
    config: &ModelConfig,
    weights: impl Into<Weights>,
    source: Option<&Path>,
    force: bool,
) -> Result<()> {
    let inputs: Vec<&Path> = source.into_iter().collect();
    check_output(out, force, &inputs)?;
    let configs = match format {
        Format::Zebroid => vec![("config.json", json!(config))],
        Format::Llama => vec![("config.json", llama::write(config)?)],
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
    write_weights(folder, &weights.into().to_map(), SHARD)?;
    for (name, value) in configs {
        let text = serde_json::to_string_pretty(&value).expect("configs serialise") + "\n";
        write_atomic(&folder.join(name), text.as_bytes())?;
    }
    for name in COMPANIONS {
        if let Some(from) = source.map(|s| s.join(name)).filter(|f| f.exists()) {
            fs::copy(&from, folder.join(name)).map_err(Error::io("cannot copy", &from))?;
        }
    }
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

pub(super) fn private(prefix: &str) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    builder
}

/// Temporary entries are made for their owner alone; what is kept gets the usual mode.
#[cfg(unix)]
fn usual(mode: u32) -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}

/// Writes a file, whole or not at all.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes))
}

/// The same, of what is not held in memory as a whole.
pub(super) fn write_atomic_with(
    path: &Path,
    content: impl FnOnce(&mut fs::File) -> std::io::Result<()>,
) -> Result<()> {
    let parent = parent(path);
    let write = || -> std::io::Result<()> {
        let mut file = private(".zebroid-").tempfile_in(&parent)?;
        #[cfg(unix)]
        file.as_file().set_permissions(usual(0o644))?;
        content(file.as_file_mut())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        replace::sync_folder(&parent)
    };
    write().map_err(Error::io("cannot write", path))
}

#[cfg(test)]
pub(super) fn write_sharded(
    folder: &Path,
    tensors: &BTreeMap<String, candle_core::Tensor>,
    limit: usize,
) -> Result<()> {
    write_weights(folder, &Weights::from(tensors).to_map(), limit)
}
