//! Datasets: rows with Hugging Face's field names, from a local folder.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::data::read_lines;
use crate::eval::task::Task;
use crate::hash::Hash;
use crate::{Error, Result};

/// One split of a dataset.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Files it was read from.
    pub files: Vec<PathBuf>,
    pub rows: Vec<Value>,
    /// Of the files' content.
    pub hash: String,
}

const SPLITS: [&str; 4] = ["train", "validation", "test", "dev"];

impl Dataset {
    /// `split` of the task's dataset in `folder`: JSON lines whose file name begins with the task's and holds
    /// the split's (`arc_easy_test.jsonl`), or, where the dataset is a folder of files, all files in it.
    ///
    /// # Errors
    /// Names what was looked for and what is there.
    pub fn open(folder: &Path, task: &Task, split: &str) -> Result<Self> {
        let files = files(folder, task, split)?;
        let (mut rows, mut hash) = (Vec::new(), Hash::new());
        for file in &files {
            let bytes = fs::read(file).map_err(Error::io("cannot read", file))?;
            hash = hash.with(&bytes);
            rows.extend(read_lines::<Value>(file, "a JSON object")?);
        }
        Ok(Self {
            files,
            rows,
            hash: hash.to_string(),
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

/// JSON lines of a folder whose names begin so, sorted.
fn listed(folder: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("cannot read", folder))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("cannot read", folder))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(prefix) && name.ends_with(".jsonl") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
