//! How models and files of data sets are named: as Hugging Face's own tools name them.

use std::fmt;
use std::path::Path;

use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Model,
    Dataset,
}

/// A repository of the hub, at a revision, and perhaps one file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id {
    pub kind: Kind,
    /// `org/name`.
    pub repo: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    pub file: Option<String>,
}

/// What says plainly that a name is the hub's.
const SCHEME: &str = "hf://";
const DATASETS: &str = "hf://datasets/";
/// The branch that a name without a revision means.
const MAIN: &str = "main";
/// Endings of files, which a path has and no model's name.
const FILES: [&str; 5] = [".json", ".gguf", ".safetensors", ".toml", ".jsonl"];

impl Id {
    /// `org/name[@revision][/FILE.gguf]`, or the same behind `hf://`; none where it is a path: one that exists, or that is no such name.
    ///
    /// # Errors
    /// A name that begins with `hf://` and is none.
    pub fn model(said: &Path) -> Result<Option<Self>> {
        let Some(text) = said.to_str().filter(|_| !said.exists()) else {
            return Ok(None);
        };
        let plain = text.strip_prefix(SCHEME);
        let found = Self::parse(Kind::Model, plain.unwrap_or(text));
        let found = found.filter(|id| id.file.as_ref().is_none_or(|file| file.ends_with(".gguf")));
        match (found, plain) {
            (None, Some(_)) => Err(Error::invalid(format!(
                "{text}: give hf://org/name[@revision], and of a model in one file hf://org/name[@revision]/FILE.gguf"
            ))),
            (found, Some(_)) => Ok(found),
            // A file that is not there.
            (found, None) => {
                Ok(found.filter(|id| !FILES.iter().any(|ending| id.repo.ends_with(ending))))
            }
        }
    }

    /// `hf://datasets/org/name[@revision]/FILE`, or, of the parquet files that the hub makes of every data set, `hf://datasets/org/name`
    /// (split train) or `hf://datasets/org/name/CONFIG/SPLIT`; none of what does not begin so, or exists as a path.
    ///
    /// # Errors
    /// A name that begins so and does not go on so.
    pub fn data(said: &Path) -> Result<Option<Self>> {
        let named = said.to_str().filter(|_| !said.exists());
        let Some(text) = named.filter(|text| text.starts_with(SCHEME)) else {
            return Ok(None);
        };
        let found = text
            .strip_prefix(DATASETS)
            .and_then(|rest| Self::parse(Kind::Dataset, rest));
        let wrong = || {
            Error::invalid(format!(
                "{text}: give hf://datasets/org/name[@revision]/FILE, or hf://datasets/org/name[/CONFIG/SPLIT] for the parquet files that the \
                 hub makes of every data set"
            ))
        };
        let known = |id: &Self| {
            let named = id
                .file
                .as_deref()
                .is_none_or(|file| id.is_split() || file.contains('.'));
            named && (!id.is_split() || id.revision == MAIN)
        };
        found.filter(known).ok_or_else(wrong).map(Some)
    }

    /// Whether it names a split of a data set, and no file.
    pub fn is_split(&self) -> bool {
        let of_config = |file: &str| file.matches('/').count() == 1 && !file.contains('.');
        self.kind == Kind::Dataset && self.file.as_deref().is_none_or(of_config)
    }

    /// Configuration and split; `*` is any configuration.
    pub(super) fn split(&self) -> (&str, &str) {
        let named = self.file.as_deref().and_then(|file| file.split_once('/'));
        named.unwrap_or(("*", "train"))
    }

    /// What stands behind the scheme.
    fn parse(kind: Kind, text: &str) -> Option<Self> {
        let (org, rest) = text.split_once('/')?;
        let end = rest.find(['@', '/']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(end);
        let (revision, file) = match rest.strip_prefix('@') {
            None => (MAIN.to_owned(), rest.strip_prefix('/')),
            Some(rest) => {
                // refs/pr/1 and refs/convert/parquet are one revision.
                let slashes = rest.match_indices('/').map(|(at, _)| at);
                let last = match rest.starts_with("refs/") {
                    true => 2,
                    false => 0,
                };
                let end = slashes.clone().nth(last).unwrap_or(rest.len());
                let (revision, rest) = rest.split_at(end);
                (revision.replace("%2F", "/"), rest.strip_prefix('/'))
            }
        };
        let word = |text: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            !text.is_empty()
                && text.chars().all(known)
                && !text.starts_with(['.', '-'])
                && !text.contains("..")
        };
        let whole = word(org)
            && word(name)
            && revision.split('/').all(word)
            && file.is_none_or(is_inner_path);
        whole.then(|| Self {
            kind,
            repo: format!("{org}/{name}"),
            revision,
            file: file.map(str::to_owned),
        })
    }

    /// The folder of addresses: none of models.
    pub(super) fn plural(&self) -> &'static str {
        match self.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        }
    }

    /// What it is to people.
    pub(super) fn noun(&self) -> &'static str {
        match self.kind {
            Kind::Model => "model",
            Kind::Dataset => "data set",
        }
    }
}

/// Whether a path can lead to nothing outside its folder. Names of files come from the hub, too.
pub(super) fn is_inner_path(path: &str) -> bool {
    let part = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\\', ':', '\0']);
    path.split('/').all(part)
}

/// As it is spelled plainly.
impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Model => SCHEME,
            Kind::Dataset => DATASETS,
        })?;
        f.write_str(&self.repo)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        match &self.file {
            Some(file) => write!(f, "/{file}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(id: Option<Id>) -> Option<(String, String, Option<String>)> {
        id.map(|id| (id.repo, id.revision, id.file))
    }

    #[test]
    fn models_are_ids_or_paths() {
        let model = |text: &str| parts(Id::model(Path::new(text)).unwrap());
        let id = |repo: &str, revision: &str, file: Option<&str>| {
            Some((repo.into(), revision.into(), file.map(String::from)))
        };
        let llama = "meta-llama/Llama-3.2-1B";
        assert_eq!(model(llama), id(llama, "main", None));
        assert_eq!(model(&format!("hf://{llama}@v1")), id(llama, "v1", None));
        assert_eq!(
            model("org/a@refs/pr/7/q4.gguf"),
            id("org/a", "refs/pr/7", Some("q4.gguf"))
        );
        assert_eq!(model("org/a@refs%2Fpr%2F7"), id("org/a", "refs/pr/7", None));
        assert_eq!(
            model("org/a/in/q4.gguf"),
            id("org/a", "main", Some("in/q4.gguf"))
        );
        for path in [
            "teacher",
            "./runs/demo",
            "../runs/demo",
            "/runs/demo",
            "~/demo",
            "runs/demo/",
            "runs/demo/distilled",
            "runs/config.json",
            "models/q4.gguf",
            "org/a/../q4.gguf",
            "org/a@",
            "org/a b",
            // It is there.
            "src/hub",
        ] {
            assert_eq!(model(path), None, "{path}");
        }
        let said = Id::model(Path::new("hf://org")).unwrap_err().to_string();
        assert!(said.contains("hf://org: give hf://org/name"), "{said}");
    }

    #[test]
    fn files_of_data_sets_are_spelled_as_fsspec_does() {
        let spelled = "hf://datasets/org/set@refs/convert/parquet/default/train/0000.parquet";
        let id = Id::data(Path::new(spelled)).unwrap().unwrap();
        assert_eq!(id.to_string(), spelled);
        assert_eq!(id.revision, "refs/convert/parquet");
        assert_eq!(id.file.as_deref(), Some("default/train/0000.parquet"));
        let plain = "hf://datasets/org/set/a.jsonl";
        assert_eq!(
            Id::data(Path::new(plain)).unwrap().unwrap().to_string(),
            plain
        );
        assert_eq!(Id::data(Path::new("org/set/a.jsonl")).unwrap(), None);
        let split = |text: &str| {
            let id = Id::data(Path::new(text)).unwrap().unwrap();
            assert!(id.is_split() && id.to_string() == text);
            let (config, split) = id.split();
            format!("{config}/{split}")
        };
        assert_eq!(split("hf://datasets/org/set"), "*/train");
        assert_eq!(split("hf://datasets/org/set/default/test"), "default/test");
        for wrong in [
            "hf://org/set/a.jsonl",
            "hf://datasets/org/set/train",
            "hf://datasets/org/set@v1/default/train",
            "hf://datasets/org/set/../a",
        ] {
            let said = Id::data(Path::new(wrong)).unwrap_err().to_string();
            assert!(said.contains(wrong) && said.contains("/FILE"), "{said}");
        }
    }
}
