//! Conversations that are kept in files, by name, with all that the model remembers of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::error::ApiError;
use super::keys::Key;
use crate::data::chat::Message;
use crate::generate::{Engine, Finish, Session, StoredSession};
use crate::{Error, Result};

/// A folder of `MODEL/NAME.session`, and of a key's own conversations `keys/KEY/MODEL/NAME.session`.
pub struct Sessions {
    folder: PathBuf,
    /// One request at a time goes on with a conversation.
    turns: Mutex<BTreeMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>,
}

const LONGEST_NAME: usize = 64;

/// A conversation that a request goes on with; others that name it wait.
pub struct Turn {
    path: PathBuf,
    _turn: tokio::sync::OwnedMutexGuard<()>,
}

impl Sessions {
    /// # Errors
    /// A place where no folder can be made.
    pub fn new(folder: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&folder).map_err(Error::io("cannot make", &folder))?;
        Ok(Self {
            folder,
            turns: Mutex::default(),
        })
    }

    fn path(&self, owner: Option<&Key>, model: &str, name: &str) -> Result<PathBuf, ApiError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(plain) {
            return Err(ApiError::field(
                "session",
                format!(
                    "session {name:?}: a name has up to {LONGEST_NAME} letters, digits, - and _"
                ),
            ));
        }
        // A model may be named as a hub's is.
        let model: String = model
            .chars()
            .map(|c| if plain(c) || c == '.' { c } else { '-' })
            .collect();
        let folder = match owner {
            Some(key) => self.folder.join("keys").join(&key.name),
            None => self.folder.clone(),
        };
        Ok(folder
            .join(model.trim_matches('.'))
            .join(format!("{name}.session")))
    }

    /// # Errors
    /// A name that is none.
    pub async fn turn(
        &self,
        owner: Option<&Key>,
        model: &str,
        name: &str,
    ) -> Result<Turn, ApiError> {
        let path = self.path(owner, model, name)?;
        let lock = {
            let mut turns = self.turns.lock().unwrap_or_else(|e| e.into_inner());
            turns.retain(|_, lock| Arc::strong_count(lock) > 1);
            turns.entry(path.clone()).or_default().clone()
        };
        Ok(Turn {
            path,
            _turn: lock.lock_owned().await,
        })
    }

    /// The names that are kept of a model.
    pub fn names(&self, owner: Option<&Key>, model: &str) -> Vec<String> {
        let folder = self
            .path(owner, model, "x")
            .ok()
            .and_then(|path| Some(path.parent()?.to_owned()));
        let entries = folder.and_then(|folder| std::fs::read_dir(folder).ok());
        let names = entries.into_iter().flatten().filter_map(|entry| {
            let path = entry.ok()?.path();
            let session = path.extension().is_some_and(|e| e == "session");
            session.then(|| path.file_stem()?.to_str().map(str::to_owned))?
        });
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

impl Turn {
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// What is kept, if something is; one of another model, or damaged, is not gone on with.
    ///
    /// # Errors
    /// As [`StoredSession::open`].
    pub fn open(&self, engine: &Engine) -> Result<Option<StoredSession>> {
        let exists = self.path.exists();
        exists
            .then(|| StoredSession::open(engine, &self.path))
            .transpose()
    }

    /// What was said so far.
    ///
    /// # Errors
    /// As [`StoredSession::messages`].
    pub fn messages(&self) -> Result<Vec<Message>> {
        StoredSession::messages(&self.path)
    }

    /// Whether there was one.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn remove(&self) -> Result<bool, ApiError> {
        match std::fs::remove_file(&self.path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(ApiError::bug(e)),
        }
    }

    /// Keeps what was said, what the model answered, and what it remembers.
    ///
    /// # Errors
    /// A place that takes no file: what was kept before stays.
    pub fn save(
        &self,
        engine: &Engine,
        messages: Vec<Message>,
        text: String,
        finish: &Finish,
    ) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(Error::io("cannot make", folder))?;
        let answer = &finish.generation.text;
        let session = match finish.stopped {
            // The tokens say more than the text does.
            true => Session::new(engine, messages),
            false => Session {
                messages,
                text: format!("{text}{answer}"),
                tokens: finish.tokens.clone(),
                memory: finish.memory.clone(),
            },
        };
        session.save(engine, &self.path)
    }
}
