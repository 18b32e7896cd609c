//! The models of a server, by name: loaded when they are first asked for, and let go of where memory is limited.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::UNIX_EPOCH;

use serde::Deserialize;
use tokio::sync::Semaphore;

use super::error::{ApiError, apart};
use super::worker::Worker;
use crate::checkpoint::Checkpoint;
use crate::data::chat::ChatTemplate;
use crate::generate::Engine;
use crate::{Error, Result};

/// What is known of a model without its weights.
pub struct About {
    pub name: String,
    pub path: PathBuf,
    pub template: Option<ChatTemplate>,
    /// Tokens of prompt and answer together.
    pub context: usize,
    /// Of its files.
    pub bytes: u64,
    /// When its files were last written, in seconds since 1970.
    pub created: u64,
    pub defaults: Defaults,
}

/// How a checkpoint wants to be sampled, where a request does not say (`generation_config.json`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Defaults {
    pub do_sample: bool,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<usize>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
}

impl Defaults {
    /// Of a folder; a file that says nothing that can be read counts as absent, as the rest of it is others'.
    fn of(folder: &Path) -> Self {
        let file = std::fs::read(folder.join("generation_config.json"));
        let found = file
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        found.filter(|found| found.do_sample).unwrap_or_default()
    }
}

impl About {
    /// # Errors
    /// A checkpoint whose config or template cannot be used.
    pub fn open(name: String, path: PathBuf, template: Option<ChatTemplate>) -> Result<Self> {
        let (config, _) = Checkpoint::config_only(&path)?;
        let template = match template {
            Some(template) => Some(template),
            None => ChatTemplate::open(&path)?,
        };
        let (mut bytes, mut created) = (0, 0);
        let files = match path.is_dir() {
            true => std::fs::read_dir(&path)
                .map_err(Error::io("cannot read", &path))?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect(),
            false => vec![path.clone()],
        };
        for file in files {
            let weights = file
                .extension()
                .is_some_and(|e| e == "safetensors" || e == "gguf");
            if let Ok(found) = file.metadata()
                && weights
            {
                bytes += found.len();
                let written = found
                    .modified()
                    .ok()
                    .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
                created = created.max(written.map_or(0, |t| t.as_secs()));
            }
        }
        Ok(Self {
            defaults: Defaults::of(&path),
            context: config.max_position_embeddings,
            name,
            path,
            template,
            bytes,
            created,
        })
    }
}

/// A model that is ready to answer. Who holds it keeps it loaded.
pub struct Model {
    pub about: Arc<About>,
    pub engine: Arc<Engine>,
    pub worker: Worker,
    /// Answers that may wait or be under way.
    pub places: Arc<Semaphore>,
}

struct Slot {
    about: Arc<About>,
    model: Mutex<Option<Arc<Model>>>,
    /// When it was last asked for.
    used: AtomicU64,
}

/// Opens the engine of a checkpoint.
pub type Load = dyn Fn(&Path) -> Result<Engine> + Send + Sync;

pub struct Models {
    slots: Vec<Arc<Slot>>,
    open: Box<Load>,
    /// Bytes for weights and caches of all that is loaded.
    budget: Option<u64>,
    /// Of each model's cache.
    cache: u64,
    /// Answers of a model that wait, beyond those under way.
    queue: usize,
    clock: AtomicU64,
    /// One is loaded at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Models {
    /// # Errors
    /// Two of one name, or one that does not fit the budget alone.
    pub fn new(
        all: Vec<About>,
        open: Box<Load>,
        budget: Option<u64>,
        cache: u64,
        queue: usize,
    ) -> Result<Self> {
        for (i, about) in all.iter().enumerate() {
            if all[..i].iter().any(|before| before.name == about.name) {
                return Err(Error::invalid(format!(
                    "two models are named {}: name one of them with --model NAME=PATH",
                    about.name
                )));
            }
            let needed = about.bytes + cache;
            if let Some(budget) = budget
                && needed > budget
            {
                return Err(Error::file(
                    &about.path,
                    format!(
                        "needs {needed} bytes with its cache, of {budget}: raise --memory or lower --cache-memory"
                    ),
                ));
            }
        }
        let slots = all.into_iter().map(|about| {
            Arc::new(Slot {
                about: Arc::new(about),
                model: Mutex::default(),
                used: AtomicU64::new(0),
            })
        });
        Ok(Self {
            slots: slots.collect(),
            open,
            budget,
            cache,
            queue,
            clock: AtomicU64::new(1),
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// All of them, and those that are loaded.
    pub fn all(&self) -> impl Iterator<Item = (&Arc<About>, Option<Arc<Model>>)> {
        self.slots.iter().map(|slot| (&slot.about, slot.loaded()))
    }

    fn slot(&self, name: Option<&str>) -> Result<&Arc<Slot>, ApiError> {
        let found = match name {
            None => self.slots.first(),
            Some(name) => self.slots.iter().find(|slot| slot.about.name == name),
        };
        found.ok_or_else(|| {
            let names: Vec<&str> = self.slots.iter().map(|s| s.about.name.as_str()).collect();
            ApiError::no_model(name.unwrap_or_default(), &names.join(", "))
        })
    }

    /// What is known of a model, and whether it is loaded.
    ///
    /// # Errors
    /// An unknown name.
    pub fn about(&self, name: &str) -> Result<(&About, bool), ApiError> {
        let slot = self.slot(Some(name))?;
        Ok((&slot.about, slot.loaded().is_some()))
    }

    /// The model of a name, or the first; loaded if it is not yet. Who leaves meanwhile has begun it for others.
    ///
    /// # Errors
    /// An unknown name, a checkpoint that cannot be used, or no memory that could be freed.
    pub async fn get(self: &Arc<Self>, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        let slot = self.slot(name)?;
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        slot.used.store(now, Ordering::Relaxed);
        if let Some(model) = slot.loaded() {
            return Ok(model);
        }
        let (all, slot) = (self.clone(), slot.clone());
        let loading = tokio::spawn(async move { all.load(slot).await });
        loading.await.map_err(ApiError::bug)?
    }

    async fn load(self: Arc<Self>, slot: Arc<Slot>) -> Result<Arc<Model>, ApiError> {
        let _turn = self.turn.lock().await;
        if let Some(model) = slot.loaded() {
            return Ok(model);
        }
        self.make_room(&slot.about)?;
        let (all, about) = (self.clone(), slot.about.clone());
        let opened = apart(move || {
            tracing::info!(model = about.name, "loading");
            let engine = (all.open)(&about.path).map_err(ApiError::failed)?;
            let engine = Arc::new(engine);
            let worker = Worker::start(&about.name, engine.clone());
            Ok(Model {
                worker: worker.map_err(ApiError::failed)?,
                places: Arc::new(Semaphore::new(engine.options.max_batch + all.queue)),
                engine,
                about,
            })
        });
        let model = Arc::new(opened.await?);
        *slot.lock() = Some(model.clone());
        Ok(model)
    }

    /// Lets go of what was not asked for for longest and answers nobody.
    fn make_room(&self, about: &About) -> Result<(), ApiError> {
        let Some(budget) = self.budget else {
            return Ok(());
        };
        loop {
            let loaded = self.slots.iter().filter(|slot| slot.loaded().is_some());
            let loaded: Vec<&Arc<Slot>> = loaded.collect();
            let used: u64 = loaded
                .iter()
                .map(|slot| slot.about.bytes + self.cache)
                .sum();
            if used + about.bytes + self.cache <= budget {
                return Ok(());
            }
            let mut oldest = loaded;
            oldest.sort_by_key(|slot| slot.used.load(Ordering::Relaxed));
            let Some(unloaded) = oldest.into_iter().find(|slot| slot.unload()) else {
                return Err(ApiError::busy(format!(
                    "model {} has no room: the others that are loaded are answering",
                    about.name
                )));
            };
            tracing::info!(model = unloaded.about.name, "unloaded");
        }
    }
}

impl Slot {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Model>>> {
        self.model.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Lets go of a model that nobody holds; whether it did.
    fn unload(&self) -> bool {
        // Under one lock, so that nobody takes it in between.
        self.lock()
            .take_if(|model| Arc::strong_count(model) == 1)
            .is_some()
    }

    fn loaded(&self) -> Option<Arc<Model>> {
        self.lock().clone()
    }
}
