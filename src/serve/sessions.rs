//! Conversations that are kept in files, by name, with all that the model remembers of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::error::ApiError;
use super::keys::{Key, check_name, is_plain};
use crate::data::chat::Message;
use crate::generate::{Engine, Finish, Session, StoredSession};
use crate::{Error, Result};

/// A folder of `MODEL/NAME.session`, and of a key's own conversations `keys/KEY/MODEL/NAME.session`.
pub struct Sessions {
    folder: PathBuf,
    /// One request at a time goes on with a conversation.
    turns: Mutex<BTreeMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>,
}

/// Said where a request names a session.
pub const NO_SESSIONS: &str = "this server keeps no sessions: start it with --sessions FOLDER";

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

    /// Those of a key (or of a server without keys) with a model.
    fn of(&self, owner: Option<&Key>, model: &str) -> PathBuf {
        let folder = match owner {
            Some(key) => self.folder.join("keys").join(&key.name),
            None => self.folder.clone(),
        };
        // A model may be named as a hub's is.
        let plain = |c: char| is_plain(c) || c == '.';
        let model: String = model
            .chars()
            .map(|c| if plain(c) { c } else { '-' })
            .collect();
        folder.join(model.trim_matches('.'))
    }

    /// # Errors
    /// A name that is none.
    pub async fn turn(
        &self,
        owner: Option<&Key>,
        model: &str,
        name: &str,
    ) -> Result<Turn, ApiError> {
        check_name(name).map_err(|said| ApiError::field("session", format!("session {said}")))?;
        let path = self.of(owner, model).join(format!("{name}.session"));
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
        let entries = std::fs::read_dir(self.of(owner, model));
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
        let session = Session::after(engine, messages, text, finish);
        session.save(engine, &self.path)
    }
}
