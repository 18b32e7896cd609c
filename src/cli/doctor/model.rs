//! Whether a checkpoint is whole, and its parts belong together.

use std::path::Path;

use super::Check;
use crate::checkpoint::{Checkpoint, Provenance};
use crate::cli::show::{bytes, thousands};
use crate::data::Tokenizer;
use crate::data::chat::Message;
use crate::op::runtime::free_memory;
use crate::watch::Watch;
use crate::{Error, Result};

/// # Errors
/// Ctrl-C.
pub(super) fn checks(path: &Path, watch: &dyn Watch) -> Result<Vec<Check>> {
    let mut all = Vec::new();
    let config = match Checkpoint::config_only(path) {
        Ok((config, _)) => config,
        Err(error) => {
            let mend = "Name the folder of a checkpoint, and fetch its config.json again if it is garbled.";
            return Ok(vec![Check::failure("config", error, mend)]);
        }
    };
    all.push(Check::ok(
        "config",
        format!(
            "{} layers, {} parameters",
            config.layers.len(),
            thousands(config.parameters())
        ),
    ));
    match Checkpoint::open(path) {
        Ok(opened) => {
            let disk = opened.on_disk();
            let tensors: usize = disk.values().map(|of| of.tensors).sum();
            all.push(Check::ok(
                "tensors",
                format!("{tensors}, as the config needs them"),
            ));
            all.push(match opened.examine(watch) {
                Ok(()) => Check::ok("values", "checksums are right, all numbers are finite"),
                Err(Error::Interrupted(said)) => return Err(Error::Interrupted(said)),
                Err(error) => {
                    Check::failure("values", error, "Copy or download the named file again.")
                }
            });
            all.extend(room(disk.values().map(|of| of.bytes).sum()));
        }
        Err(error) => {
            let mend = "Copy or download the checkpoint again, or the files that are named.";
            all.push(Check::failure("tensors", error, mend));
        }
    }
    all.extend(words(path, config.vocab_size));
    if let Some(error) = Provenance::read(path).err().filter(|_| path.is_dir()) {
        let mend = "Remove provenance.json: the model works without it.";
        all.push(Check::failure("record", error, mend));
    }
    Ok(all)
}

/// Weights are read where they stand: what is more than memory is read from the disk again for every token.
fn room(weights: usize) -> Option<Check> {
    let free = free_memory()?;
    let said = format!("{} of weights, {} free", bytes(weights), bytes(free));
    Some(match weights > free {
        true => Check::warning(
            "room",
            said,
            "Round the weights with zebroid quantize, or free memory: it will be slow.",
        ),
        false => Check::ok("room", said),
    })
}

/// The tokenizer and what it makes of a conversation.
fn words(path: &Path, rows: usize) -> Vec<Check> {
    const SAID: &str = "Hello, 世界!";
    let tokenizer = Tokenizer::open(path).and_then(|tokenizer| {
        tokenizer.check(rows)?;
        let ids = tokenizer.encode(SAID)?;
        match ids.iter().find(|id| **id as usize >= rows) {
            Some(id) => Err(Error::invalid(format!(
                "token {id} is not among the {rows} that are embedded"
            ))),
            None => tokenizer.decode(&ids).map(|_| tokenizer),
        }
    });
    let tokenizer = match tokenizer {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            let mend = "Copy tokenizer.json (and tokenizer_config.json) from the checkpoint that this model was made from.";
            return vec![Check::failure("tokenizer", error, mend)];
        }
    };
    let mut all = vec![Check::ok(
        "tokenizer",
        format!("{} tokens", thousands(tokenizer.vocab_size())),
    )];
    if tokenizer.eos().is_empty() {
        all.push(Check::warning(
            "end of text",
            "no token ends a text",
            "Name one as eos_token_id in generation_config.json, or give --stop or --max-tokens.",
        ));
    }
    let said = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    let talk = [
        said("user", SAID),
        said("assistant", SAID),
        said("user", SAID),
    ];
    let template = tokenizer.chat_template();
    all.push(match template.and_then(|found| found.map(|t| t.render(&talk)).transpose()) {
        Ok(Some(_)) => Check::ok("chat template", "compiles"),
        Ok(None) => Check::ok("chat template", "none: name one with --chat-template to talk"),
        Err(error) => Check::failure(
            "chat template",
            error,
            "Fetch chat_template.jinja or tokenizer_config.json again, or name another with --chat-template.",
        ),
    });
    all
}
