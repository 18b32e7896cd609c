//! The checkpoint's own tokenizer, as Hugging Face `tokenizers` runs it.

use std::path::{Path, PathBuf};
use std::{fs, io, ops::Range, sync::Arc};

use serde::de::IgnoredAny;
use serde_json::Value;

use super::chat::ChatTemplate;
use super::guard::guarded;
use crate::gguf::{self, Gguf};
use crate::hash::Hash;
use crate::{Error, Result};

/// A text of words, numbers, spaces and other scripts.
const TRIED: &str = "Ab 12  c\n<s>é世";

/// A `tokenizer.json` with the ids that begin and end a text. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bos: Option<u32>,
    eos: Vec<u32>,
    hash: Hash,
    /// The checkpoint that it came with.
    source: Option<PathBuf>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` from a checkpoint folder (or what a `.gguf` file says of it). The begin and end ids come from the first of
    /// `generation_config.json`, `config.json` (ids) and `tokenizer_config.json` (token texts) that
    /// names them, the order in which Hugging Face generation decides when to stop.
    ///
    /// # Errors
    /// A missing or garbled file, and an id outside the vocabulary, by file and field.
    pub fn open(folder: &Path) -> Result<Self> {
        if Gguf::is_named(folder) {
            return Ok(Self {
                source: Some(folder.to_owned()),
                ..Self::of_gguf(&Gguf::open(folder)?)?
            });
        }
        let path = folder.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::file(
                &path,
                "not found: copy tokenizer.json from the checkpoint this folder was made from",
            ),
            _ => Error::io("cannot read", &path)(e),
        })?;
        let mut tokenizer = Self::from_json(&bytes)
            .map_err(|e| Error::file(&path, format!("{e}: fetch or save the file again")))?;
        tokenizer.source = Some(folder.to_owned());
        for name in ["generation_config.json", "config.json"] {
            let path = folder.join(name);
            if let Some(json) = read_optional(&path)? {
                if tokenizer.bos.is_none() {
                    tokenizer.bos = ids(&path, &json, "bos_token_id")?.first().copied();
                }
                if tokenizer.eos.is_empty() {
                    tokenizer.eos = ids(&path, &json, "eos_token_id")?;
                }
                for &id in tokenizer.bos.iter().chain(&tokenizer.eos) {
                    if tokenizer.token(id).is_none() {
                        let size = tokenizer.vocab_size();
                        return Err(Error::file(
                            &path,
                            format!(
                                "bos_token_id or eos_token_id is {id}, \
                                 but tokenizer.json holds {size} tokens and not this one"
                            ),
                        ));
                    }
                }
            }
        }
        if let Some(json) = read_optional(&folder.join("tokenizer_config.json"))? {
            let named = |field: &str| {
                let text = json[field].as_str().or(json[field]["content"].as_str())?;
                tokenizer.inner.token_to_id(text)
            };
            let (bos, eos) = (named("bos_token"), named("eos_token"));
            tokenizer.bos = tokenizer.bos.or(bos);
            if tokenizer.eos.is_empty() {
                tokenizer.eos = eos.into_iter().collect();
            }
        }
        Ok(tokenizer)
    }

    fn of_gguf(file: &Gguf) -> Result<Self> {
        let at = |e: Error| Error::file(&file.path, e);
        let found = gguf::tokenizer::read(&file.header.metadata).map_err(at)?;
        let json = serde_json::to_vec(&found.json).expect("JSON is written");
        let read = Self::from_json(&json).map_err(at)?;
        Ok(Self {
            bos: found.bos,
            eos: found.eos,
            ..read
        })
    }

    /// From the text of a `tokenizer.json`; it knows neither begin nor end id.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let not = |e: &dyn std::fmt::Display| Error::invalid(format!("not a tokenizer ({e})"));
        serde_json::from_slice::<IgnoredAny>(json).map_err(|e| not(&e))?;
        let inner = guarded(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(json)?;
            // Some published files carry the truncation of their last training run, which would silently
            // shorten documents.
            inner.with_truncation(None)?.with_padding(None);
            // Some mistakes are met by the first text only; one that cannot be encoded is none of them.
            if let Ok(tried) = inner.encode(TRIED, true) {
                let _ = inner.decode(tried.get_ids(), true);
            }
            Ok::<_, tokenizers::Error>(inner)
        });
        let inner = inner.ok_or_else(|| not(&"its parts do not fit together"))?;
        let inner = inner.map_err(|e| not(&e))?;
        distinct(&inner)?;
        Ok(Self {
            inner: Arc::new(inner),
            bos: None,
            eos: Vec::new(),
            hash: Hash::of(json),
            source: None,
        })
    }

    /// Token ids with what the tokenizer itself adds around a text (for Llama: the begin token).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encoding(text, true)
    }

    /// Token ids of the text alone.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.encoding(text, false)
    }

    fn encoding(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`encode`](Self::encode) (or, without `special`, [`encode_plain`](Self::encode_plain)), each id with the bytes of `text` it stands
    /// for (empty for a token that was added).
    pub fn encode_with_offsets(
        &self,
        text: &str,
        special: bool,
    ) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.inner.encode(text, special).map_err(failed)?;
        let offsets = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }

    /// Text of the ids, special tokens left out; ids outside the vocabulary (a padded embedding has
    /// some) are left out too.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        // Its decoder panics where it is to strip more than there is.
        let text = guarded(|| self.inner.decode(ids, true));
        let text = text.ok_or_else(|| Error::invalid("the tokenizer cannot decode these ids"))?;
        text.map_err(failed)
    }

    /// Decodes a continuation id by id; `context` is what it continues (the prompt's ids, or nothing).
    pub fn decode_stream(&self, context: &[u32]) -> DecodeStream {
        // What stands further back does not change what follows.
        let context = &context[context.len().saturating_sub(DecodeStream::HELD)..];
        DecodeStream {
            tokenizer: self.clone(),
            ids: context.to_vec(),
            done: context.len(),
            shown: Vec::new(),
        }
    }

    /// Number of tokens, added ones included. A model may have more rows (padding).
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// # Errors
    /// When a model that embeds `vocab_size` tokens cannot read what this makes of a text.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        match self.vocab_size() {
            need if need > vocab_size => Err(Error::invalid(format!(
                "the tokenizer has {need} tokens, the model embeds {vocab_size}: they do not belong together"
            ))),
            _ => Ok(()),
        }
    }

    /// The token as `tokenizer.json` spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// How it cuts words: `BPE`, `Unigram`, `WordPiece` or `WordLevel`.
    pub fn kind(&self) -> &'static str {
        use tokenizers::ModelWrapper::*;
        match self.inner.get_model() {
            BPE(_) => "BPE",
            Unigram(_) => "Unigram",
            WordPiece(_) => "WordPiece",
            WordLevel(_) => "WordLevel",
        }
    }

    /// Tokens that are no text, by id.
    pub fn special(&self) -> std::collections::BTreeMap<u32, String> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let special = added.filter(|(_, token)| token.special);
        special.map(|(id, token)| (id, token.content)).collect()
    }

    /// The id of a token spelled as in `tokenizer.json`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether every id means the same token to both.
    pub fn same_tokens(&self, other: &Self) -> bool {
        self.hash == other.hash || self.inner.get_vocab(true) == other.inner.get_vocab(true)
    }

    /// The first token of `other` that is not the same token here.
    pub fn lacks(&self, other: &Self) -> Option<(u32, String)> {
        if self.hash == other.hash {
            return None;
        }
        let tokens = other.inner.get_vocab(true).into_iter();
        let lacking = tokens.filter(|(token, id)| self.id(token) != Some(*id));
        lacking.map(|(token, id)| (id, token)).min()
    }

    /// The chat template of the checkpoint that it came with, if that has one.
    ///
    /// # Errors
    /// As [`ChatTemplate::open`].
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        match &self.source {
            Some(path) => ChatTemplate::open(path),
            None => Ok(None),
        }
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a text, the main one first; empty where the checkpoint names none.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// As `tokenizer.json` holds it.
    ///
    /// # Errors
    /// A tokenizer that cannot be written.
    pub fn to_json(&self) -> Result<Value> {
        serde_json::to_value(&*self.inner)
            .map_err(|e| Error::invalid(format!("the tokenizer cannot be written ({e})")))
    }

    /// Hash of `tokenizer.json`.
    pub fn hash(&self) -> Hash {
        self.hash
    }
}

/// # Errors
/// When two tokens have one id, so that the id would be decoded as either.
fn distinct(tokenizer: &tokenizers::Tokenizer) -> Result<()> {
    let mut tokens: Vec<(u32, String)> = tokenizer
        .get_vocab(true)
        .into_iter()
        .map(|(token, id)| (id, token))
        .collect();
    tokens.sort_unstable();
    match tokens.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(Error::invalid(format!(
            "tokens {:?} and {:?} both have id {}",
            pair[0].1, pair[1].1, pair[0].0
        ))),
        None => Ok(()),
    }
}

fn failed(e: tokenizers::Error) -> Error {
    Error::invalid(format!("tokenizer: {e}"))
}

/// A JSON file that may be absent, but not garbled.
fn read_optional(path: &Path) -> Result<Option<Value>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| Error::file(path, format!("not JSON ({e}): fetch or save it again"))),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("cannot read", path)(e)),
    }
}

/// A field that holds an id, a list of ids, or nothing.
fn ids(path: &Path, json: &Value, field: &str) -> Result<Vec<u32>> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| Error::file(path, format!("{field} is {value}, not a token id")))
    };
    match &json[field] {
        Value::Null => Ok(Vec::new()),
        Value::Array(values) => values.iter().map(id).collect(),
        value => Ok(vec![id(value)?]),
    }
}

/// Turns ids that arrive one by one into text, giving out only what later ids cannot change: a
/// character spread over several tokens comes out whole, and words keep their leading spaces.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    /// Ids whose text is out, kept as context because decoders treat the first token apart (they strip
    /// its space), then ids whose text is held back.
    ids: Vec<u32>,
    done: usize,
    /// Special tokens that are text here.
    shown: Vec<u32>,
}

impl DecodeStream {
    /// After so many tokens without a whole character the bytes are garbage and come out as U+FFFD.
    const HELD: usize = 16;

    /// With the special tokens of these spellings as text, which are left out otherwise (see `ToolFormat::marks`).
    pub fn showing(mut self, tokens: &[&str]) -> Self {
        let ids = tokens.iter().filter_map(|token| self.tokenizer.id(token));
        self.shown = ids.collect();
        self
    }

    /// The text that has become certain with `id`; often empty inside a multi-byte character.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        let held = self.ids.len() - self.done;
        if (text.is_empty() || text.ends_with('\u{FFFD}')) && held < Self::HELD {
            return Ok(String::new());
        }
        self.ids.drain(..self.done);
        self.done = self.ids.len();
        Ok(text)
    }

    /// The text still held back at the end: an unfinished character as U+FFFD, or nothing.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let before = self.decode(&self.ids[..self.done])?;
        let now = self.decode(&self.ids)?;
        match now.strip_prefix(&before) {
            Some(text) => Ok(text.to_owned()),
            // A stray byte after whole ones makes byte-fallback decoders take back the whole run; what
            // is out stays out.
            None => self.decode(&self.ids[self.done..]),
        }
    }

    fn decode(&self, ids: &[u32]) -> Result<String> {
        if self.shown.is_empty() {
            return self.tokenizer.decode(ids);
        }
        let inner = &self.tokenizer.inner;
        let special = |id: u32| {
            let token = inner.id_to_token(id);
            token.is_some_and(|token| inner.get_added_vocabulary().is_special_token(&token))
        };
        let ids = ids.iter().copied();
        let ids = ids.filter(|id| self.shown.contains(id) || !special(*id));
        let ids: Vec<u32> = ids.collect();
        inner.decode(&ids, false).map_err(failed)
    }
}

#[cfg(test)]
mod tests;
