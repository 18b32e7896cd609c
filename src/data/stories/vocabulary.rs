//! The stories' tokenizer: each word with the space before it is one token, so an answer is one
//! prediction; anything else is spelled in bytes, so no prompt fails.
//!
//! It is a byte-level BPE without merges that takes whole words from its vocabulary (`ignore_merges`, as
//! in the Llama 3 tokenizer), a file every Hugging Face tool reads.

use std::{collections::BTreeSet, fs, path::Path};

use serde_json::{Map, Value, json};
use tokenizers::{
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    pre_tokenizers::byte_level::ByteLevel,
};

use super::StoryGenerator;
use crate::{
    data::Tokenizer,
    error::{Error, Result},
};

/// The id of `<s>`, which begins each story.
pub const BOS: u32 = 0;
/// The id of `</s>`, which ends it.
pub const EOS: u32 = 1;

/// Words are collected from this many stories: each template and word comes up hundreds of times.
const SAMPLE: usize = 5_000;

/// The tokenizer of the stories, with `<s>` and `</s>`.
pub fn tokenizer() -> Result<Tokenizer> {
    let folder =
        tempfile::tempdir().map_err(Error::io("cannot create", Path::new("temporary folder")))?;
    write_tokenizer(folder.path())?;
    Tokenizer::open(folder.path())
}

/// Writes `tokenizer.json` and `tokenizer_config.json` into an existing folder.
pub fn write_tokenizer(folder: &Path) -> Result<()> {
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": false,
    });
    for (name, json) in [
        ("tokenizer.json", tokenizer_json()?),
        ("tokenizer_config.json", config),
    ] {
        let path = folder.join(name);
        fs::write(&path, format!("{json:#}\n")).map_err(Error::io("cannot write", &path))?;
    }
    Ok(())
}

fn tokenizer_json() -> Result<Value> {
    let mut alphabet: Vec<String> = ByteLevel::alphabet()
        .into_iter()
        .map(String::from)
        .collect();
    alphabet.sort();
    let tokens = ["<s>", "</s>"]
        .map(String::from)
        .into_iter()
        .chain(alphabet);
    let vocab: Map<String, Value> = tokens
        .chain(words()?)
        .zip(0..)
        .map(|(t, id)| (t, json!(id)))
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "special": true, "normalized": false,
               "single_word": false, "lstrip": false, "rstrip": false})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(BOS, "<s>"), special(EOS, "</s>")],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": true, "vocab": vocab, "merges": [],
        },
    }))
}

/// Every word of the stories longer than a byte, as the pre-tokenizer cuts and spells it.
fn words() -> Result<BTreeSet<String>> {
    let cut = ByteLevel::default().add_prefix_space(false);
    let mut words = BTreeSet::new();
    for story in StoryGenerator::new(0).take(SAMPLE) {
        let mut text = PreTokenizedString::from(story.text.as_str());
        cut.pre_tokenize(&mut text)
            .map_err(|e| Error::invalid(format!("tokenizer: {e}")))?;
        let splits = text.get_splits(OffsetReferential::Normalized, OffsetType::None);
        words.extend(splits.into_iter().map(|(word, ..)| word.to_owned()));
    }
    words.retain(|word| word.chars().nth(1).is_some());
    Ok(words)
}
