//! Where an output may stand, and what may be replaced by it.

use std::fs;
use std::path::{Path, PathBuf};

use super::bank;
use super::files::INDEX;
use super::provenance::{CARD, RECORD};
use crate::atomic::{parent, private, remove_stale};
use crate::gguf::Gguf;
use crate::{Error, Result};

/// Files of the source that go along with the weights.
pub(super) const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// Scalars of a training run for TensorBoard, which knows the file by the middle of its name.
pub const EVENTS: &str = "events.out.tfevents.zebroid";
/// What the student of a training run wrote now and then.
pub const SAMPLES: &str = "samples.jsonl";

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
    remove_stale(&parent);
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
    if Gguf::is_named(out) && out.is_file() && !out.is_symlink() {
        return match Gguf::begins(out)? {
            true => Ok(()),
            false => Err(Error::file(
                out,
                "not a GGUF file, so --force does not replace it; choose another output",
            )),
        };
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
///
/// # Errors
/// A folder that cannot be listed.
pub fn foreign(folder: &Path) -> Result<Option<PathBuf>> {
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
        "layers.safetensors",
        EVENTS,
        SAMPLES,
        "data.json",
        "logits.json",
        INDEX,
        bank::INDEX,
        RECORD,
    ];
    let shard = name.starts_with("model-") && name.ends_with(".safetensors");
    let shard = shard || name.ends_with(".logits");
    // A model card is ours where our record stands beside it: other models have one too.
    let card = name == CARD && file.with_file_name(RECORD).exists();
    name == "model.safetensors"
        || shard
        || card
        || known.contains(&name.as_ref())
        || COMPANIONS.contains(&name.as_ref())
}
