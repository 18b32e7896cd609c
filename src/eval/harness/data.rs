//! Datasets: rows with Hugging Face's field names, from a local folder or from the hub.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::data::read_records;
use crate::eval::task::Task;
use crate::hash::Hash;
use crate::hub::Hub;
use crate::watch::Watch;
use crate::{Error, Result};

/// Where datasets come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// JSON lines, parquet or Arrow, file names beginning with [`Task::files`].
    Folder(PathBuf),
    /// By [`Task::dataset`] and [`Task::config`].
    Hub(Hub),
}

/// One split of a dataset.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Files it was read from.
    pub files: Vec<PathBuf>,
    pub rows: Vec<Value>,
    /// Of the files' content.
    pub hash: String,
    /// The hub's commit.
    pub revision: Option<String>,
}

const SPLITS: [&str; 4] = ["train", "validation", "test", "dev"];
const ENDINGS: [&str; 4] = [".jsonl", ".parquet", ".arrow", ".feather"];

impl Dataset {
    /// `split` of the task's dataset. In a folder: the file whose name begins with the task's and holds the
    /// split's (`arc_easy_test.jsonl`), or, where the dataset is a folder of files, all files in it.
    ///
    /// # Errors
    /// Names what was looked for and what is there, or what became of a download.
    pub fn open(source: &Source, task: &Task, split: &str, watch: &dyn Watch) -> Result<Self> {
        let (files, revision) = match source {
            Source::Folder(folder) => (files(folder, task, split)?, None),
            Source::Hub(hub) => {
                let found = hub.split(task.dataset, task.config, split, watch);
                let (files, revision) = found.map_err(other_source)?;
                (files, Some(revision))
            }
        };
        let (mut rows, mut hash) = (Vec::new(), Hash::new());
        for file in &files {
            let bytes = fs::read(file).map_err(Error::io("cannot read", file))?;
            hash = hash.with(&bytes);
            rows.extend(read_records::<Value>(file, "a JSON object")?);
        }
        if rows.is_empty() {
            return Err(Error::invalid(format!(
                "no row in the {split} split of {}: {files:?}",
                task.name
            )));
        }
        Ok(Self {
            files,
            rows,
            hash: hash.to_string(),
            revision,
        })
    }

    /// The files' names, for messages.
    pub fn name(&self) -> String {
        let name = |path: &PathBuf| path.file_name().map(|n| n.to_string_lossy().into_owned());
        match self.files.as_slice() {
            [one] => name(one).unwrap_or_default(),
            [first, ..] => {
                let parent = first.parent().unwrap_or(first);
                parent.display().to_string()
            }
            [] => String::new(),
        }
    }
}

/// What cannot be downloaded can be given.
fn other_source(error: Error) -> Error {
    let more = |what| format!("{what}; or give the data set's files with --data-dir");
    match error {
        Error::Invalid(what) => Error::Invalid(more(what)),
        Error::Unreachable(what) => Error::Unreachable(more(what)),
        other => other,
    }
}

fn files(folder: &Path, task: &Task, split: &str) -> Result<Vec<PathBuf>> {
    let inner = folder.join(task.files);
    if inner.is_dir() {
        let files = listed(&inner, "")?;
        if !files.is_empty() {
            return Ok(files);
        }
    }
    let all = listed(folder, task.files)?;
    let holds = |path: &Path, split: &str| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        stem[task.files.len()..].contains(split)
    };
    let mut fitting: Vec<PathBuf> = all.iter().filter(|f| holds(f, split)).cloned().collect();
    if fitting.is_empty() {
        // A file that names no split is the one there is.
        let plain = |f: &&PathBuf| !SPLITS.iter().any(|split| holds(f, split));
        fitting = all.iter().filter(plain).cloned().collect();
    }
    match fitting.as_slice() {
        [_] => Ok(fitting),
        [] => Err(Error::file(
            folder,
            format!(
                "no {split} split of {} ({} {}): it should be in {}_{split}.jsonl",
                task.name, task.dataset, task.config, task.files
            ),
        )),
        _ => Err(Error::file(
            folder,
            format!(
                "several files could be the {split} split of {}: {fitting:?}",
                task.name
            ),
        )),
    }
}

/// Data files of a folder whose names begin so, sorted.
fn listed(folder: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("cannot read", folder))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("cannot read", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(prefix) && ENDINGS.iter().any(|e| name.ends_with(e)) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
