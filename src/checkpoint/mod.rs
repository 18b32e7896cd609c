//! Checkpoint folders: what is in them is checked as a whole before a tensor is loaded, and they are
//! written as a whole or not at all.
//!
//! Three formats, one set of tensor names: Hugging Face's Llama ([`family::llama`]), AMD's released hybrids
//! ([`amd`]) and our own, whose `config.json` is [`ModelConfig`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::Serialize;

use crate::model::{FORMAT_VERSION, Lm, ModelConfig, Parts};
use crate::op::linear::Matrix;
use crate::watch::Watch;
use crate::weights::{Place, Weights};
use crate::{Error, Result};

mod amd;
mod bank;
mod card;
mod family;
mod files;
mod fp8;
mod gguf;
mod json;
mod lock;
mod output;
mod provenance;
mod replace;
mod save;
mod store;
#[cfg(test)]
mod tests;

pub use crate::atomic::write_atomic;
pub use bank::Bank;
pub use card::measured;
pub use files::{read_tensors, read_tensors_with_metadata, write_tensors};
pub use gguf::{as_kept, save_gguf, storage_of};
pub use lock::{Lock, claim, is_locked, lock};
pub use output::{EVENTS, SAMPLES, check_output, foreign};
pub use provenance::{Input, Origin, Provenance, RECORD, Step};
pub use replace::replace_folder;
pub use save::save;
pub use store::{Kept, Key, Store, keep, kept, kept_in_place};

use crate::gguf::Gguf;
use files::TensorFiles;
use gguf::GgufFile;
use json::read_json;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Our own: one tagged mixer a layer.
    Zebroid,
    /// AMD's Zebra-Llama release: `config.json` of the base beside `hybrid_config.json`.
    Amd,
    /// Hugging Face's, of the family that has such models: Llama, Qwen2, Qwen3, SmolLM3 or Granite.
    Llama,
    /// llama.cpp's, one file: a Llama as llama.cpp has it, a hybrid with keys of our own.
    Gguf,
}

#[derive(Debug)]
enum Source {
    Folder(TensorFiles),
    Gguf(GgufFile),
}

/// An opened folder, or GGUF file: config parsed, every tensor's name, shape and dtype checked, no data read.
#[derive(Debug)]
pub struct Checkpoint {
    pub folder: PathBuf,
    pub format: Format,
    pub config: ModelConfig,
    source: Source,
}

impl Checkpoint {
    /// # Errors
    /// A config that cannot be read or cannot work (file and field named), or tensors that do not fit it
    /// (all of them listed, each with its file).
    pub fn open(folder: &Path) -> Result<Self> {
        if Gguf::is_named(folder) {
            let (file, config) = GgufFile::open(folder)?;
            return Ok(Self {
                folder: folder.to_owned(),
                format: Format::Gguf,
                config,
                source: Source::Gguf(file),
            });
        }
        if !folder.is_dir() {
            return Err(Error::file(
                folder,
                "no such folder; give the folder of a checkpoint, or an id of the Hugging Face hub (org/name)",
            ));
        }
        let (mut config, format) = Self::config_only(folder)?;
        let files = TensorFiles::open(folder)?;
        resolve_head(&mut config, &files)?;
        files.check(folder, &config.params())?;
        Ok(Self {
            folder: folder.to_owned(),
            format,
            config,
            source: Source::Folder(files),
        })
    }

    /// The config alone, of a folder, a `config.json` or a GGUF file.
    pub fn config_only(path: &Path) -> Result<(ModelConfig, Format)> {
        if Gguf::is_named(path) {
            return Ok((GgufFile::open(path)?.1, Format::Gguf));
        }
        let file = config_file(path);
        if !file.exists() {
            let message = "no checkpoint here; give its folder, its config.json, or an id of the Hugging Face hub (org/name)";
            return Err(Error::file(path, message));
        }
        let config = read_json(&file)?;
        fp8::check(&file, &config)?;
        let hybrid = file.with_file_name("hybrid_config.json");
        if hybrid.exists() {
            let model = amd::read(&file, &config, &hybrid, &read_json(&hybrid)?)?;
            return Ok((model, Format::Amd));
        }
        match config["model_type"].as_str() {
            Some(ModelConfig::MODEL_TYPE) => Ok((own(&file, config)?, Format::Zebroid)),
            other => {
                let known = family::ALL.iter().find(|f| other == Some(f.model_type));
                if let Some(family) = known {
                    return Ok(((family.read)(&file, &config)?, Format::Llama));
                }
                let name = other.unwrap_or("(none)");
                let refused = family::REFUSED.iter().find(|(p, _)| name.starts_with(p));
                let why = refused.map(|(_, why)| format!(" (it has {why})"));
                let names: Vec<&str> = family::ALL.iter().map(|f| f.model_type).collect();
                Err(Error::file(
                    &file,
                    format!(
                        "model_type {name} is not supported{}: {}, zebroid, or llama with hybrid_config.json",
                        why.unwrap_or_default(),
                        names.join(", ")
                    ),
                ))
            }
        }
    }

    /// What a checkpoint calls its model: the `model_type` of its `config.json`, a GGUF's `general.architecture`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn model_type(path: &Path) -> Result<Option<String>> {
        if Gguf::is_named(path) {
            let mut file = Gguf::open(path)?;
            return Ok(match file.header.metadata.remove(gguf::ARCHITECTURE) {
                Some(crate::gguf::Value::Text(name)) => Some(name),
                _ => None,
            });
        }
        let config = read_json(&config_file(path))?;
        Ok(config["model_type"].as_str().map(str::to_owned))
    }

    /// Whether there are weights beside a config, whole or not.
    pub fn has_weights(path: &Path) -> bool {
        Gguf::is_named(path) || (path.is_dir() && TensorFiles::are_in(path))
    }

    /// What stands on the disk, by type.
    pub fn on_disk(&self) -> BTreeMap<String, OnDisk> {
        let mut all = BTreeMap::<String, OnDisk>::new();
        let mut add = |(kind, shape, bytes): (String, &[usize], usize)| {
            let of = all.entry(kind).or_default();
            of.tensors += 1;
            of.entries += shape.iter().product::<usize>();
            of.bytes += bytes;
        };
        match &self.source {
            Source::Folder(files) => files.stored().for_each(&mut add),
            Source::Gguf(file) => file.stored().for_each(&mut add),
        }
        all
    }

    /// All that the model needs: matrices where they stand in the files, the rest (norms, recurrences, convolutions) in f32.
    ///
    /// # Errors
    /// Names the tensor (and file) that holds a value which is not a finite number.
    pub fn parts(&self) -> Result<Parts> {
        self.verify()?;
        let mut all = BTreeMap::new();
        for (name, _) in self.config.params() {
            let weight = match self.matrix(&name)? {
                Matrix::Dense(tensor) => tensor.to_dtype(DType::F32)?.into(),
                stored => stored,
            };
            all.insert(name, weight);
        }
        Ok(Parts::new(self.config.clone(), Weights::from(all)))
    }

    /// All that is stored, as it is stored, a copy of a tied head included.
    pub fn stored(&self) -> Result<Weights> {
        self.verify()?;
        let names: Vec<String> = match &self.source {
            Source::Folder(files) => files.names().map(str::to_owned).collect(),
            Source::Gguf(_) => self.config.params().into_iter().map(|p| p.0).collect(),
        };
        let all = names.into_iter().map(|name| {
            let weight = self.matrix(&name)?;
            Ok((name, weight))
        });
        Ok(all.collect::<Result<BTreeMap<_, _>>>()?.into())
    }

    /// Reads all data once and keeps none: checksums, and whether every number is finite.
    ///
    /// # Errors
    /// Names the file whose data are not those that were written, or every tensor that holds NaN or infinite values.
    pub fn examine(&self, watch: &dyn Watch) -> Result<()> {
        let params = self.config.params();
        watch.start("values", params.len());
        self.verify()?;
        let mut problems = Vec::new();
        for (done, (name, _)) in params.iter().enumerate() {
            problems.extend(self.matrix(name).err().map(|e| e.to_string()));
            watch.reached(done + 1, params.len(), "tensors")?;
        }
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Tensors {
                path: self.folder.clone(),
                problems,
            }),
        }
    }

    fn verify(&self) -> Result<()> {
        match &self.source {
            Source::Folder(files) => files.verify(),
            Source::Gguf(_) => Ok(()),
        }
    }

    fn matrix(&self, name: &str) -> Result<Matrix> {
        match &self.source {
            Source::Folder(files) => files.matrix(name),
            Source::Gguf(file) => file.matrix(name),
        }
    }

    /// How it came to be, for what is made of it.
    ///
    /// # Errors
    /// As [`Provenance::of`].
    pub fn provenance(&self) -> Result<Provenance> {
        Provenance::of(self, || self.parts()?.hash())
    }

    /// The model, ready to run.
    pub fn model(&self, place: &Place) -> Result<Lm> {
        self.parts()?.lm(place)
    }
}

/// Tensors of one type in a checkpoint's files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct OnDisk {
    pub tensors: usize,
    pub entries: usize,
    pub bytes: usize,
}

/// Of a folder, or the file itself.
fn config_file(path: &Path) -> PathBuf {
    match path.is_dir() {
        true => path.join("config.json"),
        false => path.to_owned(),
    }
}

/// A head stored beside `tie_word_embeddings` is a copy of the embedding, or else the model is untied
/// whatever its config says: Hugging Face's and AMD's savers both write such files.
fn resolve_head(config: &mut ModelConfig, files: &TensorFiles) -> Result<()> {
    const HEAD: &str = "lm_head.weight";
    if config.tie_word_embeddings && files.contains(HEAD) {
        config.tie_word_embeddings = files.same_bytes(HEAD, "model.embed_tokens.weight");
    }
    Ok(())
}

/// Our own `config.json`.
fn own(path: &Path, value: serde_json::Value) -> Result<ModelConfig> {
    let version = value["format_version"].as_u64();
    if version.is_none_or(|v| v > FORMAT_VERSION as u64) {
        return Err(Error::file(
            path,
            format!(
                "format_version {} is newer than {FORMAT_VERSION}: update zebroid",
                value["format_version"]
            ),
        ));
    }
    let config: ModelConfig = serde_json::from_value(value).map_err(|e| Error::file(path, e))?;
    config.validate().map_err(|e| Error::file(path, e))?;
    Ok(config)
}

/// Fields of a JSON object, with errors that name them.
struct Fields<'a> {
    path: &'a Path,
    object: &'a serde_json::Value,
}

impl<'a> Fields<'a> {
    fn wrong(&self, field: &str, wanted: &str) -> Error {
        let found = &self.object[field];
        Error::file(self.path, format!("{field} must be {wanted}, not {found}"))
    }

    fn given(&self, field: &str) -> Option<&'a serde_json::Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    fn maybe_size(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.given(field) else {
            return Ok(None);
        };
        let size = value.as_u64().and_then(|n| u32::try_from(n).ok());
        size.map(|n| Some(n as usize))
            .ok_or_else(|| self.wrong(field, "a whole number below 2^32"))
    }

    fn size(&self, field: &str) -> Result<usize> {
        self.maybe_size(field)?
            .ok_or_else(|| Error::file(self.path, format!("{field} is missing")))
    }

    fn number(&self, field: &str, default: f64) -> Result<f64> {
        match self.given(field) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.wrong(field, "a number")),
        }
    }

    fn object(&self, field: &str) -> Result<Option<&'a serde_json::Value>> {
        match self.given(field) {
            Some(value) if !value.is_object() => Err(self.wrong(field, "an object")),
            found => Ok(found),
        }
    }

    fn flag(&self, field: &str) -> Result<bool> {
        match self.given(field) {
            None => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(field, "true or false")),
        }
    }

    /// One id or a list of them.
    fn ids(&self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.given(field) else {
            return Ok(Vec::new());
        };
        let list = value
            .as_array()
            .cloned()
            .unwrap_or_else(|| vec![value.clone()]);
        let id = |v: &serde_json::Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        list.iter()
            .map(|v| id(v).ok_or_else(|| self.wrong(field, "a token id or a list of them")))
            .collect()
    }
}
