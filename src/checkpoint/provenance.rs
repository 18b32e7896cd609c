//! How a checkpoint came to be: a record (`provenance.json`) beside its weights, which every step carries on. The model card (`card.rs`) is
//! what it says, in words. What is not known is left out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Checkpoint, write_atomic};
use crate::mixer::MixerConfig;
use crate::model::ModelConfig;
use crate::{Error, Result};

/// Where it stands.
pub const RECORD: &str = "provenance.json";
/// The model card's file.
pub(super) const CARD: &str = "README.md";

/// What a checkpoint began as, and what was done with it since.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The checkpoint that the first step read its weights from; none for a model from scratch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Origin>,
    /// First to last.
    #[serde(default)]
    pub steps: Vec<Step>,
}

/// A checkpoint that others are made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// On the Hugging Face hub where its folder says so, else the folder's own.
    pub name: String,
    /// The hub's commit, where it came from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// A fingerprint of sizes and values ([`Parts::hash`](crate::model::Parts::hash)).
    pub hash: String,
    /// What its own card says of its licence, by the hub's keys.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub license: BTreeMap<String, String>,
    /// What KV ratios are of; none where the model is no Transformer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
}

/// Scalars that a Transformer caches for a sequence as long as its context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// In tokens.
    pub context: usize,
    pub scalars: usize,
}

/// What was done with a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// `compose`, `ild`, `kd`, `dpo`, `pretrain` or `export`.
    pub stage: String,
    /// Of the program.
    pub version: String,
    /// Whether the weights are bit for bit those of the step before.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub same_weights: bool,
    /// As recipes and flags spell them.
    pub settings: Value,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<Input>,
    /// Optimizer steps of the whole training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// That were trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Of the last step, and of evaluations after it, by the names of `metrics.jsonl`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
}

/// What a step has read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// `teacher`, `data`, `validation`, ..
    pub role: String,
    /// Without its folder.
    pub name: String,
    /// As [`Origin::revision`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Of a text the fingerprint of its tokens, of a checkpoint that of its weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
}

impl Input {
    pub fn new(role: &str, name: impl Into<String>, hash: Option<String>) -> Self {
        Self {
            role: role.to_owned(),
            name: name.into(),
            revision: None,
            hash,
        }
    }

    /// Its name, as `org/name@commit` where it is the hub's.
    pub fn spelled(&self) -> String {
        spelled(&self.name, self.revision.as_ref())
    }

    /// A file or folder.
    pub fn file(role: &str, path: &Path, hash: Option<String>) -> Self {
        let (name, revision) = name_of(path);
        Self {
            revision,
            ..Self::new(role, name, hash)
        }
    }
}

/// A name, of what is the hub's with its commit.
fn spelled(name: &str, revision: Option<&String>) -> String {
    match revision {
        Some(commit) => format!("{name}@{commit}"),
        None => name.to_owned(),
    }
}

impl Step {
    /// A step of this program; settings that nobody gave are dropped.
    pub fn new(stage: &str, settings: Value, inputs: Vec<Input>) -> Self {
        Self {
            stage: stage.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            settings: given(settings),
            inputs,
            ..Self::default()
        }
    }

    pub fn input(&self, role: &str) -> Option<&Input> {
        self.inputs.iter().find(|input| input.role == role)
    }
}

/// A value without what is null or an empty list.
fn given(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let said = fields
                .into_iter()
                .filter(|(_, v)| !v.is_null() && v.as_array().is_none_or(|list| !list.is_empty()));
            Value::Object(said.map(|(name, v)| (name, given(v))).collect())
        }
        other => other,
    }
}

impl Provenance {
    /// What stands in a folder; none: nobody knows.
    ///
    /// # Errors
    /// A file that is no such record.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let file = folder.join(RECORD);
        if !file.exists() {
            return Ok(None);
        }
        let wrong = |e| Error::file(&file, format!("no record of zebroid's ({e}): remove it"));
        let record = serde_json::from_value(super::read_json(&file)?).map_err(wrong)?;
        Ok(Some(record))
    }

    /// What is to be carried on of a checkpoint: its own record, in which it is the base itself if none is named. `hash`:
    /// the fingerprint of its weights.
    ///
    /// # Errors
    /// A record that cannot be read, or weights that cannot.
    pub fn of(checkpoint: &Checkpoint, hash: impl FnOnce() -> Result<String>) -> Result<Self> {
        let mut record = Self::read(&checkpoint.folder)?.unwrap_or_default();
        if record.base.is_none() {
            record.base = Some(Origin::new(checkpoint, hash()?));
        }
        Ok(record)
    }

    /// With one step more.
    pub fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Writes the record alone.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).expect("records serialise") + "\n";
        write_atomic(&folder.join(RECORD), text.as_bytes())
    }

    /// Scalars cached over the base's, at the base's context, and that context.
    pub fn kv_ratio(&self, config: &ModelConfig) -> Option<(f64, usize)> {
        let Cache { context, scalars } = self.base.as_ref()?.cache?;
        let cached = config.cost(context).cached;
        (scalars > 0).then(|| (cached as f64 / scalars as f64, context))
    }

    /// The step that made the weights what they are.
    pub fn last_change(&self) -> Option<&Step> {
        self.steps.iter().rev().find(|step| !step.same_weights)
    }
}

impl Origin {
    /// As [`Input::spelled`].
    pub fn spelled(&self) -> String {
        spelled(&self.name, self.revision.as_ref())
    }

    fn new(checkpoint: &Checkpoint, hash: String) -> Self {
        let config = &checkpoint.config;
        let context = config.max_position_embeddings;
        let is_attention = |layer: &MixerConfig| matches!(layer, MixerConfig::Attention(_));
        let transformer = config.layers.iter().all(is_attention);
        let (name, revision) = name_of(&checkpoint.folder);
        Self {
            name,
            revision,
            hash,
            license: license(&checkpoint.folder),
            cache: transformer.then(|| Cache {
                context,
                scalars: config.cost(context).cached,
            }),
        }
    }
}

/// Keys of the hub that say under what licence a model is.
const LICENSE: [&str; 3] = ["license", "license_name", "license_link"];

/// What the card in a folder says of the licence, by [`LICENSE`]'s keys.
fn license(folder: &Path) -> BTreeMap<String, String> {
    let text = fs::read_to_string(folder.join(CARD)).unwrap_or_default();
    let mut lines = text.lines().map(str::trim_end);
    if lines.next() != Some("---") {
        return BTreeMap::new();
    }
    let pairs = lines
        .take_while(|line| *line != "---")
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim().trim_matches(['"', '\''])));
    let said = pairs.filter(|(key, value)| LICENSE.contains(key) && !value.is_empty());
    said.map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// `OWNER/NAME` of what is in the hub's cache (`models--OWNER--NAME/snapshots/COMMIT`, of data sets `datasets--..`) and its commit, else
/// the last part of the path.
fn name_of(path: &Path) -> (String, Option<String>) {
    let text = |path: &Path| -> Vec<String> {
        let parts = path.iter().map(|part| part.to_string_lossy().into_owned());
        parts.collect()
    };
    // A file there is a link that leads away from its commit.
    let named = std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path));
    let whole = fs::canonicalize(path).unwrap_or_else(|_| PathBuf::from(path));
    let (named, whole) = (text(&named), text(&whole));
    if let Some(found) = on_hub(&named).or_else(|| on_hub(&whole)) {
        return found;
    }
    // What a link is called says more than what it leads to.
    let own = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    (own.or(whole.last().cloned()).unwrap_or_default(), None)
}

fn on_hub(parts: &[String]) -> Option<(String, Option<String>)> {
    let kinds = ["models--", "datasets--"];
    let repo = |part: &String| {
        kinds
            .iter()
            .find_map(|kind| part.strip_prefix(kind).map(str::to_owned))
    };
    let (at, repo) = parts
        .iter()
        .enumerate()
        .find_map(|(at, part)| Some((at, repo(part)?)))?;
    let commit = match parts.get(at + 1..at + 3) {
        Some([snapshots, commit]) if snapshots == "snapshots" => Some(commit.clone()),
        _ => None,
    };
    Some((repo.replacen("--", "/", 1), commit))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_the_hubs_or_the_folders() {
        let root = tempfile::tempdir().unwrap();
        let cached = root
            .path()
            .join("models--meta-llama--Llama-3.2-1B/snapshots/0123");
        fs::create_dir_all(&cached).unwrap();
        let of_hub = (
            "meta-llama/Llama-3.2-1B".to_owned(),
            Some("0123".to_owned()),
        );
        assert_eq!(name_of(&cached), of_hub);
        #[cfg(unix)]
        {
            // A file of the cache, and a link to it from elsewhere.
            let gguf = cached.join("q4.gguf");
            let blobs = cached.join("../../blobs");
            fs::create_dir(&blobs).unwrap();
            fs::write(blobs.join("ab"), "").unwrap();
            std::os::unix::fs::symlink("../../blobs/ab", &gguf).unwrap();
            assert_eq!(name_of(&gguf), of_hub);
            let link = root.path().join("mine");
            std::os::unix::fs::symlink(&cached, &link).unwrap();
            assert_eq!(name_of(&link), of_hub);
        }
        let plain = |path: &Path| {
            let (name, revision) = name_of(path);
            assert_eq!(revision, None);
            name
        };
        let inside = root.path().join("teacher");
        fs::create_dir(&inside).unwrap();
        assert_eq!(plain(&inside), "teacher");
        assert_eq!(plain(&inside.join("..").join("teacher/.")), "teacher");
        assert_eq!(plain(&root.path().join("nowhere.jsonl")), "nowhere.jsonl");
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(Provenance::read(root.path()).unwrap(), None);
        let settings = json!({ "kd": { "lr": 0.1, "labels": null, "layers": [] }, "x": [1] });
        let data = Input::file("data", Path::new("/data/train.jsonl"), Some("00".into()));
        let mut step = Step::new("kd", settings, vec![data]);
        assert_eq!(step.settings, json!({ "kd": { "lr": 0.1 }, "x": [1] }));
        step.figures.insert("eval_kl".into(), 0.1 + 0.2);
        let record = Provenance::default().then(step);
        record.write(root.path()).unwrap();
        assert_eq!(Provenance::read(root.path()).unwrap(), Some(record));
        fs::write(root.path().join(RECORD), r#"{"steps": 1}"#).unwrap();
        let said = Provenance::read(root.path()).unwrap_err().to_string();
        assert!(said.contains("provenance.json: no record"), "{said}");
    }

    #[test]
    fn licences_are_read_from_the_bases_card() {
        let folder = tempfile::tempdir().unwrap();
        let said = |text: &str| {
            fs::write(folder.path().join(CARD), text).unwrap();
            license(folder.path()).into_iter().collect::<Vec<_>>()
        };
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let text =
            "---\nlanguage:\n- en\nlicense: llama3.2\nlicense_name: 'x'\n---\nlicense_link: no";
        let wanted = [pair("license", "llama3.2"), pair("license_name", "x")];
        assert_eq!(said(text), wanted);
        assert_eq!(said("# A model\nlicense: mit\n"), []);
        assert_eq!(said("---\nlicense:\n- mit\n---\n"), []);
    }
}
