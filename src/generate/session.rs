//! A conversation that goes on in another process: its tokens, and what the model remembers of them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Engine, Finish};
use crate::checkpoint::write_atomic;
use crate::data::chat::Message;
use crate::mixer::{CacheType, Memory};
use crate::{Error, Result};

/// A file begins with it; the number is the layout's.
const MAGIC: &[u8; 16] = b"zebroid session1";
/// Of the description.
const MOST_HEADER: u64 = 1 << 30;

/// What was said, and what has read it.
pub struct Session {
    pub messages: Vec<Message>,
    /// The messages as the model has seen them, and what it answered.
    pub text: String,
    /// Of the text; the memory has read a beginning of them.
    pub tokens: Vec<u32>,
    pub memory: Memory,
}

/// What stands before the memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// Of the model that has read it.
    fingerprint: String,
    cache_type: CacheType,
    /// Tokens that have been read.
    read: usize,
    tokens: Vec<u32>,
    text: String,
    messages: Vec<Message>,
}

impl Session {
    /// Nothing was read yet.
    pub fn new(engine: &Engine, messages: Vec<Message>) -> Self {
        Self {
            messages,
            text: String::new(),
            tokens: Vec::new(),
            memory: engine.pool.sequence(),
        }
    }

    /// After an answer to `text`, which is `messages` as the model has seen them.
    pub fn after(engine: &Engine, messages: Vec<Message>, text: String, finish: &Finish) -> Self {
        match finish.stopped {
            // The tokens say more than the text does.
            true => Self::new(engine, messages),
            false => Self {
                messages,
                text: text + &finish.generation.text,
                tokens: finish.tokens.clone(),
                memory: finish.memory.clone(),
            },
        }
    }

    /// As [`prompt`].
    pub fn prompt(&self, engine: &Engine, text: &str) -> Result<Vec<u32>> {
        prompt(engine, &self.text, &self.tokens, text)
    }

    /// Writes it whole or not at all.
    ///
    /// # Errors
    /// A place that takes no file.
    pub fn save(&self, engine: &Engine, path: &Path) -> Result<()> {
        let header = Header {
            fingerprint: engine.decoder.fingerprint(),
            cache_type: engine.pool.kind(),
            read: self.memory.len(),
            tokens: self.tokens.clone(),
            text: self.text.clone(),
            messages: self.messages.clone(),
        };
        let header = serde_json::to_vec(&header).expect("texts and numbers");
        let mut bytes = MAGIC.to_vec();
        bytes.extend((header.len() as u64).to_le_bytes());
        bytes.extend(header);
        bytes.extend(self.memory.to_bytes()?);
        write_atomic(path, &bytes)
    }

    /// # Errors
    /// As [`StoredSession::open`]; no room for what the model remembers.
    pub fn open(engine: &Engine, path: &Path) -> Result<Self> {
        let stored = StoredSession::open(engine, path)?;
        let memory = match stored.read {
            0 => Ok(engine.pool.sequence()),
            read => Memory::from_bytes(&engine.pool, read, &stored.bytes),
        };
        Ok(Self {
            memory: memory.map_err(|e| Error::file(path, e))?,
            messages: stored.messages,
            text: stored.text,
            tokens: stored.tokens,
        })
    }
}

/// A session as its file has it: what the model remembers takes no room yet.
pub struct StoredSession {
    pub messages: Vec<Message>,
    pub text: String,
    pub tokens: Vec<u32>,
    /// Tokens that have been read.
    pub read: usize,
    /// What the model remembers of them, as [`Memory::to_bytes`] has it.
    pub bytes: Vec<u8>,
}

impl StoredSession {
    /// # Errors
    /// A file that is no session, is cut off, or is of another model or cache type.
    pub fn open(engine: &Engine, path: &Path) -> Result<Self> {
        let bad = |said: String| Error::file(path, said);
        let (header, mut file) = header(path)?;
        let own = engine.decoder.fingerprint();
        if header.fingerprint != own {
            return Err(bad(format!(
                "a session of another model ({}, this one is {own}): open it with the model that it was saved with",
                header.fingerprint
            )));
        }
        if header.cache_type != engine.pool.kind() {
            return Err(bad(format!(
                "its cache is {}: open it with --cache-type {}",
                header.cache_type, header.cache_type
            )));
        }
        let vocab = engine.decoder.config.vocab_size;
        if header.read > header.tokens.len() || header.tokens.iter().any(|t| *t as usize >= vocab) {
            return Err(bad("its tokens are not those of this model".into()));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(Error::io("cannot read", path))?;
        let wanted = match header.read {
            0 => bytes.len(),
            read => engine.pool.bytes(read),
        };
        if bytes.len() != wanted {
            return Err(bad(format!(
                "{} bytes for {} tokens; this model's take {wanted}",
                bytes.len(),
                header.read
            )));
        }
        Ok(Self {
            messages: header.messages,
            text: header.text,
            tokens: header.tokens,
            read: header.read,
            bytes,
        })
    }

    /// What was said, of any model.
    ///
    /// # Errors
    /// A file that is no session, or is cut off.
    pub fn messages(path: &Path) -> Result<Vec<Message>> {
        header(path).map(|(header, _)| header.messages)
    }

    /// As [`prompt`].
    pub fn prompt(&self, engine: &Engine, text: &str) -> Result<Vec<u32>> {
        prompt(engine, &self.text, &self.tokens, text)
    }
}

/// The tokens of `text`: where it goes on from what was read, those that were read and what follows them (to encode an answer anew
/// may give other tokens than those it was drawn as).
///
/// # Errors
/// A text that the tokenizer cannot encode.
fn prompt(engine: &Engine, before: &str, tokens: &[u32], text: &str) -> Result<Vec<u32>> {
    match text.strip_prefix(before) {
        Some(rest) if !tokens.is_empty() && !rest.is_empty() => {
            let rest = engine.tokenizer.encode_plain(rest)?;
            Ok([tokens, &rest].concat())
        }
        _ => engine.tokenizer.encode_plain(text),
    }
}

/// A file's description, and the file where the memory begins.
fn header(path: &Path) -> Result<(Header, File)> {
    let bad = |said: String| Error::file(path, said);
    let mut file = File::open(path).map_err(Error::io("cannot open", path))?;
    let cut = |_| bad("cut off: it ends before its description does".into());
    let mut begin = [0; 24];
    file.read_exact(&mut begin).map_err(cut)?;
    let (magic, size) = begin.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(bad("not a session of zebroid".into()));
    }
    let size = u64::from_le_bytes(size.try_into().expect("eight bytes"));
    let whole = file
        .metadata()
        .map_err(Error::io("cannot read", path))?
        .len();
    if size > MOST_HEADER || size > whole {
        return Err(bad(format!(
            "a description of {size} bytes in a file of {whole}"
        )));
    }
    let mut header = vec![0; size as usize];
    file.read_exact(&mut header).map_err(cut)?;
    let header = serde_json::from_slice(&header).map_err(|e| bad(e.to_string()))?;
    Ok((header, file))
}
