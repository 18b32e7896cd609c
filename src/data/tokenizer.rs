//! The checkpoint's own tokenizer, as Hugging Face `tokenizers` runs it.

use std::{fs, io, ops::Range, path::Path, sync::Arc};

use serde_json::Value;

use crate::hash::Hash;
use crate::{Error, Result};

/// A `tokenizer.json` with the ids that begin and end a text. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    bos: Option<u32>,
    eos: Vec<u32>,
    hash: Hash,
}

impl Tokenizer {
    /// Reads `tokenizer.json` from a checkpoint folder. The begin and end ids come from the first of
    /// `generation_config.json`, `config.json` (ids) and `tokenizer_config.json` (token texts) that
    /// names them, the order in which Hugging Face generation decides when to stop.
    ///
    /// # Errors
    /// A missing or garbled file, and an id outside the vocabulary, by file and field.
    pub fn open(folder: &Path) -> Result<Self> {
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

    /// From the text of a `tokenizer.json`; it knows neither begin nor end id.
    pub fn from_json(json: &[u8]) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| Error::invalid(format!("not a tokenizer ({e})")))?;
        // Some published files carry the truncation of their last training run, which would silently
        // shorten documents.
        inner
            .with_truncation(None)
            .map_err(|e| Error::invalid(format!("not a tokenizer ({e})")))?
            .with_padding(None);
        distinct(&inner)?;
        Ok(Self {
            inner: Arc::new(inner),
            bos: None,
            eos: Vec::new(),
            hash: Hash::of(json),
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

    /// [`encode`](Self::encode), each id with the bytes of `text` it stands for (empty for a token that
    /// was added).
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.inner.encode(text, true).map_err(failed)?;
        let offsets = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }

    /// Text of the ids, special tokens left out; ids outside the vocabulary (a padded embedding has
    /// some) are left out too.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(failed)
    }

    /// Decodes a continuation id by id; `context` is what it continues (the prompt's ids, or nothing).
    pub fn decode_stream(&self, context: &[u32]) -> DecodeStream {
        DecodeStream {
            tokenizer: self.clone(),
            ids: context.to_vec(),
            done: context.len(),
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

    /// The id of a token spelled as in `tokenizer.json`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a text, the main one first; empty where the checkpoint names none.
    pub fn eos(&self) -> &[u32] {
        &self.eos
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
}

impl DecodeStream {
    /// After so many tokens without a whole character the bytes are garbage and come out as U+FFFD.
    const HELD: usize = 16;

    /// The text that has become certain with `id`; often empty inside a multi-byte character.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        let held = self.ids.len() - self.done;
        if text.is_empty() || (text.ends_with('\u{FFFD}') && held < Self::HELD) {
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
        let before = self.tokenizer.decode(&self.ids[..self.done])?;
        let now = self.tokenizer.decode(&self.ids)?;
        match now.strip_prefix(&before) {
            Some(text) => Ok(text.to_owned()),
            // A stray byte after whole ones makes byte-fallback decoders take back the whole run; what
            // is out stays out.
            None => self.tokenizer.decode(&self.ids[self.done..]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Once upon a time, there was a café.\nZoë ate 3 jalapeños 🌶 — “hot”!";

    /// A byte-fallback tokenizer of the Llama kind: `▁` for spaces, first space stripped, `<s>` added.
    pub(crate) fn llama_json() -> Value {
        let mut vocab = serde_json::Map::new();
        let words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁ab"];
        let bytes = (0..=255).map(|b| format!("<0x{b:02X}>"));
        for token in words.map(String::from).into_iter().chain(bytes) {
            let id = vocab.len();
            vocab.insert(token, id.into());
        }
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        };
        serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true,
                "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"], ["▁a", "b"]]},
        })
    }

    fn llama() -> Tokenizer {
        Tokenizer::from_json(llama_json().to_string().as_bytes()).unwrap()
    }

    fn streamed(tokenizer: &Tokenizer, context: &[u32], ids: &[u32]) -> String {
        let mut stream = tokenizer.decode_stream(context);
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text += &stream.finish().unwrap();
        text
    }

    #[test]
    fn encode_adds_bos_and_ignores_truncation() {
        let tokenizer = llama();
        assert_eq!(tokenizer.encode("ab ab").unwrap(), [1, 7, 7]);
        assert_eq!(tokenizer.encode_plain("ab").unwrap(), [7]);
        assert_eq!(tokenizer.encode("a a a a a a a").unwrap().len(), 8);
        let offsets = tokenizer.encode_with_offsets("ab ab").unwrap();
        assert_eq!(offsets, [(1, 0..0), (7, 0..2), (7, 2..5)]);
    }

    #[test]
    fn stream_equals_decode_and_never_splits_a_character() {
        let tokenizer = llama();
        let ids = tokenizer.encode(TEXT).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), TEXT);
        assert_eq!(streamed(&tokenizer, &[], &ids), TEXT);
        let mut stream = tokenizer.decode_stream(&[]);
        for &id in &ids {
            assert!(!stream.push(id).unwrap().contains('\u{FFFD}'));
        }
    }

    #[test]
    fn stream_after_a_prompt_keeps_the_first_space() {
        let tokenizer = llama();
        assert_eq!(streamed(&tokenizer, &[1, 7], &[6, 6]), " a a");
        assert_eq!(streamed(&tokenizer, &[1], &[6, 6]), "a a");
    }

    #[test]
    fn stream_survives_stray_bytes() {
        let tokenizer = llama();
        let byte = |b: u32| 8 + b;
        // "é", then a lead byte that is never continued, then plain text.
        let ids = [byte(0xC3), byte(0xA9), byte(0xE2), 4];
        assert_eq!(streamed(&tokenizer, &[7], &ids), "é\u{FFFD}a");
        let garbage = vec![byte(0xE2); 40];
        let text = streamed(&tokenizer, &[7], &garbage);
        assert!(text.chars().count() >= 40 && text.chars().all(|c| c == '\u{FFFD}'));
    }

    #[test]
    fn special_ids_come_from_the_configs() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("tokenizer.json", &llama_json().to_string());
        assert!(Tokenizer::open(folder.path()).unwrap().eos().is_empty());
        write(
            "tokenizer_config.json",
            r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#,
        );
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), &[2][..]));
        write(
            "config.json",
            r#"{"bos_token_id": 3, "eos_token_id": [4, 5]}"#,
        );
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(3), &[4, 5][..]));
        write("generation_config.json", r#"{"eos_token_id": 2}"#);
        let tokenizer = Tokenizer::open(folder.path()).unwrap();
        assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(3), &[2][..]));
    }

    #[test]
    fn errors_name_file_and_field() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        let message = || Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(message().contains("tokenizer.json: not found"));
        write("tokenizer.json", "{\"model\": 3");
        assert!(message().contains("tokenizer.json: not a tokenizer"));
        write("tokenizer.json", &llama_json().to_string());
        write("config.json", "{");
        assert!(message().contains("config.json: not JSON"));
        write("config.json", r#"{"eos_token_id": "2"}"#);
        assert!(message().contains("config.json: eos_token_id is \"2\", not a token id"));
        write("config.json", r#"{"eos_token_id": 999}"#);
        assert!(message().contains("999"));
    }

    #[test]
    fn two_tokens_with_one_id_are_named() {
        let mut json = llama_json();
        json["model"]["vocab"]["b"] = 4.into();
        let read = Tokenizer::from_json(json.to_string().as_bytes());
        let message = read.unwrap_err().to_string();
        assert!(
            message.contains(r#"tokens "a" and "b" both have id 4"#),
            "{message}"
        );
        // A token of the vocabulary that is added as well is one token.
        assert_eq!(llama().id("</s>"), Some(2));
    }
}
