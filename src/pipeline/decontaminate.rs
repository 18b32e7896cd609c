//! What training texts are held against: tasks of `eval harness`, and files.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::{Decontamination, Ngrams, Records};
use crate::eval::harness::{Dataset, Source};
use crate::eval::task::{GROUPS, Task, find};
use crate::hub::{self, Hub, Id};
use crate::watch::Watch;
use crate::{Error, Result};

/// `[data.decontaminate]`: texts that share a run of words with these are not learned from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decontaminate {
    /// Files of records (here or on the hub), or tasks and groups of tasks.
    pub against: Vec<String>,
    /// Words of a run.
    #[serde(default = "ngram")]
    pub ngram: usize,
    /// Folder of the tasks' datasets [default: Hugging Face's, as eval harness keeps them].
    #[serde(default)]
    pub data_dir: Option<PathBuf>,
}

/// As GPT-3's.
pub const NGRAM: usize = 13;

fn ngram() -> usize {
    NGRAM
}

impl Decontaminate {
    /// Relative paths start at `folder`.
    pub(super) fn settle(&mut self, folder: &Path) {
        for name in &mut self.against {
            let file = folder.join(&*name);
            if file.is_file() {
                *name = file.display().to_string();
            }
        }
        (self.data_dir.iter_mut()).for_each(|inner| *inner = folder.join(&*inner));
    }

    /// As a manifest has it.
    pub(super) fn of(manifest: &Decontamination) -> Self {
        Self {
            against: manifest.against.clone(),
            ngram: manifest.ngram,
            data_dir: manifest.data_dir.as_ref().map(PathBuf::from),
        }
    }

    /// The runs of all.
    ///
    /// # Errors
    /// A name that is neither a file nor a task, records that cannot be read, or what became of a download.
    pub fn ngrams(&self, watch: &dyn Watch) -> Result<Ngrams> {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let text = |path: &Path| absolute(path).display().to_string();
        let named = self.against.iter().map(|name| match Path::new(name) {
            file if file.is_file() => text(file),
            _ => name.clone(),
        });
        let named: Vec<String> = named.collect();
        let folder = self.data_dir.as_deref().map(text);
        let mut ngrams = Ngrams::new(self.ngram, &named, folder)?;
        let source = match &self.data_dir {
            Some(folder) => Source::Folder(folder.clone()),
            None => Source::Hub(Hub::from_env()),
        };
        for name in &named {
            let file = Path::new(name);
            if file.is_file() || Id::data(file)?.is_some() {
                let file = hub::data(file, watch)?;
                for record in Records::open(&file, "a JSON object")? {
                    ngrams.add(&record?);
                }
                continue;
            }
            let missing = |e: Error| Error::invalid(format!("decontaminate: no file {name}; {e}"));
            for task in tasks(name).map_err(missing)? {
                let rows = Dataset::open(&source, task, task.split, watch)?.rows;
                ngrams.add(&Value::Array(rows));
            }
        }
        if ngrams.is_empty() {
            return Err(Error::invalid(format!(
                "decontaminate: {} have no run of {} words: lower ngram",
                named.join(", "),
                self.ngram
            )));
        }
        Ok(ngrams)
    }
}

/// A task, or those of a group.
fn tasks(name: &str) -> Result<Vec<&'static Task>> {
    match GROUPS.iter().find(|group| group.name == name) {
        Some(group) => group.tasks.iter().map(|(name, ..)| find(name)).collect(),
        None => Ok(vec![find(name)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::Quiet;

    #[test]
    fn tasks_and_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("own.jsonl");
        let own = "one two three four five six seven eight nine ten eleven twelve thirteen";
        std::fs::write(&file, format!("{{\"any\": [\"{own}\"]}}\n")).unwrap();
        let asked = |against: &[&str], ngram| Decontaminate {
            against: against.iter().map(|name| (*name).to_owned()).collect(),
            ngram,
            data_dir: Some("tests/golden/harness/data".into()),
        };
        let file = file.to_str().unwrap();
        let ngrams = asked(&["lambada_openai", file], 13)
            .ngrams(&Quiet::default())
            .unwrap();
        assert!(ngrams.find(&format!("So: {own}.")).is_some());
        let rows = std::fs::read_to_string("tests/golden/harness/data/lambada_openai_test.jsonl");
        let row: Value = serde_json::from_str(rows.unwrap().lines().next().unwrap()).unwrap();
        let sentence = row["text"].as_str().unwrap();
        assert!(
            ngrams.find(&format!("He said: {sentence}")).is_some(),
            "{sentence}"
        );
        assert!(ngrams.len() > 1);
        for (names, ngram, part) in [
            (&["winogrand"][..], 13, "no file winogrand; no task"),
            (&[file], 14, "no run of 14 words"),
            (&[file], 0, "ngram must not be 0"),
        ] {
            let said = asked(names, ngram).ngrams(&Quiet::default()).unwrap_err();
            assert!(said.to_string().contains(part), "{said}");
        }
    }
}
