//! API keys: kept as hashes, compared in constant time, each with limits of its own.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::TryRng;
use rand::rngs::SysRng;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use crate::atomic::write_atomic;
use crate::{Error, Result};

/// Who may ask, by a file of `[[key]]` tables.
#[derive(Default)]
pub struct Keys(Vec<Arc<Key>>);

pub struct Key {
    pub name: String,
    /// In hexadecimal digits.
    hash: String,
    limits: Limits,
    minute: Mutex<Minute>,
    answering: Arc<Semaphore>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct Limits {
    requests_per_minute: Option<u64>,
    /// Read and written.
    tokens_per_minute: Option<u64>,
    /// Requests at once.
    concurrent: Option<usize>,
}

/// What was used since it began.
struct Minute {
    begun: Instant,
    requests: u64,
    tokens: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    /// Of the key, in hexadecimal digits.
    sha256: String,
    requests_per_minute: Option<u64>,
    tokens_per_minute: Option<u64>,
    concurrent: Option<usize>,
}

const LONGEST_NAME: usize = 64;
const MINUTE: Duration = Duration::from_secs(60);

impl Keys {
    /// # Errors
    /// A file that is none, by key and field.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
        let File { key: entries } = toml::from_str(&text)
            .map_err(|e| Error::file(path, format!("not a file of keys: {e}")))?;
        let mut keys = Vec::new();
        for entry in entries {
            let name = check_name(&entry.name);
            name.map_err(|said| Error::file(path, format!("key {said}")))?;
            let hash = entry.sha256.to_ascii_lowercase();
            if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(Error::file(
                    path,
                    format!("key {}: sha256 must be 64 hexadecimal digits", entry.name),
                ));
            }
            let limits = Limits {
                requests_per_minute: entry.requests_per_minute,
                tokens_per_minute: entry.tokens_per_minute,
                concurrent: entry.concurrent,
            };
            keys.push(Arc::new(Key::new(entry.name, hash, limits)));
        }
        match keys.is_empty() {
            true => Err(Error::file(
                path,
                "holds no key: make one with zebroid serve --make-key NAME --api-key-file FILE",
            )),
            false => Ok(Self(keys)),
        }
    }

    /// One more, without limits, that is known as it is.
    pub fn with(mut self, name: &str, key: &str) -> Self {
        let key = Key::new(name.to_owned(), hash(key), Limits::default());
        self.0.push(Arc::new(key));
        self
    }

    /// Adds a new key to a file, which keeps its hash; the key itself is returned, and is nowhere else.
    ///
    /// # Errors
    /// A file that is none, a name that it has, or a place that takes no file.
    pub fn make(path: &Path, name: &str) -> Result<String> {
        check_name(name).map_err(|said| Error::file(path, format!("key {said}")))?;
        let mut text = String::new();
        if path.exists() {
            let known = Self::open(path)?;
            if known.0.iter().any(|key| key.name == name) {
                return Err(Error::file(path, format!("has a key named {name} already")));
            }
            text = std::fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
            text.push('\n');
        }
        let mut key = "zb-".to_owned();
        for _ in 0..4 {
            let drawn = SysRng.try_next_u64();
            let drawn = drawn
                .map_err(|e| Error::invalid(format!("the system gives no random bytes: {e}")))?;
            key += &format!("{drawn:016x}");
        }
        let named = toml::Value::from(name);
        let sha256 = hash(&key);
        text.push_str(&format!("[[key]]\nname = {named}\nsha256 = \"{sha256}\"\n"));
        write_atomic(path, text.as_bytes())?;
        Ok(key)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key that a client sent; as long for any other.
    pub fn find(&self, sent: &str) -> Option<&Arc<Key>> {
        let sent = hash(sent);
        let mut found = None;
        for key in &self.0 {
            if bool::from(key.hash.as_bytes().ct_eq(sent.as_bytes())) {
                found = Some(key);
            }
        }
        found
    }
}

impl Key {
    fn new(name: String, hash: String, limits: Limits) -> Self {
        let most = limits.concurrent.unwrap_or(Semaphore::MAX_PERMITS);
        Self {
            answering: Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))),
            minute: Mutex::new(Minute {
                begun: Instant::now(),
                requests: 0,
                tokens: 0,
            }),
            name,
            hash,
            limits,
        }
    }

    /// Counts a request, and holds its place while the permit lives.
    ///
    /// # Errors
    /// More than its limits allow.
    pub fn begin(self: &Arc<Self>) -> Result<OwnedSemaphorePermit, ApiError> {
        let Ok(place) = self.answering.clone().try_acquire_owned() else {
            let most = self.limits.concurrent.unwrap_or_default();
            let said = format!("key {} answers {most} requests at once", self.name);
            return Err(ApiError::too_many(said, 1));
        };
        let mut minute = self.minute.lock().unwrap_or_else(|e| e.into_inner());
        if minute.begun.elapsed() >= MINUTE {
            *minute = Minute {
                begun: Instant::now(),
                requests: 0,
                tokens: 0,
            };
        }
        let limits = [
            ("requests", minute.requests, self.limits.requests_per_minute),
            ("tokens", minute.tokens, self.limits.tokens_per_minute),
        ];
        for (what, used, limit) in limits {
            if let Some(limit) = limit
                && used >= limit
            {
                let left = MINUTE.saturating_sub(minute.begun.elapsed());
                let said = format!(
                    "key {} has used its {limit} {what} of this minute",
                    self.name
                );
                return Err(ApiError::too_many(said, left.as_secs() + 1));
            }
        }
        minute.requests += 1;
        Ok(place)
    }

    pub fn charge(&self, tokens: usize) {
        let mut minute = self.minute.lock().unwrap_or_else(|e| e.into_inner());
        minute.tokens += tokens as u64;
    }
}

/// Of what names of keys and of conversations are made: folders and files are called by them.
pub fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

/// # Errors
/// What is no name, and what one is.
pub fn check_name(name: &str) -> Result<(), String> {
    match !name.is_empty() && name.len() <= LONGEST_NAME && name.chars().all(is_plain) {
        true => Ok(()),
        false => Err(format!(
            "{name:?}: a name has up to {LONGEST_NAME} letters, digits, - and _"
        )),
    }
}

/// In hexadecimal digits.
fn hash(key: &str) -> String {
    format!("{:x}", Sha256::digest(key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_as_a_hash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let first = Keys::make(&path, "ann").unwrap();
        let second = Keys::make(&path, "ben_2").unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            !text.contains(&first) && !text.contains(&second[3..]),
            "{text}"
        );
        let keys = Keys::open(&path).unwrap();
        assert_eq!(keys.find(&first).unwrap().name, "ann");
        assert_eq!(keys.find(&second).unwrap().name, "ben_2");
        for wrong in ["", "ann", &first[..66], &first.to_uppercase()] {
            assert!(keys.find(wrong).is_none());
        }
        assert!(Keys::make(&path, "../ann").is_err());
        let said = Keys::make(&path, "ann").unwrap_err().to_string();
        assert!(said.contains("named ann"), "{said}");
        for bad in [
            "",
            "key = 3",
            "[[key]]\nname = \"a\"\nsha256 = \"12\"",
            "[[key]]\nname = \"a\"\nsecret = \"x\"",
        ] {
            std::fs::write(&path, bad).unwrap();
            let said = Keys::open(&path).err().unwrap().to_string();
            assert!(said.contains("keys.toml"), "{said}");
        }
    }

    #[test]
    fn limits_hold() {
        let limits = Limits {
            requests_per_minute: Some(3),
            tokens_per_minute: Some(10),
            concurrent: Some(1),
        };
        let key = Arc::new(Key::new("a".into(), hash("a"), limits));
        let first = key.begin().unwrap();
        let said = key.begin().unwrap_err().message;
        assert!(said.contains("at once"), "{said}");
        drop(first);
        drop(key.begin().unwrap());
        key.charge(10);
        let said = key.begin().unwrap_err().message;
        assert!(said.contains("10 tokens"), "{said}");
        key.minute.lock().unwrap().tokens = 0;
        drop(key.begin().unwrap());
        let said = key.begin().unwrap_err().message;
        assert!(said.contains("3 requests"), "{said}");
        key.minute.lock().unwrap().begun -= MINUTE;
        assert!(key.begin().is_ok());
    }
}
