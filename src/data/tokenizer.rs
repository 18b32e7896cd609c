//! Hugging Face tokenizers.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::Path;

use crate::{Error, Result};

/// `tokenizer.json` with the ids of its special tokens.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Vec<u32>,
    hash: u64,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder; BOS and EOS from `generation_config.json`, `config.json` or
    /// `tokenizer_config.json`, whichever names them first.
    ///
    /// # Errors
    /// Names the file that is missing or cannot be parsed.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return Err(Error::file(
                &path,
                "there is no tokenizer here; copy the teacher's tokenizer.json into the folder",
            ));
        }
        let bytes = fs::read(&path).map_err(Error::io("cannot read", &path))?;
        let mut tokenizer = Self::from_bytes(&bytes).map_err(|e| Error::file(&path, e))?;
        for name in [
            "generation_config.json",
            "config.json",
            "tokenizer_config.json",
        ] {
            let path = folder.join(name);
            if !path.exists() {
                continue;
            }
            let text = fs::read_to_string(&path).map_err(Error::io("cannot read", &path))?;
            let value: serde_json::Value = serde_json::from_str(&text)
                .map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
            if tokenizer.bos.is_none() {
                tokenizer.bos = tokenizer.special(&value, "bos").first().copied();
            }
            if tokenizer.eos.is_empty() {
                tokenizer.eos = tokenizer.special(&value, "eos");
            }
        }
        Ok(tokenizer)
    }

    /// The content of a `tokenizer.json`, without special ids.
    ///
    /// # Errors
    /// What the parser says.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| Error::invalid(format!("not a tokenizer.json: {e}")))?;
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        Ok(Self {
            inner,
            bos: None,
            eos: Vec::new(),
            hash: hasher.finish(),
        })
    }

    /// Ids under `<which>_token_id` (a number or a list) or `<which>_token` (a text, or an object with
    /// one).
    fn special(&self, config: &serde_json::Value, which: &str) -> Vec<u32> {
        let number = |v: &serde_json::Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        match &config[format!("{which}_token_id")] {
            serde_json::Value::Array(list) => return list.iter().filter_map(number).collect(),
            value if value.is_u64() => return number(value).into_iter().collect(),
            _ => {}
        }
        let token = &config[format!("{which}_token")];
        let text = token.as_str().or_else(|| token["content"].as_str());
        text.and_then(|t| self.inner.token_to_id(t))
            .into_iter()
            .collect()
    }

    /// Tokens of a text, with what the tokenizer's post-processor adds (usually BOS).
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    /// As [`Tokenizer::encode`], each token with the bytes of the text it stands for (none for BOS).
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, std::ops::Range<usize>)>> {
        let encoding = self
            .inner
            .encode(text, true)
            .map_err(|e| Error::invalid(format!("cannot tokenise: {e}")))?;
        let offsets = encoding.get_offsets().iter().map(|(from, to)| *from..*to);
        Ok(encoding.get_ids().iter().copied().zip(offsets).collect())
    }

    /// Tokens of a text and nothing else.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    fn encode_with(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, special)
            .map_err(|e| Error::invalid(format!("cannot tokenise: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner
            .decode(ids, true)
            .map_err(|e| Error::invalid(format!("cannot decode: {e}")))
    }

    /// Text piece by piece; `context` are the tokens before the first piece.
    pub fn decode_stream(&self, context: &[u32]) -> DecodeStream<'_> {
        DecodeStream {
            tokenizer: self,
            ids: context.to_vec(),
            context: context.len(),
            emitted: None,
        }
    }

    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A fingerprint of `tokenizer.json`.
    pub fn hash(&self) -> u64 {
        self.hash
    }
}

/// Decodes token by token. A window of recent tokens is decoded anew each time, because the text of a
/// token depends on its neighbours (leading spaces, bytes of one character).
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Leading `ids` whose text is out already.
    context: usize,
    emitted: Option<String>,
}

impl DecodeStream<'_> {
    /// The text that `token` makes certain, if any.
    pub fn push(&mut self, token: u32) -> Result<Option<String>> {
        let before = match self.emitted.take() {
            Some(text) => text,
            None => self.tokenizer.decode(&self.ids[..self.context])?,
        };
        self.ids.push(token);
        let now = self.tokenizer.decode(&self.ids)?;
        // An unfinished character decodes to the replacement character until its last byte is there.
        if now.ends_with('\u{FFFD}') || !now.starts_with(&before) {
            self.emitted = Some(before);
            return Ok(None);
        }
        let piece = now[before.len()..].to_owned();
        // Keep the last token only: it decides whether the next one has a leading space.
        self.ids.drain(..self.ids.len() - 1);
        self.context = 1;
        Ok((!piece.is_empty()).then_some(piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words and bytes: enough to see leading spaces and split characters.
    fn tokenizer() -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        for token in ["<unk>", "<s>", "▁the", "▁cat", "s", "<0xC3>", "<0xA9>", "▁"] {
            vocab.insert(token.into(), vocab.len().into());
        }
        let json = serde_json::json!({
            "version": "1.0",
            "model": { "type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true, "unk_token": "<unk>" },
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 }
            ]},
            "added_tokens": [{ "id": 1, "content": "<s>", "special": true, "single_word": false,
                "lstrip": false, "rstrip": false, "normalized": false }]
        });
        Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn streaming_equals_decoding_at_once() {
        let tokenizer = tokenizer();
        let ids = [2, 3, 4, 5, 6, 2, 3];
        let mut stream = tokenizer.decode_stream(&[1]);
        let pieces: Vec<_> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert_eq!(pieces[3], None, "half a character is not shown");
        assert_eq!(
            pieces.into_iter().flatten().collect::<String>(),
            "the catsé the cat"
        );
        assert_eq!(tokenizer.decode(&ids).unwrap(), "the catsé the cat");
    }

    #[test]
    fn a_missing_or_garbled_tokenizer_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let message = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(
            message.contains("tokenizer.json") && message.contains("copy"),
            "{message}"
        );
        fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
        let message = Tokenizer::open(folder.path()).unwrap_err().to_string();
        assert!(
            message.contains("tokenizer.json") && message.contains("not a tokenizer"),
            "{message}"
        );
    }
}
